"""What a lossless codec must prove: images come back, at the price that the likelihood promised,
or a line says why."""
import copy
import hashlib
import json
import math
import os
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import codec
import kernels
from codec import bound, decode, encode
from coding import file_format, lifting, prior as prior_module, stored
from coding.ans import SYMBOL_BITS, CodecError, Coder, pack, unpack
from coding.prior import Prior
from data import load_images
from jet import Coupling, Jet, JetConfig

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "assets" / "jet_cifar10"
HEADER = len(file_format.MAGIC) + 8
PRIOR = Prior()


@pytest.fixture(scope="module", autouse=True)
def one_prior_and_nothing_stored():
    """The tables are computed once: that takes 40 ms. And all images go through the Jet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "Prior", lambda: PRIOR)
        patch.setattr(codec, "store", lambda image: (stored.RAW, range(10 ** 6)))
        patch.setattr(codec, "RAW_BITS", math.inf)
        yield


@pytest.fixture
def storing(monkeypatch):
    monkeypatch.setattr(codec, "store", stored.store)
    monkeypatch.setattr(codec, "RAW_BITS", 8)


def random_jet(seed=0, std=0.1, **changes):
    """A tiny Jet, with a coupling of each kind, whose every parameter is random."""
    torch.manual_seed(seed)
    tiny = {"image_size": 4, "patch_size": 2, "num_couplings": 2, "kinds": ("channels", "spatial"), "block_depth": 1,
            "emb_dim": 8, "num_heads": 2}
    jet = Jet(JetConfig(**{**tiny, **changes})).double()
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += std * torch.randn_like(parameter)
    return jet


def random_images(n, height=4, width=4, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def crops():
    """Real images, (100, 4, 4, 3)."""
    return load_images("cifar10-subset", "test").array[:100, 12:16, 12:16].copy()


def comes_back(jet, images):
    content, about = encode(jet, images)
    assert np.array_equal(decode(jet, content), images)
    return content, about


# ---- the coder

def full_coder(rng, lanes=8, words=3000):
    """A coder with random words and random lanes of every size."""
    coder = Coder(rng.integers(0, 2 ** 32, words, np.uint32))
    coder.lanes = (2 ** rng.uniform(30, 62, lanes)).astype(np.int64)
    return coder


def random_operation(rng, coder, prior):
    """(do, undo, fits): a random operation, its inverse, what do must return for it to fit."""
    kind, count = rng.integers(4), int(rng.integers(1, 30))
    if kind == 0:
        bits = int(rng.integers(1, 31))
        values = rng.integers(0, 2 ** bits, count)
        return (lambda: coder.push_bits(values, bits)), (lambda _: np.array_equal(coder.pop_bits(count, bits), values))
    if kind == 1:
        bits = int(rng.integers(1, 31))
        return (lambda: coder.pop_bits(count, bits)), (lambda popped: coder.push_bits(popped, bits) is None)
    if kind == 2:
        m = int(rng.integers(3, 9))
        z = rng.normal(size=count) * 10 ** rng.uniform(-2, 2.5) / lifting.delta(m)
        z = z.astype(np.int64)
        return (lambda: prior.push(coder, z, m)), (lambda _: np.array_equal(prior.pop(coder, count, m), z))
    x, shift = coder.lanes[:rng.integers(1, len(coder.lanes) + 1)], rng.integers(0, 31)
    shift = np.maximum(rng.integers(0, 31, len(x)), 12) if shift else np.zeros(len(x), np.int64)
    p = rng.integers(2 ** 12, 2 ** 13, len(x)) if shift.all() else rng.integers(1, 3, len(x))
    values = rng.integers(-2 ** 40, 2 ** 40, len(x))
    return ((lambda: coder.rescale(x, values, p, shift)),
            (lambda z: np.array_equal(coder.unscale(x, z, p, shift), values)))


@pytest.mark.parametrize("seed", range(4))
def test_what_the_coder_does_is_undone_in_reverse(seed):
    rng, prior = np.random.default_rng(seed), PRIOR
    coder, done = full_coder(rng), []
    for _ in range(40):
        do, undo = random_operation(rng, coder, prior)
        before = coder.lanes.copy(), coder.words.copy()
        done.append((undo, do(), before))
        assert ((coder.lanes >= 2 ** 30) & (coder.lanes < 2 ** 62)).all()
    for undo, returned, (lanes, words) in reversed(done):
        assert undo(returned)
        assert np.array_equal(coder.lanes, lanes) and np.array_equal(coder.words, words)


def test_rescaling_multiplies_and_costs_the_logarithm():
    rng = np.random.default_rng(0)
    for p, shift in ((4096, 12), (8191, 12), (5000, 13), (7000, 30), (2, 0), (1, 0)):
        coder = full_coder(rng, 1000)
        values, before = rng.integers(-2 ** 40, 2 ** 40, 1000), coder.bits
        z = coder.rescale(coder.lanes, values, np.full(1000, p), np.full(1000, shift))
        exact = [int(value) * p / 2 ** shift for value in values]
        assert (np.abs(z - exact) <= max(1, p / 2 ** shift)).all()
        assert coder.bits - before == pytest.approx(1000 * (shift - math.log2(p)), abs=0.1)


def test_pushed_bits_cost_their_number():
    coder = full_coder(np.random.default_rng(0), 100)
    before = coder.bits
    coder.push_bits(np.random.default_rng(1).integers(0, 2 ** 13, 1000), 13)
    assert coder.bits - before == pytest.approx(13000, abs=0.1)


def test_lanes_are_taken_up_and_given_back():
    coder = Coder(np.arange(50, dtype=np.uint32) * 77777777, num_lanes=4)
    words, lanes = coder.words.copy(), coder.lanes.copy()
    assert ((lanes >= 2 ** 32) & (lanes < 2 ** 33)).all()
    coder.set_lanes(20)
    assert len(coder.lanes) == 20 and coder.num_words == 30
    coder.set_lanes(4)
    assert np.array_equal(coder.lanes, lanes) and np.array_equal(coder.words, words)
    coder.set_lanes(20)
    coder.push_bits(np.arange(20), 30)
    with pytest.raises(CodecError, match="do not fit these weights"):  # lanes that are in use
        coder.set_lanes(4)


def test_lanes_are_packed_to_some_bits_above_their_information():
    lanes = (2 ** np.random.default_rng(0).uniform(30, 62, 300)).astype(np.int64)
    lanes[:4] = 2 ** 30, 2 ** 62 - 1, 2 ** 32 - 1, 2 ** 32
    assert np.array_equal(unpack(pack(lanes), 300), lanes)
    assert 8 * len(pack(lanes)) <= np.log2(lanes).sum() + 5 * 300 + 8
    assert pack(lanes[:0]) == b"" and len(unpack(b"", 0)) == 0
    for content, count in ((pack(lanes), 299), (pack(lanes), 301), (b"", 1), (pack(lanes) + b"\0", 300),
                           (b"\0" * 9, 0)):
        with pytest.raises(ValueError, match="damaged"):
            unpack(content, count)


def test_only_a_borrowing_coder_runs_dry():
    with pytest.raises(CodecError, match="end too early"):
        Coder(np.zeros(3, np.uint32), num_lanes=4)
    coder = Coder(np.array([7, 8, 9], np.uint32), num_lanes=4, borrow=True)
    coder.pop_bits(8, 30)
    assert coder.borrowed > 1 and coder.low_water == 0


# ---- the prior

def test_prior_tables_are_whole_and_every_cell_can_be_coded():
    prior = PRIOR
    assert len(prior.tables) > 300 and prior.firsts[0] == 0
    assert np.array_equal(prior.firsts[1:], prior.ends[:-1])
    for table, first, end in zip(prior.tables, prior.firsts, prior.ends):
        assert table[0] == 0 and table[-1] == 2 ** SYMBOL_BITS
        assert (np.diff(table) > 0).all()
        assert len(table) == end - first + 2  # a probability for every cell, and the escape
    assert 63.9 < prior.ends[-1] * prior_module.CELL_WIDTH <= 64


@pytest.mark.parametrize("noise_bits", [3, 8])
def test_a_latent_costs_its_normal_density(noise_bits):
    prior, rng, delta = PRIOR, np.random.default_rng(0), lifting.delta(noise_bits)

    def surplus(z):
        """Bits above the density's, of each of the latents z (int64)."""
        bits = []
        for value in z:
            coder = full_coder(rng, 1, 400)
            coder.lanes[:] = 2 ** 61 + rng.integers(2 ** 60)  # a large state rounds the least
            before = coder.bits
            prior.push(coder, np.array([value]), noise_bits)
            x = (value + 0.5) * delta
            nats = x * x / 2 + math.log(2 * math.pi) / 2 - math.log(delta)
            bits.append(coder.bits - before - nats / math.log(2))
        return np.array(bits)

    normal = surplus((rng.normal(size=200) / delta).astype(np.int64))
    assert abs(normal.mean()) < 3e-4 and np.abs(normal).max() < 2e-2
    for deviations in (3.4, 3.5, 10, 40, 63):
        low, high = (deviations - 0.1) / delta, (deviations + 0.1) / delta
        far = surplus(np.array([-1, 1] * 5) * rng.integers(low, high, 10))
        escapes = 5e-5 * deviations ** 2  # each costs a little
        assert abs(far.mean()) < 0.01 + escapes
        falls = deviations * 1.5e-3  # within a cell
        assert np.abs(far).max() < 0.03 + falls + 2 * escapes


