"""The fields of a recipe, which has all settings of a run.

They are those of [`ModelArguments`], [`DataArguments`], [`PhaseArguments`] and `transformers.TrainingArguments`. The
mapping `fusion` has the fields of `EGMFConfig` that describe the fusion. `egmf/recipe_reading.py` reads a recipe.
"""

import math
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from corpora import CORPORA
from egmf.configuration_egmf import ARCHITECTURE, EGMFConfig
from egmf.files import weights_digest
from egmf.tasks_egmf import BUILTIN_TASKS, AffectTask


MODALITIES = ("text", "audio", "vision")
# Fields of `EGMFConfig` that are derived from the LLM, towers, processor and corpus; recipes cannot set them.
_DERIVED = {"text_config", "audio_config", "vision_config", "audio_feature_size", "vision_feature_size"}
_DERIVED |= {"audio_input_rate", "pseudo_token_id", "lm_head_bias", "tie_word_embeddings", "speaker_adaptation"}
_DERIVED |= {"architecture", "initializer_range"}
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
                raise ValueError(f"tasks: got {got}, wanted one of them for a corpus")

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


# TrainingArguments that describe the machine or the location of the run.
_NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "use_cpu", "hub_token", "hub_model_id"}
OWN = (ModelArguments, DataArguments, PhaseArguments)
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


def default_of(part: Any) -> Any:
    """A dataclass field's default; MISSING if it has none."""
    return part.default if part.default_factory is MISSING else part.default_factory()


def fusion_defaults() -> dict[str, Any]:
    """The default value of each of `FUSION_FIELDS`."""
    config = EGMFConfig()
    return {name: getattr(config, name) for name in FUSION_FIELDS}


def default_record() -> dict[str, Any]:
    """The default value of every optional field of [`Recipe.record`]."""
    own = [
        part for arguments in OWN for part in fields(arguments) if part.name not in ("language_model", "corpus_dir")
    ]
    values = {part.name: default_of(part) for part in own}
    return {"fusion": fusion_defaults(), **values}
