"""Builds a repository folder for the Hub from the output of `train.py` and `eval.py`, and uploads it.

The folder has the merged model, or with `adapter_only` the trained weights and instructions for loading them onto the
language model on the Hub. No file contains a path of the machine that trained.
"""

import fnmatch
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    save_torch_state_dict,
)
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from egmf.commands import check_model
from egmf.configuration_egmf import EGMFConfig
from egmf.files import read_json_lines, weights_digest
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import AffectTask
from egmf.publishing.model_card import FinishedRun, recipe_yaml, write_card
from egmf.publishing.pins import ROOT, pins
from egmf.recipe import default_record


# Files of `model/` that are published unchanged: configurations, the processor's files, the code.
COPIED = ("*.json", "*_egmf.py", "*.jinja", "*.txt", "*.model")
# Files of an earlier publication that must be deleted, because they would be loaded instead of the new ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*_egmf.py")
REPLACED += ("handler.py", "requirements.txt")
INDEX = "model.safetensors.index.json"
WRITTEN = {"README.md", "LICENSE", "recipe.json", "recipe.yaml"}
# Packages that an Inference Endpoint installs for `handler.py`. Its image brings torch, NumPy and Pillow.
SERVED = ("av", "decord2", "huggingface-hub", "soundfile", "soxr", "transformers")


