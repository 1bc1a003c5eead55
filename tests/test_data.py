"""Image sets, fingerprints, dequantization and the random draws of batches and evaluation."""
import dataclasses
import hashlib
import json
import math
import os
import threading
import time

import numpy as np
import pytest
import torch

import data
from data import (
    batch_indices, evaluation_noise, fingerprint, image_shape, load_images, prefetch,
    training_batch, training_batches)
from harness.errors import DataError
from harness.machine import free_bytes
from images import sets
from jet import dequantize, quantize


def test_quantize_inverts_dequantize():
    levels = torch.arange(256, dtype=torch.uint8)
    for u in (1e-3, 0.25, 0.5, 1 - 1e-3):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(quantize(dequantize(levels, torch.full((256,), u, dtype=dtype))), levels)
    x = dequantize(levels, torch.zeros(256, dtype=torch.float64))
    assert x[0] == -1 and x[255] == 1 and torch.allclose(x.diff(), torch.tensor(1 / 127.5).double())
    assert quantize(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantize_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        quantize(torch.tensor([0.0, value]))


@pytest.mark.parametrize("split, room", [("train", [205] * 8 + [204] * 2), ("test", [52] * 2 + [51] * 8)])
def test_embedded_subset(split, room):
    images = load_images("cifar10-subset", split)
    assert images.array.shape == (sum(room), 32, 32, 3) and images.array.dtype == np.uint8
    assert np.bincount(images.labels).tolist() == room
    assert images.fingerprint == fingerprint(images.array)
    assert (images.name, images.variant, images.split) == ("cifar10-subset", "cifar10-subset", split)


def test_embedded_subset_follows_its_rule():
    """The first image of each split of CIFAR-10 is in it; so are the next, until a class is full."""
    assert load_images("cifar10-subset", "train").labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert load_images("cifar10-subset", "test").labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


def test_fingerprint_is_the_documented_hash():
    array = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    assert fingerprint(array) == hashlib.sha256(b"2,3,4,1\n" + array.tobytes()).hexdigest()
    assert fingerprint(array) != fingerprint(array.reshape(2, 4, 3, 1))
    assert fingerprint(array[:, ::-1]) == hashlib.sha256(b"2,3,4,1\n" + array[:, ::-1].tobytes()).hexdigest()


def test_every_set_of_the_paper_is_known_by_shape_and_counts():
    assert data.SETS["imagenet64-oord"].shape == (64, 64, 3)
    assert data.SETS["imagenet32-oord"].counts == {"train": 1_281_149, "test": 49_999}
    assert data.SETS["imagenet32-chrabaszcz"].counts == {"train": 1_281_167, "test": 50_000}
    assert data.SETS["cifar10"].counts == {"train": 50_000, "test": 10_000}
    assert data.SETS["cifar10-search"].counts == {"train": 45_000, "test": 5_000}
    assert image_shape("imagenet64-chrabaszcz") == (64, 64, 3)  # without the images
    variants = {(name, known.variant) for name, known in data.SETS.items()}
    assert len(variants) == len(data.SETS)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder in the layout of CIFAR-10 with other and fewer images, whose checksums count as official."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng, files = np.random.default_rng(0), {"train": {}, "test": {}}
    for split, names in data.CIFAR10_FILES.items():
        for name in names:
            records = rng.integers(0, 256, (200, 3073), dtype=np.uint8)
            records[:, 0] %= 10
            (folder / name).write_bytes(records.tobytes())
            files[split][name] = hashlib.sha256(records.tobytes()).hexdigest()
            if split == "train":
                break  # one of the five is enough
    monkeypatch.setattr(data, "CIFAR10_FILES", files)
    monkeypatch.setattr(data, "CIFAR10_BATCH", 200)
    for name, train, test in (("cifar10", 200, 200), ("cifar10-search", 180, 20)):
        monkeypatch.setitem(data.SETS, name, dataclasses.replace(data.SETS[name], counts={"train": train, "test": test}))
    monkeypatch.delenv("JET_DATA", raising=False)
    return folder


def test_cifar10_layout(cifar, monkeypatch):
    raw = np.frombuffer((cifar / "test_batch.bin").read_bytes(), np.uint8).reshape(200, 3073)
    images = load_images("cifar10", "test", cifar.parent)
    assert images.labels[7] == raw[7, 0]
    assert images.array[7, 2, 5].tolist() == [raw[7, 1 + 1024 * channel + 32 * 2 + 5] for channel in range(3)]
    monkeypatch.setenv("JET_DATA", str(cifar))  # the folder itself will do, too
    assert np.array_equal(load_images("cifar10", "test").array, images.array)


@pytest.mark.parametrize("name", ["cifar10", "cifar-10-batches-bin", "images of mine"])
def test_a_set_is_listed_where_it_is_loaded_from(name, cifar, tmp_path, monkeypatch, capsys):
    folder = cifar.rename(tmp_path / name)
    for file in (f"data_batch_{number}.bin" for number in range(2, 6)):
        (folder / file).touch()
    monkeypatch.chdir(folder)
    for root in (folder, "."):
        assert load_images("cifar10", "test", root).array.shape == (200, 32, 32, 3)
        data.main(["list", "--data-root", str(root)])
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert lines["cifar10"].endswith(f"here: {root}"), lines["cifar10"]
    with pytest.raises(DataError, match="is not there"):
        load_images("cifar10", "test", tmp_path / "nowhere")


def test_cifar10_missing_truncated_or_altered(cifar, tmp_path):
    with pytest.raises(DataError, match="--data-root or JET_DATA"):
        load_images("cifar10", "test")
    with pytest.raises(DataError, match="is not there"):
        load_images("cifar10", "test", tmp_path / "nowhere")
    file = cifar / "test_batch.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="614,599 bytes instead of 614,600"):
        load_images("cifar10", "test", cifar)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="test_batch.bin is altered"):
        load_images("cifar10", "test", cifar)
    file.unlink()
    with pytest.raises(DataError, match="test_batch.bin: No such file"):
        load_images("cifar10", "test", cifar)


