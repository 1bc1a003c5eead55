"""Speed and memory of training, likelihood and sampling.

    python experiments/throughput.py                             # S and M on a CPU (3 minutes), 32x2 on a GPU
    python experiments/throughput.py --against jet-pytorch       # step by step with the PyPI port
    python experiments/throughput.py --against ../old-worktree   # before and after a change, in the same run
    python experiments/throughput.py --modes eager compile graph both --sizes S M medium     # on a GPU
    python experiments/throughput.py --sizes S --steps 3         # does it work: seconds
    python experiments/throughput.py --profile                   # a trace, and the ten largest costs
    python experiments/throughput.py --check-precision           # bits/dim of a bfloat16 network against float32
    python experiments/throughput.py --evaluate 49999            # bits/dim of so many random images: seconds

Goals: on 2 CPU threads 1.2 times the images/s of jet-pytorch 0.0.2 and 40 % of the matrix-multiply peak (M); on an
H100 40 % of the bfloat16 peak in training 32x2, and less than 0.001 bits/dim from float32. Steps alternate: a matrix
product, ours, theirs, and back. Speed depends on neither the weights nor the pixels: the weights are fresh, the
images are the CIFAR-10 subset (32 px) or uniform random ones (64 px).
"""
import contextlib
import ctypes
import dataclasses
import gc
import io
import itertools
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import jet
import kernels
import train
from data import free_bytes, training_batch
from experiments.sweep import num_parameters
from experiments.throughput_cases import (BATCH_SIZES, MODES, OURS, PORT, SIZES, find_rival,
                                          our_images, our_step, port_step, seconds_of, size_config)
from experiments.throughput_checks import check_precision, profile_size, time_evaluation
from paper_figures import throughput as figure
from paper_figures.results_csv import ResultsError
from train import TrainingError

LARGEST = 1024  # the paper's global batch: the largest that is tried on a GPU
FORWARDS = {"train": 3, "likelihood": 1, "sampling": 1}  # in forward passes, by definition


# ---- measuring

