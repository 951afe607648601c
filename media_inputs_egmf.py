"""Converts clips to tower inputs: the part of EGMF's processor for sound and pictures.

`media_egmf.py` decodes the files. The audio tower's feature extractor and the vision tower's image processor then
process each clip separately, and the results are stacked to batches.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image

from .media_egmf import AudioClip, VideoClip, load_audio, load_video
from .media_readers_egmf import FULL_SCALE, LARGEST_RESULT, MediaError, evenly_spaced, mono
from .samples_egmf import on_disk


OF_A_STREAM = ("damaged", "crash")  # kinds of MediaErrors that leave a file's other stream to be decoded
MOST_CHANNELS = 8  # maximum number of channels in an array of samples: 7.1 surround
RATES = 1, 10_000_000  # range of an array's sampling rate in Hz; soxr hangs far outside of it


class MediaWarning(UserWarning):
    """A part of a file is missing from the model's input."""


_KEPT: ContextVar[list[Warning] | None] = ContextVar("kept", default=None)


def warn(warning: Warning, stacklevel: int) -> None:
    """Issues a warning, or adds it to those of [`kept_warnings`]."""
    if (kept := _KEPT.get()) is None:
        warnings.warn(warning, stacklevel=stacklevel + 1)
    else:
        kept.append(warning)


@contextmanager
def kept_warnings() -> Iterator[list[Warning]]:
    """Collects the processor's warnings in a list instead of issuing them, in this thread only.

    `warnings.catch_warnings` would also catch those of other threads.
    """
    token = _KEPT.set(kept := [])
    try:
        yield kept
    finally:
        _KEPT.reset(token)


class Media(NamedTuple):
    """One sample's decoded sound and pictures, each None if the sample has none."""

    audio: "AudioClip | TowerInput | None" = None
    video: "VideoClip | TowerInput | None" = None


@dataclass(frozen=True)
class TowerInput:
    """A tower's input for one clip.

    Args:
        values: Output of the feature extractor or of the image processor; for a video (F, 3, height, width).
        mask: (positions,), 1 at valid positions; None if all are valid.
        times: (F,) times of the video frames in seconds; None for sound.
    """

    values: np.ndarray
    mask: np.ndarray | None = None
    times: np.ndarray | None = None


