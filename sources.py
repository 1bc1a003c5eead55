"""Where images come from: folders, tars, zips, NumPy and pickled batches, parquet files, as they are published.

Files are not trusted. Members of archives are read where they lie and never unpacked under a name of the archive's;
pickles are read as data by an interpreter that calls nothing; sizes are checked before memory is taken. What is not
as it should be ends in a DataError that names the file.
"""
import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickletools
import re
import shutil
import sqlite3
import stat
import struct
import tarfile
import typing
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError

MAX_PIXELS = 2 ** 26  # of an image, and
MAX_IMAGE_BYTES = 2 ** 27  # of its file: larger ones are refused, whatever they hold
MAX_BATCH_BYTES = 2 ** 32  # of a batch or archive that must be unpacked
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
FILES_A_PIECE, ROWS_A_PIECE = 32, 512
TEST_FOLDERS = ("test", "val", "valid", "validation")


def shown(name):
    """A name for a message of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(name))


# ---- images

class BadImage(ValueError):
    """An image that cannot be taken, and why."""


def decode(content, size, resample=None, enlarge=False):
    """The image in the bytes of a file: ((size, size, 3) uint8, whether it was enlarged). Raises BadImage.

    Decoded at full size; the largest centred square is cut out (the odd pixel remains at the right or bottom) and
    resized by Pillow's filter: first each row, then each column, each rounded to 8 bits (halves up), the filter
    stretched over the area that a new pixel covers and cut off at the edges. Without a filter the image must be
    size x size. Grey levels, palettes and CMYK become RGB as Pillow does it; orientation tags and colour profiles
    are not applied.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"declares {width}x{height} pixels: more than {MAX_PIXELS:,} are refused")
        if image.format == "PNG":
            if content[24] == 16:  # Pillow would drop the low bytes
                raise BadImage("has 16 bits a channel: only 8 are taken")
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # the checksums of all chunks
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with its preview
            raise BadImage(f"is animated ({image.n_frames} frames): only still images are taken")
        image.load()
        image = _in_rgb(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        if isinstance(error, Image.DecompressionBombError):
            raise BadImage(f"declares too many pixels: more than {MAX_PIXELS:,} are refused") from None
        known = isinstance(error, Image.UnidentifiedImageError)
        reason = f"{' '.join(str(error).split())} ({type(error).__name__})"
        raise BadImage(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file" if known else
                       f"is damaged: {shown(reason)}") from None
    side = min(width, height)
    if (width, height) == (size, size):
        return np.asarray(image), False
    if resample is None:
        raise BadImage(f"is {width}x{height} pixels, not {size}x{size}: without a filter nothing is resized")
    if side < size and not enlarge:
        raise BadImage(f"is {width}x{height} pixels, smaller than {size}x{size}: --enlarge-small enlarges such images")
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), FILTERS[resample])), side < size


def _in_rgb(image):
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (255, 255):
            raise BadImage("has transparent pixels: no colour is theirs")
    if image.mode not in ("RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr"):
        raise BadImage(f"has pixels of mode {image.mode}: only 8 bits a channel are taken")
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- folders and archives

class Member(typing.NamedTuple):
    """A file, where its bytes lie."""
    name: str  # its path in the source
    path: str  # the file on disk that holds it
    offset: int
    size: int
    packed: int = 0  # bytes of a deflated member of a zip; 0: they lie there as they are
    crc: int = -1  # of a member of a zip


class Region(io.RawIOBase):
    """A part of a file, to be read as one."""

    def __init__(self, path, offset=0, size=None):
        self.file, self.offset, self.at = open(path, "rb"), offset, 0
        self.size = os.path.getsize(path) - offset if size is None else size

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer):
        with memoryview(buffer) as view:
            self.file.seek(self.offset + self.at)
            count = self.file.readinto(view[:max(0, min(len(view), self.size - self.at))])
        self.at += count
        return count

    def close(self):
        self.file.close()
        super().close()


def buffered(member):
    return io.BufferedReader(Region(member.path, member.offset, member.size))


