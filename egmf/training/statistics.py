"""Statistics of the training split that the fusion keeps: of precomputed features, and of clips."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from datasets import Dataset

from corpora.report import has_sound
from egmf.data.mixture import has_any
from egmf.data.speakers import SPEAKER, Centers, stack_centers
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.fusion_egmf import ClipStatistics, FeatureNorm
from egmf.media_features_egmf import adapt_to_speaker
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.recipe import Recipe


def feature_statistics(
    rows: Dataset, column: str, centers: Centers | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation (D,), in float64, over all frames of a column of features (T, D).

    The column is read twice in small batches, because all features of MOSEI do not fit in memory. The sum of a batch
    starts with the sum of the earlier ones, so that the result is the same as for all frames in one array.

    Args:
        rows: The training split.
        column: `audio_features` or `vision_features`.
        centers: Centers of the speakers, to which the frames are adapted first.

    Returns:
        (mean, standard deviation); None if every clip is null.

    Raises:
        ValueError: If clips differ in width.
    """
    total: np.ndarray | None = None
    count = 0
    for frames in _frames(rows, column, centers):
        if total is not None and len(total) != frames.shape[1]:
            wanted = "one width (a model without a tower takes one kind of features)"
            raise ValueError(f"{column}: got clips of {len(total)} and of {frames.shape[1]} features, wanted {wanted}")
        total, count = _sum_on(total, frames), count + len(frames)
    if total is None:
        return None
    mean = total / count
    total = np.zeros_like(mean)
    for frames in _frames(rows, column, centers):
        total = _sum_on(total, np.square(frames - mean))
    return torch.from_numpy(mean), torch.from_numpy(np.sqrt(total / count))


def _frames(rows: Dataset, column: str, centers: Centers | None = None) -> Iterator[np.ndarray]:
    """Yields the frames (N, D) of all clips in float64, for batches of clips."""
    columns = [column] if centers is None else [column, SPEAKER]
    for table in rows.select_columns(columns).with_format("arrow").iter(64):
        clips = table.column(column).combine_chunks()
        frames = clips.flatten()  # drops null clips and the borders between clips
        widths = np.unique(frames.value_lengths().to_numpy())
        values = frames.flatten().to_numpy().astype(np.float64)
        if len(widths) > 1:
            raise ValueError(f"{column}: got clips of {widths[0]} and of {widths[1]} features, wanted one width")
        if len(widths):
            values = values.reshape(-1, widths[0])
            if centers is not None:
                keys = [(speaker, 1.0) for speaker in table.column(SPEAKER).to_pylist()]
                lengths = torch.from_numpy(clips.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).copy())
                own = stack_centers(centers, column.removesuffix("_features"), keys).double()
                own = own.repeat_interleave(lengths, 0)
                values = adapt_to_speaker(torch.from_numpy(values), *own.unbind(1)).numpy()
            yield values


