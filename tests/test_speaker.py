"""Speaker adaptation: centers in the model, in training and evaluation, in the pipeline and in predict.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import tone, write_clip
from commands import REPO, read_lines, run
from datasets import Dataset
from models import TOLERANCE, greedy, largest_difference, pad, save_model_with_towers, save_whisper, whisper
from transformers import pipeline

from corpora import load_corpus, speakers_of
from corpora.schema import build_split
from egmf.configuration_egmf import EGMFConfig
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.data.speakers import mix_centers, name_speakers, speaker_centers, stack_centers
from egmf.data.tower_cache import TowerCache
from egmf.evaluation.predictor import Predictor
from egmf.evaluation.robustness import lose_frames
from egmf.media_features_egmf import adapt_to_speaker
from egmf.pipeline_egmf import adaptation_warning
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.recipe_reading import load_recipe
from egmf.training.statistics import feature_statistics, set_clip_statistics, set_feature_statistics
from predict import main as predict_main


MODALITIES = ["text", "audio", "vision"]
TASK = BUILTIN_TASKS["mosi"]
SPLIT = "generated/test"


@pytest.fixture(scope="module")
def centred(egmf, samples, make_batch):
    """The batch of `samples` with a center for each row."""
    batch = make_batch(samples)
    generator = torch.Generator().manual_seed(1)
    for name, size in (("audio", 5), ("vision", 7)):
        mean = torch.randn(len(samples), size, generator=generator)
        deviation = 0.5 + torch.rand(len(samples), size, generator=generator)
        batch[f"{name}_center"] = torch.stack([mean, deviation], 1)
    return batch


def by_hand(batch: dict, center: dict) -> dict:
    """The batch with its features normalised by the centers."""
    normalised = dict(batch)
    for name in ("audio", "vision"):
        mean, deviation = center[f"{name}_center"].unsqueeze(2).unbind(1)
        normalised[f"{name}_features"] = (batch[f"{name}_features"] - mean) / deviation
    return normalised


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, llm_folder, assemble):
    """A folder with clips and a checkpoint with towers, trained with adaptation; its processor and model."""
    folder = tmp_path_factory.mktemp("place")
    config = {"speaker_adaptation": True, "clip_statistics": ["audio", "vision"]}
    processor, model = save_model_with_towers(folder, llm_folder(), assemble, **config)
    for number in range(3):
        write_clip(folder / f"{number}.mp4", 0.4 + 0.2 * number, seed=number)
    return folder, processor, model


@pytest.fixture(scope="module")
def place(checkpoint) -> Path:
    """The folder of the checkpoint."""
    return checkpoint[0]


# The model


def test_features_are_normalised_by_a_center(egmf, samples, make_batch, centred):
    batch = make_batch(samples)
    assert largest_difference(egmf, centred, by_hand(batch, centred)) < TOLERANCE
    assert largest_difference(egmf, centred, batch) > 1e-3  # with audio or vision in three of four rows


def test_a_channel_that_hardly_varies_is_only_centred():
    frames = torch.tensor([[[1.0, 5.0, 7.0]]])
    mean, deviation = torch.tensor([[[0.0, 4.0, 0.0]]]), torch.tensor([[[2.0, 1e-3, 0.0]]])
    assert torch.equal(adapt_to_speaker(frames, mean, deviation), torch.tensor([[[0.5, 1.0, 7.0]]]))


def test_a_center_of_zeros_changes_nothing(egmf, samples, make_batch):
    batch = make_batch(samples)
    zeros = {"audio_center": torch.zeros(len(samples), 2, 5), "vision_center": torch.zeros(len(samples), 2, 7)}
    with torch.no_grad():
        assert torch.equal(egmf(**batch).logits, egmf(**batch, **zeros).logits)


def test_centred_rows_do_not_depend_on_batch_and_padding(egmf, samples, centred, row_of):
    centers = {name: value for name, value in centred.items() if name.endswith("_center")}
    for side in ("left", "right"):
        assert largest_difference(egmf, centred, pad(centred, side) | centers) < TOLERANCE
    with torch.no_grad():
        together = egmf(**centred).logits
        for index in range(len(samples)):
            alone = egmf(**row_of(centred, index)).logits[0]
            assert (together[index, centred["attention_mask"][index].bool()] - alone).abs().max() < TOLERANCE


def test_every_call_uses_the_center(egmf, processor, samples, make_batch, centred):
    """A call that dropped the centers would give the answers without them."""
    plain, candidates = make_batch(samples), processor.candidates("meld")
    shifted = by_hand(plain, centred)
    calls = {
        "scores": lambda batch: egmf.score_labels(candidates, **batch).log_probs,
        "states": lambda batch: egmf.model.get_expert_states(**batch),
        "first": lambda batch: greedy(egmf, batch, output_scores=True, return_dict_in_generate=True).scores[0],
        "uncached": lambda batch: greedy(
            egmf, batch, output_scores=True, return_dict_in_generate=True, use_cache=False
        ).scores[1],
    }
    for name, call in calls.items():
        with torch.no_grad():
            centred_answer, wanted, without = call(centred), call(shifted), call(plain)
        here = torch.isfinite(wanted)  # the placeholder is suppressed
        assert (centred_answer - wanted)[here].abs().max() < TOLERANCE, name
        assert (centred_answer - without)[here].abs().max() > 1e-3, name
    assert torch.equal(greedy(egmf, centred, num_beams=2), greedy(egmf, shifted, num_beams=2))


def test_encoded_media_are_centred_once(checkpoint):
    folder, processor, model = checkpoint
    inputs = dict(processor(text=["so", "no"], video=[str(folder / "0.mp4"), str(folder / "1.mp4")], task="meld"))
    center = model.model.speaker_center([dict(inputs)])
    assert center["audio_center"].shape == (1, 2, 3, 16) and center["vision_center"].shape[0] == 1
    inputs |= {name: value.expand(2, *value.shape[1:]) for name, value in center.items()}
    encoded = model.model.encode_media(inputs)
    assert torch.equal(encoded["audio_center"], inputs["audio_center"]) and "input_features" not in encoded
    twice = model.model.encode_media(encoded)
    answers = [model.score_labels(processor.candidates("meld"), **batch).log_probs for batch in (inputs, encoded)]
    assert (answers[0] - answers[1]).abs().max() < 1e-5
    assert torch.equal(greedy(model, inputs), greedy(model, encoded))
    assert torch.equal(greedy(model, encoded), greedy(model, twice))
    # Over the speaker's clips, the hidden layers that reach the fusion have a mean of 0 and a deviation of 1.
    layers, mask, _ = model.model.read_modality("audio", **inputs)
    clips = [torch.stack(layers, 2)[row][mask[row].bool()] for row in (0, 1)]
    means, squares = (torch.stack([part(clip).mean(0) for clip in clips]) for part in (torch.clone, torch.square))
    assert means.mean(0).abs().max() < 1e-4 < means.abs().max()
    varies = squares.mean(0) > 0.5  # the others are only centred
    assert varies.float().mean() > 0.75 and (squares.mean(0)[varies] - 1).abs().max() < 1e-3
    without = {name: value for name, value in inputs.items() if not name.endswith("_center")}
    assert (model.score_labels(processor.candidates("meld"), **without).log_probs - answers[0]).abs().max() > 1e-3


def test_a_speakers_center_ignores_padding_and_batches(egmf, samples, make_batch, row_of):
    batch = make_batch(samples)
    clips = [samples[0]["audio_features"], samples[1]["audio_features"]]
    mean = torch.stack([clip.mean(0) for clip in clips]).mean(0)
    deviation = torch.stack([(clip - mean).square().mean(0) for clip in clips]).mean(0).sqrt()
    wanted = torch.stack([mean, deviation])
    together = egmf.model.speaker_center([pad(batch, "left")])
    apart = egmf.model.speaker_center([row_of(batch, index) for index in range(len(samples))])
    for center in (together, apart):
        assert center.keys() == {"audio_center", "vision_center"}
        assert torch.allclose(center["audio_center"], wanted[None], atol=1e-6)
    assert egmf.model.speaker_center([row_of(batch, 2)]) == {}  # words alone


@pytest.mark.parametrize(
    ("field", "center", "message"),
    [
        ("audio_center", torch.zeros(4, 5), r"audio_center: got shape \(4, 5\), wanted \(4, 2, 5\)"),
        ("vision_center", torch.zeros(1, 2, 7), r"vision_center: got shape \(1, 2, 7\), wanted \(4, 2, 7\)"),
        ("audio_center", torch.full((4, 2, 5), torch.nan), "audio_center: got NaN or infinite values, wanted finite"),
    ],
)
def test_a_wrong_center_is_named(egmf, samples, make_batch, field, center, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        egmf(**make_batch(samples), **{field: center})


def test_a_wrong_center_of_a_tower_is_named(checkpoint):
    folder, processor, model = checkpoint
    inputs = processor(text="so", audio=str(folder / "voice.wav"), task="meld")
    with pytest.raises(ValueError, match=r"audio_center: got shape \(1, 16\), wanted \(1, 2, 3, 16\)"):
        model(**inputs, audio_center=torch.zeros(1, 16))


def test_the_config_says_how_a_model_was_trained(place):
    assert EGMFConfig.from_pretrained(place / "model").speaker_adaptation is True


# Corpora, training data


def rows_of_speakers(offsets: dict[str, float], size: int = 60):
    """Rows of the generated corpus, spoken in turn by these speakers; an offset is added to a speaker's features."""
    rows = list(load_corpus("generated", size=size)["train"])
    for number, row in enumerate(rows):
        speaker, offset = list(offsets.items())[number % len(offsets)]
        row["speaker"] = speaker
        for name, sign in (("audio_features", 1), ("vision_features", -1)):
            if row[name] is not None:
                row[name] = np.asarray(row[name], np.float32) + np.float32(sign * offset)
    return name_speakers("generated", "test", build_split(rows))


