"""MAE, Corr, Acc-7, Acc-5, Acc-3, Acc-2 and F1 of sentiment scores: MMSA's protocol for CMU-MOSI and CMU-MOSEI."""

import datasets
import evaluate

from .measures import mosei_metrics


_CITATION = """\
@inproceedings{mao2022msena,
  title = {{M-SENA}: An Integrated Platform for Multimodal Sentiment Analysis},
  author = {Mao, Huisheng and Yuan, Ziqi and Xu, Hua and Yu, Wenmeng and Liu, Yihe and Gao, Kai},
  booktitle = {ACL: System Demonstrations},
  year = {2022},
}
"""


class SentimentMosei(evaluate.Metric):
    """`compute(predictions=, references=, decimals=None)`; see `measures.py`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=mosei_metrics.__doc__,
            features=datasets.Features({name: datasets.Value("float32") for name in ("predictions", "references")}),
            reference_urls=["https://github.com/thuiar/MMSA"],
        )

    def _compute(self, predictions, references, decimals=None) -> dict:
        return mosei_metrics(references, predictions, decimals)
