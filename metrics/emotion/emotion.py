"""Accuracy, weighted F1, unweighted accuracy and per-class F1 of emotion labels."""

import datasets
import evaluate

from .measures import emotion_metrics


_CITATION = """\
@inproceedings{poria2019meld,
  title = {{MELD}: A Multimodal Multi-Party Dataset for Emotion Recognition in Conversations},
  author = {Poria, Soujanya and Hazarika, Devamanyu and Majumder, Navonil and Naik, Gautam and Cambria, Erik and
            Mihalcea, Rada},
  booktitle = {ACL},
  year = {2019},
}
"""


class Emotion(evaluate.Metric):
    """`compute(predictions=, references=, labels=None)`; see `measures.py`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=emotion_metrics.__doc__,
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
            reference_urls=["https://arxiv.org/abs/1810.02508"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Adds a batch."""
        # `evaluate` rejects None as the first string. "" can stand for None because no label is empty.
        predictions = ["" if answer is None else answer for answer in predictions]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """Adds one answer."""
        super().add(prediction=prediction or "", reference=reference, **kwargs)

    def _compute(self, predictions, references, labels=None) -> dict:
        return emotion_metrics(references, [answer or None for answer in predictions], labels)
