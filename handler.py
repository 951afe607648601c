"""Answers the requests of a Hugging Face Inference Endpoint with the model in its repository.

    {"inputs": INPUT or [INPUT, ...], "parameters": {"task": ..., "top_k": ..., ...}}

`publish.py` uploads this file beside the merged model. `docs/publishing.md` shows a client.
"""

import base64
import contextlib
import ipaddress
import logging
import math
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub.utils import httpx
from transformers import pipeline


MEDIA = ("file", "audio", "video")
FIELDS = (*MEDIA, "text", "speaker", "context", "speaker_clips")
# The pipeline's other parameters choose models to load and processes to start, which a caller must not.
PARAMETERS = ("task", "top_k", "candidate_labels", "text", "speaker", "context", "speaker_clips", "on_error")
PARAMETERS += ("return_timestamps", "segments", "window", "hop")
FILE = "a file as base64 or as a URL"
LARGEST_DOWNLOAD = 256 << 20  # bytes
LARGEST_REQUEST = 1 << 30  # bytes of all files of a request
DOWNLOAD_SECONDS = 60.0
TOO_MUCH = f"it exceeds {LARGEST_DOWNLOAD >> 20} MB in {DOWNLOAD_SECONDS:.0f} seconds"
MOST_LABELS, LONGEST_LABELS = 50, 1000  # memory grows with the cube of their number
MOST = {"inputs": 100, "segments": 5000, "speaker_clips": 100, "context": 1000}  # entries of a list
SHORTEST_WINDOW = 0.5  # seconds
REDIRECTS = 5


