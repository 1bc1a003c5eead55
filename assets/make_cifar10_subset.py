"""Make cifar10_subset.npz: 2,048 training and 512 test images of CIFAR-10, classes balanced.

    JET_DATA=FOLDER python assets/make_cifar10_subset.py

Scan each split in official order and keep an image while its class has room; keep that order.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SUBSET_FILE, load_images

ROOM = {"train": [205] * 8 + [204] * 2, "test": [52] * 2 + [51] * 8}  # images per class


def main():
    arrays = {}
    for split, room in ROOM.items():
        images = load_images("cifar10", split)
        labels = pd.Series(images.labels)
        kept = np.flatnonzero(labels.groupby(labels).cumcount() < np.take(room, labels))
        arrays[f"{split}_images"] = images.array[kept]
        arrays[f"{split}_labels"] = images.labels[kept].astype(np.uint8)
        print(f"{split}: {len(kept)} of the first {kept[-1] + 1} images")
    np.savez_compressed(SUBSET_FILE, **arrays)
    print(f"{SUBSET_FILE}: {SUBSET_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
