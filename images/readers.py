"""Readers of a source: count(split), and pieces(split, start) from the start-th image on.

A worker makes Taken of a piece by take_images. Files are not trusted: a pickle runs nothing.
"""
import contextlib
import hashlib
import os
import pickle
import re
import sqlite3
import typing
import zipfile

import numpy as np

from harness.errors import DataError, printable
from harness.files import write_atomically
from harness.host import free_memory
from harness.progress import progress
from images.decode import BadImage, channels_of, decode
from images.members import (
    MAX_BATCH_BYTES, Member, copy_stream, damage, is_bomb, is_stray, list_members, open_member,
    place_key, read_member)
from images.sets import SETS, SPLITS

FILES_A_PIECE, ROWS_A_PIECE = 32, 512
TEST_SHARE = 0.1  # is held out where no other was asked for
STRAY = "no image"  # in place of a split: files that are left out
SPLIT_WORDS = {**dict.fromkeys(["train", "training"], "train"),  # names of folders, in any case
               **dict.fromkeys(["test", "testing", "val", "valid", "validation"], "test")}


def split_word(folder):
    """The word by which a folder, or a numbered tar of many, is of a split, or ""."""
    word = re.sub(r"[-_.]\d+(-of-\d+)?$", "", folder.lower())
    return word if word in SPLIT_WORDS else ""


def split_word_in(name):
    """The first word of a parquet file's or its folder's name that is of a split, or ""."""
    words = re.findall("[a-z]+", name.lower())
    return next((word for word in words if word in SPLIT_WORDS and "partial" not in words), "")


class Taken(typing.NamedTuple):
    """What a worker makes of a piece of the source."""
    pixels: bytes
    labels: list  # empty where there are none
    count: int
    digests: bytes  # SHA-256 of each image's file
    enlarged: int
    grey: int  # of three equal channels
    bad: list  # (name, reason, advice) of those that cannot be taken


class Files:
    """Image files listed in an SQLite file in the order of names: 13 million need no memory.

    places: the folders and files that they lie in; the list may be another's work.
    """

    def __init__(self, path, places):
        self.db, self.places = sqlite3.connect(path), tuple(map(str, places))
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
            if is_stray(member):
                self._add(STRAY, member.name, "", member)
                continue
            *folders, base = member.name.split("/")
            name = base if is_known else member.name
            word = next((word for word in map(split_word, folders) if word), "")
            tops.add("".join(folders[:1]))
            words.add(word)
            if not self._add(split, name, word, member):
                raise DataError(f"{printable(path)}: a second file of the name {printable(name)}: "
                                "each must be there once")
        share = None
        if "" in origins and (is_known or not self._split_by_folder(tops, words)):
            share = request.test_share or TEST_SHARE
            self.db.execute(  # those whose names have the smallest SHA-256, at least one
                "UPDATE files SET split = CASE WHEN name IN (SELECT name FROM files WHERE split = "
                "'' ORDER BY sha256(name) LIMIT ?) THEN 'test' ELSE 'train' END WHERE split = ''",
                [max(1, round(share * self.count("")))])
        self.db.commit()
        return share

    def _add(self, split, name, word, member):
        """Whether it was not there already."""
        key = name.encode(errors="surrogateescape")  # on any machine the same
        row = split, key, word, os.fsencode(member.path), *member[2:]
        return self.db.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                               row).rowcount

    def _split_by_folder(self, tops, words):
        """Folders train, test, val, ... are the splits. False where not both splits are there."""
        if len(tops) == 1 and not {top.lower() for top in tops} & {"", *words}:  # all lies in one
            self.db.execute("UPDATE files SET name = substr(name, instr(name, X'2F') + 1) WHERE "
                            "split = ''")
        if {SPLIT_WORDS[word] for word in words if word} != set(SPLITS):
            return False
        if len(words) > 2:
            rows = self.db.execute("SELECT MIN(name) FROM files WHERE split = '' GROUP BY word "
                                   "ORDER BY word")
            some = ", ".join(printable(name.decode(errors="replace")) for name, in rows)
            raise DataError(f"the source has {some}: a set has folders train/ (or training/) and "
                            "one of test/, testing/, val/, valid/ or validation/, and nothing "
                            "beside them")
        self.db.execute("UPDATE files SET split = CASE WHEN word LIKE 'train%' THEN 'train' "
                        "ELSE 'test' END WHERE split = ''")
        return True

    def strays(self):
        """The names of the files that are no images, sorted."""
        rows = self.db.execute("SELECT name FROM files WHERE split = ? ORDER BY name", [STRAY])
        return (name.decode(errors="replace") for name, in rows)

    def count(self, split):
        query = "SELECT COUNT(*) FROM files WHERE split = ?"
        return self.db.execute(query, [split]).fetchone()[0]

    def pieces(self, split, start):
        rows = self.db.execute("SELECT name, path, start, size, packed, crc FROM files WHERE "
                               "split = ? ORDER BY name LIMIT -1 OFFSET ?", [split, start])
        while piece := rows.fetchmany(FILES_A_PIECE):
            members = [self._member(*row) for row in piece]
            yield [(member.name, member) for member in members]

    def _member(self, name, path, *numbers):
        is_whole = isinstance(name, bytes) and isinstance(path, bytes) and all(
            type(number) is int and number >= -1 for number in numbers)
        if not is_whole or numbers[0] < 0:
            raise sqlite3.DataError("damaged")
        path = os.fsdecode(path)
        if path not in self.places and not os.path.normpath(path).startswith(
                tuple(os.path.join(place, "") for place in self.places)):
            raise sqlite3.DataError(f"it lists {path}, which is not in the source")
        return Member(os.fsdecode(name), path, *numbers)


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
        labels = [name for name in ("label", "labels")
                  if re.match("int|uint(8|16|32)$", kinds.get(name, ""))]
        return file, images + labels[:1]


