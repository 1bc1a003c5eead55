"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
import numpy as np
import pandas as pd

WHICH = ("experiment", "scale", "run_id", "seed")
MEASURED = (
    "channel_share", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
    "total_steps", "lr", "precision", "step", "images_seen", "split", "bits_per_dim", "bits_per_dim_se",
    "num_images", "logdet_cap_share", "num_params", "train_flops", "train_seconds", "device", "hardware",
    "threads", "processes", "dataset", "variant", "fingerprint", "train_fingerprint", "git_commit", "git_dirty",
    "python_version", "torch_version", "numpy_version")
KEY = ["run_id", "seed", "step", "split"]
NUMBERS = ("seed", "channel_share", "step", "images_seen", "bits_per_dim", "num_images", "total_steps")
SAME = ("experiment", "scale", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
        "total_steps", "lr", "precision", "dataset", "variant")  # in all rows of a file


class ResultsError(ValueError):
    """A results CSV that must not be used, in one line."""


def columns(swept):
    """All columns in order, for an experiment with these swept fields."""
    return [*WHICH, *swept, *MEASURED]


def read_results(path, experiment, swept):
    """The rows of one CSV as a DataFrame.

    Raises ResultsError for a missing file, missing or unknown columns, repeated rows, numbers that are
    missing or not finite, and rows that do not belong in one series: of another experiment, scale, image
    set or configuration, or measured on other images.
    """
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(("run_id", "split", *swept), str), keep_default_na=False,
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
    if wrong := set(rows["split"]) - {"train", "test"}:
        raise ResultsError(f"{path}: split {sorted(map(str, wrong))[0]} is neither train nor test")
    if len(bad := rows[rows.duplicated(KEY)]):
        raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']}, split {bad.iloc[0]['split']}, is there twice")
    for name in SAME:
        if rows[name].nunique(dropna=False) != 1:
            raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, rows[name].unique()))}")
    if rows["experiment"].iloc[0] != experiment:
        raise ResultsError(f"{path}: is of {rows['experiment'].iloc[0]}, not of {experiment}")
    for split, group in rows.groupby("split"):
        if group["fingerprint"].nunique() != 1 or group["num_images"].nunique() != 1:
            raise ResultsError(f"{path}: the {split} rows are measured on different images")
    return rows[expected]
