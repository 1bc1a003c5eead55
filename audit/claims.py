"""Claims of bits per dimension, and what a measurement says of one."""
import dataclasses
import math
import re
from decimal import Decimal

from audit.checks import AuditError
from audit.estimate import importance_weighted, noise_error
from data import SETS

MISTAKES = {  # from bits/dim, the log-det in bits/dim and the channels: what it makes of the number
    "log(127.5) per dimension is left out": lambda bits, logdet, C: bits - math.log2(127.5),
    "pixels are taken in 0 to 1 and their 256 levels are not counted":
        lambda bits, logdet, C: bits - 8,
    "pixels are taken to span 1, not 2 (log 256 instead of log 127.5)":
        lambda bits, logdet, C: bits + math.log2(256 / 127.5),
    "nats are given instead of bits": lambda bits, logdet, C: bits * math.log(2),
    "it is divided by H*W instead of C*H*W": lambda bits, logdet, C: C * bits,
    "the sign of the log-det is wrong": lambda bits, logdet, C: bits + 2 * logdet,
    "the log-det is left out": lambda bits, logdet, C: bits + logdet,
    "log(2 pi) / 2 is left out": lambda bits, logdet, C: bits - math.log2(2 * math.pi) / 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A number that someone reports, and what it is said to be of."""
    text: str  # with its digits
    model: str = ""
    dataset: str | None = None  # None: of the images that are audited
    variant: str | None = None
    bound: str | None = None  # None: that of the model
    dequantization: str | None = None
    k: int | None = None  # draws of an importance-weighted bound
    precision: str = "float32"
    source: str = ""

    @property
    def interval(self):
        """What the digits allow: half a unit of the last one to either side."""
        value = Decimal(self.text)
        half = Decimal(5).scaleb(value.as_tuple().exponent - 1)
        return float(value - half), float(value + half)


def read_claim(request, reported):
    """The Claim of a Request, or None. reported: rows of results/reported.csv, for claim_from."""
    text, name = request.claim, request.claim_data
    about = {"variant": request.claim_variant, "bound": request.claim_bound,
             "dequantization": request.claim_dequantization, "k": request.claim_k,
             "precision": request.claim_precision}
    about = {field: value for field, value in about.items() if value is not None}
    if text is not None and request.claim_from is not None:
        raise AuditError("--claim and --claim-from: give one of them")
    if request.claim_from is not None:
        return dataclasses.replace(_reported_claim(request, reported), **about)
    if text is None:
        if name or about:
            given = "data" if name else min(about)
            raise AuditError(f"--claim-{given}: of which claim? Give --claim or --claim-from")
        return None
    if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,15}", text) or not float(text):
        raise AuditError(f"--claim {text}: must be bits/dim above 0, with the digits that were "
                         "published, like 3.66")
    if name and name not in SETS:
        raise AuditError(f"--claim-data {name}: no known set (like {', '.join(list(SETS)[:3])}, "
                         "imagenet64-oord)")
    if about.get("k", 1) > 1 and about.setdefault("bound", "importance-weighted") == "elbo":
        raise AuditError(f"--claim-k {about['k']}: an elbo has one draw: leave one of them out")
    if name:
        about.setdefault("variant", SETS[name].variant)
    return Claim(text=text, dataset=name, **about)


def _reported_claim(request, reported):
    wanted, models = request.claim_from, list(dict.fromkeys(row["model"] for row in reported))
    fits = [name for name in models if wanted.lower() in name.lower()]
    fits = [name for name in fits if name.lower() == wanted.lower()] or fits
    if len(fits) > 1:
        raise AuditError(f"--claim-from {wanted!r}: several models of results/reported.csv: "
                         f"{'; '.join(fits)}")
    if not fits:
        raise AuditError(f"--claim-from {wanted!r}: no model of results/reported.csv, which has "
                         f"{', '.join(models[:4])}, ...")
    rows = [row for row in reported if row["model"] == fits[0]]
    dataset = request.claim_data or request.data.removesuffix("-subset")
    chosen = [row for row in rows if dataset in (row["dataset"], reported_name(row))]
    if len(chosen) != 1:
        raise AuditError(f"--claim-from {fits[0]!r}: reported for "
                         f"{', '.join(map(reported_name, rows))}: choose by --claim-data")
    row, = chosen
    same = {name: row[name] for name in ("model", "variant", "bound", "dequantization", "source")}
    return Claim(text=row["bits_per_dim"], dataset=reported_name(row), **same)


def reported_name(row):
    """The name of a reported row's set, like ours: cifar10, imagenet64-oord."""
    dataset, variant = row["dataset"], row["variant"]
    return dataset if dataset == variant else f"{dataset}-{variant}"


def trusted_to(claim):
    """Bits/dim to which the checks must know the number: a fifth of what the digits allow."""
    if claim is None:
        return 1e-3
    low, high = claim.interval
    return min(1e-3, (high - low) / 10)


def verdict(claim, images, whole, measured, is_sound=True):
    """{"result", "sentence", ...}: reproduced, better, worse, not comparable; None: no claim.

    is_sound: whether no check failed; else nothing is judged. The error is that of the noise, of
    one draw in the claim and of ours here, and of the precision: not that over images, which are
    the claim's own.
    """
    if claim is None:
        return None
    low, high = claim.interval
    about = {"claim": claim.text, "model": claim.model, "source": claim.source,
             "dataset": claim.dataset or images.name, "interval": [low, high],
             "bits_per_dim": measured["ours"]["bits_per_dim"], "result": "not comparable"}
    value = about["bits_per_dim"]
    theirs = f"{claim.model}: {claim.text}" if claim.model else claim.text
    ours = (f"{len(images.array):,} {images.split} images of {images.name}")
    reason = why_not_comparable(claim, images, whole, measured)
    if reason or not is_sound:
        first = f"Not comparable: {theirs} ({reason})" if reason else (
            f"Nothing is said of the claim, {theirs}, for checks have failed")
        about["result"] = "not comparable" if reason else "not judged"
        return about | {"sentence": f"{first}; measured: {value:.4f} bits/dim on {ours}."}
    value, precision = measured_like(claim, measured)
    noise = noise_error(measured)
    error = math.hypot(noise, noise / math.sqrt(measured["draws"]), precision)
    ours = f"{value:.4f} +- {error:.1g} bits/dim on {ours}"
    outside = max(low - value, value - high, 0.0)
    count = 0.0
    if outside:
        count = outside / error if error else math.inf
    about |= {"outside": outside, "standard_errors": count, "bits_per_dim": value,
              "standard_error": error, "precision_error": precision}
    digits = max(4, len(claim.text))
    theirs = f"{theirs} (from {low:.{digits}g} to {high:.{digits}g})"
    if outside <= 2 * error:
        where = f"{outside:.4f} outside, {count:.1f} errors" if outside else "inside"
        return about | {"result": "reproduced",
                        "sentence": f"Reproduced: {theirs}; measured {ours}, {where}."}
    result, where = ("better", "below") if value < low else ("worse", "above")
    sentence = (f"{result.capitalize()}: measured {ours}, {outside:.4f} {where} what the claim "
                f"{theirs} allows: {count:.1f} errors of the noise.")
    logdet = measured["rows"]["logdet"][:measured["draws"]].mean() / measured["dims"] / math.log(2)
    for mistake, formula in MISTAKES.items():
        wrong = formula(value, logdet, images.array.shape[-1])
        if low - 2 * error <= wrong <= high + 2 * error:
            about.setdefault("mistakes", []).append(mistake)
            sentence += f" The claim is what these weights give ({wrong:.4f}) where {mistake}."
    return about | {"result": result, "sentence": sentence}


def measured_like(claim, measured):
    """(bits/dim as the claim counts them, by how much its precision moves them)."""
    value, exact = measured["ours"]["bits_per_dim"], measured["rows"]["bits"]
    precision = 0.0
    if isinstance(other := measured.get(claim.precision), dict):
        precision = float(other["bits_per_dim"] - exact[0][:other["num_images"]].mean())
    if claim.precision == "bfloat16":
        value += precision
    if claim.k and measured.get("kind") != "elbo":  # which has drawn as many
        weighted = importance_weighted(exact, claim.k, measured["dims"]).mean()
        value += float(weighted - exact[:measured["draws"]].mean())
    return value, abs(precision)


def why_not_comparable(claim, images, whole, measured):
    """Why a claim says nothing of these images, or None. whole: they are all of their split."""
    ours, noise = measured.get("bound", "elbo"), measured.get("dequantization", "uniform")
    is_weighted = claim.bound == "importance-weighted" and claim.k
    if claim.dequantization not in (None, noise) or not (
            is_weighted or None in (ours, claim.bound) or claim.bound == ours):
        return (f"other bound: the claim is {claim.bound or ours} with "
                f"{(noise if claim.dequantization is None else claim.dequantization) or 'unknown'} "
                f"dequantization, ours {ours} with {noise} dequantization"
                + (": --claim-k gives its draws" if claim.bound == "importance-weighted" else ""))
    if isinstance(measured.get(claim.precision), Exception):
        return f"other precision: the model does not run in {claim.precision}"
    bits = measured.get("bits", 8)
    if bits < 8 and claim.variant is None:
        return (f"other variant: these images have {bits} bits; --claim-variant "
                f"{images.variant} says that the claim's have, too")
    if claim.dataset and claim.variant in ("unknown", "oord?"):
        return ("other variant: which images the claim was measured on is not known "
                f"({claim.dataset})")
    if claim.dataset and images.name.startswith(f"{claim.dataset}-"):
        return (f"other split: the claim is of all test images of {claim.dataset}, these are a "
                "part of them")
    if claim.dataset and claim.dataset != images.name:
        return (f"other variant: the claim is of {claim.dataset}, these are {images.name}, variant "
                f"{images.variant}")
    if claim.variant not in (None, images.variant):
        return f"other variant: the claim is of {claim.variant}, these are {images.variant}"
    others = "other split: the claim is of all test images, these are"
    if images.split == "train":
        return f"{others} {len(images.array):,} training images"
    return None if whole else f"{others} a part, {len(images.array):,} of them"