def check_repo_id(repo_id: str) -> None:
    """Raises a ValueError unless `repo_id` is OWNER/NAME with characters that the Hub allows."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("it has no owner")
    except ValueError as error:
        raise ValueError(f"repo: got {repo_id!r}, wanted OWNER/NAME ({error})") from error


def read_run(folder: Path, base_model: str | None = None) -> FinishedRun:
    """Reads the run in a folder.

    Args:
        folder: An `output_dir` of `train.py`.
        base_model: Hub id of the language model, if the run was given a local folder.

    Raises:
        FileNotFoundError: If the folder has no finished run.
        ValueError: If `base_model` differs from the language model in the run's recipe, or the model is of another
            version of the architecture.
    """
    model = folder / "model"
    for name in ("config.json", "processor_config.json", "recipe.json", "modeling_egmf.py"):
        if not (model / name).is_file():
            wanted = "the output_dir of a train.py that has come to its end"
            raise FileNotFoundError(f"{folder}: got no model/{name}, wanted {wanted}")
    if not weight_files(model):
        raise FileNotFoundError(f"{folder}: got no model/*.safetensors, wanted the weights that train.py saved")
    check_model(str(model))
    recipe, config, processor = map(
        _read, (model / f"{name}.json" for name in ("recipe", "config", "processor_config"))
    )
    recipe = default_record() | recipe  # the run may be older than a field
    for options in (recipe["corpus_options"], *(part.get("options", {}) for part in recipe["corpora"].values())):
        options.pop("media", None)  # the folder of the clips
    name = recipe["language_model"]
    # Neither the recipe nor the config keeps the path of a local folder.
    known = name if "/" in name or name == config["text_config"].get("_name_or_path") else None
    if base_model and known and base_model != known:
        raise ValueError(f"base_model: got {base_model!r}, wanted {known!r}, which the run was trained on")
    base_model = base_model or known
    if base_model:
        recipe["language_model"] = base_model
    evaluations, left_out = read_evaluations(folder)
    log, unreadable = read_log(folder / "log.jsonl")
    tasks = {task["name"]: AffectTask.from_dict(task) for task in processor["tasks"].values()}
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        config=config,
        tasks=[tasks[name] for name in recipe["tasks"]],
        log=log,
        evaluations=evaluations,
        left_out=left_out + unreadable,
        base_model=base_model,
        hub_towers={name: recipe[f"{name}_tower"] for name in ("audio", "vision") if _is_on_hub(name, recipe)},
    )


def _is_on_hub(modality: str, recipe: dict[str, Any]) -> bool:
    """Whether a tower is an unchanged model of the Hub: not trained in any phase, its window not shortened."""
    tower = recipe[f"{modality}_tower"]
    changed = recipe[f"train_{modality}_tower"] or recipe["tower_epochs"]
    if modality == "audio":
        changed = changed or recipe["audio_window"]
    return isinstance(tower, str) and "/" in tower and modality in recipe["modalities"] and not changed


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of a run's log, and a message for each line that a killed run left incomplete."""
    lines, unreadable = [], []
    for number, line in enumerate(read_json_lines(path) if path.exists() else (), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            unreadable.append(f"{path}: line {number} is not JSON")
    return lines, unreadable


def read_evaluations(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The `metrics.json` files below a run's folder that measure its current weights, and why others are left out."""
    weights, found, left_out = weights_digest(folder / "model"), {}, []
    for path in sorted(folder.rglob("metrics.json")):
        try:
            report = _read(path)
        except ValueError:
            left_out.append(f"{path}: it is not JSON; evaluate again")
            continue
        wanted = {"corpus", "split", "samples", "answers", "intervals"}
        if not isinstance(report, dict) or not wanted <= report.keys():
            left_out.append(f"{path}: it is not by eval.py")
        elif report.get("weights") != weights:
            left_out.append(f"{path}: it does not measure the weights that are in model/; evaluate them again")
        else:
            found[path.parent.relative_to(folder).as_posix()] = report
    return found, left_out


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def build_folder(run: FinishedRun, repo_id: str, license: str | None, adapter_only: bool, max_shard_size: str) -> Path:
    """Writes `hub/` in the run's folder and replaces an earlier one.

    Raises:
        ValueError: If the earlier folder has files that this function does not write, if a new file contains a local
            path, or if `adapter_only` is set and the base model is not on the Hub.
        FileNotFoundError: If `adapter_only` is set and the run has no `adapter/`.
    """
    model, target = run.folder / "model", run.folder / "hub"
    copied = sorted(path for pattern in COPIED for path in model.glob(pattern) if path.name != INDEX)
    written = WRITTEN | {path.name for path in copied}
    foreign = [path.name for path in target.glob("*") if path.name not in written and not is_replaced(path.name)]
    if foreign:
        raise ValueError(
            f"{target}: got {', '.join(sorted(foreign))}, wanted nothing but what publish.py writes there"
        )
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".hub.") as scratch:
        folder = Path(scratch) / "hub"
        folder.mkdir()
        for path in copied:
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        _write(folder / "recipe.json", json.dumps(run.recipe, indent=2, ensure_ascii=False) + "\n")
        _write(folder / "recipe.yaml", recipe_yaml(run))
        if adapter_only:
            write_adapter(run, folder)
            if run.base_revision:
                check_adapter(run, folder)
        else:
            weights = {name: value for path in weight_files(model) for name, value in load_file(path).items()}
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
            shutil.copyfile(ROOT / "handler.py", folder / "handler.py")
            _write(folder / "requirements.txt", "\n".join(pins("requirements.txt", SERVED)) + "\n")
        write_card(folder, run, repo_id, license, adapter_only)
        check_no_paths(folder, run.folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes files readable by their owner only
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    return target


def write_adapter(run: FinishedRun, folder: Path) -> None:
    """Writes the trained adapter with the towers that are not on the Hub and the Hub id of its base model."""
    saved = run.folder / "adapter"
    if not (saved / "adapter_config.json").is_file():
        wanted = "what train.py saves there (started again, the same command writes it)"
        raise FileNotFoundError(f"{saved}: got no adapter_config.json, wanted {wanted}")
    if run.base_model is None:
        got = run.recipe["language_model"]
        raise ValueError(f"base_model: got {got!r}, a local folder or a random model, wanted the Hub id of the LLM")
    config, weights = LoraConfig.from_pretrained(saved), load_file(saved / "adapter_model.safetensors")
    for modality in run.towers:
        tower = f"{modality}_tower"
        if modality not in run.hub_towers and tower not in config.modules_to_save:
            config.modules_to_save = [*config.modules_to_save, tower]
            for path in weight_files(run.folder / "model"):
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if name.startswith(f"model.{tower}.")]
                    weights |= {f"base_model.model.{name}": file.get_tensor(name) for name in names}
    config.base_model_name_or_path, config.revision = run.base_model, run.base_revision
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def check_adapter(run: FinishedRun, folder: Path) -> None:
    """Loads an adapter onto the models of the Hub, as its card describes, and compares it with the merged model.

    Raises:
        ValueError: If the two models differ.
        OSError: If a model cannot be loaded from the Hub.
    """
    language_model = AutoModelForCausalLM.from_pretrained(run.base_model, revision=run.base_revision)
    before = language_model.get_input_embeddings().num_embeddings
    towers = {f"{name}_tower": tower for name, tower in run.hub_towers.items()}
    base = EGMFForConditionalGeneration.from_base(EGMFConfig.from_pretrained(folder), language_model, **towers)
    after = base.get_input_embeddings().num_embeddings
    adapted = PeftModel.from_pretrained(base.float(), folder)
    lora = {name.replace(".base_layer", "") for name, _ in base.named_parameters() if ".base_layer." in name}
    merged = adapted.merge_and_unload().state_dict()
    for path in weight_files(run.folder / "model"):
        for name, wanted in load_file(path).items():
            got = merged[name]
            wanted, tolerance = wanted.to(got.dtype), 0.0
            if name in lora:  # the order of summation in LoRA's products depends on the machine
                tolerance = 4 * torch.finfo(got.dtype).eps * wanted.abs().max().item()
            if wanted.shape[:1] == (after,):
                got, wanted = got[:before], wanted[:before]  # the placeholder's new row is random and never used
            if got.shape != wanted.shape or (got - wanted).abs().max() > tolerance:
                got = f"{run.base_model!r}, on which the adapter makes another {name} than model/ has"
                raise ValueError(f"base_model: got {got}; wanted the weights that were trained on")


def check_no_paths(folder: Path, run: Path) -> None:
    """Raises a ValueError if a text file contains a local path: of the run, the home, working or temporary folder."""
    places = {str(path.resolve()) for path in (run, Path.home(), Path.cwd(), Path(tempfile.gettempdir()))} - {"/"}
    private = sorted(places, key=len, reverse=True)  # the longest path first
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".model") and path.name not in ("tokenizer.json", "LICENSE"):
            text = path.read_text(encoding="utf-8")
            found = [name for name in private if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.-])", text)]
            if found:
                raise ValueError(
                    f"{path.name}: got {found[0]}, a folder of this machine, wanted none in what is published"
                )


def is_replaced(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED)


def upload(folder: Path, repo_id: str, private: bool) -> CommitInfo:
    """Uploads a folder in one commit and deletes outdated files of an earlier publication.

    An interrupted upload can be repeated: files that the Hub already has are not sent again, and the repository does
    not change before all files are uploaded. Weights, adapters and code of an earlier publication are deleted if the
    folder does not contain them. All other files of the repository are kept.

    Raises:
        ValueError: If `private` is set and the repository exists and is public.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses a request.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    head = api.model_info(repo_id)
    if private and not head.private:
        raise ValueError(
            f"private: got {repo_id!r}, which is there already and is public, wanted a private repository"
        )
    files = sorted(folder.iterdir())
    before = [file.rfilename for file in head.siblings or ()]
    stale = {name for name in before if "/" not in name and is_replaced(name)} - {path.name for path in files}
    # Not `upload_folder`, which may split large folders into several commits.
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(path.name, path) for path in files),
        ],
        commit_message="Publish with EGMF",
        parent_commit=head.sha,
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
