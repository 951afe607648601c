"""The repository: requirements are pinned and complete, documented commands exist, and no local paths occur."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def requirements_of(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


REQUIREMENTS = requirements_of("requirements.txt")
SPACE = requirements_of("requirements-space.txt")
NOT_IMPORTED = {
    "mypy": "make test calls it",
    "pytest-xdist": "make test runs two processes of tests with it",
    "gguf": "transformers reads the registry's model with it",
    "ruff": "make test calls it",
    "tensorboard": "transformers reports to it",
}
NOT_REQUIRED = {"deepspeed"}  # its tests skip without it


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file of the repository that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_requirement_is_pinned_and_installed(requirement):
    name, pinned = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", requirement).groups()
    assert version(name).split("+")[0] == pinned  # a build such as 2.13.0+cpu is the same version


@pytest.mark.parametrize("requirement", SPACE)
def test_requirement_of_the_page_is_pinned(requirement):
    name, pinned = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", requirement).groups()
    if find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed")
    assert version(name) == pinned


def test_requirements_are_what_is_imported(files):
    imported = set()
    for path in files:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(node.module.split(".")[0])
    own = {path.relative_to(ROOT).parts[0] for path in files} | {path.stem for path in files}
    third_party = imported - own - set(sys.stdlib_module_names)
    distributions = packages_distributions()
    names = {name for module in third_party for name in distributions.get(module, [module])}
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    assert names - NOT_REQUIRED | set(NOT_IMPORTED) == {line.split("==")[0] for line in REQUIREMENTS + SPACE}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("fast", ["ruff check .", 'pytest -q -n auto -m "not slow" tests/']),
        ("test", ["ruff check .", "ruff format --check .", "mypy", '-m "not slow"', "-m slow"]),
        ("quickstart", ["recipes/avatars_towers.yaml", "recipes/avatars_smollm2.yaml", "eval.py", "predict.py"]),
        ("demo", ["pip install -r requirements.txt -r requirements-space.txt", "app.py runs/quickstart/model"]),
        ("results", ["-m experiments.benchmarks render", "-m experiments.performance"]),
    ],
)
def test_make_targets(target, parts):
    command = ["make", "--dry-run", "--always-make", target]
    steps = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    places = [steps.index(part) for part in ["pip install -r requirements.txt", *parts]]
    assert places == sorted(places)


def test_continuous_integration_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")


def test_no_absolute_home_paths(files):
    home = re.compile(rb"(?<![\w.])/(?:home|root|Users|work)/\w")
    assert not [path.name for path in files if home.search(path.read_bytes())]
