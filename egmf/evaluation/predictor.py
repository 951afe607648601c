"""A model's answers to the rows of a corpus."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from egmf.data.collator import LABEL_COLUMNS, AffectCollator, expand_by_task, prompt_lengths
from egmf.data.speakers import Centers
from egmf.data.tower_cache import TowerCache
from egmf.evaluation.label_maps import LabelMap
from egmf.pipeline_egmf import gate_names
from egmf.processing_egmf import AffectTask, AnswerText, EGMFProcessor


Change = Callable[[dict[str, torch.Tensor], list[str]], dict[str, torch.Tensor]]


@dataclass
class Predictor:
    """Predicts a task's answers for rows of a corpus.

    Args:
        model, processor: The model in eval mode, and its processor.
        task: The task that the model answers.
        label_map: Maps answers to the labels of another task, if the rows have those.
        batch_size: Rows in a batch; it does not change answers.
        device: Where the model is.
        centers: See [`AffectCollator`]. `distort` and `changes` do not change them.
        cache: Cache of the rows' files; distorted files are decoded.
        num_workers: Number of processes that read the cache.
    """

    model: torch.nn.Module
    processor: EGMFProcessor
    task: AffectTask
    label_map: LabelMap | None
    batch_size: int
    device: torch.device
    centers: Centers | None = None
    cache: TowerCache | None = None
    num_workers: int = 0

    @property
    def label_task(self) -> AffectTask:
        """The task of the rows' labels and of the predictions' `answers`."""
        return self.task if self.label_map is None else self.label_map.target

    @torch.no_grad()
    def __call__(
        self,
        rows: Dataset,
        modalities: list[str],
        distort: Callable[[str, str, Any], Any] | None = None,
        changes: Sequence[Change | None] = (None,),
    ) -> list[list[dict]]:
        """Returns one prediction per row, in the rows' order, for each of `changes`.

        Several processes (`accelerate launch`) share the batches, and all return all predictions. Batches are the same
        as with one process, and so are the predictions.

        Args:
            rows: Of the corpus schema, with labels of `label_task`.
            modalities: What the model may see.
            distort: See [`AffectCollator`].
            changes: Functions of a batch's inputs (after the towers) and the rows' ids that return changed inputs and
                do not modify their argument. None: no change.
        """
        cache = self.cache if distort is None else None
        collator = AffectCollator(
            self.processor,
            [self.task],
            modalities,
            with_answers=None,
            cache=cache,
            distort=distort,
            centers=self.centers,
        )
        asked = expand_by_task(rows, [self.task])
        # Rows of similar lengths together need less padding.
        order = sorted(range(len(asked)), key=prompt_lengths(asked, collator).__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        state = PartialState()
        share = batches[state.process_index :: state.num_processes]
        workers = min(self.num_workers, len(share)) if cache is not None else 0
        loader = DataLoader(asked, batch_sampler=share, collate_fn=collator, num_workers=workers)
        unread = {} if cache is None else cache.errors_of(rows, modalities)
        ids, gold = rows["id"][:], rows[LABEL_COLUMNS[self.label_task.kind]][:]
        results: list[dict[int, dict]] = [{} for _ in changes]
        quiet = None if state.is_main_process else True
        for places, batch in zip(share, tqdm(loader, desc="evaluating", unit="batch", disable=quiet), strict=True):
            # Once for all answers.
            inputs = self.model.model.encode_media({name: value.to(self.device) for name, value in batch.items()})
            for predictions, change in zip(results, changes, strict=True):
                changed = inputs if change is None else change(inputs, [ids[place] for place in places])
                for place, answered in zip(places, self._answers(changed), strict=True):
                    predictions[place] = {"id": ids[place], "gold": gold[place]} | answered
                    if error := unread.get(ids[place]) or collator.errors.get(ids[place]):
                        predictions[place]["media_error"] = error
        shares = gather_object([results])
        everything = [
            {place: row for part in parts for place, row in part.items()} for parts in zip(*shares, strict=True)
        ]
        return [[predictions[place] for place in range(len(order))] for predictions in everything]

    def greedy_texts(self, scores, inputs: dict[str, torch.Tensor]) -> list[AnswerText]:
        """The texts of greedy `generate()`, which runs for the rows whose text scoring has not found."""
        processor, task, found = self.processor, self.task, scores.get("greedy")
        index = [-1] * len(inputs["input_ids"]) if found is None else found.tolist()
        texts = [AnswerText(task.answers[one], task.parse(task.answers[one])) for one in index]
        rows = [place for place, one in enumerate(index) if one < 0]
        if rows:
            read = {name: scores.get(name) for name in ("past_key_values", "expert_states")}
            read = read if scores.past_key_values is not None else {}
            some = inputs if found is None else {name: value[rows] for name, value in inputs.items()}
            length = processor.max_answer_tokens(task)
            generated = self.model.generate(**some, **read, max_new_tokens=length, do_sample=False)
            answers = processor.decode_answers(generated[:, some["input_ids"].shape[1] :], task)
            for place, answer in zip(rows, answers, strict=True):
                texts[place] = answer
        return texts

    def _answers(self, inputs: dict[str, torch.Tensor]) -> list[dict]:
        """The model's answers to each row of a batch."""
        model, processor, task = self.model, self.processor, self.task
        options = {"use_cache": True}
        # An accelerator waits for each step of `generate()` longer than for the nodes of all answers.
        if self.device.type != "cpu":
            options = {"end_token_id": processor.tokenizer.eos_token_id}
        scores = model.score_labels(candidates=processor.candidates(task), **options, **inputs)
        texts = self.greedy_texts(scores, inputs)
        distributions = processor.summarize(scores.log_probs, task)
        # `summarize` divides by the temperature of the product; the two parts have temperatures of 1.
        temperature = processor.temperatures.get(task.name, 1.0)
        parts = {"llm": scores.llm_log_probs, "experts": scores.expert_log_probs}
        alone = {name: processor.summarize(temperature * part, task) for name, part in parts.items()}
        gates = gate_names(scores.gate_weights, model.config.experts, model.config.modalities)
        said = []
        for place, (greedy, distribution, gate) in enumerate(zip(texts, distributions, gates, strict=True)):
            answers = {"greedy": greedy.value, "distribution": task.parse(distribution.top)}
            for name, rows in alone.items():
                own = rows[place]
                answers[name] = task.parse(own.top) if task.kind == "classification" else own.expected
            if task.kind == "regression":
                answers |= {"expected": distribution.expected, "median": distribution.median}
            if self.label_map is not None:
                answers = {name: self.label_map(answer) for name, answer in answers.items()}
            row = {"greedy_text": greedy.text, "answers": answers, "distribution": distribution.probabilities}
            said.append(row | {"gate_weights": gate})
        return said
