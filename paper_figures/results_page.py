"""results/RESULTS.md: for each figure and table what the paper claims, what ours shows, and how surely.

    python paper_figures/results_page.py       # from the committed CSVs; redraw.py calls it, too

Every number on the page is computed here from a CSV or a file of samples; none is typed.
"""
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import figure2, figure3, figure4, figure5, style, tables
from paper_figures.results_csv import ResultsError, final_rows

SURE = 2  # standard errors from which on a difference counts
VERDICTS = {"agrees": "agree", "disagrees": "disagree", "cannot tell": "cannot tell"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one side scores above the other, in bits/dim (lower is better).

    wanted: the sign that the paper's claim implies; 0 where the paper is not known to say. sure: whether the error holds
    the deviation between seeds, without which there is no verdict.
    """
    name: str
    value: float
    error: float
    wanted: int
    sure: bool = True

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
    """Standard deviation of bits/dim between seeds at a scale, pooled over the runs of Figure 4; nan with one seed."""
    try:
        rows = figure4.load(results_dir / f"ablate_coupling_{scale}.csv").drop_duplicates("run_id")
    except ResultsError:
        return math.nan
    groups = rows.groupby([*figure4.SWEPT])["bits_per_dim"]
    freedom = (groups.count() - 1).sum()
    return math.sqrt((groups.var(ddof=1).fillna(0) * (groups.count() - 1)).sum() / freedom) if freedom else math.nan


class Scores:
    """Means over seeds of one split, found by the values of the swept fields."""

    def __init__(self, rows, swept, seed_sd, split="test"):
        self.sure, self.seed_variance = not math.isnan(seed_sd), 0 if math.isnan(seed_sd) else seed_sd ** 2
        groups = rows[rows["split"] == split].groupby([*swept])
        self.means, self.seeds = groups["bits_per_dim"].mean(), groups["bits_per_dim"].count()
        self.errors, self.runs = groups["bits_per_dim_se"].max(), groups["run_id"].first()

    def variance(self, key):
        """Of a mean: over the images, as if each run had drawn its own, and over the seeds."""
        return self.errors[key] ** 2 + self.seed_variance / self.seeds[key]

    def difference(self, name, one, other, wanted):
        return Difference(name, self.means[one] - self.means[other], math.sqrt(self.variance(one) + self.variance(other)),
                          wanted, self.sure)


# ---- the claims: each gives the differences that speak to it

def vit_against_cnn(rows, seed_sd):
    """At the compute of each ViT, the CNN's line between its points (in the logarithm of compute)."""
    scores, found = Scores(rows, figure2.SWEPT_A, seed_sd), []
    flops = rows.groupby([*figure2.SWEPT_A])["train_flops"].first()
    widths = sorted(rows["emb_dim"].unique(), key=int)
    at = [math.log(flops["cnn", width]) for width in widths]
    for width in widths:
        here = math.log(flops["vit", width])
        if at[0] <= here <= at[-1]:
            right = min(max(1, int(np.searchsorted(at, here))), len(at) - 1)
            share = (here - at[right - 1]) / (at[right] - at[right - 1])
            parts = {("cnn", widths[right - 1]): 1 - share, ("cnn", widths[right]): share}
            value = scores.means["vit", width] - sum(weight * scores.means[key] for key, weight in parts.items())
            variance = scores.variance(("vit", width)) + sum(weight ** 2 * scores.variance(key) for key, weight in parts.items())
            found.append(Difference(f"ViT of width {width} - CNN of equal compute", value, math.sqrt(variance), -1,
                                    scores.sure))
    return found


def deeper_blocks(rows, seed_sd):
    scores = Scores(rows, ["block_depth"], seed_sd)
    return [scores.difference(f"depth {depth} - depth {depth - 1}", str(depth), str(depth - 1), -1) for depth in range(2, 6)] + [
        scores.difference("depth 5 - depth 1", "5", "1", -1), scores.difference("depth 6 - depth 5", "6", "5", 0)]


def overfitting_and_scaling(rows, seed_sd):
    """The gap between test and training images, and what the largest gains over the smallest, on each set."""
    test, train = (Scores(rows, figure3.SWEPT, seed_sd, split) for split in ("test", "train"))
    found = []
    for position, name in enumerate(dict.fromkeys(rows["dataset"])):
        flops = rows[rows["dataset"] == name].groupby([*figure3.SWEPT])["train_flops"].first()
        small, large = flops.idxmin(), flops.idxmax()
        title = style.DATASET_TITLES[name]
        if position % 2 == 0:  # the smaller set of each pair
            gaps = [test.means[key] - train.means[key] for key in (large, small)]
            error = math.sqrt(sum(scores.variance(key) for scores in (test, train) for key in (large, small)))
            found.append(Difference(f"{title}: test - train of the largest - the same of the smallest", gaps[0] - gaps[1],
                                    error, 1, test.sure))
        else:
            found.append(test.difference(f"{title}: the largest - the smallest, test", large, small, -1))
    return found


def official_couplings(rows, seed_sd):
    scores, ours = Scores(rows, figure4.SWEPT, seed_sd), ("4:1", "mix")
    others = [(ratio, "mix") for ratio in dict.fromkeys(rows["coupling_ratio"])] + [("4:1", split) for split in figure4.SPLITS]
    return [scores.difference(f"4:1 mix - {' '.join(other)}", ours, other, 0)
            for other in others if scores.runs[other] != scores.runs[ours]]


def pairing_against_masking(rows, seed_sd):
    scores = Scores(rows, tables.SPLITS_SWEPT, seed_sd)
    return [scores.difference(f"{ratio}: pairing - masking", (ratio, "pairing"), (ratio, "masking"), 0)
            for ratio in tables.RATIOS]


def layers_that_are_left_off(rows, seed_sd):
    scores, off = Scores(rows, tables.LAYERS_SWEPT, seed_sd), ("no-actnorm", "no-dense")
    names = {("actnorm", "no-dense"): "ActNorm", ("no-actnorm", "dense"): "dense layers", ("actnorm", "dense"): "both"}
    return [scores.difference(f"with {name} - without any", key, off, 0) for key, name in names.items()]


def pretraining(rows, seed_sd):
    """The claim is about training from scratch; what fine-tuning adds to pretraining is beside it."""
    scores, found = Scores(rows, tables.MAIN_SWEPT, seed_sd), []
    for size, name in dict.fromkeys(zip(rows["size"], rows["dataset"])):
        for other, wanted in (("scratch", -1), ("not-fine-tuned", 0)):
            if {(size, "fine-tuned", name), (size, other, name)} <= set(scores.means.index):
                found.append(scores.difference(f"{size} on {style.dataset_title(name)}: fine-tuned - {other}",
                                               (size, "fine-tuned", name), (size, other, name), wanted))
    return found


@dataclasses.dataclass(frozen=True)
class Item:
    """A figure or table of the paper."""
    title: str
    experiment: str
    swept: tuple
    grid: dict
    claim: str
    differences: object  # function(rows, seed_sd), or None where there is no number to compare
    to_tell: str  # what a verdict on the paper's claim itself would need
    varying: tuple = ()
    shown: str = ""  # the figure, without scale and ending


ITEMS = (
    Item("Figure 2a: ViT or CNN", "compare_vit_cnn", figure2.SWEPT_A, figure2.GRID_A,
         "At equal training compute ViT blocks clearly beat CNN blocks (ImageNet-1k 64 x 64).", vit_against_cnn,
         "Longer training, in which what convolutions may gain from knowing what is near may count less; the paper's CNN "
         "block, which is not known here; more seeds.", shown="figure2a"),
    Item("Figure 2b: blocks in each network", "ablate_block_depth", figure2.SWEPT_B, figure2.GRID_B,
         "bits/dim improve with the depth of the ViT up to 5 (ImageNet-21k 32 x 32).", deeper_blocks,
         "Longer training and more seeds: few steps may favour shallow networks, and one learning rate serves all depths.",
         shown="figure2b"),
    Item("Figure 3: scaling", "scaling", figure3.SWEPT, figure3.GRID,
         "On the smaller set (ImageNet-1k) large models overfit; on the larger one (ImageNet-21k) more compute keeps helping.",
         overfitting_and_scaling, "Many more epochs of the smaller set. The training images are others than the test images: "
         "what counts is how the gap between them grows with the model, not the gap.", shown="figure3"),
    Item("Figure 4: which couplings", "ablate_coupling", figure4.SWEPT, figure4.GRID,
         "The official configuration takes 4 channel couplings to 1 spatial one, of mixed patterns; how much better it was "
         "(ImageNet-1k 64 x 64) is not known here.", official_couplings, "More couplings, so that ratios and patterns can "
         "differ, and longer training.", shown="figure4"),
    Item("Figure 5: samples", "draw_samples", figure5.SWEPT, figure5.GRID,
         "Samples at 32 and 64 pixels, from scratch and fine-tuned from ImageNet-21k.", None,
         "The paper's sizes. Nothing is measured here: a look at what such models have learnt.", tables.MAIN_VARYING, "figure5"),
    Item("Main table: from scratch or pretrained", "main_results", tables.MAIN_SWEPT, tables.MAIN_GRID,
         "Pretraining on a larger set, then fine-tuning, beats training from scratch.", pretraining,
         "The paper's sets. Below its scale what is fine-tuned has been trained for more steps in all than what begins from "
         "scratch, so that a gain says that other images are worth training on, not that they are worth as much.",
         tables.MAIN_VARYING),
    Item("Table 2a: masking or pairing", "ablate_splits", tables.SPLITS_SWEPT, tables.SPLITS_GRID,
         "It compares the two; the official model pairs. The values are not known here.", pairing_against_masking,
         "The paper's values and its masking: ours is our reading."),
    Item("Table 2b: ActNorm and invertible dense layers", "ablate_layers", tables.LAYERS_SWEPT, tables.LAYERS_GRID,
         "It compares the four; the official model has neither. The values are not known here.", layers_that_are_left_off,
         "Training to the end: both layers start well, and may help most in the first steps."))


def item_section(item, results_dir, deviations):
    """deviations: between seeds, by scale (seed_deviation)."""
    lines = [f"## {item.title}", "", f"**The paper:** {item.claim}", ""]
    found = [scale for scale in style.SCALES[1:] if (results_dir / f"{item.experiment}_{scale}.csv").exists()]
    for scale in found:
        path = results_dir / f"{item.experiment}_{scale}.csv"
        rows = final_rows(path, item.experiment, item.swept, item.grid, item.title.split(":")[0], item.varying)
        lines += measured(item, rows, scale, deviations[scale])
    lines += [f"Not run: {', '.join(scale for scale in style.SCALES[1:] if scale not in found)}. The command is `python "
              f"experiments/{item.experiment}.py --scale SCALE --data-root DIR`.", "",
              f"**To tell more:** {item.to_tell}", ""]
    return lines


def measured(item, rows, scale, seed_sd):
    """What a CSV shows."""
    test = rows[rows["split"] == "test"].drop_duplicates("run_id")
    seeds, sets = test["seed"].nunique(), []
    for name, mine in test.groupby("dataset", sort=False):
        sets.append(f"{style.dataset_title(name)} ({mine['num_images'].iloc[0]:,} test images): "
                    f"{mine['bits_per_dim'].min():.4f} to {mine['bits_per_dim'].max():.4f} bits/dim")
    commits = ", ".join(commit[:7] for commit in test["git_commit"].fillna("unknown").unique())
    lines = [f"**Ours, {scale} scale:** {len(test)} runs, {seeds} seed{'s' * (seeds > 1)}. {'; '.join(sets)}. "
             f"{test['train_seconds'].sum() / 60:.0f} minutes of training in all on "
             f"{', '.join(test['hardware'].fillna('unknown').unique())}; commit {commits}"
             f"{' (with changes)' * bool((test['git_dirty'] == 'True').any())}.", ""]
    if item.shown:
        lines += [f"![{item.title}](../paper_figures/out/{item.shown}_{scale}.png)", ""]
    differences = item.differences(rows, seed_sd) if item.differences else []
    if differences:
        verdicts = [difference.verdict for difference in differences if difference.wanted]
        counts = ", ".join(f"{verdicts.count(verdict)} {words}" for verdict, words in VERDICTS.items())
        lines += [f"Of {len(verdicts)} comparisons that speak to the claim: {counts}." if verdicts else
                  "No verdict on the paper: what it found is not known here.", "",
                  "| bits/dim | difference | s.e. | in s.e. | |", "| --- | --- | --- | --- | --- |",
                  *(difference.row() for difference in differences), ""]
        if not all(difference.sure for difference in differences):
            lines += ["The deviation between seeds at this scale is not known (Figure 4 with `--seeds 2` tells it): errors are "
                      "over the images alone, and no verdict is given.", ""]
    shares = test.dropna(subset="logdet_cap_share")
    if len(shares):
        top = shares.loc[shares["logdet_cap_share"].idxmax()]
        lines.append(f"The log-det of the nearest run to its cap ({top['run_id']}) is at {top['logdet_cap_share']:.1%} of it"
                     + (": **it saturates, and its number says little.**" if top["logdet_cap_share"] >= tables.SATURATED else "."))
    if len(shares) < len(test):
        lines.append("ActNorm and dense layers add to the log-det, so that runs with them have no such cap.")
    return lines + [""]


def model_section(folder):
    """The small trained model; nothing where there is none."""
    if (shipped := tables.read_shipped(folder)) is None:
        return []
    done, cap = shipped
    config, model = done["config"], done["config"]["model"]
    lines = ["## The small trained model", "",
             f"`assets/{folder.name}`: {model['num_couplings']} couplings x depth {model['block_depth']}, width "
             f"{model['emb_dim']}, {done['num_params']:,} parameters; {config['total_steps']:,} steps of "
             f"{config['batch_size']} images of {done['dataset']} in {done['train_seconds'] / 60:.0f} minutes on "
             f"{done['threads']} thread{'s' * (done['threads'] > 1)} of {done['hardware']}; commit {done['git_commit'][:7]}. "
             "Uniform dequantization, one draw, an upper bound.", "",
             "| step | test images | bits/dim | training images | bits/dim |", "| --- | --- | --- | --- | --- |"]
    for train, test in zip(done["rows"][::2], done["rows"][1::2]):
        cells = [f"{row['num_images']:,} | {row['bits_per_dim']:.4f} ± {row['bits_per_dim_se']:.4f}" for row in (test, train)]
        lines.append(f"| {test['step']:,} | {' | '.join(cells)} |")
    share = done["rows"][-1]["logdet_nats"] / cap
    return [*lines, "", "ActNorm or dense layers add to its log-det, which has no cap." if math.isnan(share) else
            f"Its log-det is at {share:.1%} of its cap.", ""]


def page(results_dir, assets_dir):
    """The whole page. Raises ResultsError for a CSV that must not be used."""
    deviations = {scale: seed_deviation(results_dir, scale) for scale in style.SCALES[1:]}
    known = "; ".join(f"{scale}: {value:.4f}" for scale, value in deviations.items() if not math.isnan(value))
    lines = [
        "# Results", "",
        "Written by `python paper_figures/redraw.py` from the CSVs beside it; [README.md](README.md) explains their columns.",
        "Small and medium scale are not the paper's: they show which of its comparisons come out in small models after little",
        "training, and how surely. There, a disagreement is no verdict on the paper, and an agreement no proof.", "",
        "A difference is one side minus the other, in bits/dim (lower is better). Its standard error adds, for each side, the",
        "standard error over the test images (as if each run had other images: too much, since they share images and noise)",
        f"and the deviation between seeds{f' ({known} bits/dim, pooled over the runs of Figure 4)' if known else ''} over the",
        f"root of their number. Below {SURE} standard errors we cannot tell. The comparisons of an item share runs, and their",
        "number is not corrected for. All are evaluated with the same one draw of dequantization noise per image.", "",
        *model_section(assets_dir / "jet_cifar10")]
    for item in ITEMS:
        lines += item_section(item, results_dir, deviations)
    return "\n".join(lines).rstrip() + "\n"


def write(results_dir=style.ROOT / "results", assets_dir=style.ROOT / "assets"):
    """Write RESULTS.md to the folder of the CSVs; returns its path."""
    return style.write_files({"RESULTS.md": page(Path(results_dir), Path(assets_dir)).encode()}, results_dir)[0]


def main(arguments=None):
    parser = style.make_parser(__file__, __doc__)
    parser.add_argument("--results-dir", type=Path, default=style.ROOT / "results", metavar="DIR", help="default: results")
    flags = parser.parse_args(arguments)
    with style.one_line_errors(parser.prog, flags.results_dir):
        print(write(flags.results_dir))


if __name__ == "__main__":
    main()
