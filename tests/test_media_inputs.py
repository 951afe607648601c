"""Media in the processor and in training: files, arrays and clips become tower inputs; frozen towers are cached."""

import copy
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from clips import tone, write_clip
from corpus_files import SHARED
from datasets import Dataset
from models import EXTRACTORS, TOLERANCE, build_processor, clip_vision, hubert, whisper
from transformers import (
    ASTFeatureExtractor,
    AutoTokenizer,
    SeamlessM4TFeatureExtractor,
)

import train
from egmf import media_inputs_egmf
from egmf.data import tower_cache
from egmf.data.collator import AffectCollator
from egmf.data.tower_cache import TowerCache
from egmf.media_egmf import AudioClip, MediaError, VideoClip, load_audio, load_video
from egmf.media_inputs_egmf import MediaWarning
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe_reading import load_recipe


ROOT = Path(__file__).resolve().parents[1]


def sound(array, rate=16000) -> dict:
    return {"array": array, "sampling_rate": rate}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    soundfile.write(folder / "voice.wav", tone(0.4), 16000)
    soundfile.write(folder / "high.flac", np.stack([tone(0.25, rate=44100)] * 2, 1), 44100)
    return {
        "wav": str(folder / "voice.wav"),
        "flac": str(folder / "high.flac"),
        "mp4": write_clip(folder / "clip.mp4"),
        "short": write_clip(folder / "short.mp4", 0.2, seed=1),
        "mute": write_clip(folder / "mute.mp4", 0.5, sound=False, seed=2),
    }


@pytest.fixture(scope="module", params=EXTRACTORS)
def media(request, llm_folder, assemble):
    """A processor with both preprocessors and a model with both towers."""
    processor = build_processor(llm_folder(), request.param)
    torch.manual_seed(3)
    tower = whisper() if request.param == "whisper" else hubert()
    vision = clip_vision()
    return processor, assemble(audio_tower=tower, vision_tower=vision, audio_input_rate=processor.audio_input_rate)


def log_probs(media, **call) -> torch.Tensor:
    processor, model = media
    return model.score_labels(processor.candidates("meld"), **processor(task="meld", **call)).log_probs


def test_frames_that_are_padded_to_an_even_number_are_no_window(llm_folder):
    """The extractor of Wav2Vec2-BERT gives (positions, 160); a clip of 160 positions is no exception."""
    processor = build_processor(llm_folder())
    processor.feature_extractor = SeamlessM4TFeatureExtractor()
    assert processor.audio_window == np.inf and processor.audio_input_rate == 50
    clips = [{"array": tone(seconds), "sampling_rate": 16000} for seconds in (3.22, 5.0)]
    assert processor.load_media(audio=clips[0]).audio.duration == pytest.approx(3.22, abs=0.01)
    batch = processor(text=["so", "so"], audio=clips, task="meld")
    assert batch["input_features"].shape == (2, 249, 160)
    assert batch["audio_mask"].sum(1).tolist() == [160, 249]
    processor = build_processor(llm_folder())
    processor.feature_extractor = ASTFeatureExtractor()
    with pytest.raises(ValueError, match="feature_extractor: got ASTFeatureExtractor, wanted one that returns an att"):
        processor(text="so", audio=clips[0], task="meld")


def test_input_rates(llm_folder):
    assert build_processor(llm_folder(), "whisper").audio_input_rate == 100
    assert build_processor(llm_folder(), "hubert").audio_input_rate == 16000


def test_file_clip_and_array_are_the_same(media, files):
    processor, _ = media
    samples, rate = soundfile.read(files["wav"], dtype="float32")
    video = load_video(files["mp4"], 4)
    batches = [
        processor(text="so", audio=files["wav"], video=files["mp4"], task="meld"),
        processor(text="so", audio=Path(files["wav"]), video=Path(files["mp4"]), task="meld"),
        processor(text="so", audio=load_audio(files["wav"], rate), video=video, task="meld"),
        processor(text="so", audio={"array": samples, "sampling_rate": rate}, video=video, task="meld"),
        processor(text="so", audio=samples, sampling_rate=rate, video=video, task="meld"),
        processor(text=["so"], audio=[torch.from_numpy(samples)], sampling_rate=rate, video=[video], task="meld"),
    ]
    assert batches[0]["pixel_values"].shape == (1, 4, 3, 16, 16)
    torch.testing.assert_close(
        batches[0]["vision_times"][0], torch.tensor([0.12, 0.36, 0.60, 0.84]), atol=0.021, rtol=0
    )
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        for name, value in batches[0].items():
            torch.testing.assert_close(batch[name], value, rtol=0, atol=0)
    frames_alone = processor(text="so", video=video.frames, task="meld")
    assert torch.equal(frames_alone["pixel_values"], batches[0]["pixel_values"])
    assert frames_alone["vision_times"].isnan().all()


