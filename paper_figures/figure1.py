"""How a coupling works, as in Figure 1 of the paper: a drawing for docs/changing.md, of no data.

    python paper_figures/figure1.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from harness.flags import ArgumentParser, one_line_errors
from paper_figures import style

KEPT, MOVED, PLAIN = "#0072B2", "#E69F00", "#333333"  # x1, x2, what is computed
HEIGHT, TOP = 2.55, 1.62  # inches: all of it, and the part with the arrows
SIDE = 4  # tokens, and values in one of them, per side of the square that stands for it
SPLITS = {"channels": "channels", "checkerboard": "checkerboard", "vstripes": "column (vstripes)",
          "hstripes": "row (hstripes)"}


def pattern(split):
    """Which values of the image are moved: bool, SIDE^2 by SIDE^2, tokens of SIDE by SIDE."""
    moved = np.zeros(SIDE ** 2, bool)
    if split == "channels":  # the same half of every token
        moved[np.random.default_rng(0).permutation(SIDE ** 2)[SIDE ** 2 // 2:]] = True
        return np.tile(moved.reshape(SIDE, SIDE), (SIDE, SIDE))
    from jet import spatial_order  # torch takes seconds to import: where it is used
    moved[spatial_order(split, SIDE, SIDE)[SIDE ** 2 // 2:].numpy()] = True
    return moved.reshape(SIDE, SIDE).repeat(SIDE, 0).repeat(SIDE, 1)


def draw_coupling(axes):
    """Boxes and arrows; the axes are measured in inches."""
    def box(x, y, text, color=PLAIN, **look):
        frame = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": color} | look
        axes.text(x, y, text, ha="center", va="center", color=color, bbox=frame, zorder=3)

    def arrow(start, end, color=PLAIN):
        axes.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "color": color, "lw": 0.9, "shrinkA": 0, "shrinkB": 0,
            "mutation_scale": 7})

    up, mid, down = 1.34, 0.88, 0.42
    arrow((0.34, up), (2.66, up), KEPT)
    arrow((0.34, down), (2.22, down), MOVED)
    arrow((0.95, up), (0.95, mid + 0.1))
    arrow((0.95, mid - 0.1), (0.95, down + 0.08))
    arrow((1.2, mid), (1.47, mid))
    arrow((1.8, mid - 0.1), (1.8, down + 0.08))
    arrow((2.12, mid), (2.29, mid))
    box(0.25, up, "$x_1$", KEPT)
    box(0.25, down, "$x_2$", MOVED)
    box(0.95, mid, "network")
    box(1.8, mid, r"$m\cdot$sigmoid")
    for x, sign in ((0.95, "+"), (1.8, r"$\times$")):
        box(x, down, sign, boxstyle="circle,pad=0.12")
    box(2.87, up, "$z_1=x_1$", KEPT)
    box(2.78, down, r"$z_2=(x_2+\mathrm{bias})\cdot\mathrm{scale}$", MOVED)
    for x, y, text, ha in ((1.0, 0.66, "bias", "left"), (1.33, mid + 0.05, "raw", "center"),
                           (1.85, 0.66, "scale", "left"),
                           (2.32, mid, r"log|det| = $\Sigma$ log scale", "left"),
                           (1.75, up + 0.06, "kept, to the bit", "center")):
        axes.text(x, y, text, ha=ha, va="center" if ha == "left" else "bottom", fontsize=6.5)
    axes.text(style.COLUMN_WIDTH / 2, 0.1, "backwards, with the same network: "
              r"$x_2=z_2\,/\,\mathrm{scale}-\mathrm{bias}$", ha="center", fontsize=6.5)


def draw(out_dir=style.OUT):
    """Draw the figure; returns the paths of the PDF and the PNG."""
    width = style.COLUMN_WIDTH
    figure = style.plt.figure(figsize=(width, HEIGHT))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 1 - TOP / HEIGHT, 1, TOP / HEIGHT), xlim=(0, width), ylim=(0, TOP))
    axes.set_axis_off()
    draw_coupling(axes)
    for number, (split, title) in enumerate(SPLITS.items()):
        size = 0.62
        left = (number + 0.5) * width / len(SPLITS) - size / 2
        axes = figure.add_axes((left / width, 0.06 / HEIGHT, size / width, size / HEIGHT))
        moved, kept = map(style.matplotlib.colors.to_rgb, (MOVED, KEPT))
        colors = np.where(pattern(split)[..., None], moved, kept)
        axes.imshow(colors, interpolation="nearest", extent=(0, SIDE, 0, SIDE))
        axes.set_xticks(range(1, SIDE), [])
        axes.set_yticks(range(1, SIDE), [])
        axes.tick_params(length=0)
        axes.grid(color="white", linewidth=1.2)
        axes.set_frame_on(False)
        axes.set_title(title, fontsize=6.5, pad=3)
    return style.save(figure, "figure1", out_dir)


def main(arguments=None):
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    style.add_folder_flag(parser, "--out", "paper_figures/out")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        print(*draw(flags.out), sep="\n")


if __name__ == "__main__":
    main()
