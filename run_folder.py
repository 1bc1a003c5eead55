"""A run folder: one run's files, whole or not there at all, for one process at a time.

    config.json               what is computed
    claim.json                who is at it: machine, process, job; the file's time is the heartbeat
    checkpoint.pt             the newest state, read back when it was written; checkpoint-previous.pt: the one before
    metrics.csv               training, step by step
    log.txt                   start, restarts, end, and what ran it
    error.txt                 why the last attempt failed; the next one removes it
    done.json                 the result: written last, and all that says "finished"
"""
import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from convert import CHECKPOINT_FORMAT, CHECKPOINT_NAME, CheckpointError, read_tensors

CLAIM_NAME, CONFIG_NAME, DONE_NAME, ERROR_NAME = "claim.json", "config.json", "done.json", "error.txt"
LOG_NAME, METRICS_NAME, PREVIOUS_NAME = "log.txt", "metrics.csv", "checkpoint-previous.pt"
METRICS_COLUMNS = "step,images_seen,bits_per_dim,grad_norm,lr,seconds"
HEARTBEAT_S, DEAD_AFTER_S = 10, 60


class TrainingError(RuntimeError):
    """A run that cannot start, go on or be saved, in one line."""


class BusyError(TrainingError):
    """Another process is at this run."""


def write_atomically(path, content, check=lambda path: None):
    """Write a whole file (text, or what a function writes to it) or leave the old one as it is.

    check: called with the path of the new file before it takes the old one's place.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # of this process alone
    try:
        with _named(path):
            with open(temporary, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else content(file)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _named(path):
    """A full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(path):
    """Within, no other process has this file locked; on a file system without locks it does nothing."""
    with open(path, "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder, name="", older_than_s=0):
    """Remove what processes killed in write_atomically have left of a file, or of all of a folder's."""
    for path in folder.glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


# ---- one process at a time

def _machine():
    """What tells this machine, since it was started, from all others; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # processes of other containers cannot be seen
    except OSError:
        return None


def _process_started(pid):
    """When a process of this machine was started (clock ticks since boot), or None: it is not there or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Claim:
    """A run folder's claim: taken by one process at a time, and taken over from one that is dead.

    A process of this machine is dead when it is not there; one of another when its heartbeat is DEAD_AFTER_S old.
    The claim is linked into its place with all its content, which is atomic on network file systems, too.
    """

    def __init__(self, run_dir):
        self.run_dir, self.path = Path(run_dir), Path(run_dir) / CLAIM_NAME
        self.ours = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(),
                     "started": _process_started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID"),
                     "token": uuid.uuid4().hex}
        self._over, self._beating = threading.Event(), None

    def take(self, wait_s=0):
        """Take it, within wait_s seconds. Raises BusyError, TrainingError (no folder can be there)."""
        end = time.monotonic() + wait_s
        while (holder := self._try()) is not None:
            if time.monotonic() >= end:
                raise BusyError(f"{self.run_dir}: another process is at this run ({describe(holder)}): wait for it to end")
            time.sleep(min(1, wait_s / 10))
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def _try(self):
        """None when the claim is ours, else its holder."""
        temporary = self.run_dir / f".{CLAIM_NAME}.{self.ours['token']}.tmp"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with locked(self.run_dir / "lock"):  # so that of two that see a dead holder one takes over
                temporary.write_text(json.dumps(self.ours))
                try:
                    os.link(temporary, self.path)
                except FileExistsError:
                    holder = read_claim(self.run_dir)
                    if holder and not is_dead(holder, temporary.stat().st_mtime):
                        return holder
                    os.replace(temporary, self.path)
                remove_leftovers(self.run_dir)
        except OSError as error:
            what = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that, or choose another"
            raise TrainingError(f"{self.run_dir}: cannot be a run folder ({error.strerror}): {what}") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _beat(self):
        while not self._over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, BusyError):
                self.check()
                os.utime(self.path)

    def check(self):
        """Raise BusyError if another process has taken over: this one stood still too long, or was cut off."""
        holder = read_claim(self.run_dir)
        if not holder or holder["token"] != self.ours["token"]:
            raise BusyError(f"{self.run_dir}: taken over by another process ({describe(holder)}) while this one did "
                            "not answer: nothing more was written")

    def release(self):
        if self._beating:
            self._over.set()
            self._beating.join()
            with contextlib.suppress(OSError, BusyError):
                self.check()
                self.path.unlink()


