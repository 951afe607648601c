"""The answers to a clip as HTML: the answer, its distribution, the weights of the gate, a timeline and downloads."""

import json
import tempfile
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from egmf.prediction.outputs import Output


Answer = dict[str, Any]
# Of labels, in the order of the task: colours that people with colour blindness can tell apart (Okabe and Ito).
COLORS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")
DARK = {"#0072b2"}  # what needs white letters
NEGATIVE, MIDDLE, POSITIVE = (230, 159, 0), (245, 245, 245), (86, 180, 233)  # of scores
MODALITIES = {"text": "words", "audio": "voice", "vision": "face"}
DOWNLOADS = {".json": ("JSON", "application/json"), ".csv": ("CSV", "text/csv"), ".vtt": ("WebVTT", "text/vtt")}


def render_answer(answers: list[Answer], has_ended: bool = True) -> str:
    """The panel beside the clip. The last answer is that to the whole clip, if it `has_ended`."""
    last = answers[-1]
    if last["error"]:
        return f'<p class="egmf-error" role="alert">{escape(last["error"])}</p>'
    if not has_ended:
        return f'<p class="egmf-wait">Answered up to {_clock(last["end"])} …</p>'
    parts = [_headline(last), _said(last), _distribution(last), _gates(last["gate_weights"])]
    notes = [escape(note) for note in dict.fromkeys(last["warnings"])]
    for answer in answers[:-1]:
        when = f"{_clock(answer['start'])} to {_clock(answer['end'])}"
        notes += [f"{when}: {escape(note)}" for note in answer["warnings"] if note not in last["warnings"]]
    if notes:
        items = "".join(f"<li>{note}</li>" for note in notes)
        parts.append(f'<section class="egmf-notes"><h2>Warnings</h2><ul>{items}</ul></section>')
    return "".join([*parts, _segments(answers), _downloads(answers)])


def render_timeline(answers: list[Answer]) -> str:
    """The segments of a clip in its time, as buttons that the page's script makes the player jump with."""
    segments = [answer for answer in answers if "segments" not in answer and not answer["error"]]
    if segments and "start" not in segments[0]:
        if not segments[0]["seconds"]:
            return ""
        segments = [{**segments[0], "start": 0.0, "end": segments[0]["seconds"]}]
    items, at = [], 0.0
    for segment in segments:
        start, end = segment["start"], segment["end"]
        if start > at:
            items.append(f'<li class="egmf-gap" style="flex-grow:{start - at:.3f}" aria-hidden="true"></li>')
        value, at = _value(segment), max(at, end)
        spoken = f"{_clock(start)} to {_clock(end)}: {_long_value(segment)}"
        words = f", “{segment['text']}”" if segment.get("text") else ""
        items.append(
            f'<li style="flex-grow:{max(end - start, 0.001):.3f}"><button type="button" data-start="{start:.3f}" '
            f'data-end="{end:.3f}" style="{_color(segment)}" title="{escape(spoken + words)}" '
            f'aria-label="{escape(spoken + words)}. Play from here"><span>{escape(value)}</span></button></li>'
        )
    if not items:
        return ""
    ends = f"<span>{_clock(0)}</span><span>{_clock(at)}</span>"
    return (
        f'<ol class="egmf-timeline" aria-label="Answers along the clip">{"".join(items)}</ol>'
        f'<div class="egmf-clock" aria-hidden="true">{ends}</div>'
        + ("" if _is_score(segments[0]) else _legend(segments[0]))
    )


def _legend(segment: Answer) -> str:
    """What the colours of labels mean, for segments that are too narrow for words."""
    colors = {label: _color({**segment, "label": label}) for label in segment["probabilities"]}
    items = "".join(f'<li><i style="{color}"></i>{escape(label)}</li>' for label, color in colors.items())
    return f'<ul class="egmf-legend">{items}</ul>'


def _clock(seconds: float) -> str:
    """Minutes and seconds, such as 1:02.5."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    return f"{minutes}:{tenths // 10:02d}.{tenths % 10}"


def _is_score(answer: Answer) -> bool:
    return "score" in answer


def _value(answer: Answer) -> str:
    return f"{answer['score']:+.2f}" if _is_score(answer) else answer["label"]


def _long_value(answer: Answer) -> str:
    if not _is_score(answer):
        return f"{answer['label']}, {_percent(answer['probabilities'][answer['label']])}"
    low, high = answer["interval"]
    return f"{answer['score']:+.2f} ({low:+.1f} to {high:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _color(answer: Answer) -> str:
    """The style of an answer's colour, which never stands without its value in words."""
    if not _is_score(answer):
        color = COLORS[list(answer["probabilities"]).index(answer["label"]) % len(COLORS)]
        return f"background:{color};color:{'#fff' if color in DARK else '#111'}"
    scores = [float(name) for name in answer["probabilities"]]
    place = 2 * (answer["score"] - scores[0]) / (scores[-1] - scores[0]) - 1
    end = POSITIVE if place > 0 else NEGATIVE
    mixed = (round(a + abs(place) * (b - a)) for a, b in zip(MIDDLE, end, strict=True))
    return f"background:rgb({','.join(map(str, mixed))});color:#111"


