"""Figure 2a: ViT or CNN blocks in the couplings, bits/dim against training compute.

    python experiments/compare_vit_cnn.py                      # smoke: a minute, embedded images
    python experiments/compare_vit_cnn.py --scale small --jobs 2 --data-root DIR
    python experiments/compare_vit_cnn.py --scale paper --dry-run

Fixed: couplings, steps, images. Swept: the block and the width. The paper (ImageNet-1k 64 x 64):
ViT blocks clearly win at equal compute. Its CNN block and its sizes are not known: the block
(jet.CNNBlock), the widths and all sizes below paper scale are our choice; vit with width 512 is
the official model (207.2 M parameters).
"""
import dataclasses
import itertools
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

GRID = {  # block, width
    "smoke": (("vit", "cnn"), (16, 32)), "small": (("vit", "cnn"), (16, 32, 64)),
    "medium": (("vit", "cnn"), (64, 128, 256)), "paper": (("vit", "cnn"), (128, 256, 512, 768))}
LENGTHS = {"0.5": 500, "1.5": 1500, "5": 5000}  # epochs: steps, of small scale
HEAD_DIM = {"smoke": 16, "small": 16, "medium": 64, "paper": 64}  # width of an attention head
BASE = {
    "smoke": TrainConfig(data="cifar10-subset", batch_size=16, total_steps=80, lr=4e-3,
                         model=JetConfig(image_size=32, num_couplings=10, block_depth=1)),
    "small": TrainConfig(data="cifar10", batch_size=50, total_steps=5000, lr=1.2e-2,  # 5 epochs
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


def lengths(scale):
    """The same at small scale with other training lengths, each with a whole schedule, and width
    32 with patches of 2 pixels (256 tokens, as in the paper) at all lengths.
    """
    points = configs(scale) if scale == "small" else []
    fine = [Point(config=with_model(point.config, patch_size=2)) for point in points
            if point.config.model.emb_dim == 32]
    return [Point(config=dataclasses.replace(point.config, total_steps=num_steps),
                  labels={"epochs": epochs})
            for epochs, num_steps in LENGTHS.items()
            for point in (fine if epochs == "5" else points + fine)]


ALSO = Experiment(name="compare_vit_cnn_lengths", description=__doc__, configs=lengths,
                  swept=("block", "emb_dim", "patch_size", "epochs"), draw=None,
                  varying=("total_steps",))
EXPERIMENT = Experiment(name="compare_vit_cnn", description=__doc__, configs=configs,
                        swept=("block", "emb_dim"), draw=figure2.draw_a, seeds={"small": 3},
                        also=(ALSO,),
                        search={"small": Search(
                            arm=("block", "emb_dim", "patch_size"), factors=(0.5, 1, 2))})

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
