"""CMU-MOSEI (Zadeh et al. 2018): opinions on YouTube; each utterance has a score from -3 to 3.

Three published forms are read. The first is a *file*, the others are a *folder*:

- MMSA's `unaligned_50.pkl` (audio 74 features, COVAREP, 20 per second; vision 35, FACET, 15 per second) and
  `aligned_50.pkl`, described in `corpora/mmsa.py`. They contain -inf and NaN, which are set to 0 and counted.
- MMSA's clips: `label.csv` and `Raw/{video_id}/{clip_id}.mp4`.
- CMU's raw release: `Videos/Segmented/Combined/{video_id}_{clip_id}.mp4`, and
  `Transcript/Segmented/Combined/{video_id}.txt` with lines `video___clip___start___end___text`, which provide the
  text. The release has no splits, so MMSA's `label.csv` must be added. Both folders may be inside `Raw/`.

Utterances have no context, as in the published results on this corpus.
"""

import logging
import os
from pathlib import Path

from datasets import DatasetDict

from corpora.mmsa import ClipFolders, read_features, read_table, table_rows
from corpora.reading import Notes, Reading, part_of_id, repair_text


logger = logging.getLogger(__name__)

SCORES = (-3.0, 3.0)
SIZES = {"train": 16326, "validation": 1871, "test": 4659}
WIDTHS = {"audio_features": 74, "vision_features": 35}
RATES = {"audio": 20.0, "vision": 15.0}  # frames per second of the unaligned features

_VIDEOS, _TRANSCRIPTS = "Videos/Segmented/Combined", "Transcript/Segmented/Combined"


CLUSTERS = ("videos", part_of_id(r"(.+)\$_\$[^$]+"))


def load(source: str | os.PathLike) -> DatasetDict:
    """Load MOSEI as regression; `sentiment` ranges from -3 to 3.

    Args:
        source: A pickle, or the folder with `label.csv` and the clips.

    Raises:
        FileNotFoundError: If the file, the table or the folder of clips does not exist.
        ValueError: If a file is not as described above (the message names the file and the position), or a score is
            out of range.
    """
    notes = Notes()
    return read(source, notes).load(notes, logger)


def read(source: str | os.PathLike, notes: Notes) -> Reading:
    """Like `load`, but returns a `Reading` whose rows have not been read yet."""
    source = Path(source)
    if not source.is_dir():
        splits, aligned = read_features(source, notes, "en", SCORES, RATES)
        return Reading(f"MMSA's {'aligned' if aligned else 'unaligned'} features", splits, SIZES, WIDTHS)
    table = source / "label.csv"
    if not table.is_file():
        pickles = sorted(path.name for path in source.glob("*.pkl"))
        hint = f"; the features of {', '.join(pickles)} are read if you name that file" if pickles else ""
        raise FileNotFoundError(f"{table}: no such file, wanted MMSA's table of labels and splits{hint}")
    frame = read_table(table, SCORES, notes)
    for root in (source, source / "Raw"):
        if (root / _VIDEOS).is_dir():
            if (root / _TRANSCRIPTS).is_dir():
                frame["text"] = _transcribe(frame, root / _TRANSCRIPTS, notes)
            splits = table_rows(frame, _Segments(root / _VIDEOS), notes, "en")
            return Reading("CMU's clips with MMSA's labels", splits, SIZES, media=root / _VIDEOS)
    if not (source / "Raw").is_dir():
        raise FileNotFoundError(f"{source}: got neither Raw nor {_VIDEOS}, wanted a folder with clips")
    splits = table_rows(frame, ClipFolders(source / "Raw"), notes, "en")
    return Reading("MMSA's clips", splits, SIZES, media=source / "Raw")


class _Segments:
    """Finds clips in `{root}/{video_id}_{clip_id}.mp4`."""

    def __init__(self, root: Path):
        self.root = root
        self.names = set(os.listdir(root))  # existing names only, so that an id cannot point outside the folder

    def __call__(self, video_id: str, clip_id: str) -> Path | None:
        name = f"{video_id}_{clip_id}.mp4"
        return self.root / name if name in self.names else None


def _transcribe(frame, folder: Path, notes: Notes) -> list[str]:
    """The text of every row: from the transcripts, or from the table if they do not have it."""
    files, segments, texts = set(os.listdir(folder)), {}, []
    for row in frame.itertuples():
        if row.video_id not in segments:
            name = f"{row.video_id}.txt"
            segments[row.video_id] = _read_segments(folder / name, notes) if name in files else {}
        row_id = f"{row.video_id}$_${row.clip_id}"
        text = segments[row.video_id].get(row.clip_id)
        if text is None:
            notes.add(row.split, "text: not in the transcripts, taken from label.csv", row_id)
        elif _letters(text) != _letters(row.text):
            notes.add(row.split, "text: the transcript differs from label.csv", row_id)
        texts.append(row.text if text is None else text)
    return texts


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, repair_text(text))).lower()


def _read_segments(file: Path, notes: Notes) -> dict[str, str]:
    """The texts of one transcript by clip id; lines of another form are noted."""
    content = file.read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = content.decode("cp1252", errors="replace").split("\n")
        notes.add("all", "transcript that is not UTF-8, read as cp1252", file.name)
    segments = {}
    for number, line in enumerate(lines, start=1):
        parts = line.strip("\r").split("___", 4)
        if len(parts) == 5:
            segments[parts[1].strip()] = parts[4]
        elif line.strip():
            notes.add("all", "transcript line that is not a segment", f"{file.name}:{number}")
    return segments
