"""Train one Jet by exact likelihood, and measure its bits per dimension.

    python train.py --data cifar10-subset --run-dir runs/first --model.num_couplings 8 --model.block_depth 1 \\
        --model.emb_dim 32 --model.num_heads 2 --batch_size 16 --total_steps 100 --lr 4e-3

The same command goes on where a stopped run was, and ends with the same bits. Defaults are the official
recipe (google-research/big_vision, configs/proj/jet/imagenet64.py), which reports 3.72 bits/dim.
"""
import argparse
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from convert import CHECKPOINT_FORMAT, CHECKPOINT_NAME, CheckpointError, load_weights, read_tensors
from data import DataError, dequantize, evaluation_noise, image_shape, load_images, training_batch
from jet import Jet, JetConfig, bits_per_dim, check_settings, setting

ROOT = Path(__file__).resolve().parent
DONE_NAME = "done.json"
TRAIN_ROW_IMAGES = 2048  # the first training images, evaluated beside the test images to show overfitting


class TrainingError(RuntimeError):
    """A run that cannot start, go on or be saved, in one line."""


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
    total_steps: int = setting(250_224, "optimizer steps; 250,224 are 200 epochs of ImageNet-1k")
    lr: float = setting(3e-4, "peak learning rate")
    warmup_fraction: float = setting(0.1, "share of the steps with a rising learning rate", minimum=0)
    weight_decay: float = setting(1e-5, "decoupled and NOT multiplied by lr (torch's AdamW takes "
                                  "weight_decay / lr)", minimum=0)
    beta1: float = setting(0.9, "Adam's decay of the first moment")
    beta2: float = setting(0.95, "Adam's decay of the second moment")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm")
    precision: str = setting("float32", "of the couplings' networks in training; bfloat16 is autocast, "
                             "all else stays float32", ("float32", "bfloat16"))
    seed: int = setting(0, "of weights, data order and training noise", minimum=0)
    eval_every: int = setting(0, "steps between evaluations; 0: only at the end", minimum=0)

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


def make_optimizer(parameters, config):
    """Adam with decoupled weight decay on every parameter.

    The official decay is multiplied by the relative schedule but not by lr; torch's AdamW multiplies
    by both, hence the division. Set lr to config.lr * schedule(step, ...) before each step.
    """
    return torch.optim.AdamW(parameters, lr=config.lr, betas=(config.beta1, config.beta2),
                             eps=config.adam_eps, weight_decay=config.weight_decay / config.lr, fused=True)


def training_step(model, optimizer, x, step, config):
    """One update on the batch x (B, C, H, W): (mean bits/dim before it, gradient norm before clipping).

    Raises NonFiniteError, before anything is updated, when one of them is not finite.
    """
    lr = config.lr * schedule(step, config.total_steps, config.warmup_fraction)
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss = bits_per_dim(*model(x)).mean()
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    loss, grad_norm = loss.item(), grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"not finite at step {step}: loss {loss} bits/dim, gradient norm {grad_norm}, "
                            f"lr {lr:.3g}; nothing was updated: try a lower --lr or another --seed")
    optimizer.step()
    return loss, grad_norm


