"""Towers: frozen audio and image encoders inside the model, whose layers are mixed."""

from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from corpus_files import SHARED
from models import IMAGE, TOLERANCE, WAVE, clip_vision, hubert, whisper
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    HubertConfig,
    HubertModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from corpora.schema import build_split
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.data.tower_cache import TowerCache
from egmf.media_inputs_egmf import TowerInput
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.towers_egmf import build_tower
from egmf.training.assembly import cut_window, start_speech_tower


SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
PYRAMID = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}  # of many widths


# Tower and the name of its input.
TOWERS = {
    "whisper": (whisper, "input_features"),
    "hubert": (hubert, "input_values"),  # group norm, as hubert-base
    "wav2vec2": (
        lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVE, feat_extract_norm="layer", do_stable_layer_norm=True)),
        "input_values",
    ),
    "clip-vision": (clip_vision, "pixel_values"),
    "resnet": (lambda: ResNetModel(ResNetConfig(**PYRAMID)), "pixel_values"),
    "swin": (lambda: SwinModel(SwinConfig(**SWIN)), "pixel_values"),
    "clip": (
        lambda: CLIPModel(CLIPConfig(text_config={**IMAGE, "vocab_size": 9}, vision_config=IMAGE)),
        "pixel_values",
    ),
}


@pytest.fixture(scope="module", params=TOWERS)
def towered(request, assemble, processor):
    """A model with a tower, the names of its modality and input, and a batch: a long, a short and an absent clip."""
    build, field = TOWERS[request.param]
    torch.manual_seed(1)
    tower = build()
    if field == "pixel_values":
        modality, model = "vision", assemble(vision_tower=tower)
        values, lengths = torch.randn(3, 4, 3, 16, 16), (4, 2, 0)
    else:
        rate = 100 if field == "input_features" else 16000
        modality, model = "audio", assemble(audio_tower=tower, audio_input_rate=rate)
        # A Whisper window has its positions last; of a wave they are all there is.
        values, lengths = (
            (torch.randn(3, 8, 100), (100, 30, 0)) if rate == 100 else (torch.randn(3, 400), (400, 150, 0))
        )
    positions = max(lengths)
    mask = (torch.arange(positions) < torch.tensor(lengths)[:, None]).long()
    batch = dict(processor(text=["it is good", "no", "well"], task="meld"))
    batch |= {field: values, f"{modality}_mask": mask}
    if modality == "vision":
        batch["vision_times"] = torch.arange(4.0).expand(3, 4)
    return model, modality, field, batch


def outputs_of(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        outputs = model(**batch)
    return outputs.logits[batch["attention_mask"].bool()], outputs.gate_weights["modality"]


def assert_close(first, second, tolerance=TOLERANCE):
    for one, two in zip(first, second, strict=True):
        assert (one - two).abs().max() < tolerance


def test_tower_is_frozen_and_stays_in_eval_mode(towered):
    model, modality, _, batch = towered
    tower = getattr(model.model, f"{modality}_tower")
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    before = outputs_of(model, batch)
    model.train()
    assert not tower.training and model.model.language_model.training
    model.model.fusion.eval()  # its own dropout aside, training sees what use sees
    try:
        assert_close(before, outputs_of(model, batch), 1e-6)
    finally:
        model.eval()


def test_gate_takes_a_tower_as_it_takes_features(towered):
    model, modality, _, batch = towered
    gates = outputs_of(model, batch)[1]
    column = model.config.modalities.index(modality)
    assert (gates[:2, :, column] > 0).all() and (gates[2, :, column] == 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 3))


def test_tower_reaches_the_answer(towered):
    model, _, field, batch = towered
    changed = {**batch, field: batch[field].roll(1, dims=-1) * 2}
    first, second = (outputs_of(model, inputs)[1] for inputs in (batch, changed))
    assert (first[:2] - second[:2]).abs().max() > 1e-4


def test_clip_alone_is_as_in_the_batch(towered):
    """A clip gives the same result without the batch's padding; a Whisper window always has a fixed length."""
    model, modality, field, batch = towered
    gates = outputs_of(model, batch)[1]
    with torch.no_grad():
        logits = model(**batch).logits
    for index in range(3):
        row = {name: value[index : index + 1] for name, value in batch.items()}
        stands = row["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask", "utterance_mask"):
            row[name] = row[name][:, stands]
        length = int(row[f"{modality}_mask"].sum())
        if not length:
            row = {name: value for name, value in row.items() if name.split("_")[0] != modality and name != field}
        elif field != "input_features":
            for name in (field, f"{modality}_mask", f"{modality}_times"):
                if name in row:
                    row[name] = row[name][:, :length]
        with torch.no_grad():
            alone = model(**row)
        assert (alone.logits[0] - logits[index, stands]).abs().max() < TOLERANCE
        assert (alone.gate_weights["modality"][0] - gates[index]).abs().max() < TOLERANCE


