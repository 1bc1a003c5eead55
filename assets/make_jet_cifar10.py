"""Train assets/jet_cifar10/, the small Jet of this repository; keep of its run what others need.

    JET_DATA=FOLDER python assets/make_jet_cifar10.py      # an hour and a half on one core

The same command goes on where it was. The folder is a finished run folder: load_jet and train()
read it like any other. Its checkpoint has the weights alone.
"""
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from harness.checkpoint import CHECKPOINT_NAME, read_tensors, save_checkpoint
from harness.flags import ArgumentParser, one_line_errors
from jet import JetConfig
from recipe import TrainConfig
from train import train

FOLDER, RUN_DIR = ROOT / "assets/jet_cifar10", ROOT / "runs/jet_cifar10"
CONFIG = TrainConfig(
    data="cifar10", batch_size=64, total_steps=8000, lr=1.5e-3, eval_every=2000,
    model=JetConfig(image_size=32, num_couplings=20, block_depth=1, emb_dim=64, num_heads=2))


def main():
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    parser.parse_args()
    with one_line_errors(parser.prog):
        done = train(CONFIG, RUN_DIR)
        trained = read_tensors(RUN_DIR / CHECKPOINT_NAME)
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / CHECKPOINT_NAME).unlink(missing_ok=True)  # or it would be kept as the one before
        save_checkpoint(FOLDER, {name: trained[name] for name in ("config", "step", "model")})
        for name in ("config.json", "done.json", "log.txt", "metrics.csv"):
            shutil.copyfile(RUN_DIR / name, FOLDER / name)
    print(f"{done['bits_per_dim']:.4f} +- {done['bits_per_dim_se']:.4f} bits/dim on "
          f"{done['num_images']:,} test images")


if __name__ == "__main__":
    main()
