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


def test_it_is_drawn_to_the_bytes_that_are_committed(tmp_path, capsys):
    figure1.main(["--out", str(tmp_path)])
    paths = [tmp_path / f"figure1.{kind}" for kind in ("pdf", "png")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert [path.read_bytes() for path in paths] == [(figure1.style.OUT / path.name).read_bytes() for path in paths]
