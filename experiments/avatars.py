"""Trains and tests the Avatars model, single modalities and ablations of the experts, and writes the tables.

    python -m experiments.avatars run --corpus_dir DIR --runs_dir RUNS_DIR --seeds 1111 2222 3333
    python -m experiments.avatars collect RUNS_DIR
    python -m experiments.avatars render

`run` trains the towers of each seed with `recipes/avatars_towers.yaml` into `RUNS_DIR/towers_<seed>/`. With these
towers it trains every variant of `recipes/avatars_smollm2.yaml` into `RUNS_DIR/<variant>_<seed>/` and tests both
tasks. Finished steps are skipped. `collect` adds these folders to the runs in results/avatars.json, which may come
from other machines. `render` reads only the JSON file and also fills the table in README.md.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from corpora.avatars import KINDS, ceiling, group_of
from egmf.commands import run_command
from egmf.evaluation.robustness import summarize
from egmf.tables import mean_and_deviation, table
from experiments import running
from experiments.pages import EARLIER, RESULTS, check_version, read_predictions, write_page
from experiments.running import VARIANTS, Step, evaluation, run_steps, training


RECIPES = {"towers": "recipes/avatars_towers.yaml", "model": "recipes/avatars_smollm2.yaml"}
TASKS = {"avatars": "accuracy", "avatars_score": "mae"}
ANSWER = {"avatars": "distribution", "avatars_score": "median"}
# The variants and their names in the tables.
NAMES = {variant: name for variant, name in running.NAMES.items() if variant not in ("adapted", "mean")}
# Variants that are also tested with missing modalities, and the conditions of this test (`robustness.py`).
TESTED_MISSING = ("full", "dropout")
CONDITIONS = ("A", "V", "T", "AV", "AT", "VT", "AVT", "mean")


def steps_of(variant: str, seed: int, corpus_dir: str, runs_dir: Path) -> list[Step]:
    """The steps of a run: training, then an evaluation for each task. The towers are only trained."""
    folder, towers = runs_dir / f"{variant}_{seed}", runs_dir / f"towers_{seed}" / "towers"
    if variant == "towers":
        made = "towers/vision/preprocessor_config.json"
        return [training(folder, RECIPES["towers"], corpus_dir, seed, made=made)]
    fields = ["--audio_tower", str(towers / "audio"), "--vision_tower", str(towers / "vision"), *VARIANTS[variant]]
    tests = [(f"{task}/metrics.json", ["--task", task, "--split", "test"]) for task in TASKS]
    if variant in TESTED_MISSING:
        tests.append(("missing/mmin.json", ["--task", "avatars", "--split", "test", "--robustness", "mmin"]))
    evaluations = [evaluation(folder, made, "avatars", corpus_dir, *options) for made, options in tests]
    return [training(folder, RECIPES["model"], corpus_dir, seed, *fields), *evaluations]


def run(corpus_dir: str, runs_dir: Path, variants: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for variant in ["towers", *variants]:
            steps = steps_of(variant, seed, corpus_dir, runs_dir)
            run_steps(runs_dir / f"{variant}_{seed}", steps, {corpus_dir: "DIR", str(runs_dir): "RUNS_DIR"})


def collect(runs_dir: Path, known: list[dict]) -> list[dict]:
    """Adds the evaluated runs of a folder to the known ones, with both tasks' metrics over all clips and by kind."""
    runs = {(run["variant"], run["seed"]): run for run in known}
    for folder in sorted(path for path in runs_dir.iterdir() if path.is_dir()):
        variant, _, seed = folder.name.rpartition("_")
        if variant not in NAMES or not all((folder / task / "metrics.json").exists() for task in TASKS):
            print(f"{folder}: not evaluated, left out")
            continue
        entry = {"variant": variant, "seed": int(seed), "command": (folder / "command.txt").read_text().splitlines()}
        for task, measure in TASKS.items():
            report = json.loads((folder / task / "metrics.json").read_text(encoding="utf-8"))
            groups = {"all": report["answers"]} | report["groups"]
            entry["samples"] = report["samples"]
            for answer in ("greedy", ANSWER[task]):
                figures = {group: round(answers[answer][measure], 6) for group, answers in groups.items()}
                entry[f"{measure}_{answer}"] = figures
            entry[f"unparsable_{task}"] = report["answers"]["greedy"]["unparsable"]
        entry["experts"] = expert_weights(folder / "avatars" / "predictions.jsonl")
        if (folder / "missing" / "mmin.json").exists():
            report = json.loads((folder / "missing" / "mmin.json").read_text(encoding="utf-8"))
            conditions = summarize(report, "classification")
            entry["missing"] = {name: round(conditions[name]["accuracy"][0], 6) for name in CONDITIONS}
        else:
            entry["command"] = [line for line in entry["command"] if "mmin" not in line]
        runs[entry["variant"], entry["seed"]] = entry
    order = list(NAMES)
    return sorted(runs.values(), key=lambda entry: (order.index(entry["variant"]), entry["seed"]))


