"""Figure 5: samples, their nearest training images, and paths through latent space.

    python experiments/draw_samples.py                         # smoke: a minute, embedded images
    python experiments/draw_samples.py --scale small --jobs 2 --data-root DIR --neighbours --interpolate
    python experiments/draw_samples.py --scale paper --dry-run
    python experiments/draw_samples.py --checkpoint assets/jet_cifar10 --neighbours --interpolate --data-root DIR

The larger model of the main table, from scratch and fine-tuned (the paper: at 32 and 64 pixels, pretrained on
ImageNet-21k); runs that experiments/main_results.py has finished are not trained again. The paper's temperature is not
known: 1, the model as it was trained, is our choice. --checkpoint draws from any weight file that load_jet takes. The
grids of uint8 images go to results/samples/, with all that made them, and from there to the figure.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from convert import load_jet
from data import SETS, DataError, dequantize, load_images
from experiments import main_results, sweep
from jet import JetConfig, quantize
from paper_figures import figure5, tables
from paper_figures.results_csv import ResultsError
from run_folder import TrainingError, write_atomically
from train import (ArgumentParser, add_config_flags, git_commit, model_flags, one_line_errors, pick_device,
                   weights_config, weights_id)

STEPS = 8  # images of a path through latent space, with both ends


def configs(scale):
    """The grid points of a scale: those of the main table that the figure shows."""
    return [point for point in main_results.configs(scale)
            if tuple(point.labels.values()) in figure5.GRID[scale]]


@torch.no_grad()
def draw_samples(jet, n, seed, temperature):
    """n samples, uint8 (n, H, W, C), the same whatever the device. Raises ValueError where they overflow."""
    generator = torch.Generator().manual_seed(seed)
    batches = [jet.sample(min(64, n - start), generator, temperature).cpu() for start in range(0, n, 64)]
    return torch.cat(batches).numpy()


def nearest(queries, array, device="cpu"):
    """(index (n,), root mean square difference in grey levels (n,)) of the image of an array nearest to each query.

    queries: uint8 (n, H, W, C). array: uint8 (N, H, W, C), read in pieces. The first of equally near ones counts.
    """
    ours = torch.tensor(queries, device=device).flatten(1).double()
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), int)
    for start in range(0, len(array), 4096):
        theirs = torch.tensor(np.array(array[start:start + 4096]), device=device).flatten(1).double()
        squares = (ours.square().sum(1)[:, None] - 2 * ours @ theirs.T + theirs.square().sum(1)).cpu().numpy()  # exact
        closest = squares.argmin(1)
        closer = squares[np.arange(len(ours)), closest] < best
        best[closer], index[closer] = squares.min(1)[closer], start + closest[closer]
    return index, np.sqrt(best / ours.shape[1])


@torch.no_grad()
def interpolate(jet, images, steps=STEPS):
    """Paths between pairs of images, uint8 (2 r, H, W, C) -> (r, steps, H, W, C): arcs between their latents.

    An arc and not a line, for the middle of a line between two normal vectors is shorter than any sample.
    """
    weight = next(jet.parameters())
    x = dequantize(np.array(images), torch.full(images.shape, 0.5, dtype=weight.dtype)).permute(0, 3, 1, 2).to(weight.device)
    ends = jet(x)[0].unflatten(0, (-1, 2))  # (r, 2, C, H, W)
    one, two = (end.flatten(1) for end in ends.unbind(1))
    angle = torch.acos(torch.nn.functional.cosine_similarity(one, two).clamp(-1 + 1e-6, 1 - 1e-6))[:, None]
    path = [(torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
            for t in torch.linspace(0, 1, steps).tolist()]
    z = torch.stack(path, 1).reshape(-1, *ends.shape[2:])  # (r * steps, C, H, W)
    return quantize(jet.inverse(z)[0]).permute(0, 2, 3, 1).unflatten(0, (-1, steps)).cpu().numpy()


def check_images(jet, images, flags):
    """Raise DataError for images that the Jet does not take, or too few of them for the paths."""
    for one in images.values():
        height, width, channels = one.array.shape[1:]
        if (channels, height, width) != jet.config.image_shape:
            raise DataError(f"{one.name} has images of {height} x {width} x {channels}, and this Jet makes "
                            f"{' x '.join(map(str, jet.config.image_shape))} (channels first): give other --data")
    if images and 2 * flags.interpolate > len(images["test"].array):
        raise DataError(f"--interpolate {flags.interpolate}: {images['test'].name} has {len(images['test'].array)} test images, "
                        "and each path takes two")


def save_samples(path, weights, jet, images, flags, about):
    """Draw what the flags ask for from a Jet and save it with what made it, the weights' run folder or file among it.

    images: {split: ImageSet}, needed for neighbours and paths alone. Raises TrainingError where samples overflow.
    """
    jet = jet.to(pick_device(flags.device)).eval()
    check_images(jet, images, flags)
    try:
        content = {"samples": draw_samples(jet, flags.num, flags.sample_seed, flags.temperature)}
    except ValueError as error:
        raise TrainingError(f"{weights}: {error}: try a lower --temperature") from None
    about = about | {"weights": weights_id(weights), "seed": flags.sample_seed, "temperature": flags.temperature}
    if flags.interpolate:
        try:
            content["paths"] = interpolate(jet, images["test"].array[:2 * flags.interpolate])
        except ValueError as error:
            raise TrainingError(f"{weights}: {error}: no paths between these images") from None
        about |= {"paths_of": images["test"].name}
    if flags.neighbours:
        train, test = images["train"], images["test"]
        index, distance = nearest(content["samples"], train.array, flags.device if flags.device != "auto" else "cpu")
        content |= {"neighbours": np.array(train.array[index]), "distances": distance}
        about |= {"neighbours_of": train.name, "train_fingerprint": train.fingerprint}
        if test.fingerprint != train.fingerprint:
            about["held_out_distance"] = float(np.median(nearest(test.array[:flags.num], train.array)[1]))
    commit, tree = git_commit()
    about |= {"git_commit": commit, "git_dirty": tree == "dirty"}
    write_atomically(path, lambda file: np.savez_compressed(file, about=json.dumps(about), **content))
    return path


def add_sample_flags(parser):
    group = parser.add_argument_group("what is drawn")
    group.add_argument("--num", type=int, default=32, metavar="N", help="samples of a model (default: 32)")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T",
                       help="standard deviation of the latent noise (default: 1, the model as it was trained)")
    group.add_argument("--sample-seed", type=int, default=0, metavar="SEED", help="of the latent noise (default: 0)")
    group.add_argument("--neighbours", action="store_true", help="with the nearest training image of each sample, to see "
                       "whether it is a copy")
    group.add_argument("--interpolate", type=int, nargs="?", const=4, default=0, metavar="ROWS",
                       help="with paths between pairs of test images (4, or so many)")


def check_sample_flags(flags):
    """Raise TrainingError for flags that nothing could be drawn with."""
    for name, lowest in (("num", 1), ("sample_seed", 0), ("interpolate", 0)):
        if getattr(flags, name) < lowest:
            raise TrainingError(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be {lowest} or more")
    if flags.sample_seed >= 2 ** 63:
        raise TrainingError(f"--sample-seed {flags.sample_seed}: must be below 2**63")
    if not 0 <= flags.temperature < float("inf"):
        raise TrainingError(f"--temperature {flags.temperature}: must be a finite number, 0 or more")


def sample_runs(runs, flags):
    """Save the samples of each run of the grid."""
    folder = flags.results_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run.config.seed == 0:  # one seed is shown
            images = {split: load_images(run.config.data, split, flags.data_root) for split in ("train", "test")}
            about = {"run_id": run.run_id, "dataset": run.config.data, "variant": images["train"].variant}
            path = figure5.samples_path(flags.results_dir, flags.scale, run.point.labels.values())
            print(save_samples(path, run.folder, load_jet(run.folder), images, flags, about))


def sample_checkpoint(arguments):
    """The command line with --checkpoint."""
    parser = ArgumentParser(prog="draw_samples.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder or weight file")
    parser.add_argument("--name", help="of the files (default: the checkpoint's)")
    parser.add_argument("--data", help="image set of neighbours and paths (default: what it was trained on)")
    parser.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    for name, default in (("results", "results"), ("figures", "paper_figures/out")):
        parser.add_argument(f"--{name}-dir", type=Path, default=ROOT / default, metavar="DIR", help=f"default: {default}")
    add_sample_flags(parser)
    add_config_flags(parser.add_argument_group("the model, as far as a file of another implementation does not tell it"),
                     JetConfig, "model.")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, ResultsError):
        check_sample_flags(flags)
        name = flags.name or flags.checkpoint.resolve().stem
        jet, (config, _) = load_jet(flags.checkpoint, **model_flags(vars(flags))), weights_config(flags.checkpoint)
        trained_on = config.data if config else ""
        images = {}
        if flags.neighbours or flags.interpolate:
            if not (flags.data or trained_on):
                raise DataError(f"{flags.checkpoint} does not tell what it was trained on: give images by --data")
            images = {split: load_images(flags.data or trained_on, split, flags.data_root) for split in ("train", "test")}
        (flags.results_dir / "samples").mkdir(parents=True, exist_ok=True)
        about = {"run_id": name, "dataset": trained_on, "variant": SETS[trained_on].variant if trained_on in SETS else ""}
        path = save_samples(flags.results_dir / f"samples/{name}.npz", flags.checkpoint, jet, images, flags, about)
        for written in (path, *figure5.draw_file(path, flags.figures_dir)):
            print(written)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--checkpoint" for argument in arguments):
        return sample_checkpoint(arguments)
    sweep.main("draw_samples", __doc__, configs, figure5.SWEPT, figure5.draw, arguments, varying=tables.MAIN_VARYING,
               runs_of="main_results", add_flags=add_sample_flags, check_flags=check_sample_flags, finish=sample_runs)


if __name__ == "__main__":
    main()
