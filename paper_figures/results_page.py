"""results/RESULTS.md: for each figure and table what the paper claims, and what ours shows.

    python paper_figures/results_page.py       # from the committed CSVs; redraw.py calls it, too

Every number on the page is computed here from a CSV or a file of samples; none is typed.
"""
import dataclasses
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from harness.flags import ArgumentParser, one_line_errors
from paper_figures import figure2, figure3, figure4, figure5, lengths, paper, style, tables
from paper_figures.inference import COLUMNS, Contrast, cells, compare
from paper_figures.per_image import read_per_image
from paper_figures.regime import LEAST, is_run, regime
from paper_figures.results_csv import final_rows

BEST_DEPTH = 5  # of the paper
INTRODUCTION = """# Results

Written by `python paper_figures/redraw.py` from the CSVs beside it and `per_image/`;
[README.md](README.md) explains their columns. Small and medium scale are not the paper's: what
they show is said for their training length and learning rates, and is no verdict on the paper.

A difference is one side minus the other, in bits/dim (lower is better), of the same test images
with the same noise: the mean over seeds of the mean over images. Its s.e. over images is that of
the paired differences, the largest of the seeds. The interval is Student's, two-sided, 95 %, over
seeds: its variance is pooled over the runs of an item that differ in more than the seed. Holm's
rule at 5 % corrects for all comparisons of an item at a scale. With one seed there is no test: how
another seed would come out is not known. Images are the test split's, drawn once. Learning rates
that were tuned are the best of a short search with one seed: the error of that choice is in no
interval. What is compared "at equal compute" is read off the straight line between two points over
the logarithm of FLOPs.
"""


# ---- the claims: each gives the differences that speak to it

def vit_against_cnn(rows):
    """At the compute of each ViT, the CNN's line between its points, over the log of compute."""
    found = []
    at = np.log(rows.groupby([*figure2.SWEPT_A])["train_flops"].first()).sort_values()
    vits, cnns = (at[at.index.get_level_values("block") == block] for block in ("vit", "cnn"))
    for vit, here in vits.items() if len(cnns) > 1 else ():
        if cnns.iloc[0] <= here <= cnns.iloc[-1]:
            right = max(1, int(np.searchsorted(cnns, here)))
            (left, low), (right, high) = [*cnns.items()][right - 1:right + 1]
            share = (here - low) / (high - low)
            found.append(Contrast(f"ViT of width {vit[1]} - CNN of equal compute",
                                  {vit: 1, left: share - 1, right: -share}, -1))
    return found


def difference(name, one, other, wanted=0, gap=False):
    return Contrast(name, {one: 1, other: -1}, wanted, gap)


def deeper_blocks(rows):
    """Each depth and the one before it; the paper's claim ends at its best depth."""
    depths = style.ordered(rows["block_depth"])
    return [difference(f"depth {depth} - depth {before}", (depth,), (before,),
                       -1 if int(depth) <= BEST_DEPTH else 0)
            for before, depth in itertools.pairwise(depths)]


def overfitting_and_scaling(rows):
    """Every step of the grid: on the smaller set of a pair the gap between test and training
    images, on the larger one the test images.
    """
    found, fields = [], {"num_couplings": "couplings", "block_depth": "depth", "emb_dim": "width"}
    for position, dataset in enumerate(figure3.sets(rows)):
        is_smaller = position % 2 == 0
        what = f"{style.dataset_title(dataset)}, {'test - train' if is_smaller else 'test'}"
        of_set = rows[rows["dataset"] == dataset]
        points = set(of_set[[*figure3.SWEPT]].itertuples(index=False, name=None))
        for field, point in itertools.product(fields, sorted(points)):
            place, sizes = figure3.SWEPT.index(field), style.ordered(of_set[field])
            after = dict(itertools.pairwise(sizes)).get(point[place])
            other = (*point[:place], after, *point[place + 1:])
            if other in points:
                rest = ", ".join(f"{fields[key]} {value}" for key, value in zip(
                    figure3.SWEPT, point) if key in fields and key != field)
                found.append(difference(
                    f"{what}: {fields[field]} {after} - {point[place]} ({rest})", other, point,
                    1 if is_smaller else -1, is_smaller))
    return found


