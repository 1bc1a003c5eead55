"""Image sets prepared once: from a source as it is published to a folder of .npy files that is verified for ever.

    python data.py list                                                   # all known sets, and what is here
    python data.py prepare imagenet64-oord --source DIR --out sets/imagenet64-oord
    python data.py prepare photos --source photos.zip --size 64 --filter lanczos --out sets/photos
    python data.py verify sets/photos
    python data.py show sets/photos sheet.png

A prepared folder: train.npy and test.npy, uint8 (N, H, W, 3); train_labels.npy and test_labels.npy, int64 (N,), where
the source has numbers for labels; train_checksums.npy and test_checksums.npy, the first 8 bytes of the SHA-256 of each
image (and label), by which `verify` finds the image that was altered; and manifest.json, written last. Until then all
is in the folder partial/ inside. Images are taken in a fixed order, decoded by all cores and appended, so a run that
was killed goes on where it was and ends with the same bytes, whatever the number of workers.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

import sources
from data import (CIFAR10_FILES, CIFAR10_FOLDER, CIFAR10_PARTS, FINGERPRINTS, SETS, SPLITS, DataError, fingerprint,
                  load_images)
from run_folder import BusyError, Claim, write_atomically
from sources import BadImage, Batches, Files, Parquet, shown, walk

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVES = {  # SHA-256 where known
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "train_64x64.tar": "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
    "valid_64x64.tar": "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
}
HELD_OUT = {"imagenet21k": 1 / 256}  # the share of images that are the test split; others: --test-share
PARTIAL, STATE, MANIFEST = "partial", "state.json", "manifest.json"
NUMBERS = {"labels": "<i8", "checksums": "<u8"}  # files of one number an image
SAVE_EVERY_S = 1
HEADER_BYTES = 128
BLOCK = 2048  # images hashed at a time


@dataclasses.dataclass(frozen=True)
class Request:
    """What a set is made of; equal requests make equal bytes."""
    name: str
    variant: str
    size: int
    resample: str | None
    counts: dict  # known ones, else None
    incomplete: bool
    test_share: float | None

    @property
    def full_name(self):
        return self.name + "-incomplete" * self.incomplete


def make_request(name, size=None, resample=None, incomplete=False, test_share=None):
    """Raises DataError for what does not fit together."""
    if name in SETS:
        family = name.split("-")[0]
        if name.startswith("cifar10-"):
            raise DataError(f"{name} needs no preparation: it comes with "
                            f"{'this repository' if 'subset' in name else 'cifar10: prepare that'}")
        known = SETS[name]
        own = known.variant if known.variant in sources.FILTERS else None
        for flag, given, allowed in (("size", size, known.shape[0]), ("filter", resample, own),
                                     ("test-share", test_share, None)):
            if given not in (None, allowed):
                raise DataError(f"--{flag} {given}: {name} has its own ({allowed or 'none'}): leave the flag out, or "
                                "choose a name of your own")
        return Request(name, known.variant, known.shape[0], own, known.counts, incomplete, HELD_OUT.get(family))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name.endswith("-incomplete") or name.startswith(
            ("imagenet32", "imagenet64", "imagenet1k", "imagenet21k", "cifar10")):
        near = [known for known in SETS if known.startswith(name)] or [
            known for known in SETS if not known.startswith("cifar10-")]
        raise DataError(f"{shown(name)!r} is no known set ({', '.join(near)}); a name of your own has letters, digits, "
                        "'.', '_' and '-', and does not begin like a known one")
    if size is None:
        raise DataError(f"{name} is a name of your own: give the size of its images by --size, like --size 64")
    if not 1 <= size <= 4096:
        raise DataError(f"--size {size}: must be 1 to 4096 pixels")
    share = 0.1 if test_share is None else test_share
    if not 0 < share < 1:
        raise DataError(f"--test-share {share:g}: must be between 0 and 1")
    if incomplete:
        raise DataError(f"--incomplete is for known sets; of {name} no counts are known")
    variant = f"{size}px" + (f"-{resample}" if resample else "")
    return Request(name, variant, size, resample, dict.fromkeys(SPLITS), False, share)


# ---- finding the source

def open_source(request, paths, work):
    """(Files, Batches or Parquet, the archives that it consists of) of what the user gave. Raises DataError."""
    for path in paths:
        if not path.exists():
            raise DataError(f"--source {shown(path)}: there is no such file or folder")
    if request.name == "cifar10":
        return _open_cifar10(request, paths, work)
    if request.variant == "chrabaszcz":
        return _open_chrabaszcz(request, paths, work)
    tables = [file for path in paths for folder in (path, path / "data") for file in sorted(
        folder.glob("*.parquet") if folder.is_dir() else [folder] * (folder.suffix == ".parquet"))]
    if tables or request.variant == "parquet":
        return _open_parquet(request, paths, tables)
    size = request.size
    if request.variant == "oord":
        names = {"train": (f"train_{size}x{size}.tar", f"train_{size}x{size}"),
                 "test": (f"valid_{size}x{size}.tar", f"valid_{size}x{size}")}
    elif request.name.startswith("imagenet1k"):
        names = {"train": ("ILSVRC2012_img_train.tar", "train.tar", "train"),
                 "test": ("ILSVRC2012_img_val.tar", "val.tar", "val", "validation", "valid")}
    else:
        names = None
    files = Files(work / "files.sqlite")
    if names:
        roots = {split: _find(paths, split, names[split], request) for split in SPLITS}
    elif len(paths) == 1 or request.name in SETS:
        roots = {"": paths}
    else:
        raise DataError(f"--source: {request.name} is made from one folder, tar or zip, not from {len(paths)}")
    return files, roots, [root for split in roots.values() for root in split if root.is_file()]


def _find(paths, split, names, request):
    inside = [Path(), Path("ILSVRC/Data/CLS-LOC"), Path("Data/CLS-LOC")]
    for name in names:
        for path in paths:
            if path.name == name:
                return [path]
            for folder in inside:
                if (path / folder / name).exists():
                    return [path / folder / name]
    raise DataError(f"{request.name}: {split} is needed as {' or '.join(names)}, and {', '.join(map(shown, paths))} "
                    f"{'is' if len(paths) == 1 else 'are'} or has no such file or folder")


def _batches(paths, pattern, work):
    """{(split, number): Member} of what has the name of a batch in folders, tars and zips."""
    found, archives = {}, []

    def look(members):
        for member in members:
            name = member.name.rpartition("/")[2]
            if match := pattern.fullmatch(name):
                key = ("test" if match["test"] else "train", int(match["number"] or 0))
                if key in found:
                    raise DataError(f"{shown(member.path)}: a second {name}, beside that of {shown(found[key].path)}: "
                                    "give one of them")
                found[key] = member
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders.sort()
                for name in sorted(names):
                    inner = Path(folder) / name
                    if pattern.fullmatch(name):
                        look(walk_file(inner))
                        archives.append(inner)
                    elif re.fullmatch(r"(?i)imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar)", name):
                        look(_archive(inner, work))
                        archives.append(inner)
        else:
            look(_archive(path, work))
            archives.append(path)
    return found, archives


def walk_file(path):
    if not path.is_file():
        raise DataError(f"{shown(path)}: no file")
    yield sources.Member(path.name, str(path), 0, path.stat().st_size)


def _archive(path, work):
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and path.suffix != ".npz":
        yield from sources.walk_zip(next(walk_file(path)), limit=sources.MAX_BATCH_BYTES)
    elif path.suffix == ".npz":
        yield from walk_file(path)
    else:
        yield from walk(path, work)


def _open_cifar10(request, paths, work):
    pattern = re.compile(r"(?:data_batch_(?P<number>[1-5])|(?P<test>test_batch))(?:\.bin)?")
    found, archives = _batches(paths, pattern, work)
    needed = [("train", number) for number in range(1, 6)] + [("test", 0)]
    missing = [f"data_batch_{number}" if number else "test_batch" for split, number in needed if (split, number) not in found]
    if missing:
        raise DataError(f"cifar10: {', '.join(missing)} (.bin or the pickle) {'is' if len(missing) == 1 else 'are'} not in "
                        f"{', '.join(map(shown, paths))}: give the folder {CIFAR10_FOLDER}, cifar-10-batches-py or their "
                        "archive")
    batches = {split: [] for split in SPLITS}
    for key in needed:
        batch = sources.open_batch(found[key], 32, work)
        official = CIFAR10_FILES[key[0]][f"data_batch_{key[1]}.bin" if key[1] else "test_batch.bin"]
        if not request.incomplete and _records_sha256(batch) != official:
            raise DataError(f"cifar10: {shown(found[key].name)} of {shown(found[key].path)} is altered or has other images "
                            f"({batch.count:,} of them; the SHA-256 of its records is not the official one): fetch it again")
        batches[key[0]].append(batch)
    return Batches(batches, 32), None, archives


def _records_sha256(batch):
    """SHA-256 of a batch of CIFAR-10 as it stands in the official binary file."""
    if batch.label_bytes:
        return sources.file_sha256(batch.path, batch.offset, batch.count * 3073)
    if batch.labels is None:
        return None
    with open(batch.path, "rb") as file:
        file.seek(batch.offset)
        rows = np.frombuffer(file.read(batch.count * 3072), np.uint8).reshape(batch.count, 3072)
    return hashlib.sha256(np.concatenate([batch.labels.astype(np.uint8)[:, None], rows], axis=1)).hexdigest()


def _open_chrabaszcz(request, paths, work):
    found, archives = _batches(paths, re.compile(
        r"(?:train_data_batch_(?P<number>\d{1,3})|(?P<test>val_data))(?:\.npz|\.pkl|\.pickle)?"), work)
    batches = {split: [sources.open_batch(found[key], request.size, work) for key in sorted(found) if key[0] == split]
               for split in SPLITS}
    size = request.size
    for split, name, archive in (("train", "train_data_batch_1 to 10", f"Imagenet{size}_train*.zip"),
                                 ("test", "val_data", f"Imagenet{size}_val.zip")):
        if not batches[split]:
            raise DataError(f"{request.name}: no {name} (pickles or .npz, loose or in {archive}) in "
                            f"{', '.join(map(shown, paths))}")
    return Batches(batches, size), None, archives


def _open_parquet(request, paths, tables):
    if not tables:
        raise DataError(f"{request.name}: no .parquet files in {', '.join(map(shown, paths))}")
    groups = {}
    for file in tables:
        word = re.match(r"[A-Za-z]*", file.name)[0]
        groups.setdefault(word, []).append(file)
    test = [word for word in ("validation", "valid", "val", "test") if word in groups]
    if request.name in SETS:
        test = test[:1]  # ImageNet's test images have no labels and are not the paper's
    if "train" not in groups or len(test) != 1 or not request.name in SETS and len(groups) > 2:
        raise DataError(f"{request.name}: of the parquet files some must be named train-… and some validation-… or test-…; "
                        f"there are {', '.join(shown(file.name) for file in tables[:3])}{', …' * (len(tables) > 3)}")
    source = Parquet({"train": groups["train"], "test": groups[test[0]]})
    return source, None, groups["train"] + groups[test[0]]


def list_files(request, files, roots, work):
    """Take down the files of a source in their splits, sets of ImageNet by their base names. Returns the share that was
    held out for test, or None where the source has its splits."""
    known = request.name in SETS

    def members():
        for split, paths in roots.items():
            for path in paths:
                for member in walk(path, work):
                    yield split, member.name.rpartition("/")[2] if known else member.name, member, path
    files.list(_bar(members(), "list", unit=" files"))
    held_out = "" in roots and (known or not files.split_by_folder())
    if held_out:
        files.hold_out(request.test_share)
    return request.test_share if held_out else None


def check_counts(request, counts):
    for split in SPLITS:
        if not counts[split]:
            raise DataError(f"{request.name}: there are no {split} images in the source")
    if request.incomplete:
        return
    wrong = [split for split in SPLITS if request.counts[split] not in (None, counts[split])]
    if wrong:
        other = [name for name, known in SETS.items() if any(known.counts[split] == counts[split] for split in wrong)
                 and known.shape[0] == request.size and not name.startswith("cifar10-")]
        told = ", ".join(f"{counts[split]:,} {split} images, not {request.counts[split]:,}" for split in wrong)
        likely = f"likely another variant: {', '.join(other)}" if other else "a part is missing, or it is another set"
        raise DataError(f"{request.name}: the source has {told}: {likely}. --incomplete prepares it as "
                        f"{request.name}-incomplete, which is no evidence for {request.name}")


# ---- the work

def _bar(iterable=None, desc=None, **settings):
    return Bar(iterable, desc, **{"unit": " images", **settings})


_interrupted, _pooling = threading.Event(), threading.Event()  # Ctrl-C came; workers are at it


class Bar(tqdm):
    """A progress bar on a terminal; elsewhere a line every 30 s."""

    def __init__(self, iterable=None, desc=None, **settings):
        self.tells = not sys.stderr.isatty()
        self.told = time.monotonic()
        super().__init__(iterable, desc, disable=self.tells, smoothing=0.05, dynamic_ncols=True,
                         **{"unit_scale": True, **settings})
        if self.tells:
            self.done, self.total, self.desc = settings.get("initial", 0), settings.get("total"), desc
            self.begun = (time.monotonic(), self.done)

    def __iter__(self):
        if not self.tells:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, n=1):
        if _interrupted.is_set():
            raise KeyboardInterrupt
        if not self.tells:
            return super().update(n)
        self.done += n
        if (now := time.monotonic()) - self.told > 30:
            self.told, rate = now, (self.done - self.begun[1]) / (now - self.begun[0])
            of = f" of {self.total:,}, {(self.total - self.done) / max(rate, 1e-9):,.0f} s left" if self.total else ""
            print(f"{self.desc}: {self.done:,}{of}, {rate:,.0f} a second", flush=True)


def _start_worker(parent):
    """A worker ends when the process that started it has ended, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _work(function, piece, settings):
    return function(piece, *settings)


