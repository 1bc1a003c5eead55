"""The tables of the paper, as Markdown and LaTeX: ours, and beside them what was published.

    python paper_figures/tables.py --scale small
"""
import dataclasses
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

from data import SETS
from harness.files import read_json
from harness.flops import forward_flops, logdet_cap_share
from paper_figures import style
from paper_figures.paper import paper_values
from paper_figures.inference import COLUMNS, Contrast, cells, compare
from paper_figures.per_image import read_per_image
from paper_figures.regime import drawn_from, is_run, say_not_run
from paper_figures.reported import DATASETS, KNOWN, REPORTED, read_reported
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
H100_RATE = 0.4 * 989e12  # FLOP/s: 40 % of its bfloat16 peak, assumed as in sweeps/plan.py
SHIPPED = style.ROOT / "assets/jet_cifar10"
MAIN_COLUMNS = ("Model", "Year", "bits/dim", "±", "The paper's", "Dequantization", "IW", "Augm.",
                "Cond.", "Parameters", "Training FLOPs", "Seconds", "logdet/cap", "Images",
                "Source", "Note")
SHORT = {"bits_per_dim": "bits/dim", "iw_samples": "IW", "augmentation": "Augm.",
         "conditional": "Cond."}  # heads of reported.csv's columns
OUR_SETTING = {"Dequantization": "uniform", "Augm.": "no", "Cond.": "no"}
NOTHING, SATURATED = "–", 0.9


def size_of(size):
    """(couplings, depth) of a size, "32x2"."""
    if not re.fullmatch("[0-9]{1,9}x[0-9]{1,9}", size):
        raise ResultsError(f"size {size}: must be couplings x depth, like 32x2")
    return tuple(map(int, size.split("x")))


def paper_flops(size, epochs=200):
    """Training FLOPs of one of the paper's own targets, from scratch on ImageNet-1k 64 x 64."""
    couplings, depth = size_of(size)
    from jet import JetConfig
    model = JetConfig(num_couplings=couplings, block_depth=depth)
    return 3 * forward_flops(model) * epochs * SETS["imagenet64-oord"].counts["train"]


def paper_costs():
    """{point of the main table: (training FLOPs, GPU-hours)} of the paper's own targets."""
    flops = {size: paper_flops(size) for size in ("32x2", "64x5")}
    return {(size, "scratch", "imagenet64-oord"): (value, round(value / H100_RATE / 3600))
            for size, value in flops.items()}


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
            "Parameters": f"{first['num_params'] / 1e6:,.3f} M",
            "Training FLOPs": power(runs["train_flops"].mean()),
            "Seconds": "not recorded" if math.isnan(seconds) else f"{seconds:,.1f}",
            "logdet/cap": "no cap" if caps.isna().any() else f"{caps.max():.1%}",
            "Images": f"{first['num_images']:,}",
            "Source": f"{source}, commit {', '.join(commits)}",
            "Note": "saturated: the number says little" if caps.max() >= SATURATED else NOTHING}


