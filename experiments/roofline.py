"""The fastest that a training step can be on an H100 and an H200, computed as Markdown.

    python experiments/roofline.py > docs/roofline.md
    python experiments/roofline.py --check               # is docs/roofline.md still right?

Ten seconds, no GPU. The page names its assumptions.
"""
import dataclasses
import itertools
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.cost_table import ADAM_BYTES, MEMORY_RATE
from experiments.throughput_cases import SIZES
from harness.errors import TrainingError
from harness.flags import ArgumentParser, one_line_errors
from harness.flops import forward_flops, num_parameters
from harness.host import ROOT
from jet import Coupling, Jet, JetConfig, ViTBlock
from recipe import TrainConfig, make_optimizer, training_step
from sweeps.plan import GPU_PEAKS, number

PAGE = ROOT / "docs/roofline.md"
MEMORY_RATES = {"H100": MEMORY_RATE, "H200": 4.8e12}  # bytes/s, SXM, by the data sheets; same peaks
LAUNCH_S = 5e-6  # seconds that eager PyTorch takes to launch an operator (assumed)
PASS_FLOPS = 10  # float32 FLOPs for each number of an element-wise pass (assumed)
STEPS = {  # what a GPU trains in one step: (size, images, how the page puts it)
    "32x2": (JetConfig(**SIZES["32x2"]), 128, "the paper's batch of 1,024 on 8 GPUs"),
    "64x5": (JetConfig(**SIZES["64x5"]), 32, "the paper's batch of 1,024 on 32 GPUs"),
    "medium": (JetConfig(**SIZES["medium"]), 256, "the ablations' `--scale medium`"),
}
IMAGES, SPLIT, INIT, NORMS, QKV, SCORES, OUT, MLP, GELU, FINAL, AFFINE, CASTS, CLIP, ADAM = (
    "patchify, loss", "split", "init_proj", "posemb, sums, LayerNorms", "qkv", "attention",
    "out projection", "fc1, fc2", "GELU", "final_proj", "affine map, log-det", "casts of weights",
    "clipping", "AdamW")

TORCH_VERSION = ".".join(torch.__version__.split(".")[:2])
INTRODUCTION = f"""# How fast a training step can be

**Computed, not measured.** A step takes at least what its arithmetic, its memory traffic and, in
eager mode, its kernel launches take. These tables count the three for one GPU: each part forward
and backward together, networks in bfloat16, all else in float32, activations kept (they fit in 80
GB by `experiments/cost_table.py`). Made by `python experiments/roofline.py > docs/roofline.md`.

- **Compute** (data sheets, SXM, dense): {number(GPU_PEAKS["bfloat16"] / 1e12)} TFLOP/s in bfloat16
  for matrix products, {number(GPU_PEAKS["float32"] / 1e12)} in float32 for element-wise work, at
  {PASS_FLOPS} FLOPs a number (assumed; softmax is not counted). A product has two in backward,
  where attention makes its scores once more.
- **Memory**: {" and ".join(f"{number(rate / 1e12)} TB/s on an {gpu}"
                            for gpu, rate in MEMORY_RATES.items())}. A product reads each operand
  and writes its result once, each at its own width; element-wise work between two products is one
  pass; attention keeps no N x N matrix; clipping reads the gradients; AdamW moves
  {ADAM_BYTES} bytes a parameter. Biases and LayerNorm's own numbers are left out. Less moves where
  a kernel joins a pass to a product, or an array stays in the GPU's cache (50 MB; medium's have 8
  MB and more).
- **Launches**: the operators of the real step in PyTorch {TORCH_VERSION} (counted on a CPU, views
  aside), each as one launch of {LAUNCH_S * 1e6:.0f} µs (assumed). A CUDA graph takes them away.

A part takes the longer of compute and memory. A step takes the sum of its parts or, in eager mode,
all its launches, if they take longer. Bound: what takes longest; "memory; launches" means memory in
a CUDA graph, launches in eager mode. Share of peak: training FLOPs (three forward passes) a second,
of the bfloat16 peak. Measured ([speed.md](speed.md)), a compiled graph of 128 images of 32x2 takes
137.8 ms on an H200 and 157.3 ms on an H100: 1.9 and 1.8 times what is computed here.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a training step, forward and backward together."""
    name: str
    bytes: float  # the fewest through the GPU's memory
    forward_flops: float = 0  # of its matrix products in the forward pass
    product_flops: float = 0  # of all its matrix products
    pass_flops: float = 0  # of its element-wise work
    launches: int = 0

    def seconds(self, gpu):
        """What each term takes alone."""
        products = self.product_flops / GPU_PEAKS["bfloat16"]
        passes = self.pass_flops / GPU_PEAKS["float32"]
        return {"compute": products + passes, "memory": self.bytes / MEMORY_RATES[gpu],
                "launches": self.launches * LAUNCH_S}