def expert_weights(predictions: Path) -> dict[str, dict[str, float]]:
    """The experts' mean gate weights for each kind of clip: {"brief": {"local": 0.6, ...}, ...}."""
    by_kind: dict[str, list[dict[str, float]]] = {}
    for row_id, row in read_predictions(predictions).items():
        by_kind.setdefault(group_of(row_id), []).append(row["gate_weights"]["expert"])
    return {
        kind: {expert: round(float(np.mean([gate[expert] for gate in gates])), 6) for expert in gates[0]}
        for kind, gates in by_kind.items()
    }


def table_by_variant(runs: list[dict], figure: str, scale: float, digits: int, *last: list[str]) -> str:
    """A table of a metric over all clips and by kind, or by condition; one row per variant that has it, and `last`."""
    runs = [entry for entry in runs if figure in entry]
    groups = list(runs[0][figure]) if runs else []
    rows = []
    for variant, name in NAMES.items():
        own = [entry for entry in runs if entry["variant"] == variant]
        if own:
            cells = [mean_and_deviation([scale * entry[figure][group] for entry in own], digits) for group in groups]
            rows.append([name, str(len(own)), *cells])
    return table(["model", "seeds", *groups], [*rows, *last])


def main_table(runs: list[dict]) -> str:
    return table_by_variant(runs, "accuracy_distribution", 100, 1)


def render(runs: list[dict]) -> str:
    """The text of results/avatars.md."""
    seen = {"text": ("text",), "audio": ("audio",), "vision": ("vision",), "all three": ("text", "audio", "vision")}
    limits = []
    for name, modalities in seen.items():
        best = ceiling(modalities)
        limits.append([name, *(f"{100 * best[group]:.1f}" for group in ("all", *KINDS))])
    seeds = sorted({entry["seed"] for entry in runs})
    unparsable = sum(entry[f"unparsable_{task}"] for entry in runs for task in TASKS)
    parts = [
        "# Avatars: test results",
        f"{runs[0]['samples']} generated clips of people, things and sentences that training does not have, six kinds "
        "of four emotions ([`corpora/avatars`](../corpora/avatars/__init__.py) says what the kinds are). One model "
        "answers both tasks: SmolLM2-135M-Instruct with LoRA. The towers of a seed are trained once, with all experts "
        "and modalities, and every variant of that seed reads the same frozen ones. "
        f"Seeds {', '.join(map(str, seeds))}; mean ± standard deviation where there are several.",
        *([EARLIER] if any(entry.get("earlier") for entry in runs) else []),
        "## Emotion: accuracy in percent",
        "The most probable legal answer of `score_labels()`.",
        main_table(runs),
        "The text of plain `generate()`; "
        f"{unparsable} answers of all runs and both tasks together were not a legal answer.",
        table_by_variant(runs, "accuracy_greedy", 100, 1),
        "Highest accuracy that the corpus's rules allow with these modalities (`ceiling`):",
        table(["seen", "all", *KINDS], limits),
        "## Sentiment score: mean absolute error",
        "Scores run from -1 to 1. The median of the distribution.",
        table_by_variant(runs, "mae_median", 1, 3),
        *gate_section(runs),
        *missing_section(runs),
        "## Commands",
        "```bash\n" + "\n".join(commands_text(runs)) + "\n```",
        "Made from `results/avatars.json` by `python -m experiments.avatars render`.",
    ]
    return "\n\n".join(parts) + "\n"


