"""Batches: many images in one array, as CIFAR-10 and the downsampled ImageNet are published.

Files are not trusted: a pickle runs nothing, sizes are checked before memory is taken.
"""
import os
import pickle
import re
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch

from harness.errors import DataError
from harness.files import write_atomically
from harness.machine import free_bytes
from images.decode import printable
from images.files import Taken
from images.members import (
    MAX_BATCH_BYTES, copy_stream, list_members, open_member, place_key, whole_file)

ROWS_A_PIECE = 512
MAX_LABEL_BYTES = 2 ** 28


class Batch(typing.NamedTuple):
    """Rows of [label byte and] red, green and blue values, as they lie in a file."""
    path: str
    offset: int
    count: int
    label_bytes: int  # before each row
    labels: np.ndarray | None


class Batches:
    """Images in batches, in their order."""

    def __init__(self, batches, size):
        self.batches, self.size = batches, size

    def count(self, split):
        return sum(batch.count for batch in self.batches[split])

    def pieces(self, split, start):
        for batch in self.batches[split]:
            stride = batch.label_bytes + 3 * self.size ** 2
            for first in range(start, batch.count, ROWS_A_PIECE):
                count = min(ROWS_A_PIECE, batch.count - first)
                labels = None if batch.labels is None else batch.labels[first:first + count]
                yield read_rows, batch._replace(offset=batch.offset + first * stride, count=count,
                                                labels=labels)
            start = max(0, start - batch.count)


def read_rows(batch, size, resample, enlarge):
    """What a worker makes of rows of a batch: they are taken as they are."""
    stride = batch.label_bytes + 3 * size ** 2
    with open(batch.path, "rb") as file:
        file.seek(batch.offset)
        content = file.read(batch.count * stride)
    if len(content) != batch.count * stride:
        raise DataError(f"{printable(batch.path)}: became shorter while it was read")
    rows = np.frombuffer(content, np.uint8).reshape(batch.count, stride)
    pixels = rows[:, batch.label_bytes:].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    labels = rows[:, 0] if batch.label_bytes else batch.labels
    return Taken(pixels.tobytes(), None if labels is None else labels.tolist())


def find_batches(paths, pattern, work):
    """({name: Member}, the files that hold them) of folders, tars, zips and batches.

    pattern: of a batch's file name; its group is the name.
    """
    found, files = {}, list(_files_to_search(paths, pattern))
    for file in files:
        if pattern.fullmatch(file.name) or file.suffix == ".npz":
            members = [whole_file(file)]
        else:
            members = list_members(file, work, MAX_BATCH_BYTES)
        for member in members:
            match = pattern.fullmatch(member.name.rpartition("/")[2])
            if match and match[1] in found:
                raise DataError(f"{printable(member.path)}: a second {match[1]}, beside that of "
                                f"{printable(found[match[1]].path)}: give one of them")
            if match:
                found[match[1]] = member
    return found, files


def _files_to_search(paths, pattern):
    archive = re.compile(r"(?i)imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar)")
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            yield from (Path(folder) / name for name in sorted(names)
                        if pattern.fullmatch(name) or archive.fullmatch(name))


def open_batch(member, size, work):
    """A Batch of a member: a .bin of CIFAR-10, an .npz or a pickle. Raises DataError.

    The rows of the latter get a file in the folder work.
    """
    stride = 3 * size ** 2
    rows = work / f"unpacked-{place_key(member.path, member.offset)}"
    labels_path = rows.with_suffix(".npy")
    try:
        if member.name.endswith(".bin"):
            return _open_binary(member, 1 + stride)
        if not labels_path.exists():
            labels = _unpack(member, size, rows)
            write_atomically(labels_path, lambda file: np.save(file, labels))
        labels = np.load(labels_path)
        count = rows.stat().st_size // stride
        if len(labels) not in (0, count):
            raise DataError(f"{len(labels):,} labels for {count:,} images")
        return Batch(str(rows), 0, count, 0, labels if len(labels) else None)
    except Exception as error:  # whatever made-up bytes lead to
        if getattr(error, "errno", None):  # a disk's
            raise
        reason = error
        if not isinstance(error, DataError):
            reason = f"no batch of images ({type(error).__name__}: {printable(error)})"
        raise DataError(f"{printable(member.name)}: {reason}") from None


