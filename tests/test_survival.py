"""Runs that are killed, stopped, out of disk or given invalid numbers: messages, remaining files and resuming.

Every run is a separate process, forked from a process with loaded libraries, and is really killed.
"""

import functools
import json
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clips import AVATARS
from commands import REPO, processes, read_lines, start
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._utils import ExceptionWrapper
from transformers import TrainerCallback, TrainerState, TrainingArguments

from corpora import load_corpus
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.data.tower_cache import TowerCache
from egmf.evaluation.plots import plot_training
from egmf.files import RunStopped
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.training.batches import SeededCollator
from egmf.training.checkpoints import MANIFEST, check_media, damage_of, last_whole_checkpoint, seal, steps_of
from egmf.training.preemption import run_training
from egmf.training.progress import JsonLinesLog
from egmf.training.trainer import RunTrainer
from egmf.training.validation import AffectTrainer


# 2 epochs of 6 steps. Neither the log's steps nor the epochs' ends fall on those of the checkpoints.
TINY = ["recipes/tiny.yaml", "--corpus_options", '{"size": 72}', "--per_device_train_batch_size", "8"]
TINY += ["--num_train_epochs", "2", "--logging_steps", "5", "--save_strategy", "steps", "--save_steps", "2"]
TINY += ["--load_best_model_at_end", "False", "--lora_r", "4", "--train_sampling_strategy", "group_by_length"]
PHASES = ["recipes/avatars_towers.yaml", "--language_model", "tiny-random", "--corpus_options", json.dumps(AVATARS)]
PHASES += [
    "--tower_epochs",
    "2",
    "--fusion_epochs",
    "2",
    "--num_frames",
    "4",
    "--bf16",
    "False",
    "--logging_steps",
    "1",
]
PHASES += ["--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "2", "--fusion_batch_size", "16"]
PHASES += ["--per_device_train_batch_size", "16", "--max_steps", "3", "--save_total_limit", "1"]
BESIDE_TIME = re.compile(r"runtime|per_second")


class Run:
    """A training command for one output folder, which can be started several times."""

    def __init__(self, folder: Path, arguments: list[str], hub: Path | None = None):
        self.folder, self.said = folder / "run", folder / "said.txt"
        self.arguments = [*arguments, "--output_dir", str(self.folder)]
        folder.mkdir(parents=True, exist_ok=True)
        self.hub = hub  # what is kept of clips goes there

    def start(self, before: Callable | None = None):
        return start("train", *self.arguments, said=self.said, hub=self.hub, before=before)

    def __call__(self, before: Callable | None = None) -> tuple[int, str]:
        """Run the command; return the exit status and the output."""
        process = self.start(before)
        process.join(300)
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode, self.said.read_text()

    def finish(self) -> str:
        status, said = self()
        assert status == 0, said
        return said

    def entries(self) -> list[dict]:
        """The entries of the log for steps, without values that depend on the time."""
        lines = [line for line in read_lines(self.folder / "log.jsonl") if "train_loss" not in line]
        return [{name: line[name] for name in line if not BESIDE_TIME.search(name)} for line in lines]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*checkpoint-*"))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")


def assert_alike(run: Run, whole: Run) -> None:
    assert run.entries() == whole.entries()
    wanted, got = whole.weights(), run.weights()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


