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
    MAX_BATCH_BYTES, copy_stream, list_members, open_member, place_key, whole_file)

MAX_LABEL_BYTES = 2 ** 28


def find_batches(paths, pattern, work):
    """({name: Member}, the files that hold them) of folders, tars, zips and batches.

    pattern: of a batch's file name; its group is the name.
    """
    archive = re.compile(r"(?i)imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar)")
    found, files = {}, [path for path in paths if not path.is_dir()]
    for folder in filter(lambda path: path.is_dir(), paths):
        files += [file for file in sorted(folder.rglob("*"))
                  if pattern.fullmatch(file.name) or archive.fullmatch(file.name)]
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

    Both are unpacked into the folder work; rows are mapped from there.
    """
    key = place_key(member.path, member.offset)
    rows_path, labels_path = (work / f"unpacked-{key}-{kind}.npy" for kind in ("rows", "labels"))
    try:
        if not labels_path.exists():
            labels = np.asarray(_unpack(member, size, rows_path), np.int64).reshape(-1)
            write_atomically(labels_path, lambda file: np.save(file, labels))
        rows, labels = np.load(rows_path, mmap_mode="r"), np.load(labels_path)
        if len(labels) not in (0, len(rows)):
            raise DataError(f"{len(labels):,} labels for {len(rows):,} images")
        return rows, labels if len(labels) else None
    except Exception as error:  # whatever made-up bytes lead to
        if getattr(error, "errno", None):  # a disk's
            raise
        reason = error
        if not isinstance(error, DataError):
            reason = f"no batch of images ({type(error).__name__}: {printable(error)})"
        raise DataError(f"{printable(member.name)}: {reason}") from None


def _unpack(member, size, rows_path):
    """Write the rows of a batch as a .npy file; returns the labels, maybe none."""
    with open_member(member) as file:
        is_npz = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_npz:
            return _unpack_npz(file, size, rows_path)
        needed, free = 2 * member.size, free_bytes(torch.device("cpu"))
        if needed > free:
            raise DataError(f"needs {needed:,} bytes of memory; {free:,} are free")
        if member.name.endswith(".bin"):
            rows, labels = _records(file.read(), 1 + 3 * size ** 2)
        else:
            content = _Unpickler(file, encoding="bytes").load()
            content = {name if isinstance(name, str) else name.decode("latin1"): value
                       for name, value in content.items()}
            rows, labels = content["data"], content.get("labels", ())
        while file.read(2 ** 20):  # at its end a zip's checksum is compared
            pass
    _check_rows(rows.dtype, rows.shape, size)
    write_atomically(rows_path, lambda file: np.save(file, rows))
    return labels


def _records(content, stride):
    if not content or len(content) % stride:
        raise DataError(f"has {len(content):,} bytes, not a multiple of {stride:,}: cut off? fetch "
                        "it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, stride)
    return records[:, 1:], records[:, 0]


def _unpack_npz(file, size, rows_path):
    with zipfile.ZipFile(file) as archive:
        with archive.open("data.npy") as part:
            np.lib.format.read_magic(part)
            shape, _, dtype = np.lib.format.read_array_header_1_0(part)
            _check_rows(dtype, shape, size)
            length = part.tell() + shape[0] * shape[1]
        with archive.open("data.npy") as part:
            copy_stream(part, rows_path, min(length, MAX_BATCH_BYTES), "its data")
        if "labels.npy" not in archive.namelist():
            return ()
        if archive.getinfo("labels.npy").file_size > MAX_LABEL_BYTES:
            raise DataError(f"its labels have more than {MAX_LABEL_BYTES:,} bytes: refused")
        with archive.open("labels.npy") as part:
            return np.lib.format.read_array(part, allow_pickle=False)


def _check_rows(dtype, shape, size):
    stride = 3 * size ** 2
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != stride:
        other = [of for of in (32, 64) if shape[1:] == (3 * of ** 2,) and of != size]
        hint = f" (is it the set of {other[0]} pixels?)" if other else ""
        raise DataError(f"its data is {dtype} of shape {shape}: must be uint8 (n, {stride:,}) for "
                        f"{size}x{size} images{hint}")


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
