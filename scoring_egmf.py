"""Scoring of answers: the distribution over all legal answers, from one prefill and one tree-masked forward pass.

The first functions check what an LLM supports (positions, tree masks) and reject static caches that change answers.

Shape letters: B samples, C candidate answers, H the LLM's hidden size.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

from .readout_egmf import answer_prefixes


def accepts_position_ids(language_model: PreTrainedModel) -> bool:
    """Whether an LLM accepts position ids (ALiBi and state-space models do not)."""
    return "position_ids" in inspect.signature(language_model.forward).parameters


def uses_cache_index(language_model: PreTrainedModel) -> bool:
    """Whether an LLM uses the cache index of tokens instead of their position ids (ALiBi, GPT-Neo's windows)."""
    config = language_model.config
    by_index = "local" in getattr(config, "attention_layers", ())
    return by_index or getattr(config, "alibi", False) or not accepts_position_ids(language_model)


def check_static_cache(language_model: PreTrainedModel) -> None:
    """Raises a ValueError if the LLM would fail or give other answers with a static cache."""
    implementation = language_model.config._attn_implementation
    if implementation == "flex_attention" or uses_cache_index(language_model):
        got = f"a static one for {type(language_model).__name__} with {implementation} attention"
        raise ValueError(f"past_key_values: got {got}, whose masks do not fit this cache; wanted a dynamic cache")


def uncompiled_on_cpu(language_model: PreTrainedModel) -> AbstractContextManager:
    """Runs flex attention uncompiled on a CPU: the code that torch 2.13 compiles fails for a second length."""
    is_flex = language_model.config._attn_implementation == "flex_attention"
    if is_flex and language_model.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@dataclass
class LabelScores(ModelOutput):
    """
    Args:
        log_probs: (B, C) log-probabilities of the candidate answers. The probabilities of the candidates sum to one.
        llm_log_probs: (B, C), the same of the LLM without the expert readout.
        expert_log_probs: (B, C), the same of the expert readout without the LLM.
        gate_weights: As in [`EGMFOutput`].
        past_key_values: The cache of the prompts without their last token. `generate(**inputs, past_key_values=...)`
            on the same inputs reuses it and does not process the prompts again. It can be used only once. None if the
            inputs are padded on the right or the LLM has another kind of cache.
        expert_states: As in [`EGMFOutput`]; `generate()` needs them together with `past_key_values`.
    """

    log_probs: torch.Tensor | None = None
    llm_log_probs: torch.Tensor | None = None
    expert_log_probs: torch.Tensor | None = None
    gate_weights: dict[str, torch.Tensor] | None = None
    past_key_values: Cache | None = None
    expert_states: torch.Tensor | None = None


class AnswerTrie:
    """The prefix tree of a set of answers, reduced to the nodes that decisions need.

    A decision is a node with more than one continuation.

    Args:
        candidates: Token ids of each answer. No answer may be a prefix of another one (the processor appends EOS).

    Attributes:
        paths: The token ids that lead to each node; node 0 is the root, with an empty path. A node with a single
            continuation, such as "+0" before ".", is kept only on the path to a later decision.
        token_ids: The distinct ids of the continuations at all decisions.
        allowed: (nodes, token_ids) bool, the continuations of each node.
        steps: (C, nodes * token_ids), 1 for the decisions whose log-probabilities a candidate sums, and otherwise 0.
    """

    def __init__(self, candidates: list[list[int]]):
        answers = [tuple(candidate) for candidate in candidates]
        children: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for depth in range(len(answer)):
                children.setdefault(answer[:depth], set()).add(answer[depth])
        for index, answer in enumerate(answers):
            if not answer or answer in children or answers.index(answer) != index:
                raise ValueError(
                    f"candidates[{index}]: got {list(answer)}, which is empty, a repeat or a prefix of another; "
                    "wanted distinct answers, with EOS appended where one is a prefix of another"
                )
        deciding = [prefix for prefix, tokens in children.items() if len(tokens) > 1]
        needed = {()} | {prefix[:depth] for prefix in deciding for depth in range(len(prefix) + 1)}
        self.paths = sorted(needed, key=lambda prefix: (len(prefix), prefix))
        node = {prefix: index for index, prefix in enumerate(self.paths)}
        self.token_ids = sorted({token for prefix in deciding for token in children[prefix]})
        column = {token: index for index, token in enumerate(self.token_ids)}
        choices = [(node[prefix], column[token]) for prefix in deciding for token in children[prefix]]
        self.allowed = torch.zeros(len(self.paths), len(self.token_ids), dtype=torch.bool)
        self.allowed[tuple(map(list, zip(*choices, strict=True)))] = True
        taken = [
            (index, node[answer[:depth]], column[token])
            for index, answer in enumerate(answers)
            for depth, token in enumerate(answer)
            if len(children[answer[:depth]]) > 1
        ]
        self.steps = torch.zeros(len(answers), *self.allowed.shape)
        self.steps[tuple(map(list, zip(*taken, strict=True)))] = 1.0
        self.steps = self.steps.flatten(1)

    def ancestors(self) -> torch.Tensor:
        """(nodes - 1, nodes - 1) bool: True if the column's node is the row's node or one of its ancestors."""
        inner = self.paths[1:]
        return torch.tensor([[row[: len(seen)] == seen for seen in inner] for row in inner], dtype=torch.bool)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of every node (..., nodes, token_ids) -> log-probabilities of the candidates (..., C)."""
        allowed = self.allowed.to(logits.device)
        steps = logits.float().masked_fill(~allowed, -torch.inf)
        # A node with one continuation has no allowed column. Its row is -inf and never summed.
        steps = torch.where(allowed, steps.log_softmax(-1), 0.0)
        with torch.autocast(steps.device.type, enabled=False):  # half precision would round the sums
            return F.linear(steps.flatten(-2), self.steps.to(steps.device))

    def prefixes(self, embeddings: nn.Module) -> torch.Tensor:
        """The beginning of the answer at each node as [`answer_prefixes`] describes it: (nodes, 2 H)."""
        lengths = [len(path) for path in self.paths]
        padded = [[*path, *[0] * (max(lengths) - len(path))] for path in self.paths]
        ids = torch.tensor(padded, dtype=torch.long, device=embeddings.weight.device)
        return answer_prefixes(embeddings(ids))[torch.arange(len(ids)), torch.tensor(lengths)]


class ScoringMixin:
    """`score_labels()` for a model with an LLM's body in `model.language_model` and its head in `lm_head`."""

    @torch.no_grad()
    def score_labels(
        self,
        candidates: list[list[int]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gains: torch.Tensor | None = None,
        **inputs,
    ) -> LabelScores:
        """Computes the log-probability of every legal answer with one prefill and at most one more forward pass.

        The probability of an answer is the product over its tokens of the softmax over the legal continuations,

            p(answer) = prod_t exp(z[a_t]) / sum_{v legal after a_<t} exp(z[v]).

        `generate()` with the processor's logits processor samples from the same distribution.

        The inner nodes of the answers' token trie follow the prompt as one sequence, with a tree attention mask and
        their depths as positions. An LLM that does not support this mask processes the branches as a batch of
        sequences. The head is evaluated only for the token ids that a decision chooses between.

        Args:
            candidates: Token ids of every legal answer, from `processor.candidates(task)`.
            input_ids, attention_mask, **inputs: Output of the processor for prompts without answers.
            gains: (G,), powers of the experts' factor to try instead of `readout.gain`. `log_probs` is then (B, G, C).

        Returns:
            [`LabelScores`] with `log_probs` (B, C) in the order of the candidates.
        """
        trie = AnswerTrie(candidates)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # The answer must directly follow the prompt, so move the padding to the left.
        order = attention_mask.bool().long().argsort(dim=1, stable=True)
        is_left_padded = torch.equal(order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        if inputs.get("utterance_mask") is not None:
            inputs["utterance_mask"] = inputs["utterance_mask"].gather(1, order)
        takes_tree = self._takes_tree_mask()
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=takes_tree, **inputs)
        hidden, cache = outputs.last_hidden_state[:, -1:], outputs.past_key_values if takes_tree else None
        if cache is not None and not all(type(layer) is DynamicLayer for layer in cache.layers):
            cache = None
        if len(trie.paths) > 1 and cache is not None:
            inner = self._tree_states(trie, attention_mask, cache)
            hidden = torch.cat([hidden, inner], 1)
        elif len(trie.paths) > 1:
            inner = self._batch_states(trie, input_ids, attention_mask, inputs)
            hidden = torch.cat([hidden, inner], 1)
        if cache is not None and is_left_padded:
            cache.crop(-(cache.get_seq_length() - input_ids.shape[1] + 1))
        else:
            cache = None
        scores = {"past_key_values": cache, "expert_states": outputs.expert_states}
        if outputs.expert_states is None:  # a prompt without `utterance_mask`: the LLM without EGMF
            combined, llm, experts = hidden, None, None
        else:
            read = self.model.readout(outputs.expert_states, trie.prefixes(self.model.get_input_embeddings()))
            read = read.to(hidden)
            if gains is None:
                combined = hidden + self.model.readout.gain.to(read) * read
            else:  # (B, G, nodes, H)
                combined = hidden.unsqueeze(1) + torch.einsum("g,bnh->bgnh", gains.to(read), read)
            llm, experts = (trie.log_probs(self.answer_logits(trie, states)) for states in (hidden, read))
        combined = trie.log_probs(self.answer_logits(trie, combined))
        return LabelScores(combined, llm, experts, outputs.gate_weights, **scores)

    def answer_logits(self, trie: AnswerTrie, states: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens that the trie's decisions choose among: (..., nodes, H) -> (..., nodes, token_ids)."""
        token_ids = torch.tensor(trie.token_ids, device=states.device)
        bias = self.lm_head.bias[token_ids] if self.lm_head.bias is not None else None
        return self._finish_logits(F.linear(states, self.lm_head.weight[token_ids], bias))

    def _takes_tree_mask(self) -> bool:
        text_config = self.model.language_model.config
        return text_config._attn_implementation in ("eager", "sdpa") and not uses_cache_index(
            self.model.language_model
        )

    def _tree_states(self, trie: AnswerTrie, attention_mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states of the trie's inner nodes (B, nodes - 1, H), from one forward pass after the cached prompt."""
        device, batch_size = attention_mask.device, attention_mask.shape[0]
        tokens = torch.tensor([path[-1] for path in trie.paths[1:]], device=device).expand(batch_size, -1)
        depths = torch.tensor([len(path) for path in trie.paths[1:]], device=device)
        seen = torch.cat(
            [
                attention_mask.bool().unsqueeze(1).expand(-1, len(depths), -1),
                trie.ancestors().to(device).expand(batch_size, -1, -1),
            ],
            dim=-1,
        )
        embeds = self.model.get_input_embeddings()(tokens)
        mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=device)
        mask = mask.masked_fill(~seen, torch.finfo(embeds.dtype).min).unsqueeze(1)
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=attention_mask.sum(1, keepdim=True) + depths - 1,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return outputs.last_hidden_state

    def _batch_states(self, trie: AnswerTrie, input_ids, attention_mask, inputs: dict) -> torch.Tensor:
        """Like `_tree_states` for an LLM that supports no tree mask: each branch of the trie is a sequence."""
        inner = trie.paths[1:]
        branches = [path for path in inner if not any(other[:-1] == path for other in inner)]
        length, batch_size, prompt_length = max(map(len, branches)), *input_ids.shape
        tokens = torch.tensor([list(path) + [path[-1]] * (length - len(path)) for path in branches])
        branch_mask = torch.tensor([[1] * len(path) + [0] * (length - len(path)) for path in branches])
        repeated = {
            name: value.repeat_interleave(len(branches), 0) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        if repeated.get("utterance_mask") is not None:
            repeated["utterance_mask"] = F.pad(repeated["utterance_mask"], (0, length))

        def append_branches(prompt: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
            branch = branch.to(prompt).repeat(batch_size, 1)
            return torch.cat([prompt.repeat_interleave(len(branches), 0), branch], 1)

        outputs = self.model(
            input_ids=append_branches(input_ids, tokens),
            attention_mask=append_branches(attention_mask, branch_mask),
            use_cache=False,
            **repeated,
        )
        states = outputs.last_hidden_state[:, prompt_length:].unflatten(0, (batch_size, len(branches)))
        places = [
            next((row, len(path) - 1) for row, branch in enumerate(branches) if branch[: len(path)] == path)
            for path in inner
        ]
        return torch.stack([states[:, row, depth] for row, depth in places], 1)
