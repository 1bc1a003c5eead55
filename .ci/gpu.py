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
import platform
import re
import sys
import time
from pathlib import Path

import gpu_checks
import gpu_medium
from gpu_stage import ROOT, Stage, clean

SECONDS = {"tests": 120, "speed": 180, "medium": 420}
PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "tqdm", "pytest", "PIL")
TORCH = (2, 11)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help shows what is allowed)\n")


def read_flags(arguments=None):
    parser = Parser(prog=".ci/gpu", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="STAGE", choices=SECONDS, help=", ".join(SECONDS))
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the files; it is made")
    defaults = ", ".join(f"{name} {seconds}" for name, seconds in SECONDS.items())
    parser.add_argument("seconds", metavar="SECONDS", nargs="?", type=int,
                        help=f"it ends by itself within these (default: {defaults})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: rehearse at tiny sizes (default: cuda)")
    medium = parser.add_argument_group("with medium")
    medium.add_argument("--data-root", metavar="DIR", type=Path,
                        help="holds CIFAR-10 (default: $JET_DATA)")
    medium.add_argument("--jobs", type=int, metavar="N",
                        help="runs at a time (default: 1; eager, by GPU memory and cores)")
    medium.add_argument("--experiments", nargs="+", metavar="NAME", help="default: all seven")
    medium.add_argument("--compile", action="store_true", default=None,
                        help="torch.compile the couplings")
    medium.add_argument("--graph", action=argparse.BooleanOptionalAction,
                        help="training steps as CUDA graphs (default: on a GPU)")
    flags = parser.parse_intermixed_args(arguments)
    flags.seconds = SECONDS[flags.stage] if flags.seconds is None else flags.seconds
    if flags.seconds < 10:
        parser.error(f"SECONDS {flags.seconds}: must be 10 or more")
    for name in ("data_root", "jobs", "experiments", "compile", "graph"):
        if getattr(flags, name) is not None and flags.stage != "medium":
            parser.error(f"--{name.replace('_', '-')}: only with medium")
    if flags.jobs is not None and flags.jobs < 1:
        parser.error(f"--jobs {flags.jobs}: must be 1 or more")
    if flags.device == "cpu" and (flags.compile or flags.graph):
        parser.error("--compile and --graph: only on a GPU")
    flags.graph = flags.device != "cpu" if flags.graph is None else flags.graph
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
    flags.data_root = flags.data_root and flags.data_root.resolve()
    sys.path.insert(0, str(ROOT))
    stage = Stage(flags, begun)
    try:
        stage.open()
        check(stage, flags)
        run = {"tests": gpu_checks.run_tests, "speed": gpu_checks.run_speed,
               "medium": gpu_medium.run}
        status = stage.close(run[stage.name](stage, flags))
    finally:
        clean(stage)
    sys.exit(status)


def check(stage, flags):
    """End in one line where the stage cannot begin."""
    from harness.errors import TrainingError
    from harness.flags import one_line_errors
    with one_line_errors(".ci/gpu"):
        if error := stage.look():
            raise TrainingError(error)
        if flags.stage == "medium":
            gpu_medium.check(flags)
    stage.empty()
    # Processes begin as copies of this one: what they would import, the second with an optimizer.
    importlib.import_module("experiments.throughput")
    importlib.import_module("torch._dynamo")


if __name__ == "__main__":
    main(time.monotonic())
