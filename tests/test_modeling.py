"""The model: independence from batch and padding, generation, missing modalities, errors, loss and training."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from models import LORA_TARGETS, OTHER_LLMS, TOLERANCE, greedy, largest_difference, pad, pseudo_tokens_of, random_llm
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
)

from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.readout_egmf import answer_prefixes


# architecture, tied head, spare token in the tokenizer (without one the embeddings grow by one)
LLMS = [
    ("llama", True, True),
    ("llama", False, False),
    ("qwen3", True, False),
    ("qwen3", False, True),
    ("gpt2", True, False),
    ("gpt2", False, True),
]


@pytest.fixture(scope="module", params=LLMS, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def any_egmf(request, llm_folder, assemble):
    """A model and its processor for each architecture, tied and untied heads, and spare and added tokens."""
    folder = llm_folder(*request.param)
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(folder), num_pseudo_tokens=3)
    assert (processor.pseudo_token == "<|pseudo|>") != request.param[2]
    model = assemble(AutoModelForCausalLM.from_pretrained(folder), pseudo_token_id=processor.pseudo_token_id)
    assert model.get_input_embeddings().num_embeddings == 258
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == request.param[1]
    return model, processor


# Independence of the batch and of padding


def test_alone_is_as_in_a_batch(any_egmf, samples, make_batch, row_of):
    model, processor = any_egmf
    batch = make_batch(samples, processor=processor)
    with torch.no_grad():
        together = model(**batch)
        for index in range(len(samples)):
            alone = model(**row_of(batch, index))
            stands = batch["attention_mask"][index].bool()
            assert (together.logits[index, stands] - alone.logits[0]).abs().max() < TOLERANCE
            for level, weights in alone.gate_weights.items():
                assert (together.gate_weights[level][index] - weights[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("text_side", ["left", "right"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_what_it_holds_change_nothing(any_egmf, samples, make_batch, text_side, side):
    model, processor = any_egmf
    batch = make_batch(samples, processor=processor, padding_side=text_side)
    assert largest_difference(model, batch, pad(batch, side)) < TOLERANCE


def test_features_reach_the_answer(any_egmf, samples, make_batch):
    """Counterpart of the tests above: values that are not padding change the logits of the last token."""
    model, processor = any_egmf
    batch = make_batch(samples[:1], processor=processor)
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
        for name in ("audio_features", "vision_features", "audio_times", "utterance_mask"):
            changed = {**batch, name: batch[name].flip(1)}
            assert (model(**changed).logits[:, -1] - logits).abs().max() > 1e-3, name


# Generation


@torch.no_grad()
def test_experts_that_do_not_read_the_words(assemble, samples, make_batch):
    """Their answer depends on the clip alone, the language model's on the words as well."""
    model, sample = assemble(experts_read_text=False), samples[0]
    states, logits = [], []
    for text, features in (("What a day!", None), ("Leave me alone.", None), ("What a day!", samples[1])):
        own = {**sample, "text": text} | ({} if features is None else {"audio_features": features["audio_features"]})
        own.pop("audio_times")
        batch = make_batch([own])
        states.append(model.model.get_expert_states(**batch)[:, 1:])  # without the prompt
        logits.append(model(**batch, logits_to_keep=1).logits)
        assert (model(**batch).gate_weights["modality"][..., 0] == 0).all()
    assert torch.equal(states[0], states[1]) and not torch.equal(logits[0], logits[1])
    assert not torch.allclose(states[0], states[2], atol=1e-3)


@torch.no_grad()
def test_experts_without_anything_to_read_leave_the_answer_to_the_llm(assemble, samples, make_batch):
    model = assemble(experts_read_text=False)
    batch = make_batch(samples[1:3])  # with sound, and words alone
    found = model(**batch, logits_to_keep=1).logits
    model.model.readout.gain.zero_()
    alone = model(**batch, logits_to_keep=1).logits
    assert torch.equal(found[1], alone[1]) and not torch.allclose(found[0], alone[0], atol=1e-3)


def test_cached_uncached_and_static_generation_agree(any_egmf, samples, make_batch):
    model, processor = any_egmf
    batch = make_batch(samples, processor=processor)
    cached = greedy(model, batch)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 5
    assert torch.equal(cached, greedy(model, batch, use_cache=False))
    assert torch.equal(cached, greedy(model, batch, cache_implementation="static"))


