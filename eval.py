"""Evaluates a trained EGMF model on a split of a corpus, compares two evaluations, and removes modalities.

    python eval.py runs/mosi/model --corpus mosi --corpus_dir DIR --split test --output runs/mosi/test
    python eval.py ... --compare runs/other/test/predictions.jsonl
    python eval.py runs/meld/model --corpus cherma --task meld --label_map meld-cherma ...
    python eval.py ... --robustness mmin
    accelerate launch --config_file recipes/accelerate/ddp.yaml eval.py ...

Writes to the output folder `metrics.json` (also by group, if the corpus divides its rows into groups),
`predictions.jsonl` (id, gold, greedy text, distribution, answers, gate weights) and PNG plots (the confusion matrix or
predicted against true scores; gate weights by group or label; a reliability diagram), and prints one table. It
evaluates these answers: the greedy text of plain `generate()`, where unparsable answers are counted and are wrong; the
most probable legal answer of `score_labels()`; and the same of the LLM without the expert readout (`llm`) and of the
readout alone (`experts`). For scores it also evaluates the mean and the median of the distribution, and the mean of
`llm` and of `experts`. Intervals are 95 %, by bootstrap over speakers, videos, dialogues, recordings or, without any,
utterances. In `metrics.json`, `unreadable` is the number of samples that were answered without a file that cannot be
read, and `calibration` has the expected calibration error (15 bins) and the negative log-likelihood, with and without
the temperature fitted in training.

With a label map, the corpus's labels are the gold labels, and `answers` are mapped to them; `greedy_text` and
`distribution` remain the model's output. With `--robustness`, only `PROTOCOL.json`, `PROTOCOL.md` and `PROTOCOL.png`
are written: all metrics, their summary as a table, and a plot (see `robustness.py`).

A model whose recipe has `speaker_adaptation` gets each row with the center of its speaker's rows of the split, and
`metrics.json` says so.

The hidden layers of the towers are cached in `HF_HOME` for later evaluations, also of other models with these towers.

Several processes share the samples, and the main process writes the same files as a single process.
"""

import argparse
import importlib
import inspect
import json
import logging
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, PreTrainedConfig

from corpora import CORPORA, clusters_of, group_of, load_corpus
from corpora.splits import SPLITS_FILE, read_splits
from egmf.arguments import mapping, positive
from egmf.commands import add_model, check_model, load_training_fields, loading_options, run_command
from egmf.data.collator import LABEL_COLUMNS, AffectCollator, check_labels, expand_by_task
from egmf.data.mixture import has_any
from egmf.data.speakers import name_speakers, speaker_centers
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.evaluation import robustness
from egmf.evaluation.label_maps import LABEL_MAPS
from egmf.evaluation.measures import measure_of, metrics_of
from egmf.evaluation.plots import plot_conditions, plot_confusion, plot_gates, plot_reliability, plot_scores
from egmf.evaluation.predictor import Predictor
from egmf.evaluation.reliability import calibration_of
from egmf.evaluation.significance import ENOUGH, intervals, mcnemar, paired_differences, resample
from egmf.files import read_json_lines, weights_digest, write_whole
from egmf.pipeline_egmf import adaptation_warning
from egmf.processes import LONGEST_WAIT, default_workers, in_turns, silence_other_ranks
from egmf.tables import with_interval


SPLITTING = ("fold", "folds")  # options that choose the test split
OF_VALIDATION = ("validation", "validation_videos")  # those that divide the other rows


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser)
    parser.add_argument("--corpus", required=True, choices=CORPORA)
    parser.add_argument("--corpus_dir", help="folder with the corpus's published files; for a table, its file")
    parser.add_argument("--corpus_options", type=mapping, help="JSON; added to those the model was trained with")
    parser.add_argument("--task", help="task to ask; by default the first that the model was trained on")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--modalities", nargs="+", help="what the model may see; by default what it was trained on")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--output", required=True, type=Path, help="folder for metrics.json and predictions.jsonl")
    parser.add_argument("--label_map", choices=LABEL_MAPS, help="from the task's answers to the corpus's labels")
    parser.add_argument("--compare", type=Path, help="predictions.jsonl of another run on the same samples")
    parser.add_argument("--robustness", choices=robustness.PROTOCOLS, help="missing or noisy modalities, by protocol")
    parsed = parser.parse_args(arguments)
    if parsed.compare and parsed.robustness:
        parser.error("--compare: not together with --robustness, which writes no predictions")
    return parsed


