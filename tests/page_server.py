"""Runs app.py on a small model in a process of its own, for the tests of the page."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import commands
import httpx2


START_SECONDS = 120  # that a busy machine may need


@dataclass(frozen=True)
class Page:
    """A running page: its address, the process, the file with all that it said, and its folder for temporary files."""

    url: str
    pid: int
    said: Path
    temporary: Path

    def uploads(self) -> list[Path]:
        """The files of users that are on the server."""
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]


def _use_folder(folder: Path) -> None:
    tempfile.tempdir = str(folder)
    os.environ["TMPDIR"] = str(folder)


@contextmanager
def running_page(folder: Path, model: Path, *arguments) -> Iterator[Page]:
    """Runs the page of a model; `folder` gets what it says and its temporary files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, temporary = folder / "said.txt", folder / "temporary"
    temporary.mkdir()
    before = partial(_use_folder, temporary)
    process = commands.start("app", model, "--port", port, *arguments, said=said, before=before)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(10 * START_SECONDS):
            assert process.is_alive(), said.read_text(encoding="utf-8")
            try:
                httpx2.get(url)
                break
            except httpx2.TransportError:
                time.sleep(0.1)
        yield Page(url, process.pid, said, temporary)
    finally:
        process.terminate()
        process.join(30)
        process.kill()