def centers_of(model, processor, rows, **options):
    collator = AffectCollator(processor, [TASK], MODALITIES, with_answers=None)
    return speaker_centers(model, expand_by_task(rows, [TASK]), collator, batch_size=7, **options)


@pytest.fixture(scope="module")
def small(assemble):
    return assemble(audio_feature_size=6, vision_feature_size=5, clip_statistics=["audio"])


def test_an_offset_of_a_speaker_changes_nothing(small, processor):
    """Neither the statistics that training saves nor the answers; without adaptation it changes both."""
    answers, statistics = {}, {}
    for adapted in (True, False):
        for name, offsets in (("plain", {"Ann": 0.0, "Bea": 0.0}), ("offset", {"Ann": 3.0, "Bea": -2.0})):
            rows = rows_of_speakers(offsets)
            centers = centers_of(small, processor, rows) if adapted else None
            set_clip_statistics(small, {"train": rows}, None, centers)
            for modality in ("audio", "vision"):
                found = feature_statistics(rows, f"{modality}_features", centers)
                small.model.fusion.set_feature_statistics(modality, *found)
            fusion = small.model.fusion
            norms = (fusion.clip_statistics["audio"].norm, fusion.input_norm["audio"], fusion.input_norm["vision"])
            statistics[adapted, name] = torch.cat([part.clone() for norm in norms for part in (norm.mean, norm.std)])
            predict = Predictor(small, processor, TASK, None, 4, small.device, centers)
            predictions = predict(rows.select(range(10)), MODALITIES)[0]
            answers[adapted, name] = torch.tensor([list(row["distribution"].values()) for row in predictions])
    assert torch.allclose(statistics[True, "plain"], statistics[True, "offset"], atol=1e-4)
    assert (answers[True, "plain"] - answers[True, "offset"]).abs().max() < 1e-4
    assert not torch.allclose(statistics[False, "plain"], statistics[False, "offset"], atol=0.1)
    assert (answers[False, "plain"] - answers[False, "offset"]).abs().max() > 1e-3


