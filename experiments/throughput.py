"""Speed and memory of training, likelihood and sampling.

    python experiments/throughput.py             # S and M on a CPU (3 minutes), 32x2 on a GPU
    python experiments/throughput.py --against jet-pytorch       # in turn with the PyPI port
    python experiments/throughput.py --against ../old-worktree   # before and after a change
    python experiments/throughput.py --modes eager compile graph both --sizes S M medium   # a GPU
    python experiments/throughput.py --sizes S --steps 3         # does it work: seconds
    python experiments/throughput.py --profile           # a trace, and the ten largest costs
    python experiments/throughput.py --check-precision   # bits/dim in bfloat16 against float32
    python experiments/throughput.py --evaluate 49999    # the time of so many images' bits/dim

Goals: on 2 CPU threads 1.2 times the images/s of jet-pytorch 0.0.2 and 40 % of the matrix-multiply
peak (M); on an H100 40 % of the bfloat16 peak in training 32x2, and less than 0.001 bits/dim from
float32. Steps alternate. Speed depends on neither weights nor pixels: both are made for it.
"""
import contextlib
import dataclasses
import gc
import io
import itertools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np
import pandas as pd
import torch

import kernels
from data import training_batch
from experiments.throughput_cases import (BATCH_SIZES, MODES, OURS, PORT, SIZES, check_precision,
                                          find_rival, mode_of, our_images, our_step, port_step,
                                          profile_size, seconds_of, size_config, table_of,
                                          time_evaluation)
from harness.errors import TrainingError
from harness.files import write_atomically
from harness.flags import ArgumentParser, one_line_errors
from harness.flops import forward_flops, num_parameters
from harness.host import ROOT
from harness.machine import (MAX_THREADS, compile_limits, free_bytes, full_float32, hardware,
                             pick_device, versions)
from harness.memory import activation_bytes, image_bytes, watch_memory
from jet import Jet, JetConfig
from paper_figures import throughput as figure

LARGEST = 1024  # the paper's global batch: the largest that is tried on a GPU
FORWARDS = {"train": 3, "likelihood": 1, "sampling": 1}  # in forward passes, by definition
QUARTILES = {"_q25": 0.25, "": 0.5, "_q75": 0.75}
DIRS = {"runs": "runs", "results": "results", "figures": "paper_figures/out"}


def product_timer(device, precision):
    """A function that times square matrix products: FLOP/s."""
    n, repeats = (8192, 10) if device.type == "cuda" else (1536, 2)
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    out, flops = torch.empty_like(a), 2 * n ** 3 * repeats
    return lambda: flops / seconds_of(lambda: torch.mm(a, b, out=out), device, repeats)


def measure(makers, config, flags):
    """Time what the makers {implementation: function that builds a step} build, alternating.

    Returns ({implementation: its numbers}, FLOP/s of the best matrix product in between).
    """
    product, numbers, steps = product_timer(flags.device, config.precision), {}, {}
    product()
    for name, make in makers.items():
        peak, begin = watch_memory(flags.device), time.perf_counter()
        steps[name] = make()
        seconds_of(steps[name], flags.device)
        first = time.perf_counter() - begin
        # with Adam's moments in place; a CUDA graph is recorded in the second
        seconds_of(steps[name], flags.device, 2)
        numbers[name] = {"first_step_seconds": first, "peak_memory_gib": peak(), "seconds": [],
                         "startup_seconds": time.perf_counter() - begin}
    rates, order = [product() for _ in range(3)], list(makers)
    for _ in range(flags.steps):
        for name in order:
            numbers[name]["seconds"].append(seconds_of(steps[name], flags.device))
        rates.append(product())
        order.reverse()
    rates += [product() for _ in range(2)]
    if flags.device.type == "cuda":  # as in a training loop: nobody waits for the GPU
        for name, step in steps.items():
            free_running = seconds_of(step, flags.device, flags.steps) / flags.steps
            numbers[name]["free_running_images_per_s"] = config.batch_size / free_running
    return numbers, max(rates)


