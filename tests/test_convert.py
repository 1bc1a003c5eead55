"""Weight files: what they tell, what is asked for, and that nothing in them is trusted."""
import copy
import functools
import pickle
import re
import resource
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from convert import load_jet, opened, weights_id
from harness import checkpoint as checkpoints, files
from harness.checkpoint import read_tensors, save_checkpoint
from harness.errors import CheckpointError
from jet import SPATIAL_SPLITS, Jet, JetConfig

GOLDEN = Path(__file__).parent / "golden"
PORT = GOLDEN / "jet_pytorch_port.pt"


def official(name):
    return dict(arrays(name))


@functools.cache
def arrays(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


@pytest.fixture(scope="module")
def port():
    """The port's file, read once."""
    return opened(PORT)


@pytest.fixture
def save(tmp_path):
    """Write an official tree as .npz."""
    def write(tree, name="tree.npz"):
        np.savez(tmp_path / name, **tree)
        return tmp_path / name
    return write


CONFIG = JetConfig(image_size=8, num_couplings=2, block_depth=1, emb_dim=8, num_heads=2)


@pytest.fixture
def checkpoint(tmp_path):
    """One of our checkpoints, as train.py writes them."""
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(CONFIG)},
                "model": Jet(CONFIG).state_dict()}, path)
    return path


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_official_config_is_read_off_the_file():
    config = load_jet(GOLDEN / "jet_nonsquare_ext.npz").config
    assert (config.image_size, config.patch_size, config.num_couplings) == ((24, 16), 4, 7)
    assert (config.block_depth, config.emb_dim, config.num_heads) == (1, 12, 4)
    assert config.kinds == ("channels", "spatial", "spatial", "channels", "spatial", "spatial", "channels")
    assert config.spatial_splits == SPATIAL_SPLITS[:4]
    assert (config.gelu, config.norm_eps, config.scale_factor) == ("tanh", 1e-6, 2.0)


@pytest.mark.parametrize("name, missing", [
    ("jet_spatial_only", {}), ("jet_nonsquare_ext", {"image_size": (24, 16)})])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_official_tree_without_meta_asks_for_what_it_cannot_tell(save, name, missing, prefix):
    tree = {prefix + key.removeprefix("params/"): value
            for key, value in official(name).items() if key.startswith("params/")}
    path = save(tree)
    with pytest.raises(CheckpointError, match="does not tell (scale_factor|image_size)"):
        load_jet(path)
    if missing:
        with pytest.raises(CheckpointError, match="does not tell image_size"):
            load_jet(path, scale_factor=2.0)
    jet = load_jet(path, scale_factor=2.0, **missing)
    assert same_weights(jet, load_jet(GOLDEN / f"{name}.npz"))
    assert load_jet(path, scale_factor=3.0, **missing).config.scale_factor == 3.0


DNN = "params/couplings/dnn"
KEY = f"{DNN}/vit/encoderblock_0/MultiHeadDotProductAttention_0/key/kernel"
SPATIAL_MASKS = "params/spatial_coupling_masks-FREEZE_ME"


@pytest.mark.parametrize("change, message", [
    (lambda tree: tree.update({f"{DNN}/MultiHeadDotProductAttention_0/query/kernel": np.zeros((6, 24, 4, 6), np.float32)}),
     "unknown leaf MultiHeadDotProductAttention_0/query/kernel"),
    (lambda tree: tree.pop(f"{DNN}/posemb"), "not an official parameter tree .*posemb"),
    (lambda tree: tree.pop(f"{DNN}/final_proj/bias"), "final_proj/bias"),
    (lambda tree: tree.pop("params/channel_coupling_masks-FREEZE_ME"), "channel_coupling_masks"),
    (lambda tree: tree.update({f"{DNN}/init_proj/kernel": np.zeros((6, 5, 24), np.float32)}), "do not fit"),
    (lambda tree: tree.update({KEY: tree[KEY].swapaxes(2, 3)}), "key: kernel"),
    (lambda tree: tree.update({f"{DNN}/vit/encoderblock_0/LayerNorm_9/scale": np.ones((6, 24))}), "unknown leaf"),
    (lambda tree: tree.update({SPATIAL_MASKS: np.ones((6, 16, 16))}), "not one-hot"),
    (lambda tree: tree.update({SPATIAL_MASKS: np.stack([np.eye(16)] * 6)}), "none of the known"),
])
def test_damaged_official_trees_are_refused(save, change, message):
    tree = official("jet_spatial_only")
    change(tree)
    with pytest.raises(CheckpointError, match=message) as error:
        load_jet(save(tree))
    assert "\n" not in str(error.value)