def step_parts(config, images):
    """The parts of a training step (ViT, pairing, without the two switches), forward first.

    Networks in bfloat16 (2 bytes), tokens, residual stream and parameters in float32 (4 bytes).
    """
    T, D, E = images * config.num_tokens, config.token_dim, config.emb_dim
    C, L, N = config.num_couplings, config.block_depth, config.num_tokens
    norms = 2 * L + 1  # in a coupling
    params = num_parameters(config)
    cast = params - C * E * (N + 2 * norms)  # of the linear layers: all but posemb and LayerNorms

    def products(name, times, *shapes):
        """Linear layers (fan in, fan out): each of backward's two products costs the same."""
        flops = times * sum(2 * T * i * o for i, o in shapes)
        values = times * sum(T * i + i * o + T * o for i, o in shapes)
        return Part(name=name, forward_flops=flops, product_flops=3 * flops, bytes=3 * 2 * values)

    def passes(name, values, num_bytes, times=2):
        """Element-wise work on so many numbers, once in each direction."""
        return Part(name=name, pass_flops=PASS_FLOPS * times * values, bytes=num_bytes)
    scores = C * L * 4 * T * N * E  # two products; backward has four, and makes the scores again
    return [
        # x and tokens; forward reads z for its squares, backward reads it and writes its gradient
        passes(IMAGES, T * D, T * D * (4 + 4 + 4 + 4 + 4)),
        # forward reads x1 and rounds it; backward adds the network's gradient to x1's
        passes(SPLIT, C * T * D / 2, C * T * D / 2 * ((4 + 2) + (2 + 4 + 4))),
        products(INIT, C, (D // 2, E)),
        # Forward adds a branch to the stream, and writes it and its norm; backward reads both
        # gradients and the stream, and writes the stream's gradient and its rounded copy. The first
        # norm has no stream to read and no gradient of it to write, the last none to read.
        passes(NORMS, C * norms * T * E, C * E * (
            T * norms * ((4 + 2 + 4 + 2) + (2 + 4 + 4 + 4 + 2)) - T * 3 * 4 + N * 2 * 4)),
        products(QKV, C * L, (E, 3 * E)),
        # q, k, v, result; backward reads them and a gradient, writes three; and a sum for each head
        Part(name=SCORES, forward_flops=scores, product_flops=3.5 * scores,
             bytes=C * L * T * (2 * E * (4 + 8) + 2 * 4 * config.num_heads)),
        products(OUT, C * L, (E, E)),
        products(MLP, C * L, (E, 4 * E), (4 * E, E)),
        passes(GELU, C * L * T * 4 * E, C * L * T * 4 * E * ((2 + 2) + (2 + 2 + 2))),
        products(FINAL, C, (E, D)),
        # forward reads tokens and network, writes tokens; backward reads those two and a gradient,
        # writes two gradients
        passes(AFFINE, C * T * D, C * T * D * ((4 + 2 + 4) + (4 + 4 + 2 + 4 + 2))),
        passes(CASTS, cast, cast * ((4 + 2) + (2 + 4))),  # weights, and their gradients back
        passes(CLIP, params, params * 4, 1),  # reads the gradients; AdamW scales them
        passes(ADAM, params, params * ADAM_BYTES, 1)]


class Launches(TorchDispatchMode):
    """Counts the operators of each part, forward and backward. Views launch nothing."""

    def __init__(self):
        super().__init__()
        self.counts, self.part, self.parts_of_nodes = Counter(), IMAGES, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_foreach_norm":  # clipping begins
            self.part = CLIP
        part = self.part
        if name == "_to_copy" and isinstance(args[0], nn.Parameter):
            part = CASTS
        if node := torch._C._current_autograd_node():  # in backward: of whose gradient it is
            part = self.parts_of_nodes.get(node._sequence_nr(), part)
        elif torch.is_grad_enabled():
            # the newest node is this operator's, or, where it needs no gradient, one that is known
            self.parts_of_nodes.setdefault(torch.autograd._get_sequence_nr() - 1, part)
        if not (function.is_view or name == "_unsafe_view" or "empty" in name):
            self.counts[part] += 1
        return function(*args, **(kwargs or {}))

    def watch(self, model, optimizer):
        """From now on, know which part is at work."""
        def begin(part):
            return lambda *_: setattr(self, "part", part)
        for module in model.modules():
            during_and_after = {}
            if isinstance(module, Coupling):
                during_and_after = {module: (SPLIT, IMAGES), module.net.init_proj: (INIT, NORMS),
                                    module.net.final_proj: (FINAL, AFFINE)}
            if isinstance(module, ViTBlock):
                during_and_after = {
                    module.attention: (SCORES, NORMS), module.attention.qkv: (QKV, SCORES),
                    module.attention.out: (OUT, NORMS), module.gelu: (GELU, MLP),
                    module.fc1: (MLP, MLP), module.fc2: (MLP, NORMS)}
            for layer, (during, after) in during_and_after.items():
                layer.register_forward_pre_hook(begin(during))
                layer.register_forward_hook(begin(after))
        optimizer.register_step_pre_hook(begin(ADAM))


def count_launches(config):
    """Operators of each part of the real training step: of a tiny Jet, since size changes none."""
    train_config = TrainConfig(model=config, batch_size=2, precision="bfloat16")
    model, launches, x = Jet(config), Launches(), torch.rand(2, *config.image_shape)
    optimizer = make_optimizer(model.parameters(), train_config)
    training_step(model, optimizer, x, 1, train_config)  # makes Adam's moments
    launches.watch(model, optimizer)
    with launches:
        training_step(model, optimizer, x, 2, train_config)
    return launches.counts


def step_launches(config):
    """Operators of each part of a step: of one coupling, and what each further one adds."""
    p, kinds = config.patch_size, [kind for kind, _ in config.coupling_splits]
    tiny = dataclasses.replace(config, image_size=2 * p, emb_dim=16 * config.num_heads)

    def count(*kinds):
        return count_launches(dataclasses.replace(tiny, kinds=kinds, num_couplings=len(kinds)))
    total = one = count(kinds[0])
    for kind in set(kinds[1:]):
        more = count(kinds[0], kind)
        total = total + Counter({part: kinds[1:].count(kind) * (more[part] - one[part])
                                 for part in more})
    return total


def binding(seconds):
    """Which of compute and memory takes longer."""
    return max(("compute", "memory"), key=seconds.get)


def ceiling(parts, gpu, eager):
    """(seconds, what binds) of the fastest step, eager or in a CUDA graph: one launch for all."""
    each = [part.seconds(gpu) for part in parts]
    terms = {term: sum(seconds[term] for seconds in each) for term in each[0]}
    busy = sum(seconds[binding(seconds)] for seconds in each)
    if eager and terms["launches"] > busy:  # the GPU works off what is launched ahead of it
        return terms["launches"], "launches"
    return busy, binding(terms)


def aligned(rows):
    """Rows of text as a Markdown table, all but its first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
             for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def step_table(parts):
    rows = [["part", "GFLOP", "MB", "launches", "launch µs",
             *(cell for gpu in MEMORY_RATES for cell in (f"{gpu} µs", f"bound on {gpu}"))]]
    for part in parts:
        row = [part.name, *map(number, (
            (part.product_flops + part.pass_flops) / 1e9, part.bytes / 1e6, part.launches,
            part.launches * LAUNCH_S * 1e6))]
        for gpu in MEMORY_RATES:
            seconds = part.seconds(gpu)
            binds = binding(seconds)
            slow_launches = seconds["launches"] > seconds[binds]
            row += [number(seconds[binds] * 1e6), f"{binds}; launches" if slow_launches else binds]
        rows.append(row)
    return aligned(rows)


def summary_table(steps):
    """steps: {size: its parts}."""
    rows = [["size", "GPU", "compute ms", "memory ms", "launch ms", "mode", "step ms", "images/s",
             "share of peak", "bound"]]
    for (size, parts), gpu, mode in itertools.product(steps.items(), MEMORY_RATES,
                                                      ("graph", "eager")):
        config, images, _ = STEPS[size]
        terms = [sum(part.seconds(gpu)[term] for part in parts)
                 for term in ("compute", "memory", "launches")]
        step, binds = ceiling(parts, gpu, eager=mode == "eager")
        share = 3 * forward_flops(config) * images / step / GPU_PEAKS["bfloat16"]
        rows.append([size, gpu, *(number(1e3 * term) for term in terms), mode, number(1e3 * step),
                     number(images / step), f"{share:.0%}", binds])
    return aligned(rows)


def page():
    """The whole of docs/roofline.md."""
    steps, sizes = {}, []
    for size, (config, images, why) in STEPS.items():
        launches = step_launches(config)
        steps[size] = [dataclasses.replace(part, launches=launches[part.name])
                       for part in step_parts(config, images)]
        flops, params = 3 * forward_flops(config) * images, num_parameters(config)
        sizes.append(
            f"## {size}\n\n{images} images, {why}: {config.image_shape[1]} px, "
            f"{config.num_couplings} couplings x depth {config.block_depth},\n"
            f"width {config.emb_dim}, {config.num_heads} heads; {number(params / 1e6)} million "
            f"parameters, {number(flops / 1e12)} training TFLOP a step.\n\n"
            f"{step_table(steps[size])}\n")
    return "\n".join([INTRODUCTION, summary_table(steps), "", *sizes])


def main(arguments=None):
    parser = ArgumentParser(prog="roofline.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare docs/roofline.md instead")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a second one has nothing to do
    with one_line_errors(parser.prog):
        text = page()
        if not flags.check:
            print(text, end="")
        elif PAGE.read_text() != text:
            raise TrainingError(f"{PAGE} is not what the code says with PyTorch {TORCH_VERSION}: "
                                "python experiments/roofline.py > docs/roofline.md")


if __name__ == "__main__":
    main()
