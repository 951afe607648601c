"""Trains and tests corpora with folds (RAVDESS, MVSA, CASIA), and writes results/folds.json and results/folds.md.

    python -m experiments.folds run ravdess_faces --corpus_dir DIR --runs_dir RUNS_DIR --variants full audio
    python -m experiments.folds probe ravdess_faces --corpus_dir DIR --runs_dir RUNS_DIR --variants full audio
    python -m experiments.folds collect ravdess_faces RUNS_DIR
    python -m experiments.folds render

`run` trains and evaluates an experiment's recipe on each fold in turn, into `RUNS_DIR/VARIANT_fold<n>_<seed>/`, skips
finished folds, and passes other arguments (`--audio_tower MODEL`) to `train.py`. With `--validation`, the fold after
the tested one is the validation split, and the run is evaluated on that: settings are chosen there. `probe` measures
linear probes (`experiments/probe.py`). `collect` adds runs to the JSON file, and every answer to
results/NAME_answers.csv; a run replaces an earlier one of its variant and seed. `render` reads only the JSON file and
also fills the table in README.md.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from corpora import clusters_of
from egmf.commands import run_command
from egmf.evaluation.significance import mcnemar, resample
from egmf.tables import mean_and_deviation, table
from experiments.bootstrap import METRICS, RESAMPLES, compare, interval, measure
from experiments.pages import RESULTS, Predictions, percent, read_answers, read_predictions, write_answers, write_page
from experiments.running import NAMES, VARIANTS, evaluation, run_steps, training


ANSWERS = ("distribution", "greedy", "experts", "llm")
REPOSITORY = RESULTS.parent


@dataclass
class Experiment:
    """A recipe and the folds that it is trained on.

    Args:
        title: Heading of its table: the corpus, a colon, what the model reads, a comma, and more.
        recipe: Name of the recipe.
        folds: Number of folds.
        shown: The metrics of its table.
        note: What others measured, or what a reader must know; may be empty.
        single: Variants with one modality, which the README's table shows.
    """

    title: str
    recipe: str
    folds: int
    shown: tuple[str, ...]
    note: str
    single: tuple[str, ...] = ()


EXPERIMENTS = {
    "ravdess": Experiment(
        "RAVDESS, 360 clips: speech, six folds of four actors",
        "ravdess_smollm2",
        6,
        ("ua", "accuracy"),
        "",
    ),
    "ravdess_faces": Experiment(
        "RAVDESS: speech and faces, 1,440 clips, the five published folds",
        "ravdess_faces_smollm2",
        5,
        ("accuracy", "ua"),
        "Published on these folds (Luna-Jimenez et al. 2022, accuracy): speech 81.82 with a fine-tuned XLSR, face "
        "62.13 with a bi-LSTM over frames, both 86.70.",
        ("audio", "vision"),
    ),
    "mvsa": Experiment(
        "MVSA: text and picture, 4,000 tweets, five folds",
        "mvsa_smollm2",
        5,
        ("accuracy", "weighted_f1"),
        "The experts read the picture, and the language model reads the words and the pseudo tokens. *Text* is a "
        "language model that reads the words alone.",
        ("text", "vision"),
    ),
    "casia": Experiment(
        "CASIA: Mandarin speech, 1,200 clips, one of four speakers held out",
        "casia_smollm2",
        4,
        ("accuracy", "ua"),
        "",
    ),
}
# Names of variants in these tables, where they differ from the common ones.
OWN_NAMES = {"adapted": "the same, speaker adaptation", "text": "text", "audio": "speech", "vision": "vision"}


def name_of(one: Experiment, variant: str) -> str:
    """The name of an experiment's variant in tables; `full` has that of what the model reads."""
    full = one.title.partition(": ")[2].partition(",")[0]
    return (NAMES | OWN_NAMES | {"full": full})[variant]


def fields_of(name: str) -> dict:
    """The recipe of an experiment."""
    return yaml.safe_load((REPOSITORY / "recipes" / f"{EXPERIMENTS[name].recipe}.yaml").read_text(encoding="utf-8"))


