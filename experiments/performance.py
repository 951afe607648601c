"""Renders the cost of training steps and answers: results/performance.json -> results/performance.md.

    python -m bench.train_step --output results/performance.json
    python -m bench.answer --output results/performance.json
    python -m bench.launches --output results/performance.json
    python -m experiments.performance

The first three commands measure and write the JSON file; the last renders it.
"""

import json
import statistics

from egmf.tables import table
from experiments.pages import RESULTS


WAYS = ("plain", "floor", "egmf")
ALL_LAYERS = 28  # layers of Qwen3-0.6B and Qwen3-1.7B
# Launches of commit e8c8094, counted in the same way on a CPU.
LAUNCHES_BEFORE = {
    "fusion": "712",
    "score_labels, 7 labels": "66",
    "score_labels, 61 scores": "66, and the LLM's layers a second time",
}
# Shown until `make gpu` has measured: by hand, one H100 (torch 2.11.0, commit 0542f57), milliseconds, batch 16.
ON_GPU = [
    "## On a GPU",
    "The ratios below are of CPU time and do not hold on a GPU, where steps and answers of models of this size wait "
    "for kernel launches. One H100, torch 2.11.0, commit `0542f57`, bfloat16, batches of 16; not measured since:",
    table(
        ["Qwen3-0.6B, all layers, 114 tokens", "ms", "to prefill"],
        [
            ["prefill", "26.7", "1"],
            ["`score_labels`, 7 labels / 61 scores", "41.5 / 69.1", "1.55 / 2.59"],
            ["`generate`, 7 labels / 61 scores", "69.1 / 148.7", "2.59 / 5.59"],
        ],
    ),
    table(["training step, SmolLM2-135M", "ms"], [["plain", "195"], ["floor", "217"], ["egmf", "262"]]),
]


def launches(figures: dict[str, int]) -> list[str]:
    """The paragraphs on launched operations."""
    rows = [[name, LAUNCHES_BEFORE[name], str(count)] for name, count in figures.items()]
    return [
        "Launched operations, counted without a GPU (`python -m bench.launches --output results/performance.json`): a "
        "forward pass of the fusion with text, voice and face, and `score_labels` beside the fusion and the LLM's own "
        "layers. *Before* is commit `e8c8094`, counted on a CPU. Nothing in either waits for the GPU; before, the "
        "fusion waited four times. Goals: 200 for the fusion, missed; 40 for `score_labels`, met.",
        table(["forward pass", "before", "launches"], rows),
    ]


GOALS = {"time to plain": 0.85, "time to floor": 1.10, "memory to plain": 0.60, "7 labels": 1.15, "61 scores": 1.35}


def median_and_range(values: list[float]) -> str:
    """The median, minimum and maximum as "median (minimum to maximum)"."""
    shown = (f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))
    return "{} ({} to {})".format(*shown)


def ratios(values: list[float], others: list[float]) -> list[float]:
    """The ratio of two measurements in each repetition."""
    return [value / other for value, other in zip(values, others, strict=True)]


def judged(value: float, goal: str, digits: int = 2) -> str:
    """A ratio, and whether it meets its goal."""
    return f"{value:.{digits}f}, {'met' if value <= GOALS[goal] else 'missed'}"


def by_layer(depths: list[dict], measure) -> tuple[dict[str, float], dict[str, float]]:
    """For each method, the cost of one layer and the cost without layers, from `measure(depth, way)` at two depths."""
    few, more = depths
    layer = {way: (measure(more, way) - measure(few, way)) / (more["layers"] - few["layers"]) for way in WAYS}
    return layer, {way: measure(few, way) - few["layers"] * layer[way] for way in WAYS}


def with_all_layers(depths: list[dict], measure) -> dict[str, float]:
    """`measure(depth, way)` with all layers, by method: measured at one depth, or extrapolated linearly from two."""
    if len(depths) == 1:
        return {way: measure(depths[0], way) for way in WAYS}
    layer, rest = by_layer(depths, measure)
    return {way: rest[way] + ALL_LAYERS * layer[way] for way in WAYS}


def seconds_of(depth: dict, way: str) -> float:
    return statistics.median(depth["seconds"][way])


def bytes_of(depth: dict, way: str) -> float:
    return depth["memory"][way]


def weights_of(depth: dict, way: str) -> float:
    return depth["weights"][way]


def bytes_with_weights(depth: dict, way: str) -> float:
    return depth["memory"][way] + depth["weights"][way]


