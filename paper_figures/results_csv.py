"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
import csv
from pathlib import Path

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
SCALES = ("smoke", "small", "medium", "paper")
LIMITS = {  # numbers that every row has, with the least and the most that they can be
    "seed": (0, 2 ** 63), "channel_share": (0, 1), "step": (0, 1e9), "images_seen": (0, 1e15), "bits_per_dim": (0, 1e3),
    "bits_per_dim_se": (0, 1e3), "num_images": (1, 1e9), "total_steps": (0, 1e9), "num_params": (1, 1e13),
    "train_flops": (0, 1e30)}
MAYBE = {"logdet_cap_share": (-1e3, 1.001), "train_seconds": (0, 1e12)}  # and that some rows have
TEXTS = ("experiment", "scale", "run_id", "split", "dataset", "variant")  # never empty
SAME = ("num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size", "total_steps", "lr", "precision",
        "init", "dataset", "variant")  # in all rows of a file, if not swept


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
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            found = next(csv.DictReader(file)).get("experiment")
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file") from None
    except (OSError, ValueError, StopIteration, csv.Error):
        pass
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
    texts = dict.fromkeys((*TEXTS, "init", "hardware", "git_commit", "git_dirty", *swept), str)
    try:
        rows = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
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
    for name in TEXTS:
        if rows[name].isna().any():
            raise ResultsError(f"{path}: line {rows.index[rows[name].isna()][0] + 2} has no {name}")
    for name, (low, high) in {**LIMITS, **MAYBE}.items():
        given, rows[name] = rows[name], pd.to_numeric(rows[name], errors="coerce")
        wrong = ~rows[name].between(low, high) & ((name in LIMITS) | given.notna())
        if wrong.any():
            run_id, what = rows["run_id"][wrong].iloc[0], rows[name][wrong].iloc[0]
            raise ResultsError(f"{path}: run {run_id} has no number as {name}" if np.isnan(what) or np.isinf(what) else
                               f"{path}: run {run_id} has {what:g} as {name}: must be from {low:g} to {high:g}")
    if (wrong := (rows["train_flops"] <= 0) & (rows["total_steps"] > 0)).any():
        raise ResultsError(f"{path}: run {rows['run_id'][wrong].iloc[0]} has 0 as train_flops")
    if wrong := set(rows["split"]) - {"train", "test"}:
        raise ResultsError(f"{path}: split {sorted(map(str, wrong))[0]} is neither train nor test")
    if len(bad := rows[rows.duplicated(KEY)]):
        raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']}, split {bad.iloc[0]['split']}, is there twice")
    for name in ("experiment", "scale"):
        if rows[name].nunique() != 1:
            raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, rows[name].unique()))}")
    named = Path(path).stem.rpartition("_")[2]
    if named in SCALES and named != rows["scale"].iloc[0]:
        raise ResultsError(f"{path}: is of {rows['scale'].iloc[0]} scale by its rows, and of {named} by its name")
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


def final_test_rows(*arguments):
    """The test rows of final_rows(*arguments)."""
    rows = final_rows(*arguments)
    return rows[rows["split"] == "test"]
