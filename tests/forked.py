"""Programs of ours in forks of the tests' process: each would import torch for seconds otherwise."""
import multiprocessing
import os
import runpy
import signal
import sys

FORK = multiprocessing.get_context("fork")


def start(program, *arguments, out=os.devnull):
    """Start a program with what it writes in a file; returns its multiprocessing.Process."""
    process = FORK.Process(target=_become, args=(program, arguments, out))
    process.start()
    return process


def _become(program, arguments, out):
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    sys.stdout = sys.stderr = open(out, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.argv = [str(program), *map(str, arguments)]
    runpy.run_path(str(program), run_name="__main__")
