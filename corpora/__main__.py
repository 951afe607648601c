"""Prepares corpora: converts the published files of a benchmark, or recognises the words of your own clips.

    python -m corpora mosei MOSEI/Processed/unaligned_50.pkl --out DIR/mosei
    python -m corpora meld MELD --corpus_options '{"media": "MELD/clips"}' --out DIR/meld
    python train.py RECIPE --corpus_dir DIR/mosei
    python -m corpora table clips.csv --transcriber openai/whisper-small --out clips_with_words.csv

A benchmark becomes sharded parquet, which `load_corpus`, training and evaluation read. Prints a report: rows and
labels of each split, sequence lengths, non-finite values, and skipped rows with the reason. Rejects files whose number
of rows, labels or feature sizes differ from the published ones. `--push_to_hub` uploads the folder as a private
dataset to the Hub; the visibility of an existing dataset does not change. You must check that the terms of the corpus
allow the upload.

A table is copied, with the recognised words in the rows that had none (`corpora/words.py`). What was recognised is
cached; an interrupted call may be repeated.
"""

import argparse
import logging
import sys
from pathlib import Path

from huggingface_hub import HfApi

from corpora.clips import split_part
from corpora.convert import CONVERTIBLE, convert, describe
from corpora.converted import LOCAL, SHARDS
from corpora.words import add_words
from egmf.arguments import mapping
from egmf.commands import run_command
from egmf.data.clips import load_row_media
from egmf.transcription_egmf import Transcriber


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m corpora", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*CONVERTIBLE, "table"))
    parser.add_argument("source", type=Path, help="folder or file with the published files, see corpora/NAME.py")
    parser.add_argument("--out", required=True, type=Path, help="output folder; of a table, the new file")
    parser.add_argument("--corpus_options", type=mapping, default={}, help="JSON, see `load` in corpora/NAME.py")
    parser.add_argument("--allow_mismatch", action="store_true", help="convert files that are not the published ones")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload the folder as a private dataset of this name")
    parser.add_argument("--transcriber", metavar="MODEL", help="speech recognition model for a table's clips")
    parser.add_argument("--language", help="language that the transcriber hears; it detects it by default")
    args = parser.parse_args(arguments)
    if (args.name == "table") != bool(args.transcriber):
        parser.error("--transcriber: wanted with a table, and only there")
    if args.language and not args.transcriber:
        parser.error("--language: got a value without --transcriber, wanted both")
    if args.name == "table" and (args.allow_mismatch or args.push_to_hub):
        parser.error("--allow_mismatch, --push_to_hub: got one with a table, wanted none")
    return args


def push(folder: Path, repository: str) -> str:
    """Upload a converted folder in place of an earlier one, without the local path of the clips. Returns its URL."""
    api = HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    chosen = {"ignore_patterns": [LOCAL], "delete_patterns": [SHARDS]}  # there may have been more shards
    api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder, **chosen)
    return str(address)


def recognize_table(args: argparse.Namespace) -> None:
    """Writes the table with recognised words, and says what was done."""
    columns = args.corpus_options.get("columns")
    if unknown := args.corpus_options.keys() - {"columns"}:
        raise ValueError(f"corpus_options: got {', '.join(sorted(unknown))}, wanted columns")
    transcriber = Transcriber(args.transcriber, args.language)
    transcriber.load()  # a wrong model is no error of a clip

    def recognize(name: str) -> dict:
        if split_part(name)[0] == name:
            return transcriber(name)
        sound = load_row_media(transcriber, "audio", name).audio
        return transcriber({"array": sound.samples, "sampling_rate": sound.sampling_rate})

    done = add_words(args.source, args.out, recognize, columns)
    for line in done.wrong:
        print(f"without words: {line}", file=sys.stderr)
    print(f"{done.rows} rows: words recognised in {done.recognized}, nothing heard in {done.silent}")
    print(f"table: {args.out}")


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    if args.name == "table":
        recognize_table(args)
        return 0
    try:
        report = convert(args.name, args.source, args.out, args.allow_mismatch, **args.corpus_options)
    except (ValueError, OSError) as error:  # also those of the libraries that read the files
        raise ValueError(error) from error
    print(describe(report))
    print(f"corpus: {args.out}")
    if args.push_to_hub:
        try:
            print(f"dataset: {push(args.out, args.push_to_hub)}")
        except Exception as error:  # the client raises many types; the folder is complete in any case
            retry = f"hf upload {args.push_to_hub} {args.out} --repo-type dataset --private"
            retry += f" --exclude {LOCAL} --delete '{SHARDS}'"
            print(f"error: {args.out} is written, but the upload failed: {error}\nretry: {retry}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run_command(main, sys.argv[1:])
