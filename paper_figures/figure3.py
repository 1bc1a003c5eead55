"""Figure 3: does a larger Jet help? bits/dim of test and training images against training compute.

    python paper_figures/figure3.py --scale small      # results/scaling_small.csv -> out/

One panel for each image set, and in it one line for each depth and width, over the numbers of
couplings; the area of a marker is proportional to the number of parameters. A filled marker (test)
far above the hollow one of the same model (training images) shows overfitting.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from paper_figures import paper, style
from paper_figures.inference import quantile
from paper_figures.regime import drawn_from
from paper_figures.results_csv import final_rows

SWEPT = ("dataset", "num_couplings", "block_depth", "emb_dim")
SIZE = ["block_depth", "emb_dim"]  # of a line
LARGEST = 90  # area of the marker of the most parameters, in points^2


def sets(rows):
    """The image sets in pairs of a smaller and a larger one of equal resolution."""
    return style.ordered(rows["dataset"], style.DATASET_TITLES)


@drawn_from("scaling", "figure3", "Figure 3")
def draw(path, out_dir=style.OUT):
    """Draw the figure from a CSV; returns the paths of the PDF and the PNG."""
    rows = final_rows(path, "scaling", SWEPT, "Figure 3")
    scale, area = rows["scale"].iloc[0], LARGEST / rows["num_params"].max()
    looks = style.looks(rows[SIZE].itertuples(index=False, name=None), spare=style.SIZE_STYLES)
    datasets = sets(rows)
    num_lines = -(-len(datasets) // 2)
    figure, panels = style.plt.subplots(  # a line of panels shares its resolution, and its y axis
        num_lines, 2, figsize=(style.COLUMN_WIDTH, 1.6 + 1.5 * num_lines), sharex=True,
        sharey="row", squeeze=False)
    for axes in panels.flat[len(datasets):]:
        axes.remove()
    for axes, dataset in zip(panels.flat, datasets):
        of_set = rows[rows["dataset"] == dataset]
        draw_set(axes, of_set, looks, area)
        paper.mark(axes, "scaling", SWEPT,
                   of_set.groupby([*SWEPT])["train_flops"].first().to_dict())
        if scale == "smoke":
            style.mark_smoke(axes, fontsize=7.5, in_layout=False)
    style.compute_axis(axes, rows["train_flops"])
    figure.suptitle(f"Figure 3, {scale} scale\n{style.spread_note(rows)}", fontsize=7.5)
    for axes in panels[-1]:
        axes.set_xlabel("training compute (FLOPs)")
    for axes in panels[:, 0]:
        axes.set_ylabel("bits/dim (lower is better)")
    handles = [style.line(f"{depth} x {width}", lw=0.7, **look)
               for (depth, width), look in looks.items()]
    dot = {"ls": "", "marker": "o"}
    handles += [style.line("filled: test images", **dot, color=(0, 0, 0, 0.5), mew=0),
                style.line("hollow: training images", **dot, color="black", mfc="none")]
    couplings = ", ".join(style.ordered(rows["num_couplings"]))
    figure.legend(handles=handles, title=f"blocks x width, {couplings} couplings",
                  title_fontsize=6.5, ncols=2, handlelength=1.6, columnspacing=1,
                  loc="outside lower left")
    style.parameter_legend(figure, rows["num_params"], area, loc="outside lower right")
    return style.save(figure, f"figure3_{scale}", out_dir)


def power_law(rows):
    """{compute: (low, mean, high)} of bits/dim = a x compute^b, and (low, mean, high) of b.

    A line through the test numbers of each seed, in logarithms; 95 % t intervals over seeds. None
    with fewer than three seeds or points. rows: of one image set.
    """
    test = rows[rows["split"] == "test"]
    if test["seed"].nunique() < 3 or test["train_flops"].nunique() < 3:
        return None
    at = np.geomspace(test["train_flops"].min(), test["train_flops"].max(), 30)
    fits = [np.polyfit(np.log(of_seed["train_flops"]), np.log(of_seed["bits_per_dim"]), 1)
            for _, of_seed in test.groupby("seed")]

    def interval(values):
        reach = quantile(len(values) - 1) * np.std(values, axis=0, ddof=1) / len(values) ** 0.5
        mean = np.mean(values, axis=0)
        return mean - reach, mean, mean + reach
    curves = interval([np.polyval(fit, np.log(at)) for fit in fits])
    return dict(zip(at, np.exp(curves).T)), interval([slope for slope, _ in fits])


def draw_set(axes, rows, looks, area):
    """One panel: the test and training bits/dim of the models of one image set."""
    for (depth, width), look in looks.items():
        line = rows[(rows["block_depth"] == depth) & (rows["emb_dim"] == width)]
        test, train = (style.over_seeds(line[line["split"] == split], SWEPT)
                       for split in ("test", "train"))
        axes.vlines(test["train_flops"], test["mean"], train["mean"], color=look["color"], lw=0.7,
                    ls=":")
        axes.plot(test["train_flops"], test["mean"], color=look["color"], lw=0.7)
        style.draw_points(axes, test["train_flops"], test, area, look)
        style.draw_points(axes, train["train_flops"], train, area, look, hollow=True)
    if law := power_law(rows):
        low, mean, high = zip(*law[0].values())
        axes.plot(list(law[0]), mean, color="#999999", lw=0.7, ls="-.", zorder=1)
        axes.fill_between(list(law[0]), low, high, color="#999999", alpha=0.25, lw=0, zorder=1)
    num_images = rows.groupby("split")["num_images"].first()
    axes.set_title(f"{style.dataset_title(rows['dataset'].iloc[0])}\n{num_images['test']:,} test, "
                   f"{num_images['train']:,} train", fontsize=6.5)
    axes.margins(y=0.12)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"scaling": draw})
