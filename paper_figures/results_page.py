"""results/RESULTS.md: for each figure and table what the paper claims, and what ours shows.

    python paper_figures/results_page.py       # from the committed CSVs; redraw.py calls it, too

Every number on the page is computed here from a CSV or a file of samples; none is typed.
"""
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from harness.flags import ArgumentParser, one_line_errors
from paper_figures import figure2, figure3, figure4, figure5, style, tables
from paper_figures.results_csv import ResultsError, final_rows

SURE = 2  # standard errors from which on a difference counts
VERDICTS = {"agrees": "agree", "disagrees": "disagree", "cannot tell": "cannot tell"}
BEST_DEPTH = 5  # of the paper
INTRODUCTION = """# Results

Written by `python paper_figures/redraw.py` from the CSVs beside it; [README.md](README.md) explains
their columns. Small and medium scale are not the paper's: they show which of its comparisons come
out in small models after little training, and how surely. There, a disagreement is no verdict on
the paper, and an agreement no proof.

A difference is one side minus the other, in bits/dim (lower is better). Its standard error adds,
for each side, the standard error over the test images (as if each run had other images: too much,
since they share images and noise) and the deviation between seeds{pooled}
over the root of their number. Below {SURE} standard errors we cannot tell. The comparisons of an
item share runs, and their number is not corrected for. All are evaluated with the same one draw of
dequantization noise per image.
"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one side scores above the other, in bits/dim (lower is better)."""
    name: str
    value: float
    error: float
    wanted: int  # the sign that the paper's claim implies; 0 where it is not known to say
    sure: bool = True  # whether the error holds the deviation between seeds; else no verdict

    @property
    def verdict(self):
        if not self.sure or not abs(self.value) > SURE * self.error > 0:
            return "cannot tell"
        if not self.wanted:
            return "higher" if self.value > 0 else "lower"
        return "agrees" if (self.value > 0) == (self.wanted > 0) else "disagrees"

    def row(self):
        times = f"{self.value / self.error:+.1f}" if self.error else ""
        return f"| {self.name} | {self.value:+.4f} | {self.error:.4f} | {times} | {self.verdict} |"


def seed_deviation(results_dir, scale):
    """Standard deviation of bits/dim between seeds at a scale, pooled over the runs of Figure 4.

    nan with one seed.
    """
    try:
        rows = figure4.load(results_dir / f"ablate_coupling_{scale}.csv")
    except ResultsError:
        return math.nan
    rows = rows.sort_values([*figure4.SWEPT]).drop_duplicates("run_id")
    groups = rows.groupby([*figure4.SWEPT])["bits_per_dim"]
    freedom = len(rows) - groups.ngroups
    squares = (rows["bits_per_dim"] - groups.transform("mean")).pow(2).sum()
    return math.sqrt(squares / freedom) if freedom else math.nan


class Scores:
    """Means over seeds, found by the values of the swept fields: of test rows, if not by split."""

    def __init__(self, rows, swept, seed_sd):
        if "split" not in swept:
            rows = rows[rows["split"] == "test"]
        groups, self.sure = rows.groupby([*swept]), not math.isnan(seed_sd)
        self.means, self.runs = groups["bits_per_dim"].mean(), groups["run_id"].first()
        # Over the images, as if each run had drawn its own, and over the seeds.
        self.variances = groups["bits_per_dim_se"].max() ** 2
        if self.sure:
            self.variances += seed_sd ** 2 / groups["bits_per_dim"].count()

    def combined(self, name, weights, wanted):
        """The sum of the means of some keys, each times its weight."""
        value = sum(weight * self.means[key] for key, weight in weights.items())
        variance = sum(weight ** 2 * self.variances[key] for key, weight in weights.items())
        return Difference(name, value, math.sqrt(variance), wanted, self.sure)

    def difference(self, name, one, other, wanted):
        return self.combined(name, {one: 1, other: -1}, wanted)

    def differences(self, comparisons):
        """Of those of the (name, one, other, wanted) whose sides are both there."""
        return [self.difference(*comparison) for comparison in comparisons
                if all(side in self.means.index for side in comparison[1:3])]


# ---- the claims: each gives the differences that speak to it

