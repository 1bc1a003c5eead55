"""Files that are whole or not there at all."""
import contextlib
import fcntl
import hashlib
import os
import time
import uuid


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
    """Within, no other process has this file locked; without a word where there are no locks."""
    with open(path, "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder, name="", older_than_s=0):
    """Remove what a kill within write_atomically left of a file, or of all files of a folder."""
    for path in folder.glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def file_sha256(path, bar=None, start=0):
    """Hex SHA-256 of a file from a byte on. bar: is told how many were read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while block := file.read(2 ** 22):
            digest.update(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()
