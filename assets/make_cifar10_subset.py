"""Make cifar10_subset.npz: 2,048 training and 512 test images of CIFAR-10, classes balanced.

    JET_DATA=FOLDER python assets/make_cifar10_subset.py

Scan each split in official order and keep an image while its class has room; keep that order.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SUBSET_FILE, load_images

ROOM = {"train": [205] * 8 + [204] * 2, "test": [52] * 2 + [51] * 8}  # images per class


def subset_indices(labels, room):
    """Of each class the first images, as many as it has room for; in order."""
    room, kept = list(room), []
    for index, label in enumerate(labels):
        if room[label] > 0:
            room[label] -= 1
            kept.append(index)
    return np.array(kept)


def main():
    arrays = {}
    for split, room in ROOM.items():
        images = load_images("cifar10", split)
        kept = subset_indices(images.labels, room)
        arrays[f"{split}_images"] = images.array[kept]
        arrays[f"{split}_labels"] = images.labels[kept].astype(np.uint8)
        print(f"{split}: {len(kept)} of the first {kept[-1] + 1} images")
    np.savez_compressed(SUBSET_FILE, **arrays)
    print(f"{SUBSET_FILE}: {SUBSET_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
