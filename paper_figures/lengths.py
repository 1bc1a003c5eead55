"""The same grid at several training lengths: bits/dim against compute, and what becomes of a gap.

results/<experiment>_lengths_<scale>.csv has the other lengths than the CSV of that experiment.
"""
import math
from pathlib import Path

import numpy as np
from paper_figures import inference, style
from paper_figures.inference import Arms, Contrast, quantile
from paper_figures.per_image import read_per_image
from paper_figures.regime import epochs_of
from paper_figures.results_csv import final_rows

POINT = ("block", "block_depth", "emb_dim", "patch_size", "epochs")
SWEPT = {"compare_vit_cnn": ("block", "emb_dim", "patch_size", "epochs"),
         "ablate_block_depth": ("block_depth", "epochs")}
DASHES = ("-", "--", ":", "-.")  # from the longest training on
FAR = 1e4  # epochs, beyond which a crossing is not told


def beside(path, experiment):
    """The CSV of the other lengths that belongs to a CSV."""
    scale = Path(path).stem.rpartition("_")[2]
    return Path(path).with_name(f"{experiment}_lengths_{scale}.csv")


def read(path, rows, experiment):
    """(rows of seed 0 at all lengths, {run_id: bits/dim per image}); rows: of the CSV at path."""
    other = beside(path, experiment)
    more = final_rows(other, f"{experiment}_lengths", SWEPT[experiment], "training lengths",
                      ("total_steps",))
    images = read_per_image(path, rows) | read_per_image(other, more)
    import pandas as pd  # takes half a second: imported where it is used
    both = pd.concat([rows[rows["seed"] == 0].drop(columns="epochs", errors="ignore"),
                      more.drop(columns="epochs")], ignore_index=True)
    both["epochs"] = [f"{epochs_of(both.loc[[index]])[0]:g}" for index in both.index]
    return both.astype(dict.fromkeys(POINT, str)), images


def draw(path, rows, experiment, name, title, out_dir):
    """Draw a line for each length and kind of network where there is such a CSV; returns paths."""
    if not beside(path, experiment).exists():
        return []
    rows, _ = read(path, rows, experiment)
    rows = rows[rows["split"] == "test"]
    note = "\nseed 0; whiskers: ±1 s.e. over images; area: parameters"
    figure, axes = style.new_figure(rows, title, 2.85, note)
    area, handles = 60 / rows["num_params"].max(), []
    lengths = sorted(set(rows["epochs"]), key=float, reverse=True)
    for (block, patch), of_kind in rows.groupby(["block", "patch_size"], sort=False):
        look, is_hollow = style.METHOD_STYLES[block], patch != rows["patch_size"].iloc[0]
        for epochs, dash in zip(lengths, DASHES):
            points = style.over_seeds(of_kind[of_kind["epochs"] == epochs], [*POINT])
            axes.plot(points["train_flops"], points["mean"], color=look["color"], lw=0.7, ls=dash)
            style.draw_points(axes, points["train_flops"], points, area, look, is_hollow)
        kind = {"mfc": "none"} if is_hollow else {"mew": 0, "alpha": 0.5}
        handles.append(style.line(f"{block.upper().replace('VIT', 'ViT')}, patches of {patch}",
                                  ls="", **look, **kind))
    handles += [style.line(f"{epochs} epochs", color="#333333", ls=dash, lw=0.7)
                for epochs, dash in zip(lengths, DASHES)]
    style.compute_axis(axes, rows["train_flops"])
    axes.set_xlabel("training compute (FLOPs)")
    figure.legend(handles=handles, ncols=3, handlelength=1.8, loc="outside lower center")
    return style.save(figure, f"{name}_lengths_{rows['scale'].iloc[0]}", out_dir)


