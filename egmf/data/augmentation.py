"""Random changes to what towers read, for training: who speaks, where and how it was recorded must not matter.

Towers from scratch see few people. A spectrogram comes a little higher or lower (another vocal tract), louder or
softer, with a stretch of bands blanked (as in SpecAugment, arXiv 1904.08779); pictures come mirrored, in other colours
and in another light. Random numbers are torch's, so that a resumed run repeats them.
"""

import numpy as np
import torch

from egmf.media_inputs_egmf import TowerInput


BAND_SHIFT, BAND_MASK = 2, 6  # bands at most
OFFSET = 0.15  # of a spectrogram's level: in units of Whisper's log mel, 0.6 dB / 0.01
GAIN, LIGHT = 0.2, 0.2  # of pixels, which run from -1 to 1 or thereabouts


def _uniform(limit: float, *shape: int) -> np.ndarray:
    return ((2 * torch.rand(shape) - 1) * limit).numpy()


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def augment_spectrogram(bands: np.ndarray) -> np.ndarray:
    """(bands, positions) -> the same shape."""
    places = np.arange(len(bands)) - _integer(-BAND_SHIFT, BAND_SHIFT)
    changed = bands[places.clip(0, len(bands) - 1)]
    start = _integer(0, len(bands) - 1)
    changed[start : start + _integer(0, BAND_MASK)] = changed.mean()
    return changed + _uniform(OFFSET)


def augment_frames(frames: np.ndarray) -> np.ndarray:
    """(F, 3, height, width) -> the same shape; all frames of a clip are changed alike."""
    changed = frames[:, torch.randperm(3).numpy()]
    if torch.rand(()) < 0.5:
        changed = changed[..., ::-1]
    return changed * (1 + _uniform(GAIN, 3, 1, 1)) + _uniform(LIGHT, 3, 1, 1)


def augment(modality: str, clip: TowerInput | None) -> TowerInput | None:
    """A random variant of a clip. Sound that comes as a waveform is left as it is: its extractors normalise it."""
    if clip is None or (modality == "audio" and clip.values.ndim < 2):
        return clip
    change = augment_spectrogram if modality == "audio" else augment_frames
    return TowerInput(change(clip.values).astype(np.float32), clip.mask, clip.times)
