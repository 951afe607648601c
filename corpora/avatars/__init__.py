"""Avatars: generated mp4 clips of drawn faces that talk. A seed determines all clips; nothing is downloaded.

A model needs text, voice and face to solve the corpus, and cues that are brief, relational or slow. Each clip has one
of six `KINDS`. The kind determines which cue carries the emotion; the strength of the cue determines how far the
score is from 0:

- **words**, **voice**, **face**: the claim at the end of the line, the voice or the face shows the emotion during the
  whole clip.
- **brief**: an expression of 3 frames (120 ms), or a change of the voice of the same length; each in half of the
  clips. Weak traces of all four emotions run through every clip, so that the average expression of a clip is the same
  for all labels.
- **disagreement**: the words show one emotion; the voice or the face (half of the clips each) shows one during the
  whole clip. `RELATION` maps the pair to the label: if both agree, it is their emotion; otherwise it is an emotion
  that neither shows. Given only one of them, all four emotions are equally probable.
- **drift**: during the clip the pitch glides up or down, and the face moves from a frown towards a smile or back.
  `DRIFTS` maps the two directions to the label. Played backwards, a clip has the opposite directions but the same
  averages and extremes. The starting levels are random, so no single moment reveals the label; only a comparison of
  early and late moments does.

Everything else is independent of the label: identity, setting, head motion, blinks, duration, mouth movements and
vowels. Mouth and vowels follow the line, except for its claim. Each person occurs in one split only, and the topics
differ between splits. The kinds are balanced, and so are the labels within each kind.

`ceiling` computes the accuracy of the best guess from some of the modalities: 37.5 % from text, 47.9 % from audio or
vision, 66.7 % from text and one of them, 75 % from audio and vision. `RELATION` and `DRIFTS` are arbitrary
conventions, not psychology.

Clips have 96 x 96 pixels at 25 fps (h264), 16 kHz mono sound (aac), and last 2 to 3 seconds. To see every brief
expression, a model must sample frames at most 120 ms apart: 32 frames per clip, or 12.5 per second.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from datasets import DatasetDict
from filelock import FileLock
from tqdm.auto import tqdm

from corpora.avatars import face, voice
from corpora.avatars.script import Line
from corpora.schema import build_split, check_count


VERSION = 1  # of the generator; clips of different versions are not mixed
EMOTIONS = ("joy", "sadness", "anger", "surprise")
LABELS = {"en": EMOTIONS, "zh": ("高兴", "悲伤", "愤怒", "惊奇")}
SIGNS = (1, -1, -1, 1)  # of the score
STRENGTHS = (0.6, 0.8, 1.0)  # expression weights, by place
SCORES = (0.4, 0.7, 1.0)  # absolute scores of these strengths
KINDS = ("words", "voice", "face", "brief", "disagreement", "drift")
SPLITS = ("train", "validation", "test")
MODALITIES = ("text", "audio", "vision")

# The label of a disagreement: rows are the emotion of the words, columns that of the voice or face, both in the order
# of `EMOTIONS`. It is a Latin square, so that only one of the two says nothing about the label.
RELATION = ((0, 3, 1, 2), (2, 1, 3, 0), (3, 0, 2, 1), (1, 2, 0, 3))
DRIFTS = {(1, 1): 0, (-1, -1): 1, (1, -1): 2, (-1, 1): 3}  # (pitch, face) -> emotion; 1: up, or towards a smile
SPEAKERS = {"train": range(0, 96), "validation": range(96, 112), "test": range(112, 144)}

FRAME_RATE = voice.FRAME_RATE
_FRAMES = (50, 75)  # minimum and maximum number of frames of a clip
_FLASH = 3  # frames
_GLIDE, _SMILE = 10.0, 0.9  # semitones and face weight from start to end, at full strength
_CELL = len(KINDS) * len(EMOTIONS)


@dataclass(frozen=True)
class Plan:
    """The cues of a clip and its label. Emotions are indices in `EMOTIONS`.

    Args:
        kind: one of `KINDS`.
        emotion: the label.
        text: the emotion that the words claim, or None.
        audio, vision: the cue of the modality: ("steady", emotion), ("brief", emotion), ("drift", direction) or None.
    """

    kind: str
    emotion: int
    text: int | None = None
    audio: tuple[str, int] | None = None
    vision: tuple[str, int] | None = None


def plans(kind: str) -> list[Plan]:
    """All plans of a kind. They are equally frequent, and every emotion occurs equally often."""
    emotions = range(len(EMOTIONS))
    if kind == "words":
        return [Plan(kind, emotion, text=emotion) for emotion in emotions]
    if kind == "drift":
        return [
            Plan(kind, emotion, audio=("drift", pitch), vision=("drift", smile))
            for (pitch, smile), emotion in DRIFTS.items()
        ]
    if kind == "disagreement":
        return [
            Plan(kind, RELATION[words][shown], text=words, **{carrier: ("steady", shown)})
            for words, shown, carrier in itertools.product(emotions, emotions, ("audio", "vision"))
        ]
    carriers = {"voice": ("audio",), "face": ("vision",), "brief": ("audio", "vision")}[kind]
    shape = "brief" if kind == "brief" else "steady"
    return [Plan(kind, emotion, **{carrier: (shape, emotion)}) for emotion in emotions for carrier in carriers]


def ceiling(modalities: tuple[str, ...]) -> dict[str, float]:
    """Accuracy of the best possible guess from these modalities, over all clips and by kind.

    The guess assumes that all visible cues are recognised and that the rules above are known. Between equally probable
    labels it chooses at random.
    """
    chances: dict[tuple, np.ndarray] = {}  # visible cues -> probability of (kind, emotion)
    for number, kind in enumerate(KINDS):
        for plan in plans(kind):
            seen = tuple(getattr(plan, modality) for modality in modalities)
            table = chances.setdefault(seen, np.zeros((len(KINDS), len(EMOTIONS))))
            table[number, plan.emotion] += 1 / len(plans(kind))
    by_kind = np.zeros(len(KINDS))
    for table in chances.values():
        best = np.isclose(table.sum(0), table.sum(0).max())
        by_kind += table[:, best].mean(1)
    return {"all": float(by_kind.mean()), **dict(zip(KINDS, by_kind.tolist(), strict=True))}


CLUSTERS = ("people", lambda row_id, speaker: speaker)


def group_of(row_id: str) -> str:
    """The kind of a clip, for result tables: "avatars_test_brief_0012" -> "brief"."""
    return row_id.split("_")[2]


def load(
    source: str | os.PathLike,
    seed: int = 0,
    train: int = 8640,
    validation: int = 384,
    test: int = 960,
    language: str = "en",
    workers: int = 2,
) -> DatasetDict:
    """Load the corpus with `emotion` (from `LABELS[language]`) and `sentiment` (-1.0 to 1.0); generate missing clips.

    Args:
        source: the folder for the clips: a new folder, or one written by this function. Clips that are missing after
            an interrupted run are added. Both languages use the same clips.
        seed: random seed, which determines all clips. Corpora of different sizes begin with the same clips.
        train, validation, test: number of clips of the split, a multiple of 24 (six kinds times four emotions).
        language: language of text and labels, "en" or "zh".
        workers: number of processes that generate clips.

    Raises:
        ValueError: if an option is out of range, or the folder contains anything else, such as clips of another seed,
            size or version.
        RuntimeError: if a worker process fails.
    """
    if language not in LABELS:
        raise ValueError(f"language: got {language!r}, wanted one of {', '.join(LABELS)}")
    check_count("seed", seed)
    check_count("workers", workers, minimum=1)
    counts = {"train": train, "validation": validation, "test": test}
    for split, count in counts.items():
        if check_count(split, count, minimum=_CELL) % _CELL:
            raise ValueError(f"{split}: got {count}, wanted a multiple of {_CELL}: six kinds of four emotions")
    clips = {split: _draw_clips(seed, split, count) for split, count in counts.items()}
    folder = Path(source)
    _make(folder, {"corpus": "avatars", "version": VERSION, "seed": seed, "clips": counts}, clips, workers)
    return DatasetDict(
        {
            split: build_split(clip.row(folder, language) for clip in split_clips)
            for split, split_clips in clips.items()
        }
    )


@dataclass(frozen=True)
class Clip:
    """The random choices of one clip. `key` seeds its sound and pictures, which `render` makes."""

    key: tuple[int, ...]
    split: str
    id: str
    plan: Plan
    strength: int  # index in `STRENGTHS`
    speaker: int
    line: Line

    def path(self, folder: Path) -> Path:
        return folder / self.split / f"{self.id}.mp4"

    def row(self, folder: Path, language: str) -> dict[str, object]:
        """The row of the clip in the corpus schema."""
        question, path = self.line.asked(language), str(self.path(folder))
        return {
            "id": self.id,
            "text": self.line.text(language),
            "speaker": f"Avatar {self.speaker}",
            "context": [] if question is None else [{"speaker": None, "text": question}],
            "language": language,
            "audio": path,  # the audio track of the video
            "video": path,
            "emotion": LABELS[language][self.plan.emotion],
            "sentiment": SIGNS[self.plan.emotion] * SCORES[self.strength],
        }

    def render(self) -> tuple[list, np.ndarray]:
        """Make the pictures at `FRAME_RATE` and the sound at `voice.SAMPLE_RATE`."""
        weights, glide, (vowels, loudness), rng = self.tracks()
        vision_rng, audio_rng = rng.spawn(2)
        identity = np.random.default_rng((self.key[0], 1_000_000 + self.speaker))
        look, speaker_voice = face.random_look(identity), voice.random_voice(identity)
        frames = len(glide)
        flash = weights["flash"] if self.plan.vision and self.plan.vision[0] == "brief" else range(0)
        setting = face.random_setting(vision_rng, frames, flash)
        # The mouth follows the rhythm, not the sound, so that a change of the voice is not visible.
        pictures = face.draw(look, setting, weights["vision"], voice.per_frame(loudness, frames))
        return pictures, voice.speak(speaker_voice, vowels, loudness, weights["audio"], glide, audio_rng)

    def tracks(self) -> tuple[dict, np.ndarray, tuple[np.ndarray, np.ndarray], np.random.Generator]:
        """Draw the temporal course of the clip.

        The generator draws the same numbers for every emotion of the plan.

        Returns:
            A dict with the expression weights of `audio` and `vision`, (T, 4) each, and the frames of the `flash`; the
            glide (T,) in semitones; the rhythm; and the random generator.
        """
        rng = np.random.default_rng(self.key)
        frames = int(rng.integers(_FRAMES[0], _FRAMES[1] + 1))
        rhythm = voice.rhythm(self.line.sounds(), frames, rng)
        progress = np.arange(frames) / (frames - 1) - 0.5  # (T,), -0.5 to 0.5
        glide = rng.uniform(-1, 1) * progress
        start = _flash_start(voice.per_frame(rhythm[1], frames), rng)
        weights: dict = {"flash": range(start, start + _FLASH)}
        for modality in ("audio", "vision"):
            shape, shown = getattr(self.plan, modality) or (None, None)
            strength = STRENGTHS[self.strength if shape else int(rng.integers(3))]
            # Each emotion amounts to one to three flashes per clip. A real flash is subtracted from its trace.
            amounts = rng.uniform(1, 3, 4)
            amounts -= np.eye(4)[shown] if shape == "brief" else 0
            amounts *= _FLASH * strength / frames
            track = np.stack([_trace(amount, frames, rng) for amount in amounts], axis=1)  # (T, 4)
            level = rng.uniform(-0.7, 0.7)
            if shape == "steady":
                track[:, shown] += strength
            elif shape == "brief":
                track[start : start + _FLASH, shown] += strength
            elif shape == "drift" and modality == "vision":
                smile = level + _SMILE * strength * shown * progress
                track[:, 0] += smile.clip(min=0)
                track[:, 1] -= smile.clip(max=0)
            elif shape == "drift":
                glide = _GLIDE * strength * shown * progress
            weights[modality] = track
        return weights, glide, rhythm, rng


def _flash_start(loudness: np.ndarray, rng: np.random.Generator) -> int:
    """A random start for `_FLASH` frames of speech, away from the ends of the clip; loudness is (T,)."""
    spoken = np.lib.stride_tricks.sliding_window_view(loudness, _FLASH).min(1) > 0.3
    return int(rng.choice(np.flatnonzero(spoken[5:-5]) + 5))


def _trace(mean: float, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A slow rise and fall at a random place in the clip, (T,), with exactly this mean."""
    length = int(frames * rng.uniform(0.6, 0.95))
    start = int(rng.integers(frames - length + 1))
    bump = np.zeros(frames)
    bump[start : start + length] = np.hanning(length + 2)[1:-1]
    return bump * mean / bump.mean()


