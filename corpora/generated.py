"""A small generated feature corpus, for the quickstart and for tests: no files, the same rows every time.

Made so that a model has to use everything it is given. A third of the rows carries the label ("positive" or
"negative") in the words, a third in the audio features, a third in the vision features; the other modalities of a row
are noise or, in about a fifth of the cases, missing. It says nothing about emotion.
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
_SIGNAL, _NOISE = 1.5, 0.5  # mean of every feature where it carries the label, standard deviation


def load(source: None = None, size: int = 360, seed: int = 0) -> DatasetDict:
    """Generate the corpus: train, validation and test with 2/3, 1/6 and 1/6 of the rows.

    Each row has `audio_features` (T, 6) at 4 frames a second and `vision_features` (T, 5) at 3, of a clip of up to 3
    seconds, or null. Labels and carriers of the label are balanced in every split.

    Args:
        source: None, there are no files.
        size: the number of rows in all, at least 36 (six kinds of rows in the smallest split).
        seed: rows are a function of `size` and `seed` alone.

    Raises:
        ValueError: a source, or an option out of range.
    """
    if source is not None:
        raise ValueError(f"source: got {source!r}, expected None: this corpus has no files")
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
    """`count` pairs of label and carrier, balanced and in random order."""
    pairs = [(label, carrier) for label in LABELS for carrier in _CARRIERS]
    kinds = [pairs[number % len(pairs)] for number in range(count)]
    return [kinds[position] for position in rng.permutation(count)]


def _row(row_id: str, kind: tuple[str, str], rng: np.random.Generator) -> dict[str, object]:
    """One utterance whose label is carried by one modality."""
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
