"""The memory of training: what a step needs, how to make it fit, and what it took."""
import contextlib
import ctypes
import dataclasses
import gc
import math
from pathlib import Path

import torch

from harness.condition import zero_context
from harness.errors import TrainingError
from harness.flops import num_parameters
from harness.machine import free_bytes, networks_in
from jet import Jet, bits_per_dim

PARAMETER_BYTES = {"bfloat16": 4, "float32": 4, "float64": 8}
BLOCK_BYTES = 20_000  # of Python's objects
NETWORK_BYTES = PARAMETER_BYTES | {"bfloat16": 2}  # of a number within the couplings' networks


# ---- what a step needs

def activation_bytes(jet, precision):
    """Bytes per image that forward keeps for backward on the Jet's device.

    Counted on the couplings of one cycle of its kinds.
    """
    few = _first_couplings(jet, min(len(jet.couplings), len(jet.config.kinds)))
    one, two = (kept_bytes(few, precision, num_images) for num_images in (1, 2))
    return (two - one) * len(jet.couplings) / len(few.couplings)  # less what all images share


def _first_couplings(jet, count):
    """A Jet of the first couplings of another, without copies."""
    if count == len(jet.couplings):
        return jet
    with torch.device("meta"):  # its layers are replaced by the Jet's own first ones
        few = Jet(dataclasses.replace(jet.config, num_couplings=count))
    for name in ("couplings", "actnorms", "denses"):
        setattr(few, name, getattr(jet, name)[:count])
    few.checkpoint_activations = jet.checkpoint_activations
    return few


def kept_bytes(jet, precision, num_images):
    """Bytes that forward of so many images keeps for backward, each storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor.detach()
    weight = next(jet.parameters())
    x = weight.new_zeros(num_images, *jet.config.image_shape)
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          networks_in(precision, weight.device)):
        z, logdet = jet(x, *zero_context(jet.config, x))
        graph = bits_per_dim(z, logdet)  # noqa: F841 (holds the storages: no address twice)
    return sum(storages.values())


def fixed_bytes(num_params, precision, numbers=4):
    """Bytes of a step that no image adds to, with so many numbers for each parameter.

    Four: weight, gradient and Adam's two moments. Autocast's copies in bfloat16 come on top.
    """
    copies = NETWORK_BYTES["bfloat16"] if precision == "bfloat16" else 0
    return num_params * (numbers * PARAMETER_BYTES[precision] + copies)


def image_bytes(model, precision, recompute, coupling):
    """Bytes that an image adds to the peak of a step of a JetConfig.

    coupling: what forward keeps of one coupling. Recomputing keeps each layer's input, and makes
    all of one coupling at a time again. Backward works on two MLP-wide gradients.
    """
    work = 2 * model.num_tokens * 4 * model.emb_dim * NETWORK_BYTES[precision]
    if not recompute:
        return model.num_couplings * coupling + work
    layers = model.num_couplings * (1 + [model.actnorm, model.invertible_dense].count(True))
    inputs = layers * model.num_tokens * model.token_dim * PARAMETER_BYTES[precision]
    return inputs + coupling + work


# ---- to make it fit

def refuse_too_large(model):
    """Raise TrainingError for a JetConfig whose weights alone exceed this machine's free memory."""
    free, blocks = free_bytes(torch.device("cpu")), model.num_couplings * (1 + model.block_depth)
    needed = BLOCK_BYTES * blocks
    if needed <= free:  # or counting its parameters would take as long
        try:
            needed += 4 * num_parameters(model)
        except RuntimeError:  # more than can be counted
            needed = math.inf
    if needed > free:
        raise TrainingError(f"num_couplings={model.num_couplings}, block_depth={model.block_depth}"
                            f", emb_dim={model.emb_dim}: its weights need {needed / 2 ** 30:,.0f} "
                            f"GiB, and {free / 2 ** 30:,.0f} are free: make the model smaller")


def fit_memory(jet, optimizer, config, checkpoint_activations, micro_batch, free, processes=1):
    """Set jet.checkpoint_activations and return (micro batch, a line for the log): a step fits.

    "auto" and None are chosen: whole batches with all activations, else recomputed ones, which are
    the same bits, else the batch cut in 2, 4, ... Three quarters of the free bytes are planned
    with; images may take an eighth.
    """
    jet.checkpoint_activations = False
    coupling = activation_bytes(jet, config.precision) / len(jet.couplings)
    numbers = 1 if optimizer.state else 3  # gradients, and moments where they are not there yet
    num_params = sum(parameter.numel() for parameter in jet.parameters())
    fixed = fixed_bytes(num_params, config.precision, numbers)
    per_image = {recompute: image_bytes(jet.config, config.precision, recompute, coupling)
                 for recompute in (False, True)}

    def needed(recompute, size):
        return fixed + size * per_image[recompute]
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}[checkpoint_activations]
    batch_size = -(-config.batch_size // processes)
    halvings = range((batch_size - 1).bit_length() + 1)
    sizes = [-(-batch_size >> n) for n in halvings]
    if micro_batch:
        sizes = [min(micro_batch, batch_size)]
    choices = [(recompute, size) for size in sizes for recompute in switches]
    recompute, size = next((choice for choice in choices if needed(*choice) <= 0.75 * free),
                           choices[-1])
    jet.checkpoint_activations = recompute
    if recompute and next(jet.parameters()).device.type == "cpu":
        # Every large array a mapping of its own (M_MMAP_THRESHOLD): else the small ones that are
        # kept lie in the holes of freed large ones, and glibc's heap grows with the number of
        # couplings all the same.
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).mallopt(-3, 2 ** 18)
    activations = "recomputed" if recompute else "kept"
    return size, (f"memory: a step needs {needed(recompute, size) / 2 ** 30:.2f} of "
                  f"{free / 2 ** 30:.2f} GiB free: activations {activations}, {size} of "
                  f"{batch_size} images at once")


# ---- what it took

def watch_memory(device):
    """A function that returns the peak of the memory above what is in use now, in GiB.

    None where nobody knows.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
        before = status("VmRSS")
    except (OSError, AttributeError):
        return lambda: None
    return lambda: (status("VmHWM") - before) / 2 ** 20
