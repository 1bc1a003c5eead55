"""Rows as a sweep would write them, made up from an experiment's grid, for tests of figures."""
import functools
import hashlib
import importlib

import numpy as np
import pandas as pd

from data import SETS
from harness.flops import logdet_cap_nats, num_parameters, train_flops
from harness.host import ROOT
from paper_figures.results_csv import columns
from sweeps.grid import channel_share, logdet_cap_share, make_runs

IMAGES = {"test": 10_000, "train": 2_048}


def grid_rows(experiment, scale, seeds=(0,)):
    """A copy of the rows: no two bits/dim of a seed are equal but those of points that share a run.

    Every run has its share of the cap, its size and its cost.
    """
    return _grid_rows(experiment, scale, tuple(seeds)).copy()


@functools.cache
def _grid_rows(name, scale, seeds):
    experiment = importlib.import_module(f"experiments.{name.removesuffix('_lengths')}").EXPERIMENT
    if name.endswith("_lengths"):
        (experiment,) = experiment.also
    swept, points = experiment.swept, experiment.configs(scale)
    places = {tuple(point.values(swept).values()): place for place, point in enumerate(points)}
    rows = []
    for seed in seeds:
        of_seed = {}
        for i, run in enumerate(make_runs(experiment, scale, [seed], ROOT)):
            of_seed |= {places[tuple(values.values())]: _rows_of(run, values, i, len(points), swept)
                        for values in run.points}
        rows += [row for place in sorted(of_seed) for row in of_seed[place]]
    return pd.DataFrame(rows).assign(experiment=name, scale=scale)[columns(swept)]


def _rows_of(run, values, i, grid_points, swept):
    """The training and the test row of a point. i: the number of its run in the grid."""
    config, model = run.config, run.config.model
    fixed = dict.fromkeys(columns(swept), 1) | {
        "run_id": run.run_id, "seed": config.seed, "grid_points": grid_points,
        "init": config.init or np.nan, "channel_share": channel_share(model),
        "num_couplings": model.num_couplings, "block": model.block,
        "block_depth": model.block_depth, "emb_dim": model.emb_dim, "patch_size": model.patch_size, "step": config.total_steps,
        "batch_size": config.batch_size, "total_steps": config.total_steps, "bits_per_dim_se": 0.0031 + 1e-4 * i,
        "logdet_cap_share": logdet_cap_share(model, 0.5 * logdet_cap_nats(model)),
        "num_params": num_parameters(model), "train_flops": train_flops(config),
        "train_seconds": 3.25 + i, "hardware": "CPU", "dataset": config.data,
        "variant": SETS[config.data].variant, "git_commit": "0123456789abcdef", "git_dirty": False}
    test_bits = 4 + 0.01 * i + 0.02 * config.seed
    return [fixed | values | {"split": split, "bits_per_dim": bits, "num_images": IMAGES[split],
                              "fingerprint": digest(f"{split} of {config.data}"),
                              "train_fingerprint": digest(f"train of {config.data}")}
            for split, bits in (("train", test_bits + 0.005), ("test", test_bits))]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()
