"""Runs on a cluster. Those marked slurm need a real one.

It has two nodes that share this machine's files and processes. .ci/slurm_cluster brings one up;
`python -m pytest -m slurm` runs these alone.
"""
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.checkpoint import read_tensors
from harness.claim import read_claim
from harness.errors import ClusterError
from harness.run_folder import read_progress
from sweeps import cluster, code_copy, sweep
from sweeps.grid import make_runs

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import tiny_experiment

SMALL = ("--scale", "small")
LIMIT_S = 240  # for one thing to happen; on idle cores all of it takes less
# as in a job of another cluster, with options that would break each of these jobs
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "SUBMITIT_PREEMPT_SIGNAL": "USR1", "SBATCH_PARTITION": "nowhere",
    "SLURM_MEM_PER_CPU": "1", "SLURM_MEM_PER_NODE": "1", "SQUEUE_PARTITION": "nowhere"}
SUBMIT = ("--cluster", "slurm", "--allow-dirty", "--threads", "1", "--checkpoint-every-s", "1")


def command(folder, *flags, root=TESTS.parent):
    return [sys.executable, root / "tests/tiny_experiment.py", "--runs-dir", folder / "runs",
            "--results-dir", folder / "results", "--figures-dir", folder / "figures", *flags]


def tiny(folder, *flags, code=0, **options):
    """What a command of the experiment prints, in a process of its own, as a user would run it."""
    done = subprocess.run(command(folder, *flags, **options), cwd=folder, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=LIMIT_S)
    said = done.stdout + done.stderr
    assert done.returncode == code, f"{' '.join(flags)}: exit code {done.returncode}\n{said}"
    return said


def slurm(*words, timeout=60):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=timeout).stdout


def run_of(folder, scale="small", point=0):
    folder = folder / f"runs/tiny_experiment_{scale}"
    return make_runs(tiny_experiment.EXPERIMENT, scale, [0], folder)[point]


def run_folder(*run):
    return run_of(*run).folder


def wait_until(what, condition):
    """What the condition gives, once that is true."""
    end = time.monotonic() + LIMIT_S
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.1)
    return result


def training(run):
    """The process of a run that is in the middle of its training, with a checkpoint."""
    wait_until(f"{run} trains",
               lambda: read_progress(run)[0] > 500 and (run / "checkpoint.pt").exists())
    claim = read_claim(run)
    assert claim["host"] == socket.gethostname(), f"{run} is on another machine, {claim['host']}"
    assert not (run / "done.json").exists(), "over before it could be disturbed"
    return claim["pid"]


def hold(run):
    """Have it stand still in the middle of its training, until Slurm signals.

    Slurm sends a SIGCONT with each signal.
    """
    os.kill(training(run), signal.SIGSTOP)


def log(run):
    return (run / "log.txt").read_text()


def resumed_steps(run):
    return [int(step) for step in re.findall(r"resumed at step (\d+)", log(run))]


def assert_same(run, other):
    """The same weights, moments, rows and steps, to the bit."""
    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {key: item for word in value
                for key, item in flat(value[word], f"{name}.{word}").items()}

    one, two = (flat(read_tensors(folder / "checkpoint.pt")) for folder in (run, other))
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert one.keys() == two.keys() and len(tensors) > 30 and one[".step"] == 4000
    assert [name for name in tensors if not torch.equal(one[name], two[name])] == []
    assert all(one[name] == two[name] for name in one.keys() - tensors - {".seconds"})
    assert done(run)["rows"] == done(other)["rows"]
    texts = [(folder / "metrics.csv").read_text() for folder in (run, other)]
    lines = [[line.split(",")[:5] for line in text.splitlines()] for text in texts]
    assert lines[0] == lines[1] and len(lines[0]) == 4001


def done(run):
    return json.loads((run / "done.json").read_text())


