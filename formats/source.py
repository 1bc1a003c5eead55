"""What a weight file says of a Jet, and how its shapes and masks are read."""
import dataclasses
import math

import numpy as np
import torch

from harness.errors import CheckpointError
from jet import SPATIAL_SPLITS, JetConfig, spatial_order


@dataclasses.dataclass(kw_only=True)
class Source:
    """What a file says of a Jet."""
    state: dict  # our state dict
    known: dict  # JetConfig fields that the file tells
    assumed: dict = dataclasses.field(default_factory=dict)  # fixed by what wrote the file
    missing: tuple = ()  # to be given by the caller


def grid_fields(path, num_tokens, token_dim, overrides):
    """channels, patch_size and image_size, as far as a number of tokens and values tells them."""
    channels = overrides.get("channels", 3)
    patch_size = overrides.get("patch_size", math.isqrt(token_dim // channels))
    side = math.isqrt(num_tokens)
    assumed = {"channels": channels, "patch_size": patch_size}
    if side * side == num_tokens:
        assumed["image_size"] = side * patch_size
    image_size = overrides.get("image_size", assumed.get("image_size"))
    if image_size is None:
        raise CheckpointError(f"{path} does not tell image_size: its {num_tokens} tokens are no "
                              "square; give it, as in load_jet(path, image_size=(height, width))")
    return assumed


def split_names(path, orders, assumed, overrides):
    """The names of spatial token orders."""
    image_size = overrides.get("image_size", assumed.get("image_size"))
    config = JetConfig(**{**assumed, "image_size": image_size, "kinds": ("channels",),
                          "split_mode": "masking"})
    if any(len(order) != config.num_tokens for order in orders):
        raise CheckpointError(f"{path}: image_size={config.image_size} and patch_size="
                              f"{config.patch_size} make {config.num_tokens} tokens, the file has "
                              f"{len(orders[0])}")
    names = []
    for order in orders:
        fits = [name for name in SPATIAL_SPLITS
                if torch.equal(spatial_order(name, *config.grid), torch.as_tensor(order))]
        if not fits:
            rows, columns = config.grid
            raise CheckpointError(f"{path}: spatial coupling {len(names)} has none of the known "
                                  f"patterns on a grid of {rows} x {columns} tokens: give another "
                                  "image_size=(height, width)")
        names.append(fits[0])
    return tuple(names)


def one_hot_order(projection):
    """y[m] = sum_k x[k] P[k, m] with one-hot columns: for each m, the k. (n, n) -> (n,)."""
    projection = np.asarray(projection)
    order, places = projection.argmax(0), range(projection.shape[1])
    is_one_hot = np.count_nonzero(projection, 0) == 1, projection[order, places] == 1
    if projection.shape[0] != projection.shape[1] or not np.all(is_one_hot):
        raise ValueError("a projection is not one-hot")
    return order


def refuse_differences(config, who, **needed):
    """Raise CheckpointError for the first field of a JetConfig that is not what a format needs."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(f"{name}={getattr(config, name)!r}: {who} has {value!r} alone: "
                                  "export it as safetensors, which holds every Jet")
