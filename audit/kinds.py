"""What else an adapter says of itself: a density beside its map, or no map at all, and labels."""
import functools
import math

import numpy as np

from audit.adapters import Adapter
from audit.checks import ERRORS, INFO, OPEN, check, dequantized, error_of, held, largest_of
from audit.protocol import IMAGES

WHY = {"log_prob": "a density alone has no inverse",
       "elbo": "a bound alone does not tell of which density",
       "bits": "lengths alone are no code"}
REPEATS = 8  # of a bound that is drawn at random
SURE = 30  # nats: by chance once in e ** 30
FEW = 4  # images of a label, at least, that is a class
identity = functools.partial(check, "Identity")


def check_kind(subject):
    """What can be said of an adapter by what it has."""
    model = subject.model
    if not isinstance(model, Adapter):
        return
    if model.is_density:
        yield identity("that it is normalised", None, OPEN, "", f"{WHY[model.kind]}: forward and "
                       "inverse beside it would show that its probabilities sum to 1")
        yield check_sources(subject)
    elif not model.inverts:
        yield check("Inverse", "of its dequantizer", None, OPEN, "", "it has no "
                    "dequantize_inverse(images, x) -> u")
    if model.kind == "elbo":
        yield check_more_draws(subject)
    for by in sorted(WHY.keys() & model.has - {model.kind}):
        yield check_beside(subject, by)


def check_sources(subject):
    """Noise of known entropy: no code is shorter on average, whatever the model (Markov)."""
    rng = subject.rng("sources")
    chosen = subject.choose(rng, IMAGES)
    pixels, y = np.array(subject.array[chosen]), subject.y(chosen)
    excess = {}
    for random in range(1, subject.top.bit_length() + 1):
        noisy = (pixels >> random << random) + rng.integers(2 ** random, size=pixels.shape)
        bits = subject.bits_of(dequantized(noisy, rng.random(noisy.shape)), y)
        excess[random] = float((bits - random).mean())
    nearest = min(excess, key=excess.get)
    allowed = SURE / len(chosen) + 2 * subject.allowance(1)
    allowed = -allowed / subject.dims / math.log(2)
    return check("Protocol", "noise of known entropy", excess[nearest], excess[nearest] > allowed,
                 f"above {allowed:.2g}", f"bits/dim beyond {nearest}: of {len(chosen)} images whose"
                 f" lowest {nearest} bits are random: no code has less than its source, so the sum "
                 "over all images would be above 1", 0.05)


def check_more_draws(subject):
    """An importance-weighted bound, which more draws make tighter."""
    chosen = subject.choose(subject.rng("draws"), 4 * IMAGES)
    x, y, k = subject.x(chosen), subject.y(chosen), subject.model.k
    few, many = (np.mean([subject.bits_of(x, y, k=number) for _ in range(REPEATS)], 0)
                 for number in (k, 4 * k))
    gap = float((many - few).mean())
    error = error_of(many - few)
    within = subject.tolerance + ERRORS * error
    return check("Estimate", "elbo of more draws", gap,
                 held(gap, subject.tolerance, error, len(few) - 1), f"below {within:.2g}",
                 f"bits/dim by which k = {4 * k} is above k = {k}", 2 * within)


def check_beside(subject, by):
    """What it also defines, held to what is measured."""
    chosen = subject.choose(subject.rng(by), 2 * IMAGES)
    x, y, model = subject.x(chosen), subject.y(chosen), subject.model
    ours = subject.bits_of(x, y)
    theirs = np.stack([subject.bits_of(x, y, by=by, k=1) for _ in range(REPEATS)])
    gaps = theirs.mean(0) - ours
    error = theirs.std(0, ddof=1).max() / math.sqrt(REPEATS)
    allowed = subject.tolerance + 6 * float(error)
    allowed += 2 * subject.allowance(1) / subject.dims / math.log(2)
    says = f"bits/dim of {len(x)} images, against {model.kind}, from which all else here is"
    if by == "log_prob":
        worst = largest_of(np.abs(gaps))
        return identity(by, worst, worst < allowed, f"below {allowed:.2g}", says, 2 * allowed)
    least = float(gaps.min())
    if by == "elbo":
        return identity(by, least, least > -allowed, f"above {-allowed:.2g}",
                        f"{says}: a lower bound of log p has more bits", 2 * allowed)
    return identity(by, float(gaps.mean()), INFO, "", says, 1.0)


def check_taken(model, images, other_split):
    """Fewer bits and labels, where an adapter takes them. images: as it takes them."""
    bits, classes = getattr(model, "bits", 8), getattr(model, "classes", 0)
    if bits < 8:
        yield check("Data", "bits", bits, INFO, "", "the model takes images of so many: levels 0 "
                    f"to {2 ** bits - 1}; the number is of {images.name}")
    if not classes:
        return
    labels = np.asarray(images.labels)
    known = [labels, *([other_split.labels] if other_split else ())]
    counts = np.bincount(np.concatenate(known), minlength=classes)
    share = float((counts[labels] < FEW).mean())
    own = np.bincount(labels) / len(labels)
    told = float(-(own[own > 0] * np.log2(own[own > 0])).sum())
    holds = share < 0.01 or (False if other_split else OPEN)  # of few images any has few
    yield check("Data", "labels", share, holds, "below 0.01", "share of the images whose "
                f"label hardly another image has; labels tell {told:.2f} bits an image, "
                f"{told / images.array[0].size:.4f} bits/dim, which are not counted")
