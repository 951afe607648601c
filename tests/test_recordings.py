"""Long recordings: their parts are those of the whole file, memory is bounded, and the guard holds."""

import copy
import json
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from clips import FPS, tone, write_lossless
from datasets import Dataset
from models import save_model_with_towers
from pids import gone, needs_proc

from egmf import media_egmf, media_readers_egmf, media_recordings_egmf
from egmf.data.lengths import clip_seconds
from egmf.media_egmf import MediaError, Recording, load_audio, load_video, media_length
from egmf.spans_egmf import quietest, windows


RATE = 16000
PAUSES = (3.0, 7.4, 12.2)  # seconds; each lasts 0.3 s


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> tuple[str, np.ndarray, np.ndarray]:
    """A recording of 20 s with pauses, its pictures and its sound."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (20 * FPS, 32, 48, 3), dtype=np.uint8)
    samples = np.concatenate([tone(2, 200 + 60 * place) for place in range(10)])
    for pause in PAUSES:
        samples[round(pause * RATE) : round((pause + 0.3) * RATE)] = 0
    return write_lossless(tmp_path_factory.mktemp("talk") / "talk.mkv", pictures, samples), pictures, samples


PLANS = {
    "segments": {"spans": [(0, 2), (1, 3), (1.5, 2), (5.2, 6), (19, 25), (30, 31)]},
    "pauses": {"window": 5.0},
    "windows": {"window": 4.0, "hop": 1.5},
}


@pytest.mark.parametrize("plan", PLANS)
def test_spans_are_parts_of_the_whole_file(talk, plan):
    path, pictures, _ = talk
    samples = load_audio(path, RATE).samples
    recording = Recording(path, RATE, 4, **PLANS[plan])
    found = list(recording)
    for span in found:
        heard = samples[round(span.start * RATE) : round(span.end * RATE)]
        times = np.arange(len(pictures)) / FPS
        inside = np.flatnonzero((times >= span.start - 1e-6) & (times < span.end - 1e-6))
        chosen = inside[[(2 * i + 1) * len(inside) // 8 for i in range(4)]] if len(inside) else inside
        if len(heard):
            np.testing.assert_array_equal(span.audio.samples, heard)
            np.testing.assert_array_equal(span.video.frames, pictures[chosen])
            np.testing.assert_allclose(span.video.times, times[chosen] - span.start, atol=1e-3)
        else:
            assert span.audio is None and span.video is None
    assert recording.warnings == []
    if plan == "segments":
        assert [(span.start, span.end) for span in found] == PLANS[plan]["spans"] and recording.duration is None
    else:
        assert recording.duration == pytest.approx(20, abs=0.05) == found[-1].end
    if plan == "windows":
        assert [span.start for span in found] == [1.5 * place for place in range(12)]


def test_spans_end_in_pauses_and_cover_everything(talk):
    spans = [(span.start, span.end) for span in Recording(talk[0], RATE, None, window=5.0)]
    assert spans[0][0] == 0 and [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert all(2.49 <= end - start <= 5 for start, end in spans)
    for pause, (_, end) in zip(PAUSES, spans, strict=False):
        assert pause < end < pause + 0.3


@pytest.mark.parametrize("length", [0.5, 4.9, 5.1, 7.4, 7.6, 12.0])
def test_the_last_spans_are_not_short(tmp_path, length):
    soundfile.write(tmp_path / "a.wav", tone(length), RATE)
    spans = [(span.start, span.end) for span in Recording(tmp_path / "a.wav", RATE, 4, window=5.0)]
    assert spans[-1][1] == pytest.approx(length, abs=1e-3)
    assert all(min(2.49, length) <= end - start <= 5 for start, end in spans)


def test_the_quietest_place():
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE).astype(np.float32)
    noise[RATE : RATE + RATE // 2] *= 0.05
    assert 1.0 < quietest(noise, RATE, 4.0) < 1.5
    assert quietest(noise[:RATE], RATE, 4.0) == pytest.approx(3.875, abs=0.03)  # after the end of the sound
    assert quietest(np.zeros(100, np.float32), RATE, 0.01) == 0.01
    assert windows(10.0, 4.0, 4.0) == [(0, 4), (4, 8), (8, 10.0)] and windows(3.0, 4.0, 4.0) == [(0, 3.0)]
    assert windows(8.05, 4.0, 4.0) == [(0, 4), (4, 8.05)] and windows(6.0, 1.0, 2.0) == [(0, 1), (2, 3), (4, 5)]


def test_every_format_gives_the_same_sound_and_pictures_as_a_short_file(intact):
    for name, path in intact.items():
        audio = video = None
        try:
            audio = load_audio(path, RATE)
            video = load_video(path, 1000)
        except MediaError as error:
            assert error.kind in ("no audio", "no video"), name
        recording = Recording(path, RATE, 1000, window=1.2)
        spans = list(recording)
        assert len(spans) == 2 and recording.warnings == [], name
        if audio is not None:
            joined = np.concatenate([span.audio.samples for span in spans if span.audio])
            assert abs(len(joined) - len(audio.samples)) <= 0.1 * RATE, name  # soundfile and PyAV pad differently
            if len(joined) == len(audio.samples):
                np.testing.assert_allclose(joined, audio.samples, atol=2e-3, err_msg=name)
        if video is not None:
            frames = np.concatenate([span.video.frames for span in spans if span.video])
            times = np.concatenate([span.video.times + span.start for span in spans if span.video])
            np.testing.assert_array_equal(frames, video.frames, err_msg=name)
            np.testing.assert_allclose(times, video.times, atol=1e-6, err_msg=name)
        assert media_length(path) == pytest.approx(2.0, abs=0.2), name


def test_a_silent_track_is_passed_over(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        tracks = [container.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        for track, level in zip(tracks, (0, 20000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 3 * RATE), level, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux([*track.encode(frame), *track.encode(None)])
    recording = Recording(tmp_path / "two.mkv", RATE, None, window=2.0)
    assert all(span.audio.samples.min() > 0.5 for span in recording)
    assert recording.warnings == ["audio: track 2 of 2 is read"]


def test_a_damaged_recording_gives_what_is_left(intact, tmp_path):
    content = bytearray(intact["clip.mkv"].read_bytes())
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    recording = Recording(tmp_path / "cut.mkv", RATE, 4, window=0.4)
    spans = list(recording)
    assert 1 <= len(spans) < 10 and spans[0].audio and spans[0].video
    assert any("seconds decoded" in warning for warning in recording.warnings)
    rng = np.random.default_rng(0)
    for _ in range(300):
        content[rng.integers(2000, len(content))] = rng.integers(256)
    (tmp_path / "bits.mkv").write_bytes(content)
    recording = Recording(tmp_path / "bits.mkv", RATE, 4, window=0.4)
    assert len(list(recording)) >= 1
    (tmp_path / "noise.mp4").write_bytes(rng.bytes(5000))
    with pytest.raises(MediaError, match=r"noise.mp4': it is not an audio or video file"):
        list(Recording(tmp_path / "noise.mp4", RATE, 4, window=1.0))
    with pytest.raises(MediaError, match="no such file"):
        list(Recording(tmp_path / "gone.mp4", RATE, 4, window=1.0))
    with pytest.raises(MediaError) as raised:
        list(Recording(intact["silent.mp4"], RATE, None, window=1.0))
    assert raised.value.kind == "no audio"


def test_a_picture_that_claims_to_be_hours_later_adds_no_empty_windows(tmp_path):
    """Nor does a gap of minutes, in which there is nothing to answer."""
    for stamps, duration in ((10**6, 2.0), (36000, 36000.04)):
        with av.open(str(tmp_path / "late.mkv"), "w") as container:
            video = container.add_stream("ffv1", rate=FPS)
            video.height, video.width, video.pix_fmt = 16, 16, "bgr0"
            for place in [*range(2 * FPS), stamps * FPS]:
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
                frame.pts, frame.time_base = place, Fraction(1, FPS)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        recording = Recording(tmp_path / "late.mkv", None, 4, window=1.0)
        spans = list(recording)
        assert all(len(span.video.frames) for span in spans) and len(spans) <= 4
        assert recording.duration == pytest.approx(duration, abs=0.1)
        assert [said for said in recording.warnings if "left out" in said]


def test_memory_holds_a_few_windows(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(tone(10), 12), RATE)
    media_readers_egmf.import_readers()
    made, held = [], []
    original = media_recordings_egmf._Sound

    class Watched(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    def send(answer, *arrays):
        held.append(sum(map(len, made[-1].kept)) if made else 0)

    wanted = {"rate": 8000, "frames": None, "window": 3.0, "hop": None}
    media_recordings_egmf._Sound = Watched
    try:
        for plan in ({"spans": None}, {"spans": [(1.0, 2.0), (110.0, 112.0)]}):
            held.clear()
            media_recordings_egmf.read_recording(str(tmp_path / "long.wav"), wanted | plan, send)
            assert 0 < max(held) <= 8000 * 7.5  # two windows and a second of sound, of 120 seconds
    finally:
        media_recordings_egmf._Sound = original


# The guard


def busy_worker() -> int:
    (worker,) = media_egmf._workers - set(media_egmf._idle)
    return worker.process.pid


def test_a_worker_that_died_before_is_replaced(talk):
    list(Recording(talk[0], RATE, None, window=5.0))
    for worker in media_egmf._idle:
        worker.process.kill()
        worker.process.wait()
    assert len(list(Recording(talk[0], RATE, None, window=5.0))) > 3


@needs_proc
def test_an_abandoned_recording_ends_its_worker(talk):
    spans = iter(Recording(talk[0], RATE, 4, window=1.0))
    next(spans)
    pid = busy_worker()
    spans.close()
    assert gone(pid)
    assert len(list(Recording(talk[0], RATE, 4, window=5.0))) > 3


@needs_proc
@pytest.mark.parametrize(("blow", "kind"), [(signal.SIGKILL, "crash"), (signal.SIGSTOP, "time limit")])
def test_a_worker_that_dies_or_hangs_ends_the_recording(talk, blow, kind):
    found = []
    limit = {"step_limit": 1.0} if kind == "time limit" else {}
    with pytest.raises(MediaError) as raised:
        for span in Recording(talk[0], RATE, 16, window=0.5, **limit):
            found.append(span)
            if len(found) == 1:
                pid = busy_worker()
                os.kill(pid, blow)
    assert raised.value.kind == kind and len(found) < 40
    assert gone(pid)


def test_a_slow_reader_is_not_late(talk):
    """The worker waits until its parts are taken, longer than it may take for a part itself."""
    spans = iter(Recording(talk[0], RATE, 100, window=4.0, hop=0.5, step_limit=1.0))
    next(spans)
    time.sleep(2.5)
    assert len(list(spans)) >= 30


def test_progress(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(tone(10), 4), RATE)
    seen = []
    assert len(list(Recording(tmp_path / "long.wav", RATE, None, spans=[(35, 36)], progress=seen.append))) == 1
    assert seen[-1] == 36 and any(10 <= seconds <= 32 for seconds in seen)


# Answers


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a checkpoint with both towers."""
    folder = tmp_path_factory.mktemp("model")
    save_model_with_towers(folder, llm_folder(), assemble)
    return folder


