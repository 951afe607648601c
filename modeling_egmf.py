"""EGMF, Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565), as a transformers model.

This file combines a causal LLM with the experts, the gate and the projector (`fusion_egmf.py`), the audio and vision
encoders (`towers_egmf.py`) and the scoring of answers (`scoring_egmf.py`).

Shape letters: B samples, L prompt positions, T frames of a modality, F video frames, M modalities, E experts, K pseudo
tokens, H the LLM's hidden size.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, StaticCache
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, torch_compilable_check

from .configuration_egmf import EGMFConfig
from .experts_egmf import masked_mean
from .fusion_egmf import EGMFFusion, init_fusion_weights
from .media_features_egmf import MEDIA_INPUTS, MediaMixin
from .readout_egmf import ExpertReadout, answer_prefixes
from .scoring_egmf import ScoringMixin, accepts_position_ids, check_static_cache, uncompiled_on_cpu
from .towers_egmf import build_tower, encoder_of, is_trained, load_tower, read_layers, spread_layers


if TYPE_CHECKING:  # not imported at run time; transformers saves the imported file with every checkpoint
    from .pipeline_egmf import AffectRecognitionPipeline  # noqa: F401


@contextmanager
def undivided() -> Iterator[None]:
    """Loads and builds models with whole weights, although DeepSpeed's ZeRO-3 is configured.

    transformers would divide the weights among the processes while it builds a model. Parts with divided weights can
    be neither assembled nor checked; DeepSpeed divides the assembled model when training begins.
    """
    configured = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = configured


@dataclass
class EGMFOutput(ModelOutput):
    """
    Args:
        loss: Scalar cross-entropy over the answer positions, when `labels` are given.
        logits: (B, L, vocab). With `labels`, logits are computed for the answer tokens only: (answer tokens, vocab).
        last_hidden_state: (B, L, H), from `EGMFModel` only.
        gate_weights: `{"modality": (B, E, M), "expert": (B, K, E)}`, axes in the order of `config.experts` and
            `config.modalities`. The weight of an absent modality is exactly 0; the other weights sum to 1.
        expert_states: (B, 1 + K, d), what the expert readout reads at every position of an answer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    gate_weights: dict[str, torch.Tensor] | None = None
    expert_states: torch.Tensor | None = None


class EGMFPreTrainedModel(PreTrainedModel):
    config: EGMFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "audio", "image")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["EGMFFusion", "ExpertReadout"]
    _keep_in_fp32_modules_strict = ["fusion", "readout"]
    # Quantizers leave these modules as they are; they read this list, and match names from their start.
    _keep_in_fp32_modules = ["fusion", "readout", "model.fusion", "model.readout"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # Loading creates new parameters, which require gradients. Freeze the towers again.
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.freeze_towers()
        return loaded

    def post_init(self):
        super().post_init()
        # FSDP looks for each of these classes; an encoder's list also names layers of its decoder, which is not here.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv1d)) and module is not getattr(self, "lm_head", None):
            init.lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ExpertReadout):
            init.zeros_(module.out[-1].weight)  # an untrained readout leaves the LLM as it is
            init.zeros_(module.spelling)
            # At a scale of 1, a step of Adam would change the logits by several units.
            init.constant_(module.out[0].weight, 0.3)
            init.ones_(module.gain)
        elif not init_fusion_weights(module, self.config.initializer_range):
            super()._init_weights(module)


