"""Nothing in a step is read by the host or lies on another device: proven without a GPU.

A tensor of the meta device has no values: to read one raises, and so does a tensor of another
device beside it. Autocast does not know that device, so networks in bfloat16 run on fake tensors:
of the CPU with gradients, where a read raises, and of CUDA without them (a PyTorch that was built
for CPUs cannot keep any there), where a tensor of another device raises, too.
"""
import contextlib
import dataclasses
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import recipe
from evaluate import measure
from harness.machine import networks_in
from jet import ActNorm, Coupling, Jet, JetConfig
from recipe import DTYPES, TrainConfig, make_optimizer, training_step

MODEL = JetConfig(image_size=8, num_couplings=2, kinds=("channels", "spatial"), block_depth=1,
                  emb_dim=8, num_heads=2)
BATCH = 6
NETWORKS = {  # each path through the code at least once
    "cnn": {"block": "cnn", "image_size": (8, 16), "kinds": ("spatial",),
            "spatial_splits": ("hstripes", "checkerboard-inv")},
    "masking": {"split_mode": "masking", "gelu": "exact"},
    "conditional": {"context_dim": 5, "actnorm": True, "invertible_dense": True}}
SWITCHES = NETWORKS | {"vit": {}, "actnorm": {"actnorm": True}, "both": {"actnorm": True, "invertible_dense": True}}
WAYS = {  # in which a step is done, beside all at once; the second one finds the optimizer's state
    "recomputed": ("both", {"recompute": True, "steps": 2}), "micro-batches": ("vit", {"micro_batch": 3}),
    "graph": ("vit", {"graph": True, "steps": 2})}
networks = pytest.mark.parametrize("switch", NETWORKS)
ways = pytest.mark.parametrize("switch, how", WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def fused_adamw_takes_meta(monkeypatch):
    """Fused AdamW has a list of devices without meta, and no meta kernel where lr is a tensor."""
    module = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *arguments: None)

    def with_tensor_lr(*lists, lr, grad_scale=None, found_inf=None, **settings):
        tensors = [tensor for some in lists for tensor in some] + [lr, found_inf]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_adamw_.tensor_lr", with_tensor_lr, "Meta")
    yield
    library._destroy()


@pytest.fixture
def autocast_for_cuda(monkeypatch):
    """Without a GPU, torch.autocast("cuda") disables itself; not within such a test."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)


class OnlyOn(TorchDispatchMode):
    """Raises where an operation's result is not on the device, even if it is copied there later."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        results = function(*arguments, **(settings or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.device.type != self.device:
                raise RuntimeError(f"{function} makes a tensor on {result.device}")
        return results


@contextlib.contextmanager
def no_values(device):
    """Within, new tensors have no values; on meta and CUDA none may be made elsewhere."""
    fake = contextlib.nullcontext() if device == "meta" else FakeTensorMode()
    with fake, contextlib.nullcontext() if device == "cpu" else OnlyOn(device):
        yield


def settings(precision, switch):
    model = dataclasses.replace(MODEL, **SWITCHES[switch])
    return TrainConfig(model=model, data="x", batch_size=BATCH, total_steps=4, precision=precision,
                       condition="labels" if model.context_dim else "none")


def make(config):
    """A Jet on the CPU."""
    return Jet(config.model).to(DTYPES[config.precision])


def place(jet, device):
    """The Jet with tensors of the same shapes, without values, on a device."""
    for module in jet.modules():
        for name, value in module.named_parameters(recurse=False):
            value = torch.empty(value.shape, dtype=value.dtype, device=device)
            module.register_parameter(name, torch.nn.Parameter(value, device != "cuda"))
        for name, value in module.named_buffers(recurse=False):
            value = torch.empty(value.shape, dtype=value.dtype, device=device)
            module.register_buffer(name, value)
    return jet


def images(config, device):
    """Pixels and noise (B, H, W, C) and a batch (B, C, H, W)."""
    (C, H, W), dtype = config.model.image_shape, DTYPES[config.precision]
    return (torch.empty(BATCH, H, W, C, dtype=torch.uint8, device=device),
            torch.empty(BATCH, H, W, C, dtype=dtype, device=device),
            torch.empty(BATCH, C, H, W, dtype=dtype, device=device))


def context_of(config, x):
    """What a Jet takes beside a batch: () or (labels, one-hot,), without values."""
    dim = config.model.context_dim
    return (torch.empty(len(x), 1, dim, dtype=x.dtype, device=x.device),) if dim else ()


def train(config, device, steps=1, recompute=False, micro_batch=None, graph=False):
    """ActNorm's start and steps; returns what says whether one was not finite."""
    jet = make(config)
    jet.checkpoint_activations = recompute
    optimizer = make_optimizer(jet.parameters(), config, graph)  # it reads the learning rate
    group = optimizer.param_groups[0]
    with no_values(device):
        group["params"] = list(place(jet, device).parameters())
        if graph:
            group["lr"] = torch.empty((), device=device)
        *_, x = images(config, device)
        context = context_of(config, x)
        jet.initialize(x, *context)
        for step in range(steps):
            loss, grad_norm = training_step(jet, optimizer, x, step, config, micro_batch,
                                            context)
            assert loss.shape == grad_norm.shape == () and loss.dtype == x.dtype
    assert all(len(optimizer.state[parameter]) == 3 for parameter in jet.parameters())
    return optimizer.found_inf