def test_padding_of_media_changes_nothing(towered):
    model, modality, field, batch = towered
    mask = batch[f"{modality}_mask"].bool()
    values = batch[field].clone()
    if field == "input_features":
        values[2] = torch.nan  # of a window, only an absent one's content is padding
    else:
        values[~mask] = torch.nan
    assert_close(outputs_of(model, batch), outputs_of(model, {**batch, field: values}))
    if field == "input_values":
        for widths in ((50, 0), (0, 50)):
            padded = {
                **batch,
                field: torch.nn.functional.pad(batch[field], widths, value=9.0),
                "audio_mask": torch.nn.functional.pad(batch["audio_mask"], widths),
            }
            assert_close(outputs_of(model, batch), outputs_of(model, padded))


def test_nan_where_a_tower_listens(towered):
    model, _, field, batch = towered
    values = batch[field].clone()
    values[0].view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="features: got NaN or infinite values, wanted finite"):
        model(**{**batch, field: values})


def test_mask_of_another_length(towered):
    model, modality, _, batch = towered
    with pytest.raises(ValueError, match=f"{modality}_mask: got .* wanted"):
        model(**{**batch, f"{modality}_mask": batch[f"{modality}_mask"][:, :-1]})


def test_generation_and_scores(towered, processor):
    model, _, _, batch = towered
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    scores = model.score_labels(processor.candidates("meld"), **batch)
    torch.testing.assert_close(scores.log_probs.exp().sum(-1), torch.ones(3))


def test_layer_mix_learns(towered, processor):
    model, modality, _, batch = towered
    targets = processor(text=["it is good", "no", "well"], task="meld", answer=["joy", "anger", "fear"])
    model.zero_grad()
    model(**{**batch, **targets}).loss.backward()
    mix = model.model.fusion.layer_mix[modality].weights
    tower = getattr(model.model, f"{modality}_tower")
    states = (
        1 if tower.config.model_type in ("resnet", "swin") else 3
    )  # their layers differ in width: the last one alone is read
    assert mix.shape == (states,) and torch.allclose(mix.softmax(0), torch.full((states,), 1 / states))
    assert states == 1 or (mix.grad != 0).all()
    assert all(parameter.grad is None for parameter in tower.parameters())
    model.zero_grad()


def test_tower_travels_with_the_model(towered, tmp_path):
    model, modality, _, batch = towered
    model.save_pretrained(tmp_path)
    loaded = EGMFForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_close(outputs_of(model, batch), outputs_of(loaded, batch), 1e-5)
    assert not any(parameter.requires_grad for parameter in getattr(loaded.model, f"{modality}_tower").parameters())


def test_layers_computed_beforehand_give_the_same(towered):
    model, modality, field, batch = towered
    beforehand = model.model.encode_media(batch)
    assert field not in beforehand and model.model.encode_media(beforehand).keys() == beforehand.keys()
    assert_close(outputs_of(model, batch), outputs_of(model, beforehand), 1e-6)
    with pytest.raises(ValueError, match=rf"{modality}_features: got shape .*, wanted \(batch, frames, [13], 16\)"):
        model(**{**beforehand, f"{modality}_features": beforehand[f"{modality}_features"][:, :, 0]})
    with pytest.raises(ValueError, match="wanted one of features and the tower's input"):
        model(**{**beforehand, field: batch[field]})


def test_a_tower_without_its_weights_is_refused(tmp_path, assemble):
    """transformers would initialise missing weights randomly."""
    tower = TOWERS["hubert"][0]()
    tower.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layers.1.attention.k_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack 1 of HubertModel's, such as encoder.layers.1.attention"):
        assemble(audio_tower=str(tmp_path), audio_input_rate=16000)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_the_llms_attention_may_be_one_that_a_tower_lacks(assemble, tmp_path, attention):
    """WavLM has neither. transformers passes the setting on to all parts of a model."""
    model = assemble(audio_tower=WavLMModel(WavLMConfig(**WAVE)), audio_input_rate=16000)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.model.language_model.config._attn_implementation == attention
    assert loaded.model.audio_tower.config._attn_implementation == "eager"


def test_times_of_a_towers_frames(assemble):
    """The times of waveform frames are in seconds and do not depend on the padding."""
    model = assemble(audio_tower=TOWERS["hubert"][0](), audio_input_rate=16000)
    mask = torch.zeros(2, 3200, dtype=torch.long)
    mask[0, :1600], mask[1, :] = 1, 1
    layers, heard, seconds = model.model.get_audio_features(torch.randn(2, 3200), mask)
    frames = heard.sum(1)
    assert layers[0].shape[:2] == heard.shape and frames[0] < frames[1]
    for row, duration in ((0, 0.1), (1, 0.2)):
        times = seconds[row, : frames[row]]
        step = duration / frames[row]
        torch.testing.assert_close(times[0], step / 2)
        torch.testing.assert_close(times[-1], duration - step / 2)


