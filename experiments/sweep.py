"""Runs the grid of an experiment, skips what is finished, resumes what is not, and collects a CSV.

An experiment declares a pure function configs(scale) -> [Point]; main() does the rest, here or on a cluster.
"""
import collections
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import SETS, load_images
from experiments import cluster, watch
from jet import Jet, JetConfig, forward_flops
from paper_figures import style
from paper_figures.results_csv import KEY, ResultsError, columns, read_results
from run_folder import (DONE_NAME, ERROR_NAME, BusyError, is_running, locked, one_line, read_done, read_error, record_error,
                        remove_leftovers, write_atomically)
from train import (ArgumentParser, Requests, TrainConfig, TrainingError, add_place_flags, check_place, hardware,
                   one_line_errors, pick_device, place_options, train)

THREADS = {"smoke": 1, "small": 1, "medium": 2, "paper": 2}  # small models gain little from two, and threads that
# wait for a core which another process has cost more than a factor of ten; --jobs uses all cores
# FLOP/s of an H100 SXM, dense, by its data sheet; the precisions that a grid can be trained in
GPU_PEAKS = {"float32": 67e12, "bfloat16": 989e12, "float64": 67e12}
GPU_SHARE = 0.4  # of that peak (assumed): the goal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid: its value of each swept field, and the configuration for seed 0.

    after: the point whose final weights it begins with; it has to come before this one in its grid.
    """
    labels: dict
    config: TrainConfig
    after: "Point | None" = None

    def run(self, seed, runs_dir, precision=None):
        """The run of a seed; one that begins with another's weights takes those of the same seed.

        precision: of both; None is the configuration's own.
        """
        after = self.after and self.after.run(seed, runs_dir, precision)
        config = dataclasses.replace(
            self.config, seed=seed, precision=precision or self.config.precision,
            **({"init": after.config.hash} if after else {}))
        return Run(point=self, config=config, runs_dir=runs_dir, after=after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a grid: a point and a seed."""
    point: Point
    config: TrainConfig
    runs_dir: Path
    after: "Run | None" = None

    @property
    def name(self):
        """The values of the swept fields, like "4:1 row" or "vit emb_dim=64"; "any" for what makes no difference."""
        return " ".join("any" if value.count("|") > 2 else f"{field}={value}" if value.isdigit() else value
                        for field, value in self.point.labels.items())

    @property
    def label(self):
        return f"{self.name} seed {self.config.seed}"

    @property
    def run_id(self):
        name = self.name.replace(" ", "_").replace(":", "to").replace("|", "=")
        return f"{name}_seed{self.config.seed}_{self.config.hash}"

    @property
    def folder(self):
        return self.runs_dir / self.run_id

    @property
    def is_done(self):
        """Whether it has a result; a damaged one counts: it is told, and not trained again."""
        return (self.folder / DONE_NAME).exists()

    @property
    def init_from(self):
        """Where its first weights are, or None."""
        return self.after.folder if self.after else None

    def rows(self, experiment, scale):
        """The CSV rows of a finished run: what the process that measured them has recorded."""
        done, config, model = read_done(self.folder), self.config, self.config.model
        fixed = {name: done.get(name) for name in columns(()) if name in done}
        fixed |= {name: getattr(config, name) for name in ("batch_size", "total_steps", "lr", "precision", "init", "seed")}
        fixed |= {name: getattr(model, name) for name in ("num_couplings", "block", "block_depth", "emb_dim",
                                                          "patch_size")}
        fixed |= {"experiment": experiment, "scale": scale, "run_id": self.run_id, **self.point.labels,
                  "channel_share": channel_share(model), "train_flops": train_flops(config)}
        return [{**fixed, **{name: row[name] for name in ("step", "split", "bits_per_dim", "bits_per_dim_se",
                                                          "num_images")},
                 "images_seen": row["step"] * config.batch_size,
                 "fingerprint": done[f"{row['split']}_fingerprint"],
                 "logdet_cap_share": logdet_cap_share(model, row["logdet_nats"])} for row in done["rows"]]


def channel_share(model):
    """The realised share of channel couplings."""
    return sum(kind == "channels" for kind, _ in model.coupling_splits) / model.num_couplings


