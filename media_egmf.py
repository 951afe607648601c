"""Decodes audio and video files to arrays in a worker process, so that no file can crash, hang or exhaust the caller.

`load_audio` returns mono sound from an audio file or the sound track of a video. `load_video` returns a few frames
with their times. Both return everything they can recover, with `warnings` about missing parts, or raise a `MediaError`
whose `kind` gives the reason. `Recording` reads the spans of a file of any length, one after the other. For sound and
pictures, time 0 is the start of the file's earliest stream.

Measurements with PyAV 18.1.0, decord2 3.4.0 and soundfile 0.14.0 determined the choice of decoders:

- Pictures: PyAV first, then, of mp4, mov, mkv and webm files, decord if PyAV's worker dies or decodes no picture of a
  video stream. In 8-bit h264, hevc,
  vp9 and mpeg4 both return identical bytes, and their cost differs by at most 20 %. decord has these faults: in MPEG
  program streams (all GRID clips) it silently returns wrong pictures and times near -1e14; it decodes 10-bit video
  wrongly; it rejects transport streams; it counts times from the first frame instead of the start of the file; it
  rejects many damaged files that PyAV recovers (never the reverse); one corrupt `stts` count aborts its process.
- Sound: soundfile for the formats it supports; PyAV for containers and for files that soundfile finds damaged
  (soundfile recovers nothing of a cut FLAC). decord's AudioReader silently returned 1.5 of 10 s and is not used.

Truncation is detected if the file states its length: mp4, mkv, webm, avi, wav, aiff, flac, most mp3 (Xing header) and
Ogg (its last page is marked). MPEG program and transport streams, fragmented mp4, and mp3 without that header state no
length. Damage that decodes to plausible sound or pictures cannot be detected. Frames are the bytes of PyAV's
`to_ndarray(format="rgb24")`, rotated upright if the file says that the camera (a phone) was rotated.

The worker is `media_worker_egmf.py`, run by the same Python. It communicates through pipes and needs
neither `multiprocessing` nor a guarded `__main__`. A worker is reused by later calls; concurrent threads use one
worker each, and a forked process starts its own. The worker never uses the file's name, so the suffix does not affect
decoding. It opens only this file, so a playlist cannot make it read other files or the network. On Linux it may map
4 GiB.
"""

import atexit
import json
import math
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .media_readers_egmf import TOLERANCE, MediaError, shortfall
from .media_worker_egmf import START, WORKER_FILE