def test_real_whisper_encoder(assemble, processor):
    folder = SHARED / "models" / "whisper-tiny-en-encoder"
    if not folder.is_dir():
        pytest.skip("no whisper-tiny-en-encoder in EGMF_SHARED/models, nor in ../shared/models")
    model = assemble(audio_tower=str(folder), audio_input_rate=100)
    trained = WhisperEncoder.from_pretrained(folder).state_dict()
    for name, value in model.model.audio_tower.state_dict().items():
        assert torch.equal(value, trained[name].to(value.dtype)), name
    assert next(model.model.audio_tower.parameters()).dtype == model.dtype
    mask = torch.zeros(2, 3000, dtype=torch.long)
    mask[0, :400], mask[1, :50] = 1, 1
    torch.manual_seed(0)
    batch = dict(processor(text=["it is good", "no"], task="meld"))
    batch |= {"input_features": torch.randn(2, 80, 3000), "audio_mask": mask}
    with torch.no_grad():
        layers, heard, seconds = model.model.get_audio_features(batch["input_features"], mask)
    assert len(layers) == 5 and layers[0].shape == (2, 1500, 384)
    assert heard.sum(1).tolist() == [200, 25]
    assert seconds[0, 199] < 4.0 < seconds[0, 200]
    logits, gates = outputs_of(model, batch)
    assert torch.isfinite(logits).all() and (gates[..., :2] > 0).all()


def test_a_shorter_window_hears_the_same_beginning():
    torch.manual_seed(0)
    two_seconds = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    tower = whisper(max_source_positions=100)
    shorter, own = cut_window(tower, two_seconds, 1)
    assert shorter.config.max_source_positions == 50 and (own.n_samples, own.nb_max_frames) == (16000, 100)
    sound = 0.1 * torch.randn(16000).numpy()
    reads = [made(sound, sampling_rate=16000, return_tensors="pt") for made in (two_seconds, own)]
    with torch.no_grad():
        layers = [
            encoder(read.input_features, output_hidden_states=True).hidden_states[0]
            for encoder, read in zip((tower.get_encoder().eval(), shorter), reads, strict=True)
        ]
    # What goes into the first layer: its convolutions see past the end of a window.
    torch.testing.assert_close(layers[1][:, :48], layers[0][:, :48], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="audio_window: got 3 seconds for WhisperEncoder, wanted at most 2 seconds"):
        cut_window(tower, two_seconds, 3)
    with pytest.raises(ValueError, match="audio_window: got 1 seconds for Wav2Vec2Model, wanted none"):
        cut_window(Wav2Vec2Model(Wav2Vec2Config(**WAVE)), Wav2Vec2FeatureExtractor(), 1)


def spectrogram(flutter: float, seed: int) -> TowerInput:
    """8 bands in a window of 100 positions of 10 ms, 80 of them used; loudness alternates by `flutter`."""
    noise = np.random.default_rng(seed)
    loudness = noise.uniform(0.3, 0.4, (1, 100)) + flutter * (np.arange(100) % 2 - 0.5)
    values = loudness + np.linspace(0.5, -0.2, 8)[:, None] + noise.normal(0, 0.05, (8, 100))
    return TowerInput(values.astype(np.float32), (np.arange(100) < 80).astype(np.int64))


def mean_response(tower: WhisperEncoder, clip: TowerInput) -> torch.Tensor:
    """The mean output of the convolutions over a clip, (size,)."""
    with torch.no_grad():
        states = torch.nn.functional.gelu(tower.conv1(torch.from_numpy(clip.values)))
        return torch.nn.functional.gelu(tower.conv2(states[None])[0])[:, 2:38].mean(1)


def test_a_new_speech_tower_tells_a_rough_voice_from_a_smooth_one():
    """Both voices have the same loudness in each band, so only a nonlinear function can distinguish them."""
    smooth, rough = ([spectrogram(flutter, seed) for seed in range(40)] for flutter in (0.0, 0.6))
    seen = {}
    for started in (False, True):
        torch.manual_seed(0)
        tower = whisper().get_encoder().eval()
        if started:
            start_speech_tower(tower, smooth + rough)
        one, other = (torch.stack([mean_response(tower, clip) for clip in clips]).mean(0) for clips in (smooth, rough))
        seen[started] = ((one - other).norm() / one.norm()).item()
    assert seen[True] > 10 * seen[False], seen


