"""What a set is made of: a request, and what of the given files and folders serves it."""
import dataclasses
import hashlib
import re

import numpy as np

from harness.errors import DataError, printable
from images.decode import FILTERS
from images.members import MAX_BATCH_BYTES, list_members, whole_file
from images.readers import Batches, Files, Parquet, open_batch
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

    @property
    def full_name(self):
        return f"{self.name}-incomplete" if self.incomplete else self.name


def make_request(name, size=None, resample=None, incomplete=False, test_share=None):
    """Raises DataError for what does not fit together."""
    if name not in SETS:
        return _request_of_ones_own(name, size, resample, incomplete, test_share)
    if name.startswith("cifar10-"):
        origin = "this repository" if "subset" in name else "cifar10: prepare that"
        raise DataError(f"{name} needs no preparation: it comes with {origin}")
    known = SETS[name]
    own = known.variant if known.variant in FILTERS else None
    for flag, value, allowed in (("size", size, known.shape[0]), ("filter", resample, own),
                                 ("test-share", test_share, None)):
        if value not in (None, allowed):
            raise DataError(f"--{flag} {value}: {name} has its own ({allowed or 'none'}): leave "
                            "the flag out, or choose a name of your own")
    share = 1 / 256 if name.startswith("imagenet21k") else None
    return Request(name, known.variant, known.shape[0], own, known.counts, incomplete, share)


def _request_of_ones_own(name, size, resample, incomplete, test_share):
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
    return Request(name, variant, size, resample, dict.fromkeys(SPLITS), False, test_share)


def open_source(request, paths, work):
    """What the user gave: (reader, {split, or "" for both: [files and folders that it reads]}).

    work: a folder for what is unpacked. Raises DataError.
    """
    given = ", ".join(map(printable, paths))
    if request.variant in _BATCHES:
        return _open_batches(request, paths, given, work)
    tables = [path for path in paths if path.is_file() and path.suffix == ".parquet"]
    tables += [table for path in paths for place in ("*.parquet", "data/*.parquet")
               for table in sorted(path.glob(place))]
    if tables or request.variant == "parquet":
        return _open_parquet(request, tables, given)
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
    return Files(work / "files.sqlite"), origins


def _open_batches(request, paths, given, work):
    pattern, advice = _BATCHES[request.variant]
    archive = r"(?i:imagenet.*\.zip|cifar-10-.*\.(tar\.gz|tgz|tar))"
    files = [path for path in paths if not path.is_dir()]
    files += [file for path in paths if path.is_dir() for file in sorted(path.rglob("*"))
              if re.fullmatch(f"{pattern}|{archive}", file.name)]
    found = {}
    for file in files:
        is_one = re.fullmatch(pattern, file.name)
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
    return Batches(batches), {"": files}


def _open_parquet(request, tables, given):
    groups = {}
    for file in tables:
        groups.setdefault(re.match("[A-Za-z]*", file.name)[0], []).append(file)
    test = [word for word in ("validation", "valid", "val", "test") if word in groups]
    if request.name in SETS:
        test = test[:1]  # ImageNet's test images have no labels and are not the paper's
    is_clear = len(test) == 1 and (request.name in SETS or len(groups) == 2)
    if "train" not in groups or not is_clear:
        some = "".join(f" ({printable(file.name)}, ...)" for file in tables[:1])
        raise DataError(f"{request.name}: of the parquet files in {given} some must be named "
                        f"train-... and some validation-... or test-...; {len(tables):,} are "
                        f"there{some}")
    files = {"train": groups["train"], "test": groups[test[0]]}
    return Parquet(files), files


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
