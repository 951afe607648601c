"""Writes the folder of a Space of the Hub that shows a published model. See `publish.py --space`."""

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

from egmf.publishing.pins import ROOT, pins
from egmf.readme import section


TEMPLATE = Path(__file__).with_name("space.md")
# The code of the page. That of the model comes with the model.
COPIED = ("app.py", "LICENSE", "configuration_egmf.py", "egmf/__init__.py", "egmf/arguments.py", "egmf/commands.py")
COPIED += ("egmf/readme.py", "egmf/prediction/__init__.py", "egmf/prediction/outputs.py", "egmf/space")
# What the page and the model's code import, in the versions of requirements.txt.
PACKAGES = ("av", "decord2", "huggingface-hub", "numpy", "pillow", "safetensors", "soundfile", "soxr", "tokenizers")
PACKAGES += ("torch", "transformers")
PYTHON = "3.11"


def write_space(
    folder: Path,
    repo_id: str,
    examples: list[tuple[str, str]],
    transcriber: str | None = None,
) -> SpaceCard:
    """Writes a new folder with everything that a Space of Gradio needs, and returns its card.

    Args:
        folder: The folder, which must be new or empty.
        repo_id: Hub id of the model.
        examples: Clips, which are copied, with their words.
        transcriber: Hub id of a speech recognition model for clips without words.

    Raises:
        ValueError: If the folder has files, an example is no file, or the transcriber is a local folder.
    """
    if transcriber is not None and Path(transcriber).exists():
        raise ValueError(f"--transcriber: got the local {transcriber}, wanted the id of a model on the Hub")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--space: got {folder}, which has files, wanted a new folder")
    for file, _ in examples:
        if not Path(file).is_file():
            raise ValueError(f"--example: got {file}, wanted an existing file")
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    copies = []
    for place, (file, words) in enumerate(examples, 1):
        copy = Path("examples", f"{place}_{Path(file).name}")
        (folder / copy).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / copy)
        copies.append([copy.as_posix(), words])
    settings: dict[str, Any] = {"model": repo_id, "transcriber": transcriber, "examples": copies}
    (folder / "space.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    [gradio] = pins("requirements-space.txt", ["gradio"])
    lines = [gradio, *pins("requirements.txt", PACKAGES)]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _write_card(folder, repo_id, transcriber, gradio.partition("==")[2])


def _write_card(folder: Path, repo_id: str, transcriber: str | None, gradio: str) -> SpaceCard:
    title = repo_id.partition("/")[2]
    data = SpaceCardData(
        title=title,
        emoji="🎭",
        colorFrom="blue",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=gradio,
        python_version=PYTHON,
        app_file="app.py",
        license="apache-2.0",
        models=[repo_id, *([transcriber] if transcriber else [])],
        short_description="Emotion and sentiment from words, voice and face",
    )
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=title, model=repo_id, misuse=section("Use and misuse")
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return SpaceCard.load(folder / "README.md")
