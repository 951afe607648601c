"""MAE, Corr, R2, Acc-2, Acc-2-weak, Acc-3, Acc-5 and F1 of sentiment scores: CH-SIMS and CH-SIMS v2."""

import datasets
import evaluate

from .measures import sims_metrics


_CITATION = """\
@inproceedings{liu2022make,
  title = {Make Acoustic and Visual Cues Matter: {CH-SIMS} v2.0 Dataset and {AV-Mixup} Consistent Module},
  author = {Liu, Yihe and Yuan, Ziqi and Mao, Huisheng and Liang, Zhiyun and Yang, Wanqiuyue and Qiu, Yuanzhe and
            Cheng, Tie and Li, Xiaoteng and Xu, Hua and Gao, Kai},
  booktitle = {ICMI},
  year = {2022},
}
"""


class SentimentSims(evaluate.Metric):
    """`compute(predictions=, references=, decimals=None)`; see `measures.py`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=sims_metrics.__doc__,
            features=datasets.Features({name: datasets.Value("float32") for name in ("predictions", "references")}),
            reference_urls=["https://github.com/thuiar/ch-sims-v2", "https://github.com/thuiar/MMSA"],
        )

    def _compute(self, predictions, references, decimals=None) -> dict:
        return sims_metrics(references, predictions, decimals)
