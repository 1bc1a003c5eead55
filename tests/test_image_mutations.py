"""Files of every format that images are prepared and loaded from, mutated: the right pixels or one line.

JET_MUTATIONS=600 tries that many instead of a few. A format is a function in FORMATS: it makes a file in a folder, and returns
its path and what opens it, a function of (capsys, path, a folder to make) that returns what run does.
"""
import json
import os
import random
import resource
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

import data
from data import load_images
from images.folder import seal
from test_prepare import run, workers_are_threads
from test_sources import TEST, TRAIN, binary_cifar, encoded, own_files, pickled_cifar, write_tar, write_tree

pytestmark = pytest.mark.usefixtures("workers_are_threads")
MUTATIONS = int(os.environ.get("JET_MUTATIONS", 60))
WORDS = [b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"99999999999", b"-1", b"../../x", b"\x1b[2J\r\n", b"\"", b"[[", b"{"]
VALUES = [None, True, -1, 0, 2 ** 63, 10 ** 40, 1e308, "", "x\x1b[31m\ny", "../../../x", "a" * 10 ** 5, [], {}, [[]] * 9, {"a": {}}, "f" * 64]


def mutate(rng, content):
    """Bits flipped, pieces cut, doubled, zeroed, replaced or put in anywhere."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        place, kind = rng.randrange(len(content) + 1), rng.randrange(8)
        end = min(len(content), place + rng.choice([1, 4, 30, 300]))
        if kind <= 1 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place:end]
        elif kind == 4:
            content[place:end] = bytes(end - place)
        elif kind == 5:
            content[place:place] = content[place:end]
        elif kind == 6:
            word = rng.choice(WORDS)
            content[place:place + len(word)] = word
        else:
            content[place:place] = rng.choice(WORDS)
    return bytes(content)


def places(values):
    """(container, key) of each value within."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from places(values[key])


def mutate_json(rng, content):
    """Some values become others, or are left out; a manifest is sealed again."""
    if rng.random() < 0.05:
        return b'{"name": ' + b"[" * 10 ** 5
    values = json.loads(content)
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(list(places(values)))
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
    if "seal" in values:
        values["seal"] = seal(values)
    return json.dumps(values).encode()


def prepare(name, *arguments):
    return lambda capsys, path, out: run(capsys, "prepare", name, "--workers", 1, "--out", out, *arguments)


def archive(kind):
    def make(rng, folder):
        path, files = folder / f"photos.{kind}", own_files()
        if kind == "zip":
            with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
                for name, content in files.items():
                    file.writestr(name, content)
        else:
            write_tar(path, files, f"w:{kind[4:]}" if "." in kind else "w")
        return path, prepare("photos", "--size", 32, "--source", path)
    return make


def image(kind, **settings):
    """One of several images of a folder."""
    def make(rng, folder):
        pixels = Image.fromarray(TRAIN[7]).convert(settings.get("mode", "RGB"))
        write_tree(folder / "photos", {**own_files(), f"train/z.{kind.lower()}": encoded(pixels, kind, (40, 36))})
        flags = ["--skip-corrupt"] * rng.randrange(2)
        return folder / f"photos/train/z.{kind.lower()}", prepare(
            "photos", "--size", 32, "--filter", "box", "--source", folder / "photos", *flags)
    return make


def cifar(files):
    def make(rng, folder):
        write_tree(folder, files())
        path = rng.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
        return path, prepare("cifar10", "--incomplete", "--source", folder)
    return make