def _sum_on(total: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    return (frames if total is None else np.concatenate([total[None], frames])).sum(0)


def set_feature_statistics(
    model: EGMFForConditionalGeneration, rows: Dataset, centers: Centers | None = None, statistics: Mapping = {}
) -> None:
    """Sets the statistics and the components of precomputed features.

    Args:
        model: The model.
        rows: The training split.
        centers: Centers of the speakers, to which the features are adapted first.
        statistics: Results of [`feature_statistics`], by modality, that are known already.
    """
    fusion = model.model.fusion
    for modality in model.config.modalities[1:]:
        if getattr(model.config, f"{modality}_feature_size") is None:
            continue
        column = f"{modality}_features"
        mean, std = statistics.get(modality) or feature_statistics(rows, column, centers)
        fusion.set_feature_statistics(modality, mean, std)
        if fusion.input_norm[modality].is_reduced:
            norm, count = fusion.input_norm[modality], model.config.feature_components[modality]
            fusion.set_feature_components(modality, feature_components(rows, column, norm, count, centers))


def feature_components(
    rows: Dataset, column: str, norm: FeatureNorm, count: int, centers: Centers | None = None
) -> torch.Tensor:
    """The leading principal components (count, D) of all standardised frames, scaled so that each has variance 1.

    Args:
        rows, column, centers: See [`feature_statistics`].
        norm: Standardises the frames.
        count: The number of components.

    Raises:
        ValueError: If fewer features vary independently.
    """
    mean, std = (value.numpy(force=True).astype(np.float64) for value in (norm.mean, norm.std))
    total, products, number = np.zeros_like(mean), np.zeros((len(mean), len(mean))), 0
    for frames in _frames(rows, column, centers):
        standard = ((frames - mean) / std).clip(-norm.LIMIT, norm.LIMIT)
        total, products, number = total + standard.sum(0), products + standard.T @ standard, number + len(standard)
    variances, vectors = np.linalg.eigh(products / number - np.outer(total / number, total / number))
    variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
    if not variances[-1] > 1e-6:
        got, wanted = f"{count} components", f"at most {(variances > 1e-6).sum()}: no more features vary independently"
        raise ValueError(f"feature_components: {column}: got {got}, wanted {wanted}")
    # An eigenvector has no sign of its own.
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    return torch.from_numpy((vectors * signs / np.sqrt(variances)).T.copy())


def clip_statistics(
    rows: Dataset, modality: str, cache: TowerCache | None, centers: Centers | None = None
) -> Iterator[torch.Tensor | None]:
    """Yields [`ClipStatistics.measure`] of each row's clip, (2 * layers * width,) in float32; None without a clip.

    Args:
        rows: Rows of a corpus.
        modality: "audio" or "vision".
        cache: Cache of the towers; a modality that it does not encode has precomputed features.
        centers: Centers of the rows' speakers, to which the frames are adapted first.
    """
    tower = cache if cache is not None and modality in cache.frozen else None
    column = f"{modality}_features" if tower is None else COLUMNS[modality]
    for row in rows.select_columns([column, *([] if centers is None else [SPEAKER])]).with_format("numpy"):
        features = row[column]
        if tower is not None:
            features = tower.load(modality, None if features is None else str(features))[f"{modality}_features"]
        if features is None:
            yield None
            continue
        frames = torch.as_tensor(features, device="cpu").unsqueeze(0)  # (1, T, layers, width) or (1, T, width)
        if centers is not None:
            center = stack_centers(centers, modality, [(str(row[SPEAKER]), 1.0)])
            frames = adapt_to_speaker(frames.float(), *center.unsqueeze(2).unbind(1))
        layers = frames.unbind(2) if frames.ndim == 4 else (frames,)
        yield ClipStatistics.measure(layers, torch.ones(frames.shape[:2]))[0]


def check_clip_statistics(recipe: Recipe, rows: Dataset) -> None:
    """Raises a ValueError if the recipe names a modality of which no training row has a clip."""
    for modality in recipe.fusion["clip_statistics"] or ():
        column = COLUMNS[modality] if getattr(recipe.model, f"{modality}_tower") else f"{modality}_features"
        heard = has_any(rows, column)
        if column == "audio" and heard:  # a video may be mute
            heard = any(has_sound(file) for file in rows["audio"][:] if file is not None)
        if modality in recipe.data.modalities and not heard:
            wanted = f"one with {column} in a training row, or `modalities` without {modality}"
            raise ValueError(f"clip_statistics: got {modality}, of which no row has a clip, wanted {wanted}")


def set_clip_statistics(
    model: EGMFForConditionalGeneration, corpus, cache: TowerCache | None, centers: Centers | None = None
) -> None:
    """Sets the mean and standard deviation of the fusion's [`ClipStatistics`] from the training split.

    Raises:
        ValueError: If a modality has no clips, or its tower will still be trained.
    """
    for modality in model.model.fusion.clip_statistics:
        measured = clip_statistics(corpus["train"], modality, cache, centers)
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        # One by one (Welford 1962), because all together may not fit into memory.
        for clip in (clip.double() for clip in measured if clip is not None):
            count, before = count + 1, mean
            mean = mean + (clip - mean) / count
            squares = squares + (clip - before) * (clip - mean)
        if not count:
            wanted = "one of which a training clip can be read, and features or a frozen tower"
            raise ValueError(f"clip_statistics: got {modality}, wanted {wanted}; or `modalities` without {modality}")
        model.model.fusion.set_clip_statistics(modality, mean, (squares / count).sqrt())
