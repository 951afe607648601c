"""MAE, Corr, accuracies and F1 of sentiment scores, by MMSA's protocol for CMU-MOSI and CMU-MOSEI or for CH-SIMS."""

import datasets
import evaluate

from .measures import mosei_metrics, sims_metrics


MEASURES = {"mosei": mosei_metrics, "sims": sims_metrics}
_CITATION = """\
@inproceedings{mao2022msena,
  title = {{M-SENA}: An Integrated Platform for Multimodal Sentiment Analysis},
  author = {Mao, Huisheng and Yuan, Ziqi and Xu, Hua and Yu, Wenmeng and Liu, Yihe and Gao, Kai},
  booktitle = {ACL: System Demonstrations},
  year = {2022},
}
@inproceedings{liu2022make,
  title = {Make Acoustic and Visual Cues Matter: {CH-SIMS} v2.0 Dataset and {AV-Mixup} Consistent Module},
  author = {Liu, Yihe and Yuan, Ziqi and Mao, Huisheng and Liang, Zhiyun and Yang, Wanqiuyue and Qiu, Yuanzhe and
            Cheng, Tie and Li, Xiaoteng and Xu, Hua and Gao, Kai},
  booktitle = {ICMI},
  year = {2022},
}
"""


class Sentiment(evaluate.Metric):
    """`evaluate.load("metrics/sentiment", "mosei" or "sims").compute(predictions=, references=)`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in MEASURES:
            raise ValueError(f"config_name: got {self.config_name!r}, wanted one of {', '.join(MEASURES)}")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=MEASURES[self.config_name].__doc__,
            features=datasets.Features({name: datasets.Value("float32") for name in ("predictions", "references")}),
            reference_urls=["https://github.com/thuiar/MMSA", "https://github.com/thuiar/ch-sims-v2"],
        )

    def _compute(self, predictions, references) -> dict:
        return MEASURES[self.config_name](references, predictions)
