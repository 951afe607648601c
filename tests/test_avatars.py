"""The avatars corpus: clips are reproducible and balanced, leak no label, and contain the documented cues."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from corpora import avatars, load_corpus
from corpora.avatars import script
from corpora.schema import FEATURES
from egmf.processing_egmf import BUILTIN_TASKS


ROOT = Path(__file__).resolve().parents[1]
SIZES = {"train": 24, "validation": 24, "test": 24}
FULL = {"train": 8640, "validation": 384, "test": 960}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("avatars") / "clips"
    load_corpus("avatars", path, **SIZES)
    return path


@pytest.fixture(scope="module")
def clips() -> dict[str, list[avatars.Clip]]:
    """The random choices of the default corpus, without rendered clips."""
    return {split: avatars._draw_clips(0, split, count) for split, count in FULL.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A clip's pictures (T, H, W, 3) in 0 to 255, and its sound (N,)."""
    with av.open(str(path)) as container:
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        container.seek(0)
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return pictures.astype(np.float32), sound


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Log magnitudes of 20 ms windows, (N, F), at 50 Hz."""
    windows = sound[: len(sound) // 320 * 320].reshape(-1, 320) * np.hanning(320)
    return np.log(np.abs(np.fft.rfft(windows)) + 1e-2)


def of_kind(clips: list[avatars.Clip], kind: str) -> list[avatars.Clip]:
    return [clip for clip in clips if clip.plan.kind == kind]


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_rows_are_to_the_schema_and_the_tasks(folder):
    for language, suffix in (("en", ""), ("zh", "_zh")):
        splits = load_corpus("avatars", folder, language=language, **SIZES)
        assert {split: len(rows) for split, rows in splits.items()} == SIZES
        emotion, score = BUILTIN_TASKS[f"avatars{suffix}"], BUILTIN_TASKS[f"avatars_score{suffix}"]
        assert emotion.labels == avatars.LABELS[language]
        for row in itertools.chain(*splits.values()):
            assert row.keys() == FEATURES.keys() and row["language"] == emotion.language == score.language == language
            assert row["audio"] == row["video"] and Path(row["video"]).is_file()
            assert row["emotion"] in emotion.labels and abs(row["sentiment"]) in np.float32(avatars.SCORES)
            positive = emotion.labels.index(row["emotion"]) in (0, 3)
            assert score.format(row["sentiment"])[0] == "-+"[positive]
            assert ("a" <= row["text"][0] <= "z") == (language == "en")
            assert not any(label in row["text"] for label in emotion.labels)


def test_lists_of_both_languages_are_parallel():
    for lists in (script.THINGS, script.TEMPLATES, script.LEVELS, script.NEUTRAL, script.QUESTIONS):
        assert len(lists["en"]) == len(lists["zh"]) == len(set(lists["en"])) == len(set(lists["zh"]))
    for language, words in script.WORDS.items():
        known = [word for group in (*words, script.NEUTRAL[language]) for word in group]
        assert len(known) == len(set(known)) == 20


@pytest.mark.parametrize(
    "option, value",
    [("train", 0), ("test", 36), ("seed", -1), ("workers", 0), ("language", "de"), ("validation", "24")],
)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        avatars.load(tmp_path / "clips", **{option: value})
    assert not list(tmp_path.iterdir())


# --- made once -------------------------------------------------------------------------------------------------------


def test_made_once_and_the_same_each_time(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    first = load_corpus("avatars", folder, **SIZES)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == before
    for clip in avatars._draw_clips(0, "test", 24)[::5]:
        avatars.write_clip(tmp_path / "again.mp4", *clip.render())
        assert (tmp_path / "again.mp4").read_bytes() == clip.path(folder).read_bytes()
    assert first["train"]["id"] == [clip.id for clip in avatars._draw_clips(0, "train", 24)]
    assert max(path.stat().st_size for path in before) < 80_000


def test_clips_depend_on_the_seed_and_not_on_the_size(clips):
    drawn = avatars._draw_clips(0, "train", 48)
    assert drawn == [clip for clip in clips["train"] if int(clip.id[-4:]) < 8]
    assert [clip.line for clip in drawn] != [clip.line for clip in avatars._draw_clips(1, "train", 48)]


def test_killed_and_begun_again(folder, tmp_path):
    """After a killed process, the next run completes the corpus with the same clips and leaves no partial files."""
    target = tmp_path / "clips"
    code = f"from corpora import load_corpus; load_corpus('avatars', {str(target)!r}, **{SIZES})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(target.rglob("*.mp4"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(list(target.rglob("*.mp4"))) < 72
    load_corpus("avatars", target, **SIZES)
    assert contents(target) == contents(folder)


def test_other_folders_are_refused(folder, tmp_path):
    for other in ({"seed": 1}, {"test": 48}):
        with pytest.raises(ValueError, match="holds the clips of .*another folder"):
            load_corpus("avatars", folder, **(SIZES | other))
    (tmp_path / "manifest.json").write_text(json.dumps({"corpus": "avatars", "version": 0}))
    with pytest.raises(ValueError, match="'version': 0"):
        load_corpus("avatars", tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / "holiday.txt")
    with pytest.raises(ValueError, match="'holiday.txt' and no manifest.json"):
        load_corpus("avatars", tmp_path)


def test_a_worker_that_fails_is_reported(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(avatars, "write_clip", fail)
    with pytest.raises(RuntimeError, match="2 workers ended with"):
        load_corpus("avatars", tmp_path / "clips", **SIZES)


# --- no leaks --------------------------------------------------------------------------------------------------------


def test_balance(clips):
    for split, count in FULL.items():
        assert len(clips[split]) == len({clip.id for clip in clips[split]}) == count
        table = collections.Counter((clip.plan.kind, clip.plan.emotion) for clip in clips[split])
        assert set(table.values()) == {count // 24} and len(table) == 24
        for clip in clips[split]:
            assert avatars.group_of(clip.id) == clip.plan.kind
    for modality in ("text", "audio", "vision"):
        found = [clip.plan for clip in of_kind(clips["train"], "disagreement")]
        pairs = collections.Counter((getattr(plan, modality), plan.emotion) for plan in found)
        present = [number for (what, _), number in pairs.items() if what is not None]
        assert len(present) == 16 and len(set(present)) == 1  # what one modality shows goes with each label as often


def test_splits_share_no_speaker_and_no_line(clips):
    for first, second in itertools.combinations(FULL, 2):
        for of in (
            lambda c: c.speaker,
            lambda c: c.line.thing,
            lambda c: c.line.text("en"),
            lambda c: c.line.text("zh"),
        ):
            assert not {of(clip) for clip in clips[first]} & {of(clip) for clip in clips[second]}


def test_ceilings():
    """The ceilings equal the documented ones, and no single modality suffices, also within the planted kinds."""
    ceilings = {
        seen: avatars.ceiling(seen) for n in (1, 2, 3) for seen in itertools.combinations(avatars.MODALITIES, n)
    }
    expected = [0.375, 23 / 48, 23 / 48, 2 / 3, 2 / 3, 0.75, 1.0]
    assert [one["all"] for one in ceilings.values()] == pytest.approx(expected)
    for modality in avatars.MODALITIES:
        assert ceilings[modality,]["all"] < 0.5
        assert ceilings[modality,]["disagreement"] == pytest.approx(0.25)
        assert ceilings[modality,]["brief"] <= 0.625 and ceilings[modality,]["drift"] <= 0.5
    assert ceilings["audio", "vision"]["disagreement"] == pytest.approx(0.25)
    assert set(ceilings[avatars.MODALITIES].values()) == {1.0}
    assert sorted(avatars.RELATION[e][e] for e in range(4)) == [0, 1, 2, 3]


def test_averages_of_tracks_say_nothing_of_brief_and_drift(clips):
    """Guesses from clip averages are at chance, while the peak finds each flash."""
    for modality in ("audio", "vision"):
        brief = [clip for clip in of_kind(clips["train"], "brief") if getattr(clip.plan, modality)]
        weights = np.stack([clip.tracks()[0][modality].mean(0) for clip in brief])  # (N, 4)
        labels = np.array([clip.plan.emotion for clip in brief])
        assert abs((weights.argmax(1) == labels).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(brief))
        for emotion in range(4):  # the averages' distribution is the same where the emotion is the label
            own, others = weights[labels == emotion, emotion], weights[labels != emotion, emotion]
            assert abs(own.mean() - others.mean()) < 4 * weights[:, emotion].std() * np.sqrt(4 / 3 / len(own))
        peaks = np.stack([clip.tracks()[0][modality].max(0) for clip in brief])
        assert (peaks.argmax(1) == labels).all()

    drifts = [(clip, *clip.tracks()[:2]) for clip in of_kind(clips["train"], "drift")]
    smile = np.array([clip.plan.vision[1] for clip, _, _ in drifts])
    track = [weights["vision"][:, 0] - weights["vision"][:, 1] for _, weights, _ in drifts]
    slope = np.array([np.polyfit(np.arange(len(one)), one, 1)[0] for one in track])
    assert (np.sign(slope) == smile).mean() > 0.99
    # Neither the average nor the beginning alone: the best threshold on them stays far from the whole clip.
    for value, limit in ((np.mean, 0.56), (lambda one: one[:5].mean(), 0.80), (np.max, 0.56), (np.min, 0.56)):
        order = np.argsort([value(one) for one in track])
        above = np.cumsum(smile[order] == 1) + (np.sum(smile == -1) - np.cumsum(smile[order] == -1))
        assert max(above.max(), len(smile) - above.min()) / len(smile) < limit
    assert all(abs(glide.mean()) < 1e-9 for _, _, glide in drifts)


def test_what_is_claimed_is_in_the_words_alone(clips):
    """A different claim, and thus a different label, changes neither the pictures nor the sound."""
    clip = of_kind(clips["train"], "words")[0]
    (plan,) = [plan for plan in avatars.plans("words") if plan.emotion == (clip.plan.emotion + 1) % 4]
    line = replace(clip.line, emotion=plan.emotion, word=(clip.line.word + 1) % 4)
    other = replace(clip, plan=plan, line=line)
    assert clip.line.text("en") != other.line.text("en")
    np.testing.assert_array_equal(clip.render()[1], other.render()[1])
    assert [picture.tobytes() for picture in clip.render()[0]] == [picture.tobytes() for picture in other.render()[0]]


# --- in the files ----------------------------------------------------------------------------------------------------


def test_files_have_pictures_and_sound_of_the_same_length(folder):
    for clip in avatars._draw_clips(0, "train", 24)[::6]:
        frames = len(clip.tracks()[1])
        with av.open(str(clip.path(folder))) as container:
            (video,), (audio,) = container.streams.video, container.streams.audio
            assert (video.width, video.height, video.average_rate) == (96, 96, 25)
            assert video.frames == frames and 50 <= frames <= 75
            assert (audio.rate, audio.layout.name, audio.codec.name) == (16000, "mono", "aac")
        pictures, sound = decode(clip.path(folder))
        assert pictures.shape == (frames, 96, 96, 3)
        assert 0 <= len(sound) - frames * 640 <= 2048  # the codec fills its last block
        rendered, spoken = clip.render()
        assert np.abs(pictures - np.stack([np.asarray(picture) for picture in rendered])).mean() < 8
        assert np.corrcoef(sound[: len(spoken)], spoken)[0, 1] > 0.8  # in time, too


def test_cues_survive_compression(folder):
    """Among all possible labels of a clip, the true one matches the decoded file best in each modality with a cue."""
    right = {"audio": [], "vision": []}
    for clip in avatars._draw_clips(0, "test", 24):
        shown = {modality: getattr(clip.plan, modality) for modality in right}
        if not any(shown.values()):
            continue
        options = {(plan.audio, plan.vision): plan for plan in avatars.plans(clip.plan.kind)}
        options = [
            plan
            for (audio, vision), plan in options.items()
            if (audio is None, vision is None) == (shown["audio"] is None, shown["vision"] is None)
        ]
        pictures, sound = decode(clip.path(folder))
        rendered = []
        for plan in options:
            rendered.append((plan, *replace(clip, plan=plan).render()))
        heard = spectrogram(sound)[: len(pictures) * 2]
        distances = {
            "audio": [np.abs(spectrogram(one) - heard).mean() for _, _, one in rendered],
            "vision": [np.abs(np.stack([np.asarray(p) for p in one]) - pictures).mean() for _, one, _ in rendered],
        }
        for modality, found in distances.items():
            if shown[modality]:
                best = rendered[int(np.argmin(found))][0]
                right[modality].append(getattr(best, modality) == shown[modality])
    for modality, hits in right.items():
        assert len(hits) >= 10 and np.mean(hits) >= 0.95, (modality, hits)


def pitch_of(sound: np.ndarray) -> np.ndarray:
    """Pitch of 60 ms windows by autocorrelation, in Hz; NaN for windows without pitch."""
    found = []
    for start in range(0, len(sound) - 960, 480):
        window = sound[start : start + 960] - sound[start : start + 960].mean()
        spectrum = np.fft.rfft(window, 2048)
        lags = np.fft.irfft(np.abs(spectrum) ** 2)[:320] / np.linspace(960, 640, 320)
        lag = 36 + lags[36:250].argmax()  # 64 to 444 Hz
        found.append(16000 / lag if lags[lag] > 0.5 * lags[0] else np.nan)
    return np.array(found)


def test_drift_is_in_the_decoded_pitch(clips, tmp_path):
    hits = []
    for clip in of_kind(clips["test"], "drift")[:12]:
        avatars.write_clip(tmp_path / "clip.mp4", *clip.render())
        semitones = 12 * np.log2(pitch_of(decode(tmp_path / "clip.mp4")[1]))
        semitones = (semitones - np.nanmedian(semitones) + 6) % 12 - 6 if np.isfinite(semitones).any() else semitones
        places = np.flatnonzero(np.isfinite(semitones))
        slopes = [(semitones[b] - semitones[a]) / (b - a) for a, b in itertools.combinations(places, 2) if b - a > 10]
        hits.append(np.sign(np.median(slopes)) == clip.plan.audio[1])
    assert np.mean(hits) > 0.9


def test_flash_is_brief_and_in_the_decoded_frames(clips, tmp_path):
    """The frames of the flash differ from their neighbours more than through speech and motion, also at 12.5 fps."""
    flashes = [clip for clip in of_kind(clips["test"], "brief") if clip.plan.vision][:6]
    for clip in flashes:
        weights, _, _, _ = clip.tracks()
        assert (weights["vision"][:, clip.plan.emotion] > 0.5).sum() == 3
        avatars.write_clip(tmp_path / "clip.mp4", *clip.render())
        pictures = decode(tmp_path / "clip.mp4")[0]
        flash = weights["flash"]
        into, usual = np.abs(pictures[flash.start] - pictures[flash.start - 1]), np.abs(np.diff(pictures, axis=0))
        assert into[25:75].mean() > 1.3 * np.median(usual[:, 25:75].mean((1, 2, 3)))
        assert set(flash) & set(range(0, len(pictures), 2)) and set(flash) & set(range(1, len(pictures), 2))
        assert set(flash) & set(np.linspace(0, len(pictures) - 1, 32).round().astype(int))
