"""Figure 3: bits/dim against training compute, over couplings, depth, width and image sets.

    python experiments/scaling.py                              # smoke: a minute, embedded images
    python experiments/scaling.py --scale small --jobs 2 --data-root DIR
    python experiments/scaling.py --scale paper --dry-run

Fixed: steps on each set. Swept: set, couplings, depth, width. Test and training bits/dim stand
side by side, so that overfitting shows. The paper (ImageNet-1k and -21k, 32 and 64 pixels): on
ImageNet-1k large models overfit, on ImageNet-21k more compute keeps helping. Its grid is not
known: ours includes the two known sizes (32 x 2 and 64 x 5 of width 512, 207.2 M and 1,019.6 M
parameters); all of it is our choice. Below paper scale the 2,048 training images of
cifar10-subset (smoke: its 818 vehicles) stand for the smaller set.
"""
import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import JetConfig
from paper_figures import figure3
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, with_model
from sweeps.search import Search
from train import TrainConfig

GRID = {  # image sets (a smaller and a larger one), couplings, blocks in each, width
    "smoke": (("cifar10-subset-vehicles", "cifar10-subset"), (8, 12), (1,), (16, 32)),
    "small": (("cifar10-subset", "cifar10"), (10, 20), (1, 2), (16, 32)),
    "medium": (("cifar10-subset", "cifar10"), (16, 32), (1, 2), (128, 256)),
    "paper": (("imagenet32-oord", "imagenet21k-32-box", "imagenet64-oord", "imagenet21k-64-box"),
              (16, 32, 64), (2, 5), (256, 512))}
HEAD_DIM = {"smoke": 16, "small": 16, "medium": 64, "paper": 64}  # width of an attention head
BASE = {
    "smoke": TrainConfig(batch_size=16, total_steps=80, lr=4e-3, model=JetConfig(image_size=32)),
    # 5 epochs of CIFAR-10, 122 of its subset
    "small": TrainConfig(batch_size=50, total_steps=5000, lr=1.2e-2,
                         model=JetConfig(image_size=32)),
    "medium": TrainConfig(batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
                          model=JetConfig(image_size=32)),
    "paper": TrainConfig(),
}


def configs(scale):
    """The grid points of a scale."""
    points = []
    for data, couplings, depth, width in itertools.product(*GRID[scale]):
        config = with_model(dataclasses.replace(BASE[scale], data=data), num_couplings=couplings,
                            block_depth=depth, emb_dim=width, num_heads=width // HEAD_DIM[scale])
        if scale == "paper":  # 256 tokens at both sizes
            config = at_paper_scale(config)
        points.append(Point(config=config))
    return points


EXPERIMENT = Experiment(name="scaling", description=__doc__, configs=configs,
                        swept=("dataset", "num_couplings", "block_depth", "emb_dim"),
                        draw=figure3.draw, search={"small": Search(
                            arm=("block_depth", "emb_dim"), factors=(0.5, 1, 2),
                            of={"num_couplings": "20"})})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
