"""Loads the file of a corpus row, or the part of a recording that the row names (`corpora/clips.py`)."""

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache

from corpora.clips import split_part
from egmf.media_egmf import MediaError, Recording, media_length
from egmf.media_inputs_egmf import Media
from egmf.processing_egmf import EGMFProcessor


LONGEST = 1e6  # seconds of a part without an end, in a file that does not state its length


def load_row_media(processor: EGMFProcessor, column: str, name: str) -> Media:
    """The decoded sound (`column` "audio") or pictures ("video") of a row's file or part of a file.

    Raises:
        processor.media_error: If the file cannot be read, or the part begins after its end.
    """
    [media] = load_together(processor, column, [name])
    if isinstance(media, Exception):
        raise media
    return media


def load_together(processor: EGMFProcessor, column: str, names: Sequence[str]) -> Iterator[Media | Exception]:
    """The decoded sound or pictures of a file, or of several parts of a recording, which is decoded once.

    Args:
        processor: The processor.
        column: "audio" or "video".
        names: A file; or parts of one file, in the order of their starts.

    Yields:
        For each name what it names, or the error (of `processor.media_error`) if it cannot be read.
    """
    path = split_part(names[0])[0]
    if path == names[0]:
        try:
            yield processor.load_media(**{column: path}, sound_track=False)
        except processor.media_error as error:
            yield error
        return
    yield from (_sounds if column == "audio" else _pictures)(processor, path, names)


def _sounds(processor: EGMFProcessor, path: str, parts: Sequence[str]) -> Iterator[Media | Exception]:
    try:
        sound = _whole_sound(processor, path)
    except processor.media_error as error:
        yield from [error] * len(parts)
        return
    for name in parts:
        first, last = (None if at is None else round(at * sound.sampling_rate) for at in split_part(name)[1:])
        samples = sound.samples[first:last]
        if len(samples):
            yield processor.load_media(audio=type(sound)(samples, sound.sampling_rate, sound.warnings))
        else:
            yield processor.media_error(name, "damaged", f"the recording ends after {sound.duration:.1f} seconds")


@lru_cache(maxsize=1)  # without a cache of towers, rows are loaded one by one
def _whole_sound(processor: EGMFProcessor, path: str):
    try:
        with processor.kept_warnings() as kept:
            return processor.load_media(audio=path, sound_track=False).audio
    finally:
        for warning in kept:
            if "the model reads only" not in str(warning):  # a part may fit
                warnings.warn(warning, stacklevel=2)


def _pictures(processor: EGMFProcessor, path: str, parts: Sequence[str]) -> Iterator[Media | Exception]:
    spans, failed = [split_part(name)[1:] for name in parts], None
    try:
        length = (media_length(path) if any(end is None for _, end in spans) else None) or LONGEST
    except MediaError as error:
        failed, length = error, LONGEST
    closed = [(start, length if end is None else end) for start, end in spans]
    read = iter(Recording(path, None, processor.num_frames, spans=[span for span in closed if span[0] < span[1]]))
    for place, (start, end) in enumerate(closed):
        clip = None
        if failed is None and start < end:
            try:
                clip = next(read).video
                if place == len(closed) - 1:
                    next(read, None)  # a worker that has reached the end is used again
            except MediaError as error:
                if len(parts) > 1:  # together they may need too much memory
                    for name in parts[place:]:
                        yield from _pictures(processor, path, [name])
                    return
                failed = error
        if failed is not None:
            yield processor.media_error(*failed.args)  # of the checkpoint's own code
        elif clip is None:
            yield processor.media_error(path, "no video", f"it has no pictures after {start:g} seconds")
        else:
            yield processor.load_media(video=clip, sound_track=False)
