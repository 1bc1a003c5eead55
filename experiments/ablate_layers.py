"""Table 2b: do ActNorm and invertible dense layers help?

    python experiments/ablate_layers.py                        # smoke: a minute, embedded images
    python experiments/ablate_layers.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_layers.py --scale paper --dry-run

Fixed: couplings and everything else. Swept: Glow's ActNorm and Glow's invertible dense layer before each coupling, on or
off. The paper compares the four combinations and leaves both off; its values are not known. The layers follow Glow; sizes
below paper scale are our choice.
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
    return [sweep.Point(labels=dict(zip(tables.LAYERS_SWEPT, (actnorm, dense))), config=dataclasses.replace(
        BASE[scale], model=dataclasses.replace(BASE[scale].model, actnorm=actnorm == "actnorm", invertible_dense=dense == "dense")))
        for actnorm, dense in tables.LAYERS_GRID[scale]]


if __name__ == "__main__":
    sweep.main("ablate_layers", __doc__, configs, tables.LAYERS_SWEPT, tables.draw_layers)
