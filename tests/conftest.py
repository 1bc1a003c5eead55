import pytest
import torch

from paper_figures import style

torch.set_num_threads(1)  # tiny models: a second thread gains nothing, and waits where cores are shared


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of their files."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: figures.append((figure, name)) or [])
    yield figures
    style.plt.close("all")
