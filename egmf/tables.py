"""Figures and tables as text."""

from collections.abc import Iterable, Sequence

import numpy as np


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *rows])


def with_interval(value: float | int | None, interval: Sequence[float] | None = None) -> str:
    """A figure of an evaluation, "0.7421 [0.7012, 0.7830]"; counts stay whole, and "-" stands for None."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean and, for several values, the standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
