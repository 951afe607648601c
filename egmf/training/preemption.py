"""SIGTERM: a training run writes a checkpoint before it exits."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import Any

from egmf.commands import run_command
from egmf.files import RunStopped


TERMINATED = 128 + signal.SIGTERM  # the status that a shell reports for a process ended by SIGTERM


class Termination:
    """Handler of SIGTERM, which schedulers send before they kill a job.

    During training, it records the signal, and [`RunTrainer`] writes a checkpoint and stops after the current step. At
    any other time it stops the command at once.

    Attributes:
        asked: Whether the signal has arrived.
        can_wait: Whether training runs, so that the signal is only recorded.
    """

    def __init__(self):
        self.asked = self.can_wait = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked:
            return
        self.asked = True
        if not self.can_wait:
            raise self.stop("this part of the run had nothing to save")
        logging.warning("SIGTERM: the run stops soon, after a step and its checkpoint")

    def stop(self, saved: str) -> RunStopped:
        return RunStopped(f"Stopped by SIGTERM: {saved}. Repeat the command to resume.", TERMINATED)


termination = Termination()  # one per process, as there is one handler of a signal


def run_training(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a training command like [`run_command`].

    SIGTERM ends it with status 143, a [`RunStopped`] with its message and no traceback.
    """
    signal.signal(signal.SIGTERM, termination)
    try:
        run_command(main, arguments)
    except RunStopped as stop:
        # A data loader's worker puts a traceback in front of the message.
        print(str(stop).rpartition(f"{RunStopped.__name__}: ")[2].strip(), file=sys.stderr)
        sys.exit(stop.status)
    except Exception:
        # Schedulers signal every process, so data loader workers may end before this process handles its own signal.
        if not termination.asked:
            raise
        print(termination.stop("nothing was saved since the last checkpoint"), file=sys.stderr)
        sys.exit(TERMINATED)
