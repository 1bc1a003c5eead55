"""On a GPU: a CPU's numbers, nothing that the host waits for, and errors of one line.

JET_TEST_DEVICE=cpu rehearses all of it that a CPU can do.
"""
import contextlib
import copy
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import load_jet, official_weights
from data import ImageSet, load_images, training_batch, training_batches, training_labels
from evaluate import evaluate, measure
from harness import machine
from harness.condition import one_hot
from harness.errors import TrainingError
from harness.machine import compile_couplings, networks_in
from harness.memory import fit_memory
from harness.place import Place
from jet import Coupling, Jet, JetConfig, bits_per_dim
from recipe import DTYPES, TrainConfig, make_optimizer, make_step, training_step
from test_no_host import SWITCHES
from test_parity import golden, nchw, without_key_bias  # golden: a fixture, each official file
from test_train import checkpoint, same_bits
from train import train

DEVICE = os.environ.get("JET_TEST_DEVICE", "cuda")
CUDA = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    CUDA and not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")]
MODEL = JetConfig(image_size=8, num_couplings=3, kinds=("channels", "spatial"), block_depth=1,
                  emb_dim=16, num_heads=2)
ALL = {"block": "cnn", "actnorm": True, "invertible_dense": True}
MASKING = {"split_mode": "masking", "gelu": "exact"}
LABELS = {"context_dim": 10}
models = pytest.mark.parametrize("changes", [{}, ALL, MASKING, LABELS],
                                 ids=["vit", "cnn+switches", "masking", "conditional"])
two_models = pytest.mark.parametrize("changes", [{}, ALL | LABELS],
                                     ids=["vit", "conditional cnn+switches"])
precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def cuda_only(what):
    return pytest.mark.skipif(not CUDA, reason=f"only CUDA has {what}")


def settings(precision="float32", changes=(), **more):
    model = dataclasses.replace(MODEL, **dict(changes))
    return TrainConfig(**{"model": model, "data": "x", "batch_size": 16, "total_steps": 20,
                          "lr": 1e-2, "precision": precision,
                          "condition": "labels" if model.context_dim else "none", **more})