def name_of(model: str) -> str:
    return model.split("/")[1].removesuffix("-Instruct")


def judged_ratios(model: str, figures: dict) -> list[str]:
    """A row of the table of goals, for all layers, measured or extrapolated."""
    depths = figures["depths"]
    own, whole = (with_all_layers(depths, measure) for measure in (bytes_of, bytes_with_weights))
    turns = [
        with_all_layers(depths, lambda depth, way, turn=turn: depth["seconds"][way][turn])
        for turn in range(len(depths[0]["seconds"]["egmf"]))
    ]

    def time_to(other: str) -> str:
        values = [turn["egmf"] / turn[other] for turn in turns]
        value, verdict = judged(statistics.median(values), f"time to {other}").split(", ")
        return f"{value} ({min(values):.2f} to {max(values):.2f}), {verdict}"

    memory = whole["egmf"] / whole["plain"]
    return [
        name_of(model),
        "measured" if len(depths) == 1 else f"{ALL_LAYERS} layers, extrapolated",
        time_to("plain"),
        time_to("floor"),
        judged(memory, "memory to plain", 3) if "Qwen" in model else f"{memory:.3f}",  # a goal at 150,000 tokens
        f"{whole['floor'] / whole['plain']:.3f}",
        f"{own['egmf'] / own['plain']:.3f}",
    ]


def where_it_goes(models: dict) -> str:
    """Time and memory of one layer and of the rest, by method, for models measured at two depths."""
    rows = []
    for model, figures in models.items():
        if len(figures["depths"]) == 1:
            continue
        seconds, memory = (by_layer(figures["depths"], measure) for measure in (seconds_of, bytes_of))
        weights = with_all_layers(figures["depths"], weights_of)
        for way in WAYS:
            cells = [f"{ALL_LAYERS * seconds[0][way]:.1f}", f"{seconds[1][way]:.1f}"]
            cells += [f"{held / 1e9:.2f}" for held in (ALL_LAYERS * memory[0][way], memory[1][way], weights[way])]
            rows.append([name_of(model), way, *cells])
    head = ["model", "way", "layers, s", "rest, s", "layers, GB", "rest, GB", "weights, GB"]
    return table(head, rows)


def measured_steps(models: dict) -> str:
    rows = []
    for model, figures in models.items():
        for depth in figures["depths"]:
            seconds = depth["seconds"]
            cells = [name_of(model), str(depth["layers"] or "all"), *(median_and_range(seconds[way]) for way in WAYS)]
            cells += [median_and_range(ratios(seconds["egmf"], seconds[other])) for other in ("plain", "floor")]
            cells += [" / ".join(f"{depth['memory'][way] / 1e6:.0f}" for way in WAYS)]
            rows.append([*cells, " / ".join(f"{depth['weights'][way] / 1e6:.0f}" for way in WAYS)])
    head = ["model", "layers", "plain, s", "floor, s", "egmf, s", "egmf to plain", "egmf to floor"]
    return table([*head, "memory, MB", "weights, MB"], rows)


def answers_table(figures: dict) -> str:
    rows = []
    for way, seconds in figures["seconds"].items():
        kind, task = way.split(", ")
        to_prefill = ratios(seconds, figures["seconds"][f"prefill, {task}"])
        goal = judged(statistics.median(to_prefill), task).split(", ")[1] if kind == "score_labels" else ""
        rate = median_and_range([figures["batch_size"] / value for value in seconds])
        rows.append([way, rate, median_and_range(to_prefill) if kind != "prefill" else "", goal])
    return table(["way", "samples per second", "time to prefill's", "goal"], rows)


def on_gpu(data: dict) -> list[str]:
    """The paragraphs on a GPU: what `make gpu` measured, or else the measurements by hand."""
    if not {"train_step on cuda", "answer on cuda"} <= data.keys():
        return ON_GPU
    step, answer = data["train_step on cuda"], data["answer on cuda"]
    machine = step["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    return [
        "## On a GPU",
        f"`make gpu` on one {machine['device']}; {versions}. Seconds of wall time between synchronisations, medians "
        "(lowest to highest) of interleaved repetitions in one process. The names are those of the section on a CPU.",
        measured_steps(step["models"]),
        f"Answers of {name_of(answer['model'])}, {answer['layers']} layers, batches of {answer['batch_size']} prompts "
        f"of {answer['tokens']} tokens on average:",
        answers_table(answer),
    ]


