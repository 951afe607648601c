"""What the processes of one run, started by `accelerate launch` or `torchrun`, have to agree on.

The work itself is divided by Trainer, `TowerCache.fill` and `Predictor`; a run of one process takes the same path.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from transformers.utils import logging as transformers_logging


@contextmanager
def in_turns() -> Iterator[None]:
    """The main process goes first, then one of each other machine, then all others: what the first make, they find."""
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def available_cores() -> int:
    """Cores that this process may run on: a scheduler or a container may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def are_sharded() -> bool:
    """Whether processes are to hold parts of the model's weights, or of what its optimizer keeps (FSDP, DeepSpeed)."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def silence_other_ranks() -> None:
    """No log lines and progress bars of the other processes, errors excepted."""
    if not PartialState().is_main_process:
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
