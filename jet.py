"""Jet, a normalizing flow whose couplings are small ViTs (arXiv 2412.15129): the density model.

An image x is cut into N tokens of D values. Each coupling keeps one half of them, x1, and moves the
other by what a network reads off x1 (the official code's order: add first, then scale):

    z2 = (x2 + bias(x1)) * scale(x1),   scale = m * sigmoid(raw(x1)),   log|det| = sum log scale.

Couplings that take turns in what they keep map x to z ~ N(0, I), and in nats exactly

    log p(x) = log N(z; 0, I) + log|det dz/dx|.

Layouts and formulas are those of the official model (google-research/big_vision, models/proj/jet);
tests/test_parity.py holds this file to its numbers. Shapes: B batch, C x H x W image, p patch size,
N tokens on an (H/p, W/p) grid, D = C*p*p values each, E network width, K heads, M context tokens.
"""
import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SPATIAL_SPLITS = ("checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes",
                  "hstripes-inv")
GELU = {"tanh": "tanh", "exact": "none"}  # ours: PyTorch's


def setting(default, help, choices=None, minimum=1, kind=None, maximum=2 ** 64):
    """A config field: default, the command line's help, and what is allowed: some names, or numbers
    (whole ones from minimum to maximum, others above 0 or the minimum). kind: if not default's."""
    metadata = dict(help=help, choices=choices, minimum=minimum, maximum=maximum, kind=kind)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config):
    """Raise ValueError naming the first field whose value does not fit its type or its choices."""
    for field in dataclasses.fields(config):
        value, what = getattr(config, field.name), field.metadata
        if not what or value is None and field.default is None:
            continue
        value = tuple(value) if isinstance(value, list) else value  # JSON has lists for tuples
        choices, least, kind = what["choices"], what["minimum"], what["kind"] or type(field.default)
        ok, rule = True, f"must be {' or '.join(choices or ())}"
        if choices and kind is tuple:
            ok = isinstance(value, tuple) and value and all(v in choices for v in value)
            rule = f"must be a non-empty list of {', '.join(choices)}"
        elif choices:
            ok = value in choices
        elif kind in (bool, str):
            ok, rule = type(value) is kind, f"must be {'text' if kind is str else 'true or false'}"
        elif kind is int:
            ok = type(value) is int and least <= value <= what["maximum"]
            rule = f"must be a whole number, {least} or more"
            if type(value) is int and value > least:
                rule = f"must be from {least} to {what['maximum']}"
        elif kind is float:
            ok = type(value) in (int, float) and (value > 0 or value == least) and value <= 1e300
            rule = "must be a finite number above 0" + (" or 0" if least == 0 else "")
        if not ok:
            raise ValueError(f"{field.name}={value!r}: {rule}")
        value = float(value) if kind is float else value  # 3 and 3.0 are one configuration
        object.__setattr__(config, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JetConfig:
    """What defines a Jet. Defaults are the official ImageNet-64 model (32 couplings x depth 2).
    Raises ValueError that names the field, the value and the rule."""
    image_size: int | tuple[int, int] = setting(
        (64, 64), "pixels per side, or height and width; train.py takes the image set's")
    channels: int = setting(3, "image channels")
    patch_size: int = setting(4, "pixels per side of a patch, which is a token (official: ps)")
    num_couplings: int = setting(32, "couplings in the flow (official: depth)", maximum=10 ** 7)
    block: str = setting("vit", "a coupling's network: the paper's ViT, our CNN", ("vit", "cnn"))
    block_depth: int = setting(2, "blocks in the network of one coupling", maximum=10 ** 7)
    emb_dim: int = setting(512, "width of the network")
    num_heads: int = setting(8, "attention heads (vit only)")
    scale_factor: float = setting(2.0, "m in scale = m * sigmoid(raw): the largest scale")
    kinds: tuple = setting(("channels",) * 4 + ("spatial",), "what couplings halve, cycled",
                           ("channels", "spatial"))
    spatial_splits: tuple = setting(SPATIAL_SPLITS, "patterns of spatial couplings, cycled",
                                    SPATIAL_SPLITS)
    split_mode: str = setting("pairing", "pairing: x1 in, x2's bias and scale out (official); "
                              "masking: all tokens in, x2 set to zero", ("pairing", "masking"))
    actnorm: bool = setting(False, "Glow's ActNorm before each coupling")
    invertible_dense: bool = setting(False, "Glow's invertible dense layer before each coupling")
    gelu: str = setting("tanh", "GELU: tanh approximation (official) or exact", (*GELU,))
    norm_eps: float = setting(1e-6, "epsilon of LayerNorm")
    context_dim: int = setting(0, "values of a context token: classes; 0: no context", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)
        sides = self.image_shape[1:]
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"image_size={self.image_size!r}: must be a whole number, 1 or more, "
                             "or two of them (height and width)")
        if sides[0] == sides[1]:
            object.__setattr__(self, "image_size", sides[0])
        if any(side % self.patch_size for side in sides):
            raise ValueError(f"patch_size={self.patch_size}: must divide image_size="
                             f"{self.image_size}")
        if self.has_heads and self.emb_dim % self.num_heads:
            raise ValueError(f"emb_dim={self.emb_dim}: must be divisible by "
                             f"num_heads={self.num_heads}")
        where = f"with image_size={self.image_size} and patch_size={self.patch_size}: the"
        if ("channels" in self.kinds or self.split_mode == "pairing") and self.token_dim % 2:
            raise ValueError(f"channels={self.channels} {where} {self.token_dim} values of a token "
                             "must be an even number to be halved")
        for split in self.spatial_splits if "spatial" in self.kinds else ():
            rows, tokens = (self.grid[0], "token rows"), (self.num_tokens, "tokens")
            count, things = rows if split.startswith("hstripes") else tokens
            if count % 2:
                raise ValueError(f"spatial_splits={split!r} {where} {count} {things} must be an "
                                 "even number to be halved (kinds=('channels',) needs none)")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.image_size
        return (self.channels, *(size if isinstance(size, tuple) else (size, size)))

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns, (H/p, W/p)."""
        return self.image_shape[1] // self.patch_size, self.image_shape[2] // self.patch_size

    has_heads = property(lambda self: self.block == "vit" or self.context_dim > 0)
    num_tokens = property(lambda self: self.grid[0] * self.grid[1])
    token_dim = property(lambda self: self.channels * self.patch_size ** 2)

    @property
    def coupling_splits(self) -> tuple[tuple[str, str | None], ...]:
        """(kind, spatial split or None) of each coupling: splits cycle over spatial ones."""
        splits = itertools.cycle(self.spatial_splits)
        period = [(kind, next(splits) if kind == "spatial" else None)
                  for _ in self.spatial_splits for kind in self.kinds]
        return tuple(itertools.islice(itertools.cycle(period), self.num_couplings))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, config):
        super().__init__()
        E, self.num_heads = config.emb_dim, config.num_heads
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        for weight in (*self.qkv.weight.chunk(3), self.out.weight):  # q, k, v each on their own
            nn.init.xavier_uniform_(weight)
        for layer in (self.qkv, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        B, N, E = h.shape
        qkv = self.qkv(h).view(B, N, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, K, N, E/K)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, E))


class ViTBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config, grid):
        super().__init__()
        E, eps, self.gelu = config.emb_dim, config.norm_eps, nn.GELU(GELU[config.gelu])
        self.norm1, self.attention = nn.LayerNorm(E, eps), Attention(config)
        self.norm2 = nn.LayerNorm(E, eps)
        self.fc1, self.fc2 = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        for fc in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.normal_(fc.bias, std=1e-6)

    def forward(self, h):
        h = h + self.attention(self.norm1(h))
        return h + self.fc2(self.gelu(self.fc1(self.norm2(h))))


class CrossAttention(nn.Module):
    """The tokens ask a context (B, M, context_dim), a label's is one-hot with M = 1. Fresh it adds
    nothing. Source: the official model's MultiHeadDotProductAttention_0 before its blocks."""

    def __init__(self, config):
        super().__init__()
        E, self.num_heads = config.emb_dim, config.num_heads
        self.query, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.key_value = nn.Linear(config.context_dim, 2 * E)
        for weight in (self.query.weight, *self.key_value.weight.chunk(2)):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out.weight)
        for layer in (self.query, self.key_value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, h, context):
        B, N, E = h.shape
        q = self.query(h).view(B, N, self.num_heads, E // self.num_heads).transpose(1, 2)
        k, v = self.key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Not fused: a gradient that is 0 (of all scores where M = 1) is 0, no noise for Adam.
        scores = q @ k.mT / math.sqrt(E // self.num_heads)  # (B, K, N, M)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, E))


class CNNBlock(nn.Module):
    """Our choice for Figure 2a, whose block is not known: twice norm, GELU, 3x3 convolution."""

    def __init__(self, config, grid):
        super().__init__()
        E, self.grid, self.gelu = config.emb_dim, grid, nn.GELU(GELU[config.gelu])
        self.norms = nn.ModuleList(nn.LayerNorm(E, eps=config.norm_eps) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(E, E, 3, padding=1) for _ in range(2))
        for conv in self.convs:
            _lecun_normal(conv)

    def forward(self, h):
        residual = h
        for norm, conv in zip(self.norms, self.convs):
            residual = self.gelu(norm(residual)).unflatten(1, self.grid).permute(0, 3, 1, 2)
            residual = conv(residual).permute(0, 2, 3, 1).flatten(1, 2)  # (B, E, h, w) -> (B, N, E)
        return h + residual


class Predictor(nn.Module):
    """The network of one coupling: tokens (B, N, in) -> bias and raw scale, joined, (B, N, out)."""

    def __init__(self, config, in_dim, out_dim, grid):
        super().__init__()
        E, block = config.emb_dim, {"vit": ViTBlock, "cnn": CNNBlock}[config.block]
        self.init_proj = nn.Linear(in_dim, E)
        self.posemb = nn.Parameter(torch.randn(config.num_tokens, E) / math.sqrt(E))
        self.cross_attention = None  # or a CrossAttention
        self.blocks = nn.ModuleList(block(config, grid) for _ in range(config.block_depth))
        self.final_norm = nn.LayerNorm(E, eps=config.norm_eps)
        self.final_proj = nn.Linear(E, out_dim)
        _lecun_normal(self.init_proj)
        nn.init.zeros_(self.final_proj.weight)  # a fresh coupling adds nothing and scales by m/2
        nn.init.zeros_(self.final_proj.bias)

    def embed(self, x, context):
        """The network's input (B, N, E)."""
        h = self.init_proj(x) + self.posemb
        return h if self.cross_attention is None else h + self.cross_attention(h, context)

    def forward(self, x, context=None):
        h = self.embed(x, context)
        for block in self.blocks:
            h = block(h)
        return self.final_proj(self.final_norm(h))


def _lecun_normal(layer):
    """flax's default kernel: a normal cut at two deviations, rescaled to variance 1/fan_in."""
    std = 1 / math.sqrt(layer.weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


def spatial_order(split, rows, columns):
    """Token indices (N,) of a named spatial split: the first half conditions, the second is moved.
    Parities of the flat index, ascending within each, as in the official code: an odd number of
    columns gives its checkerboard unequal parts, and it is cut in the middle all the same."""
    token = torch.arange(rows * columns)
    row = token // columns
    name, _, inverse = split.partition("-")
    parity = {"checkerboard": token + row, "vstripes": token, "hstripes": row}[name] % 2
    return torch.argsort(1 - parity if inverse else parity, stable=True)


class Coupling(nn.Module):
    """One affine coupling on tokens (B, N, D); x1 stays as it is, to the bit. "channels" halves a
    token's values by a fixed random permutation, "spatial" the tokens by a named pattern."""

    def __init__(self, config, kind, split):
        super().__init__()
        D, grid = config.token_dim, config.grid
        self.scale_factor = config.scale_factor
        self.masking = config.split_mode == "masking"
        self.axis = 2 if kind == "channels" else 1
        order = torch.randperm(D) if kind == "channels" else spatial_order(split, *grid)
        self.register_buffer("order", order)  # x1's indices, then x2's
        in_dim, out_dim = (D, 2 * D) if self.masking else (D // 2, D)
        if not self.masking and kind == "spatial" and split.startswith("hstripes"):
            # Half the rows, each token cut in two: the convolutions of a CNN see neighbours.
            grid = (grid[0] // 2, grid[1] * 2)
        self.net = Predictor(config, in_dim, out_dim, grid)

    def split(self, x):
        """x (B, N, D) -> x1, which is kept, and x2, which is moved."""
        kept, moved = self.order.chunk(2)
        if self.axis == 2:  # gather is faster than index_select along the last axis
            x1 = x.gather(2, kept.expand(*x.shape[:2], -1))
        else:
            x1 = x.index_select(1, kept)
        return x1, x.index_select(self.axis, moved)

    def network(self, x1, context=None):
        """What the network reads off x1: bias and raw scale side by side, (B, N, out)."""
        if self.masking:  # our reading of the paper: x2 is zeroed, outputs at x2's places are used
            zeros = x1.new_zeros(len(x1), len(self.net.posemb), self.net.init_proj.in_features)
            return self.net(zeros.index_copy(self.axis, self.order.chunk(2)[0], x1), context)
        # A half of the tokens becomes N tokens of D/2 values, like a half of the channels.
        return self.net(x1.reshape(len(x1), len(self.net.posemb), -1), context)

    def affine(self, net_out, x2):
        """The network's answer -> bias, scale in x2's shape and type, and log|det| (B,) in nats."""
        bias, raw = net_out.chunk(2, dim=-1)
        if self.masking:
            bias, raw = self.split(bias)[1], self.split(raw)[1]
        # Under autocast the network answers in bfloat16. From here on all is computed from the same
        # numbers in x2's precision, or log-det and inverse would not fit what was applied.
        bias, raw = bias.reshape(x2.shape).to(x2.dtype), raw.reshape(x2.shape).to(x2.dtype)
        scale = self.scale_factor * torch.sigmoid(raw)
        log_scale = F.logsigmoid(raw) + math.log(self.scale_factor)
        return bias, scale, log_scale.flatten(1).sum(1)

    def join(self, x, x2):
        """x (B, N, D) with another x2; x1 stays."""
        return x.index_copy(self.axis, self.order.chunk(2)[1], x2)

    def forward(self, x, context=None):
        """x (B, N, D) -> z (B, N, D), log|det dz/dx| (B,) in nats."""
        x1, x2 = self.split(x)
        bias, scale, logdet = self.affine(self.network(x1, context), x2)
        return self.join(x, (x2 + bias) * scale), logdet

    def inverse(self, z, context=None):
        """z (B, N, D) -> x (B, N, D), log|det dx/dz| (B,) in nats."""
        z1, z2 = self.split(z)  # z1 is x1
        bias, scale, logdet = self.affine(self.network(z1, context), z2)
        return self.join(z, z2 / scale - bias), -logdet


class ActNorm(nn.Module):
    """Glow's ActNorm: one shift and one scale per value of a token, shared by all tokens."""

    def __init__(self, dim):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def initialize(self, x):
        """Give this layer's output mean 0 and deviation 1 on the tokens x (B, N, D)."""
        self.bias.copy_(-x.mean((0, 1)))
        self.log_scale.copy_(-torch.log(x.std((0, 1), correction=0) + 1e-6))

    def forward(self, x, context=None):
        logdet = (x.shape[1] * self.log_scale.sum()).expand(len(x))
        return (x + self.bias) * self.log_scale.exp(), logdet

    def inverse(self, z, context=None):
        logdet = (-z.shape[1] * self.log_scale.sum()).expand(len(z))
        return z * (-self.log_scale).exp() - self.bias, logdet


class InvertibleDense(nn.Module):
    """Glow's invertible 1x1 convolution on a token's values: z = W x, W = P L U, first a rotation.
    P is a fixed permutation, L unit lower triangular, U upper triangular with diagonal
    sign * exp(log_diagonal), so log|det W| = sum log_diagonal."""

    def __init__(self, dim):
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(dim, dim))
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("order", permutation.argmax(1))
        self.register_buffer("sign", upper.diagonal().sign())
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def _factors(self):
        lower = self.lower.tril(-1) + torch.ones_like(self.log_diagonal).diag()
        return lower, self.upper.triu(1) + (self.sign * self.log_diagonal.exp()).diag()

    def forward(self, x, context=None):
        lower, upper = self._factors()
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # as the log-det is
            z = (x @ (lower @ upper).T).index_select(2, self.order)
        return z, (x.shape[1] * self.log_diagonal.sum()).expand(len(x))

    def inverse(self, z, context=None):
        lower, upper = self._factors()
        x = z.index_copy(2, self.order, z).flatten(0, 1).T  # undo P; (D, B*N)
        x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x, upper=True).T.reshape(z.shape)
        return x, (-z.shape[1] * self.log_diagonal.sum()).expand(len(z))


class Jet(nn.Module):
    """The flow x <-> z between images and standard-normal noise of the same shape. Fresh, without
    switches and with m = 2, it is the identity. torch's global random numbers initialise it.
    With context_dim a context (B, M, context_dim) goes with x and z: for labels M = 1, one-hot."""

    def __init__(self, config: JetConfig) -> None:
        super().__init__()
        self.config, self.checkpoint_activations = config, False  # True: backward recomputes them
        D, each = config.token_dim, range(config.num_couplings)
        self.couplings = nn.ModuleList(Coupling(config, *split) for split in config.coupling_splits)
        self.actnorms = nn.ModuleList(ActNorm(D) for _ in each if config.actnorm)
        self.denses = nn.ModuleList(InvertibleDense(D) for _ in each if config.invertible_dense)
        for coupling in self.couplings if config.context_dim else ():  # last: the rest as without
            coupling.get_submodule("net").cross_attention = CrossAttention(config)

    def layers(self) -> list:
        """Every layer in the order of forward: a coupling comes after its switches' layers."""
        groups = [layers for layers in (self.actnorms, self.denses, self.couplings) if len(layers)]
        return [layer for step in zip(*groups) for layer in step]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) float, dequantized -> z of x's shape, logdet (B,) = log|det dz/dx|, nats.
        Raises ValueError for another shape or an integer type."""
        tokens, logdet, context = self.patchify(x), x.new_zeros(len(x)), self._check(x, context)
        for layer in self.layers():
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens, layer_logdet = checkpoint(layer, tokens, *context, use_reentrant=False,
                                                  preserve_rng_state=False)
            else:
                tokens, layer_logdet = layer(tokens, *context)
            logdet = logdet + layer_logdet
        return self.unpatchify(tokens), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) float -> x of z's shape, logdet (B,) = log|det dx/dz|: minus forward's."""
        tokens, logdet, context = self.patchify(z), z.new_zeros(len(z)), self._check(z, context)
        for layer in reversed(self.layers()):
            tokens, layer_logdet = layer.inverse(tokens, *context)
            logdet = logdet + layer_logdet
        return self.unpatchify(tokens), logdet

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set every ActNorm from the images x (B, C, H, W), first layer first; else do nothing."""
        tokens, context = self.patchify(x), self._check(x, context)
        for layer in self.layers() if self.config.actnorm else ():
            if isinstance(layer, ActNorm):
                layer.initialize(tokens)
            tokens, _ = layer(tokens, *context)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0,
               context: Tensor | None = None) -> Tensor:
        """n images, uint8 (n, H, W, C), from z ~ N(0, temperature^2 I), drawn on the generator's
        device. Raises ValueError when the inverse overflows: a scale near 0 makes it explode."""
        weight = self.couplings[0].get_parameter("net.posemb")
        z = torch.randn(n, *self.config.image_shape, generator=generator, dtype=weight.dtype,
                        device=generator.device if generator else weight.device)
        x, _ = self.inverse(temperature * z.to(weight.device), context)
        return quantize(x).permute(0, 2, 3, 1).contiguous()

    def _check(self, x, context):
        """What layers take beside tokens: (context,) or (). ValueError where it does not fit."""
        dim, shape = self.config.context_dim, getattr(context, "shape", None)
        if context is None and not dim:
            return ()
        is_one = dim and shape is not None and len(shape) == 3 and context.is_floating_point()
        if not is_one or not shape[1] or (shape[0], shape[2]) != (len(x), dim):
            given = "no context" if shape is None else f"a {context.dtype} context {tuple(shape)}"
            takes = f"floating-point ({len(x)}, M, {dim})" if dim else "none: context_dim is 0"
            raise ValueError(f"{given} is given, and this Jet takes {takes}")
        return (context.to(x),)

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D): tokens row by row, values by (row, column, channel)."""
        (C, H, W), p = self.config.image_shape, self.config.patch_size
        if x.shape[1:] != (C, H, W) or not x.is_floating_point():
            raise ValueError(f"images of shape {tuple(x.shape)} and type {x.dtype}: this Jet takes "
                             f"floating-point (B, {C}, {H}, {W})")
        x = x.reshape(len(x), C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(len(x), self.config.num_tokens, self.config.token_dim)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, C, H, W)."""
        (C, H, W), p = self.config.image_shape, self.config.patch_size
        x = tokens.reshape(len(tokens), H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(tokens), C, H, W)


def dequantize(images_u8: object, noise_u: object) -> Tensor:
    """x = -1 + u8/255*2 + noise/127.5, in [-1, 1 + 1/127.5): the 256 bins tile it exactly.
    images_u8: uint8, any shape; noise_u: floats of that shape in [0, 1), whose type x has.
    Source: value_range(-1, 1) and the evaluator's noise in big_vision, bit for bit."""
    noise_u = torch.as_tensor(noise_u)
    return torch.as_tensor(images_u8).to(noise_u.dtype) / 255 * 2 - 1 + noise_u / 127.5


def quantize(x: object) -> Tensor:
    """floor((x + 1) * 127.5) clipped to 0..255 as uint8: undoes dequantize (float32: for noise in
    [1e-3, 1 - 1e-3]; nearer an edge it may round into the next bin). ValueError if not finite."""
    x = torch.as_tensor(x)
    if not x.isfinite().all():
        raise ValueError(f"{(~x.isfinite()).sum()} of {x.numel()} values are not finite: "
                         "no image can be made of them")
    return ((x + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)


def bits_per_dim(z: Tensor, logdet: Tensor) -> Tensor:
    """Negative log-likelihood in bits per dimension (B,) of 8-bit images, from Jet's (z, logdet).

    z (B, ...) under N(0, I); logdet (B,) in nats. x spans 1/127.5 per grey level, so log(127.5) a
    dimension makes the density of x one of the 256 levels (official: _bits_per_dim)."""
    per_dim = z.square().flatten(1).mean(1) / 2 + math.log(2 * math.pi) / 2 + math.log(127.5)
    return (per_dim - logdet / z.shape[1:].numel()) / math.log(2)
