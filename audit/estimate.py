"""Estimate and precision: the number itself, its error and its parts.

The likelihood is computed twice: by evaluate.py, as all numbers of this repository are, and here
from the formulas, in float64, with nothing shared but the network and the noise.
"""
import functools
import math

import numpy as np
import torch

import evaluate as evaluator
from audit.checks import (BAR, ERRORS, INFO, at_precision, attempt, check, counted, dequantized,
                          device_of, held)
from data import evaluation_noise, fingerprint
from harness.condition import one_hot
from harness.errors import short
from harness.flops import logdet_cap_share
from jet import Jet

line = functools.partial(check, "Estimate")
INFORMING = 64  # images in bfloat16, which is slow on CPUs, where no claim is in it


@torch.no_grad()
def bits_table(model, images, seed, draws, batch_size=64):
    """From the formulas, in float64, {"bits", "square" (bits/dim), "logdet" (nats): (draws, N)}.

    images: an array, or an ImageSet, whose labels a class-conditional model is told.
    """
    model, dtype, _ = at_precision(model, "float64")
    array, classes = getattr(images, "array", images), getattr(model, "classes", 0)
    rows = {name: np.empty((draws, len(array))) for name in ("square", "logdet")}
    dims = array[0].size
    with BAR(total=draws * len(array), desc="likelihood in float64") as bar:
        for draw in range(draws):
            for start in range(0, len(array), batch_size):
                pixels = np.array(array[start:start + batch_size])
                indices = range(start, start + len(pixels))
                noise = evaluation_noise(indices, pixels.shape[1:], seed, draw)
                among = slice(start, start + len(pixels))
                context = [one_hot(images.labels[among], classes)] if classes else []
                z, logdet = model(dequantized(pixels, noise, dtype).to(device_of(model)), *context)
                part = draw, among
                squares = z.square().flatten(1).sum(1).cpu()
                rows["square"][part] = squares / 2 / dims / math.log(2)
                rows["logdet"][part] = logdet.cpu()
                bar.update(len(pixels))
    rows["bits"] = (rows["square"] + math.log2(2 * math.pi) / 2 + math.log2(127.5)
                    - rows["logdet"] / dims / math.log(2))
    return rows


