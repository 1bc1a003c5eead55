"""What experiments/throughput.py measures: sizes, functions that do a step each, and checks that
have no row in its CSV: a trace, what rounding costs, the time of a whole evaluation.
"""
import importlib
import importlib.metadata
import itertools
import json
import math
import operator
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jet
import kernels
import recipe
from convert import load_jet
from data import ImageSet, load_images, quantize, training_batches
from evaluate import evaluate
from harness.errors import TrainingError
from harness.flops import forward_flops
from harness.host import ROOT, code_version
from harness.machine import compile_couplings, hardware, networks_in
from paper_figures.throughput import PORT
from recipe import TrainConfig

SIZES = {"S": dict(image_size=32, num_couplings=8, block_depth=1, emb_dim=64, num_heads=4),
         "M": dict(image_size=32, num_couplings=16, block_depth=2, emb_dim=128, num_heads=4),
         "256-tokens": dict(image_size=32, patch_size=2, num_couplings=8, block_depth=1,
                            emb_dim=128, num_heads=4),
         # the ablations' at medium scale
         "medium": dict(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4),
         # the paper's: 64 px, width 512, 8 heads
         "32x2": {}, "64x5": dict(num_couplings=64, block_depth=5)}
BATCH_SIZES = {"S": 64, "M": 64, "256-tokens": 16, "medium": 256, "32x2": 4, "64x5": 4}
MODES = {"eager": (False, False), "compile": (True, False), "graph": (False, True),
         "both": (True, True)}  # whether compiled, whether a graph


def mode_of(compiled, graph):
    """The mode of two switches, or of what a CSV says of them."""
    switches = [str(compiled), str(graph)]
    return next(name for name, mode in MODES.items() if list(map(str, mode)) == switches)


class Checkout(NamedTuple):
    """What is measured of one version of this code."""
    jet: ModuleType
    recipe: ModuleType  # has make_optimizer and training_step
    accelerate: Callable  # of a Jet: a faster one
    version: dict  # git_commit and git_dirty


OURS = Checkout(jet=jet, recipe=recipe, accelerate=kernels.accelerate, version=code_version())


def size_config(size, batch_size, precision):
    """TrainConfig of a named size: the official recipe at its full learning rate from the start."""
    return TrainConfig(model=jet.JetConfig(**SIZES[size]), batch_size=batch_size,
                       warmup_fraction=0.0, precision=precision)


def our_images(model, count=None):
    """Images for a JetConfig: the CIFAR-10 subset where it fits, else (or so many) random ones."""
    channels, height, width = model.image_shape
    if not count and model.image_shape == (3, 32, 32):
        return load_images("cifar10-subset", "train")
    array = np.random.default_rng(0).integers(0, 256, (count or 1024, height, width, channels),
                                              np.uint8)
    return ImageSet(array=array, labels=None, name="random", variant="uniform", split="train")


def our_step(code, size, config, what, batch, flags, mode="eager"):
    """A step of a Checkout's own code on the images of batch(), from a fresh Jet."""
    compiled, graph = MODES[mode]
    torch.manual_seed(0)
    model = code.accelerate(code.jet.Jet(code.jet.JetConfig(**SIZES[size])).to(flags.device))
    model.checkpoint_activations = flags.checkpoint_activations
    if compiled:
        compile_couplings(model)
    if what == "train":
        update = _graphed(model, config) if graph else _eager(code, model, config)
        numbers = itertools.count(1)
        # as in train.train: else the first coupling, with no gradient, is another compiled graph
        return lambda: update(batch().detach().requires_grad_(compiled), next(numbers))

    @torch.no_grad()
    def step():
        with networks_in(config.precision, flags.device):
            if what == "sampling":
                return model.sample(config.batch_size)
            return code.jet.bits_per_dim(*model(batch()))
    return step


def _eager(code, model, config):
    optimizer = code.recipe.make_optimizer(model.parameters(), config)
    return lambda x, number: code.recipe.training_step(model, optimizer, x, number, config)


def _graphed(model, config):
    optimizer = recipe.make_optimizer(model.parameters(), config, graph=True)
    return recipe.make_step(model, optimizer, config, graph=True)


