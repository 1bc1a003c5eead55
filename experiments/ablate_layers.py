"""Table 2b: do ActNorm and invertible dense layers help?

    python experiments/ablate_layers.py                        # smoke: a minute, embedded images
    python experiments/ablate_layers.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_layers.py --scale paper --dry-run

Fixed: couplings and everything else. Swept: Glow's ActNorm and Glow's invertible dense layer
before each coupling, on or off. The paper compares the four combinations and leaves both off; its
values are not known. The layers follow Glow; sizes below paper scale are our choice.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import JetConfig
from paper_figures import tables
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, with_model
from sweeps.search import Search
from train import TrainConfig

ACTNORM, INVERTIBLE_DENSE = (False, True), (False, True)
GRID = {scale: (ACTNORM, INVERTIBLE_DENSE) for scale in ("smoke", "small", "medium", "paper")}
BASE = {
    "smoke": TrainConfig(
        data="cifar10-subset", batch_size=16, total_steps=80, lr=4e-3,
        model=JetConfig(image_size=32, num_couplings=10, block_depth=1, emb_dim=32, num_heads=2)),
    "small": TrainConfig(
        data="cifar10", batch_size=50, total_steps=5000, lr=1.2e-2,  # 5 epochs
        model=JetConfig(image_size=32, num_couplings=12, block_depth=1, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(
        data="cifar10", batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
        model=JetConfig(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4)),
    "paper": at_paper_scale(TrainConfig(data="imagenet64-oord")),  # the official recipe
}


def configs(scale):
    """The grid points of a scale."""
    return [Point(config=with_model(BASE[scale], actnorm=actnorm, invertible_dense=dense))
            for actnorm, dense in itertools.product(*GRID[scale])]


EXPERIMENT = Experiment(name="ablate_layers", description=__doc__, configs=configs,
                        swept=("actnorm", "invertible_dense"), draw=tables.draw_layers,
                        seeds={"small": 2}, search={"small": Search(
                            arm=("actnorm", "invertible_dense"), factors=(0.5, 1, 2))})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
