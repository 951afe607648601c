"""Dry runs of the benchmark recipes, mixtures of corpora, and the feature statistics computed before training."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import formats
import numpy as np
import pytest
import soundfile
import torch
import yaml
from clips import tone, write_pattern
from commands import read_lines
from corpus_files import write_meld_clips
from datasets import DatasetDict
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

import eval as eval_script
import train as train_script
from corpora import cherma, load_corpus, meld
from corpora.schema import build_split
from egmf.data.mixture import MixtureSampler, check_corpora
from egmf.fusion_egmf import FeatureNorm
from egmf.recipe_reading import load_recipe
from egmf.training.batches import MixtureTrainer
from egmf.training.language_models import build_tiny_language_model
from egmf.training.shrinking import published_config, shrunk
from egmf.training.statistics import feature_components, feature_statistics


ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*_qwen3_*.yaml"), key=lambda path: path.stem)
# Published with the models, or counted from their checkpoints.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "openai/clip-vit-large-patch14": 427_616_513,
    "openai/whisper-base": 72_593_920,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
SIZES = [name for name in PARAMETERS if "Qwen" in name]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No access to the Hub, and a temporary cache."""

    def model_info(self, repo_id, **kwargs):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Generated files in the published forms, and the options that read them, by kind and corpus."""
    root = tmp_path_factory.mktemp("sources")
    clip = write_pattern(root / "clip.mp4", size=(64, 48))
    for kind in ("features", "clips"):
        (root / kind / "meld").mkdir(parents=True)
    for folder in ("features/cherma", "clips/cherma"):
        (root / folder).mkdir()
        formats.mse_pickles(root / folder, "cherma", cherma.EMOTIONS, "zh", widths=(1024, 2048))
    formats.mse_pickles(root / "features/meld", "meld", meld.EMOTIONS, "en")
    formats.mmsa_pickle(root / "features/mosei")
    formats.mmsa_pickle(root / "features/simsv2", language="zh", widths=(25, 177), high=1.0, rates=None)
    write_meld_clips(root / "clips/meld", clip)
    formats.cmu_mosei(root / "clips/mosei")
    formats.clip_table(root / "clips/simsv2", "meta.csv", "zh")
    for name in ("mosei", "simsv2"):
        for number, file in enumerate(sorted((root / "clips" / name).rglob("*.mp4"))):
            if number != 1:  # which stays empty: a clip that cannot be read
                shutil.copy(clip, file)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_builds_steps_saves_and_evaluates(recipe, sources, offline, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    corpus, _, kind = recipe.stem.split("_")
    size, mixed = SIZES[RECIPES.index(recipe) % len(SIZES)], corpus == "all"
    folder = sources / kind if mixed else sources / kind / corpus
    arguments = [str(recipe), "--corpus_dir", str(folder), "--shrink", "16", "--language_model", size]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--per_device_train_batch_size", "4"]
    media = json.dumps({"media": str(sources / "clips/meld/clips")})
    if recipe.stem == "meld_qwen3_clips":
        arguments += ["--corpus_options", media]
    if mixed:
        corpora = load_recipe([str(recipe)]).data.corpora
        corpora["meld"]["options"] = json.loads(media)
        arguments += ["--corpora", json.dumps(corpora)]
    train_script.main(arguments)

    log = read_lines(tmp_path / "run/log.jsonl")
    assert any(np.isfinite(row.get("train_loss", np.nan)) for row in log)
    fields = json.loads((tmp_path / "run/model/recipe.json").read_text())
    assert fields["shrink"] == 16 and fields["language_model"] == f"{Path(size).name}-shrunk-16"
    real = published_config(size)
    small = json.loads((tmp_path / "run/model/config.json").read_text())["text_config"]
    assert (small["hidden_size"], small["head_dim"]) == (real.hidden_size // 16, real.head_dim)
    assert any(size in record.message and "cannot be reached" in record.message for record in caplog.records)
    for name in ("meld", "simsv2") if mixed else (corpus,):
        output = tmp_path / name
        source = folder / name if mixed else folder
        command = [str(tmp_path / "run/model"), "--corpus", name, "--corpus_dir", str(source), "--output", str(output)]
        eval_script.main(command)
        report = json.loads((output / "metrics.json").read_text())
        assert report["task"] == name and report["samples"] == len(load_corpus(name, source)["test"])
        if mixed:
            assert any(key.startswith(f"eval_{name}_{name}_") for row in log for key in row)
    if mixed:
        assert any("cherma: its audio features are not read" in record.message for record in caplog.records)


@pytest.mark.slow
def test_a_rehearsal_of_your_own_clips(offline, tmp_path, caplog):
    """With Whisper's configuration; the recipe hears ten seconds, and a clip has twelve."""
    lines = ["file,label,speaker,split"]
    for number, split in enumerate(("train", "train", "validation", "test")):
        soundfile.write(tmp_path / f"{number}.wav", tone(12.0, 200 + 100 * number), 16000)
        lines.append(f"{number}.wav,{('calm', 'tense')[number % 2]},s{number},{split}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    arguments = ["--corpus_dir", str(tmp_path / "clips.csv"), "--shrink", "16", "--output_dir", str(tmp_path / "run")]
    train_script.main([str(ROOT / "recipes/own_clips.yaml"), *arguments, "--modalities", "audio", "--max_steps", "2"])
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (config["audio_config"]["d_model"], config["text_config"]["hidden_size"]) == (32, 36)
    assert "audio_window: got 10 seconds, wanted up to 12: a twentieth or more" in caplog.text


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_have_the_published_parameters(name):
    auto = AutoModelForCausalLM if name in SIZES else AutoModel
    with torch.device("meta"):
        model = auto.from_config(published_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_shrinking_divides_layers_widths_and_heads():
    small = shrunk(published_config("Qwen/Qwen3-8B"), 4)
    assert (small.hidden_size, small.intermediate_size, small.num_hidden_layers) == (1024, 3072, 9)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (8, 2, 128)
    assert small.vocab_size == 151936 and len(small.layer_types) == 9
    clip = shrunk(published_config("openai/clip-vit-large-patch14"), 16)
    assert (clip.vision_config.hidden_size, clip.vision_config.image_size) == (64, 224)
    whisper = shrunk(published_config("openai/whisper-base"), 8)
    assert (whisper.d_model, whisper.encoder_layers, whisper.max_source_positions) == (64, 1, 1500)
    small = shrunk(published_config("HuggingFaceTB/SmolLM2-135M-Instruct"), 2)
    assert (small.num_attention_heads, small.num_key_value_heads) == (6, 2)  # each of two serves three


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (["--shrink", "3"], ValueError, "shrink: got 3, wanted one of 1, 2, 4, 8, 16"),
        (["--shrink", "2", "--language_model", "a/b"], ConnectionError, "language_model: got 'a/b'.* wanted .*Qwen3"),
        (["--language_model", "Qwen/Qwen3-8B"], ConnectionError, "'Qwen/Qwen3-8B' is not a local folder"),
    ],
)
def test_what_cannot_be_shrunk_or_had_is_an_error(fields, error, message, offline, tmp_path):
    arguments = [str(ROOT / "recipes/tiny.yaml"), "--language_model", "Qwen/Qwen3-0.6B", "--output_dir", str(tmp_path)]
    with pytest.raises(error, match=message):
        train_script.main([*arguments, *fields])


