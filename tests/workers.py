"""Functions run by `test_scaling.py` in two processes: `torchrun --nproc_per_node 2 tests/workers.py NAME FOLDER ...`.

Each process writes its results to FOLDER/RANK.json.
"""

import atexit
import json
import os
import random
import sys
from pathlib import Path

import torch
from accelerate import PartialState, state
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import TrainingArguments, WhisperFeatureExtractor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from egmf.commands import run_command  # noqa: E402
from egmf.data.tower_cache import TowerCache  # noqa: E402
from egmf.processing_egmf import EGMFProcessor  # noqa: E402
from egmf.training.batches import MixtureTrainer  # noqa: E402
from egmf.training.language_models import byte_tokenizer  # noqa: E402


def write(folder: str, found) -> None:
    (Path(folder) / f"{PartialState().process_index}.json").write_text(json.dumps(found))


class Recorder(torch.nn.Module):
    """A model that learns nothing. It records rows and draws random numbers like dropout: more for longer batches."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.rows, self.drawn = [], []

    def forward(self, row: torch.Tensor, length: torch.Tensor):
        self.rows.append([row.tolist(), length.tolist()])
        self.drawn.append(torch.rand(int(length.sum()))[0].item())
        return {"loss": self.weight * 0.0}


def order(folder: str) -> None:
    """Rows and random numbers of two epochs grouped by length, and the rows of a run that resumes after step 10."""
    rng = random.Random(0)
    rows = Dataset.from_list([{"row": row, "length": rng.randint(1, 9)} for row in range(37)])
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=10,
        remove_unused_columns=False,
        disable_tqdm=True,
    )

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in ("row", "length")}

    model, resumed = Recorder(), Recorder()
    MixtureTrainer(model, arguments, data_collator=collate, train_dataset=rows).train()
    checkpoint = str(Path(folder) / "checkpoint-10")
    MixtureTrainer(resumed, arguments, data_collator=collate, train_dataset=rows).train(checkpoint)
    write(folder, {"rows": model.rows, "drawn": model.drawn, "resumed": resumed.rows})


def cache(folder: str, *paths: str) -> None:
    """The cache entries that this process made, and the errors that it knows."""
    PartialState(cpu=True)
    processor = EGMFProcessor(byte_tokenizer(), feature_extractor=WhisperFeatureExtractor(feature_size=8))
    made = []
    kept = TowerCache(None, processor, (), ["audio"], folder=Path(folder) / "cache")
    writing = kept._write
    kept._write = lambda entry, tensors: (made.append(entry.name), writing(entry, tensors))
    kept.fill([{"audio": path} for path in paths], torch.device("cpu"))
    errors = {path: error for (_, path), error in kept.errors.items()}
    write(folder, {"made": made, "errors": errors, "here": [kept.has("audio", path) for path in paths]})


def divided(*arguments: str) -> None:
    """Run train.py under FSDP2 or DeepSpeed on the CPU.

    Accelerate shards models with FSDP2 only on GPUs, so GPUs are simulated for these processes. DeepSpeed would
    compile operations of its own, which need a compiler and are not used.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()
        train.main(list(arguments))
        return
    begin = state.AcceleratorState.__init__

    def on_gpus(self, *args, **kwargs):
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    state.AcceleratorState.__init__ = on_gpus
    train.main(list(arguments))


def left_its_group() -> None:
    """Fails a process that ends inside its group: torch aborts some of them."""
    if torch.distributed.is_initialized():
        print("the process group is still open", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atexit.register(left_its_group)
    workers = {"order": order, "cache": cache, "divided": divided}
    run_command(lambda arguments: workers[arguments[0]](*arguments[1:]), sys.argv[1:])
