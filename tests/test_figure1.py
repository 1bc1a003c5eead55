"""The drawing of a coupling: its patterns are the model's, and its bytes are stable."""
import numpy as np
import pytest

from jet import Coupling, JetConfig
from paper_figures import figure1

CONFIG = JetConfig(image_size=16, channels=1, emb_dim=8, num_heads=1, block_depth=1)  # 4 x 4 tokens of 16 values


@pytest.mark.parametrize("split", list(figure1.SPLITS)[1:])
def test_a_spatial_pattern_is_what_the_model_moves(split):
    moved = Coupling(CONFIG, "spatial", split).order.chunk(2)[1].numpy()
    tokens = figure1.pattern(split).reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)  # token, value
    assert np.array_equal(tokens, np.isin(np.arange(16), moved)[:, None].repeat(16, 1))


def test_the_channel_pattern_is_the_same_half_of_every_token():
    tokens = figure1.pattern("channels").reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
    assert tokens[0].sum() == 8 and (tokens == tokens[0]).all()


def test_the_command_line_says_what_it_has_drawn(tmp_path, capsys, monkeypatch):
    """To which bytes is what test_results_page.py asks of all committed figures."""
    monkeypatch.setattr(figure1.style, "save", lambda figure, name, out_dir: [out_dir / f"{name}.{len(figure.axes)}"])
    figure1.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/figure1.5\n"  # the coupling and four patterns
    figure1.style.plt.close("all")
