"""Writing files completely or not at all, digests, and the error that stops a run with a message."""

import errno
import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# Texts of torch's RuntimeErrors and tokenizers' Exceptions for a file that cannot be written.
OF_WRITERS = ("PytorchStreamWriter", "inline_container", "unexpected pos", "(os error ")
SETTINGS = "settings.json"  # of a run, in its folder
CHECKPOINTS = "checkpoint-*"
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota used up", errno.EFBIG: "file larger than is allowed"}


class RunStopped(RuntimeError):
    """Stops a run for a reason that its user can change.

    Args:
        message: What happened, where, and how to continue.
        status: Exit status of the command.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def has_begun(run: Path) -> bool:
    """Whether a run has a checkpoint of any phase."""
    return any(run.glob(CHECKPOINTS)) or any(run.glob(f"*/{CHECKPOINTS}"))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: an interrupted call leaves the old file."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync_folder(path.parent)


def read_json_lines(path: Path) -> list[str]:
    """The lines of a file of JSON lines. Only line feeds end them: a text may contain others, such as U+2028."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines if lines[-1] else lines[:-1]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, wanted: int | None = None, remedy: str = "make room, and start the same command again"):
    """Converts errors of libraries that cannot write a file into a message with the path and the missing space.

    Args:
        path: File or folder that is written.
        wanted: Approximate number of bytes, if known.
        remedy: What the user can do.

    Raises:
        RunStopped: With the message.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError | SafetensorError) or any(words in str(error) for words in OF_WRITERS)
        if isinstance(error, RunStopped) or not known:
            raise
        place = next(parent for parent in [path, *path.absolute().parents] if parent.is_dir())
        why = FULL.get(getattr(error, "errno", None) or 0) or str(error).splitlines()[0]
        free = shutil.disk_usage(place).free
        takes = f", and {wanted / 1e6:.1f} MB are needed" if wanted else ""
        raise RunStopped(
            f"{path}: could not be written: {why}. {free / 1e6:.1f} MB are free in {place}{takes}: {remedy}."
        ) from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights; reports name the weights that they measured by it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
