"""The parts of a Jet that PyTorch is slow at on CPUs, with their gradients by hand, on kernels.c.

Matrix products stay PyTorch's; kernels.c does what lies between them in one pass each.
"""
import math
import threading

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.compiled import library

ROWS = 1024  # tokens worked on at once: their values stay in the cache


def vit_block(h, norm1, qkv, out, norm2, fc1, fc2, num_heads):
    """The pre-norm transformer block of jet.ViTBlock on h (B, N, E), E a multiple of 16."""
    weights = [tensor for layer in (norm1, qkv, out, norm2, fc1, fc2)
               for tensor in (layer.weight, layer.bias)]
    return _ViTBlock.apply(h, *weights, num_heads, norm1.eps)


def layer_norm(x, norm):
    """norm, a LayerNorm over E (a multiple of 16), of x (..., E)."""
    return _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps)


def affine(x, net, moved, spatial, scale_factor):
    """The affine map of jet.Coupling: x and the network's answer (B, N, D) -> z, logdet (B,)."""
    return _Affine.apply(x, net, moved, spatial, scale_factor)


def affine_inverse(z, net, moved, spatial, scale_factor):
    """Undoes affine, without a gradient: z (B, N, D) -> x (B, N, D), logdet (B,)."""
    return _affine(z, net, moved, spatial, scale_factor, inverse=True)