# --- what a field may be ---------------------------------------------------------------------------------------------


def written(folder: Path, **fields) -> str:
    """Write the tiny recipe with changed fields; values of `fusion` are merged with the tiny recipe's."""
    recipe = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | fields))
    return str(folder / "recipe.yaml")


def test_nothing_and_empty_lists_stay_what_they_are(tmp_path):
    recipe = load_recipe([written(tmp_path, corpus_dir=None, fusion={"clip_statistics": []}, modality_dropout={})])
    assert recipe.data.corpus_dir is None and recipe.fusion["clip_statistics"] == []
    assert recipe.data.modality_dropout == {} and recipe.data.parts[0].source is None
    assert load_recipe([written(tmp_path, learning_rate="1e-4")]).training.learning_rate == 1e-4
    assert load_recipe([written(tmp_path), "--clip_statistics"]).fusion["clip_statistics"] == []


def test_corpus_options_of_the_command_line_add_to_those_of_the_recipe(tmp_path):
    recipe = written(tmp_path, corpus="table", corpus_options={"columns": {"label": "emotion"}, "seed": 1})
    given = ["--corpus_options", '{"drop_wrong_rows": true, "seed": 2}']
    options = {"columns": {"label": "emotion"}, "drop_wrong_rows": True, "seed": 2}
    assert load_recipe([recipe, *given]).data.corpus_options == options
    # Another corpus has other options.
    assert load_recipe([recipe, "--corpus", "generated", "--corpus_options", "{}"]).data.corpus_options == {}


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ("text", "got text, of which mvsa / train has none, wanted them without text"),
        ("vision", "got vision, wanted them without it. mvsa / train: vision of its clips is not read: the recipe "),
        ("audio", "got audio, wanted them without it. mvsa / train: it has no audio"),
    ],
)
def test_a_named_modality_that_no_row_has_is_refused(modality, message, tmp_path):
    """mvsa's published form has files of pictures, its recipe no tower for them."""
    rows = build_split([{"id": "1", "video": "1.jpg", "text": "", "emotion": "positive"}])
    corpora = [DatasetDict({"train": rows, "validation": rows})]
    build_tiny_language_model(tmp_path / "llm")
    path = written(tmp_path, corpus="mvsa", tasks=["mvsa"], corpus_dir="mvsa", modalities=[modality])
    recipe = load_recipe([path])
    processor = train_script.build_processor(recipe, str(tmp_path / "llm"), {})
    with pytest.raises(ValueError, match=f"modalities: {re.escape(message)}"):
        check_corpora(recipe, corpora, processor)