class Split:
    """A split that is being made: files that grow, and how much of them is whole."""

    def __init__(self, work, split, size, state):
        self.split, self.image_bytes, self.state = split, 3 * size * size, state
        self.files = {}
        for suffix, width, begin in ((".npy", self.image_bytes, HEADER_BYTES), ("_labels.raw", 8, 0), ("_digests.raw", 32, 0)):
            file = open(work / f"{split}{suffix}", "ab")
            whole = begin + width * state["images"]
            if file.tell() < whole and (suffix == ".npy" or file.tell()):
                if state["images"]:
                    raise DataError(f"{work / split}{suffix} is shorter than {STATE} says: remove {work} to begin again")
                file.write(bytes(begin))
            file.truncate(whole if file.tell() else 0)
            self.files[suffix] = file

    def add(self, seen, pixels, labels, digests, enlarged):
        count = len(pixels) // self.image_bytes
        self.files[".npy"].write(pixels)
        if labels is not None:
            self.files["_labels.raw"].write(np.asarray(labels, "<i8").tobytes())
        if digests is not None:
            self.files["_digests.raw"].write(digests)
        self.state["seen"] += seen
        self.state["images"] += count
        self.state["enlarged"] += enlarged

    def flush(self, sync=True):
        for file in self.files.values():
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def close(self):
        for file in self.files.values():
            file.close()


