"""Trains on one language or both, tests on each: RAVDESS (English) and CASIA (Mandarin), over their shared emotions.

    python -m experiments.languages run RAVDESS_DIR CASIA_DIR RUNS_DIR --audio_tower MODEL
    python -m experiments.languages collect RUNS_DIR
    python -m experiments.languages render

The speech of one corpus is the training split of a table, that of the other one its test split, so that no speaker,
no sentence and no language is in both. For training on both languages there are four tables: each tests one speaker of
CASIA and one of the first four published folds of RAVDESS, and trains on all others. Models hear the speech and read
no words. `run` skips finished runs and passes other arguments to `train.py`; `--variants` and `--tables` choose among
the runs. `collect` adds runs to results/languages.json; `render` writes results/languages.md.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from corpora import load_corpus, speakers_of
from corpora.casia import SPEAKERS
from corpora.ravdess import FOLDS
from egmf.commands import run_command
from egmf.evaluation.significance import resample
from egmf.tables import table
from experiments.bootstrap import RESAMPLES, interval, measure
from experiments.pages import RESULTS, percent, read_predictions
from experiments.running import VARIANTS, evaluation, run_steps, training


SHARED = {  # RAVDESS's label -> CASIA's
    "neutral": "平静",
    "happy": "高兴",
    "sad": "悲伤",
    "angry": "愤怒",
    "fearful": "恐惧",
    "surprised": "惊奇",
}
BOTH = [f"both_{fold}" for fold in range(1, SPEAKERS + 1)]
DIRECTIONS = {  # the language of its tests, and its tables
    "English to Chinese": ("chinese", ["english_chinese"]),
    "Chinese to English": ("english", ["chinese_english"]),
    "both to Chinese": ("chinese", BOTH),
    "both to English": ("english", BOTH),
}
RAVDESS_IDS = "03-01-"  # speech, in sound alone
TABLES = [*dict.fromkeys(name for _, names in DIRECTIONS.values() for name in names)]
CORPORA = {"english": "ravdess", "chinese": "casia"}
NAMES = {"full": "one clip at a time", "adapted": "speaker adaptation"}
RECIPE = "recipes/own_clips.yaml"
FIELDS = ["--modalities", "audio", "--audio_window", "6", "--audio_speeds", "1.0", "0.9", "1.1"]
FIELDS += ["--balance_classes", "false", "--num_train_epochs", "1", "--expert_gain", "16", "--temperature", "16"]


def clips(ravdess: str, casia: str) -> dict[str, list[dict[str, str]]]:
    """The clips of both languages with the shared labels, by language."""
    chinese = {label: name for name, label in SHARED.items()}
    found: dict[str, list[dict[str, str]]] = {}
    for language, corpus, folder in (("english", "ravdess", ravdess), ("chinese", "casia", casia)):
        for rows in load_corpus(corpus, folder).values():
            speakers = speakers_of(corpus, rows["id"][:], rows["speaker"][:])
            for row, speaker in zip(rows, speakers, strict=True):
                label = row["emotion"] if corpus == "ravdess" else chinese.get(row["emotion"])
                if label in SHARED:
                    own = {"id": row["id"], "file": str(Path(row["audio"]).resolve()), "label": label}
                    found.setdefault(language, []).append(own | {"speaker": f"{corpus} {speaker}"})
    return found


def write_tables(found: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """Writes `TABLES`."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for train, test in (("english", "chinese"), ("chinese", "english")):
        tables[f"{train}_{test}"] = [row | {"split": "train"} for row in found[train]]
        tables[f"{train}_{test}"] += [row | {"split": "test"} for row in found[test]]
    for speaker, (name, actors) in enumerate(zip(BOTH, FOLDS["published"], strict=False), 1):
        held_out = {f"casia {speaker}", *(f"ravdess {actor:02}" for actor in actors)}
        rows = [*found["english"], *found["chinese"]]
        tables[name] = [row | {"split": "test" if row["speaker"] in held_out else "train"} for row in rows]
    for name in TABLES:
        rows = tables[name]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def run(args: argparse.Namespace, more: list[str]) -> None:
    """Trains, evaluates and probes all tables and variants."""
    write_tables(clips(args.ravdess, args.casia), args.runs_dir)
    for variant in args.variants:
        for name in args.tables:
            folder = args.runs_dir / f"{name}_{variant}_{args.seed}"
            source, fields = str(args.runs_dir / f"{name}.csv"), [*FIELDS, *VARIANTS[variant], *more]
            train = training(folder, RECIPE, source, args.seed, *fields)
            test = evaluation(folder, "test/metrics.json", "table", source)
            probe = ["-m", "experiments.probe", RECIPE, "--corpus_dir", source, *fields, "--split", "test"]
            probe += ["--output", str(folder / "probe.json")]
            run_steps(folder, [train, test, (probe, "probe.json")], {str(args.runs_dir): "RUNS_DIR"})