def _headline(answer: Answer) -> str:
    whole = f"mean of {answer['segments']} segments" if answer.get("segments", 1) > 1 else ""
    if _is_score(answer):
        low, high = answer["interval"]
        note = f"90 % interval {low:+.1f} to {high:+.1f}, median {answer['median']:+.1f}"
    else:
        note = _percent(answer["probabilities"][answer["label"]])
    note = ", ".join(filter(None, [note, whole]))
    return f'<p class="egmf-answer"><strong>{escape(_value(answer))}</strong> <span>{note}</span></p>'


def _said(answer: Answer) -> str:
    if not answer.get("recognized_by"):
        return ""
    language = f", language: {escape(answer['language'])}" if answer.get("language") else ""
    words = f"“{escape(answer['text'])}”" if answer.get("text") else "no words"
    by = f"(by {escape(answer['recognized_by'])}{language})"
    return f'<p class="egmf-said">Recognised: {words} <span>{by}</span></p>'


def _distribution(answer: Answer) -> str:
    probabilities = answer["probabilities"]
    if _is_score(answer):
        top = max(probabilities.values())
        columns = "".join(
            f'<i style="height:{100 * share / top:.1f}%" title="{escape(score)}: {100 * share:.1f} %"></i>'
            for score, share in probabilities.items()
        )
        low, *_, high = probabilities
        best = max(probabilities, key=probabilities.__getitem__)
        spoken = f"Distribution over the scores from {low} to {high}; {best} is most probable, {_percent(top)}"
        axis = f"<span>{escape(low)}</span><span>{escape(high)}</span>"
        return (
            f'<section><h2>Distribution</h2><div class="egmf-columns" role="img" aria-label="{escape(spoken)}">'
            f'{columns}</div><div class="egmf-clock" aria-hidden="true">{axis}</div></section>'
        )
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td class="egmf-bar"><i style="width:{100 * share:.1f}%"></i></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for label, share in probabilities.items()
    )
    return f'<section><h2>Probabilities</h2><table class="egmf-shares"><tbody>{rows}</tbody></table></section>'


def _gates(weights: dict[str, Any]) -> str:
    """A table with a row for each expert: its weight, and those of the modalities inside it."""
    modalities = list(next(iter(weights["modality"].values())))
    head = "".join(f'<th scope="col">{escape(MODALITIES.get(name, name))}</th>' for name in ("expert", *modalities))
    rows = "".join(
        f'<tr><th scope="row">{escape(expert)} <span>{_percent(weights["expert"][expert])}</span></th>'
        + "".join(_cell(weights["modality"][expert][name]) for name in modalities)
        + "</tr>"
        for expert in weights["modality"]
    )
    return (
        "<section><h2>What the gate weighed</h2>"
        f'<table class="egmf-gates"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "<p>The weight of each expert, and of the modalities inside it. Weights say what was mixed, not why.</p>"
        "</section>"
    )


def _cell(share: float) -> str:
    return f'<td style="--share:{100 * share:.0f}%">{_percent(share)}</td>'


def _segments(answers: list[Answer]) -> str:
    """A table of the segments, for screen readers and small screens."""
    if len(answers) < 3:
        return ""
    rows = "".join(
        f"<tr><td>{_clock(one['start'])} to {_clock(one['end'])}</td>"
        f"<td>{escape(_long_value(one))}</td><td>{escape(one.get('text') or '')}</td></tr>"
        for one in answers[:-1]
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("time", "answer", "words"))
    return (
        f"<details><summary>{len(answers) - 1} segments</summary>"
        f'<table class="egmf-segments"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )


def _downloads(answers: list[Answer]) -> str:
    """Links that hold the files themselves: the server keeps none."""
    name = Path(answers[0]["file"]).stem
    links = [
        f'<a download="{escape(name + suffix)}" href="data:{kind};base64,{b64encode(content).decode()}">{title}</a>'
        for (suffix, (title, kind)), content in zip(DOWNLOADS.items(), _files(answers), strict=True)
    ]
    return f'<p class="egmf-downloads">Download: {" ".join(links)}</p>'


def _files(answers: list[Answer]) -> Iterable[bytes]:
    """The answers as the files of `DOWNLOADS`."""
    yield json.dumps(answers, ensure_ascii=False, indent=1).encode()
    with tempfile.TemporaryDirectory() as folder:
        for suffix in list(DOWNLOADS)[1:]:
            path = Path(folder, f"answers{suffix}")
            with Output(path) as output:
                for answer in answers:
                    output.write(answer)
            yield path.read_bytes()