class EndpointHandler:
    """Answers requests with the pipeline in `pipeline_egmf.py`.

    Args:
        path: Folder of the model.
    """

    def __init__(self, path: str = ""):
        self.recognize = pipeline("affect-recognition", model=path, trust_remote_code=True)
        self.processor = self.recognize.processor

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Answers one input, or each input of a list.

        Args:
            data: `inputs` and optionally `parameters`, those of the pipeline that are in `PARAMETERS`. An input is a
                file with sound, pictures or both, or a mapping with some of the pipeline's `FIELDS`. A file is its
                bytes, also in base64, or its URL. No string is a path of this machine.

        Returns:
            The pipeline's answer to each input.

        Raises:
            ValueError: If a field is invalid or a file cannot be read. The server sends the message to the caller.
            RuntimeError: If anything else fails. The message gives no details; the log does.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="egmf-") as folder:
                samples, parameters = self._read(data, Path(folder))
                return self.recognize(samples, **parameters)
        except (ValueError, self.processor.media_error) as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            logging.getLogger(__name__).exception("A request failed.")
            said = f"the endpoint failed on this request ({type(error).__name__}); its log says why"
            raise RuntimeError(said) from None

    def _read(self, data: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
        """The samples and parameters of a request, with its files in a folder."""
        _check("request", data, ("inputs", "parameters"))
        if "inputs" not in data:
            raise ValueError(f"inputs: got none, wanted {FILE}, or an object with some of {', '.join(FIELDS)}")
        inputs, parameters = data["inputs"], dict(_check("parameters", data.get("parameters") or {}, PARAMETERS))
        if isinstance(labels := parameters.get("candidate_labels"), list):
            if len(labels) > MOST_LABELS or len("".join(map(str, labels))) > LONGEST_LABELS:
                wanted = f"at most {MOST_LABELS} labels, {LONGEST_LABELS} characters in total"
                raise ValueError(f"candidate_labels: got {len(labels)} labels, wanted {wanted}")
        for name in ("window", "hop"):
            seconds = parameters.get(name)
            if isinstance(seconds, int | float) and seconds < SHORTEST_WINDOW:
                raise ValueError(f"{name}: got {seconds:g} seconds, wanted at least {SHORTEST_WINDOW}")
        if (clips := parameters.get("speaker_clips")) is not None:
            parameters["speaker_clips"] = self._clips("parameters.speaker_clips", clips, folder)
        if not isinstance(inputs, list):
            return self._sample("inputs", inputs, folder), parameters
        samples = [self._sample(f"inputs[{place}]", one, folder) for place, one in enumerate(inputs)]
        return samples, parameters

    def _sample(self, name: str, value: Any, folder: Path, fields: tuple[str, ...] = FIELDS) -> dict[str, Any]:
        if hasattr(value, "convert"):  # the server makes a picture of PIL from a request of the type image/*
            return {"video": value}
        if not isinstance(value, dict):
            return {"file": self._file(name, value, folder)}
        sample = dict(_check(name, value, fields))
        for field in sample.keys() & {*MEDIA}:
            if sample[field] is not None:
                sample[field] = self._file(f"{name}.{field}", sample[field], folder)
        if sample.get("speaker_clips") is not None:
            sample["speaker_clips"] = self._clips(f"{name}.speaker_clips", sample["speaker_clips"], folder)
        return sample

    def _clips(self, name: str, value: Any, folder: Path) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise ValueError(f"{name}: got {type(value).__name__}, wanted a list of files")
        return [self._sample(f"{name}[{place}]", clip, folder, MEDIA) for place, clip in enumerate(value)]

    def _file(self, name: str, value: Any, folder: Path) -> os.PathLike:
        """Writes a file of a request to the folder."""
        if not isinstance(value, str | bytes):
            raise ValueError(f"{name}: got {type(value).__name__}, wanted {FILE}")
        file = _File(folder / uuid4().hex, name, self.processor.media_error)
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            file.url = value
        else:
            file.path.write_bytes(value if isinstance(value, bytes) else _decoded(name, value))
        return file


def _check(name: str, value: Any, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Raises a ValueError unless a value is a JSON object with no keys but `wanted` and no list beyond `MOST`."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {type(value).__name__}, wanted an object with some of {', '.join(wanted)}")
    if unknown := [key for key in value if key not in wanted]:
        raise ValueError(f"{name}: got {', '.join(map(str, unknown))}, wanted some of {', '.join(wanted)}")
    for field, entries in value.items():
        if isinstance(entries, list) and len(entries) > MOST.get(field, math.inf):
            raise ValueError(f"{name}.{field}: got {len(entries)} entries, wanted at most {MOST[field]}")
    return value


def _decoded(name: str, value: str) -> bytes:
    """The bytes of a file from base64, which may have line breaks or be a data URL."""
    encoded = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        shown = repr(value if len(value) <= 40 else f"{value[:40]}...")
        raise ValueError(f"{name}: got {shown}, wanted {FILE}; words go into `text`") from None


class _File(os.PathLike):
    """A file of a request. Messages call it by its field.

    If it has a `url`, it is fetched when it is read, so that `on_error` covers that as well.
    """

    url = ""

    def __init__(self, path: Path, name: str, error: type[Exception]):
        self.path, self.name, self.error = path, name, error

    def __str__(self) -> str:
        return self.name

    def __fspath__(self) -> str:
        if self.url and not self.path.exists():
            try:
                self._fetch()
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                self.path.unlink(missing_ok=True)
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise self.error(self, "not readable", f"its URL cannot be fetched: {reason}") from None
        return str(self.path)

    def _fetch(self) -> None:
        """Downloads the URL in a thread: a server that sends a byte now and then would never run into a timeout."""
        client, failed = httpx.Client(transport=_PublicTransport(), timeout=DOWNLOAD_SECONDS), []

        def fetch() -> None:
            try:
                self._follow(client)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
        is_late = thread.is_alive()
        with contextlib.suppress(RuntimeError):  # a request is in flight; without its connection, the thread ends
            client.close()
        if is_late:
            raise OSError(TOO_MUCH)
        if failed:
            raise failed[0]

    def _follow(self, client: httpx.Client) -> None:
        url = self.url
        for _ in range(REDIRECTS + 1):
            # httpx would read the whole body of a redirect into memory.
            with client.stream("GET", url, follow_redirects=False) as response:
                if response.has_redirect_location:
                    if response.next_request is None:
                        raise OSError("it redirects to no valid address")
                    url = response.next_request.url
                    continue
                if not response.is_success:
                    raise OSError(f"the server answers with status {response.status_code}")
                self._write(response.iter_bytes())
                return
        raise OSError(f"it redirects more than {REDIRECTS} times")

    def _write(self, parts: Iterator[bytes]) -> None:
        """Writes the file, part by part as they arrive."""
        left = LARGEST_REQUEST - sum(other.stat().st_size for other in self.path.parent.iterdir())
        with self.path.open("wb") as file:
            for part in parts:
                file.write(part)
                if file.tell() > LARGEST_DOWNLOAD:
                    raise OSError(TOO_MUCH)
                if file.tell() > left:
                    raise OSError(f"the files of the request exceed {LARGEST_REQUEST >> 20} MB")


class _PublicTransport(httpx.HTTPTransport):
    """Connects to public addresses only, also after redirects, so that no caller reaches the endpoint's own network.

    `EGMF_PRIVATE_HOSTS` names hosts that are fetched from in spite of their private addresses, separated by commas.
    """

    def handle_request(self, request: Any) -> Any:
        host = request.url.host
        found = [place[4][0] for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        if host not in os.environ.get("EGMF_PRIVATE_HOSTS", "").split(",") and not all(map(_is_public, found)):
            raise OSError(f"{host} has no public address")
        # It connects to the address that was checked: a second look-up might find another one.
        address = request.url.copy_with(host=min(found, key=lambda one: ":" in one))
        options = {"headers": request.headers, "extensions": {**request.extensions, "sni_hostname": host}}
        return super().handle_request(httpx.Request(request.method, address, **options))


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_global and not parsed.is_multicast