def prepare(request, paths, out, workers, skip_corrupt=False, enlarge=False, tell=print):
    """Make a set, or go on with it; returns its manifest. Raises DataError (one line; nothing is lost), BusyError."""
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest.get("name") != request.full_name or manifest.get("variant") != request.variant:
            raise DataError(f"{out} holds {manifest.get('name')} (variant {manifest.get('variant')}): choose another --out")
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        tell(f"{out}: prepared already; `verify` checks it")
        return manifest
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: is a file, and must be a folder")
    if out.exists() and (others := sorted(set(os.listdir(out)) - {PARTIAL})) and not (out / PARTIAL / MANIFEST).exists():
        raise DataError(f"--out {out}: is not empty ({shown(others[0])}), and no set that was begun: choose a new folder")
    work = out / PARTIAL
    claim = Claim(work)
    claim.take()
    try:
        if not (work / MANIFEST).exists():
            _make(request, paths, work, workers, skip_corrupt, enlarge, tell)
        return _publish(out, work)
    except sqlite3.Error as error:
        raise DataError(f"{work / 'files.sqlite'}: {error} (is the disk full?): the same command goes on when this is "
                        "mended") from None
    finally:
        claim.release()
        if (out / MANIFEST).exists() or not any(work.glob("*.json")) and not any(work.glob("*.gz*")):
            shutil.rmtree(work, ignore_errors=True)  # all is done, or nothing was begun
            with contextlib.suppress(OSError):
                out.rmdir()


