"""A model whose parts are on several devices, as `from_pretrained(device_map="auto")` puts them on several GPUs.

No GPU is needed: tensors of the CPU carry the name of a device, and an operation on tensors of two devices fails, as
it would on GPUs. Modules that the device map names move their inputs to themselves, as accelerate's hooks do.
"""

import copy

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import send_to_device
from models import clip_vision, whisper
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from egmf.modeling_egmf import EGMFForConditionalGeneration


CPU = torch.device("cpu")
FIRST, SECOND, THIRD, FOURTH = (torch.device("cuda", number) for number in range(4))
INDEXING = ("__getitem__", "__setitem__", "index_put")  # their indices may be on the CPU


class Placed(torch.Tensor):
    """A tensor with the name of a device."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return run(function, args, dict(kwargs or {}))


class Factories(TorchFunctionMode):
    """Lets functions make or move tensors of the CPU to devices by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return run(function, args, dict(kwargs or {}))


def place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    plain = tensor.as_subclass(torch.Tensor)
    if device == CPU:
        return plain
    placed = plain.as_subclass(Placed)
    placed.place = device
    return placed


def device_of(value) -> torch.device:
    return getattr(value, "place", CPU)


def as_device(value) -> torch.device | None:
    try:
        return torch.device(value) if isinstance(value, str | torch.device) else None
    except RuntimeError:  # another string
        return None


def run(function, args, kwargs):
    """Runs a function of torch on tensors with names of devices."""
    if function == torch.Tensor.device.__get__:
        return device_of(args[0])
    name = getattr(function, "__name__", "")
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    named = next((device for device in map(as_device, flat) if device is not None), None)
    if name == "to" and named is None and len(tensors) > 1:
        named = device_of(tensors[1])
    if name == "cpu":
        named = CPU
    used = {device_of(tensor) for tensor in tensors if tensor.ndim or device_of(tensor) != CPU}
    if name in INDEXING:
        used -= {CPU}
    if len(used) > 1 and name not in ("to", "copy_"):
        raise RuntimeError(f"{name}: got tensors on {sorted(map(str, used))}, wanted one device")
    if name == "copy_" or named is None:
        named = device_of(tensors[0]) if name == "copy_" else next(iter(used), CPU)
    args, kwargs = tree_map(lambda value: value if as_device(value) is None else CPU, (args, kwargs))
    result = function(*args, **kwargs)
    return tree_map(lambda value: place(value, named) if isinstance(value, torch.Tensor) else value, result)


def split(model: EGMFForConditionalGeneration, device_map: dict[str, torch.device]) -> EGMFForConditionalGeneration:
    """A copy of a model with its parts on devices; "" is the device of all parts that the map does not name."""
    model = copy.deepcopy(model)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        part = max((part for part in device_map if f"{name}.".startswith(f"{part}.") or not part), key=len)
        for values in (module._parameters, module._buffers):
            for key, value in values.items():
                values[key] = None if value is None else place(value.detach(), device_map[part])
        if part == name:
            module.register_forward_pre_hook(
                mover(device_map[part], model._skip_keys_device_placement), with_kwargs=True
            )
    if tied:
        model.lm_head._parameters["weight"] = model.get_input_embeddings()._parameters["weight"]
    return model


def mover(device: torch.device, skipped):
    def move(module, args, kwargs):
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=list(skipped))

    return move


LAYERS = "model.language_model.layers"
PARTS = {"": FIRST, f"{LAYERS}.1": SECOND, "model.language_model.norm": SECOND, "model.readout": THIRD}


