"""`python -m corpora`: converted folders load like their source, other files are rejected, and writes are atomic."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_files import published
from datasets import load_dataset
from formats import clip_table, cmu_mosei, lfmim, mmsa_pickle, mse_pickles, same_rows

from corpora import cherma, load_corpus, meld
from corpora.__main__ import main
from corpora.convert import MismatchError, convert, describe


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for files to convert; the cache of `datasets` is inside it too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


WRITERS = {  # corpus, source in the folder, options, and what writes it and says what is in it
    "mosei unaligned": ("mosei", "a.pkl", {}, lambda place: mmsa_pickle(place / "a.pkl")),
    "mosei aligned": ("mosei", "a.pkl", {}, lambda place: mmsa_pickle(place / "a.pkl", aligned=True, frames=(9, 9))),
    "mosei clips": ("mosei", "", {}, lambda place: clip_table(place, "label.csv", "en")),
    "mosei clips of CMU": ("mosei", "", {}, cmu_mosei),
    "sims v1 features": (
        "simsv2",
        "a.pkl",
        {"version": 1},
        lambda place: mmsa_pickle(place / "a.pkl", language="zh", widths=(33, 709), high=1, rates=None),
    ),
    "sims v2 clips": ("simsv2", "", {}, lambda place: clip_table(place, "meta.csv", "zh")),
    "meld features": ("meld", "", {}, lambda place: mse_pickles(place, "meld", meld.EMOTIONS, "en")),
    "cherma features": (
        "cherma",
        "",
        {},
        lambda place: mse_pickles(place, "cherma", cherma.EMOTIONS, "zh", widths=(1024, 2048)),
    ),
    "cherma of LFMIM": ("cherma", "", {}, lambda place: lfmim(place, cherma.EMOTIONS)),
}


@pytest.mark.parametrize("form", WRITERS)
def test_converted_reads_as_the_files(folder, form):
    name, source, options, write = WRITERS[form]
    place = folder / "files"
    place.mkdir()
    expected = write(place)
    report = convert(name, place / source, folder / "converted", allow_mismatch=True, **options)
    splits = load_corpus(name, folder / "converted", **options)
    direct = load_corpus(name, place / source, **options)
    for split, rows in expected.items():
        same_rows(splits[split], rows)
        assert splits[split].features == direct[split].features
        assert splits[split].to_list() == direct[split].to_list()
        assert report["splits"][split]["rows"] == len(rows)
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == ["converted", "files"]


def test_a_column_that_the_schema_has_no_more_is_left_out(folder):
    """A conversion may be older than the schema."""
    name, source, options, write = WRITERS["meld features"]
    (folder / "files").mkdir()
    write(folder / "files")
    report = convert(name, folder / "files" / source, folder / "converted", allow_mismatch=True, **options)
    wanted = load_corpus(name, folder / "converted", **options)["test"].to_list()
    for file in report["splits"]["test"]["files"]:
        table = pq.read_table(folder / "converted" / file)
        pq.write_table(table.append_column("following", [["later"]] * len(table)), folder / "converted" / file)
    assert load_corpus(name, folder / "converted", **options)["test"].to_list() == wanted


def test_meld_as_published(folder):
    """The published files are accepted, and the report contains the published numbers."""
    source = published("meld")
    report = convert("meld", source, folder / "meld")
    assert report["differences"] == []
    rows = {}
    for split, part in report["splits"].items():
        rows[split] = (part["rows"], tuple(part["labels"][label] for label in meld.EMOTIONS))
    assert rows == {
        "train": (9989, (4710, 1205, 268, 683, 1743, 271, 1109)),
        "validation": (1109, (470, 150, 40, 111, 163, 22, 153)),
        "test": (2610, (1256, 281, 50, 208, 402, 68, 345)),
    }
    direct, converted = load_corpus("meld", source), load_corpus("meld", folder / "meld", context=8)
    assert direct["validation"].to_list() == converted["validation"].to_list()
    assert direct["train"].data.table.equals(converted["train"].data.table)
    with pytest.raises(ValueError, match="context: got 4, wanted 8, with which"):
        load_corpus("meld", folder / "meld", context=4)
    with pytest.raises(ValueError, match="foo: got 1, wanted 'no such option'"):
        load_corpus("meld", folder / "meld", foo=1)


def test_report(folder):
    mmsa_pickle(folder / "a.pkl")
    report = convert("mosei", folder / "a.pkl", folder / "out", allow_mismatch=True)
    assert report == json.loads((folder / "out/corpus.json").read_text(encoding="utf-8"))
    train = report["splits"]["train"]
    assert train["scores"]["negative"] + train["scores"]["zero"] + train["scores"]["positive"] == train["rows"] == 7
    assert train["features"]["audio_features"]["widths"] == [74] and train["features"]["audio_features"]["rows"] == 6
    notes = train["notes"]
    assert notes["duplicate id, number added"]["first"] == ["train$_$0000"]
    assert notes["audio_features: -inf set to 0"]["count"] >= notes["audio_features: -inf set to 0"]["rows"] > 0
    told = describe(report)
    assert "DIFFERS from what was published: train: got 7 rows, published are 16326" in told
    assert re.search(r"audio_features: in 6 rows, 74 features, frames \d+ to \d+, median", told)
    assert told in (folder / "out/README.md").read_text(encoding="utf-8")
    assert str(folder) not in (folder / "out/README.md").read_text() + (folder / "out/corpus.json").read_text()


def test_differences_from_what_was_published(folder, monkeypatch):
    mmsa_pickle(folder / "a.pkl")
    with pytest.raises(MismatchError, match="validation: got 3 rows, published are 1871.*--allow_mismatch"):
        convert("mosei", folder / "a.pkl", folder / "out")
    monkeypatch.setattr("corpora.mosei.SIZES", {"train": 7, "validation": 3, "test": 4})
    convert("mosei", folder / "a.pkl", folder / "out")
    mmsa_pickle(folder / "a.pkl", widths=(74, 36))
    with pytest.raises(MismatchError, match="train: got 36 features in vision_features, published are 35"):
        convert("mosei", folder / "a.pkl", folder / "other")
    labels = np.array([[1.0]] * 7)
    labels[3] = np.nan  # a row that is left out is missed
    monkeypatch.setattr("corpora.mosei.SIZES", {"train": 7, "validation": 7, "test": 7})
    mmsa_pickle(folder / "a.pkl", (7, 7, 7), regression_labels=labels)
    with pytest.raises(MismatchError, match="train: got 6 rows, published are 7; validation: got 6"):
        convert("mosei", folder / "a.pkl", folder / "other")
    mse_pickles(folder, "cherma", cherma.EMOTIONS[:6], "zh", widths=(1024, 2048))
    with pytest.raises(MismatchError, match="test: got no row with the label 惊奇"):
        convert("cherma", folder, folder / "other")
    mse_pickles(folder, "cherma", meld.EMOTIONS, "zh", widths=(1024, 2048))
    with pytest.raises(ValueError, match="'label': got 'neutral', wanted one of 愤怒"):
        convert("cherma", folder, folder / "other", allow_mismatch=True)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("other")]


def test_labels_are_checked_when_read_back(folder):
    """If a folder was modified after the conversion, labels of one corpus still cannot enter a run of another."""
    mse_pickles(folder, "meld", meld.EMOTIONS, "en")
    convert("meld", folder, folder / "meld", allow_mismatch=True)
    with pytest.raises(ValueError, match="got the corpus 'meld', wanted 'cherma'"):
        load_corpus("cherma", folder / "meld")
    report = (folder / "meld/corpus.json").read_text(encoding="utf-8")
    (folder / "meld/corpus.json").write_text(report.replace('"meld"', '"cherma"'), encoding="utf-8")
    with pytest.raises(ValueError, match="train: got the label 'neutral', wanted one of 愤怒"):
        load_corpus("cherma", folder / "meld")
    (folder / "meld/corpus.json").write_text(report.replace('"meld"', '"simsv2"'), encoding="utf-8")
    with pytest.raises(ValueError, match="got scores of another range, wanted -1 to 1"):
        load_corpus("simsv2", folder / "meld")
    (folder / "meld/corpus.json").write_text(report.replace('"rows": 8', '"rows": 9'), encoding="utf-8")
    with pytest.raises(ValueError, match="train: got 8 rows, wanted 9"):
        load_corpus("meld", folder / "meld")
    (folder / "meld/corpus.json").write_text(report[:100], encoding="utf-8")
    with pytest.raises(ValueError, match="corpus.json: got no readable JSON"):
        load_corpus("meld", folder / "meld")
    (folder / "meld/corpus.json").write_text(report, encoding="utf-8")
    next((folder / "meld/data").glob("test-*")).unlink()
    with pytest.raises(FileNotFoundError, match="test-00000-of-00001.parquet: no such file"):
        load_corpus("meld", folder / "meld")


def test_clips_can_move(folder):
    clip_table(folder / "sims", "meta.csv", "zh")
    convert("simsv2", folder / "sims", folder / "out", allow_mismatch=True)
    first = load_corpus("simsv2", folder / "out")["train"][0]
    assert first["video"] == first["audio"] == str(folder / "sims/Raw/0007/0001.mp4")
    (folder / "sims").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match="media: .*sims/Raw is not a folder"):
        load_corpus("simsv2", folder / "out")
    mse_pickles(folder, "meld", meld.EMOTIONS, "en")
    convert("meld", folder, folder / "meld", allow_mismatch=True)
    with pytest.raises(ValueError, match="media: got .* wanted none: .*meld has no clips"):
        load_corpus("meld", folder / "meld", media=folder)
    moved = load_corpus("simsv2", folder / "out", media=folder / "moved/Raw")["train"][0]
    assert moved["video"] == str(folder / "moved/Raw/0007/0001.mp4") and os.path.isfile(moved["video"])


def test_shards(folder, monkeypatch):
    monkeypatch.setattr("corpora.convert.SHARD_BYTES", 100_000)
    monkeypatch.setattr("corpora.schema._TABLE_ROWS", 16)
    expected = mmsa_pickle(folder / "a.pkl", (100, 3, 4))
    report = convert("mosei", folder / "a.pkl", folder / "out", allow_mismatch=True)
    files = report["splits"]["train"]["files"]
    assert len(files) > 2 and files[1] == f"data/train-00001-of-{len(files):05d}.parquet"
    assert sum(pq.read_metadata(folder / "out" / file).num_rows for file in files) == 100
    same_rows(load_corpus("mosei", folder / "out")["train"], expected["train"])
    hub = load_dataset(str(folder / "out"))  # as the card says, without this repository
    assert {split: len(rows) for split, rows in hub.items()} == {"train": 100, "validation": 3, "test": 4}


def test_output_folder(folder):
    mse_pickles(folder, "meld", meld.EMOTIONS, "en")
    (folder / "out").mkdir()
    convert("meld", folder, folder / "out", allow_mismatch=True)  # an empty one will do
    with pytest.raises(FileExistsError, match="out: is there already, wanted a new folder"):
        convert("meld", folder, folder / "out", allow_mismatch=True)
    with pytest.raises(ValueError, match="option 'contxt', wanted one of context, media"):
        convert("meld", folder, folder / "other", contxt=1)
    with pytest.raises(ValueError, match="corpus: got 'mosi', wanted one of cherma"):
        convert("mosi", folder, folder / "other")
    with pytest.raises(FileNotFoundError):
        convert("meld", folder / "nowhere", folder / "other")
    assert not (folder / "other").exists() and not (folder / "other.unfinished").exists()


def test_interrupted(folder, monkeypatch):
    """Ctrl-C during a conversion, or a full disk, leaves no folder behind."""
    mmsa_pickle(folder / "a.pkl", (40, 3, 4))
    monkeypatch.setattr("corpora.schema._TABLE_ROWS", 1)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        tables = iter(range(30))

        def write(writer, table, tables=tables, error=error, own=pq.ParquetWriter.write_table):
            if next(tables) == 20:
                assert (folder / "out.unfinished/data/train-00000.parquet").is_file()
                raise error
            own(writer, table)

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr("pyarrow.parquet.ParquetWriter.write_table", write)
            convert("mosei", folder / "a.pkl", folder / "out", allow_mismatch=True)
        assert [path.name for path in folder.iterdir()] == ["a.pkl"]


def test_killed(folder):
    """A killed conversion leaves no corpus; the next run succeeds. Of two concurrent runs, the second fails."""
    expected = mmsa_pickle(folder / "a.pkl", (40, 3, 4))
    slow = (
        "import sys, time, corpora.mmsa as mmsa, corpora.schema as schema; from corpora.__main__ import main\n"
        "rows, schema._TABLE_ROWS = mmsa.sequence, 1\n"
        "mmsa.sequence = lambda *values: (time.sleep(0.2), rows(*values))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["mosei", str(folder / "a.pkl"), "--out", str(folder / "out"), "--allow_mismatch"]
    process = subprocess.Popen([sys.executable, "-c", slow, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    half = folder / "out.unfinished/data/train-00000.parquet"
    deadline = time.monotonic() + 120
    while not (half.is_file() and half.stat().st_size > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(FileExistsError, match="out.unfinished: another conversion is writing it"):
        convert("mosei", folder / "a.pkl", folder / "out", allow_mismatch=True)
    assert half.is_file()
    process.kill()
    process.wait()
    assert (folder / "out.unfinished").exists() and not (folder / "out").exists()
    with pytest.raises(FileNotFoundError):
        load_corpus("mosei", folder / "out.unfinished")
    assert main(command) == 0
    same_rows(load_corpus("mosei", folder / "out")["train"], expected["train"])
    assert not (folder / "out.unfinished").exists()


def test_command(folder, capsys):
    clip_table(folder / "sims", "meta.csv", "zh")
    command = ["simsv2", str(folder / "sims"), "--out", str(folder / "out")]
    with pytest.raises(ValueError, match="train: got 4 rows, published are 2722"):
        main(command)
    assert main([*command, "--allow_mismatch", "--corpus_options", '{"version": 1}']) == 0
    told = capsys.readouterr().out
    assert "simsv2: SIMS v1, clips" in told and "train: 4 rows in 1 files" in told and "clips: in 3 rows" in told
    assert "row left out: no label: 1 (first: 0007$_$0003)" in told
    (folder / "meld_train.pkl").write_bytes(b"cos\nsystem\n(X\x03\x00\x00\x00rantR.")
    for name in ("valid", "test"):
        (folder / f"meld_{name}.pkl").touch()
    with pytest.raises(ValueError, match="meld_train.pkl: byte 0: got 'os.system'"):
        main(["meld", str(folder), "--out", str(folder / "other")])


STALE = "data/train-00000-of-00009.parquet"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP API that an upload needs."""

    requests: list[tuple[str, bytes]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        self.requests.append((self.path, body))
        answer = {"url": "https://huggingface.co/datasets/me/sims", "name": "me/sims"}
        if self.path.endswith("/preupload/main"):
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            }
        elif "/tree/" in self.path:
            answer = [{"type": "file", "path": STALE, "size": 1, "oid": "1"}]
        elif "/commit/" in self.path:
            answer = {
                "commitUrl": f"{answer['url']}/commit/1",
                "commitOid": "1",
                "success": True,
            }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