@functools.cache
def photos(height=8, width=8):
    """200 small real images."""
    images = load_images("cifar10-subset", "train").first(200)
    array = images.array[:, ::32 // height, ::32 // width]
    return ImageSet(array=np.ascontiguousarray(array), labels=images.labels, name="photos",
                    variant="photos", split="train")


@pytest.fixture(autouse=True)
def full_float32():
    with machine.full_float32():
        yield


@pytest.fixture
def saved(tmp_path):
    """The images as a file."""
    np.save(tmp_path / "images.npy", photos().array)
    return str(tmp_path / "images.npy")


def random_jet(config, device=DEVICE):
    """The same weights on every device; fresh ones, but for dense layers, would be the identity."""
    torch.manual_seed(0)
    jet = Jet(config.model)
    with torch.no_grad():
        for parameter in (*jet.couplings.parameters(), *jet.actnorms.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    return jet.to(device, DTYPES[config.precision])


def batch(config, step=0, device=DEVICE):
    """The batch of a step with the CPU's noise, whatever the device."""
    _, height, width = config.model.image_shape
    x = training_batch(photos(height, width), config.batch_size, 0, step)
    return x.to(device, DTYPES[config.precision])


def context_of(config, x, step=0):
    """What the Jet takes beside a batch: () or (labels, one-hot,)."""
    if config.condition == "none":
        return ()
    labels = training_labels(photos(), config.batch_size, 0, step, config.condition_drop_prob)
    return (one_hot(labels, config.model.context_dim).to(x),)


def steps(config, count=20, device=DEVICE, jet=None, graph=False, compiled=False, micro_batch=None):
    """(losses and gradient norms, float64 (count, 2), the Jet) after so many steps."""
    jet = jet or random_jet(config, device)
    optimizer = make_optimizer(jet.parameters(), config, graph)
    step = make_step(jet, optimizer, config, micro_batch, graph)
    numbers = []
    for number in range(count):
        x = batch(config, number, device).requires_grad_(compiled)
        numbers.append(torch.stack(step(x, number, *context_of(config, x, number))))
    return torch.stack(numbers).double().cpu(), jet


def largest(one, two):
    """The largest difference between the numbers of two tensors, wherever they are."""
    return (one.detach().cpu().double() - two.detach().cpu().double()).abs().max().item()


def relative(one, two):
    """The largest relative difference of losses, and of gradient norms."""
    return ((one - two) / two).abs().amax(0).tolist()


@pytest.mark.parametrize("dtype, suffix, bounds", [
    (torch.float64, "_f64", (1e-11, 1e-10, 1e-11, 1e-11, 1e-10)),
    (torch.float32, "", (3e-5, 1e-3, 1e-5, 2e-4, 1e-3))], ids=["float64", "float32"])
@torch.no_grad()
def test_the_official_numbers(golden, dtype, suffix, bounds):
    jet = load_jet(golden.fid.name).to(DEVICE, dtype)
    z, logdet = jet(nchw(golden["x"], dtype).to(DEVICE))
    z_sample = nchw(golden["z_sample"], dtype).to(DEVICE)
    ours = z, logdet, bits_per_dim(z, logdet), *jet.inverse(z_sample)
    names = "z", "logdet", "bits_per_dim", "x_sample", "logdet_sample"
    for name, one, bound in zip(names, ours, bounds, strict=True):
        theirs = golden[name + suffix]
        theirs = nchw(theirs) if theirs.ndim == 4 else torch.tensor(theirs)
        assert largest(one, theirs) <= bound, name


def test_the_official_gradients(golden):
    jet = load_jet(golden.fid.name).to(DEVICE)
    bits_per_dim(*jet(nchw(golden["x"]).to(DEVICE))).mean().backward()
    theirs = official_weights({name.removeprefix("grad/"): golden[name] for name in golden
                               if name.startswith("grad/couplings")})
    for name, parameter in jet.named_parameters():
        expected = without_key_bias(name, theirs[name])
        difference = largest(without_key_bias(name, parameter.grad), expected)
        assert difference <= 2e-5 * expected.abs().max(), name


@models
def test_twenty_steps_in_float64_are_the_cpus(changes):
    config = settings("float64", changes)
    (ours, jet), (theirs, reference) = steps(config), steps(config, device="cpu")
    assert max(relative(ours, theirs)) <= 1e-9
    for name, value in jet.state_dict().items():
        assert largest(value, reference.state_dict()[name]) <= 1e-9, name


@models
@pytest.mark.parametrize("precision, loss_bound, norm_bound",
                         [("float32", 1e-5, 1e-4), ("bfloat16", 1e-3, 5e-2)])
def test_twenty_steps_are_the_cpus_to_rounding(changes, precision, loss_bound, norm_bound):
    """The CPU's are in float32. bfloat16 rounds the networks alone, to 0.4 %: 0.1 % of the loss and
    5 % of the gradient norm are five times what a CPU's bfloat16 differs by."""
    ours, _ = steps(settings(precision, changes))
    theirs, _ = steps(settings("float32", changes), device="cpu")
    loss, norm = relative(ours, theirs)
    assert loss <= loss_bound and norm <= norm_bound
    assert precision == "float32" or loss > 1e-7  # it was bfloat16


@pytest.mark.parametrize("patch_size, precision",
                         [(4, "float32"), (4, "bfloat16"), (2, "bfloat16")])
def test_a_step_repeats_its_bits(patch_size, precision):
    """256 tokens in heads of 64 values are the paper's. In float32 PyTorch's attention adds up the
    gradients of so many tokens in any order, so that such runs are resumed to rounding."""
    config = settings(precision, {"image_size": 32, "patch_size": patch_size, "emb_dim": 128,
                                  "num_couplings": 2}, batch_size=32 if CUDA else 2)
    (first, one), (second, two) = steps(config, 2), steps(config, 2)
    assert torch.equal(first, second) and same_bits(one.state_dict(), two.state_dict())


@precisions
@two_models
def test_recomputed_activations_are_the_same_bits(precision, changes):
    config, jets = settings(precision, changes), []
    for recompute in (False, True):
        jets.append(random_jet(config))
        jets[-1].checkpoint_activations = recompute
        steps(config, 2, jet=jets[-1])
    assert same_bits(*(jet.state_dict() for jet in jets))


@pytest.mark.parametrize("size", [1, 5])
def test_a_batch_in_pieces_is_the_whole_to_rounding(size):
    config = settings("float64")
    (pieces, one), (whole, two) = steps(config, 2, micro_batch=size), steps(config, 2)
    assert max(relative(pieces, whole)) <= 1e-12
    assert max(largest(*pair) for pair in zip(one.parameters(), two.parameters())) <= 1e-9


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=cuda_only("graphs"))],
                         ids=["eager", "graph"])
