"""Answers: `score_labels` agrees with scoring each answer separately, and generation yields only valid answers."""

import pytest
import torch
from models import OTHER_LLMS, clip_vision, random_llm
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.launches import count
from egmf.processing_egmf import EGMFProcessor
from egmf.scoring_egmf import AnswerTrie


TASKS = {"mosi": 2, "meld": 7, "mosei": 61, "calm": 3}


@torch.no_grad()
def score_alone(model, row: dict, candidates: list[list[int]]) -> torch.Tensor:
    """Log-probability of each candidate, (C,), with one teacher-forced forward pass per candidate.

    At each token, the softmax is over the tokens with which any candidate continues from this prefix.
    """
    prompt = row["input_ids"].shape[1]
    scores = []
    for candidate in candidates:
        answer = torch.tensor([candidate])
        inputs = {
            **row,
            "input_ids": torch.cat([row["input_ids"], answer], 1),
            "attention_mask": torch.ones(1, prompt + len(candidate), dtype=torch.long),
            "utterance_mask": torch.cat([row["utterance_mask"], torch.zeros_like(answer)], 1),
            "labels": torch.cat([torch.full_like(row["input_ids"], -100), answer], 1),
        }
        logits = model(**inputs, use_cache=False).logits
        score = 0.0
        for step, token in enumerate(candidate):
            legal = sorted({other[step] for other in candidates if other[:step] == candidate[:step]})
            score += logits[step, legal].log_softmax(-1)[legal.index(token)].item()
        scores.append(score)
    return torch.tensor(scores)


def largest_error(model, batch, candidates, row_of) -> float:
    log_probs = model.score_labels(candidates, **batch).log_probs
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs)))
    wanted = [score_alone(model, row_of(batch, index), candidates) for index in range(len(log_probs))]
    return (log_probs - torch.stack(wanted)).abs().max().item()


def forward_lengths(model, function) -> list[int]:
    """Lengths of the sequences that the language model reads while `function` runs."""
    lengths = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    function()
    hook.remove()
    return lengths


# score_labels


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_every_answer_alone(egmf, processor, samples, make_batch, row_of, task, padding_side):
    batch = make_batch(samples[:3], task=task, padding_side=padding_side)
    candidates = processor.candidates(task)
    assert len(candidates) == TASKS[task]
    assert (candidates[0][-1] == processor.tokenizer.eos_token_id) == (task == "calm")
    assert largest_error(egmf, batch, candidates, row_of) < 1e-4
    read = batch["input_ids"].shape[1] + len(AnswerTrie(candidates).paths) - 1
    assert forward_lengths(egmf, lambda: egmf.score_labels(candidates, **batch)) == [read]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture,tied", [("llama", False), ("qwen3", True), ("gpt2", True), ("gpt2", False)])
def test_scores_over_architectures(llm_folder, assemble, samples, make_batch, row_of, architecture, tied, attention):
    folder = llm_folder(architecture, tied, False)
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(folder), num_pseudo_tokens=3)
    llm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    model = assemble(llm, pseudo_token_id=processor.pseudo_token_id)
    batch = make_batch(samples[:2], task="simsv2", processor=processor)
    candidates = processor.candidates("simsv2")
    assert largest_error(model, batch, candidates, row_of) < 1e-4
    assert len(forward_lengths(model, lambda: model.score_labels(candidates, **batch))) == 1


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", OTHER_LLMS)
def test_scores_of_other_language_models(assemble, processor, samples, make_batch, row_of, name, padding_side):
    """Models with windows, ALiBi or state spaces accept no tree mask; they read the trie's branches as a batch."""
    model = assemble(random_llm(name))
    batch = make_batch(samples[:2], task="meld", padding_side=padding_side)
    candidates = processor.candidates("meld")
    assert largest_error(model, batch, candidates, row_of) < 1e-4
    as_tree = name in ("logit-scale", "head-bias", "narrow-embedding")
    lengths = forward_lengths(model, lambda: model.score_labels(candidates, **batch))
    inner = len(AnswerTrie(candidates).paths) - 1
    prompt = batch["input_ids"].shape[1]
    assert lengths == [prompt + inner] if as_tree else (lengths[0] == prompt and lengths[1] > prompt)


