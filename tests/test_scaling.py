"""Two real processes (gloo), and options that save memory: the results equal those of one ordinary process."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from commands import REPO, read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval as eval_script
import train as train_script
from corpora import load_corpus
from egmf.evaluation.predictor import Predictor
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processes import available_cores
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe_reading import load_recipe
from egmf.training.checkpoints import damage_of, steps_of
from egmf.training.language_models import build_tiny_language_model


CONFIGS = sorted((REPO / "recipes" / "accelerate").glob("*.yaml"))
ON_TWO = ["accelerate.commands.launch", "--config_file", str(REPO / "recipes" / "accelerate" / "cpu_2.yaml")]
# No dropout of any kind; 64 rows to train on, 16 to validate: with batches of 5 on two processes the last is not full.
FIELDS = ["--corpus_options", '{"size": 96}', "--modality_dropout", "{}", "--num_train_epochs", "2"]
FIELDS += ["--per_device_eval_batch_size", "5"]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def train(output: Path, *fields) -> Path:
    """Train in this process and return the output folder."""
    train_script.main([str(REPO / "recipes/tiny.yaml"), "--output_dir", str(output), *FIELDS, *map(str, fields)])
    return output


def start(*arguments, **environment) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    process = subprocess.run(command, cwd=REPO, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]


def worker(name: str, folder: Path, *arguments) -> list[dict]:
    """The output of each of two processes of `workers.py`."""
    start("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "tests/workers.py", name, folder, *arguments)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def curve(run: Path) -> list[dict]:
    """Losses, gradient norms and validation figures of a run."""
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_weighted_f1", "eval_unparsable")
    rows = [{name: row[name] for name in kept if name in row} for row in read_lines(run / "log.jsonl")]
    return [row for row in rows if len(row) > 1]


def assert_alike(first: Path, second: Path, tolerance: float = 1e-3) -> None:
    """Assert that two runs have the same curve and weights, except for rounding."""
    assert len(curve(first)) == len(curve(second)) > 2
    for one, two in zip(curve(first), curve(second), strict=True):
        assert one.keys() == two.keys()
        # In bfloat16 rounding may turn one of the 16 validation answers; the loss has no such steps.
        counted = {"eval_accuracy", "eval_weighted_f1"} if tolerance > 1e-3 else set()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=tolerance, abs=2 / 16 if name in counted else tolerance), name
    one, two = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith("readout.gain"):  # fitted on a grid: rounding may choose its neighbour
            assert (value.float() - two[name].float()).abs().max() < 2 * tolerance, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of one process with batches of 16."""
    return train(tmp_path_factory.mktemp("whole"), "--per_device_train_batch_size", 16)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """A run of two processes with batches of 8 each."""
    output = tmp_path_factory.mktemp("halves")
    fields = [*FIELDS, "--per_device_train_batch_size", 8, "--output_dir", output]
    start(*ON_TWO, "train.py", "recipes/tiny.yaml", *fields)
    return output


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_that_accelerate_launches(config):
    """Accelerate knows all fields, and the processes receive the configured settings."""
    fields = load_config_from_file(str(config))
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == fields.num_processes > 1
    if arguments.use_deepspeed:
        stage = int(config.stem[-1])
        assert fields.deepspeed_config["zero_stage"] == stage
        if not HAS_DEEPSPEED:
            pytest.skip("deepspeed is not installed: its plugin is not built")
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
        with patch_environment(**environment):
            plugin = DeepSpeedPlugin()
        assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
        assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto" and not plugin.zero3_init_flag
        return
    assert arguments.multi_gpu or arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert arguments.nproc_per_node == {"cpu_2": "2"}.get(config.stem, "8")
    assert getattr(arguments, "nnodes", None) == ("2" if config.stem == "ddp_multinode" else None)
    assert arguments.use_fsdp == (config.stem == "fsdp2")
    if arguments.use_fsdp:
        with patch_environment(**environment):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_accumulated_gradients_are_those_of_the_larger_batch(whole, tmp_path):
    fields = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2]
    assert_alike(whole, train(tmp_path, *fields))


