"""What a model that wants to look better than it is cannot know before: images, noise, directions.

All randomness here comes from the request's entropy. What a model says is held to what the same
model says elsewhere: in a process that has seen nothing of it, alone, in another batch, after other
images, at noise of 53 bits, at slightly other images, and by its inverse.
"""
import functools
import hashlib
import math

import numpy as np
import torch

from audit.adapters import Adapter
from audit.checks import (ERRORS, INFO, OPEN, at_precision, attempt, check, dequantized,
                          device_of, error_of, held, largest_of)
from audit.copies import is_photo
from data import evaluation_noise
from harness.condition import one_hot

IMAGES = 16  # that most checks look at
NOISE_IMAGES, MEMORY_IMAGES = 256, 96
FEW = 32  # images, each of which is given more noise
REPEATS = 64  # of a stochastic log-det
line = functools.partial(check, "Protocol")


class Subject:
    """A model in float64 and images, as the checks use them."""

    def __init__(self, model, images, measured, entropy, tolerance):
        """tolerance: bits/dim to which the number must be known."""
        self.model = at_precision(model, "float64")[0]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.images, self.array, self.measured = images, images.array, measured
        self.entropy, self.tolerance = entropy, tolerance
        self.dims = images.array[0].size
        self.nats = tolerance * self.dims * math.log(2)
        self.is_stochastic, self.is_density, self.dequantizes = (
            getattr(model, name, False) for name in ("is_stochastic", "is_density", "dequantizes"))
        self.inverts = getattr(model, "inverts", True)
        self.classes, self.top = getattr(model, "classes", 0), 2 ** getattr(model, "bits", 8) - 1
        self.noise = 0.0  # of one log-det, nats
        if self.is_stochastic:
            chosen = self.rng("log-det").integers(len(self.array), size=8)
            x, y = self.x(chosen), self.y(chosen)
            self.noise = float(np.std([self.forward(x, y)[1].numpy() for _ in range(16)], 0,
                                      ddof=1).max())

    @functools.cached_property
    def witness(self):
        """The same model in a process of its own, which has seen nothing yet (a Jet keeps nothing).
        """
        return self.model.again() if isinstance(self.model, Adapter) else self.model

    def rng(self, what):
        """A generator for one check, so that no other one changes it."""
        digest = hashlib.sha256(f"{self.entropy} {what}".encode()).digest()
        return np.random.default_rng(list(digest))

    def choose(self, rng, count):
        """Indices of so many images, or of all there are."""
        return rng.choice(len(self.array), min(count, len(self.array)), replace=False)

    def x(self, indices, rng=None):
        """Images, dequantized: with the noise of the evaluation, or what a generator gives."""
        return dequantized(self.array[np.asarray(indices)], self.noise_of(indices, rng))

    def y(self, indices):
        """Labels (n,): of a model that takes none, 0."""
        labels = self.images.labels if self.classes else np.zeros(len(self.array), int)
        return torch.from_numpy(np.asarray(labels)[np.asarray(indices)])

    def signs(self, x, rng):
        """Random signs; where levels have a dequantizer, those that lead to the middle of each."""
        if self.dequantizes:
            return torch.where((x + 1) * 127.5 % 1 < 0.5, 1.0, -1.0).to(x)
        return torch.from_numpy(rng.choice([-1.0, 1.0], x.shape))

    def room(self, x):
        """How far each value of x may go before a slope may change: a density may be steep towards
        the ends of the data's range, a dequantizer towards those of a level.
        """
        place, width = (x + 1) * 127.5, self.top + 1
        if self.dequantizes:
            place, width = place % 1, 1
        return 0.01 * torch.minimum(place, width - place).clamp(min=1e-6) / 127.5

    def inside(self, x, margin=1e-6):
        """x, its values a margin of a level or more inside the data's range: beyond it a model may
        have no density.
        """
        return x.clamp(margin / 127.5 - 1, (self.top + 1 - margin) / 127.5 - 1)

    def x_mixed(self, indices, rng):
        """Every other one with the noise of the evaluation."""
        return torch.where((torch.arange(len(indices)) % 2 == 0)[:, None, None, None],
                           self.x(indices), self.x(indices, rng))

    def noise_of(self, indices, rng=None):
        shape = self.array.shape[1:]
        if rng is None:
            seed, draws = self.measured["seed"], self.measured["draws"]
            return evaluation_noise(indices, shape, seed, draws - 1)
        return rng.random((len(indices), *shape))

    @torch.no_grad()
    def forward(self, x, y, model=None, **how):
        return self._apply((model or self.model).forward, x, y, how)

    @torch.no_grad()
    def inverse(self, z, y, model=None, **how):
        return self._apply((model or self.model).inverse, z, y, how)

    def _apply(self, function, x, y, how, batch_size=64):
        device = device_of(self.model)
        parts = [function(part.to(device), *self.context(labels), **how)
                 for part, labels in zip(x.split(batch_size), y.split(batch_size))]
        return tuple(torch.cat(part).detach().cpu() for part in zip(*parts))

    def context(self, y):
        return [one_hot(y, self.classes)] if self.classes else []

    def vjp(self, x, y, u):
        """The gradient of z . u at one image x, of label y (1,)."""
        if isinstance(self.model, Adapter):
            return self.model.vjp(x[None], u[None], *self.context(y))[0]
        x = x[None].to(device_of(self.model)).requires_grad_(True)
        z = self.model(x)[0]
        return torch.autograd.grad((z * u.to(z)).sum(), x)[0][0].cpu()

    def mean_logdet(self, x, y):
        """The log-det of each image, of a stochastic one the mean."""
        repeats = REPEATS if self.is_stochastic else 1
        return np.mean([self.forward(x, y)[1].numpy() for _ in range(repeats)], 0)

    def allowance(self, repeats):
        """Nats that a stochastic log-det's mean may be off."""
        return 5 * self.noise / math.sqrt(repeats)

    def bits(self, z, logdet):
        """Bits/dim (N,)."""
        squares = z.square().flatten(1).sum(1) / 2
        nats = squares - logdet + self.dims * (math.log(2 * math.pi) / 2 + math.log(127.5))
        return (nats / self.dims / math.log(2)).numpy()

    def bits_of(self, x, y, **how):
        return self.bits(*self.forward(x, y, **how))