def make_rows(size, what, config, numbers, matmul_peak, labels, against):
    """The CSV's rows of one measurement; labels is what all of them share. Ours carry the ratio.

    numbers: of ours and what it is compared with, or of our modes.
    """
    flops = FORWARDS[what] * forward_flops(config.model) * config.batch_size
    rows = []

    def quartiles(name, values):
        return {f"{name}{end}": np.quantile(values, share) for end, share in QUARTILES.items()}
    for name, measured in numbers.items():
        middle = np.median(measured["seconds"])
        row = {**labels, **measured, "experiment": "throughput", "size": size, "what": what,
               "implementation": name, "against": against, "precision": config.precision,
               "batch_size": config.batch_size, "num_params": num_parameters(config.model),
               "images_per_s": config.batch_size / middle, "flops_per_s": flops / middle,
               "matmul_peak_flops_per_s": matmul_peak, "peak_share": flops / middle / matmul_peak,
               **quartiles("step_seconds", measured["seconds"])}
        others = [other for other in numbers if other != name]
        if name in MODES:
            row |= {"implementation": "ours", **dict(zip(("compile", "graph"), MODES[name]))}
            others = ["eager"] if name != "eager" else []
        if row["implementation"] == "ours" and others:  # round by round
            ratios = np.divide(numbers[others[0]]["seconds"], measured["seconds"])
            row |= quartiles("ratio", ratios)
        rows.append(row)
    return rows


def merge_rows(csv, rows):
    """Write the rows into the CSV, in place of those of the same key."""
    text = io.StringIO(pd.DataFrame(rows, columns=figure.COLUMNS).to_csv(index=False))
    before = [figure.read_table(csv)] if csv.exists() else []
    table = pd.concat([*before, pd.read_csv(text, dtype=str, keep_default_na=False)])
    order = {name: f"{place:02}" for place, name in enumerate((*SIZES, *FORWARDS, "ours"))}
    table = table.drop_duplicates(figure.KEY, keep="last").sort_values(
        figure.KEY, key=lambda column: column.map(lambda name: order.get(name, name)))
    write_atomically(csv, table.to_csv(index=False, lineterminator="\n"))


def with_batch(work, size, what, flags):
    """work(batch size) with the size's batch; the paper's sizes on a GPU: the largest that fits."""
    batch_size, search = first_batch(size, flags)
    if search and what == "train":
        batch_size = min(batch_size, hopeful_batch(size, flags))
    while True:
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if not search or batch_size == 1:
                raise TrainingError(f"{size}: {batch_size} images do not fit in the GPU's memory: "
                                    "try a smaller --batch-size or "
                                    "--checkpoint-activations") from None
        batch_size //= 2
        gc.collect()  # here, not in except, where the traceback still holds the tensors
        torch.cuda.empty_cache()
        torch.compiler.reset()


def first_batch(size, flags):
    """(batch size to try, whether to halve it until it fits)."""
    search = (not flags.batch_size and flags.device.type == "cuda"
              and size in ("32x2", "64x5"))
    return flags.batch_size or (LARGEST if search else BATCH_SIZES[size]), search


def hopeful_batch(size, flags):
    """The power of two that may just fit in training: each larger one costs a failed attempt."""
    config = JetConfig(**SIZES[size])
    two = Jet(dataclasses.replace(config, num_couplings=2)).to(flags.device)
    coupling = activation_bytes(two, flags.precision) / 2
    per_image = image_bytes(config, flags.precision, flags.checkpoint_activations, coupling)
    slack = 3 if flags.compile else 1.3  # compiled couplings keep less
    return 2 ** int(math.log2(max(1, slack * free_bytes(flags.device) / per_image)))


