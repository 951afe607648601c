"""Phases before the LLM, several tasks in one run, and the output of runs on raw media, with a few small clips."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import AVATARS
from commands import REPO, read_lines, run
from datasets import Dataset
from safetensors.torch import load_file

from corpora import load_corpus
from corpora.avatars import KINDS
from egmf.data.augmentation import augment
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.media_inputs_egmf import TowerInput
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.recipe_reading import load_recipe
from egmf.training.pretraining import FusionPretraining, answer_prior, score_targets
from train import build_model, build_processor, build_towers, resolve_language_model, set_trainable_towers


@pytest.fixture(scope="module")
def command(avatars) -> list[str]:
    """A command that trains the avatars' towers and a small random LLM for a few steps, without the output folder."""
    options = {"language_model": "tiny-random", "corpus_dir": avatars, "corpus_options": json.dumps(AVATARS)}
    options |= {"tower_epochs": 2, "fusion_epochs": 2, "num_frames": 8, "bf16": False}
    options |= {
        "num_train_epochs": 1,
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "save_total_limit": 1,
    }
    options |= {"per_device_train_batch_size": 16}
    flat = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["recipes/avatars_towers.yaml", *flat]


def train(command: list[str], output: Path, *fields: str, folder: Path) -> None:
    """Trains into `output`; the cache of towers is in `folder`, so that no other test fills it."""
    run("train", *command, "--output_dir", output, *fields, hub=folder / "hub")


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(command, folder / "run", folder=folder)
    return folder / "run"


def test_all_phases_are_logged_and_nothing_of_the_llm_is_in_the_first_ones_checkpoints(trained):
    phases = [row.get("phase") for row in read_lines(trained / "log.jsonl")]
    assert list(dict.fromkeys(phases)) == ["audio_tower", "vision_tower", "fusion", None]
    weights = load_file(next((trained / "fusion").glob("checkpoint-*")) / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"fusion", "readout", "towers"}


def test_trained_towers_are_models_of_their_own(command, trained, tmp_path):
    """Another recipe can load trained towers by folder; a run without LLM epochs writes only the towers."""
    model = load_file(trained / "model" / "model.safetensors")
    for name in ("audio", "vision"):
        weights = load_file(trained / "towers" / name / "model.safetensors")
        assert weights and all(
            torch.equal(model[f"model.{name}_tower.{key}"], value) for key, value in weights.items()
        )
    own = ["--tower_epochs", "0", "--fusion_epochs", "1"]
    own += [part for name in ("audio", "vision") for part in (f"--{name}_tower", str(trained / "towers" / name))]
    train(command, tmp_path / "run", *own, "--num_train_epochs", "0", folder=tmp_path)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "towers").exists()
    train(command, tmp_path / "run", *own, folder=tmp_path)
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    frozen = [name for name in model if "_tower." in name]
    assert frozen and all(torch.equal(model[name], again[name]) for name in frozen)


def test_one_model_answers_both_tasks_from_files(trained, avatars, tmp_path):
    fields = json.loads((trained / "model" / "recipe.json").read_text())
    assert fields["tasks"] == ["avatars", "avatars_score"] and "corpus_dir" not in fields
    for task, plot, measure in (("avatars", "confusion.png", "accuracy"), ("avatars_score", "scores.png", "mae")):
        run(
            "eval",
            trained / "model",
            "--corpus",
            "avatars",
            "--task",
            task,
            "--corpus_dir",
            avatars,
            "--output",
            tmp_path / task,
        )
        metrics = json.loads((tmp_path / task / "metrics.json").read_text())
        assert metrics["samples"] == 24 and list(metrics["groups"]) == list(KINDS)
        whole = metrics["answers"]["distribution"][measure]
        by_kind = [group["distribution"][measure] for group in metrics["groups"].values()]
        assert whole == pytest.approx(sum(by_kind) / len(KINDS), abs=1e-6)  # kinds are equally frequent
        for name in (plot, "gates.png"):
            assert (tmp_path / task / name).read_bytes()[:4] == b"\x89PNG"
        rows = read_lines(tmp_path / task / "predictions.jsonl")
        assert {tuple(row["distribution"]) for row in rows} == {BUILTIN_TASKS[task].answers}


def first_phase(command: list[str], avatars: Path, *fields: str, **options) -> tuple[FusionPretraining, list, dict]:
    """The recipe's fusion and towers before any step, the tasks, and a batch of four clips."""
    recipe = load_recipe([str(REPO / "recipes/avatars_towers.yaml"), *command[1:], *fields])
    language_model, towers = resolve_language_model("tiny-random"), build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    corpus = load_corpus("avatars", avatars, **AVATARS)
    torch.manual_seed(0)
    model = build_model(recipe, language_model, processor, towers, corpus["train"])
    set_trainable_towers(model, list(towers))
    tasks = [processor.tasks[name] for name in recipe.data.tasks]
    rows = expand_by_task(corpus["train"], tasks).select([0, 7, 30, 47])
    batch = AffectCollator(processor, tasks, recipe.data.modalities, with_answers=False)(list(rows))
    return FusionPretraining(model, processor, tasks, **options), tasks, batch


