"""An audit: every check and the verdict, as a certificate."""
import contextlib
import dataclasses
import datetime
import math
import platform
import time

import numpy as np
import torch

from audit.adapters import load_model, taken_by
from audit.certificates import FORMAT
from audit.checks import FAIL, OPEN, AuditError, check
from audit.claims import read_claim, trusted_to, verdict
from audit.code_length import affordable, check_code_length
from audit.couplings import check_inverse, check_layers
from audit.estimate import check_estimate, check_precision, estimate
from audit.images import check_data
from audit.jacobians import check_whole_images, how_many
from audit.kinds import check_kind, check_taken
from audit.outcome import judge
from audit.protocol import Subject, check_memory, check_protocol
from audit.request import NUM_JACOBIANS
from data import SPLITS, load_images
from harness.errors import DataError, NonFiniteError
from harness.host import code_version
from harness.machine import hardware, pick_device
from jet import Jet


def audit(request, reported=(), tell=lambda one: None):
    """(certificate, measured) of a Request: all checks, and what the likelihood was measured with.

    reported: rows of results/reported.csv. tell: called with each Check as soon as it is made.
    Raises AuditError, DataError or CheckpointError for what cannot be audited.
    """
    begun, claim = time.monotonic(), read_claim(request, reported)
    torch.set_num_threads(request.threads)
    model, about, recorded = load_model(request)
    images, other_split, whole = select_images(request, model)
    checks, measured = [], None

    def add(new, section=None):
        """section: of what a model that refuses to be asked leaves open."""
        try:
            for one in new:
                checks.append(one)
                tell(one)
        except AuditError as error:
            if not section:
                raise
            add([check(section, "what the model refuses", None, OPEN, "", str(error))])

    rng = np.random.default_rng(list(bytes.fromhex(request.entropy)))
    add(check_data(images, other_split, recorded, rng, whole, getattr(model, "bits", 8)))
    add([check_weights(about["weights_sha256"], recorded)])
    images, other_split = taken_by(model, images, other_split)
    add(check_taken(model, images, other_split))
    try:
        measured = estimate(model, images, request.eval_seed, request.draws, request.iw,
                            request.claim_k, claim and claim.precision)
    except NonFiniteError as error:
        add([check("Estimate", "finite", str(error), False, "finite", "no number can be reported")])
    if measured:
        subject = Subject(model, images, measured, request.entropy, trusted_to(claim))
        if request.jacobians is None:
            request = dataclasses.replace(request, jacobians=how_many(subject, NUM_JACOBIANS))
        layers, scales = check_layers(subject) if isinstance(model, Jet) else ([], [])
        allowance = 2 * subject.allowance(request.draws) / subject.dims / math.log(2)
        add(check_estimate(model, images, measured, recorded, scales, allowance))
        add(check_kind(subject), "Identity")
        add(check_whole_images(subject, request.jacobians), "Identity")
        add(layers)
        add(check_inverse(subject, model, request.claim_precision), "Inverse")
        add(check_protocol(subject), "Protocol")
        add(check_memory(subject, other_split), "Protocol")
        add(check_precision(measured, request.claim_precision))
    if request.codelength is None:
        count = affordable(subject) if measured else 0
        request = dataclasses.replace(request, codelength=count)
    if not isinstance(model, Jet):
        about["files"] = model.files()
    if measured:
        found, measured["written"] = check_code_length(subject, model, request, about)
        add(found)
    is_sound = all(one.result != FAIL for one in checks)
    found = verdict(claim, images, whole, measured, is_sound) if measured else None
    return make_certificate(request, about, images, whole, checks, found, measured, begun), measured


def make_certificate(request, about, images, whole, checks, found, measured, begun):
    """found: the verdict on the claim, or None. begun: when the audit did."""
    numbers = dict.fromkeys(("bits_per_dim", "bits_per_dim_se", "noise_se"), math.nan)
    if measured:
        numbers = {name: (measured["ours"] | measured)[name] for name in numbers}
    now = datetime.datetime.now().astimezone()
    certificate = {
        "format": FORMAT, "made": now.isoformat(timespec="seconds"),
        "settings": request.to_settings(), "weights": about,
        "data": {"name": images.name, "variant": images.variant, "split": images.split,
                 "num_images": len(images.array), "shape": list(images.array.shape[1:]),
                 "whole_split": whole, "fingerprint": images.fingerprint},
        **{name: None if math.isnan(value) else value for name, value in numbers.items()},
        "verdict": found, "checks": [dataclasses.asdict(one) for one in checks],
        "made_with": {**code_version(), "hardware": hardware(pick_device(request.device)),
                      "python": platform.python_version(), "torch": torch.__version__,
                      "numpy": np.__version__, "seconds": round(time.monotonic() - begun, 1)}}
    certificate["outcome"], certificate["reasons"] = judge(certificate)
    return certificate


def select_images(request, model):
    """(images, those of the other split or None, whether they are the whole split)."""
    images = load_images(request.data, request.split, request.data_root)
    height, width, channels = images.array.shape[1:]
    if request.num_images and request.num_images > len(images.array):
        raise DataError(f"num_images={request.num_images}: {request.data} {request.split} has "
                        f"{len(images.array):,}")
    if isinstance(model, Jet) and (channels, height, width) != model.config.image_shape:
        takes = " x ".join(map(str, model.config.image_shape))
        raise DataError(f"{request.data} has images of {channels} x {height} x {width} (channels "
                        f"first), and this Jet takes {takes}: give other --data")
    other_split = None
    if not request.data.endswith(".npy"):
        other, = set(SPLITS) - {request.split}
        with contextlib.suppress(DataError):  # then that check does not apply
            other_split = load_images(request.data, other, request.data_root)
    whole = request.num_images in (None, len(images.array))
    return images.first(request.num_images), other_split, whole


def check_weights(found, recorded):
    """Whether the weights are those that the run's done.json names."""
    expected = recorded.get("weights_sha256") if recorded else None
    if not expected:
        return check("Data", "weights", found, None, "not recorded", "SHA-256 of the weights; "
                     "nothing to compare with: --check a certificate")
    return check("Data", "weights", found, found == expected, expected,
                 "SHA-256 of the weights, as the run recorded them when it ended")