def test_params_are_told_from_an_optimizer_state_beside_them(save):
    tree = official("jet_spatial_only")
    for name in [name for name in tree if name.startswith("params/")]:
        tree[name.replace("params/", "opt/0/mu/")] = np.ones_like(tree[name])
    assert same_weights(load_jet(save(tree)), load_jet(GOLDEN / "jet_spatial_only.npz"))


def test_port_needs_num_heads_and_tells_the_rest(port):
    with pytest.raises(CheckpointError, match="does not tell num_heads"):
        load_jet(PORT)
    config = load_jet(port, num_heads=4).config
    assert (config.gelu, config.norm_eps, config.scale_factor) == ("exact", 1e-5, 2.0)
    assert config.kinds == JetConfig().kinds and config.num_couplings == 12
    with pytest.raises(CheckpointError, match="emb_dim=32 was given, but the file says 24"):
        load_jet(port, num_heads=4, emb_dim=32)
    with pytest.raises(CheckpointError, match="depth=3: no field of JetConfig"):
        load_jet(port, num_heads=4, depth=3)


def test_port_with_another_order_of_kinds_asks_for_it(tmp_path):
    content = torch.load(PORT, weights_only=True)
    content["channel_projections"] = content["channel_projections"][:6]
    content["spatial_projections"] = content["spatial_projections"][[0, 1, 0, 1, 0, 1]]
    torch.save(content, tmp_path / "port.pt")
    with pytest.raises(CheckpointError, match="does not tell their order"):
        load_jet(tmp_path / "port.pt", num_heads=4)
    jet = load_jet(tmp_path / "port.pt", num_heads=4, kinds=("channels", "spatial"))
    assert [coupling.axis for coupling in jet.couplings] == [2, 1] * 6
    assert jet.config.coupling_splits[3] == ("spatial", "checkerboard-inv")


def test_ours_loads_without_touching_the_global_generator(checkpoint):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    jet, weights = load_jet(checkpoint), torch.load(checkpoint)["model"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in jet.state_dict().items())
    with pytest.raises(CheckpointError, match="emb_dim=16 was given, but the file says 8"):
        load_jet(checkpoint, emb_dim=16)


def test_a_file_that_would_run_code_runs_none(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path(tmp_path / "it ran").touch, ())
    torch.save({"format": "jet-checkpoint-1", "model": Code()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Code()))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(CheckpointError) as error:
            load_jet(tmp_path / name)
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "code.npz", **{f"{DNN}/posemb": np.array([Code()], dtype=object)})
    with pytest.raises(CheckpointError):
        load_jet(tmp_path / "code.npz")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint at all", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_empty_and_foreign_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)) as error:
        load_jet(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["ours", "official"])
def test_a_file_cut_anywhere_is_refused(tmp_path, checkpoint, source):
    whole = (checkpoint if source == "ours" else GOLDEN / "jet_spatial_only.npz").read_bytes()
    path = tmp_path / ("cut.pt" if source == "ours" else "cut.npz")
    for tenths in range(10):
        path.write_bytes(whole[:len(whole) * tenths // 10])
        with pytest.raises(CheckpointError) as error:
            load_jet(path)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for position in range(97, len(whole), len(whole) // 25):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        checkpoint.write_bytes(flipped)
        try:
            jet = load_jet(checkpoint)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:  # a bit that means nothing: padding, or a date
            checkpoint.write_bytes(whole)
            assert same_weights(jet, load_jet(checkpoint))


@pytest.mark.parametrize("overrides", [
    {"channels": 0}, {"channels": "3"}, {"patch_size": 0}, {"kinds": ()}, {"image_size": "x"},
    {"num_heads": 5}, {"num_heads": 4, "image_size": 12}])
def test_overrides_that_make_no_sense_are_refused(port, overrides):
    with pytest.raises(CheckpointError, match="jet_pytorch_port.pt") as error:
        load_jet(port, **{"num_heads": 4, **overrides})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda content: content.pop("model"), "KeyError"),
    (lambda content: content["config"]["model"].update(emb_dim=9), "emb_dim=9: must be divisible"),
    (lambda content: content["config"]["model"].update(width=9), "width"),
    (lambda content: content["config"]["model"].update(emb_dim=16), "do not fit"),
    (lambda content: content["model"]["couplings.0.order"].zero_(), "is not a permutation"),
    (lambda content: content.update(format="jet-checkpoint-7"), "neither a checkpoint of ours"),
    (lambda content: content.update(config=3), "not a whole checkpoint of ours"),
    (lambda content: content["config"]["model"].update(image_size=[]), "image_size"),
    (lambda content: content["config"]["model"].update(emb_dim=2 * 10 ** 9), "no memory"),
])
def test_altered_checkpoints_are_refused(checkpoint, change, message):
    content = torch.load(checkpoint)
    change(content)
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        load_jet(checkpoint)
    assert "\n" not in str(error.value)


