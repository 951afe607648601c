"""publish.py with a Hub on the loopback interface: the written files, the upload, and loading from the Hub.

The Hub is `hub_server.py`, which supports LFS but not Xet. The tests cannot verify the behaviour of the real Hub.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from endpoint_server import load_handler
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, SpaceCard, constants
from models import LORA_TARGETS, hubert
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

import eval as eval_script
import publish as publish_script
import train as train_script
from egmf.publishing.repository import build_folder, check_adapter, read_run, upload
from egmf.recipe_reading import load_recipe
from egmf.training.language_models import build_tiny_language_model


ROOT = Path(__file__).resolve().parents[1]
BASE, REPO = "someone/tiny-llama", "me/tiny-egmf"
SAMPLES = [{"text": "the film was wonderful"}, {"text": "the trip was awful"}, {"text": "well"}]
SHARDS = ["--max_shard_size", "300KB"]

# Loads a published model by id and revision, runs the code of its card, and leaves what it found in found.pt.
READER = """
import re, sys, torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor, pipeline
torch.set_num_threads(1)
repo, revision, samples = sys.argv[1], sys.argv[2], SAMPLES
found = {}
if revision != "adapter":
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    recognize = pipeline("affect-recognition", model=repo, revision=revision, trust_remote_code=True)
    found["pipeline"] = recognize(samples)
    found["module"] = type(model).__module__
(code,) = re.findall(r"^```python\\n(.*?)^```", ModelCard.load(repo).text, re.DOTALL | re.MULTILINE)
names = {}
exec(code, names)
if revision == "adapter":
    model, processor = names["model"], names["processor"]
else:
    found["main"] = names["recognize"](samples)
batch = processor(text=[sample["text"] for sample in samples], task="mosi")
with torch.no_grad():
    found["logits"] = model(**batch).logits
found["scores"] = model.score_labels(processor.candidates("mosi"), **batch).log_probs
torch.save(found, "found.pt")
""".replace("SAMPLES", repr(SAMPLES))


def environment(home: Path, hub: HubServer) -> dict[str, str]:
    """An environment with an empty cache, in which only this Hub is reachable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    kept |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}


def publish(run: Path, *arguments: str) -> None:
    publish_script.main([str(run), "--base_model", BASE, *arguments])


def publish_elsewhere(run: Path, home: Path, hub: HubServer, *arguments: str) -> str:
    """Run publish.py in a separate process, in which transformers also uses only this Hub."""
    process = start_publishing(run, home, hub, *arguments)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def start_publishing(run: Path, home: Path, hub: HubServer, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "publish.py"), str(run), "--base_model", BASE, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=environment(home, hub), **pipes)


