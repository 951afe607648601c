"""Loads the file of a corpus row, or the part of a recording that the row names (`corpora/clips.py`)."""

import warnings
from functools import lru_cache

from corpora.clips import split_part
from egmf.media_inputs_egmf import Media
from egmf.processing_egmf import EGMFProcessor


def load_row_media(processor: EGMFProcessor, column: str, name: str) -> Media:
    """The decoded sound (`column` "audio") or pictures ("video") of a row's file or part of a file.

    Raises:
        processor.media_error: If the file cannot be read, or the part begins after its end.
    """
    path, start, end = split_part(name)
    if path == name:
        return processor.load_media(**{column: path}, sound_track=False)
    sound = _whole_sound(processor, path)
    first, last = (None if at is None else round(at * sound.sampling_rate) for at in (start, end))
    samples = sound.samples[first:last]
    if not len(samples):
        raise processor.media_error(name, "damaged", f"the recording ends after {sound.duration:.1f} seconds")
    return processor.load_media(audio=type(sound)(samples, sound.sampling_rate, sound.warnings))


@lru_cache(maxsize=1)  # the parts of a recording follow each other
def _whole_sound(processor: EGMFProcessor, path: str):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the model reads only", processor.media_warning)  # a part may fit
        return processor.load_media(audio=path, sound_track=False).audio
