"""Train one Jet by exact likelihood, and measure its bits per dimension.

    python train.py --data cifar10-subset --run-dir runs/first --model.num_couplings 8 --model.block_depth 1 \\
        --model.emb_dim 32 --model.num_heads 2 --batch_size 16 --total_steps 100 --lr 4e-3

The same command goes on where a stopped run was, and ends with the same bits. Defaults are the official
recipe (google-research/big_vision, configs/proj/jet/imagenet64.py), which reports 3.72 bits/dim.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import kernels
from graphs import Graphed
from convert import (CHECKPOINT_FORMAT, CHECKPOINT_NAME, CheckpointError, load_jet, load_weights, read_tensors,
                     weights_checksum)
from data import (DataError, dequantize, evaluation_noise, free_bytes, image_shape, load_images, pinned, prefetch,
                  training_batch, training_batches)
from jet import Jet, JetConfig, bits_per_dim, check_settings, forward_flops, setting
from run_folder import (CONFIG_NAME, DONE_NAME, ERROR_NAME, PREVIOUS_NAME, BusyError, Claim, RunLog, TrainingError, one_line,
                        read_checkpoint, read_done, record_error, save_checkpoint, write_atomically)

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of the weights
COMMIT_FILE = ROOT / ".commit.json"  # in a copy of the code, which is no git checkout
SWITCH = ("auto", "on", "off")
DAY_S = 86_400
SLOWEST_FLOPS = 5e9  # FLOP/s that every CPU has: a recipe that takes less than a day at this needs no estimate
CPU_SHARE = 0.5  # of the matrix-product rate in training (results/throughput_cpu.csv: 46 and 62 %)
TRAIN_ROW_IMAGES = 2048  # the first training images, evaluated beside the test images to show overfitting


class NonFiniteError(TrainingError, ValueError):
    """A loss, a gradient or a measured number that is not finite: the run's own fault."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that changes a run's result; where it runs is not in it. Defaults: the official recipe.

    Raises ValueError that names the field, the value and the rule.
    """
    model: JetConfig = dataclasses.field(default_factory=JetConfig)
    data: str = setting("imagenet64-oord", "image set: a known name, a prepared folder or a .npy file")
    batch_size: int = setting(1024, "images per step")
    total_steps: int = setting(250_224, "optimizer steps; 250,224 are 200 epochs of ImageNet-1k; 0 only evaluates",
                               minimum=0)
    lr: float = setting(3e-4, "peak learning rate")
    warmup_fraction: float = setting(0.1, "share of the steps with a rising learning rate", minimum=0)
    weight_decay: float = setting(1e-5, "decoupled and NOT multiplied by lr (torch's AdamW takes "
                                  "weight_decay / lr)", minimum=0)
    beta1: float = setting(0.9, "Adam's decay of the first moment")
    beta2: float = setting(0.95, "Adam's decay of the second moment")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm")
    precision: str = setting("float32", "bfloat16: the couplings' networks multiply in it in training, as in the official "
                             "run (on TPUs), and all else stays float32: for GPUs; float32: faster on CPUs; "
                             "float64: everything in it (slow, for checks)",
                             ("float32", "bfloat16", "float64"))
    seed: int = setting(0, "of weights, data order and training noise", minimum=0)
    eval_every: int = setting(0, "steps between evaluations; 0: only at the end", minimum=0)
    init: str = ""  # which weights it starts from, as weights_id() names them (--init-from); "": a fresh Jet's

    def __post_init__(self):
        check_settings(self)
        for name in ("beta1", "beta2", "warmup_fraction"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be below 1")
        if self.seed >= 2 ** 63:
            raise ValueError(f"seed={self.seed}: must be below 2**63")
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(f"data={self.data!r}: must be the name or path of an image set")
        if not isinstance(self.model, JetConfig):
            raise ValueError(f"model={self.model!r}: must be a JetConfig")

    def to_dict(self):
        """Plain values, as they come back from JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values):
        """The config that to_dict was called on."""
        return cls(**{**values, "model": JetConfig(**values["model"])})

    @property
    def hash(self):
        """Ten hex digits that name this configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:10]


def schedule(step, total_steps, warmup_fraction=0.1):
    """Relative learning rate of a step (0, 1, ...): linear warm-up from 0, cosine to 0.

    Source: big_vision/utils.py create_learning_rate_schedule.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1, max(0, progress)))) * min(1, step / warmup)


def learning_rate(step, config):
    return config.lr * schedule(step, config.total_steps, config.warmup_fraction)


def make_optimizer(parameters, config, graph=False):
    """Adam with decoupled weight decay on every parameter.

    The official decay is multiplied by the relative schedule but not by lr; torch's AdamW multiplies
    by both, hence the division. training_step sets lr to learning_rate(step, config).
    graph: for a CUDA graph, lr is a float32 tensor on the weights' device.
    """
    parameters = list(parameters)
    lr = torch.tensor(config.lr, device=parameters[0].device) if graph else config.lr
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                                  weight_decay=config.weight_decay / config.lr, fused=True, capturable=graph)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps run as they are, on purpose
    return optimizer