def logdet_cap_share(model, logdet_nats):
    """log-det as a share of the most that the couplings can reach; None where other layers add to it."""
    if model.actnorm or model.invertible_dense or model.scale_factor <= 1:
        return None
    return logdet_nats / model.logdet_cap_nats


def num_parameters(model):
    """Trainable parameters: all couplings have equally many."""
    return model.num_couplings * _coupling_parameters(dataclasses.replace(model, num_couplings=1))


@functools.cache
def _coupling_parameters(model):
    with torch.device("meta"):  # without memory
        return sum(parameter.numel() for parameter in Jet(model).parameters())


def train_flops(config):
    """Three times the forward pass, by definition (backward counts two), over all images seen."""
    return 3 * forward_flops(config.model) * config.batch_size * config.total_steps


def first_of(run):
    """The run at the start of a chain of runs, each of which begins with the weights of the one before."""
    return first_of(run.after) if run.after else run


def parse_shard(text):
    """"2/8" -> (2, 8). Raises ValueError."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--shard {text}: must be i/n with i from 1 to n, like 2/8")
    return int(part), int(parts)


def steps(name, epochs, batch_size=TrainConfig.batch_size):
    """Optimizer steps that show each training image of a set so many times; ImageNet-21k counts as 13 million."""
    return round(epochs * (SETS[name].counts["train"] or 13_000_000) / batch_size)


def at_paper_scale(config, epochs=None):
    """The configuration for its image set as in the paper: 256 tokens, 200 epochs, of ImageNet-21k 50.

    The networks are in bfloat16: the official run multiplies in it, a TPU's default precision, with
    parameters, affine map and log-det in float32.
    """
    size = SETS[config.data].shape[0]
    epochs = epochs or (50 if config.data.startswith("imagenet21k") else 200)
    model = dataclasses.replace(config.model, image_size=size, patch_size=size // 16)
    return dataclasses.replace(config, model=model, precision="bfloat16",
                               total_steps=steps(config.data, epochs, config.batch_size))


def gpu_hours(flops, precision):
    """Hours of an H100 for so many FLOPs, at the share of its peak that is assumed."""
    return flops / GPU_SHARE / GPU_PEAKS[precision] / 3600


def number(value):
    """"1,273", "60.6", "0.0123": three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def flops_per_s(result):
    """Training FLOP/s of each process of a finished run. result: what done.json holds."""
    flops = train_flops(TrainConfig.from_dict(result["config"]))
    return flops / result["train_seconds"] / (result.get("processes") or 1)


def measured_rate(config, done):
    """The training FLOP/s that a process of a run (on GPUs: a GPU) may expect; None where nothing tells.

    Those of the finished run whose FLOPs per image are nearest, by ratio; of several such runs, their
    median. done: what done.json holds of runs on one kind of hardware; where some of them are in the
    config's precision, only those count.
    """
    done = [result for result in done if result["config"]["total_steps"]]  # else it was only evaluated
    done = [result for result in done if result["config"]["precision"] == config.precision] or done
    if not done:
        return None
    wanted = forward_flops(config.model)
    far = [abs(math.log(forward_flops(JetConfig(**result["config"]["model"])) / wanted))
           for result in done]
    return statistics.median(flops_per_s(result) for result, distance in zip(done, far)
                             if distance == min(far))


def trained(runs):
    """What done.json holds of those of the runs that were trained to their end."""
    results = []
    for run in runs:
        with contextlib.suppress(TrainingError):  # damaged: its status tells
            results.append(read_done(run.folder))
    return [result for result in results if result and result["config"]["total_steps"]]


def on_one_hardware(done, device):
    """Those of the finished runs that count, and their kind of hardware, (device type, name).

    It is the device's where there are any, else the one with most of them.
    """
    kinds = collections.Counter((result["device"], result["hardware"]) for result in done)
    here = device.type, hardware(device)
    kind = here if here in kinds else max(kinds, key=kinds.get)
    return [result for result in done if (result["device"], result["hardware"]) == kind], kind