def test_beams_with_and_without_a_cache_agree(any_egmf, samples, make_batch):
    model, processor = any_egmf
    batch = make_batch(samples, processor=processor)
    beams = greedy(model, batch, num_beams=3, num_return_sequences=2)
    assert beams.shape == (2 * len(samples), batch["input_ids"].shape[1] + 5)
    assert torch.equal(beams, greedy(model, batch, num_beams=3, num_return_sequences=2, use_cache=False))


def test_another_egmf_may_assist(egmf, assemble, samples, make_batch):
    """Assisted decoding drafts tokens with the other model, and the answer stays the same."""
    batch = make_batch(samples[:1])
    wanted, other = greedy(egmf, batch), assemble(seed=9)
    assert torch.equal(greedy(egmf, batch, assistant_model=other), wanted)
    assert not torch.equal(greedy(other, batch), wanted)


def test_a_prompt_is_read_whole(egmf, samples, make_batch):
    with pytest.raises(ValueError, match=r"prefill_chunk_size: got parts of 8 of the prompt.s \d+ tokens"):
        greedy(egmf, make_batch(samples), prefill_chunk_size=8)


@torch.no_grad()
def test_a_step_by_hand_after_the_scored_prompt(egmf, samples, make_batch, processor):
    """The mask of all tokens is longer than the step."""
    batch = make_batch(samples)
    wanted = egmf(**batch, logits_to_keep=1).logits
    scores = egmf.score_labels(processor.candidates("meld"), **batch, use_cache=True)
    read = {"past_key_values": scores.past_key_values, "expert_states": scores.expert_states}
    found = egmf(input_ids=batch["input_ids"][:, -1:], attention_mask=batch["attention_mask"], **read).logits
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_a_config_that_returns_tuples(fresh_egmf, samples, make_batch, processor):
    batch, candidates = make_batch(samples), processor.candidates("meld")
    wanted = fresh_egmf(**batch).logits, greedy(fresh_egmf, batch), fresh_egmf.score_labels(candidates, **batch)
    fresh_egmf.config.return_dict = False
    assert torch.equal(fresh_egmf(**batch)[0], wanted[0]) and torch.equal(greedy(fresh_egmf, batch), wanted[1])
    assert torch.equal(fresh_egmf.score_labels(candidates, **batch).log_probs, wanted[2].log_probs)


def test_generation_is_greedy_whatever_the_llm_does_by_default(llm_folder, assemble, samples, make_batch):
    """Qwen and other instruct models name a temperature, cut-offs and penalties in their generation config."""
    llm = AutoModelForCausalLM.from_pretrained(llm_folder())
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 20, "top_p": 0.9}
    llm.generation_config.update(**sampling, repetition_penalty=1.3, no_repeat_ngram_size=2)
    model, batch = assemble(llm), make_batch(samples)
    wanted = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert (
        model.generation_config.repetition_penalty in (None, 1.0) and not model.generation_config.no_repeat_ngram_size
    )
    assert all(torch.equal(model.generate(**batch, max_new_tokens=8), wanted) for _ in range(3))
    assert not torch.equal(model.generate(**batch, max_new_tokens=8, **sampling), wanted)


def test_generation_never_writes_a_placeholder(fresh_egmf, samples, make_batch):
    """Without a cache, a generated placeholder would be treated as one of the prompt."""
    batch = make_batch(samples[:1])
    placeholder = fresh_egmf.config.pseudo_token_id
    with torch.no_grad():
        hidden = fresh_egmf(**batch, output_hidden_states=True).hidden_states[-1]
        fresh_egmf.lm_head.weight[placeholder] = 100 * hidden[0, -1]
        assert fresh_egmf(**batch).logits[0, -1].argmax() == placeholder
    assert (greedy(fresh_egmf, batch, use_cache=False)[:, batch["input_ids"].shape[1] :] != placeholder).all()


# Other language models


@pytest.mark.parametrize("name", OTHER_LLMS)
def test_other_language_models(name, assemble, samples, make_batch, row_of):
    model = assemble(random_llm(name))
    batch = make_batch(samples[:2])
    with torch.no_grad():
        together = model(**batch).logits
        for index in range(2):
            stands = batch["attention_mask"][index].bool()
            alone = model(**row_of(batch, index)).logits[0]
            assert (together[index, stands] - alone).abs().max() < TOLERANCE
    for beams in (1, 2):
        anew = greedy(model, batch, num_beams=beams, use_cache=False)
        assert torch.equal(greedy(model, batch, num_beams=beams), anew)


