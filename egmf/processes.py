"""Coordination of the processes that `accelerate launch` or `torchrun` starts for one run.

Trainer, `TowerCache.fill` and `Predictor` divide the work; a single process takes the same path.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging as transformers_logging


LONGEST_WAIT = timedelta(days=1)  # of a process for the others, which may have longer recordings


@contextmanager
def in_turns() -> Iterator[None]:
    """Runs a block on the main process first, then on one process of each machine, then on all others.

    The first ones create files (caches, copies of code) that the others then find.
    """
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def available_cores() -> int:
    """Number of cores that this process may use; a scheduler or container may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 about as fast as in float32, or faster.

    oneDNN does so from AVX-512 on. Without it, as on many laptops, torch's own products are many times slower.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def are_sharded() -> bool:
    """Whether the weights or the optimizer states are divided among the processes (FSDP, DeepSpeed)."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def default_workers() -> int:
    """Number of processes that decode for this one by default: an equal share of the cores on this machine."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def held_whole(module: nn.Module) -> Iterator[None]:
    """Gathers a module's weights that DeepSpeed's ZeRO-3 or FSDP2 has divided. No effect on other models.

    The weights stay whole in the block even if they are tied to another module, which would release them after use.
    """
    if isinstance(module, FSDPModule):  # a head with weights of its own; FSDP2 gathers tied ones with the model
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
        return
    parameters = list(module.parameters())
    with gather_params_ctx(parameters, modifier_rank=None):
        in_use = [parameter.ds_active_sub_modules for parameter in parameters if hasattr(parameter, "ds_id")]
        for modules in in_use:
            modules.add(-1)  # no module has this id
        try:
            yield
        finally:
            for modules in in_use:
                modules.discard(-1)


def silence_other_ranks() -> None:
    """Disables log lines, except errors, and progress bars on all but the main process."""
    if not PartialState().is_main_process:
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