def print_plan(runs, done, device, images_per_s, processes):
    """Runs, sizes and cost.

    done: what done.json holds of finished runs, which tell the hours, rather of those on the device's
    kind of hardware. images_per_s: of one GPU, instead of them.
    """
    found = watch.statuses(runs)
    flops = [train_flops(run.config) for run in runs]
    same_images = len({(run.config.data, run.config.total_steps, run.config.batch_size) for run in runs}) == 1
    images = {} if same_images else {"images": [run.config.data for run in runs],
                                     "steps": [f"{run.config.total_steps:,}" for run in runs]}
    plan = pd.DataFrame({
        "run": [run.name for run in runs], "seed": [run.config.seed for run in runs], **images,
        "channel share": [f"{channel_share(run.config.model):.3f}" for run in runs],
        "parameters": [f"{num_parameters(run.config.model):,}" for run in runs],
        "training FLOPs": [f"{value:.3g}" for value in flops],
        "GPU-hours": [number(gpu_hours(value, run.config.precision)) for value, run in zip(flops, runs)],
        "state": [status.state for status in found]})
    print(plan.to_string(index=False))
    config = runs[0].config
    each = f"each {config.total_steps:,} steps of {config.batch_size:,} images of {config.data}; " if same_images else ""
    print(f"{len(runs)} runs ({watch.count(found)}), {each}{sum(flops):.3g} training FLOPs in all")
    precision = config.precision
    other = "" if precision == "bfloat16" else f"; {number(gpu_hours(sum(flops), 'bfloat16'))} in bfloat16"
    print(f"{number(gpu_hours(sum(flops), precision))} GPU-hours in all: computed, not measured, for an H100 at "
          f"{GPU_SHARE:.0%} (assumed) of its peak in {precision}{other}")
    left = [(run.config, (run.config.total_steps - status.step) * run.config.batch_size)
            for run, status in zip(runs, found)]
    print(hours_to_go(left, done, device, images_per_s)
          + (f"; {processes} processes to a run" if processes > 1 else ""))


def hours_to_go(left, done, device, images_per_s):
    """The line that tells the hours of training of [(config, images that it has yet to see)]."""
    if images_per_s:
        seconds, unit = sum(images for _, images in left) / images_per_s, "GPU-hours"
        source = f"at {images_per_s:,.0f} images/s a GPU (given)"
    elif done:
        mine, (kind, name) = on_one_hardware(done, device)
        seconds = sum(3 * forward_flops(config.model) * images / measured_rate(config, mine)
                      for config, images in left if images)
        rates = [flops_per_s(result) for result in mine]
        unit, one = ("GPU-hours", "GPU") if kind == "cuda" else ("CPU-process-hours", "process")
        others = len(done) - len(mine)
        source = (f"each run as fast as the one nearest in FLOPs an image (measured in {len(mine)} runs "
                  f"that are done, on {name}: {min(rates):.3g} to {max(rates):.3g} FLOP/s a {one}"
                  + (f"; {others} on other hardware do not count)" if others else ")"))
    else:
        return ("measured hours: not known before a run is done here; --images-per-s N tells them from "
                "the speed of one GPU")
    hours = seconds / 3600
    return f"{hours:,.{1 if hours >= 10 else 3}f} {unit} to go, of training, {source}"


def print_table(rows, swept):
    """The finished runs, those on equal images together, best first."""
    train_bits = rows[rows["split"] == "train"].set_index(["run_id", "step"])["bits_per_dim"]
    test = rows[rows["split"] == "test"].sort_values(["dataset", "bits_per_dim"])
    table = test[[*swept, "seed"]].replace({name: {r"(.+\|){3}.+": "any"} for name in swept}, regex=True).assign(**{
        "channel share": test["channel_share"].map("{:.3f}".format),
        "bits/dim": test["bits_per_dim"].map("{:.4f}".format),
        "+- s.e.": test["bits_per_dim_se"].map("{:.4f}".format),
        "train": [f"{train_bits.get(key, math.nan):.4f}" for key in zip(test["run_id"], test["step"])],
        "logdet/cap": ["" if pd.isna(share) else f"{share:.1%}" for share in test["logdet_cap_share"]],
        "seconds": test["train_seconds"].map("{:.1f}".format)})
    print(table.to_string(index=False))


