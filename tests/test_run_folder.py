"""A run folder: claims, two whole checkpoints, what is told, and stopping on request."""
import contextlib
import copy
import dataclasses
import fcntl
import functools
import json
import os
import pty
import signal
import subprocess
import termios
import threading
import time

import numpy as np
import pytest
import torch

import evaluate
import recipe
from data import load_images
from harness import claim as claim_module, files, run_folder
from harness.checkpoint import read_checkpoint, read_tensors, save_checkpoint
from harness.claim import Claim, process_started, read_claim, this_machine
from harness.errors import (BusyError, CheckpointError, TrainingError, UserError, one_line,
                            printable)
from harness.files import locked, remove_leftovers, write_atomically
from harness.host import ROOT
from harness.place import Place
from harness.run_folder import RunLog, is_running, read_done, read_error, read_progress
from harness.signals import Signals
from jet import JetConfig
from tests import forked
from train import TrainConfig, train

MODEL = JetConfig(image_size=8, num_couplings=1, kinds=("channels",), block_depth=1, emb_dim=8,
                  num_heads=2)


def config_of(folder):
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    return TrainConfig(model=MODEL, data=str(folder / "images.npy"), batch_size=8, total_steps=6,
                       lr=1e-2)


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path)


@pytest.fixture
def short(config):
    """Of a run of which a step is enough."""
    return dataclasses.replace(config, total_steps=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    train(config_of(folder), folder / "run", quiet=True)
    return read_tensors(folder / "run/checkpoint.pt")


def same_weights(run_dir, state):
    saved = read_tensors(run_dir / "checkpoint.pt")
    return saved["step"] == state["step"] and all(
        torch.equal(saved["model"][name], tensor) for name, tensor in state["model"].items())


def steps_of_metrics(run_dir):
    lines = (run_dir / "metrics.csv").read_text().split()[1:]
    return [int(line.split(",")[0]) for line in lines]


def steps_of_checkpoints(run_dir):
    return [read_tensors(run_dir / name)["step"]
            for name in ("checkpoint.pt", "checkpoint-previous.pt")]


def held(folder, **changes):
    """A claim file by somebody who is not this process."""
    folder.mkdir(exist_ok=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    claim = {"host": "elsewhere", "pid": dead.pid, "machine": this_machine(), "started": 1,
             "job": None, "token": "x"} | changes
    (folder / "claim.json").write_text(json.dumps(claim))
    return folder


# ---- claims

def test_a_living_process_keeps_its_claim_and_leaves_nothing(tmp_path):
    first, second = Claim(tmp_path), Claim(tmp_path)
    first.take()
    assert is_running(tmp_path)
    message = rf"another process is at this run \(process {os.getpid()} on .*wait for it"
    with pytest.raises(BusyError, match=message):
        second.take()
    second.release()  # of what was never taken: nothing
    first.check()
    first.release()
    assert not is_running(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["lock"]
    second.take()
    second.release()


@pytest.mark.parametrize("changes, age_s, taken", [
    ({}, 0, True),  # a process of this machine that is not there
    ({"pid": os.getpid(), "started": 1}, 0, True),  # its number belongs to another process by now
    # it lives, if silently
    ({"pid": os.getpid(), "started": process_started(os.getpid())}, 1e6, False),
    ({"machine": "another"}, 0, False), ({"machine": "another"}, 45, False),
    ({"machine": "another"}, 75, True),
    ({"machine": None}, 0, False), ({"machine": None}, 75, True)])
def test_a_claim_is_taken_over_from_the_dead_alone(tmp_path, changes, age_s, taken):
    held(tmp_path, **changes)
    os.utime(tmp_path / "claim.json", (time.time() - age_s,) * 2)
    claim = Claim(tmp_path)
    assert is_running(tmp_path) is not taken
    if taken:
        claim.take()
        assert read_claim(tmp_path)["token"] == claim.ours["token"]
        claim.release()
    else:
        with pytest.raises(BusyError, match=r"process \d+ on elsewhere"):
            claim.take()
        assert read_claim(tmp_path)["token"] == "x"


@pytest.mark.parametrize("skew_s", [-7200, 7200])
def test_claims_are_judged_by_the_clock_of_the_files_not_of_this_machine(
        tmp_path, monkeypatch, skew_s):
    held(tmp_path, machine="another")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew_s)
    assert is_running(tmp_path)
    with pytest.raises(BusyError, match=r"last heard of \d s ago"):
        Claim(tmp_path).take()
    os.utime(tmp_path / "claim.json", (now() - 75,) * 2)
    assert not is_running(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\0" * 50, '{"host": "a"}'])
def test_a_torn_claim_is_taken_over_once_it_is_old(tmp_path, content):
    (tmp_path / "claim.json").write_text(content)
    with pytest.raises(BusyError):
        Claim(tmp_path).take()
    os.utime(tmp_path / "claim.json", (time.time() - 75,) * 2)
    claim = Claim(tmp_path)
    claim.take()
    claim.release()


def test_of_many_that_see_a_dead_holder_one_takes_over(tmp_path):
    for attempt in range(10):
        folder = held(tmp_path / str(attempt))
        claims, won = [Claim(folder) for _ in range(8)], []

        def contend(claim):
            try:
                claim.take()
                won.append(claim)
            except BusyError:
                pass
        threads = [threading.Thread(target=contend, args=(claim,)) for claim in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        won[0].release()


def test_a_process_suspended_with_the_lock_is_waited_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.2)
    with locked(tmp_path / "lock"):  # for another open file as by another process
        with pytest.raises(BusyError, match=r"/lock: another process has had it locked for 0.2 s: wait for that to end"):
            Claim(tmp_path).take()
        monkeypatch.setattr(files, "LOCK_WAIT_S", 60)
        claim = Claim(tmp_path)
        waiting = threading.Thread(target=claim.take, daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive() and {path.name for path in tmp_path.iterdir()} == {"lock", "claim.json"}
    claim.release()


def test_a_claim_is_waited_for(tmp_path):
    first, second = Claim(tmp_path), Claim(tmp_path)
    first.take()
    threading.Timer(0.3, first.release).start()
    second.take(wait_s=5)
    second.check()
    second.release()


def test_the_heartbeat_keeps_a_claim_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_module, "HEARTBEAT_S", 0.02)
    claim = Claim(tmp_path)
    claim.take()
    os.utime(tmp_path / "claim.json", (1, 1))
    forked.wait_until(lambda: (tmp_path / "claim.json").stat().st_mtime >= time.time() - 5, seconds=10)
    claim.release()


@pytest.mark.parametrize("loss", ["taken", "gone"])
def test_a_process_that_lost_its_claim_writes_no_more(tmp_path, config, monkeypatch, loss):
    def lose(*arguments, original=recipe.training_step):
        if arguments[3] == 3:
            (tmp_path / "run/claim.json").unlink()
            if loss == "taken":
                held(tmp_path / "run", machine="another")
        return original(*arguments)
    def checkpoints():
        return {path.name: path.read_bytes() for path in (tmp_path / "run").glob("checkpoint*")}
    train(config, tmp_path / "run", stop_after=2, quiet=True)
    before = checkpoints()
    monkeypatch.setattr(recipe, "training_step", lose)
    message = "taken over by another process .* nothing more was written"
    with pytest.raises(BusyError, match=message):
        train(config, tmp_path / "run", quiet=True)
    assert checkpoints() == before and steps_of_metrics(tmp_path / "run") == [1, 2, 3]
    assert (tmp_path / "run/claim.json").exists() == (loss == "taken")  # it is not ours to remove
    assert "failed" not in (tmp_path / "run/log.txt").read_text()
    assert not (tmp_path / "run/error.txt").exists() and not (tmp_path / "run/done.json").exists()


def test_a_run_that_another_process_has_finished_meanwhile_is_not_done_again(tmp_path, short,
                                                                             monkeypatch):
    def other(self, wait_s, original=Claim.take):
        monkeypatch.undo()
        train(short, tmp_path / "run", quiet=True)
        original(self, wait_s)
    monkeypatch.setattr(Claim, "take", other)
    monkeypatch.setattr(run_folder, "save_checkpoint", None)
    assert train(short, tmp_path / "run", quiet=True)["num_images"] == 40
    assert (tmp_path / "run/log.txt").read_text().count("finished") == 1


# ---- checkpoints

def state(step):
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step))
    assert steps_of_checkpoints(tmp_path) == [3, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999, "flipped"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, share):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    content, lines = bytearray((tmp_path / "checkpoint.pt").read_bytes()), []
    if share == "flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[int(share * len(content)):]
    (tmp_path / "checkpoint.pt").write_bytes(content)
    path, saved = read_checkpoint(tmp_path, lines.append)
    assert saved["step"] == 1 and path.name == "checkpoint-previous.pt"
    assert len(lines) == 1 and "\n" not in lines[0]
    assert "going on from checkpoint-previous.pt, step 1" in lines[0]
    save_checkpoint(tmp_path, state(2))  # must not put the torn one in the place of the whole one
    assert steps_of_checkpoints(tmp_path) == [2, 1]


def test_a_missing_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    """As a kill between the two renames leaves it."""
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    (tmp_path / "checkpoint.pt").unlink()
    lines = []
    assert read_checkpoint(tmp_path, lines.append)[1]["step"] == 1 and "missing" in lines[0]


def test_without_a_whole_checkpoint_it_is_an_error(tmp_path):
    assert read_checkpoint(tmp_path, None) == (None, None)
    save_checkpoint(tmp_path, state(1))
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="there is none before it: move it away"):
        read_checkpoint(tmp_path, None)
    (tmp_path / "checkpoint-previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="move away what is there to begin again"):
        read_checkpoint(tmp_path, None)


def test_a_checkpoint_that_cannot_be_read_back_takes_no_place(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))

    def torn(content, file, original=torch.save):
        original(content, file)
        file.truncate(file.tell() // 2)
    monkeypatch.setattr(torch, "save", torn)
    message = "checkpoint of step 3 was not saved .what was read back"
    with pytest.raises(TrainingError, match=message):
        save_checkpoint(tmp_path, state(3))
    assert steps_of_checkpoints(tmp_path) == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_goes_on_from_the_checkpoint_before_with_the_same_bits(tmp_path, config, whole,
                                                                     capsys):
    train(config, tmp_path / "run", stop_after=4, quiet=True, place=Place(checkpoint_every_s=0))
    newest = tmp_path / "run/checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    train(config, tmp_path / "run", quiet=True)
    assert same_weights(tmp_path / "run", whole)
    for text in (capsys.readouterr().err, (tmp_path / "run/log.txt").read_text()):
        assert "going on from checkpoint-previous.pt, step 3" in text
    assert "resumed at step 3" in (tmp_path / "run/log.txt").read_text()
    assert steps_of_metrics(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# ---- what is told

def test_a_file_is_whole_whatever_writes_it_at_once(tmp_path):
    texts = [str(number) * 100_000 for number in range(4)]

    def write(text):
        for _ in range(20):
            write_atomically(tmp_path / "file", text)
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_killed_writers_are_removed(tmp_path, short):
    for name in (".checkpoint.pt.0123.tmp", ".claim.json.4567.tmp"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, older_than_s=60)
    assert len(list(tmp_path.glob(".*"))) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.checkpoint.pt.0123.tmp").write_text("x")
    train(short, tmp_path / "run", stop_after=1, quiet=True)
    assert not list((tmp_path / "run").glob(".*"))


def test_an_error_is_left_in_the_folder_until_the_next_attempt(tmp_path, config, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("of\nits own")
    monkeypatch.setattr(recipe, "training_step", broken)
    with pytest.raises(RuntimeError):
        train(config, tmp_path / "run", quiet=True)
    assert read_error(tmp_path / "run") == "RuntimeError: of its own"
    assert "Traceback" in (tmp_path / "run/error.txt").read_text()
    assert (tmp_path / "run/log.txt").read_text().endswith(" failed: RuntimeError: of its own\n")
    monkeypatch.undo()
    train(config, tmp_path / "run", stop_after=1, quiet=True)
    assert read_error(tmp_path / "run") is None


def test_a_torn_log_goes_on_with_a_line_of_its_own(tmp_path):
    (tmp_path / "log.txt").write_text("one\ntwo, to")
    RunLog(tmp_path).write("three")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[:2] == ["one", "two, to"] and lines[2].endswith(" three") and len(lines) == 3


def test_progress_is_the_last_whole_line(tmp_path):
    assert read_progress(tmp_path) == (0, 0.0, 0.0)
    (tmp_path / "metrics.csv").write_text("step,images_seen,bits_per_dim,grad_norm,lr,seconds\n"
                                          "1,8,7.5,1,1,0.5\n2,16,7.4,1,1,0")
    assert read_progress(tmp_path) == (1, 7.5, 0.5)


def test_lines_of_metrics_are_put_in_order_and_missing_ones_told(tmp_path):
    row = "{},8,7.5,1,1,0.5\n".format
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("header\n" + "".join(map(row, (1, 2, 3, 5, 2, 3, "²", 9))))
    RunLog(tmp_path).begin(step=6)
    assert metrics.read_text() == "".join(
        [run_folder.METRICS_COLUMNS + "\n", *map(row, (1, 2, 3, 5))])
    log = (tmp_path / "log.txt").read_text()
    assert "metrics.csv: 1 torn lines dropped" in log
    assert "metrics.csv: 2 of the lines up to step 6 are missing" in log


def test_a_heartbeat_does_not_keep_the_claim_of_another_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_module, "HEARTBEAT_S", 0.01)
    claim = Claim(tmp_path)
    claim.take()
    held(tmp_path, machine="another")
    os.utime(tmp_path / "claim.json", (1, 1))
    time.sleep(0.2)
    assert (tmp_path / "claim.json").stat().st_mtime == 1
    claim.release()
    assert read_claim(tmp_path)["token"] == "x"


def test_a_folder_that_cannot_be_one_is_one_line(tmp_path, config):
    (tmp_path / "run").write_text("a file")
    assert not is_running(tmp_path / "run") and read_progress(tmp_path / "run") == (0, 0.0, 0.0)
    message = "cannot be a run folder .*: fix that, or choose another"
    with pytest.raises(TrainingError, match=message):
        train(config, tmp_path / "run", quiet=True)


def test_metrics_hold_each_step_once_and_the_log_start_restart_and_end(tmp_path, config):
    train(config, tmp_path / "run", stop_after=3, quiet=True)
    train(config, tmp_path / "run", quiet=True)
    assert steps_of_metrics(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    text = (tmp_path / "run/log.txt").read_text()
    places = [text.index(words) for words in (
        "started at step 0: 1 process of 1 thread on ", "stopped at step 3", "resumed at step 3",
        "finished: ")]
    assert places == sorted(places)


# ---- stopping on request

def signalled(monkeypatch, number, at):
    """This process gets a signal in the training step `at`."""
    def step(*arguments, original=recipe.training_step):
        if arguments[3] == at:
            os.kill(os.getpid(), number)
        return original(*arguments)
    monkeypatch.setattr(recipe, "training_step", step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_with_a_checkpoint_of_that_step(tmp_path, config, monkeypatch, whole,
                                                             number, capfd):
    signalled(monkeypatch, number, at=2)
    before = signal.getsignal(number)
    with Signals().on() as signals:
        assert train(config, tmp_path / "run", signals=signals, quiet=True) == {"step": 3}
    assert signals.stop and signal.getsignal(number) is before
    assert f"{number.name}: stopping with a checkpoint after this step" in capfd.readouterr().err
    assert read_tensors(tmp_path / "run/checkpoint.pt")["step"] == 3
    monkeypatch.undo()
    train(config, tmp_path / "run", quiet=True)
    assert same_weights(tmp_path / "run", whole)


def test_who_wants_more_steps_is_told_how(tmp_path, short):
    train(short, tmp_path / "run", quiet=True)
    longer = dataclasses.replace(short, total_steps=short.total_steps + 1)
    with pytest.raises(TrainingError, match="total_steps was 1 and is now 2.*--init-from"):
        train(longer, tmp_path / "run", quiet=True)


def test_a_second_interrupt_ends_at_once():
    with Signals(quiet=True).on(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_to_save_saves_and_goes_on(tmp_path, config, monkeypatch, whole):
    signalled(monkeypatch, signal.SIGTERM, at=2)
    with Signals().on(stop=(), save=[signal.SIGTERM]) as signals:
        train(config, tmp_path / "run", signals=signals, quiet=True)
    assert same_weights(tmp_path / "run", whole) and not signals.save
    assert read_tensors(tmp_path / "run/checkpoint-previous.pt")["step"] == 3
    assert "saved at step 3: a signal came" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("eval_every, step", [(2, 2), (0, 6)])
def test_an_evaluation_that_was_stopped_is_done_again(tmp_path, config, monkeypatch, eval_every,
                                                      step):
    config = dataclasses.replace(config, eval_every=eval_every)
    rows = train(config, tmp_path / "whole-rows", quiet=True)["rows"]
    signals = Signals()

    def stop(*arguments, original=evaluate.evaluation_noise):
        signals.stop = True  # in the first batch, of the train rows: the test rows begin no more
        return original(*arguments)
    monkeypatch.setattr(evaluate, "evaluation_noise", stop)
    assert train(config, tmp_path / "run", signals=signals, quiet=True) == {"step": step}
    monkeypatch.undo()
    assert train(config, tmp_path / "run", quiet=True)["rows"] == rows


def flags_of(config, run_dir):
    return ["--data", config.data, "--batch_size", "8", "--total_steps", "3000", "--model.num_couplings", "1",
            "--model.block_depth", "1", "--model.emb_dim", "8", "--model.num_heads", "2", "--model.kinds", "channels",
            "--run-dir", str(run_dir)]


def started(config, run_dir, out, before=lambda: None):
    """train.py in a process of its own, after its first step."""
    running = forked.start(ROOT / "train.py", *flags_of(config, run_dir), out=out, before=before)
    forked.wait_until(lambda: read_progress(run_dir)[0] >= 1, running)
    return running


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_train_py_stops_in_one_line_and_goes_on_with_the_same_bits(tmp_path, config, number, code):
    running = started(config, tmp_path / "run", tmp_path / "out.txt")
    os.kill(running.pid, number)
    running.join(60)
    error = (tmp_path / "out.txt").read_text()
    step = read_tensors(tmp_path / "run/checkpoint.pt")["step"]
    assert running.exitcode == code and 0 < step < 3000
    assert error.endswith(f"train.py: stopped at step {step}: the same command goes on\n")
    assert "Traceback" not in error


def test_a_closed_terminal_leaves_a_checkpoint_unless_it_was_to_be_ignored(tmp_path, config):
    ours, terminal = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore it
        for end in (ours, terminal):
            os.close(end)
    closed = started(config, tmp_path / "closed", os.ttyname(terminal), own_terminal)
    os.close(terminal)
    os.close(ours)  # as a terminal's window that is closed
    closed.join(60)
    assert closed.exitcode == 1
    assert 0 < read_tensors(tmp_path / "closed/checkpoint.pt")["step"] < 3000
    ignored = started(config, tmp_path / "ignored", os.devnull,
                      lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    step = read_progress(tmp_path / "ignored")[0]
    os.kill(ignored.pid, signal.SIGHUP)
    forked.wait_until(lambda: read_progress(tmp_path / "ignored")[0] >= step + 20, ignored)
    ignored.terminate()
    ignored.join(60)


def test_the_result_of_another_run_is_not_taken_for_this_ones(tmp_path, short):
    train(short, tmp_path / "one", quiet=True)
    other = dataclasses.replace(short, seed=1)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/done.json").write_bytes((tmp_path / "one/done.json").read_bytes())
    with pytest.raises(TrainingError, match="two/done.json belongs .* seed was 0 and is now 1"):
        train(other, tmp_path / "two", quiet=True)
    assert train(short, tmp_path / "one", quiet=True)["config"]["seed"] == 0
    # the same images at another path are the same run
    np.save(tmp_path / "again.npy", np.load(short.data))
    moved = dataclasses.replace(short, data=str(tmp_path / "again.npy"))
    os.unlink(short.data)
    assert train(moved, tmp_path / "one", quiet=True)["config"]["seed"] == 0


@pytest.mark.parametrize("place, value", [
    (("bits_per_dim",), "4.1"), (("bits_per_dim",), float("nan")), (("num_images",), 10 ** 30),
    (("num_images",), 0), (("num_images",), True), (("bits_per_dim_se",), float("inf")),
    (("bits_per_dim_se",), -1.0), (("test_fingerprint",), ""), (("train_fingerprint",), None),
    (("test_fingerprint",), "z" * 64), (("train_seconds",), -1), (("device",), "abacus"),
    (("hardware",), "a\x1b[2Jb"), (("git_commit",), "HEAD"), (("rows",), []), (("config",), "x"),
    (("rows", 0, "split"), "validation"), (("rows", 1, "step"), 1.5), (("rows", 1), None),
    (("rows", 1, "logdet_nats"), float("nan")), (("rows", 0, "bits_per_dim"), [4.0]),
    (("rows", 1, "bits_per_dim_se"), float("inf")), ((), 3), ((), [])])
def test_a_result_that_no_run_can_have_is_refused_in_one_line(tmp_path, finished, place, value):
    done = json.loads(json.dumps(finished))
    if place:
        *path, last = place
        functools.reduce(lambda part, key: part[key], path, done)[last] = value
    (tmp_path / "done.json").write_text(json.dumps(done if place else value))
    with pytest.raises(TrainingError, match="done.json: damaged .*: delete it") as error:
        read_done(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500 + len(str(tmp_path))


def test_one_image_has_no_standard_error(tmp_path, short):
    np.save(tmp_path / "one.npy", np.load(short.data)[:1])
    alone = dataclasses.replace(short, data=str(tmp_path / "one.npy"), batch_size=1)
    done = train(alone, tmp_path / "run", quiet=True)
    assert train(alone, tmp_path / "run", quiet=True)["num_images"] == done["num_images"] == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """done.json of a run."""
    folder = tmp_path_factory.mktemp("finished")
    config = TrainConfig(model=JetConfig(image_size=32, num_couplings=1, block_depth=1, emb_dim=8,
                                         patch_size=8, num_heads=2),
                         data="cifar10-subset-vehicles", batch_size=4, total_steps=0)
    return train(config, folder / "run", quiet=True)


@pytest.mark.parametrize("name", ["log.txt", "metrics.csv", "lock"])
def test_nothing_is_written_through_a_link_in_a_run_folder(tmp_path, short, name):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with contextlib.suppress(TrainingError, OSError):
        train(short, tmp_path / "run", quiet=True)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_lock_cuts_nothing(tmp_path):
    (tmp_path / "lock").write_text("content")
    with locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "content"


@pytest.mark.parametrize("name", ["config.json", "done.json", "claim.json", "metrics.csv",
                                  "error.txt", "checkpoint.pt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "bytes", "folder"])
def test_what_is_no_file_of_ours_ends_in_one_line(tmp_path, short, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"[" * 200_000 if kind == "deep" else bytes(range(256)))
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(60)
    try:
        train(short, path.parent, quiet=True)
    except (UserError, OSError) as error:
        line = printable(one_line(error))
        assert (name if name != "claim.json" else "another process") in line
        assert len(line) < 1000 + len(str(tmp_path))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("changes", [{"num_couplings": 10 ** 7}, {"block_depth": 10 ** 7},
                                     {"emb_dim": 2 ** 18}, {"emb_dim": 2 ** 32}])
def test_a_model_that_no_machine_can_hold_is_refused_at_once(tmp_path, config, changes):
    large = dataclasses.replace(config, model=dataclasses.replace(MODEL, **changes))
    begun = time.process_time()
    with pytest.raises(TrainingError, match="its weights need .* GiB, and .* make the model small"):
        train(large, tmp_path / "run", quiet=True)
    assert time.process_time() - begun < 10


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """(the configuration of a run that was stopped, its checkpoint's content)."""
    folder = tmp_path_factory.mktemp("half_done")
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:8, ::4, ::4])
    config = TrainConfig(model=MODEL, data=str(folder / "images.npy"), batch_size=4, total_steps=3)
    train(config, folder / "run", stop_after=2, quiet=True)
    return config, torch.load(folder / "run/checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("place, value", [
    (("step",), 4), (("step",), True), (("step",), 1.0), (("step",), "2"), (("seconds",), float("nan")),
    (("seconds",), -1.0), (("seconds",), 10 ** 400), (("rows",), [5]), (("rows",), [{}]), (("rows",), {}),
    (("rows",), [{"step": 2, "split": "test"}]), (("micro_batch",), 0), (("micro_batch",), 2 ** 62),
    (("optimizer", 0, "step"), torch.tensor(7.0)), (("optimizer", 0, "step"), torch.zeros(0)),
    (("optimizer", 0, "step"), torch.zeros(3)), (("optimizer", 0, "exp_avg"), torch.zeros(2)),
    (("optimizer", 0), {}), (("optimizer", 0), None), (("optimizer",), []), (("optimizer",), {})])
def test_a_checkpoint_that_no_run_can_have_is_not_resumed(tmp_path, half_done, place, value):
    config, content = half_done
    content = copy.deepcopy(content)
    *path, last = place
    functools.reduce(lambda part, key: part[key], path, content)[last] = value
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run/checkpoint.pt")
    with pytest.raises(CheckpointError, match="checkpoint.pt.*: move it away to begin again"):
        train(config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("claim", [
    {"pid": "\0"}, {"pid": None}, {"pid": [1]}, {"pid": 10 ** 400}, {"pid": "../../1"}, {"host": ["x"]}, 5,
    [], {"started": "x"}, {"token": {"x": 1}}])
def test_a_claim_that_no_process_wrote_is_taken_over(tmp_path, claim):
    path, ours = tmp_path / "claim.json", {"machine": this_machine(), "started": 1}
    path.write_text(json.dumps(ours | claim if isinstance(claim, dict) else claim))
    os.utime(path, (1, 1))
    claim = Claim(tmp_path)
    claim.take()
    claim.release()


@pytest.mark.parametrize("line", ["9" * 4000 + ",1,1,1,1,1\n", "1,1,nan,1,1,1\n", "1,1,1,1,1,inf\n",
                                  "1,1,1,1,1," + "9" * 400 + "\n", "٣,1,1,1,1,1\n"])
def test_a_line_of_metrics_that_no_run_wrote_is_no_progress(tmp_path, line):
    (tmp_path / "metrics.csv").write_text(run_folder.METRICS_COLUMNS + "\n" + line)
    assert read_progress(tmp_path) == (0, 0.0, 0.0)
    RunLog(tmp_path).begin(0)
