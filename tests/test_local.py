"""Bytes for any flow: local bits-back coding brings images back, at the price of the likelihood."""
import math

import numpy as np
import pytest
import torch

from coding import local
from coding.ans import CodecError, Coder
from data import load_images
from test_audit_corpus import AFFINE, MULTI_SCALE, UNIFORM_BUT_ROUGH
from test_codec import signed

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
