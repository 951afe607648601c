"""The worker process of `media_egmf.py`: reads requests from standard input and writes answers to standard output."""

import json
import os
import signal
import struct
import sys
from typing import Any

import numpy as np

from .media_readers_egmf import READERS, MediaError, import_readers
from .media_recordings_egmf import read_recording


LARGEST_WORKER = 4 << 30  # maximum bytes that a worker may map
WORKER_FILE = os.path.abspath(__file__)
# Starts a worker with this file's folder as a package, so that the files import each other relatively as elsewhere.
START = """
import sys, types
package = types.ModuleType("egmf_worker")
package.__path__ = [sys.argv[1]]
sys.modules["egmf_worker"] = package
from egmf_worker.media_worker_egmf import serve
serve()
"""


def _alarm(seconds: int) -> None:
    """Ends this process after some time, in which its caller may have been killed; 0 cancels that."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def serve() -> None:
    """Answers requests from standard input until it is closed. Standard output contains only the answers."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_WORKER, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):  # not on this platform, or a lower limit is set already
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C and kills this process
    with open(os.dup(1), "wb") as output, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        missing = import_readers()
        output.write(b"!")
        output.flush()

        def send(answer: dict[str, Any], *arrays: np.ndarray) -> None:
            """Writes an answer: the length of its header, the header, and the arrays that the header describes."""
            answer["arrays"] = [(array.shape, array.dtype.str) for array in arrays]
            header = json.dumps(answer).encode()
            output.write(struct.pack("<I", len(header)) + header)
            for array in arrays:
                output.write(np.ascontiguousarray(array).data)
            output.flush()

        for line in sys.stdin.buffer:
            request = json.loads(line)

            def send_part(answer: dict[str, Any], *arrays: np.ndarray, seconds: int = request["alarm"]) -> None:
                _alarm(0)  # the caller may take its time
                send(answer, *arrays)
                _alarm(seconds)

            _alarm(request["alarm"])
            arrays = ()
            try:
                if missing:
                    raise missing
                if request["reader"] == "recording":
                    answer = read_recording(request["file"], request["wanted"], send_part)
                else:
                    answer, *arrays = READERS[request["reader"]](request["file"], request["wanted"])
            except MediaError as error:
                answer = {"error": error.args[1:]}
            except ImportError as error:
                answer = {"missing": str(error)}
            except MemoryError:
                answer = {"error": ("too large", "decoding needs more memory than the limit of a worker")}
            except Exception as error:
                answer = {"error": ("damaged", f"it cannot be decoded ({type(error).__name__}: {error})")}
            send(answer, *arrays)
            _alarm(0)
