"""Where the published corpora are, and small corpora without features; `formats.py` writes those with features."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from datasets import DatasetDict

from corpora import meld
from corpora.schema import build_split


SHARED = Path(os.environ.get("EGMF_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MELD_FILE_OF = {"train": "train_sent_emo.csv", "validation": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_ROWS = [  # out of order, with a gap in the numbers, and punctuation in three forms
    "3,None,Joey,joy,positive,0,3,1,1,0:06:06,00:16:16",
    "1,It\x92s \x93me\x94\x85 caf\u00e9,Joey\x92s Date,neutral,neutral,0,0,1,1,x,x",
    '2,"That\u2019s right, ""Joey""",Chandler,surprise,positive,0,1,1,1,x,x',
    "4,Hi,Joey,anger,negative,7,0,1,1,x,x",
]


def published(name: str) -> Path:
    """The folder of a published corpus; without it, the test skips."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the published files of {name} are not in {folder} (EGMF_SHARED names another place)")
    return folder


def write_meld(folder: Path, rows: list[str] = MELD_ROWS, header: str = MELD_HEADER) -> Path:
    """MELD with these lines in each split; returns the folder."""
    for name in MELD_FILE_OF.values():
        (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


def write_meld_clips(folder: Path, clip: Path) -> None:
    """MELD with one dialogue of four utterances in each split, each of them this clip."""
    for split, name in meld.FILES.items():
        (folder / "clips" / meld.CLIPS[split]).mkdir(parents=True)
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"])
            for number, emotion in enumerate(meld.EMOTIONS[:4]):
                writer.writerow([f"sentence {number}", "Ann", emotion, 0, number])
                shutil.copy(clip, folder / "clips" / meld.CLIPS[split] / f"dia0_utt{number}.mp4")


def write_ravdess(folder: Path, actors=range(1, 25), suffix: str = "wav") -> None:
    """RAVDESS as empty files: of each actor eight spoken emotions and a song."""
    for actor in actors:
        place = folder / f"Actor_{actor:02}"
        place.mkdir(parents=True)
        for emotion in range(1, 9):
            (place / f"03-01-{emotion:02}-01-02-01-{actor:02}.{suffix}").touch()
        (place / f"03-02-01-01-01-01-{actor:02}.{suffix}").touch()  # song


def rows_with(column: str, labels: list) -> DatasetDict:
    """A corpus whose test split has these labels; its other splits have only the first one."""
    rows = [
        {"id": f"film$_${number}", "text": f"sentence {number}" * (1 + number % 3), "language": "zh", column: label}
        for number, label in enumerate(labels)
    ]
    return DatasetDict(
        {"train": build_split(rows[:1]), "validation": build_split(rows[:1]), "test": build_split(rows)}
    )
