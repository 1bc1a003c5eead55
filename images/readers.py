"""Readers of a source: count(split), and pieces(split, start) from the start-th image on.

A worker makes Taken of a piece by take_images. Files are not trusted: a pickle runs nothing.
"""
import hashlib
import os
import pickle
import re
import sqlite3
import typing
import zipfile

import numpy as np
import torch

from harness.errors import DataError, printable
from harness.files import write_atomically
from harness.machine import free_bytes
from harness.progress import progress
from images.decode import BadImage, decode
from images.members import (
    MAX_BATCH_BYTES, Member, copy_stream, damage, list_members, open_member, place_key,
    read_member)
from images.sets import SETS, SPLITS

FILES_A_PIECE, ROWS_A_PIECE = 32, 512
SPLIT_WORDS = {**dict.fromkeys(["train", "training"], "train"),  # names of folders, in any case
               **dict.fromkeys(["test", "testing", "val", "valid", "validation"], "test")}


class Taken(typing.NamedTuple):
    """What a worker makes of a piece of the source."""
    pixels: bytes
    labels: list  # empty where there are none
    count: int
    digests: bytes  # SHA-256 of each image's file
    enlarged: int
    bad: list  # (name, reason) of those that cannot be taken


class Files:
    """Image files listed in an SQLite file in the order of names: 13 million need no memory."""

    def __init__(self, path):
        self.db = sqlite3.connect(path)
        self.db.create_function("sha256", 1, lambda name: hashlib.sha256(name).digest())

    def list(self, request, origins, work):
        """Take the list down, sets of ImageNet by their base names, each of which must come once.

        Returns the share that was held out for test, or None where the source has its splits.
        """
        is_known, tops, words = request.name in SETS, set(), set()
        self.db.executescript(
            "DROP TABLE IF EXISTS files; CREATE TABLE files (split TEXT, name BLOB, word TEXT, "
            "path BLOB, start INT, size INT, packed INT, crc INT, PRIMARY KEY (split, name)) "
            "WITHOUT ROWID")
        members = ((split, path, member) for split, paths in origins.items() for path in paths
                   for member in list_members(path, work))
        for split, path, member in progress(members, "list", unit=" files"):
            *folders, base = member.name.split("/")
            name = base if is_known else member.name
            word = next((word for word in map(str.lower, folders) if word in SPLIT_WORDS), "")
            tops.add("".join(folders[:1]))
            words.add(word)
            key = name.encode(errors="surrogateescape")  # on any machine the same
            try:
                self.db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                                (split, key, word, os.fsencode(member.path), *member[2:]))
            except sqlite3.IntegrityError:
                raise DataError(f"{printable(path)}: a second file of the name {printable(name)}: "
                                "each must be there once") from None
        share = None
        if "" in origins and (is_known or not self._split_by_folder(tops, words)):
            share = request.test_share or 0.1
            self.db.execute(  # those whose names have the smallest SHA-256, at least one
                "UPDATE files SET split = CASE WHEN name IN (SELECT name FROM files ORDER BY "
                "sha256(name) LIMIT ?) THEN 'test' ELSE 'train' END",
                [max(1, round(share * self.count("")))])
        self.db.commit()
        return share

    def _split_by_folder(self, tops, words):
        """Folders train, test, val, ... are the splits. False where not both splits are there."""
        if len(tops) == 1 and not {top.lower() for top in tops} & {"", *words}:  # all lies in one
            self.db.execute("UPDATE files SET name = substr(name, instr(name, X'2F') + 1)")
        if {SPLIT_WORDS[word] for word in words if word} != set(SPLITS):
            return False
        if len(words) > 2:
            rows = self.db.execute("SELECT MIN(name) FROM files GROUP BY word ORDER BY word")
            some = ", ".join(printable(name.decode(errors="replace")) for name, in rows)
            raise DataError(f"the source has {some}: a set has folders train/ (or training/) and "
                            "one of test/, testing/, val/, valid/ or validation/, and nothing "
                            "beside them")
        self.db.execute("UPDATE files SET split = CASE WHEN word LIKE 'train%' THEN 'train' "
                        "ELSE 'test' END")
        return True

    def count(self, split):
        query = "SELECT COUNT(*) FROM files WHERE split = ?"
        return self.db.execute(query, [split]).fetchone()[0]

    def pieces(self, split, start):
        rows = self.db.execute("SELECT name, path, start, size, packed, crc FROM files WHERE "
                               "split = ? ORDER BY name LIMIT -1 OFFSET ?", [split, start])
        while piece := rows.fetchmany(FILES_A_PIECE):
            members = [Member(os.fsdecode(name), os.fsdecode(path), *place)
                       for name, path, *place in piece]
            yield [(member.name, member) for member in members]