@pytest.mark.parametrize("noise_bits", [3, 8])
def test_latents_beyond_the_tables_come_back_and_are_counted(noise_bits):
    prior, step = PRIOR, 1 / lifting.delta(noise_bits)
    last = int(prior.ends[-1]) << noise_bits - 2
    z = np.array([0, -1, last - 1, -last, last, -last - 1, int(65 * step), -int(1e4 * step), 2 ** 46 - 1, -2 ** 46, 5])
    coder = full_coder(np.random.default_rng(0), 3)
    lanes, words = coder.lanes.copy(), coder.words.copy()
    assert prior.push(coder, z, noise_bits) == 6
    assert np.array_equal(prior.pop(coder, len(z), noise_bits), z)
    assert np.array_equal(coder.lanes, lanes) and np.array_equal(coder.words, words)


# ---- images

@torch.no_grad()
def stretch(jet):
    """Factors above 2 and far below 1 in the first ActNorm and dense layer, and both signs."""
    for layer in jet.actnorms[:1]:
        layer.log_scale += torch.linspace(-3, 1.5, len(layer.log_scale)).to(layer.log_scale)
    for number, layer in enumerate(jet.denses):
        layer.log_diagonal.copy_(torch.linspace(-1, 1, len(layer.sign)) * (number == 0))
        layer.sign[::3] *= -1
    return jet


