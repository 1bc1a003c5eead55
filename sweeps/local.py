"""Runs of a grid on this machine: one after the other, or several at a time."""
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import time

import torch

from data import load_images
from harness.errors import BusyError, TrainingError, one_line
from harness.flops import train_flops
from harness.machine import idle_cores, pick_device
from harness.progress import tell
from harness.run_folder import ERROR_NAME, is_running, read_error, record_error
from harness.signals import Signals
from sweeps import cluster, watch
from train import train


def count_jobs(runs, place, asked):
    """How many runs at a time: as asked, or on CPUs as many as cores are idle, on GPUs one on each.

    No more than there are to be run.
    """
    todo = max(1, sum(not run.is_done for run in runs))
    if asked or todo == 1:
        return min(todo, asked or 1)
    if place.device != "cpu" and torch.cuda.is_available():
        return min(todo, len(devices(place)))
    return min(todo, max(1, idle_cores() // place.threads))


def devices(place):
    """The devices that runs at a time take in turn: all GPUs, where none is named."""
    if place.device in ("auto", "cuda") and (gpus := torch.cuda.device_count()):
        return [f"cuda:{index}" for index in range(gpus)]
    return [place.device]


def run_here(runs, place, jobs=1, in_debug=False):
    """Run what is not done, in so many processes; in_debug: only the first, with its log printed.

    Returns {run id: why} of those that failed and whose folder could not take why, and the Signals
    that have come.
    """
    todo, unrecorded, signals = [run for run in runs if not run.is_done], {}, Signals()
    if not todo:
        return {}, signals
    for run in todo:
        if not is_running(run.folder):
            for path in (run.folder / ERROR_NAME, run.folder / cluster.JOB_NAME):
                with contextlib.suppress(OSError):  # train() says what is wrong with a folder
                    path.unlink()
    with signals.on():
        if in_debug:
            run = todo[0]
            print(f"{run.label}: {run.folder}")
            train(run.config, run.folder, place=dataclasses.replace(place, echo=True),
                  init_from=run.init_from, signals=signals)
        else:
            with watch.following(runs):
                unrecorded = run_in_parallel(runs, place, jobs, signals)
    return unrecorded, signals


def check(runs, place, on_slurm=False):
    """Raise what is wrong with all runs once, before any: a device or images that are not there."""
    todo = [run for run in runs if not run.is_done]
    if todo and not on_slurm:  # else it is the nodes' that counts
        pick_device(place.device, place.graph)
    for data in {run.config.data for run in todo}:
        load_images(data, "train", place.data_root)


def run_all(runs, place, signals, is_one_of_many=False):
    """Run what is not done, one after the other; a run that another process is at is waited for.

    Where one fails, its error.txt says why, and the others go on. Returns {run id: why} of those
    whose folder could not take it.
    """
    waiting, busy, unrecorded = list(runs), [], {}
    while waiting and not signals.stop:
        for run in list(waiting):
            if signals.stop:
                break
            if is_settled(run, waiting):
                waiting.remove(run)
                continue
            if run in busy and is_running(run.folder) or run.after and not run.after.is_done:
                continue
            try:
                train(run.config, run.folder, place=place, init_from=run.init_from, signals=signals,
                      quiet=True)
            except BusyError as error:
                if not is_one_of_many and run not in busy:
                    tell(f"{run.label}: waiting for another process ({error})")
                busy.append(run)
                continue
            except Exception as error:
                unrecorded |= record_failure(run, error)
            if not signals.stop:
                waiting.remove(run)
        if waiting and not signals.stop:
            time.sleep(0.5)
    return unrecorded


def is_settled(run, waiting):
    """Whether a run is done, has failed, or begins with the weights of one that has failed."""
    if run.is_done or read_error(run.folder):
        return True
    return run.after is not None and not run.after.is_done and run.after not in waiting


def record_failure(run, error):
    """Leave an error in the run's folder; returns {run id: the line} where that cannot be."""
    if not is_running(run.folder):
        record_error(run.folder, error)  # where it came before train() had the folder
    return {} if read_error(run.folder) else {run.run_id: one_line(error)}


class _WorkerSignals(Signals):
    """A worker stops when its parent is gone, too."""
    parent = None

    @property
    def stop(self):
        return self._stop or os.getppid() != self.parent

    @stop.setter
    def stop(self, value):
        self._stop = value


def _work(runs, place, parent):
    signals = _WorkerSignals(quiet=True)
    signals.parent = parent
    with contextlib.suppress(KeyboardInterrupt), signals.on():
        for line in run_all(runs, place, signals, is_one_of_many=True).values():
            print(line, file=sys.stderr)


def run_in_parallel(runs, place, jobs, signals):
    """Run what is not done in so many processes, this one and others.

    They share the runs out by their claims. Returns {run id: why} as run_all does.
    """
    if jobs == 1:
        return run_all(runs, place, signals)
    context = multiprocessing.get_context("spawn")
    runs = sorted(runs, key=lambda run: -train_flops(run.config))  # the longest first: none is late
    places = [dataclasses.replace(place, device=device)
              for device in itertools.islice(itertools.cycle(devices(place)), jobs)]
    workers = [context.Process(target=_work, args=(runs, one, os.getpid())) for one in places[1:]]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, until a worker has its own
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    unrecorded = run_all(runs, places[0], signals, is_one_of_many=True)
    for worker in workers:
        while worker.is_alive() and not signals.stop:
            worker.join(0.1)
    for worker in workers:
        if worker.is_alive():
            worker.terminate()  # stops it with a checkpoint
        worker.join()
    return unrecorded


def failures(runs, unrecorded):
    """A line for each run that has not finished, and why."""
    lines = []
    for run in runs:
        try:
            if run.done is None:
                lines.append(f"{run.label}: {why_unfinished(run, unrecorded)} ({run.folder})")
        except TrainingError as error:
            lines.append(f"{run.label}: {error}")
    return lines


def why_unfinished(run, unrecorded):
    if known := read_error(run.folder) or unrecorded.get(run.run_id):
        return known
    if run.awaits:
        return "the search of its learning rate has not finished"
    if run.after and not run.after.is_done:
        return f"{run.after.label}, whose weights it begins with, has not finished"
    return "not finished"
