"""A model that is no Jet, for audit_bpd.py --adapter experiments/adapter_example.py.

An adapter is a file with two functions, forward and inverse, between images x, float (B, C, H, W)
as jet.dequantize makes them, and z, of the same shape, with the log-determinant of each (B,) in
nats; log p(x) is log N(z; 0, I) + logdet. They compute in the type of x: the audit gives float64
and float32. docs/audit.md has the other kinds of adapters. This one fits a normal distribution to
each pixel of the training images: the least that a density model should beat.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_images

levels = np.asarray(load_images("cifar10-subset", "train").array, np.float64)
levels = levels.transpose(0, 3, 1, 2)  # (N, C, H, W)
x_mean = torch.from_numpy((levels.mean(0) + 0.5) / 127.5 - 1)
x_std = torch.from_numpy(np.sqrt(levels.var(0) + 1 / 12) / 127.5)


def forward(x):
    """x -> z, log|det dz/dx|."""
    return (x - x_mean.to(x)) / x_std.to(x), -x_std.log().sum().to(x).expand(len(x))


def inverse(z):
    """z -> x, log|det dx/dz|."""
    return z * x_std.to(z) + x_mean.to(z), x_std.log().sum().to(z).expand(len(z))
