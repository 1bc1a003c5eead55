"""What people's folders and archives hold beside good images, what they ask for a second time, and what is made to harm."""
import contextlib
import hashlib
import io
import json
import os
import pickle
import pty
import sqlite3
import struct
import sys
import tarfile
import termios
import zipfile

import numpy as np
import pytest
from PIL import Image

import data
from convert import load_jet
from data import fingerprint, load_images
from evaluate import evaluate
from images import sets, source
from images.folder import seal
from jet import JetConfig
from test_prepare import run, workers_are_threads
from test_sources import (
    END, GOOD, TEST, TRAIN, binary_cifar, declares, encoded, member, own_files, pickled_cifar, prepared, resized, write_tar,
    write_tree)
from train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("workers_are_threads")
OWN = ("photos", "--size", 32, "--workers", 1)


def make(capsys, source, out, *flags, name=OWN):
    """(exit code, output, error) of a preparation; an error is one line."""
    code, told, error = run(capsys, "prepare", *name, "--source", source, "--out", out, *flags)
    assert error.count("\n") <= 1 and (code == 0 or error.startswith("data.py: error: "))
    return code, told, error


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def grey(number, mode="L", images=TRAIN):
    return Image.fromarray(images[number]).convert("L").convert(mode)


# ---- grey images

GREY = {"L": ("PNG", {}), "1": ("PNG", {}), "LA": ("PNG", {}), "P": ("PNG", {}), "JPEG": ("JPEG", {}), "GIF": ("GIF", {}), "BMP": ("BMP", {})}


@pytest.mark.parametrize("kind", GREY)
def test_grey_images_keep_their_one_channel_and_it_is_told(kind, tmp_path, capsys):
    form, mode = GREY[kind][0], kind if len(kind) <= 2 else "L"
    files = {f"{split}/{number}.{form.lower()}": encoded(grey(number, mode, images), form) for split, images in (("train", TRAIN), ("test", TEST))
             for number in range(4)}
    code, told, error = make(capsys, write_tree(tmp_path / "photos", files), tmp_path / "set")
    assert code == 0 and "all images are grey: one channel\n" in told and "variant 32px-grey" in told, error
    images = load_images(tmp_path / "set", "train")
    wanted = [np.asarray(Image.open(io.BytesIO(files[name])).convert("L")) for name in sorted(files) if name.startswith("train")]
    assert images.array.shape == (4, 32, 32, 1) and np.array_equal(images.array[..., 0], wanted)
    assert images.variant == "32px-grey" and manifest(tmp_path / "set")["shape"] == [32, 32, 1]
    assert run(capsys, "verify", tmp_path / "set")[0] == 0 and run(capsys, "show", tmp_path / "set", tmp_path / "a.png")[0] == 0
    assert "prepared already" in make(capsys, tmp_path / "photos", tmp_path / "set")[1]


@pytest.mark.parametrize("place", ["train/a.png", "train/z.png", "test/0.png"])
def test_one_colour_image_among_grey_ones_makes_three_channels(place, tmp_path, capsys):
    files = {f"{split}/{number}.png": encoded(grey(number, images=images)) for split, images in (("train", TRAIN), ("test", TEST))
             for number in range(40)}
    source = write_tree(tmp_path / "photos", files | {place: encoded(TRAIN[50])})
    code, told, _ = make(capsys, source, tmp_path / "set")
    assert code == 0 and "one channel" not in told and f"{79 + (place not in files)} images are grey: their three channels are equal" in told
    images = load_images(tmp_path / "set", "train").array
    assert images.shape[1:] == (32, 32, 3) and manifest(tmp_path / "set")["variant"] == "32px"
    assert sum(manifest(tmp_path / "set")["grey_in_three_channels"].values()) == 79 + (place not in files)
    assert np.array_equal(images[0], np.asarray(grey(0).convert("RGB")))


