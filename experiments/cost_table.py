"""What paper scale needs: memory, hours and gradient traffic, as Markdown for the README.

    python experiments/cost_table.py      # half a minute, no GPU

Rows of results/throughput_<device>.csv are marked measured. All else is computed, and each table names its assumptions.
"""
import dataclasses
import importlib
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments.sweep import GPU_PEAKS as PEAKS, GPU_SHARE as SHARE, num_parameters, number, train_flops
from experiments.throughput import SIZES
from jet import Jet, JetConfig, forward_flops
from paper_figures import throughput as figure
from paper_figures.results_csv import ResultsError
from train import ArgumentParser, TrainConfig, one_line_errors

CARDS = (24, 80, 141)  # GB, 1e9 bytes
CONTEXT = 1e9  # bytes of a card that CUDA, its libraries and fragments take (assumed)
MEMORY_RATE, NVLINK, NETWORK = 3.35e12, 450e9, 50e9  # bytes/s of a GPU: HBM3, to its node, to other nodes (400 Gb/s)
NODE, BUCKET = 8, 25 * 2 ** 20  # GPUs of a node; bytes of the last gradients, which nothing is left to hide behind
PRECISIONS = ("float32", "bfloat16")
GPUS = (8, 16, 32, 64, 128, 256, 512)


# ---- memory

def saved_bytes(config, precision, batch_size):
    """Bytes that a forward pass of a Jet keeps for backward, each storage once, without parameters and buffers.

    Those of PyTorch's own kernels: float32 is run in float64 and halved, since a CPU has kernels of its own for it.
    Nothing is computed: the tensors have sizes and no values.
    """
    autocast = precision == "bfloat16"
    dtype, storages = torch.float32 if autocast else torch.float64, {}
    with torch.device("meta"):
        model = Jet(config).to(dtype)

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no address is used twice
        return tensor
    with (FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast),
          torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)):
        x = torch.empty(batch_size, *config.image_shape, dtype=dtype)
        weights = {name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
                   for name, value in (*model.named_parameters(), *model.named_buffers())}
        torch.func.functional_call(model, weights, x)
    for tensor in weights.values():
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values()) // (1 if autocast else 2)


def coupling_bytes(config, precision):
    """Bytes per image that one coupling keeps for backward, the mean of a cycle of kinds."""
    cycle = dataclasses.replace(config, num_couplings=len(config.kinds))
    one, two = (saved_bytes(cycle, precision, batch_size) for batch_size in (1, 2))  # less what all images share
    return (two - one) / len(config.kinds)


def fixed_bytes(config, precision):
    """Bytes of training that no image adds to: weights, gradients, Adam's two moments; autocast's copies."""
    return num_parameters(config) * (4 + 4 + 8 + (2 if precision == "bfloat16" else 0))


def image_bytes(config, precision, checkpointing, per_coupling):
    """Bytes per image at the peak: what is kept, and two MLP-wide gradients that backward works on.

    Checkpointing keeps each coupling's input, and all of one coupling.
    """
    work = 2 * config.num_tokens * 4 * config.emb_dim * (2 if precision == "bfloat16" else 4)
    tokens = 4 * config.num_tokens * config.token_dim
    kept = config.num_couplings * (tokens if checkpointing else per_coupling)
    return kept + work + (per_coupling if checkpointing else 0)