def test_nothing_is_updated_from_a_step_on_that_is_not_finite(graph):
    jet = random_jet(config := settings())
    optimizer = make_optimizer(jet.parameters(), config, graph)
    step = make_step(jet, optimizer, config, graph=graph)
    for number in range(1, 5):  # a graph is recorded at the third
        assert torch.stack(step(batch(config, number), number)).isfinite().all()
    before, moments = copy.deepcopy((jet, optimizer.state_dict()["state"]))
    loss, _ = step(batch(config, 5) * torch.nan, 5)
    assert loss.isnan() and torch.stack(step(batch(config, 6), 6)).isfinite().all()
    assert same_bits(jet.state_dict(), before.state_dict())
    assert same_bits(optimizer.state_dict()["state"], moments)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"block": "cnn"}, MASKING], ids=["vit", "cnn", "masking"])
def test_log_det_in_bfloat16_is_that_of_the_scales_applied(changes):
    """(x2 + bias) * scale: the results for x2 = 1 and x2 = 0 differ by the scale."""
    config = settings("bfloat16", changes)
    jet = random_jet(config)
    tokens = jet.patchify(batch(config))
    with networks_in("bfloat16", tokens.device):
        for coupling in jet.couplings:
            moved = coupling.order.chunk(2)[1]
            ones, zeros = (coupling(tokens.index_fill(coupling.axis, moved, value))[0]
                           for value in (1., 0.))
            z, logdet = coupling(tokens)
            log_scale = (ones - zeros).index_select(coupling.axis, moved).log()
            assert log_scale.std() > 0.05
            assert largest(logdet, log_scale.flatten(1).sum(1)) <= 1e-5 * log_scale[0].numel()
            back, inverse_logdet = coupling.inverse(z)
            assert torch.equal(inverse_logdet, -logdet) and largest(back, tokens) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("precision, bound",
                         [("float64", 1e-9), ("float32", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_inverse_undoes_the_forward_pass(switch, precision, bound):
    config = settings(precision, SWITCHES[switch])
    jet, x = random_jet(config), batch(config)
    context = context_of(config, x)
    with networks_in(precision, x.device):
        z, logdet = jet(x, *context)
        back, inverse_logdet = jet.inverse(z, *context)
    assert largest(z, x) > 0.01 and largest(back, x) <= bound
    assert largest(logdet, -inverse_logdet) <= bound * max(1, logdet.abs().max().item())


@two_models
def test_evaluation_is_the_cpus_whatever_the_batch_size(changes):
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = True  # a caller's setting is not evaluate's
    config = settings(changes=changes)
    expected = evaluate(random_jet(config, "cpu"), photos(), per_image=True)
    for size in (None, 1, 7, 512):
        ours = evaluate(random_jet(config), photos(), batch_size=size, per_image=True)
        ratio = ours["bits_per_dim_per_image"] / expected["bits_per_dim_per_image"]
        assert np.abs(ratio - 1).max() <= 2e-6  # TF32 in the convolutions would be off by more


def test_samples_are_the_cpus_and_have_a_seed():
    config = settings()
    ours, theirs = (random_jet(config, device).sample(9, torch.Generator().manual_seed(3)).cpu()
                    for device in (DEVICE, "cpu"))
    assert ours.dtype == torch.uint8 and ours.shape == (9, 8, 8, 3)
    assert largest(ours, theirs) <= 1  # a value next to a bin's edge
    jet = random_jet(config)
    one, same, other = (jet.sample(9, torch.Generator(DEVICE).manual_seed(seed))
                        for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_batches_have_the_same_bits_from_every_source():
    numbers = [6, 7, 8]
    expected = [training_batch(photos(), 10, 3, number, DEVICE) for number in numbers]
    for source in ("array", "device", "stream"):
        whole, *parts = (list(training_batches(photos(), 10, 3, numbers, DEVICE, source, part))
                         for part in (slice(None), slice(0, 3), slice(3, 6), slice(6, 10)))
        for one, two, *pieces in zip(expected, whole, *parts):
            assert torch.equal(one, two) and torch.equal(one, torch.cat(pieces))


@pytest.mark.parametrize("changes, precision",
                         [({}, "float32"), ({}, "bfloat16"), (ALL, "float32")])
@pytest.mark.parametrize("graph", [False, pytest.param(None, marks=cuda_only("graphs"))],
                         ids=["eager", "graph"])
def test_a_resumed_run_has_the_same_bits(tmp_path, saved, changes, precision, graph):
    """As a graph, too, whose first two steps after each start are run as they are."""
    config = settings(precision, changes, data=saved, total_steps=10)
    place = Place(device=DEVICE, graph=graph)
    whole, parts = (functools.partial(train, config, tmp_path / name, place=place, quiet=True)
                    for name in ("whole", "parts"))
    done = whole(place=dataclasses.replace(place, checkpoint_every_s=0))
    assert done["device"] == torch.device(DEVICE).type and done["graph"] == (graph is None)
    assert parts(stop_after=5) == {"step": 5}
    assert parts()["bits_per_dim"] == done["bits_per_dim"]
    assert same_bits(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))


def test_checkpoints_go_to_another_device_and_back(tmp_path, saved):
    config = settings(data=saved, total_steps=6)
    done = train(config, tmp_path / "run", place=Place(device=DEVICE), quiet=True)
    on_cpu = evaluate(load_jet(tmp_path / "run"), photos())
    assert abs(on_cpu["bits_per_dim"] - done["bits_per_dim"]) <= 1e-5
    for number, device in enumerate(("cpu", DEVICE, "cpu"), 1):
        moved = train(config, tmp_path / "moved", stop_after=2 * number, quiet=True,
                      place=Place(device=device))
    log = (tmp_path / "moved/log.txt").read_text()
    assert re.findall(r"(?:started|resumed) at step (\d)", log) == ["0", "2", "4"]
    assert abs(moved["bits_per_dim"] - done["bits_per_dim"]) < 0.05  # a GPU draws other noise


@cuda_only("a limit of its memory")
def test_a_full_gpu_is_one_line(tmp_path, saved):
    config = settings(data=saved, total_steps=1, batch_size=2 ** 16)  # needs more than a GiB
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 ** 28) / total)
    try:
        with pytest.raises(TrainingError, match="out of memory .*--checkpoint-activations on, or a "
                                                "--micro-batch below") as error:
            train(config, tmp_path / "run", quiet=True, place=Place(
                device=DEVICE, micro_batch=2 ** 16, checkpoint_activations="off"))
        assert "\n" not in str(error.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
        torch.cuda.empty_cache()


@cuda_only("a measure of peak memory")
@precisions
@pytest.mark.parametrize("recompute", ["off", "on"])
def test_a_step_takes_the_memory_that_was_planned(precision, recompute):
    config = settings(precision, {"image_size": 32, "patch_size": 2, "num_couplings": 6,
                                  "block_depth": 2, "emb_dim": 128}, batch_size=128)
    jet, x = random_jet(config), batch(config)
    optimizer = make_optimizer(jet.parameters(), config)
    _, line = fit_memory(jet, optimizer, config, recompute, 128, 2 ** 50)
    training_step(jet, optimizer, x, 0, config)  # makes workspaces, too
    optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training_step(jet, optimizer, x, 1, config)
    taken = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    planned = float(re.search(r"needs (\S+) of", line)[1])
    assert planned / 4 <= taken <= planned / 0.75, (taken, line)


ONE_PROCESS = """if True:
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from test_gpu import CUDA, DEVICE, random_jet, settings, steps
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", rank=0, world_size=1,
                            init_method="file://" + sys.argv[1])
    for device in {"cpu", DEVICE}:
        dist.all_reduce(ones := torch.ones(3, device=device))
        assert ones.tolist() == [1, 1, 1]
    model = DistributedDataParallel(random_jet(settings()), broadcast_buffers=False,
                                    gradient_as_bucket_view=True)
    together, alone = steps(settings(), 3, jet=model)[0], steps(settings(), 3)[0]
    assert torch.equal(together, alone) and alone.isfinite().all(), (together, alone)
    dist.destroy_process_group()
    print("equal")
"""


def test_one_process_of_a_group_takes_the_steps_of_one_alone(tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}",
                   "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}  # without a network
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS, tmp_path / "store"], env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]


