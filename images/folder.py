"""A prepared folder: arrays of images and of numbers, the manifest that seals them, and `verify`.

    train.npy, test.npy      uint8 (N, H, W, C)
    *_labels.npy             int64 (N,), where the source has numbers for labels
    *_checksums.npy          the first 8 bytes of the SHA-256 of each image (and its label)
    manifest.json            what the set is, and the SHA-256 of all that; written last
"""
import hashlib
import json
import math
import os
import re

import numpy as np

from harness.errors import DataError, printable
from harness.files import open_regular, read_json
from harness.progress import progress
from images.members import damage
from images.sets import FINGERPRINTS, MANIFEST, PARTIAL, SPLITS, fingerprint

NUMBERS = {"labels": "<i8", "checksums": "<u8"}  # files of one number an image
NUMBER_FILES = [f"{split}_{kind}.npy" for split in SPLITS for kind in NUMBERS]
HEADER_BYTES = 128
MAX_MANIFEST_BYTES = 2 ** 25


def _is_count(value):
    return type(value) is int and 0 <= value < 2 ** 48


def _are_counts(value, names):
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in names)


def _is_name(value):
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


_FIELDS = {  # of a manifest, and what is right there
    "name": _is_name, "variant": _is_name,
    "fingerprints": lambda value: isinstance(value, dict) and all(
        re.fullmatch("[0-9a-f]{64}", str(value.get(split))) for split in SPLITS),
    "shape": lambda value: isinstance(value, list) and len(value) == 3 and all(
        _is_count(side) and 0 < side < 2 ** 16 for side in value),
    "counts": lambda value: _are_counts(value, SPLITS),
    "images_in_both_splits": lambda value: _are_counts(value, ("different", *SPLITS)),
    "grey_in_three_channels": lambda value: _are_counts(value, SPLITS),
    "checksums": lambda value: isinstance(value, dict) and value.keys() <= set(NUMBER_FILES)
        and all(isinstance(sha256, str) for sha256 in value.values()),
    "sources": lambda value: isinstance(value, list) and all(
        isinstance(origin, dict) for origin in value),
    "flags": lambda value: isinstance(value, dict),
    "skipped": lambda value: isinstance(value, list),
}
_BY_HAND = ("name", "variant", "fingerprints")  # what one that is written by hand has
_RULES = {"fingerprints": "fingerprints of train and test must be 64 hex digits each, as "
                          "data.fingerprint(array) gives them"}
_OPTIONAL = ("flags", "grey_in_three_channels")  # what an older one does not have


