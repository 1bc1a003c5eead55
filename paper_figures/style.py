"""What all figures share: column width, type, colours, and files of equal bytes from equal numbers."""
import argparse
import contextlib
import io
import math
import os
import sys
import uuid
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from paper_figures.results_csv import SCALES, ResultsError, read_experiment

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "paper_figures/out"
COLUMN_WIDTH = 3.4  # inches: one column of a two-column paper
# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
SPLIT_STYLES = {
    "row": {"color": "#0072B2", "marker": "o"},
    "column": {"color": "#E69F00", "marker": "s"},
    "checkerboard": {"color": "#009E73", "marker": "^"},
    "mix": {"color": "#CC79A7", "marker": "D"},
}
METHOD_STYLES = {"vit": {"color": "#0072B2", "marker": "o"}, "cnn": {"color": "#D55E00", "marker": "s"}}
SIZE_STYLES = ({"color": "#0072B2", "marker": "o"}, {"color": "#E69F00", "marker": "s"},
               {"color": "#009E73", "marker": "^"}, {"color": "#333333", "marker": "D"})
MARKER_AREAS = {"o": math.pi / 4, "s": 1, "^": 0.5, "D": 1}  # of a marker, over the square of its size
DATASET_TITLES = {"cifar10-subset": "CIFAR-10 subset", "cifar10": "CIFAR-10",
                  "cifar10-animals": "CIFAR-10 animals", "cifar10-vehicles": "CIFAR-10 vehicles",
                  "cifar10-subset-animals": "CIFAR-10 subset, animals", "cifar10-subset-vehicles": "CIFAR-10 subset, vehicles",
                  "imagenet32-oord": "ImageNet-1k 32x32 (oord)", "imagenet64-oord": "ImageNet-1k 64x64 (oord)",
                  "imagenet21k-32-box": "ImageNet-21k 32x32 (box)", "imagenet21k-64-box": "ImageNet-21k 64x64 (box)"}

plt.rcParams.update({
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "lines.linewidth": 1.1, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.3,
    "grid.color": "#cccccc", "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
})


def dataset_title(dataset):
    """How a figure names an image set, by its name or path."""
    return DATASET_TITLES.get(dataset, Path(dataset).name)


def over_seeds(rows, by):
    """A row for each group, in order of compute: the mean bits/dim, and low and high as spread_note() says.

    Runs of different numbers of parameters or compute are never averaged.
    """
    points = rows.groupby([*by, "train_flops", "num_params"], as_index=False).agg(
        mean=("bits_per_dim", "mean"), low=("bits_per_dim", "min"), high=("bits_per_dim", "max"),
        error=("bits_per_dim_se", "max"))
    if rows["seed"].nunique() == 1:
        points = points.assign(low=points["mean"] - points["error"], high=points["mean"] + points["error"])
    return points.sort_values("train_flops", ignore_index=True)


def spread_note(rows):
    """How many seeds there are, and what the whiskers mean."""
    num_seeds = rows["seed"].nunique()
    if num_seeds == 1:
        return "one seed; whiskers: ±1 s.e. over images"
    return f"{num_seeds} seeds: mean, whiskers: min to max"


def draw_points(axes, x, points, area, look, hollow=False):
    """Markers with whiskers for the rows of over_seeds(); area: of a marker, in points^2 per parameter."""
    axes.errorbar(x, points["mean"], [points["mean"] - points["low"], points["high"] - points["mean"]], fmt="none",
                  ecolor=look["color"], elinewidth=0.8, zorder=4)
    colors = {"facecolors": "none", "edgecolors": look["color"]} if hollow else {
        "facecolors": (look["color"], 0.5), "edgecolors": "none"}
    axes.scatter(x, points["mean"], area * points["num_params"] / MARKER_AREAS[look["marker"]], marker=look["marker"],
                 linewidths=0.8, zorder=3, **colors)


def parameter_legend(figure, num_params, area, **place):
    """Say how large the markers of the fewest, the most, and as many parameters between them are."""
    sizes = sorted({num_params.min(), (num_params.min() * num_params.max()) ** 0.5, num_params.max()})
    handles = [matplotlib.lines.Line2D([], [], ls="", marker="o", color="#999999", mew=0,
                                       ms=(area * size / MARKER_AREAS["o"]) ** 0.5) for size in sizes]
    names = [f"{float(f'{size / 1e6:.3g}'):,g} M" for size in sizes]
    figure.legend(handles, names, title="area: parameters", title_fontsize=6.5,
                  handlelength=1.4, handletextpad=0.7, columnspacing=1, **place)


def compute_axis(axes, flops):
    """Training compute as a logarithmic x axis, with the room that large markers need."""
    low, high = flops.min(), flops.max()
    axes.set_xscale("log")
    digits = (1, 2, 5) if high < 10 * low else (1, 3) if high < 50 * low else (1,)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)


def mark_smoke(axes):
    """Say on the figure's face that its numbers are no evidence."""
    axes.text(0.5, 0.5, "smoke run: it works,\nit is not evidence", transform=axes.transAxes, fontsize=13,
              color="#999999", alpha=0.45, ha="center", va="center", rotation=18, zorder=0)


def save(figure, name, out_dir=OUT):
    """Write out_dir/name.pdf and .png without dates or versions; returns the two paths."""
    contents = {}
    for suffix, metadata in {".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
                             ".png": {"Software": None}}.items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], metadata=metadata)
        contents[f"{name}{suffix}"] = drawn.getvalue()
    paths = write_files(contents, out_dir)
    plt.close(figure)
    return paths


def write_files(contents, out_dir):
    """Write {name: bytes} to out_dir, each file whole or not at all; returns the paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        temporary = out_dir / f".{name}.{uuid.uuid4().hex[:12]}.tmp"  # a full disk, or two that draw at once
        try:
            temporary.write_bytes(content)
            os.replace(temporary, out_dir / name)
        except OSError as error:
            error.filename = str(out_dir / name)
            raise
        finally:
            temporary.unlink(missing_ok=True)
    return [out_dir / name for name in contents]


def make_parser(script, description):
    """argparse with errors of one line."""
    parser = argparse.ArgumentParser(prog=Path(script).name, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    return parser


def main(script, description, draws, arguments=None, flag="scale", choices=SCALES):
    """The command line of a figure. draws: {experiment: draw(csv, out_dir)}, each from its CSV of the flag's choice."""
    parser = make_parser(script, description)
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
