"""Reads a recipe: a YAML file, and the command line, which overrides any field. There, mappings are written in JSON:

python train.py recipes/mosi_smollm2.yaml --seed 2222 --experts local global --corpus_options '{"context": 3}'
"""

import argparse
import json
import logging
import re
from collections.abc import Container
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from egmf.arguments import mapping
from egmf.configuration_egmf import EGMFConfig
from egmf.files import SETTINGS, has_begun
from egmf.processes import LONGEST_WAIT, has_fast_bfloat16
from egmf.recipe import FUSION_FIELDS, OWN, Recipe, default_of, fusion_defaults


_REPORTERS = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
MANY = 1 << 30  # features, whose number the recipe does not know
# The smallest valid values of TrainingArguments.
_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_LEAST |= {"num_train_epochs": 0, "learning_rate": 0, "weight_decay": 0, "logging_steps": 0, "save_steps": 0}


def load_recipe(arguments: list[str]) -> Recipe:
    """Parses `[recipe.yaml, --field, value, ...]`.

    Raises:
        ValueError: If the file is not a mapping, a field is unknown, or a value is invalid.
        FileNotFoundError: If the file does not exist.
        SystemExit: If argparse cannot parse an argument, with a usage message, or after `--help`.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("recipe: got no YAML file, wanted `recipes/NAME.yaml [--field value ...]`")
    path = Path(arguments[0])
    said, fusion = _read(path)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise _unknown(path, f"unknown {unknown}")
    given = {name: value for name, value in vars(namespace).items() if name not in ("recipe", "dry_run")}
    fusion = fusion_defaults() | fusion | {name: value for name, value in given.items() if name in FUSION_FIELDS}
    _check_fusion(fusion)
    values = _merge(said, {name: value for name, value in given.items() if name not in FUSION_FIELDS})
    if "language_model" not in values:
        raise ValueError(f"{path}: language_model: got nothing, wanted a local folder or the Hub id of a causal LLM")
    model, data, phases = (_made(kind, values) for kind in OWN)
    try:
        training = _made(TrainingArguments, values)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    _check_training(training, values)
    if training.n_gpu > 1:
        logging.warning("one of %d GPUs is used; `accelerate launch train.py` uses all of them", training.n_gpu)
        training._n_gpu = 1  # Trainer would copy the model to all of them in every step (DataParallel)
    recipe = Recipe(model, fusion, data, phases, training, said.keys() | given.keys(), "dry_run" in namespace)
    _check_together(recipe)
    return recipe


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields in a recipe's file, and those of its mapping `fusion`. Checks their names, not their values."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}, wanted a YAML file") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path}: got {type(said).__name__}, wanted a mapping of fields")
    fusion = said.pop("fusion", {})
    if not isinstance(fusion, dict):
        raise ValueError(f"{path}: fusion: got {fusion!r}, wanted a mapping of {', '.join(FUSION_FIELDS)}")
    known = _hints()
    unknown = [name for name in said if name not in known and name not in FUSION_FIELDS]
    unknown += [f"fusion.{name}" for name in fusion if name not in FUSION_FIELDS]
    if unknown:
        raise _unknown(path, f"unknown {unknown}")
    if misplaced := [name for name in said if name in FUSION_FIELDS]:
        raise _unknown(path, f"{', '.join(misplaced)} outside of `fusion`")
    return said, fusion


def _unknown(path: Path, got: str) -> ValueError:
    return ValueError(f"{path}: got {got}, wanted fields of a recipe or of TrainingArguments; see `train.py --help`")


def _merge(said: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The checked values of a recipe's file and of the command line, and what follows from them and the machine."""
    # Trainer falls back to the CPU automatically, but accepts bf16 there only with `use_cpu`.
    machine = {} if torch.accelerator.is_available() else {"use_cpu": True}
    hints = _hints()
    values = {name: _checked(name, value, *hints[name]) for name, value in (machine | said | given).items()}
    slow = values.get("bf16") and values.get("use_cpu") and not has_fast_bfloat16()
    if slow and not values.get("fp16"):  # both are refused by `load_recipe`
        values["bf16"] = _began_in_bfloat16(values.get("output_dir"))
        computes = "as it began, in bfloat16" if values["bf16"] else "in float32"
        logging.warning("bf16: this CPU is slow in bfloat16 (no AVX-512); the run computes %s", computes)
    if "corpus_options" in given and values.get("corpus") == said.get("corpus"):  # otherwise they are another corpus's
        values["corpus_options"] = (said.get("corpus_options") or {}) | values["corpus_options"]
    values.setdefault("ddp_timeout", int(LONGEST_WAIT.total_seconds()))
    if "num_train_epochs" in given and "max_steps" not in given:
        values.pop("max_steps", None)  # the recipe's would win
    if str(values.get("metric_for_best_model")).endswith(("mae", "unparsable")):
        values.setdefault("greater_is_better", False)  # Trainer knows this of a loss only
    if values.get("load_best_model_at_end") and values.get("save_total_limit") == 1:
        values["save_total_limit"] = 2  # with 1, Trainer deletes the last checkpoint before the run has ended
    return values


