"""Configuration of EGMF, Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565).

The paper specifies three experts, a hierarchical dynamic gate, pseudo tokens in front of a causal LLM and LoRA. It
does not specify sizes, kernels, layers or the other fields below; this implementation chooses them.
"""

import copy
import os
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


# The least values of fields that are counts.
LEAST = dict.fromkeys(("num_pseudo_tokens", "fusion_hidden_size", "fusion_num_attention_heads"), 1)
LEAST |= {"fusion_intermediate_size": 1, "semantic_num_stretches": 1, "global_num_components": 1}
LEAST |= {"global_num_layers": 0}
EXPERTS = ("local", "semantic", "global")
# Registers the pipeline that is saved with the checkpoint, for `pipeline()`.
PIPELINES = {
    "affect-recognition": {
        "impl": "pipeline_egmf.AffectRecognitionPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


AUTO_MODELS = ("AutoModel", "AutoModelForMultimodalLM")  # the auto classes that load a checkpoint
ARCHITECTURE = 3  # counts changes after which weights of older checkpoints no longer fit


@strict
class EGMFConfig(PreTrainedConfig):
    r"""
    Configuration of [`EGMFForConditionalGeneration`].

    Text is always a modality of the model. Audio or vision is one if it has a tower (`audio_config`, `vision_config`)
    or a feature width (`audio_feature_size`, `vision_feature_size`), but not both.

    Args:
        text_config: Config of the causal LLM; any decoder-only model that `AutoModelForCausalLM` loads.
        audio_config: Config of a speech encoder, or None. Of an encoder-decoder, only the encoder is used.
        vision_config: Config of an image encoder, applied frame by frame, or None.
        audio_feature_size: Width of precomputed audio features, if there is no audio tower.
        vision_feature_size: Width of precomputed vision features, if there is no vision tower.
        audio_input_rate: Positions per second of the audio tower's input (16000 for waveforms at 16 kHz, 100 for
            mel frames every 10 ms). It determines the times of the tower's frames in seconds.
        pseudo_token_id: Token id of the placeholders in `input_ids` that the pseudo tokens replace.
        num_pseudo_tokens: Number K of pseudo tokens per utterance, and of latents per expert and modality.
        fusion_hidden_size: Width d of the experts and the gate.
        fusion_num_attention_heads: Attention heads in the experts.
        fusion_intermediate_size: Width of the experts' feed-forward layers.
        fusion_dropout: Dropout on the projected modality sequences and inside the experts.
        experts: Experts in use, a subset of `("local", "semantic", "global")`; order is kept.
        experts_read_text: Whether the experts read the utterance. If not, only the LLM does; the experts read sound
            and pictures, and the mean embedding of the prompt with its context.
        local_kernel_sizes: Odd kernel widths, in frames, of the local expert's time scales.
        semantic_num_stretches: Number of stretches of the clip over which the semantic expert averages audio and
            vision.
        global_num_components: Number of cosine components over the clip in the global expert, per modality.
        global_num_layers: Transformer layers of the global expert.
        gating: `"hierarchical"` (over modalities inside an expert, then over experts per pseudo token), `"flat"`
            (one softmax over all expert-modality pairs per pseudo token) or `"mean"` (no gate).
        lm_head_bias: Whether the LLM's head has a bias. `from_language_model` sets it.
        feature_noise: Standard deviation of Gaussian noise that training adds to precomputed features, by modality
            name, in units of the features' standard deviation. It regularises weak or contaminated features.
        feature_components: Number of principal components that a modality's precomputed features are reduced to, by
            modality name (audio, vision). Without it, all features are read.
        clip_statistics: The modalities (audio, vision) that add the mean and the standard deviation of the clip's
            frames to every position. For a tower, the statistics are computed for each layer.
        tower_layers: The hidden states of a tower that are read, by modality name (audio, vision); 0 is the input of
            the first layer. By default all; `from_language_model` chooses 8, evenly spread, of a tower with more.
        frame_pooling: Number of consecutive frames that are averaged before the fusion, by modality name (audio,
            vision). A tower's hidden layers are averaged before clip statistics, features after them.
        speaker_adaptation: Whether the model was trained with centers of speakers (`audio_center`, `vision_center`)
            and expects them. It changes no computation: the pipeline and `eval.py` warn if clips come without them.
        initializer_range: Standard deviation of new embeddings, and of a new head's weights.
        architecture: Version of the layers. A checkpoint of another version is refused.
    """

    model_type = "egmf"
    sub_configs = {"text_config": AutoConfig, "audio_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions", "gate_weights", "expert_states"]

    text_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_feature_size: int | None = None
    vision_feature_size: int | None = None
    audio_input_rate: float | int | None = None
    pseudo_token_id: int = 0
    num_pseudo_tokens: int = 8
    fusion_hidden_size: int = 256
    fusion_num_attention_heads: int = 4
    fusion_intermediate_size: int = 512
    fusion_dropout: float | int = 0.1
    experts: list[str] | tuple[str, ...] = EXPERTS
    experts_read_text: bool = True
    local_kernel_sizes: list[int] | tuple[int, ...] = (3, 7, 15)
    semantic_num_stretches: int = 4
    global_num_components: int = 6
    global_num_layers: int = 2
    gating: Literal["hierarchical", "flat", "mean"] = "hierarchical"
    feature_noise: dict[str, float | int] | None = None
    feature_components: dict[str, int] | None = None
    clip_statistics: list[str] | tuple[str, ...] = ()
    tower_layers: dict[str, list[int]] | None = None
    frame_pooling: dict[str, int] | None = None
    speaker_adaptation: bool = False
    lm_head_bias: bool = False
    initializer_range: float = 0.02
    architecture: int = ARCHITECTURE
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                kind = value.get("model_type")
                if kind not in CONFIG_MAPPING:
                    wanted = "one that this version of transformers knows"
                    raise ValueError(f"{name}: got the model_type {kind!r}, wanted {wanted}")
                setattr(self, name, CONFIG_MAPPING[kind](**value))
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"]()
        # transformers ties weights only if the top-level config says so. The LLM's config has the value.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.feature_noise = dict(self.feature_noise or {})
        self.feature_components = dict(self.feature_components or {})
        self.tower_layers = dict(self.tower_layers or {})
        self.frame_pooling = dict(self.frame_pooling or {})
        self.experts = list(self.experts)
        self.clip_statistics = list(self.clip_statistics)
        self.local_kernel_sizes = list(self.local_kernel_sizes)
        super().__post_init__(**kwargs)
        self.custom_pipelines = copy.deepcopy(PIPELINES)
        self._check()

    def _check(self) -> None:
        unknown = [name for name in self.experts if name not in EXPERTS]
        if unknown or not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(
                f"experts: got {self.experts}, wanted a non-empty subset of {list(EXPERTS)} without repeats"
            )
        if any(size < 1 or size % 2 == 0 for size in self.local_kernel_sizes) or not self.local_kernel_sizes:
            raise ValueError(f"local_kernel_sizes: got {self.local_kernel_sizes}, wanted odd positive numbers")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: got {value}, wanted at least {least}")
        if self.fusion_hidden_size % self.fusion_num_attention_heads:
            raise ValueError(
                f"fusion_hidden_size: got {self.fusion_hidden_size}, wanted a multiple of "
                f"fusion_num_attention_heads ({self.fusion_num_attention_heads})"
            )
        if not hasattr(self.text_config, "hidden_size"):
            wanted = "a text-only one, such as Gemma3ForCausalLM for a Gemma 3 that also reads pictures"
            raise ValueError(f"text_config: got a multimodal model ({self.text_config.model_type}), wanted {wanted}")
        for modality in ("audio", "vision"):
            if (
                getattr(self, f"{modality}_config") is not None
                and getattr(self, f"{modality}_feature_size") is not None
            ):
                raise ValueError(f"{modality}_feature_size: got a value with {modality}_config, wanted one of them")
            tower = getattr(self, f"{modality}_config")
            if tower is not None and not hasattr(tower, "hidden_size") and not hasattr(tower, "hidden_sizes"):
                raise ValueError(
                    f"{modality}_config: got {tower.model_type}, wanted an encoder with hidden_size or hidden_sizes"
                )
        if self.audio_config is not None and not self.audio_input_rate:
            raise ValueError("audio_input_rate: got nothing, wanted the audio tower's input positions per second")
        if not set(self.clip_statistics) <= set(self.modalities[1:]):
            wanted = f"some of the model's {self.modalities[1:]}"
            raise ValueError(f"clip_statistics: got {self.clip_statistics}, wanted {wanted}")
        for name, deviation in self.feature_noise.items():
            if name not in ("audio", "vision") or deviation < 0:
                raise ValueError(
                    f"feature_noise: got {{{name!r}: {deviation}}}, wanted audio or vision with a deviation >= 0"
                )
        for name, count in self.feature_components.items():
            got = f"feature_components: got {{{name!r}: {count}}}"
            if name not in ("audio", "vision") or count < 1:
                raise ValueError(f"{got}, wanted audio or vision with at least 1")
            if count > (most := getattr(self, f"{name}_feature_size") or count):
                raise ValueError(f"{got}, wanted at most its {most} features")
            if name in self.clip_statistics:
                raise ValueError(f"{got} and clip_statistics, which reads all features, wanted one of them")
        for name, layers in self.tower_layers.items():
            increasing = sorted({abs(layer) for layer in layers})
            if name not in ("audio", "vision") or not layers or list(layers) != increasing:
                wanted = "audio or vision with increasing numbers of hidden states"
                raise ValueError(f"tower_layers: got {{{name!r}: {layers}}}, wanted {wanted}")
        for name, size in self.frame_pooling.items():
            if name not in ("audio", "vision") or size < 1:
                raise ValueError(
                    f"frame_pooling: got {{{name!r}: {size}}}, wanted audio or vision with a number of frames >= 1"
                )

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "EGMFConfig":
        found = config_dict.get("architecture", 1)
        if "text_config" in config_dict and found != ARCHITECTURE:
            wanted = "AutoModel.from_pretrained(..., trust_remote_code=True), which uses the checkpoint's own code"
            raise ValueError(
                f"architecture: got a checkpoint of version {found} for code of {ARCHITECTURE}, wanted {wanted}"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        fields = super().to_dict()
        fields["custom_pipelines"] = copy.deepcopy(PIPELINES)  # `pipeline()` writes classes into the attribute
        # transformers registers a class for the auto class that loaded it only.
        auto_map = fields.get("auto_map") or {}
        if model := next((auto_map[name] for name in AUTO_MODELS if name in auto_map), None):
            fields["auto_map"] = auto_map | dict.fromkeys(AUTO_MODELS, model)
        for name in self.sub_configs:
            part = fields.get(name) or {}
            # Keep a Hub id, but not a private folder of the machine that trained the model.
            if os.path.isdir(part.get("_name_or_path") or ""):
                part["_name_or_path"] = ""
        return fields

    @property
    def text_embedding_size(self) -> int:
        """Width H of the LLM's input embeddings and of its head's input. OPT-350m's layers have another width."""
        return getattr(self.text_config, "word_embed_proj_dim", None) or self.text_config.hidden_size

    @property
    def modalities(self) -> list[str]:
        """Names of the model's modalities, in the order of the gate's modality axis."""
        present = ["text"]
        for name in ("audio", "vision"):
            if getattr(self, f"{name}_config") is not None or getattr(self, f"{name}_feature_size") is not None:
                present.append(name)
        return present


EGMFConfig.register_for_auto_class()

__all__ = ["EGMFConfig"]
