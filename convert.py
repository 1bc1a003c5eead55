"""Weights of Jets, ours and those of other implementations, as a Jet.

    jet = load_jet("runs/my-run")                          # a run folder, or a checkpoint of ours
    jet = load_jet("official.npz", scale_factor=2.0)       # official (flax) parameter tree
    jet = load_jet("jet_pytorch.pt", num_heads=8)          # state dict of the package jet-pytorch
    jet = load_jet("jet.safetensors", num_heads=8)         # state dict of a Jet of ours

No file is trusted: nothing in it is run, and what it cannot tell is asked for, never guessed.
"""
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

import kernels
from harness.checkpoint import (CHECKPOINT_FORMAT, MAX_PARTS, check_content, checksum, load_weights,
                                read_weights)
from harness.errors import CheckpointError, short
from harness.files import check_npz, file_sha256, parse_json, read_bytes
from jet import SPATIAL_SPLITS, Jet, JetConfig, spatial_order


def load_jet(path, **overrides):
    """A Jet (float32, CPU, with the C kernels where they serve) from a weight file.

    path: a run folder (its newest whole checkpoint, and a warning where that is the one before),
    one of our checkpoints, an .npz of the official parameter tree, or a state dict of jet-pytorch
    (0.0.2) or of a Jet (.pt or .safetensors, in any precision, alone or as the only one in a dict,
    also with the prefixes of DistributedDataParallel and torch.compile). overrides: JetConfig
    fields that the file cannot tell: num_heads of a state dict (and, of a Jet's, what is not the
    default); scale_factor and a non-square image_size of an official tree without meta_json.
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
    """(the file's path, its content, what it is, what makes a _Source of it)."""
    if _is_a(".npz", path):
        return Path(path), _read_npz(path), "an official parameter tree", _official_source
    if _is_a(".safetensors", path):
        path, content = Path(path), _read_safetensors(path)
    else:
        path, content = read_weights(Path(path))
    if content.get("format") == CHECKPOINT_FORMAT:
        return path, content, "a whole checkpoint of ours", _our_source
    state = {} if "format" in content else _plain_state(path, content)  # else of another version
    if "channel_projections" in state:
        return path, state, "a state dict of jet-pytorch", _jet_pytorch_source
    if "couplings.0.order" in state:
        return path, state, "a state dict of a Jet", _bare_source
    raise CheckpointError(f"{path}: neither a checkpoint of ours nor a state dict of a Jet or of "
                          "jet-pytorch")


def _is_a(suffix, path):
    return Path(path).suffix == suffix and not Path(path).is_dir()


def is_ours(path):
    """Whether a path may hold a checkpoint of ours, by its name."""
    return not (_is_a(".npz", path) or _is_a(".safetensors", path))


def _read_safetensors(path):
    """{name: tensor} of a .safetensors file."""
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors: pip install "
                              "safetensors") from None
    try:
        content = read_bytes(path, max_bytes=2 ** 40)
        state = safetensors.torch.load(content)
        check_content(state, len(content))
        return state
    except MemoryError:
        raise CheckpointError(f"{path}: does not fit in this machine's memory") from None
    except Exception as error:
        raise CheckpointError(f"{path}: empty, damaged or no .safetensors file "
                              f"({short(error)})") from None


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
    text = json.dumps(dataclasses.asdict(jet.config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_id(path):
    """The name of the weights in a run folder or weight file, as TrainConfig.init holds it.

    It is the SHA-256 of the weights in a checkpoint of ours, of all bytes of another file. Raises
    CheckpointError.
    """
    path, content = read_weights(Path(path)) if is_ours(path) else (Path(path), {})
    try:
        if content.get("format") == CHECKPOINT_FORMAT:
            return f"sha256-{checksum(content['model'])[:16]}"
        return f"sha256-{file_sha256(path)[:16]}"
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of ours ({short(error)})") from None


@dataclasses.dataclass(kw_only=True)
class _Source:
    """What a file says of a Jet."""
    state: dict  # our state dict
    known: dict  # JetConfig fields that the file tells
    assumed: dict = dataclasses.field(default_factory=dict)  # fixed by what wrote the file
    missing: tuple = ()  # to be given by the caller


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
    return _Source(known=dict(content["config"]["model"]), state=state)


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
    assumed = _grid_fields(path, num_tokens, token_dim // 2 if masking else token_dim, overrides)
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
    spatial = [order for order, kind in zip(orders, kinds) if kind == "spatial"]
    if spatial:
        known["spatial_splits"] = _split_names(path, spatial, assumed, overrides)
    missing = ("num_heads",) if known["block"] == "vit" else ()
    return _Source(known=known, assumed=assumed, missing=missing, state=state)


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
        raise CheckpointError(f"{path} does not tell image_size: its {num_tokens} tokens are no "
                              "square; give it, as in load_jet(path, image_size=(height, width))")
    return assumed


def _split_names(path, orders, assumed, overrides):
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


def _one_hot_order(projection):
    """y[m] = sum_k x[k] P[k, m] with one-hot columns: for each m, the k. (n, n) -> (n,)."""
    projection = np.asarray(projection)
    order, places = projection.argmax(0), range(projection.shape[1])
    is_one_hot = np.count_nonzero(projection, 0) == 1, projection[order, places] == 1
    if projection.shape[0] != projection.shape[1] or not np.all(is_one_hot):
        raise ValueError("a projection is not one-hot")
    return order


# ---- the official parameter tree: one leaf per weight, its first axis is the coupling

_OFFICIAL = {  # ours: theirs
    "init_proj": "init_proj", "final_norm": "vit/encoder_norm", "final_proj": "final_proj",
}
_OFFICIAL_BLOCK = {
    "norm1": "LayerNorm_0", "norm2": "LayerNorm_1",
    "attention.out": "MultiHeadDotProductAttention_0/out",
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

    for ours, theirs in _OFFICIAL.items():
        put(ours, theirs)
    for k in range(_official_depth(tree)):
        for ours, theirs in _OFFICIAL_BLOCK.items():
            put(f"blocks.{k}.{ours}", f"vit/encoderblock_{k}/{theirs}")
        qkv = []
        for part in ("query", "key", "value"):
            name = f"vit/encoderblock_{k}/MultiHeadDotProductAttention_0/{part}"
            kernel = leaves.pop(f"{name}/kernel")  # (L, E, K, E/K)
            bias = leaves.pop(f"{name}/bias")  # (L, K, E/K)
            if kernel.shape[1] != emb_dim or kernel.shape[2:] != bias.shape[1:]:
                raise ValueError(f"{name}: kernel {kernel.shape} and bias {bias.shape}")
            qkv.append((kernel.reshape(num_couplings, emb_dim, -1).swapaxes(1, 2),
                        bias.reshape(num_couplings, -1)))
        for name, parts in zip(("weight", "bias"), zip(*qkv)):
            weights[f"blocks.{k}.attention.qkv.{name}"] = np.concatenate(parts, axis=1)
    if leaves:
        raise ValueError(f"unknown leaf {sorted(leaves)[0]}")
    return {f"couplings.{i}.net.{name}": torch.tensor(leaf[i])
            for name, leaf in weights.items() for i in range(num_couplings)}


def _official_depth(tree):
    matches = (re.search(r"/vit/encoderblock_(\d+)/", name) for name in tree)
    return len({match[1] for match in matches if match})


def _official_source(path, content, overrides):
    masks = "channel_coupling_masks-FREEZE_ME"
    prefixes = [name.removesuffix(masks) for name in content if name.endswith(masks)]
    if not prefixes:
        raise KeyError(masks)
    prefix = prefixes[0] if len(prefixes) == 1 else "params/"  # beside an optimizer's state
    tree = {name.removeprefix(prefix): leaf for name, leaf in content.items()
            if name.startswith(f"{prefix}couplings/dnn/")}
    if any("/dnn/MultiHeadDotProductAttention_0" in name for name in tree):
        raise CheckpointError(f"{path}: a class-conditional Jet (it has "
                              "dnn/MultiHeadDotProductAttention_0): only unconditional ones can be "
                              "loaded")
    channel_masks = content[prefix + masks]  # (L, D, D), zero where not used
    spatial_masks = content[prefix + masks.replace("channel", "spatial")]  # (L, N, N), likewise
    weights = official_weights(tree)
    if not len(spatial_masks) == len(channel_masks) == len(tree["couplings/dnn/posemb"]):
        raise ValueError("not as many masks as couplings")
    kinds = tuple("spatial" if mask.any() else "channels" for mask in spatial_masks)
    orders = [_one_hot_order((spatial_masks if kind == "spatial" else channel_masks)[i])
              for i, kind in enumerate(kinds)]
    weights |= {f"couplings.{i}.order": torch.tensor(order) for i, order in enumerate(orders)}
    query = tree["couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    known = {"num_couplings": len(kinds), "kinds": kinds, "emb_dim": query.shape[1],
             "num_heads": query.shape[2], "block_depth": _official_depth(tree)}
    missing = ()
    if "meta_json" in content:
        meta = parse_json(str(content["meta_json"]))
        grid = {"image_size": tuple(meta["image"][:2]), "channels": meta["image"][2],
                "patch_size": meta["config"]["ps"]}
        known |= {**grid, "scale_factor": meta["config"]["scale_factor"]}
    else:
        grid = _grid_fields(path, spatial_masks.shape[1], channel_masks.shape[1], overrides)
        missing = ("scale_factor",)
    spatial = [order for order, kind in zip(orders, kinds) if kind == "spatial"]
    if spatial:
        known["spatial_splits"] = _split_names(path, spatial, grid, overrides)
    return _Source(known=known, assumed=grid, missing=missing, state=weights)


# ---- the state dict of the package jet-pytorch 0.0.2

_JET_PYTORCH = {  # theirs: ours, in the order in which they are replaced
    r"^blocks\.(\d+)\.dnn\.": r"couplings.\1.net.",
    r"\.pos_emb$": ".posemb",
    r"\.encoder\.ln\.": ".final_norm.", r"\.encoder\.blocks\.": ".blocks.",
    r"\.mha\.in_proj_": ".attention.qkv.", r"\.mha\.out_proj\.": ".attention.out.",
    r"\.ln(\d)\.": r".norm\1.", r"\.mlp\.in_proj\.": ".fc1.", r"\.mlp\.out_proj\.": ".fc2.",
}


def _jet_pytorch_source(path, content, overrides):
    weights = {}
    for name, tensor in content.items():
        for theirs, ours in _JET_PYTORCH.items():
            name = re.sub(theirs, ours, name)
        weights[name] = tensor[0] if name.endswith(".posemb") else tensor
    channels, spatial = (weights.pop(f"{kind}_projections") for kind in ("channel", "spatial"))
    if len(channels) + len(spatial) > len(weights):
        raise ValueError("more projections than weights")
    channel_orders, spatial_orders = (
        [_one_hot_order(projection) for projection in each] for each in (channels, spatial))
    num_couplings = len(channel_orders) + len(spatial_orders)
    num_tokens, emb_dim = weights["couplings.0.net.posemb"].shape
    token_dim = len(weights["couplings.0.net.final_proj.bias"])
    # What the package fixes: exact GELU and PyTorch's LayerNorm epsilon, unlike the official model;
    # its default scale factor; its default cycle of kinds, which the numbers of projections must
    # confirm.
    assumed = _grid_fields(path, num_tokens, token_dim, overrides) | {
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
        known["spatial_splits"] = _split_names(path, spatial_orders, assumed, overrides)
    return _Source(known=known, assumed=assumed, missing=("num_heads",), state=weights)