def gate_section(runs: list[dict]) -> list[str]:
    """The section on the full model's gate weights by kind of clip; empty if there is no such run."""
    full = [entry["experts"] for entry in runs if entry["variant"] == "full"]
    if not full:
        return []
    kinds = list(full[0])
    rows = [
        [expert, *(mean_and_deviation([100 * weights[kind][expert] for weights in full], 0) for kind in kinds)]
        for expert in full[0][kinds[0]]
    ]
    text = (
        f"The whole model, {len(full)} seeds. These weights say what the gate mixed, not why the model answered; the "
        "ablations above show what each expert contributes."
    )
    return ["## Weights of the experts in the gate, in percent", text, table(["expert", *kinds], rows)]


def missing_section(runs: list[dict]) -> list[str]:
    """The section on runs that were tested with missing modalities; empty if there is none."""
    letters = {"A": "audio", "V": "vision", "T": "text"}
    best = {name: ceiling(tuple(letters[letter] for letter in name))["all"] for name in CONDITIONS if name != "mean"}
    best["mean"] = float(np.mean([value for name, value in best.items() if name != "AVT"]))
    limit = ["the best that can be done", "", *(f"{100 * best[name]:.1f}" for name in CONDITIONS)]
    figures = table_by_variant(runs, "missing", 100, 1, limit)
    text = (
        "The six conditions of MMIN ([`robustness.py`](../egmf/evaluation/robustness.py)): every clip with these "
        "modalities alone (A audio, V vision, T text), by one model. *AVT* is the intact clip, *mean* that of the six "
        "conditions. The first model always saw all three modalities in training; the second one's training hid each "
        "modality of a sample with a probability of 0.2. The last row is what the corpus's rules allow (`ceiling`)."
    )
    tested = any("missing" in entry for entry in runs)
    return ["## Missing modalities: accuracy in percent", text, figures] if tested else []


def commands_text(runs: list[dict]) -> list[str]:
    """The commands of the towers and of each run, with comments."""
    lines = []
    for seed in sorted({entry["seed"] for entry in runs}):
        [(command, _)] = steps_of("towers", seed, "DIR", Path("RUNS_DIR"))
        lines += [f"# towers, seed {seed}", shlex.join(["python", *command])]
    for entry in runs:
        lines += [f"# {entry['variant']}, seed {entry['seed']}", *entry["command"]]
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and test")
    runner.add_argument("--corpus_dir", required=True)
    runner.add_argument("--runs_dir", type=Path, required=True)
    runner.add_argument("--variants", nargs="*", choices=NAMES, default=list(NAMES))
    runner.add_argument("--seeds", type=int, nargs="+", default=[1111, 2222, 3333])
    commands.add_parser("collect", help="runs -> results/avatars.json").add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/avatars.json -> results/avatars.md and README.md")
    args = parser.parse_args(arguments)
    file = RESULTS / "avatars.json"
    if args.command == "run":
        run(args.corpus_dir, args.runs_dir, args.variants, args.seeds)
    elif args.command == "collect":
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        check_version(file, known)
        file.write_text(json.dumps(collect(args.runs_dir, known), indent=1) + "\n", encoding="utf-8")
    else:
        runs = json.loads(file.read_text(encoding="utf-8"))
        write_page("avatars", render(runs), main_table(runs))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