def run(name: str, args: argparse.Namespace, more: list[str]) -> None:
    """Trains and evaluates every unfinished fold, variant and seed."""
    folds = args.folds or range(1, EXPERIMENTS[name].folds + 1)
    for seed, variant, fold in itertools.product(args.seeds, args.variants, folds):
        _run(name, args, more, variant, fold, seed)


def _run(name: str, args: argparse.Namespace, more: list[str], variant: str, fold: int, seed: int) -> None:
    folder, split = args.runs_dir / f"{variant}_fold{fold}_{seed}", "validation" if args.validation else "test"
    fields = fields_of(name)
    validation = args.validation or fields["corpus_options"]["validation"]
    options = json.dumps(fields["corpus_options"] | {"fold": fold, "validation": validation})
    recipe, changes = f"recipes/{EXPERIMENTS[name].recipe}.yaml", ["--corpus_options", options, *VARIANTS[variant]]
    train = training(folder, recipe, args.corpus_dir, seed, *changes, *more)
    test = evaluation(folder, f"{split}/metrics.json", fields["corpus"], args.corpus_dir, "--split", split)
    run_steps(folder, [train, test], {args.corpus_dir: "DIR", str(args.runs_dir): "RUNS_DIR"})


def read_runs(name: str, runs_dir: Path) -> dict[str, dict[int, dict[str, dict]]]:
    """The predictions of all folds: by variant, seed and id.

    Raises:
        ValueError: If a variant lacks a fold of a seed, or the folds do not test every sample exactly once.
    """
    found: dict[str, dict[int, dict[str, dict]]] = {}
    folders = sorted(path.parent.parent.name for path in runs_dir.glob("*_fold*_*/test/predictions.jsonl"))
    if not folders:
        raise ValueError(f"{runs_dir}: no run has been evaluated")
    for variant, seed in sorted({(one.partition("_fold")[0], int(one.rpartition("_")[2])) for one in folders}):
        rows: dict[str, dict] = {}
        for fold in range(1, EXPERIMENTS[name].folds + 1):
            folder = runs_dir / f"{variant}_fold{fold}_{seed}"
            if folder.name not in folders:
                wanted = f"folds 1 to {EXPERIMENTS[name].folds} of every seed"
                raise ValueError(f"{folder}: not evaluated, wanted {wanted}")
            own = read_predictions(folder / "test" / "predictions.jsonl")
            if own.keys() & rows.keys():
                raise ValueError(f"{folder}: some of its samples were tested in another fold too")
            rows |= own
        found.setdefault(variant, {})[seed] = rows
    return found


def collect(name: str, runs_dir: Path) -> tuple[Predictions, dict[str, dict]]:
    """Every answer of an experiment's runs, and by variant the `nll` of each seed and the `command`."""
    answers: Predictions = {}
    rest = {}
    for variant, by_seed in read_runs(name, runs_dir).items():
        nll = {seed: _nll(rows.values()) for seed, rows in by_seed.items()}
        command = (runs_dir / f"{variant}_fold1_{min(by_seed)}" / "command.txt").read_text(encoding="utf-8").strip()
        rest[variant] = {"nll": nll, "command": command}
        for seed, rows in by_seed.items():
            answers[variant, seed] = {
                row_id: {"gold": row["gold"], "answers": {answer: row["answers"][answer] for answer in ANSWERS}}
                for row_id, row in sorted(rows.items())
            }
    return answers, rest


