"""Figure 2: the networks of the couplings. a: CNN or ViT, bits/dim against training compute. b: ViT blocks in each.

    python paper_figures/figure2.py --scale small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style

SWEPT_A, SWEPT_B = ("block", "emb_dim"), ("block_depth",)
BLOCKS = ("vit", "cnn")
WIDTHS = {"smoke": (16, 32), "small": (16, 32, 64), "medium": (64, 128, 256), "paper": (128, 256, 512, 768)}
DEPTHS = (1, 2, 3, 4, 5, 6)
GRID_A = {scale: [(block, str(width)) for block in BLOCKS for width in widths] for scale, widths in WIDTHS.items()}
GRID_B = {scale: [(str(depth),) for depth in DEPTHS] for scale in style.SCALES}


def draw_a(path, out_dir=style.OUT):
    raise NotImplementedError


def draw_b(path, out_dir=style.OUT):
    raise NotImplementedError
