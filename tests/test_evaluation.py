"""Labels and tasks across corpora: valid combinations, answers mapped to another corpus's labels, and old tasks."""

import argparse
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from corpus_files import rows_with
from transformers import AutoProcessor

import eval as eval_script
import train as train_script
from corpora.schema import build_split
from egmf.data import mixture
from egmf.data.collator import AffectCollator, check_labels, expand_by_task, prompt_lengths
from egmf.evaluation.label_maps import LABEL_MAPS, MELD_TO_CHERMA
from egmf.evaluation.measures import measure_of, metrics_of
from egmf.evaluation.predictor import Predictor
from egmf.processing_egmf import BUILTIN_TASKS, AffectTask, EGMFProcessor
from metrics.sentiment.measures import EDGES, mosei_metrics, sims_metrics
from predict import main as predict_main


# What `processor_config.json` of checkpoints from before the prompts in two languages says of the benchmarks.
OLD_TASKS = {
    "mosei": {
        "kind": "regression",
        "low": -3.0,
        "high": 3.0,
        "step": 0.1,
        "language": "en",
        "prompt": "How negative or positive is the last speaker's sentiment?",
        "cue": "Sentiment:",
    },
    "meld": {
        "kind": "classification",
        "labels": ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"],
        "language": "en",
        "prompt": "Which emotion does the last speaker express?",
        "cue": "Emotion:",
    },
    "cherma": {
        "kind": "classification",
        "labels": ["愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇"],
        "language": "zh",
        "prompt": "最后一位说话人表达了哪种情绪？",
        "cue": "情绪：",
    },
    "simsv2": {
        "kind": "regression",
        "low": -1.0,
        "high": 1.0,
        "step": 0.1,
        "language": "zh",
        "prompt": "最后一位说话人的情感有多消极或积极？",
        "cue": "情感：",
    },
}


@pytest.fixture
def ask(egmf, processor):
    """`ask(rows, task, label_map)`: the predictions of a small random model."""

    def asked(rows, task: str, label_map: str | None = None) -> list[dict]:
        predict = Predictor(egmf, processor, BUILTIN_TASKS[task], LABEL_MAPS.get(label_map), 3, egmf.device)
        return predict(rows, ["text"])[0]

    return asked


