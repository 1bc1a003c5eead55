"""The grid of Figure 4, and a sweep's conduct: skip, resume, shard, collect, refuse."""
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

import train as train_module
from experiments import ablate_coupling, sweep
from jet import SPATIAL_SPLITS, Jet, JetConfig
from paper_figures import figure4
from paper_figures.results_csv import columns

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import tiny_experiment

TIMES = ["train_seconds"]


def run(folder, *flags, configs=tiny_experiment.configs, draw=tiny_experiment.draw):
    sweep.main("tiny_experiment", "", configs, tiny_experiment.SWEPT, draw, [
        "--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"),
        "--figures-dir", str(folder / "figures"), *flags])


def csv(folder, name="tiny_experiment_smoke.csv"):
    return folder / "results" / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "--seeds", "2")
    return folder


# ---- the grid of Figure 4

@pytest.mark.parametrize("scale, count", [("smoke", 13), ("small", 20), ("medium", 21), ("paper", 21)])
def test_grid_covers_every_ratio_and_split_once(scale, count):
    points = ablate_coupling.configs(scale)
    assert len(points) == count == len({point.config.model.coupling_splits for point in points})
    covered = Counter((ratio, split) for point in points for ratio in point.labels["coupling_ratio"].split("|")
                      for split in point.labels["spatial_split"].split("|"))
    assert covered == Counter((ratio, split) for ratio in figure4.ratios(scale) for split in figure4.SPLITS)
    assert len({dataclasses.replace(point.config, model=JetConfig()) for point in points}) == 1
    assert len({point.config.model.num_couplings for point in points}) == 1


def test_points_with_the_same_couplings_are_one():
    merged = [point.labels for point in ablate_coupling.configs("small") if "|" in "".join(point.labels.values())]
    assert merged == [{"coupling_ratio": "channel-only", "spatial_split": "row|column|checkerboard|mix"},
                      {"coupling_ratio": "8:1", "spatial_split": "checkerboard|mix"}]


def test_mix_takes_one_of_each_family_first_when_there_are_few():
    def mix(scale, ratio):
        point, = [p for p in ablate_coupling.configs(scale) if p.labels == {"coupling_ratio": ratio, "spatial_split": "mix"}]
        return [split for _, split in point.config.model.coupling_splits if split]

    assert mix("smoke", "4:1") == ["checkerboard", "vstripes"]
    assert mix("paper", "8:1") == ["checkerboard", "vstripes", "hstripes"]
    assert mix("paper", "4:1") == list(SPATIAL_SPLITS)


def test_paper_scale_is_the_official_model_and_recipe():
    point, = [p for p in ablate_coupling.configs("paper") if p.labels == {"coupling_ratio": "4:1", "spatial_split": "mix"}]
    assert point.config == train_module.TrainConfig()
    assert sweep.num_parameters(point.config.model) == 207_177_216
    assert abs(sweep.train_flops(point.config) / 9e19 - 1) < 0.1
    large = dataclasses.replace(point.config.model, num_couplings=64, block_depth=5)
    assert round(sweep.num_parameters(large) / 1e6, 1) == 1019.6


@pytest.mark.parametrize("changes", [{}, {"block": "cnn"}, {"split_mode": "masking"}, {"actnorm": True, "invertible_dense": True}])
def test_parameters_are_counted_without_building_the_model(changes):
    model = JetConfig(image_size=(16, 32), num_couplings=7, block_depth=1, emb_dim=16, num_heads=2, **changes)
    assert sweep.num_parameters(model) == sum(parameter.numel() for parameter in Jet(model).parameters())