def test_channels_that_are_asked_for(tmp_path, capsys):
    source = write_tree(tmp_path / "grey", {f"{split}/{n}.png": encoded(grey(n), size=(80, 64)) for split in ("train", "test") for n in
                                            (range(3) if split == "train" else range(3, 5))})
    arguments = ("prepare", "photos", "--size", 32, "--filter", "lanczos", "--source", source, "--workers", 1)
    for channels, shape in ((1, (32, 32, 1)), (3, (32, 32, 3))):
        assert run(capsys, *arguments, "--channels", channels, "--out", tmp_path / str(channels))[0] == 0
        array = load_images(tmp_path / str(channels), "train").array
        wanted = resized(encoded(grey(1), size=(80, 64)), 32, Image.Resampling.LANCZOS)
        assert array.shape[1:] == shape and np.array_equal(array[1], wanted[..., :channels])
    (source / "train/1.png").write_bytes(encoded(TRAIN[1], size=(64, 64)))
    error = run(capsys, *arguments, "--channels", 1, "--out", tmp_path / "c")[2]
    assert "train/1.png has colours, and the set's images have one channel (--channels 3 takes it" in error
    for channels in (1, 0, 2):
        assert run(capsys, "prepare", "imagenet64-oord", "--source", source, "--channels", channels, "--out", tmp_path / "d")[0]
    assert not (tmp_path / "d").exists()


def test_a_grey_set_is_trained_on_evaluated_and_sampled(tmp_path, capsys):
    source = write_tree(tmp_path / "photos", {f"{split}/{n}.png": encoded(grey(n, images=images)) for split, images in
                                              (("train", TRAIN), ("test", TEST)) for n in range(8)})
    assert make(capsys, source, tmp_path / "set")[0] == 0
    model = JetConfig(image_size=32, channels=1, patch_size=8, num_couplings=2, block_depth=1, emb_dim=8, num_heads=1)
    done = train(TrainConfig(model=model, data=str(tmp_path / "set"), batch_size=4, total_steps=1), tmp_path / "run", quiet=True)
    jet = load_jet(tmp_path / "run")
    assert evaluate(jet, load_images(tmp_path / "set", "test"))["bits_per_dim"] == done["bits_per_dim"]
    assert jet.sample(2).shape == (2, 32, 32, 1)


# ---- the same command again

def copied(folder, target):
    return write_tree(target, {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})


