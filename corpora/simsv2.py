"""CH-SIMS v2.0 (Liu et al. 2022) and CH-SIMS (Yu et al. 2020): Chinese films, series and shows, scored from -1 to 1.

Two published forms are read; `corpora/mmsa.py` describes them:

- A *file* is the pickle of features (`ch-simsv2s.pkl`: audio 25 features, eGeMAPS; vision 177; SIMS v1: 33 and 709).
- A *folder* contains the clips: `meta.csv` (also published as `meta(s).csv`, and as `label.csv` with v1) and
  `Raw/{video_id}/{clip_id}.mp4`.

Only labelled rows are read. The target is the label for all modalities together.

According to the authors of SIMS-V2, train should have 2721 rows. The published file has 2722, as do all published
results.
"""

import logging
import os
from pathlib import Path

from datasets import DatasetDict

from corpora.mmsa import ClipFolders, read_features, read_table, table_rows
from corpora.reading import Notes, Reading, part_of_id


logger = logging.getLogger(__name__)

SCORES = (-1.0, 1.0)
SIZES = {
    1: {"train": 1368, "validation": 456, "test": 457},
    2: {"train": 2722, "validation": 647, "test": 1034},
}
WIDTHS = {
    1: {"audio_features": 33, "vision_features": 709},
    2: {"audio_features": 25, "vision_features": 177},
}
TABLES = ("meta.csv", "meta(s).csv", "label.csv")


CLUSTERS = ("videos", part_of_id(r"(.+)(?:\$_\$|/)[^$/]+"))


def load(source: str | os.PathLike, version: int = 2) -> DatasetDict:
    """Load SIMS as regression; `sentiment` ranges from -1 to 1.

    Args:
        source: The pickle, or the folder with the table and the clips.
        version: 1 or 2. Both have the same form; the version selects the published sizes that `python -m corpora`
            checks.

    Raises:
        FileNotFoundError: If the file, the table or the folder of clips does not exist.
        ValueError: If a file is not as described above (the message names the file and the position), a score is out
            of range, or the version is unknown.
    """
    notes = Notes()
    return read(source, notes, version).load(notes, logger)


def read(source: str | os.PathLike, notes: Notes, version: int = 2) -> Reading:
    """Like `load`, but returns a `Reading` whose rows have not been read yet."""
    if version not in SIZES:
        raise ValueError(f"version: got {version!r}, wanted one of {', '.join(map(str, SIZES))}")
    source, sizes = Path(source), SIZES[version]
    if not source.is_dir():
        splits, _ = read_features(source, notes, "zh", SCORES)
        return Reading(f"SIMS v{version}, features", splits, sizes, WIDTHS[version])
    table = next((source / name for name in TABLES if (source / name).is_file()), None)
    if table is None:
        pickles = sorted(path.name for path in source.glob("*.pkl"))
        hint = f"; the features of {', '.join(pickles)} are read if you name that file" if pickles else ""
        raise FileNotFoundError(f"{source}: got none of {', '.join(TABLES)}, wanted the table of labels{hint}")
    if not (source / "Raw").is_dir():
        raise FileNotFoundError(f"{source / 'Raw'}: no such folder, wanted the clips")
    frame = read_table(table, SCORES, notes)
    splits = table_rows(frame, ClipFolders(source / "Raw"), notes, "zh")
    return Reading(f"SIMS v{version}, clips", splits, sizes, media=source / "Raw")