def take_images(items, size, resample, enlarge, channels=3):
    """Decode images: name, a Member, a cell of a parquet file or a row of a batch, maybe label."""
    pixels, labels, digests, enlarged, grey, bad = [], [], [], 0, 0, []
    for name, place, *label in items:
        try:
            if isinstance(place, np.ndarray):
                content, is_enlarged = place, False
                array = place.reshape(3, size, size).transpose(1, 2, 0)
            else:
                content = _content(place)
                array, is_enlarged = decode(content, size, resample, enlarge, channels)
                grey += int(channels == 3 and (array == array[..., :1]).all())
        except BadImage as error:
            bad.append((name, str(error), error.advice))
            continue
        pixels.append(array.tobytes())
        labels += [-1 if value is None else value for value in label]
        digests.append(hashlib.sha256(content).digest())
        enlarged += int(is_enlarged)
    return Taken(b"".join(pixels), labels, len(pixels), b"".join(digests), enlarged, grey, bad)


def _content(place):
    """The bytes of an image's file. Raises BadImage."""
    content = read_member(place) if isinstance(place, Member) else place
    content = content["bytes"] if isinstance(content, dict) else content
    if content is None:
        raise BadImage("is an empty cell")
    return content


def count_channels(items):
    """3 where a piece has an image with colours, else 1; 0: none of them can be read."""
    most = 0
    for _, place, *_ in items:
        with contextlib.suppress(BadImage):
            most = max(most, channels_of(_content(place)))
        if most == 3:
            break
    return most


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
            if len(labels) != len(rows) or labels.dtype.kind not in "iu":
                raise DataError(f"{about}: {len(labels):,} labels of type {labels.dtype} for "
                                f"{len(rows):,} images: must be whole numbers, one for each")
            labels = labels.astype(np.int64)
        return rows, labels


def _unpack(member, size, paths):
    """Write the labels, where there are some, and the data of a batch as .npy files."""
    with open_member(member) as file:
        is_npz = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_npz:
            return _unpack_npz(file, paths)
        needed, free = 2 * member.size, free_memory()
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
        array = content[kind]
        if isinstance(array, list) and all(type(label) is int for label in array):
            array = np.array(array)
        if not isinstance(array, np.ndarray):
            raise DataError(f"{printable(member.name)}: its {kind} are no array and no list of "
                            "whole numbers")
        write_atomically(paths[kind], lambda file: np.save(file, array, allow_pickle=False))


def _unpack_npz(file, paths):
    with zipfile.ZipFile(file) as archive:
        for kind in [kind for kind in paths if f"{kind}.npy" in archive.namelist()]:
            info = archive.getinfo(f"{kind}.npy")
            if is_bomb(info.file_size, info.compress_size):
                raise DataError(f"its {kind} declare {info.file_size:,} bytes in "
                                f"{info.compress_size:,}: refused")
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
