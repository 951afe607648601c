"""Needs of the Qwen3 recipes: the page contains the computed reading times, and the benchmark measures that rate."""

from pathlib import Path

import pytest
import torch

from bench import reading
from experiments import needs


ROOT = Path(__file__).resolve().parents[1]


def cells_of(page: str) -> dict[str, list[str]]:
    """The cells of the table by recipe."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {line[0].strip("`"): line[1:] for line in lines if line[0].endswith(("clips`", "features`"))}


def test_reading_is_in_the_hours_of_the_page():
    page = (ROOT / "results/needs.md").read_text(encoding="utf-8")
    assert page.startswith(needs.page_head())
    table = page.removeprefix(needs.page_head())
    cells = cells_of(table)
    assert list(cells) == needs.recipes_of()
    for name, (*sizes, hours, _) in cells.items():
        computed = needs.reading_of(needs.load(name, "0.6B")) / 3600
        assert float(hours) == pytest.approx(computed, abs=0.051)
        assert all(float(size.split(", ")[1]) >= float(hours) for size in sizes)
    # 16,326 + 1,871 rows three times, 365 frames of WavLM by fours and 16 of CLIP, 8 of 25 states of 1024.
    assert needs.reading_of(needs.load("mosei_qwen3_clips", "8B")) == pytest.approx(
        3 * 18197 * (92 + 16) * 8 * 1024 / needs.READING["clips"]
    )


def test_reading_is_beside_the_steps_only_in_other_processes():
    assert [needs.with_reading(10.0, 20.0, workers) for workers in (0, 1, 4)] == [30.0, 20.0, 10.0]


@pytest.mark.parametrize("name", ["meld_qwen3_features", "simsv2_qwen3_clips"])
def test_bench_measures_batches_of_the_assumed_shapes(name):
    recipe = needs.load(name, "0.6B")
    recipe.training.per_device_train_batch_size = 2
    threads = torch.get_num_threads()
    seconds, numbers = reading.measure(recipe)
    shapes = needs.features_of(recipe).values()
    assert len(seconds) == reading.REPEATS and min(seconds) > 0 and torch.get_num_threads() == threads
    assert numbers == pytest.approx(2 * sum(frames * width for frames, width in shapes), rel=0.01)
