"""What experiments/throughput.py measures without a row in its CSV.

A trace of a few steps, what rounding costs, and the time of a whole evaluation.
"""
import json
import math
import operator
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from convert import load_jet
from data import training_batches
from evaluate import evaluate
from experiments.throughput_cases import (OURS, SIZES, our_images, our_step, random_images,
                                          seconds_of, size_config)
from harness.flops import forward_flops
from harness.machine import compile_couplings, hardware
from jet import Jet, JetConfig


def busy_share(intervals, seconds):
    """The share of so many seconds that some of the intervals, in microseconds, cover."""
    begins, ends = np.array(sorted(intervals)).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.append(-math.inf, ends))[:-1]
    return np.maximum(0, ends - np.maximum(begins, reached)).sum() / 1e6 / seconds


def profile_size(size, what, batch_size, flags):
    """Write a Chrome trace of a few steps, each with its batch, and print the ten largest costs."""
    config = size_config(size, batch_size, flags.precision)
    images = our_images(config.model)
    batches = training_batches(images, batch_size, 0, range(10 ** 6), flags.device)
    step = our_step(OURS, size, config, what, lambda: next(batches), flags, flags.mode)
    seconds_of(step, flags.device, 3)
    with torch.profiler.profile() as profiler:
        seconds = seconds_of(step, flags.device, flags.steps)
    path = flags.runs_dir / "throughput_profile" / f"{size}-{what}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    print_costs(f"{size} {what}, {batch_size} images", profiler, flags)
    numbers = {"size": size, "work": what, "mode": flags.mode, "precision": flags.precision,
               "batch_size": batch_size, "steps": flags.steps,
               "step_seconds": seconds / flags.steps, "trace": path.name}
    if flags.device.type == "cuda":
        numbers["busy_share"] = print_gpu_costs(profiler.events(), seconds, flags.steps)
    note(flags, "profile", numbers)
    print(path)


def print_costs(what, profiler, flags):
    """Print the ten operators or kernels that take most of the device's time."""
    on_gpu = flags.device.type == "cuda"
    time_of = operator.attrgetter(f"self_{'device' if on_gpu else 'cpu'}_time_total")
    events, gpu_events = split(profiler.key_averages())
    events = gpu_events if on_gpu else events
    total = sum(map(time_of, events))
    print(f"{what}: {total / 1e6 / flags.steps:.4f} s a step on {hardware(flags.device)}, of which")
    rows = [{"ms a step": f"{time_of(event) / 1e3 / flags.steps:.3f}",
             "share": f"{time_of(event) / total:.1%}",
             "calls a step": f"{event.count / flags.steps:g}", "name": event.key[:70]}
            for event in sorted(events, key=time_of, reverse=True)[:10]]
    print(pd.DataFrame(rows).to_string(index=False))


def print_gpu_costs(events, seconds, steps):
    """Print who waits for the GPU, and the share of the time in which it works; returns it."""
    on_cpu, on_gpu = split(events)
    names = [event.name for event in on_cpu]
    counts = ", ".join(f"{name} {names.count(name)}" for name in
                       ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize",
                        "cudaDeviceSynchronize"))
    copies = sum(event.time_range.elapsed_us() for event in on_gpu if "HtoD" in event.name)
    print(f"waits for the GPU: {counts} (two of the last are this measurement's and one the "
          f"profiler's); images to the GPU: {copies / 1e3 / steps:.3f} ms a step")
    share = busy_share([(event.time_range.start, event.time_range.end) for event in on_gpu],
                       seconds)
    print(f"the GPU is busy for {share:.1%} of {seconds / steps:.4f} s a step")
    return share


def split(events):
    """Those on the CPU and those on the GPU, without annotations."""
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    cuda = torch.autograd.DeviceType.CUDA
    return ([event for event in events if event.device_type != cuda],
            [event for event in events if event.device_type == cuda])


def check_precision(size, flags):
    """Print how far bits/dim with the networks in bfloat16 are from those all in float32."""
    if flags.checkpoint:
        model, which = load_jet(flags.checkpoint), str(flags.checkpoint)
    else:
        torch.manual_seed(0)
        model = Jet(JetConfig(**SIZES[size]))
        which = f"a fresh {size} with normal noise on its last layers"
        # else it is the identity; raw scales get a deviation of about 1/2
        for coupling in model.couplings:
            torch.nn.init.normal_(coupling.net.final_proj.weight,
                                  std=0.5 / math.sqrt(model.config.emb_dim))
    model, images = model.to(flags.device), our_images(model.config)
    exact, rounded = (
        evaluate(model, images.array[:flags.check_precision], per_image=True,
                 precision=precision)["bits_per_dim_per_image"]
        for precision in ("float32", "bfloat16"))
    mean, largest = (rounded - exact).mean(), abs(rounded - exact).max()
    print(f"{which}: {exact.mean():.5f} bits/dim in float32; with the network in bfloat16 "
          f"{mean:+.6f} in the mean, {largest:.6f} at most; {len(exact):,} "
          f"images ({images.name}), {hardware(flags.device)}")
    note(flags, "check-precision", {
        "weights": which, "num_images": len(exact), "bits_per_dim": exact.mean(),
        "mean_difference": mean, "largest_difference": largest})


def time_evaluation(size, flags):
    """Print how long evaluate() takes for random images, from images in memory to the number."""
    torch.manual_seed(0)
    model = Jet(JetConfig(**SIZES[size])).to(flags.device)
    images = random_images(model.config, flags.evaluate)
    if flags.compile:
        compile_couplings(model)
    begin = time.perf_counter()
    evaluate(model, images, precision=flags.precision)
    seconds = time.perf_counter() - begin
    rate = forward_flops(model.config) * flags.evaluate / seconds
    print(f"{size}: bits/dim of {flags.evaluate:,} random images in {seconds:.2f} s "
          f"({flags.precision} networks, {flags.evaluate / seconds:,.0f} images/s, "
          f"{rate:.3g} FLOP/s), {hardware(flags.device)}")
    note(flags, "evaluate", {
        "size": size, "precision": flags.precision, "compile": flags.compile,
        "num_images": flags.evaluate, "seconds": seconds, "flops_per_s": rate})


def note(flags, what, numbers):
    """Add what was measured to the file of --numbers, as a line of JSON."""
    if flags.numbers:
        with open(flags.numbers, "a") as file:
            file.write(json.dumps({"what": what, **numbers}) + "\n")
