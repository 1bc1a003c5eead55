"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
import csv
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError

WHICH = ("experiment", "scale", "run_id", "seed", "grid_points")
MEASURED = (
    "channel_share", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
    "total_steps", "lr", "precision", "init", "step", "images_seen", "split", "bits_per_dim",
    "bits_per_dim_se", "num_images", "logdet_cap_share", "num_params", "train_flops",
    "train_seconds", "device", "hardware", "threads", "processes", "dataset", "variant",
    "fingerprint", "train_fingerprint", "git_commit", "git_dirty", "python_version",
    "torch_version", "numpy_version")
SCALES = ("smoke", "small", "medium", "paper")
LIMITS = {  # numbers that every row has, with the least and the most that they can be
    "seed": (0, 2 ** 63), "grid_points": (1, 1e6), "channel_share": (0, 1), "step": (0, 1e9),
    "images_seen": (0, 1e15), "bits_per_dim": (0, 1e3), "bits_per_dim_se": (0, 1e3),
    "num_images": (1, 1e9), "total_steps": (0, 1e9), "num_params": (1, 1e13),
    "train_flops": (0, 1e30)}
MAYBE = {"logdet_cap_share": (-1e3, 1.001), "train_seconds": (0, 1e12)}  # and that some rows have
TEXTS = ("experiment", "scale", "run_id", "split", "dataset", "variant")  # never empty
SAME = ("num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
        "total_steps", "lr", "precision", "init", "dataset", "variant")  # in all rows, if not swept


class ResultsError(UserError, ValueError):
    """A results CSV that must not be used, in one line."""


def columns(swept):
    """All columns in order, for these swept fields; some of them are columns of all experiments."""
    return [*WHICH, *(name for name in swept if name not in MEASURED), *MEASURED]


def key_of(swept):
    """The columns that no two rows of a CSV share."""
    return [*swept, "seed", "step", "split"]


def read_experiment(path, known):
    """Which of the known experiments a CSV is of: the only one, or what its first row says.

    Raises ResultsError.
    """
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

    varying: fields besides the swept ones that may differ from run to run. Where dataset is swept,
    what else is the same within a set may differ between sets. Raises ResultsError for a missing
    file, missing or unknown columns, repeated rows, numbers that are missing or not finite, and
    rows that do not belong in one series: of another experiment, scale, image set or configuration,
    or measured on other images.
    """
    rows = _read_rows(path, experiment, swept)
    _check_values(path, rows)
    if len(twice := rows[rows.duplicated(key_of(swept))]):
        row = twice.iloc[0]
        raise ResultsError(f"{path}: {' '.join(row[[*swept]])} seed {row['seed']}, split "
                           f"{row['split']}, is there twice (run {row['run_id']})")
    for name in ("experiment", "scale", "grid_points"):
        _check_same(path, rows, name)
    stated, named = rows["scale"].iloc[0], Path(path).stem.rpartition("_")[2]
    if stated not in SCALES:
        raise ResultsError(f"{path}: scale {stated} is none of {', '.join(SCALES)}")
    if named in SCALES and named != stated:
        raise ResultsError(f"{path}: is of {stated} scale by its rows, and of {named} by its name")
    if rows["experiment"].iloc[0] != experiment:
        raise ResultsError(f"{path}: is of {rows['experiment'].iloc[0]}, not of {experiment}")
    sets = rows.groupby("dataset") if "dataset" in swept else [("", rows)]
    for _, one_set in sets:
        for name in SAME:
            if name not in (*swept, *varying):
                _check_same(path, one_set, name)
        for split, group in one_set.groupby("split"):
            if group["fingerprint"].nunique() != 1 or group["num_images"].nunique() != 1:
                raise ResultsError(f"{path}: the {split} rows are measured on different images")
    return rows


def _read_rows(path, experiment, swept):
    """The rows with the right columns, and numbers as numbers where they are some."""
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
    for name in dict.fromkeys((*TEXTS, *swept)):
        if rows[name].isna().any():
            line = rows.index[rows[name].isna()][0] + 2
            raise ResultsError(f"{path}: line {line} has no {name}")
    return rows[expected]


def _check_values(path, rows):
    """Make numbers of the columns that hold some; raise ResultsError for an impossible value."""
    for name, (low, high) in {**LIMITS, **MAYBE}.items():
        given = rows[name]
        rows[name] = pd.to_numeric(given, errors="coerce")
        wrong = ~rows[name].between(low, high)
        if name in MAYBE:
            wrong &= given.notna()
        if not wrong.any():
            continue
        run_id, value = rows.loc[wrong, ["run_id", name]].iloc[0]
        if not np.isfinite(value):
            raise ResultsError(f"{path}: run {run_id} has no number as {name}")
        raise ResultsError(f"{path}: run {run_id} has {value:g} as {name}: must be from {low:g} to "
                           f"{high:g}")
    if (wrong := (rows["train_flops"] <= 0) & (rows["total_steps"] > 0)).any():
        raise ResultsError(f"{path}: run {rows['run_id'][wrong].iloc[0]} has 0 as train_flops")
    if wrong := set(rows["split"]) - {"train", "test"}:
        raise ResultsError(f"{path}: split {sorted(wrong)[0]} is neither train nor test")


def _check_same(path, rows, name):
    """Raise ResultsError where a column has more than one value."""
    if rows[name].nunique(dropna=False) != 1:
        raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, rows[name].unique()))}")


def final_rows(path, experiment, swept, what, varying=()):
    """The rows of the last step, train and test, of a CSV that has its whole grid for each seed.

    what: "Figure 4", for the messages. Raises ResultsError for a point of the grid that is missing,
    besides all that read_results does.
    """
    rows = read_results(path, experiment, swept, varying)
    final = rows[rows["step"] == rows["total_steps"]]
    if not (final["split"] == "test").any():
        raise ResultsError(f"{path}: has no test rows of the last step")
    known, expected = _points(rows, swept), rows["grid_points"].iloc[0]
    for seed in sorted(rows["seed"].unique()):
        for split in ("test", "train"):
            found = _points(final[(final["seed"] == seed) & (final["split"] == split)], swept)
            if len(found) == expected:
                continue
            where = f"for seed {seed}" if split == "test" else f"in {split} for seed {seed}"
            if len(found) > expected:
                raise ResultsError(f"{path}: has {len(found)} points of {what} {where}, more than "
                                   f"the {expected} of its grid_points")
            missing = [" ".join(point) for point in known if point not in found]
            names = f" ({', '.join(missing)})" if missing else ""
            raise ResultsError(f"{path}: {expected - len(found)} of {expected} points of {what} "
                               f"are missing {where}{names}: complete them by "
                               f"experiments/{experiment}.py --scale {rows['scale'].iloc[0]}")
    return final


def _points(rows, swept):
    """The grid points of rows, in their order."""
    return list(dict.fromkeys(zip(*(rows[name] for name in swept))))


def final_test_rows(*arguments):
    """The test rows of final_rows(*arguments)."""
    rows = final_rows(*arguments)
    return rows[rows["split"] == "test"]
