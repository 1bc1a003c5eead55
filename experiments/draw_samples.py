"""Figure 5: samples, their nearest training images, and paths through latent space.

    python experiments/draw_samples.py                         # smoke: a minute, embedded images
    python experiments/draw_samples.py --scale small --jobs 2 --data-root DIR --neighbours
    python experiments/draw_samples.py --scale paper --dry-run
    python experiments/draw_samples.py --checkpoint assets/jet_cifar10 --data-root DIR \\
        --neighbours --interpolate

The larger model of the main table, from scratch and fine-tuned (the paper: at 32 and 64 pixels,
pretrained on ImageNet-21k); runs that experiments/main_results.py has finished are not trained
again. The paper's temperature is not known: 1, the model as it was trained, is our choice.
--checkpoint draws from any weights that load_jet takes. The uint8 images go to results/samples/,
with all that made them, and from there to the figure.
"""
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np
import torch

from convert import load_jet, opened, weights_id
from data import SETS, load_images
from experiments import main_results
from harness.condition import one_hot
from harness.errors import DataError, TrainingError
from harness.files import write_atomically
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.host import ROOT, code_version
from harness.machine import pick_device
from jet import JetConfig, dequantize, quantize
from paper_figures import figure5
from sweeps import sweep
from sweeps.grid import Experiment
from train import weights_config

# Of the main table's points: the larger size, without what is not fine-tuned and, at paper scale,
# without CIFAR-10
SIZES = {"smoke": "10x1", "small": "16x2", "medium": "32x2", "paper": "64x5"}
TRAININGS = ("pretrained", "scratch", "fine-tuned")
STEPS = 8  # images of a path through latent space, with both ends


def configs(scale):
    """The grid points of a scale: those of the main table that the figure shows."""
    return [point for point in main_results.configs(scale)
            if point.labels["size"] == SIZES[scale] and point.labels["training"] in TRAININGS
            and point.config.data != "cifar10"]


@torch.no_grad()
def draw_samples(jet, n, seed, temperature, labels=None):
    """n samples, uint8 (n, H, W, C), the same on any device; ValueError where they overflow.

    labels: (n,) of a class-conditional Jet.
    """
    generator, batches = torch.Generator().manual_seed(seed), []
    for start in range(0, n, 64):
        count, context = min(64, n - start), None
        if labels is not None:
            context = one_hot(labels[start:start + count], jet.config.context_dim)
        batches.append(jet.sample(count, generator, temperature, context).cpu())
    return torch.cat(batches).numpy()


def labels_of_rows(jet, num, classes=None):
    """The label (n,) of each sample of a sheet with one row per class; None of a Jet without.

    num: samples in all, rounded up to full rows. classes: None: each that the Jet knows. Raises
    DataError.
    """
    known = jet.config.context_dim
    if not known:
        if classes:
            raise DataError("--labels: this Jet is told no labels: leave them out")
        return None
    if classes and not 0 <= min(classes) <= max(classes) < known:
        raise DataError(f"--labels {' '.join(map(str, classes))}: this Jet knows 0 to {known - 1}")
    classes = classes or range(known)
    return np.repeat(classes, math.ceil(num / len(classes)))


def nearest(queries, array, device="cpu"):
    """The image of an array that is nearest to each query, and how near it is.

    queries, array: uint8 (n, H, W, C) and (N, H, W, C). Returns indices (n,) and root mean square
    differences (n,) in grey levels. The first of equally near images counts.
    """
    x = torch.tensor(queries, device=device).flatten(1).double()
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), int)
    for start in range(0, len(array), 4096):
        y = torch.tensor(np.array(array[start:start + 4096]), device=device).flatten(1).double()
        # whole numbers below 2^53: exact
        squares = x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)
        squares = squares.cpu().numpy()  # (n, images of the piece)
        closer = squares.min(1) < best
        index = np.where(closer, start + squares.argmin(1), index)
        best = np.where(closer, squares.min(1), best)
    return index, np.sqrt(best / x.shape[1])