STARTING = 300.0  # seconds a worker may take to start on a very busy machine; time limits of calls exclude them


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Mono sound: `samples` `(N,)` float32 at `sampling_rate` Hz, and `warnings` about missing parts."""

    samples: np.ndarray
    sampling_rate: int
    warnings: list[str]

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sampling_rate


@dataclass(frozen=True, eq=False)
class VideoClip:
    """`frames` `(F, H, W, 3)` uint8 RGB, `times` `(F,)` and the end of the video in seconds, and `warnings`."""

    frames: np.ndarray
    times: np.ndarray
    duration: float
    warnings: list[str]


def load_audio(path: str | os.PathLike, sampling_rate: int, time_limit: float = 60.0) -> AudioClip:
    """Decodes an audio file or the sound track of a video to mono (mean of the channels), resampled by soxr.

    Silence replaces lost sound, and precedes a sound track that starts later than the pictures, so that times stay
    correct.

    Args:
        path: The file.
        sampling_rate: Sampling rate of the result in Hz.
        time_limit: Limit of the whole call in seconds.

    Raises:
        MediaError: If no sound can be decoded; the kind is `"no audio"` if the file has no sound track.
    """
    if sampling_rate < 1:
        raise ValueError(f"`sampling_rate` got {sampling_rate!r}, wanted at least 1.")
    file, deadline = _regular_file(path), time.monotonic() + time_limit
    found, error = [], None
    for reader in ("audio_by_soundfile", "audio_by_pyav"):
        try:
            found.append(_decode(reader, path, file, int(sampling_rate), deadline))
        except MediaError as raised:
            error = raised
            if raised.kind in ("time limit", "too large"):
                break
        # PyAV may recover more of a file that soundfile finds damaged.
        if found and not _audio_warnings(found[0][0]):
            break
    if not found:
        raise error
    # Use the reader that decoded more, soundfile if about equal. Keep the warnings of both.
    best, samples = max(found, key=lambda one: one[0]["seconds"] + TOLERANCE * (one is found[0]))
    best["claimed"] = max(one["claimed"] for one, _ in found)
    best["faults"] = best["faults"] or found[0][0]["faults"]
    return AudioClip(samples, int(sampling_rate), _audio_warnings(best))


def _audio_warnings(answer: dict[str, Any]) -> list[str]:
    """Warnings about missing sound, and which track is read if the file has several."""
    return answer["notes"] + shortfall("audio", answer["seconds"], answer["claimed"], answer["faults"])


def load_video(path: str | os.PathLike, num_frames: int, time_limit: float = 60.0) -> VideoClip:
    """Decodes the frames in the middle of `num_frames` equally long runs of frames, in full size, with their times.

    A long video is decoded from its start up to the last selected frame.

    Args:
        path: The file.
        num_frames: Number of frames; a video with fewer frames gives each of them once.
        time_limit: Limit of the whole call in seconds.

    Raises:
        MediaError: If no picture can be decoded; the kind is `"no video"` if the file has no video stream. A cover
            picture does not count.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` got {num_frames!r}, wanted at least 1.")
    file, deadline = _regular_file(path), time.monotonic() + time_limit
    try:
        found, frames = _decode("video_by_pyav", path, file, int(num_frames), deadline)
    except MediaError as error:
        if error.kind not in ("damaged", "crash"):
            raise
        try:
            found, frames = _decode("video_by_decord", path, file, int(num_frames), deadline, fresh=True)
        except MediaError:
            raise error from None
    return VideoClip(frames, np.array(found["times"]), found["duration"], found["warnings"])


def media_length(path: str | os.PathLike, time_limit: float = 60.0) -> float | None:
    """The length in seconds that a file states, which is an estimate for some formats; None if it states none.

    It is 0 for a still picture.

    Raises:
        MediaError: If the file cannot be opened.
    """
    answer, _ = _decode("length_by_pyav", path, _regular_file(path), 0, time.monotonic() + time_limit)
    return answer["seconds"]


@dataclass(frozen=True, eq=False)
class Span:
    """A part of a recording, from `start` to `end` seconds, with its `audio` and `video` (None if it has none).

    The times of the pictures count from the start of the span.
    """

    start: float
    end: float
    audio: AudioClip | None
    video: VideoClip | None


class Recording:
    """Iterates over the spans of a file, which is decoded once while it is read, in bounded memory.

    Memory holds one span at a time, and of overlapping spans their frames. Sound is resampled as a whole, so samples
    at the borders of a span can differ slightly from those of the same span in a file of its own.

    Args:
        path: The file.
        sampling_rate: Sampling rate of the sound in Hz; None leaves the sound out.
        num_frames: Number of frames of each span, as in [`load_video`]; None leaves the pictures out.
        spans: The (start, end) of the spans in seconds, in the order of their starts.
        window: Without `spans`: length of the longest span in seconds. It is cut where the sound is quietest, after at
            least half of this length.
        hop: Without `spans`: distance of the starts of windows of the same length; nothing looks for pauses.
        step_limit: Limit for decoding 10 seconds of the file, in seconds.
        progress: Called with the seconds that have been decoded.

    Attributes:
        duration: Length in seconds, known at the end; None with `spans`.
        warnings: Warnings about missing parts of the file, known at the end.

    Raises:
        MediaError: While iterating, if nothing (more) can be decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sampling_rate: int | None,
        num_frames: int | None,
        spans: list[tuple[float, float]] | None = None,
        window: float | None = None,
        hop: float | None = None,
        step_limit: float = 60.0,
        progress: Callable[[float], None] | None = None,
    ):
        self.path, self.rate, self.step_limit, self.progress = path, sampling_rate, step_limit, progress
        self.wanted = {"rate": sampling_rate, "frames": num_frames, "spans": spans, "window": window, "hop": hop}
        self.duration: float | None = None
        self.warnings: list[str] = []

    def __iter__(self) -> Iterator[Span]:
        request = {"reader": "recording", "file": _regular_file(self.path), "wanted": self.wanted}
        request["alarm"] = math.ceil(self.step_limit) + 1
        worker, served = _take_worker()
        is_done = False
        try:
            response = worker.ask(request, time.monotonic() + self.step_limit)
            if response is None and served and not worker.was_late:
                worker, _ = _take_worker(fresh=True)  # to make sure that this file is the cause
                response = worker.ask(request, time.monotonic() + self.step_limit)
            while True:
                if response is None:
                    if worker.was_late:
                        raise MediaError(self.path, "time limit", "decoding exceeded the time limit and was stopped")
                    raise MediaError(self.path, "crash", "it crashes the decoder")
                answer, arrays = response
                is_done = not answer.keys() & {"at", "start"}
                _check_answer(self.path, answer)
                if is_done:
                    self.duration, self.warnings = answer["duration"], answer["warnings"]
                    return
                if self.progress:
                    self.progress(answer.get("at", answer.get("end")))
                if "start" in answer:
                    yield self._span(answer, *arrays)
                response = worker.ask(None, time.monotonic() + self.step_limit)
        finally:
            _release(worker, is_reusable=is_done)

    def _span(self, answer: dict[str, Any], samples: np.ndarray, frames: np.ndarray) -> Span:
        start, end = answer["start"], answer["end"]
        audio = AudioClip(samples, self.rate, []) if self.rate and len(samples) else None
        video = VideoClip(frames, np.array(answer["times"]), end - start, []) if len(frames) else None
        return Span(start, end, audio, video)


# The caller's side: checks of the file, and the workers.


def _regular_file(path: Any) -> str:
    """Returns the absolute path of a readable, non-empty regular file. Never opens a file that could block."""
    name = os.path.abspath(os.fsdecode(path))
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
            raise MediaError(path, "not readable", f"it is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}")
        if status.st_size == 0:
            raise MediaError(path, "not readable", "the file is empty")
        with open(name, "rb"):
            pass
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise MediaError(path, "not readable", reason) from None
    return name


class _Worker:
    """A decoding process and its pipes. The constructor returns once the process is ready.

    Attributes:
        was_late: Whether it died at a deadline.
    """

    was_late = False

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # -P removes this file's folder from the worker's path but keeps PYTHONPATH and the virtual environment.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, os.path.dirname(WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        try:  # a larger pipe is faster, on platforms that support it
            import fcntl

            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
        except (ImportError, AttributeError, OSError):
            pass
        _workers.add(self)
        try:
            with self._killed_at(time.monotonic() + STARTING):
                self._receive(bytearray(1))
        except EOFError:
            self.close()
            raise RuntimeError(f"{sys.executable} cannot run {WORKER_FILE}, which decodes audio and video.") from None
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _killed_at(self, deadline: float) -> Iterator[None]:
        timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def ask(self, request: dict[str, Any] | None, deadline: float) -> tuple[dict[str, Any], list[np.ndarray]] | None:
        """Returns the worker's next answer, or None if the worker died or reached the deadline; it is then closed.

        Args:
            request: A request, or None for a further answer to the last one.
            deadline: On the clock of `time.monotonic`.
        """
        try:
            with self._killed_at(deadline):
                if request is not None:
                    self.process.stdin.write(json.dumps(request).encode() + b"\n")
                (size,) = struct.unpack("<I", self._receive(bytearray(4)))
                answer = json.loads(bytes(self._receive(bytearray(size))))
                made = answer.pop("arrays")
                return answer, [self._receive(np.empty(shape, dtype)) for shape, dtype in made]
        except (OSError, EOFError):
            self.was_late = time.monotonic() >= deadline
            self.close()
            return None
        except BaseException:  # such as KeyboardInterrupt: the unread answer would stay in the pipe
            self.close()
            raise

    def _receive(self, target: Any) -> Any:
        view = memoryview(target).cast("B") if len(target) else b""
        while view:
            count = self.process.stdout.readinto(view)
            if not count:
                raise EOFError
            view = view[count:]
        return target

    def close(self) -> None:
        """Kills the process and closes the pipes."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes the caller's ends of the pipes without killing the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        _workers.discard(self)


_workers: set[_Worker] = set()
_idle: list[_Worker] = []


def _forget_workers() -> None:
    """Drops the parent's workers in a forked child. A worker ends only if no other process keeps its pipes open."""
    for worker in list(_workers):
        worker.process.returncode = 0  # the child must not wait for the parent's process
        worker.forget()
    _idle.clear()


def _close_workers() -> None:
    for worker in list(_workers):
        worker.close()


atexit.register(_close_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _take_worker(fresh: bool = False) -> tuple[_Worker, bool]:
    """A worker, and whether it has served before."""
    try:
        return (_Worker(), False) if fresh else (_idle.pop(), True)
    except IndexError:
        return _Worker(), False


def _release(worker: _Worker, is_reusable: bool) -> None:
    """Keeps a worker for later calls, or ends it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if is_reusable and len(_idle) < cores:
        _idle.append(worker)
    else:
        worker.close()


def _decode(
    reader: str, path: Any, file: str, wanted: int, deadline: float, fresh: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """Decodes a file with one of `READERS` in a worker.

    If a reused worker dies, the request is repeated in a new worker, to make sure that this file is the cause. With
    `fresh`, the worker serves only this call.
    """
    request = {"reader": reader, "file": file, "wanted": wanted}
    while True:
        start = time.monotonic()
        worker, served = _take_worker(fresh)
        deadline += time.monotonic() - start
        # The alarm ends the worker if its caller has been killed.
        response = worker.ask({**request, "alarm": math.ceil(max(deadline - time.monotonic(), 0.0)) + 1}, deadline)
        if response:
            break
        if time.monotonic() >= deadline:
            raise MediaError(path, "time limit", "decoding exceeded the time limit and was stopped")
        if not served:
            raise MediaError(path, "crash", "it crashes the decoder")
    _release(worker, is_reusable=not fresh)
    answer, arrays = response
    _check_answer(path, answer)
    return answer, arrays[0]


def _check_answer(path: Any, answer: dict[str, Any]) -> None:
    """Raises the error that a worker answers."""
    if "missing" in answer:
        raise ImportError(f"Reading audio and video needs av, soundfile and soxr: {answer['missing']}.")
    if "error" in answer:
        raise MediaError(path, *answer["error"])
