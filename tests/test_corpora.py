"""The corpora: schema, splits, context, alignment, and error messages that name a damaged file.

Checks on the published files read them from `$EGMF_SHARED/data`, by default `../shared/data` beside the repository,
and skip where they are absent; everything else runs on small files of the same layout.
"""

import csv
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import MELD_FILE_OF, MELD_HEADER, MELD_ROWS, published, write_meld, write_ravdess

from corpora import CORPORA, casia, clusters_of, generated, load_corpus, meld, mosi, ravdess
from corpora.schema import FEATURES
from egmf.tasks_egmf import BUILTIN_TASKS


def videos_of(split) -> set[str]:
    return {row_id.split("$_$")[0] for row_id in split["id"]}


# --- by name ---------------------------------------------------------------------------------------------------------


def test_unknown_corpus_names_the_known_ones():
    with pytest.raises(ValueError, match="'mosie'.*" + ", ".join(CORPORA)):
        load_corpus("mosie", "anywhere")


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="unknown option 'contxt'.*context"):
        load_corpus("meld", "anywhere", contxt=3)


@pytest.mark.parametrize("name", ["mosi", "meld"])
def test_missing_source(name, tmp_path):
    with pytest.raises(ValueError, match="source is None"):
        load_corpus(name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus(name, tmp_path / "nowhere")


# --- generated -------------------------------------------------------------------------------------------------------


def test_generated_is_deterministic_and_to_the_schema():
    first, again, other = (load_corpus("generated", None, seed=seed) for seed in (1, 1, 2))
    assert list(first) == ["train", "validation", "test"]
    for split in first:
        assert first[split].features == FEATURES
        assert first[split].to_list() == again[split].to_list()
        assert set(first[split]["emotion"]) == set(generated.LABELS)
    assert first["train"].to_list() != other["train"].to_list()
    ids = [row_id for split in first.values() for row_id in split["id"]]
    assert len(ids) == len(set(ids)) == 360


def test_generated_sequences_vary_and_some_are_missing():
    rows = load_corpus("generated")["train"]
    for modality, width, longest in (("audio", 6, 12), ("vision", 5, 9)):
        features, times = rows[f"{modality}_features"], rows[f"{modality}_times"]
        present = [sequence for sequence in features if sequence is not None]
        assert 0 < len(present) < len(features)
        assert {len(sequence) for sequence in present} == set(range(1, longest + 1))
        assert {len(frame) for sequence in present for frame in sequence} == {width}
        for sequence, positions in zip(features, times, strict=True):
            assert (sequence is None) == (positions is None)
            assert sequence is None or (len(positions) == len(sequence) and np.all(np.diff(positions) > 0))


def test_generated_label_is_in_exactly_one_modality():
    """The words, or the sign of the mean, give the label of every row; each modality carries about a third of them."""
    words = {word: label for label, known in generated._WORDS.items() for word in known}
    carriers = []
    for row in load_corpus("generated")["train"]:
        found = {}
        if row["text"].split()[-1] in words:
            found["text"] = words[row["text"].split()[-1]]
        for modality in ("audio", "vision"):
            if row[f"{modality}_features"] is not None:
                mean = np.mean(row[f"{modality}_features"])
                if abs(mean) > generated._SIGNAL * 0.6:
                    found[modality] = generated.LABELS[int(mean > 0)]
        assert list(found.values()) == [row["emotion"]], row["id"]
        carriers.extend(found)
    assert {carriers.count(modality) for modality in ("text", "audio", "vision")} == {len(carriers) // 3}


@pytest.mark.parametrize("option, value", [("size", 35), ("size", "360"), ("seed", -1), ("source", "a folder")])
def test_generated_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=option):
        generated.load(**{option: value})


# --- MOSI ------------------------------------------------------------------------------------------------------------


def mosi_frame(seed: int = 0) -> pd.DataFrame:
    """Nine videos of 1 to 5 utterances in the published layout, rows in random order."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "split": "test" if video >= 6 else "train",
            "video_id": f"video{video}",
            "clip_id": np.int32(clip),
            "text": f"WORD {video} {clip}",
            "label": np.int8((video + clip) % 2),
            "text_features": rng.normal(size=100).astype(np.float32),
            "audio_features": rng.normal(scale=30, size=73).astype(np.float32),
            "vision_features": rng.exponential(scale=30, size=100).astype(np.float32),
        }
        for video in range(9)
        for clip in range(1, 2 + video % 5)
    ]
    return pd.DataFrame(rows).sample(frac=1.0, random_state=seed, ignore_index=True)


def write_mosi(folder: Path, frame: pd.DataFrame) -> Path:
    frame.to_parquet(folder / "mosi.parquet")
    return folder


def test_mosi_small_file(tmp_path):
    options = {"context": 2, "neighbours": 1, "validation_videos": 2}
    splits = mosi.load(write_mosi(tmp_path, mosi_frame()), **options, validation_vision=True)
    assert {name: len(videos_of(split)) for name, split in splits.items()} == {"train": 4, "validation": 2, "test": 3}
    rows = {row["id"]: row for split in splits.values() for row in split}
    assert all(split.features == FEATURES for split in splits.values())
    middle = rows["video8$_$3"]
    assert middle["text"] == "word 8 3" and middle["emotion"] == "positive" and middle["language"] == "en"
    assert middle["context"] == [{"speaker": None, "text": "word 8 1"}, {"speaker": None, "text": "word 8 2"}]
    assert middle["audio_times"] == middle["vision_times"] == [-1.0, 0.0, 1.0]
    last = rows["video8$_$4"]
    assert last["audio_times"] == [-1.0, 0.0]
    only = rows["video5$_$1"]
    assert only["context"] == [] and only["vision_times"] == [0.0]
    file = tmp_path / "mosi.parquet"
    frame = mosi_frame()
    frame["clip_id"] = [f"{2**number}" for number in frame["clip_id"]]  # as text, 16 would precede 2
    write_mosi(tmp_path, frame)
    last = mosi.load(file, context=2, validation_videos=1)["test"][-1]
    assert last["id"] == "video8$_$16" and [turn["text"] for turn in last["context"]] == ["word 8 2", "word 8 3"]
    write_mosi(tmp_path, mosi_frame())
    splits = mosi.load(file, neighbours=0, validation_videos=1)
    assert len(splits["test"]["audio_features"][0]) == len(splits["test"]["vision_features"][0]) == 1
    assert set(splits["validation"]["vision_features"][:]) == {None}  # they know their labels
    assert len(splits["validation"]["audio_features"][0]) == 1


def test_mosi_statistics_are_those_of_train(tmp_path):
    """Validation and test do not influence the train features, which have zero mean and unit variance."""
    frame = mosi_frame()
    options = {"neighbours": 0, "validation_videos": 2}
    before = mosi.load(write_mosi(tmp_path, frame), **options)
    held_out = frame["video_id"].isin(videos_of(before["validation"]) | videos_of(before["test"]))
    frame.loc[held_out, "audio_features"] = frame.loc[held_out, "audio_features"].map(lambda vector: vector * 9 + 100)
    after = mosi.load(write_mosi(tmp_path, frame), **options)
    assert before["train"].to_list() == after["train"].to_list()
    for split in ("validation", "test"):
        assert np.abs(np.subtract(before[split]["audio_features"], after[split]["audio_features"])).max() > 0.5
    train = np.array(before["train"]["vision_features"])[:, 0]  # (N, 100)
    np.testing.assert_allclose(train.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1.0, atol=1e-5)


def test_mosi_constant_column_and_outlier(tmp_path):
    """A column that is constant on train stays finite, and all values stay within the limits."""
    frame = mosi_frame()
    for row, split in enumerate(frame["split"]):
        frame.at[row, "vision_features"][0] = 0.0 if split == "train" else 1e6
    splits = mosi.load(write_mosi(tmp_path, frame), neighbours=0, validation_videos=1)
    assert np.all(np.array(splits["train"]["vision_features"])[..., 0] == 0.0)
    assert np.all(np.array(splits["test"]["vision_features"])[..., 0] == mosi.FEATURE_LIMIT)


def _set(column, value):
    def change(frame):
        frame[column] = frame[column].astype(object)
        frame.at[0, column] = value
        return frame

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda frame: frame.drop(columns="audio_features"), "column 'audio_features' is missing"),
        (_set("audio_features", np.full(73, np.nan, np.float32)), "'audio_features' has 73 values that are not fin"),
        (_set("vision_features", np.full(100, -np.inf, np.float32)), "column 'vision_features' has 100 values"),
        (_set("vision_features", np.zeros(99, np.float32)), "column 'vision_features' has a vector of width 99"),
        (_set("audio_features", None), "column 'audio_features' has 1 nulls"),
        (_set("text", None), "column 'text' has 1 nulls"),
        (_set("split", "dev"), "column 'split' has 'dev'"),
        (_set("label", 2), "column 'label' has 2"),
        (lambda frame: frame.assign(clip_id=frame["clip_id"].map("n{}".format)), "'clip_id': .*, wanted numbers"),
        (lambda frame: frame.replace({"video_id": {"video8": "video4"}}), "'video4' is in both splits"),
        (lambda frame: pd.concat([frame, frame.iloc[[0]]], ignore_index=True), "more than once"),
        (lambda frame: frame[frame["split"] == "train"], "no row of 'test'"),
    ],
)
def test_mosi_faults_name_file_and_column(tmp_path, change, message):
    write_mosi(tmp_path, change(mosi_frame()))
    with pytest.raises(ValueError, match=message) as error:
        mosi.load(tmp_path, validation_videos=1)
    assert "mosi.parquet" in str(error.value)


def test_mosi_not_a_parquet_file(tmp_path):
    (tmp_path / "mosi.parquet").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="mosi.parquet: not a readable parquet"):
        mosi.load(tmp_path)


@pytest.mark.parametrize(
    "option, value",
    [("context", -1), ("context", 0.5), ("neighbours", True), ("validation_videos", 0), ("validation_videos", 6)],
)
def test_mosi_options_out_of_range(tmp_path, option, value):
    write_mosi(tmp_path, mosi_frame())
    with pytest.raises(ValueError, match=f"{option}: got {value}"):
        mosi.load(tmp_path, **({"validation_videos": 1} | {option: value}))


@pytest.fixture(scope="module")
def published_mosi():
    folder = published("mosi")
    splits = load_corpus("mosi", folder, context=3, validation_vision=True)
    return pd.read_parquet(folder / "mosi.parquet"), splits


def test_mosi_published_splits(published_mosi):
    raw, splits = published_mosi
    assert {name: len(split) for name, split in splits.items()} == {"train": 1207, "validation": 240, "test": 752}
    videos = {name: videos_of(split) for name, split in splits.items()}
    assert {name: len(ids) for name, ids in videos.items()} == {"train": 52, "validation": 10, "test": 31}
    assert not (videos["train"] & videos["validation"] or videos["train"] & videos["test"])
    assert videos["test"] == set(raw.loc[raw["split"] == "test", "video_id"])
    assert splits["test"]["emotion"].count("positive") == 467
    assert {label: splits["validation"]["emotion"].count(label) for label in mosi.LABELS} == {
        "negative": 109,
        "positive": 131,
    }


def test_mosi_published_windows_match_the_file(published_mosi):
    """Text, context and every vector of a row's window come from the right utterance of the raw file."""
    raw, splits = published_mosi
    raw = raw.set_index(["video_id", "clip_id"])
    train_keys = [(row_id.split("$_$")[0], int(row_id.split("$_$")[1])) for row_id in splits["train"]["id"]]
    expected = {}
    for column in ("audio_features", "vision_features"):
        squashed = np.stack(raw[column].to_list()).astype(np.float64)
        squashed = np.sign(squashed) * np.log1p(np.abs(squashed))
        train = squashed[raw.index.isin(train_keys)]
        deviation = train.std(axis=0)
        scaled = np.clip((squashed - train.mean(axis=0)) / np.where(deviation > 1e-6, deviation, 1.0), -5, 5)
        expected[column] = dict(zip(raw.index, scaled, strict=True))

    rng = random.Random(0)
    for split in splits.values():
        for row in split.select(rng.sample(range(len(split)), 40)):
            video, clip = row["id"].split("$_$")
            clip, last = int(clip), raw.loc[video].index.max()
            clips = list(range(max(1, clip - 3), min(last, clip + 3) + 1))  # the file numbers clips without gaps
            for modality in ("audio", "vision"):
                assert row[f"{modality}_times"] == [float(other - clip) for other in clips]
                np.testing.assert_allclose(
                    row[f"{modality}_features"],
                    np.stack([expected[f"{modality}_features"][video, other] for other in clips]),
                    atol=1e-5,
                )
            assert row["text"] == raw.loc[(video, clip), "text"].lower()
            assert row["emotion"] == mosi.LABELS[raw.loc[(video, clip), "label"]]
            before = [raw.loc[(video, other), "text"].lower() for other in range(max(1, clip - 3), clip)]
            assert [turn["text"] for turn in row["context"]] == before


# --- MELD ------------------------------------------------------------------------------------------------------------


def test_meld_small_files(tmp_path):
    splits = meld.load(write_meld(tmp_path), context=1)
    assert list(splits) == ["train", "validation", "test"]
    assert all(split.features == FEATURES for split in splits.values())
    rows = splits["validation"].to_list()
    assert [row["id"] for row in rows] == [
        f"validation_{clip}" for clip in ("dia0_utt0", "dia0_utt1", "dia0_utt3", "dia7_utt0")
    ]
    assert [row["emotion"] for row in rows] == ["neutral", "surprise", "joy", "anger"]
    assert [row["speaker"] for row in rows] == ["Joey’s Date", "Chandler", "Joey", "Joey"]
    assert rows[2]["context"] == [{"speaker": "Chandler", "text": 'That’s right, "Joey"'}]
    assert rows[3]["context"] == []
    assert rows[2]["text"] == "None"
    assert rows[0]["audio"] is None and rows[0]["video"] is None


def test_meld_repairs_cp1252(tmp_path):
    first = meld.load(write_meld(tmp_path))["train"][0]
    assert first["text"] == "It’s “me”… café"
    assert first["speaker"] == "Joey’s Date"


def test_meld_media_paths(tmp_path, caplog):
    media = tmp_path / "media"
    clips = {"train_splits": ("dia0_utt0", "dia0_utt1", "dia0_utt3", "dia7_utt0"), "dev_splits_complete": ()}
    clips["output_repeated_splits_test"] = ("dia7_utt0", "dia9_utt9")  # one more than there are utterances
    for folder, names in clips.items():
        (media / folder).mkdir(parents=True)
        for name in names:
            (media / folder / f"{name}.mp4").touch()
    splits = meld.load(write_meld(tmp_path), media=media)
    assert all(split["audio"] == split["video"] for split in splits.values())
    assert splits["train"]["video"][1] == str(media / "train_splits" / "dia0_utt1.mp4")
    assert [sum(path is None for path in split["video"]) for split in splits.values()] == [0, 4, 3]
    assert splits["test"]["video"][3] == str(media / "output_repeated_splits_test" / "dia7_utt0.mp4")
    counts = ["validation: clip: none: 4 (first: ", "test: clip: none: 3 (first: test_dia0_utt0"]
    assert [record.getMessage()[: len(count)] for record, count in zip(caplog.records, counts, strict=True)] == counts


def test_meld_media_folder_faults(tmp_path):
    write_meld(tmp_path)
    with pytest.raises(FileNotFoundError, match="media"):
        meld.load(tmp_path, media=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="media: .* none of the folders train_splits"):
        meld.load(tmp_path, media=tmp_path)


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["1,Hi,Joey,bored,neutral,0,0,1,1,x,x"], MELD_HEADER, "row 1, column 'Emotion': got 'bored'"),
        ([MELD_ROWS[0], "1,Hi,Joey,joy,neutral,zero,0,1,1,x,x"], MELD_HEADER, "row 2, column 'Dialogue_ID'.*'zero'"),
        (["1,Hi,Joey,joy,neutral,0,1.5,1,1,x,x"], MELD_HEADER, "column 'Utterance_ID': got '1.5'"),
        ([MELD_ROWS[0], MELD_ROWS[0]], MELD_HEADER, "row 2, column 'Utterance_ID': got '3'.*once"),
        (MELD_ROWS, MELD_HEADER.replace("Speaker", "Person"), "column 'Speaker' is missing"),
    ],
)
def test_meld_faults_name_file_row_and_column(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message) as error:
        meld.load(write_meld(tmp_path, rows, header))
    assert "train_sent_emo.csv" in str(error.value)