def commit_of(commit, dirty):
    text = commit[:7] if isinstance(commit, str) else "not recorded"
    return f"{text} with changes" if str(dirty) == "True" else text


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
    names: dict  # {swept field: {value: how it is written, if not so}}, in order: down, across
    contrasts: object = None  # function(rows) -> what is compared

    @property
    def swept(self):
        return tuple(self.names)

    def draw(self, path, out_dir=style.OUT):
        """Write the table of a CSV; returns the paths of the Markdown and the LaTeX file."""
        rows = final_test_rows(path, self.experiment, self.swept, self.title.split(":")[0])
        first, runs = rows.iloc[0], by_run(rows, self.swept, self.names)
        title = style.dataset_title(first["dataset"])
        caption = (
            f"{self.title}, {first['scale']} scale. {title}, variant {first['variant']}, "
            f"{first['num_images']:,} test images; {setting(rows)} {self.compared}; its values, as "
            "far as they are known here: results/paper.csv.")
        parts = [self.bits(rows, runs), self.costs(runs), *self.differences(path, rows)]
        return write(f"{self.name}_{first['scale']}", caption, parts, out_dir)

    def differences(self, path, rows):
        """What the page compares, where there are values per image or several seeds."""
        found = compare(rows, self.swept, read_per_image(path, rows), self.contrasts(rows)) \
            if self.contrasts else []
        lines = [tuple(cell or NOTHING for cell in cells(one)) for one in found]
        return [Part(header=COLUMNS, rows=lines,
                     title="Differences, paired over images.")] if found else []

    def labels(self, points):
        """The values of each field at the points of one run."""
        return [" = ".join(dict.fromkeys(names.get(value) or value for value in values))
                for names, values in zip(self.names.values(), zip(*points))]

    def bits(self, rows, runs):
        """bits/dim in a grid."""
        cells, shared, known = {}, [], paper_values(self.experiment, self.swept)
        for of_run, points in runs:
            cell = summary(of_run)
            text = f"{cell['bits/dim']} ± {cell['±'].split()[0]}"
            text += ", saturated" if cell["Note"] != NOTHING else ""
            if len(points) > 1:
                text += " †"
                shared.append("; ".join(self.labels(points)))
            cells |= dict.fromkeys(points, text)
        (down, heads), (across, names) = self.names.items()
        columns, table, note = style.ordered(rows[across], names), [], ""
        for value in style.ordered(rows[down], heads):
            head = heads.get(value) or value
            if down == "coupling_ratio":
                shares = sorted(rows.loc[rows[down] == value, "channel_share"].unique())
                head += f" (channel share {', '.join(f'{share:.3f}' for share in shares)})"
            found = [cells.get((value, column), NOTHING) for column in columns]
            theirs = [f"{names.get(column) or column}: {known[value, column]}"
                      for column in columns if (value, column) in known]
            table.append((head, *found, "; ".join(theirs) or "not known"))
        if shared:
            note = f"†: one run for all, since their couplings are the same: {' / '.join(shared)}."
        header = self.corner, *(names.get(column) or column for column in columns), "the paper's"
        return Part(header=header, rows=table, title="bits/dim.", note=note)

    def costs(self, runs):
        """What each run took."""
        columns = ("Parameters", "Training FLOPs", "Seconds", "logdet/cap", "Source", "Note")
        rows = [(", ".join(self.labels(points)), *map(summary(of_run).get, columns))
                for of_run, points in runs]
        return Part(header=("Run", *columns), rows=rows, title="What each run took.")


SPLITS = Grid(
    name="table2a", experiment="ablate_splits", corner="couplings",
    title="Table 2a: pairing or masking",
    compared="The paper compares the two for channel and for spatial couplings; masking, and whole "
             "models of one mode, are our reading",
    names={"coupling_ratio": RATIOS, "split_mode": {"pairing": "pairing", "masking": "masking"}},
    contrasts=lambda rows: [
        Contrast(f"{ratio}: pairing - masking", {(ratio, "pairing"): 1, (ratio, "masking"): -1})
        for ratio in style.ordered(rows["coupling_ratio"], RATIOS)])
LAYERS = Grid(
    name="table2b", experiment="ablate_layers", corner="before each coupling",
    title="Table 2b: ActNorm and invertible dense layers",
    compared="The paper compares the four and leaves both layers off; ours are Glow's",
    names={"actnorm": {"False": "no ActNorm", "True": "ActNorm"},
           "invertible_dense": {"False": "no dense layers", "True": "dense layers"}},
    contrasts=lambda rows: [
        Contrast(f"with {name} - without any", {point: 1, ("False", "False"): -1})
        for name, point in {"ActNorm": ("True", "False"), "dense layers": ("False", "True"),
                            "both": ("True", "True")}.items()])
FIGURE_4 = Grid(
    name="table_figure4", experiment="ablate_coupling", corner="channel : spatial",
    title="Figure 4 as a table: channel to spatial couplings, kinds of spatial split",
    compared="The paper compares them on ImageNet-1k 64x64",
    names={"coupling_ratio": BY_SHARE, "spatial_split": dict.fromkeys(style.SPLIT_STYLES)})