def run_all(runs, place, requests, labels=True):
    """Run what is not done, one after the other; a run that another process is at is waited for.

    Where one fails, its error.txt says why, and the others go on. Returns {run id: why} of those whose folder
    could not take it.
    """
    width, waiting, told, untold = max(len(run.label) for run in runs), list(runs), [], {}
    while waiting and not requests.stop:
        for number, run in [(runs.index(run) + 1, run) for run in waiting]:
            if requests.stop:
                break
            if run.is_done or read_error(run.folder):
                waiting.remove(run)
                continue
            if run in told and is_running(run.folder):
                continue
            if run.after and not run.after.is_done:
                if run.after not in waiting:  # it failed
                    waiting.remove(run)
                continue
            label = f"[{number:{len(str(len(runs)))}}/{len(runs)}] {run.label:{width}}"
            try:
                train(run.config, run.folder, init_from=run.init_from, label=label, requests=requests, quiet=not labels,
                      **place)
            except BusyError as error:
                if labels and run not in told:
                    print(f"{run.label}: waiting for another process ({error})")
                told.append(run)
                continue
            except Exception as error:
                if not is_running(run.folder):
                    record_error(run.folder, error)  # where it came before train() had the folder
                if not read_error(run.folder):
                    untold[run.run_id] = one_line(error)
                if labels:
                    print(f"{run.label}: {one_line(error)} ({run.folder})", file=sys.stderr)
            if not requests.stop:
                waiting.remove(run)
        if waiting and not requests.stop:
            time.sleep(0.5)
    return untold


class _WorkerRequests(Requests):
    """A worker stops when its parent is gone, too."""
    parent = None

    @property
    def stop(self):
        return self._stop or os.getppid() != self.parent

    @stop.setter
    def stop(self, value):
        self._stop = value


def _work(runs, place, parent):
    requests = _WorkerRequests(quiet=True)
    requests.parent = parent
    with contextlib.suppress(KeyboardInterrupt), requests.on():
        for line in run_all(runs, place, requests, labels=False).values():
            print(line, file=sys.stderr)


def run_in_parallel(runs, place, jobs, requests):
    """Run what is not done in so many processes, which share the runs out by their claims."""
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count() if place["device"] in ("auto", "cuda") else 0
    places = [place | ({"device": f"cuda:{number % gpus}"} if gpus else {}) for number in range(jobs)]
    workers = [context.Process(target=_work, args=(runs, place, os.getpid())) for place in places]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, until a worker has its own
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    watch.follow(runs, lambda found: requests.stop or not any(worker.is_alive() for worker in workers), every_s=0.5)
    for worker in workers:
        if requests.stop and worker.is_alive():
            worker.terminate()  # stops it with a checkpoint
        worker.join()


def failures(runs, untold):
    """A line for each run that has not finished, and why."""
    lines = []
    for run in runs:
        try:
            if read_done(run.folder) is None:
                first = run.after and not run.after.is_done
                why = read_error(run.folder) or untold.get(run.run_id) or (
                    f"{run.after.label}, whose weights it begins with, has not finished" if first else "not finished")
                lines.append(f"{run.label}: {why} ({run.folder})")
        except TrainingError as error:
            lines.append(f"{run.label}: {error}")
    return lines


def collect(runs, experiment, scale, swept, csv, pieces=(), varying=()):
    """Write the CSV of the finished runs, and of rows measured elsewhere (shards); returns its rows."""
    rows = []
    for run in runs:
        try:
            rows += run.rows(experiment, scale) if run.is_done else []
        except TrainingError as error:
            print(error, file=sys.stderr)
    rows = pd.DataFrame(rows, columns=columns(swept))
    order = {run.run_id: position for position, run in enumerate(runs)}
    for piece in pieces:
        extra = read_results(piece, experiment, swept, varying)
        if unknown := set(extra["run_id"]) - set(order):
            raise ResultsError(f"{piece}: run {sorted(unknown)[0]} is not in this grid: give --collect the same "
                               "--seeds as the shards, or move the file away")
        rows = pd.concat([rows, extra[~extra["run_id"].isin(rows["run_id"])]] if len(rows) else [extra])
    if rows.empty:
        return rows
    rows = rows.sort_values(KEY, key=lambda column: column.map(order) if column.name == "run_id" else column)
    with contextlib.suppress(ResultsError):
        dropped = set(read_results(csv, experiment, swept, varying)["run_id"]) - set(rows["run_id"])
        if dropped:
            print(f"{csv.name} had {len(dropped)} more runs (more --seeds?): they are not in it now, their run folders stay")
    remove_leftovers(csv.parent, csv.name, older_than_s=3600)
    write_atomically(csv, rows.to_csv(index=False, lineterminator="\n"))
    print(csv)
    return rows


