"""What all figures share: column width, type, colours; equal numbers give files of equal bytes."""
import functools
import math
import re
from pathlib import Path

from harness.files import write_atomically
from harness.flags import ArgumentParser, one_line_errors
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
METHOD_STYLES = {"vit": {"color": "#0072B2", "marker": "o"},
                 "cnn": {"color": "#D55E00", "marker": "s"}}
SIZE_STYLES = ({"color": "#0072B2", "marker": "o"}, {"color": "#E69F00", "marker": "s"},
               {"color": "#009E73", "marker": "^"}, {"color": "#333333", "marker": "D"})
SPARE_STYLES = ({"color": "#56B4E9", "marker": "D"}, {"color": "#8C6D31", "marker": "^"})
MARKER_AREAS = {"o": math.pi / 4, "s": 1, "^": 0.5, "D": 1}  # of a marker, over its size squared
METADATA = {"pdf": ("CreationDate", "Producer", "Creator"), "png": ("Software",)}  # left out
# In the order of figures and tables: by size of the images, then by number of images.
DATASET_TITLES = {
    "cifar10-subset-animals": "CIFAR-10 subset, animals",
    "cifar10-subset-vehicles": "CIFAR-10 subset, vehicles",
    "cifar10-subset": "CIFAR-10 subset",
    "cifar10-animals": "CIFAR-10 animals",
    "cifar10-vehicles": "CIFAR-10 vehicles",
    "cifar10-search": "CIFAR-10 search",
    "cifar10": "CIFAR-10",
    "imagenet32-oord": "ImageNet-1k 32x32 (oord)",
    "imagenet21k-32-box": "ImageNet-21k 32x32 (box)",
    "imagenet64-oord": "ImageNet-1k 64x64 (oord)",
    "imagenet21k-64-box": "ImageNet-21k 64x64 (box)"}
LOOK = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "lines.linewidth": 1.1, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.3,
    "grid.color": "#cccccc", "hatch.linewidth": 0.4, "legend.frameon": False, "pdf.fonttype": 42,
    "savefig.dpi": 300, "figure.constrained_layout.use": True,
}


@functools.cache
def pyplot():
    """matplotlib.pyplot in the look of all figures; importing it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    matplotlib.rcdefaults()  # not what the user's matplotlibrc says
    matplotlib.rcParams.update(LOOK)
    return matplotlib.pyplot


def __getattr__(name):
    """style.plt and style.matplotlib, which are imported when they are asked for."""
    if name not in ("plt", "matplotlib"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pyplot() if name == "plt" else pyplot().matplotlib


def ordered(values, known=()):
    """The different values: known ones in the order in which they are known, then others by name.

    Numbers in names count as numbers: "8x1" comes before "12x1".
    """
    known = list(known)

    def place(value):
        parts = re.findall(r"\d+|\D+", str(value))
        numbers_first = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
        return known.index(value) if value in known else len(known), numbers_first
    return sorted(set(values), key=place)


def points(rows, swept, known):
    """The different values of the swept fields, as tuples. known: {field: values in order}."""
    orders = [ordered(rows[name], known.get(name, ())) for name in swept]
    found = set(rows[[*swept]].itertuples(index=False, name=None))
    return sorted(found, key=lambda point: [order.index(value)
                                            for order, value in zip(orders, point)])


def looks(values, known=(), spare=SPARE_STYLES):
    """{value: colour and marker} in order: known ones, then spare ones while there are some."""
    values = ordered(values, known)
    others = [value for value in values if value not in known]
    if len(others) > len(spare):
        names = ", ".join(map(str, others[len(spare):]))
        raise ResultsError(f"no look for {names}: the figure has {len(known) + len(spare)}: add to "
                           "paper_figures/style.py")
    return {value: known[value] for value in values if value in known} | dict(zip(others, spare))


def dataset_title(dataset):
    """How a figure names an image set, by its name or path."""
    return DATASET_TITLES.get(dataset, Path(dataset).name)


def counted(number, noun):
    """"1 seed", "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def new_figure(rows, title, height, note=""):
    """(figure, axes) of bits/dim upwards, with a title of three lines and the smoke mark."""
    first = rows.iloc[0]
    figure, axes = pyplot().subplots(figsize=(COLUMN_WIDTH, height))
    axes.set_ylabel("bits/dim, test (lower is better)")
    images = f"{dataset_title(first['dataset'])}, {first['num_images']:,} test images"
    figure.suptitle(f"{title}, {first['scale']} scale\n{images}{note}", fontsize=7.5)
    if first["scale"] == "smoke":
        mark_smoke(axes)
    return figure, axes


def line(label, **look):
    """What a legend shows of a line, or with ls="" of a marker."""
    return pyplot().Line2D([], [], label=label, **look)


def over_seeds(rows, by):
    """A row for each group, by compute: the mean bits/dim, and low and high as spread_note() says.

    Runs of different numbers of parameters or compute are never averaged.
    """
    groups = rows.groupby([*by, "train_flops", "num_params"])
    bits, errors = groups["bits_per_dim"], groups["bits_per_dim_se"]
    points = bits.mean().to_frame("mean").assign(
        low=bits.min(), high=bits.max(), error=errors.max()).reset_index()
    if rows["seed"].nunique() == 1:
        points = points.assign(low=points["mean"] - points["error"],
                               high=points["mean"] + points["error"])
    return points.sort_values("train_flops", ignore_index=True)


