"""Recognises the emotion or sentiment of the speakers in audio and video files, or of words alone.

    python predict.py MODEL clip.mp4 --text "That is just great."
    python predict.py MODEL --text "That is just great."
    python predict.py MODEL clips/ --recursive --output answers.csv
    python predict.py MODEL clips.csv --output answers.csv
    python predict.py MODEL talk.mp4 --segments talk.srt --output talk.vtt --plot talk.png
    python predict.py MODEL talk.mp4 --transcriber openai/whisper-small
    python predict.py MODEL clip.mp4 --speaker_clips clip.mp4 others/*.mp4
    accelerate launch --num_processes 8 predict.py MODEL clips/ --output answers.jsonl

An input is a file, a folder, a pattern or a URL. A recording that is longer than the clips of the model's training is
divided into windows that end at pauses; each gets an answer, and so does the whole. `--segments` divides it as
subtitles, a transcript of Whisper or a table with the columns start, end, text and speaker do.

The input may also be one table as for training (`corpora/table.py`), without labels. Each row gets an answer, with its
words, its speaker and the dialogue before it.

On a terminal it prints a table, to a file or a pipe one JSON line for each answer: label or score, probabilities,
median and interval of a score, gate weights, seconds decoded and warnings. `--output` writes a file. If a file cannot
be read, its `error` says why; the other files are still answered, and the exit status is 1.

A model trained with speaker adaptation needs `--speaker_clips`, clips of the one speaker of all files; the voice and
the pictures are normalised by their mean and deviation. For a table, these are the clips of each speaker in it.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import pipeline

from egmf.arguments import positive, positive_seconds
from egmf.commands import add_model, check_model, load_training_fields, loading_options, run_command
from egmf.prediction.answers import Answerer
from egmf.prediction.inputs import find_files
from egmf.prediction.outputs import SUFFIXES, Output
from egmf.prediction.segments import read_segments
from egmf.prediction.tables import fit_to_model, is_table, read_samples, recording_of
from egmf.processes import LONGEST_WAIT, default_workers, in_turns, silence_other_ranks


PLOTS = {".png", ".pdf", ".svg"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="audio or video file, folder, pattern, URL or table"
    )
    parser.add_argument("--recursive", action="store_true", help="also take the files in folders below a folder")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--text", help="what is said in the one file, or without any")
    words.add_argument("--segments", type=Path, metavar="FILE", help="parts of the recording: .srt, .vtt, .json, .csv")
    parser.add_argument("--speaker", help="who speaks in all files, if training named the speakers")
    parser.add_argument("--transcriber", metavar="MODEL", help="speech recognition model for files without words")
    parser.add_argument("--language", help="language that the transcriber hears; it detects it by default")
    parser.add_argument("--window", type=positive_seconds, help="longest part of a recording, in seconds")
    parser.add_argument(
        "--hop", type=positive_seconds, help="seconds between the starts of equal parts; ignores pauses"
    )
    parser.add_argument("--task", help="task to ask; by default the one the model was trained on")
    parser.add_argument("--speaker_clips", nargs="+", metavar="FILE", help="clips of the speaker of all files")
    parser.add_argument("--batch_size", type=positive, default=8, help="files or parts in the model at a time")
    parser.add_argument("--num_workers", type=positive, help="processes that decode clips ahead of the model")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where answers go: .jsonl, .csv or .vtt")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of a recording's answers over time")
    args = parser.parse_intermixed_args(arguments)  # files may also follow an option
    if args.output and args.output.suffix.lower() not in SUFFIXES:
        parser.error(f"--output: got {args.output}, wanted a file that ends in {', '.join(sorted(SUFFIXES))}")
    if args.plot and args.plot.suffix.lower() not in PLOTS:
        parser.error(f"--plot: got {args.plot}, wanted a file that ends in {', '.join(sorted(PLOTS))}")
    for name in ("output", "plot"):
        if (file := getattr(args, name)) and not file.absolute().parent.is_dir():
            parser.error(f"--{name}: got {file}, wanted a file in an existing folder")
    if args.language and not args.transcriber:
        parser.error("--language: got a value without --transcriber, wanted both")
    for first in ("segments", "transcriber"):
        if getattr(args, first) and (both := [name for name in ("window", "hop") if getattr(args, name)]):
            parser.error(f"--{both[0]}: got a value with --{first}, wanted one of them")
    if not args.inputs:
        if args.text is None:
            parser.error("INPUT: got nothing, wanted files, or --text without a file")
        for name in ("transcriber", "window", "hop", "speaker_clips", "plot"):
            if getattr(args, name):
                parser.error(f"--{name}: got a value without a file, wanted both")
    args.files = find_files(args.inputs, args.recursive)
    if tables := [name for name in args.files if is_table(name)]:
        if len(args.files) > 1:
            parser.error(f"INPUT: got {tables[0]} and {len(args.files) - 1} more, wanted a table alone, or files")
        for name in ("text", "segments", "window", "hop", "speaker_clips", "plot"):
            if getattr(args, name) is not None:
                parser.error(f"--{name}: got a value with the table {tables[0]}, wanted one of them")
        if args.output and args.output.suffix.lower() == ".vtt":
            parser.error(f"--output: got subtitles for the table {tables[0]}, wanted .jsonl or .csv")
    read = [*args.files, *(args.speaker_clips or ()), *filter(None, [args.segments])]
    for name in ("output", "plot"):
        if (file := getattr(args, name)) and file.exists() and any(_is_same(file, other) for other in read):
            parser.error(f"--{name}: got {file}, which is read, wanted another file")
    for name in ("text", "segments", "plot"):
        if getattr(args, name) is not None and len(args.files) > 1:
            hint = ", or a table with the words of each" if name == "text" else ""
            parser.error(f"--{name}: got {len(args.files)} files, wanted one{hint}")
    if args.output and args.output.suffix.lower() == ".vtt" and len(args.files) > 1:
        parser.error(f"--output: got {len(args.files)} files for subtitles, wanted one")
    return args


def _is_same(file: Path, other: str | Path) -> bool:
    return os.path.exists(other) and file.samefile(other)


def samples_of(args: argparse.Namespace) -> list[dict]:
    """One sample per file or per row of a table; without files, one of `--text` alone.

    Raises:
        ValueError: If the table cannot be read.
    """
    if args.files and is_table(args.files[0]):
        trained = load_training_fields(args.model, args.revision)
        mixed = (trained.get("corpora") or {}).get("table") or {}
        options = trained.get("corpus_options") if trained.get("corpus") == "table" else mixed.get("options")
        return read_samples(args.files[0], options or {}, args.speaker)
    named = {} if args.speaker is None else {"speaker": args.speaker}
    return [{"file": file, "text": args.text, **named} for file in args.files or [None]]


def share_files(answer: Answerer, samples: list[dict]) -> Iterator[dict]:
    """Yields the answers to all samples in their order; each of several processes answers its share.

    The parts of a recording are in one share.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield from (said for _, said in answer(samples))
        return
    groups = groupby(range(len(samples)), lambda place: recording_of(samples[place]) or place)
    shares = [list(group) for _, group in groups][state.process_index :: state.num_processes]
    places = [place for share in shares for place in share]
    own: dict[int, list[dict]] = {}
    for number, said in answer([samples[place] for place in places]):
        own.setdefault(places[number], []).append(said)
    found = {place: answers for share in gather_object([own]) for place, answers in share.items()}
    for place in range(len(samples)):
        yield from found[place]


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    segments = read_segments(args.segments) if args.segments else None
    check_model(args.model, args.revision)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    silence_other_ranks()
    samples = samples_of(args)
    with in_turns():  # transformers copies the model's code into its cache
        loaded = {"device": state.device, "trust_remote_code": True, **loading_options(args)}
        recognize = pipeline("affect-recognition", model=args.model, **loaded)
    options = {"task": args.task, "on_error": "report"}
    if args.transcriber:
        options |= {"transcriber": args.transcriber, "language": args.language}
    if args.speaker_clips:
        try:
            options["speaker_clips"] = recognize.speaker_center(args.speaker_clips)
        except (recognize.processor.media_error, ValueError) as error:
            raise ValueError(f"--speaker_clips: {error}") from None
    if args.task is not None and args.task not in recognize.processor.tasks:
        raise ValueError(f"task: got {args.task!r}, wanted one of {', '.join(recognize.processor.tasks)}")
    if "named" in samples[0]:
        samples = fit_to_model(recognize, samples, is_transcribed=bool(args.transcriber))
    plan = {"segments": segments, "window": args.window, "hop": args.hop}
    # On a CPU, decoding beside the model would only compete with it for the cores.
    workers = default_workers() * (state.device.type != "cpu") if args.num_workers is None else args.num_workers
    answers = share_files(Answerer(recognize, args.batch_size, plan, options, workers), samples)
    failed, shown = False, []
    if not state.is_main_process:
        list(answers)  # the main process writes them, and says what failed
        return 0
    with Output(args.output) as output:
        for answer in answers:
            failed |= answer["error"] is not None
            with tqdm.external_write_mode():
                output.write(answer)
            shown += [answer] if args.plot else []
    if args.plot:
        from egmf.evaluation.plots import plot_timeline  # takes long to import

        plot_timeline(shown, args.plot)
    return int(failed)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
