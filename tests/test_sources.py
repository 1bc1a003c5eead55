"""Every source in its true layout, through the command line, beside an independent reading; and hostile ones."""
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import sys
import tarfile
import threading
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data import load_images
from harness.download import download
from harness.errors import DataError
from images import readers
from images.decode import BadImage, decode
from images.readers import Batches, take_images
from test_prepare import run, workers_are_threads

pytestmark = pytest.mark.usefixtures("workers_are_threads")
CIFAR = {split: load_images("cifar10-subset", split) for split in ("train", "test")}
TRAIN, TEST = CIFAR["train"].array, CIFAR["test"].array


def encoded(pixels, kind="PNG", size=None, **settings):
    """The bytes of an image file; enlarged where size is (width, height)."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image = image.resize(size, Image.Resampling.BICUBIC) if size else image
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode, **({"compresslevel": 1} if mode == "w:gz" else {})) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepared(capsys, out, name, *arguments):
    """The two splits of a set made by the command line."""
    code, told, error = run(capsys, "prepare", name, "--out", out, "--workers", 2, *arguments)
    assert code == 0, error
    assert run(capsys, "verify", out)[0] == 0
    return load_images(out, "train"), load_images(out, "test")


def resized(content, size, resample):
    """An independent reading: centre crop by NumPy, then Pillow."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top:top + side, left:left + side]))
    return np.asarray(square if side == size else square.resize((size, size), resample))


# ---- what is done to an image

def test_box_is_the_mean_of_the_area_rounded_after_rows_and_columns():
    pixels = np.zeros((4, 6, 3), np.uint8)  # the square is the columns 1 to 4
    pixels[:, 1:5, 0] = [[10, 20, 0, 1], [30, 41, 0, 0], [255, 255, 7, 7], [255, 255, 7, 8]]
    pixels[:, [0, 5]] = 99
    array, enlarged = decode(encoded(pixels), 2, "box")
    # rows: 15 and 35.5 -> 36, 0.5 -> 1 and 0; 255 and 255, 7 and 7.5 -> 8; columns: 25.5 -> 26, 0.5 -> 1; 255, 7.5 -> 8
    assert array[..., 0].tolist() == [[26, 1], [255, 8]] and not enlarged
    assert array[..., 1:].tolist() == np.zeros((2, 2, 2)).tolist()


def test_crop_leaves_the_odd_pixel_at_the_right_and_bottom():
    pixels = np.zeros((2, 5, 3), np.uint8)
    pixels[..., 0] = [[1, 2, 3, 4, 5]] * 2
    assert decode(encoded(pixels), 2, "box")[0][..., 0].tolist() == [[2, 3]] * 2
    assert decode(encoded(np.swapaxes(pixels, 0, 1)), 2, "box")[0][..., 0].tolist() == [[2, 2], [3, 3]]


@pytest.mark.parametrize("resample, kernel, support", [
    ("bicubic", lambda t: np.where(t < 1, 1.5 * t ** 3 - 2.5 * t ** 2 + 1, -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2), 2),
    ("lanczos", lambda t: np.sinc(t) * np.sinc(t / 3), 3)])
def test_filters_are_their_formulas_stretched_over_the_area(resample, kernel, support):
    """8 to 4 pixels: weights kernel(distance / 2) over support * 2 source pixels, normalised, edges cut off."""
    row = np.array([0, 40, 200, 90, 10, 255, 128, 60], np.float64)
    distance = np.abs((np.arange(8) + 0.5)[None] - (2 * np.arange(4) + 1)[:, None]) / 2
    weights = np.where(distance < support, kernel(distance), 0)
    wanted = (weights / weights.sum(1, keepdims=True) @ row).clip(0, 255)
    pixels = np.repeat(np.repeat(row.astype(np.uint8)[None, :, None], 8, 0), 3, 2)
    array, _ = decode(encoded(pixels), 4, resample)
    assert np.abs(array[0, :, 0] - wanted).max() <= 0.51  # rounded
    assert (array == array[0, :, :1]).all()


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"),
                                        ("CMYK", "JPEG"), ("RGB", "BMP"), ("RGB", "MPO")])