def measure_size(size, what, batch_size, flags, rival):
    """The CSV's rows of a size and what it does."""
    config = size_config(size, batch_size, flags.precision)
    images = our_images(config.model)
    x = training_batch(images, batch_size, 0, 0, flags.device)

    def make(code, mode):
        return lambda: our_step(code, size, config, what, lambda: x, flags, mode)
    makers, against = {mode: make(OURS, mode) for mode in flags.modes}, figure.EAGER
    if not flags.modes:
        makers, against = {"ours": make(OURS, flags.mode)}, ""
    code_versions = dict.fromkeys(makers, OURS.version)
    if rival:
        name, against, code = rival
        makers[name] = make(code, "eager") if code else lambda: port_step(config, what, x, flags)
        code_versions[name] = (code or OURS).version
    numbers, matmul_peak = measure(makers, config, flags)
    labels = {"threads": flags.threads, "steps": flags.steps, "compile": flags.compile,
              "graph": flags.graph, "checkpoint_activations": flags.checkpoint_activations,
              "images": images.name, "device": flags.device.type,
              "hardware": hardware(flags.device), **versions()}
    if flags.device.type == "cuda":
        memory = torch.cuda.get_device_properties(flags.device).total_memory
        labels["device_memory_gib"] = memory / 2 ** 30
    rows = make_rows(size, what, config, numbers, matmul_peak, labels, against)
    for row, version in zip(rows, code_versions.values()):
        row |= version
        is_plain = row["implementation"] == "ours" and not row["compile"]
        if is_plain and config.precision == "float32":
            one = Jet(dataclasses.replace(config.model, num_couplings=1)).to(flags.device)
            row["kernels"] = kernels.used_by(kernels.accelerate(one))
    return rows


