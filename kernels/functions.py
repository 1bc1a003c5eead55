"""The parts of a Jet that PyTorch is slow at on CPUs, with their gradients by hand, on kernels.c.

A whole ViT block is one call: each thread takes a few images at a time through all of it.
"""
import threading

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.compiled import library, pointers


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
    """Keeps for backward, beside the input, what costs a matrix product: qkv and fc1 (both without
    bias), the attention's output, the residual stream in the middle, and the attention's
    probabilities, unless these would more than double the memory.
    """

    @staticmethod
    def forward(ctx, h, *arguments):
        h, (*weights, num_heads, eps) = h.contiguous(), arguments
        weights, out = [weight.contiguous() for weight in weights], torch.empty_like(h)
        sizes = (*h.shape, num_heads)
        kept = _buffer(library().block_kept(*sizes)) if any(ctx.needs_input_grad) else None
        _call("block_forward", (h, pointers(weights), kept, out, _room(sizes)), *sizes, eps)
        ctx.save_for_backward(h, kept, *weights)
        ctx.num_heads, ctx.eps = num_heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, kept, *weights = ctx.saved_tensors
        grad_h, sizes = torch.empty_like(h), (*h.shape, ctx.num_heads)
        sums = h.new_zeros(torch.get_num_threads(), sum(map(torch.Tensor.numel, weights)))
        _call("block_backward", (h, pointers(weights), kept, grad.contiguous(), grad_h, sums,
                                 _room(sizes)), *sizes, ctx.eps)
        matrices_first = sorted(range(len(weights)), key=lambda number: weights[number].dim() < 2)
        sizes = [weights[number].numel() for number in matrices_first]
        grads = dict(zip(matrices_first, _total(sums).split(sizes)))
        return (grad_h, *(grads[number].view_as(weight) for number, weight in enumerate(weights)),
                None, None)


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
        grad_x, sums = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), 2, len(weight))
        _call("norm_backward", (x, weight, grad.contiguous(), grad_x, sums),
              x.numel() // len(weight), len(weight), ctx.eps)
        return grad_x, *_total(sums), None


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


def _buffer(size):
    """An uninitialised float32 tensor (size,), in memory that is used again once only we hold it.

    Fresh pages from the system cost as much as a fifth of a training step. When another size is
    asked for, idle memory goes back.
    """
    with _lock:
        alone = _holders(torch.empty(1))
        idle = [buffer for buffer in _buffers if _holders(buffer) == alone]
        fitting = [buffer for buffer in idle if len(buffer) == size]
        if not fitting:
            _buffers[:] = [buffer for buffer in _buffers if _holders(buffer) != alone]
            fitting = [torch.empty(size)]
            _buffers.append(fitting[0])
        return fitting[0].view(size)


def _room(sizes):
    """Uninitialised float32 values that a block of these sizes works in, of this thread."""
    size = library().block_room(*sizes, torch.get_num_threads())
    if not hasattr(_local, "room") or len(_local.room) < size:
        _local.room = torch.empty(size)
    return _local.room


def _holders(tensor):
    """How many tensors share its memory, counted from an offset that is the same for all."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _total(sums):
    """The sum over threads, (threads, ...)."""
    return sums.sum(0) if len(sums) > 1 else sums[0]


def _call(function, arrays, *sizes):
    addresses = [array.data_ptr() if isinstance(array, torch.Tensor) else array for array in arrays]
    getattr(library(), function)(*addresses, *sizes, torch.get_num_threads())
