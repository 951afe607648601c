"""Cache on disk for the clips of a corpus: hidden layers of frozen towers, inputs of trained towers."""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from corpora.clips import split_part
from egmf.data.clips import load_together
from egmf.files import writing
from egmf.media_egmf import AudioClip
from egmf.media_inputs_egmf import Media, TowerInput
from egmf.processes import default_workers
from egmf.processing_egmf import EGMFProcessor


DECODING = ("media_egmf", "media_readers_egmf", "media_inputs_egmf")
CUTTING = ("egmf.data.clips", "egmf.media_recordings_egmf", "egmf.spans_egmf")
PREPROCESSORS = {"audio": "feature_extractor", "vision": "image_processor"}
COLUMNS = {"audio": "audio", "vision": "video"}  # of the corpus schema
# The packages that decode and compute; the version of one that is not installed counts as None.
PACKAGES = ("av", "decord2", "numpy", "pillow", "soundfile", "soxr", "torch", "torchaudio", "torchvision")
PACKAGES += ("transformers",)


TOGETHER = 96  # entries that one worker reads of a recording, so that others can read the rest
Key = tuple[str, str, float]  # of an entry: modality, path and speed


class TowerCache:
    """Hidden layers of frozen towers and inputs of trained towers: one file per clip, computed once.

    An entry's name contains a digest of the file and of everything else that its values depend on: the code and the
    packages that decode and preprocess; for a frozen tower also its class, config, weights and attention
    implementation, the autocast dtype, the kind of device, and the precision of float32 products there. A run thus
    never reads values that it would not compute itself. Every entry is written atomically. Unused entries are never
    deleted automatically; the folder may be deleted between runs.

    Args:
        model: The model with the towers.
        processor: Its processor.
        frozen: Modalities whose towers are frozen.
        trained: Modalities whose towers are trained.
        autocast: Dtype of autocast during training, under which hidden layers are computed; None without autocast.
        folder: Folder of the entries; by default `egmf/towers` in `HF_HOME`.
        inputs: A cache of tower inputs; files with an entry in it are not decoded again.

    Attributes:
        folders: Folders of the entries, by modality.
        errors: Errors of files that could not be read, by modality and path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: EGMFProcessor,
        frozen: Iterable[str],
        trained: Iterable[str] = (),
        autocast: torch.dtype | None = None,
        folder: str | os.PathLike | None = None,
        inputs: "TowerCache | None" = None,
    ):
        self.inputs = inputs
        self.model, self.processor, self.autocast = model, processor, autocast
        self.frozen, self.trained = frozenset(frozen), frozenset(trained)
        root = Path(folder or Path(constants.HF_HOME) / "egmf" / "towers")
        names = self.frozen | self.trained
        self.folders = {name: root / f"{name}-{self._fingerprint(name)}" for name in sorted(names)}
        self.errors: dict[tuple[str, str], str] = {}
        self._hashes: dict[str, str] = inputs._hashes if inputs else {}  # files are hashed once

    def _tower(self, modality: str) -> PreTrainedModel:
        return getattr(self.model.base_model, f"{modality}_tower")

    def _fingerprint(self, modality: str) -> str:
        settings = {"preprocessor": getattr(self.processor, PREPROCESSORS[modality]).to_dict()}
        settings["packages"] = {name: _version(name) for name in PACKAGES}
        if modality == "vision":
            settings["num_frames"] = self.processor.num_frames
        # Clips inside recordings are read by this clone's code, not by a checkpoint's.
        code = [_sibling(self.processor, name) for name in DECODING] + [import_module(name) for name in CUTTING]
        code.append(_Files)
        weights = []
        if modality in self.frozen:
            tower = self._tower(modality)
            settings |= {"class": type(tower).__name__, "config": tower.config.to_dict()}
            settings["attention"] = tower.config._attn_implementation  # `to_dict` does not include it
            settings["input_rate"] = self.model.config.audio_input_rate
            settings["layers"] = self.model.config.tower_layers.get(modality)
            settings["frame_pooling"] = self.model.config.frame_pooling.get(modality)
            settings["autocast"] = str(self.autocast)
            settings["device"] = (tower.device.type, _float32_precision(tower.device.type))
            body = self.model.base_model
            code += [_sibling(body, "towers_egmf"), type(body).encode_media, type(body)._modality]
            code += [type(body).get_audio_features, type(body).get_vision_features, type(body)._pool]
            weights = sorted(tower.state_dict().items())
        code.append(TowerCache._tensors)
        settings["code"] = [hashlib.sha256(inspect.getsource(part).encode()).hexdigest() for part in code]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, value in weights:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _entry(self, modality: str, path: str, speed: float = 1.0) -> Path:
        whole, _, _ = split_part(path)
        if whole not in self._hashes:
            with open(whole, "rb") as file:
                self._hashes[whole] = hashlib.file_digest(file, "sha256").hexdigest()
        content = self._hashes[whole] + path.removeprefix(whole) + (f"-{speed}" if speed != 1.0 else "")
        return self.folders[modality] / content[:2] / f"{content}.safetensors"

    def fill(self, rows: Iterable[dict], device: torch.device, speeds: Iterable[float] = (1.0,)) -> None:
        """Computes the missing entries of the rows' files, reading with one worker per available core.

        Audio is stored at each of the `speeds`; at 1.1, tempo and pitch are a tenth higher. Each training process
        computes a share and waits for the others; all then know every error.

        Raises:
            FileNotFoundError: If an entry that another process wrote cannot be found here.
        """
        wanted: dict[Key, None] = {}
        for row in rows:
            for modality in self.folders:
                path = row[COLUMNS[modality]]
                for speed in speeds if modality == "audio" else (1.0,):
                    if path is not None:
                        wanted[modality, path, speed] = None
        state = PartialState()
        # Each process takes a share of all entries, because the set of missing ones changes while others fill.
        share = _by_file(wanted)[state.process_index :: state.num_processes]
        missing = ([key for key in group if not self.has(*key)] for group in share)
        self._compute([group for group in missing if group], device)
        for errors, hashes in gather_object([(self.errors, self._hashes)]):
            self.errors |= errors
            self._hashes |= hashes
        there = (state.num_processes == 1 or key[:2] in self.errors or self.has(*key) for key in wanted)
        if absent := sum(not found for found in there):
            where = ", ".join(map(str, self.folders.values()))
            wanted_place = "a folder that all machines of the run share: set HF_HOME to one"
            raise FileNotFoundError(
                f"tower cache: got {absent} of {len(wanted)} entries not in {where}, wanted {wanted_place}"
            )

    def _compute(self, groups: list[list[Key]], device: torch.device) -> None:
        """Computes and writes the entries of groups of [`_by_file`]."""
        if not groups:
            return
        workers = min(len(groups), default_workers())
        for modality in self.frozen:
            self._tower(modality).eval()  # without dropout
        files = _Files(self.processor, groups, self.inputs)
        reader = DataLoader(files, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        quiet = None if PartialState().is_main_process else True
        for (modality, path, speed), made in tqdm(
            reader, desc="media", unit="clip", total=sum(map(len, groups)), disable=quiet
        ):
            if isinstance(made, str):
                self.errors[modality, path] = made
            else:
                self._write(self._entry(modality, path, speed), self._tensors(modality, made, device))

    def has(self, modality: str, path: str, speed: float = 1.0) -> bool:
        """Whether a file's entry exists; False if the file cannot be opened."""
        try:
            return self._entry(modality, path, speed).exists()
        except OSError:
            return False

    @torch.no_grad()
    def _tensors(self, modality: str, made: dict, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a clip's entry, from its tower's input."""
        if modality in self.trained:
            tensors = {name: torch.as_tensor(value) for name, value in made.items() if value is not None}
            half = tensors["values"].half()
            if torch.equal(half.to(tensors["values"]), tensors["values"]):  # half the space, and nothing is lost
                tensors["values"] = half
            return tensors
        own = _sibling(self.processor, "media_inputs_egmf")  # a checkpoint's own processor knows only its own class
        media = own.Media(**{COLUMNS[modality]: own.TowerInput(**made)})
        batch = self.processor.media_inputs([media], return_tensors="pt")
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            encoded = self.model.base_model.encode_media({name: value.to(device) for name, value in batch.items()})
        mask = encoded[f"{modality}_mask"][0].bool()
        tensors = {name: encoded[f"{modality}_{name}"][0][mask].cpu().contiguous() for name in ("features", "times")}
        half = tensors["features"].half()  # more precise than bfloat16; values as large as 65504 do not fit
        tensors["features"] = half if half.isfinite().all() else tensors["features"].bfloat16()
        return tensors

    def _write(self, entry: Path, tensors: dict[str, torch.Tensor]) -> None:
        with writing(entry):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=entry.parent) as scratch:
                save_file(tensors, Path(scratch) / entry.name)
                os.replace(Path(scratch) / entry.name, entry)

    def errors_of(self, rows: Dataset, modalities: Iterable[str]) -> dict[str, str]:
        """Why files of these modalities could not be read, by the id of their row."""
        columns = {name: rows[COLUMNS[name]][:] for name in self.folders.keys() & set(modalities)}
        found = {}
        for name, paths in columns.items() if self.errors else ():
            errors = (self.errors.get((name, path)) for path in paths)
            found |= {row_id: error for row_id, error in zip(rows["id"][:], errors, strict=True) if error}
        return found

    def load(self, modality: str, path: str | None, speed: float = 1.0) -> dict:
        """The processor's arguments for a cached file (at one of the speeds); None for a file that cannot be read.

        For a frozen tower: hidden layers `{modality}_features` (T, layers, size) in 16 bits and their times in seconds
        `{modality}_times` (T,). For a trained tower: `audio` or `video`.
        """
        there = path is not None and (modality, path) not in self.errors
        tensors = {}
        if path is not None and there:
            entry = self._entry(modality, path, speed)
            try:
                with safe_open(entry, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            except (OSError, SafetensorError) as error:
                raise OSError(f"{path}: its cache entry {entry} cannot be read: {error}") from error
        if modality in self.frozen:
            if "features" in tensors and tensors["features"].dtype == torch.float16:
                tensors["features"] = tensors["features"].numpy()  # the processor keeps the 16 bits of an array
            return {f"{modality}_{name}": tensors.get(name) for name in ("features", "times")}
        made = {name: value.float().numpy() if name == "values" else value.numpy() for name, value in tensors.items()}
        return {COLUMNS[modality]: TowerInput(**made) if there else None}


def _by_file(keys: Iterable[Key]) -> list[list[Key]]:
    """Groups of keys that are read together: a file, or up to `TOGETHER` keys of a recording's parts, by their starts.

    The groups are sorted by modality, because audio and vision take different times.
    """
    groups: dict[tuple[str, str, bool], list[tuple[float, Key]]] = {}
    for key in keys:
        path, start, _ = split_part(key[1])
        groups.setdefault((key[0], path, path == key[1]), []).append((start, key))
    by_modality = sorted(groups.items(), key=lambda item: item[0][0])
    in_order = ([key for _, key in sorted(group)] for _, group in by_modality)
    return [group[first : first + TOGETHER] for group in in_order for first in range(0, len(group), TOGETHER)]


@dataclass
class _Files(IterableDataset):
    """The keys of groups, each with the fields of its tower's input, or the error as a string."""

    processor: EGMFProcessor
    groups: list[list[Key]]
    inputs: TowerCache | None

    def __iter__(self) -> Iterator[tuple[Key, dict[str, np.ndarray | None] | str]]:
        worker = get_worker_info()
        for group in self.groups if worker is None else self.groups[worker.id :: worker.num_workers]:
            modality, speeds = group[0][0], {}
            for key in group:
                known = self._known(key)
                if known is None:
                    speeds.setdefault(key[1], []).append(key[2])
                else:
                    yield key, known
            if not speeds:
                continue
            read = load_together(self.processor, COLUMNS[modality], list(speeds))
            for (path, own), clips in zip(speeds.items(), read, strict=True):
                for speed in own:
                    yield (modality, path, speed), self._made(modality, clips, speed)

    def _known(self, key: Key) -> dict[str, np.ndarray | None] | str | None:
        """What the cache of inputs has of a file."""
        modality, path, speed = key
        if self.inputs is None or modality not in self.inputs.trained or speed != 1.0:
            return None
        if (modality, path) in self.inputs.errors:
            return self.inputs.errors[modality, path]
        return vars(self.inputs.load(modality, path)[COLUMNS[modality]]) if self.inputs.has(modality, path) else None

    def _made(self, modality: str, clips: Media | Exception, speed: float) -> dict[str, np.ndarray | None] | str:
        """The tower's input of a clip at a speed."""
        if isinstance(clips, Exception):
            return str(clips)
        try:
            if speed != 1.0:
                rate = clips.audio.sampling_rate
                clips = Media(AudioClip(soxr.resample(clips.audio.samples, speed * rate, rate), rate, []), None)
            clips = self.processor.tower_inputs(clips)
        except self.processor.media_error as error:
            return str(error)
        made = clips.audio if modality == "audio" else clips.video
        return {"values": made.values, "mask": made.mask, "times": made.times}


def _as_it_is(item):
    return item


def _sibling(instance: Any, name: str) -> Any:
    """The module `name` of the package of an instance's class: this clone's, or the checkpoint's own."""
    return import_module(f"{type(instance).__module__.rpartition('.')[0]}.{name}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _float32_precision(device_type: str) -> list[str]:
    """Precision of float32 products and convolutions: "ieee", "tf32", "bf16", or "none" for torch's default."""
    backends = (torch.backends.mkldnn,) if device_type == "cpu" else (torch.backends.cuda, torch.backends.cudnn)
    return [backends[0].matmul.fp32_precision, backends[-1].conv.fp32_precision]
