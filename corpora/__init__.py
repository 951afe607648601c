"""Corpora: published or generated files in, one `datasets.DatasetDict` schema out.

Each module reads one data set and has one function, `load(source, **options)`. What they return is described
in `corpora/schema.py`; nothing in here knows the model. `python -m corpora` converts large ones once, to folders that
`load_corpus` reads as well.

    from corpora import load_corpus
    splits = load_corpus("mosi", "path/to/mosi", context=3)
    splits["train"][0]["emotion"]
"""

import importlib
import inspect
import os
from collections.abc import Sequence

from datasets import DatasetDict

from corpora.converted import is_converted, load_converted


CORPORA = ("avatars", "cherma", "generated", "meld", "mosei", "mosi", "ravdess", "simsv2")


def load_corpus(name: str, source: str | os.PathLike | None = None, **options) -> DatasetDict:
    """Load a corpus by name.

    Args:
        name: one of `CORPORA`.
        source: the folder (or file) with the published files, or what `python -m corpora` made of them; for `avatars`,
            the folder in which its clips are made; `None` for `generated`, which has none.
        **options: the named module's own options, see its `load`; of a converted folder, see
            `corpora.converted.load_converted`.

    Returns:
        The splits `train`, `validation` and `test`, with the columns of `corpora.schema.FEATURES`.

    Raises:
        ValueError: an unknown corpus or option (the message names it and lists the known ones), no source where
            one is needed, or files that are not what the corpus publishes.
        FileNotFoundError: the source, or a file in it, does not exist.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus: unknown name {name!r}, expected one of {', '.join(CORPORA)}")
    if source is not None and is_converted(source):
        return load_converted(name, source, **options)
    load = importlib.import_module(f"{__name__}.{name}").load
    known = [option for option in inspect.signature(load).parameters if option != "source"]
    for option in options:
        if option not in known:
            raise ValueError(f"corpus {name!r}: unknown option {option!r}, expected one of {', '.join(known)}")
    if source is None and name != "generated":
        raise ValueError(f"corpus {name!r}: source is None, expected the folder with its files")
    return load(source, **options)


def group_of(name: str, row_id: str) -> str | None:
    """The group that a corpus sorts a row into, for tables; None where a corpus has no groups."""
    module = importlib.import_module(f"{__name__}.{name}")
    return module.group_of(row_id) if hasattr(module, "group_of") else None


def clusters_of(name: str, ids: Sequence[str], speakers: Sequence[str | None]) -> tuple[str, list[str]]:
    """By what a corpus's rows hang together: a bootstrap draws these whole.

    A corpus's module says so in `CLUSTERS`: what they are called, and the one of a row, by its id and speaker. Rows of
    a corpus without any, or whose ids are of another form, stand for themselves.

    Returns:
        `"videos"`, `"dialogues"`, `"actors"`, `"people"` or `"utterances"`, and each row's own.
    """
    unit, cluster_of = getattr(importlib.import_module(f"{__name__}.{name}"), "CLUSTERS", ("utterances", None))
    found = [cluster_of(*row) for row in zip(ids, speakers, strict=True)] if cluster_of else [None]
    return ("utterances", list(ids)) if None in found else (unit, found)
