"""Plots of an evaluation (`predictions.jsonl`) or of a training run (`log.jsonl`), as PNG files."""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib import font_manager  # noqa: E402

from egmf.evaluation.reliability import reliability, top_answers  # noqa: E402
from egmf.files import read_json_lines  # noqa: E402
from egmf.processing_egmf import AffectTask  # noqa: E402


UNPARSABLE = "unparsable"
# Families with Chinese characters, best first; labels that a font lacks are drawn as boxes.
_CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei")
_FOUND = {font.name for font in font_manager.fontManager.ttflist}
plt.rcParams["font.family"] = [*(name for name in _CJK if name in _FOUND), "DejaVu Sans"]


def plot_confusion(rows: list[dict], answer: str, task: AffectTask, path: Path) -> None:
    """Draws the confusion matrix of gold labels and answers: counts, coloured by the share of the gold label."""
    given = [row["answers"][answer] or UNPARSABLE for row in rows]
    columns = [*task.answers, *([UNPARSABLE] if UNPARSABLE in given else [])]
    counts = np.zeros((len(task.answers), len(columns)), dtype=int)
    for row, label in zip(rows, given, strict=True):
        counts[task.answers.index(row["gold"]), columns.index(label)] += 1
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, axes = plt.subplots(figsize=(1.5 + 0.9 * len(columns), 1.5 + 0.7 * len(task.answers)))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(task.answers)), task.answers)
    axes.set(xlabel=f"answer ({answer})", ylabel="gold", title=f"{task.name}: {len(rows)} samples")
    _save(figure, path)


def plot_scores(rows: list[dict], answer: str, task: AffectTask, path: Path) -> None:
    """Draws predicted against gold scores. Unparsable answers are omitted and counted in the title."""
    pairs = np.asarray([(row["gold"], row["answers"][answer]) for row in rows if row["answers"][answer] is not None])
    figure, axes = plt.subplots(figsize=(5, 5))
    limits = [task.low - 0.1, task.high + 0.1]
    axes.plot(limits, limits, color="grey", linewidth=1)
    if len(pairs):
        # Scores are discrete; a little noise separates equal points.
        noise = np.random.default_rng(0).uniform(-0.3 * task.step, 0.3 * task.step, len(pairs))
        axes.scatter(pairs[:, 0] + noise, pairs[:, 1], s=8, alpha=0.4)
    axes.set(xlim=limits, ylim=limits, xlabel="gold score", ylabel=f"score ({answer})")
    axes.set_title(f"{task.name}: {len(pairs)} samples, {len(rows) - len(pairs)} unparsable")
    _save(figure, path)


def plot_reliability(rows: list[dict], task: AffectTask, temperature: float, path: Path) -> None:
    """Draws accuracy against confidence in bins, at the fitted temperature and, if it is not 1, at temperature 1."""
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for shown, power in {temperature: 1.0, 1.0: temperature}.items():  # one curve for a temperature of 1
        confidence, right, _ = top_answers(rows, task, power)
        counts, means, shares = zip(*reliability(confidence, right), strict=True)
        axes.plot(means, shares, linewidth=1, label=f"temperature {shown:.3g}")
        axes.scatter(means, shares, s=[10 + 300 * count / len(rows) for count in counts], alpha=0.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the answer", ylabel="share of correct answers")
    axes.set_title(f"{task.name}: {len(rows)} samples")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_gates(rows: list[dict], groups: list[str], path: Path) -> None:
    """Draws the mean gate weights of each group of rows: of the experts, and of the modalities in each expert."""
    names = list(dict.fromkeys(groups))
    experts = list(rows[0]["gate_weights"]["expert"])
    modalities = list(rows[0]["gate_weights"]["modality"][experts[0]])

    def means(weight) -> list[float]:
        weights = [(group, weight(row["gate_weights"])) for row, group in zip(rows, groups, strict=True)]
        return [float(np.mean([value for group, value in weights if group == name])) for name in names]

    panels = [("experts", experts, lambda gates, part: gates["expert"][part])]
    panels += [
        (f"{expert} expert", modalities, lambda gates, part, expert=expert: gates["modality"][expert][part])
        for expert in experts
    ]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 1 + 0.35 * len(names)), sharey=True)
    for axes, (title, parts, weight) in zip(all_axes, panels, strict=True):
        start = np.zeros(len(names))
        for part in parts:
            width = np.asarray(means(lambda gates, part=part, weight=weight: weight(gates, part)))
            axes.barh(names, width, left=start, label=part)
            start += width
        axes.set(xlim=(0, 1), title=title)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    all_axes[0].invert_yaxis()
    _save(figure, path)


def plot_conditions(
    table: dict[str, dict[str, list[float]]], measures: tuple[str, ...], title: str, path: Path
) -> None:
    """Draws a model's metrics by condition, one panel per metric, with the spread over seeds.

    Args:
        table: One value per seed, by condition and metric. Numeric conditions are drawn as a line, others as bars.
        measures: The metrics to draw.
        title: The title of the figure.
        path: The PNG file.
    """
    figure, all_axes = plt.subplots(1, len(measures), figsize=(2 + 4 * len(measures), 3.6), squeeze=False)
    for axes, measure in zip(all_axes[0], measures, strict=True):
        values = {condition: row[measure] for condition, row in table.items() if row.get(measure)}
        means = [float(np.mean(seeds)) for seeds in values.values()]
        spread = [float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0 for seeds in values.values()]
        if all(condition.replace(".", "").isdecimal() for condition in values):
            axes.errorbar([float(condition) for condition in values], means, spread, marker="o", capsize=3)
            axes.set_xlabel("missing rate")
        else:
            axes.bar(list(values), means, yerr=spread, capsize=3)
            axes.tick_params(axis="x", rotation=30)
        axes.set_ylabel(measure)
    figure.suptitle(title)
    figure.tight_layout()
    _save(figure, path)


