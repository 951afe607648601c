"""Answers the clips of the page's users, within limits, and deletes them."""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


LOGGER = logging.getLogger(__name__)
LONGEST_WORDS = 5000  # characters
FAILED = "The clip could not be answered: an error in the program. Nothing of it was kept."


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
    """Uploads that wait for their answer or are being answered, each in a folder of its own.

    Gradio gives equal files of two users one path. An upload is therefore taken away from there before it waits.

    Args:
        kept: Files of the page itself, such as examples, which stay where they are.
    """

    def __init__(self, kept: list[str]):
        self.kept = set(kept)
        self._folder = tempfile.TemporaryDirectory(prefix="egmf-space-")

    def take(self, path: str | None) -> str | None:
        """Moves an upload to a folder of its own, and returns its new path.

        Raises:
            Refusal: If there is no such file, or it is no regular file.
        """
        if path is None or path in self.kept:
            return path
        folder = Path(self._folder.name, uuid.uuid4().hex)
        if os.path.islink(path) or not os.path.isfile(path):
            raise Refusal("The clip is no longer on the server. Please choose it again.")
        folder.mkdir()
        taken = folder / Path(path).name
        try:
            shutil.move(path, taken)
        except OSError:  # somebody with the same file was faster
            folder.rmdir()
            raise Refusal("The clip is no longer on the server. Please choose it again.") from None
        with suppress(OSError):
            Path(path).parent.rmdir()
        return str(taken)

    def delete(self, path: str | None) -> None:
        """Deletes an upload that was taken."""
        if path is not None and path not in self.kept:
            shutil.rmtree(Path(path).parent, ignore_errors=True)


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
            Refusal: If there is only one, or one is there twice.
        """
        found = [label.strip() for label in (self.labels or "").replace("\n", ",").split(",")]
        found = [label for label in found if label]
        if found and (len(found) < 2 or len(set(found)) < len(found)):
            raise Refusal(f"Your own labels: got {', '.join(found)}, wanted two or more different ones.")
        return found or None


class Recognizer:
    """Answers questions with a pipeline. Messages name a file, but no folder of the server.

    Args:
        recognize: The pipeline of a model.
        max_seconds: Length of the longest clip in seconds.
        transcriber: Folder or Hub id of a speech recognition model for clips without words.
    """

    def __init__(self, recognize: Any, max_seconds: float, transcriber: str | None = None):
        self.recognize, self.max_seconds = recognize, max_seconds
        self.transcriber: Any = None
        if transcriber is not None:
            self.transcriber = recognize.processor.transcriber_class(transcriber, device=recognize.device)
            self.transcriber.load()

    @property
    def media(self) -> list[str]:
        """The media that the model reads: some of "audio" and "video"."""
        processor = self.recognize.processor
        parts = {"audio": processor.feature_extractor, "video": processor.image_processor}
        return [name for name, part in parts.items() if part is not None]

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
        length = processor.length_of(file)
        self._check_length(length or 0.0)
        sample = {"file": file, "text": words}
        with tempfile.TemporaryDirectory(prefix="egmf-words-") as cache:
            if self.transcriber is not None and words is None:
                self.transcriber.cache = Path(cache)  # what was said is not kept either
                options["transcriber"] = self.transcriber
            if words is not None or length is not None and length <= processor.window:
                yield self.recognize(sample, **options)
            else:
                yield from self.recognize.answer_segments(sample, progress=self._check_length, **options)

    def _check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise Refusal(f"The clip is too long: got more than {self.max_seconds:g} seconds, the limit of this page.")


def _placed(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with `start` and `end` instead of a `timestamp`."""
    if "timestamp" not in answer:
        return answer
    start, end = answer["timestamp"]
    rest = {name: value for name, value in answer.items() if name != "timestamp"}
    return {"start": round(start, 3), "end": round(end, 3), **rest}
