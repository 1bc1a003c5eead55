"""Figure 2b: how many ViT blocks should the network of a coupling have?

    python experiments/ablate_block_depth.py                   # smoke: a minute, embedded images
    python experiments/ablate_block_depth.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_block_depth.py --scale paper --dry-run

Fixed: couplings, width, steps, images. Swept: the depth, 1 to 6. The paper (ImageNet-21k 32 x
32): bits/dim improve up to depth 5. Its number of couplings and width are not known: 32 and 512,
patches of 2 pixels (256 tokens), 50 epochs of 13 million images, their resizing (box) and all
sizes below paper scale are our choice.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import JetConfig
from paper_figures import figure2
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, with_model
from sweeps.search import Search
from train import TrainConfig

LENGTHS = {"0.5": 500, "1.5": 1500}  # epochs: steps, of small scale, beside its 5
GRID = {scale: (1, 2, 3, 4, 5, 6) for scale in ("smoke", "small", "medium", "paper")}
BASE = {
    "smoke": TrainConfig(
        data="cifar10-subset", batch_size=16, total_steps=60, lr=4e-3,
        model=JetConfig(image_size=32, num_couplings=8, emb_dim=32, num_heads=2)),
    "small": TrainConfig(
        data="cifar10", batch_size=50, total_steps=5000, lr=1.2e-2,  # 5 epochs
        model=JetConfig(image_size=32, num_couplings=12, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(
        data="cifar10", batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
        model=JetConfig(image_size=32, num_couplings=16, emb_dim=256, num_heads=4)),
    "paper": at_paper_scale(TrainConfig(data="imagenet21k-32-box")),
}


def configs(scale):
    """The grid points of a scale."""
    return [Point(config=with_model(BASE[scale], block_depth=depth)) for depth in GRID[scale]]


def lengths(scale):
    """The same at small scale with other training lengths, each with a whole schedule."""
    return [Point(config=dataclasses.replace(point.config, total_steps=num_steps),
                  labels={"epochs": epochs})
            for epochs, num_steps in LENGTHS.items() if scale == "small"
            for point in configs(scale)]


ALSO = Experiment(name="ablate_block_depth_lengths", description=__doc__, configs=lengths,
                  swept=("block_depth", "epochs"), draw=None, varying=("total_steps",))
EXPERIMENT = Experiment(name="ablate_block_depth", description=__doc__, configs=configs,
                        swept=("block_depth",), draw=figure2.draw_b, seeds={"small": 3},
                        also=(ALSO,),
                        search={"small": Search(arm=("block_depth",), factors=(0.5, 1, 2))})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
