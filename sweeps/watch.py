"""What has become of the runs of a grid, from their folders and Slurm's queue, in any shell."""
import collections
import contextlib
import dataclasses
import datetime
import functools
import time

import pandas as pd
from tqdm import tqdm

from harness.errors import TrainingError
from harness.files import time_there
from harness.run_folder import (LOG_NAME, has_checkpoint, is_running, read_error, read_progress,
                                seconds_without_line)
from sweeps import cluster

STATES = ("done", "running", "queued", "failed", "cancelled", "stopped", "new")  # in this order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """state: done; running, queued (now); failed, cancelled, stopped (with a checkpoint); new."""
    state: str
    step: int = 0
    bits_per_dim: str = ""
    left_s: float | None = None
    note: str = ""


def statuses(runs):
    """The Status of each run. Raises ClusterError where Slurm has runs and cannot be asked."""
    queue = cluster.read_queue([run for run in runs if not run.is_done])
    clock = functools.cache(time_there)  # one file is written, however many runs there are
    return [_status(run, queue.get(run.folder), clock) for run in runs]


def _status(run, entry, clock):
    """entry: (state, reason, job id) in Slurm's queue, or None. clock: files.time_there."""
    folder, total = run.folder, run.config.total_steps
    try:
        if done := run.done:
            cost = f"{done['train_seconds']:.0f} s"
            if done.get("peak_memory_gib"):
                cost += f", {done['peak_memory_gib']:.2f} GiB"
            return Status(state="done", step=total, bits_per_dim=f"{done['bits_per_dim']:.4f}",
                          note=cost)
    except TrainingError as error:
        return Status(state="failed", note=str(error))
    step, bits, seconds = read_progress(folder)
    known = {"step": step, "bits_per_dim": f"{bits:.3f} (batch)" if step else ""}
    if is_running(folder) or entry and entry[0] in cluster.RUNNING:
        left_s = (total - step) * seconds / step if step else None
        notes = [f"job {entry[2]}"] if entry else []
        silent_s = seconds_without_line(folder, clock(run.runs_dir))
        if silent_s > max(60, 5 * seconds / max(1, step)):
            notes.append(f"no step for {silent_s:.0f} s")
        return Status(state="running", left_s=left_s, note=", ".join(notes), **known)
    if entry:
        reason = "" if entry[1] == "None" else f" ({entry[1]})"
        return Status(state="queued", note=f"job {entry[2]}{reason}", **known)
    if error := read_error(folder):
        return Status(state="failed", note=f"{error} ({folder / LOG_NAME})", **known)
    if (job := cluster.read_job(run)) and job["job"]:
        return _ended(job, known)
    return Status(state="stopped" if has_checkpoint(folder) else "new", **known)


def _ended(job, known):
    """The Status of a run whose job is in the queue no more, and left no result."""
    ended, log = cluster.how_it_ended(job)
    if job.get("cancelled") or ended == "CANCELLED":
        return Status(state="cancelled", note=f"job {job['job']}", **known)
    return Status(state="failed", note=f"job {job['job']} ended as {ended or 'unknown'}: "
                                       f"{_last_line(log)} ({log})", **known)


def _last_line(log):
    """The last line of a job's log that is not Slurm's own, if there is one."""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ours = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
        return (ours or lines or ["its log is empty"])[-1]
    return "it has no log"


def count(found):
    """"3 done, 1 running" of [Status]."""
    counts = collections.Counter(status.state for status in found)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def print_statuses(runs, found):
    """A line for each run, and one for all. found: their statuses."""
    configs = [run.config for run in runs]
    table = pd.DataFrame({
        "run": [run.name for run in runs], "seed": [config.seed for config in configs],
        "state": [status.state for status in found],
        "steps": [f"{status.step:,}/{config.total_steps:,}"
                  for config, status in zip(configs, found)],
        "bits/dim": [status.bits_per_dim for status in found],
        "left": [_duration(status.left_s) for status in found],
        "": ["see below" if status.state == "failed" else status.note for status in found]})
    print(table.to_string(index=False))
    for run, status in zip(runs, found):
        if status.state == "failed":
            print(f"failed: {run.label}: {status.note}")
    print(f"{len(runs)} runs: {count(found)}")


def _duration(seconds):
    return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def is_over(found):
    return not {"running", "queued"} & {status.state for status in found}


def follow(runs, is_over=is_over, every_s=2):
    """A bar over the steps of all runs until they are over; returns their last statuses."""
    total = sum(run.config.total_steps for run in runs)
    form = "|{bar:20}| {n_fmt}/{total_fmt} steps, {desc} [{elapsed}, {remaining} left]"
    with tqdm(total=total, dynamic_ncols=True, mininterval=0, bar_format=form) as bar:
        while True:
            found = statuses(runs)
            steps, text = sum(status.step for status in found), count(found)
            bar.initial = bar.initial or steps  # else what was done before counts as speed
            if steps != bar.n or not bar.desc.startswith(text):
                bar.n = steps
                bar.set_description_str(text, refresh=True)
            if is_over(found):
                return found
            time.sleep(every_s)
