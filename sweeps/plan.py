"""What a grid costs, before it is run: --dry-run."""
import collections
import contextlib
import math
import statistics
import textwrap

from harness.errors import TrainingError
from harness.flops import forward_flops, num_parameters, train_flops
from harness.machine import hardware
from jet import JetConfig
from recipe import TrainConfig
from sweeps import watch
from sweeps.grid import channel_share

# FLOP/s of an H100 SXM, dense, by its data sheet; the precisions that a grid can be trained in
GPU_PEAKS = {"float32": 67e12, "bfloat16": 989e12, "float64": 67e12}
GPU_SHARE = 0.4  # of that peak (assumed): the goal


def gpu_hours(flops, precision):
    """Hours of an H100 for so many FLOPs, at the share of its peak that is assumed."""
    return flops / GPU_SHARE / GPU_PEAKS[precision] / 3600


def number(value):
    """"1,273", "60.6", "0.0123": three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def flops_per_s(done):
    """Training FLOP/s of each process of a finished run. done: what its done.json holds."""
    flops = train_flops(TrainConfig.from_dict(done["config"]))
    return flops / done["train_seconds"] / (done.get("processes") or 1)


def measured_rate(config, finished):
    """The training FLOP/s that a process of a run (on GPUs: a GPU) may expect; None: nobody knows.

    Those of the finished run whose FLOPs per image are nearest, by ratio; of several such runs,
    their median. finished: what done.json holds of runs on one kind of hardware; where some of
    them are in the config's precision, only those count.
    """
    finished = [done for done in finished if done["config"]["total_steps"]]  # else only evaluated
    same = [done for done in finished if done["config"]["precision"] == config.precision]
    finished = same or finished
    if not finished:
        return None
    flops = forward_flops(config.model)
    distances = [abs(math.log(forward_flops(JetConfig(**done["config"]["model"])) / flops))
                 for done in finished]
    return statistics.median(flops_per_s(done) for done, distance in zip(finished, distances)
                             if distance == min(distances))


def trained(runs):
    """What done.json holds of those of the runs that were trained to their end."""
    results = []
    for run in runs:
        with contextlib.suppress(TrainingError):  # damaged: its status says so
            results.append(run.done)
    return [done for done in results if done and done["config"]["total_steps"]]


def on_one_hardware(finished, device):
    """Those of the finished runs that count, and their kind of hardware, (device type, name).

    It is the device's where there are any, else the one with most of them.
    """
    kinds = collections.Counter((done["device"], done["hardware"]) for done in finished)
    kind = device.type, hardware(device)
    if kind not in kinds:
        kind = max(kinds, key=kinds.get)
    return [done for done in finished if (done["device"], done["hardware"]) == kind], kind


def print_plan(runs, finished, device, images_per_s, processes):
    """Runs, sizes and cost.

    finished: what done.json holds of finished runs, by which the hours are estimated, rather of
    those on the device's kind of hardware. images_per_s: of one GPU, instead of them. processes:
    to a run.
    """
    statuses = watch.statuses(runs)
    configs = [run.config for run in runs]
    images = len({(config.data, config.total_steps, config.batch_size) for config in configs})
    table = plan_table(runs, statuses, with_images=images > 1)
    seed = ["seed"] if len(set(table["seed"])) == 1 else []
    print(watch.fit(table, ["images", "channel share", "GPU-hours", *seed, "FLOPs", "parameters"]))
    config, flops = configs[0], sum(map(train_flops, configs))
    each = (f"each {config.total_steps:,} steps of {config.batch_size:,} images of {config.data}; "
            if images == 1 else "")
    say(f"{len(runs)} runs ({watch.count(statuses)}), {each}{flops:.3g} training FLOPs in all")
    in_bfloat16 = ""
    if config.precision != "bfloat16":
        in_bfloat16 = f"; {number(gpu_hours(flops, 'bfloat16'))} in bfloat16"
    say(f"{number(gpu_hours(flops, config.precision))} GPU-hours in all: computed, not measured, "
        f"for an H100 at {GPU_SHARE:.0%} (assumed) of its peak in {config.precision}{in_bfloat16}")
    left = [(config, (config.total_steps - status.step) * config.batch_size)
            for config, status in zip(configs, statuses)]
    shared = f"; {processes} processes to a run" if processes > 1 else ""
    say(hours_to_go(left, finished, device, images_per_s) + shared)


def say(text):
    print(textwrap.fill(text, watch.COLUMNS))


def plan_table(runs, statuses, with_images):
    """A line for each run; with_images: which and how many, where that is not the same for all."""
    configs = [run.config for run in runs]
    flops = [train_flops(config) for config in configs]
    images = {"images": [config.data for config in configs],
              "steps": [f"{config.total_steps:,}" for config in configs]}
    rates = {"lr": ["searched for" if run.awaits else f"{run.config.lr:g}" for run in runs]}
    return {
        "run": [run.name for run in runs], "seed": [config.seed for config in configs],
        **(images if with_images else {}), **(rates if any(run.arm for run in runs) else {}),
        "channel share": [f"{channel_share(config.model):.3f}" for config in configs],
        "parameters": [f"{num_parameters(config.model):,}" for config in configs],
        "FLOPs": [f"{value:.3g}" for value in flops],
        "GPU-hours": [number(gpu_hours(value, config.precision))
                      for value, config in zip(flops, configs)],
        "state": [status.state for status in statuses]}


def hours_to_go(left, finished, device, images_per_s):
    """The line that says the hours of training of [(config, images that it has yet to see)]."""
    if images_per_s:
        seconds = sum(images for _, images in left) / images_per_s
        unit, source = "GPU-hours", f"at {images_per_s:,.0f} images/s a GPU (given)"
    elif finished:
        counted, (kind, name) = on_one_hardware(finished, device)
        seconds = sum(3 * forward_flops(config.model) * images / measured_rate(config, counted)
                      for config, images in left if images)
        rates = [flops_per_s(done) for done in counted]
        unit, one = "CPU-process-hours", "process"
        if kind == "cuda":
            unit, one = "GPU-hours", "GPU"
        others = len(finished) - len(counted)
        ending = f"; {others} on other hardware do not count)" if others else ")"
        source = (f"each run as fast as the one nearest in FLOPs an image (measured in "
                  f"{len(counted)} runs that are done, on {name}: {min(rates):.3g} to "
                  f"{max(rates):.3g} FLOP/s a {one}{ending}")
    else:
        return ("measured hours: not known before a run is done here; --images-per-s N tells them "
                "from the speed of one GPU")
    hours = seconds / 3600
    digits = 1 if hours >= 10 else 3
    return f"{hours:,.{digits}f} {unit} to go, of training, {source}"
