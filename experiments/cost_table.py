"""What paper scale needs: memory, hours and gradient traffic, as Markdown.

    python experiments/cost_table.py > docs/cost.md      # half a minute, no GPU
"""
import dataclasses
import functools
import importlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.throughput_cases import SIZES
from harness.flags import ArgumentParser, one_line_errors
from harness.flops import forward_flops, num_parameters, train_flops
from harness.host import ROOT
from harness.memory import activation_bytes, fixed_bytes, image_bytes
from jet import Jet, JetConfig
from paper_figures import throughput as figure
from recipe import TrainConfig
from sweeps.grid import make_runs
from sweeps.plan import GPU_PEAKS, GPU_SHARE, number

CARDS = (24, 80, 141)  # GB, 1e9 bytes
CONTEXT = 1e9  # bytes of a card that CUDA, its libraries and fragments take (assumed)
# Bytes/s of a GPU: HBM3, to its node, to other nodes (400 Gb/s)
MEMORY_RATE, NVLINK, NETWORK = 3.35e12, 450e9, 50e9
ADAM_BYTES = 28  # a parameter: it reads weight, gradient, moments, and writes all but the gradient
NODE, BUCKET = 8, 25 * 2 ** 20  # its GPUs; bytes of the last gradients, with nothing to hide behind
PRECISIONS = ("float32", "bfloat16")
GPUS = (8, 16, 32, 64, 128, 256, 512)
PAPER_SIZES = ("32x2", "64x5")

INTRODUCTION = f"""# What paper scale needs

Memory, hours and gradient traffic of the paper's models and figures. No run of paper scale was
made: what is marked measured is from results/throughput_<device>.csv, all else is computed, and
each table names its assumptions. Made by `python experiments/cost_table.py > docs/cost.md`; what a
training step can reach at best is in [roofline.md](roofline.md).

## The largest batch in training

**Batches: computed, not measured.** Memory: 16 bytes a parameter (weight,
gradient, Adam's two moments; in bfloat16 2 more for autocast's copies), what autograd keeps of an
image (counted on a CPU; with checkpointing each layer's input and all of one coupling), two
MLP-wide gradients, and {CONTEXT / 1e9:.0f} GB for CUDA (assumed). `train.py` plans with the same
model (harness/memory.py). Speed: {{speeds}}. Checkpointing computes four forward passes for three.
"""
HOURS = f"""
## The hours of the paper's figures

**In bfloat16: computed, not measured,** from the training FLOPs (three forward passes) and the
{GPU_SHARE * GPU_PEAKS['bfloat16'] / 1e12:.0f} TFLOP/s assumed above. GPU-hours: one GPU, no
traffic. On more, each run has all of them, with the traffic below.
"""
TRAFFIC = f"""
## Gradient traffic

**At a global batch of {TrainConfig.batch_size:,}: computed, not measured.** Assumed: the speed
above; all-reduce of float32 gradients, 2 (n-1)/n x 4 bytes x parameters a step and GPU, at
{NVLINK / 1e9:.0f} GB/s within nodes of {NODE} and {NETWORK / 1e9:.0f} GB/s a GPU between them; all
but the last {BUCKET / 2 ** 20:.0f} MiB beside backward; Adam on every GPU at
{MEMORY_RATE / 1e12:.2f} TB/s of memory; few images as fast, each, as many, which they are not.
"""


def coupling_bytes(config, precision):
    """Bytes per image that one coupling keeps for backward, the mean of a cycle of kinds.

    Counted with one block and with two: each further one keeps as much as the second.
    """
    cycle = dataclasses.replace(config, num_couplings=len(config.kinds))
    one, two = (_counted_bytes(dataclasses.replace(cycle, block_depth=depth), precision)
                for depth in (1, min(2, config.block_depth)))
    return one + (config.block_depth - 1) * (two - one)


