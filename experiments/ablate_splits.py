"""Table 2a: masking or pairing, for channel and for spatial couplings.

    python experiments/ablate_splits.py                        # smoke: a minute, embedded images
    python experiments/ablate_splits.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_splits.py --scale paper --dry-run

Fixed: the number of couplings and everything else. Swept: which couplings (channel ones alone, spatial ones alone, the
official 4:1) and how a network sees its half: pairing (official: it gets x1's values alone) or masking (all tokens,
x2's values set to zero). The paper compares the two for both kinds; its values are not known, its masking is our
reading, and so is a grid of whole models of one mode. Sizes below paper scale are our choice.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import ablate_coupling, sweep
from paper_figures import tables

BASE = ablate_coupling.BASE


def configs(scale):
    """The grid points of a scale."""
    return [sweep.Point(labels=dict(zip(tables.SPLITS_SWEPT, (ratio, mode))), config=dataclasses.replace(
        BASE[scale], model=dataclasses.replace(BASE[scale].model, kinds=ablate_coupling.KINDS[ratio], split_mode=mode)))
        for ratio, mode in tables.SPLITS_GRID[scale]]


if __name__ == "__main__":
    sweep.main("ablate_splits", __doc__, configs, tables.SPLITS_SWEPT, tables.draw_splits)