def test_a_new_speech_tower_does_not_care_what_level_its_bands_have():
    clips = [spectrogram(0.3, seed) for seed in range(10)]
    scale, shift = np.linspace(0.2, 3, 8)[:, None], np.linspace(-4, 4, 8)[:, None]
    other = [TowerInput((clip.values * scale + shift).astype(np.float32), clip.mask) for clip in clips]
    responses = []
    for variant in (clips, other):
        tower = whisper().get_encoder().eval()
        torch.manual_seed(0)
        start_speech_tower(tower, variant)
        responses.append(mean_response(tower, variant[0]))
    assert_close(*responses)


def test_a_tower_that_reads_waveforms_starts_as_transformers_has_it():
    tower = hubert()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    start_speech_tower(tower, [TowerInput(np.zeros(1600, np.float32), np.ones(1600, np.int64))])
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_batch_without_clips_trains_every_parameter_of_a_trained_tower(assemble, llm_folder, tmp_path):
    """Distributed training needs the same parameters in every process, whatever its rows have."""
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(llm_folder()), extractor, num_pseudo_tokens=3)
    model = assemble(audio_tower=TOWERS["hubert"][0](), audio_input_rate=16000).train()
    model.model.audio_tower.requires_grad_()
    cache = TowerCache(model, processor, frozen=(), trained=["audio"], folder=tmp_path)
    tasks = [processor.tasks["meld"]]
    collate = partial(AffectCollator, processor, tasks, ["text", "audio"], True, cache=cache)
    rows = expand_by_task(
        build_split([{"id": str(number), "text": "so", "emotion": "joy"} for number in (0, 1)]), tasks
    )
    assert "input_values" not in collate()(list(rows))
    batch = collate(blanks=True)(list(rows))
    assert all(value.is_contiguous() for value in batch.values())  # as pinned memory must be
    assert batch["input_values"].shape[0] == 2 and not batch["audio_mask"].any()
    without = model.eval()(**collate()(list(rows)))
    torch.testing.assert_close(model(**batch).loss, without.loss)
    model.train()(**batch).loss.backward()
    unused = [name for name, value in model.model.audio_tower.named_parameters() if value.grad is None]
    assert unused in ([], ["masked_spec_embed"])


def test_a_trained_tower_drops_no_layer_and_takes_short_clips(assemble):
    """All layers are read, and SpecAugment would refuse a clip that is shorter than its stretches."""
    hidden = WAVE | {"layerdrop": 0.9, "apply_spec_augment": True, "mask_time_prob": 0.5}
    tower = HubertModel(HubertConfig(**hidden))
    model = assemble(audio_tower=tower, audio_input_rate=16000)
    again = build_tower(HubertConfig(**hidden))
    model.model.audio_tower.requires_grad_()
    model.train(), again.train()
    waves, mask = torch.randn(2, 800), torch.ones(2, 800, dtype=torch.long)
    for _ in range(5):
        assert len(model.model.get_audio_features(waves, mask)[0]) == 3
        assert len(again(waves, output_hidden_states=True).hidden_states) == 3


def test_few_layers_of_a_deep_tower_are_read_and_kept_in_half_precision(assemble, llm_folder, tmp_path):
    """By default 8, evenly spread; a recipe may name others. The cache has only these, of averaged frames."""
    deep = HubertModel(HubertConfig(**WAVE | {"num_hidden_layers": 24})).eval()
    options = {"audio_tower": deep, "audio_input_rate": 16000}
    model = assemble(**options, frame_pooling={"audio": 4})
    assert model.config.tower_layers["audio"] == [0, 3, 7, 10, 14, 17, 21, 24]
    assert assemble(audio_tower=whisper(), audio_input_rate=100).config.tower_layers["audio"] == [0, 1, 2]
    waves, mask = torch.randn(1, 800), torch.ones(1, 800, dtype=torch.long)
    every = deep(waves, output_hidden_states=True).hidden_states
    some, *_ = assemble(**options, tower_layers={"audio": [2, 24]}).model.get_audio_features(waves, mask)
    assert len(some) == 2
    torch.testing.assert_close(some[0], every[2])
    torch.testing.assert_close(some[1], every[24])
    with pytest.raises(ValueError, match=r"tower_layers: got \{'audio': \[3, 25\]\}, wanted numbers from 0 to 24"):
        assemble(**options, tower_layers={"audio": [3, 25]})

    path = tmp_path / "voice.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder())
    processor = EGMFProcessor(tokenizer, feature_extractor=Wav2Vec2FeatureExtractor(), num_pseudo_tokens=3)
    cache = TowerCache(model, processor, ["audio"], folder=tmp_path / "cache")
    cache.fill([{"audio": str(path)}], torch.device("cpu"))
    features = cache.load("audio", str(path))["audio_features"]
    frames = deep(torch.zeros(1, 16000)).last_hidden_state.shape[1]
    assert features.shape == (-(-frames // 4), 8, 16) and features.dtype == np.float16
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    assert entry.stat().st_size < 0.1 * 25 * frames * 16 * 2
