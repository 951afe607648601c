"""The lengths of a corpus's clips, which decide how a model's recordings are divided."""

import logging

import numpy as np
from datasets import Dataset

from corpora.clips import split_part
from egmf.media_egmf import MediaError, media_length


STILL = 0.1  # seconds that a still picture states at most
SAMPLE = 500  # clips whose lengths are read


def clip_seconds(rows: Dataset) -> float | None:
    """The length in seconds that 95 % of the rows' clips do not exceed, as their files or parts of files state it.

    At most 500 clips, spread evenly over the rows, are read. None if none states its length.
    """
    clips = [row["audio"] or row["video"] for row in rows.select_columns(["audio", "video"])]
    clips = [clip for clip in clips if clip]
    lengths = []
    for clip in clips[:: max(1, len(clips) // SAMPLE)]:
        file, start, end = split_part(clip)
        try:
            end = media_length(file) if end is None else end
        except MediaError as error:
            logging.debug("%s", error)  # the cache of towers reports it
        lengths.append(None if end is None else end - start)
    known = [length for length in lengths if length is not None and length > STILL]
    return round(float(np.quantile(known, 0.95)), 2) if known else None