def read(home: Path, hub: HubServer, revision: str) -> dict:
    """The answers of a new process that loads the model from the repository."""
    command = [sys.executable, "-I", "-c", READER, REPO, revision]
    process = subprocess.run(command, cwd=home, env=environment(home / "cache", hub), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(home / "found.pt", weights_only=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose language model is a local bfloat16 folder, evaluated on two splits."""
    root = tmp_path_factory.mktemp("publish")
    build_tiny_language_model(root / "llm")
    AutoModelForCausalLM.from_pretrained(root / "llm", dtype=torch.bfloat16).save_pretrained(root / "llm")
    options = ["--num_train_epochs", "1", "--corpus_options", '{"size": 96}', "--learning_rate", "2e-3"]
    recipe = [str(ROOT / "recipes/tiny.yaml"), "--language_model", str(root / "llm")]
    train_script.main([*recipe, "--output_dir", str(root / "run"), *options])
    for split in ("validation", "test"):
        arguments = ["--corpus", "generated", "--split", split, "--output", str(root / "run" / split)]
        eval_script.main([str(root / "run" / "model"), *arguments, "--corpus_options", "{}"])
    return root / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run without published files and checkpoints."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("hub", "checkpoint-*")))


@pytest.fixture(scope="module")
def hub(trained):
    with HubServer() as server:
        server.commit(BASE, files_of(trained.parent / "llm"))
        yield server


@pytest.fixture(scope="module")
def here(hub, tmp_path_factory):
    """The loopback Hub, configured for this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def on_hub(trained, here):
    """The merged model, published over a connection that breaks once: the commit and its files."""
    broken = threading.Event()

    def break_once(oid: str, size: int) -> None:
        if not broken.is_set():
            broken.set()
            raise ConnectionAbortedError

    here.on_upload = break_once
    publish(trained, "--repo", REPO, "--license", "mit", *SHARDS)
    here.on_upload = lambda oid, size: None
    assert broken.is_set()
    return here.repos[REPO].commits[-1], files_of(trained / "hub")


def test_dry_run_writes_the_folder_and_says_what_it_could_not_check(trained, run, tmp_path, monkeypatch, capsys):
    """Offline, the card has the figures of metrics.json, and no file names a local folder."""
    other = run / "other"
    shutil.copytree(run / "test", other)
    report = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(report | {"weights": "0" * 64}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    publish(run, "--repo", REPO, "--dry_run", *SHARDS)
    said = capsys.readouterr().out
    assert "could not be reached" in said and "has not seen it" in said
    assert f"left out: {other / 'metrics.json'}: it does not measure the weights that are in model/" in said
    assert "with 2 evaluations: test, validation" in said

    hub, model = run / "hub", run / "model"
    names = {path.name for path in hub.iterdir()}
    assert {path.name for path in model.iterdir()} - {"model.safetensors"} <= names
    assert {"README.md", "LICENSE", "recipe.yaml", "model.safetensors.index.json"} <= names
    shards = sorted(hub.glob("model-*.safetensors"))
    assert len(shards) > 1
    weights = {name: value for path in shards for name, value in load_file(path).items()}
    whole = load_file(model / "model.safetensors")
    assert weights.keys() == whole.keys() and all(torch.equal(weights[name], whole[name]) for name in whole)

    card = ModelCard.load(hub / "README.md")
    figures = []
    for split in ("test", "validation"):
        measured = json.loads((trained / split / "metrics.json").read_text())
        assert (measured["split"], measured["corpus"]) == (split, "generated")
        assert set(measured["answers"]) == {"greedy", "distribution", "experts", "llm"}
        for answer in ("greedy", "distribution"):  # the model's own answers, not those of its parts
            row = measured["answers"][answer]
            for name in ("accuracy", "weighted_f1", "ua"):
                low, high = measured["intervals"][answer][name]
                figures.append((split, answer, row[name], f"95 % interval {low:.4f} to {high:.4f}"))
    results = card.data.eval_results
    assert len(results) == len(figures) == 12
    for result, (split, answer, value, interval) in zip(results, figures, strict=True):
        assert (result.dataset_split, result.dataset_type, result.metric_value) == (split, "generated", value)
        assert f"{answer} answer" in result.metric_name and interval in result.metric_name
        assert f"{value:.4f}" in card.text
    assert card.data.base_model == BASE and card.data.license == "other"

    private = [str(path) for path in (tmp_path, trained.parent, ROOT, Path.home())]
    for path in hub.iterdir():
        content = path.read_bytes()
        assert not [name for name in private if name.encode() in content], path.name


def test_the_folder_has_what_an_inference_endpoint_needs(run, monkeypatch):
    """Its handler answers, and its requirements are those of its code, but for what an endpoint's image has."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    hub = build_folder(read_run(run, BASE), REPO, None, False, "5GB")
    answers = load_handler(str(hub))({"inputs": SAMPLES, "parameters": {"top_k": 1}})
    assert [len(answer["probabilities"]) for answer in answers] == [1] * len(SAMPLES)
    missing = ["the model reads audio and vision as precomputed features, and none were given"]
    assert all(answer["error"] is None and answer["warnings"] == missing for answer in answers)

    imported = set()
    for path in hub.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    needed = {name for module in imported for name in distributions.get(module, [])}
    pinned = set((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    required = set((hub / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert required <= pinned
    assert {line.partition("==")[0] for line in required} == {name.replace("_", "-") for name in needed} - {
        "torch",
        "numpy",
    }


def test_dry_run_asks_the_hub_where_it_can(here, run, capsys):
    publish(run, "--repo", "me/asked", "--dry_run")
    assert "the Hub finds it valid" in capsys.readouterr().out and "me/asked" not in here.repos
    assert here.requests[-1] == ("POST", "/api/validate-yaml")


def test_the_published_recipe_is_the_runs_own(trained, run, tmp_path):
    """`train.py hub/recipe.yaml` has the settings of the original run."""
    build_folder(read_run(run, BASE), REPO, None, False, "5GB")
    options = ["--num_train_epochs", "1", "--corpus_options", '{"size": 96}', "--learning_rate", "2e-3"]
    ran = load_recipe([str(ROOT / "recipes/tiny.yaml"), "--language_model", BASE, *options])
    again = load_recipe([str(run / "hub" / "recipe.yaml")])
    assert again.record() == ran.record()
    assert again.training_record() == ran.training_record()
    assert again.training_record()["learning_rate"] == 2e-3 and "output_dir" not in again.fields


def test_one_commit_has_the_folder_byte_for_byte(hub, on_hub):
    commit, files = on_hub
    first, *others = hub.repos[REPO].commits
    assert first.files.keys() == {".gitattributes"} and others[0] is commit and commit.title == "Publish with EGMF"
    assert commit.files == first.files | files
    assert commit.large >= {name for name in files if name.endswith(".safetensors")} != set()
    assert [path for method, path in hub.requests if "/commit/" in path][:1] == [f"/api/models/{REPO}/commit/main"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and "under `mit`" in card.text


@pytest.mark.slow
def test_loads_by_id_and_revision_in_a_fresh_process(trained, hub, on_hub, tmp_path):
    """Model, processor and pipeline give the answers of the local folder; a later commit on main has no effect."""
    commit, files = on_hub
    folder = tmp_path / "changed"
    shutil.copytree(trained / "model", folder)
    model = train_script.EGMFForConditionalGeneration.from_pretrained(folder).eval()
    processor = train_script.EGMFProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(text=[sample["text"] for sample in SAMPLES], task="mosi")
    with torch.no_grad():
        logits = model(**batch).logits
        scores = model.score_labels(processor.candidates("mosi"), **batch).log_probs
        for parameter in model.model.language_model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder, max_shard_size="300KB")
    later = {path.name: path.read_bytes() for path in folder.glob("model-*")}
    assert later.keys() == {name for name in files if name.startswith("model-")}
    hub.commit(REPO, later)

    found = read(tmp_path, hub, commit.oid)
    assert found["module"].startswith("transformers_modules.")
    assert torch.equal(found["logits"], logits) and torch.equal(found["scores"], scores)
    summaries = [one.probabilities for one in processor.summarize(scores, "mosi")]
    for answer, main, alone in zip(found["pipeline"], found["main"], summaries, strict=True):
        assert answer["probabilities"] == pytest.approx(alone, abs=1e-5)
        assert main["probabilities"] != pytest.approx(alone, abs=1e-3)
    command = [sys.executable, str(ROOT / "predict.py"), REPO, "--text", SAMPLES[0]["text"]]
    options = {"cwd": tmp_path, "env": environment(tmp_path / "cache", hub), "capture_output": True, "text": True}
    outcome = subprocess.run([*command, "--revision", commit.oid], **options)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["probabilities"] == pytest.approx(summaries[0], abs=1e-5)
    assert not [path for _, path in hub.unknown if REPO in path]


@pytest.mark.slow
def test_adapter_alone_gives_what_the_merged_model_gives(trained, hub, on_hub, run, tmp_path):
    """Publishing the adapter to the merged model's repository removes the merged weights and keeps foreign files."""
    by_hand = {"notes.md": b"by hand", "onnx/model.safetensors": b"of another kind"}
    hub.commit(REPO, by_hand)
    before = len(hub.repos[REPO].commits)
    said = publish_elsewhere(run, tmp_path, hub, "--repo", REPO, "--adapter_only")
    assert hub.repos[REPO].commits[-1].oid in said
    assert len(hub.repos[REPO].commits) == before + 1
    files = hub.repos[REPO].commits[-1].files
    assert files == files_of(run / "hub") | by_hand | {".gitattributes": files[".gitattributes"]}
    assert not [name for name in files if name.startswith("model") and name.endswith((".safetensors", ".index.json"))]
    config = json.loads(files["adapter_config.json"])
    base = hub.repos[BASE].commits[-1].oid
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base)
    data = ModelCard(files["README.md"].decode()).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", BASE, "adapter")

    found = read(tmp_path, hub, "adapter")
    model = train_script.EGMFForConditionalGeneration.from_pretrained(trained / "model").eval()
    processor = train_script.EGMFProcessor.from_pretrained(trained / "model", trust_remote_code=True)
    batch = processor(text=[sample["text"] for sample in SAMPLES], task="mosi")
    with torch.no_grad():
        assert (found["logits"] - model(**batch).logits).abs().max() < 1e-4
        bare = AutoModelForCausalLM.from_pretrained(trained.parent / "llm")
        untrained = bare(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (found["logits"] - untrained).abs().max() > 0.1  # it matters that the adapter is there
    scores = model.score_labels(processor.candidates("mosi"), **batch).log_probs
    assert (found["scores"] - scores).abs().max() < 1e-4


@pytest.mark.slow
def test_a_killed_upload_goes_on_where_it_was(hub, run, tmp_path):
    """After SIGKILL during the upload, the repository is unchanged, and a shard that has arrived is not sent again."""
    # Weights of its own: nothing of them is on the Hub yet.
    shard = run / "model" / "model.safetensors"
    train_script.EGMFForConditionalGeneration.from_pretrained(run / "model").half().save_pretrained(run / "model")
    assert shard.exists()
    repo, arguments = "me/interrupted", ("--repo", "me/interrupted", "--max_shard_size", "100KB")
    earlier, first, held = set(hub.objects), [], threading.Event()

    def hold_all_but_the_first(oid: str, size: int) -> None:
        with hub.lock:
            first.extend([oid] * (not first))
        if oid != first[0]:
            while first[0] not in hub.objects:
                time.sleep(0.01)
            held.set()
            time.sleep(60)  # killed by then

    hub.on_upload = hold_all_but_the_first
    process = start_publishing(run, tmp_path, hub, *arguments)
    assert held.wait(400)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    hub.on_upload = lambda oid, size: None
    assert set(hub.objects) - earlier == set(first)
    assert [set(commit.files) for commit in hub.repos[repo].commits] == [{".gitattributes"}]

    sent = len(hub.received)
    said = publish_elsewhere(run, tmp_path, hub, *arguments)
    assert hub.repos[repo].commits[-1].oid in said
    head = hub.repos[repo].commits[-1]
    assert len(hub.repos[repo].commits) == 2
    assert {name: head.files[name] for name in files_of(run / "hub")} == files_of(run / "hub")
    again = hub.received[sent:]
    assert first[0] not in again and len(again) == len(list((run / "hub").glob("*.safetensors"))) - 1 > 0


def test_a_second_time_makes_no_commit(here, on_hub, trained):
    """Publishing unchanged files again sends nothing."""
    before, sent = len(here.repos["me/twice"].commits) if "me/twice" in here.repos else 0, len(here.received)
    first = upload(trained / "hub", "me/twice", private=False)
    assert len(here.repos["me/twice"].commits) == before + 2
    assert upload(trained / "hub", "me/twice", private=False).oid == first.oid
    assert len(here.repos["me/twice"].commits) == before + 2 and len(here.received) == sent


def test_private(here, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    upload(tmp_path, "me/hidden", private=True)
    assert here.repos["me/hidden"].private
    upload(tmp_path, "me/shown", private=False)
    commits = len(here.repos["me/shown"].commits)
    with pytest.raises(ValueError, match="private: got 'me/shown', which is there already and is public"):
        upload(tmp_path, "me/shown", private=True)
    assert len(here.repos["me/shown"].commits) == commits


def test_a_card_that_the_hub_refuses_is_not_published(here, tmp_path):
    (tmp_path / "README.md").write_text("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        upload(tmp_path, "me/refused", private=False)
    assert len(here.repos["me/refused"].commits) == 1


def test_without_figures_the_card_says_so(run):
    for path in run.rglob("metrics.json"):
        path.unlink()
    card = ModelCard.load(build_folder(read_run(run), REPO, None, False, "5GB") / "README.md")
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict() and not card.data.metrics
    assert "No evaluation results are included." in card.text and "It has not been evaluated." in card.text
    assert card.data.base_model is None  # the folder's name is no Hub id


def test_a_folder_with_files_of_others_is_left_alone(run):
    (run / "hub").mkdir()
    (run / "hub" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="hub: got notes.md, wanted nothing but what publish.py writes there"):
        build_folder(read_run(run), REPO, None, False, "5GB")
    assert files_of(run / "hub") == {"notes.md": b"mine"}
    (run / "hub" / "notes.md").rename(run / "hub" / "model-00001-of-00009.safetensors")
    assert "model-00001-of-00009.safetensors" not in files_of(build_folder(read_run(run), REPO, None, False, "5GB"))


def test_a_path_of_this_machine_is_not_published(run):
    recipe = json.loads((run / "model" / "recipe.json").read_text())
    recipe["corpus_options"] |= {"media": str(run / "clips"), "labels": str(run / "labels.csv")}
    (run / "model" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=rf"README.md: got {re.escape(str(run))}, a folder of this machine"):
        build_folder(read_run(run), REPO, None, False, "5GB")
    assert not (run / "hub").exists()


@pytest.mark.parametrize(
    ("arguments", "gone", "message"),
    [
        (["--repo", "me/x", "--dry_run"], "model", "got no model/config.json, wanted the output_dir of a train.py"),
        (["--repo", "me/x", "--dry_run"], "model/model.safetensors", r"got no model/\*.safetensors"),
        (["--repo", "me", "--dry_run"], None, r"repo: got 'me', wanted OWNER/NAME \(it has no owner\)"),
        (["--repo", "me/a b", "--dry_run"], None, "repo: got 'me/a b', wanted OWNER/NAME"),
        (["--repo", "me/x"], None, "token: got none, wanted the one of `hf auth login`, or HF_TOKEN"),
        (["--repo", "me/x", "--dry_run", "--adapter_only"], None, "base_model: got 'llm', a local folder or a random"),
        (["--repo", "me/x", "--dry_run", "--adapter_only"], "adapter", "adapter: got no adapter_config.json"),
    ],
)
def test_what_is_wrong_is_named(run, arguments, gone, message, monkeypatch):
    monkeypatch.setattr(publish_script, "get_token", lambda: None)
    if gone:
        path = run / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish_script.main([str(run), *arguments])


def test_commands_of_the_docs_parse():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("publishing.md", "page.md")]
    lines = "\n".join(pages).splitlines()
    commands = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python publish.py")]
    parsed = [publish_script.parse_arguments(command) for command in commands]
    # A page shows models that read clips.
    assert [str(one.run) for one in parsed] == ["runs/mosi"] * 3 + ["runs/own_clips"] * 2
    assert [bool(one.space) for one in parsed] == [False] * 4 + [True]
    assert {one.repo for one in parsed} == {"OWNER/NAME"}


def test_a_run_of_an_older_architecture_is_refused(run):
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"architecture": 2}))
    with pytest.raises(ValueError, match="a model of architecture 2, wanted one of 3"):
        read_run(run)


def test_a_run_older_than_a_field_of_recipes_is_published(run):
    recipe = json.loads((run / "model" / "recipe.json").read_text())
    del recipe["speaker_mixing"]
    (run / "model" / "recipe.json").write_text(json.dumps(recipe))
    card = ModelCard.load(build_folder(read_run(run), REPO, None, False, "5GB") / "README.md")
    assert "fusion:\n  num_pseudo_tokens: 4\n" in card.text and "speaker_mixing" not in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_shard_size", "5"], "--max_shard_size: got '5', wanted a number with KB, MB, GB or TB"),
        (["--space", "page", "--private"], "--private: got a value with --space, which writes a page and no model"),
    ],
)
def test_arguments_that_do_not_fit(run, arguments, message, capsys):
    with pytest.raises(SystemExit):
        publish_script.main([str(run), "--repo", "me/x", *arguments])
    assert message in capsys.readouterr().err


