"""Speed and memory of training, likelihood and sampling.

    python experiments/throughput.py                             # S and M on a CPU (3 minutes), 32x2 on a GPU
    python experiments/throughput.py --against jet-pytorch       # step by step with the PyPI port
    python experiments/throughput.py --against ../old-worktree   # before and after a change, in the same run
    python experiments/throughput.py --sizes S --steps 3         # does it work: seconds
    python experiments/throughput.py --profile                   # a trace, and the ten largest costs
    python experiments/throughput.py --check-precision           # bits/dim of a bfloat16 network against float32

Goals: on 2 CPU threads 1.2 times the images/s of jet-pytorch 0.0.2 and 40 % of the matrix-multiply peak (M); on an
H100 40 % of the bfloat16 peak in training 32x2, and less than 0.001 bits/dim from float32. Steps alternate: a matrix
product, ours, theirs, and back. Speed depends on neither the weights nor the pixels: the weights are fresh, the
images are the CIFAR-10 subset (32 px) or uniform random ones (64 px).
"""
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import io
import itertools
import math
import platform
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import jet
import kernels
import train
from convert import load_jet
from data import ImageSet, load_images, quantize, training_batch, training_batches
from experiments.sweep import num_parameters
from paper_figures import throughput as figure
from paper_figures.results_csv import ResultsError
from train import TrainConfig, TrainingError

SIZES = {"S": dict(image_size=32, num_couplings=8, block_depth=1, emb_dim=64, num_heads=4),
         "M": dict(image_size=32, num_couplings=16, block_depth=2, emb_dim=128, num_heads=4),
         "32x2": {}, "64x5": dict(num_couplings=64, block_depth=5)}  # the paper's: 64 px, width 512, 8 heads
BATCH_SIZES = {"S": 64, "M": 64, "32x2": 4, "64x5": 4}
LARGEST = 1024  # the paper's global batch: where the search for the largest batch on a GPU begins
FORWARDS = {"train": 3, "likelihood": 1, "sampling": 1}  # in forward passes, by definition
PORT = figure.PORT
OURS = types.SimpleNamespace(jet=jet, train=train)


# ---- what is measured: functions without arguments that do one step

def our_step(code, size, config, what, batch, flags):
    """A step of a checkout's own code (its modules jet and train) on the images of batch(), from a fresh Jet."""
    torch.manual_seed(0)
    model = code.jet.Jet(code.jet.JetConfig(**SIZES[size])).to(flags.device)
    model.checkpoint_activations = flags.checkpoint_activations
    if flags.compile:
        train.compile_couplings(model)
    if what == "train":
        optimizer, numbers = code.train.make_optimizer(model.parameters(), config), itertools.count(1)
        return lambda: code.train.training_step(model, optimizer, batch(), next(numbers), config)

    @torch.no_grad()
    def step():
        with _autocast(config, flags):
            if what == "sampling":
                return model.sample(config.batch_size)
            return code.jet.bits_per_dim(*model(batch()))
    return step


def port_step(config, what, x, flags):
    """The same work by jet-pytorch, eager, on the images x, from a fresh model."""
    (_, height, width), model, tokens = config.model.image_shape, config.model, config.model.num_tokens
    torch.manual_seed(0)
    port = importlib.import_module("jet_pytorch.jet").Jet(
        patch_size=model.patch_size, patch_dim=model.token_dim, n_patches=tokens, img_dims=(height, width),
        coupling_layers=model.num_couplings, block_depth=model.block_depth, block_width=model.emb_dim,
        num_heads=model.num_heads).to(flags.device)
    x = x.permute(0, 2, 3, 1).contiguous()  # it takes (B, H, W, C)

    def likelihood():
        with _autocast(config, flags):
            z, logdet = port(x)
            return jet.bits_per_dim(z, logdet[:, 0])

    def sampling():
        with _autocast(config, flags):
            z = torch.randn(config.batch_size, tokens, model.token_dim, device=flags.device)
            return quantize(port.inverse(z)[0])

    if what != "train":
        return torch.no_grad()({"likelihood": likelihood, "sampling": sampling}[what])
    optimizer = train.make_optimizer(port.parameters(), config)

    def step():
        optimizer.zero_grad()
        likelihood().mean().backward()
        torch.nn.utils.clip_grad_norm_(port.parameters(), config.clip_norm)
        optimizer.step()
    return step


