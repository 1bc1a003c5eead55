"""Data: which images are audited, and whether each counts once."""
import functools
import hashlib

import numpy as np

from audit.checks import BAR, INFO, check
from audit.copies import check_near_copies
from data import FINGERPRINTS, SETS, fingerprint

REPEATED_SHARE = 0.001  # of the images; of 512, none
line = functools.partial(check, "Data")


def check_data(images, other_split, recorded, rng, whole=True, bits=8):
    """images: ImageSet. other_split: that of the set's other split, or None. recorded: done.json
    of the weights' run, or None. whole: whether these are all images of the split. bits: of those
    that the model takes."""
    yield from check_identity(images, whole)
    yield check_levels(images, bits)
    yield from check_repeated(images, other_split)
    yield from check_near_copies(images, other_split, rng)
    if recorded:
        dataset, variant, fault = recorded["dataset"], recorded["variant"], ""
        if recorded["train_fingerprint"] == fingerprint(images.array):
            fault = ": THE SAME IMAGES"
        elif are_related(dataset, images.name) and variant != images.variant:
            fault = ": ANOTHER VARIANT"
        yield line("what it was trained on", f"{dataset}, variant {variant}", not fault,
                   "not these images, nor another variant of them",
                   f"as the run's done.json has it{fault}")


def check_identity(images, whole):
    array, name, split = images.array, images.name, images.split
    known = SETS.get(name)
    has_shape = known and known.shape == array.shape[1:] and known.variant == images.variant
    yield line("set and variant", f"{name}, variant {images.variant}, {split}", has_shape,
               "a known set has its shape and variant",
               "a number of another variant, or of other images, is another number")
    count = known.counts[split] if known else None
    holds, allowed = None if count is None else len(array) == count, "all"
    if known:
        allowed = f"{count:,} in all"
    yield line("images", len(array), holds if whole else INFO, allowed,
               "a missing batch or a doubled one shows here" if whole else
               "A PART, the first of them: its number is of no other images")
    found = fingerprint(array)
    if not whole:
        yield line("fingerprint", found, None, "", "SHA-256 of the pixels of this part")
        return
    names = [f"{other} {part}" for (other, part), value in FINGERPRINTS.items() if value == found]
    expected = FINGERPRINTS.get((name, split), images.known_fingerprint)
    holds, text = None, "SHA-256 of the pixels; nothing to compare with"
    if expected:
        holds, text = expected == found, "SHA-256 of the pixels, as recorded when the set was made"
    if names:
        text = f"these are the images of {names[0]}"
        holds = holds if f"{name} {split}" in names else False
    yield line("fingerprint", found, holds, expected or "not known", text)


def check_levels(images, bits):
    """Whether the images have 256 levels: a number for 32 of them is another one."""
    counts = np.zeros(256, int)
    for start in BAR(range(0, len(images.array), 1024), "levels"):
        part = np.ascontiguousarray(images.array[start:start + 1024])
        counts += np.bincount(part.ravel(), minlength=256)
    used = np.flatnonzero(counts)
    span = used[-1] - used[0] + 1
    holds = len(used) > 0.6 * span and span > 64
    if counts.sum() < 20 * 256:
        holds = None  # too few values
    if bits < 8:
        holds = INFO
    return line("levels of grey in use", len(used), holds, f"more than {max(int(0.6 * span), 64)}",
                f"of the {span} from {used[0]} to {used[-1]}: images of fewer bits have fewer, and "
                "their number is no number of 8 bits")


def check_repeated(images, other_split):
    digests = _digests(images, "repeated images")
    repeated = len(digests) - len(set(digests))
    allowed = int(REPEATED_SHARE * len(digests))
    yield line("repeated images", repeated, repeated <= allowed, f"at most {allowed}",
               "an image that comes twice counts twice, and makes the standard error too small")
    if other_split is None:
        yield line("images of both splits", None, None, "none",
                   "there is no other split to compare with")
        return
    others = set(_digests(other_split, "images of both splits"))
    both = sum(digest in others for digest in digests)
    yield line("images of both splits", both, both <= allowed,
               f"at most {allowed} of {len(digests):,}",
               f"exact copies among the {len(other_split.array):,} images of {other_split.name} "
               f"{other_split.split}: what was trained on is no test")


def _digests(images, progress):
    return [hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
            for image in BAR(images.array, progress)]


def are_related(one, two):
    """Whether two names are variants of one set, like imagenet64-oord and imagenet64-chrabaszcz."""
    return one != two and one.startswith("imagenet") and one.split("-")[0] == two.split("-")[0]