def official_couplings(rows):
    runs, ours = rows.groupby([*figure4.SWEPT])["run_id"].first(), ("4:1", "mix")
    others = [(ratio, "mix") for ratio in style.ordered(rows["coupling_ratio"], tables.BY_SHARE)]
    others += [("4:1", split)
               for split in style.ordered(rows["spatial_split"], style.SPLIT_STYLES)]
    return [difference(f"4:1 mix - {' '.join(other)}", ours, other)
            for other in others if runs.get(other) != runs.get(ours)]


def pretraining(rows):
    """The claim is on training from scratch; what fine-tuning adds to pretraining is beside it."""
    targets = style.points(rows, ("size", "dataset"), tables.MAIN_ORDER)
    return [difference(f"{size} on {style.dataset_title(name)}: fine-tuned - {other}",
                       (size, "fine-tuned", name), (size, other, name), wanted)
            for size, name in targets for other, wanted in (("scratch", -1), ("not-fine-tuned", 0))]


@dataclasses.dataclass(frozen=True)
class Item:
    """A figure or table of the paper."""
    title: str
    experiment: str
    swept: tuple
    claim: str
    contrasts: object  # function(rows), or None where there is no number to compare
    to_tell: str  # what a verdict on the paper's claim itself would need
    varying: tuple = ()
    figure: str = ""  # its file, without scale and ending

    def rows(self, path):
        """The final rows of its CSV. Raises ResultsError."""
        return final_rows(path, self.experiment, self.swept, self.title.split(":")[0], self.varying)


ITEMS = (
    Item("Figure 2a: ViT or CNN", "compare_vit_cnn", figure2.SWEPT_A,
         "At equal training compute ViT blocks clearly beat CNN blocks (ImageNet-1k 64 x 64).",
         vit_against_cnn,
         "Longer training, in which what convolutions may gain from knowing what is near may count "
         "less; the paper's CNN block, which is not known here; more seeds.", figure="figure2a"),
    Item("Figure 2b: blocks in each network", "ablate_block_depth", figure2.SWEPT_B,
         "bits/dim improve with the depth of the ViT up to 5 (ImageNet-21k 32 x 32).",
         deeper_blocks,
         "Longer training and the paper's width: few steps may favour shallow networks.",
         figure="figure2b"),
    Item("Figure 3: scaling", "scaling", figure3.SWEPT,
         "On the smaller set (ImageNet-1k) large models overfit; on the larger one (ImageNet-21k) "
         "more compute keeps helping.", overfitting_and_scaling,
         "More seeds and larger models. The training images are others than the test images: what "
         "counts is how the gap between them grows with the model, not the gap.",
         figure="figure3"),
    Item("Figure 4: which couplings", "ablate_coupling", figure4.SWEPT,
         "The official configuration takes 4 channel couplings to 1 spatial one, of mixed "
         "patterns; how much better it was (ImageNet-1k 64 x 64) is not known here.",
         official_couplings,
         "More couplings, so that ratios and patterns can differ, and longer training.",
         figure="figure4"),
    Item("Figure 5: samples", "draw_samples", figure5.SWEPT,
         "Samples at 32 and 64 pixels, from scratch and fine-tuned from ImageNet-21k.", None,
         "The paper's sizes. Nothing is measured here: a look at what such models have learnt.",
         tables.MAIN_VARYING, "figure5"),
    Item("Main table: from scratch or pretrained", "main_results", tables.MAIN_SWEPT,
         "Pretraining on a larger set, then fine-tuning, beats training from scratch.", pretraining,
         "The paper's sets. Below its scale what is fine-tuned has been trained for more steps in "
         "all than what begins from scratch, so that a gain says that other images are worth "
         "training on, not that they are worth as much.", tables.MAIN_VARYING),
    Item("Table 2a: masking or pairing", "ablate_splits", tables.SPLITS.swept,
         "It compares the two; the official model pairs. The values are not known here.",
         tables.SPLITS.contrasts, "The paper's values and its masking: ours is our reading."),
    Item("Table 2b: ActNorm and invertible dense layers", "ablate_layers", tables.LAYERS.swept,
         "It compares the four; the official model has neither. The values are not known here.",
         tables.LAYERS.contrasts,
         "Training to the end: both layers start well, and may help most in the first steps."))