def largest_batch(card_gb, fixed, per_image):
    """Images that fit on a card; 0 where not even one does."""
    return max(0, int((card_gb * 1e9 - CONTEXT - fixed) // per_image))


# ---- time

def comm_seconds(params, gpus):
    """All-reduce of float32 gradients: 2 (n-1)/n x 4 bytes x parameters through each GPU, within its node first.

    Every GPU takes its share of the node's sum to the other nodes by its own network card.
    """
    within = min(gpus, NODE)
    nodes = gpus / within
    return 4 * params * 2 * ((within - 1) / within / NVLINK + (nodes - 1) / nodes / within / NETWORK)


def step_seconds(flops, params, rate, gpus):
    """A training step of 3 x forward = flops over all GPUs: forward, backward, traffic, Adam.

    The traffic runs beside backward, but for the last bucket. Returns (step, traffic, backward) seconds.
    """
    compute, traffic = flops / rate / gpus, comm_seconds(params, gpus)
    backward, last = 2 / 3 * compute, traffic * min(1, BUCKET / (4 * params))
    adam = params * 28 / MEMORY_RATE  # reads weight, gradient and two moments; writes all but the gradient
    return compute / 3 + max(backward, traffic - last) + last + adam, traffic, backward


def stops_scaling(flops, params, rate, gpus=GPUS):
    """The first number of GPUs whose traffic takes longer than backward; None where there is none."""
    for n in gpus:
        _, traffic, backward = step_seconds(flops, params, rate, n)
        if traffic > backward:
            return n
    return None


# ---- the tables

def measured_rows(results_dir):
    """Our training rows of throughput_cpu.csv and throughput_cuda.csv, as dicts."""
    paths = [path for path in (results_dir / f"throughput_{device}.csv" for device in ("cpu", "cuda")) if path.exists()]
    return [row for path in paths for row in figure.read(path).to_dict("records")
            if row["implementation"] == "ours" and row["what"] == "train"]


def train_rate(size, precision, measured):
    """(FLOP/s of one GPU in training a size, the best "measured" one or else "computed")."""
    rates = [row["flops_per_s"] for row in measured
             if (row["device"], row["size"], row["precision"]) == ("cuda", size, precision)]
    return (max(rates), "measured") if rates else (SHARE * PEAKS[precision], "computed")


def memory_table(measured):
    lines = ["| size | precision | checkpointing | GiB + MiB an image | " + " | ".join(f"{gb} GB" for gb in CARDS)
             + " | training images/s |", "| --- | --- | --- | --- | " + "--- | " * len(CARDS) + "--- |"]
    for size, changes in SIZES.items():
        config = JetConfig(**changes)
        for precision in PRECISIONS:
            per_coupling, fixed = coupling_bytes(config, precision), fixed_bytes(config, precision)
            for checkpointing in (False, True):
                per_image = image_bytes(config, precision, checkpointing, per_coupling)
                mine = [row for row in measured if (row["size"], row["precision"], row["checkpoint_activations"])
                        == (size, precision, str(checkpointing))]
                cells = [_batch_cell(gb, fixed, per_image, mine) for gb in CARDS]
                lines.append(f"| {size} | {precision} | {'yes' if checkpointing else 'no'} | {fixed / 2 ** 30:.2f} + "
                             f"{per_image / 2 ** 20:.4g} | {' | '.join(cells)} | "
                             f"{_speed_cell(size, config, precision, checkpointing, mine)} |")
    return lines


def _batch_cell(gb, fixed, per_image, mine):
    """The largest batch that ran on such a card, or the computed one."""
    ran = [row["batch_size"] for row in mine if abs(row["device_memory_gib"] * 2 ** 30 / 1e9 / gb - 1) < 0.1]
    if ran:
        return f"{max(ran):,.0f} measured"
    batch_size = largest_batch(gb, fixed, per_image)
    return f"{batch_size:,}" if batch_size else "does not fit"


def _speed_cell(size, config, precision, checkpointing, mine):
    """Measured images/s with where, or for the paper's sizes what an H100 would do."""
    if mine:
        best = {row["hardware"]: row["images_per_s"] for row in sorted(mine, key=lambda row: row["images_per_s"])}
        return "; ".join(f"{number(speed)} measured ({hardware})" for hardware, speed in best.items())
    if size not in ("32x2", "64x5"):
        return ""
    speed = SHARE * PEAKS[precision] / forward_flops(config) / (4 if checkpointing else 3)
    return f"{number(speed)} computed (H100)"


def paper_runs():
    """{what: its training runs (TrainConfig) at paper scale}: the main model, and each experiment with a grid."""
    runs = {f"main table, {size}": [TrainConfig(model=JetConfig(**SIZES[size]))] for size in ("32x2", "64x5")}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        module = importlib.import_module(f"experiments.{path.stem}")
        if hasattr(module, "configs"):
            title = module.__doc__.split(":")[0]
            runs[f"{title} (`{path.stem}`)"] = [point.config for point in module.configs("paper")]
    return runs


def hours_table(measured, gpus=(8, 64)):
    lines = ["| what | runs | FLOPs | GPU-hours | " + " | ".join(f"hours on {n} GPUs" for n in gpus)
             + " | speed of a GPU |",
             "| --- | --- | --- | --- | " + "--- | " * len(gpus) + "--- |"]
    for what, configs in paper_runs().items():
        size = "64x5" if "64x5" in what else "32x2"
        rate, mark = train_rate(size, "bfloat16", measured)
        flops = sum(map(train_flops, configs))
        hours = [sum(config.total_steps * step_seconds(train_flops(config) / config.total_steps,
                                                       num_parameters(config.model), rate, n)[0]
                     for config in configs) / 3600 for n in gpus]
        lines.append(f"| {what} | {len(configs)} | {flops:.3g} | {number(flops / rate / 3600)} | "
                     f"{' | '.join(map(number, hours))} | {rate / 1e12:.0f} TFLOP/s {mark} |")
    return lines


def traffic_table(measured):
    lines = ["| GPUs | images a GPU | " + " | ".join(
        f"{size}: step, efficiency | traffic / backward" for size in ("32x2", "64x5")) + " |",
        "| --- | --- | " + "--- | " * 4]
    batch_size, stops = TrainConfig.batch_size, {}
    for n in GPUS:
        cells = []
        for size in ("32x2", "64x5"):
            config, (rate, _) = JetConfig(**SIZES[size]), train_rate(size, "bfloat16", measured)
            flops, params = 3 * batch_size * forward_flops(config), num_parameters(config)
            step, traffic, backward = step_seconds(flops, params, rate, n)
            alone = step_seconds(flops, params, rate, 1)[0]
            stops[size] = stops_scaling(flops, params, rate)
            cells.append(f"{step * 1e3:.3g} ms, {alone / step / n:.0%} | {traffic * 1e3:.2g} / {backward * 1e3:.3g} ms")
        lines.append(f"| {n} | {batch_size // n} | {' | '.join(cells)} |")
    return lines + ["", "It stops scaling where traffic takes longer than backward: " + ", ".join(
        f"{size} at {f'{n} GPUs' if n else f'more than {GPUS[-1]} GPUs'}" for size, n in stops.items()) + "."]


def tables(results_dir):
    """The three tables with their captions, as Markdown."""
    measured = measured_rows(results_dir)
    gpus = sorted({row["hardware"] for row in measured if row["device"] == "cuda"})
    where = f"measured on {', '.join(gpus)} where marked, else" if gpus else "no GPU was measured:"
    speeds = (f"{where} {SHARE:.0%} (assumed) of an H100 SXM's dense peak, {PEAKS['bfloat16'] / 1e12:.0f} TFLOP/s in "
              f"bfloat16 and {PEAKS['float32'] / 1e12:.0f} in float32")
    return "\n".join([
        "**Largest batch in training: computed, not measured, where not marked.** Memory: 16 bytes a parameter "
        "(weight, gradient, Adam's two moments; in bfloat16 2 more for autocast's copies), what autograd keeps of an "
        "image (counted on a CPU; with checkpointing each coupling's input and all of one coupling), two MLP-wide "
        f"gradients, and {CONTEXT / 1e9:.0f} GB for CUDA (assumed). Speed: {speeds}; checkpointing computes four "
        "forward passes for three. A measured batch is the largest power of two that ran.",
        "", *memory_table(measured), "",
        "**Hours of the paper's figures in bfloat16: computed, not measured,** from the training FLOPs (three forward "
        "passes) and the speed above. GPU-hours: one GPU, no traffic. On more, each run has all of them, with the "
        "traffic below.", "", *hours_table(measured), "",
        f"**Gradient traffic at a global batch of {TrainConfig.batch_size:,}: computed, not measured.** Assumed: the "
        "speed above; all-reduce of float32 gradients, 2 (n-1)/n x 4 bytes x parameters a step and GPU, at "
        f"{NVLINK / 1e9:.0f} GB/s within nodes of {NODE} and {NETWORK / 1e9:.0f} GB/s a GPU between them; all but the "
        f"last {BUCKET / 2 ** 20:.0f} MiB beside backward; Adam on every GPU at {MEMORY_RATE / 1e12:.2f} TB/s of "
        "memory; few images as fast, each, as many, which they are not.", "", *traffic_table(measured)])


def main(arguments=None):
    parser = ArgumentParser(prog="cost_table.py", description=__doc__)
    parser.add_argument("--results-dir", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, ResultsError):
        print(tables(flags.results_dir))


if __name__ == "__main__":
    main()
