"""Maps answers to the labels of another corpus, to evaluate a MELD model on CHERMA or a MOSEI model on SIMS-V2.

Both emotion corpora have seven labels, which `MELD_TO_CHERMA` maps one to one. The labels are translations of each
other with one exception: MELD's `neutral` means no emotion, CHERMA's 平静 means calm. The corpora also differ in
annotators, scenes and rules, so a score across corpora measures these differences as well as the model.

Sentiment scores are rescaled linearly: -3 to 3 becomes -1 to 1 by a division by 3, and 0 stays 0.
"""

from dataclasses import dataclass

from egmf.tasks_egmf import BUILTIN_TASKS, AffectTask


MELD_TO_CHERMA = {
    "neutral": "平静",
    "surprise": "惊奇",
    "fear": "恐惧",
    "sadness": "悲伤",
    "joy": "高兴",
    "disgust": "厌恶",
    "anger": "愤怒",
}


@dataclass(frozen=True)
class LabelMap:
    """Maps answers of tasks like `source` to answers of `target`, when called with an answer.

    Args:
        source, target: Tasks of the same kind.
        labels: The label of `target` for each label of `source`. None for scores, which are rescaled linearly.
    """

    source: AffectTask
    target: AffectTask
    labels: dict[str, str] | None = None

    def check(self, name: str, task: AffectTask) -> None:
        """Raises a ValueError if the answers of `task` are not those of `source`; `name` is the map's name."""
        if set(task.answers) != set(self.source.answers):
            got, wanted = _few(task), _few(self.source)
            raise ValueError(f"label_map {name!r}: got answers of task {task.name!r} ({got}), wanted {wanted}")

    def __call__(self, answer: str | float | None) -> str | float | None:
        if answer is None:
            return None
        if self.labels is not None:
            return self.labels[str(answer)]
        middle, width = zip(*(((t.low + t.high) / 2, t.high - t.low) for t in (self.source, self.target)), strict=True)
        return middle[1] + (answer - middle[0]) * width[1] / width[0]


def _few(task: AffectTask) -> str:
    return ", ".join(task.answers) if task.kind == "classification" else f"{task.answers[0]} to {task.answers[-1]}"


def _pair(first: str, second: str, labels: dict[str, str] | None = None) -> dict[str, LabelMap]:
    """A label map and its inverse, by name."""
    back = labels and {value: key for key, value in labels.items()}
    one, other = BUILTIN_TASKS[first], BUILTIN_TASKS[second]
    return {f"{first}-{second}": LabelMap(one, other, labels), f"{second}-{first}": LabelMap(other, one, back)}


LABEL_MAPS = _pair("meld", "cherma", MELD_TO_CHERMA) | _pair("mosei", "simsv2")