@torch.no_grad()
def interpolate(jet, images, steps=STEPS):
    """Paths between pairs of images, uint8 (2 r, H, W, C) -> (r, steps, H, W, C).

    They are arcs between the latents: the middle of a line would be shorter than any sample.
    """
    weight = next(jet.parameters())
    middle = torch.full(images.shape, 0.5, dtype=weight.dtype)  # of each bin
    x = dequantize(np.array(images), middle).permute(0, 3, 1, 2).to(weight.device)
    ends = jet(x)[0].unflatten(0, (-1, 2))  # (r, 2, C, H, W)
    first, last = (end.flatten(1) for end in ends.unbind(1))
    cosine = torch.nn.functional.cosine_similarity(first, last).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)[:, None]
    path = [(torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * last) / torch.sin(angle)
            for t in torch.linspace(0, 1, steps).tolist()]
    z = torch.stack(path, 1).reshape(-1, *ends.shape[2:])  # (r * steps, C, H, W)
    images = quantize(jet.inverse(z)[0]).permute(0, 2, 3, 1)
    return images.unflatten(0, (-1, steps)).cpu().numpy()


def save_samples(path, weights, jet, images, flags, about):
    """Draw what the flags ask for from a Jet and save it with what made it.

    weights: where they are, for messages. images: {split: ImageSet}, for neighbours and paths.
    about: what is known of the weights. Raises TrainingError where samples overflow, and DataError
    for images that the Jet does not take, or too few of them.
    """
    for image_set in images.values():
        height, width, channels = image_set.array.shape[1:]
        if (channels, height, width) != jet.config.image_shape:
            raise DataError(f"{image_set.name} has images of {height} x {width} x {channels}, and "
                            f"this Jet makes {' x '.join(map(str, jet.config.image_shape))} "
                            "(channels first): give other --data")
    if images and 2 * flags.interpolate > (count := len(images["test"].array)):
        raise DataError(f"--interpolate {flags.interpolate}: {images['test'].name} has {count} "
                        "test images, and each path takes two")
    if flags.interpolate and jet.config.context_dim:
        raise DataError("--interpolate: this Jet is conditional on labels, and there is none for "
                        "what lies between two classes: leave it out")
    hint = "try a lower --temperature"
    about = about | {"seed": flags.sample_seed, "temperature": flags.temperature}
    labels = labels_of_rows(jet, flags.num, getattr(flags, "labels", None))
    num = flags.num if labels is None else len(labels)
    try:
        samples = draw_samples(jet, num, flags.sample_seed, flags.temperature, labels)
        content = {"samples": samples} | ({} if labels is None else {"labels": labels})
        if flags.interpolate:
            hint = "no paths between these images"
            content["paths"] = interpolate(jet, images["test"].array[:2 * flags.interpolate])
            about["paths_of"] = images["test"].name
    except ValueError as error:
        raise TrainingError(f"{weights}: {error}: {hint}") from None
    if flags.neighbours:
        train, test, device = images["train"], images["test"], next(jet.parameters()).device
        index, distances = nearest(samples, train.array, device)
        content |= {"neighbours": np.array(train.array[index]), "distances": distances}
        about |= {"neighbours_of": train.name, "train_fingerprint": train.fingerprint}
        if test.fingerprint != train.fingerprint:
            _, held_out = nearest(test.array[:flags.num], train.array, device)
            about["held_out_distance"] = float(np.median(held_out))
    about = json.dumps(about | code_version())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.savez_compressed(file, about=about, **content))
    print(path)


def add_sample_flags(parser):
    group = parser.add_argument_group("what is drawn")
    group.add_argument("--num", type=int, default=32, metavar="N",
                       help="samples of a model (default: 32)")
    group.add_argument("--labels", type=int, nargs="+", metavar="CLASS",
                       help="classes of a conditional Jet, a row each (default: all)")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T",
                       help="standard deviation of the latent noise (default: 1, as trained)")
    group.add_argument("--sample-seed", type=int, default=0, metavar="SEED",
                       help="of the latent noise (default: 0)")
    group.add_argument("--neighbours", action="store_true",
                       help="with the nearest training image of each sample: is it a copy?")
    group.add_argument("--interpolate", type=int, nargs="?", const=4, default=0, metavar="ROWS",
                       help="with paths between pairs of test images (4, or so many)")