def write_plots(predictions: list[dict], groups: list[str | None], task, folder: Path) -> None:
    """Writes an evaluation's plots as PNG files; gate weights by group, or by label if the corpus has no groups."""
    if task.kind == "classification":
        plot_confusion(predictions, "distribution", task, folder / "confusion.png")
        labels = [row["gold"] for row in predictions]
    else:
        plot_scores(predictions, "expected", task, folder / "scores.png")
        labels = ["all"] * len(predictions)
    plot_gates(predictions, labels if None in groups else groups, folder / "gates.png")


def read_predictions(file: Path, rows, task) -> dict[str, dict]:
    """Reads another run's answers to the same samples, by id.

    Raises:
        ValueError: If its ids or gold labels differ from those of `rows`.
    """
    others = {}
    for number, line in enumerate(read_json_lines(file), 1):
        try:
            row = json.loads(line)
            others[row["id"]] = {"gold": row["gold"], "answers": row["answers"]}
            row["answers"]["distribution"]  # it must be there
        except (ValueError, KeyError, TypeError):
            wanted = "a row of predictions.jsonl with id, gold and answers (at least `distribution`)"
            raise ValueError(f"{file}: line {number}: got {line[:60]!r}, wanted {wanted}") from None
    gold = dict(zip(rows["id"][:], rows[LABEL_COLUMNS[task.kind]][:], strict=True))
    if {row_id: row["gold"] for row_id, row in others.items()} != gold:
        what = "gold labels" if set(others) == set(gold) else "ids"
        raise ValueError(f"{file}: its {what} are not those of this evaluation, wanted the same samples")
    return {row_id: row["answers"] for row_id, row in others.items()}


def compare(predictions: list[dict], others: dict[str, dict], task, samples: list) -> dict[str, dict]:
    """Runs paired tests of this run against another one on the same samples, for each kind of answer."""
    gold, tests = [row["gold"] for row in predictions], {}
    known = set.intersection(*map(set, others.values()))  # a baseline may have one kind of answer only
    for answer in (one for one in predictions[0]["answers"] if one in known):
        here = [row["answers"][answer] for row in predictions]
        there = [others[row["id"]][answer] for row in predictions]
        tests[answer] = {"differences": paired_differences(measure_of(task), gold, here, there, samples)}
        if task.kind == "classification":
            correct = ([a == b for a, b in zip(run, gold, strict=True)] for run in (here, there))
            tests[answer]["mcnemar"] = mcnemar(*correct)
    return tests


def table_of(metrics: dict[str, dict], bounds: dict[str, dict]) -> str:
    """A text table with one row per metric and one column per kind of answer, with intervals."""
    lines = [["", *metrics]]
    for name, value in next(iter(metrics.values())).items():
        if isinstance(value, dict):
            lines += [
                [f"{name} {part}", *(with_interval(row[name][part]) for row in metrics.values())] for part in value
            ]
        else:
            cells = (with_interval(row[name], bounds[answer].get(name)) for answer, row in metrics.items())
            lines.append([name, *cells])
    width = max(len(line[0]) for line in lines)
    return "\n".join(line[0].ljust(width) + "".join(cell.rjust(26) for cell in line[1:]) for line in lines)