def test_settings_name_the_weights_of_local_folders(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "tower").mkdir(parents=True)
        (tmp_path / name / "tower" / "model.safetensors").write_bytes(name.encode())
    found = [
        load_recipe([written(tmp_path, audio_tower=str(tmp_path / name / "tower"))]).settings()["audio_tower"]
        for name in ("one", "two", "one")
    ]
    assert found[0] == found[2] != found[1] and found[0].startswith("tower, weights ")
    monkeypatch.chdir(tmp_path)
    assert load_recipe([written(tmp_path)]).settings()["audio_tower"] == ""


def test_every_field_of_the_fusion_can_be_set(tmp_path):
    fusion = {"fusion_num_attention_heads": 2, "semantic_num_stretches": 2, "global_num_components": 3}
    fusion |= {"global_num_layers": 1, "gating": "mean", "fusion_hidden_size": 8, "num_pseudo_tokens": 2}
    recipe = load_recipe([written(tmp_path, fusion=fusion), "--global_num_layers", "3", "--experts", "local"])
    assert recipe.fusion.items() >= (fusion | {"global_num_layers": 3, "experts": ["local"]}).items()
    towers = train_script.build_towers(recipe)
    build_tiny_language_model(tmp_path / "llm")
    processor = train_script.build_processor(recipe, str(tmp_path / "llm"), towers)
    model = train_script.build_model(
        recipe, str(tmp_path / "llm"), processor, towers, load_corpus("generated")["train"]
    )
    assert all(getattr(model.config, name) == value for name, value in recipe.fusion.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gating": "flat"}, "gating outside of `fusion`"),
        ({"fusion": {"gating": "hierarchic"}}, "gating: got 'hierarchic', wanted hierarchical or flat or mean"),
        ({"fusion": {"gates": "flat"}}, r"unknown \['fusion.gates'\]"),
        ({"fusion": ["flat"]}, r"fusion: got \['flat'\], wanted a mapping"),
        ({"fusion": {"num_pseudo_tokens": "many"}}, "num_pseudo_tokens: got 'many', wanted"),
        ({"fusion": {"experts": ["loud"]}}, r"experts: got \['loud'\], wanted a non-empty subset"),
        ({"corpora": None}, "corpora: got None, wanted dict"),
        ({"num_frames": 0}, "num_frames: got 0, wanted at least 1"),
        ({"lora_r": "high"}, "lora_r: got 'high', wanted int"),
        ({"fusion_batch_size": -1}, "fusion_batch_size: got -1, wanted at least 1"),
        ({"train_audio_tower": "perhaps"}, "train_audio_tower: got 'perhaps', wanted bool"),
        ({"modalities": []}, r"modalities: got \[\], wanted some of text, audio, vision"),
        ({"modality_dropout": {"smell": 0.5}}, "modality_dropout: got {'smell': 0.5}, wanted text, audio or vision"),
        ({"modality_dropout": {"text": 1.0}}, "modality_dropout: got .* a rate in"),
        ({"learning_rate": "fast"}, "learning_rate: got 'fast', wanted"),
        ({"num_epochs": 3}, r"unknown \['num_epochs'\]"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0, wanted at least 1"),
        ({"resume_from_checkpoint": "last"}, "resume_from_checkpoint: got last, wanted nothing"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "persistent_workers: got True, wanted fa",
        ),
        ({"push_to_hub": True}, "push_to_hub: got True, wanted false; `python publish.py RUN"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: got True, wanted false"),
        ({"fsdp": "full_shard"}, "fsdp: got True, wanted nothing; `accelerate launch --config_file"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches: got False, wanted true"),
        ({"fusion_label_smoothing": 1.0}, r"fusion_label_smoothing: got 1.0, wanted a share in \[0, 1\)"),
        ({"corpora": {"meld": None}, "corpus": "", "tasks": []}, "corpora: meld: got None, wanted `tasks`"),
        (
            {"train_audio_tower": True, "fusion": {"clip_statistics": ["audio"]}},
            "clip_statistics: got audio with train_audio_tower, wanted features or a frozen tower",
        ),
        (
            {"audio_tower": {"model_type": "whisper"}, "tower_epochs": 2, "fusion": {"clip_statistics": ["audio"]}},
            "clip_statistics: got audio with tower_epochs, wanted features or a frozen tower",
        ),
        ({"fusion_without_prior": True}, "fusion_without_prior: got true without fusion_epochs, wanted both"),
        (
            {"fusion_without_prior": True, "fusion_epochs": 1, "balance_classes": True},
            "fusion_without_prior: got true with balance_classes, wanted one of them",
        ),
        ({"save_only_model": True}, "save_only_model: got True, wanted false: an interrupted run could not go on"),
        ({"train_vision_tower": True, "fusion_epochs": 2}, "fusion_epochs: got 2 with train_vision_tower, wanted 0"),
        (
            {"train_vision_tower": True, "fusion_epochs": 2, "tower_epochs": 1},
            "fusion_epochs: got 2 with train_vision_tower, wanted 0",
        ),
        ({"train_sampling_strategy": "group_by_lenght"}, "got 'group_by_lenght', wanted one of random, sequential"),
        ({"train_sampling_strategy": "batch_rebalance"}, "got batch_rebalance, wanted random"),
        ({"report_to": "tensorbord"}, "report_to: got 'tensorbord', wanted none or some of .*tensorboard"),
        (
            {"report_to": ["trackio", "wandb"]},
            "report_to: got 'wandb', wanted its package beside it: pip install wandb",
        ),
        ({"optim": "adamw_bnb_8bit"}, "optim: got adamw_bnb_8bit: .*bitsandbytes"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, wanted 0; fusion_label_smoothing"),
        ({"bf16": True, "fp16": True}, "recipe.yaml: At most one of fp16 and bf16"),
        ({"corpus": "moral"}, "corpus: got 'moral', wanted one of avatars, "),
        ({"tasks": [{"name": "stress", "label": ["a", "b"]}]}, "got the unknown field label, wanted some of name"),
        (
            {"tasks": [{"name": name, "low": 1, "high": 5, "step": 1} for name in ("valence", "arousal")]},
            "tasks: got valence and arousal, which learn from the same column, `score`",
        ),
    ],
)
def test_a_value_that_a_field_may_not_have_is_named(tmp_path, fields, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=message):
        load_recipe([written(tmp_path, **fields)])


def test_trainer_keeps_the_best_checkpoint_and_the_last(tmp_path):
    fields = {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    training = load_recipe([written(tmp_path, **fields, metric_for_best_model="mae", expert_gain=None)]).training
    assert training.greater_is_better is False and training.save_total_limit == 2
    assert load_recipe([written(tmp_path, **fields, metric_for_best_model="accuracy")]).training.greater_is_better


def test_help_names_the_fields_and_their_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        load_recipe(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for words in (
        "--fusion_epochs",
        "(default: 'hierarchical')",
        "rank of LoRA",
        "--learning_rate",
        "--global_num_layers",
    ):
        assert words in said


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_draws_by_weight_and_every_row_before_any_comes_again():
    sampler, seen = MixtureSampler([100, 10, 30], [2, 1, 1], seed=7), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        counts = [sum(first <= row < last for row in seen[-1]) for first, last in ((0, 100), (100, 110), (110, 140))]
        assert counts == [70, 35, 35] and len(seen[-1]) == len(sampler) == 140
    assert set(seen[0]) | set(seen[1]) >= set(range(100)) and seen[0] != seen[1]
    assert max(np.bincount([row for row in seen[0] if 100 <= row < 110])[100:]) == 4  # 35 of 10 rows: 3 or 4 times
    again = MixtureSampler([100, 10, 30], [2, 1, 1], seed=7)
    again.set_epoch(2)
    assert list(again) == seen[2]
    lengths = [row % 9 for row in range(140)]
    grouped = MixtureSampler([100, 10, 30], [2, 1, 1], seed=7, lengths=lengths, batch_size=4)
    assert sorted(grouped) == sorted(seen[0])


def test_trainer_draws_another_part_in_every_epoch(tmp_path):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.rows = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, row):
            self.rows += row.tolist()
            return {"loss": self.weight.sum()}

    module, rows = Recorder(), [{"row": number} for number in range(40)]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
    )
    MixtureTrainer(module, arguments, train_dataset=rows, mixture=([30, 10], [1, 1])).train()
    first, second = module.rows[:40], module.rows[40:]
    assert sum(row < 30 for row in first) == sum(row < 30 for row in second) == 20
    assert set(first) | set(second) == set(range(40)) and set(first) != set(second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--corpora", '{"meld": {"tasks": ["meld"]}}'], "corpora: meld: got .* wanted `tasks`, `weight`"),
        (["--corpora", '{"meld": {"tasks": ["meld"], "weight": 0}}'], "meld: weight: got 0, wanted a positive"),
        (["--corpus", "meld"], "wanted none of corpus, tasks"),
        (["--tower_epochs", "1"], "tower_epochs: got 1, wanted 0 in a mixture"),
    ],
)
def test_a_wrong_mixture_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        load_recipe([str(ROOT / "recipes/all_qwen3_clips.yaml"), *fields])


def test_labels_are_checked_by_each_corpus_own_tasks(tmp_path):
    mixture = json.dumps({"generated": {"tasks": ["meld"], "weight": 1}})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "recipes/tiny.yaml").read_text().replace("corpus: generated\ntasks: [mosi]\n", ""))
    with pytest.raises(ValueError, match="generated / train: label: got 'positive'.*wanted one of task 'meld'"):
        train_script.main([str(recipe), "--corpora", mixture, "--output_dir", str(tmp_path / "run")])


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [range(240), range(3, 200, 7), range(1)])
def test_streamed_statistics_are_those_of_all_frames_at_once(rows):
    rows = load_corpus("generated")["train"].select(rows)
    for column in ("audio_features", "vision_features"):
        clips = [np.asarray(clip, dtype=np.float64) for clip in rows[column] if clip is not None]
        found = feature_statistics(rows, column)
        if not clips:
            assert found is None
            continue
        mean, std = np.concatenate(clips).mean(0), np.concatenate(clips).std(0)
        assert np.array_equal(found[0].numpy(), mean) and np.array_equal(found[1].numpy(), std)