@pytest.fixture(scope="module")
def model_folder(egmf, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    egmf.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_benchmarks_tasks_ask_in_two_languages():
    for name, other in {"meld": "meld_zh", "cherma": "cherma_en", "mosei": "mosei_zh", "simsv2": "simsv2_en"}.items():
        first, second = BUILTIN_TASKS[name], BUILTIN_TASKS[other]
        assert first.answers == second.answers
        assert {first.language, second.language} == {"en", "zh"} and first.prompt != second.prompt
        for task in (first, second):
            chinese = any("\u4e00" <= letter <= "\u9fff" for letter in task.prompt + task.cue)
            assert chinese == (task.language == "zh")


def test_tasks_of_old_checkpoints_are_read_as_they_were(processor, tmp_path):
    assert all(AffectTask.from_dict({"name": name, **old}) == BUILTIN_TASKS[name] for name, old in OLD_TASKS.items())
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    asked_otherwise = OLD_TASKS["meld"] | {"prompt": "How does the last speaker feel?"}
    config["tasks"] = {name: {"name": name, **old} for name, old in {**OLD_TASKS, "meld": asked_otherwise}.items()}
    file.write_text(json.dumps(config), encoding="utf-8")
    read = EGMFProcessor.from_pretrained(tmp_path)
    assert read.tasks["meld"].prompt == "How does the last speaker feel?"  # the checkpoint's own wording holds
    assert read.tasks["cherma"] == BUILTIN_TASKS["cherma"] and read.tasks["meld_zh"] == BUILTIN_TASKS["meld_zh"]


def test_label_maps_go_there_and_back():
    assert set(MELD_TO_CHERMA) == set(BUILTIN_TASKS["meld"].labels)
    assert set(MELD_TO_CHERMA.values()) == set(BUILTIN_TASKS["cherma"].labels)
    for name, there in LABEL_MAPS.items():
        back = LABEL_MAPS["-".join(reversed(name.split("-")))]
        for answer in map(there.source.parse, there.source.answers):
            assert back(there(answer)) == (pytest.approx(answer) if there.labels is None else answer)
        assert there(None) is None


def test_rescaled_scores_meet_the_edges_of_the_other_protocol():
    """+0.3 on the scale to 3 becomes 0.1 on the scale to 1 in float32, exactly on the edge of a bin."""
    rescale = LABEL_MAPS["mosei-simsv2"]
    for answer in rescale.source.answers:
        assert np.float32(rescale(float(answer))) == np.float32(round(float(answer) * 10) / 30)
    assert {np.float32(edge) for edge in EDGES["acc5"][1:-1]} == {
        np.float32(rescale(score)) for score in (-2.1, -0.3, 0.3, 2.1)
    }
    assert rescale(0.0) == 0.0 and LABEL_MAPS["simsv2-mosei"](1.0) == 3.0


def test_every_scale_has_its_protocol():
    assert (
        measure_of(BUILTIN_TASKS["mosei_zh"]) is mosei_metrics and measure_of(BUILTIN_TASKS["simsv2"]) is sims_metrics
    )
    pain = AffectTask("pain", "regression", low=0, high=10, step=0.5)
    assert set(measure_of(pain)([1.0, 2.0], [1.0, None])) == {"mae", "corr", "unparsable"}
    by_class = measure_of(BUILTIN_TASKS["cherma"])(["高兴"], [None])["f1_by_class"]
    assert tuple(by_class) == BUILTIN_TASKS["cherma"].labels
    with pytest.raises(ValueError, match=r"predictions: got \['joy'\]"):
        measure_of(BUILTIN_TASKS["cherma"])(["高兴"], ["joy"])


def test_only_rows_without_a_text_are_generated(egmf, processor, samples, make_batch):
    """Scoring may have found the greedy texts of some rows; the others get those of `generate()`."""
    batch, task = make_batch(samples), BUILTIN_TASKS["meld"]
    predict = Predictor(egmf, processor, task, None, 4, egmf.device)
    scores = egmf.score_labels(processor.candidates(task), **batch)
    generated = predict.greedy_texts(scores, batch)
    scores.greedy = torch.tensor([2, -1, 0, -1])
    texts = [task.answers[2], generated[1].text, task.answers[0], generated[3].text]
    assert [answer.text for answer in predict.greedy_texts(scores, batch)] == texts
    scores.greedy = torch.tensor([1, 1, 1, 1])
    assert [answer.value for answer in predict.greedy_texts(scores, batch)] == [task.answers[1]] * 4


def test_answers_across_corpora_are_in_the_corpus_s_labels(ask):
    rows = rows_with("emotion", ["高兴", "悲伤", "平静", "高兴", "愤怒"])["test"]
    english = rows_with("emotion", ["joy", "sadness", "neutral", "joy", "anger"])["test"]
    mapped, plain = ask(rows, "meld", "meld-cherma"), ask(english, "meld")
    assert [row["gold"] for row in mapped] == rows["emotion"][:]
    for here, there in zip(mapped, plain, strict=True):
        assert here["distribution"] == there["distribution"] and here["greedy_text"] == there["greedy_text"]
        assert here["answers"] == {name: MELD_TO_CHERMA.get(label) for name, label in there["answers"].items()}
    cherma, meld = (metrics_of(found, BUILTIN_TASKS[name]) for found, name in ((mapped, "cherma"), (plain, "meld")))
    for answer, figures in cherma.items():
        assert figures["weighted_f1"] == pytest.approx(meld[answer]["weighted_f1"])
        assert figures["f1_by_class"] == {MELD_TO_CHERMA[k]: v for k, v in meld[answer]["f1_by_class"].items()}


def test_scores_across_corpora_are_in_the_corpus_s_range(ask):
    rows = rows_with("sentiment", [-1.0, -0.4, 0.0, 0.2, 0.8])["test"]
    wide = rows_with("sentiment", [-3.0, -1.2, 0.0, 0.6, 2.4])["test"]
    rescaled, plain = ask(rows, "mosei", "mosei-simsv2"), ask(wide, "mosei")
    for here, there in zip(rescaled, plain, strict=True):
        for name, score in there["answers"].items():
            assert here["answers"][name] == (None if score is None else pytest.approx(score / 3))
    assert [row["gold"] for row in rescaled] == rows["sentiment"][:]
    figures = metrics_of(rescaled, BUILTIN_TASKS["simsv2"])["expected"]
    assert figures["mae"] == pytest.approx(metrics_of(plain, BUILTIN_TASKS["mosei"])["expected"]["mae"] / 3, rel=1e-5)
    assert "acc2_weak" in figures


@pytest.mark.parametrize(
    ("column", "labels", "task", "message"),
    [
        (
            "emotion",
            ["joy", "joy", "高兴"],
            "cherma",
            r"label: got 'joy' in 2 rows, wanted one of task 'cherma'",
        ),
        ("emotion", ["高兴"], "meld", "got '高兴' in 1 rows, wanted one of task 'meld'"),
        ("emotion", [None, "joy"], "meld", "got None in 1 rows"),
        ("sentiment", [0.5, 2.0], "simsv2", r"score: got 2.0 in 1 rows, wanted .* from -1.0 to 1.0"),
    ],
)
def test_labels_of_another_corpus_are_refused(column, labels, task, message):
    with pytest.raises(ValueError, match=f"corpus / test: .*{message}|corpus / test: {message}"):
        check_labels("corpus / test", rows_with(column, labels)["test"], BUILTIN_TASKS[task])


def test_a_meld_label_reaches_no_cherma_run(model_folder, tmp_path, monkeypatch):
    """Training and evaluation reject the label before they compute anything."""
    corpus = rows_with("emotion", ["joy", "anger"])
    for reader in (mixture, eval_script):
        monkeypatch.setattr(reader, "load_corpus", lambda *args, **options: corpus)
    with pytest.raises(ValueError, match="generated / train: label: got 'joy' in 1 rows, wanted .*'cherma'"):
        train_script.main(["recipes/tiny.yaml", "--tasks", "cherma", "--output_dir", str(tmp_path / "run")])
    arguments = [model_folder, "--corpus", "generated", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="generated / test: label: got .*, wanted .*'cherma'"):
        eval_script.main([*arguments, "--task", "cherma"])
    with pytest.raises(ValueError, match="generated / test: label: got .*, wanted .*'cherma'"):
        eval_script.main([*arguments, "--task", "meld", "--label_map", "meld-cherma"])
    with pytest.raises(ValueError, match="label_map 'cherma-meld': got answers of task 'meld'"):
        eval_script.main([*arguments, "--task", "meld", "--label_map", "cherma-meld"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("main", [eval_script.main, predict_main], ids=["eval.py", "predict.py"])
def test_a_model_of_an_older_architecture_is_refused(model_folder, tmp_path, main):
    """Its own code, which it carries, cannot do all that the commands rely on."""
    older = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    (older / "config.json").write_text(json.dumps(config | {"architecture": 2}), encoding="utf-8")
    arguments = ["--corpus", "generated", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a model of architecture 2, wanted one of 3, or this project at the commit"):
        main([str(older), *(arguments if main is eval_script.main else ["--text", "so"])])


@pytest.mark.filterwarnings("ignore:Glyph")  # a machine without a Chinese font draws boxes
def test_an_evaluation_across_corpora_is_written_whole(model_folder, tmp_path, monkeypatch, capsys, caplog):
    labels = ["高兴", "悲伤", "平静", "高兴", "愤怒", "惊奇"]
    corpus = rows_with("emotion", labels)
    rows = [{**row, "id": f"film{number % 3}$_${number}"} for number, row in enumerate(corpus["test"])]
    corpus["test"] = build_split(rows)
    monkeypatch.setattr(eval_script, "load_corpus", lambda *args, **options: corpus)
    arguments = [
        model_folder,
        "--corpus",
        "mosi",
        "--corpus_dir",
        ".",
        "--task",
        "meld",
        "--label_map",
        "meld-cherma",
        "--output",
    ]
    eval_script.main([*arguments, str(tmp_path / "first")])
    lines = (tmp_path / "first/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answers"]["distribution"] for line in lines]
    report = json.loads((tmp_path / "first/metrics.json").read_text(encoding="utf-8"))
    assert (report["task"], report["label_map"]) == ("meld", "meld-cherma")
    assert "audio: no row of mosi / test has it; the model answers without" in caplog.text
    assert report["clusters"] == {"unit": "videos", "number": 3}
    figures = report["answers"]["distribution"]
    assert figures["accuracy"] == sum(a == b for a, b in zip(answers, labels, strict=True)) / 6
    low, high = report["intervals"]["distribution"]["accuracy"]
    assert low <= figures["accuracy"] <= high
    assert {"confusion.png", "gates.png"} <= {path.name for path in (tmp_path / "first").iterdir()}
    assert "f1_by_class 高兴" in capsys.readouterr().out

    others = tmp_path / "others.jsonl"
    others.write_text("".join(line.replace('"gold": "高兴"', '"gold": "恐惧"') + "\n" for line in lines), "utf-8")
    with pytest.raises(ValueError, match="its gold labels are not those of this evaluation"):
        eval_script.main([*arguments, str(tmp_path / "second"), "--compare", str(others)])
    others.write_text("id,gold\n", "utf-8")
    with pytest.raises(ValueError, match="others.jsonl: line 1: got 'id,gold', wanted a row of predictions.jsonl"):
        eval_script.main([*arguments, str(tmp_path / "second"), "--compare", str(others)])
    with pytest.raises(ValueError, match="modalities: got smell, wanted some of those that the model reads: text"):
        eval_script.main([*arguments, str(tmp_path / "second"), "--modalities", "text", "smell"])
    # A baseline may have one kind of answer only.
    rows = [json.loads(line) for line in lines]
    alone = [row | {"answers": {"distribution": row["answers"]["distribution"]}} for row in rows]
    others.write_text("".join(json.dumps(row) + "\n" for row in alone), "utf-8")
    eval_script.main([*arguments, str(tmp_path / "second"), "--compare", str(others)])
    compared = json.loads((tmp_path / "second/metrics.json").read_text(encoding="utf-8"))["compared_to"]
    assert [*compared] == ["distribution"]
    eval_script.main([*arguments, str(tmp_path / "second"), "--compare", str(tmp_path / "first/predictions.jsonl")])
    tests = json.loads((tmp_path / "second/metrics.json").read_text(encoding="utf-8"))["compared_to"]["distribution"]
    assert tests["mcnemar"]["p_value"] == tests["differences"]["weighted_f1"]["p_value"] == 1.0


def test_a_checkpoint_asks_in_its_own_words(model_folder):
    """The task table is part of the checkpoint: a processor loaded by `AutoProcessor` has every task."""
    tasks = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True).tasks
    assert all(tasks[name].to_dict() == task.to_dict() for name, task in BUILTIN_TASKS.items())


ROW = {"task": "meld", "emotion": "joy", "sentiment": None, "audio": None, "video": None}
ROW |= {
    "context": [{"speaker": "Joey", "text": "Surprise!"}],
    "speaker": "Ross",
    "text": "well, well",
}
ROW |= {"audio_features": np.ones((4, 5), np.float32), "audio_times": None}
ROW |= {"vision_features": np.ones((3, 7), np.float32), "vision_times": None}


def dropping(processor, **rates) -> AffectCollator:
    modalities = ["text", "audio", "vision"]
    return AffectCollator(processor, [processor.tasks["meld"]], modalities, True, modality_dropout=rates)


def test_modality_dropout_hides_each_modality_and_never_the_last(processor):
    rows = [{**ROW, "id": str(row)} for row in range(240)]
    rows[0] |= {"text": " ", "audio_features": None}
    rows[1] |= {"text": "", "vision_features": None}
    torch.manual_seed(0)
    batch = dropping(processor, text=0.5, audio=0.5, vision=0.5)(rows)
    kept = torch.stack([batch[f"{name}_mask"].bool().any(1) for name in ("utterance", "audio", "vision")], 1)
    assert kept.any(1).all()
    assert kept[0].tolist() == [False, False, True] and kept[1].tolist() == [False, True, False]
    # Each goes half the time, but for the eighth of the cases in which all would.
    share = kept[2:].float().mean(0)
    assert ((share > 0.5) & (share < 0.75)).all()


def test_a_row_that_lost_its_text_is_one_that_never_had_it(processor, egmf):
    """Both give the same tokens, without context and speaker, as in `robustness.py` and corpora without text."""
    row = {**ROW, "id": "row"}
    torch.manual_seed(0)
    lost = dropping(processor, text=0.99999)([row])
    without = AffectCollator(processor, [processor.tasks["meld"]], ["audio", "vision"], True)([row])
    assert lost.keys() == without.keys()
    for name, value in without.items():
        torch.testing.assert_close(lost[name], value, rtol=0, atol=0, equal_nan=True)
    whole = dropping(processor)([row])
    assert whole["input_ids"].shape[1] > lost["input_ids"].shape[1] + 3
    with torch.no_grad():
        assert torch.equal(egmf(**lost).logits, egmf(**without).logits)


def test_another_fold_than_in_training_is_said(tmp_path, caplog):
    lines = ["file,speaker,emotion_zh"]
    for speaker in range(1, 5):
        (tmp_path / f"{speaker}_1.wav").touch()
        lines.append(f"{speaker}_1.wav,{speaker},高兴")
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    trained = {"corpus": "casia", "corpus_options": {"fold": 1, "validation": False}}
    asked = {"corpus": "casia", "corpus_dir": tmp_path, "model": "run/model", "split": "test"}
    moved = ["fold: got 2, not 1 as in training"]
    for options, said in (({"fold": 2}, moved), ({"fold": 1, "validation": True}, []), (None, [])):
        caplog.clear()
        rows, _ = eval_script.load_rows(argparse.Namespace(**asked, corpus_options=options), trained, {})
        assert rows["id"][:] == ["2_1" if said else "1_1"]
        assert len(caplog.records) == len(said) and all(line in caplog.text for line in said)


def test_rows_longer_than_the_llms_context_are_named_once(processor, caplog):
    limit = processor.tokenizer.model_max_length
    rows = build_split([{"id": "short", "text": "so"}, {"id": "long", "text": "so " * 200}])
    tasks = [processor.tasks["meld"]]
    collator = AffectCollator(processor, tasks, ["text"], None)
    try:
        processor.tokenizer.model_max_length = 200
        short, long = prompt_lengths(expand_by_task(rows, tasks), collator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert collator(list(expand_by_task(rows, tasks)))["input_ids"].shape[1] == long
    finally:
        processor.tokenizer.model_max_length = limit
    assert short < long == 200 - processor.max_answer_tokens("meld")
    [record] = caplog.records
    assert "1 rows are longer than the language model's context. long: the language model reads 200" in record.message
