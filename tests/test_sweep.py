"""The grid of Figure 4, and a sweep's conduct: skip, resume, shard, collect, refuse."""
import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import recipe
from experiments import ablate_coupling
from harness import run_folder
from harness.claim import Claim
from harness.errors import NonFiniteError, TrainingError
from harness.flags import one_line_errors
from harness.flops import num_parameters, train_flops
from harness.host import ROOT, code_version
from jet import SPATIAL_SPLITS, JetConfig
from paper_figures import style
from paper_figures.results_csv import ResultsError, columns, final_rows
from recipe import TrainConfig
from sweeps import cluster, local, plan, sweep
from sweeps.grid import Experiment, Point, make_runs
from tests import forked, tiny_experiment
from train import train

TESTS = Path(__file__).parent

TIMES = ["train_seconds"]
TINY = tiny_experiment.EXPERIMENT
CHAIN = dataclasses.replace(TINY, configs=lambda scale: tiny_experiment.chain())
VARYING_CHAIN = dataclasses.replace(CHAIN, varying=("lr", "total_steps", "init"))
SHARED = dataclasses.replace(TINY, configs=lambda scale: tiny_experiment.shared())
SWEPT = ablate_coupling.EXPERIMENT.swept


def arguments(folder, *flags):
    return ["--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"),
            "--figures-dir", str(folder / "figures"), *flags]


def run(folder, *flags, experiment=TINY):
    sweep.main(experiment, arguments(folder, *flags))


def tiny_runs(folder, seeds=1, experiment=TINY, **settings):
    """The runs of the experiment at smoke scale, in its folder or that of a command here."""
    folder = folder / "runs/tiny_experiment_smoke"
    return make_runs(experiment, "smoke", range(seeds), folder, **settings)


def csv(folder, name="tiny_experiment_smoke.csv"):
    return folder / "results" / name


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_experiment.evaluate_few(monkeypatch)
        yield


@pytest.fixture(scope="module")
def finished(few_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "--seeds", "2")
    return folder


@pytest.fixture
def forked_workers(monkeypatch):
    """Processes of --jobs begin as forks of this one, without seconds of imports, and are told what can be pickled."""
    def process(target, args):
        return forked.FORK.Process(target=target, args=pickle.loads(pickle.dumps(args)))
    monkeypatch.setattr(local.multiprocessing, "get_context", {"spawn": SimpleNamespace(Process=process)}.__getitem__)


# ---- the grid of Figure 4

RATIOS = {"smoke": ("channel-only", "4:1", "1:1", "spatial-only")} | dict.fromkeys(
    style.SCALES[1:], ("channel-only", "8:1", "4:1", "2:1", "1:1", "spatial-only"))
SPLITS = ("row", "column", "checkerboard", "mix")


def coupling_runs(scale):
    return make_runs(ablate_coupling.EXPERIMENT, scale, range(1), ROOT)


def coupling_config(scale, ratio, split):
    run, = [run for run in coupling_runs(scale) if {"coupling_ratio": ratio, "spatial_split": split} in run.points]
    return run.config


@pytest.mark.parametrize("scale, count", [*zip(style.SCALES, (13, 20, 21, 21))])
def test_grid_covers_every_ratio_and_split_once(scale, count):
    runs, points = coupling_runs(scale), ablate_coupling.configs(scale)
    assert len(runs) == count == len({run.config.model.coupling_splits for run in runs})
    covered = [tuple(values.values()) for run in runs for values in run.points]
    assert sorted(covered) == sorted(itertools.product(RATIOS[scale], SPLITS))
    assert [tuple(point.values(SWEPT).values()) for point in points] == list(itertools.product(RATIOS[scale], SPLITS))
    assert len({dataclasses.replace(point.config, model=JetConfig()) for point in points}) == 1
    assert len({point.config.model.num_couplings for point in points}) == 1


def test_points_with_the_same_couplings_share_a_run():
    shared = [[tuple(values.values()) for values in run.points]
              for run in coupling_runs("small") if len(run.points) > 1]
    assert shared == [[("channel-only", split) for split in SPLITS], [("8:1", "checkerboard"), ("8:1", "mix")]]


