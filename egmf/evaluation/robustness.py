"""Robustness to missing or noisy modalities, by published protocols (`eval.py --robustness`).

`mmin` (Zhao, Li and Jin 2021, ACL): whole modalities are missing. Every sample is evaluated with every subset of the
modalities: A, V, T, AV, AT, VT, and all three.

`lnln` (Zhang, Wang and Yu 2024, NeurIPS, arXiv 2409.20012): parts of modalities are missing. At the rates 0.0 to 0.9,
each text token becomes UNK and each audio or vision frame 0, independently with that probability; seeds 1111 to 1113.
Text includes the utterance and its context. A tokenizer that can encode any text has no UNK; it uses `_` instead. For
a model with a tower, the frames are the tower's outputs.

`noise` (the noise track of MER 2023; Lian et al. 2023, ACM MM, arXiv 2304.08981): for each clip, noise is added to the
audio at a signal-to-noise ratio drawn from 5 to 10 dB, and images are blurred by scaling them down and up by a factor
drawn from 1, 2 and 4. MER uses recorded noise; here the noise is white, because this repository has no recordings.
Precomputed features are treated similarly: noise at that ratio to their variance on the training split, and vision
features averaged over 1, 2 or 4 frames. Seeds 1111 to 1113.

The random choices for a row depend only on its id and the seed, not on batches. In `lnln`, a frame that is missing at
one rate is missing at every higher rate.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from egmf.data.tower_cache import PREPROCESSORS
from egmf.evaluation.measures import metrics_of
from egmf.evaluation.predictor import Predictor
from egmf.tables import mean_and_deviation, table


SEEDS = (1111, 1112, 1113)
RATES = tuple(tenth / 10 for tenth in range(10))
LETTERS = {"audio": "A", "vision": "V", "text": "T"}
NOISE_DB = (5.0, 10.0)
BLUR_FACTORS = (1, 2, 4)
CLEAN = "clean"
# The answer that tables and plots show for each kind of task, and its two main metrics.
SHOWN = {
    "classification": ("distribution", ("accuracy", "weighted_f1")),
    "regression": ("expected", ("mae", "corr")),
}

Outcome = tuple[str, int | None, list[dict]]  # condition, seed, predictions


def mmin(predict: Predictor, rows: Dataset, modalities: list[str]) -> Iterator[Outcome]:
    """Yields the predictions for every subset of the modalities, the full set last."""
    if len(modalities) < 2:
        raise ValueError(f"robustness: got 'mmin' for a model that sees {modalities}, wanted two modalities or more")
    present = [name for name in LETTERS if name in modalities]
    choices = [chosen for size in range(1, len(present) + 1) for chosen in combinations(present, size)]
    outcomes = {}
    for with_text in (True, False):  # text is removed from the prompt; files are read once for all other subsets
        alike = [chosen for chosen in choices if ("text" in chosen) == with_text]
        changes = [partial(hide, [name for name in present if name not in chosen]) for chosen in alike]
        seen = [name for name in modalities if with_text or name != "text"]
        if alike:
            outcomes |= dict(zip(alike, predict(rows, seen, changes=changes), strict=True))
    for chosen in choices:
        yield "".join(LETTERS[name] for name in chosen), None, outcomes[chosen]


def hide(names: list[str], inputs: dict[str, torch.Tensor], ids: list[str]) -> dict[str, torch.Tensor]:
    """Removes the fields of audio or vision from a batch, as if the processor had not received them."""
    return {field: value for field, value in inputs.items() if field.partition("_")[0] not in names}


def lnln(predict: Predictor, rows: Dataset, modalities: list[str]) -> Iterator[Outcome]:
    """Yields the predictions for every rate and seed; rate 0 has no seed."""
    cases = [(rate, seed) for rate in RATES for seed in (SEEDS if rate else (None,))]
    changes = [partial(lose_frames, predict, rate, seed) if seed is not None else None for rate, seed in cases]
    for (rate, seed), predictions in zip(cases, predict(rows, modalities, changes=changes), strict=True):
        yield f"{rate:.1f}", seed, predictions


def noise(predict: Predictor, rows: Dataset, modalities: list[str]) -> Iterator[Outcome]:
    """Yields the predictions for clean input, noisy audio, blurred vision, and both, as far as the model sees them."""
    kinds = {name: kind for name, kind in {"audio": "audio noise", "vision": "blur"}.items() if name in modalities}
    if not kinds:
        raise ValueError(f"robustness: got 'noise' for a model that sees {modalities}, wanted audio or vision")
    yield CLEAN, None, predict(rows, modalities)[0]
    spoiled = [(kind, {name}) for name, kind in kinds.items()]
    spoiled += [("both", set(kinds))] if len(kinds) == 2 else []
    for kind, names in spoiled:
        for seed in SEEDS:
            change = partial(spoil_features, predict, names, seed)
            yield kind, seed, predict(rows, modalities, partial(spoil_clip, names, seed), [change])[0]


PROTOCOLS = {"mmin": mmin, "lnln": lnln, "noise": noise}


def run(protocol: str, predict: Predictor, rows: Dataset, modalities: list[str]) -> dict[str, Any]:
    """Runs a protocol; `conditions` has the metrics of every kind of answer for each condition and seed.

    Raises:
        ValueError: If the model has too few modalities for the protocol.
    """
    conditions = []
    for condition, seed, predictions in PROTOCOLS[protocol](predict, rows, modalities):
        conditions.append(
            {"condition": condition, "seed": seed, "answers": metrics_of(predictions, predict.label_task)}
        )
    return {"protocol": protocol, "conditions": conditions}


def summarize(report: dict[str, Any], kind: str) -> dict[str, dict[str, list[float]]]:
    """Metrics of the shown answer by condition, one value per seed, without undefined ones.

    The last condition, "mean", is the mean over the other conditions, as in the papers: without the intact condition
    for `mmin` and `noise`, over all rates for `lnln`.
    """
    answer, _ = SHOWN[kind]
    found: dict[str, dict[str, list[float]]] = {}
    for entry in report["conditions"]:
        figures = found.setdefault(entry["condition"], {})
        for name, value in entry["answers"][answer].items():
            if isinstance(value, float):
                figures.setdefault(name, []).append(value)
    spoiled = dict(found)
    if report["protocol"] != "lnln":
        spoiled.pop(CLEAN if CLEAN in found else max(found, key=len))
    names = dict.fromkeys(name for figures in spoiled.values() for name in figures)
    means = {name: [float(np.mean(row[name])) for row in spoiled.values() if name in row] for name in names}
    return found | {"mean": {name: [float(np.mean(values))] for name, values in means.items()}}


def render(report: dict[str, Any], kind: str) -> str:
    """The summary as a Markdown table: mean and standard deviation over seeds."""
    by_condition = summarize(report, kind)
    names = list(dict.fromkeys(name for figures in by_condition.values() for name in figures))
    rows = [
        [condition, *(mean_and_deviation(figures[name], 4) if figures.get(name) else "-" for name in names)]
        for condition, figures in by_condition.items()
    ]
    return table(["condition", *names], rows) + "\n"


def _rng(seed: int, row_id: str, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{what} {row_id}".encode())])


def lose_frames(
    predict: Predictor, rate: float, seed: int, inputs: dict[str, torch.Tensor], ids: list[str]
) -> dict[str, torch.Tensor]:
    """Removes parts of a batch as LNLN does: each token becomes UNK and each frame 0 with probability `rate`."""
    changed, blank = dict(inputs), blank_token(predict.processor.tokenizer)
    start = prompt_length(predict)
    tokens = changed["input_ids"] = inputs["input_ids"].clone()
    for row, row_id in enumerate(ids):
        first = int(inputs["attention_mask"][row].argmax()) + start
        pseudo = int((tokens[row] == predict.processor.pseudo_token_id).int().argmax())
        words = [*range(first, pseudo), *inputs["utterance_mask"][row].nonzero()[:, 0].tolist()]
        tokens[row, _lost(words, rate, _rng(seed, row_id, "text"))] = blank
    for name in ("audio", "vision"):
        if f"{name}_features" in inputs:
            features = changed[f"{name}_features"] = inputs[f"{name}_features"].clone()
            for row, row_id in enumerate(ids):
                frames = inputs[f"{name}_mask"][row].nonzero()[:, 0].tolist()
                # With speaker adaptation, frames that equal the speaker's mean become 0 in the model.
                nothing: torch.Tensor | int = 0
                if f"{name}_center" in inputs:
                    nothing = inputs[f"{name}_center"][row, 0].to(features)
                features[row, _lost(frames, rate, _rng(seed, row_id, name))] = nothing
    return changed


def _lost(places: list[int], rate: float, rng: np.random.Generator) -> list[int]:
    return [place for place, drawn in zip(places, rng.random(len(places)), strict=True) if drawn < rate]


def blank_token(tokenizer) -> int:
    """The id of the tokenizer's UNK token if it ever produces it, else that of `_`."""
    if tokenizer.unk_token_id in tokenizer("\U0010fffd", add_special_tokens=False)["input_ids"]:
        return tokenizer.unk_token_id
    return tokenizer("_", add_special_tokens=False)["input_ids"][-1]


