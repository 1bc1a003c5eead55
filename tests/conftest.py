import pytest
import torch

from paper_figures import style
from sweeps import local

torch.set_num_threads(1)  # tiny models: a second thread gains nothing, and waits where cores are shared


@pytest.fixture(autouse=True)
def one_run_at_a_time(monkeypatch):
    """Where no --jobs is given: in this process, in which tests watch and change things."""
    monkeypatch.setattr(local, "idle_cores", lambda: 1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of their files."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: figures.append((figure, name)) or [])
    yield figures
    style.plt.close("all")
