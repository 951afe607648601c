"""The lines that the avatars say, in English and Chinese; each clip has one.

A line consists of a template, a topic (`THINGS`) and a claim at the end, which has a level and a word: "after the
concert I felt a little glad". The word names an emotion, or is one of `NEUTRAL` and names no feeling. Templates and
topics are independent of the emotion. The splits have different topics, so no line occurs in two splits.
"""

import re
from dataclasses import dataclass

import numpy as np


THINGS = {  # in the same order in both languages
    "en": (
        "the dinner|the concert|the train ride|the garden|the meeting|the letter|the race|the new flat|the exam|"
        "the bakery|the phone call|the museum|the football game|the haircut|the wedding|the bus trip|the lecture|"
        "the harbour|the parcel|the library|the picnic|the interview|the swimming pool|the old bridge"
    ).split("|"),
    "zh": (
        "晚饭|音乐会|坐火车|花园|会议|那封信|赛跑|新房子|考试|面包店|那通电话|博物馆|足球赛|理发|婚礼|坐公交|讲座|"
        "港口|包裹|图书馆|野餐|面试|游泳池|老桥"
    ).split("|"),
}
THINGS_OF = {"train": range(0, 14), "validation": range(14, 18), "test": range(18, 24)}
TEMPLATES = {
    "en": (
        "after {thing} I felt {level} {word}",
        "you know, with {thing} I was {level} {word}",
        "so {thing} came up, and I was {level} {word}",
        "when I think of {thing}, I am {level} {word}",
    ),
    "zh": (
        "{thing}之后，我觉得{level}{word}",
        "你知道，关于{thing}，我{level}{word}",
        "说到{thing}，我就{level}{word}",
        "一想起{thing}，我{level}{word}",
    ),
}
LEVELS = {"en": ("a little", "quite", "extremely"), "zh": ("有点", "挺", "非常")}
WORDS = {  # in the order of `corpora.avatars.EMOTIONS`; no word is a label
    "en": (
        ("happy", "glad", "cheerful", "delighted"),
        ("sad", "gloomy", "miserable", "sorrowful"),
        ("angry", "furious", "mad", "annoyed"),
        ("surprised", "amazed", "astonished", "startled"),
    ),
    "zh": (
        ("开心", "快乐", "愉快", "欢喜"),
        ("难过", "伤心", "沮丧", "失落"),
        ("生气", "恼火", "气愤", "火大"),
        ("惊讶", "吃惊", "意外", "震惊"),
    ),
}
NEUTRAL = {"en": ("busy", "ready", "late", "awake"), "zh": ("忙", "赶时间", "清醒", "准时")}
QUESTIONS = {
    "en": ("what do you say to {thing}?", "and {thing}?", "tell me about {thing}"),
    "zh": ("{thing}怎么样？", "那{thing}呢？", "说说{thing}吧"),
}

VOWELS = "aeiou"
CLAIM = (0, 1, 0)  # the vowels of every claim, as indices in `VOWELS`


@dataclass(frozen=True)
class Line:
    """A line in both languages, as indices in the lists above. `emotion` is None for a neutral claim."""

    template: int
    thing: int
    level: int
    emotion: int | None
    word: int
    question: int | None

    @classmethod
    def draw(cls, split: str, emotion: int | None, level: int, rng: np.random.Generator) -> "Line":
        """Draw a random line. A neutral claim has a random level that is independent of the clip's strength."""
        template, word, question, neutral_level = (int(rng.integers(count)) for count in (4, 4, 4, 3))
        thing = int(rng.choice(THINGS_OF[split]))
        level = neutral_level if emotion is None else level
        return cls(template, thing, level, emotion, word, question if question < 3 else None)

    def text(self, language: str) -> str:
        words = NEUTRAL[language] if self.emotion is None else WORDS[language][self.emotion]
        claim = {"level": LEVELS[language][self.level], "word": words[self.word]}
        return TEMPLATES[language][self.template].format(thing=THINGS[language][self.thing], **claim)

    def asked(self, language: str) -> str | None:
        """The question before the line; None if there is no question."""
        if self.question is None:
            return None
        return QUESTIONS[language][self.question].format(thing=THINGS[language][self.thing])

    def sounds(self) -> list[int | None]:
        """The syllables as indices in `VOWELS`, None for a pause. Both languages use those of the English line.

        Every claim has the same vowels (`CLAIM`), so that the sound does not reveal the claimed emotion.
        """
        spoken = TEMPLATES["en"][self.template].format(thing=THINGS["en"][self.thing], level="", word="")
        letters = re.findall(r",|[aeiouy]+", spoken.lower())
        return [None if run == "," else VOWELS.find(run[0].replace("y", "i")) for run in letters] + list(CLAIM)