def npz_batches(rng, folder):
    save = rng.choice([np.savez, np.savez_compressed])
    for name, images in (("train_data_batch_1", TRAIN[:9]), ("val_data", TEST[:5])):
        save(folder / f"{name}.npz", data=images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels=np.arange(len(images)))
    if rng.random() < 0.5:
        with zipfile.ZipFile(folder / "Imagenet32_train.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.write(folder / "train_data_batch_1.npz", "train_data_batch_1.npz")
        (folder / "train_data_batch_1.npz").unlink()
    path = rng.choice(sorted(folder.iterdir()))
    return path, prepare("imagenet32-chrabaszcz", "--incomplete", "--source", folder)


def parquet(rng, folder):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    (folder / "data").mkdir(parents=True)
    for name, images in (("train", TRAIN[:40]), ("test", TEST[:5])):
        table = pyarrow.table({"img": [{"bytes": encoded(x), "path": None} for x in images], "label": list(range(len(images)))})
        pyarrow.parquet.write_table(table, folder / f"data/{name}-00000-of-00001.parquet", compression=rng.choice(["none", "zstd", "gzip"]))
    return rng.choice(sorted((folder / "data").iterdir())), prepare("photos", "--size", 32, "--source", folder)


def made(folder):
    """A prepared set with labels."""
    write_tree(folder / "source", binary_cifar())
    data.main(["prepare", "cifar10", "--incomplete", "--source", str(folder / "source"), "--out", str(folder / "set"), "--workers", "1"])
    return folder / "set"


def use_set(capsys, path, out):
    """All that opens a prepared set; the worst end counts."""
    ends = [run(capsys, "verify", path.parent), run(capsys, "list", "--data-root", path.parent.parent), run(
        capsys, "show", path.parent, path.parent.parent / "a.png"), run(
        capsys, "prepare", "cifar10", "--incomplete", "--source", path.parent.parent / "source", "--out", path.parent)]
    return max(ends, key=lambda end: end[0])


def part_of_a_set(pattern):
    def make(rng, folder):
        return rng.choice(sorted(made(folder).glob(pattern))), use_set
    return make


def begun(name):
    """A file of a preparation that an image stopped."""
    def make(rng, folder):
        write_tree(folder / "photos", {**{f"{n:03d}.png": encoded(TRAIN[n]) for n in range(70)}, "069.png": b"no image", "a.txt": b""})
        arguments = ["prepare", "photos", "--size", "32", "--source", str(folder / "photos"), "--out", str(folder / "set"), "--workers", "1"]
        with pytest.raises(SystemExit):
            data.main(arguments)
        return folder / "set/partial" / name, lambda capsys, path, _: run(capsys, *arguments, "--skip-corrupt")
    return make


def bare(rng, folder):
    np.save(folder / "a.npy", TRAIN[:3, :9, :9, :rng.choice([1, 3])])
    return folder / "a.npy", lambda capsys, path, out: run(capsys, "show", path, folder / "a.png")


def not_moved(rng, folder):
    """All but the last moves was done."""
    place = made(folder)
    (place / "partial").mkdir()
    for path in sorted(place.glob("*.*")):
        path.rename(place / "partial" / path.name)
    return place / "partial/manifest.json", lambda capsys, path, _: run(
        capsys, "prepare", "cifar10", "--incomplete", "--source", folder / "source", "--out", place)


ARCHIVES = {kind: archive(kind) for kind in ("tar", "tar.gz", "tar.xz", "zip")}
IMAGES = {"png": image("PNG"), "grey png": image("PNG", mode="L"), "palette": image("PNG", mode="P"), "jpeg": image("JPEG"),
          "bmp": image("BMP"), "gif": image("GIF"), "webp": image("WEBP")}
FORMATS = {
    **ARCHIVES, **IMAGES, "bin": cifar(binary_cifar), "pickle2": cifar(lambda: pickled_cifar(2)), "pickle4": cifar(lambda: pickled_cifar(4)),
    "npz": npz_batches, "parquet": parquet, "npy": bare, "manifest.json": part_of_a_set("manifest.json"),
    "arrays of a set": part_of_a_set("*.npy"), "state.json": begun("state.json"), "files.sqlite": begun("files.sqlite"),
    "manifest.json that is not moved": not_moved}


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_a_mutated_file_gives_the_right_pixels_or_one_line(seed, tmp_path, capsys):
    rng, kind = random.Random(seed), list(FORMATS)[seed % len(FORMATS)]
    folder, out = tmp_path / "work", tmp_path / "set"
    folder.mkdir()
    path, use = FORMATS[kind](rng, folder)
    content = path.read_bytes()
    is_json = path.suffix == ".json" and rng.random() < 0.8
    changed = (mutate_json if is_json else mutate)(rng, content)
    path.write_bytes(changed)
    capsys.readouterr()
    begun = time.process_time()
    code, told, error = use(capsys, path, out)
    assert time.process_time() - begun < 10
    assert code == 0 or error.startswith("data.py: error: ") and len(error) < 2200
    assert "".join(error.split("\n", 1)).isprintable() and all(line.isprintable() for line in told.splitlines())
    assert {entry.name for entry in tmp_path.iterdir()} <= {"work", "set", "a.png"}
    assert kind != "arrays of a set" or code or changed == content
    if (out / "manifest.json").exists():
        arrays = [load_images(out, split).array for split in data.SPLITS]
        for array, images in zip(arrays, (TRAIN, TEST)) if kind in ARCHIVES or kind in IMAGES else ():
            assert np.array_equal(array[:6], images[[0, 1, 2, 10, 11, 12]])
            assert len(array) == 6 or kind in IMAGES
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert max(peaks) < 2 ** 20  # KiB