def test_mix_takes_one_of_each_family_first_when_there_are_few():
    def mix(scale, ratio):
        splits = coupling_config(scale, ratio, "mix").model.coupling_splits
        return [split for _, split in splits if split]

    assert mix("smoke", "4:1") == ["checkerboard", "vstripes"]
    assert mix("paper", "8:1") == ["checkerboard", "vstripes", "hstripes"]
    assert mix("paper", "4:1") == list(SPATIAL_SPLITS)


def test_paper_scale_is_the_official_model_and_recipe():
    config = coupling_config("paper", "4:1", "mix")
    assert config == TrainConfig(precision="bfloat16")
    assert num_parameters(config.model) == 207_177_216
    assert abs(train_flops(config) / 9e19 - 1) < 0.1
    large = dataclasses.replace(config.model, num_couplings=64, block_depth=5)
    assert round(num_parameters(large) / 1e6, 1) == 1019.6


@pytest.mark.parametrize("scale", style.SCALES)
def test_dry_run_lists_every_scale_without_the_data(scale, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JET_DATA", raising=False)
    flags = ["--scale", scale, "--dry-run", "--runs-dir", str(tmp_path)]
    sweep.main(ablate_coupling.EXPERIMENT, flags)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    of_runs, said = lines[1:len(coupling_runs(scale)) + 1], " ".join(lines[len(coupling_runs(scale)) + 1:])
    assert all(line.endswith("new") for line in of_runs)
    assert said.index("training FLOPs in all") < said.index("GPU-hours") < said.index("measured hours: not known")
    assert list(tmp_path.iterdir()) == []


# ---- conduct

def test_csv_has_a_row_for_each_run_seed_and_split(finished):
    rows = pd.read_csv(csv(finished))
    assert list(rows.columns) == columns(TINY.swept)
    assert set(rows["grid_points"]) == {3}
    assert len(rows) == 3 * 2 * 2 and rows["run_id"].nunique() == 6
    assert rows["seed"].tolist() == [0] * 6 + [1] * 6 and set(rows["split"]) == {"train", "test"}
    first = rows.iloc[0]
    assert first["split"] == "test" and first["num_images"] == 8 and first["images_seen"] == 32
    assert first["channel_share"] == 1 and 0 < first["logdet_cap_share"] < 1
    assert first["fingerprint"].startswith("c7dbca")
    assert first["train_fingerprint"].startswith("bc10c6")
    assert rows.notna().drop(columns=["git_commit", "git_dirty", "init"]).all(axis=None)


def test_every_column_is_explained():
    text = (TESTS.parent / "results/README.md").read_text()
    for column in columns(SWEPT):
        assert f"| `{column}` |" in text, column


def test_the_same_command_again_trains_nothing_and_changes_no_byte(finished, monkeypatch, capsys):
    before = csv(finished).read_bytes()
    monkeypatch.setattr(recipe, "training_step", None)
    run(finished, "--seeds", "2")
    assert csv(finished).read_bytes() == before
    assert "6 runs" in (out := capsys.readouterr().out) and "6 of them done" in out


def test_a_lost_csv_comes_back_from_the_runs(finished):
    before = csv(finished).read_bytes()
    csv(finished).unlink()
    run(finished, "--seeds", "2", "--collect")
    assert csv(finished).read_bytes() == before


def test_sigkill_in_the_middle_and_the_same_command_give_the_same_rows(finished, tmp_path):
    killed = started(tmp_path, "--seeds", "9", "--checkpoint-every-s", "0")
    forked.wait_until(lambda: list(tmp_path.glob("runs/*/*/done.json")) and len(list(
        tmp_path.glob("runs/*/*/checkpoint.pt"))) > 1, killed)
    killed.kill()
    killed.join()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
    assert 0 < len(done) < 27 and not csv(tmp_path).exists()
    run(tmp_path, "--seeds", "2")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # none was run again
    assert same_rows(tmp_path, finished)


def test_shards_split_the_grid_and_collect_merges_their_csvs(finished, tmp_path, capsys):
    shutil.copytree(finished / "runs", tmp_path / "2")  # one has all runs: its CSV has its own alone
    for part in "12":
        run(tmp_path, "--seeds", "2", "--shard", f"{part}/2", "--runs-dir", str(tmp_path / part))
    pieces = [csv(tmp_path, f"tiny_experiment_smoke.shard-{part}-of-2.csv") for part in "12"]
    assert [pd.read_csv(piece)["run_id"].nunique() for piece in pieces] == [3, 3]
    assert not csv(tmp_path).exists()
    run(tmp_path, "--seeds", "2", "--collect")  # from the CSVs alone: the run folders are elsewhere
    assert same_rows(tmp_path, finished)
    with pytest.raises(SystemExit, match="is not in this grid"):
        run(tmp_path, "--collect")
    pieces[0].write_text(pieces[0].read_text().replace(",0,3,1,1.0,", ",0,3,9,1.0,"))
    with pytest.raises(SystemExit, match="no run of this grid has heads = 9: run the shard again"):
        run(tmp_path, "--seeds", "2", "--collect")


def test_a_run_that_raises_fails_alone_and_is_told(tmp_path, monkeypatch, capsys):
    def fails_for_2_heads(model, optimizer, x, step, config, *more, original=recipe.training_step):
        if config.model.num_heads == 2 and step == 3:
            raise NonFiniteError("not finite at step 3")
        return original(model, optimizer, x, step, config, *more)
    monkeypatch.setattr(recipe, "training_step", fails_for_2_heads)
    failed = "1 of 3 runs failed: heads=2 seed 0: not finite at step 3"
    with pytest.raises(SystemExit, match=failed):
        run(tmp_path)
    assert pd.read_csv(csv(tmp_path))["heads"].unique().tolist() == [1, 4]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--status")
    assert stop.value.code == 1
    out = capsys.readouterr().out
    folder, = tmp_path.glob("runs/*/heads=2_*")
    assert f"failed: heads=2 seed 0: not finite at step 3 ({folder / 'log.txt'})" in out
    assert "3 runs: 2 done, 1 failed" in out
    monkeypatch.undo()
    run(tmp_path)
    assert len(pd.read_csv(csv(tmp_path))) == 6 and not (folder / "error.txt").exists()


def test_a_damaged_result_is_told_and_the_others_are_collected(finished, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    folder, = tmp_path.glob("runs/*/heads=2_seed0_*")
    whole = (folder / "done.json").read_text()
    (folder / "done.json").write_text(whole[:100])
    failed = "1 of 3 runs failed: heads=2 seed 0: .*done.json: damaged"
    with pytest.raises(SystemExit, match=failed):
        run(tmp_path)
    assert pd.read_csv(csv(tmp_path))["heads"].unique().tolist() == [1, 4]
    (folder / "done.json").unlink()
    run(tmp_path)
    again = json.loads((folder / "done.json").read_text())
    assert again["bits_per_dim"] == json.loads(whole)["bits_per_dim"]


def started(folder, *flags, out=os.devnull):
    return forked.start(TESTS / "tiny_experiment.py", *arguments(folder, *flags), out=out)


def same_rows(one, two, seeds=2):
    rows, others = (pd.read_csv(csv(folder)).drop(columns=TIMES) for folder in (one, two))
    return rows.equals(others[others["seed"] < seeds])


def each_run_once(folder, count):
    logs = [path.read_text() for path in folder.glob("runs/*/*/log.txt")]
    return len(logs) == count and all(log.count("started at step 0") == log.count("finished") == 1 for log in logs)


def test_jobs_at_the_same_time_give_the_same_rows(finished, tmp_path, forked_workers):
    run(tmp_path, "--jobs", "2")
    assert same_rows(tmp_path, finished, seeds=1) and each_run_once(tmp_path, 3)


def test_sweeps_started_at_the_same_moment_share_the_runs(finished, tmp_path):
    sweeps = [started(tmp_path, out=tmp_path / name) for name in ("one.txt", "two.txt")]
    for one in sweeps:
        one.join(120)
    assert [one.exitcode for one in sweeps] == [0, 0], (tmp_path / "one.txt").read_text()
    assert same_rows(tmp_path, finished, seeds=1) and each_run_once(tmp_path, 3)
    assert not list(tmp_path.rglob(".*"))


def test_workers_end_with_their_parent(tmp_path, forked_workers):
    def running():
        return [folder for folder in tmp_path.glob("runs/*/*/") if run_folder.is_running(folder)]
    killed = started(tmp_path, "--scale", "small", "--seeds", "2", "--jobs", "2", "--threads", "1")
    forked.wait_until(lambda: len(running()) == 2)
    killed.kill()
    killed.join()
    forked.wait_until(lambda: not running())
    # the parent is at a run, too, and had no time for its checkpoint
    assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == 1
    assert not list(tmp_path.glob("runs/*/*/done.json"))


@pytest.mark.parametrize("flags", [(), ("--jobs", "2")], ids=["one", "jobs"])
def test_runs_begin_with_the_weights_of_the_run_before_them(tmp_path, forked_workers, flags):
    run(tmp_path, *flags, experiment=CHAIN)
    rows = pd.read_csv(csv(tmp_path)).set_index(["heads", "split"])
    first = tiny_runs(tmp_path, experiment=CHAIN)[0].config
    assert rows.loc["as-it-is", "bits_per_dim"].tolist() == rows.loc["1", "bits_per_dim"].tolist()
    assert rows.loc[("then", "test"), "bits_per_dim"] < rows.loc[("1", "test"), "bits_per_dim"]
    assert rows.loc["then", "init"].tolist() == [first.hash] * 2
    assert rows.loc[["1", "2"], "init"].isna().all()
    assert rows.loc["as-it-is", "images_seen"].tolist() == [0, 0]
    assert each_run_once(tmp_path, 4)
    before = csv(tmp_path).read_bytes()
    run(tmp_path, experiment=CHAIN)
    assert csv(tmp_path).read_bytes() == before


@pytest.mark.parametrize("flags", [(), ("--jobs", "2")], ids=["one", "jobs"])
def test_what_begins_with_a_failed_run_fails_with_it_and_is_fixed_by_the_same_command(tmp_path, forked_workers, flags):
    first = tiny_runs(tmp_path, experiment=CHAIN)[0].folder
    first.parent.mkdir(parents=True)
    first.touch()  # where its folder would have to be
    failed = ("3 of 4 runs failed: heads=1 seed 0: .*; then seed 0: heads=1 seed 0, whose weights "
              "it begins with, has not finished")
    with pytest.raises(SystemExit, match=failed):
        run(tmp_path, *flags, experiment=CHAIN)
    first.unlink()
    run(tmp_path, *flags, experiment=CHAIN)
    assert len(pd.read_csv(csv(tmp_path))) == 8


@pytest.mark.parametrize("flags, is_drawn", [
    ((), True), (("--collect",), True), (("--shard", "1/2"), False), (("--status",), False),
    (("--dry-run",), False)])
def test_a_script_that_does_more_is_told_when_the_csv_is_to_be_drawn(finished, tmp_path, flags, is_drawn):
    """Of the runs that have finished; the CSV, of one seed, is another than theirs."""
    parser, place = sweep.make_parser(TINY), ("--results-dir", str(tmp_path))
    asked = sweep.parse(TINY, parser, arguments(finished, *place, *flags))
    assert sweep.carry_out(asked) is is_drawn


def test_a_script_that_does_more_can_refuse_its_flags_before_anything_is_run(tmp_path):
    with pytest.raises(SystemExit, match="3: no"), one_line_errors("x.py"):
        parser = sweep.make_parser(TINY)
        parser.add_argument("--more")
        asked = sweep.parse(TINY, parser, arguments(tmp_path, "--more", "3"))
        raise TrainingError(f"{asked.flags.more}: no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--jobs", "2")], ids=["one", "jobs"])