def watch_memory(device):
    """A function that tells the peak of the memory above what is in use now, in GiB; None where nobody knows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
        before = status("VmRSS")
    except (OSError, AttributeError):
        return lambda: None
    return lambda: (status("VmHWM") - before) / 2 ** 20


def matmul_rate(device, precision):
    """A function that times square matrix products: FLOP/s."""
    n, repeats = (8192, 10) if device.type == "cuda" else (1536, 2)
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    out = torch.empty_like(a)
    return lambda: 2 * n ** 3 * repeats / seconds_of(lambda: torch.mm(a, b, out=out), device, repeats)


def measure(makers, config, flags):
    """Time what the makers {implementation: function that builds a step} build, alternating.

    Returns ({implementation: its numbers}, FLOP/s of the best matrix product in between).
    """
    product, numbers, steps = matmul_rate(flags.device, config.precision), {}, {}
    product()
    for name, make in makers.items():
        peak = watch_memory(flags.device)
        begin = time.perf_counter()
        steps[name] = make()
        seconds_of(steps[name], flags.device)
        first = time.perf_counter() - begin
        seconds_of(steps[name], flags.device, 2)  # with Adam's moments in place; a CUDA graph is recorded in the second
        numbers[name] = {"first_step_seconds": first, "startup_seconds": time.perf_counter() - begin,
                         "peak_memory_gib": peak()}
    rates, seconds = [product() for _ in range(3)], {name: [] for name in makers}
    for number in range(flags.steps):
        for name in list(makers)[::-1 if number % 2 else 1]:
            seconds[name].append(seconds_of(steps[name], flags.device))
        rates.append(product())
    rates += [product() for _ in range(2)]
    for name, step in steps.items():
        numbers[name]["seconds"] = np.array(seconds[name])
        if flags.device.type == "cuda":  # as in a training loop: nobody waits for the GPU
            numbers[name]["free_running_images_per_s"] = (config.batch_size * flags.steps
                                                          / seconds_of(step, flags.device, flags.steps))
    return numbers, max(rates)


def make_rows(size, what, config, numbers, matmul_peak, labels, against):
    """The CSV's rows of one measurement; labels is what all of them share. Ours carry the ratio.

    numbers: of ours and what it is compared with, or of our modes.
    """
    flops, params = FORWARDS[what] * jet.forward_flops(config.model), num_parameters(config.model)
    rows = []
    for name, measured in numbers.items():
        low, middle, high = np.quantile(measured["seconds"], (0.25, 0.5, 0.75))
        row = {**labels, "experiment": "throughput", "size": size, "what": what, "implementation": name,
               "against": against, "precision": config.precision, "batch_size": config.batch_size, "num_params": params,
               "images_per_s": config.batch_size / middle, "step_seconds": middle, "step_seconds_q25": low,
               "step_seconds_q75": high, "flops_per_s": flops * config.batch_size / middle,
               "matmul_peak_flops_per_s": matmul_peak,
               "peak_share": flops * config.batch_size / middle / matmul_peak,
               **{key: value for key, value in measured.items() if key != "seconds"}}
        if name in MODES:
            row |= {"implementation": "ours", **dict(zip(("compile", "graph"), MODES[name]))}
        other = "eager" if name in MODES else next((theirs for theirs in numbers if theirs != name), name)
        if row["implementation"] == "ours" and other != name:
            ratios = np.quantile(numbers[other]["seconds"] / measured["seconds"], (0.25, 0.5, 0.75))  # round by round
            row |= dict(zip(("ratio_q25", "ratio", "ratio_q75"), ratios))
        rows.append(row)
    return rows


def merge_rows(csv, rows):
    """Write the rows into the CSV, in the place of those of the same key; returns them as they are written."""
    text = pd.DataFrame(rows, columns=figure.COLUMNS).to_csv(index=False)
    new = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    table = new
    if csv.exists():
        figure.read(csv)
        table = pd.concat([pd.read_csv(csv, dtype=str, keep_default_na=False), new])
        table = table.drop_duplicates(figure.KEY, keep="last")
    order = {name: f"{place:02}" for place, name in enumerate((*SIZES, *FORWARDS, "ours"))}
    table = table.sort_values(figure.KEY, key=lambda column: column.map(lambda name: order.get(name, name)))
    train.write_atomically(csv, table.to_csv(index=False, lineterminator="\n"))
    return new


def with_batch(work, size, what, flags):
    """work(batch size) with the size's batch; on a GPU, for the paper's sizes, with the largest that fits."""
    batch_size, search = first_batch(size, flags)
    if search and what == "train":
        batch_size = min(batch_size, hopeful_batch(size, flags))
    while True:
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if not search or batch_size == 1:
                raise TrainingError(f"{size}: {batch_size} images do not fit in the GPU's memory: try a smaller "
                                    "--batch-size or --checkpoint-activations") from None
        batch_size //= 2
        gc.collect()  # here, not in except, where the traceback still holds the tensors
        torch.cuda.empty_cache()
        torch.compiler.reset()


def first_batch(size, flags):
    """(batch size to try, whether to halve it until it fits)."""
    search = flags.device.type == "cuda" and flags.batch_size is None and size in ("32x2", "64x5")
    return flags.batch_size or (LARGEST if search else BATCH_SIZES[size]), search


def hopeful_batch(size, flags):
    """The power of two whose activations may just fit in training: each larger one costs a failed attempt."""
    config = jet.JetConfig(**SIZES[size])
    two = jet.Jet(dataclasses.replace(config, num_couplings=2)).to(flags.device)
    two.checkpoint_activations = flags.checkpoint_activations
    per_image = train.activation_bytes(two, flags.precision) * config.num_couplings / 2
    slack = 3 if flags.compile else 1.3  # compiled couplings keep less
    return 2 ** int(math.log2(max(1, slack * free_bytes(flags.device) / per_image)))


def measure_size(size, what, batch_size, flags, rival):
    """The CSV's rows of a size and what it does."""
    config = size_config(size, batch_size, flags.precision)
    images = our_images(config.model)
    x = training_batch(images, batch_size, 0, 0, flags.device)

    def make(code, mode):
        return lambda: our_step(code, size, config, what, lambda: x, flags, mode)
    makers = {mode: make(OURS, mode) for mode in flags.modes} if flags.modes else {"ours": make(OURS, flags.mode)}
    commits = dict.fromkeys(makers, train.git_commit())
    if rival:
        name, _, code = rival
        makers[name] = make(code, "eager") if code else lambda: port_step(config, what, x, flags)
        commits[name] = (code or OURS).train.git_commit()
    numbers, matmul_peak = measure(makers, config, flags)
    cuda = flags.device.type == "cuda"
    gpu_gib = torch.cuda.get_device_properties(flags.device).total_memory / 2 ** 30 if cuda else None
    labels = {"threads": flags.threads, "steps": flags.steps, "compile": flags.compile, "graph": flags.graph,
              "checkpoint_activations": flags.checkpoint_activations, "images": images.name,
              "device": flags.device.type, "hardware": train.hardware(flags.device),
              "device_memory_gib": gpu_gib,
              "python_version": platform.python_version(), "torch_version": torch.__version__}
    against = rival[1] if rival else figure.EAGER if flags.modes else ""
    rows = make_rows(size, what, config, numbers, matmul_peak, labels, against)
    for row, (commit, tree) in zip(rows, commits.values()):
        row |= {"git_commit": commit, "git_dirty": {"clean": False, "dirty": True}.get(tree)}
        if row["implementation"] == "ours" and not cuda and flags.precision == "float32":
            row["kernels"] = kernels.name()
    return rows


