"""The exact versions of packages in the requirements files of this repository."""

from collections.abc import Iterable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def pins(file: str, packages: Iterable[str]) -> list[str]:
    """The lines `package==version` of some packages.

    Args:
        file: "requirements.txt" or "requirements-space.txt".
        packages: Names of packages that the file has.
    """
    lines = {line.partition("==")[0]: line for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}
    return [lines[name] for name in packages]
