"""Converts the published files of a benchmark to sharded parquet, which `load_corpus`, training and evaluation read.

    python -m corpora mosei MOSEI/Processed/unaligned_50.pkl --out corpora/mosei
    python -m corpora meld MELD --corpus_options '{"media": "MELD/clips"}' --out corpora/meld
    python train.py RECIPE --corpus_dir corpora/mosei

Prints a report: rows and labels of each split, sequence lengths, non-finite values, and skipped rows with the reason.
Rejects files whose number of rows, labels or feature sizes differ from the published ones. `--push_to_hub` uploads the
folder as a private dataset to the Hub; the visibility of an existing dataset does not change. You must check that the
terms of the corpus allow the upload.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from huggingface_hub import HfApi

from corpora.convert import CONVERTIBLE, convert, describe
from corpora.converted import LOCAL
from egmf.commands import run_command


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m corpora", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CONVERTIBLE)
    parser.add_argument("source", type=Path, help="folder or file with the published files, see corpora/NAME.py")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument("--corpus_options", type=json.loads, default={}, help="JSON, see `load` in corpora/NAME.py")
    parser.add_argument("--allow_mismatch", action="store_true", help="convert files that are not the published ones")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload the folder as a private dataset of this name")
    return parser.parse_args(arguments)


def push(folder: Path, repository: str) -> str:
    """Upload a converted folder, except for the local path of the clips. Returns the URL of the dataset."""
    api = HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder, ignore_patterns=[LOCAL])
    return str(address)


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    try:
        report = convert(args.name, args.source, args.out, args.allow_mismatch, **args.corpus_options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(report))
    print(f"corpus: {args.out}")
    if args.push_to_hub:
        try:
            print(f"dataset: {push(args.out, args.push_to_hub)}")
        except Exception as error:  # the client raises many types; the folder is complete in any case
            retry = f"hf upload {args.push_to_hub} {args.out} --repo-type dataset --exclude {LOCAL}"
            print(f"error: {args.out} is written, but the upload failed: {error}\nretry: {retry}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run_command(main, sys.argv[1:])
