"""Several processes at one run, by torch.distributed: gloo on CPUs, NCCL on GPUs.

    torchrun --nproc-per-node 4 train.py ...

torchrun (or a Slurm job of sweeps/cluster.py) tells each process its rank; the first one, of rank
0, alone reads and writes files. With one process every function here does nothing, or what its name
says at once.
"""
import atexit
import datetime
import gc
import os
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start(timeout_s=1800):
    """Join the other processes where the environment names any; later calls do nothing.

    timeout_s: how long a process waits for one that hangs, or was lost without a word; the first
    may take minutes to write a large checkpoint while others wait.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
        if backend == "gloo":  # NCCL may wait for those that are gone
            atexit.register(leave)


def leave():
    """Part from the other processes, when all is done.

    gloo's threads must have ended before Python does: one that drops the last reference to a tensor
    after that aborts the process. DistributedDataParallel, which is in reference cycles, keeps them
    alive.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def size():
    """The number of processes at this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size():
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def part(n):
    """The slice of n things that is this process's: of 0 ... n - 1 every one is in one part."""
    return slice(rank() * n // size(), (rank() + 1) * n // size())


def agree(*values):
    """The largest of each number over the processes: equal in all, and with no wait for a GPU."""
    if size() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def add_up(tensor):
    """The tensor's sum over the processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(function, *arguments):
    """What the first process's function returns or raises, in all of them; small values only."""
    if size() == 1:
        return function(*arguments)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*arguments)
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].is_shown_elsewhere = rank() > 0  # by the first process
        raise outcome[1]
    return outcome[0]


def from_all(value):
    """The small values of all processes, in the order of their ranks."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def wrap(jet):
    """The Jet with the first process's weights in all, and gradients that are means over them."""
    if size() == 1:
        return jet
    # the warning is of broadcast_buffers, and ours are constants
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(jet, broadcast_buffers=False, gradient_as_bucket_view=True)


def copy_moments(optimizer):
    """The first process's Adam moments, if it has any, in all of them.

    Weights are DistributedDataParallel's business.
    """
    if size() == 1 or not agree(len(optimizer.state))[0]:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, count = optimizer.state[parameter], torch.zeros((), device=parameter.device)
            for name, like in (("step", count), ("exp_avg", parameter), ("exp_avg_sq", parameter)):
                state.setdefault(name, torch.zeros_like(like, requires_grad=False))
                dist.broadcast(state[name], 0)