def test_statistics_are_those_of_centred_values(small, processor):
    rows = rows_of_speakers({"Ann": 3.0, "Bea": -2.0})
    centers = centers_of(small, processor, rows)
    clips = [(row["speaker"], np.asarray(row["audio_features"])) for row in rows if row["audio_features"] is not None]
    wanted = {}
    for speaker in ("Ann", "Bea"):
        own = [clip for name, clip in clips if name == speaker]
        mean = np.mean([clip.mean(0) for clip in own], 0)
        wanted[speaker] = mean, np.sqrt(np.mean([np.square(clip - mean).mean(0) for clip in own], 0))
        assert np.allclose(centers["audio"][f"{SPLIT}/{speaker}", 1.0], np.stack(wanted[speaker])[None], atol=1e-5)
    centred = [(clip - wanted[speaker][0]) / wanted[speaker][1] for speaker, clip in clips]
    set_feature_statistics(small, rows, centers)
    norm = small.model.fusion.input_norm["audio"]
    assert np.allclose(norm.mean, np.concatenate(centred).mean(0), atol=1e-5)
    assert np.allclose(norm.std, np.concatenate(centred).std(0), atol=1e-5)


def test_a_speaker_without_a_modality_has_a_center_of_zeros(small, processor):
    centers = centers_of(small, processor, rows_of_speakers({"Ann": 3.0}))
    stacked = stack_centers(centers, "audio", [("nobody", 1.0), (f"{SPLIT}/Ann", 1.0)])
    assert stacked.shape == (2, 2, 6) and not stacked[0].any() and stacked[1, 0].abs().min() > 1


