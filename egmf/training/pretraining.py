"""The training phases before the LLM: first each tower from scratch, then the fusion (experts, gate and readout).

A step of the LLM costs many times a step of the rest, and the LLM learns little from random latents. The fusion is
therefore trained first: the expert readout (`readout_egmf.py`) must give the correct answer through the LLM's head.
The experts then stay as they are while the LLM learns.

Towers from scratch are trained separately before that. Behind the fusion, other modalities explain the answers sooner,
and a random tower would receive hardly any gradient. They then continue to train with the fusion on augmented inputs
(`egmf/data/augmentation.py`). These phases are our own choice; the paper (arXiv 2601.07565) does not describe them.
"""

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers.utils import ModelOutput

from egmf.data.collator import LABEL_COLUMNS, gold_answer
from egmf.experts_egmf import masked_mean
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import AffectTask, EGMFProcessor
from egmf.readout_egmf import answer_prefixes
from egmf.scoring_egmf import AnswerTrie
from egmf.towers_egmf import is_trained, tower_size


SCORE_WIDTH = 1 / 20  # of a task's range: the distance at which a score's target has fallen to 1 / e


def score_targets(task: AffectTask) -> torch.Tensor:
    """Target distribution over a task's answers for each gold answer, (answers, answers).

    For labels, the gold one has probability 1. For scores, the probability decays exponentially with the distance.
    """
    if task.kind == "classification":
        return torch.eye(len(task.answers))
    scores = torch.tensor([task.parse(answer) for answer in task.answers])
    distance = (scores[:, None] - scores).abs() / (SCORE_WIDTH * (task.high - task.low))
    return (-distance).softmax(-1)


def answer_prior(rows: Dataset, tasks: list[AffectTask], label_smoothing: float = 0.0) -> torch.Tensor:
    """The mean target of each task's rows, (tasks, answers), 0 where a task has fewer answers.

    Args:
        rows: Training rows with a column `task`.
        tasks: The tasks.
        label_smoothing: See [`FusionPretraining`]. Without it, each answer counts as if one more row had it.
    """
    prior = torch.zeros(len(tasks), max(len(task.answers) for task in tasks))
    for place, task in enumerate(tasks):
        count = len(task.answers)
        asked = rows.select_columns(["id", "task", LABEL_COLUMNS[task.kind]])
        golds = [task.answers.index(task.format(gold_answer(row, task))) for row in asked if row["task"] == task.name]
        found = score_targets(task)[golds].sum(0)
        found = found / found.sum() if label_smoothing else (found + 1) / (found.sum() + count)
        prior[place, :count] = (1 - label_smoothing) * found + label_smoothing / count
    return prior


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
    """The fusion, its towers and the expert readout, without the LLM's layers, for `Trainer`.

    The readout's states pass through the LLM's head, as if the LLM itself added nothing. The probability of an answer
    is the product over its tokens of the softmax over the legal continuations, as in `score_labels()`.

    The target of a label is that label. The target of a score is a distribution that decays with the distance from
    the gold score, to 1 / e at a twentieth of the range (`score_targets`). All of this is our own choice.

    The loss is that of the gated mix plus the mean of the losses of each expert without the others. Without the second
    part, the gate soon gives nearly all weight to the first useful expert, and the others learn little. The second
    part trains only the experts and the readout: a tower that had to serve each expert separately would encode in its
    frames what an expert is designed not to see, such as temporal order. A third part, -log of the probability that
    the mix gives to legal tokens among the whole vocabulary, keeps plain `generate()` on legal answers.

    Args:
        model: The model; its fusion, towers and readout are shared, not copied.
        processor: Its processor.
        tasks: The tasks; a batch's `task_index` refers to this list.
        label_smoothing: Share of the target that is spread evenly over all legal answers.
        prior: The probability of each task's answers without a clip, from [`answer_prior`]. The loss then multiplies
            it by the experts' distribution, so that they learn only what a clip adds to it (logit adjustment, Menon
            et al. 2021, arXiv 2007.07314). None: they learn the prior as well.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        model: EGMFForConditionalGeneration,
        processor: EGMFProcessor,
        tasks: list[AffectTask],
        label_smoothing: float = 0.0,
        prior: torch.Tensor | None = None,
    ):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("log_prior", None if prior is None else prior.log(), persistent=False)
        self.fusion, self.readout = model.model.fusion, model.model.readout
        towers = (model.model.audio_tower, model.model.vision_tower)
        self.towers = nn.ModuleList(tower for tower in towers if tower is not None and is_trained(tower))
        self._whole = [model]  # a list hides the LLM from `parameters()` and `state_dict()`
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        self.fusion.projector.requires_grad_(False)  # no loss of this phase depends on it
        self._answers = [LegalAnswers(model, processor, task) for task in tasks]
        sizes = [len(task.answers) for task in tasks]
        targets = torch.zeros(len(tasks), max(sizes), max(sizes))
        for place, task in enumerate(tasks):
            targets[place, : sizes[place], : sizes[place]] = score_targets(task)
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("legal", torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1), persistent=False)

    def train(self, mode: bool = True):
        self._whole[0].train(mode)  # keeps frozen towers in eval mode
        self.training = mode
        return self

    def states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The readout's states (B, 1 + E, 1 + K, d): of the mix; of each expert, without gradient to the towers."""
        model = self._whole[0].model
        read = model.encode_media(inputs)
        taught = [name for name, value in read.items() if value is not None and value.requires_grad]
        if not taught:
            return model.get_expert_states(**read, each_expert=True)
        mix = model.get_expert_states(**read)
        read |= {name: read[name].detach() for name in taught}
        alone = model.get_expert_states(**read, each_expert=True)
        return torch.cat([mix.unsqueeze(1), alone[:, 1:]], 1)

    def forward(self, task_index: torch.Tensor, answer_index: torch.Tensor, **inputs) -> ModelOutput:
        """Computes the loss and the mix's log-probabilities (B, answers), -inf where a task has fewer answers.

        Args:
            task_index: Index of each row's task in `tasks`, (B,).
            answer_index: Index of each row's gold answer in the task's answers, (B,).
        """
        states = self.states(inputs)
        shape = (*states.shape[:2], self.legal.shape[1])
        log_probs = torch.full(shape, -torch.inf, device=states.device)
        illegal = log_probs.new_zeros(len(states))
        for place, answers in enumerate(self._answers):
            rows = (task_index == place).nonzero().squeeze(1)
            if len(rows):
                some, count = states[rows], answers.count
                log_probs = log_probs.index_put(
                    (rows,), F.pad(answers.log_probs(some), (0, log_probs.shape[2] - count), value=-torch.inf)
                )
                illegal = illegal.index_put((rows,), answers.illegality(some[:, 0], answer_index[rows]))
        legal = self.legal[task_index].unsqueeze(1)
        learned = log_probs
        if self.log_prior is not None:
            learned = (log_probs + self.log_prior[task_index].unsqueeze(1)).log_softmax(-1)
        surprise = -learned.masked_fill(~legal, 0.0)  # (B, 1 + E, answers)
        evenly = legal / legal.sum(-1, keepdim=True)
        target = self.targets[task_index, answer_index].unsqueeze(1)
        target = (1 - self.label_smoothing) * target + self.label_smoothing * evenly
        losses = (target * surprise).sum(-1).mean(0)
        parts = {"logits": log_probs[:, 0], "illegality": illegal}
        return ModelOutput(loss=losses[0] + losses[1:].mean() + illegal.mean(), **parts)


