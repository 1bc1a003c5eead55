"""The tables of the paper, as Markdown and LaTeX: ours, and beside them what was published.

    python paper_figures/tables.py --scale small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style

SPLITS_SWEPT = ("coupling_ratio", "split_mode")
RATIOS, MODES = ("channel-only", "spatial-only", "4:1"), ("pairing", "masking")
SPLITS_GRID = {scale: [(ratio, mode) for ratio in RATIOS for mode in MODES] for scale in style.SCALES}
LAYERS_SWEPT = ("actnorm", "invertible_dense")
ACTNORM, DENSE = ("no-actnorm", "actnorm"), ("no-dense", "dense")
LAYERS_GRID = {scale: [(actnorm, dense) for actnorm in ACTNORM for dense in DENSE] for scale in style.SCALES}

MAIN_SWEPT = ("size", "training", "dataset")
MAIN_VARYING = ("num_couplings", "block_depth", "emb_dim", "total_steps", "lr", "init")
MAIN_SIZES = {"smoke": ("10x1",), "small": ("12x1", "16x2"), "medium": ("32x1", "32x2"), "paper": ("32x2", "64x5")}
# What is trained on what: from scratch, in advance on other images, from those weights on, or no further.
STAND_IN = [("pretrained", "cifar10-animals"), ("scratch", "cifar10-vehicles"), ("fine-tuned", "cifar10-vehicles"),
            ("not-fine-tuned", "cifar10-vehicles")]
MAIN_STAGES = {
    "smoke": [(training, name.replace("cifar10", "cifar10-subset")) for training, name in STAND_IN],
    "small": STAND_IN, "medium": STAND_IN,
    "paper": [("pretrained", "imagenet21k-64-box"), ("pretrained", "imagenet21k-32-box"),
              ("scratch", "imagenet64-oord"), ("fine-tuned", "imagenet64-oord"),
              ("scratch", "imagenet32-oord"), ("fine-tuned", "imagenet32-oord"),
              ("scratch", "cifar10"), ("fine-tuned", "cifar10")]}
MAIN_GRID = {scale: [(size, *stage) for size in MAIN_SIZES[scale] for stage in MAIN_STAGES[scale]]
             for scale in style.SCALES}


def draw_splits(path, out_dir=style.OUT):
    raise NotImplementedError


def draw_layers(path, out_dir=style.OUT):
    raise NotImplementedError


def draw_main(path, out_dir=style.OUT):
    raise NotImplementedError