def npy_header(shape, kind="|u1"):
    """The first 128 bytes of a .npy file of this shape, format version 1.0."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    length = (HEADER_BYTES - 10).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + text.ljust(HEADER_BYTES - 11).encode() + b"\n"


def hash_images(path, shape, labels, task):
    """(fingerprint, first 8 bytes of each image's SHA-256, the same with its label) of a split.

    The file is read, not mapped: a map counts as memory. task: what the progress bar says.
    """
    whole = hashlib.sha256(",".join(map(str, shape)).encode() + b"\n")
    pixels, checksums = np.empty(shape[0], "<u8"), np.empty(shape[0], "<u8")
    with open(path, "rb") as file, progress(range(shape[0]), task) as places:
        file.seek(HEADER_BYTES)
        for place in places:
            image = file.read(math.prod(shape[1:]))
            whole.update(image)
            digest = hashlib.sha256(image)
            pixels[place] = checksums[place] = int.from_bytes(digest.digest()[:8], "little")
            if labels is not None:
                digest.update(int(labels[place]).to_bytes(8, "little", signed=True))
                checksums[place] = int.from_bytes(digest.digest()[:8], "little")
    return whole.hexdigest(), pixels, checksums


def seal(manifest):
    """SHA-256 of a manifest without its seal, as JSON with sorted keys."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder):
    """The manifest of a folder: name, variant, fingerprints, and what else it was written with.

    One that is written by hand has no seal and may have nothing else. Raises DataError.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        reason = f"no {MANIFEST}; a set is a folder with train.npy, test.npy and {MANIFEST}"
        if (folder / PARTIAL).is_dir():
            reason = "its preparation is not finished: give the same command again"
        raise DataError(f"{folder}: {reason}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no manifest with name, variant and fingerprints "
                        f"({type(error).__name__}: {printable(error)})") from None
    if not isinstance(manifest, dict) or not set(_BY_HAND) <= manifest.keys():
        raise DataError(f"{path} is no manifest with name, variant and fingerprints")
    if "seal" in manifest and manifest["seal"] != seal(manifest):
        raise DataError(f"{path}: was altered (it no longer fits its seal): prepare the set again")
    for field, is_right in _FIELDS.items():
        is_needed = "seal" in manifest and field not in _OPTIONAL
        if (field in manifest or is_needed) and not is_right(manifest.get(field)):
            raise DataError(f"{path}: {_RULES.get(field, f'its {field} cannot be right')}: prepare "
                            "the set again")
    train, test = (manifest["fingerprints"][split] for split in SPLITS)
    if train == test:
        raise DataError(f"{folder}: by its manifest, train and test are the same images")
    return manifest


def map_array(path):
    """What a .npy file holds, mapped into memory. np.load raises nearly everything on others."""
    os.close(open_regular(path, os.O_RDONLY))
    return np.load(path, allow_pickle=False, mmap_mode="r")


def verify(folder):
    """Compare every file with the manifest; raises DataError that says which image was altered."""
    manifest, problems = read_manifest(folder), []
    for split in SPLITS:
        expected = manifest["fingerprints"][split]
        official = FINGERPRINTS.get((manifest["name"], split))
        if official not in (None, expected):
            problems.append(f"{split}: the fingerprint is not that of {manifest['name']}")
        if "seal" in manifest:
            shape = (manifest["counts"][split], *manifest["shape"])
            problems += _problems(folder, split, shape, expected, manifest["checksums"])
        else:  # written by hand: name, variant and fingerprints alone
            with damage(folder / f"{split}.npy", "array"):
                array = map_array(folder / f"{split}.npy")
            shape = array.shape
            if fingerprint(array) != expected:
                problems.append(f"{split}.npy does not have its fingerprint")
        if not problems:
            print(f"{split}: {shape[0]:,} images of {shape[1]}x{shape[2]}, fingerprint {expected}"
                  f"{' (the known one)' if official else ''}")
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}: prepare the set again")
    print(f"{folder}: {manifest['name']}, variant {manifest['variant']}: every byte is as it was "
          "prepared")


def _problems(folder, split, shape, expected, sealed):
    """What is wrong with a split, in words. sealed: {file name: SHA-256} of the numbers."""
    if f"{split}_checksums.npy" not in sealed:
        return [f"{split}_checksums.npy is not in the manifest"]
    problems, numbers = [], {}
    for kind, dtype in {"": "|u1", **NUMBERS}.items():
        name, lengths = (f"{split}_{kind}.npy", shape[:1]) if kind else (f"{split}.npy", shape)
        if kind and name not in sealed:
            continue
        path, size = folder / name, math.prod(lengths) * np.dtype(dtype).itemsize + HEADER_BYTES
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes" if path.exists() else "is missing"
            return [f"{name} {found}: it had {size:,} bytes"]
        with open(path, "rb") as file:
            header, content = file.read(HEADER_BYTES), file.read() if kind else b""
        if header != npy_header(lengths, dtype):
            problems.append(f"{name}: its header was altered (before image 0)")
        if kind and hashlib.sha256(header + content).hexdigest() != sealed[name]:
            problems.append(f"{name} was altered")
        numbers[kind] = np.frombuffer(content, dtype)
    found, _, checksums = hash_images(
        folder / f"{split}.npy", shape, numbers.get("labels"), f"verify {split}")
    differ = np.flatnonzero(numbers["checksums"] != checksums)
    what = "labels or checksums" if found == expected else "the pixels"
    if len(differ):
        images = ", ".join(map(str, differ[:5])) + (", ..." if len(differ) > 5 else "")
        problems.append(f"{split}: {what} of image {images} ({len(differ):,} in all) were altered")
    elif found != expected:
        problems.append(f"{split}: the fingerprint in the manifest is another")
    return problems