def test_activations_computed_again_change_nothing(whole, tmp_path):
    fields = ["--per_device_train_batch_size", 16, "--gradient_checkpointing", "true"]
    assert_alike(whole, train(tmp_path, *fields), tolerance=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(whole, halves):
    """Losses and weights agree. Validation counts every row once, although its last batch is not full."""
    assert_alike(whole, halves)
    assert [row["step"] for row in curve(halves)] == [4, 5, 8]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [None, "mmin"])
def test_two_processes_evaluate_what_one_evaluates(halves, tmp_path, protocol):
    """The model saved by two processes answers each of the 16 rows once, in the order of the corpus."""
    arguments = ["eval.py", halves / "model", "--corpus", "generated", "--batch_size", 3]
    arguments += ["--robustness", protocol] if protocol else []
    start(*ON_TWO, *arguments, "--output", tmp_path / "two")
    eval_script.main([*map(str, arguments[1:]), "--output", str(tmp_path / "one")])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    report = f"{protocol or 'metrics'}.json"
    one, two = (json.loads((tmp_path / name / report).read_text()) for name in ("one", "two"))
    if protocol:
        assert two["conditions"] == one["conditions"] and len(one["conditions"]) == 7
        return
    # Probabilities depend on the batch by rounding, and so does what is computed from them.
    for name in ("before", "after"):
        rounded = one["calibration"].pop(name)
        assert two["calibration"].pop(name) == pytest.approx(rounded, abs=1e-5)
    assert two == one and one["samples"] == 16
    one, two = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [row["id"] for row in two] == load_corpus("generated", size=96)["test"]["id"][:]
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys() and shared["greedy_text"] == alone["greedy_text"]
        assert shared["answers"] == alone["answers"] and shared["gold"] == alone["gold"]
        assert shared["distribution"] == pytest.approx(alone["distribution"], abs=1e-5)


@pytest.mark.slow
def test_processes_share_an_order_and_not_their_random_numbers(tmp_path):
    """With rows grouped by length, each row occurs on one process per epoch, and dropout differs between processes."""
    found = worker("order", tmp_path)
    steps = len(found[0]["rows"]) // 2
    for epoch in range(2):
        batches = [process["rows"][epoch * steps : (epoch + 1) * steps] for process in found]
        seen = [row for process in batches for rows, _ in process for row in rows]
        assert set(seen) == set(range(37)) and len(seen) == 42  # the last batches are filled up
    assert not set(found[0]["drawn"]) & set(found[1]["drawn"])
    for process in found:  # 7 steps an epoch: the run resumes inside the second one
        assert process["resumed"] == process["rows"][10:]


@pytest.mark.slow
def test_processes_fill_a_cache_together(tmp_path):
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(paths[-1], np.random.default_rng(number).normal(0, 0.1, 8000), 16000)
    Path(paths[3]).write_bytes(b"no sound")
    found = worker("cache", tmp_path, *paths)
    assert sorted(len(process["made"]) for process in found) == [1, 3]
    assert not set(found[0]["made"]) & set(found[1]["made"])
    for process in found:
        assert list(process["errors"]) == [paths[3]] and process["errors"] == found[0]["errors"]
        assert process["here"] == [True, True, True, False, True]


@pytest.mark.slow
def test_two_processes_go_through_all_phases(tmp_path):
    """Towers, fusion and LLM train on generated clips; a second run starts from the existing files."""
    options = {"language_model": "tiny-random", "corpus_dir": tmp_path / "clips", "num_frames": 4, "bf16": False}
    options |= {"corpus_options": '{"train": 24, "validation": 24, "test": 24}', "per_device_train_batch_size": 6}
    options |= {"tower_epochs": 1, "fusion_epochs": 1, "fusion_batch_size": 6, "num_train_epochs": 1}
    options |= {"output_dir": tmp_path / "run", "save_strategy": "epoch", "gradient_checkpointing": True}
    fields = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    for _ in range(2):
        start(*ON_TWO, "train.py", "recipes/avatars_towers.yaml", *fields, HF_HOME=str(tmp_path / "hub"))
    log = read_lines(tmp_path / "run" / "log.jsonl")
    phases = [row.get("phase") for row in log if "train_runtime" in row]
    assert phases[:4] == ["audio_tower", "vision_tower", "fusion", None]
    assert [row["step"] for row in log if "train_runtime" in row][:4] == [
        2,
        2,
        4,
        4,
    ]  # 24 rows, of two tasks in the end
    # One entry a clip of what the trained towers read, one of what the frozen ones give.
    caches = {folder: len([*folder.rglob("*.safetensors")]) for folder in (tmp_path / "hub/egmf/towers").iterdir()}
    assert len(caches) == 4 and all(count % 48 == 0 for count in caches.values())
    model = EGMFForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    towers = load_file(tmp_path / "run" / "towers" / "vision" / "model.safetensors")
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, towers[name]), name


