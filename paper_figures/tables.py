"""The tables of the paper, as Markdown and LaTeX: ours, and beside them what was published.

    python paper_figures/tables.py --scale small
"""
import csv
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import figure4, style
from paper_figures.results_csv import ResultsError, final_test_rows

SPLITS_SWEPT = ("coupling_ratio", "split_mode")
RATIOS, MODES = ("channel-only", "spatial-only", "4:1"), ("pairing", "masking")
SPLITS_GRID = {scale: [(ratio, mode) for ratio in RATIOS for mode in MODES] for scale in style.SCALES}
LAYERS_SWEPT = ("actnorm", "invertible_dense")
ACTNORM, DENSE = ("no-actnorm", "actnorm"), ("no-dense", "dense")
LAYERS_GRID = {scale: [(actnorm, dense) for actnorm in ACTNORM for dense in DENSE] for scale in style.SCALES}

MAIN_SWEPT = ("size", "training", "dataset")
MAIN_VARYING = ("num_couplings", "block_depth", "emb_dim", "total_steps", "lr", "init")
MAIN_SIZES = {"smoke": ("10x1",), "small": ("12x1", "16x2"), "medium": ("32x1", "32x2"), "paper": ("32x2", "64x5")}
# What is trained on what: from scratch, in advance on other images, from those weights on, or no further.
STAND_IN = [("pretrained", "cifar10-animals"), ("scratch", "cifar10-vehicles"), ("fine-tuned", "cifar10-vehicles"),
            ("not-fine-tuned", "cifar10-vehicles")]
MAIN_STAGES = {
    "smoke": [(training, name.replace("cifar10", "cifar10-subset")) for training, name in STAND_IN],
    "small": STAND_IN, "medium": STAND_IN,
    "paper": [("pretrained", "imagenet21k-64-box"), ("pretrained", "imagenet21k-32-box"),
              ("scratch", "imagenet64-oord"), ("fine-tuned", "imagenet64-oord"),
              ("scratch", "imagenet32-oord"), ("fine-tuned", "imagenet32-oord"),
              ("scratch", "cifar10"), ("fine-tuned", "cifar10")]}
MAIN_GRID = {scale: [(size, *stage) for size in MAIN_SIZES[scale] for stage in MAIN_STAGES[scale]]
             for scale in style.SCALES}
# How a run is trained, in the main table.
TRAININGS = {"pretrained": "pretrained", "scratch": "from scratch", "fine-tuned": "pretrained, fine-tuned",
             "not-fine-tuned": "pretrained, not fine-tuned"}
# The paper's own targets, from scratch: training FLOPs and GPU-hours that experiments/cost_table.py computes.
PAPER_COST = {("32x2", "scratch", "imagenet64-oord"): ("8.63e19", 61), ("64x5", "scratch", "imagenet64-oord"): ("4.3e20", 302)}

SHIPPED = style.ROOT / "assets/jet_cifar10"
REPORTED = style.ROOT / "results/reported.csv"
REPORTED_COLUMNS = ["model", "year", "dataset", "variant", "bits_per_dim", "dequantization", "bound", "source", "note"]
DATASETS = {"imagenet64": "ImageNet-1k 64x64", "imagenet32": "ImageNet-1k 32x32", "cifar10": "CIFAR-10"}
KNOWN = {"dataset": (*DATASETS,), "variant": ("oord", "oord?", "chrabaszcz", "cifar10", "unknown"),
         "bound": ("elbo", "exact", "importance-weighted", "ode"),
         "dequantization": ("uniform", "variational", "truncated-normal", "none", "")}
MAIN_COLUMNS = ("Model", "Year", "bits/dim", "±", "Dequantization", "Parameters", "Training FLOPs", "Seconds", "logdet/cap",
                "Images", "Source", "Note")
WIDE = {"Model": 2.6, "Source": 2.8, "Note": 2.6}  # columns of running text in LaTeX, cm
END = r" \tabularnewline"  # \raggedright takes the other one away
NOTHING, OURS, SATURATED = "–", "ours: ", 0.9
UNKNOWN = "the paper's values are not known here (results/reported.csv has none)"


# ---- rows of cells to Markdown and LaTeX

