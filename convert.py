"""Weights of Jets, ours and those of other implementations, as a Jet, and back.

    jet = load_jet("runs/my-run")                          # a run folder, or a checkpoint of ours
    jet = load_jet("official.npz", scale_factor=2.0)       # official (flax) parameter tree
    jet = load_jet("jet_pytorch.pt", num_heads=8)          # state dict of the package jet-pytorch
    jet = load_jet("jet.safetensors")                      # state dict of a Jet of ours
    jet = load_jet("hf://OWNER/NAME@REVISION")             # the weight file of a Hugging Face hub

    python convert.py export assets/jet_cifar10 jet.safetensors --format safetensors
    python convert.py pack runs/my-run my-run              # a run folder, to be shared

No file is trusted: nothing in it is run, and what it cannot tell is asked for, never guessed.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

import harness  # noqa: F401 (first: it says what is not installed)

import kernels
from formats.card import model_card
from formats.hub import fetched
from formats.jet_pytorch import jet_pytorch_overrides, jet_pytorch_source, jet_pytorch_state
from formats.official import official_source, official_tree, official_weights  # noqa: F401
from formats.source import Source, grid_fields, split_names
from harness.checkpoint import (CHECKPOINT_FORMAT, check_content, checksum, load_weights,
                                Weights, read_weights, save_checkpoint)
from harness.errors import CheckpointError, short
from harness.files import check_npz, file_sha256, parse_json, read_bytes, write_atomically
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.run_folder import (CONFIG_NAME, DONE_NAME, LOG_NAME, MAX_METRICS_BYTES, METRICS_NAME,
                                PER_IMAGE_NAME, read_done, read_per_image)
from jet import SPATIAL_SPLITS, Jet, JetConfig, spatial_order


def load_jet(path, **overrides):
    """A Jet (float32, CPU, with the C kernels where they serve) from a weight file.

    path: a run folder (its newest whole checkpoint, and a warning where that is the one before),
    one of our checkpoints, an .npz of the official parameter tree, a state dict of jet-pytorch
    (0.0.2) or of a Jet (.pt or .safetensors, in any precision, alone or as the only one in a dict,
    also with the prefixes of DistributedDataParallel and torch.compile), or hf://OWNER/NAME
    [@REVISION], a hub's repository with one such file. overrides: JetConfig fields that the file
    cannot tell: num_heads of a state dict (and, of a Jet's, what is not the default); scale_factor
    and a non-square image_size of an official tree without meta_json.
    Raises CheckpointError (a ValueError) in one line when the file is damaged, foreign, contradicts
    an override, or a field is missing.
    """
    for name, value in overrides.items():
        if name not in JetConfig.__dataclass_fields__:
            raise CheckpointError(f"{name}={value!r}: no field of JetConfig "
                                  f"({', '.join(JetConfig.__dataclass_fields__)})")
    path, content, kind, make_source = _read(path)
    try:
        source = make_source(path, content, overrides)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a foreign file can make of names, types and shapes
        raise CheckpointError(f"{path}: not {kind} ({short(error)})") from None
    return kernels.accelerate(_build(path, source, overrides))


def _read(path):
    """(the file's path, its content, what it is, what makes a Source of it)."""
    path, content = opened(path)
    if _is_a(".npz", path):
        return path, _read_npz(path), "an official parameter tree", official_source
    if _is_a(".safetensors", path):
        content = _read_safetensors(path)
    if content.get("format") == CHECKPOINT_FORMAT:
        return path, content, "a whole checkpoint of ours", _our_source
    state = {} if "format" in content else _plain_state(path, content)  # else of another version
    if "channel_projections" in state:
        return path, state, "a state dict of jet-pytorch", jet_pytorch_source
    if "couplings.0.order" in state:
        return path, state, "a state dict of a Jet", _bare_source
    raise CheckpointError(f"{path}: neither a checkpoint of ours nor a state dict of a Jet or of "
                          "jet-pytorch")


def _is_a(suffix, path):
    return Path(path).suffix == suffix and not Path(path).is_dir()


def opened(path):
    """The Weights at a path: with them in its place all that is asked here reads them only once.

    What is no file of ours by its name has no content: it is read where it is needed.
    """
    if isinstance(path, Weights):
        return path
    path = Path(fetched(path))
    is_foreign = _is_a(".npz", path) or _is_a(".safetensors", path)
    return Weights(path, {}) if is_foreign else read_weights(path)


def _read_safetensors(path):
    """{name: tensor} of a .safetensors file; with its configuration where export has put one."""
    safetensors = _safetensors(path)
    try:
        content = read_bytes(path, max_bytes=2 ** 40)
        state = safetensors.load(content)
        check_content(state, len(content))
        header = parse_json(content[8:8 + int.from_bytes(content[:8], "little")])
        if config := header.get("__metadata__", {}).get("jet_config"):
            return {"format": CHECKPOINT_FORMAT, "model": state,
                    "config": {"model": parse_json(config)}}
        return state
    except MemoryError:
        raise CheckpointError(f"{path}: does not fit in this machine's memory") from None
    except Exception as error:
        raise CheckpointError(f"{path}: empty, damaged or no .safetensors file "
                              f"({short(error)})") from None


def _safetensors(path):
    """The package's module for tensors."""
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors: pip install "
                              "safetensors") from None
    return safetensors.torch


def _plain_state(path, content):
    """The one state dict in a file, its names without the prefixes of wrappers."""
    nested = [name for name, value in content.items() if isinstance(value, dict) and value
              and all(isinstance(item, torch.Tensor) for item in value.values())]
    if len(nested) > 1:
        names = ", ".join(map(str, nested))
        raise CheckpointError(f"{path}: holds several state dicts ({names}): save the one you want "
                              f"alone, as in torch.save(content[{nested[0]!r}], 'weights.pt')")
    state = content[nested[0]] if nested else content
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)).replace("._orig_mod.", "."): value
             for name, value in state.items()}
    if len(plain) < len(state):
        raise CheckpointError(f"{path}: has weights twice, with and without a prefix (module., "
                              "_orig_mod.)")
    return plain


