"""Recognises the words of recordings with a speech recognition model of transformers, and caches them."""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from transformers import AutoConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from .media_inputs_egmf import MediaInputsMixin
from .media_readers_egmf import SILENCE, MediaError
from .recordings_egmf import RecordingSpans
from .samples_egmf import is_file, on_disk


LOGGER = logging.getLogger(__name__)
PIECE = 28.0  # seconds that are recognised together: Whisper hears 30
GAP = 0.5  # seconds without a word that end a segment, for models that give the times of words
VERSION = 1  # of the cache's entries


class Transcriber(MediaInputsMixin):
    """Recognises words with any model of the pipeline `automatic-speech-recognition`.

    A recording is divided at pauses into pieces of at most 28 seconds, so that memory stays bounded. The results are
    kept in a cache: the same file, model and language are recognised once.

    Args:
        model: Folder or Hub id of the model.
        language: Language of the recordings, such as "en", for multilingual models; they detect it by default.
        cache: Folder of the cache, by default `egmf/transcripts` in `HF_HOME`.
        device: As for `transformers.pipeline`.

    Raises:
        ValueError: If the model does not recognise speech, or cannot be told the language.
    """

    image_processor, num_frames, audio_window = None, 0, math.inf  # what `MediaInputsMixin` reads with

    def __init__(
        self,
        model: str | os.PathLike,
        language: str | None = None,
        cache: str | os.PathLike | None = None,
        device: Any = None,
    ):
        self.model, self.language, self.device = os.fspath(model), language, device
        self.cache = Path(cache or Path(constants.HF_HOME) / "egmf" / "transcripts")
        self._pipeline: Any = None
        self._identity = ""

    @property
    def feature_extractor(self) -> Any:
        return self.pipeline.feature_extractor

    @property
    def pipeline(self) -> Any:
        """The speech recognition pipeline."""
        self.load()
        return self._pipeline

    def load(self) -> None:
        """Loads the model, if it is not loaded yet."""
        if self._pipeline is not None:
            return
        from transformers import pipeline  # takes long to import, and few need it

        with self._naming_model():
            made = pipeline("automatic-speech-recognition", model=self.model, device=self.device)
        if self.language:
            self._check_language(made)
        self._pipeline = made

    @contextmanager
    def _naming_model(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            wanted = "a speech recognition model that transformers loads"
            raise ValueError(f"transcriber: got {self.model}, wanted {wanted} ({reason})") from error

    def _check_language(self, made: Any) -> None:
        """Raises a ValueError if the model cannot be told the language."""
        known = getattr(made.model.generation_config, "lang_to_id", None) if made.type == "seq2seq_whisper" else None
        if not known:
            wanted = "no language: this model cannot be told one"
            raise ValueError(f"language: got {self.language!r} for {self.model}, wanted {wanted}")
        code = TO_LANGUAGE_CODE.get(str(self.language).lower(), str(self.language).lower())
        if f"<|{code}|>" not in known:
            wanted = ", ".join(name.strip("<|>") for name in known)
            raise ValueError(f"language: got {self.language!r} for {self.model}, wanted one of {wanted}")

    def __call__(self, source: Any, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Recognises the words of a recording.

        Args:
            source: A path, a URL, the bytes of a file, or `{"array", "sampling_rate"}`.
            progress: Called with the seconds that have been read.

        Returns:
            `text`; `chunks`, a list of segments with `timestamp` (start, end) in seconds and `text`; `language`, as
            far as the model names one; and `recognized_by`, the model.

        Raises:
            MediaError: If no sound can be decoded.
        """
        with on_disk(source) as source:
            entry = self.cache / f"{self._key(source)}.json"
            if entry.is_file():
                return json.loads(entry.read_text(encoding="utf-8"))
            found = self._recognize(source, progress)
        try:
            self._keep(entry, found)
        except OSError as error:
            LOGGER.warning("%s: the transcript is not kept: %s", self.cache, error.strerror or error)
        return found

    @staticmethod
    def _keep(entry: Path, found: dict[str, Any]) -> None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent) as folder:
            unfinished = Path(folder, entry.name)
            unfinished.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            os.replace(unfinished, entry)  # an interrupted call leaves no half entry

    def _key(self, source: Any) -> str:
        if not self._identity:
            with self._naming_model():
                self._identity = f"{self.model} {_state_of(self.model)} {self.language} {VERSION} "
        digest = hashlib.sha256(self._identity.encode())
        if is_file(source):
            try:
                with open(source, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise MediaError(source, "not readable", (error.strerror or str(error)).lower()) from None
        else:
            samples = self.load_media(source).audio.samples
            digest.update(samples.tobytes())
        return digest.hexdigest()

    def _recognize(self, source: Any, progress: Callable[[float], None] | None) -> dict[str, Any]:
        chunks: list[dict] = []
        languages: Counter[str] = Counter()
        for span in RecordingSpans(self, {"audio": source}, None, PIECE, progress=progress):
            if span.audio is None or np.abs(span.audio.samples).max() <= SILENCE:
                continue  # models hear words in silence
            for start, end, text, language in self._piece(span.audio.samples, span.end - span.start):
                start, end = round(span.start + start, 3), round(span.start + end, 3)
                languages.update([language] if language else [])
                if start < end and text:
                    chunks.append({"timestamp": [start, end], "text": text})
                elif chunks and text:  # words without a length belong to those before them
                    chunks[-1]["text"] += f" {text}"
        return {
            "text": " ".join(chunk["text"] for chunk in chunks),
            "chunks": chunks,
            "language": next((name for name, _ in languages.most_common(1)), self.language),
            "recognized_by": self.model,
        }

    def _piece(self, samples: np.ndarray, length: float) -> Iterator[tuple[float, float, str, str | None]]:
        """The segments of a piece: start, end, text and language."""
        kind, options = self.pipeline.type, {}
        if kind == "seq2seq_whisper":
            options["return_timestamps"] = True
            if getattr(self.pipeline.model.generation_config, "lang_to_id", None):
                asked = {"language": self.language} if self.language else {}
                options |= {"return_language": True, "generate_kwargs": {"task": "transcribe", **asked}}
        elif kind in ("ctc", "ctc_with_lm"):
            options["return_timestamps"] = "word"
        sound = {"raw": samples, "sampling_rate": self.feature_extractor.sampling_rate}
        found = self.pipeline(sound, **options)
        chunks = found.get("chunks") or [{"text": found["text"], "timestamp": (0.0, length)}]
        if options.get("return_timestamps") == "word":
            chunks = _joined(chunks)
        for chunk in chunks:
            start, end = chunk["timestamp"]
            end = length if end is None else min(end, length)
            yield min(start or 0.0, end), end, " ".join(chunk["text"].split()), chunk.get("language")


def _joined(words: list[dict]) -> list[dict]:
    """Joins words to segments that end where nothing is said."""
    joined: list[dict] = []
    for word in words:
        (start, end), text = word["timestamp"], word["text"].strip()
        if joined and start - joined[-1]["timestamp"][1] < GAP:
            last = joined[-1]
            joined[-1] = {"text": f"{last['text']} {text}", "timestamp": (last["timestamp"][0], end)}
        else:
            joined.append({"text": text, "timestamp": (start, end)})
    return joined


def _state_of(model: str) -> str:
    """What changes with a model's files: the commit of a Hub model, else their names, sizes and times."""
    if os.path.isdir(model):
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(model).iterdir())
        return hashlib.sha256(repr(files).encode()).hexdigest()
    return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None))