@pytest.fixture
def photos(tmp_path):
    return write_tree(tmp_path / "photos", own_files())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, and the set that is made of them: to be copied."""
    folder = tmp_path_factory.mktemp("made")
    source = write_tree(folder / "photos", own_files())
    data.main(["prepare", *map(str, OWN), "--source", str(source), "--out", str(folder / "set")])
    return source, folder / "set"


@pytest.mark.parametrize("flags, part", [
    (["--enlarge-small"], "--enlarge-small was False and is now True"), (["--skip-corrupt"], "--skip-corrupt was False and is now True"),
    (["--channels", "3"], "--channels was None and is now 3"), (["--filter", "box"], "this command makes photos (variant 32px-box)"),
    (["--test-share", "0.5"], "--test-share was 0.1 and is now 0.5"), (["--size", "31"], "this command makes photos (variant 31px)")])
def test_other_flags_than_those_of_a_finished_set_are_named(flags, part, made, tmp_path, capsys):
    photos = made[0]
    copied(made[1], tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    code, told, error = make(capsys, photos, tmp_path / "set", *flags)
    assert code == 1 and part in error and "choose another --out" in error and "already" not in told
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    code, told, error = make(capsys, photos, tmp_path / "set", "--workers", 2)  # which changes nothing
    assert code == 0 and "prepared already" in told


def test_another_source_than_that_of_a_finished_set_is_named(photos, tmp_path, capsys, monkeypatch):
    zipped, other = tmp_path / "a.zip", tmp_path / "b.zip"
    for path, extra in ((zipped, {}), (other, {"train/a/9.png": encoded(TRAIN[9])})):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in (own_files() | extra).items():
                file.writestr(name, content)
    assert make(capsys, photos, tmp_path / "set")[0] == make(capsys, zipped, tmp_path / "zipset")[0] == 0
    monkeypatch.chdir(tmp_path)
    same = [(photos, "set"), ("photos", "set"), (copied(photos, tmp_path / "copy"), "set"), (zipped, "zipset")]
    for given, out in same:
        assert "prepared already" in make(capsys, given, tmp_path / out)[1]
    changed = copied(photos, tmp_path / "changed")
    (changed / "train/a/0.png").unlink()
    renamed = copied(photos, tmp_path / "renamed")
    (renamed / "train/a/0.png").rename(renamed / "train/a/4.png")
    zipped.rename(tmp_path / "c.zip")
    for given, out, part in ((changed, "set", "changed is another"), (renamed, "set", "renamed is another"), (zipped, "zipset", "a.zip: No such file"),
                             (tmp_path / "c.zip", "set", "c.zip is another"), (other, "zipset", "b.zip is another"),
                             (tmp_path / "nowhere", "set", "nowhere: No such file"), (photos, "zipset", "photos is another")):
        code, _, error = make(capsys, given, tmp_path / out)
        assert code == 1 and part in error, (given, error)


def test_a_set_is_not_made_within_its_source(photos, capsys):
    for out in (photos, photos / "set", photos / "train" / "set"):
        assert "lies in the source" in make(capsys, photos, out)[2]
    assert make(capsys, photos, photos.parent / "photos-set")[0] == 0


def test_flags_that_change_images_are_kept_while_a_preparation_goes_on(tmp_path, capsys):
    """Whatever stops it, no part of a set is made by other flags than the rest."""
    files = {f"train/{n:03d}.png": encoded(TRAIN[n], size=(40, 40)) for n in range(80)} | {"test/0.png": encoded(TEST[0], size=(40, 40))}
    files |= {"train/040.png": encoded(TRAIN[40], size=(20, 20)), "train/070.png": b"no image"}
    source, out = write_tree(tmp_path / "photos", files), tmp_path / "set"
    flags = ("--filter", "box", "--enlarge-small", "--skip-corrupt")
    assert make(capsys, source, tmp_path / "whole", *flags)[0] == 0
    assert "train/040.png is 20x20" in make(capsys, source, out, *flags[:2])[2]
    assert "train/070.png is no" in make(capsys, source, out, *flags[:3])[2]  # may be added: nothing was left out so far
    assert "with another --enlarge-small" in make(capsys, source, out, *flags[:2])[2]
    (source / "test/0.png").unlink()
    assert "is not there any more" in make(capsys, source, out, *flags)[2]
    (source / "test/0.png").write_bytes(files["test/0.png"])
    assert "with another --skip-corrupt" in make(capsys, source, out, *flags[:3])[2]
    assert make(capsys, source, out, *flags)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_a_set_that_was_not_moved_yet_is_compared_too(photos, tmp_path, capsys):
    out = tmp_path / "set"
    assert make(capsys, photos, out)[0] == 0
    (out / "partial").mkdir()
    for path in [*out.glob("*.*")]:
        path.rename(out / "partial" / path.name)
    code, _, error = make(capsys, photos, out, "--enlarge-small")
    assert code == 1 and "--enlarge-small was False" in error
    assert run(capsys, "prepare", "others", *OWN[1:], "--source", photos, "--out", out)[0] == 1
    assert make(capsys, photos, out)[0] == 0 and run(capsys, "verify", out)[0] == 0


# ---- what is no image

STRAYS = {"labels.csv": b"a,b\n", "README.txt": b"text", "train/Thumbs.db": b"\xd0\xcf\x11\xe0", "LICENSE": b"Apache", "train/a/0.json": b"{}",
          "train/a/0.cls": b"3", "val/empty": b"", "val/movie.mp4": b"\0\0\0\x18ftypmp42"}


@pytest.mark.parametrize("pack", ["folder", "tar", "zip"])
def test_what_is_no_image_is_left_out_told_and_recorded(pack, tmp_path, capsys):
    files, path = own_files() | STRAYS, tmp_path / f"photos.{pack}"
    if pack == "folder":
        write_tree(path, files)
    elif pack == "tar":
        write_tar(path, files)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in files.items():
                file.writestr(name, content)
    code, told, error = make(capsys, path, tmp_path / "set")
    assert code == 0 and "left out: 8 files that are no images (LICENSE, README.txt, labels.csv, ...)\n" in told, error
    assert manifest(tmp_path / "set")["no_images"] == {"files": 8, "names": sorted(STRAYS)} and manifest(tmp_path / "set")["skipped"] == []
    for split, images in (("train", TRAIN), ("test", TEST)):
        assert np.array_equal(load_images(tmp_path / "set", split).array, images[[0, 1, 2, 10, 11, 12]])


@pytest.mark.parametrize("name, content", [
    ("train/a/x.png", b""), ("train/a/x.JPG", b"text"), ("train/a/x", encoded(TRAIN[0])[:900]), ("train/a/x.txt", encoded(TRAIN[0])[:900]),
    ("train/a/x.tiff", encoded(TRAIN[0], "TIFF")), ("train/a/x.dat", encoded(TRAIN[0], "TIFF")), ("train/a/x.heic", b"\0\0\0\x18ftypheic")])
def test_what_should_be_an_image_still_stops_beside_strays(name, content, tmp_path, capsys):
    source = write_tree(tmp_path / "photos", own_files() | STRAYS | {name: content})
    code, _, error = make(capsys, source, tmp_path / "set")
    assert code == 1 and f"train: {name} is" in error and "--skip-corrupt" in error
    assert make(capsys, source, tmp_path / "set", "--skip-corrupt")[0] == 0
    assert [entry["file"] for entry in manifest(tmp_path / "set")["skipped"]] == [name]
    assert manifest(tmp_path / "set")["no_images"]["files"] == len(STRAYS)


def test_images_with_another_suffix_or_none_are_images(tmp_path, capsys):
    files = {f"train/{name}": encoded(TRAIN[n], kind) for n, (name, kind) in enumerate(
        [("a", "PNG"), ("b.dat", "BMP"), ("c.txt", "GIF"), ("d.png", "BMP"), ("e.jpeg", "PNG"), ("f.0001", "WEBP")])}
    assert make(capsys, write_tree(tmp_path / "photos", files | {"test/0.png": encoded(TEST[0])}), tmp_path / "set")[0] == 0
    wanted = [np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in sorted(files)]
    assert np.array_equal(load_images(tmp_path / "set", "train").array, wanted)


def test_links_to_nothing_are_strays_or_damage_by_their_names(photos, tmp_path, capsys):
    (photos / "train/list").symlink_to("nowhere")
    (photos / "train/loop.txt").symlink_to("loop.txt")
    assert make(capsys, photos, tmp_path / "set")[0] == 0
    assert manifest(tmp_path / "set")["no_images"]["names"] == ["train/list", "train/loop.txt"]
    (photos / "train/x.png").symlink_to("nowhere")
    code, _, error = make(capsys, photos, tmp_path / "b")
    assert code == 1 and "train/x.png is a link to nothing" in error


def test_strays_in_known_sets_do_not_count(tmp_path, capsys):
    train = {f"train_32x32/{n:07d}.png": encoded(TRAIN[n]) for n in range(20)} | {"train_32x32/a/README.txt": b"1", "train_32x32/b/README.txt": b"2"}
    source = write_tree(tmp_path / "photos", train | {f"valid_32x32/{n:05d}.png": encoded(TEST[n]) for n in range(5)})
    name = ("imagenet32-oord", "--incomplete", "--workers", 1)
    code, told, _ = make(capsys, source, tmp_path / "set", name=name)
    assert code == 0 and "left out: 2 files" in told and len(load_images(tmp_path / "set", "train").array) == 20


def test_shards_of_a_web_dataset(tmp_path, capsys):
    for split, images in (("train", TRAIN), ("val", TEST)):
        for shard in range(2):
            files = {f"{n:04d}.{kind}": content for n in range(3 * shard, 3 * shard + 3)
                     for kind, content in (("png", encoded(images[n])), ("cls", b"1"), ("json", b"{}"))}
            (tmp_path / "photos").mkdir(exist_ok=True)
            write_tar(tmp_path / f"photos/{split}-{shard:06d}.tar", files)
    code, told, _ = make(capsys, tmp_path / "photos", tmp_path / "set")
    assert code == 0 and "left out: 24 files" in told and "held out" not in told
    for split, images in (("train", TRAIN), ("test", TEST)):
        assert np.array_equal(load_images(tmp_path / "set", split).array, images[:6])


# ---- Parquet

def tables(folder, files):
    """{path: (images, labels or None)}, as the Hub has them."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    for name, (images, labels) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        columns = {"img": [{"bytes": encoded(image), "path": None} for image in images]}
        columns |= {} if labels is None else {"label": list(map(int, labels))}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    return folder