def add_runs(name: str, runs_dir: Path, earlier: dict, known: Predictions) -> tuple[dict, Predictions]:
    """An experiment's part of results/folds.json and its answers, with runs in place of earlier ones of their seeds.

    Args:
        name, runs_dir: The experiment and the folder of its runs.
        earlier, known: Its part of the JSON file, and the answers of its CSV file; empty if there are none.

    Raises:
        ValueError: See [`read_runs`]; or if earlier runs were tested on other samples.
    """
    answers, new = collect(name, runs_dir)
    answers = known | answers
    runs: dict[str, dict[int, dict[str, dict]]] = {}
    for variant, seed in sorted(answers, key=lambda key: (list(NAMES).index(key[0]), key[1])):
        rows = answers[variant, seed]
        runs.setdefault(variant, {})[seed] = {row_id: rows[row_id]["answers"] for row_id in sorted(rows)}
    first = next(iter(answers.values()))
    gold = {row_id: first[row_id]["gold"] for row_id in sorted(first)}
    if any(rows.keys() != gold.keys() for by_seed in runs.values() for rows in by_seed.values()):
        raise ValueError(f"{runs_dir}: its samples are not those of the earlier runs of {name}")
    ids, labels = [*gold], [*gold.values()]
    unit, clusters = clusters_of(fields_of(name)["corpus"], ids, [None] * len(ids))
    samples = resample(clusters, RESAMPLES)
    variants = {}
    for variant, by_seed in runs.items():
        before = earlier.get("variants", {}).get(variant, {"seeds": [], "nll": []})
        added = new.get(variant, {"nll": {}, "command": before.get("command")})
        nll = dict(zip(before["seeds"], before["nll"], strict=True)) | added["nll"]
        figures = _figures(name, by_seed, labels, samples)
        seeds = list(by_seed)
        variants[variant] = {"seeds": seeds, "answers": figures, "nll": [nll[seed] for seed in seeds]}
        variants[variant]["command"] = added["command"]
    full = runs.get("full", {})
    tests = {
        other: [
            {"seed": seed} | _paired_tests(name, labels, rows, by_seed[seed], samples)
            for seed, rows in full.items()
            if seed in by_seed
        ]
        for other, by_seed in runs.items()
        if other not in ("full", "adapted")
    }
    sizes = {"samples": len(ids), "clusters": len(set(clusters)), "unit": unit, "classes": len(set(labels))}
    return earlier | {"test_set": sizes, "variants": variants, "mcnemar": tests}, answers


def _paired_tests(
    name: str, gold: list[str], first: dict[str, dict], second: dict[str, dict], samples: Sequence[np.ndarray]
) -> dict:
    """McNemar's test of two runs' most probable answers, and the bootstraps of the differences in what is shown."""
    given = [[row["distribution"] for row in rows.values()] for rows in (first, second)]
    right = [[answer == label for answer, label in zip(run, gold, strict=True)] for run in given]
    shown = EXPERIMENTS[name].shown
    bootstrap = {metric: compare(gold, given[:1], given[1:], samples, metric) for metric in shown}
    return mcnemar(*right) | {"bootstrap": bootstrap}


def _figures(
    name: str, by_seed: dict[int, dict[str, dict]], gold: list[str], samples: Sequence[np.ndarray]
) -> dict[str, dict]:
    """The metrics of each kind of answer, by seed; of the distribution also intervals."""
    figures: dict[str, dict] = {}
    for answer in ANSWERS:
        given = [[row[answer] for row in rows.values()] for rows in by_seed.values()]
        measured = [measure(gold, one) for one in given]
        figures[answer] = {metric: [round(one[metric], 6) for one in measured] for metric in METRICS}
        figures[answer]["unparsable"] = sum(one.count(None) for one in given)
        if answer == "distribution":
            bounds = interval(gold, given, samples)
            figures[answer] |= {f"{metric}_interval": bounds[metric] for metric in EXPERIMENTS[name].shown}
    return figures


def _nll(rows) -> float:
    """Mean negative log-likelihood of the gold answers."""
    likelihood = [row["distribution"][row["gold"]] for row in rows]
    return round(float(-np.log(np.clip(likelihood, np.finfo(np.float32).tiny, None)).mean()), 6)