class MediaInputsMixin:
    """Sound and pictures for a processor with `feature_extractor`, `image_processor` (or None) and `num_frames`."""

    # For callers: the copy of this code in a checkpoint defines its own exception and warning classes.
    media_error, kept_warnings = MediaError, staticmethod(kept_warnings)

    def load_file(self, file: str | os.PathLike | bytes) -> Media:
        """Loads the sound and the pictures of a file, as far as the file has them and the model supports them.

        Args:
            file: A path, a URL (http, https, or data: with base64) or the bytes of a file.

        Raises:
            MediaError: If the file cannot be read or has neither.
        """
        with on_disk(file) as path:
            return self._load_file(path)

    def _load_file(self, path: str | os.PathLike) -> Media:
        loaders = {"audio": self._audio_clip, "video": self._video_clip}
        if self.feature_extractor is None:
            loaders.pop("audio")
        if self.image_processor is None:
            loaders.pop("video")
        found, errors = {}, []
        for name, load in loaders.items():
            try:
                found[name] = load(name, path)
            except MediaError as error:
                if error.kind not in (f"no {name}", *OF_A_STREAM):
                    raise
                errors.append(error)
        damage = next((error for error in errors if error.kind in OF_A_STREAM), None)
        if not found:
            nothing = MediaError(path, "not media", "the model takes neither sound nor pictures")
            raise damage or (errors[-1] if errors else nothing)
        if damage is not None:
            warn(MediaWarning(str(damage)), stacklevel=3)
        return Media(**found)

    def media_inputs(self, media: list[Media], return_tensors: str | None = None) -> BatchFeature:
        """Builds the tower inputs of a batch of loaded clips, without a prompt; empty if all samples lack media."""
        media = [self.tower_inputs(clip) for clip in media]
        inputs = self._audio_inputs([clip.audio for clip in media])
        inputs.update(self._vision_inputs([clip.video for clip in media]))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def blank_media(self, modality: str) -> BatchFeature:
        """Builds a fully masked input of one clip for the tower of a modality ("audio", "vision").

        It provides the right shapes to a batch without this modality.
        """
        if modality == "audio":
            rate = self.feature_extractor.sampling_rate
            inputs = self.media_inputs([Media(audio=AudioClip(np.zeros(rate, np.float32), rate, []))])
        else:
            frame = np.zeros((1, 32, 32, 3), np.uint8)
            inputs = self.media_inputs([Media(video=VideoClip(frame, np.full(1, np.nan), np.nan, []))])
        inputs[f"{modality}_mask"] = np.zeros_like(inputs[f"{modality}_mask"])
        return inputs.convert_to_tensors("pt")

    def load_media(self, audio: Any = None, video: Any = None, sound_track: bool = True, index: str = "") -> Media:
        """Decodes one sample's `audio` and `video` arguments of `__call__`, which accepts the clips instead."""
        with on_disk(audio) as audio, on_disk(video) as video:
            return self._load_media(audio, video, sound_track, index)

    def _load_media(self, audio: Any, video: Any, sound_track: bool, index: str) -> Media:
        use_sound_track = sound_track and is_path(video) and self.feature_extractor is not None
        if audio is not None and self.feature_extractor is None:
            raise ValueError(f"`audio{index}` got a value, wanted None: the processor has no `feature_extractor`.")
        if video is not None and self.image_processor is None and not use_sound_track:
            raise ValueError(f"`video{index}` got a value, wanted None: the processor has no `image_processor`.")
        pictures = self._video_clip(f"video{index}", video)
        if audio is None and use_sound_track:
            try:
                return Media(self._audio_clip(f"audio{index}", video), pictures)
            except MediaError as error:
                if error.kind != "no audio":  # a video without sound is valid
                    warn(MediaWarning(str(error)), stacklevel=3)
        return Media(self._audio_clip(f"audio{index}", audio), pictures)

    def _audio_clip(self, name: str, value: Any) -> AudioClip | None:
        if value is None or isinstance(value, TowerInput):
            return value
        rate = self.feature_extractor.sampling_rate
        if is_path(value):
            name, value = str(value), _reported(value, load_audio(value, rate))
        else:
            value = _as_clip(name, value)
        if value.sampling_rate != rate:
            try:  # transformers requires users to install packages that are imported outside of a `try`
                import soxr
            except ImportError as error:
                raise ImportError(
                    f"`{name}` has {value.sampling_rate} Hz and the model reads {rate} Hz: resampling needs soxr"
                ) from error
            count = len(value.samples) * rate / value.sampling_rate
            if not 1 <= count <= LARGEST_RESULT // 4:
                got = f"{len(value.samples)} samples at {value.sampling_rate} Hz"
                wanted = f"from 1 to {LARGEST_RESULT // 4}"
                raise ValueError(f"`{name}` got {got}, {count:.3g} samples at the model's {rate} Hz, wanted {wanted}.")
            value = AudioClip(soxr.resample(value.samples, value.sampling_rate, rate), rate, value.warnings)
        if value.duration > self.audio_window + 0.1:
            message = f"{name}: the model reads only the first {self.audio_window:.1f} of {value.duration:.1f} seconds"
            warn(MediaWarning(message), stacklevel=4)
        return value

    def _video_clip(self, name: str, value: Any) -> VideoClip | None:
        if value is None or self.image_processor is None:
            return None
        if isinstance(value, TowerInput):
            return value
        if is_path(value):
            return _reported(value, load_video(value, self.num_frames))
        if hasattr(value, "get_frames_at"):
            wanted = "a file; a column of `datasets` keeps it with `cast_column(NAME, Video(decode=False))`"
            raise ValueError(f"`{name}` got a decoder ({type(value).__name__}), wanted {wanted}.")
        if hasattr(value, "convert"):  # a picture of PIL
            value = [value]
        if isinstance(value, list | tuple) and value and all(hasattr(picture, "convert") for picture in value):
            value = [np.asarray(load_image(picture)) for picture in value]  # upright, RGB
            if len(shapes := {picture.shape for picture in value}) > 1:
                raise ValueError(f"`{name}` got pictures of the shapes {sorted(shapes)}, wanted one size.")
        clip = value if hasattr(value, "frames") else None
        frames = np.asarray(value if clip is None else clip.frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            wanted = "a file, a VideoClip, a PIL image or uint8 frames (F, height, width, 3)"
            raise ValueError(f"`{name}` got {frames.dtype} of the shape {frames.shape}, wanted {wanted}.")
        some = evenly_spaced(len(frames), self.num_frames)  # as many as are read of a file
        if clip is None:
            return VideoClip(frames[some], np.full(len(some), np.nan), np.nan, [])
        return VideoClip(frames[some], clip.times[some], clip.duration, clip.warnings)

    @cached_property
    def _probes(self) -> tuple[TowerInput, TowerInput]:
        """What the feature extractor makes of 0.25 and of 0.75 seconds."""
        rate = self.feature_extractor.sampling_rate
        short, long = (self._extract(np.zeros(quarters * rate // 4, np.float32)) for quarters in (1, 3))
        return short, long

    @cached_property
    def audio_input_rate(self) -> float:
        """Positions per second in the feature extractor's output: the model's `config.audio_input_rate`."""
        short, long = self._probes
        return 2.0 * float(long.mask.sum() - short.mask.sum())

    @cached_property
    def audio_window(self) -> float:
        """Maximum length of sound that the model reads in seconds: a fixed window, or infinity."""
        short, long = self._probes
        return len(long.mask) / self.audio_input_rate if len(short.mask) == len(long.mask) else float("inf")

    @cached_property
    def _audio_axis(self) -> int:
        """The axis of the positions in the feature extractor's output: 0 or -1."""
        short, long = self._probes
        if self.audio_window < float("inf"):
            return -1 if long.values.shape[-1] == len(long.mask) else 0
        return 0 if long.values.shape[0] != short.values.shape[0] else -1

    def _extract(self, samples: np.ndarray) -> TowerInput:
        """Computes the audio tower's input from one clip's samples (N,)."""
        rate = self.feature_extractor.sampling_rate
        options = {"sampling_rate": rate, "return_attention_mask": True}
        # Convolutions need a few frames, so shorter sound is padded with silence.
        samples = np.pad(samples, (0, max(0, rate // 20 - len(samples))))
        made = self.feature_extractor(samples, **options, return_tensors="np")
        if "attention_mask" not in made:
            wanted = "one that returns an attention_mask, as those of Whisper, Wav2Vec2 and SeamlessM4T"
            raise ValueError(f"feature_extractor: got {type(self.feature_extractor).__name__}, wanted {wanted}")
        return TowerInput(made[self.feature_extractor.model_input_names[0]][0], made["attention_mask"][0])

    def tower_inputs(self, media: Media) -> Media:
        """Replaces the clips of a loaded sample by tower inputs. `media_inputs` accepts both."""
        audio, video = media
        if audio is not None and not isinstance(audio, TowerInput):
            audio = self._extract(audio.samples)
        if video is not None and not isinstance(video, TowerInput):
            images = self.image_processor(list(video.frames), return_tensors="np")["pixel_values"]
            video = TowerInput(images, None, video.times)
        return Media(audio, video)

    def _audio_inputs(self, clips: list[TowerInput | None]) -> dict[str, np.ndarray]:
        """Batches the audio tower's inputs with their mask; empty if no sample has sound."""
        present = {i: clip for i, clip in enumerate(clips) if clip is not None}
        if not present:
            return {}
        axis = self._audio_axis
        longest = max(len(clip.mask) for clip in present.values())
        shape = list(next(clip.values.shape for clip in present.values()))
        shape[axis] = longest
        inputs = np.zeros((len(clips), *shape), np.float32)
        masks = np.zeros((len(clips), longest), np.int64)
        for i, clip in present.items():
            masks[i, : len(clip.mask)] = clip.mask
            inputs[(i, ..., slice(len(clip.mask))) if axis else (i, slice(len(clip.mask)))] = clip.values
        return {self.feature_extractor.model_input_names[0]: inputs, "audio_mask": masks}

    def _vision_inputs(self, clips: list[TowerInput | None]) -> dict[str, np.ndarray]:
        """Batches the vision tower's inputs with mask and times; empty if no sample has pictures."""
        present = {i: clip for i, clip in enumerate(clips) if clip is not None}
        if not present:
            return {}
        shape = (len(clips), max(len(clip.values) for clip in present.values()))
        pixels = np.zeros((*shape, *next(iter(present.values())).values.shape[1:]), np.float32)
        mask, times = np.zeros(shape, np.int64), np.full(shape, np.nan, np.float32)
        for i, clip in present.items():
            frames = len(clip.values)
            pixels[i, :frames], mask[i, :frames], times[i, :frames] = clip.values, 1, clip.times
        return {"pixel_values": pixels, "vision_mask": mask, "vision_times": times}


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _reported(path: str | os.PathLike, clip):
    """Issues the warnings of a clip and returns the clip."""
    for warning in clip.warnings:
        warn(MediaWarning(f"{path}: {warning}"), stacklevel=5)
    return clip


def _as_clip(name: str, value: Any) -> AudioClip:
    """A clip, or a dict of `array` and `sampling_rate`, as a clip that was checked."""
    if isinstance(value, dict) and {"array", "sampling_rate"} <= value.keys():
        clip = AudioClip(as_samples(f"{name}['array']", value["array"]), value["sampling_rate"], [])
    elif hasattr(value, "samples"):  # by its form, as the class may be another copy's
        clip = AudioClip(as_samples(f"{name}.samples", value.samples), value.sampling_rate, value.warnings)
    else:
        wanted = "a file, an AudioClip, a dict of `array` and `sampling_rate`, or an array beside `sampling_rate`"
        raise ValueError(f"`{name}` got {type(value).__name__}, wanted {wanted}.")
    if not clip.samples.size or not np.isfinite(clip.samples).all():
        got = "NaN or infinity" if clip.samples.size else "no samples"
        raise ValueError(f"`{name}` got {got}, wanted finite samples.")
    rate, (low, high) = clip.sampling_rate, RATES
    if isinstance(rate, bool) or not isinstance(rate, Real) or not low <= rate <= high:
        raise ValueError(f"`{name}` got the sampling rate {rate!r}, wanted a number of Hz from {low} to {high}.")
    return clip


def as_samples(name: str, value: Any) -> np.ndarray:
    """Converts an array in a form that audio libraries return to mono sound (N,) float32.

    Args:
        name: Name of the array in error messages.
        value: (samples,), (samples, channels) or (channels, samples), with at most `MOST_CHANNELS` channels, which are
            averaged. Floats from -1 to 1, or integers, which are scaled by their type as in a file.

    Raises:
        ValueError: If the array has another form, or if the axis of the channels is ambiguous.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` got {type(value).__name__} ({error}), wanted an array of samples.") from error
    if array.dtype.kind not in "fiu" or array.dtype.itemsize == 8 and array.dtype.kind != "f":
        wanted = "floats from -1 to 1, or integers of 8, 16 or 32 bits"
        raise ValueError(f"`{name}` has samples of the type {array.dtype}, wanted {wanted}.")
    if array.ndim == 2:
        few = [size <= MOST_CHANNELS for size in array.shape]
        if 1 in array.shape:
            array = array.reshape(-1, 1)
        elif few == [True, False]:
            array = array.T
        elif few != [False, True]:
            wanted = f"(samples,), or one axis of at most {MOST_CHANNELS} channels"
            raise ValueError(f"`{name}` has the shape {array.shape}, wanted {wanted}.")
    elif array.ndim == 1:
        array = array[:, None]
    else:
        raise ValueError(f"`{name}` has the shape {array.shape}, wanted (samples,) or (samples, channels).")
    samples = mono(array)
    if samples.size and np.abs(samples).max() > FULL_SCALE:
        raise ValueError(f"`{name}` has samples up to {np.abs(samples).max():.3g}, wanted them from -1 to 1.")
    return samples


def as_array(name: str, value: Any, ndim: int, wanted: str) -> np.ndarray:
    """Converts `value` to a float32 array with `ndim` dimensions; `wanted` describes it in error messages."""
    try:
        array = np.asarray(value.detach().float().cpu() if isinstance(value, torch.Tensor) else value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` got {type(value).__name__} ({error}), wanted {wanted} of numbers.") from error
    if array.ndim != ndim:
        raise ValueError(f"`{name}` got the shape {array.shape}, wanted {wanted} of numbers.")
    return array