@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A table, or one section of it: cells are text, as many in each row as in the header."""
    header: tuple
    rows: list
    title: str = ""
    note: str = ""


def markdown(caption, parts):
    """The parts below their caption, as GitHub shows them."""
    def line(cells):
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    lines = [caption, ""]
    for part in parts:
        lines += [f"**{part.title}**" + f" {part.note}".rstrip(), ""] if part.title else []
        rows = [[f"**{first}**" if first.startswith(OURS) else first, *rest] for first, *rest in part.rows]
        lines += [line(part.header), line(["---"] * len(part.header)), *map(line, rows), ""]
    return "\n".join(lines)


TEX = {**{c: f"\\{c}" for c in "&%#${}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
       "±": r"$\pm$", "–": "--", "†": r"\textdagger{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}", "[": "{[}",
       "/": r"/\allowbreak{}", "@": r"@\allowbreak{}", "_": r"\_\allowbreak{}"}  # [ after \\ would be its option; addresses are long


def tex(text):
    return "".join(TEX.get(c, c) for c in text)


def latex(caption, parts):
    """The parts as table environments, the first with the caption; a document needs \\usepackage{booktabs}."""
    lines = []
    for i, part in enumerate(parts):
        def line(cells):
            texts = [rf"\textbf{{{tex(cell)}}}" if cell.startswith(OURS) else tex(cell) for cell in cells]
            return " & ".join(rf"\raggedright {text}" if name in WIDE else text for name, text in zip(part.header, texts)) + END
        kinds = "".join(f"p{{{WIDE[name]}cm}}" if name in WIDE else "l" for name in part.header)
        size = "tiny" if "Source" in part.header else "small"
        lines += [r"\begin{table}[htbp]", rf"\centering\{size}\setlength{{\tabcolsep}}{{2pt}}"]
        lines += [rf"\caption{{{tex(caption)}}}"] if not i else []
        lines += [rf"\textbf{{{tex(part.title)}}} {tex(part.note)}".rstrip() + r"\\[2pt]"] if part.title else []
        lines += [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", line(part.header), r"\midrule", *map(line, part.rows),
                  r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*lines, ""])


def write(name, caption, parts, out_dir):
    """name.md and name.tex in out_dir; returns the two paths."""
    return style.write_files({f"{name}.md": markdown(caption, parts).encode(), f"{name}.tex": latex(caption, parts).encode()},
                             out_dir)


# ---- what was measured

def summary(runs):
    """The cells of one grid point: its test rows, one for each seed."""
    n, caps, first = len(runs), runs["logdet_cap_share"], runs.iloc[0]
    spread = f"{runs['bits_per_dim'].std():.4f} sd of {n} seeds" if n > 1 else f"{first['bits_per_dim_se']:.4f} s.e."
    seconds, others = runs["train_seconds"].mean(), f" and {n - 1} more" if n > 1 else ""
    commits = dict.fromkeys(
        ("not recorded" if pd.isna(commit) else str(commit)[:7]) + (" with changes" if str(dirty) == "True" else "")
        for commit, dirty in zip(runs["git_commit"], runs["git_dirty"]))
    return {"bits/dim": f"{runs['bits_per_dim'].mean():.4f}", "±": spread, "Parameters": millions(first["num_params"]),
            "Training FLOPs": power(runs["train_flops"].mean()),
            "Seconds": "not recorded" if math.isnan(seconds) else f"{seconds:,.1f}",
            "logdet/cap": "no cap" if caps.isna().any() else f"{caps.max():.1%}", "Images": f"{first['num_images']:,}",
            "Source": f"{first['run_id']}{others}, commit {', '.join(commits)}",
            "Note": "saturated: the number says little" if caps.max() >= SATURATED else NOTHING}


def millions(count):
    return f"{count / 1e6:,.3f} M"


def power(flops):
    return f"{flops:.3g}".replace("e+", "e")


def setting(rows):
    """The part of a caption that is the same for all tables of ours."""
    seeds = sorted(rows["seed"].unique())
    text = (f"{len(seeds)} seeds ({', '.join(map(str, seeds))}): mean ± standard deviation over seeds" if len(seeds) > 1 else
            f"one seed ({seeds[0]}): ± standard error over images")
    text += (". bits/dim of the test split, lower is better: an upper bound (ELBO by uniform dequantization), one draw an "
             "image. logdet/cap: mean log-det over the most that the couplings can reach, the largest of the seeds.")
    if rows["logdet_cap_share"].isna().any():
        text += " no cap: ActNorm and dense layers add to the log-det."
    if rows["scale"].iloc[0] == "smoke":
        text += " Smoke runs: they show that everything works and are no evidence of anything else."
    return text


# ---- Tables 2a and 2b, and Figure 4 as a table

def by_run(rows, swept, grid):
    """[(test rows over the seeds, the grid points that they stand for)], in the order of the grid."""
    runs, groups = {}, dict(list(rows.sort_values("seed").groupby([*swept])))
    for point in grid:
        mine = groups[point]
        runs.setdefault(tuple(mine["run_id"]), (mine, []))[1].append(point)
    return list(runs.values())


def draw_grid(path, out_dir, name, experiment, swept, grid, what, paper, names, corner):
    """Write a table of two swept fields: bits/dim in a grid, then what each run took.

    paper: what the paper compares. names: of swept values, where not as they are. corner: the first column's.
    """
    rows = final_test_rows(path, experiment, swept, grid, what.split(":")[0])
    first = rows.iloc[0]
    runs = by_run(rows, swept, grid[first["scale"]])
    cells, costs, shared = {}, [], []
    cost_columns = ("Parameters", "Training FLOPs", "Seconds", "logdet/cap", "Source", "Note")
    for mine, points in runs:
        cell = summary(mine)
        labels = [" = ".join(dict.fromkeys(names.get(value, value) for value in values)) for values in zip(*points)]
        text = f"{cell['bits/dim']} ± {cell['±'].split()[0]}{', saturated' if cell['Note'] != NOTHING else ''}"
        cells |= dict.fromkeys(points, text + (" †" if len(points) > 1 else ""))
        shared += ["; ".join(labels)] if len(points) > 1 else []
        costs.append((", ".join(labels), *(cell[column] for column in cost_columns)))

    def label(value):
        shares = sorted(rows.loc[rows[swept[0]] == value, "channel_share"].unique())
        share = f" (channel share {', '.join(f'{share:.3f}' for share in shares)})" if "ratio" in swept[0] else ""
        return names.get(value, value) + share
    down, across = (tuple(dict.fromkeys(values)) for values in zip(*grid[first["scale"]]))
    table = [(label(value), *(cells[value, column] for column in across), "not known") for value in down]
    note = f"†: one run for all, since their couplings are the same: {' / '.join(shared)}." if shared else ""
    title = style.dataset_title(first["dataset"])
    caption = (f"{what}, {first['scale']} scale. {title}, variant {first['variant']}, {first['num_images']:,} test images; "
               f"{setting(rows)} {paper}; {UNKNOWN}.")
    return write(f"{name}_{first['scale']}", caption, [
        Part(header=(corner, *(names.get(column, column) for column in across), "the paper's"), rows=table,
             title="bits/dim.", note=note),
        Part(header=("Run", *cost_columns), rows=costs, title="What each run took.")], out_dir)


RATIO_NAMES = {"channel-only": "channel couplings alone", "spatial-only": "spatial couplings alone", "4:1": "4:1 (official)"}


def draw_splits(path, out_dir=style.OUT):
    """Table 2a from a CSV; returns the paths of the Markdown and the LaTeX file."""
    return draw_grid(path, out_dir, "table2a", "ablate_splits", SPLITS_SWEPT, SPLITS_GRID, "Table 2a: pairing or masking",
                     "The paper compares the two for channel and for spatial couplings; masking, and whole models of one mode, "
                     "are our reading", RATIO_NAMES, "couplings")


def draw_layers(path, out_dir=style.OUT):
    """Table 2b from a CSV; returns the paths of the Markdown and the LaTeX file."""
    names = {"no-actnorm": "no ActNorm", "actnorm": "ActNorm", "no-dense": "no dense layers", "dense": "dense layers"}
    return draw_grid(path, out_dir, "table2b", "ablate_layers", LAYERS_SWEPT, LAYERS_GRID,
                     "Table 2b: ActNorm and invertible dense layers", "The paper compares the four and leaves both layers off; "
                     "ours are Glow's", names, "before each coupling")


def draw_figure4(path, out_dir=style.OUT):
    """Figure 4's numbers from a CSV; returns the paths of the Markdown and the LaTeX file."""
    return draw_grid(path, out_dir, "table_figure4", "ablate_coupling", figure4.SWEPT, figure4.GRID,
                     "Figure 4 as a table: channel to spatial couplings, kinds of spatial split",
                     "The paper compares them on ImageNet-1k 64x64", RATIO_NAMES, "channel : spatial")