def test_meld_unreadable_files(tmp_path):
    write_meld(tmp_path)
    (tmp_path / "test_sent_emo.csv").write_bytes(b"Utterance\n\x92\n")
    with pytest.raises(ValueError, match="test_sent_emo.csv: not UTF-8"):
        meld.load(tmp_path)
    (tmp_path / "test_sent_emo.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="test_sent_emo.csv: not a readable CSV"):
        meld.load(tmp_path)
    with pytest.raises(ValueError, match="context: got -1"):
        meld.load(tmp_path, context=-1)


# neutral, surprise, fear, sadness, joy, disgust, anger
MELD_COUNTS = {
    "train": (9989, 1038, (4710, 1205, 268, 683, 1743, 271, 1109)),
    "validation": (1109, 114, (470, 150, 40, 111, 163, 22, 153)),
    "test": (2610, 280, (1256, 281, 50, 208, 402, 68, 345)),
}


@pytest.fixture(scope="module")
def published_meld():
    folder = published("meld")
    return folder, load_corpus("meld", folder)


def test_meld_published_counts(published_meld):
    _, splits = published_meld
    for name, (utterances, dialogues, counts) in MELD_COUNTS.items():
        split = splits[name]
        emotions = split["emotion"][:]
        assert len(split) == utterances
        assert len({row_id.rsplit("_utt", 1)[0] for row_id in split["id"]}) == dialogues
        assert tuple(emotions.count(emotion) for emotion in meld.EMOTIONS) == counts
    ids = [row_id for split in splits.values() for row_id in split["id"]]
    assert len(set(ids)) == len(ids)


def test_meld_published_context(published_meld):
    """Every context consists of the eight previous utterances of the same dialogue in the raw file."""
    folder, splits = published_meld
    for name, split in splits.items():
        raw = pd.read_csv(folder / MELD_FILE_OF[name], keep_default_na=False)
        raw = raw.set_index("Dialogue_ID")
        for row in split.select(random.Random(1).sample(range(len(split)), 60)):
            dialogue, utterance = (int(part) for part in row["id"].split("_dia")[1].split("_utt"))
            before = raw.loc[[dialogue]].sort_values("Utterance_ID")
            before = before[before["Utterance_ID"] < utterance].tail(8)
            expected = list(zip(before["Speaker"], before["Utterance"], strict=True))
            assert [(turn["speaker"], turn["text"]) for turn in row["context"]] == expected


def test_meld_published_text_has_no_control_characters(published_meld, tmp_path):
    """This also holds after the published punctuation is converted to the damaged form: the repair restores it."""
    folder, splits = published_meld
    for name in MELD_FILE_OF.values():
        shutil.copyfile(folder / name, tmp_path / name)
    text = (folder / "dev_sent_emo.csv").read_text(encoding="utf-8")
    damaged = text.translate({ord(mark): ord(mark.encode("cp1252")) for mark in "’‘“”…—"})
    assert damaged.count("\x92") > 100
    (tmp_path / "dev_sent_emo.csv").write_text(damaged, encoding="utf-8")
    assert load_corpus("meld", tmp_path)["validation"].to_list() == splits["validation"].to_list()
    assert not any("\x80" <= character < "\xa0" for character in "".join(splits["train"]["text"]))


# RAVDESS


@pytest.mark.parametrize("fold", [1, 4, 6])
def test_ravdess_holds_out_actors(tmp_path, fold):
    write_ravdess(tmp_path)
    splits = load_corpus("ravdess", tmp_path, fold=fold)
    actors = {name: {int(row_id[-2:]) for row_id in split["id"]} for name, split in splits.items()}
    assert actors["test"] == set(range(4 * fold - 3, 4 * fold + 1))
    assert len(actors["validation"]) == 4 and len(actors["train"]) == 16
    assert set().union(*actors.values()) == set(range(1, 25))
    assert splits["test"].num_rows == 32 and set(splits["test"]["text"]) == {"Dogs are sitting by the door."}
    assert splits["test"][0]["emotion"] == "neutral" and splits["test"][0]["audio"].endswith(".wav")
    assert set(splits["train"]["emotion"]) == set(ravdess.EMOTIONS)


def test_ravdess_trains_on_the_validation_actors_once_all_is_chosen(tmp_path):
    write_ravdess(tmp_path)
    chosen, final = (load_corpus("ravdess", tmp_path, fold=2, validation=flag) for flag in (True, False))
    assert final["validation"].num_rows == 0 and final["test"]["id"] == chosen["test"]["id"]
    assert set(final["train"]["id"]) == {*chosen["train"]["id"], *chosen["validation"]["id"]}


def test_ravdess_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="no files 03-01-"):
        load_corpus("ravdess", tmp_path)
    write_ravdess(tmp_path, actors=range(1, 9))
    with pytest.raises(ValueError, match="no files of the actors of train, wanted all 24 actors"):
        load_corpus("ravdess", tmp_path)
    with pytest.raises(ValueError, match="fold: got 7, wanted an integer from 1 to 6"):
        load_corpus("ravdess", tmp_path, fold=7)
    (tmp_path / "03-01-09-01-01-01-01.wav").touch()
    with pytest.raises(ValueError, match=r"03-01-09-01-01-01-01.wav: wanted a name such as"):
        load_corpus("ravdess", tmp_path)
    write_ravdess(tmp_path / "copy", actors=[3])
    with pytest.raises(ValueError, match=r"copy/Actor_03/03-01-01-.*got the clip of .* again, wanted each clip once"):
        load_corpus("ravdess", tmp_path)


