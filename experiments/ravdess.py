"""Trains and tests the six folds of RAVDESS, and writes results/ravdess.json and results/ravdess.md.

    python -m experiments.ravdess run --corpus_dir DIR --audio_tower MODEL --runs_dir RUNS_DIR --seeds 1111
    python -m experiments.ravdess collect RUNS_DIR
    python -m experiments.ravdess render

`run` trains and evaluates `recipes/ravdess_smollm2.yaml` on each fold in turn, into `RUNS_DIR/fold<n>_<seed>/`, and
skips finished folds. `collect` reads these folders and also writes every answer to results/ravdess_answers.csv.
`render` reads only the JSON file and also fills the table in README.md.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.pages import RESULTS, percent, table, write_page


RECIPE = "recipes/ravdess_smollm2.yaml"
FOLDS = range(1, 7)
ANSWERS = ("distribution", "greedy")
RESAMPLES, BOOTSTRAP_SEED = 10_000, 0


def run(corpus_dir: str, audio_tower: str | None, runs_dir: Path, seeds: list[int]) -> None:
    """Trains and evaluates every unfinished fold and seed."""
    for seed in seeds:
        for fold in FOLDS:
            folder = runs_dir / f"fold{fold}_{seed}"
            if (folder / "test" / "metrics.json").exists():
                print(f"{folder}: finished already")
                continue
            train = ["train.py", RECIPE, "--corpus_dir", corpus_dir, "--output_dir", str(folder), "--seed", str(seed)]
            train += ["--corpus_options", json.dumps({"fold": fold, "validation": False})]
            train += ["--audio_tower", audio_tower] if audio_tower else []
            test = ["eval.py", str(folder / "model"), "--corpus", "ravdess", "--corpus_dir", corpus_dir]
            test += ["--split", "test", "--output", str(folder / "test")]
            folder.mkdir(parents=True, exist_ok=True)
            shown = {corpus_dir: "DIR", str(runs_dir): "RUNS_DIR"} | ({audio_tower: "MODEL"} if audio_tower else {})
            lines = []
            for command in (train, test):
                words = [shown.get(word, word.replace(f"{runs_dir}/", "RUNS_DIR/")) for word in command]
                lines.append(shlex.join(["python", *words]))
            (folder / "command.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for command in (train, test):
                print(shlex.join(command), flush=True)
                subprocess.run([sys.executable, *command], check=True)


def recalls(gold: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The recall of each class: the share of its samples that are answered correctly."""
    return {label: float(right[gold == label].mean()) for label in sorted(set(gold))}


def unweighted_accuracy(gold: np.ndarray, right: np.ndarray) -> float:
    """Mean of the classes' recalls."""
    return float(np.mean(list(recalls(gold, right).values())))


def actor_of(row_id: str) -> str:
    return row_id.rpartition("-")[2]