# ---- the main table

def read_reported(path):
    """The published numbers as dicts of text, in the order of the file. Raises ResultsError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = reader.fieldnames, list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise ResultsError(f"{path}: not readable ({' '.join(str(error).split())})") from None
    if names != REPORTED_COLUMNS:
        raise ResultsError(f"{path}: has not the columns {', '.join(REPORTED_COLUMNS)}")
    if not rows:
        raise ResultsError(f"{path}: has no rows")
    seen = set()
    for i, row in enumerate(rows, 1):
        where = f"{path}: row {i} ({row['model']})"
        if None in row or None in row.values():
            raise ResultsError(f"{where}: has not {len(REPORTED_COLUMNS)} fields")
        for name, known in KNOWN.items():
            if row[name] not in known:
                raise ResultsError(f"{where}: {name} {row[name] or 'empty'} is none of {', '.join(known)}")
        if not re.fullmatch(r"\d+(\.\d+)?", row["bits_per_dim"]):
            raise ResultsError(f"{where}: bits_per_dim {row['bits_per_dim'] or 'empty'} is no number like 3.72")
        if row["year"] and not re.fullmatch(r"\d{4}", row["year"]):
            raise ResultsError(f"{where}: year {row['year']} is no year")
        if (row["dataset"] == "cifar10") != (row["variant"] == "cifar10"):
            raise ResultsError(f"{where}: {row['dataset']} has no variant {row['variant']}")
        if any("\n" in text or "\r" in text for text in row.values()) or row["model"].startswith(OURS):
            raise ResultsError(f"{where}: a published row is one line, and its model is not ours")
        if empty := [name for name in ("model", "year", "source") if not row[name].strip()]:
            raise ResultsError(f"{where}: has no {empty[0]}")
        key = tuple(row[name] for name in ("model", "dataset", "variant", "bound"))
        if key in seen:
            raise ResultsError(f"{where}: {' '.join(key[1:])} is there twice")
        seen.add(key)
    return rows


def is_number(text):
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def line_of(**cells):
    """A row of the main table, from the cells that there are."""
    cells = {name.capitalize() if name in REPORTED_COLUMNS else name: text for name, text in cells.items()}
    return tuple(cells.get(column) or NOTHING for column in MAIN_COLUMNS)


def size_name(size):
    couplings, depth = size.split("x")
    return f"Jet {couplings} couplings x depth {depth}"


def our_lines(rows):
    """[((dataset, variant), row)] of a CSV's runs, and of the paper's targets that it has not."""
    scale, lines = rows["scale"].iloc[0], []
    runs = [(mine, point) for mine, points in by_run(rows, MAIN_SWEPT, MAIN_GRID[scale]) for point in points]
    for mine, (size, training, name) in runs:
        cells, variant = summary(mine), mine["variant"].iloc[0]
        notes = [cells["Note"]] if cells["Note"] != NOTHING else []
        before = rows[rows["run_id"].str.rsplit("_", n=1).str[-1].isin(mine["init"].dropna())]
        if len(before):
            notes.append(f"begins with {before.iloc[0]['size']} {before.iloc[0]['training']} on {before.iloc[0]['dataset']}: "
                         f"{power(before['train_flops'].mean())} training FLOPs more")
        elif mine["init"].notna().any():
            notes.append(f"begins with the weights of {mine['init'].iloc[0]}")
        cells |= {"Note": "; ".join(notes), "dequantization": "uniform",
                  "model": f"{OURS}{size_name(size)}, {TRAININGS[training]} ({scale} scale)"}
        lines.append(((name.removesuffix(f"-{variant}"), variant), line_of(**cells)))
    for (size, training, name), (flops, hours) in PAPER_COST.items():
        if (size, training, name) not in MAIN_GRID[scale]:
            note = f"paper scale: {flops} training FLOPs, {hours} GPU-hours of an H100, both computed"
            cells = {"bits/dim": "not run here", "Training FLOPs": flops, "dequantization": "uniform", "note": note,
                     "model": f"{OURS}{size_name(size)}, {TRAININGS[training]}"}
            lines.append((tuple(name.split("-")), line_of(**cells)))
    return lines


def read_shipped(folder):
    """(done.json of the model that is part of this repository, its log-det's cap, nan where it has none), or None.

    Raises ResultsError if it is damaged.
    """
    path = Path(folder) / "done.json"
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text())
        model, (last, test) = done["config"]["model"], done["rows"][-2:]
        height, width = model["image_size"] if isinstance(model["image_size"], list) else [model["image_size"]] * 2
        cap = model["num_couplings"] * height * width * model["channels"] / 2 * math.log(model["scale_factor"])
        if not all(math.isfinite(row[name]) for row in done["rows"] for name in ("step", "bits_per_dim", "bits_per_dim_se",
                                                                                 "logdet_nats")):
            raise ValueError("no finite bits/dim")
        if (last["split"], test["split"]) != ("train", "test") or last["step"] != test["step"] or cap <= 0:
            raise ValueError("its rows are not of training and test images")
        for name, kind in {"num_params": int, "train_seconds": float, "threads": int, "hardware": str, "git_commit": str,
                           "dataset": str, "variant": str, "num_images": int}.items():
            if not isinstance(done[name], kind):
                raise ValueError(f"{name} is {done[name]!r}")
        for name in ("total_steps", "batch_size", "seed"):
            int(done["config"][name])
        int(model["block_depth"]), int(model["emb_dim"])
        return done, math.nan if model["actnorm"] or model["invertible_dense"] else cap  # these add to the log-det
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise ResultsError(f"{path}: damaged ({type(error).__name__}: {' '.join(str(error).split())})") from None


def shipped_lines():
    """The same for the model that is part of this repository, if there is one. Raises ResultsError if it is damaged."""
    if (shipped := read_shipped(SHIPPED)) is None:
        return []
    done, cap = shipped
    config, test = done["config"], done["rows"][-1]
    model = config["model"]
    runs = pd.DataFrame([{**done, **test, "run_id": SHIPPED.name, "train_flops": math.nan,
                          "logdet_cap_share": test["logdet_nats"] / cap}])
    cells, note = summary(runs), f"{config['total_steps']:,} steps of {config['batch_size']}, seed {config['seed']}"
    cells |= {"Training FLOPs": "not in done.json", "dequantization": "uniform",
              "Note": note if cells["Note"] == NOTHING else f"{cells['Note']}; {note}",
              "model": f"{OURS}Jet small, {model['num_couplings']} couplings x depth {model['block_depth']}, "
                       f"width {model['emb_dim']} (assets/{SHIPPED.name})"}
    return [((done["dataset"].removesuffix(f"-{done['variant']}"), done["variant"]), line_of(**cells))]


def main_parts(ours, reported):
    """The sections: one for each (dataset, variant, bound) by bits/dim, and last what can be compared with nothing."""
    groups, unknown = {}, []
    for row in reported:
        cells = line_of(**row, **{"bits/dim": row["bits_per_dim"]})
        if row["variant"] == "unknown":
            unknown.append((f"{row['model']}, on {DATASETS[row['dataset']]} ({row['bound']})", *cells[1:]))
        else:
            groups.setdefault((row["dataset"], row["variant"], row["bound"]), []).append(cells)
    published = set(groups)
    for (dataset, variant), cells in ours:
        groups.setdefault((dataset, variant, "elbo"), []).append(cells)

    def place(group):
        return [(known.index(value) if value in known else len(known), value) for value, known in
                zip(group, (KNOWN["dataset"], KNOWN["variant"], KNOWN["bound"]))]
    parts = []
    for dataset, variant, bound in sorted(groups, key=place):
        rows = sorted(groups[dataset, variant, bound], key=lambda cells: float(cells[2]) if is_number(cells[2]) else math.inf)
        mark = " (unconfirmed variant)" if variant == "oord?" else ""
        note = ("No published number is comparable." if (dataset, variant, bound) not in published else
                "No run of ours." if bound == "elbo" and not any(row[0].startswith(OURS) for row in rows) else "")
        names = dict.fromkeys((DATASETS.get(dataset, dataset), variant + mark, bound))  # a set of ours is its own variant
        parts.append(compact(" / ".join(names), rows, note))
    return [*parts, compact("Variant unknown: never compared", sorted(unknown), "In alphabetical order.")] if unknown else parts


def compact(title, rows, note):
    """A section without the columns in which no row has anything."""
    kept = [i for i, column in enumerate(zip(*rows)) if set(column) != {NOTHING}]
    return Part(header=tuple(MAIN_COLUMNS[i] for i in kept), rows=[tuple(row[i] for i in kept) for row in rows],
                title=title, note=note)


def draw_main(path, out_dir=style.OUT):
    """The main table from a CSV; returns the paths of the Markdown and the LaTeX file."""
    rows = final_test_rows(path, "main_results", MAIN_SWEPT, MAIN_GRID, "the main table", MAIN_VARYING)
    scale = rows["scale"].iloc[0]
    caption = (
        f"Main table, our runs of {scale} scale beside published numbers. A section is one image set, variant and kind of "
        "bound, by bits/dim; numbers of two sections are never comparable, and within one the dequantization matters. Ours: "
        f"{setting(rows)} {NOTHING}: nothing to say, not run, or not in results/reported.csv, where the published digits come "
        "from. Training FLOPs of ours are of the run alone; GPU-hours are computed for 40 % of an H100's bfloat16 peak.")
    parts = main_parts([*our_lines(rows), *shipped_lines()], read_reported(REPORTED))
    return write(f"main_table_{scale}", caption, parts, out_dir)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"ablate_coupling": draw_figure4, "ablate_splits": draw_splits,
                                   "ablate_layers": draw_layers, "main_results": draw_main})
