"""An experiment of three points that trains in a tenth of a second each; tests run it.

Small scale: a run of half a minute. Medium scale: a chain of one run and two that begin with its
weights, and a run of its own. Paper scale: three points, two of which have the same couplings.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import load_images
from jet import JetConfig
from sweeps import sweep
from sweeps.grid import Experiment, Point, with_model
from train import TrainConfig

BASE = TrainConfig(data="cifar10-subset-vehicles", batch_size=8, total_steps=4, lr=1e-2, model=JetConfig(
    image_size=32, patch_size=8, num_couplings=1, block_depth=1, emb_dim=8))


def configs(scale):
    if scale == "medium":
        return chain()
    if scale == "paper":
        return shared()
    if scale == "small":
        return [Point(labels={"heads": 2}, config=dataclasses.replace(
            with_model(BASE, num_heads=2, num_couplings=2), total_steps=4000))]
    return [Point(labels={"heads": heads}, config=with_model(BASE, num_heads=heads)) for heads in (1, 2, 4)]


def chain():
    first, other, _ = configs("smoke")
    then = [Point(labels={"heads": name}, after=first,
                  config=dataclasses.replace(first.config, lr=1e-3, total_steps=steps))
            for name, steps in (("then", 2), ("as-it-is", 0))]
    return [first, *then, other]


def shared():
    """The first and the last point have the same couplings, written differently."""
    splits = (("one", ("vstripes",)), ("two", ("hstripes",)), ("three", ("vstripes", "hstripes")))
    return [Point(labels={"heads": name}, config=with_model(
        BASE, num_heads=1, kinds=("spatial",), spatial_splits=patterns))
        for name, patterns in splits]


def evaluate_few(monkeypatch):
    """Runs are evaluated on eight images of each split."""
    monkeypatch.setattr(train, "load_images", lambda name, split, root=None: load_images(
        name, split, root).first(8 if split == "test" else None))


def draw(csv, out_dir):
    return [csv]


EXPERIMENT = Experiment(name="tiny_experiment", description=__doc__, configs=configs,
                        swept=("heads",), draw=draw)

if __name__ == "__main__":
    sweep.main(EXPERIMENT)
