"""Bits per dimension of images under a Jet.

    python evaluate.py assets/jet_cifar10 --data cifar10-subset        # 3.6598 +- 0.0273, 4 s
    python evaluate.py official.npz --data imagenet64-oord --data-root DIR

Every image counts once, in nats that are summed and divided once; the noise is keyed by the image.
"""
import contextlib
import dataclasses
import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np
import torch

import kernels
from convert import load_jet
from data import SPLITS, ImageSet, evaluation_noise, load_images, pinned, prefetch
from harness import distributed
from harness.condition import NO_LABEL, check_labels, one_hot, zero_context
from harness.errors import DataError, NonFiniteError
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.host import code_version
from harness.machine import (
    MAX_THREADS, free_bytes, full_float32, hardware, networks_in, of_threads, pick_device)
from harness.progress import progress
from jet import Jet, JetConfig, bits_per_dim, dequantize

LIMITS = {"draws": 10_000, "threads": MAX_THREADS, "num_images": math.inf, "batch_size": math.inf}


@torch.no_grad()
@full_float32()
def evaluate(jet: torch.nn.Module, images: ImageSet | np.ndarray, seed: int = 0, draws: int = 1,
             batch_size: int | None = None, per_image: bool = False, precision: str = "float32",
             each_batch: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Bits per dimension of images under a Jet, one uniform dequantization draw per image and draw.

    images: an ImageSet or a uint8 array (N, H, W, C); a class-conditional Jet takes the ImageSet's
    labels (NO_LABEL for no condition). The noise is keyed by (seed, draw, image index), so the
    result depends on neither the batch size (None: 128 on a CPU, on a GPU the largest power of two
    that fits, up to 1024) nor the number of processes: where there are several (see
    harness/distributed.py), all must call this, each computes some batches, and all get the whole
    result. Computes in the type of the Jet's weights; precision "bfloat16" puts the couplings'
    networks under autocast. each_batch: called before each batch with how many images are done (of
    all draws); what it raises ends the evaluation.
    Returns a dict: bits_per_dim (mean over images and draws), bits_per_dim_se (standard error over
    images; nan for one image), num_images, logdet_nats (mean log|det| of an image), and with
    per_image bits_per_dim_per_image, float64 (N,).
    Raises ValueError for other arrays, and its subclass NonFiniteError, naming the image, for a
    result that is not finite.
    """
    array = np.asarray(getattr(images, "array", images))
    _check(array, draws, batch_size, precision)
    weight = next(jet.parameters(), torch.empty(0))
    classes = _check_jet(jet, weight, images, array)
    labels = np.asarray(getattr(images, "labels", None))
    if isinstance(jet, Jet) and precision == "float32":
        jet = kernels.accelerate(jet)
    device, results = weight.device, []

    def draw_batch(key):
        draw, start = key
        pixels = np.array(array[start:start + batch_size])
        indices = range(start, start + len(pixels))
        noise = evaluation_noise(indices, array.shape[1:], seed, draw)
        context = [one_hot(labels[start:start + batch_size], classes)] if classes else []
        return [pinned(part, device) for part in (pixels, noise.numpy(), *context)]

    with networks_in(precision, device):
        batch_size = batch_size or _batch_size(jet, array.shape[1:], weight)
        starts = range(0, len(array), batch_size)
        keys = [(draw, start) for draw in range(draws) for start in starts]
        ours = keys[distributed.rank()::distributed.size()]
        ahead = 4 if device.type == "cuda" else 0
        with contextlib.closing(prefetch(draw_batch, ours, ahead)) as batches:
            for number in range(math.ceil(len(keys) / distributed.size())):
                if each_batch:
                    each_batch(min(number * distributed.size() * batch_size, draws * len(array)))
                if number == len(ours):  # the other processes have one more
                    break
                here = (part.to(device, non_blocking=True) for part in next(batches))
                pixels, noise, *context = here
                results.append(measure(jet, pixels, noise.to(weight.dtype), *context))
                if device.type == "cuda" and len(results) % 16 == 0:
                    torch.cuda.synchronize(device)  # bounds the pinned memory of waiting batches
    table = torch.zeros(2, draws, len(array), dtype=torch.float64)  # others hold zeros: exact sums
    sizes = [result.shape[1] for result in results]
    parts = torch.cat(results, 1).cpu().split(sizes, 1) if results else ()
    for (draw, start), part in zip(ours, parts):
        table[:, draw, start:start + batch_size] = part
    bits, logdets = (distributed.add_up(table).numpy() / draws).sum(1)
    return _summary(bits, logdets, per_image)


def _check(array, draws, batch_size, precision):
    is_images = array.dtype == np.uint8 and array.ndim == 4 and array.size > 0
    is_batch = batch_size is None or batch_size >= 1
    if not (is_images and is_batch and draws >= 1 and precision in ("float32", "bfloat16")):
        raise ValueError(f"evaluate: {array.dtype} array of shape {array.shape}, draws={draws}, "
                         f"batch_size={batch_size}, precision={precision!r}: needs uint8 "
                         "(N, H, W, C), N, draws, batch_size >= 1, and float32 or bfloat16")


def _check_jet(jet, weight, images, array):
    """The classes that a class-conditional Jet is told; 0 of another."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"evaluate: weights in {weight.dtype}, which would round noise and "
                         "log-det, too: give jet.float(), and precision=\"bfloat16\" for its "
                         "networks alone")
    if isinstance(jet, Jet):
        channels, height, width = shape = jet.config.image_shape
        hint = ": channels come last" if array.shape[1:] == shape else ""
        if array.shape[1:] != (height, width, channels):
            raise ValueError(f"evaluate: images of shape {array.shape[1:]}, and this Jet takes "
                             f"{(height, width, channels)}{hint}")
        if jet.config.context_dim:
            if not hasattr(images, "labels"):
                raise ValueError("evaluate: an array has no labels, and this Jet is conditional on "
                                 "them: give an ImageSet")
            check_labels(images, jet.config)
        return jet.config.context_dim
    return getattr(jet, "classes", 0)


