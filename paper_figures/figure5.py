"""Figure 5: samples from the uint8 grids in results/samples/, which experiments/draw_samples.py saves.

    python paper_figures/figure5.py --scale small                 # samples of the models of the main table
    python paper_figures/figure5.py --samples results/samples/jet_cifar10.npz    # all that is in one file
"""
import json
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style, tables
from paper_figures.results_csv import ResultsError, final_test_rows

SWEPT = tables.MAIN_SWEPT
# The larger model of the main table, without what is not fine-tuned and, at paper scale, without CIFAR-10.
GRID = {scale: [point for point in points if point[0] == tables.MAIN_SIZES[scale][-1] and point[1] != "not-fine-tuned"
                and point[2] != "cifar10"] for scale, points in tables.MAIN_GRID.items()}
COLUMNS = 8  # images side by side


def samples_path(results_dir, scale, values):
    """The file of a grid point's samples."""
    return Path(results_dir) / f"samples/{scale}_{'_'.join(values)}.npz"


def read_samples(path):
    """(about, {what: uint8 images}) of a file in results/samples/. Raises ResultsError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        about = json.loads(str(content.pop("about")))
        images = {"samples": 4} | {name: rank for name, rank in (("neighbours", 4), ("paths", 5)) if name in content}
        for name, rank in images.items():
            array = content[name]
            if array.dtype != np.uint8 or array.ndim != rank or array.shape[-1] not in (1, 3) or not array.size:
                raise ValueError(f"{name} are {array.dtype} {array.shape}")
        texts = ("run_id", "dataset", "weights", *(("neighbours_of",) if "neighbours" in content else ()))
        numbers = ("seed", "temperature", *(("held_out_distance",) if "held_out_distance" in about else ()))
        if not (all(isinstance(about.get(name), str) for name in texts)
                and all(isinstance(about.get(name), (int, float)) for name in numbers)):
            raise ValueError("it does not tell what made it")
        if "neighbours" in content and not (content["distances"].ndim == 1 and np.isfinite(content["distances"]).all()):
            raise ValueError("distances are no numbers")
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file: run experiments/draw_samples.py first") from None
    except Exception as error:  # np.load raises nearly everything on damaged files
        raise ResultsError(f"{path}: no file of samples ({' '.join(str(error).split())})") from None
    return about, content


def tile(images, columns=COLUMNS):
    """(n, H, W, C) -> one image of rows of so many, one pixel of white between them; the last row may be white."""
    n, H, W, C = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (H + 1) - 1, columns * (W + 1) - 1, C), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (H + 1), i % columns * (W + 1)
        sheet[y:y + H, x:x + W] = image
    return sheet


def panels_of(about, content):
    """[(caption, sheet)] of one file: samples and, where they are there, their neighbours and paths."""
    drawn = f"samples, not picked: temperature {about['temperature']:g}, seed {about['seed']}"
    panels = [(drawn, tile(content["samples"]))]
    if "neighbours" in content:
        near = (f"the image of {style.dataset_title(about['neighbours_of'])} (train) nearest to each. Median RMS distance, in grey levels: "
                f"of samples {np.median(content['distances']):.1f}")
        if "held_out_distance" in about:
            near += f"; of test images: {about['held_out_distance']:.1f}"
        panels.append((near, tile(content["neighbours"])))
    if "paths" in content:
        paths = content["paths"]
        panels.append(("arcs between the latents of two test images, in the first and the last column",
                       tile(paths.reshape(-1, *paths.shape[2:]), paths.shape[1])))
    return panels


def show(files, title, name, out_dir):
    """One figure, placed by the inch: files is [(heading or "", about, content)]."""
    width, line, top = style.COLUMN_WIDTH, 0.105, 0.12 + 0.12 * title.count("\n")  # inches
    blocks = []  # (caption, its lines, sheet)
    for heading, about, content in files:
        for caption, sheet in panels_of(about, content):
            lines = [*textwrap.wrap(heading, 78), *textwrap.wrap(caption, 78)]
            blocks.append((len(lines), "\n".join(lines), sheet))
            heading = ""
    heights = [0.08 + line * lines + width * sheet.shape[0] / sheet.shape[1] for lines, _, sheet in blocks]
    total = top + 0.1 + sum(heights)
    figure = style.plt.figure(figsize=(width, total))
    figure.set_layout_engine("none")
    figure.suptitle(title, fontsize=7.5, y=1 - 0.04 / total, va="top")
    above = top + 0.1
    for height, (lines, caption, sheet) in zip(heights, blocks):
        figure.text(0.005, 1 - (above + 0.06) / total, caption, fontsize=6, va="top", linespacing=1.15)
        share = width * sheet.shape[0] / sheet.shape[1]
        axes = figure.add_axes((0, 1 - (above + height) / total, 1, share / total))
        axes.imshow(sheet.squeeze(), interpolation="nearest", cmap="gray", vmin=0, vmax=255, aspect="auto")
        axes.set_axis_off()
        above += height
    return style.save(figure, name, out_dir)


def draw(path, out_dir=style.OUT):
    """Draw samples of the models of a scale, from its CSV and the files beside it; returns the PDF's and PNG's paths."""
    rows = final_test_rows(path, "draw_samples", SWEPT, GRID, "Figure 5", tables.MAIN_VARYING)
    scale = rows["scale"].iloc[0]
    rows = rows[rows["seed"] == 0].set_index([*SWEPT], drop=False)
    files = []
    for point in GRID[scale]:
        row = rows.loc[point]
        sample_file = samples_path(Path(path).parent, scale, point)
        about, content = read_samples(sample_file)
        if about["run_id"] != row["run_id"] or about["weights"] != row["run_id"].rpartition("_")[2]:
            raise ResultsError(f"{sample_file}: is of run {about['run_id']}, weights {about['weights']}, and {path} has "
                               f"{row['run_id']}: run experiments/draw_samples.py --scale {scale} again")
        files.append((f"{point[0]}, {point[1]}: {style.dataset_title(row['dataset'])}, {row['bits_per_dim']:.2f} bits/dim (test)", about,
                      {"samples": content["samples"]}))
    smoke = "\nsmoke run: it works, it is not evidence" if scale == "smoke" else ""
    return show(files, f"Figure 5, {scale} scale{smoke}", f"figure5_{scale}", out_dir)


def draw_file(path, out_dir=style.OUT):
    """Draw one file of samples; returns the paths of the PDF and the PNG."""
    about, content = read_samples(path)
    data = style.dataset_title(about["dataset"])
    title = f"Figure 5 for {about['run_id']}" + (f", trained on {data}" if data else "")
    title = "\n".join(textwrap.wrap(title.replace("$", r"\$"), 60))
    return show([("", about, content)], title, f"samples_{Path(path).stem}", out_dir)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.split("=")[0] == "--samples" for argument in arguments):
        return style.main(__file__, __doc__, {"draw_samples": draw}, arguments)
    parser = style.make_parser(__file__, __doc__)
    parser.add_argument("--samples", type=Path, required=True, help="draw this file")
    parser.add_argument("--out", type=Path, default=style.OUT, metavar="DIR", help="default: paper_figures/out")
    flags = parser.parse_args(arguments)
    with style.one_line_errors("figure5.py", flags.out):
        for path in draw_file(flags.samples, flags.out):
            print(path)


if __name__ == "__main__":
    main()