def port_step(config, what, x, flags):
    """The same work by jet-pytorch, eager, on the images x, from a fresh model."""
    model, tokens = config.model, config.model.num_tokens
    torch.manual_seed(0)
    port = importlib.import_module("jet_pytorch.jet").Jet(
        patch_size=model.patch_size, patch_dim=model.token_dim, n_patches=tokens,
        img_dims=model.image_shape[1:], coupling_layers=model.num_couplings,
        block_depth=model.block_depth, block_width=model.emb_dim,
        num_heads=model.num_heads).to(flags.device)
    x = x.permute(0, 2, 3, 1).contiguous()  # it takes (B, H, W, C)
    optimizer = recipe.make_optimizer(port.parameters(), config)

    def step():
        with networks_in(config.precision, flags.device):
            if what == "sampling":
                shape = (config.batch_size, tokens, model.token_dim)
                return quantize(port.inverse(torch.randn(shape, device=flags.device))[0])
            z, logdet = port(x)
            bits = jet.bits_per_dim(z, logdet[:, 0])
        if what == "train":
            bits.mean().backward()
            torch.nn.utils.clip_grad_norm_(port.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return bits
    return step if what == "train" else torch.no_grad()(step)


def find_rival(against):
    """(implementation, how the CSV names it, its Checkout or None) of --against; None without."""
    if against is None:
        return None
    if against != PORT:
        code = other_checkout(against)
        name = code.version["git_commit"][:10] or Path(against).resolve().name
        return "before", f"{name}-dirty" if code.version["git_dirty"] else name, code
    try:
        importlib.import_module("jet_pytorch.jet")
    except ImportError as error:
        raise TrainingError(f"--against {PORT}: {error}: pip install --no-deps jet-pytorch==0.0.2 "
                            "einops") from None
    return PORT, f"{PORT} {importlib.metadata.version(PORT)}", None


def other_checkout(folder):
    """The Checkout in a folder, in this process beside ours: one pool of threads."""
    path = Path(folder).resolve()
    if not ((path / "jet.py").exists() and (path / "train.py").exists()):
        raise TrainingError(f"--against {folder}: must be {PORT} or the folder of another "
                            "checkout, with jet.py and train.py (git worktree add ../before "
                            "COMMIT)")
    ours = _take_out(ROOT)
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        its_jet, its_train = map(importlib.import_module, ("jet", "train"))
        if (path / "recipe.py").exists():
            its_recipe, its_kernels = map(importlib.import_module, ("recipe", "kernels"))
            return Checkout(its_jet, its_recipe, its_kernels.accelerate, code_version(path))
        # Before there was that, train.py had the step, and jet.py used the kernels by itself.
        commit, tree = its_train.git_commit()
        version = {"git_commit": commit, "git_dirty": {"clean": False, "dirty": True}.get(tree)}
        return Checkout(its_jet, its_train, lambda model: model, version)
    finally:
        sys.path.remove(str(path))
        _take_out(path)
        sys.modules.update(ours)


def _take_out(where):
    """The modules with names of a checkout's, taken out of sys.modules."""
    names = {path.stem for path in where.iterdir() if path.is_dir() or path.suffix == ".py"}
    return {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.partition(".")[0] in names}


def seconds_of(step, device, repeats=1):
    """Seconds of calls in a row, to the end of their work on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return time.perf_counter() - begin


def table_of(rows, looks):
    """Measured rows as text. looks: {column: (its heading, how its numbers are written)}."""
    modes = [mode_of(row.compile, row.graph) if row.implementation == "ours" else ""
             for row in rows.itertuples()]
    table = rows[["size", "what", "implementation"]].assign(mode=modes)
    table.columns = ["size", "what", "of", "mode"]
    for column, (heading, look) in looks.items():
        cells = ["" if pd.isna(value) else look.format(value) for value in rows[column]]
        table.insert(len(table.columns), heading, cells, allow_duplicates=True)
    return table.to_string(index=False)


def busy_share(intervals, seconds):
    """The share of so many seconds that some of the intervals, in microseconds, cover."""
    begins, ends = np.array(sorted(intervals)).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.append(-math.inf, ends))[:-1]
    return np.maximum(0, ends - np.maximum(begins, reached)).sum() / 1e6 / seconds


def profile_size(size, what, batch_size, flags):
    """Write a Chrome trace of a few steps, each with its batch, and print the ten largest costs."""
    config = size_config(size, batch_size, flags.precision)
    images = our_images(config.model)
    batches = training_batches(images, batch_size, 0, range(10 ** 6), flags.device)
    step = our_step(OURS, size, config, what, lambda: next(batches), flags, flags.mode)
    seconds_of(step, flags.device, 3)
    with torch.profiler.profile() as profiler:
        seconds = seconds_of(step, flags.device, flags.steps)
    path = flags.runs_dir / "throughput_profile" / f"{size}-{what}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    print_costs(f"{size} {what}, {batch_size} images", profiler, flags)
    numbers = {"size": size, "work": what, "mode": flags.mode, "precision": flags.precision,
               "batch_size": batch_size, "steps": flags.steps,
               "step_seconds": seconds / flags.steps, "trace": path.name}
    if flags.device.type == "cuda":
        numbers["busy_share"] = print_gpu_costs(profiler.events(), seconds, flags.steps)
    note(flags, "profile", numbers)
    print(path)


def print_costs(what, profiler, flags):
    """Print the ten operators or kernels that take most of the device's time."""
    on_gpu = flags.device.type == "cuda"
    time_of = operator.attrgetter(f"self_{'device' if on_gpu else 'cpu'}_time_total")
    events, gpu_events = split(profiler.key_averages())
    events = gpu_events if on_gpu else events
    total = sum(map(time_of, events))
    print(f"{what}: {total / 1e6 / flags.steps:.4f} s a step on {hardware(flags.device)}, of which")
    rows = [{"ms a step": f"{time_of(event) / 1e3 / flags.steps:.3f}",
             "share": f"{time_of(event) / total:.1%}",
             "calls a step": f"{event.count / flags.steps:g}", "name": event.key[:70]}
            for event in sorted(events, key=time_of, reverse=True)[:10]]
    print(pd.DataFrame(rows).to_string(index=False))


def print_gpu_costs(events, seconds, steps):
    """Print who waits for the GPU, and the share of the time in which it works; returns it."""
    on_cpu, on_gpu = split(events)
    names = [event.name for event in on_cpu]
    counts = ", ".join(f"{name} {names.count(name)}" for name in
                       ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize",
                        "cudaDeviceSynchronize"))
    copies = sum(event.time_range.elapsed_us() for event in on_gpu if "HtoD" in event.name)
    print(f"waits for the GPU: {counts} (two of the last are this measurement's and one the "
          f"profiler's); images to the GPU: {copies / 1e3 / steps:.3f} ms a step")
    share = busy_share([(event.time_range.start, event.time_range.end) for event in on_gpu],
                       seconds)
    print(f"the GPU is busy for {share:.1%} of {seconds / steps:.4f} s a step")
    return share


