"""Do images come back, in each precision? And of a Jet: is each coupling's log-det that of it?"""
import functools
import math

import numpy as np
import torch

from audit.checks import (BAR, INFO, PRECISIONS, at_precision, attempt, check, dequantized,
                          device_of, largest_of)
from harness.errors import short
from jet import Coupling, Jet

INVERSE_TOLERANCE = {"float64": (1e-6, 1.0), "float32": (0.05, 0.999), "bfloat16": (math.inf, 0.9)}
QUARTER_LEVEL = 0.25 / 127.5  # of what is no Jet: solvers and fixed points do not come nearer
IMAGES = 16  # chosen at random
COUPLING_TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 1e-3}
LOGDET_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 1e-2}


@torch.no_grad()
def layers_with_input(model, x):
    """(number, layer, tokens before it) of a Jet's layers."""
    tokens = model.patchify(x)
    for number, layer in enumerate(model.layers()):
        yield number, layer, tokens
        tokens = layer(tokens)[0]


def applied_scales(coupling, tokens):
    """The scales that a coupling applies, found by moving x2 from 0 to 1, and its log-det (B,)."""
    moved = coupling.order.chunk(2)[1]
    at_zero, at_one = (coupling(tokens.index_fill(coupling.axis, moved, value))[0]
                       for value in (0, 1))
    applied = (at_one - at_zero).index_select(coupling.axis, moved)
    return applied.flatten(1), coupling(tokens)[1]


def jacobian(function, x, chunk=64):
    """The autograd Jacobian of one example x (...): (n, n)."""
    n = x.numel()
    repeated = x.detach().expand(chunk, *x.shape).clone().requires_grad_(True)
    out = function(repeated).flatten(1)
    rows = []
    for start in BAR(range(0, n, chunk), "Jacobian"):
        size = min(chunk, n - start)
        chosen = out[range(size), range(start, start + size)].sum()
        gradient, = torch.autograd.grad(chosen, repeated, retain_graph=True)
        rows.append(gradient[:size].flatten(1))
    return torch.cat(rows)


# ---- identity: float64 log-det against the scales that are applied

def check_layers(subject):
    """(checks of a Jet's layers on their own, all scales that were applied)."""
    line, model = functools.partial(check, "Identity"), subject.model
    x = subject.x(subject.choose(subject.rng("couplings"), IMAGES)).to(device_of(model))
    gaps, kept, crossed, scales = [], [], [], []
    for number, layer, tokens in BAR(list(layers_with_input(model, x)), "log-det by coupling"):
        if isinstance(layer, Coupling):
            applied, logdet = applied_scales(layer, tokens)
            scales += [applied.min().item(), applied.max().item()]
            gaps.append((applied.log().sum(1) - logdet).abs().max())
            held = layer.order.chunk(2)[0]
            change = (layer(tokens)[0] - tokens).index_select(layer.axis, held)
            kept.append(change.abs().max())
            crossed.append(crossing(layer, tokens[:1], applied[0], number))
        else:  # one token at a time: all have the same Jacobian
            J = jacobian(lambda t: layer(t)[0], tokens[0, :1])
            logdet = layer(tokens[:1])[1].detach()
            gaps.append((tokens.shape[1] * torch.linalg.slogdet(J)[1] - logdet).abs())
    total = sum(layer(tokens)[1] for _, layer, tokens in layers_with_input(model, x))
    missing = (total - model(x)[1]).abs().max().item()
    worst, kept, crossed = largest_of(gaps), largest_of(kept), largest_of(crossed)
    return [
        line("log-det by coupling", worst, worst < 1e-6, "below 1e-6 nats",
             "log-det of each coupling against the scales that it applies", 1e-6),
        line("conditioning half", kept, kept == 0, "0",
             "x1 leaves each coupling as it came, to the bit"),
        line("triangular", crossed, crossed < 1e-9, "below 1e-9",
             "x2 acts on its own place alone: the Jacobian against a random vector", 1e-9),
        line("sum over couplings", missing, missing < 1e-6 * max(1, total.abs().max().item()),
             "below 1e-6 of it", "no coupling is left out", 1e-6)], scales


