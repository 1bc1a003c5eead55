"""What an audit of a bits-per-dimension number checks; experiments/audit_bpd.py runs it and writes it down.

Each function takes a model and images and yields Checks: a value, what is allowed, and whether it holds. A model is a Jet,
or any torch module with forward(x) -> (z, logdet) and inverse(z) -> (x, logdet) like one: prior N(0, I), x as
data.dequantize makes it, float (B, C, H, W), logdet (B,) in nats. The likelihood is computed twice: by
train.evaluate, as all numbers of this repository are, and here from the formulas, in float64, with nothing shared
but the network and the noise.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import codec
from data import FINGERPRINTS, SETS, DataError, evaluation_noise, fingerprint
from jet import Coupling, Jet, forward_flops
import train
from train import evaluate

PASS, FAIL, NOT_APPLICABLE = "pass", "FAIL", "n/a"
PRECISIONS = {"float64": (torch.float64, False), "float32": (torch.float32, False), "bfloat16": (torch.float32, True)}
WHOLE_DIMS, WHOLE_FLOPS = 4096, 2e13  # beyond, the Jacobian is taken coupling by coupling
REPEATED_SHARE = 0.001  # of the images; of 512, none
BAR = functools.partial(tqdm, leave=False, dynamic_ncols=True, bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of an audit."""
    section: str
    name: str
    value: float | str | None
    tolerance: str  # what is allowed, in words
    result: str
    text: str  # what it means
    drift: float | str = 0.0  # a later audit may differ by so much


def check(section, name, value, holds, tolerance, text, drift=0.0):
    """A Check; holds: True, False or None (not applicable)."""
    result = NOT_APPLICABLE if holds is None else PASS if holds else FAIL
    if isinstance(value, float) and not math.isfinite(value):
        value, result = str(value), FAIL
    return Check(section=section, name=name, value=value, tolerance=tolerance, result=result, text=text, drift=drift)


def at_precision(model, name):
    """A copy of the model that computes in a precision, and the context to run it in."""
    dtype, autocast = PRECISIONS[name]
    device = device_of(model)
    return (copy.deepcopy(model).to(dtype), dtype,
            torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext())


def largest_of(values):
    """The largest of some numbers, nan where one is; 0 of none."""
    return float(np.max([float(value) for value in values], initial=0.0))


def device_of(model):
    return next(model.parameters(), torch.empty(0)).device


def dequantized(pixels, noise, dtype=torch.float64):
    """x = -1 + (u8 + u) / 127.5, from the formula alone: float (B, C, H, W)."""
    return (-1 + (torch.from_numpy(np.array(pixels, float)) + torch.as_tensor(noise).double()) / 127.5).permute(0, 3, 1, 2).to(dtype)


# ---- 1. data

def check_data(images, train_images, recorded):
    """The images that are audited: which they are, and whether each counts once.

    images: ImageSet. train_images: that of the set's other split, or None. recorded: what the weights' run says of its own data.
    """
    array, name, split = images.array, images.name, images.split
    shape, known = tuple(array.shape), SETS.get(name)
    fits = known and known.shape == shape[1:] and known.variant == images.variant
    yield check("Data", "set and variant", f"{name}, variant {images.variant}, {split}", fits if known else None,
                "a known set has its shape and variant", "a number of another variant, or of other images, is another number")
    count = known.counts[split] if known else None
    yield check("Data", "images", len(array), None if count is None else len(array) == count,
                "all" if count is None else f"{count:,} in all", "a missing batch or a doubled one shows here")
    found = fingerprint(array)
    whose = [f"{other} {its}" for (other, its), value in FINGERPRINTS.items() if value == found]
    told = FINGERPRINTS.get((name, split), images.known_fingerprint)
    holds = False if whose and f"{name} {split}" not in whose else told == found if told else None
    yield check("Data", "fingerprint", found, holds, told or "not known",
                f"these are the images of {whose[0]}" if whose else "SHA-256 of the pixels; nothing to compare with"
                if holds is None else "SHA-256 of the pixels, as recorded when the set was made")
    digests = [hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in BAR(array, "repeated images")]
    repeated, allowed = len(digests) - len(set(digests)), int(REPEATED_SHARE * len(array))
    yield check("Data", "repeated images", repeated, repeated <= allowed, f"at most {allowed}",
                "an image that comes twice counts twice, and makes the standard error too small")
    if train_images is None:
        yield check("Data", "images of both splits", None, None, "none", "there is no other split to compare with")
    else:
        other = {hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
                 for image in BAR(train_images.array, "images of both splits")}
        both = sum(digest in other for digest in digests)
        yield check("Data", "images of both splits", both, both <= allowed, f"at most {allowed} of {len(digests):,}",
                    f"exact copies among the {len(train_images.array):,} images of {train_images.name} "
                    f"{train_images.split}: what was trained on is no test")
    if recorded:
        trained = recorded["train_fingerprint"] == found
        other = related(recorded["dataset"], name) and recorded["variant"] != images.variant
        yield check("Data", "what it was trained on", f"{recorded['dataset']}, variant {recorded['variant']}",
                    not (trained or other),
                    "not these images, nor another variant of them",
                    "as the run's done.json has it" + (": THE SAME IMAGES" if trained else ": ANOTHER VARIANT" if other else ""))


