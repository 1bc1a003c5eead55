"""An adapter in a process of its own: `python worker.py FILE.py REQUESTS ANSWERS THREADS FOLDER`.

It is asked over the pipe REQUESTS (a file descriptor) and answers over ANSWERS, each time with a
line of JSON and bytes of numbers, so that the auditor takes nothing from it but numbers. It imports
nothing of the project: the folder of FILE.py comes first, and a data.py there is that adapter's.
"""
import ctypes
import hashlib
import inspect
import json
import math
import operator
import os
import struct
import sys
import time
from pathlib import Path

FILES = {".pt", ".pth", ".ckpt", ".bin", ".npz", ".npy", ".safetensors", ".pkl", ".pickle", ".h5",
         ".hdf5", ".msgpack", ".tar", ".model", ".weights", ".params"}
MAX_BYTES, MAX_TEXT = 4 * 2 ** 30, 400
# The first that is there is what is measured; forward needs inverse.
KINDS = ("forward", "log_prob", "elbo", "bits")
NAMES = (*KINDS, "inverse", "prior", "log_prior", "dequantize", "dequantize_inverse")
SETTINGS = ("STOCHASTIC", "DISCRETE", "BITS", "WEIGHTS")
HASHED, SEEN = {}, []  # checksums by their files; the modules of the last answer


