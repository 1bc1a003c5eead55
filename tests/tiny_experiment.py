"""An experiment of three points that trains in a second each; tests run it. Small scale: one of half a minute. Medium
scale: a chain of one run and two that begin with its weights, and a run of its own."""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import sweep
from jet import JetConfig
from train import TrainConfig

SWEPT = ("heads",)


def configs(scale):
    if scale == "medium":
        first, other, _ = configs("smoke")
        then = [sweep.Point(labels={"heads": name}, config=dataclasses.replace(first.config, lr=1e-3, total_steps=steps),
                            after=first) for name, steps in (("then", 4), ("as-it-is", 0))]
        return [first, *then, other]
    return [sweep.Point(labels={"heads": str(heads)}, config=TrainConfig(
        data="cifar10-subset", batch_size=8, total_steps=12 if scale == "smoke" else 4000, lr=1e-2, model=JetConfig(
            image_size=32, patch_size=8, num_couplings=2, block_depth=1, emb_dim=8, num_heads=heads)))
        for heads in ((1, 2, 4) if scale == "smoke" else (2,))]


def draw(csv, out_dir):
    return [csv]


if __name__ == "__main__":
    sweep.main("tiny_experiment", __doc__, configs, SWEPT, draw)