def importance_weighted(bits, K, dims):
    """Bits/dim (N,) by the importance-weighted bound of K of the draws (R, N), mean over groups.

    -log2 of the mean of K densities over K: a bound between that of one draw and the image's true
    code length (Burda et al. 2016).
    """
    nats = -bits[:len(bits) // K * K].reshape(-1, K, bits.shape[1]) * dims * math.log(2)
    top = nats.max(1, keepdims=True)  # taken out of the sum, so that nothing under- or overflows
    log_mean = top[:, 0] + np.log(np.exp(nats - top).mean(1))
    return -(log_mean / dims / math.log(2)).mean(0)


def estimate(model, images, seed, draws, iw, K=None, claimed=None):
    """All that the likelihood is measured with: the repository's way, and from the formulas.

    K: draws of the claim's importance-weighted bound. claimed: its precision.
    """
    array, kind = images.array, getattr(model, "kind", "forward")
    needed = 1 if kind == "elbo" else K or 1  # an elbo makes its draws itself
    rows = bits_table(model, images, seed, max(draws, iw, needed))
    bits = rows["bits"]
    model32 = at_precision(model, "float32")[0]
    reported = model32 if isinstance(model, Jet) else at_precision(model, "float64")[0]
    few = images if claimed == "bfloat16" else images.first(min(INFORMING, len(array)))
    settings = {"images": images, "seed": seed, "per_image": True}
    evaluate = functools.partial(evaluator.evaluate, model32, **settings)
    noise_se = math.nan
    if draws > 1:
        noise_se = float(np.sqrt((bits[:draws].var(0, ddof=1) / draws).sum()) / len(array))
    bound, dequantization = getattr(model, "bound", ("elbo", "uniform"))
    return {"rows": rows, "bound": bound, "dequantization": dequantization,
            "bits": getattr(model, "bits", 8), "kind": kind,
            "ours": evaluator.evaluate(reported, **settings, draws=draws),
            "float32": attempt(evaluate),
            "bfloat16": attempt(lambda: evaluate(images=few, precision="bfloat16")),
            "noise_se": noise_se,
            "draws": draws, "iw": iw, "dims": array[0].size, "seed": seed, "num_images": len(array)}


def check_estimate(model, images, measured, recorded, scales, allowance=0.0):
    """recorded: done.json of the weights' run, or None. scales: all that the couplings apply.

    allowance: bits/dim that a stochastic log-det may differ when it is asked again.
    """
    ours = measured["ours"]
    value, per_image = ours["bits_per_dim"], ours["bits_per_dim_per_image"]
    yield line("bits/dim", value, value > -1e-3, "finite, and not below 0",
               f"+- {ours['bits_per_dim_se']:.4f} over images, +- {measured['noise_se']:.5f} over "
               f"noise; {how_measured(measured)}", 1e-4)
    is_mean = abs(per_image.mean() - value) < 1e-9
    yield line("every image once", ours["num_images"],
               is_mean and ours["num_images"] == len(images.array) == len(per_image),
               f"{len(images.array):,}", "the mean is over all images, whatever the batches")
    yield check_positive(measured)
    yield from check_noise(images, measured)
    yield from check_terms(measured, allowance)
    yield from check_scales(model, measured, scales)
    yield from check_importance_weights(measured)
    if recorded:
        yield check_recorded(images, measured, recorded)


def how_measured(measured):
    """"4 draws of uniform noise an image: an upper bound"."""
    draws, dequantization = counted(measured["draws"], "draw"), measured["dequantization"]
    if dequantization == "none":
        return f"of discrete images, by {measured['kind']}"
    by = "" if measured["kind"] == "forward" else f" by {measured['kind']}"
    own = "uniform noise" if dequantization == "uniform" else "noise by its own dequantizer"
    return f"{draws} of {own} an image: an upper bound{by}"


def check_positive(measured):
    """No image has a probability above 1, so on average over the noise none has less than 0."""
    bits, error = measured["rows"]["bits"], math.inf
    if len(bits) > 1:  # two draws may be equal by chance: those of other images stand beside them
        variance = bits.var(0, ddof=1)
        error = np.sqrt((variance + np.median(variance)) / len(bits))
    below = int((bits.mean(0) < -0.01 - 6 * error).sum())
    return line("images below 0", below, below == 0, "0", "code lengths are not negative; the "
                f"least is {bits.mean(0).min():.3f}, within the error of its noise")


def check_noise(images, measured):
    """Whether the noise is uniform, and whether levels with their noise leave no gaps."""
    indices = range(min(64, len(images.array)))
    noise = evaluation_noise(indices, images.array.shape[1:], measured["seed"], 0).numpy().ravel()
    off = max(abs(noise.mean() - 0.5) * math.sqrt(12 * len(noise)),
              abs(noise.var() - 1 / 12) * math.sqrt(180 * len(noise)))
    yield line("noise", float(off), off < 5 and noise.min() >= 0 and noise.max() < 1, "below 5",
               f"from {noise.min():.4f} to {noise.max():.4f}; mean and variance against 1/2 and "
               "1/12, in standard errors")
    levels = torch.arange(256, dtype=torch.uint8)
    low, high = (evaluator.dequantize(levels, torch.full((256,), u, dtype=torch.float64))
                 for u in (0.0, 1.0))
    gap = max((low[1:] - high[:-1]).abs().max().item(), abs(low[0].item() + 1))
    yield line("levels of grey", gap, gap < 1e-9, "below 1e-9", "the 256 levels, with their noise, "
               "tile -1 to 1 + 1/127.5: no gaps, no overlaps")


def check_terms(measured, allowance):
    """The number against the one from the formulas, as a mean and image by image."""
    rows, draws, ours = measured["rows"], measured["draws"], measured["ours"]
    own, per_image = rows["bits"][:draws].mean(0), ours["bits_per_dim_per_image"]
    logdet = rows["logdet"][:draws].mean() / measured["dims"] / math.log(2)
    terms = {"squares of z": rows["square"][:draws].mean(),
             "log2(2 pi) / 2": math.log2(2 * math.pi) / 2, "log2(127.5)": math.log2(127.5),
             "log-det": -logdet}
    text = " + ".join(f"{term} {number:.4f}" for term, number in terms.items())
    if measured["kind"] != "forward":
        text = f"by {measured['kind']}"
    mean, allowed = float(own.mean()), 2e-4 + allowance / math.sqrt(len(own))
    yield line("sum of its terms", mean, abs(mean - ours["bits_per_dim"]) < allowed,
               f"bits/dim, to {allowed:.1g}",
               f"{text}; computed again in float64, from the formulas", 1e-6 + 2 * allowance)
    # A fault of the evaluator may hide in the mean: image by image it cannot.
    worst = float(np.abs(own - per_image).max()) if len(own) == len(per_image) else math.inf
    yield line("image by image", worst, worst < 2e-3 + allowance, f"below {2e-3 + allowance:.2g}",
               "largest difference of one image between the two computations, bits/dim",
               1e-3 + allowance)


def check_scales(model, measured, scales):
    """What the couplings make of their scales, and whether more couplings are needed."""
    logdet = float(measured["rows"]["logdet"].mean())
    share = logdet_cap_share(model.config, logdet) if isinstance(model, Jet) else None
    if share is not None:
        text = "share of what the couplings can reach"
        if share >= 0.9:
            text += "; SATURATED: more couplings are needed"
        yield line("log-det / cap", share, share <= 1, "at most 1", text, 1e-4)
    else:
        yield line("log-det / cap", None, None, "at most 1", "these layers have no cap")
    if scales:
        smallest, largest, limit = min(scales), max(scales), model.config.scale_factor
        yield line("smallest scale", smallest, smallest > 1e-6, "above 1e-6",
                   "the inverse divides by it", 1e-4)
        yield line("largest scale", largest, largest <= limit * (1 + 1e-6), f"at most {limit:g}",
                   "as applied, measured by moving x2", 1e-4)


def check_importance_weights(measured):
    """The bound with K = 1, 2, 4, ... draws."""
    before, K = math.inf, 1
    while K <= measured["iw"]:
        bits = importance_weighted(measured["rows"]["bits"], K, measured["dims"])
        value = float(bits.mean())
        error = bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
        yield line(f"importance-weighted, K = {K}", value, value <= before + 1e-9,
                   "falls with K" if K > 1 else "the bound above",
                   f"+- {error:.4f} over images; {measured['iw'] // K} groups of draws", 1e-6)
        before, K = value, 2 * K


def check_recorded(images, measured, recorded):
    """The number against the one that the weights' run recorded."""
    ours = measured["ours"]
    is_same = recorded["test_fingerprint"] == fingerprint(images.array)
    is_part = images.split == "test" and (is_same or images.name == f"{recorded['dataset']}-subset")
    difference = ours["bits_per_dim"] - recorded["bits_per_dim"]
    error = math.hypot(ours["bits_per_dim_se"], recorded["bits_per_dim_se"])
    allowed = 0.0
    if is_same:  # but for the noise
        allowed = 1e-3
        error = measured["noise_se"] if measured["draws"] > 1 else ours["bits_per_dim_se"]
    within = allowed + ERRORS * error
    text = (f"its done.json has {recorded['bits_per_dim']:.4f} on {recorded['num_images']:,} "
            f"images of {recorded['dataset']}")
    holds = held(abs(difference), allowed, error, len(images.array) - 1)
    if not is_part:
        difference, holds, text = None, None, f"{text}: not these"
    elif not is_same:
        text += ", of which these are a part"
    return line("as recorded by its run", difference, holds, f"within {within:.4f}", text, 1e-4)


def check_precision(measured, claimed=None):
    """bits/dim on the same images and noise in each precision. claimed: that of the claim."""
    line = functools.partial(check, "Precision")
    exact = measured["rows"]["bits"][0]
    yield line("float64", float(exact.mean()), True, "the reference", "bits/dim, one draw an image",
               1e-6)
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        result = measured[precision]
        if isinstance(result, Exception):
            yield line(precision, None, None, "", f"the model does not run so ({short(result)})")
            continue
        value, bits = result["bits_per_dim"], result["bits_per_dim_per_image"]
        gaps = bits[:len(exact)] - exact[:len(bits)]
        difference = float(gaps.mean())
        text = (f"of {len(bits):,} images; differs by {difference:+.2g}; worst image "
                f"{np.abs(gaps).max():.2g}")
        holds = abs(difference) < tolerance if precision == claimed else INFO
        yield line(precision, value, holds, f"within {tolerance:g} of float64", text,
                   tolerance / 2)


def noise_error(measured):
    """The standard error over noise of a number with one draw an image; 0 where it is not known."""
    bits = measured["rows"]["bits"]
    return float(np.sqrt(bits.var(0, ddof=1).sum()) / bits.shape[1]) if len(bits) > 1 else 0.0