class At:
    """Calls `do` inside the run before the `count`-th call of a method."""

    def __init__(self, owner: type, name: str, count: int, do: Callable[[], None]):
        self.owner, self.name, self.count, self.do = owner, name, count, do

    def __call__(self) -> None:
        method, calls = getattr(self.owner, self.name), iter(range(1, 1_000_000))

        def counted(*args, **kwargs):
            if next(calls) == self.count:
                self.do()
            return method(*args, **kwargs)

        setattr(self.owner, self.name, counted)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Send SIGTERM to every process of the run from another one, as schedulers do.

    A data loader's worker takes a signal from its own parent for the end of the loader, and any other for a crash.
    """
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"), TINY)
    warm = processes.Process(target=print)
    warm.start()
    warm.join()
    begun = time.monotonic()
    run.finish()
    run.seconds = time.monotonic() - begun
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Run:
    """A run that was killed after its second checkpoint, at step 4 of 12."""
    run = Run(tmp_path_factory.mktemp("killed"), TINY)
    status, _ = run(At(RunTrainer, "training_step", 6, kill))
    assert status == -signal.SIGKILL and run.checkpoints() == ["checkpoint-2", "checkpoint-4"]
    return run


@pytest.fixture
def half(killed, tmp_path) -> Run:
    """A copy of the killed run."""
    run = Run(tmp_path, TINY)
    shutil.copytree(killed.folder, run.folder)
    return run


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(whole, tmp_path):
    """The run is killed while a checkpoint is written, after different files of it, and at random times."""
    chance, run = random.Random(0), Run(tmp_path, TINY)
    writing = [(RunTrainer, "_save_optimizer_and_scheduler"), (RunTrainer, "_save_rng_state")]
    for owner, method in (*writing, (TrainerState, "save_to_json")):
        assert run(At(owner, method, 1, kill))[0] == -signal.SIGKILL
        assert any(not (path / MANIFEST).exists() for path in run.folder.glob("checkpoint-*"))
    for _ in range(3):
        process = run.start()
        process.join(chance.uniform(0.3, 0.9) * whole.seconds)
        process.kill()
        process.join()
    run.finish()
    assert_alike(run, whole)


@pytest.mark.parametrize(
    ("owner", "method", "count"),
    [(RunTrainer, "_save_rng_state", 3), (JsonLinesLog, "on_log", 3), (RunTrainer, "training_step", 10)],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_run_killed_at_a_bad_moment_ends_like_one_that_was_not(whole, tmp_path, owner, method, count):
    """In the middle of a checkpoint, before validation is logged, and in the middle of the second epoch."""
    run = Run(tmp_path, TINY)
    assert run(At(owner, method, count, kill))[0] == -signal.SIGKILL
    unfinished = [name for name in run.checkpoints() if not (run.folder / name / MANIFEST).exists()]
    assert unfinished == (["checkpoint-6"] if method == "_save_rng_state" else [])
    said = run.finish()
    assert all(f"{name} was not written to its end" in said for name in unfinished)
    assert_alike(run, whole)


def test_the_best_checkpoint_of_a_killed_run_becomes_its_model(tmp_path):
    arguments = [*TINY, "--save_strategy", "epoch", "--load_best_model_at_end", "true"]
    one, other = Run(tmp_path / "one", arguments), Run(tmp_path / "other", arguments)
    one.finish()
    assert other(At(RunTrainer, "training_step", 10, kill))[0] == -signal.SIGKILL
    other.finish()
    assert_alike(other, one)


class RowRecorder(torch.nn.Module):
    """A model that learns from the rows and from random numbers, and records the rows."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.seen = []

    def forward(self, row: torch.Tensor):
        self.seen.append(row.tolist())
        target = torch.nn.functional.dropout(row.float().sum() * torch.rand(8), 0.5)
        return {"loss": (self.weight - target).abs().mean()}


class _Killed(Exception):
    pass


@pytest.mark.parametrize("mixture", [None, ([25, 12], [1.0, 3.0])], ids=["one_corpus", "mixture"])
@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_every_sampling_strategy_resumes_in_the_middle_of_an_epoch(tmp_path, strategy, mixture):
    if mixture and strategy == "sequential":
        with pytest.raises(ValueError, match="train_sampling_strategy: got 'sequential' for a mixture, wanted random"):
            sampled_run(tmp_path, strategy, mixture)
        return
    whole = sampled_run(tmp_path / "whole", strategy, mixture)
    with pytest.raises(_Killed):
        sampled_run(tmp_path / "killed", strategy, mixture, data_seed=0, killed_at=13)
    resumed = sampled_run(tmp_path / "killed", strategy, mixture, data_seed=0)
    seeded = sampled_run(tmp_path / "seeded", strategy, mixture, data_seed=0)
    assert resumed.seen == seeded.seen[12:]  # 8 steps an epoch; the last checkpoint is that of step 12
    assert torch.equal(resumed.weight, seeded.weight)
    assert (seeded.seen == whole.seen) == (strategy == "sequential")