def test_pretraining_learns_fusion_and_towers_alone(command, avatars):
    phase, tasks, batch = first_phase(command, avatars)
    phase.train()
    llm = phase._whole[0].model.language_model
    frozen = {name: value.clone() for name, value in llm.named_parameters()}
    optimizer = torch.optim.Adam([p for p in phase.parameters() if p.requires_grad], lr=1e-2)

    @torch.no_grad()
    def illegality() -> float:  # of a random token of each answer
        return torch.stack([phase(**batch).illegality for _ in range(20)]).mean().item()

    losses, before = [], illegality()
    for _ in range(36):
        output = phase(**batch)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    # The loss of the mix and that of the experts cannot fall below the entropy of the scores' soft targets.
    targets = phase.targets[batch["task_index"], batch["answer_index"]]
    floor = 2 * torch.special.entr(targets).sum(-1).mean().item()
    assert illegality() < 0.7 * before  # more of the head's probability goes to legal tokens
    assert losses[-1] - floor < 0.5 * (losses[0] - floor)
    # Of the four answers of the first task, the other columns are no answers.
    legal = torch.isfinite(output.logits).sum(1).tolist()
    assert legal == [len(tasks[place].answers) for place in batch["task_index"]]
    for name, value in llm.named_parameters():
        assert value.grad is None and torch.equal(value, frozen[name]), name