def networks_in(precision, device):
    """Within, the couplings' networks multiply in bfloat16 if that is the precision; all else stays as it is."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def add_gradients(model, x, config, micro_batch=None):
    """Add the gradient of the mean bits/dim of the batch x (B, C, H, W) to the weights'; returns that mean.

    With several processes x is this one's part of the batch and model a DistributedDataParallel.
    micro_batch: images whose activations are in memory at a time (None: all); it changes rounding alone.
    """
    processes, loss, pieces = distributed.size(), x.new_zeros(()), x.split(micro_batch or len(x))
    num_images = len(x) if processes == 1 else config.batch_size
    for number, piece in enumerate(pieces, 1):
        # DistributedDataParallel takes the mean over processes, in backward of the last piece
        with model.no_sync() if processes > 1 and number < len(pieces) else contextlib.nullcontext():
            with networks_in(config.precision, x.device):
                share = bits_per_dim(*model(piece)).sum() / num_images
            (share * processes if processes > 1 else share).backward()
        loss += share.detach()
    return distributed.add_up(loss)


def training_step(model, optimizer, x, step, config, micro_batch=None):
    """One update on the batch x (B, C, H, W): (mean bits/dim before it, gradient norm before clipping).

    Both are tensors of no dimension on x's device, and nothing here waits for them. From the first step on that
    has one which is not finite, the optimizer updates nothing: weights and moments stay as they were.
    model, micro_batch: see add_gradients.
    """
    set_learning_rate(optimizer, learning_rate(step, config))
    optimizer.zero_grad()
    return update(model, optimizer, x, config, micro_batch)


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a CUDA graph reads it from there
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def update(model, optimizer, x, config, micro_batch=None):
    """training_step at the optimizer's learning rate, from no gradients: all of it happens on x's device."""
    loss = add_gradients(model, x, config, micro_batch)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    failed = (~(loss.isfinite() & grad_norm.isfinite())).float()
    # Where found_inf is 1, fused optimizers skip the step (it is there for GradScaler). Once 1, it stays so.
    if not hasattr(optimizer, "found_inf"):
        optimizer.found_inf = failed
    torch.maximum(failed, optimizer.found_inf, out=optimizer.found_inf)
    optimizer.step()
    return loss, grad_norm


def make_step(model, optimizer, config, micro_batch=None, graph=False):
    """step(x, number) -> (loss, gradient norm): training_step, or the same as one CUDA graph (graphs.py).

    A graph needs make_optimizer(..., graph=True), one process, a GPU, and batches of one shape.
    """
    if not graph:
        return lambda x, number: training_step(model, optimizer, x, number, config, micro_batch)
    graphed = Graphed(lambda x: update(model, optimizer, x, config, micro_batch), optimizer.zero_grad)

    def step(x, number):
        set_learning_rate(optimizer, learning_rate(number, config))
        return graphed(x)
    return step


def read_steps(pending, config):
    """The numbers of pending [(step, loss, gradient norm)], which is emptied.

    All are read in one go: this waits for the device. Raises NonFiniteError for the first that is not finite.
    """
    values = torch.stack([value for _, *pair in pending for value in pair]).tolist()
    steps = [(step, *pair) for (step, *_), *pair in zip(pending, values[::2], values[1::2])]
    for step, loss, grad_norm in steps:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(f"not finite at step {step}: loss {loss} bits/dim, gradient norm {grad_norm}, "
                                 f"lr {learning_rate(step, config):.3g}; nothing was updated: try a lower --lr or "
                                 "another --seed")
    pending.clear()
    return steps


def weights_config(path):
    """(TrainConfig, step) of the run whose weights a folder or file holds; (None, None) if it is foreign."""
    path = Path(path) / CHECKPOINT_NAME if Path(path).is_dir() else Path(path)
    content = {} if path.suffix == ".npz" else read_tensors(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        return None, None
    try:
        return TrainConfig.from_dict(content["config"]), int(content["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration is damaged or of another version ({error})") from None


def weights_id(path):
    """The name of the weights in a run folder or weight file, as TrainConfig.init holds it.

    The hash of the configuration that they were trained with (and the step, of a run that has not ended); of a
    foreign file its SHA-256. Raises CheckpointError.
    """
    config, step = weights_config(path)
    if config:
        return config.hash + (f"-step{step}" if step < config.total_steps else "")
    try:
        return f"sha256-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def _full_float32():
    """float32 means float32 on GPUs, too: TF32, PyTorch's default for convolutions, changes numbers."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    saved, deterministic = [backend.allow_tf32 for backend in backends], torch.backends.cudnn.deterministic
    try:
        for backend in backends:
            backend.allow_tf32 = False
        torch.backends.cudnn.deterministic = True  # convolutions whose gradients have the same bits every time
        yield
    finally:
        for backend, allow in zip(backends, saved):
            backend.allow_tf32 = allow
        torch.backends.cudnn.deterministic = deterministic


@contextlib.contextmanager
def _outside_errors():
    """A GPU that is full, or a process that is gone, ends a run in one line."""
    try:
        yield
    except RuntimeError as error:
        # OutOfMemoryError, and what the driver, cuBLAS or a graph's recording make of it
        full = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA.*out of memory|ALLOC_FAILED", str(error))
        if full and not isinstance(error, TrainingError):
            raise TrainingError(f"out of memory ({str(error).splitlines()[0]}): try --checkpoint-activations on, or a "
                                "--micro-batch below the one in log.txt; runs at a time share a GPU's memory") from None
        if distributed.size() > 1 and re.search("by peer|NCCL|Timed out|connect", str(error), re.I):
            raise TrainingError(f"process {distributed.rank()} lost the others ({str(error).splitlines()[0]}): the same "
                                "command goes on from the last checkpoint") from None
        raise


