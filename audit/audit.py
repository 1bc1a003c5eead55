"""An audit: every check and the verdict, as a certificate."""
import contextlib
import dataclasses
import datetime
import math
import platform
import time

import numpy as np
import torch

from audit.adapters import load_model
from audit.certificates import FORMAT
from audit.checks import FAIL, check
from audit.claims import read_claim, verdict
from audit.code_length import check_code_length
from audit.couplings import check_identity, check_inverse
from audit.estimate import check_estimate, check_precision, estimate
from audit.images import check_data
from data import SPLITS, load_images
from harness.errors import DataError, NonFiniteError
from harness.flops import forward_flops
from harness.machine import code_version, hardware, pick_device
from jet import Jet

CODELENGTH_FLOPS = 1e13  # by default as many images (8 to 512) as this allows
INVERSE_IMAGES = 64


def audit(request, reported=(), tell=lambda one: None):
    """(certificate, measured) of a Request: all checks, and what the likelihood was measured with.

    reported: rows of results/reported.csv. tell: called with each Check as soon as it is made.
    Raises AuditError, DataError or CheckpointError for what cannot be audited.
    """
    begun = time.monotonic()
    torch.set_num_threads(request.threads)
    claim = read_claim(request, reported)
    model, about, recorded = load_model(request)
    images, other_split, whole = select_images(request, model)
    if request.codelength is None:
        request = dataclasses.replace(request, codelength=affordable_images(model))
    checks, measured = [], None

    def add(new):
        for one in new:
            checks.append(one)
            tell(one)

    add(check_data(images, other_split, recorded))
    add([check_weights(about["weights_sha256"], recorded)])
    try:
        measured = estimate(model, images, request.eval_seed, request.draws, request.iw)
        identity, scales = check_identity(model, images, request.eval_seed, request.jacobians)
        add(check_estimate(model, images, measured, recorded, scales))
        add(identity)
        add(check_inverse(model, images, request.eval_seed, INVERSE_IMAGES))
        add(check_precision(measured))
    except NonFiniteError as error:
        add([check("Estimate", "finite", str(error), False, "finite", "no number can be reported")])
    if not isinstance(model, Jet):
        add([check("Code length", "bytes", None, None, "", "the codec takes a Jet alone")])
    elif not request.codelength or not measured:
        add([check("Code length", "bytes", None, None, "", "not asked for (--codelength N)")])
    else:
        add(check_code_length(model, images.array[:request.codelength], request.checkpoint,
                              request.model_arguments(), request.threads))
    now = datetime.datetime.now().astimezone()
    certificate = {
        "format": FORMAT, "made": now.isoformat(timespec="seconds"),
        "passed": all(one.result != FAIL for one in checks), "settings": request.to_settings(),
        "weights": about, "data": describe(images, whole), **numbers(measured),
        "verdict": verdict(claim, images, whole, measured) if measured else None,
        "checks": [dataclasses.asdict(one) for one in checks],
        "made_with": {**code_version(),
                      "hardware": hardware(pick_device(request.device)),
                      "python": platform.python_version(), "torch": torch.__version__,
                      "numpy": np.__version__, "seconds": round(time.monotonic() - begun, 1)}}
    return certificate, measured


def select_images(request, model):
    """(images, those of the other split or None, whether they are the whole split)."""
    images = load_images(request.data, request.split, request.data_root)
    height, width, channels = images.array.shape[1:]
    if isinstance(model, Jet) and (channels, height, width) != model.config.image_shape:
        takes = " x ".join(map(str, model.config.image_shape))
        raise DataError(f"{request.data} has images of {channels} x {height} x {width} (channels "
                        f"first), and this Jet takes {takes}: give other --data")
    other_split = None
    if not request.data.endswith(".npy"):
        other, = set(SPLITS) - {request.split}
        with contextlib.suppress(DataError):  # then that check does not apply
            other_split = load_images(request.data, other, request.data_root)
    whole = request.num_images is None or request.num_images >= len(images.array)
    if not whole:
        images = dataclasses.replace(images, array=images.array[:request.num_images], labels=None,
                                     known_fingerprint=None)
    return images, other_split, whole


def affordable_images(model):
    """How many images are compressed where nobody says."""
    if not isinstance(model, Jet):
        return 0
    return max(8, min(512, int(CODELENGTH_FLOPS / forward_flops(model.config) / 4)))


def check_weights(found, recorded):
    """Whether the weights are those that the run's done.json names."""
    expected = recorded.get("weights_sha256") if recorded else None
    if not expected:
        return check("Data", "weights", found, None, "not recorded", "SHA-256 of the weights; "
                     "nothing to compare with: --check a certificate")
    return check("Data", "weights", found, found == expected, expected,
                 "SHA-256 of the weights, as the run recorded them when it ended")


def describe(images, whole):
    return {"name": images.name, "variant": images.variant, "split": images.split,
            "num_images": len(images.array), "shape": list(images.array.shape[1:]),
            "whole_split": whole, "fingerprint": images.fingerprint}


def numbers(measured):
    """bits/dim and its errors for JSON, which knows no nan."""
    if not measured:
        return {"bits_per_dim": None, "bits_per_dim_se": None, "noise_se": None}
    values = {name: measured["ours"][name] for name in ("bits_per_dim", "bits_per_dim_se")}
    values["noise_se"] = measured["noise_se"]
    return {name: None if math.isnan(value) else value for name, value in values.items()}