class Batches:
    """Images in arrays: {split: [(rows of a red, a green and a blue plane, labels or None)]}."""

    def __init__(self, batches):
        self.batches = batches

    def count(self, split):
        return sum(len(rows) for rows, _ in self.batches[split])

    def pieces(self, split, start):
        for rows, labels in self.batches[split]:
            for first in range(start, len(rows), ROWS_A_PIECE):
                part = slice(first, first + ROWS_A_PIECE)
                names = [""] * len(rows[part])
                columns = [] if labels is None else [labels[part].tolist()]
                yield list(zip(names, np.array(rows[part]), *columns))
            start = max(0, start - len(rows))


class Parquet:
    """Images in a column of parquet files: {split: [path]}, in the order of files and rows."""

    def __init__(self, files):
        try:
            import pyarrow.parquet
        except ImportError:  # it is not among the requirements
            raise DataError("parquet files need pyarrow: pip install pyarrow") from None
        self.files, self.open = files, pyarrow.parquet.ParquetFile

    def count(self, split):
        return sum(self._open(path)[0].metadata.num_rows for path in self.files[split])

    def pieces(self, split, start):
        for path in self.files[split]:
            file, columns = self._open(path)
            first = 0
            with damage(path, "parquet file"):
                for batch in file.iter_batches(FILES_A_PIECE, columns=columns):
                    values = [batch.column(name).to_pylist() for name in columns]
                    items = [(f"{path.name}, row {row}", *item)
                             for row, item in enumerate(zip(*values), first)]
                    if start < first + len(items):
                        yield items[max(0, start - first):]
                    first += len(items)
            start = max(0, start - first)

    def _open(self, path):
        """(the file, its columns of images and labels)"""
        with damage(path, "parquet file"):
            file = self.open(path, pre_buffer=False, buffer_size=2 ** 20)
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        images = [name for name, kind in kinds.items() if re.match("struct<(.*, )?bytes: ", kind)
                  or name in ("image", "img") and kind in ("binary", "large_binary")]
        if len(images) != 1:
            raise DataError(f"{path}: of its columns {', '.join(map(printable, kinds))} one must "
                            "hold images (a struct with bytes, or binary values named image)")
        labels = [name for name in ("label", "labels") if re.match("u?int", kinds.get(name, ""))]
        return file, images + labels[:1]


def take_images(items, size, resample, enlarge):
    """Decode images: name, a Member, a cell of a parquet file or a row of a batch, maybe label."""
    pixels, labels, digests, enlarged, bad = [], [], [], 0, []
    for name, place, *label in items:
        try:
            if isinstance(place, np.ndarray):
                content, is_enlarged = place, False
                array = place.reshape(3, size, size).transpose(1, 2, 0)
            else:
                content = read_member(place) if isinstance(place, Member) else place
                content = content["bytes"] if isinstance(content, dict) else content
                array, is_enlarged = decode(content, size, resample, enlarge)
        except BadImage as error:
            bad.append((name, str(error)))
            continue
        pixels.append(array.tobytes())
        labels += [-1 if value is None else value for value in label]
        digests.append(hashlib.sha256(content).digest())
        enlarged += int(is_enlarged)
    return Taken(b"".join(pixels), labels, len(pixels), b"".join(digests), enlarged, bad)


def open_batch(member, size, work):
    """(rows, labels or None) of a .bin of CIFAR-10, an .npz or a pickle. Raises DataError.

    Both become .npy files in the folder work, the labels first; the rows are mapped.
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


_ALLOWED = {  # all that arrays consist of
    "multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),  # to which a state is given
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