A, B, C = (TRAIN[:5], range(5)), (TRAIN[5:9], range(4)), (TEST[:3], range(3))
CLEAR = [["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         ["plain_text/train-0.parquet", "plain_text/train-1.parquet", "plain_text/validation-0.parquet"],
         ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], ["train.a.parquet", "train.b.parquet", "Test.parquet"],
         ["default/train/0000.parquet", "default/train/0001.parquet", "default/valid/0000.parquet"],
         ["my-photos-train-0.parquet", "my-photos-train-1.parquet", "my-photos-test-0.parquet"]]


@pytest.mark.parametrize("names", CLEAR)
def test_parquet_in_the_layouts_of_the_hub(names, tmp_path, capsys):
    source = tables(tmp_path / "photos", dict(zip(names, (A, B, C))))
    (source / "README.md").write_text("text")
    train, test = prepared(capsys, tmp_path / "set", "photos", "--size", 32, "--source", source)
    assert np.array_equal(train.array, TRAIN[:9]) and np.array_equal(test.array, TEST[:3]) and train.labels.tolist() == [*range(5), *range(4)]
    assert make(capsys, source, tmp_path / "set")[0] == 0
    tables(source, {names[1]: C})
    assert "is another, or has changed since" in make(capsys, source, tmp_path / "set")[2]