def activation_bytes(jet, precision):
    """Bytes per image that forward keeps for backward on the Jet's device: counted on two couplings like its own."""
    weight = next(jet.parameters())
    device = weight.device
    with torch.random.fork_rng(devices=[]):
        two = Jet(dataclasses.replace(jet.config, num_couplings=2)).to(weight)
    two.checkpoint_activations = jet.checkpoint_activations

    def kept(num_images):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()
        x = weight.new_zeros(num_images, *jet.config.image_shape)
        with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
              networks_in(precision, device)):
            graph = bits_per_dim(*two(x))  # holds the storages: no address is used twice
        return sum(storages.values())
    return (kept(2) - kept(1)) * len(jet.couplings) / 2


def fit_memory(jet, optimizer, config, checkpoint_activations, micro_batch, free, processes=1):
    """Set jet.checkpoint_activations and return (micro batch, a line for the log), so that a step fits.

    "auto" and None are chosen: whole batches with all activations, else recomputed ones, which are the same bits,
    else the batch cut in 2, 4, ... Three quarters of the free bytes are planned with; images may take an eighth.
    """
    kept = {}
    for recompute in (True, False):
        jet.checkpoint_activations = recompute
        kept[recompute] = activation_bytes(jet, config.precision)
    weights = sum(parameter.nbytes for parameter in jet.parameters())
    weights *= (1 if optimizer.state else 3) + 0.5 * (config.precision == "bfloat16")  # gradients, moments, casts

    def needed(recompute, size):  # backward works on one coupling at a time, and may have to recompute it
        return weights + size * (kept[recompute] + (1 + recompute) * kept[False] / len(jet.couplings))
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}[checkpoint_activations]
    batch_size = -(-config.batch_size // processes)
    halvings = range((batch_size - 1).bit_length() + 1)
    sizes = [min(micro_batch, batch_size)] if micro_batch else [-(-batch_size >> n) for n in halvings]
    choices = [(recompute, size) for size in sizes for recompute in switches]
    recompute, size = next((choice for choice in choices if needed(*choice) <= 0.75 * free), choices[-1])
    jet.checkpoint_activations = recompute
    if recompute and next(jet.parameters()).device.type == "cpu":
        # Every large array a mapping of its own (M_MMAP_THRESHOLD): else the small ones that are kept lie in the
        # holes of freed large ones, and glibc's heap grows with the number of couplings all the same.
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).mallopt(-3, 2 ** 18)
    return size, (f"memory: a step needs {needed(recompute, size) / 2 ** 30:.2f} of {free / 2 ** 30:.2f} GiB free: "
                  f"activations {'recomputed' if recompute else 'kept'}, {size} of {batch_size} images at once")


def compile_couplings(jet):
    """torch.compile the couplings in place: equal ones share a graph, and names in the checkpoint stay."""
    # a graph for each kind, batch size and of training or evaluation; beyond the limit an error, never eager
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for coupling in jet.couplings:
        coupling.compile(dynamic=False)


