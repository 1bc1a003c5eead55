"""The official parameter tree: one leaf per weight, its first axis is the coupling."""
import json
import re

import numpy as np
import torch

from formats.source import (Source, grid_fields, one_hot_order, refuse_differences,
                            split_names)
from harness.checkpoint import MAX_PARTS
from harness.files import parse_json

_ATTENTION = "MultiHeadDotProductAttention_0"  # in a block of the tokens, else of the context
_MASKS = "{}_coupling_masks-FREEZE_ME"  # (L, D, D) and (L, N, N), zero where not used


def _layers(depth, is_conditional):
    """(our layer, the official one, its parts split by head, () of another) of a coupling."""
    yield from (("init_proj", "init_proj", ()), ("final_norm", "vit/encoder_norm", ()),
                ("final_proj", "final_proj", ()))
    for k in range(depth):
        ours, theirs = f"blocks.{k}", f"vit/encoderblock_{k}"
        yield from ((f"{ours}.norm1", f"{theirs}/LayerNorm_0", ()),
                    (f"{ours}.norm2", f"{theirs}/LayerNorm_1", ()),
                    (f"{ours}.fc1", f"{theirs}/MlpBlock_0/Dense_0", ()),
                    (f"{ours}.fc2", f"{theirs}/MlpBlock_0/Dense_1", ()),
                    (f"{ours}.attention.out", f"{theirs}/{_ATTENTION}/out", ()),
                    (f"{ours}.attention.qkv", f"{theirs}/{_ATTENTION}", ("query", "key", "value")))
    if is_conditional:
        yield from (("cross_attention.out", f"{_ATTENTION}/out", ()),
                    ("cross_attention.query", _ATTENTION, ("query",)),
                    ("cross_attention.key_value", _ATTENTION, ("key", "value")))


def official_weights(tree):
    """Our names and layouts for the trainable leaves of an official tree (or of its gradient).

    tree: {"couplings/dnn/...": array (L, ...)}. Returns {our name: tensor}. Raises KeyError for a
    missing leaf and ValueError for one too many or of another shape.
    """
    leaves = {name.removeprefix("couplings/dnn/"): leaf for name, leaf in tree.items()}
    num_couplings, _, num_tokens, emb_dim = leaves["posemb"].shape
    if num_couplings * len(leaves) > MAX_PARTS:
        raise ValueError(f"{num_couplings:,} couplings are too many")
    weights = {"posemb": leaves.pop("posemb")[:, 0]}  # all (L, ...) until the end

    def put(ours, theirs):
        """A kernel [in, out] or a scale is a weight; attention.out has its input split by head."""
        kernel = leaves.pop(f"{theirs}/kernel", None)
        if kernel is None:
            weight = leaves.pop(f"{theirs}/scale")
        else:
            weight = kernel.reshape(num_couplings, -1, kernel.shape[-1]).swapaxes(1, 2)
        weights[f"{ours}.weight"] = weight
        weights[f"{ours}.bias"] = leaves.pop(f"{theirs}/bias")

    def put_heads(ours, theirs, parts):
        """Kernels (L, in, K, E/K) and biases (L, K, E/K) are one weight, part by part."""
        weight, bias = [], []
        is_of_context = theirs == _ATTENTION and "query" not in parts
        in_dim = leaves[f"{theirs}/{parts[0]}/kernel"].shape[1] if is_of_context else emb_dim
        for name in (f"{theirs}/{part}" for part in parts):
            kernel, shift = leaves.pop(f"{name}/kernel"), leaves.pop(f"{name}/bias")
            if kernel.shape[1] != in_dim or kernel.shape[2:] != shift.shape[1:]:
                raise ValueError(f"{name}: kernel {kernel.shape} and bias {shift.shape}")
            weight.append(kernel.reshape(num_couplings, in_dim, -1).swapaxes(1, 2))
            bias.append(shift.reshape(num_couplings, -1))
        weights[f"{ours}.weight"] = np.concatenate(weight, axis=1)
        weights[f"{ours}.bias"] = np.concatenate(bias, axis=1)

    for ours, theirs, parts in _layers(_depth(tree), f"{_ATTENTION}/out/kernel" in leaves):
        if parts:
            put_heads(ours, theirs, parts)
        else:
            put(ours, theirs)
    if leaves:
        raise ValueError(f"unknown leaf {sorted(leaves)[0]}")
    return {f"couplings.{i}.net.{name}": torch.tensor(leaf[i])
            for name, leaf in weights.items() for i in range(num_couplings)}


def _depth(tree):
    matches = (re.search(r"/vit/encoderblock_(\d+)/", name) for name in tree)
    return len({match[1] for match in matches if match})