def probe(name: str, args: argparse.Namespace, more: list[str]) -> dict:
    """Measures a linear probe of an experiment's variants on all folds."""
    found = {}
    for variant in args.variants:
        rows: dict[str, dict] = {}
        for fold in range(1, EXPERIMENTS[name].folds + 1):
            folder = args.runs_dir / f"probe_{variant}_fold{fold}"
            options = json.dumps(fields_of(name)["corpus_options"] | {"fold": fold})
            command = [
                "-m",
                "experiments.probe",
                f"recipes/{EXPERIMENTS[name].recipe}.yaml",
                "--corpus_dir",
                args.corpus_dir,
            ]
            command += ["--corpus_options", options, "--split", "test", "--output", str(folder / "probe.json")]
            shown = {args.corpus_dir: "DIR", str(args.runs_dir): "RUNS_DIR"}
            run_steps(folder, [([*command, *VARIANTS[variant], *more], "probe.json")], shown)
            [task] = json.loads((folder / "probe.json").read_text(encoding="utf-8"))["tasks"].values()
            rows |= {row["id"]: row for row in task["predictions"]}
        gold, given = ([row[part] for row in rows.values()] for part in ("gold", "answer"))
        found[variant] = {metric: round(value, 6) for metric, value in measure(gold, given).items()}
    return found


def main_table(name: str, part: dict) -> str:
    """A table with one row per variant, and one per linear probe."""
    shown = EXPERIMENTS[name].shown
    rows = []
    for variant, own in part["variants"].items():
        for probe_row in (False, True):
            if probe_row and variant not in part.get("probe", {}):
                continue
            label = name_of(EXPERIMENTS[name], variant) + (", linear probe" if probe_row else "")
            cells = [label, "" if probe_row else str(len(own["seeds"]))]
            for metric in shown:
                if probe_row:
                    cells.append(percent(part["probe"][variant][metric]))
                    continue
                values = [100 * value for value in own["answers"]["distribution"][metric]]
                low, high = own["answers"]["distribution"][f"{metric}_interval"]
                cells.append(f"{mean_and_deviation(values, 2)} ({percent(low)} to {percent(high)})")
            for answer in ("greedy", "experts", "llm"):
                values = [] if probe_row else [100 * value for value in own["answers"][answer][shown[0]]]
                cells.append("" if probe_row else mean_and_deviation(values, 2))
            rows.append(cells)
    head = ["model", "seeds", *(f"{METRICS[metric]} (95 % interval)" for metric in shown)]
    first = METRICS[shown[0]]
    return table([*head, f"{first}, greedy", f"{first}, experts alone", f"{first}, LLM alone"], rows)


def headline(data: dict) -> str:
    """The README's table: one row per experiment and variant with a single line of figures."""
    rows = []
    for name, part in data.items():
        shown = EXPERIMENTS[name].shown[0]
        for variant, own in part["variants"].items():
            if variant not in ("full", "adapted", *EXPERIMENTS[name].single):
                continue
            values = [100 * value for value in own["answers"]["distribution"][shown]]
            low, high = own["answers"]["distribution"][f"{shown}_interval"]
            probed = part.get("probe", {}).get(variant)
            label = name_of(EXPERIMENTS[name], variant)
            cells = [EXPERIMENTS[name].title.partition(":")[0], label, METRICS[shown], mean_and_deviation(values, 2)]
            rows.append([*cells, f"{percent(low)} to {percent(high)}", percent(probed[shown]) if probed else ""])
    return table(["corpus", "model", "metric", "EGMF", "95 % interval", "linear probe"], rows)


