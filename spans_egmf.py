"""Divides a recording into spans of time: at pauses, or windows of one length."""

from collections.abc import Callable, Iterator

import numpy as np


LEVEL_STEP = 0.025  # seconds between two measurements of the level
PAUSE = 0.25  # seconds over which the level is averaged, so that gaps inside words are no pauses
REST = 0.1  # seconds after the last window that belong to it: the padding of sound codecs
LOOK_AHEAD = 1.5  # windows of sound that `spans_at_pauses` needs to place the next cut


def windows(duration: float, window: float, hop: float) -> list[tuple[float, float]]:
    """Spans of `window` seconds that begin every `hop` seconds; the last one ends with the recording."""
    spans = [(0.0, min(window, duration))]
    while spans[-1][1] < duration - REST and len(spans) * hop < duration:
        start = len(spans) * hop
        spans.append((start, min(start + window, duration)))
    if spans[-1][1] >= duration - REST:
        spans[-1] = spans[-1][0], duration
    return spans


def spans_at_pauses(
    fill: Callable[[float], float], take: Callable[[float, float], np.ndarray], rate: int, length: float, window: float
) -> Iterator[tuple[float, float]]:
    """Yields consecutive spans of half a window to a window, each cut where the sound is quietest.

    Args:
        fill: Decodes the sound up to a time and returns how far it got.
        take: Returns the sound (N,) between two times that `fill` has reached.
        rate: Sampling rate of the sound in Hz.
        length: End of the pictures in seconds, 0 without any.
        window: Length of the longest span in seconds.
    """
    start = 0.0
    while True:
        heard = fill(start + LOOK_AHEAD * window)
        rest = max(heard, length) - start
        if rest <= window:
            if rest > 0:
                yield start, start + rest
            return
        first = start + window / 2
        last = start + min(window, rest - window / 2)  # so that no short span remains
        cut = first + quietest(take(first, min(last, heard)), rate, last - first)
        yield start, cut
        start = cut


def quietest(samples: np.ndarray, rate: int, length: float) -> float:
    """The middle of the quietest place in `length` seconds of sound (N,), which may end earlier.

    Of places within 1 dB, it is the latest.
    """
    step = max(1, round(LEVEL_STEP * rate))
    count = round(length * rate) // step
    if count < 2:
        return length
    power = np.zeros(count)  # beyond the end of the sound it is silent
    heard = min(len(samples) // step, count)
    power[:heard] = np.square(samples[: heard * step].reshape(heard, step), dtype=np.float64).mean(1)
    width = min(count, max(1, round(PAUSE / LEVEL_STEP)))
    level = np.convolve(power, np.ones(width) / width, "valid")
    place = int(np.flatnonzero(level <= 10**0.1 * level.min())[-1])
    return min(length, (place + width / 2) * step / rate)