def read_member(member, limit=MAX_IMAGE_BYTES):
    """The bytes of a file. Raises BadImage where they are not what was listed."""
    if member.size > limit:
        raise BadImage(f"declares {member.size:,} bytes: more than {limit:,} are refused")
    try:
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            content = file.read(member.packed or member.size)
            more = not member.offset and member.crc < 0 and file.read(1)
        if member.packed:
            content = zlib.decompressobj(-15).decompress(content, member.size + 1)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    except zlib.error as error:
        raise BadImage(f"is damaged: {error}") from None
    if len(content) != member.size or more:
        raise BadImage(f"does not have the {member.size:,} bytes that it had or declares")
    if member.crc >= 0 and zlib.crc32(content) != member.crc:
        raise BadImage("is damaged: its checksum in the zip differs")
    return content


def safe_name(name, archive):
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name or re.match("[A-Za-z]:", name):
        raise DataError(f"{archive}: holds a member {shown(name)!r}, which points outside: it is refused")
    return re.sub("^(\\./)+", "", name)


def is_hidden(name):
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def walk(path, work, name="", above=()):
    """Yield a Member for each file in a folder, a tar, a zip or tars in them. work: a folder for what must be
    unpacked. Hidden files are left out. Raises DataError for links, devices and what else no image set holds."""
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            real = path.resolve()
            if real in above:
                raise DataError(f"{shown(path)}: a link to a folder that holds it")
            for inner in sorted(os.listdir(path)):
                if not is_hidden(inner):
                    yield from walk(path / inner, work, f"{name}/{inner}" if name else inner, (*above, real))
            return
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{shown(path)}: neither a file nor a folder")
        whole = Member(name or path.name, str(path), 0, status.st_size)
        is_tar = path.suffix == ".tar"
        if name and not is_tar:  # in a folder
            yield whole
            return
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from None
    prefix = f"{name[:-4]}/" if name else ""
    if head[257:262] == b"ustar" or is_tar:
        yield from walk_tar(whole, prefix)
    elif head.startswith(b"PK"):
        yield from walk_zip(whole, prefix)
    elif head.startswith(tuple(_UNPACKERS)):
        yield from walk_tar(unpacked_tar(path, work), prefix, about=shown(path))
    else:
        yield whole


def walk_tar(archive, prefix="", depth=0, about=None):
    """Yield the members of a tar, and of the tars in it. about: what to call it in messages."""
    shown_path = about or shown(archive.path)
    with buffered(archive) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", errors="surrogateescape")
            while (member := tar.next()) is not None:
                tar.members.clear()  # or they would all stay in memory
                name = safe_name(member.name, shown_path)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or member.size < 0:
                    kind = "link" if member.islnk() or member.issym() else "sparse file" if member.isreg() else "device"
                    raise DataError(f"{shown_path}: holds a {kind}, {shown(name)}: only files are taken")
                inner = Member(prefix + name, archive.path, archive.offset + member.offset_data, member.size)
                if inner.offset + inner.size > archive.offset + archive.size:
                    raise DataError(f"{shown_path}: {shown(name)} declares {member.size:,} bytes, more than there are")
                if is_hidden(name):
                    continue
                if name.endswith(".tar"):
                    if depth:
                        raise DataError(f"{shown_path}: holds tars in tars in a tar ({shown(name)}): one level is read")
                    yield from walk_tar(inner, f"{prefix}{name[:-4]}/", depth + 1, f"{shown_path} ({shown(name)})")
                else:
                    yield inner
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # tarfile ends there without a word
                raise DataError(f"{shown_path}: damaged or cut off at byte {tar.offset:,}: fetch it again")
            while rest := file.read(2 ** 20):
                if rest.strip(b"\0"):
                    raise DataError(f"{shown_path}: goes on after its end at byte {tar.offset:,}: is it two tars in one?")
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{shown_path}: not a whole tar ({shown(error)}): fetch it again") from None