def interval(gold: np.ndarray, right: np.ndarray, actors: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the unweighted accuracy under a bootstrap that draws actors.

    Args:
        gold, actors: Label and actor of every sample, (samples,).
        right: Whether each answer is correct, (seeds, samples).
    """
    labels, index = np.unique(gold, return_inverse=True)
    names, owner = np.unique(actors, return_inverse=True)
    hits, counts = np.zeros((2, len(names), len(labels)))
    np.add.at(hits, (owner, index), right.mean(0))
    np.add.at(counts, (owner, index), 1)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)  # (resamples, actors)
    low, high = np.quantile(((drawn @ hits) / (drawn @ counts)).mean(1), (0.025, 0.975))
    return float(low), float(high)


def collect(runs_dir: Path) -> tuple[dict, list[dict]]:
    """Reads the evaluated runs of a folder; returns the content of results/ravdess.json, and every answer.

    Raises:
        ValueError: If a seed lacks a fold, or the folds do not test every actor exactly once.
    """
    runs, answers, pooled = [], [], []
    found = sorted(path.parent.parent for path in runs_dir.glob("fold*_*/test/predictions.jsonl"))
    seeds = sorted({int(folder.name.rpartition("_")[2]) for folder in found})
    if not seeds:
        raise ValueError(f"{runs_dir}: no run has been evaluated")
    right: dict[str, list[np.ndarray]] = {answer: [] for answer in ANSWERS}
    for seed in seeds:
        rows: dict[str, dict] = {}
        for fold in FOLDS:
            folder = runs_dir / f"fold{fold}_{seed}"
            if folder not in found:
                raise ValueError(f"{folder}: not evaluated, wanted folds {FOLDS[0]} to {FOLDS[-1]} of every seed")
            lines = (folder / "test" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
            own = {row["id"]: row for row in map(json.loads, lines)}
            if own.keys() & rows.keys():
                raise ValueError(f"{folder}: its actors were tested in another fold too")
            rows |= own
            gold = np.array([row["gold"] for row in own.values()])
            command = " && ".join((folder / "command.txt").read_text(encoding="utf-8").strip().split("\n"))
            for answer in ANSWERS:
                given = [row["answers"][answer] for row in own.values()]
                uar = unweighted_accuracy(gold, np.array(given) == gold)
                figures = {"seed": seed, "fold": fold, "answer": answer, "samples": len(own), "ua": round(uar, 6)}
                runs.append(figures | {"unparsable": given.count(None), "command": command})
        ids = sorted(rows)
        gold = np.array([rows[row_id]["gold"] for row_id in ids])
        actors = np.array([actor_of(row_id) for row_id in ids])
        for answer in ANSWERS:
            given = np.array([rows[row_id]["answers"][answer] for row_id in ids], dtype=object)
            right[answer].append(given == gold)
        for row_id in ids:
            given = {answer: rows[row_id]["answers"][answer] for answer in ANSWERS}
            answers.append({"seed": seed, "id": row_id, "gold": rows[row_id]["gold"]} | given)
    for answer in ANSWERS:
        outcomes = np.stack(right[answer])
        low, high = interval(gold, outcomes, actors)
        by_seed = [round(unweighted_accuracy(gold, outcome), 6) for outcome in outcomes]
        figures = {"answer": answer, "seeds": seeds, "ua_by_seed": by_seed, "ua": round(float(np.mean(by_seed)), 6)}
        figures |= {"low": round(low, 6), "high": round(high, 6), "resamples": RESAMPLES}
        by_label = recalls(gold, outcomes.mean(0))
        pooled.append(figures | {"recall": {label: round(share, 6) for label, share in by_label.items()}})
    test_set = {"samples": len(gold), "actors": len(set(actors)), "classes": len(set(gold))}
    return {"test_set": test_set, "runs": runs, "pooled": pooled}, answers


def main_table(data: dict) -> str:
    """A table with one row per kind of answer."""
    rows = []
    for line in data["pooled"]:
        own = [run for run in data["runs"] if run["answer"] == line["answer"]]
        cells = [line["answer"], ", ".join(map(str, line["seeds"])), percent(line["ua"])]
        cells += [f"{percent(line['low'])} to {percent(line['high'])}", percent(np.mean([run["ua"] for run in own]))]
        rows.append([*cells, str(sum(run["unparsable"] for run in own))])
    return table(["answer", "seeds", "UA", "95 % interval", "mean of the folds' UA", "unparsable"], rows)


def render(data: dict) -> str:
    """The text of results/ravdess.md."""
    size = data["test_set"]
    parts = [
        "# RAVDESS: test results",
        "Eight emotions from speech alone. SmolLM2-135M-Instruct with LoRA and the encoder of Whisper tiny.en, "
        f"frozen; {size['samples']} clips of {size['actors']} actors, each of whom is tested once, in the fold that "
        "holds them out. All folds have the recipe's settings. What the fusion reads follows linear probes on the "
        "actors of all folds, its dropout was chosen on the validation actors of folds 1 to 3, pooling of frames, "
        "label smoothing and weight decay on actors of all folds, held out two folds at a time, all of it before the "
        "LLM; epochs are fixed, and each fold is then trained on all twenty other actors. No model has seen the "
        "actors it is tested on, but the choice of settings has seen them all.",
        "UA, unweighted accuracy, is the mean of the classes' recalls, in percent, over the answers of all folds "
        f"together and mean over seeds; by chance it is {percent(1 / size['classes'])}. The interval is the "
        f"percentile interval of a bootstrap over actors ({RESAMPLES:,} resamples). *Greedy* is the text of plain "
        "`generate()`, *distribution* the most probable legal answer of `score_labels()`.",
        "Made with models whose merged weights were rounded to bfloat16; `train.py` now saves them in float32.",
        main_table(data),
        "## By fold",
    ]
    rows = []
    for seed in data["pooled"][0]["seeds"]:
        for place, line in enumerate(data["pooled"]):
            own = [run for run in data["runs"] if (run["seed"], run["answer"]) == (seed, line["answer"])]
            pooled = data["pooled"][place]["ua_by_seed"][line["seeds"].index(seed)]
            rows.append([str(seed), line["answer"], *(percent(run["ua"]) for run in own), percent(pooled)])
    parts.append(table(["seed", "answer", *(f"{4 * f - 3} to {4 * f}" for f in FOLDS), "all"], rows))
    parts += ["Columns are the actors held out.", "## By emotion"]
    labels = list(data["pooled"][0]["recall"])
    rows = [[line["answer"], *(percent(line["recall"][label]) for label in labels)] for line in data["pooled"]]
    parts += ["Recall, mean over seeds.", table(["answer", *labels], rows), "## Commands"]
    commands = {(run["seed"], run["fold"]): run["command"].replace(" && ", "\n") for run in data["runs"]}
    blocks = [f"# fold {fold}, seed {seed}\n{command}" for (seed, fold), command in commands.items()]
    parts.append("```bash\n" + "\n\n".join(blocks) + "\n```")
    parts.append("Made from `results/ravdess.json` by `python -m experiments.ravdess render`.")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and test every fold")
    runner.add_argument("--corpus_dir", required=True)
    runner.add_argument("--audio_tower", help="a local folder in place of the recipe's encoder")
    runner.add_argument("--runs_dir", type=Path, required=True)
    runner.add_argument("--seeds", type=int, nargs="+", default=[1111])
    commands.add_parser("collect", help="runs -> results/ravdess.json").add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/ravdess.json -> results/ravdess.md")
    args = parser.parse_args(arguments)
    file = RESULTS / "ravdess.json"
    if args.command == "run":
        run(args.corpus_dir, args.audio_tower, args.runs_dir, args.seeds)
    elif args.command == "collect":
        data, answers = collect(args.runs_dir)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        with (RESULTS / "ravdess_answers.csv").open("w", encoding="utf-8", newline="") as answer_file:
            writer = csv.DictWriter(answer_file, ["seed", "id", "gold", *ANSWERS], lineterminator="\n")
            writer.writeheader()
            writer.writerows(answers)
    else:
        data = json.loads(file.read_text(encoding="utf-8"))
        write_page("ravdess", render(data), main_table(data))


if __name__ == "__main__":
    main(sys.argv[1:])