def test_mixing_moves_clips_towards_other_speakers(processor):
    """A clip moves from its speaker's center at most half of the way to that of another one."""
    levels = {"Ann": 1.0, "Bo": 2.0, "Cy": 4.0}
    centers = {"audio": {(f"{SPLIT}/{name}", 1.0): torch.full((1, 2, 6), level) for name, level in levels.items()}}
    rows = [row for row in rows_of_speakers(levels) if row["audio_features"] is not None]
    collator = AffectCollator(processor, [TASK], MODALITIES, with_answers=None, centers=centers, speaker_mixing=0.5)
    torch.manual_seed(0)
    asked = list(expand_by_task(Dataset.from_list(rows), [TASK]))
    moves = torch.stack([collator(asked)["audio_center"] for _ in range(40)])
    subtracted, deviations = moves.unbind(2)
    assert not deviations.any()  # which divide nothing
    own = torch.tensor([levels[row["speaker"]] for row in rows]).unsqueeze(1)
    reached = own - 2 * subtracted
    assert 1 <= reached.min() < 1.1 and 3.9 < reached.max() <= 4
    assert 0.2 < (subtracted == 0).float().mean() < 0.5  # one draw in three is the speaker


def test_mixing_leaves_a_clip_if_the_other_speaker_has_none():
    centers = {"audio": {("Ann", 1.0): torch.ones(1, 2, 6)}}
    assert not mix_centers(centers, "audio", [("Ann", 1.0)], ["Bo"], torch.ones(1)).any()


def test_a_speaker_with_one_clip_is_logged(small, processor, caplog):
    rows = rows_of_speakers({f"speaker {number}": 0.0 for number in range(39)})
    centers_of(small, processor, rows)
    assert "centers of speakers: 38 of 39 speakers have one clip" in caplog.text


def test_frames_that_are_lost_are_zero_after_centring(small, processor):
    rows = rows_of_speakers({"Ann": 3.0})
    predict = Predictor(small, processor, TASK, None, 4, small.device, centers_of(small, processor, rows))
    collator = AffectCollator(processor, [TASK], MODALITIES, with_answers=None, centers=predict.centers)
    batch = dict(collator(list(expand_by_task(rows, [TASK]))))
    changed = lose_frames(predict, 1.0, 1111, batch, rows["id"][:])
    features, mask, _ = small.model.read_modality("audio", **changed)
    assert not features[mask.bool()].any()