def render(data: dict) -> str:
    """The text of results/folds.md."""
    parts = [
        "# Corpora with folds: test results",
        "SmolLM2-135M-Instruct with LoRA. Every sample is tested once, in the fold that holds it out; figures are in "
        "percent over the answers of all folds together, mean ± standard deviation over seeds. UA, unweighted "
        "accuracy, is the mean of the classes' recalls. Intervals are percentile intervals of a bootstrap over actors "
        f"or speakers, of MVSA over tweets ({RESAMPLES:,} resamples). The first columns are the most probable answer "
        "of `score_labels()`; *greedy* is the text of plain `generate()`; *experts alone* is the expert readout "
        "without the LLM, and *LLM alone* is the LLM, which reads the pseudo tokens, without the readout. A *linear "
        "probe* reads the same features and learns from the same rows (`experiments/probe.py`); a cross-validation of "
        "the training rows chooses its penalty.",
        "In the commands, `whisper-base-encoder` is a local folder with the encoder of `openai/whisper-base`, the "
        "recipe's `audio_tower`.",
        "Settings were chosen on validation folds (`--validation`), never on a test fold. But a validation fold of "
        "one run is a test fold of another, so they were chosen with knowledge of all actors, speakers and tweets. No "
        "model was trained on those it is tested on. CASIA has four speakers: a bootstrap over so few gives intervals "
        "that are too narrow.",
    ]
    for name, part in data.items():
        one = EXPERIMENTS[name]
        parts += [f"## {one.title}", *([one.note] if one.note else []), main_table(name, part)]
        if any(part["mcnemar"].values()):
            rows = [
                [name_of(one, other), str(test["seed"]), str(test["first_only"]), str(test["second_only"])]
                + [f"{test['p_value']:.1e}", *(_difference(test["bootstrap"][metric]) for metric in one.shown)]
                for other, tests in part["mcnemar"].items()
                for test in tests
            ]
            whole = name_of(one, "full")
            unit = part["test_set"]["unit"]
            parts.append(
                f"{whole[0].upper()}{whole[1:]} against the other models: McNemar's exact test of the accuracy, and "
                "the differences with their 95 % intervals. The test takes all samples for independent; the intervals "
                f"draw whole {unit}."
            )
            head = ["against", "seed", f"only {whole} correct", "only the other correct", "p"]
            parts.append(table([*head, *(METRICS[metric] for metric in one.shown)], rows))
        nll = [[name_of(one, variant), f"{np.mean(own['nll']):.3f}"] for variant, own in part["variants"].items()]
        parts.append(table(["model", "negative log-likelihood of the gold answer"], nll))
        parts.append("Commands of the first fold of one seed; others differ in `fold` and in `--seed`:")
        parts.append("```bash\n" + "\n".join(own["command"] for own in part["variants"].values()) + "\n```")
    parts.append("Made from `results/folds.json` by `python -m experiments.folds render`.")
    return "\n\n".join(parts) + "\n"


def _difference(test: dict[str, float]) -> str:
    """A difference in points with its interval."""
    low, high = (f"{100 * test[bound]:+.2f}" for bound in ("low", "high"))
    return f"{100 * test['difference']:+.2f} ({low} to {high})"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("run", "train and test every fold"), ("probe", "linear probes of every fold")):
        runner = commands.add_parser(command, help=text)
        runner.add_argument("name", choices=EXPERIMENTS)
        runner.add_argument("--corpus_dir", required=True)
        runner.add_argument("--runs_dir", type=Path, required=True)
        runner.add_argument("--variants", nargs="+", choices=NAMES, default=["full"])
        if command == "run":
            runner.add_argument("--seeds", type=int, nargs="+", default=[1111])
            runner.add_argument("--folds", type=int, nargs="+", help="by default all")
            runner.add_argument("--validation", action="store_true", help="evaluate on the next fold instead")
    collector = commands.add_parser("collect", help="runs -> results/folds.json")
    collector.add_argument("name", choices=EXPERIMENTS)
    collector.add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/folds.json -> results/folds.md")
    args, more = parser.parse_known_args(arguments)
    file = RESULTS / "folds.json"
    if more and args.command not in ("run", "probe"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if args.command == "run":
        run(args.name, args, more)
        return
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if args.command == "render":
        write_page("folds", render(data), headline(data))
        return
    if args.command == "probe":
        data.setdefault(args.name, {}).setdefault("probe", {}).update(probe(args.name, args, more))
    else:
        saved = RESULTS / f"{args.name}_answers.csv"
        known = read_answers(saved) if saved.exists() else {}
        data[args.name], answers = add_runs(args.name, args.runs_dir, data.get(args.name, {}), known)
        write_answers(saved, answers)
    data = {name: data[name] for name in EXPERIMENTS if name in data}
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