def test_an_official_file_of_cifar10_has_10_000_images(tmp_path):
    (tmp_path / "test_batch.bin").touch()
    os.truncate(tmp_path / "test_batch.bin", 30_729_999)
    with pytest.raises(DataError, match="30,729,999 bytes instead of 30,730,000"):
        load_images("cifar10", "test", tmp_path)


def test_npy_file_and_prepared_folder(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 4, 1), dtype=np.uint8)
    np.save(tmp_path / "train.npy", 255 - array)
    np.save(tmp_path / "test.npy", array)
    images = load_images(tmp_path / "test.npy", "train")
    assert np.array_equal(images.array, array) and isinstance(images.array, np.memmap)
    assert images.split == "train" and images.variant == "unknown" and images.fingerprint == fingerprint(array)
    manifest = {"name": "mine", "variant": "box",
                "fingerprints": {"train": fingerprint(255 - array), "test": fingerprint(array)}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    images = load_images(tmp_path, "test")
    assert (images.name, images.variant, len(images.array)) == ("mine", "box", 5)
    for fingerprints, message in (({"train": "1" * 64, "test": "2" * 64}, "does not have the fingerprint"),
                                  ({"train": "...", "test": None}, "must be 64 hex digits"),
                                  (dict.fromkeys(("train", "test"), fingerprint(array)), "are the same images")):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "fingerprints": fingerprints}))
        with pytest.raises(DataError, match=message):
            load_images(tmp_path, "test")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "name": "imagenet64-oord"}))
    (tmp_path / "imagenet64-oord").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"imagenet64-oord test is \(49999, 64, 64, 3\)"):
        load_images("imagenet64-oord", "test", tmp_path)


@pytest.mark.parametrize("array", [
    np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
    np.array([{"code": 1}], dtype=object)])
def test_npy_of_another_kind_is_refused(tmp_path, array):
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match="bad.npy") as error:
        load_images(tmp_path / "bad.npy", "test")
    assert "\n" not in str(error.value)


def test_gather_rows_is_indexing_of_arrays_and_maps(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 8, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "array.npy", array)
    indices = np.random.default_rng(1).integers(0, 50, 70)
    for images in (array, np.load(tmp_path / "array.npy", mmap_mode="r"), array[::2], array[:, ::-1]):
        places = indices % len(images)
        assert np.array_equal(data.gather_rows(images, places).numpy(), images[places])