def test_missing_files_and_lists_are_refused(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path / "no.npz", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            load_jet(path)
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_tensors(tmp_path / "list.pt")


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        torch.manual_seed(step)
        save_checkpoint(tmp_path, {"step": step, "config": {"model": vars(CONFIG)}, "model": Jet(CONFIG).state_dict()})
    return tmp_path


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_run_folder_with_a_damaged_checkpoint_gives_the_one_before(run_dir, damage):
    newest, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint-previous.pt"
    assert same_weights(load_jet(run_dir), load_jet(newest))
    assert not same_weights(load_jet(newest), load_jet(previous))
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:5000 if damage == "cut" else 0])
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.warns(UserWarning, match="checkpoint.pt: (missing|empty, damaged).*; read "
                      "checkpoint-previous.pt, step 1") as warned:
        assert same_weights(load_jet(run_dir), load_jet(previous))
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    with pytest.warns(UserWarning, match="read checkpoint-previous.pt"):
        assert weights_id(run_dir) == weights_id(previous)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    previous.write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint") as error:
        load_jet(run_dir)
    assert "\n" not in str(error.value)


def test_a_loaded_jet_is_fast_and_a_jet_like_any_other(tmp_path):
    torch.manual_seed(0)
    config = JetConfig(image_size=8, num_couplings=2, block_depth=1, emb_dim=16, num_heads=2)
    plain, x = Jet(config), torch.rand(2, 3, 8, 8)
    for parameter in plain.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(tmp_path, {"step": 1, "config": {"model": vars(config)}, "model": plain.state_dict()})
    jet = load_jet(tmp_path)
    if kernels.compiled.library():
        assert kernels.used_by(jet) == "C"
    assert isinstance(jet, Jet) and same_weights(jet, plain)
    z, logdet = jet(x)
    twin = copy.deepcopy(jet)
    assert type(twin.couplings[0]) is type(jet.couplings[0]) and torch.equal(twin(x)[0], z)
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip((z, logdet), plain(x)))
    exact = copy.deepcopy(jet).to(torch.float64)
    assert all(torch.allclose(*pair, rtol=1e-7, atol=1e-7) for pair in zip(exact(x.double()), plain.double()(x.double())))
    assert jet.double() is jet and torch.equal(jet(x.double())[0], exact(x.double())[0])


BARE = [{"num_couplings": 3, "block_depth": 3}, {"block": "cnn", "actnorm": True, "invertible_dense": True},
        {"split_mode": "masking"}, {"kinds": ("spatial",)}, {"kinds": ("channels",)},
        {"image_size": (16, 32), "spatial_splits": ("vstripes-inv",)}]
WRAPPED = {
    "alone": lambda state: state, "state_dict": lambda state: {"state_dict": state},
    "model, step": lambda state: {"model": state, "step": 3, "optimizer": {"state": {}}},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "_orig_mod.": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled couplings": lambda state: {re.sub(r"^(couplings\.\d+)\.", r"\1._orig_mod.", name): tensor
                                         for name, tensor in state.items()},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) if tensor.is_floating_point()
                                 else tensor for name, tensor in state.items()}}


def bare_jet(**changes):
    torch.manual_seed(1)
    return Jet(JetConfig(**{"image_size": 16, "num_couplings": 2, "block_depth": 1, "emb_dim": 8,
                            "num_heads": 2, "kinds": ("channels", "spatial"), **changes}))


