"""What the programs that run experiments share: the variants of a recipe, and the commands of a run.

A step of a run is a command, without the interpreter, and the file in the run's folder with which it ends.
"""

import shlex
import subprocess
import sys
from pathlib import Path


Step = tuple[list[str], str]

# The changes of each variant to the recipe.
VARIANTS = {
    "full": [],
    "adapted": ["--speaker_adaptation", "true", "--speaker_mixing", "0"],
    "text": ["--modalities", "text"],
    "audio": ["--modalities", "audio"],
    "vision": ["--modalities", "vision"],
    "no_local": ["--experts", "semantic", "global"],
    "no_semantic": ["--experts", "local", "global"],
    "no_global": ["--experts", "local", "semantic"],
    "flat": ["--gating", "flat"],
    "mean": ["--gating", "mean"],
    "dropout": ["--modality_dropout", '{"text": 0.2, "audio": 0.2, "vision": 0.2}'],
}
# Their names in tables; a program may have its own for some of them.
NAMES = {
    "full": "text, audio and vision",
    "adapted": "speaker adaptation",
    "text": "text only",
    "audio": "audio only",
    "vision": "vision only",
    "no_local": "without the local expert",
    "no_semantic": "without the semantic expert",
    "no_global": "without the global expert",
    "flat": "flat gate",
    "mean": "mean gate",
    "dropout": "modality dropout of 0.2 in training",
}


def training(folder: Path, recipe: str, source: str, seed: int, *fields: str, made: str = "model/recipe.json") -> Step:
    """The step that trains a recipe, with changed `fields`, on the corpus at `source`."""
    command = ["train.py", recipe, "--corpus_dir", source, "--output_dir", str(folder), "--seed", str(seed)]
    return [*command, *fields], made


def evaluation(folder: Path, made: str, corpus: str, source: str, *options: str) -> Step:
    """The step that evaluates the trained model on the corpus at `source`."""
    command = ["eval.py", str(folder / "model"), "--corpus", corpus, "--corpus_dir", source, *options]
    return [*command, "--output", str((folder / made).parent)], made


def run_steps(folder: Path, steps: list[Step], shown: dict[str, str]) -> None:
    """Runs the unfinished commands of a run one after the other. An interrupted training goes on where it was.

    Args:
        folder: The run's folder. `command.txt` in it gets the commands, `output.txt` what they print.
        shown: What stands in `command.txt` for a folder of this machine. Other absolute paths, such as that of a
            tower, are reduced to their last part.

    Raises:
        ValueError: If a finished step was made by another command.
        subprocess.CalledProcessError: If a command fails.
    """
    unfinished = [command for command, made in steps if not (folder / made).exists()]
    lines = [shlex.join(["python", *(_shown(word, shown) for word in command)]) for command, _ in steps]
    commands = folder / "command.txt"
    known = commands.read_text(encoding="utf-8").splitlines() if commands.is_file() else lines
    for (_, made), line, before in zip(steps, lines, known, strict=False):
        if (folder / made).exists() and line != before:
            raise ValueError(f"{folder}: {made} was made by `{before}`, wanted another folder for `{line}`")
    if not unfinished:
        print(f"{folder}: finished already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    commands.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for command in unfinished:
        print(shlex.join(command), flush=True)
        with (folder / "output.txt").open("a", encoding="utf-8") as output:
            subprocess.run([sys.executable, *command], check=True, stdout=output, stderr=subprocess.STDOUT)


def _shown(word: str, shown: dict[str, str]) -> str:
    for place, name in shown.items():
        word = name if word == place else word.replace(f"{place}/", f"{name}/")
    return Path(word).name if Path(word).is_absolute() else word