class Requests:
    """What signals ask of a run: to stop after this step with a checkpoint, or to save one and go on."""

    def __init__(self, quiet=False):
        self.stop = self.save = False
        self.quiet = quiet

    @contextlib.contextmanager
    def on(self, stop=(signal.SIGINT, signal.SIGTERM), save=()):
        """Within, these signals are requests; a second interrupt from the keyboard ends the program at once."""
        def handle(number, _):
            if number == signal.SIGINT and self.stop:
                raise KeyboardInterrupt
            if number in stop and not (self.stop or self.quiet):  # not print: it may be what was interrupted
                os.write(2, f"\n{signal.Signals(number).name}: stopping with a checkpoint after this step\n".encode())
            self.stop, self.save = self.stop or number in stop, self.save or number in save
        before = {number: signal.signal(number, handle) for number in (*stop, *save)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Stopped(Exception):
    """A request to stop came during an evaluation, which is done again."""


@_outside_errors()
@_full_float32()
def train(config, run_dir, stop_after=None, *, init_from=None, data_root=None, device="auto", threads=1, compile=False, graph=False,
          micro_batch=None, checkpoint_activations="auto", checkpoint_every_s=None, requests=None, wait_s=0,
          label="", quiet=False, echo=False):
    """Train a Jet and evaluate it; the same call again resumes, a finished run returns at once.

    config: TrainConfig. run_dir: gets the files that run_folder.py lists; the last two checkpoints are kept.
    stop_after: stop with a checkpoint once this many steps are done in all. init_from: run folder or weight file
    that holds config.init's weights; needed to begin such a run, not to resume it. device (auto, cpu, cuda),
    threads and kernels (of the CPU), compile, graph (each step one CUDA graph), micro_batch (images in a process's memory at a time; None: the
    checkpoint's, else what fits) and the number of processes (distributed.py) decide rounding; all else that
    decides the result is in config. checkpoint_activations (auto, on, off) trades time for memory.
    checkpoint_every_s: None is a minute, or 20 times what the last one took, if that is more.
    requests: Requests, looked at after each step. wait_s: how long to wait for another process to end this run.
    quiet: no progress bar. echo: what goes to log.txt is printed, too.
    Returns what done.json holds: config, rows (a dict per evaluation and split), the last test row's
    bits_per_dim, bits_per_dim_se and num_images, seconds, and what ran it. A run that was stopped
    returns {"step": ...}.
    Raises TrainingError (another configuration, a non-finite loss, a full disk; its subclass BusyError: another
    process is at this run), DataError (images) or CheckpointError (no whole checkpoint), each in one line.
    """
    run_dir, requests = Path(run_dir), requests or Requests()
    distributed.start()
    distributed.from_first(_refuse_other_config, run_dir, config)
    if (done := distributed.from_first(read_done, run_dir)) is not None:
        return done
    device = pick_device(device, graph)
    check_place(threads, micro_batch, checkpoint_activations, checkpoint_every_s)
    if (processes := distributed.size()) > config.batch_size:
        raise TrainingError(f"{processes} processes for a batch of {config.batch_size} images: at most one for each")
    torch.set_num_threads(threads)
    images = {split: load_images(config.data, split, data_root) for split in ("train", "test")}
    jet = _first_jet(config, images["train"], init_from, run_dir).to(device, DTYPES[config.precision])
    optimizer = make_optimizer(jet.parameters(), config, graph)
    stop = config.total_steps if stop_after is None else min(stop_after, config.total_steps)

    with (_claimed(run_dir, config, wait_s, echo) as (claim, log),
          progress_bar(config, label, quiet or log is None) as bar):
        if (done := distributed.from_first(read_done, run_dir)) is not None:
            bar.leave = False
            return done  # finished by the process that we have waited for
        state = {"step": 0, "seconds": 0.0, "rows": [], "train_fingerprint": images["train"].fingerprint,
                 "micro_batch": None, "processes": processes}
        state |= distributed.from_first(_restore, run_dir, config, jet, optimizer, state, log)
        first, seconds_before = state["step"], state["seconds"]
        if state["processes"] != processes:
            state |= {"processes": processes, "micro_batch": None}
        free = -distributed.agree(-free_bytes(device) / (distributed.local_size() if device.type == "cpu" else 1))[0]
        state["micro_batch"], line = fit_memory(jet, optimizer, config, checkpoint_activations,
                                                micro_batch or state["micro_batch"], free, processes)
        hosts = distributed.from_all(platform.node())
        if log:
            log.begin(first)
            log.write(f"{'resumed' if first else 'started'} at step {first}: {_where(processes, threads, hosts)}, "
                      f"{hardware(device)}, torch {torch.__version__}, {_cpu_kernels(device) or 'cuda'} kernels, "
                      f"commit {' '.join(git_commit())}")
            log.write(line)
            for line in advice(config, device):
                (log.write if quiet or label else log.tell)(line)
        if not first and config.model.actnorm and not config.init:
            x = training_batch(images["train"], config.batch_size, config.seed, 0, device)
            jet.initialize(x.to(DTYPES[config.precision]))
        if compile:
            compile_couplings(jet)
        model = distributed.wrap(jet)
        distributed.copy_moments(optimizer)
        pieces = {"micro_batch": state["micro_batch"]} if state["micro_batch"] < config.batch_size / processes else {}
        take_step = make_step(model, optimizer, config, graph=graph, **pieces)

        def save():
            claim.check()
            save_checkpoint(run_dir, {"config": config.to_dict(), **state, "model": jet.state_dict(),
                                      "optimizer": optimizer.state_dict()["state"]})
        bar.initial = bar.n = first
        pending, first_step_seconds, save_seconds = [], None, 0.0
        begun = saved = read = time.monotonic()
        batches = training_batches(images["train"], config.batch_size, config.seed, range(first, stop), device,
                                   part=distributed.part(config.batch_size))
        with contextlib.closing(batches), contextlib.suppress(Stopped):
            if not config.total_steps:
                distributed.from_first(save)  # the weights that are evaluated
            if _evaluation_is_due(config, state):  # it was interrupted
                state["rows"] += _evaluate_splits(jet, images, first, requests)
            for step, x in enumerate(batches, first):
                x = x.to(DTYPES[config.precision])
                x.requires_grad_(compile)  # or the first coupling, with no gradient to pass on, is another graph
                if step == first and processes > 1:
                    # DistributedDataParallel sorts gradients into other buckets after its first backward, and adds
                    # them up in another order: without one to throw away, a restart would not give the same bits.
                    add_gradients(model, x, config, **pieces)
                pending.append((step, *take_step(x, step)))
                bar.update()
                taken, now = step + 1, time.monotonic()
                every = max(60, 20 * save_seconds) if checkpoint_every_s is None else checkpoint_every_s
                # by the clocks and signals of all processes: they must part from this loop together
                stop_now, save_now, read_now = distributed.agree(requests.stop, requests.save or now - saved > every,
                                                                 now - read > 1)
                evaluate_now = config.eval_every and taken % config.eval_every == 0 or taken == config.total_steps
                save_now = save_now or stop_now or evaluate_now or taken == stop
                # Reading waits for the device, so not every step is read: it must never be idle.
                if not (save_now or read_now or step == first or taken % 10 == 0):
                    continue
                steps = read_steps(pending, config)
                read = time.monotonic()
                seconds = read - begun
                state |= {"step": taken, "seconds": seconds_before + seconds}
                rate = (taken - first) * config.batch_size / seconds
                bar.set_postfix_str(f"{steps[-1][1]:.3f} bits/dim, {rate:.0f} images/s", refresh=False)
                if log:
                    claim.check()
                    log.add([(number + 1, (number + 1) * config.batch_size, *pair, learning_rate(number, config),
                              f"{state['seconds']:.3f}") for number, *pair in steps])
                if step == first:
                    first_step_seconds = seconds
                    if log:
                        log.write(f"first step: {seconds:.2f} s{', with compilation' if compile else ''}")
                if save_now:
                    distributed.from_first(save)
                    if log and requests.save:
                        log.write(f"saved at step {taken}: a signal came")
                    requests.save, saved, save_seconds = False, time.monotonic(), time.monotonic() - read
                if stop_now:
                    break
                if evaluate_now:
                    with torch.compiler.set_stance("force_eager"):  # else a graph for each of its batch sizes
                        state["rows"] += _evaluate_splits(jet, images, taken, requests)
        if not state["rows"] or state["rows"][-1]["step"] < config.total_steps:
            if log:
                log.write(f"stopped at step {state['step']}")
            return {"step": state["step"]}

        test = state["rows"][-1]
        done = {"config": config.to_dict(), "rows": state["rows"],
                **{name: test[name] for name in ("bits_per_dim", "bits_per_dim_se", "num_images")},
                "weights_sha256": weights_checksum(jet), "num_params": sum(parameter.numel() for parameter in jet.parameters()),
                "train_seconds": state["seconds"], "first_step_seconds": first_step_seconds,
                "micro_batch": state["micro_batch"], "checkpoint_activations": jet.checkpoint_activations,
                "compile": compile, "graph": graph,
                "hosts": hosts, "peak_memory_gib": distributed.agree(peak_memory_gib(device))[0],
                **_provenance(images, device, threads)}

        def finish():
            claim.check()
            write_atomically(run_dir / DONE_NAME, json.dumps(done, indent=1) + "\n")
            with contextlib.suppress(OSError):  # a full disk: the result is there
                log.write(f"finished: {test['bits_per_dim']:.4f} bits/dim on {test['num_images']} test images")
            return done
        return distributed.from_first(finish)


@torch.no_grad()
@_full_float32()
def evaluate(jet, images, seed=0, draws=1, batch_size=None, per_image=False, precision="float32", requests=None):
    """Bits per dimension of images under a Jet, one uniform dequantization draw per image and draw.

    images: an ImageSet or a uint8 array (N, H, W, C). The noise is keyed by (seed, draw, image index),
    so the result depends on neither the batch size (None: 128 on a CPU, on a GPU the largest power of two that
    fits, up to 1024) nor the number of processes: where there are several (distributed.py), all of them must call
    this, each computes some of the batches, and all get the whole result. Computes in the type of the Jet's
    weights; precision "bfloat16" puts the couplings' networks under autocast. requests: Requests, looked at
    after each batch; one to stop raises Stopped.
    Returns a dict: bits_per_dim (mean over images and draws), bits_per_dim_se (standard error over
    images; nan for one image), num_images, logdet_nats (mean log|det| of an image), and with per_image
    bits_per_dim_per_image, float64 (N,).
    Raises ValueError for other arrays, and its subclass NonFiniteError, naming the image, for a result
    that is not finite.
    """
    array = np.asarray(getattr(images, "array", images))
    if (array.dtype != np.uint8 or array.ndim != 4 or not len(array) or draws < 1
            or batch_size is not None and batch_size < 1 or precision not in ("float32", "bfloat16")):
        raise ValueError(f"evaluate: {array.dtype} array of shape {array.shape}, draws={draws}, "
                         f"batch_size={batch_size}, precision={precision!r}: needs uint8 (N, H, W, C), N, draws, "
                         "batch_size >= 1, and float32 or bfloat16")
    weight = next(jet.parameters(), torch.empty(0))
    device, results = weight.device, []

    def draw_batch(key):
        draw, start = key
        pixels = np.array(array[start:start + batch_size])
        noise = evaluation_noise(range(start, start + len(pixels)), array.shape[1:], seed, draw)
        return pinned(pixels, device), pinned(noise.numpy(), device)

    with networks_in(precision, device):
        if batch_size is None and device.type == "cpu":
            batch_size = 128
        elif batch_size is None:
            batch_size = int(-distributed.agree(-_batch_that_fits(jet, array.shape[1:], weight))[0])
        keys = [(draw, start) for draw in range(draws) for start in range(0, len(array), batch_size)]
        ours = keys[distributed.rank()::distributed.size()]
        with contextlib.closing(prefetch(draw_batch, ours, ahead=4 if device.type == "cuda" else 0)) as batches:
            for number in range(-(-len(keys) // distributed.size())):
                if requests and distributed.agree(requests.stop)[0]:
                    raise Stopped
                if number == len(ours):  # the other processes have one more
                    break
                pixels, noise = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                results.append(measure(jet, pixels, noise.to(weight.dtype)))
                if device.type == "cuda" and len(results) % 16 == 0:
                    torch.cuda.synchronize(device)  # bounds the pinned memory of batches that wait for their copy
    table = torch.zeros(2, draws, len(array), dtype=torch.float64)  # exact when added up: others hold zeros
    sizes = [result.shape[1] for result in results]
    for (draw, start), result in zip(ours, torch.cat(results, 1).cpu().split(sizes, 1) if results else ()):
        table[:, draw, start:start + batch_size] = result
    bits, logdets = (distributed.add_up(table).numpy() / draws).sum(1)
    if not np.isfinite(bits).all():
        index = int(np.flatnonzero(~np.isfinite(bits))[0])
        raise NonFiniteError(f"evaluate: image {index} has {bits[index]} bits/dim ({(~np.isfinite(bits)).sum()} "
                         "images are not finite): no number can be reported")
    result = {"bits_per_dim": float(bits.mean()),
              "bits_per_dim_se": float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else math.nan,
              "num_images": len(bits), "logdet_nats": float(logdets.mean())}
    return {**result, "bits_per_dim_per_image": bits} if per_image else result


def measure(jet, pixels, noise):
    """Bits/dim and log-det (2, B), float64, of uint8 pixels with their noise in [0, 1), both (B, H, W, C).

    All of it happens on their device.
    """
    z, logdet = jet(dequantize(pixels, noise).permute(0, 3, 1, 2))
    return torch.stack([bits_per_dim(z, logdet).double(), logdet.double()])


def _batch_that_fits(jet, shape, weight):
    """The largest power of two, up to 1024, that takes half of a GPU's free memory, by the need of 8 images."""
    x = weight.new_zeros(8, shape[2], *shape[:2])
    with torch.compiler.set_stance("force_eager"):  # no graph for a batch of 8
        jet(x)  # what stays, like the casts of weights, is not counted
        torch.cuda.reset_peak_memory_stats(weight.device)
        before = torch.cuda.memory_allocated(weight.device)
        jet(x)
    need = max(1, torch.cuda.max_memory_allocated(weight.device) - before) / len(x)
    return 2 ** min(10, int(math.log2(max(1, free_bytes(weight.device) / 2 / need))))


def _evaluation_is_due(config, state):
    """Whether the state is one to be evaluated, and was not."""
    step = state["step"]
    return ((config.eval_every and step and step % config.eval_every == 0 or step == config.total_steps)
            and not any(row["step"] == step for row in state["rows"]))


def _evaluate_splits(jet, images, step, requests):
    """A row for the test images, all of them, and before it one for some training images."""
    num_train = min(TRAIN_ROW_IMAGES, len(images["test"].array))
    return [{"step": step, "split": "train", **evaluate(jet, images["train"].array[:num_train], requests=requests)},
            {"step": step, "split": "test", **evaluate(jet, images["test"], requests=requests)}]


# ---- the run folder

@contextlib.contextmanager
def _claimed(run_dir, config, wait_s, echo):
    """(claim, log) of the run folder, for one run at a time; the log is None but in the first process.

    An error within is left in the folder, by the process that saw it first.
    """
    claim = Claim(run_dir)

    def begin():
        claim.take(wait_s)
        (run_dir / ERROR_NAME).unlink(missing_ok=True)
        _refuse_other_config(run_dir, config)
        if not (run_dir / CONFIG_NAME).exists():
            write_atomically(run_dir / CONFIG_NAME, json.dumps(config.to_dict(), indent=1) + "\n")
    try:
        distributed.from_first(begin)
        try:
            with _outside_errors():
                yield claim, RunLog(run_dir, echo) if distributed.rank() == 0 else None
        except BusyError:
            raise
        except Exception as error:
            if distributed.rank() == 0:
                claim.check()  # or it is not our folder any more
            record_error(run_dir, error)
            raise
    finally:
        claim.release()


def _refuse_other_config(run_dir, config):
    """Refuse a run folder whose config.json is of another configuration."""
    path = run_dir / CONFIG_NAME
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise TrainingError(f"{path}: damaged ({error}): delete it, and the same command goes on") from None
        _refuse_changes(run_dir, theirs, config)


def _refuse_changes(where, theirs, config):
    """Raise TrainingError that names each field in which a stored config differs from ours."""
    theirs, ours = _flat(theirs), _flat(config.to_dict())
    changed = [f"{name} was {theirs.get(name)!r} and is now {ours.get(name)!r}"
               for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    if changed:
        raise TrainingError(f"{where} belongs to another configuration: {'; '.join(changed)}: use another run "
                            "folder, or the same settings to resume")


def _flat(values, prefix=""):
    """{"model": {"block": ...}} -> {"model.block": ...}"""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {name: value for key, item in values.items() for name, value in _flat(item, f"{prefix}{key}.").items()}


def _first_jet(config, images, init_from, run_dir):
    """The Jet of a configuration before training, checked against the images and the weights it begins with."""
    height, width, channels = images.array.shape[1:]
    if (channels, height, width) != config.model.image_shape:
        raise TrainingError(f"{config.data} has images of {height} x {width} x {channels}; the model takes "
                            f"image_size={config.model.image_size} and channels={config.model.channels}")
    begun = any((run_dir / name).exists() for name in (CHECKPOINT_NAME, PREVIOUS_NAME))
    if not config.init or begun:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Jet(config.model)
    if init_from is None:
        raise TrainingError(f"{run_dir} begins with the weights {config.init}: give the run folder or file that holds "
                            "them (--init-from)")
    if (found := weights_id(init_from)) != config.init:
        raise TrainingError(f"{init_from} holds the weights {found}, and this run begins with {config.init}: give that "
                            "one's run folder or file")
    return load_jet(init_from, **vars(config.model))  # refuses a field that is another there, by name


def _restore(run_dir, config, jet, optimizer, state, log):
    """Continue from the newest whole checkpoint, if any: weights and Adam's moments; returns its state."""
    path, saved = read_checkpoint(run_dir, log.tell)
    if not saved:
        return {}
    saved = {"micro_batch": None, "processes": 1} | saved  # of a run before there were these
    if saved.get("format") != CHECKPOINT_FORMAT or not {"config", "model", "optimizer", *state} <= saved.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a run: move it away to begin again")
    _refuse_changes(path, saved["config"], config)
    if saved["train_fingerprint"] != state["train_fingerprint"]:
        raise TrainingError(f"{path}: the training images have changed since this run began: bring them back "
                            "or use another run folder")
    load_weights(path, jet, saved["model"])
    try:  # only the moments: the hyper-parameters are the config's
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})
        fits = not config.total_steps or all(
            optimizer.state[parameter][moment].shape == parameter.shape
            for parameter in jet.parameters() for moment in ("exp_avg", "exp_avg_sq"))
    except (KeyError, ValueError, TypeError, AttributeError):
        fits = False
    step, seconds, rows, micro_batch = (saved[name] for name in ("step", "seconds", "rows", "micro_batch"))
    if not (fits and type(step) is int and 0 <= step <= config.total_steps and type(seconds) is float
            and type(rows) is list and (micro_batch is None or type(micro_batch) is int and micro_batch > 0)):
        raise CheckpointError(f"{path}: the optimizer's state or the step does not fit this run: move it away to "
                              "begin again")
    return {name: saved[name] for name in state}


def progress_bar(config, label, quiet):
    """A bar over the steps of a run: bits/dim of the last batch, images/s, time left."""
    return tqdm(total=config.total_steps, disable=quiet, desc=label or Path(config.data).name,
                mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True,
                bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed}, {remaining} left]")


# ---- what ran it

def check_place(threads, micro_batch, checkpoint_activations, checkpoint_every_s):
    """Raise TrainingError for settings that no run can have."""
    if checkpoint_every_s is not None and not checkpoint_every_s >= 0:
        raise TrainingError(f"checkpoint_every_s={checkpoint_every_s}: must be 0 or more")
    if not 1 <= threads <= 1024:
        raise TrainingError(f"threads={threads}: must be from 1 to 1024")
    if micro_batch is not None and micro_batch < 1:
        raise TrainingError(f"micro_batch={micro_batch}: must be 1 or more")
    if checkpoint_activations not in SWITCH:
        raise TrainingError(f"checkpoint_activations={checkpoint_activations!r}: must be auto, on or off")


def pick_device(device, graph=False):
    """auto, cpu or cuda -> torch.device; cuda that is not there is an error. A CPU's kernels are built here.

    Of several processes on a machine each takes a GPU of its own. graph: whether steps are to be CUDA graphs, which
    need a GPU and one process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise TrainingError(f"device {device!r}: must be auto, cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise TrainingError(f"device {device!r}: torch {torch.__version__} sees no GPU here: use --device cpu, or a machine with one")
    if graph and (device == "cpu" or distributed.size() > 1):
        found = "the device is cpu" if device == "cpu" else f"{distributed.size()} processes are at this run"
        raise TrainingError(f"graph: a CUDA graph needs a GPU and one process, and {found}: leave out --graph")
    try:
        if device == "cpu":
            kernels.name()
        elif distributed.local_size() > 1 and device == "cuda":
            if torch.cuda.device_count() > 1:  # with one, it was chosen by whoever placed us
                device = f"cuda:{distributed.local_rank()}"
            torch.cuda.set_device(device)
        return torch.empty(0, device=device).device
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def advice(config, device):
    """Lines on what a user may not expect of this configuration on a CPU."""
    if device.type != "cpu" or not config.total_steps:
        return []
    lines = []
    if config.precision == "bfloat16":
        lines.append("precision bfloat16 is slower than float32 on a CPU (--precision float32 is another run)")
    flops = train_flops(config)
    if flops > DAY_S * SLOWEST_FLOPS and (days := flops / (CPU_SHARE * matmul_rate()) / DAY_S) > 1:
        size = f"{config.total_steps:,} steps of {config.batch_size:,} images, {flops:.2g} FLOPs"
        lines.append(f"this recipe takes about {days:,.{0 if days >= 10 else 1}f} days on this CPU ({size}): fewer "
                     "--total_steps or a smaller --model.num_couplings make it shorter, a GPU faster")
    return lines


def train_flops(config):
    """Three times the forward pass, by definition (backward counts two), over all images seen."""
    return 3 * forward_flops(config.model) * config.batch_size * config.total_steps


def matmul_rate(size=1024):
    """FLOP/s of this CPU in a float32 matrix product with torch's threads, measured in a fraction of a second."""
    a, seconds = torch.randn(size, size), []
    for _ in range(4):  # the first warms up
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2 * size ** 3 / min(seconds)


def hardware(device):
    """The GPU's or the CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_gib(device):
    """The most memory that this process has taken on its device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def _where(processes, threads, hosts):
    """"4 processes of 1 thread on node1, node2, job 12 (restart 1)"."""
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return (f"{processes} process{'es' * (processes > 1)} of {threads} thread{'s' * (threads > 1)} on "
            f"{', '.join(dict.fromkeys(hosts))}{job}{f' (restart {restarts})' if restarts != '0' else ''}")


def git_commit():
    """(commit, "clean" or "dirty") of this code; ("", "") outside a git checkout. Results do not count."""
    if COMMIT_FILE.exists():
        return tuple(json.loads(COMMIT_FILE.read_text()))
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!results", ":!paper_figures/out")
    except OSError:  # no git
        return "", ""
    return (commit, "dirty" if changes else "clean") if commit else ("", "")


def _cpu_kernels(device):
    """C or torch on a CPU; None on a GPU, where they are not built either."""
    return kernels.name() if device.type == "cpu" else None


def _provenance(images, device, threads):
    commit, tree = git_commit()
    return {"dataset": images["test"].name, "variant": images["test"].variant,
            "train_fingerprint": images["train"].fingerprint, "test_fingerprint": images["test"].fingerprint,
            "device": device.type, "hardware": hardware(device), "threads": threads, "processes": distributed.size(),
            "kernels": _cpu_kernels(device),
            "git_commit": commit, "git_dirty": {"clean": False, "dirty": True}.get(tree),
            "python_version": platform.python_version(), "torch_version": torch.__version__,
            "numpy_version": np.__version__}


# ---- the command line

class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        flags = [flag.strip("-") for flag in self._option_string_actions]
        near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else ()
        hint = f"did you mean --{near[0]}?" if near else "--help shows what is allowed"
        self.exit(2, f"{self.prog}: error: {message} ({hint})\n")


def add_config_flags(parser, config_class, prefix=""):
    """A flag for each field of a config, like --batch_size 64 or --model.num_couplings 8."""
    for field in dataclasses.fields(config_class):
        if not field.metadata:
            continue
        default, choices = field.default, field.metadata["choices"]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help = field.metadata["help"].replace("%", "%%") + f" (default: {shown})"
        kind = {"type": type(default), "choices": choices}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"type": type(default[0]), "choices": choices, "nargs": "+"}
        number = default[0] if isinstance(default, tuple) else default
        metavar = {} if choices or isinstance(default, bool) else {"metavar": type(number).__name__.upper()}
        parser.add_argument(f"--{prefix}{field.name}", dest=prefix + field.name, default=argparse.SUPPRESS,
                            help=help, **kind, **metavar)