def test_other_kinds_become_rgb_as_pillow_does_it(mode, kind):
    image = Image.fromarray(TRAIN[0]).convert(mode)
    content = encoded(image, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    assert np.array_equal(decode(content, 32)[0], np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def png16():
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in TRAIN[0].astype(np.uint16) * 257)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def transparent():
    image = Image.fromarray(TRAIN[0]).convert("RGBA")
    image.putpixel((5, 5), (1, 2, 3, 254))
    return encoded(image)


def altered(content, place, bit=1):
    content = bytearray(content)
    content[place] ^= bit
    return bytes(content)


def declares(width, height):
    content = bytearray(encoded(TRAIN[0]))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


FRAMES = {"save_all": True, "append_images": [Image.fromarray(TRAIN[1])]}
BAD_IMAGES = {
    "16 bits a channel": png16(), "transparent pixels": transparent(), "is animated": encoded(TRAIN[0], "GIF", **FRAMES),
    "is animated (2": encoded(TRAIN[0], "WEBP", **FRAMES), "is animated (2 frames)": encoded(TRAIN[0], **FRAMES),
    "damaged": encoded(TRAIN[0])[:900], "damaged: ": altered(encoded(TRAIN[0]), 700), "is no JPEG": b"", "is no": bytes(99),
    "declares 9000x9000": declares(9000, 9000), "declares too many": declares(60000, 60000), "is damaged": declares(8000, 8000),
    "is no JPEG, PNG": encoded(TRAIN[0], "TIFF"),
    "is 16x32 pixels, not 32x32": encoded(TRAIN[0, :, :16])}


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_images_that_cannot_be_taken_are_refused(reason):
    with pytest.raises(BadImage) as error:
        decode(BAD_IMAGES[reason], 32)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_small_images_are_enlarged_only_when_asked():
    content = encoded(TRAIN[0])
    with pytest.raises(BadImage, match="smaller than 64x64: --enlarge-small"):
        decode(content, 64, "lanczos")
    array, enlarged = decode(content, 64, "lanczos", enlarge=True)
    assert enlarged and np.array_equal(array, resized(content, 64, Image.Resampling.LANCZOS))


# ---- the layouts

def cifar_batches():
    """{name: (pixels, labels)}: five batches and the test batch."""
    cuts = {f"data_batch_{number}": (TRAIN[40 * number:40 * number + 40], CIFAR["train"].labels[40 * number:40 * number + 40])
            for number in range(1, 6)}
    return {**cuts, "test_batch": (TEST[:40], CIFAR["test"].labels[:40])}


def binary_cifar():
    return {f"cifar-10-batches-bin/{name}.bin": np.concatenate(
        [labels[:, None].astype(np.uint8), pixels.transpose(0, 3, 1, 2).reshape(40, -1)], 1).tobytes()
        for name, (pixels, labels) in cifar_batches().items()}


def pickled_cifar(protocol):
    return {f"cifar-10-batches-py/{name}": pickle.dumps({
        b"batch_label": b"batch", b"labels": labels.tolist(), b"data": pixels.transpose(0, 3, 1, 2).reshape(40, -1).copy(),
        b"filenames": [b"a.png"] * 40}, protocol) for name, (pixels, labels) in cifar_batches().items()}


def python2_cifar():
    """As Python 2 wrote it: byte strings by BINSTRING and SHORT_BINSTRING, the array by its state."""
    def text(content):
        return b"U" + bytes([len(content)]) + content
    files = {}
    for name, (pixels, labels) in cifar_batches().items():
        data = pixels.transpose(0, 3, 1, 2).tobytes()
        array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR(K\1K\x28M\0\x0c\x86"
                 b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
                 b"T" + struct.pack("<I", len(data)) + data + b"tb")
        numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
        files[f"cifar-10-batches-py/{name}"] = b"\x80\2}(" + text(b"data") + array + text(b"labels") + numbers + b"u."
    return files


@pytest.mark.parametrize("layout", ["bin", "parent", "py0", "py2", "py3", "py5", "python2", "bin.tar.gz", "py.tar.gz", "bin.tar"])
def test_cifar10(layout, tmp_path, capsys):
    kind = layout.partition(".")[0]
    files = (python2_cifar() if kind == "python2" else binary_cifar() if kind in ("bin", "parent")
             else pickled_cifar(int(kind[2:] or 2)))
    if "tar" in layout:
        source = write_tar(tmp_path / f"cifar-10-{layout}", files, "w:gz" if layout.endswith("gz") else "w")
    else:
        source = write_tree(tmp_path / "source", files) / ("" if layout == "parent" else next(iter(files)).split("/")[0])
    train, test = prepared(capsys, tmp_path / "set", "cifar10", "--incomplete", "--source", source)
    assert np.array_equal(train.array, TRAIN[40:240]) and np.array_equal(test.array, TEST[:40])
    assert np.array_equal(train.labels, CIFAR["train"].labels[40:240]) and np.array_equal(test.labels, CIFAR["test"].labels[:40])
    assert train.name == "cifar10-incomplete"


def test_cifar10_must_be_the_official_images(tmp_path, capsys):
    source = write_tree(tmp_path / "source", binary_cifar())
    code, _, error = run(capsys, "prepare", "cifar10", "--source", source, "--out", tmp_path / "set")
    assert code == 1 and "data_batch_1.bin" in error and "altered or has other images (40 of them" in error


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.server.content; breaks off after self.server.limit bytes; knows Range where self.server.ranges."""

    def do_GET(self):
        content, start = self.server.content, 0
        self.server.asked.append(self.headers.get("Range"))
        if self.server.ranges and (asked := self.headers.get("Range")) and self.headers.get("If-Range") == self.server.tag:
            start = int(asked[6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        self.wfile.write(content[start:start + self.server.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.content, server.limit, server.ranges, server.tag, server.asked = b"", 2 ** 30, True, '"a"', []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(ranges, server, tmp_path, capsys):
    server.content = write_tar(tmp_path / "c.tar.gz", binary_cifar(), "w:gz").read_bytes()
    server.ranges, server.limit = ranges, len(server.content) // 5
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    command = ("prepare", "cifar10", "--incomplete", "--source", url, "--out", tmp_path / "set")
    code, _, error = run(capsys, *command)
    assert code == 1 and "broke off at" in error and "the same command goes on" in error
    begun = len(server.asked)
    server.limit = 2 ** 30
    assert run(capsys, *command)[0] == 0
    assert np.array_equal(load_images(tmp_path / "set", "test").array, TEST[:40])
    assert server.asked[begun] == f"bytes={(3 if ranges else 1) * (len(server.content) // 5)}-"


def test_a_download_that_is_not_what_it_should_be_is_refused(server, tmp_path):
    server.content = b"other bytes"
    with pytest.raises(DataError, match="has SHA-256 .* it was removed"):
        download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x", "0" * 64)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.part").exists()


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, tmp_path):
    server.content, server.limit = bytes(1000), 100
    url, path = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x"
    with pytest.raises(DataError):
        download(url, path)
    server.content, server.limit, server.tag = b"n" * 700, 2 ** 30, '"b"'
    download(url, path)
    assert path.read_bytes() == b"n" * 700


@pytest.mark.parametrize("size", [32, 64])
def test_oord_tars_and_folders_give_the_same_bytes(size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(readers, "FILES_A_PIECE", 8)
    larger = (size, size)
    files = {"train": {f"{number:07d}.png": encoded(TRAIN[number], size=larger) for number in range(12)},
             "valid": {f"{number:05d}.png": encoded(TEST[number], size=larger) for number in range(9)}}
    (tmp_path / "tars").mkdir()
    for split, members in files.items():
        shuffled = dict(sorted(members.items(), key=lambda item: hashlib.md5(item[0].encode()).digest()))
        write_tar(tmp_path / f"tars/{split}_{size}x{size}.tar", {
            f"{split}_{size}x{size}/{name}": content for name, content in shuffled.items()})
        write_tree(tmp_path / f"folders/{split}_{size}x{size}/{split}_{size}x{size}", members)
    sets = [prepared(capsys, tmp_path / place / "set", f"imagenet{size}-oord", "--incomplete", "--source", *given)
            for place, given in (("a", [tmp_path / "tars"]), ("b", [tmp_path / "folders"]),
                                 ("c", sorted((tmp_path / "tars").iterdir())))]
    for split, members in enumerate(files.values()):
        wanted = [np.asarray(Image.open(io.BytesIO(members[name]))) for name in sorted(members)]
        for made in sets:
            assert np.array_equal(made[split].array, wanted) and made[split].variant == "oord"


@pytest.mark.parametrize("kind, zipped", [
    *((kind, None) for kind in ("npz", "compressed", "pickle2", "pickle4")), ("npz", zipfile.ZIP_STORED), ("pickle2", zipfile.ZIP_STORED),
    *((kind, zipfile.ZIP_DEFLATED) for kind in ("npz", "compressed", "pickle4"))])
def test_chrabaszcz(kind, zipped, tmp_path, capsys):
    def batch(images, labels):
        content = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1).copy(), "labels": labels, "mean": np.zeros(3072)}
        file = io.BytesIO()
        if kind.startswith("pickle"):
            pickle.dump(content, file, int(kind[-1]))
        else:
            (np.savez if kind == "npz" else np.savez_compressed)(file, **content)
        return file.getvalue()
    end = "" if kind.startswith("pickle") else ".npz"
    files = {f"train_data_batch_{number}{end}": batch(TRAIN[2 * number:2 * number + 2], [number] * 2) for number in range(1, 12)}
    test = {f"val_data{end}": batch(TEST[:7], [1000] * 7)}
    folder = tmp_path / "source"
    if zipped is None:
        write_tree(folder, {**{f"train/{name}": content for name, content in files.items()}, **test})
    else:
        folder.mkdir()
        for name, members in (("Imagenet32_train", files), ("Imagenet32_val", test)):
            with zipfile.ZipFile(folder / f"{name}{'_npz' if end else ''}.zip", "w", zipped) as archive:
                for member, content in members.items():
                    archive.writestr(f"{name}/{member}", content)
    train, test = prepared(capsys, tmp_path / "set", "imagenet32-chrabaszcz", "--incomplete", "--source", folder)
    assert np.array_equal(train.array, TRAIN[2:24]) and np.array_equal(test.array, TEST[:7])
    assert train.labels.tolist() == [number for number in range(1, 12) for _ in range(2)] and set(test.labels) == {1000}


CLASSES = ("n01440764", "n02123045", "n04266014")


def class_files(images, kind="JPEG", suffix="JPEG"):
    """{class: {file name: content}}: larger than 64 pixels, of several shapes."""
    return {name: {f"{name}_{number + 10 * place}.{suffix}": encoded(
        images[7 * place + number], kind, (100 + 20 * (number % 3), 90 + 9 * number), quality=95) for number in range(4)}
        for place, name in enumerate(CLASSES)}


@pytest.mark.parametrize("resample", ["box", "lanczos", "bicubic"])
def test_imagenet1k_tars_and_trees_give_the_same_bytes(resample, tmp_path, capsys):
    train, test = class_files(TRAIN), {f"ILSVRC2012_val_{number:08d}.JPEG": encoded(TEST[number], "JPEG", (130, 101))
                                       for number in range(1, 6)}
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "ILSVRC2012_img_train.tar", {f"{name}.tar": tar_bytes(files) for name, files in train.items()})
    write_tar(tars / "ILSVRC2012_img_val.tar", test)
    tree = write_tree(tmp_path / "tree", {f"train/{name}/{file}": content for name, files in train.items()
                                          for file, content in files.items()})
    write_tree(tree / "val", {f"{CLASSES[number % 3]}/{name}": content for number, (name, content) in enumerate(test.items())})
    everything = {name: content for files in train.values() for name, content in files.items()}
    for source in (tars, tree):
        sets = prepared(capsys, source / "set", f"imagenet1k-64-{resample}", "--incomplete", "--source", source)
        for images, files in zip(sets, (everything, test)):
            wanted = [resized(files[name], 64, Image.Resampling[resample.upper()]) for name in sorted(files)]
            assert np.array_equal(images.array, wanted) and images.variant == resample


def test_imagenet21k_holds_out_the_same_images_from_tars_and_trees(tmp_path, capsys):
    classes = class_files(TRAIN)
    write_tree(tmp_path / "tree", {f"{name}/{file}": content for name, files in classes.items() for file, content in files.items()})
    write_tree(tmp_path / "tars", {f"{name}.tar": tar_bytes(files) for name, files in classes.items()})
    files = {name: content for members in classes.values() for name, content in members.items()}
    held = min(files, key=lambda name: hashlib.sha256(name.encode()).digest())  # round(12 / 256), at least one
    for source in ("tree", "tars"):
        train, test = prepared(capsys, tmp_path / f"set-{source}", "imagenet21k-32-box", "--incomplete", "--source",
                               tmp_path / source)
        wanted = {name: resized(files[name], 32, Image.Resampling.BOX) for name in files}
        assert np.array_equal(test.array, [wanted[held]])
        assert np.array_equal(train.array, [wanted[name] for name in sorted(wanted) if name != held])


@functools.cache
def own_files(train="train", test="val"):
    return {f"{folder}/{kind}/{number}.png": encoded(images[number + 10 * (kind == "b")])
            for folder, images in ((train, TRAIN), (test, TEST)) for kind in "ab" for number in range(3)}


@pytest.mark.parametrize("pack", ["folder", "tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
@pytest.mark.parametrize("inside", ["", "photos/"])
def test_own_sets_with_splits(pack, inside, tmp_path, capsys):
    files = {inside + name: content for name, content in own_files().items()}
    path = tmp_path / f"photos.{pack}"
    if pack == "folder":
        write_tree(path, files)
    elif pack == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        write_tar(path, files, f"w:{pack[4:]}" if "." in pack else "w")
    train, test = prepared(capsys, tmp_path / "set", "photos", "--size", 32, "--source", path)
    assert np.array_equal(train.array, TRAIN[[0, 1, 2, 10, 11, 12]]) and np.array_equal(test.array, TEST[[0, 1, 2, 10, 11, 12]])


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("images/train", "images/val"),
                                         ("a/b/Training", "a/b/Validation"), ("train/images", "valid/images"), ("x/train/val", "y/test/train")])
@pytest.mark.parametrize("pack", ["folder", "zip"])
def test_splits_are_known_in_any_case_at_any_depth_and_with_backslashes(train, test, pack, tmp_path, capsys):
    files, path = own_files(train, test), tmp_path / f"photos.{pack}"
    if pack == "folder":
        write_tree(path, files)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photos\\", b"")  # a folder, as some programs write it
            archive.writestr("__MACOSX\\x.png", b"hidden")
            for name, content in files.items():
                archive.writestr(f"photos\\{name}".replace("/", "\\"), content)
    code, told, error = run(capsys, "prepare", "photos", "--size", 32, "--source", path, "--out", tmp_path / "set")
    assert code == 0 and "held out" not in told, error
    for split, images in (("train", TRAIN), ("test", TEST)):
        assert np.array_equal(load_images(tmp_path / "set", split).array, images[[0, 1, 2, 10, 11, 12]])


def test_files_whose_names_have_backslashes_are_in_folders(tmp_path, capsys):
    """As Python unpacks such a zip."""
    source = write_tree(tmp_path / "photos", {name.replace("/", "\\"): content for name, content in own_files().items()})
    train, test = prepared(capsys, tmp_path / "set", "photos", "--size", 32, "--source", source)
    assert np.array_equal(train.array, TRAIN[[0, 1, 2, 10, 11, 12]]) and np.array_equal(test.array, TEST[[0, 1, 2, 10, 11, 12]])


@pytest.mark.parametrize("name", ["more/x.png", "x.png", "Valid/x.png", "training/x.png", "deep/test/x.png"])
def test_splits_with_more_beside_them_are_refused(name, tmp_path, capsys):
    source = write_tree(tmp_path / "photos", {**own_files(), name: encoded(TRAIN[20])})
    code, told, error = run(capsys, "prepare", "photos", "--size", 32, "--source", source, "--out", tmp_path / "set")
    assert code == 1 and name in error and "train/a/0.png" in error and "nothing beside them" in error and error.count("\n") <= 1
    assert not (tmp_path / "set").exists()


def test_a_split_that_is_drawn_is_told_and_a_share_without_effect_refused(tmp_path, capsys):
    classes = {f"{kind}/{number}.png": encoded(TRAIN[number + 10 * (kind == "bus")]) for kind in ("train", "bus") for number in range(10)}
    arguments = ("prepare", "photos", "--size", 32, "--test-share", 0.2, "--source")
    code, told, _ = run(capsys, *arguments, write_tree(tmp_path / "vehicles", classes), "--out", tmp_path / "a")
    assert code == 0 and "test: 4 held out of 20\n" in told
    code, told, error = run(capsys, *arguments, write_tree(tmp_path / "split", own_files()), "--out", tmp_path / "b")
    assert code == 1 and "--test-share 0.2: the source has test images of its own" in error and not (tmp_path / "b").exists()


def test_own_sets_without_splits_hold_out_a_share(tmp_path, capsys):
    files = {f"{number}.png": encoded(TRAIN[number]) for number in range(30)}
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    write_tree(tmp_path / "photos", files)
    for share, count in ((None, 3), (0.5, 15), (0.001, 1)):
        arguments = () if share is None else ("--test-share", share)
        train, test = prepared(capsys, tmp_path / f"set{count}", "photos", "--size", 32, "--source", tmp_path / "photos", *arguments)
        for images, names in ((test, order[:count]), (train, order[count:])):
            assert np.array_equal(images.array, [TRAIN[int(name[:-4])] for name in sorted(names)])


def test_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def write(name, images, labels):
        rows = [{"bytes": encoded(image, "PNG", (64, 64)), "path": None} for image in images]
        parquet.write_table(pyarrow.table({"image": rows, "label": labels}), tmp_path / "data" / name, row_group_size=30)
    (tmp_path / "data").mkdir()
    write("train-00001-of-00002.parquet", TRAIN[70:100], list(range(30)))
    write("train-00000-of-00002.parquet", TRAIN[:70], list(range(70)))
    write("validation-00000-of-00001.parquet", TEST[:5], [7] * 5)
    write("test-00000-of-00001.parquet", TEST[5:9], [-1] * 4)
    train, test = prepared(capsys, tmp_path / "set", "imagenet1k-64-parquet", "--incomplete", "--source", tmp_path)
    assert np.array_equal(train.array, [np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in TRAIN[:100]])
    assert train.labels.tolist() == [*range(70), *range(30)] and len(test.array) == 5 and set(test.labels) == {7}
    train, _ = prepared(capsys, tmp_path / "box", "imagenet1k-32-box", "--incomplete", "--source", tmp_path / "data")
    assert np.array_equal(train.array[3], resized(encoded(TRAIN[3], "PNG", (64, 64)), 32, Image.Resampling.BOX))
    (tmp_path / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 nothing PAR1")
    code, _, error = run(capsys, "prepare", "imagenet1k-64-parquet", "--incomplete", "--source", tmp_path, "--out", tmp_path / "c")
    assert code == 1 and "not a whole parquet file" in error and error.count("\n") <= 1


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_tree(tmp_path, {"train-0.parquet": b"x", "test-0.parquet": b"x"})
    code, _, error = run(capsys, "prepare", "six", "--size", 32, "--source", tmp_path, "--out", tmp_path / "set")
    assert code == 1 and error.strip() == "data.py: error: parquet files need pyarrow: pip install pyarrow"


# ---- hostile

class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_a_pickle_is_refused_and_not_run(protocol, tmp_path, capsys):
    harm = tmp_path / "harm"
    files = pickled_cifar(2)
    content = {"data": np.zeros((1, 3072), np.uint8), "labels": Harmful(str(harm))}
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps(content, protocol)
    source = write_tree(tmp_path / "source", files)
    code, _, error = run(capsys, "prepare", "cifar10", "--incomplete", "--source", source, "--out", tmp_path / "set")
    assert code == 1 and "a pickle that would run posix.mkdir: refused" in error.replace("nt.", "posix.")
    assert not harm.exists() and not (tmp_path / "set").exists()


def test_objects_in_an_npz_are_refused_and_not_run(tmp_path, capsys):
    harm = tmp_path / "harm"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train_data_batch_1", "val_data"):
        np.savez(source / f"{name}.npz", data=np.array([Harmful(str(harm))], dtype=object), labels=[1])
    code, _, error = run(capsys, "prepare", "imagenet32-chrabaszcz", "--incomplete", "--source", source, "--out", tmp_path / "set")
    assert code == 1 and "its data is object of shape (1,): must be uint8" in error and not harm.exists()


def member(name, content=b"", **settings):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in settings.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse_member(name, size):
    """A member of a few bytes that says to be one of `size`, nearly all of it holes."""
    header = bytearray(member(name, type=tarfile.GNUTYPE_SPARSE)[:512])
    header[124:136] = b"%011o\0" % 512
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


GOOD = b"".join(member(name, content) for name, content in own_files().items())
END = bytes(1024)
HOSTILE_TARS = {
    "points outside": GOOD + member("train/../../evil.png", b"x") + END, "points outside: it": member("/evil.png", b"x") + GOOD + END,
    "holds a link": GOOD + member("train/l.png", type=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
    "holds a link, train/h.png": GOOD + member("train/h.png", type=tarfile.LNKTYPE, linkname="train/a/0.png") + END,
    "holds a sparse file": GOOD + sparse_member("train/s.png", 2 ** 32) + END,
    "holds a device": GOOD + member("train/d.png", type=tarfile.CHRTYPE) + END,
    "holds a device, train/f.png": GOOD + member("train/f.png", type=tarfile.FIFOTYPE) + END,
    "declares 4,611,686,018,427,387,904 bytes": GOOD + member("train/s.png", size=2 ** 62) + END,
    "a second file of the name train/a/0.png": GOOD + member("train/a/0.png", encoded(TRAIN[5])) + END,
    "damaged or cut off at byte": altered(GOOD + member("train/z.png", encoded(TRAIN[5])) + END, len(GOOD) + 3),
    "damaged or cut off": GOOD, "goes on after its end": GOOD + END + GOOD + END,
    "more than there are": GOOD + member("train/z.png", encoded(TRAIN[5]))[:700],
    "one level is read": GOOD + member("train/t.tar", member("u.tar", member("v.png", b"x") + END) + END) + END}


@pytest.mark.parametrize("reason", HOSTILE_TARS)
@pytest.mark.parametrize("pack", ["tar", "tar.gz"])
def test_hostile_tars_are_refused(reason, pack, tmp_path, capsys):
    path = tmp_path / f"photos.{pack}"
    path.write_bytes(HOSTILE_TARS[reason] if pack == "tar" else gzip.compress(HOSTILE_TARS[reason]))
    code, told, error = run(capsys, "prepare", "photos", "--size", 32, "--source", path, "--out", tmp_path / "set")
    assert code == 1 and reason in error and error.count("\n") <= 1 and str(path) in error
    assert list(tmp_path.iterdir()) == [path]


def test_damage_that_decodes_is_found_by_checksums(tmp_path, capsys):
    """Pixels that lie in a file as they are: only its checksum tells that one was altered."""
    png, refused = encoded(TRAIN[0]), 0
    for place in range(len(png) - 200, len(png)):  # Pillow stops reading where the last row is full
        try:
            assert np.array_equal(decode(altered(png, place), 32)[0], TRAIN[0]), place
        except BadImage:
            refused += 1
    assert refused > 150
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in own_files():
            archive.writestr(name.replace("png", "bmp"), encoded(TRAIN[0], "BMP"))
    path.write_bytes(altered(path.read_bytes(), 1000))
    code, _, error = run(capsys, "prepare", "photos", "--size", 32, "--source", path, "--out", tmp_path / "set")
    assert code == 1 and "its checksum in the zip differs" in error


def test_encrypted_zips_are_refused(tmp_path, capsys):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/a.png", encoded(TRAIN[0]))
    content = path.read_bytes()
    path.write_bytes(altered(content, content.rindex(b"PK\1\2") + 8))
    code, _, error = run(capsys, "prepare", "photos", "--size", 32, "--source", path, "--out", tmp_path / "set")
    assert code == 1 and "train/a.png is encrypted" in error


@pytest.mark.parametrize("start", [0, 3, 512, 700, 701, 1099])
def test_batches_go_on_from_any_image(start):
    rows = np.random.default_rng(0).integers(0, 256, (1100, 1 + 12), dtype=np.uint8)
    batches = Batches({"train": [(rows[:700, 1:], rows[:700, 0]), (rows[700:, 1:], rows[700:, 0])]})
    done = [take_images(piece, 2, None, False) for piece in batches.pieces("train", start)]
    wanted = rows[start:, 1:].reshape(-1, 3, 2, 2).transpose(0, 2, 3, 1)
    assert b"".join(pixels for pixels, *_ in done) == wanted.tobytes()
    assert [label for _, labels, *_ in done for label in labels] == rows[start:, 0].tolist()


def test_bombs_are_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a.png", bytes(3 * 2 ** 23))
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(member("train/a.png", size=2 ** 27)) + 128 * gzip.compress(bytes(2 ** 20)))
    for name, reason in (("bomb.zip", "declares 25,165,824 bytes in"), ("bomb.tar.gz", "unpacks to more than")):
        code, _, error = run(capsys, "prepare", "photos", "--size", 32, "--source", tmp_path / name, "--out", tmp_path / "set")
        assert code == 1 and reason in error and not (tmp_path / "set").exists()


def test_pipes_loops_and_broken_links_in_folders_are_refused(tmp_path, capsys):
    for number, (make, reason) in enumerate([(os.mkfifo, "neither a file nor a folder"),
                                             (lambda path: os.symlink("..", path), "a link to a folder that holds it"),
                                             (lambda path: os.symlink("nowhere", path), "No such file")]):
        folder = write_tree(tmp_path / str(number), own_files())
        make(folder / "train" / "x.png")
        code, _, error = run(capsys, "prepare", "photos", "--size", 32, "--source", folder, "--out", tmp_path / "set")
        assert code == 1 and reason in error and "x.png" in error
