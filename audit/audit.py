"""An audit: every check and the verdict, as a certificate."""
import contextlib
import dataclasses
import datetime
import functools
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import codec
from audit.adapters import load_model, taken_by
from audit.certificates import FORMAT
from audit.checks import BAR, FAIL, OPEN, AuditError, check, device_of
from audit.claims import read_claim, trusted_to, verdict
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
from harness.flops import forward_flops
from harness.host import ROOT, code_version
from harness.machine import hardware, pick_device
from jet import Jet

CODELENGTH_FLOPS = 1e13  # by default as many images (8 to 512) as this allows
code_line = functools.partial(check, "Code length")


def audit(request, reported=(), tell=lambda one: None):
    """(certificate, measured) of a Request: all checks, and what the likelihood was measured with.

    reported: rows of results/reported.csv. tell: called with each Check as soon as it is made.
    Raises AuditError, DataError or CheckpointError for what cannot be audited.
    """
    begun, claim = time.monotonic(), read_claim(request, reported)
    torch.set_num_threads(request.threads)
    model, about, recorded = load_model(request)
    images, other_split, whole = select_images(request, model)
    if request.codelength is None:
        request = dataclasses.replace(request, codelength=affordable_codelength(model))
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
    if not isinstance(model, Jet):
        about["files"] = model.files()
        add([code_line("bytes", None, None, "", "not verified by bytes: the codec takes a Jet")])
    elif not request.codelength or not measured:
        add([code_line("bytes", None, None, "", "not asked for (--codelength N)")])
    else:
        add(check_code_length(model, images.array[:request.codelength], request.checkpoint,
                              request.model_arguments(), request.threads))
    is_sound = all(one.result != FAIL for one in checks)
    found = verdict(claim, images, whole, measured, is_sound) if measured else None
    return make_certificate(request, about, images, whole, checks, found, measured, begun), measured


def affordable_codelength(model):
    """Images that are compressed by default."""
    if not isinstance(model, Jet):
        return 0
    return max(8, min(512, int(CODELENGTH_FLOPS / 4 / forward_flops(model.config))))


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


# ---- code length: whether the bits become bytes, and the bytes the images

def check_code_length(model, images, checkpoint, model_arguments, threads):
    """Images (N, H, W, C) in a file, and back in a fresh process. model_arguments: of codec.py."""
    array = np.array(images)
    try:
        content, about = codec.encode(model, array, functools.partial(BAR, desc="encoding"))
    except codec.CodecError as error:
        yield code_line("encoding", str(error), False, "a file", "")
        return
    options = ["--checkpoint", str(checkpoint), "--threads", str(threads),
               "--device", str(device_of(model)), *model_arguments]
    with BAR(total=1, desc="decoding in a fresh process"):
        decoded, error = decode_elsewhere(content, options)
    is_exact = decoded is not None and np.array_equal(decoded, array)
    yield code_line("decoded by a fresh process", f"{len(array)} images", is_exact,
               "every pixel as it was", error or f"of {len(content):,} bytes")
    if len(array) == 1:
        return
    bound = float(codec.bound(model, array[1:], about["noise"]).mean())
    net = about["net_bits"] / array[1:].size
    whole = about["file_bits"] / array.size
    yield code_line("bound, same images and noise", bound, True, "the reference",
               "bits/dim by the likelihood, float64", 1e-3)
    near = 1e-3 + 100 / array[1:].size  # of few images, some bits more
    yield code_line("net", net, abs(net - bound) < near, f"within {near:.2g} of the bound",
               f"differs by {net - bound:+.2g}: what was written less what was borrowed", 1e-3)
    # The raw image, the first stack, the header and the last lanes.
    allowed = 0.001 + (8 * array[0].size + 40_000) / array.size
    yield code_line("whole file", whole, whole - bound < allowed,
               f"at most {allowed:.3f} above the bound",
               f"{whole - bound:+.4f}: with one raw image, {about['borrowed_bits']:,} borrowed "
               f"bits, {about['header_bits']:,} of header; {about['latents_beyond']} latents "
               "beyond the tables", 1e-3)


def decode_elsewhere(content, options):
    """(images or None, the error or None) of codec.py in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "images.jet", Path(folder) / "images.npy"
        file.write_bytes(content)
        command = [sys.executable, str(ROOT / "codec.py"), "decode", str(file), "--out", str(out)]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return np.load(out), None