def test_segments_are_answered_as_files_of_their_own(recognize, talk, tmp_path):
    path, pictures, samples = talk
    segments = [
        {"start": 0.4, "end": 1.2, "text": "It broke.", "speaker": "Joey"},
        {"start": 1.0, "end": 1.8, "text": "that is just great"},
        {"start": 6.0, "end": 6.8},
        {"start": 18.0, "end": 18.6, "text": "so", "speaker": "Ross"},
    ]
    *answers, whole = recognize.answer_segments(path, segments, batch_size=3)
    context = []
    for segment, answer in zip(segments, answers, strict=True):
        start, end = segment["start"], segment["end"]
        cut = write_lossless(
            tmp_path / "cut.mkv",
            pictures[round(start * FPS) : round(end * FPS)],
            samples[round(start * RATE) : round(end * RATE)],
        )
        words = {"text": segment.get("text"), "speaker": segment.get("speaker")}
        wanted = recognize({"file": cut, **words, "context": context})
        assert answer["timestamp"] == (start, end) and answer["seconds"] == pytest.approx(end - start)
        found, expected = ([np.log(p) for p in one["probabilities"].values()] for one in (answer, wanted))
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert (answer["text"], answer["speaker"]) == (words["text"], words["speaker"])
        assert answer["warnings"] == [] and answer.keys() == wanted.keys() | {"timestamp", "text", "speaker"}
        context += [words] if words["text"] else []
    seconds = np.array([0.8, 0.8, 0.8, 0.6])
    for label, probability in whole["probabilities"].items():
        parts = [answer["probabilities"][label] for answer in answers]
        assert probability == pytest.approx(np.average(parts, weights=seconds))
    assert whole["label"] == max(whole["probabilities"], key=whole["probabilities"].get)
    weights = [answer["gate_weights"]["expert"]["local"] for answer in answers]
    assert whole["gate_weights"]["expert"]["local"] == pytest.approx(np.average(weights, weights=seconds))
    assert whole["segments"] == 4 and whole["text"] == "It broke. that is just great so"