def collect(runs_dir: Path) -> list[dict]:
    """The figures of all directions whose tables have been run."""
    found = []
    for direction, (language, tables) in DIRECTIONS.items():
        for variant in NAMES:
            for first in sorted(runs_dir.glob(f"{tables[0]}_{variant}_*/test/predictions.jsonl")):
                seed = first.parents[1].name.rpartition("_")[2]
                folders = [runs_dir / f"{name}_{variant}_{seed}" for name in tables]
                rows = [row for folder in folders for row in _answers(folder, language)]
                gold = [row["gold"] for row in rows]
                speakers = speakers_of(CORPORA[language], [row["id"] for row in rows], [None] * len(rows))
                own: dict = {"direction": direction, "variant": variant, "seed": int(seed)}
                own |= {"samples": len(rows), "speakers": len(set(speakers))}
                for answer in ("distribution", "experts", "llm", "probe"):
                    own[answer] = measure(gold, [row["answers"][answer] for row in rows])
                given = [[row["answers"]["distribution"] for row in rows]]
                own["interval"] = interval(gold, given, resample(speakers, RESAMPLES))["accuracy"]
                found.append(own | {"command": (folders[0] / "command.txt").read_text(encoding="utf-8").strip()})
    if not found:
        raise ValueError(f"{runs_dir}: no run has been evaluated")
    return found


def _answers(folder: Path, language: str) -> list[dict]:
    """The answers of a run and of its linear probe to the test clips of one language."""
    rows = read_predictions(folder / "test" / "predictions.jsonl")
    [task] = json.loads((folder / "probe.json").read_text(encoding="utf-8"))["tasks"].values()
    for row in task["predictions"]:
        rows[row["id"]]["answers"]["probe"] = row["answer"]
    return [row for row in rows.values() if (language == "english") == row["id"].startswith(RAVDESS_IDS)]


def render(found: list[dict]) -> str:
    """The page."""
    rows = []
    for own in found:
        low, high = own["interval"]
        first = [own["direction"], NAMES[own["variant"]], str(own["seed"])]
        shown = f"{percent(own['distribution']['accuracy'])} ({percent(low)} to {percent(high)})"
        rows.append([*first, shown, percent(own["distribution"]["ua"])])
        rows[-1] += [percent(own[name]["accuracy"]) for name in ("experts", "llm", "probe")]
    english = next((own["samples"] for own in found if own["direction"] == "Chinese to English"), 0)
    head = ["direction", "variant", "seed", "accuracy (95 % interval)", "UA", "experts alone", "LLM alone"]
    page = [
        "# Across languages: RAVDESS (English) and CASIA (Mandarin)",
        f"Trained on the speech of one corpus, tested on the other one, over the {len(SHARED)} emotions that both "
        f"have: {', '.join(SHARED)}. In percent; a guess gives {percent(1 / len(SHARED))}. Intervals are 95 % "
        "percentile intervals of a bootstrap over speakers (CASIA has four, so that its interval is rough). *Linear "
        "probe* reads the same features and learns from the same rows. *Speaker adaptation* normalises by the mean "
        "and the deviation of the speaker's own clips, without labels. Nothing was chosen on these figures; the "
        "commands below have the settings.",
        "*Both*: trained on both corpora; each of four runs is tested on one speaker of CASIA and on one published "
        "fold of RAVDESS's actors. The fifth fold is never tested.",
        table([*head, "linear probe"], rows),
        f"RAVDESS has {english} clips with these labels, CASIA 1,200." if english else "",
        "`python -m experiments.languages run RAVDESS_DIR CASIA_DIR RUNS_DIR` writes the tables and runs these "
        "commands; those of the other three tables of both languages differ in their number. `whisper-base-encoder` "
        "is a local folder with the encoder of `openai/whisper-base`.",
        "```bash\n" + "\n".join(dict.fromkeys(own["command"] for own in found)) + "\n```",
        "Made from `results/languages.json` by `python -m experiments.languages render`.",
    ]
    return "\n\n".join(filter(None, page)) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train, test and probe both directions")
    runner.add_argument("ravdess", help="folder of RAVDESS")
    runner.add_argument("casia", help="folder of CASIA")
    runner.add_argument("runs_dir", type=Path)
    runner.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    runner.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    runner.add_argument("--seed", type=int, default=1111)
    collector = commands.add_parser("collect", help="runs -> results/languages.json")
    collector.add_argument("runs_dir", type=Path)
    commands.add_parser("render", help="results/languages.json -> results/languages.md")
    args, more = parser.parse_known_args(arguments)
    if more and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    file = RESULTS / "languages.json"
    if args.command == "run":
        run(args, more)
    elif args.command == "collect":
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        every = {(own["direction"], own["variant"], own["seed"]): own for own in known + collect(args.runs_dir)}
        order = {direction: place for place, direction in enumerate(DIRECTIONS)}
        found = sorted(every.values(), key=lambda own: order[own["direction"]])
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        page = render(json.loads(file.read_text(encoding="utf-8")))
        file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
