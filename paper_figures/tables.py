"""The tables of the paper, as Markdown and LaTeX: ours, and beside them what was published.

    python paper_figures/tables.py --scale small
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.flops import logdet_cap_nats
from jet import JetConfig
from paper_figures import style
from paper_figures.reported import COLUMNS, DATASETS, KNOWN, REPORTED, read_reported
from paper_figures.results_csv import ResultsError, final_test_rows
from paper_figures.table_files import OURS, Part, write

MAIN_SWEPT = ("size", "training", "dataset")
MAIN_VARYING = ("num_couplings", "block_depth", "emb_dim", "total_steps", "lr", "init")
# How swept values are written, and in which order they come.
RATIOS = {"channel-only": "channel couplings alone", "spatial-only": "spatial couplings alone",
          "4:1": "4:1 (official)"}
BY_SHARE = {name: RATIOS.get(name, name)
            for name in ("channel-only", "8:1", "4:1", "2:1", "1:1", "spatial-only")}
TRAININGS = {"pretrained": "pretrained", "scratch": "from scratch",
             "fine-tuned": "pretrained, fine-tuned", "not-fine-tuned": "pretrained, not fine-tuned"}
MAIN_ORDER = {"training": TRAININGS, "dataset": style.DATASET_TITLES}
# The paper's own targets, from scratch: training FLOPs and GPU-hours of experiments/cost_table.py.
PAPER_COST = {("32x2", "scratch", "imagenet64-oord"): ("8.63e19", 61),
              ("64x5", "scratch", "imagenet64-oord"): ("4.3e20", 302)}

SHIPPED = style.ROOT / "assets/jet_cifar10"
MAIN_COLUMNS = ("Model", "Year", "bits/dim", "±", "Dequantization", "Parameters", "Training FLOPs",
                "Seconds", "logdet/cap", "Images", "Source", "Note")
NOTHING, SATURATED = "–", 0.9
UNKNOWN = "the paper's values are not known here (results/reported.csv has none)"


# ---- what was measured

def summary(runs):
    """The cells of one grid point: its test rows, one for each seed."""
    n, caps, first = len(runs), runs["logdet_cap_share"], runs.iloc[0]
    seconds, source, spread = runs["train_seconds"].mean(), first["run_id"], "s.e."
    deviation = first["bits_per_dim_se"]
    if n > 1:
        deviation, spread = runs["bits_per_dim"].std(), f"sd of {n} seeds"
        source += f" and {n - 1} more"
    commits = dict.fromkeys(map(commit_of, runs["git_commit"], runs["git_dirty"]))
    return {"bits/dim": f"{runs['bits_per_dim'].mean():.4f}", "±": f"{deviation:.4f} {spread}",
            "Parameters": millions(first["num_params"]),
            "Training FLOPs": power(runs["train_flops"].mean()),
            "Seconds": "not recorded" if math.isnan(seconds) else f"{seconds:,.1f}",
            "logdet/cap": "no cap" if caps.isna().any() else f"{caps.max():.1%}",
            "Images": f"{first['num_images']:,}",
            "Source": f"{source}, commit {', '.join(commits)}",
            "Note": "saturated: the number says little" if caps.max() >= SATURATED else NOTHING}


def commit_of(commit, dirty):
    text = "not recorded" if pd.isna(commit) else commit[:7]
    return f"{text} with changes" if str(dirty) == "True" else text


def millions(count):
    return f"{count / 1e6:,.3f} M"


def power(flops):
    return f"{flops:.3g}".replace("e+", "e")


def setting(rows):
    """The part of a caption that is the same for all tables of ours."""
    seeds = sorted(rows["seed"].unique())
    text = f"one seed ({seeds[0]}): ± standard error over images"
    if len(seeds) > 1:
        numbers = ", ".join(map(str, seeds))
        text = f"{len(seeds)} seeds ({numbers}): mean ± standard deviation over seeds"
    text += (". bits/dim of the test split, lower is better: an upper bound (ELBO by uniform "
             "dequantization), one draw an image. logdet/cap: mean log-det over the most that the "
             "couplings can reach, the largest of the seeds.")
    if rows["logdet_cap_share"].isna().any():
        text += " no cap: ActNorm and dense layers add to the log-det."
    if rows["scale"].iloc[0] == "smoke":
        text += (" Smoke runs: they show that everything works and are no evidence of anything "
                 "else.")
    return text


def by_run(rows, swept, order):
    """[(test rows over the seeds, the grid points that they stand for)], ordered by the points.

    order: {field: values in order}, as style.points takes it.
    """
    runs, groups = {}, dict(list(rows.sort_values("seed").groupby([*swept])))
    for point in style.points(rows, swept, order):
        of_point = groups[point]
        runs.setdefault(tuple(of_point["run_id"]), (of_point, []))[1].append(point)
    return list(runs.values())


# ---- Tables 2a and 2b, and Figure 4 as a table

@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of two swept fields: bits/dim, then what each run took."""
    name: str  # of the files, without scale and ending
    experiment: str
    title: str
    compared: str  # what the paper compares
    corner: str  # the head of the first column
    names: dict  # {swept field: {value: how it is written}}, in order: downwards, across

    @property
    def swept(self):
        return tuple(self.names)

    def text(self, field, value):
        return self.names[field].get(value, value)

    def draw(self, path, out_dir=style.OUT):
        """Write the table of a CSV; returns the paths of the Markdown and the LaTeX file."""
        rows = final_test_rows(path, self.experiment, self.swept, self.title.split(":")[0])
        first, runs = rows.iloc[0], by_run(rows, self.swept, self.names)
        title = style.dataset_title(first["dataset"])
        caption = (
            f"{self.title}, {first['scale']} scale. {title}, variant {first['variant']}, "
            f"{first['num_images']:,} test images; {setting(rows)} {self.compared}; {UNKNOWN}.")
        return write(f"{self.name}_{first['scale']}", caption,
                     [self.bits(rows, runs), self.costs(runs)], out_dir)

    def labels(self, points):
        """The values of each field at the points of one run."""
        return [" = ".join(dict.fromkeys(self.text(field, value) for value in values))
                for field, values in zip(self.swept, zip(*points))]

    def bits(self, rows, runs):
        """bits/dim in a grid."""
        cells = {}
        for of_run, points in runs:
            cell = summary(of_run)
            text = f"{cell['bits/dim']} ± {cell['±'].split()[0]}"
            text += ", saturated" if cell["Note"] != NOTHING else ""
            text += " †" if len(points) > 1 else ""
            cells |= dict.fromkeys(points, text)
        down, across = self.swept
        columns = style.ordered(rows[across], self.names[across])
        table = []
        for value in style.ordered(rows[down], self.names[down]):
            head = self.text(down, value)
            if down == "coupling_ratio":
                shares = sorted(rows.loc[rows[down] == value, "channel_share"].unique())
                head += f" (channel share {', '.join(f'{share:.3f}' for share in shares)})"
            found = [cells.get((value, column), NOTHING) for column in columns]
            table.append((head, *found, "not known"))
        shared = ["; ".join(self.labels(points)) for _, points in runs if len(points) > 1]
        note = ""
        if shared:
            note = f"†: one run for all, since their couplings are the same: {' / '.join(shared)}."
        names = [self.text(across, column) for column in columns]
        return Part(header=(self.corner, *names, "the paper's"), rows=table, title="bits/dim.",
                    note=note)

    def costs(self, runs):
        """What each run took."""
        columns = ("Parameters", "Training FLOPs", "Seconds", "logdet/cap", "Source", "Note")
        rows = []
        for of_run, points in runs:
            cell = summary(of_run)
            rows.append((", ".join(self.labels(points)), *(cell[column] for column in columns)))
        return Part(header=("Run", *columns), rows=rows, title="What each run took.")


