"""Rows as a sweep would write them, made up from the grid of an experiment: tests of figures and tables use them."""
import functools
import importlib

import numpy as np
import pandas as pd

from data import SETS
from experiments import sweep
from paper_figures import style
from paper_figures.results_csv import columns

IMAGES = {"test": 10_000, "train": 2_048}


def grid_rows(experiment, scale, seeds=(0,)):
    """A copy of the rows; no two bits/dim of a seed are equal, and every run has its share of the cap, size and cost."""
    return _grid_rows(experiment, scale, tuple(seeds)).copy()


@functools.cache
def _grid_rows(experiment, scale, seeds):
    points, rows = importlib.import_module(f"experiments.{experiment}").configs(scale), []
    names = columns(tuple(points[0].labels))
    for seed in seeds:
        for i, point in enumerate(points):
            run = point.run(seed, style.ROOT)
            config, model = run.config, run.config.model
            fixed = dict.fromkeys(names, 1) | {
                "experiment": experiment, "scale": scale, "run_id": run.run_id, "seed": seed, "init": config.init or np.nan,
                "channel_share": sweep.channel_share(model), "num_couplings": model.num_couplings, "block": model.block,
                "block_depth": model.block_depth, "emb_dim": model.emb_dim, "step": config.total_steps,
                "total_steps": config.total_steps, "bits_per_dim_se": 0.0031 + 1e-4 * i,
                "logdet_cap_share": sweep.logdet_cap_share(model, 0.5 * model.logdet_cap_nats),
                "num_params": sweep.num_parameters(model), "train_flops": sweep.train_flops(config), "train_seconds": 3.25 + i,
                "hardware": "CPU", "dataset": config.data, "variant": SETS[config.data].variant,
                "git_commit": "0123456789abcdef", "git_dirty": False}
            rows += [fixed | point.labels | {
                "split": split, "bits_per_dim": 4 + 0.01 * i + 0.02 * seed + 0.005 * (split == "train"),
                "num_images": IMAGES[split], "fingerprint": f"{split} of {config.data}"} for split in ("train", "test")]
    return pd.DataFrame(rows)[names]
