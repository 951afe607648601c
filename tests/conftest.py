"""Fixtures that modules share: tiny language models on disk, models built on them, batches, pipelines and clips."""

import copy
from pathlib import Path

import av
import pytest
import soundfile
import torch
from clips import AVATARS, CLIPS, RATE, SOUNDS, sine, write_pattern
from models import CALM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from corpora import load_corpus
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.training.language_models import build_tiny_language_model


torch.set_num_threads(1)

SMALL_FUSION = {
    "fusion_hidden_size": 16,
    "fusion_intermediate_size": 32,
    "fusion_num_attention_heads": 2,
    "local_kernel_sizes": [3, 5],
    "num_pseudo_tokens": 3,
}
FEATURES = {"audio_feature_size": 5, "vision_feature_size": 7}


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """`llm_folder(architecture, tied, spare)`: the folder of a tiny language model, written once per test session."""
    folders = {}

    def folder_of(architecture: str = "llama", tied: bool = True, spare: bool = True) -> str:
        key = (architecture, tied, spare)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("llm")
            build_tiny_language_model(folders[key], architecture, tie_word_embeddings=tied, spare_token=spare)
        return str(folders[key])

    return folder_of


@pytest.fixture(scope="session")
def processor(llm_folder):
    """The processor of the tiny models that have a spare token."""
    return EGMFProcessor(
        AutoTokenizer.from_pretrained(llm_folder()),
        num_pseudo_tokens=SMALL_FUSION["num_pseudo_tokens"],
        tasks={"calm": CALM},
    )


@pytest.fixture(scope="session")
def assemble(llm_folder, processor):
    """`assemble(language_model, **config)`: a small EGMF in eval mode; features are 5 wide (audio) and 7 (vision)."""

    def assembled(language_model=None, seed: int = 0, **config) -> EGMFForConditionalGeneration:
        if language_model is None:
            language_model = AutoModelForCausalLM.from_pretrained(llm_folder())
        features = {
            name: size
            for name, size in FEATURES.items()
            if f"{name.split('_')[0]}_tower" not in config and name not in config
        }
        torch.manual_seed(seed)
        model = EGMFForConditionalGeneration.from_language_model(
            language_model, **{"pseudo_token_id": processor.pseudo_token_id, **SMALL_FUSION, **features, **config}
        )
        # An untrained readout adds nothing. Let it add something, as in a trained model.
        torch.nn.init.normal_(model.model.readout.out[-1].weight, std=0.33)
        torch.nn.init.normal_(model.model.readout.spelling, std=0.1)
        return model.eval()

    return assembled


@pytest.fixture(scope="session")
def egmf(assemble):
    """A small EGMF on the tiny Llama. It is shared, so use `fresh_egmf` in tests that modify the model."""
    return assemble()


@pytest.fixture
def fresh_egmf(egmf):
    return copy.deepcopy(egmf)


@pytest.fixture(scope="session")
def samples():
    """Four utterances: all modalities, text and audio, text only, vision only."""
    generator = torch.Generator().manual_seed(7)

    def frames(length, width):
        return torch.randn(length, width, generator=generator)

    return [
        {
            "text": "I really did not expect that!",
            "speaker": "Ross",
            "context": [{"speaker": "Joey", "text": "Surprise!"}],
            "audio_features": frames(9, 5),
            "audio_times": torch.arange(9) * 0.3,
            "vision_features": frames(4, 7),
        },
        {"text": "no", "audio_features": frames(1, 5)},
        {"text": "well, well"},
        {"text": "", "vision_features": frames(6, 7), "vision_times": torch.arange(6) * 0.5},
    ]


@pytest.fixture(scope="session")
def make_batch(processor):
    """`make_batch(samples, task, **options)`: the processor's batch, with the modalities that occur in any sample."""

    def batched(samples: list[dict], task="meld", processor=processor, **options):
        names = [name for name in ("speaker", "context") if any(name in sample for sample in samples)]
        names += [
            f"{modality}_{part}"
            for modality in ("audio", "vision")
            for part in ("features", "times")
            if any(f"{modality}_features" in sample for sample in samples)
        ]
        columns = {name: [sample.get(name) for sample in samples] for name in names}
        return processor(text=[sample.get("text") for sample in samples], task=task, **columns, **options)

    return batched


@pytest.fixture(scope="session")
def row_of():
    """`row_of(batch, i)`: a batch of only sample `i`, without padding tokens and frames."""

    def cut(batch, index: int) -> dict[str, torch.Tensor]:
        row = {name: value[index : index + 1] for name, value in batch.items()}
        stands = row["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask", "utterance_mask", "labels"):
            if name in row:
                row[name] = row[name][:, stands]
        for modality in ("audio", "vision"):
            if f"{modality}_mask" not in row:
                continue
            heard = row[f"{modality}_mask"][0].bool()
            for part in ("features", "mask", "times"):
                name = f"{modality}_{part}"
                if heard.any():
                    row[name] = row[name][:, heard]
                else:
                    row.pop(name)
        return row

    return cut


@pytest.fixture(scope="module")
def recognize(place):
    """The pipeline of the model in the module's folder `place`."""
    return pipeline("affect-recognition", model=str(place / "model"), trust_remote_code=True)


@pytest.fixture(scope="session")
def intact(tmp_path_factory) -> dict[str, Path]:
    """All intact files of `clips.py` by name; those for which PyAV has no encoder are left out."""
    folder = tmp_path_factory.mktemp("intact")
    made = {}
    for name, options in CLIPS.items():
        wanted = {options.get("video", "libx264"), options.get("audio", "aac")} - {None}
        if wanted <= av.codecs_available:
            made[name] = write_pattern(folder / name, **options)
    for name in SOUNDS:
        soundfile.write(folder / name, sine(), RATE)
        made[name] = folder / name
    return made


@pytest.fixture(scope="session")
def avatars(tmp_path_factory) -> Path:
    """A small corpus of avatars."""
    folder = tmp_path_factory.mktemp("clips") / "avatars"
    load_corpus("avatars", folder, **AVATARS)
    return folder
