"""What experiments/throughput.py measures: the sizes, and functions without arguments that do one step."""
import importlib
import importlib.metadata
import itertools
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import jet
import train
from data import ImageSet, load_images, quantize
from paper_figures import throughput as figure
from train import TrainConfig, TrainingError

SIZES = {"S": dict(image_size=32, num_couplings=8, block_depth=1, emb_dim=64, num_heads=4),
         "M": dict(image_size=32, num_couplings=16, block_depth=2, emb_dim=128, num_heads=4),
         "medium": dict(image_size=32, num_couplings=32, block_depth=1, emb_dim=256, num_heads=4),  # ablate_coupling's
         "32x2": {}, "64x5": dict(num_couplings=64, block_depth=5)}  # the paper's: 64 px, width 512, 8 heads
BATCH_SIZES = {"S": 64, "M": 64, "medium": 256, "32x2": 4, "64x5": 4}
MODES = {"eager": (False, False), "compile": (True, False), "graph": (False, True), "both": (True, True)}
PORT = figure.PORT
OURS = types.SimpleNamespace(jet=jet, train=train)


def size_config(size, batch_size, precision):
    """TrainConfig of a named size: the official recipe at its full learning rate from the first step."""
    return TrainConfig(model=jet.JetConfig(**SIZES[size]), batch_size=batch_size, warmup_fraction=0.0,
                       precision=precision)


def our_images(model):
    """Images for a JetConfig: the CIFAR-10 subset where it fits, else 1,024 uniform random ones."""
    if model.image_shape == (3, 32, 32):
        return load_images("cifar10-subset", "train")
    return random_images(model, 1024)


def random_images(model, count):
    """So many uniform random images for a JetConfig."""
    channels, height, width = model.image_shape
    array = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
    return ImageSet(array=array, labels=None, name="random", variant="uniform", split="train")


def our_step(code, size, config, what, batch, flags, mode="eager"):
    """A step of a checkout's own code (its modules jet and train) on the images of batch(), from a fresh Jet."""
    compiled, graph = MODES[mode]
    torch.manual_seed(0)
    model = code.jet.Jet(code.jet.JetConfig(**SIZES[size])).to(flags.device)
    model.checkpoint_activations = flags.checkpoint_activations
    if compiled:
        train.compile_couplings(model)
    if what == "train":
        update = _graphed(model, config) if graph else _eager(code, model, config)
        numbers = itertools.count(1)
        # as in train.train: else the first coupling, with no gradient to pass on, is another compiled graph
        return lambda: update(batch().detach().requires_grad_(compiled), next(numbers))

    @torch.no_grad()
    def step():
        with _autocast(config, flags):
            if what == "sampling":
                return model.sample(config.batch_size)
            return code.jet.bits_per_dim(*model(batch()))
    return step


def _eager(code, model, config):
    optimizer = code.train.make_optimizer(model.parameters(), config)
    return lambda x, number: code.train.training_step(model, optimizer, x, number, config)


def _graphed(model, config):
    optimizer = train.make_optimizer(model.parameters(), config, graph=True)
    return train.make_step(model, optimizer, config, graph=True)


def port_step(config, what, x, flags):
    """The same work by jet-pytorch, eager, on the images x, from a fresh model."""
    (_, height, width), model, tokens = config.model.image_shape, config.model, config.model.num_tokens
    torch.manual_seed(0)
    port = importlib.import_module("jet_pytorch.jet").Jet(
        patch_size=model.patch_size, patch_dim=model.token_dim, n_patches=tokens, img_dims=(height, width),
        coupling_layers=model.num_couplings, block_depth=model.block_depth, block_width=model.emb_dim,
        num_heads=model.num_heads).to(flags.device)
    x = x.permute(0, 2, 3, 1).contiguous()  # it takes (B, H, W, C)

    def likelihood():
        with _autocast(config, flags):
            z, logdet = port(x)
            return jet.bits_per_dim(z, logdet[:, 0])

    def sampling():
        with _autocast(config, flags):
            z = torch.randn(config.batch_size, tokens, model.token_dim, device=flags.device)
            return quantize(port.inverse(z)[0])

    if what != "train":
        return torch.no_grad()({"likelihood": likelihood, "sampling": sampling}[what])
    optimizer = train.make_optimizer(port.parameters(), config)

    def step():
        optimizer.zero_grad()
        likelihood().mean().backward()
        torch.nn.utils.clip_grad_norm_(port.parameters(), config.clip_norm)
        optimizer.step()
    return step


def _autocast(config, flags):
    return torch.autocast(flags.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def other_checkout(folder):
    """The modules jet and train of another checkout, in this process beside ours: one pool of threads."""
    path = Path(folder).resolve()
    if not ((path / "jet.py").exists() and (path / "train.py").exists()):
        raise TrainingError(f"--against {folder}: must be {PORT} or the folder of another checkout, with jet.py and "
                            "train.py (git worktree add ../before COMMIT)")

    def take_out(where):  # the modules of a folder: both checkouts use the same names
        return {name: sys.modules.pop(name) for name, module in list(sys.modules.items())
                if Path(getattr(module, "__file__", None) or "").parent == where and name != "__main__"}

    ours = take_out(ROOT)
    sys.path.insert(0, str(path))
    try:
        return types.SimpleNamespace(jet=importlib.import_module("jet"), train=importlib.import_module("train"))
    finally:
        sys.path.remove(str(path))
        take_out(path)
        sys.modules.update(ours)


def find_rival(against):
    """(implementation, how the CSV names it, its checkout or None) of --against; None without it."""
    if against is None:
        return None
    if against != PORT:
        code = other_checkout(against)
        commit, tree = code.train.git_commit()
        return "before", f"{commit[:10] or Path(against).resolve().name}{'-dirty' * (tree == 'dirty')}", code
    try:
        importlib.import_module("jet_pytorch.jet")
    except ImportError as error:
        raise TrainingError(f"--against {PORT}: {error}: pip install --no-deps jet-pytorch==0.0.2 einops") from None
    return PORT, f"{PORT} {importlib.metadata.version(PORT)}", None


def seconds_of(step, device, repeats=1):
    """Seconds of calls in a row, to the end of their work on the device."""
    _finish(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _finish(device)
    return time.perf_counter() - begin


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