def model_flags(flags):
    """The fields of JetConfig among parsed flags."""
    model = {name.removeprefix("model."): value for name, value in flags.items() if name.startswith("model.")}
    if len(size := model.get("image_size", ())) == 1:
        model["image_size"] = size[0]
    return model


def config_from_flags(flags, data_root):
    """TrainConfig from parsed flags; where weights are given the model is theirs, and image size and channels are the
    set's unless they are given."""
    top = {name: value for name, value in flags.items() if name in TrainConfig.__dataclass_fields__}
    model = model_flags(flags)
    height, width, channels = image_shape(top.get("data", TrainConfig.data), data_root)
    if flags.get("init_from") == "":
        raise TrainingError("--init-from is empty: give a run folder or weight file, or leave it away")
    if flags.get("init_from") is not None:
        model = vars(load_jet(flags["init_from"], **model).config)
        top["init"] = weights_id(flags["init_from"])
    model = {"image_size": (height, width), "channels": channels} | model
    return TrainConfig(model=JetConfig(**model), **top)


def add_place_flags(parser, threads="1"):
    """The flags that say where a run is placed: they change no more than rounding."""
    parser.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of a run; equal bits need equal threads, and several "
                        f"threads need idle cores (default: {threads})")
    parser.add_argument("--compile", action="store_true", help="torch.compile the couplings (for GPUs)")
    parser.add_argument("--graph", action="store_true", help="each training step as one CUDA graph: for small models, which "
                        "are bound by launches")
    parser.add_argument("--micro-batch", type=int, metavar="N",
                        help="images in memory at a time; gradients add up over the batch (default: what fits)")
    parser.add_argument("--checkpoint-activations", choices=SWITCH, default="auto",
                        help="recompute activations in backward: same bits, less memory (default: auto, where needed)")
    parser.add_argument("--checkpoint-every-s", type=float, metavar="SECONDS",
                        help="time between checkpoints (default: 60, or 20 times what the last one took)")


