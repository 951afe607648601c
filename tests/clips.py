"""Writes the clips of the tests: tones, moving noise, a moving pattern in any container, and recordings."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


SECONDS, FPS, RATE, SIZE = 2, 25, 44100, (160, 120)  # of the clips of a moving pattern
# The intact files by name: what `write_pattern` is given for each clip, and sounds.
CLIPS = {
    "end.mp4": {},
    "start.mp4": {"movflags": "faststart"},
    "silent.mp4": {"audio": None},
    "sound.m4a": {"video": None},
    "odd.mp4": {"size": (162, 122)},
    "uneven.mp4": {"size": (161, 121), "pixels": "yuv444p"},
    "ten_bit.mp4": {"pixels": "yuv420p10le"},
    "clip.mkv": {},
    "clip.avi": {"video": "mpeg4", "audio": "libmp3lame"},
    "clip.webm": {"video": "libvpx", "audio": "libopus"},
    "clip.mpg": {"video": "mpeg1video", "audio": "mp2"},
    "uneven.mpg": {"video": "mpeg1video", "audio": "mp2", "size": (161, 121)},
    "clip.ts": {"video": "mpeg2video", "audio": "mp2"},
}
SOUNDS = ("sound.wav", "sound.flac", "sound.ogg", "sound.mp3", "sound.aiff")
AVATARS = {"train": 24, "validation": 24, "test": 24}  # sizes of the splits of a small corpus of avatars


def tone(seconds: float, frequency: float = 300.0, rate: int = 16000) -> np.ndarray:
    """A sine of level 0.3, (N,)."""
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def write_clip(path, seconds: float = 1.0, sound: bool = True, seed: int = 0) -> str:
    """Write a 48 x 32 mp4 of moving noise at 25 frames per second, with a tone."""
    frames = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for step in range(round(25 * seconds)):
            picture = np.roll(frames, step, axis=1).repeat(8, 0).repeat(8, 1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if sound:
            samples = tone(seconds, 200.0 + 50 * seed)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux([*audio.encode(frame), *audio.encode(None)])
    return str(path)


def pictures(count: int, width: int, height: int):
    """A moving pattern whose frames are all different."""
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        yield np.stack([2 * x + 5 * i, 3 * y + 7 * i, x + y + 11 * i], axis=-1).astype(np.uint8)


def sine(seconds: float = SECONDS, rate: int = RATE, channels: int = 2, hertz: float = 440.0) -> np.ndarray:
    """A tone of shape (N, channels); the first channel has level 0.5, the others are silent."""
    wave = np.zeros((round(seconds * rate), channels), dtype=np.float32)
    wave[:, 0] = 0.5 * np.sin(2 * np.pi * hertz * np.arange(len(wave)) / rate)
    return wave


def write_pattern(
    path: Path,
    video: str | None = "libx264",
    audio: str | None = "aac",
    size: tuple[int, int] = SIZE,
    times: np.ndarray | None = None,
    sound_from: float = 0.0,
    pixels: str = "yuv420p",
    **container_options: str,
) -> Path:
    """Write a clip of SECONDS in any form, or with a frame at each of `times`; its sound starts at `sound_from`."""
    clock = Fraction(1, FPS if times is None else 1000)
    stamps = range(SECONDS * FPS) if times is None else np.round(times * 1000).astype(int).tolist()
    with av.open(str(path), "w", options=container_options) as container:
        if video:
            pictured = container.add_stream(video, rate=FPS)
            pictured.width, pictured.height, pictured.pix_fmt = *size, pixels
            pictured.codec_context.gop_size = 12
            pictured.codec_context.time_base = clock
        if audio:
            heard = container.add_stream(audio, rate=48000 if audio == "libopus" else RATE, layout="stereo")
        if video:
            for stamp, picture in zip(stamps, pictures(len(stamps), *size), strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = stamp, clock
                container.mux(pictured.encode(frame))
            container.mux(pictured.encode(None))
        if audio:
            whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(sine(SECONDS - sound_from).T), "fltp", "stereo")
            whole.sample_rate, whole.pts = RATE, round(sound_from * RATE)
            sliced = av.AudioResampler(heard.format, "stereo", heard.rate, heard.codec_context.frame_size or 1024)
            for frame in [*sliced.resample(whole), *sliced.resample(None)]:
                container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


def write_tracks(path: Path, videos: list[dict], sounds: list[dict]) -> Path:
    """Write a Matroska file with video (`frames`, `size`, `default`) and audio (`level`, `seconds`, `default`)."""
    default = av.stream.Disposition.default
    with av.open(str(path), "w") as container:
        tracks = []
        for video in videos:
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height = video["size"]
            stream.pix_fmt = "yuv420p"
            tracks.append((stream, video))
        for audio in sounds:
            tracks.append((container.add_stream("flac", rate=RATE, layout="mono"), audio))
        for stream, made in tracks:
            stream.disposition = default if made.get("default") else av.stream.Disposition(0)
        for stream, made in tracks:
            if "size" in made:
                for i, picture in enumerate(pictures(made["frames"], *made["size"])):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = i, Fraction(1, FPS)
                    container.mux(stream.encode(frame))
            else:
                wave = made["level"] * 2 * sine(made["seconds"])[:, :1].T
                frame = av.AudioFrame.from_ndarray((32767 * wave).astype(np.int16), "s16", "mono")
                frame.sample_rate, frame.pts = RATE, 0
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def write_lossless(path: Path, pictures: np.ndarray, samples: np.ndarray, rate: int = 16000) -> str:
    """Write RGB pictures (F, H, W, 3) and sound (N,) as ffv1 and 16 bit PCM."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=FPS)
        video.height, video.width, video.pix_fmt = *pictures.shape[1:3], "bgr0"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        whole = av.AudioFrame.from_ndarray(np.round(samples * 32767).astype(np.int16)[None], "s16", "mono")
        whole.sample_rate, whole.pts = rate, 0
        container.mux([*audio.encode(whole), *audio.encode(None)])
    return str(path)


def write_recorded(path: Path, seconds: float) -> str:
    """Write a webm as the recorders of browsers do, which states no length and has no index."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.content = b""

        def writable(self):
            return True

        def write(self, part):
            self.content += bytes(part)
            return len(part)

    pipe = Pipe()
    with av.open(pipe, "w", format="webm", options={"live": "1"}) as container:
        video = container.add_stream("libvpx", rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("libopus", rate=48000, layout="mono")
        for step in range(round(25 * seconds)):
            picture = np.full((32, 48, 3), 5 * step % 255, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(tone(seconds, rate=48000)[None], format="fltp", layout="mono")
        samples.sample_rate = 48000
        container.mux([*audio.encode(samples), *audio.encode(None)])
    path.write_bytes(pipe.content)
    return str(path)
