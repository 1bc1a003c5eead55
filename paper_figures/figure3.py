"""Figure 3: does a larger Jet help? bits/dim of test and training images against training compute, one panel a set.

    python paper_figures/figure3.py --scale small      # results/scaling_small.csv -> out/

One line for each depth and width, over the numbers of couplings; the area of a marker is proportional to the number of
parameters. A filled marker (test) far above the hollow one of the same model (training images) shows overfitting.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style
from paper_figures.results_csv import final_rows

SWEPT = ("dataset", "num_couplings", "block_depth", "emb_dim")
SETS = {  # a smaller and a larger one each
    "smoke": ("cifar10-subset-vehicles", "cifar10-subset"),
    "small": ("cifar10-subset", "cifar10"), "medium": ("cifar10-subset", "cifar10"),
    "paper": ("imagenet32-oord", "imagenet21k-32-box", "imagenet64-oord", "imagenet21k-64-box")}
SIZES = {  # couplings, blocks in each, width: all combinations
    "smoke": ((8, 12), (1,), (16, 32)), "small": ((10, 20), (1, 2), (16, 32)), "medium": ((16, 32), (1, 2), (128, 256)),
    "paper": ((16, 32, 64), (2, 5), (256, 512))}
GRID = {scale: [(name, *map(str, size)) for name in SETS[scale] for size in itertools.product(*SIZES[scale])]
        for scale in style.SCALES}
LARGEST = 90  # area of the marker of the most parameters, in points^2


def draw(path, out_dir=style.OUT):
    """Draw the figure from a CSV; returns the paths of the PDF and the PNG."""
    rows = final_rows(path, "scaling", SWEPT, GRID, "Figure 3")
    scale, area = rows["scale"].iloc[0], LARGEST / rows["num_params"].max()
    couplings, *sizes = SIZES[scale]
    looks = dict(zip(itertools.product(*sizes), style.SIZE_STYLES))  # of (depth, width)
    num_lines = len(SETS[scale]) // 2
    figure, panels = style.plt.subplots(num_lines, 2, figsize=(style.COLUMN_WIDTH, 1.6 + 1.5 * num_lines), sharex=True,
                                        sharey="row", squeeze=False)
    for axes, dataset in zip(panels.flat, SETS[scale]):  # a row of panels shares its resolution, and its y axis
        draw_set(axes, rows[rows["dataset"] == dataset], looks, area)
        if scale == "smoke":
            style.mark_smoke(axes)
            axes.texts[-1].set(fontsize=7.5, in_layout=False)
    style.compute_axis(axes, rows["train_flops"])
    figure.suptitle(f"Figure 3, {scale} scale\n{style.spread_note(rows)}", fontsize=7.5)
    for axes in panels[-1]:
        axes.set_xlabel("training compute (FLOPs)")
    for axes in panels[:, 0]:
        axes.set_ylabel("bits/dim (lower is better)")
    line = style.matplotlib.lines.Line2D
    handles = [line([], [], lw=0.7, label=f"{depth} x {width}", **look) for (depth, width), look in looks.items()]
    handles += [line([], [], ls="", marker="o", color=(0, 0, 0, 0.5), mew=0, label="filled: test images"),
                line([], [], ls="", marker="o", color="black", mfc="none", label="hollow: training images")]
    title = f"blocks x width, {', '.join(map(str, couplings))} couplings"
    figure.legend(handles=handles, title=title, title_fontsize=6.5, ncols=2, handlelength=1.6, columnspacing=1,
                  loc="outside lower left")
    style.parameter_legend(figure, rows["num_params"], area, loc="outside lower right")
    return style.save(figure, f"figure3_{scale}", out_dir)


def draw_set(axes, rows, looks, area):
    """One panel: the test and training bits/dim of the models of one image set."""
    for (depth, width), look in looks.items():
        mine = rows[(rows["block_depth"] == str(depth)) & (rows["emb_dim"] == str(width))]
        test, train = (style.over_seeds(mine[mine["split"] == split], SWEPT) for split in ("test", "train"))
        axes.vlines(test["train_flops"], test["mean"], train["mean"], color=look["color"], lw=0.7, ls=":")
        axes.plot(test["train_flops"], test["mean"], color=look["color"], lw=0.7)
        style.draw_points(axes, test["train_flops"], test, area, look)
        style.draw_points(axes, train["train_flops"], train, area, look, hollow=True)
    num_images = rows.groupby("split")["num_images"].first()
    axes.set_title(f"{style.DATASET_TITLES[rows['dataset'].iloc[0]]}\n{num_images['test']:,} test, "
                   f"{num_images['train']:,} train", fontsize=6.5)
    axes.margins(y=0.12)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"scaling": draw})
