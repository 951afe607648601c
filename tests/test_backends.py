"""Attention implementations, caches, bfloat16 and torch.compile do not change the answers."""

import pytest
import torch
from models import OTHER_LLMS, greedy, random_llm
from transformers import AutoModelForCausalLM

from egmf.modeling_egmf import EGMFForConditionalGeneration


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def with_attention(llm_folder, assemble):
    """`with_attention(architecture, implementation)`: a model whose LLM uses this implementation."""

    def assembled(architecture: str, implementation: str) -> EGMFForConditionalGeneration:
        llm = AutoModelForCausalLM.from_pretrained(llm_folder(architecture), attn_implementation=implementation)
        return assemble(llm)

    return assembled


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_the_llm_keeps_its_attention(with_attention, tmp_path, implementation):
    """It survives assembling and loading, although transformers resets the sub-configs of a new config."""
    model = with_attention("llama", implementation)
    model.save_pretrained(tmp_path)
    loaded = EGMFForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    for one in (model, loaded):
        attention = one.model.language_model.layers[0].self_attn
        assert attention.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_attention_implementations_agree(with_attention, processor, samples, make_batch, architecture, implementation):
    eager, other = (with_attention(architecture, name) for name in ("eager", implementation))
    batch, candidates = make_batch(samples), processor.candidates("mosei")
    stands = batch["attention_mask"].bool()
    with torch.no_grad():
        difference = eager(**batch).logits[stands] - other(**batch).logits[stands]
    assert difference.abs().max() < 1e-4
    scores = [model.score_labels(candidates, **batch).log_probs for model in (eager, other)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    wanted = greedy(eager, batch)
    for name, options in CACHES.items():
        if (implementation, name) != ("flex_attention", "static"):
            assert torch.equal(greedy(other, batch, **options), wanted), name


def test_gradients_agree(with_attention, samples, make_batch):
    batch = make_batch(samples, answer=["joy", "fear", "anger", "joy"])
    gradients = []
    for name in ("eager", "sdpa"):
        model = with_attention("llama", name)
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


def test_flex_attention_does_not_train_on_a_cpu(with_attention, samples, make_batch):
    batch = make_batch(samples, answer=["joy", "fear", "anger", "joy"])
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        with_attention("llama", "flex_attention")(**batch)


def test_flex_attention_is_for_llms_that_have_it(with_attention):
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not support .* flex_attention"):
        with_attention("gpt2", "flex_attention")


@pytest.mark.parametrize(
    "name,got",
    [("flex", "LlamaModel with flex_attention"), ("alibi", "BloomModel"), ("window-by-index", "GPTNeoModel")],
)
def test_static_cache_is_refused_where_answers_would_be_others(
    with_attention, assemble, samples, make_batch, name, got
):
    model = with_attention("llama", "flex_attention") if name == "flex" else assemble(random_llm(name))
    batch = make_batch(samples[:2])
    with pytest.raises(ValueError, match=f"past_key_values: got a static one for {got}.* wanted a dynamic cache"):
        greedy(model, batch, cache_implementation="static")
    assert torch.equal(greedy(model, batch), greedy(model, batch, use_cache=False))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_static_cache_of_one_sample(with_attention, samples, make_batch, architecture, implementation):
    """transformers drops a mask without padding, and makes one of each kind of layer."""
    model, batch = with_attention(architecture, implementation), make_batch(samples[:1])
    assert batch["attention_mask"].all()
    assert torch.equal(greedy(model, batch, cache_implementation="static"), greedy(model, batch))


@pytest.mark.parametrize("name", sorted(OTHER_LLMS.keys() - {"alibi", "window-by-index"}))
def test_static_cache_of_other_language_models(assemble, samples, make_batch, name):
    model, batch = assemble(random_llm(name)), make_batch(samples[:2])
    assert torch.equal(greedy(model, batch, cache_implementation="static"), greedy(model, batch))


# bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_bfloat16(with_attention, processor, samples, make_batch, tmp_path, architecture, attention):
    """The LLM is in bfloat16, the fusion stays in float32, and scores change only by the rounding of bfloat16."""
    whole = with_attention(architecture, attention)
    whole.save_pretrained(tmp_path)
    half = EGMFForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
    assert half.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.model.fusion.parameters()} == {torch.float32}
    batch, candidates = make_batch(samples), processor.candidates("mosei")
    exact, rounded = (model.score_labels(candidates, **batch).log_probs for model in (whole, half))
    assert rounded.dtype == torch.float32
    assert (exact.exp() - rounded.exp()).abs().max() < 0.05
    best = exact.topk(2).values
    certain = best[:, 0] - best[:, 1] > 0.2
    assert torch.equal(exact.argmax(1)[certain], rounded.argmax(1)[certain])


def test_bfloat16_learns(with_attention, samples, make_batch):
    """As in a training step, a bfloat16 LLM under autocast gives nearly the same gradients as float32."""
    batch = make_batch(samples, answer=["joy", "fear", "anger", "joy"])
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = with_attention("llama", "eager")
        model.model.language_model.to(dtype), model.lm_head.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.fusion.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# torch.compile


@pytest.fixture
def compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which `reset` keeps
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_forward(compiled_once, egmf, samples, make_batch):
    """The model compiles for batches of two shapes; operations that depend on values only cause a graph break."""
    compiled = torch.compile(egmf, backend="aot_eager")  # the same graphs; their machine code is tested below
    with torch.no_grad():
        for some in (samples, samples[:2]):
            batch = make_batch(some)
            stands = batch["attention_mask"].bool()
            assert (compiled(**batch).logits - egmf(**batch).logits)[stands].abs().max() < 1e-4
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.slow
def test_compiled_generation_with_a_static_cache(compiled_once, fresh_egmf, samples, make_batch):
    """The LLM's body is compiled for the prompt and for every generated token."""
    batch = make_batch(samples[:2])
    wanted = greedy(fresh_egmf, batch)
    fresh_egmf.model.language_model.compile()
    assert torch.equal(greedy(fresh_egmf, batch, cache_implementation="static"), wanted)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
