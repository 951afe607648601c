"""The phases of training before the LLM listens: towers from scratch alone, then experts, gate and projector.

A step of the LLM costs many times a step of all the rest, and from random pseudo tokens it learns little at first. So
the fusion is taught before: each pseudo token is compared with the LLM's own embeddings of the legal answers, and the
right answer has to be the nearest one. Then the LLM starts with tokens that already speak of what is seen and heard,
in its own words. Towers from scratch learn before that, each by itself: behind the fusion, where every other modality
explains the answers sooner, a tower of random weights is not found out about for very long. Then they learn on with
the fusion, from inputs that are changed at random (see `augmentation.py`). These phases are this implementation's
choice; the paper (arXiv 2601.07565) does not have them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from egmf.experts_egmf import masked_mean
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import AffectTask, EGMFProcessor
from egmf.towers_egmf import tower_size


SCORE_WIDTH = 1 / 20  # of a task's range: the distance at which a score's target has fallen to 1 / e


def position_weighted_mean(tokens: torch.Tensor) -> torch.Tensor:
    """(tokens, H) -> (H,), the j-th token weighing 1 / j."""
    weights = 1 / torch.arange(1, len(tokens) + 1, device=tokens.device, dtype=tokens.dtype)
    return weights @ tokens / weights.sum()


def score_targets(task: AffectTask) -> torch.Tensor:
    """(answers, answers): for each gold answer of a task, the probabilities that its answers are to have.

    Of labels all is on the gold one; of scores it falls off exponentially with the distance.
    """
    if task.kind == "classification":
        return torch.eye(len(task.answers))
    scores = torch.tensor([task.parse(answer) for answer in task.answers])
    distance = (scores[:, None] - scores).abs() / (SCORE_WIDTH * (task.high - task.low))
    return (-distance).softmax(-1)


class TowerPretraining(nn.Module):
    """A tower with a small readout of its own, for `Trainer`: it learns what its modality alone says of a task.

    The logits of the frames, from the tower's last hidden state, are averaged over the clip.

    Args:
        model: The model; the tower is shared, not copied.
        modality: "audio" or "vision".
        task: The task that is asked.
    """

    accepts_loss_kwargs = False  # Trainer divides the loss by the number of accumulated steps
    FRAMES = 8  # of a video, random ones in each step: neighbours say much the same, and cost as much

    def __init__(self, model: EGMFForConditionalGeneration, modality: str, task: AffectTask):
        super().__init__()
        self.modality = modality
        self.tower = getattr(model.model, f"{modality}_tower")
        size = tower_size(self.tower.config)
        layers = [nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, len(task.answers))]
        self.readout = nn.Sequential(*layers)
        self._whole = [model.model]  # in a list, so that the rest of it is not part of what is trained and saved

    def forward(self, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """A batch with the places (B,) of the gold answers -> loss over the clips with the modality, and logits."""
        if self.training and self.modality == "vision" and "pixel_values" in inputs:
            some = torch.randperm(inputs["pixel_values"].shape[1])[: self.FRAMES].sort().values
            for name in ("pixel_values", "vision_mask", "vision_times"):
                inputs[name] = inputs[name][:, some.to(inputs[name].device)]
        states, mask, _ = self._whole[0].read_modality(self.modality, **inputs)
        if states is None:  # no clip of the batch has any
            zero = sum(parameter.sum() for parameter in self.readout.parameters()) * 0.0
            return ModelOutput(loss=zero)
        logits = masked_mean(self.readout(states[-1].float()), mask)
        here = mask.bool().any(1)
        losses = F.cross_entropy(logits, answer_index, reduction="none") * here
        return ModelOutput(loss=losses.sum() / here.sum().clamp(min=1), logits=logits)


class FusionPretraining(nn.Module):
    """A model without its LLM's layers and head, for `Trainer`: its fusion, and the towers that are to learn with it.

    An answer's probability is a softmax over the task's answers of the scaled cosine between a pseudo token and the
    answer's prototype, averaged over the K pseudo tokens. A prototype is the mean of the LLM's embeddings of the
    answer's tokens, less the mean over the task's answers, so that what all of them share does not count. The j-th
    token weighs 1 / j: "+1.0" and "+0.1" have the same tokens, and the first ones say more.

    The target of a label is that label. Scores know their order: the target of a score falls off with the distance of
    the other scores, to 1 / e at a twentieth of the range (`score_targets`). All of this is our choice.

    The loss is that of the mix plus the mean over the experts of each one's by itself. Without the second part, the
    gate soon gives nearly all its weight to whichever expert is first to be of use, and the others learn little. It
    teaches the experts alone: a tower that had to help each expert by itself to every answer would tell in its frames
    what an expert is built not to see, such as how the clip goes on.

    Args:
        model: The model; its fusion and towers are shared, not copied.
        processor: Its processor.
        tasks: The tasks that are asked; a batch's `task_index` are places in it.
        label_smoothing: Probability that is taken from the right answer and spread evenly over all legal ones.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        model: EGMFForConditionalGeneration,
        processor: EGMFProcessor,
        tasks: list[AffectTask],
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.label_smoothing = label_smoothing
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
        targets = torch.zeros(len(tasks), max(sizes), max(sizes))
        for place, task in enumerate(tasks):
            rows = [embeddings(torch.tensor(ids, device=model.device)) for ids in processor.candidates(task)]
            means = torch.stack([position_weighted_mean(row.detach().float()) for row in rows])
            prototypes[place, : len(means)] = F.normalize(means - means.mean(0), dim=-1)
            targets[place, : len(means), : len(means)] = score_targets(task)
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("legal", torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1), persistent=False)

    def train(self, mode: bool = True):
        self._whole[0].train(mode)  # knows that a frozen tower stays as it is
        self.training = mode
        return self

    def pseudo_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, 1 + E, K, H), of the mix first, then of each expert by itself, which teaches no tower."""
        model = self._whole[0]
        read = model.encode_media(inputs)
        taught = [name for name, value in read.items() if value is not None and value.requires_grad]
        if not taught:
            return model.get_pseudo_tokens(**read, each_expert=True)[0]
        mix, _ = model.get_pseudo_tokens(**read)
        read |= {name: read[name].detach() for name in taught}
        alone, _ = model.get_pseudo_tokens(**read, each_expert=True)
        return torch.cat([mix.unsqueeze(1), alone[:, 1:]], 1)

    def forward(self, task_index: torch.Tensor, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """A batch of prompts with the places (B,) of the task and of the gold answer -> loss, logits (B, answers)."""
        tokens = self.pseudo_tokens(inputs)
        prototypes = self.prototypes[task_index]
        cosines = torch.einsum("bekh,bch->bec", F.normalize(tokens.float(), dim=-1), prototypes) / tokens.shape[2]
        legal = self.legal[task_index].unsqueeze(1)
        logits = (self.scale.exp() * cosines).masked_fill(~legal, -torch.inf)
        surprise = -logits.log_softmax(-1).masked_fill(~legal, 0.0)  # (B, 1 + E, answers)
        evenly = legal / legal.sum(-1, keepdim=True)
        target = self.targets[task_index, answer_index].unsqueeze(1)
        target = (1 - self.label_smoothing) * target + self.label_smoothing * evenly
        losses = (target * surprise).sum(-1).mean(0)
        return ModelOutput(loss=losses[0] + losses[1:].mean(), logits=logits[:, 0])
