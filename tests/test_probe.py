"""The linear probe of a recipe's features (`experiments/probe.py`): what it reads, how its penalty is chosen, reports.

The last test reads published clips and a pretrained tower from `$EGMF_SHARED`, by default `../shared` beside the
repository, and skips where they are absent.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from corpus_files import SHARED
from datasets import DatasetDict
from huggingface_hub import constants
from models import save_whisper, whisper

from corpora import load_corpus, ravdess
from corpora.schema import build_split
from egmf.data.tower_cache import TowerCache
from egmf.recipe_reading import load_recipe
from egmf.tasks_egmf import BUILTIN_TASKS
from egmf.training.assembly import build_model, build_processor, build_towers
from experiments import probe
from train import fill_cache


@pytest.fixture
def recipe_of(tmp_path, llm_folder):
    """`recipe_of(fields)`: the file of a recipe with a tiny LLM."""

    def written(fields: dict) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"language_model": llm_folder(), "output_dir": str(tmp_path / "run")} | fields))
        return str(file)

    return written


@pytest.fixture
def run(tmp_path, recipe_of, monkeypatch, capsys):
    """`run(fields, *arguments)`: the report of the command, with its table as `table`."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))

    def ran(fields: dict, *arguments: str) -> dict:
        output = tmp_path / "reports" / "probe.json"
        probe.main([recipe_of(fields), *arguments, "--output", str(output)])
        return json.loads(output.read_text()) | {"table": capsys.readouterr().out}

    return ran


GENERATED = {"corpus": "generated", "tasks": ["mosi"]}


def test_generated_corpus_needs_all_modalities(run):
    report = run(GENERATED, "--split", "test")
    assert report["modalities"] == ["text", "audio", "vision"] and report["split"] == "test"
    result = report["tasks"]["mosi"]
    metrics, predictions = result["metrics"], result["predictions"]
    assert metrics["accuracy"] >= 0.95 and metrics["ua"] >= 0.95 and metrics["weighted_f1"] >= 0.95
    gold = load_corpus("generated")["test"]
    assert [row["id"] for row in predictions] == gold["id"][:]
    assert [row["gold"] for row in predictions] == gold["emotion"][:]
    assert metrics["accuracy"] == np.mean([row["gold"] == row["answer"] for row in predictions])
    assert (
        f"| mosi | text + audio + vision | 60 | {result['penalty']:g} | {metrics['accuracy']:.4f} |" in report["table"]
    )

    # One third of the rows has the label in the audio, the others are guessed.
    alone = run(GENERATED, "--modalities", "audio", "--split", "validation", "--corpus_options", '{"size": 240}')
    assert alone["modalities"] == ["audio"] and alone["corpus_options"] == {"size": 240}
    assert len(alone["tasks"]["mosi"]["predictions"]) == 40
    assert 0.4 < alone["tasks"]["mosi"]["metrics"]["accuracy"] < 0.9
    assert run(GENERATED, "--modalities", "audio") == run(GENERATED, "--modalities", "audio")


def test_labels_of_the_test_split_do_not_change_answers(run, monkeypatch):
    before = run(GENERATED)["tasks"]["mosi"]
    corpus = load_corpus("generated")
    other = {"positive": "negative", "negative": "positive"}
    corpus["test"] = corpus["test"].map(lambda row: {"emotion": other[row["emotion"]]})
    monkeypatch.setattr(probe, "load_corpora", lambda parts: [corpus])
    after = run(GENERATED)["tasks"]["mosi"]
    assert after["penalty"] == before["penalty"]
    assert [row["answer"] for row in after["predictions"]] == [row["answer"] for row in before["predictions"]]
    assert after["metrics"]["accuracy"] == pytest.approx(1 - before["metrics"]["accuracy"])


def test_held_out_rows_choose_the_penalty():
    """A weak penalty for scores that are linear in the features, a strong one for scores that are noise."""
    rng, task = np.random.default_rng(0), BUILTIN_TASKS["mosei"]
    values = rng.normal(size=(90, 30)).astype(np.float32)
    linear, noise = values[:, 0].clip(-3, 3), rng.normal(size=90).clip(-3, 3)
    for gold, wanted in ((linear, min(probe.PENALTIES)), (noise, max(probe.PENALTIES))):
        rows = probe.Rows({"audio": values}, gold)
        assert probe.choose_penalty(task, [(rows[:60], rows[60:])]) == wanted


def test_an_empty_validation_split_is_replaced_by_groups_of_train():
    train = probe.Rows({"audio": np.arange(12.0)[:, None]}, np.arange(12))
    groups = list("aabbccddeeff")
    rounds = probe.rounds_of(train, train[:0], groups)
    assert len(rounds) == 5
    assert sorted(np.concatenate([held_out.gold for _, held_out in rounds])) == list(range(12))
    for fitted, held_out in rounds:
        assert not {groups[place] for place in fitted.gold} & {groups[place] for place in held_out.gold}
        assert len(fitted.gold) + len(held_out.gold) == 12
    assert probe.rounds_of(train, train[:3], groups)[0][1].gold.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="validation: got no rows, and one group in train, wanted rows or several"):
        probe.rounds_of(train, train[:0], ["a"] * 12)