def evaluate(
    args: argparse.Namespace, predict: Predictor, rows, modalities: list[str], report: dict, others: dict | None
) -> None:
    """Runs the standard evaluation; writes predictions, metrics, tests and plots into the output folder.

    `others` are another run's answers, from [`read_predictions`].
    """
    task = predict.label_task
    predictions = predict(rows, modalities)[0]
    if not PartialState().is_main_process:
        return
    with (args.output / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)

    unread = [f"{row['id']}: {row['media_error']}" for row in predictions if "media_error" in row]
    report["unreadable"] = len(unread)
    gold = [row["gold"] for row in predictions]
    metrics = metrics_of(predictions, task)
    unit, clusters = clusters_of(args.corpus, rows["id"][:], rows["speaker"][:])
    samples = resample(clusters)
    bounds = {
        answer: intervals(measure_of(task), gold, [row["answers"][answer] for row in predictions], samples)
        for answer in metrics
    }
    report |= {"answers": metrics, "intervals": bounds}
    report["clusters"] = {"unit": unit, "number": len(set(clusters))}
    groups = [group_of(args.corpus, row["id"]) for row in predictions]
    if None not in groups:
        report["groups"] = {
            group: metrics_of([row for row, own in zip(predictions, groups, strict=True) if own == group], task)
            for group in dict.fromkeys(groups)
        }
    if others is not None:
        report["compared_to"] = compare(predictions, others, task, samples)

    if predict.label_map is None:
        temperature = predict.processor.temperatures.get(task.name, 1.0)
        report["calibration"] = calibration_of(predictions, task, temperature)
        plot_reliability(predictions, task, temperature, args.output / "reliability.png")

    write_report(args.output / "metrics.json", report)
    write_plots(predictions, groups, task, args.output)

    number = report["clusters"]["number"]
    said = f"95 % intervals by {number} {unit}" if number > 1 else f"no intervals: they need more {unit} than one"
    said += f", too few: they are too narrow below {ENOUGH}" if 1 < number < ENOUGH else ""
    print(f"{args.corpus} / {args.split}: {len(rows)} samples; {said}")
    if unread:
        print(f"answered without a file that cannot be read: {len(unread)} samples, such as {unread[0]}")
    print(table_of(metrics, bounds))
    for name in ("before", "after") if "calibration" in report else ():
        figures = ", ".join(f"{key} {value:.4f}" for key, value in report["calibration"][name].items())
        print(f"calibration {name} temperature {report['calibration']['temperature']:.3g}: {figures}")
    for answer, tests in report.get("compared_to", {}).items():
        for name, test in [*tests["differences"].items(), ("mcnemar", tests.get("mcnemar"))]:
            if test is not None:
                figures = ", ".join(f"{key} {value:.4g}" for key, value in test.items())
                print(f"{answer} against {args.compare}, {name}: {figures}")


def evaluate_robustness(args: argparse.Namespace, predict: Predictor, rows, modalities, report: dict) -> None:
    """Runs a robustness protocol; writes all metrics, a table and a plot into the output folder."""
    report |= robustness.run(args.robustness, predict, rows, modalities)
    if not PartialState().is_main_process:
        return
    kind = predict.label_task.kind
    answer, measures = robustness.SHOWN[kind]
    title = f"{args.robustness}: {args.corpus} / {args.split}, {len(rows)} samples, {answer}"
    table = robustness.render(report, kind)
    write_report(args.output / f"{args.robustness}.json", report)
    (args.output / f"{args.robustness}.md").write_text(f"{title}\n\n{table}", encoding="utf-8")
    conditions = robustness.summarize(report, kind)
    del conditions["mean"]
    plot_conditions(conditions, measures, title, args.output / f"{args.robustness}.png")
    print(title, table, sep="\n\n", end="")


def write_report(path: Path, report: dict) -> None:
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def warn_of_other_splits(args: argparse.Namespace, trained: dict) -> None:
    """Warns if `--corpus_options` divide a corpus in another way than the options of its training did."""
    splitting = SPLITTING + OF_VALIDATION * (args.split == "validation")
    for name, value in (args.corpus_options or {}).items():
        parameter = inspect.signature(importlib.import_module(f"corpora.{args.corpus}").load).parameters.get(name)
        if name in splitting and parameter and value != (before := trained.get(name, parameter.default)):
            logging.warning("%s: got %s, not %s as in training: the model may know these rows", name, value, before)


def load_rows(args: argparse.Namespace, trained: dict, part: dict) -> tuple[Dataset, dict]:
    """The rows of the split, and the options with which their corpus was loaded.

    Args:
        args: The command line, whose `--corpus_options` add to those of the training.
        trained: The recipe of the model.
        part: The corpus's entry in it, if the model was trained on a mixture.

    Raises:
        ValueError: If the split has no rows, or see the corpus.
    """
    options = trained["corpus_options"] if trained.get("corpus") == args.corpus else part.get("options", {})
    if trained.get("corpus") == args.corpus or part:
        warn_of_other_splits(args, options)
    options = options | (args.corpus_options or {})
    if args.corpus == "table":  # the splits that training made; what it has not seen is test data
        options = {"splits": read_splits(Path(args.model).absolute().parent / SPLITS_FILE)} | options
    with in_turns():  # loading may generate the corpus
        corpus = load_corpus(args.corpus, args.corpus_dir, **options)
    rows = corpus[args.split]
    if not len(rows):
        wanted = f"one with rows: {', '.join(f'{name} ({len(own)})' for name, own in corpus.items() if len(own))}"
        raise ValueError(f"split: got {args.split}, which has no rows in {args.corpus}, wanted {wanted}")
    if trained.get("speaker_adaptation", False):
        rows = name_speakers(args.corpus, args.split, rows)
    return rows, options