def test_timestamps_of_the_pipeline(recognize, talk):
    path, _, samples = talk
    answer = recognize(path, return_timestamps=True, window=0.9, top_k=2)
    chunks = answer["chunks"]
    assert chunks[0]["timestamp"][0] == 0 and chunks[-1]["timestamp"][1] == pytest.approx(20, abs=0.05)
    assert all(len(chunk["probabilities"]) == 2 for chunk in [answer, *chunks]) and answer["segments"] == len(chunks)
    assert answer["seconds"] == pytest.approx(20, abs=0.05)
    sound = np.round(samples * 32767) / 32768
    forms = [sound.astype(np.float32), {"raw": np.stack([sound, sound]), "sampling_rate": RATE}]
    for found in recognize(forms, return_timestamps=True, window=5.0, hop=4.0):
        assert [chunk["timestamp"][0] for chunk in found["chunks"]] == [0, 4, 8, 12, 16]
        assert "the model reads only the first 1.0 of 5.0 seconds" in found["chunks"][0]["warnings"][0]
    by_file = recognize({"audio": path}, return_timestamps=True, window=5.0, hop=4.0)
    for chunk, other in zip(by_file["chunks"], found["chunks"], strict=True):
        assert chunk["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)
    score = recognize(path, return_timestamps=True, task="mosei", window=1.0)
    assert score["interval"][0] <= score["score"] <= score["interval"][1]
    assert recognize.processor.window == 1.0  # what the encoder hears, as the checkpoint says nothing else


def test_what_is_missing_is_said(recognize, talk, tmp_path):
    segments = [{"start": 19.6, "end": 20.8}, {"start": 30, "end": 31, "text": "so"}]
    first, second, whole = recognize.answer_segments(talk[0], segments)
    assert first["warnings"] == ["the recording has 0.4 of these 1.2 seconds"]
    assert second["warnings"] == ["the recording has 0.0 of these 1.0 seconds"] and second["label"]
    (answer,) = recognize([str(tmp_path / "gone.wav")], return_timestamps=True, on_error="report")
    assert "no such file" in answer["error"] and answer["label"] is None and answer["chunks"] == []
    with pytest.raises(recognize.processor.media_error, match="no such file"):
        recognize(str(tmp_path / "gone.wav"), return_timestamps=True)
    text = recognize({"file": talk[0], "text": "so"}, return_timestamps=True)
    assert "the words of a recording need times" in text["warnings"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": []}, "segments: got .*, wanted a list of dicts"),
        ({"segments": [{"start": 1}]}, r"segments\[0\]: got .*wanted start, end"),
        ({"segments": [{"start": 1, "end": 1}]}, "got only segments without length, wanted some"),
        ({"segments": [{"start": None, "end": 1}]}, "got None to 1, wanted seconds"),
        (
            {"segments": [{"timestamp": (99, None)}]},
            "got no end of the one from 99 seconds, wanted one, as .* has 20.0 seconds",
        ),
        ({"window": 0}, "window: got 0, wanted seconds from 0.05"),
        ({"hop": "1"}, "hop: got '1', wanted seconds from 0.05"),
        ({"window": 1, "hop": 3}, "hop: got 3 seconds, wanted at most the window of 1"),
    ],
)
def test_wrong_plans(recognize, talk, options, message):
    with pytest.raises(ValueError, match=message):
        recognize(talk[0], return_timestamps=True, **options)
    with pytest.raises(ValueError, match="without return_timestamps|got a value"):
        recognize(talk[0], **options)