def prompt_length(predict: Predictor) -> int:
    """Number of prompt tokens before the context."""
    empty = predict.processor(text="", task=predict.task, return_tensors=None)["input_ids"][0]
    return list(empty).index(predict.processor.pseudo_token_id)


def spoil_clip(names: set[str], seed: int, modality: str, row_id: str, clip: Any) -> Any:
    """Adds white noise to a decoded audio clip, or blurs a video clip, if its modality is one of `names`."""
    if modality not in names:
        return clip
    rng = _rng(seed, row_id, modality)
    if modality == "audio":
        power = np.square(clip.samples, dtype=np.float64).mean() / 10 ** (rng.uniform(*NOISE_DB) / 10)
        noisy = clip.samples + rng.normal(0.0, np.sqrt(power), clip.samples.shape)
        return dataclasses.replace(clip, samples=noisy.astype(np.float32))
    factor = int(rng.choice(BLUR_FACTORS))
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float()  # (F, 3, H, W)
    size = frames.shape[-2:]
    small = [max(1, side // factor) for side in size]
    frames = F.interpolate(frames, size=small, mode="bilinear", antialias=True)
    frames = F.interpolate(frames, size=size, mode="bilinear").round().clamp(0, 255).byte()
    return dataclasses.replace(clip, frames=frames.permute(0, 2, 3, 1).contiguous().numpy())


def spoil_features(
    predict: Predictor, names: set[str], seed: int, inputs: dict[str, torch.Tensor], ids: list[str]
) -> dict[str, torch.Tensor]:
    """Adds white noise to audio features, in units of their deviation in training, and blurs vision features.

    Blurring averages neighbouring frames. Tower outputs are skipped, because their clips are already changed.
    """
    changed = dict(inputs)
    for name in names:
        if f"{name}_features" not in inputs or getattr(predict.processor, PREPROCESSORS[name]) is not None:
            continue
        features = changed[f"{name}_features"] = inputs[f"{name}_features"].clone()
        for row, row_id in enumerate(ids):
            frames, rng = inputs[f"{name}_mask"][row].nonzero()[:, 0], _rng(seed, row_id, name)
            if not len(frames):
                continue
            if name == "audio":
                scale = 10 ** (-rng.uniform(*NOISE_DB) / 20)
                drawn = rng.normal(0.0, scale, (len(frames), features.shape[-1]))
                std = predict.model.model.fusion.input_norm[name].std
                features[row, frames] += torch.as_tensor(drawn, dtype=std.dtype, device=std.device) * std
            else:
                parts = features[row, frames].split(int(rng.choice(BLUR_FACTORS)))  # neighbouring frames
                features[row, frames] = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in parts])
    return changed
