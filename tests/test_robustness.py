"""Missing and noisy modalities: the protocols remove or change only what they define."""

import itertools
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, WhisperFeatureExtractor

import eval as eval_script
from corpora import load_corpus
from corpora.schema import build_split
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.evaluation import robustness
from egmf.evaluation.predictor import Predictor
from egmf.evaluation.robustness import (
    blank_token,
    lnln,
    lose_frames,
    mmin,
    noise,
    run,
    spoil_clip,
    spoil_features,
    summarize,
)
from egmf.media_egmf import AudioClip, VideoClip
from egmf.processing_egmf import BUILTIN_TASKS, EGMFProcessor


MODALITIES = ["text", "audio", "vision"]


@pytest.fixture(scope="module")
def predict(assemble, processor) -> Predictor:
    """A predictor with a small random model for the generated corpus; its audio features have unequal deviations."""
    model = assemble(audio_feature_size=6, vision_feature_size=5)
    model.model.fusion.set_feature_statistics("audio", torch.zeros(6), torch.arange(1.0, 7.0))
    return Predictor(model, processor, BUILTIN_TASKS["mosi"], None, 4, model.device)


@pytest.fixture(scope="module")
def rows():
    return load_corpus("generated", size=60)["test"]


@pytest.fixture
def batch(predict, rows):
    """Inputs of all rows, and their ids."""
    collator = AffectCollator(predict.processor, [predict.task], MODALITIES, with_answers=None)
    asked = expand_by_task(rows, [predict.task])
    return dict(collator([asked[i] for i in range(len(asked))])), rows["id"][:]


def distributions(predictions: list[dict]) -> list[list[float]]:
    return [list(row["distribution"].values()) for row in predictions]


def test_mmin_has_the_six_conditions_and_hides_what_they_lack(predict, rows):
    outcomes = {condition: predictions for condition, _, predictions in mmin(predict, rows, MODALITIES)}
    assert list(outcomes) == ["A", "V", "T", "AV", "AT", "VT", "AVT"]
    for condition, predictions in outcomes.items():
        assert [row["id"] for row in predictions] == rows["id"][:]
        for row in predictions:
            assert all(math.isfinite(value) for value in row["distribution"].values())
            for name, letter in robustness.LETTERS.items():
                weights = [gates[name] for gates in row["gate_weights"]["modality"].values()]
                assert letter in condition or not any(weights)
    assert distributions(outcomes["AVT"]) == distributions(predict(rows, MODALITIES)[0])
    with pytest.raises(ValueError, match=r"got 'mmin' for a model that sees \['text'\]"):
        list(mmin(predict, rows, ["text"]))


def test_lnln_loses_tokens_and_frames_at_the_rate(predict, batch):
    inputs, ids = batch
    blank = blank_token(predict.processor.tokenizer)
    before = {name: value.clone() for name, value in inputs.items()}
    share = {}
    lost_before = None
    for rate in (0.3, 0.6, 0.9):
        changed = lose_frames(predict, rate, 1111, inputs, ids)
        assert changed.keys() == inputs.keys()
        untouched = set(inputs) - {"input_ids", "audio_features", "vision_features"}
        assert all(changed[name] is inputs[name] for name in untouched)
        for name in ("audio", "vision"):
            gone = (changed[f"{name}_features"] == 0).all(-1) & inputs[f"{name}_mask"].bool()
            kept = inputs[f"{name}_mask"].bool() & ~gone
            assert torch.equal(changed[f"{name}_features"][kept], inputs[f"{name}_features"][kept])
            share[name] = float(gone.sum() / inputs[f"{name}_mask"].sum())
        said = inputs["utterance_mask"].bool()
        share["text"] = float((changed["input_ids"] == blank)[said].float().mean())
        moved = changed["input_ids"] != inputs["input_ids"]
        assert (changed["input_ids"][moved] == blank).all()
        assert lost_before is None or (moved | ~lost_before).all()  # what is lost stays lost
        lost_before = moved
        assert share == pytest.approx(dict.fromkeys(share, rate), abs=0.12)
    assert all(
        torch.equal(
            inputs[name],
            before[name],
        )
        or name.endswith("times")
        for name in inputs
    )  # it is given back
    # The prompt, the pseudo tokens and the cue are the model's own; what is between them is the context.
    texts = predict.processor.tokenizer.batch_decode(changed["input_ids"][moved.any(1)])
    assert all(predict.task.prompt in text and text.endswith(predict.task.cue) for text in texts)
    with_context = [i for i, text in enumerate(predict.processor.batch_decode(inputs["input_ids"])) if "Bob" in text]
    first = (inputs["input_ids"] == predict.processor.pseudo_token_id).int().argmax(1)
    assert with_context and all(moved[i, : first[i]].any() for i in with_context)


