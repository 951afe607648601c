"""The page of app.py as programs reach it: its API, its limits, what it keeps to itself, and what it leaves behind."""

import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import soundfile
from clips import tone, write_clip, write_pattern
from models import save_model_with_towers
from page_server import running_page
from recognizers import build_whisper


pytest.importorskip("gradio", reason="gradio is not installed; see requirements-space.txt")
pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parents[1]
SECRET = "zebra crossing"  # words and a file's name that no log may have
MEGABYTES, SECONDS = 2, 20
LEAK = 10e6  # bytes that ten uploads may add to the memory of the server


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model, two clips, a sound whose name is secret and one that is too long."""
    folder = tmp_path_factory.mktemp("server")
    save_model_with_towers(folder, llm_folder(), assemble)
    write_clip(folder / "one.mp4")
    write_clip(folder / "long.mp4", 3.0, seed=1)
    write_pattern(folder / "large.mp4", size=(640, 480))  # tens of megabytes when it is decoded
    soundfile.write(folder / f"{SECRET}.wav", tone(0.3), 16000)
    soundfile.write(folder / "endless.wav", tone(SECONDS + 5.0), 16000)
    return folder


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    limits = ["--max_megabytes", MEGABYTES, "--max_seconds", SECONDS]
    example = ["--example", place / "one.mp4", "that is just great"]
    with running_page(tmp_path_factory.mktemp("page"), place / "model", *example, *limits) as running:
        yield running


def ask(page, file: Path | None = None, words: str = "", **question) -> list[dict]:
    client = gradio_client.Client(page.url, verbose=False)
    sent = None if file is None else gradio_client.handle_file(str(file))
    return client.predict(file=sent, words=words, **question, api_name="/answer")


def upload(page, name: str, content: bytes) -> str:
    (path,) = httpx2.post(f"{page.url}/gradio_api/upload", files={"files": (name, content)}).json()
    return path


def ask_about(page, path: str) -> str:
    """What the server says to a program that names a file of the server."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    call = f"{page.url}/gradio_api/call/answer"
    event = httpx2.post(call, json={"data": [file, "", "meld", ""]}).json()["event_id"]
    return httpx2.get(f"{call}/{event}", timeout=60).text


def test_the_documented_client_gets_the_answer_of_the_pipeline(page, place, recognize, tmp_path, monkeypatch):
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/page.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.chdir(place)
    (place / "clip.mp4").write_bytes((place / "one.mp4").read_bytes())
    names: dict = {}
    exec(block.replace("http://127.0.0.1:7860", page.url), names)
    wanted = recognize(str(place / "one.mp4"), text="That is just great.")
    assert names["answers"][-1]["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-6)
    *segments, whole = ask(page, place / "long.mp4", labels="calm, tense")
    assert whole["segments"] == len(segments) > 1 and list(whole["probabilities"]) == ["calm", "tense"]


def test_limits(page, place):
    too_large = httpx2.post(
        f"{page.url}/gradio_api/upload", files={"files": ("a.mp4", b"0" * (MEGABYTES << 20) + b"0")}
    )
    assert too_large.status_code == 413 and "exceeded maximum allowed size" in too_large.text
    (answer,) = ask(page, place / "endless.wav")
    assert answer["error"] == f"The clip is too long: got more than {SECONDS} seconds, the limit of this page."


def test_no_file_but_the_upload_can_be_read(page, place):
    secret = place / "private.wav"
    soundfile.write(secret, tone(0.3), 16000)
    stolen = [secret, place / "model/config.json", "/etc/passwd", ROOT / "app.py", page.said]
    arriving = Path(upload(page, "a.wav", b"mine")).parents[1]
    stolen += [arriving / ".." / ".." / ".." / secret.name, f"{arriving}/../../../../../../../../etc/passwd", "app.py"]
    for path in map(str, stolen):
        for written in (path, path.replace("..", "%2e%2e"), f"file://{path}"):
            assert httpx2.get(f"{page.url}/gradio_api/file={written}").status_code in (403, 404)
        said = ask_about(page, path)
        assert said.startswith("event: error") and "private" not in said and str(place) not in said

    # A playlist names other files, by its content or also by its suffix.
    playlists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        "xspf": f'<playlist xmlns="http://xspf.org/ns/0/"><track><location>file://{secret}</location></track></playlist>',
    }
    for suffix, content in playlists.items():
        for name in (f"list.{suffix}", "list.mp4"):
            said = ask_about(page, upload(page, name, content.encode()))
            assert f"Cannot read '{name}': it is not an audio or video file" in said and "private" not in said

    # Names that lead elsewhere; gradio keeps the last part of them.
    for name in ("../../../evil.wav", "/tmp/evil.wav", "..\\evil.wav", "a/../../evil.wav"):
        path = Path(upload(page, name, b"RIFF")).resolve()
        assert path.is_relative_to(arriving.resolve()) and path.is_file()

    # Users cannot make links; if one is there all the same, it is no upload.
    link = arriving / "link.wav"
    link.symlink_to(secret)
    assert "event: error" in ask_about(page, str(link))
    link.unlink()


