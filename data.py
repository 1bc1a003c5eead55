"""Image sets as uint8 arrays (N, H, W, C), their fingerprints, dequantization and batches.

    images = load_images("cifar10-subset", "test")  # embedded in assets/: needs nothing
    images = load_images("cifar10", "train", root)  # root (or JET_DATA) holds the sets
    images = load_images("photos.npy", "test")      # any uint8 (N, H, W, C) array
    images = load_images("sets/photos", "test")     # a folder made by `python data.py prepare`

A bits-per-dimension number means something only beside the set that it was measured on, so every
set carries a name, a variant and a fingerprint, and SETS knows the sets of the paper by shape and
counts. `python data.py list` tells which are here; images/ makes them from what is published.
"""
from __future__ import annotations  # types of torch are named before it is imported

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from harness.condition import NO_LABEL
from harness.errors import DataError
from harness.in_order import in_order
from images.folder import map_array, read_manifest
from images.sets import (  # noqa: F401 (some are only part of this module's interface)
    CIFAR10_CLASSES, CIFAR10_FILES, CIFAR10_FOLDER, CIFAR10_PARTS, FINGERPRINTS, MANIFEST, PARTIAL,
    SETS, SPLITS, KnownSet, find_set, fingerprint, sets_root)

if TYPE_CHECKING:
    import torch

VERIFY_BYTES = 2 ** 30  # sets up to this size are hashed whenever they are opened: seconds
RESIDENT_BYTES = 4 * 2 ** 30  # training sets up to this size are copied to the GPU
ASSETS = Path(__file__).resolve().parent / "assets"
SUBSET_FILE = ASSETS / "cifar10_subset.npz"
CIFAR10_BATCH, CIFAR10_RECORD = 10_000, 1 + 3 * 32 ** 2  # records of an official file; their bytes