def test_the_two_ways_agree(fresh_egmf, processor, samples, make_batch):
    """Scoring with a tree mask and with a batch of sequences agrees for the same model."""
    batch = make_batch(samples, task="mosei")
    candidates = processor.candidates("mosei")
    tree = fresh_egmf.score_labels(candidates, **batch).log_probs
    fresh_egmf._takes_tree_mask = lambda: False
    assert forward_lengths(fresh_egmf, lambda: fresh_egmf.score_labels(candidates, **batch))[1] > 18
    sequences = fresh_egmf.score_labels(candidates, **batch).log_probs
    assert (tree - sequences).abs().max() < 1e-4


def test_61_scores_need_the_inner_nodes_alone(egmf, processor, samples, make_batch):
    batch = make_batch(samples[:1], task="mosei")
    # One token a byte: " ", two signs, three digits each (3 has one continuation) and their points.
    lengths = forward_lengths(egmf, lambda: egmf.score_labels(processor.candidates("mosei"), **batch))
    assert lengths == [batch["input_ids"].shape[1] + 15]
    # " +" and " -" are tokens of SmolLM2, Llama and Qwen; digits stand alone.
    signed = [[ids[1], *ids[2:]] for ids in processor.candidates("mosei")]
    lengths = forward_lengths(egmf, lambda: egmf.score_labels(signed, **batch))
    assert lengths == [batch["input_ids"].shape[1] + 14]


def test_two_labels_that_differ_at_once_need_the_prompt_alone(egmf, samples, make_batch):
    batch = make_batch(samples[:1], task="mosi")
    lengths = forward_lengths(egmf, lambda: egmf.score_labels([[10, 3], [11, 4]], **batch))
    assert lengths == [batch["input_ids"].shape[1]]


def test_an_accelerator_waits_for_nothing():
    """On the meta device, any value that is read back raises an error; the launches have a limit."""
    found = count()
    assert found.pop("fusion") <= 290
    assert max(found.values()) <= 40 and len(found) == 2


@pytest.mark.parametrize("task", ["meld", "mosei", "calm"])
def test_head_is_evaluated_for_the_candidates_alone(llm_folder, assemble, processor, samples, make_batch, task):
    """Other rows of the head have no effect and are not computed."""
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder("llama", False)))
    batch = make_batch(samples, task=task)
    candidates = processor.candidates(task)
    before = model.score_labels(candidates, **batch).log_probs
    others = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
    others[sorted({token for ids in candidates for token in ids})] = False
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.lm_head.weight[others] = torch.nan
    assert torch.equal(model.score_labels(candidates, **batch).log_probs, before)
    assert not calls


def test_lora_on_the_head_reaches_the_scores(llm_folder, assemble, processor, samples, make_batch):
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder(tied=False)))
    batch, candidates = make_batch(samples), processor.candidates("meld")
    before = model.score_labels(candidates, **batch).log_probs
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    found = tuned.score_labels(candidates, **batch).log_probs
    merged = tuned.merge_and_unload().score_labels(candidates, **batch).log_probs
    assert (found - before).abs().max() > 0.01
    torch.testing.assert_close(found, merged, atol=1e-4, rtol=1e-4)


def test_a_tower_runs_once_whatever_the_number_of_answers(assemble, processor):
    """Also for an LLM that reads the branches of the answers as a batch."""
    tower = clip_vision()
    model, seen = assemble(vision_tower=tower), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    model._takes_tree_mask = lambda: False
    batch = processor(text=["well", "no"], task="mosei")
    media = {"pixel_values": torch.randn(2, 3, 3, 16, 16), "vision_mask": torch.ones(2, 3, dtype=torch.long)}
    model.score_labels(processor.candidates("mosei"), **batch, **media)
    assert sum(seen) == 6


def test_one_answer_is_certain(egmf, processor, samples, make_batch):
    found = egmf.score_labels(processor.candidates("meld")[:1], **make_batch(samples)).log_probs
    assert torch.equal(found, torch.zeros(len(samples), 1))


def test_gate_weights_come_with_the_scores(egmf, processor, samples, make_batch):
    batch = make_batch(samples)
    scored = egmf.score_labels(processor.candidates("meld"), **batch).gate_weights
    with torch.no_grad():
        wanted = egmf(**batch).gate_weights
    for level in ("modality", "expert"):
        torch.testing.assert_close(scored[level], wanted[level])