def crossing(coupling, tokens, applied, seed):
    """How much z2 depends on x2 but by its own scale: J^T v = scale * v. tokens: of one image."""
    moved = coupling.order.chunk(2)[1]
    tokens = tokens.detach().clone().requires_grad_(True)
    z2 = coupling(tokens)[0].index_select(coupling.axis, moved)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(z2.shape, generator=generator, dtype=z2.dtype).to(z2)
    gradient, = torch.autograd.grad((z2 * v).sum(), tokens)
    gradient = gradient.index_select(coupling.axis, moved)
    return (gradient.flatten() - applied * v.flatten()).abs().max()


# ---- inverse

@torch.no_grad()
def check_inverse(subject, model, claimed=None):
    """Whether images come back, as a whole and layer by layer, in each precision.

    claimed: the precision of a claim, which must hold; of those that are not, a Jet's float32 must.
    """
    if not subject.inverts:
        return
    rng = subject.rng("inverse")
    indices = subject.choose(rng, IMAGES)
    array, noise = np.array(subject.array[indices]), subject.noise_of(indices, rng)
    noise = noise * 0.5 + 0.25  # in the middle of the levels: else rounding alone would move some
    matters = {"float64", claimed} | ({"float32"} if isinstance(model, Jet) else set())
    for precision in PRECISIONS:
        copied, dtype, context = at_precision(model, precision)
        x = dequantized(array, noise, dtype).to(device_of(copied))
        with context:
            checks = list(check_inverse_at(precision, copied, array, x, precision in matters,
                                           subject.context(subject.y(indices))))
        yield from checks


def check_inverse_at(precision, model, array, x, matters, context):
    """x: the images array, dequantized. context: [] or [what a class-conditional model is told]."""
    def line(name, *rest):
        return check("Inverse", f"{precision}: {name}", *rest)

    def there_and_back():
        z, logdet = model(x, *context)
        back, back_logdet = model.inverse(z, *context)
        return back, logdet + back_logdet

    result = attempt(there_and_back)
    if isinstance(result, Exception):
        yield line("largest error", None, None, "", f"the model does not run so ({short(result)})")
        return
    back, logdets = result
    largest, share = INVERSE_TOLERANCE[precision]
    if not isinstance(model, Jet):
        largest, share = max(largest, QUARTER_LEVEL), 0.999
    error, cancelled = (back - x).abs().max().item(), logdets.abs().max().item()
    pixels = ((back.double() + 1) * 127.5).floor().permute(0, 2, 3, 1).cpu().numpy()
    same = float((pixels == array).mean())
    if math.isfinite(largest):
        yield line("largest error", error, error < largest if matters else INFO,
                   f"below {largest:.2g}", f"x against inverse(forward(x)), {len(array)} images, "
                   "pixel values in -1 to 1", max(largest, 1e-3))
    yield line("pixels that come back", same, same >= share if matters else INFO,
               f"at least {share:.1%}", f"exactly; largest error {error:.2g}; log-dets cancel to "
               f"{cancelled:.2g} nats", 0.02)
    if not isinstance(model, Jet):
        return
    errors, gaps = {}, []  # of each layer's inverse; of the log-det against applied scales
    for number, layer, tokens in layers_with_input(model, x):
        kind = "Coupling" if isinstance(layer, Coupling) else type(layer).__name__
        again = layer.inverse(layer(tokens)[0])[0]
        errors[f"{kind} {number}"] = (again - tokens).abs().max().item()
        if isinstance(layer, Coupling):
            applied, logdet = applied_scales(layer, tokens)
            gaps.append((applied.double().log().sum(1) - logdet).abs().max())
    worst, gap = largest_of(errors.values()), largest_of(gaps)
    tolerance = COUPLING_TOLERANCE[precision]
    yield line("worst coupling", worst, worst < tolerance, f"below {tolerance:g}",
               f"{max(errors, key=errors.get)}; each layer forward and back on its own", tolerance)
    tolerance = LOGDET_TOLERANCE[precision]
    yield line("log-det against scales", gap, gap < tolerance, f"below {tolerance:g} nats",
               "the scales that act on x2 and those in the log-det are the same numbers", tolerance)