@pytest.mark.parametrize("switches", [(), ("actnorm", "invertible_dense")], ids="+".join)
@pytest.mark.parametrize("mode", ["pairing", "masking"])
@pytest.mark.parametrize("block", ["vit", "cnn"])
def test_images_come_back(crops, block, mode, switches):
    jet = random_jet(std=0.05, split_mode=mode, block=block, **dict.fromkeys(switches, True))
    _, about = comes_back(stretch(jet), np.concatenate([crops[:5], random_images(1)]))
    assert about["noise"].shape == (6, 4, 4, 3)


@pytest.mark.parametrize("changes", [
    {"image_size": (8, 4), "patch_size": 2}, {"image_size": (2, 6), "patch_size": 1, "channels": 2},
    {"channels": 1}, {"num_couplings": 3, "image_size": 8}, {"scale_factor": 4.0}, {"scale_factor": 0.3}], ids=str)
def test_other_shapes_and_scales_come_back(changes):
    jet = random_jet(std=0.5, **changes)
    channels, height, width = jet.config.image_shape
    comes_back(jet, random_images(6, height, width, channels))


@pytest.mark.parametrize("n", [1, 2, 3, 70])
def test_any_number_of_images_comes_back(crops, n):
    content, about = comes_back(random_jet(), crops[:n])
    assert about["file_bits"] == 8 * len(content) and about["noise"].shape == (n, 4, 4, 3)
    assert about["coded"] == list(range(n)) and about["stored_bits"] == 0
    header, lanes, words = file_format.read_file(content)
    assert sum(header["batches"]) == n
    assert all(1 <= size <= file_format.BATCH for size in header["batches"])
    frame = 8 * (HEADER + file_format.DIGEST_BYTES) + about["header_bits"]
    assert about["file_bits"] == frame + 8 * len(pack(lanes)) + 32 * len(words)


