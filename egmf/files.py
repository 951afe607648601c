"""Files that are written whole or not at all, and the error that says why a run had to stop."""

import errno
import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# What torch's RuntimeErrors and tokenizers' plain Exceptions say, where a file cannot be written.
OF_WRITERS = ("PytorchStreamWriter", "inline_container", "unexpected pos", "(os error ")
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota used up", errno.EFBIG: "file larger than is allowed"}


class RunStopped(RuntimeError):
    """A run that cannot go on, or was told not to, for a reason that its user can change. The message says which.

    Args:
        message: What happened, where, and what makes the run go on.
        status: What the command exits with.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there as a whole or, if that is interrupted, as it was before."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, wanted: int | None = None, remedy: str = "make room, and start the same command again"):
    """Turns what libraries raise when a file cannot be written into a message that says where and what is missing.

    Args:
        path: The file or folder that is written.
        wanted: About how many bytes it takes, if that is known.
        remedy: What the run's user can do.

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
    """SHA-256 of a model folder's weights, by which a report of figures says what it measured."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
