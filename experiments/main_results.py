"""The main table: bits/dim from scratch, and pretrained on a larger set, then fine-tuned.

    python experiments/main_results.py                         # smoke: a minute, embedded images
    python experiments/main_results.py --scale small --jobs 2 --data-root DIR
    python experiments/main_results.py --scale paper --dry-run

The paper's code reports 3.72 (32 couplings x depth 2) and 3.66 (64 x 5) on ImageNet-1k 64 x 64 from scratch, 200 epochs;
that pretraining on ImageNet-21k helps is its claim, the other values are not known here. Our choice at paper scale: 50
epochs of pretraining, fine-tuning with a third of the learning rate for 20 epochs of ImageNet-1k or 100 of CIFAR-10,
CIFAR-10 from scratch for 200 epochs. Below it, CIFAR-10's six animal classes stand for ImageNet-21k and its four vehicle
classes for the target, which is trained from scratch for as many steps as the fine-tuning has; "not-fine-tuned" are the
pretrained weights as they are.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import sweep
from jet import JetConfig
from paper_figures import tables
from train import TrainConfig

BASE = {
    "smoke": TrainConfig(batch_size=16, lr=4e-3, model=JetConfig(image_size=32, emb_dim=32, num_heads=2)),
    "small": TrainConfig(batch_size=32, lr=3e-3, model=JetConfig(image_size=32, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(batch_size=256, lr=1e-3, precision="bfloat16",
                          model=JetConfig(image_size=32, emb_dim=256, num_heads=4)),
    "paper": TrainConfig(),
}
STEPS = {  # pretraining, the target set
    "smoke": (160, 40), "small": (1000, 250), "medium": (2000, 1000)}
PAPER_EPOCHS = {"imagenet21k": (50, None), "imagenet32": (200, 20), "imagenet64": (200, 20), "cifar10": (200, 100)}


def configs(scale):
    """The grid points of a scale; what is fine-tuned comes after what it begins with."""
    points = []
    for size, training, name in tables.MAIN_GRID[scale]:
        couplings, depth = map(int, size.split("x"))
        base = BASE[scale]
        config = dataclasses.replace(base, data=name, model=dataclasses.replace(
            base.model, num_couplings=couplings, block_depth=depth))
        if scale == "paper":
            from_scratch, further = PAPER_EPOCHS[name.split("-")[0]]
            config = sweep.at_paper_scale(config, further if training == "fine-tuned" else from_scratch)
        else:
            config = dataclasses.replace(config, total_steps=STEPS[scale][training != "pretrained"])
        if training == "fine-tuned":
            config = dataclasses.replace(config, lr=config.lr / 3)
        if training == "not-fine-tuned":
            config = dataclasses.replace(config, total_steps=0)
        after = [point for point in points if point.labels["training"] == "pretrained" and point.labels["size"] == size
                 and point.config.model == config.model] if "fine-tuned" in training else [None]
        points.append(sweep.Point(labels=dict(zip(tables.MAIN_SWEPT, (size, training, name))), config=config, after=after[0]))
    return points


if __name__ == "__main__":
    sweep.main("main_results", __doc__, configs, tables.MAIN_SWEPT, tables.draw_main, varying=tables.MAIN_VARYING)
