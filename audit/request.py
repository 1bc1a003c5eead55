"""What is asked of an audit: the model, the images, how, and against which claim."""
import dataclasses
import re
import secrets
from pathlib import Path

from audit.checks import AuditError
from data import SPLITS
from harness.flags import ArgumentParser, add_setting_flags, model_fields
from harness.host import ROOT
from harness.machine import MAX_THREADS
from jet import JetConfig, check_settings, setting

NUM_JACOBIANS = 16  # images, at most
DEFAULT_MODEL = ROOT / "assets/jet_cifar10"
CLAIMS = ("claim", "claim_from", "claim_data", "claim_variant", "claim_bound",
          "claim_dequantization", "claim_k", "claim_precision")
RECORDED = ("checkpoint", "adapter", "data", "split", "num_images", "draws", "iw", "jacobians",
            "codelength", *CLAIMS, "eval_seed", "threads", "entropy")
# Not in it, or elsewhere now:
PLACES = ("adapter", "adapter_limit", "checkpoint", "data", "data_root", "device")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Each is a flag of audit_bpd.py. Raises AuditError that names field, value and rule."""
    checkpoint: str | None = setting(
        None, "a run folder or weight file (default: assets/jet_cifar10)", kind=str)
    adapter: str | None = setting(
        None, "instead: a Python file with forward(x) and inverse(z), or log_prob(x), elbo(x, k) "
        "or bits(images); it is run", kind=str)
    adapter_limit: int = setting(600, "seconds that an adapter may take for an answer",
                                 maximum=10 ** 6)
    data: str = setting("cifar10-subset", "image set, prepared folder or .npy file")
    data_root: str | None = setting(None, "holds the image sets (default: $JET_DATA)", kind=str)
    split: str = setting("test", "which images of the set", SPLITS)
    num_images: int | None = setting(None, "the first so many images (default: all)", minimum=2,
                                     kind=int)
    claim: str | None = setting(
        None, "bits/dim with the digits that were published, like 3.66", kind=str)
    claim_from: str | None = setting(
        None, "the claim of this model of results/reported.csv", kind=str)
    claim_data: str | None = setting(
        None, "what the claim is of, like imagenet64-oord (default: the audited images)", kind=str)
    claim_variant: str | None = setting(None, "of these images (default: the set's)", kind=str)
    claim_bound: str | None = setting(
        None, "of the claim (default: the model's)",
        ("elbo", "importance-weighted", "exact", "ode"), kind=str)
    claim_dequantization: str | None = setting(
        None, "of the claim (default: the model's)", ("uniform", "variational", "none"),
        kind=str)
    claim_k: int | None = setting(
        None, "draws of an importance-weighted claim", maximum=10_000, kind=int)
    claim_precision: str | None = setting(
        None, "that the claim was computed in (default: float32)",
        ("float64", "float32", "bfloat16"), kind=str)
    against: str | None = setting(
        None, "another model (weights, FILE.py) or a certificate of one: the paired difference",
        kind=str)
    draws: int = setting(4, "noise draws an image", maximum=10_000)
    iw: int = setting(4, "largest K of the importance-weighted bound", maximum=10_000)
    jacobians: int | None = setting(
        None, "images whose whole Jacobian is taken, up to 16 (default: by cost)", minimum=0,
        maximum=NUM_JACOBIANS, kind=int)
    codelength: int | None = setting(
        None, "images that are really compressed (default: up to 512, of an adapter 32, by cost)",
        minimum=0, maximum=10 ** 6, kind=int)
    eval_seed: int = setting(0, "of the noise", minimum=0)
    device: str = setting("auto", "auto, cpu or cuda")
    threads: int = setting(2, "CPU threads; more need idle cores", maximum=MAX_THREADS)
    model: dict = dataclasses.field(default_factory=dict)  # JetConfig fields, for load_jet
    # Images, directions and noise of the checks come from it: no model can know it before.
    entropy: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self):
        try:
            check_settings(self)
        except ValueError as error:
            raise AuditError(str(error)) from None
        if not re.fullmatch("[0-9a-f]{32}", str(self.entropy)):
            raise AuditError(f"entropy={self.entropy!r}: must be 32 hexadecimal digits")
        if self.adapter and self.checkpoint:
            raise AuditError("--adapter and --checkpoint: give one of them")
        if not self.adapter:
            object.__setattr__(self, "checkpoint", self.checkpoint or str(DEFAULT_MODEL))

    @classmethod
    def from_flags(cls, flags):
        """flags: those that were given, a dict."""
        given = {name: flags[name] for name in cls.__dataclass_fields__ if name in flags}
        return cls(**given, model=model_fields(flags))

    @classmethod
    def from_settings(cls, settings, flags):
        """That of a certificate again; flags may say where its model and images are now."""
        known = {name: settings[name] for name in RECORDED}
        known |= {"adapter": None, "checkpoint": None}
        if "adapter" not in flags:
            known["checkpoint"] = str(ROOT / settings["checkpoint"])
            parser = RecordedFlags(prog="audit_bpd.py", add_help=False)
            add_setting_flags(parser, JetConfig, "model.")
            recorded = vars(parser.parse_args(settings["model_flags"]))
            known["model"] = model_fields(flags) or model_fields(recorded)
        return cls(**known | {name: flags[name] for name in PLACES if name in flags})

    def to_settings(self):
        """The part of it that a certificate records."""
        files = {name: path and relative_path(path) for name, path in
                 (("checkpoint", self.checkpoint), ("adapter", self.adapter))}
        settings = {name: getattr(self, name) for name in RECORDED}
        return settings | files | {"model_flags": self.model_arguments()}

    def model_arguments(self):
        """The JetConfig fields, as command lines have them."""
        arguments = []
        for name, value in self.model.items():
            if isinstance(value, bool):
                arguments.append(f"--model.{name}" if value else f"--no-model.{name}")
            else:
                values = value if isinstance(value, (list, tuple)) else [value]
                arguments += [f"--model.{name}", *map(str, values)]
        return arguments


class RecordedFlags(ArgumentParser):
    """The flags of a certificate, which must end no program, least of all as if all were well."""

    def error(self, message):
        raise AuditError(f"its model_flags are none: {message}")


def relative_path(path):
    """A path as others can use it: relative to the repository where it is inside."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
