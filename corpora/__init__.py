"""Readers for published and generated corpora, and for tables of your own clips.

All return a `datasets.DatasetDict` with the same schema.
Each module reads one corpus through `load(source, **options)`. `corpora/schema.py` describes the columns. This package
does not depend on the model. `python -m corpora` converts a large corpus once; `load_corpus` also reads the result.

    from corpora import load_corpus
    splits = load_corpus("mosi", "path/to/mosi", context=3)
    splits["train"][0]["emotion"]
"""

import importlib
import inspect
import os
from collections.abc import Sequence

from datasets import DatasetDict

from corpora.clips import split_part
from corpora.converted import is_converted, load_converted


CORPORA = ("avatars", "casia", "cherma", "generated", "meld", "mosei", "mosi", "mvsa", "ravdess", "simsv2", "table")

# The units of `CLUSTERS` that are speakers.
SPEAKER_UNITS = ("actors", "people", "speakers")


def load_corpus(name: str, source: str | os.PathLike | None = None, **options) -> DatasetDict:
    """Load a corpus by name.

    Args:
        name: one of `CORPORA`.
        source: the folder (or file) with the published files, or a folder written by `python -m corpora`. For `table`:
            your own table, see `corpora/table.py`. For `avatars`: the folder to which clips are written. For
            `generated`: `None`, because it has no files.
        **options: options of the module's `load`; for a converted folder, those of
            `corpora.converted.load_converted`.

    Returns:
        The splits `train`, `validation` and `test`, with the columns of `corpora.schema.FEATURES`.

    Raises:
        ValueError: if the corpus or an option is unknown (the message lists the known ones), if a required source is
            missing, or if the files do not have the published form.
        FileNotFoundError: if the source, or a file in it, does not exist.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus: unknown name {name!r}, wanted one of {', '.join(CORPORA)}")
    if source is not None and is_converted(source):
        return load_converted(name, source, **options)
    load = importlib.import_module(f"{__name__}.{name}").load
    known = [option for option in inspect.signature(load).parameters if option != "source"]
    for option in options:
        if option not in known:
            raise ValueError(f"corpus {name!r}: unknown option {option!r}, wanted one of {', '.join(known)}")
    if source is None and name != "generated":
        raise ValueError(f"corpus {name!r}: source is None, wanted the folder with its files (--corpus_dir)")
    return load(source, **options)


def group_of(name: str, row_id: str) -> str | None:
    """The group of a row in result tables; None if the corpus does not define groups."""
    module = importlib.import_module(f"{__name__}.{name}")
    return module.group_of(row_id) if hasattr(module, "group_of") else None


def clusters_of(name: str, ids: Sequence[str], speakers: Sequence[str | None]) -> tuple[str, list[str]]:
    """Clusters of dependent rows, which a bootstrap resamples as a whole.

    A corpus module defines `CLUSTERS`: the name of the unit, and a function from a row's id and speaker to a cluster.
    Rows without a cluster belong to their recording, and otherwise to themselves.

    Returns:
        The unit (`"videos"`, `"dialogues"`, `"actors"`, `"people"`, `"speakers"`, `"recordings"` or `"utterances"`)
        and the cluster of each row.
    """
    unit, found = _named_clusters(name, ids, speakers)
    recordings = [split_part(row_id)[0] for row_id in ids]
    if not any(found):
        unit = "utterances" if len(set(recordings)) == len(recordings) else "recordings"
    return unit, [cluster or own for cluster, own in zip(found, recordings, strict=True)]


def _named_clusters(name: str, ids: Sequence[str], speakers: Sequence[str | None]) -> tuple[str, list[str | None]]:
    unit, cluster_of = getattr(importlib.import_module(f"{__name__}.{name}"), "CLUSTERS", ("utterances", None))
    return unit, [cluster_of(*row) if cluster_of else None for row in zip(ids, speakers, strict=True)]


def speakers_of(name: str, ids: Sequence[str], speakers: Sequence[str | None]) -> list[str]:
    """The speaker of each row, for speaker adaptation and speaker mixing.

    If the clusters of a corpus are speakers, these are returned (RAVDESS, CASIA, Avatars). Otherwise the column
    `speaker` is.

    Raises:
        ValueError: if the corpus does not name the speaker of every row.
    """
    unit, clusters = _named_clusters(name, ids, speakers)
    found = clusters if unit in SPEAKER_UNITS else list(speakers)
    unnamed = [row_id for row_id, speaker in zip(ids, found, strict=True) if not speaker]
    if unnamed:
        got = f"no speaker in {len(unnamed)} of {len(found)} rows of {name}, such as {unnamed[0]}"
        raise ValueError(f"speaker_adaptation, speaker_mixing: got {got}, wanted a corpus that names them all")
    return found