def test_as_many_frames_are_read_of_an_array_as_of_a_file(media, files):
    processor, _ = media
    every = load_video(files["mp4"], 1000)
    assert len(every.frames) > 4
    of_file = processor(text="so", video=files["mp4"], sound_track=False, task="meld")
    for video in (every, every.frames):
        batch = processor(text="so", video=video, task="meld")
        assert torch.equal(batch["pixel_values"], of_file["pixel_values"])
        assert video is every.frames or torch.equal(batch["vision_times"], of_file["vision_times"])


def test_hidden_layers_of_a_tower_are_one_sample(media):
    processor, _ = media
    layers = np.ones((6, 3, 5), np.float32)
    assert processor(audio_features=layers, task="meld")["audio_features"].shape == (1, 6, 3, 5)
    assert processor(audio_features=layers[None], task="meld")["audio_features"].shape == (1, 6, 3, 5)
    assert processor(audio_features=[layers, None], task="meld")["audio_features"].shape == (2, 6, 3, 5)


def test_answer_is_the_same_alone_and_in_a_mixed_batch(media, files):
    """The samples are long and short, have several rates, and each modality is missing in some of them."""
    calls = [
        {"text": "it is fine", "audio": files["wav"], "video": files["mp4"]},
        {"text": "no", "audio": files["flac"], "video": None},
        {"text": None, "audio": None, "video": files["short"]},
        {"text": "well, well", "audio": None, "video": files["mute"]},
        {"text": "nothing else", "audio": None, "video": None},
    ]
    batch = {name: [call[name] for call in calls] for name in calls[0]}
    together = log_probs(media, **batch)
    for call, row in zip(calls, together, strict=True):
        assert (log_probs(media, **call)[0] - row).abs().max() < TOLERANCE
    assert (together[0] - together[1]).abs().max() > TOLERANCE


def test_sound_track_of_a_video(media, files):
    processor, _ = media
    own = processor(text="so", video=files["mp4"], task="meld")
    assert own["audio_mask"].any()
    given = processor(text="so", video=files["mp4"], audio=files["wav"], task="meld")
    wanted = processor(text="so", audio=files["wav"], task="meld")
    assert torch.equal(given["audio_mask"], wanted["audio_mask"])
    for name in ("sound_track", "mute"):
        call = {"video": files["mp4"], "sound_track": False} if name == "sound_track" else {"video": files["mute"]}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = processor(text="so", **call, task="meld")
        assert "audio_mask" not in batch and batch["vision_mask"].all()


def test_a_listening_model_takes_a_video(llm_folder, files):
    """Without a vision tower, only the sound of a video is used."""
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(llm_folder()), feature_extractor=EXTRACTORS["hubert"]())
    batch = processor(text="so", video=files["mp4"], task="meld")
    assert batch["input_values"].shape[1] == pytest.approx(16000, abs=1500) and "pixel_values" not in batch


def test_what_a_window_cuts_off_is_said(llm_folder):
    processor = build_processor(llm_folder(), "whisper")
    with pytest.warns(MediaWarning, match=r"audio\[0\]: the model reads only the first 1.0 of 1.5 seconds"):
        batch = processor(text="so", audio={"array": tone(1.5), "sampling_rate": 16000}, task="meld")
    assert batch["audio_mask"].sum() == 100  # positions, 10 ms each