def sampled_run(folder: Path, strategy: str, mixture, data_seed: int | None = None, killed_at: int = 0) -> RowRecorder:
    """Train three epochs on 37 rows, or until the step at which the run is interrupted."""
    lengths = random.Random(0)
    rows = Dataset.from_list([{"id": str(row), "row": row, "length": lengths.randint(1, 9)} for row in range(37)])
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        num_train_epochs=3,
        per_device_train_batch_size=5,
        learning_rate=0.1,
        train_sampling_strategy=strategy,
        data_seed=data_seed,
        seed=1,
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    torch.manual_seed(1)
    model = RowRecorder()
    collate = functools.partial(_stack, "row")
    trainer = RunTrainer(
        model, arguments, data_collator=collate, train_dataset=rows, mixture=mixture, run_folder=folder
    )
    if killed_at:
        trainer.add_callback(_KillAt(killed_at))
    trainer.train_or_resume()
    return model


def _stack(name: str, rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows])}


class _KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise _Killed


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST],
)
def test_a_damaged_checkpoint_is_set_aside_and_said(whole, tmp_path, caplog, name):
    """The checkpoint is truncated, or changed in the middle at the same length; the previous one is used."""
    before, last = sorted(whole.checkpoints(), key=steps_of)  # the best or the last but one, and the last
    assert last == "checkpoint-12"
    for harm in ("cut", "changed"):
        folder = shutil.copytree(whole.folder, tmp_path / harm)
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-12")
        file = folder / "checkpoint-12" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
        assert last_whole_checkpoint(folder) == str(folder / before)
        assert (folder / "damaged-checkpoint-12" / name).exists() and not (folder / "checkpoint-12").exists()
        file = r"\S+" if name == MANIFEST else re.escape(name)  # a changed manifest is wrong about another file
        assert re.search(rf"checkpoint-12 is damaged \({file} ", caplog.text)
        caplog.clear()
    assert damage_of(folder / before) is None


