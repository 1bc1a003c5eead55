"""Stages of checks and measurements for a machine with one NVIDIA GPU; .ci/gpu runs this.

Each stage ends by itself within its seconds, with what is whole by then, and so it does on SIGTERM.
It writes into OUT, and nowhere else: <stage>_done.json, <stage>_log.txt, CSVs, and a trace or
packed run folders, at most 8 files of at most 16 MiB; files of the same stage that are there are
replaced. It prints a table last. Exit status: 0; 1 where something failed or nothing could be done;
2 for bad arguments.
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import time
from pathlib import Path

import gpu_checks
import gpu_medium
from gpu_stage import ROOT, Stage, clean

sys.path.insert(0, str(ROOT))
from harness.errors import TrainingError
from harness.flags import ArgumentParser, one_line_errors

STAGES = {"tests": (120, gpu_checks.run_tests), "speed": (180, gpu_checks.run_speed),
          "medium": (420, gpu_medium.run)}  # seconds, what does it
PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "tqdm", "pytest", "PIL")
TORCH = (2, 11)


def read_flags(arguments=None):
    parser = ArgumentParser(prog=".ci/gpu", description=__doc__)
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the files; it is made")
    defaults = ", ".join(f"{name} {seconds}" for name, (seconds, _) in STAGES.items())
    parser.add_argument("seconds", metavar="SECONDS", nargs="?", type=int,
                        help=f"it ends by itself within these (default: {defaults})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: rehearse at tiny sizes (default: cuda)")
    medium = parser.add_argument_group("with medium")
    medium.add_argument("--data-root", metavar="DIR", type=os.path.abspath,
                        help="holds CIFAR-10 (default: $JET_DATA)")
    medium.add_argument("--scale", choices=("medium", "small"),
                        help="whose grids (default: medium); small: searches learning rates first")
    medium.add_argument("--jobs", metavar="N", type=int,
                        help="runs at a time (default: 1; eager, by GPU memory and cores)")
    medium.add_argument("--experiments", nargs="+", metavar="NAME", help="default: all seven")
    for name, help in (("compile", "torch.compile the couplings (default: no)"),
                       ("graph", "training steps as CUDA graphs (default: on a GPU)")):
        medium.add_argument(f"--{name}", help=help, action=argparse.BooleanOptionalAction)
    flags = parser.parse_intermixed_args(arguments)
    if flags.seconds is None:
        flags.seconds, _ = STAGES[flags.stage]
    if flags.seconds < 10:
        parser.error(f"SECONDS {flags.seconds}: must be 10 or more")
    for name in ("data_root", "scale", "jobs", "experiments", "compile", "graph"):
        if getattr(flags, name) is not None and flags.stage != "medium":
            parser.error(f"--{name.replace('_', '-')}: only with medium")
    if flags.jobs is not None and flags.jobs < 1:
        parser.error(f"--jobs {flags.jobs}: must be 1 or more")
    if flags.device == "cpu" and (flags.compile or flags.graph):
        parser.error("--compile and --graph: only on a GPU")
    if flags.graph is None:
        flags.graph = flags.device != "cpu"
    if flags.out.exists() and not flags.out.is_dir():
        parser.error(f"OUT {flags.out}: must be a folder")
    flags.experiments = flags.experiments or list(gpu_medium.ORDER)
    if unknown := set(flags.experiments) - set(gpu_medium.ORDER):
        parser.error(f"--experiments {sorted(unknown)[0]}: must be of "
                     f"{', '.join(gpu_medium.ORDER)}")
    return flags


def what_is_missing():
    """A line on what this machine lacks, or None."""
    if sys.version_info < (3, 11):
        return f"python3 is {platform.python_version()}: needs 3.11 or newer"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"python3 lacks {', '.join(missing)}: install them (requirements.txt; PIL is pillow)"
    version = importlib.metadata.version("torch")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TORCH:
        return f"torch is {version}: needs {'.'.join(map(str, TORCH))} or newer"
    return None


def main(begun):
    flags = read_flags()
    if missing := what_is_missing():
        sys.exit(f".ci/gpu: error: {missing}")
    stage = Stage(flags, begun)
    try:
        stage.open()
        with one_line_errors(".ci/gpu"):
            if error := stage.look():
                raise TrainingError(error)
            if flags.stage == "medium":
                gpu_medium.check(flags)
        stage.empty()
        # what processes, which begin as copies of this one, would import (optimizers the second)
        for module in ("experiments.throughput", "torch._dynamo"):
            importlib.import_module(module)
        _, run = STAGES[flags.stage]
        status = stage.close(run(stage, flags))
    finally:
        clean(stage)
    sys.exit(status)


if __name__ == "__main__":
    main(time.monotonic())
