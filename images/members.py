"""The files of a folder or an archive, where their bytes lie: nothing is unpacked under its name.

Archives are not trusted: what no image set needs ends in a DataError that names the file.
"""
import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import typing
import zipfile
import zlib

from harness.errors import DataError, printable
from harness.files import write_atomically
from images.decode import IMAGE_SUFFIXES, BadImage, starts_like_image

MAX_IMAGE_BYTES = 2 ** 27  # of an image's file: larger ones are refused, whatever they hold
MAX_BATCH_BYTES = 2 ** 32  # of a batch or archive that must be unpacked
MAX_NAME_BYTES = 2 ** 20  # of a header of a tar that holds a long name or the like
MAX_EMPTY_BYTES = 2 ** 30  # of zeros after the end of a tar
_NAME_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                 tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_SPECIAL = {tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "link"}
_UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Member(typing.NamedTuple):
    """A file, where its bytes lie."""
    name: str  # its path in the source
    path: str  # the file on disk that holds it
    offset: int
    size: int  # -1: a link to nothing
    packed: int = 0  # bytes of a deflated member of a zip; 0: they lie there as they are
    crc: int = -1  # of a member of a zip


def whole_file(path, name=None):
    return Member(name or path.name, str(path), 0, path.stat().st_size)


def open_member(member):
    """A file to read a member's bytes from; BadZipFile, EOFError or zlib.error tell of damage.

    zipfile is told where they lie: a zip's list of a million names is not read again for each.
    """
    file = open(member.path, "rb")
    file.seek(member.offset)
    if member.crc >= 0:
        info = zipfile.ZipInfo()
        info.file_size, info.compress_size = member.size, member.packed or member.size
        info.compress_type = zipfile.ZIP_DEFLATED if member.packed else zipfile.ZIP_STORED
        info.CRC = member.crc
        return zipfile.ZipExtFile(file, "r", info, close_fileobj=True)
    if member.offset == 0:
        return file
    with file:  # a tar
        return io.BytesIO(file.read(member.size))


def read_member(member):
    """The bytes of an image's file. Raises BadImage where they are not what was listed.

    Raises DataError where the file is gone: that is no damage.
    """
    if member.size < 0:
        raise BadImage("is a link to nothing: No such file")
    if member.size > MAX_IMAGE_BYTES:
        raise BadImage(f"declares {member.size:,} bytes: more than {MAX_IMAGE_BYTES:,} are refused")
    try:
        with open_member(member) as file:
            content = file.read(member.size + 1)
    except (EOFError, zlib.error, zipfile.BadZipFile):
        raise BadImage("is damaged: its checksum in the zip differs, or it ends early") from None
    except FileNotFoundError:
        raise DataError(f"{printable(member.path)}: is not there any more: has the source "
                        "changed?") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    if len(content) != member.size:
        raise BadImage(f"does not have the {member.size:,} bytes that it had or declares")
    return content


def is_stray(member):
    """Whether a file is no image by its name and none by its content."""
    if member.name.lower().endswith(IMAGE_SUFFIXES):
        return False
    if member.size <= 0:
        return True
    try:
        if member.crc >= 0:
            with open_member(member) as file:
                return not starts_like_image(file.read(32))
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            return not starts_like_image(file.read(min(32, member.size)))
    except (EOFError, zlib.error, zipfile.BadZipFile):
        return True


def list_members(path, work, limit=MAX_IMAGE_BYTES):
    """Yield a Member for each file in a folder, a tar, a zip or the tars in a folder or a tar.

    work: a folder for what must be unpacked. limit: bytes of a member of a zip. Hidden files are
    left out.
    """
    about = printable(path)
    if path.is_dir():
        yield from _in_folder(path)
        return
    if not path.is_file():
        raise DataError(f"{about}: neither a file nor a folder")
    with open(path, "rb") as file:
        head = file.read(512)
        unpack = next((_UNPACKERS[magic] for magic in _UNPACKERS if head.startswith(magic)), None)
        if head[257:262] == b"ustar" or path.suffix == ".tar":
            yield from _in_tar(file, path, about)
        elif head.startswith(b"PK"):
            yield from _in_zip(file, path, about, limit)
        elif unpack is None:
            yield whole_file(path)
        else:
            unpacked = work / f"unpacked-{place_key(path)}.tar"
            if not unpacked.exists():
                with damage(about, "packed tar"), unpack(path, "rb") as packed:
                    copy_stream(packed, unpacked, 2 ** 26 + 100 * path.stat().st_size, about)
            with open(unpacked, "rb") as tar:
                yield from _in_tar(tar, unpacked, about)


def files_in(folder, prefix="", above=()):
    """Yield a Member for each file in a folder, tars as they are; hidden ones are left out."""
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        name = prefix + path.name.replace("\\", "/")
        if _is_hidden(name):
            continue
        try:
            status = path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield Member(name, str(path), 0, -1)
            continue
        if stat.S_ISDIR(status.st_mode):
            if path.resolve() in above:
                raise DataError(f"{printable(path)}: a link to a folder that holds it")
            yield from files_in(path, f"{name}/", above)
        elif stat.S_ISREG(status.st_mode):
            yield Member(name, str(path), 0, status.st_size)
        else:
            raise DataError(f"{printable(path)}: neither a file nor a folder")


def _in_folder(folder):
    for member in files_in(folder):
        if member.size >= 0 and member.name.endswith(".tar"):
            with open(member.path, "rb") as file:
                yield from _in_tar(file, member.path, printable(member.path),
                                   f"{member.name[:-4]}/")
        else:
            yield member