def start_divided(way: str, *fields) -> None:
    """Run train.py in two processes that divide the model: `way` is a configuration of FSDP2 or DeepSpeed."""
    config = next(path for path in CONFIGS if path.stem == way)
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments = _validate_launch_command(arguments)[0]
    if arguments.use_deepspeed:
        set_fields = load_config_from_file(str(config)).deepspeed_config
        arguments.deepspeed_fields_from_accelerate_config = ",".join(set_fields)
        environment = prepare_deepspeed_cmd_env(arguments)[1] | {"DS_ACCELERATOR": "cpu"}
    else:
        environment = prepare_multi_gpu_env(arguments)
    told = {name: value for name, value in environment.items() if name.startswith(("FSDP", "ACCELERATE", "DS_"))}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "tests/workers.py", "divided", *fields]
    start(*command, **told)


def assert_resumes(way: str, output: Path, *fields) -> None:
    """Assert that a run without its last checkpoint and its model goes on from the checkpoint before, to the same end.

    `fields` are those of the run in the folder `output`.
    """
    first = output.with_name("first")
    shutil.copytree(output, first)
    for folder in ("checkpoint-8", "adapter", "model"):
        shutil.rmtree(output / folder)
    start_divided(way, *fields)
    assert_alike(first, output, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_processes_whose_batches_lack_different_modalities_go_on(tmp_path, way):
    """With one row per process, in most steps one process has a modality that the other lacks.

    The LLM's head has weights of its own, which FSDP2 divides by themselves.
    """
    build_tiny_language_model(tmp_path / "llm", tie_word_embeddings=False)
    fields = ["--corpus_options", '{"size": 36}', "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    fields += [
        "--modality_dropout",
        '{"text": 0.6, "audio": 0.6, "vision": 0.6}',
        "--max_steps",
        6,
        "--logging_steps",
        1,
    ]
    fields += ["--per_device_train_batch_size", 1, "--output_dir", tmp_path, "--ddp_find_unused_parameters", "false"]
    fields += ["--language_model", tmp_path / "llm"]
    if way == "fsdp2":
        start_divided("fsdp2", "recipes/tiny.yaml", *fields)
    else:
        start(*ON_TWO, "train.py", "recipes/tiny.yaml", *fields)
    losses = [line["loss"] for line in read_lines(tmp_path / "log.jsonl") if "loss" in line]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_fsdp_learns_what_one_process_learns(tmp_path):
    """FSDP2 works with a bfloat16 LLM, a float32 fusion that must stay float32, and tied embeddings."""
    build_tiny_language_model(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    # At the recipe's rate, the first steps change so much that bfloat16's rounding decides more than the tolerance.
    own = ["--language_model", tmp_path / "llm", "--gradient_checkpointing", "true", "--learning_rate", "1e-3"]
    one = train(tmp_path / "one", *own, "--per_device_train_batch_size", 16)
    fields = ["recipes/tiny.yaml", *FIELDS, *own, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "two"]
    start_divided("fsdp2", *fields)
    assert (tmp_path / "two" / "checkpoint-8" / "pytorch_model_fsdp.bin").exists()
    assert_alike(one, tmp_path / "two", tolerance=2e-2)
    weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
    parts = ("model.fusion.", "model.language_model.")
    kinds = {part: {value.dtype for key, value in weights.items() if key.startswith(part)} for part in parts}
    assert kinds == {"model.fusion.": {torch.float32}, "model.language_model.": {torch.float32}}
    assert_resumes("fsdp2", tmp_path / "two", *fields)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("way", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_learns_what_one_process_learns(whole, tmp_path, way):
    """It also resumes, and no saved tensor is empty: of the adapters, or of the merged model, which answers."""
    output = tmp_path / "run"
    fields = ["recipes/tiny.yaml", *FIELDS, "--per_device_train_batch_size", 8, "--output_dir", output]
    start_divided(way, *fields)
    assert_alike(whole, output)
    for name in ("checkpoint-8", "adapter"):
        saved = load_file(output / name / "adapter_model.safetensors")
        wanted = load_file(whole / name / "adapter_model.safetensors")
        assert {key: value.shape for key, value in saved.items()} == {
            key: value.shape for key, value in wanted.items()
        }
    eval_script.main([str(output / "model"), "--corpus", "generated", "--output", str(tmp_path / "test")])
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["samples"] == 16
    assert_resumes(way, output, *fields)


def test_phases_are_not_for_divided_models(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fusion_epochs: got 1 .* wanted 0, or recipes/accelerate/ddp.yaml"):
        train(tmp_path, "--fusion_epochs", 1)
    with pytest.raises(ValueError, match="load_in_4bit: got true .* wanted false"):
        train(tmp_path, "--load_in_4bit", "true")
    monkeypatch.setattr("egmf.recipe_reading.has_fast_bfloat16", lambda: True)
    with pytest.raises(ValueError, match="bf16: got true .* wanted false: the inputs of the fusion"):
        train(tmp_path, "--bf16", "true")


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_four_bits_need_bitsandbytes(tmp_path):
    with pytest.raises(ValueError, match="load_in_4bit: got true, wanted the package bitsandbytes"):
        train(tmp_path, "--load_in_4bit", "true")


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_four_bits_learn_and_become_a_model_that_needs_no_bitsandbytes(whole, tmp_path):
    """Gradients pass through every 4-bit layer, and the saved model gives the answers of the trained one."""
    output = train(tmp_path, "--per_device_train_batch_size", 16, "--load_in_4bit", "true")
    norms = [row["grad_norm"] for run in (whole, output) for row in curve(run) if "grad_norm" in row]
    assert norms[1] == pytest.approx(norms[0], rel=0.5)
    config = json.loads((output / "model" / "config.json").read_text())
    assert "quantization_config" not in config | config["text_config"]
    model = EGMFForConditionalGeneration.from_pretrained(output / "model")
    processor, rows = EGMFProcessor.from_pretrained(output / "model"), load_corpus("generated", size=96)["validation"]
    task = processor.tasks["mosi"]
    predictions = Predictor(model.eval(), processor, task, None, 5, model.device)(rows, ["text", "audio", "vision"])[0]
    loss = -np.mean([np.log(row["distribution"][row["gold"]]) for row in predictions])
    best = max((row for row in curve(output) if "eval_loss" in row), key=lambda row: row["eval_weighted_f1"])
    assert loss == pytest.approx(best["eval_loss"], abs=1e-3)
    rounded, plain = (load_file(run / "model" / "model.safetensors") for run in (output, whole))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert len(rounded[name].unique()) > 16 and not torch.equal(rounded[name], plain[name])


def test_precision_of_the_config_is_that_of_the_recipe(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    assert load_recipe([str(REPO / "recipes/tiny.yaml")]).training.mixed_precision == "bf16"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_that_may_use_one_core_counts_one():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_sigterm_stops_two_processes_at_the_same_step(tmp_path):
    """Schedulers signal every process of a job."""
    fields = [*FIELDS, "--max_steps", "2000", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"]
    command = ["recipes/tiny.yaml", "--output_dir", str(tmp_path), *fields, "--load_best_model_at_end", "false"]
    launch = [sys.executable, "-m", *ON_TWO, "train.py", *command]
    process = subprocess.Popen(launch, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert f"Stopped by SIGTERM: {checkpoint} was written" in said, said[-3000:]
    assert process.returncode != 0 and damage_of(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    start(*ON_TWO, "train.py", *command, "--max_steps", steps_of(checkpoint.name) + 2)
    assert (tmp_path / "model" / "model.safetensors").exists()