def test_what_a_file_lacks_is_said(llm_folder, files, tmp_path):
    (tmp_path / "cut.wav").write_bytes(Path(files["wav"]).read_bytes()[:6000])
    processor = build_processor(llm_folder())
    with pytest.warns(MediaWarning, match=r"cut.wav: .*0\.2 of 0\.4 seconds"):
        batch = processor(text="so", audio=tmp_path / "cut.wav", task="meld")
    whole = processor(text="so", audio=files["wav"], task="meld")
    with av.open(files["mp4"]) as source, av.open(str(tmp_path / "noise.mp4"), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in (packet for packet in source.demux() if packet.dts is not None):
            kept, stream = packet, streams[packet.stream.index]
            if stream.type == "audio":
                kept = av.Packet(b"\x55" * packet.size)
                kept.pts, kept.dts, kept.time_base, kept.duration = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                    packet.duration,
                )
            kept.stream = stream
            target.mux(kept)
    with pytest.warns(MediaWarning, match="Cannot read .*noise.mp4': no sound can be decoded"):
        loaded = processor.load_file(tmp_path / "noise.mp4")
    assert loaded.audio is None and len(loaded.video.frames) == 4
    assert 0.4 < batch["audio_mask"].sum() / whole["audio_mask"].sum() < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"audio": 3}, r"`audio\[0\]` got int, wanted a file, an AudioClip, a dict"),
        (
            {"audio": {"array": [[[0.1]]], "sampling_rate": 16000}},
            r"`audio\[0\]\['array'\]` has the shape \(1, 1, 1\), wanted \(samples,\) or",
        ),
        ({"audio": {"array": [], "sampling_rate": 16000}}, r"`audio\[0\]` got no samples"),
        ({"audio": {"array": [np.nan], "sampling_rate": 16000}}, r"`audio\[0\]` got NaN or infinity, wanted finite"),
        (
            {"audio": sound(np.zeros((3, 2)))},
            r"shape \(3, 2\), wanted \(samples,\), or one axis of at most 8 channels",
        ),
        ({"audio": sound(np.zeros(9, bool))}, "samples of the type bool, wanted floats from -1 to 1, or integers"),
        ({"audio": sound(np.zeros(9, complex))}, "samples of the type complex128, wanted floats"),
        ({"audio": sound(np.zeros(9, np.int64))}, "samples of the type int64, wanted floats"),
        ({"audio": sound(np.full(9, 1e20))}, r"samples up to 1e\+20, wanted them from -1 to 1"),
        (
            {"audio": sound([0.1], "16000")},
            r"`audio\[0\]` got the sampling rate '16000', wanted a number of Hz",
        ),
        ({"audio": sound([0.1], None)}, r"`audio\[0\]` got the sampling rate None"),
        ({"audio": sound([0.1], 0)}, r"`audio\[0\]` got the sampling rate 0"),
        ({"audio": sound([0.1], -8000)}, r"`audio\[0\]` got the sampling rate -8000"),
        ({"audio": sound([0.1], np.nan)}, r"`audio\[0\]` got the sampling rate nan"),
        ({"audio": sound([0.1], 1e-6)}, r"`audio\[0\]` got the sampling rate 1e-06"),
        ({"audio": sound([0.1], 1e300)}, r"`audio\[0\]` got the sampling rate 1e\+300"),
        ({"audio": sound([0.1], 96000)}, r"got 1 samples at 96000 Hz, 0.167 samples at the model's 16000 Hz, wanted"),
        ({"audio": sound(np.zeros(20000), 1)}, r"got 20000 samples at 1 Hz, 3.2e\+08 samples at .*, wanted from 1 to"),
        ({"audio": AudioClip(np.zeros(9, bool), 16000, [])}, r"`audio\[0\].samples` has samples of the type bool"),
        ({"audio": AudioClip(np.full(9, 1e20), 16000, [])}, r"`audio\[0\].samples` has samples up to 1e\+20"),
        ({"audio": AudioClip(np.zeros(9), None, [])}, r"`audio\[0\]` got the sampling rate None"),
        ({"video": VideoClip(np.zeros((2, 8, 8, 3)), np.zeros(2), 1.0, [])}, r"`video\[0\]` got float64"),
        ({"speaker": "J\ud800"}, r"`speaker\[0\]` got a lone surrogate at character 1, wanted valid Unicode"),
        ({"video": np.zeros((2, 8, 8, 3))}, r"`video\[0\]` got float64 of the shape .* uint8 frames"),
        ({"video": np.zeros((2, 8, 8), np.uint8)}, r"`video\[0\]` got uint8 of the shape"),
    ],
)
def test_media_of_a_wrong_form(llm_folder, call, message):
    with pytest.raises(ValueError, match=message):
        build_processor(llm_folder())(text="so", task="meld", **call)