@pytest.mark.parametrize("names", [
    ["a/train-0.parquet", "a/test-0.parquet", "b/train-0.parquet"], ["train-0.parquet", "validation-0.parquet", "test-0.parquet"],
    ["0.parquet", "1.parquet", "2.parquet"], ["train-0.parquet", "train-1.parquet", "extra-0.parquet"],
    ["partial-train/0.parquet", "train/0.parquet", "test/0.parquet"]])
def test_parquet_whose_splits_are_not_clear_is_refused(names, tmp_path, capsys):
    code, _, error = make(capsys, tables(tmp_path / "photos", dict(zip(names, (A, B, C)))), tmp_path / "set")
    assert code == 1 and "give the files of two splits by --source" in error and not (tmp_path / "set").exists()


def test_of_three_splits_a_known_set_takes_the_right_two(tmp_path, capsys):
    source = tables(tmp_path / "photos", {"data/train-0.parquet": A, "data/validation-0.parquet": C, "data/test-0.parquet": B})
    for name, images in (("imagenet1k-32-parquet", TEST[:3]), ("cifar10", TRAIN[5:9])):
        code, told, _ = make(capsys, source, tmp_path / name, name=(name, "--incomplete", "--workers", 1))
        assert code == 0 and np.array_equal(load_images(tmp_path / name, "test").array, images) and "left out: " in told


def official(monkeypatch, counts=(50, 10)):
    """CIFAR-10 of some images, in batches of ten: {name: (images, labels)}."""
    batches = {f"data_batch_{n + 1}": (TRAIN[10 * n:10 * n + 10], np.arange(10) + n) for n in range(5)} | {"test_batch": (TEST[:10], np.arange(10))}
    files = {"train": {}, "test": {}}
    for name, (images, labels) in batches.items():
        records = np.column_stack([labels.astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(10, -1)])
        files["test" if name == "test_batch" else "train"][name] = hashlib.sha256(records.tobytes()).hexdigest()
    monkeypatch.setattr(source, "CIFAR10_FILES", files)
    known = data.KnownSet("cifar10", (32, 32, 3), {"train": 50, "test": 10}, "here")
    monkeypatch.setitem(sets.SETS, "cifar10", known)
    for split, images in (("train", TRAIN[:50]), ("test", TEST[:10])):
        monkeypatch.setitem(sets.FINGERPRINTS, ("cifar10", split), fingerprint(images))
    return batches


def joined(batches, order):
    return tuple(np.concatenate([batches[f"data_batch_{n}"][part] for n in order]) for part in (0, 1))


def test_cifar10_from_parquet_has_the_official_order_and_fingerprint(tmp_path, capsys, monkeypatch):
    batches = official(monkeypatch)
    source = tables(tmp_path / "hub", {"plain_text/train-0.parquet": joined(batches, (4, 3, 2, 5, 1)), "plain_text/test-0.parquet": batches["test_batch"]})
    train, test = prepared(capsys, tmp_path / "set", "cifar10", "--source", source)
    assert np.array_equal(train.array, TRAIN[:50]) and np.array_equal(test.array, TEST[:10]) and train.name == "cifar10"
    assert train.labels.tolist() == [n + k for n in range(5) for k in range(10)]


@pytest.mark.parametrize("change, part", [
    (lambda images, labels: (images, labels[::-1]), "no official batches"), (lambda images, labels: (images[::-1], labels[::-1]), "no official batches"),
    (lambda images, labels: (images ^ 1, labels), "no official batches"), (lambda images, labels: (images[1:], labels[1:]), "49 train images"),
    (lambda images, labels: (images ^ 1, None), "not the known one")])
def test_parquet_that_is_not_cifar10_is_refused(change, part, tmp_path, capsys, monkeypatch):
    batches = official(monkeypatch)
    source = tables(tmp_path / "hub", {"train-0.parquet": change(*joined(batches, range(1, 6))), "test-0.parquet": batches["test_batch"]})
    code, _, error = make(capsys, source, tmp_path / "set", name=("cifar10", "--workers", 1))
    assert code == 1 and part in error and not (tmp_path / "set/manifest.json").exists()