def _check_together(recipe: Recipe) -> None:
    """Refuses fields that exclude each other, and warns of those that have no effect."""
    model, fusion, data, phases = recipe.model, recipe.fusion, recipe.data, recipe.phases
    for name in ("feature_noise", "feature_components"):
        for modality in set(fusion[name] or ()) & {"audio", "vision"}:
            if getattr(model, f"{modality}_tower"):
                logging.warning("%s: %s has an encoder; this field is for precomputed features", name, modality)
    if data.corpora and phases.tower_epochs:
        wanted = "0 in a mixture: towers from scratch learn one task alone"
        raise ValueError(f"tower_epochs: got {phases.tower_epochs}, wanted {wanted}")
    trained = [name for name in ("train_audio_tower", "train_vision_tower") if getattr(model, name)]
    if trained and phases.fusion_epochs:
        wanted = "0: the readout would answer from outputs of a tower that learns on without it"
        raise ValueError(f"fusion_epochs: got {phases.fusion_epochs} with {trained[0]}, wanted {wanted}")
    if phases.fusion_without_prior:
        other = "balance_classes" if data.balance_classes else "a mixture" if data.corpora else None
        if other:  # their draws have another prior than the rows
            raise ValueError(f"fusion_without_prior: got true with {other}, wanted one of them")
        if not phases.fusion_epochs:
            raise ValueError("fusion_without_prior: got true without fusion_epochs, wanted both")
    for modality in fusion["clip_statistics"] or ():
        learns = [name for name in trained if name == f"train_{modality}_tower"]
        learns += ["tower_epochs"] if phases.tower_epochs and getattr(model, f"{modality}_tower") else []
        if learns:  # the statistics would change meanwhile
            raise ValueError(f"clip_statistics: got {modality} with {learns[0]}, wanted features or a frozen tower")
    if not fusion["experts_read_text"] and data.modalities == ["text"]:
        logging.warning("experts_read_text: the experts have nothing to read; the language model answers alone")
    if phases.tower_epochs:
        trained.append("tower_epochs")
    if data.by_speaker and trained:
        raise ValueError(f"{data.by_speaker} with {' and '.join(trained)}, wanted frozen towers or features")


def _check_training(training: TrainingArguments, given: Container[str]) -> None:
    """Refuses what Trainer would accept now, and fail at or compute wrongly later.

    Args:
        training: The arguments.
        given: The names of those that were set.
    """
    launched = "`accelerate launch --config_file recipes/accelerate/NAME.yaml train.py` divides a model"
    refused = {
        "resume_from_checkpoint": "nothing: repeat the command to resume a run",
        # Trainer would compare each token with itself.
        "label_smoothing_factor": "0; fusion_label_smoothing smooths what the experts learn",
        # Workers would keep the random numbers of the first epoch, and validation the rows of its first task.
        "dataloader_persistent_workers": "false",
        "save_only_model": "false: an interrupted run could not go on where it was",
        "enable_jit_checkpoint": "false: a run writes a checkpoint when it gets SIGTERM",
        # It would upload the checkpoints of all phases and the names of clips, and not the finished model.
        "push_to_hub": "false; `python publish.py RUN --repo OWNER/NAME` uploads the finished model",
        "batch_eval_metrics": "false: metrics are those of a whole split",
        "deepspeed": f"nothing; {launched}",
        "fsdp": f"nothing; {launched}",
    }
    for name, wanted in refused.items():
        if name in given and getattr(training, name):
            raise ValueError(f"{name}: got {getattr(training, name)}, wanted {wanted}")
    if not training.eval_do_concat_batches:
        raise ValueError("eval_do_concat_batches: got False, wanted true: metrics are those of a whole split")
    if training.train_sampling_strategy == "batch_rebalance":
        raise ValueError("train_sampling_strategy: got batch_rebalance, wanted random, sequential or group_by_length")
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: got {name!r}, wanted none or some of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name in _REPORTERS and find_spec(name) is None:
            raise ValueError(f"report_to: got {name!r}, wanted its package beside it: pip install {name}")
    if not any(name in training.optim for name in ("galore", "apollo", "lomo")):  # these need the model
        try:
            Trainer.get_optimizer_cls_and_kwargs(training)
        except (ValueError, ImportError) as error:
            raise ValueError(f"optim: got {training.optim.value}: {' '.join(str(error).split())}") from error


def _made(arguments: Any, values: dict[str, Any]) -> Any:
    """A dataclass from the values that are its fields."""
    return arguments(**{part.name: values[part.name] for part in fields(arguments) if part.name in values})


