"""What has to hold on a GPU. Every test skips without CUDA.

pytest tests/test_gpu.py
python -m bench.answer --device cuda --layers 28 --output FILE
python -m bench.train_step --device cuda --output FILE
"""

from pathlib import Path

import pytest
import torch
from commands import read_lines
from corpus_files import rows_with
from models import whisper
from transformers import pipeline
from transformers.utils import is_flash_attn_2_available

import train as train_script
from egmf.evaluation.predictor import Predictor
from egmf.modeling_egmf import EGMFForConditionalGeneration


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RECIPE = Path(__file__).resolve().parents[1] / "recipes/tiny.yaml"
TASKS = ["meld", "mosei"]


def on_gpu(batch) -> dict[str, torch.Tensor]:
    return {name: value.to("cuda") for name, value in batch.items()}


def train(output: Path, *fields) -> list[dict]:
    """Trains on the GPU and returns the lines of its log."""
    train_script.main([str(RECIPE), "--output_dir", str(output), *map(str, fields)])
    return read_lines(output / "log.jsonl")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_scores_are_those_of_the_cpu(fresh_egmf, processor, samples, make_batch, task, dtype, tolerance):
    batch, candidates = make_batch(samples, task), processor.candidates(task)
    wanted = fresh_egmf.score_labels(candidates, **batch).log_probs.exp()
    for part in (fresh_egmf.model.language_model, fresh_egmf.lm_head):
        part.to(dtype)
    found = fresh_egmf.to("cuda").score_labels(candidates, **on_gpu(batch)).log_probs.exp()
    assert (found.cpu() - wanted).abs().max() < tolerance


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="FlashAttention 2 is not installed")
@pytest.mark.parametrize("task", TASKS)
def test_flash_attention_answers_as_sdpa(fresh_egmf, processor, samples, make_batch, task):
    """It takes no tree mask, so that the branches of the answers are read as a batch."""
    model, batch, candidates = fresh_egmf.to("cuda"), on_gpu(make_batch(samples, task)), processor.candidates(task)
    for part in (model.model.language_model, model.lm_head):
        part.to(torch.bfloat16)
    wanted = model.score_labels(candidates, **batch).log_probs.exp()
    model.model.language_model.set_attn_implementation("flash_attention_2")
    assert (model.score_labels(candidates, **batch).log_probs.exp() - wanted).abs().max() < 0.05


def test_scoring_waits_for_nothing(fresh_egmf, processor, samples, make_batch):
    model, batch, candidates = fresh_egmf.to("cuda"), on_gpu(make_batch(samples)), processor.candidates("meld")
    wanted = model.score_labels(candidates, **batch).log_probs
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model.score_labels(candidates, **batch).log_probs
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, wanted)


def test_generation_is_that_of_the_cpu(fresh_egmf, processor, samples, make_batch):
    batch = make_batch(samples)
    options = {"max_new_tokens": 4, "do_sample": False}
    wanted = fresh_egmf.generate(**batch, **options)
    assert torch.equal(fresh_egmf.to("cuda").generate(**on_gpu(batch), **options).cpu(), wanted)


def test_evaluation_gives_the_texts_of_the_cpu(fresh_egmf, processor):
    """On a GPU, greedy texts come from the pass that scores the answers."""
    task, rows = processor.tasks["meld"], rows_with("emotion", ["joy", "anger", "neutral", "joy"])["test"]
    taught = processor(text=rows["text"][:], task=task, answer=rows["emotion"][:])
    optimizer, texts = torch.optim.Adam(fresh_egmf.parameters(), lr=3e-3), {}
    for _ in range(40):
        optimizer.zero_grad()
        fresh_egmf(**taught).loss.backward()
        optimizer.step()
    for device in ("cpu", "cuda"):
        predict = Predictor(fresh_egmf.to(device), processor, task, None, 3, torch.device(device))
        texts[device] = [row["greedy_text"] for row in predict(rows, ["text"])[0]]
    assert texts["cuda"] == texts["cpu"] and set(texts["cuda"]) & set(task.labels)


def test_compiled_fusion_gives_the_same(fresh_egmf, samples, make_batch):
    model, batch = fresh_egmf.to("cuda"), on_gpu(make_batch(samples))
    with torch.no_grad():
        prompt = [batch.pop(name) for name in ("input_ids", "attention_mask", "utterance_mask")]
        read = model.model._modalities(**batch)
        wanted = model.model.fuse(*prompt, read)
        model.model.fusion.compile(fullgraph=True, dynamic=True)
        torch.testing.assert_close(model.model.fuse(*prompt, read), wanted, rtol=0, atol=1e-3)


def test_training_in_bf16_resumes_where_it_stopped(tmp_path):
    fields = ["--bf16", "true", "--lr_scheduler_type", "constant", "--warmup_steps", 0, "--logging_steps", 1]
    fields += [
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
    ]
    whole = train(tmp_path / "whole", *fields, "--max_steps", 4)
    train(tmp_path / "parts", *fields, "--max_steps", 2)
    resumed = train(tmp_path / "parts", *fields, "--max_steps", 4)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, resumed)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_checkpoint_on_several_devices(fresh_egmf, processor, samples, make_batch, tmp_path):
    batch, candidates = make_batch(samples), processor.candidates("meld")
    wanted = fresh_egmf.score_labels(candidates, **batch).log_probs
    fresh_egmf.save_pretrained(tmp_path)
    model = EGMFForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    found = model.score_labels(candidates, **on_gpu(batch)).log_probs
    assert (found.cpu() - wanted).abs().max() < 1e-3


def test_pipeline_answers_on_a_gpu(fresh_egmf, processor, tmp_path):
    for part in (fresh_egmf, processor):
        part.save_pretrained(tmp_path)
    devices = "cpu", "cuda"
    asked = [pipeline("affect-recognition", str(tmp_path), trust_remote_code=True, device=one) for one in devices]
    wanted, found = (ask({"text": "that is wonderful"}, task="meld") for ask in asked)
    assert found["label"] == wanted["label"]
    assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-3)


def test_tower_in_bf16_hears_what_it_hears_in_float32(assemble):
    model = assemble(audio_tower=whisper(), audio_input_rate=100).to("cuda")
    shape = 2, model.config.audio_config.num_mel_bins, 100
    inputs, mask = torch.randn(shape, device="cuda"), torch.ones(2, 100, dtype=torch.long, device="cuda")
    with torch.no_grad():
        wanted = torch.stack(model.model.get_audio_features(inputs, mask)[0])
        model.model.audio_tower.to(torch.bfloat16)
        found = torch.stack(model.model.get_audio_features(inputs, mask)[0])
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), wanted.flatten(), dim=0) > 0.999
