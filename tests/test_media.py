"""Intact, damaged and invalid media files: results are correct, missing parts are reported, and nothing crashes.

The tests create the files with PyAV and soundfile, and compare the results of intact files with PyAV's decoding.
"""

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from clips import CLIPS, FPS, RATE, SECONDS, SIZE, SOUNDS, sine, write_pattern, write_tracks
from corpus_files import SHARED
from datasets import Dataset
from pids import alive, gone, needs_proc
from torch.utils.data import DataLoader
from transformers.dynamic_module_utils import get_imports

from egmf import media_egmf
from egmf.media_egmf import MediaError, load_audio, load_video, media_length


ROOT = Path(__file__).resolve().parents[1]
GRID = SHARED / "data" / "grid"
LIMIT = 20.0  # seconds for one call, far more than any of these files needs


def by_pyav(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames at the centres of `count` equal parts, and their times, decoded directly with PyAV."""
    with av.open(str(path)) as container:
        start = (container.start_time or 0) / 1e6
        frames = [
            (f.to_ndarray(format="rgb24"), float(f.pts * f.time_base) - start) for f in container.decode(video=0)
        ]
    count = min(count, len(frames))
    chosen = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
    return np.stack([frame for frame, _ in chosen]), np.array([time for _, time in chosen])


def outcome(load, path, wanted: int):
    """The loaded clip or the MediaError; it must arrive within the time limit."""
    begun = time.monotonic()
    try:
        result = load(path, wanted, time_limit=LIMIT)
    except MediaError as error:
        result = error
        assert str(error).startswith(f"Cannot read {str(path)!r}: ") and str(error).endswith(".")
    assert time.monotonic() - begun < LIMIT + 5
    return result


# Good files


@pytest.mark.parametrize("name", [name for name in CLIPS if CLIPS[name].get("video", "") is not None])
@pytest.mark.parametrize("count", [1, 8, 1000])
def test_frames_are_pyavs_bytes(intact, name, count):
    if name not in intact:
        pytest.skip(f"PyAV has no encoder for {name}")
    clip = load_video(intact[name], count)
    frames, times = by_pyav(intact[name], count)
    assert clip.frames.dtype == np.uint8 and len(frames) == min(count, SECONDS * FPS)
    np.testing.assert_array_equal(clip.frames, frames)
    np.testing.assert_allclose(clip.times, times, atol=1e-9)
    assert clip.warnings == [] and clip.duration == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("name", [*SOUNDS, *(name for name in CLIPS if CLIPS[name].get("audio", "") is not None)])
@pytest.mark.parametrize("rate", [16000, 48000, 7919])
def test_a_sine_stays_what_it_is(intact, name, rate):
    if name not in intact:
        pytest.skip(f"PyAV has no encoder for {name}")
    clip = load_audio(intact[name], rate)
    assert clip.samples.dtype == np.float32 and clip.samples.ndim == 1 and clip.sampling_rate == rate
    assert clip.warnings == [] and clip.duration == pytest.approx(SECONDS, abs=0.06)
    inner = clip.samples[rate // 4 : rate // 4 + rate]  # one second: a bin of the spectrum is 1 Hz
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(rate)))
    assert spectrum.argmax() == 440
    # The mean of a channel at 0.5 and a silent one.
    assert np.sqrt((inner**2).mean()) == pytest.approx(0.25 / np.sqrt(2), rel=0.06)  # mp3 takes 5 % off


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 96000])
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT"])
def test_rates_and_channels_of_wav(tmp_path, rate, channels, subtype):
    wave = sine(1.0, rate, channels)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype=subtype)
    clip = load_audio(tmp_path / "a.wav", rate)
    np.testing.assert_allclose(clip.samples, wave.mean(axis=1), atol=1 / 128)
    assert clip.warnings == []
    # Both readers mean the same by a sample.
    _, samples = media_egmf._decode("audio_by_pyav", "", str(tmp_path / "a.wav"), rate, time.monotonic() + LIMIT)
    np.testing.assert_allclose(samples, clip.samples, atol=1e-6)
    assert len(load_audio(tmp_path / "a.wav", 16000).samples) == pytest.approx(16000, abs=1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_times_of_a_variable_frame_rate(tmp_path, suffix):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.12, 40)).round(3)
    path = write_pattern(tmp_path / f"vfr.{suffix}", audio=None, times=times)
    clip = load_video(path, 1000)
    np.testing.assert_allclose(clip.times, times - times[0], atol=0.0015)
    np.testing.assert_array_equal(clip.frames, by_pyav(path, 1000)[0])
    assert load_video(path, 5).times == pytest.approx(clip.times[[4, 12, 20, 28, 36]])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_that_starts_late_is_preceded_by_silence(tmp_path, suffix):
    clip = load_audio(write_pattern(tmp_path / f"late.{suffix}", sound_from=0.5), 16000)
    assert clip.duration == pytest.approx(SECONDS, abs=0.06)
    assert np.abs(clip.samples[:7000]).max() < 0.01 and np.abs(clip.samples[9000:9500]).max() > 0.2


def test_of_several_videos_the_one_a_player_shows_is_read(tmp_path):
    cover, film, longer = (
        {"size": (64, 64), "frames": 1},
        {"size": SIZE, "frames": 20},
        {"size": (96, 64), "frames": 40},
    )
    clip = load_video(write_tracks(tmp_path / "cover.mkv", [{**cover, "default": True}, film], []), 3)
    assert clip.frames.shape[1:3] == SIZE[::-1] and clip.warnings == ["video: track 2 of 2 is read"]
    clip = load_video(write_tracks(tmp_path / "default.mkv", [longer, {**film, "default": True}], []), 3)
    assert clip.frames.shape[1:3] == SIZE[::-1]
    clip = load_video(write_tracks(tmp_path / "longest.mkv", [film, longer], []), 3)
    assert clip.frames.shape[1:3] == (64, 96)
    assert load_video(write_tracks(tmp_path / "one.mkv", [film], []), 3).warnings == []


def test_of_several_sound_tracks_a_silent_one_is_passed_over(tmp_path):
    silent, quiet, loud = ({"level": level, "seconds": SECONDS} for level in (0.0, 0.1, 0.4))
    clip = load_audio(write_tracks(tmp_path / "silent.mkv", [], [silent, loud]), RATE)
    assert np.abs(clip.samples).max() == pytest.approx(0.4, abs=0.01)
    assert clip.warnings == ["audio: track 2 of 2 is read"]
    clip = load_audio(write_tracks(tmp_path / "default.mkv", [], [quiet, {**loud, "default": True}]), RATE)
    assert np.abs(clip.samples).max() == pytest.approx(0.4, abs=0.01)
    noise = {**silent, "level": 4e-5}  # as ac3 turns silence into
    assert load_audio(write_tracks(tmp_path / "noise.mkv", [], [noise, quiet]), RATE).warnings == clip.warnings


def test_of_sound_tracks_of_about_the_same_length_the_first_is_read(tmp_path):
    quiet, loud = {"level": 0.1, "seconds": SECONDS}, {"level": 0.4, "seconds": SECONDS + 0.1}
    clip = load_audio(write_tracks(tmp_path / "two.mkv", [], [quiet, loud]), RATE)
    assert np.abs(clip.samples).max() == pytest.approx(0.1, abs=0.01)
    assert clip.warnings == ["audio: track 1 of 2 is read"]
    clip = load_audio(write_tracks(tmp_path / "long.mkv", [], [quiet, {**loud, "seconds": 2 * SECONDS}]), RATE)
    assert clip.warnings == ["audio: track 2 of 2 is read"]


def test_a_sound_track_that_cannot_be_decoded_is_passed_over(tmp_path):
    quiet, loud = ({"level": level, "seconds": SECONDS} for level in (0.1, 0.4))
    path = write_tracks(tmp_path / "two.mkv", [], [quiet, loud])
    data = path.read_bytes()
    with av.open(str(path)) as container:
        broken = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    for packet in broken:
        assert data.count(packet) == 1
        data = data.replace(packet, bytes(len(packet)))
    path.write_bytes(data)
    clip = load_audio(path, RATE)
    assert np.abs(clip.samples).max() == pytest.approx(0.4, abs=0.01) and clip.duration == SECONDS
    assert clip.warnings == ["audio: track 2 of 2 is read"]


def test_samples_far_beyond_full_scale_are_damage(tmp_path):
    """Damaged AAC frames can decode to finite samples that are so loud that features overflow."""
    wave = sine(channels=1)
    wave[1000:1200] *= 1e20
    soundfile.write(tmp_path / "loud.wav", wave, RATE, subtype="FLOAT")
    clip = load_audio(tmp_path / "loud.wav", RATE)
    assert np.abs(clip.samples).max() == 1.0
    np.testing.assert_array_equal(clip.samples[2000:], wave[2000:, 0])
    assert clip.warnings == ["audio: 1 damaged places, the first: samples far beyond full scale"]
    soundfile.write(tmp_path / "scale.wav", 32768 * sine(channels=1), RATE, subtype="FLOAT")
    with pytest.raises(MediaError, match="most of its samples are far beyond full scale"):
        load_audio(tmp_path / "scale.wav", 16000)


def test_a_flac_file_with_bytes_before_its_header_is_read(tmp_path):
    soundfile.write(tmp_path / "whole.flac", sine(channels=1), RATE)
    (tmp_path / "junk.flac").write_bytes(bytes(range(256)) * 2 + (tmp_path / "whole.flac").read_bytes())
    whole, junk = (load_audio(tmp_path / f"{name}.flac", RATE) for name in ("whole", "junk"))
    np.testing.assert_array_equal(junk.samples, whole.samples)


def test_a_phones_rotation_is_applied(intact, tmp_path):
    data = bytearray(intact["silent.mp4"].read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[1] << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    lying, upright = load_video(intact["silent.mp4"], 3).frames, load_video(tmp_path / "phone.mp4", 3).frames
    np.testing.assert_array_equal(upright, np.rot90(lying, -1, axes=(1, 2)))


@pytest.mark.parametrize("path", sorted(GRID.glob("*.mpg")) or [None], ids=lambda path: getattr(path, "name", "none"))
def test_grid_clips(path):
    if path is None:
        pytest.skip("the GRID clips are not at ../shared/data/grid")
    clip, sound = load_video(path, 8), load_audio(path, 16000)
    np.testing.assert_array_equal(clip.frames, by_pyav(path, 8)[0])
    assert clip.warnings == [] and sound.warnings == []
    assert clip.duration == pytest.approx(3.0, abs=0.05) == sound.duration and np.abs(sound.samples).max() > 0.01


def test_a_missing_stream_has_its_own_kind(intact):
    for load, name, kind in ((load_audio, "silent.mp4", "no audio"), (load_video, "sound.m4a", "no video")):
        with pytest.raises(MediaError) as raised:
            load(intact[name], 16)
        assert raised.value.kind == kind
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value) and vars(copy) == vars(raised.value)
    for load, wanted in ((load_audio, 0), (load_video, 0)):
        with pytest.raises(ValueError, match="got 0, wanted at least 1"):
            load(intact["end.mp4"], wanted)


def test_content_decides_and_not_the_suffix(intact, tmp_path):
    for name, wrong in (("end.mp4", "a.wav"), ("sound.wav", "a.mp4"), ("sound.flac", "a.raw"), ("sound.mp3", "a.txt")):
        path = tmp_path / wrong
        path.write_bytes(intact[name].read_bytes())
        np.testing.assert_array_equal(load_audio(path, 16000).samples, load_audio(intact[name], 16000).samples)
    link = tmp_path / "l\udcffnk %03d.jpg"
    link.symlink_to(intact["end.mp4"])
    assert len(load_video(link, 3).frames) == 3


# Damaged and bogus files


def patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite the bytes at `offset` after the name of a box with `value`."""
    at = data.index(box) + len(box) + offset
    return data[:at] + value + data[at + len(value) :]


def damaged(intact) -> dict[str, bytes]:
    """More than 120 damaged files, as `{"<good file>: <damage>": content}`."""
    rng = np.random.default_rng(0)
    made = {}
    for name in ("end.mp4", "start.mp4", "silent.mp4", "sound.m4a", "clip.mkv", "clip.avi", *SOUNDS):
        data = intact[name].read_bytes()
        for part in (0.02, 0.3, 0.7, 0.95):
            made[f"{name}: cut at {part}"] = data[: round(part * len(data))]
        made[f"{name}: zeros"] = data[: len(data) // 2] + bytes(3000) + data[len(data) // 2 + 3000 :]
        for place in (*rng.integers(0, 200, 2).tolist(), *rng.integers(200, len(data), 3).tolist()):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            made[f"{name}: bit flip at {place}"] = bytes(flipped)
    for name in ("end.mp4", "start.mp4"):
        data = intact[name].read_bytes()
        head = data.index(b"moov")
        for place in rng.integers(head + 4, head + 1800, 10).tolist():
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            made[f"{name}: bit flip at {place} in moov"] = bytes(flipped)
        for box in (b"stts", b"stsz", b"stsc", b"stco", b"ctts"):
            for offset in (4, 8, 12):
                made[f"{name}: {box.decode()} {offset}"] = patched(data, box, offset, b"\x7f\xff\xff\xff")
    return made


def test_damage_is_said(intact, tmp_path):
    """No damaged file crashes or hangs the reader, and an incomplete result always has a warning."""
    files = damaged(intact)
    assert len(files) >= 120
    errors, silent = 0, []
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data)
        options = CLIPS.get(name.split(":")[0], {"video": None})
        video, audio = outcome(load_video, path, 1000), outcome(load_audio, path, 16000)
        errors += isinstance(video, MediaError) + isinstance(audio, MediaError)
        if isinstance(video, MediaError):
            assert video.kind in ("no video", "damaged", "not media", "too large")
        elif options.get("video", "") is not None:
            assert len(video.frames) == len(video.times) > 0 and (np.diff(video.times) > 0).all()
            if len(video.frames) < SECONDS * FPS - 1 and not video.warnings:
                silent.append((name, len(video.frames)))
        if isinstance(audio, MediaError):
            assert audio.kind in ("no audio", "damaged", "not media", "too large")
        elif audio.duration < SECONDS - 0.15 and not audio.warnings:
            silent.append((name, audio.duration))
    assert silent == []
    assert 0 < errors < len(files)


def test_decord_aborts_on_a_corrupt_count_and_the_caller_does_not(intact, tmp_path):
    path = tmp_path / "stts.mp4"
    path.write_bytes(patched(intact["silent.mp4"].read_bytes(), b"stts", 8, b"\x7f\xff\xff\xff"))
    alone = subprocess.run([sys.executable, "-c", f"import decord; decord.VideoReader({str(path)!r})"], check=False)
    assert alone.returncode == -signal.SIGABRT
    clip = load_video(path, 8)
    np.testing.assert_array_equal(clip.frames, load_video(intact["silent.mp4"], 8).frames)
    assert clip.warnings == [f"video: {SECONDS * FPS} of {0x7FFFFFFF} frames decoded"]
    # The same through the worker that decord gets: it dies, this process does not.
    with pytest.raises(MediaError) as raised:
        media_egmf._decode("video_by_decord", path, str(path), 8, time.monotonic() + LIMIT, fresh=True)
    assert raised.value.kind == "crash"


def test_the_length_of_aac_is_that_of_its_packets(tmp_path):
    """FFmpeg would estimate it from the bit rate at the start, where nothing is said."""
    sound = np.concatenate([np.zeros(3 * RATE), np.random.default_rng(0).uniform(-0.5, 0.5, 6 * RATE)])
    with av.open(tmp_path / "a.aac", "w", format="adts") as container:
        track = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], "fltp", "mono")
        frame.rate = RATE
        container.mux([*track.encode(frame), *track.encode(None)])
    assert media_length(tmp_path / "a.aac") == pytest.approx(9.0, abs=0.2)