def test_what_lnln_draws_depends_on_the_row_alone(predict, batch):
    inputs, ids = batch
    together = lose_frames(predict, 0.5, 1112, inputs, ids)
    turned = {name: value.flip(0) for name, value in inputs.items()}
    again = lose_frames(predict, 0.5, 1112, turned, ids[::-1])
    for name in ("input_ids", "audio_features", "vision_features"):
        assert torch.equal(again[name].flip(0), together[name])
    other = lose_frames(predict, 0.5, 1113, inputs, ids)
    assert not torch.equal(other["input_ids"], together["input_ids"])


def test_lnln_runs_ten_rates_and_three_seeds(predict, rows):
    few = rows.select(range(4))
    outcomes = list(lnln(predict, few, MODALITIES))
    assert [(condition, seed) for condition, seed, _ in outcomes[:5]] == [
        ("0.0", None),
        ("0.1", 1111),
        ("0.1", 1112),
        ("0.1", 1113),
        ("0.2", 1111),
    ]
    assert len(outcomes) == 28 and outcomes[-1][:2] == ("0.9", 1113)
    assert distributions(outcomes[0][2]) == distributions(predict(few, MODALITIES)[0])
    assert distributions(outcomes[-1][2]) != distributions(outcomes[0][2])


def test_a_tokenizer_s_own_unk_is_what_a_lost_token_becomes(llm_folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = AutoTokenizer.from_pretrained(llm_folder())
    assert letters.decode([blank_token(letters)]) == "_"
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "joy": 1, "_": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert blank_token(words) == 0


def test_noise_has_the_ratio_that_was_drawn():
    samples = np.sin(np.arange(16000) / 20).astype(np.float32)
    clip = AudioClip(samples, 16000, [])
    ratios = []
    for number in range(30):
        noisy = spoil_clip({"audio"}, 1111, "audio", f"row{number}", clip)
        assert noisy.samples.dtype == np.float32 and noisy.sampling_rate == 16000
        ratios.append(10 * np.log10(np.square(samples).mean() / np.square(noisy.samples - samples).mean()))
    assert 4.9 < min(ratios) < 6 and 9 < max(ratios) < 10.1
    again, other = (spoil_clip({"audio"}, seed, "audio", "row29", clip) for seed in (1111, 1112))
    assert np.array_equal(again.samples, noisy.samples) and not np.array_equal(other.samples, noisy.samples)
    assert spoil_clip({"vision"}, 1111, "audio", "row29", clip) is clip
    silent = AudioClip(np.zeros(100, np.float32), 16000, [])
    assert not spoil_clip({"audio"}, 1111, "audio", "row", silent).samples.any()


def test_blur_is_by_one_two_or_four():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    clip = VideoClip(frames, np.arange(2.0), 2.0, [])
    roughness = set()
    for number in range(30):
        blurred = spoil_clip({"vision"}, 1111, "vision", f"row{number}", clip).frames
        assert blurred.shape == frames.shape and blurred.dtype == np.uint8
        roughness.add(round(float(np.diff(blurred.astype(float), axis=2).std()), 1))
    sharp = round(float(np.diff(frames.astype(float), axis=2).std()), 1)
    assert len(roughness) == 3 and max(roughness) == sharp and min(roughness) < 0.2 * sharp
    flat = VideoClip(np.full((1, 9, 9, 3), 77, np.uint8), np.zeros(1), 1.0, [])
    assert all((spoil_clip({"vision"}, 1, "vision", str(n), flat).frames == 77).all() for n in range(9))


def test_features_are_spoiled_alike(predict, batch):
    inputs, ids = batch
    heard, seen = (inputs[f"{name}_mask"].bool() for name in ("audio", "vision"))
    added = []
    for seed in range(40):
        changed = spoil_features(predict, {"audio", "vision"}, seed, inputs, ids)
        assert torch.equal(changed["audio_features"][~heard], inputs["audio_features"][~heard])
        added.append((changed["audio_features"] - inputs["audio_features"])[heard])
    # 5 to 10 dB below the variance on the training split, feature by feature.
    ratio = 20 * np.log10(torch.cat(added).std(0).numpy() / np.arange(1, 7))
    assert (-8 < ratio).all() and (ratio < -6).all()
    row = int(seen.sum(1).argmax())
    frames = inputs["vision_features"][row][seen[row]]
    averages = [torch.cat([p.mean(0, keepdim=True).expand_as(p) for p in frames.split(f)]) for f in (1, 2, 4)]
    found = set()
    for seed in range(30):
        blurred = spoil_features(predict, {"vision"}, seed, inputs, ids)
        assert blurred["audio_features"] is inputs["audio_features"]
        mine = blurred["vision_features"][row][seen[row]]
        found |= {i for i, average in enumerate(averages) if torch.allclose(mine, average)}
    assert found == {0, 1, 2}


def test_noise_runs_each_modality_and_both(predict, rows):
    few = rows.select(range(4))
    outcomes = [(condition, seed) for condition, seed, _ in noise(predict, few, MODALITIES)]
    wanted = itertools.product(("audio noise", "blur", "both"), (1111, 1112, 1113))
    assert outcomes == [("clean", None), *wanted]
    assert {condition for condition, _, _ in noise(predict, few, ["text", "audio"])} == {"clean", "audio noise"}
    with pytest.raises(ValueError, match="wanted audio or vision"):
        list(noise(predict, few, ["text"]))


def test_a_file_s_sound_is_spoiled_before_the_tower_hears_it(llm_folder, tmp_path):
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(16000) / 20) / 2, 16000)
    row = {"id": "one", "text": "well", "emotion": "joy", "audio": str(tmp_path / "tone.wav")}
    processor = EGMFProcessor(
        AutoTokenizer.from_pretrained(llm_folder()), WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    )
    rows = expand_by_task(build_split([row]), [BUILTIN_TASKS["meld"]])

    def heard(distort):
        collator = AffectCollator(processor, [BUILTIN_TASKS["meld"]], ["text", "audio"], None, distort=distort)
        return collator([rows[0]])["input_features"]

    plain = heard(None)
    spoiled = heard(lambda *clip: spoil_clip({"audio"}, 1111, *clip))
    assert plain.shape == spoiled.shape and (plain - spoiled).abs().mean() > 0.05


