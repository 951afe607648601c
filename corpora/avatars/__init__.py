"""Avatars: drawn faces that talk, as real mp4 files with sound, made on the spot from a seed; nothing is downloaded.

Made so that a model needs text, voice and face, and brief, relational and slow cues. Each clip is of one of six
`KINDS`; what decides its emotion, and by its strength how far the score is from 0, depends on the kind:

- **words**, **voice**, **face**: the claim at the end of the line, the voice or the face shows the emotion all along.
- **brief**: 3 frames (120 ms) of an expression, or a break of the voice as long, half of the clips each. Weak traces
  of all four emotions run through every clip, such that clip averages of the expression are the same for all labels.
- **disagreement**: words show one emotion, voice or face (half each) one all along; `RELATION` says what that means.
  Where the two agree it is their emotion, where they do not it is one that neither shows. Either one alone leaves all
  four equally probable.
- **drift**: over the clip the pitch glides up or down, and the face goes from a frown towards a smile or back;
  `DRIFTS` says what the two directions mean. Played backwards a clip has the other directions, and the same averages
  and extremes. Where pitch and smile are on the way is random: no moment tells, only early against late.

All else is independent of the label: identity (in one split only), setting, head motion, blinks, duration, mouth
movements and vowels, which follow the line but for its claim. What is talked about is other in each split. Kinds and,
in each kind, labels are balanced. `ceiling` computes what the best guess from some of the modalities gets: 37.5 % from
text, 47.9 % from audio or vision, 66.7 % from text and either, 75 % from audio and vision. Relation and directions are
conventions, not psychology.

Clips: 96 x 96 pixels at 25 fps (h264), 16 kHz mono (aac), 2 to 3 seconds. Frames may be 120 ms apart at the most for a
flash to be seen: 32 frames of a clip, or 12.5 per second.
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


VERSION = 1  # of the generator: clips of another version are not mixed with these
EMOTIONS = ("joy", "sadness", "anger", "surprise")
LABELS = {"en": EMOTIONS, "zh": ("高兴", "悲伤", "愤怒", "惊奇")}
SIGNS = (1, -1, -1, 1)  # of the score
STRENGTHS = (0.6, 0.8, 1.0)  # weights of an expression
SCORES = (0.4, 0.7, 1.0)  # what they mean, signed by the emotion
KINDS = ("words", "voice", "face", "brief", "disagreement", "drift")
SPLITS = ("train", "validation", "test")
MODALITIES = ("text", "audio", "vision")

# The emotion of a disagreement: rows are the words', columns voice's or face's. A Latin square, so that neither alone
# tells anything; both in the order of `EMOTIONS`.
RELATION = ((0, 3, 1, 2), (2, 1, 3, 0), (3, 0, 2, 1), (1, 2, 0, 3))
DRIFTS = {(1, 1): 0, (-1, -1): 1, (1, -1): 2, (-1, 1): 3}  # (pitch, face): 1 is up or to a smile -> emotion
SPEAKERS = {"train": range(0, 96), "validation": range(96, 112), "test": range(112, 144)}

FRAME_RATE = voice.FRAME_RATE
_FRAMES = (50, 75)  # of a clip, least and most
_FLASH = 3  # frames
_GLIDE, _SMILE = 10.0, 0.9  # semitones and face weight from start to end, at full strength
_CELL = len(KINDS) * len(EMOTIONS)


@dataclass(frozen=True)
class Plan:
    """What a clip shows and what that means: emotions are places in `EMOTIONS`.

    Args:
        kind: one of `KINDS`.
        emotion: the label.
        text: the emotion claimed, or None.
        audio, vision: None, or what the modality shows: ("steady", emotion), ("brief", emotion) or
            ("drift", direction).
    """

    kind: str
    emotion: int
    text: int | None = None
    audio: tuple[str, int] | None = None
    vision: tuple[str, int] | None = None


def plans(kind: str) -> list[Plan]:
    """All equally frequent plans of a kind, each emotion as often."""
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
    """Accuracy of the best guess that sees these modalities and knows the rules above: over all, and by kind.

    Exact for a viewer who recognises all that is shown; of labels that are equally probable it names any.
    """
    chances: dict[tuple, np.ndarray] = {}  # by what is seen: probability of (kind, emotion)
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
    """The kind of a clip, for tables: "avatars_test_brief_0012" -> "brief"."""
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
    """Load the corpus, with `emotion` (of `LABELS[language]`) and `sentiment` (-1.0 to 1.0); make its clips if absent.

    Args:
        source: the folder for the clips: a new one, or one that this function made. What an interrupted run left is
            completed. Both languages share it: sound and pictures are the same.
        seed: all is a function of the seed alone; a corpus of another size begins with the same clips.
        train, validation, test: the number of clips, each a multiple of 24 (six kinds of four emotions).
        language: "en" or "zh", of text and labels.
        workers: how many processes make clips.

    Raises:
        ValueError: an option out of range, or a folder with something else in it, such as clips of another seed, size
            or version.
        RuntimeError: a worker died.
    """
    if language not in LABELS:
        raise ValueError(f"language: got {language!r}, expected one of {', '.join(LABELS)}")
    check_count("seed", seed)
    check_count("workers", workers, minimum=1)
    counts = {"train": train, "validation": validation, "test": test}
    for split, count in counts.items():
        if check_count(split, count, minimum=_CELL) % _CELL:
            raise ValueError(f"{split}: got {count}, expected a multiple of {_CELL}: six kinds of four emotions")
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
    """One clip, drawn but not made; `key` seeds all of its sound and pictures."""

    key: tuple[int, ...]
    split: str
    id: str
    plan: Plan
    strength: int  # place in `STRENGTHS`
    speaker: int
    line: Line

    def path(self, folder: Path) -> Path:
        return folder / self.split / f"{self.id}.mp4"

    def row(self, folder: Path, language: str) -> dict[str, object]:
        """The clip in the corpus schema."""
        question, path = self.line.asked(language), str(self.path(folder))
        return {
            "id": self.id,
            "text": self.line.text(language),
            "speaker": f"Avatar {self.speaker}",
            "context": [] if question is None else [{"speaker": None, "text": question}],
            "language": language,
            "audio": path,  # a video's own sound track is its audio
            "video": path,
            "emotion": LABELS[language][self.plan.emotion],
            "sentiment": SIGNS[self.plan.emotion] * SCORES[self.strength],
        }

    def render(self) -> tuple[list, np.ndarray]:
        """Pictures at `FRAME_RATE`, and sound at `voice.SAMPLE_RATE`."""
        weights, glide, (vowels, loudness), rng = self.tracks()
        vision_rng, audio_rng = rng.spawn(2)
        identity = np.random.default_rng((self.key[0], 1_000_000 + self.speaker))
        look, own_voice = face.random_look(identity), voice.random_voice(identity)
        frames = len(glide)
        flash = weights["flash"] if self.plan.vision and self.plan.vision[0] == "brief" else range(0)
        setting = face.random_setting(vision_rng, frames, flash)
        # The mouth follows the rhythm and not the sound: a break of the voice is not to be seen.
        pictures = face.draw(look, setting, weights["vision"], voice.per_frame(loudness, frames))
        return pictures, voice.speak(own_voice, vowels, loudness, weights["audio"], glide, audio_rng)

    def tracks(self) -> tuple[dict, np.ndarray, tuple[np.ndarray, np.ndarray], np.random.Generator]:
        """Weights (T, 4) of `audio` and `vision` and the frames of the `flash`, glide (T,), rhythm, and the generator.

        The generator is used in the same way whatever the plan's emotion is.
        """
        rng = np.random.default_rng(self.key)
        frames = int(rng.integers(_FRAMES[0], _FRAMES[1] + 1))
        rhythm = voice.rhythm(self.line.sounds(), frames, rng)
        way = np.arange(frames) / (frames - 1) - 0.5  # (T,), from start to end
        glide = rng.uniform(-1, 1) * way
        start = _flash_start(voice.per_frame(rhythm[1], frames), rng)
        weights: dict = {"flash": range(start, start + _FLASH)}
        for modality in ("audio", "vision"):
            shape, shown = getattr(self.plan, modality) or (None, None)
            strength = STRENGTHS[self.strength if shape else int(rng.integers(3))]
            # Of each emotion, as much in all as one to three flashes; where there is a flash, it is a part of that.
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
                smile = level + _SMILE * strength * shown * way
                track[:, 0] += smile.clip(min=0)
                track[:, 1] -= smile.clip(max=0)
            elif shape == "drift":
                glide = _GLIDE * strength * shown * way
            weights[modality] = track
        return weights, glide, rhythm, rng


def _flash_start(loudness: np.ndarray, rng: np.random.Generator) -> int:
    """A random frame with `_FLASH` frames of speech from it on, away from the ends of the clip; loudness is (T,)."""
    spoken = np.lib.stride_tricks.sliding_window_view(loudness, _FLASH).min(1) > 0.3
    return int(rng.choice(np.flatnonzero(spoken[5:-5]) + 5))


def _trace(mean: float, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A slow rise and fall somewhere in the clip, (T,), with exactly this mean."""
    length = int(frames * rng.uniform(0.6, 0.95))
    start = int(rng.integers(frames - length + 1))
    bump = np.zeros(frames)
    bump[start : start + length] = np.hanning(length + 2)[1:-1]
    return bump * mean / bump.mean()


