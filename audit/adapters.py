"""The model that is audited: a Jet, or what a Python file makes look like one."""
import dataclasses
import hashlib
from pathlib import Path

import torch

from audit.checks import AuditError
from audit.request import relative_path
from convert import config_checksum, load_jet
from harness.checkpoint import weights_checksum
from harness.errors import one_line, short
from harness.files import read_bytes
from harness.machine import pick_device
from harness.run_folder import read_done


class Adapter(torch.nn.Module):
    """A model from a Python file with forward(x) -> (z, logdet) and inverse(z) -> (x, logdet)."""

    def __init__(self, path):
        super().__init__()
        space = {"__name__": "adapter", "__file__": str(path)}
        try:
            source = read_bytes(path)
            exec(compile(source, str(path), "exec"), space)  # the user's own file, as asked for
            self.functions = {name: space[name] for name in ("forward", "inverse")}
        except OSError as error:
            raise AuditError(f"--adapter {one_line(error)}") from None
        except KeyError as error:
            raise AuditError(f"--adapter {path}: defines no function {error}: it needs forward(x) "
                             "-> (z, logdet) and inverse(z) -> (x, logdet)") from None
        except (Exception, SystemExit) as error:  # its exit code is not the audit's
            raise AuditError(f"--adapter {path}: cannot be run ({short(error)})") from None
        self.digest = hashlib.sha256(source).hexdigest()

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self._call("forward", x)

    def inverse(self, z):
        return self._call("inverse", z)

    def _call(self, name, value):
        try:
            out, logdet = self.functions[name](value)
            fits = out.shape == value.shape and logdet.shape == (len(value),)
        except (Exception, SystemExit) as error:
            raise AuditError(f"--adapter: {name} failed ({short(error)}): it takes (B, C, H, W) "
                             "and returns a tensor like it and log|det| (B,) in nats") from None
        if not fits:
            raise AuditError(f"--adapter: {name} of {tuple(value.shape)} returned "
                             f"{tuple(out.shape)} and {tuple(logdet.shape)}: it must return "
                             f"{tuple(value.shape)} and ({len(value)},)")
        return out, logdet


def load_model(request):
    """(model, what names it, what its run recorded or None)."""
    if request.adapter:
        model = Adapter(request.adapter)
        return model, {"kind": "adapter", "name": Path(request.adapter).stem,
                       "path": relative_path(request.adapter), "weights_sha256": model.digest,
                       "config": None}, None
    path = Path(request.checkpoint)
    model = load_jet(path, **request.model)
    if model.config.context_dim:
        raise AuditError(f"{path}: conditional on labels, which an audit does not take yet: "
                         "evaluate.py measures it with and without them")
    about = {"kind": "jet", "name": path.resolve().stem, "path": relative_path(path),
             "weights_sha256": weights_checksum(model), "config_sha256": config_checksum(model),
             "config": dataclasses.asdict(model.config),
             "num_params": sum(weight.numel() for weight in model.parameters())}
    recorded = read_done(path) if path.is_dir() else None
    return model.to(pick_device(request.device)), about, recorded