SPLITS = Grid(
    name="table2a", experiment="ablate_splits", corner="couplings",
    title="Table 2a: pairing or masking",
    compared="The paper compares the two for channel and for spatial couplings; masking, and whole "
             "models of one mode, are our reading",
    names={"coupling_ratio": RATIOS, "split_mode": {"pairing": "pairing", "masking": "masking"}})
LAYERS = Grid(
    name="table2b", experiment="ablate_layers", corner="before each coupling",
    title="Table 2b: ActNorm and invertible dense layers",
    compared="The paper compares the four and leaves both layers off; ours are Glow's",
    names={"actnorm": {"False": "no ActNorm", "True": "ActNorm"},
           "invertible_dense": {"False": "no dense layers", "True": "dense layers"}})
FIGURE_4 = Grid(
    name="table_figure4", experiment="ablate_coupling", corner="channel : spatial",
    title="Figure 4 as a table: channel to spatial couplings, kinds of spatial split",
    compared="The paper compares them on ImageNet-1k 64x64",
    names={"coupling_ratio": BY_SHARE,
           "spatial_split": {name: name for name in style.SPLIT_STYLES}})
draw_splits, draw_layers, draw_figure4 = SPLITS.draw, LAYERS.draw, FIGURE_4.draw


# ---- the main table