def related(one, two):
    """Whether two names are variants of one set, like imagenet64-oord and imagenet64-chrabaszcz."""
    return one != two and one.startswith("imagenet") and one.split("-")[0] == two.split("-")[0]


# ---- 2. estimate

@torch.no_grad()
def bits_table(model, array, seed, draws, batch_size=64, progress="likelihood in float64"):
    """Per draw and image, from the formulas, in float64: {"bits", "square", "logdet": (draws, N)} in bits/dim and nats."""
    model, dtype, _ = at_precision(model, "float64")
    rows = {name: np.empty((draws, len(array))) for name in ("bits", "square", "logdet")}
    dims = array[0].size
    with BAR(total=draws * len(array), desc=progress) as bar:
        for draw in range(draws):
            for start in range(0, len(array), batch_size):
                pixels = np.array(array[start:start + batch_size])
                noise = evaluation_noise(range(start, start + len(pixels)), pixels.shape[1:], seed, draw)
                z, logdet = model(dequantized(pixels, noise, dtype).to(device_of(model)))
                part = draw, slice(start, start + len(pixels))
                rows["square"][part] = z.square().flatten(1).sum(1).cpu() / 2 / dims / math.log(2)
                rows["logdet"][part] = logdet.cpu()
                bar.update(len(pixels))
    rows["bits"] = (rows["square"] + math.log2(2 * math.pi) / 2 + math.log2(127.5) - rows["logdet"] / dims / math.log(2))
    return rows


