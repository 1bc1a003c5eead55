"""Figure 2a: ViT or CNN blocks in the couplings, bits/dim against training compute.

    python experiments/compare_vit_cnn.py                      # smoke: a minute, embedded images
    python experiments/compare_vit_cnn.py --scale small --jobs 2 --data-root DIR
    python experiments/compare_vit_cnn.py --scale paper --dry-run

Fixed: couplings, steps, images. Swept: the block and the width. The paper (ImageNet-1k 64 x 64): ViT blocks clearly
win at equal compute. Its CNN block and its sizes are not known: the block (jet.CNNBlock), the widths and all sizes
below paper scale are our choice; vit with width 512 is the official model (207.2 M parameters).
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import ablate_coupling, sweep
from paper_figures import figure2

BASE = ablate_coupling.BASE  # all but the block and its width
HEAD_DIM = {"smoke": 16, "small": 16, "medium": 64, "paper": 64}  # width of an attention head


def configs(scale):
    """The grid points of a scale."""
    base = BASE[scale]
    return [sweep.Point(labels={"block": block, "emb_dim": width}, config=dataclasses.replace(base, model=dataclasses.replace(
        base.model, block=block, emb_dim=int(width), num_heads=int(width) // HEAD_DIM[scale])))
        for block, width in figure2.GRID_A[scale]]


if __name__ == "__main__":
    sweep.main("compare_vit_cnn", __doc__, configs, figure2.SWEPT_A, figure2.draw_a)