def test_a_file_is_the_same_each_time_and_its_reading_changes_nothing(crops):
    jet, images = random_jet().float(), crops[:10].copy()
    weights = {name: tensor.clone() for name, tensor in jet.state_dict().items()}
    content, _ = encode(jet, images)
    assert encode(jet, images)[0] == content and np.array_equal(decode(jet, content), images)
    assert np.array_equal(images, crops[:10])
    now = jet.state_dict()
    assert all(torch.equal(tensor, now[name]) and tensor.dtype == now[name].dtype
               for name, tensor in weights.items())


def test_an_accelerated_jet_writes_the_same_file(crops):
    jet = random_jet(emb_dim=16, actnorm=True, invertible_dense=True).float()
    content, _ = encode(jet, crops[:10])
    fast = kernels.accelerate(copy.deepcopy(jet))
    assert encode(fast, crops[:10])[0] == content
    assert np.array_equal(decode(fast, content), crops[:10])


def test_another_layout_in_memory_changes_nothing(crops):
    jet, images = random_jet(), np.asfortranarray(crops[:10])
    assert encode(jet, images)[0] == encode(jet, crops[:10])[0]


def test_extreme_images_come_back():
    ramp = np.arange(16).reshape(4, 4, 1) * 16 + np.arange(3)
    black, white = np.zeros((4, 4, 3)), np.full((4, 4, 3), 255)
    extremes = [black, white, ramp, ramp[::-1], (ramp % 32 > 15) * 255, random_images(1)[0]]
    images = np.array(2 * extremes, np.uint8)
    for seed, std in enumerate((0.1, 0.6)):
        comes_back(random_jet(seed, std, num_couplings=4), images)


@pytest.mark.parametrize("changes", [
    {}, {"num_couplings": 6}, {"split_mode": "masking", "scale_factor": 4.0},
    {"actnorm": True}, {"invertible_dense": True}], ids=str)
def test_the_net_code_length_is_the_bound(crops, changes):
    jet = random_jet(**{"num_couplings": 3, **changes})
    content, about = encode(jet, crops)
    noise = about["noise"]
    assert about["latents_beyond"] == 0 or changes == {"invertible_dense": True}
    assert noise.dtype == np.float32 and noise.min() >= 0 and noise.max() < 1
    assert noise.min() < 0.01 and noise.max() > 0.99
    assert abs(noise.mean() - 0.5) < 0.2 and noise.std() > 0.25
    promised = bound(jet, crops, noise).mean()
    assert about["net_bits"] / crops.size == pytest.approx(promised, abs=5e-4)
    overhead = about["file_bits"] - about["net_bits"] - about["borrowed_bits"] - about["header_bits"]
    frame = 8 * (HEADER + file_format.DIGEST_BYTES)  # magic and digest; then the lanes
    lanes = len(file_format.read_file(content)[1])
    assert frame < overhead < 40 * lanes + frame


# ---- images that are stored

def test_no_image_takes_more_than_its_pixels_and_the_header(storing, crops):
    jet, rng = random_jet(std=0.03), np.random.default_rng(0)
    noise, flat = random_images(5), np.full((3, 4, 4, 3), 7, np.uint8)
    images = np.concatenate([crops[:10], noise])[rng.permutation(15)]
    for some in (crops[:1], noise[:1], noise, flat[:1], images, np.concatenate([noise[:2], crops[:10], flat])):
        content, about = comes_back(jet, some)
        header = 8 * (HEADER + file_format.DIGEST_BYTES) + about["header_bits"]
        assert 8 * len(content) - header <= 8 * some.size
        assert about["noise"].shape == (len(about["coded"]), 4, 4, 3)
        if some is not images and len(about["coded"]):
            assert about["net_bits"] <= 8 * some[about["coded"]].size
    flat = flat.repeat(2, 1).repeat(2, 2)
    assert comes_back(random_jet(image_size=8), flat)[1]["file_bits"] < 8 * flat.size  # as PNG or WebP


