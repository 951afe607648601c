"""The training phases before the LLM: first each tower from scratch, then the fusion (experts, gate and projector).

A step of the LLM costs many times a step of the rest, and the LLM learns little from random pseudo tokens. The fusion
is therefore trained first: its pseudo tokens are compared with the LLM's embeddings of the legal answers, and the
correct answer must be the nearest. The LLM then starts with pseudo tokens that already lie near the words of the
answers.

Towers from scratch are trained separately before that. Behind the fusion, other modalities explain the answers sooner,
and a random tower would receive hardly any gradient. They then continue to train with the fusion on augmented inputs
(`egmf/data/augmentation.py`). These phases are our own choice; the paper (arXiv 2601.07565) does not describe them.
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
    """Weighted mean (tokens, H) -> (H,); the j-th token has weight 1 / j."""
    weights = 1 / torch.arange(1, len(tokens) + 1, device=tokens.device, dtype=tokens.dtype)
    return weights @ tokens / weights.sum()


def score_targets(task: AffectTask) -> torch.Tensor:
    """Target distribution over a task's answers for each gold answer, (answers, answers).

    For labels, the gold one has probability 1. For scores, the probability decays exponentially with the distance.
    """
    if task.kind == "classification":
        return torch.eye(len(task.answers))
    scores = torch.tensor([task.parse(answer) for answer in task.answers])
    distance = (scores[:, None] - scores).abs() / (SCORE_WIDTH * (task.high - task.low))
    return (-distance).softmax(-1)


class TowerPretraining(nn.Module):
    """A tower with a small readout, for `Trainer`: it learns one task from its modality only.

    The readout computes logits for each frame from the tower's last hidden state; they are averaged over the clip.

    Args:
        model: The model; the tower is shared, not copied.
        modality: "audio" or "vision".
        task: The task that the tower learns.
    """

    accepts_loss_kwargs = False  # Trainer divides the loss by the number of accumulated steps
    FRAMES = 8  # random frames of a video in each step: neighbouring frames are redundant

    def __init__(self, model: EGMFForConditionalGeneration, modality: str, task: AffectTask):
        super().__init__()
        self.modality = modality
        self.tower = getattr(model.model, f"{modality}_tower")
        size = tower_size(self.tower.config)
        layers = [nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, len(task.answers))]
        self.readout = nn.Sequential(*layers)
        self._whole = [model.model]  # a list hides the rest of the model from `parameters()` and `state_dict()`

    def forward(self, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """Computes logits and the loss over the clips that have the modality.

        Args:
            answer_index: Index of each row's gold answer in the task's answers, (B,).
        """
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
    """The fusion and its towers, without the LLM's layers and head, for `Trainer`.

    The probabilities of the answers are a softmax over scaled cosines. The cosine between a pseudo token and an
    answer's prototype is averaged over the K pseudo tokens. A prototype is the mean of the LLM's embeddings of the
    answer's tokens, minus the mean over the task's answers, which removes what all answers share. The j-th token has
    weight 1 / j, because "+1.0" and "+0.1" have the same tokens and the first ones are more informative.

    The target of a label is that label. The target of a score is a distribution that decays with the distance from
    the gold score, to 1 / e at a twentieth of the range (`score_targets`). All of this is our own choice.

    The loss is that of the gated mix plus the mean of the losses of each expert without the others. Without the second
    part, the gate soon gives nearly all weight to the first useful expert, and the others learn little. The second
    part trains only the experts: a tower that had to serve each expert separately would encode in its frames what an
    expert is designed not to see, such as temporal order.

    Args:
        model: The model; its fusion and towers are shared, not copied.
        processor: Its processor.
        tasks: The tasks; a batch's `task_index` refers to this list.
        label_smoothing: Share of the target that is spread evenly over all legal answers.
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
        self._whole = [model.model]  # a list hides the LLM from `parameters()` and `state_dict()`
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
        self._whole[0].train(mode)  # keeps frozen towers in eval mode
        self.training = mode
        return self

    def pseudo_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Pseudo tokens (B, 1 + E, K, H): of the mix, then of each expert, without gradient to the towers."""
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
        """Computes the loss and the mix's logits (B, answers).

        Args:
            task_index: Index of each row's task in `tasks`, (B,).
            answer_index: Index of each row's gold answer in the task's answers, (B,).
        """
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
