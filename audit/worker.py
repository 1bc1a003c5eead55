"""An adapter in a process of its own: `python worker.py FILE.py REQUESTS ANSWERS THREADS FOLDER`.

It is asked over the pipe REQUESTS (a file descriptor) and answers over ANSWERS, each time with a
line of JSON and bytes of numbers, so that the auditor takes nothing from it but numbers. It imports
nothing of the project: the folder of FILE.py comes first, and a data.py there is that adapter's.
"""
import ctypes
import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path

FILES = {".pt", ".pth", ".ckpt", ".bin", ".npz", ".npy", ".safetensors", ".pkl", ".h5", ".msgpack"}
MAX_BYTES, MAX_TEXT = 4 * 2 ** 30, 400
HASHED = {}


def serve(path, requests, answers):
    """Run the file, then answer until the pipe is closed."""
    def answer(body=b"", **head):
        answers.write(json.dumps({**head, "seconds": time.process_time()}).encode() + b"\n" + body)
        answers.flush()

    space, opened = {"__name__": "adapter", "__file__": str(path)}, watch_files()
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), space)  # the user's own file, as asked
        missing = [name for name in ("forward", "inverse") if not callable(space.get(name))]
        answer(missing=missing, stochastic=space.get("STOCHASTIC") is True,
               files=hashes(opened, path.parent))
    except BaseException as error:  # its exit code is not the audit's
        answer(error=told(error))
        return
    while line := requests.readline():
        call = json.loads(line)
        content = [requests.read(call["bytes"]) for _ in range(call["arrays"])]
        try:
            body, parts = run(space, call, content)
            answer(body, parts=parts, files=hashes(opened, path.parent))
        except BaseException as error:
            answer(error=told(error))


def run(space, call, content):
    """The bytes of an answer, and the type and shape of its parts."""
    import numpy as np
    import torch
    arrays = [torch.from_numpy(np.frombuffer(part, call["dtype"]).reshape(call["shape"]).copy())
              for part in content]
    if call["name"] == "vjp":
        x, u = arrays
        with torch.enable_grad():
            z = space["forward"](x.requires_grad_(True))[0]
            parts = torch.autograd.grad((z * u).sum(), x)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=call["bfloat16"]), torch.no_grad():
            parts = space[call["name"]](*arrays)
    if not (isinstance(parts, (tuple, list)) and len(parts) <= 2
            and all(isinstance(part, torch.Tensor) for part in parts)):
        raise TypeError(f"{call['name']} returned {type(parts).__name__}, not a pair of tensors")
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
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    modules = {Path(name) for name in names if name and Path(name).is_relative_to(folder)}
    for file in (opened | modules) - HASHED.keys():
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
