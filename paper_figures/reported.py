"""results/reported.csv: published numbers, each with its source, and a reader that checks them."""
import re
from pathlib import Path

from harness.errors import printable
from paper_figures.results_csv import ResultsError, is_cell, read_rows

REPORTED = Path(__file__).resolve().parents[1] / "results/reported.csv"
COLUMNS = ["model", "year", "dataset", "variant", "bits_per_dim", "dequantization", "bound",
           "iw_samples", "augmentation", "conditional", "source", "note"]
DATASETS = {"imagenet64": "ImageNet-1k 64x64", "imagenet32": "ImageNet-1k 32x32",
            "cifar10": "CIFAR-10"}
KNOWN = {  # values, in the order of the main table
    "dataset": (*DATASETS,),
    "variant": ("oord", "oord?", "chrabaszcz", "cifar10", "unknown"),
    "bound": ("elbo", "exact", "importance-weighted", "ode", "estimate", "unknown"),
    "dequantization": ("uniform", "variational", "truncated-normal", "none", ""),
    "augmentation": ("yes", "no", ""), "conditional": ("class", "no", "")}


def read_reported(path):
    """The published numbers as dicts of text, in the order of the file. Raises ResultsError."""
    rows = read_rows(path, COLUMNS)
    if not rows:
        raise ResultsError(f"{path}: has no rows")
    seen = set()
    for number, row in enumerate(rows, 1):
        key = tuple(row[name] for name in ("model", "dataset", "variant", "bound"))
        fault = fault_of(row)
        if not fault and key in seen:
            fault = f"{' '.join(key[1:])} is there twice"
        if fault:
            model = printable(row["model"], 400)
            raise ResultsError(f"{path}: row {number} ({model}): {printable(fault, 400)}")
        seen.add(key)
    return rows


def fault_of(row):
    """What is wrong with a row, or ""."""
    if None in row or None in row.values():
        return f"has not {len(COLUMNS)} fields"
    for name, known in KNOWN.items():
        if row[name] not in known:
            return f"{name} {row[name] or 'empty'} is none of {', '.join(known)}"
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?", row["bits_per_dim"]):
        return f"bits_per_dim {row['bits_per_dim'] or 'empty'} is no number like 3.72"
    if not re.fullmatch(r"([1-9][0-9]{0,5})?", row["iw_samples"]):
        return f"iw_samples {row['iw_samples']} is no number like 4096"
    if row["iw_samples"] and row["bound"] not in ("importance-weighted", "ode"):
        return f"bound {row['bound']} has no iw_samples"
    if row["year"] and not re.fullmatch(r"\d{4}", row["year"]):
        return f"year {row['year']} is no year"
    if (row["dataset"] == "cifar10") != (row["variant"] == "cifar10"):
        return f"{row['dataset']} has no variant {row['variant']}"
    if any("\n" in text or "\r" in text for text in row.values()):
        return "a published row is one line"
    if not all(map(is_cell, row.values())):
        return "a cell is no line of text"
    if row["model"].startswith("ours:"):
        return "its model is not ours"
    empty = [name for name in ("model", "year", "source") if not row[name].strip()]
    return f"has no {empty[0]}" if empty else ""