def read_claim(run_dir):
    """The holder of a run folder, with the time of its last heartbeat, or None."""
    path = Path(run_dir) / CLAIM_NAME
    unknown = {"host": "?", "pid": 0, "machine": None, "started": None, "job": None, "token": None}
    try:
        beat = path.stat().st_mtime
    except OSError:
        return None
    try:
        return {**unknown, **json.loads(path.read_text()), "beat": beat}
    except (OSError, ValueError, TypeError):  # torn: nobody's, once it is old
        return {**unknown, "beat": beat}


def is_dead(holder, now):
    """Whether the holder of a claim is dead. now: the time by the clock that heartbeats have, the file server's."""
    if holder["machine"] and holder["machine"] == _machine():
        return holder["started"] is None or _process_started(holder["pid"]) != holder["started"]
    return abs(now - holder["beat"]) > DEAD_AFTER_S


def is_running(run_dir):
    """Whether a process is at a run now."""
    holder = read_claim(run_dir)
    return holder is not None and not is_dead(holder, time.time())


def describe(holder):
    if holder is None:
        return "its claim is gone"
    job = f", job {holder['job']}" if holder["job"] else ""
    silent = time.time() - holder["beat"]
    heard = "" if holder["machine"] == _machine() else (
        f", last heard of {max(0, silent):.0f} s ago; it counts as dead after {DEAD_AFTER_S}")
    return f"process {holder['pid']} on {holder['host']}{job}{heard}"


# ---- checkpoints

def save_checkpoint(run_dir, content):
    """Write the newest checkpoint, read it back, and keep the one before. Raises TrainingError in one line."""
    path = run_dir / CHECKPOINT_NAME

    def keep_previous(temporary):
        if not zipfile.is_zipfile(temporary) or zipfile.ZipFile(temporary).testzip():
            raise OSError(None, "what was read back is not what was written")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, run_dir / PREVIOUS_NAME)
    try:
        write_atomically(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **content}, file), keep_previous)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "writing failed: is the disk full?"
        before = "the one before is untouched: " if path.exists() else ""
        raise TrainingError(f"{run_dir}: the checkpoint of step {content['step']} was not saved ({reason}); "
                            f"{before}make room and run the same command") from None


def read_checkpoint(run_dir, tell):
    """(path, content) of the newest whole checkpoint, or (None, None).

    One that is damaged is set aside under another name, which tell is called with a line about.
    Raises CheckpointError when there are checkpoints and none is whole.
    """
    newest, previous = run_dir / CHECKPOINT_NAME, run_dir / PREVIOUS_NAME
    if newest.exists():
        try:
            return newest, read_tensors(newest)
        except CheckpointError as error:
            if not previous.exists():
                raise CheckpointError(f"{error}; there is none before it: move it away to begin again") from None
            damage = error
    elif previous.exists():
        damage = f"{newest}: missing"
    else:
        return None, None
    try:
        content = read_tensors(previous)
    except CheckpointError as error:
        raise CheckpointError(f"{damage}; and {error}: move away what is there to begin again") from None
    if newest.exists():  # or the next save would put it in the place of the whole one
        os.replace(newest, run_dir / "checkpoint-damaged.pt")
        damage = f"{damage}: set aside as checkpoint-damaged.pt"
    tell(f"{damage}; going on from {PREVIOUS_NAME}, step {content.get('step')}")
    return previous, content


# ---- what a run tells