def walk_zip(archive, prefix="", limit=MAX_IMAGE_BYTES):
    """Yield the members of a zip."""
    path = shown(archive.path)
    try:
        with buffered(archive) as file, zipfile.ZipFile(file) as zipped:
            for info in zipped.infolist():
                name = safe_name(info.filename, path)
                mode = info.external_attr >> 16
                if info.is_dir() or is_hidden(name):
                    continue
                if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise DataError(f"{path}: holds a link or device, {shown(name)}: only files are taken")
                if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(f"{path}: {shown(name)} is encrypted or packed by a method that is not deflate")
                if info.file_size > limit or info.file_size > 2 ** 24 + 200 * info.compress_size:
                    raise DataError(f"{path}: {shown(name)} declares {info.file_size:,} bytes in {info.compress_size:,}: "
                                    "refused")
                file.seek(info.header_offset)
                header = file.read(30)
                local = file.read(int.from_bytes(header[26:28], "little"))
                if header[:4] != b"PK\3\4" or local.decode("utf-8" if info.flag_bits & 0x800 else "cp437") != info.orig_filename:
                    raise DataError(f"{path}: damaged at {shown(name)}: fetch it again")
                skipped = sum(struct.unpack("<HH", header[26:30]))
                packed = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else 0
                yield Member(prefix + name, archive.path, archive.offset + info.header_offset + 30 + skipped,
                             info.file_size, packed, info.CRC)
    except DataError:
        raise
    except Exception as error:  # zipfile raises nearly everything on damaged files
        raise DataError(f"{path}: not a whole zip ({shown(error)}): fetch it again") from None


_UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def unpacked_tar(path, work):
    """A compressed tar as a plain one in the folder work, as a Member."""
    with open(path, "rb") as file:
        head = file.read(8)
    opener = next(opener for magic, opener in _UNPACKERS.items() if head.startswith(magic))
    target = work / f"unpacked-{_key(path)}.tar"
    if not target.exists():
        limit = 2 ** 26 + 100 * path.stat().st_size
        try:
            with opener(path, "rb") as packed:
                _copy(packed, target, limit, path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None):
                raise
            raise DataError(f"{path}: damaged or cut off ({shown(error)}): fetch it again") from None
    return Member(path.name, str(target), 0, target.stat().st_size)


def _key(path, offset=0):
    """A name for what was unpacked from a place in a file, as the file is now."""
    status = os.stat(path)
    return hashlib.sha256(repr((os.fsencode(path), offset, status.st_size, status.st_mtime_ns)).encode()).hexdigest()[:16]


def _copy(stream, target, limit, path):
    """A stream into a file, whole or not at all."""
    temporary, done = target.with_suffix(".tmp"), 0
    with open(temporary, "wb") as file:
        while block := stream.read(2 ** 20):
            done += len(block)
            if done > limit:
                raise DataError(f"{path}: unpacks to more than {limit:,} bytes: refused")
            file.write(block)
    os.replace(temporary, target)


def plain(member, work):
    """A member as bytes that lie as they are in a file; what is deflated is unpacked into the folder work."""
    if member.crc < 0:
        return member
    target = work / f"unpacked-{_key(member.path, member.offset)}"
    if not target.exists():
        if member.size > shutil.disk_usage(work).free:
            raise DataError(f"{shown(member.name)} of {shown(member.path)} unpacks to {member.size:,} bytes, more than "
                            f"are free in {work}")
        crc, done, temporary = 0, 0, target.with_suffix(".tmp")
        with buffered(member._replace(size=member.packed or member.size)) as packed, open(temporary, "wb") as file:
            inflate = zlib.decompressobj(-15) if member.packed else None
            try:
                while done <= member.size:
                    if inflate:
                        tail = inflate.unconsumed_tail or packed.read(2 ** 20)
                        block = inflate.decompress(tail, 2 ** 20) if tail and not inflate.eof else b""
                    else:
                        tail = block = packed.read(2 ** 20)
                    if not tail or inflate and inflate.eof and not block:
                        break
                    crc, done = zlib.crc32(block, crc), done + len(block)
                    file.write(block)
            except zlib.error:
                crc = -1
        if done != member.size or crc != member.crc:
            raise DataError(f"{shown(member.path)}: {shown(member.name)} is damaged: fetch the zip again")
        os.replace(temporary, target)
    return Member(member.name, str(target), 0, member.size)


# ---- a set of image files