def folder_digest(folder):
    """What tells a folder's files from others: how many, bytes, a digest of names and sizes.

    The sum of a hash of each: in whatever order they come, and however many they are.
    """
    files = total = digest = 0
    for member in files_in(folder):
        files, total = files + 1, total + max(0, member.size)
        line = f"{member.name}\n{member.size}".encode(errors="surrogateescape")
        digest += int.from_bytes(hashlib.sha256(line).digest(), "big")
    return {"files": files, "bytes": total, "names_and_sizes": f"{digest % 2 ** 256:064x}"}


def _is_hidden(name):
    return re.search(r"(^|/)(\.|__MACOSX(/|$))", name)


def _inside(name, about):
    """The name of an archive's member, with slashes; "" for one that is hidden."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise DataError(f"{about}: holds a member {printable(name)!r}, which points outside: it is "
                        "refused")
    name = re.sub("^(\\./)+", "", name.replace("\\", "/"))
    return "" if _is_hidden(name) else name


class _TarInfo(tarfile.TarInfo):
    """tarfile reads a header of any size into memory: here, one that holds names is small."""

    def _proc_member(self, tar):
        if self.type in _NAME_HEADERS and not 0 <= self.size <= MAX_NAME_BYTES:
            raise ValueError(f"a header of {self.size:,} bytes, and {MAX_NAME_BYTES:,} are allowed")
        return super()._proc_member(tar)


def _in_tar(file, path, about, prefix="", offset=0):
    """The members of a tar, which begins at an offset of the file `path`, and of the tars in it."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    with damage(about, "tar"):
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_TarInfo)
        while (info := tar.next()) is not None:
            tar.members.clear()  # or they would all stay in memory
            name = _inside(info.name, about)
            if info.size >= 0 and (info.isdir() or not name):
                continue
            if info.issparse() or not info.isreg() or info.size < 0:
                kind = "sparse file" if info.issparse() else _SPECIAL.get(info.type, "device")
                raise DataError(f"{about}: holds a {kind}, {printable(name or info.name)}: only "
                                "files are taken")
            if info.offset_data + info.size > end:
                raise DataError(f"{about}: {printable(name)} declares {info.size:,} bytes, more "
                                "than there are")
            if not name.endswith(".tar"):
                yield Member(prefix + name, str(path), offset + info.offset_data, info.size)
            elif offset:
                raise DataError(f"{about}: holds tars in tars in a tar ({printable(name)}): one "
                                "level is read")
            else:
                yield from _in_tar(tar.extractfile(info), path, f"{about} ({printable(name)})",
                                   f"{prefix}{name[:-4]}/", info.offset_data)
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile ends there without a word
            raise DataError(f"{about}: damaged or cut off at byte {tar.offset:,}: fetch it again")
        if end - tar.offset > MAX_EMPTY_BYTES:
            raise DataError(f"{about}: has {end - tar.offset:,} bytes after its end: cut them off")
        while rest := file.read(2 ** 20):
            if rest.strip(b"\0"):
                raise DataError(f"{about}: goes on after its end at byte {tar.offset:,}: is it two "
                                "tars in one?")


def _in_zip(file, path, about, limit):
    with damage(about, "zip"), zipfile.ZipFile(file) as archive:
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name = _inside(info.filename, about)
            if info.header_offset < end:
                raise DataError(f"{about}: {printable(name)} overlaps the member before it: it is "
                                "refused")
            end = info.header_offset + 30 + info.compress_size
            if not name or name.endswith("/"):
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                raise DataError(f"{about}: holds a link or device, {printable(name)}: only files "
                                "are taken")
            is_packed, size = info.compress_type == zipfile.ZIP_DEFLATED, info.file_size
            if info.flag_bits & 1 or not (is_packed or info.compress_type == zipfile.ZIP_STORED):
                raise DataError(f"{about}: {printable(name)} is encrypted or packed by a method "
                                "that is not deflate")
            if size > limit or is_bomb(size, info.compress_size):
                raise DataError(f"{about}: {printable(name)} declares {size:,} bytes in "
                                f"{info.compress_size:,}: refused")
            file.seek(info.header_offset + 26)
            skipped = sum(struct.unpack("<HH", file.read(4)))  # its name and more, once again
            yield Member(name, str(path), info.header_offset + 30 + skipped, size,
                         info.compress_size if is_packed else 0, info.CRC)


def is_bomb(size, packed):
    """Whether a file unpacks to more than any image or array does."""
    return size > 2 ** 24 + 200 * packed


@contextlib.contextmanager
def damage(about, kind):
    """The libraries raise nearly everything on damaged files; errors of a disk have a number."""
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{about}: needs more memory than there is") from None
    except Exception as error:
        if getattr(error, "errno", None):
            error.filename = error.filename or about
            raise
        raise DataError(f"{about}: not a whole {kind} ({printable(error)}): fetch it "
                        "again") from None


def place_key(path, offset=0):
    """A name for what was unpacked from a place in a file, as the file is now."""
    status = os.stat(path)
    place = repr((str(path), offset, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def copy_stream(stream, target, limit, about):
    """A stream of at most limit bytes into a file."""
    def write(file):
        while block := stream.read(2 ** 20):
            file.write(block)
            if file.tell() > limit:
                raise DataError(f"{about}: unpacks to more than {limit:,} bytes: refused")
    write_atomically(target, write)