def test_each_speed_has_its_own_center(checkpoint, tmp_path):
    """The mean of a speaker's only clip is 0 after centring, at whatever speed the collator draws."""
    folder, processor, model = checkpoint
    row = {"id": "a", "speaker": "Ann", "text": "so", "language": "en", "emotion": "joy"}
    rows = name_speakers("meld", "train", build_split([{**row, "audio": str(folder / "voice.wav")}]))
    cache = TowerCache(model, processor, ["audio"], folder=tmp_path)
    cache.fill(rows.select_columns(["audio", "video"]), torch.device("cpu"), (1.0, 0.5))
    meld, speeds = BUILTIN_TASKS["meld"], (1.0, 0.5)
    rows = expand_by_task(rows, [meld])
    collator = AffectCollator(processor, [meld], ["audio"], with_answers=True, cache=cache, speeds=speeds)
    collator.centers = speaker_centers(model, rows, collator, 4, speeds)
    first, other = collator.centers["audio"].values()
    assert not torch.allclose(first, other, atol=1e-3)
    torch.manual_seed(0)
    batches = [collator(list(rows)) for _ in range(12)]
    assert len({batch["audio_mask"].shape[1] for batch in batches}) == 2  # both speeds were drawn
    for batch in batches:
        layers, mask, _ = model.model.read_modality("audio", **batch)
        assert max(layer[mask.bool()].mean(0).abs().max() for layer in layers) < 1e-5


def test_speakers_of_the_corpora():
    assert speakers_of("ravdess", ["03-01-06-01-02-01-12"], [None]) == ["12"]
    assert speakers_of("casia", ["3_angry_07"], [None]) == ["3"]
    assert speakers_of("avatars", ["avatars_test_brief_0012"], ["Avatar 3"]) == ["Avatar 3"]
    assert speakers_of("meld", ["test_dia0_utt1"], ["Ross"]) == ["Ross"]
    message = r"speaker_mixing: got no speaker in 2 of 2 rows of mosi, such as a\$_\$1, wanted a corpus that names"
    with pytest.raises(ValueError, match=message):
        speakers_of("mosi", ["a$_$1", "a$_$2"], [None, None])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--train_audio_tower", "true"], "got true with train_audio_tower, wanted frozen towers or features"),
        (["--tower_epochs", "1"], "got true with tower_epochs, wanted frozen towers or features"),
        (["--modalities", "text"], r"got true with modalities \['text'\], wanted audio or vision among them"),
        (["--speaker_mixing", "1"], "got true with speaker_mixing 1.0, wanted one of them"),
    ],
)
def test_what_adaptation_does_not_support_is_named(fields, message):
    with pytest.raises(ValueError, match=f"speaker_adaptation: {message}"):
        load_recipe([str(REPO / "recipes/tiny.yaml"), "--speaker_adaptation", "true", *fields])


# Runs


@pytest.fixture(scope="module")
def ravdess(tmp_path_factory):
    """Two clips of each of RAVDESS's actors, each at the actor's own pitch and level, and a frozen tower."""
    folder = tmp_path_factory.mktemp("ravdess")
    (folder / "clips").mkdir()
    for actor in range(1, 25):
        for emotion in (3, 4):
            wave = tone(0.3 + 0.1 * (emotion == 4), 100 + 40 * actor + 25 * emotion) * (0.2 + 0.03 * actor)
            soundfile.write(folder / "clips" / f"03-01-{emotion:02}-01-01-01-{actor:02}.wav", wave, 16000)
    torch.manual_seed(0)
    save_whisper(folder / "tower", whisper())
    return folder


@pytest.fixture(scope="module")
def adapted(ravdess):
    """The output folder of a small run with a frozen tower, three speeds and all phases that adaptation allows."""
    fields = {
        "corpus": "ravdess",
        "corpus_dir": ravdess / "clips",
        "corpus_options": '{"fold": 1}',
        "tasks": "ravdess",
        "modalities": "audio",
        "modality_dropout": "{}",
        "audio_tower": ravdess / "tower",
        "audio_speeds": (1.0, 0.9),
        "clip_statistics": "audio",
        "speaker_adaptation": "true",
        "fusion_epochs": 1,
        "num_train_epochs": 1,
        "output_dir": ravdess / "run",
    }
    arguments = [part for name, value in fields.items() for part in (f"--{name}", *np.atleast_1d(value))]
    run("train", "recipes/tiny.yaml", *arguments, hub=ravdess / "hub")
    return ravdess / "run"


