"""Small random models and their processors, and how tests change and compare what goes in and out."""

from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from clips import tone
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    HubertConfig,
    HubertModel,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import AffectTask, EGMFProcessor


# "calm" is a prefix of "calm down": the only built-in-like task whose candidates need EOS.
CALM = AffectTask("calm", "classification", labels=("calm", "calm down", "angry"))
TOLERANCE = 1e-4
LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
# Sizes of a speech tower that reads waves, and of one that reads pictures.
WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.5,
    "hidden_dropout": 0.5,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
EXTRACTORS = {
    "whisper": lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    "hubert": lambda: Wav2Vec2FeatureExtractor(),
}
VOCABULARY = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Each is here for what it does differently from Llama.
OTHER_LLMS = {
    "sliding-window": MistralConfig(**SIZES, **VOCABULARY, num_key_value_heads=2, sliding_window=16),
    "softcap": Gemma2Config(**SIZES, **VOCABULARY, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "scaled-embedding": Gemma3TextConfig(**SIZES, **VOCABULARY, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "logit-scale": CohereConfig(**SIZES, **VOCABULARY, num_key_value_heads=2, logit_scale=0.25),
    "head-bias": PhiConfig(**SIZES, **VOCABULARY),
    "narrow-embedding": OPTConfig(
        **VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "window-by-index": GPTNeoConfig(
        **VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    ),
    "alibi": BloomConfig(**VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "state-space": MambaConfig(**VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
}


def pseudo_tokens_of(model: EGMFForConditionalGeneration, batch: dict) -> torch.Tensor:
    """The pseudo tokens (B, K, H) of a processor's batch."""
    found = []
    hook = model.model.fusion.projector.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(**batch)
    hook.remove()
    return found[0]


def whisper(max_source_positions: int = 50) -> WhisperModel:
    """A Whisper of two layers of width 16; each position of its encoder lasts 20 ms."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1}
    sizes["max_source_positions"] = max_source_positions
    return WhisperModel(WhisperConfig(vocab_size=20, **special, **heads, **sizes, dropout=0.5))


def hubert() -> HubertModel:
    """A HuBERT of two layers of width 16, with dropout."""
    return HubertModel(HubertConfig(**WAVE))


def clip_vision() -> CLIPVisionModel:
    """A CLIP of two layers of width 16 that sees pictures of 16 x 16 as four patches."""
    return CLIPVisionModel(CLIPVisionConfig(**IMAGE))


def save_whisper(folder: Path, model) -> None:
    """Writes `whisper()`, or its encoder, and the extractor of its features."""
    model.save_pretrained(folder)
    EXTRACTORS["whisper"]().save_pretrained(folder)


def build_processor(folder: str, extractor: str = "whisper") -> EGMFProcessor:
    """A processor of sound and pictures of 16 x 16 with the tokenizer of a folder; it hears 1 s with "whisper"."""
    return EGMFProcessor(
        AutoTokenizer.from_pretrained(folder),
        feature_extractor=EXTRACTORS[extractor](),
        image_processor=CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False),
        num_pseudo_tokens=3,
        num_frames=4,
    )


def save_model_with_towers(folder: Path, language_model: str, assemble, **config):
    """Writes a checkpoint with both towers to `folder / "model"`, and an audio file and a broken file beside it."""
    processor = build_processor(language_model)
    processor.default_task, processor.trained_tasks = "meld", ["meld"]
    torch.manual_seed(3)
    towers = {"audio_tower": whisper(), "vision_tower": clip_vision()}
    model = assemble(**towers, audio_input_rate=100, **config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    soundfile.write(folder / "voice.wav", tone(0.3), 16000)
    (folder / "broken.mp4").write_bytes(b"\0" * 500)
    return processor, model


def random_llm(name: str):
    """One of `OTHER_LLMS` with weights large enough that its outputs differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_LLMS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def greedy(model, inputs, **options):
    """Five tokens after the inputs, (B, L + 5), of which none ends the answer."""
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    return model.generate(**inputs, **settings, **options)


def pad(batch, side: str, tokens: int = 6, frames: int = 5):
    """The batch with additional padding of text and features on one side, filled with arbitrary tokens and NaN."""

    def widths(n):
        return (n, 0) if side == "left" else (0, n)

    shape = batch["input_ids"].shape
    padded = {name: F.pad(value, widths(tokens)) for name, value in batch.items() if value.shape == shape}
    padded["input_ids"] = padded["input_ids"].masked_fill(F.pad(batch["attention_mask"], widths(tokens)) == 0, 42)
    for modality in ("audio", "vision"):
        mask = F.pad(batch[f"{modality}_mask"], widths(frames))
        features = F.pad(batch[f"{modality}_features"], (0, 0, *widths(frames)))
        padded[f"{modality}_mask"] = mask
        padded[f"{modality}_features"] = features.masked_fill(mask.unsqueeze(-1) == 0, torch.nan)
        padded[f"{modality}_times"] = F.pad(batch[f"{modality}_times"], widths(frames)).masked_fill(
            mask == 0, torch.inf
        )
    return padded


def largest_difference(model, first, second) -> float:
    """Largest difference between the outputs of two inputs, over the logits of real tokens and all gate weights."""
    with torch.no_grad():
        one, two = model(**first), model(**second)
    stands_one, stands_two = first["attention_mask"].bool(), second["attention_mask"].bool()
    differences = [(one.logits[stands_one] - two.logits[stands_two]).abs().max()]
    differences += [(one.gate_weights[level] - two.gate_weights[level]).abs().max() for level in one.gate_weights]
    assert all(torch.isfinite(difference) for difference in differences)
    return max(difference.item() for difference in differences)
