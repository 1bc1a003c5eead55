"""Table 2a: masking or pairing, for channel and for spatial couplings.

    python experiments/ablate_splits.py                        # smoke: a minute, embedded images
    python experiments/ablate_splits.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_splits.py --scale paper --dry-run

Fixed: the number of couplings and everything else. Swept: which couplings (channel ones alone,
spatial ones alone, the official 4:1) and how a network sees its half: pairing (official: it gets
x1's values alone) or masking (all tokens, x2's values set to zero). The paper compares the two
for both kinds; its values are not known, its masking is our reading, and so is a grid of whole
models of one mode. Sizes below paper scale are our choice.
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

RATIOS = {"channel-only": ("channels",), "spatial-only": ("spatial",),
          "4:1": ("channels",) * 4 + ("spatial",)}
MODES = ("pairing", "masking")
GRID = {scale: (RATIOS, MODES) for scale in ("smoke", "small", "medium", "paper")}
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
    return [Point(config=with_model(BASE[scale], kinds=RATIOS[ratio], split_mode=mode),
                  labels={"coupling_ratio": ratio})
            for ratio, mode in itertools.product(*GRID[scale])]


EXPERIMENT = Experiment(name="ablate_splits", description=__doc__, configs=configs,
                        swept=("coupling_ratio", "split_mode"), draw=tables.draw_splits,
                        seeds={"small": 2}, search={"small": Search(
                            arm=("coupling_ratio", "split_mode"), factors=(0.5, 1, 2))})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