def test_scores_are_ridge_regression_within_the_scale(run, monkeypatch):
    rng = np.random.default_rng(0)

    def split(name: str, count: int, scale: float):
        levels = scale * rng.uniform(-3, 3, count)
        frames = [rng.normal(level, 0.1, (5, 4)).astype(np.float32) for level in levels]
        rows = zip(levels.clip(-3, 3), frames, strict=True)
        return build_split(
            {"id": f"{name}{number}$_$1", "sentiment": level, "audio_features": values}
            for number, (level, values) in enumerate(rows)
        )

    corpus = DatasetDict(train=split("a", 60, 1), validation=split("b", 20, 1), test=split("c", 20, 2))
    monkeypatch.setattr(probe, "load_corpora", lambda parts: [corpus])
    report = run({"corpus": "mosei", "tasks": ["mosei"]})
    assert report["modalities"] == ["audio"]  # no row has text or vision
    result = report["tasks"]["mosei"]
    answers = np.array([row["answer"] for row in result["predictions"]])
    assert answers.min() == -3 and answers.max() == 3
    assert result["metrics"]["corr"] > 0.99 and result["metrics"]["mae"] < 0.1
    assert "| mae | corr |" in report["table"] and "accuracy" not in report["table"]


def test_missing_and_constant_values():
    """A missing modality is zero, a constant column is dropped, and columns are standardised with train."""
    train = np.array([[1, 7, 0], [3, 7, 4], [np.nan] * 3], np.float32)
    columns = probe.Columns({"vision": train})
    np.testing.assert_allclose(columns({"vision": train}) * np.sqrt(2), [[-1, -1], [1, 1], [0, 0]])
    far = np.array([[2, 7, 1000]], np.float32)
    np.testing.assert_allclose(columns({"vision": far}) * np.sqrt(2), [[0, 5]], rtol=1e-6)
    assert not columns({"vision": np.full((2, 0), np.nan, np.float32)}).any()  # a split without the modality


def test_text_alone_is_sparse_and_the_same_beside_others(monkeypatch):
    texts, values = np.array(["1 2 3", "1 2 4", ""]), np.array([[1], [3], [np.nan]], np.float32)
    alone = probe.Columns({"text": texts})({"text": texts})
    assert alone.shape == (3, 3)  # 1, 2 and the pair; 3 and 4 occur once
    np.testing.assert_allclose(alone.toarray(), [[3**-0.5] * 3, [3**-0.5] * 3, [0] * 3], rtol=1e-6)
    both = {"text": texts, "audio": values}
    dense = probe.Columns(both)(both)
    np.testing.assert_array_equal(dense, np.concatenate([alone.toarray(), [[-1], [1], [0]]], 1))
    monkeypatch.setattr(probe, "DENSE_BYTES", 10)
    np.testing.assert_array_equal(probe.Columns(both)(both).toarray(), dense)


def write_faces(folder: Path) -> None:
    """RAVDESS with two clips of each emotion and actor; the action units of an actor differ more than emotions do."""
    rng = np.random.default_rng(0)
    lines = ["id," + ",".join(f"AU{unit}" for unit in range(8))]
    for actor in range(1, 25):
        offset = rng.normal(0, 30, 8)
        for emotion in range(1, 9):
            for repetition in (1, 2):
                name = f"03-01-{emotion:02}-01-01-{repetition:02}-{actor:02}"
                (folder / f"{name}.wav").touch()
                units = offset + 3 * np.eye(8)[emotion - 1] + rng.normal(0, 0.3, 8)
                lines.append(",".join([name, *map(str, units)]))
    (folder / ravdess.ACTION_UNITS).write_text("\n".join(lines))


def test_speaker_adaptation_removes_the_offset_of_a_speaker(run, tmp_path):
    (tmp_path / "corpus").mkdir()
    write_faces(tmp_path / "corpus")
    fields = {"corpus": "ravdess", "tasks": ["ravdess"], "modalities": ["vision"]}
    arguments = ("--corpus_dir", str(tmp_path / "corpus"), "--corpus_options", '{"validation": false}')
    plain, adapted = run(fields, *arguments), run(fields, *arguments, "--speaker_adaptation", "true")
    assert (plain["speaker_adaptation"], adapted["speaker_adaptation"]) == (False, True)
    accuracy = [report["tasks"]["ravdess"]["metrics"]["accuracy"] for report in (plain, adapted)]
    assert accuracy[0] < 0.6 and accuracy[1] == 1.0