def _draw_clips(seed: int, split: str, count: int) -> list[Clip]:
    """The clips of a split, kinds and labels in turn."""
    clips = []
    for kind_number, kind in enumerate(KINDS):
        key = (seed, SPLITS.index(split), kind_number)
        # Plans of a kind come in rounds of all of them, in groups of one for each emotion; random order, but balanced.
        rng, queue = np.random.default_rng((*key, 0, 0)), []
        for number in range(count // len(KINDS)):
            if not queue:
                by_emotion = [[plan for plan in plans(kind) if plan.emotion == emotion] for emotion in range(4)]
                groups = zip(
                    *([options[i] for i in rng.permutation(len(options))] for options in by_emotion), strict=True
                )
                queue = [group[i] for group in groups for i in rng.permutation(4)]
            plan, own = queue.pop(0), np.random.default_rng((*key, number, 1))
            strength, speaker = int(own.integers(3)), int(own.choice(SPEAKERS[split]))
            line = Line.draw(split, plan.text, strength, own)
            name = f"avatars_{split}_{kind}_{number:04}"
            clips.append(Clip((*key, number, 2), split, name, plan, strength, speaker, line))
    return clips


def _make(folder: Path, manifest: dict, clips: dict[str, list[Clip]], workers: int) -> None:
    """Make the clips that are not in the folder. Each is whole or not there, whenever the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second process waits, and finds all clips made
        file = folder / "manifest.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found != manifest:
                raise ValueError(f"{folder} holds the clips of {found}, expected {manifest}: wanted another folder")
        elif others := sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "manifest.part")):
            raise ValueError(f"{folder} holds {others[0]!r} and no {file.name}, expected a new folder")
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
    """Make clips in processes of their own, with a progress bar."""
    # Forking spares the workers whatever the main program imported; elsewhere than on Linux it is not safe.
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
        if os.getppid() != parent:  # the main process was killed: nobody waits for these
            return
        path = clip.path(folder)
        part = path.with_suffix(".part")
        write_clip(part, *clip.render())
        part.replace(path)
        with done.get_lock():
            done.value += 1


def write_clip(path: Path, pictures: list, sound: np.ndarray) -> None:
    """Pictures and sound -> an mp4 file; the same bytes every time with the same libraries."""
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
        frame.pts = 0  # with it the file says how much the encoder put in front, and sound and lips stay together
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
