"""The interpreter of `unpickle.py`: converts a pickle's instructions to containers, plain values and array nodes.

It recognises the names of the few functions with which NumPy and Python store arrays, scalars, sets and bytes, and
implements them here. Any other name is an error, as is an instruction that creates instances of classes. Lengths in
the file are compared with the number of available bytes before memory is allocated.
"""

import codecs
import io
import math
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


LARGE = 1 << 16  # arrays of at least this many bytes stay in the file
MAX_CONTAINERS = 5_000_000
MAX_DIMENSIONS = 8
MAX_TEXT = 1 << 26  # bytes of one string
MAX_GROWTH = 16  # copied bytes per byte of the file: a list item takes 8 bytes, but may be written in one

_CHUNK = 1 << 24  # bytes decoded together, of text that stores binary data (protocols 0 to 2)
_ARRAY_MODULES = {f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray", "numeric")}
_BUILTINS = {"builtins", "__builtin__"}
PLAIN = {str, bytes, int, float, complex, bool, type(None)}
_KEYS = {str, bytes, int, bool, type(None)}
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,9}|O8?")


class KeptFile(io.FileIO):
    """A file that stays open until no array refers to it any longer."""

    def __del__(self):
        self.close()


class FileArray:
    """An array that stays in its file. Indexing or slicing the first axis reads a copy from the file.

    Attributes:
        shape: Shape of the whole array.
        dtype: Data type of the elements.
    """

    def __init__(self, file, offset: int, dtype: np.dtype, shape: tuple[int, ...], order: str):
        self._file, self._offset, self._order = file, offset, order
        self.dtype, self.shape = dtype, shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> np.ndarray:
        # A new memory map each time, so that pages already read no longer count as memory of this process.
        mapped = np.memmap(self._file, self.dtype, "r", self._offset, self.shape, self._order)
        return np.array(mapped[key])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


class Refused(Exception):
    """The pickle is not accepted. The message does not name the file, which the caller adds."""


class Mark:
    """Marks the start of a group of items on the stack."""


class _Global(NamedTuple):
    module: str
    name: str


class Python2String(bytes):
    """A string of Python 2: either text or the content of an array."""


class Span(NamedTuple):
    """Bytes that stay in a file."""

    file: Any
    offset: int
    size: int


class TextSpan(NamedTuple):
    """Long text that stays in the pickle. In protocols 0 to 2, Python 3 stores the bytes of an array this way."""

    offset: int
    size: int
    encoding: str


class TypeNode:
    """A dtype under construction: it starts with the type code, and BUILD adds the byte order."""

    def __init__(self, code: str):
        self.dtype = np.dtype(code)


class ArrayNode:
    """An array under construction: it starts empty, and BUILD adds the content. For objects, `value` is a list."""

    def __init__(self):
        self.value, self.shape, self.order = None, (), "C"


def text_of(value: Any) -> str:
    """Return a string; decode it if Python 2 stored it as bytes."""
    if type(value) is Python2String:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    if type(value) is not str:
        raise Refused(f"got {type(value).__name__}, wanted a string")
    return value


