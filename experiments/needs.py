"""Computes the GPU memory and time that the Qwen3 recipes need, and writes results/needs.md.

    python -m experiments.needs

Nothing in the tables is measured on a GPU: the recipes have not been run. For a training step, the script computes:

- Weights: two bytes (bfloat16) for each frozen weight, sixteen for each trained weight (LoRA, fusion): float32 with
  its gradient and Adam's two moments.
- Activations kept for the backward pass: counted tensor by tensor on models of full width, built from the recipe with
  one and with two layers. The difference is the cost of a layer. The logits of the answer's tokens are added.
- Time: the larger of two times. The first is that of the floating point operations, counted in the same way, at
  `SHARE` of the GPU's peak. The second is that of the kernels, one for each operation that torch dispatches, at
  `KERNEL` seconds each; it limits small models.
- Reading: every epoch reads the features of all rows of train and validation and collates them, at `READING` numbers
  per second and process; for clips these are hidden layers. Without `dataloader_num_workers`, the training process
  reads between its steps, and both times add up. With n workers, reading runs in parallel in 1/n of its time, and the
  longer of the two times counts.

Everything outside the LLM's layers is counted with the smallest LLM. `ROWS`, `TOKENS`, `SECONDS` and the other
constants are assumptions; they are the corpora's means if these are published. Towers run once for each clip. Their
time is included, the decoding of clips is not, and the disk space of their hidden layers is given. The disk must
deliver two bytes for each number that is read.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft.helpers import disable_input_dtype_casting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM

from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import Recipe
from egmf.recipe_reading import load_recipe
from egmf.tables import table
from egmf.towers_egmf import encoder_of, spread_layers, tower_size
from egmf.training.assembly import add_lora
from egmf.training.dry_run import TRAINED_BYTES, count_parameters, kept_tensors
from egmf.training.language_models import byte_tokenizer
from egmf.training.shrinking import published_config


ROOT = Path(__file__).resolve().parents[1]


PEAK, SHARE = 312e12, 0.3  # operations per second of an A100 (dense bfloat16); the share that training reaches
KERNEL = 1e-5  # seconds to launch a kernel
OVERHEAD, SPARE = 1.5e9, 1.1  # bytes of CUDA and its libraries; factor for memory that the allocator loses
SIZES = ("0.6B", "1.7B", "4B", "8B")
# Rows of train and validation. CHERMA's are three fifths and one fifth of the 28,717 of its paper, not verified.
ROWS = {"meld": (9989, 1109), "cherma": (17230, 5743), "mosei": (16326, 1871), "simsv2": (2722, 647)}
SECONDS = {"meld": 3.6, "mosei": 7.3, "simsv2": 3.6}  # mean length of a clip
TOKENS = {"features": 90, "clips": 200}  # mean tokens of prompt and answer, including MELD's dialogue
LONGEST = 400  # tokens of the longest prompts; a batch of these must fit into memory
WIDTHS = {"meld": (64, 64), "cherma": (1024, 2048), "mosei": (74, 35), "simsv2": (25, 177)}
FRAMES = {"meld": (157, 32), "cherma": (543, 16), "mosei": (500, 375), "simsv2": (925, 232)}
AUDIO_RATE = 50  # frames per second of HuBERT and similar encoders
VOCABULARY, ANSWER = 151936, 5  # tokens
# Numbers (single values of features) that one process reads and collates per second. `bench/reading.py` measured, with
# files in memory, on one core of a Xeon with AVX512, 139 to 167 million for clips (the core was shared) and 6.6 to 9.7
# million for features. For clips, half of the slowest rate is assumed: their files come from a disk.
READING = {"clips": 70e6, "features": 6.6e6}


@dataclass
class Cost:
    """Per row: bytes kept for the backward pass, and operations. Per batch, whatever its size: kernels."""

    kept: float
    operations: float
    kernels: float

    def plus(self, other: "Cost", times: float) -> "Cost":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(mine + times * theirs for mine, theirs in pairs))


class _Kernels(TorchDispatchMode):
    """Counts dispatched operations except views, which launch no kernel."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def build(recipe: Recipe, layers: int) -> tuple[torch.nn.Module, EGMFProcessor]:
    """The recipe's model with LoRA and random weights: full width, few layers, small vocabulary."""
    config = published_config(recipe.model.language_model)
    config.num_hidden_layers, config.vocab_size, config.layer_types = layers, 512, config.layer_types[:layers]
    config.bos_token_id = config.eos_token_id = None
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    processor = EGMFProcessor(byte_tokenizer(), num_pseudo_tokens=recipe.fusion["num_pseudo_tokens"])
    if recipe.model.audio_tower:
        # The model moves its towers to the LLM's device; memory that nobody writes is not allocated.
        towers = {name: tower.bfloat16().to_empty(device="cpu") for name, tower in towers_of(recipe).items()}
        options = {f"{name}_tower": tower for name, tower in towers.items()} | {"audio_input_rate": 16000}
    else:
        options = {f"{name}_feature_size": width for name, (_, width) in features_of(recipe).items()}
    options |= {"pseudo_token_id": processor.pseudo_token_id}
    model = EGMFForConditionalGeneration.from_language_model(llm, **recipe.fusion, **options)
    return add_lora(recipe, model, []).train(), processor


