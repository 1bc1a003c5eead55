"""The stage medium of .ci/gpu: runs of the grids of medium or small scale, as many as end in time.

Of small scale the search of learning rates comes first, of each experiment in turn. A run whose id
stands in a committed CSV of that scale, or in a shard of one, is not run again. What has finished
goes into <experiment>_<scale>.shard-<digest of the run ids>.csv, which --collect merges once it
lies in results/.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import math
import multiprocessing.connection
import os
import statistics
import tarfile
import time
import types

from gpu_stage import MAX_BYTES, ROOT, end_process

ORDER = ("compare_vit_cnn", "ablate_block_depth", "ablate_coupling", "ablate_layers",
         "ablate_splits", "main_results", "scaling")
PLAIN_CSVS = 4  # beside done.json, log.txt and the packed run folders; the packed file has all
# With steps as CUDA graphs one run fills an H100 (medium's largest ViT: 44 ms a step alone, 137 ms
# beside two others); eager ones wait for the host, and several at a time feed it.
MAX_EAGER_JOBS, GIB_A_RUN, CORES_A_RUN = 4, 12, 2
ASSUMED_SHARE = 0.05  # of an H100's peak, by all runs together, before a run has finished here
ASSUMED_CPU = 1e8  # FLOP/s of a rehearsal
START_S, MARGIN = 20, 1.2  # imports, images, the first step; on predicted times
PACKED = ("config.json", "done.json", "log.txt", "metrics.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has finished here."""
    run: object
    done: dict  # its done.json
    seconds: float  # in all
    at_a_time: float = 1.0  # runs at work while it was, itself among them, in the mean


def check(flags):
    """Raise, in one line, for what no run could begin with."""
    from data import load_images
    for name in flags.experiments:
        for part in parts_of(load(name, tiny=False), flags.scale or "medium", ROOT / "runs"):
            finished_elsewhere(part)
    if flags.device != "cpu":
        load_images("cifar10", "train", flags.data_root)


def load(name, tiny):
    """The Experiment of a script; tiny: its grids as a rehearsal trains them."""
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    if not tiny:
        return experiment
    return dataclasses.replace(
        experiment, configs=lambda scale: shrink(experiment.configs(scale), experiment.swept),
        also=tuple(dataclasses.replace(one, configs=lambda scale, one=one: shrink(
            one.configs(scale), one.swept, 1000)) for one in experiment.also))


def finished_elsewhere(part):
    """The run ids in the CSV of a part of an experiment and in its shards."""
    from paper_figures.results_csv import read_results
    experiment = part.experiment
    return {run_id for path in sorted(part.csv.parent.glob(f"{part.name}*.csv")) for run_id in
            read_results(path, experiment.name, experiment.swept, experiment.varying)["run_id"]}


def parts_of(experiment, scale, runs_dir):
    """The Parts of an experiment, with the learning rates that are known by now."""
    from sweeps.parts import make_parts
    return make_parts(experiment, argparse.Namespace(
        scale=scale, seeds=None, shard=None, precision=None, runs_dir=runs_dir,
        results_dir=ROOT / "results"))


def shrink(points, swept, first=0):
    """The same grid, of models and steps that a CPU trains in a moment, on the embedded images."""
    small, numbers = {}, {}
    for point in points:
        config, model = point.config, point.config.model
        model = dataclasses.replace(model, patch_size=8, num_couplings=min(2, model.num_couplings),
                                    block_depth=1, emb_dim=16, num_heads=2)
        # different runs stay different, though they may differ in size alone
        number = numbers.setdefault((config.hash, id(point.after)), first + len(numbers) + 1)
        config = dataclasses.replace(
            config, model=model, data="cifar10-subset-vehicles", batch_size=4, precision="float32",
            total_steps=min(2, config.total_steps), clip_norm=number)
        small[id(point)] = dataclasses.replace(
            point, config=config, after=point.after and small[id(point.after)],
            labels=point.values(swept))
    return list(small.values())


def is_orphan(run, skipped):
    """Whether a run begins with weights that were trained elsewhere, and are not here."""
    return run.after is not None and (run.after.run_id in skipped or is_orphan(run.after, skipped))


def evaluation_flops(config):
    from data import SETS
    from harness.flops import forward_flops
    from train import TRAIN_ROW_IMAGES
    test = SETS[config.data].counts["test"]
    return forward_flops(config.model) * (test + min(TRAIN_ROW_IMAGES, test))


