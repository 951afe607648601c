"""Collects finished runs in results/NAME.json and renders results/NAME.md and README.md, for mosi and meld.

    python -m experiments.make_tables collect mosi RUNS_DIR
    python -m experiments.make_tables render

`collect` reads every evaluated folder `RUNS_DIR/<variant>_<seed>/`: `test/metrics.json` and `test/predictions.jsonl`
of `eval.py`, and `command.txt`, which contains the training and the evaluation command, one per line. It adds these
runs to the runs collected before, so that runs may come from several machines. `results/NAME_answers.csv` keeps all
answers, one column per run and kind of answer (empty: unparsable). `render` reads the JSON files.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from egmf.tables import mean_and_deviation, table
from experiments.bootstrap import RESAMPLES, cluster_bootstrap
from experiments.pages import README, RESULTS, fill_readme, percent, read_predictions


ANSWERS = ("distribution", "greedy")
MEASURES = ("accuracy", "weighted_f1")


@dataclass(frozen=True)
class Benchmark:
    """The constants of a benchmark.

    Args:
        title: Heading of the results page.
        about: Short description of what was trained and tested.
        cluster: Regular expression of a test id; its first group is the cluster that the bootstrap draws.
        clusters: Name of the clusters, in the plural.
        variants: Description of each variant, in the order of the table. Paired tests compare the first two.
        measure: Metric of the published scores.
        published: Model, input modalities, score in percent, and source of each published score.
    """

    title: str
    about: str
    cluster: str
    clusters: str
    variants: dict[str, str]
    measure: str
    published: tuple[tuple[str, str, str, str], ...]


PARTS = {
    "no_local": "without the local expert",
    "no_semantic": "without the semantic correlation expert",
    "no_global": "without the global expert",
    "flat": "flat gate instead of the hierarchical one",
}
MODALITIES = {
    "full": "full model: text, audio and vision",
    "text": "text only",
    "audio": "audio only",
    "vision": "vision only",
}
COSMIC = "Ghosal et al. 2020, arXiv 2010.02795"
MSE_ADAPTER = "Yang et al. 2025, arXiv 2502.12478; mean of 5 seeds"
BENCHMARKS = {
    "mosi": Benchmark(
        title="CMU-MOSI",
        about="Positive or negative, on the utterance features of contextual-multimodal-fusion. SmolLM2-135M-Instruct "
        "with LoRA; validation is cut off train by video, and nothing is selected on test.",
        cluster=r"(.+)\$_\$[^$]+",
        clusters="videos",
        variants=MODALITIES | PARTS,
        measure="Accuracy",
        published=(
            ("bc-LSTM", "text, audio, vision", "80.3", "Poria et al. 2017, ACL"),
            ("MMMU-BA", "text, audio, vision", "82.31", "Ghosal et al. 2018, EMNLP"),
        ),
    ),
    "meld": Benchmark(
        title="MELD",
        about="Seven emotions, from the text and the dialogue before it (MELD's CSV files come without media). "
        "SmolLM2-135M-Instruct with LoRA; validation is MELD's dev split, and nothing is selected on test.",
        cluster=r"test_(dia\d+)_utt\d+",
        clusters="dialogues",
        variants=MODALITIES | {"full": "full model: text with its dialogue"} | PARTS,
        measure="Weighted F1",
        published=(
            ("MSE-Adapter, Qwen-1.8B", "text, audio, vision, no context", "59.87", MSE_ADAPTER),
            ("RoBERTa", "text", "62.02", COSMIC),
            ("RoBERTa DialogueRNN", "text with its dialogue", "63.61", COSMIC),
            ("MSE-Adapter, ChatGLM3-6B", "text, audio, vision, no context", "65.13", MSE_ADAPTER),
            ("COSMIC", "text with its dialogue", "65.21", COSMIC),
            ("EGMF (the paper)", "text, audio, vision", "65.57", "arXiv 2601.07565"),
            ("InstructERC, LLaMA2-7B", "text with its dialogue", "69.15", "Lei et al. 2023, arXiv 2309.11911"),
        ),
    ),
}


Predictions = dict[tuple[str, int], dict[str, dict]]  # (variant, seed) -> id -> {"gold", "answers": {answer: label}}


def collect(name: str, runs_dir: Path, known: tuple[dict, Predictions] | None = None) -> tuple[dict, Predictions]:
    """Adds the evaluated runs of a folder to the `known` ones; prints a line for each folder that is left out.

    Returns:
        The content of `results/NAME.json`: `test_set` (samples, clusters, and the accuracy of the most frequent
        class), `runs` (two per folder, one for each kind of answer) and `paired_tests` (the full model against text
        only); and the answers of all runs.

    Raises:
        ValueError: If there is no evaluated run, or the name, commands, ids or metrics of a run are invalid.
    """
    benchmark, runs, predictions = BENCHMARKS[name], [], {}
    for folder in sorted(path for path in runs_dir.iterdir() if path.is_dir()):
        if not (folder / "test" / "metrics.json").is_file():
            print(f"{folder}: not evaluated, left out")
            continue
        variant, _, seed = folder.name.rpartition("_")
        if variant not in benchmark.variants or not seed.isdecimal():
            raise ValueError(f"{folder}: wanted a name VARIANT_SEED with a variant of {list(benchmark.variants)}")
        commands = (folder / "command.txt").read_text(encoding="utf-8").split("\n")
        commands = [line.strip() for line in commands if line.strip()]
        if len(commands) != 2 or "train.py" not in commands[0] or "eval.py" not in commands[1]:
            raise ValueError(f"{folder / 'command.txt'}: wanted two lines, train.py and eval.py, got {commands}")
        rows = predictions[variant, int(seed)] = read_predictions(folder / "test" / "predictions.jsonl")
        metrics = json.loads((folder / "test" / "metrics.json").read_text(encoding="utf-8"))["answers"]
        for answer in ANSWERS:
            got, wanted = metrics[answer]["accuracy"], float(np.mean(list(_correct(rows, answer).values())))
            if abs(got - wanted) > 1e-6:
                raise ValueError(f"{folder}: metrics.json has accuracy {got}, predictions.jsonl has {wanted}")
            run = {"variant": variant, "seed": int(seed), "answer": answer}
            run |= {measure: round(metrics[answer][measure], 6) for measure in MEASURES}
            runs.append(run | {"unparsable": metrics[answer]["unparsable"], "command": " && ".join(commands)})
    if not runs:
        raise ValueError(f"{runs_dir}: no run has been evaluated")
    if known is not None:
        runs += [run for run in known[0]["runs"] if (run["variant"], run["seed"]) not in predictions]
        predictions = known[1] | predictions

    gold = {key: {row_id: row["gold"] for row_id, row in rows.items()} for key, rows in predictions.items()}
    first_key = next(iter(gold))
    for key, labels in gold.items():
        if labels != gold[first_key]:
            raise ValueError(f"{runs_dir}: {key} and {first_key} were not tested on the same samples")
    clusters = {row_id: _cluster(benchmark, row_id) for row_id in gold[first_key]}
    labels = list(gold[first_key].values())
    test_set = {
        "samples": len(labels),
        "clusters": len(set(clusters.values())),
        "majority_accuracy": round(max(map(labels.count, set(labels))) / len(labels), 6),
    }
    order = list(benchmark.variants)
    runs.sort(key=lambda run: (order.index(run["variant"]), run["seed"], ANSWERS.index(run["answer"])))
    tests = [test for answer in ANSWERS for test in _paired_tests(order[:2], answer, predictions, clusters)]
    return {"test_set": test_set, "runs": runs, "paired_tests": tests}, predictions


def write_answers(path: Path, predictions: Predictions) -> None:
    """Writes all answers as a CSV file: id, gold, and a column VARIANT_SEED:ANSWER for each run and kind of answer."""
    columns = [(key, answer) for key in sorted(predictions) for answer in ANSWERS]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "gold", *(f"{variant}_{seed}:{answer}" for (variant, seed), answer in columns)])
        for row_id, row in next(iter(predictions.values())).items():
            answers = (predictions[key][row_id]["answers"][answer] for key, answer in columns)
            table.writerow([row_id, row["gold"], *(label or "" for label in answers)])


def read_answers(path: Path) -> Predictions:
    """Reads the file of `write_answers`."""
    predictions: Predictions = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            row_id, gold = row.pop("id"), row.pop("gold")
            for column, label in row.items():
                run, answer = column.rsplit(":", 1)
                variant, _, seed = run.rpartition("_")
                rows = predictions.setdefault((variant, int(seed)), {})
                rows.setdefault(row_id, {"gold": gold, "answers": {}})["answers"][answer] = label or None
    return predictions


def _correct(rows: dict[str, dict], answer: str) -> dict[str, bool]:
    """Whether each answer of a run is correct, by id; an unparsable answer (None) is wrong."""
    return {row_id: row["answers"][answer] == row["gold"] for row_id, row in rows.items()}


def _cluster(benchmark: Benchmark, row_id: str) -> str:
    match = re.fullmatch(benchmark.cluster, row_id)
    if match is None:
        raise ValueError(f"id {row_id!r}: wanted one like {benchmark.cluster}")
    return match[1]


def _paired_tests(variants: list[str], answer: str, predictions: dict, clusters: dict[str, str]) -> list[dict]:
    """McNemar's test per seed and over all seeds, and a bootstrap over clusters; empty without a common seed."""
    from egmf.evaluation.significance import mcnemar  # rendering needs no statistics

    first, second = variants
    seeds = sorted(seed for variant, seed in predictions if variant == first and (second, seed) in predictions)
    if not seeds:
        return []
    ids = sorted(clusters)
    outcomes = {}
    for variant in variants:
        by_seed = [_correct(predictions[variant, seed], answer) for seed in seeds]
        outcomes[variant] = np.array([[correct[row_id] for row_id in ids] for correct in by_seed])  # (seeds, samples)
    head = {"first": first, "second": second, "answer": answer}
    groups = [([seed], slice(i, i + 1)) for i, seed in enumerate(seeds)]
    groups += [(seeds, slice(None))] if len(seeds) > 1 else []
    tests = []
    for group, rows in groups:
        pair = [outcomes[variant][rows].ravel().tolist() for variant in variants]
        tests.append({"test": "mcnemar"} | head | {"seeds": group} | mcnemar(*pair))
    difference = outcomes[first].mean(0) - outcomes[second].mean(0)  # (samples,)
    names = [clusters[row_id] for row_id in ids]
    return [*tests, {"test": "bootstrap"} | head | {"seeds": seeds} | cluster_bootstrap(difference, names)]


