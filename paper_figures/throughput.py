"""Speed: images/s of each mode and of jet-pytorch, and the share of the matrix-multiply peak.

    python paper_figures/throughput.py --device cpu      # results/throughput_cpu.csv -> out/

One group of bars per size, one colour per machine. experiments/throughput.py measures the rows;
results/README.md has the columns.
"""
import re
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
WHATS = ("train", "likelihood", "sampling")
PORT = "jet-pytorch"
EAGER = "eager"  # what our own modes are compared with
SETTINGS = ("what", "batch_size", "precision", "checkpoint_activations")
GROUP_GAP, MODE_GAP = 1.5, 0.4  # above a group of bars and above those of a mode, in bars


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
    rows, title = bars_of(read(path))
    looks = style.looks(rows["hardware"], spare=style.SIZE_STYLES)
    names = {name: re.sub(r" \d+GB.*", "", name.removeprefix("NVIDIA ")) for name in looks}
    lowest, widest = rows["place"].max(), rows["high"].max()
    figure, axes = style.plt.subplots(figsize=(style.COLUMN_WIDTH, 0.9 + 0.105 * lowest))
    for (hardware, implementation), bars in rows.groupby(["hardware", "implementation"]):
        spread = [bars["length"] - bars["low"], bars["high"] - bars["length"]]
        axes.barh(bars["place"], bars["length"], 0.95, xerr=np.maximum(0, spread),
                  color=looks[hardware]["color"], hatch="////" if implementation == PORT else None,
                  edgecolor="white", linewidth=0.4, error_kw={"elinewidth": 0.6, "capsize": 1.2})
    for _, bar in rows.iterrows():
        axes.annotate(bar["text"], (bar["high"], bar["place"]), (3, 0), fontsize=5, va="center",
                      textcoords="offset points")
    for group, bars in rows.groupby("group", sort=False):
        axes.annotate(group, (0, bars["place"].min() - 1.2), (2, 0), weight="bold", fontsize=6.5,
                      textcoords="offset points", va="center")
    ticks = rows.groupby(["group", "mode"], sort=False)["place"].mean()
    axes.set_yticks(ticks, ticks.index.get_level_values("mode"))
    axes.tick_params("y", length=0)
    axes.set(xlim=(0, widest + 0.75), xticks=[], ylim=(lowest + 0.8, 0.6))
    axes.set_xlabel("images/s (higher is better)")
    axes.grid(visible=False)
    figure.suptitle(f"{', '.join(names.values())}, {title}\nbars: beside the fastest of their size "
                    "and task; whiskers: quartiles", fontsize=6.5)
    if len(looks) > 1:
        patches = [style.plt.Rectangle((0, 0), 1, 1, color=look["color"], label=names[name])
                   for name, look in looks.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=4, handlelength=1.4)
    return style.save(figure, f"throughput_{rows['device'].iloc[0]}", out_dir)


def bars_of(rows):
    """One row for each bar from the top down, and the title: what is the same for all, and what the
    numbers are.

    Of equal bars the one beside the port counts, then the one measured alone. "group" and "mode"
    say what a bar is, "place" and "length" where, "low" and "high" are its whiskers' ends.
    """
    rows, modes, same = labelled(rows)
    bar = ["group", "mode", "hardware"]
    beside_port = rows["against"].str.startswith(PORT)
    rows["order"] = np.select([beside_port, rows["against"] == ""], [0, 1], 2)
    rows = rows.sort_values("order", kind="stable").drop_duplicates(bar).sort_index()
    orders = {name: style.ordered(rows[name], known) for name, known in
              (("group", dict.fromkeys(rows["group"])), ("mode", modes), ("hardware", ()))}
    rows = rows.sort_values(bar, key=lambda column: column.map(orders[column.name].index))
    new_group, new_mode = (rows[name] != rows[name].shift() for name in bar[:2])
    rows["place"] = (1 + GROUP_GAP * new_group + MODE_GAP * (new_group | new_mode)).cumsum()
    fastest = rows.groupby(["size", "what"])["images_per_s"].transform("max")
    rows["length"] = rows["images_per_s"] / fastest  # sizes differ by a factor of 50
    rows["low"] = rows["length"] * rows["step_seconds"] / rows["step_seconds_q75"]
    rows["high"] = rows["length"] * rows["step_seconds"] / rows["step_seconds_q25"]
    rows["text"] = [f"{speed:,.0f} · {100 * share:.3g}%" for speed, share
                    in zip(rows["images_per_s"], rows["peak_share"])]
    compared = rows["ratio"].notna() & (beside_port | (rows["against"] == EAGER))
    rows.loc[compared, "text"] += rows["ratio"].map(" · {:.2f}x".format)
    title = f"{', '.join(same)}\nimages/s · of the matrix peak"
    if compared.any():
        title += f" · times {' or '.join(dict.fromkeys(rows.loc[compared, 'against']))}"
    return rows, title


def labelled(rows):
    """Our rows and the port's with their group and mode in words; the modes in order; the settings
    that all rows share, in words.
    """
    is_port = rows["implementation"] == PORT
    rows = rows[is_port | (rows["implementation"] == "ours")].copy()
    compiled, graph = rows["compile"] == "True", rows["graph"] == "True"
    plain = EAGER if (compiled | graph).any() else "ours"
    rows["mode"] = np.select([compiled & graph, graph, compiled],
                             ["compiled + graph", "graph", "compiled"], plain)
    rows.loc[is_port, "mode"] = rows["against"]
    rows["batch_size"] = rows["batch_size"].map("batch {:.0f}".format)
    is_checkpointed = rows["checkpoint_activations"] == "True"
    rows["checkpoint_activations"] = np.where(is_checkpointed, "checkpointing", "")
    varying = [name for name in SETTINGS if rows[name].nunique() > 1]
    same = [rows[name].iloc[0] for name in SETTINGS if name not in varying]
    if (rows["device"] == "cpu").all():
        threads = dict.fromkeys(rows["threads"].map("{:.0f}".format))
        same.append(f"threads: {', '.join(threads)}")
    rows["group"] = rows[["size", *varying]].agg(lambda row: ", ".join(filter(None, row)), axis=1)
    port = dict.fromkeys(rows.loc[is_port, "against"])
    return rows, [*port, plain, "compiled", "graph", "compiled + graph"], [*filter(None, same)]


def main(arguments=None):
    style.main("throughput.py", __doc__, {"throughput": draw}, arguments, flag="device",
               choices=("cpu", "cuda"))


if __name__ == "__main__":
    main()
