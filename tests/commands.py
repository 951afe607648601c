"""Runs the repository's commands in processes forked off one that has loaded the libraries.

A bare interpreter that imports torch and transformers costs six seconds of a core, a fork a tenth of one.
"""

import importlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants

from egmf.commands import run_command
from egmf.training.preemption import run_training


REPO = Path(__file__).resolve().parents[1]
SECONDS = 300  # for one command; none of the tests needs that long

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train", "eval"])


@dataclass(frozen=True)
class Outcome:
    """The exit status of a command, and its standard output and error together."""

    status: int
    said: str


def start(script: str, *arguments, said: Path, hub: Path | None = None, before: Callable | None = None):
    """Starts `SCRIPT.py ARGUMENTS` as from the repository's root, in a session of its own.

    Args:
        script: "train", "eval" or "predict".
        said: The file for what the command writes to standard output and error.
        hub: `HF_HOME` of the command, for tests that must not share the cache of towers.
        before: Called in the process before the command, to harm it.
    """
    process = processes.Process(target=_child, args=(script, list(map(str, arguments)), said, hub, before))
    process.start()
    return process


def run(script: str, *arguments, check: bool = True, **options) -> Outcome:
    """Runs a command to its end; with `check`, its status must be 0."""
    with tempfile.NamedTemporaryFile() as file:
        said = Path(file.name)
        process = start(script, *arguments, said=said, **options)
        process.join(SECONDS)
        assert process.exitcode is not None, "the command hangs"
        outcome = Outcome(process.exitcode, said.read_text(encoding="utf-8"))
    assert not check or outcome.status == 0, outcome.said
    return outcome


def read_lines(file: Path) -> list[dict]:
    """The objects of a file of JSON lines, such as the log of a run and its predictions."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _child(script: str, arguments: list[str], said: Path, hub: Path | None, before: Callable | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the default of a command
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(REPO)
    if hub is not None:
        constants.HF_HOME = str(hub)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if before is not None:
        before()
    main = importlib.import_module(script).main
    (run_training if script == "train" else run_command)(main, arguments)
