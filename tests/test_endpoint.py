"""handler.py behind a real HTTP server: every form of request, and what a caller must not reach."""

import base64
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import soundfile
from clips import tone, write_clip
from models import save_model_with_towers

import handler
from egmf.media_egmf import MediaError


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model and its handler, clips, and the server's temporary folder."""
    folder = tmp_path_factory.mktemp("endpoint")
    save_model_with_towers(folder, llm_folder(), assemble)
    shutil.copyfile(ROOT / "handler.py", folder / "model" / "handler.py")
    write_clip(folder / "clip.mp4")
    write_clip(folder / "mute.mp4", 0.4, sound=False, seed=1)
    soundfile.write(folder / "talk.wav", tone(2.0, 400.0), 16000)
    shutil.copyfile(folder / "voice.wav", folder / "voicefile")  # a name that is valid base64, but for its length
    shutil.copyfile(folder / "voice.wav", folder / "voicewav")
    (folder / "temporary").mkdir()
    return folder


@pytest.fixture(scope="module")
def web(place):
    """The folder over HTTP, with redirects, as a host with a private address: its port, and what was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            if kind not in ("endless", "to", "flood"):
                return super().do_GET()
            self.send_response(200 if kind == "endless" else 302)
            self.send_header("Location", self.path.removeprefix(f"/{kind}/"))
            self.end_headers()
            if kind != "to":
                self.send_endless()

        def send_endless(self):
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(bytes(1 << 20))

        def log_message(self, *arguments):
            asked.append(f"{self.headers['Host'].partition(':')[0]} {self.path}")

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(place))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1], asked
        running.shutdown()


@pytest.fixture(scope="module")
def endpoint(place):
    """The address of the server, which works in the folder and may fetch from `localhost`, but not from 127.0.0.1."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EGMF"))}
    kept |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(place / "temporary")}
    kept |= {"EGMF_PRIVATE_HOSTS": "media.internal,localhost", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(ROOT / "tests" / "endpoint_server.py"), str(place / "model")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=place, env=kept, **pipes) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def ask(endpoint: str, inputs, **parameters):
    """The answer to a request, which must succeed."""
    response = httpx2.post(endpoint, json={"inputs": inputs, "parameters": parameters}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(endpoint: str, body, place: Path) -> str:
    """The message to a request, which must fail: one line, without a path of the server, unless the caller gave it."""
    response = httpx2.post(endpoint, json=body, timeout=120)
    assert response.status_code == 400 and response.json().keys() == {"error"}, response.text
    message = response.json()["error"]
    assert "\n" not in message and "Traceback" not in message
    assert not [path for path in map(str, (place, ROOT, sys.prefix)) if path in message and path not in str(body)]
    return message


def assert_same(answers, wanted) -> None:
    for answer, other in zip(answers, wanted, strict=True):
        assert answer["error"] is None and answer.keys() == other.keys()
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert answer["seconds"] == other["seconds"] and len(answer["warnings"]) == len(other["warnings"])


def test_a_file_in_every_form_gets_the_pipelines_answer(endpoint, recognize, place, web):
    port, asked = web
    clip, text = encoded(place / "clip.mp4"), "that is just great"
    wanted = recognize(str(place / "clip.mp4"))
    wrapped = base64.encodebytes((place / "clip.mp4").read_bytes()).decode()
    url = f"http://localhost:{port}/clip.mp4"
    forms = [clip, wrapped, f"data:video/mp4;base64,{clip}", url, url.replace("/clip", "/to//clip"), {"video": clip}]
    assert_same([ask(endpoint, form) for form in forms], [wanted] * len(forms))
    assert asked == ["localhost /clip.mp4", "localhost /to//clip.mp4", "localhost /clip.mp4"]

    fields = {"text": text, "speaker": "Ross", "context": [{"speaker": "Joey", "text": "It broke."}, "No."]}
    sample = {"file": str(place / "clip.mp4"), **fields}
    assert_same([ask(endpoint, {"file": clip, **fields}), ask(endpoint, clip, **fields)], [recognize(sample)] * 2)
    both = {"audio": place / "voice.wav", "video": place / "mute.mp4"}
    assert_same([ask(endpoint, {name: encoded(file) for name, file in both.items()})], [recognize(both)])
    assert_same([ask(endpoint, {"text": text})], [recognize({"text": text})])

    body = (place / "voice.wav").read_bytes()
    options = {"headers": {"Content-Type": "audio/wav"}, "params": {"top_k": 2, "text": text, "task": "mosei"}}
    response = httpx2.post(endpoint, content=body, **options)
    assert_same([response.json()], [recognize(str(place / "voice.wav"), **options["params"])])
    left = [name for name in os.listdir(place / "temporary") if not name.startswith("torchinductor_")]
    assert left == []  # no file of a request


def test_batches_and_parameters(endpoint, recognize, place):
    files = [place / name for name in ("clip.mp4", "voice.wav", "mute.mp4")]
    options = {"top_k": 2, "candidate_labels": ["joy", "anger", "bored"]}
    assert_same(
        ask(endpoint, [encoded(file) for file in files], **options), recognize(list(map(str, files)), **options)
    )
    assert ask(endpoint, []) == []

    clips = {"speaker_clips": [encoded(files[1]), {"video": encoded(files[2])}]}
    wanted = recognize(str(files[0]), speaker_clips=[str(files[1]), {"video": str(files[2])}])
    assert_same([ask(endpoint, {"file": encoded(files[0]), **clips})], [wanted])
    assert_same([ask(endpoint, encoded(files[0]), **clips)], [wanted])

    segments = [{"start": 0.0, "end": 1.0, "text": "no"}, {"start": 1.0, "end": 2.0, "text": "well"}]
    talk = encoded(place / "talk.wav")
    for times in ({"segments": segments}, {"window": 0.5, "hop": 0.5}):
        answer = ask(endpoint, talk, return_timestamps=True, **times)
        wanted = recognize(str(place / "talk.wav"), return_timestamps=True, **times)
        assert_same([answer, *answer["chunks"]], [wanted, *wanted["chunks"]])
        assert [tuple(chunk["timestamp"]) for chunk in answer["chunks"]] == [
            chunk["timestamp"] for chunk in wanted["chunks"]
        ]


def test_one_bad_file_of_a_batch(endpoint, recognize, place, web):
    gone = f"http://localhost:{web[0]}/gone.wav"
    inputs = [{"file": encoded(place / name)} for name in ("voice.wav", "broken.mp4")] + [{"file": gone}]
    first, second, third = ask(endpoint, inputs, on_error="report")
    assert_same([first], [recognize(str(place / "voice.wav"))])
    assert second["error"].startswith("Cannot read 'inputs[1].file': it is not an audio or video file")
    assert (
        third["error"]
        == "Cannot read 'inputs[2].file': its URL cannot be fetched: the server answers with status 404."
    )
    assert second["label"] is None and second["probabilities"] is None
    assert refusal(endpoint, {"inputs": inputs}, place) == second["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs: got none, wanted a file as base64 or as a URL"),
        ([], "request: got list, wanted an object with some of inputs, parameters"),
        ({"inputs": "", "text": "no"}, "request: got text, wanted some of inputs, parameters"),
        ({"inputs": None}, "inputs: got NoneType, wanted a file"),
        ({"inputs": "That is just great."}, "got 'That is just great.', wanted .*; words go into `text`"),
        ({"inputs": ["", "clip.mp4"]}, r"inputs\[1\]: got 'clip.mp4', wanted a file as base64"),
        ({"inputs": [{"words": "no"}]}, r"inputs\[0\]: got words, wanted some of file, audio"),
        ({"inputs": {"audio": [0.1, 0.2]}}, "inputs.audio: got list, wanted a file"),
        ({"inputs": {"text": 3}}, "got int 3, wanted a string or None"),
        ({"inputs": {"speaker_clips": "AAAA"}}, "inputs.speaker_clips: got str, wanted a list of files"),
        ({"inputs": {"text": "a"}, "parameters": ["task"]}, "parameters: got list, wanted an object"),
        ({"inputs": {"text": "a"}, "parameters": {"transcriber": "/"}}, "parameters: got transcriber, wanted some of"),
        ({"inputs": {"text": "a"}, "parameters": {"num_workers": 9}}, "parameters: got num_workers, wanted some of"),
        ({"inputs": {"text": "a"}, "parameters": {"task": ["meld"]}}, r"task: got \['meld'\], wanted one of mosi"),
        ({"inputs": {"text": "a"}, "parameters": {"top_k": "3"}}, "top_k: got '3', wanted a positive number"),
        ({"inputs": {"text": "a"}, "parameters": {"window": 1}}, "window: got a value without return_timestamps"),
        ({"inputs": [{"text": "a"}] * 101}, "request.inputs: got 101 entries, wanted at most 100"),
        (
            {"inputs": {"text": "a"}, "parameters": {"return_timestamps": True, "window": 0.05}},
            "window: got 0.05 seconds, wanted at least 0.5",
        ),
        ({"inputs": "AAAA"}, "Cannot read 'inputs': it is not an audio or video file"),
        ({"inputs": {"video": "http://nowhere.invalid/x"}}, "Cannot read 'inputs.video': its URL cannot be fetched"),
    ],
)
def test_bad_requests_get_one_message(endpoint, place, body, message):
    assert re.search(message, refusal(endpoint, body, place))


