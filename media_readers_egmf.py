"""The decoders behind `media_egmf.py`: PyAV, decord and soundfile. They run in the worker process.

`media_egmf.py` describes which decoder reads what, and why.
"""

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np


SILENCE = 1e-4  # a track whose samples stay below is silent: codecs turn silence into faint noise
FULL_SCALE = 8.0  # larger samples are damage; lossy codecs slightly exceed 1.0, which players can handle
TOLERANCE = 0.1  # seconds that may be missing without a warning: codec delays, the last packet's padding
LARGEST_RESULT = 1 << 30  # maximum bytes of samples or frames that one call returns
LONGEST_NAME = 500  # characters of a file's name or address in messages
SILENT_BLOCK = 1 << 20  # samples of silence in one piece
UNKNOWN_SIZE = 0x7FFFF000  # a wav file written to a pipe states this size or more
LARGEST_JUNK = 1 << 16  # bytes in front of a FLAC header
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # the type of a file's first box
MATROSKA = b"\x1aE\xdf\xa3"
GUESSED_LENGTHS = {"aac", "ac3", "amr", "dts", "eac3", "h264", "hevc", "loas", "m4v", "mp3", "mpegvideo"}


class MediaError(RuntimeError):
    """A file from which nothing can be decoded.

    Args:
        path: The file.
        kind: `"not readable"` (missing, not a regular file, no permission, empty), `"not media"`, `"no audio"`,
            `"no video"`, `"damaged"`, `"too large"`, `"time limit"` or `"crash"`.
        reason: The reason in words.
        salvaged: How much was decoded, such as `"0 of 75 frames"`, or `""`.
    """

    def __init__(self, path: Any, kind: str, reason: str, salvaged: str = ""):
        super().__init__(path, kind, reason, salvaged)
        self.path, self.kind, self.reason, self.salvaged = path, kind, reason, salvaged

    def __str__(self) -> str:
        name = str(self.path) if len(str(self.path)) <= LONGEST_NAME else f"{str(self.path)[:LONGEST_NAME]}..."
        return f"Cannot read {name!r}: {self.reason}{f' ({self.salvaged})' if self.salvaged else ''}."


# Readers raise MediaErrors without a path; the caller adds it.


def _ignore(seconds: float) -> None:
    pass


def import_readers() -> ImportError | None:
    """Imports the decoding packages; returns the error if one is missing. Only workers import them.

    The imports are inside a `try` because transformers scans this file. It requires every user of a checkpoint to
    install all packages that are imported outside of a `try`, even inside functions.
    """
    global av, soundfile, soxr
    try:
        import av
        import soundfile
        import soxr
    except ImportError as error:
        return error
    return None


