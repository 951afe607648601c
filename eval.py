"""Evaluates a trained EGMF model on a split of a corpus, and compares two evaluations.

    python eval.py runs/mosi/model --corpus mosi --corpus_dir DIR --split test --output runs/mosi/test
    python eval.py ... --compare runs/other/test/predictions.jsonl

Writes to the output folder `metrics.json` (of a corpus that sorts its rows into groups, by group too),
`predictions.jsonl` (id, gold, greedy text, distribution, answers, gate weights) and plots as PNG (the confusion
matrix, or the predicted against the true scores; the gate weights by group or label), and prints one table. Two
answers are judged side by side: the greedy text of plain `generate()`, in which an unparsable answer is a wrong one
and is counted, and the most probable legal answer of `score_labels()`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from corpora import CORPORA, group_of, load_corpus
from evaluation import (
    AffectCollator,
    ask,
    classification_metrics,
    gold_answer,
    mcnemar,
    prompt_lengths,
    regression_metrics,
)
from pipeline_egmf import gate_names
from plots import plot_confusion, plot_gates, plot_scores


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--corpus", required=True, choices=CORPORA)
    parser.add_argument("--corpus_dir", help="folder with the corpus's published files")
    parser.add_argument("--corpus_options", type=json.loads, help="JSON; by default those the model was trained with")
    parser.add_argument("--task", help="task to ask; by default the first that the model was trained on")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--modalities", nargs="+", help="what the model may see; by default what it was trained on")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", required=True, type=Path, help="folder for metrics.json and predictions.jsonl")
    parser.add_argument("--compare", type=Path, help="predictions.jsonl of another run on the same samples")
    return parser.parse_args(arguments)


def load_training_fields(model: str) -> dict:
    """The recipe a model was trained by, from `recipe.json` beside its weights; empty where there is none."""
    file = cached_file(model, "recipe.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


@torch.no_grad()
def predict(model, processor, rows, task, modalities: list[str], batch_size: int, device) -> list[dict]:
    """One prediction per row, in the rows' order."""
    rows, collator = ask(rows, [task]), AffectCollator(processor, [task], modalities, with_answers=False)
    # Alike lengths together: less padding, the same numbers.
    order = sorted(range(len(rows)), key=prompt_lengths(rows, collator).__getitem__)
    loader = DataLoader(rows.select(order), batch_size=batch_size, collate_fn=collator)
    candidates, predictions = processor.candidates(task), []
    for batch in tqdm(loader, desc="evaluating", unit="batch", disable=None):
        inputs = {name: value.to(device) for name, value in batch.items() if not name.endswith("_index")}
        inputs = model.encode_media(inputs)  # once for both answers
        scores = model.score_labels(candidates=candidates, **inputs)
        generated = model.generate(**inputs, max_new_tokens=processor.max_answer_tokens(task), do_sample=False)
        greedy = processor.decode_answers(generated[:, inputs["input_ids"].shape[1] :], task)
        distributions = processor.summarize(scores.log_probs, task)
        gates = gate_names(scores.gate_weights, model.config.experts, model.config.modalities)
        predictions += zip(greedy, distributions, gates, strict=True)

    results: list[dict] = [{}] * len(order)
    for index, (greedy, distribution, gate) in zip(order, predictions, strict=True):
        answers = {"greedy": greedy.value, "distribution": task.parse(distribution.top)}
        if task.kind == "regression":
            answers |= {"expected": distribution.expected, "median": distribution.median}
        results[index] = {
            "id": rows[index]["id"],
            "gold": gold_answer(rows[index], task),
            "greedy_text": greedy.text,
            "answers": answers,
            "distribution": distribution.probabilities,
            "gate_weights": gate,
        }
        if error := collator.errors.get(rows[index]["id"]):
            results[index]["media_error"] = error
    return results


def metrics_of(predictions: list[dict], task) -> dict[str, dict]:
    """Metrics by kind of answer."""
    gold = [row["gold"] for row in predictions]
    measure = classification_metrics if task.kind == "classification" else regression_metrics
    return {
        answer: measure(gold, [row["answers"][answer] for row in predictions]) for answer in predictions[0]["answers"]
    }


def write_plots(predictions: list[dict], groups: list[str | None], task, folder: Path) -> None:
    """The pictures of an evaluation, as PNG files; gate weights by group, of a corpus without groups by label."""
    if task.kind == "classification":
        plot_confusion(predictions, "distribution", task, folder / "confusion.png")
        labels = [row["gold"] for row in predictions]
    else:
        plot_scores(predictions, "expected", task, folder / "scores.png")
        labels = ["all"] * len(predictions)
    plot_gates(predictions, labels if None in groups else groups, folder / "gates.png")


def compare(predictions: list[dict], other_file: Path, answer: str) -> dict:
    """Paired test of two runs' answers to the same samples, by id."""
    others = {row["id"]: row for row in map(json.loads, other_file.read_text(encoding="utf-8").splitlines())}
    if set(others) != {row["id"] for row in predictions}:
        raise ValueError(f"{other_file}: its ids are not those of this evaluation, wanted the same samples")
    correct = [row["answers"][answer] == row["gold"] for row in predictions]
    return mcnemar(correct, [others[row["id"]]["answers"][answer] == row["gold"] for row in predictions])


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    device = Accelerator().device
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).to(device).eval()
    trained = load_training_fields(args.model)
    name = args.task or trained.get("tasks", [args.corpus])[0]
    if name not in processor.tasks:
        raise ValueError(f"task: got {name!r}, wanted one of {', '.join(processor.tasks)}")
    task = processor.tasks[name]
    options = args.corpus_options
    if options is None:
        options = trained.get("corpus_options", {}) if trained.get("corpus") == args.corpus else {}
    rows = load_corpus(args.corpus, args.corpus_dir, **options)[args.split]
    allowed = args.modalities or trained.get("modalities", model.config.modalities)
    modalities = [modality for modality in model.config.modalities if modality in allowed]
    predictions = predict(model, processor, rows, task, modalities, args.batch_size, device)

    metrics = metrics_of(predictions, task)
    report = {"model": args.model, "task": task.name, "split": args.split, "samples": len(rows), "answers": metrics}
    report["modalities"] = modalities
    groups = [group_of(args.corpus, row["id"]) for row in predictions]
    if None not in groups:
        report["groups"] = {
            group: metrics_of([row for row, own in zip(predictions, groups, strict=True) if own == group], task)
            for group in dict.fromkeys(groups)
        }
    if args.compare:
        report["compared_to"] = {
            answer: compare(predictions, args.compare, answer) for answer in ("greedy", "distribution")
        }

    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    (args.output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_plots(predictions, groups, task, args.output)

    columns = list(next(iter(metrics.values())))
    print(f"{task.name} / {args.split}: {len(rows)} samples")
    print("answer".ljust(14) + "".join(column.rjust(14) for column in columns))
    for answer, row in metrics.items():
        cells = (
            "-" if row[c] is None else f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns
        )
        print(answer.ljust(14) + "".join(cell.rjust(14) for cell in cells))
    for answer, test in report.get("compared_to", {}).items():
        print(f"{answer} against {args.compare}: {test}")


if __name__ == "__main__":
    main(sys.argv[1:])
