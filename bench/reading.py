"""Measures how fast one process reads the rows of the Qwen3 recipes and collates them into batches.

    python -m bench.reading

For each recipe, the script generates a batch of rows with features of the widths and mean lengths that
`experiments/needs.py` assumes; lengths vary from 0.5 to 1.5 times the mean. Clips become
entries of the cache of frozen towers, published features become rows of a corpus. It measures reading the rows and
`AffectCollator`, on one core, with all files in the page cache, and prints the median of `REPEATS` CPU times and the
numbers (single values of features, without padding) per second. `READING` in `experiments/needs.py` is the rate of the
slowest recipe on features, and half of the rate of the slowest recipe on clips, because their files come from a disk.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, Wav2Vec2FeatureExtractor

from corpora.schema import build_split
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import Recipe
from egmf.training.language_models import byte_tokenizer
from experiments.needs import SIZES, features_of, load, recipes_of, states_of


REPEATS = 5


def rows_of(recipe: Recipe, processor: EGMFProcessor, folder: Path) -> tuple[list[dict], TowerCache | None, int]:
    """A batch's rows, the cache of the clips' hidden layers (None without clips), and the number of feature values."""
    task, features, clips = processor.tasks[recipe.data.tasks[0]], features_of(recipe), bool(recipe.model.audio_tower)
    gold = task.parse(task.answers[0])
    label = {"emotion": gold} if task.kind == "classification" else {"sentiment": gold}
    size = recipe.training.per_device_train_batch_size
    rows = [{"id": f"{n}", "text": "a" * 50, "language": "en"} | label for n in range(size)]
    lengths = {
        name: np.linspace(frames / 2, 1.5 * frames, size).round().astype(int) for name, (frames, _) in features.items()
    }
    if clips:
        lengths["vision"][:] = recipe.model.num_frames  # the same for every clip
    numbers = sum(int(lengths[name].sum()) * width for name, (_, width) in features.items())
    if not clips:
        for place, row in enumerate(rows):
            for name, (_, width) in features.items():
                row[f"{name}_features"] = np.ones((lengths[name][place], width), np.float32)
        return rows, None, numbers
    cache = TowerCache(None, processor, (), folder=folder)
    cache.frozen, cache.folders = frozenset(features), {name: folder / name for name in features}  # without the towers
    for place, row in enumerate(rows):
        for name, (_, width) in features.items():
            clip = folder / f"{row['id']}.{name}"
            clip.write_text(clip.name)
            row[COLUMNS[name]] = str(clip)
            frames, states = lengths[name][place], states_of(recipe)[name]
            tensors = {"features": torch.ones(frames, states, width // states, dtype=torch.float16)}
            cache._write(cache._entry(name, str(clip)), tensors | {"times": torch.zeros(frames)})
    return rows, cache, numbers


def measure(recipe: Recipe) -> tuple[list[float], int]:
    """The CPU seconds of a batch in each of `REPEATS` repetitions, and its number of feature values."""
    parts = (Wav2Vec2FeatureExtractor(), CLIPImageProcessorPil()) if recipe.model.audio_tower else ()
    processor, seconds = EGMFProcessor(byte_tokenizer(), *parts), []
    tasks = [processor.tasks[recipe.data.tasks[0]]]
    with tempfile.TemporaryDirectory() as folder:
        rows, cache, numbers = rows_of(recipe, processor, Path(folder))
        split = expand_by_task(build_split(rows), tasks)
        collate = AffectCollator(processor, tasks, ["text", "audio", "vision"], with_answers=True, cache=cache)
        for _ in range(1 + REPEATS):
            start = time.process_time()
            batch = collate(split.__getitems__([*range(len(split))]))
            seconds.append(time.process_time() - start)
    assert sum(int(batch[f"{name}_mask"].sum()) * width for name, (_, width) in features_of(recipe).items()) == numbers
    return seconds[1:], numbers


def main() -> None:
    torch.set_num_threads(1)
    for name in recipes_of():
        seconds, numbers = measure(load(name, SIZES[0]))
        median, size = statistics.median(seconds), numbers / 1e6
        print(f"{name}: {median:.3f} s a batch of {size:.1f} million numbers, {size / median:.1f} million a s")


if __name__ == "__main__":
    main()
