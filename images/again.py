"""The same command again: what a set, finished or begun, must have in common with it.

Manifest and state of a preparation are not trusted: the folder may be another's work.
"""
import json

from harness.errors import DataError, printable
from harness.files import file_sha256, read_json
from harness.progress import progress
from images.folder import MAX_MANIFEST_BYTES
from images.members import folder_digest
from images.sets import SPLITS

GREY = "-grey"  # the end of the variant where images have one channel
COUNTED = ("seen", "images", "enlarged", "grey")  # of a split


def describe(path, bar=None, sizes=None):
    """What tells a file or folder from another. sizes: a file of none of these is not read."""
    if path.is_dir():
        return {"folder": printable(path.name), **folder_digest(path)}
    size = path.stat().st_size
    sha256 = file_sha256(path, bar) if sizes is None or size in sizes else ""
    return {"file": printable(path.name), "bytes": size, "sha256": sha256}


def refuse_another(folder, manifest, request, flags, paths):
    """Raise DataError where a set is not what a command makes, and say by which flag.

    flags: {"--skip-corrupt": False, ...}. paths: what it would be made of, or None: a URL.
    """
    variant = manifest["variant"].removesuffix(GREY)
    is_ours = "seal" in manifest and manifest["name"] == request.full_name
    if not is_ours or variant != request.variant:
        raise DataError(f"{folder} holds {manifest['name']} (variant {manifest['variant']}), and "
                        f"this command makes {request.full_name} (variant {request.variant}): "
                        "choose another --out")
    if "flags" not in manifest:  # one of an older version
        return
    before = manifest["flags"]
    changed = [f"{flag} was {printable(before.get(flag), 50)} and is now {value}"
               for flag, value in flags.items() if before.get(flag) != value]
    if paths and not changed:
        changed = _other_sources(manifest["sources"], paths)
    if changed:
        raise DataError(f"{folder}: was prepared with other settings: {'; '.join(changed)}: give "
                        f"the same command, choose another --out, or remove {folder} to prepare it "
                        "again")


def _other_sources(known, paths):
    """What differs, in words, between the sources of a manifest and files and folders."""
    known = [origin for origin in known if "images" not in origin]
    if len(paths) != len(known):
        return [f"--source was {len(known)} files or folders and is now {len(paths)}"]
    with progress(desc="compare the source", unit="B") as bar:
        found = [describe(path, bar, [before.get("bytes")]) for path, before in zip(paths, known)]
    new = [printable(path) for path, before, now in zip(paths, known, found)
           if {**before, "file": "", "folder": ""} != {**now, "file": "", "folder": ""}]
    more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
    return [f"--source {new[0]}{more} is another, or has changed since"] if new else []


def refuse_links(work):
    """Raise DataError where what is to be written would be written elsewhere."""
    for path in [work, *(work.iterdir() if work.is_dir() else ())]:
        if path.is_symlink() or path.exists() and not (path == work or path.is_file()):
            raise DataError(f"{printable(path)}: is a link or no file, and not what a preparation "
                            f"leaves: remove {printable(work)} to begin again")


def as_text(content, **settings):
    """JSON that can be read back."""
    text = json.dumps(content, **settings)
    if len(text) > MAX_MANIFEST_BYTES:
        raise DataError(f"{len(content['skipped']):,} files are left out, more than can be "
                        "recorded: is it the right source?")
    return text


def read_state(path, flags):
    """(the state of a preparation that was begun, which flags must be as they were then).

    Raises DataError where it is damaged.
    """
    try:
        state = read_json(path, MAX_MANIFEST_BYTES)
        state = {"flags": flags, "channels": 3, **state}  # one of an older version
        splits = {split: {"grey": 0, **state["splits"][split]} for split in SPLITS}
        numbers = [split[name] for split in splits.values() for name in COUNTED]
        is_whole = (
            all(type(number) is int and 0 <= number < 2 ** 48 for number in numbers)
            and all(isinstance(state[name], dict) for name in ("request", "flags"))
            and isinstance(state["skipped"], list) and state["channels"] in (None, 1, 3)
            and isinstance(state["archives"], list | None)
            and isinstance(state["held_out_share"], float | None))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise DataError(f"{path} is damaged: remove {path.parent} to begin again")
    fixed = ["--enlarge-small"] if state["skipped"] or any(
        split["enlarged"] for split in splits.values()) else []
    if state["skipped"]:  # else --skip-corrupt may be added: no image was damaged so far
        fixed.append("--skip-corrupt")
    return state | {"splits": splits}, fixed
