"""Model cards: every figure states its conditions, only measured figures appear, and terms match the sources used."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from egmf import readme
from egmf.processing_egmf import BUILTIN_TASKS, AffectTask
from egmf.publishing.model_card import FinishedRun, card_data, eval_results, write_card
from egmf.readme import section
from egmf.recipe import default_record
from egmf.recipe_reading import load_recipe


LLM = "Qwen/Qwen3-0.6B"
CLASSES = {
    "greedy": {"accuracy": 0.5, "weighted_f1": 0.4, "f1_by_class": {"joy": None, "anger": 0.25}, "unparsable": 3}
}
SCORES = {
    "greedy": {"mae": 1.25, "corr": None, "acc7": 0.125, "has0_acc2": 0.5, "zero_predictions": 2, "unparsable": 1},
    "expected": {"mae": 0.75, "corr": 0.625, "acc7": 0.25, "has0_acc2": 0.5, "zero_predictions": 0, "unparsable": 0},
}


def report(corpus: str, answers: dict, **fields) -> dict:
    spread = {answer: {"mae": [0.5, 1.0], "accuracy": [0.25, 0.75], "acc7": None} for answer in answers}
    common = {"split": "test", "samples": 12, "label_map": None, "modalities": ["text", "audio", "vision"]}
    return {"corpus": corpus, "task": corpus, "answers": answers, "intervals": spread, **common, **fields}


def run_of(corpus: str, task: str, *reports: dict, config: dict | None = None, **recipe) -> FinishedRun:
    fields = default_record() | {"language_model": LLM, "corpus": corpus, "tasks": [task]}
    fields |= {"packages": {"python": "3.12"}, "training": {}}
    features = {"audio_feature_size": 74, "vision_feature_size": 35}
    return FinishedRun(
        folder=Path(),
        recipe=fields | recipe,
        config={"text_config": {"_name_or_path": LLM}} | (features if config is None else config),
        tasks=[BUILTIN_TASKS[task]],
        log=[],
        evaluations={f"test{number}": measured for number, measured in enumerate(reports)},
        left_out=[],
        base_model=LLM,
        hub_towers={},
    )


@pytest.fixture
def card_of(tmp_path):
    return lambda run, license=None: write_card(tmp_path, run, "me/model", license, False)


def test_every_figure_that_is_defined_and_no_other(card_of):
    run = run_of("mosei", "mosei", report("mosei", SCORES))
    named = {result.metric_name: result for result in eval_results(run)}
    assert len(named) == 7  # of eight figures one is not defined
    mae = named["MAE, expected answer, 95 % interval 0.5000 to 1.0000, 12 samples, task mosei"]
    assert (mae.metric_type, mae.metric_value, mae.dataset_name, mae.dataset_split) == (
        "mae",
        0.75,
        "CMU-MOSEI",
        "test",
    )
    assert "Acc-7, greedy answer, no interval, 12 samples, task mosei" in named
    assert {result.metric_type for result in named.values()} == {"mae", "pearsonr", "accuracy"}
    card = card_of(run)
    assert [result.metric_value for result in card.data.eval_results] == [r.metric_value for r in eval_results(run)]
    assert "| MAE | 1.2500 [0.5000, 1.0000] | 0.7500 [0.5000, 1.0000] |" in card.text
    assert "| Corr | - | 0.6250 |" in card.text and "| unparsable | 1 | 0 |" in card.text
    assert card.data.tags[2] == "sentiment-analysis" and "a score from -3.0 to +3.0 in steps of 0.1" in card.text


def test_other_options_than_those_of_the_training_are_named(card_of):
    """Another fold may hold actors that the model has learned from."""
    own, other = (report("ravdess", CLASSES, corpus_options={"fold": fold}) for fold in (1, 2))
    text = card_of(run_of("ravdess", "ravdess", own, other, corpus_options={"fold": 1})).text
    assert "### RAVDESS, test: 12 samples, task ravdess\n" in text
    assert 'task ravdess, corpus_options {"fold": 2}, other than those of the training\n' in text


def test_files_that_could_not_be_read_stand_beside_the_figures(card_of):
    text = card_of(run_of("ravdess", "ravdess", report("ravdess", CLASSES) | {"unreadable": 3})).text
    assert "12 samples, task ravdess, 3 of them answered without a file that cannot be read" in text


def test_positive_and_negative_are_a_sentiment(card_of):
    card = card_of(run_of("mosi", "mosi", report("mosi", CLASSES)))
    assert card.data.tags[2] == "sentiment-analysis" and "answers with a sentiment" in card.text
    assert {result.task_name for result in card.data.eval_results} == {"Sentiment analysis"}


def test_what_a_figure_was_measured_under(card_of):
    """The figure states if it used a label map to another corpus or fewer modalities than the model accepts."""
    mapped = report("cherma", CLASSES, task="meld", label_map="meld-cherma")
    alone = report("meld", CLASSES, modalities=["text"])
    run = run_of("meld", "meld", mapped, alone)
    names = [result.metric_name for result in eval_results(run)]
    assert len(names) == 4
    assert all(name.endswith("12 samples, task meld, labels by meld-cherma") for name in names[:2])
    assert all(name.endswith("12 samples, task meld, sees text alone") for name in names[2:])
    card = card_of(run)
    assert [result.dataset_type for result in card.data.eval_results] == ["cherma"] * 2 + ["declare-lab/MELD"] * 2
    assert card.data.datasets == ["declare-lab/MELD"]  # what it was trained on
    assert "### CHERMA, test: 12 samples, task meld, labels by meld-cherma" in card.text
    assert "| f1 by class: joy | - |" in card.text and "| f1 by class: anger | 0.2500 |" in card.text


@pytest.mark.parametrize(
    ("license", "front", "words"),
    [
        (
            None,
            {"license": "other", "license_name": "base-model-and-corpora"},
            "not put it under a licence of its own",
        ),
        ("gpl-3.0", {"license": "gpl-3.0"}, "has put it under `gpl-3.0`"),
    ],
)
def test_terms(card_of, license, front, words):
    card = card_of(run_of("meld", "meld"), license)
    terms = {name: value for name, value in card.data.to_dict().items() if name.startswith("license")}
    terms.pop("license_link", None)
    assert terms == front
    text = card.text[card.text.index("## Licence") :]
    assert words in text and f"https://huggingface.co/{LLM}" in text and "GPL-3.0" in text


def test_languages_and_modalities(card_of):
    towers = {"audio_config": {"hidden_size": 4}, "vision_config": {"hidden_size": 4}}
    run = run_of("cherma", "cherma", config=towers, audio_tower="me/hubert", vision_tower="me/clip")
    card = card_of(run)
    assert card.data.language == ["zh"] and card.data.pipeline_tag == "video-text-to-text"
    assert 'recognize("clip.mp4", text="真是太好了。")' in card.text and "`me/hubert` and `me/clip`" in card.text
    assert "A model that reads words, sound and pictures and answers with an emotion" in card.text
    heard = run_of("ravdess", "ravdess", config={"audio_config": {"hidden_size": 4}})
    data = card_data(heard, "me/model", None, False)
    assert (data.language, data.pipeline_tag, data.base_model_relation) == (["en"], "audio-text-to-text", "finetune")


def test_a_model_without_words(card_of):
    heard = {"audio_config": {"hidden_size": 4}}
    alone = report("casia", CLASSES, modalities=["audio"])
    card = card_of(run_of("casia", "casia", alone, config=heard, audio_tower="me/w", modalities=["audio"]))
    assert "A model that reads sound and answers with an emotion" in card.text
    assert 'recognize("clip.wav"))' in card.text and 'processor(audio="clip.wav", task="casia")' in card.text
    assert "was trained without words" in card.text and "sees audio alone" not in card.text
    seen = card_of(run_of("ravdess", "ravdess", config={"vision_feature_size": 35}, modalities=["vision"])).text
    assert 'processor(vision_features=vision_features, task="ravdess")' in seen and "recognize(" not in seen


def test_a_task_of_ones_own_has_no_subject(card_of):
    run = run_of("table", "mosei", report("table", SCORES, task="pain"))
    task = {"name": "pain", "kind": "regression", "low": 0, "high": 10, "step": 1, "prompt": "?", "cue": "P:"}
    run.tasks[:] = [AffectTask.from_dict(task)]
    card = card_of(run)
    assert "answers with a score, in text" in card.text and "sentiment" not in " ".join(card.data.tags)
    assert {result.task_name for result in eval_results(run)} == {"Pain"}


def test_limits_by_what_was_used(card_of):
    plain = card_of(run_of("mosi", "mosi")).text
    assert "as precomputed arrays, not as files" in plain and "rounded to 4 bits" not in plain
    assert "began with random weights" not in plain
    drawn = card_of(run_of("avatars", "avatars", config={"vision_config": {"hidden_size": 4}})).text
    assert "in which no person is seen or heard" in drawn and "how people feel or talk elsewhere" not in drawn
    copied = run_of("mosi", "mosi", shrink=16)
    copied.config["text_config"]["_name_or_path"] = ""
    assert "may be one whose weights were rounded to 4 bits" in card_of(copied).text
    assert "began with random weights" in card_of(copied).text


def test_a_mixture_names_all_its_corpora(card_of):
    mixture = {"meld": {"tasks": ["meld"], "weight": 1}, "cherma": {"tasks": ["cherma"], "weight": 2}}
    run = run_of("meld", "meld", corpora=mixture)
    assert "tasks" not in run.recipe_fields and run.recipe_fields["corpora"] == mixture
    text = card_of(run).text
    assert "[MELD](https://github.com/declare-lab/MELD)" in text and "[CHERMA](" in text


def test_the_recipe_of_a_mixture_defines_its_own_tasks_once(tmp_path):
    """A second definition of a name would be refused."""
    stress = {"name": "stress", "labels": ["calm", "tense"], "prompt": "Is the last speaker calm or tense?"}
    parts = {"meld": {"tasks": [stress], "weight": 1}, "table": {"tasks": ["stress"], "weight": 2}}
    recipe = {"language_model": "tiny-random", "corpora": parts, "output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = load_recipe([str(tmp_path / "recipe.yaml")]).data
    run = run_of("meld", "meld", corpora=data.corpora, task_definitions=data.task_definitions)
    published = recipe | {"corpora": run.recipe_fields["corpora"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(published))
    again = load_recipe([str(tmp_path / "recipe.yaml")]).data
    assert (again.corpora, again.task_definitions) == (data.corpora, data.task_definitions)


def test_losses_of_all_phases(card_of):
    run = run_of("mosi", "mosi")
    lines = [(None, 5, 2.0), (None, 10, 1.5), ("experts", 3, 0.75), (None, 10, 1.25)]  # step 10 again after a restart
    run.log = [
        {"step": step, "epoch": step / 10, "loss": loss} | ({"phase": name} if name else {})
        for name, step, loss in lines
    ]
    run.log.append({"step": 10, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0})
    text = card_of(run).text
    assert "| LLM with LoRA | 10 | 1.00 | 2 | 1.25 |" in text and "| experts | 3 | 0.30 | 0.75 | 0.75 |" in text
    assert "| 1.00 | 0.5 | 0.75 |" in text and "runtime" not in text


def test_words_of_the_readme_are_quoted(card_of, monkeypatch, tmp_path):
    card = card_of(run_of("mosi", "mosi"))
    assert section("Use and misuse") in card.text and section("Citation") in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    (tmp_path / "other.md").write_text("# EGMF\n")
    monkeypatch.setattr(readme, "README", tmp_path / "other.md")
    with pytest.raises(ValueError, match="got no section 'Use and misuse'"):
        section("Use and misuse")
