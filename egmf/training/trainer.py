"""The Trainer of all phases of a training run: checkpoints, resuming and the log.

A phase resumes from its last valid checkpoint (`checkpoints.py`). It stops with one clear message, and keeps its
checkpoints, if a checkpoint cannot be written, if a loss is NaN or infinite, or if a file that it reads has
disappeared. If a scheduler stops it (SIGTERM), it first writes a checkpoint.
"""

import json
import logging
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from egmf.evaluation.plots import plot_training
from egmf.files import RunStopped, writing
from egmf.training.batches import MixtureTrainer, SeededCollator, data_seed_of, ignoring_sigterm
from egmf.training.checkpoints import MANIFEST, last_whole_checkpoint, seal, size_of, steps_of
from egmf.training.preemption import termination
from egmf.training.progress import JsonLinesLog, Progress


STATE = "trainer_state.json"
RUNNING_LOSS = "running_loss.json"
ASKED_EVERY = 4  # steps after which several processes ask each other whether one was told to stop
UNCHECKED = 64  # at most so many losses wait on an accelerator before they are checked


class CheckpointCallback(TrainerCallback):
    """Requests a checkpoint when the run must stop, and writes checkpoints at an epoch's end after validation."""

    def __init__(self, trainer: "RunTrainer"):
        self.trainer, self.stopping = trainer, False
        self.at_end = False  # of an epoch or of the run
        self.put_off = False  # a checkpoint, until validation at the epoch's end is done

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_running_loss()
        termination.can_wait = True

    def on_train_end(self, args, state, control, **kwargs):
        termination.can_wait = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.seeded_collator.epoch = int(state.epoch)

    def on_step_end(self, args, state, control, **kwargs):
        self.at_end = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        # Several processes have to ask each other, for which the hosts wait for their accelerators.
        alone = self.trainer.accelerator.num_processes == 1
        if alone or self.at_end or control.should_save or state.global_step % ASKED_EVERY == 0:
            self._decide(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.put_off
        self.at_end = self.put_off = False
        self._decide(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._decide(control)

    def on_save(self, args, state, control, **kwargs):
        if self._has_to_stop():
            raise termination.stop(f"{self.trainer.checkpoint} was written")

    def _decide(self, control) -> None:
        control.should_save = control.should_save or self._has_to_stop()
        if self.at_end and control.should_save:
            # Validation follows at the end of an epoch; a run that resumed from here would skip it.
            control.should_save, self.put_off = False, True

    def _has_to_stop(self) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return termination.asked
        if termination.asked and not self.stopping:
            accelerator.set_trigger()
        self.stopping = accelerator.check_trigger() or self.stopping  # all processes stop at the same step
        return self.stopping


class RunTrainer(MixtureTrainer):
    """Trainer of every phase of a run.

    Args:
        run_folder: The run's folder, where `log.jsonl` is.
        phase: Name of the phase; None for the last one.
        args, kwargs: See [`MixtureTrainer`].
    """

    unit = "rows"  # what the speed is measured in

    def __init__(self, *args, run_folder: Path, phase: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # The filter hides NaN losses and waits for the accelerator in every step.
        self.args.logging_nan_inf_filter = False
        self.log_file = JsonLinesLog(run_folder / "log.jsonl", **({"phase": phase} if phase else {}))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        for callback in (CheckpointCallback(self), self.log_file, Progress(phase or "training")):
            self.add_callback(callback)
        self._unchecked: list[tuple[int, list[str] | None, torch.Tensor]] = []  # step, rows and loss; or gradient norm
        self._restored, self._amount, self._clock = None, 0, time.perf_counter()
        self.phase, self.begun = phase, time.strftime("%Y%m%d-%H%M%S")

    @property
    def checkpoint(self) -> Path:
        """Path of this step's checkpoint."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def train_or_resume(self) -> None:
        """Trains, resuming from the last valid checkpoint. If the phase is finished, only loads its weights.

        Then draws the log of all phases so far to `training.png`.
        """
        self._resume_or_train()
        if self.is_world_process_zero():
            with writing(self.log_file.path.with_name("training.png")):
                plot_training(self.log_file.path, self.log_file.path.with_name("training.png"))

    def _resume_or_train(self) -> None:
        found: list[str | None] = [None]
        if self.is_world_process_zero():
            found = [last_whole_checkpoint(Path(self.args.output_dir), self.args.load_best_model_at_end)]
        [checkpoint] = broadcast_object_list(found)
        if self.is_world_process_zero():
            self.log_file.cut(steps_of(checkpoint))
        if checkpoint is None:
            self._report_after(0)
            self.train()
            return
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        if self.args.max_steps > 0:
            name, done, asked = "max_steps", state.global_step, self.args.max_steps
            finished = done >= asked
        else:
            name, done, asked = "num_train_epochs", state.epoch, self.args.num_train_epochs
            finished = state.global_step >= state.max_steps and done > asked - 1e-3
        if done > math.ceil(asked):  # a part of an epoch is rounded up to steps
            wanted = f"at least the {done:g} of {checkpoint}, or another output_dir"
            raise ValueError(f"{name}: got {asked:g}, wanted {wanted}")
        if finished and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(checkpoint)
            self.state = state
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                # The run may have been moved.
                best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
                state.best_model_checkpoint = str(best)
                self._load_best_model()
            return
        restored = json.loads((Path(checkpoint) / RUNNING_LOSS).read_text(encoding="utf-8"))
        self._restored, self.begun = restored, restored["begun"]
        self._report_after(steps_of(checkpoint))
        logging.info("going on from %s", checkpoint)
        self.train(resume_from_checkpoint=checkpoint)

    def _report_after(self, step: int) -> None:
        """Continues the curves of `report_to` after a step, under their first name."""
        name = self.args.run_name or f"{self.log_file.path.parent.resolve().name}-{self.begun}"
        self.args.run_name = f"{name}-{self.phase}" if self.phase else name
        for callback in self.callback_handler.callbacks if self.is_world_process_zero() else ():
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # else the user has set it
                from torch.utils.tensorboard import SummaryWriter  # an optional package

                callback.logging_dir = str(Path(self.args.output_dir) / "runs")
                # A killed run may have logged steps after its last checkpoint; they are logged again and replaced.
                callback.tb_writer = SummaryWriter(callback.logging_dir, purge_step=step + 1)

    def restore_running_loss(self) -> None:
        """Restores the loss that was not logged yet when the checkpoint was written; Trainer drops it."""
        if self._restored is not None:
            self._tr_loss += self._restored["loss"]
            self._globalstep_last_logged = self._restored["logged_step"]
            self._total_loss_scalar = self._restored["total"]
        self._clock, self._amount = time.perf_counter(), 0

    def get_train_dataloader(self):
        collator = self.data_collator
        self.data_collator = self.seeded_collator = SeededCollator(collator, self.unit, data_seed_of(self.args))
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        return ignoring_sigterm(loader)

    def training_step(self, model, inputs, num_items_in_batch=None):
        ids, amount = inputs.pop("row_ids"), inputs.pop("amount")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._amount += amount
        self._unchecked.append((self.state.global_step + 1, ids, loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # a scaler skips steps with infinite gradients
            self._unchecked.append((self.state.global_step + 1, None, torch.as_tensor(norm)))
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control = self.control
        due = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        # Reading a loss waits for the accelerator, so it is done when something else waits anyway.
        if due or self.args.device.type == "cpu" or len(self._unchecked) >= UNCHECKED:
            self.check_losses()
        pauses = control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pauses:
            self._clock, self._amount = time.perf_counter(), 0  # the speed excludes validation and saving

    def check_losses(self) -> None:
        """Raises a RunStopped that names the rows if a loss or gradient norm is NaN or infinite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        device = self.args.device
        # FSDP2 divides the gradient norm among the processes, which all check the same steps.
        gathered = [value.full_tensor() if isinstance(value, DTensor) else value for _, _, value in unchecked]
        values = torch.stack([value.detach().to(device, torch.float32).reshape(()) for value in gathered])
        for (step, ids, _), value in zip(unchecked, values.tolist(), strict=True):
            if math.isfinite(value):
                continue
            what = "the gradients' norm" if ids is None else "the loss"
            # For a gradient norm, the rows of its step.
            rows = ids or [name for other, names, _ in unchecked if other == step for name in names or ()]
            folder = Path(self.args.output_dir)
            whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*[0-9]") if (path / MANIFEST).exists()]
            last = max(whole, key=steps_of, default=None)
            raise RunStopped(
                f"step {step}: {what} is {value}. The rows of its batch: {', '.join(rows)}. Nothing was saved since; "
                + (f"the last checkpoint is {last}. " if last else "there is no checkpoint yet. ")
                + "Check these rows or lower the learning_rate: unchanged, the run would stop here again."
            )

    def log(self, logs, start_time=None):
        if "loss" in logs and self._amount:
            seconds = time.perf_counter() - self._clock
            logs[f"{self.unit}_per_second"] = round(self._amount * self.accelerator.num_processes / seconds, 1)
            self._clock, self._amount = time.perf_counter(), 0
        if "train_loss" in logs:  # Trainer's own counts only the steps since the last start
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        """Saves a checkpoint as Trainer does, but deletes older ones only after this one is valid."""
        # Otherwise Trainer would delete them itself.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        unlogged = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        running = {"loss": unlogged, "logged_step": self._globalstep_last_logged, "total": self._total_loss_scalar}
        running["begun"] = self.begun
        checkpoint, folder = self.checkpoint, Path(self.args.output_dir)
        whole = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*[0-9]"), key=steps_of)
        remedy = f"make room, and the same command goes on from {whole[-1] if whole else 'the beginning'}"
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        with writing(checkpoint, size_of(whole[-1]) if whole else None, remedy):
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    (checkpoint / RUNNING_LOSS).write_text(json.dumps(running) + "\n", encoding="utf-8")
                    seal(checkpoint)
            except Exception:
                shutil.rmtree(checkpoint, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