def test_statistics_are_adapted_as_the_models_frames():
    """Those of the rows of a speaker that have the modality; means, then deviations."""
    rng = np.random.default_rng(0)
    clips = [scale * rng.normal(level, 1, (50, 3)) for level, scale in ((1, 2), (2, 3))]
    measured = [np.concatenate([clip.mean(0), clip.std(0)]) for clip in clips]
    values = np.array([*measured, [np.nan] * 6, [50] * 6], np.float32)
    adapted = probe.adapt_statistics(values, ["a", "a", "a", "b"])
    frames = np.concatenate(clips)  # of equally long clips
    wanted = [(clip - frames.mean(0)) / frames.std(0) for clip in clips]
    for row, clip in zip(adapted, wanted, strict=False):
        np.testing.assert_allclose(row, np.concatenate([clip.mean(0), clip.std(0)]), atol=1e-5)
    assert np.isnan(adapted[2]).all()
    np.testing.assert_allclose(adapted[3], [0] * 3 + [1] * 3)


def test_groups_of_the_cross_validation():
    named = build_split([{"id": "x_dia1_utt1", "speaker": "Ross"}, {"id": "x_dia1_utt2", "speaker": "Joey"}])
    assert probe.groups_of("meld", named) == ["Ross", "Joey"]
    alone = build_split([{"id": "train_0", "speaker": "Ann"}, {"id": "train_1", "speaker": "Ann"}])
    assert probe.groups_of("generated", alone) == ["train_0", "train_1"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"corpora": {name: {"tasks": ["mosi"], "weight": 1} for name in ("generated", "mosi")}},
            "corpora: got a mixture of generated, mosi, wanted `corpus` instead",
        ),
        (GENERATED | {"audio_tower": {"config": {}}}, "audio_tower: got a description of a new tower, wanted the fo"),
        (GENERATED | {"shrink": 2}, "shrink: got 2, wanted 1"),
    ],
)
def test_recipes_that_it_cannot_probe(run, fields, message):
    with pytest.raises(ValueError, match=message):
        run(fields)


def test_speaker_adaptation_needs_audio_or_vision(run):
    with pytest.raises(ValueError, match="speaker_adaptation: got true with modalities .*text"):
        run(GENERATED, "--modalities", "text", "--speaker_adaptation", "true")


def write_sounds(folder: Path) -> None:
    """RAVDESS with a hum for "neutral" and noise for "angry", of actors of all splits."""
    rng = np.random.default_rng(0)
    for actor in (1, 5, 9, 10):
        hum = np.sin(2 * np.pi * (150 + 5 * actor) * np.arange(4800) / 16000)
        for emotion, sound in ((1, hum), (5, rng.normal(size=4800))):
            soundfile.write(folder / f"03-01-{emotion:02}-01-01-01-{actor:02}.wav", 0.1 * sound, 16000)


HEARD = {"corpus": "ravdess", "tasks": ["ravdess"], "modalities": ["audio"]}


def test_a_tower_is_read_from_the_cache_of_training(run, recipe_of, monkeypatch, tmp_path):
    corpus, tower = tmp_path / "corpus", tmp_path / "tower"
    corpus.mkdir()
    write_sounds(corpus)
    save_whisper(tower, whisper().get_encoder())
    fields = HEARD | {"corpus_dir": str(corpus), "audio_tower": str(tower)}

    recipe, splits = load_recipe([recipe_of(fields)]), load_corpus("ravdess", corpus)
    towers, folder = build_towers(recipe), recipe.model.language_model
    processor = build_processor(recipe, folder, towers)
    model = build_model(recipe, folder, processor, towers, splits["train"])
    fill_cache(recipe, model, processor, towers, [], splits, None)  # train and validation, as train.py does
    computed, compute = [], TowerCache._compute

    def counted(cache, todo, device):
        computed.extend(path for group in todo for _, path, _ in group)
        compute(cache, todo, device)

    monkeypatch.setattr(TowerCache, "_compute", counted)
    result = run(fields)["tasks"]["ravdess"]
    assert sorted(computed) == sorted(splits["test"]["audio"])
    assert result["metrics"]["accuracy"] == 1.0


@pytest.mark.slow
def test_published_clips_and_a_pretrained_tower(run, tmp_path):
    clips, tower = SHARED / "data" / "ravdess_av", SHARED / "models" / "whisper-base-encoder"
    if not clips.is_dir() or not tower.is_dir():
        pytest.skip(f"no ravdess_av or whisper-base-encoder in {SHARED} (EGMF_SHARED names another place)")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for emotion in ("02", "05"):  # calm and angry
        for actor in (1, 2, 5, 6, *range(9, 15)):  # of test, validation and train
            name = f"03-01-{emotion}-01-01-01-{actor:02}.flac"
            (corpus / name).symlink_to(clips / name)
    fields = HEARD | {"corpus_dir": str(corpus), "audio_tower": str(tower), "audio_window": 3}
    assert run(fields)["tasks"]["ravdess"]["metrics"]["accuracy"] >= 0.75
