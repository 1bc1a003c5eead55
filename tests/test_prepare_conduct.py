"""Preparing: kills, workers, two at once, a full disk; and verify finds one bit in any file."""
import json
import os
import random
import resource
import select
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import data
from data import load_images
from harness.errors import DataError
from harness.files import locked
from images import prepare, readers
from test_prepare import run, workers_are_threads
from test_sources import TEST, TRAIN, binary_cifar, encoded, write_tree
from tests import forked

PHOTOS = 40
LISTED = f"test: {PHOTOS // 10} held out of {PHOTOS}\n"  # what is said first


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Larger JPEGs, of which some are damaged."""
    files = {f"{number:04d}.jpg": encoded(TRAIN[number], "JPEG", (130 + number % 9, 100)) for number in range(PHOTOS)}
    for number in (5, 30, 39):
        files[f"{number:04d}.jpg"] = b"no image"
    return write_tree(tmp_path_factory.mktemp("photos") / "photos", files)


def command(source, out, workers=2):
    return ["prepare", "photos", "--source", source, "--size", "64", "--filter", "lanczos", "--skip-corrupt",
            "--workers", str(workers), "--out", out]


def begin(*arguments, **settings):
    return forked.start(data.__file__, *command(*arguments), **settings)


def finish(*arguments):
    process = begin(*arguments)
    process.join()
    assert process.exitcode == 0


def slowly(monkeypatch):
    decode = readers.decode
    monkeypatch.setattr(readers, "decode", lambda *given: time.sleep(0.02) or decode(*given))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_do_not_depend_on_workers_or_kills(photos, tmp_path, monkeypatch):
    """Killed at random moments, with another number of workers each time; JET_KILLS=20 kills more often."""
    monkeypatch.setattr(prepare, "SAVE_EVERY_S", 0)
    monkeypatch.setattr(readers, "FILES_A_PIECE", 8)
    begun = time.monotonic()
    finish(photos, tmp_path / "whole", 1)
    took = time.monotonic() - begun
    wanted = contents(tmp_path / "whole")
    assert len(json.loads(wanted["manifest.json"])["skipped"]) == 3
    rng, left, workers = random.Random(0), [], [1, 2, 4]
    while len(left) < int(os.environ.get("JET_KILLS", 2)):
        reader, writer = os.pipe()
        process = begin(photos, tmp_path / "set", workers[len(left) % 3])
        os.close(writer)
        process.join(took * rng.uniform(0.2, 0.6))
        if process.exitcode is None:
            process.kill()  # the main process alone: its workers must see that
            process.join()  # until then it has its claim
            left.append(reader)
        else:
            assert process.exitcode == 0 and contents(tmp_path / "set") == wanted
            (tmp_path / "set").rename(tmp_path / f"done-{time.monotonic()}")
            os.close(reader)
    finish(photos, tmp_path / "set", 2)
    assert contents(tmp_path / "set") == wanted
    for reader in left:  # it ends when the last process that inherited the other end does
        assert select.select([reader], [], [], 10)[0]
        os.close(reader)


class Stop(Exception):
    pass


def test_an_end_at_any_step_goes_on_with_the_same_bytes(photos, tmp_path, capsys, monkeypatch, workers_are_threads):
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


def test_two_at_once(photos, tmp_path, capsys, monkeypatch):
    slowly(monkeypatch)
    first = begin(photos, tmp_path / "set", 1)
    partial = tmp_path / "set/partial"
    forked.wait_until((partial / "claim.json").exists, first)
    with locked(partial / "lock"):  # which it has for a moment more
        pass
    os.kill(first.pid, signal.SIGSTOP)
    try:
        code, _, error = run(capsys, *command(photos, tmp_path / "set"))
        assert code == 1 and "another process is at this" in error and "\n" not in error
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert run(capsys, *command(photos, tmp_path / "set"))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


def test_ctrl_c_ends_in_one_line(photos, tmp_path, monkeypatch):
    slowly(monkeypatch)
    process = begin(photos, tmp_path / "set", 2, out=tmp_path / "said")
    forked.wait_until((tmp_path / "set" / "partial" / "train.npy").exists, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    said = (tmp_path / "said").read_text()
    assert (process.exitcode, said) == (130, LISTED + "data.py: interrupted: the same command goes on\n")


def test_a_full_disk_ends_in_one_line_and_goes_on(photos, tmp_path):
    for size, begun, reason in ((2 ** 12, "", "files.sqlite: "), (2 ** 18, LISTED, "File too large")):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        process = begin(photos, tmp_path / "set", out=tmp_path / "said", before=limit)
        process.join()
        said = (tmp_path / "said").read_text()
        error = said.removeprefix(begun)
        assert process.exitcode == 1 and said.startswith(begun) and error.count("\n") == 1 and reason in error, said
    finish(photos, tmp_path / "set")
    finish(photos, tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_source_that_changed_is_refused(tmp_path, capsys):
    source = write_tree(tmp_path / "photos", {f"{number}.png": encoded(TRAIN[number]) for number in range(80)})
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
    both, answers = forked.FORK.Barrier(2), forked.FORK.SimpleQueue()

    def look():
        array = load_images(labelled, "train").array
        array.sum()
        both.wait(60)
        place = Path("/proc/self/smaps").read_text().split(f"{labelled}/train.npy")[1]
        answers.put([int(place.split(f"{key}:")[1].split()[0]) for key in ("Rss", "Pss", "Private_Dirty")])
        both.wait(60)
    processes = [forked.FORK.Process(target=look) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        rss, pss, dirty = answers.get()
        assert rss > 500 and pss <= 0.6 * rss and dirty == 0  # KiB
