"""results/paper.csv: a place for each number of the paper that an experiment here reproduces.

A row is a point of a grid of paper scale; its value is empty where it could not be read. What is
filled in stands beside ours in figures, tables and on the page.
"""
import re

from data import SETS
from harness.errors import printable
from paper_figures import style
from paper_figures.results_csv import ResultsError, is_cell, read_rows

PAPER = style.ROOT / "results/paper.csv"
COLUMNS = ["item", "experiment", "point", "dataset", "variant", "bits_per_dim", "source"]


def read_paper(path=None):
    """{(experiment, point): text of bits/dim} of what is filled in. Raises ResultsError.

    A point is its swept fields in words: "size=32x2 training=scratch dataset=imagenet64-oord".
    """
    path, found, seen = path or PAPER, {}, set()
    for number, row in enumerate(read_rows(path, COLUMNS), 1):
        fault = fault_of(row)
        key = row["experiment"], row["point"]
        if fault or key in seen:
            what = printable(fault or f"{' '.join(key)} is there twice", 400)
            raise ResultsError(f"{path}: row {number}: {what}")
        seen.add(key)
        if row["bits_per_dim"]:
            found[key] = row["bits_per_dim"]
    return found


def fault_of(row):
    """What is wrong with a row, or ""."""
    if None in row or None in row.values() or not all(map(is_cell, row.values())):
        return f"has not {len(COLUMNS)} fields of one line each"
    bits = row["bits_per_dim"]
    if bits and not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?", bits):
        return f"bits_per_dim {bits} must be a number like 3.72, or empty"
    if bits and not row["source"].strip():
        return "has a number and no source: say where it was read"
    if row["dataset"] in SETS and SETS[row["dataset"]].variant != row["variant"]:
        return f"{row['dataset']} has no variant {row['variant'] or 'that is empty'}"
    return ""


def paper_values(experiment, swept):
    """{point: text of bits/dim} of what is known of an experiment. point: values of the swept."""
    found = {}
    for (name, point), text in read_paper().items():
        cells = dict(cell.partition("=")[::2] for cell in point.split(" "))
        if name == experiment and cells.keys() == set(swept):
            found[tuple(cells[field] for field in swept)] = text
    return found


def difference(contrast, known):
    """What a Contrast is by the paper's numbers, or None where one of them is not known."""
    if contrast.gap or not contrast.weights.keys() <= known.keys():
        return None
    return sum(weight * float(known[point]) for point, weight in contrast.weights.items())


def mark(axes, experiment, swept, places):
    """Stars for the paper's numbers on an axis of their own: other images, another level.

    places: {point: x} of what is drawn of ours.
    """
    known = paper_values(experiment, swept)
    shared = {point: x for point, x in places.items() if point in known}
    if not shared:
        return
    theirs = axes.twinx()
    theirs.plot(list(shared.values()), [float(known[point]) for point in shared], "*", ms=7,
                color="#8C6D31", mfc="none")
    theirs.set_ylabel("bits/dim, the paper's ($\\star$)", color="#8C6D31")
    theirs.spines["right"].set_visible(True)
    theirs.grid(visible=False)