@functools.cache
def _counted_bytes(cycle, precision):
    with torch.device("meta"):  # sizes, and no values
        jet = Jet(cycle)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return activation_bytes(jet.to_empty(device="cpu"), precision) / cycle.num_couplings


def largest_batch(card_gb, fixed, per_image):
    """Images that fit on a card; 0 where not even one does."""
    return max(0, int((card_gb * 1e9 - CONTEXT - fixed) // per_image))


def comm_seconds(params, gpus):
    """All-reduce of float32 gradients: 2 (n-1)/n x 4 bytes x parameters through each GPU.

    Within its node first; then each GPU takes its share of the node's sum to the other nodes.
    """
    within = min(gpus, NODE)
    nodes = gpus / within
    inside, outside = (within - 1) / within, (nodes - 1) / nodes / within
    return 4 * params * 2 * (inside / NVLINK + outside / NETWORK)


def step_seconds(flops, params, rate, gpus):
    """Seconds of (a training step, its traffic, its backward) of so many FLOPs over all GPUs.

    The traffic runs beside backward, but for the last bucket; then comes Adam.
    """
    compute, traffic = flops / rate / gpus, comm_seconds(params, gpus)
    backward, last = 2 / 3 * compute, traffic * min(1, BUCKET / (4 * params))
    adam = params * ADAM_BYTES / MEMORY_RATE
    return compute / 3 + max(backward, traffic - last) + last + adam, traffic, backward


def stops_scaling(flops, params, rate, gpus=GPUS):
    """The first number of GPUs whose traffic takes longer than backward, or None."""
    steps = {n: step_seconds(flops, params, rate, n) for n in gpus}
    return next((n for n, (_, traffic, backward) in steps.items() if traffic > backward), None)


def table(heading, rows):
    """Rows of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def measured_rates(measured):
    """A line on the best training FLOP/s of a GPU in the paper's sizes, as far as measured."""
    peak, lines = GPU_SHARE * GPU_PEAKS["bfloat16"], []
    for size in PAPER_SIZES:
        rows = [row for row in measured
                if (row["device"], row["size"], row["precision"]) == ("cuda", size, "bfloat16")]
        if rows:
            best = max(rows, key=lambda row: row["flops_per_s"])
            lines.append(f"Measured: {size} trains at {best['flops_per_s'] / 1e12:.0f} TFLOP/s on "
                         f"one {best['hardware']}; hours there are "
                         f"{peak / best['flops_per_s']:.2f} times these.")
    return "\n\n" + "\n".join(lines) if lines else ""


def memory_table(measured):
    rows = []
    for size, precision in itertools.product(SIZES, PRECISIONS):
        config = JetConfig(**SIZES[size])
        coupling = coupling_bytes(config, precision)
        fixed = fixed_bytes(num_parameters(config), precision)
        for recompute, answer, forwards in ((False, "no", 3), (True, "yes", 4)):
            per_image = image_bytes(config, precision, recompute, coupling)
            batches = [largest_batch(gb, fixed, per_image) for gb in CARDS]
            ran = [row for row in measured if (size, precision, str(recompute)) == (
                row["size"], row["precision"], row["checkpoint_activations"])]
            best = {row["hardware"]: f"{number(row['images_per_s'])} measured ({row['hardware']})"
                    for row in sorted(ran, key=lambda row: row["images_per_s"])}
            if not ran and size in PAPER_SIZES:
                flops = forward_flops(config) * forwards
                speed = GPU_SHARE * GPU_PEAKS[precision] / flops
                best = {"H100": f"{number(speed)} computed (H100)"}
            rows.append([size, precision, answer,
                         f"{fixed / 2 ** 30:.2f} + {per_image / 2 ** 20:.4g}",
                         *(f"{batch:,}" if batch else "does not fit" for batch in batches),
                         "; ".join(best.values())])
    return table(["size", "precision", "checkpointing", "GiB + MiB an image",
                  *(f"{gb} GB" for gb in CARDS), "training images/s"], rows)


def paper_experiments():
    """{item: Experiment} of the scripts whose first line begins with an item of the paper."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        module = importlib.import_module(f"experiments.{path.stem}")
        item, _, _ = module.__doc__.partition(":")
        is_in_paper = item.startswith(("Figure ", "Table ", "The main table"))
        if is_in_paper and hasattr(module, "EXPERIMENT"):
            found[item] = module.EXPERIMENT
    return found


def paper_runs():
    """{what: its training runs (TrainConfig) at paper scale}: the main models, each experiment."""
    runs = {f"main table, {size}": [TrainConfig(model=JetConfig(**SIZES[size]))]
            for size in PAPER_SIZES}
    return runs | {f"{item} (`{experiment.name}`)": [
        run.config for run in make_runs(experiment, "paper", [0], ROOT / "runs")]
        for item, experiment in paper_experiments().items()}


def hours_table(gpus=(8, 64)):
    rows, rate = [], GPU_SHARE * GPU_PEAKS["bfloat16"]
    for what, configs in paper_runs().items():
        flops, hours = sum(map(train_flops, configs)), dict.fromkeys(gpus, 0)
        for config, n in itertools.product(configs, gpus):
            step, _, _ = step_seconds(train_flops(config) / config.total_steps,
                                      num_parameters(config.model), rate, n)
            hours[n] += config.total_steps * step / 3600
        rows.append([what, str(len(configs)), f"{flops:.3g}", number(flops / rate / 3600),
                     *map(number, hours.values())])
    heading = ["what", "runs", "FLOPs", "GPU-hours", *(f"hours on {n} GPUs" for n in gpus)]
    return table(heading, rows)


def traffic_table():
    batch_size, heading, stops = TrainConfig.batch_size, ["GPUs", "images a GPU"], []
    rows = {n: [str(n), str(batch_size // n)] for n in GPUS}
    for size in PAPER_SIZES:
        heading += [f"{size}: step, efficiency", "traffic / backward"]
        config, rate = JetConfig(**SIZES[size]), GPU_SHARE * GPU_PEAKS["bfloat16"]
        work = 3 * batch_size * forward_flops(config), num_parameters(config), rate
        alone, _, _ = step_seconds(*work, 1)
        for n, cells in rows.items():
            step, traffic, backward = step_seconds(*work, n)
            cells += [f"{step * 1e3:.3g} ms, {alone / step / n:.0%}",
                      f"{traffic * 1e3:.2g} / {backward * 1e3:.3g} ms"]
        stops.append(f"{size} at {stops_scaling(*work) or f'more than {GPUS[-1]}'} GPUs")
    return (f"{table(heading, rows.values())}\n\nIt stops scaling where traffic takes longer than "
            f"backward: {', '.join(stops)}.")


def page(results_dir):
    """The whole of docs/cost.md."""
    paths = [results_dir / f"throughput_{device}.csv" for device in ("cpu", "cuda")]
    found = [row for path in paths if path.exists() for row in figure.read(path).to_dict("records")]
    measured = [row for row in found if row["implementation"] == "ours" and row["what"] == "train"]
    gpus = sorted({row["hardware"] for row in measured if row["device"] == "cuda"})
    where = f"measured on {', '.join(gpus)} where marked, else" if gpus else "no GPU was measured:"
    speeds = (f"{where}\n{GPU_SHARE:.0%} (assumed) of an H100 SXM's dense peak, "
              f"{GPU_PEAKS['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16 and "
              f"{GPU_PEAKS['float32'] / 1e12:.0f} in float32")
    return "\n".join([INTRODUCTION.format(speeds=speeds), memory_table(measured),
                      HOURS, hours_table() + measured_rates(measured), TRAFFIC, traffic_table()])


def main(arguments=None):
    parser = ArgumentParser(prog="cost_table.py", description=__doc__)
    parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        print(page(ROOT / "results"))


if __name__ == "__main__":
    main()
