"""Figure 3: bits/dim against training compute, over couplings, depth and width, on smaller and larger image sets.

    python experiments/scaling.py                              # smoke: a minute, embedded images
    python experiments/scaling.py --scale small --jobs 2 --data-root DIR
    python experiments/scaling.py --scale paper --dry-run

Fixed: steps on each set. Swept: set, couplings, depth, width. Test and training bits/dim stand side by side, so that
overfitting shows. The paper (ImageNet-1k and -21k, 32 and 64 pixels): on ImageNet-1k large models overfit, on
ImageNet-21k more compute keeps helping. Its grid is not known: ours includes the two known sizes (32 x 2 and 64 x 5 of
width 512, 207.2 M and 1,019.6 M parameters); all of it is our choice. Below paper scale the 2,048 training images of
cifar10-subset (smoke: its 818 vehicles) stand for the smaller set.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import compare_vit_cnn, sweep
from jet import JetConfig
from paper_figures import figure3
from train import TrainConfig

BASE = {
    "smoke": TrainConfig(batch_size=16, total_steps=80, lr=4e-3, model=JetConfig(image_size=32)),
    "small": TrainConfig(batch_size=32, total_steps=400, lr=3e-3, model=JetConfig(image_size=32)),
    "medium": TrainConfig(batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
                          model=JetConfig(image_size=32)),
    "paper": TrainConfig(),
}
HEAD_DIM = compare_vit_cnn.HEAD_DIM


def configs(scale):
    """The grid points of a scale."""
    points = []
    for values in figure3.GRID[scale]:
        labels, base = dict(zip(figure3.SWEPT, values)), BASE[scale]
        name, couplings, depth, width = labels["dataset"], *map(int, values[1:])
        model = dataclasses.replace(base.model, num_couplings=couplings, block_depth=depth, emb_dim=width,
                                    num_heads=width // HEAD_DIM[scale])
        config = dataclasses.replace(base, data=name, model=model)
        if scale == "paper":  # 256 tokens at both sizes
            config = sweep.at_paper_scale(config)
        points.append(sweep.Point(labels=labels, config=config))
    return points


if __name__ == "__main__":
    sweep.main("scaling", __doc__, configs, figure3.SWEPT, figure3.draw)
