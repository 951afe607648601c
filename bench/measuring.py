"""Functions that the benchmarks of training and answering share: models, rows, timing, memory and the JSON file."""

import json
import os
import platform
import random
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.schema import build_split
from egmf.training.language_models import resolve_language_model
from egmf.training.shrinking import published_config


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WIDTH = 64  # features per frame of voice or face
FRAMES = {"audio": 157, "vision": 32}  # frames of MELD's features
_WORDS = "what you said about the house that we found there is not what they told me when it was over".split()
_EMOTIONS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")


def build_rows(count: int, lines: tuple[int, int] = (0, 12)) -> Dataset:
    """Rows with dialogues as long as MELD's: `lines[0]` to `lines[1]` lines before the utterance, with voice and face.

    With SmolLM2's tokenizer the prompts have 97 tokens on average, with a standard deviation of 39. The first 600
    training prompts of MELD have 113 and 48.
    """
    generator = random.Random(0)
    frames = torch.Generator().manual_seed(0)

    def line(speaker: str) -> dict[str, str]:
        return {"speaker": speaker, "text": " ".join(generator.choices(_WORDS, k=generator.randint(1, 13)))}

    def row(index: int) -> dict:
        context = [line(generator.choice(("Ross", "Joey"))) for _ in range(generator.randint(*lines))]
        features = {
            f"{modality}_features": torch.randn(generator.randint(size // 4, size), WIDTH, generator=frames).numpy()
            for modality, size in FRAMES.items()
        }
        said = line("Rachel") | {"context": context, "language": "en"}
        emotion, score = generator.choice(_EMOTIONS), generator.randint(-30, 30) / 10
        return {"id": f"row_{index}", **said, "emotion": emotion, "sentiment": score, **features}

    return build_split(row(index) for index in range(count))


def build_llm(name: str, layers: int | None = None, **options) -> PreTrainedModel:
    """SmolLM2, or a published configuration with random weights and the given number of layers, in bfloat16."""
    if name == SMOLLM2:
        return AutoModelForCausalLM.from_pretrained(resolve_language_model(name), dtype=torch.bfloat16, **options)
    config = published_config(name)
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)


def take_turns(ways: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """The results of repeated calls of each function. The calls alternate, so that other load affects all equally."""
    found = {name: [] for name in ways}
    for repetition in range(repetitions):
        names = list(ways)
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            found[name].append(ways[name]())
    return found


def clock(device: torch.device) -> float:
    """CPU seconds on a CPU; on an accelerator wall seconds, when all that was launched before has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations create in the forward and backward pass."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.known.setdefault(tensor.untyped_storage(), True)  # existed before, e.g. weights
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = True
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.release, storage.nbytes())
        return outputs

    def release(self, size: int) -> None:
        self.held -= size


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of tensors that torch creates while `function` runs; earlier tensors do not count."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        function()
        return torch.accelerator.max_memory_allocated() - before
    with LiveBytes() as tracker:
        function()
    return tracker.peak


def machine(device: torch.device) -> dict[str, str | int | float]:
    """The hardware and software that the measurements depend on."""
    return {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def record(file: Path, section: str, figures: dict, device: torch.device | None = None) -> None:
    """Writes a section of the JSON file and keeps the others. Figures of an accelerator have sections of their own."""
    section += f" on {device.type}" if device is not None and device.type != "cpu" else ""
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    data[section] = figures
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
