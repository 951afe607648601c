"""Writes small versions of the benchmarks' published files with generated content.

Names, keys, shapes, types and faults are those of the published files. Each function returns, by split, the rows that
a reader must return for its files, with features as arrays.
"""

import csv
import json
import pickle
from pathlib import Path

import numpy as np


SPLITS = {"train": "train", "valid": "validation", "test": "test"}
FEATURES = ("audio_features", "vision_features")
EMPTY = {
    "id": None,
    "text": None,
    "speaker": None,
    "context": [],
    "language": None,
    "audio": None,
    "video": None,
    "audio_features": None,
    "vision_features": None,
    "audio_times": None,
    "vision_times": None,
    "emotion": None,
    "sentiment": None,
}
TEXTS = {"en": "It\x92s fine \x96 caf\u00e9", "zh": "他说：\u201c好\u201d。"}
READ_TEXTS = {"en": "It\u2019s fine \u2013 caf\u00e9", "zh": "他说：\u201c好\u201d。"}


def faulty(values: np.ndarray, rng: np.random.Generator, *faults: float) -> tuple[np.ndarray, np.ndarray]:
    """Values in which some are replaced by the faults, and the expected result: float32, with 0 for each fault."""
    values = values.copy()
    places = rng.choice(values.size, size=4 * len(faults), replace=False)
    values.reshape(-1)[places] = np.repeat(faults, 4)
    clean = values.astype(np.float32)
    clean[~np.isfinite(clean)] = 0
    return values, clean


def mmsa_pickle(
    path: Path,
    sizes: tuple[int, int, int] = (7, 3, 4),
    language: str = "en",
    frames: tuple[int, int] = (12, 9),
    widths: tuple[int, int] = (74, 35),
    high: float = 3.0,
    aligned: bool = False,
    rates: tuple[float, float] | None = (20.0, 15.0),
    protocol: int = 4,
    types: tuple[str, str] = ("float64", "float32"),
    arrays: bool = True,
    text: tuple[int, int] = (5, 8),
    **columns,
) -> dict[str, list[dict]]:
    """MMSA's pickle of features; `columns` replace the generated ones in every split.

    It contains -inf in audio, NaN in vision, a repeated id in train, ids with leading zeros, a clip without sound and
    an aligned clip without any features. Texts are an array (`arrays`) or a list.
    """
    rng = np.random.default_rng(17)
    data, expected = {}, {}
    for (name, split), count in zip(SPLITS.items(), sizes, strict=True):
        own, rows = {}, [EMPTY | {"language": language, "text": READ_TEXTS[language]} for _ in range(count)]
        ids = [f"{name}$_${index:04d}" for index in range(count)]
        for row, row_id in zip(rows, ids, strict=True):
            row["id"] = row_id
        if name == "train":
            ids[-1], rows[-1]["id"] = ids[0], f"{ids[0]}#2"
        labels = np.round(rng.uniform(-high, high, count), 4).astype(np.float32)
        lengths = [rng.integers(1, longest + 1, count) for longest in frames]
        lengths[0][1] = 0
        same = np.maximum(lengths[1], 2)
        cleaned = []
        for index, (modality, fault) in enumerate((("audio", -np.inf), ("vision", np.nan))):
            longest, own_lengths = (min(frames), same) if aligned else (frames[index], lengths[index])
            values = rng.normal(size=(count, longest, widths[index])).astype(types[index])
            for row, length in enumerate(own_lengths):
                values[row, length:] = 0
            values, clean = faulty(values, rng, fault)
            if aligned:  # the second clip begins with padding, the third has nothing else
                for array in (values, clean):
                    array[:, 0, 0] = 1
                    array[1, 0] = array[2] = 0
            cleaned.append(clean)
            own[modality], own[f"{modality}_lengths"] = values, own_lengths.tolist()
            for row, length in enumerate([] if aligned else own_lengths):
                if length:
                    rows[row][FEATURES[index]] = clean[row, :length]
                    if rates:
                        times = (np.arange(length) + 0.5) / rates[index]
                        rows[row][f"{modality}_times"] = times.astype(np.float32)
        for row in range(count if aligned else 0):
            heard = [frame for frame in range(min(frames)) if any(clean[row, frame].any() for clean in cleaned)]
            for column, clean in zip(FEATURES, cleaned, strict=True):
                rows[row][column] = clean[row, heard[0] : heard[-1] + 1] if heard else None
        for row, label in zip(rows, labels, strict=True):
            row["sentiment"] = float(label)
        own["raw_text"] = [TEXTS[language]] * count
        own["id"] = ids
        if arrays:
            own["raw_text"], own["id"] = np.array(own["raw_text"]), np.array(ids, dtype=object)
        own["text"] = rng.normal(size=(count, *text)).astype(np.float32)
        own["text_bert"] = np.zeros((count, 3, 5))
        own["annotations"] = ["Negative"] * count
        own["classification_labels"] = np.zeros(count)
        own["regression_labels"] = labels
        if aligned:
            del own["audio_lengths"], own["vision_lengths"]
        data[name] = own | columns
        expected[split] = rows
    if language == "zh":
        data["train_mix"] = {"audio": np.zeros((1, 2, 3)), "mask": [1]}  # of SIMS-V2, for semi-supervised learning
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return expected


