import gc
import os

import pytest

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is there, as of torch's threads below


def pytest_collection_finish():
    """In each worker, and not in the process that hands tests out: that one needs no torch."""
    import torch
    torch.set_num_threads(1)  # tiny models: a second thread gains nothing, and waits where cores are shared
    os.fsync = lambda file: None  # nothing here must outlive the machine
    what_is_there_is_no_garbage()


def what_is_there_is_no_garbage():
    """Each run that is trained collects garbage, and would look through all that is imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_a_module_has_imported_is_no_garbage():
    yield
    what_is_there_is_no_garbage()


@pytest.fixture(autouse=True)
def one_run_at_a_time(monkeypatch):
    """Where no --jobs is given: in this process, in which tests watch and change things."""
    from sweeps import local
    monkeypatch.setattr(local, "idle_cores", lambda: 1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of their files."""
    from paper_figures import style
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: figures.append((figure, name)) or [])
    yield figures
    style.plt.close("all")
