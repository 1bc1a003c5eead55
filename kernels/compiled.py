"""kernels.c, compiled for this machine by its C compiler (CC, else cc) into build/, when needed."""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from harness.errors import UserError

SOURCE = Path(__file__).resolve().with_name("kernels.c")
BUILD = SOURCE.parents[1] / "build"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-std=gnu11"]


@functools.cache
def library():
    """The compiled kernels, or None where they are unwanted or cannot be had."""
    choice = os.environ.get("JET_KERNELS", "C")
    if choice not in ("C", "torch"):
        raise UserError(f"JET_KERNELS={choice}: must be C or torch")
    if choice == "torch":
        return None
    try:
        return _load()
    except (OSError, RuntimeError) as error:
        warnings.warn(f"kernels.c cannot be used ({error}): PyTorch's own kernels train small Jets "
                      "about a third slower. A C compiler (CC, else cc) fixes that; "
                      "JET_KERNELS=torch asks for them", stacklevel=3)
        return None


def _load():
    """Build what is not built yet, for this CPU, and open it. Raises OSError or RuntimeError."""
    compiler, runtime = shlex.split(os.environ.get("CC", "cc")), _openmp()
    recipe = repr((SOURCE.read_bytes(), compiler, FLAGS, runtime, _cpu()))
    path = BUILD / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return _open(path)
    with contextlib.ExitStack() as stack:
        try:
            BUILD.mkdir(exist_ok=True)
            room = stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD))
        except OSError:  # a read-only checkout: built for this process alone
            room = path = stack.enter_context(tempfile.TemporaryDirectory())
        # Linked with the OpenMP that torch has loaded: two pools of threads would fight over cores.
        built = Path(room) / "kernels.so"
        done = subprocess.run([*compiler, *FLAGS, SOURCE, "-shared", "-o", built, runtime, "-lm"],
                              capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())[:200] or done.returncode
            raise RuntimeError(f"{compiler[0]}: {reason}")
        library = _open(built)
        if path != room:
            os.replace(built, path)
        return library


def _cpu(info=Path("/proc/cpuinfo")):
    """What tells this kind of CPU from others: the build is for it alone."""
    try:
        first = info.read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(line for line in first if line.startswith(("model name", "flags", "Features")))


def _openmp(maps=Path("/proc/self/maps")):
    """The file of the OpenMP runtime that torch has loaded; another package may have its own."""
    lines = maps.read_text(errors="surrogateescape").splitlines()
    files = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6
             and re.search(r"/lib[gi]?omp[^/]*\.so[^/]*$", fields[5])}
    packages = Path(torch.__file__).resolve().parents[1]
    folders = (f"{packages}/torch/", f"{packages}/torch.libs/")
    of_torch = {file for file in files if file.startswith(folders)} or files
    if len(of_torch) != 1:
        raise RuntimeError(f"torch's OpenMP library is not clear: {sorted(of_torch) or 'none'}")
    return of_torch.pop()


def _open(path):
    """The kernels in a file, declared, and held against PyTorch's once."""
    library = ctypes.CDLL(str(path))
    pointer, long, whole, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    block = [long, whole, whole, whole]
    for name, arrays, sizes in (
            ("block_room", 0, block), ("block_kept", 0, block[:3]),
            ("block_forward", 5, [*block, real]), ("block_backward", 7, [*block, real]),
            ("norm_forward", 4, [long, whole, real]),
            ("norm_backward", 5, [long, whole, real]),
            ("affine_forward", 5, [long, whole, whole, whole, whole, real]),
            ("affine_backward", 7, [long, whole, whole, whole, real])):
        function = getattr(library, name)
        function.argtypes = [pointer] * arrays + sizes + [whole]
        function.restype = None if arrays else long
    _check(library)
    return library


def _check(library):
    """Raise RuntimeError where the compiler made something else of a block than PyTorch has."""
    B, N, E, heads, eps = 2, 10, 16, 2, 1e-6
    shapes = [(E,), (E,), (3 * E, E), (3 * E,), (E, E), (E,), (E,), (E,), (4 * E, E), (4 * E,),
              (E, 4 * E), (E,)]
    h, *weights = (torch.arange(math.prod(shape)).add(number).sin().view(shape)
                   for number, shape in enumerate([(B, N, E), *shapes]))
    out, room = torch.empty_like(h), torch.empty(library.block_room(B, N, E, heads, 1))
    library.block_forward(h.data_ptr(), pointers(weights), None, out.data_ptr(), room.data_ptr(),
                          B, N, E, heads, eps, 1)
    norm1, norm1_bias, qkv, qkv_bias, project, project_bias, norm2, norm2_bias, *fcs = weights
    x = F.linear(F.layer_norm(h, (E,), norm1, norm1_bias, eps), qkv, qkv_bias)
    q, k, v = x.view(B, N, 3, heads, E // heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, E)
    h = h + F.linear(attended, project, project_bias)
    x = F.linear(F.layer_norm(h, (E,), norm2, norm2_bias, eps), *fcs[:2])
    x = F.linear(F.gelu(x, approximate="tanh"), *fcs[2:])
    if not torch.allclose(out, h + x, atol=1e-4):
        raise RuntimeError("its results differ from PyTorch's")


def pointers(tensors):
    """A C array of the addresses of contiguous tensors; whoever calls keeps them alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
