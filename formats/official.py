"""The official parameter tree: one leaf per weight, its first axis is the coupling."""
import re

import numpy as np
import torch

from formats.source import Source, grid_fields, one_hot_order, split_names
from harness.checkpoint import MAX_PARTS
from harness.files import parse_json

_OFFICIAL = {  # ours: theirs
    "init_proj": "init_proj", "final_norm": "vit/encoder_norm", "final_proj": "final_proj",
}
_ATTENTION = "MultiHeadDotProductAttention_0"  # in a block of the tokens, else of the context
_OFFICIAL_BLOCK = {
    "norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "attention.out": f"{_ATTENTION}/out",
    "fc1": "MlpBlock_0/Dense_0", "fc2": "MlpBlock_0/Dense_1",
}


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

    def put_heads(ours, theirs, in_dim, parts):
        """Kernels (L, in, K, E/K) and biases (L, K, E/K) are one weight, part by part."""
        weight, bias = [], []
        for name in (f"{theirs}/{part}" for part in parts):
            kernel, shift = leaves.pop(f"{name}/kernel"), leaves.pop(f"{name}/bias")
            if kernel.shape[1] != in_dim or kernel.shape[2:] != shift.shape[1:]:
                raise ValueError(f"{name}: kernel {kernel.shape} and bias {shift.shape}")
            weight.append(kernel.reshape(num_couplings, in_dim, -1).swapaxes(1, 2))
            bias.append(shift.reshape(num_couplings, -1))
        weights[f"{ours}.weight"] = np.concatenate(weight, axis=1)
        weights[f"{ours}.bias"] = np.concatenate(bias, axis=1)

    for ours, theirs in _OFFICIAL.items():
        put(ours, theirs)
    for k in range(_official_depth(tree)):
        for ours, theirs in _OFFICIAL_BLOCK.items():
            put(f"blocks.{k}.{ours}", f"vit/encoderblock_{k}/{theirs}")
        put_heads(f"blocks.{k}.attention.qkv", f"vit/encoderblock_{k}/{_ATTENTION}", emb_dim,
                  ("query", "key", "value"))
    if f"{_ATTENTION}/out/kernel" in leaves:
        put("cross_attention.out", f"{_ATTENTION}/out")
        put_heads("cross_attention.query", _ATTENTION, emb_dim, ("query",))
        put_heads("cross_attention.key_value", _ATTENTION,
                  leaves[f"{_ATTENTION}/key/kernel"].shape[1], ("key", "value"))
    if leaves:
        raise ValueError(f"unknown leaf {sorted(leaves)[0]}")
    return {f"couplings.{i}.net.{name}": torch.tensor(leaf[i])
            for name, leaf in weights.items() for i in range(num_couplings)}


def _official_depth(tree):
    matches = (re.search(r"/vit/encoderblock_(\d+)/", name) for name in tree)
    return len({match[1] for match in matches if match})


def official_source(path, content, overrides):
    masks = "channel_coupling_masks-FREEZE_ME"
    prefixes = [name.removesuffix(masks) for name in content if name.endswith(masks)]
    if not prefixes:
        raise KeyError(masks)
    prefix = prefixes[0] if len(prefixes) == 1 else "params/"  # beside an optimizer's state
    tree = {name.removeprefix(prefix): leaf for name, leaf in content.items()
            if name.startswith(f"{prefix}couplings/dnn/")}
    channel_masks = content[prefix + masks]  # (L, D, D), zero where not used
    spatial_masks = content[prefix + masks.replace("channel", "spatial")]  # (L, N, N), likewise
    weights = official_weights(tree)
    if not len(spatial_masks) == len(channel_masks) == len(tree["couplings/dnn/posemb"]):
        raise ValueError("not as many masks as couplings")
    kinds = tuple("spatial" if mask.any() else "channels" for mask in spatial_masks)
    orders = [one_hot_order((spatial_masks if kind == "spatial" else channel_masks)[i])
              for i, kind in enumerate(kinds)]
    weights |= {f"couplings.{i}.order": torch.tensor(order) for i, order in enumerate(orders)}
    query = tree["couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    known = {"num_couplings": len(kinds), "kinds": kinds, "emb_dim": query.shape[1],
             "num_heads": query.shape[2], "block_depth": _official_depth(tree)}
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
