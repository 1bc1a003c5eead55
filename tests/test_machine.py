"""Which code a number is of, and where a run is run: bad values are one line."""
import json
import os
import subprocess
import sys

import pytest
import torch

from harness import machine, place
from harness.errors import TrainingError, UserError, short
from harness.flags import ArgumentParser, one_line_errors
from harness.host import ROOT, code_version
from harness.place import Place, add_place_flags, place_from_flags, step_mode
from jet import JetConfig
from recipe import TrainConfig

UNKNOWN = {"git_commit": "", "git_dirty": None}


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """(a git repository with one commit, its hash)."""
    folder = tmp_path / "a checkout"
    (folder / "results").mkdir(parents=True)
    for name in ("jet.py", "results/numbers.csv"):
        (folder / name).write_text("1")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder, git(folder, "rev-parse", "HEAD")


def test_a_checkout_has_its_commit_and_is_dirty_by_code_alone(checkout, tmp_path):
    folder, commit = checkout
    assert code_version(folder) == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "link").symlink_to(folder)
    assert code_version(tmp_path / "link") == {"git_commit": commit, "git_dirty": False}
    (folder / "results/numbers.csv").write_text("2")
    assert code_version(folder)["git_dirty"] is False
    (folder / "jet.py").write_text("2")
    assert code_version(folder) == {"git_commit": commit, "git_dirty": True}


def test_a_copy_inside_another_repository_does_not_take_its_commit(checkout):
    copy = checkout[0] / "copies/jet"
    copy.mkdir(parents=True)
    (copy / "jet.py").write_text("1")
    assert code_version(copy) == UNKNOWN
    git(checkout[0], "add", ".")
    git(checkout[0], "commit", "--quiet", "--message", "two")
    assert code_version(copy) == UNKNOWN  # even if it is tracked there


def test_a_clone_of_another_owner_is_read_all_the_same(checkout, monkeypatch):
    folder, commit = checkout
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "-C", folder, "status"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr  # so that git refuses here, too
    assert code_version(folder) == {"git_commit": commit, "git_dirty": False}


@pytest.mark.parametrize("tree, dirty", [("clean", False), ("dirty", True)])
def test_a_copy_with_a_note_has_the_commit_of_the_note(checkout, tree, dirty):
    """Even inside a repository: a sweep's jobs run such copies."""
    (checkout[0] / ".commit.json").write_text(json.dumps(["0123", tree]))
    assert code_version(checkout[0]) == {"git_commit": "0123", "git_dirty": dirty}


def test_outside_git_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_version(tmp_path) == UNKNOWN
    monkeypatch.setenv("PATH", "")  # nor without git
    assert code_version(tmp_path) == UNKNOWN


@pytest.mark.parametrize("field, value, rule", [
    ("threads", 0, "whole number, 1 or more"), ("threads", 1025, "from 1 to 1024"),
    ("threads", 1.5, "whole number"), ("compile", "yes", "true or false"),
    ("graph", 1, "true or false"), ("micro_batch", 0, "whole number, 1 or more"),
    ("checkpoint_activations", "maybe", "auto or on or off"),
    ("checkpoint_every_s", -1, "above 0 or 0"), ("checkpoint_every_s", float("nan"), "finite"),
    ("checkpoint_every_s", float("inf"), "finite")])
def test_a_bad_place_is_one_line_with_field_value_and_rule(field, value, rule):
    with pytest.raises(TrainingError, match=f"^{field}={value!r}: must be .*{rule}") as error:
        Place(**{field: value})
    assert "\n" not in str(error.value) and isinstance(error.value, UserError)


def parse(*flags, **defaults):
    parser = ArgumentParser(prog="program")
    add_place_flags(parser)
    return place_from_flags(vars(parser.parse_args(flags)), **defaults)


def test_flags_say_where_a_run_is_run_and_defaults_hold_for_the_rest():
    assert parse() == Place()
    assert parse(threads=4, wait_s=7.0) == Place(threads=4, wait_s=7.0)
    assert parse("--threads", "2", "--no-compile", threads=4, compile=True) == Place(
        threads=2, compile=False)
    others = parse("--device", "cpu", "--data-root", "sets", "--micro-batch", "8", "--graph",
                   "--checkpoint-activations", "on", "--checkpoint-every-s", "0")
    assert others == Place(device="cpu", data_root="sets", micro_batch=8, graph=True,
                          checkpoint_activations="on", checkpoint_every_s=0)
    assert place_from_flags({"threads": None, "device": "cpu", "lr": 1}) == Place(device="cpu")