def test_plans_given_to_the_pipeline(recognize, talk):
    own = type(recognize)(model=recognize.model, processor=recognize.processor, task="affect-recognition", window=0.5)
    *parts, _ = own.answer_segments(talk[0])
    wanted = recognize(talk[0], return_timestamps=True, window=0.5)["chunks"]
    assert [one["timestamp"] for one in parts] == [one["timestamp"] for one in wanted]


def test_a_trained_model_knows_how_long_its_clips_were(recognize, tmp_path):
    for place in range(20):
        soundfile.write(tmp_path / f"{place}.wav", tone(0.5 + 0.1 * place), RATE)
    (tmp_path / "broken.wav").write_bytes(bytes(99))
    files = [str(tmp_path / f"{place}.wav") for place in range(20)]
    rows = Dataset.from_dict({"audio": [*files, str(tmp_path / "broken.wav"), None], "video": [None] * 22})
    assert clip_seconds(rows) == pytest.approx(np.quantile(0.5 + 0.1 * np.arange(20), 0.95), abs=0.01)
    assert clip_seconds(rows.select([21])) is None
    parts = Dataset.from_dict({"audio": [f"{files[-1]}#t=0,0.5", f"{files[-1]}#t=1.5"], "video": [None] * 2})
    assert clip_seconds(parts) == pytest.approx(np.quantile([0.5, 0.9], 0.95), abs=0.01)
    processor = copy.copy(recognize.processor)
    processor.clip_seconds = 0.7
    processor.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/processor_config.json").read_text())["clip_seconds"] == 0.7
    assert processor.window == 0.7 and processor.is_long(files[5]) and not processor.is_long(files[1])
    processor.clip_seconds = 30.0
    assert processor.window == 1.0  # more is not heard


