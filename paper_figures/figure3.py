"""Figure 3: does a larger Jet help? bits/dim of test and training images against training compute, one panel a set.

    python paper_figures/figure3.py --scale small
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style

SWEPT = ("dataset", "num_couplings", "block_depth", "emb_dim")
SETS = {  # a smaller and a larger one each
    "smoke": ("cifar10-subset-vehicles", "cifar10-subset"),
    "small": ("cifar10-subset", "cifar10"), "medium": ("cifar10-subset", "cifar10"),
    "paper": ("imagenet32-oord", "imagenet21k-32-box", "imagenet64-oord", "imagenet21k-64-box")}
SIZES = {  # couplings, blocks in each, width: all combinations
    "smoke": ((8, 12), (1,), (16, 32)), "small": ((10, 20), (1, 2), (16, 32)), "medium": ((16, 32), (1, 2), (128, 256)),
    "paper": ((16, 32, 64), (2, 5), (256, 512))}
GRID = {scale: [(name, *map(str, size)) for name in SETS[scale] for size in itertools.product(*SIZES[scale])]
        for scale in style.SCALES}


def draw(path, out_dir=style.OUT):
    raise NotImplementedError
