"""The pickle reader: it restores what NumPy and Python write, rejects anything else, runs no code and limits memory.

Python's audit events (imports, opened files, code) show whether a hostile pickle ran anything.
"""

import json
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from corpora.pickles.unpickle import FileArray, UnpickleError, load_pickle


ROOT = Path(__file__).resolve().parents[1]
HOSTILE_READER = """
import encodings.raw_unicode_escape, json, resource, sys, tempfile
from corpora.pickles.unpickle import UnpickleError, load_pickle

watching, events, harmless = False, [], {"builtins.id", "mmap.__new__", "object.__getattr__", "object.__setattr__"}

def watch(event, arguments):
    if watching and event not in harmless:
        events.append([event, str(arguments[0]) if arguments else ""])

sys.addaudithook(watch)
tempfile.gettempdir()
for line in sys.stdin:
    events.clear()
    answer, watching = {"outcome": "read"}, True
    try:
        load_pickle(json.loads(line))
    except UnpickleError as error:
        answer = {"outcome": "refused", "message": str(error)}
    except BaseException as error:
        answer = {"outcome": repr(error)}
    watching = False
    answer |= {"events": events, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print(json.dumps(answer), flush=True)
"""


class HostileReader:
    """Reads pickles in a process that records Python's audit events: imports, opened files, code, other processes."""

    def __init__(self):
        command = [sys.executable, "-c", HOSTILE_READER]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = 0

    def read(self, file: Path, content: bytes) -> dict:
        """Read a pickle and return the outcome; assert that nothing ran and that an error message names the file."""
        write(file, content)
        self.process.stdin.write(json.dumps(str(file)) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        for event, what in answer["events"]:
            # A file without a name, for long text; afterwards it is known by its number.
            temporary = what == tempfile.gettempdir() or what.isdecimal()
            assert event == "open" and (what == str(file) or temporary), (event, what)
        assert answer["outcome"] in ("read", "refused"), answer["outcome"]
        assert answer["outcome"] == "read" or answer["message"].startswith(f"{file}: ")
        answer["grown"], self.memory = answer["memory"] - (self.memory or answer["memory"]), answer["memory"]
        return answer


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    started = HostileReader()
    started.read(tmp_path_factory.mktemp("reader") / "warm.pkl", pickle.dumps({"a": np.zeros(3)}))
    yield started
    started.process.stdin.close()
    assert started.process.wait(60) == 0


@pytest.fixture
def refused(reader, tmp_path):
    """`refused(content)`: assert that a pickle is rejected and memory does not grow; return the message."""

    def read(content: bytes, limit: int = 48 << 20) -> str:
        answer = reader.read(tmp_path / "hostile.pkl", content)
        assert answer["outcome"] == "refused"
        assert answer["grown"] < limit
        assert "MemoryError" not in answer["message"]
        return answer["message"]

    return read


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def same(read, wanted) -> None:
    if isinstance(read, FileArray):
        assert (len(read), read.shape, read.ndim) == (len(wanted), wanted.shape, wanted.ndim)
        assert np.array_equal(read[1:3], wanted[1:3]) and np.array_equal(np.asarray(read), wanted)
        read = read[:]
    assert type(read) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
        if wanted.dtype != object:
            assert read.tobytes() == wanted.tobytes()
            return
        read, wanted = list(read.flat), list(wanted.flat)
    if isinstance(wanted, dict):
        assert list(read) == list(wanted)
        read, wanted = list(read.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        assert len(read) == len(wanted)
        for one, other in zip(read, wanted, strict=True):
            same(one, other)
    else:
        assert read == wanted


def everything() -> dict:
    """One example of every supported type."""
    rng = np.random.default_rng(3)
    ragged = np.empty(2, object)
    ragged[:] = [rng.normal(size=(2, 3)), rng.normal(size=(4, 3))]
    types = ("f2", "f4", "<f8", ">f8", "i1", "<i4", ">i8", "u2", "?", "c8", "U7", "S5")
    shared = [1.5, "same"]
    return {
        "arrays": {code: (rng.normal(size=(3, 4)) * 9).astype(code) for code in types},
        "shapes": [np.zeros(shape) for shape in ((), (0,), (3, 0, 2), (1, 1, 1))],
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "objects": np.array([["a", 1.5, None], ["好", [1, 2], np.float32(2)]], dtype=object),
        "ragged": ragged,
        "many objects": np.array([None] * 20_000, dtype=object),
        "large": rng.normal(size=(300, 500)),
        "large in Fortran's order": np.asfortranarray(rng.normal(size=(300, 500))),
        "large texts": np.array(["好" * 700] * 400),
        "scalars": [np.float32(3.5), np.int64(-5), np.str_("hé"), np.bool_(True), np.complex64(1j)],
        "numbers": (0, 1, -1, 255, 65536, -(2**31), 2**63, 3.5, float("inf"), True, False, None, 1 - 2j),
        "texts": ["", "a'\\\n\t\u2028", "他说", "x" * 300, "好" * 600_000],
        "bytes": [b"", b"ab\xff", bytearray(b"xy")],
        "sets": [set(), {1, "a"}, frozenset([2.5]), frozenset()],
        "lists": [[], [[1.5], [[]]], (), ((1,), (1, 2), (1, 2, 3, 4))],
        "shared": [shared, shared, (shared,)],
        7: {"nested": {"deep": {"er": []}}},
    }


@pytest.mark.parametrize("protocol", range(6))
def test_round_trip(tmp_path, protocol):
    data = everything()
    read = load_pickle(write(tmp_path / "data.pkl", pickle.dumps(data, protocol=protocol)))
    same(read, data)
    assert isinstance(read["large"], FileArray) and isinstance(read["large texts"], FileArray)
    assert read["shared"][0] is read["shared"][1] is read["shared"][2][0]
    read["arrays"]["f4"][0] = 1  # a copy of its own


def test_names_of_numpy_1(tmp_path):
    """NumPy 2 renamed its modules; pickles with the old and the new names are read."""
    data = {"a": np.arange(3.0), "b": np.float32(2), "c": np.array(["x", None], dtype=object)}
    new = pickle.dumps(data, protocol=2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert new != old and new.count(b"_core") == 2
    same(load_pickle(write(tmp_path / "old.pkl", old)), data)


def test_python_2(tmp_path):
    """Strings of Python 2 are bytes: array content stays bytes, names are decoded as UTF-8 or else Latin-1."""
    array = np.array([[1.5, -2.5], [3.5, 0.0]], ">f8")
    content = b"U" + bytes([array.nbytes]) + array.tobytes()
    built = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nI2\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntbI00\n" + content + b"tb"
    )
    texts = b"(U\x06\xe5\xa5\xbd\xe5\xa5\xbdU\x02\xe9!S'it\\'s \\x41'\n(U\x01kU\x01vd(U\x01alt"
    read = load_pickle(write(tmp_path / "two.pkl", b"(U\x05train" + built + b"U\x05texts" + texts + b"d."))
    same(read, {"train": array, "texts": ("好好", "é!", "it's A", {"k": "v"}, ["a"])})


def test_large_arrays_need_no_memory(tmp_path):
    data = {"train": {"audio": np.zeros((40, 500, 300)), "id": ["a"] * 40}}
    for protocol in (2, 4, 5):
        file = write(tmp_path / f"{protocol}.pkl", pickle.dumps(data, protocol=protocol))
        assert file.stat().st_size > 45 << 20
        tracemalloc.start()
        audio = load_pickle(file)["train"]["audio"]
        chunk = audio[3:5]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Text that holds bytes, as protocol 2 has it, is decoded in parts.
        assert peak < (64 << 20 if protocol == 2 else 4 << 20) and chunk.shape == (2, 500, 300)


# --- what is refused -------------------------------------------------------------------------------------------------

PATH = "ran"
NAMES = """
os.system posix.system os.popen os.execv os.remove subprocess.Popen subprocess.check_output builtins.eval
builtins.exec builtins.compile builtins.__import__ builtins.getattr builtins.open builtins.print builtins.type
builtins.object builtins.list builtins.map builtins.memoryview __builtin__.eval __builtin__.file
importlib.import_module runpy.run_path pty.spawn shutil.rmtree pathlib.Path io.open _io.FileIO socket.socket
ctypes.CDLL marshal.loads pickle.loads _pickle.loads pickle.Unpickler copyreg._reconstructor
copyreg.__newobj__ functools.partial operator.attrgetter types.CodeType types.FunctionType code.interact
timeit.timeit cProfile.run webbrowser.open collections.OrderedDict collections.defaultdict codecs.open
_codecs.decode _codecs.lookup numpy.load numpy.fromfile numpy.memmap numpy.save numpy.array numpy.frombuffer
numpy.vectorize numpy.lib.npyio.NpzFile numpy.f2py.compile numpy.testing._private.utils.runstring
numpy.core.multiarray.fromstring numpy._core.multiarray._vec_string numpy.core.records.fromfile
numpy.dtypes.Float64DType numpy.matrix numpy.ma.core._mareconstruct numpy.random.__RandomState
pandas.read_pickle pandas.core.frame.DataFrame torch.load torch._utils._rebuild_tensor_v2 joblib.load
corpora.pickles.unpickle.load_pickle __main__.anything
""".split()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def calls(name: str) -> dict[str, bytes]:
    """All ways in which a pickle can create an object from a name."""
    module, _, own = name.rpartition(".")
    line, stack = f"c{module}\n{own}\n".encode(), text(module) + text(own) + b"\x93"
    argument = b"X" + struct.pack("<I", len(PATH)) + PATH.encode()
    return {
        "reduce": b"\x80\x02" + line + argument + b"\x85R.",
        "reduce of the stack": b"\x80\x04" + stack + argument + b"\x85R.",
        "instance": b"(" + argument + f"i{module}\n{own}\n.".encode(),
        "object": b"(" + line + argument + b"o.",
        "new": b"\x80\x02" + line + argument + b"\x85\x81.",
        "new with names": b"\x80\x04" + stack + argument + b"\x85}\x92.",
        "state": b"\x80\x02" + line + b")R}" + argument + argument + b"sb.",
        "the name alone": b"\x80\x04" + stack + b".",
        "within data": b"\x80\x02}" + argument + line + argument + b"\x85Rs.",
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs(refused, name):
    for how, content in calls(name).items():
        message = refused(content)
        if how != "object":
            assert name in message or "instruction" in message, (how, message)


def array(shape=b"K\x02\x85", code=b"f8", order=b"<", content=b"C\x10" + b"\0" * 16, parts=b"NNN", kind=b"ndarray"):
    """A pickled array of two numbers with replaceable parts."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\n" + kind + b"\nK\x00\x85C\x01b\x87R"
    dtype = b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code + b"\x89\x88\x87R"
    dtype += b"(K\x03X" + struct.pack("<I", len(order)) + order + parts + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"\x80\x03" + made + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb."


HUGE = b"\x8a\x06" + b"\xff" * 5 + b"\x7f"  # 2**47 - 1
DAMAGED = {
    "array: too few numbers": array(shape=b"K\x03\x85"),
    "array: too many numbers": array(shape=b"K\x01\x85"),
    "array: negative shape": array(shape=b"J\xff\xff\xff\xff\x85"),
    "array: absurd shape": array(shape=HUGE + HUGE + b"\x86"),
    "array: absurd shape of nothing": array(shape=b"K\x00" + HUGE + HUGE + b"\x87", content=b"C\x00"),
    "array: texts of no length": array(shape=HUGE + b"\x85", code=b"U0", content=b"C\x00"),
    "array: shape of floats": array(shape=b"G\x40\x00\x00\x00\x00\x00\x00\x00\x85"),
    "array: shape of texts": array(shape=b"X\x01\x00\x00\x00a\x85"),
    "array: shape is a list": array(shape=b"]K\x02a"),
    "array: many dimensions": array(shape=b"(" + b"K\x01" * 64 + b"t"),
    "array: shape of lists": array(shape=b"]\x85"),
    "array: content is text": array(content=b"X\x10\x00\x00\x00" + b"a" * 16),
    "array: content is a list": array(content=b"]"),
    "array: content is missing": array(content=b"N"),
    "array: objects out of bytes": array(code=b"O8"),
    "array: too few objects": array(code=b"O8", content=b"]Na"),
    "array: structured": array(parts=b"N(X\x01\x00\x00\x00at}"),
    "array: of parts": array(parts=b"X\x01\x00\x00\x00aNN"),
    "array: structured by its code": array(code=b"f4,f4"),
    "array: dates": array(code=b"M8[s]"),
    "array: void": array(code=b"V8"),
    "array: enormous texts": array(code=b"U999999999"),
    "array: long double": array(code=b"f16"),
    "array: order unknown": array(order=b"?"),
    "array: of another class": array(kind=b"dtype"),
    "array: never filled": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR.",
    "array: its type alone": b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR.",
    "array: filled twice": array()[:-1] + array()[array().index(b"(K\x01") :],
    "array: state of a list": b"](K\x01tb.",
    "array: state is no tuple": array()[: array().index(b"(K\x01")] + b"}b.",
    "array: buffer of objects": b"cnumpy.core.numeric\n_frombuffer\n(C\x01aNK\x01\x85X\x01\x00\x00\x00CtR.",
    "scalar: of objects": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tRC\x00tR.",
    "scalar: too long": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tRC\x01atR.",
    "call: too many arguments": b"cbuiltins\ncomplex\n(K\x01K\x01K\x01tR.",
    "call: a complex of text": b"cbuiltins\ncomplex\n(X\x01\x00\x00\x001X\x01\x00\x00\x002tR.",
    "call: of a number": b"K\x01)R.",
    "call: of what it made": b"cbuiltins\nset\n)R)R.",
    "call: another encoding": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zliblatintR.",
    "call: set of lists": b"cbuiltins\nset\n(](]]eltR.",
    "call: bytes of a number": b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
    "name: with a line end": b"\x80\x04\x8c\x04os\n\x8c\x06system\x93.",
    "name: of numbers": b"\x80\x04K\x01K\x02\x93.",
    "name: long": b"c" + b"a" * 1000 + b"\nb\n.",
    "persistent id": b"Pran\n.",
    "persistent id of the stack": b"X\x03\x00\x00\x00ranQ.",
    "extension 1": b"\x82\x01.",
    "extension 2": b"\x83\x01\x00.",
    "extension 4": b"\x84\x01\x00\x00\x00.",
    "buffer out of band": b"\x80\x05\x97.",
    "unknown instruction": b"\xff.",
    "no pickle": b"PK\x03\x04 an archive",
    "text": b"id,label\n",
    "empty": b"",
    "no end": b"K\x01",
    "only the end": b".",
    "two objects": b"K\x01K\x01.",
    "mark is left": b"(.",
    "mark on top": b"((.",
    "mark is missing": b"K\x01t.",
    "remembered mark": b"(q\x00.",
    "remembered nothing": b"q\x00.",
    "never remembered": b"h\x07.",
    "never remembered, far": b"j\xff\xff\xff\xff.",
    "number of no object": b"gx\n.",
    "dropped nothing": b"0.",
    "doubled nothing": b"2.",
    "append to a tuple": b")K\x01a.",
    "append to nothing": b"K\x01a.",
    "set in a list": b"]K\x01K\x01s.",
    "key without value": b"}(K\x01u.",
    "key is a list": b"}]K\x01s.",
    "key is a tuple": b"})K\x01s.",
    "key is a float": b"}G\x40\x00\x00\x00\x00\x00\x00\x00K\x01s.",
    "item is a list": b"\x8f(]\x90.",
    "integer: long": b"\x8b\xff\xff\xff\x7f" + b"\xff" * 100 + b".",
    "integer: many digits": b"I" + b"9" * 5000 + b"\n.",
    "integer: no number": b"Ix\n.",
    "float: no number": b"Fx\n.",
    "text: claims 4 GB": b"X\xff\xff\xff\xffabc.",
    "text: claims 16 EB": b"\x8d" + b"\xff" * 8 + b"abc.",
    "text: not UTF-8": b"X\x02\x00\x00\x00\xff\xfe.",
    "text: no end of line": b"Vabc",
    "text: no quotes": b"Sabc\n.",
    "text: half quotes": b"S'abc\n.",
    "text: half escape": b"S'\\x4'\n.",
    "bytes: claim 4 GB": b"B\xff\xff\xff\xffabc.",
    "bytes: claim 16 EB": b"\x8e" + b"\xff" * 8 + b"abc.",
    "bytes: claim, changeable": b"\x96" + b"\xff" * 8 + b"abc.",
    "bytes: short": b"C\xffabc.",
    "in itself": b"]q\x00h\x00a.",
    "in itself, by way of a dict": b"]q\x00}K\x01h\x00sa.",
    "in itself, by way of a tuple": b"]q\x00(h\x00h\x00ta.",
    "frame: claims more": b"\x80\x04\x95" + b"\xff" * 8 + b"N",
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged(refused, fault):
    refused(DAMAGED[fault])


def laughs(kind: bytes, levels: int = 60) -> bytes:
    """Nested containers, each with ten references to the previous one."""
    ten = [b"(" + (b"h" + bytes([level])) * 10 + kind + b"q" + bytes([level + 1]) for level in range(levels)]
    return b"]q\x00" + b"".join(ten) + b"."


def again(content: bytes, use: bytes, times: int = 1000) -> bytes:
    """Content that is written once and used many times: `use` is repeated, and `h\0` in it refers to the content."""
    return b"\x80\x03" + content + b"q\x000(" + use * times + b"l."


BYTES, TEXT = b"B\xf0\xef\x00\x00" + b"a" * 0xEFF0, b"X\xf0\xef\x00\x00" + b"a" * 0xEFF0
LONG_TEXT = b"X\x00\x00\x20\x00" + b"a" * 0x200000
BOMBS = {
    "deep lists": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep tuples": b")" + b"\x85" * 50_000 + b".",
    "deep dicts": b"}" + b"K\x01}" * 50_000 + b"s" * 50_000 + b".",
    "lists of the same lists": laughs(b"l"),
    "tuples of the same tuples": laughs(b"t"),
    "the same content in many arrays": again(BYTES, array(b"J\xf0\xef\x00\x00\x85", b"u1", content=b"h\x00")[2:-1]),
    "the same objects in many arrays": again(
        b"(" + b"N" * 100_000 + b"l", array(b"J\xa0\x86\x01\x00\x85", b"O8", content=b"h\x00")[2:-1]
    ),
    "the same text encoded often": again(TEXT, b"c_codecs\nencode\nh\x00\x85R"),
    "the same long text encoded often": again(LONG_TEXT, b"c_codecs\nencode\nh\x00\x85R"),
    "the same long text decoded often": again(LONG_TEXT, b"h\x00"),
    "the same bytes, changeable": again(BYTES, b"cbuiltins\nbytearray\nh\x00\x85R"),
    "the same items in many sets": again(b"(" + b"K\x01" * 100_000 + b"l", b"cbuiltins\nfrozenset\nh\x00\x85R"),
    "far memory": b"K\x01r\xff\xff\xff\xff" * 1000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(refused, bomb):
    """Pickles of at most 2 MB that would expand to gigabytes."""
    assert len(BOMBS[bomb]) < 3 << 20
    refused(BOMBS[bomb])


def test_bomb_of_temporary_files(tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: spool.open("wb+"))
    content = BOMBS["the same long text encoded often"]
    with pytest.raises(UnpickleError, match="again and again"):
        load_pickle(write(tmp_path / "bomb.pkl", content))
    assert len(content) < spool.stat().st_size < 17 * len(content)


def test_too_many_containers(tmp_path, monkeypatch):
    monkeypatch.setattr("corpora.pickles.pickle_machine.MAX_CONTAINERS", 1000)
    with pytest.raises(UnpickleError, match="more than 1000 containers"):
        load_pickle(write(tmp_path / "many.pkl", b"(" + b"]" * 1001 + b"l."))


@pytest.mark.parametrize("protocol", range(6))
def test_truncated(refused, protocol):
    """Files that are truncated at any position."""
    whole = pickle.dumps(everything(), protocol=protocol)
    for size in sorted(random.Random(protocol).sample(range(len(whole)), 20)):
        refused(whole[:size])


@pytest.mark.parametrize("protocol", range(6))
def test_changed_bytes(reader, tmp_path, protocol):
    """Pickles with changed bytes are read as other data or rejected."""
    numbers = np.arange(6.0).reshape(2, 3)
    small = {"ids": ["a", "b"], "array": numbers, "scalar": np.float32(1), "set": {1}, "n": (1, None)}
    whole = pickle.dumps(small, protocol=protocol)
    rng, outcomes = random.Random(protocol), set()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        outcomes.add(reader.read(tmp_path / "changed.pkl", bytes(content))["outcome"])
    assert outcomes == {"read", "refused"}


def test_python_would_have_run_them(refused, tmp_path):
    """The pickles above are real: Python's `pickle` runs one of them in a separate process."""
    content = calls("os.mkdir")["reduce"]
    file = write(tmp_path / "own.pkl", content)
    code = f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (tmp_path / PATH).is_dir()
    assert "os.mkdir" in refused(content)


def test_nothing_else_reads_pickles():
    """No file of the project calls a function that would execute a pickle."""
    runs = ("pickle.load", "Unpickler(", "read_pickle(", "allow_pickle=True", "joblib.load")
    for file in ROOT.rglob("*.py"):
        if ".venv" not in file.parts and "tests" not in file.relative_to(ROOT).parts:
            assert not [call for call in runs if call in file.read_text(encoding="utf-8")], file