class Machine:
    """Executes the instructions of a pickle and builds containers, plain values and the nodes above."""

    def __init__(self, data: mmap.mmap, file):
        self.data, self.file, self.spool = data, file, None
        self.size, self.position, self.begin = len(data), 0, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.containers, self.copied = 0, 0

    def run(self) -> Any:
        table, data, size = _INSTRUCTIONS, self.data, self.size
        while self.position < size:
            self.begin = self.position
            code = data[self.begin]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise Refused(f"got {len(self.stack)} objects at the end, wanted one")
                return self.stack[0]
            instruction = table.get(code)
            if instruction is None:
                raise Refused(f"got the instruction {bytes([code])!r}, wanted one that builds plain data")
            instruction(self)
        self.begin = size
        raise Refused("got the end of the file, wanted the rest of the pickle")

    # Arguments of instructions

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        start, self.position = self.position, self.position + size
        if self.position > self.size:
            raise Refused(f"got {self.size - start} bytes up to the end of the file, wanted {size}")
        return self.data[start : self.position]

    def number(self, form: struct.Struct) -> int:
        return form.unpack(self.take(form.size))[0]

    def sized(self, form: struct.Struct) -> tuple[int, int]:
        """Read a length and skip that many bytes; return their start and length."""
        size = self.number(form)
        start, self.position = self.position, self.position + size
        if self.position > self.size:
            raise Refused(f"got {self.size - start} bytes up to the end of the file, wanted {size}")
        return start, size

    def line(self) -> tuple[int, int]:
        """The start and the length of the next line, without the newline."""
        start = self.position
        end = self.data.find(b"\n", start)
        if end < 0:
            raise Refused("got the end of the file, wanted the end of a line")
        self.position = end + 1
        return start, end - start

    def word(self, limit: int = 100) -> str:
        """The next line as text; it must be a name or a number of at most `limit` bytes."""
        start, size = self.line()
        if size > limit:
            raise Refused(f"got a line of {size} bytes, wanted at most {limit}")
        return self.data[start : start + size].decode("ascii")

    # The stack

    def pop(self, kind: type | None = None) -> Any:
        if not self.stack or self.stack[-1] is Mark:
            raise Refused("got nothing on the stack, wanted an object")
        value = self.stack.pop()
        if kind is not None and type(value) is not kind:
            raise Refused(f"got {type(value).__name__}, wanted {kind.__name__}")
        return value

    def top(self, kind: type) -> Any:
        value = self.pop(kind)
        self.stack.append(value)
        return value

    def group(self) -> list:
        """The items since the last mark."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is Mark:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise Refused("got no mark on the stack, wanted one")

    def container(self, value: Any) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise Refused(f"got more than {MAX_CONTAINERS} containers")
        self.stack.append(value)

    def copy(self, size: int) -> None:
        """Count copied bytes and limit their growth: a regular pickle copies its content only once."""
        self.copied += size
        if self.copied > MAX_GROWTH * self.size + LARGE:
            raise Refused("got the same content again and again, wanted a pickle that does not grow")

    def set_items(self, target: dict, items: list) -> None:
        if len(items) % 2:
            raise Refused("got a key without a value")
        keys = items[::2]
        # Keys of these types cannot be chosen so that all their hashes collide.
        if wrong := set(map(type, keys)) - _KEYS - {Python2String}:
            raise Refused(f"got {wrong.pop().__name__} as a key, wanted a string or an integer")
        target.update(zip(keys, items[1::2], strict=True))

    # Text and bytes

    def push_bytes(self, start: int, size: int, kind: type = bytes) -> None:
        """Push bytes, or their position in the file if there are at least `LARGE`."""
        small = size < LARGE
        self.stack.append(kind(self.data[start : start + size]) if small else Span(self.file, start, size))

    def push_text(self, start: int, size: int, encoding: str = "utf-8") -> None:
        if size >= LARGE:
            self.stack.append(TextSpan(start, size, encoding))
        else:
            self.stack.append(self.decode(start, size, encoding))

    def decode(self, start: int, size: int, encoding: str) -> str:
        return self.data[start : start + size].decode(encoding)

    def plain_text(self, value: Any) -> Any:
        if type(value) is TextSpan:
            if value.size > MAX_TEXT:
                raise Refused(f"got a string of {value.size} bytes, wanted at most {MAX_TEXT}")
            self.copy(value.size)
            return self.decode(*value)
        return value

    def encode_latin1(self, value: Any) -> bytes | Span:
        """Encode text as Latin-1; the bytes of long text go to a temporary file."""
        if type(value) not in (str, TextSpan):
            raise Refused(f"got {type(value).__name__} to encode, wanted text")
        if type(value) is str:
            self.copy(len(value))
            return value.encode("latin-1")
        self.copy(value.size)
        if self.spool is None:
            with tempfile.TemporaryFile() as file:
                self.spool = KeptFile(os.dup(file.fileno()), "rb+")
        decoder = codecs.getincrementaldecoder(value.encoding)()
        offset, end = self.spool.seek(0, os.SEEK_END), value.offset + value.size
        for start in range(value.offset, end, _CHUNK):
            stop = min(start + _CHUNK, end)
            self.spool.write(decoder.decode(self.data[start:stop], stop == end).encode("latin-1"))
        return Span(self.spool, offset, self.spool.tell() - offset)

    def array_bytes(self, value: Any) -> bytes | bytearray | Span:
        if type(value) not in (bytes, bytearray, Python2String, Span):
            raise Refused(f"got {type(value).__name__} as the content of an array, wanted bytes")
        return value

    # Functions, by name

    def push_global(self, module: Any, name: Any) -> None:
        name = _Global(text_of(module), text_of(name))
        if name not in _FUNCTIONS and name not in _TYPES:
            raise Refused(f"got {'.'.join(name)!r}, wanted NumPy arrays and builtin containers only")
        self.stack.append(name)

    def reduce(self) -> None:
        arguments, function = self.pop(tuple), self.pop()
        carry_out = _FUNCTIONS.get(function) if type(function) is _Global else None
        if carry_out is None:
            raise Refused(f"got a call of {type(function).__name__}, wanted one that builds plain data")
        self.container(carry_out(self, *arguments))

    def build(self) -> None:
        state = self.pop(tuple)
        node = self.pop()
        if type(node) is TypeNode:
            self.build_type(node, state)
        elif type(node) is ArrayNode and node.value is None:
            self.build_array(node, state)
        else:
            raise Refused(f"got a state for {type(node).__name__}, wanted one of an array")
        self.stack.append(node)

    def build_type(self, node: TypeNode, state: tuple) -> None:
        """(version, byte order, subtype, names, fields, size, alignment, flags, ...)"""
        if not 8 <= len(state) <= 9 or any(part is not None for part in state[2:5]):
            raise Refused("got a type with parts, wanted a plain one")
        order = text_of(state[1])
        if order not in ("<", ">", "=", "|"):
            raise Refused(f"got the byte order {order!r}, wanted '<' or '>'")
        node.dtype = node.dtype.newbyteorder(order)

    def build_array(self, node: ArrayNode, state: tuple) -> None:
        """(version, shape, dtype, whether in Fortran's order, content)"""
        _, shape, node_type, fortran, content = state[-5:] if len(state) == 5 else (None, *state)
        self.fill_array(node, node_type, shape, "F" if fortran else "C", content)

    def fill_array(self, node: ArrayNode, node_type: Any, shape: Any, order: str, content: Any) -> None:
        if type(node_type) is not TypeNode:
            raise Refused(f"got {type(node_type).__name__} as an array's type, wanted a dtype")
        dtype = node_type.dtype
        if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or any(type(n) is not int for n in shape):
            raise Refused(f"got something else as a shape, wanted a tuple of at most {MAX_DIMENSIONS} integers")
        if any(not 0 <= n < 1 << 48 for n in shape):
            raise Refused(f"got the shape {shape}, wanted lengths that a file can hold")
        count = math.prod(shape)
        node.shape, node.order = shape, order
        if dtype.hasobject:
            if type(content) is not list or len(content) != count:
                got = len(content) if type(content) is list else type(content).__name__
                raise Refused(f"got {got} objects, wanted the {count} of the shape {shape}")
            self.copy(8 * count)
            node.value = content
            return
        content = self.array_bytes(content)
        size = content.size if type(content) is Span else len(content)
        if size != count * dtype.itemsize or (count and not dtype.itemsize):
            raise Refused(f"got {size} bytes, wanted {count * dtype.itemsize} for the shape {shape} of {dtype}")
        if type(content) is Span:
            node.value = FileArray(content.file, content.offset, dtype, shape, order)
        elif not count:
            node.value = np.empty(shape, dtype)
        else:
            self.copy(size)
            node.value = np.frombuffer(bytearray(content), dtype).reshape(shape, order=order)

    def make_dtype(self, code: Any, *flags: Any) -> TypeNode:
        code = text_of(code)
        if not _DTYPE.fullmatch(code):
            raise Refused(f"got the type {code!r:.40}, wanted numbers, text or objects")
        return TypeNode(code)

    def make_array(self, kind: Any, *empty: Any) -> ArrayNode:
        if kind != _Global("numpy", "ndarray"):
            raise Refused("got an array of another class, wanted numpy.ndarray")
        return ArrayNode()

    def array_of_buffer(self, content: Any, node_type: Any, shape: Any, order: Any) -> ArrayNode:
        node = ArrayNode()
        if text_of(order) not in ("C", "F"):
            raise Refused("got another order of an array, wanted 'C' or 'F'")
        self.fill_array(node, node_type, shape, text_of(order), content)
        return node

    def make_scalar(self, node_type: Any, content: Any) -> np.generic:
        if type(node_type) is not TypeNode or node_type.dtype.hasobject:
            raise Refused("got a scalar of objects, wanted a number or text")
        node = ArrayNode()
        self.fill_array(node, node_type, (), "C", content)
        return node.value[()]

    def make_set(self, kind: Callable, items: Any = ()) -> Any:
        if type(items) not in (list, tuple) or not set(map(type, items)) <= _KEYS | {Python2String, float}:
            raise Refused("got a set of something else, wanted strings and numbers")
        self.copy(8 * len(items))
        return kind(items)

    def make_bytes(self, value: Any = b"", encoding: Any = "latin-1") -> bytes | Span:
        if type(value) in (str, TextSpan):
            if text_of(encoding) not in ("latin1", "latin-1"):
                raise Refused("got another encoding, wanted latin1")
            return self.encode_latin1(value)
        return self.array_bytes(value)

    def make_bytearray(self, value: Any = b"", encoding: Any = "latin-1") -> bytearray | Span:
        value = self.make_bytes(value, encoding)
        if type(value) is Span:
            return value
        self.copy(len(value))
        return bytearray(value)

    def make_complex(self, real: Any, imaginary: Any) -> complex:
        if not {type(real), type(imaginary)} <= {float, int}:
            raise Refused("got a complex number of something else, wanted two numbers")
        return complex(real, imaginary)


_FUNCTIONS: dict[_Global, Callable] = {
    _Global("numpy", "dtype"): Machine.make_dtype,
    _Global("_codecs", "encode"): Machine.make_bytes,
}
_TYPES = {_Global("numpy", "ndarray")}
for _module in _ARRAY_MODULES:
    _FUNCTIONS[_Global(_module, "_reconstruct")] = Machine.make_array
    _FUNCTIONS[_Global(_module, "_frombuffer")] = Machine.array_of_buffer
    _FUNCTIONS[_Global(_module, "scalar")] = Machine.make_scalar
for _module in _BUILTINS:
    _FUNCTIONS[_Global(_module, "set")] = lambda machine, *items: machine.make_set(set, *items)
    _FUNCTIONS[_Global(_module, "frozenset")] = lambda machine, *items: machine.make_set(frozenset, *items)
    _FUNCTIONS[_Global(_module, "bytes")] = Machine.make_bytes
    _FUNCTIONS[_Global(_module, "bytearray")] = Machine.make_bytearray
    _FUNCTIONS[_Global(_module, "complex")] = Machine.make_complex

_INT32, _UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct(form) for form in ("<i", "<B", "<H", "<I", "<Q"))
_FLOAT64 = struct.Struct(">d")


