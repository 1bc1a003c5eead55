"""Code length: whether the bits become bytes, and the bytes the images in a fresh process."""
import dataclasses
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import codec
from audit.adapters import load_model
from audit.checks import BAR, INFO, AuditError, check, device_of
from audit.jacobians import WHOLE_DIMS, jacobian_seconds
from coding import local
from harness.files import read_bytes
from harness.flops import forward_flops
from harness.host import ROOT
from jet import Jet

CODELENGTH_FLOPS = 1e13  # of a Jet, by default as many images (8 to 512) as this allows
MOST_IMAGES, SECONDS = 32, 30  # of an adapter by default; for both ways
DRIFT = 5e-3  # where other images are stored, others are left
line = functools.partial(check, "Code length")


def affordable(subject):
    """Images that are compressed by default."""
    if isinstance(subject.model, Jet):
        return max(8, min(512, int(CODELENGTH_FLOPS / 4 / forward_flops(subject.model.config))))
    if not is_plain(subject.model):
        return 0
    try:
        seconds = 2 * jacobian_seconds(subject) if subject.dims <= WHOLE_DIMS else SECONDS + 1
    except AuditError:
        return 0
    return min(MOST_IMAGES, len(subject.array), int(SECONDS / max(seconds, 1e-6)))


def check_code_length(subject, model, request, about):
    """(checks, the file or None) of the first request.codelength images. about: the model."""
    array = np.array(subject.array[:request.codelength])
    if isinstance(model, Jet):
        if request.codelength:
            return [*check_jet(model, array, request)], None
        return [line("bytes", None, None, "", "not verified by bytes: not asked for "
                     "(--codelength N)")], None
    if not is_plain(subject.model):
        return [unverified("the coder takes forward and inverse of images of 8 bits, without "
                           "labels and without a dequantizer of the model's own")], None
    if not request.codelength:
        return [line("bytes", None, None, "", "not verified by bytes: not asked for, or a Jacobian "
                     "of each image takes too long (--codelength N)")], None
    try:
        return check_adapter(subject.model, array, request, about["weights_sha256"])
    except (AuditError, codec.CodecError) as error:
        return [unverified(str(error))], None


def is_plain(adapter):
    """Whether it is a map of uniformly dequantized bytes alone."""
    return (adapter.inverts and not adapter.dequantizes and not adapter.classes
            and adapter.bits == 8)


def unverified(reason):
    return line("bytes", None, INFO, "", f"not verified by bytes: {reason}")


# ---- a Jet: codec.py

def check_jet(model, array, request):
    try:
        content, about = codec.encode(model, array, functools.partial(BAR, desc="encoding"))
    except codec.CodecError as error:
        yield line("encoding", str(error), False, "a file", "")
        return
    options = ["--checkpoint", str(request.checkpoint), "--threads", str(request.threads),
               "--device", str(device_of(model)), *request.model_arguments()]
    decoded, error = decode_elsewhere("codec.py", content, ["decode"], options, "images.npy")
    is_exact = decoded is not None and np.array_equal(decoded, array)
    checkpoint = Path(request.checkpoint)
    weights = checkpoint / "checkpoint.pt" if checkpoint.is_dir() else checkpoint
    yield line("decoded by a fresh process", f"{len(array)} images", is_exact,
               "every pixel as it was", error or f"of {len(content):,} bytes; the weights' file "
               f"has {weights.stat().st_size:,}")
    coded = array[about["coded"]]
    if not len(coded):
        return
    bound = float(codec.bound(model, coded, about["noise"]).mean())
    net = about["net_bits"] / coded.size
    whole = about["file_bits"] / array.size
    yield line("bound, same images and noise", bound, True, "the reference",
               "bits/dim by the likelihood, float64", DRIFT)
    near = 1e-3 + 100 / coded.size  # of few images, some bits more
    yield line("net", net, abs(net - bound) < near, f"within {near:.2g} of the bound",
               f"differs by {net - bound:+.2g}: what was written less what was borrowed", DRIFT)
    # Images that are stored, the header and the last lanes.
    rest = about["stored_bits"] + about["borrowed_bits"]
    allowed = 0.001 + (rest + 40_000) / array.size
    yield line("whole file", whole, whole - bound < allowed,
               f"at most {allowed:.3f} above the bound",
               f"{whole - bound:+.4f}: with {len(array) - len(coded)} images as WebP, PNG or raw, "
               f"{about['header_bits']:,} bits of header; {about['latents_beyond']} latents "
               "beyond the tables", DRIFT)


def decode_elsewhere(script, content, before, options, name):
    """(images or None, the error or None) of a file that a fresh process decodes."""
    with tempfile.TemporaryDirectory() as folder, BAR(total=1, desc="decoding in a fresh process"):
        file, out = Path(folder) / "images.bits", Path(folder) / name
        file.write_bytes(content)
        command = [sys.executable, str(ROOT / script), *before, str(file), "--out", str(out)]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        out = out / "images.npy" if out.is_dir() else out
        return np.load(out), None


# ---- any other model: local bits-back coding

def check_adapter(model, array, request, digest):
    """(checks, the file or None)."""
    encoding = functools.partial(BAR, desc="encoding, a Jacobian an image")
    content, about = local.encode(model, array, digest, request.threads, encoding)
    decoded, error = decode_elsewhere("experiments/audit_bpd.py", content, ["--decode"],
                                      ["--adapter", str(request.adapter)], "decoded")
    if decoded is None or not np.array_equal(decoded, array):
        return [unverified(f"a fresh process does not decode its file ({error})")], None
    net, bound = about["net_bits"] / array.size, float(about["bound"].mean())
    near = max(0.01, 30 / array.size)  # some bits more of few values
    if abs(net - bound) >= near:
        return [unverified(f"its file takes {net:.4f} bits/dim, and by its likelihood it should be "
                           f"{bound:.4f}")], None
    files = {Path(path).resolve() for path in (*model.worker.files, request.adapter)}
    weights, code = (sum(file.stat().st_size for file in files if (file.suffix == ".py") == is_code)
                     for is_code in (False, True))
    return [
        line("decoded by a fresh process", f"{len(array)} images", True, "every pixel as it was",
             f"of {len(content):,} bytes, {about['borrowed_bits'] // 8:,} of which are the bits "
             f"that the first image borrows and {about['header_bits'] // 8:,} a header; its weight "
             f"files have {weights:,}, its code {code:,}"),
        line("bound, same images and noise", bound, True, "the reference", "bits/dim by the "
             "likelihood, float64", 0.01),
        line("net", net, True, f"within {near:.2g} of the bound", f"differs by {net - bound:+.2g}: "
             "what was written less what was borrowed; it rests on Jacobians from differences of "
             "z, not on the model's log-det", 0.01)], content


def restore(path, request):
    """The images of a file that an audit of an adapter left. Raises CodecError, AuditError."""
    content = read_bytes(path, max_bytes=2 ** 32)
    try:
        threads = local.read(content)[0]["threads"]  # others might round otherwise
        torch.set_num_threads(threads)
        model, about, _ = load_model(dataclasses.replace(request, threads=threads))
        decoding = functools.partial(BAR, desc="decoding")
        return local.decode(model.double(), content, about["weights_sha256"], decoding)
    except codec.CodecError as error:
        raise codec.CodecError(f"{path}: {error}") from None
