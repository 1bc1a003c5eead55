"""Train assets/jet_cifar10/, the small Jet of this repository; keep of its run what others need.

    JET_DATA=FOLDER python assets/make_jet_cifar10.py      # minutes on a GPU, a day on one core

Its learning rate is the best of RATES after three epochs of cifar10-search; what they reached is
kept in search.csv. The same command goes on where it was. The folder is a finished run folder:
load_jet and train() read it like any other. Its checkpoint has the weights alone.
"""
import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pandas as pd

from harness.checkpoint import CHECKPOINT_NAME, read_tensors, save_checkpoint
from harness.errors import NonFiniteError
from harness.files import write_atomically
from harness.flags import ArgumentParser, one_line_errors
from jet import JetConfig
from recipe import TrainConfig
from train import train

FOLDER, RUN_DIR = ROOT / "assets/jet_cifar10", ROOT / "runs/jet_cifar10"
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
CONFIG = TrainConfig(  # 51 epochs
    data="cifar10", batch_size=128, total_steps=20_000, eval_every=5000,
    model=JetConfig(image_size=32, num_couplings=20, block_depth=1, emb_dim=64, num_heads=2))
SEARCH = dataclasses.replace(CONFIG, data="cifar10-search", total_steps=1055, eval_every=0)


def search():
    """A row for each rate: what it reaches on images that are neither trained on nor tested on."""
    rows = []
    for lr in RATES:
        row = {"lr": lr, "total_steps": SEARCH.total_steps}
        with contextlib.suppress(NonFiniteError):  # too high a rate: its row has no numbers
            run_dir = RUN_DIR.with_name(f"jet_cifar10_lr={lr}")
            done = train(dataclasses.replace(SEARCH, lr=lr), run_dir)
            row |= {name: done[name] for name in ("bits_per_dim", "bits_per_dim_se", "num_images")}
        rows.append(row)
    return pd.DataFrame(rows)


def main():
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    parser.parse_args()
    with one_line_errors(parser.prog):
        found = search()
        print(found.to_string(index=False), flush=True)
        best = float(found.loc[found["bits_per_dim"].idxmin(), "lr"])
        done = train(dataclasses.replace(CONFIG, lr=best), RUN_DIR)
        trained = read_tensors(RUN_DIR / CHECKPOINT_NAME)
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / CHECKPOINT_NAME).unlink(missing_ok=True)  # or it would be kept as the one before
        save_checkpoint(FOLDER, {name: trained[name] for name in ("config", "step", "model")})
        for name in ("config.json", "done.json", "log.txt", "metrics.csv", "per_image.npy"):
            shutil.copyfile(RUN_DIR / name, FOLDER / name)
        write_atomically(FOLDER / "search.csv", found.to_csv(index=False, lineterminator="\n"))
    print(f"{done['bits_per_dim']:.4f} +- {done['bits_per_dim_se']:.4f} bits/dim on "
          f"{done['num_images']:,} test images")


if __name__ == "__main__":
    main()
