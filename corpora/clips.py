"""Names of parts of files, and files for the clips inside a data set.

A part of a recording is named as a media fragment (W3C): `talk.wav#t=1.5,4`, in seconds.
"""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import constants


_FRAGMENT = re.compile(r"(.+)#t=(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?", re.DOTALL)


def name_part(path: str, start: float | None, end: float | None) -> str:
    """The name of the part of a file from `start` to `end` in seconds; None for the file's own start or end."""
    return f"{path}#t={_short(start)}" + (f",{_short(end)}" if end is not None else "")


def _short(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}".rstrip("0").rstrip(".")


def split_part(name: str) -> tuple[str, float, float | None]:
    """The file, the start and the end (None: of the file) of a part's name; a whole file starts at 0."""
    found = _FRAGMENT.fullmatch(name)
    if found is None or os.path.exists(name):
        return name, 0.0, None
    path, start, end = found.groups()
    return path, float(start or 0.0), None if end is None else float(end)


def store_clip(content: bytes, suffix: str) -> str:
    """The path of a file with this content, below `HF_HOME`; it is written once."""
    path = Path(constants.HF_HOME) / "egmf" / "clips" / (hashlib.sha256(content).hexdigest() + suffix)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    return str(path)
