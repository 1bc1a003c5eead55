"""How surely points of a grid differ: paired over images, and over seeds, for all that is compared.

For each seed, the mean over images of the difference, with its error (ddof 1). Over seeds, a
two-sided t interval, with the variance between seeds pooled over the arms: the runs of a grid that
differ in more than the seed. Holm's rule at 5 % corrects the p values of what is compared together.
"""
import dataclasses
import math

import numpy as np

LEVEL = 0.05
COLUMNS = ("bits/dim", "difference", "s.e. over images", "95 % interval", "p, Holm")


def two_sided(t, df):
    """P(|T| > |t|) of Student's t with df degrees of freedom: Abramowitz and Stegun 26.7.3-4."""
    angle = math.atan2(abs(t), math.sqrt(df))
    cos2, first = math.cos(angle) ** 2, 3 if df % 2 else 2
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(first, df - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    if df % 2:
        within = 2 / math.pi * (angle + (within if df > 1 else 0))
    return max(0.0, 1 - within)


def quantile(df, level=LEVEL):
    """The t beyond which that share of Student's distribution lies, on both sides together."""
    low, high = 0.0, 1.0
    while two_sided(high, df) > level:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if two_sided(middle, df) > level else (low, middle)
    return high


def holm(p_values):
    """Adjusted p values: below LEVEL is what counts when all are tested together (Holm 1979)."""
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What is compared: a sum of bits/dim of points, each times its weight.

    weights: {point: weight}. wanted: the sign that the paper's claim implies; 0 where it is not
    known to say. gap: of the differences between test and training images, instead of the test's.
    """
    name: str
    weights: dict
    wanted: int = 0
    gap: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """A Contrast as measured; nan is not known.

    by_seed: [(value, its error over images)]. value: their mean. low, high: the t interval.
    p: of zero; holm: adjusted for all that was compared with it.
    """
    contrast: Contrast
    by_seed: list
    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    holm: float = math.nan

    @property
    def error(self):
        """The largest of the seeds' errors over images."""
        return max(error for _, error in self.by_seed)

    @property
    def is_sure(self):
        return self.holm < LEVEL


class Arms:
    """The final bits/dim of the points of a grid: rows of a CSV, images: {run_id: (N,)}."""

    def __init__(self, rows, swept, images):
        test = rows[rows["split"] == "test"]
        self.points, self.images = {}, {run: np.asarray(values, np.float64)
                                        for run, values in images.items()}
        for row in test.sort_values("seed").itertuples():
            point = tuple(getattr(row, name) for name in swept)
            self.points.setdefault(point, []).append(row.run_id)
        self.test = {row.run_id: self.images[row.run_id].mean() if row.run_id in self.images
                     else row.bits_per_dim for row in test.itertuples()}
        train = rows[rows["split"] == "train"]
        train = dict(zip(train["run_id"], train["bits_per_dim"]))
        self.gap = {run: value - train.get(run, math.nan) for run, value in self.test.items()}

    def scores(self, contrast):
        return self.gap if contrast.gap else self.test

    def pooled(self, scores):
        """(variance between seeds, degrees of freedom), pooled over the arms."""
        arms = {tuple(runs): [scores[run] for run in runs] for runs in self.points.values()}
        df = sum(len(values) - 1 for values in arms.values())
        squares = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in arms.values())
        return (squares / df if df else math.nan), df

    def pooled_test(self):
        return self.pooled(self.test)

    def of_seed(self, contrast, place):
        """(value, error over images) of one seed."""
        weights = {self.points[point][place]: weight for point, weight in contrast.weights.items()}
        value = sum(weight * self.scores(contrast)[run] for run, weight in weights.items())
        if contrast.gap or not set(weights) <= self.images.keys():
            return value, math.nan
        each = sum(weight * self.images[run] for run, weight in weights.items())
        count = len(each)
        return value, each.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan

    def measure(self, contrast):
        seeds = {len(self.points[point]) for point in contrast.weights}
        by_seed = [self.of_seed(contrast, place) for place in range(min(seeds))]
        value = float(np.mean([one for one, _ in by_seed]))
        variance, df = self.pooled(self.scores(contrast))
        if not df or not variance > 0:
            return Finding(contrast, by_seed, value)
        error = math.sqrt(variance * sum(weight ** 2 / len(self.points[point])
                                         for point, weight in contrast.weights.items()))
        reach = quantile(df) * error
        return Finding(contrast, by_seed, value, value - reach, value + reach,
                       two_sided(value / error, df))


def cells(finding):
    """The COLUMNS of a Finding as text; what is not known is empty."""
    is_tested = not math.isnan(finding.p)
    return (finding.contrast.name, f"{finding.value:+.4f}",
            "" if math.isnan(finding.error) else f"{finding.error:.5f}",
            f"{finding.low:+.4f} to {finding.high:+.4f}" if is_tested else "",
            f"{finding.holm:.2g}" if is_tested else "")


def compare(rows, swept, images, contrasts):
    """The Findings of those of the contrasts whose points are all there, tested together."""
    arms = Arms(rows, swept, images)
    found = [arms.measure(contrast) for contrast in contrasts
             if contrast.weights.keys() <= arms.points.keys()]
    tested = [place for place, one in enumerate(found) if not math.isnan(one.p)]
    for place, adjusted in zip(tested, holm([found[place].p for place in tested])):
        found[place] = dataclasses.replace(found[place], holm=adjusted)
    return found