@pytest.mark.parametrize("candidates", [[[1, 2], [1, 2, 3]], [[1, 2], [1, 2]], [[1], []]])
def test_candidates_that_cannot_be_told_apart(egmf, samples, make_batch, candidates):
    with pytest.raises(ValueError, match=r"candidates\[\d\]: got .* wanted distinct answers, with EOS"):
        egmf.score_labels(candidates, **make_batch(samples[:1]))


# generate() among the legal answers


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["greedy", "uncached", "beams"])
@pytest.mark.parametrize("task", ["meld", "mosei"])
def test_greedy_and_beams_stay_legal_too(egmf, processor, samples, make_batch, task, options):
    batch = make_batch(samples, task=task)
    generated = egmf.generate(
        **batch,
        logits_processor=processor.logits_processor(task, batch),
        max_new_tokens=processor.max_answer_tokens(task),
        do_sample=False,
        **options,
    )
    decoded = processor.decode_answers(generated[:, batch["input_ids"].shape[1] :], task)
    assert all(answer.value is not None for answer in decoded)


@pytest.mark.parametrize("task,draws", [("calm", 1500), ("mosei", 1500)])
def test_samples_have_the_scored_distribution(fresh_egmf, processor, samples, make_batch, task, draws):
    """Constrained sampling follows `score_labels`; in the chi-square test, rare answers are pooled."""
    egmf = fresh_egmf
    with torch.no_grad():  # less certain of its answers
        egmf.model.language_model.norm.weight.mul_(0.3)
        egmf.model.readout.gain.fill_(3.0)
    batch = make_batch(samples[1:2], task=task)
    torch.manual_seed(1)
    generated = egmf.generate(
        **batch,
        logits_processor=processor.logits_processor(task, batch),
        max_new_tokens=processor.max_answer_tokens(task),
        do_sample=True,
        top_k=0,
        num_return_sequences=draws,
    )
    texts = [answer.text for answer in processor.decode_answers(generated[:, batch["input_ids"].shape[1] :], task)]
    answers = processor.tasks[task].answers
    counts = torch.tensor([texts.count(answer) for answer in answers])
    expected = draws * egmf.score_labels(processor.candidates(task), **batch).log_probs[0].exp()
    common = expected >= 5
    assert common.sum() >= min(3, len(answers))
    # The scored distribution is far from even, so that the test can fail.
    assert expected.max() > 1.5 * draws / len(answers)
    pooled = [torch.cat([x[common], x[~common].sum(0, keepdim=True)]).double() for x in (counts, expected)]
    if pooled[1][-1] < 1e-6:
        pooled = [x[:-1] for x in pooled]
    assert chisquare(pooled[0], pooled[1] * draws / pooled[1].sum()).pvalue > 1e-3
    assert (counts - expected).abs().sum() / (2 * draws) < 0.1


# Generation from what scoring has read


@pytest.mark.parametrize("name", ["calm", "mosei"])
def test_generation_goes_on_from_the_scored_prompt(egmf, samples, make_batch, processor, name):
    """Generation from the cache gives the same answers and reads only one token of the prompt again."""
    batch = make_batch(samples, name)
    options = {"max_new_tokens": 5, "do_sample": False}
    wanted = egmf.generate(**batch, **options)

    def answer():
        scores = egmf.score_labels(processor.candidates(name), **batch, use_cache=True)
        read = {"past_key_values": scores.past_key_values, "expert_states": scores.expert_states}
        assert torch.equal(egmf.generate(**batch, **options, **read), wanted)

    lengths = forward_lengths(egmf, answer)
    assert lengths[0] > batch["input_ids"].shape[1] and lengths[1:] == [1] * (len(lengths) - 1)
    read = egmf.score_labels(processor.candidates(name), **batch, use_cache=True).past_key_values
    assert torch.equal(egmf.generate(**batch, **options, past_key_values=read), wanted)  # the fusion runs once more
    read = egmf.score_labels(processor.candidates(name), **batch, use_cache=True).past_key_values
    read.crop(-3)
    with pytest.raises(
        ValueError, match=r"past_key_values: got a cache of \d+ tokens, wanted none, or one of the whole"
    ):
        egmf.generate(**batch, **options, past_key_values=read)


def test_generation_goes_on_from_an_earlier_answer(egmf, samples, make_batch):
    batch, options = make_batch(samples, "mosei"), {"do_sample": False, "eos_token_id": -1}
    wanted = egmf.generate(**batch, **options, max_new_tokens=6)
    first = egmf.generate(**batch, **options, max_new_tokens=3, return_dict_in_generate=True)
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    read = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    assert torch.equal(egmf.generate(**read, **rest, **options, max_new_tokens=3), wanted)