def place_options(flags):
    """What add_place_flags parsed, as train's keyword arguments."""
    names = ("data_root", "device", "threads", "compile", "graph", "micro_batch", "checkpoint_activations", "checkpoint_every_s")
    return {name: flags[name] for name in names if flags[name] is not None}


@contextlib.contextmanager
def one_line_errors(program, *more):
    """End the program in one line, with no traceback, for what is not a bug."""
    try:
        yield
    except (DataError, CheckpointError, TrainingError, *more) as error:
        sys.exit(1 if getattr(error, "told", False) else f"{program}: error: {error}")
    except OSError as error:
        sys.exit(f"{program}: error: {one_line(error)}: the same command goes on when this is mended")
    except KeyboardInterrupt:
        print(f"{program}: interrupted: the same command goes on from the run's last checkpoint, or from its start "
              "where there is none yet", file=sys.stderr)
        sys.exit(130)


def main(arguments=None):
    parser = ArgumentParser(prog="train.py", description=__doc__)
    add_config_flags(parser.add_argument_group("what is computed"), TrainConfig)
    add_config_flags(parser.add_argument_group("the model"), JetConfig, "model.")
    place = parser.add_argument_group("where it runs")
    add_place_flags(place)
    place.add_argument("--init-from", metavar="RUN_OR_CHECKPOINT", help="begin with the weights of this run folder or "
                       "weight file: the model is theirs, the schedule is new (give a lower --lr)")
    place.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/<set>-<hash of the config>)")
    flags = vars(parser.parse_args(arguments))
    with one_line_errors(parser.prog):
        try:
            config = config_from_flags(flags, flags["data_root"])
        except (DataError, CheckpointError, TrainingError):
            raise
        except ValueError as error:
            parser.error(str(error))
        run_dir = Path(flags["run_dir"] or ROOT / "runs" / f"{Path(config.data).stem}-{config.hash}")
        distributed.start()
        if first := distributed.rank() == 0:
            print(f"run folder {run_dir}, seed {config.seed}", flush=True)
        with Requests().on() as requests:
            done = train(config, run_dir, init_from=flags["init_from"], requests=requests, **place_options(flags))
        if "bits_per_dim" not in done:
            sys.exit(f"{parser.prog}: stopped at step {done['step']}: the same command goes on" if first else 1)
        distributed.leave()
        if not first:
            return
        same = done["test_fingerprint"] == done["train_fingerprint"]
        print(f"{done['bits_per_dim']:.4f} +- {done['bits_per_dim_se']:.4f} bits/dim on {done['num_images']:,} test "
              f"images of {done['dataset']}{' (the training images themselves)' if same else ''}, variant "
              f"{done['variant']}, fingerprint {done['test_fingerprint'][:12]}; {config.total_steps:,} steps in "
              f"{done['train_seconds']:.0f} s on {done['hardware']}")


if __name__ == "__main__":
    main()