def test_arrays_are_heard_as_files_are(llm_folder, tmp_path):
    """Integers are scaled by their type, channels on either axis are averaged, and torch tensors are accepted."""
    processor, wave = build_processor(llm_folder()), tone(0.3)
    samples = (32767 * wave).astype(np.int16)
    soundfile.write(tmp_path / "mono.wav", samples, 16000)

    def heard(audio):
        return processor(text="so", audio=audio, task="meld")["input_features"]

    wanted = heard(tmp_path / "mono.wav")
    stereo = np.stack([samples, samples], 1)
    forms = {
        "int16": samples,
        "int32": samples.astype(np.int32) << 16,
        "float": samples / 32768,
        "(1, N)": samples[None],
        "(N, 1)": samples[:, None],
        "(N, 2)": stereo,
        "(2, N)": stereo.T,
        "tensor": torch.from_numpy(samples),
        "float tensor": torch.from_numpy(samples / 32768),
    }
    for form, array in forms.items():
        torch.testing.assert_close(heard(sound(array)), wanted, rtol=0, atol=1e-6, msg=form)
        torch.testing.assert_close(heard(AudioClip(array, 16000, [])), wanted, rtol=0, atol=1e-6, msg=form)
    eight_bits = heard(sound((128 + 127 * wave).astype(np.uint8)))
    assert (eight_bits - wanted).abs().mean() < 0.25 * (wanted - heard(sound(np.zeros(4800)))).abs().mean()


def test_a_sound_shorter_than_any_frame_is_answered(media):
    for length in (1, 10):
        answer = log_probs(media, text="so", audio=sound(tone(1.0)[:length]))
        assert answer.isfinite().all()


def test_media_without_a_tower(processor, files):
    with pytest.raises(ValueError, match=r"`audio\[0\]` got a value, wanted None: the processor has no `feature_extr"):
        processor(text="so", audio=files["wav"], task="meld")
    with pytest.raises(ValueError, match=r"`video\[0\]` got a value, wanted None: the processor has no `image_proc"):
        processor(text="so", video=files["mp4"], task="meld")


def test_media_beside_features(llm_folder, files):
    features = [None, np.zeros((3, 3, 16))]
    with pytest.raises(ValueError, match="`audio_features` got values together with media"):
        build_processor(llm_folder())(
            text=["a", "b"], audio=[files["wav"], None], audio_features=features, task="meld"
        )


def test_processor_travels(media, files, tmp_path):
    processor, _ = media
    processor.save_pretrained(tmp_path)
    loaded = EGMFProcessor.from_pretrained(tmp_path)
    first, second = (one(text="so", video=files["mp4"], task="meld") for one in (processor, loaded))
    assert first.keys() == second.keys() and len(first) == 8
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def test_video_of_another_format(media):
    """Both streams of GRID's MPEG-1 clips are read."""
    clips = sorted((SHARED / "data" / "grid").glob("*.mpg"))
    if not clips:
        pytest.skip("no GRID clips in EGMF_SHARED/data/grid, nor in ../shared/data/grid")
    processor, model = media
    batch = processor(text=["bin blue at f two now"] * 2, video=[str(clip) for clip in clips[:2]], task="meld")
    assert batch["audio_mask"].any(1).all() and batch["vision_mask"].all()
    scores = model.score_labels(processor.candidates("meld"), **batch)
    assert (scores.gate_weights["modality"] > 0).all()


# The cache of frozen towers


def rows_of(files, tmp_path) -> list[dict]:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    paths = {"a": (files["wav"], files["mp4"]), "b": (None, str(broken)), "c": (str(tmp_path / "gone.wav"), None)}
    row = {
        "task": "meld",
        "text": "so",
        "context": [],
        "speaker": None,
        "emotion": "joy",
        "sentiment": None,
    }
    return [{**row, "id": name, "audio": audio, "video": video} for name, (audio, video) in paths.items()]


def test_cached_towers_give_the_same_loss(media, files, tmp_path):
    processor, model = media
    rows, task = rows_of(files, tmp_path), processor.tasks["meld"]
    cache = TowerCache(model, processor, ["audio", "vision"], folder=tmp_path / "cache")
    cache.fill(rows, torch.device("cpu"))
    assert {Path(path).name for _, path in cache.errors} == {"broken.mp4", "gone.wav"}
    modalities = ["text", "audio", "vision"]
    direct = AffectCollator(processor, [task], modalities, with_answers=True)
    cached = AffectCollator(processor, [task], modalities, with_answers=True, cache=cache)
    with torch.no_grad():
        losses = [model(**collator(rows)).loss for collator in (direct, cached)]
        without = model(**cached([{**row, "audio": None, "video": None} for row in rows])).loss
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)  # the cache has 16 bits
    assert (losses[0] - without).abs() > 1e-4
    assert set(direct.errors) == {"b", "c"}


