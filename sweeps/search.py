"""The search of learning rates that a grid begins with: an epoch with each, for each of its arms.

Its runs are a grid of their own, <experiment>_search, on images that no other run is tested on.
Where the best rate of an arm is the highest or the lowest tried, the next one is tried, too, until
the best lies inside.
"""
import contextlib
import dataclasses
import math

from harness.errors import TrainingError
from harness.run_folder import read_error
from paper_figures.results_csv import read_results
from sweeps.grid import Experiment, Point, folder_of, make_runs, steps

DATA, EPOCHS = "cifar10-search", 1
WIDEST = 6  # rates more than planned: what is best at an end then, no rate will do better soon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """arm: the fields by which arms are told apart; the points of one have a rate in common.

    factors: what is tried, times each point's own rate, three or more, ascending. of: {field:
    value} of the points that may stand for their arm; the first of them does.
    """
    arm: tuple[str, ...]
    factors: tuple[float, ...]
    of: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rates:
    """factors: {arm: what multiplies the rate of its points}, of those whose search is over.

    tried: {arm: factors} of those whose search is wider than the Search says.
    """
    fields: tuple[str, ...]
    factors: dict
    tried: dict = dataclasses.field(default_factory=dict)

    def arm_of(self, point):
        return tuple(point.values(self.fields).values())

    def factor(self, point):
        return self.factors.get(self.arm_of(point))


def search_of(experiment, scale, tried=None):
    """The Experiment whose points are the arms of another and of what is beside it, at each rate.

    tried: {arm: factors} where these are not the Search's. None where nothing is searched at this
    scale.
    """
    owner = experiment.runs_of or experiment
    if not (search := owner.search.get(scale)):
        return None

    def configs(scale):
        arms = {}
        for one in (owner, *owner.also):
            for point in one.configs(scale):
                if point.values(search.of) == search.of:
                    arms.setdefault(tuple(point.values(search.arm).values()), point)
        return [Point(config=searched(point.config, factor), labels=point.values(search.arm))
                for arm, point in arms.items()
                for factor in (tried or {}).get(arm, search.factors)]
    return Experiment(
        name=f"{owner.name}_search", description=owner.description,
        configs=configs, swept=(*search.arm, "lr"), draw=None,
        varying=("num_couplings", "block", "block_depth", "emb_dim", "patch_size"))


def searched(config, factor):
    """The configuration of a run of the search, for a point's own."""
    return dataclasses.replace(config, data=DATA, lr=config.lr * factor,
                               total_steps=steps(DATA, EPOCHS, config.batch_size))


def arms_of(search, runs):
    """{arm: its runs, by rate} of all runs of a search."""
    arms = {}
    for run in runs:
        arms.setdefault(tuple(run.points[0][name] for name in search.arm), []).append(run)
    return arms


def bits_in_csvs(experiment, scale, results_dir):
    """{run_id: test bits/dim} of the runs of a search whose numbers its CSVs have."""
    bits = {}
    for csv in sorted(results_dir.glob(f"{experiment.name}_{scale}*.csv")):
        rows = read_results(csv, experiment.name, experiment.swept, experiment.varying)
        test = rows[(rows["split"] == "test") & (rows["step"] == rows["total_steps"])]
        bits |= dict(zip(test["run_id"], test["bits_per_dim"]))
    return bits


def bits_in_folders(runs):
    """The same of the runs that are over; infinity where numbers were not finite."""
    bits = {}
    for run in runs:
        with contextlib.suppress(TrainingError):  # a damaged result: its status says so
            if done := run.done:
                bits[run.run_id] = done["bits_per_dim"]
            elif "not finite" in (read_error(run.folder) or ""):
                bits[run.run_id] = math.inf
    return bits


def runs_of_search(experiment, scale, runs_dir, results_dir, precision=None):
    """(the search of an experiment, its runs, the Rates found): widened as what is known asks."""
    how, tried = (experiment.runs_of or experiment).search[scale], {}
    search = search_of(experiment, scale)
    bits = bits_in_csvs(search, scale, results_dir)
    while True:
        runs = make_runs(search, scale, [0], folder_of(search, scale, runs_dir), precision)
        rates = find_rates(how, runs, bits | bits_in_folders(runs), tried)
        if rates.tried == tried:
            return search, runs, rates
        tried = rates.tried
        search = search_of(experiment, scale, tried)


def find_rates(search, runs, bits, tried=None):
    """The Rates of the arms whose runs are all over, one of them finite and the best inside."""
    factors, tried = {}, dict(tried or {})
    for arm, of_arm in arms_of(search, runs).items():
        own, found = tried.get(arm, search.factors), [bits.get(run.run_id) for run in of_arm]
        if None in found or min(found) == math.inf:
            continue
        best, is_widest = found.index(min(found)), len(own) == len(search.factors) + WIDEST
        if best not in (0, len(own) - 1) or is_widest or min(found) in found[1:-1]:
            factors[arm] = own[best]
        elif best:
            tried[arm] = (*own, own[-1] * own[-1] / own[-2])
        else:
            tried[arm] = (own[0] * own[0] / own[1], *own)
    return Rates(search.arm, factors, tried)