def test_what_each_expert_learns_by_itself_teaches_no_tower(command, avatars):
    """A tower's gradient comes only from the loss of the mixture; the fusion's also from the experts' losses."""
    phase, _, batch = first_phase(command, avatars)
    phase.train(False)
    torch.nn.init.normal_(phase.readout.out[-1].weight, std=0.2)
    gradients = []
    for mix_alone in (False, True):
        phase.zero_grad()
        torch.manual_seed(0)  # the same tokens for the third part of the loss
        output = phase(**batch)
        targets = phase.targets[batch["task_index"], batch["answer_index"]]
        logits = output.logits.clamp(min=-1e4)  # what is no answer of the task
        loss = torch.nn.functional.cross_entropy(logits, targets) + output.illegality.mean()
        (loss if mix_alone else output.loss).backward()
        gradients.append({name: value.grad for name, value in phase.named_parameters() if value.grad is not None})
    both, mix = gradients
    towers = [name for name in mix if name.startswith("towers") and mix[name].any()]
    assert {name.split(".")[1] for name in towers} == {"0", "1"}
    for name in towers:
        torch.testing.assert_close(both[name], mix[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(both[name], mix[name], rtol=1e-2) for name in mix if name.startswith("fusion"))


def test_a_prior_leaves_to_the_experts_what_a_clip_adds(command, avatars):
    phase, tasks, batch = first_phase(command, avatars, "--experts", "local")
    rows = [{"id": str(n), "emotion": answer, "sentiment": None} for n, answer in enumerate(["joy", "joy", "anger"])]
    rows += [{"id": "s", "emotion": None, "sentiment": 0.5}]
    asked = Dataset.from_list(rows).add_column("task", ["avatars"] * 3 + ["avatars_score"])
    prior = answer_prior(asked, tasks)
    labels, scores = tasks[0].answers, tasks[1].answers
    assert prior[0, labels.index("joy")] == pytest.approx(3 / (3 + len(labels)))
    assert prior[1].argmax() == scores.index("+0.5") and (prior[0, len(labels) :] == 0).all()
    torch.testing.assert_close(prior.sum(1), torch.ones(2))
    smooth = answer_prior(asked, tasks, 0.1)
    assert smooth[0, labels.index("joy")] == pytest.approx(0.9 * 2 / 3 + 0.1 / len(labels))
    even = phase.train(False)(**batch)
    known = first_phase(command, avatars, "--experts", "local", prior=prior)[0].train(False)(**batch)
    torch.testing.assert_close(known.logits, even.logits)
    learned = (even.logits + prior[batch["task_index"]].log()).log_softmax(-1).clamp(min=-1e4)
    loss = torch.nn.functional.cross_entropy(learned, phase.targets[batch["task_index"], batch["answer_index"]])
    # The mix of one expert is that expert: the loss counts it twice.
    torch.testing.assert_close(known.loss - known.illegality.mean(), 2 * loss, rtol=0, atol=1e-4)


def test_label_smoothing_spreads_over_the_legal_answers_only(command, avatars):
    phase, _, batch = first_phase(command, avatars, "--experts", "local", label_smoothing=0.2)
    output = phase.train(False)(**batch)
    losses = []
    for logits, task, answer in zip(output.logits, batch["task_index"], batch["answer_index"], strict=True):
        legal = torch.isfinite(logits)
        target = phase.targets[task, answer][legal]
        losses.append(torch.nn.functional.cross_entropy(logits[legal], target, label_smoothing=0.2))
    # The mix of one expert is that expert: the loss counts it twice.
    loss = output.loss - output.illegality.mean()
    torch.testing.assert_close(loss, 2 * torch.stack(losses).mean(), rtol=0, atol=1e-5)


def test_towers_that_learn_with_the_llm(command, tmp_path):
    """Weights and batch statistics of a trained tower change, are in the model, and survive a resume."""
    own = ["--tower_epochs", "0", "--fusion_epochs", "0"]
    own += ["--train_audio_tower", "True", "--train_vision_tower", "True"]
    for name, steps in (("whole", ["4"]), ("parts", ["2", "4"])):
        for count in steps:
            fields = ["--lr_scheduler_type", "constant", "--max_steps", count]
            train(command, tmp_path / name, *own, *fields, folder=tmp_path)
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    averages = [value for name, value in whole.items() if "vision_tower" in name and name.endswith("running_mean")]
    assert averages and all((value != 0).any() for value in averages)
    for modality in ("audio", "vision"):
        saved = load_file(tmp_path / "whole/towers" / modality / "model.safetensors")
        of_model = {
            name.partition(f"{modality}_tower.")[2]: value for name, value in whole.items() if modality in name
        }
        assert saved and all(torch.equal(value, of_model[name]) for name, value in saved.items())


def test_variants_of_a_clip_keep_what_is_shown():
    """Variants are reproducible, keep shapes, masks, times and waveforms, and change all frames of a clip alike."""
    pictures = np.random.default_rng(0).uniform(-1, 1, (5, 3, 8, 8)).astype(np.float32)
    pictures[1] = pictures[0]
    clip = TowerInput(pictures, None, np.arange(5.0))
    torch.manual_seed(0)
    first, second = augment("vision", clip), augment("vision", clip)
    torch.manual_seed(0)
    assert np.array_equal(first.values, augment("vision", clip).values)
    assert first.values.shape == pictures.shape and first.values.dtype == np.float32 and first.times is clip.times
    assert np.array_equal(first.values[0], first.values[1])
    assert np.abs(first.values - second.values).max() > 0.05
    bands = np.tile(np.arange(20, dtype=np.float32)[:, None], (1, 6))
    variants = [augment("audio", TowerInput(bands)).values for _ in range(50)]
    assert all(variant.shape == bands.shape for variant in variants)
    # A band is at most two bands and the level's share from where it was, unless it is blanked.
    shifts = np.stack([np.abs(variant - bands).max(1) for variant in variants])
    assert np.median(shifts) < 2.2 and (shifts > 2.2).any() and shifts.std(0).min() > 0
    wave = TowerInput(np.ones(16, dtype=np.float32))
    assert augment("audio", wave) is wave and augment("vision", None) is None


@torch.no_grad()
def test_the_first_phase_scores_answers_as_score_labels_does(fresh_egmf, processor, samples, make_batch):
    """The experts' distribution is the same in both, over words and over scores of several tokens."""
    tasks = [processor.tasks[name] for name in ("meld", "mosei", "calm")]
    batch = make_batch(samples[:3], [task.name for task in tasks])
    phase = FusionPretraining(fresh_egmf, processor, tasks).eval()
    logits = phase(torch.arange(3), torch.zeros(3, dtype=torch.long), **batch).logits
    for row, task in enumerate(tasks):
        scores = fresh_egmf.score_labels(processor.candidates(task), **batch).expert_log_probs[row]
        torch.testing.assert_close(logits[row, : len(scores)], scores, rtol=0, atol=1e-4)
        assert torch.isinf(logits[row, len(scores) :]).all()


def test_scores_have_targets_that_know_their_order():
    task = BUILTIN_TASKS["mosei"]
    targets = score_targets(task)
    gold = task.answers.index("+1.0")
    torch.testing.assert_close(targets.sum(-1), torch.ones(61))
    falling = targets[gold][gold:]
    assert targets[gold].argmax() == gold and (falling[1:] < falling[:-1]).all()
    assert falling[3] / falling[0] == pytest.approx(math.exp(-1), rel=1e-4)  # 0.3 of 6


def test_the_fusion_learns_scores_of_the_same_tokens_apart(fresh_egmf, processor, make_batch):
    torch.manual_seed(0)
    task = processor.tasks["mosei"]
    places = torch.tensor([task.answers.index(answer) for answer in ("+1.0", "+0.1")] * 8)
    frames = [torch.full((3, 5), value) for value in (1.0, -1.0)] * 8
    batch = make_batch([{"text": "so", "audio_features": frame} for frame in frames], task="mosei")
    experts = FusionPretraining(fresh_egmf, processor, [task]).train()
    learning = [value for value in experts.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        experts(torch.zeros_like(places), places, **batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = experts.eval()(torch.zeros_like(places), places, **batch).logits
    scores = torch.tensor([task.parse(answer) for answer in task.answers])
    assert (logits.softmax(-1) @ scores - scores[places]).abs().max() < 0.25
