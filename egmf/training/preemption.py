"""SIGTERM: a run that a scheduler stops writes a checkpoint first."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import Any

from egmf.files import RunStopped


TERMINATED = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM ended


class Termination:
    """SIGTERM, which schedulers send some time before they kill.

    Where a checkpoint can be written, during training, it is noted, and [`RunTrainer`] stops at the end of the step.
    Anywhere else it stops the command at once.

    Attributes:
        asked: Whether it has come.
        can_wait: Whether it is noted only.
    """

    def __init__(self):
        self.asked = self.can_wait = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked:
            return
        self.asked = True
        if not self.can_wait:
            raise self.stop("nothing of this part of the run had to be saved")
        logging.warning("SIGTERM: the run stops as soon as this step and its checkpoint are finished")

    def stop(self, saved: str) -> RunStopped:
        return RunStopped(f"Stopped by SIGTERM: {saved}. The same command goes on from there.", TERMINATED)


termination = Termination()


def run_command(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a command that trains: ends by SIGTERM with status 143, and with a message alone where one says it all."""
    signal.signal(signal.SIGTERM, termination)
    try:
        main(arguments)
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except Exception:
        # Schedulers signal every process: those that read for this one may be gone before it knows of it itself.
        if not termination.asked:
            raise
        print(termination.stop("nothing was saved since the last checkpoint"), file=sys.stderr)
        sys.exit(TERMINATED)