def refuse_other_precision(runs, folder, name):
    """Raise ResultsError where a CSV of this name, or a shard's, would lose runs of another precision."""
    mine = runs[0].config.precision
    for path in sorted(folder.glob(f"{name}.*csv")):
        found = set()
        with contextlib.suppress(OSError, ValueError):  # no CSV of ours: it is told where it is read
            rows = pd.read_csv(path, usecols=["precision"], dtype=str)
            found = set(rows["precision"].dropna()) - {mine}
        if found:
            raise ResultsError(f"{path}: holds runs in {' and '.join(sorted(found))}, and these are in {mine}: "
                               "give another --results-dir and --figures-dir, or the --precision of that file")


def make_parser(experiment, description):
    """The command line of an experiment."""
    parser = ArgumentParser(prog=f"{experiment}.py", description=description)
    parser.add_argument("--scale", choices=style.SCALES, default="smoke", help="default: smoke")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    parser.add_argument("--precision", choices=GPU_PEAKS, help="train all runs in it "
                        "(default: the grid's own, bfloat16 at medium and paper scale, else float32)")
    parser.add_argument("--shard", metavar="I/N", help="run the I-th of N parts of the grid, into a CSV of its own")
    parser.add_argument("--cluster", choices=("local", "slurm", "debug"), default="local",
                        help="where runs are run: here, as jobs of a Slurm cluster, or only the first that is not done, "
                        "here, with its log (default: local)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time with --cluster local, each in a "
                        "process of its own (default: 1)")
    instead = parser.add_argument_group("instead of running anything; any of them from any shell, with the same "
                                        "--scale, --seeds, --precision and --runs-dir")
    instead.add_argument("--dry-run", action="store_true", help="list runs, parameters, cost, state and Slurm's settings")
    instead.add_argument("--images-per-s", type=float, metavar="X", help="speed of one GPU, for the hours of --dry-run")
    instead.add_argument("--status", action="store_true", help="what has become of each run")
    instead.add_argument("--wait", action="store_true", help="follow what is queued or running to its end")
    instead.add_argument("--cancel", action="store_true", help="cancel what is queued or running on Slurm")
    instead.add_argument("--collect", action="store_true",
                         help="merge finished runs and the CSVs of shards, and draw; after --wait, if both are given")
    add_place_flags(parser.add_argument_group("how a run is run"), "1 at smoke and small scale, else 2")
    cluster.add_cluster_flags(parser.add_argument_group("with --cluster slurm"))
    for name, default in (("runs", "runs"), ("results", "results"), ("figures", "paper_figures/out")):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR",
                            help=f"default: {default}")
    return parser