@pytest.fixture(scope="module", params=["features", "untied head", "towers"])
def case(request, assemble, llm_folder, processor, samples, make_batch):
    """A model, a map of its parts, and a function that makes its batches."""
    if request.param != "towers":
        tied = request.param == "features"
        model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder(tied=tied)))
        parts = PARTS | {"model.fusion": FOURTH} | ({} if tied else {"lm_head": SECOND})
        return model, parts, lambda **options: dict(make_batch(samples, "meld", **options))
    torch.manual_seed(1)
    towers = {"audio_tower": whisper(), "vision_tower": clip_vision()}
    pooling = {"audio": 4, "vision": 2}
    model = assemble(**towers, audio_input_rate=100, frame_pooling=pooling, clip_statistics=["audio", "vision"])
    media = {"input_features": torch.randn(4, 8, 100), "audio_mask": torch.ones(4, 100, dtype=torch.long)}
    media |= {"pixel_values": torch.randn(4, 3, 3, 16, 16), "vision_mask": torch.ones(4, 3, dtype=torch.long)}

    def batches(**options):
        return dict(processor(text=["it is good", "no", "well", ""], task="meld", **options)) | media

    return model, PARTS | {"model.fusion": FIRST, "model.audio_tower": SECOND, "model.vision_tower": FOURTH}, batches


def test_a_model_on_several_devices_answers_as_on_one(case, processor):
    model, parts, batches = case
    prompts, answers = batches(), batches(answer=["joy", "anger", "joy", "fear"])
    candidates = processor.candidates("meld")
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = model(**prompts).logits, model(**answers).loss, model.score_labels(candidates, **prompts).log_probs
    text = model.generate(**prompts, **options)
    divided = split(model, parts)
    with Factories():
        prompts, answers = (
            {name: place(value, FIRST) for name, value in batch.items()} for batch in (prompts, answers)
        )
        with torch.no_grad():
            found = divided(**prompts).logits, divided(**answers).loss
        found = (*found, divided.score_labels(candidates, **prompts).log_probs)
        generated = divided.generate(**prompts, **options)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(place(other, CPU), one, atol=1e-4, rtol=1e-4)
    assert torch.equal(place(generated, CPU), text)


def test_a_device_map_keeps_fusion_readout_and_towers_whole(case):
    """Whatever the devices' sizes are. A part is whole if the map names it and nothing inside it."""
    model, _, _ = case
    names = ("model.fusion", "model.readout", "model.audio_tower", "model.vision_tower")
    whole = [name for name in names if getattr(model.model, name.removeprefix("model."), None) is not None]
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}  # as FSDP expects
    sizes = [sum(value.nbytes for value in model.get_submodule(name).parameters()) for name in whole]
    for share in (0.4, 0.7, 1.0):
        room = {0: int(share * model.get_memory_footprint()), 1: max(sizes) + 1, "cpu": 10**9}
        found = infer_auto_device_map(model, room, no_split_module_classes=list(model._no_split_modules))
        for name in whole:
            assert not [part for part in found if part.startswith(f"{name}.")], found


OFFLOADED = {
    "layers": {"model.language_model.embed_tokens": "cpu", f"{LAYERS}.0": "disk", f"{LAYERS}.1": "disk"}
    | {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu", "lm_head": "cpu"},
    "the rest": {"model.language_model": "cpu", "model.fusion": "disk", "model.readout": "disk", "lm_head": "disk"},
}


@pytest.mark.parametrize("parts", OFFLOADED)
def test_offloaded_parts_give_the_same_answers(assemble, llm_folder, processor, samples, make_batch, tmp_path, parts):
    """Where memory is short, `device_map="auto"` leaves the last parts of a model on the CPU or the disk."""
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder(tied=parts == "layers")))
    model.save_pretrained(tmp_path / "model")
    places = {"model.fusion": "cpu", "model.readout": "cpu"} | OFFLOADED[parts]
    loaded = EGMFForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    batch, candidates = make_batch(samples), processor.candidates("meld")
    wanted, found = (one.score_labels(candidates, **batch).log_probs for one in (model, loaded))
    torch.testing.assert_close(found, wanted)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(**batch, **options), model.generate(**batch, **options))


def test_quantisation_leaves_fusion_and_readout_alone(egmf):
    """As bitsandbytes and the other quantizers of transformers choose what they convert."""
    skipped = HfQuantizer.get_modules_to_not_convert(egmf, None, egmf._keep_in_fp32_modules)
    linear = [name for name, module in egmf.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = [name for name in linear if should_convert_module(name, skipped)]
    assert converted and all(name.startswith("model.language_model.") for name in converted)
