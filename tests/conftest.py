import gc

import pytest


def pytest_collection_finish():
    """In each worker, and not in the process that hands tests out: that one needs no torch."""
    import torch
    torch.set_num_threads(1)  # tiny models: a second thread gains nothing, and waits where cores are shared
    gc.collect()  # each run that is trained collects garbage: not what is there by now
    gc.freeze()


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
