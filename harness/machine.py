"""The machine that a run is on, as torch sees it: its device, name, free memory and idle cores."""
import contextlib
import os
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch

from harness import distributed
from harness.errors import TrainingError
from harness.host import free_memory

MAX_THREADS = 1024  # of a run: many more end a process without a word


def pick_device(device, graph=False):
    """auto, cpu or cuda -> torch.device; cuda that is not there is an error.

    Of several processes on a machine each takes a GPU of its own. graph: whether steps are to be
    CUDA graphs, which need a GPU and one process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise TrainingError(f"device {device!r}: must be auto, cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise TrainingError(f"device {device!r}: torch {torch.__version__} sees no GPU here: use "
                            "--device cpu, or a machine with one")
    if graph and (device == "cpu" or distributed.size() > 1):
        found = "the device is cpu"
        if device != "cpu":
            found = f"{distributed.size()} processes are at this run"
        raise TrainingError(f"graph: a CUDA graph needs a GPU and one process, and {found}: leave "
                            "out --graph")
    try:
        if device == "cuda" and distributed.local_size() > 1:
            if torch.cuda.device_count() > 1:  # with one, it was chosen by whoever placed us
                device = f"cuda:{distributed.local_rank()}"
            torch.cuda.set_device(device)
        return torch.empty(0, device=device).device
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def hardware(device, info=Path("/proc/cpuinfo")):
    """The GPU's name, or the CPU's with its family and model: virtual ones share a name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = info.read_text().partition("\n\n")[0].splitlines()
        told = {name.strip(): value.strip() for name, _, value in
                (line.partition(":") for line in lines)}
        kind = ", ".join(f"{name} {told[field]}" for name, field in
                         (("family", "cpu family"), ("model", "model")) if field in told)
        return told["model name"] + (f" ({kind})" if kind else "")
    except (OSError, KeyError, UnicodeDecodeError):
        return platform.processor() or platform.machine()


def free_bytes(device, root=Path("/")):
    """Bytes of memory that this process can still take on a device; infinite where nobody knows."""
    if device.type == "cuda":  # torch's own reserve is free, too
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    return free_memory(root)


def idle_cores(window_s=0.2, root=Path("/")):
    """How many of the cores that this process may use are idle now: at least 1.

    All of them where nobody knows; never more than what a cgroup allows.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    limit = len(cores)
    with contextlib.suppress(OSError, ValueError):  # no Linux, or no limit
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        limit = min(limit, max(1, int(quota) // int(period)))

    def busy():
        rows = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
        times = {row[0]: list(map(int, row[1:9])) for row in rows if row[0].startswith("cpu")}
        mine = [times[f"cpu{core}"] for core in cores]
        return sum(map(sum, mine)), sum(time[3] + time[4] for time in mine)  # all, idle
    with contextlib.suppress(OSError, KeyError, ValueError):
        all_before, idle_before = busy()
        time.sleep(window_s)
        all_after, idle_after = busy()
        share = (idle_after - idle_before) / max(1, all_after - all_before)
        limit = min(limit, round(share * len(cores)))
    return max(1, limit)


def of_threads(threads):
    """"1 thread", or "2 threads (waiting passive)": how they wait for each other."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower() or "undefined"
    return "1 thread" if threads == 1 else f"{threads} threads (waiting {policy})"


def where(processes, threads, hosts):
    """"4 processes of 1 thread on node1, node2, job 12 (restart 1)"."""
    parts = [f"{processes} process" if processes == 1 else f"{processes} processes",
             f"of {of_threads(threads)}",
             f"on {', '.join(dict.fromkeys(hosts))}"]
    text = " ".join(parts)
    if "SLURM_JOB_ID" in os.environ:
        text += f", job {os.environ['SLURM_JOB_ID']}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return text if restarts == "0" else f"{text} (restart {restarts})"


def versions():
    return {"python_version": platform.python_version(), "torch_version": torch.__version__,
            "numpy_version": np.__version__}


def matmul_rate(size=1024):
    """FLOP/s of this CPU in a float32 matrix product with torch's threads; takes a split second."""
    a, seconds = torch.randn(size, size), []
    for _ in range(4):  # the first warms up
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2 * size ** 3 / min(seconds)


@contextlib.contextmanager
def full_float32():
    """float32 is float32 on GPUs, too: TF32, PyTorch's default for convolutions, is not."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = [backend.allow_tf32 for backend in backends]
    deterministic = torch.backends.cudnn.deterministic
    try:
        for backend in backends:
            backend.allow_tf32 = False
        torch.backends.cudnn.deterministic = True  # gradients of convolutions: the same bits again
        yield
    finally:
        for backend, allow in zip(backends, saved):
            backend.allow_tf32 = allow
        torch.backends.cudnn.deterministic = deterministic


@contextlib.contextmanager
def outside_errors():
    """A GPU that is full, or a process that is gone, ends a run in one line."""
    try:
        yield
    except RuntimeError as error:
        # OutOfMemoryError, and what the driver, cuBLAS or a graph's recording make of it
        if isinstance(error, TrainingError):
            raise
        is_full = re.search("CUDA.*out of memory|ALLOC_FAILED", str(error))
        if is_full or isinstance(error, torch.OutOfMemoryError):
            raise TrainingError(f"out of memory ({str(error).splitlines()[0]}): try "
                                "--checkpoint-activations on, or a --micro-batch below the one in "
                                "log.txt; runs at a time share a GPU's memory") from None
        lost = re.search("by peer|NCCL|Timed out|connect", str(error), re.I)
        if distributed.size() > 1 and lost:
            why = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])  # where in gloo's source
            raise TrainingError(f"process {distributed.rank()} lost the others ({why}): the same "
                                "command goes on from the last checkpoint") from None
        raise


def compile_couplings(jet):
    """torch.compile the couplings in place: equal ones share a graph, names in checkpoints stay."""
    for coupling in jet.couplings:
        coupling.compile(dynamic=False)


@contextlib.contextmanager
def compile_limits():
    """Within, a graph for each kind, batch size and of training or evaluation may be compiled.

    Beyond the limit an error, never eager.
    """
    import torch._dynamo  # takes a second: imported where something is compiled
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024,
                                    fail_on_recompile_limit_hit=True):
        yield


def networks_in(precision, device):
    """Within, the couplings' networks multiply in bfloat16 if that is the precision."""
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
