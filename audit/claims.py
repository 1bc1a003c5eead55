"""Claims of bits per dimension, and what a measurement says of one."""
import dataclasses
import math
import re
from decimal import Decimal

from audit.checks import AuditError
from audit.estimate import precision_error
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
    bound: str = "elbo"
    dequantization: str = "uniform"
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
    if text is not None and request.claim_from is not None:
        raise AuditError("--claim and --claim-from: give one of them")
    if request.claim_from is not None:
        return _reported_claim(request, reported)
    if text is None:
        if name:
            raise AuditError("--claim-data: of which claim? Give --claim or --claim-from")
        return None
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?", text) or not float(text):
        raise AuditError(f"--claim {text}: must be bits/dim above 0, with the digits that were "
                         "published, like 3.66")
    if name and name not in SETS:
        raise AuditError(f"--claim-data {name}: no known set (like {', '.join(list(SETS)[:3])}, "
                         "imagenet64-oord)")
    return Claim(text=text, dataset=name, variant=SETS[name].variant if name else None)


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


def verdict(claim, images, whole, measured):
    """{"result", "sentence", ...}: reproduced, better, worse, not comparable; None: no claim."""
    if claim is None:
        return None
    value, se = measured["ours"]["bits_per_dim"], measured["ours"]["bits_per_dim_se"]
    precision = precision_error(measured)
    error = math.hypot(0 if math.isnan(se) else se, precision)
    low, high = claim.interval
    about = {"claim": claim.text, "model": claim.model, "source": claim.source,
             "dataset": claim.dataset or images.name, "interval": [low, high],
             "bits_per_dim": value, "standard_error": error, "precision_error": precision,
             "result": "not comparable"}
    ours = (f"{value:.4f} +- {error:.4f} bits/dim on {len(images.array):,} {images.split} images "
            f"of {images.name}")
    theirs = f"{claim.model}: {claim.text}" if claim.model else claim.text
    if reason := why_not_comparable(claim, images, whole):
        return about | {"sentence": f"Not comparable: {theirs} ({reason}); measured: {ours}."}
    outside = max(low - value, value - high, 0)
    count = 0.0
    if outside:
        count = outside / error if error else math.inf
    about |= {"outside": outside, "standard_errors": count}
    digits = max(4, len(claim.text))
    theirs = f"{theirs} (from {low:.{digits}g} to {high:.{digits}g})"
    if outside <= 2 * error:
        where = f"{outside:.4f} outside, {count:.1f} standard errors" if outside else "inside"
        return about | {"result": "reproduced",
                        "sentence": f"Reproduced: {theirs}; measured {ours}, {where}."}
    result, where = ("better", "below") if value < low else ("worse", "above")
    sentence = (f"{result.capitalize()}: measured {ours}, {outside:.4f} {where} what the claim "
                f"{theirs} allows: {count:.1f} standard errors.")
    logdet = measured["rows"]["logdet"][:measured["draws"]].mean() / measured["dims"] / math.log(2)
    for mistake, formula in MISTAKES.items():
        wrong = formula(value, logdet, images.array.shape[-1])
        if low - 2 * error <= wrong <= high + 2 * error:
            about.setdefault("mistakes", []).append(mistake)
            sentence += f" The claim is what these weights give ({wrong:.4f}) where {mistake}."
    return about | {"result": result, "sentence": sentence}


def why_not_comparable(claim, images, whole):
    """Why a claim says nothing of these images, or None. whole: they are all of their split."""
    if claim.bound != "elbo" or claim.dequantization != "uniform":
        return (f"other bound: the claim is {claim.bound} with {claim.dequantization or 'unknown'} "
                "dequantization, ours elbo with uniform dequantization")
    if claim.dataset and claim.variant in ("unknown", "oord?"):
        return ("other variant: which images the claim was measured on is not known "
                f"({claim.dataset})")
    if claim.dataset and images.name.startswith(f"{claim.dataset}-"):
        return (f"other split: the claim is of all test images of {claim.dataset}, these are a "
                "part of them")
    if claim.dataset and claim.dataset != images.name:
        return (f"other variant: the claim is of {claim.dataset}, these are {images.name}, variant "
                f"{images.variant}")
    others = "other split: the claim is of all test images, these are"
    if images.split == "train":
        return f"{others} {len(images.array):,} training images"
    return None if whole else f"{others} {len(images.array):,} of them"
