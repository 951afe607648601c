"""Builds the model of a recipe from towers, processor, LLM and fusion, adds LoRA, and merges it after training."""

import copy
import re
from typing import Any

import numpy as np
import torch
import transformers
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from egmf.commands import check_name
from egmf.data.lengths import clip_seconds
from egmf.data.tower_cache import PREPROCESSORS
from egmf.media_inputs_egmf import TowerInput
from egmf.modeling_egmf import EGMFForConditionalGeneration, undivided
from egmf.processes import are_sharded, has_fast_bfloat16
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import Recipe
from egmf.towers_egmf import encoder_of, load_tower
from egmf.training.statistics import feature_statistics, set_feature_statistics


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
        trained_modalities=recipe.data.modalities,
    )
    processor.limit_length(AutoConfig.from_pretrained(language_model))
    return processor


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
    """Loads the recipe's LLM: in float32 on a CPU that is slow in bfloat16, otherwise as it was saved.

    With `load_in_4bit`, its layers are quantised to 4 bits (NF4).

    Raises:
        ValueError: If the recipe sets `load_in_4bit` and bitsandbytes is not installed.
    """
    attention = recipe.model.attn_implementation
    if attention == "auto":
        attention = "eager" if recipe.training.device.type == "cpu" else "sdpa"
    options: dict[str, Any] = {"attn_implementation": attention}
    if recipe.training.device.type == "cpu" and not recipe.training.bf16 and not has_fast_bfloat16():
        options["dtype"] = torch.float32
    if recipe.model.load_in_4bit:
        if not is_bitsandbytes_available():
            wanted = "the package bitsandbytes beside it (pip install bitsandbytes)"
            raise ValueError(f"load_in_4bit: got true, wanted {wanted}")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options.get("dtype") or AutoConfig.from_pretrained(folder).dtype or torch.float32,
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


def linear_layers(model: EGMFForConditionalGeneration) -> str:
    """A regular expression for the names of all linear layers of the LLM, but for its head."""
    layers = (name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D))
    own = (re.escape(name) for name in layers if name.startswith("model.language_model."))
    return "|".join(sorted({re.sub(r"\d+", r"\\d+", name) for name in own}))


def add_lora(recipe: Recipe, model: EGMFForConditionalGeneration, trained: list[str]) -> PeftModel:
    """Adds LoRA to all linear layers of the LLM but its head. The weights of the `trained` towers are trained as well.

    Experts, gate and readout are trained with the LLM if they have had no phase of their own. Otherwise they stay as
    they are: with few clips the LLM's phase would only overfit them. The LLM then learns without the readout, and the
    readout's gain is fitted afterwards. The projector is trained in both cases.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.model.lora_r,
        lora_alpha=recipe.model.lora_alpha,
        target_modules=linear_layers(model),
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