def spread_note(rows):
    """How many seeds there are, and what the whiskers mean."""
    num_seeds = rows["seed"].nunique()
    if num_seeds == 1:
        return "one seed; whiskers: ±1 s.e. over images"
    return f"{num_seeds} seeds: mean, whiskers: min to max"


def draw_points(axes, x, points, area, look, hollow=False):
    """Markers with whiskers for the rows of over_seeds(); area: in points^2 per parameter."""
    whiskers = [points["mean"] - points["low"], points["high"] - points["mean"]]
    axes.errorbar(x, points["mean"], whiskers, fmt="none", ecolor=look["color"], elinewidth=0.8,
                  zorder=4)
    colors = {"facecolors": (look["color"], 0.5), "edgecolors": "none"}
    if hollow:
        colors = {"facecolors": "none", "edgecolors": look["color"]}
    sizes = area * points["num_params"] / MARKER_AREAS[look["marker"]]
    axes.scatter(x, points["mean"], sizes, marker=look["marker"], linewidths=0.8, zorder=3,
                 **colors)


def parameter_legend(figure, num_params, area, **place):
    """Say how large the markers of the fewest and the most parameters are, and of some between."""
    least, most = num_params.min(), num_params.max()
    handles = [line(f"{float(f'{size / 1e6:.3g}'):,g} M", ls="", marker="o", color="#999999", mew=0,
                    ms=(area * size / MARKER_AREAS["o"]) ** 0.5)
               for size in sorted({least, (least * most) ** 0.5, most})]
    figure.legend(handles=handles, title="area: parameters", title_fontsize=6.5, handlelength=1.4,
                  handletextpad=0.7, columnspacing=1, **place)


def compute_axis(axes, flops):
    """Training compute as a logarithmic x axis, with the room that large markers need."""
    ticker, low, high = pyplot().matplotlib.ticker, flops.min(), flops.max()
    axes.set_xscale("log")
    digits = (1,)
    if high < 10 * low:
        digits = (1, 2, 5)
    elif high < 50 * low:
        digits = (1, 3)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    room = max(high / low, 2) ** 0.12
    axes.set_xlim(low / room, high * room)


def mark_smoke(axes, **text):
    """Say on the figure's face that its numbers are no evidence."""
    text = {"fontsize": 13} | text
    axes.text(0.5, 0.5, "smoke run: it works,\nit is not evidence", transform=axes.transAxes,
              color="#999999", alpha=0.45, ha="center", va="center", rotation=18, zorder=0, **text)


def save(figure, name, out_dir=OUT):
    """Write out_dir/name.pdf and .png without dates or versions; returns the two paths."""
    paths = write_files({f"{name}.{kind}": functools.partial(
        figure.savefig, format=kind, metadata=dict.fromkeys(left_out))
        for kind, left_out in METADATA.items()}, out_dir)
    pyplot().close(figure)
    return paths


def write_files(contents, out_dir):
    """Write {name: text, or what a function writes} to out_dir, each whole or not at all."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(out_dir / name, content)
    return [out_dir / name for name in contents]


def add_folder_flag(parser, flag, default):
    parser.add_argument(flag, type=Path, default=ROOT / default, metavar="DIR",
                        help=f"default: {default}")


def find_csv(experiment, choice, choices):
    """The CSV of a scale, or of the last of all scales that has one; else None."""
    paths = [ROOT / f"results/{experiment}_{name}.csv" for name in choices]
    if choice:
        return paths[choices.index(choice)]
    return next((path for path in reversed(paths) if path.exists()), None)


def main(script, description, draws, arguments=None, flag="scale", choices=SCALES, samples=None):
    """The command line of a figure.

    draws: {experiment: draw(csv, out_dir)}, each from its CSV of the flag's choice. samples: what
    draws a file that --samples names.
    """
    parser = ArgumentParser(prog=Path(script).name, description=description)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(f"--{flag}", choices=choices, help=f"draw the CSV of this {flag} (default: "
                       f"the last of {', '.join(choices)} whose CSV is in results/)")
    which.add_argument("--csv", type=Path, help="draw this CSV")
    if samples:
        which.add_argument("--samples", type=Path, help="draw this file")
    add_folder_flag(parser, "--out", "paper_figures/out")
    flags = vars(parser.parse_args(arguments))
    with one_line_errors(parser.prog):
        todo = [(draw, csv) for name, draw in draws.items()
                if (csv := find_csv(name, flags[flag], choices)) is not None]
        if flags["csv"]:
            todo = [(draws[read_experiment(flags["csv"], draws)], flags["csv"])]
        elif flags.get("samples"):
            todo = [(samples, flags["samples"])]
        elif not todo and "small" in choices:  # it says that it is not run
            todo = [(draw, ROOT / f"results/{name}_small.csv") for name, draw in draws.items()]
        elif not todo:
            raise ResultsError(f"results/ has no CSV of {' or '.join(draws)}: python experiments/"
                               f"{next(iter(draws))}.py --{flag} {choices[0]} makes one")
        for draw, path in todo:
            if not (flags[flag] or flags["csv"] or flags.get("samples")):
                print(f"from {path}")
            for drawn in draw(path, flags["out"]):
                print(drawn)