def test_decord_opens_no_playlist(tmp_path):
    """A playlist with a damaged video behind it: PyAV reads the video, decord would read the file that is named."""
    private = write_pattern(tmp_path / "private.ts").read_bytes()
    packets = [bytearray(private[start : start + 188]) for start in range(0, len(private), 188)]
    of_video = [packet for packet in packets if int.from_bytes(packet[1:3]) & 0x1FFF == 256]
    for packet in of_video[2:]:
        packet[20:] = b"U" * 168
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nprivate.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "clip.m3u8").write_bytes(playlist + b"".join(packets))
    with pytest.raises(MediaError, match="Cannot read") as raised:
        load_video(tmp_path / "clip.m3u8", 4)
    assert raised.value.kind == "damaged"


def test_decord_stands_in_with_the_same_bytes(intact):
    file = str(intact["end.mp4"])
    found, frames = media_egmf._decode("video_by_decord", file, file, 8, time.monotonic() + LIMIT, fresh=True)
    clip = load_video(file, 8)
    np.testing.assert_array_equal(frames, clip.frames)
    np.testing.assert_allclose(found["times"], clip.times, atol=1e-5)
    assert "decord" in found["warnings"][0]


def test_ten_claimed_hours(intact, tmp_path):
    hours = 36000
    mkv = intact["clip.mkv"].read_bytes()
    wav = intact["sound.wav"].read_bytes()
    data = wav.index(b"data") + 4
    flac = bytearray(intact["sound.flac"].read_bytes())
    fields = int.from_bytes(flac[18:26], "big") >> 36 << 36  # rate, channels, bits, and then 36 bits of samples
    flac[18:26] = (fields | hours * RATE).to_bytes(8, "big")
    files = {
        "long.mkv": patched(mkv, b"\x44\x89\x88", 0, struct.pack(">d", 1000 * hours)),  # the segment's duration
        "long.wav": wav[:data] + struct.pack("<I", 0x7FFF0000 & ~3) + wav[data + 4 :],
        "long.flac": bytes(flac),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert load_video(tmp_path / "long.mkv", 8).warnings == ["video: 2.0 of 36000.0 seconds decoded"]
    assert load_audio(tmp_path / "long.mkv", 8000).warnings == ["audio: 2.0 of 36000.0 seconds decoded"]
    assert load_audio(tmp_path / "long.wav", 16000).warnings == ["audio: 2.0 of 12173.6 seconds decoded"]
    clip = load_audio(tmp_path / "long.flac", 16000)
    assert clip.warnings[0] == "audio: 2.0 of 36000.0 seconds decoded" and clip.duration == pytest.approx(SECONDS)


@pytest.mark.parametrize("stated", [0, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_states_no_length(intact, tmp_path, stated):
    wav = intact["sound.wav"].read_bytes()
    (tmp_path / "a.wav").write_bytes(patched(wav, b"data", 0, struct.pack("<I", stated)))
    clip = load_audio(tmp_path / "a.wav", RATE)
    np.testing.assert_array_equal(clip.samples, load_audio(intact["sound.wav"], RATE).samples)
    assert clip.warnings == []


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_a_cut_ogg_lacks_the_mark_of_its_end(tmp_path, codec):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * 48000)
    soundfile.write(tmp_path / "whole.ogg", noise, 48000, format="OGG", subtype=codec)
    assert load_audio(tmp_path / "whole.ogg", 16000).warnings == []
    data = (tmp_path / "whole.ogg").read_bytes()
    (tmp_path / "cut.ogg").write_bytes(data[: len(data) // 2])
    clip = load_audio(tmp_path / "cut.ogg", 16000)
    assert 1 < clip.duration < 7 and "end-of-stream mark" in clip.warnings[-1]


def test_what_is_no_media(intact, tmp_path):
    """Files that are not media are rejected at once with the reason; they neither block nor open other files."""
    contents = {
        "empty.mp4": b"",
        "text.txt": b"\x1b[31mnot a video\x1b[0m\n" * 500,
        "random.raw": np.random.default_rng(0).bytes(100_000),
        "zeros.mp4": bytes(100_000),
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n%b\n" % os.fsencode(intact["end.mp4"]),
        "list.txt": b"ffconcat version 1.0\nfile %b\n" % os.fsencode(intact["end.mp4"]),
        "call.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n",
        "canvas.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.mp4"))
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    reasons = {name: ("not media", "damaged", "too large") for name in contents}
    reasons |= dict.fromkeys(["empty.mp4", "fifo.mp4", "socket.mp4", "loop.mp4", "none.mp4"], ("not readable",))
    for name, kinds in reasons.items():
        for load in (load_video, load_audio):
            error = outcome(load, tmp_path / name, 16)
            assert isinstance(error, MediaError), name
            assert error.kind in (*kinds, "no audio"), (name, error)
    for path, reason in (
        (tmp_path, "it is a directory"),
        ("/dev/zero", "it is a device"),
        (tmp_path / "fifo.mp4", "it is a named pipe"),
        (tmp_path / "empty.mp4", "the file is empty"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(MediaError, match=reason):
            load_audio(path, 16000)
    slow = bytearray(intact["sound.wav"].read_bytes())
    slow[24:28] = struct.pack("<I", 1)  # one sample a second: resampled, gigabytes
    (tmp_path / "slow.wav").write_bytes(slow)
    with pytest.raises(MediaError) as raised:
        load_audio(tmp_path / "slow.wav", 48000)
    assert raised.value.kind == "too large"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(intact, tmp_path):
    (tmp_path / "a.wav").write_bytes(intact["sound.wav"].read_bytes())
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(MediaError, match="permission denied"):
        load_audio(tmp_path / "a.wav", 16000)


def test_no_user_of_features_is_asked_for_decoders():
    """transformers requires all packages that a checkpoint file imports, also those imported inside functions."""
    names = ("media_egmf", "media_readers_egmf", "media_recordings_egmf", "media_worker_egmf", "spans_egmf")
    files = [ROOT / f"{name}.py" for name in names]
    found = {name for file in files for name in get_imports(file)}
    assert found - sys.stdlib_module_names == {"numpy"} and not {"fcntl", "resource"} & found


def test_a_missing_reader_is_an_import_error(intact, tmp_path):
    (tmp_path / "soxr.py").write_text("raise ImportError('no soxr here')")
    code = f"from egmf import media_egmf; media_egmf.load_audio({str(intact['sound.wav'])!r}, 16000)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: ") and "no soxr here" in done.stderr


# Processes


@pytest.fixture
def worker_pid(intact) -> int:
    """The process id of the one idle worker."""
    media_egmf._close_workers()
    media_egmf._idle.clear()
    load_video(intact["end.mp4"], 1)
    (worker,) = media_egmf._idle
    return worker.process.pid


def test_a_worker_is_kept_and_a_killed_one_replaced(intact, worker_pid):
    load_audio(intact["sound.mp3"], 16000)
    assert [worker.process.pid for worker in media_egmf._workers] == [worker_pid]
    os.kill(worker_pid, signal.SIGKILL)
    assert len(load_video(intact["end.mp4"], 4).frames) == 4
    assert worker_pid not in [worker.process.pid for worker in media_egmf._workers]


@needs_proc
def test_a_hanging_worker_is_killed_at_the_limit(intact, worker_pid):
    os.kill(worker_pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(MediaError) as raised:
        load_video(intact["end.mp4"], 4, time_limit=0.5)
    assert raised.value.kind == "time limit" and time.monotonic() - begun < 10
    assert gone(worker_pid) and len(load_video(intact["end.mp4"], 4).frames) == 4


@needs_proc
def test_an_interrupted_call_leaves_no_answer_behind(intact, worker_pid):
    def interrupt(*_):
        raise KeyboardInterrupt

    os.kill(worker_pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            load_video(intact["end.mp4"], 4)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(worker_pid)
    assert load_audio(intact["sound.wav"], 16000).duration == SECONDS


def test_threads(intact):
    names = ["end.mp4", "clip.mkv", "odd.mp4", "clip.mpg"] * 5
    whole = {name: (load_video(intact[name], 6), load_audio(intact[name], 16000)) for name in set(names)}
    start = threading.Barrier(5)

    def work(name: str):
        if not names.index(name):
            start.wait(LIMIT)
        return name, load_video(intact[name], 6), load_audio(intact[name], 16000)

    with ThreadPoolExecutor(5) as pool:
        for name, video, audio in pool.map(work, names):
            np.testing.assert_array_equal(video.frames, whole[name][0].frames)
            np.testing.assert_array_equal(audio.samples, whole[name][1].samples)


class ClipFrames:
    """A data set of intact, for a DataLoader."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return os.getpid(), load_video(self.paths[index], 4).frames, load_audio(self.paths[index], 8000).samples


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers(intact, worker_pid, start):
    """Both loader processes start their own reader, also when forked from a process that already has one."""
    paths = [intact[name] for name in ("end.mp4", "clip.mkv", "clip.mpg", "start.mp4") * 3]
    here = ClipFrames(paths)
    loader = DataLoader(here, None, num_workers=2, multiprocessing_context=start, timeout=100)
    pids = set()
    for (pid, frames, samples), (_, frames_here, samples_here) in zip(
        loader, map(here.__getitem__, range(12)), strict=True
    ):
        pids.add(int(pid))
        np.testing.assert_array_equal(frames, frames_here)
        np.testing.assert_array_equal(samples, samples_here)
    assert len(pids) == 2 and os.getpid() not in pids
    assert [worker.process.pid for worker in media_egmf._workers] == [worker_pid]


def test_datasets_map_with_two_processes(intact, worker_pid):
    def columns(row):
        return {
            "pid": os.getpid(),
            "sound": load_audio(row["path"], 8000).samples,
            "sum": load_video(row["path"], 4).frames.sum(),
        }

    rows = Dataset.from_dict({"path": [str(intact[name]) for name in ("end.mp4", "clip.mkv", "odd.mp4", "clip.mpg")]})
    mapped = rows.map(columns, num_proc=2)
    assert len(set(mapped["pid"])) == 2 and os.getpid() not in mapped["pid"]
    for row in mapped:
        assert row["sum"] == load_video(row["path"], 4).frames.sum()
        np.testing.assert_array_equal(np.float32(row["sound"]), load_audio(row["path"], 8000).samples)


# Run from standard input: what guards `__main__` must not be needed. Says the worker's process id, then waits.
CALLER = """
import os, sys, time
from egmf import media_egmf
assert not {"av", "decord", "soundfile", "soxr"} & set(sys.modules)
for path in sys.argv[2:]:
    try:
        media_egmf.load_audio(path, 16000)
    except media_egmf.MediaError:
        pass
assert not {"av", "decord", "soundfile", "soxr"} & set(sys.modules)
print(media_egmf._idle[0].process.pid, flush=True)
if sys.argv[1] == "forked" and os.fork() == 0:
    time.sleep(600)
if sys.argv[1] != "ends":
    time.sleep(600)
"""


@needs_proc
@pytest.mark.parametrize("way", ["ends", "killed", "forked"])
def test_no_orphan_and_no_noise(intact, tmp_path, way):
    """The worker ends with its caller, even if the caller is killed or a child process of the caller survives."""
    noisy = tmp_path / "noisy.mp3"  # of which libmpg123 complains on standard error
    mp3 = intact["sound.mp3"].read_bytes()
    noisy.write_bytes(mp3[:5000] + bytes(500) + mp3[5500:-3000])
    command = [sys.executable, "-", way, str(noisy), str(intact["end.mp4"])]
    caller = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        caller.stdin.write(CALLER.encode())
        caller.stdin.close()
        line = caller.stdout.readline()
        if way != "ends":
            assert alive(int(line))
            caller.kill()
        assert caller.wait(LIMIT) == (0 if way == "ends" else -signal.SIGKILL)
        assert gone(int(line))
    finally:
        os.killpg(caller.pid, signal.SIGKILL) if way != "ends" else None
    if way != "forked":
        assert caller.stdout.read() == b"" and caller.stderr.read() == b""
    caller.stdout.close()
    caller.stderr.close()