class Files:
    """Image files in the order of their names, listed in an SQLite file: 13 million need no memory."""

    def __init__(self, path):
        self.path = path
        self.db = sqlite3.connect(path)

    def list(self, members):
        """Take the list down: rows of (split, name, Member, source). Raises DataError for a name that comes twice."""
        self.db.executescript("DROP TABLE IF EXISTS files; CREATE TABLE files (split TEXT, name BLOB, path BLOB, "
                              "start INT, size INT, packed INT, crc INT, PRIMARY KEY (split, name)) WITHOUT ROWID")
        insert = "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)"
        for split, name, member, source in members:
            try:
                self.db.execute(insert, (split, name.encode(errors="surrogateescape"), os.fsencode(member.path), *member[2:]))
            except sqlite3.IntegrityError:
                raise DataError(f"{shown(source)}: a second file of the name {shown(name)}: each must be there once") from None
            except OverflowError:
                raise DataError(f"{shown(source)}: {shown(name)} declares an absurd size") from None
        self.db.commit()

    def split_by_folder(self):
        """train/ and test/ (or val/, …) are the splits. False where there are no such folders."""
        first = "CASE instr(name, X'2F') WHEN 0 THEN '' ELSE CAST(substr(name, 1, instr(name, X'2F') - 1) AS TEXT) END"
        folders = {os.fsdecode(row[0]) if isinstance(row[0], bytes) else row[0]
                   for row in self.db.execute(f"SELECT DISTINCT {first} FROM files LIMIT 100")}
        if len(folders) == 1 and not folders & {"", "train", *TEST_FOLDERS}:  # all lies in one folder
            self.db.execute("UPDATE files SET name = substr(name, instr(name, X'2F') + 1)")
            self.db.commit()
            return self.split_by_folder()
        test = sorted(folders & set(TEST_FOLDERS))
        if "train" not in folders or not test:
            return False
        if len(test) > 1 or folders != {"train", *test}:
            raise DataError(f"beside train/ there are {', '.join(sorted(folders - {'train'})) or 'files'}: a set has "
                            "train/ and one of test/, val/, valid/ or validation/, and nothing else")
        self.db.execute(f"UPDATE files SET split = CASE {first} WHEN 'train' THEN 'train' ELSE 'test' END")
        self.db.commit()
        return True

    def hold_out(self, share):
        """The share of files whose names have the smallest SHA-256 are the test split; at least one."""
        self.db.create_function("sha256", 1, lambda name: hashlib.sha256(name).digest(), deterministic=True)
        total = self.db.execute("SELECT COUNT(*) FROM files").fetchone()[0]
        self.db.executescript("CREATE TEMP TABLE held AS SELECT name, sha256(name) AS digest FROM files")
        self.db.execute("UPDATE files SET split = 'test' WHERE name IN (SELECT name FROM held ORDER BY digest LIMIT ?)",
                        [max(1, round(total * share))])
        self.db.execute("UPDATE files SET split = 'train' WHERE split != 'test'")
        self.db.commit()

    def count(self, split):
        return self.db.execute("SELECT COUNT(*) FROM files WHERE split = ?", [split]).fetchone()[0]

    def pieces(self, split, start):
        """Yield what a worker reads at a time, from the start-th file on."""
        rows = self.db.execute("SELECT name, path, start, size, packed, crc FROM files WHERE split = ? ORDER BY name "
                               "LIMIT -1 OFFSET ?", [split, start])
        while piece := rows.fetchmany(FILES_A_PIECE):
            yield read_files, [Member(name.decode(errors="surrogateescape"), os.fsdecode(path), *more)
                               for name, path, *more in piece]


def read_files(members, size, resample, enlarge):
    """What a worker makes of a piece: (pixels of the n images, labels or None, their files' SHA-256, how many were
    enlarged, [(place, name, reason)] of those that cannot be taken)."""
    def contents():
        for member in members:
            try:
                yield member.name, read_member(member)
            except BadImage as error:
                yield member.name, error
    return _decoded(contents(), None, size, resample, enlarge)


def _decoded(contents, labels, size, resample, enlarge):
    pixels, kept, digests, bad, enlarged = [], [], [], [], 0
    for place, (name, content) in enumerate(contents):
        try:
            if isinstance(content, Exception):
                raise content
            array, larger = decode(content, size, resample, enlarge)
        except BadImage as error:
            bad.append((place, name, str(error)))
            continue
        pixels.append(array.tobytes())
        kept.append(place)
        digests.append(hashlib.sha256(content).digest())
        enlarged += larger
    labels = None if labels is None else [labels[place] for place in kept]
    return b"".join(pixels), labels, b"".join(digests), enlarged, bad


