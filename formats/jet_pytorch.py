"""The state dict of the package jet-pytorch 0.0.2."""
import re

import torch

from formats.source import Source, grid_fields, one_hot_order, split_names
from harness.errors import CheckpointError
from jet import JetConfig

_JET_PYTORCH = {  # theirs: ours, in the order in which they are replaced
    r"^blocks\.(\d+)\.dnn\.": r"couplings.\1.net.",
    r"\.pos_emb$": ".posemb",
    r"\.encoder\.ln\.": ".final_norm.", r"\.encoder\.blocks\.": ".blocks.",
    r"\.mha\.in_proj_": ".attention.qkv.", r"\.mha\.out_proj\.": ".attention.out.",
    r"\.ln(\d)\.": r".norm\1.", r"\.mlp\.in_proj\.": ".fc1.", r"\.mlp\.out_proj\.": ".fc2.",
}


def jet_pytorch_source(path, content, overrides):
    weights = {}
    for name, tensor in content.items():
        for theirs, ours in _JET_PYTORCH.items():
            name = re.sub(theirs, ours, name)
        weights[name] = tensor[0] if name.endswith(".posemb") else tensor
    channels, spatial = (weights.pop(f"{kind}_projections") for kind in ("channel", "spatial"))
    if len(channels) + len(spatial) > len(weights):
        raise ValueError("more projections than weights")
    channel_orders, spatial_orders = (
        [one_hot_order(projection) for projection in each] for each in (channels, spatial))
    num_couplings = len(channel_orders) + len(spatial_orders)
    num_tokens, emb_dim = weights["couplings.0.net.posemb"].shape
    token_dim = len(weights["couplings.0.net.final_proj.bias"])
    # What the package fixes: exact GELU and PyTorch's LayerNorm epsilon, unlike the official model;
    # its default scale factor; its default cycle of kinds, which the numbers of projections must
    # confirm.
    assumed = grid_fields(path, num_tokens, token_dim, overrides) | {
        "gelu": "exact", "norm_eps": 1e-5, "scale_factor": 2.0}
    kinds = tuple(overrides.get("kinds", JetConfig.kinds))
    if not spatial_orders or not channel_orders:
        kinds = ("channels",) if channel_orders else ("spatial",)
    cycle = [kinds[i % len(kinds)] for i in range(num_couplings)]
    if cycle.count("spatial") != len(spatial_orders):
        raise CheckpointError(f"{path} has {len(channel_orders)} channel and {len(spatial_orders)} "
                              "spatial couplings and does not tell their order: give it, as in "
                              "load_jet(path, kinds=('channels', 'spatial'))")
    known = {"num_couplings": num_couplings, "kinds": kinds, "emb_dim": emb_dim,
             "block_depth": sum(name.startswith("couplings.0.") and name.endswith("fc1.bias")
                                for name in weights)}
    orders = {"channels": iter(channel_orders), "spatial": iter(spatial_orders)}
    weights |= {f"couplings.{i}.order": torch.tensor(next(orders[kind]))
                for i, kind in enumerate(cycle)}
    if spatial_orders:
        known["spatial_splits"] = split_names(path, spatial_orders, assumed, overrides)
    return Source(known=known, assumed=assumed, missing=("num_heads",), state=weights)
