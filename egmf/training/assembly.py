"""Builds the model of a recipe from towers, processor, LLM and fusion, adds LoRA, and merges it after training."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
)
from transformers import initialization as init
from transformers.utils import is_bitsandbytes_available

from egmf.commands import check_name
from egmf.data.lengths import clip_seconds
from egmf.data.mixture import has_any
from egmf.data.speakers import SPEAKER, Centers, stack_centers
from egmf.data.tower_cache import COLUMNS, PREPROCESSORS, TowerCache
from egmf.fusion_egmf import ClipStatistics, FeatureNorm
from egmf.media_features_egmf import adapt_to_speaker
from egmf.media_inputs_egmf import TowerInput
from egmf.modeling_egmf import EGMFForConditionalGeneration, undivided
from egmf.processes import are_sharded
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import Recipe
from egmf.towers_egmf import encoder_of, load_tower


def cut_window(tower: PreTrainedModel, extractor: Any, seconds: int) -> tuple[PreTrainedModel, Any]:
    """Shortens the fixed window of a speech encoder such as Whisper's to the first `seconds`.

    The encoder always computes a whole window, including silence, so that a short clip costs as much as a long one.

    Raises:
        ValueError: If the encoder has no fixed window, or a shorter one.
    """
    tower, whole = encoder_of(tower, "audio"), getattr(extractor, "chunk_length", None)
    if not whole or not hasattr(tower.config, "max_source_positions") or not 0 < seconds <= whole:
        wanted = f"at most {whole} seconds" if whole else "none: it has no fixed window"
        raise ValueError(f"audio_window: got {seconds} seconds for {type(tower).__name__}, wanted {wanted}")
    config, weights = copy.deepcopy(tower.config), tower.state_dict()
    config.max_source_positions = config.max_source_positions * seconds // whole
    weights["embed_positions.weight"] = weights["embed_positions.weight"][: config.max_source_positions]
    shorter = type(tower)(config).to(tower.dtype)
    shorter.load_state_dict(weights)
    return shorter.eval(), type(extractor).from_dict(extractor.to_dict() | {"chunk_length": seconds})


def describes_new_tower(tower: str | dict[str, Any]) -> bool:
    """Whether a recipe's tower is a description of a new model, not the name of a pretrained one."""
    return isinstance(tower, dict)


