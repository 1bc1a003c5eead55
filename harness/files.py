"""Files that are whole or not there at all; what others may have put in their place is refused."""
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import time
import uuid
import zipfile

import numpy as np

from harness.errors import BusyError

LOCK_WAIT_S = 30  # for another process: what is done within a lock takes moments
NPZ_BYTES, NPZ_RATIO = 2 ** 28, 20  # an .npz may unpack to so much, and so many times its size
NPZ_ARRAYS = 10_000  # an .npz may hold so many
MAX_TEXT_BYTES = 2 ** 26  # of a text that is read whole: ours are far smaller
MAX_JSON_BYTES, MAX_JSON_DEPTH = 2 ** 24, 32  # in memory JSON takes many times its size
MAX_JSON_PARTS = 2 ** 20  # lists and objects: each takes far more memory than its two bytes


def open_regular(path, flags, mode=0o666):
    """os.open for a regular file: no device, no pipe that nobody writes to.

    Where it is to be written, no link either: it may point outside. Raises OSError.
    """
    is_written = flags & (os.O_WRONLY | os.O_RDWR)
    try:
        number = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if is_written else 0), mode)
    except OSError as error:
        if error.errno == errno.ELOOP and is_written:
            why = "is a link, and links are not written to"
            raise OSError(errno.ELOOP, why, str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return number


def read_bytes(path, max_bytes=MAX_TEXT_BYTES):
    """The content of a regular file. Raises OSError where it is none, or larger."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
        return file.read()


def read_end(path, max_bytes=2 ** 16):
    """The end of a regular file's text. Raises OSError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
        return file.read(max_bytes).decode(errors="replace")


def read_json(path, max_bytes=MAX_JSON_BYTES):
    """What a JSON file holds. Raises OSError, or ValueError for what is damaged."""
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text):
    """What a JSON text says. Raises ValueError for what is none, or nested more than ours are."""
    text = text.encode() if isinstance(text, str) else text  # numpy makes letters that are none
    if text.count(b"[") + text.count(b"{") > MAX_JSON_PARTS:
        raise ValueError(f"it has more than {MAX_JSON_PARTS:,} lists and objects")
    try:
        level = [value := json.loads(text)]
        for _ in range(MAX_JSON_DEPTH):
            level = [part for whole in level if isinstance(whole, (dict, list))
                     for part in (whole.values() if isinstance(whole, dict) else whole)]
        if not level:
            return value
    except RecursionError:
        pass
    raise ValueError("it is nested too deeply")


def write_atomically(path, content, check=lambda path: None):
    """Write a whole file (text, or what a function writes to it) or leave the old one as it is.

    check: called with the path of the new file before it takes the old one's place.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # of this process alone
    try:
        with named_in_errors(path):
            with open(temporary, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else content(file)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def named_in_errors(path):
    """A full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(path):
    """Within, no other process has this file locked; without a word where there are no locks.

    Raises BusyError where another one keeps it locked, as one that is suspended does.
    """
    with open(open_regular(path, os.O_RDWR | os.O_CREAT), "r+b") as lock:  # nothing is cut
        end = time.monotonic() + LOCK_WAIT_S
        while not take_lock(lock):
            if time.monotonic() >= end:
                raise BusyError(f"{path}: another process has had it locked for {LOCK_WAIT_S} s: "
                                "wait for that to end, let it go on (fg), or end it")
            time.sleep(0.02)
        yield


def take_lock(file):
    """Lock an open file; returns False where another process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True


def time_there(folder):
    """The time by the clock that the files of a folder have, the file server's.

    This machine's where nothing can be written.
    """
    path = folder / f".clock.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with open(path, "xb") as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
    with contextlib.suppress(OSError):
        path.unlink()
    return now


def remove_leftovers(folder, name="", older_than_s=0):
    """Remove what a kill within write_atomically left of a file, or of all files of a folder."""
    for path in folder.glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def check_npz(path):
    """Raise ValueError for an .npz file that unpacks to far more than its size, or says it does."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > NPZ_ARRAYS:
            raise ValueError(f"has {len(members):,} arrays, and {NPZ_ARRAYS:,} are allowed")
        limit = NPZ_BYTES + NPZ_RATIO * os.fstat(file.fileno()).st_size
        if (total := sum(member.file_size for member in members)) > limit:
            raise ValueError(f"unpacks to {total:,} bytes, and {limit:,} are allowed for its size")
        for member in members:
            with archive.open(member) as array:
                version = np.lib.format.read_magic(array)
                read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                        else np.lib.format.read_array_header_2_0)
                shape, _, dtype = read(array)
                if not dtype.itemsize:
                    raise ValueError(f"{member.filename} has values of no size")
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} is cut: shape {shape} needs more bytes")


def file_sha256(path, bar=None, start=0):
    """Hex SHA-256 of a file from a byte on. bar: is told how many were read."""
    digest = hashlib.sha256()
    with open(open_regular(path, os.O_RDONLY), "rb", buffering=0) as file:
        file.seek(start)
        while block := file.read(2 ** 22):
            digest.update(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()
