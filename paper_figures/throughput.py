"""Speed: images/s against the reference of the same run, and the share of the matrix-multiply peak.

    python paper_figures/throughput.py --device cpu      # results/throughput_cpu.csv -> out/

One group of bars per size. experiments/throughput.py measures the rows; results/README.md has the columns.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import style
from paper_figures.results_csv import ResultsError

NUMBERS = ("batch_size", "threads", "steps", "images_per_s", "step_seconds", "step_seconds_q25", "step_seconds_q75",
           "flops_per_s", "matmul_peak_flops_per_s", "peak_share", "first_step_seconds", "num_params")
MAYBE = ("free_running_images_per_s", "ratio", "ratio_q25", "ratio_q75", "peak_memory_gib", "device_memory_gib",
         "startup_seconds")
KEY = ["size", "what", "implementation", "against", "precision", "compile", "graph", "checkpoint_activations",
       "device", "hardware"]
COLUMNS = ("experiment", "size", "what", "implementation", "against", "precision", "batch_size", "threads", "steps",
           "images_per_s", "step_seconds", "step_seconds_q25", "step_seconds_q75", "free_running_images_per_s",
           "flops_per_s", "matmul_peak_flops_per_s", "peak_share", "ratio", "ratio_q25", "ratio_q75", "peak_memory_gib",
           "device_memory_gib", "first_step_seconds", "startup_seconds", "num_params", "compile", "graph",
           "checkpoint_activations", "kernels", "images", "device", "hardware", "git_commit", "git_dirty", "python_version", "torch_version")
WHATS = {"train": {"color": "#0072B2"}, "likelihood": {"color": "#E69F00", "hatch": "////"},
         "sampling": {"color": "#009E73", "hatch": "...."}}
PORT = "jet-pytorch"
EAGER = "eager"  # what our own modes are compared with
SWITCHES = {"compile": "compiled", "graph": "CUDA graph", "checkpoint_activations": "checkpointing"}
VARIANT = ["precision", *SWITCHES, "hardware"]  # a group's label names those that vary


def read(path):
    """The rows of one CSV, as text but for the numbers; an empty cell there is nan.

    Raises ResultsError for a missing file, other columns, repeated rows, missing numbers, or half a comparison.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file: run experiments/throughput.py first") from None
    except (ValueError, OSError) as error:
        raise ResultsError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None
    if wrong := set(rows.columns) ^ set(COLUMNS):
        raise ResultsError(f"{path}: missing or unknown columns {', '.join(sorted(wrong))}: move the file away")
    if rows.empty:
        raise ResultsError(f"{path}: has no rows")
    name = rows["size"] + " " + rows["what"] + " " + rows["implementation"]
    if (twice := rows.duplicated(KEY)).any():
        raise ResultsError(f"{path}: {name[twice].iloc[0]} is there twice")
    if (wrong := ~rows["what"].isin(WHATS)).any():
        raise ResultsError(f"{path}: {name[wrong].iloc[0]}: is none of {', '.join(WHATS)}")
    of_modes = rows["against"] == EAGER
    eager = (rows["compile"] != "True") & (rows["graph"] != "True")
    compared = (rows["implementation"] == "ours") & (rows["against"] != "") & ~(of_modes & eager)
    for column in (*NUMBERS, *MAYBE):
        rows[column] = pd.to_numeric(rows[column], errors="coerce")
        needed = compared if column.startswith("ratio") else column in NUMBERS
        if (bad := needed & ~np.isfinite(rows[column])).any():
            raise ResultsError(f"{path}: {name[bad].iloc[0]} has no number as {column}")
    pair = [column for column in KEY if column != "implementation"]
    alone = (rows["against"] != "") & ~of_modes & ~rows.duplicated(pair, keep=False)
    modes = [column for column in KEY if column not in ("compile", "graph")]
    alone |= of_modes & ~eager.groupby([rows[column] for column in modes]).transform("any")
    if alone.any():
        raise ResultsError(f"{path}: {name[alone].iloc[0]} lacks the other half of its comparison: measure it again")
    return rows


