"""`python data.py`: what is asked for, what a set records, and what a person sees of it."""
import concurrent.futures
import functools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

import data
from data import KnownSet, fingerprint, load_images
from harness.errors import DataError
from images import command, prepare

pytestmark = pytest.mark.usefixtures("workers_are_threads")
command._parser = functools.cache(command._parser)  # a good part of a small command
IMAGES = {split: load_images("cifar10-subset", split).array[:6] for split in data.SPLITS}


class Threads(concurrent.futures.ThreadPoolExecutor):
    """In place of processes, whose start costs more than all else here; what goes there must be picklable as well."""

    def __init__(self, workers, *_):
        super().__init__(workers)

    def submit(self, *task):
        def answer():
            function, *given = pickle.loads(pickle.dumps(task))
            return pickle.loads(pickle.dumps(function(*given)))
        return super().submit(answer)


@pytest.fixture
def workers_are_threads(monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Threads)


@pytest.fixture
def folder(tmp_path):
    """Six training and six test images; one test image is a training image, too."""
    for split in data.SPLITS:
        (tmp_path / "source" / split).mkdir(parents=True)
        for number, pixels in enumerate(IMAGES[split]):
            pixels = IMAGES["train"][3] if (split, number) == ("test", 5) else pixels
            Image.fromarray(pixels).save(tmp_path / "source" / split / f"{number}.png")
    return tmp_path / "source"


def run(capsys, *arguments):
    """(exit code, what was printed, what was printed as an error)."""
    try:
        data.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # Python prints it
            code, message = 1, code
            return code, capsys.readouterr().out, message
    said = capsys.readouterr()
    return code or 0, said.out, said.err


def test_a_set_says_what_it_is(folder, tmp_path, capsys):
    out = tmp_path / "set"
    code, told, _ = run(capsys, "prepare", "six", "--source", folder, "--size", 32, "--out", out)
    assert code == 0 and "1 test images are training images, too (1 of train)" in told
    manifest = json.loads((out / "manifest.json").read_text())
    arrays = {split: np.load(out / f"{split}.npy") for split in data.SPLITS}  # by NumPy alone
    assert np.array_equal(arrays["train"], IMAGES["train"])
    assert (manifest["name"], manifest["variant"], manifest["filter"]) == ("six", "32px", None)
    assert manifest["counts"] == {"train": 6, "test": 6} and manifest["skipped"] == []
    assert manifest["fingerprints"] == {split: fingerprint(array) for split, array in arrays.items()}
    assert manifest["images_in_both_splits"] == {"different": 1, "train": 1, "test": 1}
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "test.npy", "test_checksums.npy", "train.npy", "train_checksums.npy"]
    images = load_images(out, "test")
    assert images.fingerprint == manifest["fingerprints"]["test"] and isinstance(images.array, np.memmap)
    assert fingerprint(arrays["train"]) in told and "verify" in run(
        capsys, "prepare", "six", "--source", folder, "--size", 32, "--out", out)[1]  # the same again: nothing to do


def test_verify_and_show(folder, tmp_path, capsys):
    out = tmp_path / "set"
    run(capsys, "prepare", "six", "--source", folder, "--size", 32, "--out", out)
    assert run(capsys, "verify", out)[0] == 0
    assert run(capsys, "show", out, tmp_path / "sheet.png")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = np.repeat(np.repeat(IMAGES["train"][0], 2, 0), 2, 1)  # at 2x, unchanged
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:150, :100], first.shape)
    assert (windows == first).all(axis=(-1, -2, -3)).any()
    content = bytearray((out / "test.npy").read_bytes())
    content[128 + 3072 * 4 + 77] ^= 8
    (out / "test.npy").write_bytes(content)
    code, _, error = run(capsys, "verify", out)
    assert code == 1 and "test: the pixels of image 4 (1 in all) was altered" in error.replace("were", "was")