def _began_in_bfloat16(output_dir: str | None) -> bool:
    """Whether the folder has a run that began in bfloat16, on another machine or with earlier code."""
    if output_dir is None or not has_begun(Path(output_dir)):
        return False
    settings = Path(output_dir) / SETTINGS
    return settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("bf16", False)


def _check_fusion(fusion: dict[str, Any]) -> None:
    """Runs the checks of `EGMFConfig` before anything is loaded."""
    try:
        EGMFConfig(audio_feature_size=MANY, vision_feature_size=MANY, **fusion)
    except Exception as error:  # huggingface_hub's typed fields raise its own error types
        name = next((name for name in FUSION_FIELDS if name in str(error)), "fusion")
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        hint = EGMFConfig.__annotations__.get(name)
        choices = get_args(hint) if get_origin(hint) is Literal else [str(hint).replace("typing.", "")]
        raise ValueError(f"{name}: got {fusion.get(name)!r}, wanted {' or '.join(map(str, choices))}") from error


def _hints() -> dict[str, tuple[Any, int | None, Any]]:
    """The type, the minimum and the choices of each field, by name."""
    found = {}
    for arguments in (*OWN, TrainingArguments):
        hints = get_type_hints(arguments)
        for part in fields(arguments):
            if part.init:
                minimum = part.metadata.get("minimum", _LEAST.get(part.name))
                found[part.name] = hints[part.name], minimum, part.metadata.get("choices")
    return found


def _checked(name: str, value: Any, hint: Any, minimum: int | None, choices: Any) -> Any:
    """Checks a value's type, minimum and choices, and converts numbers that YAML reads as text (1e-4)."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    if isinstance(value, str) and str not in kinds and {int, float} & set(kinds):
        try:
            value = float(value) if float in kinds else int(value)
        except ValueError:
            pass
    if bool in kinds and isinstance(value, str) and str not in kinds and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    known = {NoneType, bool, int, float, str, list, dict}
    if set(kinds) <= known:
        # An integer is a valid float; a bool is not a number.
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits:
            wanted = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    if choices is not None and value is not None and value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, choices))}")
    if minimum is not None and value is not None and value < minimum:
        raise ValueError(f"{name}: got {value}, wanted at least {minimum}")
    return value


def _parser() -> argparse.ArgumentParser:
    """A parser with all fields as arguments and without defaults, so that only given arguments are in the result."""
    parser = HfArgumentParser(
        [TrainingArguments], allow_abbrev=False, add_help=True, formatter_class=argparse.RawTextHelpFormatter
    )
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    parser.description = "Trains EGMF by a recipe. Every field of the recipe can be overridden."
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    shown = "build everything, show rows, a prompt, parameters and memory, and stop"
    parser.add_argument("--dry_run", "--dry-run", action="store_true", default=argparse.SUPPRESS, help=shown)
    for arguments in OWN:
        group = parser.add_argument_group(str(arguments.__doc__).split("\n")[0])
        hints = get_type_hints(arguments)
        for part in fields(arguments):
            if not part.init:
                continue
            default = default_of(part)
            shown = "" if default is MISSING else f" (default: {default!r})"
            _add(group, part.name, hints[part.name], part.metadata["help"] + shown)
    group = parser.add_argument_group("The fusion, `fusion` in a recipe: fields of EGMFConfig")
    texts = dict(re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", str(EGMFConfig.__doc__), re.DOTALL | re.MULTILINE))
    for name, default in fusion_defaults().items():
        text = " ".join(texts.get(name, "").split()).replace("%", "%%")
        _add(group, name, EGMFConfig.__annotations__[name], f"{text} (default: {default!r})", type(default))
    return parser


def _add(group: Any, name: str, hint: Any, text: str, kind: type | None = None) -> None:
    """Adds an argument for a type: lists take any number of values, mappings are JSON."""
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(get_origin(one) or one for one in kinds) if kind is None else (kind,)
    if list in kinds:
        items = {inner for one in (hint, *get_args(hint)) if get_origin(one) is list for inner in get_args(one)}
        group.add_argument(*names, nargs="*", type=(items or {_name_or_mapping}).pop(), **options)
    elif dict in kinds and str in kinds:
        group.add_argument(*names, type=_name_or_mapping, **options)
    elif dict in kinds:
        group.add_argument(*names, type=mapping, metavar="JSON", **options)
    elif bool in kinds:
        group.add_argument(*names, nargs="?", const=True, type=_flag, metavar="{true,false}", **options)
    else:
        plain = next((one for one in (int, float) if one in kinds), str)
        group.add_argument(*names, type=plain, **options)


def _name_or_mapping(text: str) -> str | dict | list:
    if text.startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a list as JSON") from None
    return mapping(text) if text.startswith("{") else text


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted true or false")
    return text.lower() == "true"
