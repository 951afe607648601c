"""Measures reading and converting the benchmarks' published file formats: rows per second and memory.

    python -m bench.loaders > results/loaders.md
    python -m bench.loaders --meld DIR --scale 1 --only mosei_unaligned

Files of every format are generated (`tests/formats.py`) with the published shapes and types and a share `--scale` of
the published number of clips. With `--meld`, MELD's published CSV files are read instead. Each measurement runs in a
separate process: `load` reads all rows into memory, `convert` writes them as parquet. Memory is the peak resident size
minus the size before, which Python and the libraries take.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corpora import cherma, load_corpus, meld, mosei, simsv2
from corpora.convert import convert
from tests import formats


MEMORY_LIMIT = 4e9  # beyond the arrays of one split, for MOSEI's pickle


def scaled(sizes: dict[str, int], scale: float) -> tuple[int, ...]:
    return tuple(max(7, round(size * scale)) for size in sizes.values())


def clips(sizes: dict[str, int], scale: float) -> list[tuple[str, str, str, str]]:
    modes = zip(("train", "valid", "test"), scaled(sizes, scale), strict=True)
    return [
        (f"video{n // 10:04d}", f"{n % 10:04d}_{mode}"[:4], "0.2", mode) for mode, count in modes for n in range(count)
    ]


def write_meld_csv(place: Path, scale: float) -> None:
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    for name, count in zip(meld.FILES.values(), scaled(meld.SIZES, scale), strict=True):
        rows = [
            f'{n},"It\x92s what I said, isn\x92t it",Joey,{meld.EMOTIONS[n % 7]},x,{n // 10},{n % 10},1,1,x,x'
            for n in range(count)
        ]
        (place / name).write_text("\n".join([header, *rows]), encoding="utf-8")


CHERMA_SIZES = {"train": 16000, "dev": 5000, "test": 5000}  # not verified; only the speed is measured here
FORMS = {  # name: title, corpus, file, default share of the published clips, writer
    "meld_csv": ("MELD, CSV", "meld", "", 1, write_meld_csv),
    "meld_pickles": (
        "MELD, MSE-Adapter's pickles, 157 x 64 and 32 x 64, float32",
        "meld",
        "",
        1 / 8,
        lambda place, scale: formats.mse_pickles(
            place, "meld", meld.EMOTIONS, "en", scaled(meld.SIZES, scale), (157, 32), (64, 64)
        ),
    ),
    "cherma_pickles": (
        "CHERMA, MSE-Adapter's pickles, 543 x 1024 and 16 x 2048, float32",
        "cherma",
        "",
        1 / 128,
        lambda place, scale: formats.mse_pickles(
            place, "cherma", cherma.EMOTIONS, "zh", scaled(CHERMA_SIZES, scale), (543, 16), (1024, 2048)
        ),
    ),
    "cherma_lfmim": (
        "CHERMA, LFMIM's JSON and npy, up to 200 x 1024 and 16 x 2048, float32",
        "cherma",
        "",
        1 / 64,
        lambda place, scale: formats.lfmim(
            place, cherma.EMOTIONS, dict(zip(CHERMA_SIZES, scaled(CHERMA_SIZES, scale), strict=True)), 200
        ),
    ),
    "mosei_unaligned": (
        "MOSEI, MMSA's unaligned pickle, 500 x 74 and 375 x 35, float64, text 50 x 768, float32",
        "mosei",
        "a.pkl",
        1 / 16,
        lambda place, scale: formats.mmsa_pickle(
            place / "a.pkl", scaled(mosei.SIZES, scale), frames=(500, 375), types=("f8", "f8"), text=(50, 768)
        ),
    ),
    "mosei_aligned": (
        "MOSEI, MMSA's aligned pickle, 50 x 74 and 50 x 35, float64, text 50 x 768, float32",
        "mosei",
        "a.pkl",
        1 / 16,
        lambda place, scale: formats.mmsa_pickle(
            place / "a.pkl",
            scaled(mosei.SIZES, scale),
            aligned=True,
            frames=(50, 50),
            types=("f8", "f8"),
            text=(50, 768),
        ),
    ),
    "mosei_clips": (
        "MOSEI, table and clips",
        "mosei",
        "",
        1,
        lambda place, scale: formats.clip_table(place, "label.csv", "en", clips=clips(mosei.SIZES, scale)),
    ),
    "simsv2_pickle": (
        "SIMS-V2, pickle, 925 x 25 and 232 x 177, float64",
        "simsv2",
        "a.pkl",
        1 / 8,
        lambda place, scale: formats.mmsa_pickle(
            place / "a.pkl",
            scaled(simsv2.SIZES[2], scale),
            language="zh",
            frames=(925, 232),
            widths=(25, 177),
            high=1.0,
            rates=None,
            types=("f8", "f8"),
            text=(50, 768),
        ),
    ),
    "simsv2_clips": (
        "SIMS-V2, table and clips",
        "simsv2",
        "",
        1,
        lambda place, scale: formats.clip_table(place, "meta.csv", "zh", clips=clips(simsv2.SIZES[2], scale)),
    ),
}


def resident() -> int:
    """The peak resident size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(how: str, name: str, source: str, out: str) -> dict[str, float]:
    """Loads or converts a corpus in this process; returns rows, CPU seconds and bytes of memory."""
    before, start = resident(), time.process_time()
    if how == "load":
        rows = sum(map(len, load_corpus(name, source).values()))
    else:
        report = convert(name, source, out, allow_mismatch=True)
        rows = sum(part["rows"] for part in report["splits"].values())
    return {"rows": rows, "seconds": time.process_time() - start, "memory": resident() - before}


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def size_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def row_of(form: str, scale: float | None, meld_folder: str | None, with_load: bool = True) -> tuple[str, dict]:
    title, name, file, default, writer = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "files"
        place.mkdir()
        if form == "meld_csv" and meld_folder:
            place = Path(meld_folder)
        else:
            # Also in a separate process, so that generating the files does not count as memory of this one.
            command = [sys.executable, __file__, "--write", form, str(place), str(scale or default)]
            subprocess.run(command, check=True)
        source, size = str(place / file), size_of(place)
        loaded = in_process("load", name, source, "") if with_load else None
        converted = in_process("convert", name, source, str(Path(folder) / "out"))
        written = size_of(Path(folder) / "out")
    cells = [title, f"{converted['rows']}", f"{size / 1e6:.0f}", f"{written / 1e6:.0f}"]
    for measured in (loaded, converted):
        if measured is None:
            cells += ["", ""]
        else:
            cells += [f"{measured['rows'] / measured['seconds']:.0f}", f"{measured['memory'] / 1e6:.0f}"]
    return "| " + " | ".join(cells) + " |", converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, help="share of the published clips; by default each form's own")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--meld", help="folder with MELD's published CSV files")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if args.write:
        form, place, scale = args.write
        FORMS[form][-1](Path(place), float(scale))
        return
    print("# Reading and converting the benchmarks' files: speed and memory\n")
    print(
        "Command: `python -m bench.loaders --meld DIR > results/loaders.md`. One run each, on generated files of the"
    )
    print(
        "published layouts (MELD's CSV files: the published ones). Rows per second of CPU time; the highest resident"
    )
    print("memory beyond what Python and the libraries take. `load` keeps all rows in memory, `convert` does not.")
    print("Forms may be measured one at a time (`--only`).\n")
    print("| form | rows | files, MB | parquet, MB | load: rows/s | load: MB | convert: rows/s | convert: MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    peaks = {}
    for form in args.only:
        row, converted = row_of(form, args.scale, args.meld)
        print(row, flush=True)
        peaks[form] = converted["memory"]
    if "mosei_unaligned" in args.only:
        scale = args.scale or FORMS["mosei_unaligned"][3]
        measured = {scale: peaks["mosei_unaligned"]}
        for share in (2 * scale, 4 * scale):
            measured[share] = row_of("mosei_unaligned", share, None, with_load=False)[1]["memory"]
        assert max(measured.values()) < MEMORY_LIMIT
        shown = ", ".join(f"{share:.4g} of them {peak / 1e6:.0f} MB" for share, peak in measured.items())
        print("\nMemory to convert MOSEI's unaligned pickle, by the share of the published clips that are in it:")
        print(f"{shown}.")


if __name__ == "__main__":
    main()
