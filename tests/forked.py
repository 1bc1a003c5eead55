"""Programs of ours in forks of the tests' process: each would import torch for seconds otherwise."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import types

FORK = multiprocessing.get_context("fork")


def start(program, *arguments, out=os.devnull, env=None, daemon=None, before=lambda: None):
    """Start a program with what it writes in a file; returns its multiprocessing.Process."""
    process = FORK.Process(target=_become, args=(program, arguments, out, env or {}, before), daemon=daemon)
    process.start()
    return process


def each(function, *arguments):
    """What a function returns for each of the arguments, in a fork of its own, one after the other."""
    answers = []
    for argument in arguments:
        answer, end = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda: end.send(function(argument)))
        process.start()
        end.close()  # or a process that dies would be waited for
        answers.append(answer.recv())
        process.join()
        assert process.exitcode == 0
    return answers


def wait_until(happened, *processes, seconds=180):  # on a busy machine processes take a minute to begin
    """Wait for something that happens while processes run."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and all(process.is_alive() for process in processes), "it did not happen"
        time.sleep(0.01)


def popen(command, env=None, start_new_session=False, **_):
    """As subprocess.Popen for a Python program of whose output nothing is read."""
    return start(*command[1:], env=env, daemon=True, before=os.setsid if start_new_session else lambda: None)


def run(command, **_):
    """As subprocess.run, likewise; what the program printed is not known."""
    process = popen(command)
    process.join()
    return types.SimpleNamespace(returncode=process.exitcode, stderr="")


SUBPROCESS = types.SimpleNamespace(run=run, Popen=popen, DEVNULL=subprocess.DEVNULL)  # in place of the module


def _become(program, arguments, out, env, before):
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    os.environ.update(env)
    sys.stdout = sys.stderr = open(out, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    before()
    become(program, *arguments)


def become(program, *arguments):
    """Run a program in this process, as Python would."""
    sys.argv = [str(program), *map(str, arguments)]
    sys.path.insert(0, os.path.dirname(program))
    runpy.run_path(str(program), run_name="__main__")