class EGMFModel(MediaMixin, EGMFPreTrainedModel):
    """The LLM without its head, the towers and the fusion.

    Text passes through the LLM's input embeddings. Audio and vision are precomputed features or the output of a tower.
    The fusion maps the three modalities to K pseudo tokens. They replace the K placeholders of each prompt, and the
    LLM processes the resulting sequence.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__(config)
        # The LLM is registered first: `model.dtype` is the dtype of the first parameter.
        self.language_model = AutoModel.from_config(config.text_config)
        self.audio_tower = build_tower(config.audio_config) if config.audio_config is not None else None
        self.vision_tower = build_tower(config.vision_config) if config.vision_config is not None else None
        self.fusion = EGMFFusion(config)
        self.readout = ExpertReadout(config)
        towers = [type(tower).__name__ for tower in (self.audio_tower, self.vision_tower) if tower is not None]
        self._no_split_modules = [*self._no_split_modules, *towers]  # all layers of a tower are read together
        self.post_init()
        self.freeze_towers()

    def freeze_towers(self) -> None:
        """Freezes the towers. Call `tower.requires_grad_()` to train one."""
        for tower in (self.audio_tower, self.vision_tower):
            if tower is not None:
                tower.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True):
        # A frozen tower gives the same features in training and inference: no dropout, no layer drop.
        super().train(mode)
        for tower in (self.audio_tower, self.vision_tower):
            if tower is not None and not is_trained(tower):
                tower.eval()
        return self

    def _text(self, inputs_embeds: torch.Tensor, utterance_mask: torch.Tensor):
        """The utterance's embeddings (B, T, H), mask (B, T) and no times."""
        if utterance_mask.device.type != "cpu":
            # They are read where they are: the host would have to wait for the length of the longest utterance.
            return inputs_embeds, utterance_mask, None
        length = int(utterance_mask.sum(1).max())
        order = (~utterance_mask).long().argsort(dim=1, stable=True)[:, :length]
        embeds = inputs_embeds.gather(1, order.unsqueeze(-1).expand(-1, -1, inputs_embeds.shape[-1]))
        return embeds, utterance_mask.gather(1, order), None

    def fuse(
        self,
        input_ids: torch.Tensor,
        padding_mask: torch.Tensor,
        utterance_mask: torch.Tensor,
        inputs: dict,
        each_expert: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the pseudo tokens and inserts them into the prompt.

        Returns:
            The prompt's embeddings with the pseudo tokens (B, L, H), the expert readout's states (B, 1 + K, d) and
            the gate weights. With `each_expert` the states are (B, 1 + E, 1 + K, d), see [`EGMFFusion.forward`].
        """
        placeholders = input_ids == self.config.pseudo_token_id
        seen, wanted = placeholders.cumsum(1), self.config.num_pseudo_tokens
        if input_ids.device.type == "cpu":  # the host would have to wait for an accelerator
            torch_compilable_check(
                (seen[:, -1] == wanted).all(),
                lambda: (
                    f"input_ids: got {seen[:, -1].tolist()} placeholders (token {self.config.pseudo_token_id}) per "
                    f"sample, wanted num_pseudo_tokens={wanted} in each"
                ),
            )
        embeds, uttered = self.get_input_embeddings()(input_ids), utterance_mask.bool()
        text = (None, None, None)
        if self.config.experts_read_text:
            text = self._text(embeds, uttered & padding_mask.bool())
        inputs = {"text": text, **inputs}
        # The gate sees only the prompt before the pseudo tokens. The answer comes after them and cannot leak.
        prompt = masked_mean(embeds, padding_mask.bool() & (seen == 0) & ~uttered)
        pseudo_tokens, states, gate_weights = self.fusion(inputs, prompt, each_expert)
        places = (seen - 1).clamp(0, wanted - 1).unsqueeze(-1).expand_as(embeds)
        embeds = torch.where(placeholders.unsqueeze(-1), pseudo_tokens.to(embeds).gather(1, places), embeds)
        return embeds, states, gate_weights

    def get_expert_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        utterance_mask: torch.Tensor,
        each_expert: bool = False,
        **media,
    ) -> torch.Tensor:
        """Computes the expert readout's states of a processor's batch without the LLM's layers.

        They are (B, 1 + K, d); with `each_expert` (B, 1 + E, 1 + K, d), as in [`EGMFFusion.forward`].
        """
        return self.fuse(input_ids, attention_mask, utterance_mask, self._modalities(**media), each_expert)[1]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        utterance_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> EGMFOutput:
        """Arguments as in [`EGMFForConditionalGeneration.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: wanted exactly one of them")
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        gate_weights, expert_states = None, kwargs.pop("expert_states", None)
        if utterance_mask is not None:
            if inputs_embeds is not None:
                raise ValueError("inputs_embeds: got values with utterance_mask, wanted input_ids with placeholders")
            if padding_mask is None:
                padding_mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
            if padding_mask.shape != input_ids.shape or utterance_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask, utterance_mask: got {tuple(padding_mask.shape)} and "
                    f"{tuple(utterance_mask.shape)}, wanted input_ids' {tuple(input_ids.shape)}"
                )
            inputs = self._modalities(**media)
            inputs_embeds, expert_states, gate_weights = self.fuse(input_ids, padding_mask, utterance_mask, inputs)
        else:
            if any(value is not None for value in media.values()):
                raise ValueError("utterance_mask: got None with audio or vision, wanted the processor's mask")
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)

        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Left padding must not shift the positions of the other tokens.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if accepts_position_ids(self.language_model):
            kwargs["position_ids"] = position_ids
        with uncompiled_on_cpu(self.language_model):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                return_dict=True,
                **kwargs,
            )
        return EGMFOutput(
            # Back on the device of the input, where the readout is added: a device map may have split the LLM.
            last_hidden_state=outputs.last_hidden_state.to(inputs_embeds.device),
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            gate_weights=gate_weights,
            expert_states=expert_states,
        )


class EGMFForConditionalGeneration(EGMFPreTrainedModel, ScoringMixin, GenerationMixin):
    """EGMF with the LLM's head.

    `generate()` generates the answer as text. `score_labels()` computes the distribution over all legal answers.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__(config)
        self.model = EGMFModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(config.text_embedding_size, text_config.vocab_size, bias=config.lm_head_bias)
        # Each LLM names its embeddings differently, so find the name of the tied weight.
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    @classmethod
    @undivided()
    def from_language_model(
        cls,
        language_model: str | PreTrainedModel,
        audio_tower: str | PreTrainedModel | None = None,
        vision_tower: str | PreTrainedModel | None = None,
        **config_kwargs,
    ) -> "EGMFForConditionalGeneration":
        """Builds a model from a pretrained causal LLM and pretrained towers. Only the fusion is new.

        Args:
            language_model: A causal LLM, or its folder or Hub id. The weights are shared, not copied. If
                `pseudo_token_id` exceeds the embeddings of the LLM, they are resized to include it.
            audio_tower: A speech encoder (or encoder-decoder), or its folder or Hub id.
            vision_tower: An image encoder, or its folder or Hub id.
            **config_kwargs: Fields of [`EGMFConfig`].

        Raises:
            ValueError: If this model cannot reproduce the LLM's logits from the LLM's body and linear head.
        """
        if isinstance(language_model, str):
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        towers, attention = {}, {"": language_model.config._attn_implementation}
        config_kwargs["tower_layers"] = dict(config_kwargs.get("tower_layers") or {})
        attention["text_config"] = attention[""]
        for name, tower in (("audio", audio_tower), ("vision", vision_tower)):
            if tower is not None:
                tower = encoder_of(load_tower(tower) if isinstance(tower, str) else tower, name)
                config_kwargs[f"{name}_config"] = tower.config
                config_kwargs["tower_layers"].setdefault(name, spread_layers(tower.config))
                attention[f"{name}_config"] = tower.config._attn_implementation
                tower = tower.requires_grad_(False).to(language_model.device, language_model.dtype)
                towers[f"{name}_tower"] = tower
        if config_kwargs.get("pseudo_token_id", 0) >= language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(config_kwargs["pseudo_token_id"] + 1)

        head = language_model.get_output_embeddings()
        config = EGMFConfig(
            text_config=language_model.config, lm_head_bias=getattr(head, "bias", None) is not None, **config_kwargs
        )
        config.dtype = language_model.dtype
        config._attn_implementation = attention  # creating a config drops this setting of its sub-configs
        with torch.device("meta"):
            model = cls(config)
        if type(model.model.language_model) is not type(language_model.base_model):
            raise ValueError(
                f"language_model: got {type(language_model).__name__}, whose body is not what AutoModel builds "
                f"from its config ({type(model.model.language_model).__name__})"
            )
        model.model.language_model = language_model.base_model
        model.lm_head = head
        for name, tower in towers.items():
            setattr(model.model, name, tower)
        for part in (model.model.fusion, model.model.readout):
            part.to_empty(device=language_model.device).float().apply(model._init_weights)
        with torch.no_grad():
            # Some LLMs (Gemma 3) scale their embeddings after the lookup, so measure the output, not the weights.
            embeddings = language_model.get_input_embeddings()
            sample = torch.arange(0, embeddings.num_embeddings, embeddings.num_embeddings // 4096 + 1)
            scale = embeddings(sample.to(language_model.device)).float().square().mean().sqrt()
            model.model.fusion.projector.embedding_rms.copy_(scale)
        # Many instruct models sample by default, or penalise words of the prompt. An answer is the most probable one.
        tokens = language_model.generation_config.to_dict()
        tokens = {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # Without a cache, a generated placeholder would count as a placeholder of the prompt.
        model.generation_config = GenerationConfig(**tokens, suppress_tokens=[config.pseudo_token_id])
        if "past_key_values" not in inspect.signature(language_model.base_model.forward).parameters:
            # State-space models (Mamba) have another kind of cache. Each step processes the whole sequence instead.
            model.generation_config.use_cache = False
        model.train(language_model.training)
        model._check_head(language_model)
        return model

    @classmethod
    def from_base(
        cls,
        config: EGMFConfig,
        language_model: str | PreTrainedModel,
        audio_tower: str | PreTrainedModel | None = None,
        vision_tower: str | PreTrainedModel | None = None,
    ) -> "EGMFForConditionalGeneration":
        """Builds the base model for the adapter of a trained model: its LLM, its towers and a new fusion.

        Args:
            config: Config of the trained model.
            language_model, audio_tower, vision_tower: As in [`from_language_model`]. A tower that is in the config
                but not given has random weights; in this case the adapter must contain the whole tower.
        """
        # These fields come from the LLM and the towers.
        derived = {"lm_head_bias", "tie_word_embeddings", *config.sub_configs}
        fields = {name: getattr(config, name) for name in EGMFConfig.__annotations__.keys() - derived}
        for name, tower in (("audio", audio_tower), ("vision", vision_tower)):
            tower_config = getattr(config, f"{name}_config")
            if tower is None and tower_config is not None:
                tower = build_tower(tower_config)
            fields[f"{name}_tower"] = tower
            if tower_config is not None:  # not the default of a new model
                fields["tower_layers"] = fields["tower_layers"] | {name: read_layers(config, name)}
        return cls.from_language_model(language_model, **fields)

    @torch.no_grad()
    def _check_head(self, language_model: PreTrainedModel) -> None:
        """Compares this model's text-only logits with the LLM's, because some LLMs do more than a linear head."""
        training, self_training = language_model.training, self.training
        language_model.eval(), self.eval()
        probe = torch.arange(4, device=language_model.device).unsqueeze(0)
        with uncompiled_on_cpu(language_model):
            wanted = language_model(input_ids=probe, use_cache=False).logits.float()
        got = self(input_ids=probe, use_cache=False).logits.float()
        language_model.train(training), self.train(self_training)
        difference = (got - wanted).abs().max().item()
        if difference > 1e-3 * max(1.0, wanted.abs().max().item()):
            raise ValueError(
                f"language_model: {type(language_model).__name__} computes logits in a way EGMF does not support "
                f"(largest difference from the logits of its body and head {difference:.3g})"
            )

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _finish_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Scales (Cohere, Granite) or soft-caps (Gemma) the logits, as some LLMs do after the head."""
        text_config = self.config.text_config
        if getattr(text_config, "logit_scale", None):
            logits = logits * text_config.logit_scale
        if getattr(text_config, "logits_scaling", None):
            logits = logits / text_config.logits_scaling
        if getattr(text_config, "final_logit_softcapping", None):
            cap = text_config.final_logit_softcapping
            logits = (logits / cap).tanh() * cap
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        utterance_mask: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        audio_times: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        vision_times: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        audio_center: torch.Tensor | None = None,
        vision_center: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        expert_states: torch.Tensor | None = None,
        answer_prefix: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EGMFOutput:
        """
        Args:
            input_ids: (B, L), each row with `config.num_pseudo_tokens` placeholders when `utterance_mask` is given.
            attention_mask: (B, L), 1 for a token and 0 for padding; 4-D with a static cache.
            utterance_mask: (B, L), 1 for the tokens of the utterance. Required with a prompt, absent in later steps.
            audio_features, vision_features: (B, T, feature size), or precomputed hidden layers of a model's tower,
                (B, T, layers, tower size), those of `config.tower_layers`. `*_mask` is (B, T), all 0 for an absent
                modality. `*_times` is (B, T), seconds on a clock that the modalities share, NaN if unknown.
            input_features, input_values: The audio tower's input, with `audio_mask` (B, positions). A fixed window
                (Whisper) is processed whole, including the padding of the tower's feature extractor.
            pixel_values: (B, F, 3, height, width) frames, with `vision_mask` and `vision_times` (B, F).
            audio_center, vision_center: Center of each sample's speaker ([`EGMFModel.speaker_center`]), to which the
                features (B, 2, feature size) or the hidden layers (B, 2, layers, tower size) are adapted.
            padding_mask: (B, L), the 2-D mask if `attention_mask` is 4-D.
            labels: (B, L), -100 except on the answer's tokens and EOS. Loss and logits are computed only there.
            expert_states, answer_prefix: Used by `generate()` after the prompt: `expert_states` of the prompt's
                output, and the beginnings of the answer at the last S positions, (B, S, 2 H) of [`answer_prefixes`].
                By default a prompt without labels ends where its answer begins.
            logits_to_keep: Without labels: the number of last positions with logits (0 for all), or their indices or
                mask (`slice_logits_to_keep`).
            num_items_in_batch: Divisor of the summed loss: the number of labels in the whole accumulated batch.

        Raises:
            ValueError: If a field is invalid. The message gives the field, its value and the valid values.
        """
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # the key-value cache would only cost memory and copies
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            utterance_mask=utterance_mask,
            audio_features=audio_features,
            audio_mask=audio_mask,
            audio_times=audio_times,
            vision_features=vision_features,
            vision_mask=vision_mask,
            vision_times=vision_times,
            input_features=input_features,
            input_values=input_values,
            pixel_values=pixel_values,
            audio_center=audio_center,
            vision_center=vision_center,
            padding_mask=padding_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            expert_states=expert_states,
            return_dict=True,
            **kwargs,
        )
        hidden, loss = outputs.last_hidden_state, None
        if labels is not None:
            answers = labels[:, 1:] != -100
            answering = hidden[:, :-1][answers]
            if outputs.expert_states is not None:
                answering = answering + self._read_answers(outputs.expert_states, labels[:, 1:], answers).to(answering)
            logits = self._finish_logits(self.lm_head(answering))
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=labels[:, 1:][answers],
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        else:
            if outputs.expert_states is not None:
                mask = padding_mask if padding_mask is not None else attention_mask
                hidden = self._add_readout(hidden, mask, outputs.expert_states, answer_prefix)
            logits = self._finish_logits(self.lm_head(slice_logits_to_keep(hidden, logits_to_keep)))
        return EGMFOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gate_weights=outputs.gate_weights,
            expert_states=outputs.expert_states,
        )

    def _read_answers(self, states: torch.Tensor, labels: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The readout at the positions that `answers` (B, L) marks: (answer tokens, H), in the order of the mask."""
        length = int(answers.sum(1).max())
        order = (~answers).long().argsort(dim=1, stable=True)[:, :length]
        tokens = labels.gather(1, order).clamp(min=0)
        prefixes = answer_prefixes(self.model.get_input_embeddings()(tokens))[:, :-1]
        read = self.model.readout.gain * self.model.readout(states, prefixes)
        return read.to(labels.device)[answers.gather(1, order)]

    def _add_readout(self, hidden, mask, states, prefixes) -> torch.Tensor:
        """Adds the readout to the last S positions of each row's hidden states (B, L, H)."""
        last = hidden.new_full((len(hidden),), hidden.shape[1] - 1, dtype=torch.long)
        if prefixes is None:  # outside of `generate()`, prompts may be padded on the right
            prefixes = states.new_zeros(len(states), 1, self.model.readout.prefix.in_features)
            if mask is not None:
                mask = mask[:, -hidden.shape[1] :]  # it also covers the tokens of a cache
                last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        read = (self.model.readout.gain * self.model.readout(states, prefixes)).to(hidden)
        places = last.unsqueeze(1) + torch.arange(1 - read.shape[1], 1, device=hidden.device)
        return hidden.scatter_add(1, places.unsqueeze(-1).expand_as(read), read)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.expert_states is not None:
            model_kwargs["expert_states"] = outputs.expert_states
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, is_first_iteration=False, use_cache=True, **kwargs
    ):
        cache, states = kwargs.get("past_key_values"), kwargs.pop("expert_states", None)
        if isinstance(cache, StaticCache):
            check_static_cache(self.model.language_model)
        # After the prompt (or `score_labels()`) the cache contains the modalities. Without a cache every step
        # processes the prompt again.
        begins = is_first_iteration or states is None  # an assistant model has no first iteration
        cached = int(cache.get_seq_length()) if cache is not None and begins else 0
        is_prompt = (begins and not cached) or not use_cache
        modalities = {name: kwargs.pop(name, None) for name in ("utterance_mask", *MEDIA_INPUTS)}
        utterance_mask = modalities["utterance_mask"]
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if utterance_mask is None:
            return inputs
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: got values with utterance_mask, wanted input_ids with placeholders")
        input_ids, length = input_ids.to(self.device), utterance_mask.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        # transformers moves inputs to the device of the model before the call.
        modalities = {name: value.to(self.device) for name, value in modalities.items() if value is not None}
        if is_prompt:
            if input_ids.shape[1] < length:
                got = f"parts of {input_ids.shape[1]} of the prompt's {length} tokens"
                raise ValueError(f"prefill_chunk_size: got {got}, wanted None: the fusion reads the whole prompt")
            modalities["utterance_mask"] = F.pad(modalities["utterance_mask"], (0, input_ids.shape[1] - length))
            inputs |= modalities | {"padding_mask": mask}
        elif states is None:  # a cache of an earlier call; that of `score_labels()` lacks the last token of the prompt
            if cached < length - 1:
                wanted = f"none, or one of the whole prompt of {length}"
                raise ValueError(f"past_key_values: got a cache of {cached} tokens, wanted {wanted}")
            states = self.model.get_expert_states(input_ids[:, :length], mask[:, :length], **modalities)
        inputs["expert_states"] = None if is_prompt else states
        answer = self.get_input_embeddings()(input_ids[:, length:])
        inputs["answer_prefix"] = answer_prefixes(answer)[:, -inputs["input_ids"].shape[1] :]
        return inputs


EGMFForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["EGMFForConditionalGeneration", "EGMFModel", "EGMFPreTrainedModel"]
