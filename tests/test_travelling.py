"""A checkpoint is self-contained: `AutoModel` and `AutoProcessor` load it in a new process in any folder."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from models import LORA_TARGETS, hubert
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

from egmf.configuration_egmf import EGMFConfig
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor


# Reads every folder below its working directory, and leaves what it finds there in found.pt.
READER = """
import sys, pathlib, torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
for folder in sorted(path for path in pathlib.Path("checkpoints").iterdir() if path.is_dir()):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    given = torch.load(folder / "given.pt")
    batch = processor(**given["call"])
    extra = given["extra"]
    with torch.no_grad():
        outputs = model(**batch, **extra)
    scores = model.score_labels(processor.candidates("mine"), **batch, **extra)
    generated = model.generate(
        **batch,
        **extra,
        logits_processor=processor.logits_processor("mine", batch),
        max_new_tokens=processor.max_answer_tokens("mine"),
        do_sample=False,
    )
    answers = processor.decode_answers(generated[:, batch["input_ids"].shape[1]:], "mine")
    found = {
        "batch": dict(batch),
        "logits": outputs.logits,
        "gates": outputs.gate_weights,
        "log_probs": scores.log_probs,
        "answers": [answer.value for answer in answers],
        "buffers": dict(model.named_buffers()),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "module": type(model).__module__,
    }
    torch.save(found, folder / "found.pt")
    processor.save_pretrained(pathlib.Path("saved again") / folder.name)
print([path for path in sys.path if path.rstrip("/").endswith("REPO")])
"""
MINE = {"kind": "classification", "labels": ["dull", "bright", "bright red"]}


def egmf_processor(folder: str) -> EGMFProcessor:
    return EGMFProcessor(
        AutoTokenizer.from_pretrained(folder), num_pseudo_tokens=3, tasks={"mine": MINE}, max_context_tokens=9
    )


@pytest.fixture(scope="module")
def travelled(tmp_path_factory, llm_folder, assemble, samples):
    """`{name: (result in this process, result in a new process)}` for each checkpoint."""
    root = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    here = {}
    call = {
        "text": [sample["text"] for sample in samples],
        "context": [["a context that is too long", "short"]] * 4,
        "audio_features": [sample.get("audio_features") for sample in samples],
        "audio_times": [sample.get("audio_times") for sample in samples],
        "task": "mine",
    }
    for name, case in {
        "llama": ("llama", True, True),
        "gpt2": ("gpt2", False, False),
        "lora": ("qwen3", True, False),
        "tower": ("llama", False, True),
    }.items():
        folder = llm_folder(*case)
        processor = egmf_processor(folder)
        kwargs = {"pseudo_token_id": processor.pseudo_token_id}
        extra, given = {}, dict(call)
        if name == "tower":
            torch.manual_seed(2)
            kwargs |= {"audio_tower": hubert(), "audio_input_rate": 16000}
            given = {key: value for key, value in call.items() if not key.startswith("audio")}
            extra = {"input_values": torch.randn(4, 300), "audio_mask": torch.ones(4, 300, dtype=torch.long)}
        model = assemble(AutoModelForCausalLM.from_pretrained(folder), **kwargs)
        with torch.no_grad():  # nothing as initialised: what is not loaded shows
            for parameter in model.model.fusion.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        batch = processor(**given)
        if name == "lora":
            saved = ["fusion", "readout"]
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LORA_TARGETS, modules_to_save=saved)
            adapted = get_peft_model(model, lora).eval()
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.02 * torch.randn_like(parameter))
                unmerged = adapted(**batch).logits
            model = adapted.merge_and_unload().eval()
            here["unmerged"] = unmerged
        with torch.no_grad():
            outputs = model(**batch, **extra)
        here[name] = {
            "batch": dict(batch),
            "logits": outputs.logits,
            "gates": outputs.gate_weights,
            "log_probs": model.score_labels(processor.candidates("mine"), **batch, **extra).log_probs,
            "buffers": dict(model.named_buffers()),
            "tied": case[1],
        }
        checkpoint = root / "checkpoints" / name
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        torch.save({"call": given, "extra": extra}, checkpoint / "given.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    repo = os.path.basename(os.getcwd())
    script = READER.replace("REPO", f"/{repo}")
    # -I: neither the working directory nor the user's own packages are on the path
    process = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().splitlines()[-1] == "[]"
    there = {
        name: torch.load(root / "checkpoints" / name / "found.pt", weights_only=False)
        for name in ("llama", "gpt2", "lora", "tower")
    }
    return root, here, there


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "tower"])
def test_fresh_process_gives_the_same(travelled, name):
    _, here, there = travelled
    here, there = here[name], there[name]
    assert there["module"].startswith("transformers_modules.")
    assert there["tied"] == here["tied"]
    assert here["batch"].keys() == there["batch"].keys()
    for key, value in here["batch"].items():
        torch.testing.assert_close(there["batch"][key], value, rtol=0, atol=0, equal_nan=True)
    tolerance = 1e-5 if name == "tower" else 0.0
    stands = here["batch"]["attention_mask"].bool()
    assert (there["logits"] - here["logits"])[stands].abs().max() <= tolerance
    assert (there["log_probs"] - here["log_probs"]).abs().max() <= max(tolerance, 1e-6)
    for level, weights in here["gates"].items():
        assert (there["gates"][level] - weights).abs().max() <= tolerance
    assert all(answer in MINE["labels"] for answer in there["answers"]) and len(there["answers"]) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "tower"])
def test_buffers_that_are_not_saved_are_right(travelled, name):
    """The frequencies of the place embedding and of the LLM's rotary embeddings are recomputed, not loaded."""
    _, here, there = travelled
    assert any(key.endswith("place.frequencies") for key in there[name]["buffers"])
    assert here[name]["buffers"].keys() == there[name]["buffers"].keys()
    for key, value in here[name]["buffers"].items():
        torch.testing.assert_close(there[name]["buffers"][key], value, rtol=0, atol=0)


