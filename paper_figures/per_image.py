"""Bits/dim of each test image of finished runs, and by how much two runs differ on them.

results/per_image/<name of the CSV>.npz holds a float32 array (N,) for each run_id, in image order.
"""
import math
from pathlib import Path

import numpy as np

from harness.files import check_npz, write_atomically
from paper_figures.results_csv import ResultsError


def path_beside(csv):
    """The file that belongs to a CSV."""
    return Path(csv).parent / "per_image" / f"{Path(csv).stem}.npz"


def read_per_image(csv, rows):
    """{run_id: float32 (N,)} of those of a CSV's runs that have them. rows: of that CSV.

    Raises ResultsError where they are not those of the rows.
    """
    from harness.run_folder import misfit  # with torch, which takes seconds: where it is used
    path = path_beside(csv)
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except FileNotFoundError:
        return {}
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise ResultsError(f"{path}: not readable ({type(error).__name__}: {error}): --collect "
                           "makes it again where the run folders are") from None
    test = rows[rows["split"] == "test"].sort_values("step").groupby("run_id").last()
    for run_id in found.keys() & set(test.index):
        row = test.loc[run_id]
        if problem := misfit(found[run_id], row["bits_per_dim"], row["num_images"]):
            raise ResultsError(f"{path}: run {run_id}: {problem}: --collect makes it again where "
                               "the run folders are")
    return {run_id: found[run_id] for run_id in test.index if run_id in found}


def write_per_image(csv, values):
    """Write {run_id: float32 (N,)} beside a CSV; the same bytes for the same values."""
    path = path_beside(csv)
    path.parent.mkdir(exist_ok=True)
    ordered = {run_id: values[run_id] for run_id in sorted(values)}
    write_atomically(path, lambda file: np.savez(file, **ordered))
    return path


def paired_difference(a, b):
    """(mean, standard error) of a - b over images, in float64. a, b: bits/dim (N,) of equal images.

    The error has ddof 1: nan for one image. Images that are hard for one are so for the other, so
    it is far smaller than that of either mean.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return float(difference.mean()), float(error)