# ---- hints and paths

def test_hints_name_what_is_missing(tmp_path, capsys):
    source = write_tree(tmp_path / "photos", {f"{split}/{n}.png": encoded(TRAIN[n], size=(50, 40)) for split in ("train", "test") for n in range(3)})
    error = make(capsys, source, tmp_path / "a")[2]
    assert "50x40 pixels, not 32x32 (--filter box resizes such images" in error and "--skip-corrupt" not in error
    assert "--enlarge-small enlarges" in run(capsys, "prepare", "photos", "--size", 64, "--filter", "box", "--source", source, "--out", tmp_path / "b")[2]
    (source / "train").rename(source / "train_32x32")
    (source / "test").rename(source / "valid_32x32")
    error = make(capsys, source, tmp_path / "c", name=("imagenet32-oord", "--incomplete"))[2]
    assert "imagenet32-oord has images of that size alone" in error and "--filter" not in error


def test_a_tilde_is_the_home_folder(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make(capsys, "~/photos", "~/set")[0] == 0 and run(capsys, "verify", "~/set")[0] == 0
    assert run(capsys, "show", "~/set", "~/a.png")[0] == 0 and (tmp_path / "a.png").exists()
    assert f"{tmp_path}/nowhere: No such file" in make(capsys, "~/nowhere", "~/b")[2]
    assert make(capsys, "~nobody-of-this-name/photos", tmp_path / "b")[0] == 1
    assert "neither a known set" in run(capsys, "show", "~nobody-of-this-name", tmp_path / "b.png")[2]


# ---- what is made to harm

def resealed(folder, **fields):
    content = manifest(folder) | fields
    (folder / "manifest.json").write_text(json.dumps(content | {"seal": seal(content)}))


@pytest.mark.parametrize("fields", [
    {"name": "a\x1b[31m\nb"}, {"name": {}}, {"variant": "x" * 300}, {"shape": [2 ** 40] * 3}, {"shape": "abc"}, {"counts": {"train": True, "test": 6}},
    {"counts": {"train": -1, "test": 6}}, {"fingerprints": ["1"]}, {"checksums": {"../../x": "0"}}, {"checksums": {"train.npy/../../x": "0"}},
    {"checksums": []}, {"images_in_both_splits": 3}, {"sources": [3]}, {"skipped": 7}, {"flags": None}])
def test_a_manifest_with_other_types_ends_in_one_line(fields, made, tmp_path, capsys):
    photos = made[0]
    resealed(copied(made[1], tmp_path / "sets/photos"), **fields)
    for end in (run(capsys, "verify", tmp_path / "sets/photos"), run(capsys, "show", tmp_path / "sets/photos", tmp_path / "a.png"),
                make(capsys, photos, tmp_path / "sets/photos")):
        assert end[0] == 1 and f"its {next(iter(fields))} cannot be right" in end[2].replace(
            "fingerprints of train and test must be 64 hex digits each", "its fingerprints cannot be right")
    code, told, error = run(capsys, "list", "--data-root", tmp_path / "sets")
    assert code == 0 and ("cannot be right" in " ".join(told.split()) or "fingerprints" in fields)


def test_a_manifest_of_many_parts_is_not_read(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("[" + "[]," * 2 ** 20 + "[]]")
    assert "more than 1,048,576 lists and objects" in run(capsys, "verify", tmp_path)[2]


def test_nothing_is_moved_by_a_name_in_a_manifest(photos, tmp_path, capsys):
    out = tmp_path / "a" / "b" / "set"
    assert make(capsys, photos, out)[0] == 0
    (out / "partial").mkdir()
    for path in [*out.glob("*.*")]:
        path.rename(out / "partial" / path.name)
    for target in (tmp_path / "a/x", out / "../../x", "../../../x"):
        write_tree(tmp_path / "a", {"x": b"mine"})
        resealed(out / "partial", checksums=manifest(out / "partial")["checksums"] | {str(target): "0" * 64})
        code, _, error = make(capsys, photos, out)
        assert code == 1 and "its checksums cannot be right" in error and (tmp_path / "a/x").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["train.npy", "files.sqlite", "state.json", "lock", "claim.json", "test_digests.npy", "partial"])
def test_links_in_the_folder_of_a_preparation_are_not_written_to(name, photos, tmp_path, capsys):
    (photos / "train/a/2.png").write_bytes(b"no image")
    assert make(capsys, photos, tmp_path / "set")[0] == 1
    work, mine = tmp_path / "set/partial", tmp_path / "mine"
    if name == "partial":
        work.rename(mine)
        work.symlink_to(mine)
    else:
        mine.write_bytes(b"mine")
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(mine)
    before = mine.read_bytes() if mine.is_file() else sorted(path.name for path in mine.iterdir())
    code, _, error = make(capsys, photos, tmp_path / "set", "--skip-corrupt")
    assert code == 1 and "is a link" in error
    assert before == (mine.read_bytes() if mine.is_file() else sorted(path.name for path in mine.iterdir()))


@pytest.mark.parametrize("change", [
    "UPDATE files SET path = CAST('/dev/zero' AS BLOB)", "UPDATE files SET path = CAST('{source}/../x' AS BLOB)", "UPDATE files SET path = 3",
    "UPDATE files SET start = -5", "UPDATE files SET size = 'x'", "UPDATE files SET name = 7 WHERE name = (SELECT MIN(name) FROM files WHERE split = 'train')",
    "DROP TABLE files", "UPDATE files SET crc = NULL"])
def test_a_list_that_was_altered_reads_nothing_else(change, photos, tmp_path, capsys):
    (photos / "train/a/2.png").write_bytes(b"no image")
    assert make(capsys, photos, tmp_path / "set")[0] == 1
    with sqlite3.connect(tmp_path / "set/partial/files.sqlite") as db:
        db.execute(change.format(source=photos))
    db.close()
    code, _, error = make(capsys, photos, tmp_path / "set", "--skip-corrupt")
    assert code == 1 and "files.sqlite: " in error and "to begin again" in error


def test_files_that_are_gone_are_no_damaged_images(photos, tmp_path, capsys):
    (photos / "train/a/2.png").write_bytes(b"no image")
    assert make(capsys, photos, tmp_path / "set")[0] == 1
    (photos / "train/b/1.png").unlink()
    code, _, error = make(capsys, photos, tmp_path / "set", "--skip-corrupt")
    assert code == 1 and "b/1.png: is not there any more" in error


def header(kind, size):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def pax(key, value):
    record = f" {key}={value}\n"
    length = len(record) + 2
    record = f"{length + (length > 99)}{record}".encode()
    return header(tarfile.XHDTYPE, len(record)) + record + bytes(-len(record) % 512)


@pytest.mark.parametrize("content, size, part", [
    (header(tarfile.XHDTYPE, 2 ** 28), 2 ** 28 + 2048, "a header of 268,435,456 bytes"),
    (header(tarfile.GNUTYPE_LONGNAME, 2 ** 28), 2 ** 28 + 2048, "a header of 268,435,456 bytes"),
    (header(tarfile.XGLTYPE, 2 ** 28), 2 ** 28 + 2048, "a header of 268,435,456 bytes"),
    (GOOD + pax("size", -2048) + member(".hidden", b"x") + END, 0, ".hidden"),
    (header(tarfile.GNUTYPE_LONGNAME, 0) * 3000 + GOOD + END, 0, "not a whole tar"),
    (GOOD + END, 2 ** 40, "bytes after its end")])
def test_tars_with_large_appetites_are_refused(content, size, part, tmp_path, capsys):
    with open(tmp_path / "photos.tar", "wb") as file:
        file.write(content)
        file.truncate(max(size, len(content)))
    code, _, error = make(capsys, tmp_path / "photos.tar", tmp_path / "set")
    assert code == 1 and part in error and not (tmp_path / "set").exists()


def test_members_of_a_zip_that_overlap_are_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("train/0.png", encoded(TRAIN[0]))
    content = (tmp_path / "a.zip").read_bytes()
    place = content.index(b"PK\1\2")
    entries = b"".join(content[place:place + 46] + b"train/%d.png" % number for number in range(9))
    tail = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, len(entries), place, 0)
    (tmp_path / "a.zip").write_bytes(content[:place] + entries + tail)
    code, _, error = make(capsys, tmp_path / "a.zip", tmp_path / "set")
    assert code == 1 and "train/1.png overlaps the member before it" in error