# ---- the command line

def print_plan(flags):
    rows = []
    for size, what in itertools.product(flags.sizes, flags.what):
        model, (batch_size, search) = jet.JetConfig(**SIZES[size]), first_batch(size, flags)
        rows.append({"size": size, "what": what, "batch": f"{'largest, from ' if search else ''}{batch_size}",
                     "parameters": f"{num_parameters(model):,}",
                     "FLOPs an image": f"{FORWARDS[what] * jet.forward_flops(model):.3g}"})
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"{flags.precision} on {train.hardware(flags.device)}, {flags.steps} steps each after three, "
          f"{flags.threads} CPU threads{f', against {flags.against}' if flags.against else ''}")


def print_table(rows):
    numbers = rows.replace("", "nan").astype(dict.fromkeys((*figure.NUMBERS, *figure.MAYBE), float))
    shown = {"batch_size": ("batch", "{:.0f}"), "images_per_s": ("images/s", "{:.4g}"),
             "step_seconds": ("s a step", "{:.4f}"), "step_seconds_q25": ("25 %", "{:.4f}"),
             "step_seconds_q75": ("75 %", "{:.4f}"), "flops_per_s": ("FLOP/s", "{:.3g}"),
             "peak_share": ("of peak", "{:.1%}"), "ratio": ("ratio", "{:.3f}"), "ratio_q25": ("25 %", "{:.3f}"),
             "ratio_q75": ("75 %", "{:.3f}"), "peak_memory_gib": ("GiB", "{:.2f}"),
             "first_step_seconds": ("first step s", "{:.2f}"), "startup_seconds": ("start s", "{:.2f}")}
    modes = {tuple(map(str, switches)): name for name, switches in MODES.items()}
    numbers["mode"] = [modes[pair] for pair in zip(numbers["compile"], numbers["graph"])]
    print(numbers[["size", "what", "implementation", "mode", *shown]].to_string(
        index=False, header=["size", "what", "of", "mode", *(name for name, _ in shown.values())], na_rep="",
        formatters={column: look.format for column, (_, look) in shown.items()}))
    if numbers["ratio"].notna().any():
        print("ratio: of images/s, ours to the other's or our mode to eager, round by round; 25 % and 75 %: quartiles")


