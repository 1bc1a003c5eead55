"""Runs of a grid on a Slurm cluster, through submitit: one job array, known again from any shell.

Each run folder keeps in job.json which job it was last given to; Slurm is asked what became of it.
Jobs run a copy of the code, made when they are submitted, and may be preempted, killed and
requeued: train() goes on.
"""
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from harness import distributed
from harness.claim import DEAD_AFTER_S
from harness.errors import BusyError, TrainingError, UserError, one_line
from harness.files import write_atomically
from harness.machine import COMMIT_FILE, ROOT, code_version
from harness.run_folder import ERROR_NAME, read_progress, record_error
from harness.signals import Signals
from recipe import TrainConfig
from train import train

JOB_NAME = "job.json"
KILLS = 3  # how often a job whose process was killed goes on by itself
# What Slurm writes in other words than "is waiting" or "has ended"
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED",
           "RESIZING")
# Options of sbatch that this program needs for itself
OURS = ("array", "chdir", "error", "job-name", "mem-gb", "open-mode", "output", "requeue",
        "timeout-min")
FLAGS = {
    "partition": (str, "NAME", "Slurm partition"),
    "account": (str, "NAME", "Slurm account"),
    "qos": (str, "NAME", "Slurm quality of service"),
    "constraint": (str, "FEATURES", "features that nodes must have"),
    "nodes": (int, "N", "nodes of a run (default: 1)"),
    "gpus-per-node": (int, "N", "GPUs of a run on each node, with a process for each"),
    "tasks-per-node": (int, "N", "processes of a run on each node (default: one for each GPU, "
                                 "else 1)"),
    "cpus-per-task": (int, "N", "CPUs of a process (default: its --threads)"),
    "mem-gb": (float, "GB", "memory of a run on each node (default: the cluster's)"),
    "timeout-min": (int, "N", "time limit of a job in minutes; a run that needs more goes on in "
                              "the next (default: 240)"),
    "max-parallel": (int, "N", "runs at a time (default: all)")}


class ClusterError(UserError, RuntimeError):
    """What the cluster cannot do, in one line."""


def add_cluster_flags(parser):
    """The flags of --cluster slurm: no default names a site's partition, account or the like."""
    for name, (kind, metavar, help) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=help)
    parser.add_argument("--slurm", action="append", metavar="KEY=VALUE",
                        help="any other option of sbatch, like exclude=node7 (may be repeated)")
    parser.add_argument("--allow-dirty", action="store_true",
                        help="submit code with changes that are not committed")


def given_cluster_flags(flags):
    """The names of those of these flags that were given."""
    return [f"--{name}" for name in (*FLAGS, "slurm", "allow-dirty")
            if getattr(flags, name.replace("-", "_")) not in (None, False)]


def sbatch_settings(flags, threads):
    """submitit's settings from the parsed flags. Raises ValueError."""
    for name, (kind, *_) in FLAGS.items():
        value = getattr(flags, name.replace("-", "_"))
        if kind is not str and value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: must be above 0")
    minutes = flags.timeout_min or 240
    tasks = flags.tasks_per_node or flags.gpus_per_node or 1
    settings = {"partition": flags.partition, "account": flags.account, "qos": flags.qos,
                "constraint": flags.constraint, "nodes": flags.nodes or 1,
                "gpus_per_node": flags.gpus_per_node, "ntasks_per_node": tasks,
                "cpus_per_task": flags.cpus_per_task or threads,
                "mem": flags.mem_gb and f"{round(flags.mem_gb * 1024)}M", "time": minutes,
                # before the limit, in which a step and a checkpoint must fit
                "signal_delay_s": min(120, minutes * 10)}
    more = dict(_sbatch_option(text, settings) for text in flags.slurm or ())
    delay = more.pop("signal-delay-s", settings["signal_delay_s"])
    if not str(delay).isdigit():
        raise ValueError(f"--slurm signal-delay-s={delay}: must be a number of seconds")
    if int(delay) >= 60 * minutes:
        raise ValueError(f"--slurm signal_delay_s={delay}: must be below the time limit")
    settings["signal_delay_s"] = int(delay)
    given = {name: value for name, value in settings.items() if value is not None}
    return given | {"additional_parameters": more}


def _sbatch_option(text, settings):
    """"exclude=node7" -> ("exclude", "node7"). Raises ValueError."""
    key, equals, value = text.partition("=")
    key = key.strip("-").replace("_", "-")
    if not (key and equals):
        raise ValueError(f"--slurm {text}: must be KEY=VALUE, like exclude=node7")
    is_setting = key.replace("-", "_") in settings and key != "signal-delay-s"
    if key in OURS or is_setting:
        raise ValueError(f"--slurm {text}: {key} is set by this program, or has a flag of its own")
    return key, value