def importance_weighted(bits, K, dims):
    """Bits/dim of each image (N,) by the importance-weighted bound of K draws, mean over disjoint groups of the draws (R, N).

    -log2 of the mean of K densities over K: a bound between that of one draw and the image's true code length (Burda et
    al. 2016). The largest term is taken out of the sum, so nothing under- or overflows.
    """
    nats = -bits[:len(bits) // K * K].reshape(-1, K, bits.shape[1]) * dims * math.log(2)
    top = nats.max(1, keepdims=True)
    log_mean = top[:, 0] + np.log(np.exp(nats - top).mean(1))
    return -(log_mean / dims / math.log(2)).mean(0)


def estimate(model, images, seed, draws, iw):
    """Everything that the likelihood is measured with: the repository's way, and from the formulas."""
    array = images.array
    rows = bits_table(model, array, seed, max(draws, iw))
    bits = rows["bits"]
    model32 = at_precision(model, "float32")[0]
    ours = evaluate(model32, images, seed, draws, per_image=True)
    bf16 = _try(lambda: evaluate(model32, images, seed, per_image=True, precision="bfloat16"))
    one = evaluate(model32, images, seed, per_image=True)
    noise_se = float(np.sqrt((bits[:draws].var(0, ddof=1) / draws).sum()) / len(array)) if draws > 1 else math.nan
    return {"rows": rows, "ours": ours, "float32": one, "bfloat16": bf16, "noise_se": noise_se, "draws": draws, "iw": iw,
            "dims": array[0].size, "seed": seed, "num_images": len(array)}


def _try(function):
    """A result, or the error that stands for it."""
    try:
        return function()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return error


def check_estimate(model, images, measured, recorded, scales):
    """The number itself, its error, its parts, and the bound with several draws."""
    ours, rows, draws, dims = measured["ours"], measured["rows"], measured["draws"], measured["dims"]
    value, se, noise_se = ours["bits_per_dim"], ours["bits_per_dim_se"], measured["noise_se"]
    yield check("Estimate", "bits/dim", value, math.isfinite(value), "finite",
                f"+- {se:.4f} over images, +- {noise_se:.5f} over noise; {draws} draws of uniform noise an image: an upper bound",
                1e-4)
    num = ours["num_images"]
    per_image = ours["bits_per_dim_per_image"]
    yield check("Estimate", "every image once", num, num == len(images.array) == len(per_image)
                and abs(per_image.mean() - value) < 1e-9, f"{len(images.array):,}", "the mean is over all images, whatever the batches")
    noise = np.concatenate([evaluation_noise([i], images.array.shape[1:], measured["seed"], 0).numpy().ravel()
                            for i in range(min(64, num))])
    off = max(abs(noise.mean() - 0.5) * math.sqrt(12 * len(noise)), abs(noise.var() - 1 / 12) * math.sqrt(180 * len(noise)))
    yield check("Estimate", "noise", float(off), off < 5 and noise.min() >= 0 and noise.max() < 1, "below 5",
                f"from {noise.min():.4f} to {noise.max():.4f}; mean and variance against 1/2 and 1/12, in standard errors")
    levels = torch.arange(256, dtype=torch.uint8)
    edges = [train.dequantize(levels, torch.full((256,), u, dtype=torch.float64)) for u in (0.0, 1.0)]
    gap = max((edges[0][1:] - edges[1][:-1]).abs().max().item(), abs(edges[0][0].item() + 1))
    yield check("Estimate", "levels of grey", gap, gap < 1e-9, "below 1e-9", "the 256 levels, with their noise, tile -1 to 1 + 1/127.5: "
                "no gaps, no overlaps")
    own = rows["bits"][:draws].mean(0)
    terms = {"squares of z": rows["square"][:draws].mean(), "log2(2 pi) / 2": math.log2(2 * math.pi) / 2,
             "log2(127.5)": math.log2(127.5), "log-det": -rows["logdet"][:draws].mean() / dims / math.log(2)}
    yield check("Estimate", "sum of its terms", float(own.mean()), abs(own.mean() - value) < 2e-4, "bits/dim, to 0.0002",
                " + ".join(f"{term} {number:.4f}" for term, number in terms.items())
                + "; computed again in float64, from the formulas", 1e-6)
    # A fault of the evaluator may hide in the mean: image by image it cannot.
    worst = float(np.abs(own - per_image).max()) if len(own) == len(per_image) else math.inf
    yield check("Estimate", "image by image", worst, worst < 2e-3, "below 0.002",
                "largest difference of one image between the two computations, bits/dim", 1e-3)
    if isinstance(model, Jet) and not (model.config.actnorm or model.config.invertible_dense):
        share = float(rows["logdet"].mean() / model.config.logdet_cap_nats)
        yield check("Estimate", "log-det / cap", share, share <= 1, "at most 1", "share of what the couplings can reach"
                    + ("; SATURATED: more couplings are needed" if share >= 0.9 else ""), 1e-4)
    else:
        yield check("Estimate", "log-det / cap", None, None, "at most 1", "these layers have no cap")
    if scales:
        smallest, largest = min(scales), max(scales)
        limit = model.config.scale_factor
        yield check("Estimate", "smallest scale", smallest, smallest > 1e-6, "above 1e-6", "the inverse divides by it", 1e-4)
        yield check("Estimate", "largest scale", largest, largest <= limit * (1 + 1e-6), f"at most {limit:g}",
                    "as applied, measured by moving x2", 1e-4)
    last, K = None, 1
    while K <= measured["iw"]:
        per = importance_weighted(rows["bits"], K, dims)
        bound, error = float(per.mean()), float(per.std(ddof=1) / math.sqrt(len(per))) if len(per) > 1 else math.nan
        yield check("Estimate", f"importance-weighted, K = {K}", bound, last is None or bound <= last + 1e-9,
                    "falls with K" if K > 1 else "the bound above", f"+- {error:.4f} over images; {measured['iw'] // K} groups of draws", 1e-6)
        last, K = bound, 2 * K
    if recorded:
        difference = value - recorded["bits_per_dim"]
        same = recorded["test_fingerprint"] == fingerprint(images.array)
        part = images.split == "test" and (same or images.name == f"{recorded['dataset']}-subset")
        error = 1e-3 + 4 * (noise_se if draws > 1 else se) if same else 4 * math.hypot(se, recorded["bits_per_dim_se"])
        yield check("Estimate", "as recorded by its run", difference if part else None, abs(difference) <= error if part else None,
                    f"within {error:.4f}", f"its done.json has {recorded['bits_per_dim']:.4f} on {recorded['num_images']:,} images of "
                    f"{recorded['dataset']}" + ("" if same else ", of which these are a part" if part else ": not these"), 1e-4)


# ---- 3. the likelihood identity

@torch.no_grad()
def walk(model, x):
    """(number, layer, tokens before it) of a Jet's layers."""
    tokens = model.patchify(x)
    for number, layer in enumerate(model.layers()):
        yield number, layer, tokens
        tokens = layer(tokens)[0]


def applied_scales(coupling, tokens):
    """The scales that a coupling applies, found by moving x2 from 0 to 1, and its own log-det (B,)."""
    moved = coupling.order.chunk(2)[1]
    zero, one = (coupling(tokens.index_fill(coupling.axis, moved, value))[0].index_select(coupling.axis, moved) for value in (0, 1))
    return (one - zero).flatten(1), coupling(tokens)[1]


def jacobian(function, x, chunk=64):
    """The autograd Jacobian of one example x (...): (n, n)."""
    n = x.numel()
    repeated = x.detach().expand(chunk, *x.shape).clone().requires_grad_(True)
    out = function(repeated).flatten(1)
    rows = []
    for start in BAR(range(0, n, chunk), "Jacobian"):
        size = min(chunk, n - start)
        picked = out[range(size), range(start, start + size)].sum()
        rows.append(torch.autograd.grad(picked, repeated, retain_graph=True)[0][:size].flatten(1))
    return torch.cat(rows)


def check_identity(model, images, seed, num_whole):
    """float64 log-det against the Jacobian that autograd finds. Returns (checks, all scales that were applied)."""
    model, dtype, _ = at_precision(model, "float64")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    array = images.array
    noise = evaluation_noise(range(min(16, len(array))), array.shape[1:], seed, 0)
    x = dequantized(array[:len(noise)], noise, dtype).to(device_of(model))
    dims, checks, scales = array[0].size, [], []
    flops = 3 * dims * forward_flops(model.config) if isinstance(model, Jet) else 0
    if dims <= WHOLE_DIMS and flops <= WHOLE_FLOPS:
        gaps = []
        for one in x[:num_whole]:
            _, logabsdet = torch.linalg.slogdet(jacobian(lambda x: model(x)[0], one))
            gaps.append((logabsdet - model(one[None])[1].detach()).abs())
        worst, num_whole = largest_of(gaps), len(gaps)
        checks.append(check("Identity", "log-det, whole images", worst if gaps else None, worst < 1e-6 * dims if gaps else None,
                            f"below {1e-6 * dims:.2g} nats", f"float64 log-det against the autograd Jacobian's slogdet ({dims:,} x {dims:,}), {num_whole} images", 1e-6 * dims))
    else:
        checks.append(check("Identity", "log-det, whole images", None, None, "", f"a Jacobian of {dims:,} x {dims:,} at this "
                            "model's cost is too large: coupling by coupling, below"))
    if not isinstance(model, Jet):
        return checks, scales
    gaps, kept, crossed = [], [], []
    for number, layer, tokens in BAR(list(walk(model, x)), "log-det by coupling"):
        if isinstance(layer, Coupling):
            applied, logdet = applied_scales(layer, tokens)
            scales.append((applied.min().item(), applied.max().item()))
            gaps.append((applied.log().sum(1) - logdet).abs().max())
            held, moved = layer.order.chunk(2)
            kept.append((layer(tokens)[0] - tokens).index_select(layer.axis, held).abs().max())
            # z2 may depend on x2 by its own scale alone: J^T v = scale * v for any v
            one = tokens[:1].detach().clone().requires_grad_(True)
            with torch.enable_grad():
                z2 = layer(one)[0].index_select(layer.axis, moved)
                v = torch.randn(z2.shape, generator=torch.Generator().manual_seed(number), dtype=z2.dtype).to(z2)
                found = torch.autograd.grad((z2 * v).sum(), one)[0].index_select(layer.axis, moved)
            crossed.append((found.flatten() - applied[0] * v.flatten()).abs().max())
        else:  # one token at a time: all have the same Jacobian
            J = jacobian(lambda t: layer(t)[0], tokens[0, :1])
            logdet = layer(tokens[:1])[1].detach()
            gaps.append((tokens.shape[1] * torch.linalg.slogdet(J)[1] - logdet).abs())
    total = sum(layer(tokens)[1] for _, layer, tokens in walk(model, x))
    missing = (total - model(x)[1]).abs().max().item()
    worst, kept, crossed = largest_of(gaps), largest_of(kept), largest_of(crossed)
    checks += [
        check("Identity", "log-det by coupling", worst, worst < 1e-6, "below 1e-6 nats",
              "log-det of each coupling against the scales that it applies", 1e-6),
        check("Identity", "conditioning half", kept, kept == 0, "0", "x1 leaves each coupling as it came, to the bit"),
        check("Identity", "triangular", crossed, crossed < 1e-9, "below 1e-9", "x2 acts on its own place alone: the Jacobian against a random vector", 1e-9),
        check("Identity", "sum over couplings", missing, missing < 1e-6 * max(1, total.abs().max().item()) , "below 1e-6 of it", "no coupling is left out", 1e-6)]
    return checks, [value for pair in scales for value in pair]


# ---- 4. inverse, 5. precision

INVERSE_TOLERANCE = {"float64": (1e-6, 1.0), "float32": (0.05, 0.999), "bfloat16": (math.inf, 0.9)}
COUPLING_TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 1e-3}
LOGDET_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 1e-2}


