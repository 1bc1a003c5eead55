"""Figure 4: the ratio of channel to spatial couplings, for four kinds of spatial split.

    python experiments/ablate_coupling.py                      # smoke: one minute, embedded images
    python experiments/ablate_coupling.py --scale small --data-root DIR
    python experiments/ablate_coupling.py --scale paper --dry-run
    python experiments/ablate_coupling.py --scale paper --cluster slurm --partition NAME \\
        --gpus-per-node 8

Fixed: the number of couplings and everything else. Swept: the ratio and the split. The paper
(Figure 4 and its table, ImageNet-1k 64 x 64) is not quoted in numbers here: results/reported.csv
has none for it; its official config uses 4:1 with mixed splits. Sizes below paper scale are our
choice.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import SPATIAL_SPLITS, JetConfig
from paper_figures import figure4
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, with_model
from sweeps.search import Search
from train import TrainConfig

RATIOS = {"channel-only": ("channels",), "8:1": ("channels",) * 8 + ("spatial",),
          "4:1": ("channels",) * 4 + ("spatial",), "2:1": ("channels",) * 2 + ("spatial",),
          "1:1": ("channels", "spatial"), "spatial-only": ("spatial",)}
SPLITS = {"row": ("hstripes", "hstripes-inv"), "column": ("vstripes", "vstripes-inv"),
          "checkerboard": ("checkerboard", "checkerboard-inv"), "mix": SPATIAL_SPLITS}
GRID = {"smoke": (("channel-only", "4:1", "1:1", "spatial-only"), SPLITS),
        "small": (RATIOS, SPLITS), "medium": (RATIOS, SPLITS), "paper": (RATIOS, SPLITS)}
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
    """The grid points of a scale; some have the same couplings, and share a run."""
    points = []
    for ratio, split in itertools.product(*GRID[scale]):
        config = with_model(BASE[scale], kinds=RATIOS[ratio], spatial_splits=SPLITS[split])
        splits = [spatial for _, spatial in config.model.coupling_splits if spatial]
        if split == "mix" and len(splits) < len(SPATIAL_SPLITS):
            # Too few for a whole cycle: one of each family before the inverses (our choice).
            config = with_model(config, spatial_splits=SPATIAL_SPLITS[::2] + SPATIAL_SPLITS[1::2])
        labels = {"coupling_ratio": ratio, "spatial_split": split}
        points.append(Point(config=config, labels=labels))
    return points


EXPERIMENT = Experiment(name="ablate_coupling", description=__doc__, configs=configs,
                        swept=("coupling_ratio", "spatial_split"), draw=figure4.draw,
                        seeds={"small": 2}, search={"small": Search(
                            arm=("block", "block_depth", "emb_dim"), factors=(0.5, 1, 2),
                            of={"coupling_ratio": "4:1", "spatial_split": "mix"})})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