def check_sample_flags(flags):
    """Raise TrainingError for flags that nothing could be drawn with."""
    for name, lowest in (("num", 1), ("sample_seed", 0), ("interpolate", 0)):
        if (value := getattr(flags, name)) < lowest:
            raise TrainingError(f"--{name.replace('_', '-')} {value}: must be {lowest} or more")
    if flags.sample_seed >= 2 ** 63:
        raise TrainingError(f"--sample-seed {flags.sample_seed}: must be below 2**63")
    if not 0 <= flags.temperature < float("inf"):
        raise TrainingError(f"--temperature {flags.temperature}: must be a finite number, 0 or "
                            "more")


def load_splits(data, root):
    return {split: load_images(data, split, root) for split in ("train", "test")}


def sample_runs(samples):
    """Save the samples of each run of the sweep; one seed is shown."""
    flags, place = samples.flags, samples.place
    for run in [run for run in samples.own.runs if run.config.seed == 0]:
        images = load_splits(run.config.data, place.data_root)
        about = {"run_id": run.run_id, "dataset": run.config.data,
                 "variant": images["train"].variant, "weights": run.config.hash}
        path = figure5.samples_path(flags.results_dir, flags.scale, run.points[0].values())
        jet = load_jet(run.folder).to(pick_device(place.device)).eval()
        save_samples(path, run.folder, jet, images, flags, about)


def sample_checkpoint(arguments):
    """The command line with --checkpoint: draw from the weights that it names."""
    parser = ArgumentParser(prog="draw_samples.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="a run folder or weight file")
    parser.add_argument("--name", help="of the files (default: the checkpoint's)")
    parser.add_argument("--data",
                        help="image set of neighbours and paths (default: what it was trained on)")
    parser.add_argument("--data-root", metavar="DIR",
                        help="holds the image sets (default: $JET_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    for name in ("results", "figures"):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / sweep.DIRS[name],
                            metavar="DIR", help=f"default: {sweep.DIRS[name]}")
    add_sample_flags(parser)
    add_setting_flags(parser.add_argument_group(
        "the model, as far as a file of another implementation does not tell it"), JetConfig,
        "model.")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        check_sample_flags(flags)
        name = flags.name or flags.checkpoint.resolve().stem
        device = pick_device(flags.device)
        weights = opened(flags.checkpoint)
        jet = load_jet(weights, **model_fields(vars(flags))).to(device).eval()
        config, _ = weights_config(weights)
        trained_on, images = config.data if config else "", {}
        if flags.neighbours or flags.interpolate:
            if not (data := flags.data or trained_on):
                raise DataError(f"{flags.checkpoint} does not tell what it was trained on: give "
                                "images by --data")
            images = load_splits(data, flags.data_root)
        about = {"run_id": name, "dataset": trained_on,
                 "variant": SETS[trained_on].variant if trained_on in SETS else "",
                 "weights": weights_id(weights)}
        path = flags.results_dir / f"samples/{name}.npz"
        save_samples(path, flags.checkpoint, jet, images, flags, about)
        for drawn in figure5.draw_file(path, flags.figures_dir):
            print(drawn)


EXPERIMENT = Experiment(
    name="draw_samples", description=__doc__, configs=configs,
    swept=("size", "training", "dataset"),
    varying=main_results.EXPERIMENT.varying, draw=figure5.draw, runs_of=main_results.EXPERIMENT)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--checkpoint" for argument in arguments):
        return sample_checkpoint(arguments)
    parser = sweep.make_parser(EXPERIMENT)
    add_sample_flags(parser)
    with one_line_errors(parser.prog):
        samples = sweep.parse(EXPERIMENT, parser, arguments)
        check_sample_flags(samples.flags)
        if sweep.carry_out(samples):
            samples = sweep.replan(samples)  # the rates that were searched for are known now
            if all(run.is_done for run in samples.own.runs):  # else the CSV is of shards alone
                sample_runs(samples)
            sweep.draw(samples)


if __name__ == "__main__":
    main()