def plot_training(log: Path, path: Path) -> None:
    """Draws a run's loss in each phase, and the validation metrics below it, from its `log.jsonl`.

    Args:
        log: The log; entries without a `phase` belong to the last phase.
        path: The PNG file.
    """
    phases: dict[str, list[dict]] = {}
    for entry in map(json.loads, filter(None, read_json_lines(log))):
        phases.setdefault(entry.get("phase", "training"), []).append(entry)
    figure, all_axes = plt.subplots(2, len(phases), figsize=(4.5 * len(phases), 6), squeeze=False)
    for (phase, entries), (losses, metrics) in zip(phases.items(), all_axes.T, strict=True):
        for name in dict.fromkeys(name for entry in entries for name in entry):
            is_loss = name == "loss" or name.startswith("eval_") and name.endswith("loss")
            is_metric = name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_unparsable"))
            points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
            if points and (is_loss or is_metric):
                marker = "o" if name.startswith("eval_") else None
                (losses if is_loss else metrics).plot(*zip(*points, strict=True), label=name, marker=marker, ms=3)
        losses.set(title=phase, ylabel="loss")
        metrics.set_ylabel("validation")
        for axes in (losses, metrics):
            axes.set_xlabel("step")
            axes.set_visible(bool(axes.lines))
            if axes.lines:
                axes.legend(fontsize="x-small")
    figure.tight_layout()
    _save(figure, path)


def plot_timeline(answers: list[dict], path: Path) -> None:
    """Draws the answers to the segments of a recording over time.

    At the top are the probabilities of the labels, or the scores with their intervals; beneath are the words, as many
    as there is room for, and the gate's weights of the modalities.

    Args:
        answers: The lines of `predict.py` for one recording.
        path: The PNG file.

    Raises:
        ValueError: If no segment has an answer.
    """
    parts = [answer for answer in answers if "segments" not in answer and answer["error"] is None]
    if not parts:
        raise ValueError("plot: got no answered segment, wanted some")
    parts = [{"start": 0.0, "end": part["seconds"] or 1.0, **part} for part in parts]
    start, end = (np.array([part[name] for part in parts]) for name in ("start", "end"))
    figure, (top, words, gates) = plt.subplots(
        3, sharex=True, figsize=(float(np.clip(len(parts) / 3, 9, 40)), 7), height_ratios=(4, 1, 1.6)
    )
    if "label" in parts[0]:
        for name in parts[0]["probabilities"]:
            _draw_spans(top, start, end, [part["probabilities"][name] for part in parts], name)
        top.set(ylim=(0, 1), ylabel="probability")
    else:
        _draw_spans(top, start, end, [part["score"] for part in parts], "score (mean)")
        low, high = zip(*(part["interval"] for part in parts), strict=True)
        for edges in zip(start, end, low, high, strict=True):
            top.fill_between(edges[:2], *edges[2:], color="C0", alpha=0.2, linewidth=0)
        top.set_ylabel("score, 5 % to 95 %")
    for name in parts[0]["gate_weights"]["modality"][next(iter(parts[0]["gate_weights"]["modality"]))]:
        _draw_spans(gates, start, end, [_modality_weight(part["gate_weights"], name) for part in parts], name)
    gates.set(ylim=(0, 1), ylabel="gate weight", xlabel="seconds")
    spoken = [part for part in parts if part.get("text")]
    room = int(figure.get_figwidth() * 1.5)  # texts side by side
    look = {"rotation": 25, "rotation_mode": "anchor", "fontsize": "x-small", "clip_on": True, "parse_math": False}
    for part in spoken[:: max(1, -(-len(spoken) // room))]:
        text = part["text"] if len(part["text"]) <= 30 else part["text"][:29] + "\u2026"
        words.text(part["start"], 0.05, text, **look)
    words.set(yticks=[], ylabel="words")
    words.set_visible(bool(spoken))
    for axes in (top, gates):
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    top.set_title(Path(parts[0]["file"]).name, parse_math=False)
    _save(figure, path)


def _modality_weight(gates: dict, modality: str) -> float:
    """The weight of a modality over all experts."""
    return sum(weight * gates["modality"][expert][modality] for expert, weight in gates["expert"].items())


def _draw_spans(axes, start: np.ndarray, end: np.ndarray, values: list[float], name: str) -> None:
    """Draws one value per segment, joined where a segment begins before or when the last one ends."""
    times, shown = [], []
    for place, value in enumerate(values):
        if place and start[place] > end[place - 1] + 0.01:  # NaN interrupts the line
            times.append(end[place - 1])
            shown.append(np.nan)
        times += [start[place], end[place]]
        shown += [value, value]
    axes.plot(times, shown, label=name)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