def _make(request, paths, work, workers, skip_corrupt, enlarge, tell):
    wanted = {**dataclasses.asdict(request), "sources": [_stat(path) for path in paths]}
    state = _read_state(work, wanted)
    if state is None:
        state = {"request": wanted, "listed": False, "held_out_share": None, "archives": None,
                 "splits": {split: {"seen": 0, "images": 0, "enlarged": 0} for split in SPLITS}, "skipped": []}

    def save():
        write_atomically(work / STATE, json.dumps(state))
    url = CIFAR10_URL if not paths else str(paths[0]) if _is_url(paths[0]) else None
    if url:
        paths = [work / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{shown(url.rpartition('/')[2])[:80]}.gz"]
        if not paths[0].exists():
            sources.download(url, paths[0], ARCHIVES["cifar-10-binary.tar.gz"] if url == CIFAR10_URL else None, tell)
    try:
        source, roots, archives = open_source(request, paths, work)
    except DataError:
        if url:  # so that it is fetched again
            paths[0].unlink(missing_ok=True)
        raise
    if roots is not None and not state["listed"]:
        state["held_out_share"] = list_files(request, source, roots, work)
    counts = {split: source.count(split) for split in SPLITS}
    check_counts(request, counts)
    if state["archives"] is None:
        state["archives"] = _checksums(request, archives)
        state["listed"] = True
        save()
    settings = (request.size, request.resample, enlarge)
    fork = "fork" if sys.platform == "linux" else "spawn"
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context(fork), _start_worker,
                                                (os.getpid(),)) as pool:
        _pooling.set()
        try:
            for split in SPLITS:
                _make_split(request, source, split, counts[split], state, save, pool, workers, settings, skip_corrupt, work)
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError("a worker process was ended (is memory short? fewer --workers need less): the same command "
                            "goes on") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            pool.shutdown()
            _pooling.clear()
    _seal(request, state, roots, work, counts)


def _read_state(work, wanted):
    if not (work / STATE).exists():
        return None
    try:
        state = json.loads((work / STATE).read_text())
        begun = state["request"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{work / STATE} is damaged: remove {work} to begin again") from None
    if begun != json.loads(json.dumps(wanted)) and not any(split["images"] for split in state["splits"].values()):
        return None  # nothing is lost
    if begun != json.loads(json.dumps(wanted)):
        changed = [key for key in wanted if begun.get(key) != json.loads(json.dumps(wanted[key]))]
        raise DataError(f"{work}: was begun as {begun.get('name')} with another {' and '.join(changed)} (or its files have "
                        f"changed since): give the same command, another --out, or remove {work} to begin again")
    return state


def _is_url(path):
    return re.match("https?://", str(path)) is not None


def _stat(path):
    if _is_url(path):
        return str(path)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"--source {shown(path)}: {error.strerror}") from None
    return [str(path.resolve()), *((status.st_size, status.st_mtime_ns) if path.is_file() else ())]


