"""Figure 2: the networks of the couplings. a: CNN or ViT, bits/dim against training compute. b: ViT blocks in each.

    python paper_figures/figure2.py --scale small      # results/{compare_vit_cnn,ablate_block_depth}_small.csv -> out/

The area of a marker is proportional to the number of parameters. The paper's figures are on ImageNet-1k at 64 x 64 (a)
and on ImageNet-21k at 32 x 32 (b).
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style
from paper_figures.results_csv import final_test_rows

SWEPT_A, SWEPT_B = ("block", "emb_dim"), ("block_depth",)
BLOCKS = ("vit", "cnn")
WIDTHS = {"smoke": (16, 32), "small": (16, 32, 64), "medium": (64, 128, 256), "paper": (128, 256, 512, 768)}
DEPTHS = (1, 2, 3, 4, 5, 6)
GRID_A = {scale: [(block, str(width)) for block in BLOCKS for width in widths] for scale, widths in WIDTHS.items()}
GRID_B = {scale: [(str(depth),) for depth in DEPTHS] for scale in style.SCALES}
NAMES = {"vit": "ViT", "cnn": "CNN"}
LARGEST = 110  # area of the marker of the most parameters, in points^2


def draw_a(path, out_dir=style.OUT):
    """Draw Figure 2a, a line for each kind of block; returns the paths of the PDF and the PNG."""
    rows = final_test_rows(path, "compare_vit_cnn", SWEPT_A, GRID_A, "Figure 2a")
    figure, axes, area = new_figure(rows, "2a")
    for block, look in style.METHOD_STYLES.items():
        points = style.over_seeds(rows[rows["block"] == block], ["block", "emb_dim"])
        axes.plot(points["train_flops"], points["mean"], color=look["color"], lw=0.7)
        style.draw_points(axes, points["train_flops"], points, area, look)
    style.compute_axis(axes, rows["train_flops"])
    axes.set_xlabel("training compute (FLOPs)")
    widths = ", ".join(sorted(rows["emb_dim"].unique(), key=int))
    lines = [style.matplotlib.lines.Line2D([], [], lw=0.7, label=NAMES[block], **look)
             for block, look in style.METHOD_STYLES.items()]
    title = f"{rows['num_couplings'].iloc[0]} couplings of depth {rows['block_depth'].iloc[0]},\nwidth {widths}"
    figure.legend(handles=lines, title=title, title_fontsize=6.5, ncols=2, handlelength=1.4, columnspacing=1,
                  loc="outside lower left")
    style.parameter_legend(figure, rows["num_params"], area, ncols=3, loc="outside lower right")
    return style.save(figure, f"figure2a_{rows['scale'].iloc[0]}", out_dir)


def draw_b(path, out_dir=style.OUT):
    """Draw Figure 2b, one line over the depths; returns the paths of the PDF and the PNG."""
    rows = final_test_rows(path, "ablate_block_depth", SWEPT_B, GRID_B, "Figure 2b")
    figure, axes, area = new_figure(rows, "2b")
    points, look = style.over_seeds(rows, ["block_depth"]), style.METHOD_STYLES["vit"]
    depths = points["block_depth"].astype(int)
    axes.plot(depths, points["mean"], color=look["color"], lw=0.7)
    style.draw_points(axes, depths, points, area, look)
    couplings, width = rows[["num_couplings", "emb_dim"]].iloc[0]
    axes.set_xlabel(f"ViT blocks in each of {couplings} couplings (width {width})")
    axes.set_xticks(depths)
    axes.set_xlim(0.5, depths.max() + 0.5)
    # What a depth costs: compute grows with it, so that a second axis can tell both.
    unit = math.floor(math.log10(points["train_flops"].min()))
    top = axes.secondary_xaxis("top")
    top.set_xticks(depths, (points["train_flops"] / 10**unit).map("{:.1f}".format))
    top.set_xlabel(f"training compute ($10^{{{unit}}}$ FLOPs)")
    top.tick_params(length=2, pad=1)
    style.parameter_legend(figure, rows["num_params"], area, ncols=3, loc="outside lower center")
    return style.save(figure, f"figure2b_{rows['scale'].iloc[0]}", out_dir)


def new_figure(rows, number):
    """What both have: bits/dim upwards, the title, the smoke mark. Returns figure, axes, area per parameter."""
    scale, dataset, area = rows["scale"].iloc[0], rows["dataset"].iloc[0], LARGEST / rows["num_params"].max()
    figure, axes = style.plt.subplots(figsize=(style.COLUMN_WIDTH, 2.85))
    axes.set_ylabel("bits/dim, test (lower is better)")
    axes.margins(y=0.14)
    figure.suptitle(f"Figure {number}, {scale} scale\n{style.dataset_title(dataset)}, {rows['num_images'].iloc[0]:,} test images\n"
                    f"{style.spread_note(rows)}", fontsize=7.5)
    if scale == "smoke":
        style.mark_smoke(axes)
    return figure, axes, area


if __name__ == "__main__":
    style.main(__file__, __doc__, {"compare_vit_cnn": draw_a, "ablate_block_depth": draw_b})
