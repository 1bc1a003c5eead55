"""Speed: images/s against the reference of the same run, and the share of the matrix-multiply peak.

    python paper_figures/throughput.py --device cpu      # results/throughput_cpu.csv -> out/

One group of bars per size. experiments/throughput.py measures the rows; results/README.md has the
columns.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from paper_figures import style
from paper_figures.results_csv import ResultsError, read_csv

NUMBERS = ("batch_size", "threads", "steps", "images_per_s", "step_seconds", "step_seconds_q25",
           "step_seconds_q75", "flops_per_s", "matmul_peak_flops_per_s", "peak_share",
           "first_step_seconds", "num_params")
MAYBE = ("free_running_images_per_s", "ratio", "ratio_q25", "ratio_q75", "peak_memory_gib",
         "device_memory_gib", "startup_seconds")
KEY = ["size", "what", "implementation", "against", "precision", "compile", "graph",
       "checkpoint_activations", "device", "hardware"]
COLUMNS = ("experiment", "size", "what", "implementation", "against", "precision", "batch_size",
           "threads", "steps", "images_per_s", "step_seconds", "step_seconds_q25",
           "step_seconds_q75", "free_running_images_per_s", "flops_per_s",
           "matmul_peak_flops_per_s", "peak_share", "ratio", "ratio_q25", "ratio_q75",
           "peak_memory_gib", "device_memory_gib", "first_step_seconds", "startup_seconds",
           "num_params", "compile", "graph", "checkpoint_activations", "kernels", "images",
           "device", "hardware", "git_commit", "git_dirty", "python_version", "torch_version")
WHATS = {"train": {"color": "#0072B2"}, "likelihood": {"color": "#E69F00", "hatch": "////"},
         "sampling": {"color": "#009E73", "hatch": "...."}}
PORT = "jet-pytorch"
EAGER = "eager"  # what our own modes are compared with
SWITCHES = {"compile": "compiled", "graph": "CUDA graph", "checkpoint_activations": "checkpointing"}
VARIANT = ["precision", *SWITCHES, "hardware"]  # a group's label names those that vary
GAP = 0.5  # between groups of bars


def read_table(path):
    """All cells of one CSV as text. Raises ResultsError for other columns."""
    rows = read_csv(path, "throughput", dtype=str)
    if wrong := set(rows.columns) ^ set(COLUMNS):
        raise ResultsError(f"{path}: missing or unknown columns {', '.join(sorted(wrong))}: move "
                           "the file away")
    return rows


def read(path):
    """The rows of one CSV, as text but for the numbers; an empty cell there is nan.

    Raises ResultsError for a damaged file, repeated rows, missing numbers, or half a comparison.
    """
    rows = read_table(path)
    if rows.empty:
        raise ResultsError(f"{path}: has no rows")
    of_modes, is_ours = rows["against"] == EAGER, rows["implementation"] == "ours"
    eager = (rows["compile"] != "True") & (rows["graph"] != "True")
    compared = is_ours & (rows["against"] != "") & ~(of_modes & eager)
    pair = [column for column in KEY if column != "implementation"]
    alone = (rows["against"] != "") & ~of_modes & ~rows.duplicated(pair, keep=False)
    modes = [rows[column] for column in KEY if column not in ("compile", "graph")]
    alone |= of_modes & ~eager.groupby(modes).transform("any")
    faults = {"is there twice": rows.duplicated(KEY),
              f"is none of {', '.join(WHATS)}": ~rows["what"].isin(WHATS)}
    import pandas as pd
    for column in (*NUMBERS, *MAYBE):
        rows[column] = pd.to_numeric(rows[column], errors="coerce")
        needed = compared if column.startswith("ratio") else column in NUMBERS
        faults[f"has no number as {column}"] = needed & ~np.isfinite(rows[column])
    faults["lacks the other half of its comparison: measure it again"] = alone
    for fault, wrong in faults.items():
        if wrong.any():
            name = " ".join(rows.loc[wrong, ["size", "what", "implementation"]].iloc[0])
            raise ResultsError(f"{path}: {name} {fault}")
    return rows


def draw(path, out_dir=style.OUT):
    """Draw the bars from a CSV; returns the paths of the PDF and the PNG."""
    rows = read(path)
    for name, label in SWITCHES.items():
        rows[name] = np.where(rows[name] == "True", label, "")
    varying, rows["group"] = [name for name in VARIANT if rows[name].nunique() > 1], rows["size"]
    for name in varying:
        rows["group"] += np.where(rows[name] == "", "", ", " + rows[name])
    ours = ours_of(rows)
    compared = ours[ours["against"].str.startswith(PORT)]
    counts = [len(bars) for bars in (compared, ours) if len(bars)]
    figure, panels = style.plt.subplots(
        len(counts), squeeze=False, height_ratios=[count + 2 for count in counts],
        figsize=(style.COLUMN_WIDTH, 1.3 + 0.15 * sum(counts) + 0.35 * len(counts)))
    if len(compared):
        axes = panels[0, 0]
        draw_bars(axes, compared.assign(
            low=compared["ratio_q25"], high=compared["ratio_q75"],
            text=compared["ratio"].map("{:.2f}".format)), "ratio")
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xlabel(f"speed over {compared['against'].iloc[0]}")
    axes = panels[-1, 0]
    work = ours["peak_share"] * ours["step_seconds"]
    places = draw_bars(axes, ours.assign(
        low=work / ours["step_seconds_q75"], high=work / ours["step_seconds_q25"],
        text=ours["images_per_s"].map("{:,.0f} images/s".format)), "peak_share")
    port = rows[rows["implementation"] == PORT]  # a line over the bars for the port's share
    axes.plot(port["peak_share"], [places[bar] for bar in zip(port["group"], port["what"])], "|",
              color="black", ms=7, mew=1.4, zorder=4, label=port["against"].max())
    axes.xaxis.set_major_formatter(style.matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.set_xlabel("share of the matrix-multiply peak")
    note = "higher is better; whiskers: quartiles of the steps"
    figure.suptitle(f"{setting(rows, ours, varying)}\n{note}", fontsize=7)
    handles, labels = axes.get_legend_handles_labels()
    shown = [number for number, label in enumerate(labels) if isinstance(label, str)]
    figure.legend([handles[number] for number in shown], [labels[number] for number in shown],
                  loc="outside lower center", ncols=4, handlelength=1.4, columnspacing=1.2)
    return style.save(figure, f"throughput_{rows['device'].iloc[0]}", out_dir)


def ours_of(rows):
    """One row of ours for each bar: the comparison with the port where there is one, else the row
    measured alone, else any.
    """
    ours = rows[rows["implementation"] == "ours"]
    order = np.select([ours["against"].str.startswith(PORT), ours["against"] == ""], [0, 1], 2)
    ours = ours.assign(order=order).sort_values("order", kind="stable")
    return ours.drop_duplicates(["group", "what"]).sort_index()


def draw_bars(axes, rows, column):
    """Bars of a column from the top down, one group of them for each size and mode, with whiskers
    from "low" to "high", and the "text" after each. Returns {(group, what): its place}.
    """
    places, ticks = {}, {}
    for group, bars in rows.groupby("group", sort=False):
        whats = [what for what in WHATS if what in set(bars["what"])]
        begin = len(places) + GAP * len(ticks)
        places |= {(group, what): begin + number for number, what in enumerate(whats)}
        ticks[begin + (len(whats) - 1) / 2] = group
    for what, look in WHATS.items():
        bars = rows[rows["what"] == what]
        if bars.empty:
            continue
        where, lengths = [places[group, what] for group in bars["group"]], bars[column]
        # A median of ratios may lie outside the quartiles' ratio by rounding: whiskers have no
        # negative length.
        spread = [np.maximum(0, lengths - bars["low"]), np.maximum(0, bars["high"] - lengths)]
        axes.barh(where, lengths, 0.9, label=what, edgecolor="white", linewidth=0.4, **look)
        axes.errorbar(lengths, where, None, spread, fmt="none", ecolor="black", elinewidth=0.7,
                      capsize=1.5)
        for place, end, text in zip(where, lengths + spread[1], bars["text"]):
            axes.annotate(text, (end, place), (3, 0), textcoords="offset points", va="center",
                          fontsize=5)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.set_axisbelow(True)
    axes.grid(axis="y", visible=False)
    return places


def setting(rows, ours, varying):
    """The title's line on what is the same for all bars."""
    first = rows.iloc[0]
    where = first["device"] if "hardware" in varying else first["hardware"]
    settings = [first[name] for name in VARIANT[:-1] if name not in varying]
    if (rows["device"] == "cpu").all():
        threads = dict.fromkeys(ours["threads"].map("{:.0f}".format))
        settings.append(f"threads: {', '.join(threads)}")
    return f"{where}, {', '.join(filter(None, settings))}"


def main(arguments=None):
    style.main("throughput.py", __doc__, {"throughput": draw}, arguments, flag="device",
               choices=("cpu", "cuda"))


if __name__ == "__main__":
    main()