def item_section(item, results_dir):
    lines, missing = [f"## {item.title}", "", f"**The paper:** {item.claim}", ""], []
    for scale in style.SCALES[1:]:
        path = results_dir / f"{item.experiment}_{scale}.csv"
        if not is_run(path, item.experiment):
            lines += [f"**Ours, {scale} scale:** not run at {LEAST[scale]} epochs.", ""]
        if path.exists() and is_run(path, item.experiment):
            lines += measured(item, item.rows(path), scale, path)
        else:
            missing.append(scale)
    lines += paper_numbers(item)
    return [*lines, f"Not run: {', '.join(missing)}. {command(item)}", "",
            f"**To tell more:** {item.to_tell}", ""]


def paper_numbers(item):
    """A line with the paper's own numbers, as far as they are known."""
    known = [f"{' '.join(point)} {value}" for point, value in
             paper.paper_values(item.experiment, item.swept).items()]
    return [f"**The paper's numbers** ([paper.csv](paper.csv)): {'; '.join(known)}.", ""] \
        if known else []


def command(item):
    return (f"The command is `python experiments/{item.experiment}.py --scale SCALE "
            "--data-root DIR`.")


def measured(item, rows, scale, path):
    """What a CSV shows."""
    test = rows[rows["split"] == "test"].drop_duplicates("run_id")
    sets = []
    for name in style.ordered(test["dataset"], style.DATASET_TITLES):
        of_set = test[test["dataset"] == name]
        bits = of_set["bits_per_dim"]
        sets.append(f"{style.dataset_title(name)} ({of_set['num_images'].iloc[0]:,} test images): "
                    f"{bits.min():.4f} to {bits.max():.4f} bits/dim")
    commits = ", ".join(commit[:7] for commit in test["git_commit"].fillna("unknown").unique())
    if (test["git_dirty"] == "True").any():
        commits += " (with changes)"
    lines = [f"**Ours, {scale} scale:** {len(test)} runs, "
             f"{style.counted(test['seed'].nunique(), 'seed')}, {regime(rows, path)}. "
             f"{'; '.join(sets)}. "
             f"{test['train_seconds'].sum() / 60:.0f} minutes of training in all on "
             f"{', '.join(test['hardware'].fillna('unknown').unique())}; commit {commits}.", ""]
    if item.figure:
        lines += [f"![{item.title}](../paper_figures/out/{item.figure}_{scale}.png)", ""]
    if item.contrasts:
        images = read_per_image(path, rows)
        known = paper.paper_values(item.experiment, item.swept)
        contrasts = [with_sign(contrast, known) for contrast in item.contrasts(rows)]
        if found := compare(rows, item.swept, images, contrasts):
            lines += comparisons(found, regime(rows, path), scale, known)
    if item.experiment == "scaling":
        lines += power_laws(rows)
    return [*lines, *lengths.section(path, rows, item, BEST_DEPTH), *caps(test), ""]


def power_laws(rows):
    """A line for each image set with three seeds: the exponent of compute."""
    lines = []
    for dataset in figure3.sets(rows):
        if law := figure3.power_law(rows[rows["dataset"] == dataset]):
            low, mean, high = law[1]
            lines.append(f"{style.dataset_title(dataset)}: over this grid, test bits/dim go with "
                         f"compute to the power of {mean:+.4f} (95 %: {low:+.4f} to {high:+.4f}, "
                         "over seeds); a fit, and no law.")
    return [*lines, ""] if lines else []


def with_sign(contrast, known):
    """The Contrast with the sign that the paper's numbers have, where a claim says none."""
    theirs = paper.difference(contrast, known)
    if contrast.wanted or not theirs:
        return contrast
    return dataclasses.replace(contrast, wanted=1 if theirs > 0 else -1)