class _Contents:
    """A file from byte `start` on, without its name: FFmpeg would fall back to the suffix to guess the format."""

    def __init__(self, file, start: int):
        self.file, self.start, self.read = file, start, file.read
        self.seek(0)

    def seek(self, position: int, whence: int = 0) -> int:
        return self.file.seek(position + (self.start if whence == 0 else 0), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start


@contextmanager
def open_container(file: str) -> Iterator[Any]:
    """Opens the file as a PyAV container that cannot open other files. Skips bytes in front of a FLAC header."""
    with open(file, "rb") as handle:
        for start in (0, handle.read(LARGEST_JUNK).find(b"fLaC")):
            try:
                contents = _Contents(handle, max(start, 0))
                container = av.open(contents, options={"protocol_whitelist": "none"}, metadata_errors="replace")
                break
            except av.FFmpegError:
                pass
        else:
            raise MediaError("", "not media", "it is not an audio or video file, or its index is missing")
        with container:
            yield container


class Stamp(NamedTuple):
    """A packet without its data."""

    pts: int | None
    duration: int | None
    size: int
    is_discard: bool
    is_corrupt: bool


class Track:
    """The demuxed packets of one audio or video stream, not yet decoded.

    If there are several streams, the track is the one that a player would choose: moving pictures before a still
    cover, then the stream marked as default, then the longest.

    Args:
        container: The PyAV container.
        kind: `"audio"` or `"video"`.
        order: Rank of the stream: 0 for the best, 1 for the next best.
        keep: Whether to keep the packets; otherwise `packets` are only their stamps, and [`streamed`] decodes.
        beat: Called now and then with the seconds demuxed so far.

    Attributes:
        start: Start of the container on the clock of its time stamps, in seconds.
        claimed: The end of the stream in seconds as the file states it, or 0.0 if it states none.
        faults: Descriptions of the errors so far.
        notes: Which stream is read, if there are several.
        last: The end of its last packet in seconds, or 0.0 if no packet has a time.
    """

    def __init__(self, container: Any, kind: str, order: int = 0, keep: bool = True, beat: Callable = _ignore):
        cover, default = av.stream.Disposition.attached_pic, av.stream.Disposition.default
        streams = [s for s in getattr(container.streams, kind) if not s.disposition & cover]
        if kind == "video" and streams:
            tiles = [s for s in streams if s.disposition & av.stream.Disposition.dependent]
            if len(tiles) == len(streams):
                reason = "it is a picture of several tiles, as phones write HEIC: convert it to JPEG"
                raise MediaError("", "not media", reason)
            streams = [s for s in streams if s not in tiles]
        if not streams:
            raise MediaError("", f"no {kind}", f"it has no {'sound' if kind == 'audio' else 'video'}")
        self.stream, self.start, self.count = streams[0], (container.start_time or 0) / 1e6, len(streams)
        packets: dict[int, list] = {stream.index: [] for stream in streams}
        self.faults, seen = [], 0.0
        for _ in range(100):  # damage ends the demuxer's loop; continue after it
            try:
                for packet in container.demux():
                    if packet.pts is not None:
                        seen = max(seen, self.seconds(packet.pts + (packet.duration or 0), packet))
                        beat(seen)
                    if packet.stream_index in packets:
                        kept = packet
                        if not keep:
                            stamps = packet.pts, packet.duration, packet.size
                            kept = Stamp(*stamps, packet.is_discard, packet.is_corrupt)
                        packets[packet.stream_index].append(kept)
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
            # Tracks of one film differ by a few packets: of about the same length, the first is taken.
            chosen = next(index for index in rest if ranks[index] == best and lengths[index] >= 0.9 * longest)
            rest.remove(chosen)
        self.stream, self.index = next(stream for stream in streams if stream.index == chosen), chosen
        self.packets = packets[self.stream.index]
        place = streams.index(self.stream) + 1
        self.notes = [f"{kind}: track {place} of {self.count} is read"] if self.count > 1 else []
        ends = [packet.pts + (packet.duration or 0) for packet in self.packets if packet.pts is not None]
        self.last = self.seconds(max(ends)) if ends else 0.0
        self.claimed = self._claimed(container, seen)

    def _claimed(self, container: Any, seen: float) -> float:
        if container.format.name in GUESSED_LENGTHS:
            return 0.0
        stream, stream_end, file_end = self.stream, 0.0, (container.duration or 0) / 1e6 - self.start
        parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's
        if container.format.name == "avi":  # FFmpeg only guesses the length of a truncated file
            file_end = max(
                (float(v.frames / v.average_rate) for v in container.streams.video if v.average_rate), default=0
            )
        elif stream.duration:
            stream_end = self.seconds((stream.start_time or 0) + stream.duration)
        elif parts:
            stream_end = 3600 * int(parts[1]) + 60 * int(parts[2]) + float(parts[3]) - self.start
        # A stream may end before the others. The file is complete if the last packet of any stream reaches its end.
        return max(stream_end, file_end if file_end > seen + TOLERANCE else 0.0)

    def seconds(self, stamp: int | None, clock: Any = None) -> float | None:
        """Converts a time stamp of this stream, or of another `clock`, to seconds since the container's start."""
        return None if stamp is None else float(stamp * (clock or self.stream).time_base) - self.start

    def frames(self, packets: Iterable[Any] | None = None) -> Iterator[Any]:
        """Decodes the packets. Adds an entry to `faults` for each packet or frame that is damaged."""
        for packet in self.packets if packets is None else packets:
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.faults.append(error.strerror)
                continue
            self.faults += ["a corrupt frame" for frame in frames if frame.is_corrupt]
            yield from frames

    def streamed(self, container: Any) -> Iterator[Any]:
        """Demuxes and decodes the track from a container that was opened anew, without keeping packets."""
        self.stream = container.streams[self.index]  # the other container may be closed

        def packets() -> Iterator[Any]:
            for _ in range(100):
                try:
                    yield from container.demux(self.stream)
                    return
                except av.FFmpegError:  # the scan has counted it
                    pass

        return self.frames(packets())


def shortfall(what: str, seconds: float, claimed: float, faults: list[str]) -> list[str]:
    """Warnings about missing seconds and about damaged places."""
    short = [f"{what}: {seconds:.1f} of {claimed:.1f} seconds decoded"] if claimed > seconds + TOLERANCE else []
    return short + ([f"{what}: {len(faults)} damaged places, the first: {faults[0]}"] if faults else [])


def evenly_spaced(frames: int, count: int) -> list[int]:
    """Indices of the frames at the centres of `count` equal parts; all frames if there are at most `count`."""
    count = min(frames, count)
    return [(2 * i + 1) * frames // (2 * count) for i in range(count)]


def _read_video(file: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Reads frames by PyAV.

    The packets of an intact file contain all times. It is decoded once, up to the last selected frame. A damaged or
    unusual file is decoded completely to find its frames, and again to read the selected ones.
    """
    with open_container(file) as container:
        track = Track(container, "video")
        rate = float(track.stream.average_rate or 25)
        filled = [packet for packet in track.packets if packet.size]
        shown = [packet for packet in filled if not packet.is_discard]  # an edit list hides the others
        stated = track.stream.frames - len(filled) + len(shown) if track.stream.frames else 0
        stamps = sorted({packet.pts for packet in shown if packet.pts is not None})
        first = track.seconds(stamps[0]) if stamps else 0.0
        if stamps and len(stamps) == len(shown) and not track.faults and not any(p.is_corrupt for p in filled):
            wanted = {stamps[i] for i in evenly_spaced(len(stamps), count)}
            pictures = _rgb(islice((f for f in track.frames() if f.pts in wanted), len(wanted)), len(wanted))
            intact = len(pictures) == len(wanted) and not track.faults
        else:
            intact = False
        times = [track.seconds(stamp) for stamp in stamps]
        last = max(shown, key=lambda packet: packet.pts).duration if intact else None
        clock = track.stream.time_base
        length = float(last * clock) if last else 1 / rate
    warnings = []
    if not intact:
        with open_container(file) as container:
            track = Track(container, "video")
            times = [track.seconds(frame.pts) for frame in track.frames()]
        if not times:
            raise MediaError("", "damaged", "no picture can be decoded", f"0 of {stated} frames" if stated > 0 else "")
        chosen = set(evenly_spaced(len(times), count))
        with open_container(file) as container:
            frames = enumerate(Track(container, "video").frames())
            pictures = _rgb((frame for i, frame in frames if i in chosen), len(chosen))
        if None in times or any(a >= b for a, b in pairwise(times)):
            warnings = ["video: time stamps are missing or damaged, times follow from the average frame rate"]
            times = [i / rate for i in range(len(times))]
    if len(times) < stated - 1:
        warnings.append(f"video: {len(times)} of {stated} frames decoded")
    # Without a stated number of frames, only a gap in the packets' times shows lost frames. A still picture may cause
    # such a gap as well.
    ends = sorted((packet.pts, packet.duration or 0) for packet in shown if packet.pts is not None)
    holes = [float((b[0] - sum(a)) * clock) for a, b in pairwise(ends) if a[1]]
    lost = sum(hole for hole in holes if hole > TOLERANCE)
    if lost and not stated:
        warnings.append(f"video: {lost:.1f} seconds without pictures")
    end = times[-1] + length
    warnings = track.notes + warnings
    warnings += shortfall("video", end - max(times[0] - first, 0.0), track.claimed, track.faults)
    return {
        "times": [times[i] for i in evenly_spaced(len(times), count)],
        "duration": end,
        "warnings": warnings,
    }, pictures


def _rgb(frames: Iterable[Any], count: int) -> np.ndarray:
    """Converts at most `count` frames to RGB `(F, H, W, 3)`, upright and in the size of the first frame."""
    pictures, size = [], {}
    for frame in frames:
        if not size:
            size = {"width": frame.width, "height": frame.height}
            if 3 * count * frame.width * frame.height > LARGEST_RESULT:
                what = f"{count} frames of {frame.width} x {frame.height} pixels"
                raise MediaError("", "too large", f"{what} exceed {LARGEST_RESULT >> 30} GiB")
        pictures.append(upright(frame, size))
    return np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), dtype=np.uint8)


def upright(frame: Any, size: dict[str, int]) -> np.ndarray:
    """Converts a frame to RGB of a width and height, and turns it as the file says."""
    turns = round(frame.rotation / 90)
    picture = frame.to_ndarray(format="rgb24", **size)
    return np.rot90(picture, turns) if turns else picture


def _read_video_by_decord(file: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Reads frames by decord, for files that PyAV cannot read. Fails if decord would have to replace a frame.

    decord opens whatever a playlist names, other files as well, so it gets only containers that are none.
    """
    try:
        import decord
    except ImportError as error:
        raise MediaError("", "damaged", str(error)) from None
    with open(file, "rb") as stream:
        head = stream.read(8)
    if head[4:] not in MP4_BOXES and head[:4] != MATROSKA:
        raise MediaError("", "damaged", "only mp4, mov, mkv and webm files have a second decoder")
    reader = decord.VideoReader(file, num_threads=1, fault_tol=1e-9)
    spans = reader.get_frame_timestamp(list(range(len(reader))))  # (n, 2): from, to
    if not ((np.diff(spans[:, 0]) > 0).all() and -1 < spans[0, 0] and spans[-1, 1] < 1e6):
        raise MediaError("", "damaged", "its time stamps are invalid")
    chosen = evenly_spaced(len(reader), count)
    frames = reader.get_batch(chosen).asnumpy()
    warnings = ["video: PyAV cannot read it, frames and times are decord's, parts may be missing"]
    return {"times": spans[chosen, 0].tolist(), "duration": float(spans[-1, 1]), "warnings": warnings}, frames


def mono(samples: np.ndarray) -> np.ndarray:
    """Averages the channels of `(N, channels)` to `(N,)` float32. Integers are scaled by their type to -1..1."""
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
    """Joins and resamples the pieces of an audio reader, and builds its answer.

    Args:
        pieces: Consecutive mono samples at `native_rate`.
        silent: Number of these samples that replace lost sound.
        native_rate: Sampling rate of the file in Hz.
        rate: Sampling rate of the result in Hz.
        claimed: Length that the file states in seconds, or 0.0.
        faults: Descriptions of the errors so far.
        notes: Which track is read, if there are several.
    """
    count = sum(map(len, pieces))
    if count == silent:
        raise MediaError("", "damaged", "no sound can be decoded", f"0 of {claimed:.1f} seconds" if claimed else "")
    if 4 * count * max(rate / native_rate, 1.0) > LARGEST_RESULT:
        raise MediaError("", "too large", f"{count / native_rate:.0f} s of sound exceed {LARGEST_RESULT >> 30} GiB")
    samples = np.concatenate(pieces)
    if not np.isfinite(samples).all():
        samples = np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        faults.append("NaN or infinite samples")
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
    """Reads sound by soundfile, and the length that the file's header states."""
    handle = os.open(file, os.O_RDONLY)  # not by name: libsndfile would use the suffix as the format
    try:
        sound = soundfile.SoundFile(handle)
    except soundfile.LibsndfileError:
        raise MediaError("", "not media", "it is not an audio file") from None
    pieces, faults = [], []
    with sound:
        claimed = _stated_frames(file, sound) / sound.samplerate
        # soundfile seeks after each read, and the sound of an mp3 file is wrong for a while after a seek.
        size = -1 if sound.format == "MP3" else 1 << 16
        try:
            while len(block := sound.read(size, dtype="float32", always_2d=True)):
                pieces.append(mono(block))
        except soundfile.LibsndfileError as error:
            faults.append(error.error_string.strip(" .") or "unreadable sound")
        if sound.format == "OGG" and not _ogg_end(file)[1]:
            faults.append("the end-of-stream mark is missing")
        native_rate = sound.samplerate
    return _audio(pieces, 0, native_rate, rate, claimed, faults, [])


def _stated_frames(file: str, sound: Any) -> float:
    """Number of frames that the header states. Only libsndfile's log has it: its length omits lost frames."""
    if sound.format == "OGG":
        return _ogg_end(file)[0] * sound.samplerate / (48000 if sound.subtype == "OPUS" else sound.samplerate)
    stated = re.search(r"^ *(?:data|SSND) : (\d+)(?: \(should be (\d+)\))?", sound.extra_info, re.MULTILINE)
    if not stated or int(stated[1]) >= UNKNOWN_SIZE:
        return sound.frames
    available = int(stated[2] or os.path.getsize(file))
    return sound.frames * max(int(stated[1]) / available, 1.0) if available else sound.frames


def _ogg_end(file: str) -> tuple[int, bool]:
    """Position of the last page in samples, and whether the page is marked as the last."""
    with open(file, "rb") as handle:
        handle.seek(max(os.path.getsize(file) - (1 << 17), 0))
        tail = handle.read()
    page = tail.rfind(b"OggS\0", 0, len(tail) - 22)
    if page < 0:
        return 0, False
    flags, position = struct.unpack_from("<Bq", tail, page + 5)
    return max(position, 0), bool(flags & 4)


def _read_audio_by_pyav(file: str, rate: int) -> tuple[dict[str, Any], np.ndarray]:
    """Reads sound by PyAV. If the best track is silent or cannot be decoded, reads the next one."""
    found, error, order, count = None, None, 0, 1
    while order < count:
        with open_container(file) as container:
            track = Track(container, "audio", order)
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


class Pieces:
    """Mono sound of a track at its own rate, placed by time stamps: silence fills gaps at the start and in between.

    Args:
        track: The track.
        frames: Its decoded frames.
        whole: Whether the caller keeps all pieces.

    Attributes:
        rate: Sampling rate in Hz; 0 before the first piece.
        position: Number of samples so far.
        silent: Number of samples that replace lost sound.
    """

    def __init__(self, track: Track, frames: Iterable[Any], whole: bool = True):
        self.track, self.frames, self.whole = track, frames, whole
        self.rate = self.position = self.silent = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        track, is_first = self.track, True
        for frame in self.frames:
            self.rate = self.rate or frame.sample_rate
            if frame.sample_rate != self.rate:
                track.faults.append("another sampling rate")
                continue
            at = track.seconds(frame.pts)
            gap = 0 if at is None else round(at * self.rate) - self.position
            # A little is rounding, unless it is the start; what leads past the stated end is damage.
            if gap > (0 if is_first else TOLERANCE * self.rate) and not 0 < track.claimed < at:
                if 4 * (gap + self.position * self.whole) > LARGEST_RESULT:
                    raise MediaError("", "too large", "its time stamps span more than memory holds")
                # A track that begins late lacks nothing.
                late = round((track.seconds(track.stream.start_time) or 0.0) * self.rate) if is_first else 0
                self.silent += max(gap - late, 0)
                self.position += gap
                for begin in range(0, gap, SILENT_BLOCK):
                    yield np.zeros(min(SILENT_BLOCK, gap - begin), dtype=np.float32)
            is_first = False
            channels = frame.to_ndarray()  # (channels, n), or (1, n * channels) if they alternate
            samples = channels.T if frame.format.is_planar else channels.reshape(-1, frame.layout.nb_channels)
            self.position += len(samples)
            yield mono(samples)


def resampler(native_rate: int, rate: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """A function of consecutive chunks (N,) of sound, and whether a chunk is the last, that resamples them."""
    if native_rate == rate:
        return lambda samples, last: samples
    return soxr.ResampleStream(native_rate, rate, 1, dtype="float32").resample_chunk


def _sound(track: Track, rate: int) -> tuple[dict[str, Any], np.ndarray]:
    """Decodes a track and places it by its time stamps."""
    pieces = Pieces(track, track.frames())
    samples = list(pieces)
    return _audio(samples, pieces.silent, pieces.rate, rate, track.claimed, track.faults, track.notes)


def _read_length(file: str, wanted: int) -> tuple[dict[str, Any], np.ndarray]:
    """Reads the length that a file states in seconds, or None; 0 for a still picture."""
    with open_container(file) as container:
        length, name = container.duration, container.format.name
        frames = [stream.frames for stream in container.streams]
        if name.endswith("_pipe") or not length and frames and set(frames) == {1}:  # AVIF has one for the alpha
            return {"seconds": 0.0}, np.zeros(0)
        if name in GUESSED_LENGTHS - {"mp3"}:  # of an mp3 file, it is stated or close
            packets = (packet for packet in container.demux() if packet.pts is not None)
            ends = (float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in packets)
            length = 1e6 * max(ends, default=0.0)
    return {"seconds": length / 1e6 if length and length > 0 else None}, np.zeros(0)


READERS = {
    "length_by_pyav": _read_length,
    "audio_by_soundfile": _read_audio_by_soundfile,
    "audio_by_pyav": _read_audio_by_pyav,
    "video_by_pyav": _read_video,
    "video_by_decord": _read_video_by_decord,
}