def test_half_an_evaluation_is_left_out_and_named(run):
    file = run / "test" / "metrics.json"
    file.write_text(file.read_text()[:100])
    state = read_run(run)
    assert [*state.evaluations] == ["validation"] and state.left_out == [f"{file}: it is not JSON; evaluate again"]


def test_half_a_line_of_the_log_is_left_out_and_named(run):
    whole = len(read_run(run).log)
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    state = read_run(run)
    assert len(state.log) == whole > 0
    assert state.left_out == [f"{run / 'log.jsonl'}: line {whole + 1} is not JSON"]


def test_a_base_model_other_than_the_runs_is_refused(run):
    recipe = json.loads((run / "model" / "recipe.json").read_text())
    (run / "model" / "recipe.json").write_text(json.dumps(recipe | {"language_model": "Qwen/Qwen3-0.6B"}))
    with pytest.raises(ValueError, match="base_model: got 'me/other', wanted 'Qwen/Qwen3-0.6B'"):
        read_run(run, "me/other")
    assert read_run(run).base_model == "Qwen/Qwen3-0.6B"


def test_an_adapter_on_other_weights_is_not_published(trained, run, tmp_path):
    """A base with the same architecture and tokenizer but other weights would make it a different model."""
    published_folder = build_folder(read_run(run, BASE), REPO, None, True, "5GB")
    state = read_run(run)
    state.base_model = str(trained.parent / "llm")  # as from the Hub
    check_adapter(state, published_folder)
    build_tiny_language_model(tmp_path / "other", seed=1)
    state.base_model = str(tmp_path / "other")
    with pytest.raises(ValueError, match="base_model: got .*, on which the adapter makes another .* than model/ has"):
        check_adapter(state, published_folder)