def comparisons(findings, regime, scale, known):
    """The table of what was compared, and how much of it has the sign that the paper claims."""
    verdicts = [verdict(one, regime, scale) for one in findings]
    summary, claimed = "The paper's numbers are not known here: no sign to compare with.", [
        one for one, finding in zip(verdicts, findings) if finding.contrast.wanted]
    if claimed:
        counts = [f"{claimed.count(words)} {words}" for words in dict.fromkeys(claimed)]
        summary = (f"Of {len(claimed)} comparisons that speak to the claim: "
                   f"{'; '.join(counts)}.")
    theirs = [paper.difference(one.contrast, known) for one in findings]
    columns = (*COLUMNS, "the paper's") if set(theirs) > {None} else COLUMNS
    lines = [summary, "", f"| {' | '.join(columns)} | |", f"|{(len(columns) + 1) * ' --- |'}"]
    for one, words, value in zip(findings, verdicts, theirs):
        more = ["" if value is None else f"{value:+.4f}"][:len(columns) - len(COLUMNS)]
        lines.append(f"| {' | '.join([*cells(one), *more])} | {words} |")
    return [*lines, ""]


def verdict(finding, regime, scale):
    """What may be said of a Finding; of the paper's claim itself at its scale alone."""
    wanted = finding.contrast.wanted
    if math.isnan(finding.p):
        return "no test: one seed" if len(finding.by_seed) == 1 else "no test"
    if not finding.is_sure:
        return "cannot tell"
    if not wanted:
        return "higher" if finding.value > 0 else "lower"
    is_same = (finding.value > 0) == (wanted > 0)
    if scale == "paper":
        return "agrees" if is_same else "disagrees"
    return f"{'the claimed' if is_same else 'opposite'} sign at {regime}"


def caps(test):
    """How near the log-dets of the runs are to their cap."""
    lines, shares = [], test.set_index("run_id")["logdet_cap_share"].dropna()
    if len(shares):
        run_id, share = shares.idxmax(), shares.max()
        saturated = ": **it saturates, and its number says little.**"
        lines.append(f"The log-det of the nearest run to its cap ({run_id}) is at {share:.1%} of "
                     f"it{saturated if share >= tables.SATURATED else '.'}")
    if len(shares) < len(test):
        lines.append("ActNorm and dense layers add to the log-det, so that runs with them have no "
                     "such cap.")
    return lines


def model_section(folder):
    """The small trained model; nothing where there is none."""
    if (shipped := tables.read_shipped(folder)) is None:
        return []
    done, model, share = shipped
    config = done["config"]
    lines = [
        "## The small trained model", "",
        f"`assets/{folder.name}`: {model.num_couplings} couplings x depth {model.block_depth}, "
        f"width {model.emb_dim}, {done['num_params']:,} parameters; {config['total_steps']:,} "
        f"steps of {config['batch_size']} images of {done['dataset']} in "
        f"{done['train_seconds'] / 60:.0f} minutes on {style.counted(done['threads'], 'thread')} "
        f"of {done['hardware']}; commit {done['git_commit'][:7]}. Uniform dequantization, one "
        "draw, an upper bound.", "",
        "| step | test images | bits/dim | training images | bits/dim |",
        "| --- | --- | --- | --- | --- |"]
    for train, test in zip(done["rows"][::2], done["rows"][1::2]):
        cells = [f"{row['num_images']:,} | {row['bits_per_dim']:.4f} ± {row['bits_per_dim_se']:.4f}"
                 for row in (test, train)]
        lines.append(f"| {test['step']:,} | {' | '.join(cells)} |")
    no_cap = "ActNorm or dense layers add to its log-det, which has no cap."
    cap = no_cap if math.isnan(share) else f"Its log-det is at {share:.1%} of its cap."
    return [*lines, "", cap, ""]


def page(results_dir, assets_dir=style.ROOT / "assets"):
    """The whole page. Raises ResultsError for a CSV that must not be used."""
    lines = [INTRODUCTION, *model_section(assets_dir / "jet_cifar10")]
    for item in ITEMS:
        lines += item_section(item, results_dir)
    return "\n".join(lines).rstrip() + "\n"


def write(results_dir):
    """Write RESULTS.md to the folder of the CSVs; returns its path."""
    return style.write_files({"RESULTS.md": page(results_dir)}, results_dir)[0]


if __name__ == "__main__":
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    style.add_folder_flag(parser, "--results-dir", "results")
    with one_line_errors(parser.prog):
        print(write(parser.parse_args().results_dir))