def test_a_url_is_not_fetched(page):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.5)
        said = ask_about(page, f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4")
        assert "The clip is a URL; this page takes uploads." in said
        with pytest.raises(TimeoutError):
            server.accept()


def test_two_users_at_once_and_a_bad_file_between_them(page, place, recognize):
    """Both send the same clip, whose path on the server is then the same, while others send broken files."""
    (place / "broken.mp4").write_bytes((place / "one.mp4").read_bytes()[:700])
    files = ["one.mp4", "broken.mp4", "one.mp4", "long.mp4", "broken.mp4", "long.mp4"]
    with ThreadPoolExecutor(6) as users:
        answers = list(users.map(lambda name: ask(page, place / name), files))
    for name, (*_, whole) in zip(files, answers, strict=True):
        if name == "broken.mp4":
            assert whole["error"].startswith("Cannot read 'broken.mp4'")
        else:
            wanted = recognize(str(place / name), return_timestamps=True)
            assert whole["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-6)


def test_nothing_of_a_clip_stays(page, place):
    """Neither the file on the disk nor its name or words in what the server prints."""
    before = set(page.uploads())
    assert ask(page, place / f"{SECRET}.wav", words=f"I like the {SECRET}")[0]["error"] is None
    assert ask(page, place / f"{SECRET}.wav", labels=SECRET)[0]["error"]
    assert set(page.uploads()) == before
    assert SECRET not in page.said.read_text(encoding="utf-8")


def memory_of(pid: int) -> int:
    """Resident memory of a process in bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def children_of(pid: int) -> list[str]:
    return sorted(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_ten_uploads_leak_no_memory_and_no_process(page, place):
    for _ in range(5):  # the first ones load and compile
        ask(page, place / "large.mp4")
    before = page.uploads()
    memory, children, handles = memory_of(page.pid), children_of(page.pid), len(os.listdir(f"/proc/{page.pid}/fd"))
    for number in range(10):
        name = "broken" if number % 5 == 4 else "large"
        content = b"\0" * 500 if name == "broken" else (place / "large.mp4").read_bytes()
        (place / f"upload{number}.mp4").write_bytes(content)
        *_, whole = ask(page, place / f"upload{number}.mp4")
        assert (whole["error"] is None) == (name == "large")
    time.sleep(1)
    grown = memory_of(page.pid) - memory
    print(f"{grown / 1e6:.1f} MB")
    assert grown < LEAK
    assert len(children_of(page.pid)) <= max(len(children), os.cpu_count() or 1)
    assert len(os.listdir(f"/proc/{page.pid}/fd")) <= handles + 5
    assert page.uploads() == before


def test_a_broken_connection_leaves_the_server_well(page, place):
    address = page.url.removeprefix("http://").split(":")
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n"
    part = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(head + b"Content-Length: 1900000\r\n\r\n" + part + b"0" * 100_000)
    assert ask(page, place / "one.mp4")[-1]["error"] is None


def test_words_are_recognised_where_a_transcriber_is_given(place, tmp_path):
    whisper = build_whisper(tmp_path / "whisper")
    with running_page(tmp_path, place / "model", "--transcriber", whisper) as running:
        (answer,) = ask(running, place / f"{SECRET}.wav")
        assert answer["recognized_by"] == "whisper"  # without the folder of the server
        assert isinstance(answer["text"], str) and answer["error"] is None
        (typed,) = ask(running, place / f"{SECRET}.wav", words="no")
        assert "recognized_by" not in typed
        kept = [path for path in running.temporary.rglob("*.json") if "modules" not in path.parts]
        assert kept == []  # no cache of what was said