@contextlib.contextmanager
def _full_float32():
    """float32 means float32 on GPUs, too: TF32, PyTorch's default for convolutions, changes numbers."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allow in zip(backends, saved):
            backend.allow_tf32 = allow


@_full_float32()
def train(config, run_dir, stop_after=None, *, data_root=None, device="auto", threads=1,
          compile=False, checkpoint_every_s=60, label="", quiet=False):
    """Train a Jet and evaluate it; the same call again resumes, a finished run returns at once.

    config: TrainConfig. run_dir: gets config.json, checkpoint.pt, metrics.csv, log.txt, done.json.
    stop_after: stop with a checkpoint once this many steps are done in all. device (auto, cpu, cuda)
    and threads (of the CPU) decide rounding; all else that decides the result is in config.
    Returns what done.json holds: config, rows (a dict per evaluation and split), the last test row's
    bits_per_dim, bits_per_dim_se and num_images, seconds, and what ran it. A run that was stopped
    returns {"step": ...}.
    Raises TrainingError (another configuration, a non-finite loss, a full disk), DataError (images) or
    CheckpointError (a damaged checkpoint), each in one line.
    """
    run_dir = Path(run_dir)
    _refuse_other_config(run_dir, config)
    if (done := read_done(run_dir)) is not None:
        return done
    device = pick_device(device)
    if not 1 <= threads <= 1024:
        raise TrainingError(f"threads={threads}: must be from 1 to 1024")
    torch.set_num_threads(threads)
    images = {split: load_images(config.data, split, data_root) for split in ("train", "test")}
    jet = _fresh_jet(config, images["train"]).to(device)
    optimizer = make_optimizer(jet.parameters(), config)
    stop = config.total_steps if stop_after is None else min(stop_after, config.total_steps)

    with _claimed(run_dir, config), progress_bar(config, label, quiet) as bar:
        state = {"step": 0, "seconds": 0.0, "rows": [], "train_fingerprint": images["train"].fingerprint}
        _restore(run_dir / CHECKPOINT_NAME, config, jet, optimizer, state)
        if compile:
            for coupling in jet.couplings:  # in place: the names in the checkpoint stay as they are
                coupling.compile()
        first, seconds_before = state["step"], state["seconds"]
        log = RunLog(run_dir, first)
        log.write(f"{'resumed' if first else 'started'} at step {first}: {hardware(device)}, {threads} threads, "
                  f"torch {torch.__version__}, commit {' '.join(git_commit())}")
        bar.initial = bar.n = first
        begun = saved = time.monotonic()
        for step in range(first, stop):
            x = training_batch(images["train"], config.batch_size, config.seed, step, device)
            if step == 0:
                jet.initialize(x)  # ActNorm's
            loss, grad_norm = training_step(jet, optimizer, x, step, config)
            state["step"], seconds = step + 1, time.monotonic() - begun
            state["seconds"] = seconds_before + seconds
            rate = (step + 1 - first) * config.batch_size / seconds
            bar.set_postfix_str(f"{loss:.3f} bits/dim, {rate:.0f} images/s", refresh=False)
            bar.update()
            log.step(state, config, loss, grad_norm)
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.total_steps:
                state["rows"] += _evaluate_splits(jet, images, step + 1)
            if step + 1 == stop or time.monotonic() - saved > checkpoint_every_s:
                _save_checkpoint(run_dir, config, jet, optimizer, state)
                saved = time.monotonic()
        if state["step"] < config.total_steps:
            log.write(f"stopped at step {state['step']}")
            return {"step": state["step"]}

        state["rows"] += _evaluate_splits(jet, images, config.total_steps)
        test = state["rows"][-1]
        done = {"config": config.to_dict(), "rows": state["rows"],
                **{name: test[name] for name in ("bits_per_dim", "bits_per_dim_se", "num_images")},
                "num_params": sum(parameter.numel() for parameter in jet.parameters()),
                "train_seconds": state["seconds"], **_provenance(images, device, threads)}
        write_atomically(run_dir / DONE_NAME, json.dumps(done, indent=1) + "\n")
        log.write(f"finished: {test['bits_per_dim']:.4f} bits/dim on {test['num_images']} test images")
        return done


@torch.no_grad()
@_full_float32()
def evaluate(jet, images, seed=0, draws=1, batch_size=128, per_image=False):
    """Bits per dimension of images under a Jet, one uniform dequantization draw per image and draw.

    images: an ImageSet or a uint8 array (N, H, W, C). The noise is keyed by (seed, draw, image index),
    so the result depends on neither the batch size nor the number of processes.
    Returns a dict: bits_per_dim (mean over images and draws), bits_per_dim_se (standard error over
    images; nan for one image), num_images, logdet_nats (mean log|det| of an image), and with per_image
    bits_per_dim_per_image, float64 (N,). Computes in the type of the Jet's weights.
    Raises ValueError for other arrays, and its subclass NonFiniteError, naming the image, for a result
    that is not finite.
    """
    array = np.asarray(getattr(images, "array", images))
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array) or draws < 1 or batch_size < 1:
        raise ValueError(f"evaluate: {array.dtype} array of shape {array.shape}, draws={draws}, "
                         f"batch_size={batch_size}: needs uint8 (N, H, W, C), N, draws, batch_size >= 1")
    weight = next(jet.parameters(), torch.empty(0))
    bits, logdets = np.zeros(len(array)), np.zeros(len(array))
    for draw in range(draws):
        for start in range(0, len(array), batch_size):
            batch = slice(start, min(start + batch_size, len(array)))
            noise = evaluation_noise(range(batch.start, batch.stop), array.shape[1:], seed, draw)
            x = dequantize(np.array(array[batch]), noise.to(weight.dtype))
            z, logdet = jet(x.permute(0, 3, 1, 2).to(weight.device))
            bits[batch] += bits_per_dim(z, logdet).double().cpu().numpy() / draws
            logdets[batch] += logdet.double().cpu().numpy() / draws
    if not np.isfinite(bits).all():
        index = int(np.flatnonzero(~np.isfinite(bits))[0])
        raise NonFiniteError(f"evaluate: image {index} has {bits[index]} bits/dim ({(~np.isfinite(bits)).sum()} "
                         "images are not finite): no number can be reported")
    result = {"bits_per_dim": float(bits.mean()),
              "bits_per_dim_se": float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else math.nan,
              "num_images": len(bits), "logdet_nats": float(logdets.mean())}
    return {**result, "bits_per_dim_per_image": bits} if per_image else result


def _evaluate_splits(jet, images, step):
    """A row for the test images, all of them, and before it one for some training images."""
    num_train = min(TRAIN_ROW_IMAGES, len(images["test"].array))
    return [{"step": step, "split": "train", **evaluate(jet, images["train"].array[:num_train])},
            {"step": step, "split": "test", **evaluate(jet, images["test"])}]


# ---- the run folder

def _refuse_other_config(run_dir, config):
    """Refuse a run folder whose config.json is of another configuration."""
    path = run_dir / "config.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise TrainingError(f"{path}: damaged ({error}): use another run folder") from None
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


@contextlib.contextmanager
def _claimed(run_dir, config):
    """The run folder, with its config.json, for one process at a time: the lock ends with the process."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "w")
    except OSError as error:
        raise TrainingError(f"{run_dir}: cannot be a run folder ({error.strerror}): choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{run_dir}: another process is at this run: wait for it to end") from None
        if not (run_dir / "config.json").exists():
            write_atomically(run_dir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
        yield


def read_done(run_dir):
    """The content of a finished run's done.json, or None."""
    path = Path(run_dir) / DONE_NAME
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text())
        whole = {"config", "num_params", "test_fingerprint", "git_commit"} <= done.keys() and all(
            isinstance(row[name], float) for row in done["rows"]
            for name in ("bits_per_dim", "bits_per_dim_se", "logdet_nats"))
        if whole and done["rows"][-1]["split"] == "test":
            return done
        raise ValueError("incomplete")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TrainingError(f"{path}: damaged ({type(error).__name__}: {error}): delete it, and the same command "
                            "evaluates again") from None