def test_ravdess_published_folds():
    folder = published("ravdess")
    ids = [row_id for fold in range(1, 7) for row_id in load_corpus("ravdess", folder, fold=fold)["test"]["id"]]
    assert len(ids) == len(set(ids)) == 360


def test_ravdess_has_the_published_folds_and_faces(tmp_path):
    write_ravdess(tmp_path)
    names = sorted(path.stem for path in tmp_path.rglob("03-01-*"))
    lines = [f"{name},0.5,{number}" for number, name in enumerate(names)]
    (tmp_path / "openface_action_units.csv").write_text("\n".join(["id,AU01_r,AU02_r", *lines]))
    splits = load_corpus("ravdess", tmp_path, fold=5, folds="published")
    actors = {name: {int(row_id[-2:]) for row_id in split["id"]} for name, split in splits.items()}
    assert actors["test"] == {1, 4, 9, 22} and actors["validation"] == {2, 5, 14, 15, 16}
    row = splits["test"][1]
    assert row["vision_features"] == [[0.5, names.index(row["id"])]]
    (tmp_path / "openface_action_units.csv").write_text("\n".join(["id,AU01_r,AU02_r", *lines[1:]]))
    with pytest.raises(ValueError, match=f"openface_action_units.csv: got no row {names[0]}"):
        load_corpus("ravdess", tmp_path)
    with pytest.raises(ValueError, match="fold: got 6, wanted an integer from 1 to 5"):
        load_corpus("ravdess", tmp_path, fold=6, folds="published")
    with pytest.raises(ValueError, match="folds: got 'random', wanted one of ordered, published"):
        load_corpus("ravdess", tmp_path, folds="random")