def build_tower(modality: str, tower: str | dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Loads or builds the tower of a recipe, with its feature extractor or image processor.

    Raises:
        ValueError: If a description is not `{"config": {"model_type", ...}, "feature_extractor" (for vision:
            "image_processor"): {"..._type", ...}}`.
    """
    kind = PREPROCESSORS[modality]
    if isinstance(tower, str):
        check_name(f"{modality}_tower", tower, "a saved model")
        if modality == "audio":
            return load_tower(tower), AutoFeatureExtractor.from_pretrained(tower)
        # The PIL backend gives the same pixels with and without torchvision.
        return load_tower(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    config, preprocessor = (dict(tower.get(name) or {}) for name in ("config", kind))
    model_type, name = config.pop("model_type", None), preprocessor.pop(f"{kind}_type", "")
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if model_type not in CONFIG_MAPPING or found is None or tower.keys() != {"config", kind}:
        wanted = f"a config with `model_type` and a {kind} with `{kind}_type` of transformers"
        raise ValueError(f"{modality}_tower: got {tower}, wanted {wanted}")
    return AutoModel.from_config(CONFIG_MAPPING[model_type](**config)), found(**preprocessor)


def build_towers(recipe: Recipe) -> dict[str, tuple]:
    """The recipe's towers and preprocessors, for the modalities that the model may see.

    Raises:
        ValueError: If a recipe without an audio tower sets `audio_window` or `audio_speeds`.
    """
    needing = (("audio_window", recipe.model.audio_window, 0), ("audio_speeds", recipe.data.audio_speeds, [1.0]))
    for field, value, unset in needing:
        if value != unset and not recipe.model.audio_tower:
            raise ValueError(f"{field}: got {value} for precomputed features, wanted an audio_tower beside it")
    named = {"audio": recipe.model.audio_tower, "vision": recipe.model.vision_tower}
    towers = {name: build_tower(name, spec) for name, spec in named.items() if spec and name in recipe.data.modalities}
    if recipe.model.audio_window and "audio" in towers:
        towers["audio"] = cut_window(*towers["audio"], recipe.model.audio_window)
    return towers


def build_processor(recipe: Recipe, language_model: str, towers: dict[str, tuple]) -> EGMFProcessor:
    """The processor of a recipe's LLM and towers."""
    processor = EGMFProcessor(
        AutoTokenizer.from_pretrained(language_model),
        **{PREPROCESSORS[modality]: preprocessor for modality, (_, preprocessor) in towers.items()},
        num_pseudo_tokens=recipe.fusion["num_pseudo_tokens"],
        num_frames=recipe.model.num_frames,
        tasks=recipe.data.task_definitions,
        default_task=recipe.data.tasks[0],
        trained_tasks=recipe.data.tasks,
    )
    processor.limit_length(AutoConfig.from_pretrained(language_model))
    return processor


def feature_statistics(
    rows: Dataset, column: str, centers: Centers | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation (D,), in float64, over all frames of a column of features (T, D).

    The column is read twice in small batches, because all features of MOSEI do not fit in memory. The sum of a batch
    starts with the sum of the earlier ones, so that the result is the same as for all frames in one array.

    Args:
        rows: The training split.
        column: `audio_features` or `vision_features`.
        centers: Centers of the speakers, to which the frames are adapted first.

    Returns:
        (mean, standard deviation); None if every clip is null.

    Raises:
        ValueError: If clips differ in width.
    """
    total: np.ndarray | None = None
    count = 0
    for frames in _frames(rows, column, centers):
        if total is not None and len(total) != frames.shape[1]:
            wanted = "one width (a model without a tower takes one kind of features)"
            raise ValueError(f"{column}: got clips of {len(total)} and of {frames.shape[1]} features, wanted {wanted}")
        total, count = _sum_on(total, frames), count + len(frames)
    if total is None:
        return None
    mean = total / count
    total = np.zeros_like(mean)
    for frames in _frames(rows, column, centers):
        total = _sum_on(total, np.square(frames - mean))
    return torch.from_numpy(mean), torch.from_numpy(np.sqrt(total / count))


def _frames(rows: Dataset, column: str, centers: Centers | None = None) -> Iterator[np.ndarray]:
    """Yields the frames (N, D) of all clips in float64, for batches of clips."""
    columns = [column] if centers is None else [column, SPEAKER]
    for table in rows.select_columns(columns).with_format("arrow").iter(64):
        clips = table.column(column).combine_chunks()
        frames = clips.flatten()  # drops null clips and the borders between clips
        widths = np.unique(frames.value_lengths().to_numpy())
        values = frames.flatten().to_numpy().astype(np.float64)
        if len(widths) > 1:
            raise ValueError(f"{column}: got clips of {widths[0]} and of {widths[1]} features, wanted one width")
        if len(widths):
            values = values.reshape(-1, widths[0])
            if centers is not None:
                keys = [(speaker, 1.0) for speaker in table.column(SPEAKER).to_pylist()]
                lengths = torch.from_numpy(clips.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).copy())
                own = stack_centers(centers, column.removesuffix("_features"), keys).double()
                own = own.repeat_interleave(lengths, 0)
                values = adapt_to_speaker(torch.from_numpy(values), *own.unbind(1)).numpy()
            yield values


def _sum_on(total: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    return (frames if total is None else np.concatenate([total[None], frames])).sum(0)


def set_feature_statistics(
    model: EGMFForConditionalGeneration, rows: Dataset, centers: Centers | None = None, statistics: Mapping = {}
) -> None:
    """Sets the statistics and the components of precomputed features.

    Args:
        model: The model.
        rows: The training split.
        centers: Centers of the speakers, to which the features are adapted first.
        statistics: Results of [`feature_statistics`], by modality, that are known already.
    """
    fusion = model.model.fusion
    for modality in model.config.modalities[1:]:
        if getattr(model.config, f"{modality}_feature_size") is None:
            continue
        column = f"{modality}_features"
        mean, std = statistics.get(modality) or feature_statistics(rows, column, centers)
        fusion.set_feature_statistics(modality, mean, std)
        if fusion.input_norm[modality].is_reduced:
            norm, count = fusion.input_norm[modality], model.config.feature_components[modality]
            fusion.set_feature_components(modality, feature_components(rows, column, norm, count, centers))


def feature_components(
    rows: Dataset, column: str, norm: FeatureNorm, count: int, centers: Centers | None = None
) -> torch.Tensor:
    """The leading principal components (count, D) of all standardised frames, scaled so that each has variance 1.

    Args:
        rows, column, centers: See [`feature_statistics`].
        norm: Standardises the frames.
        count: The number of components.

    Raises:
        ValueError: If fewer features vary independently.
    """
    mean, std = (value.numpy(force=True).astype(np.float64) for value in (norm.mean, norm.std))
    total, products, number = np.zeros_like(mean), np.zeros((len(mean), len(mean))), 0
    for frames in _frames(rows, column, centers):
        standard = ((frames - mean) / std).clip(-norm.LIMIT, norm.LIMIT)
        total, products, number = total + standard.sum(0), products + standard.T @ standard, number + len(standard)
    variances, vectors = np.linalg.eigh(products / number - np.outer(total / number, total / number))
    variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
    if not variances[-1] > 1e-6:
        got, wanted = f"{count} components", f"at most {(variances > 1e-6).sum()}: no more features vary independently"
        raise ValueError(f"feature_components: {column}: got {got}, wanted {wanted}")
    # An eigenvector has no sign of its own.
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    return torch.from_numpy((vectors * signs / np.sqrt(variances)).T.copy())


def clip_statistics(
    rows: Dataset, modality: str, cache: TowerCache | None, centers: Centers | None = None
) -> Iterator[torch.Tensor | None]:
    """Yields [`ClipStatistics.measure`] of each row's clip, (2 * layers * width,) in float32; None without a clip.

    Args:
        rows: Rows of a corpus.
        modality: "audio" or "vision".
        cache: Cache of the towers; a modality that it does not encode has precomputed features.
        centers: Centers of the rows' speakers, to which the frames are adapted first.
    """
    tower = cache if cache is not None and modality in cache.frozen else None
    column = f"{modality}_features" if tower is None else COLUMNS[modality]
    for row in rows.select_columns([column, *([] if centers is None else [SPEAKER])]).with_format("numpy"):
        features = row[column]
        if tower is not None:
            features = tower.load(modality, None if features is None else str(features))[f"{modality}_features"]
        if features is None:
            yield None
            continue
        frames = torch.as_tensor(features, device="cpu").unsqueeze(0)  # (1, T, layers, width) or (1, T, width)
        if centers is not None:
            center = stack_centers(centers, modality, [(str(row[SPEAKER]), 1.0)])
            frames = adapt_to_speaker(frames.float(), *center.unsqueeze(2).unbind(1))
        layers = frames.unbind(2) if frames.ndim == 4 else (frames,)
        yield ClipStatistics.measure(layers, torch.ones(frames.shape[:2]))[0]


def check_clip_statistics(recipe: Recipe, rows: Dataset) -> None:
    """Raises a ValueError if the recipe names a modality of which no training row has a clip."""
    for modality in recipe.fusion["clip_statistics"] or ():
        column = COLUMNS[modality] if getattr(recipe.model, f"{modality}_tower") else f"{modality}_features"
        if modality in recipe.data.modalities and not has_any(rows, column):
            wanted = f"one with {column} in a training row, or `modalities` without {modality}"
            raise ValueError(f"clip_statistics: got {modality}, of which no row has a clip, wanted {wanted}")


def set_clip_statistics(
    model: EGMFForConditionalGeneration, corpus, cache: TowerCache | None, centers: Centers | None = None
) -> None:
    """Sets the mean and standard deviation of the fusion's [`ClipStatistics`] from the training split.

    Raises:
        ValueError: If a modality has no clips, or its tower will still be trained.
    """
    for modality in model.model.fusion.clip_statistics:
        measured = clip_statistics(corpus["train"], modality, cache, centers)
        clips = [clip.double() for clip in measured if clip is not None]
        if not clips:
            raise ValueError(f"clip_statistics: got {modality}, wanted one with clips, and features or a frozen tower")
        std, mean = torch.std_mean(torch.stack(clips), 0, correction=0)
        model.model.fusion.set_clip_statistics(modality, mean, std)


def start_speech_tower(tower: PreTrainedModel, clips: list[TowerInput]) -> None:
    """Initialises the convolutions of a new speech tower so that they respond to quick changes of loudness.

    transformers initialises all weights with a standard deviation of 0.02. The convolutions over log mel bands are
    then nearly linear, and the mean over time of a linear function is the same for a rough and a smooth voice. Here
    the deviation is 1 / sqrt(fan in), and the first convolution reads bands standardised by the clips.

    Args:
        tower: A tower with fixed windows, such as Whisper's encoder; others are not changed.
        clips: Some of the training clips.
    """
    convolutions = [module for module in tower.modules() if isinstance(module, nn.Conv1d)]
    if not convolutions or not clips or clips[0].values.shape != (convolutions[0].in_channels, len(clips[0].mask)):
        return
    bands = torch.from_numpy(np.concatenate([clip.values[:, clip.mask.astype(bool)] for clip in clips], 1))
    std, mean = torch.std_mean(bands.double(), 1, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    for convolution in convolutions:
        init.lecun_normal_(convolution.weight)
        init.zeros_(convolution.bias)
    first = convolutions[0]
    with torch.no_grad():
        first.weight.div_(std.to(first.weight)[:, None])
        first.bias.sub_((first.weight * mean.to(first.weight)[:, None]).sum((1, 2)))


def trained_towers(recipe: Recipe, towers: dict[str, tuple]) -> list[str]:
    """Modalities whose towers are trained."""
    return [modality for modality in towers if getattr(recipe.model, f"train_{modality}_tower")]


def load_language_model(recipe: Recipe, folder: str) -> PreTrainedModel:
    """Loads the recipe's LLM; with `load_in_4bit`, its layers are quantised to 4 bits (NF4).

    Raises:
        ValueError: If the recipe sets `load_in_4bit` and bitsandbytes is not installed.
    """
    attention = recipe.model.attn_implementation
    if attention == "auto":
        attention = "eager" if recipe.training.device.type == "cpu" else "sdpa"
    options: dict[str, Any] = {"attn_implementation": attention}
    if recipe.model.load_in_4bit:
        if not is_bitsandbytes_available():
            wanted = "the package bitsandbytes beside it (pip install bitsandbytes)"
            raise ValueError(f"load_in_4bit: got true, wanted {wanted}")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=AutoConfig.from_pretrained(folder).dtype or torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs, bitsandbytes repacks weights during evaluation for a kernel without a gradient and does not
            # restore them.
            module.support_avx512bf16_for_cpu = False
    return model


def build_model(
    recipe: Recipe, language_model: str, processor: EGMFProcessor, towers: dict[str, tuple], train_split
) -> EGMFForConditionalGeneration:
    """The LLM with a new fusion and the towers, before any training. Sets the processor's `clip_seconds`."""
    arguments = recipe.model
    processor.clip_seconds = clip_seconds(train_split) if towers else None
    statistics = {}
    for modality in {"audio", "vision"} - towers.keys():
        found = None
        if modality in recipe.data.modalities:
            found = feature_statistics(train_split, f"{modality}_features")
        if found is not None:
            statistics[modality] = found
    # `--modalities` may leave out a modality of the recipe.
    fusion = recipe.fusion | {
        "clip_statistics": [name for name in recipe.fusion["clip_statistics"] or () if name in recipe.data.modalities]
    }
    model = EGMFForConditionalGeneration.from_language_model(
        load_language_model(recipe, language_model),
        pseudo_token_id=processor.pseudo_token_id,
        **fusion,
        audio_input_rate=processor.audio_input_rate if "audio" in towers else None,
        speaker_adaptation=recipe.data.speaker_adaptation,
        **{f"{modality}_tower": tower for modality, (tower, _) in towers.items()},
        **{f"{modality}_feature_size": len(mean) for modality, (mean, _) in statistics.items()},
    )
    model.is_loaded_in_4bit = arguments.load_in_4bit  # PEFT and Trainer look for it
    if are_sharded():
        # FSDP makes a unit of each of these, and gathers a unit's weights only for its forward pass.
        model._no_split_modules = model.model.language_model._no_split_modules
    set_feature_statistics(model, train_split, statistics=statistics)
    for modality in trained_towers(recipe, towers) + list(towers) * bool(recipe.phases.tower_epochs):
        # Half precision would round small updates away.
        getattr(model.model, f"{modality}_tower").float()
    return model


def set_trainable_towers(model: EGMFForConditionalGeneration, towers: list[str]) -> None:
    """Trains the towers of these modalities from now on and freezes the others."""
    model.model.freeze_towers()
    for modality in towers:
        getattr(model.model, f"{modality}_tower").requires_grad_()
    model.train()  # frozen towers stay in eval mode, without dropout and with fixed statistics


def add_lora(recipe: Recipe, model: EGMFForConditionalGeneration, trained: list[str]) -> PeftModel:
    """Adds LoRA to the LLM's projections. The weights of the `trained` towers are trained as well.

    Experts, gate and readout are trained with the LLM if they have had no phase of their own. Otherwise they stay as
    they are: with few clips the LLM's phase would only overfit them. The LLM then learns without the readout, and the
    readout's gain is fitted afterwards. The projector is trained in both cases.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.model.lora_r,
        lora_alpha=recipe.model.lora_alpha,
        target_modules=recipe.model.lora_target_modules,
        modules_to_save=["fusion", "readout", *(f"{modality}_tower" for modality in trained)],
    )
    whole = get_peft_model(model, lora)
    if recipe.phases.fusion_epochs:
        for name, parameter in whole.named_parameters():
            if re.search(r"\.(fusion|readout)\.", name) and ".projector." not in name:
                parameter.requires_grad_(False)
    learns_alone = recipe.phases.fusion_epochs or recipe.phases.expert_gain == 0
    whole.get_base_model().model.readout.gain.fill_(0.0 if learns_alone else 1.0)
    return whole


def gather_trained_model(recipe: Recipe, trainer: Trainer, trained: list[str]) -> PeftModel | None:
    """The complete trained model with its LoRA layers and unquantised weights; None on all but the main process.

    If the processes hold parts of the model (FSDP, DeepSpeed), the parts are gathered. Weights in 4 bits are
    dequantised to the dtype of the LLM's other weights. All processes must call this function.

    Args:
        trained: Modalities whose towers were trained with the LLM.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = accelerator.get_state_dict(trainer.model_wrapped)
        if not accelerator.is_main_process:
            return None
        parts = model.get_base_model()
        with undivided(), torch.device("meta"):
            model = add_lora(recipe, EGMFForConditionalGeneration(copy.deepcopy(parts.config)), trained)
        model.load_state_dict(weights, assign=True)
        model.get_base_model().tie_weights()
        model.get_base_model().generation_config = parts.generation_config
    if not accelerator.is_main_process:
        return None
    if recipe.model.load_in_4bit:
        from transformers.integrations.bitsandbytes import dequantize_and_replace  # needs bitsandbytes

        adapter, base = get_peft_model_state_dict(model), model.unload()
        text_config = base.config.text_config
        dequantize_and_replace(base, text_config.quantization_config, dtype=base.lm_head.weight.dtype)
        for config in (text_config, base.model.language_model.config):
            vars(config).pop("quantization_config", None)
        model = add_lora(recipe, base, trained)
        set_peft_model_state_dict(model, adapter)
    return model


def merge_lora(model: PeftModel) -> EGMFForConditionalGeneration:
    """Merges LoRA into the LLM's weights in float32 on the CPU.

    LoRA often changes a weight by less than half of its last bit in bfloat16; rounding to bfloat16 would lose this
    change. The function modifies `model`, which must not be used afterwards.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        # After `gather_trained_model`, buffers that are not saved may be on the meta device and have no values.
        if tensor.is_floating_point() and not tensor.is_meta:
            # On the CPU, because the optimizer still uses GPU memory, and a GPU may round products to TF32.
            tensor.data = tensor.data.to("cpu", torch.float32)
    whole = model.merge_and_unload()
    for name in whole.config.sub_configs:
        if getattr(whole.config, name) is not None:
            getattr(whole.config, name).dtype = torch.float32
    return whole
