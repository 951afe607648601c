"""README and docs: the model card is valid, code runs, links and commands exist, and numbers were measured."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import eval as eval_script
import train as train_script
from corpora import load_corpus
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.recipe_reading import load_recipe
from egmf.training.language_models import build_tiny_language_model
from experiments.benchmarks import BENCHMARKS


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "results/README")] + sorted(ROOT.glob("docs/*.md"))


def code_blocks(language: str) -> list[str]:
    """All code blocks of a language, page by page."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """The arguments of every `python SCRIPT ...` command in the pages."""
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[2:] for line in words if line[:2] == ["python", script]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with an untrained model and clips at the paths that `make quickstart` uses."""
    folder = tmp_path_factory.mktemp("readme")
    build_tiny_language_model(folder / "llm")
    clips = {"train": 24, "validation": 24, "test": 24}
    corpus = load_corpus("avatars", folder / "runs/quickstart/clips", **clips)
    recipe = load_recipe([str(ROOT / "recipes/avatars_towers.yaml"), "--num_pseudo_tokens", "4"])
    towers = train_script.build_towers(recipe)
    processor = train_script.build_processor(recipe, str(folder / "llm"), towers)
    model = train_script.build_model(recipe, str(folder / "llm"), processor, towers, corpus["train"])
    model.save_pretrained(folder / "runs/quickstart/model")
    processor.save_pretrained(folder / "runs/quickstart/model")
    return folder


def test_code_runs_as_printed(workplace):
    blocks = [block for block in code_blocks("python") if "://" not in block]  # a server's tests run its client
    assert len(blocks[0].strip().split("\n")) <= 13  # ten lines and the imports
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(workplace / "modules")}
    outcome = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    first, answer, probabilities, scores = outcome.stdout.strip().split("\n")
    label, _, of_the_pipeline = first.partition(" ")
    assert {label, answer} <= {*BUILTIN_TASKS["avatars"].labels}
    for found in (of_the_pipeline, probabilities):
        assert sum(json.loads(found.replace("'", '"')).values()) == pytest.approx(1.0)
    assert scores.startswith("('+0.0', '+0.5',") and scores.endswith("'+10.0')")


def test_the_clip_of_the_snippet_says_what_is_printed(workplace):
    options = {"train": 24, "validation": 24, "test": 24}
    rows = load_corpus("avatars", workplace / "runs/quickstart/clips", **options)["test"]
    for snippet in [block for block in code_blocks("python") if "clips/test" in block]:
        name, text = re.search(r"clips/test/(\w+)\.mp4", snippet)[1], re.search(r'text="([^"]+)"', snippet)[1]
        assert [row["text"] for row in rows if row["id"] == name] == [text]
        assert f"{name}.mp4" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_card():
    card = ModelCard.load(ROOT / "README.md")
    data = card.data.to_dict()
    assert card.text.strip().startswith("# EGMF")
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "video-text-to-text"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "zh"]
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "recipes").glob("*smollm2.yaml")]
    assert {recipe["language_model"] for recipe in recipes} == {data["base_model"]}


def test_card_scores_are_the_measured_means():
    card = ModelCard.load(ROOT / "README.md")
    measured = []
    for name in BENCHMARKS:
        runs = json.loads((ROOT / f"results/{name}.json").read_text(encoding="utf-8"))["runs"]
        for answer in ("greedy", "distribution"):
            full = [run for run in runs if (run["variant"], run["answer"]) == ("full", answer)]
            measured += [100 * np.mean([run[m] for run in full]) for m in ("accuracy", "weighted_f1") if full]
    for part in json.loads((ROOT / "results/folds.json").read_text(encoding="utf-8")).values():
        figures = part["variants"]["full"]["answers"]["distribution"]
        measured += [100 * np.mean(figures[metric]) for metric in ("accuracy", "weighted_f1", "ua")]
    for result in card.data.eval_results or []:
        assert any(abs(result.metric_value - value) < 0.0051 for value in measured), result


def test_numbers_in_the_results_section_are_in_results():
    section = re.search(r"^## Results\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    tables = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.md"))
    number = re.compile(r"\d+(?:\.\d+)?")
    assert set(number.findall(section)) <= set(number.findall(tables))


# Written by the commands; a name to be chosen.
MADE = {"metrics.json", "settings.json", "space.json", "unreadable_rows.json", "NAME.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    prose = re.sub(r"\]\([^)]*\)", "]", text)
    files = re.findall(r"(?<![\w/*])(?:[\w.]+/)*\w+\.(?:py|yaml|md|json)\b", prose)
    places = (ROOT, page.parent, ROOT / "egmf")
    missing = {name for name in files if not any((place / name).exists() for place in places)} - MADE
    assert not {name for name in missing if Path(name).name not in MADE}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`?make (\w+)", text)) <= set(targets)


def test_evaluation_commands_fit_the_recipes():
    trained = {}
    for recipe, *options in commands("train.py"):
        if recipe == "recipes/own_clips.yaml":  # tests/test_table.py runs these
            continue
        fields = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))
        assert options[:2] == ["--corpus_dir", "DIR"]
        trained[fields["corpus"]] = fields
    evaluated = {args.corpus: args for args in map(eval_script.parse_arguments, commands("eval.py"))}
    del evaluated["table"]
    assert set(trained) == set(evaluated) == {"mosi", "meld"}
    for corpus, args in evaluated.items():
        assert args.model == f"{trained[corpus]['output_dir']}/model"
        assert (args.task or corpus) == trained[corpus]["tasks"][0]
        assert args.corpus_options is None  # read from the model folder's recipe.json
