"""Augmentation of tower inputs for training, so that speaker, place and recording matter less.

Towers from scratch see few people. A spectrogram is shifted a little up or down (another vocal tract), made louder or
softer, and a range of its bands is masked (as in SpecAugment, arXiv 1904.08779). Images are mirrored, and their
colours and brightness change. Random numbers come from torch, so that a resumed run repeats them.
"""

import numpy as np
import torch

from egmf.media_inputs_egmf import TowerInput


BAND_SHIFT, BAND_MASK = 2, 6  # bands at most
OFFSET = 0.15  # of a spectrogram's level: in units of Whisper's log mel, 0.6 dB / 0.01
GAIN, LIGHT = 0.2, 0.2  # of pixels, which range from about -1 to 1


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
    """Returns a random variant of a clip. Waveforms do not change, because their feature extractors normalise them."""
    if clip is None or (modality == "audio" and clip.values.ndim < 2):
        return clip
    change = augment_spectrogram if modality == "audio" else augment_frames
    return TowerInput(change(clip.values).astype(np.float32), clip.mask, clip.times)