def pairs(rows, experiment, best_depth):
    """[(name, {length: Contrast})] of what is compared at every length: ViT - CNN of equal width,
    or the depth that the paper found best - depth 1.
    """
    field, one, other, keys = "block", "vit", "cnn", ("emb_dim", "patch_size")
    if experiment == "ablate_block_depth":
        field, one, other, keys = "block_depth", str(best_depth), "1", ()
    found, places = {}, set(rows[[*POINT]].itertuples(index=False, name=None))
    for point in style.points(rows, POINT, {}):
        values = dict(zip(POINT, point))
        rival = tuple((values | {field: other}).values())
        if values[field] == one and rival in places:
            name = ", ".join([f"{one} - {other}".replace("vit", "ViT").replace("cnn", "CNN"),
                              *(f"{key.split('_')[0].replace('emb', 'width')} {values[key]}"
                                for key in keys)])
            name = f"depth {name}" if field == "block_depth" else name
            found.setdefault(name, {})[values["epochs"]] = Contrast(name, {point: 1, rival: -1})
    return [(name, dict(sorted(of_pair.items(), key=lambda item: float(item[0]))))
            for name, of_pair in found.items()]


def section(path, rows, item, best_depth):
    """Lines for the page: what becomes of the gap as training grows. Empty without such a CSV."""
    experiment = item.experiment
    if experiment not in SWEPT or not beside(path, experiment).exists():
        return []
    variance, df = Arms(rows, item.swept, read_per_image(path, rows)).pooled_test()
    both, images = read(path, rows, experiment)
    arms, lengths = Arms(both, POINT, images), sorted(set(both["epochs"]), key=float)
    scale = rows["scale"].iloc[0]
    lines = [f"![{item.title}](../paper_figures/out/{item.figure}_lengths_{scale}.png)", "",
             "As training grows (seed 0, each length with a schedule of its own; bits/dim, ± s.e. "
             "over images):", "",
             f"| gap | {' | '.join(f'{epochs} epochs' for epochs in lengths)} | for ten times as "
             f"long, 95 % interval |", f"|{(len(lengths) + 2) * ' --- |'}"]
    outlooks = []
    for name, contrasts in pairs(both, experiment, best_depth):
        found = {epochs: arms.measure(contrast) for epochs, contrast in contrasts.items()}
        cells = [" ± ".join(filter(None, inference.cells(found[epochs])[1:3]))
                 if epochs in found else "" for epochs in lengths]
        slope, reach, crossing = trend({float(epochs): one.value for epochs, one in found.items()},
                                       2 * variance, df)
        growth = "" if math.isnan(slope) else f"{slope:+.4f}"
        if reach > 0:
            growth += f" ({slope - reach:+.4f} to {slope + reach:+.4f})"
        lines.append(f"| {name} | {' | '.join(cells)} | {growth} |")
        outlooks.append(f"{name}: {crossing}")
    return [*lines, "", "Extrapolated, not measured, on the straight line of the gap over the "
            f"logarithm of the epochs: {'; '.join(outlooks)}.", ""]


def trend(gaps, variance, df):
    """(slope per factor of ten, reach of its 95 % interval, where the line crosses zero in words).

    gaps: {epochs: gap}. variance: of each gap between seeds, with df degrees of freedom; with none
    there is no interval, and its reach is nan.
    """
    if len(gaps) < 2:
        return math.nan, math.nan, "one length alone tells no trend"
    x, y = np.log10(list(gaps)), np.array(list(gaps.values()))
    spread = ((x - x.mean()) ** 2).sum()
    slope = float(((x - x.mean()) * y).sum() / spread)
    reach = quantile(df) * math.sqrt(variance / spread) if df else math.nan
    at = x.mean() - y.mean() / slope if slope else math.inf
    if y[0] * y[-1] < 0:
        words = "it has changed its sign"
    elif (np.diff(abs(y)) >= 0).any():
        words = "it does not shrink from each length to the next"
    elif abs(slope) <= reach:
        words = "its trend is not told from none"
    elif at > math.log10(FAR):
        words = f"not zero within {FAR:,.0f} epochs"
    else:
        words = f"zero at about {float(f'{10 ** at:.2g}'):,.0f} epochs"
    return slope, reach, words