def test_pseudo_tokens_have_the_size_of_what_the_llm_reads(assemble, samples, make_batch):
    """Gemma 3 multiplies its embeddings by the root of the hidden size; the pseudo tokens must follow."""
    model = assemble(random_llm("scaled-embedding"))
    batch = make_batch(samples[:1])
    seen = []
    model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    pseudo = batch["input_ids"] == model.config.pseudo_token_id
    ratio = seen[0][pseudo].square().mean().sqrt() / seen[0][~pseudo].square().mean().sqrt()
    assert 0.8 < ratio < 1.25


def test_unknown_head_is_refused(llm_folder, assemble):
    class Doubling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 2 * outputs.logits
            return outputs

    with pytest.raises(ValueError, match="Doubling computes logits in a way EGMF does not support"):
        assemble(Doubling.from_pretrained(llm_folder()))


def test_a_multimodal_llm_is_refused():
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    llm = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text | {"vocab_size": 300}, vision_config={**text, "image_size": 16, "patch_size": 8})
    )
    with pytest.raises(ValueError, match="text_config: got a multimodal model .gemma3., wanted a text-only one"):
        EGMFForConditionalGeneration.from_language_model(llm, pseudo_token_id=9)


def test_weights_are_the_llms_own(llm_folder, assemble):
    """For a text-only prompt, the assembled model returns the logits of the LLM."""
    llm = AutoModelForCausalLM.from_pretrained(llm_folder("qwen3", False, True)).eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        wanted = llm(input_ids=ids).logits
        assert (assemble(llm)(input_ids=ids).logits - wanted).abs().max() < 1e-5


# Missing modalities

PRESENCE = list(itertools.product([True, False], repeat=3))
EXPERT_SETS = [
    list(names) for size in (1, 2, 3) for names in itertools.combinations(("local", "semantic", "global"), size)
]


@pytest.fixture(scope="module")
def every_presence():
    """One sample for each combination of present modalities; some sequences have one frame."""
    generator = torch.Generator().manual_seed(3)
    columns = {"text": [], "audio_features": [], "vision_features": []}
    for index, (text, audio, vision) in enumerate(PRESENCE):
        columns["text"].append("so what?" if text else None)
        columns["audio_features"].append(torch.randn(1 + 3 * (index % 2), 5, generator=generator) if audio else None)
        columns["vision_features"].append(torch.randn(1 + index % 3, 7, generator=generator) if vision else None)
    return columns


@pytest.mark.parametrize("gating", ["hierarchical", "flat", "mean"])
@pytest.mark.parametrize("experts", EXPERT_SETS, ids="-".join)
def test_every_combination_of_modalities(assemble, processor, every_presence, row_of, gating, experts):
    model = assemble(gating=gating, experts=experts)
    batch = processor(**every_presence, task="mosi")
    present = torch.tensor(PRESENCE)
    with torch.no_grad():
        outputs = model(**batch)
        modality, expert = outputs.gate_weights["modality"], outputs.gate_weights["expert"]
        assert modality.shape == (8, len(experts), 3) and expert.shape == (8, 3, len(experts))
        assert torch.isfinite(outputs.logits).all()
        absent = ~present[:, None, :].expand_as(modality)
        assert (modality[absent] == 0).all() and (modality[~absent] > 0).all()
        some = present.any(1)
        torch.testing.assert_close(modality.sum(-1)[some], torch.ones(7, len(experts)))
        torch.testing.assert_close(expert.sum(-1)[some], torch.ones(7, 3))
        for index in range(8):
            alone = model(**row_of(batch, index))
            stands = batch["attention_mask"][index].bool()
            assert (outputs.logits[index, stands] - alone.logits[0]).abs().max() < TOLERANCE


def test_nothing_at_all_still_answers(egmf, processor):
    batch = processor(text="", task="meld")
    assert batch["utterance_mask"].sum() == 0
    scores = egmf.score_labels(processor.candidates("meld"), **batch)
    torch.testing.assert_close(scores.log_probs.exp().sum(-1), torch.ones(1))
    assert (scores.gate_weights["modality"] == 0).all()
    assert greedy(egmf, batch).shape[1] == batch["input_ids"].shape[1] + 5


def test_absent_is_not_zeros(egmf, processor):
    """A sequence of zeros is data; a missing one is not."""
    zeros = processor(text="so", audio_features=torch.zeros(3, 5), task="mosi")
    missing = processor(text="so", task="mosi")
    with torch.no_grad():
        with_zeros, without = egmf(**zeros), egmf(**missing)
    assert (with_zeros.logits - without.logits).abs().max() > 1e-3
    assert (with_zeros.gate_weights["modality"][..., 1] > 0).all()


