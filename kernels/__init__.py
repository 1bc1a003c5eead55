"""A faster Jet on CPUs, to float32 rounding: kernels.accelerate(jet).

A ViT block with its gradient by hand, LayerNorm and the affine map, in C (tests/test_kernels.py
holds them to PyTorch's). jet.py knows nothing of it. JET_KERNELS=torch asks for PyTorch's own.
"""
import torch

from jet import Coupling, Predictor, ViTBlock
from kernels.compiled import library
from kernels.functions import affine, affine_inverse, layer_norm, vit_block


def accelerate(module):
    """The Jet (or a part of one) itself, its layers changed in place to use the C kernels.

    Parameters, names and state_dict stay, so that it may come before or after an optimizer is made.
    Does nothing where C cannot serve: not float32 on a CPU, a width that is no multiple of 16,
    exact GELU, JET_KERNELS=torch, or no compiler (which a warning says).
    """
    weight, parts = next(module.parameters()), list(module.modules())
    is_served = weight.device.type == "cpu" and weight.dtype == torch.float32
    if is_served and all(map(serves, parts)) and library():
        for part in parts:
            part.__class__ = FAST.get(type(part), type(part))
    return module


def serves(part):
    """Whether C can do the work of a layer (of a type that it does nothing for, it can)."""
    if isinstance(part, ViTBlock):
        return part.norm1.weight.numel() % 16 == 0 and part.gelu.approximate == "tanh"
    return not isinstance(part, Predictor) or part.final_norm.weight.numel() % 16 == 0


def used_by(jet):
    """What computes this Jet on a CPU, for records: "C" or "torch"; None on a GPU."""
    weight = next(jet.parameters())
    if weight.device.type != "cpu":
        return None
    is_fast = isinstance(jet.couplings[0], FastCoupling) and weight.dtype == torch.float32
    return "C" if is_fast else "torch"


def supports(x):
    """Whether the C kernels can take this tensor: float32 on the CPU, in plain eager mode."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and type(x) is torch.Tensor
            and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()  # FLOP counters must see PyTorch's
            and not torch._C._are_functorch_transforms_active())


class FastViTBlock(ViTBlock):
    def forward(self, h):
        if not supports(h):
            return super().forward(h)
        attention = self.attention
        return vit_block(h, self.norm1, attention.qkv, attention.out, self.norm2, self.fc1,
                         self.fc2, attention.num_heads)


class FastPredictor(Predictor):
    def forward(self, x, context=None):
        h = self.embed(x, context)
        for block in self.blocks:
            h = block(h)
        h = layer_norm(h, self.final_norm) if supports(h) else self.final_norm(h)
        return self.final_proj(h)


class FastCoupling(Coupling):
    def forward(self, x, context=None):
        if self.masking or not supports(x):
            return super().forward(x, context)
        net_out = self.network(self.split(x)[0], context)
        return affine(x, net_out, self.order.chunk(2)[1], self.axis == 1, self.scale_factor)

    def inverse(self, z, context=None):
        if self.masking or torch.is_grad_enabled() or not supports(z):
            return super().inverse(z, context)
        net_out = self.network(self.split(z)[0], context)
        return affine_inverse(z, net_out, self.order.chunk(2)[1], self.axis == 1, self.scale_factor)


FAST = {ViTBlock: FastViTBlock, Predictor: FastPredictor, Coupling: FastCoupling}
