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
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn
from transformers.utils import ModelOutput

from evaluation import gold_answer
from fusion_egmf import masked_mean
from modeling_egmf import EGMFForConditionalGeneration
from processing_egmf import AffectTask, EGMFProcessor
from tower_cache import COLUMNS, TowerCache
from towers_egmf import tower_size


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


@torch.no_grad()
def answer_prototypes(model: EGMFForConditionalGeneration, processor: EGMFProcessor, task: AffectTask) -> torch.Tensor:
    """Directions (answers, H) of a task's answers among the LLM's embeddings.

    Of each answer the mean embedding of its tokens, less the mean over the answers: what they share does not count.
    """
    embeddings = model.get_input_embeddings()
    rows = [embeddings(torch.tensor(ids, device=model.device)) for ids in processor.candidates(task)]
    means = torch.stack([row.float().mean(0) for row in rows])
    return F.normalize(means - means.mean(0), dim=-1)


def clip_statistics_of(
    model: EGMFForConditionalGeneration, row: dict, cache: TowerCache | None, speed: float = 1.0
) -> dict[str, torch.Tensor]:
    """By modality, the clip statistics (D,) of a row, not standardised; those that it has."""
    found = {}
    for modality, module in model.model.fusion.clip_statistics.items():
        features = row[f"{modality}_features"]
        if cache is not None and modality in cache.frozen:
            heard = speed if modality == "audio" else 1.0
            features = cache.load(modality, row[COLUMNS[modality]], heard)[f"{modality}_features"]
        if features is not None:
            frames = torch.as_tensor(features, device="cpu").unsqueeze(0)  # (1, T, layers, size) or (1, T, size)
            layers = frames.unbind(2) if frames.ndim == 4 else (frames,)
            found[modality] = module.measure(layers, torch.ones(frames.shape[:2]))[0]
    return found


@torch.no_grad()
def fit_clip_readout(
    model: EGMFForConditionalGeneration,
    processor: EGMFProcessor,
    tasks: list[AffectTask],
    rows: Iterable[dict],
    cache: TowerCache | None,
    speeds: Iterable[float],
    penalty: float,
) -> None:
    """Ridge regression from the training clips' standardised statistics to their answers' prototypes.

    A task's classes count alike, whatever their number of clips. Of a clip that several tasks are asked about, the
    readout says the mean of the answers.

    Args:
        rows: The training split, asked, with its statistics set.
        cache: What is known of the rows' files.
        speeds: Speeds at which the cache has their sound; each is a sample of its own.
        penalty: On the weights' squares, against the mean squared error of prototypes of length 1.
    """
    statistics = model.model.fusion.clip_statistics
    named = {task.name: task for task in tasks}
    prototypes = {task.name: answer_prototypes(model, processor, task).cpu() for task in tasks}
    inputs, answers = [], []
    for row in rows:
        task = named[row["task"]]
        for speed in speeds:
            found = clip_statistics_of(model, row, cache, speed)
            parts = [
                module.norm(found[name].to(module.norm.mean.device)).cpu()
                if name in found
                else torch.zeros(module.norm.mean.shape)
                for name, module in statistics.items()
            ]
            inputs.append(torch.cat(parts))
            answers.append((task.name, task.answers.index(task.format(gold_answer(row, task)))))
    rows_of, clips_of = Counter(name for name, _ in answers), Counter(answers)
    classes_of = Counter(name for name, _ in clips_of)
    weights = [
        rows_of[task] / (classes_of[task] * clips_of[task, place]) if named[task].kind == "classification" else 1.0
        for task, place in answers
    ]
    targets = torch.stack([prototypes[name][place] for name, place in answers])
    ridge = Ridge(alpha=penalty * len(answers))
    ridge.fit(torch.stack(inputs).double().numpy(), targets.double().numpy(), weights)
    # As long as the sum that it joins: elements of size 1 where the readout is sure.
    weight = torch.from_numpy(ridge.coef_) * math.sqrt(targets.shape[1])
    sizes = [module.norm.mean.numel() for module in statistics.values()]
    for name, part in zip(statistics, weight.split(sizes, 1), strict=True):
        model.model.fusion.set_clip_readout(name, part)


class ExpertPretraining(nn.Module):
    """A model without its LLM's layers and head, for `Trainer`: its fusion, and the towers that are to learn with it.

    An answer's probability is a softmax over the task's answers of the scaled cosine between a pseudo token and the
    answer's prototype (see [`answer_prototypes`]), averaged over the K pseudo tokens.

    The loss is that of the mix plus the mean over the experts of each one's by itself. Without the second part, the
    gate soon gives nearly all its weight to whichever expert is first to be of use, and the others learn little.

    Args:
        model: The model; its fusion and towers are shared, not copied.
        processor: Its processor.
        tasks: The tasks that are asked; a batch's `task_index` are places in it.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: EGMFForConditionalGeneration, processor: EGMFProcessor, tasks: list[AffectTask]):
        super().__init__()
        self.fusion = model.model.fusion
        self.towers = nn.ModuleList(
            tower for tower in (model.model.audio_tower, model.model.vision_tower) if tower is not None
        )
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self._whole = [model.model]  # in a list, so that the LLM is not part of what is moved, trained and saved
        model.model.language_model.requires_grad_(False)
        sizes = [len(task.answers) for task in tasks]
        prototypes = torch.zeros(len(tasks), max(sizes), model.get_input_embeddings().embedding_dim)
        for place, task in enumerate(tasks):
            prototypes[place, : sizes[place]] = answer_prototypes(model, processor, task)
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("legal", torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1), persistent=False)

    def train(self, mode: bool = True):
        self._whole[0].train(mode)  # knows that a frozen tower stays as it is
        self.training = mode
        return self

    def forward(self, task_index: torch.Tensor, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """A batch of prompts with the places (B,) of the task and of the gold answer -> loss, logits (B, answers)."""
        tokens, _ = self._whole[0].get_pseudo_tokens(**inputs, each_expert=True)  # (B, 1 + E, K, H)
        prototypes = self.prototypes[task_index]
        cosines = torch.einsum("bekh,bch->bec", F.normalize(tokens.float(), dim=-1), prototypes) / tokens.shape[2]
        logits = (self.scale.exp() * cosines).masked_fill(~self.legal[task_index].unsqueeze(1), -torch.inf)
        together, alone = logits[:, 0], logits[:, 1:]
        answers = answer_index.unsqueeze(1).expand(alone.shape[:2])
        loss = F.cross_entropy(together, answer_index) + F.cross_entropy(alone.flatten(0, 1), answers.flatten())
        return ModelOutput(loss=loss, logits=together)
