"""The claim of a run folder: one process at a time is at a run, and a dead one's is taken over."""
import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from harness.errors import BusyError, TrainingError
from harness.files import locked, read_json, remove_leftovers, time_there

CLAIM_NAME = "claim.json"
HEARTBEAT_S, DEAD_AFTER_S = 10, 60


class Claim:
    """A run folder's claim: taken by one process at a time, and taken over from one that is dead.

    A process of this machine is dead when it is not there; one of another when its heartbeat, the
    file's time, is DEAD_AFTER_S old. The claim is linked into its place with all its content, which
    is atomic on network file systems, too.
    """

    def __init__(self, run_dir):
        self.run_dir, self.path = Path(run_dir), Path(run_dir) / CLAIM_NAME
        self.ours = {"host": socket.gethostname(), "pid": os.getpid(), "machine": this_machine(),
                     "started": process_started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID"),
                     "token": uuid.uuid4().hex}
        self._is_over, self._beating = threading.Event(), None

    def take(self, wait_s=0):
        """Take it, within wait_s seconds. Raises BusyError; TrainingError where none can be."""
        end = time.monotonic() + wait_s
        while (holder := self._try()) is not None:
            if time.monotonic() >= end:
                raise BusyError(f"{self.run_dir}: another process is at this run "
                                f"({describe(holder, self.run_dir)}): wait for it to end")
            time.sleep(min(1, wait_s / 10))
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def _try(self):
        """None when the claim is ours, else its holder."""
        temporary = self.run_dir / f".{CLAIM_NAME}.{self.ours['token']}.tmp"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with locked(self.run_dir / "lock"):  # of two that see a dead holder one takes over
                temporary.write_text(json.dumps(self.ours))
                try:
                    os.link(temporary, self.path)
                except FileExistsError:
                    holder = read_claim(self.run_dir)
                    if holder and not is_dead(holder, self.run_dir):
                        return holder
                    os.replace(temporary, self.path)
                remove_leftovers(self.run_dir)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room" if is_full else "fix that, or choose another"
            raise TrainingError(f"{self.run_dir}: cannot be a run folder ({error.strerror}): "
                                f"{advice}") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _beat(self):
        while not self._is_over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, BusyError):
                self.check()
                os.utime(self.path)

    def check(self):
        """Raise BusyError if another process took over: this one stood still, or was cut off."""
        holder = read_claim(self.run_dir)
        if not holder or holder["token"] != self.ours["token"]:
            raise BusyError(f"{self.run_dir}: taken over by another process "
                            f"({describe(holder, self.run_dir)}) while this one did not answer: "
                            "nothing more was written")

    def release(self):
        if self._beating:
            self._is_over.set()
            self._beating.join()
            with contextlib.suppress(OSError, BusyError):
                self.check()
                self.path.unlink()


def read_claim(run_dir):
    """The holder of a run folder, with the time of its last heartbeat ("beat"), or None."""
    path = Path(run_dir) / CLAIM_NAME
    unknown = dict.fromkeys(("machine", "started", "job", "token")) | {"host": "?", "pid": 0}
    try:
        beat = path.stat().st_mtime
    except OSError:
        return None
    try:
        claim = {**unknown, **read_json(path), "beat": beat}
        if type(claim["pid"]) is int:
            return claim
    except (OSError, ValueError, TypeError):  # torn: nobody's, once it is old
        pass
    return {**unknown, "beat": beat}


def is_dead(holder, run_dir):
    """Whether the holder of a run folder's claim is dead."""
    if holder["machine"] and holder["machine"] == this_machine():
        return holder["started"] is None or process_started(holder["pid"]) != holder["started"]
    return abs(silent_s(holder, run_dir)) > DEAD_AFTER_S


def silent_s(holder, run_dir):
    """Seconds since a claim's last heartbeat, by the clock that heartbeats have."""
    return time_there(Path(run_dir)) - holder["beat"]


def describe(holder, run_dir):
    if holder is None:
        return "its claim is gone"
    text = f"process {holder['pid']} on {holder['host']}"
    if holder["job"]:
        text += f", job {holder['job']}"
    if holder["machine"] != this_machine():
        text += (f", last heard of {max(0, silent_s(holder, run_dir)):.0f} s ago; it counts as "
                 f"dead after {DEAD_AFTER_S}")
    return text


def this_machine():
    """What tells this machine, since it was started, from all others; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # processes of other containers cannot be seen
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_started(pid):
    """When a process of this machine was started (clock ticks since boot); None: it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