def test_a_fault_of_the_server_gives_no_details_to_the_caller(endpoint, place):
    """Its folder for temporary files is gone."""
    temporary = place / "temporary"
    temporary.rename(place / "elsewhere")
    try:
        message = refusal(endpoint, {"inputs": encoded(place / "voice.wav")}, place)
    finally:
        (place / "elsewhere").rename(temporary)
    assert message == "the endpoint failed on this request (FileNotFoundError); its log says why"


def test_no_request_reads_a_file_of_the_server(endpoint, place):
    file = str(place / "voice.wav")
    for name in (file, f"file://{file}", "voice.wav", "../model/config.json", "/etc/hostname", "voicefile"):
        for inputs in (name, [name], {"file": name}, {"audio": name}, {"video": name}, {"speaker_clips": [name]}):
            assert re.search(r": got '.*', wanted a file as base64", refusal(endpoint, {"inputs": inputs}, place))
        body = {"inputs": {"text": "a"}, "parameters": {"speaker_clips": [name]}}
        assert "parameters.speaker_clips[0]: got" in refusal(endpoint, body, place)
    # A name that is base64 as well stands for the bytes that it encodes.
    assert (place / "voicewav").is_file()
    assert "Cannot read 'inputs': it is not an audio or video file" in refusal(endpoint, {"inputs": "voicewav"}, place)
    for inputs in ({"path": file}, {"bytes": None, "path": file}, {"audio": {"path": file}}, {"file": {"path": file}}):
        assert ": got " in refusal(endpoint, {"inputs": inputs}, place)
    lists = (
        f"#EXTM3U\n#EXTINF:1,\n{file}\n",
        f"ffconcat version 1.0\nfile {file}\n",
        f"v=0\nm=audio 0 RTP/AVP 0\n{file}",
    )
    for text in lists:
        message = refusal(endpoint, {"inputs": base64.b64encode(text.encode()).decode()}, place)
        assert message.startswith("Cannot read 'inputs': it is not an audio or video file")