def evaluate(model: Path, output: Path, *arguments) -> tuple[dict, list[dict], str]:
    outcome = run("eval", model, "--output", output, *arguments, hub=output.parent / "hub")
    report = json.loads((output / "metrics.json").read_text())
    return report, read_lines(output / "predictions.jsonl"), outcome.said


def test_training_evaluation_and_pipeline_agree(adapted, ravdess):
    corpus = ["--corpus", "ravdess", "--corpus_dir", ravdess / "clips"]
    report, predictions, said = evaluate(adapted / "model", ravdess / "test", *corpus)
    assert report["speaker_adaptation"] is True and len(predictions) == 8 and "speaker_adaptation" not in said
    assert json.loads((adapted / "model" / "recipe.json").read_text())["speaker_adaptation"] is True
    recognize = pipeline("affect-recognition", model=str(adapted / "model"), trust_remote_code=True)
    assert recognize.model.config.speaker_adaptation is True
    table = ravdess / "clips.csv"
    rows = [f"clips/{row['id']}.wav,{row['id'][-2:]}" for row in predictions]
    table.write_text("\n".join(["file,speaker", *rows]))
    assert predict_main([str(adapted / "model"), str(table), "--output", str(ravdess / "answers.jsonl")]) == 0
    by_table = {Path(answer["file"]).stem: answer for answer in read_lines(ravdess / "answers.jsonl")}
    for row in predictions:
        own = sorted(str(path) for path in (ravdess / "clips").glob(f"*-{row['id'][-2:]}.wav"))
        answer = recognize(str(ravdess / "clips" / f"{row['id']}.wav"), speaker_clips=own)
        assert answer["warnings"] == by_table[row["id"]]["warnings"] == []
        assert by_table[row["id"]]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
        # The cache that `eval.py` reads keeps 16 bits; a random tower's clips differ little from their center.
        assert answer["probabilities"] == pytest.approx(row["distribution"], abs=0.05)
    # The validation split is centred in training as in evaluation.
    _, validated, _ = evaluate(adapted / "model", ravdess / "validation", *corpus, "--split", "validation")
    log = read_lines(adapted / "log.jsonl")
    loss = np.mean([-np.log(row["distribution"][row["gold"]]) for row in validated])
    [fitted] = [row["ravdess_calibrated_loss"] for row in log if "ravdess_calibrated_loss" in row]
    assert fitted == pytest.approx(loss, abs=1e-4)


def test_evaluation_without_the_recipe_warns(adapted, ravdess):
    shutil.copytree(adapted / "model", ravdess / "bare")
    (ravdess / "bare" / "recipe.json").unlink()
    report, _, said = evaluate(
        ravdess / "bare", ravdess / "unadapted", "--corpus", "ravdess", "--corpus_dir", ravdess / "clips"
    )
    assert report["speaker_adaptation"] is False
    assert "speaker_adaptation: got no center of the speaker for audio, wanted one, as the model was trained" in said


def test_a_run_on_features(tmp_path):
    short = ["--corpus_options", '{"size": 48}', "--num_train_epochs", "1", "--speaker_adaptation", "true"]
    run("train", "recipes/tiny.yaml", "--output_dir", tmp_path, *short, "--clip_statistics", "audio", "vision")
    report, predictions, _ = evaluate(tmp_path / "model", tmp_path / "test", "--corpus", "generated")
    assert report["speaker_adaptation"] is True and len(predictions) == 8
    run(
        "eval", tmp_path / "model", "--corpus", "generated", "--output", tmp_path / "mmin", "--robustness", "mmin"
    )  # whole modalities disappear with their centers
    assert json.loads((tmp_path / "mmin" / "mmin.json").read_text())["speaker_adaptation"] is True


# The pipeline and predict.py


