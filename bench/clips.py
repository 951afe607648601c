"""Measures how many clips a second `predict.py` answers, against decoding alone and the model alone.

    python -m bench.clips runs/quickstart/model runs/quickstart/clips/test --device cuda --num_workers 16

The three ways take turns. Wall time counts, since decoding in other processes and the model are to overlap: the goal
is 0.9 of the slower of the two on a GPU. A first, unmeasured turn starts the device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import pipeline

from bench.measuring import machine, take_turns
from egmf.arguments import positive
from egmf.prediction.answers import Answerer
from egmf.prediction.inputs import find_files


def clips_per_second(count: int, function: Callable[[], object]) -> Callable[[], float]:
    """A function that runs another one on `count` clips, and returns clips per second."""

    def measured() -> float:
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return count / (time.perf_counter() - start)

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("clips", help="folder with clips")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_workers", type=positive, default=2, help="processes that decode")
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--repetitions", type=positive, default=5)
    args = parser.parse_args()
    recognize = pipeline("affect-recognition", model=args.model, trust_remote_code=True, device=args.device)
    # Words, because without them a long clip is divided.
    samples = [{"file": file, "text": "so it is"} for file in find_files([args.clips], False)]
    answer = Answerer(recognize, args.batch_size, {}, {}, args.num_workers)
    decoded = [recognize.preprocess(sample) for sample in samples]
    batches = [decoded[start : start + args.batch_size] for start in range(0, len(decoded), args.batch_size)]
    asked = recognize._parameters()[2]

    def decode() -> None:
        options = {"num_workers": args.num_workers, "batch_size": args.batch_size}
        for batch in DataLoader(samples, **options, collate_fn=lambda some: [*map(recognize.preprocess, some)]):
            assert all(one["error"] is None for one in batch)

    def ask() -> None:
        for batch in batches:
            recognize._answer(batch, **asked)

    ways = {"decoding alone": decode, "the model alone": ask, "both, as in predict.py": lambda: list(answer(samples))}
    measured = {name: clips_per_second(len(samples), way) for name, way in ways.items()}
    take_turns(measured, 1)
    found = take_turns(measured, args.repetitions)
    print(f"{machine(recognize.device)}, {len(samples)} clips of {Path(args.clips).name}, {args.num_workers} workers")
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f} clips/s ({min(values):.1f} to {max(values):.1f})")
    shares = [both / min(alone) for *alone, both in zip(*found.values(), strict=True)]
    print(f"both, to the slower one: {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
