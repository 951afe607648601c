"""Batches of a training run: which rows they have, and with which random numbers they are built."""

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from egmf.data.collator import AffectCollator
from egmf.data.mixture import MixtureSampler
from egmf.files import RunStopped


class PerRankSeed(TrainerCallback):
    """Seeds each process differently, so that dropout and augmentation differ between processes.

    This happens after the model has been built and the rows have been ordered: both must be equal on all processes.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            set_seed(args.seed, device_specific=True)


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch. With several processes that go on inside an epoch, Accelerate does not."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # wrappers, for a process's share and for skipped batches
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(int(state.epoch))


def data_seed_of(args: TrainingArguments) -> int:
    """The seed of sampling and augmentation: `data_seed`, or `seed` if it is not set."""
    return args.seed if args.data_seed is None else args.data_seed


class MixtureTrainer(Trainer):
    """Trainer whose training rows may be a mixture of corpora or labels ([`mix_rows`]).

    Args:
        mixture: (sizes, weights) of the groups, whose rows follow each other in the training set. None: one group.
        args, kwargs: See `transformers.Trainer`.
    """

    def __init__(self, *args, mixture: tuple[list[int], list[float]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mixture = mixture
        self.add_callback(PerRankSeed())
        self.add_callback(SamplerEpoch())

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy, mixture = self.args.train_sampling_strategy, self.mixture
        if mixture is not None and strategy == "sequential":
            wanted = "random or group_by_length"
            raise ValueError(f"train_sampling_strategy: got {strategy!r} for a mixture, wanted {wanted}")
        if mixture is None and strategy == "group_by_length":
            # Trainer's own sampler draws the groups from the global random state, which differs between processes and
            # between a run and its resumption.
            mixture = [len(rows)], [1.0]
        if mixture is None:
            return super()._get_train_sampler(train_dataset)
        lengths = rows[self.args.length_column_name][:] if strategy == "group_by_length" else None
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return MixtureSampler(*mixture, data_seed_of(self.args), lengths, group)


@dataclass
class SeededCollator:
    """Wraps a collator: makes its randomness repeatable, and adds the rows' ids and the batch's amount to each batch.

    Random numbers in a batch depend only on the seed, the epoch and the rows' ids. Batches are built ahead of their
    steps, so a run that resumes within an epoch could not restore a global random state.

    Args:
        collator: The collator.
        unit: "tokens" or "rows": what `amount` counts.
        seed: Seed of the data.
        epoch: The current epoch.
    """

    collator: AffectCollator
    unit: str
    seed: int
    epoch: int = 0

    def __call__(self, rows: list[dict]):
        ids = [row["id"] for row in rows]
        digest = hashlib.sha256(json.dumps([self.seed, self.epoch, ids]).encode()).digest()
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(digest[:7]))  # of the CPU only
        try:
            batch = self.collator(rows)
        except OSError as error:
            raise RunStopped(
                f"{error}. One of the rows {', '.join(ids)} needs this file, which was there when the run began. Put "
                "it back and repeat the command: the run resumes from the last checkpoint."
            ) from error
        finally:
            torch.set_rng_state(before)
        batch["row_ids"] = ids
        # Counted on the CPU, so that no step waits for the accelerator.
        batch["amount"] = int(batch["attention_mask"].sum()) if self.unit == "tokens" else len(rows)
        return batch


def ignoring_sigterm(loader: DataLoader) -> DataLoader:
    """Lets a loader's workers ignore SIGTERM: a step or a validation that is under way needs their batches."""
    if loader.num_workers:
        # At the end of this process multiprocessing would end them by SIGTERM, and wait.
        Finalize(None, _kill_workers, exitpriority=1)
        begin = partial(_begin_worker, begin=loader.worker_init_fn)
        # Accelerate's loader iterates the one inside, and is itself copied when batches are skipped.
        for one in (loader, getattr(loader, "base_dataloader", loader)):
            one.worker_init_fn = begin
    return loader


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for a worker that is killed
    for worker in multiprocessing.active_children():
        worker.kill()


def _begin_worker(worker: int, begin: Callable[[int], None] | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if begin is not None:
        begin(worker)
