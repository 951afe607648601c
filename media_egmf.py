"""Audio and video files to arrays, decoded in a disposable process: no file crashes, hangs or fills the caller.

`load_audio` gives mono sound, from an audio file or from a video's sound track, `load_video` a few frames with the
times at which they are shown. Both give what can be recovered, with `warnings` that say what is missing, or raise a
`MediaError` whose `kind` says why. Time 0 is the start of the file's earliest stream, for sound and pictures alike.

What reads what was decided by measurement (PyAV 18.1.0, decord2 3.4.0, soundfile 0.14.0):

- Pictures: PyAV, then decord if PyAV's worker dies or gets no picture out of a video stream. decord's frames are the
  same bytes as PyAV's in 8-bit h264, hevc, vp9 and mpeg4, at the same cost within 20 %. But in MPEG program streams
  (all GRID clips) decord gives wrong pictures and times near -1e14 without a word, 10-bit video comes out wrong, it
  refuses transport streams, counts times from the first frame instead of the file's start, refuses many damaged files
  that PyAV recovers (and not the other way round), and one corrupt `stts` count aborts its process.
- Sound: soundfile for what it knows, and PyAV for containers and for what soundfile finds damaged (it gives up a cut
  FLAC as a whole). decord's AudioReader returned 1.5 of 10 s without a word, and is not used.

A cut is noticed where the file states its length: mp4, mkv, webm, avi, wav, aiff, flac, most mp3 (Xing header), Ogg
(its last page is marked). MPEG program and transport streams, fragmented mp4 and mp3 without that header state none.
Damage that decodes to plausible sound or pictures cannot be seen. Frames are the bytes of PyAV's
`to_ndarray(format="rgb24")`, turned upright where the file says that the camera (a phone) was held on its side.

The worker is this very file, run as a script by the same Python and spoken to through pipes, so it needs neither
`multiprocessing` nor a guarded `__main__`. It is kept for the next call, by threads one each; a process that was
forked starts its own. It sees contents only, never names, and opens nothing but the file: no suffix decides, and no
playlist makes it read other files or the network. On Linux it may hold 4 GiB.
"""

import atexit
import json
import math
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np


SILENCE = 1e-4  # a track that stays below is silent: codecs turn silence into a little noise
FULL_SCALE = 8.0  # samples beyond are damage; lossy codecs exceed 1.0 a little, and limiters of players expect that
TOLERANCE = 0.1  # seconds that may be missing without a warning: codec delays, the last packet's padding
STARTING = 300.0  # seconds that a worker may take to start, on a very busy machine; no call's time limit counts them
LARGEST_RESULT = 1 << 30  # bytes of samples or frames that one call gives
LARGEST_WORKER = 4 << 30  # bytes that a worker may have mapped
UNKNOWN_SIZE = 0x7FFFF000  # a wav that was written to a pipe states this many bytes or more
LARGEST_JUNK = 1 << 16  # bytes in front of a FLAC header
GUESSED_LENGTHS = {"aac", "ac3", "amr", "dts", "eac3", "h264", "hevc", "loas", "m4v", "mp3", "mpegvideo"}
THIS_FILE = os.path.abspath(__file__)


class MediaError(RuntimeError):
    """A file that gives nothing.

    `kind` is `"not readable"` (no such file, not a regular one, no permission, empty), `"not media"`, `"no audio"`,
    `"no video"`, `"damaged"`, `"too large"`, `"time limit"` or `"crash"`. `reason` is for people; `salvaged` says what
    could be had nevertheless, such as `"0 of 75 frames"`, or nothing.
    """

    def __init__(self, path: Any, kind: str, reason: str, salvaged: str = ""):
        super().__init__(path, kind, reason, salvaged)
        self.path, self.kind, self.reason, self.salvaged = path, kind, reason, salvaged

    def __str__(self) -> str:
        return f"Cannot read {str(self.path)!r}: {self.reason}{f' ({self.salvaged})' if self.salvaged else ''}."


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Mono sound: `samples` `(N,)` float32 at `sampling_rate`, and what is missing, in words."""

    samples: np.ndarray
    sampling_rate: int
    warnings: list[str]

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / self.sampling_rate


@dataclass(frozen=True, eq=False)
class VideoClip:
    """`frames` `(F, H, W, 3)` uint8 RGB, `times` `(F,)` in seconds, the video's end, and what is missing, in words."""

    frames: np.ndarray
    times: np.ndarray
    duration: float
    warnings: list[str]


