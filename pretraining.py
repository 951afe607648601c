"""The first phase of training: experts, gate, projector and towers learn to tell the answer before the LLM listens.

A step of the LLM costs many times a step of all the rest, and from random pseudo tokens it learns little at first. So
the fusion is first taught alone: each pseudo token is compared with the LLM's own embeddings of the legal answers, and
the right answer has to be the nearest one. Then the LLM starts with tokens that already speak of what is seen and
heard, in its own words. This phase is this implementation's choice; the paper (arXiv 2601.07565) does not have it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from modeling_egmf import EGMFForConditionalGeneration
from processing_egmf import AffectTask, EGMFProcessor


class ExpertPretraining(nn.Module):
    """A model without its LLM's layers and head, for `Trainer`: its fusion and the towers that learn.

    An answer's probability is a softmax over the task's answers of the scaled cosine between a pseudo token and the
    answer's prototype, averaged over the K pseudo tokens. A prototype is the mean of the LLM's embeddings of the
    answer's tokens, less the mean over the task's answers, so that what all of them share does not count.

    Args:
        model: The model; its fusion and towers are shared, not copied.
        processor: Its processor.
        tasks: The tasks that are asked; a batch's `task_index` are places in it.
    """

    def __init__(self, model: EGMFForConditionalGeneration, processor: EGMFProcessor, tasks: list[AffectTask]):
        super().__init__()
        self.fusion = model.model.fusion
        self.towers = nn.ModuleList(
            tower for tower in (model.model.audio_tower, model.model.vision_tower) if tower is not None
        )
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self._whole = [model.model]  # in a list, so that the LLM is not part of what is moved, trained and saved
        model.model.language_model.requires_grad_(False)
        embeddings = model.get_input_embeddings()
        sizes = [len(task.answers) for task in tasks]
        prototypes = torch.zeros(len(tasks), max(sizes), embeddings.embedding_dim)
        for place, task in enumerate(tasks):
            rows = [embeddings(torch.tensor(ids, device=model.device)) for ids in processor.candidates(task)]
            means = torch.stack([row.detach().float().mean(0) for row in rows])
            prototypes[place, : len(means)] = F.normalize(means - means.mean(0), dim=-1)
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("legal", torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1), persistent=False)

    def train(self, mode: bool = True):
        self._whole[0].train(mode)  # knows that a frozen tower stays as it is
        self.training = mode
        return self

    def forward(self, task_index: torch.Tensor, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """A batch of prompts with the places (B,) of the task and of the gold answer -> loss, logits (B, answers)."""
        tokens, _ = self._whole[0].get_pseudo_tokens(**inputs)
        cosines = (
            torch.einsum("bkh,bch->bc", F.normalize(tokens.float(), dim=-1), self.prototypes[task_index])
            / tokens.shape[1]
        )
        logits = (self.scale.exp() * cosines).masked_fill(~self.legal[task_index], -torch.inf)
        return ModelOutput(loss=F.cross_entropy(logits, answer_index), logits=logits)
