"""The notice on use and misuse, which stands in the README and is quoted by model cards and the page."""

import re
from pathlib import Path


README = Path(__file__).resolve().parents[2] / "README.md"


def section(title: str) -> str:
    """A section of the README, without its heading.

    Raises:
        ValueError: If the README has no such section.
    """
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md: got no section {title!r}, wanted the one that model cards and the page quote")
    return found[1].strip()