def vit_against_cnn(rows, seed_sd):
    """At the compute of each ViT, the CNN's line between its points, over the log of compute."""
    scores, found = Scores(rows, figure2.SWEPT_A, seed_sd), []
    at = np.log(rows.groupby([*figure2.SWEPT_A])["train_flops"].first()).sort_values()
    vits, cnns = (at[at.index.get_level_values("block") == block] for block in ("vit", "cnn"))
    for vit, here in vits.items() if len(cnns) > 1 else ():
        if cnns.iloc[0] <= here <= cnns.iloc[-1]:
            right = max(1, int(np.searchsorted(cnns, here)))
            (left, low), (right, high) = [*cnns.items()][right - 1:right + 1]
            share = (here - low) / (high - low)
            found.append(scores.combined(f"ViT of width {vit[1]} - CNN of equal compute",
                                         {vit: 1, left: share - 1, right: -share}, -1))
    return found


def deeper_blocks(rows, seed_sd):
    """Each depth and the one before it; the paper's claim ends at its best depth."""
    depths = style.ordered(rows["block_depth"])
    claimed = [depth for depth in depths if int(depth) <= BEST_DEPTH]
    pairs = [*zip(claimed[1:], claimed)]
    if len(pairs) > 1:
        pairs.append((claimed[-1], claimed[0]))
    beyond = depths[len(claimed):]
    pairs += zip(beyond, depths[len(claimed) - 1:])
    return Scores(rows, figure2.SWEPT_B, seed_sd).differences(
        (f"depth {depth} - depth {before}", depth, before, 0 if depth in beyond else -1)
        for depth, before in pairs)


def overfitting_and_scaling(rows, seed_sd):
    """The gap between test and training images, and what the largest gains over the smallest."""
    scores, found = Scores(rows, ("split", *figure3.SWEPT), seed_sd), []
    for position, dataset in enumerate(figure3.sets(rows)):
        flops = rows[rows["dataset"] == dataset].groupby([*figure3.SWEPT])["train_flops"].first()
        small, large = flops.idxmin(), flops.idxmax()
        name, wanted = "the largest - the smallest, test", -1
        weights = {("test", *large): 1, ("test", *small): -1}
        if position % 2 == 0:  # the smaller set of each pair
            name, wanted = "test - train of the largest - the same of the smallest", 1
            weights |= {("train", *large): -1, ("train", *small): 1}
        found.append(scores.combined(f"{style.dataset_title(dataset)}: {name}", weights, wanted))
    return found


def official_couplings(rows, seed_sd):
    scores, ours = Scores(rows, figure4.SWEPT, seed_sd), ("4:1", "mix")
    others = [(ratio, "mix") for ratio in style.ordered(rows["coupling_ratio"], tables.BY_SHARE)]
    others += [("4:1", split)
               for split in style.ordered(rows["spatial_split"], style.SPLIT_STYLES)]
    return scores.differences((f"4:1 mix - {' '.join(other)}", ours, other, 0) for other in others
                              if scores.runs.get(other) != scores.runs.get(ours))


def pairing_against_masking(rows, seed_sd):
    return Scores(rows, tables.SPLITS.swept, seed_sd).differences(
        (f"{ratio}: pairing - masking", (ratio, "pairing"), (ratio, "masking"), 0)
        for ratio in style.ordered(rows["coupling_ratio"], tables.RATIOS))


def layers_that_are_left_off(rows, seed_sd):
    names = {"ActNorm": ("True", "False"), "dense layers": ("False", "True"),
             "both": ("True", "True")}
    return Scores(rows, tables.LAYERS.swept, seed_sd).differences(
        (f"with {name} - without any", key, ("False", "False"), 0) for name, key in names.items())


def pretraining(rows, seed_sd):
    """The claim is on training from scratch; what fine-tuning adds to pretraining is beside it."""
    targets = style.points(rows, ("size", "dataset"), tables.MAIN_ORDER)
    return Scores(rows, tables.MAIN_SWEPT, seed_sd).differences(
        (f"{size} on {style.dataset_title(name)}: fine-tuned - {other}",
         (size, "fine-tuned", name), (size, other, name), wanted)
        for size, name in targets for other, wanted in (("scratch", -1), ("not-fine-tuned", 0)))