def _open_binary(member, stride):
    if member.crc >= 0:
        raise DataError("is in a zip: unpack that first")
    if not member.size or member.size % stride:
        raise DataError(f"has {member.size:,} bytes, not a multiple of {stride:,}: cut off? fetch "
                        "it again")
    return Batch(member.path, member.offset, member.size // stride, 1, None)


def _unpack(member, size, rows):
    """Write the pixels of an .npz or a pickle to the file rows; returns the labels, maybe none."""
    with open_member(member) as file:
        is_npz = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_npz:
            return _unpack_npz(file, size, rows)
        needed, free = 2 * member.size, free_bytes(torch.device("cpu"))
        if needed > free:
            raise DataError(f"a pickle that needs {needed:,} bytes of memory; {free:,} are free")
        content = _Unpickler(file, encoding="bytes").load()
        while file.read(2 ** 20):  # at its end a zip's checksum is compared
            pass
    content = {_text(key): value for key, value in content.items()}
    data, labels = _array(content["data"]), content.get("labels", ())
    _check_rows(data.dtype, data.shape, size)
    write_atomically(rows, lambda file: file.write(np.ascontiguousarray(data)))
    labels = _array(labels) if isinstance(labels, _Pickled) else labels
    return np.asarray(labels, np.int64).reshape(-1)


def _unpack_npz(file, size, rows):
    labels = np.zeros(0, np.int64)
    with zipfile.ZipFile(file) as archive:
        with archive.open("data.npy") as part:
            np.lib.format.read_magic(part)
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(part)
            _check_rows(dtype, shape, size)
            expected = shape[0] * shape[1]
            copied = copy_stream(part, rows, min(expected, MAX_BATCH_BYTES), "its data")
        if copied != expected or is_fortran:
            raise DataError(f"its data has {copied:,} bytes of {expected:,}, or is not in C order")
        if "labels.npy" in archive.namelist():
            if archive.getinfo("labels.npy").file_size > MAX_LABEL_BYTES:
                raise DataError(f"its labels have more than {MAX_LABEL_BYTES:,} bytes: refused")
            with archive.open("labels.npy") as part:
                labels = np.lib.format.read_array(part, allow_pickle=False)
    return labels.astype(np.int64).reshape(-1)


def _check_rows(dtype, shape, size):
    stride = 3 * size ** 2
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != stride:
        other = [of for of in (32, 64) if shape[1:] == (3 * of ** 2,) and of != size]
        hint = f" (is it the set of {other[0]} pixels?)" if other else ""
        raise DataError(f"its data is {dtype} of shape {shape}: must be uint8 (n, {stride:,}) for "
                        f"{size}x{size} images{hint}")


# ---- pickles

class _Pickled:
    """A call in a pickle, kept as data: its arguments, and the state that comes after it."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state):
        self.state = state


class _Reconstruct(_Pickled):
    """An array whose state is (version, shape, dtype, whether in Fortran order, bytes)."""


class _FromBuffer(_Pickled):
    """An array whose arguments are bytes, dtype, shape and order."""


_ALLOWED = {  # all that arrays consist of
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy", "ndarray"): _Pickled,
    ("numpy", "dtype"): _Pickled,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # bytes, for Python 2
}


class _Unpickler(pickle._Unpickler):  # the one in Python: in C, one number can take all memory
    """pickle's own, but names in the file lead to what _ALLOWED has for them, or to an error."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            name = printable(f"{module}.{name}")
            raise DataError(f"a pickle that would run {name}: refused")
        return _ALLOWED[module, name]


def _array(value):
    """The array that a _Pickled stands for."""
    if isinstance(value, _Reconstruct):
        _, shape, dtype, is_fortran, content = value.state
    else:
        content, dtype, shape, order = value.arguments
        is_fortran = order != "C"
    kind = np.dtype(_text(dtype.arguments[0]))
    order = _text(dtype.state[1]) if dtype.state else "="
    kind = kind.newbyteorder(order) if order in "<>" else kind
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, kind).reshape(shape, order="F" if is_fortran else "C")


def _text(value):
    return value.decode("latin1") if isinstance(value, bytes) else value
