"""What a flow must prove, in float64 and with random weights: a fresh Jet is the identity and proves nothing."""
import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jet import quantize
from harness.flops import forward_flops, logdet_cap_nats
from jet import Jet, JetConfig, SPATIAL_SPLITS, bits_per_dim, spatial_order

TINY = JetConfig(image_size=(8, 4), channels=1, patch_size=2, num_couplings=3, block_depth=1, emb_dim=8, num_heads=2)
SQUARE = dataclasses.replace(TINY, image_size=4, channels=2, patch_size=1)  # also 32 dimensions
MODEL = JetConfig(image_size=16, num_couplings=7, block_depth=1, emb_dim=16, num_heads=2)
SPLITS = [("channels", "checkerboard"), *(("spatial", split) for split in SPATIAL_SPLITS)]
SWITCHES = [("actnorm", "invertible_dense"), ("actnorm",), ("invertible_dense",), ()]


def random_jet(config, seed=0, **changes):
    torch.manual_seed(seed)
    jet = Jet(dataclasses.replace(config, **changes)).double()
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


def images(jet, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(jet.parameters()).dtype
    return torch.rand(n, *jet.config.image_shape, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("block", ["vit", "cnn"])
@pytest.mark.parametrize("mode", ["pairing", "masking"])
@pytest.mark.parametrize("config", [TINY, SQUARE], ids=["not square", "square"])
def test_inverse_and_jacobian(config, mode, block):
    for (kind, split), switches in zip(SPLITS, itertools.cycle(SWITCHES)):
        jet = random_jet(config, kinds=(kind, "channels"), spatial_splits=(split,), split_mode=mode, block=block,
                         **dict.fromkeys(switches, True))
        x = images(jet, 2)
        z, logdet = jet(x)
        back, inverse_logdet = jet.inverse(z)
        assert (z - x).abs().max() > 1e-2  # not the identity
        assert (back - x).abs().max() < 1e-9
        assert (logdet + inverse_logdet).abs().max() < 1e-9
        copies = x[:1].expand(x[0].numel(), -1, -1, -1).clone().requires_grad_()  # one for each row of the Jacobian
        rows = torch.autograd.grad(jet(copies)[0].flatten(1).diagonal().sum(), copies)[0].flatten(1)
        assert abs(torch.linalg.slogdet(rows).logabsdet - logdet[0]) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("mode", ["pairing", "masking"])
@pytest.mark.parametrize("kind, split", SPLITS)
def test_conditioning_half_is_untouched_and_decides(kind, split, mode):
    jet = random_jet(MODEL, num_couplings=1, kinds=(kind,), spatial_splits=(split,), split_mode=mode)
    coupling, x = jet.couplings[0], torch.randn(2, 16, 48, dtype=torch.float64)
    kept, moved = coupling.order.chunk(2)
    (z, logdet), (back, _) = coupling(x), coupling.inverse(x)
    for out in (z, back):
        assert torch.equal(out.index_select(coupling.axis, kept), x.index_select(coupling.axis, kept))
        assert (out != x).index_select(coupling.axis, moved).all()
    other = x.index_add(coupling.axis, moved, torch.ones_like(x.index_select(coupling.axis, moved)))
    assert torch.equal(coupling(other)[1], logdet)  # bias and scale depend on x1 alone


@torch.no_grad()
@pytest.mark.parametrize("mode", ["pairing", "masking"])
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_the_affine_map_is_the_formula(kind, mode):
    jet = random_jet(MODEL, num_couplings=1, kinds=(kind,), split_mode=mode, scale_factor=3.0)
    coupling, x = jet.couplings[0], torch.randn(2, 16, 48, dtype=torch.float64)
    kept, moved = coupling.order.chunk(2)
    take = (lambda v, indices: v[:, :, indices]) if kind == "channels" else (lambda v, indices: v[:, indices])
    x1, x2 = take(x, kept), take(x, moved)
    if mode == "masking":  # all tokens go in, x2 zeroed; what comes out at x2's places counts
        masked = x - x.index_copy(coupling.axis, kept, torch.zeros_like(x1))
        bias, raw = (take(out, moved) for out in coupling.net(masked).chunk(2, -1))
    else:
        bias, raw = (out.reshape(x1.shape) for out in coupling.net(x1.reshape(2, 16, 24)).chunk(2, -1))
    z, logdet = coupling(x)
    assert torch.allclose(take(z, moved), (x2 + bias) * 3 / (1 + (-raw).exp()), rtol=0, atol=1e-12)
    assert torch.allclose(logdet, (3 / (1 + (-raw).exp())).log().flatten(1).sum(1), rtol=0, atol=1e-10)


@torch.no_grad()
def test_logdet_stays_below_its_cap_and_reaches_it():
    jet = random_jet(MODEL, scale_factor=3.0)
    x = images(jet, 2)
    assert (jet(x)[1] < logdet_cap_nats(jet.config)).all()
    for coupling in jet.couplings:
        coupling.net.final_proj.bias[24:] = 100  # every scale is m
    assert torch.allclose(jet(x)[1], torch.full((2,), logdet_cap_nats(jet.config), dtype=torch.float64))
    assert logdet_cap_nats(jet.config) == pytest.approx(7 * 768 / 2 * math.log(3))


@torch.no_grad()
def test_each_coupling_comes_after_its_actnorm_and_its_dense_layer():
    jet = random_jet(MODEL, num_couplings=2, actnorm=True, invertible_dense=True)
    x = images(jet, 2)
    tokens = jet.patchify(x)
    for layer in (jet.actnorms[0], jet.denses[0], jet.couplings[0], jet.actnorms[1], jet.denses[1], jet.couplings[1]):
        tokens = layer(tokens)[0]
    assert torch.equal(jet(x)[0], jet.unpatchify(tokens))


def test_spatial_splits_are_the_official_patterns():
    def grid(split, rows=4, columns=6):
        order = spatial_order(split, rows, columns)
        assert order.sort().values.tolist() == list(range(rows * columns))
        return {(t // columns, t % columns) for t in order[:len(order) // 2].tolist()}

    every = {(r, c) for r in range(4) for c in range(6)}
    assert grid("checkerboard") == {(r, c) for r, c in every if (r + c) % 2 == 0}
    assert grid("vstripes") == {(r, c) for r, c in every if c % 2 == 0}
    assert grid("hstripes") == {(r, c) for r, c in every if r % 2 == 0}
    for split in ("checkerboard", "vstripes", "hstripes"):
        assert grid(f"{split}-inv") == every - grid(split)


def test_spatial_splits_cycle_over_spatial_couplings_past_the_sixth():
    splits = [split for _, split in JetConfig(num_couplings=40).coupling_splits]
    assert [i for i, split in enumerate(splits) if split] == list(range(4, 40, 5))
    assert [split for split in splits if split] == [*SPATIAL_SPLITS, *SPATIAL_SPLITS[:2]]


def test_a_fresh_jet_is_the_identity():
    for block, mode in itertools.product(("vit", "cnn"), ("pairing", "masking")):
        jet = Jet(dataclasses.replace(MODEL, block=block, split_mode=mode))
        x = images(jet, 2)
        z, logdet = jet(x)
        assert torch.equal(z, x) and not logdet.any()


def test_every_parameter_gets_a_gradient():
    for block, mode in itertools.product(("vit", "cnn"), ("pairing", "masking")):
        jet = random_jet(MODEL, block=block, split_mode=mode, actnorm=True, invertible_dense=True)
        bits_per_dim(*jet(images(jet, 2))).mean().backward()
        assert [name for name, p in jet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_forward_and_inverse_change_no_state():
    jet = random_jet(MODEL, actnorm=True, invertible_dense=True)
    before = {name: tensor.clone() for name, tensor in jet.state_dict().items()}
    jet.inverse(jet(images(jet, 2))[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in jet.state_dict().items())


def test_actnorm_starts_as_identity_and_initialize_normalizes():
    jet = Jet(dataclasses.replace(MODEL, actnorm=True, num_couplings=3)).double()
    x = 3 * images(jet, 64) + 5
    assert torch.equal(jet(x)[0], x)
    torch.nn.init.normal_(jet.couplings[0].net.final_proj.weight)  # what comes later sees other values
    jet.initialize(x)
    tokens = jet.patchify(x)
    for actnorm, coupling in zip(jet.actnorms, jet.couplings):
        tokens = actnorm(tokens)[0]
        assert tokens.mean((0, 1)).abs().max() < 1e-9
        assert (tokens.std((0, 1), correction=0) - 1).abs().max() < 1e-4
        tokens = coupling(tokens)[0]
    z, logdet = jet(x)
    assert (jet.inverse(z)[0] - x).abs().max() < 1e-9 and logdet.abs().min() > 1


def test_dense_layer_starts_as_a_rotation():
    dense = Jet(dataclasses.replace(MODEL, invertible_dense=True)).double().denses[0]
    weight = dense(torch.eye(48, dtype=torch.float64)[None])[0][0]
    assert (weight @ weight.T - torch.eye(48)).abs().max() < 1e-5
    assert not torch.equal(weight, torch.eye(48))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["pairing", "masking"])
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_bfloat16_autocast_keeps_scale_and_logdet_in_agreement(kind, mode):
    jet = random_jet(MODEL, kinds=(kind,), num_couplings=1, split_mode=mode).float()
    coupling, x = jet.couplings[0], torch.randn(4, 16, 48)
    plain, _ = coupling(x)
    kept, moved = coupling.order.chunk(2)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = coupling(x)
        shifted, _ = coupling(x.index_add(coupling.axis, moved, torch.ones_like(plain.index_select(coupling.axis, moved))))
        back, inverse_logdet = coupling.inverse(z)
    scale = (shifted - z).index_select(coupling.axis, moved)  # as applied: z2 grows by it when x2 grows by 1
    assert z.dtype == logdet.dtype == back.dtype == torch.float32
    assert (z - plain).abs().max() > 1e-4  # the network did run in bfloat16
    assert (scale.log().flatten(1).sum(1) - logdet).abs().max() < 1e-3  # of 384 scales: float32 rounding
    assert (back - x).abs().max() < 1e-4
    assert torch.equal(logdet, -inverse_logdet)


@torch.no_grad()
def test_bfloat16_autocast_leaves_the_other_layers_alone():
    jet = random_jet(MODEL, num_couplings=1, actnorm=True, invertible_dense=True).float()
    x = torch.randn(4, 16, 48)
    for layer in (jet.actnorms[0], jet.denses[0]):
        plain = layer(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x)[0], plain)
            assert (layer.inverse(plain)[0] - x).abs().max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = jet(images(jet, 2))
    assert z.dtype == logdet.dtype == torch.float32


@torch.no_grad()
def test_toy_flow_integrates_to_one():
    jet = random_jet(TINY, image_size=1, channels=2, patch_size=1, num_couplings=1, kinds=("channels",))
    kept, moved = jet.couplings[0].order.tolist()
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    x = torch.empty(len(grid), 2, 1, 1, dtype=torch.float64)
    x[:, kept], x[:, moved] = 0.3, grid[:, None, None]
    z, logdet = jet(x)
    log_prior = -z.flatten(1).square().sum(1) / 2 - math.log(2 * math.pi)
    density = (log_prior + logdet).exp() / math.exp(-0.3 ** 2 / 2 - math.log(2 * math.pi) / 2)  # p(x2 | x1)
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-9
    nats = bits_per_dim(z, logdet) * 2 * math.log(2) - 2 * math.log(127.5)
    assert torch.allclose(nats, -(log_prior + logdet), rtol=0, atol=1e-9)


def test_a_uniform_density_scores_8_bits():
    u = torch.rand(5, 3, 8, 8, dtype=torch.float64)  # (x + 1) / (256 / 127.5) for x uniform
    z = torch.special.ndtri(u)
    log_prior = -z.square() / 2 - math.log(2 * math.pi) / 2
    logdet = (-math.log(256 / 127.5) - log_prior).flatten(1).sum(1)
    assert (bits_per_dim(z, logdet) - 8).abs().max() < 1e-12


@torch.no_grad()
def test_sample():
    jet = random_jet(MODEL)
    first, second, other = (jet.sample(3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 16, 16, 3) and first.dtype == torch.uint8
    assert torch.equal(first, second) and not torch.equal(first, other)
    wide = random_jet(TINY)
    z = torch.randn(3, 1, 8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = quantize(wide.inverse(0.7 * z)[0]).permute(0, 2, 3, 1)
    assert torch.equal(wide.sample(3, torch.Generator().manual_seed(5), temperature=0.7), expected)
    gray = Jet(MODEL).sample(1, temperature=1e-6)  # a fresh Jet maps 0 to the middle grey
    assert set(gray.unique().tolist()) <= {127, 128}
    jet.couplings[0].net.final_proj.bias[24:] = -1e4  # scales of 0
    with pytest.raises(ValueError, match="not finite"):
        jet.sample(1)


@pytest.mark.parametrize("block", ["vit", "cnn"])
@pytest.mark.parametrize("mode", ["pairing", "masking"])
def test_flops_match_the_counter(block, mode):
    """With the switches on; test_changing.py has them off."""
    jet = Jet(dataclasses.replace(MODEL, emb_dim=64, block=block, split_mode=mode, actnorm=True, invertible_dense=True))
    batch = 32
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        jet(torch.zeros(batch, *jet.config.image_shape))
    assert abs(counter.get_total_flops() / batch / forward_flops(jet.config) - 1) < 0.01


def test_state_dict_holds_the_permutations():
    one, two = (random_jet(MODEL, seed, invertible_dense=True) for seed in (0, 1))
    x = images(one, 2)
    assert not torch.equal(one(x)[0], two(x)[0])
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x)[0], two(x)[0])


BAD = [
    (dict(image_size=30), r"patch_size=4: must divide image_size=30"),
    (dict(image_size=(8, 8, 8)), r"image_size=\(8, 8, 8\): must be"),
    (dict(image_size=0), r"image_size=0: must be"),
    (dict(image_size=(8,)), r"image_size=\(8,\): must be"),
    (dict(image_size=()), r"image_size=\(\): must be"),
    (dict(image_size="64"), r"image_size='64': must be"),
    (dict(channels=0), r"channels=0: must be a whole number"),
    (dict(num_couplings=2.5), r"num_couplings=2.5: must be a whole number"),
    (dict(num_couplings=True), r"num_couplings=True: must be a whole number"),
    (dict(block="mlp"), r"block='mlp': must be vit or cnn"),
    (dict(emb_dim=30), r"emb_dim=30: must be divisible by num_heads=8"),
    (dict(scale_factor=-1.0), r"scale_factor=-1.0: must be a finite number"),
    (dict(norm_eps=math.inf), r"norm_eps=inf: must be a finite number"),
    (dict(kinds=("channel",)), r"kinds=\('channel',\): must be a non-empty list of channels, spatial"),
    (dict(kinds=()), r"kinds=\(\): must be a non-empty list"),
    (dict(spatial_splits=("rows",)), r"spatial_splits=\('rows',\): must be .*vstripes-inv"),
    (dict(split_mode="mask"), r"split_mode='mask': must be pairing or masking"),
    (dict(gelu="relu"), r"gelu='relu': must be tanh or exact"),
    (dict(actnorm=1), r"actnorm=1: must be true or false"),
    (dict(image_size=28), r"spatial_splits='checkerboard' .*: the 49 tokens must be an even number"),
    (dict(image_size=28, spatial_splits=("vstripes",)), r"'vstripes' .*: the 49 tokens must be"),
    (dict(image_size=(12, 16), spatial_splits=("hstripes",)), r"'hstripes' .*: the 3 token rows must be"),
    (dict(image_size=9, patch_size=3, kinds=("channels",)), r"the 27 values of a token must be"),
    (dict(image_size=12, patch_size=3, kinds=("spatial",)), r"the 27 values of a token must be"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_a_bad_value_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        JetConfig(**changes)
    assert "\n" not in str(error.value)


def test_what_needs_no_halves_is_allowed():
    JetConfig(image_size=28, kinds=("channels",))
    JetConfig(image_size=12, patch_size=3, kinds=("spatial",), split_mode="masking")
    jet = random_jet(TINY, image_size=(8, 12), channels=3, patch_size=4, spatial_splits=("checkerboard", "vstripes"),
                     kinds=("spatial",))  # an odd number of columns
    x = images(jet, 2)
    assert (jet.inverse(jet(x)[0])[0] - x).abs().max() < 1e-9


def test_config_from_json_equals_the_original():
    config = JetConfig(image_size=[32, 32], kinds=["channels", "spatial"], scale_factor=3)
    assert repr(config) == repr(JetConfig(image_size=32, kinds=("channels", "spatial"), scale_factor=3.0))


def test_other_images_are_refused():
    jet = Jet(MODEL)
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 16, 16, 3), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"takes floating-point \(B, 3, 16, 16\)"):
            jet(x)
