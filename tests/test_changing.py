"""What docs/changing.md promises to whoever forgets a part of a new block or setting."""
import argparse
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.flags import add_setting_flags
from harness.flops import forward_flops, num_parameters
from harness.place import Place
from jet import Jet, JetConfig, bits_per_dim
from kernels import accelerate
from train import TrainConfig

BLOCKS = JetConfig.__dataclass_fields__["block"].metadata["choices"]
MODEL = JetConfig(image_size=16, num_couplings=7, block_depth=1, emb_dim=16, num_heads=2)
blocks = pytest.mark.parametrize("block", BLOCKS)
modes = pytest.mark.parametrize("mode", ["pairing", "masking"])


def random_jet(block, mode, **changes):
    torch.manual_seed(0)
    jet = Jet(dataclasses.replace(MODEL, block=block, split_mode=mode, **changes))
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


@blocks
@modes
def test_every_block_is_a_flow(block, mode):
    jet = random_jet(block, mode).double()
    x = 2 * torch.rand(3, 3, 16, 16, dtype=torch.float64) - 1
    z, logdet = jet(x)
    back, inverse_logdet = jet.inverse(z)
    assert (z - x).abs().max() > 1e-2 and (back - x).abs().max() < 1e-9
    assert (logdet + inverse_logdet).abs().max() < 1e-9
    assert (jet(x[:1])[0] - z[:1]).abs().max() < 1e-9  # no image looks at another
    bits_per_dim(z, logdet).mean().backward()
    assert not [name for name, weight in jet.named_parameters() if weight.grad is None or not weight.grad.any()]


@blocks
@modes
def test_flops_of_every_block_are_those_that_pytorch_counts(block, mode):
    jet = random_jet(block, mode, emb_dim=64)
    math_alone = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_alone, FlopCounterMode(display=False) as counter:
        jet(torch.zeros(8, 3, 16, 16))
    assert abs(counter.get_total_flops() / 8 / forward_flops(jet.config) - 1) < 0.01


@blocks
@modes
@pytest.mark.parametrize("switches", [{}, {"actnorm": True, "invertible_dense": True}])
def test_parameters_of_every_block_are_those_that_it_has(block, mode, switches):
    jet = random_jet(block, mode, image_size=(16, 32), block_depth=3, **switches)
    assert num_parameters(jet.config) == sum(parameter.numel() for parameter in jet.parameters())


@blocks
@modes
def test_every_block_is_the_same_with_the_kernels_for_cpus(block, mode):
    jet, x = random_jet(block, mode), 2 * torch.rand(3, 3, 16, 16) - 1
    with torch.no_grad():
        plain, fast = jet(x), accelerate(jet)(x)
    assert (plain[0] - fast[0]).abs().max() < 1e-4 and (plain[1] - fast[1]).abs().max() < 1e-2


@pytest.mark.parametrize("config_class", [JetConfig, TrainConfig, Place])
def test_every_setting_has_a_flag_and_a_sentence(config_class):
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, config_class)
    with_flag = {action.dest for action in parser._actions if action.help}
    aside = {"model", "init", "extends", "wait_s", "echo"}  # set by the programs themselves
    assert {field.name for field in dataclasses.fields(config_class)} - aside <= with_flag
