"""Weights of Jets, ours and those of other implementations, as a Jet.

    jet = load_jet("runs/my-run")                          # a run folder, or a checkpoint of ours
    jet = load_jet("official.npz", scale_factor=2.0)       # official (flax) parameter tree
    jet = load_jet("jet_pytorch.pt", num_heads=8)          # state dict of the package jet-pytorch

No file is trusted: nothing in it is run, and what it cannot tell is asked for, never guessed.
"""
import dataclasses
import json
import math
import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from jet import Jet, JetConfig, spatial_order

CHECKPOINT_NAME = "checkpoint.pt"
CHECKPOINT_FORMAT = "jet-checkpoint-1"


class CheckpointError(ValueError):
    """A weight file that cannot be read or does not fit, in one line."""


def load_jet(path, **overrides):
    """A Jet (float32, CPU) from a weight file.

    path: a run folder, one of our checkpoints, an .npz of the official parameter tree, or a state dict
    of jet-pytorch (0.0.2). overrides: JetConfig fields that the file cannot tell: num_heads of a
    jet-pytorch file; scale_factor and a non-square image_size of an official tree without meta_json.
    Raises CheckpointError (a ValueError) in one line when the file is damaged, foreign, contradicts
    an override, or a field is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    if path.suffix == ".npz":
        source = _read_official(path, overrides)
    else:
        content = read_tensors(path)
        if content.get("format") == CHECKPOINT_FORMAT:
            try:
                source = _Source(known=content["config"]["model"], state=content["model"])
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: a checkpoint without its config or model "
                                      f"({type(error).__name__}: {error})") from None
        elif "channel_projections" in content:
            source = _read_jet_pytorch(path, content, overrides)
        else:
            raise CheckpointError(f"{path}: neither a checkpoint of ours nor a state dict of jet-pytorch")
    return _build(path, source, overrides)


def read_tensors(path):
    """The dict of tensors and plain values in a .pt file, without running code from it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the errors say it in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: holds more than tensors and plain values, or is no checkpoint; "
                              "not loaded, for it could run code") from None
    except Exception as error:  # torch.load raises nearly everything on damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: empty, truncated or no checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


@dataclasses.dataclass(kw_only=True)
class _Source:
    """What a file says of a Jet."""
    state: dict  # our state dict
    known: dict  # JetConfig fields that the file tells
    assumed: dict = dataclasses.field(default_factory=dict)  # fixed by the package that wrote the file
    missing: tuple = ()  # to be given by the caller


