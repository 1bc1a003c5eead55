"""The columns of results/<experiment>_<scale>.csv, and a reader that takes nothing on trust.

results/README.md says what each column means.
"""
import csv
import io
import itertools
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.files import read_bytes

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
    "train_flops": (0, 1e30), "lr": (0, 1e6), "num_couplings": (1, 1e9), "block_depth": (1, 1e9),
    "emb_dim": (1, 1e9), "patch_size": (1, 1e9), "batch_size": (1, 1e9)}
WHOLE = LIMITS.keys() - {"channel_share", "bits_per_dim", "bits_per_dim_se", "train_flops", "lr"}
MAYBE = {"logdet_cap_share": (-1e3, 1.001), "train_seconds": (0, 1e12)}  # and that some rows have
FINGERPRINTS = ("fingerprint", "train_fingerprint")
TEXTS = ("experiment", "scale", "run_id", "split", "dataset", "variant", *FINGERPRINTS)  # not empty
MAX_BYTES, MAX_COLUMNS, MAX_CELL = 2 ** 24, 1000, 1000
SAME = ("num_couplings", "block", "block_depth", "emb_dim", "patch_size", "batch_size",
        "total_steps", "lr", "precision", "init", "dataset", "variant")  # in all rows, if not swept
SEARCHED = ("small",)  # scales at which each arm of a grid has a learning rate of its own


class ResultsError(UserError, ValueError):
    """A results CSV that must not be used, in one line."""


def columns(swept):
    """All columns in order, for these swept fields; some of them are columns of all experiments."""
    return [*WHICH, *(name for name in swept if name not in MEASURED), *MEASURED]


def read_experiment(path, known):
    """Which of the known experiments a CSV is of: the only one, or what its first row says."""
    if len(known) == 1:
        return next(iter(known))
    try:
        found = read_csv(path, next(iter(known)), nrows=1, dtype=str)["experiment"].iloc[0]
    except (ResultsError, LookupError):
        if not Path(path).exists():
            raise
        found = ""
    if found not in known:
        raise ResultsError(f"{path}: is of {found or 'no experiment'}, not of {' or '.join(known)}")
    return found


def read_csv(path, experiment, **options):
    """What pandas makes of a CSV of an experiment. Raises ResultsError in one line."""
    import pandas as pd  # takes half a second: imported where it is used
    from pandas.api.types import is_numeric_dtype
    try:
        content = read_bytes(path, MAX_BYTES)
        _check_shape(content.decode())
        rows = pd.read_csv(io.BytesIO(content), keep_default_na=False, low_memory=False, **options)
        for name in rows:
            if not is_numeric_dtype(rows[name]) and not all(map(is_cell, rows[name])):
                raise ValueError(f"{name} has a cell that is no line of text")
        return rows
    except FileNotFoundError:
        scale = path.stem.rpartition("_")[2] if hasattr(path, "stem") else ""
        hint = f" --scale {scale}" if scale in SCALES else ""
        raise ResultsError(f"{path}: no such file: python experiments/{experiment}.py{hint} makes "
                           "it") from None
    except (ValueError, OSError, csv.Error) as error:
        raise ResultsError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None


