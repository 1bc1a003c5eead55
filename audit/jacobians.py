"""The log-det against the Jacobian of what the model really does: finite differences of outputs.

No gradient that a model gives is taken on trust: for a whole Jacobian none is asked for; where it
would be too large, gradients serve a stochastic estimate, each held to finite differences.
"""
import functools
import math

import numpy as np
import torch

from audit.checks import BAR, ERRORS, OPEN, attempt, check, held
from harness.errors import short
from harness.flops import forward_flops
from jet import Jet

WHOLE_DIMS = 64 * 64 * 3
SECONDS, MOST_SECONDS = 50, 480  # that Jacobians take by default; that the first may take
JET_FLOPS, MOST_JET_FLOPS = 6e11, 2.5e12  # of a Jet the same, but equal everywhere
LU_FLOPS = 2e10  # a second
STEPS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
SURE = 1e-7  # relative difference of slopes at neighbouring steps: all that a check needs
PROBES, KRYLOV = 12, 30
LARGER = 100  # steps, where smaller ones do not confirm a log-det
UNSURE = 0.1  # nats a dimension: what steps may be to blame for at most
ORDER = (True, OPEN, False)  # of several images, the worst counts
NOISIEST = 0.02  # nats a dimension
WIDEST = 1e8  # eigenvalues of J^T J: beyond, the smallest are lost in the rounding of slopes
line = functools.partial(check, "Identity", "log-det, whole images")


def how_many(subject, most):
    """Images whose whole Jacobian can be afforded; 0: not even one's."""
    dims = subject.dims
    if dims > WHOLE_DIMS:
        return 0
    if isinstance(subject.model, Jet):
        flops = dims * forward_flops(subject.model.config) + dims ** 3
        return min(most, max(int(JET_FLOPS / flops), 1 if flops < MOST_JET_FLOPS else 0))
    if subject.is_density:
        return 0
    seconds = jacobian_seconds(subject)
    return min(most, max(int(SECONDS / seconds), 1 if seconds < MOST_SECONDS else 0))


def jacobian_seconds(subject):
    """What an adapter's whole Jacobian takes at one image, to both sides, and six log-dets."""
    chosen = subject.rng("cost").integers(len(subject.array), size=32)
    x, y = subject.x(chosen), subject.y(chosen)
    subject.forward(x, y)
    begun = subject.model.worker.seconds
    subject.forward(x, y)
    seconds = max(subject.model.worker.seconds - begun, 0.0) / subject.model.threads
    return 2 * seconds / len(x) * subject.dims + 6 * subject.dims ** 3 * 2 / 3 / LU_FLOPS


def check_whole_images(subject, count):
    """count: images whose whole Jacobian is taken; 0: a stochastic estimate instead."""
    if subject.is_density:
        return []
    rng = subject.rng("Jacobian")
    chosen = rng.choice(len(subject.array), min(max(count, 2), len(subject.array)), replace=False)
    x, y = subject.x_mixed(chosen, rng), subject.y(chosen)
    ends = [0, len(subject.array) - 1]
    if is_float32(subject.forward(subject.x_mixed(ends, rng), subject.y(ends))):
        return [line(None, OPEN, "", "its answers to float64 are of float32: no reference")]
    if subject.dequantizes and not count:
        return [line(None, OPEN, "", "its dequantizer allows no small steps in all directions, and "
                     f"a Jacobian of {subject.dims:,} x {subject.dims:,} is too large")]
    step, rough, bent = find_step(subject, x[:2], y[:2], rng)
    if rough > 1e-3:
        return [line(rough, OPEN, "", "its outputs are too rough for a derivative (float32 inside, "
                     f"or not smooth): slopes at neighbouring steps differ by {rough:.1g} of them")]
    smooth = check("Identity", "slopes at several steps", bent, bent < 0.05, "below 0.05",
                   f"dz/dx over a step of {step:.0e} and of 1e-05, their relative difference")
    if isinstance(subject.model, Jet) and not count:
        return [line(None, None, "", f"a Jacobian of {subject.dims:,} x {subject.dims:,} at this "
                     "model's cost is too large: coupling by coupling, below"), smooth]
    if count:
        return [compare(subject, x[:count], y[:count], step, rng), smooth]
    return [compare_stochastic(subject, x, y, step, rng), smooth]


def is_float32(results):
    """Whether all numbers are such as float32 has."""
    return all(bool((part == part.float().double()).all()) for part in results) and bool(
        results[0].std() > 0)