def render(name: str, data: dict) -> str:
    """The text of `results/NAME.md`."""
    benchmark, runs, tests = BENCHMARKS[name], data["runs"], data["paired_tests"]
    parts = [f"# {benchmark.title}: test results", benchmark.about]
    if runs:
        test_set = data["test_set"]
        parts.append(
            f"{test_set['samples']} test utterances of {test_set['clusters']} {benchmark.clusters}; always answering "
            f"the most frequent class of the test set has accuracy {percent(test_set['majority_accuracy'])}. Figures "
            "are percent, mean ± standard deviation over seeds. *Greedy* is the text of plain `generate()`, and an "
            "unparsable text is a wrong answer; *distribution* is the most probable legal answer of `score_labels()`."
        )
        parts.append(
            "Made with models whose merged weights were rounded to bfloat16; `train.py` now saves them in float32."
        )
    parts.append(main_table(name, data))
    parts += ["## Published", table(["model", "input", benchmark.measure, "source"], benchmark.published)]
    if tests:
        parts += ["## Full model against text only", *_test_tables(benchmark, tests)]
    if runs:
        commands = {(run["variant"], run["seed"]): run["command"].replace(" && ", "\n") for run in runs}
        blocks = [f"# {variant}, seed {seed}\n{command}" for (variant, seed), command in commands.items()]
        parts += ["## Commands", "```bash\n" + "\n\n".join(blocks) + "\n```"]
    source = f"results/{name}.json"
    parts.append(f"Made from `{source}` by `python -m experiments.make_tables render`.")
    return "\n\n".join(parts) + "\n"


