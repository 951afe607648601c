"""Measures clips per second of the pipeline: end to end, of decoding alone, and of the model alone.

    python -m bench.clips MODEL [--device cuda] [--num_workers 8] [--batch_size 16] [--clips 64]

Each clip is a generated h264 + aac mp4 file of 4 seconds, the one of `bench.media`. *Decoding* is the pipeline's
preprocessing in its workers: decoding, the towers' preprocessors and the prompt. *Model* is the rest: towers, fusion
and LLM, of batches that are in memory already. *Together* is the pipeline. With decoding in other processes, it should
be nearly as fast as the slower of the two. Times are wall-clock times, until the device has finished.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import pipeline

from bench.measuring import take_turns
from bench.media import write_clip
from egmf.arguments import not_negative, positive
from egmf.processes import available_cores


SECONDS = 4
REPETITIONS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a trained model with towers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--num_workers", type=not_negative, default=available_cores(), help="processes that decode")
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--clips", type=positive, default=64)
    return parser.parse_args()


def ways_of(recognize, samples: list[dict], num_workers: int, batch_size: int) -> dict[str, Callable[[], object]]:
    """The three measured functions."""
    options = {"num_workers": num_workers, "batch_size": batch_size}
    prepared = list(recognize.prepare(samples, **options))

    def decode() -> None:
        for _ in recognize.prepare(samples, **options):
            pass

    def answer() -> None:
        for batch in prepared:
            recognize.postprocess(recognize.forward(dict(batch)))

    return {"together": lambda: recognize(samples, **options), "decoding": decode, "model": answer}


def timed(function: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    args = parse_arguments()
    recognize = pipeline("affect-recognition", model=args.model, trust_remote_code=True, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        clip = str(Path(folder) / "clip.mp4")
        write_clip(clip, SECONDS)
        samples = [{"file": clip, "text": "that is just great"}] * args.clips
        ways = ways_of(recognize, samples, args.num_workers, args.batch_size)
        found = take_turns({name: lambda f=f: timed(f, args.device) for name, f in ways.items()}, 1 + REPETITIONS)
    rates = {name: statistics.median(args.clips / seconds for seconds in times[1:]) for name, times in found.items()}
    slower = min(rates["decoding"], rates["model"])
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; {args.num_workers} workers, batches of {args.batch_size}, {args.clips} clips of {SECONDS} s")
    print(", ".join(f"{name} {rate:.1f} clips/s" for name, rate in rates.items()))
    print(f"together: {rates['together'] / slower:.2f} of the slower of the two")
    if args.device == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