def _checksums(request, archives):
    """[{"file", "bytes", "sha256"}] of the archives, compared with those that are known."""
    found = []
    with _bar(desc="checksums", total=sum(path.stat().st_size for path in archives), unit="B") as bar:
        for path in archives:
            sha256, known = sources.file_sha256(path, bar=bar), ARCHIVES.get(path.name)
            if known and sha256 != known and not request.incomplete and request.variant == "oord":
                raise DataError(f"{shown(path)} is not the known archive: its SHA-256 is {sha256[:12]}…, not {known[:12]}…: "
                                "fetch it again, or prepare another variant")
            found.append({"file": shown(path.name), "bytes": path.stat().st_size, "sha256": sha256})
    return found


def _make_split(request, source, split, total, state, save, pool, workers, settings, skip_corrupt, work):
    progress = state["splits"][split]
    if progress["seen"] == total:
        return
    growing = Split(work, split, request.size, progress)
    pieces, pending, saved = source.pieces(split, progress["seen"]), [], time.monotonic()

    def submit():
        for function, piece in pieces:
            pending.append(pool.submit(_work, function, piece, settings))
            return
    try:
        with _bar(desc=split, total=total, initial=progress["seen"]) as bar:
            for _ in range(2 * workers + 2):
                submit()
            while pending:
                pixels, labels, digests, enlarged, bad = pending.pop(0).result()
                submit()
                seen = len(pixels) // growing.image_bytes + len(bad)
                if bad and not skip_corrupt:
                    raise DataError(f"{split}: {shown(bad[0][1])} {bad[0][2]} (--skip-corrupt leaves such files out and "
                                    "records each; the same command goes on)")
                growing.add(seen, pixels, labels, digests, enlarged)
                state["skipped"] += [{"split": split, "file": shown(name), "reason": reason} for _, name, reason in bad]
                bar.update(seen)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    growing.flush()
                    save()
                    saved = time.monotonic()
        if progress["seen"] != total:
            raise DataError(f"{split}: {progress['seen']:,} images came, where {total:,} were listed: has the source changed?")
    finally:  # what came before an error is whole
        growing.flush()
        save()
        growing.close()


# ---- the end: checksums, manifest, into place

