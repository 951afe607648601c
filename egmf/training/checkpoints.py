"""Checkpoints that are known to be whole: what a run goes on from after a kill, a full disk or a damaged file.

Trainer writes a checkpoint file by file, and nothing in it says whether that came to its end, or what a file was
when it was written. Here a list of the files, with sizes and digests, is written last, once all of them are on the
disk; only then may an older checkpoint go. A run goes on from the newest checkpoint whose list is there and true.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from egmf.files import _sync_folder, write_whole


MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Brings a checkpoint's files to the disk and then writes the list of them, which makes it whole."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_whole(folder / MANIFEST, json.dumps(files, indent=2) + "\n")
    _sync_folder(folder.parent)


def size_of(folder: Path) -> int | None:
    """Bytes of a checkpoint that has its list of files; None for one without."""
    try:
        return sum(entry["bytes"] for entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).values())
    except (OSError, ValueError):
        return None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was written to its end; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, wanted {entry['bytes']}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def last_whole_checkpoint(folder: Path, with_best: bool = False) -> str | None:
    """The newest checkpoint that was written to its end and is still what was written; None if there is none.

    A later one that was not written to its end is removed: nobody can go on from it, and its place is needed. One that
    was damaged since is kept under another name. Either is said.

    Args:
        folder: Where the checkpoints are.
        with_best: The best checkpoint that it names has to be whole too: what the run made would be another model.
    """
    numbered = ((steps_of(path), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*[0-9]"))
    for _, path in sorted(numbered, reverse=True):
        if not (path / MANIFEST).exists():
            logging.warning("%s was not written to its end, and is removed", path)
            shutil.rmtree(path)
            continue
        damage = damage_of(path)
        if damage is None and with_best:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            best = path.with_name(Path(state["best_model_checkpoint"] or path).name)
            damage = damage_of(best)
            damage = damage and f"its best one, {best.name}, is: {damage}"
        if damage is not None:
            aside = path.with_name(f"damaged-{path.name}")
            while aside.exists():
                aside = aside.with_name(aside.name + "x")
            path.rename(aside)
            logging.warning("%s is damaged (%s), and is now called %s", path, damage, aside.name)
            continue
        return str(path)
    return None


def steps_of(checkpoint: str | Path | None) -> int:
    """How many steps led to a checkpoint."""
    return int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0
