"""Running the commands of an experiment: finished ones are skipped, a failed one is repeated, paths do not travel."""

import subprocess

import pytest

from experiments.running import NAMES, VARIANTS, run_steps


WRITE = "import sys; print('so'); open(sys.argv[1], 'a').write('made')"


def test_every_variant_has_a_name():
    assert list(NAMES) == list(VARIANTS)


def test_finished_steps_are_skipped_and_failed_ones_repeated(tmp_path):
    folder, tower = tmp_path / "runs/full_1", tmp_path / "elsewhere/whisper-base"
    first = ["-c", WRITE, str(folder / "one.txt"), str(tower), str(tmp_path / "data/clips"), "owner/name"]
    steps = [(first, "one.txt"), (["-c", "raise SystemExit(3)"], "two.txt")]
    shown = {str(tmp_path / "data"): "DIR", str(tmp_path / "runs"): "RUNS_DIR"}
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            run_steps(folder, steps, shown)
    assert (folder / "one.txt").read_text() == "made" and (folder / "output.txt").read_text() == "so\n"
    said = (folder / "command.txt").read_text()
    assert str(tmp_path) not in said and "RUNS_DIR/full_1/one.txt whisper-base DIR/clips owner/name" in said
    steps[1] = (["-c", WRITE, str(folder / "two.txt")], "two.txt")
    run_steps(folder, steps, shown)
    assert (folder / "one.txt").read_text() == (folder / "two.txt").read_text() == "made"
    with pytest.raises(ValueError, match=r"full_1: two.txt was made by `python -c .*`, wanted another folder for `"):
        run_steps(folder, [steps[0], (["-c", WRITE, str(folder / "two.txt"), "--validation"], "two.txt")], shown)