def measure_all(flags):
    """Measure each size and what it does, into the CSV and the figure."""
    rival, rows = find_rival(flags.against), []
    csv = flags.results_dir / f"throughput_{flags.device.type}.csv"
    if csv.exists():
        figure.read(csv)  # a file that cannot be added to is refused before anything is measured
    for folder in (flags.results_dir, flags.figures_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for size, what in itertools.product(flags.sizes, flags.what):
        print(f"{size} {what} ...", flush=True)
        new = with_batch(lambda n: measure_size(size, what, n, flags, rival), size, what, flags)
        merge_rows(csv, new)
        rows += new
    print(csv)
    print_table(rows)
    for path in () if flags.no_figure else figure.draw(csv, flags.figures_dir):
        print(path)


def print_plan(flags):
    rows = []
    for size, what in itertools.product(flags.sizes, flags.what):
        model, (batch_size, search) = JetConfig(**SIZES[size]), first_batch(size, flags)
        rows.append({"size": size, "what": what,
                     "batch": f"largest, from {batch_size}" if search else batch_size,
                     "parameters": f"{num_parameters(model):,}",
                     "FLOPs an image": f"{FORWARDS[what] * forward_flops(model):.3g}"})
    against = f", against {flags.against}" if flags.against else ""
    print(f"{pd.DataFrame(rows).to_string(index=False)}\n{flags.precision} on "
          f"{hardware(flags.device)}, {flags.steps} steps each after three, {flags.threads} CPU "
          f"threads{against}")


def print_table(rows):
    table = pd.DataFrame(rows, columns=figure.COLUMNS)
    table = table.astype(dict.fromkeys((*figure.NUMBERS, *figure.MAYBE), float))
    print(table_of(table, {
        "batch_size": ("batch", "{:.0f}"), "images_per_s": ("images/s", "{:.4g}"),
        "step_seconds": ("s a step", "{:.4f}"), "step_seconds_q25": ("25 %", "{:.4f}"),
        "step_seconds_q75": ("75 %", "{:.4f}"), "flops_per_s": ("FLOP/s", "{:.3g}"),
        "peak_share": ("of peak", "{:.1%}"), "ratio": ("ratio", "{:.3f}"),
        "ratio_q25": ("25 %", "{:.3f}"), "ratio_q75": ("75 %", "{:.3f}"),
        "peak_memory_gib": ("GiB", "{:.2f}"), "first_step_seconds": ("first step s", "{:.2f}"),
        "startup_seconds": ("start s", "{:.2f}")}))
    if table["ratio"].notna().any():
        print("ratio: of images/s, ours to the other's or our mode to eager, round by round; 25 % "
              "and 75 %: quartiles")


def make_parser():
    parser = ArgumentParser(prog="throughput.py", description=__doc__)
    switch = {"action": "store_true"}

    def add(name, help, group=parser, **settings):
        group.add_argument(name, help=help, **settings)
    add("--sizes", "default: S M on a CPU, 32x2 on a GPU", nargs="+", choices=SIZES)
    add("--what", "default: all; train with --profile, --graph and --modes", nargs="+",
        choices=FORWARDS)
    add("--device", "auto, cpu or cuda (default: auto)", default="auto")
    add("--threads", "CPU threads (default: 2)", type=int, default=2)
    add("--precision", "of the networks (default: float32 on a CPU, bfloat16 on a GPU)",
        choices=("float32", "bfloat16"))
    add("--batch-size", "default: 64 for S and M, 256 for medium; for the paper's sizes 4 on a "
        "CPU, on a GPU the largest power of two up to 1024 with which all that is compared fits",
        type=int, metavar="N")
    add("--steps", "measured steps (default: 10)", type=int, default=10, metavar="N")
    add("--compile", "torch.compile each of our couplings", **switch)
    add("--graph", "our training step as one CUDA graph", **switch)
    add("--modes", "compare our own modes in alternation: eager and others", nargs="+",
        choices=MODES)
    add("--checkpoint-activations", "our backward runs each forward again", **switch)
    add("--against", f"alternate with {PORT}, or with the checkout in a folder", metavar="WHAT")
    instead = parser.add_mutually_exclusive_group()
    add("--dry-run", "list what would be measured; measure nothing", instead, **switch)
    add("--profile", "write traces into runs/throughput_profile instead, and print the largest "
        "costs", instead, **switch)
    add("--check-precision", "compare bits/dim of N images with bfloat16 networks instead "
        "(default: 1000)", instead, nargs="?", type=int, const=1000, metavar="N")
    add("--evaluate", "time evaluate() on N random images instead", instead, type=int, metavar="N")
    add("--checkpoint", "weights for --check-precision", type=Path, metavar="PATH")
    add("--numbers", "add what --profile, --check-precision and --evaluate measure to this file, "
        "as lines of JSON", type=Path, metavar="FILE")
    add("--no-figure", "write the CSV, and draw nothing", **switch)
    for name, default in DIRS.items():
        add(f"--{name}-dir", f"default: {default}", type=Path, metavar="DIR",
            default=ROOT / default)
    return parser


def read_flags(parser, arguments):
    """The parsed flags, with what depends on the device."""
    flags = parser.parse_args(arguments)
    for name in ("threads", "steps", "batch_size", "check_precision", "evaluate"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be 1 or more")
    if flags.threads > MAX_THREADS:
        parser.error(f"--threads {flags.threads}: must be at most {MAX_THREADS}")
    instead = flags.profile or flags.check_precision or flags.evaluate
    if flags.checkpoint and not flags.check_precision:
        parser.error("--checkpoint: is only for --check-precision")
    if flags.modes and (flags.compile or flags.graph or flags.against or instead):
        parser.error("--modes: compares our own modes, without --compile, --graph and --against, "
                     "and not with --profile, --check-precision or --evaluate")
    if flags.modes and "eager" not in flags.modes:
        parser.error(f"--modes {' '.join(flags.modes)}: must have eager, which the others are "
                     "compared with")
    flags.modes = list(dict.fromkeys(flags.modes or ()))
    flags.mode = mode_of(flags.compile, flags.graph)
    flags.any_compile, graph = map(any, zip(*(MODES[mode] for mode in (*flags.modes, flags.mode))))
    flags.device = pick_device(flags.device, graph)
    sizes, precision = ["S", "M"], "float32"
    if flags.device.type == "cuda":
        sizes, precision = (["32x2"], "bfloat16")
    train_alone = flags.profile or graph or flags.modes
    flags.sizes, flags.precision = flags.sizes or sizes, flags.precision or precision
    flags.what = flags.what or (["train"] if train_alone else list(FORWARDS))
    if graph and flags.what != ["train"]:
        parser.error(f"--what {' '.join(flags.what)}: a CUDA graph is of training steps alone: "
                     "--what train")
    return flags


def main(arguments=None):
    parser = make_parser()
    with one_line_errors(parser.prog), full_float32(), contextlib.ExitStack() as stack:
        flags = read_flags(parser, arguments)
        if flags.dry_run:
            return print_plan(flags)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(flags.threads)
        if flags.any_compile:
            stack.enter_context(compile_limits())
        if flags.check_precision or flags.evaluate:
            work = check_precision if flags.check_precision else time_evaluation
            for size in flags.sizes[:1] if flags.checkpoint else flags.sizes:
                work(size, flags)
        elif flags.profile:
            for size, what in itertools.product(flags.sizes, flags.what):
                with_batch(lambda n: profile_size(size, what, n, flags), size, what, flags)
        else:
            measure_all(flags)


if __name__ == "__main__":
    main()
