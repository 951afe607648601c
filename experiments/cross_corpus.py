"""Renders evaluations of several models on several corpora as one Markdown table.

    python -m experiments.cross_corpus runs/*/test/metrics.json runs/*/cherma/metrics.json

Reads `metrics.json` files of `eval.py`. A row is a model and its task, with the label map if there was one. A column
is a corpus and its split. A cell shows the weighted F1 of the most probable label in percent, or the MAE (in the
corpus's range) and Corr of the expected score, with 95 % intervals.
"""

import argparse
import json
from pathlib import Path

from egmf.tables import table


SCORES = {"MAE": "mae", "Corr": "corr"}


def cell_of(report: dict) -> str:
    """The main metrics of an evaluation."""
    if "expected" in report["answers"]:
        figures, bounds = report["answers"]["expected"], report["intervals"]["expected"]
        return ", ".join(f"{title} {_figure(figures[key], bounds[key], 1)}" for title, key in SCORES.items())
    figures, bounds = report["answers"]["distribution"], report["intervals"]["distribution"]
    return f"WF1 {_figure(figures['weighted_f1'], bounds['weighted_f1'], 100)}"


def _figure(value: float | None, interval: list[float] | None, scale: int) -> str:
    if value is None:
        return "-"
    form = "{:.2f}" if scale == 100 else "{:.3f}"
    parts = [form.format(scale * part) for part in (value, *(interval or ()))]
    return parts[0] + (f" [{parts[1]}, {parts[2]}]" if interval else "")


def table_of(files: list[Path]) -> str:
    """The table of the given `metrics.json` files.

    Raises:
        ValueError: If two files have the same model, task and corpus, or a file is not an evaluation.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"model", "task", "corpus", "split", "answers", "intervals"} - report.keys():
            raise ValueError(f"{file}: got no {', '.join(sorted(missing))}, wanted what eval.py writes")
        asked = report["task"] + (f" ({report['label_map']})" if report["label_map"] else "")
        row = cells.setdefault((report["model"], asked), {})
        corpus = f"{report['corpus']} / {report['split']}"
        if corpus in row:
            raise ValueError(f"{file}: got {report['model']}, {asked}, on {corpus} again, wanted each once")
        row[corpus] = cell_of(report)
    corpora = list(dict.fromkeys(corpus for row in cells.values() for corpus in row))
    rows = [[*key, *(row.get(corpus, "") for corpus in corpora)] for key, row in cells.items()]
    return table(["model", "task", *corpora], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="metrics.json")
    print(table_of(parser.parse_args().files))


if __name__ == "__main__":
    main()
