"""What are labels worth? Our own question, not the paper's: class-conditional Jets.

    python experiments/condition_classes.py                    # smoke: minutes, embedded images
    python experiments/condition_classes.py --scale small --jobs 2 --data-root DIR
    python experiments/condition_classes.py --scale paper --dry-run

Fixed: couplings and everything else. Swept: what a Jet is told of each image. "none" takes no
labels; "labels" has the official model's cross-attention, with a tenth of its steps untold; the
same weights are then measured with labels that belong to other images ("shuffled") and with none
("dropped"). All are compared image by image. The official code can do this, and nothing published
is known here. Small scale sweeps the learning rate as well. ImageNet is the variant that has labels
(chrabaszcz, 1 to 1,000): its bits/dim are not the paper's. All sizes are our choice.
"""
import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from jet import JetConfig
from paper_figures import conditions
from sweeps import sweep
from sweeps.grid import Experiment, Point, at_paper_scale, steps
from train import TrainConfig

CLASSES = {"smoke": 10, "small": 10, "medium": 10, "paper": 1001}
GRID = {"smoke": (8e-3,), "small": (3e-3, 6e-3, 1.2e-2), "medium": (1e-3,), "paper": (3e-4,)}  # lr
BASE = {
    "smoke": TrainConfig(
        data="cifar10-subset", batch_size=16, total_steps=160,
        model=JetConfig(image_size=32, num_couplings=8, block_depth=1, emb_dim=32, num_heads=2)),
    "small": TrainConfig(
        data="cifar10", batch_size=64, total_steps=steps("cifar10", 5, 64),
        model=JetConfig(image_size=32, num_couplings=12, block_depth=1, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(
        data="cifar10", batch_size=256, total_steps=1000, precision="bfloat16",
        model=JetConfig(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4)),
    "paper": at_paper_scale(TrainConfig(data="imagenet64-chrabaszcz")),
}


def configs(scale):
    """The grid points of a scale; what is only measured comes after what was trained."""
    points = []
    for lr, told in itertools.product(GRID[scale], (False, True)):
        config = dataclasses.replace(BASE[scale], lr=lr)
        labels = {"rate": f"{lr:g}"}
        if not told:
            points.append(Point(config=config, labels=labels))
            continue
        config = with_classes(config, CLASSES[scale])
        points.append(trained := Point(config=config, labels=labels))
        points += [Point(config=dataclasses.replace(config, condition=condition, total_steps=0),
                         labels=labels, after=trained) for condition in ("shuffled", "dropped")]
    return points


def with_classes(config, classes):
    model = dataclasses.replace(config.model, context_dim=classes)
    return dataclasses.replace(config, model=model, condition="labels")


EXPERIMENT = Experiment(
    name="condition_classes", description=__doc__, configs=configs, swept=("condition", "rate"),
    varying=("lr", "total_steps", "init"), draw=conditions.draw)

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
