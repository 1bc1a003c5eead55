"""By how much two Jets differ in bits/dim, image by image.

    python experiments/compare.py runs/one runs/other --data cifar10-subset
    python experiments/compare.py run official.npz --data imagenet64-oord --data-root DIR

A and B: finished run folders or weight files. Both are measured on the same images with the same
noise, so that the error of their difference is far smaller than that of either number. Of two
finished runs on these test images, what they have measured at their end is read instead. A picture
shows the differences, and the ten images that differ most.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from evaluate import add_evaluation_flags, evaluate_weights, images_of_flags
from harness.errors import UserError
from harness.flags import ArgumentParser, one_line_errors
from harness.run_folder import DONE_NAME, read_done, read_per_image
from paper_figures import differences
from paper_figures.per_image import paired_difference


def make_parser():
    parser = ArgumentParser(prog="compare.py", description=__doc__)
    for name in "AB":
        parser.add_argument(name.lower(), metavar=name, help="a run folder, a checkpoint, an "
                            "official .npz or a jet-pytorch .pt")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE.png",
                        help="the picture (default: compare.png)")
    add_evaluation_flags(parser)
    return parser


def measured(path, images, flags):
    """Bits/dim (N,) that a finished run has measured on just these images, or None."""
    is_run = (Path(path) / DONE_NAME).exists() and flags.split == "test"
    if not is_run or flags.num_images or flags.precision != "float32":
        return None
    done = read_done(path)
    same = done["test_fingerprint"] == images.fingerprint
    return read_per_image(path, done) if same else None


def main(arguments=None):
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        if flags.out.suffix != ".png" or not flags.out.resolve().parent.is_dir():
            raise UserError(f"--out {flags.out}: must be the name of a .png file in a folder that "
                            "exists")
        images = images_of_flags(flags)
        bits = [measured(path, images, flags) for path in (flags.a, flags.b)]
        how = "as the runs have measured them"
        if any(values is None for values in bits):
            how = f"measured now in {flags.precision}"
            bits = [evaluate_weights(path, images, flags, per_image=True)[0][
                "bits_per_dim_per_image"] for path in (flags.a, flags.b)]
        tell(flags, images, bits, how)
        differences.draw(np.asarray(images.array[:len(bits[0])]), bits, (flags.a, flags.b),
                         flags.out)
        print(flags.out)


def tell(flags, images, bits, how):
    """Print both numbers, and their difference with its error over images."""
    for name, path, values in zip("AB", (flags.a, flags.b), bits):
        print(f"{name} {np.mean(values, dtype=float):.4f} bits/dim  {path}")
    print(difference(bits))
    print(f"on {len(bits[0]):,} {images.split} images of {images.name}, variant {images.variant}, "
          f"fingerprint {images.fingerprint[:12]}, {how}")


def difference(bits):
    """The line that says by how much A and B differ. bits: two times bits/dim (N,)."""
    mean, error = paired_difference(*bits)
    count, better = len(bits[0]), int((bits[0] < bits[1]).sum())
    said = f"{mean:+.5f} +- {error:.5f} bits/dim"
    if error > 0:
        said += f", {abs(mean) / error:.1f} standard errors"
    return f"A - B {said}, image by image; A is better on {better:,} of {count:,}"


if __name__ == "__main__":
    main()
