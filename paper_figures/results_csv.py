"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
WHICH = ("experiment", "scale", "run_id", "seed")
MEASURED = (
    "channel_share", "num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
    "total_steps", "lr", "precision", "step", "images_seen", "split", "bits_per_dim", "bits_per_dim_se",
    "num_images", "logdet_cap_share", "num_params", "train_flops", "train_seconds", "device", "hardware",
    "threads", "dataset", "variant", "fingerprint", "train_fingerprint", "git_commit", "git_dirty",
    "python_version", "torch_version", "numpy_version")
KEY = ["run_id", "seed", "step", "split"]


class ResultsError(ValueError):
    """A results CSV that must not be used, in one line."""


def columns(swept):
    """All columns in order, for an experiment with these swept fields."""
    return [*WHICH, *swept, *MEASURED]


def read_results(path, swept):
    """The rows of one CSV as a DataFrame.

    Raises ResultsError for a missing file, missing or unknown columns, repeated rows, rows without
    bits_per_dim, and for more than one scale, data set, variant or set of test images.
    """
    try:
        rows = pd.read_csv(path, dtype={"run_id": str, **dict.fromkeys(swept, str)}, keep_default_na=False,
                           na_values=[""])
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file: run the experiment first") from None
    except (ValueError, OSError) as error:
        raise ResultsError(f"{path}: not a readable CSV ({error})") from None
    expected = columns(swept)
    for problem, names in (("unknown", set(rows.columns) - set(expected)),
                           ("missing", set(expected) - set(rows.columns))):
        if names:
            raise ResultsError(f"{path}: {problem} columns {', '.join(sorted(names))}")
    if rows.empty:
        raise ResultsError(f"{path}: has no rows")
    bad = rows[rows.duplicated(KEY) | rows[["bits_per_dim", "seed", "step", "run_id"]].isna().any(axis=1)]
    if len(bad):
        what = "is there twice" if bad.duplicated(KEY).any() or rows.duplicated(KEY).any() else "has no number"
        raise ResultsError(f"{path}: run {bad.iloc[0]['run_id']}, split {bad.iloc[0]['split']}, {what}")
    for name in ("experiment", "scale", "dataset", "variant"):
        if rows[name].nunique(dropna=False) != 1:
            raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, rows[name].unique()))}")
    for split, group in rows.groupby("split"):
        if group["fingerprint"].nunique() != 1 or group["num_images"].nunique() != 1:
            raise ResultsError(f"{path}: the {split} rows are measured on different images")
    return rows[expected]