def main(experiment, description, configs, swept, draw, arguments=None, *, varying=(), runs_of=None, add_flags=None,
         check_flags=lambda flags: None, finish=None):
    """The command line of an experiment: run the grid (or a shard), write its CSV, draw its figure.

    varying: what may differ between runs besides the swept fields (results_csv.read_results). runs_of: another
    experiment whose run folders are used. add_flags(parser): more flags, which check_flags(flags) refuses by
    TrainingError. finish(runs, flags): what is made of the runs, once all are done, before the figure.
    """
    parser = make_parser(experiment, description)
    if add_flags:
        add_flags(parser)
    flags = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("several processes at once run train.py; for a sweep, use --jobs or --cluster slurm")
    with one_line_errors(parser.prog, ResultsError, cluster.ClusterError):
        for name in ("seeds", "jobs"):
            if getattr(flags, name) < 1:
                parser.error(f"--{name} {getattr(flags, name)}: must be 1 or more")
        if flags.images_per_s is not None and flags.images_per_s <= 0:
            parser.error(f"--images-per-s {flags.images_per_s}: must be above 0")
        if flags.images_per_s and not flags.dry_run:
            parser.error("--images-per-s: only with --dry-run")
        if flags.dry_run and (flags.status or flags.wait or flags.cancel or flags.collect):
            parser.error("--dry-run: not together with --status, --wait, --cancel or --collect")
        watching = flags.status or flags.wait or flags.cancel or flags.collect
        if flags.cluster != "slurm" and not watching and (given := cluster.given_cluster_flags(flags)):
            parser.error(f"{', '.join(given)}: only with --cluster slurm")
        if flags.cluster != "local" and flags.jobs > 1:
            parser.error(f"--jobs {flags.jobs}: only with --cluster local; on Slurm, --max-parallel limits runs at a time")
        check_flags(flags)
        flags.threads = THREADS[flags.scale] if flags.threads is None else flags.threads
        runs_dir = flags.runs_dir.absolute() / f"{runs_of or experiment}_{flags.scale}"
        grid = [point.run(seed, runs_dir, flags.precision)
                for seed in range(flags.seeds) for point in configs(flags.scale)]
        runs, csv = grid, flags.results_dir / f"{experiment}_{flags.scale}.csv"
        try:
            if flags.shard:
                part, parts = parse_shard(flags.shard)
                firsts = [run for run in grid if not run.after]  # what begins with a run's weights stays with it
                runs = [run for run in grid if first_of(run) in firsts[part - 1::parts]]
                csv = csv.with_suffix(f".shard-{part}-of-{parts}.csv")
                if not runs:
                    raise ValueError(f"--shard {flags.shard}: the grid has only {len(firsts)} runs"
                                     + (" that begin with no other's weights" if len(firsts) < len(grid) else ""))
            settings = cluster.sbatch_settings(flags, flags.threads)
        except ValueError as error:
            parser.error(str(error))
        if flags.dry_run:
            cuda = flags.device != "cpu" and torch.cuda.is_available()
            print_plan(runs, trained(grid), torch.device("cuda" if cuda else "cpu"),
                       flags.images_per_s, settings["nodes"] * settings["ntasks_per_node"])
            if flags.cluster == "slurm":
                cluster.print_settings(settings, len(runs), flags.max_parallel)
            return
        if flags.collect or not watching:
            refuse_other_precision(grid, flags.results_dir, f"{experiment}_{flags.scale}")
        if flags.cancel:
            number = cluster.cancel(runs)
            print(f"{number} jobs cancelled: the command that submitted them goes on from the last checkpoints" if number
                  else "no run is queued or running on Slurm")
        if flags.status or flags.wait:
            found = watch.follow(runs) if flags.wait else watch.statuses(runs)
            watch.print_statuses(runs, found)
            bad = [status for status in found if status.state == "failed" or flags.wait and status.state != "done"]
            if bad and not flags.collect:
                sys.exit(1)
        if watching and not flags.collect:
            return
        for folder in (runs_dir, flags.results_dir, flags.figures_dir):
            folder.mkdir(parents=True, exist_ok=True)
        if flags.cluster == "slurm" and not flags.collect:
            return submit(experiment, runs, runs_dir, flags, settings)
        print(f"{experiment}, {flags.scale} scale: {len(runs)} runs in {runs_dir}, "
              f"{sum(run.is_done for run in runs)} of them done")
        untold = {} if flags.collect else run_here(parser.prog, runs, flags)
        pieces = sorted(flags.results_dir.glob(f"{csv.stem}.shard-*.csv")) if flags.collect else ()
        rows = collect(runs, experiment, flags.scale, swept, csv, pieces, varying)
        if not rows.empty:
            print_table(rows, swept)
        finished = set(rows["run_id"])
        failed = [] if flags.collect else failures([run for run in runs if run.run_id not in finished], untold)
        if failed and flags.cluster == "local":
            more = f"; and {len(failed) - 3} more: see --status" if len(failed) > 3 else ""
            sys.exit(f"{parser.prog}: error: {len(failed)} of {len(runs)} runs failed: {'; '.join(failed[:3])}{more}")
        if rows.empty:
            sys.exit(f"{parser.prog}: error: no run of {flags.scale} scale has finished: nothing to collect (without "
                     "--collect, the same command runs them)")
        if flags.cluster == "debug" and failed:
            return print(f"{len(runs) - len(failed)} of {len(runs)} runs are done: the figure is drawn when all are")
        if not flags.shard:
            if finish and all(run.is_done for run in runs):
                finish(runs, flags)
            for path in draw(csv, flags.figures_dir):
                print(path)