def test_published_ravdess_with_faces_has_the_folds_of_its_table():
    folder = published("ravdess_av")
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        table = {row["file"][:-5]: int(row["fold"]) for row in csv.DictReader(file)}
    for fold in range(1, 6):
        splits = load_corpus("ravdess", folder, fold=fold, folds="published", validation=False)
        assert set(splits["test"]["id"]) == {name for name, number in table.items() if number == fold}
        assert len(splits["test"][0]["vision_features"][0]) == 35


# --- CASIA -----------------------------------------------------------------------------------------------------------


def test_casia_holds_out_a_speaker(tmp_path):
    rows = ["file,speaker,emotion_zh"]
    for speaker in range(1, 5):
        for number, emotion in enumerate(casia.EMOTIONS):
            (tmp_path / f"{speaker}_{number}.flac").touch()
            rows.append(f"{speaker}_{number}.flac,{speaker},{emotion}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    splits = load_corpus("casia", tmp_path, fold=4)
    assert {row_id[0] for row_id in splits["test"]["id"]} == {"4"}
    assert {row_id[0] for row_id in splits["validation"]["id"]} == {"1"} and splits["train"].num_rows == 12
    assert set(splits["train"]["emotion"]) == set(casia.EMOTIONS) == set(BUILTIN_TASKS["casia"].labels)
    assert clusters_of("casia", ["4_201"], [None]) == ("speakers", ["4"])
    nested = ["file,speaker,emotion_zh"]  # equal names in the folders of speakers and emotions
    for row in rows[1:]:
        name, speaker, emotion = row.split(",")
        (tmp_path / speaker / name[2]).mkdir(parents=True)
        (tmp_path / speaker / name[2] / "201.wav").touch()
        nested.append(f"{speaker}/{name[2]}/201.wav,{speaker},{emotion}")
    (tmp_path / "metadata.csv").write_text("\n".join(nested), encoding="utf-8")
    ids = [row_id for split in load_corpus("casia", tmp_path, fold=4).values() for row_id in split["id"]]
    assert len(set(ids)) == 24 and clusters_of("casia", ids[-1:], [None]) == ("speakers", ["4"])
    (tmp_path / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "1_0.flac").unlink()
    with pytest.raises(FileNotFoundError, match="1_0.flac: no such file"):
        load_corpus("casia", tmp_path)
    (tmp_path / "1_0.flac").touch()
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, "1_1.flac,5,高兴"]), encoding="utf-8")
    with pytest.raises(ValueError, match="metadata.csv: line 26: got speaker '5' and emotion '高兴', wanted 1 to 4"):
        load_corpus("casia", tmp_path)
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, rows[1]]), encoding="utf-8")
    with pytest.raises(ValueError, match="metadata.csv: line 26: got 1_0.flac again, wanted each clip once"):
        load_corpus("casia", tmp_path)
    (tmp_path / "metadata.csv").write_bytes("\n".join(rows).encode("gbk"))
    with pytest.raises(ValueError, match="line 2: got a byte .* that is not UTF-8, wanted the file saved as UTF-8"):
        load_corpus("casia", tmp_path)


