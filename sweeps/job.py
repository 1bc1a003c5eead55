"""One run as a job of Slurm: what submitit pickles, and what a node does with it."""
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys

from harness import distributed
from harness.claim import DEAD_AFTER_S
from harness.errors import BusyError, TrainingError, one_line
from harness.files import read_json, write_atomically
from harness.run_folder import read_progress, record_error
from harness.signals import Signals
from recipe import TrainConfig
from train import train

RESTARTS = 3  # in a row without progress, after which a job does not go on


class TrainJob:
    """One run as a job of submitit: train() in each process.

    Requeued when the time is up or another job comes. code: the CodeCopy that it must run.
    limits: (minutes of a job, seconds before their end at which it is told).
    """

    def __init__(self, run, place, code, limits):
        self.config, self.run_dir = run.config.to_dict(), str(run.folder.absolute())
        self.init_from = run.init_from and str(run.init_from.absolute())
        self.place = dataclasses.replace(place, wait_s=2 * DEAD_AFTER_S)
        self.code, (self.minutes, self.signal_delay_s) = code, limits

    def checkpoint(self):
        """What submitit submits again: the run's state is in its folder."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        is_first = self._join()
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: calls checkpoint, requeues, ends
        signals = Signals()
        try:
            self.code.check()
            if is_first:
                self._refuse_to_go_round()
            # SIGTERM comes before a preemption or a cancellation: the time left is unknown, and
            # Slurm will requeue
            with signals.on(stop=[signal.SIGUSR2], save=[signal.SIGTERM]):
                result = train(TrainConfig.from_dict(self.config), self.run_dir, place=self.place,
                               init_from=self.init_from, signals=signals, quiet=True)
            if "bits_per_dim" in result:
                distributed.leave()
                return result["bits_per_dim"]
        except Exception as error:
            if is_first and not isinstance(error, BusyError):
                record_error(self.run_dir, error)  # where it came before train() had the folder
            if not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            sys.exit(f"error: {one_line(error)}")
        if is_first:
            requeue(signal.SIGUSR2, None)

    def _refuse_to_go_round(self):
        """Raise TrainingError where the last restarts of this job brought the run no further."""
        import submitit
        job = submitit.JobEnvironment()
        path = job.paths.folder / f"restarts_{job.job_id}.json"
        step, last, count = read_progress(self.run_dir)[0], -1, 0
        with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or damaged
            last, count = read_json(path)
        count = 0 if step > last else count + 1
        write_atomically(path, json.dumps([max(step, last), count]))
        if count >= RESTARTS:
            raise TrainingError(f"{count} restarts in a row brought no new step and no result: "
                                f"raise --timeout-min (now {self.minutes}, the last "
                                f"{self.signal_delay_s} s of it for a checkpoint)")

    def _join(self):
        """Find the other processes of the run; returns whether this is the first of them."""
        import submitit
        # a port of its own for each restart: a process that was cut off may still hold the last one
        attempt = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_RESTART_COUNT', 0)}"
        digest = int(hashlib.sha256(attempt.encode()).hexdigest(), 16)
        os.environ["MASTER_PORT"] = str(20000 + digest % 12000)
        processes = submitit.helpers.TorchDistributedEnvironment()
        return processes.export(set_cuda_visible_devices=False, overwrite=True).rank == 0