def check_protocol(subject):
    yield check_company(subject)
    if subject.inverts:
        yield from check_latents(subject)
        yield check_moved_latents(subject)
    yield check_noise(subject)
    yield check_jitter(subject)
    yield check_levels(subject)


def check_company(subject):
    """Each image alone, in another batch, in another process, and after other images."""
    rng, dims = subject.rng("company"), subject.dims
    chosen = subject.choose(rng, IMAGES)
    x, y = subject.x(chosen), subject.y(chosen).repeat(2)
    size = 10 ** rng.uniform(-7, -3, len(x))
    moved = x + torch.from_numpy(size[:, None, None, None] * rng.standard_normal(x.shape))
    x = torch.cat([x, subject.inside(moved)])  # neighbours: together here, and not there
    others, labels = subject.x(chosen, rng).flip(3), y[:len(chosen)]
    here = subject.forward(x, y)
    noise = rng.uniform(-1, (subject.top + 1) / 127.5 - 1, others.shape)
    subject.forward(torch.from_numpy(noise), labels, subject.witness)
    if subject.inverts:
        z = torch.from_numpy(rng.standard_normal(others.shape))
        attempt(lambda: subject.inverse(z, labels, subject.witness))
    there = [torch.empty_like(part) for part in here]
    for number in rng.permutation(len(x)):
        order = rng.permutation(len(others))[:rng.integers(0, 4)]
        place = int(rng.integers(len(order) + 1))
        batch, told = (torch.cat([company[order[:place]], mine[number:number + 1],
                                  company[order[place:]]])
                       for company, mine in ((others, x), (labels, y)))
        for part, result in zip(there, subject.forward(batch, told, subject.witness)):
            part[number] = result[place]
    subject.forward(others, labels)
    again = subject.forward(x, y)
    gaps = [np.abs(subject.bits(*here) - subject.bits(*other)).max() for other in (there, again)]
    draw = subject.measured["draws"] - 1  # and the very values that the number was made of
    alone = subject.bits(*there)[:len(chosen)]
    gaps.append(np.abs(alone - subject.measured["rows"]["bits"][draw, chosen]).max())
    shifts = [float((here[0] - other[0]).square().mean().sqrt()) for other in (there, again)]
    allowed = subject.tolerance + subject.allowance(1) * 2 / dims / math.log(2)
    worst, shift, spread = largest_of(gaps), largest_of(shifts), spread_of(here[0], there[0])
    holds = worst < allowed and shift < 1e-3 and spread < 0.1
    return line("same alone and elsewhere", worst, holds, f"below {allowed:.2g}",
                f"bits/dim of {len(x)} images in a batch, against alone or in other "
                "batches of a process that had seen others, and again after others; z "
                f"differs by {shift:.1g}, distances of neighbours by {spread:.1g} of them", allowed)