def line_of(**cells):
    """A row of the main table, from the cells that there are."""
    cells = {name.capitalize() if name in COLUMNS else name: text for name, text in cells.items()}
    return tuple(cells.get(column) or NOTHING for column in MAIN_COLUMNS)


def size_name(size):
    couplings, depth = size.split("x")
    return f"Jet {couplings} couplings x depth {depth}"


def our_lines(rows):
    """[((dataset, variant), row)] of a CSV's runs, and of the paper's targets that it has not."""
    scale, lines, found = rows["scale"].iloc[0], [], set()
    for of_run, points in by_run(rows, MAIN_SWEPT, MAIN_ORDER):
        cells, variant = summary(of_run), of_run["variant"].iloc[0]
        notes = [note for note in (cells["Note"], beginning(of_run, rows)) if note != NOTHING]
        cells |= {"Note": "; ".join(notes), "dequantization": "uniform"}
        for size, training, name in points:
            found.add((size, training, name))
            how = TRAININGS.get(training, training)
            cells["model"] = f"{OURS}{size_name(size)}, {how} ({scale} scale)"
            lines.append(((name.removesuffix(f"-{variant}"), variant), line_of(**cells)))
    for (size, training, name), (flops, hours) in PAPER_COST.items():
        if (size, training, name) not in found:
            note = (f"paper scale: {flops} training FLOPs, {hours} GPU-hours of an H100, both "
                    "computed")
            cells = {"bits/dim": "not run here", "Training FLOPs": flops, "note": note,
                     "dequantization": "uniform",
                     "model": f"{OURS}{size_name(size)}, {TRAININGS[training]}"}
            lines.append((tuple(name.split("-")), line_of(**cells)))
    return lines


def beginning(runs, rows):
    """Which weights the runs of a grid point begin with, among the rows where they are there."""
    before = rows[rows["run_id"].str.rsplit("_", n=1).str[-1].isin(runs["init"].dropna())]
    if len(before):
        first = before.iloc[0]
        return (f"begins with {first['size']} {first['training']} on {first['dataset']}: "
                f"{power(before['train_flops'].mean())} training FLOPs more")
    if runs["init"].notna().any():
        return f"begins with the weights of {runs['init'].iloc[0]}"
    return NOTHING


def read_shipped(folder):
    """What is known of the model that is part of this repository, or None where there is none.

    Returns done.json's content, the JetConfig and the share of the cap that its log-det reaches,
    nan where it has none. Raises ResultsError if it is damaged.
    """
    path = Path(folder) / "done.json"
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text())
        model, (last, test) = JetConfig(**done["config"]["model"]), done["rows"][-2:]
        for name in ("step", "bits_per_dim", "bits_per_dim_se", "logdet_nats"):
            if not all(math.isfinite(row[name]) for row in done["rows"]):
                raise ValueError("no finite bits/dim")
        if (last["split"], test["split"]) != ("train", "test") or last["step"] != test["step"]:
            raise ValueError("its rows are not of training and test images")
        for name, kind in {"num_params": int, "train_seconds": float, "threads": int,
                           "hardware": str, "git_commit": str, "dataset": str, "variant": str,
                           "num_images": int}.items():
            if not isinstance(done[name], kind):
                raise ValueError(f"{name} is {done[name]!r}")
        for name in ("total_steps", "batch_size", "seed"):
            int(done["config"][name])
        share = test["logdet_nats"] / logdet_cap_nats(model)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError,
            ZeroDivisionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ResultsError(f"{path}: damaged ({reason})") from None
    if model.actnorm or model.invertible_dense:  # these add to the log-det
        share = math.nan
    return done, model, share


