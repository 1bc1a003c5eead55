"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
import contextlib
import csv

import numpy as np
import pandas as pd

WHICH = ("experiment", "scale", "run_id", "seed")
MEASURED = (
    "channel_share", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
    "total_steps", "lr", "precision", "init", "step", "images_seen", "split", "bits_per_dim", "bits_per_dim_se",
    "num_images", "logdet_cap_share", "num_params", "train_flops", "train_seconds", "device", "hardware",
    "threads", "processes", "dataset", "variant", "fingerprint", "train_fingerprint", "git_commit", "git_dirty",
    "python_version", "torch_version", "numpy_version")
KEY = ["run_id", "seed", "step", "split"]
NUMBERS = ("seed", "channel_share", "step", "images_seen", "bits_per_dim", "bits_per_dim_se", "num_images", "total_steps",
           "num_params", "train_flops")
SAME = ("experiment", "scale", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
        "total_steps", "lr", "precision", "init", "dataset", "variant")  # in all rows of a file, if not swept


class ResultsError(ValueError):
    """A results CSV that must not be used, in one line."""


def columns(swept):
    """All columns in order, for an experiment with these swept fields; some of them are columns of all experiments."""
    return [*WHICH, *(name for name in swept if name not in MEASURED), *MEASURED]


def read_experiment(path, known):
    """Which of the known experiments a CSV is of: the only one, or what its first row says. Raises ResultsError."""
    if len(known) == 1:
        return next(iter(known))
    found = ""
    with contextlib.suppress(OSError, ValueError, StopIteration), open(path, newline="") as file:
        found = next(csv.DictReader(file)).get("experiment")
    if found not in known:
        raise ResultsError(f"{path}: is of {found or 'no experiment'}, not of {' or '.join(known)}")
    return found


def read_results(path, experiment, swept, varying=()):
    """The rows of one CSV as a DataFrame; swept fields are text.

    varying: fields besides the swept ones that may differ from run to run. Where dataset is swept, what else is the
    same within a set may differ between sets. Raises ResultsError for a missing file, missing or unknown columns,
    repeated rows, numbers that are missing or not finite, and rows that do not belong in one series: of another
    experiment, scale, image set or configuration, or measured on other images.
    """
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(("run_id", "split", "init", *swept), str), keep_default_na=False,
                           na_values=[""])
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file: run experiments/{experiment}.py first") from None
    except (ValueError, OSError) as error:
        raise ResultsError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None
    expected = columns(swept)
    for problem, names in (("unknown", set(rows.columns) - set(expected)),
                           ("missing", set(expected) - set(rows.columns))):
        if names:
            raise ResultsError(f"{path}: {problem} columns {', '.join(sorted(names))}")
    if rows.empty:
        raise ResultsError(f"{path}: has no rows")
    for name in NUMBERS:
        rows[name] = pd.to_numeric(rows[name], errors="coerce")
        if len(bad := rows[~np.isfinite(rows[name])]):
            raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']} has no number as {name}")
    for name, bad in (("num_params", rows["num_params"] <= 0), ("bits_per_dim_se", rows["bits_per_dim_se"] < 0),
                      ("train_flops", (rows["train_flops"] <= 0) & (rows["total_steps"] > 0))):
        if bad.any():
            raise ResultsError(f"{path}: run {rows[bad].iloc[0]['run_id']} has {rows[bad].iloc[0][name]} as {name}")
    if wrong := set(rows["split"]) - {"train", "test"}:
        raise ResultsError(f"{path}: split {sorted(map(str, wrong))[0]} is neither train nor test")
    if len(bad := rows[rows.duplicated(KEY)]):
        raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']}, split {bad.iloc[0]['split']}, is there twice")
    for name in ("experiment", "scale"):
        if rows[name].nunique() != 1:
            raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, rows[name].unique()))}")
    if rows["experiment"].iloc[0] != experiment:
        raise ResultsError(f"{path}: is of {rows['experiment'].iloc[0]}, not of {experiment}")
    for _, one_set in rows.groupby("dataset") if "dataset" in swept else [("", rows)]:
        for name in SAME:
            if name not in (*swept, *varying) and one_set[name].nunique(dropna=False) != 1:
                raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, one_set[name].unique()))}")
        for split, group in one_set.groupby("split"):
            if group["fingerprint"].nunique() != 1 or group["num_images"].nunique() != 1:
                raise ResultsError(f"{path}: the {split} rows are measured on different images")
    return rows[expected]


def final_rows(path, experiment, swept, grid, what, varying=()):
    """The rows of the last step of every run, train and test, one for each seed and point of the grid.

    grid: {scale: [values of the swept fields, in their order]}. A run that stands for several points, "row|mix",
    has a row for each of them; its run_id tells. what: "Figure 4", for the messages. Raises ResultsError for a run
    that is missing, there twice, or not in the grid, besides all that read_results does.
    """
    rows = read_results(path, experiment, swept, varying)
    scale = rows["scale"].iloc[0]
    if scale not in grid:
        raise ResultsError(f"{path}: scale {scale} is none of {', '.join(grid)}")
    rows = rows[rows["step"] == rows["total_steps"]]
    if not (rows["split"] == "test").any():
        raise ResultsError(f"{path}: has no test rows of the last step")
    for name in swept:
        rows = rows.assign(**{name: rows[name].str.split("|")}).explode(name, ignore_index=True)
    points = rows[[*swept]].apply(tuple, axis=1)
    if len(bad := rows[~points.isin(grid[scale])]):
        raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']} is not in {what} at {scale} scale")
    for split in ("test", "train"):
        mine = rows[rows["split"] == split]
        if len(bad := mine[mine.duplicated([*swept, "seed"])]):
            row = bad.iloc[0]
            raise ResultsError(f"{path}: {' '.join(row[[*swept]])} seed {row['seed']} is there twice (run {row['run_id']})")
        found = set(zip(points[rows["split"] == split], mine["seed"]))
        missing = [f"{' '.join(point)} seed {seed}" for seed in sorted(rows["seed"].unique()) for point in grid[scale]
                   if (point, seed) not in found]
        if missing:
            rows_of = "" if split == "test" else f" in {split}"
            raise ResultsError(f"{path}: {len(missing)} runs of {what} are missing{rows_of}: {', '.join(missing)}: complete "
                               f"them by experiments/{experiment}.py --scale {scale}")
    return rows