def _put(machine: Machine, index: int) -> None:
    if not machine.stack or machine.stack[-1] is Mark:
        raise Refused("got nothing on the stack, wanted an object to remember")
    machine.memo[index] = machine.stack[-1]


def _get(machine: Machine, index: int) -> None:
    if index not in machine.memo:
        raise Refused(f"got the number {index} of an object, wanted one of those before")
    machine.stack.append(machine.memo[index])


def _integer(machine: Machine, size: int) -> None:
    if size > 9:  # a signed integer that holds NumPy's largest
        raise Refused(f"got an integer of {size} bytes, wanted at most 9")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _integer_line(machine: Machine) -> None:
    word = machine.word(limit=22).removesuffix("L")
    machine.stack.append({"00": False, "01": True}[word] if word in ("00", "01") else int(word))


def _quoted_line(machine: Machine) -> None:
    start, size = machine.line()
    quoted = machine.data[start : start + size].strip()
    if len(quoted) < 2 or quoted[:1] not in (b"'", b'"') or quoted[-1:] != quoted[:1]:
        raise Refused("got a string without its quotes")
    machine.stack.append(Python2String(codecs.escape_decode(quoted[1:-1])[0]))


def _append(machine: Machine) -> None:
    value = machine.plain_text(machine.pop())
    machine.top(list).append(value)


