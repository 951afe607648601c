"""What the programs that run experiments share: the variants of a recipe, and running the commands of a run."""

import shlex
import subprocess
import sys
from pathlib import Path


# The changes of each variant to the recipe.
VARIANTS = {
    "full": [],
    "text": ["--modalities", "text"],
    "audio": ["--modalities", "audio"],
    "vision": ["--modalities", "vision"],
    "no_local": ["--experts", "semantic", "global"],
    "no_semantic": ["--experts", "local", "global"],
    "no_global": ["--experts", "local", "semantic"],
    "flat": ["--gating", "flat"],
    "mean": ["--gating", "mean"],
    "adapted": ["--speaker_adaptation", "true", "--speaker_mixing", "0"],
    "dropout": ["--modality_dropout", '{"text": 0.2, "audio": 0.2, "vision": 0.2}'],
}


def run_steps(folder: Path, steps: list[tuple[list[str], str]], shown: dict[str, str]) -> None:
    """Runs the unfinished commands of a run one after the other. An interrupted training goes on where it was.

    Args:
        folder: The run's folder. `command.txt` in it gets the commands, `output.txt` what they print.
        steps: The commands, without the interpreter, and the file in the folder with which each ends.
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