def main_table(name: str, data: dict) -> str:
    """A table with one row per variant that was run."""
    if not data["runs"]:
        return "No run has been collected yet."
    rows = []
    for variant, words in BENCHMARKS[name].variants.items():
        runs = {
            answer: [r for r in data["runs"] if (r["variant"], r["answer"]) == (variant, answer)] for answer in ANSWERS
        }
        if runs["greedy"]:
            cells = [
                mean_and_deviation([100 * run[measure] for run in runs[answer]], 2)
                for answer in ANSWERS
                for measure in MEASURES
            ]
            unparsable = sum(run["unparsable"] for run in runs["greedy"])
            rows.append((words, str(len(runs["greedy"])), *cells, str(unparsable)))
    head = ["model", "seeds"] + [f"{answer}: {m}" for answer in ANSWERS for m in ("accuracy", "weighted F1")]
    return table([*head, "unparsable, all seeds"], rows)


def _test_tables(benchmark: Benchmark, tests: list[dict]) -> list[str]:
    counts = [
        (t["answer"], _seeds(t), str(t["first_only"]), str(t["second_only"]), _p(t))
        for t in tests
        if t["test"] == "mcnemar"
    ]
    means = [
        (t["answer"], _seeds(t), _points(t["difference"]), f"{_points(t['low'])} to {_points(t['high'])}", _p(t))
        for t in tests
        if t["test"] == "bootstrap"
    ]
    return [
        "McNemar's exact test on the same samples. It takes them for independent: it ignores "
        f"{benchmark.clusters}, and over several seeds it counts every sample once per seed. The bootstrap below does "
        "neither.",
        table(["answer", "seeds", "only the full model right", "only text right", "p"], counts),
        f"Bootstrap over {benchmark.clusters} ({RESAMPLES:,} resamples) of the difference in accuracy, averaged over "
        "the seeds that both have.",
        table(["answer", "seeds", "difference, points", "95 % interval", "p"], means),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _seeds(test: dict) -> str:
    return ", ".join(map(str, test["seeds"]))


def _p(test: dict) -> str:
    return f"{test['p_value']:.4f}" if test["p_value"] >= 1e-4 else "< 0.0001"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collector = commands.add_parser("collect", help="runs -> results/NAME.json")
    collector.add_argument("name", choices=BENCHMARKS)
    collector.add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/*.json -> results/*.md and README.md")
    args = parser.parse_args(arguments)
    if args.command == "collect":
        file, answers, known = RESULTS / f"{args.name}.json", RESULTS / f"{args.name}_answers.csv", None
        if answers.is_file():
            known = json.loads(file.read_text(encoding="utf-8")), read_answers(answers)
        data, predictions = collect(args.name, args.runs_dir, known)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        write_answers(answers, predictions)
        print(f"{file}, {answers}")
        return
    readme = README.read_text(encoding="utf-8")
    for name in BENCHMARKS:
        data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        (RESULTS / f"{name}.md").write_text(render(name, data), encoding="utf-8")
        readme = fill_readme(readme, name, main_table(name, data))
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
