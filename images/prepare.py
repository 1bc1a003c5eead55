"""Making a prepared folder, once; killed at any time, the same command goes on.

Until all is there, it is in the folder partial/ inside, with state.json, which says how much of
each file is whole. Images are appended in a fixed order, whatever the number of workers.
"""
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sqlite3
import sys
import threading
import time
import warnings

import numpy as np
import PIL
from PIL import features

from harness.claim import Claim
from harness.download import download
from harness.errors import DataError, printable
from harness.files import file_sha256, write_atomically
from harness.in_order import in_order
from harness.host import code_version
from harness.progress import progress
from harness.signals import Signals
from images.again import (
    COUNTED, GREY, as_text, describe, read_state, refuse_another, refuse_links)
from images.decode import FILTER_ADVICE
from images.folder import HEADER_BYTES, NUMBERS, hash_images, npy_header, read_manifest, seal
from images.readers import STRAY, TEST_SHARE, Files, count_channels, take_images
from images.sets import CHECKSUMS, CIFAR10_URL, FINGERPRINTS, MANIFEST, PARTIAL, SETS, SPLITS
from images.source import check_counts, find_source

STATE = "state.json"
SAVE_EVERY_S = 1
MAX_STRAYS = 1000  # of the names that are recorded


def prepare(request, paths, out, workers, skip_corrupt=False, enlarge=False):
    """Make a set, or go on with it; returns its manifest.

    paths: files and folders, or one URL. Raises DataError (nothing is lost), BusyError.
    """
    work, has_url = out / PARTIAL, not paths or isinstance(paths[0], str)
    flags = {"--enlarge-small": enlarge, "--skip-corrupt": skip_corrupt,
             "--channels": request.channels, "--test-share": request.test_share or TEST_SHARE}
    found = None if has_url else find_source(request, paths)
    origins = found and list(dict.fromkeys(path for some in found[1].values() for path in some))
    for path in origins or ():
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise DataError(f"--out {out}: lies in the source {printable(path)}: choose a folder "
                            "beside it")
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        refuse_another(out, manifest, request, flags, origins)
        shutil.rmtree(work, ignore_errors=True)
        print(f"{out}: prepared already; `verify` checks it")
        return manifest
    refuse_links(work)
    others = sorted(set(os.listdir(out)) - {PARTIAL}) if out.exists() else []
    if others and not (work / MANIFEST).exists():
        raise DataError(f"--out {out}: is not empty ({printable(others[0])}), and no set that was "
                        "begun: choose a new folder")
    claim = Claim(work)
    claim.take()
    try:
        if (work / MANIFEST).exists():  # all but the last moves was done
            refuse_another(work, read_manifest(work), request, flags, origins)
        else:
            _Making(request, paths, work, flags, found).run(workers, skip_corrupt, enlarge)
        manifest = read_manifest(work)
        for name in ("train.npy", "test.npy", *manifest["checksums"]):
            if (work / name).exists():
                os.replace(work / name, out / name)
        os.replace(work / MANIFEST, out / MANIFEST)  # the last: now it is a set
        return manifest
    except sqlite3.Error as error:
        raise DataError(f"{work / 'files.sqlite'}: {error} (is the disk full?): fix it, and the "
                        f"same command goes on; or remove {work} to begin again") from None
    finally:
        claim.release()
        is_begun = any(work.glob("*.json")) or any(work.glob("*.gz*"))  # *.gz*: a download
        if (out / MANIFEST).exists() or not is_begun:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()