def predict(run, finished, at_a_time, device):
    """Seconds that a run takes as one of so many at a time, with a margin.

    By those that have finished here, of the same kind of block where there are any; before, by a
    cautious share of the peak. Runs share the GPU: the fewer are beside one, the faster it is.
    """
    from harness.flops import train_flops
    from sweeps.plan import GPU_PEAKS, measured_rate
    config, flops = run.config, evaluation_flops(run.config)
    assumed = {precision: ASSUMED_CPU if device == "cpu" else ASSUMED_SHARE * peak
               for precision, peak in GPU_PEAKS.items()}
    extra_s = START_S + at_a_time * flops / assumed["float32"]
    finished = [one for one in finished
                if one.run.config.model.block == config.model.block] or finished
    if finished:
        def ratio(one):
            return flops / evaluation_flops(one.run.config)
        nearest = min(finished, key=lambda one: abs(math.log(ratio(one))))
        extra_s = max(0, nearest.seconds - nearest.done["train_seconds"])
        extra_s *= max(1, ratio(nearest))
    alone = [one.done | {"train_seconds": one.done["train_seconds"] / one.at_a_time}
             for one in finished]
    rate = measured_rate(config, alone) or assumed[config.precision]
    return MARGIN * (at_a_time * train_flops(config) / rate + extra_s)


def choose(todo, done_ids, left_s, seconds_of):
    """The first run that can begin now and end in time, or None. seconds_of(run): the prediction.

    A run that others begin with counts as long as all of them: they could not follow later.
    """
    from sweeps.grid import first_of
    for run in todo:
        if run.after and run.after.run_id not in done_ids:
            continue
        chain = [run] if run.after else [run, *(other for other in todo if other is not run
                                                and first_of(other).run_id == run.run_id)]
        if sum(map(seconds_of, chain)) <= left_s:
            return run
    return None