class Model:
    """What a file, or the model in it, defines, as one map of uniformly dequantized x to z.

    The auditor knows nothing else: a dequantizer of its own, fewer bits, latents in a list and
    their prior are parts of that map. A density alone has z = 0, and all is in its log-det.
    """

    def __init__(self, space):
        holder = None
        if not any(callable(space.get(name)) for name in KINDS):
            holder = space.get("model", space.get("Model"))
            holder = holder() if isinstance(holder, type) else holder
        found = {name: getattr(holder, name, space.get(name)) for name in (*NAMES, *SETTINGS)}
        self.functions = {name: found[name] for name in NAMES if callable(found[name])}
        kinds = [name for name in KINDS if name in self.functions]
        if "inverse" not in self.functions and "forward" in kinds:
            kinds.remove("forward")  # of a module it may be anything
        self.kind = (*kinds, None)[0]
        self.bits = found["BITS"] or 8
        self.told = {name for name, one in self.functions.items() if "y" in parameters_of(one)}
        self.is_discrete = found["DISCRETE"] is True or self.kind == "bits"
        is_drawn = self.kind == "elbo" and found["STOCHASTIC"] is None
        self.is_stochastic = is_drawn or found["STOCHASTIC"] is True
        self.weights = [str(file) for file in found["WEIGHTS"] or ()]
        self.shapes = None  # of its latents
        if not isinstance(self.bits, int):
            raise TypeError("BITS must be a whole number")

    def about(self):
        return {"kind": self.kind, "has": sorted(self.functions), "bits": self.bits,
                "labels": bool(self.told), "stochastic": self.is_stochastic,
                "discrete": self.is_discrete}

    def use(self, name, y, *arguments):
        """The answer of a function of the adapter, which is told labels if it has a y."""
        if name not in self.functions:
            raise NameError(f"it defines no {name}")
        return self.functions[name](*arguments, **({"y": y} if name in self.told else {}))

    def forward(self, call, y, x):
        kind = call.get("by") or self.kind
        if kind == "bits" or self.is_discrete and kind != "forward":
            return self.probability(kind, call, y, x)
        moved, logdet = self.dequantize(x, y) if not call.get("raw") else (x, 0.0)
        if kind != "forward":
            return of_density(x, self.density(kind, call, y, moved), logdet)
        z, own = pair_of("forward", self.use("forward", y, moved))
        parts = z if isinstance(z, (list, tuple)) else [z]
        self.shapes = [part.shape[1:] for part in parts], parts is z
        if any(part.dtype != x.dtype for part in (*parts, own)):
            return parts[0], own  # which is told
        parts, more = self.standardize(parts, y)
        z = parts[0]
        if len(parts) > 1 or z.shape != x.shape and z.numel() == x.numel():
            z = flat(parts).view_as(x)
        return z, own + more + logdet

    def density(self, kind, call, y, x):
        draws = [call.get("k") or 1] if kind == "elbo" else []
        return self.use(kind, y, x, *draws)

    def probability(self, kind, call, y, x):
        """Of discrete images: a density that is even within each of their cells."""
        v, _ = self.levels(x)
        if kind == "bits":
            value = -self.density(kind, call, y, v.byte()).to(x.dtype) * math.log(2)
        else:
            value = self.density(kind, call, y, v / self.half - 1)
        return of_density(x, value, x[0].numel() * math.log(127.5))

    @property
    def half(self):
        """Half of the highest level."""
        return (2 ** self.bits - 1) / 2

    def levels(self, x, half=127.5):
        """The levels of x and where x lies between each and the next, in [0, 1)."""
        import torch
        tiny = 256 * torch.finfo(x.dtype).eps
        place = (x + 1) * half
        v = (place.detach() + tiny).floor().clamp(0, 2 ** self.bits - 1)
        return v, (place - v).clamp(tiny, 1 - tiny)

    def dequantize(self, x, y):
        """What the adapter takes for uniformly dequantized x, and the log-det of that."""
        scale = 127.5 / self.half
        if "dequantize" not in self.functions:
            x = x if scale == 1 else (x + 1) * scale - 1
            return x, x[0].numel() * math.log(scale)
        v, u = self.levels(x)
        moved, logdet = pair_of("dequantize", self.use("dequantize", y, v.byte(), u))
        return moved, logdet + x[0].numel() * math.log(127.5)

    @property
    def has_prior(self):
        return "prior" in self.functions or "log_prior" in self.functions

    def standardize(self, z, y):
        """z as standard normal values, and the log-det of that."""
        if not self.has_prior:
            return z, 0.0
        e, logdet = [], 0.0
        for part, (mean, std) in zip(z, self.prior(z, y)):
            std = std.expand_as(part)
            e.append((part - mean) / std)
            logdet = logdet - std.log().flatten(1).sum(1)
        if "log_prior" in self.functions:  # whose own constants count: the audit finds wrong ones
            logdet = self.of_latents("log_prior", z, y) + (
                flat(e) ** 2 / 2 + math.log(2 * math.pi) / 2).sum(1)
        return e, logdet

    def of_latents(self, name, z, y):
        return self.use(name, y, list(z) if self.shapes[1] else z[0])

    def prior(self, z, y):
        """[(mean, std)] of its latents."""
        if "prior" in self.functions:
            pairs = self.of_latents("prior", z, y)
            return list(pairs) if self.shapes[1] else [pairs]
        at_z, at_0, at_1 = (self.slopes(parts, y) for parts in (
            z, [part * 0 for part in z], [part * 0 + 1 for part in z]))
        pairs = [(zero / (zero - one), (zero - one) ** -0.5) for zero, one in zip(at_0, at_1)]
        for part, slope, (mean, std) in zip(z, at_z, pairs):
            expected = (mean - part) / std ** 2
            if not (slope - expected).abs().max() < 1e-3 * (1 + expected.abs().max()):
                raise ValueError("log_prior is not of independent normal values: give prior(z) -> "
                                 "[(mean, std)], or lead z to normal values in forward")
        return pairs

    def slopes(self, z, y):
        """The gradients of log_prior."""
        import torch
        with torch.enable_grad():
            z = [part.detach().requires_grad_(True) for part in z]
            return torch.autograd.grad(self.of_latents("log_prior", z, y).sum(), z)

    def inverse(self, call, y, z):
        import torch
        if not self.shapes:
            self.forward(call, y, torch.zeros_like(z))
        shapes, is_list = self.shapes
        sizes = [math.prod(shape) for shape in shapes]
        parts = [part.reshape(len(z), *shape)
                 for part, shape in zip(z.flatten(1).split(sizes, 1), shapes)]
        more = 0.0
        if self.has_prior:
            e = parts
            for _ in e:  # each may depend on those that come later
                parts = [part * std + mean for part, (mean, std) in zip(e, self.prior(parts, y))]
            more = -self.standardize(parts, y)[1]
        x, logdet = pair_of("inverse", self.use("inverse", y, parts if is_list else parts[0]))
        if x.dtype != z.dtype or logdet.dtype != z.dtype:
            return x, logdet
        x = x.view_as(z) if x.numel() == z.numel() else x
        if not call.get("raw"):
            x, own = self.requantize(x, y)
            more = more + own
        return x, logdet + more

    def requantize(self, x, y):
        """The inverse of dequantize()."""
        dims, scale = x[0].numel(), 127.5 / self.half
        if "dequantize" not in self.functions:
            return x if scale == 1 else (x + 1) / scale - 1, -dims * math.log(scale)
        images = self.levels(x, self.half)[0].byte()
        u = self.use("dequantize_inverse", y, images, x)
        logdet = self.use("dequantize", y, images, u)[1]
        return (images + u) / 127.5 - 1, -logdet - dims * math.log(127.5)

    def vjp(self, call, y, x, u):
        import torch
        with torch.enable_grad():
            z = self.forward(call, y, x.requires_grad_(True))[0]
            return torch.autograd.grad((z * u).sum(), x)


def parameters_of(function):
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is no Python
        return ()


def pair_of(name, result):
    import torch
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"{name} returned {type(result).__name__}, not a pair of tensors")
    z, logdet = result
    parts = z if isinstance(z, (tuple, list)) else [z]
    if not all(isinstance(part, torch.Tensor) for part in (*parts, logdet)):
        raise TypeError(f"{name} returned a pair that is not of tensors")
    return z, logdet