def npy_header(shape, kind="|u1"):
    """The first 128 bytes of a .npy file of this shape, format version 1.0."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.ljust(HEADER_BYTES - 11).encode() + b"\n"


def read_blocks(path, shape, desc):
    """Yield blocks of images of a .npy file, read, not mapped: a map counts as memory."""
    with open(path, "rb") as file, _bar(desc=desc, total=shape[0]) as bar:
        file.seek(HEADER_BYTES)
        image_bytes = int(np.prod(shape[1:]))
        for start in range(0, shape[0], BLOCK):
            count = min(BLOCK, shape[0] - start)
            block = file.read(count * image_bytes)
            if len(block) != count * image_bytes:
                raise DataError(f"{path}: cut off in image {start + len(block) // image_bytes:,}")
            yield start, np.frombuffer(block, np.uint8).reshape(count, image_bytes)
            bar.update(count)


def hash_images(path, shape, labels, desc):
    """(fingerprint, first 8 bytes of each image's SHA-256, the same with its label) of a split."""
    whole = hashlib.sha256(",".join(map(str, shape)).encode() + b"\n")
    pixels, rows = np.empty(shape[0], "<u8"), np.empty(shape[0], "<u8")
    for start, block in read_blocks(path, shape, desc):
        whole.update(block)
        for place, image in enumerate(block, start):
            digest = hashlib.sha256(image)
            pixels[place] = rows[place] = int.from_bytes(digest.digest()[:8], "little")
            if labels is not None:
                digest.update(int(labels[place]).to_bytes(8, "little", signed=True))
                rows[place] = int.from_bytes(digest.digest()[:8], "little")
    return whole.hexdigest(), pixels, rows


def images_in_both(work, shapes, pixels):
    """How many images of each split are, to the last pixel, in the other one too, and how many different ones."""
    both = np.intersect1d(pixels["train"], pixels["test"])  # equal in 64 bits; now exactly
    digests = {}
    for split in SPLITS:
        array = np.load(work / f"{split}.npy", mmap_mode="r")
        digests[split] = [hashlib.sha256(array[place]).digest() for place in np.flatnonzero(np.isin(pixels[split], both))]
    same = set(digests["train"]) & set(digests["test"])
    return {"different": len(same), **{split: sum(digest in same for digest in digests[split]) for split in SPLITS}}


def _seal(request, state, roots, work, counts):
    from train import git_commit
    shapes, prints, pixels, files = {}, {}, {}, {}
    labelled = all((work / f"{split}_labels.raw").stat().st_size == 8 * state["splits"][split]["images"] for split in SPLITS)
    for split in SPLITS:
        count = state["splits"][split]["images"]
        if not count:
            raise DataError(f"{split}: no image could be taken")
        shapes[split] = (count, request.size, request.size, 3)
        with open(work / f"{split}.npy", "rb+") as file:
            file.write(npy_header(shapes[split]))
        labels = np.fromfile(work / f"{split}_labels.raw", "<i8") if labelled else None
        prints[split], pixels[split], rows = hash_images(work / f"{split}.npy", shapes[split], labels, f"hash {split}")
        if not request.incomplete and FINGERPRINTS.get((request.name, split), prints[split]) != prints[split]:
            raise DataError(f"{request.name} {split}: the fingerprint is {prints[split][:12]}…, not the known one: the source "
                            "is altered")
        for kind, array in (("checksums", rows), ("labels", labels)):
            if array is not None:
                name = f"{split}_{kind}.npy"
                write_atomically(work / name, lambda file: file.write(npy_header(array.shape, NUMBERS[kind]) + array.tobytes()))
                files[name] = sources.file_sha256(work / name)
    if prints["train"] == prints["test"]:
        raise DataError("train and test are the same images: give the folder that holds both splits")
    origins = list(state["archives"])
    if roots is not None:
        for split in SPLITS:
            origins.append({"images": split, "files": state["splits"][split]["images"],
                            "sha256_of_their_sha256": sources.file_sha256(work / f"{split}_digests.raw")})
    commit = git_commit()
    manifest = {
        "name": request.full_name, "variant": request.variant, "filter": request.resample,
        "shape": [request.size, request.size, 3], "counts": {split: shapes[split][0] for split in SPLITS},
        "fingerprints": prints, "images_in_both_splits": images_in_both(work, shapes, pixels),
        "sources": origins, "source_counts": counts,
        "held_out_share": state["held_out_share"],
        "enlarged": {split: state["splits"][split]["enlarged"] for split in SPLITS}, "skipped": state["skipped"],
        "checksums": files,
        "tool": {"commit": commit[0], "tree": commit[1], "python": platform.python_version(), "numpy": np.__version__,
                 "pillow": PIL.__version__, "libjpeg": features.version("libjpeg_turbo") or features.version("jpg")},
    }
    write_atomically(work / MANIFEST, json.dumps({**manifest, "seal": seal(manifest)}, indent=1) + "\n")


def seal(manifest):
    """SHA-256 of a manifest without its seal, as JSON with sorted keys."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _publish(out, work):
    """Move the files of a set that is whole into their place, the manifest last."""
    manifest = read_manifest(work)
    for name in (*(f"{split}.npy" for split in SPLITS), *manifest["checksums"]):
        if (work / name).exists():
            os.replace(work / name, out / name)
    os.replace(work / MANIFEST, out / MANIFEST)
    return manifest


def read_manifest(folder):
    """A manifest that is what was written. Raises DataError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if "seal" in manifest and manifest["seal"] != seal(manifest):
            raise DataError(f"{path}: was altered (it no longer fits its seal): prepare the set again")
        return manifest
    except FileNotFoundError:
        unfinished = (folder / PARTIAL).is_dir()
        raise DataError(f"{folder}: " + ("is not finished: give the command that began it again" if unfinished else
                                         "no manifest.json: not a prepared set")) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({type(error).__name__}): prepare the set again") from None


# ---- verify, show, list

def verify(folder, tell=print):
    """Compare every file of a set with its manifest. Raises DataError that says which image of which split differs."""
    manifest = read_manifest(folder)
    known_as = str(manifest.get("name"))
    problems = []
    for split in SPLITS:
        try:
            shape = (int(manifest["counts"][split]), *map(int, manifest["shape"]))
            expected = manifest["fingerprints"][split]
        except (KeyError, TypeError, ValueError):
            images = load_images(folder, split)  # written by hand: name, variant and fingerprints alone
            shape, expected = images.array.shape, images.known_fingerprint
        problems += _verify_split(folder, split, manifest, shape, expected)
        official = FINGERPRINTS.get((known_as, split))
        if official and official != expected:
            problems.append(f"{split}: the manifest's fingerprint is not that of {known_as}")
        if not problems:
            tell(f"{split}: {shape[0]:,} images of {shape[1]}x{shape[2]}, fingerprint {expected}"
                 f"{' (the known one)' if official else ''}")
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}: prepare the set again")
    tell(f"{folder}: {known_as}, variant {manifest.get('variant')}: every byte is as it was prepared")