def _read_npz(path):
    """{name: array} of an .npz file."""
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except MemoryError:
        raise CheckpointError(f"{path}: does not fit in this machine's memory") from None
    except Exception as error:  # np.load, too
        raise CheckpointError(f"{path}: empty, damaged or no .npz of arrays "
                              f"({short(error)})") from None


def config_checksum(jet):
    """Hex SHA-256 of a Jet's configuration."""
    config = dataclasses.asdict(jet.config)
    if not config["context_dim"]:  # as before there were such Jets
        del config["context_dim"]
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_id(path):
    """The name of the weights in a run folder or weight file, as TrainConfig.init holds it.

    It is the SHA-256 of the weights in a checkpoint of ours, of all bytes of another file. Raises
    CheckpointError.
    """
    path, content = opened(path)
    try:
        if content.get("format") == CHECKPOINT_FORMAT:
            return f"sha256-{checksum(content['model'])[:16]}"
        return f"sha256-{file_sha256(path)[:16]}"
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of ours ({short(error)})") from None


def _build(path, source, overrides):
    missing = [name for name in source.missing if name not in overrides]
    if missing:
        raise CheckpointError(f"{path} does not tell {' and '.join(missing)}: give it, as in "
                              f"load_jet(path, {missing[0]}=...) or --model.{missing[0]}")
    try:
        config = JetConfig(**{**source.assumed, **source.known, **overrides})
        by_file = JetConfig(**{**source.assumed, **overrides, **source.known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    equal = {"kinds", "spatial_splits"} if config.coupling_splits == by_file.coupling_splits else ()
    for name in overrides:
        if getattr(config, name) != getattr(by_file, name) and name not in equal:
            raise CheckpointError(f"{path}: {name}={overrides[name]!r} was given, but the file "
                                  f"says {getattr(by_file, name)!r}")
    check_size(path, config, source.state)
    try:
        with torch.random.fork_rng(devices=[]):  # loading draws nothing from the caller's generator
            jet = Jet(config)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: no memory for its configuration ({short(error)})") from None
    check_shapes(path, jet.state_dict(), source.state)
    load_weights(path, jet, source.state)
    return jet


def check_size(path, config, state):
    """Raise CheckpointError where a configuration needs more than there is: before it is made."""
    N, D, E = config.num_tokens, config.token_dim, config.emb_dim
    block = (12 if config.block == "vit" else 18) * E * E
    needed = config.num_couplings * (config.block_depth * block + (N + D) * E)
    found = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    if needed > found or config.num_couplings * config.block_depth > len(state):
        raise CheckpointError(f"{path}: weights do not fit their configuration: it needs at least "
                              f"{needed:,} values, and there are {found:,} in {len(state)} tensors "
                              "(no memory was taken for it)")


def check_shapes(path, needed, state):
    """Raise CheckpointError that names the first tensor of another shape than is needed."""
    needed, found = ({name: tuple(getattr(tensor, "shape", ())) for name, tensor in one.items()}
                     for one in (needed, state))
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise CheckpointError(
                f"{path}: weights do not fit their configuration ({name}: "
                f"{needed.get(name, 'none')} is needed, and there is {found.get(name, 'none')})")


def _our_source(path, content, overrides):
    state = {str(name): tensor for name, tensor in content["model"].items()}
    return Source(known=dict(content["config"]["model"]), state=state)


def _bare_source(path, state, overrides):
    """A Jet's state dict: its shapes tell all but heads, the largest scale, GELU and epsilon."""
    net, names = "couplings.0.net.", " ".join(state)
    num_tokens, emb_dim = state[f"{net}posemb"].shape
    orders = {int(name.split(".")[1]): order for name, order in state.items()
              if re.fullmatch(r"couplings\.\d+\.order", name)}
    orders = [orders[number] for number in range(len(orders))]
    if any(order.dtype != torch.int64 or order.ndim != 1 for order in orders):
        raise ValueError("an order is no list of whole numbers")
    token_dim, lengths = len(state[f"{net}final_proj.bias"]), set(map(len, orders))
    masking = token_dim // 2 in lengths - {num_tokens} or (
        token_dim not in lengths and overrides.get("split_mode") == "masking")
    assumed = grid_fields(path, num_tokens, token_dim // 2 if masking else token_dim, overrides)
    grid = JetConfig(**assumed | {"kinds": ("channels",), "split_mode": "masking"} | {
        name: overrides[name] for name in ("image_size",) if name in overrides}).grid
    patterns = []
    if math.prod(grid) in lengths:
        patterns = [spatial_order(name, *grid) for name in SPATIAL_SPLITS]
    kinds = tuple("spatial" if any(torch.equal(order, pattern) for pattern in patterns)
                  else "channels" for order in orders)
    known = {"num_couplings": len(orders), "kinds": kinds, "emb_dim": emb_dim,
             "block": "cnn" if f"{net}blocks.0.convs" in names else "vit",
             "block_depth": len(set(re.findall(rf"{re.escape(net)}blocks\.(\d+)\.", names))),
             "actnorm": "actnorms." in names, "invertible_dense": "denses." in names,
             "split_mode": "masking" if masking else "pairing"}
    if (key := f"{net}cross_attention.key_value.weight") in state:
        known["context_dim"] = state[key].shape[1]
    spatial = [order for order, kind in zip(orders, kinds) if kind == "spatial"]
    if spatial:
        known["spatial_splits"] = split_names(path, spatial, assumed, overrides)
    missing = ("num_heads",) if known["block"] == "vit" or "context_dim" in known else ()
    return Source(known=known, assumed=assumed, missing=missing, state=state)


# ---- out

KEPT = ("config", "step", "model")  # of a checkpoint that is packed
FORMATS = {"official": ".npz", "jet-pytorch": ".pt", "safetensors": ".safetensors"}


def export(jet, out, format):
    """Write a Jet's weights; returns what load_jet must be told beside the file, {field: value}.

    out: a path with the format's suffix. Raises CheckpointError for a Jet that the format cannot
    hold, and for another suffix.
    """
    if out.suffix != FORMATS[format]:
        raise CheckpointError(f"{out}: must end in {FORMATS[format]}, as {format} files do")
    if format == "official":
        content = official_tree(jet)
        write_atomically(out, lambda file: np.savez(file, **content))
    elif format == "jet-pytorch":
        content = jet_pytorch_state(jet)
        write_atomically(out, lambda file: torch.save(content, file))
        return jet_pytorch_overrides(jet.config)
    else:
        safetensors = _safetensors(out)
        content = safetensors.save({name: tensor.contiguous() for name, tensor
                                    in jet.state_dict().items()},
                                   {"format": "pt", "jet_config": json.dumps(vars(jet.config))})
        write_atomically(out, lambda file: file.write(content))
    return {}


def pack(run, out, license, moments=False):
    """Copy what a finished run's folder needs to be read elsewhere into a new folder.

    It is itself the folder of a finished run, without the state that training needs: moments: with
    Adam's, from which --extend-to goes on. Raises CheckpointError or TrainingError.
    """
    if (done := read_done(run)) is None:
        raise CheckpointError(f"{run}: no folder of a finished run: it has no {DONE_NAME}")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is there: give a new folder")
    path, content = read_weights(run)
    try:
        found, recorded = checksum(content["model"]), done.get("weights_sha256")
        kept = {name: content[name] for name in (*KEPT, *(["optimizer"] if moments else []))}
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: lacks what is to be packed ({short(error)})") from None
    if recorded and found != recorded:
        raise CheckpointError(f"{path}: holds other weights than those that {DONE_NAME} tells of")
    read_per_image(run, done)  # or it says what is wrong
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.resolve().parent) as parent:
        folder = Path(parent) / out.name
        folder.mkdir()
        save_checkpoint(folder, kept)
        for name in (CONFIG_NAME, LOG_NAME, METRICS_NAME, PER_IMAGE_NAME, DONE_NAME):
            if (run / name).exists():
                (folder / name).write_bytes(read_bytes(run / name, MAX_METRICS_BYTES))
        card = model_card(load_jet(folder), done, out.name, {}, license)
        write_atomically(folder / "README.md", card)
        os.replace(folder, out)


def make_parser():
    parser = ArgumentParser(prog="convert.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|pack")
    about = "write the weights of a Jet as a file of another kind, and a model card beside it"
    command = commands.add_parser("export", help=about, description=about)
    command.add_argument("weights", metavar="RUN", help="the Jet: a run folder or weight file")
    command.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--card", type=Path, metavar="FILE.md",
                         help="the model card (default: OUT with .md; a hub shows README.md)")
    add_setting_flags(command.add_argument_group(
        "the model, as far as a file of another implementation does not tell it"), JetConfig,
        "model.")
    about = "copy what a finished run's folder needs to be shared, with a model card"
    pack_command = commands.add_parser("pack", help=about, description=about)
    pack_command.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    pack_command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    pack_command.add_argument("--moments", action="store_true",
                              help="Adam's, too, so that train.py --extend-to goes on from it: "
                                   "three times the size")
    for one in (command, pack_command):
        one.add_argument("--license", default="apache-2.0", metavar="NAME",
                         help="of the weights, for the card (default: apache-2.0, this project's)")
    return parser


def main(arguments=None):
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        card = getattr(flags, "card", None) or flags.out.with_suffix(".md")
        for path in (flags.out, card):
            if not path.resolve().parent.is_dir():
                raise CheckpointError(f"{path}: there is no folder {path.parent}: make it, or give "
                                      "another")
        if flags.command == "pack":
            pack(flags.run, flags.out, flags.license, flags.moments)
            return print(flags.out)
        if card.suffix != ".md":
            raise CheckpointError(f"--card {card}: must end in .md")
        weights = fetched(flags.weights)
        jet = load_jet(weights, **model_fields(vars(flags)))
        done = read_done(weights) if Path(weights).is_dir() else None
        loading = export(jet, flags.out, flags.format)
        write_atomically(card, model_card(jet, done, flags.out.name, loading, flags.license))
        print(f"{flags.out}\n{card}")


if __name__ == "__main__":
    main()