def flat(parts):
    import torch
    return torch.cat([part.flatten(1) for part in parts], 1)


def of_density(x, value, logdet):
    """As if of a map: z = 0, and what is left of the density is its log-det."""
    import torch
    if isinstance(value, torch.Tensor) and value.dtype == x.dtype:
        value = value + logdet + x[0].numel() * math.log(2 * math.pi) / 2
    return torch.zeros_like(x), value


def serve(path, requests, answers):
    """Run the file, then answer until the pipe is closed."""
    def answer(body=b"", **head):
        answers.write(json.dumps({**head, "seconds": time.process_time()}).encode() + b"\n" + body)
        answers.flush()

    space, opened = {"__name__": "adapter", "__file__": str(path)}, watch_files()
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), space)  # the user's own file, as asked
        model = Model(space)
        opened.update((path.parent / file).absolute() for file in model.weights)
        answer(**model.about(), files=hashes(opened, path.parent))
    except BaseException as error:  # its exit code is not the audit's
        answer(error=told(error))
        return
    while line := requests.readline():
        call = json.loads(line)
        content = [requests.read(call["bytes"]) for _ in range(call["arrays"])]
        try:
            body, parts = run(model, call, content)
            answer(body, parts=parts, files=hashes(opened, path.parent))
        except BaseException as error:
            answer(error=told(error))


def run(model, call, content):
    """The bytes of an answer, and the type and shape of its parts."""
    import numpy as np
    import torch
    arrays = [torch.from_numpy(np.frombuffer(part, call["dtype"]).reshape(call["shape"]).copy())
              for part in content]
    labels = call.get("labels")
    y = None if labels is None else torch.tensor(labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=call["bfloat16"]), torch.no_grad():
        parts = getattr(model, call["name"])(call, y, *arrays)
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"{call['name']} returned {', '.join(type(one).__name__ for one in parts)}"
                        ", not tensors")
    parts = [part.detach().cpu().contiguous() for part in parts]
    heads = [[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts]
    fits = heads == call["wanted"]  # else what they are is told, and nothing sent
    return b"".join(part.numpy().tobytes() for part in parts if fits), heads


def told(error):
    return f"{type(error).__name__}: {error}"[:MAX_TEXT]


def watch_files():
    """The files of weights that are opened from now on: a set that fills."""
    opened = set()

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            file = Path(os.fsdecode(arguments[0]))
            if file.suffix in FILES:
                opened.add(file.absolute())
    sys.addaudithook(hook)
    return opened


def hashes(opened, folder):
    """{path: SHA-256} of those files, and of what was imported from the adapter's folder."""
    modules = list(sys.modules.values())
    if len(modules) != len(SEEN) or not all(map(operator.is_, modules, SEEN)):  # it takes 1 ms
        SEEN[:] = modules
        names = [getattr(module, "__file__", None) for module in modules]
        inside = os.path.join(folder, "")  # a Path of each would take 20 ms
        opened.update(Path(name) for name in names
                      if isinstance(name, str) and name.startswith(inside))
    for file in opened - HASHED.keys():
        if file.is_file() and file.stat().st_size <= MAX_BYTES:
            with file.open("rb") as content:
                HASHED[file] = hashlib.file_digest(content, "sha256").hexdigest()
    return {str(file): digest for file, digest in HASHED.items()}


def confine(folder):
    """Let this process write to no file outside a folder, nor touch another process (Landlock).

    So that an adapter alters no auditor, and one process of it tells another nothing. Where the
    system has no Landlock nothing is confined.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return
    writes = 1 << 1 | sum(1 << bit for bit in range(4, 13))  # write, remove, make
    writes |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    rules = struct.pack("QQQ", writes, 1 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = libc.syscall(444, rules, 8 if version < 4 else 16 if version < 6 else 24, 0)
    for place, allowed in ((folder, writes), ("/dev", 1 << 1)):
        opened = os.open(place, os.O_PATH)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, without which the next is refused
    libc.syscall(446, ruleset, 0)
    os.close(ruleset)


def main():
    path, requests, answers, threads, folder = sys.argv[1:]
    del sys.path[0]  # the project's own modules
    import numpy  # noqa: F401 (before a file of the adapter can stand in its way)
    import torch
    path = Path(path).absolute()
    sys.path.insert(0, str(path.parent))
    sys.argv, sys.dont_write_bytecode = [str(path)], True
    torch.set_num_threads(int(threads))
    if sys.platform == "linux":
        confine(folder)
    serve(path, os.fdopen(int(requests), "rb"), os.fdopen(int(answers), "wb"))


if __name__ == "__main__":
    main()
