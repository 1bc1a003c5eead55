"""Runs of a grid on a Slurm cluster, through submitit: one job array, known again from any shell.

Each run folder keeps in job.json which job it was last given to; Slurm is asked what became of it.
Jobs run a copy of the code, made when they are submitted, and may be preempted, killed and
requeued: train() goes on.
"""
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import uuid
from pathlib import Path

from harness.errors import ClusterError, one_line
from harness.files import named_in_errors, read_json, write_atomically
from harness.run_folder import ERROR_NAME
from sweeps.code_copy import copy_code
from sweeps.job import TrainJob

JOB_NAME = "job.json"
KILLS = 3  # how often a job whose process was killed goes on by itself
# What Slurm writes in other words than "is waiting" or "has ended"
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED",
           "RESIZING")
# Options of sbatch that this program needs for itself
OURS = ("array", "chdir", "error", "job-name", "mem-gb", "no-requeue", "open-mode", "output",
        "parsable", "quiet", "requeue", "signal", "test-only", "timeout-min", "wait", "wrap")
# Settings that are no options of sbatch
IN_SCRIPT = ("additional_parameters", "setup", "signal_delay_s", "srun_args")
# Variables that these commands take for options: of the job that this may be in, or of the user's.
# They would come before what this program says.
OF_SLURM = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
KEPT = ("SLURM_CONF", "SLURM_JWT")  # which Slurm, and the key to it
SIGNAL = "USR2"  # that a job's time is up; NCCL may catch USR1
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


def add_cluster_flags(parser):
    """The flags of --cluster slurm: no default names a site's partition, account or the like."""
    for name, (kind, metavar, help) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=help)
    for name, metavar, help in (
            ("slurm", "KEY[=VALUE]", "any other option of sbatch, like exclude=node7 or exclusive"),
            ("srun-arg", "KEY[=VALUE]", "an option of srun, like container-image=IMAGE"),
            ("setup", "LINE", "a line of the job's script before the program, like 'module load "
                              "cuda'")):
        parser.add_argument(f"--{name}", action="append", metavar=metavar,
                            help=f"{help} (may be repeated)")
    parser.add_argument("--allow-dirty", action="store_true",
                        help="submit code with changes that are not committed")


def given_cluster_flags(flags):
    """The names of those of these flags that were given."""
    return [f"--{name}" for name in (*FLAGS, "slurm", "srun-arg", "setup", "allow-dirty")
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
                "mem": flags.mem_gb and f"{round(flags.mem_gb * 1024)}M", "time": minutes}
    more = dict(_sbatch_option(text, settings) for text in flags.slurm or ())
    # before the limit, in which a step and a checkpoint must fit
    delay = more.pop("signal-delay-s", min(120, minutes * 10))
    if not str(delay).isdigit():
        raise ValueError(f"--slurm signal-delay-s={delay}: must be a number of seconds")
    if int(delay) >= 60 * minutes:
        raise ValueError(f"--slurm signal_delay_s={delay}: must be below the time limit")
    given = {name: value for name, value in settings.items() if value is not None}
    options = {"signal": f"{SIGNAL}@{delay}", "requeue": True, "open-mode": "append"}
    return given | {
        "wckey": None, "signal_delay_s": int(delay), "additional_parameters": options | more,
        # the requeue after a kill comes after an error, and submitit believes the environment
        "setup": [*(flags.setup or ()), "set +e", f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}"],
        # one process lost is all lost; and since Slurm 22.05 srun does not take over sbatch's CPUs
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={flags.cpus_per_task or threads}",
                      *map(_srun_option, flags.srun_arg or ())]}


def _sbatch_option(text, settings):
    """"exclude=node7" -> ("exclude", "node7"), "exclusive" -> ("exclusive", True).

    Raises ValueError.
    """
    key, equals, value = text.partition("=")
    key = key.strip("-").replace("_", "-")
    if not key or equals and not value:
        raise ValueError(f"--slurm {text}: must be KEY=VALUE or KEY, like exclude=node7")
    if key in OURS or key.replace("-", "_") in settings:
        raise ValueError(f"--slurm {text}: {key} is set by this program, or has a flag of its own")
    return key, value if equals else True


def _srun_option(text):
    """"mpi=none" or "--mpi=none" -> "--mpi=none"."""
    return text if text.startswith("-") else f"--{text}"


def print_settings(settings, num_runs, max_parallel):
    """What sbatch and srun are given; sbatch but for paths and a name for each submission."""
    options = {name.replace("_", "-"): value for name, value in settings.items()
               if name not in IN_SCRIPT and value is not None}
    options |= settings["additional_parameters"]
    _tell_ignored()
    for size in _array_sizes(num_runs):
        array = {"array": f"0-{size - 1}%{min(max_parallel or size, size)}"} if size > 1 else {}
        words = [f"--{name}" if value is True else f"--{name}={value}"
                 for name, value in (options | array).items()]
        print(shlex.join(["sbatch", *words]))
    srun = shlex.join(["srun", *settings["srun_args"]])
    print("with the script: " + "; ".join([*settings["setup"], srun]))


# ---- submitting