def test_points_with_the_same_couplings_are_trained_once_and_have_rows_of_their_own(
        tmp_path, capsys, forked_workers, flags):
    run(tmp_path, *flags, experiment=SHARED)
    out, rows = capsys.readouterr().out, pd.read_csv(csv(tmp_path))
    assert "2 runs in" in out and each_run_once(tmp_path, 2)
    assert rows["heads"].tolist() == ["one", "one", "two", "two", "three", "three"]
    assert set(rows["grid_points"]) == {3} and "|" not in csv(tmp_path).read_text()
    one, three = (rows[rows["heads"] == name].drop(columns="heads").reset_index(drop=True) for name in ("one", "three"))
    assert one.equals(three)
    assert set(rows["run_id"]) == {path.name for path in tmp_path.glob("runs/*/*/")}
    assert one["run_id"][0].startswith("one_seed0_")
    for flag, message in (("--status", "2 runs: 2 done"), ("--dry-run", "2 runs (2 done)")):
        run(tmp_path, flag, experiment=SHARED)
        assert message in capsys.readouterr().out
    before = csv(tmp_path).read_bytes()
    run(tmp_path, "--collect", experiment=SHARED)
    assert csv(tmp_path).read_bytes() == before


def test_a_csv_that_lacks_points_of_its_grid_is_known_as_incomplete_from_itself(finished, tmp_path):
    rows, path = pd.read_csv(csv(finished)), tmp_path / "in.csv"

    def read(rows):
        rows.to_csv(path, index=False)
        return final_rows(path, "tiny_experiment", TINY.swept, "Figure 9")
    assert len(read(rows)) == 12
    fix = "complete them by experiments/tiny_experiment.py --scale smoke"
    for kept, message in (
            ((rows["heads"] != 2) | (rows["seed"] == 0),
             r"1 of 3 points of Figure 9 are missing for seed 1 \(2\): " + fix),
            (rows["heads"] == 2, "2 of 3 points of Figure 9 are missing for seed 0: " + fix),
            ((rows["heads"] != 2) | (rows["split"] == "test"),
             r"missing in train for seed 0 \(2\)")):
        with pytest.raises(ResultsError, match=message):
            read(rows[kept])
    with pytest.raises(ResultsError, match="has 3 points of Figure 9 for seed 0, more than the 2"):
        read(rows.assign(grid_points=2))
    with pytest.raises(ResultsError, match="mixes grid_points 2, 3"):
        read(rows.assign(grid_points=[2, *rows["grid_points"][1:]]))
    with pytest.raises(ResultsError, match=r"2 seed 0, split test, is there twice \(run another\)"):
        again = rows[(rows["heads"] == 2) & (rows["seed"] == 0)].assign(run_id="another")
        read(pd.concat([rows, again]))