def compare(subject, x, y, step, rng):
    claimed = subject.mean_logdet(x, y)
    allowed = 1e-6 * subject.dims + subject.allowance(64)
    if not isinstance(subject.model, Jet):  # which is exact
        allowed += subject.nats
    found = [gap_of_image(subject, *one, step, allowed, rng) for one in zip(x, y, claimed)]
    gap, error, holds = max(found, key=lambda one: (ORDER.index(one[2]), one[0]))
    if allowed > NOISIEST * subject.dims and gap < allowed:
        return line(gap, OPEN, "", "its stochastic log-det has a deviation of "
                    f"{subject.noise:.2g} nats: too much to say")
    if holds is OPEN:
        return line(gap, OPEN, f"below {allowed:.2g} nats", "against slogdet of Jacobians from "
                    f"finite differences of z, which themselves may be off by {error:.2g} nats",
                    allowed + error)
    return line(gap, holds, f"below {allowed:.2g} nats",
                f"of {len(x)} images chosen at random, against slogdet of their Jacobians "
                f"({subject.dims:,} x {subject.dims:,}), from finite differences of z", allowed)


def gap_of_image(subject, x, y, claimed, step, allowed, rng):
    """(how far log|det dz/dx| is from what is claimed at one image x (C, H, W) of label y, nats;
    how much of that the steps may be to blame for; whether the claim holds).

    Of a Jet, forward differences may confirm a claim. Else differences to both sides are taken, in
    which the curvature of z cancels, and over larger steps, which have less of its rounding.
    """
    found, is_smooth = [], isinstance(subject.model, Jet)
    for factor in (1, LARGER):
        steps = signed_steps(subject, x, factor * step, rng)
        J = jacobian(subject, x, y, steps, rng)
        if is_smooth and (gap := abs(log_abs_det(J) - claimed)) < allowed:
            return gap, 0.0, True
        E = jacobian(subject, x, y, -steps, rng)
        J += E
        J /= 2
        E -= J
        gap, error = abs(log_abs_det(J) - claimed), error_of_steps(J, E, rng)
        if gap < allowed and (is_smooth or error < 10 * allowed):  # else it may be so by chance
            return gap, error, True
        if gap >= allowed + error and error < UNSURE * len(J):
            return gap, error, False
        found.append((error, gap))
    error, gap = min(found)
    return gap, error, OPEN if gap < allowed + error else False


def find_step(subject, x, y, rng):
    """(the step at which slopes are surest, how much they differ there, how much up to 1e-5)."""
    slopes = []
    for image, label in zip(x, y):
        direction = subject.signs(image, rng)
        if not subject.dequantizes:  # the largest step must stay where the smallest is
            direction = direction * (subject.room(image) / STEPS[-1]).clamp(max=1)
        moved = torch.stack([image, *(image + step * direction for step in STEPS)])
        z = subject.forward(moved, label.expand(len(moved)))[0].flatten(1).numpy()
        slopes.append((z[1:] - z[0]) / np.array(STEPS)[:, None])
    slopes = np.concatenate(slopes, 1)
    sizes = np.abs(slopes[1:]) + 1e-2 * np.abs(slopes[1:]).mean(1, keepdims=True) + 1e-300
    # Of most values: an honest density may be as steep as the step is wide at a few.
    rough = np.quantile(np.abs(np.diff(slopes, axis=0)) / sizes, 0.9, axis=1)
    sure = np.flatnonzero(rough[:-1] < SURE)  # the smallest step of these crosses fewest kinks
    best = int(sure[0] if len(sure) else np.argmin(rough[:-1]))
    last = max(best + 1, STEPS.index(1e-5))
    bent = np.quantile(np.abs(slopes[last] - slopes[best + 1]) / sizes[best], 0.9)
    return STEPS[best + 1], float(rough[best]), float(bent)


def signed_steps(subject, x, step, rng):
    """A step along each value of x, flat (dims,), some smaller and some larger than the one given.
    """
    sizes = torch.from_numpy(step * 10 ** rng.uniform(-0.4, 0.4, x.shape))
    return (sizes.minimum(subject.room(x)) * subject.signs(x, rng)).flatten()


def jacobian(subject, x, y, steps, rng, chunk=63):
    """dz/dx (dims, dims) at one image x (C, H, W) of label y, by forward differences: row j is the
    slope of z along value j.
    """
    dims, order, flat = x.numel(), rng.permutation(x.numel()), x.flatten()
    J = np.empty((dims, dims))
    for start in BAR(range(0, dims, chunk), "Jacobian"):
        columns = order[start:start + chunk]
        moved = flat.repeat(len(columns) + 1, 1)
        base = int(rng.integers(len(columns) + 1))  # where x itself stands in the batch
        rows = np.delete(np.arange(len(moved)), base)
        moved[rows, columns] += steps[columns]
        z = subject.forward(moved.view(-1, *x.shape), y.expand(len(moved)))[0].flatten(1).numpy()
        taken = moved[rows, columns] - flat[columns]
        J[columns] = (z[rows] - z[base]) / taken.numpy()[:, None]
    return J


def log_abs_det(J):
    filled = J != 0
    if (filled.sum(0) == 1).all() and (filled.sum(1) == 1).all():  # each z of an x of its own
        return float(np.log(np.abs(J[filled])).sum())
    return float(np.linalg.slogdet(J)[1])