@torch.no_grad()
def score_and_invert(config, device):
    """evaluate's inner step and the inverse; returns an answer of the first coupling's network."""
    jet, answers = make(config), []
    coupling, dtype = jet.couplings[0], DTYPES[config.precision]

    def spy(net_out, *arguments):
        answers.append(net_out)
        results = Coupling.affine(coupling, net_out, *arguments)
        assert {result.dtype for result in results} == {dtype}  # whatever the network's is
        return results
    coupling.affine = spy
    with no_values(device):
        place(jet, device)
        pixels, noise, x = images(config, device)
        with networks_in(config.precision, x.device):
            context = context_of(config, x)
            results = measure(jet, pixels, noise, *context)
            (z, logdet), (_, inverse_logdet) = jet(x, *context), jet.inverse(x, *context)
    assert results.shape == (2, BATCH) and results.dtype == torch.float64
    assert z.dtype == logdet.dtype == inverse_logdet.dtype == dtype and logdet.shape == (BATCH,)
    assert len(answers) == 3 and results.device == z.device == x.device
    return answers[0]


# ---- float32 and float64, on meta

plain = pytest.mark.parametrize("precision, switch", [*(("float32", switch) for switch in NETWORKS), ("float64", "both")])


@plain
def test_a_step_needs_no_values(precision, switch):
    assert train(settings(precision, switch), "meta").device.type == "meta"


@ways
def test_a_step_needs_no_values_in_whatever_way_it_is_done(switch, how):
    found_inf = train(settings("float32", switch), "meta", **how)
    assert found_inf.device.type == "meta"


@plain
def test_scores_and_inverse_need_no_values(precision, switch):
    answer = score_and_invert(settings(precision, switch), "meta")
    assert answer.device.type == "meta" and answer.dtype == getattr(torch, precision)


# ---- bfloat16, on fake tensors

@networks
def test_a_step_in_bfloat16_needs_no_values(switch):
    train(settings("bfloat16", switch), "cpu")


@ways
def test_a_step_in_bfloat16_needs_no_values_in_whatever_way_it_is_done(switch, how):
    train(settings("bfloat16", switch), "cpu", **how)


@networks
def test_scores_and_inverse_in_bfloat16_need_no_values_and_give_float32(autocast_for_cuda, switch):
    config = settings("bfloat16", switch)
    answer = score_and_invert(config, "cuda")
    assert answer.device.type == "cuda" and answer.dtype == torch.bfloat16


def test_autocast_casts_fake_cuda_tensors(autocast_for_cuda):
    with no_values("cuda"), torch.no_grad():
        x = torch.empty(2, 3, device="cuda")
        assert torch.nn.functional.linear(x, x).dtype == torch.float32
        with networks_in("bfloat16", x.device):
            assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16


# ---- the tests above can fail

def read(tensor):
    """The tensor, once the host has read from it."""
    return tensor + 0 * tensor.sum().item()


def mix(tensor):
    """The tensor times one that was made on the CPU before."""
    return tensor * CPU_TENSOR


def move(tensor):
    """The tensor times one that is made on the CPU and copied: the host would wait for that."""
    return tensor * torch.ones(1).to(tensor)


CPU_TENSOR = torch.ones(1)
PLACES = {"log-det": ("affine", Coupling), "bits/dim": ("bits_per_dim", recipe, evaluate),
          "inverse": ("inverse", Coupling), "initialize": ("initialize", ActNorm),
          "clipping": ("clip_grad_norm_", torch.nn.utils)}
MESSAGE = ("called on meta tensors|_local_scalar_dense|makes a tensor on cpu|"
           "expected device meta|to be on the same device|convert all Tensors to FakeTensors")


@pytest.fixture
def spoil(monkeypatch):
    """Let what a function returns last, or else what it was given, pass through a fault."""
    def put(where, fault):
        name, *owners = PLACES[where]

        def spoilt(*arguments, original=getattr(owners[0], name)):
            result = original(*arguments)
            if isinstance(result, tuple):
                return (*result[:-1], fault(result[-1]))
            return fault(arguments[1] if result is None else result)
        for owner in owners:
            monkeypatch.setattr(owner, name, spoilt)
    return put


def faults(*places):
    """A read at each of the places, and the other faults at the first."""
    cases = [*((place, read) for place in places), (places[0], mix), (places[0], move)]
    return pytest.mark.parametrize("where, fault", cases)


@faults("log-det", "bits/dim", "initialize", "clipping")
def test_a_fault_in_a_step_is_seen(spoil, where, fault):
    spoil(where, fault)
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(settings("float32", "actnorm"), "meta")


@pytest.mark.parametrize("where", ["log-det", "bits/dim", "initialize", "clipping"])
def test_a_read_in_a_step_in_bfloat16_is_seen(spoil, where):
    spoil(where, read)
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(settings("bfloat16", "actnorm"), "cpu")


@faults("log-det", "bits/dim", "inverse")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fault_in_scores_and_inverse_is_seen(spoil, autocast_for_cuda, precision, where, fault):
    spoil(where, fault)
    with pytest.raises((RuntimeError, AssertionError), match=MESSAGE):
        score_and_invert(settings(precision, "vit"), "cuda" if precision == "bfloat16" else "meta")


def test_a_log_det_in_bfloat16_is_seen(spoil, autocast_for_cuda):
    spoil("log-det", lambda logdet: logdet.bfloat16())
    with pytest.raises(AssertionError):
        score_and_invert(settings("bfloat16", "vit"), "cuda")
