"""Recipes: one YAML per run, and the fields it may set. Nothing is configured anywhere else.

A recipe's fields are those of [`ModelArguments`], [`DataArguments`], [`PhaseArguments`] and
`transformers.TrainingArguments`; the command line may override any of them:
`python train.py recipes/mosi_smollm2.yaml --seed 2222 --experts local global`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


def _json_field(default: str) -> str:
    return field(default=default, metadata={"help": "a mapping, as JSON on the command line"})


@dataclass
class ModelArguments:
    """What is assembled; fields named as in `EGMFConfig` are passed on to it."""

    language_model: str = field(metadata={"help": "local folder or Hub id of a causal LLM, or `tiny-random`"})
    shrink: int = field(
        default=1, metadata={"help": "2, 4, 8 or 16: a dry run on random models so many times smaller, `shrinking.py`"}
    )
    audio_tower: str = field(default="", metadata={"help": "folder or Hub id of a speech encoder, or see `train.py`"})
    audio_window: int = field(
        default=0, metadata={"help": "seconds that an encoder of fixed windows hears; 0 for its checkpoint's"}
    )
    vision_tower: str = field(default="", metadata={"help": "folder or Hub id of an image encoder, or see `train.py`"})
    train_audio_tower: bool = field(default=False, metadata={"help": "train it whole; otherwise it is frozen"})
    train_vision_tower: bool = field(default=False, metadata={"help": "train it whole; otherwise it is frozen"})
    num_frames: int = field(default=16, metadata={"help": "frames of a video, spread evenly over it"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of the LLM, e.g. sdpa or eager"})
    load_in_4bit: bool = field(default=False, metadata={"help": "the LLM in 4 bits while it trains, by bitsandbytes"})
    num_pseudo_tokens: int = 8
    fusion_hidden_size: int = 256
    fusion_intermediate_size: int = 512
    fusion_dropout: float = 0.1
    experts: list[str] = field(default_factory=lambda: ["local", "semantic", "global"])
    local_kernel_sizes: list[int] = field(default_factory=lambda: [3, 7, 15])
    gating: str = "hierarchical"
    feature_noise: str = _json_field("{}")
    clip_statistics: list[str] = field(
        default_factory=list, metadata={"help": "modalities whose positions know mean and deviation of the clip"}
    )
    frame_pooling: str = _json_field("{}")
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str = field(
        default=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        metadata={"help": "regex over full module names; anchored to the LLM so that the fusion is not hit"},
    )

    def __post_init__(self):
        self.feature_noise = json.loads(self.feature_noise)
        self.frame_pooling = json.loads(self.frame_pooling)
        for name in ("audio_tower", "vision_tower"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if value.startswith("{") else value)


@dataclass(frozen=True)
class CorpusPart:
    """A corpus that is trained on: where it is and how it is read, what is asked of its rows, how often they come."""

    name: str
    source: str | None
    tasks: list[str]
    options: dict[str, Any]
    weight: float


@dataclass
class DataArguments:
    """What it is trained on: one corpus (`corpus`, `tasks`, `corpus_options`), or a mixture of several (`corpora`).

    A mixture is a mapping from the name of a corpus to its `tasks`, its `weight` (the share of an epoch's rows that
    are its own, relative to the others' weights; see `mixture.py`) and maybe its `options`. `tasks` then are those of
    all its corpora, each once.
    """

    corpus: str = field(default="", metadata={"help": "name of a corpus, see `corpora.CORPORA`"})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "what is asked of every row, see `tasks_egmf.BUILTIN_TASKS`"}
    )
    corpora: str = _json_field("{}")
    corpus_dir: str | None = field(
        default=None, metadata={"help": "folder with the corpus's files; of a mixture, with a folder per corpus"}
    )
    corpus_options: str = _json_field("{}")
    audio_speeds: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "training hears a clip at one of them at random; 1.1 is a tenth faster and higher"},
    )
    modality_dropout: str = field(
        default="{}",
        metadata={"help": "probability, by modality, that training hides it from a row that has another, as JSON"},
    )
    max_context_tokens: int = 256
    modalities: list[str] = field(
        default_factory=lambda: ["text", "audio", "vision"], metadata={"help": "modalities the model may see"}
    )

    def __post_init__(self):
        self.corpus_options = json.loads(self.corpus_options)
        self.corpora = json.loads(self.corpora)
        self.modality_dropout = json.loads(self.modality_dropout)
        for name, rate in self.modality_dropout.items():
            if name not in ("text", "audio", "vision") or not 0 <= rate < 1:
                wanted = "text, audio or vision with a rate in [0, 1)"
                raise ValueError(f"modality_dropout: got {{{name!r}: {rate}}}, wanted {wanted}")
        self._check_corpora()
        for part in self.parts:
            self.tasks += [task for task in part.tasks if task not in self.tasks]
        unknown = set(self.modalities) - {"text", "audio", "vision"}
        if unknown or not self.modalities:
            raise ValueError(f"modalities: got {self.modalities}, wanted some of text, audio, vision")
        if 1.0 not in self.audio_speeds or min(self.audio_speeds) <= 0:
            raise ValueError(f"audio_speeds: got {self.audio_speeds}, wanted positive ones with 1.0 among them")

    def _check_corpora(self) -> None:
        if not self.corpora:
            if not self.corpus or not self.tasks:
                got = f"corpus {self.corpus!r} and tasks {self.tasks}"
                raise ValueError(f"corpus: got {got}, wanted both, or `corpora`, a mixture")
            return
        if self.corpus or self.tasks or self.corpus_options:
            wanted = "none of corpus, tasks and corpus_options beside them"
            raise ValueError(f"corpora: got a mixture and one corpus of its own, wanted {wanted}")
        for name, part in self.corpora.items():
            if not {"tasks", "weight"} <= part.keys() <= {"tasks", "weight", "options"} or not part["tasks"]:
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
    """The phases before the LLM learns, see `pretraining.py`."""

    tower_epochs: int = field(
        default=0, metadata={"help": "epochs of the towers alone, which then learn on with the experts; 0 for none"}
    )
    tower_learning_rate: float = 3e-3
    fusion_epochs: int = field(default=0, metadata={"help": "epochs of the fusion without the LLM; 0 for none"})
    fusion_learning_rate: float = 1e-3
    fusion_batch_size: int = 32
    fusion_label_smoothing: float = field(
        default=0.0, metadata={"help": "probability that the fusion's target spreads evenly over all legal answers"}
    )


# TrainingArguments that are about the machine, or about where a run is kept.
_NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "use_cpu", "hub_token", "hub_model_id"}


@dataclass
class Recipe:
    """A parsed recipe; `fields` are the names of what was set, in the file or on the command line."""

    model: ModelArguments
    data: DataArguments
    phases: PhaseArguments
    training: TrainingArguments
    fields: set[str]

    def training_record(self) -> dict[str, Any]:
        """The TrainingArguments that were set, for the record; of an absolute path its last part."""
        record = self.training.to_dict()
        kept = {name: value for name, value in record.items() if name in self.fields - _NOT_RECORDED}
        files = {name for name, value in kept.items() if isinstance(value, str) and Path(value).is_absolute()}
        return kept | {name: Path(kept[name]).name for name in files}


def _as_arguments(fields: dict) -> list[str]:
    arguments = []
    for name, value in fields.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments


def load_recipe(arguments: list[str]) -> Recipe:
    """Parses `[recipe.yaml, --field, value, ...]`.

    Raises:
        ValueError: If the file holds no mapping or a field is unknown.
        FileNotFoundError: If there is no such file.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("recipe: got no YAML file, wanted `recipes/NAME.yaml [--field value ...]`")
    fields = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{arguments[0]}: got {type(fields).__name__}, wanted a mapping of fields")
    # Trainer falls back to the CPU by itself, but refuses bf16 there unless told so.
    defaults = {} if torch.accelerator.is_available() else {"use_cpu": True}
    parser = HfArgumentParser([ModelArguments, DataArguments, PhaseArguments, TrainingArguments], allow_abbrev=False)
    # The last value of a repeated argument holds, so the command line overrides the recipe.
    *parsed, unknown = parser.parse_args_into_dataclasses(
        [*_as_arguments(defaults | fields), *arguments[1:]], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"{arguments[0]}: unknown {unknown}, wanted fields of a recipe or of TrainingArguments")
    given = {argument[2:].partition("=")[0] for argument in arguments[1:] if argument.startswith("--")}
    recipe = Recipe(*parsed, fields=given | fields.keys())
    if recipe.data.corpora and recipe.phases.tower_epochs:
        wanted = "0 in a mixture: towers from scratch learn one task alone"
        raise ValueError(f"tower_epochs: got {recipe.phases.tower_epochs}, wanted {wanted}")
    return recipe
