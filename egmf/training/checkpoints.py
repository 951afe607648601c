"""Valid checkpoints: a run resumes from them after a kill, a full disk or a damaged file.

Trainer writes a checkpoint file by file, without a mark that it is complete. A checkpoint is valid only once its
manifest (file names, sizes and SHA-256 digests) has been written, after all files are on the disk. Only then may an
older checkpoint be deleted. A run resumes from the newest checkpoint whose files match its manifest.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from egmf.files import SETTINGS, RunStopped, _sync_folder, has_begun, write_whole


MANIFEST = "manifest.json"


def keep_settings(run: Path, settings: dict[str, Any]) -> None:
    """Writes down the settings of a new run; of one that has begun to train, checks that they are still the same.

    Args:
        run: The run's folder.
        settings: All that the trained weights depend on, as JSON-compatible values.

    Raises:
        ValueError: If a setting differs: finished phases would keep the weights that they learned with the old one.
    """
    file, settings = run / SETTINGS, json.loads(json.dumps(settings))
    if not has_begun(run) or not file.exists():
        write_whole(file, json.dumps(settings, indent=2) + "\n")
        return
    before = {"architecture": 2} | json.loads(file.read_text(encoding="utf-8"))  # settings did not have it before 3
    for name, value in settings.items():
        if name in before and before[name] != value:
            wanted = f"{json.dumps(before[name])}, with which the run in {run} began, or another output_dir"
            raise ValueError(f"{name}: got {json.dumps(value)}, wanted {wanted}")


def check_media(record: Path, errors: dict[tuple[str, str], str]) -> None:
    """Checks that a resumed run can read the files of all rows that it could read when it began.

    Args:
        record: JSON file in the run's folder with the rows whose files were unreadable when the run began. It is
            written anew until the run has a checkpoint.
        errors: Why files are unreadable now, by modality and id of the row: the files may have been moved.

    Raises:
        RunStopped: If a file was readable then and is not now: its rows would silently lose a modality.
    """
    if not record.exists() or not has_begun(record.parent):
        write_whole(record, json.dumps([[*key, why] for key, why in errors.items()], indent=2) + "\n")
        return
    known = {(modality, row_id) for modality, row_id, _ in json.loads(record.read_text(encoding="utf-8"))}
    gone = [why for key, why in errors.items() if key not in known]
    if gone:
        shown = " ".join([*dict.fromkeys(gone)][:10])
        raise RunStopped(
            f"{len(gone)} rows could be read when this run began and cannot now: {shown} "
            "Put the files back and repeat the command, or begin another run in another output_dir "
            f"({record} lists the rows that could never be read)."
        )


def seal(folder: Path) -> None:
    """Flushes a checkpoint's files to the disk, then writes the manifest, which makes the checkpoint valid."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_whole(folder / MANIFEST, json.dumps(files, indent=2) + "\n")
    _sync_folder(folder.parent)


def size_of(folder: Path) -> int | None:
    """Size of a checkpoint in bytes, by its manifest; None without one."""
    try:
        return sum(entry["bytes"] for entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).values())
    except (OSError, ValueError):
        return None


def damage_of(folder: Path) -> str | None:
    """How a checkpoint's files differ from its manifest; None if they match."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, wanted {entry['bytes']}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def last_whole_checkpoint(folder: Path, with_best: bool = False) -> str | None:
    """The newest valid checkpoint; None if there is none.

    An incomplete checkpoint is removed, a damaged one is renamed to `damaged-...`. Both are logged.

    Args:
        folder: Folder of the checkpoints.
        with_best: Whether the best checkpoint that it names must be valid too, because the run ends with its weights.
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
            logging.warning("%s is damaged (%s) and was renamed to %s", path, damage, aside.name)
            continue
        return str(path)
    return None


def steps_of(checkpoint: str | Path | None) -> int:
    """Number of steps of a checkpoint, 0 for None."""
    return int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0