# ---- batches: many images in one array

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
            for first in range(start, batch.count, ROWS_A_PIECE):
                count = min(ROWS_A_PIECE, batch.count - first)
                labels = None if batch.labels is None else batch.labels[first:first + count]
                stride = batch.label_bytes + 3 * self.size ** 2
                yield read_rows, batch._replace(offset=batch.offset + first * stride, count=count, labels=labels)
            start = max(0, start - batch.count)


def read_rows(batch, size, resample, enlarge):
    """As read_files, of rows of a batch."""
    stride = batch.label_bytes + 3 * size ** 2
    with open(batch.path, "rb") as file:
        file.seek(batch.offset)
        content = file.read(batch.count * stride)
    if len(content) != batch.count * stride:
        raise DataError(f"{batch.path}: became shorter while it was read")
    rows = np.frombuffer(content, np.uint8).reshape(batch.count, stride)
    pixels = rows[:, batch.label_bytes:].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    labels = rows[:, 0] if batch.label_bytes else batch.labels
    return pixels.tobytes(), None if labels is None else labels.tolist(), None, 0, []


def read_npz(member, work):
    """{"data": Member of the bytes, "labels": array}, with the shape of data, of a batch saved by numpy.savez."""
    arrays = {}
    for part in walk_zip(member, limit=MAX_BATCH_BYTES):
        if part.name in ("data.npy", "labels.npy"):
            part = plain(part, work)
            with buffered(part) as file:
                try:
                    version = np.lib.format.read_magic(file)
                    shape, fortran, dtype = {(1, 0): np.lib.format.read_array_header_1_0,
                                             (2, 0): np.lib.format.read_array_header_2_0}[version](file)
                    begin = file.tell()
                except Exception as error:  # numpy raises nearly everything on damaged files
                    raise DataError(f"{shown(member.name)}: {part.name} is no array ({type(error).__name__})") from None
            arrays[part.name[:-4]] = (part._replace(offset=part.offset + begin, size=part.size - begin), shape, dtype, fortran)
    return arrays


class PickledArray:
    """A call or name in a pickle, kept as data."""

    def __init__(self, name, arguments=None):
        self.name, self.arguments, self.state = name, arguments, None


_PICKLED_NAMES = {f"{module} {name}" for name, modules in {
    "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"), "ndarray": ("numpy",), "dtype": ("numpy",),
    "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"), "encode": ("_codecs",)}.items() for module in modules}
_LONG_BYTES = {"BINSTRING": 4, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}  # left in the file
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def read_pickle(member):
    """What a pickle says, without running it: containers, numbers and strings as they are, long byte strings as
    Members, and names and calls (only those that arrays consist of) as PickledArray. Raises DataError."""
    try:
        with buffered(member) as file:
            return _interpret(file, member)
    except DataError:
        raise
    except Exception as error:  # whatever made-up bytes lead to
        raise DataError(f"{shown(member.name)}: not a pickle of arrays ({type(error).__name__})") from None


