"""The files that a command's arguments name: files, folders, patterns and URLs."""

import glob
import mimetypes
import os

from egmf.samples_egmf import is_url


# Suffixes that not every system's list of types has.
KNOWN = {".aac", ".aiff", ".asf", ".avi", ".caf", ".f4v", ".flac", ".m2ts", ".m4a", ".m4b", ".mka", ".mkv", ".mov"}
KNOWN |= {".mp3", ".mp4", ".mts", ".oga", ".ogg", ".ogv", ".opus", ".ts", ".vob", ".wav", ".webm", ".wma", ".wmv"}


def is_media(name: str) -> bool:
    """Whether a file is sound or video by its name."""
    kind = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
    return kind in ("audio", "video") or os.path.splitext(name)[1].lower() in KNOWN


def find_files(inputs: list[str], recursive: bool) -> list[str]:
    """The files that `inputs` name, in their order, each once.

    A folder stands for the sound and video files in it, with `recursive` also in the folders below. A pattern such as
    `talks/*.mp4` stands for what it matches. A name of no file stays in the list, and its answer has the error.

    Raises:
        ValueError: If a folder or a pattern has no file.
    """
    files: dict[str, None] = {}
    for name in inputs:
        found = [name]
        if os.path.isdir(name):
            found = _in_folder(name, recursive)
            if not found:
                wanted = "some, or pictures by a pattern such as *.png"
                wanted += "" if recursive else "; --recursive looks in the folders below"
                raise ValueError(f"{name}: got a folder without sound and video files, wanted {wanted}")
        elif not is_url(name) and not os.path.exists(name) and glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
            if not found:
                raise ValueError(f"{name}: got a pattern that matches no file, wanted some")
        files |= dict.fromkeys(found)
    return list(files)


def _in_folder(folder: str, recursive: bool) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        found += [os.path.join(place, name) for name in sorted(names) if is_media(name) and not name.startswith(".")]
    return found
