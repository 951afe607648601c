"""Functions that the pages in `results/` share: where they are, and how figures are read and written."""

import csv
import json
import re
from pathlib import Path

from egmf.files import read_json_lines


# Printed on pages whose runs are marked `earlier`: they were made before the model had these parts.
EARLIER = (
    "Measured with earlier code, before the expert readout, and with merged weights rounded to bfloat16. Today's code "
    "gives other figures; the commands are those of that code ([code versions](README.md#code-versions))."
)
RESULTS = Path(__file__).resolve().parents[1] / "results"
README = RESULTS.parent / "README.md"
Predictions = dict[tuple[str, int], dict[str, dict]]  # (variant, seed) -> id -> {"gold", "answers": {answer: label}}


def check_version(file: Path, runs: list[dict]) -> None:
    """Raises a ValueError if runs of today's code would be averaged with earlier ones."""
    if any(run.get("earlier") for run in runs):
        wanted = f"it and {file.stem}_answers.csv moved away: runs of two versions are not averaged"
        raise ValueError(f"{file}: got runs of earlier code, wanted {wanted}")


def percent(share: float) -> str:
    """A share in percent, with two decimals."""
    return f"{100 * share:.2f}"


def read_predictions(file: Path) -> dict[str, dict]:
    """The rows of a `predictions.jsonl` by id."""
    return {row["id"]: row for row in map(json.loads, filter(None, read_json_lines(file)))}


def write_answers(path: Path, predictions: Predictions) -> None:
    """Writes all answers as a CSV file: id, gold, and a column VARIANT_SEED:ANSWER for each run and kind of answer."""
    said = [*next(iter(next(iter(predictions.values())).values()))["answers"]]
    columns = [(key, answer) for key in sorted(predictions) for answer in said]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "gold", *(f"{variant}_{seed}:{answer}" for (variant, seed), answer in columns)])
        for row_id, row in next(iter(predictions.values())).items():
            answers = (predictions[key][row_id]["answers"][answer] for key, answer in columns)
            table.writerow([row_id, row["gold"], *(label or "" for label in answers)])


def read_answers(path: Path) -> Predictions:
    """Reads the file of `write_answers`."""
    predictions: Predictions = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            row_id, gold = row.pop("id"), row.pop("gold")
            for column, label in row.items():
                own, answer = column.rsplit(":", 1)
                variant, _, seed = own.rpartition("_")
                rows = predictions.setdefault((variant, int(seed)), {})
                rows.setdefault(row_id, {"gold": gold, "answers": {}})["answers"][answer] = label or None
    return predictions


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