@torch.no_grad()
def check_inverse(model, images, seed, num_images):
    """Whether images come back, as a whole and coupling by coupling, in each precision."""
    array = np.array(images.array[:num_images])
    noise = evaluation_noise(range(len(array)), array.shape[1:], seed, 0)
    noise = noise * 0.5 + 0.25  # in the middle of the levels: else rounding alone would move some to the next
    for precision in BAR(list(PRECISIONS), "inverse"):
        ours, dtype, context = at_precision(model, precision)
        x = dequantized(array, noise, dtype).to(device_of(ours))
        largest, share = INVERSE_TOLERANCE[precision]
        try:
            with context:
                z, logdet = ours(x)
                back, back_logdet = ours.inverse(z)
        except (RuntimeError, NotImplementedError) as error:
            yield check("Inverse", f"{precision}: largest error", None, None, "", f"the model does not run so ({str(error).splitlines()[0][:80]})")
            continue
        error = (back - x).abs().max().item()
        pixels = ((back.double() + 1) * 127.5).floor().permute(0, 2, 3, 1).cpu().numpy()
        same = float((pixels == array).mean())
        cancel = (logdet + back_logdet).abs().max().item()
        if math.isfinite(largest):
            yield check("Inverse", f"{precision}: largest error", error, error < largest, f"below {largest:g}",
                        f"x against inverse(forward(x)), {len(array)} images, pixel values in -1 to 1", largest)
        yield check("Inverse", f"{precision}: pixels that come back", same, same >= share, f"at least {share:.1%}",
                    f"exactly; largest error {error:.2g}; log-dets cancel to {cancel:.2g} nats", 0.01)
        if not isinstance(model, Jet):
            continue
        errors, gaps = {}, []
        with context:
            for number, layer, tokens in walk(ours, x):
                again = layer.inverse(layer(tokens)[0])[0]
                errors[f"{type(layer).__name__} {number}"] = (again - tokens).abs().max().item()
                if isinstance(layer, Coupling):
                    applied, logdet = applied_scales(layer, tokens)
                    gaps.append((applied.double().log().sum(1) - logdet).abs().max())
        worst, gap, tolerance = largest_of(errors.values()), largest_of(gaps), COUPLING_TOLERANCE[precision]
        yield check("Inverse", f"{precision}: worst coupling", worst, worst < tolerance, f"below {tolerance:g}",
                    f"{max(errors, key=errors.get)}; each layer forward and back on its own", tolerance)
        tolerance = LOGDET_TOLERANCE[precision]
        yield check("Inverse", f"{precision}: log-det against scales", gap, gap < tolerance, f"below {tolerance:g} nats",
                    "the scales that act on x2 and those in the log-det are the same numbers", tolerance)


