"""Recipes, train.py and eval.py with the tiny recipe: the files they write, and what a finished run refuses."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from commands import REPO, Outcome, read_lines, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corpora import load_corpus
from egmf.data.collator import AffectCollator, expand_by_task, gold_answer
from egmf.processes import has_fast_bfloat16
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.recipe_reading import load_recipe
from egmf.training.assembly import load_language_model
from egmf.training.language_models import build_tiny_language_model
from train import build_model, build_processor, build_towers, resolve_language_model, set_clip_statistics


SHORT = ["--num_train_epochs", "2", "--corpus_options", '{"size": 96}', "--per_device_train_batch_size", "8"]


def train(output: Path, *arguments, **kwargs) -> Outcome:
    return run("train", "recipes/tiny.yaml", "--output_dir", output, *SHORT, *arguments, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(output)
    return output


@pytest.fixture(scope="module")
def evaluated(trained) -> Path:
    run("eval", trained / "model", "--corpus", "generated", "--output", trained / "test")
    return trained / "test"


@pytest.mark.parametrize("recipe", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_a_task_of_its_corpus_kind(recipe):
    parsed = load_recipe([str(recipe)])
    assert set(parsed.data.tasks) <= set(BUILTIN_TASKS)
    assert parsed.training.output_dir.startswith("runs/")


def test_settings_of_the_last_phase_do_not_concern_the_others(tmp_path):
    scheduler = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-4}']
    train(tmp_path / "run", "--fusion_epochs", "1", "--max_steps", "2", "--eval_on_start", "true", *scheduler)
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_bfloat16_is_fast_where_its_products_are():
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(2, 512, 512).to(dtype)
        torch.mm(left, right)  # the first product also sets things up
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(left, right)
            taken.append(time.perf_counter() - start)
        seconds[dtype] = min(taken)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if not 3 < ratio < 30:  # otherwise other work on the machine may decide
        assert has_fast_bfloat16() == (ratio <= 3)


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(tmp_path, monkeypatch, caplog, is_slow):
    for module in ("recipe_reading", "training.assembly"):
        monkeypatch.setattr(f"egmf.{module}.has_fast_bfloat16", lambda: not is_slow)
    recipe = load_recipe([str(REPO / "recipes/mosi_smollm2.yaml"), "--use_cpu", "true"])
    assert recipe.training.mixed_precision == ("no" if is_slow else "bf16")
    assert ("the run computes in float32" in caplog.text) == is_slow
    build_tiny_language_model(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    assert load_language_model(recipe, str(tmp_path / "llm")).dtype == (torch.float32 if is_slow else torch.bfloat16)


def test_a_run_that_began_in_bfloat16_resumes_in_it(tmp_path, monkeypatch):
    for module in ("recipe_reading", "training.assembly"):
        monkeypatch.setattr(f"egmf.{module}.has_fast_bfloat16", lambda: False)
    build_tiny_language_model(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    (tmp_path / "settings.json").write_text(json.dumps({"bf16": True}))  # written on another machine
    arguments = [str(REPO / "recipes/mosi_smollm2.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    for wanted, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        recipe = load_recipe(arguments)
        assert recipe.training.mixed_precision == wanted
        assert load_language_model(recipe, str(tmp_path / "llm")).dtype == dtype
        (tmp_path / "fusion/checkpoint-1").mkdir(parents=True, exist_ok=True)  # now it has begun


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_lora_trains_the_linear_layers_of_the_llm(tmp_path, llm_folder, architecture, layers):
    train(tmp_path, "--language_model", llm_folder(architecture), "--max_steps", "2")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {name.split(".")[-3] for name, value in adapter.items() if "lora_B" in name and value.any()}
    assert trained == layers and all("language_model" in name for name in adapter if "lora_" in name)


def test_command_line_overrides_the_recipe():
    recipe = load_recipe(
        [str(REPO / "recipes/tiny.yaml"), "--seed", "7", "--experts", "local", "--learning_rate", "1e-2"]
    )
    assert (recipe.training.seed, recipe.fusion["experts"], recipe.training.learning_rate) == (7, ["local"], 0.01)


def test_epochs_on_the_command_line_replace_steps_in_the_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text((REPO / "recipes/tiny.yaml").read_text() + "max_steps: 7\n")
    assert load_recipe([str(file)]).training.max_steps == 7
    assert load_recipe([str(file), "--num_train_epochs", "2"]).training.max_steps == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recipe: got no YAML file"),
        (["recipes/tiny.yaml", "--learning_rat", "1"], "learning_rat"),
        (["recipes/tiny.yaml", "--modalities", "smell"], "modalities: got .*smell"),
        (
            ["recipes/tiny.yaml", "--audio_speeds", "0.9", "1.1"],
            r"audio_speeds: got \[0.9, 1.1\], wanted .* 1.0 among",
        ),
    ],
)
def test_a_wrong_recipe_is_named(arguments, message, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(ValueError, match=message):
        load_recipe(arguments)


@pytest.mark.parametrize("fields", [["--audio_speeds", "1.0", "0.9"], ["--audio_window", "4"]])
def test_what_only_a_tower_can_do_needs_one(fields):
    with pytest.raises(ValueError, match=f"{fields[0][2:]}: got .* wanted an audio_tower"):
        build_towers(load_recipe([str(REPO / "recipes/tiny.yaml"), *fields]))


def test_a_label_outside_the_task_names_row_and_label():
    row = load_corpus("generated", None)["train"][0]
    with pytest.raises(ValueError, match=f"{row['id']}: label: got nothing"):
        gold_answer({**row, "emotion": None}, BUILTIN_TASKS["mosi"])
    with pytest.raises(ValueError, match=f"{row['id']}: .*got the label '{row['emotion']}'"):
        gold_answer(row, BUILTIN_TASKS["meld"])


def test_training_log_and_model_folder(trained):
    log = read_lines(trained / "log.jsonl")
    assert any("loss" in row for row in log) and [row["epoch"] for row in log if "eval_loss" in row] == [1.0, 2.0]
    assert all(0 <= row["eval_weighted_f1"] <= 1 for row in log if "eval_loss" in row)
    files = {path.name for path in (trained / "model").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "processor_config.json",
        "modeling_egmf.py",
        "scoring_egmf.py",
    } <= files
    fields = json.loads((trained / "model" / "recipe.json").read_text())
    assert fields["corpus"] == "generated" and fields["corpus_options"] == {"size": 96} and "corpus_dir" not in fields


def test_clip_statistics_are_standardised_by_the_training_split():
    fields = ["--clip_statistics", "audio", "vision", "--corpus_options", '{"size": 60}']
    recipe = load_recipe([str(REPO / "recipes/tiny.yaml"), *fields])
    corpus, folder = load_corpus("generated", None, size=60), resolve_language_model("tiny-random")
    model = build_model(recipe, folder, build_processor(recipe, folder, {}), {}, corpus["train"])
    set_clip_statistics(model, corpus, None)
    for modality, module in model.model.fusion.clip_statistics.items():
        clips = [torch.tensor(clip)[None] for clip in corpus["train"][f"{modality}_features"] if clip is not None]
        given = torch.cat([module.norm(module.measure((clip,), torch.ones(clip.shape[:2]))) for clip in clips])
        assert given.mean(0).abs().max() < 0.1 and 0.9 < given.std(0).min() and given.std(0).max() < 1.1, modality


def test_evaluation_files_agree_with_each_other(evaluated):
    metrics, rows = json.loads((evaluated / "metrics.json").read_text()), read_lines(evaluated / "predictions.jsonl")
    test_split = load_corpus("generated", None, size=96)["test"]
    assert [(row["id"], row["gold"]) for row in rows] == [(row["id"], row["emotion"]) for row in test_split]
    assert (evaluated / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert metrics["samples"] == len(rows) and metrics["modalities"] == ["text", "audio", "vision"]
    for answer, figures in metrics["answers"].items():
        correct = [row["answers"][answer] == row["gold"] for row in rows]
        assert figures["accuracy"] == pytest.approx(sum(correct) / len(rows))
        assert figures["unparsable"] == sum(row["answers"][answer] is None for row in rows)
    for row, given in zip(rows, test_split, strict=True):
        assert sum(row["distribution"].values()) == pytest.approx(1)
        assert row["answers"]["distribution"] == max(row["distribution"], key=row["distribution"].get)
        for weights in row["gate_weights"]["modality"].values():
            assert sum(weights.values()) == pytest.approx(1)
            assert (weights["audio"] == 0) == (given["audio_features"] is None)
        assert sum(row["gate_weights"]["expert"].values()) == pytest.approx(1)


def test_evaluation_asks_one_sample_as_it_asks_many(trained, evaluated):
    run("eval", trained / "model", "--corpus", "generated", "--output", trained / "single", "--batch_size", 1)
    for one, many in zip(
        read_lines(trained / "single" / "predictions.jsonl"), read_lines(evaluated / "predictions.jsonl"), strict=True
    ):
        assert one["greedy_text"] == many["greedy_text"]
        assert one["distribution"] == pytest.approx(many["distribution"], abs=1e-4)


def test_comparison_with_itself_finds_nothing_and_other_samples_are_refused(trained, evaluated):
    same = evaluated / "predictions.jsonl"
    arguments = [trained / "model", "--corpus", "generated", "--output", trained / "again", "--compare"]
    run("eval", *arguments, same)
    report = json.loads((trained / "again" / "metrics.json").read_text())
    tests = report["compared_to"]["distribution"]
    assert tests["mcnemar"] == {"first_only": 0, "second_only": 0, "p_value": 1.0}
    assert tests["differences"]["accuracy"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    other = trained / "other.jsonl"
    other.write_text("".join(line + "\n" for line in same.read_text().splitlines()[1:]))
    outcome = run("eval", *arguments, other, check=False)
    assert outcome.status != 0 and "wanted the same samples" in outcome.said


def test_other_settings_want_another_folder(trained):
    """Finished phases would keep what they learned with the old settings, under the name of the new ones."""
    changes = {"seed": 5, "learning_rate": 1e-2, "lora_r": 2, "fusion_dropout": 0.4, "adam_beta2": 0.9}
    for field, value in changes.items():
        outcome = train(trained, f"--{field}", str(value), check=False)
        assert outcome.status == 2
        assert f"{field}: got {value}, wanted " in outcome.said and "or another output_dir" in outcome.said
    assert json.loads((trained / "model" / "recipe.json").read_text())["training"]["seed"] == 1111


def test_a_shorter_run_wants_another_folder(trained):
    """It would get the weights of the longer one under its own name."""
    outcome = train(trained, "--num_train_epochs", "1", check=False)
    assert outcome.status == 2
    assert (
        "num_train_epochs: got 1, wanted at least the 2 of " in outcome.said and "another output_dir" in outcome.said
    )


def test_a_metric_that_no_validation_has_is_refused_at_once(trained, tmp_path):
    for name in ("weighted_f", "eval_corr"):
        outcome = train(tmp_path / "run", "--metric_for_best_model", name, check=False)
        wanted = "wanted one of loss, accuracy, weighted_f1, unparsable"
        assert outcome.status == 2 and f"metric_for_best_model: got '{name}', {wanted}" in outcome.said
        assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_of_an_older_architecture_is_not_resumed(trained, tmp_path):
    """The weights of its finished phases would not fit, and what is missing would stay random."""
    run = shutil.copytree(trained, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    assert settings.pop("architecture") == 3
    (run / "settings.json").write_text(json.dumps(settings))
    outcome = train(run, check=False)
    assert outcome.status == 2 and "architecture: got 3, wanted 2, with which the run" in outcome.said


def test_modalities_that_a_run_may_not_see_do_not_reach_the_model(processor):
    corpus, task = load_corpus("generated", None, size=36)["train"], BUILTIN_TASKS["mosi"]
    rows = [row for row in expand_by_task(corpus, [task]) if row["audio_features"] and row["vision_features"]][:4]
    batches = {
        names: AffectCollator(processor, [task], names.split(), with_answers=True)(rows)
        for names in ("text audio vision", "audio", "text")
    }
    assert not any(name.startswith("vision") for name in batches["audio"])
    assert not any(name.startswith(("audio", "vision")) for name in batches["text"])
    assert torch.equal(batches["audio"]["audio_features"], batches["text audio vision"]["audio_features"])
    assert batches["audio"]["utterance_mask"].sum() == 0 < batches["text"]["utterance_mask"].sum()
    words = processor.batch_decode(batches["audio"]["input_ids"])
    assert not any(row["text"] in prompt for row, prompt in zip(rows, words, strict=True))


@pytest.mark.slow
def test_the_tiny_recipe_learns_what_words_voice_and_face_say(tmp_path):
    """A third of the rows can be told from the words, from audio, from vision alone."""
    run("train", "recipes/tiny.yaml", "--output_dir", tmp_path)
    run("eval", tmp_path / "model", "--corpus", "generated", "--output", tmp_path / "test")
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    for answer in ("greedy", "distribution"):
        figures = metrics["answers"][answer]
        assert figures["accuracy"] > 0.9 and figures["unparsable"] == 0