def shipped_lines():
    """As our_lines() for the model that is part of this repository, if there is one.

    Raises ResultsError if it is damaged.
    """
    if (shipped := read_shipped(SHIPPED)) is None:
        return []
    done, model, share = shipped
    config, test = done["config"], done["rows"][-1]
    cells = summary(pd.DataFrame([{**done, **test, "run_id": SHIPPED.name, "train_flops": math.nan,
                                   "logdet_cap_share": share}]))
    note = f"{config['total_steps']:,} steps of {config['batch_size']}, seed {config['seed']}"
    cells |= {"Training FLOPs": "not in done.json", "dequantization": "uniform",
              "Note": note if cells["Note"] == NOTHING else f"{cells['Note']}; {note}",
              "model": f"{OURS}Jet small, {model.num_couplings} couplings x depth "
                       f"{model.block_depth}, width {model.emb_dim} (assets/{SHIPPED.name})"}
    variant = done["variant"]
    return [((done["dataset"].removesuffix(f"-{variant}"), variant), line_of(**cells))]


def main_parts(ours, reported):
    """The sections: one for each (dataset, variant, bound) by bits/dim, and last what can be
    compared with nothing.
    """
    groups, unknown = {}, []
    for row in reported:
        cells = line_of(**row, **{"bits/dim": row["bits_per_dim"]})
        if row["variant"] == "unknown":
            model = f"{row['model']}, on {DATASETS[row['dataset']]} ({row['bound']})"
            unknown.append((model, *cells[1:]))
        else:
            groups.setdefault((row["dataset"], row["variant"], row["bound"]), []).append(cells)
    published = set(groups)
    for (dataset, variant), cells in ours:
        groups.setdefault((dataset, variant, "elbo"), []).append(cells)

    def place(group):
        known = (KNOWN["dataset"], KNOWN["variant"], KNOWN["bound"])
        return [(values.index(value) if value in values else len(values), value)
                for value, values in zip(group, known)]
    parts = []
    for group in sorted(groups, key=place):
        dataset, variant, bound = group
        note = ""
        if group not in published:
            note = "No published number is comparable."
        elif bound == "elbo" and not any(row[0].startswith(OURS) for row in groups[group]):
            note = "No run of ours."
        if variant == "oord?":
            variant += " (unconfirmed variant)"
        # A set of ours is its own variant.
        names = dict.fromkeys((DATASETS.get(dataset, dataset), variant, bound))
        parts.append(compact(" / ".join(names), sorted(groups[group], key=bits_per_dim), note))
    if unknown:
        title = "Variant unknown: never compared"
        parts.append(compact(title, sorted(unknown), "In alphabetical order."))
    return parts


def bits_per_dim(cells):
    """Of a row of the main table; infinity where it was not run."""
    try:
        return float(cells[MAIN_COLUMNS.index("bits/dim")])
    except ValueError:
        return math.inf


def compact(title, rows, note):
    """A section without the columns in which no row has anything."""
    kept = [i for i, column in enumerate(zip(*rows)) if set(column) != {NOTHING}]
    return Part(header=tuple(MAIN_COLUMNS[i] for i in kept), title=title, note=note,
                rows=[tuple(row[i] for i in kept) for row in rows])


def draw_main(path, out_dir=style.OUT):
    """The main table from a CSV; returns the paths of the Markdown and the LaTeX file."""
    rows = final_test_rows(path, "main_results", MAIN_SWEPT, "the main table", MAIN_VARYING)
    scale = rows["scale"].iloc[0]
    caption = (
        f"Main table, our runs of {scale} scale beside published numbers. A section is one image "
        "set, variant and kind of bound, by bits/dim; numbers of two sections are never "
        "comparable, and within one the dequantization matters. Ours: "
        f"{setting(rows)} {NOTHING}: nothing to say, not run, or not in results/reported.csv, "
        "where the published digits come from. Training FLOPs of ours are of the run alone; "
        "GPU-hours are computed for 40 % of an H100's bfloat16 peak.")
    parts = main_parts([*our_lines(rows), *shipped_lines()], read_reported(REPORTED))
    return write(f"main_table_{scale}", caption, parts, out_dir)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"ablate_coupling": draw_figure4, "ablate_splits": draw_splits,
                                   "ablate_layers": draw_layers, "main_results": draw_main})
