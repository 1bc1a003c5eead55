"""Where and how a run is run: nothing here changes a result by more than rounding."""
import dataclasses

from harness.errors import TrainingError
from harness.flags import add_setting_flags
from jet import check_settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run is run. None of it is part of a run's identity.

    Raises TrainingError that names the field, the value and the rule.
    """
    data_root: str | None = setting(None, "holds the image sets (default: $JET_DATA)", kind=str)
    device: str = setting("auto", "auto, cpu or cuda")
    threads: int = setting(1, "CPU threads of a run; equal bits need equal threads, and several "
                           "threads need idle cores")
    compile: bool = setting(False, "torch.compile the couplings (for GPUs)")
    graph: bool = setting(False, "each training step as one CUDA graph: for small models, which "
                          "are bound by launches")
    micro_batch: int | None = setting(None, "images in memory at a time; gradients add up over the "
                                      "batch (default: what fits)", kind=int)
    checkpoint_activations: str = setting("auto", "recompute activations in backward: same bits, "
                                          "less memory; auto: where needed", ("auto", "on", "off"))
    checkpoint_every_s: float | None = setting(
        None, "seconds between checkpoints (default: 60, or 20 times what the last one took)",
        minimum=0, kind=float)
    wait_s: float = 0.0  # how long to wait for another process to end this run
    echo: bool = False  # what goes to log.txt is printed, too

    def __post_init__(self):
        try:
            check_settings(self)
        except ValueError as error:
            raise TrainingError(str(error)) from None
        if self.threads > 1024:
            raise TrainingError(f"threads={self.threads}: must be from 1 to 1024")


def add_place_flags(parser):
    add_setting_flags(parser, Place, dashes=True)


def place_from_flags(flags, **defaults):
    """The Place of parsed flags (a dict), with other defaults."""
    return Place(**defaults | {name: flags[name] for name in Place.__dataclass_fields__
                               if flags.get(name) is not None})