def test_noise_among_images_is_stored_and_they_are_not(storing, crops):
    jet = random_jet(std=0.02)
    with torch.no_grad():  # crops take less than their pixels
        for coupling in jet.couplings:
            coupling.net.final_proj.bias[6:] = 3.0
    images = crops // 4 + np.uint8(96)
    images[[50, 51, 86]] = random_images(3)
    _, about = comes_back(jet, images)
    assert about["borrowed_bits"] == 0 and 0 < about["stored_bits"]
    told = bound(jet, images[about["coded"]], about["noise"])
    assert about["net_bits"] / 48 / len(told) == pytest.approx(told.mean(), abs=2e-3)
    assert {50, 51, 86}.isdisjoint(about["coded"]) and len(about["coded"]) > 66


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (5, 7, 3), (4, 6, 2), (1, 1, 1), (2, 3, 5)])
def test_what_is_stored_comes_back(shape, monkeypatch):
    for image in (random_images(1, *shape)[0], np.full(shape, 9, np.uint8), np.zeros(shape, np.uint8)):
        for kinds in (stored.FORMATS, {}, *({kind: stored.FORMATS[kind]} for kind in stored.FORMATS)):
            with monkeypatch.context() as patch:
                patch.setattr(stored, "FORMATS", kinds)
                kind, words = stored.store(image)
                coder = Coder(np.concatenate([np.arange(5, dtype=np.uint32), words]))
                assert np.array_equal(stored.restore(coder, kind, shape), image) and coder.num_words == 5


def test_a_damaged_stored_image_is_one_line_or_other_pixels():
    for kind in stored.FORMATS:
        content = stored._compressed(random_images(1)[0], kind)
        for damaged in (content[:-20], b"", content[:20] + bytes(20) + content[40:], content[:60] + content[70:]):
            try:
                assert stored._decompressed(damaged, kind, (8, 8, 3)).shape == (8, 8, 3)
            except CodecError as error:
                assert str(error).startswith("a stored image is not one") and "\n" not in str(error)
        for wrong in (b"", bytes(99)):
            with pytest.raises(CodecError, match="a stored image is not one"):
                stored._decompressed(wrong, kind, (8, 8, 3))
        with pytest.raises(CodecError, match="a stored image is not one"):
            stored._decompressed(content, kind, (8, 16, 3))
    with pytest.raises(CodecError, match="end too early"):
        stored.restore(Coder(np.array([5, 2 ** 31], np.uint32)), stored.PNG, (8, 8, 3))


# ---- what cannot be read

@pytest.fixture(scope="module")
def jet():
    return random_jet()


@pytest.fixture(scope="module")
def tiny(jet, tmp_path_factory):
    """A checkpoint of it."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    config = {"model": vars(jet.config)}
    torch.save({"format": "jet-checkpoint-1", "config": config, "model": jet.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def content(jet, crops):
    return encode(jet, crops[:6])[0]


def refused(jet, content, message="."):
    with pytest.raises(CodecError, match=message) as error:
        decode(jet, content)
    assert "\n" not in str(error.value)


def signed(content):
    """The file's bytes with a digest that fits them."""
    content = content[:-file_format.DIGEST_BYTES]
    return content + hashlib.sha256(content).digest()


def with_header(content, **changes):
    """The file with another header, and with a digest that fits it."""
    size, = struct.unpack("<I", content[HEADER - 4:HEADER])
    header = json.loads(content[HEADER:HEADER + size])
    for name, change in changes.items():
        header[name] = change(header[name]) if callable(change) else change
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    length = struct.pack("<I", len(text))
    return signed(content[:HEADER - 4] + length + text + content[HEADER + size:])


def test_other_weights_are_refused(content):
    refused(random_jet(seed=1), content, "another weights")
    other = random_jet()
    with torch.no_grad():
        other.couplings[-1].net.final_proj.bias[0] += 1e-12
    refused(other, content, "another weights")


def test_another_config_is_refused(content):
    for changes in ({"scale_factor": 2.5}, {"norm_eps": 1e-5}, {"gelu": "exact"}, {"image_size": (16, 8)}):
        refused(random_jet(**changes), content, "another config")


def test_other_weights_under_a_header_that_fits_are_noticed(content):
    for seed in (1, 2, 3):
        other = random_jet(seed=seed)
        refused(other, with_header(content, **codec._checksums(other)))