def test_batches_with_large_appetites_are_refused(tmp_path, capsys):
    labels = [1]
    for _ in range(30):
        labels = [labels] * 10
    for content in ({"data": np.zeros((2, 3072), np.uint8), "labels": labels}, {"data": labels, "labels": [1]},
                    {"data": np.zeros((2, 3072), np.uint8), "labels": np.array([0.5, 1])}):
        files = pickled_cifar(2) | {"cifar-10-batches-py/data_batch_1": pickle.dumps(content)}
        code, _, error = make(capsys, write_tree(tmp_path / "a", files), tmp_path / "set", name=("cifar10", "--incomplete"))
        assert code == 1 and "whole numbers" in error
    (tmp_path / "b").mkdir()
    for name, count in (("train_data_batch_1", 2 ** 13), ("val_data", 1)):
        np.savez_compressed(tmp_path / f"b/{name}.npz", data=np.zeros((count, 3072), np.uint8), labels=np.zeros(count, np.int64))
    code, _, error = make(capsys, tmp_path / "b", tmp_path / "set", name=("imagenet32-chrabaszcz", "--incomplete"))
    assert code == 1 and "its data declare 25,165,952 bytes in" in error


def test_pipes_and_devices_are_not_opened(photos, tmp_path, capsys):
    cifar = write_tree(tmp_path / "cifar", binary_cifar())
    (cifar / "cifar-10-batches-bin/data_batch_1.bin").unlink()
    os.mkfifo(cifar / "cifar-10-batches-bin/data_batch_1.bin")
    os.mkfifo(photos / "train-0.parquet")
    name = ("cifar10", "--incomplete")
    for given, what, part in ((cifar, name, "data_batch_1 not found"), (cifar / "cifar-10-batches-bin/data_batch_1.bin", name, "neither a file"),
                              ("/dev/zero", name, "neither a file"), ("/dev/zero", OWN, "neither a file"), (photos, OWN, "neither a file")):
        code, _, error = make(capsys, given, tmp_path / "set", name=what)
        assert code == 1 and part in error, error


