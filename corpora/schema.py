"""The one schema of every corpus: one row is one utterance.

Null means that a modality is missing and is always legal. A corpus published as media fills `audio` and `video`,
one published as precomputed features fills `audio_features` and `vision_features`. A classification corpus fills
`emotion`, a regression corpus fills `sentiment`, the other one is null; a corpus that has both fills both.
"""

from collections.abc import Iterable, Mapping

from datasets import Dataset, Features, List, Value


_TURNS = List({"speaker": Value("string"), "text": Value("string")})
_SEQUENCE = List(List(Value("float32")))

FEATURES = Features(
    {
        "id": Value("string"),  # unique over all splits
        "text": Value("string"),  # what was said; may be empty
        "speaker": Value("string"),  # null: unknown
        "context": _TURNS,  # the utterances before this one, oldest first
        "following": _TURNS,  # the utterances after this one, nearest first; empty where a corpus uses none
        "language": Value("string"),  # ISO 639-1: "en", "zh"
        "audio": Value("string"),  # path of a file with sound (of a video: its own sound track)
        "video": Value("string"),  # path of a file with pictures
        "audio_features": _SEQUENCE,  # (T_audio, D_audio)
        "vision_features": _SEQUENCE,  # (T_vision, D_vision)
        "audio_times": List(Value("float32")),  # (T_audio,), seconds on the clip clock
        "vision_times": List(Value("float32")),  # (T_vision,), seconds on the clip clock
        "emotion": Value("string"),  # the label as a word
        "sentiment": Value("float32"),  # the score, in the corpus' own range
    }
)


def build_split(rows: Iterable[Mapping[str, object]]) -> Dataset:
    """Rows of (some of) the columns of `FEATURES` -> a `Dataset` of all of them.

    Columns that a row leaves out are null, the two lists of turns empty. Feature sequences may be NumPy arrays
    of shape (T, D).
    """
    empty: dict[str, object] = {name: None for name in FEATURES} | {"context": [], "following": []}
    whole = [empty | row for row in rows]
    return Dataset.from_dict({name: [row[name] for row in whole] for name in FEATURES}, features=FEATURES)


def check_count(option: str, value: object, minimum: int = 0) -> int:
    """Return `value` where it is an integer >= `minimum`, raise a ValueError that names `option` where not."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{option}: got {value!r}, expected an integer >= {minimum}")
    return value