def _draw_clips(seed: int, split: str, count: int) -> list[Clip]:
    """Draw the clips of a split, kind by kind, with balanced labels."""
    clips = []
    for kind_number, kind in enumerate(KINDS):
        key = (seed, SPLITS.index(split), kind_number)
        # Each round contains all plans of the kind once, in groups with one plan for each emotion, in random order.
        rng, queue = np.random.default_rng((*key, 0, 0)), []
        for number in range(count // len(KINDS)):
            if not queue:
                by_emotion = [[plan for plan in plans(kind) if plan.emotion == emotion] for emotion in range(4)]
                groups = zip(
                    *([options[i] for i in rng.permutation(len(options))] for options in by_emotion), strict=True
                )
                queue = [group[i] for group in groups for i in rng.permutation(4)]
            plan, clip_rng = queue.pop(0), np.random.default_rng((*key, number, 1))
            strength, speaker = int(clip_rng.integers(3)), int(clip_rng.choice(SPEAKERS[split]))
            line = Line.draw(split, plan.text, strength, clip_rng)
            name = f"avatars_{split}_{kind}_{number:04}"
            clips.append(Clip((*key, number, 2), split, name, plan, strength, speaker, line))
    return clips


def _make(folder: Path, manifest: dict, clips: dict[str, list[Clip]], workers: int) -> None:
    """Make the missing clips. Each is renamed when complete, so a killed process leaves no partial clip."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second process waits, and then finds all clips
        file = folder / "manifest.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found != manifest:
                raise ValueError(f"{folder} holds the clips of {found}, wanted {manifest}, or another folder")
        elif others := sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "manifest.part")):
            raise ValueError(f"{folder} holds {others[0]!r} and no {file.name}, wanted a new folder")
        else:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(manifest) + "\n", encoding="utf-8")
            part.replace(file)
        jobs = []
        for split, split_clips in clips.items():
            (folder / split).mkdir(exist_ok=True)
            there = set(os.listdir(folder / split))
            jobs += [clip for clip in split_clips if f"{clip.id}.mp4" not in there]
        if jobs:
            _run(folder, jobs, min(workers, len(jobs)))


def _run(folder: Path, jobs: list[Clip], workers: int) -> None:
    """Make clips in worker processes, with a progress bar."""
    # With fork, workers need not repeat the imports of the main program; it is safe on Linux only.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done = context.Value("i", 0)
    shares = [(folder, jobs[worker::workers], done, os.getpid()) for worker in range(workers)]
    processes = [context.Process(target=_work, args=share, daemon=True) for share in shares]
    for process in processes:
        process.start()
    with tqdm(total=len(jobs), desc=f"making clips in {folder}", unit="clip", disable=None) as bar:
        while any(process.is_alive() for process in processes):
            time.sleep(0.05)
            bar.update(done.value - bar.n)
        bar.update(done.value - bar.n)
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"making clips in {folder}: {len(failed)} workers ended with {failed}, {done.value} made")


def _work(folder: Path, jobs: list[Clip], done, parent: int) -> None:
    for clip in jobs:
        if os.getppid() != parent:  # the main process was killed
            return
        path = clip.path(folder)
        part = path.with_suffix(".part")
        write_clip(part, *clip.render())
        part.replace(path)
        with done.get_lock():
            done.value += 1


def write_clip(path: Path, pictures: list, sound: np.ndarray) -> None:
    """Write pictures and sound to an mp4 file. With the same library versions, the bytes are reproducible."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "superfast", "crf": "26"})
        video.width, video.height, video.pix_fmt = *pictures[0].size, "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=voice.SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 48_000
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_image(picture)))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = voice.SAMPLE_RATE, Fraction(1, voice.SAMPLE_RATE)
        frame.pts = 0  # lets the file record the encoder delay, which keeps sound and pictures in sync
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
