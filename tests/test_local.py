"""Bytes for any flow: local bits-back coding brings images back, at the price of the likelihood."""
import numpy as np
import pytest
import torch

from coding import local
from coding.ans import CodecError
from data import load_images
from test_audit_corpus import AFFINE, MULTI_SCALE, UNIFORM_BUT_ROUGH
from test_codec import signed, with_header

IMAGES = load_images("cifar10-subset", "test").array[:40, 12:16, 12:16]


class Flow:
    """What an adapter's source makes."""

    def __init__(self, source):
        space = {}
        exec(source, space)
        self.forward, self.inverse = space["forward"], space["inverse"]


# Curved, and every value hangs on others: z = Q x + tanh, and its inverse by iteration.
DENSE = """
import math, torch
torch.manual_seed(0)
Q = {}
def matrix(D):
    if D not in Q:
        Q[D] = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q * torch.logspace(-2, 1, D, dtype=torch.float64)
    return Q[D]
def forward(x):
    u = x.flatten(1) @ matrix(x[0].numel())
    z = u + 0.5 * torch.tanh(u)
    logdet = torch.linalg.slogdet(matrix(x[0].numel()))[1] + (1 + 0.5 / torch.cosh(u) ** 2).log().sum(1)
    return z.view_as(x), logdet
def inverse(z):
    u = z.flatten(1)
    for _ in range(100):
        u = z.flatten(1) - 0.5 * torch.tanh(u)
    x = torch.linalg.solve(matrix(z[0].numel()).T, u.T).T.contiguous().view_as(z)
    return x, -forward(x)[1]
"""


def comes_back(source, images, name="a"):
    content, about = local.encode(Flow(source), images, name, 1)
    assert np.array_equal(local.decode(Flow(source), content, name), images)
    return content, about


@pytest.mark.parametrize("source", [AFFINE, MULTI_SCALE, UNIFORM_BUT_ROUGH, DENSE],
                         ids=["affine", "multi-scale", "rough", "dense"])
def test_images_come_back_at_the_price_of_the_likelihood(source):
    images = IMAGES[:24] if source != MULTI_SCALE else load_images("cifar10-subset", "test").array[:8, 8:16, 8:16]
    content, about = comes_back(source, images)
    net, bound = about["net_bits"] / images.size, about["bound"].mean()
    assert net == pytest.approx(bound, abs=0.01), (about["borrowed_bits"] / images[0].size, local.read(content)[0]["bits"])
    frame = about["net_bits"] + about["borrowed_bits"] + about["header_bits"]
    assert 0 < 8 * len(content) - frame < 1000


def test_any_images_come_back():
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.integers(0, 256, (3, 4, 6, 1), np.uint8), np.full((1, 4, 6, 1), 255, np.uint8),
                             np.zeros((1, 4, 6, 1), np.uint8)])
    content, _ = comes_back(DENSE, images)
    assert local.encode(Flow(DENSE), images, "a", 1)[0] == content  # a file is the same each time
    comes_back(AFFINE, images[:1])


@pytest.fixture(scope="module")
def content():
    return comes_back(DENSE, IMAGES[:2])[0]


def refused(content, message=".", source=DENSE, name="a"):
    with pytest.raises(CodecError, match=message) as error:
        local.decode(Flow(source), content, name)
    assert "\n" not in str(error.value)


def test_what_is_damaged_or_of_another_model_is_one_line(content):
    refused(content, "written with another model", name="b")
    for moved in ("z = u + 1e-9 + 0.5", "z = 1.0001 * u + 0.5"):  # does not give the same numbers again
        refused(content, "do not fit this model|fit these weights|checksum|coded", DENSE.replace("z = u + 0.5", moved))
    refused(content[:-9], "altered")
    for place in (3, 9, 30, 200, len(content) - 50):
        refused(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:], "altered|not a file|version")
    for place in np.linspace(len(content) // 2, len(content) - 33, 12).astype(int):
        altered = signed(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
        try:  # what only moves the noise may pass: the pixels have their checksum
            assert np.array_equal(local.decode(Flow(DENSE), altered, "a"), IMAGES[:2])
        except CodecError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("changes", [
    {"shape": [2, 4, 4]}, {"shape": [3, 4, 4, 3]}, {"shape": [1, 4, 4, 3]}, {"shape": [2, 10 ** 6, 10 ** 6, 3]},
    {"shape": [10 ** 9, 4, 4, 3]}, {"shape": [2, 4, 4, 1]}, {"shape": None}, {"bits": [8]}, {"bits": [8, 2]},
    {"bits": [0, 20]}, {"bits": [9, 20]}, {"bits": [8, 32]}, {"bits": 3}, {"words": 3}, {"words": 10 ** 9},
    {"words": -1}, {"threads": "1"}, {"threads": 0}, {"model": 1}, {"pixels": "0" * 64}], ids=str)
def test_a_header_that_lies_is_one_line(content, changes):
    refused(with_header(content, **changes))