class _Making:
    """A set that is being made in the folder work. found: what find_source tells, if no URL."""

    def __init__(self, request, paths, work, flags, found):
        self.request, self.paths, self.work, self.found = request, paths, work, found
        wanted = json.loads(json.dumps({
            **dataclasses.asdict(request), "sources": [_as_it_is(path) for path in paths]}))
        self.state = {
            "request": wanted, "held_out_share": None, "archives": None, "skipped": [],
            "flags": flags, "channels": request.channels,
            "splits": {split: dict.fromkeys(COUNTED, 0) for split in SPLITS}}
        if not (work / STATE).exists():
            return
        begun, fixed = read_state(work / STATE, flags)
        changed = [key for key in wanted if begun["request"].get(key, wanted[key]) != wanted[key]]
        changed += [flag for flag in fixed if begun["flags"].get(flag) != flags[flag]]
        if changed and any(split["seen"] for split in begun["splits"].values()):
            raise DataError(f"{work}: was begun as {begun['request'].get('name')} with another "
                            f"{' and '.join(changed)} (or its files have changed since): give the "
                            f"same command, another --out, or remove {work} to begin again")
        if not changed:
            self.state = begun | {"flags": flags}

    def run(self, workers, skip_corrupt, enlarge):
        reader, origins = self._open_source()
        is_of_files, is_new = isinstance(reader, Files), self.state["archives"] is None
        if is_of_files and is_new:
            self.state["held_out_share"] = reader.list(self.request, origins, self.work)
        counts = {split: reader.count(split) for split in SPLITS}
        check_counts(self.request, counts, self.state["held_out_share"])
        if self.state["held_out_share"]:
            print(f"test: {counts['test']:,} held out of {sum(counts.values()):,}")
        if is_new:
            self._hash_archives([path for paths in origins.values() for path in paths])
        if is_of_files:
            self._tell_strays(reader)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        # An interrupt while workers are at it could leave a lock of the pool locked: it is noted.
        with (Signals(quiet=True).on(stop=(signal.SIGINT,)) as signals,
              concurrent.futures.ProcessPoolExecutor(
                  workers, context, _start_worker, (os.getpid(),)) as pool):
            try:
                self._find_channels(reader, pool, 2 * workers + 1, signals)
                settings = (self.request.size, self.request.resample, enlarge,
                            self.state["channels"])
                for split in SPLITS:
                    pieces = reader.pieces(split, self.state["splits"][split]["seen"])
                    taken = in_order((pool.submit(take_images, piece, *settings)
                                      for piece in pieces), 2 * workers + 1)
                    self._append(split, counts[split], taken, skip_corrupt, signals)
            except concurrent.futures.process.BrokenProcessPool:
                raise DataError("a worker process was ended (is memory short? fewer --workers need "
                                "less): the same command goes on") from None
        self._seal(counts, is_of_files)

    def _tell_strays(self, reader):
        """Note and print which files are no images."""
        names = [printable(name, 500) for name in itertools.islice(reader.strays(), MAX_STRAYS)]
        if names:
            self.state["strays"] = {"files": reader.count(STRAY), "names": names}
            print(f"left out: {reader.count(STRAY):,} files that are no images "
                  f"({printable(', '.join(names[:3]), 300)}{', ...' if len(names) > 3 else ''})")

    def _find_channels(self, reader, pool, ahead, signals):
        """One channel where all images are grey, unless a number was asked for; it is told."""
        if self.state["channels"] is None:
            found, most = in_order((pool.submit(count_channels, piece) for split in SPLITS
                                    for piece in reader.pieces(split, 0)), ahead), 0
            while most < 3 and (channels := next(found, None)) is not None:
                most = max(most, channels)
                if signals.stop:
                    raise KeyboardInterrupt
            found.close()
            self.state["channels"] = most or 3
            self._save()
        if self.state["channels"] == 1:
            print("all images are grey: one channel" if self.request.channels is None else
                  "one channel")

    def _open_source(self):
        if self.found:
            opener, origins = self.found
            return opener(self.request, origins, self.work), origins
        url = self.paths[0] if self.paths else CIFAR10_URL
        known = CHECKSUMS["cifar-10-binary.tar.gz"] if url == CIFAR10_URL else None
        key = hashlib.sha256(url.encode()).hexdigest()[:8]
        archive = self.work / f"{key}-{printable(url.rpartition('/')[2])[:80]}.gz"
        if not archive.exists():
            download(url, archive, known)
        try:
            opener, origins = find_source(self.request, [archive])
            return opener(self.request, origins, self.work), origins
        except DataError:
            archive.unlink()  # so that it is fetched again
            raise

    def _hash_archives(self, paths):
        """Note what the paths are, archives compared with those that are known."""
        must_fit = self.request.variant == "oord" and not self.request.incomplete
        self.state["archives"] = []
        total = sum(path.stat().st_size for path in paths if path.is_file())
        with progress(desc="checksums", total=total, unit="B") as bar:
            for path in dict.fromkeys(paths):
                origin, known = describe(path, bar), CHECKSUMS.get(path.name)
                if must_fit and path.is_file() and known not in (None, origin["sha256"]):
                    raise DataError(f"{printable(path)} is not the known archive: its SHA-256 is "
                                    f"{origin['sha256'][:12]}..., not {known[:12]}...: fetch it "
                                    "again, or prepare another variant")
                self.state["archives"].append(origin)
        self._save()

    def _save(self, files=()):
        """Note how much of the files is whole: all that was written to them."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self.work / STATE, as_text(self.state))

    def _append(self, split, total, taken, skip_corrupt, signals):
        """Append what the workers make of a split to its files."""
        done, saved, files = self.state["splits"][split], time.monotonic(), []
        try:
            files = self._open_files(split)
            with progress(desc=split, total=total, initial=done["seen"]) as bar:
                for piece in taken:
                    if piece.bad and not skip_corrupt:
                        self._refuse(split, *map(printable, piece.bad[0]))
                    labels = np.array(piece.labels, "<i8").tobytes()
                    for file, content in zip(files, (piece.pixels, labels, piece.digests)):
                        file.write(content)
                    done["images"] += piece.count
                    done["seen"] += piece.count + len(piece.bad)
                    done["enlarged"] += piece.enlarged
                    done["grey"] += piece.grey
                    self.state["skipped"] += [
                        {"split": split, "file": printable(name), "reason": reason}
                        for name, reason, _ in piece.bad]
                    bar.update(piece.count + len(piece.bad))
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        self._save(files)
                        saved = time.monotonic()
                    if signals.stop:
                        raise KeyboardInterrupt
            if done["seen"] != total:
                raise DataError(f"{split}: {done['seen']:,} images came, where {total:,} were "
                                "listed: has the source changed?")
        finally:  # what came before an error is whole
            taken.close()
            with contextlib.ExitStack() as stack:
                for file in files:
                    stack.enter_context(file)
                self._save(files)

    def _refuse(self, split, name, reason, advice):
        if advice == FILTER_ADVICE and self.request.name in SETS:
            advice = f"{self.request.name} has images of that size alone"
        raise DataError(f"{split}: {name} {reason} ({advice}; the same command goes on)")

    def _open_files(self, split):
        """The growing files of a split, cut back to what is whole; headers come at the end."""
        count, files = self.state["splits"][split]["images"], []
        image_bytes = self.state["channels"] * self.request.size ** 2
        for kind, width in (("", image_bytes), ("_labels", 8), ("_digests", 32)):
            path, whole = self.work / f"{split}{kind}.npy", HEADER_BYTES + width * count
            files.append(open(path, "ab"))
            if count == 0:
                files[-1].truncate(0)
                files[-1].write(bytes(HEADER_BYTES))
            if kind and files[-1].tell() == HEADER_BYTES:  # the source has none
                continue
            if files[-1].tell() < whole:
                raise DataError(f"{path} is shorter than {STATE} says: remove {self.work} to "
                                "begin again")
            files[-1].truncate(whole)
        return files

    def _seal(self, source_counts, is_of_files):
        """Write headers, checksums and the manifest."""
        request, work, splits = self.request, self.work, self.state["splits"]
        counts = {split: splits[split]["images"] for split in SPLITS}
        channels = self.state["channels"]
        sides = request.size, request.size, channels
        labelled = all((work / f"{split}_labels.npy").stat().st_size == HEADER_BYTES + 8 * count
                       for split, count in counts.items())
        prints, pixels, sealed, origins = {}, {}, {}, list(self.state["archives"])
        for split, count in counts.items():
            if not count:
                raise DataError(f"{split}: no image could be taken")
            path, shape, arrays = work / f"{split}.npy", (count, *sides), {}
            with open(path, "rb+") as file:
                file.write(npy_header(shape))
            if labelled:
                arrays["labels"] = np.fromfile(
                    work / f"{split}_labels.npy", "<i8", offset=HEADER_BYTES)
            prints[split], pixels[split], arrays["checksums"] = hash_images(
                path, shape, arrays.get("labels"), f"hash {split}")
            if FINGERPRINTS.get((request.full_name, split)) not in (None, prints[split]):
                raise DataError(f"{request.name} {split}: the fingerprint is {prints[split]}, not "
                                "the known one: the source is altered")
            for kind, array in arrays.items():
                name, content = f"{split}_{kind}.npy", npy_header(array.shape, NUMBERS[kind])
                content += array.tobytes()
                write_atomically(work / name, lambda file: file.write(content))
                sealed[name] = hashlib.sha256(content).hexdigest()
            if is_of_files:
                digests = file_sha256(work / f"{split}_digests.npy", start=HEADER_BYTES)
                origins.append({"images": split, "files": count, "sha256_of_their_sha256": digests})
        if prints["train"] == prints["test"]:
            raise DataError("train and test are the same images: give the folder that holds both "
                            "splits")
        both = np.intersect1d(pixels["train"], pixels["test"])
        manifest = {
            "name": request.full_name, "filter": request.resample,
            "variant": request.variant + (GREY if channels == 1 else ""),
            "shape": [*sides], "counts": counts, "fingerprints": prints,
            "images_in_both_splits": {"different": len(both), **{
                split: int(np.isin(pixels[split], both).sum()) for split in SPLITS}},
            "sources": origins, "source_counts": source_counts,
            "held_out_share": self.state["held_out_share"],
            "enlarged": {split: splits[split]["enlarged"] for split in SPLITS},
            "grey_in_three_channels": {split: splits[split]["grey"] for split in SPLITS},
            "skipped": self.state["skipped"], "checksums": sealed, "flags": self.state["flags"],
            "no_images": self.state.get("strays", {"files": 0, "names": []}),
            "tool": {**code_version(), "python": platform.python_version(),
                     "numpy": np.__version__, "pillow": PIL.__version__,
                     "libjpeg": features.version("libjpeg_turbo") or features.version("jpg")},
        }
        manifest["seal"] = seal(manifest)
        write_atomically(work / MANIFEST, as_text(manifest, indent=1) + "\n")


def _as_it_is(path):
    """What tells a source from another one, or from itself when it was changed."""
    if isinstance(path, str):  # a URL
        return path
    status = path.stat()
    size = (status.st_size, status.st_mtime_ns) if path.is_file() else ()
    return [str(path.resolve()), *size]


def _start_worker(parent):
    """A worker ends when the process that started it has ended, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
