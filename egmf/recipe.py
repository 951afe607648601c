"""Recipes: one YAML file and the command line configure a run.

A recipe has the fields of [`ModelArguments`], [`DataArguments`], [`PhaseArguments`] and
`transformers.TrainingArguments`. The mapping `fusion` has the fields of `EGMFConfig` that describe the fusion. The
command line overrides any field; there, mappings are written in JSON:

    python train.py recipes/mosi_smollm2.yaml --seed 2222 --experts local global --corpus_options '{"context": 3}'
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Container
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from corpora import CORPORA
from egmf.arguments import mapping
from egmf.configuration_egmf import ARCHITECTURE, EGMFConfig
from egmf.files import SETTINGS, has_begun, weights_digest
from egmf.processes import LONGEST_WAIT, has_fast_bfloat16
from egmf.tasks_egmf import BUILTIN_TASKS, AffectTask


_REPORTERS = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
MODALITIES = ("text", "audio", "vision")
# Fields of `EGMFConfig` that are derived from the LLM, towers, processor and corpus; recipes cannot set them.
_DERIVED = {"text_config", "audio_config", "vision_config", "audio_feature_size", "vision_feature_size"}
_DERIVED |= {"audio_input_rate", "pseudo_token_id", "lm_head_bias", "tie_word_embeddings", "speaker_adaptation"}
_DERIVED |= {"architecture", "initializer_range"}
MANY = 1 << 30  # features, whose number the recipe does not know
FUSION_FIELDS = tuple(name for name in EGMFConfig.__annotations__ if name not in _DERIVED and name in vars(EGMFConfig))


@dataclass
class ModelArguments:
    """The parts of the model other than the fusion."""

    language_model: str = field(metadata={"help": "local folder or Hub id of a causal LLM, or `tiny-random`"})
    shrink: int = field(
        default=1, metadata={"help": "2, 4, 8 or 16: rehearse on random models that are this many times smaller"}
    )
    audio_tower: str | dict = field(
        default="", metadata={"help": "folder or Hub id of a speech encoder, or a mapping that describes a new one"}
    )
    audio_window: int = field(
        default=0, metadata={"help": "window of a fixed-window encoder in seconds; 0 for its own", "minimum": 0}
    )
    vision_tower: str | dict = field(
        default="", metadata={"help": "folder or Hub id of an image encoder, or a mapping that describes a new one"}
    )
    train_audio_tower: bool = field(default=False, metadata={"help": "train it whole; otherwise it is frozen"})
    train_vision_tower: bool = field(default=False, metadata={"help": "train it whole; otherwise it is frozen"})
    num_frames: int = field(default=16, metadata={"help": "frames of a video, spread evenly over it", "minimum": 1})
    attn_implementation: str = field(
        default="auto", metadata={"help": "attention of the LLM, such as sdpa; auto: eager on a CPU, elsewhere sdpa"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "the LLM in 4 bits while it trains, by bitsandbytes"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA", "minimum": 1})
    lora_alpha: int = field(default=32, metadata={"help": "scale of LoRA", "minimum": 1})
    lora_target_modules: str = field(
        default=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        metadata={"help": "regex over full module names, anchored to the LLM so that it does not match the fusion"},
    )


@dataclass(frozen=True)
class CorpusPart:
    """A training corpus: its source, loading options, tasks, and weight in the mixture."""

    name: str
    source: str | None
    tasks: list[str]
    options: dict[str, Any]
    weight: float


@dataclass
class DataArguments:
    """The training data: one corpus (`corpus`, `tasks`, `corpus_options`), or a mixture of several (`corpora`).

    A task is the name of a built-in one, or a mapping with the fields of `AffectTask`: `{name: stress, labels: [calm,
    tense], prompt: ...}`. `tasks` then holds its name, and `task_definitions` the mapping. Without tasks, those of a
    table follow from its labels ([`infer_tasks`](data/tasks.py)).

    A mixture maps the name of each corpus to its `tasks`, its `weight` (its share of an epoch's rows, relative to the
    other weights; see `mixture.py`) and optionally its `options`. `tasks` then lists the tasks of all corpora, each
    once.
    """

    corpus: str = field(
        default="", metadata={"help": "name of a corpus, see `corpora.CORPORA`; `table` for your own clips"}
    )
    tasks: list = field(
        default_factory=list,
        metadata={
            "help": "what is asked of every row: names of `tasks_egmf.BUILTIN_TASKS`, or mappings such as "
            '{"name": "stress", "labels": ["calm", "tense"], "prompt": "..."}; a table needs none'
        },
    )
    task_definitions: dict[str, dict] = field(default_factory=dict, init=False)
    corpora: dict = field(
        default_factory=dict, metadata={"help": "several corpora with weights as JSON, see docs/training.md"}
    )
    corpus_dir: str | None = field(
        default=None,
        metadata={"help": "folder with the corpus's files; for a mixture, a folder per corpus; for a table, its file"},
    )
    corpus_options: dict = field(default_factory=dict, metadata={"help": "its options as JSON, see docs/corpora.md"})
    balance_classes: bool = field(
        default=False, metadata={"help": "draw every label equally often, for labels of different frequency"}
    )
    audio_speeds: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "speeds; training draws one at each use of a clip; 1.1 is a tenth faster and higher"},
    )
    modality_dropout: dict = field(
        default_factory=dict,
        metadata={"help": "by modality, the probability that training hides it; a row keeps at least one"},
    )
    speaker_adaptation: bool = field(
        default=False,
        metadata={"help": "normalise frozen towers' outputs and features by the speaker's mean and deviation"},
    )
    speaker_mixing: float = field(
        default=0.0,
        metadata={
            "help": "largest share by which training moves a clip from the mean of its speaker's clips to that of "
            "another speaker; for frozen towers and features",
            "minimum": 0,
        },
    )
    modalities: list[str] = field(
        default_factory=lambda: list(MODALITIES), metadata={"help": "modalities the model may see"}
    )

    def __post_init__(self):
        lists = (task if isinstance(task, list) else [task] for task in self.tasks)  # a list in JSON is one word
        self.tasks = [self._name_of(task) for task in chain(*lists)]
        for name, rate in self.modality_dropout.items():
            if name not in MODALITIES or not isinstance(rate, int | float) or not 0 <= rate < 1:
                wanted = "text, audio or vision with a rate in [0, 1)"
                raise ValueError(f"modality_dropout: got {{{name!r}: {rate}}}, wanted {wanted}")
        self._check_corpora()
        for part in self.corpora.values():
            part["tasks"] = [self._name_of(task) for task in part["tasks"]]
        for part in self.parts:
            self._check_kinds(part.tasks)
            self.tasks += [task for task in part.tasks if task not in self.tasks]
        if not self.modalities or set(self.modalities) - set(MODALITIES):
            raise ValueError(f"modalities: got {self.modalities}, wanted some of {', '.join(MODALITIES)}")
        if 1.0 not in self.audio_speeds or min(self.audio_speeds) <= 0:
            raise ValueError(f"audio_speeds: got {self.audio_speeds}, wanted positive ones with 1.0 among them")
        if self.by_speaker and not set(self.modalities) & {"audio", "vision"}:
            raise ValueError(f"{self.by_speaker} with modalities {self.modalities}, wanted audio or vision among them")
        if self.speaker_adaptation and self.speaker_mixing:
            raise ValueError(f"{self.by_speaker} with speaker_mixing {self.speaker_mixing}, wanted one of them")

    @property
    def by_speaker(self) -> str:
        """The field that needs the speaker of every row and its value, for messages; "" if none is set."""
        if self.speaker_adaptation:
            return "speaker_adaptation: got true"
        return f"speaker_mixing: got {self.speaker_mixing}" if self.speaker_mixing else ""

    def define(self, tasks: list[AffectTask]) -> None:
        """Adds tasks, for a recipe that names none."""
        self.tasks = [self._name_of(task.to_dict()) for task in tasks]

    def _name_of(self, task: str | dict) -> str:
        """The name of a task; keeps the definition of one that is not built in.

        Raises:
            ValueError: If a mapping does not describe a task, or has the name of another one.
        """
        if not isinstance(task, dict):
            return task
        name, kind = task.get("name"), "classification" if "labels" in task else "regression"
        if not isinstance(name, str) or not name:
            raise ValueError(f"tasks: got {task}, wanted a `name` in it")
        if name in BUILTIN_TASKS or name in self.task_definitions:
            raise ValueError(f"tasks: got {name!r} again, wanted a name that is neither built in nor used before")
        self.task_definitions[name] = AffectTask.from_dict({"kind": kind} | task).to_dict()
        return name

    def _check_kinds(self, names: list[str]) -> None:
        """Refuses two tasks of a corpus that would learn from the same column."""
        kinds = {name: task.kind for name, task in BUILTIN_TASKS.items()}
        kinds |= {name: definition["kind"] for name, definition in self.task_definitions.items()}
        for kind, column in (("classification", "label"), ("regression", "score")):
            alike = [name for name in dict.fromkeys(names) if kinds.get(name) == kind]
            if len(alike) > 1:
                got = f"{' and '.join(alike)}, which learn from the same column, `{column}`"
                raise ValueError(f"tasks: got {got}, wanted one of them in each run")

    def _check_corpora(self) -> None:
        if not self.corpora:
            if self.corpus and self.corpus not in CORPORA:
                raise ValueError(f"corpus: got {self.corpus!r}, wanted one of {', '.join(CORPORA)}")
            if not self.corpus or not self.tasks and self.corpus != "table":
                got = f"corpus {self.corpus!r} and tasks {self.tasks}"
                raise ValueError(f"corpus: got {got}, wanted both, or `corpora`, a mixture")
            return
        if self.corpus or self.tasks or self.corpus_options:
            wanted = "none of corpus, tasks and corpus_options beside them"
            raise ValueError(f"corpora: got a mixture and one corpus of its own, wanted {wanted}")
        for name, part in self.corpora.items():
            known = isinstance(part, dict) and {"tasks", "weight"} <= part.keys() <= {"tasks", "weight", "options"}
            if not known or not part["tasks"]:
                wanted = "`tasks`, `weight` and maybe `options`"
                raise ValueError(f"corpora: {name}: got {part}, wanted {wanted}")
            if not isinstance(part["weight"], int | float) or not 0 < part["weight"] < math.inf:
                raise ValueError(f"corpora: {name}: weight: got {part['weight']!r}, wanted a positive number")

    @property
    def parts(self) -> list[CorpusPart]:
        """The corpora that are trained on."""
        if not self.corpora:
            return [CorpusPart(self.corpus, self.corpus_dir, self.tasks, self.corpus_options, 1.0)]
        parts = []
        for name, part in self.corpora.items():
            source = None if self.corpus_dir is None or name == "generated" else str(Path(self.corpus_dir) / name)
            parts.append(CorpusPart(name, source, part["tasks"], part.get("options", {}), part["weight"]))
        return parts


@dataclass
class PhaseArguments:
    """The training phases before the LLM, see `egmf/training/pretraining.py`."""

    tower_epochs: int = field(
        default=0, metadata={"help": "epochs of the towers' phase; they then train on with the fusion", "minimum": 0}
    )
    tower_learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate of the towers' phase"})
    fusion_epochs: int = field(
        default=0, metadata={"help": "epochs of the fusion without the LLM; 0 for none", "minimum": 0}
    )
    fusion_learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of the fusion's phase"})
    fusion_batch_size: int = field(
        default=32, metadata={"help": "rows of each process in a step of these phases", "minimum": 1}
    )
    fusion_label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the fusion's target that spreads over all legal answers, below 1"}
    )
    fusion_without_prior: bool = field(
        default=False,
        metadata={
            "help": "whether the experts learn only what a clip adds to the frequency of each answer, which the "
            "language model learns with the words"
        },
    )
    expert_gain: float | None = field(
        default=None,
        metadata={
            "help": "power of the experts' own answer beside the LLM's; by default fitted to the validation split "
            "after training, or 1 without that split or `fusion_epochs`; 0 leaves the experts' own answer out",
            "minimum": 0,
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "temperature of the distribution over answers; by default fitted for each task to the validation "
            "split after training",
        },
    )

    def __post_init__(self):
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, wanted a positive number")
        if not 0 <= self.fusion_label_smoothing < 1:
            raise ValueError(f"fusion_label_smoothing: got {self.fusion_label_smoothing}, wanted a share in [0, 1)")


# The smallest valid values of TrainingArguments.
_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_LEAST |= {"num_train_epochs": 0, "learning_rate": 0, "weight_decay": 0, "logging_steps": 0, "save_steps": 0}
# TrainingArguments that describe the machine or the location of the run.
_NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "use_cpu", "hub_token", "hub_model_id"}
_OWN = (ModelArguments, DataArguments, PhaseArguments)
# TrainingArguments on which the trained weights depend, beside the number of rows in a step.
_LEARNED_WITH = {"seed", "data_seed", "learning_rate", "lr_scheduler_type", "weight_decay", "warmup_steps", "optim"}
_LEARNED_WITH |= {"max_grad_norm", "train_sampling_strategy", "bf16", "fp16", "lr_scheduler_kwargs", "optim_args"}
_LEARNED_WITH |= {"adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"}


@dataclass
class Recipe:
    """A parsed recipe.

    `fusion` has all of `FUSION_FIELDS`, `fields` has the names of the fields that were set, and `dry_run` says whether
    the command line asked to stop before training.
    """

    model: ModelArguments
    fusion: dict[str, Any]
    data: DataArguments
    phases: PhaseArguments
    training: TrainingArguments
    fields: set[str]
    dry_run: bool = False

    def record(self) -> dict[str, Any]:
        """All fields except TrainingArguments, for `recipe.json`; `fusion` is a nested mapping."""
        return vars(self.model) | {"fusion": self.fusion} | vars(self.data) | vars(self.phases)

    def settings(self) -> dict[str, Any]:
        """All that the trained weights depend on, but for the length of the last phase."""
        own = self.record() | self.fusion
        for name in ("fusion", "corpus_dir", "attn_implementation", "temperature"):
            del own[name]
        own["architecture"] = ARCHITECTURE
        for name in ("language_model", "audio_tower", "vision_tower"):
            if own[name] and isinstance(own[name], str) and Path(own[name]).is_dir():  # which may be moved
                own[name] = f"{Path(own[name]).name}, weights {weights_digest(Path(own[name]))[:12]}"
        training = self.training
        rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        own["rows_per_step"] = rows  # on all devices together: another number of them needs another batch size
        fusion_rows = own.pop("fusion_batch_size") * training.world_size
        if self.phases.tower_epochs or self.phases.fusion_epochs:
            own["fusion_rows_per_step"] = fusion_rows
        return own | {name: value for name, value in training.to_dict().items() if name in _LEARNED_WITH}

    def training_record(self) -> dict[str, Any]:
        """The TrainingArguments that were set, for `recipe.json`; absolute paths are reduced to their last part."""
        record = self.training.to_dict()
        kept = {name: value for name, value in record.items() if name in self.fields - _NOT_RECORDED}
        files = {name for name, value in kept.items() if isinstance(value, str) and Path(value).is_absolute()}
        return kept | {name: Path(kept[name]).name for name in files}


def default_record() -> dict[str, Any]:
    """The default value of every optional field of [`Recipe.record`]."""
    own = [
        part for arguments in _OWN for part in fields(arguments) if part.name not in ("language_model", "corpus_dir")
    ]
    values = {part.name: _default(part) for part in own}
    return {"fusion": _fusion_defaults(), **values}


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
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}, wanted a YAML file") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path}: got {type(said).__name__}, wanted a mapping of fields")
    namespace, unknown = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(namespace).items() if name not in ("recipe", "dry_run")}
    fusion = said.pop("fusion", {})
    if not isinstance(fusion, dict):
        raise ValueError(f"{path}: fusion: got {fusion!r}, wanted a mapping of {', '.join(FUSION_FIELDS)}")
    misplaced = [name for name in said if name in FUSION_FIELDS]
    hints = _hints()
    unknown += [name for name in said if name not in hints and name not in FUSION_FIELDS]
    unknown += [f"fusion.{name}" for name in fusion if name not in FUSION_FIELDS]
    if unknown or misplaced:
        got = f"unknown {unknown}" if unknown else f"{', '.join(misplaced)} outside of `fusion`"
        raise ValueError(f"{path}: {got}, wanted fields of a recipe or of TrainingArguments; see `train.py --help`")
    # Trainer falls back to the CPU automatically, but accepts bf16 there only with `use_cpu`.
    machine = {} if torch.accelerator.is_available() else {"use_cpu": True}
    merged = machine | said | {name: value for name, value in given.items() if name not in FUSION_FIELDS}
    merged = {name: _checked(name, value, *hints[name]) for name, value in merged.items()}
    slow = merged.get("bf16") and merged.get("use_cpu") and not has_fast_bfloat16()
    if slow and not merged.get("fp16"):  # both are refused below
        merged["bf16"] = _began_in_bfloat16(merged.get("output_dir"))
        computes = "as it began, in bfloat16" if merged["bf16"] else "in float32"
        logging.warning("bf16: this CPU is slow in bfloat16 (no AVX-512); the run computes %s", computes)
    if "corpus_options" in given and merged.get("corpus") == said.get("corpus"):  # otherwise they are another corpus's
        merged["corpus_options"] = (said.get("corpus_options") or {}) | merged["corpus_options"]
    merged = {"ddp_timeout": int(LONGEST_WAIT.total_seconds())} | merged
    if "num_train_epochs" in given and "max_steps" not in given:
        merged.pop("max_steps", None)  # the recipe's would win
    if str(merged.get("metric_for_best_model")).endswith(("mae", "unparsable")):
        merged = {"greater_is_better": False} | merged  # Trainer knows this of a loss only
    if merged.get("load_best_model_at_end") and merged.get("save_total_limit") == 1:
        merged["save_total_limit"] = 2  # with 1, Trainer deletes the last checkpoint before the run has ended
    fusion = _fusion_defaults() | fusion | {name: value for name, value in given.items() if name in FUSION_FIELDS}
    _check_fusion(fusion)
    if "language_model" not in merged:
        raise ValueError(f"{path}: language_model: got nothing, wanted a local folder or the Hub id of a causal LLM")
    model, data, phases = (_made(kind, merged) for kind in _OWN)
    try:
        training = _made(TrainingArguments, merged)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    _check_training(training, merged)
    if training.n_gpu > 1:
        logging.warning("one of %d GPUs is used; `accelerate launch train.py` uses all of them", training.n_gpu)
        training._n_gpu = 1  # Trainer would copy the model to all of them in every step (DataParallel)
    dry_run = "dry_run" in namespace
    recipe = Recipe(model, fusion, data, phases, training, said.keys() | given.keys(), dry_run)
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
        learns = f"train_{modality}_tower" if f"train_{modality}_tower" in trained else ""
        if phases.tower_epochs and getattr(model, f"{modality}_tower", ""):
            learns = "tower_epochs"
        if learns:  # the statistics would change meanwhile
            raise ValueError(f"clip_statistics: got {modality} with {learns}, wanted features or a frozen tower")
    if not fusion["experts_read_text"] and data.modalities == ["text"]:
        logging.warning("experts_read_text: the experts have nothing to read; the language model answers alone")
    if phases.tower_epochs:
        trained.append("tower_epochs")
    if data.by_speaker and trained:
        raise ValueError(f"{data.by_speaker} with {' and '.join(trained)}, wanted frozen towers or features")
    return recipe


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


def _default(part: Any) -> Any:
    """A dataclass field's default; MISSING if it has none."""
    return part.default if part.default_factory is MISSING else part.default_factory()


def _fusion_defaults() -> dict[str, Any]:
    config = EGMFConfig()
    return {name: getattr(config, name) for name in FUSION_FIELDS}


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
    for arguments in (*_OWN, TrainingArguments):
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
    for arguments in _OWN:
        group = parser.add_argument_group(str(arguments.__doc__).split("\n")[0])
        hints = get_type_hints(arguments)
        for part in fields(arguments):
            if not part.init:
                continue
            default = _default(part)
            shown = "" if default is MISSING else f" (default: {default!r})"
            _add(group, part.name, hints[part.name], part.metadata["help"] + shown)
    group = parser.add_argument_group("The fusion, `fusion` in a recipe: fields of EGMFConfig")
    texts = dict(re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", str(EGMFConfig.__doc__), re.DOTALL | re.MULTILINE))
    for name, default in _fusion_defaults().items():
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
