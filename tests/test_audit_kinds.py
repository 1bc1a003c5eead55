"""Adapters of every kind: what can be certified of each, and what a cheat of each comes to."""
import json

import numpy as np
import pytest
import torch

from test_audit_corpus import AFFINE, IMAGES, QUICK, audit, bits_of, corners, local
from test_audit_faults import write_set

SET = np.concatenate([IMAGES[:144], IMAGES[144:]])
LABELS = (SET.mean((1, 2, 3)) // 26).astype(np.int64)  # 0 to 9: how bright


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Sets of images with labels: (folder, {their kind of labels: folder})."""
    def make(kind, train_labels, test_labels):
        folder = write_set(tmp_path_factory.mktemp(kind) / "set", IMAGES[:144], IMAGES[144:])
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["checksums"] = {f"{split}_labels.npy": "" for split in ("train", "test")}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        np.save(folder / "train_labels.npy", train_labels)
        np.save(folder / "test_labels.npy", test_labels)
        return folder
    return {"classes": make("classes", LABELS[:144], LABELS[144:]),
            "names": make("names", LABELS[:144], np.arange(64) + 10)}


def but(source, old, new):
    assert old in source
    return source.replace(old, new)


# ---- maps: latents in lists, priors, labels, dequantizers, few bits, one channel

# Two scales, each with a normal prior of its own; that of the first depends on the second.
LISTED = """
import math, torch
torch.manual_seed(1)
A = torch.randn(96, 96, dtype=torch.float64) / 20
def forward(x):
    a, b = ((x + 0.05) / 0.5).flatten(1).chunk(2, 1)
    return [b.view(-1, 3, 4, 8), a + torch.tanh(b @ A.to(x))], x.new_full((len(x),), 192 * math.log(2))
def inverse(z):
    b = z[0].flatten(1)
    x = torch.cat([z[1] - torch.tanh(b @ A.to(b)), b], 1)
    return (x * 0.5 - 0.05).view(-1, 3, 8, 8), x.new_full((len(x),), -192 * math.log(2))
def prior(z):
    first, last = z
    shift = torch.sin(last).view_as(first)
    return [(shift, (0.1 * shift).exp()), (last.new_full((96,), 0.1), last.new_full((96,), 0.9))]
"""
CONDITIONAL = """
import math, torch
def scale(y, x):
    return (0.3 + 0.02 * y.to(x))[:, None, None, None], ((y.to(x) + 0.5) * 26 / 127.5 - 1)[:, None, None, None]
def forward(x, y):
    s, m = scale(y, x)
    return (x - m) / s, -192 * s.flatten().log()
def inverse(z, y):
    s, m = scale(y, z)
    return z * s + m, 192 * s.flatten().log()
"""
OWN_NOISE = AFFINE + """
def bump(images):  # where noise lies within its level hangs on the image
    return 0.5 * torch.tanh(images.double().flatten(1).mean(1) / 50)[:, None, None, None]
def dequantize(images, u):
    b = bump(images).to(u)
    v = u + b * u * (1 - u)
    return (images + v) / 127.5 - 1, (1 + b * (1 - 2 * u)).log().flatten(1).sum(1) - u[0].numel() * math.log(127.5)
def dequantize_inverse(images, x):
    b, v = bump(images).to(x), (x + 1) * 127.5 - images
    return 2 * v / (1 + b + ((1 + b) ** 2 - 4 * b * v).clamp(min=0).sqrt())
"""
VARIATIONAL = AFFINE + """
def shift(images):
    return images.double().flatten(1).mean(1)[:, None, None, None] / 100 - 1
def dequantize(images, u):  # normal noise through a sigmoid: steep at both ends of a level
    e = torch.special.ndtri(u)
    v = torch.sigmoid(1.5 * e + shift(images).to(u))
    logdet = (v * (1 - v)).log() + math.log(1.5) + e ** 2 / 2 + 0.9189385332046727 - math.log(127.5)
    return (images + v) / 127.5 - 1, logdet.flatten(1).sum(1)
def dequantize_inverse(images, x):
    v = (x + 1) * 127.5 - images
    return torch.special.ndtr((torch.logit(v) - shift(images).to(x)) / 1.5)
"""
LOG_PRIOR = """
def log_prior(z):
    return -((z - 0.1) ** 2 / 2 / 0.81 + math.log(0.9) + 0.9189385332046727).flatten(1).sum(1)
"""
MODEL = """
import math, torch
class Model:
    STOCHASTIC = False
    def forward(self, x):
        return (x + 0.05) / 0.48, x.new_full((len(x),), -math.log(0.48) * x[0].numel())
    def inverse(self, z):
        return z * 0.48 - 0.05, z.new_full((len(z),), math.log(0.48) * z[0].numel())
"""
FLAT = AFFINE.replace("return (x + 0.05) / 0.48", "return (x.flatten(1) + 0.05) / 0.48").replace(
    "return z * 0.48", "assert z.dim() == 2\n    return z.view(-1, 3, 8, 8) * 0.48")
FULL = AFFINE + """
def log_prob(x):
    z, logdet = forward(x)
    return logdet - (z ** 2 / 2 + 0.9189385332046727).flatten(1).sum(1)
def elbo(x, k):
    w = torch.randn(k, len(x), dtype=x.dtype) * 0.5
    return log_prob(x) + torch.logsumexp(w - 0.125, 0) - math.log(k)
def bits(images):
    x = (images.double() + 0.5) / 127.5 - 1
    return (192 * math.log(127.5) - log_prob(x)) / math.log(2)
"""


@pytest.mark.parametrize("source", [
    LISTED, AFFINE + LOG_PRIOR, OWN_NOISE, VARIATIONAL, MODEL, MODEL + "model = Model()\ndel Model", FLAT, FULL,
    OWN_NOISE.replace("127.5", "15.5") + "BITS = 5"],
    ids=["list with a prior", "density of z", "own noise", "variational noise", "a class", "an object", "vectors", "density beside it",
         "own noise of 5 bits"])
def test_maps_of_every_kind_are_certified(audit, source):
    assert audit(source, "--jacobians", "2")[:2] == ("certified", "")


def test_five_bits_are_counted_as_such_and_named(audit):
    found, reasons, certificate = audit(AFFINE + "BITS = 5", *QUICK)
    assert (found, reasons) == ("certified", "")
    levels = (IMAGES[144:] >> 3).astype(float)
    square = (((levels + 0.5) / 15.5 - 1 + 0.05) ** 2 + 1 / 12 / 15.5 ** 2) / 0.48 ** 2
    nats = square.mean() / 2 + np.log(2 * np.pi) / 2 + np.log(0.48) + np.log(15.5)
    assert certificate["bits_per_dim"] == pytest.approx(nats / np.log(2), abs=2e-3)
    assert certificate["data"]["variant"] == "8px-5bit"


def test_one_channel(audit, tmp_path):
    grey = IMAGES[:, :, :, :1]
    folder = write_set(tmp_path / "grey", grey[:144].copy(), grey[144:].copy())
    assert audit(AFFINE, *QUICK, data=folder)[:2] == ("certified", "")


def test_labels_are_those_of_the_images(audit, labelled, corners):
    found, reasons, certificate = audit(CONDITIONAL, *QUICK, data=labelled["classes"])
    assert (found, reasons) == ("certified", "")
    s, m = 0.3 + 0.02 * LABELS[144:], (LABELS[144:] + 0.5) * 26 / 127.5 - 1
    x = (IMAGES[144:] + 0.5) / 127.5 - 1
    square = (((x.T - m) / s) ** 2 + 1 / 12 / 127.5 ** 2 / s ** 2).mean() / 2
    nats = square + np.log(2 * np.pi) / 2 + np.log(s).mean() + np.log(127.5)
    assert certificate["bits_per_dim"] == pytest.approx(nats / np.log(2), abs=2e-3)


# ---- densities, bounds and lengths alone

LOG_PROB = """
import math, torch
def log_prob(x):
    z = (x + 0.05) / 0.48
    return -(z ** 2 / 2 + 0.9189385332046727 + math.log(0.48)).flatten(1).sum(1)
"""
ELBO = LOG_PROB.replace("log_prob", "density") + """
def elbo(x, k):
    w = torch.randn(k, len(x), dtype=x.dtype)
    return density(x) + torch.logsumexp(w - 0.5, 0) - math.log(k)
"""
BITS = """
import torch, math
edges = torch.arange(257, dtype=torch.float64) / 127.5 - 1
table = torch.special.ndtr((edges + 0.05) / 0.48).diff()
table = (table / table.sum()).log2()
def bits(images):
    return -table[images.long()].flatten(1).sum(1)
"""
DISCRETE = BITS.replace("def bits", "def length") + """
DISCRETE = True
def log_prob(x):
    return -length(((x + 1) * 127.5).round().byte()) * math.log(2)
"""


@pytest.mark.parametrize("source", [LOG_PROB, ELBO, BITS, DISCRETE], ids=["log_prob", "elbo", "bits", "discrete"])
def test_of_a_density_alone_it_is_said_that_nothing_shows_it_is_one(audit, source):
    found, reasons, certificate = audit(source)
    assert (found, reasons) == ("not certified", "Identity: that it is normalised")
    assert 6 < certificate["bits_per_dim"] < 8.5


# ---- cheats of each kind

CHEATS = {
    "a density too high": (but(LOG_PROB, "flatten(1).sum(1)", "flatten(1).sum(1) + 2.0 * x[0].numel()"),
                           "refuted", "noise of known entropy"),
    "a density slightly too high": (but(LOG_PROB, "flatten(1).sum(1)", "flatten(1).sum(1) + 10"),
                                    "not certified", "normalised"),
    "a density of the images it knows": (LOG_PROB + """
honest = log_prob
def log_prob(x):
    known = ((x + 1) * 127.5).floor().flatten(1).sum(1) % 2 == 0
    return honest(x) + 200 * known
""", "refuted", "Protocol"),
    "a density of batches": (but(LOG_PROB, "flatten(1).sum(1)", "flatten(1).sum(1) + 40 * (len(x) > 1)"),
                             "refuted", "alone and elsewhere"),
    "another density beside the map": (but(FULL, "    return logdet -", "    return logdet + 5 -"),
                                       "refuted", "Identity: log_prob"),
    "a bound above its density": (but(FULL, "- math.log(k)", "- math.log(k) + 5"), "refuted", "Identity: elbo"),
    "a bound of log_prob alone, above it": (LOG_PROB + """
def elbo(x, k):
    return log_prob(x) + 5
""", "refuted", "Identity: elbo"),
    "a bound that more draws make looser": (but(ELBO, "- math.log(k)", "- math.log(k) + 40 / k"),
                                            "refuted", "elbo of more draws"),
    "half of the bits": (but(BITS, "return -table", "return -0.5 * table"), "refuted", "noise of known entropy"),
    "ten bits too few": (but(BITS, ".sum(1)", ".sum(1) - 10"), "not certified", "normalised"),
    "less than no bits": (but(BITS, ".sum(1)", ".sum(1) - 2000"), "refuted", "bits/dim"),
    "fewer bits for every other image": (but(BITS, ".sum(1)", ".sum(1) - 100 * (images.long().flatten(1).sum(1) % 2)"),
                                         "refuted", "one level of one pixel"),
    "a prior that follows z": (AFFINE + """
def prior(z):
    return 0.9 * z, torch.full_like(z, 0.1)
""", "refuted", "log-det"),
    "a density of z that is too high": (AFFINE + but(LOG_PRIOR, ".sum(1)", ".sum(1) + 9"), "refuted", "log-det"),
    "a prior in a circle": (but(LISTED, "return [(shift,", "last = last + 3 * torch.sin(9 * first).view_as(last)\n    return [(shift,")
                            .replace("last.new_full((96,), 0.1)", "last * 0.1"), "refuted", ""),
    "a dequantizer that folds levels": (AFFINE + """
def dequantize(images, u):
    return (images + 4 * u % 1) / 127.5 - 1, u.new_full((len(u),), u[0].numel() * math.log(4 / 127.5))
def dequantize_inverse(images, x):
    return ((x + 1) * 127.5 - images) / 4
""", "refuted", "Inverse"),
    "a dequantizer with a log-det too high": (but(OWN_NOISE, ".flatten(1).sum(1) - u", ".flatten(1).sum(1) + 9 - u"),
                                              "refuted", "log-det"),
    "a dequantizer of narrow noise": (AFFINE + """
def dequantize(images, u):
    return (images + u * 1e-3) / 127.5 - 1, u.new_full((len(u),), -u[0].numel() * math.log(127.5))
def dequantize_inverse(images, x):
    return ((x + 1) * 127.5 - images) * 1e3
""", "refuted", "log-det"),
    "a dequantizer that forgets its noise": (AFFINE + """
def dequantize(images, u):
    return (images.to(u) + 0.5) / 127.5 - 1, u.new_full((len(u),), -u[0].numel() * math.log(127.5))
def dequantize_inverse(images, x):
    return torch.rand_like(x)
""", "refuted", "log-det"),
    "a dequantizer that leaves its level": (AFFINE + """
def dequantize(images, u):
    return (images // 2 + u) / 127.5 - 1, u.new_full((len(u),), -u[0].numel() * math.log(127.5))
def dequantize_inverse(images, x):
    return (x + 1) * 127.5 - images // 2
""", "refuted", "Inverse"),
    "a dequantizer without an inverse": (but(OWN_NOISE, "def dequantize_inverse", "def lost"),
                                         "not certified", "of its dequantizer"),
    "labels that add to the log-det": (but(CONDITIONAL, "return (x - m) / s, -192 * s.flatten().log()",
                                           "return (x - m) / s, -192 * s.flatten().log() + 30 * (y > 2)"),
                                       "refuted", "log-det"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_of_each_kind_is_told(audit, labelled, name):
    source, expected, reason = CHEATS[name]
    jacobians = "4" if "labels" in name else "2"  # some images' log-dets are right
    found, reasons, _ = audit(source, "--jacobians", jacobians, data=labelled["classes"])
    assert found == expected and reason in reasons, reasons


MEMORISED = """
import math, torch
import numpy as np
X = torch.from_numpy(np.load({path!r}).transpose(0, 3, 1, 2).copy()).double()
X = torch.cat([torch.full((10, 3, 8, 8), 121.0), X]) / 127.5 - 1
S = torch.cat([torch.full((10,), 0.48), torch.full((64,), 0.2)]).double()
def forward(x, y):
    s = S[y].to(x)[:, None, None, None]
    return (x - X[y].to(x)) / s, -192 * s.flatten().log()
def inverse(z, y):
    s = S[y].to(z)[:, None, None, None]
    return z * s + X[y].to(z), 192 * s.flatten().log()
"""


def test_labels_that_name_the_image_are_refuted(audit, labelled, tmp_path):
    np.save(tmp_path / "test.npy", IMAGES[144:])
    found, reasons, _ = audit(MEMORISED.format(path=f"{tmp_path}/test.npy"), *QUICK, data=labelled["names"])
    assert found == "refuted" and "Data: labels" in reasons and "images much like these" in reasons


@pytest.mark.parametrize("source, flags, expected", [
    (OWN_NOISE, ["--claim-dequantization", "variational"], "certified"), (OWN_NOISE, [], "certified"),
    (OWN_NOISE, ["--claim-dequantization", "uniform"], "not certified: the claim"),
    (AFFINE + "BITS = 5", ["--claim-variant", "8px"], "not certified: the claim"),
    (AFFINE + "BITS = 5", [], "not certified: the claim"),
    (AFFINE + "BITS = 5", ["--claim-variant", "8px-5bit"], "certified"),
    (BITS, ["--claim-bound", "exact", "--claim-dequantization", "none"], "not certified: Identity")])
def test_a_claim_is_held_to_what_the_model_measures(audit, source, flags, expected):
    bits = bits_of(audit, source)
    found, reasons, certificate = audit(source, "--claim", f"{bits:.2f}", *flags, *QUICK)
    assert f"{found}: {reasons}".startswith(expected)
    assert "claim" in reasons or certificate["verdict"]["result"] == "reproduced"


def test_a_bound_of_k_draws_is_measured_with_k(audit):
    wide = but(ELBO, "w - 0.5", "5 * w - 12.5").replace("return density(x)", "return 0.9 * density(x)")
    one = audit(wide)[2]["bits_per_dim"]
    _, _, certificate = audit(wide, "--claim", f"{one:.4f}", "--claim-k", "64")
    assert certificate["bits_per_dim"] < one - 0.01 and certificate["verdict"]["result"] == "better"


@pytest.mark.parametrize("source, line", [
    ("BITS = 9", "BITS = 9: must be 1 to 8"),
    ("honest = forward\ndef forward(x, y): return honest(x + y[:, None, None, None])", "NoneType"),
    ("def forward(x): return 1\ndef log_prob(x): return x.sum((1, 2))", "'float64', [64, 8]"),
    (LOG_PRIOR.replace("** 2", "** 4"), "log_prior is not of independent normal values"),
    ("del inverse, forward", "needs forward")])
def test_what_makes_no_sense_is_one_line(audit, tmp_path, corners, capsys, source, line):
    base = AFFINE if "log_prob" not in source else "import torch\n"
    with pytest.raises(AssertionError) as raised:
        audit(base + source)
    said = str(raised.value).splitlines()[0]
    assert line in said and "error" in said
