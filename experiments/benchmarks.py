"""Trains and tests the variants of a recipe, and writes the results of MOSI and MELD.

    python -m experiments.benchmarks run recipes/mosi_smollm2.yaml --corpus_dir DIR --runs_dir RUNS_DIR \
        --variants full text --seeds 1111 2222 3333
    python -m experiments.benchmarks collect mosi RUNS_DIR
    python -m experiments.benchmarks render

`run` trains and tests any recipe, one run after the other, into `RUNS_DIR/VARIANT_SEED/`. It skips finished runs,
resumes an interrupted one from its last checkpoint, and passes other arguments (`--language_model Qwen/Qwen3-8B`) to
`train.py`. For a mixture, each corpus is tested in a folder with its name. `collect` adds tested runs to
results/NAME.json, and every answer to results/NAME_answers.csv (one column per run and kind of answer; empty:
unparsable); a run replaces an earlier one of its variant and seed. `render` reads only the JSON files.
"""

import argparse
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from corpora import clusters_of
from egmf.commands import run_command
from egmf.evaluation.significance import mcnemar, resample
from egmf.tables import mean_and_deviation, table
from experiments.bootstrap import METRICS, RESAMPLES, compare
from experiments.pages import (
    EARLIER,
    RESULTS,
    Predictions,
    check_version,
    percent,
    read_answers,
    read_predictions,
    write_answers,
)
from experiments.running import NAMES, VARIANTS, evaluation, run_steps, training


ANSWERS = ("distribution", "greedy")
MEASURES = ("accuracy", "weighted_f1")


@dataclass(frozen=True)
class Benchmark:
    """The constants of a benchmark, which has the name of its corpus.

    Args:
        title: Heading of the results page.
        about: Short description of what was trained and tested.
        full: Name of the full model in tables.
        measure: Metric of the published scores.
        published: Model, input modalities, score in percent, and source of each published score.
    """

    title: str
    about: str
    full: str
    measure: str
    published: tuple[tuple[str, str, str, str], ...]


