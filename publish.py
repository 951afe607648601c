"""Publishes a trained run on the Hugging Face Hub.

    python publish.py runs/mosi --repo OWNER/NAME --dry_run
    python publish.py runs/mosi --repo OWNER/NAME [--private] [--license apache-2.0]
    python publish.py runs/mosi --repo OWNER/NAME --adapter_only
    python publish.py runs/own_clips --repo OWNER/NAME --space DIR [--example clip.mp4 "That is just great."]

Writes a new `hub/` folder in the run's folder each time. It contains the merged model in shards, or with
`--adapter_only` the trained weights (LoRA, the fusion, towers that the Hub does not have); the model's code and
processor; the recipe, as `recipe.json` and `recipe.yaml`; and a model card. The card lists the metrics, with split and
interval, from every `metrics.json` that `eval.py` has written below the run's folder for this model. Without such a
file it lists none.

Then uploads the folder in one commit. Repeat the command to resume an interrupted upload: files that the Hub already
has are not sent again. With `--dry_run` nothing is uploaded; the card is read back, and the Hub checks it if it can be
reached.

The weights are derived from the language model and the corpora. Without `--license`, the card gives the weights no
licence (`license: other`) and names both. With `--license`, the card states your licence, which you must be entitled
to give.

With `--space`, it writes the folder of a Space that shows the published model, and uploads nothing: a page of Gradio
for which the model is loaded from `--repo`. `hf upload OWNER/SPACE DIR --repo-type space` publishes it.
"""

import argparse
import re
import sys
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from egmf.commands import run_command
from egmf.publishing.repository import build_folder, check_repo_id, read_run, upload
from egmf.publishing.space import write_space


UNREACHABLE = (httpx2.TransportError, OfflineModeIsEnabled)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of train.py")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository on the Hub; made if need be")
    parser.add_argument("--adapter_only", action="store_true", help="without the language model's weights")
    parser.add_argument("--private", action="store_true", help="a repository that only its owner sees")
    parser.add_argument("--license", help="the Hub's name of the licence that the weights are put under")
    parser.add_argument("--base_model", metavar="ID", help="Hub id of the LLM, if the run was given a local folder")
    parser.add_argument(
        "--max_shard_size", type=_shard_size, default="5GB", help="largest file of weights; 5GB by default"
    )
    parser.add_argument("--space", type=Path, metavar="DIR", help="write a Space that shows the model, upload nothing")
    parser.add_argument(
        "--example",
        nargs=2,
        action="append",
        metavar=("FILE", "WORDS"),
        help="a clip that visitors of --space can try",
    )
    parser.add_argument("--transcriber", metavar="ID", help="speech recognition model of --space")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, check the card, upload nothing")
    args = parser.parse_args(arguments)
    for name in ("example", "transcriber"):
        if getattr(args, name) and args.space is None:
            parser.error(f"--{name}: got a value without --space, wanted both")
    for name in ("adapter_only", "private", "license", "max_shard_size", "dry_run"):
        if args.space is not None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: got a value with --space, which writes a page and no model, wanted one of them")
    return args


def _shard_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number with KB, MB, GB or TB")
    return text


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    check_repo_id(args.repo)
    if args.space is not None:
        run = read_run(args.run, args.base_model)  # there is a model to show
        if args.transcriber and "text" not in run.recipe["modalities"]:
            raise ValueError("transcriber: got one, wanted none: the model was trained without words")
        card = write_space(args.space, args.repo, args.example or [], args.transcriber)
        print(f"space: {args.space}, a page of Gradio {card.data.sdk_version} for {args.repo}")
        print(f"upload: hf upload OWNER/SPACE {args.space} --repo-type space")
        return
    if not args.dry_run and get_token() is None:
        raise ValueError("token: got none, wanted the one of `hf auth login`, or HF_TOKEN; --dry_run needs none")
    run = read_run(args.run, args.base_model)
    for reason in run.left_out:
        print(f"left out: {reason}")
    if args.adapter_only and run.base_model:
        try:
            run.base_revision = HfApi().model_info(run.base_model).sha
        except UNREACHABLE as error:
            if not args.dry_run:
                raise
            print(
                f"not checked: the Hub cannot be reached ({error}), so the adapter was not put onto {run.base_model}"
            )
    folder = build_folder(run, args.repo, args.license, args.adapter_only, args.max_shard_size)
    print(f"folder: {folder}, with {len(run.evaluations)} evaluations: {', '.join(run.evaluations) or 'no figures'}")
    if args.dry_run:
        try:
            ModelCard.load(folder / "README.md").validate()
            print("card: reads back as it was written, and the Hub finds it valid")
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder / 'README.md'}: the Hub refuses its front matter: {said}") from None
        except UNREACHABLE as error:
            print(
                f"card: reads back as it was written; the Hub, which could not be reached ({error}), has not seen it"
            )
        return
    commit = upload(folder, args.repo, args.private)
    print(f"published: {commit.commit_url}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