def read_done(run_dir):
    """The content of a finished run's done.json, or None."""
    path = Path(run_dir) / DONE_NAME
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text())
        whole = {"config", "num_params", "test_fingerprint", "train_fingerprint", "git_commit", "bits_per_dim",
                 "bits_per_dim_se", "num_images", "train_seconds", "hardware", "device"} <= done.keys() and all(
            isinstance(row[name], float) for row in done["rows"]
            for name in ("bits_per_dim", "bits_per_dim_se", "logdet_nats"))
        if whole and done["rows"][-1]["split"] == "test":
            return done
        raise ValueError("incomplete")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TrainingError(f"{path}: damaged ({type(error).__name__}: {error}): delete it, and the same command "
                            "evaluates again") from None


def record_error(run_dir, error):
    """Write why an attempt failed, the line first, then the traceback; what was written first stays."""
    if (Path(run_dir) / ERROR_NAME).exists():
        return
    line = one_line(error)
    with contextlib.suppress(OSError):  # a full disk
        text = "".join(traceback.format_exception(error))
        write_atomically(Path(run_dir) / ERROR_NAME, f"{line}\n\n{text}")
        RunLog(run_dir).write(f"failed: {line}")


def one_line(error):
    """What to tell of an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    line = " ".join(str(error).split())
    return line if isinstance(error, (TrainingError, ValueError)) else f"{type(error).__name__}: {line}"


def read_error(run_dir):
    """The line of error.txt, or None."""
    try:
        return ((Path(run_dir) / ERROR_NAME).read_text(errors="replace").splitlines() or ["unknown"])[0]
    except OSError:
        return None


def read_progress(run_dir):
    """(step, bits/dim of that batch, seconds) of the last whole line of metrics.csv; zeros before there is one."""
    try:
        lines = (Path(run_dir) / METRICS_NAME).read_bytes()[-4096:].decode(errors="replace").splitlines(keepends=True)
        step, _, bits, _, _, seconds = next(line for line in reversed(lines) if _is_whole(line)).split(",")
        return int(step), float(bits), float(seconds)
    except (OSError, StopIteration, ValueError):
        return 0, 0.0, 0.0


def _is_whole(row):
    return row.endswith("\n") and row.count(",") == METRICS_COLUMNS.count(",") and row.split(",")[0].isdecimal()


class RunLog:
    """log.txt (what happened when) and metrics.csv (training, step by step) of a run folder."""

    def __init__(self, run_dir, echo=False):
        self.echo, self.log, self.metrics = echo, Path(run_dir) / LOG_NAME, Path(run_dir) / METRICS_NAME

    def begin(self, step):
        """Drop the rows of metrics.csv after this step, which come again, and those that a kill has torn."""
        text = self.metrics.read_text(errors="replace") if self.metrics.exists() else ""
        rows = text.splitlines(keepends=True)[1:]
        whole = [row for row in rows if _is_whole(row)]
        if len(whole) < len(rows):
            self.write(f"{METRICS_NAME}: {len(rows) - len(whole)} torn lines dropped")
        kept = {int(row.split(",")[0]): row for row in whole}
        kept = [kept[number] for number in sorted(kept) if number <= step]
        if len(kept) < step:
            self.write(f"{METRICS_NAME}: {step - len(kept)} of the lines up to step {step} are missing")
        write_atomically(self.metrics, "".join([METRICS_COLUMNS + "\n", *kept]))

    def write(self, message):
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with _named(self.log), open(self.log, "ab+") as file:
            torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
            file.write(f"{chr(10) if torn else ''}{now} {message}\n".encode())
        if self.echo:
            print(message, flush=True)

    def tell(self, message):
        """A line for the log and for whoever sits at the terminal."""
        self.write(message)
        if not self.echo:
            tqdm.write(message, file=sys.stderr)  # beside a progress bar

    def add(self, rows):
        """Rows of metrics.csv."""
        with _named(self.metrics), open(self.metrics, "a") as file:
            file.write("".join(",".join(map(str, row)) + "\n" for row in rows))
