"""Figure 5: samples from the uint8 grids that experiments/draw_samples.py saves.

    python paper_figures/figure5.py --scale small      # samples of the models of the main table
    python paper_figures/figure5.py --samples results/samples/jet_cifar10.npz    # all of one file
"""
import math
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from harness.files import check_npz, parse_json
from paper_figures import style, tables
from paper_figures.regime import drawn_from
from paper_figures.results_csv import ResultsError, final_test_rows, is_cell

SWEPT = tables.MAIN_SWEPT
COLUMNS = 8  # images side by side
RANKS = {"samples": 4, "neighbours": 4, "paths": 5}  # of the arrays of images in a file


def samples_path(results_dir, scale, values):
    """The file of a grid point's samples."""
    return Path(results_dir) / f"samples/{scale}_{'_'.join(values)}.npz"


def read_samples(path):
    """(about, {what: uint8 images}) of a file in results/samples/. Raises ResultsError."""
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        about = parse_json(str(content.pop("about")))
        check_samples(about, content)
    except FileNotFoundError:
        scale = Path(path).name.split("_")[0]
        hint = f" --scale {scale}" if scale in style.SCALES else ""
        raise ResultsError(f"{path}: no such file: python experiments/draw_samples.py{hint} makes "
                           "it") from None
    except Exception as error:  # np.load raises nearly everything on damaged files
        reason = " ".join(str(error).split())
        raise ResultsError(f"{path}: no file of samples ({reason})") from None
    return about, content


def check_samples(about, content):
    """Raise an error of any kind for what is no content of a file of samples."""
    for name in RANKS.keys() & {"samples", *content}:
        array = content[name]
        if (array.dtype != np.uint8 or array.ndim != RANKS[name] or not array.size
                or array.shape[-1] not in (1, 3)):
            raise ValueError(f"{name} are {array.dtype} {array.shape}")
    if "labels" in content:
        labels = content["labels"]
        if labels.shape != content["samples"].shape[:1] or labels.dtype != np.int64:
            raise ValueError("labels are not one for each sample")
    texts = [about.get(name) for name in ("run_id", "dataset", "weights")]
    numbers = [about.get("seed"), about.get("temperature"), about.get("held_out_distance", 0)]
    if "neighbours" in content:
        texts.append(about.get("neighbours_of"))
        if content["distances"].ndim != 1 or not np.isfinite(content["distances"]).all():
            raise ValueError("distances are no numbers")
    if not (all(isinstance(text, str) and is_cell(text) for text in texts)
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)):
        raise ValueError("it does not tell what made it")


def tile(images, columns=COLUMNS):
    """(n, H, W, C) -> one image, in rows of so many, with a pixel of white between them."""
    images = np.pad(images, ((0, -len(images) % columns), (0, 1), (0, 1), (0, 0)),
                    constant_values=255)
    n, H, W, C = images.shape
    sheet = images.reshape(n // columns, columns, H, W, C).swapaxes(1, 2)
    return sheet.reshape(n // columns * H, columns * W, C)[:-1, :-1]


def panels_of(about, content):
    """[(caption, sheet)] of one file: samples and, where they are there, neighbours and paths."""
    drawn = f"samples, not picked: temperature {about['temperature']:g}, seed {about['seed']}"
    columns = COLUMNS
    if "labels" in content:
        labels = content["labels"]
        columns, classes = int((labels == labels[0]).sum()), list(dict.fromkeys(labels.tolist()))
        drawn += f"; a row for each of the classes {', '.join(map(str, classes))}"
    panels = [(drawn, tile(content["samples"], columns))]
    if "neighbours" in content:
        title, median = style.dataset_title(about["neighbours_of"]), np.median(content["distances"])
        near = (f"the image of {title} (train) nearest to each. Median RMS distance, in grey "
                f"levels: of samples {median:.1f}")
        if "held_out_distance" in about:
            near += f"; of test images: {about['held_out_distance']:.1f}"
        panels.append((near, tile(content["neighbours"], columns)))
    if "paths" in content:
        paths = content["paths"]
        panels.append((
            "arcs between the latents of two test images, in the first and the last column",
            tile(paths.reshape(-1, *paths.shape[2:]), paths.shape[1])))
    return panels


def show(files, title, name, out_dir):
    """One figure, placed by the inch: files is [(heading or "", about, content)]."""
    width, line, top = style.COLUMN_WIDTH, 0.105, 0.22 + 0.12 * title.count("\n")  # inches
    blocks = []  # (lines of text, sheet, height of the sheet)
    for heading, about, content in files:
        for caption, sheet in panels_of(about, content):
            lines = [*textwrap.wrap(heading, 78), *textwrap.wrap(caption, 78)]
            blocks.append((lines, sheet, width * sheet.shape[0] / sheet.shape[1]))
            heading = ""
    total = top + sum(0.08 + line * len(lines) + height for lines, _, height in blocks)
    figure = style.plt.figure(figsize=(width, total))
    figure.set_layout_engine("none")
    figure.suptitle(title, fontsize=7.5, y=1 - 0.04 / total, va="top")
    for lines, sheet, height in blocks:
        figure.text(0.005, 1 - (top + 0.06) / total, "\n".join(lines), fontsize=6, va="top",
                    linespacing=1.15)
        top += 0.08 + line * len(lines) + height
        axes = figure.add_axes((0, 1 - top / total, 1, height / total))
        axes.imshow(sheet.squeeze(), interpolation="nearest", cmap="gray", vmin=0, vmax=255,
                    aspect="auto")
        axes.set_axis_off()
    return style.save(figure, name, out_dir)


@drawn_from("draw_samples", "figure5", "Figure 5")
def draw(path, out_dir=style.OUT):
    """Draw samples of the models of a scale, from its CSV and the files beside it."""
    rows = final_test_rows(path, "draw_samples", SWEPT, "Figure 5", tables.MAIN_VARYING)
    scale = rows["scale"].iloc[0]
    rows = rows[rows["seed"] == 0].set_index([*SWEPT], drop=False)
    files = []
    for point in style.points(rows, SWEPT, tables.MAIN_ORDER):
        row = rows.loc[point]
        sample_file = samples_path(Path(path).parent, scale, point)
        about, content = read_samples(sample_file)
        weights = row["run_id"].rpartition("_")[2]
        if (about["run_id"], about["weights"]) != (row["run_id"], weights):
            raise ResultsError(
                f"{sample_file}: is of run {about['run_id']}, weights {about['weights']}, and "
                f"{path} has {row['run_id']}: run experiments/draw_samples.py --scale {scale} "
                "again")
        size, training, dataset = point
        heading = (f"{size}, {training}: {style.dataset_title(dataset)}, "
                   f"{row['bits_per_dim']:.2f} bits/dim (test)")
        files.append((heading, about, {"samples": content["samples"]}))
    smoke = "\nsmoke run: it works, it is not evidence" if scale == "smoke" else ""
    return show(files, f"Figure 5, {scale} scale{smoke}", f"figure5_{scale}", out_dir)


def draw_file(path, out_dir=style.OUT):
    """Draw one file of samples; returns the paths of the PDF and the PNG."""
    about, content = read_samples(path)
    title = f"Figure 5 for {about['run_id']}"
    if about["dataset"]:
        title += f", trained on {style.dataset_title(about['dataset'])}"
    title = "\n".join(textwrap.wrap(title.replace("$", r"\$"), 60))
    return show([("", about, content)], title, f"samples_{Path(path).stem}", out_dir)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"draw_samples": draw}, samples=draw_file)