def _extend(machine: Machine) -> None:
    items = [machine.plain_text(item) for item in machine.group()]
    machine.top(list).extend(items)


def _set_item(machine: Machine) -> None:
    value = machine.plain_text(machine.pop())
    key = machine.pop()
    machine.set_items(machine.top(dict), [key, value])


def _set_items(machine: Machine) -> None:
    items = [machine.plain_text(item) for item in machine.group()]
    machine.set_items(machine.top(dict), items)


def _make_dict(machine: Machine) -> None:
    items = [machine.plain_text(item) for item in machine.group()]
    made: dict = {}
    machine.set_items(made, items)
    machine.container(made)


def _add_items(machine: Machine) -> None:
    items = machine.group()
    machine.top(set).update(machine.make_set(set, items))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def make(machine: Machine) -> None:
        items = [machine.pop() for _ in range(count)][::-1]
        machine.container(tuple(items))

    return make


def _drop(machine: Machine) -> None:
    if not machine.stack:
        raise Refused("got nothing on the stack, wanted an object")
    machine.stack.pop()


_INSTRUCTIONS: dict[int, Callable[[Machine], None]] = {
    ord(code): instruction
    for code, instruction in {
        "(": lambda m: m.stack.append(Mark),
        "0": _drop,
        "1": lambda m: m.group(),
        "2": lambda m: m.stack.append(m.stack[-1]),
        "N": lambda m: m.stack.append(None),
        "\x88": lambda m: m.stack.append(True),
        "\x89": lambda m: m.stack.append(False),
        "F": lambda m: m.stack.append(float(m.word())),
        "G": lambda m: m.stack.append(m.number(_FLOAT64)),
        "I": _integer_line,
        "L": _integer_line,
        "J": lambda m: m.stack.append(m.number(_INT32)),
        "K": lambda m: m.stack.append(m.number(_UINT8)),
        "M": lambda m: m.stack.append(m.number(_UINT16)),
        "\x8a": lambda m: _integer(m, m.number(_UINT8)),
        "\x8b": lambda m: _integer(m, m.number(_UINT32)),
        "S": _quoted_line,
        "T": lambda m: m.push_bytes(*m.sized(_UINT32), Python2String),
        "U": lambda m: m.stack.append(Python2String(m.take(m.number(_UINT8)))),
        "V": lambda m: m.push_text(*m.line(), "raw-unicode-escape"),
        "X": lambda m: m.push_text(*m.sized(_UINT32)),
        "\x8c": lambda m: m.push_text(*m.sized(_UINT8)),
        "\x8d": lambda m: m.push_text(*m.sized(_UINT64)),
        "C": lambda m: m.stack.append(m.take(m.number(_UINT8))),
        "B": lambda m: m.push_bytes(*m.sized(_UINT32)),
        "\x8e": lambda m: m.push_bytes(*m.sized(_UINT64)),
        "\x96": lambda m: m.push_bytes(*m.sized(_UINT64), bytearray),
        "\x98": lambda m: None,  # READONLY_BUFFER has no effect, because the arrays are copies
        "]": lambda m: m.container([]),
        "}": lambda m: m.container({}),
        "\x8f": lambda m: m.container(set()),
        ")": lambda m: m.container(()),
        "l": lambda m: m.container([m.plain_text(item) for item in m.group()]),
        "t": lambda m: m.container(tuple(m.group())),
        "d": _make_dict,
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "\x91": lambda m: m.container(m.make_set(frozenset, m.group())),
        "\x90": _add_items,
        "a": _append,
        "e": _extend,
        "s": _set_item,
        "u": _set_items,
        "p": lambda m: _put(m, int(m.word())),
        "q": lambda m: _put(m, m.number(_UINT8)),
        "r": lambda m: _put(m, m.number(_UINT32)),
        "\x94": lambda m: _put(m, len(m.memo)),
        "g": lambda m: _get(m, int(m.word())),
        "h": lambda m: _get(m, m.number(_UINT8)),
        "j": lambda m: _get(m, m.number(_UINT32)),
        "c": lambda m: m.push_global(m.word(), m.word()),
        "\x93": lambda m: m.push_global(*reversed((m.pop(), m.pop()))),
        "R": lambda m: m.reduce(),
        "b": lambda m: m.build(),
        "\x80": lambda m: m.take(1),  # the protocol
        "\x95": lambda m: m.number(_UINT64),  # the size of a frame is not needed
    }.items()
}