@pytest.mark.parametrize("scale", sweep.SCALES)
def test_dry_run_lists_every_scale_without_the_data(scale, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JET_DATA", raising=False)
    sweep.main("ablate_coupling", "", ablate_coupling.configs, figure4.SWEPT, None,
               ["--scale", scale, "--dry-run", "--runs-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ablate_coupling.configs(scale)) + 3
    assert all(line.endswith("new") for line in lines[1:-2]) and "training FLOPs in all" in lines[-2]
    assert "GPU-hours: not known" in lines[-1]
    assert list(tmp_path.iterdir()) == []


# ---- conduct

def test_csv_has_a_row_for_each_run_seed_and_split(finished):
    rows = pd.read_csv(csv(finished))
    assert list(rows.columns) == columns(tiny_experiment.SWEPT)
    assert len(rows) == 3 * 2 * 2 and rows["run_id"].nunique() == 6
    assert rows["seed"].tolist() == [0] * 6 + [1] * 6 and set(rows["split"]) == {"train", "test"}
    first = rows.iloc[0]
    assert first["split"] == "test" and first["num_images"] == 512 and first["images_seen"] == 96
    assert first["channel_share"] == 1 and 0 < first["logdet_cap_share"] < 1
    assert first["fingerprint"].startswith("999264") and first["train_fingerprint"].startswith("50bf9f")
    assert rows.notna().drop(columns=["git_commit", "git_dirty"]).all(axis=None)


def test_every_column_is_explained():
    text = (TESTS.parent / "results/README.md").read_text()
    for column in columns(figure4.SWEPT):
        assert f"| `{column}` |" in text, column


def test_the_same_command_again_trains_nothing_and_changes_no_byte(finished, monkeypatch, capsys):
    before = csv(finished).read_bytes()
    monkeypatch.setattr(train_module, "training_step", None)
    run(finished, "--seeds", "2")
    assert csv(finished).read_bytes() == before
    assert "6 runs" in (out := capsys.readouterr().out) and "6 of them done" in out


def test_a_lost_csv_comes_back_from_the_runs(finished):
    before = csv(finished).read_bytes()
    csv(finished).unlink()
    run(finished, "--seeds", "2", "--collect")
    assert csv(finished).read_bytes() == before


def test_sigkill_in_the_middle_and_the_same_command_give_the_same_rows(finished, tmp_path):
    command = [sys.executable, TESTS / "tiny_experiment.py", "--seeds", "2", "--checkpoint-every-s", "0", "--runs-dir",
               tmp_path / "runs", "--results-dir", tmp_path / "results", "--figures-dir", tmp_path / "figures"]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (list(tmp_path.glob("runs/*/*/done.json")) and len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) > 1):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
    assert 0 < len(done) < 6 and not csv(tmp_path).exists()
    run(tmp_path, "--seeds", "2")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # none was run again
    assert pd.read_csv(csv(tmp_path)).drop(columns=TIMES).equals(pd.read_csv(csv(finished)).drop(columns=TIMES))


def test_shards_split_the_grid_and_collect_merges_their_csvs(finished, tmp_path, capsys):
    for part in "12":
        run(tmp_path, "--seeds", "2", "--shard", f"{part}/2", "--runs-dir", str(tmp_path / part))
    pieces = [csv(tmp_path, f"tiny_experiment_smoke.shard-{part}-of-2.csv") for part in "12"]
    assert [pd.read_csv(piece)["run_id"].nunique() for piece in pieces] == [3, 3]
    assert not csv(tmp_path).exists()
    run(tmp_path, "--seeds", "2", "--collect")  # from the CSVs alone: the run folders are elsewhere
    assert pd.read_csv(csv(tmp_path)).drop(columns=TIMES).equals(pd.read_csv(csv(finished)).drop(columns=TIMES))
    with pytest.raises(SystemExit, match="is not in this grid"):
        run(tmp_path, "--collect")


def test_a_run_that_is_not_finite_fails_alone(tmp_path, monkeypatch, capsys):
    def fails_for_2_heads(model, optimizer, x, step, config, original=train_module.training_step):
        if config.model.num_heads == 2 and step == 3:
            raise train_module.NonFiniteError("not finite at step 3")
        return original(model, optimizer, x, step, config)
    monkeypatch.setattr(train_module, "training_step", fails_for_2_heads)
    with pytest.raises(SystemExit, match="1 of 3 runs failed: 2 seed 0: not finite at step 3"):
        run(tmp_path)
    assert pd.read_csv(csv(tmp_path))["heads"].unique().tolist() == [1, 4]


def test_dry_run_tells_the_state(finished, tmp_path, capsys):
    run(finished, "--seeds", "3", "--dry-run")
    assert "9 runs (6 done, 3 new)" in capsys.readouterr().out
    point = tiny_experiment.configs("smoke")[0]
    train_module.train(point.config, point.run(0, tmp_path / "runs/tiny_experiment_smoke").folder, stop_after=1, quiet=True)
    run(tmp_path, "--dry-run")
    assert "3 runs (1 stopped, 2 new)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--scale", "large"], "invalid choice: 'large'"), (["--seeds", "0"], "--seeds 0: must be 1 or more"),
    (["--shard", "3/2"], "--shard 3/2: must be i/n"), (["--shard", "half"], "--shard half: must be i/n"),
    (["--shard", "4/4"], "--shard 4/4: the grid has only 3 runs"),
    (["--seed", "1"], "unrecognized arguments: --seed 1 (did you mean --seeds?)"), (["--collect"], "nothing to collect"), (["--results-dir", "/dev/null/x"], "/dev/null/x"),
    (["--device", "tpu"], "device 'tpu'")])
def test_a_users_mistake_is_one_line_and_a_failure(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags)
    error = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code + "\n"
    assert stop.value.code not in (0, None) and error.count("\n") == 1 and message in error


def test_smoke_runs_on_one_thread_by_default(finished):
    assert set(pd.read_csv(csv(finished))["threads"]) == {1}
