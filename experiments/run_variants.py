"""Trains and evaluates the variants of a recipe that the result tables compare.

    python -m experiments.run_variants recipes/mosi_smollm2.yaml --corpus_dir DIR --runs_dir runs/mosi \
        --variants full text --seeds 1111 2222 3333

The runs are executed one after the other. Finished runs are skipped, and an interrupted run resumes from its last
checkpoint. The folder `RUNS_DIR/VARIANT_SEED` of a run also contains its commands; `make_tables.py collect` reads
these folders. Other arguments (`--language_model Qwen/Qwen3-8B`) are passed to `train.py`. For a mixture, each corpus
is evaluated in a folder with its name.
"""

import argparse
from pathlib import Path

import yaml

from experiments.running import VARIANTS, run_steps


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
            train = ["train.py", str(args.recipe), "--corpus_dir", args.corpus_dir, "--output_dir", str(folder)]
            steps = [([*train, "--seed", str(seed), *VARIANTS[variant], *more], "model/recipe.json")]
            for name, (corpus, source) in tests.items():
                test = ["eval.py", str(folder / "model"), "--corpus", corpus, "--corpus_dir", source]
                steps.append(([*test, "--split", "test", "--output", str(folder / name)], f"{name}/metrics.json"))
            run_steps(folder, steps, {args.corpus_dir: "DIR", str(args.runs_dir): "RUNS_DIR"})


if __name__ == "__main__":
    main()
