"""Figure 2b: how many ViT blocks should the network of a coupling have?

    python experiments/ablate_block_depth.py                   # smoke: a minute, embedded images
    python experiments/ablate_block_depth.py --scale small --jobs 2 --data-root DIR
    python experiments/ablate_block_depth.py --scale paper --dry-run

Fixed: couplings, width, steps, images. Swept: the depth, 1 to 6. The paper (ImageNet-21k 32 x 32): bits/dim improve up
to depth 5. Its number of couplings and width are not known: 32 and 512, patches of 2 pixels (256 tokens), 50 epochs of
13 million images, their resizing (box) and all sizes below paper scale are our choice.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import sweep
from jet import JetConfig
from paper_figures import figure2
from train import TrainConfig

BASE = {
    "smoke": TrainConfig(
        data="cifar10-subset", batch_size=16, total_steps=60, lr=4e-3,
        model=JetConfig(image_size=32, num_couplings=8, emb_dim=32, num_heads=2)),
    "small": TrainConfig(
        data="cifar10", batch_size=32, total_steps=350, lr=3e-3,
        model=JetConfig(image_size=32, num_couplings=12, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(
        data="cifar10", batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
        model=JetConfig(image_size=32, num_couplings=16, emb_dim=256, num_heads=4)),
    "paper": sweep.at_paper_scale(TrainConfig(data="imagenet21k-32-box")),
}


def configs(scale):
    """The grid points of a scale."""
    base = BASE[scale]
    return [sweep.Point(labels={"block_depth": depth}, config=dataclasses.replace(
        base, model=dataclasses.replace(base.model, block_depth=int(depth)))) for depth, in figure2.GRID_B[scale]]


if __name__ == "__main__":
    sweep.main("ablate_block_depth", __doc__, configs, figure2.SWEPT_B, figure2.draw_b)
