import contextlib
import functools
import gc
import importlib
import os
import threading
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is there: see one_thread
gc.disable()  # until all is imported


def pytest_collection(session):
    """Where nothing is compiled yet, every second worker begins with the last tests: so each compiles half of them."""
    are_all = not session.config.option.file_or_dir
    if are_all and int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2:
        for path in sorted(TESTS.glob("test_*.py"), reverse=True):
            if list(TESTS.glob(f"__pycache__/{path.stem}.*")):
                break
            with contextlib.suppress(Exception, pytest.skip.Exception):  # told when the tests are collected
                importlib.import_module(path.stem)


def pytest_collection_finish():
    """In each worker, and not in the process that hands tests out: that one needs no torch."""
    import train
    from audit import audit
    from harness.progress import Bar
    from images import prepare
    from sweeps import local
    one_thread()
    Bar.set_lock(threading.RLock())  # else one that all forks share: a fork that is killed may have it
    Bar.monitor_interval = 0  # no thread beside tests, which might have that lock in the moment of a fork
    once = functools.cache(train.code_version)  # git takes longer than tiny runs do
    train.code_version = audit.code_version = prepare.code_version = once
    local.idle_cores = lambda: 1  # where no --jobs is given: in this process, in which tests watch and change things
    os.fsync = lambda file: None  # nothing here must outlive the machine
    gc.freeze()
    gc.enable()


def one_thread():
    """For tiny models a second thread gains nothing, and it waits where cores are shared."""
    import torch
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    one_thread()  # a program that was called may have asked for more
    gc.collect()  # each run that is trained does, and would look through all that tests have imported by now
    gc.freeze()


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of their files."""
    from paper_figures import style
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: figures.append((figure, name)) or [])
    yield figures
    style.plt.close("all")


@pytest.fixture
def rough(monkeypatch):
    """Files of figures are small: few pixels, and outlines of letters instead of parts of fonts, which take long."""
    from paper_figures import style
    for name, value in (("pdf.fonttype", 3), ("savefig.dpi", 60)):
        monkeypatch.setitem(style.plt.rcParams, name, value)
