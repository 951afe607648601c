"""What training steps and answers cost -> results/performance.md, from results/performance.json.

python bench/train_step.py --output results/performance.json
python bench/answer.py --output results/performance.json
python results/performance.py
"""

import json
import statistics
from pathlib import Path


RESULTS = Path(__file__).parent
WAYS = ("plain", "floor", "egmf")
ALL_LAYERS = 28  # of Qwen3-0.6B and of Qwen3-1.7B
GOALS = {"time to plain": 0.85, "time to floor": 1.10, "memory to plain": 0.60, "7 labels": 1.15, "61 scores": 1.35}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def spread(values: list[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    shown = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return "{} ({} to {})".format(*shown)


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Repetition by repetition."""
    return [value / other for value, other in zip(values, others, strict=True)]


def judged(value: float, goal: str) -> str:
    """A ratio beside its goal."""
    return f"{value:.2f}, {'met' if value <= GOALS[goal] else 'missed'}"


def with_all_layers(depths: list[dict], measure) -> dict[str, float]:
    """What `measure(depth, way)` would be with all layers, by way: as much more a layer as between the two depths."""
    few, more = depths
    found = {}
    for way in WAYS:
        layer = (measure(more, way) - measure(few, way)) / (more["layers"] - few["layers"])
        found[way] = measure(few, way) + layer * (ALL_LAYERS - few["layers"])
    return found


def seconds_of(depth: dict, way: str) -> float:
    return statistics.median(depth["seconds"][way])


def bytes_of(depth: dict, way: str) -> float:
    return depth["memory"][way]


def bytes_with_weights(depth: dict, way: str) -> float:
    return depth["memory"][way] + depth["weights"][way]


def name_of(model: str) -> str:
    return model.split("/")[1].removesuffix("-Instruct")


def judged_ratios(model: str, figures: dict) -> list[str]:
    """A row of the table of goals: with all layers, measured or extrapolated."""
    depths = figures["depths"]
    if len(depths) == 1:
        seconds, own, whole = (
            {way: measure(depths[0], way) for way in WAYS} for measure in (seconds_of, bytes_of, bytes_with_weights)
        )
    else:
        seconds, own, whole = (
            with_all_layers(depths, measure) for measure in (seconds_of, bytes_of, bytes_with_weights)
        )
    memory = whole["egmf"] / whole["plain"]
    return [
        name_of(model),
        "measured" if len(depths) == 1 else f"{ALL_LAYERS} layers, extrapolated",
        judged(seconds["egmf"] / seconds["plain"], "time to plain"),
        judged(seconds["egmf"] / seconds["floor"], "time to floor"),
        judged(memory, "memory to plain") if "Qwen" in model else f"{memory:.2f}",  # a goal at 150,000 words
        f"{own['egmf'] / own['plain']:.2f}",
    ]


def measured_steps(models: dict) -> str:
    rows = []
    for model, figures in models.items():
        for depth in figures["depths"]:
            seconds = depth["seconds"]
            cells = [name_of(model), str(depth["layers"] or "all"), *(spread(seconds[way]) for way in WAYS)]
            cells += [spread(ratios(seconds["egmf"], seconds[other])) for other in ("plain", "floor")]
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
        rate = spread([figures["batch_size"] / value for value in seconds])
        rows.append([way, rate, spread(to_prefill) if kind != "prefill" else "", goal])
    return table(["way", "samples per second", "time to prefill's", "goal"], rows)


def setting(machine: dict) -> str:
    cores = f"{machine['cores']} CPU cores ({machine['instructions']}), one of them used"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    return f"{cores}; load average before the run {machine['load_before']:.1f}; {versions}."


def render(data: dict) -> str:
    """The whole text of results/performance.md."""
    step, answer = data["train_step"], data["answer"]
    models, repetitions = (
        step["models"],
        len(step["models"][next(iter(step["models"]))]["depths"][0]["seconds"]["egmf"]),
    )
    batches = "; ".join(
        f"{name_of(model)}: `{figures['recipe']}`, {figures['batches']} batches of {figures['batch_size']}"
        for model, figures in models.items()
    )
    parts = [
        "# What training steps and answers cost",
        "Seconds are of CPU time on one core: other programs disturb them less than they disturb the clock. Medians "
        "(lowest to highest) of interleaved repetitions in one process; ratios are taken repetition by repetition.",
        "## A training step",
        f"`python bench/train_step.py --output results/performance.json`, {repetitions} repetitions. "
        + setting(step["machine"]),
        "*Plain* is LoRA on the bare LLM with the same text, logits at all positions, rows in random order, as PEFT "
        "and Trainer do it by default. *Floor* is the LLM's own forward and backward pass on EGMF's sequences, pseudo "
        "tokens included, with logits for the answer's tokens alone. *Egmf* is what `train.py` does: the fusion "
        "learns, too, and reads voice and face. Floor and egmf leave out PEFT's cast of its inputs to float32, as "
        "`train.py` does. Recipe and rows of an epoch, which has 97 tokens a row on average: "
        f"{batches}.",
        f"Goals: time to plain at most {GOALS['time to plain']}, time to floor at most {GOALS['time to floor']:.2f}, "
        f"memory to plain at most {GOALS['memory to plain']:.1f}, at a vocabulary of 150,000 (Qwen3's has 151,936; "
        "SmolLM2's 49,152). Memory in the first of its columns is with the weights, in the second without; batches "
        "are smaller than the 16 rows of the recipes, so that weights, nearly the same in both, are more of it.",
        table(
            ["model", "layers", "time to plain", "time to floor", "memory to plain", "the same without weights"],
            [judged_ratios(model, figures) for model, figures in models.items()],
        ),
        "As measured, an epoch each; Qwen3 with random weights, at full width and vocabulary but with few layers, so "
        "that the head weighs more in *plain*, and the fusion more in *egmf*, than with all of them. Memory is the "
        "most that torch holds beyond the weights: plain / floor / egmf. EGMF's weights are more by the fusion, which "
        "PEFT keeps twice.",
        measured_steps(models),
        "## Answering",
        f"`python bench/answer.py --output results/performance.json`, {len(next(iter(answer['seconds'].values())))} "
        "repetitions. " + setting(answer["machine"]),
        f"{name_of(answer['model'])} with random weights and {answer['layers']} of its {ALL_LAYERS} layers (what EGMF "
        "adds does not grow with them, so that beside all of them it is less), bfloat16, one batch of "
        f"{answer['batch_size']} prompts of {answer['tokens']} tokens on average, with voice and face. *Prefill* is "
        "the bare LLM's reading of these sequences, with logits at their last positions. Goals for `score_labels`: at "
        f"most {GOALS['7 labels']} of prefill for 7 labels, at most {GOALS['61 scores']} for 61 scores.",
        answers_table(answer),
        "Made from `results/performance.json` by `python results/performance.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    data = json.loads((RESULTS / "performance.json").read_text(encoding="utf-8"))
    (RESULTS / "performance.md").write_text(render(data), encoding="utf-8")


if __name__ == "__main__":
    main()
