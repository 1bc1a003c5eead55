"""What a set is made of: a request, and what of the given files and folders serves it."""
import dataclasses
import hashlib
import re

import numpy as np

from harness.errors import DataError
from images.batches import Batches, find_batches, open_batch, read_rows
from images.decode import FILTERS, printable
from images.files import Files
from images.members import list_members
from images.parquet import Parquet
from images.sets import CIFAR10_FILES, CIFAR10_FOLDER, SETS, SPLITS

HELD_OUT = {"imagenet21k": 1 / 256}  # the share of images that are the test split
_RESERVED = ("imagenet32", "imagenet64", "imagenet1k", "imagenet21k", "cifar10")
_CIFAR10_BATCH = re.compile(r"(data_batch_[1-5]|test_batch)(?:\.bin)?")
_CHRABASZCZ_BATCH = re.compile(r"(train_data_batch_\d{1,3}|val_data)(?:\.npz|\.pkl|\.pickle)?")


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
        return f"{self.name}-incomplete" if self.incomplete else self.name


@dataclasses.dataclass
class Source:
    """An opened source: reader has count(split) and pieces(split, start)."""
    reader: Files | Batches | Parquet
    archives: list  # the files that it consists of, to be recorded by their SHA-256
    roots: dict | None = None  # {split or "": [folder or archive]}: what Files are listed from


def make_request(name, size=None, resample=None, incomplete=False, test_share=None):
    """Raises DataError for what does not fit together."""
    if name not in SETS:
        return _request_of_ones_own(name, size, resample, incomplete, test_share)
    if name.startswith("cifar10-"):
        origin = "this repository" if "subset" in name else "cifar10: prepare that"
        raise DataError(f"{name} needs no preparation: it comes with {origin}")
    known = SETS[name]
    own = known.variant if known.variant in FILTERS else None
    given = {"size": (size, known.shape[0]), "filter": (resample, own),
             "test-share": (test_share, None)}
    for flag, (value, allowed) in given.items():
        if value not in (None, allowed):
            raise DataError(f"--{flag} {value}: {name} has its own ({allowed or 'none'}): leave "
                            "the flag out, or choose a name of your own")
    return Request(name, known.variant, known.shape[0], own, known.counts, incomplete,
                   HELD_OUT.get(name.split("-")[0]))


def _request_of_ones_own(name, size, resample, incomplete, test_share):
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and not name.endswith("-incomplete")
    if not is_name or name.startswith(_RESERVED):
        near = [known for known in SETS if known.startswith(name)]
        near = near or [known for known in SETS if not known.startswith("cifar10-")]
        raise DataError(f"{printable(name)!r} is no known set ({', '.join(near)}); a name of your "
                        "own has letters, digits, '.', '_' and '-', and does not begin like a "
                        "known one")
    if size is None:
        raise DataError(f"{name} is a name of your own: give the size of its images by --size, "
                        "like --size 64")
    if not 1 <= size <= 4096:
        raise DataError(f"--size {size}: must be 1 to 4096 pixels")
    share = 0.1 if test_share is None else test_share
    if not 0 < share < 1:
        raise DataError(f"--test-share {share:g}: must be between 0 and 1")
    if incomplete:
        raise DataError(f"--incomplete is for known sets; of {name} no counts are known")
    variant = f"{size}px-{resample}" if resample else f"{size}px"
    return Request(name, variant, size, resample, dict.fromkeys(SPLITS), False, share)


def open_source(request, paths, work):
    """The Source in what the user gave; work: a folder for what is unpacked. Raises DataError."""
    if request.name == "cifar10":
        return _open_cifar10(request, paths, work)
    if request.variant == "chrabaszcz":
        return _open_chrabaszcz(request, paths, work)
    tables = [table for path in paths for table in _tables(path)]
    if tables or request.variant == "parquet":
        return _open_parquet(request, paths, tables)
    size, names = request.size, None
    if request.variant == "oord":
        names = {"train": (f"train_{size}x{size}.tar", f"train_{size}x{size}"),
                 "test": (f"valid_{size}x{size}.tar", f"valid_{size}x{size}")}
    elif request.name.startswith("imagenet1k"):
        names = {"train": ("ILSVRC2012_img_train.tar", "train.tar", "train"),
                 "test": ("ILSVRC2012_img_val.tar", "val.tar", "val", "validation", "valid")}
    elif len(paths) > 1 and request.name not in SETS:
        raise DataError(f"--source: {request.name} is made from one folder, tar or zip, not from "
                        f"{len(paths)}")
    roots = {"": paths}
    if names:
        roots = {split: [_find(request, paths, split, names[split])] for split in SPLITS}
    archives = [root for split in roots.values() for root in split if root.is_file()]
    return Source(Files(work / "files.sqlite"), archives, roots)