@dataclasses.dataclass(frozen=True)
class Item:
    """A figure or table of the paper."""
    title: str
    experiment: str
    swept: tuple
    claim: str
    differences: object  # function(rows, seed_sd), or None where there is no number to compare
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
         "Longer training and more seeds: few steps may favour shallow networks, and one learning "
         "rate serves all depths.", figure="figure2b"),
    Item("Figure 3: scaling", "scaling", figure3.SWEPT,
         "On the smaller set (ImageNet-1k) large models overfit; on the larger one (ImageNet-21k) "
         "more compute keeps helping.", overfitting_and_scaling,
         "Many more epochs of the smaller set. The training images are others than the test "
         "images: what counts is how the gap between them grows with the model, not the gap.",
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
         pairing_against_masking, "The paper's values and its masking: ours is our reading."),
    Item("Table 2b: ActNorm and invertible dense layers", "ablate_layers", tables.LAYERS.swept,
         "It compares the four; the official model has neither. The values are not known here.",
         layers_that_are_left_off,
         "Training to the end: both layers start well, and may help most in the first steps."))


def item_section(item, results_dir, deviations):
    """deviations: between seeds, by scale (seed_deviation)."""
    lines, missing = [f"## {item.title}", "", f"**The paper:** {item.claim}", ""], []
    for scale, deviation in deviations.items():
        path = results_dir / f"{item.experiment}_{scale}.csv"
        if path.exists():
            lines += measured(item, item.rows(path), scale, deviation)
        else:
            missing.append(scale)
    return [*lines, f"Not run: {', '.join(missing)}. The command is `python experiments/"
            f"{item.experiment}.py --scale SCALE --data-root DIR`.", "",
            f"**To tell more:** {item.to_tell}", ""]


def measured(item, rows, scale, seed_sd):
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
             f"{style.counted(test['seed'].nunique(), 'seed')}. {'; '.join(sets)}. "
             f"{test['train_seconds'].sum() / 60:.0f} minutes of training in all on "
             f"{', '.join(test['hardware'].fillna('unknown').unique())}; commit {commits}.", ""]
    if item.figure:
        lines += [f"![{item.title}](../paper_figures/out/{item.figure}_{scale}.png)", ""]
    if item.differences and (found := item.differences(rows, seed_sd)):
        lines += comparisons(found)
    return [*lines, *caps(test), ""]


def comparisons(differences):
    """The table of the differences, and how many speak for the claim."""
    verdicts = [difference.verdict for difference in differences if difference.wanted]
    summary = "No verdict on the paper: what it found is not known here."
    if verdicts:
        counts = [f"{verdicts.count(verdict)} {words}" for verdict, words in VERDICTS.items()]
        summary = f"Of {len(verdicts)} comparisons that speak to the claim: {', '.join(counts)}."
    lines = [summary, "", "| bits/dim | difference | s.e. | in s.e. | |", f"|{5 * ' --- |'}",
             *(difference.row() for difference in differences), ""]
    if not all(difference.sure for difference in differences):
        lines += ["The deviation between seeds at this scale is not known (Figure 4 with "
                  "`--seeds 2` tells it): errors are over the images alone, and no verdict is "
                  "given.", ""]
    return lines


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
    deviations = {scale: seed_deviation(results_dir, scale) for scale in style.SCALES[1:]}
    known = "; ".join(f"{scale}: {value:.4f}" for scale, value in deviations.items()
                      if not math.isnan(value))
    pooled = f" ({known} bits/dim, pooled over the runs of Figure 4)" if known else ""
    lines = [INTRODUCTION.format(pooled=pooled, SURE=SURE),
             *model_section(assets_dir / "jet_cifar10")]
    for item in ITEMS:
        lines += item_section(item, results_dir, deviations)
    return "\n".join(lines).rstrip() + "\n"


def write(results_dir):
    """Write RESULTS.md to the folder of the CSVs; returns its path."""
    return style.write_files({"RESULTS.md": page(results_dir)}, results_dir)[0]


if __name__ == "__main__":
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    style.add_folder_flag(parser, "--results-dir", "results")
    with one_line_errors(parser.prog):
        print(write(parser.parse_args().results_dir))