class LegalAnswers:
    """What the readout needs of a task's legal answers.

    Args:
        model: The model, whose embeddings and head are read and not copied.
        processor, task: The processor and the task.
    """

    def __init__(self, model: EGMFForConditionalGeneration, processor: EGMFProcessor, task: AffectTask):
        self.model, self.count = model, len(task.answers)
        self.trie = AnswerTrie(processor.candidates(task), model.device)
        embeddings = model.get_input_embeddings()
        self.prefixes = self.trie.prefixes(embeddings)  # (nodes, 2 H)
        answers = [[*processor.answer_ids(task, answer), processor.tokenizer.eos_token_id] for answer in task.answers]
        continuations = processor.continuations(task)
        length = max(map(len, answers))
        ids = torch.tensor([answer + answer[-1:] * (length - len(answer)) for answer in answers], device=model.device)
        self.beginnings = answer_prefixes(embeddings(ids))[:, :-1]  # (answers, S, 2 H)
        self.lengths = torch.tensor([len(answer) for answer in answers], device=model.device)
        tokens = sorted({token for row in continuations.values() for token in row})
        self.tokens = torch.tensor(tokens, device=model.device)
        column = {token: index for index, token in enumerate(tokens)}
        self.legal = torch.zeros(len(answers), length, len(tokens), dtype=torch.bool, device=model.device)
        for row, answer in enumerate(answers):
            for depth in range(len(answer)):
                for token in continuations[tuple(answer[:depth])]:
                    self.legal[row, depth, column[token]] = True

    def log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the answers: (..., 1 + K, d) -> (..., answers)."""
        return self.trie.log_probs(self.model.answer_logits(self.trie, self._head_input(states, self.prefixes)))

    def illegality(self, states: torch.Tensor, answer_index: torch.Tensor) -> torch.Tensor:
        """-log of the probability of legal tokens at a random token of each gold answer: (B, 1 + K, d) -> (B,).

        One token, because the head of the whole vocabulary costs more than everything else in a step.
        """
        place = (torch.rand(len(states), device=states.device) * self.lengths[answer_index]).long()
        read = self._head_input(states, self.beginnings[answer_index, place].unsqueeze(1))
        logits = self.model._finish_logits(self.model.lm_head(read)).float().squeeze(1)  # (B, vocabulary)
        legal = logits[:, self.tokens].masked_fill(~self.legal[answer_index, place], -torch.inf)
        return logits.logsumexp(-1) - legal.logsumexp(-1)

    def _head_input(self, states: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        return self.model.model.readout(states, prefixes).to(self.model.lm_head.weight.dtype)
