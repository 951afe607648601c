"""The expert readout of EGMF: the experts' own answer, token by token, which is added to the LLM's last hidden state.

The LLM reads the experts only through pseudo tokens in its prompt. It has few examples to learn this from, and loses
part of what the experts know. The readout is a second, short way from the experts to the answer. It is our own choice;
the paper (arXiv 2601.07565) does not describe it.

Shape letters: B samples, S positions of an answer, K pseudo tokens, d the fusion's hidden size, H the LLM's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_egmf import EGMFConfig


def answer_prefixes(embeds: torch.Tensor) -> torch.Tensor:
    """Describes the beginnings of answers by their tokens' embeddings.

    Args:
        embeds: (B, S, H), the LLM's input embeddings of the answers' tokens.

    Returns:
        (B, S + 1, 2 H). Position s describes the first s tokens: the last of them and their mean, each scaled to a
        root mean square of 1; zeros for s = 0.
    """
    embeds = embeds.detach().float()
    described = unit(torch.stack([embeds, embeds.cumsum(1)], -2)).flatten(-2)  # a scaled sum is a scaled mean
    return F.pad(described, (0, 0, 1, 0))


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Scales vectors (..., H) to a root mean square of 1."""
    return F.rms_norm(vectors, vectors.shape[-1:], eps=1e-12)


class ExpertReadout(nn.Module):
    """Computes what the experts add to the LLM's last hidden state at the positions of an answer.

    A query, computed from the prompt and the beginning of the answer, attends to the K fused latents. The result is
    projected to the width of the LLM's head. The head is linear, so the sum of both states gives the product of two
    distributions over the next token: the LLM's, and that of the experts alone, softmax(head(readout)). (For an LLM
    that soft-caps its logits, such as Gemma 2, this holds only approximately.) Both learn the answers separately. The
    power of the second factor, `gain`, is fitted to validation data after training.

    The query is also added to what it attends to, after a projection: how an answer of several tokens goes on depends
    on its beginning more than on the clip, and K latents cannot name every token.

    Experts that have nothing to read add nothing.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.prefix = nn.Linear(2 * config.text_embedding_size, size, bias=False)
        self.spelling = nn.Parameter(torch.empty(size, size))
        self.key_value = nn.Linear(size, 2 * size)
        self.out = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.text_embedding_size, bias=False))
        self.register_buffer("gain", torch.ones(1))

    def forward(self, states: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        """Computes what is added to the hidden states, before `gain`.

        Args:
            states: (..., 1 + K, d), the prompt and the latents, from [`EGMFFusion.forward`].
            prefixes: (S, 2 H) or (B, S, 2 H), from [`answer_prefixes`].

        Returns:
            (..., S, H).
        """
        states = states.to(self.gain.device)  # the fusion may be on another one
        query = states[..., :1, :] + self.prefix(prefixes.to(states))
        key, value = self.key_value(states)[..., 1:, :].chunk(2, -1)  # the whole is contiguous, a part is not
        read = F.scaled_dot_product_attention(query, key, value)
        added = self.out(torch.addmm(read.flatten(0, -2), query.flatten(0, -2), self.spelling).view_as(read))
        return added * states[..., 1:, :].any(dim=(-2, -1), keepdim=True)
