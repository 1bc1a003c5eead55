"""The stages for a machine with a GPU: what is begun, left out and written. .ci/run rehearses them as a whole."""
import dataclasses
import gzip
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import torch

import data
from experiments import throughput
from harness import claim, flops
from paper_figures.results_csv import ResultsError
from sweeps import plan, search, sweep
from tests import forked, tiny_experiment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_medium  # noqa: E402
import gpu_stage  # noqa: E402


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage that has begun, of 60 seconds."""
    monkeypatch.setattr(gpu_stage.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(gpu_stage, "provenance", lambda: {"git_commit": "abc", "git_dirty": True, "torch_version": "2"})
    for name in ("DATA", "EPOCHS"):
        monkeypatch.setattr(search, name, getattr(search, name))  # a rehearsal's are taken back

    def make(name="medium", seconds=60, device="cpu"):
        flags = types.SimpleNamespace(stage=name, out=tmp_path / "out", device=device, seconds=seconds)
        stage = gpu_stage.Stage(flags, time.monotonic())
        (stage.work / "results").mkdir(parents=True, exist_ok=True)
        stage.seen = {"hardware": "A GPU", "free_gib": 80.0}
        return stage
    return make


# ---- arguments

@pytest.mark.parametrize("arguments, message", [
    (["fast", "out"], "invalid choice: 'fast'"), (["speed"], "required: OUT"),
    (["speed", "out", "5"], "SECONDS 5: must be 10 or more"), (["speed", "out", "x"], "invalid int value: 'x'"),
    (["speed", "out", "--jobs", "2"], "--jobs: only with medium"),
    (["tests", "out", "--data-root", "x"], "--data-root: only with medium"),
    (["medium", "out", "--jobs", "0"], "--jobs 0: must be 1 or more"),
    (["medium", "out", "--experiments", "figure9"], "--experiments figure9: must be of compare_vit_cnn, "),
    (["medium", "out", "--graph", "--device", "cpu"], "only on a GPU"),
    (["speed", "out", "--no-graph"], "--graph: only with medium"), (["tests", "out", "--compile"], "--compile: only with medium"),
    (["speed", "out", "--device", "tpu"], "invalid choice: 'tpu'"), (["speed", __file__], "must be a folder")])
def test_a_bad_argument_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.read_flags(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_seconds_have_defaults_and_stand_anywhere():
    assert [gpu.read_flags([name, "out"]).seconds for name in ("tests", "speed", "medium")] == [120, 180, 420]
    flags = gpu.read_flags(["medium", "out", "--jobs", "3", "99"])
    assert (flags.seconds, flags.jobs, flags.device) == (99, 3, "cuda")
    assert tuple(flags.experiments) == gpu_medium.ORDER


def test_steps_are_graphs_on_a_gpu_where_nothing_else_is_said():
    for flags, graph in ([], True), (["--no-graph"], False), (["--graph"], True), (["--device", "cpu"], False):
        assert gpu.read_flags(["medium", "out", *flags]).graph is graph


def test_what_a_machine_lacks_is_named(monkeypatch):
    assert gpu.what_is_missing() is None
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "PIL" else find(name))
        assert "lacks PIL" in gpu.what_is_missing()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cu128")
        assert "2.9.1+cu128: needs 2.11" in gpu.what_is_missing()
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert "needs 3.11" in gpu.what_is_missing()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_nothing_stays(tmp_path):
    process = forked.start(ROOT / ".ci/gpu.py", "speed", tmp_path / "out", out=tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and said.count("\n") == 1
    assert "sees no GPU here" in said and not (tmp_path / "out").exists()


def test_the_script_hands_its_arguments_to_the_python_on_the_path(tmp_path):
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"; exit 3')
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(["bash", ROOT / ".ci/gpu", "speed", "out"], capture_output=True, text=True,
                          env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"-B {ROOT}/.ci/gpu.py speed out\n", "")


# ---- a stage

def test_a_part_ends_in_time_with_all_that_it_has_started(stage, tmp_path):
    stage, pid = stage(seconds=4), tmp_path / "pid"  # one second of them is for the end
    begun = time.monotonic()
    assert stage.part("quick", 1, "time", "sleep", 0)
    assert not stage.part("wrong", 1, "sys", "exit", "a message")
    assert not stage.part("slow", 1, "subprocess", "run", ["sh", "-c", f"echo $$ > {pid}; sleep 60"])
    assert not stage.part("late", 1, "time", "sleep", 0)
    assert time.monotonic() - begun < 4
    assert [(part["name"], part["state"], part["exit"]) for part in stage.parts] == [
        ("quick", "ok", 0), ("wrong", "failed", 1), ("slow", "stopped", None)]
    assert stage.failed == ["wrong"] and "a message" in stage.log.read_text()
    assert [item["what"] for item in stage.left_out] == ["slow", "late"]
    assert claim.process_started(int(pid.read_text())) is None


def test_a_part_that_needs_more_time_than_is_left_is_named(stage):
    stage = stage()
    assert not stage.part("long", 100, "time", "sleep", 0) and not stage.parts
    assert stage.left_out[0]["why"].startswith("needs about 100 s, and 5")
    stage._on_signal(15, None)
    assert stage.left_s == 0 and not stage.part("next", 0, "time", "sleep", 0)
    assert stage.left_out[1]["why"] == "SIGTERM"


def test_the_end_leaves_files_of_the_stage_alone(stage, capsys):
    first = stage("speed")
    (first.out / "tests_done.json").write_text("of another stage")
    (first.out / "speed_old.csv").write_text("")
    first.empty()
    first.failed.append("a part")
    assert first.close(["a line"]) == 1
    assert sorted(path.name for path in first.out.iterdir()) == ["speed_done.json", "tests_done.json"]
    done = json.loads((first.out / "speed_done.json").read_text())
    assert done["state"] == "failed" and done["rehearsal"] and done["hardware"] == "A GPU" and done["failed"] == ["a part"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("speed: failed, 0 of 60 s, a rehearsal") and lines[-2:] == ["a line", "failed: a part"]
    assert stage("medium", device="cuda").close([]) == 0
    assert "rehearsal" not in capsys.readouterr().out


def test_files_that_are_too_large_are_cut_or_left_out(stage, monkeypatch):
    monkeypatch.setattr(gpu_stage, "MAX_BYTES", 1000)
    stage = stage("speed")
    stage.log.write_text("x" * 2000 + "the end")
    (stage.out / "speed_a.csv").write_text("x" * 1001)
    (stage.out / "speed_b.csv").write_text("x" * 1000)
    gpu_stage.fit_files(stage)
    assert sorted(path.name for path in stage.out.glob("*_*")) == [".speed_work", "speed_b.csv", "speed_log.txt"]
    assert stage.log.stat().st_size < 1000 and stage.log.read_text().endswith("the end")
    assert stage.left_out[0]["what"] == "speed_a.csv"
    for number in range(6):
        (stage.out / f"speed_{number}.csv").write_text("")
    with pytest.raises(AssertionError, match="8 files"):
        gpu_stage.fit_files(stage)


def test_the_table_has_30_lines_of_80_columns():
    item = {"what": "a run", "why": "because " * 20, "group": "some"}
    lines = gpu_stage.fit_table(["head"], [f"line {n}" for n in range(50)], ["x"] * 20, [item] * 30)
    assert len(lines) == 30 and max(map(len, lines)) <= 80
    assert any("more lines: see the CSVs" in line for line in lines) and lines[-1] == "... and 14 more: see done.json"
    assert gpu_stage.fit_table([], [], [], [item] * 3)[0].startswith("left out: some: 3 runs, the first because")
    assert gpu_stage.fit_table(["a"], ["b"], ["c"], [item]) == ["a", "b", "failed: c", (
        "left out: a run: " + "because " * 20)[:77] + "..."]


# ---- tests

def test_each_test_is_recorded_when_it_begins_and_ends(tmp_path):
    path = tmp_path / "tests.jsonl"
    recorder = gpu_checks.Recorder(path)

    def report(name, when, outcome="passed", longrepr=None):
        recorder.pytest_runtest_logreport(types.SimpleNamespace(
            nodeid=name, when=when, outcome=outcome, duration=0.5, skipped=outcome == "skipped", longrepr=longrepr,
            longreprtext="a text"))
    for name, outcome, longrepr in (("t.py::good", "passed", None), ("t.py::skip", "skipped", ("f", 1, "Skipped: no GPU")),
                                    ("t.py::bad", "failed", None)):
        recorder.pytest_runtest_logstart(name, None)
        report(name, "setup")
        report(name, "call", outcome, longrepr)
        report(name, "teardown")
    recorder.pytest_runtest_logstart("t.py::hangs", None)
    rows = gpu_checks.read_records(path)
    assert [(row["test"], row["outcome"], row["seconds"], row["why"]) for row in rows] == [
        ("t.py::good", "passed", 1.5, ""), ("t.py::skip", "skipped", 1.5, "no GPU"), ("t.py::bad", "failed", 1.5, "a text"),
        ("t.py::hangs", "not finished", 0, "")]
    lines = gpu_checks.tests_table(rows, {"passed": 1})
    assert lines[:4] == ["1 passed", "failed: bad: a text", "not finished: hangs: ", "1 skipped: no GPU"]


@pytest.mark.parametrize("outcomes, ended, failed", [
    (["passed", "skipped"], True, False), (["skipped"], True, True), ([], True, True), (["passed", "not finished"], False, True)])
def test_tests_fail_where_not_all_ran(stage, monkeypatch, outcomes, ended, failed):
    stage = stage("tests")
    record = stage.work / "tests.jsonl"
    record.write_text("".join(json.dumps({"test": f"t.py::{n}", "outcome": outcome, "seconds": 1, "why": ""}) + "\n"
                              for n, outcome in enumerate(outcomes)))
    monkeypatch.setattr(stage, "part", lambda *_: ended)
    gpu_checks.run_tests(stage, None)
    assert bool(stage.failed) == failed
    assert len((stage.out / "tests_results.csv").read_text().splitlines()) == 1 + len(outcomes)


# ---- speed

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_parts_of_speed_are_commands_that_throughput_takes(device, monkeypatch):
    monkeypatch.setattr(throughput, "pick_device", lambda name, graph=False: torch.device(device))
    for _, _, flags in gpu_checks.speed_parts(device, port=True):
        throughput.read_flags(throughput.make_parser(), flags)


def test_speed_begins_with_the_fastest_mode_beside_the_port_and_alone():
    parts = gpu_checks.speed_parts("cuda", port=True)
    assert [name for name, *_ in parts] == [
        "32x2 both, jet-pytorch", "32x2 both", "M modes", "S modes", "medium modes", "32x2 trace", "32x2 rounding",
        "32x2 evaluation of 49,999 images", "32x2 likelihood, sampling"]
    against, alone, trace = (" ".join(parts[number][2]) for number in (0, 1, 5))
    assert all("--compile --graph" in flags for flags in (against, alone, trace))
    assert against.endswith("--batch-size 64 --against jet-pytorch")  # more do not fit beside each other
    assert alone.endswith("--batch-size 128") and trace == f"{alone} --profile --steps 3"
    assert all("--modes eager graph both" in " ".join(flags) for _, _, flags in parts[2:5])
    against, alone = (flags for _, _, flags in gpu_checks.speed_parts("cuda", port=True, free_gib=139)[:2])
    assert (against[-3], alone[-1]) == ("128", "256")
    assert gpu_checks.speed_parts("cuda", port=False) == parts[1:]


def test_where_the_comparison_fails_ours_is_measured_alone(stage, monkeypatch):
    stage, ran = stage("speed", device="cuda"), []

    def part(name, least_s, module, function, arguments):
        ran.append((name, "--against" in arguments))
        if "--against" in arguments:
            stage.failed.append(name)
        return "--against" not in arguments
    monkeypatch.setattr(stage, "part", part)
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: name)
    gpu_checks.run_speed(stage, None)
    assert ran[:2] == [("32x2 both, jet-pytorch", True), ("32x2 both", False)] and len(ran) == 9


def test_speed_brings_its_csv_its_trace_and_its_numbers(stage, monkeypatch):
    stage = stage("speed")

    def part(name, *_):
        stage.parts.append({"name": name, "state": "ok"})
        return True
    monkeypatch.setattr(stage, "part", part)
    rows = [{"size": "S", "what": "train", "implementation": "ours", "compile": False, "graph": graph, "batch_size": 4,
             "images_per_s": 1234.5, "peak_share": 0.4, "ratio": 2.0 if graph else None, "startup_seconds": 3.0}
            for graph in (False, True)]
    pd.DataFrame(rows).to_csv(stage.work / "results/throughput_cuda.csv", index=False)
    (stage.work / "runs/throughput_profile").mkdir(parents=True)
    (stage.work / "runs/throughput_profile/32x2-train.json.gz").write_bytes(b"trace")
    numbers = [{"what": "evaluate", "size": "32x2", "num_images": 49999, "seconds": 30.0},
               {"what": "check-precision", "mean_difference": 1e-4, "num_images": 1000},
               {"what": "profile", "size": "32x2", "work": "train", "step_seconds": 0.5, "busy_share": 0.95}]
    (stage.work / "numbers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbers))
    body = gpu_checks.run_speed(stage, None)
    assert sorted(path.name for path in stage.out.iterdir() if path.is_file()) == [
        "speed_throughput_cuda.csv", "speed_trace_32x2-train.json.gz"]
    assert body[2].split() == ["S", "train", "ours", "graph", "4", "1,234.5", "40.0%", "2.00", "3.0"]
    assert body[3:] == ["32x2: bits/dim of 49,999 images in 30.0 s",
                        "bfloat16 against float32: +0.000100 bits/dim in the mean of 1,000 images",
                        "32x2 train, traced: 0.5000 s a step, the GPU busy 95.0% of it"]
    assert not stage.failed and max(map(len, body)) <= 80


def test_a_large_trace_keeps_the_gpus_part(tmp_path, monkeypatch):
    path = tmp_path / "trace.json.gz"
    events = [{"ph": "X", "cat": cat, "name": f"{cat}{n}"} for n in range(200) for cat in ("cpu_op", "kernel")]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, file)
    before = path.read_bytes()
    gpu_checks.shrink_trace(path)
    assert path.read_bytes() == before
    monkeypatch.setattr(gpu_checks, "MAX_BYTES", 100)
    gpu_checks.shrink_trace(path)
    with gzip.open(path, "rt") as file:
        assert len(json.load(file)["traceEvents"]) == 201


# ---- medium: which run to begin

def run_of(name, after=None):
    return types.SimpleNamespace(run_id=name, after=after)


def test_the_first_run_that_ends_in_time_is_begun():
    todo, seconds = [run_of("long"), run_of("short"), run_of("shorter")], {"long": 50, "short": 20, "shorter": 10}

    def choose(left_s):
        run = gpu_medium.choose(todo, set(), left_s, lambda run: seconds[run.run_id])
        return run and run.run_id
    assert [choose(left_s) for left_s in (60, 50, 49, 20, 19, 9)] == ["long", "long", "short", "short", "shorter", None]


def test_a_chain_is_begun_where_all_of_it_ends_in_time():
    parent = run_of("parent")
    child, other = run_of("child", after=parent), run_of("other")
    todo, seconds = [parent, child, other], {"parent": 30, "child": 10, "other": 5}

    def choose(todo, done, left_s):
        run = gpu_medium.choose(todo, done, left_s, lambda run: seconds[run.run_id])
        return run and run.run_id
    assert choose(todo, set(), 40) == "parent" and choose(todo, set(), 39) == "other"
    assert choose([child, other], set(), 40) == "other"  # the parent is running, or has failed
    assert choose([child, other], {"parent"}, 40) == "child" and choose([child], {"parent"}, 9) is None


@pytest.fixture
def costs(monkeypatch):
    """Runs by their training FLOPs, FLOPs of an evaluation and block; measured_rate by the last finished run."""
    monkeypatch.setattr(flops, "train_flops", lambda config: config.flops)
    monkeypatch.setattr(gpu_medium, "evaluation_flops", lambda config: config.evaluation)
    monkeypatch.setattr(plan, "measured_rate", lambda config, done: done and done[-1]["flops"] / done[-1]["train_seconds"] or None)

    def run(train_flops, evaluation=1e13, block="vit"):
        model = types.SimpleNamespace(block=block)
        return types.SimpleNamespace(config=types.SimpleNamespace(
            precision="bfloat16", flops=train_flops, evaluation=evaluation, model=model))
    return run


def finished(run, train_seconds, extra_s=0.0, at_a_time=1.0):
    return gpu_medium.Finished(run=run, done={"flops": run.config.flops, "train_seconds": train_seconds},
                               seconds=train_seconds + extra_s, at_a_time=at_a_time)


def test_times_are_predicted_by_what_has_finished_here(costs):
    run = costs(1e15)
    share = gpu_medium.ASSUMED_SHARE / 4
    cautious = 1e15 / (share * 989e12) + 1e13 / (share * 67e12) + gpu_medium.START_S
    assert gpu_medium.predict(run, [], 4, "cuda") == pytest.approx(1.2 * cautious)
    done = finished(costs(8e14), 8.0, extra_s=3.0)
    assert gpu_medium.predict(run, [done], 1, "cuda") == pytest.approx(1.2 * (10 + 3))
    assert gpu_medium.predict(costs(1e15, evaluation=5e13), [done], 1, "cuda") == pytest.approx(1.2 * (10 + 5 * 3))
    assert gpu_medium.predict(costs(1e15, evaluation=5e12), [done], 1, "cuda") == pytest.approx(1.2 * (10 + 3))


def test_a_run_beside_fewer_is_faster(costs):
    """As on an H100: 3.77e15 FLOPs were left out as 250 s, though alone they would have taken less than the 140 left."""
    largest, done = costs(3.77e15, block="cnn"), finished(costs(1e15, block="cnn"), 81.0, extra_s=9.0, at_a_time=3.0)
    alone, beside_one, beside_two = (gpu_medium.predict(largest, [done], number, "cuda") for number in (1, 2, 3))
    assert alone == pytest.approx(1.2 * (3.77 * 27 + 9)) and alone < 140
    assert beside_one == pytest.approx(1.2 * (2 * 3.77 * 27 + 9)) and beside_two == pytest.approx(1.2 * (3 * 3.77 * 27 + 9))


def test_times_are_predicted_by_runs_of_the_same_block_where_there_are_any(costs):
    cnn, vit = finished(costs(1e15, block="cnn"), 10.0), finished(costs(1e15), 40.0)
    assert gpu_medium.predict(costs(1e15, block="cnn"), [cnn, vit], 1, "cuda") == pytest.approx(1.2 * 10)
    assert gpu_medium.predict(costs(1e15, block="cnn"), [vit], 1, "cuda") == pytest.approx(1.2 * 40)
    assert gpu_medium.predict(costs(2e15), [vit, cnn], 1, "cuda") == pytest.approx(1.2 * 80)


def test_runs_at_a_time_fit_the_card_and_the_cores():
    assert [gpu_medium.default_jobs("cuda", *room) for room in ((79, 16), (79, 4), (30, 16), (5, 1), (140, 64))] == [
        4, 2, 2, 1, 4]
    assert [gpu_medium.default_jobs("cpu", 100, cores) for cores in (1, 2, 64)] == [1, 2, 2]
    assert gpu_medium.default_jobs("cuda", 140, 64, graph=True) == 1  # one fills the card


def test_runs_whose_first_weights_are_elsewhere_are_orphans():
    parent = run_of("parent")
    child = run_of("child", after=parent)
    assert gpu_medium.is_orphan(run_of("grandchild", after=child), {"parent"}) and not gpu_medium.is_orphan(child, {"child"})


def medium_runs(experiment, folder):
    (part,) = gpu_medium.parts_of(experiment, "medium", folder)
    return part.grid


def test_the_rehearsed_grids_are_the_medium_ones_but_for_size(tmp_path):
    for name in gpu_medium.ORDER:
        real, tiny = (medium_runs(gpu_medium.load(name, small), tmp_path) for small in (False, True))
        assert [run.name for run in real] == [run.name for run in tiny] and {run.config.seed for run in real} == {0}
        assert [run.after and run.after.name for run in real] == [run.after and run.after.name for run in tiny]
        assert len({run.run_id for run in tiny}) == len(tiny)
        assert all(run.config.data == "cifar10-subset-vehicles" and run.config.total_steps <= 2 for run in tiny)
        ids = {run.run_id for run in tiny}
        assert all(run.after.run_id in ids for run in tiny if run.after)


# ---- medium: what comes out

EXPERIMENT = dataclasses.replace(tiny_experiment.EXPERIMENT, varying=("lr", "total_steps", "init"))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The stage's experiments are one: a chain of one run and two that begin with its weights, and a run of its own."""
    monkeypatch.setitem(sys.modules, "experiments.tiny_experiment", tiny_experiment)
    monkeypatch.setattr(gpu_medium, "ORDER", ("tiny_experiment",))
    monkeypatch.setattr(tiny_experiment, "EXPERIMENT", EXPERIMENT)
    monkeypatch.setattr(gpu_medium, "shrink", lambda points, swept: points)
    monkeypatch.setattr(tiny_experiment, "configs", lambda scale, real=tiny_experiment.configs: [
        dataclasses.replace(point, config=dataclasses.replace(point.config, total_steps=2)) for point in real(scale)])
    tiny_experiment.evaluate_few(monkeypatch)
    monkeypatch.setattr(gpu_medium, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    return types.SimpleNamespace(experiments=["tiny_experiment"], jobs=2, data_root=None, compile=False, graph=False)


def test_finished_runs_come_as_a_shard_and_folders_that_are_not_run_again(tiny, stage, tmp_path):
    first = stage()
    body = gpu_medium.run(first, tiny)
    assert not first.failed and not first.left_out and all(1 <= one["at_a_time"] <= 2 for one in first.more["finished"])
    assert body[1].split() == ["tiny_experiment", "4", "0", "4", "0"]
    csv, = first.out.glob("*.csv")
    assert re.fullmatch(r"tiny_experiment_medium\.shard-[0-9a-f]{8}\.csv", csv.name)
    with tarfile.open(first.out / "medium_runs.tar.gz") as tar:
        names = tar.getnames()
        tar.extractall(tmp_path, filter="data")
    assert f"results/per_image/{csv.stem}.npz" in names
    assert len(names) == 4 * 4 + 2 and not any("checkpoint" in name for name in names)
    assert (tmp_path / "results" / csv.name).read_bytes() == csv.read_bytes()
    runs = medium_runs(EXPERIMENT, tmp_path / "runs")
    assert all(run.is_done for run in runs)
    merged = tmp_path / "results/tiny_experiment_medium.csv"
    pieces = sorted(merged.parent.glob(f"{merged.stem}.shard-*.csv"))  # as --collect does
    elsewhere = [dataclasses.replace(run, runs_dir=tmp_path / "none") for run in runs]
    _, per_image = sweep.collect(EXPERIMENT, "medium", elsewhere, merged, pieces)
    assert per_image.keys() == {run.run_id for run in runs}
    assert set(pd.read_csv(merged)["run_id"]) == {run.run_id for run in runs}
    again = stage()
    assert gpu_medium.run(again, tiny)[1].split() == ["tiny_experiment", "4", "4", "0", "0"] and not again.failed


def test_small_scale_searches_first_and_a_later_call_goes_on_with_what_its_csvs_say(tiny, stage, tmp_path, monkeypatch):
    how = search.Search(arm=("heads",), factors=(0.5, 1, 2))
    points = tiny_experiment.configs("smoke")[:2]
    monkeypatch.setattr(tiny_experiment, "EXPERIMENT", dataclasses.replace(
        EXPERIMENT, configs=lambda scale: points, search={"small": how}, seeds={"small": 2}))
    first = stage()
    first.scale, real = "small", gpu_medium.run_grid
    monkeypatch.setattr(gpu_medium, "run_grid", lambda stage, todo, *more: real(stage, [
        run for run in todo if "lr" in run.points[0]], *more))  # the time is up after the search
    assert [line.split() for line in gpu_medium.run(first, tiny)[1:3]] == [
        ["tiny_experiment_search", "6", "0", "6", "0"], ["tiny_experiment", "4", "0", "0", "4"]]
    for path in first.out.glob("*.csv"):
        assert path.name.startswith("tiny_experiment_search_small.shard-")
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(gpu_medium, "run_grid", real)
    again = stage()
    again.scale = "small"
    assert [line.split() for line in gpu_medium.run(again, tiny)[1:3]] == [
        ["tiny_experiment_search", "6", "6", "0", "0"], ["tiny_experiment", "4", "0", "4", "0"]]
    found = pd.concat(map(pd.read_csv, first.out.glob("*_search_small*.csv")))
    found = found[found["split"] == "test"]
    best = {heads: of_arm.loc[of_arm["bits_per_dim"].idxmin(), "lr"] for heads, of_arm in found.groupby("heads")}
    rows = pd.read_csv(next(again.out.glob("tiny_experiment_small*.csv")))
    assert set(zip(rows["heads"], rows["lr"])) == set(best.items()) and set(rows["seed"]) == {0, 1}


def test_a_chain_whose_parent_is_in_a_csv_is_left_out(tiny, stage, tmp_path, monkeypatch):
    runs = medium_runs(EXPERIMENT, tmp_path)
    monkeypatch.setattr(gpu_medium, "finished_elsewhere", lambda *_: {runs[0].run_id})
    begun = []
    monkeypatch.setattr(gpu_medium, "run_grid", lambda stage, todo, *_: begun.extend(todo) or [])
    stage = stage()
    gpu_medium.run(stage, tiny)
    assert [run.name for run in begun] == [runs[3].name]
    assert [item["what"].split(": ")[1] for item in stage.left_out] == [run.label for run in runs[1:3]]
    assert all("in no folder here" in item["why"] for item in stage.left_out)
    assert stage.failed == ["medium: no run has finished"]


def test_a_run_that_fails_is_named_and_the_others_go_on(tiny, stage, monkeypatch):
    stage, real = stage(), gpu_medium.train_run

    def train_run(run, place):
        if run.run_id == runs[0].run_id:
            sys.exit(3)
        real(run, place)
    runs = medium_runs(EXPERIMENT, stage.work / "runs")
    monkeypatch.setattr(gpu_medium, "train_run", train_run)
    body = gpu_medium.run(stage, tiny)
    assert stage.failed == [f"tiny_experiment_medium: {runs[0].label}: its process has ended (3)"]
    assert body[1].split() == ["tiny_experiment", "4", "0", "1", "3"]  # two begin with the weights of the first
    assert [item["why"] for item in stage.left_out] == [
        f"begins with the weights of {runs[0].label}, which has not finished"] * 2


def test_what_is_running_at_the_end_is_stopped_and_left_out(tiny, stage, monkeypatch):
    # A run of minutes that is believed to take no time, in a stage of a few seconds.
    monkeypatch.setattr(data, "batch_indices", lambda *given, real=data.batch_indices: time.sleep(0.05) or real(*given))
    monkeypatch.setattr(gpu_medium, "predict", lambda *_: 0.0)
    stages, begun = stage(seconds=5), time.monotonic()
    stages.scale = "small"
    gpu_medium.run(stages, tiny)
    assert time.monotonic() - begun < 5 and stages.failed == ["medium: no run has finished"]
    assert re.search(r"stopped at step \d+ of 4000: the time was up", stages.left_out[0]["why"])


def test_a_damaged_csv_is_refused(tiny, tmp_path):
    (tmp_path / "results/tiny_experiment_medium.shard-1-of-2.csv").write_text("run_id\nx\n")
    with pytest.raises(ResultsError, match="shard-1-of-2.csv: missing columns"):
        gpu_medium.check(types.SimpleNamespace(experiments=["tiny_experiment"], device="cpu", data_root=None, scale=None))


def test_the_images_are_looked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("JET_DATA", raising=False)
    with pytest.raises(ValueError, match="cifar10 .* is needed as the folder .*--data-root or JET_DATA"):
        gpu_medium.check(types.SimpleNamespace(experiments=["scaling"], device="cuda", data_root=None, scale=None))
    gpu_medium.check(types.SimpleNamespace(experiments=["scaling"], device="cpu", data_root=None, scale=None))


def test_at_most_four_csvs_lie_beside_the_packed_file(stage, monkeypatch):
    stage, names = stage(), list("abcdef")
    monkeypatch.setattr(sweep, "collect", lambda experiment, scale, runs, csv: csv.write_text(experiment))
    parts = [types.SimpleNamespace(name=f"{name}_medium", experiment=name, scale="medium", grid=[run_of(name)]) for name in names]
    finished = [types.SimpleNamespace(run=run_of(name)) for name in "abdef"]
    csvs = gpu_medium.write_csvs(stage, parts, finished)
    assert [csv.partition("_")[0] for csv in csvs] == list("abdef") == sorted(
        path.name[0] for path in (stage.work / "results").iterdir())
    assert sorted(path.name[0] for path in stage.out.glob("*.csv")) == list("abde")


def test_a_shards_name_tells_its_runs_apart():
    name = gpu_medium.shard_name("scaling_medium", ["b", "a"])
    assert name == gpu_medium.shard_name("scaling_medium", ["a", "b"]) != gpu_medium.shard_name("scaling_medium", ["a"])
    assert re.fullmatch(r"scaling_medium\.shard-\w+\.csv", name)


def test_packed_runs_lose_their_metrics_where_they_are_too_large(tmp_path):
    (tmp_path / "results").mkdir()
    folder = tmp_path / "runs/a_medium/one"
    folder.mkdir(parents=True)
    for name in ("config.json", "done.json", "log.txt", "checkpoint.pt"):
        (folder / name).write_text(name)
    (folder / "metrics.csv").write_bytes(os.urandom(5000))
    runs, path = [types.SimpleNamespace(folder=folder)], tmp_path / "medium_runs.tar.gz"
    assert gpu_medium.pack(path, tmp_path, runs)
    assert not gpu_medium.pack(path, tmp_path, runs, 4000) and path.stat().st_size < 4000
    with tarfile.open(path) as tar:
        assert tar.getnames() == [f"runs/a_medium/one/{name}" for name in ("config.json", "done.json", "log.txt")]


def test_weights_stay_until_the_last_run_has_begun_with_them(tmp_path):
    def finished(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "checkpoint.pt").write_text("")
        return types.SimpleNamespace(run=types.SimpleNamespace(run_id=name, folder=folder))
    done = [finished("parent"), finished("other")]
    child = run_of("child", after=run_of("parent"))
    gpu_medium.drop_weights(done, [child])
    assert [(one.run.folder / "checkpoint.pt").exists() for one in done] == [True, False]
    gpu_medium.drop_weights(done, [])
    assert not (tmp_path / "parent/checkpoint.pt").exists()