def test_a_run_goes_on_from_before_a_damaged_checkpoint(half, whole):
    (half.folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    said = half.finish()
    assert "optimizer.pt has 0 bytes, wanted" in said and "going on from" in said
    assert_alike(half, whole)


def test_a_checkpoint_counts_only_with_the_best_one_that_it_names(half, caplog):
    state = half.folder / "checkpoint-4" / "trainer_state.json"
    fields = json.loads(state.read_text()) | {"best_model_checkpoint": str(half.folder / "checkpoint-2")}
    state.write_text(json.dumps(fields))
    seal(half.folder / "checkpoint-4")
    (half.folder / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(half.folder) == str(half.folder / "checkpoint-4")
    assert last_whole_checkpoint(half.folder, with_best=True) is None
    assert "its best one, checkpoint-2, is: adapter_model.safetensors has 0 bytes" in caplog.text
    assert half.checkpoints() == ["damaged-checkpoint-2", "damaged-checkpoint-4"]


def limit_weights() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def limit_optimizer() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [limit_weights, limit_optimizer])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(half, whole, limit):
    """A limit on the file size makes safetensors fail on the weights, or torch on the optimizer."""
    status, said = half(limit)
    last = said.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in said
    assert re.search(
        r"checkpoint-6: could not be written: .*MB are free in .*, and \d\.\d MB are needed: make room", last
    )
    assert last.endswith(f"the same command goes on from {half.folder / 'checkpoint-4'}.")
    assert half.checkpoints() == ["checkpoint-2", "checkpoint-4"]
    half.finish()
    assert_alike(half, whole)


def test_a_run_goes_on_when_a_full_disk_has_room_again(half, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        shutil.move(half.folder, disk / "run")
        half.folder, half.arguments[-1] = disk / "run", str(disk / "run")
        with (disk / "other").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:  # to the last page, less room for some files of a checkpoint
                file.write(bytes(4096))
        os.truncate(disk / "other", (disk / "other").stat().st_size - 500_000)
        status, said = half()
        assert status == 1 and "Traceback" not in said
        assert re.search(r"checkpoint-6: could not be written: .*0\.5 MB are free in", said)
        assert half.checkpoints() == ["checkpoint-2", "checkpoint-4"]
        (disk / "other").unlink()
        half.finish()
        assert_alike(half, whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("owner", "method", "count", "step", "workers"),
    [
        (RunTrainer, "training_step", 3, 3, 2),  # whose batches other processes read
        (RunTrainer, "training_step", 6, 6, 0),  # the last one of an epoch
        (AffectTrainer, "prediction_step", 1, 6, 1),  # validation at its end
        (RunTrainer, "_save_rng_state", 2, 4, 0),  # a checkpoint that is written anyway
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_sigterm_saves_and_ends_a_run_that_then_ends_as_if_nothing_was(
    whole, tmp_path, owner, method, count, step, workers
):
    run = Run(tmp_path, [*TINY, "--dataloader_num_workers", str(workers)])
    status, said = run(At(owner, method, count, terminate))
    assert status == 143 and f"Stopped by SIGTERM: {run.folder / f'checkpoint-{step}'} was written" in said
    assert "Traceback" not in said and damage_of(run.folder / f"checkpoint-{step}") is None
    assert not (run.folder / "model").exists()
    run.finish()
    assert_alike(run, whole)


def test_the_command_ends_with_143(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--num_train_epochs", "100", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Repeat the command to resume" in said


def test_a_loss_that_is_no_number_names_its_rows(tmp_path):
    """The error occurs at the step itself, also for an infinite gradient."""

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, value, attention_mask):
            return {"loss": (self.weight * value).square().mean() if self.finite else (self.weight - 1).sqrt().mean()}

    def collate(rows):
        return {"value": torch.tensor([row["value"] for row in rows]), "attention_mask": torch.ones(len(rows), 1)}

    rows = Dataset.from_list([{"id": f"clip_{n}", "value": float("nan") if n == 9 else 1.0} for n in range(16)])
    for finite, value in ((True, "the loss is nan"), (False, "the gradients' norm is inf")):
        folder = tmp_path / str(finite)
        settings = {"per_device_train_batch_size": 4, "remove_unused_columns": False, "use_cpu": True}
        settings |= {
            "save_steps": 1,
            "logging_steps": 100,
            "learning_rate": 1e-3,
            "train_sampling_strategy": "sequential",
        }
        model = Square()
        model.finite = finite
        trainer = RunTrainer(
            model,
            TrainingArguments(output_dir=str(folder), **settings),
            data_collator=collate,
            train_dataset=rows,
            run_folder=folder,
        )
        step, first = (3, 8) if finite else (1, 0)
        names = ", ".join(f"clip_{n}" for n in range(first, first + 4))
        with pytest.raises(RunStopped, match=rf"^step {step}: {value}. The rows of its batch: {names}\. ") as stopped:
            trainer.train_or_resume()
        saved = [folder / f"checkpoint-{n}" for n in (1, 2)] if finite else []
        assert sorted(folder.glob("checkpoint-*")) == saved and not any(map(damage_of, saved))
        assert (f"the last checkpoint is {saved[-1]}." if saved else "there is no checkpoint yet") in str(
            stopped.value
        )


def test_a_run_that_diverges_ends_with_a_message_and_a_clean_log(tmp_path):
    run = Run(tmp_path, [*TINY, "--learning_rate", "1e30", "--logging_steps", "1", "--save_steps", "1"])
    status, said = run()
    assert status == 1 and "Traceback" not in said and re.search(r"step 2: the .* is (nan|inf)", said)
    assert run.checkpoints() == ["checkpoint-1"] and [entry["step"] for entry in run.entries()] == [1]


def test_a_log_that_a_full_disk_cut_off_is_mended(half, whole, caplog):
    with (half.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert "an incomplete line is removed" in half.finish()
    assert_alike(half, whole)


def test_a_finished_run_is_only_read(whole):
    before = (whole.folder / "log.jsonl").read_text()
    weights = whole.weights()
    whole.finish()
    assert (whole.folder / "log.jsonl").read_text() == before
    assert all(torch.equal(weights[name], value) for name, value in whole.weights().items())


@pytest.fixture(scope="module")
def phases(avatars, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("phases")
    run = Run(folder, [*PHASES, "--corpus_dir", str(avatars)], hub=folder / "hub")
    run.finish()
    return run


@pytest.mark.slow
def test_a_run_killed_in_each_of_its_phases_ends_alike(phases, avatars, tmp_path):
    """Towers, fusion and LLM; the counts are those of the steps since the run was resumed."""
    run = Run(tmp_path, [*PHASES, "--corpus_dir", str(avatars)], hub=tmp_path / "hub")
    for step in (2, 4, 10, 6):
        assert run(At(RunTrainer, "training_step", step, kill))[0] == -signal.SIGKILL
    run.finish()
    assert_alike(run, phases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "count", "saved"),
    [
        (TowerCache, "_write", 5, None),  # while clips are read
        (RunTrainer, "training_step", 1, "audio_tower/checkpoint-1"),
        (RunTrainer, "training_step", 4, "audio_tower/checkpoint-4"),
        (RunTrainer, "training_step", 9, "fusion/checkpoint-1"),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_sigterm_in_any_phase(phases, avatars, tmp_path, owner, method, count, saved):
    run = Run(tmp_path, [*PHASES, "--corpus_dir", str(avatars)], hub=tmp_path / "hub")
    status, said = run(At(owner, method, count, terminate))
    assert status == 143 and "Stopped by SIGTERM: " in said
    assert (
        "this part of the run had nothing to save" in said
        if saved is None
        else f"{run.folder / saved} was written" in said
    )
    run.finish()
    assert_alike(run, phases)


def test_every_phase_is_in_the_log_and_in_the_picture(phases, tmp_path):
    names = [entry.get("phase") for entry in phases.entries() if "loss" in entry]
    assert list(dict.fromkeys(names)) == ["audio_tower", "vision_tower", "fusion", None]
    assert (phases.folder / "training.png").read_bytes()[:4] == b"\x89PNG"
    said = phases.said.read_text()
    assert re.search(r"^fusion: step 2/6, loss [\d.]+, lr [\d.e-]+, rows/s [\d,]+, [\d:]+ left$", said, re.MULTILINE)


def test_a_file_that_is_gone_is_named_and_nothing_is_trained_on_without_it(phases, avatars, tmp_path):
    """The cache of the clips disappears during the run; before the run is resumed, a clip is damaged."""
    own = shutil.copytree(avatars, tmp_path / "avatars")
    run = Run(tmp_path, [*PHASES, "--corpus_dir", str(own)], hub=tmp_path / "hub")
    status, said = run(At(RunTrainer, "training_step", 3, _Gone(tmp_path / "hub")))
    last = said.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in said
    assert re.search(rf"^{own}/train/\w+\.(mp4|wav): its cache entry {tmp_path}/hub/.* cannot be read", last)
    assert "Put it back" in last and damage_of(run.folder / "audio_tower" / "checkpoint-4") is None
    clip = next((own / "train").glob("*.mp4"))
    content = clip.read_bytes()
    clip.write_bytes(content[:100])
    status, said = run()
    assert status == 1 and "rows could be read when this run began and cannot now" in said and str(clip) in said
    assert damage_of(run.folder / "audio_tower" / "checkpoint-4") is None
    clip.write_bytes(content)
    run.finish()
    assert_alike(run, phases)


def test_progress_on_a_terminal_is_a_bar_with_loss_rate_and_time(whole, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 200))
    run = Run(tmp_path, TINY)
    run.said = Path(os.ttyname(theirs))
    process, said = run.start(), b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            said += os.read(ours, 4096)
    assert process.exitcode == 0
    bar = r"training:  83%\|[^|]+\| 10/12 \[[\d:]+<[\d:]+, [^,]+, loss=[\d.]+, lr=0\.00075, tokens/s=[\d,]+\]"
    assert re.search(bar, said.decode())


def losses(run: Run, phase: str | None = None) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in run.entries() if "loss" in line and line.get("phase") == phase]


def test_tensorboard_has_each_step_of_a_killed_run_once(tmp_path):
    """A checkpoint is written at step 4 and the run is killed in step 6, so step 5 is logged twice."""
    run = Run(tmp_path, [*TINY, "--report_to", "tensorboard", "--logging_steps", "1"])
    assert run(At(RunTrainer, "training_step", 6, kill))[0] == -signal.SIGKILL
    run.finish()
    assert len([*run.folder.glob("runs/*")]) == 2
    reader = EventAccumulator(str(run.folder / "runs"))
    reader.Reload()
    seen = [(event.step, pytest.approx(event.value)) for event in reader.Scalars("train/loss")]
    assert losses(run) == seen and [step for step, _ in seen] == [*range(1, 13)]
    assert [event.step for event in reader.Scalars("eval/weighted_f1")] == [6, 12]
    assert "train/tokens_per_second" in reader.Tags()["scalars"]


class Environment:
    """Sets an environment variable in the run."""

    def __init__(self, name: str, value: str):
        self.name, self.value = name, value

    def __call__(self) -> None:
        os.environ[self.name] = self.value


def test_trackio_has_a_run_for_each_phase_that_goes_on(tmp_path, monkeypatch):
    from trackio import sqlite_storage  # here: where it writes is settled when it is imported, in the run as well

    arguments = ["--report_to", "trackio", "--logging_steps", "1", "--fusion_epochs", "1", "--fusion_batch_size", "8"]
    run = Run(tmp_path, [*TINY, *arguments, "--project", "tiny"])
    for epochs in ("1", "2"):
        run.arguments += ["--num_train_epochs", epochs]
        status, said = run(Environment("TRACKIO_DIR", str(tmp_path / "trackio")))
        assert status == 0, said
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    logs = sqlite_storage.SQLiteStorage.get_logs
    curves = {}
    for name in sqlite_storage.SQLiteStorage.get_runs("tiny"):
        lines = [line for line in logs("tiny", name) if "train/loss" in line]
        curves[name] = [(line["train/global_step"], line["train/loss"]) for line in lines]
    experts, last = sorted(curves, key=lambda name: len(curves[name]))
    assert re.fullmatch(r"run-[\d]{8}-[\d]{6}-fusion", experts) and re.fullmatch(r"run-[\d]{8}-[\d]{6}", last)
    assert curves == {experts: losses(run, "fusion"), last: losses(run)}
    assert [len(curve) for curve in curves.values()] == [6, 12]
    assert [line["train/global_step"] for line in logs("tiny", last) if "eval/weighted_f1" in line] == [6, 12]


def test_tokens_are_counted_without_their_padding(processor):
    rows = list(
        expand_by_task(load_corpus("generated", None, size=36)["train"].select(range(6)), [BUILTIN_TASKS["mosi"]])
    )
    collator = AffectCollator(processor, [BUILTIN_TASKS["mosi"]], ["text"], with_answers=True)
    alone = [collator([row])["input_ids"].shape[1] for row in rows]
    batch = SeededCollator(collator, "tokens", seed=0)(rows)
    assert len(set(alone)) > 1 and batch["amount"] == sum(alone) < batch["input_ids"].numel()


def test_the_picture_has_a_column_for_each_phase(phases, whole, tmp_path):
    sizes = {}
    for run in (phases, whole):
        plot_training(run.folder / "log.jsonl", tmp_path / "picture.png")
        sizes[run] = Image.open(tmp_path / "picture.png").size[0]
    assert sizes[phases] > 3 * sizes[whole]


class _Gone:
    """Removes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        shutil.rmtree(self.folder)


def test_files_are_compared_only_once_a_run_has_a_checkpoint(tmp_path):
    record, new = tmp_path / "unreadable_rows.json", {("vision", "b.mp4"): "Cannot read 'b.mp4'."}
    check_media(record, {})
    check_media(record, new)  # the first try ended before it had learned anything
    assert json.loads(record.read_text()) == [["vision", "b.mp4", "Cannot read 'b.mp4'."]]
    (tmp_path / "fusion" / "checkpoint-2").mkdir(parents=True)
    check_media(record, new)
    with pytest.raises(RunStopped, match="1 rows could be read when this run began and cannot now: Cannot read 'c"):
        check_media(record, new | {("audio", "c.wav"): "Cannot read 'c.wav'."})


def test_a_message_from_a_worker_comes_without_its_traceback(capsys):
    def main(arguments):
        try:
            raise RunStopped("a.wav: gone. Put it back.")
        except RunStopped:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_training(main, [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 1 and capsys.readouterr().err == "a.wav: gone. Put it back.\n"


def test_what_is_known_after_the_last_step_replaces_what_was(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl")
    for gain in (1.0, 1.0, 2.0):
        log.add_once(4, {"expert_gain": gain, "temperature": 1.0})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 4, "expert_gain": 2.0, "temperature": 1.0}
    ]