draw_splits, draw_layers, draw_figure4 = (
    drawn_from(grid.experiment, grid.name, grid.title, table=True)(grid.draw)
    for grid in (SPLITS, LAYERS, FIGURE_4))


# ---- the main table

def our_line(size, training, dataset, variant, scale="", **cells):
    """((dataset, variant), row) of the main table for a run of ours."""
    couplings, depth = size_of(size)
    model = (f"{OURS}Jet {couplings} couplings x depth {depth}, {TRAININGS.get(training, training)}"
             f"{scale}")
    known = paper_values("main_results", MAIN_SWEPT).get((size, training, dataset), "")
    row = {"Model": model, "The paper's": known, **OUR_SETTING, **cells}
    return (dataset.removesuffix(f"-{variant}"), variant), row


def our_lines(rows):
    """What our_line makes of a CSV's runs, or None, and of the targets that it has not."""
    lines, targets, done = [], paper_costs(), set()
    for of_run, points in [] if rows is None else by_run(rows, MAIN_SWEPT, MAIN_ORDER):
        scale = f" ({rows['scale'].iloc[0]} scale)"
        cells, variant = summary(of_run), of_run["variant"].iloc[0]
        notes = [note for note in (cells["Note"], beginning(of_run, rows)) if note != NOTHING]
        cells["Note"] = "; ".join(notes)
        for point in points:
            targets.pop(point, None)
            done.add(point)
            lines.append(our_line(*point, variant, scale, **cells))
    known = paper_values("main_results", MAIN_SWEPT)
    for point in sorted(known.keys() - {*paper_costs(), *done}):
        lines.append(our_line(*point, SETS[point[-1]].variant, **{"bits/dim": "not run here"}))
    for point, (flops, hours) in targets.items():
        flops, variant = power(flops), SETS[point[-1]].variant
        note = f"paper scale: {flops} training FLOPs, {hours} GPU-hours of an H100, both computed"
        lines.append(our_line(*point, variant, **{
            "bits/dim": "not run here", "Training FLOPs": flops, "Note": note}))
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
    """(done.json's content, JetConfig, logdet_cap_share or nan) of the model that is part of this
    repository, or None where there is none. Raises ResultsError if it is damaged.
    """
    from jet import JetConfig
    path = Path(folder) / "done.json"
    if not path.exists():
        return None
    try:
        done = read_json(path)
        model, (last, test) = JetConfig(**done["config"]["model"]), done["rows"][-2:]
        numbers = [row[name] for row in done["rows"] for name in
                   ("step", "bits_per_dim", "bits_per_dim_se", "logdet_nats", "num_images")]
        numbers += [done[name] for name in ("num_params", "train_seconds", "threads")]
        numbers += [done["config"][name] for name in ("total_steps", "batch_size", "seed")]
        texts = [done[name] for name in ("hardware", "git_commit", "dataset", "variant")]
        is_whole = all(map(math.isfinite, numbers)) and all(isinstance(text, str) for text in texts)
        splits = last["split"], test["split"]
        if not is_whole or splits != ("train", "test") or last["step"] != test["step"]:
            raise ValueError("a number is not finite, a text is none, or a split is missing")
        share = logdet_cap_share(model, test["logdet_nats"])
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, IndexError,
            AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ResultsError(f"{path}: damaged ({reason})") from None
    return done, model, math.nan if share is None else share


def shipped_lines():
    """As our_lines() for the model that is part of this repository, if there is one."""
    import pandas as pd
    if (shipped := read_shipped(SHIPPED)) is None:
        return []
    done, model, share = shipped
    config, variant = done["config"], done["variant"]
    cells = summary(pd.DataFrame([{**done, **done["rows"][-1], "run_id": SHIPPED.name,
                                   "train_flops": math.nan, "logdet_cap_share": share}]))
    steps = f"{config['total_steps']:,} steps of {config['batch_size']}, seed {config['seed']}"
    notes = [note for note in (cells["Note"], steps) if note != NOTHING]
    cells |= {**OUR_SETTING, "Training FLOPs": "not in done.json", "Note": "; ".join(notes),
              "Model": f"{OURS}Jet small, {model.num_couplings} couplings x depth "
                       f"{model.block_depth}, width {model.emb_dim} (assets/{SHIPPED.name})"}
    return [((done["dataset"].removesuffix(f"-{variant}"), variant), cells)]


