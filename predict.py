"""Recognises the emotion or sentiment of the speakers in audio and video files.

    python predict.py runs/avatars/model clip.mp4 --text "That is just great."
    python predict.py MODEL *.mp4 --transcripts transcripts.csv --task meld
    python predict.py MODEL clip.mp4 --speaker_clips clip.mp4 others/*.mp4
    accelerate launch --num_processes 8 predict.py MODEL *.mp4

On a terminal it prints a table. To a file or a pipe it prints one JSON line per file: label or score, probabilities,
median and interval of a score, gate weights, seconds decoded and warnings. If a file cannot be read, its `error` says
why; the other files are still answered, and the exit status is 1.

A model trained with speaker adaptation needs `--speaker_clips`, clips of the one speaker of all files; their mean is
subtracted from the voice and the pictures.

Other processes decode the next files while the model answers. Several processes (`accelerate launch`) share the files,
and the main process prints all answers in the order of the files.

A transcripts file has the columns `file` (name or path), `text` and optionally `speaker`; see
`egmf/data/transcripts.py` for its formats.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import pipeline

from egmf.arguments import not_negative, positive
from egmf.commands import check_model, run_command
from egmf.data.transcripts import match_transcripts
from egmf.processes import default_workers, in_turns, silence_other_ranks


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio or video file")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--text", help="what is said in the file")
    words.add_argument("--transcripts", type=Path, metavar="FILE.csv", help="what is said, by file")
    parser.add_argument("--task", help="task to ask; by default the one the model was trained on")
    parser.add_argument("--speaker_clips", nargs="+", metavar="FILE", help="clips of the speaker of all files")
    parser.add_argument("--batch_size", type=positive, default=8, help="files that go through the model at a time")
    parser.add_argument(
        "--num_workers",
        type=not_negative,
        default=default_workers(),
        help="processes that decode; by default one a core",
    )
    parsed = parser.parse_args(arguments)
    if parsed.text is not None and len(parsed.files) > 1:
        parser.error(f"--text: got {len(parsed.files)} files, wanted one; see --transcripts")
    return parsed


def samples_of(args: argparse.Namespace) -> list[dict]:
    """One sample per file, with its transcript.

    Raises:
        ValueError: If the transcripts cannot be read or a file has none.
    """
    if args.transcripts is None:
        return [{"file": file, "text": args.text} for file in args.files]
    words = match_transcripts(args.transcripts, args.files)
    return [{"file": file, **said} for file, said in zip(args.files, words, strict=True)]


def table_row(answer: dict) -> str:
    """An answer as one line of the table."""
    if answer["error"]:
        return f"{answer['file']:32}  {answer['error']}"
    if answer.get("label") is not None:
        best = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:3]
        words = ", ".join(f"{label} {100 * probability:.0f} %" for label, probability in best)
    else:
        low, high = answer["interval"]
        words = f"{answer['score']:+.2f} ({low:+.1f} to {high:+.1f})"
    seconds = "-" if answer["seconds"] is None else f"{answer['seconds']:.1f} s"
    return f"{answer['file']:32}  {words:48}  {seconds:>8}  {'; '.join(answer['warnings'])}".rstrip()


def answers_of(recognize, samples: list[dict], size: int, **options) -> Iterator[dict]:
    """Yields the samples' answers in order. Several processes share the batches of `size`, and all get all answers."""
    state = PartialState()
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    share = batches[state.process_index :: state.num_processes]
    if hasattr(recognize, "prepare"):
        answers = recognize(chain.from_iterable(share), batch_size=size, **options)
    else:  # the own code of an older checkpoint decodes in this process
        del options["num_workers"]
        answers = chain.from_iterable(recognize(batch, batch_size=size, **options) for batch in share)
    if state.num_processes == 1:
        yield from answers
        return
    for _ in range(0, len(batches), state.num_processes):
        yield from gather_object(list(islice(answers, size)))


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    samples = samples_of(args)
    check_model(args.model)
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    silence_other_ranks()
    with in_turns():  # transformers copies the model's code into its cache
        recognize = pipeline("affect-recognition", model=args.model, trust_remote_code=True, device=device)
    options = {"task": args.task, "on_error": "report", "num_workers": args.num_workers}
    if args.speaker_clips:
        if not hasattr(recognize, "speaker_center"):
            raise ValueError(f"--speaker_clips: got {args.model}, wanted a model whose code has speaker adaptation")
        try:
            options["speaker_clips"] = recognize.speaker_center(args.speaker_clips)
        except (recognize.processor.media_error, ValueError) as error:
            raise ValueError(f"--speaker_clips: {error}") from None
    for_people, failed = sys.stdout.isatty(), False
    prints = PartialState().is_main_process
    progress = tqdm(total=len(samples), unit="file", disable=None if prints and len(samples) > 1 else True)
    found = answers_of(recognize, samples, args.batch_size, **options)
    for sample, answer in zip(samples, found, strict=True):
        answer = {"file": os.fspath(sample["file"]), **answer}
        failed |= answer["error"] is not None
        progress.update()
        with progress.external_write_mode():
            line = table_row(answer) if for_people else json.dumps(answer, ensure_ascii=False)
            # A file name may not be valid Unicode; JSON readers decode the escape to the same name.
            if prints:
                print(line.encode(errors="backslashreplace").decode(), flush=True)
    progress.close()
    return int(failed)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