def mse_pickles(
    folder: Path,
    corpus: str,
    emotions: tuple[str, ...],
    language: str,
    sizes: tuple[int, int, int] = (8, 7, 7),
    frames: tuple[int, int] = (11, 6),
    widths: tuple[int, int] = (64, 64),
    protocol: int = 3,
    lists: bool = False,
    **item,
) -> dict[str, list[dict]]:
    """MSE-Adapter's three pickles; `item` replaces the `label` or features of the first item in each pickle."""
    rng = np.random.default_rng(23)
    expected = {}
    for (name, split), count in zip(SPLITS.items(), sizes, strict=True):
        items, expected[split] = [], []
        for index in range(count):
            row = EMPTY | {"id": f"{split}_{index:05d}", "language": language, "text": READ_TEXTS[language]}
            row["emotion"] = emotions[index % len(emotions)]
            features = {"text": TEXTS[language]}
            for place, (kind, column) in enumerate(zip(("audio", "video"), FEATURES, strict=True)):
                length = int(rng.integers(1, frames[place] + 1))
                values = rng.normal(size=(frames[place], widths[place])).astype(np.float32)
                values[length:] = 0
                values, clean = faulty(values, rng, np.nan)
                features[kind] = values.tolist() if lists else values
                features[f"{kind}_len"] = length if index % 2 else np.int64(length)
                row[column] = clean[:length]
            label = row["emotion"]
            if index == 0:
                label = item.get("label", label)
                features |= {key: value for key, value in item.items() if key != "label"}
            items.append({"features": features, "label": label})
            expected[split].append(row)
        (folder / f"{corpus}_{name}.pkl").write_bytes(pickle.dumps(items, protocol=protocol))
    return expected