# ---- the cluster

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder for all runs here, on a machine with a Slurm, which is left with an empty queue."""
    try:
        slurm("sinfo", "--noheader", timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "there is no sinfo on the PATH" if is_missing else "sinfo gets no answer"
        pytest.skip(f"no Slurm here: {reason}")
    base = tmp_path_factory.mktemp("it's Slurm ")
    yield base
    for path in base.rglob("job.json"):
        subprocess.run(["scancel", f"--name={json.loads(path.read_text())['name']}"], timeout=60)


@pytest.fixture(scope="module")
def urgent(base):
    """A partition whose jobs preempt those of the default one."""
    lines = slurm("scontrol", "show", "partition", "--oneliner").splitlines()
    partitions = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
    default, = [partition for partition in partitions if partition["Default"] == "YES"]
    higher = [partition["PartitionName"] for partition in partitions
              if int(partition["PriorityTier"]) > int(default["PriorityTier"])]
    if not higher or default["PreemptMode"] == "OFF":
        pytest.skip("no partition here preempts the default one")
    return higher[0]


@pytest.fixture(scope="module")
def local(base):
    """The same runs without Slurm and unbroken, begun now: a function that waits for them."""
    flags = ("--threads", "1")
    runs = [subprocess.Popen(command(base / "local", *more), env=ENVIRONMENT,
                             stdout=subprocess.DEVNULL)
            for more in ((*flags, *SMALL), (*flags, "--seeds", "2"))]

    def wait():
        assert [run.wait(LIMIT_S) for run in runs] == [0, 0]
        return base / "local"
    yield wait
    for run in runs:
        run.kill()
        run.wait()


# ---- what happens to runs, much of it at once: see the tests of the same names

def killed(folder):
    tiny(folder, *SMALL, *SUBMIT)
    os.kill(training(run_folder(folder)), signal.SIGKILL)
    tiny(folder, *SMALL, "--wait")


def lost_by_slurm(folder):
    tiny(folder, *SMALL, *SUBMIT)
    stat = Path(f"/proc/{training(run_folder(folder))}/stat").read_text()
    parent = int(stat.rpartition(")")[2].split()[1])
    name = Path(f"/proc/{parent}/cmdline").read_text()
    assert name.startswith("slurmstepd"), name
    os.kill(parent, signal.SIGKILL)
    tiny(folder, *SMALL, "--wait")
    tiny(folder, *SMALL, "--cancel")  # the job may wait for it until the time limit


def out_of_time(folder):
    tiny(folder, *SMALL, *SUBMIT, "--timeout-min", "1", "--slurm", "signal_delay_s=5")
    hold(run_folder(folder))  # Slurm sends the signal when it next looks, up to half a minute early
    tiny(folder, *SMALL, "--wait")


def cancelled(folder):
    tiny(folder, *SMALL, *SUBMIT)
    hold(run := run_folder(folder))
    said = tiny(folder, *SMALL, "--cancel")
    wait_until("the run is told", lambda: "saved at step" in log(run))
    # else it may be over before Slurm kills it, which gives it time
    with contextlib.suppress(ProcessLookupError):
        os.kill(read_claim(run)["pid"], signal.SIGSTOP)
    job = json.loads((run / "job.json").read_text())
    wait_until("the job has ended",
               lambda: not slurm("squeue", "--noheader", f"--name={job['name']}"))
    wait_until("Slurm's accounts know",
               lambda: "CANCELLED" in slurm("sacct", "-nX", "-j", job["job"], "-o", "state%20"))
    status = tiny(folder, *SMALL, "--status")
    again = tiny(folder, *SMALL, *SUBMIT)
    tiny(folder, *SMALL, "--wait")
    return said, status, again


def edited(folder):
    """Submit from a copy of the project, whose code is broken before the job begins."""
    shutil.copytree(TESTS.parent, folder / "copy", symlinks=True, ignore=shutil.ignore_patterns(
        "runs", ".venv", "__pycache__", ".pytest_cache"))
    tiny(folder, *SUBMIT, "--shard", "1/3", "--slurm", "begin=now+5", root=folder / "copy")
    (folder / "copy/train.py").write_text("raise RuntimeError('edited later')\n")
    return tiny(folder, "--shard", "1/3", "--wait")


def failing(folder):
    other, damaged = (run_folder(folder, "smoke", point) for point in (0, 1))
    for run in other, damaged:
        run.mkdir(parents=True)
    config = tiny_experiment.configs("smoke")[0].config.to_dict()
    (other / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    (damaged / "checkpoint.pt").write_bytes(b"half a")
    tiny(folder, *SUBMIT)
    waited = tiny(folder, "--wait", code=1)
    status = tiny(folder, "--status", code=1)
    finished = (run_folder(folder, "smoke", 2) / "done.json").stat().st_mtime_ns
    (other / "config.json").unlink()
    (damaged / "checkpoint.pt").unlink()
    again = tiny(folder, *SUBMIT)
    fixed = tiny(folder, "--wait")
    assert (run_folder(folder, "smoke", 2) / "done.json").stat().st_mtime_ns == finished
    return waited, status, again, fixed


def whole_sweep(folder):
    flags = ("--seeds", "2")
    first = tiny(folder, *flags, *SUBMIT, "--max-parallel", "2")
    status = tiny(folder, *flags, "--status")
    second = tiny(folder, *flags, *SUBMIT, "--max-parallel", "2")
    job = json.loads((run_folder(folder, "smoke") / "job.json").read_text())
    throttle = slurm("scontrol", "show", "job", job["job"].split("_")[0])
    running, wait = [], subprocess.Popen(command(folder, *flags, "--wait"), env=ENVIRONMENT,
                                         text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL)
    squeue = ("squeue", "-h", "--array", "--states=running", f"--name={job['name']}")
    try:
        while wait.poll() is None:
            running.append(len(slurm(*squeue).splitlines()))
            time.sleep(0.5)
    finally:
        wait.kill()
    assert wait.returncode == 0
    return first, second, status, throttle, running, tiny(folder, *flags, "--collect")


def chained(folder):
    submitted = tiny(folder, "--scale", "medium", *SUBMIT)
    return submitted, tiny(folder, "--scale", "medium", "--wait", "--collect")


def two_nodes(folder):
    tiny(folder, *SUBMIT, "--shard", "1/3", "--nodes", "2")
    tiny(folder, "--shard", "1/3", "--wait")


def two_processes_on_a_node(folder):
    tiny(folder, *SUBMIT, "--shard", "1/3", "--tasks-per-node", "2")
    tiny(folder, "--shard", "1/3", "--wait")


@pytest.fixture(scope="module")
def happened(base):
    """A function that waits for one of the above, begun now: (folder, what it returned)."""
    futures = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for function in (out_of_time, killed, cancelled, lost_by_slurm, whole_sweep, failing,
                         edited, chained, two_nodes, two_processes_on_a_node):
            (base / function.__name__).mkdir()
            futures[function] = pool.submit(function, base / function.__name__)
        yield lambda function: (base / function.__name__, futures[function].result(3 * LIMIT_S))
        pool.shutdown(cancel_futures=True)


# ---- on a real Slurm: restarts

@pytest.mark.slurm
def test_a_preempted_run_goes_on_at_the_same_step_to_the_same_bits(base, urgent, local):
    folder, run = base / "preempted", run_folder(base / "preempted")
    folder.mkdir()
    tiny(folder, *SMALL, *SUBMIT)
    hold(run)
    slurm("sbatch", "--partition", urgent, "--nodes", "2", "--exclusive", "--output=/dev/null",
          "--wrap", "sleep 5")
    wait_until("the run is preempted", lambda: re.search(r"(stopped|saved) at step", log(run)))
    assert "1 running" in (status := tiny(folder, *SMALL, "--status")) or "1 queued" in status
    tiny(folder, *SMALL, "--wait")
    assert "(restart 1)" in log(run)
    assert resumed_steps(run) == [int(re.findall(r"(?:stopped|saved) at step (\d+)", log(run))[-1])]
    assert_same(run, run_folder(local()))


@pytest.mark.slurm
def test_a_run_whose_time_is_up_goes_on_in_the_next_job_to_the_same_bits(happened, local):
    folder, _ = happened(out_of_time)
    run = run_folder(folder)
    stopped = [int(step) for step in re.findall(r"stopped at step (\d+)", log(run))]
    assert stopped and resumed_steps(run) == stopped
    assert_same(run, run_folder(local()))


@pytest.mark.slurm
def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(happened, local):
    folder, _ = happened(killed)
    run = run_folder(folder)
    assert len(resumed_steps(run)) == 1 and "(restart 1)" in log(run) and "stopped" not in log(run)
    assert_same(run, run_folder(local()))


@pytest.mark.slurm
def test_a_run_that_slurm_loses_is_followed_to_the_same_bits(happened, local):
    folder, _ = happened(lost_by_slurm)
    assert_same(run_folder(folder), run_folder(local()))


@pytest.mark.slurm
def test_a_cancelled_run_says_so_and_goes_on_when_it_is_submitted_again(happened, local):
    folder, (said, status, again) = happened(cancelled)
    run = run_folder(folder)
    assert "1 jobs cancelled" in said
    assert "1 runs: 1 cancelled" in status
    assert "submitted 1 runs" in again
    assert len(resumed_steps(run)) == 1 and "restart" not in log(run)
    assert_same(run, run_folder(local()))


# ---- on a real Slurm: submitting and watching

@pytest.mark.slurm
def test_a_sweep_on_slurm_gives_the_csv_of_a_local_one(happened, local):
    folder, (first, second, status, throttle, running, collected) = happened(whole_sweep)
    assert "submitted 6 runs" in first and "at most 2 at a time" in first
    assert "nothing to submit" in second
    assert re.search(r"6 runs: .*(queued|running)", status), status
    assert not re.search(r"\d (new|failed|stopped)", status), status
    assert "ArrayTaskThrottle=2" in throttle and max(running) <= 2
    csv = "results/tiny_experiment_smoke.csv"
    assert collected.count(str(folder / csv)) == 2  # written, and drawn
    times = ["train_seconds", "git_commit", "git_dirty"]
    here, there = (pd.read_csv(path / csv).drop(columns=times) for path in (local(), folder))
    assert len(there) == 12
    pd.testing.assert_frame_equal(there, here, check_exact=True)


@pytest.mark.slurm
def test_runs_that_begin_with_another_s_weights_wait_for_it(happened):
    folder, (submitted, collected) = happened(chained)
    assert re.search(r"submitted 4 runs as job \d+, \d+, ", submitted)
    assert "4 runs: 4 done" in collected
    first = json.loads((run_of(folder, "medium").folder / "job.json").read_text())["job"]
    scripts = [path.read_text() for path in folder.glob("runs/*/slurm/[0-9]*_submission.sh")]
    waiting = [script for script in scripts if f"#SBATCH --dependency=afterany:{first}\n" in script]
    assert len(waiting) == 1 and len(scripts) == 2
    rows = pd.read_csv(folder / "results/tiny_experiment_medium.csv").set_index("heads")
    assert rows.loc["as-it-is", "bits_per_dim"].tolist() == rows.loc["1", "bits_per_dim"].tolist()


@pytest.mark.slurm
def test_a_run_that_raises_fails_alone_and_is_submitted_again_when_it_is_fixed(happened):
    folder, (waited, status, again, fixed) = happened(failing)
    for text in waited, status:
        assert "3 runs: 1 done, 2 failed" in text
        for point, reason in enumerate(("lr was 0.5 and is now 0.01", "checkpoint.pt")):
            run = run_of(folder, "smoke", point)
            line, = [line for line in text.splitlines()
                     if line.startswith(f"failed: {run.label}: ")]
            assert reason in line and str(run.folder / "log.txt") in line
            assert (run.folder / "log.txt").exists()
    assert "submitted 2 runs" in again
    assert "3 runs: 3 done" in fixed


@pytest.mark.slurm
def test_a_job_runs_the_code_that_was_submitted_not_what_it_was_edited_to(happened):
    folder, said = happened(edited)
    assert "1 runs: 1 done" in said
    assert "edited later" in (folder / "copy/train.py").read_text()


@pytest.mark.slurm
@pytest.mark.parametrize("placed, nodes", [(two_nodes, 2), (two_processes_on_a_node, 1)],
                         ids=["two nodes", "one node"])
def test_two_processes_compute_what_one_does(placed, nodes, happened, local):
    folder, _ = happened(placed)
    run, one = (run_folder(path, "smoke") for path in (folder, local()))
    job = json.loads((run / "job.json").read_text())["job"]
    assert f"NumNodes={nodes} " in slurm("scontrol", "show", "job", job)
    assert done(run)["processes"] == 2 and done(one)["processes"] == 1
    assert [line["step"] for line in done(run)["rows"]] == [4, 4]
    of_two, of_one = (pd.read_csv(path / "metrics.csv") for path in (run, one))
    assert of_two["step"].tolist() == [1, 2, 3, 4]
    bits = of_one["bits_per_dim"].to_numpy()
    assert of_two["bits_per_dim"].to_numpy() == pytest.approx(bits, rel=1e-5)
    for name in ("bits_per_dim", "bits_per_dim_se", "logdet_nats"):
        numbers = [row[name] for row in done(one)["rows"]]
        assert [row[name] for row in done(run)["rows"]] == pytest.approx(numbers, rel=1e-6)


@pytest.mark.slurm
def test_what_sbatch_refuses_is_one_line_and_nothing_is_left_behind(base):
    folder = base / "refused"
    folder.mkdir()
    error = tiny(folder, *SUBMIT, "--partition", "nowhere", code=1).splitlines()[-1]
    assert "sbatch refuses: " in error and "nvalid partition" in error
    assert not list(folder.rglob("job.json"))
    assert "3 runs: 3 new" in tiny(folder, "--status")


# ---- without a Slurm

def run(folder, *flags):
    sweep.main(tiny_experiment.EXPERIMENT, [
        "--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"),
        "--figures-dir", str(folder / "figures"), *flags])


def refusal(folder, capsys, *flags):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        run(folder, *flags)
    error = capsys.readouterr().err if isinstance(stop.value.code, int) else f"{stop.value.code}\n"
    assert stop.value.code not in (0, None) and error.count("\n") == 1
    assert not list(folder.rglob("*.json"))  # no run was begun
    return error


def test_without_slurm_nothing_is_run_locally_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch on the PATH" in refusal(tmp_path, capsys, *SUBMIT)


def version(monkeypatch, commit, is_dirty):
    code = {"git_commit": commit, "git_dirty": is_dirty}
    monkeypatch.setattr(code_copy, "code_version", lambda: code)


def test_changes_that_are_not_committed_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "check_slurm", lambda: None)
    version(monkeypatch, "0123456789abcdef", True)
    assert "commit them, or give --allow-dirty" in refusal(tmp_path, capsys, "--cluster", "slurm")
    copy = code_copy.copy_code(tmp_path, allow_dirty=True).folder
    assert copy.name.startswith("0123456789ab-dirty-")


def test_a_copy_of_the_code_is_made_once_for_each_state_of_it(tmp_path, monkeypatch):
    version(monkeypatch, "0123456789abcdef", False)
    copy = code_copy.copy_code(tmp_path, allow_dirty=False).folder
    assert code_copy.copy_code(tmp_path, allow_dirty=False).folder == copy
    assert list(tmp_path.iterdir()) == [copy]
    assert (copy / "train.py").read_bytes() == (TESTS.parent / "train.py").read_bytes()
    assert json.loads((copy / ".commit.json").read_text()) == ["0123456789abcdef", "clean"]
    version(monkeypatch, "", None)
    with pytest.raises(ClusterError, match="is no git checkout"):
        code_copy.copy_code(tmp_path, allow_dirty=True)


@pytest.mark.parametrize("flags, message", [
    (["--partition", "big"], "--partition: only with --cluster slurm"),
    (["--setup", "module load cuda"], "--setup: only with --cluster slurm"),
    (["--cluster", "slurm", "--slurm", "exclude="], "--slurm exclude=: must be KEY=VALUE or KEY"),
    (["--cluster", "slurm", "--slurm", "signal=USR1@60"], "--slurm signal=USR1@60: signal is set"),
    (["--cluster", "slurm", "--slurm", "array=1"], "--slurm array=1: array is set"),
    (["--cluster", "slurm", "--slurm", "time=5"], "--slurm time=5: time is set"),
    (["--cluster", "slurm", "--slurm", "signal-delay-s=soon"], "must be a number of seconds"),
    (["--cluster", "slurm", "--timeout-min", "1", "--slurm", "signal_delay_s=60"],
     "must be below the time limit"),
    (["--cluster", "slurm", "--nodes", "0"], "--nodes 0: must be above 0"),
    (["--cluster", "slurm", "--jobs", "2"], "--jobs 2: only with --cluster local")])
def test_a_users_mistake_is_one_line_and_submits_nothing(
        flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "submit", None)
    assert message in refusal(tmp_path, capsys, *flags)


def test_dry_run_tells_cost_and_settings_and_submits_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    run(tmp_path, "--cluster", "slurm", "--dry-run", "--scale", "small", "--seeds", "3",
        "--images-per-s", "100", "--partition", "big", "--gpus-per-node", "4", "--nodes", "2",
        "--timeout-min", "60", "--max-parallel", "2", "--slurm", "exclude=node7")
    out = capsys.readouterr().out
    assert "0.267 GPU-hours to go" in out  # 3 runs of 4,000 steps of 8 images
    settings = out.splitlines()[-2].split()
    assert settings[0] == "sbatch" and {
        "--partition=big", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4",
        "--cpus-per-task=1", "--time=60", "--signal=USR2@120", "--requeue",
        "--open-mode=append", "--exclude=node7", "--array=0-2%2"} == set(settings[1:])
    assert list(tmp_path.iterdir()) == []