def test_a_shard_has_whole_chains(tmp_path, capsys):
    for part, names in (("1/2", ["1", "then", "as-it-is"]), ("2/2", ["2"])):
        run(tmp_path, "--shard", part, experiment=CHAIN)
        piece = csv(tmp_path, f"tiny_experiment_smoke.shard-{part.replace('/', '-of-')}.csv")
        assert pd.read_csv(piece)["heads"].astype(str).unique().tolist() == names
    with pytest.raises(SystemExit, match="mixes total_steps"):
        run(tmp_path, "--collect", experiment=CHAIN)
    run(tmp_path, "--collect", experiment=VARYING_CHAIN)
    assert len(pd.read_csv(csv(tmp_path))) == 8
    with pytest.raises(SystemExit):
        run(tmp_path, "--shard", "3/3", experiment=CHAIN)
    assert "the grid has only 2 runs that begin with no other's weights" in capsys.readouterr().err


def test_status_tells_each_state(finished, tmp_path, capsys):
    first, second, _, other_seed, *_ = tiny_runs(tmp_path, seeds=2)
    train(first.config, first.folder, quiet=True)
    train(other_seed.config, other_seed.folder, stop_after=2, quiet=True)
    claim = Claim(second.folder)
    claim.take()
    run(tmp_path, "--status", "--seeds", "2")
    claim.release()
    lines = capsys.readouterr().out.splitlines()
    assert re.search("1 +0 +done +4/4 +8[.][0-9]{4}", lines[1])
    assert re.search("2 +0 +running +0/4", lines[2])
    assert re.search(r"1 +1 +stopped +2/4 +[0-9.]{5} .batch.", lines[4])
    assert re.search("4 +1 +new +0/4", lines[6])
    assert lines[-1] == "6 runs: 1 done, 1 running, 1 stopped, 3 new"


