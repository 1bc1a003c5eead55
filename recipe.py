"""The paper's recipe: what a run computes, its learning rate, its optimizer and one training step.

Source: google-research/big_vision, configs/proj/jet/imagenet64.py, optax.py and utils.py.
"""
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math

import torch

from data import data_id
from harness import distributed
from harness.errors import NonFiniteError, TrainingError
from harness.graphs import Graphed
from harness.machine import networks_in
from jet import JetConfig, bits_per_dim, check_settings, setting

HASH_FORMAT = 1  # names of runs change where this does: raise it when a default changes
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that changes a run's result; where it runs is not in it. Defaults: the official recipe.

    Raises ValueError that names the field, the value and the rule.
    """
    model: JetConfig = dataclasses.field(default_factory=JetConfig)
    data: str = setting("imagenet64-oord",
                        "image set: a known name, a prepared folder or a .npy file")
    batch_size: int = setting(1024, "images per step")
    total_steps: int = setting(250_224, "optimizer steps; 250,224 are 200 epochs of ImageNet-1k; 0 "
                               "only evaluates", minimum=0)
    lr: float = setting(3e-4, "peak learning rate")
    warmup_fraction: float = setting(0.1, "share of the steps with a rising learning rate",
                                     minimum=0)
    weight_decay: float = setting(1e-5, "decoupled and NOT multiplied by lr (torch's AdamW takes "
                                  "weight_decay / lr)", minimum=0)
    beta1: float = setting(0.9, "Adam's decay of the first moment")
    beta2: float = setting(0.95, "Adam's decay of the second moment")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm")
    precision: str = setting(
        "float32", "bfloat16: the couplings' networks multiply in it in training, as in the "
        "official run (on TPUs), and all else stays float32: for GPUs; float32: faster on CPUs; "
        "float64: everything in it (slow, for checks)", ("float32", "bfloat16", "float64"))
    seed: int = setting(0, "of weights, data order and training noise", minimum=0)
    condition: str = setting("none", "what the Jet is told of an image: none: it takes no labels; "
                             "labels: its own; shuffled: another image's; dropped: nothing, by a "
                             "Jet that takes labels", ("none", "labels", "shuffled", "dropped"))
    condition_drop_prob: float = setting(0.1, "share of the steps whose batch is told nothing, so "
                                         "that the Jet works without labels, too", minimum=0)
    eval_every: int = setting(0, "steps between evaluations; 0: only at the end", minimum=0)
    init: str = ""  # the weights it begins with, as weights_id() names them; "": a fresh Jet's
    extends: int = 0  # the step at which the run with these weights ended: steps count on from it

    def __post_init__(self):
        check_settings(self)
        for name in ("beta1", "beta2", "warmup_fraction", "condition_drop_prob"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be below 1")
        if self.seed >= 2 ** 63:
            raise ValueError(f"seed={self.seed}: must be below 2**63")
        if type(self.extends) is not int or self.extends and not (
                self.init and 0 < self.extends < self.total_steps):
            raise ValueError(f"extends={self.extends!r}: must be a step before the last, "
                             f"{self.total_steps}, of a run that begins with other weights, or 0")
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(f"data={self.data!r}: must be the name or path of an image set")
        if not isinstance(self.model, JetConfig):
            raise ValueError(f"model={self.model!r}: must be a JetConfig")
        if (self.condition != "none") != (self.model.context_dim > 0):
            raise ValueError(f"condition={self.condition!r}: must be "
                             f"{'labels' if self.model.context_dim else 'none'} where context_dim="
                             f"{self.model.context_dim} (it is the number of classes, or 0)")

    def to_dict(self):
        """Plain values, as they come back from JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values):
        """The config that to_dict or to_record was called on; a missing field has its default."""
        fields = {name: value for name, value in values.items() if name != "data_id"}
        config = cls(**{**fields, "model": JetConfig(**fields["model"])})
        if isinstance(values.get("data_id"), str):  # as recorded: the images may be elsewhere now
            config.__dict__["data_id"] = values["data_id"]
        return config

    def to_record(self):
        """to_dict, and which images they are: what a run's files keep of it."""
        return {**self.to_dict(), "data_id": self.data_id}

    @functools.cached_property
    def data_id(self):
        """Which images: name and variant of a known set, else fingerprints. Raises DataError."""
        return data_id(self.data)

    def identity(self, data_id):
        """{field: value} of all that makes runs differ: equal couplings are so however written."""
        values = flatten({**self.to_dict(), "data": data_id})
        model = self.model
        for name in ("kinds", "spatial_splits"):
            del values[f"model.{name}"]
        default = JetConfig(image_size=64, num_couplings=model.num_couplings).coupling_splits
        if model.coupling_splits != default:
            values["model.couplings"] = [split or kind for kind, split in model.coupling_splits]
        if not model.has_heads:
            del values["model.num_heads"]
        if self.condition == "none":  # there is nothing to drop
            del values["condition_drop_prob"]
        return values

    @functools.cached_property
    def hash(self):
        """Ten hex digits that name a run: of what differs from defaults, and a format number."""
        defaults = identity_of_defaults(type(self))
        changed = {name: value for name, value in self.identity(self.data_id).items()
                   if value != defaults.get(name)}
        text = json.dumps({"format": HASH_FORMAT, **changed}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def changes(self, record):
        """The lines "lr was 0.1 and is now 0.2" by which a stored record is of another run."""
        stored = TrainConfig.from_dict(record)
        stored_id = record.get("data_id")
        if stored_id is None:  # a record of before there was one
            stored_id = self.data_id if stored.data == self.data else data_id(stored.data)
        if stored.identity(stored_id) == self.identity(self.data_id):
            return []
        before, now = flatten(stored.to_dict()), flatten(self.to_dict())
        if stored_id != self.data_id:  # the same path may hold other images
            before["data"], now["data"] = (f"{config.data} ({which})" for config, which in
                                           ((stored, stored_id), (self, self.data_id)))
        elif stored.data != self.data:
            del before["data"], now["data"]
        return [f"{name} was {before[name]!r} and is now {now[name]!r}" for name in sorted(now)
                if before[name] != now[name]]


@functools.cache
def identity_of_defaults(config_class):
    default = config_class()
    return default.identity(default.data_id)


def extension(before, run, init, steps, changes, model):
    """TrainConfig of a run that goes on, up to a step, from the end of a finished one.

    before: the configuration of that one, whose folder is run and whose weights are named init.
    changes: {field: value} that is to be different; model: as much of its model, where there must
    be nothing. Raises TrainingError.
    """
    if steps <= before.total_steps:
        raise TrainingError(f"--extend-to {steps}: must be above {before.total_steps}, the step at "
                            f"which {run} ended")
    if fixed := sorted({"batch_size", "total_steps", "condition"} & changes.keys()) + [*model]:
        raise TrainingError(f"{fixed[0]}: is that of {run} where --extend-to is given: leave it "
                            "out; a run of another one begins with --init-from alone")
    config = dataclasses.replace(before, **changes, total_steps=steps, init=init,
                                 extends=before.total_steps)
    if config.data_id != before.data_id:
        raise TrainingError(f"{config.data} has other images than {run} was trained on: give those "
                            "(--data), or leave --extend-to out")
    return config


def flatten(values, prefix=""):
    """{"model": {"block": ...}} -> {"model.block": ...}"""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {name: value for key, item in values.items()
            for name, value in flatten(item, f"{prefix}{key}.").items()}


def schedule(step, total_steps, warmup_fraction=0.1):
    """Relative learning rate of a step (0, 1, ...): linear warm-up from 0, cosine to 0.

    Source: big_vision/utils.py create_learning_rate_schedule.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1, max(0, progress)))) * min(1, step / warmup)


def learning_rate(step, config):
    """Of a run that extends another: of its own steps alone."""
    begun = config.extends
    return config.lr * schedule(step - begun, config.total_steps - begun, config.warmup_fraction)


class Adam(torch.optim.AdamW):
    """torch's, without the wrappers that import torch's compiler, which takes seconds."""
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def make_optimizer(parameters, config, graph=False):
    """Adam with decoupled weight decay on every parameter.

    The official decay is multiplied by the relative schedule but not by lr; torch's AdamW
    multiplies by both, hence the division. training_step sets lr to learning_rate(step, config).
    graph: for a CUDA graph, lr is a float32 tensor on the weights' device.
    """
    parameters = list(parameters)
    lr = torch.tensor(config.lr, device=parameters[0].device) if graph else config.lr
    optimizer = Adam(
        parameters, lr=lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
        weight_decay=config.weight_decay / config.lr, fused=True, capturable=graph)
    # the first steps run as they are, on purpose
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def add_gradients(model, x, config, micro_batch=None, context=()):
    """Add the gradient of the batch's mean bits/dim to the weights'; returns that mean.

    x: the batch (B, C, H, W); with several processes this one's part of it, and model is a
    DistributedDataParallel. micro_batch: images whose activations are in memory at a time (None:
    all); it changes rounding alone. context: (), or the one of the batch, (context,).
    """
    processes, loss = distributed.size(), x.new_zeros(())
    pieces = list(zip(*(part.split(micro_batch or len(x)) for part in (x, *context))))
    num_images = len(x) if processes == 1 else config.batch_size
    for number, piece in enumerate(pieces, 1):
        # DistributedDataParallel takes the mean over processes, in backward of the last piece
        is_shared = processes == 1 or number == len(pieces)
        with contextlib.nullcontext() if is_shared else model.no_sync():
            with networks_in(config.precision, x.device):
                share = bits_per_dim(*model(*piece)).sum() / num_images
            (share * processes if processes > 1 else share).backward()
        loss += share.detach()
    return distributed.add_up(loss)


def training_step(model, optimizer, x, step, config, micro_batch=None, context=()):
    """One update on the batch x (B, C, H, W): (mean bits/dim before it, norm before clipping).

    Both are tensors of no dimension on x's device, and nothing here waits for them. From the first
    step on that has one which is not finite, the optimizer updates nothing: weights and moments
    stay as they were. model, micro_batch, context: see add_gradients.
    """
    set_learning_rate(optimizer, learning_rate(step, config))
    optimizer.zero_grad()
    return update(model, optimizer, x, config, micro_batch, context)


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a CUDA graph reads it from there
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def update(model, optimizer, x, config, micro_batch=None, context=()):
    """training_step at the optimizer's learning rate, from no gradients, all on x's device."""
    loss = add_gradients(model, x, config, micro_batch, context)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    failed = (~(loss.isfinite() & grad_norm.isfinite())).float()
    # Where found_inf is 1, fused optimizers skip the step (it is there for GradScaler). Once 1, it
    # stays so.
    if not hasattr(optimizer, "found_inf"):
        optimizer.found_inf = failed
    torch.maximum(failed, optimizer.found_inf, out=optimizer.found_inf)
    optimizer.step()
    return loss, grad_norm


def make_step(model, optimizer, config, micro_batch=None, graph=False):
    """step(x, number, *context) -> (loss, gradient norm): training_step, or it as one CUDA graph.

    A graph (harness/graphs.py) needs make_optimizer(..., graph=True), one process, a GPU, and
    batches of one shape.
    """
    if not graph:
        return lambda x, number, *context: training_step(model, optimizer, x, number, config,
                                                         micro_batch, context)
    graphed = Graphed(lambda x, *context: update(model, optimizer, x, config, micro_batch, context),
                      optimizer.zero_grad)

    def step(x, number, *context):
        set_learning_rate(optimizer, learning_rate(number, config))
        return graphed(x, *context)
    return step


def read_steps(pending, config):
    """The numbers of pending [(step, loss, gradient norm)], which is emptied.

    All are read in one go: this waits for the device. Raises NonFiniteError for the first that is
    not finite.
    """
    values = torch.stack([value for _, *pair in pending for value in pair]).tolist()
    steps = [(step, *pair) for (step, *_), *pair in zip(pending, values[::2], values[1::2])]
    for step, loss, grad_norm in steps:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(f"not finite at step {step}: loss {loss} bits/dim, gradient norm "
                                 f"{grad_norm}, lr {learning_rate(step, config):.3g}; nothing was "
                                 "updated: try a lower --lr or another --seed")
    pending.clear()
    return steps
