"""Batches: many images in one array, as CIFAR-10 and the downsampled ImageNet are published.

Files are not trusted: a pickle runs nothing, sizes are checked before memory is taken.
"""
import pickle
import re
import zipfile

import numpy as np
import torch

from harness.errors import DataError
from harness.files import write_atomically
from harness.machine import free_bytes
from images.decode import printable
from images.members import (
    MAX_BATCH_BYTES, copy_stream, damage, list_members, open_member, place_key, whole_file)

_ARCHIVE = re.compile(r"(?i)imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar)")


def find_batches(paths, pattern, work):
    """({name: Member}, the files that hold them) of folders, tars, zips and batches.

    pattern: of a batch's file name; its group is the name.
    """
    found, files = {}, [path for path in paths if not path.is_dir()]
    files += [file for path in paths if path.is_dir() for file in sorted(path.rglob("*"))
              if pattern.fullmatch(file.name) or _ARCHIVE.fullmatch(file.name)]
    for file in files:
        is_batch = pattern.fullmatch(file.name)
        for member in [whole_file(file)] if is_batch else list_members(file, work, MAX_BATCH_BYTES):
            match = pattern.fullmatch(member.name.rpartition("/")[2])
            if match and match[1] in found:
                raise DataError(f"{printable(member.path)}: a second {match[1]}, beside that of "
                                f"{printable(found[match[1]].path)}: give one of them")
            if match:
                found[match[1]] = member
    return found, files


def open_batch(member, size, work):
    """(rows, labels or None) of a .bin of CIFAR-10, an .npz or a pickle. Raises DataError.

    Both are unpacked into the folder work, as .npy files; the rows, written last, are mapped.
    """
    about, key = printable(member.name), place_key(member.path, member.offset)
    paths = {kind: work / f"unpacked-{key}-{kind}.npy" for kind in ("labels", "data")}
    with damage(about, "batch of images"):
        if not paths["data"].exists():
            _unpack(member, size, paths)
        with open(paths["data"], "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or shape[1:] != (3 * size ** 2,):
            raise DataError(f"{about}: its data is {dtype} of shape {shape}: must be uint8 (n, "
                            f"{3 * size ** 2:,}) for {size}x{size} images")
        rows, labels = np.load(paths["data"], mmap_mode="r"), None
        if paths["labels"].exists():
            labels = np.load(paths["labels"], mmap_mode="r").reshape(-1)
            if len(labels) != len(rows):
                raise DataError(f"{about}: {len(labels):,} labels for {len(rows):,} images")
            labels = labels.astype(np.int64)
        return rows, labels


def _unpack(member, size, paths):
    """Write the labels, where there are some, and the data of a batch as .npy files."""
    with open_member(member) as file:
        is_npz = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_npz:
            return _unpack_npz(file, paths)
        needed, free = 2 * member.size, free_bytes(torch.device("cpu"))
        if needed > free:
            raise DataError(f"{printable(member.name)}: needs {needed:,} bytes of memory; "
                            f"{free:,} are free")
        if member.name.endswith(".bin"):
            stride = 1 + 3 * size ** 2
            records = np.frombuffer(file.read(), np.uint8).reshape(-1, stride)
            content = {"labels": records[:, 0], "data": records[:, 1:]}
        else:
            content = _Unpickler(file, encoding="bytes").load()
            content = {key if isinstance(key, str) else key.decode("latin1"): value
                       for key, value in content.items()}
        while file.read(2 ** 20):  # at its end a zip's checksum is compared
            pass
    for kind in [kind for kind in paths if kind in content]:
        array = np.asarray(content[kind])
        write_atomically(paths[kind], lambda file: np.save(file, array, allow_pickle=False))


def _unpack_npz(file, paths):
    with zipfile.ZipFile(file) as archive:
        for kind in [kind for kind in paths if f"{kind}.npy" in archive.namelist()]:
            with archive.open(f"{kind}.npy") as part:
                copy_stream(part, paths[kind], MAX_BATCH_BYTES, f"its {kind}")


# All that arrays consist of. An array is made empty, whatever is asked for: it has only what its
# state brings.
_ALLOWED = {
    "multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
    "numeric._frombuffer": lambda content, dtype, shape, order, *_:
        np.frombuffer(content, dtype).reshape(shape, order=order),
    "numpy.ndarray": None,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, for Python 2
}


class _Unpickler(pickle._Unpickler):  # the one in Python: in C, one number can take all memory
    """pickle's own, but names in the file lead to what _ALLOWED has for them, or to an error."""

    def find_class(self, module, name):
        name = f"{module}.{name}"
        short = re.sub(r"^numpy\._?core\.", "", name)
        if short not in _ALLOWED:
            raise DataError(f"a pickle that would run {printable(name)}: refused")
        return _ALLOWED[short]
