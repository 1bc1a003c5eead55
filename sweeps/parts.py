"""What one command runs: an experiment's search of learning rates, its grid, what is beside it.

Each part is a grid with run folders and a CSV of its own. With --shard a part has those of its runs
that belong to the shard.
"""
import dataclasses
from pathlib import Path

from paper_figures.results_csv import read_csv
from sweeps.grid import Experiment, first_of, folder_of, make_runs
from sweeps.search import arms_of, runs_of_search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """grid: all runs; runs: those to be run here, or that were. csv: of all runs or the shard's."""
    experiment: Experiment
    scale: str
    grid: list
    runs: list
    runs_dir: Path
    csv: Path
    is_search: bool = False

    @property
    def name(self):
        return f"{self.experiment.name}_{self.scale}"

    def pieces(self, collecting):
        """CSVs whose rows are added to those of the runs here: of shards, when collecting.

        Of a search always, and what its CSV has: whoever has that need not search again.
        """
        pieces = sorted(self.csv.parent.glob(f"{self.csv.stem}.shard-*.csv"))
        if not self.is_search:
            return pieces if collecting else []
        run_ids = {run.run_id for run in self.grid}
        is_ours = self.csv.exists() and set(
            read_csv(self.csv, self.experiment.name, dtype=str)["run_id"]) <= run_ids
        return [self.csv, *pieces] if is_ours else pieces


def make_parts(experiment, flags):
    """The Parts of an experiment, in the order in which they are run. Raises ValueError."""
    scale, rates, parts, runs_dir = flags.scale, None, [], flags.runs_dir.absolute()

    def add(one, grid, is_search=False):
        parts.append(Part(experiment=one, scale=scale, grid=grid, runs=grid, is_search=is_search,
                          runs_dir=folder_of(one, scale, runs_dir),
                          csv=flags.results_dir / f"{one.name}_{scale}.csv"))
    if how := (experiment.runs_of or experiment).search.get(scale):
        search, runs, rates = runs_of_search(experiment, scale, runs_dir, flags.results_dir,
                                             flags.precision)
        add(search, runs, is_search=True)
    seeds = range(flags.seeds or experiment.seeds.get(scale, 1))
    for one, of_one in ((experiment, seeds), *((other, [0]) for other in experiment.also)):
        if one is experiment or one.configs(scale):
            add(one, make_runs(one, scale, of_one, folder_of(one, scale, runs_dir), flags.precision,
                               rates))
    if flags.shard:
        parts = shard(parts, flags.shard)
    if how:
        parts[0] = still_to_search(parts, how, rates)
    return parts


def still_to_search(parts, search, rates):
    """The search with the runs of the arms that are needed and not known, and what is done here."""
    needed = {run.arm for part in parts[1:] for run in part.runs}
    return dataclasses.replace(parts[0], runs=[
        run for arm, runs in arms_of(search, parts[0].grid).items() for run in runs
        if run.is_done or arm in needed and arm not in rates.factors])


def parse_shard(text):
    """"2/8" -> (2, 8). Raises ValueError."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--shard {text}: must be i/n with i from 1 to n, like 2/8")
    return int(part), int(parts)


def shard(parts, text):
    """Every n-th run of all grids but the search's, from the i-th on, with all that begin with it.

    Raises ValueError where there is none.
    """
    number, count = parse_shard(text)
    grid = [run for part in parts if not part.is_search for run in part.grid]
    firsts = [run for run in grid if not run.after]
    chosen = {run.folder for run in firsts[number - 1::count]}
    if not chosen:
        which = " that begin with no other's weights" if len(firsts) < len(grid) else ""
        raise ValueError(f"--shard {text}: the grid has only {len(firsts)} runs{which}")
    return [dataclasses.replace(
        part, csv=part.csv.with_suffix(f".shard-{number}-of-{count}.csv"),
        runs=[run for run in part.grid if part.is_search or first_of(run).folder in chosen])
        for part in parts]