def _among(paths):
    return ", ".join(map(printable, paths))


def _find(request, paths, split, names):
    for name in names:
        for path in paths:
            if path.name == name:
                return path
            for inside in ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):
                if (path / inside / name).exists():
                    return path / inside / name
    raise DataError(f"{request.name}: {split} is needed as {' or '.join(names)}: not found in "
                    f"{_among(paths)}")


def _tables(path):
    if path.is_dir():
        return sorted(path.glob("*.parquet")) + sorted((path / "data").glob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def _open_cifar10(request, paths, work):
    found, archives = find_batches(paths, _CIFAR10_BATCH, work)
    official = {(split, file.removesuffix(".bin")): sha256
                for split, files in CIFAR10_FILES.items() for file, sha256 in files.items()}
    missing = [name for _, name in official if name not in found]
    if missing:
        raise DataError(f"cifar10: {', '.join(missing)} (.bin or the pickle) not found in "
                        f"{_among(paths)}: give the folder {CIFAR10_FOLDER}, cifar-10-batches-py "
                        "or their archive")
    batches = {split: [] for split in SPLITS}
    for (split, name), sha256 in official.items():
        batch = open_batch(found[name], 32, work)
        if not request.incomplete and _sha256_of_records(batch) != sha256:
            about = f"{printable(found[name].name)} of {printable(found[name].path)}"
            raise DataError(f"cifar10: {about} is altered or has other images ({batch.count:,} of "
                            "them; the SHA-256 of its records is not the official one): fetch it "
                            "again")
        batches[split].append(batch)
    return Source(Batches(batches, 32), archives)


def _sha256_of_records(batch):
    """SHA-256 of a batch of CIFAR-10 as it stands in the official binary file."""
    taken = read_rows(batch, 32, None, False)
    if taken.labels is None:
        return None
    pixels = np.frombuffer(taken.pixels, np.uint8).reshape(-1, 1024, 3).transpose(0, 2, 1)
    records = np.column_stack([np.array(taken.labels).astype(np.uint8), pixels.reshape(-1, 3072)])
    return hashlib.sha256(records).hexdigest()


def _open_chrabaszcz(request, paths, work):
    found, archives = find_batches(paths, _CHRABASZCZ_BATCH, work)
    train = sorted((name for name in found if name != "val_data"),
                   key=lambda name: int(name.rpartition("_")[2]))
    if not train or "val_data" not in found:
        raise DataError(f"{request.name}: train_data_batch_1 to 10 and val_data are needed, loose "
                        f"or in {SETS[request.name].source}: not found in {_among(paths)}")
    batches = {split: [open_batch(found[name], request.size, work) for name in names]
               for split, names in (("train", train), ("test", ["val_data"]))}
    return Source(Batches(batches, request.size), archives)


def _open_parquet(request, paths, tables):
    if not tables:
        raise DataError(f"{request.name}: no .parquet files in {_among(paths)}")
    groups = {}
    for file in tables:
        groups.setdefault(re.match(r"[A-Za-z]*", file.name)[0], []).append(file)
    test = [word for word in ("validation", "valid", "val", "test") if word in groups]
    if request.name in SETS:
        test = test[:1]  # ImageNet's test images have no labels and are not the paper's
    has_others = request.name not in SETS and len(groups) > 2
    if "train" not in groups or len(test) != 1 or has_others:
        raise DataError(f"{request.name}: of the parquet files some must be named train-... and "
                        f"some validation-... or test-...; {len(tables):,} are there, like "
                        f"{_among([file.name for file in tables[:3]])}")
    files = {"train": groups["train"], "test": groups[test[0]]}
    return Source(Parquet(files), files["train"] + files["test"])


def list_files(request, source, work, bar):
    """Take down the files of a source in their splits, sets of ImageNet by their base names.

    bar: wraps what is iterated. Returns the share that was held out for test, or None where the
    source has its splits.
    """
    is_known = request.name in SETS

    def members():
        for split, paths in source.roots.items():
            for path in paths:
                for member in list_members(path, work):
                    base = member.name.rpartition("/")[2]
                    yield split, base if is_known else member.name, member, path
    source.reader.list(bar(members()))
    if "" not in source.roots or not is_known and source.reader.split_by_folder():
        return None
    source.reader.hold_out(request.test_share)
    return request.test_share


def check_counts(request, counts):
    """Refuse a source that has other counts than a known set."""
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
    likely = "a part is missing, or it is another set"
    if other:
        likely = f"likely another variant: {', '.join(other)}"
    raise DataError(f"{request.name}: the source has {found}: {likely}. --incomplete prepares it "
                    f"as {request.name}-incomplete, which is no evidence for {request.name}")