def official_source(path, content, overrides):
    masks = _MASKS.format("channel")
    prefixes = [name.removesuffix(masks) for name in content if name.endswith(masks)]
    if not prefixes:
        raise KeyError(masks)
    prefix = prefixes[0] if len(prefixes) == 1 else "params/"  # beside an optimizer's state
    tree = {name.removeprefix(prefix): leaf for name, leaf in content.items()
            if name.startswith(f"{prefix}couplings/dnn/")}
    channel_masks, spatial_masks = (content[prefix + _MASKS.format(kind)]
                                    for kind in ("channel", "spatial"))
    weights = official_weights(tree)
    if not len(spatial_masks) == len(channel_masks) == len(tree["couplings/dnn/posemb"]):
        raise ValueError("not as many masks as couplings")
    kinds = tuple("spatial" if mask.any() else "channels" for mask in spatial_masks)
    orders = [one_hot_order((spatial_masks if kind == "spatial" else channel_masks)[i])
              for i, kind in enumerate(kinds)]
    weights |= {f"couplings.{i}.order": torch.tensor(order) for i, order in enumerate(orders)}
    query = tree[f"couplings/dnn/vit/encoderblock_0/{_ATTENTION}/query/kernel"]
    known = {"num_couplings": len(kinds), "kinds": kinds, "emb_dim": query.shape[1],
             "num_heads": query.shape[2], "block_depth": _depth(tree)}
    if (key := f"couplings/dnn/{_ATTENTION}/key/kernel") in tree:
        known["context_dim"] = tree[key].shape[1]
        if tree[key].shape[2] != query.shape[2]:
            raise ValueError(f"{key} has {tree[key].shape[2]} heads")
    missing = ()
    if "meta_json" in content:
        meta = parse_json(str(content["meta_json"]))
        grid = {"image_size": tuple(meta["image"][:2]), "channels": meta["image"][2],
                "patch_size": meta["config"]["ps"]}
        known |= {**grid, "scale_factor": meta["config"]["scale_factor"]}
    else:
        grid = grid_fields(path, spatial_masks.shape[1], channel_masks.shape[1], overrides)
        missing = ("scale_factor",)
    spatial = [order for order, kind in zip(orders, kinds) if kind == "spatial"]
    if spatial:
        known["spatial_splits"] = split_names(path, spatial, grid, overrides)
    return Source(known=known, assumed=grid, missing=missing, state=weights)


def official_tree(jet):
    """The content of an .npz that official_source reads to the same Jet, with its meta_json.

    Raises CheckpointError for a Jet that the official model cannot be.
    """
    config, state = jet.config, jet.state_dict()
    refuse_differences(config, "the official model", block="vit", split_mode="pairing", gelu="tanh",
                       norm_eps=1e-6, actnorm=False, invertible_dense=False)
    L, K, E = config.num_couplings, config.num_heads, config.emb_dim

    def stacked(name):
        return np.stack([state[f"couplings.{i}.net.{name}"].numpy() for i in range(L)])
    leaves = {"posemb": stacked("posemb")[:, None]}
    for ours, theirs, parts in _layers(config.block_depth, config.context_dim > 0):
        weight, bias = stacked(f"{ours}.weight"), stacked(f"{ours}.bias")
        if parts:
            for part, w, b in zip(parts, *(np.split(both, len(parts), 1)
                                           for both in (weight, bias))):
                leaves[f"{theirs}/{part}/kernel"] = w.swapaxes(1, 2).reshape(L, -1, K, E // K)
                leaves[f"{theirs}/{part}/bias"] = b.reshape(L, K, E // K)
            continue
        leaves[f"{theirs}/bias"] = bias
        if weight.ndim == 2:  # a norm's
            leaves[f"{theirs}/scale"] = weight
        else:
            in_dims = (K, E // K) if theirs.endswith(f"{_ATTENTION}/out") else (-1,)
            kernel = weight.swapaxes(1, 2).reshape(L, *in_dims, bias.shape[1])
            leaves[f"{theirs}/kernel"] = kernel
    tree = {f"params/couplings/dnn/{name}": leaf for name, leaf in leaves.items()}
    for kind, size in (("channel", config.token_dim), ("spatial", config.num_tokens)):
        tree[f"params/{_MASKS.format(kind)}"] = masks = np.zeros((L, size, size), np.float32)
        for i, coupling in enumerate(jet.couplings):
            if config.coupling_splits[i][0].startswith(kind):
                masks[i, coupling.order.numpy(), range(size)] = 1
    about = {"depth": L, "block_depth": config.block_depth, "emb_dim": E, "num_heads": K,
             "ps": config.patch_size, "scale_factor": config.scale_factor, "kinds": config.kinds,
             "spatial_coupling_projs": config.spatial_splits, "context_dim": config.context_dim}
    meta = {"config": about, "image": [*config.image_shape[1:], config.channels]}
    return tree | {"meta_json": np.array(json.dumps(meta))}