def print_settings(settings, num_runs, max_parallel):
    """The settings as sbatch's options."""
    options = {name: value for name, value in settings.items()
               if name not in ("additional_parameters", "signal_delay_s")}
    options |= {"signal": f"USR2@{settings['signal_delay_s']}", "requeue": None,
                **settings["additional_parameters"],
                "array": f"0-{num_runs - 1}%{min(max_parallel or num_runs, num_runs)}"}
    words = ["sbatch"]
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}" + ("" if value is None else f"={value}"))
    print(" ".join(words))


# ---- what runs on a node

class TrainJob:
    """One run as a job of submitit: train() in each process.

    Requeued when the time is up or another job comes.
    """

    def __init__(self, run, place, minutes):
        self.config, self.run_dir = run.config.to_dict(), str(run.folder.absolute())
        self.init_from = run.init_from and str(run.init_from.absolute())
        self.place = dataclasses.replace(place, wait_s=2 * DEAD_AFTER_S)
        self.minutes = minutes

    def checkpoint(self):
        """What submitit submits again: the run's state is in its folder."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        is_first = self._join()
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: calls checkpoint, requeues, ends
        before, begun, signals = read_progress(self.run_dir)[0], time.monotonic(), Signals()
        try:
            # SIGTERM comes before a preemption or a cancellation: the time left is unknown, and
            # Slurm will requeue
            with signals.on(stop=[signal.SIGUSR2], save=[signal.SIGTERM]):
                result = train(TrainConfig.from_dict(self.config), self.run_dir, place=self.place,
                               init_from=self.init_from, signals=signals, quiet=True)
            if "bits_per_dim" in result:
                distributed.leave()
                return result["bits_per_dim"]
            is_slow = result["step"] <= before and time.monotonic() - begun > 30 * self.minutes
            if is_first and is_slow:
                raise TrainingError(f"no step was done in {self.minutes} minutes: raise "
                                    "--timeout-min")
        except Exception as error:
            if is_first and not isinstance(error, BusyError):
                record_error(self.run_dir, error)  # where it came before train() had the folder
            if not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            sys.exit(f"error: {one_line(error)}")
        if is_first:
            requeue(signal.SIGUSR2, None)

    def _join(self):
        """Find the other processes of the run; returns whether this is the first of them."""
        import submitit
        # a port of its own for each restart: a process that was cut off may still hold the last one
        attempt = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_RESTART_COUNT', 0)}"
        digest = int(hashlib.sha256(attempt.encode()).hexdigest(), 16)
        os.environ["MASTER_PORT"] = str(20000 + digest % 12000)
        processes = submitit.helpers.TorchDistributedEnvironment()
        return processes.export(set_cuda_visible_devices=False, overwrite=True).rank == 0


# ---- submitting

def copy_code(folder, allow_dirty):
    """The folder of a copy of this code, made where there is none: jobs run what was submitted."""
    version = code_version()
    commit, is_dirty = version["git_commit"], version["git_dirty"]
    if not commit:
        raise ClusterError(f"{ROOT} is no git checkout: jobs run a commit, so that a result can "
                           "name it")
    if is_dirty and not allow_dirty:
        raise ClusterError("the code has changes that are not committed: commit them, or give "
                           "--allow-dirty and have the results say so")
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file()
                   and not name.startswith(("results/", "paper_figures/out/", "tests/")))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0".encode() + (ROOT / name).read_bytes())
    tree, dirty = ("dirty", "-dirty") if is_dirty else ("clean", "")
    copy = folder / f"{commit[:12]}{dirty}-{digest.hexdigest()[:8]}"
    if not copy.exists():
        begun = folder / f".{uuid.uuid4().hex}"
        for name in names:
            (begun / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, begun / name)
        (begun / COMMIT_FILE.name).write_text(json.dumps([commit, tree]))
        try:
            begun.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(begun)
    return copy


def check_slurm():
    """Raise ClusterError where there is no Slurm that answers."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ClusterError("--cluster slurm needs the package submitit: pip install -r "
                           "requirements.txt") from None
    if not shutil.which("sbatch"):
        raise ClusterError("--cluster slurm: no sbatch on the PATH: run this where jobs are "
                           "submitted, or use --cluster local")
    _slurm("sinfo", "--noheader")


