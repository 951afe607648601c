"""Measures clips per second of `media_egmf` against plain PyAV in one process, and the cost of the guard process.

    python -m bench.media > results/media.md

A clip is 8 frames and the audio at 16 kHz of a generated h264 + aac mp4 file of 640 x 360 pixels. Three methods
alternate: *plain* is PyAV without any check, *unguarded* calls the readers of `media_egmf` in this process, and
*guarded* calls its `load_video` and `load_audio`. Guarded compared with unguarded shows the cost of the guard; guarded
compared with plain includes the cost of all checks. With two processes, both read at the same time. CPU time includes
callers and workers; other programs affect it less than wall-clock time. The benchmark needs Linux.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import av
import numpy as np
import soxr

from egmf import media_egmf, media_readers_egmf


CLIPS = {1: 4, 3: 2, 10: 1}  # seconds: clips in one measurement
FPS, WIDTH, HEIGHT, RATE = 30, 640, 360, 44100
FRAMES, WANTED_RATE = 8, 16000
REPETITIONS = 5


def write_clip(path: str, seconds: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Generates a moving pattern with some noise, and a tone."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    with av.open(path, "w") as container:
        video, audio = container.add_stream("libx264", rate=FPS), container.add_stream("aac", rate=RATE)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * FPS):
            picture = np.stack([x + 5 * i, y + 3 * i, x + y], axis=-1) + rng.integers(0, 12, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        tone = np.sin(np.arange(seconds * RATE, dtype=np.float32) / 10)[None] * np.ones((2, 1), dtype=np.float32)
        whole = av.AudioFrame.from_ndarray(tone, "fltp", "stereo")
        whole.sample_rate, whole.pts = RATE, 0
        resampler = av.AudioResampler(audio.format, "stereo", RATE, audio.codec_context.frame_size)
        for frame in [*resampler.resample(whole), *resampler.resample(None)]:
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def plain(path: str) -> None:
    with av.open(path) as container:
        total = container.streams.video[0].frames
        wanted = {(2 * i + 1) * total // (2 * FRAMES) for i in range(FRAMES)}
        frames = []
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == FRAMES:
                break
        np.stack(frames)
    with av.open(path) as container:
        sound = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in container.decode(audio=0)])
        soxr.resample(sound, RATE, WANTED_RATE)


def unguarded(path: str) -> None:
    media_readers_egmf._read_video(path, FRAMES)
    try:
        media_readers_egmf._read_audio_by_soundfile(path, WANTED_RATE)
    except media_egmf.MediaError:
        media_readers_egmf._read_audio_by_pyav(path, WANTED_RATE)


def guarded(path: str) -> None:
    media_egmf.load_video(path, FRAMES)
    media_egmf.load_audio(path, WANTED_RATE)


WAYS = {"plain": plain, "unguarded": unguarded, "guarded": guarded}


def cpu_time() -> float:
    """CPU seconds of this process and its workers."""
    # Linux derives the id of a process's CPU clock from the process id.
    workers = [time.clock_gettime((~worker.process.pid << 3) | 2) for worker in media_egmf._workers]
    return time.process_time() + sum(workers)


def read(way: str, path: str, count: int) -> float:
    """Reads a clip `count` times and returns the CPU seconds."""
    begun = cpu_time()
    for _ in range(count):
        WAYS[way](path)
    return cpu_time() - begun


def measure(pool: ProcessPoolExecutor, processes: int, way: str, path: str, count: int) -> tuple[float, float]:
    """Clips per second of `processes` processes that read `count` clips each, and CPU milliseconds per clip."""
    begun = time.perf_counter()
    used = sum(done.result() for done in [pool.submit(read, way, path, count) for _ in range(processes)])
    return processes * count / (time.perf_counter() - begun), 1000 * used / (processes * count)


def main() -> None:
    media_readers_egmf.import_readers()
    print("# Reading clips: speed, and the cost of the guard\n")
    print(f"Command: `python -m bench.media > results/media.md`. {os.cpu_count()} cores, load average before the run")
    print(f"{os.getloadavg()[0]:.1f} (what exceeds 0 is other programs). Medians (lowest to highest) of {REPETITIONS}")
    print("interleaved repetitions: first clips per second, then milliseconds of CPU for one clip. The last columns")
    print("are CPU time, guarded against unguarded and against plain.\n")
    print("| clip | processes | PyAV, plain | unguarded | guarded | cost of the guard | cost of all |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for seconds, count in CLIPS.items():
            path = f"{folder}/{seconds}.mp4"
            write_clip(path, seconds)
            for processes in (1, 2):
                found = {way: [] for way in WAYS}
                with ProcessPoolExecutor(processes) as pool:
                    for way in WAYS:  # imports, and starts the workers
                        measure(pool, processes, way, path, 1)
                    for _ in range(REPETITIONS):
                        for way in WAYS:
                            found[way].append(measure(pool, processes, way, path, count))
                cells = []
                for way in WAYS:
                    rates, times = zip(*found[way], strict=True)
                    cells.append(f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}), ")
                    cells[-1] += f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f}) ms"
                for base in ("unguarded", "plain"):
                    pairs = zip(found[base], found["guarded"], strict=True)
                    cells.append(
                        f"{100 * statistics.median(after[1] / before[1] - 1 for before, after in pairs):+.0f} %"
                    )
                print(f"| {seconds} s | {processes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