def test_debug_runs_one_in_the_foreground_with_its_log(tmp_path, capsys):
    run(tmp_path, "--cluster", "debug")
    out = capsys.readouterr().out
    assert "started at step 0" in out and "finished: 8." in out and "1 of 3 runs are done" in out
    assert pd.read_csv(csv(tmp_path))["run_id"].nunique() == 1


def test_jobs_run_a_copy_of_the_code_that_knows_its_commit(tmp_path):
    copy = cluster.copy_code(tmp_path, allow_dirty=True).folder
    said = subprocess.run([sys.executable, "-c", "from harness import host\n"
                           "from sweeps import code_copy\nprint(code_copy.__file__, host.ROOT, "
                           "*host.code_version().values())"],
                          cwd=copy, capture_output=True, text=True).stdout.split()
    assert said == [str(copy / "sweeps/code_copy.py"), str(copy), *map(str, code_version().values())]
    assert (copy / "train.py").read_bytes() == (TESTS.parent / "train.py").read_bytes()


def test_hours_come_from_a_given_speed_or_from_finished_runs(finished, tmp_path, capsys):
    run(tmp_path, "--dry-run", "--images-per-s", "0.01", "--cluster", "slurm", "--nodes", "2",
        "--gpus-per-node", "4", "--partition", "p", "--slurm", "exclude=node7", "--timeout-min",
        "30", "--max-parallel", "2")
    out = capsys.readouterr().out.splitlines()
    assert out[-3].startswith("2.667 GPU-hours to go")  # 3 runs x 32 images
    assert "8 processes to a run" in out[-3]
    assert out[-2] == ("sbatch --partition=p --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 "
                       "--cpus-per-task=1 --time=30 --signal=USR2@120 --requeue "
                       "--open-mode=append --exclude=node7 --array=0-2%2")
    run(finished, "--seeds", "3", "--dry-run")
    assert re.search(r"[0-9.]+ CPU-process-hours to go, .* \(measured in 6 runs that are done",
                     " ".join(capsys.readouterr().out.split()))


