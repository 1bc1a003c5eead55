"""Runs the grid of an experiment, skips what is finished, resumes what is not, and collects a CSV.

An experiment declares a pure function configs(scale) -> [Point]; main() does the rest.
"""
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from convert import CHECKPOINT_NAME
from jet import Jet, forward_flops
from paper_figures.results_csv import KEY, ResultsError, columns, read_results
from train import (ArgumentParser, NonFiniteError, TrainConfig, TrainingError, add_place_flags, one_line_errors,
                   place_options, read_done, train, write_atomically)

SCALES = ("smoke", "small", "medium", "paper")
THREADS = {"smoke": 1, "small": 2, "medium": 2, "paper": 2}  # smoke models gain little from two, and threads
# that wait for a core which another process has cost more than a factor of ten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid: its value of each swept field, and the configuration for seed 0."""
    labels: dict
    config: TrainConfig

    def run(self, seed, runs_dir):
        return Run(point=self, config=dataclasses.replace(self.config, seed=seed), runs_dir=runs_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a grid: a point and a seed."""
    point: Point
    config: TrainConfig
    runs_dir: Path

    @property
    def name(self):
        """The values of the swept fields, like "4:1 row"; "any" for what makes no difference."""
        return " ".join("any" if value.count("|") > 2 else value for value in self.point.labels.values())

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
    def state(self):
        """done, started or new."""
        if read_done(self.folder) is not None:
            return "done"
        return "started" if (self.folder / CHECKPOINT_NAME).exists() else "new"

    def rows(self, experiment, scale):
        """The CSV rows of a finished run: what the process that measured them has recorded."""
        done, config, model = read_done(self.folder), self.config, self.config.model
        fixed = {name: done.get(name) for name in columns(()) if name in done}
        fixed |= {name: getattr(config, name) for name in ("batch_size", "total_steps", "lr", "precision", "seed")}
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
    """Trainable parameters: all couplings have equally many, so one is built, without memory."""
    with torch.device("meta"):
        one = Jet(dataclasses.replace(model, num_couplings=1))
    return model.num_couplings * sum(parameter.numel() for parameter in one.parameters())


def train_flops(config):
    """Three times the forward pass, by definition (backward counts two), over all images seen."""
    return 3 * forward_flops(config.model) * config.batch_size * config.total_steps


def parse_shard(text):
    """"2/8" -> (2, 8). Raises ValueError."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--shard {text}: must be i/n with i from 1 to n, like 2/8")
    return int(part), int(parts)


def print_plan(runs):
    plan = pd.DataFrame({
        "run": [run.name for run in runs], "seed": [run.config.seed for run in runs],
        "channel share": [f"{channel_share(run.config.model):.3f}" for run in runs],
        "parameters": [f"{num_parameters(run.config.model):,}" for run in runs],
        "training FLOPs": [f"{train_flops(run.config):.3g}" for run in runs],
        "state": [run.state for run in runs]})
    print(plan.to_string(index=False))
    config, counts = runs[0].config, plan["state"].value_counts()
    print(f"{len(runs)} runs ({', '.join(f'{count} {state}' for state, count in counts.items())}), each "
          f"{config.total_steps:,} steps of {config.batch_size:,} images of {config.data}; "
          f"{sum(train_flops(run.config) for run in runs):.3g} training FLOPs in all")


def print_table(rows, swept):
    """The finished runs, best first."""
    train_bits = rows[rows["split"] == "train"].set_index(["run_id", "step"])["bits_per_dim"]
    test = rows[rows["split"] == "test"].sort_values("bits_per_dim")
    table = test[[*swept, "seed"]].replace({name: {r"(.+\|){3}.+": "any"} for name in swept}, regex=True).assign(**{
        "channel share": test["channel_share"].map("{:.3f}".format),
        "bits/dim": test["bits_per_dim"].map("{:.4f}".format),
        "+- s.e.": test["bits_per_dim_se"].map("{:.4f}".format),
        "train": [f"{train_bits.get(key, math.nan):.4f}" for key in zip(test["run_id"], test["step"])],
        "logdet/cap": test["logdet_cap_share"].map("{:.1%}".format),
        "seconds": test["train_seconds"].map("{:.1f}".format)})
    print(table.to_string(index=False))


