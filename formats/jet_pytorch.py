"""The state dict of the package jet-pytorch 0.0.2."""
import re

import torch

from formats.source import (Source, grid_fields, one_hot_order, refuse_differences,
                            split_names)
from harness.errors import CheckpointError
from jet import JetConfig

_JET_PYTORCH = {  # theirs: ours, in the order in which they are replaced
    r"^blocks\.(\d+)\.dnn\.": r"couplings.\1.net.",
    r"\.pos_emb$": ".posemb",
    r"\.encoder\.ln\.": ".final_norm.", r"\.encoder\.blocks\.": ".blocks.",
    r"\.mha\.in_proj_": ".attention.qkv.", r"\.mha\.out_proj\.": ".attention.out.",
    r"\.ln(\d)\.": r".norm\1.", r"\.mlp\.in_proj\.": ".fc1.", r"\.mlp\.out_proj\.": ".fc2.",
}
_TO_JET_PYTORCH = {  # ours: theirs, likewise
    r"^couplings\.(\d+)\.net\.": r"blocks.\1.dnn.", r"\.dnn\.blocks\.": ".dnn.encoder.blocks.",
    r"\.posemb$": ".pos_emb", r"\.final_norm\.": ".encoder.ln.",
    r"\.attention\.qkv\.": ".mha.in_proj_", r"\.attention\.out\.": ".mha.out_proj.",
    r"\.norm(\d)\.": r".ln\1.", r"\.fc1\.": ".mlp.in_proj.", r"\.fc2\.": ".mlp.out_proj.",
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


def jet_pytorch_state(jet):
    """The state dict of jet-pytorch that jet_pytorch_source reads to the same Jet.

    Raises CheckpointError for a Jet that the package cannot be.
    """
    config, state = jet.config, {}
    refuse_differences(config, "jet-pytorch", block="vit", split_mode="pairing", gelu="exact",
                       norm_eps=1e-5, actnorm=False, invertible_dense=False, context_dim=0)
    for name, tensor in jet.state_dict().items():
        for theirs, ours in _TO_JET_PYTORCH.items():
            name = re.sub(theirs, ours, name)
        if not name.endswith(".order"):
            state[name] = tensor[None].clone() if name.endswith(".pos_emb") else tensor.clone()
    for kind in ("channel", "spatial"):
        orders = [coupling.order for coupling, split in zip(jet.couplings, config.coupling_splits)
                  if split[0].startswith(kind)]
        size = config.token_dim if kind == "channel" else config.num_tokens
        state[f"{kind}_projections"] = masks = torch.zeros(len(orders), size, size)
        for mask, order in zip(masks, orders):
            mask[order, torch.arange(size)] = 1
    return state


def jet_pytorch_overrides(config):
    """The fields that load_jet must be given with such a file: it does not tell them."""
    kinds, usual = [kind for kind, _ in config.coupling_splits], JetConfig.kinds
    is_told = {"channels": config.channels == 3, "scale_factor": config.scale_factor == 2.0,
               "image_size": isinstance(config.image_size, int), "num_heads": False,
               "kinds": len(set(kinds)) == 1 or all(
                   kind == usual[i % len(usual)] for i, kind in enumerate(kinds))}
    return {name: getattr(config, name) for name, told in is_told.items() if not told}