def test_segments_belong_to_one_recording(recognize, talk):
    chunks = [{"timestamp": (0.0, 0.5), "text": " so"}]  # as speech recognition returns them
    answer = recognize(talk[0], return_timestamps=True, segments=chunks)
    assert answer["chunks"][0]["text"] == " so" and answer["segments"] == 1
    # Whisper leaves out some ends, gives words no length, and may name the language.
    chunks = [{"timestamp": (0.0, None), "text": "so", "language": "english"}, {"timestamp": (0.3, 0.3), "text": "it"}]
    chunks += [{"timestamp": (0.3, 0.6), "text": "goes"}]
    answer = recognize(talk[0], return_timestamps=True, segments=chunks)
    assert [(chunk["timestamp"], chunk["text"]) for chunk in answer["chunks"]] == [
        ((0.0, 0.3), "so"),
        ((0.3, 0.6), "goes"),
    ]
    sound = {"raw": tone(1.0), "sampling_rate": RATE}
    for recording, end in ((talk[0], 20.0), (sound, 1.0)):
        answer = recognize(recording, return_timestamps=True, segments=[{"timestamp": (0.5, None), "text": "so"}])
        assert answer["chunks"][0]["timestamp"] == (0.5, pytest.approx(end, abs=0.05))
    for wrong in ([{"start": 1.0, "end": 0.5}], [{"start": 1, "end": 1}]):
        with pytest.raises(ValueError, match="segments.*: got .*, wanted .*seconds"):
            recognize(talk[0], return_timestamps=True, segments=wrong)
    with pytest.raises(ValueError, match="segments: got a list of samples"):
        recognize([talk[0]], return_timestamps=True, segments=chunks)
    with pytest.raises(ValueError, match="got file and audio, wanted one of"):
        recognize({"file": talk[0], "audio": talk[0]}, return_timestamps=True)
    with pytest.raises(ValueError, match="recording: got nothing"):
        recognize({"text": "so"}, return_timestamps=True)
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="video: got pictures without times"):
        recognize({"video": frames}, return_timestamps=True)