def run_all(runs, place):
    """Run what is not done, in this process, one after the other; a line for each run that failed."""
    failed, width = [], max(len(run.label) for run in runs)
    for number, run in enumerate(runs, 1):
        if run.state == "done":
            continue
        try:
            label = f"[{number:{len(str(len(runs)))}}/{len(runs)}] {run.label:{width}}"
            train(run.config, run.folder, label=label, **place)
        except NonFiniteError as error:  # this run's own fault: the others go on
            failed.append(f"{run.label}: {error} ({run.folder})")
            print(failed[-1], file=sys.stderr)
    return failed


def collect(runs, experiment, scale, swept, csv, pieces=()):
    """Write the CSV of the finished runs, and of rows measured elsewhere (shards); returns its rows."""
    rows = pd.DataFrame([row for run in runs if run.state == "done" for row in run.rows(experiment, scale)],
                        columns=columns(swept))
    order = {run.run_id: position for position, run in enumerate(runs)}
    for piece in pieces:
        extra = read_results(piece, experiment, swept)
        if unknown := set(extra["run_id"]) - set(order):
            raise ResultsError(f"{piece}: run {sorted(unknown)[0]} is not in this grid: give --collect the same "
                               "--seeds as the shards, or move the file away")
        rows = pd.concat([rows, extra[~extra["run_id"].isin(rows["run_id"])]] if len(rows) else [extra])
    if rows.empty:
        return rows
    rows = rows.sort_values(KEY, key=lambda column: column.map(order) if column.name == "run_id" else column)
    with contextlib.suppress(ResultsError):
        dropped = set(read_results(csv, experiment, swept)["run_id"]) - set(rows["run_id"])
        if dropped:
            print(f"{csv.name} had {len(dropped)} more runs (more --seeds?): they are not in it now, their run folders stay")
    write_atomically(csv, rows.to_csv(index=False, lineterminator="\n"))
    print(csv)
    return rows


def main(experiment, description, configs, swept, draw, arguments=None):
    """The command line of an experiment: run the grid (or a shard), write its CSV, draw its figure."""
    parser = ArgumentParser(prog=f"{experiment}.py", description=description)
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="default: smoke")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    parser.add_argument("--shard", metavar="I/N", help="run the I-th of N parts of the grid, into a CSV of its own")
    parser.add_argument("--dry-run", action="store_true", help="list runs, parameters, FLOPs and state; run nothing")
    parser.add_argument("--collect", action="store_true",
                        help="run nothing; merge finished runs and the CSVs of shards, and draw")
    add_place_flags(parser, "1 at smoke scale, else 2")
    for name, default in (("runs", "runs"), ("results", "results"), ("figures", "paper_figures/out")):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR",
                            help=f"default: {default}")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, ResultsError):
        if flags.seeds < 1:
            parser.error(f"--seeds {flags.seeds}: must be 1 or more")
        runs_dir = flags.runs_dir / f"{experiment}_{flags.scale}"
        grid = [point.run(seed, runs_dir) for seed in range(flags.seeds) for point in configs(flags.scale)]
        runs, csv = grid, flags.results_dir / f"{experiment}_{flags.scale}.csv"
        if flags.shard:
            try:
                part, parts = parse_shard(flags.shard)
            except ValueError as error:
                parser.error(str(error))
            runs = grid[part - 1::parts]
            if not runs:
                parser.error(f"--shard {flags.shard}: the grid has only {len(grid)} runs")
            csv = csv.with_suffix(f".shard-{part}-of-{parts}.csv")
        if flags.dry_run:
            return print_plan(runs)
        for folder in (runs_dir, flags.results_dir, flags.figures_dir):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"{experiment}, {flags.scale} scale: {len(runs)} runs in {runs_dir}, "
              f"{sum(run.state == 'done' for run in runs)} of them done")
        flags.threads = THREADS[flags.scale] if flags.threads is None else flags.threads
        failed = [] if flags.collect else run_all(runs, place_options(vars(flags)))
        pieces = sorted(flags.results_dir.glob(f"{csv.stem}.shard-*.csv")) if flags.collect else ()
        rows = collect(runs, experiment, flags.scale, swept, csv, pieces)
        if not rows.empty:
            print_table(rows, swept)
        if failed:
            sys.exit(f"{parser.prog}: error: {len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
        if rows.empty:
            sys.exit(f"{parser.prog}: error: no run of {flags.scale} scale has finished: nothing to collect (without "
                     "--collect, the same command runs them)")
        if not flags.shard:
            for path in draw(csv, flags.figures_dir):
                print(path)