def test_names_with_control_characters_are_not_printed_as_they_are(tmp_path, capsys):
    evil = "\x1b]0;evil\x07\n\x9b.txt"
    source = write_tree(tmp_path / "photos", own_files() | {evil: b"text", "train/\x1b[2J.png": b"no image"})
    code, told, error = make(capsys, source, tmp_path / "set", "--skip-corrupt")
    assert code == 0 and all(line.isprintable() for line in told.splitlines()) and error.isprintable()
    assert all(line.isprintable() for line in json.dumps(manifest(tmp_path / "set"), ensure_ascii=False).splitlines())


def test_images_that_declare_a_billion_pixels_are_refused_at_once(photos, tmp_path, capsys):
    (photos / "train/a/2.png").write_bytes(declares(30_000, 33_333))
    assert "declares too many pixels" in make(capsys, photos, tmp_path / "set")[2]


# ---- the terminal

def test_list_fits_a_hundred_columns(photos, tmp_path, capsys):
    root = tmp_path / ("long" * 20)
    assert make(capsys, photos, root / "photos")[0] == 0
    (copied(root / "photos", root / "more" / ".." / "other") / "manifest.json").write_text("{}")
    told = run(capsys, "list", "--data-root", root)[1].replace(str(root), "ROOT")
    assert max(map(len, told.splitlines())) <= 100 and "variant 32px" in told and set(data.SETS) <= set(told.split())


def on_a_terminal(*arguments):
    """What a command shows on a terminal of 80 columns."""
    child, terminal = pty.fork()
    if not child:
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        termios.tcsetwinsize(1, (24, 80))
        data.main([str(argument) for argument in arguments])
        sys.stdout.flush()
        os._exit(0)
    told = b""
    with contextlib.suppress(OSError):  # it ends so
        while True:
            told += os.read(terminal, 2 ** 16)
    assert os.waitpid(child, 0)[1] == 0
    os.close(terminal)
    return [part for line in told.decode().split("\r\n") for part in line.split("\r")]


def test_bars_fit_a_terminal_of_eighty_columns(photos, tmp_path):
    for arguments, bar in ((("prepare", *OWN, "--source", photos, "--out", tmp_path / "set"), "train |"), (("verify", tmp_path / "set"), "verify train |")):
        lines = [line for line in on_a_terminal(*arguments) if line.startswith(bar) and "/6 images" in line]
        assert lines and max(map(len, lines)) <= 80 and all("images/s" in line and "left" in line for line in lines), lines