def submit(runs, name, settings, place, folder, max_parallel, allow_dirty, after=None):
    """Submit runs as one job array; returns its id. folder: of the experiment's runs.

    after: id of the job that has to end before: its run trains the weights that these begin with.
    """
    import submitit
    code = copy_code(folder.parent / "code", allow_dirty)
    name = f"{name}-{uuid.uuid4().hex[:8]}"
    logs = folder / "slurm"
    # the end of its time is no failure
    executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=10 ** 6)
    extra = {"chdir": str(code), "requeue": True} | settings["additional_parameters"]
    if after:
        extra["dependency"] = ",".join(filter(None, (extra.get("dependency"), f"afterany:{after}")))
    executor.update_parameters(
        **settings | {"additional_parameters": extra}, job_name=name,
        array_parallelism=max_parallel or len(runs),
        # one process lost is all lost; and since Slurm 22.05 srun does not take over sbatch's CPUs
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={settings['cpus_per_task']}"],
        teardown=requeue_killed(logs))
    note = {"name": name, "job": None, "logs": str(logs)}
    for index, run in enumerate(runs):  # before: a submission cut short is known by its name
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / ERROR_NAME).unlink(missing_ok=True)
        write_atomically(run.folder / JOB_NAME, json.dumps(note | {"index": index}))
    try:
        # submitit prints what sbatch says, too
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(TrainJob(run, place, settings["time"])) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        for run in runs:
            (run.folder / JOB_NAME).unlink()
        reason = "; ".join(str(error).replace("sbatch: error: ", "").strip().splitlines())
        raise ClusterError(f"sbatch refuses: {reason}") from None
    for index, (run, job) in enumerate(zip(runs, jobs)):
        job_json = json.dumps(note | {"index": index, "job": job.job_id})
        write_atomically(run.folder / JOB_NAME, job_json)
    return jobs[0].job_id.split("_")[0]


def requeue_killed(logs):
    """Lines of a job's script: one whose process was killed is requeued, KILLS times."""
    killed = f"{logs}/killed_${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}_${{SLURM_ARRAY_TASK_ID:-0}}"
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    return ["code=$?",
            "# 137, 140, 143: a process was killed; go on from the last checkpoint, a few times",
            f"[[ $code =~ ^(137|140|143)$ ]] && echo $code >>{killed} &&",
            f"  [ $(wc -l <{killed}) -le {KILLS} ] &&",
            f"  scontrol requeue {job} &&", "  sleep 60", "exit $code"]


# ---- asking

def read_job(run):
    """What job.json says of a run that was submitted, or None."""
    try:
        job = json.loads((run.folder / JOB_NAME).read_text())
        kinds = {"name": str, "index": int, "job": (str, type(None)), "logs": str}
        is_whole = all(isinstance(job[name], kind) for name, kind in kinds.items())
        return job if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_queue(runs):
    """{run folder: (state, reason, job id)} of the runs that Slurm has waiting or running.

    Runs that were never submitted are not asked for; without any Slurm need not be there.
    """
    jobs = {run.folder: job for run in runs if (job := read_job(run))}
    if not jobs:
        return {}
    output = _slurm("squeue", "--noheader", "--array", "--format=%j|%i|%T|%r", "--name",
                    ",".join(sorted({job["name"] for job in jobs.values()})))
    queue = {}
    for line in output.splitlines():
        name, job_id, state, reason = line.split("|", 3)
        queue[name, int(job_id.partition("_")[2] or 0)] = state, reason, job_id
    found = {folder: queue.get((job["name"], job["index"])) for folder, job in jobs.items()}
    return {folder: entry for folder, entry in found.items() if entry}


def how_it_ended(job):
    """Slurm's word for how a job that has left the queue ended, and its log.

    The word is None where Slurm keeps no accounts.
    """
    log = Path(job["logs"]) / f"{job['job']}_0_log.err"
    try:
        state = _slurm("sacct", "--noheader", "--parsable2", "--allocations",
                       f"--jobs={job['job']}", "--format=State")
    except ClusterError:
        state = ""
    return (state.split() or [None])[0], log


def cancel(runs):
    """Cancel what is waiting or running, and note it in job.json; returns how many jobs."""
    queue = read_queue(runs)
    if queue:
        _slurm("scancel", *(job_id for _, _, job_id in queue.values()))
    for run in runs:
        if run.folder in queue:
            write_atomically(run.folder / JOB_NAME, json.dumps(read_job(run) | {"cancelled": True}))
    return len(queue)


def _slurm(*command):
    """The output of a command of Slurm's. Raises ClusterError in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise ClusterError(f"no {command[0]} on the PATH, and some of these runs were submitted to "
                           "Slurm: run this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]}: Slurm does not answer") from None
    if done.returncode:
        raise ClusterError(f"{command[0]}: {' '.join(done.stderr.split()) or 'failed'}")
    return done.stdout