def _verify_split(folder, split, manifest, shape, expected):
    """What is wrong with a split, in words."""
    problems, path = [], folder / f"{split}.npy"
    sealed = manifest.get("checksums", {})
    names = {kind: f"{split}_{kind}.npy" for kind in NUMBERS}
    arrays = {kind: _numbers(folder / name, kind, shape[0], sealed[name], problems) for kind, name in names.items()
              if name in sealed}
    try:
        header = path.open("rb").read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        return [f"{path.name}: {error.strerror}"]
    if sealed and header != npy_header(shape):
        problems.append(f"{path.name}: its header was altered (before image 0)")
    if sealed and size != HEADER_BYTES + np.prod(shape):
        return [*problems, f"{path.name}: has {size:,} bytes, not {HEADER_BYTES + np.prod(shape):,}: from image "
                f"{max(0, size - HEADER_BYTES) // int(np.prod(shape[1:])):,} on it is not what it was"]
    if not sealed:
        found = fingerprint(load_images(folder, split).array)
        return [] if found == expected else [f"{path.name} does not have its fingerprint"]
    found, pixels, rows = hash_images(path, shape, arrays.get("labels"), f"verify {split}")
    stored = arrays.get("checksums")
    if stored is None or len(stored) != len(rows):
        return problems + [f"{path.name} was altered"] * (found != expected)
    differ = np.flatnonzero(stored != rows)
    if len(differ):
        label = any(problem.startswith(names["labels"]) for problem in problems)
        what = "the pixels" if found != expected else "the label" if label else "the checksum"
        problems.append(f"{split}: {what} of image {', '.join(map(str, differ[:5]))}{', …' * (len(differ) > 5)} "
                        f"({len(differ):,} in all) {'was' if len(differ) == 1 else 'were'} altered")
    elif found != expected:
        problems.append(f"{split}: the fingerprint in the manifest is another")
    return problems


