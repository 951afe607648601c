"""Answers the clips of the page's users, within limits, and deletes them."""

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


LOGGER = logging.getLogger(__name__)
LONGEST_WORDS = 5000  # characters
MOST_LABELS, LONGEST_LABELS = 50, 1000  # the user's own, and their characters; memory grows with the cube of both
FAILED = "An internal error occurred, so there is no answer. An uploaded clip has been deleted."


class NamedFile(os.PathLike):
    """A file in `path` that messages call by its name alone."""

    def __init__(self, path: str):
        self.path = path

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return Path(self.path).name


class Refusal(ValueError):
    """What a user asked for is not answered; the message says why."""


class Uploads:
    """The folder for uploads, each of which is deleted after its answer, or after a while.

    Args:
        kept: Files of the page itself, such as examples, which stay where they are.

    Attributes:
        folder: The folder, which is deleted at the end of the program.
    """

    def __init__(self, kept: list[str]):
        self.kept = set(kept)
        self._temporary = tempfile.TemporaryDirectory(prefix="egmf-space-")
        self.folder = Path(self._temporary.name).resolve()

    @contextmanager
    def held(self, path: str | None) -> Iterator[str | None]:
        """Yields an upload's path, and deletes the upload afterwards.

        Raises:
            Refusal: If there is no such upload, or it is no regular file.
        """
        if path is None or path in self.kept:
            yield path
            return
        if os.path.islink(path) or not Path(path).resolve().is_relative_to(self.folder) or not os.path.isfile(path):
            raise Refusal("The clip is no longer on the server. Please choose it again.")
        try:
            yield path
        finally:
            with suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))

    def sweep(self, age: float) -> None:
        """Deletes files that are older than `age` seconds: nobody asked about them, or their upload broke off."""
        for folder, _, names in os.walk(self.folder, topdown=False):
            with suppress(OSError):  # it is answered or deleted at this moment
                for path in (Path(folder, name) for name in names):
                    if time.time() - path.lstat().st_ctime > age:
                        path.unlink()
                if folder != str(self.folder):
                    os.rmdir(folder)

    def sweep_often(self, pause: float, age: float) -> None:
        """Sweeps every `pause` seconds, in the background, as long as the program runs."""

        def run() -> None:
            while True:
                time.sleep(pause)
                self.sweep(age)

        threading.Thread(target=run, daemon=True).start()


@dataclass(frozen=True)
class Question:
    """What a user asks: a clip, or words, or both.

    Args:
        file: Path of the clip.
        words: What is said in it.
        task: Name of the task.
        labels: The user's own labels, as typed: separated by commas or lines.
    """

    file: str | None = None
    words: str | None = None
    task: str | None = None
    labels: str | None = None

    @property
    def candidates(self) -> list[str] | None:
        """The user's own labels; None without any.

        Raises:
            Refusal: If there is only one, one is there twice, or they are too many or too long.
        """
        typed = self.labels or ""
        if len(typed) > LONGEST_LABELS:
            raise Refusal(f"Your own labels: got {len(typed)} characters, wanted at most {LONGEST_LABELS}.")
        found = [label.strip() for label in typed.replace("\n", ",").split(",")]
        found = [label for label in found if label]
        if len(found) > MOST_LABELS:
            raise Refusal(f"Your own labels: got {len(found)}, wanted at most {MOST_LABELS}.")
        if found and (len(found) < 2 or len(set(found)) < len(found)):
            raise Refusal(f"Your own labels: got {', '.join(found)}, wanted two or more different ones.")
        return found or None


class Recognizer:
    """Answers questions with a pipeline. Messages name a file, but no folder of the server.

    Args:
        recognize: The pipeline of a model.
        max_seconds: Length of the longest clip in seconds.
        transcriber: Folder or Hub id of a speech recognition model for clips without words.

    Raises:
        ValueError: If the transcriber is none.
    """

    def __init__(self, recognize: Any, max_seconds: float, transcriber: str | None = None):
        self.recognize, self.max_seconds = recognize, max_seconds
        self.transcriber: Any = None
        if transcriber is not None and not self.reads_text:
            raise ValueError("transcriber: got one, wanted none: the model was trained without words")
        if transcriber is not None:
            self.transcriber = recognize.processor.transcriber_class(transcriber, device=recognize.device)
            self.transcriber.load()

    @property
    def media(self) -> list[str]:
        """The media that the model reads: some of "audio" and "video"."""
        processor = self.recognize.processor
        parts = {"audio": processor.feature_extractor, "video": processor.image_processor}
        return [name for name, part in parts.items() if part is not None]

    @property
    def reads_text(self) -> bool:
        """Whether the model was trained with words."""
        # The processor's code is the model's own, which may be older.
        return "text" in (getattr(self.recognize.processor, "trained_modalities", None) or ["text"])

    def __call__(self, question: Question) -> Iterator[list[dict[str, Any]]]:
        """Yields the answers so far, in the form of those of predict.py, while a recording is read.

        The last answer of the last list is the one to the whole clip; its `error` says why there is none.
        """
        name = "words" if question.file is None else Path(question.file).name
        answers: list[dict[str, Any]] = []
        try:
            for answer in self._answers(question):
                answers.append({"file": name, **_placed(answer)})
                yield list(answers)
        except (Refusal, self.recognize.processor.media_error) as refusal:
            yield [*answers, {"file": name, "error": str(refusal)}]
        except Exception as error:  # its message may contain the user's words, or a path
            LOGGER.error("an answer failed: %s", type(error).__name__)
            yield [*answers, {"file": name, "error": FAILED}]

    def _answers(self, question: Question) -> Iterator[dict[str, Any]]:
        words = (question.words or "").strip() or None
        options: dict[str, Any] = {"task": question.task, "candidate_labels": question.candidates}
        if words is not None and len(words) > LONGEST_WORDS:
            raise Refusal(f"What is said: got {len(words)} characters, wanted at most {LONGEST_WORDS}.")
        if question.file is None and words is None:
            raise Refusal("There is nothing to answer: please choose or record a clip, or type words.")
        if question.file is None:
            yield self.recognize({"text": words}, **options)
            return
        file = NamedFile(question.file)
        processor = self.recognize.processor
        # A file that states no length, as browsers record them, is "long" for any window.
        if processor.is_long(file, self.max_seconds) and not processor.is_long(file, math.inf):
            raise self._too_long()
        sample = {"file": file, "text": words}
        with tempfile.TemporaryDirectory(prefix="egmf-words-") as cache:
            if self.transcriber is not None and words is None:
                self.transcriber.cache = Path(cache)  # what was said is not kept either
                options["transcriber"] = self.transcriber
            if words is not None or not processor.is_long(file):
                answer = self.recognize(sample, **options)
                self._check_length(answer["seconds"] or 0.0)
                yield answer
            else:
                yield from self.recognize.answer_segments(sample, progress=self._check_length, **options)

    def _check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise self._too_long()

    def _too_long(self) -> Refusal:
        return Refusal(f"The clip is too long: got more than {self.max_seconds:g} seconds, the limit of this page.")


def _placed(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with `start` and `end` instead of a `timestamp`, and without the folder of a local transcriber."""
    if os.path.isdir(answer.get("recognized_by") or ""):
        answer = answer | {"recognized_by": Path(answer["recognized_by"]).name}
    if "timestamp" not in answer:
        return answer
    start, end = answer["timestamp"]
    rest = {name: value for name, value in answer.items() if name != "timestamp"}
    return {"start": round(start, 3), "end": round(end, 3), **rest}