def test_truncated_files_are_refused(jet, content):
    whole = len(content)
    for length in (1, 7, 8, 11, 16, 40, 47, 48, 49, 100, whole // 2, whole - 33, whole - 1):
        refused(jet, content[:length], "truncated|not a file")
    for more in (b"\0", b"more"):
        refused(jet, content + more, "altered")


def test_a_single_flipped_byte_is_noticed(jet, content):
    header_end = HEADER + struct.unpack("<I", content[HEADER - 4:HEADER])[0]
    places = [*range(HEADER), *range(HEADER, header_end, 23),
              *np.linspace(header_end, len(content) - 33, 12).astype(int),
              *range(len(content) - 32, len(content), 5)]
    for place in places:
        for flip in (1, 0x80):
            altered = bytearray(content)
            altered[place] ^= flip
            message = "altered"
            if place < 12:
                message = "not a file" if place < 8 else "format version"
            refused(jet, bytes(altered), message)


def test_another_version_is_refused(jet, content):
    for version in (1, 3):
        other = signed(content[:8] + struct.pack("<I", version) + content[12:])
        refused(jet, other, f"format version {version}, and this codec reads version 2: use the code that wrote it")
    refused(jet, with_header(content, bits=[8, 12, 23]), r"parameters \[8, 12, 23\]")


def test_a_header_that_was_written_again_is_none_that_lies(jet, content, crops):
    assert np.array_equal(decode(jet, with_header(content)), crops[:6])


@pytest.mark.parametrize("changes", [
    {"batches": [6]}, {"batches": [1, 1, 4]}, {"batches": [1, 1]}, {"batches": []}, {"batches": [1] * 7},
    {"batches": [0, 1, 1, 1, 1, 1]}, {"batches": [-1, 1, 1, 1, 1, 1]}, {"batches": [-2, 1, 1, 1, 1, 1]},
    {"batches": [-3, 1, 1, 1, 1, 1]}, {"batches": [1, 1, 1, 1, 1, 0]}, {"batches": [1, 1, 1, 1, 1, -2]},
    {"batches": [0] * 6}, {"batches": [-1] * 6}, {"batches": [6, -1]}, {"batches": None}, {"batches": 5},
    {"batches": "111111"}, {"words": lambda n: n - 1}, {"words": lambda n: n + 1}, {"words": lambda n: n - 2},
    {"words": lambda n: n + 2}, {"words": 0}, {"words": -1}, {"words": 1e9}, {"words": 10 ** 30}, {"words": None},
    {"words": "7"}, {"shape": [6, 4, 4]}, {"shape": [7, 4, 4, 3]}, {"shape": [6, 4, 4, 1]}, {"shape": [6, 4, 4, 6]},
    {"shape": [6, 2, 8, 3]}, {"shape": [6, 4, 4, 3.0]}, {"shape": [6, 2 ** 40, 2 ** 40, 3]}, {"shape": None},
    {"shape": {"8": 8}}, {"shape": [10 ** 15, 4, 4, 3], "batches": [10 ** 15]}, {"pixels": "0" * 64}, {"pixels": 1},
    {"weights": None}, {"config": "0" * 32}, {"bits": None}, {"ties": 3}, {"ties": [1]},
    {"ties": [[0, 0, "bias", [[10 ** 9, 1]]]]}, {"ties": [[0, 0, "bias", [["a", "b"]]]]},
    {"ties": [[0, 0, "bias", 7]]}, {"ties": [[0, 0, "scale", [[0, 10 ** 30]]]]},
    {"ties": [[0, 0, "scale", [[0, 0]]]]}, {"ties": [[0, 0, "scale", [[0, 10 ** 15]]]]},
    {"ties": [[[0], 0, "bias", []]]}], ids=" ".join)
def test_a_header_that_lies_is_noticed(jet, content, changes):
    refused(jet, with_header(content, **changes))


def test_a_body_that_lies_is_noticed(jet, content):
    header, lanes, words = file_format.read_file(content)
    body = len(content) - 32 - 4 * len(words) - len(pack(lanes))
    for size in (0, 4, 8):
        refused(jet, signed(content[:body + size] + b"\xff" * 8 + content[body + size + 8:]))
    first = len(content) - 32 - 4 * len(words)  # words that are read last: these give other pixels
    for place in [*range(first + 3, first + 9), *np.linspace(body, len(content) - 33, 8).astype(int)]:
        refused(jet, signed(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:]))


