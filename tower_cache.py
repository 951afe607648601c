"""What frozen towers give for a corpus's clips, computed once and kept on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from processing_egmf import EGMFProcessor


PREPROCESSORS = {"audio": "feature_extractor", "vision": "image_processor"}
COLUMNS = {"audio": "audio", "vision": "video"}  # of the corpus schema


class TowerCache:
    """Hidden layers of frozen towers, one file per clip on disk, computed once.

    An entry is found by the tower (weights and config), the preprocessing and the file's content, so that neither
    another tower nor another file of the same name can be taken for it. Interrupted filling leaves whole entries.

    Args:
        model: The model with the towers.
        processor: Its processor.
        modalities: Those whose towers are frozen.
        precision: Autocast that training runs under; entries are computed in it.
        folder: Where entries are kept; by default beside the Hub's cache.

    Attributes:
        errors: Why files gave nothing, by path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: EGMFProcessor,
        modalities: Iterable[str],
        precision: AbstractContextManager | None = None,
        folder: str | os.PathLike | None = None,
    ):
        self.model, self.processor, self.precision = model, processor, precision or nullcontext()
        root = Path(folder or Path(constants.HF_HOME) / "egmf" / "towers")
        self.folders = {name: root / f"{name}-{self._fingerprint(name)}" for name in modalities}
        self.errors: dict[str, str] = {}
        self._hashes: dict[str, str] = {}

    def _fingerprint(self, modality: str) -> str:
        tower = getattr(self.model.base_model, f"{modality}_tower")
        preprocessor = getattr(self.processor, PREPROCESSORS[modality])
        settings = {"config": tower.config.to_dict(), "preprocessor": preprocessor.to_dict()}
        settings["versions"] = [torch.__version__, transformers.__version__]
        settings["autocast"] = str(getattr(self.precision, "fast_dtype", None))
        if modality == "vision":
            settings["num_frames"] = self.processor.num_frames
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, value in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _entry(self, modality: str, path: str) -> Path:
        if path not in self._hashes:
            with open(path, "rb") as file:
                self._hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        content = self._hashes[path]
        return self.folders[modality] / content[:2] / f"{content}.safetensors"

    @torch.no_grad()
    def fill(self, rows: Iterable[dict], device: torch.device) -> None:
        """Computes what is missing for the rows' files."""
        todo = {}
        for row in rows:
            for modality in self.folders:
                path = row[COLUMNS[modality]]
                if path is not None and (modality, path) not in todo:
                    try:
                        if not self._entry(modality, path).exists():
                            todo[modality, path] = None
                    except OSError as error:
                        self.errors[path] = f"Cannot read {path!r}: {error.strerror}."
        for modality, path in tqdm(todo, desc="towers", unit="clip", disable=None if todo else True):
            media = {"audio": path} if modality == "audio" else {"video": path, "sound_track": False}
            try:
                batch = self.processor.media_inputs([self.processor.load_media(**media)], return_tensors="pt")
            except self.processor.media_error as error:
                self.errors[path] = str(error)
                continue
            with self.precision:
                encoded = self.model.encode_media({name: value.to(device) for name, value in batch.items()})
            mask = encoded[f"{modality}_mask"][0].bool()
            entry = self._entry(modality, path)
            entry.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                name: encoded[f"{modality}_{name}"][0][mask].cpu().contiguous() for name in ("features", "times")
            }
            with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".tmp", delete=False) as scratch:
                pass
            save_file(tensors, scratch.name)
            os.replace(scratch.name, entry)

    def load(self, modality: str, path: str | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hidden layers (T, layers + 1, size) and seconds (T,) of a filled-in file; None if it gave nothing."""
        if path is None or path in self.errors:
            return None
        with safe_open(self._entry(modality, path), "pt") as tensors:
            return tensors.get_tensor("features"), tensors.get_tensor("times")
