"""Where and how a run is run: nothing here changes a result by more than rounding."""
import dataclasses
import shutil
import sysconfig
from pathlib import Path

from harness import distributed
from harness.errors import TrainingError
from harness.events import writer_class
from harness.flags import add_setting_flags
from harness.machine import MAX_THREADS
from jet import check_settings, setting

COMPILE_FROM = 100_000  # couplings times steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run is run. None of it is part of a run's identity.

    Raises TrainingError that names the field, the value and the rule.
    """
    data_root: str | None = setting(None, "holds the image sets (default: $JET_DATA)", kind=str)
    device: str = setting("auto", "auto, cpu or cuda")
    threads: int = setting(1, "CPU threads of a run; equal bits need equal threads, and several "
                           "threads need idle cores", maximum=MAX_THREADS)
    compile: bool | None = setting(None, "torch.compile the couplings (default: on one GPU, in "
                                   "runs that are long enough)", kind=bool)
    graph: bool | None = setting(None, "each training step as one CUDA graph (default: on one GPU)",
                                 kind=bool)
    micro_batch: int | None = setting(None, "images in memory at a time; gradients add up over the "
                                      "batch (default: what fits)", kind=int)
    checkpoint_activations: str = setting("auto", "recompute activations in backward: same bits, "
                                          "less memory; auto: where needed", ("auto", "on", "off"))
    checkpoint_every_s: float | None = setting(
        None, "seconds between checkpoints (default: 60, or 20 times what the last one took)",
        minimum=0, kind=float)
    process_timeout_s: float = setting(1800.0, "seconds that a process waits for the others at the "
                                       "run: one that hangs ends it", minimum=1)
    log: str = setting("csv", "what a run writes of its steps: csv: metrics.csv; tensorboard: a "
                       "folder of that name in the run folder, too (needs the package)",
                       ("csv", "tensorboard"))
    wait_s: float = 0.0  # how long to wait for another process to end this run
    echo: bool = False  # what goes to log.txt is printed, too

    def __post_init__(self):
        try:
            check_settings(self)
        except ValueError as error:
            raise TrainingError(str(error)) from None
        if self.log == "tensorboard":
            writer_class()


def step_mode(place, config, device):
    """(whether couplings are compiled, whether a step is a CUDA graph, a line on it).

    Where the place leaves it open, what measured best on an H100 (docs/speed.md): a graph is always
    faster, and compiling takes half a minute, which about COMPILE_FROM couplings in all steps win
    back. It depends on the whole run alone, so that a resumed one has the same bits.
    """
    is_one_gpu = device.type == "cuda" and distributed.size() == 1
    graph = is_one_gpu if place.graph is None else place.graph
    compiled, why_not = place.compile, ""
    if compiled is None:
        is_long = config.total_steps * config.model.num_couplings >= COMPILE_FROM
        why_not = lacks_compiler() if is_one_gpu and is_long else ""
        compiled = is_one_gpu and is_long and not why_not
    line = f"steps: {'one CUDA graph' if graph else 'eager'}, couplings " + (
        "compiled" if compiled else f"not compiled{why_not}")
    return compiled, graph, line


def lacks_compiler():
    """What torch.compile needs on a GPU and is not here, or ""."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        missing = "a C compiler (cc)"
    elif not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing = "Python.h (python3-dev)"
    else:
        return ""
    return f": that needs {missing}, and a step would take about two thirds of the time"


def add_place_flags(parser):
    add_setting_flags(parser, Place, dashes=True)


def place_from_flags(flags, **defaults):
    """The Place of parsed flags (a dict), with other defaults."""
    return Place(**defaults | {name: flags[name] for name in Place.__dataclass_fields__
                               if flags.get(name) is not None})
