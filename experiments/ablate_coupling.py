"""Figure 4: the ratio of channel to spatial couplings, for four kinds of spatial split.

    python experiments/ablate_coupling.py                      # smoke: one minute, embedded images
    python experiments/ablate_coupling.py --scale small --data-root DIR
    python experiments/ablate_coupling.py --scale paper --dry-run
    python experiments/ablate_coupling.py --scale paper --cluster slurm --partition NAME --gpus-per-node 8

Fixed: the number of couplings and everything else. Swept: the ratio and the split. The paper (Figure 4 and
its table, ImageNet-1k 64 x 64) is not quoted in numbers here: results/reported.csv has none for it;
its official config uses 4:1 with mixed splits. Sizes below paper scale are our choice.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import sweep
from jet import SPATIAL_SPLITS, JetConfig
from paper_figures import figure4
from train import TrainConfig

BASE = {
    "smoke": TrainConfig(
        data="cifar10-subset", batch_size=16, total_steps=80, lr=4e-3,
        model=JetConfig(image_size=32, num_couplings=10, block_depth=1, emb_dim=32, num_heads=2)),
    "small": TrainConfig(
        data="cifar10", batch_size=32, total_steps=650, lr=3e-3,
        model=JetConfig(image_size=32, num_couplings=12, block_depth=1, emb_dim=32, num_heads=2)),
    "medium": TrainConfig(
        data="cifar10", batch_size=256, total_steps=1000, lr=1e-3, precision="bfloat16",
        model=JetConfig(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4)),
    "paper": sweep.at_paper_scale(TrainConfig(data="imagenet64-oord")),  # the official recipe
}
KINDS = {"channel-only": ("channels",), "spatial-only": ("spatial",),
         **{f"{n}:1": ("channels",) * n + ("spatial",) for n in (8, 4, 2, 1)}}
SPLITS = {"row": ("hstripes", "hstripes-inv"), "column": ("vstripes", "vstripes-inv"),
          "checkerboard": ("checkerboard", "checkerboard-inv"), "mix": SPATIAL_SPLITS}


def configs(scale):
    """The grid points of a scale; points whose couplings are the same are one."""
    points = {}
    for ratio in figure4.ratios(scale):
        for split in figure4.SPLITS:
            model = dataclasses.replace(BASE[scale].model, kinds=KINDS[ratio], spatial_splits=SPLITS[split])
            num_spatial = sum(kind == "spatial" for kind, _ in model.coupling_splits)
            if split == "mix" and num_spatial < len(SPATIAL_SPLITS):
                # Too few for a whole cycle: one of each family before the inverses (our choice).
                model = dataclasses.replace(model, spatial_splits=SPATIAL_SPLITS[::2] + SPATIAL_SPLITS[1::2])
            labels = {"coupling_ratio": ratio, "spatial_split": split}
            point = sweep.Point(labels=labels, config=dataclasses.replace(BASE[scale], model=model))
            same = points.setdefault(model.coupling_splits, point)
            for name, value in labels.items():
                if value not in same.labels[name].split("|"):
                    same.labels[name] += f"|{value}"
    return list(points.values())


if __name__ == "__main__":
    sweep.main("ablate_coupling", __doc__, configs, figure4.SWEPT, figure4.draw)