def draw(path, out_dir=style.OUT):
    """Draw the bars from a CSV; returns the paths of the PDF and the PNG."""
    rows = read(path)
    style.plt.rcParams["hatch.linewidth"] = 0.4
    rows = rows.assign(group=rows["size"] + rows[VARIANT].apply(
        lambda row: "".join(f"\n{text}" for name in VARIANT
                            if rows[name].nunique() > 1 and (text := _label(name, row[name]))), axis=1))
    against_port = rows["against"].str.startswith(PORT)
    # One bar each: the comparison with the port where there is one, else the rows measured alone, else any.
    ours = rows[rows["implementation"] == "ours"].assign(order=2 - (rows["against"] == "") - 2 * against_port)
    ours = ours.sort_values("order", kind="stable").drop_duplicates(["group", "what"])
    port, compared = rows[rows["implementation"] == PORT], ours[ours["order"] == 0]
    groups = list(dict.fromkeys(rows["group"]))
    figure, panels = style.plt.subplots(1 + bool(len(compared)), sharex=True, squeeze=False,
                                        figsize=(style.COLUMN_WIDTH, 3.5 if len(compared) else 2.2))
    if len(compared):
        _bars(panels[0, 0], groups, compared, "ratio", compared["ratio_q25"], compared["ratio_q75"], "{:.2f}")
        panels[0, 0].axhline(1, color="black", lw=0.8)
        panels[0, 0].set_ylabel(f"speed relative to\n{compared['against'].iloc[0]}\n(higher is better)")
    axes = panels[-1, 0]
    work = ours["peak_share"] * ours["step_seconds"]
    _bars(axes, groups, ours, "peak_share", work / ours["step_seconds_q75"], work / ours["step_seconds_q25"],
          "{:,.0f}/s", ours["images_per_s"])
    for number, what in enumerate(WHATS):
        theirs = port[port["what"] == what]
        places = [groups.index(group) + 0.27 * (number - 1) for group in theirs["group"]]
        axes.plot(places, theirs["peak_share"], "_", color="black", ms=11, mew=1.4, zorder=4,
                  label=None if number or theirs.empty else port["against"].iloc[0])
    axes.yaxis.set_major_formatter(style.matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.set_ylabel("share of the matrix-\nmultiply peak\n(higher is better)")
    axes.set_xticks(range(len(groups)), groups)
    same = {name: rows[name].iloc[0] for name in VARIANT if rows[name].nunique() == 1}
    settings = [_label(name, value) for name, value in same.items() if name != "hardware"]
    if (rows["device"] == "cpu").all():
        settings.append(f"threads: {', '.join(dict.fromkeys(ours['threads'].map('{:.0f}'.format)))}")
    figure.suptitle(f"{same.get('hardware', rows['device'].iloc[0])}, {', '.join(filter(None, settings))}\n"
                    "over the bars images/s or the ratio; whiskers: quartiles of the steps", fontsize=7)
    figure.align_ylabels()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=1.4,
                  columnspacing=1.2)
    return style.save(figure, f"throughput_{rows['device'].iloc[0]}", out_dir)


def _bars(axes, groups, rows, column, low, high, text, numbers=None):
    """Grouped bars of a column with whiskers from low to high, and a number over each."""
    for number, (what, look) in enumerate(WHATS.items()):
        mine = rows["what"] == what
        places = [groups.index(group) + 0.27 * (number - 1) for group in rows["group"][mine]]
        heights = rows[column][mine]
        # A median of ratios may lie outside the quartiles' ratio by rounding: whiskers have no negative length.
        spread = [np.maximum(0, heights - low[mine]), np.maximum(0, high[mine] - heights)]
        axes.bar(places, heights, 0.25, label=what, edgecolor="white", linewidth=0.4, **look)
        axes.errorbar(places, heights, spread, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5)
        values = heights if numbers is None else numbers[mine]
        for place, top, value in zip(places, np.maximum(heights, high[mine]), values):
            axes.annotate(text.format(value), (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=5)
    axes.margins(y=0.15)
    axes.set_axisbelow(True)
    axes.grid(axis="x", visible=False)


def _label(name, value):
    """How a setting is written in the figure; "" for a switch that is off."""
    if name in SWITCHES:
        return SWITCHES[name] if value == "True" else ""
    return value


def main(arguments=None):
    style.main("throughput.py", __doc__, {"throughput": draw}, arguments, flag="device", choices=("cpu", "cuda"))


if __name__ == "__main__":
    main()