def check_precision(measured):
    """bits/dim on the same images and noise in each precision."""
    exact = measured["rows"]["bits"][0]
    yield check("Precision", "float64", float(exact.mean()), True, "the reference", "bits/dim, one draw an image", 1e-6)
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        result = measured[precision]
        if isinstance(result, Exception):
            yield check("Precision", precision, None, None, "", f"the model does not run so ({str(result).splitlines()[0][:80]})")
            continue
        value = result["bits_per_dim"]
        yield check("Precision", precision, value, abs(value - exact.mean()) < tolerance, f"within {tolerance:g} of float64",
                    f"differs by {value - exact.mean():+.2g}; worst image {np.abs(result['bits_per_dim_per_image'] - exact).max():.2g}"
                    if len(result["bits_per_dim_per_image"]) == len(exact) else "other images", tolerance / 2)


def precision_error(measured):
    """The largest difference between precisions, bits/dim: part of the verdict's error."""
    exact = measured["rows"]["bits"][0].mean()
    return max(abs(measured[name]["bits_per_dim"] - exact) for name in ("float32", "bfloat16") if isinstance(measured[name], dict))


# ---- 6. code length

def check_code_length(model, images, checkpoint, model_flags, num_images, threads):
    """num_images images in a file, and back in a fresh process."""
    array = np.array(images.array[:num_images])
    bar = functools.partial(BAR, desc="encoding")
    try:
        content, about = codec.encode(model, array, bar)
    except codec.CodecError as error:
        yield check("Code length", "encoding", str(error), False, "a file", "")
        return
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "images.jet", Path(folder) / "images.npy"
        file.write_bytes(content)
        command = [sys.executable, str(ROOT / "codec.py"), "decode", str(file), "--checkpoint", str(checkpoint), "--out", str(out),
                   "--threads", str(threads), "--device", str(device_of(model)), *model_flags]
        with BAR(total=1, desc="decoding in a fresh process"):
            done = subprocess.run(command, capture_output=True, text=True)
        decoded = np.load(out) if done.returncode == 0 and out.exists() else None
    exact = decoded is not None and np.array_equal(decoded, array)
    yield check("Code length", "decoded by a fresh process", f"{len(array)} images", exact, "every pixel as it was",
                f"of {len(content):,} bytes" if done.returncode == 0 else done.stderr.strip().splitlines()[-1])
    if len(array) == 1:
        return
    bound = float(codec.bound(model, array[1:], about["noise"]).mean())
    net = about["net_bits"] / array[1:].size
    whole = about["file_bits"] / array.size
    start = (8 * array[0].size + 40_000) / array.size  # the raw image, the first stack, the header and the last lanes
    yield check("Code length", "bound, same images and noise", bound, True, "the reference", "bits/dim by the likelihood, float64", 1e-3)
    yield check("Code length", "net", net, abs(net - bound) < 1e-3, "within 0.001 of the bound", f"differs by {net - bound:+.2g}: "
                "what was written less what was borrowed", 1e-3)
    yield check("Code length", "whole file", whole, whole - bound < 0.001 + start, f"at most {0.001 + start:.3f} above the bound",
                f"{whole - bound:+.4f}: with one raw image, {about['borrowed_bits']:,} borrowed bits, {about['header_bits']:,} of "
                f"header; {about['latents_beyond']} latents beyond the tables", 1e-3)
