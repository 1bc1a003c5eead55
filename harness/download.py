"""A file of a web server, going on where an earlier try broke off: torch.hub's begins anew."""
import http.client
import os
import urllib.request

from harness.errors import DataError, printable
from harness.files import file_sha256

MAX_BYTES = 2 ** 32


def download(url, path, sha256=None):
    """Fetch a file, and compare its SHA-256 where one is given. Raises DataError."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    for _ in range(3):
        try:
            problem = _fetch(url, part, tag)
        except (http.client.HTTPException, OSError) as error:
            if getattr(error, "code", None) == 416:  # what is there is of another file
                part.unlink(missing_ok=True)
            problem = printable(f"{type(error).__name__}: {error}")
        if problem is None:
            break
    else:
        raise DataError(f"{url}: {problem}: the same command goes on, or give the file by --source")
    found = file_sha256(part)
    if sha256 and found != sha256:
        part.unlink()
        raise DataError(f"{url}: what came has SHA-256 {found[:12]}..., not {sha256[:12]}...: it "
                        "was removed; fetch it elsewhere and give it by --source")
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def _fetch(url, part, tag):
    """Fetch the rest of a file; returns where it broke off, or None.

    tag: a file with the server's mark of the version that the part is of: the rest of another
    version is not asked for.
    """
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"User-Agent": "jet-data"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": tag.read_text()}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            part.unlink(missing_ok=True)
            done = 0
        length = answer.headers.get("Content-Length") or ""
        total = done + int(length) if length.isdecimal() else None
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "W/"
        if not mark.startswith("W/"):  # a weak mark: equal bytes are not promised
            tag.write_text(mark)
        print(f"{url}: {f'{total - done:,} of {total:,}' if total else 'all'} bytes to fetch")
        with open(part, "ab") as file:
            while max(done, total or 0) <= MAX_BYTES and (block := answer.read(2 ** 16)):
                file.write(block)
                done += len(block)
    if max(done, total or 0) > MAX_BYTES:
        raise DataError(f"{url}: has more than {MAX_BYTES:,} bytes: refused")
    return None if total in (None, done) else f"broke off at {done:,} of {total:,} bytes"