def test_the_saved_model_has_all_that_lora_learned(trained):
    """The model is saved and loaded in float32, because bfloat16 would round half of the changes away."""
    base = load_file(trained.parent / "llm" / "model.safetensors")
    files = ("adapter/adapter_model.safetensors", "model/model.safetensors")
    (adapter, saved), layers = (load_file(trained / file) for file in files), 0
    lora_config = LoraConfig.from_pretrained(trained / "adapter")
    scale = lora_config.lora_alpha / lora_config.r
    for name, before in base.items():
        own = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        lora = [adapter.get(f"base_model.model.{own.removesuffix('weight')}lora_{part}.weight") for part in "BA"]
        wanted = before.float()
        if lora[0] is not None:
            change, layers = scale * lora[0] @ lora[1], layers + 1
            wanted += change
            rounded = wanted.bfloat16().float() - before.float()
            assert (rounded - change).norm() > 0.05 * change.norm()  # it matters
        assert saved[own].dtype == torch.float32
        torch.testing.assert_close(saved[own][: len(wanted)], wanted, rtol=0, atol=1e-6)
    assert layers == 14
    model = train_script.EGMFForConditionalGeneration.from_pretrained(trained / "model")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name] if name in saved else saved[model._tied_weights_keys[name]]), name
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_tower_travels_with_the_adapter_unless_the_hub_has_it(tmp_path, llm_folder, assemble, processor, on_the_hub):
    torch.manual_seed(3)
    tower = hubert()
    tower.save_pretrained(tmp_path / "tower")
    model = assemble(audio_tower=str(tmp_path / "tower"), audio_input_rate=16000)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LORA_TARGETS, modules_to_save=["fusion", "readout"])
    adapted, run = get_peft_model(model, lora), tmp_path / "run"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(run / "adapter")
    recipe = load_recipe(
        [str(ROOT / "recipes/tiny.yaml"), "--language_model", BASE, "--audio_tower", "someone/hubert"]
    )
    recipe.phases.tower_epochs = 0 if on_the_hub else 1  # it would have been trained, then frozen
    train_script.save_model(recipe, adapted.merge_and_unload(), processor, run / "model")

    state = read_run(run)
    assert state.hub_towers == ({"audio": "someone/hubert"} if on_the_hub else {})
    folder = build_folder(state, REPO, None, True, "5GB")
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "audio-text-to-text" and 'audio="clip.wav"' in card.text
    assert ('audio_tower="someone/hubert"' in card.text) == on_the_hub
    saved = load_file(folder / "adapter_model.safetensors")
    assert any(".audio_tower." in name for name in saved) != on_the_hub
    state.base_model = llm_folder()
    state.hub_towers = {"audio": str(tmp_path / "tower")} if on_the_hub else {}
    check_adapter(state, folder)


