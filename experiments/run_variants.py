"""Trains and evaluates the variants of a recipe that the result tables compare.

    python -m experiments.run_variants recipes/mosi_smollm2.yaml --corpus_dir DIR --runs_dir runs/mosi \
        --variants full text --seeds 1111 2222 3333

The runs are executed one after the other. Finished runs are skipped, and an interrupted run resumes from its last
checkpoint. The folder `RUNS_DIR/VARIANT_SEED` of a run also contains its commands; `make_tables.py collect` reads
these folders. Other arguments (`--language_model Qwen/Qwen3-8B`) are passed to `train.py`. For a mixture, each corpus
is evaluated in a folder with its name.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import yaml


# The changes of each variant to the recipe.
VARIANTS = {
    "full": [],
    "text": ["--modalities", "text"],
    "audio": ["--modalities", "audio"],
    "vision": ["--modalities", "vision"],
    "no_local": ["--experts", "semantic", "global"],
    "no_semantic": ["--experts", "local", "global"],
    "no_global": ["--experts", "local", "semantic"],
    "flat": ["--gating", "flat"],
    "mean": ["--gating", "mean"],
    "no_readout": ["--expert_gain", "0"],
    "adapted": ["--speaker_adaptation", "true", "--speaker_mixing", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--corpus_dir", required=True)
    parser.add_argument("--runs_dir", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full", "text"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1111, 2222, 3333, 4444, 5555])
    args, more = parser.parse_known_args()
    fields = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    tests = {"test": (fields.get("corpus"), args.corpus_dir)}
    if "corpora" in fields:
        tests = {name: (name, str(Path(args.corpus_dir) / name)) for name in fields["corpora"]}
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.runs_dir / f"{variant}_{seed}"
            if all((folder / test / "metrics.json").exists() for test in tests):
                print(f"{folder}: finished already")
                continue
            train = ["train.py", args.recipe, "--corpus_dir", args.corpus_dir, "--output_dir", folder, "--seed", seed]
            commands = [["python", *map(str, [*train, *VARIANTS[variant], *more])]]
            for test, (corpus, source) in tests.items():
                command = ["eval.py", folder / "model", "--corpus", corpus, "--corpus_dir", source]
                commands.append(["python", *map(str, command), "--split", "test", "--output", str(folder / test)])
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(shlex.join(command) + "\n" for command in commands)
            (folder / "command.txt").write_text(lines.replace(f"--corpus_dir {args.corpus_dir}", "--corpus_dir DIR"))
            for command in commands:
                print(shlex.join(command), flush=True)
                subprocess.run([sys.executable, *command[1:]], check=True)


if __name__ == "__main__":
    main()