def _numbers(path, kind, count, sha256, problems):
    """The numbers of a file, as far as they are there; what is wrong with it is added to the problems."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        size = HEADER_BYTES + 8 * count
        problems.append(f"{path.name} " + (
            "is missing" if not path.exists() else f"has {len(content):,} bytes, not {size:,}" if len(content) != size else
            "was altered" if content[:HEADER_BYTES] == npy_header((count,), NUMBERS[kind]) else
            "was altered: its header was altered (before image 0)"))
    return np.frombuffer(content[HEADER_BYTES:].ljust(8 * count, b"\0"), NUMBERS[kind], count)


def show(name_or_folder, path, columns=16, rows=4, root=None):
    """Draw a contact sheet: images of each split, at equal distances through it, and what set they are."""
    scale, gap, blocks = None, 2, []
    for split in SPLITS:
        images = load_images(name_or_folder, split, root)
        count = min(columns * rows, len(images.array))
        picked = np.linspace(0, len(images.array) - 1, count).round().astype(int)
        scale = scale or max(1, 64 // images.array.shape[1])
        blocks.append((images, [np.repeat(np.repeat(images.array[place], scale, 0), scale, 1) for place in picked]))
    height, width = blocks[0][1][0].shape[:2]
    line, margin = 22, 12
    sheet_rows = [-(-len(pictures) // columns) for _, pictures in blocks]
    sheet = Image.new("RGB", (2 * margin + columns * (width + gap) - gap,
                              2 * margin + sum(2 * line + count * (height + gap) + 8 for count in sheet_rows)), "white")
    draw, y = ImageDraw.Draw(sheet), margin
    font = ImageFont.load_default(14)
    for (images, pictures), count in zip(blocks, sheet_rows):
        shape = images.array.shape
        draw.text((margin, y), f"{images.name}, variant {images.variant}: {images.split}, {shape[0]:,} images of "
                  f"{shape[1]}x{shape[2]}, {len(pictures)} shown at {scale}x", "black", font)
        draw.text((margin, y + line - 3), f"fingerprint {images.fingerprint[:32]}…", "dimgray", font)
        y += 2 * line
        for place, picture in enumerate(pictures):
            x = margin + place % columns * (width + gap)
            pixels = picture if picture.shape[2] == 3 else np.repeat(picture[..., :1], 3, 2)
            sheet.paste(Image.fromarray(pixels), (x, y + place // columns * (height + gap)))
        y += count * (height + gap) + 8
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def list_sets(root, tell=print):
    """All known sets: counts, state on this machine, and what to type for those that are not here."""
    root = root or os.environ.get("JET_DATA")
    tell(f"{'set':<28} {'pixels':>6} {'train':>10} {'test':>7}  on this machine" + (f" (in {root})" if root else
         " (--data-root or JET_DATA says where)"))
    for name, known in SETS.items():
        counts = [f"{count:,}" if count else "13-14 M" if split == "train" else "1/256" for split, count in known.counts.items()]
        tell(f"{name:<28} {known.shape[0]:>6} {counts[0]:>10} {counts[1]:>7}  {_state(name, root)}")
        tell(f"    from {known.source}")
    folders = sorted(Path(root).iterdir()) if root and Path(root).is_dir() else []
    for folder in folders:
        if (folder / MANIFEST).exists() and folder.name not in SETS:
            with contextlib.suppress(DataError, KeyError, TypeError):
                manifest = read_manifest(folder)
                tell(f"{manifest['name']:<28} {manifest['shape'][0]:>6} {manifest['counts']['train']:>10,} "
                     f"{manifest['counts']['test']:>7,}  {folder}: variant {manifest['variant']}")
    tell("`python data.py prepare NAME --source PATH --out DIR/NAME` makes one that is missing (cifar10 needs no --source).")


def _state(name, root):
    whole, _, part = name.rpartition("-")
    if name == "cifar10-subset" or whole == "cifar10-subset":
        return "here: embedded in assets/"
    if part in CIFAR10_PARTS:
        return _state(whole, root)
    for folder in (Path(root) / name, Path(root)) if root else ():
        if (folder / MANIFEST).exists():
            try:
                if read_manifest(folder).get("name") == name:
                    return f"prepared: {folder}"
            except DataError as error:
                return str(error)
        if folder.name == name and (folder / PARTIAL).is_dir():
            return f"begun: {folder}: the same command goes on"
    if name == "cifar10" and root:
        for folder in (Path(root) / CIFAR10_FOLDER, Path(root)):
            if (folder / "test_batch.bin").exists():
                return f"here: {folder}"
    return "missing"


# ---- the command line

def main(arguments=None):
    from train import ArgumentParser, one_line_errors

    parser = ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|verify|show|list")
    make = commands.add_parser("prepare", help="make a set from its source, or go on with it")
    make.add_argument("name", help="a known set (`python data.py list`), or a name of your own")
    make.add_argument("--source", nargs="+", metavar="PATH", default=[], help="what you have: folders or archives, or a URL "
                      "for cifar10 (default for cifar10: its home page)")
    make.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    make.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    make.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be taken, and record each")
    make.add_argument("--enlarge-small", action="store_true", help="enlarge images that are smaller than the set's, by its filter")
    make.add_argument("--incomplete", action="store_true", help="the source has only some of a known set's images: do not "
                      "compare counts and checksums, and name it NAME-incomplete")
    own = make.add_argument_group("for a name of your own")
    own.add_argument("--size", type=int, metavar="N", help="images are N x N pixels")
    own.add_argument("--filter", choices=sources.FILTERS, help="resize larger ones by this filter, after a centre crop")
    own.add_argument("--test-share", type=float, metavar="F", help="share of images held out for test where there are no "
                     "folders train/ and test/ (default: 0.1)")
    check = commands.add_parser("verify", help="compare every file of a set with its manifest")
    check.add_argument("folder", type=Path, metavar="DIR")
    sheet = commands.add_parser("show", help="draw a contact sheet of a set")
    sheet.add_argument("folder", metavar="DIR", help="a prepared folder, a known set or a .npy file")
    sheet.add_argument("png", type=Path, metavar="OUT.png")
    overview = commands.add_parser("list", help="all known sets, what each needs, and what is on this machine")
    for command in (sheet, overview):
        command.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
    flags = parser.parse_args(arguments)
    try:
        with one_line_errors(parser.prog, BadImage), _interruptible():
            {"prepare": _prepare_command, "verify": lambda flags: verify(flags.folder), "list": lambda flags: list_sets(
                flags.data_root), "show": _show_command}[flags.command](flags)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _interruptible():
    """Ctrl-C ends in one line; while workers are at it Bar.update raises it, or a lock of the pool would stay locked."""
    def interrupt(*_):
        _interrupted.set()
        if not _pooling.is_set():
            raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("data.py: interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


def _show_command(flags):
    if flags.png.suffix != ".png":
        raise DataError(f"{flags.png}: the contact sheet is a .png file: give it that name")
    if not flags.png.resolve().parent.is_dir():
        raise DataError(f"{flags.png}: there is no folder {flags.png.parent}")
    show(flags.folder, flags.png, root=flags.data_root)
    print(flags.png)


def _prepare_command(flags):
    request = make_request(flags.name, flags.size, flags.filter, flags.incomplete, flags.test_share)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cores if flags.workers is None else flags.workers
    if not 1 <= workers <= 1024:
        raise DataError(f"--workers {workers}: must be 1 to 1024")
    if not flags.source and request.name != "cifar10":
        raise DataError(f"{request.name}: give what you have of it by --source PATH"
                        + (f" ({SETS[request.name].source})" if request.name in SETS else ""))
    paths = [source if _is_url(source) else Path(source) for source in flags.source]
    if any(isinstance(path, str) for path in paths) and (request.name != "cifar10" or len(paths) > 1):
        raise DataError("--source: a URL is for cifar10, alone; fetch other sets first")
    begun = time.monotonic()
    manifest = prepare(request, paths, flags.out, workers, flags.skip_corrupt, flags.enlarge_small)
    both, counts = manifest.get("images_in_both_splits", {}), manifest["counts"]
    print(f"{flags.out}: {manifest['name']}, variant {manifest['variant']}: {counts['train']:,} train and {counts['test']:,} "
          f"test images; {time.monotonic() - begun:.1f} s")
    for split in SPLITS:
        print(f"  {split} fingerprint {manifest['fingerprints'][split]}")
    if manifest.get("skipped"):
        print(f"  {len(manifest['skipped']):,} files left out: manifest.json says which, and why")
    if both.get("different"):
        print(f"  {both['test']:,} test images are training images, too ({both['train']:,} of train)")
    print(f"  train on it: python train.py --data {flags.out}")


if __name__ == "__main__":
    main()