def _fresh_jet(config, images):
    """The Jet of a configuration before training, checked against the images."""
    height, width, channels = images.array.shape[1:]
    if (channels, height, width) != config.model.image_shape:
        raise TrainingError(f"{config.data} has images of {height} x {width} x {channels}; the model takes "
                            f"image_size={config.model.image_size} and channels={config.model.channels}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Jet(config.model)


def _restore(path, config, jet, optimizer, state):
    """Continue from a checkpoint, where there is one: weights, Adam's moments, step, rows."""
    if not path.exists():
        return
    saved = read_tensors(path)
    if saved.get("format") != CHECKPOINT_FORMAT or not {"config", "model", "optimizer", *state} <= saved.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a run: move it away to begin again")
    _refuse_changes(path, saved["config"], config)
    if saved["train_fingerprint"] != state["train_fingerprint"]:
        raise TrainingError(f"{path}: the training images have changed since this run began: bring them back "
                            "or use another run folder")
    load_weights(path, jet, saved["model"])
    try:  # only the moments: the hyper-parameters are the config's
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})
        fits = all(optimizer.state[parameter][moment].shape == parameter.shape
                   for parameter in jet.parameters() for moment in ("exp_avg", "exp_avg_sq"))
    except (KeyError, ValueError, TypeError, AttributeError):
        fits = False
    step, seconds, rows = saved["step"], saved["seconds"], saved["rows"]
    if not (fits and type(step) is int and 0 < step <= config.total_steps and type(seconds) is float
            and type(rows) is list):
        raise CheckpointError(f"{path}: the optimizer's state or the step does not fit this run: move it away to "
                              "begin again")
    state |= {"step": step, "seconds": seconds, "rows": rows}