def test_pseudo_tokens_differ(egmf, samples, make_batch):
    """K queries give K tokens, not K copies of one."""
    batch = make_batch(samples)
    with torch.no_grad():
        tokens = pseudo_tokens_of(egmf, batch)
    similarity = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    assert similarity[:, ~torch.eye(3, dtype=torch.bool)].max() < 0.95


# Errors


def test_wrong_width(egmf, processor):
    batch = processor(text="so", audio_features=torch.zeros(3, 4), task="mosi")
    with pytest.raises(ValueError, match=r"audio_features: got shape \(1, 3, 4\), wanted \(batch, frames, 5\)"):
        egmf(**batch)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_features(egmf, processor, value):
    features = torch.zeros(3, 7)
    batch = processor(text="so", vision_features=features, task="mosi")
    batch["vision_features"][0, 1, 2] = value
    with pytest.raises(ValueError, match="vision_features: got NaN or infinite values, wanted finite"):
        egmf(**batch)
    features[1, 2] = value
    with pytest.raises(ValueError, match=r"`vision_features\[0\]` has .* NaN and .* infinite .* wanted finite"):
        processor(text="so", vision_features=features, task="mosi")


@pytest.mark.parametrize("name", ["audio", "vision"])
def test_times_of_another_length(egmf, samples, make_batch, name):
    batch = make_batch(samples)
    batch[f"{name}_times"] = batch[f"{name}_times"][:, :-1]
    with pytest.raises(ValueError, match=rf"{name}_times: got \(\d+, \d+\), wanted \(\d+, \d+\)"):
        egmf(**batch)


def test_placeholders_that_do_not_match(egmf, llm_folder):
    other = EGMFProcessor(AutoTokenizer.from_pretrained(llm_folder()), num_pseudo_tokens=2)
    with pytest.raises(ValueError, match=r"input_ids: got \[2\] placeholders .* wanted num_pseudo_tokens=3"):
        egmf(**other(text="so", task="mosi"))


def test_modality_the_model_lacks(assemble, processor):
    model = assemble(vision_feature_size=None)
    assert model.config.modalities == ["text", "audio"]
    batch = processor(text="so", vision_features=torch.zeros(3, 7), task="mosi")
    with pytest.raises(ValueError, match="vision_features: got values, wanted None: the model has no vision"):
        model(**batch)


def test_missing_masks(egmf, processor):
    batch = processor(text="so", audio_features=torch.zeros(3, 5), task="mosi")
    without = {name: value for name, value in batch.items() if name != "utterance_mask"}
    with pytest.raises(ValueError, match="utterance_mask: got None with audio or vision"):
        egmf(**without)
    without = {name: value for name, value in batch.items() if name != "audio_mask"}
    with pytest.raises(ValueError, match="audio_mask: got None, wanted the mask"):
        egmf(**without)
    with pytest.raises(ValueError, match=r"audio_mask: got \(1, 2\), wanted \(1, 3\)"):
        egmf(**{**batch, "audio_mask": torch.ones(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"attention_mask, utterance_mask: got .* wanted input_ids'"):
        egmf(**{**batch, "utterance_mask": batch["utterance_mask"][:, 1:]})


def test_exactly_one_kind_of_input(egmf, samples, make_batch):
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: wanted exactly one"):
        egmf()
    # Embeddings of a prompt without modalities are the prompt.
    tokens, options = torch.arange(3, 8).unsqueeze(0), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    embeds = egmf.get_input_embeddings()(tokens)
    assert torch.equal(egmf.generate(inputs_embeds=embeds, **options), egmf.generate(tokens, **options)[:, 5:])
    batch = make_batch(samples[:1])
    batch["inputs_embeds"] = egmf.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="inputs_embeds: got values with utterance_mask, wanted input_ids"):
        egmf.generate(**batch, **options)


def test_precomputed_features_for_a_tower_and_the_reverse(egmf, processor):
    batch = processor(text="so", audio_features=torch.zeros(3, 5), task="mosi")
    batch["input_features"] = batch.pop("audio_features")
    with pytest.raises(ValueError, match="audio_features: got a tower's input, wanted precomputed features only"):
        egmf(**batch)


# Loss and training


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_and_logits_on_the_answers_alone(fresh_egmf, samples, make_batch, processor, padding_side):
    """Without the expert readout, they are the logits of the same positions in a forward pass without labels."""
    answers, egmf = ["joy", "anger", "neutral", "surprise"], fresh_egmf
    egmf.model.readout.gain.zero_()
    batch = make_batch(samples, answer=answers, padding_side=padding_side)
    count = sum(len(processor.answer_ids("meld", answer)) + 1 for answer in answers)
    seen = []
    hook = egmf.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        outputs = egmf(**batch)
        hook.remove()
        labels = batch.pop("labels")
        full = egmf(**batch).logits
    assert seen == [(count, 64)]
    assert outputs.logits.shape == (count, 258)
    wanted = F.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=1e-5)


