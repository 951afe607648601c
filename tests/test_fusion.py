"""The fusion without an LLM: config errors, what each expert can learn, noise, the gate, and times."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import hubert
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, MobileNetV2Config

from egmf.configuration_egmf import EGMFConfig
from egmf.fusion_egmf import ClipStatistics, EGMFFusion, average_frames, clip_fractions
from egmf.modeling_egmf import EGMFForConditionalGeneration, EGMFModel


TEXT = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def build_fusion(seed: int = 0, **config) -> EGMFFusion:
    """An untrained fusion with pseudo tokens of size 1."""
    torch.manual_seed(seed)
    fusion = EGMFModel(
        EGMFConfig(
            text_config=TEXT,
            audio_feature_size=8,
            vision_feature_size=6,
            **{
                "num_pseudo_tokens": 2,
                "fusion_hidden_size": 32,
                "fusion_intermediate_size": 64,
                "fusion_num_attention_heads": 2,
                "fusion_dropout": 0.0,
                "local_kernel_sizes": [3, 7],
                **config,
            },
        )
    ).fusion
    nn.init.ones_(fusion.projector.embedding_rms)
    return fusion


def inputs_of(**features) -> dict:
    """Fusion inputs from unpadded sequences; omitted modalities are absent."""
    inputs = {name: (None, None, None) for name in ("text", "audio", "vision")}
    for name, values in features.items():
        inputs[name] = (values, torch.ones(values.shape[:2], dtype=torch.long), None)
    return inputs


# Each expert by itself learns what it is named for, from scratch, with a linear read-out on the pseudo tokens.


def brief_event(size: int, generator: torch.Generator):
    """Two of 200 noisy frames at a random position contain a pattern or its negative."""
    label = torch.randint(0, 2, (size,), generator=generator)
    audio = torch.randn(size, 200, 8, generator=generator)
    where = torch.randint(0, 199, (size,), generator=generator)
    pattern = torch.tensor([1.0, -1.0] * 4)
    for offset in (0, 1):
        audio[torch.arange(size), where + offset] += 4 * (2 * label - 1)[:, None] * pattern
    return {"audio": audio}, label


def constant_agreement(size: int, generator: torch.Generator):
    """Audio and vision each have a sign; the label states whether the signs agree (exclusive or)."""
    signs = 2 * torch.randint(0, 2, (size, 2), generator=generator) - 1
    audio = torch.randn(size, 12, 8, generator=generator)
    vision = torch.randn(size, 9, 6, generator=generator)
    audio[:, :, 0] += 2 * signs[:, :1]
    vision[:, :, 0] += 2 * signs[:, 1:]
    return {"audio": audio, "vision": vision}, (signs[:, 0] == signs[:, 1]).long()


def moving_agreement(size: int, generator: torch.Generator):
    """The sign of audio is random in each quarter of the clip; vision has the same signs or the opposite ones."""
    label = torch.randint(0, 2, (size,), generator=generator)
    signs = (2 * torch.randint(0, 2, (size, 4), generator=generator) - 1).repeat_interleave(2, dim=1)
    audio = 0.5 * torch.randn(size, 8, 8, generator=generator)
    vision = 0.5 * torch.randn(size, 8, 6, generator=generator)
    audio[:, :, 0] += 2 * signs
    vision[:, :, 0] += 2 * signs * (2 * label - 1)[:, None]
    return {"audio": audio, "vision": vision}, label


def slow_drift(size: int, generator: torch.Generator):
    """One channel slowly rises or falls over 120 frames; the change per frame is far below the noise."""
    label = torch.randint(0, 2, (size,), generator=generator)
    audio = torch.randn(size, 120, 8, generator=generator) + torch.randn(size, 1, 8, generator=generator)
    audio[:, :, 0] += (2 * label - 1)[:, None] * torch.linspace(-1, 1, 120)
    return {"audio": audio}, label


@pytest.mark.parametrize(
    "expert,draw,steps,batch_size",
    [
        ("local", brief_event, 150, 32),
        ("semantic", constant_agreement, 40, 32),
        ("global", moving_agreement, 200, 64),
        ("global", slow_drift, 70, 32),
    ],
    ids=["local-brief-event", "semantic-agreement", "global-agreement-in-time", "global-slow-drift"],
)
def test_expert_learns_its_kind(expert, draw, steps, batch_size):
    fusion, read_out = build_fusion(experts=[expert]), nn.Linear(2 * TEXT.hidden_size, 2)
    optimizer = torch.optim.AdamW([*fusion.parameters(), *read_out.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def predict(features):
        prompt = torch.zeros(len(features["audio"]), TEXT.hidden_size)
        return read_out(fusion(inputs_of(**features), prompt)[0].flatten(1))

    for _ in range(steps):
        features, label = draw(batch_size, generator)
        loss = nn.functional.cross_entropy(predict(features), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features, label = draw(400, generator)
        accuracy = (predict(features).argmax(1) == label).float().mean()
    assert accuracy > 0.9


@torch.no_grad()
def test_only_the_global_expert_knows_a_clip_from_the_same_played_backwards():
    generator = torch.Generator().manual_seed(2)
    audio, vision = torch.randn(2, 12, 8, generator=generator), torch.randn(2, 8, 6, generator=generator)
    fusion = build_fusion(local_kernel_sizes=[1]).eval()  # a width of one has no direction of its own

    def latents(expert, audio, vision):
        return fusion.experts[expert](fusion.sequence(inputs_of(audio=audio, vision=vision), 2))

    for expert in ("local", "semantic"):
        forwards, backwards = latents(expert, audio, vision), latents(expert, audio.flip(1), vision.flip(1))
        torch.testing.assert_close(forwards, backwards, atol=1e-5, rtol=0)
    change = latents("global", audio, vision) - latents("global", audio.flip(1), vision.flip(1))
    assert change.abs().max() > 1e-2


@torch.no_grad()
def test_all_but_the_local_expert_hear_the_other_modality():
    """In the local expert, a modality does not affect the latents of the other; in the other experts it does."""
    generator = torch.Generator().manual_seed(1)
    audio, vision = torch.randn(1, 12, 8, generator=generator), torch.randn(1, 9, 6, generator=generator)
    fusion = build_fusion().eval()

    def latents(expert, vision):
        return fusion.experts[expert](fusion.sequence(inputs_of(audio=audio, vision=vision), 1))[:, 1]  # audio's

    assert torch.equal(latents("local", vision), latents("local", -vision))
    assert (latents("semantic", vision) - latents("semantic", -vision)).abs().max() > 1e-2
    assert (latents("global", vision) - latents("global", -vision)).abs().max() > 1e-2


@torch.no_grad()
def test_local_expert_sees_short_stretches_only():
    """Swapping the halves of a clip keeps all short windows, so the peaks stay the same except at the seam."""
    fusion = build_fusion(local_kernel_sizes=[3]).eval()
    frames = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(2))
    expert = fusion.experts["local"]
    peaks = []
    # The last keys are the peaks of text, audio and vision.
    expert.pooling.register_forward_pre_hook(lambda module, args: peaks.append(args[0][:, -2]))
    for order in (frames, frames.roll(20, dims=1)):
        expert(fusion.sequence(inputs_of(audio=order), 1))
    changed = (peaks[0] - peaks[1]).abs() > 1e-4
    assert changed.float().mean() < 0.3


# The gate


@torch.no_grad()
@pytest.mark.parametrize("gating", ["hierarchical", "flat"])
def test_gate_depends_on_prompt_and_context(gating):
    fusion = build_fusion(gating=gating).eval()
    generator = torch.Generator().manual_seed(4)
    features = {
        "audio": torch.randn(2, 12, 8, generator=generator),
        "vision": torch.randn(2, 9, 6, generator=generator),
    }
    prompts = torch.randn(2, TEXT.hidden_size, generator=generator)
    same = {name: values[:1].expand(2, -1, -1) for name, values in features.items()}
    by_prompt = fusion(inputs_of(**same), prompts)[2]
    by_context = fusion(inputs_of(**features), prompts[:1].expand(2, -1))[2]
    for weights in (by_prompt, by_context):
        for level in ("modality", "expert"):
            assert (weights[level][0] - weights[level][1]).abs().max() > 1e-3
    # One weight per pseudo token and expert, not one for all tokens.
    assert (by_prompt["expert"][:, 0] - by_prompt["expert"][:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_mean_gating_is_even():
    fusion = build_fusion(gating="mean").eval()
    inputs = inputs_of(audio=torch.randn(1, 4, 8), vision=torch.randn(1, 5, 6))
    weights = fusion(inputs, torch.randn(1, TEXT.hidden_size))[2]
    torch.testing.assert_close(weights["modality"], torch.tensor([0, 0.5, 0.5]).expand(1, 3, 3))
    torch.testing.assert_close(weights["expert"], torch.full((1, 2, 3), 1 / 3))


# Times


@torch.no_grad()
def test_modalities_share_the_clip():
    """Pictures of only the second half align with the second half of the sound; without times, the order counts."""
    fusion = build_fusion().eval()
    sound, pictures = torch.linspace(0, 2, 5).unsqueeze(0), torch.tensor([[1.0, 1.5, 2.0]])

    def fractions_of(sound, pictures) -> list[list[float]]:
        inputs = inputs_of(text=torch.zeros(1, 2, 16), audio=torch.zeros(1, 5, 8), vision=torch.zeros(1, 3, 6))
        inputs["audio"] = (*inputs["audio"][:2], sound)
        inputs["vision"] = (*inputs["vision"][:2], pictures)
        clip = fusion.sequence(inputs, 1)
        return [part[0].tolist() for part in clip.split(clip.fractions).values()]

    assert fractions_of(sound, pictures) == [[0.25, 0.75], [0, 0.25, 0.5, 0.75, 1], [0.5, 0.75, 1]]
    unknown = torch.tensor([[0.0, torch.nan, 2.0]])
    assert fractions_of(sound, unknown)[2] == [0, 0.5, 1]
    order = [pytest.approx((place + 0.5) / 5) for place in range(5)]
    lone = torch.tensor([[torch.nan, 3.0, torch.nan]])
    assert fractions_of(None, lone)[1:] == [order, [pytest.approx((place + 0.5) / 3) for place in range(3)]]


def test_padding_has_no_place_in_the_clip():
    late, unknown = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[False, False, True]])
    assert clip_fractions(late, unknown, torch.zeros(1, 3))[0, :2].tolist() == [0, 1]


@torch.no_grad()
@pytest.mark.parametrize("gating", ["hierarchical", "flat", "mean"])
def test_states_of_the_mix_and_of_each_expert(gating):
    fusion, gated = build_fusion(gating=gating).eval(), []
    fusion.gate.register_forward_hook(lambda gate, inputs, output: gated.append(output))
    inputs = inputs_of(audio=torch.randn(2, 12, 8), vision=torch.randn(2, 9, 6))
    prompt = torch.randn(2, TEXT.hidden_size)
    tokens, states, weights = fusion(inputs, prompt)
    _, each, _ = fusion(inputs, prompt, each_expert=True)
    mixed, by_expert, _ = gated[0]
    torch.testing.assert_close(fusion.projector(mixed), tokens)
    torch.testing.assert_close(torch.einsum("bke,bekd->bkd", weights["expert"], by_expert), mixed)
    torch.testing.assert_close(states[:, 1:], fusion.readout_norm(mixed))
    torch.testing.assert_close(each[:, 0], states)
    torch.testing.assert_close(each[:, 1:, 1:], fusion.readout_norm(by_expert))
    assert each.shape == (2, 4, 3, 32)
    alone = build_fusion(gating=gating, experts=["global"]).eval()
    torch.testing.assert_close(alone(inputs, prompt, each_expert=True)[1][:, 1], alone(inputs, prompt)[1])


@torch.no_grad()
def test_text_may_be_read_where_it_is():
    """On an accelerator, the whole prompt is the text, and a mask marks the utterance."""
    fusion, prompt = build_fusion().eval(), torch.randn(2, TEXT.hidden_size)
    audio, words = torch.randn(2, 12, 8), torch.randn(2, 20, 16)
    alone = inputs_of(text=words[:, 5:9], audio=audio)
    inside = inputs_of(text=words, audio=audio)
    inside["text"][1][:, :5] = inside["text"][1][:, 9:] = 0
    torch.testing.assert_close(fusion(inside, prompt)[0], fusion(alone, prompt)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_fusion_is_one_graph_for_torch_compile():
    """No graph break, and no compilation anew for other lengths."""
    fusion, graphs = build_fusion().eval(), []
    compiled = torch.compile(fusion, backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True, dynamic=True)
    for frames in (12, 17, 30):
        inputs = inputs_of(text=torch.randn(2, frames - 3, 16), audio=torch.randn(2, frames, 8))
        prompt = torch.randn(2, TEXT.hidden_size)
        torch.testing.assert_close(compiled(inputs, prompt)[0], fusion(inputs, prompt)[0])
    assert len(graphs) == 1


# Noise


def test_feature_noise_is_for_training_only():
    fusion = build_fusion(feature_noise={"audio": 0.3}).eval()
    inputs = inputs_of(audio=torch.randn(1, 4, 8), vision=torch.randn(1, 5, 6))
    prompt = torch.zeros(1, TEXT.hidden_size)
    with torch.no_grad():
        assert torch.equal(fusion(inputs, prompt)[0], fusion(inputs, prompt)[0])
        fusion.train()
        assert (fusion(inputs, prompt)[0] - fusion(inputs, prompt)[0]).abs().max() > 1e-3
        quiet = build_fusion().train()
        assert torch.equal(quiet(inputs, prompt)[0], quiet(inputs, prompt)[0])


def test_feature_noise_is_for_precomputed_features(assemble):
    """Not for the frames of a tower."""
    model = assemble(audio_tower=hubert(), audio_input_rate=16000, feature_noise={"audio": 9.0}, fusion_dropout=0.0)
    model.train()
    layers, mask, times = model.model.get_audio_features(torch.randn(1, 800), torch.ones(1, 800, dtype=torch.long))
    inputs = {"text": (None, None, None), "audio": (layers, mask, times), "vision": (None, None, None)}
    prompt = torch.zeros(1, model.config.text_embedding_size)
    with torch.no_grad():
        assert torch.equal(*(model.model.fusion(inputs, prompt)[0] for _ in range(2)))


# Components


@torch.no_grad()
def test_components_project_the_standardised_features():
    torch.manual_seed(0)
    fusion = build_fusion(feature_components={"audio": 3}).eval()
    basis, mean, std = torch.randn(3, 8), torch.randn(8), torch.rand(8) + 0.5
    fusion.set_feature_statistics("audio", mean, std)
    fusion.set_feature_components("audio", basis)
    features = mean + std * torch.randn(2, 5, 8)
    wanted = ((features - mean) / std).clamp(-5, 5) @ basis.T
    torch.testing.assert_close(fusion.input_norm["audio"](features), wanted)
    unseen = torch.linalg.svd(basis / std)[2][-1]  # a direction that no component sees
    prompt = torch.zeros(2, TEXT.hidden_size)
    moved = fusion(inputs_of(audio=features + 0.01 * unseen), prompt)[0]
    torch.testing.assert_close(moved, fusion(inputs_of(audio=features), prompt)[0], rtol=0, atol=1e-5)


def test_components_are_saved_with_the_model(assemble, tmp_path):
    model = assemble(feature_components={"audio": 3})
    model.model.fusion.set_feature_components("audio", torch.arange(15.0).view(3, 5))
    model.save_pretrained(tmp_path)
    loaded = EGMFForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.fusion.input_norm["audio"].basis, torch.arange(15.0).view(3, 5))


# Clip statistics


@torch.no_grad()
def test_clip_statistics_are_those_of_the_frames_in_use():
    torch.manual_seed(0)
    layers = tuple(torch.randn(2, 9, 8) for _ in range(3))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    for layer in layers:
        layer[1, 4:] = torch.nan
    measured = ClipStatistics.measure(layers, mask)
    whole = torch.stack(layers, 2)[1, :4].flatten(1)
    wanted = torch.cat([whole.mean(0), whole.std(0, correction=0)])
    torch.testing.assert_close(measured[1], wanted, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClipStatistics.measure(layers, mask), measured)
    assert torch.equal(measured[:1], ClipStatistics.measure(tuple(layer[:1] for layer in layers), mask[:1]))

    fusion = build_fusion(clip_statistics=["audio"]).eval()
    audio, prompt = torch.randn(1, 6, 8), torch.randn(1, TEXT.hidden_size)
    padded = torch.cat([audio, torch.full((1, 3, 8), torch.nan)], 1)
    inputs = inputs_of(audio=audio), inputs_of(audio=padded)
    inputs[1]["audio"][1][:, 6:] = 0
    torch.testing.assert_close(*(fusion(given, prompt)[0] for given in inputs), rtol=0, atol=1e-4)
    before = fusion(inputs[0], prompt)[0]
    fusion.set_clip_statistics("audio", torch.full((16,), 2.0), torch.ones(16))
    assert (fusion(inputs[0], prompt)[0] - before).abs().max() > 1e-3


def test_clip_statistics_of_a_fusion_in_bfloat16():
    fusion = build_fusion(clip_statistics=["audio"]).eval().bfloat16()
    inputs = {"text": (None, None, None), "audio": (torch.randn(2, 5, 8), torch.ones(2, 5), None)}
    tokens, _, _ = fusion(inputs | {"vision": (None, None, None)}, torch.randn(2, 16).bfloat16())
    assert tokens.dtype == torch.bfloat16 and tokens.isfinite().all()


def test_no_clip_statistics_unless_wanted():
    assert not [name for name in build_fusion().state_dict() if "clip_statistics" in name]


# Frame pooling


@torch.no_grad()
def test_pooled_frames_are_means_of_those_in_use():
    torch.manual_seed(0)
    audio, mask = torch.randn(2, 10, 8), torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    audio[1, 6:] = 0.0  # what the fusion puts where nothing is
    times = torch.arange(10).float().expand(2, -1).clone()
    times[1, 6:] = torch.nan
    frames, used, seconds = average_frames(audio, mask, times, 4)
    assert used.tolist() == [[True, True, True], [True, True, False]]
    torch.testing.assert_close(
        frames[0], torch.stack([audio[0, :4].mean(0), audio[0, 4:8].mean(0), audio[0, 8:].mean(0)])
    )
    torch.testing.assert_close(frames[1, 1], audio[1, 4:6].mean(0))
    assert seconds[0].tolist() == [1.5, 5.5, 8.5] and seconds[1, :2].tolist() == [1.5, 4.5]
    assert average_frames(audio[:, :0], mask[:, :0], None, 4)[0].shape == (2, 0, 8)


@torch.no_grad()
def test_fusion_reads_pooled_frames_as_if_they_were_given_pooled():
    torch.manual_seed(0)
    fusion, plain = build_fusion(frame_pooling={"audio": 3}).eval(), build_fusion().eval()
    plain.load_state_dict(fusion.state_dict())
    audio, prompt = torch.randn(1, 9, 8), torch.randn(1, TEXT.hidden_size)
    pooled = audio.unflatten(1, (3, 3)).mean(2)
    tokens = fusion(inputs_of(audio=audio), prompt)[0]
    torch.testing.assert_close(tokens, plain(inputs_of(audio=pooled), prompt)[0], rtol=0, atol=1e-5)
    assert (tokens - plain(inputs_of(audio=audio), prompt)[0]).abs().max() > 1e-3
    padded = inputs_of(audio=torch.cat([audio, torch.full((1, 4, 8), torch.nan)], 1))
    padded["audio"][1][:, 9:] = 0
    torch.testing.assert_close(fusion(padded, prompt)[0], tokens, rtol=0, atol=1e-5)


# The config


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"experts": ["local", "far"]}, r"experts: got \['local', 'far'\], wanted a non-empty subset of"),
        ({"experts": []}, r"experts: got \[\], wanted"),
        ({"experts": ["local", "local"]}, "experts: got .* without repeats"),
        ({"local_kernel_sizes": [3, 4]}, r"local_kernel_sizes: got \[3, 4\], wanted odd positive"),
        ({"local_kernel_sizes": []}, r"local_kernel_sizes: got \[\], wanted"),
        ({"fusion_hidden_size": 30, "fusion_num_attention_heads": 4}, "fusion_hidden_size: got 30, wanted a multiple"),
        ({"audio_feature_size": 4, "audio_config": TEXT}, "audio_feature_size: got a value with audio_config"),
        ({"audio_config": TEXT}, "audio_input_rate: got nothing, wanted"),
        (
            {"vision_config": MobileNetV2Config()},
            "vision_config: got mobilenet_v2, wanted an encoder with",
        ),
        ({"feature_noise": {"text": 0.1}}, "feature_noise: got {'text': 0.1}, wanted audio or vision"),
        ({"clip_statistics": ["audio"]}, r"clip_statistics: got \['audio'\], wanted some of the model's \[\]"),
        ({"frame_pooling": {"text": 2}}, "frame_pooling: got {'text': 2}, wanted audio or vision"),
        ({"frame_pooling": {"audio": 0}}, "frame_pooling: got .* wanted .* >= 1"),
        ({"feature_components": {"text": 3}}, "feature_components: got {'text': 3}, wanted audio or vision"),
        (
            {"audio_feature_size": 8, "feature_components": {"audio": 9}},
            "feature_components: got {'audio': 9}, wanted at most its 8 features",
        ),
        (
            {"audio_feature_size": 8, "feature_components": {"audio": 4}, "clip_statistics": ["audio"]},
            "feature_components: got {'audio': 4} and clip_statistics, which reads all features, wanted one of them",
        ),
        ({"feature_noise": {"audio": -0.1}}, "feature_noise: got .* wanted .* >= 0"),
        ({"fusion_num_attention_heads": 0}, "fusion_num_attention_heads: got 0, wanted at least 1"),
        ({"num_pseudo_tokens": -1}, "num_pseudo_tokens: got -1, wanted at least 1"),
        ({"semantic_num_stretches": 0}, "semantic_num_stretches: got 0, wanted at least 1"),
        ({"global_num_components": 0}, "global_num_components: got 0, wanted at least 1"),
        ({"audio_config": {"hidden_size": 64}}, "audio_config: got the model_type None, wanted one that this version"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        EGMFConfig(text_config=TEXT, **fields)


@pytest.mark.parametrize("fields", [{"gating": "loud"}, {"num_pseudo_tokens": "many"}, {"fusion_hidden_size": 1.5}])
def test_config_fields_are_typed(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        EGMFConfig(text_config=TEXT, **fields)


def test_config_roundtrip(tmp_path):
    config = EGMFConfig(
        text_config=TEXT,
        audio_feature_size=8,
        vision_config=CLIPVisionConfig(hidden_size=24),
        experts=("global", "local"),
        feature_noise={"audio": 0.2},
        feature_components={"audio": 3},
    )
    config.save_pretrained(tmp_path)
    loaded = EGMFConfig.from_pretrained(tmp_path)
    assert loaded.experts == ["global", "local"] and loaded.modalities == ["text", "audio", "vision"]
    assert loaded.vision_config.hidden_size == 24 and loaded.text_config.hidden_size == 16
    assert loaded.to_diff_dict() == config.to_diff_dict()