def test_what_is_no_file_of_ours_is_refused(jet, content):
    for other in (b"", b"\0", b"JET", b"JETCODEC", bytes(1000), b"\x89PNG" * 50, np.random.default_rng(0).bytes(500)):
        refused(jet, other)
    for text in (b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 10 ** 5, b"NaN"):
        refused(jet, signed(content[:HEADER - 4] + struct.pack("<I", len(text)) + text + bytes(32)))
    endless = struct.pack("<I", 2 ** 32 - 1)
    refused(jet, signed(content[:HEADER - 4] + endless + content[HEADER:]), "not a file")


@pytest.mark.parametrize("batches, says", [
    (10 ** 4, "end too early|do not fit these weights"), (4 * 10 ** 5, "12,800,000 images do not fit in this machine's"),
    (15 * 10 ** 5, "its header has 4,")])
def test_images_that_are_promised_take_no_memory(jet, content, batches, says):
    header, _, words = file_format.read_file(content)
    header |= {"shape": [32 * batches, 4, 4, 3], "batches": [32] * batches}
    lies, _ = file_format.write_file(header, np.full(32, 2 ** 40), words)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 ** 29, limits[1]))
        refused(jet, lies, says)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tiny, tmp_path, kind):
    path = tmp_path / "images.jet"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(SystemExit, match="images.jet: is no regular file"):
        codec.main(["decode", str(path), "--checkpoint", str(tiny), "--threads", "1",
                    "--out", str(tmp_path / "out.npy")])
    with pytest.raises(SystemExit, match="--threads 1000000: must be from 1 to 1024"):
        codec.main(["decode", str(path), "--checkpoint", str(tiny), "--threads", "1000000",
                    "--out", str(tmp_path / "out.npy")])


# ---- what cannot be written

@pytest.mark.parametrize("images", [
    random_images(3, channels=1), random_images(3, height=2), random_images(3).transpose(0, 3, 1, 2), random_images(0),
    random_images(3)[0], random_images(3)[None], random_images(3).astype(np.int64), random_images(3) / 255],
                         ids=lambda images: f"{images.dtype} {images.shape}")
def test_images_that_do_not_fit_are_refused(jet, images):
    with pytest.raises(CodecError, match="this Jet takes uint8") as error:
        encode(jet, images)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layer", ["couplings", "actnorms", "denses"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(crops, layer, value):
    jet = random_jet(actnorm=True, invertible_dense=True)
    with torch.no_grad():
        next(getattr(jet, layer)[1].parameters())[0] = value
    with pytest.raises(CodecError, match="not finite|overflows") as error:
        encode(jet, crops[:3])
    assert "\n" not in str(error.value)


SMALLEST = {"image_size": 2, "channels": 2, "patch_size": 1, "num_couplings": 2}


@pytest.mark.parametrize("bias, raw", [(1e9, -40), (1e11, -10), (1e13, 3), (1e16, 0), (1e300, -40)])
def test_what_overflows_is_refused_or_comes_back(bias, raw):
    jet, images = random_jet(**SMALLEST, scale_factor=4.0), random_images(2, 2, 2, 2)
    with torch.no_grad():
        jet.couplings[0].net.final_proj.bias[:] = torch.tensor([bias, raw])
    try:
        content, _ = encode(jet, images)
    except CodecError as error:
        assert "overflows" in str(error) or "not finite" in str(error)
    else:
        assert np.array_equal(decode(jet, content), images)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, weight", [("lower", 1e6), ("upper", 1e12), ("upper", 1e300)])
def test_a_dense_layer_that_overflows_is_refused_or_comes_back(name, weight):
    jet, images = random_jet(**SMALLEST, invertible_dense=True), random_images(1, 2, 2, 2)
    with torch.no_grad():
        getattr(jet.denses[-1], name).fill_(weight)
    try:
        content, about = encode(jet, images)
    except CodecError as error:
        assert "overflows" in str(error) or "not finite" in str(error)
    else:
        assert about["latents_beyond"] > 0 and np.array_equal(decode(jet, content), images)


# ---- another machine

