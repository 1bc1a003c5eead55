"""Class-conditional Jets: a flow for every context, and the same model as before without one."""
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.flops import forward_flops
from jet import Jet, JetConfig, bits_per_dim
from kernels import accelerate

TINY = JetConfig(image_size=(8, 4), channels=1, patch_size=2, num_couplings=3, kinds=("channels", "spatial"),
                 block_depth=1, emb_dim=8, num_heads=2, context_dim=5)
MODEL = JetConfig(image_size=16, num_couplings=7, block_depth=1, emb_dim=16, num_heads=2, context_dim=5)
blocks = pytest.mark.parametrize("block", ["vit", "cnn"])
modes = pytest.mark.parametrize("mode", ["pairing", "masking"])


def random_jet(config=TINY, **changes):
    torch.manual_seed(0)
    jet = Jet(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


def images(jet, n=2, tokens=3):
    """x (n, C, H, W) and a context (n, tokens, 5) for it."""
    generator, dtype = torch.Generator().manual_seed(1), next(jet.parameters()).dtype
    return (2 * torch.rand(n, *jet.config.image_shape, generator=generator, dtype=dtype) - 1,
            torch.randn(n, tokens, 5, generator=generator, dtype=dtype))


@blocks
@modes
@pytest.mark.parametrize("tokens", [1, 3])
def test_inverse_and_jacobian_with_a_context(block, mode, tokens):
    jet = random_jet(block=block, split_mode=mode, actnorm=True, invertible_dense=True).double()
    x, context = images(jet, tokens=tokens)
    z, logdet = jet(x, context)
    back, inverse_logdet = jet.inverse(z, context)
    assert (back - x).abs().max() < 1e-9 and (logdet + inverse_logdet).abs().max() < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda v: jet(v[None], context[:1])[0].flatten(), x[0])
    assert abs(torch.linalg.slogdet(jacobian.flatten(1)).logabsdet - logdet[0]) < 1e-8
    assert (jet(x, 0 * context)[0] - z).abs().max() > 1e-2  # the context decides
    assert (jet(x[1:], context[1:])[0] - z[1:]).abs().max() < 1e-9  # an image sees its own alone


@torch.no_grad()
@modes
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_the_conditioning_half_is_untouched_by_the_context(kind, mode):
    jet = random_jet(MODEL, num_couplings=1, kinds=(kind,), split_mode=mode)
    coupling, x, (_, context) = jet.couplings[0], torch.randn(2, 16, 48), images(jet)
    kept, moved = coupling.order.chunk(2)
    for out in (coupling(x, context)[0], coupling.inverse(x, context)[0]):
        assert torch.equal(out.index_select(coupling.axis, kept), x.index_select(coupling.axis, kept))
        assert (out != x).index_select(coupling.axis, moved).all()


@blocks
def test_every_weight_has_a_gradient_and_one_token_asks_nothing(block):
    jet = random_jet(block=block)
    for tokens in (3, 1):
        jet.zero_grad()
        bits_per_dim(*jet(*images(jet, tokens=tokens))).mean().backward()
        still = {name for name, weight in jet.named_parameters() if not weight.grad.any()}
        queries = {name for name, _ in jet.named_parameters() if "cross_attention.query" in name}
        assert still == (queries if tokens == 1 else set())  # a softmax over one key is 1


def test_a_fresh_jet_ignores_the_context_and_without_one_nothing_differs():
    jet = Jet(TINY)
    x, context = images(jet)
    assert torch.equal(jet(x, context)[0], jet(x, 0 * context)[0])
    plain = {}
    for dim in (0, 5):
        torch.manual_seed(3)
        plain[dim] = set(Jet(dataclasses.replace(TINY, context_dim=dim, num_couplings=1)).state_dict())
    assert {name for name in plain[5] - plain[0] if "cross_attention" not in name} == set()


@pytest.mark.parametrize("make, line", [
    (lambda c: None, r"no context is given, and this Jet takes floating-point \(2, M, 5\)"),
    (lambda c: c[:1], r"torch.float32 context \(1, 3, 5\) is given, .* takes floating-point \(2, M, 5\)"),
    (lambda c: c[..., :4], r"\(2, 3, 4\)"), (lambda c: c[:, 0], r"\(2, 5\)"), (lambda c: c[:, :0], r"\(2, 0, 5\)"),
    (lambda c: c.long(), "torch.int64 context")])
def test_a_context_that_does_not_fit_is_refused(make, line):
    jet = random_jet()
    x, context = images(jet)
    for function in (jet, jet.inverse, jet.initialize, lambda x, c: jet.sample(2, context=c)):
        with pytest.raises(ValueError, match=line):
            function(x, make(context))


def test_a_jet_without_one_refuses_a_context():
    jet = random_jet(context_dim=0)
    with pytest.raises(ValueError, match="this Jet takes none: context_dim is 0"):
        jet(*images(jet))


def test_samples_follow_their_context():
    jet = random_jet(image_size=8, channels=3, num_couplings=5).double()
    one, other = torch.eye(5)[[0, 0, 1]][:, None], torch.eye(5)[[0, 1, 1]][:, None]
    first, second = (jet.sample(3, torch.Generator().manual_seed(0), 0.3, context) for context in (one, other))
    same = (first == second).flatten(1).all(1)
    assert same.tolist() == [True, False, True]


@blocks
@modes
def test_the_kernels_for_cpus_take_a_context(block, mode):
    jet = random_jet(MODEL, block=block, split_mode=mode)
    x, context = images(jet, 3)
    with torch.no_grad():
        plain, back = jet(x, context), jet.inverse(x, context)
        fast, fast_back = accelerate(jet)(x, context), jet.inverse(x, context)
    assert (plain[0] - fast[0]).abs().max() < 1e-4 and (plain[1] - fast[1]).abs().max() < 1e-2
    assert (back[0] - fast_back[0]).abs().max() < 1e-3


def test_recomputed_activations_give_the_same_gradients():
    jet, gradients = random_jet(), []
    x, context = images(jet)
    for jet.checkpoint_activations in (False, True):
        jet.zero_grad()
        bits_per_dim(*jet(x, context)).mean().backward()
        gradients.append([weight.grad for weight in jet.parameters()])
    assert all(map(torch.equal, *gradients))