def default_jobs(device, free_gib, cores, graph=False):
    if device == "cpu":
        return max(1, min(2, cores))
    most = 1 if graph else MAX_EAGER_JOBS
    return max(1, min(most, int(free_gib // GIB_A_RUN), cores // CORES_A_RUN))


def train_run(run, place):
    """What the process of a run does. The run folder says why it has failed."""
    from harness.place import Place
    from train import train
    train(run.config, run.folder, place=Place(**place), init_from=run.init_from, quiet=True)


def run_grid(stage, todo, jobs, place, finished):
    """Run what ends in time; returns the runs that never began. finished: [Finished], added to."""
    from harness.run_folder import read_progress
    todo, works = list(todo), []  # works: the runs that a process is at
    while stage.left_s:
        for work in [work for work in works if not work.process.is_alive()]:
            works.remove(work)
            take_in(stage, work, finished)
            drop_weights(finished, [*todo, *(other.run for other in works)])
        while len(works) < jobs and (run := choose(
                todo, {one.run.run_id for one in finished}, stage.left_s,
                lambda run: predict(run, finished, len(works) + 1, stage.device))):
            todo.remove(run)
            process = stage.start("gpu_medium", "train_run", run, place)
            works.append(types.SimpleNamespace(run=run, process=process, begun=time.monotonic(),
                                               at_a_time=[]))
        if not works:
            break
        for work in works:
            work.at_a_time.append(len(works))
        multiprocessing.connection.wait([work.process.sentinel for work in works], 0.5)
    for work in works:
        end_process(work.process)
        step, *_ = read_progress(work.run.folder)
        leave_out(stage, work.run, f"stopped at step {step} of {work.run.config.total_steps}: "
                  f"{stage.stopped_by or 'the time was up'}", " (begun)")
    return todo


def take_in(stage, work, finished):
    """A process has ended."""
    from harness.run_folder import read_error
    seconds, run = time.monotonic() - work.begun, work.run
    end_process(work.process)
    if done := run.done:
        finished.append(Finished(run=run, done=done, seconds=seconds,
                                 at_a_time=statistics.mean(work.at_a_time)))
        stage.say(f"{title(run)}: {done['bits_per_dim']:.4f} bits/dim, "
                  f"{done['train_seconds']:.1f} s of training, {seconds:.1f} in all")
    else:
        why = read_error(run.folder) or f"its process has ended ({work.process.exitcode})"
        stage.failed.append(f"{title(run)}: {why}")
        stage.say(f"{title(run)}: failed: {why}")


def title(run):
    return f"{run.folder.parent.name}: {run.label}"


def leave_out(stage, run, why, kind=""):
    """kind: of the runs of an experiment that are one line of the table."""
    stage.leave_out(title(run), why, f"{run.folder.parent.name}{kind}")


def drop_weights(finished, unfinished):
    """Remove the checkpoints of finished runs that none of the unfinished ones begins with."""
    needed = {run.after.run_id for run in unfinished if run.after}
    for run in [one.run for one in finished if one.run.run_id not in needed]:
        for path in run.folder.glob("checkpoint*.pt"):
            path.unlink()


def write_csvs(stage, parts, finished):
    """Write a shard's CSV of each part with finished runs, the first ones into OUT, too.

    Returns their names.
    """
    from sweeps.sweep import collect
    done_ids, names = {one.run.run_id for one in finished}, []
    (stage.work / "results").mkdir(exist_ok=True)
    for part in parts:
        if not (runs := [run for run in part.grid if run.run_id in done_ids]):
            continue
        csv = stage.work / "results" / shard_name(part.name, [run.run_id for run in runs])
        with open(stage.log, "a") as log, contextlib.redirect_stdout(log):
            collect(part.experiment, part.scale, runs, csv)
        if len(names) < PLAIN_CSVS:
            (stage.out / csv.name).write_bytes(csv.read_bytes())
        names.append(csv.name)
    if len(names) > PLAIN_CSVS:
        stage.leave_out(f"{len(names) - PLAIN_CSVS} CSVs", "in medium_runs.tar.gz alone: at most "
                        f"{PLAIN_CSVS} lie beside it")
    return names


def shard_name(name, run_ids):
    """A name that --collect finds, and that no CSV of other runs has. name: experiment_scale."""
    digest = hashlib.sha256("\n".join(sorted(run_ids)).encode()).hexdigest()[:8]
    return f"{name}.shard-{digest}.csv"


def pack(path, work, runs, max_bytes=MAX_BYTES):
    """Pack finished runs' folders, without checkpoints, and all CSVs, as in the repository.

    Where that is too large, without metrics.csv; returns whether it has them.
    """
    for names in (PACKED, PACKED[:-1]):
        files = [run.folder / name for run in runs for name in names]
        with tarfile.open(path, "w:gz") as tar:
            csvs = sorted([*work.glob("results/*.csv"), *work.glob("results/per_image/*.npz")])
            for file in filter(os.path.exists, [*files, *csvs]):
                tar.add(file, str(file.relative_to(work)))
        if path.stat().st_size <= max_bytes:
            break
    return names == PACKED


def run_experiment(stage, experiment, jobs, place, finished):
    """Run what ends in time, an experiment's search first; returns (its Parts, ids in CSVs)."""
    tried, is_search = set(), True
    while True:
        parts = parts_of(experiment, stage.scale, stage.work / "runs")
        skipped = {run_id for part in parts for run_id in finished_elsewhere(part)}
        runs = [run for part in parts if part.is_search == is_search for run in part.runs
                if run.run_id not in skipped | tried and not run.is_done]
        if is_search and not runs:  # nor a rate beyond the best
            is_search = False
            continue
        tried |= {run.run_id for run in runs}
        todo = []
        for run in runs:
            if run.awaits:
                leave_out(stage, run, "awaits the search of its rate", " (rates)")
            elif is_orphan(run, skipped):
                leave_out(stage, run, "begins with weights that are in no folder here, of "
                          f"{run.after.label}", " (weights)")
            else:
                todo.append(run)
        for run in run_grid(stage, todo, jobs, place, finished):
            seconds = predict(run, finished, 1, stage.device)
            why = stage.stopped_by or f"takes about {seconds:.0f} s: no time"
            if run.after and not run.after.is_done:
                why = f"begins with the weights of {run.after.label}, which has not finished"
            leave_out(stage, run, why)
        if not is_search:
            return parts, skipped


def run(stage, flags):
    """The stage medium; returns the body of its table."""
    jobs = flags.jobs or default_jobs(stage.device, stage.seen["free_gib"],
                                      len(os.sched_getaffinity(0)), flags.graph)
    place = {"device": stage.device, "threads": 1 if stage.rehearsal else 2,
             "checkpoint_every_s": 3600, "compile": bool(flags.compile), "graph": flags.graph}
    if stage.rehearsal:
        from sweeps import search
        search.DATA, search.EPOCHS = "cifar10-subset-vehicles", 0.01
    stage.say(f"{stage.scale} scale, {jobs} runs at a time")
    finished, parts, skipped = [], [], set()
    for name in [name for name in ORDER if name in flags.experiments]:
        more, elsewhere = run_experiment(stage, load(name, stage.rehearsal), jobs,
                                         place | {"data_root": flags.data_root}, finished)
        parts, skipped = parts + more, skipped | elsewhere
    done_ids = {one.run.run_id for one in finished}
    csvs, runs = write_csvs(stage, parts, finished), [one.run for one in finished]
    if finished and not pack(stage.out / "medium_runs.tar.gz", stage.work, runs):
        stage.leave_out("metrics.csv of the packed runs", "the packed file would be too large")
    ids = {run.run_id for part in parts for run in part.grid}
    if ids - skipped and not finished and not stage.failed:
        stage.failed.append("medium: no run has finished")
    seconds = [{"run_id": one.run.run_id, "seconds": round(one.seconds, 1),
                "train_seconds": round(one.done["train_seconds"], 1),
                "at_a_time": round(one.at_a_time, 2)} for one in finished]
    stage.more |= {"jobs": jobs, "csvs": csvs, "place": place, "finished": seconds}
    lines = [f"{'experiment':27}{'runs':>6}{'in CSVs':>9}{'finished':>10}{'not run':>9}"]
    for part in parts:
        ids = {run.run_id for run in part.grid}
        here, there = len(ids & done_ids), len(ids & skipped)
        lines.append(f"{part.experiment.name:27}{len(ids):6}{there:9}{here:10}"
                     f"{len(ids) - here - there:9}")
    training = sum(one.done["train_seconds"] for one in finished)
    return [*lines, f"{jobs} runs at a time; {training:.0f} s of training in {len(finished)} runs"]