def _autocast(config, flags):
    return torch.autocast(flags.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def other_checkout(folder):
    """The modules jet and train of another checkout, in this process beside ours: one pool of threads."""
    path = Path(folder).resolve()
    if not ((path / "jet.py").exists() and (path / "train.py").exists()):
        raise TrainingError(f"--against {folder}: must be {PORT} or the folder of another checkout, with jet.py and "
                            "train.py (git worktree add ../before COMMIT)")

    def take_out(where):  # the modules of a folder: both checkouts use the same names
        return {name: sys.modules.pop(name) for name, module in list(sys.modules.items())
                if Path(getattr(module, "__file__", None) or "").parent == where and name != "__main__"}

    ours = take_out(ROOT)
    sys.path.insert(0, str(path))
    try:
        return types.SimpleNamespace(jet=importlib.import_module("jet"), train=importlib.import_module("train"))
    finally:
        sys.path.remove(str(path))
        take_out(path)
        sys.modules.update(ours)


def find_rival(against):
    """(implementation, how the CSV names it, its checkout or None) of --against; None without it."""
    if against is None:
        return None
    if against != PORT:
        code = other_checkout(against)
        commit, tree = code.train.git_commit()
        return "before", f"{commit[:10] or Path(against).resolve().name}{'-dirty' * (tree == 'dirty')}", code
    try:
        importlib.import_module("jet_pytorch.jet")
    except ImportError as error:
        raise TrainingError(f"--against {PORT}: {error}: pip install --no-deps jet-pytorch==0.0.2 einops") from None
    return PORT, f"{PORT} {importlib.metadata.version(PORT)}", None


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


def seconds_of(step, device, repeats=1):
    """Seconds of calls in a row, to the end of their work on the device."""
    _finish(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _finish(device)
    return time.perf_counter() - begin


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        numbers[name] = {"first_step_seconds": time.perf_counter() - begin}
        seconds_of(steps[name], flags.device, 2)  # with Adam's moments in place
        numbers[name]["peak_memory_gib"] = peak()
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
    """The CSV's rows of one measurement; labels is what all of them share. Ours carries the ratio."""
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
        if name == "ours" and len(numbers) > 1:
            other, = (theirs["seconds"] for theirs_name, theirs in numbers.items() if theirs_name != name)
            ratios = np.quantile(other / measured["seconds"], (0.25, 0.5, 0.75))  # round by round
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


def our_images(model):
    """Images for a JetConfig: the CIFAR-10 subset where it fits, else 1,024 uniform random ones."""
    channels, height, width = model.image_shape
    if (channels, height, width) == (3, 32, 32):
        return load_images("cifar10-subset", "train")
    array = np.random.default_rng(0).integers(0, 256, (1024, height, width, channels), np.uint8)
    return ImageSet(array=array, labels=None, name="random", variant="uniform", split="train")


def size_config(size, batch_size, flags):
    """TrainConfig of a named size: the official recipe at its full learning rate from the first step."""
    return TrainConfig(model=jet.JetConfig(**SIZES[size]), batch_size=batch_size, warmup_fraction=0.0,
                       precision=flags.precision)


def with_batch(work, size, flags):
    """work(batch size) with the size's batch; on a GPU, for the paper's sizes, with the largest that fits."""
    batch_size, search = first_batch(size, flags)
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


def measure_size(size, what, batch_size, flags, rival):
    """The CSV's rows of a size and what it does."""
    config = size_config(size, batch_size, flags)
    images = our_images(config.model)
    x = training_batch(images, batch_size, 0, 0, flags.device)
    makers = {"ours": lambda: our_step(OURS, size, config, what, lambda: x, flags)}
    commits = {"ours": train.git_commit()}
    if rival:
        name, _, code = rival
        makers[name] = lambda: (our_step(code, size, config, what, lambda: x, flags) if code else
                                port_step(config, what, x, flags))
        commits[name] = (code or OURS).train.git_commit()
    numbers, matmul_peak = measure(makers, config, flags)
    cuda = flags.device.type == "cuda"
    gpu_gib = torch.cuda.get_device_properties(flags.device).total_memory / 2 ** 30 if cuda else None
    labels = {"threads": flags.threads, "steps": flags.steps, "compile": flags.compile,
              "checkpoint_activations": flags.checkpoint_activations, "images": images.name,
              "device": flags.device.type, "hardware": train.hardware(flags.device),
              "device_memory_gib": gpu_gib,
              "python_version": platform.python_version(), "torch_version": torch.__version__}
    rows = make_rows(size, what, config, numbers, matmul_peak, labels, rival[1] if rival else "")
    for row in rows:
        commit, tree = commits[row["implementation"]]
        row |= {"git_commit": commit, "git_dirty": {"clean": False, "dirty": True}.get(tree)}
        if row["implementation"] == "ours" and not cuda and flags.precision == "float32":
            row["kernels"] = kernels.name()
    return rows


# ---- the trace

def profile_size(size, what, batch_size, flags):
    """Write a Chrome trace of a few steps, each with its batch's making, and print the ten largest costs."""
    config = size_config(size, batch_size, flags)
    batches = training_batches(our_images(config.model), batch_size, 0, range(10 ** 6), flags.device)
    step = our_step(OURS, size, config, what, lambda: next(batches), flags)
    seconds_of(step, flags.device, 3)
    with torch.profiler.profile() as profiler:
        seconds_of(step, flags.device, flags.steps)
    folder = flags.runs_dir / "throughput_profile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{size}-{what}.json.gz"
    profiler.export_chrome_trace(str(path))
    events = [event for event in profiler.key_averages() if not getattr(event, "is_user_annotation", False)]
    cuda = flags.device.type == "cuda"
    on_gpu = [event.device_type == torch.autograd.DeviceType.CUDA for event in events]
    costs = [(event.self_device_time_total if cuda else event.self_cpu_time_total, event.key, event.count)
             for event, gpu in zip(events, on_gpu) if gpu == cuda]
    total = sum(cost for cost, _, _ in costs)
    print(f"{size} {what}, {batch_size} images: {total / 1e6 / flags.steps:.4f} s a step on "
          f"{train.hardware(flags.device)}, of which")
    print(pd.DataFrame([{"ms a step": f"{cost / 1e3 / flags.steps:.3f}", "share": f"{cost / total:.1%}",
                         "calls a step": f"{count / flags.steps:g}", "name": name[:70]}
                        for cost, name, count in sorted(costs, reverse=True)[:10]]).to_string(index=False))
    if cuda:
        waits = {name: sum(event.count for event in events if event.key == name) for name in
                 ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")}
        copies = sum(event.self_device_time_total for event, gpu in zip(events, on_gpu) if gpu and "HtoD" in event.key)
        print(f"waits for the GPU: {', '.join(f'{name} {count}' for name, count in waits.items())} (two of the last "
              "are this measurement's and one the profiler's); images to the GPU: "
              f"{copies / 1e3 / flags.steps:.3f} ms a step")
    print(path)


def check_precision(size, flags):
    """Print how far bits/dim with the networks in bfloat16 are from those all in float32, on 1,000 images."""
    if flags.checkpoint:
        model, which = load_jet(flags.checkpoint), str(flags.checkpoint)
    else:
        torch.manual_seed(0)
        model, which = jet.Jet(jet.JetConfig(**SIZES[size])), f"a fresh {size} with normal noise on its last layers"
        for coupling in model.couplings:  # else it is the identity; raw scales get a deviation of about 1/2
            torch.nn.init.normal_(coupling.net.final_proj.weight, std=0.5 / math.sqrt(model.config.emb_dim))
    model, images = model.to(flags.device), our_images(model.config)
    exact, rounded = (train.evaluate(model, images.array[:1000], per_image=True, precision=precision)
                      ["bits_per_dim_per_image"] for precision in ("float32", "bfloat16"))
    print(f"{which}: {exact.mean():.5f} bits/dim in float32; with the network in bfloat16 "
          f"{(rounded - exact).mean():+.6f} in the mean, {abs(rounded - exact).max():.6f} at most; {len(exact):,} "
          f"images ({images.name}), {train.hardware(flags.device)}")


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
             "first_step_seconds": ("first step s", "{:.2f}")}
    print(numbers[["size", "what", "implementation", *shown]].to_string(
        index=False, header=["size", "what", "of", *(name for name, _ in shown.values())], na_rep="",
        formatters={column: look.format for column, (_, look) in shown.items()}))
    if numbers["ratio"].notna().any():
        print("ratio: of images/s, ours to the other's, round by round; 25 % and 75 %: quartiles")


def main(arguments=None):
    parser = train.ArgumentParser(prog="throughput.py", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: S M on a CPU, 32x2 on a GPU")
    parser.add_argument("--what", nargs="+", choices=FORWARDS, help="default: all; train with --profile")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"),
                        help="of the networks (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 64 for S and M; for the paper's sizes 4 "
                        "on a CPU, on a GPU the largest power of two up to 1024 with which all that is compared fits")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps (default: 10)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our couplings")
    parser.add_argument("--checkpoint-activations", action="store_true", help="our backward runs each forward again")
    parser.add_argument("--against", metavar="WHAT", help=f"alternate with {PORT}, or with the checkout in a folder")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="list what would be measured; measure nothing")
    mode.add_argument("--profile", action="store_true", help="write traces into runs/throughput_profile instead, and "
                      "print the largest costs")
    mode.add_argument("--check-precision", action="store_true", help="compare bits/dim with bfloat16 networks instead")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights for --check-precision")
    for name, default in (("runs", "runs"), ("results", "results"), ("figures", "paper_figures/out")):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR",
                            help=f"default: {default}")
    flags = parser.parse_args(arguments)
    with train.one_line_errors(parser.prog, ResultsError), train._full_float32(), contextlib.ExitStack() as stack:
        for name in ("threads", "steps", "batch_size"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be 1 or more")
        if flags.checkpoint and not flags.check_precision:
            parser.error("--checkpoint: is only for --check-precision")
        flags.device = train.pick_device(flags.device)
        cuda = flags.device.type == "cuda"
        flags.precision = flags.precision or ("bfloat16" if cuda else "float32")
        flags.sizes = flags.sizes or (["32x2"] if cuda else ["S", "M"])
        flags.what = flags.what or (["train"] if flags.profile else list(FORWARDS))
        if flags.dry_run:
            return print_plan(flags)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(flags.threads)
        if flags.check_precision:
            for size in flags.sizes[:1 if flags.checkpoint else None]:
                check_precision(size, flags)
            return
        if flags.profile:
            for size, what in itertools.product(flags.sizes, flags.what):
                with_batch(lambda n: profile_size(size, what, n, flags), size, flags)
            return
        rival, csv, tables = find_rival(flags.against), flags.results_dir / f"throughput_{flags.device.type}.csv", []
        if csv.exists():
            figure.read(csv)  # a file that cannot be added to is refused before anything is measured
        for folder in (flags.results_dir, flags.figures_dir):
            folder.mkdir(parents=True, exist_ok=True)
        for size, what in itertools.product(flags.sizes, flags.what):
            print(f"{size} {what} ...", flush=True)
            tables.append(merge_rows(csv, with_batch(lambda n: measure_size(size, what, n, flags, rival), size, flags)))
        print(csv)
        print_table(pd.concat(tables))
        for path in figure.draw(csv, flags.figures_dir):
            print(path)


if __name__ == "__main__":
    main()
