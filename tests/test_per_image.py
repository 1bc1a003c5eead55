"""Bits/dim image by image: in run folders, beside CSVs, and compared."""
import dataclasses
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data import load_images
from evaluate import evaluate
from convert import load_jet
from experiments import compare
from harness.errors import TrainingError
from harness.run_folder import read_done, read_per_image
from paper_figures import per_image
from paper_figures.results_csv import ResultsError
from sweeps import sweep
from train import train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_experiment


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny experiment of two seeds that is finished, run as two shards and merged."""
    home = tmp_path_factory.mktemp("home")
    for flags in (["--shard", "1/2"], ["--shard", "2/2"], ["--collect"]):
        sweep.main(tiny_experiment.EXPERIMENT, [*folders(home), "--seeds", "2", "--jobs", "1", *flags])
    return home


def folders(home):
    return ["--runs-dir", str(home / "runs"), "--results-dir", str(home / "results"), "--figures-dir", str(home / "figures")]


def rows_of(home):
    return pd.read_csv(home / "results/tiny_experiment_smoke.csv", keep_default_na=False)


def runs_of(home):
    return sorted(path.parent for path in home.glob("runs/*/*/done.json"))


def test_values_are_those_of_evaluate_and_their_mean_is_the_csv_s(home):
    csv = home / "results/tiny_experiment_smoke.csv"
    rows = rows_of(home)
    test = rows[rows["split"] == "test"].set_index("run_id")
    found = per_image.read_per_image(csv, rows)
    assert found.keys() == set(test.index) and len(found) == len(runs_of(home)) > 2
    for run_id, values in found.items():
        assert values.dtype == np.float32 and abs(values.mean(dtype=float) - test.loc[run_id, "bits_per_dim"]) < 1e-6
    run = runs_of(home)[0]
    images = load_images(read_done(run)["config"]["data"], "test")
    numbers = evaluate(load_jet(run), images, per_image=True)
    assert np.array_equal(found[run.name], numbers["bits_per_dim_per_image"].astype(np.float32))


def test_shards_give_the_file_of_the_whole(home, tmp_path):
    whole = home / "results/per_image/tiny_experiment_smoke.npz"
    for flags in ([], ["--collect"]):  # the runs are done: collected from their folders
        sweep.main(tiny_experiment.EXPERIMENT, [*folders(home)[:2], "--results-dir", str(tmp_path / "results"), "--figures-dir",
                                                str(tmp_path), "--seeds", "2", "--jobs", "1", *flags])
        assert (tmp_path / "results/per_image/tiny_experiment_smoke.npz").read_bytes() == whole.read_bytes()
    for path in (home / "results").glob("*.shard-*.csv"):  # from shards alone, without run folders
        (tmp_path / "other/per_image").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "other")
        shutil.copy(per_image.path_beside(path), tmp_path / "other/per_image")
    sweep.main(tiny_experiment.EXPERIMENT, ["--runs-dir", str(tmp_path / "none"), "--results-dir", str(tmp_path / "other"),
                                            "--figures-dir", str(tmp_path), "--seeds", "2", "--collect"])
    assert (tmp_path / "other/per_image/tiny_experiment_smoke.npz").read_bytes() == whole.read_bytes()


def test_the_table_says_how_far_each_is_behind_the_best_of_its_seed(home, capsys):
    sweep.main(tiny_experiment.EXPERIMENT, [*folders(home), "--seeds", "2", "--collect"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["1"], ["2"], ["4"])]
    rows = rows_of(home)
    test = rows[rows["split"] == "test"]
    found = per_image.read_per_image(home / "results/tiny_experiment_smoke.csv", rows)
    for seed, group in test.groupby("seed"):
        best = group.sort_values("bits_per_dim")["run_id"].iloc[0]
        for _, row in group.iterrows():
            line, = [line for line in lines if line.split()[:2] == [str(row["heads"]), str(seed)]]
            change = found[row["run_id"]].astype(float) - found[best].astype(float)
            error = change.std(ddof=1) / math.sqrt(len(change))
            assert row["run_id"] == best or line.endswith(f" {change.mean():.4f} {error:.4f}")


def test_other_values_are_refused(home, tmp_path):
    run = shutil.copytree(runs_of(home)[0], tmp_path / "run")
    values = np.load(run / "per_image.npy")
    for wrong in (values[:-1], values.astype(float), values + np.float32(1e-5), np.full_like(values, np.nan)):
        np.save(run / "per_image.npy", wrong)
        with pytest.raises(TrainingError, match="delete it and done.json"):
            read_per_image(run, read_done(run))
        csv = tmp_path / "results" / "tiny_experiment_smoke.csv"
        per_image.path_beside(csv).parent.mkdir(parents=True, exist_ok=True)
        per_image.write_per_image(csv, {runs_of(home)[0].name: wrong})
        with pytest.raises(ResultsError, match="--collect makes it again"):
            per_image.read_per_image(csv, rows_of(home))
    per_image.path_beside(csv).write_bytes(b"PK")
    with pytest.raises(ResultsError, match="not readable"):
        per_image.read_per_image(csv, rows_of(home))
    (run / "per_image.npy").unlink()  # of an older version
    assert read_per_image(run, read_done(run)) is None


def test_the_paired_error_is_that_of_the_differences():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.5, 3.0])
    mean, error = per_image.paired_difference(a, b)
    assert mean == pytest.approx(2 / 3) and error == pytest.approx(np.std([0.5, 0.5, 1.0], ddof=1) / math.sqrt(3))
    assert math.isnan(per_image.paired_difference(a[:1], b[:1])[1])


# ---- compare.py

def compared(capsys, *arguments):
    compare.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_two_runs_are_compared_as_measured_and_as_measured_again(home, tmp_path, monkeypatch, capsys):
    one, other = runs_of(home)[:2]
    data = read_done(one)["config"]["data"]
    said = compared(capsys, one, other, "--data", data, "--out", tmp_path / "a.png")
    mean, error = per_image.paired_difference(*(np.load(run / "per_image.npy") for run in (one, other)))
    assert f"A - B {mean:+.5f} +- {error:.5f} bits/dim" in said and "as the runs have measured them" in said
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    monkeypatch.setattr(compare.differences, "draw", lambda *_: None)
    again = compared(capsys, one / "checkpoint.pt", other / "checkpoint.pt", "--data", data, "--out", tmp_path / "b.png")
    assert f"A - B {mean:+.5f} +- {error:.5f} bits/dim" in again and "measured now" in again


def test_equal_weights_differ_by_exactly_nothing(home, tmp_path, monkeypatch, capsys):
    one = runs_of(home)[0]
    monkeypatch.setattr(compare.differences, "write_atomically", lambda *_: None)
    said = compared(capsys, one, one / "checkpoint.pt", "--data", read_done(one)["config"]["data"], "--out", tmp_path / "a.png")
    assert "A - B +0.00000 +- 0.00000 bits/dim, image by image" in said


def test_a_mistake_is_one_line(home, tmp_path, capsys):
    one = runs_of(home)[0]
    for flags, message in ((["--out", tmp_path / "a.pdf"], "must be the name of a .png file"),
                           (["--out", tmp_path / "none/a.png"], "a folder that exists"),
                           (["--out", tmp_path / "a.png", "--num-images", "0"], "--num-images 0: must be 1 or more")):
        with pytest.raises(SystemExit, match=message):
            compared(capsys, one, one, "--data", "cifar10-subset", *flags)