def spread_of(here, there):
    """How much distances of neighbours, the second half of some z, differ from those elsewhere.

    In shares of them, beyond what z differ by in any case, as those of an adaptive solver do.
    """
    (base, moved), (other_base, other_moved) = here.flatten(1).chunk(2), there.flatten(1).chunk(2)
    distance, other = moved - base, other_moved - other_base
    floor = (base - other_base).square().mean().sqrt()
    return float(((distance - other).square().mean(1).sqrt()
                  / (distance.square().mean(1).sqrt() + 100 * floor + 1e-12)).max())


def check_latents(subject):
    """The inverse of z that no image had, and whether both log-dets cancel there."""
    rng = subject.rng("latents")
    shape = (IMAGES, *subject.x([0]).shape[1:])
    z, y = torch.from_numpy(rng.standard_normal(shape)), subject.y(rng.integers(
        len(subject.array), size=IMAGES))
    how = {"raw": True} if subject.dequantizes else {}  # z of no image have values beyond levels
    x, inverse_logdet = subject.inverse(z, y, subject.witness, **how)
    sane = (x.flatten(1).abs() < 1e4).all(1)
    if not sane.any():
        yield line("inverse of fresh z", None, OPEN, "", "of random z, the inverse is not finite, "
                   "or far from any image")
        return
    z, x, y, inverse_logdet = z[sane], x[sane], y[sane], inverse_logdet[sane]
    back, logdet = subject.forward(x, y, **how)
    error = float((back - z).square().mean().sqrt())
    yield line("inverse of fresh z", error, error < 0.01, "below 0.01", f"forward(inverse(z)) "
               f"against z, {len(z)} random z, two processes; z has deviation 1", 0.01)
    gap = largest_of((logdet + inverse_logdet).abs())
    allowed = subject.nats + subject.allowance(1) * 2
    yield line("log-dets cancel", gap, gap < allowed, f"below {allowed:.2g} nats",
               "those of forward and inverse, at the same z", allowed)


def check_moved_latents(subject):
    """Images from z that a process has not made, and that were slightly moved since.

    Every other one is a mixture of two, value by value: what knows the images does not know those.
    """
    rng = subject.rng("moved latents")
    chosen = subject.choose(rng, IMAGES)
    x, y = subject.x(chosen, rng), subject.y(chosen)
    x[::2] = torch.lerp(x, x.roll(1, 0).flip(3), torch.from_numpy(rng.random(x.shape)))[::2]
    z = subject.forward(x, y)[0]
    z = z + 1e-7 * torch.from_numpy(rng.standard_normal(z.shape))
    order = torch.from_numpy(rng.permutation(len(x)))
    back = torch.empty_like(x)
    for part in order.split(int(rng.integers(2, 6))):
        back[part] = subject.inverse(z[part], y[part], subject.witness)[0]
    share = float(((back - x).abs() * 127.5 < 0.25).double().mean())
    return line("inverse of z slightly moved", share, share > 0.99, "above 0.99",
                f"share of the values of {len(x)} images, every other one a mixture of two, that "
                "come back to a quarter of a level, in another process, from z + 1e-7", 0.01)


def check_noise(subject):
    """The number once more, with noise of 53 bits that nothing could know, of few images often."""
    rng = subject.rng("noise")
    images = subject.choose(rng, NOISE_IMAGES)
    repeats = NOISE_IMAGES // len(images) if len(images) <= FEW else 1
    chosen = np.tile(images, repeats)
    cuts = np.cumsum(rng.integers(1, 65, len(chosen)))  # batches of all sizes
    bits = np.concatenate([subject.bits_of(subject.x(part, rng), subject.y(part))
                           for part in np.split(chosen, cuts[cuts < len(chosen)])])
    bits, draws = bits.reshape(repeats, -1), subject.measured["draws"]
    gaps = bits.mean(0) - subject.measured["rows"]["bits"][:draws, images].mean(0)
    error, df = error_of(gaps), len(gaps) - 1
    if repeats > 1:  # of each image by its own noise; degrees of freedom as of Satterthwaite
        variance = bits.var(0, ddof=1) + 1e-300
        error = math.sqrt(variance.sum() * (1 / repeats + 1 / draws)) / len(images)
        df = (repeats - 1) * variance.sum() ** 2 / (variance ** 2).sum()
    gap, allowed = float(gaps.mean()), max(subject.tolerance, 1e-4)
    within = allowed + ERRORS * error
    return line("fresh noise of 53 bits", gap, held(abs(gap), allowed, error, df),
                f"within {within:.2g}", f"bits/dim, against the same {len(gaps)} images with the "
                f"evaluation's noise, +- {error:.1g}", 2 * within)


