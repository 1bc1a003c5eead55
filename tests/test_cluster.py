"""Submitting to a cluster and its jobs, with a stand-in for Slurm's commands on the PATH."""
import errno
import functools
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from harness.claim import Claim
from harness.errors import TrainingError
from harness.place import Place
from harness.run_folder import read_error
from sweeps import cluster, code_copy, sweep
from sweeps.code_copy import copy_code
from sweeps.grid import make_runs
from sweeps.job import TrainJob

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import tiny_experiment

SUBMIT = ("--cluster", "slurm", "--allow-dirty", "--threads", "1")
ONE_RUN = ("--shard", "1/3")
JOB = {"name": "tiny-1", "index": 0, "job": "71", "logs": "/"}
COMMANDS = {
    "sinfo": "",
    "sacct": "",
    "sleep": "",
    "squeue": 'env >"$here/squeue.env"; cat "$here/queue"',
    "sbatch": 'env >"$here/sbatch.env"; [ ! -e "$here/refuse" ] || exit 1\n'
              'echo >>"$here/jobs"; echo "Submitted batch job $((70 + $(wc -l <"$here/jobs")))"',
    "scontrol": 'if [ "$1" = show ]; then cat "$here/config"; else echo "$*" >>"$here/told"; fi',
    "srun": 'env >"$here/srun.env"; [ ! -e "$here/killed" ] || exit 137\n'
            'while [[ $1 == -* ]]; do [[ $1 =~ ^--(output|error)$ ]] && shift; shift; done\n"$@"'}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with what the commands were told, and what they answer."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in COMMANDS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\nhere={shlex.quote(str(folder))}\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "queue").touch()
    (folder / "config").write_text("Configuration\nMaxArraySize            = 1001\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in cluster._slurm_variables():
        monkeypatch.delenv(name)
    few_files(monkeypatch)
    return folder


def few_files(monkeypatch):
    """Copies of the code without the images and weights in it: they take time."""
    monkeypatch.setattr(code_copy, "_read_code", lambda read=code_copy._read_code: dict(read_few(read)))


@functools.cache
def read_few(read):
    return {name: content for name, content in read().items() if name.endswith(".py") or name.startswith("images/")}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "it's a home"


def run(home, *flags):
    sweep.main(tiny_experiment.EXPERIMENT, [
        "--runs-dir", str(home / "runs"), "--results-dir", str(home / "results"),
        "--figures-dir", str(home / "figures"), *flags])


def runs_of(home):
    return make_runs(tiny_experiment.EXPERIMENT, "smoke", [0], home / "runs/tiny_experiment_smoke")


def script_of(home, job=71):
    return (home / f"runs/tiny_experiment_smoke/slurm/{job}_submission.sh").read_text()


def options_of(script):
    """{option: value} of a script's lines for sbatch."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines()
             if line.startswith("#SBATCH")]
    return dict(shlex.split(line)[0].partition("=")[::2] for line in lines)


def run_job(home, code=0, job=71):
    """What the script of a job prints, run as Slurm would on a node."""
    script = script_of(home, job)
    done = subprocess.run(
        ["bash", "-c", script], cwd=options_of(script)["chdir"], text=True,
        env=os.environ | {"SLURM_JOB_ID": str(job), "OMP_NUM_THREADS": "1"}, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout


def append(path, text="\n# another line\n"):
    path.write_text(path.read_text() + text)


# ---- the copy of the code

ALTERATIONS = {
    "train.py": lambda copy: append(copy / "train.py"),
    "sweeps/watch.py": lambda copy: (copy / "sweeps/watch.py").unlink(),
    ".commit.json": lambda copy: (copy / ".commit.json").write_text('["0123", "clean"]'),
    "numpy.py": lambda copy: (copy / "numpy.py").write_text(""),
    "torch": lambda copy: (copy / "torch").symlink_to(copy / "harness"),
    "kernels/functions.so": lambda copy: (copy / "kernels/functions.so").write_text("")}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_copy_of_the_code_is_not_used_again(name, tmp_path, monkeypatch, capsys):
    few_files(monkeypatch)
    first = copy_code(tmp_path, allow_dirty=True)
    assert copy_code(tmp_path, allow_dirty=True) == first
    ALTERATIONS[name](first.folder)
    second = copy_code(tmp_path, allow_dirty=True)
    assert second.folder.name == f"{first.folder.name}-2" and second.find_change() is None
    assert f"{first.folder}: {name} was changed after it was copied" in capsys.readouterr().err
    assert copy_code(tmp_path, allow_dirty=True) == second
    assert len(list(tmp_path.iterdir())) == 2


def test_what_python_and_the_kernels_write_into_a_copy_does_not_alter_it(tmp_path):
    copy = copy_code(tmp_path, allow_dirty=True)
    for name in ("build/kernels-0.so", "sweeps/__pycache__/watch.cpython-311.pyc", "core.123"):
        (copy.folder / name).parent.mkdir(exist_ok=True)
        (copy.folder / name).write_bytes(b"")
    assert copy.find_change() is None


def test_a_job_whose_copy_of_the_code_was_altered_fails_in_one_line(slurm, home):
    run(home, *SUBMIT, *ONE_RUN)
    folder, = (home / "runs/code").iterdir()
    append(folder / "train.py")
    said = run_job(home, code=1)
    one, reason = runs_of(home)[0], f"{folder}: train.py is not as it was submitted: "
    assert f"error: {reason}" in said
    assert read_error(one.folder).startswith(reason) and not one.is_done
    assert (one.folder / "log.txt").read_text().count("\n") == 1


def test_a_job_that_imports_the_code_of_elsewhere_is_refused(tmp_path):
    copy = copy_code(tmp_path, allow_dirty=True)
    copy.check(root=copy.folder)
    with pytest.raises(TrainingError, match="this job imports the code in"):
        copy.check()


def test_the_checkout_of_another_user_is_copied_too(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert "train.py" in copy_code(tmp_path, allow_dirty=True).digests


def test_what_is_written_is_the_group_s_too_where_the_umask_says_so(slurm, home):
    before = os.umask(0o002)
    try:
        run(home, *SUBMIT, *ONE_RUN)
        run(home, *ONE_RUN)
    finally:
        os.umask(before)
    paths = [home, *home.rglob("*")]
    assert {"done.json", "checkpoint.pt", "submit.lock", "71_submitted.pkl", "train.py",
            "tiny_experiment_smoke.shard-1-of-3.csv"} <= {path.name for path in paths}
    assert [path for path in paths if not path.stat().st_mode & stat.S_IWGRP] == []


# ---- what sbatch is given

def test_in_a_folder_with_a_space_and_a_quote_a_killed_job_is_requeued(slurm, home):
    run(home, *SUBMIT, *ONE_RUN, "--setup", "set -e")
    (slurm / "killed").touch()
    before = sorted(home.parent.iterdir())
    run_job(home, code=137)
    assert (slurm / "told").read_text() == "requeue 71\n"
    assert (home / "runs/tiny_experiment_smoke/slurm/killed_71_0").read_text() == "137\n"
    assert sorted(home.parent.iterdir()) == before and len(list(home.iterdir())) == 3


@pytest.mark.parametrize("name", ["100%", "a\\b", "two\nlines"])
def test_a_folder_that_slurm_would_read_as_something_else_is_refused(name, slurm, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / name, *SUBMIT)
    assert "give another --runs-dir" in str(stop.value) and not (slurm / "jobs").exists()


def test_the_command_for_any_shell_names_the_folders_and_is_quoted(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my scripts/tiny.py"])
    run(Path("it's here"), *SUBMIT, *ONE_RUN)
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("from any shell: ").partition(" (or")[0])
    here = tmp_path / "it's here"
    assert words == ["python", "my scripts/tiny.py", "--shard", "1/3", "--runs-dir",
                     str(here / "runs"), "--results-dir", str(here / "results"), "--figures-dir",
                     str(here / "figures"), "--status"]


def variables(path):
    return {line.partition("=")[0] for line in path.read_text().splitlines()}


def test_an_outer_job_s_and_the_user_s_options_do_not_reach_slurm(slurm, home, monkeypatch, capsys):
    outer = {"SLURM_CPU_BIND": "none", "SLURM_MEM_PER_CPU": "1", "SBATCH_PARTITION": "other",
             "SQUEUE_STATES": "RUNNING", "SLURM_CONF": "/etc/slurm.conf"}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    run(home, *SUBMIT, *ONE_RUN)
    assert "not given to sbatch: SBATCH_PARTITION: " in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with pytest.raises(SystemExit):  # the job is not in the queue
        run(home, "--status")
    for name in ("sbatch.env", "squeue.env"):
        assert variables(slurm / name) & {*outer, "SLURM_JOB_ID"} == {"SLURM_CONF"}
    assert os.environ["SBATCH_PARTITION"] == "other"
    run(home, *SUBMIT)
    assert "not given to sbatch" not in capsys.readouterr().out  # it is the outer job's


def test_a_job_listens_to_the_printed_signal_whatever_the_environment_says(slurm, home, monkeypatch, capsys):
    monkeypatch.setattr(submitit.JobEnvironment, "USR_SIG", "USR1")  # as when it is imported
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    run(home, *SUBMIT, *ONE_RUN, "--dry-run")
    assert " --signal=USR2@120 " in capsys.readouterr().out
    run(home, *SUBMIT, *ONE_RUN, "--setup", "export SUBMITIT_PREEMPT_SIGNAL=USR1")
    assert options_of(script_of(home))["signal"] == "USR2@120"
    (slurm / "killed").touch()
    run_job(home, code=137)
    assert "SUBMITIT_PREEMPT_SIGNAL=USR2\n" in (slurm / "srun.env").read_text()


def test_what_dry_run_prints_is_what_is_submitted(slurm, home, capsys):
    flags = (*SUBMIT, "--partition", "gpu", "--slurm", "exclusive", "--slurm", "comment=two words",
             "--setup", "module load cuda", "--setup", "export A='b c'", "--srun-arg",
             "container-image=a b", "--srun-arg=--mpi=none", "--max-parallel", "2")
    run(home, *flags, "--dry-run")
    sbatch, script = capsys.readouterr().out.splitlines()[-2:]
    run(home, *flags)
    submitted = script_of(home)
    options, printed = options_of(submitted), [word.removeprefix("--").partition("=")[::2]
                                               for word in shlex.split(sbatch)[1:]]
    of_this_submission = {name: options.pop(name) for name in ("job-name", "chdir", "output", "error")}
    assert dict(printed) == options and options["comment"] == "two words"
    assert options["exclusive"] == "" and "wckey" not in options
    assert all(str(home) in of_this_submission[name] for name in ("chdir", "output", "error"))
    lines = script.removeprefix("with the script: ").split("; ")
    assert lines[:2] == ["module load cuda", "export A='b c'"]
    found = [submitted.index(f"\n{line}\n") for line in lines[:-1]]
    assert found == sorted(found) and found[-1] < submitted.index("\nsrun ")
    assert lines[-1].removeprefix("srun ") in submitted
    assert "'--container-image=a b' --mpi=none" in lines[-1]


@pytest.mark.parametrize("limit, waits", [((), None), (("--max-parallel", "1"), "afterany:71")])
def test_a_grid_above_the_site_s_largest_array_is_several(limit, waits, slurm, home, capsys):
    (slurm / "config").write_text("MaxArraySize = 2\n")
    run(home, *SUBMIT, *limit, "--dry-run")
    assert capsys.readouterr().out.count("sbatch ") == 2
    run(home, *SUBMIT, *limit)
    assert "submitted 3 runs as job 71, 72, " in capsys.readouterr().out
    jobs = [json.loads((run.folder / "job.json").read_text()) for run in runs_of(home)]
    assert [(job["job"], job["index"]) for job in jobs] == [("71_0", 0), ("71_1", 1), ("72", 0)]
    assert jobs[0]["name"] == jobs[1]["name"] != jobs[2]["name"]
    first, second = (options_of(script_of(home, job)) for job in (71, 72))
    assert first["array"].startswith("0-1%") and "array" not in second
    assert "dependency" not in first and second.get("dependency") == waits


# ---- what goes wrong

@pytest.mark.parametrize("where, what", [
    (Path, "write_bytes"), (os, "fsync"), (submitit.core.utils.DelayedSubmission, "dump")])
def test_a_full_disk_at_submission_names_a_file_and_loses_nothing(where, what, slurm, home, monkeypatch):
    one = runs_of(home)[0]
    one.folder.mkdir(parents=True)
    (one.folder / "error.txt").write_text("why it failed\n")

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(where, what, fails)
    with pytest.raises(SystemExit) as stop:
        run(home, *SUBMIT, *ONE_RUN)
    assert re.match(rf"tiny_experiment.py: error: {home}/runs/\S+: No space left on device", str(stop.value))
    assert read_error(one.folder) == "why it failed" and not (slurm / "jobs").exists()
    assert not list((home / "runs").glob("code/.*"))


def test_a_job_that_restarts_without_progress_ends_and_says_what_to_raise(slurm, home, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "71", "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(home)}.items():
        monkeypatch.setenv(name, value)
    home.mkdir()
    one = runs_of(home)[0]
    one.folder.mkdir(parents=True)
    metrics = one.folder / "metrics.csv"

    def starts(*steps):
        """Start at each of these steps; the number of starts that were not refused."""
        job = TrainJob(one, Place(), None, (5, 200))
        for count, step in enumerate(steps):
            metrics.write_text(f"{step},8,5.0,1.0,0.01,1.0\n")
            try:
                job._refuse_to_go_round()
            except TrainingError as error:
                assert " restarts in a row brought no new step" in str(error)
                assert "raise --timeout-min (now 5, the last 200 s of it" in str(error)
                return count
        return len(steps)
    assert starts(0, 10, 10, 10, 11, 11, 11, 11) == 7
    assert starts(11) == 0
    assert starts(20, 18, 19, 20) == 3  # what a kill lost and was done again is nothing new
    (home / "restarts_71.json").write_text("[1")
    assert starts(20, 20, 20, 20) == 3


@pytest.mark.parametrize("age_s, step_s, note", [(50, 1, ""), (300, 1, r", no step for 3\d\d s"),
                                                 (300, 100, ""),
                                                 (600, 100, r", no step for 6\d\d s")])
def test_status_tells_of_a_run_that_stands_still(age_s, step_s, note, slurm, home, monkeypatch, capsys):
    one, now = runs_of(home)[0], time.time()
    claim = Claim(one.folder)
    claim.take()
    for name in ("log.txt", "metrics.csv"):
        (one.folder / name).write_text(f"2,16,5.0,1.0,0.01,{2 * step_s}.0\n")
        os.utime(one.folder / name, (now - age_s,) * 2)
    (slurm / "queue").write_text(f"{JOB['name']}|71|RUNNING|None\n")
    (one.folder / "job.json").write_text(json.dumps(JOB))
    monkeypatch.setattr(time, "time", lambda: now + 7200)  # this machine's clock is wrong
    run(home, *ONE_RUN, "--status")
    line = capsys.readouterr().out.splitlines()[1]
    assert re.search(f"running .* job 71{note}$", line), line
    os.utime(one.folder / "log.txt")  # it has just begun again
    run(home, *ONE_RUN, "--status")
    assert "no step" not in capsys.readouterr().out
    claim.release()


def test_status_tells_how_a_held_job_goes_on(slurm, home, capsys):
    one = runs_of(home)[0]
    one.folder.mkdir(parents=True)
    (one.folder / "job.json").write_text(json.dumps(JOB))
    for reason, way_on in (("launch failed requeued held", ": scontrol release 71"), ("Resources", "")):
        (slurm / "queue").write_text(f"{JOB['name']}|71|PENDING|{reason}\n")
        run(home, *ONE_RUN, "--status")
        assert capsys.readouterr().out.splitlines()[1].endswith(f" job 71 ({reason}){way_on}")