def main_parts(ours, reported):
    """The sections: one for each (dataset, variant, bound) by bits/dim, and last what can be
    compared with nothing.
    """
    groups, unknown = {}, []
    for row in reported:
        cells = {SHORT.get(name, name.capitalize()): text for name, text in row.items()}
        if "unknown" in (row["variant"], row["bound"]):
            cells["Model"] += f", on {DATASETS[row['dataset']]} ({row['bound']})"
            unknown.append(cells)
        else:
            groups.setdefault((row["dataset"], row["variant"], row["bound"]), []).append(cells)
    published = set(groups)
    for (dataset, variant), cells in ours:
        groups.setdefault((dataset, variant, "elbo"), []).append(cells)
    import pandas as pd
    keys, parts = ("dataset", "variant", "bound"), []
    for group in style.points(pd.DataFrame(list(groups), columns=keys), keys, KNOWN):
        dataset, variant, bound = group
        note = ""
        if group not in published:
            note = "No published number is comparable."
        elif bound == "elbo" and not any(row["Model"].startswith(OURS) for row in groups[group]):
            note = "No run of ours."
        if variant == "oord?":
            variant += " (unconfirmed variant)"
        # A set of ours is its own variant.
        names = dict.fromkeys((DATASETS.get(dataset, dataset), variant, bound))
        parts.append(section(" / ".join(names), sorted(groups[group], key=bits_per_dim), note))
    if unknown:
        unknown.sort(key=lambda row: row["Model"])
        parts.append(section("Variant or bound unknown: never compared", unknown,
                             "In alphabetical order."))
    return parts


def bits_per_dim(cells):
    """Of a row of the main table; infinity where it was not run."""
    try:
        return float(cells["bits/dim"])
    except ValueError:
        return math.inf


def section(title, rows, note):
    """The rows ({column: text}) with the columns in which one of them has something."""
    header = tuple(column for column in MAIN_COLUMNS
                   if any(row.get(column, "") not in ("", NOTHING) for row in rows))
    cells = [tuple(row.get(column) or NOTHING for column in header) for row in rows]
    return Part(header=header, title=title, note=note, rows=cells)


def draw_main(path, out_dir=style.OUT):
    """The main table from a CSV; returns the paths of the Markdown and the LaTeX file."""
    rows, scale = None, Path(path).stem.rpartition("_")[2]
    if is_run(path, "main_results"):
        rows = final_test_rows(path, "main_results", MAIN_SWEPT, "the main table", MAIN_VARYING)
        scale = rows["scale"].iloc[0]
    ours = f"{say_not_run('main_results', scale)}." if rows is None else setting(rows)
    caption = (
        f"Main table, our runs of {scale} scale beside published numbers. A section is one image "
        "set, variant and kind of bound, by bits/dim; numbers of two sections are never "
        "comparable, and within one the dequantization matters, and IW: importance samples, "
        "Augm.: trained on augmented images, Cond.: class, where it is told the class. Ours: "
        f"{ours} {NOTHING}: nothing to say, not run, or not in results/reported.csv, "
        "where the published digits come from. Training FLOPs of ours are of the run alone; "
        "GPU-hours are computed for 40 % of an H100's bfloat16 peak.")
    parts = main_parts([*our_lines(rows), *shipped_lines()], read_reported(REPORTED))
    return write(f"main_table_{scale}", caption, parts, out_dir)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"ablate_coupling": draw_figure4, "ablate_splits": draw_splits,
                                   "ablate_layers": draw_layers, "main_results": draw_main})
