"""Sections of the README that model cards, Spaces and the page of app.py quote, such as that on use and misuse."""

import re
from pathlib import Path


README = Path(__file__).resolve().parents[1] / "README.md"


def section(title: str) -> str:
    """A section of the README, without its heading.

    Raises:
        ValueError: If the README has no such section.
    """
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md: got no section {title!r}, wanted the one that model cards and the page quote")
    return found[1].strip()
