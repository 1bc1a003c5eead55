"""The parts of a Jet that PyTorch is slow at on CPUs, for float32, in C; jet.py calls them where they fit.

A ViT block with its gradient by hand, LayerNorm and the affine map. Matrix products stay PyTorch's; kernels.c does
what lies between them in one pass each. It is compiled when first needed, within a second, by the machine's C
compiler (CC, else cc), into build/. Where that fails a warning says so and PyTorch's own kernels do the work, which
JET_KERNELS=torch also asks for. The two agree to float32 rounding (tests/test_kernels.py).
"""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import shlex
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).resolve().with_suffix(".c")
BUILD = SOURCE.parent / "build"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-std=gnu11"]
ROWS = 1024  # tokens worked on at once: their values stay in the cache


def fit(x, multiple=1):
    """Whether the C kernels can take this tensor: float32 on the CPU, in plain eager mode, rows of a multiple."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and type(x) is torch.Tensor
            and x.shape[-1] % multiple == 0 and x.numel() > 0
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()  # a FLOP counter must see PyTorch's kernels
            and not torch._C._are_functorch_transforms_active() and _library() is not None)


def vit_block(h, norm1, qkv, out, norm2, fc1, fc2, num_heads):
    """The pre-norm transformer block of jet.ViTBlock on h (B, N, E), E a multiple of 16, from its layers."""
    layers = [tensor for layer in (norm1, qkv, out, norm2, fc1, fc2) for tensor in (layer.weight, layer.bias)]
    return _ViTBlock.apply(h, *layers, num_heads, norm1.eps)


def layer_norm(x, norm):
    """norm, a LayerNorm over E (a multiple of 16), of x (..., E)."""
    return _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps)


def affine(x, net, moved, spatial, scale_factor):
    """The affine map of jet.Coupling: x (B, N, D), the network's answer (B, N, D) -> z (B, N, D), logdet (B,)."""
    return _Affine.apply(x, net, moved, spatial, scale_factor)


def affine_inverse(z, net, moved, spatial, scale_factor):
    """Undoes affine, without a gradient: z (B, N, D) -> x (B, N, D), logdet (B,)."""
    return _affine(z, net, moved, spatial, scale_factor, inverse=True)


def name():
    """Which kernels a float32 CPU run uses, for its records: "C" or "torch"."""
    return "torch" if _library() is None else "C"