def _summary(bits, logdets, per_image):
    """What evaluate returns, of the bits/dim and log-dets (N,) of all images."""
    wrong = np.flatnonzero(~np.isfinite(bits))
    if len(wrong):
        raise NonFiniteError(f"evaluate: image {wrong[0]} has {bits[wrong[0]]} bits/dim "
                             f"({len(wrong)} images are not finite): no number can be reported")
    error = bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    result = {"bits_per_dim": float(bits.mean()), "bits_per_dim_se": float(error),
              "num_images": len(bits), "logdet_nats": float(logdets.mean())}
    return {**result, "bits_per_dim_per_image": bits} if per_image else result


def measure(jet: torch.nn.Module, pixels: torch.Tensor, noise: torch.Tensor,
            *context: torch.Tensor) -> torch.Tensor:
    """Bits/dim and log-det (2, B), float64, of uint8 pixels with their noise in [0, 1).

    Both are (B, H, W, C), and all of it happens on their device, where a context is, too.
    """
    z, logdet = jet(dequantize(pixels, noise).permute(0, 3, 1, 2), *context)
    return torch.stack([bits_per_dim(z, logdet).double(), logdet.double()])


def _batch_size(jet, shape, weight):
    """Images at a time: 128 on a CPU; on GPUs what fits on each of them."""
    if weight.device.type == "cpu":
        return 128
    return int(-distributed.agree(-_batch_that_fits(jet, shape, weight))[0])


def _batch_that_fits(jet, shape, weight):
    """The largest power of two, up to 1024, that takes half of a GPU's free memory.

    By the need of 8 images.
    """
    x = weight.new_zeros(8, shape[2], *shape[:2])
    context = zero_context(jet.config, x) if isinstance(jet, Jet) else ()
    with torch.compiler.set_stance("force_eager"):  # no graph for a batch of 8
        jet(x, *context)  # what stays, like the casts of weights, is not counted
        torch.cuda.reset_peak_memory_stats(weight.device)
        before = torch.cuda.memory_allocated(weight.device)
        jet(x, *context)
    need = max(1, torch.cuda.max_memory_allocated(weight.device) - before) / len(x)
    return 2 ** min(10, int(math.log2(max(1, free_bytes(weight.device) / 2 / need))))


def add_evaluation_flags(parser: ArgumentParser) -> None:
    """Flags that say which images are measured, and how; draws are of evaluate.py alone."""
    parser.add_argument("--data", required=True, metavar="NAME",
                        help="image set: a known name, a prepared folder or a .npy file")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--num-images", type=int, metavar="N",
                        help="the first N images (default: all)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float64"),
                        default="float32",
                        help="bfloat16: of the couplings' networks alone (default: float32)")
    parser.add_argument("--data-root", metavar="DIR",
                        help="holds the image sets (default: $JET_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="CPU threads (default: 1)")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="images at a time; changes no number (default: what fits)")
    add_setting_flags(parser.add_argument_group(
        "the model, as far as a file of another implementation does not tell it"), JetConfig,
        "model.")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", help="the Jet: a run folder, a checkpoint, "
                        "an official .npz or a jet-pytorch .pt")
    parser.add_argument("--draws", type=int, default=1, metavar="N",
                        help="draws of noise for each image (default: 1)")
    add_evaluation_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        images = images_of_flags(flags)
        begun = time.perf_counter()
        numbers, jet = evaluate_weights(flags.weights, images, flags, draws=flags.draws,
                                        per_image=True)
        print_result(flags, images, numbers)
        if jet.config.context_dim:
            print_without_labels(flags, images, numbers["bits_per_dim_per_image"])
        seconds = time.perf_counter() - begun
        print(f"{flags.weights} in {flags.precision} on {what_ran(jet)}, {seconds:.0f} s")


