"""What a set is made of: a request, and what of the given files and folders serves it."""
import dataclasses
import functools
import hashlib
import re

import numpy as np

from harness.errors import DataError, printable
from harness.progress import progress
from images.decode import FILTERS
from images.members import MAX_BATCH_BYTES, list_members, whole_file
from images.readers import Batches, Files, Parquet, open_batch, split_word_in, take_images
from images.sets import CIFAR10_FILES, CIFAR10_FOLDER, SETS, SPLITS

_BATCHES = {  # names of files, and what is needed
    "cifar10": (r"(data_batch_[1-5]|test_batch)(?:\.bin)?",
                f"give the folder {CIFAR10_FOLDER} (.bin), cifar-10-batches-py (pickles) or their "
                "archive"),
    "chrabaszcz": (r"(train_data_batch_\d{1,3}|val_data)(?:\.npz|\.pkl|\.pickle)?",
                   "train_data_batch_1 to 10 and val_data are needed, loose or in their zips"),
}
_SPLIT_NAMES = {  # of the files or folders of a split
    "oord": (("train_{size}x{size}.tar", "train_{size}x{size}"),
             ("valid_{size}x{size}.tar", "valid_{size}x{size}")),
    "imagenet1k": (("ILSVRC2012_img_train.tar", "train.tar", "train"),
                   ("ILSVRC2012_img_val.tar", "val.tar", "val", "validation", "valid")),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What a set is made of; equal requests make equal bytes."""
    name: str
    variant: str
    size: int
    resample: str | None
    counts: dict  # known ones, else None
    incomplete: bool
    test_share: float | None  # to be held out where the source has no test images
    channels: int | None = 3  # None: 1 where all images are grey, else 3

    @property
    def full_name(self):
        return f"{self.name}-incomplete" if self.incomplete else self.name


def make_request(name, size=None, resample=None, incomplete=False, test_share=None, channels=None):
    """Raises DataError for what does not fit together."""
    if name not in SETS:
        return _request_of_ones_own(name, size, resample, incomplete, test_share, channels)
    if name.startswith("cifar10-"):
        origin = "this repository" if "subset" in name else "cifar10: prepare that"
        raise DataError(f"{name} needs no preparation: it comes with {origin}")
    known = SETS[name]
    own = known.variant if known.variant in FILTERS else None
    for flag, value, allowed in (("size", size, known.shape[0]), ("filter", resample, own),
                                 ("test-share", test_share, None), ("channels", channels, 3)):
        if value not in (None, allowed):
            raise DataError(f"--{flag} {value}: {name} has its own ({allowed or 'none'}): leave "
                            "the flag out, or choose a name of your own")
    share = 1 / 256 if name.startswith("imagenet21k") else None
    return Request(name, known.variant, known.shape[0], own, known.counts, incomplete, share)


def _request_of_ones_own(name, size, resample, incomplete, test_share, channels):
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and not name.endswith("-incomplete")
    if not is_name or name.startswith(tuple(known.split("-")[0] for known in SETS)):
        near = [known for known in SETS if known.startswith(name)]
        near = near or [known for known in SETS if not known.startswith("cifar10-")]
        raise DataError(f"{printable(name)!r} is no known set ({', '.join(near)}); a name of your "
                        "own has letters, digits, '.', '_' and '-', and does not begin like these")
    if size is None:
        raise DataError(f"{name} is a name of your own: give its images' size, like --size 64")
    if not 1 <= size <= 4096:
        raise DataError(f"--size {size}: must be 1 to 4096 pixels")
    if test_share is not None and not 0 < test_share < 1:
        raise DataError(f"--test-share {test_share:g}: must be between 0 and 1")
    if incomplete:
        raise DataError(f"--incomplete is for known sets; of {name} no counts are known")
    variant = f"{size}px-{resample}" if resample else f"{size}px"
    return Request(name, variant, size, resample, dict.fromkeys(SPLITS), False, test_share,
                   channels)


def find_source(request, paths):
    """What the user gave: (a function that opens it, {split, or "" for both: [files and folders]}).

    The function takes the request, these files and folders, and a folder for what is unpacked; it
    returns a reader. Raises DataError.
    """
    given = ", ".join(map(printable, paths))
    for path in paths:
        path.stat()  # or OSError says that it is not there
    tables = _find_tables(paths)
    if request.variant in _BATCHES:
        files = _find_batches(request, paths)
        if files:
            return functools.partial(_open_batches, given=given), {"": files}
        if not tables or request.name != "cifar10":
            raise DataError(f"{request.name}: no batches of it found in {given}: "
                            f"{_BATCHES[request.variant][1]}")
    if tables or request.variant == "parquet":
        return _open_parquet, _split_tables(request, tables, given)
    names = _SPLIT_NAMES.get(request.variant) or _SPLIT_NAMES.get(request.name.split("-")[0])
    if names is None and request.name not in SETS and len(paths) > 1:
        raise DataError(f"--source: {request.name} is made from one folder, tar or zip, not from "
                        f"{len(paths)}")
    origins = {} if names else {"": paths}
    for split, some in zip(SPLITS, names or ()):
        some = [name.format(size=request.size) for name in some]
        found = [place for name in some for path in paths for place in (
            path, path / name, path / "ILSVRC/Data/CLS-LOC" / name, path / "Data/CLS-LOC" / name)
            if place.name == name and place.exists()]
        if not found:
            raise DataError(f"{request.name}: {split} is needed as {' or '.join(some)}: not found "
                            f"in {given}")
        origins[split] = found[:1]
    return _open_files, origins


def _open_files(_, origins, work):
    places = [path for paths in origins.values() for path in paths]
    return Files(work / "files.sqlite", [*places, work])


def _find_batches(request, paths):
    archive = r"(?i:imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar))"
    names = re.compile(f"{_BATCHES[request.variant][0]}|{archive}")
    files = [path for path in paths if not path.is_dir() and path.suffix != ".parquet"]
    return files + [file for path in paths if path.is_dir() for file in sorted(path.rglob("*"))
                    if names.fullmatch(file.name) and file.is_file()]


def _open_batches(request, origins, work, given):
    (pattern, advice), found = _BATCHES[request.variant], {}
    for file in origins[""]:
        is_one = file.is_file() and re.fullmatch(pattern, file.name)
        for member in [whole_file(file)] if is_one else list_members(file, work, MAX_BATCH_BYTES):
            match = re.fullmatch(pattern, member.name.rpartition("/")[2])
            if match and match[1] in found:
                raise DataError(f"{printable(member.path)}: a second {match[1]}, beside that of "
                                f"{printable(found[match[1]].path)}: give one of them")
            if match:
                found[match[1]] = member
    official = {file.removesuffix(".bin"): sha256 for some in CIFAR10_FILES.values()
                for file, sha256 in some.items()}
    needed = official if request.name == "cifar10" else ["val_data"]
    missing = [name for name in needed if name not in found]
    if missing or len(found) < 2:
        raise DataError(f"{request.name}: {', '.join(missing or ['train_data_batch_1'])} not found "
                        f"in {given}: {advice}")
    batches, test = {split: [] for split in SPLITS}, ("test_batch", "val_data")
    for name in sorted(found, key=lambda name: (name in test, len(name), name)):  # 2 before 10
        rows, labels = open_batch(found[name], request.size, work)
        if name in official and not request.incomplete:
            records = rows if labels is None else np.column_stack([labels.astype(np.uint8), rows])
            if hashlib.sha256(records.tobytes()).hexdigest() != official[name]:
                about = f"{printable(found[name].name)} of {printable(found[name].path)}"
                raise DataError(f"cifar10: {about} is altered or has other images ({len(rows):,} "
                                "of them; the SHA-256 of its records is not the official one): "
                                "fetch it again")
        batches["test" if name in test else "train"].append((rows, labels))
    return Batches(batches)


def _find_tables(paths):
    """{(word of a split or "", folder of the whole set): [parquet files]}

    Like train-00000-of-00001.parquet, also in a folder data or plain_text, or train/0000.parquet.
    """
    tables = {}
    for path in paths:
        if path.is_file():
            found = [path] if path.suffix == ".parquet" else []
        else:
            found = sorted(file for depth in ("*", "*/*", "*/*/*")
                           for file in path.glob(f"{depth}.parquet") if file.is_file())
        for file in found:
            base, above = split_word_in(file.stem), split_word_in(file.parent.name)
            folder = file.parent if base else file.parent.parent
            place = "" if path.is_file() else str(folder)
            if file.name != "metadata.parquet":  # which the Hub has beside images
                tables.setdefault((base or above, place), []).append(file)
    return tables


def _split_tables(request, tables, given):
    """{split: [parquet files]}. Raises DataError where it is not clear which they are."""
    words = [word for word, _ in tables]
    order = ["validation", "valid", "val", "testing", "test"]
    if request.name == "cifar10":  # ImageNet's test images have no labels and are not the paper's
        order.reverse()
    train = [word for word in ("train", "training") if word in words]
    test = [word for word in order if word in words]
    is_clear = len(words) == len(set(words)) and len(train) == 1 and test and (
        request.name in SETS or len(words) == 2)
    if not is_clear:
        files = [printable(file) for files in tables.values() for file in files[:1]]
        there = f"there are {', '.join(files[:6])}{', ...' if len(files) > 6 else ''}"
        raise DataError(f"{request.name}: of the parquet files in {given} some must be named "
                        "train-... and some validation-... or test-..., in one folder, or lie in "
                        f"folders of these names; {there if files else 'none is there'}: give the "
                        "files of two splits by --source")
    files = {split: next(tables[key] for key in tables if key[0] == word)
             for split, word in (("train", train[0]), ("test", test[0]))}
    if unused := sorted(set(words) - {train[0], test[0]}):
        print(f"test images are those of {test[0]}; left out: {', '.join(unused)}")
    return files


def _open_parquet(request, origins, _):
    reader = Parquet(origins)
    if request.name == "cifar10" and not request.incomplete:
        return _in_official_order(reader)
    return reader


def _in_official_order(tables):
    """CIFAR-10 of parquet files, which have its batches in another order: found by checksums."""
    batches = {}
    for split in SPLITS:
        count, expected = tables.count(split), SETS["cifar10"].counts[split]
        if count != expected:
            raise DataError(f"cifar10: {count:,} {split} images in the parquet files, not "
                            f"{expected:,}")
        taken = []
        with progress(desc=f"read {split}", total=count) as bar:
            for piece in tables.pieces(split, 0):
                taken.append(take_images(piece, 32, None, False))
                bar.update(len(piece))
        if bad := [part.bad[0] for part in taken if part.bad]:
            raise DataError(f"cifar10 {split}: {' '.join(map(printable, bad[0][:2]))}")
        pixels = np.frombuffer(b"".join(part.pixels for part in taken), np.uint8)
        rows = pixels.reshape(count, 32, 32, 3).transpose(0, 3, 1, 2).reshape(count, -1)
        labels = np.array([label for part in taken for label in part.labels], np.int64)
        if not len(labels):  # nothing to compare but the fingerprint, at the end
            batches[split] = [(rows, None)]
            continue
        names = {sha256: name for name, sha256 in CIFAR10_FILES[split].items()}
        found, size = {}, count // len(names)
        for part in (slice(start, start + size) for start in range(0, count, size)):
            records = np.column_stack([labels[part].astype(np.uint8), rows[part]])
            sha256 = hashlib.sha256(records.tobytes()).hexdigest()
            found[names.get(sha256)] = rows[part], labels[part]
        if found.keys() != set(names.values()):
            raise DataError(f"cifar10: the {split} images of the parquet files are no official "
                            f"batches of {size:,} (their SHA-256 with labels is another): other "
                            "images, labels or order")
        batches[split] = [found[name] for name in CIFAR10_FILES[split]]
    return Batches(batches)


def check_counts(request, counts, held_out_share):
    """Refuse a source that has other counts than a known set, or another split than was wanted."""
    if request.name not in SETS and request.test_share not in (None, held_out_share):
        raise DataError(f"--test-share {request.test_share:g}: the source has test images of its "
                        "own: leave the flag out")
    for split in SPLITS:
        if not counts[split]:
            raise DataError(f"{request.name}: there are no {split} images in the source")
    wrong = [split for split in SPLITS if request.counts[split] not in (None, counts[split])]
    if request.incomplete or not wrong:
        return
    other = [name for name, known in SETS.items()
             if any(known.counts[split] == counts[split] for split in wrong)
             and known.shape[0] == request.size and not name.startswith("cifar10-")]
    found = ", ".join(f"{counts[split]:,} {split} images, not {request.counts[split]:,}"
                      for split in wrong)
    likely = f"likely another variant: {', '.join(other)}" if other else "a part is missing?"
    raise DataError(f"{request.name}: the source has {found}: {likely}. --incomplete prepares it "
                    f"as {request.name}-incomplete, which is no evidence for {request.name}")
