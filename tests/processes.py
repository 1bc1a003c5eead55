"""What each of several processes does in test_distributed.py: torchrun starts it."""
import json
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


if __name__ == "__main__":
    main(sys.argv[1])
