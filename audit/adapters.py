"""The model that is audited: a Jet, or what a Python file makes look like one."""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np
import torch

from audit.checks import AuditError
from audit.request import relative_path
from audit.worker import KINDS
from convert import config_checksum, load_jet
from harness.checkpoint import weights_checksum
from harness.errors import one_line, printable
from harness.files import read_bytes
from harness.machine import pick_device
from harness.run_folder import is_fingerprint, is_step, read_done

WORKER = Path(__file__).with_name("worker.py")
MAX_LINE = 2 ** 20
NEEDS = ("it, or a model or class Model in it, needs forward(x) -> (z, logdet) and inverse(z) -> "
         "(x, logdet), or log_prob(x), elbo(x, k) or bits(images)")


class Worker:
    """A process that runs an adapter, and answers in numbers alone."""

    def __init__(self, path, threads, limit=600):
        """limit: seconds that it may take for an answer."""
        self.path, self.files, self.seconds = path, {}, 0.0  # of its CPU
        self.limit = limit
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
        with self.ends_in_time("running the file"):
            self.about = self.read_head("cannot be run")

    @contextlib.contextmanager
    def ends_in_time(self, what):
        """End its process, and raise AuditError, where it takes longer than its limit."""
        is_late = []

        def end():
            is_late.append(True)
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        timer = threading.Timer(self.limit, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except AuditError:
            if is_late:
                raise AuditError(
                    f"--adapter {self.path}: {what} took longer than {self.limit} s, and was ended:"
                    " allow more by --adapter-limit") from None
            raise
        finally:
            timer.cancel()

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

    def call(self, name, *arrays, **how):
        """The parts of its answer to tensors of one type and shape.

        how: "labels" (a list), "by" (which of KINDS), "k" (draws of elbo), "raw" (of the map of
        dequantized images alone, whatever makes them).
        """
        arrays = [array.detach().cpu().contiguous().numpy() for array in arrays]
        first, by = arrays[0], how.get("by") or self.about.get("kind")
        asked = by if name == "forward" else name
        expected = f"{asked} of {first.dtype} {first.shape}"
        wanted = [[str(first.dtype), list(first.shape)], [str(first.dtype), [len(first)]]]
        wanted = wanted[:1] if name == "vjp" else wanted
        head = {"name": name, "arrays": len(arrays), "bytes": first.nbytes, "wanted": wanted,
                "shape": first.shape, "dtype": str(first.dtype),
                "bfloat16": torch.is_autocast_enabled("cpu"), **how}
        with self.ends_in_time(expected):
            try:
                self.requests.write(json.dumps(head).encode() + b"\n")
                for array in arrays:
                    self.requests.write(array)
                self.requests.flush()
            except OSError:  # it has ended
                pass
            heads = self.read_head(f"{expected} failed").get("parts")
            if heads == wanted:
                return [self.read_array(kind, shape) for kind, shape in wanted]
        z = "" if asked in KINDS[1:] else "z like x, in the type of x, and log|det| "
        found = heads[1:] if asked in KINDS[1:] and isinstance(heads, list) else heads
        raise AuditError(
            f"--adapter {self.path}: {expected} returned {printable(found, 200)}: it must "
            f"return {z}({len(first)},) of that type")

    def read_array(self, dtype, shape):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        content = self.answers.read(size)
        if len(content) != size:
            raise AuditError(f"--adapter {self.path}: its process ended")
        return torch.from_numpy(np.frombuffer(bytearray(content), dtype).reshape(shape))


class Adapter(torch.nn.Module):
    """A model from a Python file, as one map of uniformly dequantized x to z (audit/worker.py)."""

    def __init__(self, path, threads=1, limit=600, k=1):
        """k: draws of its elbo, where that is what it has."""
        super().__init__()
        try:
            self.digest = hashlib.sha256(read_bytes(path)).hexdigest()
        except OSError as error:
            raise AuditError(f"--adapter {one_line(error)}") from None
        self.worker, self.threads, self.k = Worker(path, threads, limit), threads, k
        self.kind, self.has, self.bits = self.read_about()
        self.classes, about = 0, self.worker.about  # of the labels that it is told
        self.is_stochastic, self.is_discrete, self.takes_labels = (
            about.get(name) is True for name in ("stochastic", "discrete", "labels"))
        self.of_type = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # what it is cast to

    def read_about(self):
        """What it says of itself, where that makes sense. Raises AuditError."""
        about, path = self.worker.about, self.worker.path
        kind, has, bits = (about.get(name) for name in ("kind", "has", "bits"))
        if kind not in KINDS or not isinstance(has, list):
            missing = " 'inverse'" if isinstance(has, list) and "forward" in has else ""
            raise AuditError(f"--adapter {path}: defines no function{missing}: {NEEDS}")
        if not is_step(bits) or not 1 <= bits <= 8:
            raise AuditError(f"--adapter {path}: BITS = {printable(bits, 40)}: must be 1 to 8")
        return kind, {name for name in has if isinstance(name, str)}, bits

    @property
    def is_density(self):
        """Whether it has no map, which could be inverted."""
        return self.kind != "forward"

    @property
    def bound(self):
        """(bound, dequantization), as claims name them; None: of codes it may be any bound."""
        names = {"bits": None, "elbo": "importance-weighted" if self.k > 1 else "elbo",
                 "log_prob": "exact" if self.is_discrete else "elbo"}
        dequantization = "variational" if self.dequantizes else "uniform"
        is_discrete = self.is_discrete and self.is_density
        return names.get(self.kind, "elbo"), "none" if is_discrete else dequantization

    @property
    def dequantizes(self):
        """Whether it has a dequantizer of its own."""
        return "dequantize" in self.has and not (self.is_discrete and self.is_density)

    @property
    def inverts(self):
        """Whether z can be led back to dequantized images."""
        return not self.is_density and (not self.dequantizes or "dequantize_inverse" in self.has)

    def __deepcopy__(self, memo):
        copied = Adapter.__new__(Adapter)
        torch.nn.Module.__init__(copied)
        copied.__dict__ |= {name: value for name, value in self.__dict__.items()
                            if not name.startswith("_")}
        copied.of_type = torch.nn.Parameter(self.of_type.clone(), requires_grad=False)
        return copied

    def again(self):
        """The same adapter in a process that has seen nothing yet, in float64."""
        worker = self.worker
        return Adapter(worker.path, self.threads, worker.limit, self.k).double()

    def labels(self, context):
        """The labels that a one-hot context tells, as a call has them."""
        return {} if context is None else {"labels": context.flatten(1).argmax(1).tolist()}

    def forward(self, x, context=None, **how):
        return tuple(self.worker.call("forward", x, **{"k": self.k} | self.labels(context) | how))

    def inverse(self, z, context=None, **how):
        return tuple(self.worker.call("inverse", z, **self.labels(context), **how))

    def vjp(self, x, u, context=None):
        """The gradient of (z * u).sum() at x, as autograd has it."""
        return self.worker.call("vjp", x, u, **self.labels(context))[0]

    def files(self):
        """[{"path", "sha256"}] of what it has read: weights, and modules of its folder."""
        return [{"path": relative_path(path), "sha256": digest}
                for path, digest in sorted(self.worker.files.items())]


def taken_by(model, *splits):
    """ImageSets (or None) as a model takes them: of fewer bits; and it is told their labels.

    That is where it takes labels, and all of the sets have some.
    """
    labels = [images.labels for images in splits if images]
    if getattr(model, "takes_labels", False) and all(one is not None for one in labels):
        if min(one.min() for one in labels) < 0:
            raise AuditError(f"{splits[0].name} has labels below 0")
        model.classes = int(max(one.max() for one in labels)) + 1
    bits = getattr(model, "bits", 8)
    return [images and with_bits(images, bits) for images in splits]


def with_bits(images, bits):
    if bits == 8:
        return images
    shift = 8 - bits if images.array.max() >= 2 ** bits else 0  # else they were made so
    return dataclasses.replace(
        images, array=images.array >> shift, name=f"{images.name}-{bits}bit",
        variant=f"{images.variant}-{bits}bit", known_fingerprint=None)


def load_model(request):
    """(model, what names it, what its run recorded or None)."""
    if request.adapter:
        model = Adapter(request.adapter, request.threads, request.adapter_limit,
                        request.claim_k or 1)
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
