"""Figure 2: the networks of the couplings. a: CNN or ViT, against compute. b: ViT blocks in each.

    python paper_figures/figure2.py --scale small
    # results/{compare_vit_cnn,ablate_block_depth}_small.csv -> out/

The area of a marker is proportional to the number of parameters. The paper's figures are on
ImageNet-1k at 64 x 64 (a) and on ImageNet-21k at 32 x 32 (b).
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from paper_figures import lengths, paper, style
from paper_figures.regime import drawn_from
from paper_figures.results_csv import final_test_rows

SWEPT_A, SWEPT_B = ("block", "emb_dim"), ("block_depth",)
NAMES = {"vit": "ViT", "cnn": "CNN"}
LARGEST = 110  # area of the marker of the most parameters, in points^2


@drawn_from("compare_vit_cnn", "figure2a", "Figure 2a")
def draw_a(path, out_dir=style.OUT):
    """Draw Figure 2a, a line for each kind of block; returns the paths of the PDF and the PNG."""
    rows = final_test_rows(path, "compare_vit_cnn", SWEPT_A, "Figure 2a")
    looks = style.looks(rows["block"], style.METHOD_STYLES)
    figure, axes, area = new_figure(rows, "Figure 2a")
    for block, look in looks.items():
        points = style.over_seeds(rows[rows["block"] == block], ["block", "emb_dim"])
        axes.plot(points["train_flops"], points["mean"], color=look["color"], lw=0.7)
        style.draw_points(axes, points["train_flops"], points, area, look)
    places = rows.groupby([*SWEPT_A])["train_flops"].first()
    paper.mark(axes, "compare_vit_cnn", SWEPT_A, places.to_dict())
    style.compute_axis(axes, rows["train_flops"])
    axes.set_xlabel("training compute (FLOPs)")
    lines = [style.line(NAMES.get(block, block), lw=0.7, **look) for block, look in looks.items()]
    couplings, depth = rows[["num_couplings", "block_depth"]].iloc[0]
    title = (f"{couplings} couplings of depth {depth},\n"
             f"width {', '.join(style.ordered(rows['emb_dim']))}, "
             f"patches of {rows['patch_size'].iloc[0]}")
    figure.legend(handles=lines, title=title, title_fontsize=6.5, ncols=2, handlelength=1.4,
                  columnspacing=1, loc="outside lower left")
    style.parameter_legend(figure, rows["num_params"], area, ncols=3, loc="outside lower right")
    drawn = style.save(figure, f"figure2a_{rows['scale'].iloc[0]}", out_dir)
    return drawn + lengths.draw(path, rows, "compare_vit_cnn", "figure2a", "Figure 2a", out_dir)


@drawn_from("ablate_block_depth", "figure2b", "Figure 2b")
def draw_b(path, out_dir=style.OUT):
    """Draw Figure 2b, one line over the depths; returns the paths of the PDF and the PNG."""
    rows = final_test_rows(path, "ablate_block_depth", SWEPT_B, "Figure 2b")
    figure, axes, area = new_figure(rows, "Figure 2b")
    points, look = style.over_seeds(rows, ["block_depth"]), style.METHOD_STYLES["vit"]
    depths = points["block_depth"].astype(int)
    axes.plot(depths, points["mean"], color=look["color"], lw=0.7)
    style.draw_points(axes, depths, points, area, look)
    paper.mark(axes, "ablate_block_depth", SWEPT_B, {(str(depth),): depth for depth in depths})
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
    drawn = style.save(figure, f"figure2b_{rows['scale'].iloc[0]}", out_dir)
    return drawn + lengths.draw(path, rows, "ablate_block_depth", "figure2b", "Figure 2b", out_dir)


def new_figure(rows, title):
    """(figure, axes, the area of a marker in points^2 per parameter)."""
    figure, axes = style.new_figure(rows, title, 2.85, f"\n{style.spread_note(rows)}")
    axes.margins(y=0.14)
    return figure, axes, LARGEST / rows["num_params"].max()


if __name__ == "__main__":
    style.main(__file__, __doc__, {"compare_vit_cnn": draw_a, "ablate_block_depth": draw_b})
