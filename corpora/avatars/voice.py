"""Synthesises the avatars' voices from syllables, a pitch glide and an expression for every frame.

A source-filter synthesiser: glottal pulses and breath noise are shaped by the formants of the vowels. As in the face,
an expression has one weight per emotion. Joy adds a trill, sadness muffles the voice and lowers its pitch, anger adds
a growl, and surprise makes it breathless.
"""

import numpy as np


SAMPLE_RATE = 16000  # Hz
FRAME_RATE = 25  # Hz, of the weights and the pictures

_FORMANTS = np.array(  # Hz, of an adult, for the vowels a, e, i, o, u
    [(750, 1250, 2500), (480, 1900, 2550), (300, 2250, 3000), (480, 880, 2450), (330, 800, 2350)], dtype=float
)
_BANDWIDTHS, _GAINS = np.array((90.0, 120.0, 180.0)), np.array((1.0, 0.6, 0.3))
_WINDOW, _HOP = 320, 160  # samples
_EDGE = 0.12  # seconds of silence before and after the line


def random_voice(rng: np.random.Generator) -> dict[str, float]:
    """A random identity. Pitch and vocal tract length are independent, and the average pitch reveals no emotion."""
    return {"pitch": float(90 * 2 ** rng.uniform(0, 1.6)), "tract": float(rng.uniform(0.85, 1.15))}


def rhythm(sounds: list[int | None], frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the timing of the syllables: vowel (N,) and loudness (N,), 0 to 1, once per `_HOP` samples (4 per picture).

    Syllables and pauses fill the clip except for its silent edges. Each length is 0.75 to 1.25 times its even share; a
    pause counts half a syllable.
    """
    lengths = np.array([0.5 if sound is None else 1.0 for sound in sounds]) * rng.uniform(0.75, 1.25, len(sounds))
    seconds = frames / FRAME_RATE
    ends = _EDGE + (seconds - 2 * _EDGE) * np.cumsum(lengths) / lengths.sum()
    starts = np.concatenate([[_EDGE], ends[:-1]])
    time = (np.arange(frames * SAMPLE_RATE // FRAME_RATE // _HOP) + 0.5) * _HOP / SAMPLE_RATE
    place = np.searchsorted(ends, time).clip(max=len(sounds) - 1)
    vowels = np.array([0 if sound is None else sound for sound in sounds])[place]
    phase = (time - starts[place]) / (ends - starts)[place]
    loudness = 0.3 + 0.7 * np.sin(np.pi * phase.clip(0, 1))
    silent = np.array([sound is None for sound in sounds])[place] | (time < _EDGE) | (time > ends[-1])
    return vowels, np.where(silent, 0.0, loudness)


def per_frame(values: np.ndarray, frames: int) -> np.ndarray:
    """Interpolate values on the `_HOP` grid (N,) at the middle of each picture (T,)."""
    time = (np.arange(len(values)) + 0.5) * _HOP / SAMPLE_RATE
    return np.interp((np.arange(frames) + 0.5) / FRAME_RATE, time, values)


def speak(
    voice: dict[str, float],
    vowels: np.ndarray,
    loudness: np.ndarray,
    weights: np.ndarray,
    glide: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Synthesise T frames of sound as float32 in [-1, 1].

    Gain, background noise and a tremor of the pitch are random.

    Args:
        voice: identity, see `random_voice`.
        vowels, loudness: rhythm, (N,) each.
        weights: expression, (T, 4).
        glide: pitch change in semitones, (T,).
        rng: random generator.
    """
    samples = len(weights) * SAMPLE_RATE // FRAME_RATE
    time = np.arange(samples) / SAMPLE_RATE
    frame_time = (np.arange(len(weights)) + 0.5) / FRAME_RATE
    joy, sadness, anger, surprise = (np.interp(time, frame_time, track) for track in weights.T)

    trill = 0.5 - 0.5 * np.cos(2 * np.pi * 8 * (time + rng.uniform()))  # one rise and fall in 125 ms
    tremor = 0.3 * np.sin(2 * np.pi * (rng.uniform(2, 5) * time + rng.uniform()))
    semitones = np.interp(time, frame_time, glide) + tremor + 9 * joy * trill - 4 * sadness
    phase = np.cumsum(voice["pitch"] * 2 ** (semitones / 12)) / SAMPLE_RATE % 1
    flow = np.where(phase < 0.4, 0.5 - 0.5 * np.cos(np.pi * phase / 0.4), np.cos(np.pi * (phase - 0.4) / 0.4))
    pulses = np.diff(flow.clip(0) * (phase < 0.6), prepend=0.0) * 8
    growl = 1 + anger * (0.9 * np.cos(2 * np.pi * (26 * time + rng.uniform())) + 0.4)
    breath = rng.normal(0, 0.12, samples)
    source = pulses * growl * (1 - 0.9 * surprise.clip(0, 1)) + breath * (0.05 + 1.8 * surprise)
    envelope = np.interp(time, (np.arange(len(loudness)) + 0.5) * _HOP / SAMPLE_RATE, loudness)
    source = source * envelope

    sound = _filter(source, voice["tract"], vowels, sadness, anger)
    gain = 10 ** (rng.uniform(-26, -16) / 20)
    sound = gain * sound / np.sqrt(np.mean(sound**2)) + gain * rng.uniform(0.01, 0.05) * rng.normal(size=samples)
    return sound.clip(-1, 1).astype(np.float32)


def _filter(
    source: np.ndarray, tract: float, vowels: np.ndarray, sadness: np.ndarray, anger: np.ndarray
) -> np.ndarray:
    """Shape each short window by the vowel's formants; sadness dampens high frequencies, anger boosts them."""
    padded = np.pad(source, (_HOP, _HOP))
    count = len(padded) // _HOP - 1
    window = np.sqrt(np.hanning(_WINDOW + 1)[:-1])  # its square, overlapped by half, sums to 1
    pieces = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP] * window  # (F, W)
    at = (np.arange(count) * _HOP).clip(max=len(source) - 1)  # the middle of each window, in samples of `source`

    formants = _FORMANTS[vowels] / tract  # (N, 3)
    smooth = np.hanning(11)[1:-1] / 5  # about 80 ms from one vowel to the next
    formants = np.stack([np.convolve(np.pad(track, 4, mode="edge"), smooth, "valid") for track in formants.T], axis=1)
    formants = formants[at // _HOP]  # (F, 3)
    frequencies = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)  # (W / 2 + 1,)
    shape = np.zeros((count, len(frequencies)))
    for number, (bandwidth, level) in enumerate(zip(_BANDWIDTHS, _GAINS, strict=True)):
        detuning = (frequencies - formants[:, number, None]) / bandwidth
        shape += level / np.sqrt(1 + detuning**2)
    tilt = 0.35 * anger[at] - 1.6 * sadness[at]  # (F,)
    shape *= (1 + (frequencies / 700) ** 2) ** (tilt[:, None] / 2)

    pieces = np.fft.irfft(np.fft.rfft(pieces) * shape, _WINDOW) * window
    first, second = pieces[:, :_HOP], pieces[:, _HOP:]
    return (first[1:] + second[:-1]).ravel()
