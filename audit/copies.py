"""Whether images of one split are near copies of the other's: JPEG, mirrored, a bit changed."""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from audit.checks import BAR, check

NEAR = 10  # grey levels (RMSE): copies of JPEG quality 75 are mostly below, CIFAR-10's own above 13
CELLS, CANDIDATES = 4, 8
FAR = 2  # times as far as a copy is the farthest of the candidates
MOST_PAIRS = 6e8
ALLOWED_SHARE = 0.001  # CIFAR-10 has six images of 10,000 that are mirrored training images
CHANGES = {"as they are": lambda images: images, "mirrored": lambda images: images[:, :, ::-1],
           "upside down": lambda images: images[:, ::-1]}
line = functools.partial(check, "Data")


def thumbnails(array, progress=""):
    """Means (N, CELLS, CELLS, C) over the cells of a grid."""
    rows, columns = (np.unique(np.arange(CELLS) * side // CELLS) for side in array.shape[1:3])
    parts = []
    for start in BAR(range(0, len(array), 256), progress):
        part = np.asarray(array[start:start + 256], np.float32)
        part = np.add.reduceat(np.add.reduceat(part, rows, 1), columns, 2)
        parts.append(part)
    sizes = np.outer(*(np.diff([*edges, side]) for edges, side in
                       zip((rows, columns), array.shape[1:3])))
    return np.concatenate(parts) / sizes[:, :, None]


def details(images):
    """What each image (N, H, W, C) has beyond its means over 3 x 3 pixels, of length 1: (N, D)."""
    x = torch.from_numpy(np.asarray(images, np.float32).copy()).permute(0, 3, 1, 2)
    fine = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).flatten(1)
    return F.normalize(fine, dim=1).numpy()


def is_photo(pixels):
    """Whether no level has most of the values, as the black of drawn digits has."""
    counts = np.bincount(pixels.astype(np.uint8).ravel(), minlength=256)
    return counts.max() < 0.2 * counts.sum()


def nearest(small, others):
    """Indices (n, CANDIDATES) of the nearest of the others (M, F) to each of small (n, F)."""
    squares = (others ** 2).sum(1)
    found = []
    for start in BAR(range(0, len(small), 64), "near copies"):
        distances = squares - 2 * small[start:start + 64] @ others.T
        kept = min(CANDIDATES, len(others))
        found.append(np.argpartition(distances, kept - 1, 1)[:, :kept])
    return np.concatenate(found)


def check_near_copies(images, other_split, rng):
    """rng: chooses the images that are looked for, where not all can be."""
    if other_split is None or other_split.array.shape[1:] != images.array.shape[1:]:
        yield line("near copies of the other split", None, None, "",
                   "there is no other split to compare with")
        return
    array, others = images.array, other_split.array
    count = min(len(array), max(64, int(MOST_PAIRS / len(others))))
    chosen = np.sort(rng.choice(len(array), count, replace=False))
    pixels = np.asarray(array[chosen], np.float32)
    small, big = thumbnails(pixels), thumbnails(others, "near copies").reshape(len(others), -1)
    allowed, alike = int(ALLOWED_SHARE * count), 0.5 + 4 / math.sqrt(pixels[0].size)
    largest = NEAR if is_photo(pixels) else NEAR / 3
    for name, change in CHANGES.items():
        candidates = nearest(change(small).reshape(count, -1), big)
        changed, least, near = change(pixels), math.inf, 0
        for start in range(0, count, 16):
            part = changed[start:start + 16]
            found = np.asarray(others[candidates[start:start + 16]], np.float32)
            gaps = found - part[:, None]
            gaps -= gaps.mean((2, 3, 4), keepdims=True)  # another brightness is a copy, too
            rmse = np.sqrt((gaps ** 2).mean((2, 3, 4)))
            least = min(least, rmse.min())
            # Two smooth skies are as near, and share no detail; of black frames, many are as near.
            is_near = rmse.min(1) < np.minimum(largest, rmse.max(1) / FAR)
            nearest_of = found[is_near, rmse[is_near].argmin(1)]
            near += int(((details(nearest_of) * details(part[is_near])).sum(1) > alike).sum())
        yield line(f"near copies, {name}", near, near <= allowed, f"at most {allowed} of {count:,}",
                   f"images less than {largest:.2g} levels (RMSE) from one of the {len(others):,} "
                   f"of {other_split.name} {other_split.split}, with its details; the nearest is "
                   f"{least:.1f} away")