@pytest.mark.parametrize("flags, error, message", [
    (["--threads", "0"], TrainingError, "threads=0: must be"),
    (["--threads", "two"], SystemExit, "invalid int value: 'two'"),
    (["--thread", "2"], SystemExit, "did you mean --threads"),
    (["--checkpoint-activations", "no"], SystemExit, "invalid choice: 'no'"),
    (["--wait-s", "3"], SystemExit, "unrecognized arguments")])
def test_bad_flags_are_one_line(flags, error, message, capsys):
    with pytest.raises(error) as raised:
        parse(*flags)
    text = str(raised.value) if error is TrainingError else capsys.readouterr().err
    assert message in text and len(text.splitlines()) == 1


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def mode(steps, device, **settings):
    model = JetConfig(image_size=8, num_couplings=10, emb_dim=8, num_heads=1)
    config = TrainConfig(model=model, data="cifar10-subset", total_steps=steps)
    return step_mode(Place(**settings), config, device)


def test_the_default_on_one_gpu_is_what_measured_best_there(monkeypatch):
    monkeypatch.setattr(place, "lacks_compiler", lambda: "")
    assert mode(9_999, GPU)[:2] == (False, True) and mode(10_000, GPU)[:2] == (True, True)
    assert mode(10_000, CPU)[:2] == (False, False)
    assert mode(10_000, GPU, graph=False, compile=False)[:2] == (False, False)
    assert mode(5, CPU, compile=True)[:2] == (True, False) and mode(5, GPU, compile=True)[0]
    monkeypatch.setattr(place.distributed, "size", lambda: 2)  # a graph is of one process
    assert mode(10_000, GPU)[:2] == (False, False)


def test_a_long_run_that_cannot_be_compiled_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(place.shutil, "which", lambda name: None)
    compiled, graph, line = mode(10_000, GPU)
    assert (compiled, graph) == (False, True) and "needs a C compiler (cc)" in line
    assert "needs" not in mode(9_999, GPU)[2] and "needs" not in mode(10_000, GPU, compile=False)[2]
    assert mode(10_000, GPU, compile=True)[0]  # was asked for: the compiler's own error says it


@pytest.mark.parametrize("program", ["print('x' * 100_000)", "print('x'); import time; time.sleep(0.5)",
                                     "sys.stdout.write('x' * 9000); time.sleep(0.5)"])
def test_a_reader_that_has_enough_ends_a_program_in_silence(program):
    code = ("import sys, time\nfrom harness.flags import one_line_errors\n"
            f"with one_line_errors('p'):\n    {program}\n    print('y' * 100_000)")
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    running.stdout.close()
    assert running.communicate(timeout=60)[1] == b"" and running.returncode == 141


def test_another_broken_pipe_is_an_error_of_one_line(capsys):
    with pytest.raises(SystemExit, match="p: error: .*Broken pipe"), one_line_errors("p"):
        raise BrokenPipeError(32, "Broken pipe")


def test_idle_cores_are_those_that_nobody_uses(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 2, 3, 5})

    def pass_time(busy):  # 100 ticks of each core; these were busy
        def sleep(seconds):
            write(100, busy)
        return sleep

    def write(ticks, busy=()):
        rows = ["cpu 1 2 3 4 5 6 7 8 0 0"] + [
            f"cpu{core} {ticks if core in busy else 0} 0 0 {0 if core in busy else ticks} 0 0 0 0 0 0" for core in range(6)]
        (tmp_path / "proc/stat").write_text("\n".join([*rows, "intr 12"]) + "\n")
    for busy, idle in (((), 4), ((0, 1, 4), 3), ((0, 2, 3, 5), 1)):
        write(0)
        monkeypatch.setattr(machine.time, "sleep", pass_time(busy))
        assert machine.idle_cores(root=tmp_path) == idle
    write(0)
    monkeypatch.setattr(machine.time, "sleep", pass_time(()))
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("250000 100000\n")
    assert machine.idle_cores(root=tmp_path) == 2
    assert machine.idle_cores(root=tmp_path / "none") == 4


@pytest.mark.parametrize("text", ["a\x1b[2Jb\nc", "\ud800", "\x9b2J", "a" * 10 ** 5, "b " * 10 ** 5])
def test_a_foreign_error_is_short_and_printable(text):
    said = short(ValueError(text))
    assert said.isprintable() and len(said) <= 250


@pytest.mark.parametrize("asked, policy", [(None, "passive"), ("active", "active")])
def test_threads_wait_asleep_unless_asked_otherwise_and_records_say_how(asked, policy):
    """It counts before torch is imported, so every command's first import does it."""
    code = "import os, harness, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": asked} if asked else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, cwd=ROOT)
    assert done.stdout.split() == [policy, "False"]


def test_how_threads_wait_is_told(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.of_threads(1) == "1 thread"
    assert machine.where(1, 2, ["a"]).startswith("1 process of 2 threads (waiting passive) on a")