class _ViTBlock(Function):
    """Works on a few images at a time, so that what one kernel writes is in the cache for the next.

    Keeps for backward, beside the input, what costs a matrix product: qkv and fc1 (both without
    bias), the attention's output, and the residual stream in the middle.
    """

    @staticmethod
    def forward(ctx, h, norm1, norm1_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, fc1,
                fc1_bias, fc2, fc2_bias, num_heads, eps):
        h = h.contiguous()
        B, N, E = h.shape
        keep = any(ctx.needs_input_grad)
        step, result = _images(N), torch.empty_like(h)
        room = _room(13 * step * N * E)
        kept = _buffer(B, N, 9 * E) if keep else room[4 * step * N * E:].view(step, N, 9 * E)
        for x, z, start in zip(h.split(step), result.split(step), range(0, B, step)):
            rows, first = len(x) * N, start if keep else 0
            qkv_x, attended, middle, y = _parts(kept[first:first + len(x)], rows, E)
            normed = room[:rows * E].view(rows, E)
            activation = room[:rows * 4 * E].view(rows, 4 * E)
            x, z = x.view(rows, E), z.view(rows, E)
            _call("norm_forward", (x, norm1, norm1_bias, normed), rows, E, eps)
            torch.mm(normed, qkv.T, out=qkv_x)
            _call("attention_forward", (qkv_x, qkv_bias, attended), rows // N, N, num_heads,
                  E // num_heads)
            torch.mm(attended, out.T, out=middle)
            _call("add_and_norm", (middle, out_bias, x, norm2, norm2_bias, normed), rows, E, eps)
            torch.mm(normed, fc1.T, out=y)
            _call("gelu_forward", (y, fc1_bias, activation), rows, 4 * E)
            torch.mm(activation, fc2.T, out=z)
            _call("add_and_norm", (z, fc2_bias, middle, None, None, None), rows, E, eps)
        ctx.save_for_backward(h, kept, norm1, norm1_bias, qkv, qkv_bias, out, norm2, norm2_bias,
                              fc1, fc1_bias, fc2)
        ctx.num_heads, ctx.eps = num_heads, eps
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (h, kept, norm1, norm1_bias, qkv, qkv_bias, out, norm2, norm2_bias, fc1, fc1_bias,
         fc2) = ctx.saved_tensors
        grad = grad.contiguous()
        B, N, E = h.shape
        grad_h, step = torch.empty_like(h), _images(N)
        grad_qkv, grad_out, grad_fc1, grad_fc2 = map(torch.zeros_like, (qkv, out, fc1, fc2))
        threads = torch.get_num_threads()
        norm1_sums, norm2_sums = h.new_zeros(2, threads, 3, E)
        qkv_sums, fc1_sums = h.new_zeros(threads, 3 * E), h.new_zeros(threads, 4 * E)
        room = _room(10 * step * N * E)
        for x, g, grad_x, kept_x in zip(*(whole.split(step) for whole in (h, grad, grad_h, kept))):
            rows = len(x) * N
            x, g, grad_x = x.view(rows, E), g.view(rows, E), grad_x.view(rows, E)
            qkv_x, attended, middle, y = _parts(kept_x, rows, E)
            places = room[:10 * rows * E].view(10, rows, E)  # some are used twice
            normed, grad_normed = places[0], places[1]
            grad_attended, grad_middle = places[5], places[9]
            activation, grad_y = places[2:6].view(rows, 4 * E), places[6:].view(rows, 4 * E)
            grad_qkv_x = places[2:5].view(rows, 3 * E)
            torch.mm(g, fc2, out=grad_y)
            _call("gelu_backward", (y, fc1_bias, grad_y, activation, fc1_sums), rows, 4 * E)
            grad_fc2.addmm_(g.T, activation)
            _call("norm_forward", (middle, norm2, norm2_bias, normed), rows, E, ctx.eps)
            grad_fc1.addmm_(grad_y.T, normed)
            torch.mm(grad_y, fc1, out=grad_normed)
            _call("norm_backward", (middle, norm2, grad_normed, g, grad_middle, norm2_sums), rows,
                  E, ctx.eps)
            grad_out.addmm_(grad_middle.T, attended)
            torch.mm(grad_middle, out, out=grad_attended)
            _call("attention_backward", (qkv_x, qkv_bias, grad_attended, grad_qkv_x, qkv_sums),
                  rows // N, N, ctx.num_heads, E // ctx.num_heads)
            _call("norm_forward", (x, norm1, norm1_bias, normed), rows, E, ctx.eps)
            grad_qkv.addmm_(grad_qkv_x.T, normed)
            torch.mm(grad_qkv_x, qkv, out=grad_normed)
            _call("norm_backward", (x, norm1, grad_normed, grad_middle, grad_x, norm1_sums), rows,
                  E, ctx.eps)
        grad_norm1, grad_norm1_bias, _ = norm1_sums.sum(0)
        grad_norm2, grad_norm2_bias, grad_out_bias = norm2_sums.sum(0)
        return (grad_h, grad_norm1, grad_norm1_bias, grad_qkv, qkv_sums.sum(0), grad_out,
                grad_out_bias, grad_norm2, grad_norm2_bias, grad_fc1, fc1_sums.sum(0), grad_fc2,
                grad.sum((0, 1)), None, None)


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
        _call("norm_backward", (x, weight, grad.contiguous(), None, grad_x, sums),
              x.numel() // len(weight), len(weight), ctx.eps)
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
        _call("affine_backward", (z, net.contiguous(), moved, grad_z.contiguous(),
                                  grad_logdet.contiguous(), grad_x, grad_net),
              *z.shape, ctx.spatial, ctx.scale_factor)
        return grad_x, grad_net, None, None, None


def _affine(x, net, moved, spatial, scale_factor, inverse):
    x = x.contiguous()
    z, logdet = torch.empty_like(x), x.new_empty(len(x))
    _call("affine_forward", (x, net.contiguous(), moved, z, logdet), *x.shape, spatial, inverse,
          scale_factor)
    return z, logdet


_buffers, _lock, _local = [], threading.Lock(), threading.local()


def _buffer(*shape):
    """An uninitialised float32 tensor, in memory that is used again once only we hold it.

    Fresh pages from the system cost as much as a fifth of a training step. When another size is
    asked for, idle memory goes back.
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
    """What is kept of some images: qkv (rows, 3E), attention, middle (rows, E), fc1 (rows, 4E)."""
    parts = kept.view(-1).split([3 * rows * E, rows * E, rows * E, 4 * rows * E])
    return [part.view(rows, -1) for part in parts]


def _call(function, tensors, *sizes):
    pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
    if getattr(library(), function)(*pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"{function}: no memory for its work arrays")