@pytest.mark.parametrize("changes", BARE, ids=map(str, BARE))
def test_a_bare_state_dict_of_ours_tells_all_but_what_it_cannot(tmp_path, changes):
    jet = bare_jet(**changes)
    torch.save(jet.state_dict(), tmp_path / "weights.pt")
    given = {name: value for name, value in changes.items() if name == "image_size"}
    if jet.config.block == "vit":
        with pytest.raises(CheckpointError, match="does not tell num_heads"):
            load_jet(tmp_path / "weights.pt", **given)
        given["num_heads"] = 2
    loaded = load_jet(tmp_path / "weights.pt", **given)
    assert same_weights(jet, loaded)
    weights = opened(tmp_path / "weights.pt")  # and read once
    x = torch.rand(2, *jet.config.image_shape)
    assert torch.equal(loaded(x)[1], kernels.accelerate(jet)(x)[1])
    # with all that a user may give
    assert same_weights(jet, load_jet(weights, **vars(jet.config)))
    with pytest.raises(CheckpointError, match="emb_dim=16 was given, but the file says 8"):
        load_jet(weights, **given, emb_dim=16)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_others_wrap_a_state_dict_in_is_taken_off(tmp_path, wrap):
    jet = bare_jet()
    torch.save(WRAPPED[wrap](jet.state_dict()), tmp_path / "weights.pt")
    assert same_weights(jet, load_jet(tmp_path / "weights.pt", num_heads=2))


