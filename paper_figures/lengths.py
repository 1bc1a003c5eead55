"""The same grid at several training lengths: bits/dim against compute, and what becomes of a gap.

results/<experiment>_lengths_<scale>.csv has the other lengths than the CSV of that experiment.
"""
import math
from pathlib import Path

import numpy as np
from paper_figures import inference, regime, style
from paper_figures.inference import Arms, Contrast, quantile
from paper_figures.per_image import read_per_image
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
    runs = zip(both["dataset"], both["total_steps"], both["batch_size"])
    both["epochs"] = [f"{regime.epochs(*run):g}" for run in runs]
    return both.astype(dict.fromkeys(POINT, str)), images


def draw(path, rows, experiment, name, title, out_dir):
    """Draw a line for each length and kind of network where there is such a CSV; returns paths."""
    if not beside(path, experiment).exists():
        return []
    rows, _ = read(path, rows, experiment)
    rows = rows[rows["split"] == "test"]
    note = "\nseed 0; whiskers: ±1 s.e. over images; area: parameters"
    if rows["patch_size"].nunique() > 1:
        note += "\nfrom left to right, on a line: sizes; hollow: training lengths"
    figure, axes = style.new_figure(rows, f"{title}, training lengths", 3, note)
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
    # Of one gap, a difference of two runs; nan where no two seeds tell it.
    reach = quantile(df) * math.sqrt(2 * variance) if df and variance > 0 else math.nan
    seeds = "" if math.isnan(reach) else f"; between seeds, a gap differs by ±{reach:.3f}, 95 %"
    picture = f"../paper_figures/out/{item.figure}_lengths_{scale}.png"
    lines = [f"![{item.title}, training lengths]({picture})", "",
             "As training grows (one seed; not of equal compute; each length has a whole schedule, "
             "at the learning rate of the search; bits/dim, ± s.e. over images):", "",
             f"| gap | {' | '.join(f'{epochs} epochs' for epochs in lengths)} | last - first, "
             f"95 % interval |", f"|{(len(lengths) + 2) * ' --- |'}"]
    outlooks = []
    for name, contrasts in pairs(both, experiment, best_depth):
        found = {epochs: arms.measure(contrast) for epochs, contrast in contrasts.items()}
        cells = [" ± ".join(filter(None, inference.cells(found[epochs])[1:3]))
                 if epochs in found else "" for epochs in lengths]
        change, outlook = trend({float(epochs): one.value for epochs, one in found.items()}, reach)
        growth = "" if math.isnan(change) else f"{change:+.4f}"
        if growth and not math.isnan(reach):
            low, high = change - math.sqrt(2) * reach, change + math.sqrt(2) * reach
            growth += f" ({low:+.4f} to {high:+.4f})"
        lines.append(f"| {name} | {' | '.join(cells)} | {growth} |")
        outlooks.append(f"{name}: {outlook}")
    return [*lines, "", f"What becomes of the gap (one seed{seeds}): {'; '.join(outlooks)}.", ""]


def trend(gaps, reach):
    """(last - first gap, what becomes of the gap in words).

    gaps: {epochs: gap}. reach: of the 95 % interval of each gap between seeds; nan is not known.
    """
    if len(gaps) < 2:
        return math.nan, "one length alone tells no trend"
    x, y = np.log10(list(gaps)), np.array(list(gaps.values()))
    change, steps = float(y[-1] - y[0]), np.diff(abs(y))
    slope, start = np.polyfit(x, y, 1)
    if abs(y[-1]) <= reach:
        words = f"not told from zero at {max(gaps):g} epochs"
    elif y[0] * y[-1] < 0:
        words = "it has changed its sign"
    elif (steps >= 0).all():
        words = "it grows from each length to the next"
    elif (steps >= 0).any():
        words = "it neither grows nor shrinks all the way"
    elif abs(change) <= math.sqrt(2) * reach:
        words = "its change is not told from none"
    elif np.square(y - start - slope * x).sum() > reach ** 2:
        words = ("it shrinks from each length to the next, but not on a straight line over the "
                 "logarithm of the epochs: where it ends is not extrapolated")
    elif -start / slope > math.log10(FAR):
        words = f"extrapolated, it is not zero within {FAR:,.0f} epochs"
    else:
        words = (f"extrapolated on a straight line over the logarithm of the epochs, it is zero at "
                 f"about {float(f'{10 ** (-start / slope):.2g}'):,.0f} epochs")
    return change, words