def choose_modalities(args: argparse.Namespace, trained: dict, config: PreTrainedConfig) -> list[str]:
    """What the model may see, in its order: `--modalities`, or what it was trained on.

    Raises:
        ValueError: If it does not read one of them.
    """
    if unknown := set(args.modalities or ()) - set(config.modalities):
        wanted = f"some of those that the model reads: {', '.join(config.modalities)}"
        raise ValueError(f"modalities: got {', '.join(sorted(unknown))}, wanted {wanted}")
    allowed = args.modalities or trained.get("modalities", config.modalities)
    return [modality for modality in config.modalities if modality in allowed]


def read_clips(args: argparse.Namespace, predict: Predictor, rows: Dataset, modalities: list[str], adapted: bool):
    """Fills the predictor's cache of the towers' outputs and, with speaker adaptation, its centers."""
    model, seen = predict.model, [modality for modality in modalities if modality != "text"]
    if warning := adaptation_warning(model.config, seen, seen if adapted else []):
        logging.warning(warning)
    towers = [name for name in seen if getattr(model.base_model, f"{name}_tower") is not None]
    for name in seen:
        if not has_any(rows, COLUMNS[name] if name in towers else f"{name}_features"):
            logging.warning("%s: no row of %s / %s has it; the model answers without", name, args.corpus, args.split)
    if towers:
        predict.cache = TowerCache(model, predict.processor, towers)
        predict.cache.fill(rows.select_columns([COLUMNS[name] for name in towers]), predict.device)
        predict.num_workers = default_workers()
    if adapted:
        task = predict.task
        collator = AffectCollator(predict.processor, [task], modalities, with_answers=None, cache=predict.cache)
        predict.centers = speaker_centers(model, expand_by_task(rows, [task]), collator, args.batch_size)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    check_model(args.model, args.revision)
    device = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT).device
    silence_other_ranks()
    with in_turns():  # transformers copies the model's code into its cache
        loaded = loading_options(args)
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True, **loaded).to(device).eval()
        named = {"revision": args.revision} if args.revision else {}
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True, **named)
    processor.limit_length(model.config.text_config)
    trained = load_training_fields(args.model, args.revision)
    part = trained.get("corpora", {}).get(args.corpus, {})
    name = args.task or (part or trained).get("tasks", [args.corpus])[0]
    if name not in processor.tasks:
        raise ValueError(f"task: got {name!r}, wanted one of {', '.join(processor.tasks)}")
    task, label_map = processor.tasks[name], LABEL_MAPS.get(args.label_map)
    if label_map is not None:
        label_map.check(args.label_map, task)
    rows, options = load_rows(args, trained, part)
    predict = Predictor(model, processor, task, label_map, args.batch_size, device)
    check_labels(f"{args.corpus} / {args.split}", rows, predict.label_task)
    modalities, adapted = choose_modalities(args, trained, model.config), trained.get("speaker_adaptation", False)
    others = read_predictions(args.compare, rows, predict.label_task) if args.compare else None
    args.output.mkdir(parents=True, exist_ok=True)
    read_clips(args, predict, rows, modalities, adapted)

    report = {
        "model": args.model,
        "weights": weights_digest(Path(args.model)) if Path(args.model).is_dir() else None,
        **loaded,
        "corpus": args.corpus,
        "task": task.name,
        "label_map": args.label_map,
        "split": args.split,
        "samples": len(rows),
        "modalities": modalities,
        "speaker_adaptation": adapted,
        "corpus_options": {name: value for name, value in options.items() if name not in ("splits", "media")},
    }
    if args.robustness:
        evaluate_robustness(args, predict, rows, modalities, report)
    else:
        evaluate(args, predict, rows, modalities, report, others)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
