"""Loads the file of a corpus row, or the part of a recording that the row names (`corpora/clips.py`)."""

import warnings
from functools import lru_cache

from corpora.clips import split_part
from egmf.media_egmf import MediaError, Recording, VideoClip, media_length
from egmf.media_inputs_egmf import Media
from egmf.processing_egmf import EGMFProcessor


LONGEST = 1e6  # seconds of a part without an end, in a file that does not state its length


def load_row_media(processor: EGMFProcessor, column: str, name: str) -> Media:
    """The decoded sound (`column` "audio") or pictures ("video") of a row's file or part of a file.

    Raises:
        processor.media_error: If the file cannot be read, or the part begins after its end.
    """
    path, start, end = split_part(name)
    if path == name:
        return processor.load_media(**{column: path}, sound_track=False)
    if column == "video":
        return processor.load_media(video=_pictures(processor, path, start, end), sound_track=False)
    sound = _whole_sound(processor, path)
    first, last = (None if at is None else round(at * sound.sampling_rate) for at in (start, end))
    samples = sound.samples[first:last]
    if not len(samples):
        raise processor.media_error(name, "damaged", f"the recording ends after {sound.duration:.1f} seconds")
    return processor.load_media(audio=type(sound)(samples, sound.sampling_rate, sound.warnings))


def _pictures(processor: EGMFProcessor, path: str, start: float, end: float | None) -> VideoClip:
    try:
        span = (start, end or media_length(path) or LONGEST)
        clips = (
            [part.video for part in Recording(path, None, processor.num_frames, spans=[span])]
            if span[0] < span[1]
            else []
        )
    except MediaError as error:
        raise processor.media_error(*error.args) from None  # of the checkpoint's own code
    if not clips or clips[0] is None:
        raise processor.media_error(path, "no video", f"it has no pictures after {start:g} seconds")
    return clips[0]


@lru_cache(maxsize=1)  # the parts of a recording follow each other
def _whole_sound(processor: EGMFProcessor, path: str):
    try:
        with processor.kept_warnings() as kept:
            return processor.load_media(audio=path, sound_track=False).audio
    finally:
        for warning in kept:
            if "the model reads only" not in str(warning):  # a part may fit
                warnings.warn(warning, stacklevel=2)
