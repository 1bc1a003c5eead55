"""Samples of a Jet in a PNG, side by side.

    python experiments/sample.py assets/jet_cifar10 -n 64 --out grid.png
    python experiments/sample.py runs/first -n 16 --out grid.png --temperature 0.9
    python experiments/sample.py runs/conditional --labels 0 3 8 --out grid.png   # a row per class

Any weights that load_jet reads will do. The same weights, seed and temperature give the same bytes
(on the same kind of machine, with as many threads). Figure 5 is draw_samples.py's.
"""
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import torch
from PIL import Image

import kernels
from convert import load_jet
from experiments.draw_samples import draw_samples, labels_of_rows
from harness.errors import UserError
from harness.files import named_in_errors, write_atomically
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.machine import MAX_THREADS, hardware, pick_device
from jet import JetConfig
from paper_figures.figure5 import tile


def make_parser():
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", help="the Jet: a run folder, a checkpoint, "
                        "an official .npz or a jet-pytorch .pt")
    parser.add_argument("-n", "--num", type=int, default=64, metavar="N",
                        help="samples (default: 64)")
    parser.add_argument("--labels", type=int, nargs="+", metavar="CLASS",
                        help="classes of a conditional Jet, a row each (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="what to write")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="standard deviation of the latent noise (default: 1, as trained)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the latent noise (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="CPU threads (default: 1)")
    add_setting_flags(parser.add_argument_group(
        "the model, as far as a file of another implementation does not tell it"), JetConfig,
        "model.")
    return parser


def check(flags):
    """Raise UserError, or OSError, for what would be found wrong after the work."""
    for name, lowest, most in (("num", 1, 2 ** 16), ("seed", 0, math.inf),
                               ("threads", 1, MAX_THREADS)):
        if (value := getattr(flags, name)) < lowest:
            raise UserError(f"--{name} {value}: must be {lowest} or more")
        if value > most:
            raise UserError(f"--{name} {value}: must be at most {most}")
    if flags.seed >= 2 ** 63:
        raise UserError(f"--seed {flags.seed}: must be below 2**63")
    if not 0 <= flags.temperature < math.inf:
        raise UserError(f"--temperature {flags.temperature}: must be a finite number, 0 or more")
    out = flags.out
    if out.suffix != ".png" or out.is_dir():
        raise UserError(f"--out {out}: the grid is a .png file: give it the name of one")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}: make it, or give another")
    with named_in_errors(out), tempfile.TemporaryFile(dir=out.resolve().parent):
        pass  # a file can be made there


def main(arguments=None):
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        check(flags)
        torch.set_num_threads(flags.threads)
        device = pick_device(flags.device)
        jet = kernels.accelerate(load_jet(flags.weights, **model_fields(vars(flags))).to(device))
        if jet.config.channels not in (1, 3):
            raise UserError(f"{flags.weights}: makes images of {jet.config.channels} channels, "
                            "which a PNG cannot show: 1 or 3 are allowed")
        num, columns = flags.num, math.ceil(math.sqrt(flags.num))
        labels = labels_of_rows(jet, num, flags.labels)
        if labels is not None:
            num, columns = len(labels), int((labels == labels[0]).sum())
        begun = time.perf_counter()
        try:
            samples = draw_samples(jet, num, flags.seed, flags.temperature, labels)
        except ValueError as error:
            raise UserError(f"{flags.weights}: {error}: try a lower --temperature") from None
        seconds = time.perf_counter() - begun
        grid = tile(samples, columns)
        image = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid)
        write_atomically(flags.out, lambda file: image.save(file, "PNG"))
        print(f"{flags.out}: {num} samples of {flags.weights}, temperature "
              f"{flags.temperature:g}, seed {flags.seed}; {seconds:.0f} s on {hardware(device)}")


if __name__ == "__main__":
    main()