def test_counts_of_another_variant_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(data.SETS, "imagenet32-oord", KnownSet("oord", (32, 32, 3), {"train": 5, "test": 6}, "here"))
    monkeypatch.setitem(data.SETS, "imagenet32-chrabaszcz",
                        KnownSet("chrabaszcz", (32, 32, 3), {"train": 6, "test": 6}, "there"))
    (folder / "train").rename(folder / "train_32x32")
    (folder / "test").rename(folder / "valid_32x32")
    prepared = ("prepare", "imagenet32-oord", "--source", folder, "--out", tmp_path / "set")
    code, _, error = run(capsys, *prepared)
    assert code == 1 and "6 train images, not 5: likely another variant: imagenet32-chrabaszcz" in error
    assert not (tmp_path / "set").exists()
    assert run(capsys, *prepared, "--incomplete")[0] == 0
    images = load_images(tmp_path / "set", "train")
    assert (images.name, images.variant) == ("imagenet32-oord-incomplete", "oord")
    monkeypatch.setitem(data.SETS, "imagenet32-oord", KnownSet("oord", (32, 32, 3), {"train": 6, "test": 6}, "here"))
    (tmp_path / "set").rename(tmp_path / "imagenet32-oord")
    with pytest.raises(DataError, match="holds imagenet32-oord-incomplete .* not imagenet32-oord"):
        load_images("imagenet32-oord", "test", tmp_path)


@pytest.mark.parametrize("arguments, part", [
    (["imagenet64", "--source", "x"], "is no known set (imagenet64-oord, imagenet64-chrabaszcz)"),
    (["../six", "--source", "x", "--size", "32"], "is no known set"),
    (["six", "--source", "nowhere", "--size", "32"], "nowhere: No such file"),
    (["six", "--source", "x"], "--size 64"),
    (["six", "--size", "32"], "--source PATH"),
    (["six", "--source", "x", "--size", "0"], "must be 1 to 4096"),
    (["six", "--source", "x", "--size", "32", "--test-share", "1"], "must be between 0 and 1"),
    (["six", "--source", "x", "--size", "32", "--incomplete"], "no counts are known"),
    (["six", "--source", "http://127.0.0.1/x", "--size", "32"], "a URL is for cifar10"),
    (["imagenet64-oord", "--source", "x", "--filter", "box"], "has its own (none)"),
    (["imagenet1k-64-box", "--source", "x", "--filter", "lanczos"], "has its own (box)"),
    (["imagenet64-oord"], "--source PATH (train_64x64.tar"),
    (["cifar10-animals"], "comes with cifar10"),
    (["six", "--source", "x", "--size", "32", "--workers", "0"], "must be 1 to 1024"),
])
def test_mistakes_end_in_one_line(arguments, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, error = run(capsys, "prepare", *arguments, "--out", "set")
    assert code and part in error and error.count("\n") <= 1 and not told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_touched(folder, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    error = run(capsys, "prepare", "six", "--source", folder, "--size", 32, "--out", tmp_path / "set")[2]
    assert "is not empty (mine.txt)" in error and [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_a_corrupt_image_stops_and_the_same_command_goes_on(folder, tmp_path, capsys):
    (folder / "train" / "2.png").write_bytes(b"no image")
    command = ("prepare", "six", "--source", folder, "--size", 32, "--out", tmp_path / "set")
    error = run(capsys, *command)[2]
    assert "train: train/2.png is no JPEG" in error and "--skip-corrupt" in error
    with pytest.raises(DataError, match="its preparation is not finished"):
        load_images(tmp_path / "set", "train")
    assert run(capsys, *command, "--skip-corrupt")[0] == 0
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["skipped"] == [
        {"split": "train", "file": "train/2.png", "reason": "is no JPEG, PNG, WEBP, BMP or GIF file"}]
    assert np.array_equal(load_images(tmp_path / "set", "train").array, IMAGES["train"][[0, 1, 3, 4, 5]])


def test_list_knows_what_is_here(folder, tmp_path, capsys):
    run(capsys, "prepare", "six", "--source", folder, "--size", 32, "--out", tmp_path / "sets" / "six")
    told = run(capsys, "list", "--data-root", tmp_path / "sets")[1]
    lines = {line.split()[0]: line for line in told.splitlines()}
    assert set(data.SETS) <= set(lines)
    assert "embedded" in lines["cifar10-subset"] and "variant 32px" in lines["six"]
    assert "1,281,149" in lines["imagenet64-oord"] and "missing" in lines["imagenet64-oord"]
    assert "missing" in lines["cifar10"] and "python data.py prepare NAME --source PATH" in told
