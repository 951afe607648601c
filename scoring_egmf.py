"""Scoring of answers: the distribution over all legal answers, from one tree-masked forward pass.

The first functions check what an LLM supports (positions, tree masks) and reject static caches that change answers.

Shape letters: B samples, C candidate answers, H the LLM's hidden size.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import maybe_autocast

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


# Settings of `generate()` that do not change a greedy answer of a legal length.
HARMLESS = {"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"}
HARMLESS |= {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
HARMLESS |= {"max_length", "max_new_tokens", "use_cache", "cache_implementation", "return_dict_in_generate"}
HARMLESS |= {"output_attentions", "output_hidden_states", "output_logits", "output_scores"}
HARMLESS |= {"transformers_version", "_from_model_config"}


@dataclass
class LabelScores(ModelOutput):
    """
    Args:
        log_probs: (B, C) log-probabilities of the candidate answers. The probabilities of the candidates sum to one.
        llm_log_probs: (B, C), the same of the LLM without the expert readout.
        expert_log_probs: (B, C), the same of the expert readout without the LLM.
        gate_weights: As in [`EGMFOutput`].
        past_key_values: With `use_cache`, the cache of the prompts without their last token. `generate(**inputs,
            past_key_values=..., expert_states=...)` on the same inputs reuses it and does not process the prompts
            again. It can be used only once. None if the inputs are padded on the right or the LLM has another kind of
            cache.
        expert_states: As in [`EGMFOutput`]; with them, `generate()` does not run the fusion again.
        greedy: With `end_token_id`: (B,), the index of the candidate that greedy `generate()` gives as its text; -1
            where only `generate()` can tell, above all where its text is no candidate. None if it is unknown for all
            rows, because the LLM takes no tree mask or `generation_config` changes greedy answers.
    """

    log_probs: torch.Tensor | None = None
    llm_log_probs: torch.Tensor | None = None
    expert_log_probs: torch.Tensor | None = None
    gate_weights: dict[str, torch.Tensor] | None = None
    past_key_values: Cache | None = None
    expert_states: torch.Tensor | None = None
    greedy: torch.Tensor | None = None


class AnswerTrie:
    """The prefix tree of a set of answers, reduced to the N nodes that decisions need.

    A decision is a node with more than one continuation.

    Args:
        candidates: Token ids of each answer. No answer may be a prefix of another one (the processor appends EOS).
        device: Device of the tensors.
        end_token_id: EOS. If it is given, the trie has the nodes that greedy answers pass as well: those of every
            token of every answer. They end where EOS follows.

    Attributes:
        paths: The token ids that lead to each node; node 0 is the root, with an empty path. A node with a single
            continuation, such as "+0" before ".", is kept only on the path to a later decision.
        tokens: (N - 1,), the last token of each inner node.
        positions: (N - 1,), the place of each inner node's token in the answer, from 0.
        hidden: (N - 1, N - 1) bool: False if the column's node is the row's node or one of its ancestors.
        token_ids: (V,), the distinct ids of the continuations at all decisions.
        illegal: (N, V) bool, False for the continuations of each node, and for all of a node that is no decision.
        steps: (C, N * V), 1 for the decisions whose log-probabilities a candidate sums, and otherwise 0.
    """

    def __init__(
        self,
        candidates: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        end_token_id: int | None = None,
    ):
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
        texts = {} if end_token_id is None else {_without(answer, end_token_id): i for i, answer in enumerate(answers)}
        needed = {()} | {prefix[:depth] for prefix in [*deciding, *texts] for depth in range(len(prefix) + 1)}
        self.paths = sorted(needed, key=lambda prefix: (len(prefix), prefix))
        inner = self.paths[1:]
        self.tokens = torch.tensor([path[-1] for path in inner], dtype=torch.long, device=device)
        self.positions = torch.tensor([len(path) - 1 for path in inner], dtype=torch.long, device=device)
        hidden = [[row[: len(seen)] != seen for seen in inner] for row in inner]
        self.hidden = torch.tensor(hidden, dtype=torch.bool, device=device).view(len(inner), len(inner))
        node = {prefix: index for index, prefix in enumerate(self.paths)}
        token_ids = sorted({token for prefix in deciding for token in children[prefix]})
        column = {token: index for index, token in enumerate(token_ids)}
        illegal = torch.ones(len(self.paths), len(token_ids), dtype=torch.bool)
        for prefix, row in node.items():
            tokens = children.get(prefix, ())
            illegal[row, [column[token] for token in tokens] if len(tokens) > 1 else slice(None)] = False
        taken = [
            (index, node[answer[:depth]], column[token])
            for index, answer in enumerate(answers)
            for depth, token in enumerate(answer)
            if len(children[answer[:depth]]) > 1
        ]
        steps = torch.zeros(len(answers), *illegal.shape)
        steps[tuple(map(list, zip(*taken, strict=True)))] = 1.0
        self.token_ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        self.illegal, self.steps = illegal.to(device), steps.flatten(1).to(device)
        longest = max(map(len, self.paths))
        padded = [[*path, *[0] * (longest - len(path))] for path in self.paths]
        self._padded = torch.tensor(padded, dtype=torch.long, device=device)
        self._lengths = torch.tensor([len(path) for path in self.paths], device=device)
        # The next node by node and last token, for greedy answers; the last row stands for no node.
        spelled = sorted({path[-1] for path in inner})
        follow = torch.full((len(node) + 1, len(spelled) + 1), len(node))
        for path in inner:
            follow[node[path[:-1]], spelled.index(path[-1])] = node[path]
        ended = torch.full((len(node) + 1,), -1)
        for path, index in texts.items():
            ended[node[path]] = index
        self._spelled = torch.tensor(spelled, dtype=torch.long, device=device)
        self._follow, self._ended, self._end = follow.to(device), ended.to(device), end_token_id

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of every node (..., N, V) -> log-probabilities of the candidates (..., C)."""
        steps = logits.float().masked_fill(self.illegal, torch.finfo(torch.float32).min).log_softmax(-1)
        with maybe_autocast(steps.device.type, enabled=False):  # half precision would round the sums
            return F.linear(steps.flatten(-2), self.steps)

    def walk(self, choose: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Follows the most probable tokens from the root.

        Args:
            choose: Chooses a token by the state of a node, (B, H) -> (B,).
            states: (B, N, H), of the nodes of a trie with `end_token_id`.

        Returns:
            (B,), the index of the candidate after which EOS was chosen; -1 if another token led out of the trie.
        """
        rows = torch.arange(len(states), device=states.device)
        place, answer = torch.zeros_like(rows), torch.full_like(rows, -1)
        for _ in range(self._padded.shape[1] + 1):
            token = choose(states[rows, place.clamp(max=states.shape[1] - 1)])
            answer = torch.where((token == self._end) & (answer < 0), self._ended[place], answer)
            match = token.unsqueeze(1) == self._spelled
            column = torch.where(match.any(1), match.long().argmax(1), len(self._spelled))
            place = self._follow[place, column]
        return answer

    def prefixes(self, embeddings: nn.Module) -> torch.Tensor:
        """The beginning of the answer at each node as [`answer_prefixes`] describes it: (N, 2 H)."""
        described = answer_prefixes(embeddings(self._padded))
        places = self._lengths.view(-1, 1, 1).expand(-1, 1, described.shape[-1])
        return described.gather(1, places).squeeze(1)


def _without(answer: tuple[int, ...], end: int) -> tuple[int, ...]:
    """An answer's tokens without EOS."""
    return answer[:-1] if answer[-1] == end else answer


@lru_cache(maxsize=64)
def answer_trie(
    candidates: tuple[tuple[int, ...], ...], device: torch.device, end_token_id: int | None = None
) -> AnswerTrie:
    """The trie of some candidates on a device; a task's batches share it."""
    return AnswerTrie(candidates, device, end_token_id)


class ScoringMixin:
    """`score_labels()` for a model with an LLM's body in `model.language_model` and its head in `lm_head`."""

    @torch.no_grad()
    def score_labels(
        self,
        candidates: list[list[int]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gains: torch.Tensor | None = None,
        use_cache: bool = False,
        end_token_id: int | None = None,
        **inputs,
    ) -> LabelScores:
        """Computes the log-probability of every legal answer with one forward pass.

        The probability of an answer is the product over its tokens of the softmax over the legal continuations,

            p(answer) = prod_t exp(z[a_t]) / sum_{v legal after a_<t} exp(z[v]).

        `generate()` with the processor's logits processor samples from the same distribution.

        The inner nodes of the answers' token trie follow the prompt in the same sequence, with a tree attention mask
        and their depths as positions. An LLM that does not support this mask processes the prompt, and then the
        branches as a batch of sequences. The head is evaluated only for the token ids that a decision chooses between.

        Args:
            candidates: Token ids of every legal answer, from `processor.candidates(task)`.
            input_ids, attention_mask, **inputs: Output of the processor for prompts without answers.
            gains: (G,), powers of the experts' factor to try instead of `readout.gain`. `log_probs` is then (B, G, C).
            use_cache: Whether to return the prompts' cache for `generate()`.
            end_token_id: The tokenizer's EOS, to find the greedy answers in the same pass. The nodes of all tokens of
                all answers then follow the prompt. On an accelerator they take less time than `generate()`.

        Returns:
            [`LabelScores`] with `log_probs` (B, C) in the order of the candidates.
        """
        as_tree = self._takes_tree_mask()
        end = end_token_id if as_tree and self._decodes_plainly(end_token_id) else None
        trie = answer_trie(tuple(map(tuple, candidates)), input_ids.device, end)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if as_tree:
            hidden, outputs = self._tree_states(trie, input_ids, attention_mask, inputs, use_cache)
        else:
            hidden, outputs = self._batch_states(trie, input_ids, attention_mask, inputs)
        cache = outputs.past_key_values
        if cache is not None and (attention_mask[:, 1:] >= attention_mask[:, :-1]).all():
            cache.crop(-len(trie.paths))  # the nodes and the last token of the prompt
        else:
            cache = None
        mixed = hidden
        if outputs.expert_states is None:  # a prompt without `utterance_mask`: the LLM without EGMF
            log_probs, llm, experts = trie.log_probs(self.answer_logits(trie, hidden)), None, None
        else:
            read = self.model.readout(outputs.expert_states, trie.prefixes(self.model.get_input_embeddings()))
            read = read.to(hidden)
            powers = (self.model.readout.gain if gains is None else gains).to(read)
            parts = hidden.unsqueeze(1), read.unsqueeze(1)
            every = torch.cat([*parts, parts[0].addcmul(powers.view(1, -1, 1, 1), parts[1])], 1)  # (B, 2 + G, N, H)
            mixed = every[:, 2]
            llm, experts, *rest = trie.log_probs(self.answer_logits(trie, every)).unbind(1)
            log_probs = rest[0] if gains is None else torch.stack(rest, 1)
        return LabelScores(
            log_probs=log_probs,
            llm_log_probs=llm,
            expert_log_probs=experts,
            gate_weights=outputs.gate_weights,
            past_key_values=cache,
            expert_states=outputs.expert_states,
            greedy=None if end is None else trie.walk(self._most_probable, mixed),
        )

    def _decodes_plainly(self, end_token_id: int | None) -> bool:
        """Whether a greedy answer of `generate()` is the most probable token at each step, up to this EOS."""
        config = self.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return end_token_id in ends and config.to_diff_dict().keys() <= HARMLESS

    def _most_probable(self, states: torch.Tensor) -> torch.Tensor:
        """The token that greedy `generate()` chooses: (B, H) -> (B,)."""
        logits = self._finish_logits(self.lm_head(states))
        for token in self.generation_config.suppress_tokens or ():
            logits[:, token] = -torch.inf
        return logits.argmax(-1)

    def answer_logits(self, trie: AnswerTrie, states: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens that the trie's decisions choose among: (..., N, H) -> (..., N, V)."""
        head = self.lm_head
        if type(head).forward is not nn.Linear.forward or hasattr(head, "_hf_hook") and head.weight.is_meta:
            # LoRA or quantised weights compute another product, and offloaded weights are there during a call only.
            logits = head(states)
            logits = logits[..., trie.token_ids.to(logits.device)]
        else:
            tokens = trie.token_ids.to(head.weight.device)  # perhaps another device's
            bias = None if head.bias is None else head.bias[tokens]
            logits = F.linear(states.to(tokens.device), head.weight[tokens], bias)
        return self._finish_logits(logits).to(states.device)

    def _takes_tree_mask(self) -> bool:
        """Whether the LLM accepts a 4-D mask and has full attention in all layers."""
        language_model = self.model.language_model
        config = language_model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("eager", "sdpa") or uses_cache_index(language_model):
            return False
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)

    def _tree_states(self, trie: AnswerTrie, input_ids, attention_mask, inputs: dict, use_cache: bool):
        """Hidden states of the trie's nodes (B, N, H), and the output of the forward pass that has computed them."""
        (batch_size, length), nodes = input_ids.shape, len(trie.paths) - 1
        ids = torch.cat([input_ids, trie.tokens.expand(batch_size, -1)], 1)
        padding_mask = F.pad(attention_mask, (0, nodes), value=1)
        if inputs.get("utterance_mask") is not None:
            inputs = inputs | {"utterance_mask": F.pad(inputs["utterance_mask"], (0, nodes))}
        counts = attention_mask.cumsum(1)
        positions = torch.cat([(counts - 1).clamp(min=0), counts[:, -1:] + trie.positions], 1)
        # A node sees the prompt, its ancestors and itself.
        hidden = torch.ones(length + nodes, length + nodes, dtype=torch.bool, device=ids.device).triu(1)
        hidden[length:, length:] = trie.hidden
        hidden = hidden | (padding_mask == 0).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self.model.language_model.dtype, device=ids.device)
        mask = mask.masked_fill_(hidden, torch.finfo(mask.dtype).min).unsqueeze(1)
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            padding_mask=padding_mask,
            position_ids=positions,
            use_cache=use_cache,
            return_dict=True,
            **inputs,
        )
        states = outputs.last_hidden_state
        # The prompt ends at its last position that is no padding.
        last = counts.argmax(1).view(-1, 1, 1)
        root = states.gather(1, last.expand(-1, 1, states.shape[-1]))
        return torch.cat([root, states[:, length:]], 1), outputs

    def _batch_states(self, trie: AnswerTrie, input_ids, attention_mask, inputs: dict):
        """Like `_tree_states` for an LLM without tree masks: the prompt, then each branch of the trie."""
        inputs = self.model.encode_media(inputs)  # once, not for each branch
        # The answer must directly follow the prompt, so move the padding to the left.
        order = attention_mask.bool().long().argsort(dim=1, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        if inputs.get("utterance_mask") is not None:
            inputs = inputs | {"utterance_mask": inputs["utterance_mask"].gather(1, order)}
        prompt = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **inputs
        )
        inner, root = trie.paths[1:], prompt.last_hidden_state[:, -1:]
        if not inner:
            return root, prompt
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
            return_dict=True,
            **repeated,
        )
        states = outputs.last_hidden_state[:, prompt_length:].unflatten(0, (batch_size, len(branches)))
        places = [
            next((row, len(path) - 1) for row, branch in enumerate(branches) if branch[: len(path)] == path)
            for path in inner
        ]
        return torch.cat([root, torch.stack([states[:, row, depth] for row, depth in places], 1)], 1), prompt
