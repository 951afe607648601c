"""Functions that the pages in `results/` share: where they are, and how figures are read and written."""

import json
import re
from pathlib import Path


RESULTS = Path(__file__).resolve().parents[1] / "results"
README = RESULTS.parent / "README.md"


def percent(share: float) -> str:
    """A share in percent, with two decimals."""
    return f"{100 * share:.2f}"


def read_predictions(file: Path) -> dict[str, dict]:
    """The rows of a `predictions.jsonl` by id."""
    return {row["id"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def write_page(name: str, page: str, filled: str) -> None:
    """Writes `results/NAME.md` and fills the README's table of that page."""
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    README.write_text(fill_readme(README.read_text(encoding="utf-8"), name, filled), encoding="utf-8")


def fill_readme(text: str, name: str, filled: str) -> str:
    """The README's text with the table between the markers of a page replaced.

    Raises:
        ValueError: If there is no single pair of markers.
    """
    start, end = f"<!-- results/{name}.md -->", f"<!-- end of results/{name}.md -->"
    pattern = re.escape(start) + ".*?" + re.escape(end)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError(f"README.md: wanted one pair of markers {start} and {end}")
    return re.sub(pattern, lambda _: f"{start}\n{filled}\n{end}", text, flags=re.DOTALL)
