"""Measures reading recordings, one of two hours: what `predict.py` answers, against decoding alone by plain PyAV.

    python -m bench.recording > results/recordings.md

Each way is a process of its own, so that its peak memory is its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time

import av

from bench.media import write_clip
from egmf import media_egmf
from egmf.media_egmf import Recording


CLIP_SECONDS = 10
FILES = ((120, 320, 180), (6, 640, 360))  # minutes, width and height
WINDOW, FRAMES, RATE = 10.0, 16, 16000


def write_recording(clip: str, path: str, seconds: float) -> None:
    """Repeats the packets of a clip until the recording is as long as asked for."""
    with av.open(clip) as source, av.open(path, "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        packets = [packet for packet in source.demux() if packet.dts is not None]
        length, last = source.duration / 1e6, dict.fromkeys(streams, -1)
        for turn in range(round(seconds / length)):
            for packet in packets:
                shift = round(turn * length / packet.time_base)
                if packet.dts + shift <= last[packet.stream_index]:
                    continue  # sound is a little longer than the pictures
                last[packet.stream_index] = packet.dts + shift
                again = av.Packet(bytes(packet))
                again.pts, again.dts, again.duration = packet.pts + shift, packet.dts + shift, packet.duration
                again.time_base, again.is_keyframe = packet.time_base, packet.is_keyframe
                again.stream = streams[packet.stream_index]
                target.mux(again)


def decode(path: str) -> int:
    """Decodes all sound and pictures, and does nothing with them."""
    frames = 0
    with av.open(path) as container:
        for packet in container.demux():
            frames += len(packet.decode())
    return frames


def read_parts(path: str) -> int:
    """Reads the parts between pauses as arrays."""
    count = sum(1 for _ in Recording(path, RATE, FRAMES, window=WINDOW))
    media_egmf._close_workers()  # the time and memory of a process are known when it has ended
    return count


WAYS = {"decode": decode, "read_parts": read_parts}


def measure(way: str, path: str) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory in bytes of this process and its worker, and what the way returns."""
    begun = time.perf_counter()
    found = WAYS[way](path)
    seconds = time.perf_counter() - begun
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    return {"seconds": seconds, "cpu": cpu, "memory": 1024 * sum(one.ru_maxrss for one in usage), "found": found}


def table(runs: dict[tuple, dict[str, dict[str, float]]]) -> str:
    """The page, from one run of each way on each of `FILES`."""
    lines = [
        "# Reading recordings\n",
        "Command: `python -m bench.recording > results/recordings.md`, one run of each. An h264 +",
        "aac file is decoded by plain PyAV, which does nothing with the sound and the pictures; and it is read as",
        f"`predict.py` reads it: all parts that end at pauses, as arrays of sound at {RATE} Hz and of {FRAMES} frames",
        "each. Other programs slowed the clock down, but not CPU time. Memory is the peak of the process and of its",
        "worker together, with their libraries. Goals: at most 1.15 of decoding alone; less than 1 GB.\n",
        "| recording | way | CPU seconds | seconds | memory | CPU against decoding |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (minutes, width, height), ways in runs.items():
        for way, name in (("decode", "PyAV, decoding alone"), ("read_parts", "all parts")):
            run = ways[way]
            cells = [f"{minutes} min, {width} x {height}", name, f"{run['cpu']:.0f}", f"{run['seconds']:.0f}"]
            cells += [f"{run['memory'] / 1e6:.0f} MB", f"{run['cpu'] / ways['decode']['cpu']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    runs: dict[tuple, dict[str, dict[str, float]]] = {}
    for minutes, *size in FILES:
        with tempfile.TemporaryDirectory() as folder:
            clip, path = f"{folder}/clip.mp4", f"{folder}/recording.mp4"
            write_clip(clip, CLIP_SECONDS, *size)
            write_recording(clip, path, 60 * minutes)
            for way in WAYS:
                command = [sys.executable, "-m", "bench.recording", way, path]
                found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                runs.setdefault((minutes, *size), {})[way] = found
    print(table(runs))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:3])))
    else:
        main()
