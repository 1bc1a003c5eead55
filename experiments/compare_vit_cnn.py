"""Figure 2a: ViT or CNN blocks in the couplings, bits/dim against training compute.

    python experiments/compare_vit_cnn.py                      # smoke: a minute, embedded images
    python experiments/compare_vit_cnn.py --scale small --jobs 2 --data-root DIR
    python experiments/compare_vit_cnn.py --scale paper --dry-run

Fixed: couplings, steps, images. Swept: the block and the width. The paper (ImageNet-1k 64 x 64):
ViT blocks clearly win at equal compute. Its CNN block and its sizes are not known: the block
(jet.CNNBlock), the widths and all sizes below paper scale are our choice; vit with width 512 is
the official model (207.2 M parameters).
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import JetConfig
from paper_figures import figure2
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, with_model
from train import TrainConfig

GRID = {  # block, width
    "smoke": (("vit", "cnn"), (16, 32)), "small": (("vit", "cnn"), (16, 32, 64)),
    "medium": (("vit", "cnn"), (64, 128, 256)), "paper": (("vit", "cnn"), (128, 256, 512, 768))}
HEAD_DIM = {"smoke": 16, "small": 16, "medium": 64, "paper": 64}  # width of an attention head
BASE = {
    "smoke": TrainConfig(data="cifar10-subset", batch_size=16, total_steps=80, lr=4e-3,
                         model=JetConfig(image_size=32, num_couplings=10, block_depth=1)),
    "small": TrainConfig(data="cifar10", batch_size=32, total_steps=650, lr=3e-3,
                         model=JetConfig(image_size=32, num_couplings=12, block_depth=1)),
    "medium": TrainConfig(data="cifar10", batch_size=256, total_steps=1000, lr=1e-3,
                          precision="bfloat16",
                          model=JetConfig(image_size=32, num_couplings=32, block_depth=1)),
    "paper": at_paper_scale(TrainConfig(data="imagenet64-oord")),  # the official recipe
}


def configs(scale):
    """The grid points of a scale."""
    return [Point(config=with_model(BASE[scale], block=block, emb_dim=width,
                                    num_heads=width // HEAD_DIM[scale]))
            for block, width in itertools.product(*GRID[scale])]


EXPERIMENT = Experiment(name="compare_vit_cnn", description=__doc__, configs=configs,
                        swept=("block", "emb_dim"), draw=figure2.draw_a)

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
