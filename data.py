"""Image sets as uint8 arrays (N, H, W, C), their fingerprints, dequantization and batches.

    images = load_images("cifar10-subset", "test")      # embedded in assets/: needs nothing
    images = load_images("cifar10", "train", root)      # root (or JET_DATA) holds the sets
    images = load_images("photos.npy", "test")          # any uint8 (N, H, W, C) array
    images = load_images("sets/photos", "test")         # a folder that `python data.py prepare` has made

A bits-per-dimension number means something only beside the set that it was measured on, so every set
carries a name, a variant and a fingerprint, and SETS knows the sets of the paper by shape and counts.
`python data.py list` tells which are here; prepare.py and sources.py make them from what is published.
"""
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

SPLITS = ("train", "test")  # the validation images of ImageNet are "test", too
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_PARTS = {"animals": "bird cat deer dog frog horse".split(),
                 "vehicles": "airplane automobile ship truck".split()}  # sets of their own: cifar10-animals, ...
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_FILES = {
    "train": {
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
    "test": {
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
}
VERIFY_BYTES = 2 ** 30  # sets up to this size are hashed whenever they are opened: seconds
RESIDENT_BYTES = 4 * 2 ** 30  # training sets up to this size are copied to the GPU
ASSETS = Path(__file__).resolve().parent / "assets"
SUBSET_FILE = ASSETS / "cifar10_subset.npz"


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """What is known of a set before its images are there."""
    variant: str  # which images these are: numbers of two variants are never comparable
    shape: tuple[int, int, int]  # (H, W, C)
    counts: dict  # images per split; None where the preparation decides
    source: str  # where it comes from


def _known_sets():
    subset = "the first images of CIFAR-10 in official order, classes balanced; in assets/"
    sets = {
        "cifar10-subset": KnownSet("cifar10-subset", (32, 32, 3), {"train": 2048, "test": 512}, subset),
        "cifar10": KnownSet("cifar10", (32, 32, 3), {"train": 50_000, "test": 10_000},
                            "cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html"),
    }
    for name, num_train, num_test in (("cifar10-animals", 30_000, 6_000), ("cifar10-vehicles", 20_000, 4_000),
                                      ("cifar10-subset-animals", 1_230, 306), ("cifar10-subset-vehicles", 818, 206)):
        whole, _, part = name.rpartition("-")
        sets[name] = KnownSet(name, (32, 32, 3), {"train": num_train, "test": num_test},
                              f"the images of {whole} that show {', '.join(CIFAR10_PARTS[part])}")
    oord = {"train": 1_281_149, "test": 49_999}
    full = {"train": 1_281_167, "test": 50_000}
    split_by_us = {"train": None, "test": None}  # 13 to 14 million images, held-out split of one's own
    for size in (32, 64):
        variants = {
            "imagenet{}-oord": (oord, f"train_{size}x{size}.tar and valid_{size}x{size}.tar "
                                      f"(van den Oord et al. 2016{'; a torrent' if size == 64 else ''})"),
            "imagenet{}-chrabaszcz": (full, f"Imagenet{size}_train*.zip and Imagenet{size}_val.zip, pickles or npz "
                                            "(Chrabaszcz et al. 2017; image-net.org)"),
            "imagenet1k-{}-parquet": (full, f"parquet files of {size}-pixel images (Hugging Face)"),
        }
        for method in ("box", "lanczos", "bicubic"):
            variants[f"imagenet1k-{{}}-{method}"] = (full, "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar or folders "
                                                           f"train and val (image-net.org), {method} filter")
            variants[f"imagenet21k-{{}}-{method}"] = (
                split_by_us, f"class tars or folders of the winter release (image-net.org), {method} filter")
        for name, (counts, source) in variants.items():
            variant = name.split("-")[-1]
            sets[name.format(size)] = KnownSet(variant, (size, size, 3), counts, source)
    return sets


SETS = _known_sets()
FINGERPRINTS = {  # of the sets that cannot differ from one machine to the next
    ("cifar10-subset", "train"):
        "50bf9f4dc953d9140fc8a0cc264cadfa7afcea6edb2f8fc66c6fee485c391a58",
    ("cifar10-subset", "test"):
        "9992641856ef710529d5e2429fb69a7f2106affe7dfc2d61f0ea34155668d0c7",
    ("cifar10", "train"):
        "7db256e89ed2d55f5f1c113beaf9a21a1e4c28f3f4fd374a35dc4301727cca4b",
    ("cifar10", "test"):
        "b90bf5fc55d5e0a76f1358afc9511ceb962591ae8418653bb5e5d103f36d4a46",
    ("cifar10-animals", "train"):
        "5ca1146327d53c7224f1886b866e6acad1ba0665e6730d3d02e6dbb9c6614e29",
    ("cifar10-animals", "test"):
        "ecb9f1ced606d71162f09fe2eda52536b120b4096d14cda9da0e03321f6502b0",
    ("cifar10-vehicles", "train"):
        "6af15a9318eda1200f4a0c68c68cae6740fa1c38ffcbd274f56831892cf2b0f3",
    ("cifar10-vehicles", "test"):
        "963f1076e4315658fa3fc265431f061cf8710e4f9ac133d1b72eb9c3d1161071",
    ("cifar10-subset-animals", "train"):
        "d9eabb9dbbabe1545348c0a06ba6a1b8f679a9e3f5ae7766854ee7843ed04bf0",
    ("cifar10-subset-animals", "test"):
        "ae64523835b5e9bcb577dba0b5a93727f6005c0bc0d6a7559af8e611494ee374",
    ("cifar10-subset-vehicles", "train"):
        "bc10c634ba6ba5eb9c11219d9860386d5a0884977ec6c120d9eb2c8fd0277e7d",
    ("cifar10-subset-vehicles", "test"):
        "0c59ff65e66249b3bb8b09d79a3fad74dc0e426d315b8a71f2f19cd793285ba8",
}


class DataError(ValueError):
    """An image set that is missing, damaged or not what was asked for, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One split of an image set."""
    array: np.ndarray  # (N, H, W, C) uint8, in memory or memory-mapped
    labels: np.ndarray | None  # (N,) or None
    name: str
    variant: str
    split: str
    known_fingerprint: str | None = None  # where it was verified or recorded when the set was made

    @functools.cached_property
    def fingerprint(self):
        """Hex SHA-256 of the line "N,H,W,C" and the pixels."""
        return self.known_fingerprint or fingerprint(self.array)


def fingerprint(array):
    """Hex SHA-256 of the ASCII line "N,H,W,C\\n" followed by the uint8 pixels in C order."""
    digest = hashlib.sha256(",".join(map(str, array.shape)).encode() + b"\n")
    for start in range(0, len(array), 4096):
        digest.update(np.ascontiguousarray(array[start:start + 4096]))
    return digest.hexdigest()


def image_shape(name_or_path, root=None):
    """(H, W, C) of a set; for the sets in SETS the images need not be there."""
    if name_or_path in SETS:
        return SETS[name_or_path].shape
    return load_images(name_or_path, "train", root).array.shape[1:]


def load_images(name_or_path, split, root=None):
    """One split ("train" or "test") of a set in SETS, of a prepared folder, or a .npy file.

    A prepared folder holds train.npy, test.npy and manifest.json. A bare .npy serves whichever split
    is asked for. root, else the environment variable JET_DATA, is where named sets are looked up.
    Returns an ImageSet. Raises DataError (a ValueError) in one line for whatever is wrong.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r}: must be train or test (ImageNet's validation set is test)")
    name = str(name_or_path)
    whole, _, part = name.rpartition("-")
    if part in CIFAR10_PARTS and name in SETS:
        return _load_part(load_images(whole, split, root), part)
    if name == "cifar10-subset":
        return _load_subset(split)
    if name in SETS:
        folder = _find_set(name, root)
        binary = name == "cifar10" and not (folder / "manifest.json").exists()
        return _load_cifar10(folder, split) if binary else _load_folder(folder, split, name)
    path = Path(name)
    if path.is_dir():
        return _load_folder(path, split)
    if path.suffix == ".npy":
        array = _open_array(path)
        return ImageSet(array=array, labels=None, name=name, variant="unknown", split=split)
    near = difflib.get_close_matches(name, SETS, 3, 0.5) or list(SETS)[:3]
    raise DataError(f"data {name!r}: neither a known set (like {', '.join(near)}), nor a folder, nor a .npy file "
                    "that exists")


def _find_set(name, root):
    root = root or os.environ.get("JET_DATA")
    binary = (CIFAR10_FOLDER,) * (name == "cifar10")
    need = f"{name} ({SETS[name].source}) is needed as the folder {name}{' or '.join(('', *binary))}"
    make = f"`python data.py prepare {name} {'' if binary else '--source PATH '}--out {root or 'DIR'}/{name}` makes it"
    if not root:
        raise DataError(f"{need}: give the folder that holds it by --data-root or JET_DATA; {make}")
    for inner in (name, *binary):
        for folder in (Path(root) / inner, Path(root)):
            if folder.name == inner and folder.is_dir():
                return folder
    if _named(Path(root)) == name:
        return Path(root)
    raise DataError(f"{need} in {root}, and is not there: {make}, or change --data-root or JET_DATA")


def _named(folder):
    """The name in the manifest of a prepared folder, or None."""
    try:
        return json.loads((folder / "manifest.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_subset(split):
    if not SUBSET_FILE.is_file():
        raise DataError(f"{SUBSET_FILE} is missing: restore it (git checkout assets)")
    try:
        with np.load(SUBSET_FILE, allow_pickle=False) as arrays:
            array, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise DataError(f"{SUBSET_FILE} is damaged ({type(error).__name__}): restore it (git checkout "
                        "assets)") from None
    known = FINGERPRINTS["cifar10-subset", split]
    if fingerprint(array) != known:
        raise DataError(f"{SUBSET_FILE}: the {split} images were altered: git checkout assets")
    return ImageSet(array=array, labels=labels, name="cifar10-subset", variant="cifar10-subset",
                    split=split, known_fingerprint=known)


def _load_cifar10(folder, split):
    """The official binary layout: records of a label, then 1024 red, green and blue values each."""
    records = []
    for file, sha256 in CIFAR10_FILES[split].items():
        try:
            content = (folder / file).read_bytes()
        except OSError as error:
            raise DataError(f"cifar10: {folder / file}: {error.strerror}: unpack the archive again") from None
        if len(content) != 10_000 * 3073:
            raise DataError(f"cifar10: {folder / file} has {len(content):,} bytes instead of 30,730,000 "
                            "(truncated?): unpack the archive again")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"cifar10: {folder / file} is altered (its SHA-256 is not the official "
                            "file's): unpack the archive again")
        records.append(np.frombuffer(content, np.uint8).reshape(10_000, 3073))
    records = np.concatenate(records)
    array = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageSet(array=array, labels=records[:, 0].astype(np.int64), name="cifar10",
                    variant="cifar10", split=split, known_fingerprint=FINGERPRINTS["cifar10", split])


def _load_part(images, part):
    """The images of CIFAR-10 or its subset that belong to some of the classes, in their order."""
    name = f"{images.name}-{part}"
    if images.labels is None:
        raise DataError(f"{name}: the {images.name} at hand has no labels: prepare it by `python data.py prepare`")
    kept = np.isin(images.labels, [CIFAR10_CLASSES.index(label) for label in CIFAR10_PARTS[part]])
    return ImageSet(array=images.array[kept], labels=images.labels[kept], name=name, variant=name, split=images.split,
                    known_fingerprint=FINGERPRINTS[name, images.split])


def _load_folder(folder, split, name=None):
    """A prepared set. Where name is given it must be that set, with its shape and counts."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = str(manifest["name"])
        variant, recorded = str(manifest["variant"]), manifest["fingerprints"][split]
    except FileNotFoundError:
        begun = (folder / "partial").is_dir()
        raise DataError(f"{folder}: its preparation is not finished: give the same command again" if begun else
                        f"{folder}: no manifest.json; a set is a folder with train.npy, test.npy and "
                        "manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'manifest.json'} is no manifest with name, variant and fingerprints "
                        f"({type(error).__name__}: {error})") from None
    if not all(re.fullmatch("[0-9a-f]{64}", str(manifest["fingerprints"].get(key))) for key in SPLITS):
        raise DataError(f"{folder / 'manifest.json'}: fingerprints of train and test must be 64 hex digits each, as "
                        "data.fingerprint(array) gives them")
    if manifest["fingerprints"]["train"] == manifest["fingerprints"]["test"]:
        raise DataError(f"{folder}: by its manifest, train and test are the same images")
    array = _open_array(folder / f"{split}.npy")
    if array.nbytes <= VERIFY_BYTES and fingerprint(array) != recorded:
        raise DataError(f"{folder / split}.npy does not have the fingerprint of its manifest: it was altered, or the "
                        "manifest is of another set")
    if name:
        known = SETS[name]
        if found != name:
            raise DataError(f"{folder} holds {found} (by its manifest), not {name}")
        if array.shape[1:] != known.shape or known.counts[split] not in (None, len(array)):
            raise DataError(f"{folder / split}.npy has shape {array.shape}: {name} {split} is "
                            f"({known.counts[split]}, {', '.join(map(str, known.shape))})")
    labels = folder / f"{split}_labels.npy"
    if labels.name not in manifest.get("checksums", {}):
        labels = None
    else:
        labels = _load_labels(labels, len(array))
    return ImageSet(array=array, labels=labels, name=found, variant=variant, split=split, known_fingerprint=recorded)


def _load_labels(path, count):
    try:
        labels = np.load(path, allow_pickle=False)
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise DataError(f"{path}: not readable ({type(error).__name__}): prepare the set again") from None
    if labels.dtype != np.int64 or labels.shape != (count,):
        raise DataError(f"{path}: {labels.dtype} {labels.shape}: must be int64 ({count},): prepare the set again")
    return labels


def _open_array(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"data {str(path)!r}: no such file") from None
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise DataError(f"data {str(path)!r}: not a readable .npy file ({type(error).__name__}: "
                        f"{' '.join(str(error).split())})") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4 or not array.size:
        shape = getattr(array, "shape", "?")
        raise DataError(f"data {str(path)!r}: {getattr(array, 'dtype', '?')} array of shape {shape}: must "
                        "be uint8 (N, H, W, C) and not empty")
    return array


def dequantize(images_u8, noise_u):
    """x = -1 + u8/255*2 + noise/127.5, in [-1, 1 + 1/127.5): the 256 bins tile it exactly.

    images_u8: uint8, any shape; noise_u: floats of that shape in [0, 1). Returns a tensor of the
    noise's type. Source: value_range(-1, 1) and the evaluator's noise in big_vision, bit for bit.
    """
    noise_u = torch.as_tensor(noise_u)
    return torch.as_tensor(images_u8).to(noise_u.dtype) / 255 * 2 - 1 + noise_u / 127.5


def quantize(x):
    """floor((x + 1) * 127.5) clipped to 0..255 as uint8: undoes dequantize (float32: for noise in
    [1e-3, 1 - 1e-3]; nearer an edge it may round into the next bin).

    Raises ValueError when x is not finite, because no grey level stands for that.
    """
    x = torch.as_tensor(x)
    if not x.isfinite().all():
        raise ValueError(f"{(~x.isfinite()).sum()} of {x.numel()} values are not finite: "
                         "no image can be made of them")
    return ((x + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)


# Every random draw has a key of its own, so that no draw depends on what was drawn before it: a
# restart, another batch size or another number of processes sees the same images and the same noise.
_ORDER, _NOISE, _EVALUATION = range(3)


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, if not larger than the set
def _epoch_order(num_images, seed, epoch):
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(num_images)


def batch_indices(num_images, batch_size, seed, step):
    """Image indices (batch_size,) of the global batch of a step.

    Batches cut the endless row of shuffled epochs into equal pieces: every image is seen once in
    every epoch, whatever the batch size.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // num_images
    return np.concatenate([
        _epoch_order(num_images, seed, int(epoch))[position[epochs == epoch] % num_images]
        for epoch in np.unique(epochs)])


def training_batch(images, batch_size, seed, step, device="cpu"):
    """The dequantized global batch of a step: float32 (B, C, H, W) on the device.

    The noise is drawn on the device: equal for equal (seed, step) on the same kind of device.
    """
    return next(training_batches(images, batch_size, seed, [step], device, "array"))


def training_batches(images, batch_size, seed, steps, device="cpu", source=None, part=slice(None)):
    """Yield training_batch of each of the steps, or a part (slice) of it, with no wait for the images on a GPU.

    source: what batches are gathered from. "array": the set's array; "device": a copy on the device; "stream":
    the array, by a thread that works ahead. None: array on a CPU, else device where the set fits, else stream.
    """
    device, array = torch.device(device), images.array
    if source is None:
        fits = array.nbytes <= min(RESIDENT_BYTES, free_bytes(device) / 8)
        source = "array" if device.type == "cpu" else "device" if fits else "stream"
    resident = torch.tensor(array, device=device) if source == "device" else None

    def gather(step):
        indices = batch_indices(len(array), batch_size, seed, step)[part]
        return pinned(indices if source == "device" else pick(array, indices), device)

    with contextlib.closing(prefetch(gather, steps, ahead=4 if source == "stream" else 0)) as batches:
        for step, batch in zip(steps, batches):
            batch = batch.to(device, non_blocking=True)
            pixels = batch if resident is None else resident.index_select(0, batch)  # (B, H, W, C)
            key = np.random.SeedSequence([seed, _NOISE, step]).generate_state(1, np.uint64)
            generator = torch.Generator(device).manual_seed(int(key[0]))
            noise = torch.rand(batch_size, *pixels.shape[1:], generator=generator, device=device)  # all, whatever the part
            yield dequantize(pixels, noise[part]).permute(0, 3, 1, 2)


def pick(array, indices):
    """array[indices] as a tensor (B, H, W, C), copied from memory or from a map by as many threads as torch has."""
    if not (isinstance(array, np.ndarray) and array.flags.c_contiguous):
        return torch.from_numpy(array[indices])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map cannot be written to, and is not
        whole = torch.from_numpy(np.asarray(array))
    return whole.index_select(0, torch.from_numpy(indices))


def prefetch(function, items, ahead):
    """Yield function(item) of each item in order, computed by a thread that is up to `ahead` items ahead (0: no
    thread). Raises what the function raised; the thread ends when the generator is closed."""
    if not ahead:
        yield from map(function, items)
        return
    thread, pending = ThreadPoolExecutor(1), collections.deque()
    try:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def pinned(array, device):
    """The array as a CPU tensor; for a GPU in pinned memory, from where a copy need not wait."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def free_bytes(device, root=Path("/")):
    """Bytes of memory that this process can still take on a device; infinite where that cannot be told."""
    if device.type == "cuda":  # torch's own reserve is free, too
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    free = math.inf
    with contextlib.suppress(OSError, TypeError):  # no Linux
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())[1])
        group = root / "sys/fs/cgroup" / re.search("^0::/(.*)", (root / "proc/self/cgroup").read_text(), re.M)[1]
        for folder in (group, *group.parents):  # a limit holds for all groups inside
            with contextlib.suppress(OSError, ValueError):  # no limit here, or "max"
                limit = int((folder / "memory.max").read_text())
                used = int(re.search(r"^anon (\d+)", (folder / "memory.stat").read_text(), re.M)[1])
                free = min(free, limit - used)
    return free


def evaluation_noise(indices, shape, seed, draw):
    """Uniform noise (len(indices), *shape), float32, from the CPU: keyed by (seed, draw, image)."""
    return torch.from_numpy(np.stack([
        np.random.default_rng([seed, _EVALUATION, draw, int(index)]).random(shape, dtype=np.float32)
        for index in indices]))


if __name__ == "__main__":  # python data.py prepare | verify | show | list
    from prepare import main
    main()