def test_components_are_uncorrelated_and_vary_most():
    rows = load_corpus("generated")["train"].select(range(60))
    norm = FeatureNorm(len(rows[0]["audio_features"][0]), 4)
    mean, std = feature_statistics(rows, "audio_features")
    norm.mean.copy_(mean), norm.std.copy_(std)
    norm.basis.copy_(feature_components(rows, "audio_features", norm, 4))
    frames = torch.cat([torch.as_tensor(clip) for clip in rows["audio_features"] if clip is not None])
    torch.testing.assert_close(norm(frames).T.cov(correction=0), torch.eye(4), rtol=0, atol=1e-4)
    standard = ((frames - norm.mean) / norm.std).clamp(-5, 5)
    variances = torch.linalg.eigvalsh(standard.T.cov(correction=0)).flip(0)[:4]
    torch.testing.assert_close(norm.basis.norm(dim=1) ** -2, variances, rtol=1e-3, atol=0)
    rows = build_split({"id": str(place), "audio_features": np.full((2, 3), place)} for place in range(3))
    norm = FeatureNorm(3, 2)
    with pytest.raises(ValueError, match="audio_features: got 2 components, wanted at most 1: no more features vary"):
        feature_components(rows, "audio_features", norm, 2)


def test_features_of_two_widths_are_refused():
    clips = [np.ones((2, 3)), np.ones((2, 4))]
    rows = build_split({"id": str(place), "audio_features": clip} for place, clip in enumerate(clips))
    with pytest.raises(ValueError, match="audio_features: got clips of 3 and of 4 features, wanted one width"):
        feature_statistics(rows, "audio_features")
