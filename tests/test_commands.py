"""A user's mistake ends a command with one line and status 2; a fault of the project keeps its traceback."""

import numpy as np
import pytest
from commands import run

from egmf.commands import is_mistake


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train", ["nope.yaml"], "No such file or directory: 'nope.yaml'"),
        (
            "train",
            ["recipes/tiny.yaml", "--lora_rank", "8"],
            r"unknown ['--lora_rank', '8'], wanted fields of a recipe",
        ),
        ("train", ["recipes/tiny.yaml", "--tasks", "moud"], "`task` got 'moud', wanted an AffectTask or one of"),
        ("train", ["recipes/tiny.yaml", "--temperature", "0"], "temperature: got 0.0, wanted a positive number"),
        ("train", ["recipes/mosi_smollm2.yaml", "--corpus_dir", "/nowhere"], "/nowhere: no such file, wanted MOSI"),
        (
            "train",
            ["recipes/own_clips.yaml", "--corpus_dir", "clips.csv"],
            "clips.csv: no such file or folder, wanted a",
        ),
        ("train", ["Makefile"], "Makefile: expected"),
        (
            "train",
            ["recipes/tiny.yaml", "--output_dir", "README.md"],
            "output_dir: got README.md, a file, wanted a folder",
        ),
        (
            "train",
            ["recipes/tiny.yaml", "--language_model", "docs"],
            "language_model: got docs, a folder without config",
        ),
        ("train", ["recipes/own_clips.yaml"], "corpus 'table': source is None, wanted the folder with its files"),
        ("eval", ["runs/none/model", "--corpus", "mosi", "--output", "x"], "model: got 'runs/none/model', wanted an"),
        ("eval", ["tests", "--corpus", "mosi", "--output", "x"], "model: got tests, a folder without config.json"),
        ("predict", ["runs/none/model", "README.md"], "model: got 'runs/none/model', wanted an existing folder"),
        ("publish", ["runs/none", "--repo", "a/b", "--dry_run"], "runs/none: got no model/config.json, wanted the"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, said):
    outcome = run(script, *arguments, check=False)
    assert outcome.status == 2 and "Traceback" not in outcome.said, outcome.said
    last = outcome.said.strip().splitlines()[-1]
    assert "error: " in last and said in last, outcome.said


@pytest.mark.parametrize("script", ["train", "eval", "predict", "publish"])
def test_help_ends_well(script):
    outcome = run(script, "--help")
    assert "usage: " in outcome.said and "Traceback" not in outcome.said


def test_help_lists_the_fields_of_recipes_with_their_defaults():
    said = " ".join(run("train", "--help").said.split())
    assert "--fusion_epochs" in said and "epochs of the fusion without the LLM; 0 for none (default: 0)" in said
    assert "--num_pseudo_tokens" in said and "--learning_rate" in said and "--architecture" not in said


def test_an_error_of_a_library_is_no_mistake():
    with pytest.raises(ValueError) as error:
        np.zeros(3).reshape(2)
    assert not is_mistake(error.value)  # raised by NumPy, called from a test
    with pytest.raises(ValueError) as error:
        raise ValueError("field: got 1, wanted 2")
    assert is_mistake(error.value)
    assert is_mistake(FileNotFoundError("clip.wav")) and not is_mistake(KeyError("loss"))