def check_runs(runs, flags):
    """Raise for settings and images that no run could begin with."""
    check_place(flags.threads, flags.micro_batch, flags.checkpoint_activations, flags.checkpoint_every_s)
    for data in {run.config.data for run in runs}:
        load_images(data, "train", flags.data_root)


def run_here(program, runs, flags):
    """Run what is not done in this process, or in --jobs of them; with --cluster debug the first, with its log.

    Returns what run_all does.
    """
    place, untold = place_options(vars(flags)), {}
    todo = [run for run in runs if not run.is_done]
    if not todo:
        return {}
    pick_device(flags.device)  # what is wrong with all runs is told once, and no run begins
    check_runs(todo, flags)
    for run in todo:
        if not is_running(run.folder):
            for path in (run.folder / ERROR_NAME, run.folder / cluster.JOB_NAME):
                with contextlib.suppress(OSError):  # train() tells what is wrong with a folder
                    path.unlink()
    with Requests().on() as requests:
        if flags.cluster == "debug":
            run = todo[0]
            print(f"{run.label}: {run.folder}")
            train(run.config, run.folder, init_from=run.init_from, label=run.label, requests=requests, echo=True, **place)
        elif flags.jobs > 1 and len(todo) > 1:
            run_in_parallel(todo, place, min(flags.jobs, len(todo)), requests)
        else:
            untold = run_all(runs, place, requests)
    if requests.stop:
        sys.exit(f"{program}: stopped: the same command goes on")
    return untold


def submit(experiment, runs, runs_dir, flags, settings):
    """Submit what is not done, running or queued."""
    cluster.check_slurm()
    check_runs(runs, flags)
    root = flags.data_root or os.environ.get("JET_DATA")
    place = place_options(vars(flags)) | ({"data_root": os.path.abspath(root)} if root else {})
    if flags.gpus_per_node and flags.device == "auto":
        place["device"] = "cuda"  # what was asked for: on a node without it the run fails, and says so
    with locked(runs_dir / "submit.lock"):  # two at once would both submit what is not queued yet
        found = watch.statuses(runs)
        todo = [run for run, status in zip(runs, found) if status.state not in ("done", "running", "queued")]
        print(f"{experiment}, {flags.scale} scale: {len(runs)} runs in {runs_dir}: {watch.count(found)}")
        if not todo:
            return print("nothing to submit")

        def awaited(run):
            return None if not run.after or run.after.is_done else run.after
        left, jobs, submitted = todo, [], 0
        while left:  # one job array; then one for those that begin with the weights of the same run
            after = next(awaited(run) for run in left if awaited(run) not in left)
            group = [run for run in left if awaited(run) == after]
            job = cluster.read_job(after) if after else None
            if after and not (job and job["job"]):
                print(f"{', '.join(run.label for run in group)}: not submitted, for {after.label}, whose weights they begin "
                      "with, is being trained here: give the same command when it is done")
                left = [run for run in left if run not in group]
                continue
            jobs.append(cluster.submit(group, f"{experiment}_{flags.scale}", settings, place, runs_dir, flags.max_parallel,
                                       flags.allow_dirty, job and job["job"]))
            left = [run for run in left if run not in group]
            submitted += len(group)
        print(f"submitted {submitted} runs as job {', '.join(jobs)}, at most "
              f"{min(flags.max_parallel or submitted, submitted)} at a time" + (" each" if len(jobs) > 1 else ""))
    same = f"python {sys.argv[0]}" + "".join(f" --{name} {value}" for name, value, default in (
        ("scale", flags.scale, "smoke"), ("seeds", flags.seeds, 1),
        ("precision", flags.precision, None),
        ("shard", flags.shard, None), ("runs-dir", flags.runs_dir, ROOT / "runs"),
        ("results-dir", flags.results_dir, ROOT / "results"),
        ("figures-dir", flags.figures_dir, ROOT / "paper_figures/out")) if value != default)
    print(f"from any shell: {same} --status (or --wait, --collect, --cancel)")
