"""Figure 4: which couplings should a Jet have? bits/dim against the share of channel couplings.

    python paper_figures/figure4.py --scale small      # results/ablate_coupling_small.csv -> out/

One line per kind of spatial split; the paper's figure is on ImageNet-1k at 64 x 64.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from paper_figures import paper, style
from paper_figures.regime import drawn_from
from paper_figures.results_csv import final_test_rows

SWEPT = ("coupling_ratio", "spatial_split")


def load(path):
    """Test rows of the last step, one for each (ratio, split, seed)."""
    return final_test_rows(path, "ablate_coupling", SWEPT, "Figure 4")


@drawn_from("ablate_coupling", "figure4", "Figure 4")
def draw(path, out_dir=style.OUT):
    """Draw the figure from a CSV; returns the paths of the PDF and the PNG."""
    rows = load(path)
    num_seeds = rows["seed"].nunique()
    looks = style.looks(rows["spatial_split"], style.SPLIT_STYLES)
    figure, axes = style.new_figure(rows, "Figure 4", 3.1)
    for split, look in looks.items():
        line = rows[rows["spatial_split"] == split].groupby("channel_share")["bits_per_dim"]
        line = line.agg(["mean", "min", "max"])
        axes.plot(line.index, line["mean"], label=split, **look)
        if num_seeds > 1:
            axes.fill_between(line.index, line["min"], line["max"], color=look["color"], alpha=0.2,
                              lw=0)
    paper.mark(axes, "ablate_coupling", SWEPT,
               rows.groupby([*SWEPT])["channel_share"].first().to_dict())
    # One run stands for all splits where there is no spatial coupling.
    no_spatial = rows[rows["channel_share"] == 1]
    axes.plot(1, no_spatial["bits_per_dim"].mean(), "o", color="black", zorder=3,
              label="no spatial coupling")

    axes.set_xlabel("share of channel couplings (realised)")
    names = rows.groupby("channel_share")["coupling_ratio"].agg(
        lambda ratios: " = ".join(style.ordered(ratios)))
    top = axes.secondary_xaxis("top")
    top.set_xticks(names.index, names.str.replace("-", "\n"), fontsize=6)
    top.tick_params(length=2, pad=1)
    spread = f"{num_seeds} seeds: mean, band = min to max" if num_seeds > 1 else "one seed"
    figure.legend(title=f"spatial split ({spread}){equal_splits(rows)}", title_fontsize=6.5,
                  ncols=3, handlelength=1.6, loc="outside lower center")
    return style.save(figure, f"figure4_{rows['scale'].iloc[0]}", out_dir)


def equal_splits(rows):
    """A line for the legend on splits that share their runs; "" where there are none."""
    shared = rows[(rows["channel_share"] < 1) & rows.duplicated(["run_id"], keep=False)]
    same = [f"{ratio}: {' = '.join(style.ordered(splits, style.SPLIT_STYLES))}"
            for (ratio, _), splits in shared.groupby(["coupling_ratio", "run_id"])["spatial_split"]]
    return f"\n{'; '.join(dict.fromkeys(same))}: the same couplings, run once" if same else ""


if __name__ == "__main__":
    style.main(__file__, __doc__, {"ablate_coupling": draw})
