"""The search of learning rates that small scale begins with: what is tried, chosen, and run then."""
import dataclasses
import importlib
import math
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from data import SETS
from harness.host import ROOT
from paper_figures.results_csv import read_results
from sweeps import cluster, search, sweep
from sweeps.grid import make_runs
from sweeps.parts import make_parts

sys.path.insert(0, str(Path(__file__).parent))
import tiny_experiment

SEARCHING = ("ablate_coupling", "compare_vit_cnn", "ablate_block_depth", "scaling", "ablate_splits", "ablate_layers", "main_results",
             "draw_samples")
HOW = search.Search(arm=("heads",), factors=(3, 9, 27))  # of two steps 0.09 is the best rate
BESIDE = dataclasses.replace(
    tiny_experiment.EXPERIMENT, name="tiny_experiment_lengths",
    configs=lambda scale: [dataclasses.replace(point, config=dataclasses.replace(point.config, total_steps=2))
                           for point in tiny_experiment.configs("smoke")[:2]])
EXPERIMENT = dataclasses.replace(tiny_experiment.EXPERIMENT, search={"smoke": HOW}, seeds={"smoke": 2}, also=(BESIDE,))
# what is trained: of two arms, and beside it a run of one of them
OTHER = dataclasses.replace(BESIDE, configs=lambda scale: BESIDE.configs(scale)[1:])
TRAINED = dataclasses.replace(EXPERIMENT, configs=lambda scale: tiny_experiment.configs("smoke")[:2], also=(OTHER,))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A search of two steps on embedded images, evaluated on eight of each split."""
    monkeypatch.setattr(search, "DATA", "cifar10-subset-vehicles")
    monkeypatch.setattr(search, "EPOCHS", 0.02)
    tiny_experiment.evaluate_few(monkeypatch)
    # learning rates are a column that may differ at this scale, too
    monkeypatch.setattr("paper_figures.results_csv.SEARCHED", ("smoke", "small"))


def run(folder, *flags, experiment=TRAINED):
    sweep.main(experiment, ["--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"),
                            "--figures-dir", str(folder / "figures"), *flags])


def rows_of(folder, name):
    return pd.read_csv(folder / f"results/tiny_experiment{name}.csv", dtype={"heads": str})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick.__wrapped__(monkeypatch)
        run(folder)
    return folder


def chosen(folder):
    """{arm: the rate with the fewest bits/dim of its three}, from the search's CSV alone."""
    found = rows_of(folder, "_search_smoke")
    found = found[found["split"] == "test"]
    return {heads: of_arm.loc[of_arm["bits_per_dim"].idxmin(), "lr"] for heads, of_arm in found.groupby("heads")}


def test_one_command_searches_chooses_and_runs_the_grid_with_what_it_found(finished):
    found = rows_of(finished, "_search_smoke")
    assert len(found) == 2 * 6 and set(found["seed"]) == {0} and set(found["dataset"]) == {"cifar10-subset-vehicles"}
    assert set(found["lr"]) == {0.03, 0.09, 0.27}
    assert all(len(of_arm["bits_per_dim"].unique()) == 3 for _, of_arm in found[found["split"] == "test"].groupby("heads"))
    for name, seeds, heads in (("_smoke", {0, 1}, {"1", "2"}), ("_lengths_smoke", {0}, {"2"})):
        rows = rows_of(finished, name)
        assert set(rows["seed"]) == seeds and set(rows["heads"]) == heads
        assert all(row.lr == chosen(finished)[row.heads] for row in rows.itertuples())
    assert {path.name for path in (finished / "runs").iterdir()} == {
        "tiny_experiment_smoke", "tiny_experiment_search_smoke", "tiny_experiment_lengths_smoke"}


def test_again_nothing_is_trained_and_the_files_are_the_same(finished, capsys):
    before = {path: path.read_bytes() for path in (finished / "results").glob("*.csv")}
    run(finished)
    assert "11 runs in" in (said := capsys.readouterr().out) and "11 of them done" in said
    assert len(before) == 3 and before == {path: path.read_bytes() for path in before}


