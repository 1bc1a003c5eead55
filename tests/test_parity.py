"""Ours against arrays from the official model and from jet-pytorch (tests/golden/README.md)."""
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import load_jet, official_weights
from jet import dequantize
from jet import JetConfig, bits_per_dim
from recipe import make_optimizer, schedule, training_step
from train import TrainConfig

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = sorted(path.stem for path in GOLDEN.glob("jet_*.npz") if "port" not in path.stem)
CONDITIONAL = ("conditional_label", "conditional_tokens")


def nchw(array, dtype=None):
    return torch.tensor(array, dtype=dtype).permute(0, 3, 1, 2)


def close(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance


@pytest.fixture(params=OFFICIAL)
def golden(request):
    return np.load(GOLDEN / f"{request.param}.npz")


@pytest.fixture
def jet(request, golden):
    return load_jet(golden.fid.name)


def test_all_five_official_files_are_here():
    assert len(OFFICIAL) == 5


def test_dequantized_input_is_bit_exact(golden):
    assert torch.equal(dequantize(golden["image_u8"], golden["noise_u"]), torch.tensor(golden["x"]))


@torch.no_grad()
def test_float64_forward_and_inverse(golden, jet):
    jet.double()
    z, logdet = jet(nchw(golden["x"], torch.float64))
    close(z, nchw(golden["z_f64"]), 1e-11)
    close(logdet, torch.tensor(golden["logdet_f64"]), 1e-10)
    close(bits_per_dim(z, logdet), torch.tensor(golden["bits_per_dim_f64"]), 1e-11)
    x, logdet = jet.inverse(nchw(golden["z_sample"], torch.float64))
    close(x, nchw(golden["x_sample_f64"]), 1e-11)
    close(logdet, torch.tensor(golden["logdet_sample_f64"]), 1e-10)


@torch.no_grad()
def test_float32_forward_and_inverse(golden, jet):
    z, logdet = jet(nchw(golden["x"]))
    close(z, nchw(golden["z"]), 3e-5)
    close(logdet, torch.tensor(golden["logdet"]), 1e-3)
    close(bits_per_dim(z, logdet), torch.tensor(golden["bits_per_dim"]), 1e-5)
    x, logdet = jet.inverse(nchw(golden["z"]))
    close(x, nchw(golden["x_rec"]), 2e-4)
    close(logdet, torch.tensor(golden["logdet_inv"]), 1e-3)
    close(jet.inverse(nchw(golden["z_sample"]))[0], nchw(golden["x_sample"]), 2e-4)


@torch.no_grad()
def test_each_coupling(golden, jet):
    tokens = torch.tensor(golden["inter_tokens"])  # of image 0, before the first and after each
    logdets = torch.tensor(golden["inter_logdet"])
    assert len(jet.couplings) == len(tokens) - 1
    for i, coupling in enumerate(jet.couplings):
        out, logdet = coupling(tokens[i:i + 1])
        close(out, tokens[i + 1], 3e-5)
        close(logdet, logdets[i, 0], 1e-3)


def without_key_bias(name, tensor):
    """The gradient of the keys' bias is 0 but for rounding, which Adam blows up: not compared."""
    if name.endswith("key_value.bias"):
        return tensor.chunk(2)[1]
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def test_gradients(golden, jet):
    bits_per_dim(*jet(nchw(golden["x"]))).mean().backward()
    theirs = official_weights({name[5:]: golden[name] for name in golden if name.startswith("grad/couplings")})
    assert theirs.keys() == dict(jet.named_parameters()).keys()
    for name, parameter in jet.named_parameters():
        expected = without_key_bias(name, theirs[name])
        assert (without_key_bias(name, parameter.grad) - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_eight_optimizer_steps(golden, jet):
    config = TrainConfig(model=JetConfig(), total_steps=20)
    optimizer = make_optimizer(jet.parameters(), config)
    for t in range(8):
        x = dequantize(golden["traj/image_u8"][t], golden["traj/noise_u"][t]).permute(0, 3, 1, 2)
        loss, grad_norm = training_step(jet, optimizer, x, t, config)
        assert abs(loss - golden["trajf32mu/loss"][t]) <= 1e-5
        assert abs(grad_norm - golden["trajf32mu/grad_norm"][t]) <= 1e-4 * grad_norm
        assert abs(optimizer.param_groups[0]["lr"] - golden["traj/lr"][t]) <= 1e-10
    theirs = official_weights({name[16:]: golden[name] for name in golden if name.startswith("trajf32mu/step8/")})
    assert theirs.keys() == dict(jet.named_parameters()).keys()
    for name, parameter in jet.named_parameters():
        close(without_key_bias(name, parameter), without_key_bias(name, theirs[name]), 1e-6)
        close(parameter, theirs[name], 3e-4)


def test_schedule(golden):
    steps = golden["traj/schedule"]
    assert np.allclose([schedule(t, len(steps) - 1) for t in range(len(steps))], steps, rtol=0, atol=1e-7)


@pytest.fixture(params=CONDITIONAL)
def conditional(request):
    return np.load(GOLDEN / f"{request.param}.npz")


@torch.no_grad()
def test_float64_with_a_context(conditional):
    jet, context = load_jet(conditional.fid.name).double(), torch.tensor(conditional["context"])
    for this, what in ((context, ""), (0 * context, "_zero_context")):
        z, logdet = jet(nchw(conditional["x"], torch.float64), this)
        close(z, nchw(conditional[f"z{what}_f64"]), 1e-11)
        close(logdet, torch.tensor(conditional[f"logdet{what}_f64"]), 1e-10)
    x, logdet = jet.inverse(nchw(conditional["z_sample"], torch.float64), context)
    close(x, nchw(conditional["x_sample_f64"]), 1e-11)
    close(logdet, torch.tensor(conditional["logdet_sample_f64"]), 1e-10)


def test_float32_and_gradients_with_a_context(conditional):
    jet, context = load_jet(conditional.fid.name), torch.tensor(conditional["context"])
    z, logdet = jet(nchw(conditional["x"]), context)
    bits = bits_per_dim(z, logdet)
    close(z, nchw(conditional["z"]), 3e-5)
    close(bits, torch.tensor(conditional["bits_per_dim"]), 1e-5)
    bits.mean().backward()
    theirs = official_weights({name[5:]: conditional[name] for name in conditional if name.startswith("grad/couplings")})
    assert theirs.keys() == dict(jet.named_parameters()).keys()
    for name, parameter in jet.named_parameters():  # those of queries and keys of one token are exactly 0
        expected = without_key_bias(name, theirs[name])
        assert (without_key_bias(name, parameter.grad) - expected).abs().max() <= 2e-5 * expected.abs().max(), name
    with torch.no_grad():
        close(jet.inverse(nchw(conditional["z"]), context)[0], nchw(conditional["x_rec"]), 2e-4)


def test_jet_pytorch():
    golden = np.load(GOLDEN / "jet_pytorch_port_io.npz")
    jet = load_jet(GOLDEN / "jet_pytorch_port.pt", num_heads=4)
    with torch.no_grad():
        close(jet(nchw(golden["x"]))[0], nchw(golden["z"]), 3e-5)
        z, logdet = jet.double()(nchw(golden["x"], torch.float64))
    close(z, nchw(golden["z_f64"]), 1e-10)
    close(logdet, torch.tensor(golden["logdet_f64"]), 1e-3)