def towers_of(recipe: Recipe) -> dict[str, torch.nn.Module]:
    """The recipe's towers by modality, without weights: training reads their hidden layers and does not run them."""
    names, towers = {"audio": recipe.model.audio_tower, "vision": recipe.model.vision_tower}, {}
    with torch.device("meta"):
        for modality, name in names.items():
            if name:
                towers[modality] = encoder_of(AutoModel.from_config(published_config(name)), modality)
    return towers


def features_of(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """The maximum number of frames of a row, and the values per frame, by modality."""
    if not recipe.model.audio_tower:
        corpus = recipe.data.corpus
        pairs = zip(("audio", "vision"), FRAMES[corpus], WIDTHS[corpus], strict=True)
        return {name: (frames, width) for name, frames, width in pairs}
    frames = {"audio": int(AUDIO_RATE * SECONDS[recipe.data.corpus]), "vision": recipe.model.num_frames}
    return {
        name: (-(-frames[name] // recipe.fusion["frame_pooling"].get(name, 1)), states * tower_size(tower.config))
        for (name, tower), states in zip(towers_of(recipe).items(), states_of(recipe).values(), strict=True)
    }


def states_of(recipe: Recipe) -> dict[str, int]:
    """The number of hidden layers that are read from each tower, by modality."""
    chosen = recipe.fusion["tower_layers"]
    return {name: len(chosen.get(name) or spread_layers(tower.config)) for name, tower in towers_of(recipe).items()}


def cost_of(recipe: Recipe, layers: int, tokens: int) -> Cost:
    """The cost of a training step with one row of about `tokens` tokens, under autocast as in training."""
    model, processor = build(recipe, layers)
    task = processor.tasks[recipe.data.tasks[0]]
    features = {}
    for name, (frames, width) in features_of(recipe).items():
        shape = (frames, width)
        if recipe.model.audio_tower:
            states = states_of(recipe)[name]
            shape = (frames, states, width // states)
        features[f"{name}_features"] = [torch.randn(shape)]
    empty = processor(text=[""], task=task, answer=[task.answers[0]])["input_ids"].shape[1]
    batch = processor(text=["a" * max(0, tokens - empty)], task=task, answer=[task.answers[0]], **features)
    with FlopCounterMode(display=False) as operations, _Kernels() as kernels:
        with kept_tensors(model) as kept, disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    return Cost(kept(), operations.get_total_flops(), kernels.count)


def tower_operations(recipe: Recipe) -> float:
    """Forward operations of the towers on one clip: two per weight and position; CLIP has a position per patch."""
    towers, positions = towers_of(recipe), {}
    if not towers:
        return 0.0
    positions["audio"] = AUDIO_RATE * SECONDS[recipe.data.corpus]
    vision = towers["vision"].config
    positions["vision"] = recipe.model.num_frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    return sum(2.0 * count_parameters(tower) * positions[name] for name, tower in towers.items())


def disk_of(recipe: Recipe) -> float:
    """Bytes of the hidden layers of all clips, in 16 bits as the cache keeps them."""
    if not recipe.model.audio_tower:
        return 0.0
    return 2.0 * sum(ROWS[recipe.data.corpus]) * sum(frames * width for frames, width in features_of(recipe).values())


def reading_of(recipe: Recipe) -> float:
    """Seconds that one process needs for reading and collating all batches of a run."""
    numbers = sum(frames * width for frames, width in features_of(recipe).values())
    rows = recipe.training.num_train_epochs * sum(ROWS[recipe.data.corpus])
    return rows * numbers / READING["clips" if recipe.model.audio_tower else "features"]


def with_reading(steps: float, reading: float, workers: int) -> float:
    """Seconds of steps and reading together, with `workers` data loader processes."""
    return max(steps, reading / workers) if workers else steps + reading


def needs() -> list[dict]:
    """One row per recipe and LLM: gigabytes of GPU memory, hours of a run and of reading, gigabytes of disk."""
    layer, trained = {}, {}
    for size in SIZES:
        recipe = load("meld_qwen3_features", size)
        counts = [count_parameters(build(recipe, layers)[0], trained=True) for layers in (1, 2)]
        trained[size] = counts[1] - counts[0]
        one, two = (cost_of(recipe, layers, TOKENS["features"]) for layers in (1, 2))
        layer[size] = two.plus(one, -1)
    rows = []
    for name in recipes_of():
        smallest = load(name, SIZES[0])
        kind = name.rpartition("_")[2]
        around = cost_of(smallest, 1, TOKENS["features"]).plus(layer[SIZES[0]], -1)
        fusion = count_parameters(build(smallest, 1)[0], trained=True) - trained[SIZES[0]]
        for size in SIZES:
            recipe = load(name, size)
            llm = published_config(recipe.model.language_model)
            with torch.device("meta"):
                frozen = count_parameters(AutoModelForCausalLM.from_config(llm))
            frozen += sum(map(count_parameters, towers_of(recipe).values()))
            learns = fusion + llm.num_hidden_layers * trained[size]
            batch, tokens = recipe.training.per_device_train_batch_size, TOKENS[kind]
            kept = around.kept + llm.num_hidden_layers * layer[size].kept * LONGEST / TOKENS["features"]
            logits = 3 * 4 * VOCABULARY * ANSWER
            memory = (2 * frozen + TRAINED_BYTES * learns + batch * (kept + logits)) * SPARE + OVERHEAD
            per_row = around.operations + llm.num_hidden_layers * layer[size].operations * tokens / TOKENS["features"]
            kernels = around.kernels + llm.num_hidden_layers * layer[size].kernels
            train, validation = ROWS[recipe.data.corpus]
            # Validation only runs forward, at most a third of the operations; half is counted because of its answers.
            steps = recipe.training.num_train_epochs * (train + validation / 2) / batch
            seconds = steps * max(batch * per_row / (PEAK * SHARE), kernels * KERNEL)
            reading = reading_of(recipe)
            seconds = with_reading(seconds, reading, recipe.training.dataloader_num_workers)
            seconds += (train + validation) * tower_operations(recipe) / (PEAK * SHARE)
            rows.append({"recipe": name, "size": size, "memory": memory / 1e9, "hours": seconds / 3600})
            rows[-1] |= {"reading": reading / 3600, "disk": disk_of(recipe) / 1e9}
    return rows


def recipes_of() -> list[str]:
    """The Qwen3 recipes on one corpus, by name."""
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*_qwen3_*.yaml"))
    return [name for name in names if not load(name, SIZES[0]).data.corpora]


def load(name: str, size: str) -> Recipe:
    return load_recipe([str(ROOT / f"recipes/{name}.yaml"), "--language_model", f"Qwen/Qwen3-{size}"])


READ = "of these, hours of reading"


def table_of(rows: list[dict]) -> str:
    rows_of_table = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        cells = [f"{row['memory']:.0f}, {row['hours']:.1f}" for row in own]
        cells.append(f"{own[0]['reading']:.1f}")
        rows_of_table.append([f"`{name}`", *cells, f"{own[0]['disk']:.0f}" if own[0]["disk"] else "-"])
    head = ["recipe, one run of one seed", *(f"{size}: GB, hours" for size in SIZES), READ, "GB of disk"]
    return table(head, rows_of_table) + "\n"


def page_head() -> str:
    """The text above the table in results/needs.md."""
    rates = " or ".join(f"{rate / 1e6:g} million numbers of {kind}" for kind, rate in READING.items())
    counts = sorted({load(name, SIZES[0]).training.dataloader_num_workers for name in recipes_of()})
    workers = ", ".join(map(str, counts))
    return f"""\
# What the Qwen3 recipes need

Not yet run. Computed for one A100 by `python -m experiments.needs`, whose first lines say how.

Every process reads {rates} per second.
`python -m bench.reading` measured 139 to 167 million of clips and 6.6 to 9.7 million of features, with files in
memory, on one core of a Xeon. For clips, half of the slowest rate is assumed, because their files come from a disk.
If a tower has more than 8 hidden states, 8 are read, and four frames of its sound are averaged. A batch of MOSEI's
clips then has 14 million numbers in 16 bits, which take 0.1 CPU seconds to read. All 25 states of every frame would be
156 million numbers and take 1.0 CPU seconds. The recipes'
`dataloader_num_workers` is {workers}. With 0, the process that trains
reads between its steps, and both times add up. With 4, others read beside it, in a quarter of the time.

"""


def main() -> None:
    torch.manual_seed(0)
    filled = table_of(needs())
    (ROOT / "results/needs.md").write_text(page_head() + filled, encoding="utf-8")
    print(filled, end="")


if __name__ == "__main__":
    main()