def test_merged_equals_unmerged(travelled):
    _, here, there = travelled
    stands = here["lora"]["batch"]["attention_mask"].bool()
    for merged in (here, there):
        # Merging rounds each weight once more in float32, so what it moves grows with the logits (here up to 8).
        torch.testing.assert_close(merged["lora"]["logits"][stands], here["unmerged"][stands], rtol=1e-5, atol=2e-5)


def test_checkpoint_holds_its_own_code(travelled):
    root, _, _ = travelled
    folder = root / "checkpoints" / "llama"
    files = {path.name for path in folder.iterdir()}
    assert {
        f"{name}_egmf.py"
        for name in "configuration fusion media media_features modeling pipeline processing readout scoring tasks "
        "towers".split()
    } <= files
    assert {"config.json", "generation_config.json", "processor_config.json", "model.safetensors"} <= files


def test_a_new_process_saves_the_processor_as_it_was(travelled):
    root, _, _ = travelled
    for folder in (root / "saved again").iterdir():
        for file in ("processor_config.json", "tokenizer.json", "processing_egmf.py"):
            assert (folder / file).read_bytes() == (root / "checkpoints" / folder.name / file).read_bytes(), file


def test_bf16_checkpoint_keeps_its_fusion_in_float32(tmp_path, llm_folder, assemble):
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder(), dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = EGMFForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    weights = loaded.model.fusion.state_dict()
    for name, value in model.model.fusion.state_dict().items():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], value)


def test_a_clone_loads_a_checkpoint_without_asking_to_run_code(travelled, monkeypatch, caplog):
    """The clone's classes are used, so no code of the checkpoint is loaded or run."""
    root, _, there = travelled
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = {name for name in sys.modules if name.startswith("transformers_modules.")}
    for name, found in there.items():
        folder = root / "checkpoints" / name
        processor, call = EGMFProcessor.from_pretrained(folder), torch.load(folder / "given.pt")["call"]
        assert torch.equal(processor(**call)["input_ids"], found["batch"]["input_ids"])
        EGMFForConditionalGeneration.from_pretrained(folder)
        assert EGMFConfig.from_pretrained(folder).pseudo_token_id == processor.pseudo_token_id
    assert {name for name in sys.modules if name.startswith("transformers_modules.")} == loaded
    assert "instantiate a model of type" not in caplog.text


def test_a_checkpoint_demands_no_decoder(travelled):
    """transformers refuses to load code whose imports are not installed, unless they are inside a `try`."""
    root, _, _ = travelled
    wanted = {name for path in (root / "checkpoints" / "llama").glob("*.py") for name in get_imports(path)}
    assert wanted <= {"huggingface_hub", "numpy", "torch", "transformers"} | set(sys.stdlib_module_names)


def test_a_broken_checkpoint_says_what_is_broken_beside_a_clone(travelled, tmp_path):
    """A file of the clone on the import path does not replace the checkpoint's file."""
    root, _, _ = travelled
    folder = shutil.copytree(root / "checkpoints" / "llama", tmp_path / "broken")
    towers = folder / "towers_egmf.py"
    towers.write_text(towers.read_text(encoding="utf-8").replace("import MODEL_MAPPING,", "import NO_SUCH_MAPPING,"))
    with pytest.raises(ImportError, match="cannot import name 'NO_SUCH_MAPPING' from 'transformers'"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