@pytest.mark.parametrize("corpus", ["casia", "mvsa", "ravdess"])
def test_an_option_that_is_no_flag_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="validation: got 'false', wanted true or false"):
        load_corpus(corpus, tmp_path, validation="false")


def test_published_casia():
    splits = load_corpus("casia", published("casia"), fold=2)
    assert {name: split.num_rows for name, split in splits.items()} == {"train": 600, "validation": 300, "test": 300}


# --- MVSA ------------------------------------------------------------------------------------------------------------


def test_mvsa_as_published_and_as_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    labels = ["positive,positive", "neutral,negative", "positive,negative", "neutral,neutral"] * 10
    for number in range(40):
        (tmp_path / "data" / f"{number}.txt").write_text(f"tweet {number // 2}\n", encoding="utf-8")
        (tmp_path / "data" / f"{number}.jpg").touch()
    table = "".join(f"{number}\t{label}\n" for number, label in enumerate(labels))
    (tmp_path / "labelResultAll.txt").write_text("ID\ttext,image\n" + table)
    folds = [load_corpus("mvsa", tmp_path, fold=fold)["test"] for fold in range(1, 6)]
    rows = {row["id"]: (row, fold) for fold, rows in enumerate(folds) for row in rows}
    assert len(rows) == 30 and "2" not in rows  # contradictory labels are left out
    assert rows["0"][0]["emotion"] == "positive" and rows["1"][0]["emotion"] == "negative"
    assert rows["0"][1] == rows["1"][1]  # the same text
    assert rows["3"][0]["video"].endswith("3.jpg") and rows["3"][0]["text"] == "tweet 1"
    three = [
        "neutral,neutral neutral,positive positive,neutral",
        "positive,positive neutral,neutral negative,negative",
    ]
    three.append("negative,neutral negative,neutral positive,positive")  # tabs between the annotators
    table = "".join(f"{number}\t{label}\n".replace(" ", "\t") for number, label in enumerate(three))
    (tmp_path / "labelResultAll.txt").write_text("ID\ttext,image\ttext,image\ttext,image\n" + table)
    found = {
        row["id"]: row["emotion"] for fold in range(1, 6) for row in load_corpus("mvsa", tmp_path, fold=fold)["test"]
    }
    assert found == {"0": "neutral", "2": "negative"}  # 1 has no majority
    columns = {"id": [7, 8], "text": ["so", "no"], "sentiment": ["neutral", "positive"], "fold": [1, 3]}
    columns["vision_features"] = [[0.5] * 2560, [1.0] * 2560]
    pq.write_table(pa.table(columns), tmp_path / "mvsa.parquet")
    splits = load_corpus("mvsa", tmp_path, fold=3)
    assert splits["test"]["id"][:] == ["8"] and splits["train"]["emotion"][:] == ["neutral"]
    assert np.asarray(splits["test"][0]["vision_features"]).shape == (2, 1280)


def test_published_mvsa():
    splits = load_corpus("mvsa", published("mvsa"), fold=1)
    assert sum(split.num_rows for split in splits.values()) == 4000
    assert set(splits["test"]["emotion"]) == set(BUILTIN_TASKS["mvsa"].labels)
