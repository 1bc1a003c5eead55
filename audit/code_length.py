"""Code length: whether the bits become bytes, and the bytes the images."""
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import codec
from audit.checks import BAR, check, device_of
from harness.machine import ROOT

line = functools.partial(check, "Code length")


def check_code_length(model, images, checkpoint, model_arguments, threads):
    """Images (N, H, W, C) in a file, and back in a fresh process. model_arguments: of codec.py."""
    array = np.array(images)
    try:
        content, about = codec.encode(model, array, functools.partial(BAR, desc="encoding"))
    except codec.CodecError as error:
        yield line("encoding", str(error), False, "a file", "")
        return
    options = ["--checkpoint", str(checkpoint), "--threads", str(threads),
               "--device", str(device_of(model)), *model_arguments]
    with BAR(total=1, desc="decoding in a fresh process"):
        decoded, error = decode_elsewhere(content, options)
    is_exact = decoded is not None and np.array_equal(decoded, array)
    yield line("decoded by a fresh process", f"{len(array)} images", is_exact,
               "every pixel as it was", error or f"of {len(content):,} bytes")
    if len(array) == 1:
        return
    bound = float(codec.bound(model, array[1:], about["noise"]).mean())
    net = about["net_bits"] / array[1:].size
    whole = about["file_bits"] / array.size
    yield line("bound, same images and noise", bound, True, "the reference",
               "bits/dim by the likelihood, float64", 1e-3)
    yield line("net", net, abs(net - bound) < 1e-3, "within 0.001 of the bound",
               f"differs by {net - bound:+.2g}: what was written less what was borrowed", 1e-3)
    # The raw image, the first stack, the header and the last lanes.
    allowed = 0.001 + (8 * array[0].size + 40_000) / array.size
    yield line("whole file", whole, whole - bound < allowed,
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