def imported_by(files) -> set[str]:
    """The packages that files import, by their names for pip."""
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
    names = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"egmf", "egmf_worker"}
    distributions = packages_distributions()
    return {re.sub("[-_.]+", "-", one).lower() for name in names for one in distributions.get(name, [name])}


@pytest.fixture
def space(run, tmp_path) -> Path:
    """A Space for the published model, with an example."""
    (tmp_path / "clip.wav").write_bytes(b"sound")
    example = ["--example", str(tmp_path / "clip.wav"), "the film was wonderful"]
    publish(run, "--repo", REPO, "--space", str(tmp_path / "space"), *example, "--transcriber", "someone/whisper")
    return tmp_path / "space"


def test_a_space_is_complete(space, tmp_path, run):
    card = SpaceCard.load(space / "README.md")
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert (card.data.sdk, card.data.app_file, card.data.sdk_version) == ("gradio", "app.py", pins["gradio"])
    assert card.data.models == [REPO, "someone/whisper"] and "Do not use it on people" in card.text
    settings = json.loads((space / "space.json").read_text())
    assert (settings["model"], settings["transcriber"]) == (REPO, "someone/whisper")
    assert settings["examples"] == [["examples/1_clip.wav", "the film was wonderful"]]
    assert (space / "examples/1_clip.wav").read_bytes() == b"sound"
    assert imported_by([*space.rglob("*.py"), *(run / "model").glob("*.py")]) <= pins.keys()
    own = re.findall(r"^ *(?:from|import) (egmf(?:\.\w+)+)", "\n".join(map(Path.read_text, space.rglob("*.py"))), re.M)
    places = {name: name.replace(".", "/") for name in own}
    for name, place in places.items():  # the modules of the root belong to the package, too
        files = (f"{place}.py", f"{place}/__init__.py", f"{place.removeprefix('egmf/')}.py")
        assert any((space / file).is_file() for file in files), name
    private = [str(path) for path in (tmp_path, ROOT, Path.home())]
    for path in space.rglob("*"):
        assert not path.is_file() or not [name for name in private if name.encode() in path.read_bytes()], path
    with pytest.raises(ValueError, match=r"--space: got .*, which has files, wanted a new folder"):
        publish(run, "--repo", REPO, "--space", str(space))
    with pytest.raises(ValueError, match="--transcriber: got the local .*, wanted the id of a model on the Hub"):
        publish(run, "--repo", REPO, "--space", str(tmp_path / "other"), "--transcriber", str(tmp_path))
    with pytest.raises(ValueError, match="--example: got gone.mp4, wanted an existing file"):
        publish(run, "--repo", REPO, "--space", str(tmp_path / "other"), "--example", "gone.mp4", "")
    with pytest.raises(SystemExit):
        publish(run, "--repo", REPO, "--example", "clip.mp4", "well")


@pytest.mark.slow
def test_a_space_shows_the_model_of_the_hub(space, hub, on_hub, trained, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed; see requirements-space.txt")
    gradio_client = pytest.importorskip("gradio_client")
    publish(trained, "--repo", REPO, "--license", "mit", *SHARDS)  # another test leaves the adapter alone there
    settings = json.loads((space / "space.json").read_text())
    (space / "space.json").write_text(json.dumps(settings | {"transcriber": None}))  # the loopback Hub has none
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment(tmp_path / "cache", hub) | {"GRADIO_SERVER_PORT": str(port)}
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=variables, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while "Running on" not in (tmp_path / "said.txt").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.2)
        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        (answer,) = client.predict(file=None, words=SAMPLES[0]["text"], labels="", api_name="/answer")
        wanted = pipeline("affect-recognition", model=str(trained / "model"), trust_remote_code=True)(SAMPLES[0])
        assert answer["label"] == wanted["label"]
        assert client.config["title"] == REPO
    finally:
        process.terminate()
        process.wait()
