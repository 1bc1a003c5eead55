"""Runs the grid of an experiment, skips what is finished, resumes what is not, and collects a CSV.

The script of an experiment declares an Experiment, and main(experiment) does the rest, here or on a
cluster; one that does more (experiments/draw_samples.py) composes parse, carry_out and draw itself.
"""
import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from pathlib import Path

import torch

from data import sets_root
from harness.errors import TrainingError, UserError
from harness.files import locked, remove_leftovers, write_atomically
from harness.flags import ArgumentParser, one_line_errors
from harness.history import read_history
from harness.host import ROOT
from harness.place import Place, add_place_flags, place_from_flags
from harness.run_folder import CONFIG_NAME, has_checkpoint
from paper_figures import training
from paper_figures.per_image import read_per_image, write_per_image
from paper_figures.results_csv import SCALES, ResultsError, columns, read_csv, read_results
from sweeps import cluster, local, plan, watch
from sweeps.grid import Experiment
from sweeps.parts import make_parts
from sweeps.table import print_table

# Small models gain little from two threads, and threads that wait for a core which another process
# has cost a factor of ten; --jobs uses all cores
THREADS = {"smoke": 1, "small": 1, "medium": 2, "paper": 2}
DIRS = {"runs": "runs", "results": "results", "figures": "paper_figures/out"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What one command line asks for.

    parts: the search of learning rates, the experiment, what is beside it. settings: of sbatch.
    """
    program: str
    experiment: Experiment
    flags: argparse.Namespace
    place: Place
    parts: list
    settings: dict

    @property
    def own(self):
        """The part of the experiment itself."""
        return next(part for part in self.parts if part.experiment is self.experiment)

    @property
    def runs(self):
        """Those of all parts that are to be run here, or were."""
        return [run for part in self.parts for run in part.runs]


def main(experiment, arguments=None):
    """The command line of an experiment: run its grid, write its CSV, draw its figure."""
    parser = make_parser(experiment)
    with one_line_errors(parser.prog):
        sweep = parse(experiment, parser, arguments)
        if carry_out(sweep):
            draw(sweep)


def carry_out(sweep):
    """Plan, watch, or run and collect, as the flags say; whether the CSV is to be drawn now."""
    flags = sweep.flags
    if flags.dry_run:
        show_plan(sweep)
        return False
    if flags.collect or not is_watching(flags):
        refuse_other_precision(sweep)
    if is_watching(flags):
        watch_runs(sweep)
        if not flags.collect:
            return False
    on_slurm = flags.cluster == "slurm" and not flags.collect
    if on_slurm:
        cluster.check_slurm()
    if not flags.collect:
        local.check(sweep.runs, sweep.place, on_slurm)
    runs_dirs = [part.runs_dir for part in sweep.parts]
    for folder in (*runs_dirs, flags.results_dir, flags.figures_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if on_slurm:
        submit(sweep)
        return False
    return run_and_collect(sweep)


def draw(sweep):
    """Draw the figure or table from the CSV."""
    for path in sweep.experiment.draw(sweep.own.csv, sweep.flags.figures_dir):
        print(path)


# ---- parse

def make_parser(experiment):
    """The command line of an experiment."""
    parser = ArgumentParser(prog=f"{experiment.name}.py", description=experiment.description)
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="default: smoke")
    more = "".join(f", at {scale} scale {count}" for scale, count in experiment.seeds.items())
    parser.add_argument("--seeds", type=int, metavar="N",
                        help=f"seeds 0 to N-1 (default: 1{more})")
    parser.add_argument("--precision", choices=plan.GPU_PEAKS,
                        help="train all runs in it (default: the grid's own, bfloat16 at medium "
                             "and paper scale, else float32)")
    parser.add_argument("--shard", metavar="I/N",
                        help="run the I-th of N parts of the grid, into a CSV of its own")
    parser.add_argument("--cluster", choices=("local", "slurm", "debug"), default="local",
                        help="where runs are run: here, as jobs of a Slurm cluster, or only the "
                             "first that is not done, here, with its log (default: local)")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at a time with --cluster local, each in a process of its own "
                             "(default: as many as cores are idle, on GPUs one on each)")
    instead = parser.add_argument_group(
        "instead of running anything; any of them from any shell, with the same --scale, --seeds, "
        "--precision and --runs-dir")
    instead.add_argument("--dry-run", action="store_true",
                         help="list runs, parameters, cost, state and Slurm's settings")
    instead.add_argument("--images-per-s", type=float, metavar="X",
                         help="speed of one GPU, for the hours of --dry-run")
    for name, help in (("status", "what has become of each run"),
                       ("wait", "follow what is queued or running to its end"),
                       ("cancel", "cancel what is queued or running on Slurm"),
                       ("collect", "merge finished runs and the CSVs of shards, and draw; after "
                                   "--wait, if both are given")):
        instead.add_argument(f"--{name}", action="store_true", help=help)
    instead.add_argument("--plot", action="store_true", help="with --status or --wait: draw the "
                         "runs over each other, into their folder's runs.png and runs.pdf")
    add_place_flags(parser.add_argument_group(
        "how a run is run", "at medium and paper scale with 2 threads by default"))
    cluster.add_cluster_flags(parser.add_argument_group("with --cluster slurm"))
    for name, default in DIRS.items():
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR",
                            help=f"default: {default}")
    return parser


def parse(experiment, parser, arguments=None):
    """The Sweep that the arguments ask for. A mistake in them ends the program in one line."""
    flags = parser.parse_args(arguments)
    check_flags(parser, flags)
    place = place_from_flags(vars(flags), threads=THREADS[flags.scale])
    try:
        parts = make_parts(experiment, flags)
        settings = cluster.sbatch_settings(flags, place.threads)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        parser.error(str(error))
    return Sweep(program=parser.prog, experiment=experiment, flags=flags, place=place, parts=parts,
                 settings=settings)


def replan(sweep):
    """The same with the learning rates that are known now."""
    return dataclasses.replace(sweep, parts=make_parts(sweep.experiment, sweep.flags))


def is_watching(flags):
    return flags.status or flags.wait or flags.cancel or flags.collect


def check_flags(parser, flags):
    """End the program in one line for flags that do not go together."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("several processes at once run train.py; for a sweep, use --jobs or --cluster "
                     "slurm")
    for name in ("seeds", "jobs"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be 1 or more")
    if flags.images_per_s is not None and flags.images_per_s <= 0:
        parser.error(f"--images-per-s {flags.images_per_s}: must be above 0")
    if flags.plot and not (flags.status or flags.wait):
        parser.error("--plot: only with --status or --wait")
    if flags.images_per_s and not flags.dry_run:
        parser.error("--images-per-s: only with --dry-run")
    if flags.dry_run and is_watching(flags):
        parser.error("--dry-run: not together with --status, --wait, --cancel or --collect")
    if flags.cluster != "slurm" and not is_watching(flags):
        if given := cluster.given_cluster_flags(flags):
            parser.error(f"{', '.join(given)}: only with --cluster slurm")
    if flags.cluster != "local" and (flags.jobs or 1) > 1:
        parser.error(f"--jobs {flags.jobs}: only with --cluster local; on Slurm, --max-parallel "
                     "limits runs at a time")


# ---- plan and watch

def show_plan(sweep):
    """What --dry-run prints."""
    flags, settings = sweep.flags, sweep.settings
    is_cuda = sweep.place.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    grid = [run for part in sweep.parts for run in part.grid]
    plan.print_plan(sweep.runs, plan.trained(grid), device, flags.images_per_s,
                    settings["nodes"] * settings["ntasks_per_node"])
    if flags.cluster == "slurm":
        cluster.print_settings(settings, len(sweep.runs), flags.max_parallel)


def watch_runs(sweep):
    """Cancel, follow or list the runs. Ends the program with 1 where one has failed."""
    flags, runs = sweep.flags, sweep.runs
    if flags.cancel:
        count = cluster.cancel(runs)
        print(f"{count} jobs cancelled: the command that submitted them goes on from the last "
              "checkpoints" if count else "no run is queued or running on Slurm")
    if flags.status or flags.wait:
        statuses = watch.follow(runs) if flags.wait else watch.statuses(runs)
        watch.print_statuses(runs, statuses)
        if flags.plot:
            draw_runs(sweep)
        states = {status.state for status in statuses}
        has_failed = "failed" in states or flags.wait and states != {"done"}
        if has_failed and not flags.collect:
            sys.exit(1)


def draw_runs(sweep):
    """Draw the runs of each part that have begun, over each other, into their folder."""
    for part in sweep.parts:
        histories = {}
        for run in part.runs:
            try:
                if (run.folder / CONFIG_NAME).exists():
                    histories[run.label] = read_history(run.folder)
            except TrainingError as error:
                print(error, file=sys.stderr)
        title = f"{part.name}: {len(histories)} of {len(part.runs)} runs have begun"
        if histories:
            print(*training.draw([*histories.values()], [*histories], title, "runs", part.runs_dir),
                  sep="\n")
        else:
            print(title)


# ---- run

def run_and_collect(sweep):
    """Run what is not done (without --collect) and write the CSVs; whether to draw them now."""
    flags, unrecorded = sweep.flags, {}
    tell_runs(sweep)
    if not flags.collect:
        sweep, unrecorded = run_in_order(sweep)
    finished, collected = set(), set()
    for part in sweep.parts:
        pieces = part.pieces(flags.collect)
        runs = part.grid if part.is_search and not flags.shard else part.runs
        rows, per_image = collect(part.experiment, flags.scale, runs, part.csv, pieces)
        finished |= set(rows["run_id"])
        if not rows.empty:
            print_table(rows, part.experiment.swept, per_image)
        if not (rows.empty or part.is_search):
            collected.add(part.name)
    runs, own = sweep.runs, sweep.own
    failed = []
    if not flags.collect:
        failed = local.failures([run for run in runs if run.run_id not in finished], unrecorded)
    if failed and flags.cluster == "local":
        more = f"; and {len(failed) - 3} more: see --status" if len(failed) > 3 else ""
        sys.exit(f"{sweep.program}: error: {len(failed)} of {len(runs)} runs failed: "
                 f"{'; '.join(failed[:3])}{more}")
    # A shard may be beside the grid alone; of a grid that was collected, shards may be gone.
    is_known = own.name in collected or flags.collect and own.csv.exists()
    if not collected or own.runs and not is_known:
        sys.exit(f"{sweep.program}: error: no run of {flags.scale} scale has finished: nothing to "
                 "collect (without --collect, the same command runs them)")
    if failed:
        print(f"{len(runs) - len(failed)} of {len(runs)} runs are done: the figure is drawn when "
              "all are")
    return not (failed or flags.shard)


def tell_runs(sweep):
    """A line on what there is to do."""
    flags, runs = sweep.flags, sweep.runs
    state = f"{sum(run.is_done for run in runs)} of them done"
    if not flags.collect:
        if resumed := sum(has_checkpoint(run.folder) for run in runs if not run.is_done):
            state += f", {resumed} to be resumed"
        if flags.cluster != "debug" and (
                jobs := local.count_jobs(runs, sweep.place, flags.jobs)) > 1:
            state += f", {jobs} at a time"
    where = " and ".join(str(part.runs_dir) for part in sweep.parts)
    print(f"{sweep.experiment.name}, {flags.scale} scale: {len(runs)} runs in {where}, {state}")


def run_in_order(sweep):
    """Run what is not done; what awaits a learning rate as soon as its search is over.

    Returns (the Sweep with the rates that were found, {run id: why} as local.run_here does).
    """
    flags, unrecorded, tried = sweep.flags, {}, set()
    in_debug = flags.cluster == "debug"
    jobs = 1 if in_debug else local.count_jobs(sweep.runs, sweep.place, flags.jobs)
    while True:
        ready = [run for run in sweep.runs if not run.awaits]
        more, signals = local.run_here(ready, sweep.place, jobs, in_debug)
        if signals.stop:
            signals.end_program(f"{sweep.program}: stopped: the same command goes on")
        unrecorded |= more
        tried |= {run.run_id for run in ready}
        sweep = replan(sweep)
        if in_debug or tried >= {run.run_id for run in sweep.runs if not run.awaits}:
            return sweep, unrecorded


def submit(sweep):
    """Submit what is not done, running or queued, but what awaits the learning rate of its arm."""
    flags, runs, jobs, count = sweep.flags, sweep.runs, [], 0
    place = sweep.place
    if root := sets_root(place.data_root):  # a job's copy of the code has no sets/
        place = dataclasses.replace(place, data_root=os.path.abspath(root))
    if flags.gpus_per_node and place.device == "auto":
        place = dataclasses.replace(place, device="cuda")  # a node without it fails, and says so
    with locked(sweep.own.runs_dir / "submit.lock"):  # two would both submit what is not queued yet
        found = watch.statuses(runs)
        print(f"{sweep.experiment.name}, {flags.scale} scale: {len(runs)} runs in "
              f"{sweep.own.runs_dir}: {watch.count(found)}")
        known = {run.folder: status.state for run, status in zip(runs, found)}
        for part in sweep.parts:
            todo = [run for run in part.runs if not run.awaits
                    and known[run.folder] not in ("done", "running", "queued")]
            if todo:
                more, number = submit_in_order(part, todo, sweep.settings, place, flags)
                jobs, count = jobs + more, count + number
        if waiting := sum(run.awaits for run in runs):
            print(f"{waiting} runs await the search of their learning rates: give the same command "
                  "when it has ended (--wait)")
        if not jobs:
            return print("nothing to submit")
        each = " each" if len(jobs) > 1 else ""
        print(f"submitted {count} runs as job {', '.join(jobs)}, at most "
              f"{min(flags.max_parallel or count, count)} at a time{each}")
    print(f"from any shell: {same_command(flags)} --status (or --wait, --collect, --cancel)")


def submit_in_order(part, todo, settings, place, flags):
    """One job array, then one for all that begin with the weights of the same run.

    Returns (job ids, how many runs).
    """
    left, jobs, count = todo, [], 0
    while left:
        after = next(first for run in left if (first := awaited(run)) not in left)
        group = [run for run in left if awaited(run) == after]
        left = [run for run in left if run not in group]
        job = cluster.read_job(after) if after else None
        if after and not (job and job["job"]):
            print(f"{', '.join(run.label for run in group)}: not submitted, for {after.label}, "
                  "whose weights they begin with, is being trained here: give the same command "
                  "when it is done")
            continue
        jobs += cluster.submit(group, part.name, settings, place, part.runs_dir,
                               flags.max_parallel, flags.allow_dirty, job and job["job"])
        count += len(group)
    return jobs, count


def awaited(run):
    """The run whose weights this one begins with, while it is not done; else None."""
    return None if not run.after or run.after.is_done else run.after


def same_command(flags):
    """The command line that means the same runs."""
    defaults = {"scale": "smoke", "seeds": None, "precision": None, "shard": None}
    given = {name: getattr(flags, name) for name, default in defaults.items()
             if getattr(flags, name) != default}
    for name, default in DIRS.items():
        if (folder := getattr(flags, f"{name}_dir").absolute()) != ROOT / default:
            given[f"{name}-dir"] = folder
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", sys.argv[0], *words])


# ---- collect

def collect(experiment, scale, runs, csv, pieces=()):
    """Write the CSV of those of the runs that are finished, and beside it their values per image.

    pieces: CSVs of shards, whose rows of other runs of the grid are added. Returns the rows, and
    {run id: bits/dim (N,)} of the runs that have them.
    """
    import pandas as pd  # takes half a second: imported where it is used
    swept, varying, points = experiment.swept, experiment.varying, experiment.configs(scale)
    shared = {"experiment": experiment.name, "scale": scale, "grid_points": len(points)}
    rows, per_image = [], {}
    for run in runs:
        try:
            if run.is_done:
                rows += run.rows(shared)
                if (values := run.per_image) is not None:
                    per_image[run.run_id] = values
        except TrainingError as error:
            print(error, file=sys.stderr)
    rows = pd.DataFrame(rows, columns=columns(swept))
    run_ids = {run.run_id for run in runs}
    order = {tuple(point.values(swept).values()): place for place, point in enumerate(points)}
    for piece in pieces:
        extra = read_results(piece, experiment.name, swept, varying)
        if unknown := set(extra["run_id"]) - run_ids:
            raise ResultsError(f"{piece}: run {sorted(unknown)[0]} is not in this grid: give "
                               "--collect the same --seeds as the shards, or move the file away")
        if unknown := set(zip(*(extra[name] for name in swept))) - order.keys():
            raise ResultsError(f"{piece}: no run of this grid has {', '.join(swept)} = "
                               f"{', '.join(sorted(unknown)[0])}: run the shard again, or move the "
                               "file away")
        per_image = read_per_image(piece, extra) | per_image
        extra = extra[~extra["run_id"].isin(rows["run_id"])]
        rows = pd.concat([rows, extra]) if len(rows) else extra
    if rows.empty:
        return rows, {}
    rows = rows.assign(place=[order[point] for point in zip(*(rows[name] for name in swept))],
                       grid_points=len(points))  # a search may have been narrower in its shards
    rows = rows.sort_values(["seed", "place", "step", "split"]).drop(columns="place")
    with contextlib.suppress(ResultsError):
        before = read_results(csv, experiment.name, swept, varying)
        if dropped := set(before["run_id"]) - set(rows["run_id"]):
            print(f"{csv.name} had {len(dropped)} more runs (more --seeds?): they are not in it "
                  "now, their run folders stay")
    remove_leftovers(csv.parent, csv.name, older_than_s=3600)
    write_atomically(csv, rows.to_csv(index=False, lineterminator="\n"))
    print(csv)
    if per_image:
        print(write_per_image(csv, per_image))
    return rows, per_image


def refuse_other_precision(sweep):
    """Raise ResultsError where a CSV of this name, or a shard's, would lose runs in another one."""
    for part in sweep.parts:
        precision = part.grid[0].config.precision
        for path in sorted(sweep.flags.results_dir.glob(f"{part.name}.*csv")):
            found = set()
            with contextlib.suppress(OSError, ValueError):  # no CSV of ours: its reader refuses
                rows = read_csv(path, part.name, usecols=["precision"], dtype=str, na_values=[""])
                found = set(rows["precision"].dropna()) - {precision}
            if found:
                raise ResultsError(
                    f"{path}: holds runs in {' and '.join(sorted(found))}, and these are in "
                    f"{precision}: give another --results-dir and --figures-dir, or the "
                    "--precision of that file")
