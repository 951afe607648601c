"""The log file and the progress display of a training run."""

import json
import logging
import sys
import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from egmf.files import write_whole, writing


class JsonLinesLog(TrainerCallback):
    """Appends every log entry of Trainer to a file, one JSON object per line; each gets the constant `fields`."""

    def __init__(self, path: Path, **fields: str):
        self.path, self.fields = path, fields

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self._append({**self.fields, "step": state.global_step, **logs})

    def add_once(self, step: int, logs: dict) -> None:
        """Appends what is known after the last step, in place of what an earlier call of the same command wrote."""
        entry = {**self.fields, "step": step, **logs}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if json.loads(line).keys() != entry.keys()]
        if kept != lines:
            write_whole(self.path, "".join(kept))
        self._append(entry)

    def _append(self, entry: dict) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def cut(self, step: int) -> None:
        """Removes this phase's entries after a step, which will be logged again, and incomplete lines."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if self._stays(line, step)]
        if kept != lines:
            write_whole(self.path, "".join(kept))

    def _stays(self, line: str, step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            logging.warning("%s: an incomplete line is removed: %s", self.path, line.strip())
            return False
        return entry.get("phase") != self.fields.get("phase") or 0 < entry["step"] <= step


class Progress(ProgressCallback):
    """Shows a phase's loss, learning rate, speed and remaining time.

    On a terminal this is a bar; without one, or with `disable_tqdm`, a line for each log entry.
    """

    def __init__(self, phase: str):
        super().__init__()
        self.phase = phase

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.begun, self.current_step = state.global_step, time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            # smoothing=0 averages over the whole run, so that the remaining time includes validation.
            self.training_bar = tqdm(
                desc=self.phase, total=state.max_steps, initial=self.first, smoothing=0, dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4g}", "lr": f"{logs['learning_rate']:.2g}"}
            rates = {name: f"{logs[f'{name}_per_second']:,.0f}" for name in RATES if f"{name}_per_second" in logs}
            shown |= {f"{name}/s": rate for name, rate in rates.items()}
        else:
            numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            shown = {name: f"{value:.4g}" for name, value in numbers.items() if name not in ("epoch", "total_flos")}
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(shown)
            return
        text = f"{self.phase}: step {state.global_step}/{state.max_steps}"
        text += "".join(f", {name} {value}" for name, value in shown.items())
        done = state.global_step - self.first
        if "loss" in logs and done:
            left = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
            text += f", {tqdm.format_interval(left)} left"
        if self.training_bar is not None:
            self.training_bar.write(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


RATES = ("tokens", "rows")