def _check_shape(text):
    """Raise ValueError where a row has not as many cells as the header, or that has far too many.

    pandas fills a short row, takes the first column of long ones for names, and renames columns.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    header = next(reader, [])
    if len(header) > MAX_COLUMNS:
        raise ValueError("its header is no list of columns")
    if len(set(header)) < len(header):
        raise ValueError("it has a column twice")
    for row in reader:
        if len(row) not in (0, len(header)):
            raise ValueError(f"line {reader.line_num} has {len(row)} cells, and its header has "
                             f"{len(header)}")


def read_rows(path, columns):
    """The rows of a CSV of ours as dicts of text. Raises ResultsError, for other columns, too."""
    try:
        text = read_bytes(path, MAX_BYTES).decode()
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names, rows = reader.fieldnames, list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise ResultsError(f"{path}: not readable ({' '.join(str(error).split())})") from None
    if names != columns:
        raise ResultsError(f"{path}: has not the columns {', '.join(columns)}")
    return rows


def is_cell(value):
    return not isinstance(value, str) or value.isprintable() and len(value) <= MAX_CELL


def read_results(path, experiment, swept, varying=()):
    """The rows of one CSV as a DataFrame; swept fields are text.

    varying: fields besides the swept ones that may differ from run to run. Where dataset is swept,
    what else is the same within a set may differ between sets. Raises ResultsError for a damaged
    file, and for rows that do not belong in one series.
    """
    rows = _read_rows(path, experiment, swept)
    _check_values(path, rows, swept)
    if len(twice := rows[rows.duplicated([*swept, "seed", "step", "split"])]):
        row = twice.iloc[0]
        raise ResultsError(f"{path}: {' '.join(row[[*swept]])} seed {row['seed']}, split "
                           f"{row['split']}, is there twice (run {row['run_id']})")
    _check_same(path, rows, ("experiment", "scale", "grid_points"))
    stated, named = rows["scale"].iloc[0], Path(path).stem.rpartition("_")[2]
    if stated not in SCALES:
        raise ResultsError(f"{path}: scale {stated} is none of {', '.join(SCALES)}")
    if named in SCALES and named != stated:
        raise ResultsError(f"{path}: is of {stated} scale by its rows, and of {named} by its name")
    if rows["experiment"].iloc[0] != experiment:
        raise ResultsError(f"{path}: is of {rows['experiment'].iloc[0]}, not of {experiment}")
    if stated in SEARCHED:
        varying = (*varying, "lr")
    sets = rows.groupby("dataset") if "dataset" in swept else [("", rows)]
    for _, one_set in sets:
        _check_same(path, one_set, [name for name in SAME if name not in (*swept, *varying)])
        for split, group in one_set.groupby("split"):
            if group["fingerprint"].nunique() != 1 or group["num_images"].nunique() != 1:
                raise ResultsError(f"{path}: the {split} rows are measured on different images")
    return rows


def read_runs(path):
    """The last test row of each run of any CSV of ours; `train_bits_per_dim`: of training images.

    Raises ResultsError for a damaged file.
    """
    header = read_csv(path, "NAME", nrows=0)
    swept = [name for name in header if name not in (*WHICH, *MEASURED)]
    rows = _read_rows(path, "NAME", swept)
    _check_values(path, rows, swept)
    last = rows[rows["step"] == rows["total_steps"]].drop_duplicates(["run_id", "split"])
    train = last[last["split"] == "train"].set_index("run_id")["bits_per_dim"]
    test = last[last["split"] == "test"]
    return test.assign(train_bits_per_dim=test["run_id"].map(train))


def _read_rows(path, experiment, swept):
    """The rows with the right columns, and numbers as numbers where they are some."""
    texts = dict.fromkeys((*TEXTS, "init", "hardware", "git_commit", "git_dirty", *swept), str)
    rows = read_csv(path, experiment, dtype=texts, na_values=[""])
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


def _check_values(path, rows, swept):
    """Make numbers of the columns that hold some; raise ResultsError for an impossible value."""
    from pandas.api.types import is_numeric_dtype
    for name, (low, high) in {**LIMITS, **MAYBE}.items():
        given = rows[name]
        numbers = given if is_numeric_dtype(given) else given.map(_number)
        values = numbers.to_numpy()
        wrong = ~((low <= values) & (values <= high))
        if name in WHOLE:
            with np.errstate(invalid="ignore"):  # of inf
                wrong |= values % 1 != 0
        if name not in swept:  # else it stays text
            rows[name] = numbers
        elif name in WHOLE:
            wrong |= ~given.str.fullmatch("[0-9]+").to_numpy(bool)
        if name in MAYBE:
            wrong &= given.notna().to_numpy()
        if not wrong.any():
            continue
        run_id, value = rows["run_id"][wrong].iloc[0], numbers[wrong].iloc[0]
        problem = f"no number as {name}"
        if np.isfinite(value):
            whole = "a whole number " if name in WHOLE else ""
            problem = f"{value:g} as {name}: must be {whole}from {low:g} to {high:g}"
        raise ResultsError(f"{path}: run {run_id} has {problem}")
    if (wrong := (rows["train_flops"] <= 0) & (rows["total_steps"] > 0)).any():
        raise ResultsError(f"{path}: run {rows['run_id'][wrong].iloc[0]} has 0 as train_flops")
    for name in FINGERPRINTS:
        if (wrong := ~rows[name].str.fullmatch("[0-9a-f]{64}")).any():
            raise ResultsError(f"{path}: run {rows['run_id'][wrong].iloc[0]} has no fingerprint "
                               f"as {name}")
    if wrong := set(rows["split"]) - {"train", "test"}:
        raise ResultsError(f"{path}: split {sorted(wrong)[0]} is neither train nor test")


def _number(cell):
    """The number in a cell, or nan: whole ones stay whole, for a seed may have 19 digits."""
    try:
        return int(cell) if len(str(cell)) < 20 and str(cell).isdecimal() else float(cell)
    except (ValueError, TypeError, OverflowError):
        return np.nan


def _check_same(path, rows, names):
    """Raise ResultsError where one of the columns has more than one value."""
    for name in names:
        if len(values := rows[name].unique()) != 1:
            raise ResultsError(f"{path}: mixes {name} {', '.join(map(str, values))}")


def final_rows(path, experiment, swept, what, varying=()):
    """The rows of the last step, train and test, of a CSV that has its whole grid for each seed.

    what: "Figure 4", for the messages. Raises ResultsError for a point of the grid that is missing,
    besides all that read_results does.
    """
    rows = read_results(path, experiment, swept, varying)
    final = rows[rows["step"] == rows["total_steps"]]
    if not (final["split"] == "test").any():
        raise ResultsError(f"{path}: has no test rows of the last step")
    expected, first = rows["grid_points"].iloc[0], None
    for seed, split in itertools.product(sorted(rows["seed"].unique()), ("test", "train")):
        here = final[(final["seed"] == seed) & (final["split"] == split)]
        where = f"for seed {seed}" if split == "test" else f"in {split} for seed {seed}"
        if len(here) > expected:
            raise ResultsError(f"{path}: has {len(here)} points of {what} {where}, more than the "
                               f"{expected} of its grid_points")
        if len(here) < expected:
            known, found = ([" ".join(point) for point in part[[*swept]].itertuples(index=False)]
                            for part in (rows, here))
            missing = [point for point in dict.fromkeys(known) if point not in found]
            names = f" ({', '.join(missing)})" if missing else ""
            raise ResultsError(f"{path}: {expected - len(here)} of {expected} points of {what} are "
                               f"missing {where}{names}: complete them by experiments/{experiment}"
                               f".py --scale {rows['scale'].iloc[0]}")
        points = set(here[[*swept]].itertuples(index=False, name=None))
        first = first or points
        if points != first:
            raise ResultsError(f"{path}: {' '.join(min(points - first))} of {what} is there {where}"
                               ", and not for all seeds and splits")
    return final


def final_test_rows(*arguments):
    """The test rows of final_rows(*arguments)."""
    rows = final_rows(*arguments)
    return rows[rows["split"] == "test"]