def config_of(couplings, precision="float32", total_steps=10):
    """A tiny TrainConfig; couplings decide the FLOPs of an image."""
    return TrainConfig(
        data="cifar10-subset", batch_size=8, total_steps=total_steps, precision=precision,
        model=JetConfig(image_size=32, num_couplings=couplings, block_depth=1, emb_dim=16,
                        num_heads=2))


def done_json(config, seconds, **changes):
    """What done.json holds, as far as a speed is told from it."""
    return {"config": config.to_dict(), "train_seconds": seconds, "processes": 1, "device": "cpu",
            "hardware": "A", "rows": []} | changes


def test_a_run_is_expected_to_be_as_fast_as_the_finished_one_of_the_nearest_size():
    small, large = config_of(1), config_of(64)  # a run of the large one takes 16 times as long
    done = [done_json(small, 1.0), done_json(small, 1.0), done_json(large, 16.0)]
    slow, fast = train_flops(small), train_flops(large) / 16
    assert fast == pytest.approx(4 * slow)
    rates = {1: slow, 2: slow, 7: slow, 9: fast, 64: fast, 200: fast}  # 8 is midway
    for couplings, rate in rates.items():
        assert plan.measured_rate(config_of(couplings), done) == pytest.approx(rate)
    more = [*done, done_json(small, 4.0)]
    assert plan.measured_rate(small, more) == pytest.approx(slow)  # their median
    of_four = [done_json(large, 16.0, processes=4)]
    assert plan.measured_rate(large, of_four) == pytest.approx(fast / 4)