def test_prepared_cifar10_is_found_by_its_name_with_its_parts(cifar, tmp_path, monkeypatch):
    images = load_images("cifar10", "test", cifar)
    folder = tmp_path / "sets" / "cifar10"
    folder.mkdir(parents=True)
    for split, array in (("test", images.array), ("train", 255 - images.array)):
        np.save(folder / f"{split}.npy", array)
        np.save(folder / f"{split}_labels.npy", images.labels)
    manifest = {"name": "cifar10", "variant": "cifar10", "checksums": {"train_labels.npy": "", "test_labels.npy": ""},
                "fingerprints": {split: fingerprint(np.load(folder / f"{split}.npy")) for split in data.SPLITS}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setitem(data.FINGERPRINTS, ("cifar10-vehicles", "test"), "f" * 64)
    for root in (folder.parent, folder):
        assert np.array_equal(load_images("cifar10", "test", root).labels, images.labels)
        assert np.array_equal(load_images("cifar10-vehicles", "test", root).array, images.array[np.isin(images.labels, [0, 1, 8, 9])])
    np.save(folder / "test_labels.npy", images.labels[1:])
    with pytest.raises(DataError, match=r"must be int64 \(200,\)"):
        load_images("cifar10", "test", folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksums": {}}))
    with pytest.raises(DataError, match="has no labels: prepare it"):
        load_images("cifar10-vehicles", "test", folder)


def test_unknown_names_and_splits_are_refused(tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    for name, split, message in (("cifar-10", "test", "'cifar-10': neither a known set"),
                                 ("cifar10-subset", "validation", "must be train or test"),
                                 (tmp_path / "no.npy", "test", "no such file"),
                                 (tmp_path / "bad.npy", "test", "not a readable .npy"),
                                 (tmp_path, "test", "no manifest.json")):
        with pytest.raises(DataError, match=message):
            load_images(name, split)


def test_batches_see_every_image_once_an_epoch_whatever_their_size():
    orders = []
    for batch_size in (1, 3, 10, 25):
        orders.append(np.concatenate([batch_indices(10, batch_size, 5, step) for step in range(150 // batch_size)]))
        assert np.array_equal(orders[0], orders[-1])
    for epoch in orders[0].reshape(15, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(orders[0][:10], orders[0][10:20])  # another order in each epoch
    assert not np.array_equal(orders[0][:10], batch_indices(10, 10, 6, 0))  # and for each seed


def test_a_batch_depends_on_seed_and_step_alone():
    images = load_images("cifar10-subset", "test")
    torch.manual_seed(1)
    first = training_batch(images, 8, 0, 3)
    torch.manual_seed(2)
    training_batch(images, 8, 0, 2)
    assert torch.equal(training_batch(images, 8, 0, 3), first)
    for seed, step in ((1, 3), (0, 4)):
        other = training_batch(images, 8, seed, step)
        noise = [(x.double() + 1) * 127.5 % 1 for x in (first, other)]
        assert (noise[0] - noise[1]).abs().mean() > 0.2  # other noise, too: 1/3 where both are uniform
    assert torch.equal(quantize(first).permute(0, 2, 3, 1),
                       torch.from_numpy(images.array[batch_indices(512, 8, 0, 3)]))


@pytest.mark.parametrize("source", ["array", "device", "stream", None])
def test_batches_are_the_same_bits_wherever_the_images_are(source):
    images = load_images("cifar10-subset", "test")
    batches = list(training_batches(images, 200, 3, range(4, 11), "cpu", source))  # over two epochs' ends
    assert len(batches) == 7
    for step, batch in enumerate(batches, 4):
        assert torch.equal(batch, training_batch(images, 200, 3, step)) and batch.shape == (200, 3, 32, 32)


class Failing:
    """An array on a disk that fails after some reads."""
    def __init__(self, array, reads):
        self.array, self.reads = array, reads

    def __len__(self):
        return len(self.array)

    def __getitem__(self, indices):
        self.reads -= 1
        if self.reads < 0:
            raise OSError(5, "Input/output error")
        return self.array[indices]


def test_an_error_of_the_reading_thread_ends_the_loop():
    images = load_images("cifar10-subset", "test")
    failing = dataclasses.replace(images, array=Failing(images.array, 3))
    batches = training_batches(failing, 8, 0, range(100), "cpu", "stream")
    threads = threading.active_count()
    for step in range(3):  # those that were read still come
        assert torch.equal(next(batches), training_batch(images, 8, 0, step))
    with pytest.raises(OSError, match="Input/output error"):
        next(batches)
    assert threading.active_count() == threads


def test_leaving_the_loop_ends_the_reading_thread():
    threads = threading.active_count()
    batches = training_batches(load_images("cifar10-subset", "test"), 8, 0, range(10 ** 9), "cpu", "stream")
    next(batches)
    assert threading.active_count() == threads + 1
    batches.close()
    assert threading.active_count() == threads


def test_prefetch_works_ahead_but_not_too_far():
    seen = []
    items = prefetch(seen.append, iter(range(100)), ahead=3)
    next(items)
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert seen == [0, 1, 2, 3]
    assert len(list(items)) == 99 and seen == list(range(100))
    assert list(prefetch(str, [1, 2], ahead=0)) == list(prefetch(str, [1, 2], ahead=9)) == ["1", "2"]


def test_free_memory_is_the_machines_or_the_smallest_limit_around(tmp_path):
    cpu, kib = torch.device("cpu"), 1024
    assert 2 ** 20 < free_bytes(cpu) < 2 ** 50
    assert free_bytes(cpu, tmp_path) == math.inf  # no Linux
    inner = tmp_path / "sys/fs/cgroup/outer/inner"
    (tmp_path / "proc/self").mkdir(parents=True)
    inner.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    assert free_bytes(cpu, tmp_path) == 500 * kib  # no cgroups
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/x\n0::/outer/inner\n")
    for folder, limit, used in ((inner, "max", 3), (inner.parent, str(400 * kib), 100 * kib)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.stat").write_text(f"anon {used}\nfile 7\n")
    assert free_bytes(cpu, tmp_path) == 300 * kib
    for limit in ("max", str(900 * kib)):
        (inner.parent / "memory.max").write_text(f"{limit}\n")
        assert free_bytes(cpu, tmp_path) == 500 * kib


def test_evaluation_noise_is_keyed_by_seed_draw_and_image():
    noise = evaluation_noise(range(6), (4, 4, 3), seed=1, draw=0)
    assert noise.dtype == torch.float32 and 0 <= noise.min() and noise.max() < 1
    assert torch.equal(evaluation_noise([5, 2], (4, 4, 3), 1, 0), noise[[5, 2]])
    for seed, draw in ((2, 0), (1, 1)):
        assert not torch.equal(evaluation_noise(range(6), (4, 4, 3), seed, draw), noise)
    assert len(noise.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("split, counts", [("train", (1230, 818)), ("test", (306, 206))])
def test_the_parts_of_the_subset_are_its_animals_and_its_vehicles(split, counts):
    whole, kept = load_images("cifar10-subset", split), []
    for part, count in zip(("animals", "vehicles"), counts):
        images = load_images(f"cifar10-subset-{part}", split)
        classes = {data.CIFAR10_CLASSES[label] for label in images.labels}
        assert classes == set(data.CIFAR10_PARTS[part]) and len(images.array) == count
        assert len(images.array) == data.SETS[images.name].counts[split]
        assert images.name == images.variant == f"cifar10-subset-{part}"
        assert images.fingerprint == fingerprint(images.array) == data.FINGERPRINTS[images.name, split]
        kept.append(images.array)
    rows = {image.tobytes() for image in whole.array}
    assert {image.tobytes() for part in kept for image in part} == rows  # none twice, none lost, none else
    assert sum(map(len, kept)) == len(whole.array)


def test_the_parts_of_cifar10_keep_its_order(cifar, monkeypatch):
    monkeypatch.setitem(data.FINGERPRINTS, ("cifar10-vehicles", "test"), "f" * 64)
    whole, part = (load_images(name, "test", cifar.parent) for name in ("cifar10", "cifar10-vehicles"))
    assert np.array_equal(part.array, whole.array[np.isin(whole.labels, [0, 1, 8, 9])])
    with pytest.raises(DataError, match="cifar10 .* is needed as the folder"):
        load_images("cifar10-animals", "test")


def test_the_search_set_cuts_the_training_images_in_two(cifar, monkeypatch):
    """No test image is in it, and none is in both."""
    for split in data.SPLITS:
        monkeypatch.setitem(data.FINGERPRINTS, ("cifar10-search", split), "f" * 64)
    whole = load_images("cifar10", "train", cifar.parent)
    train, test = (load_images("cifar10-search", split, cifar.parent) for split in data.SPLITS)
    assert (len(train.array), len(test.array)) == (180, 20)
    assert np.array_equal(np.concatenate([train.array, test.array]), whole.array)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), whole.labels)
    assert train.name == test.variant == "cifar10-search" and test.split == "test"


def test_channels_that_come_first_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 32, 32), np.uint8))
    with pytest.raises(DataError, match=r"shape \(4, 3, 32, 32\): channels come last"):
        load_images(tmp_path / "a.npy", "train")


def test_a_pipe_is_no_set_of_images(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match="a.npy.*no regular file"):
        load_images(tmp_path / "a.npy", "train")


def test_home_and_the_checkouts_own_sets_are_looked_into(cifar, tmp_path, monkeypatch):
    monkeypatch.delenv("JET_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8, 3), np.uint8))
    assert load_images("~/a.npy", "train").array.shape == (4, 8, 8, 3)
    assert sets.sets_root("~/sets") == tmp_path / "sets"
    monkeypatch.setenv("JET_DATA", "~/elsewhere")
    assert sets.sets_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("JET_DATA")
    monkeypatch.setattr(sets, "OWN_SETS", tmp_path / "own")
    assert sets.sets_root() is None
    (tmp_path / "own").mkdir()
    assert sets.sets_root() == tmp_path / "own"