def _save_checkpoint(run_dir, config, jet, optimizer, state):
    content = {"format": CHECKPOINT_FORMAT, "config": config.to_dict(), **state,
               "model": jet.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    try:
        write_atomically(run_dir / CHECKPOINT_NAME, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "writing failed: is the disk full?"
        raise TrainingError(f"{run_dir}: the checkpoint of step {state['step']} was not saved ({reason}); "
                            "the one before is untouched: make room and run the same command") from None


def write_atomically(path, content):
    """Write a whole file (text, or what a function writes to it) or leave the old one as it is."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise


class RunLog:
    """log.txt (what happened when) and metrics.csv (training, every tenth step) of a run folder."""

    COLUMNS = "step,images_seen,bits_per_dim,grad_norm,lr,seconds"

    def __init__(self, run_dir, step):
        """Rows of metrics.csv after this step, which a killed run left, are dropped: they come again."""
        self.log, self.metrics = run_dir / "log.txt", run_dir / "metrics.csv"
        text = self.metrics.read_text(errors="replace") if self.metrics.exists() else ""
        rows = text.splitlines(keepends=True)[1:]
        kept = [row for row in rows if row.endswith("\n") and row.count(",") == self.COLUMNS.count(",")
                and row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
        write_atomically(self.metrics, "".join([self.COLUMNS + "\n", *kept]))

    def write(self, message):
        with open(self.log, "a") as file:
            file.write(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {message}\n")

    def step(self, state, config, loss, grad_norm):
        step = state["step"]
        if step % 10 == 0 or step == config.total_steps:
            lr = config.lr * schedule(step - 1, config.total_steps, config.warmup_fraction)
            with open(self.metrics, "a") as file:
                file.write(f"{step},{step * config.batch_size},{loss!r},{grad_norm!r},{lr!r},"
                           f"{state['seconds']:.3f}\n")


def progress_bar(config, label, quiet):
    """A bar over the steps of a run: bits/dim of the last batch, images/s, time left."""
    return tqdm(total=config.total_steps, disable=quiet, desc=label or Path(config.data).name,
                mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True,
                bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt} steps{postfix} [{elapsed}, {remaining} left]")


# ---- what ran it

def pick_device(device):
    """auto, cpu or cuda -> torch.device; cuda that is not there is an error."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise TrainingError(f"device {device!r}: must be auto, cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise TrainingError(f"device {device!r}: torch {torch.__version__} sees no GPU here; use cpu or auto")
    try:
        return torch.empty(0, device=device).device
    except RuntimeError as error:
        raise TrainingError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def hardware(device):
    """The GPU's or the CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit():
    """(commit, "clean" or "dirty") of this code; ("", "") outside a git checkout. Results do not count."""
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!results", ":!paper_figures/out")
    except OSError:  # no git
        return "", ""
    return (commit, "dirty" if changes else "clean") if commit else ("", "")


def _provenance(images, device, threads):
    commit, tree = git_commit()
    return {"dataset": images["test"].name, "variant": images["test"].variant,
            "train_fingerprint": images["train"].fingerprint, "test_fingerprint": images["test"].fingerprint,
            "device": device.type, "hardware": hardware(device), "threads": threads,
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


def config_from_flags(flags, data_root):
    """TrainConfig from parsed flags; image size and channels are the set's unless they are given."""
    top = {name: value for name, value in flags.items() if name in TrainConfig.__dataclass_fields__}
    model = {name.removeprefix("model."): value for name, value in flags.items() if name.startswith("model.")}
    height, width, channels = image_shape(top.get("data", TrainConfig.data), data_root)
    model = {"image_size": (height, width), "channels": channels} | model
    if isinstance(model["image_size"], list) and len(model["image_size"]) == 1:
        model["image_size"] = model["image_size"][0]
    return TrainConfig(model=JetConfig(**model), **top)


def add_place_flags(parser, threads="1"):
    """The flags that say where a run is placed: they change no more than rounding."""
    parser.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of a run; equal bits need equal threads, and several "
                        f"threads need idle cores (default: {threads})")
    parser.add_argument("--compile", action="store_true", help="torch.compile each coupling")
    parser.add_argument("--checkpoint-every-s", type=float, default=60, metavar="SECONDS",
                        help="time between checkpoints (default: 60)")


def place_options(flags):
    """What add_place_flags parsed, as train's keyword arguments."""
    names = ("data_root", "device", "threads", "compile", "checkpoint_every_s")
    return {name: flags[name] for name in names if flags[name] is not None}


@contextlib.contextmanager
def one_line_errors(program, *more):
    """End the program in one line, with no traceback, for what is not a bug."""
    try:
        yield
    except (DataError, CheckpointError, TrainingError, *more) as error:
        sys.exit(f"{program}: error: {error}")
    except OSError as error:
        sys.exit(f"{program}: error: {error.filename or 'writing'}: {error.strerror or error}: the same command "
                 "goes on when this is mended")
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
    place.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/<set>-<hash of the config>)")
    flags = vars(parser.parse_args(arguments))
    with one_line_errors(parser.prog):
        try:
            config = config_from_flags(flags, flags["data_root"])
        except (DataError, TrainingError):
            raise
        except ValueError as error:
            parser.error(str(error))
        run_dir = Path(flags["run_dir"] or ROOT / "runs" / f"{Path(config.data).stem}-{config.hash}")
        print(f"run folder {run_dir}, seed {config.seed}")
        done = train(config, run_dir, **place_options(flags))
        same = done["test_fingerprint"] == done["train_fingerprint"]
        print(f"{done['bits_per_dim']:.4f} +- {done['bits_per_dim_se']:.4f} bits/dim on {done['num_images']:,} test "
              f"images of {done['dataset']}{' (the training images themselves)' if same else ''}, variant "
              f"{done['variant']}, fingerprint {done['test_fingerprint'][:12]}; {config.total_steps:,} steps in "
              f"{done['train_seconds']:.0f} s on {done['hardware']}")


if __name__ == "__main__":
    main()