def test_whoever_has_the_csv_of_the_search_need_not_search_again(finished, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    name = "results/tiny_experiment_search_smoke.csv"
    (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(tmp_path, "--dry-run")
    assert "5 runs (5 new)" in (said := capsys.readouterr().out) and "searched for" not in said
    run(tmp_path, "--seeds", "1")
    assert not list((tmp_path / "runs/tiny_experiment_search_smoke").iterdir())
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()  # and it is still there
    same = [rows.set_index(["run_id", "split"])["bits_per_dim"] for rows in (rows_of(tmp_path, "_smoke"), rows_of(finished, "_smoke"))]
    assert same[0].equals(same[1].loc[same[0].index])


def test_what_waits_for_its_rate_is_shown_and_has_no_folder(tmp_path, capsys):
    run(tmp_path, "--dry-run", experiment=EXPERIMENT)
    said = capsys.readouterr().out
    assert "17 runs (17 new)" in said and said.count("searched for") == 8 and max(map(len, said.splitlines())) <= 100
    run(tmp_path, "--status", experiment=EXPERIMENT)
    said = capsys.readouterr().out
    assert said.count("awaits the search of its rate") == 8 and "17 runs: 17 new" in said
    assert not (tmp_path / "runs").exists()


def test_shards_bring_the_search_of_their_arms_and_merge_to_the_whole(finished, tmp_path):
    for part, left in (("1", ()), ("2", ("*_search_smoke",))):  # one has all runs, the other only those of the grids
        ignored = shutil.ignore_patterns("checkpoint*", *left)
        shutil.copytree(finished / "runs", tmp_path / part / "runs", ignore=ignored)
    for part in ("1/2", "2/2"):
        run(tmp_path / part[0], "--shard", part)
        for path in (tmp_path / part[0] / "results").rglob("*.csv"):
            (tmp_path / "results").mkdir(exist_ok=True)
            (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    for part, arms in (("1", "12"), ("2", "2")):
        own = {path.name.split("_seed")[0] for path in (tmp_path / part / "runs/tiny_experiment_search_smoke").iterdir()}
        assert own == {f"heads={heads}_{lr}" for heads in arms for lr in (0.03, 0.09, 0.27)}
    run(tmp_path, "--collect")
    for name in ("_search_smoke", "_smoke", "_lengths_smoke"):
        columns = ["run_id", "split", "bits_per_dim", "lr"]
        assert rows_of(tmp_path, name)[columns].equals(rows_of(finished, name)[columns]), name


def test_a_shard_without_an_arm_does_not_search_it(tmp_path, capsys):
    run(tmp_path, "--shard", "2/4", "--seeds", "1", "--dry-run", experiment=EXPERIMENT)  # of 3 runs and 2 beside them
    said = capsys.readouterr().out
    assert "4 runs (4 new)" in said and said.count("heads=2") == 4


def test_a_shard_may_have_runs_beside_the_grid_alone(tmp_path):
    run(tmp_path, "--shard", "5/5", "--seeds", "1", experiment=dataclasses.replace(EXPERIMENT, search={}))
    assert [path.name for path in (tmp_path / "results").glob("*.csv")] == ["tiny_experiment_lengths_smoke.shard-5-of-5.csv"]


def test_what_lies_beside_a_grid_is_collected_when_the_grid_was(finished, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    grid, beside, found = (tmp_path / f"results/tiny_experiment{name}_smoke.csv" for name in ("", "_lengths", "_search"))
    for path in (grid, beside, found):
        path.write_bytes((finished / "results" / path.name).read_bytes())
    with pytest.raises(SystemExit, match="no run of smoke scale has finished: nothing to collect"):
        run(tmp_path, "--collect")
    before = grid.read_bytes()
    beside.rename(beside.with_suffix(".shard-5-of-5.csv"))
    run(tmp_path, "--collect")
    assert str(beside) in capsys.readouterr().out and len(rows_of(tmp_path, "_lengths_smoke")) == 2
    assert grid.read_bytes() == before


def test_a_rate_is_chosen_where_the_best_lies_inside_and_the_search_is_widened_where_it_does_not(tmp_path,
                                                                                                     monkeypatch):
    runs = make_runs(search.search_of(EXPERIMENT, "smoke"), "smoke", [0], tmp_path)

    def found(*bits):
        rates = search.find_rates(HOW, runs, {run.run_id: number for run, number in zip(runs, bits) if number})
        return rates.factors, rates.tried
    assert found(2, 1, 3, 6, 5, 4, 4, 5, 6) == ({("1",): 9}, {("2",): (3, 9, 27, 81), ("4",): (1, 3, 9, 27)})
    assert found(1, 1, 2, 2, 1, 1, 1, 1, 1)[0] == {("1",): 3, ("2",): 9, ("4",): 3}  # no rate beyond is better
    monkeypatch.setattr(search, "WIDEST", 0)
    assert found(2, 1, 3, 6, 5, 4, 4, 5, 6) == ({("1",): 9, ("2",): 27, ("4",): 3}, {})
    nothing, not_finite = None, math.inf
    assert found(2, 1, not_finite, 2, nothing, 3, *[not_finite] * 3) == ({("1",): 9}, {})


def test_a_search_goes_on_until_the_best_rate_lies_inside(tmp_path):
    narrow = dataclasses.replace(TRAINED, search={"smoke": search.Search(arm=("heads",), factors=(2, 4, 8))}, also=(),
                                 seeds={})
    run(tmp_path, "--shard", "1/2", experiment=narrow)
    assert not rows_of(tmp_path, "_smoke.shard-1-of-2").empty and not (tmp_path / "results/tiny_experiment_smoke.csv").exists()
    run(tmp_path, experiment=narrow)
    rates = [0.02, 0.04, 0.08, 0.16, 0.32]
    assert {heads: sorted(set(of_arm["lr"])) for heads, of_arm in rows_of(tmp_path, "_search_smoke").groupby("heads")} \
        == {"1": rates, "2": rates[:4]}
    assert dict(rows_of(tmp_path, "_smoke")[["heads", "lr"]].values) == {"1": 0.16, "2": 0.08} == chosen(tmp_path)
    assert set(rows_of(tmp_path, "_search_smoke")["grid_points"]) == {9}


def test_an_arm_that_fails_leaves_its_runs_out_and_the_others_go_on(tmp_path):
    once = dataclasses.replace(TRAINED, seeds={}, also=())
    parts = make_parts(once, sweep.make_parser(once).parse_args(
        ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results")]))
    folder = parts[0].grid[0].folder
    folder.parent.mkdir(parents=True)
    folder.touch()  # where it would have to be
    with pytest.raises(SystemExit, match="2 of 8 runs failed: heads=1 0.03 seed 0: .*; heads=1 seed 0: the search of its"):
        run(tmp_path, experiment=once)
    assert set(rows_of(tmp_path, "_smoke")["heads"]) == {"2"}
    folder.unlink()
    run(tmp_path, experiment=once)
    assert set(rows_of(tmp_path, "_smoke")["heads"]) == {"1", "2"}


def test_on_a_cluster_the_search_comes_first_and_the_rest_when_it_is_over(finished, tmp_path, monkeypatch, capsys):
    submitted = []
    monkeypatch.setattr(cluster, "check_slurm", lambda: None)
    monkeypatch.setattr(cluster, "submit", lambda runs, name, *more: submitted.append((name, len(runs))) or ["7"])
    flags = ("--cluster", "slurm", "--partition", "p", "--allow-dirty")
    run(tmp_path, *flags)
    assert submitted == [("tiny_experiment_search_smoke", 6)]
    assert "5 runs await the search of their learning rates: give the same command" in capsys.readouterr().out
    name = "results/tiny_experiment_search_smoke.csv"
    (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(tmp_path, *flags)
    assert submitted[1:] == [("tiny_experiment_smoke", 4), ("tiny_experiment_lengths_smoke", 1)]
    assert "await" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SEARCHING)
def test_every_experiment_of_small_scale_searches_and_trains_5_epochs(name, monkeypatch):
    monkeypatch.undo()
    declared = importlib.import_module(f"experiments.{name}").EXPERIMENT
    owner = declared.runs_of or declared
    how, found = owner.search["small"], search.search_of(declared, "small")
    assert len(how.factors) == 3 and found.name == f"{owner.name}_search"
    arms = {tuple(point.values(how.arm).values()) for one in (owner, *owner.also) for point in one.configs("small")}
    points = found.configs("small")
    assert len(points) == 3 * len(arms) == len({point.config.hash for point in points})
    for point in points:
        assert point.config.data == "cifar10-search" and point.config.total_steps * point.config.batch_size == 45_000
        assert point.config.lr in (6e-3, 1.2e-2, 2.4e-2)
    for point in declared.configs("small"):
        config = point.config
        assert tuple(point.values(how.arm).values()) in arms
        epochs = config.total_steps * config.batch_size / SETS[config.data].counts["train"]
        assert epochs >= (100 if config.data == "cifar10-subset" else 5) or not config.total_steps
    for scale in ("smoke", "medium", "paper"):
        assert search.search_of(declared, scale) is None and not any(one.configs(scale) for one in declared.also)


def test_figure_2_has_three_training_lengths_and_patches_of_two_pixels():
    for name, arms in (("compare_vit_cnn", 2), ("ablate_block_depth", 6)):
        (beside,) = importlib.import_module(f"experiments.{name}").EXPERIMENT.also
        epochs = [(float(point.labels["epochs"]), point.config) for point in beside.configs("small")]
        assert all(config.total_steps * config.batch_size == 50_000 * number for number, config in epochs)
        assert {number for number, _ in epochs} >= {0.5, 1.5}
    fine = [(config.model.block, number) for number, config in epochs if config.model.patch_size == 2]
    assert not fine  # of Figure 2a alone
    points = importlib.import_module("experiments.compare_vit_cnn").ALSO.configs("small")
    fine = [(point.config.model.block, point.labels["epochs"]) for point in points if point.config.model.patch_size == 2]
    assert sorted(fine) == sorted((block, epochs) for block in ("vit", "cnn") for epochs in ("0.5", "1.5", "5"))
    assert {point.config.model.emb_dim for point in points if point.config.model.patch_size == 2} == {32}


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*_search_small.csv")), ids=lambda path: path.stem)
def test_committed_searches_are_those_of_the_grids(path, monkeypatch):
    monkeypatch.undo()
    declared = importlib.import_module(f"experiments.{path.stem.removesuffix('_search_small')}").EXPERIMENT
    found, runs, _ = search.runs_of_search(declared, "small", ROOT, path.parent)
    rows = read_results(path, found.name, found.swept, found.varying)
    assert set(rows["run_id"]) <= {run.run_id for run in runs}