def load_audio(path: str | os.PathLike, sampling_rate: int, time_limit: float = 60.0) -> AudioClip:
    """The sound of an audio file or of a video's sound track, mono (the channels' mean), resampled by soxr.

    A sound track that starts later than the pictures, and sound that was lost in between, is silence, so that time
    stays right. `time_limit` is for the whole call, in seconds. No sound track is a MediaError of kind `"no audio"`.
    """
    if sampling_rate < 1:
        raise ValueError(f"`sampling_rate` must be positive, got {sampling_rate!r}.")
    file, deadline = _regular_file(path), time.monotonic() + time_limit
    found, error = [], None
    for reader in ("audio_by_soundfile", "audio_by_pyav"):
        try:
            found.append(_decode(reader, path, file, int(sampling_rate), deadline))
        except MediaError as raised:
            error = raised
            if raised.kind in ("time limit", "too large"):
                break
        # What soundfile finds damaged, PyAV may recover better.
        if found and not _audio_warnings(found[0][0]):
            break
    if not found:
        raise error
    # The reader that got more; soundfile if it is about the same. Neither's complaint is forgotten.
    best, samples = max(found, key=lambda one: one[0]["seconds"] + TOLERANCE * (one is found[0]))
    best["claimed"] = max(one["claimed"] for one, _ in found)
    best["faults"] = best["faults"] or found[0][0]["faults"]
    return AudioClip(samples, int(sampling_rate), _audio_warnings(best))


def _audio_warnings(answer: dict[str, Any]) -> list[str]:
    """What is missing from the sound that a reader found, and which of a file's tracks it is."""
    return answer["notes"] + _shortfall("audio", answer["seconds"], answer["claimed"], answer["faults"])


