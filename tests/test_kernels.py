"""The C kernels say what PyTorch says, to float32 rounding, and step aside where they cannot."""
import copy
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from harness import machine
from harness.errors import UserError
from harness.flops import forward_flops
from jet import Coupling, Jet, JetConfig, ViTBlock, bits_per_dim
from kernels import accelerate, compiled as built, functions

CONFIG = JetConfig(image_size=16, num_couplings=6, block_depth=2, emb_dim=48, num_heads=4)
pytestmark = pytest.mark.skipif(built.library() is None,
                                reason="no C compiler here, or JET_KERNELS=torch")


def randomized(module):
    """Every weight away from its start, where half of them are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def results(module, *inputs):
    """Outputs, then gradients of all inputs and weights, for one fixed direction of the outputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*inputs, *module.parameters()], directions)]


def largest_error(ours, exact):
    """The largest difference of two lists of tensors, relative to the largest value of each."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item()
               for a, b in zip(ours, exact, strict=True))


def counted(monkeypatch, *names):
    """A list that grows by one with each call of these functions of kernels."""
    calls = []
    for name in names:
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, real=real: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images, tokens, width, heads", [
    (3, 64, 64, 4), (40, 64, 32, 2), (2, 50, 48, 4), (1, 1, 16, 1), (5, 7, 80, 16),
    (1, 1100, 32, 2)])
def test_a_block_and_its_gradients_are_the_formulas(images, tokens, width, heads, threads,
                                                    monkeypatch):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, emb_dim=width, num_heads=heads)
    block = accelerate(randomized(ViTBlock(config, None)))
    h = torch.randn(images, tokens, width)
    torch.set_num_threads(threads)
    calls = counted(monkeypatch, "vit_block")
    ours = results(block, h)
    torch.set_num_threads(1)
    assert calls
    exact = results(block.double(), h.double())
    assert largest_error(ours, exact) < 3e-6
    with torch.no_grad():
        assert torch.equal(block.float()(h), ours[0])  # without autograd: the same bits


@pytest.mark.parametrize("width, tokens", [(48, 50), (64, 64)])
def test_an_images_bits_depend_neither_on_the_others_nor_on_threads(width, tokens):
    torch.manual_seed(0)
    block = accelerate(randomized(ViTBlock(dataclasses.replace(CONFIG, emb_dim=width), None)))
    h = torch.randn(13, tokens, width)
    with torch.no_grad():
        together = block(h)
        torch.set_num_threads(2)
        assert torch.equal(block(h), together)
        torch.set_num_threads(1)
        assert torch.equal(torch.cat([block(h[:1]), block(h[1:4]), block(h[4:])]), together)


@pytest.mark.parametrize("kind, split", [("channels", None), ("spatial", "checkerboard"),
                                         ("spatial", "hstripes-inv")])
@pytest.mark.parametrize("config", [
    CONFIG, dataclasses.replace(CONFIG, patch_size=2, scale_factor=3.0)])
def test_a_coupling_is_the_formula_forward_backward_and_inverse(kind, split, config, monkeypatch):
    torch.manual_seed(0)
    coupling = accelerate(randomized(Coupling(config, kind, split)))
    x = torch.randn(5, config.num_tokens, config.token_dim)
    calls = counted(monkeypatch, "affine", "affine_inverse")
    ours = results(coupling, x)
    with torch.no_grad():
        back, minus_logdet = coupling.inverse(ours[0])
    assert len(calls) == 2
    kept, axis = coupling.order.chunk(2)[0], coupling.axis
    assert torch.equal(ours[0].index_select(axis, kept), x.index_select(axis, kept))
    assert largest_error([back, -minus_logdet], [x.double(), ours[1].double()]) < 1e-5
    exact = results(coupling.double(), x.double())
    assert largest_error(ours, exact) < 5e-6
    assert largest_error([minus_logdet], [coupling.inverse(exact[0])[1]]) < 5e-6


def test_extreme_scales_stay_exact_and_not_a_number_is_kept():
    """raw = -80 scales by 3e-35; at -200 PyTorch gives 0, and so do we to float32's smallest."""
    x, moved = torch.ones(1, 1, 12), torch.arange(6, 12)
    raw = torch.tensor([-200., -80., -1., 0., 1., 80.])
    net_out = torch.cat([torch.zeros(6), raw]).view(1, 1, 12)
    z, logdet = kernels.affine(x, net_out, moved, False, 2.0)
    assert torch.allclose(z[0, 0, 6:].double(), 2 * raw.double().sigmoid(), rtol=1e-6, atol=1e-37)
    exact = (F.logsigmoid(raw.double()) + torch.tensor(2.).log()).sum().item()
    assert logdet.item() == pytest.approx(exact, rel=1e-6)
    block = accelerate(ViTBlock(CONFIG, None))
    h = torch.randn(2, 16, 48)
    h[1, 3, 5] = torch.nan
    out = block(h)
    assert out[0].isfinite().all() and out[1].isnan().all()  # attention spreads it over its image
    z, logdet = kernels.affine(x, torch.full((1, 1, 12), torch.nan), moved, False, 2.0)
    assert z[0, 0, 6:].isnan().all() and logdet.isnan().all() and z[0, 0, :6].isfinite().all()


