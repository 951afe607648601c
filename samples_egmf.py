"""The forms in which users give a sample: files, URLs, bytes, arrays, and rows of `datasets`."""

import base64
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx

from .media_readers_egmf import MediaError


FIELDS = {"file", "audio", "video", "text", "speaker", "context", "speaker_clips"}
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
ARRAY_FIELDS = {"array", "raw", "sampling_rate", "path"}  # as in speech recognition and in `datasets`


class NamedFile(os.PathLike):
    """A file in `path` that messages call `name`."""

    def __init__(self, path: str, name: str):
        self.path, self.name = path, name

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.name


def is_file(value: Any) -> bool:
    """Whether a value names or contains a file: a path, a URL or bytes."""
    return isinstance(value, str | os.PathLike | bytes)


def is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def as_media(value: Any) -> Any:
    """Reduces the forms of one medium to a path, a URL, bytes or `{"array", "sampling_rate"}`.

    These are a data URL, speech recognition's `{"raw", "sampling_rate"}`, an undecoded column of `datasets`
    (`{"bytes", "path"}`) and torchcodec's decoder of sound, which `datasets` returns as well. Other values are
    returned unchanged.

    Raises:
        MediaError: If a data URL is not base64.
    """
    if isinstance(value, str) and re.match(r"data:[^,]*;base64,", value):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError:
            raise MediaError(value, "not readable", "it is no base64 of a file") from None
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Mapping):
        if "sampling_rate" in value and (array := value.get("array", value.get("raw"))) is not None:
            return {"array": array, "sampling_rate": value["sampling_rate"]}
        if value and value.keys() <= {"bytes", "path"}:
            return value.get("path") if value.get("bytes") is None else value["bytes"]
    if hasattr(value, "get_all_samples"):
        sound = value.get_all_samples()
        return {"array": sound.data.numpy(), "sampling_rate": sound.sample_rate}
    return value


def with_rate(value: Any, sampling_rate: int | None) -> Any:
    """A plain array of sound as `{"array", "sampling_rate"}`; other values are returned unchanged."""
    return {"array": value, "sampling_rate": sampling_rate} if isinstance(value, np.ndarray | torch.Tensor) else value


@contextmanager
def on_disk(value: Any) -> Iterator[Any]:
    """Yields a file for bytes or a URL, in a temporary folder, and any other value as [`as_media`] returns it.

    Raises:
        MediaError: If a URL cannot be downloaded.
    """
    value = as_media(value)
    if not isinstance(value, bytes) and not is_url(value):
        yield value
        return
    with tempfile.TemporaryDirectory(prefix="egmf-") as folder:
        path = os.path.join(folder, "media")
        with open(path, "wb") as file:
            if isinstance(value, bytes):
                file.write(value)
            else:
                _download(value, file)
        yield NamedFile(path, value if isinstance(value, str) else f"{len(value)} bytes")


def _download(url: str, file) -> None:
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as response:
            if not response.is_success:
                raise MediaError(url, "not readable", f"the server answers with status {response.status_code}")
            for part in response.iter_bytes(1 << 20):
                file.write(part)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise MediaError(url, "not readable", str(error) or type(error).__name__) from None


def as_sample(value: Any, sampling_rate: int | None, is_row: bool = False) -> dict[str, Any]:
    """Converts a sample in any form to a dict with some of `FIELDS`, none of them None.

    Args:
        value: A file (path, URL or bytes), an array of sound at `sampling_rate`, `{"array" or "raw",
            "sampling_rate"}`, a picture of PIL, an undecoded or decoded column of `datasets`, or a mapping with some
            of `FIELDS`; `image` is another name of `video`, in rows only without another clip.
        sampling_rate: The model's sampling rate in Hz.
        is_row: Whether the value is a row of a data set, which may have other columns.

    Raises:
        ValueError: If a mapping has none of the fields; or, unless it is a row, others, or `file` beside another clip.
    """
    if is_file(value):
        return {"file": value}
    if isinstance(value, np.ndarray | torch.Tensor):
        return {"audio": with_rate(value, sampling_rate)}
    if hasattr(value, "convert"):
        return {"video": value}
    if not isinstance(value, Mapping):
        if (medium := as_media(value)) is value:
            wanted = f"a file, bytes, an array or a mapping with some of {sorted(FIELDS)}"
            raise ValueError(f"affect-recognition: a sample got {type(value).__name__}, wanted {wanted}")
        return {"file" if isinstance(medium, bytes) else "audio": medium}
    if value.keys() and value.keys() <= {"bytes", "path"}:
        return {"file": as_media(value)}
    if "image" in value and not (is_row and value.keys() & {"file", "audio", "video"}):
        picture = value["image"] if value.get("video") is None else value["video"]
        value = {name: part for name, part in value.items() if name != "image"} | {"video": picture}
    known, unknown = value.keys() & FIELDS, value.keys() - FIELDS
    sample = {name: value[name] for name in known if value[name] is not None}
    if "audio" in sample:
        sample["audio"] = with_rate(sample["audio"], sampling_rate)
    if "sampling_rate" in unknown and unknown & {"array", "raw"}:
        sample["audio"] = as_media(value)
        unknown -= ARRAY_FIELDS
    if unknown and not (is_row and (known or sample)):
        wanted = f"some of {sorted(FIELDS)}"
        what = "a row got the columns" if is_row else "a sample got"
        raise ValueError(f"affect-recognition: {what} {sorted(unknown)}, wanted {wanted}")
    decoded = [name for name in ("audio", "video") if name in sample]
    if "file" in sample and decoded:
        if not is_row:
            raise ValueError(f"affect-recognition: a sample got file and {decoded[0]}, wanted one of them")
        del sample["file"]  # a path on the machine that made the data set
    return sample