def make_parser():
    parser = train.ArgumentParser(prog="throughput.py", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: S M on a CPU, 32x2 on a GPU")
    parser.add_argument("--what", nargs="+", choices=FORWARDS, help="default: all; train with --profile, --graph and --modes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"),
                        help="of the networks (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 64 for S and M, 256 for medium; for the "
                        "paper's sizes 4 on a CPU, on a GPU the largest power of two up to 1024 with which all that is "
                        "compared fits")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps (default: 10)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our couplings")
    parser.add_argument("--graph", action="store_true", help="our training step as one CUDA graph")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="compare our own modes in alternation: eager and others")
    parser.add_argument("--checkpoint-activations", action="store_true", help="our backward runs each forward again")
    parser.add_argument("--against", metavar="WHAT", help=f"alternate with {PORT}, or with the checkout in a folder")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="list what would be measured; measure nothing")
    mode.add_argument("--profile", action="store_true", help="write traces into runs/throughput_profile instead, and "
                      "print the largest costs")
    mode.add_argument("--check-precision", nargs="?", type=int, const=1000, metavar="N", help="compare bits/dim of N "
                      "images with bfloat16 networks instead (default: 1000)")
    mode.add_argument("--evaluate", type=int, metavar="N", help="time train.evaluate on N random images instead")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights for --check-precision")
    parser.add_argument("--numbers", type=Path, metavar="FILE", help="add what --profile, --check-precision and --evaluate "
                        "measure to this file, as lines of JSON")
    parser.add_argument("--no-figure", action="store_true", help="write the CSV, and draw nothing")
    for name, default in (("runs", "runs"), ("results", "results"), ("figures", "paper_figures/out")):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR",
                            help=f"default: {default}")
    return parser


def read_flags(parser, arguments):
    """The parsed flags, with what depends on the device."""
    flags = parser.parse_args(arguments)
    for name in ("threads", "steps", "batch_size", "check_precision", "evaluate"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be 1 or more")
    if flags.checkpoint and not flags.check_precision:
        parser.error("--checkpoint: is only for --check-precision")
    if flags.modes and (flags.compile or flags.graph or flags.against):
        parser.error("--modes: compares our own modes, without --compile, --graph and --against")
    if flags.modes and (flags.profile or flags.check_precision or flags.evaluate):
        parser.error("--modes: not with --profile, --check-precision or --evaluate")
    if flags.modes and "eager" not in flags.modes:
        parser.error(f"--modes {' '.join(flags.modes)}: must have eager, which the others are compared with")
    graph = flags.graph or bool({"graph", "both"} & set(flags.modes or ()))
    flags.device = train.pick_device(flags.device, graph)
    cuda = flags.device.type == "cuda"
    flags.modes = list(dict.fromkeys(flags.modes or ()))
    flags.mode = next(name for name, switches in MODES.items() if switches == (flags.compile, flags.graph))
    flags.precision = flags.precision or ("bfloat16" if cuda else "float32")
    flags.sizes = flags.sizes or (["32x2"] if cuda else ["S", "M"])
    flags.what = flags.what or (["train"] if flags.profile or graph or flags.modes else list(FORWARDS))
    if graph and flags.what != ["train"]:
        parser.error(f"--what {' '.join(flags.what)}: a CUDA graph is of training steps alone: --what train")
    return flags


def main(arguments=None):
    parser = make_parser()
    with train.one_line_errors(parser.prog, ResultsError), train._full_float32(), contextlib.ExitStack() as stack:
        flags = read_flags(parser, arguments)
        if flags.dry_run:
            return print_plan(flags)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(flags.threads)
        if flags.check_precision or flags.evaluate:
            for size in flags.sizes[:1 if flags.checkpoint else None]:
                (check_precision if flags.check_precision else time_evaluation)(size, flags)
        elif flags.profile:
            for size, what in itertools.product(flags.sizes, flags.what):
                with_batch(lambda n: profile_size(size, what, n, flags), size, what, flags)
        else:
            measure_all(flags)


def measure_all(flags):
    """Measure each size and what it does, into the CSV and the figure."""
    rival, csv, tables = find_rival(flags.against), flags.results_dir / f"throughput_{flags.device.type}.csv", []
    if csv.exists():
        figure.read(csv)  # a file that cannot be added to is refused before anything is measured
    for folder in (flags.results_dir, flags.figures_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for size, what in itertools.product(flags.sizes, flags.what):
        print(f"{size} {what} ...", flush=True)
        rows = with_batch(lambda n: measure_size(size, what, n, flags, rival), size, what, flags)
        tables.append(merge_rows(csv, rows))
    print(csv)
    print_table(pd.concat(tables))
    for path in () if flags.no_figure else figure.draw(csv, flags.figures_dir):
        print(path)


if __name__ == "__main__":
    main()