def setting(machine: dict) -> str:
    cores = f"{machine['cores']} CPU cores ({machine['instructions']}), one of them used"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    return f"{cores}; load average before the run {machine['load_before']:.1f}; {versions}."


def render(data: dict) -> str:
    """The text of results/performance.md."""
    step, answer = data["train_step"], data["answer"]
    models = step["models"]
    repetitions = len(next(iter(models.values()))["depths"][0]["seconds"]["egmf"])
    batches = "; ".join(
        f"{name_of(model)}: `{figures['recipe']}`, {figures['batches']} batches of {figures['batch_size']}"
        for model, figures in models.items()
    )
    (memory_rows,) = {depth["memory_batch_size"] for figures in models.values() for depth in figures["depths"]}
    parts = [
        "# What training steps and answers cost",
        *on_gpu(data),
        *launches(data["launches"]),
        "## On a CPU",
        "Seconds are of CPU time on one core: other programs disturb them less than they disturb the clock. Medians "
        "(lowest to highest) of interleaved repetitions in one process; ratios are taken repetition by repetition.",
        "### A training step",
        f"`python -m bench.train_step --output results/performance.json`, {repetitions} repetitions. "
        + setting(step["machine"]),
        "*Plain* is LoRA on the bare LLM with the same text, logits at all positions, rows in random order, as PEFT "
        "and Trainer do it by default. *Floor* is the LLM's own forward and backward pass on EGMF's sequences, pseudo "
        "tokens included, with logits for the answer's tokens alone. *Egmf* is what `train.py` does: the fusion "
        "learns, too, and reads voice and face. Floor and egmf leave out PEFT's cast of its inputs to float32, as "
        "`train.py` does.",
        f"Time is that of the steps of an epoch. Recipe and rows: {batches}. Memory is the most that torch holds in a "
        f"step on one batch of {memory_rows} rows, the recipes' own size. All three use the same rows, short and "
        "long, and pad them to the longest, as in the worst batch of a corpus.",
        f"Goals: time to plain at most {GOALS['time to plain']}, time to floor at most {GOALS['time to floor']:.2f}, "
        f"memory to plain at most {GOALS['memory to plain']:.1f}, at a vocabulary of 150,000 (Qwen3's has 151,936; "
        "SmolLM2's 49,152). Memory includes the weights, except in the last column. Each repetition is extrapolated "
        "separately, so the ranges include the extrapolated noise of the shallow models.",
        table(
            ["model", "layers", "time to plain", "time to floor", "memory to plain", "memory, floor to plain"]
            + ["memory to plain, without weights"],
            [judged_ratios(model, figures) for model, figures in models.items()],
        ),
        "Where it goes with all layers, by the same extrapolation. A layer's memory is mostly its activations, which "
        "all three ways keep for the backward pass. The rest is embeddings, head, loss, and the fusion in *egmf*:",
        where_it_goes(models),
        "As measured; Qwen3 with random weights, at full width and vocabulary but with few layers, so that the head "
        "weighs more in *plain*, and the fusion more in *egmf*, than with all of them. Memory is beyond the weights: "
        "plain / floor / egmf. EGMF's weights also include the fusion and the readout; PEFT keeps two copies of each. "
        "Qwen3-1.7B was not measured.",
        measured_steps(models),
        "### Answering",
        f"`python -m bench.answer --output results/performance.json`, {len(next(iter(answer['seconds'].values())))} "
        "repetitions. " + setting(answer["machine"]),
        f"{name_of(answer['model'])} with random weights and {answer['layers']} of its {ALL_LAYERS} layers (EGMF's "
        "own cost does not grow with the layers, so its share is smaller in the whole model), bfloat16, one batch of "
        f"{answer['batch_size']} prompts of {answer['tokens']} tokens on average, with voice and face. *Prefill* is "
        "the bare LLM's reading of these sequences, with logits at their last positions. Goals for `score_labels`: at "
        f"most {GOALS['7 labels']} of prefill for 7 labels, at most {GOALS['61 scores']} for 61 scores.",
        answers_table(answer),
        "Made from `results/performance.json` by `python -m experiments.performance`.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    data = json.loads((RESULTS / "performance.json").read_text(encoding="utf-8"))
    (RESULTS / "performance.md").write_text(render(data), encoding="utf-8")


if __name__ == "__main__":
    main()
