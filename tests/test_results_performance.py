"""Performance tables: the arithmetic, the file in the repository, and that the benchmarks compare what they state."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import measuring, train_step
from experiments import performance


DATA = json.loads((performance.RESULTS / "performance.json").read_text(encoding="utf-8"))


def test_page_is_what_the_json_says():
    assert (performance.RESULTS / "performance.md").read_text(encoding="utf-8") == performance.render(DATA)


def test_all_layers_go_on_as_the_two_depths():
    base = {"plain": 3.0, "floor": 1.0, "egmf": 2.0}
    depths = [
        {"layers": layers, "seconds": {way: [0.0, value + layers, 99.0] for way, value in base.items()}}
        for layers in (2, 4)
    ]
    found = performance.with_all_layers(depths, performance.seconds_of)
    assert found == {"plain": 31.0, "floor": 29.0, "egmf": 30.0}
    assert performance.with_all_layers(depths[:1], performance.seconds_of) == {"plain": 5.0, "floor": 3.0, "egmf": 4.0}
    layer, rest = performance.by_layer(depths, performance.seconds_of)
    assert (layer["egmf"], rest) == (1.0, base)


def test_a_missed_goal_says_so():
    data = copy.deepcopy(DATA)
    figures = data["train_step"]["models"][measuring.SMOLLM2]["depths"][0]
    figures["seconds"]["egmf"] = [10 * value for value in figures["seconds"]["plain"]]
    assert "10.00 (10.00 to 10.00), missed" in performance.render(data)


def test_figures_of_a_gpu_replace_those_taken_by_hand():
    assert "not measured since" in performance.render(DATA)
    measured = {f"{name} on cuda": copy.deepcopy(DATA[name]) for name in ("train_step", "answer")}
    measured["train_step on cuda"]["machine"]["device"] = "NVIDIA H200"
    text = performance.render(DATA | measured)
    assert "`make gpu` on one NVIDIA H200" in text and "not measured since" not in text


def test_turns_rotate():
    said = []
    ways = {name: lambda name=name: said.append(name) or len(said) for name in "abc"}
    assert measuring.take_turns(ways, 3) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(said) == "abcbcacab"


def test_peak_memory_counts_what_is_held_at_once():
    def hold() -> None:
        for _ in range(3):
            first = torch.ones(1_000_000)
            second = first + 1
            del first, second

    assert measuring.peak_memory(hold, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_floor_is_the_llms_own_loss(llm_folder, samples, make_batch):
    """The loss is computed only from the logits of the answer's tokens."""
    llm = AutoModelForCausalLM.from_pretrained(llm_folder())
    llm.get_base_model = lambda: llm  # as PEFT names it
    batch = make_batch(samples, answer=["joy", "fear", "anger", "joy"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    rows = []
    llm.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(train_step.Floor(llm)(**inputs)["loss"], llm(**inputs).loss)
    assert rows[0] == (batch["labels"] != -100).sum()
