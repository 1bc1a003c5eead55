"""Preparing: kills, workers, two at once, a full disk; and verify finds one bit in any file."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
from data import load_images
from harness.errors import DataError
from images import prepare
from test_prepare import run
from test_sources import TEST, TRAIN, binary_cifar, encoded, write_tree

PROGRAM = Path(data.__file__)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 larger JPEGs, of which some are damaged."""
    files = {f"{number:04d}.jpg": encoded(TRAIN[number], "JPEG", (260 + number % 9, 200)) for number in range(300)}
    for number in (5, 150, 299):
        files[f"{number:04d}.jpg"] = b"no image"
    return write_tree(tmp_path_factory.mktemp("photos") / "photos", files)


def command(source, out, workers=2):
    return [sys.executable, PROGRAM, "prepare", "photos", "--source", source, "--size", "64", "--filter", "lanczos",
            "--skip-corrupt", "--workers", str(workers), "--out", out]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_do_not_depend_on_workers_or_kills(photos, tmp_path):
    """Killed at random moments, with another number of workers each time; JET_KILLS=20 kills more often."""
    begun = time.monotonic()
    subprocess.run(command(photos, tmp_path / "whole", 1), check=True, capture_output=True)
    took = time.monotonic() - begun
    wanted = contents(tmp_path / "whole")
    assert len(json.loads(wanted["manifest.json"])["skipped"]) == 3
    rng, kills, workers = random.Random(0), 0, [1, 2, 4]
    while kills < int(os.environ.get("JET_KILLS", 2)):
        process = subprocess.Popen(command(photos, tmp_path / "set", workers[kills % 3]), stdout=subprocess.DEVNULL)
        try:
            assert process.wait(took * rng.uniform(0.2, 0.6)) == 0
            assert contents(tmp_path / "set") == wanted
            (tmp_path / "set").rename(tmp_path / f"done{kills}-{time.monotonic()}")
        except subprocess.TimeoutExpired:
            process.kill()  # the main process alone: its workers must see that
            process.wait()
            kills += 1
    subprocess.run(command(photos, tmp_path / "set", 2), check=True, capture_output=True)
    assert contents(tmp_path / "set") == wanted
    time.sleep(1)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "set").encode() in _read(path)]
    assert not left


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


class Stop(Exception):
    pass


