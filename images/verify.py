"""Every file of a prepared folder beside its manifest: which image of which split was altered."""
import hashlib

import numpy as np

from harness.errors import DataError
from images.folder import (
    HEADER_BYTES, NUMBERS, hash_images, npy_header, open_array, read_manifest)
from images.prepare import progress
from images.sets import FINGERPRINTS, SPLITS, fingerprint


def verify(folder, tell=print):
    """Raises DataError that says what differs."""
    manifest, problems = read_manifest(folder), []
    for split in SPLITS:
        expected, known = manifest["fingerprints"][split], ""
        official = FINGERPRINTS.get((manifest["name"], split))
        if official == expected:
            known = " (the known one)"
        elif official:
            problems.append(f"{split}: the fingerprint is not that of {manifest['name']}")
        if "seal" in manifest:
            shape = (manifest["counts"][split], *manifest["shape"])
            problems += _problems(folder, split, shape, expected, manifest["checksums"])
        else:  # written by hand: name, variant and fingerprints alone
            array = open_array(folder / f"{split}.npy")
            shape = array.shape
            if fingerprint(array) != expected:
                problems.append(f"{split}.npy does not have its fingerprint")
        if not problems:
            tell(f"{split}: {shape[0]:,} images of {shape[1]}x{shape[2]}, fingerprint "
                 f"{expected}{known}")
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}: prepare the set again")
    tell(f"{folder}: {manifest['name']}, variant {manifest['variant']}: every byte is as it was "
         "prepared")


def _problems(folder, split, shape, expected, sealed):
    """What is wrong with a split, in words. sealed: {file name: SHA-256} of the numbers."""
    files = {f"{split}.npy": (shape, "|u1")}
    for kind, dtype in NUMBERS.items():
        if f"{split}_{kind}.npy" in sealed:
            files[f"{split}_{kind}.npy"] = (shape[:1], dtype)
    problems, numbers = [], {}
    for name, (lengths, dtype) in files.items():
        path, size = folder / name, int(np.prod(lengths)) * np.dtype(dtype).itemsize + HEADER_BYTES
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes" if path.exists() else "is missing"
            return [f"{name} {found}: it had {size:,} bytes"]
        with open(path, "rb") as file:
            if file.read(HEADER_BYTES) != npy_header(lengths, dtype):
                problems.append(f"{name}: its header was altered (before image 0)")
        if name in sealed:
            content = path.read_bytes()
            numbers[name] = np.frombuffer(content, dtype, offset=HEADER_BYTES)
            if hashlib.sha256(content).hexdigest() != sealed[name]:
                problems.append(f"{name} was altered")
    found, _, checksums = hash_images(
        folder / f"{split}.npy", shape, numbers.get(f"{split}_labels.npy"),
        progress(desc=f"verify {split}", total=shape[0]))
    differ = np.flatnonzero(numbers[f"{split}_checksums.npy"] != checksums)
    what = "labels or checksums" if found == expected else "the pixels"
    if len(differ):
        images = ", ".join(map(str, differ[:5])) + (", ..." if len(differ) > 5 else "")
        problems.append(f"{split}: {what} of image {images} ({len(differ):,} in all) were altered")
    elif found != expected:
        problems.append(f"{split}: the fingerprint in the manifest is another")
    return problems
