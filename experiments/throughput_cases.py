"""What experiments/throughput.py measures: the sizes, and functions that do one step each."""
import importlib
import importlib.metadata
import itertools
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
from data import ImageSet, load_images, quantize
from harness.errors import TrainingError
from harness.machine import ROOT, code_version, compile_couplings, networks_in
from paper_figures.throughput import PORT
from recipe import TrainConfig

SIZES = {"S": dict(image_size=32, num_couplings=8, block_depth=1, emb_dim=64, num_heads=4),
         "M": dict(image_size=32, num_couplings=16, block_depth=2, emb_dim=128, num_heads=4),
         # the ablations' at medium scale
         "medium": dict(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4),
         # the paper's: 64 px, width 512, 8 heads
         "32x2": {}, "64x5": dict(num_couplings=64, block_depth=5)}
BATCH_SIZES = {"S": 64, "M": 64, "medium": 256, "32x2": 4, "64x5": 4}
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


def our_images(model):
    """Images for a JetConfig: the CIFAR-10 subset where it fits, else 1,024 uniform random ones."""
    if model.image_shape == (3, 32, 32):
        return load_images("cifar10-subset", "train")
    return random_images(model, 1024)


def random_images(model, count):
    """So many uniform random images for a JetConfig."""
    channels, height, width = model.image_shape
    shape = (count, height, width, channels)
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
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


# ---- what we are compared with

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
            its_recipe, its_kernels, machine = map(importlib.import_module,
                                                   ("recipe", "kernels", "harness.machine"))
            return Checkout(its_jet, its_recipe, its_kernels.accelerate, machine.code_version())
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
    names = {path.stem for path in where.iterdir()}
    return {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.partition(".")[0] in names}


# ---- time and tables

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