def test_the_speed_of_another_precision_counts_only_where_there_is_no_other():
    done = [done_json(config_of(8), 1.0), done_json(config_of(1, "bfloat16"), 1.0)]
    rate_of_8, rate_of_1 = (train_flops(config_of(couplings)) for couplings in (8, 1))
    assert plan.measured_rate(config_of(8, "bfloat16"), done) == pytest.approx(rate_of_1)
    assert plan.measured_rate(config_of(8), done) == pytest.approx(rate_of_8)
    assert plan.measured_rate(config_of(8), done[1:]) == pytest.approx(rate_of_1)
    evaluated = done_json(config_of(8, total_steps=0), 1e-3)
    assert plan.measured_rate(config_of(8), [evaluated, *done]) == pytest.approx(rate_of_8)
    assert plan.measured_rate(config_of(8), [evaluated]) is None
    assert plan.measured_rate(config_of(8), []) is None


def test_hours_to_go_are_those_of_each_size_on_one_kind_of_hardware(monkeypatch):
    monkeypatch.setattr(plan, "hardware", lambda device: "A")
    here, small, large = torch.device("cpu"), config_of(1), config_of(64)
    done = [done_json(small, 3600.0), done_json(large, 16 * 3600.0),
            *[done_json(small, 1.0, device="cuda", hardware="B")] * 3]
    left = [(small, 80), (large, 80), (large, 40)]  # an hour, 16 and 8 hours
    line = plan.hours_to_go(left, done, here, None)
    assert line.startswith("25.0 CPU-process-hours to go, of training, ")
    assert "measured in 2 runs that are done, on A:" in line
    assert "3 on other hardware do not count" in line
    # nothing was measured here: the kind with most
    monkeypatch.setattr(plan, "hardware", lambda device: "C")
    line = plan.hours_to_go([(small, 80 * 36000)], done, here, None)
    assert line.startswith("10.0 GPU-hours to go, of training, ")
    assert "measured in 3 runs that are done, on B:" in line
    line = plan.hours_to_go([(small, 36000)], done, here, 2)
    assert line.startswith("5.000 GPU-hours to go, of training, at 2 images/s a GPU (given)")


# ---- another precision

def test_all_runs_of_a_grid_are_trained_in_the_precision_asked_for(tmp_path, capsys):
    run(tmp_path, "--precision", "bfloat16", experiment=VARYING_CHAIN)
    rows = pd.read_csv(csv(tmp_path))
    first, *_ = tiny_runs(tmp_path, experiment=CHAIN, precision="bfloat16")
    assert set(rows["precision"]) == {"bfloat16"} and rows["run_id"].nunique() == 4
    assert set(rows["init"].dropna()) == {first.config.hash}
    assert not set(rows["run_id"]) & {run.run_id for run in tiny_runs(tmp_path, experiment=CHAIN)}
    before = csv(tmp_path).read_bytes()
    csv(tmp_path).unlink()
    run(tmp_path, "--precision", "bfloat16", "--collect", experiment=VARYING_CHAIN)
    assert csv(tmp_path).read_bytes() == before
    for flag, message in (("--status", "4 runs: {}"), ("--dry-run", "4 runs ({})")):
        for precision, state in (("bfloat16", "4 done"), ("float32", "4 new")):
            capsys.readouterr()
            run(tmp_path, flag, "--precision", precision, experiment=VARYING_CHAIN)
            assert message.format(state) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny_experiment_smoke.csv", "tiny_experiment_smoke.shard-1-of-2.csv"])