@contextlib.contextmanager
def no_waiting():
    """Within, an error is raised wherever the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only("a debug mode for waiting")
def test_a_wait_would_be_seen():
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=DEVICE).sum().item()


@cuda_only("a debug mode for waiting")
@precisions
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_host_waits_for_nothing_in_a_step(switch, precision):
    config = settings(precision, SWITCHES[switch])
    jet, x = random_jet(config), batch(config)
    optimizers = [make_optimizer(jet.parameters(), config, graph) for graph in (False, True)]
    pixels = torch.zeros(16, *x.shape[2:], x.shape[1], dtype=torch.uint8, device=DEVICE)
    noise = torch.rand(pixels.shape, device=DEVICE)
    context = context_of(config, x)
    with no_waiting():
        jet.initialize(x, *context)
        for optimizer, micro_batch in zip(optimizers, (None, 5)):
            for number in range(2):
                training_step(jet, optimizer, x, number, config, micro_batch, context)
        with torch.no_grad(), networks_in(precision, x.device):
            measure(jet, pixels, noise, *context)
            jet.inverse(x, *context)


@cuda_only("a debug mode for waiting")
@pytest.mark.parametrize("source", ["device", "stream"])
def test_the_host_waits_for_no_batch(source):
    batches = training_batches(photos(), 16, 0, range(4), DEVICE, source)
    next(batches)  # a set on the device is copied there first
    with no_waiting():
        assert len(list(batches)) == 3


@pytest.mark.skipif(CUDA and not shutil.which("cc"), reason="torch.compile needs a C compiler (cc)")
def test_compiled_couplings_take_the_same_steps(monkeypatch):
    """And as a graph. Of one kind, for compiling takes long; the rehearsal compiles nothing."""
    if not CUDA:
        uncompiled = functools.partialmethod(torch.nn.Module.compile, backend="eager")
        monkeypatch.setattr(Coupling, "compile", uncompiled)
    config = settings(changes={"kinds": ("channels",), "num_couplings": 2})
    eager, _ = steps(config, 6)
    torch._dynamo.reset()
    try:
        for graph in (False, True) if CUDA else (False,):
            compile_couplings(jet := random_jet(config))
            compiled, _ = steps(config, 6, jet=jet, graph=graph, compiled=True)
            assert max(relative(compiled, eager)) <= 1e-4
    finally:
        torch._dynamo.reset()


@cuda_only("graphs")
@models
@pytest.mark.parametrize("precision, bound",
                         [("float64", 1e-6), ("float32", 1e-5), ("bfloat16", 1e-3)])
def test_a_graph_takes_the_same_steps(changes, precision, bound):
    """The third call records a step, later ones replay it; lr changes in all, and is float32."""
    config = settings(precision, changes)
    for ways in ({}, {"micro_batch": 5}):
        eager, graph = steps(config, 6, **ways)[0], steps(config, 6, graph=True, **ways)[0]
        loss, norm = relative(graph, eager)
        assert loss <= bound and norm <= 50 * bound
    assert largest(*eager[3:5, 0]) > 1e-3  # replays of one step would be seen


@cuda_only("graphs")
def test_a_run_as_a_graph_ends_and_resumes_as_an_eager_one(tmp_path, saved):
    config = settings(data=saved, total_steps=8)
    plain = train(config, tmp_path / "plain", place=Place(device=DEVICE, graph=False), quiet=True)
    runs = [functools.partial(train, config, tmp_path / name, quiet=True,
                              place=Place(device=DEVICE, graph=True)) for name in ("whole", "parts")]
    assert runs[1](stop_after=4) == {"step": 4}
    for run in runs:
        assert abs(run()["bits_per_dim"] - plain["bits_per_dim"]) <= 1e-4
