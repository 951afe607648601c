"""Samples and batches as padded arrays: the arguments and the result of EGMF's processor.

Shape letters: B samples, L prompt positions, T frames of a modality, D features of a frame.
"""

from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature

from .media_inputs_egmf import as_array
from .tasks_egmf import AffectTask


class AffectBatch(BatchFeature):
    """The inputs of a batch. `to(dtype)` leaves times in float32, because bfloat16 holds seconds too coarsely."""

    def to(self, *args, **kwargs) -> "AffectBatch":
        times = {name: value for name, value in self.items() if name.endswith("_times")}
        super().to(*args, **kwargs)
        for name, value in times.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(self[name].device)
        return self


def _ndim(value: Any) -> int:
    """Number of dimensions of an array or of nested lists; a missing sample counts as 2-D."""
    if hasattr(value, "ndim"):
        return value.ndim
    if isinstance(value, list | tuple):
        return 1 + next((_ndim(item) for item in value if item is not None), 2)
    return 0


def is_batch(columns: dict[str, Any], dims: dict[str, int]) -> bool:
    """Whether the columns hold several samples; `dims` has the number of dimensions of one sample's features."""
    if columns["text"] is not None:
        return not isinstance(columns["text"], str)
    features = {name: columns[name] for name in dims if columns[name] is not None}
    if features:
        return any(_ndim(value) > dims[name] for name, value in features.items())
    return any(isinstance(columns[name], list | tuple) for name in ("audio", "video", "speaker", "task", "answer"))


def as_columns(columns: dict[str, Any]) -> dict[str, list]:
    """Converts every argument to a list with one entry per sample; a single task applies to all samples."""
    lists = {}
    for name, value in columns.items():
        single = isinstance(value, str | bytes | dict | AffectTask) or not hasattr(value, "__len__")
        if single and value is not None and name != "task":
            raise ValueError(f"`{name}` got {value!r}, wanted a list with one entry per sample of the batch.")
        if not single:
            lists[name] = list(value)
    longest = max(lists, key=lambda name: len(lists[name]))
    size = len(lists[longest])
    for name, values in lists.items():
        if len(values) != size or size == 0:
            raise ValueError(f"`{name}` has {len(values)} entries, wanted {size or 'at least 1'} as in `{longest}`.")
    return {name: lists.get(name, [value] * size) for name, value in columns.items()}


def pad(rows: list[list[int]], fill: int, side: str) -> np.ndarray:
    """Pads the rows to the longest one: `(B, L)` int64."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) if side == "left" else 0 :][: len(row)] = row
    return padded


def _features(name: str, value: Any) -> np.ndarray:
    """Converts and checks one sample's features `(T, D)` or tower hidden layers `(T, layers, D)`."""
    layers = _ndim(value) == 3
    wanted = "an array (frames, layers, features)" if layers else "an array (frames, features)"
    if isinstance(value, np.ndarray) and value.dtype == np.float16 and value.ndim == 2 + layers:
        array = value  # half the memory of float32
    else:
        array = as_array(name, value, 2 + layers, wanted)
    size = " x ".join(map(str, array.shape))
    if array.size == 0:
        raise ValueError(f"`{name}` is empty ({size}), wanted at least one frame; pass None for a missing modality.")
    if not np.isfinite(array).all():
        counts = f"{np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite values"
        raise ValueError(f"`{name}` has {counts} in {size}, wanted finite values only.")
    return array


def stack(modality: str, features: list, times: list) -> dict[str, np.ndarray]:
    """Stacks a modality's features, mask and times, padded on the right; empty if no sample has the modality."""
    arrays = {i: _features(f"{modality}_features[{i}]", x) for i, x in enumerate(features) if x is not None}
    untimed = [i for i, seconds in enumerate(times) if seconds is not None and i not in arrays]
    if untimed:
        raise ValueError(f"`{modality}_times[{untimed[0]}]` is given without `{modality}_features[{untimed[0]}]`.")
    if not arrays:
        return {}
    first, width = next((i, array.shape[1:]) for i, array in arrays.items())
    shape = (len(features), max(map(len, arrays.values())))
    kind = np.result_type(*arrays.values())
    stacked, mask = np.zeros((*shape, *width), dtype=kind), np.zeros(shape, dtype=np.int64)
    clock = np.full(shape, np.nan, dtype=np.float32)
    for i, array in arrays.items():
        if array.shape[1:] != width:
            name, other = f"{modality}_features[{i}]", f"{modality}_features[{first}]"
            got, wanted = (" x ".join(map(str, size)) for size in (array.shape[1:], width))
            raise ValueError(f"`{name}` has {got} columns, wanted {wanted} as in `{other}`.")
        stacked[i, : len(array)], mask[i, : len(array)] = array, 1
        if times[i] is not None:
            name = f"{modality}_times[{i}]"
            seconds = as_array(name, times[i], 1, "a list (frames) of seconds")
            if len(seconds) != len(array) or np.isinf(seconds).any():
                raise ValueError(f"`{name}` has {len(seconds)} times, wanted {len(array)}, finite or NaN.")
            clock[i, : len(array)] = seconds
    return {f"{modality}_features": stacked, f"{modality}_mask": mask, f"{modality}_times": clock}
