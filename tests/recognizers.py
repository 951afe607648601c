"""Tiny speech recognition models with random weights, as folders that transformers loads."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AddedToken,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)


LANGUAGES = ("en", "de")


def build_whisper(folder: Path, is_multilingual: bool = True) -> str:
    """Write a Whisper of letters that hears 30 seconds and writes up to 20 tokens with times."""
    letters = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    names = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startofprev", "nospeech"]
    ids = {name: len(letters) + i for i, name in enumerate([*names, "notimestamps"])}
    tokenizer = WhisperTokenizer(letters, [])
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{name}|>" for name in ids]})
    tokenizer.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", special=False) for step in range(1501)])
    assert tokenizer.convert_tokens_to_ids("<|notimestamps|>") == ids["notimestamps"]
    end = ids["endoftext"]
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["startoftranscript"],
        begin_suppress_tokens=[],
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    fields = {
        "max_length": 24,
        "num_beams": 1,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": ids["startoftranscript"],
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": is_multilingual,
    }
    if is_multilingual:
        fields["lang_to_id"] = {f"<|{name}|>": ids[name] for name in LANGUAGES}
        fields["task_to_id"] = {name: ids[name] for name in ("translate", "transcribe")}
    model.generation_config = GenerationConfig(**fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return str(folder)


def build_ctc(folder: Path) -> str:
    """Write a wav2vec 2.0 of letters with a CTC head."""
    folder.mkdir()
    vocabulary = ["<pad>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(str({token: i for i, token in enumerate(vocabulary)}).replace("'", '"'))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    sizes = {"conv_dim": [8] * 3, "conv_kernel": [10, 8, 4], "conv_stride": [10, 8, 4], "num_feat_extract_layers": 3}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    embedding = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    config = Wav2Vec2Config(vocab_size=len(vocabulary), pad_token_id=0, **sizes, **small, **embedding)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)