@pytest.mark.parametrize("switches", [{}, {"actnorm": True}, {"split_mode": "masking"}], ids=str)
def test_a_rounding_that_another_machine_does_otherwise_does_not_matter(crops, monkeypatch, switches):
    jet, images, affine = random_jet(**switches), crops[:12], Coupling.affine

    def elsewhere(coupling, net_out, x2):
        bias, scale, logdet = affine(coupling, net_out, x2)
        error = 0.01 * (2 * torch.rand(2, *bias.shape, dtype=bias.dtype) - 1)  # of what is rounded
        bias = bias + error[0] * lifting.delta(lifting.NOISE_BITS)
        return bias, scale * (1 + error[1] * 2.0 ** -13), logdet

    fragile, plain = encode(jet, images)
    monkeypatch.setattr(lifting, "NEAR_TIE", 0.05)
    content, about = encode(jet, images)
    assert file_format.read_file(content)[0]["ties"] and about["ties"] > 50
    assert about["net_bits"] == plain["net_bits"]
    monkeypatch.setattr(Coupling, "affine", elsewhere)
    monkeypatch.setattr(lifting, "NEAR_TIE", 0)  # a reader has the file's word alone
    assert np.array_equal(decode(jet, content), images)
    refused(jet, fragile)


def test_float64_leaves_few_roundings_open(jet, crops):
    about = encode(jet, crops)[1]
    assert about["ties"] < 50 and about["header_bits"] < 8 * 2000


# ---- the command line

def stopped(capsys, *arguments):
    """The one line that the program ends with."""
    with pytest.raises(SystemExit) as stop:
        codec.main([*map(str, arguments), "--threads", "1"])
    code, shown = stop.value.code, capsys.readouterr().err
    line = code if isinstance(code, str) else shown.strip()
    assert code != 0 and line and "\n" not in line and "Traceback" not in shown
    return line


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "images.jet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "store", stored.store)
        patch.setattr(codec, "RAW_BITS", 8)
        codec.main(f"encode --checkpoint {RUN} --num-images 3 --threads 1 --out {path}".split())
    return path


def test_other_threads_decode(file, tmp_path, capsys):
    codec.main(["decode", str(file), "--checkpoint", str(RUN / "checkpoint.pt"), "--threads", "2",
                "--out", str(tmp_path / "images.npy")])
    assert torch.get_num_threads() == 2 and "3 images, pixels as encoded" in capsys.readouterr().out
    images = load_images("cifar10-subset", "test").array[:3]
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


def test_mistakes_on_the_command_line_end_in_one_line(file, tiny, tmp_path, capsys):
    out = tmp_path / "out.npy"
    short = shutil.copy(file, tmp_path / "short.jet")
    Path(short).write_bytes(file.read_bytes()[:-9])
    for message, *arguments in (
            (f"{file}: written with another config", "decode", file, "--checkpoint", tiny, "--out", out),
            ("No such file", "decode", tmp_path / "none.jet", "--checkpoint", tiny, "--out", out),
            ("short.jet: truncated", "decode", short, "--checkpoint", tiny, "--out", out),
            ("none.pt", "decode", file, "--checkpoint", tmp_path / "none.pt", "--out", out),
            ("there is no folder", "decode", file, "--checkpoint", tiny, "--out", tmp_path / "none" / "out.npy"),
            ("there is no folder", "encode", "--checkpoint", tiny, "--out", tmp_path / "none" / "out.jet"),
            ("--num-images 0", "encode", "--checkpoint", tiny, "--num-images", 0, "--out", out),
            ("--num-images 1000000", "encode", "--checkpoint", tiny, "--num-images", 10 ** 6, "--out", out),
            ("this Jet takes uint8", "encode", "--checkpoint", tiny, "--num-images", 2, "--out", out),
            ("nowhere", "encode", "--checkpoint", tiny, "--data", "nowhere", "--out", out)):
        assert message in stopped(capsys, *arguments)
        assert not out.exists()


def test_a_npy_file_is_encoded_and_comes_back(tiny, crops, tmp_path, capsys):
    np.save(tmp_path / "two.npy", crops[:2])
    source, out = tmp_path / "two.npy", tmp_path / "two.jet"
    codec.main(f"encode --checkpoint {tiny} --data {source} --threads 1 --out {out}".split())
    assert "bits/dim" in capsys.readouterr().out
    codec.main(f"decode {out} --checkpoint {tiny} --threads 1 --out {tmp_path / 'back.npy'}".split())
    assert np.array_equal(np.load(tmp_path / "back.npy"), crops[:2])
