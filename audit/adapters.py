"""The model that is audited: a Jet, or what a Python file makes look like one."""
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch

from audit.checks import AuditError
from audit.request import relative_path
from convert import config_checksum, load_jet
from harness.checkpoint import weights_checksum
from harness.errors import one_line, printable
from harness.files import read_bytes
from harness.machine import pick_device
from harness.run_folder import is_fingerprint, read_done

WORKER = Path(__file__).with_name("worker.py")
MAX_LINE = 2 ** 20
NEEDS = "it needs forward(x) -> (z, logdet) and inverse(z) -> (x, logdet)"


class Worker:
    """A process that runs an adapter, and answers in numbers alone."""

    def __init__(self, path, threads):
        self.path, self.files, self.seconds = path, {}, 0.0  # of its CPU
        self.folder = tempfile.TemporaryDirectory(prefix="audit-")
        (request_end, to_it), (from_it, answer_end) = os.pipe(), os.pipe()
        self.requests, self.answers = os.fdopen(to_it, "wb"), os.fdopen(from_it, "rb")
        command = [sys.executable, str(WORKER), str(path), str(request_end), str(answer_end),
                   str(threads), self.folder.name]
        nothing = subprocess.DEVNULL  # what it prints is nobody's finding
        self.process = subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True,
            pass_fds=(request_end, answer_end), env={**os.environ, "TMPDIR": self.folder.name})
        weakref.finalize(self, self.process.kill)
        for end in (request_end, answer_end):
            os.close(end)
        self.about = self.read_head("cannot be run")
        if missing := self.about.get("missing"):
            raise AuditError(f"--adapter {path}: defines no function {missing[0]!r}: {NEEDS}")

    def read_head(self, what):
        """The line of JSON of an answer."""
        try:
            head = json.loads(self.answers.readline(MAX_LINE))
            error, self.seconds = head.get("error"), float(head.get("seconds", 0))
            self.files |= {str(path): digest for path, digest in head.get("files", {}).items()
                           if is_fingerprint(digest)}
        except (ValueError, TypeError, AttributeError, RecursionError, OSError):
            error = "its process ended"
        if error:
            hint = ": its weights must be of the type of x" if "dtype" in error else ""
            raise AuditError(f"--adapter {self.path}: {what} ({printable(error, 500)}){hint}")
        return head

    def call(self, name, *arrays):
        """The parts of its answer to tensors of one type and shape."""
        arrays = [array.detach().cpu().contiguous().numpy() for array in arrays]
        first, expected = arrays[0], f"{name} of {arrays[0].dtype} {arrays[0].shape}"
        wanted = [[str(first.dtype), list(first.shape)], [str(first.dtype), [len(first)]]]
        wanted = wanted[:1] if name == "vjp" else wanted
        head = {"name": name, "arrays": len(arrays), "bytes": first.nbytes, "wanted": wanted,
                "shape": first.shape, "dtype": str(first.dtype),
                "bfloat16": torch.is_autocast_enabled("cpu")}
        try:
            self.requests.write(json.dumps(head).encode() + b"\n")
            for array in arrays:
                self.requests.write(array)
            self.requests.flush()
        except OSError:  # it has ended
            pass
        heads = self.read_head(f"{expected} failed").get("parts")
        if heads != wanted:
            raise AuditError(
                f"--adapter {self.path}: {expected} returned {printable(heads, 200)}: it must "
                f"return z like x, in the type of x, and log|det| ({len(first)},) of that type")
        return [self.read_array(kind, shape) for kind, shape in wanted]

    def read_array(self, dtype, shape):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        content = self.answers.read(size)
        if len(content) != size:
            raise AuditError(f"--adapter {self.path}: its process ended")
        return torch.from_numpy(np.frombuffer(bytearray(content), dtype).reshape(shape))


class Adapter(torch.nn.Module):
    """A model from a Python file with forward(x) -> (z, logdet) and inverse(z) -> (x, logdet)."""

    def __init__(self, path, threads=1):
        super().__init__()
        try:
            self.digest = hashlib.sha256(read_bytes(path)).hexdigest()
        except OSError as error:
            raise AuditError(f"--adapter {one_line(error)}") from None
        self.worker, self.threads = Worker(path, threads), threads
        self.is_stochastic = self.worker.about.get("stochastic") is True
        self.of_type = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # what it is cast to

    def __deepcopy__(self, memo):
        copied = Adapter.__new__(Adapter)
        torch.nn.Module.__init__(copied)
        copied.__dict__ |= {name: value for name, value in self.__dict__.items()
                            if not name.startswith("_")}
        copied.of_type = torch.nn.Parameter(self.of_type.clone(), requires_grad=False)
        return copied

    def again(self):
        """The same adapter in a process that has seen nothing yet, in float64."""
        return Adapter(self.worker.path, self.threads).double()

    def forward(self, x):
        return tuple(self.worker.call("forward", x))

    def inverse(self, z):
        return tuple(self.worker.call("inverse", z))

    def vjp(self, x, u):
        """The gradient of (z * u).sum() at x, as autograd has it."""
        return self.worker.call("vjp", x, u)[0]

    def files(self):
        """[{"path", "sha256"}] of what it has read: weights, and modules of its folder."""
        return [{"path": relative_path(path), "sha256": digest}
                for path, digest in sorted(self.worker.files.items())]


def load_model(request):
    """(model, what names it, what its run recorded or None)."""
    if request.adapter:
        model = Adapter(request.adapter, request.threads)
        digest = hashlib.sha256(json.dumps([model.digest, *(one["sha256"] for one in
                                                           model.files())]).encode()).hexdigest()
        return model, {"kind": "adapter", "name": Path(request.adapter).stem,
                       "path": relative_path(request.adapter), "weights_sha256": digest,
                       "source_sha256": model.digest, "config": None}, None
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
