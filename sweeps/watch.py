"""What has become of the runs of a grid, from their folders and Slurm's queue, in any shell."""
import collections
import contextlib
import dataclasses
import datetime
import functools
import threading
import time

from harness.errors import TrainingError, UserError, printable
from harness.files import read_end, time_there
from harness.flops import forward_flops, train_flops
from harness.progress import Bar, progress, tell
from harness.run_folder import (LOG_NAME, has_checkpoint, is_running, read_error, read_evaluated,
                                read_progress, seconds_without_line)
from sweeps import cluster

COLUMNS = 100  # at most, of what is printed
STATES = ("done", "running", "queued", "failed", "cancelled", "stopped", "new")  # in this order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """state: done; running, queued (now); failed, cancelled, stopped (with a checkpoint); new."""
    state: str
    step: int = 0
    bits_per_dim: str = ""
    left_s: float | None = None
    note: str = ""


def statuses(runs, before=()):
    """The Status of each run. Raises ClusterError where Slurm has runs and cannot be asked.

    before: what was found before; what was done is not read again.
    """
    known = {run.folder: status for run, status in zip(runs, before) if status.state == "done"}
    queue = cluster.read_queue([run for run in runs if not run.is_done])
    clock = functools.cache(time_there)  # one file is written, however many runs there are
    return [known.get(run.folder) or _status(run, queue.get(run.folder), clock) for run in runs]


def _status(run, entry, clock):
    """entry: (state, reason, job id) in Slurm's queue, or None. clock: files.time_there."""
    folder, total = run.folder, run.config.total_steps
    if run.awaits:
        return Status(state="new", note="awaits the search of its rate")
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
        if step == total:
            notes.append("evaluating")
        silent_s = seconds_without_line(folder, clock(run.runs_dir))
        if silent_s > max(60, 5 * seconds / max(1, step)):
            notes.append(f"no step for {silent_s:.0f} s")
        return Status(state="running", left_s=left_s, note=", ".join(notes), **known)
    if entry:
        reason = "" if entry[1] == "None" else f" ({entry[1]})"
        way_on = f": scontrol release {entry[2]}" if "held" in entry[1].lower() else ""
        return Status(state="queued", note=f"job {entry[2]}{reason}{way_on}", **known)
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
        lines = [line for line in read_end(log).splitlines() if line.strip()]
        ours = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
        return printable((ours or lines or ["its log is empty: is the disk full?"])[-1])
    return "it has no log"


def count(found):
    """"3 done, 1 running" of [Status]."""
    counts = collections.Counter(status.state for status in found)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def print_statuses(runs, found):
    """A line for each run, and one for all. found: their statuses."""
    configs = [run.config for run in runs]
    print(fit({
        "run": [run.name for run in runs], "seed": [config.seed for config in configs],
        "state": [status.state for status in found],
        "steps": [f"{status.step:,}/{config.total_steps:,}"
                  for config, status in zip(configs, found)],
        "bits/dim": [status.bits_per_dim for status in found],
        "left": [_duration(status.left_s) for status in found],
        "": ["see below" if status.state == "failed" else status.note for status in found]},
        ("seed", "")))
    for run, status in zip(runs, found):
        if status.state == "failed":
            print(f"failed: {run.label}: {status.note}")
    print(f"{len(runs)} runs: {count(found)}")


def fit(table, less):
    """The text of a table, {column: its cells}, without empty columns.

    less: the columns to leave out one by one where it is too wide.
    """
    columns = {name: [name, *map(str, cells)] for name, cells in table.items() if any(
        cell != "" for cell in cells)}
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    for name in less:
        if sum(widths.values()) + len(widths) - 1 > COLUMNS:
            widths.pop(name, None)
    lines = zip(*([cell.rjust(width) for cell in columns[name]] for name, width in widths.items()))
    return "\n".join(map(" ".join, lines))


def _duration(seconds):
    return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def is_over(found):
    return not {"running", "queued"} & {status.state for status in found}


def follow(runs, is_over=is_over, every_s=2, wait=time.sleep):
    """A bar over the steps of all runs until they are over, and a line for each that ends.

    Returns their last statuses. wait: called with every_s between two looks.
    """
    speed, found = Speed(runs), ()
    with progress(total=speed.total_steps, unit=" steps") as bar:
        while True:
            before, found = found, statuses(runs, found)
            tell_ends(runs, before, found)
            speed.look(found, time.monotonic())
            bar.initial = bar.initial or speed.steps  # else what was done before counts as speed
            bar.desc, bar.remaining = finished(found), speed.left()
            bar.say(speed.text(found), speed.steps)
            if is_over(found):
                return found
            wait(every_s)


@contextlib.contextmanager
def following(runs):
    """Within, which is where the runs are run, they are followed."""
    over = threading.Event()

    def look():
        with contextlib.suppress(UserError):  # of Slurm; the runs themselves say what is wrong
            follow(runs, lambda found: over.is_set(), 0.5, over.wait)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tell_ends(runs, before, found):
    """A line for each run that has ended since the statuses before."""
    for run, last, status in zip(runs, before, found):
        if status.state in ("done", "failed") and status.state != last.state:
            value = f"{status.bits_per_dim} bits/dim, " if status.state == "done" else "failed: "
            tell(f"{run.label}: {value}{status.note}")


def finished(found):
    """"3/16 runs", "3/16 runs, 1 failed"."""
    states = collections.Counter(status.state for status in found)
    failed = f", {states['failed']} failed" if states["failed"] else ""
    return f"{states['done']}/{len(found)} runs{failed}"


class Speed:
    """How fast the runs of a grid get on together, and how long they will take."""

    def __init__(self, runs):
        self.runs, configs = runs, [run.config for run in runs]
        self.total_steps = sum(config.total_steps for config in configs)
        self.costs = [3 * forward_flops(config.model) * config.batch_size for config in configs]
        self.total_flops = sum(map(train_flops, configs))
        self.begun, self.recent = None, collections.deque(maxlen=20)

    def look(self, found, now):
        """Take statuses in."""
        self.steps = sum(status.step for status in found)
        images = sum(status.step * run.config.batch_size for run, status in zip(self.runs, found))
        self.flops = sum(status.step * cost for status, cost in zip(found, self.costs))
        self.now = now
        if self.begun is None or self.flops == self.begun[1]:
            self.begun = now, self.flops  # until the first steps are done nothing is known
        self.recent.append((now, images))

    def left(self):
        """"1:02:03" to the end of all runs, if they get on as they did; evaluations aside."""
        begun, flops = self.begun
        if self.flops == flops:
            return "?"
        seconds = (self.total_flops - self.flops) * (self.now - begun) / (self.flops - flops)
        return Bar.format_interval(seconds)

    def text(self, found):
        """"5.91 bits/dim, 812 images/s": of the runs that are running."""
        running = [(run, status) for run, status in zip(self.runs, found)
                   if status.state == "running"]
        training = [float(status.bits_per_dim.split()[0]) for run, status in running
                    if 0 < status.step < run.config.total_steps]
        if not training:
            if running:
                return read_evaluated(running[0][0].folder)
            return "ended" if is_over(found) else "starting"
        low, high = min(training), max(training)
        bits = f"{low:.2f}" if len(training) == 1 else f"{low:.2f} to {high:.2f}"
        (then, before), (now, images) = self.recent[0], self.recent[-1]
        rate = (images - before) / (now - then) if now > then else 0
        return f"{bits} bits/dim, {rate:.0f} images/s"
