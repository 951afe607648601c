"""A small generated feature corpus for `recipes/tiny.yaml` and tests: it needs no files and is deterministic.

A model must use all modalities to solve it. One third of the rows carries the label ("positive" or "negative") in the
words, one third in the audio features and one third in the vision features. The other modalities of a row are noise;
audio or vision noise is missing in about a fifth of the cases. The corpus has nothing to do with real emotion.
"""

import numpy as np
from datasets import DatasetDict

from corpora.schema import build_split, check_count


LABELS = ("negative", "positive")
AUDIO_SIZE, AUDIO_RATE = 6, 4.0  # features, frames per second
VISION_SIZE, VISION_RATE = 5, 3.0
MAX_SECONDS = 3.0  # 1 to 12 audio frames, 1 to 9 vision frames

_WORDS = {"positive": ("wonderful", "lovely", "great"), "negative": ("terrible", "awful", "boring")}
_NEUTRAL_WORDS = ("long", "new", "short")
_SUBJECTS = ("the film", "the song", "the trip", "the dinner")
_CARRIERS = ("text", "audio", "vision")
_MISSING_RATE = 0.2
_SIGNAL, _NOISE = 1.5, 0.5  # mean of the features that carry the label; standard deviation


def load(source: None = None, size: int = 360, seed: int = 0) -> DatasetDict:
    """Generate the corpus: train, validation and test with 2/3, 1/6 and 1/6 of the rows.

    Each row simulates a clip of up to 3 seconds, with `audio_features` (T, 6) at 4 frames per second and
    `vision_features` (T, 5) at 3 frames per second; either can be null. Labels, and the modalities that carry them,
    are balanced in every split.

    Args:
        source: must be None, because there are no files.
        size: total number of rows, at least 36 (six kinds of rows in the smallest split).
        seed: random seed; `size` and `seed` determine all rows.

    Raises:
        ValueError: if a source is given, or an option is out of range.
    """
    if source is not None:
        raise ValueError(f"source: got {source!r}, wanted None: this corpus has no files")
    size = check_count("size", size, minimum=36)
    rng = np.random.default_rng(check_count("seed", seed))
    counts = {"train": size - 2 * (size // 6), "validation": size // 6, "test": size // 6}
    return DatasetDict(
        {
            split: build_split(_row(f"{split}_{number}", kind, rng) for number, kind in enumerate(_kinds(count, rng)))
            for split, count in counts.items()
        }
    )


def _kinds(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` pairs of a label and the modality that carries it, balanced and in random order."""
    pairs = [(label, carrier) for label in LABELS for carrier in _CARRIERS]
    kinds = [pairs[number % len(pairs)] for number in range(count)]
    return [kinds[position] for position in rng.permutation(count)]


def _row(row_id: str, kind: tuple[str, str], rng: np.random.Generator) -> dict[str, object]:
    """One utterance; exactly one modality carries its label."""
    label, carrier = kind
    words = _WORDS[label] if carrier == "text" else _NEUTRAL_WORDS
    seconds = rng.uniform(0.0, MAX_SECONDS)
    row: dict[str, object] = {
        "id": row_id,
        "text": f"{rng.choice(_SUBJECTS)} was {rng.choice(words)}",
        "speaker": "Ann",
        "context": [{"speaker": "Bob", "text": f"how was {rng.choice(_SUBJECTS)}?"}] * int(rng.integers(2)),
        "language": "en",
        "emotion": label,
    }
    for modality, width, rate in (("audio", AUDIO_SIZE, AUDIO_RATE), ("vision", VISION_SIZE, VISION_RATE)):
        missing = rng.random() < _MISSING_RATE
        if missing and carrier != modality:
            continue
        frames = int(seconds * rate) + 1
        mean = _SIGNAL * (1 if label == "positive" else -1) if carrier == modality else 0.0
        row[f"{modality}_features"] = rng.normal(mean, _NOISE, (frames, width)).astype(np.float32)  # (T, D)
        row[f"{modality}_times"] = ((np.arange(frames) + 0.5) / rate).astype(np.float32)  # middle of each frame
    return row