def test_no_request_reaches_the_servers_network(endpoint, place, web):
    port, asked = web
    asked.clear()
    hosts = (
        "127.0.0.1",
        "127.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.0.0.1",
        "169.254.169.254",
    )
    for host in hosts:
        message = refusal(endpoint, {"inputs": {"audio": f"http://localhost@{host}:{port}/voice.wav"}}, place)
        assert re.search(r"its URL cannot be fetched: \S+ has no public address", message), message
    assert asked == []
    url = f"http://localhost:{port}/to/http://127.0.0.1:{port}/voice.wav"
    assert "127.0.0.1 has no public address" in refusal(endpoint, {"inputs": url}, place)
    assert asked == [f"localhost /to/http://127.0.0.1:{port}/voice.wav"]
    url = f"http://localhost:{port}/" + "to//" * 9 + "voice.wav"
    assert "redirects" in refusal(endpoint, {"inputs": url}, place)


def test_the_body_of_a_redirect_is_not_read(endpoint, place, web):
    url = f"http://localhost:{web[0]}"
    answers = [ask(endpoint, f"{url}/{path}") for path in ("voice.wav", f"flood/{url}/voice.wav")]
    assert answers[0] == answers[1]


def test_labels_are_few(endpoint, place):
    for labels in ([str(number) for number in range(51)], ["a" * 1000, "b"]):
        data = {"inputs": {"text": "no"}, "parameters": {"candidate_labels": labels}}
        assert "wanted at most 50 labels, 1000 characters in total" in refusal(endpoint, data, place)


def test_a_url_without_end_is_given_up(endpoint, place, web):
    message = refusal(endpoint, {"inputs": f"http://localhost:{web[0]}/endless"}, place)
    assert message == "Cannot read 'inputs': its URL cannot be fetched: it exceeds 256 MB in 60 seconds."


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(monkeypatch, tmp_path):
    """No single wait is long enough for a timeout."""
    monkeypatch.setattr(handler, "DOWNLOAD_SECONDS", 1.0)
    monkeypatch.setenv("EGMF_PRIVATE_HOSTS", "localhost")
    over = threading.Event()

    def drip() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(0.1):
                connection.sendall(b"a")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, daemon=True).start()
        file = handler._File(tmp_path / "file", "inputs", MediaError)
        file.url = f"http://localhost:{listening.getsockname()[1]}/"
        began = time.monotonic()
        with pytest.raises(MediaError, match="its URL cannot be fetched: it exceeds 256 MB in"):
            os.fspath(file)
        assert time.monotonic() - began < 10 and not file.path.exists()
        over.set()


def test_the_documented_client(endpoint, place):
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    client = re.search(r"^## Inference Endpoints.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    assert len(client.strip().split("\n")) <= 11
    code = client.replace("https://NAME.endpoints.huggingface.cloud", endpoint)
    process = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(r"\{('\w+': [\d.e-]+(, )?){3}\}\n", process.stdout)