@pytest.mark.parametrize("name", TASKS)
def test_greedy_answers_of_the_same_pass(fresh_egmf, samples, make_batch, processor, name):
    """They are those of `generate()`, which has to run only where its text is no answer."""
    batch, candidates, task = make_batch(samples, name), processor.candidates(name), processor.tasks[name]
    end = processor.tokenizer.eos_token_id
    options = {"max_new_tokens": processor.max_answer_tokens(name), "do_sample": False}
    taught = make_batch(samples, name, answer=[task.answers[place * len(task.answers) // 4] for place in range(4)])
    optimizer = torch.optim.Adam(fresh_egmf.parameters(), lr=3e-3)
    found = set()
    for _ in range(40):  # the model learns to spell answers
        optimizer.zero_grad()
        fresh_egmf(**taught).loss.backward()
        optimizer.step()
        generated = fresh_egmf.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        texts = [answer.text for answer in processor.decode_answers(generated, name)]
        scores = fresh_egmf.score_labels(candidates, **batch, end_token_id=end)
        for text, row, place in zip(texts, generated.tolist(), scores.greedy.tolist(), strict=True):
            ended = text in task.answers and end in row
            assert place == (task.answers.index(text) if ended else -1)
            found.add(place)
    assert -1 in found and len(found) > 2
    wanted = fresh_egmf.score_labels(candidates, **batch).log_probs
    torch.testing.assert_close(scores.log_probs, wanted, rtol=0, atol=1e-4)
    lengths = forward_lengths(fresh_egmf, lambda: fresh_egmf.score_labels(candidates, **batch, end_token_id=end))
    assert len(lengths) == 1


def test_greedy_answers_are_unknown_where_generation_has_settings(
    fresh_egmf, assemble, samples, make_batch, processor
):
    batch, candidates, end = make_batch(samples), processor.candidates("meld"), processor.tokenizer.eos_token_id
    assert assemble(random_llm("alibi")).score_labels(candidates, **batch, end_token_id=end).greedy is None
    assert fresh_egmf.score_labels(candidates, **batch).greedy is None
    fresh_egmf.generation_config.repetition_penalty = 1.1
    assert fresh_egmf.score_labels(candidates, **batch, end_token_id=end).greedy is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["mosi", "mosei"])
def test_scores_multiply_the_llm_and_the_experts(fresh_egmf, samples, make_batch, processor, name):
    """The gain is the power of the experts' factor: 0 leaves the LLM alone, and several are tried at once."""
    batch, candidates = make_batch(samples, name), processor.candidates(name)
    readout = fresh_egmf.model.readout
    scores = fresh_egmf.score_labels(candidates, **batch)
    for part in (scores.llm_log_probs, scores.expert_log_probs):
        assert (part - scores.log_probs).abs().max() > 1e-2
    several = fresh_egmf.score_labels(candidates, **batch, gains=torch.tensor([0.0, 1.0, 4.0])).log_probs
    torch.testing.assert_close(several[:, 0], scores.llm_log_probs)
    torch.testing.assert_close(several[:, 1], scores.log_probs)
    readout.gain.fill_(4.0)
    torch.testing.assert_close(several[:, 2], fresh_egmf.score_labels(candidates, **batch).log_probs)
    if name == "mosi":  # one token decides
        product = (scores.llm_log_probs + 4 * scores.expert_log_probs).log_softmax(-1)
        torch.testing.assert_close(several[:, 2], product)


def test_no_cache_where_generation_could_not_go_on(egmf, assemble, samples, make_batch, processor):
    candidates = processor.candidates("meld")
    batch = make_batch(samples[:2])
    unpadded, padded = batch["attention_mask"].all(1), dict(batch)
    order = batch["attention_mask"].argsort(dim=1, stable=True, descending=True)
    for field in ("input_ids", "attention_mask", "utterance_mask"):
        padded[field] = batch[field].gather(1, order)
    assert not unpadded.all() and egmf.score_labels(candidates, **padded, use_cache=True).past_key_values is None
    model = assemble(random_llm("alibi"))
    assert model.score_labels(candidates, **batch, use_cache=True).past_key_values is None
    assert egmf.score_labels(candidates, **batch).past_key_values is None
