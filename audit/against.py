"""By how much the audited model differs from another, image by image."""
import hashlib
from pathlib import Path

from audit.adapters import Adapter, taken_by
from audit.certificates import read_certificate
from audit.checks import AuditError
from audit.estimate import bits_table
from convert import load_jet
from data import load_images
from harness.errors import short
from harness.files import read_bytes
from harness.machine import pick_device
from paper_figures.per_image import paired_difference


def against(request, measured, data):
    """The sentence of --against OTHER. data: that part of the certificate."""
    other = request.against
    if other.endswith(".json"):
        bits = certified_bits(other, data)
    else:
        is_adapter = other.endswith(".py")
        model = Adapter(other, request.threads, request.adapter_limit) if is_adapter else (
            load_jet(other))
        images = load_images(request.data, request.split, request.data_root)
        images, = taken_by(model, images.first(request.num_images))
        bits = bits_table(model.to(pick_device("cpu" if is_adapter else request.device)),
                          images, request.eval_seed, request.draws)
        bits = bits["bits"].mean(0)
    ours = measured["rows"]["bits"][:measured["draws"]].mean(0)
    difference, error = paired_difference(ours, bits)
    return (f"Against {other}: {difference:+.4f} +- {error:.4f} bits/dim, paired over "
            f"{len(bits):,} images, of which {int((ours < bits).sum()):,} have fewer bits here; "
            f"below 0, the audited model is better")


def certified_bits(path, data):
    """Bits/dim (N,) in float64 of a certificate's images, which must be these."""
    import pandas as pd  # takes half a second: imported where it is used
    other = read_certificate(path)
    table = Path(path).with_name(Path((other.get("per_image") or {}).get("file", "none")).name)
    if other["data"]["fingerprint"] != data["fingerprint"]:
        raise AuditError(f"--against {path}: a certificate of other images than these")
    try:
        content = read_bytes(table)
        if hashlib.sha256(content).hexdigest() != other["per_image"]["sha256"]:
            raise AuditError(f"--against {path}: {table.name} beside it is not the one it names")
        return pd.read_csv(table)["bits_per_dim_float64"].to_numpy()
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, AuditError):
            raise
        raise AuditError(f"--against {path}: the values of its images are not readable "
                         f"({short(error)})") from None