def error_of_steps(J, E, rng):
    """Nats by which log|det J| may be off where J is off by +-E: ten times the most that random
    signs of E make, of each value, as rounding has them, or of a row together, as curvature has.
    UNSURE a dimension where that is too large to say.
    """
    most, right = UNSURE * len(J), log_abs_det(J)
    shapes = (J.shape, (len(J), 1)) * 2
    moved = [log_abs_det(J + rng.choice([-1.0, 1.0], shape) * E) - right for shape in shapes]
    error = 10 * float(np.abs(moved).max())
    return error if error < most else most


# ---- beyond: log det J = tr log(J^T J) / 2, by Lanczos quadrature

def compare_stochastic(subject, x, y, step, rng):
    x = subject.inside(x, 0.25)  # at the ends a density may be steep
    result = attempt(lambda: [stochastic_logdet(subject, image, label[None], step, rng)
                              for image, label in zip(x, y)])
    if isinstance(result, Exception):
        return line(None, OPEN, "", f"{subject.dims:,} dimensions are too many for a whole "
                    f"Jacobian at this model's cost, and it gives no gradient ({short(result)})")
    found, halfway, spread, mostly, spoofed, widest = (np.array(part) for part in zip(*result))
    if spoofed.max() > 1e-3:  # at a kink, as of a ReLU, a few are honestly so
        return line(float(spoofed.max()), False if mostly.max() > 1e-3 else OPEN, "below 0.001",
                    "its gradients are not the slopes of its outputs: relative difference along "
                    f"random directions (median {mostly.max():.1g})")
    scale = subject.dims * math.log(2)
    gap = float((found - subject.mean_logdet(x, y)).mean() / scale)
    error = float(np.sqrt((spread ** 2).sum()) / len(x) / scale)
    slack = subject.tolerance + subject.allowance(64) / scale
    allowed, holds = slack + ERRORS * error, held(abs(gap), slack, error, len(x) * (PROBES - 1))
    text = (f"bits/dim, {len(x)} images chosen at random, against stochastic estimates of error "
            f"{error:.2g}: {subject.dims:,} dimensions are too many for whole Jacobians")
    if abs(gap) < allowed and error > 5e-3:
        return line(gap, OPEN, f"within {allowed:.2g}", text)
    drift = abs(float((found - halfway).mean())) / scale
    if abs(gap) >= allowed and (abs(gap) < allowed + 10 * drift or widest.max() > WIDEST):
        return line(gap, OPEN, f"within {allowed:.2g}", "bits/dim, against a stochastic estimate "
                    f"that is not sure: it moved by {drift:.2g} in the last half of its steps, and "
                    f"the squared slopes differ by a factor of {widest.max():.0e}")
    return line(gap, holds, f"within {allowed:.2g}", text, allowed)


def stochastic_logdet(subject, x, label, step, rng):
    """log|det dz/dx| at one image: (estimate, the same with half of the steps, standard error, how
    far gradients are from slopes by the median and at most, largest eigenvalue of J^T J divided by
    the smallest).
    """
    values, halfway, spoofed, widest, dims = [], [], [], [], x.numel()
    scaled = step * math.sqrt(dims)

    def slope(v):
        moved = torch.stack([x + scaled * v.view(x.shape), x - scaled * v.view(x.shape)])
        z = subject.forward(moved, label.expand(2))[0].flatten(1)
        return (z[0] - z[1]) / (2 * scaled)

    for _ in BAR(range(PROBES), "stochastic log-det"):
        v = torch.from_numpy(rng.choice([-1.0, 1.0], dims)) / math.sqrt(dims)
        basis, alphas, betas, pairs = [], [], [], []
        for _ in range(min(KRYLOV, dims)):
            basis.append(v)
            y = slope(v)
            w = subject.vjp(x, label, y.view(x.shape)).flatten()
            pairs.append((y, w))
            alphas.append(float(w @ v))
            Q = torch.stack(basis)
            for _ in range(2):  # all of them, twice: rounding makes them no longer orthogonal
                w = w - Q.T @ (Q @ w)
            betas.append(float(w.norm()))
            if betas[-1] < 1e-9 * abs(alphas[0]):
                break
            v = w / betas[-1]
        r = torch.from_numpy(rng.standard_normal(dims)) / math.sqrt(dims)  # unknown until now
        along = slope(r)
        spoofed += [abs(float(w @ r - y @ along)) / float(w.norm() / math.sqrt(dims))
                    for y, w in pairs]
        for sums, k in ((halfway, (len(alphas) + 1) // 2), (values, len(alphas))):
            T = np.diag(alphas[:k]) + np.diag(betas[:k - 1], 1) + np.diag(betas[:k - 1], -1)
            theta, vectors = np.linalg.eigh(T)
            sums.append(dims / 2 * float(vectors[0] ** 2 @ np.log(np.maximum(theta, 1e-300))))
        widest.append(theta.max() / max(theta.min(), 1e-300))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return (np.mean(values), np.mean(halfway), error, np.median(spoofed), max(spoofed),
            max(widest))