def test_loss_over_an_accumulated_batch(egmf, samples, make_batch):
    """With `num_items_in_batch`, two halves add up to the whole, as gradient accumulation needs."""
    batch = make_batch(samples, answer=["joy", "anger", "neutral", "surprise"])
    total = (batch["labels"] != -100).sum()
    with torch.no_grad():
        whole = egmf(**batch).loss
        halves = [
            egmf(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=total).loss
            for rows in (slice(0, 2), slice(2, 4))
        ]
    torch.testing.assert_close(halves[0] + halves[1], whole, atol=1e-5, rtol=1e-5)


def test_answer_does_not_reach_the_gate(egmf, samples, make_batch):
    batches = [make_batch(samples[:1], answer=[answer]) for answer in ("joy", "sadness")]
    with torch.no_grad():
        one, two = (egmf(**batch).gate_weights for batch in batches)
    assert all(torch.equal(one[level], two[level]) for level in one)


def test_logits_to_keep(egmf, samples, make_batch):
    batch = make_batch(samples)
    with torch.no_grad():
        whole = egmf(**batch).logits
        assert torch.equal(egmf(**batch, logits_to_keep=2).logits, whole[:, -2:])
        places = torch.tensor([[1, 2], [3, 1], [0, 4], [2, 5]])[: len(whole)]
        kept = egmf(**batch, logits_to_keep=places).logits
        assert torch.equal(kept, whole.gather(1, places.unsqueeze(-1).expand(-1, -1, whole.shape[-1])))


def test_gradients_reach_all_that_trains_and_nothing_else(fresh_egmf, samples, make_batch):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LORA_TARGETS, modules_to_save=["fusion", "readout"])
    model = get_peft_model(fresh_egmf, lora).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would keep gradients from lora_A
                parameter.normal_(std=0.02)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trainable) == 2 * 7 * 2
    assert any(".experts.semantic." in name for name in trainable)
    batch = make_batch(samples, answer=["joy", "anger", "neutral", "surprise"])
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradient_checkpointing_gives_the_same_gradients(fresh_egmf, samples, make_batch):
    batch = make_batch(samples, answer=["joy", "anger", "neutral", "surprise"])
    fresh_egmf.train()
    fresh_egmf.model.fusion.eval()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            fresh_egmf.gradient_checkpointing_enable({"use_reentrant": False})
        fresh_egmf.zero_grad()
        fresh_egmf(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in fresh_egmf.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) < 1e-5


def test_bf16_llm_keeps_the_fusion_in_float32(llm_folder, assemble, samples, make_batch):
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder(), dtype=torch.bfloat16))
    assert model.dtype == torch.bfloat16 and next(model.model.fusion.parameters()).dtype == torch.float32
    batch = make_batch(samples, answer=["joy", "anger", "neutral", "surprise"])
    model(**batch).loss.backward()
    assert torch.isfinite(model.model.fusion.projector.token_embedding.grad).all()


def test_a_checkpoint_of_other_layers_is_refused(egmf, tmp_path):
    """Its weights would not fit; its own code, which it carries, loads it."""
    egmf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architecture"]  # as before the expert readout
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architecture: got a checkpoint of version 1 for code of 3, wanted"):
        type(egmf).from_pretrained(tmp_path)


def test_the_readout_spells_answers_that_the_latents_do_not_name(fresh_egmf):
    """Of a clip it knows nothing but which of two answers to begin; the rest follows from the beginning."""
    readout, embeddings = fresh_egmf.model.readout, fresh_egmf.get_input_embeddings().weight.detach()
    head = torch.randn(9, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([[1, 2, 3, 4, 5], [6, 4, 2, 7, 8]])
    torch.manual_seed(0)
    size = readout.spelling.shape[0]
    asked, latents = torch.randn(1, 1, size).expand(2, -1, -1), torch.randn(2, 1, size).expand(-1, 3, -1)
    states = torch.cat([asked, latents], 1)
    prefixes = answer_prefixes(embeddings[answers])[:, :-1]
    optimizer = torch.optim.Adam(readout.parameters(), lr=0.01)
    for _ in range(150):
        logits = readout(states, prefixes) @ head.T
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(logits.argmax(-1), answers)