def check_jitter(subject):
    """Images moved by far less than a level, off the lattice of the evaluation's noise."""
    rng = subject.rng("jitter")
    chosen = subject.choose(rng, IMAGES)
    x, y = subject.x(chosen), subject.y(chosen)
    size = (1e-6 * torch.from_numpy(rng.random(x.shape))).minimum(0.1 * subject.room(x))
    moved = x + size * subject.signs(x, rng)
    worst = float(np.abs(subject.bits_of(moved, y) - subject.bits_of(x, y)).max())
    allowed = max(subject.tolerance, 1e-3) + subject.allowance(1) * 2 / subject.dims / math.log(2)
    return line("jitter", worst, worst < allowed, f"below {allowed:.2g}", "bits/dim of an image, "
                "and moved by 1e-6: a density that rises at the numbers it is asked for alone, "
                "jumps", allowed)


def check_levels(subject):
    """Images with one value changed by one level: no density of images hangs on that."""
    rng = subject.rng("levels")
    chosen = subject.choose(rng, 2 * IMAGES)
    noise, y = subject.noise_of(chosen), subject.y(chosen)
    pixels = np.array(subject.array[chosen])
    before, changes = subject.bits_of(dequantized(pixels, noise), y), []
    for _ in range(3):
        flat = pixels.reshape(len(pixels), -1).copy()
        rows, places = np.arange(len(flat)), rng.integers(flat.shape[1], size=len(flat))
        old = flat[rows, places].astype(int)
        flat[rows, places] = np.where(old == subject.top, old - 1,
                                      old + np.where(old, rng.choice([-1, 1]), 1))
        changed = subject.bits_of(dequantized(flat.reshape(pixels.shape), noise), y)
        changes.append(np.abs(changed - before))
    nats = np.min(changes, 0) * subject.dims * math.log(2)
    worst, mean = float(nats.max()), float(nats.mean())
    allowed = 50 + subject.allowance(1) * 2
    return line("one level of one pixel", worst, worst < allowed and mean < allowed / 5,
                f"below {allowed:.0f} nats", f"largest of {len(nats)} images, mean {mean:.2g}: "
                "more means that it knows these images, or adds to some of them", allowed)


# ---- memorised images

def shifted(pixels, down, right):
    """Images (N, H, W, C) moved by some pixels, their edges repeated."""
    _, height, width, _ = pixels.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[:, rows][:, :, columns]


def check_memory(subject, other_split):
    """Whether images much like these, and training images, have far more bits than these."""
    rng = subject.rng("memory")
    chosen = subject.choose(rng, MEMORY_IMAGES)
    pixels, noise = np.array(subject.array[chosen]), subject.noise_of(chosen, rng)
    y = subject.y(chosen)
    bits = subject.bits_of(dequantized(pixels, noise), y)
    moves = [tuple(rng.permutation([rng.choice([-2, -1, 1, 2]), rng.integers(-2, 3)]))
             for _ in range(2)]
    changed = {"mirrored": pixels[:, :, ::-1], "moved": shifted(pixels, *moves[0]),
               "moved and mirrored": shifted(pixels, *moves[1])[:, :, ::-1]}
    gaps = {name: subject.bits_of(dequantized(other, noise), y) - bits
            for name, other in changed.items()}
    means = {name: float(gap.mean()) for name, gap in gaps.items()}
    second = sorted(means, key=means.get)[1]
    value, gap = means[second], gaps[second]
    error = error_of(gap)
    holds, within = held(value, 0.1, error, len(gap) - 1), 0.1 + ERRORS * error
    text = "; ".join(f"{name} {mean:+.3f}" for name, mean in means.items())
    yield line("images much like these", value, holds or (False if is_photo(pixels) else INFO),
               f"below {within:.2g}", f"bits/dim more than these {len(gap)}: {text}" + (
                   "" if is_photo(pixels) else "; most values are one level, not as photos are"),
               within)
    others = None if other_split is None else other_split.array
    if others is None or others.shape[1:] != pixels.shape[1:]:
        yield line("the other split", None, None, "", "there is no other split of this shape")
        return
    indices = np.sort(rng.choice(len(others), min(len(bits), len(others)), replace=False))
    others = np.array(others[indices])
    y = torch.from_numpy(other_split.labels[indices]) if subject.classes else y[:len(others)]
    other_bits = subject.bits_of(dequantized(others, rng.random(others.shape)), y)
    gap = float(other_bits.mean() - bits.mean())
    error = math.hypot(error_of(bits), error_of(other_bits))
    holds = held(gap, 0.1, error, min(len(bits), len(others)) - 1)
    within, is_test = 0.1 + ERRORS * error, subject.images.split == "test"
    yield line(f"the {other_split.split} images", gap, holds if is_test else INFO,
               f"below {within:.2g}", f"bits/dim more than these, {len(others)} of each: a model "
               "knows what it was trained on better, if anything", within)
