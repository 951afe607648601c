"""Reads pickles of NumPy arrays and builtin containers from untrusted files, without calling any function they name.

A pickle is a program, and Python's `pickle` module calls the functions that it names. `load_pickle` instead interprets
the pickle as data, for protocols 0 to 5 and for files written by Python 2. It recognises the names of the few
functions with which NumPy and Python store arrays, scalars, sets and bytes, and implements them here. Any other name
is an error, and so are classes, persistent ids, extension codes, structured types and containers that contain
themselves.

Lengths in the file are compared with the number of available bytes before memory is allocated. Arrays of `LARGE` bytes
or more stay in the file (`FileArray`) and are read slice by slice, so a pickle can be larger than the memory.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from corpora.pickles.pickle_machine import (
    PLAIN,
    ArrayNode,
    FileArray,
    KeptFile,
    Machine,
    Python2String,
    Refused,
    Span,
    TextSpan,
    text_of,
)


__all__ = ["FileArray", "UnpickleError", "load_pickle"]

MAX_DEPTH = 64  # levels of nested containers
MAX_ITEMS = 1 << 30  # in all containers together; a container counts once per reference to it

_NESTED = {list, dict, tuple, set, frozenset, ArrayNode}


class UnpickleError(ValueError):
    """A file that is not a pickle of arrays and builtin containers; the message names the file and the position."""


def load_pickle(path: str | os.PathLike) -> Any:
    """Load the object in a pickle file: arrays, NumPy scalars, dict, list, tuple, set, frozenset and plain values.

    Strings of Python 2 are decoded as UTF-8 or, if that fails, as Latin-1. Arrays of `LARGE` bytes or more are
    returned as `FileArray`, unless their elements are objects.

    Raises:
        FileNotFoundError: If the file does not exist.
        UnpickleError: If the file contains anything else, is damaged, or exceeds the limits above.
    """
    path = Path(path)
    file = KeptFile(path, "rb")
    if os.fstat(file.fileno()).st_size == 0:
        raise UnpickleError(f"{path}: got an empty file, wanted a pickle")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine = Machine(data, file)
        try:
            return _resolve(machine.run())
        except Refused as error:
            raise UnpickleError(f"{path}: byte {machine.begin}: {error}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UnpickleError(f"{path}: byte {machine.begin}: got a damaged pickle ({what})") from error


def _resolve(root: Any) -> Any:
    """Replace the machine's array nodes by arrays, and strings of Python 2 by text."""
    holder = [root]
    done: dict[int, tuple[Any, int, int]] = {}  # by id of a container: its replacement, number of items and depth
    texts: dict[int, str] = {}  # by id of a string of Python 2
    pending, entered = [holder], set()
    while pending:
        node = pending[-1]
        if id(node) in done:
            pending.pop()
            continue
        count, nested, changes = _items(node)
        inner = [child for child in nested if id(child) not in done]
        if inner:
            if id(node) in entered:
                raise Refused("got a container that contains itself")
            entered.add(id(node))
            pending.extend(inner)
            continue
        count += sum(done[id(child)][1] for child in nested)
        depth = 1 + max((done[id(child)][2] for child in nested), default=0)
        if depth > MAX_DEPTH + 1:
            raise Refused(f"got containers nested more than {MAX_DEPTH} deep")
        if count > MAX_ITEMS:
            raise Refused(f"got more than {MAX_ITEMS} items, counting repeated containers")
        done[id(node)] = (_finish(node, done, texts) if changes else node, count, depth)
        pending.pop()
    return holder[0]


def _items(node: Any) -> tuple[int, list, bool]:
    """The number of items of a container, the nested containers, and whether any item must be replaced."""
    if type(node) is ArrayNode:
        items = node.value if type(node.value) is list else ()
    else:
        items = node.values() if type(node) is dict else node
    kinds = set(map(type, items))
    for kind in kinds - PLAIN - _NESTED - {Python2String, bytearray}:
        if not issubclass(kind, np.generic):
            what = "long bytes or text" if kind in (Span, TextSpan) else kind.__name__
            raise Refused(f"got {what} in a container, wanted arrays, containers and plain values")
    nested = [item for item in items if type(item) in _NESTED] if kinds & _NESTED else []
    changes = bool(nested) or Python2String in kinds or type(node) is ArrayNode
    if type(node) is dict:
        changes = changes or Python2String in set(map(type, node))
    return len(items), nested, changes


def _finish(node: Any, done: dict[int, tuple[Any, int, int]], texts: dict[int, str]) -> Any:
    """Return a container with its items replaced; lists and dicts are changed in place."""

    def final(item: Any) -> Any:
        if type(item) is Python2String:
            if id(item) not in texts:
                texts[id(item)] = text_of(item)
            return texts[id(item)]
        return done[id(item)][0] if type(item) in _NESTED else item

    if type(node) is ArrayNode:
        if node.value is None:
            raise Refused("got an array without content")
        if type(node.value) is not list:
            return node.value
        objects = np.empty(len(node.value), object)
        for index, item in enumerate(node.value):
            objects[index] = final(item)
        return objects.reshape(node.shape, order=node.order)
    if type(node) is list:
        node[:] = map(final, node)
        return node
    if type(node) is dict:
        items = [(final(key), final(value)) for key, value in node.items()]
        node.clear()
        node.update(items)
        return node
    return type(node)(map(final, node))