def __getattr__(name: str) -> Any:
    """jet's dequantize and quantize are part of this module, too: torch, which takes seconds to
    import, is imported when they are asked for, and in the functions that need it."""
    if name not in ("dequantize", "quantize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import jet
    return getattr(jet, name)


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
    def fingerprint(self) -> str:
        """Hex SHA-256 of the line "N,H,W,C" and the pixels."""
        return self.known_fingerprint or fingerprint(self.array)

    def first(self, n: int | None) -> ImageSet:
        """Its first n images (None: all)."""
        if n in (None, len(self.array)):
            return self
        labels = None if self.labels is None else self.labels[:n]
        return dataclasses.replace(self, array=self.array[:n], labels=labels,
                                   known_fingerprint=None)


def data_id(name_or_path: str | Path) -> str:
    """Which images a run sees: name and variant ("cifar10/cifar10"), or both splits' fingerprints.

    Raises DataError for a path that holds no images.
    """
    if name_or_path in SETS:
        return f"{name_or_path}/{SETS[name_or_path].variant}"
    prints = [load_images(name_or_path, split).fingerprint[:16] for split in SPLITS]
    return "-".join(dict.fromkeys(prints))


def image_shape(name_or_path: str | Path, root: str | Path | None = None) -> tuple[int, ...]:
    """(H, W, C) of a set; for the sets in SETS the images need not be there."""
    if name_or_path in SETS:
        return SETS[name_or_path].shape
    return load_images(name_or_path, "train", root).array.shape[1:]


def load_images(name_or_path: str | Path, split: str, root: str | Path | None = None) -> ImageSet:
    """One split ("train" or "test") of a set in SETS, of a prepared folder, or a .npy file.

    A prepared folder holds train.npy, test.npy and manifest.json. A bare .npy serves whichever
    split is asked for. root, else $JET_DATA, is where named sets are looked up.
    Returns an ImageSet. Raises DataError (a ValueError) in one line for whatever is wrong.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r}: must be train or test (ImageNet's validation images are "
                        "test)")
    name = str(name_or_path)
    whole, _, part = name.rpartition("-")
    if part in CIFAR10_PARTS and name in SETS:
        return _load_part(load_images(whole, split, root), part)
    if name == "cifar10-search":
        return _load_search(load_images("cifar10", "train", root), split)
    if name == "cifar10-subset":
        return _load_subset(split)
    if name in SETS:
        folder = _find(name, root)
        is_prepared = any((folder / mark).exists() for mark in (MANIFEST, PARTIAL))
        if name == "cifar10" and not is_prepared:
            return _load_cifar10(folder, split)
        return _load_folder(folder, split, name)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _load_folder(path, split)
    if path.suffix == ".npy":
        return ImageSet(array=_open_array(path), labels=None, name=name, variant="unknown",
                        split=split)
    near = difflib.get_close_matches(name, SETS, 3, 0.5) or list(SETS)[:3]
    raise DataError(f"data {name!r}: neither a known set (like {', '.join(near)}), nor a folder, "
                    "nor a .npy file that exists")


def _find(name, root):
    root, folder = sets_root(root), find_set(name, root)
    if folder is not None:
        return folder
    need, source = f"{name} ({SETS[name].source}) is needed as the folder {name}", "--source PATH "
    if name == "cifar10":
        need, source = f"{need} or {CIFAR10_FOLDER}", ""
    make = f"`python data.py prepare {name} {source}--out {root or 'DIR'}/{name}` makes it"
    if root is None:
        raise DataError(f"{need}: give the folder that holds it by --data-root or JET_DATA; {make}")
    raise DataError(f"{need} in {root}, and is not there: {make}, or change --data-root or "
                    "JET_DATA")


def _load_subset(split):
    array, labels = _read_subset(SUBSET_FILE, split)
    return ImageSet(array=array.copy(), labels=labels.copy(), name="cifar10-subset",
                    variant="cifar10-subset", split=split,
                    known_fingerprint=FINGERPRINTS["cifar10-subset", split])


@functools.cache
def _read_subset(path, split):
    if not path.is_file():
        raise DataError(f"{path} is missing: restore it (git checkout assets)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise DataError(f"{path} is damaged ({type(error).__name__}): restore it (git checkout "
                        "assets)") from None
    if fingerprint(array) != FINGERPRINTS["cifar10-subset", split]:
        raise DataError(f"{path}: the {split} images were altered: git checkout assets")
    return array, labels


def _load_cifar10(folder, split):
    """The official binary layout: records of a label, then 1024 red, green and blue values each."""
    records = []
    for file, sha256 in CIFAR10_FILES[split].items():
        path = folder / file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cifar10: {path}: {error.strerror}: unpack the archive "
                            "again") from None
        if len(content) != CIFAR10_BATCH * CIFAR10_RECORD:
            raise DataError(f"cifar10: {path} has {len(content):,} bytes instead of "
                            f"{CIFAR10_BATCH * CIFAR10_RECORD:,} (truncated?): unpack the archive "
                            "again")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"cifar10: {path} is altered (its SHA-256 is not the official file's): "
                            "unpack the archive again")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD))
    table = np.concatenate(records)
    array = np.ascontiguousarray(table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageSet(array=array, labels=table[:, 0].astype(np.int64), name="cifar10",
                    variant="cifar10", split=split,
                    known_fingerprint=FINGERPRINTS["cifar10", split])


def _load_part(images, part):
    """The images of CIFAR-10 or its subset that belong to some of the classes, in their order."""
    name = f"{images.name}-{part}"
    if images.labels is None:
        raise DataError(f"{name}: the {images.name} at hand has no labels: prepare it by `python "
                        "data.py prepare`")
    classes = [CIFAR10_CLASSES.index(label) for label in CIFAR10_PARTS[part]]
    kept = np.isin(images.labels, classes)
    return ImageSet(array=images.array[kept], labels=images.labels[kept], name=name, variant=name,
                    split=images.split, known_fingerprint=FINGERPRINTS[name, images.split])


def _load_search(images, split):
    """The training images of CIFAR-10 cut in two, in their order: a test set for choosing settings,
    so that the real one is not used up.
    """
    name, train = "cifar10-search", SETS["cifar10-search"].counts["train"]
    kept = slice(train) if split == "train" else slice(train, None)
    labels = None if images.labels is None else images.labels[kept]
    return ImageSet(array=images.array[kept], labels=labels, name=name, variant=name, split=split,
                    known_fingerprint=FINGERPRINTS[name, split])


def _load_folder(folder, split, name=None):
    """A prepared set. Where name is given it must be that set, with its shape and counts."""
    manifest = read_manifest(folder)
    recorded, path = manifest["fingerprints"][split], folder / f"{split}.npy"
    array, labels = _open_array(path), None
    if array.nbytes <= VERIFY_BYTES and fingerprint(array) != recorded:
        raise DataError(f"{path} does not have the fingerprint of its manifest: it was altered, or "
                        "the manifest is of another set")
    if name and manifest["name"] != name:
        raise DataError(f"{folder} holds {manifest['name']} (by its manifest), not {name}")
    if name:
        known, shape = SETS[name], SETS[name].shape
        if array.shape[1:] != shape or known.counts[split] not in (None, len(array)):
            raise DataError(f"{path} has shape {array.shape}: {name} {split} is "
                            f"({known.counts[split]}, {', '.join(map(str, shape))})")
    if f"{split}_labels.npy" in manifest.get("checksums", {}):
        labels = _open_labels(folder / f"{split}_labels.npy", len(array))
    return ImageSet(array=array, labels=labels, name=manifest["name"], variant=manifest["variant"],
                    split=split, known_fingerprint=recorded)


def _open_array(path):
    """The images of a .npy file, mapped into memory: uint8 (N, H, W, C). Raises DataError."""
    array = _map(path)
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.dtype != np.uint8 or array.ndim != 4 or not array.size:
        kind = f"{array.dtype} array of shape {array.shape}" if is_array else "not one array"
        raise DataError(f"data {str(path)!r}: {kind}: must be uint8 (N, H, W, C) and not empty")
    if array.shape[1] in (1, 3) and array.shape[3] > 4:
        raise DataError(f"data {str(path)!r}: shape {array.shape}: channels come last, "
                        "(N, H, W, C): save array.transpose(0, 2, 3, 1)")
    return array


def _open_labels(path, count):
    """The labels of a prepared folder: int64 (N,). Raises DataError."""
    labels = _map(path)
    is_array = isinstance(labels, np.ndarray)
    if not is_array or labels.dtype != np.int64 or labels.shape != (count,):
        kind = f"{labels.dtype} {labels.shape}" if is_array else "not one array"
        raise DataError(f"{path}: {kind}: must be int64 ({count},): prepare the set again")
    return np.array(labels)


def _map(path):
    try:
        return map_array(path)
    except FileNotFoundError:
        raise DataError(f"data {str(path)!r}: no such file") from None
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise DataError(f"data {str(path)!r}: not a readable .npy file ({type(error).__name__}: "
                        f"{' '.join(str(error).split())})") from None


# Every random draw has a key of its own, so that no draw depends on what was drawn before it: a
# restart, another batch size or other processes see the same images and the same noise.
_ORDER, _NOISE, _EVALUATION, _CONDITION, _SHUFFLE = range(5)


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, if not larger than the set
def _epoch_order(num_images, seed, epoch):
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(num_images)


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Image indices (batch_size,) of the global batch of a step.

    Batches cut the endless row of shuffled epochs into equal pieces: every image is seen once in
    every epoch, whatever the batch size.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // num_images
    return np.concatenate([
        _epoch_order(num_images, seed, int(epoch))[position[epochs == epoch] % num_images]
        for epoch in np.unique(epochs)])


def training_batch(images: ImageSet, batch_size: int, seed: int, step: int,
                   device: str | torch.device = "cpu") -> torch.Tensor:
    """The dequantized global batch of a step: float32 (B, C, H, W) on the device.

    The noise is drawn on the device: equal for equal (seed, step) on the same kind of device.
    """
    return next(training_batches(images, batch_size, seed, [step], device, "array"))


def training_batches(
        images: ImageSet, batch_size: int, seed: int, steps: Iterable[int],
        device: str | torch.device = "cpu", source: str | None = None,
        part: slice = slice(None)) -> Generator[torch.Tensor, None, None]:
    """Yield training_batch of each of the steps, or a part (slice) of it.

    On a GPU, steps do not wait for the images. source: what batches are gathered from. "array": the
    set's array; "device": a copy on the device; "stream": the array, by a thread that works ahead.
    None: array on a CPU, else device where the set fits, else stream.
    """
    import torch

    from harness.machine import free_bytes
    from jet import dequantize
    device, array = torch.device(device), images.array
    if source is None and device.type == "cpu":
        source = "array"
    if source is None:
        fits = array.nbytes <= min(RESIDENT_BYTES, free_bytes(device) / 8)
        source = "device" if fits else "stream"
    resident = torch.tensor(array, device=device) if source == "device" else None

    def gather(step):
        indices = batch_indices(len(array), batch_size, seed, step)[part]
        return pinned(indices if source == "device" else gather_rows(array, indices), device)

    ahead = 4 if source == "stream" else 0
    with contextlib.closing(prefetch(gather, steps, ahead)) as batches:
        for step, batch in zip(steps, batches):
            batch = batch.to(device, non_blocking=True)
            pixels = batch if resident is None else resident.index_select(0, batch)  # (B, H, W, C)
            key = np.random.SeedSequence([seed, _NOISE, step]).generate_state(1, np.uint64)
            generator = torch.Generator(device).manual_seed(int(key[0]))
            shape = batch_size, *pixels.shape[1:]  # of all the batch, whatever the part
            noise = torch.rand(shape, generator=generator, device=device)[part]
            yield dequantize(pixels, noise).permute(0, 3, 1, 2)


def told(images: ImageSet, condition: str, seed: int) -> ImageSet:
    """An ImageSet with the labels that a condition (of TrainConfig) tells; "labels": its own."""
    labels = images.labels
    if condition == "shuffled" and labels is not None:
        labels = np.random.default_rng([seed, _SHUFFLE]).permutation(labels)
    elif condition == "dropped":
        labels = np.full(len(images.array), NO_LABEL)
    return dataclasses.replace(images, labels=labels)


def training_labels(images: ImageSet, batch_size: int, seed: int, step: int,
                    drop_prob: float = 0.0) -> np.ndarray:
    """The labels (batch_size,) of a step's global batch; all are dropped in a share of the steps.

    Source: big_vision, condition_drop_prob of the trainer (its batch's context times 0).
    """
    labels = np.asarray(images.labels)[batch_indices(len(images.array), batch_size, seed, step)]
    is_dropped = np.random.default_rng([seed, _CONDITION, step]).random() < drop_prob
    return np.full(len(labels), NO_LABEL) if is_dropped else labels


def gather_rows(array: np.ndarray, indices: np.ndarray) -> torch.Tensor:
    """array[indices] as a tensor (B, H, W, C), copied by as many threads as torch has."""
    import torch
    if not (isinstance(array, np.ndarray) and array.flags.c_contiguous):
        return torch.from_numpy(array[indices])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map cannot be written to, and is not
        whole = torch.from_numpy(np.asarray(array))
    return whole.index_select(0, torch.from_numpy(indices))


def prefetch(function: Callable, items: Iterable, ahead: int) -> Generator:
    """Yield function(item) of each item in order, computed by a thread up to `ahead` items ahead.

    0: no thread. Raises what the function raised; the thread ends when the generator is closed.
    """
    if not ahead:
        yield from map(function, items)
        return
    thread = ThreadPoolExecutor(1)
    try:
        yield from in_order((thread.submit(function, item) for item in items), ahead)
    finally:
        thread.shutdown(cancel_futures=True)


def pinned(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The array as a CPU tensor; for a GPU in pinned memory, from where a copy need not wait."""
    import torch
    tensor = torch.as_tensor(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def evaluation_noise(indices: Iterable[int], shape: Sequence[int], seed: int,
                     draw: int) -> torch.Tensor:
    """Uniform noise (len(indices), *shape), float32, from the CPU: keyed by (seed, draw, image)."""
    import torch
    return torch.from_numpy(np.stack([
        np.random.default_rng([seed, _EVALUATION, draw, int(index)]).random(shape, dtype=np.float32)
        for index in indices]))


def main(arguments: Sequence[str] | None = None) -> None:
    """python data.py prepare | verify | show | list"""
    from images import command  # Pillow is needed for these alone
    command.main(load_images, arguments)


if __name__ == "__main__":
    main()