def split(events):
    """Those on the CPU and those on the GPU, without annotations."""
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    cuda = torch.autograd.DeviceType.CUDA
    return ([event for event in events if event.device_type != cuda],
            [event for event in events if event.device_type == cuda])


def check_precision(size, flags):
    """Print how far bits/dim with the networks in bfloat16 are from those all in float32."""
    if flags.checkpoint:
        model, which = load_jet(flags.checkpoint), str(flags.checkpoint)
    else:
        torch.manual_seed(0)
        model = jet.Jet(jet.JetConfig(**SIZES[size]))
        which = f"a fresh {size} with normal noise on its last layers"
        # else it is the identity; raw scales get a deviation of about 1/2
        for coupling in model.couplings:
            torch.nn.init.normal_(coupling.net.final_proj.weight,
                                  std=0.5 / math.sqrt(model.config.emb_dim))
    model, images = model.to(flags.device), our_images(model.config)
    exact, rounded = (
        evaluate(model, images.array[:flags.check_precision], per_image=True,
                 precision=precision)["bits_per_dim_per_image"]
        for precision in ("float32", "bfloat16"))
    mean, largest = (rounded - exact).mean(), abs(rounded - exact).max()
    print(f"{which}: {exact.mean():.5f} bits/dim in float32; with the network in bfloat16 "
          f"{mean:+.6f} in the mean, {largest:.6f} at most; {len(exact):,} "
          f"images ({images.name}), {hardware(flags.device)}")
    note(flags, "check-precision", {
        "weights": which, "num_images": len(exact), "bits_per_dim": exact.mean(),
        "mean_difference": mean, "largest_difference": largest})


def time_evaluation(size, flags):
    """Print how long evaluate() takes for random images, from images in memory to the number."""
    torch.manual_seed(0)
    model = jet.Jet(jet.JetConfig(**SIZES[size])).to(flags.device)
    images = our_images(model.config, flags.evaluate)
    if flags.compile:
        compile_couplings(model)
    begin = time.perf_counter()
    evaluate(model, images, precision=flags.precision)
    seconds = time.perf_counter() - begin
    rate = forward_flops(model.config) * flags.evaluate / seconds
    print(f"{size}: bits/dim of {flags.evaluate:,} random images in {seconds:.2f} s "
          f"({flags.precision} networks, {flags.evaluate / seconds:,.0f} images/s, "
          f"{rate:.3g} FLOP/s), {hardware(flags.device)}")
    note(flags, "evaluate", {
        "size": size, "precision": flags.precision, "compile": flags.compile,
        "num_images": flags.evaluate, "seconds": seconds, "flops_per_s": rate})


def note(flags, what, numbers):
    """Add what was measured to the file of --numbers, as a line of JSON."""
    if flags.numbers:
        with open(flags.numbers, "a") as file:
            file.write(json.dumps({"what": what, **numbers}) + "\n")