class _ViTBlock(Function):
    """Works on a few images at a time, so that what one kernel writes is in the cache for the next.

    Keeps for backward, beside the input, what costs a matrix product: qkv and fc1 (both without bias), the
    attention's output, and the residual stream in the middle.
    """

    @staticmethod
    def forward(ctx, h, norm1, norm1_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, fc1, fc1_bias, fc2,
                fc2_bias, num_heads, eps):
        h = h.contiguous()
        B, N, E = h.shape
        keep = any(ctx.needs_input_grad)
        step, result = _images(N), torch.empty_like(h)
        room = _room(13 * step * N * E)
        kept = _buffer(B, N, 9 * E) if keep else room[4 * step * N * E:].view(step, N, 9 * E)
        for x, z, start in zip(h.split(step), result.split(step), range(0, B, step)):
            rows = len(x) * N
            qkv_x, attended, middle, y = _parts(kept[start:start + len(x)] if keep else kept[:len(x)], rows, E)
            normed, activation = room[:rows * E].view(rows, E), room[:rows * 4 * E].view(rows, 4 * E)
            x, z = x.view(rows, E), z.view(rows, E)
            _call("norm_forward", (x, norm1, norm1_bias, normed), rows, E, eps)
            torch.mm(normed, qkv.T, out=qkv_x)
            _call("attention_forward", (qkv_x, qkv_bias, attended), rows // N, N, num_heads, E // num_heads)
            torch.mm(attended, out.T, out=middle)
            _call("add_and_norm", (middle, out_bias, x, norm2, norm2_bias, normed), rows, E, eps)
            torch.mm(normed, fc1.T, out=y)
            _call("gelu_forward", (y, fc1_bias, activation), rows, 4 * E)
            torch.mm(activation, fc2.T, out=z)
            _call("add_and_norm", (z, fc2_bias, middle, None, None, None), rows, E, eps)
        ctx.save_for_backward(h, kept, norm1, norm1_bias, qkv, qkv_bias, out, norm2, norm2_bias, fc1, fc1_bias, fc2)
        ctx.num_heads, ctx.eps = num_heads, eps
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, kept, norm1, norm1_bias, qkv, qkv_bias, out, norm2, norm2_bias, fc1, fc1_bias, fc2 = ctx.saved_tensors
        grad = grad.contiguous()
        B, N, E = h.shape
        grad_h, step = torch.empty_like(h), _images(N)
        grad_qkv, grad_out, grad_fc1, grad_fc2 = (torch.zeros_like(weight) for weight in (qkv, out, fc1, fc2))
        threads = torch.get_num_threads()
        norm1_sums, norm2_sums = h.new_zeros(2, threads, 3, E)
        qkv_sums, fc1_sums = h.new_zeros(threads, 3 * E), h.new_zeros(threads, 4 * E)
        room = _room(10 * step * N * E)
        for x, g, grad_x, kept_x in zip(h.split(step), grad.split(step), grad_h.split(step), kept.split(step)):
            rows = len(x) * N
            x, g, grad_x = x.view(rows, E), g.view(rows, E), grad_x.view(rows, E)
            qkv_x, attended, middle, y = _parts(kept_x, rows, E)
            normed, grad_normed = room[:2 * rows * E].view(2, rows, E)
            activation, grad_y = room[2 * rows * E:10 * rows * E].view(2, rows, 4 * E)
            grad_qkv_x, grad_attended = (room[2 * rows * E:5 * rows * E].view(rows, 3 * E),
                                         room[5 * rows * E:6 * rows * E].view(rows, E))
            torch.mm(g, fc2, out=grad_y)
            _call("gelu_backward", (y, fc1_bias, grad_y, activation, fc1_sums), rows, 4 * E)
            grad_fc2.addmm_(g.T, activation)
            _call("norm_forward", (middle, norm2, norm2_bias, normed), rows, E, ctx.eps)
            grad_fc1.addmm_(grad_y.T, normed)
            torch.mm(grad_y, fc1, out=grad_normed)
            grad_middle = room[9 * rows * E:10 * rows * E].view(rows, E)
            _call("norm_backward", (middle, norm2, grad_normed, g, grad_middle, norm2_sums), rows, E, ctx.eps)
            grad_out.addmm_(grad_middle.T, attended)
            torch.mm(grad_middle, out, out=grad_attended)
            _call("attention_backward", (qkv_x, qkv_bias, grad_attended, grad_qkv_x, qkv_sums), rows // N, N,
                  ctx.num_heads, E // ctx.num_heads)
            _call("norm_forward", (x, norm1, norm1_bias, normed), rows, E, ctx.eps)
            grad_qkv.addmm_(grad_qkv_x.T, normed)
            torch.mm(grad_qkv_x, qkv, out=grad_normed)
            _call("norm_backward", (x, norm1, grad_normed, grad_middle, grad_x, norm1_sums), rows, E, ctx.eps)
        grad_norm1, grad_norm1_bias, _ = norm1_sums.sum(0)
        grad_norm2, grad_norm2_bias, grad_out_bias = norm2_sums.sum(0)
        return (grad_h, grad_norm1, grad_norm1_bias, grad_qkv, qkv_sums.sum(0), grad_out, grad_out_bias, grad_norm2,
                grad_norm2_bias, grad_fc1, fc1_sums.sum(0), grad_fc2, grad.sum((0, 1)), None, None)


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, out = eps, torch.empty_like(x)
        _call("norm_forward", (x, weight, bias, out), x.numel() // len(weight), len(weight), eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), 3, len(weight))
        _call("norm_backward", (x, weight, grad.contiguous(), None, grad_x, sums), x.numel() // len(weight),
              len(weight), ctx.eps)
        grad_weight, grad_bias, _ = sums.sum(0)
        return grad_x, grad_weight, grad_bias, None


class _Affine(Function):
    @staticmethod
    def forward(ctx, x, net, moved, spatial, scale_factor):
        z, logdet = _affine(x, net, moved, spatial, scale_factor, inverse=False)
        ctx.save_for_backward(z, net, moved)
        ctx.spatial, ctx.scale_factor = spatial, scale_factor
        return z, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z, grad_logdet):
        z, net, moved = ctx.saved_tensors
        grad_x, grad_net = torch.empty_like(z), torch.empty_like(z)
        _call("affine_backward", (z, net.contiguous(), moved, grad_z.contiguous(), grad_logdet.contiguous(), grad_x,
                                  grad_net), *z.shape, ctx.spatial, ctx.scale_factor)
        return grad_x, grad_net, None, None, None


def _affine(x, net, moved, spatial, scale_factor, inverse):
    x, z, logdet = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(len(x))
    _call("affine_forward", (x, net.contiguous(), moved, z, logdet), *x.shape, spatial, inverse, scale_factor)
    return z, logdet


_buffers, _lock, _local = [], threading.Lock(), threading.local()


def _buffer(*shape):
    """An uninitialised float32 tensor, in memory that is used again once no tensor but ours holds it.

    Fresh pages from the system cost as much as a fifth of a training step. When another size is asked for,
    idle memory goes back.
    """
    size = math.prod(shape)
    with _lock:
        alone = _holders(torch.empty(1))
        idle = [buffer for buffer in _buffers if _holders(buffer) == alone]
        fitting = [buffer for buffer in idle if len(buffer) == size]
        if not fitting:
            _buffers[:] = [buffer for buffer in _buffers if _holders(buffer) != alone]
            fitting = [torch.empty(size)]
            _buffers.append(fitting[0])
        return fitting[0].view(shape)


def _room(size):
    """Uninitialised float32 values (size,) for one call, of this thread."""
    if not hasattr(_local, "room") or len(_local.room) < size:
        _local.room = torch.empty(size)
    return _local.room[:size]


def _holders(tensor):
    """How many tensors share its memory, counted from an offset that is the same for all."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _images(num_tokens):
    """How many images to work on at once."""
    return max(1, ROWS // num_tokens)


def _parts(kept, rows, E):
    """The kept arrays of some images: qkv (rows, 3E), attention (rows, E), middle (rows, E), fc1 (rows, 4E)."""
    parts = kept.view(-1).split([3 * rows * E, rows * E, rows * E, 4 * rows * E])
    return [part.view(rows, -1) for part in parts]


def _call(function, tensors, *sizes):
    pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
    if getattr(_library(), function)(*pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"{function}: no memory for its work arrays")


@functools.cache
def _library():
    """The compiled kernels, or None where they are unwanted or cannot be had."""
    choice = os.environ.get("JET_KERNELS", "C")
    if choice not in ("C", "torch"):
        raise ValueError(f"JET_KERNELS={choice}: must be C or torch")
    if choice == "torch":
        return None
    try:
        return _load()
    except (OSError, RuntimeError) as error:
        warnings.warn(f"kernels.c cannot be used ({error}): PyTorch's own kernels train small Jets about a third "
                      "slower. A C compiler (CC, else cc) mends it; JET_KERNELS=torch asks for them", stacklevel=3)
        return None


def _load():
    """Build what is not built yet, for this CPU, and open it. Raises OSError or RuntimeError."""
    compiler, runtime = shlex.split(os.environ.get("CC", "cc")), _openmp()
    cpu = re.search("(?s)^.*?\n\n", Path("/proc/cpuinfo").read_text())[0]
    cpu = "".join(line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features")))
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, FLAGS, runtime, cpu)).encode()).hexdigest()[:16]
    path = BUILD / f"kernels-{key}.so"
    if path.exists():
        return _open(path)
    with contextlib.ExitStack() as stack:
        try:
            BUILD.mkdir(exist_ok=True)
            room = stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD))
        except OSError:  # a read-only checkout: built for this process alone
            room = path = stack.enter_context(tempfile.TemporaryDirectory())
        # Linked with the OpenMP that torch has loaded: a second pool of threads would fight over the cores.
        built = Path(room) / "kernels.so"
        done = subprocess.run([*compiler, *FLAGS, SOURCE, "-shared", "-o", built, runtime, "-lm"],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler[0]}: {' '.join(done.stderr.split())[:200] or done.returncode}")
        library = _open(built)
        if path != room:
            os.replace(built, path)
        return library


def _openmp():
    """The file of the OpenMP runtime that torch has loaded."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
             if re.search(r"/lib(g|i|)omp[^/]*\.so[^/]*$", line)}
    if len(files) != 1:
        raise RuntimeError(f"torch's OpenMP library is not clear: {sorted(files) or 'none'}")
    return files.pop()


def _open(path):
    """The kernels in a file, declared, and held against PyTorch's once."""
    library = ctypes.CDLL(str(path))
    pointer, long, whole, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    for name, arrays, sizes in (("attention_forward", 3, [long, whole, whole, whole]),
                                ("attention_backward", 5, [long, whole, whole, whole]),
                                ("norm_forward", 4, [long, whole, real]), ("add_and_norm", 6, [long, whole, real]),
                                ("norm_backward", 6, [long, whole, real]), ("gelu_forward", 3, [long, whole]),
                                ("gelu_backward", 5, [long, whole]),
                                ("affine_forward", 5, [long, whole, whole, whole, whole, real]),
                                ("affine_backward", 7, [long, whole, whole, whole, real])):
        function = getattr(library, name)
        function.argtypes, function.restype = [pointer] * arrays + sizes + [whole], whole
    _check(library)
    return library


def _check(library):
    """Raise RuntimeError where the compiler made something else of it than PyTorch has."""
    x = torch.linspace(-3, 3, 2 * 10 * 48).sin().view(2, 10, 48) * 3
    none, attended, activation = torch.zeros(48), torch.empty(2, 10, 16), torch.empty_like(x)
    library.attention_forward(x.data_ptr(), none.data_ptr(), attended.data_ptr(), 2, 10, 2, 8, 1)
    library.gelu_forward(x.data_ptr(), none.data_ptr(), activation.data_ptr(), 20, 48, 1)
    q, k, v = x.view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 10, 16)
    if not (torch.allclose(attended, expected, atol=1e-5)
            and torch.allclose(activation, F.gelu(x, approximate="tanh"), atol=1e-5)):
        raise RuntimeError("its results differ from PyTorch's")