def test_an_end_at_any_step_goes_on_with_the_same_bytes(photos, tmp_path, capsys, monkeypatch):
    """Every write of the state, the manifest or a file's place, in turn, is the last thing that happens."""
    arguments = ("prepare", "photos", "--source", photos, "--size", 64, "--filter", "box", "--skip-corrupt", "--workers", 1)
    monkeypatch.setattr(prepare, "SAVE_EVERY_S", 0)
    run(capsys, *arguments, "--out", tmp_path / "whole")
    wanted, calls, end = contents(tmp_path / "whole"), [0], [10 ** 9]

    def stopping(function):
        def call(*arguments, **settings):
            calls[0] += 1
            if calls[0] == end[0]:
                raise Stop
            return function(*arguments, **settings)
        return call
    monkeypatch.setattr(prepare, "write_atomically", stopping(prepare.write_atomically))
    monkeypatch.setattr(prepare.os, "replace", stopping(os.replace))
    run(capsys, *arguments, "--out", tmp_path / "count")
    total = calls[0]
    assert total > 20
    for number in sorted({1, 3, total // 2, *range(total - 6, total + 1)}):
        calls[0], end[0] = 0, number
        out = tmp_path / str(number)
        with pytest.raises(Stop):
            data.main([str(argument) for argument in (*arguments, "--out", out)])
        if not (out / "manifest.json").exists():
            with pytest.raises(DataError):
                load_images(out, "train")
        end[0] = 10 ** 9
        assert run(capsys, *arguments, "--out", out)[0] == 0
        assert contents(out) == wanted, number


def test_two_at_once(photos, tmp_path):
    first = subprocess.Popen(command(photos, tmp_path / "set", 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    partial = tmp_path / "set/partial"
    while not (partial / "claim.json").exists() or list(partial.glob(".claim.json.*.tmp")):  # it has the lock until then
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command(photos, tmp_path / "set"), capture_output=True, text=True)
    assert second.returncode == 1 and "another process is at this" in second.stderr and second.stderr.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    subprocess.run(command(photos, tmp_path / "set"), check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


def test_ctrl_c_ends_in_one_line(photos, tmp_path):
    process = subprocess.Popen(command(photos, tmp_path / "set", 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "set" / "partial" / "train.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "data.py: interrupted: the same command goes on\n")


def test_a_full_disk_ends_in_one_line_and_goes_on(photos, tmp_path):
    for size, reason in ((2 ** 13, "files.sqlite: "), (2 ** 21, "File too large")):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        ended = subprocess.run(command(photos, tmp_path / "set"), capture_output=True, text=True, preexec_fn=limit)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and reason in ended.stderr, ended.stderr
    subprocess.run(command(photos, tmp_path / "set"), check=True, capture_output=True)
    subprocess.run(command(photos, tmp_path / "whole"), check=True, capture_output=True)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_source_that_changed_is_refused(tmp_path, capsys):
    source = write_tree(tmp_path / "photos", {f"{number}.png": encoded(TRAIN[number]) for number in range(200)})
    (source / "77.png").write_bytes(b"no image")
    arguments = ("prepare", "photos", "--source", source, "--size", 32, "--workers", 1, "--out", tmp_path / "set")
    assert "77.png" in run(capsys, *arguments)[2]
    assert "was begun as photos with another variant and size" in run(capsys, *arguments[:4], "--size", 31, *arguments[6:])[2]
    (source / "78.png").write_bytes(encoded(TRAIN[0]) + b"more")
    error = run(capsys, *arguments, "--skip-corrupt")
    skipped = json.loads((tmp_path / "set" / "manifest.json").read_text())["skipped"]
    assert error[0] == 0 and [entry["file"] for entry in skipped] == ["77.png", "78.png"]
    assert "does not have the" in skipped[1]["reason"]


def test_what_was_written_after_the_last_save_is_cut_off(tmp_path, capsys):
    files = {f"{number:03d}.png": encoded(TRAIN[number]) for number in range(100)}
    source = write_tree(tmp_path / "photos", {**files, "095.png": b"no image"})
    arguments = ("prepare", "photos", "--source", source, "--size", 32, "--workers", 1, "--out")
    assert run(capsys, *arguments, tmp_path / "whole", "--skip-corrupt")[0] == 0
    assert "095.png" in run(capsys, *arguments, tmp_path / "set")[2]
    for kind in ("", "_digests"):
        with open(tmp_path / "set" / "partial" / f"train{kind}.npy", "ab") as file:
            assert file.tell() > 128
            file.write(b"torn")
    assert run(capsys, *arguments, tmp_path / "set", "--skip-corrupt")[0] == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A prepared set with every kind of file."""
    folder = tmp_path_factory.mktemp("cifar")
    source = write_tree(folder / "source", binary_cifar())
    data.main(["prepare", "cifar10", "--incomplete", "--source", str(source), "--out", str(folder / "set")])
    return folder / "set"


def test_one_bit_in_any_file_is_found_and_located(labelled, capsys):
    rng = random.Random(0)
    for path in sorted(labelled.iterdir()):
        content = path.read_bytes()
        for header in (False, True) if path.suffix == ".npy" else (False,):
            for _ in range(4):
                begin, end = (0, 128) if header else (128 * (path.suffix == ".npy"), len(content))
                place = rng.randrange(begin, end)
                changed = bytearray(content)
                changed[place] ^= 1 << rng.randrange(8)
                path.write_bytes(changed)
                code, _, error = run(capsys, "verify", labelled)
                assert code == 1 and error.count("\n") <= 1, (path, place)
                if path.suffix == ".npy":
                    split = path.name.split("_")[0].split(".")[0]
                    per_image = (len(content) - 128) // len(load_array_length(labelled, split))
                    wanted = "header was altered (before image 0)" if header else f"image {(place - 128) // per_image} "
                    assert split in error and wanted in error, (path, place, error)
                else:
                    assert "manifest.json" in error, error
        path.write_bytes(content)
    assert run(capsys, "verify", labelled)[0] == 0


def load_array_length(folder, split):
    return range({"train": 200, "test": 40}[split])


def test_files_of_another_length_are_found(labelled, capsys):
    for path in sorted(labelled.glob("*.npy")):
        content = path.read_bytes()
        for changed in (content[:-1], content + b"\0", b""):
            path.write_bytes(changed)
            code, _, error = run(capsys, "verify", labelled)
            assert code == 1 and path.name.split("_")[0].split(".")[0] in error and error.count("\n") <= 1
        path.unlink()
        assert run(capsys, "verify", labelled)[0] == 1
        path.write_bytes(content)
    assert run(capsys, "verify", labelled)[0] == 0


def test_two_processes_share_the_pages_of_a_set(labelled):
    script = ("import sys, numpy, data; a = data.load_images(sys.argv[1], 'train').array; a.sum(); print('ready', flush=True); "
              "input(); m = open('/proc/self/smaps').read().split('train.npy')[1]; "
              "print(*(m.split(k + ':')[1].split()[0] for k in ('Rss', 'Pss', 'Private_Dirty')))")
    processes = [subprocess.Popen([sys.executable, "-c", script, labelled], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True, cwd=PROGRAM.parent) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    rss, pss, dirty = map(int, processes[0].stdout.readline().split())
    for process in processes:
        process.stdin.close()
        process.wait()
    assert rss > 500 and pss <= 0.6 * rss and dirty == 0  # KiB
