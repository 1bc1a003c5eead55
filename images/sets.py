"""What is known of each image set before its images are there, and where a named set lies."""
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

SPLITS = ("train", "test")  # the validation images of ImageNet are "test", too
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_PARTS = {  # sets of their own: cifar10-animals, ...
    "animals": "bird cat deer dog frog horse".split(),
    "vehicles": "airplane automobile ship truck".split(),
}
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_FILES = {  # SHA-256
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
ARCHIVES = {  # SHA-256, where known
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "train_64x64.tar": "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
    "valid_64x64.tar": "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
}
MANIFEST, PARTIAL = "manifest.json", "partial"  # in a prepared folder; in one that is being made


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """What is known of a set before its images are there."""
    variant: str  # which images these are: numbers of two variants are never comparable
    shape: tuple[int, int, int]  # (H, W, C)
    counts: dict  # images per split; None where the preparation decides
    source: str  # where it comes from


_SUBSET = "the first images of CIFAR-10 in official order, classes balanced; in assets/"
_CIFAR10 = "cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html"
_ANIMALS = "the images of {whole} that show bird, cat, deer, dog, frog, horse"
_VEHICLES = "the images of {whole} that show airplane, automobile, ship, truck"
_OORD = "train_32x32.tar and valid_32x32.tar (van den Oord et al. 2016)"
_TORRENT = "train_64x64.tar and valid_64x64.tar (van den Oord et al. 2016; a torrent)"
_CHRABASZCZ = ("Imagenet{size}_train*.zip and Imagenet{size}_val.zip, pickles or npz "
               "(Chrabaszcz et al. 2017; image-net.org)")
_PARQUET = "parquet files of {size}-pixel images (Hugging Face)"
_1K = ("ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar or folders train and val "
       "(image-net.org), {variant} filter")
_21K = "class tars or folders of the winter release (image-net.org), {variant} filter"
_KNOWN = (  # name, variant, pixels, images of train and of test, source
    ("cifar10-subset", "cifar10-subset", 32, 2_048, 512, _SUBSET),
    ("cifar10", "cifar10", 32, 50_000, 10_000, _CIFAR10),
    ("cifar10-animals", "cifar10-animals", 32, 30_000, 6_000, _ANIMALS),
    ("cifar10-vehicles", "cifar10-vehicles", 32, 20_000, 4_000, _VEHICLES),
    ("cifar10-subset-animals", "cifar10-subset-animals", 32, 1_230, 306, _ANIMALS),
    ("cifar10-subset-vehicles", "cifar10-subset-vehicles", 32, 818, 206, _VEHICLES),
    ("imagenet32-oord", "oord", 32, 1_281_149, 49_999, _OORD),
    ("imagenet32-chrabaszcz", "chrabaszcz", 32, 1_281_167, 50_000, _CHRABASZCZ),
    ("imagenet1k-32-parquet", "parquet", 32, 1_281_167, 50_000, _PARQUET),
    ("imagenet1k-32-box", "box", 32, 1_281_167, 50_000, _1K),
    ("imagenet21k-32-box", "box", 32, None, None, _21K),  # 13 to 14 million, of which we hold out
    ("imagenet1k-32-lanczos", "lanczos", 32, 1_281_167, 50_000, _1K),
    ("imagenet21k-32-lanczos", "lanczos", 32, None, None, _21K),
    ("imagenet1k-32-bicubic", "bicubic", 32, 1_281_167, 50_000, _1K),
    ("imagenet21k-32-bicubic", "bicubic", 32, None, None, _21K),
    ("imagenet64-oord", "oord", 64, 1_281_149, 49_999, _TORRENT),
    ("imagenet64-chrabaszcz", "chrabaszcz", 64, 1_281_167, 50_000, _CHRABASZCZ),
    ("imagenet1k-64-parquet", "parquet", 64, 1_281_167, 50_000, _PARQUET),
    ("imagenet1k-64-box", "box", 64, 1_281_167, 50_000, _1K),
    ("imagenet21k-64-box", "box", 64, None, None, _21K),
    ("imagenet1k-64-lanczos", "lanczos", 64, 1_281_167, 50_000, _1K),
    ("imagenet21k-64-lanczos", "lanczos", 64, None, None, _21K),
    ("imagenet1k-64-bicubic", "bicubic", 64, 1_281_167, 50_000, _1K),
    ("imagenet21k-64-bicubic", "bicubic", 64, None, None, _21K),
)
SETS = {
    name: KnownSet(variant, (size, size, 3), {"train": train, "test": test},
                   source.format(size=size, variant=variant, whole=name.rpartition("-")[0]))
    for name, variant, size, train, test, source in _KNOWN}
FINGERPRINTS = {(name, split): digits for name, split, digits in map(str.split, """
cifar10-subset train 50bf9f4dc953d9140fc8a0cc264cadfa7afcea6edb2f8fc66c6fee485c391a58
cifar10-subset test 9992641856ef710529d5e2429fb69a7f2106affe7dfc2d61f0ea34155668d0c7
cifar10 train 7db256e89ed2d55f5f1c113beaf9a21a1e4c28f3f4fd374a35dc4301727cca4b
cifar10 test b90bf5fc55d5e0a76f1358afc9511ceb962591ae8418653bb5e5d103f36d4a46
cifar10-animals train 5ca1146327d53c7224f1886b866e6acad1ba0665e6730d3d02e6dbb9c6614e29
cifar10-animals test ecb9f1ced606d71162f09fe2eda52536b120b4096d14cda9da0e03321f6502b0
cifar10-vehicles train 6af15a9318eda1200f4a0c68c68cae6740fa1c38ffcbd274f56831892cf2b0f3
cifar10-vehicles test 963f1076e4315658fa3fc265431f061cf8710e4f9ac133d1b72eb9c3d1161071
cifar10-subset-animals train d9eabb9dbbabe1545348c0a06ba6a1b8f679a9e3f5ae7766854ee7843ed04bf0
cifar10-subset-animals test ae64523835b5e9bcb577dba0b5a93727f6005c0bc0d6a7559af8e611494ee374
cifar10-subset-vehicles train bc10c634ba6ba5eb9c11219d9860386d5a0884977ec6c120d9eb2c8fd0277e7d
cifar10-subset-vehicles test 0c59ff65e66249b3bb8b09d79a3fad74dc0e426d315b8a71f2f19cd793285ba8
""".strip().splitlines())}  # of the sets that cannot differ from one machine to the next


def fingerprint(array):
    """Hex SHA-256 of the ASCII line "N,H,W,C\\n" followed by the uint8 pixels in C order."""
    digest = hashlib.sha256(",".join(map(str, array.shape)).encode() + b"\n")
    for start in range(0, len(array), 4096):
        digest.update(np.ascontiguousarray(array[start:start + 4096]))
    return digest.hexdigest()


def sets_root(root=None):
    """The folder that holds the sets: root, else the environment variable JET_DATA, else None."""
    root = root or os.environ.get("JET_DATA")
    return Path(root) if root else None


def find_set(name, root=None):
    """The folder of a known set in sets_root(root), or that folder itself; None if there is none.

    It has the set's name (for cifar10 also that of the official folder), or its manifest says so,
    or it holds the official files of cifar10.
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
        return root if json.loads((root / MANIFEST).read_text())["name"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