COSMIC = "Ghosal et al. 2020, arXiv 2010.02795"
MSE_ADAPTER = "Yang et al. 2025, arXiv 2502.12478; mean of 5 seeds"
BENCHMARKS = {
    "mosi": Benchmark(
        title="CMU-MOSI",
        about="Positive or negative, on the utterance features of contextual-multimodal-fusion. SmolLM2-135M-Instruct "
        "with LoRA; validation is cut off train by video, and nothing is selected on test. The vision features of the "
        "validation rows leak their labels, and these runs chose their checkpoint on such rows.",
        full="full model: text, audio and vision",
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
        full="full model: text with its dialogue",
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


def run(args: argparse.Namespace, more: list[str]) -> None:
    """Trains and tests every unfinished variant and seed."""
    fields = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    tests = {"test": (fields.get("corpus"), args.corpus_dir)}
    if "corpora" in fields:
        tests = {name: (name, str(Path(args.corpus_dir) / name)) for name in fields["corpora"]}
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.runs_dir / f"{variant}_{seed}"
            steps = [training(folder, str(args.recipe), args.corpus_dir, seed, *VARIANTS[variant], *more)]
            for name, test in tests.items():
                steps.append(evaluation(folder, f"{name}/metrics.json", *test, "--split", "test"))
            run_steps(folder, steps, {args.corpus_dir: "DIR", str(args.runs_dir): "RUNS_DIR"})


def collect(name: str, runs_dir: Path, known: tuple[dict, Predictions] | None = None) -> tuple[dict, Predictions]:
    """Adds the tested runs of a folder to the `known` ones; prints a line for each folder that is left out.

    Returns:
        The content of `results/NAME.json`: `test_set` (samples, clusters, and the accuracy of the most frequent
        class), `runs` (two per folder, one for each kind of answer) and `paired_tests` (the full model against text
        only); and the answers of all runs.

    Raises:
        ValueError: If there is no tested run, the name, commands or metrics of a run are invalid, or runs were tested
            on different samples.
    """
    runs, predictions = [], {}
    for folder in sorted(path for path in runs_dir.iterdir() if path.is_dir()):
        if not (folder / "test" / "metrics.json").is_file():
            print(f"{folder}: not evaluated, left out")
            continue
        variant, _, seed = folder.name.rpartition("_")
        if variant not in NAMES or not seed.isdecimal():
            raise ValueError(f"{folder}: wanted a name VARIANT_SEED with a variant of {list(NAMES)}")
        commands = (folder / "command.txt").read_text(encoding="utf-8").split("\n")
        commands = [line.strip() for line in commands if line.strip()]
        if len(commands) != 2 or "train.py" not in commands[0] or "eval.py" not in commands[1]:
            raise ValueError(f"{folder / 'command.txt'}: wanted two lines, train.py and eval.py, got {commands}")
        rows = predictions[variant, int(seed)] = read_predictions(folder / "test" / "predictions.jsonl")
        metrics = json.loads((folder / "test" / "metrics.json").read_text(encoding="utf-8"))["answers"]
        for answer in ANSWERS:
            right = [row["answers"][answer] == row["gold"] for row in rows.values()]
            got, wanted = metrics[answer]["accuracy"], float(np.mean(right))
            if abs(got - wanted) > 1e-6:
                raise ValueError(f"{folder}: metrics.json has accuracy {got}, predictions.jsonl has {wanted}")
            own = {"variant": variant, "seed": int(seed), "answer": answer}
            own |= {measure: round(metrics[answer][measure], 6) for measure in MEASURES}
            runs.append(own | {"unparsable": metrics[answer]["unparsable"], "command": " && ".join(commands)})
    if not runs:
        raise ValueError(f"{runs_dir}: no run has been evaluated")
    if known is not None:
        runs += [own for own in known[0]["runs"] if (own["variant"], own["seed"]) not in predictions]
        predictions = known[1] | predictions

    gold = {key: {row_id: row["gold"] for row_id, row in rows.items()} for key, rows in predictions.items()}
    first_key, labels = next(iter(gold.items()))
    for key, others in gold.items():
        if others != labels:
            raise ValueError(f"{runs_dir}: {key} and {first_key} were not tested on the same samples")
    _, clusters = clusters_of(name, [*labels], [None] * len(labels))
    given = [*labels.values()]
    test_set = {
        "samples": len(labels),
        "clusters": len(set(clusters)),
        "majority_accuracy": round(max(map(given.count, set(given))) / len(labels), 6),
    }
    order = list(NAMES)
    runs.sort(key=lambda own: (order.index(own["variant"]), own["seed"], ANSWERS.index(own["answer"])))
    tests = [test for answer in ANSWERS for test in _paired_tests(answer, labels, predictions, clusters)]
    return {"test_set": test_set, "runs": runs, "paired_tests": tests}, predictions


def _paired_tests(answer: str, gold: dict[str, str], predictions: Predictions, clusters: list[str]) -> list[dict]:
    """Tests of the full model against text only; none without a seed that both have.

    McNemar's test for each seed, and a bootstrap over clusters for all seeds together.
    """
    seeds = sorted(seed for variant, seed in predictions if variant == "full" and ("text", seed) in predictions)
    if not seeds:
        return []
    head = {"first": "full", "second": "text", "answer": answer}
    given = [
        [[predictions[variant, seed][row_id]["answers"][answer] for row_id in gold] for seed in seeds]
        for variant in ("full", "text")
    ]
    right = np.array(given, object) == np.array([*gold.values()], object)  # (variants, seeds, samples)
    found = [("mcnemar", [seed], mcnemar(*right[:, place].tolist())) for place, seed in enumerate(seeds)]
    found.append(("bootstrap", seeds, compare([*gold.values()], *given, resample(clusters, RESAMPLES))))
    return [{"test": test} | head | {"seeds": own} | figures for test, own, figures in found]


def render(name: str, data: dict) -> str:
    """The text of `results/NAME.md`."""
    benchmark, runs, tests = BENCHMARKS[name], data["runs"], data["paired_tests"]
    unit = importlib.import_module(f"corpora.{name}").CLUSTERS[0]
    parts = [f"# {benchmark.title}: test results", benchmark.about]
    if runs:
        test_set = data["test_set"]
        parts.append(
            f"{test_set['samples']} test utterances of {test_set['clusters']} {unit}; always answering "
            f"the most frequent class of the test set has accuracy {percent(test_set['majority_accuracy'])}. Figures "
            "are percent, mean ± standard deviation over seeds. *Greedy* is the text of plain `generate()`, and an "
            "unparsable text is a wrong answer; *distribution* is the most probable legal answer of `score_labels()`."
        )
        parts += [EARLIER] if any(own.get("earlier") for own in runs) else []
    parts.append(main_table(name, data))
    parts += ["## Published", table(["model", "input", benchmark.measure, "source"], benchmark.published)]
    if tests:
        parts += ["## Full model against text only", *_test_tables(unit, tests)]
    if runs:
        commands = {(own["variant"], own["seed"]): own["command"].replace(" && ", "\n") for own in runs}
        blocks = [f"# {variant}, seed {seed}\n{command}" for (variant, seed), command in commands.items()]
        parts += ["## Commands", "```bash\n" + "\n\n".join(blocks) + "\n```"]
    parts.append(f"Made from `results/{name}.json` by `python -m experiments.benchmarks render`.")
    return "\n\n".join(parts) + "\n"


def main_table(name: str, data: dict) -> str:
    """A table with one row per variant that was run."""
    if not data["runs"]:
        return "No run has been collected yet."
    rows = []
    for variant, words in (NAMES | {"full": BENCHMARKS[name].full}).items():
        runs = {
            answer: [r for r in data["runs"] if (r["variant"], r["answer"]) == (variant, answer)] for answer in ANSWERS
        }
        if runs["greedy"]:
            cells = [
                mean_and_deviation([100 * own[measure] for own in runs[answer]], 2)
                for answer in ANSWERS
                for measure in MEASURES
            ]
            unparsable = sum(own["unparsable"] for own in runs["greedy"])
            rows.append((words, str(len(runs["greedy"])), *cells, str(unparsable)))
    head = ["model", "seeds"] + [f"{answer}: {METRICS[measure]}" for answer in ANSWERS for measure in MEASURES]
    return table([*head, "unparsable, all seeds"], rows)


def _test_tables(unit: str, tests: list[dict]) -> list[str]:
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
        f"McNemar's exact test on the same samples. It takes them for independent: it ignores {unit}, which the "
        "bootstrap below does not.",
        table(["answer", "seeds", "only the full model right", "only text right", "p"], counts),
        f"Bootstrap over {unit} ({RESAMPLES:,} resamples) of the difference in accuracy, averaged over the seeds that "
        "both have.",
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
    runner = commands.add_parser("run", help="train and test variants of a recipe")
    runner.add_argument("recipe", type=Path)
    runner.add_argument("--corpus_dir", required=True)
    runner.add_argument("--runs_dir", type=Path, required=True)
    runner.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full", "text"])
    runner.add_argument("--seeds", nargs="+", type=int, default=[1111, 2222, 3333, 4444, 5555])
    collector = commands.add_parser("collect", help="runs -> results/NAME.json")
    collector.add_argument("name", choices=BENCHMARKS)
    collector.add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/NAME.json -> results/NAME.md")
    args, more = parser.parse_known_args(arguments)
    if more and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if args.command == "run":
        run(args, more)
    elif args.command == "collect":
        file, answers, known = RESULTS / f"{args.name}.json", RESULTS / f"{args.name}_answers.csv", None
        if file.is_file() and answers.is_file():
            known = json.loads(file.read_text(encoding="utf-8")), read_answers(answers)
            check_version(file, known[0]["runs"])
        data, predictions = collect(args.name, args.runs_dir, known)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        write_answers(answers, predictions)
        print(f"{file}, {answers}")
    else:
        for name in BENCHMARKS:
            data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            (RESULTS / f"{name}.md").write_text(render(name, data), encoding="utf-8")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