def images_of_flags(flags: Namespace) -> ImageSet:
    """The ImageSet that flags ask for. Raises DataError, also for numbers that cannot be."""
    for name, most in LIMITS.items():
        value = getattr(flags, name, None)
        if value is not None and not 1 <= value <= most:
            rule = "1 or more" if value < 1 else f"at most {most}"
            raise DataError(f"--{name.replace('_', '-')} {value}: must be {rule}")
    return load_images(flags.data, flags.split, flags.data_root)


def evaluate_weights(weights: str | Path, images: ImageSet, flags: Namespace,
                     **settings) -> tuple[dict[str, Any], Jet]:
    """What evaluate() returns for a run folder or weight file as flags ask, and the Jet."""
    torch.set_num_threads(flags.threads)
    jet = load_jet(weights, **model_fields(vars(flags))).to(pick_device(flags.device))
    check_images(jet, images, flags.num_images)
    images, precision = images.first(flags.num_images), flags.precision
    if precision == "float64":
        jet, precision = jet.double(), "float32"  # float32: no autocast
    total = settings.get("draws", 1) * len(images.array)
    try:
        with progress(total=total, desc=f"evaluate {Path(weights).name}", leave=False) as bar:
            measured = images if jet.config.context_dim else images.array
            numbers = evaluate(jet, measured, batch_size=flags.batch_size, precision=precision,
                               each_batch=lambda done: bar.update(done - bar.n), **settings)
    except torch.OutOfMemoryError:
        raise DataError("out of memory: give a smaller --batch-size") from None
    return numbers, jet


def check_images(jet: Jet, images: ImageSet, num_images: int | None = None) -> None:
    """Raise DataError for an image set that a Jet does not take, or that has fewer images."""
    height, width, channels = images.array.shape[1:]
    if (channels, height, width) != jet.config.image_shape:
        shape = " x ".join(map(str, jet.config.image_shape))
        raise DataError(f"{images.name} has images of {height} x {width} x {channels}, and this "
                        f"Jet takes {shape} (channels first): give other --data")
    if num_images and num_images > len(images.array):
        raise DataError(f"--num-images {num_images}: {images.name} {images.split} has "
                        f"{len(images.array):,}")


def print_result(flags: Namespace, images: ImageSet, numbers: dict[str, Any]) -> None:
    """The line with the number and what it is of."""
    count, total = numbers["num_images"], len(images.array)
    which = f"{count:,}" if count == total else f"a part, the first {count:,} of {total:,}"
    draws = "1 draw" if flags.draws == 1 else f"{flags.draws} draws"
    print(f"{numbers['bits_per_dim']:.4f} +- {numbers['bits_per_dim_se']:.4f} bits/dim on {which} "
          f"{images.split} images of {images.name}, variant {images.variant}, fingerprint "
          f"{images.fingerprint[:12]}, {draws} each")


def print_without_labels(flags: Namespace, images: ImageSet, bits: np.ndarray) -> None:
    """The line of a class-conditional Jet that is told no labels. bits: (N,) where it is."""
    untold = dataclasses.replace(images, labels=np.full(len(images.array), NO_LABEL))
    numbers, _ = evaluate_weights(flags.weights, untold, flags, draws=flags.draws, per_image=True)
    gain = bits - numbers["bits_per_dim_per_image"]
    error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    print(f"with labels; without them {numbers['bits_per_dim']:.4f} +- "
          f"{numbers['bits_per_dim_se']:.4f}, and labels change {gain.mean():+.5f} +- {error:.5f} "
          "bits/dim, image by image")


def what_ran(jet: Jet) -> str:
    """"AMD EPYC, 1 thread, C kernels, torch 2.13.0, commit 0123456789ab (clean)"."""
    device, version = next(jet.parameters()).device, code_version()
    parts = [hardware(device)]
    if device.type == "cpu":
        parts.append(of_threads(torch.get_num_threads()))
        parts.append(f"{kernels.used_by(jet)} kernels")
    tree = {False: "clean", True: "with changes", None: "unknown"}[version["git_dirty"]]
    return ", ".join([*parts, f"torch {torch.__version__}",
                      f"commit {version['git_commit'][:12]} ({tree})"])


if __name__ == "__main__":
    main()