def test_the_pipeline_centres_as_the_model(checkpoint, recognize):
    folder, processor, model = checkpoint
    names = [str(folder / f"{number}.mp4") for number in range(3)]
    center = model.model.speaker_center(
        processor.media_inputs([processor.load_file(name)], return_tensors="pt") for name in names
    )
    inputs = processor(text="so", video=names[0], task="meld")
    wanted = model.score_labels(processor.candidates("meld"), **inputs, **center).log_probs[0].exp().tolist()
    samples = {
        "call": recognize(names[0], text="so", speaker_clips=names),
        "key": recognize({"file": names[0], "text": "so", "speaker_clips": [{"file": name} for name in names]}),
        "center": recognize({"file": names[0], "text": "so", "speaker_clips": recognize.speaker_center(names)}),
    }
    for name, answer in samples.items():
        assert list(answer["probabilities"].values()) == pytest.approx(wanted, abs=1e-5), name
        assert answer["warnings"] == []


def test_samples_with_and_without_a_center_share_a_batch(place, recognize):
    names, voice = [str(place / f"{number}.mp4") for number in range(3)], str(place / "voice.wav")
    samples = [
        {"file": names[0], "speaker_clips": names},
        {"file": names[1]},
        {"file": voice, "speaker_clips": names},
        {"file": names[2], "speaker_clips": [voice]},
        {"text": "so"},
    ]
    together, apart = recognize(samples), [recognize(sample) for sample in samples]
    for one, other in zip(together, apart, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert one["warnings"] == other["warnings"]
    line = "speaker_adaptation: got no center of the speaker for {}, wanted one, as the model was trained"
    assert [answer["warnings"] for answer in together] == [
        [],
        [line.format("audio and vision")],
        [],
        [line.format("vision")],
        [],
    ]
    plain = recognize(names[0])
    assert any(abs(plain["probabilities"][k] - v) > 1e-4 for k, v in together[0]["probabilities"].items())


def test_a_center_for_a_model_that_was_trained_without():
    message = "speaker_adaptation: got a center of the speaker for audio, wanted none, as the model was trained"
    assert adaptation_warning(EGMFConfig(), ["audio", "vision"], ["audio"]) == message
    assert adaptation_warning(EGMFConfig(), ["audio"], []) is None
    assert adaptation_warning(EGMFConfig(speaker_adaptation=True), ["audio"], ["audio"]) is None


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], r"speaker_clips: got \[\], wanted a list of files or clips"),
        ({}, "speaker_clips: got {}, wanted a list of files or clips"),
        ("one.mp4", "speaker_clips: got 'one.mp4', wanted a list of files or clips"),
        ({"file": "one.mp4"}, "speaker_clips: got {'file': 'one.mp4'}, wanted a list of files or clips"),
        ([3], "speaker_clips: .*got int, wanted a file, bytes, an array or a mapping"),
        ([{"text": "so"}], r"speaker_clips: got \['text'\], wanted a file or a mapping with some of"),
        ([{"audio": None}], "speaker_clips: got clips without sound and pictures, wanted some with either"),
    ],
)
def test_wrong_speaker_clips_are_named(recognize, clips, message):
    with pytest.raises(ValueError, match=message):
        recognize({"text": "so"}, speaker_clips=clips)
    with pytest.raises(ValueError, match=message):
        recognize({"text": "so", "speaker_clips": clips})


def test_an_unreadable_clip_of_the_speaker(place, recognize):
    broken, good = str(place / "broken.mp4"), str(place / "0.mp4")
    with pytest.raises(recognize.processor.media_error, match="broken.mp4"):
        recognize(good, speaker_clips=[good, broken])
    bad, fine = recognize([{"file": good, "speaker_clips": [broken]}, {"file": good}], on_error="report")
    assert "Cannot read" in bad["error"] and "broken.mp4" in bad["error"] and fine["error"] is None


def test_predict_centres_all_files(place, recognize, capsys):
    model, names = str(place / "model"), [str(place / f"{number}.mp4") for number in range(3)]
    assert predict_main([model, *names, "--batch_size", "2", "--speaker_clips", *names[:2]]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name, answer in zip(names, answers, strict=True):
        wanted = recognize(name, speaker_clips=names[:2])
        assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert answer["warnings"] == []
    for bad in ("broken.mp4", "gone.mp4"):
        with pytest.raises(ValueError, match=f"--speaker_clips: Cannot read .*{bad}"):
            predict_main([model, names[0], "--speaker_clips", names[1], str(place / bad)])
        assert capsys.readouterr().out == ""
