"""What is known of each image set before its images are there, and where a named set lies."""
import csv
import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from harness.files import read_json

SPLITS = ("train", "test")  # the validation images of ImageNet are "test", too
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_PARTS = {  # sets of their own: cifar10-animals, ...
    "animals": "bird cat deer dog frog horse".split(),
    "vehicles": "airplane automobile ship truck".split(),
}
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CHECKSUMS = {name: sha256 for sha256, name in map(  # of archives and files, where known
    str.split, Path(__file__).with_name("sha256sums").read_text().splitlines())}
CIFAR10_FILES = {split: {name: CHECKSUMS[name] for name in CHECKSUMS if name.startswith(start)}
                 for split, start in (("train", "data_batch"), ("test", "test_batch"))}
OWN_SETS = Path(__file__).resolve().parents[1] / "sets"
MANIFEST, PARTIAL = "manifest.json", "partial"  # in a prepared folder; in one that is being made


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """What is known of a set before its images are there."""
    variant: str  # which images these are: numbers of two variants are never comparable
    shape: tuple[int, int, int]  # (H, W, C)
    counts: dict  # images per split; None where the preparation decides
    source: str  # where it comes from


_ROWS = list(csv.DictReader(Path(__file__).with_name("sets.csv").read_text().splitlines()))
SETS = {row["name"]: KnownSet(
    row["variant"], (int(row["pixels"]), int(row["pixels"]), 3),
    {split: int(row[split]) if row[split] else None for split in SPLITS}, row["source"])
    for row in _ROWS}
FINGERPRINTS = {  # of the sets that cannot differ from one machine to the next
    (row["name"], split): row[f"{split}_fingerprint"]
    for row in _ROWS for split in SPLITS if row[f"{split}_fingerprint"]}


def fingerprint(array: np.ndarray) -> str:
    """Hex SHA-256 of the ASCII line "N,H,W,C\\n" followed by the uint8 pixels in C order."""
    digest = hashlib.sha256(",".join(map(str, array.shape)).encode() + b"\n")
    for start in range(0, len(array), 4096):
        digest.update(np.ascontiguousarray(array[start:start + 4096]))
    return digest.hexdigest()


def sets_root(root=None):
    """The folder that holds the sets: root, else the environment variable JET_DATA, else the
    checkout's own sets/, where there is one; else None. A ~ is the home folder.
    """
    root = root or os.environ.get("JET_DATA") or (OWN_SETS if OWN_SETS.is_dir() else None)
    return Path(os.path.expanduser(root)) if root else None


def find_set(name, root=None):
    """The folder of a known set in sets_root(root), or that itself; None if there is none.

    It has the set's name, or its manifest says so, or it holds the official files of cifar10.
    """
    root, names = sets_root(root), (name, CIFAR10_FOLDER) if name == "cifar10" else (name,)
    if root is None:
        return None
    for folder in [*(root / folder for folder in names), root]:
        if folder.is_dir() and Path(os.path.abspath(folder)).name in names:
            return folder
    if name == "cifar10" and (root / "test_batch.bin").exists():
        return root
    try:
        return root if read_json(root / MANIFEST)["name"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