def test_a_fresh_jet_is_the_identity_to_the_bit():
    x = torch.rand(3, 3, 16, 16)
    z, logdet = accelerate(Jet(CONFIG))(x)
    assert torch.equal(z, x) and not logdet.any()


def test_equal_inputs_give_equal_bits_with_two_threads():
    torch.manual_seed(0)
    jet, x = accelerate(randomized(Jet(CONFIG))), torch.rand(9, 3, 16, 16)
    torch.set_num_threads(2)
    first, second = (results(jet, x) for _ in range(2))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_checkpointing_does_not_keep_what_the_kernels_keep():
    jet, x = accelerate(Jet(CONFIG)), torch.rand(4, 3, 16, 16)

    def kept_bytes():
        storages = {}

        def keep(tensor):
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = bits_per_dim(*jet(x)).mean()
        out.backward()
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    everything = kept_bytes()
    jet.checkpoint_activations = True
    assert kept_bytes() < everything / 4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_they_step_aside_for_all_that_must_see_pytorch(monkeypatch):
    """Types, autocast, transforms and counters that cannot look into C get PyTorch's kernels."""
    jet, x = accelerate(Jet(CONFIG)), torch.rand(2, 3, 16, 16)
    monkeypatch.setattr(functions, "_call", None)  # any use of C fails from here on
    with pytest.raises(TypeError):
        jet(x)
    jet.double()(x.double())
    jet.float()
    assert copy.deepcopy(jet).to("meta")(x.to("meta"))[0].shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        jet(x)
    tokens = torch.rand(2, 16, 48)
    torch.func.vmap(lambda one: jet.couplings[0](one[None])[1])(tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        jet(x)
    assert counter.get_total_flops() == 2 * forward_flops(CONFIG)
    odd = Jet(dataclasses.replace(CONFIG, emb_dim=24, gelu="exact", kinds=("channels",),
                                  split_mode="masking"))
    odd(x)


@pytest.mark.parametrize("changes", [{"emb_dim": 24}, {"gelu": "exact"}])
def test_what_c_cannot_serve_stays_as_it_is(changes):
    jet = Jet(dataclasses.replace(CONFIG, **changes))
    assert accelerate(jet) is jet and type(jet.couplings[0]) is Coupling
    assert kernels.used_by(jet) == "torch"
    assert kernels.used_by(accelerate(Jet(CONFIG))) == "C"
    assert kernels.used_by(accelerate(Jet(CONFIG).double())) == "torch"


def test_acceleration_keeps_weights_and_names_and_an_optimizer_of_before():
    torch.manual_seed(0)
    jet, plain = randomized(Jet(CONFIG)), Jet(CONFIG)
    plain.load_state_dict(jet.state_dict())
    optimizer = torch.optim.SGD(jet.parameters(), lr=0.1)
    before = dict(jet.named_parameters())
    assert accelerate(accelerate(jet)) is jet
    assert list(jet.state_dict()) == list(plain.state_dict())
    assert all(parameter is before[name] for name, parameter in jet.named_parameters())
    for model in (jet, plain):
        bits_per_dim(*model(torch.full((2, 3, 16, 16), 0.3))).mean().backward()
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for fast, slow in zip(jet.parameters(), plain.parameters()):
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_one_warning_says_so_and_pytorch_does_the_work(monkeypatch, recwarn):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernels, "library", functools.cache(built.library.__wrapped__))  # not asked for yet
    for _ in range(2):
        model = accelerate(Jet(CONFIG))
        model(torch.rand(1, 3, 16, 16))
        assert kernels.used_by(model) == "torch"
    said = str(recwarn.pop(UserWarning).message)
    assert "kernels.c cannot be used" in said and "no-such-compiler" in said and not recwarn.list
    monkeypatch.setenv("JET_KERNELS", "torch")
    assert built.library.__wrapped__() is None and not recwarn.list
    monkeypatch.setenv("JET_KERNELS", "fast")
    with pytest.raises(UserError, match="JET_KERNELS=fast: must be C or torch"):
        built.library.__wrapped__()