def test_the_summary_is_mean_and_spread(predict, rows):
    report = run("mmin", predict, rows, MODALITIES)
    table = summarize(report, "classification")
    accuracies = [table[name]["accuracy"][0] for name in ("A", "V", "T", "AV", "AT", "VT")]
    assert table["mean"]["accuracy"] == [pytest.approx(np.mean(accuracies))]
    entries = [
        {"condition": "0.0", "seed": None, "answers": {"expected": {"mae": 0.5, "corr": 0.6, "unparsable": 0}}},
        {"condition": "0.1", "seed": 1111, "answers": {"expected": {"mae": 0.7, "corr": None, "unparsable": 0}}},
        {"condition": "0.1", "seed": 1112, "answers": {"expected": {"mae": 0.9, "corr": 0.2, "unparsable": 0}}},
    ]
    text = robustness.render({"protocol": "lnln", "conditions": entries}, "regression")
    assert text.splitlines()[2:] == [
        "| 0.0 | 0.5000 | 0.6000 |",
        "| 0.1 | 0.8000 ± 0.1414 | 0.2000 |",
        "| mean | 0.6500 | 0.4000 |",
    ]


@pytest.mark.parametrize(("protocol", "conditions"), [("mmin", 7), ("lnln", 10), ("noise", 4)])
def test_eval_writes_one_table_and_one_plot(predict, protocol, conditions, tmp_path, capsys):
    predict.model.save_pretrained(tmp_path / "model")
    predict.processor.save_pretrained(tmp_path / "model")
    arguments = [
        str(tmp_path / "model"),
        "--corpus",
        "generated",
        "--corpus_options",
        '{"size": 36}',
        "--task",
        "mosi",
    ]
    eval_script.main([*arguments, "--output", str(tmp_path / "out"), "--robustness", protocol])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{protocol}.{suffix}" for suffix in ("json", "md", "png")}
    report = json.loads((tmp_path / "out" / f"{protocol}.json").read_text(encoding="utf-8"))
    assert (report["protocol"], report["samples"], report["corpus"]) == (protocol, 6, "generated")
    table = (tmp_path / "out" / f"{protocol}.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == conditions + 3 and table in capsys.readouterr().out  # head, rule, and the mean
    assert len({entry["condition"] for entry in report["conditions"]}) == conditions
    with pytest.raises(SystemExit):
        eval_script.main([*arguments, "--output", "x", "--robustness", protocol, "--compare", "y"])
