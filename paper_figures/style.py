"""What all figures share: column width, type, colours, and files of equal bytes from equal numbers."""
import argparse
import contextlib
import io
import os
import sys
import uuid
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from paper_figures.results_csv import ResultsError, read_experiment

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "paper_figures/out"
SCALES = ("smoke", "small", "medium", "paper")
COLUMN_WIDTH = 3.4  # inches: one column of a two-column paper
# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
SPLIT_STYLES = {
    "row": {"color": "#0072B2", "marker": "o"},
    "column": {"color": "#E69F00", "marker": "s"},
    "checkerboard": {"color": "#009E73", "marker": "^"},
    "mix": {"color": "#CC79A7", "marker": "D"},
}
DATASET_TITLES = {"cifar10-subset": "CIFAR-10 subset", "cifar10": "CIFAR-10",
                  "imagenet64-oord": "ImageNet-1k 64x64 (oord)"}

plt.rcParams.update({
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "lines.linewidth": 1.1, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.3,
    "grid.color": "#cccccc", "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
})


def mark_smoke(axes):
    """Say on the figure's face that its numbers are no evidence."""
    axes.text(0.5, 0.5, "smoke run: it works,\nit is not evidence", transform=axes.transAxes, fontsize=13,
              color="#999999", alpha=0.45, ha="center", va="center", rotation=18, zorder=0)


def save(figure, name, out_dir=OUT):
    """Write out_dir/name.pdf and .png without dates or versions; returns the two paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{name}.pdf", out_dir / f"{name}.png"]
    for path, metadata in zip(paths, ({"CreationDate": None, "Producer": None, "Creator": None},
                                      {"Software": None})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], metadata=metadata)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # a full disk, or two that draw at once
        try:
            temporary.write_bytes(drawn.getvalue())
            os.replace(temporary, path)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)
    plt.close(figure)
    return paths


def main(script, description, draws, arguments=None, flag="scale", choices=SCALES):
    """The command line of a figure. draws: {experiment: draw(csv, out_dir)}, each from its CSV of the flag's choice."""
    parser = argparse.ArgumentParser(prog=Path(script).name, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(f"--{flag}", default=choices[0], choices=choices,
                       help=f"draw the CSV of this {flag} (default: {choices[0]})")
    which.add_argument("--csv", type=Path, help="draw this CSV")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: paper_figures/out")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, flags.out):
        given = {read_experiment(flags.csv, draws): flags.csv} if flags.csv else {
            experiment: ROOT / f"results/{experiment}_{getattr(flags, flag)}.csv" for experiment in draws}
        for experiment, csv in given.items():
            for path in draws[experiment](csv, flags.out):
                print(path)


@contextlib.contextmanager
def one_line_errors(program, out_dir):
    """End the program in one line for a CSV that must not be drawn, or a folder that cannot be written."""
    try:
        yield
    except ResultsError as error:
        sys.exit(f"{program}: error: {error}")
    except OSError as error:
        sys.exit(f"{program}: error: {error.filename or out_dir}: {error.strerror}: choose another --out")