def check_slurm():
    """Raise ClusterError where there is no Slurm that answers."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ClusterError("--cluster slurm needs the package submitit: pip install -r "
                           "requirements.txt") from None
    for name in ("sbatch", "srun"):
        if not shutil.which(name):
            raise ClusterError(f"--cluster slurm: no {name} on the PATH: run this where jobs are "
                               "submitted, or use --cluster local")
    _slurm("sinfo", "--noheader")


def submit(runs, name, settings, place, folder, max_parallel, allow_dirty, after=None):
    """Submit runs as a job array, or several where the site allows no such large one.

    Returns their ids. folder: of the experiment's runs. after: id of the job that has to end
    before: its run trains the weights that these begin with.
    """
    logs = folder / "slurm"
    if re.search(r"[%\\\n]", str(logs)):
        raise ClusterError(f"{folder}: Slurm reads %, \\ and line ends in a path as something "
                           "else: give another --runs-dir")
    _tell_ignored()
    code = copy_code(folder.parent / "code", allow_dirty)
    limits, jobs, first = (settings["time"], settings["signal_delay_s"]), [], 0
    for size in _array_sizes(len(runs)):
        group = runs[first:first + size]
        first += size
        calls = [TrainJob(run, place, code, limits) for run in group]
        more = {"chdir": str(code.folder)} | settings["additional_parameters"]
        # arrays with a limit of runs at a time come one after the other, or it would not hold
        awaited = [after, *(jobs[-1:] if max_parallel else ())]
        conditions = [more.get("dependency"), *(f"afterany:{job}" for job in awaited if job)]
        if dependency := ",".join(filter(None, conditions)):
            more["dependency"] = dependency
        parameters = settings | {"additional_parameters": more,
                                 "array_parallelism": max_parallel or size}
        jobs.append(_submit_array(group, calls, name, parameters, logs))
    return jobs


def _submit_array(runs, calls, name, settings, logs):
    """Submit one array; returns its id. calls: what a job of each run does."""
    import submitit
    name = f"{name}-{uuid.uuid4().hex[:8]}"
    with named_in_errors(logs):
        # the end of its time is no failure
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=10 ** 6)
    executor.update_parameters(**settings, job_name=name, teardown=requeue_killed(logs))
    note = {"name": name, "job": None, "logs": str(logs)}
    for index, run in enumerate(runs):  # before: a submission cut short is known by its name
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / JOB_NAME, json.dumps(note | {"index": index}))
    errors = {path: path.stat().st_mtime_ns for run in runs
              if (path := run.folder / ERROR_NAME).exists()}
    try:
        # submitit prints what sbatch says, too
        with (named_in_errors(logs), _without_slurm_variables(),
              contextlib.redirect_stderr(io.StringIO()), executor.batch()):
            jobs = [executor.submit(call) for call in calls]
    except submitit.core.utils.FailedJobError as error:
        for run in runs:
            (run.folder / JOB_NAME).unlink()
        reason = "; ".join(str(error).replace("sbatch: error: ", "").strip().splitlines())
        raise ClusterError(f"sbatch refuses: {reason}") from None
    except submitit.core.utils.FailedSubmissionError as error:
        raise ClusterError(f"{one_line(error)}: squeue --name={name} shows whether it was "
                           "submitted") from None
    for path, written in errors.items():  # why it failed before, unless it has failed again
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns == written:
                path.unlink()
    for index, (run, job) in enumerate(zip(runs, jobs)):
        job_json = json.dumps(note | {"index": index, "job": job.job_id})
        write_atomically(run.folder / JOB_NAME, job_json)
    return jobs[0].job_id.split("_")[0]


def _array_sizes(num_runs):
    """The sizes of the arrays for so many runs: this site's largest, and a last one."""
    largest = num_runs
    with contextlib.suppress(ClusterError):  # nobody to ask: --dry-run on a laptop
        config = _slurm("scontrol", "show", "config")
        if found := re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.M):
            largest = max(1, int(found[1]))
    return [min(largest, num_runs - first) for first in range(0, num_runs, largest)]


def _slurm_variables():
    """The variables in the environment that Slurm's commands would take for options."""
    return [name for name in os.environ if name.startswith(OF_SLURM) and name not in KEPT]


def _tell_ignored():
    """Say which of the user's own options in the environment are not used."""
    names = [name for name in _slurm_variables() if name.startswith("SBATCH_")]
    if names and "SLURM_JOB_ID" not in os.environ:  # else they are an outer job's
        print(f"not given to sbatch: {', '.join(names)}: give the options as flags, or with "
              "--slurm KEY=VALUE")


@contextlib.contextmanager
def _without_slurm_variables():
    """Within, the environment is as it would be outside of any job."""
    taken = {name: os.environ.pop(name) for name in _slurm_variables()}
    try:
        yield
    finally:
        os.environ.update(taken)


def requeue_killed(logs):
    """Lines of a job's script: one whose process was killed is requeued, KILLS times."""
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    name = "killed_${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}"
    return ["code=$?",
            f"killed={shlex.quote(str(logs))}/{name}",
            "# 137, 140, 143: a process was killed; go on from the last checkpoint, a few times",
            '[[ $code =~ ^(137|140|143)$ ]] && echo $code >>"$killed" &&',
            f'  [ $(wc -l <"$killed") -le {KILLS} ] &&',
            f"  scontrol requeue {job} &&", "  sleep 60", "exit $code"]


# ---- asking

def read_job(run):
    """What job.json says of a run that was submitted, or None."""
    try:
        job = read_json(run.folder / JOB_NAME)
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
        with _without_slurm_variables():
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise ClusterError(f"no {command[0]} on the PATH, and some of these runs were submitted to "
                           "Slurm: run this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]}: Slurm does not answer") from None
    if done.returncode:
        raise ClusterError(f"{command[0]}: {' '.join(done.stderr.split()) or 'failed'}")
    return done.stdout