def _interpret(file, member):
    stack, marks, memo = [], [], {}

    def since_mark():
        items = stack[marks[-1]:]
        del stack[marks.pop():]
        return items

    def named(name):
        if name not in _PICKLED_NAMES:
            raise DataError(f"{shown(member.name)}: a pickle that would run {shown(name.replace(' ', '.'))}: refused")
        return PickledArray(name.split()[1])

    while True:
        op = pickletools.code2op[file.read(1).decode("latin1")]
        name = op.name
        if name in _LONG_BYTES:
            length = int.from_bytes(file.read(_LONG_BYTES[name]), "little")
            if file.tell() + length > member.size:
                raise DataError(f"{shown(member.name)}: cut off: fetch it again")
            stack.append(member._replace(offset=member.offset + file.tell(), size=length))
            file.seek(length, io.SEEK_CUR)
            continue
        argument = op.arg.reader(file) if op.arg else None
        if name == "STOP":
            return stack.pop()
        if name in ("PROTO", "FRAME"):
            continue
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE", "LIST"):
            stack.append({"TUPLE": tuple, "LIST": list}[name](since_mark()))
        elif name == "DICT":
            items = since_mark()
            stack.append(dict(zip(items[::2], items[1::2])))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(named(argument))
        elif name == "STACK_GLOBAL":
            last = stack.pop()
            stack.append(named(f"{stack.pop()} {last}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop().name
            if function == "encode":  # how Python 3 writes bytes for Python 2
                stack.append(arguments[0].encode("latin1"))
            else:
                stack.append(PickledArray(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif op.arg and op.stack_after and op.stack_after[0].name in (
                "int", "int_or_bool", "float", "str", "bytes", "bytes_or_str"):
            stack.append(argument)
        else:
            raise DataError(f"{shown(member.name)}: a pickle with the instruction {name}: no array needs that, refused")


def pickled_array(value, work, member):
    """(Member of the bytes, shape, dtype, Fortran order) of an array in what read_pickle returned."""
    if value.name == "_reconstruct":
        _, shape, dtype, fortran, raw = value.state
    elif value.name == "_frombuffer":
        raw, dtype, shape, order = value.arguments
        fortran = order != "C"
    else:
        raise DataError(f"{shown(member.name)}: {value.name} where an array should be")
    kind = np.dtype(str(dtype.arguments[0]))
    if dtype.state is not None and dtype.state[1] in ("<", ">"):
        kind = kind.newbyteorder(dtype.state[1])
    if isinstance(raw, (str, bytes)):  # a short array
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        target = work / f"unpacked-{hashlib.sha256(raw).hexdigest()[:24]}"
        target.write_bytes(raw)
        raw = Member(member.name, str(target), 0, len(raw))
    return raw, tuple(shape), kind, bool(fortran)


def open_batch(member, size, work):
    """A Batch of a member: .bin of CIFAR-10, .npz or a pickle."""
    stride = 3 * size ** 2
    name = shown(member.name)
    member = plain(member, work)
    if member.name.endswith(".bin"):
        if not member.size or member.size % (1 + stride):
            raise DataError(f"{name} has {member.size:,} bytes, not a multiple of {1 + stride:,}: cut off? fetch it again")
        return Batch(member.path, member.offset, member.size // (1 + stride), 1, None)
    with buffered(member) as file:
        zipped = file.read(4) == b"PK\3\4"
    try:
        if zipped:
            arrays = read_npz(member, work)
            labels = arrays.get("labels")
        else:
            content = {key.decode() if isinstance(key, bytes) else key: value for key, value in read_pickle(member).items()}
            arrays = {"data": pickled_array(content["data"], work, member)}
            labels = content.get("labels")
            labels = pickled_array(labels, work, member) if isinstance(labels, PickledArray) else labels
        data, shape, dtype, fortran = arrays["data"]
        if isinstance(labels, tuple):
            part, label_shape, label_type, _ = labels
            labels = np.frombuffer(read_member(part, 2 ** 28)[:_product(label_shape) * label_type.itemsize], label_type)
        labels = None if labels is None else np.asarray(labels, np.int64).reshape(-1)
    except DataError:
        raise
    except Exception as error:  # whatever made-up bytes lead to
        raise DataError(f"{name}: no batch of images ({type(error).__name__}: {shown(error)})") from None
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != stride or fortran or data.size < _product(shape):
        raise DataError(f"{name}: its data is {dtype} of shape {shape}: must be uint8 (n, {stride:,}) for {size}x{size} "
                        "images" + "".join(f" (is it the set of {s} pixels?)" for s in (32, 64) if shape[1:] == (3 * s * s,)
                                           and s != size))
    if labels is not None and len(labels) != shape[0]:
        raise DataError(f"{name}: {len(labels):,} labels for {shape[0]:,} images")
    return Batch(data.path, data.offset, shape[0], 0, labels)


def _product(shape):
    product = 1
    for length in shape:
        if not isinstance(length, int) or not 0 <= length < 2 ** 40:
            raise DataError(f"an array of the absurd shape {shape}")
        product *= length
    return product


# ---- parquet

class Parquet:
    """Images in a column of parquet files, in the order of files and rows. Needs pyarrow."""

    def __init__(self, files):
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError("parquet files need pyarrow: pip install pyarrow") from None
        self.files, self.pyarrow = files, pyarrow

    def _open(self, path):
        try:
            file = self.pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2 ** 20)
        except (self.pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole parquet file ({shown(str(error).splitlines()[0])}): fetch it again") from None
        types = {field.name: field.type for field in file.schema_arrow}
        images = [name for name, kind in types.items() if self.pyarrow.types.is_struct(kind)
                  and "bytes" in {kind.field(place).name for place in range(kind.num_fields)}
                  or name in ("image", "img") and (self.pyarrow.types.is_binary(kind) or self.pyarrow.types.is_large_binary(kind))]
        if len(images) != 1:
            raise DataError(f"{path}: of its columns {', '.join(map(shown, types))} one must hold images "
                            "(a struct with bytes, or binary values named image)")
        labels = [name for name in ("label", "labels") if name in types and self.pyarrow.types.is_integer(types[name])]
        return file, images[0], labels[:1]

    def count(self, split):
        return sum(self._open(path)[0].metadata.num_rows for path in self.files[split])

    def pieces(self, split, start):
        for path in self.files[split]:
            file, image, label = self._open(path)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            first, groups = 0, list(range(len(rows)))
            while groups and first + rows[groups[0]] <= start:  # row groups that are done
                first += rows[groups.pop(0)]
            try:
                for batch in file.iter_batches(FILES_A_PIECE, groups, [image, *label]) if groups else ():
                    skip, at = max(0, start - first), first
                    first += len(batch)
                    if skip < len(batch):
                        batch = batch.slice(skip)
                        images = [(f"{path.name}, row {at + skip + place}", value["bytes"] if isinstance(value, dict) else value)
                                  for place, value in enumerate(batch.column(0).to_pylist())]
                        yield read_contents, (images, batch.column(1).to_pylist() if label else None)
            except (self.pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}: damaged ({shown(str(error).splitlines()[0])}): fetch it again") from None
            start = max(0, start - sum(rows))


def read_contents(piece, size, resample, enlarge):
    """As read_files, of images whose bytes are there already."""
    images, labels = piece
    if labels is not None and any(label is None for label in labels):
        labels = [-1 if label is None else label for label in labels]
    return _decoded(((name, BadImage("has no bytes") if content is None else content) for name, content in images),
                    labels, size, resample, enlarge)


# ---- download

def download(url, path, sha256=None, tell=print):
    """A file of a web server, going on where an earlier try broke off. Raises DataError."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    for attempt in range(3):
        done = part.stat().st_size if part.exists() and tag.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "jet-data", **(
            {"Range": f"bytes={done}-", "If-Range": tag.read_text()} if done else {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                going_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
                if not going_on:
                    done = 0
                    part.unlink(missing_ok=True)
                length = answer.headers.get("Content-Length")
                total = done + int(length) if length and length.isdecimal() else None
                if total and total > MAX_BATCH_BYTES:
                    raise DataError(f"{url}: declares {total:,} bytes: refused")
                mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
                if mark and not mark.startswith("W/"):
                    tag.write_text(mark)
                tell(f"{url}: {'all' if total is None else f'{(total - done):,} of {total:,}'} bytes to fetch")
                with open(part, "ab" if going_on else "wb") as file:
                    while block := answer.read(2 ** 16):
                        file.write(block)
                        done += len(block)
                        if done > MAX_BATCH_BYTES:
                            raise DataError(f"{url}: sends more than {MAX_BATCH_BYTES:,} bytes: refused")
            if total is None or done == total:
                break
            problem = f"broke off at {done:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is of another file
                part.unlink(missing_ok=True)
            problem = f"the server says {error.code} {error.reason}"
        except (OSError, ValueError, urllib.error.URLError) as error:
            if isinstance(error, DataError):
                raise
            problem = shown(getattr(error, "reason", error))
        except Exception as error:  # http.client's: a connection that ends in the middle
            problem = f"broke off ({type(error).__name__})"
    else:
        raise DataError(f"{url}: {problem}: the same command goes on, or give the file by --source")
    found = file_sha256(part)
    if sha256 and found != sha256:
        part.unlink()
        raise DataError(f"{url}: what came has SHA-256 {found[:12]}…, not {sha256[:12]}…: it was removed; fetch it "
                        "elsewhere and give it by --source")
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def file_sha256(path, offset=0, size=None, bar=None):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        left = os.path.getsize(path) if size is None else size
        while left and (block := file.read(min(left, 2 ** 22))):
            digest.update(block)
            left -= len(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()