def test_what_a_trained_tower_reads_is_cached_without_loss(media, files, tmp_path):
    processor, model = media
    rows, task = rows_of(files, tmp_path), processor.tasks["meld"]
    cache = TowerCache(model, processor, ["audio"], ["vision"], folder=tmp_path / "cache")
    cache.fill(rows, torch.device("cpu"))
    assert {(modality, Path(path).name) for modality, path in cache.errors} == {
        ("vision", "broken.mp4"),
        ("audio", "gone.wav"),
    }
    direct, cached = (
        AffectCollator(processor, [task], ["text", "vision"], with_answers=True, cache=kept)(rows)
        for kept in (None, cache)
    )
    assert direct.keys() == cached.keys()
    for name, value in direct.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=0, equal_nan=True)


def test_cache_is_filled_once_and_tells_files_apart(media, files, tmp_path):
    processor, model = media
    copy = tmp_path / "copy.wav"
    copy.write_bytes(Path(files["wav"]).read_bytes())
    cache = TowerCache(model, processor, ["audio"], folder=tmp_path / "cache")
    cache.fill([{"audio": files["wav"]}], torch.device("cpu"))
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(entries) == 1
    again = TowerCache(model, processor, ["audio"], folder=tmp_path / "cache")
    again.fill([{"audio": files["wav"]}, {"audio": str(copy)}], torch.device("cpu"))  # the same content
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == entries
    soundfile.write(copy, tone(0.3, 500.0), 16000)  # another content under a known name
    fresh = TowerCache(model, processor, ["audio"], folder=tmp_path / "cache")
    with pytest.raises(OSError, match="copy.wav: its cache entry"):
        fresh.load("audio", str(copy))
    fresh.fill([{"audio": str(copy)}], torch.device("cpu"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_sound_is_kept_at_every_speed(media, files, tmp_path):
    processor, model = media
    rows, task = rows_of(files, tmp_path), processor.tasks["meld"]
    cache = TowerCache(model, processor, ["audio"], folder=tmp_path / "cache")
    cache.fill(rows, torch.device("cpu"), speeds=(1.0, 2.0))
    assert [Path(path).name for _, path in cache.errors] == ["gone.wav"]
    lengths = [len(cache.load("audio", files["wav"], speed)["audio_features"]) for speed in (1.0, 2.0)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=1)
    assert cache.load("audio", rows[2]["audio"], 2.0)["audio_features"] is None
    learning = AffectCollator(processor, [task], ["text", "audio"], True, cache, speeds=(1.0, 2.0))
    torch.manual_seed(0)
    heard = {int(learning(rows[:1])["audio_mask"].sum()) for _ in range(16)}
    assert heard == set(lengths)
    scoring = AffectCollator(processor, [task], ["text", "audio"], False, cache)
    assert int(scoring(rows[:1])["audio_mask"].sum()) == lengths[0]


def test_another_tower_has_its_own_entries(media, tmp_path):
    processor, model = media
    first = TowerCache(model, processor, ["vision"], folder=tmp_path).folders["vision"]
    bias = next(model.model.vision_tower.parameters())
    before = bias.detach().clone()
    try:
        bias.data.add_(1e-3)
        assert TowerCache(model, processor, ["vision"], folder=tmp_path).folders["vision"] != first
    finally:
        bias.data.copy_(before)
    assert TowerCache(model, processor, ["vision"], folder=tmp_path).folders["vision"] == first


def folder_of(model, processor, root, modality: str = "audio", **options) -> str:
    return TowerCache(model, processor, [modality], folder=root, **options).folders[modality].name


def test_entries_of_pooled_frames_are_others(media, files, tmp_path, monkeypatch):
    """A run never reads frames that another recipe has averaged."""
    processor, model = media
    lengths, folders = {}, {}
    for size in (None, 2, 4):
        monkeypatch.setattr(model.config, "frame_pooling", {"audio": size} if size else {})
        cache = TowerCache(model, processor, ["audio"], folder=tmp_path)
        cache.fill([{"audio": files["wav"]}], torch.device("cpu"))
        folders[size] = cache.folders["audio"].name
        lengths[size] = len(cache.load("audio", files["wav"])["audio_features"])
    assert len(set(folders.values())) == 3
    assert (lengths[2], lengths[4]) == (-(-lengths[None] // 2), -(-lengths[None] // 4))


def test_entries_of_another_precision_are_others(media, tmp_path):
    processor, model = media
    precisions = {
        str(dtype): folder_of(model, processor, tmp_path, autocast=dtype)
        for dtype in (None, torch.bfloat16, torch.float16)
    }
    half = copy.deepcopy(model)
    half.model.audio_tower.half()
    precisions["weights"] = folder_of(half, processor, tmp_path)
    half.model.audio_tower.load_state_dict({k: v * 0 for k, v in half.model.audio_tower.state_dict().items()})
    precisions["zeros"] = folder_of(half, processor, tmp_path)
    half.model.audio_tower.bfloat16()  # the same bytes
    precisions["zeros in bfloat16"] = folder_of(half, processor, tmp_path)
    torch.set_float32_matmul_precision("medium")
    try:
        precisions["products"] = folder_of(model, processor, tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(set(precisions.values())) == len(precisions), precisions


def test_entries_by_other_settings_or_code_are_others(media, tmp_path, monkeypatch):
    processor, model = media
    first = [folder_of(model, processor, tmp_path, name) for name in ("audio", "vision")]
    inputs = TowerCache(model, processor, (), ["audio"], folder=tmp_path).folders["audio"].name
    other = copy.deepcopy(model)
    other.config.audio_input_rate = 50
    assert folder_of(other, processor, tmp_path) != first[0]
    other = copy.deepcopy(model)
    other.model.vision_tower.set_attn_implementation("eager")
    assert folder_of(other, processor, tmp_path) == first[0]
    assert folder_of(other, processor, tmp_path, "vision") != first[1]

    monkeypatch.setattr(tower_cache, "PACKAGES", ("numpy",))
    assert folder_of(model, processor, tmp_path) != first[0]
    monkeypatch.undo()
    edited = tmp_path / "media_inputs_egmf.py"
    edited.write_text(inspect.getsource(media_inputs_egmf).replace("samples, **options", "2 * samples"))
    spec = importlib.util.spec_from_file_location("media_inputs_egmf", edited)
    monkeypatch.setitem(sys.modules, "egmf.media_inputs_egmf", importlib.util.module_from_spec(spec))
    assert folder_of(model, processor, tmp_path) != first[0]
    assert TowerCache(model, processor, (), ["audio"], folder=tmp_path).folders["audio"].name != inputs


def test_training_with_and_without_autocast_share_no_entries(media, files, tmp_path, monkeypatch):
    """Each cache equals what its training steps compute, and a tower left in training mode applies no dropout."""
    processor, model = media
    monkeypatch.setattr("egmf.data.tower_cache.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("egmf.recipe_reading.has_fast_bfloat16", lambda: True)  # whatever this CPU has
    model = copy.deepcopy(model)
    row = {"audio": files["wav"], "video": files["short"]}
    corpus = {split: Dataset.from_list([row]) for split in ("train", "validation")}
    kept = {}
    for precision in ("bf16", "fp16", "no"):
        fields = ["--bf16", str(precision == "bf16"), "--fp16", str(precision == "fp16")]
        recipe = load_recipe([str(ROOT / "recipes/tiny.yaml"), *fields])
        for tower in (model.model.audio_tower, model.model.vision_tower):
            tower.train()
        cache = train.fill_cache(recipe, model, processor, {"audio": (), "vision": ()}, [], corpus, None)
        batch = processor(text="so", audio=row["audio"], task="meld")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):  # Accelerate has no fp16 on a CPU
            wanted = model.eval().model.encode_media(dict(batch))["audio_features"][0]
        kept[precision] = cache.load("audio", row["audio"])["audio_features"]
        assert np.array_equal(kept[precision], wanted[: len(kept[precision])].half())
    assert not np.array_equal(kept["bf16"], kept["no"]) and np.array_equal(kept["fp16"], kept["no"])


def test_an_unreadable_file_is_an_error_in_use(llm_folder, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(MediaError, match=r"broken.mp4"):
        build_processor(llm_folder())(text="so", video=tmp_path / "broken.mp4", task="meld")