@pytest.mark.parametrize("flags", [(), ("--collect",), ("--shard", "2/2"), ("--wait", "--collect")])
def test_a_csv_never_loses_the_runs_of_another_precision(finished, tmp_path, name, flags):
    path, before = csv(tmp_path, name), csv(finished).read_bytes()
    path.parent.mkdir()
    path.write_bytes(before)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--precision", "bfloat16", *flags)
    assert stop.value.code == (
        f"tiny_experiment.py: error: {path}: holds runs in float32, and these are in bfloat16: "
        "give another --results-dir and --figures-dir, or the --precision of that file")
    assert path.read_bytes() == before and not (tmp_path / "runs").exists()


def test_the_hint_for_other_shells_repeats_what_names_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "check_slurm", lambda: None)
    monkeypatch.setattr(cluster, "submit", lambda *arguments: "7")
    run(tmp_path, "--cluster", "slurm", "--precision", "bfloat16")
    hint = capsys.readouterr().out.splitlines()[-1]
    assert hint.startswith("from any shell: ")
    assert f" --precision bfloat16 --runs-dir {tmp_path / 'runs'} " in hint
    assert f" --results-dir {tmp_path / 'results'} " in hint


def test_dry_run_tells_the_state(finished, tmp_path, capsys):
    run(finished, "--seeds", "3", "--dry-run")
    assert "9 runs (6 done, 3 new)" in capsys.readouterr().out
    first, *_ = tiny_runs(tmp_path)
    train(first.config, first.folder, stop_after=1, quiet=True)
    run(tmp_path, "--dry-run")
    assert "3 runs (1 stopped, 2 new)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--scale", "large"], "invalid choice: 'large'"),
    (["--seeds", "0"], "--seeds 0: must be 1 or more"),
    (["--shard", "3/2"], "--shard 3/2: must be i/n"),
    (["--shard", "half"], "--shard half: must be i/n"),
    (["--shard", "4/4"], "--shard 4/4: the grid has only 3 runs"),
    (["--seed", "1"], "unrecognized arguments: --seed 1 (did you mean --seeds?)"),
    (["--collect"], "nothing to collect"), (["--results-dir", "/dev/null/x"], "/dev/null/x"),
    (["--device", "tpu"], "device 'tpu'"), (["--jobs", "0"], "--jobs 0: must be 1 or more"),
    (["--partition", "gpu"], "--partition: only with --cluster slurm"),
    (["--threads", "0"], "threads=0"),
    (["--cluster", "slurm", "--jobs", "2"], "--jobs 2: only with --cluster local"),
    (["--cluster", "slurm", "--nodes", "0"], "--nodes 0: must be above 0"),
    (["--cluster", "slurm", "--slurm", "array=1"], "array is set by this program"),
    (["--cluster", "slurm", "--slurm", "x="], "--slurm x=: must be KEY=VALUE"),
    (["--cluster", "slurm", "--timeout-min", "1", "--slurm", "signal_delay_s=60"],
     "must be below the time limit")])
def test_a_users_mistake_is_one_line_and_a_failure(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags)
    error = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code + "\n"
    assert stop.value.code not in (0, None) and error.count("\n") == 1 and message in error


def test_smoke_runs_on_one_thread_by_default(finished):
    assert set(pd.read_csv(csv(finished))["threads"]) == {1}


@pytest.mark.parametrize("changes, scale, message", [
    ({}, "medium", "--scale medium: tiny has no grid of this scale"),
    ({"swept": ("embdim",)}, "smoke", "swept names embdim: must be a field of"),
    ({"swept": ("block",)}, "smoke", "tiny: two points of its grid are block=vit: swept must name")])
def test_a_grid_that_is_none_is_one_line_before_any_work(tmp_path, changes, scale, message):
    grid = {"smoke": [Point(config=TrainConfig(model=JetConfig(emb_dim=width), data="cifar10-subset"))
                      for width in (8, 16)]}
    experiment = Experiment(**{"name": "tiny", "description": "", "configs": lambda scale: grid[scale],
                               "swept": ("emb_dim",), "draw": None, **changes})
    with pytest.raises(TrainingError, match=message):
        make_runs(experiment, scale, [0], tmp_path)
