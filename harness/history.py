"""What a run folder tells of its run so far: steps, evaluations and restarts."""
import dataclasses
import io
import re
from pathlib import Path

import numpy as np

from harness.errors import TrainingError, short
from harness.files import read_bytes, read_json
from harness.run_folder import (CONFIG_NAME, LOG_NAME, MAX_METRICS_BYTES, METRICS_COLUMNS,
                                METRICS_NAME, read_done)

LARGEST = 1e15  # that is drawn
RESUMED = re.compile(r"^\S+ resumed at step (\d{1,13})$", re.M)
EVALUATED = re.compile(r"^\S+ step (\d{1,13}): (\d+\.\d+) \+- (\d+\.\d+|nan) bits/dim on [\d,]+ "
                       r"(train|test) images$", re.M)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """A run so far.

    record: what config.json holds. done: what done.json holds, or None. steps: {column of
    metrics.csv: float64 (n,)}, by step. evaluations: {split: [(step, bits/dim, standard error)]}.
    restarts: after which steps.
    """
    path: Path
    record: dict
    done: dict | None
    steps: dict
    evaluations: dict
    restarts: list


def read_history(run_dir):
    """The History of a run folder, whose run may be running. Raises TrainingError."""
    run_dir = Path(run_dir)
    try:
        record, log = read_json(run_dir / CONFIG_NAME), ""
        if (run_dir / LOG_NAME).exists():
            log = read_bytes(run_dir / LOG_NAME).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{run_dir}: no run folder, or a damaged one ({short(error)}): give "
                            f"one with {CONFIG_NAME}, as train.py makes it") from None
    done, found = read_done(run_dir), {}
    for step, bits, error, split in EVALUATED.findall(log):
        found[split, int(step)] = float(bits), float(error)
    for row in done["rows"] if done else ():
        found[row["split"], row["step"]] = row["bits_per_dim"], row["bits_per_dim_se"]
    evaluations = {split: sorted((step, *numbers) for (of, step), numbers in found.items()
                                 if of == split and abs(numbers[0]) < LARGEST)
                   for split in ("train", "test")}
    return History(path=run_dir, record=record, done=done, steps=read_steps(run_dir),
                   evaluations=evaluations, restarts=sorted(set(map(int, RESUMED.findall(log)))))


def read_steps(run_dir):
    """{column: float64 (n,)} of the whole lines of metrics.csv, by step; empty where none is."""
    path, names, rows = Path(run_dir) / METRICS_NAME, METRICS_COLUMNS.split(","), np.empty((0, 6))
    try:
        text = read_bytes(path, MAX_METRICS_BYTES)
        header, _, whole = text[:text.rfind(b"\n") + 1].partition(b"\n")  # no half-written line
        if header.decode() not in ("", METRICS_COLUMNS):
            raise ValueError(f"its first line is not {METRICS_COLUMNS}")
        if whole:
            rows = np.loadtxt(io.BytesIO(whole), delimiter=",", ndmin=2)
        if rows.shape[1] != len(names) or not (np.abs(rows) < LARGEST).all():
            raise ValueError("a line has no six numbers that a run can have")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: damaged ({short(error)}): move it away, and the rest is "
                            "shown without it") from None
    _, last = np.unique(rows[::-1, 0], return_index=True)  # of a step that is there twice
    return dict(zip(names, rows[::-1][last].T))