def test_push_to_hub(folder, monkeypatch, capsys):
    """The real client uploads a private dataset to a local server, without the file that is of this machine alone.

    A shard of an earlier upload would give its rows twice.
    """
    clip_table(folder / "sims", "meta.csv", "zh")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    command = ["simsv2", str(folder / "sims"), "--allow_mismatch", "--push_to_hub", "me/sims"]
    outcome = main([*command, "--out", str(folder / "out")])
    server.shutdown()
    server.server_close()
    told = capsys.readouterr()
    assert outcome == 0, told.err
    assert f"dataset: http://127.0.0.1:{server.server_port}/datasets/me/sims" in told.out
    created = next(json.loads(body) for path, body in Hub.requests if path == "/api/repos/create")
    assert (created["name"], created["visibility"], created["type"]) == ("sims", "private", "dataset")
    committed = next(body for path, body in Hub.requests if "/commit/" in path)
    lines = [json.loads(line) for line in committed.splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] == "deletedFile"] == [STALE]
    sent = {line["value"].get("path") for line in lines if line["key"] != "deletedFile"} - {None}
    written = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*") if path.is_file()}
    assert sent == written - {"local.json"} and "local.json" in written

    assert main([*command, "--out", str(folder / "again")]) == 1  # there is no server any more
    told = capsys.readouterr().err
    assert "is written, but the upload failed" in told and "hf upload me/sims" in told
    assert "--private --exclude local.json --delete 'data/*.parquet'" in told
    assert (folder / "again/corpus.json").is_file()


def test_every_form_logs_and_notes_alike(folder, caplog):
    """A conversion reports the same notes that loading the files logs."""
    lfmim(folder, cherma.EMOTIONS)
    with caplog.at_level(logging.WARNING, logger="corpora.cherma"):
        load_corpus("cherma", folder)
    report = convert("cherma", folder, folder / "out", allow_mismatch=True)
    for part in report["splits"].values():
        for what, entry in part["notes"].items():
            assert f"{what}: {entry['count']}" in caplog.text
    assert "never verified" in describe(report)