def _build(path, source, overrides):
    names = [field.name for field in dataclasses.fields(JetConfig)]
    for name, value in overrides.items():
        if name not in names:
            raise CheckpointError(f"{name}={value!r}: no field of JetConfig ({', '.join(names)})")
    missing = [name for name in source.missing if name not in overrides]
    if missing:
        raise CheckpointError(f"{path} does not tell {' and '.join(missing)}: give it, as in "
                              f"load_jet(path, {missing[0]}=...)")
    try:
        config = JetConfig(**{**source.assumed, **source.known, **overrides})
        told = JetConfig(**{**source.assumed, **overrides, **source.known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name in overrides:
        if getattr(config, name) != getattr(told, name):
            raise CheckpointError(f"{path}: {name}={overrides[name]!r} was given, but the file says "
                                  f"{getattr(told, name)!r}")
    with torch.random.fork_rng(devices=[]):  # loading draws nothing from the caller's generator
        jet = Jet(config)
    try:
        jet.load_state_dict(source.state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: weights do not fit their configuration: {reason[:300]}") from None
    for name, buffer in jet.named_buffers():
        if name.endswith("order") and not torch.equal(buffer.sort().values, torch.arange(len(buffer))):
            raise CheckpointError(f"{path}: {name} is not a permutation")
    return jet


def _grid_fields(path, num_tokens, token_dim, overrides):
    """channels, patch_size and image_size, as far as a number of tokens and values tells them."""
    channels = overrides.get("channels", 3)
    patch_size = overrides.get("patch_size", math.isqrt(token_dim // channels))
    side = math.isqrt(num_tokens)
    assumed = {"channels": channels, "patch_size": patch_size}
    if side * side == num_tokens:
        assumed["image_size"] = side * patch_size
    image_size = overrides.get("image_size", assumed.get("image_size"))
    if image_size is None:
        raise CheckpointError(f"{path} does not tell image_size: its {num_tokens} tokens are no square; "
                              "give it, as in load_jet(path, image_size=(height, width))")
    return assumed


def _split_names(path, orders, assumed, overrides):
    """The names of spatial token orders."""
    config = JetConfig(**{"kinds": ("channels",), **assumed,
                          **{k: v for k, v in overrides.items() if k in ("image_size",)}})
    if any(len(order) != config.num_tokens for order in orders):
        raise CheckpointError(f"{path}: image_size={config.image_size} and patch_size="
                              f"{config.patch_size} make {config.num_tokens} tokens, the file has "
                              f"{len(orders[0])}")
    names = []
    for order in orders:
        fits = [name for name in JetConfig.spatial_splits
                if torch.equal(spatial_order(name, *config.grid), torch.as_tensor(order))]
        if not fits:
            raise CheckpointError(
                f"{path}: spatial coupling {len(names)} has none of the known patterns on a grid of "
                f"{config.grid[0]} x {config.grid[1]} tokens: give another image_size=(height, width)")
        names.append(fits[0])
    return tuple(names)


def _one_hot_order(projections):
    """y[m] = sum_k x[k] P[k, m], one-hot: for each m, the k. (L, n, n) -> (L, n)."""
    return np.asarray(projections).argmax(1)


# ---- the official parameter tree: one leaf per weight, its first axis is the coupling

_OFFICIAL_BLOCK = {  # ours: theirs
    "norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "attention.out": "MultiHeadDotProductAttention_0/out",
    "fc1": "MlpBlock_0/Dense_0", "fc2": "MlpBlock_0/Dense_1",
}


def official_weights(tree):
    """Our names and layouts for the trainable leaves of an official tree (or of its gradient).

    tree: {"couplings/dnn/...": array (L, ...)}. Returns {our name: tensor}.
    """
    dnn = {name.removeprefix("couplings/dnn/"): np.asarray(leaf) for name, leaf in tree.items()
           if name.startswith("couplings/dnn/")}
    num_couplings, _, emb_dim = dnn["init_proj/kernel"].shape
    weights = {}

    def put(ours, i, theirs):
        for kernel, weight in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if f"{theirs}/{kernel}" in dnn:
                leaf = dnn[f"{theirs}/{kernel}"][i]
                if kernel == "kernel":  # flax has [in, out]; attention splits one of them by head
                    leaf = leaf.reshape(-1, leaf.shape[-1]).T
                weights[f"{ours}.{weight}"] = torch.tensor(leaf)

    for i in range(num_couplings):
        net = f"couplings.{i}.net"
        weights[f"{net}.posemb"] = torch.tensor(dnn["posemb"][i, 0])
        for ours, theirs in (("init_proj", "init_proj"), ("final_norm", "vit/encoder_norm"),
                             ("final_proj", "final_proj")):
            put(f"{net}.{ours}", i, theirs)
        for k in range(_official_depth(dnn)):
            for ours, theirs in _OFFICIAL_BLOCK.items():
                put(f"{net}.blocks.{k}.{ours}", i, f"vit/encoderblock_{k}/{theirs}")
            attention = f"vit/encoderblock_{k}/MultiHeadDotProductAttention_0"
            qkv = [(dnn[f"{attention}/{part}/kernel"][i].reshape(emb_dim, emb_dim).T,
                    dnn[f"{attention}/{part}/bias"][i].reshape(emb_dim))
                   for part in ("query", "key", "value")]
            for name, leaves in zip(("weight", "bias"), zip(*qkv)):
                weights[f"{net}.blocks.{k}.attention.qkv.{name}"] = torch.tensor(np.concatenate(leaves))
    return weights


def _official_depth(dnn):
    return len({match[1] for name in dnn if (match := re.match(r"vit/encoderblock_(\d+)/", name))})


def _read_official(path, overrides):
    try:
        with np.load(path, allow_pickle=False) as file:
            names = {name[name.index("couplings/dnn/"):] if "couplings/dnn/" in name
                     else name.split("/")[-1]: name for name in file.files
                     if not name.startswith(("grad/", "traj"))}
            tree = {short: file[name] for short, name in names.items()
                    if short.startswith("couplings/dnn/") or short.endswith("FREEZE_ME")}
            meta = json.loads(str(file["meta_json"])) if "meta_json" in file.files else None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: empty, truncated or no .npz of arrays ({error})") from None
    if any("/dnn/MultiHeadDotProductAttention_0" in name for name in tree):
        raise CheckpointError(f"{path}: a class-conditional Jet (it has dnn/MultiHeadDotProductAttention_0)"
                              ": only unconditional ones can be loaded")
    try:
        return _official_source(path, tree, meta, overrides)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not an official Jet parameter tree "
                              f"({type(error).__name__}: {error})") from None


def _official_source(path, tree, meta, overrides):
    channel_masks = tree["channel_coupling_masks-FREEZE_ME"]  # (L, D, D), zero where not used
    spatial_masks = tree["spatial_coupling_masks-FREEZE_ME"]  # (L, N, N), zero where not used
    weights = official_weights(tree)
    kinds = tuple("spatial" if mask.any() else "channels" for mask in spatial_masks)
    orders = [_one_hot_order(masks[i:i + 1])[0] for i, masks in enumerate(
        {"channels": channel_masks, "spatial": spatial_masks}[kind] for kind in kinds)]
    for i, order in enumerate(orders):
        weights[f"couplings.{i}.order"] = torch.tensor(order)
    query = tree["couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    dnn = [name.removeprefix("couplings/dnn/") for name in tree]
    known = {"num_couplings": len(kinds), "kinds": kinds, "emb_dim": query.shape[1],
             "num_heads": query.shape[2], "block_depth": _official_depth(dnn)}
    missing = ()
    if meta:
        height, width, channels = meta["image"]
        known |= {"image_size": (height, width), "channels": channels,
                  "patch_size": meta["config"]["ps"], "scale_factor": meta["config"]["scale_factor"]}
        assumed = {name: known[name] for name in ("image_size", "channels", "patch_size")}
    else:
        assumed = _grid_fields(path, spatial_masks.shape[1], channel_masks.shape[1], overrides)
        missing = ("scale_factor",)
    spatial = [order for order, kind in zip(orders, kinds) if kind == "spatial"]
    if spatial:
        known["spatial_splits"] = _split_names(path, spatial, assumed, overrides)
    return _Source(known=known, assumed=assumed, missing=missing, state=weights)


# ---- the state dict of the package jet-pytorch 0.0.2

_JET_PYTORCH = {  # theirs: ours, in the order in which they are replaced
    r"^blocks\.(\d+)\.dnn\.": r"couplings.\1.net.",
    r"\.pos_emb$": ".posemb", r"\.encoder\.ln\.": ".final_norm.", r"\.encoder\.blocks\.": ".blocks.",
    r"\.mha\.in_proj_": ".attention.qkv.", r"\.mha\.out_proj\.": ".attention.out.",
    r"\.ln(\d)\.": r".norm\1.", r"\.mlp\.in_proj\.": ".fc1.", r"\.mlp\.out_proj\.": ".fc2.",
}


def _read_jet_pytorch(path, content, overrides):
    weights = {}
    for name, tensor in content.items():
        for theirs, ours in _JET_PYTORCH.items():
            name = re.sub(theirs, ours, name)
        weights[name] = tensor[0] if name.endswith(".posemb") else tensor
    try:
        channel_orders = _one_hot_order(weights.pop("channel_projections"))
        spatial_orders = _one_hot_order(weights.pop("spatial_projections"))
        num_couplings = len(channel_orders) + len(spatial_orders)
        num_tokens, emb_dim = weights["couplings.0.net.posemb"].shape
        token_dim = len(weights["couplings.0.net.final_proj.bias"])
    except (KeyError, ValueError, AttributeError, TypeError, np.exceptions.AxisError) as error:
        raise CheckpointError(f"{path}: not a state dict of jet-pytorch ({error})") from None
    # What the package fixes: exact GELU and PyTorch's LayerNorm epsilon, unlike the official model;
    # its default cycle of kinds, which the numbers of projections must confirm, and scale factor.
    assumed = _grid_fields(path, num_tokens, token_dim, overrides) | {
        "gelu": "exact", "norm_eps": 1e-5, "scale_factor": 2.0}
    kinds = overrides.get("kinds", JetConfig.kinds)
    if not len(spatial_orders) or not len(channel_orders):
        kinds = ("channels",) if len(channel_orders) else ("spatial",)
    cycle = [kinds[i % len(kinds)] for i in range(num_couplings)]
    if cycle.count("spatial") != len(spatial_orders):
        raise CheckpointError(f"{path} has {len(channel_orders)} channel and {len(spatial_orders)} spatial "
                              "couplings and does not tell their order: give it, as in load_jet(path, "
                              "kinds=('channels', 'spatial'))")
    known = {"num_couplings": num_couplings, "kinds": tuple(kinds), "emb_dim": emb_dim,
             "block_depth": sum(name.startswith("couplings.0.") and name.endswith("fc1.bias")
                                for name in weights)}
    orders = {"channels": iter(channel_orders), "spatial": iter(spatial_orders)}
    for i, kind in enumerate(cycle):
        weights[f"couplings.{i}.order"] = torch.tensor(next(orders[kind]))
    if len(spatial_orders):
        known["spatial_splits"] = _split_names(path, spatial_orders, assumed, overrides)
    return _Source(known=known, assumed=assumed, missing=("num_heads",), state=weights)