def test_kernels_that_are_wrong_are_not_used(tmp_path, monkeypatch):
    """A miscompiled file is found out when it is opened."""
    source = built.SOURCE.read_text().replace("0.044715f", "0.054715f")
    (tmp_path / "wrong.c").write_text(source)
    monkeypatch.setattr(built, "SOURCE", tmp_path / "wrong.c")
    monkeypatch.setattr(built, "BUILD", tmp_path / "build")
    monkeypatch.setattr(built, "FLAGS", built.FLAGS[1:])  # not optimized: that takes seconds
    with pytest.raises(RuntimeError, match="differ"):
        built._load()
    assert not list((tmp_path / "build").glob("*.so"))


def test_torch_and_the_kernels_share_one_pool_of_threads():
    built.library()
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([file for file in files if re.search(r"/lib[gi]?omp\d*[.-]", file)]) == 1


def write_maps(tmp_path, *files):
    """A table of mapped files as Linux writes it."""
    lines = ["7f00-7f01 rw-p 00000000 00:00 0 ", "7f02-7f03 rw-p 00000000 00:00 0   [heap]"]
    lines += [f"7f04-7f05 r-xp 00000000 fe:01 1234    {file}" for file in files]
    (tmp_path / "maps").write_text("\n".join(lines))
    return tmp_path / "maps"


@pytest.mark.parametrize("folder", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a1b2.so.1.0.0"])
def test_torchs_own_openmp_is_found_beside_another_packages(tmp_path, monkeypatch, folder):
    packages = tmp_path / "an environment/lib/site-packages"
    monkeypatch.setattr(torch, "__file__", str(packages / "torch/__init__.py"))
    own, others = packages / folder, [packages / "scikit_learn.libs/libgomp-c3d4.so.1.0.0",
                                      packages / "torchvision.libs/libgomp-e5f6.so.1"]
    assert built._openmp(write_maps(tmp_path, *others, own, own)) == str(own)
    assert built._openmp(write_maps(tmp_path, own)) == str(own)
    assert built._openmp(write_maps(tmp_path, "/usr/lib/libgomp.so.1")) == "/usr/lib/libgomp.so.1"
    with pytest.raises(RuntimeError, match="not clear: none"):
        built._openmp(write_maps(tmp_path, "/usr/lib/libcomp.so"))
    with pytest.raises(RuntimeError, match="not clear: .*libgomp-c3d4"):
        built._openmp(write_maps(tmp_path, *others))


@pytest.mark.parametrize("content", [None, b"", b"model name", b"\xff\0:\n\nflags", b"cpu: 0\n"])
def test_an_odd_cpuinfo_is_no_error(tmp_path, content):
    info = tmp_path / "cpuinfo"
    if content is not None:
        info.write_bytes(content)
    assert isinstance(built._cpu(info), str)
    assert isinstance(machine.hardware(torch.device("cpu"), info), str)


@pytest.mark.parametrize("content, name", [
    ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t: 2\n",
     "AMD EPYC (family 25, model 1)"),
    ("model name : A: CPU\nflags : a\n", "A: CPU")])
def test_hardware_tells_kinds_of_cpu_apart(tmp_path, content, name):
    (tmp_path / "cpuinfo").write_text(content)
    assert machine.hardware(torch.device("cpu"), tmp_path / "cpuinfo") == name


def test_memory_is_used_again_once_no_graph_holds_it(monkeypatch):
    """Two graphs at once have memory of their own, and later ones take it over.

    Another size gives it back.
    """
    monkeypatch.setattr(functions, "_buffers", [])
    torch.manual_seed(0)
    block = accelerate(randomized(ViTBlock(CONFIG, None)))
    h, other = torch.randn(2, 16, 48), torch.randn(2, 16, 48)
    expected = results(block, h)
    graph = block(h.requires_grad_())
    block(other).sum().backward()
    assert len(functions._buffers) == 2
    addresses = {buffer.data_ptr() for buffer in functions._buffers}
    assert torch.equal(torch.autograd.grad(graph, h, torch.ones_like(graph), retain_graph=True)[0],
                       torch.autograd.grad(graph, h, torch.ones_like(graph))[0])
    assert torch.equal(graph, expected[0])
    del graph
    for _ in range(3):
        block(other).sum().backward()
    assert {buffer.data_ptr() for buffer in functions._buffers} == addresses
    block(other[:1]).sum().backward()
    kept = built.library().block_kept(1, 16, 48, CONFIG.num_heads)
    assert [len(buffer) for buffer in functions._buffers] == [kept]
