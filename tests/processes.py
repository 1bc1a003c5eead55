"""What each of several processes does in test_distributed.py.

torchrun starts it, or with a third argument it starts so many of itself.
"""
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from convert import load_jet
from evaluate import evaluate
from harness import distributed
from harness.errors import TrainingError
from harness.place import Place
from train import TrainConfig, train


def main(jobs):
    """Do the jobs of a file one after the other.

    They are {name: {"config": ..., "run_dir": ..., "place": fields of Place, arguments of train}}.
    """
    torch.set_num_threads(1)
    for name, job in json.loads(Path(jobs).read_text()).items():
        config, run_dir = TrainConfig.from_dict(job.pop("config")), Path(job.pop("run_dir"))
        try:
            place = Place(**job.pop("place", {}))
            done = train(config, run_dir, place=place, quiet=True, **job)
        except (TrainingError, ValueError) as error:
            done = {"error": str(error)}
        note = run_dir.parent / f"{name}-rank-{distributed.rank()}.json"
        note.write_text(json.dumps(done))
    images = np.load(config.data)[:13]
    numbers = evaluate(load_jet(sys.argv[2]), images, draws=2, batch_size=4, per_image=True)
    bits = numbers["bits_per_dim_per_image"].tolist()
    (run_dir.parent / f"bits-rank-{distributed.rank()}.json").write_text(json.dumps(bits))
    distributed.leave()


def become(rank, processes, port):
    """One of the processes, as torchrun would have it."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE":
                   f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    main(sys.argv[1])


def start(processes):
    import torch._dynamo  # DistributedDataParallel does, for seconds: here once for all
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=become, args=(rank, processes, port)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    sys.exit(any(process.exitcode for process in started))


if __name__ == "__main__":
    start(int(sys.argv[3])) if sys.argv[3:] else main(sys.argv[1])