def load_video(path: str | os.PathLike, num_frames: int, time_limit: float = 60.0) -> VideoClip:
    """The frames at the centres of `num_frames` equal parts of the clip, in full size, with the times they have in it.

    A clip with fewer frames gives all of them once. `time_limit` is for the whole call, in seconds: a long video is
    decoded from its start up to the last frame wanted. No pictures (a cover is none) is a MediaError of kind
    `"no video"`.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be positive, got {num_frames!r}.")
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


# The caller's side: files that no decoder should see, and the workers.


def _regular_file(path: Any) -> str:
    """The absolute path of a regular file with something in it that may be read. Opens nothing that could block."""
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
    """A process that decodes, and the pipes to it. Ready when made."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # -P keeps this file's folder off the worker's path; PYTHONPATH and the virtual environment stay.
        self.process = subprocess.Popen(
            [sys.executable, "-P", THIS_FILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        try:  # a larger pipe is faster, where there is such a thing
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
            raise RuntimeError(f"{sys.executable} cannot run {THIS_FILE}, which decodes audio and video.") from None
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

    def ask(self, request: dict[str, Any], deadline: float) -> tuple[dict[str, Any], np.ndarray | None] | None:
        """The worker's answer, or None if it died of the request or of the deadline; then it is gone."""
        try:
            with self._killed_at(deadline):
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                (size,) = struct.unpack("<I", self._receive(bytearray(4)))
                answer = json.loads(bytes(self._receive(bytearray(size))))
                if "shape" not in answer:
                    return answer, None
                array = np.empty(answer.pop("shape"), dtype=answer.pop("dtype"))
                self._receive(array)
                return answer, array
        except (OSError, EOFError):
            self.close()
            return None
        except BaseException:  # such as KeyboardInterrupt: an answer is under way that nobody will read
            self.close()
            raise

    def _receive(self, target: Any) -> Any:
        view = memoryview(target).cast("B")
        while view:
            count = self.process.stdout.readinto(view)
            if not count:
                raise EOFError
            view = view[count:]
        return target

    def close(self) -> None:
        """Kills the process and forgets it."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes this process's ends of the pipes."""
        self.process.stdin.close()
        self.process.stdout.close()
        _workers.discard(self)


_workers: set[_Worker] = set()
_idle: list[_Worker] = []


def _forget_workers() -> None:
    """In a forked child: the workers are the parent's, and end with it, so their pipes must not stay open here."""
    for worker in list(_workers):
        worker.process.returncode = 0  # so that nobody here waits for it
        worker.forget()
    _idle.clear()


def _close_workers() -> None:
    for worker in list(_workers):
        worker.close()


atexit.register(_close_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _decode(
    reader: str, path: Any, file: str, wanted: int, deadline: float, fresh: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """What `reader` finds in the file. A worker that served before and dies now gets one successor, to be sure that
    it was the file; with `fresh`, the worker serves this once."""
    request = {"reader": reader, "file": file, "wanted": wanted}
    while True:
        begun = time.monotonic()
        try:
            worker, served = (_Worker(), False) if fresh else (_idle.pop(), True)
        except IndexError:
            worker, served = _Worker(), False
        deadline += time.monotonic() - begun
        # A worker whose caller was killed has nobody to end it: its own alarm does.
        answered = worker.ask({**request, "alarm": math.ceil(max(deadline - time.monotonic(), 0.0)) + 1}, deadline)
        if answered:
            break
        if time.monotonic() >= deadline:
            raise MediaError(path, "time limit", "decoding took longer than the time limit, and was stopped")
        if not served:
            raise MediaError(path, "crash", "it crashes the decoder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if fresh or len(_idle) >= cores:
        worker.close()
    else:
        _idle.append(worker)
    answer, array = answered
    if "missing" in answer:
        raise ImportError(f"Reading audio and video needs av, soundfile and soxr: {answer['missing']}.")
    if "error" in answer:
        raise MediaError(path, *answer["error"])
    return answer, array


# The worker's side. Readers raise MediaErrors without a path; the caller knows it.


def import_readers() -> ImportError | None:
    """Imports what decodes, and returns what is missing. Callers never do.

    In a `try`, because transformers scans this file and makes every user of a checkpoint install what is imported
    anywhere else, in functions too.
    """
    global av, soundfile, soxr
    try:
        import av
        import soundfile
        import soxr
    except ImportError as error:
        return error
    return None


def _serve() -> None:
    """Answers requests from standard input until it ends, with nothing else on standard output."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_WORKER, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):  # not here, or less is allowed anyway
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then kills this process
    with open(os.dup(1), "wb") as answers, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        missing = import_readers()
        answers.write(b"!")
        answers.flush()
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if hasattr(signal, "alarm"):
                signal.alarm(request["alarm"])
            array = None
            try:
                if missing:
                    raise missing
                answer, array = READERS[request["reader"]](request["file"], request["wanted"])
                answer |= {"shape": array.shape, "dtype": array.dtype.str}
            except MediaError as error:
                answer = {"error": error.args[1:]}
            except ImportError as error:
                answer = {"missing": str(error)}
            except MemoryError:
                answer = {"error": ("too large", "decoding it takes more memory than a decoder may have")}
            except Exception as error:
                answer = {"error": ("damaged", f"no reader makes sense of it ({type(error).__name__}: {error})")}
            header = json.dumps(answer).encode()
            answers.write(struct.pack("<I", len(header)) + header)
            if array is not None:
                answers.write(np.ascontiguousarray(array).data)
            answers.flush()
            if hasattr(signal, "alarm"):
                signal.alarm(0)


class _Contents:
    """A file from `start` on, without its name: FFmpeg judges by suffix what it cannot judge by content."""

    def __init__(self, file, start: int):
        self.file, self.start, self.read = file, start, file.read
        self.seek(0)

    def seek(self, position: int, whence: int = 0) -> int:
        return self.file.seek(position + (self.start if whence == 0 else 0), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start


@contextmanager
def _container(file: str) -> Iterator[Any]:
    """The file as PyAV's container, which may open nothing else. Bytes in front of a FLAC header are skipped."""
    with open(file, "rb") as handle:
        for start in (0, handle.read(LARGEST_JUNK).find(b"fLaC")):
            try:
                contents = _Contents(handle, max(start, 0))
                container = av.open(contents, options={"protocol_whitelist": "none"}, metadata_errors="replace")
                break
            except av.FFmpegError:
                pass
        else:
            raise MediaError("", "not media", "it is no audio or video file, or its index is lost")
        with container:
            yield container


class _Track:
    """A container's stream of a kind, demuxed: all packets, none decoded.

    Of several streams it is the one that a player would take: pictures that move rather than a still cover, then the
    one that is marked as the default, then the longest. `order` names another: 1 for the next best.

    `start` is what the container calls second 0, `claimed` the second at which the stream ends as the file states it,
    or 0.0, `faults` what went wrong so far, and `notes` which stream it is, where there are several.
    """

    def __init__(self, container: Any, kind: str, order: int = 0):
        cover, default = av.stream.Disposition.attached_pic, av.stream.Disposition.default
        streams = [s for s in getattr(container.streams, kind) if not s.disposition & cover]
        if not streams:
            raise MediaError("", f"no {kind}", f"it has no {'sound' if kind == 'audio' else 'video'}")
        self.stream, self.start, self.count = streams[0], (container.start_time or 0) / 1e6, len(streams)
        packets: dict[int, list] = {stream.index: [] for stream in streams}
        self.faults, seen = [], 0.0
        for _ in range(100):  # damage ends the demuxer's loop: it is stepped over
            try:
                for packet in container.demux():
                    if packet.pts is not None:
                        seen = max(seen, self.seconds(packet.pts + (packet.duration or 0), packet))
                    if packet.stream_index in packets:
                        packets[packet.stream_index].append(packet)
                break
            except av.FFmpegError as error:
                self.faults.append(error.strerror)

        ranks, lengths = {}, {}
        for stream in streams:
            own = [packet for packet in packets[stream.index] if packet.size]
            stamps = [packet.pts for packet in own if packet.pts is not None]
            ranks[stream.index] = kind == "video" and len(own) > 1, bool(stream.disposition & default)
            lengths[stream.index] = float((max(stamps) - min(stamps)) * stream.time_base) if stamps else 0.0
        rest = list(ranks)
        for _ in range(order + 1):
            best = max(ranks[index] for index in rest)
            longest = max(lengths[index] for index in rest if ranks[index] == best)
            # Of about the same length, the first: tracks of one film differ by a few packets.
            chosen = next(index for index in rest if ranks[index] == best and lengths[index] >= 0.9 * longest)
            rest.remove(chosen)
        self.stream = next(stream for stream in streams if stream.index == chosen)
        self.packets = packets[self.stream.index]
        place = streams.index(self.stream) + 1
        self.notes = [f"{kind}: track {place} of {self.count} is read"] if self.count > 1 else []
        self.claimed = self._claimed(container, seen)

    def _claimed(self, container: Any, seen: float) -> float:
        if container.format.name in GUESSED_LENGTHS:
            return 0.0
        stream, own, whole = self.stream, 0.0, (container.duration or 0) / 1e6 - self.start
        parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's
        if container.format.name == "avi":  # FFmpeg guesses the length of one that is cut
            whole = max(
                (float(v.frames / v.average_rate) for v in container.streams.video if v.average_rate), default=0
            )
        elif stream.duration:
            own = self.seconds((stream.start_time or 0) + stream.duration)
        elif parts:
            own = 3600 * int(parts[1]) + 60 * int(parts[2]) + float(parts[3]) - self.start
        # In a file that is whole, one stream may end before the others: then `seen` reaches what the file states.
        return max(own, whole if whole > seen + TOLERANCE else 0.0)

    def seconds(self, stamp: int | None, clock: Any = None) -> float | None:
        """A time stamp of this stream, or of another `clock`, in seconds since the container's start."""
        return None if stamp is None else float(stamp * (clock or self.stream).time_base) - self.start

    def frames(self) -> Iterator[Any]:
        """What decodes of the packets; the rest is noted in `faults`."""
        for packet in self.packets:
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.faults.append(error.strerror)
                continue
            self.faults += ["a corrupt frame" for frame in frames if frame.is_corrupt]
            yield from frames


def _shortfall(what: str, seconds: float, claimed: float, faults: list[str]) -> list[str]:
    """Warnings: how much of what is claimed is there, and the number of faults."""
    short = [f"{what}: {seconds:.1f} of {claimed:.1f} seconds decoded"] if claimed > seconds + TOLERANCE else []
    return short + ([f"{what}: {len(faults)} damaged places, the first: {faults[0]}"] if faults else [])


def _spread(frames: int, count: int) -> list[int]:
    """The frames at the centres of `count` equal parts; all of them if there are no more."""
    count = min(frames, count)
    return [(2 * i + 1) * frames // (2 * count) for i in range(count)]


def _read_video(file: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Frames by PyAV. The packets of a whole file give all times, and it is decoded once, as far as frames are wanted.
    A damaged or unusual file is decoded from end to end to learn which frames it has, and again to fetch them."""
    with _container(file) as container:
        track = _Track(container, "video")
        rate = float(track.stream.average_rate or 25)
        filled = [packet for packet in track.packets if packet.size]
        shown = [packet for packet in filled if not packet.is_discard]  # an edit list hides the others
        stated = track.stream.frames - len(filled) + len(shown) if track.stream.frames else 0
        stamps = sorted({packet.pts for packet in shown if packet.pts is not None})
        first = track.seconds(stamps[0]) if stamps else 0.0
        if stamps and len(stamps) == len(shown) and not track.faults and not any(p.is_corrupt for p in filled):
            wanted = {stamps[i] for i in _spread(len(stamps), count)}
            pictures = _rgb(islice((f for f in track.frames() if f.pts in wanted), len(wanted)), len(wanted))
            whole = len(pictures) == len(wanted) and not track.faults
        else:
            whole = False
        times = [track.seconds(stamp) for stamp in stamps]
        last = max(shown, key=lambda packet: packet.pts).duration if whole else None
        clock = track.stream.time_base
        length = float(last * clock) if last else 1 / rate
    warnings = []
    if not whole:
        with _container(file) as container:
            track = _Track(container, "video")
            times = [track.seconds(frame.pts) for frame in track.frames()]
        if not times:
            raise MediaError("", "damaged", "no picture can be decoded", f"0 of {stated} frames" if stated > 0 else "")
        chosen = set(_spread(len(times), count))
        with _container(file) as container:
            frames = enumerate(_Track(container, "video").frames())
            pictures = _rgb((frame for i, frame in frames if i in chosen), len(chosen))
        if None in times or any(a >= b for a, b in pairwise(times)):
            warnings = ["video: time stamps are missing or damaged, times are by the average rate"]
            times = [i / rate for i in range(len(times))]
    if len(times) < stated - 1:
        warnings.append(f"video: {len(times)} of {stated} frames decoded")
    # Where frames are not counted, a hole shows in the packets' times (as a picture that stands still may).
    ends = sorted((packet.pts, packet.duration or 0) for packet in shown if packet.pts is not None)
    holes = [float((b[0] - sum(a)) * clock) for a, b in pairwise(ends) if a[1]]
    lost = sum(hole for hole in holes if hole > TOLERANCE)
    if lost and not stated:
        warnings.append(f"video: no pictures for {lost:.1f} seconds in between")
    end = times[-1] + length
    warnings = track.notes + warnings
    warnings += _shortfall("video", end - max(times[0] - first, 0.0), track.claimed, track.faults)
    return {"times": [times[i] for i in _spread(len(times), count)], "duration": end, "warnings": warnings}, pictures


def _rgb(frames: Iterable[Any], count: int) -> np.ndarray:
    """`(F, H, W, 3)` of at most `count` frames, upright, all in the size of the first."""
    pictures, size = [], {}
    for frame in frames:
        if not size:
            size = {"width": frame.width, "height": frame.height}
            if 3 * count * frame.width * frame.height > LARGEST_RESULT:
                what = f"{count} frames of {frame.width} x {frame.height} pixels"
                raise MediaError("", "too large", f"{what} exceed {LARGEST_RESULT >> 30} GiB")
        turns = round(frame.rotation / 90)
        picture = frame.to_ndarray(format="rgb24", **size)
        pictures.append(np.rot90(picture, turns) if turns else picture)
    return np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), dtype=np.uint8)


def _read_video_by_decord(file: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Frames by decord, for files of which PyAV gets nothing. Any frame that decord makes up is a reason to refuse."""
    try:
        import decord
    except ImportError as error:
        raise MediaError("", "damaged", str(error)) from None
    reader = decord.VideoReader(file, num_threads=1, fault_tol=1e-9)
    spans = reader.get_frame_timestamp(list(range(len(reader))))  # (n, 2): from, to
    if not ((np.diff(spans[:, 0]) > 0).all() and -1 < spans[0, 0] and spans[-1, 1] < 1e6):
        raise MediaError("", "damaged", "its time stamps make no sense")
    chosen = _spread(len(reader), count)
    frames = reader.get_batch(chosen).asnumpy()
    warnings = ["video: PyAV cannot read it; frames and times are decord's, and what is missing is not known"]
    return {"times": spans[chosen, 0].tolist(), "duration": float(spans[-1, 1]), "warnings": warnings}, frames


def mono(samples: np.ndarray) -> np.ndarray:
    """`(N,)` float32 in -1..1 of `(N, channels)` in floats or integers of the widths that files have."""
    if samples.dtype.kind in "iu":
        limits = np.iinfo(samples.dtype)
        middle = (int(limits.max) + int(limits.min) + 1) // 2
        samples = (samples.astype(np.float32) - middle) / (int(limits.max) - middle + 1)
    return samples.mean(axis=1, dtype=np.float32)


def _audio(
    pieces: list[np.ndarray],
    silent: int,
    native_rate: int,
    rate: int,
    claimed: float,
    faults: list[str],
    notes: list[str],
) -> tuple[dict[str, Any], np.ndarray]:
    """What the audio readers answer: the pieces as one, resampled, and how much of it was decoded (not `silent`)."""
    count = sum(map(len, pieces))
    if count == silent:
        raise MediaError("", "damaged", "no sound can be decoded", f"0 of {claimed:.1f} seconds" if claimed else "")
    if 4 * count * max(rate / native_rate, 1.0) > LARGEST_RESULT:
        raise MediaError("", "too large", f"{count / native_rate:.0f} s of sound exceed {LARGEST_RESULT >> 30} GiB")
    samples = np.concatenate(pieces)
    if not np.isfinite(samples).all():
        samples = np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        faults.append("samples that are no numbers")
    if (beyond := np.abs(samples) > FULL_SCALE).any():
        if 2 * beyond.sum() > np.count_nonzero(samples):
            raise MediaError("", "damaged", "most of its samples are far beyond full scale")
        samples[beyond] = np.sign(samples[beyond])
        faults.append("samples far beyond full scale")
    if native_rate != rate:
        samples = np.clip(soxr.resample(samples, native_rate, rate), -FULL_SCALE, FULL_SCALE)
    if not len(samples):
        raise MediaError("", "damaged", "its sound is too short for one sample")
    answer = {"seconds": (count - silent) / native_rate, "claimed": claimed, "faults": faults, "notes": notes}
    return answer, samples


def _read_audio_by_soundfile(file: str, rate: int) -> tuple[dict[str, Any], np.ndarray]:
    """Sound by soundfile, held against the length that the file's header states."""
    handle = os.open(file, os.O_RDONLY)  # not by name: libsndfile would take a suffix for a format
    try:
        sound = soundfile.SoundFile(handle)
    except soundfile.LibsndfileError:
        raise MediaError("", "not media", "it is no audio file") from None
    pieces, faults = [], []
    with sound:
        claimed = _stated_frames(file, sound) / sound.samplerate
        try:
            while len(block := sound.read(1 << 16, dtype="float32", always_2d=True)):
                pieces.append(mono(block))
        except soundfile.LibsndfileError as error:
            faults.append(error.error_string.strip(" .") or "unreadable sound")
        if sound.format == "OGG" and not _ogg_end(file)[1]:
            faults.append("the mark of the end is missing")
        native_rate = sound.samplerate
    return _audio(pieces, 0, native_rate, rate, claimed, faults, [])


def _stated_frames(file: str, sound: Any) -> float:
    """Frames by the header. libsndfile shortens a cut file's length without a word, except in its log."""
    if sound.format == "OGG":
        return _ogg_end(file)[0] * sound.samplerate / (48000 if sound.subtype == "OPUS" else sound.samplerate)
    stated = re.search(r"^ *(?:data|SSND) : (\d+)(?: \(should be (\d+)\))?", sound.extra_info, re.MULTILINE)
    if not stated or int(stated[1]) >= UNKNOWN_SIZE:
        return sound.frames
    there = int(stated[2] or os.path.getsize(file))
    return sound.frames * max(int(stated[1]) / there, 1.0) if there else sound.frames


def _ogg_end(file: str) -> tuple[int, bool]:
    """The last page's position in samples, and whether it is marked as the last."""
    with open(file, "rb") as handle:
        handle.seek(max(os.path.getsize(file) - (1 << 17), 0))
        tail = handle.read()
    page = tail.rfind(b"OggS\0", 0, len(tail) - 22)
    if page < 0:
        return 0, False
    flags, position = struct.unpack_from("<Bq", tail, page + 5)
    return max(position, 0), bool(flags & 4)


def _read_audio_by_pyav(file: str, rate: int) -> tuple[dict[str, Any], np.ndarray]:
    """Sound by PyAV; of several tracks, where the first choice is silent or cannot be decoded, the next."""
    found, error, order, count = None, None, 0, 1
    while order < count:
        with _container(file) as container:
            track = _Track(container, "audio", order)
            order, count = order + 1, track.count
            try:
                answer, samples = _sound(track, rate)
            except MediaError as raised:
                error = error or raised
                continue
        if np.abs(samples).max() > SILENCE:
            return answer, samples
        found = found or (answer, samples)
    if found is None:
        raise error
    return found


def _sound(track: _Track, rate: int) -> tuple[dict[str, Any], np.ndarray]:
    """A track's sound, laid out by its time stamps: what is missing at the start or in between is silence."""
    pieces, position, silent, native_rate = [], 0, 0, 0
    for frame in track.frames():
        native_rate = native_rate or frame.sample_rate
        if frame.sample_rate != native_rate:
            track.faults.append("another sampling rate")
            continue
        at = track.seconds(frame.pts)
        gap = 0 if at is None else round(at * native_rate) - position
        # A little is rounding, unless it is the start; what leads past the stated end is damage.
        if gap > (TOLERANCE * native_rate if pieces else 0) and not 0 < track.claimed < at:
            if 4 * (position + gap) > LARGEST_RESULT:
                raise MediaError("", "too large", "its time stamps span more than memory holds")
            # A track that begins late lacks nothing.
            late = 0 if pieces else round((track.seconds(track.stream.start_time) or 0.0) * native_rate)
            silent += max(gap - late, 0)
            pieces.append(np.zeros(gap, dtype=np.float32))
            position += gap
        channels = frame.to_ndarray()  # (channels, n), or (1, n * channels) if they alternate
        samples = channels.T if frame.format.is_planar else channels.reshape(-1, frame.layout.nb_channels)
        pieces.append(mono(samples))
        position += len(samples)
    return _audio(pieces, silent, native_rate, rate, track.claimed, track.faults, track.notes)


READERS = {
    "audio_by_soundfile": _read_audio_by_soundfile,
    "audio_by_pyav": _read_audio_by_pyav,
    "video_by_pyav": _read_video,
    "video_by_decord": _read_video_by_decord,
}


if __name__ == "__main__":
    _serve()