def test_of_several_state_dicts_none_is_guessed(tmp_path):
    state = bare_jet().state_dict()
    torch.save({"model": state, "ema": state, "step": 1}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts \(model, ema\): save the one"):
        load_jet(tmp_path / "weights.pt", num_heads=2)


def test_weights_in_bfloat16_are_read_as_float32(tmp_path):
    jet = bare_jet().bfloat16()
    torch.save(jet.state_dict(), tmp_path / "weights.pt")
    loaded = load_jet(tmp_path / "weights.pt", num_heads=2)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same_weights(jet.float(), loaded)


def test_safetensors_are_read_where_the_package_is(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(bare_jet().state_dict(), path)
    assert same_weights(bare_jet(), load_jet(path, num_heads=2))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged or no .safetensors"):
        load_jet(path, num_heads=2)


def test_without_safetensors_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_jet(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("field, value", [("num_couplings", 10 ** 6), ("block_depth", 10 ** 6),
                                          ("emb_dim", 2 ** 20), ("image_size", 2 ** 15)])
def test_a_configuration_allocates_nothing_before_it_fits_the_weights(checkpoint, field, value):
    content = torch.load(checkpoint)
    content["config"]["model"][field] = value
    torch.save(content, checkpoint)
    begun, before = time.process_time(), peak_mib()
    with pytest.raises(CheckpointError, match="do not fit their configuration"):
        load_jet(checkpoint)
    assert time.process_time() - begun < 10 and peak_mib() - before < 300


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_small_npz_with_a_large_appetite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "NPZ_BYTES", files.NPZ_BYTES // 8)
    path = tmp_path / "weights.npz"
    header = {"descr": "<f4", "fortran_order": False}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (3 * 2 ** 22,)})
            for _ in range(3):
                file.write(bytes(2 ** 24))
    assert path.stat().st_size < 2 ** 18
    before = peak_mib()
    with pytest.raises(CheckpointError, match="unpacks to"):
        load_jet(path)
    with zipfile.ZipFile(path, "w") as archive:  # a header that promises more than there is
        with archive.open("a.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (2 ** 40,)})
    with pytest.raises(CheckpointError, match="needs more bytes"):
        load_jet(path)
    assert peak_mib() - before < 38


def laughs(depth=12):
    """A list of a few hundred bytes in a pickle, and 10^12 words in print."""
    value = ["ha"] * 10
    for _ in range(depth - 1):
        value = [value] * 10
    return value


def deep(depth=150):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HUNGRY = {  # what takes far more than its file, or has no shape
    "repeated values": lambda state: {**state, "couplings.0.net.posemb": torch.zeros(1).expand(2 ** 30, 8)},
    "many repeated values": lambda state: {f"couplings.{i}.order": torch.zeros(2 ** 14) for i in range(2)} | {
        f"more {i}": state["couplings.0.net.init_proj.weight"].expand(2 ** 14, -1, -1) for i in range(2 ** 9)},
    "no values": lambda state: {**state, "couplings.0.net.posemb": torch.zeros(2 ** 40, 0)},
    "an order of no values": lambda state: {**state, "couplings.0.order": torch.zeros(2 ** 40, 0, dtype=torch.long)},
    "an order of bytes": lambda state: {**state, "couplings.0.order": torch.zeros(2 ** 22, dtype=torch.uint8)},
    "projections of no values": lambda state: {"channel_projections": torch.zeros(2 ** 40, 0, 0),
                                               "spatial_projections": torch.zeros(1, 4, 4)},
    "many projections": lambda state: {"channel_projections": torch.ones(2 ** 22, 1, 1, dtype=torch.uint8),
                                       "spatial_projections": torch.zeros(1, 4, 4)},
    "sparse": lambda state: {**state, "couplings.0.net.posemb": torch.sparse_coo_tensor(size=(2 ** 30, 2 ** 30))},
    "complex": lambda state: {name: tensor.to(torch.complex64) if tensor.is_floating_point() else tensor
                              for name, tensor in state.items()},
    "on no device": lambda state: {name: tensor.to("meta") for name, tensor in state.items()},
    "laughs": lambda state: {**state, "more": laughs()}, "deep": lambda state: {**state, "more": deep()},
    "a large number": lambda state: {**state, "more": 10 ** 6000},
    "laughs in a configuration": lambda state: {
        "format": "jet-checkpoint-1", "model": state, "config": {"model": {**vars(CONFIG), "block": laughs()}}},
    "couplings beyond count": lambda state: {
        "format": "jet-checkpoint-1", "model": state, "config": {"model": {**vars(CONFIG), "num_couplings": 10 ** 12}}},
    "a scale beyond floats": lambda state: {
        "format": "jet-checkpoint-1", "model": state, "config": {"model": {**vars(CONFIG), "scale_factor": 10 ** 15}}},
    "no weights": lambda state: {"format": "jet-checkpoint-1", "model": "x" * 200, "config": {"model": vars(CONFIG)}},
    "weights of numbers": lambda state: {"format": "jet-checkpoint-1", "config": {"model": vars(CONFIG)},
                                         "model": {**state, **{i: tensor for i, tensor in enumerate(state.values())}}},
    "the widest": lambda state: {"format": "jet-checkpoint-1", "model": state, "config": {"model": {
        **vars(CONFIG), "emb_dim": 2 ** 62, "image_size": 2 ** 62}}}}


@pytest.mark.parametrize("kind", HUNGRY)
def test_a_weight_file_takes_no_more_than_its_size(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoints, "MAX_PARTS", checkpoints.MAX_PARTS // 10)
    torch.save(HUNGRY[kind](bare_jet().state_dict()), tmp_path / "weights.pt")
    begun, before = time.process_time(), peak_mib()
    with pytest.raises(CheckpointError) as error:
        load_jet(tmp_path / "weights.pt", num_heads=2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000 + len(str(tmp_path))
    assert time.process_time() - begun < 5 and peak_mib() - before < 300


def test_many_small_parts_of_an_archive_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "NPZ_ARRAYS", files.NPZ_ARRAYS // 10)
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        for number in range(1_100):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(CheckpointError, match="has 1,100 arrays, and 1,000 are allowed"):
        load_jet(tmp_path / "weights.npz")


def test_couplings_of_a_byte_each_are_too_many(save):
    parts = ("init_proj/scale", "init_proj/bias", "vit/encoder_norm/scale", "vit/encoder_norm/bias",
             "final_proj/scale", "final_proj/bias")
    one = {f"{DNN}/{part}": np.zeros((2 ** 21, 1), np.int8) for part in parts}
    path = save(one | {f"{DNN}/posemb": np.zeros((2 ** 21, 1, 1, 1), np.int8),
                       "params/channel_coupling_masks-FREEZE_ME": np.zeros((1, 1, 1)),
                       SPATIAL_MASKS: np.zeros((1, 1, 1))})
    with pytest.raises(CheckpointError, match="2,097,152 couplings are too many"):
        load_jet(path)


@pytest.mark.parametrize("changes", [
    {SPATIAL_MASKS: np.zeros((6, 2000, 2000), bool)}, {SPATIAL_MASKS: np.zeros((10 ** 7, 1, 1), bool)},
    {SPATIAL_MASKS: np.zeros((6, 10 ** 6, 0))}, {f"{DNN}/posemb": np.zeros((10 ** 9, 1, 0, 0), np.float32)},
    {f"{DNN}/posemb": np.zeros((10 ** 7, 1, 1, 1), np.int8)}, {"meta_json": np.array("[" * 10 ** 5)},
    {"meta_json": np.array('{"image": [8, 8, 3], "config": {"ps": 4, "scale_factor": 1e999}}')},
    {"meta_json": np.zeros((10 ** 6, 0))}])
def test_an_official_tree_takes_no_more_than_its_size(tmp_path, changes):
    np.savez_compressed(tmp_path / "tree.npz", **official("jet_spatial_only") | changes)
    begun, before = time.process_time(), peak_mib()
    with pytest.raises(CheckpointError) as error:
        load_jet(tmp_path / "tree.npz")
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    assert time.process_time() - begun < 10 and peak_mib() - before < 112