def lfmim(
    folder: Path, emotions: tuple[str, ...], sizes: dict[str, int] | None = None, frames: int = 8
) -> dict[str, list[dict]]:
    """LFMIM's JSON and npy files of CHERMA, with LFMIM's names of the splits.

    They include leading zeros, a name that occurs in two splits, a NaN, a missing file and a truncated file.
    """
    rng = np.random.default_rng(29)
    sizes = sizes or {"train": 9, "dev": 7, "test": 7}
    expected, taken = {}, {}
    for split, count in sizes.items():
        entries, rows = [], []
        for index in range(count):
            name = "shared_0000" if index == 0 and split in ("train", "test") else f"{split}_{index:04d}"
            taken[name] = taken.get(name, 0) + 1
            label = emotions[index % len(emotions)]
            entry = {"audio_file": f"{name}.wav", "video_file": f"{name}.mp4", "video_label": label}
            entries.append(entry | {f"{kind}_label": emotions[0] for kind in ("txt", "audio", "visual")})
            row_id = name if taken[name] == 1 else f"{name}#2"
            row = EMPTY | {"id": row_id, "language": "zh", "emotion": label}
            shapes = {"text": (4, 1024), "audio": (int(rng.integers(1, frames)), 1024), "visual": (16, 2048)}
            for kind, shape in shapes.items():
                values = rng.normal(size=shape).astype(np.float32)
                clean = values
                if kind == "visual" and index == 1:
                    values, clean = faulty(values, rng, np.nan)
                place = folder / kind / split
                place.mkdir(parents=True, exist_ok=True)
                file = place / f"{name}{'.mp4' if kind == 'visual' else ''}.npy"
                np.save(file, values)
                if kind == "audio" and index == 2:
                    file.unlink()
                    clean = None
                if kind == "visual" and index == 3:
                    file.write_bytes(file.read_bytes()[:-100])
                    clean = None
                if kind != "text":
                    row["audio_features" if kind == "audio" else "vision_features"] = clean
            rows.append(row)
        (folder / f"{split}.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
        expected[{"dev": "validation"}.get(split, split)] = rows
    return expected


CLIPS = [  # video, clip, label, mode
    ("0007", "0001", "-0.6", "train"),
    ("0007", "0002", "1.0", "train"),
    ("0007", "0002", "0.2", "train"),  # a repeated id
    ("0007", "0003", "", "train"),  # no label
    ("0007", "0010", "0.0", "train"),  # its clip is missing
    ("abc_-1", "0001", "0.4", "valid"),
    ("abc_-1", "0004", "-1.0", "valid"),
    ("x-9", "0001", "0.8", "test"),
    ("x-9", "0002", "-0.2", "test"),
    ("x-9", "0003", "0.0", "unlabelled"),
]


def clip_table(
    folder: Path, table: str, language: str, layout: str = "{video}/{clip}.mp4", root: str = "Raw", clips=CLIPS
) -> dict[str, list[dict]]:
    """MMSA's table, with a byte order mark as spreadsheets write it, and empty files for its clips."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, list[dict]] = {split: [] for split in SPLITS.values()}
    with (folder / table).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        header = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
        writer.writerow(header)
        seen = {}
        for video, clip, label, mode in clips:
            writer.writerow([video, clip, TEXTS[language], label, "", "", "", "Neutral", mode])
            path = folder / root / layout.format(video=video, clip=clip)
            if clip != "0010":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            name = f"{video}$_${clip}"
            if label and mode in SPLITS:
                seen[name] = seen.get(name, 0) + 1
                where = str(path) if clip != "0010" else None
                expected[SPLITS[mode]].append(
                    EMPTY
                    | {
                        "id": name if seen[name] == 1 else f"{name}#2",
                        "text": READ_TEXTS[language],
                        "language": language,
                        "audio": where,
                        "video": where,
                        "sentiment": float(np.float32(label)),
                    }
                )
    return expected


def cmu_mosei(folder: Path) -> dict[str, list[dict]]:
    """CMU's raw release of MOSEI with MMSA's table; a transcript is missing, one is cp1252, a line is damaged."""
    videos = "Raw/Videos/Segmented/Combined"
    expected = clip_table(folder, "label.csv", "en", "{video}_{clip}.mp4", videos)
    place = folder / "Raw/Transcript/Segmented/Combined"
    place.mkdir(parents=True)
    said = READ_TEXTS["en"]
    clips = enumerate(("0000", "0001", "0002", "0010"))
    lines = [f"0007___{clip}___{index}.0___{index + 1}.5___{said}" for index, clip in clips]
    (place / "0007.txt").write_text("\n".join([*lines, "damaged", ""]), encoding="utf-8")
    other = "Only \u2019here\u2019, with ___ in it"
    text = f"x-9___0001___0.0___1.0___{other}\r\nx-9___0002___1.0___2.0___{said}\r\n"
    (place / "x-9.txt").write_bytes(text.encode("cp1252"))
    expected["test"][0]["text"] = other
    return expected


def same_rows(split, expected: list[dict]) -> None:
    """Assert that a split contains exactly these rows."""
    rows = split.with_format("numpy").to_list() if hasattr(split, "with_format") else split
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(np.asarray(row[name], np.float32), value), (row["id"], name)
            else:
                assert row[name] == value, (row["id"], name)
