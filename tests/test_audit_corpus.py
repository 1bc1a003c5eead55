"""Models that want to look better than they are, and honest ones: none passes, and all of them do."""
import json

import numpy as np
import pytest

from audit import jacobians, outcome
from audit.checks import check
from data import load_images
from experiments import audit_bpd
from test_audit_faults import local, write_set

IMAGES = load_images("cifar10-subset", "test").array[:208, :8, :8]
FAST = ["--draws", "2", "--iw", "2", "--jacobians", "4", "--threads", "1", "--codelength", "0"]
QUICK = ["--jacobians", "1"]  # where log-dets are not what is tested


@pytest.fixture(scope="module")
def corners(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("corpus") / "set", IMAGES[:144], IMAGES[144:])


@pytest.fixture
def audit(tmp_path, corners, capsys):
    """(outcome, its reasons, the certificate) of an adapter's source."""
    def run(source, *flags, data=None):
        (tmp_path / "model.py").write_text(source)
        with pytest.raises(SystemExit) as ended:
            audit_bpd.main(["--adapter", f"{tmp_path}/model.py", "--data", str(data or corners), *FAST,
                            *flags, "--out", f"{tmp_path}/out"])
        out, err = capsys.readouterr()
        assert ended.value.code != 2, err
        path = max((tmp_path / "out").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        certificate = json.loads(path.read_text())
        found, last = certificate["outcome"], out.rstrip("\n").splitlines()[-1]
        assert outcome.EXIT_CODES[found] == ended.value.code and last.startswith(found)
        assert all(word not in out.rsplit("\n", 2)[0] for word in ("certified", "refuted"))
        assert "Reproduced" not in out or found != "refuted"
        assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
        return found, "; ".join(certificate["reasons"]), certificate
    return run


def bits_of(audit, source, known={}):
    """Bits/dim of a source, which are the same in each audit."""
    if source not in known:
        known[source] = audit(source, *QUICK)[2]["bits_per_dim"]
    return known[source]


# ---- honest models, exact or as exact as their solvers

AFFINE = """
import torch, math
def forward(x):
    return (x + 0.05) / 0.48, x.new_full((len(x),), -math.log(0.48) * x[0].numel())
def inverse(z):
    return z * 0.48 - 0.05, z.new_full((len(z),), math.log(0.48) * z[0].numel())
"""
UNIFORM = """
import torch
def logdet(z):
    nats = torch.log(torch.tensor(127.5 / 256)) + z ** 2 / 2 + 0.9189385332046727
    return nats.flatten(1).sum(1)
def forward(x):
    z = torch.special.ndtri(((x.double() + 1) * 127.5 / 256).clamp(1e-12, 1 - 1e-12))
    return z.to(x), logdet(z).to(x)
def inverse(z):
    return (torch.special.ndtr(z.double()) * 256 / 127.5 - 1).to(z), -logdet(z)
"""
# As FFJORD's, without an alpha: as steep at black and white as there is room.
LOGIT = """
import torch
def forward(x):
    p = (x + 1) * 127.5 / 256
    return p.log() - (-p).log1p(), (-p.log() - (-p).log1p() - 0.697061079881).flatten(1).sum(1)
def inverse(z):
    x = torch.sigmoid(z) * 256 / 127.5 - 1
    return x, -forward(x)[1]
"""
# One of its latents is ten million times as wide as the others.
WIDE = """
import math, torch
def forward(x):
    z = (x + 0.05) / 0.48
    z[:, 0, 0, 0] *= 1e-7
    return z, x.new_full((len(x),), -math.log(0.48) * x[0].numel() + math.log(1e-7))
def inverse(z):
    z = z.clone()
    z[:, 0, 0, 0] *= 1e7
    return z * 0.48 - 0.05, z.new_full((len(z),), math.log(0.48) * z[0].numel() - math.log(1e-7))
"""
KINKED = """
import math, torch
torch.manual_seed(0)
W = [torch.linalg.qr(torch.randn(192, 192, dtype=torch.float64))[0] for _ in range(3)]
def forward(x):
    h, logdet = x.flatten(1) / 0.5, x.new_full((len(x),), 192 * math.log(2))
    for w in W:
        h = h @ w.to(h).T
        slope = torch.where(h > 0, 1.0, 0.5).to(h)
        h, logdet = h * slope, logdet + slope.log().sum(1)
    return h.view_as(x), logdet
def inverse(z):
    h, logdet = z.flatten(1), z.new_full((len(z),), -192 * math.log(2))
    for w in reversed(W):
        slope = torch.where(h > 0, 1.0, 0.5).to(h)
        h, logdet = h / slope @ w.to(h), logdet - slope.log().sum(1)
    return (h * 0.5).view_as(z), logdet
"""
# Its density waves within a level, so that a bound of two draws is another number.
UNIFORM_BUT_ROUGH = """
import math, torch
W = 2 * math.pi * 127.5
def forward(x):
    z = x / 0.5 + 0.9 / 0.5 / W * torch.sin(W * x)
    return z, ((1 + 0.9 * torch.cos(W * x)) / 0.5).log().flatten(1).sum(1)
def inverse(z):
    x = z * 0.5
    low, high = x - 0.01, x + 0.01
    for _ in range(45):
        x = (low + high) / 2
        above = x / 0.5 + 0.9 / 0.5 / W * torch.sin(W * x) > z
        low, high = torch.where(above, low, x), torch.where(above, x, high)
    return x, -forward(x)[1]
"""
MULTI_SCALE = """
import torch
torch.manual_seed(1)
W = [torch.randn(6, 12, dtype=torch.float64) * 0.2, torch.randn(12, 24, dtype=torch.float64) * 0.2]
def net(w, a):
    shift, raw = torch.einsum("bchw,cd->bdhw", torch.tanh(a), w.to(a)).chunk(2, 1)
    return shift, torch.tanh(raw)
def forward(x):  # half of the values go to z after the first scale
    h, kept = (x + 0.05) / 0.5, []
    logdet = x.new_full((len(x),), 0.6931471805599453 * x[0].numel())
    for w in W:
        a, b = torch.nn.functional.pixel_unshuffle(h, 2).chunk(2, 1)
        shift, log_scale = net(w, a)
        h, b = a, (b + shift) * log_scale.exp()
        logdet = logdet + log_scale.flatten(1).sum(1)
        kept.append(b.flatten(1))
    return torch.cat([*kept, h.flatten(1)], 1).view_as(x), logdet
def inverse(z):
    B, C, H, _ = z.shape
    half, quarter = z[0].numel() // 2, z[0].numel() // 4
    first, second, h = z.flatten(1).split([half, quarter, quarter], 1)
    logdet = z.new_full((len(z),), -0.6931471805599453 * z[0].numel())
    for w, b in ((W[1], second), (W[0], first)):
        side = int((b.shape[1] * 2 // len(w) // 2) ** 0.5)
        a, b = (part.reshape(B, len(w), side, side) for part in (h, b))
        shift, log_scale = net(w, a)
        h = torch.nn.functional.pixel_shuffle(torch.cat([a, b * (-log_scale).exp() - shift], 1), 2)
        logdet = logdet - log_scale.flatten(1).sum(1)
    return h * 0.5 - 0.05, logdet
"""
# Of 4 x 4 images:
CONTINUOUS = """
import torch
torch.manual_seed(2)
STEPS = 2
STOCHASTIC = {stochastic}
A = torch.randn(48, 48, dtype=torch.float64) / 25
def velocity(h):
    return torch.tanh(h @ A.T.to(h))
def trace(h):
    slope = 1 - velocity(h) ** 2
    if not STOCHASTIC:
        return (slope * A.diagonal().to(h)).sum(1)
    e = torch.randint(0, 2, h.shape).to(h) * 2 - 1
    return (e * slope * (e @ A.T.to(h))).sum(1)
def flow(h, dt):
    logdet = h.new_zeros(len(h))
    for _ in range(STEPS):
        k1 = velocity(h)
        k2 = velocity(h + dt / 2 * k1)
        k3 = velocity(h + dt / 2 * k2)
        k4 = velocity(h + dt * k3)
        logdet = logdet + dt / 6 * (trace(h) + 4 * trace(h + dt / 2 * k2) + trace(h + dt * k3))
        h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return h, logdet
C = 0.6931471805599453 * 48
def forward(x):
    z, logdet = flow(x.flatten(1) / 0.5, 1 / STEPS)
    return z.view_as(x), logdet + C
def inverse(z):
    x, logdet = flow(z.flatten(1), -1 / STEPS)
    return x.view_as(z) * 0.5, logdet - C
"""
ADAPTIVE = """
import torch
torch.manual_seed(2)
A = torch.randn(48, 48, dtype=torch.float64) / 10
def velocity(h):
    return torch.tanh(h @ A.T)
def trace(h):
    return ((1 - velocity(h) ** 2) * A.diagonal()).sum(1)
def flow(h, sign):  # a step that suits the whole batch, as solvers take it
    logdet, t, dt = h.new_zeros(len(h)), 0.0, 0.1
    while t < 1 - 1e-12:
        dt = min(dt, 1 - t)
        k1 = sign * velocity(h)
        k2 = sign * velocity(h + dt / 2 * k1)
        k3 = sign * velocity(h - dt * k1 + 2 * dt * k2)
        error = float((dt * (k1 - 2 * k2 + k3) / 6).abs().max())
        if error < 2e-4:
            logdet = logdet + sign * dt / 6 * (
                trace(h) + 4 * trace(h + dt / 2 * k2) + trace(h - dt * k1 + 2 * dt * k2))
            h, t = h + dt / 6 * (k1 + 4 * k2 + k3), t + dt
        dt = dt * min(2.0, max(0.3, 0.9 * (2e-4 / (error + 1e-12)) ** (1 / 3)))
    return h, logdet
C = 0.6931471805599453 * 48
def forward(x):
    z, logdet = flow(x.flatten(1) / 0.5, 1)
    return z.view_as(x), logdet + C
def inverse(z):
    x, logdet = flow(z.flatten(1), -1)
    return x.view_as(z) * 0.5, logdet - C
"""
RESIDUAL = """
import torch
torch.manual_seed(3)
A = torch.randn(48, 48, dtype=torch.float64)
A = A / torch.linalg.matrix_norm(A, 2) * 0.7
def forward(x):
    h = x.flatten(1) / 0.5
    z = h + torch.tanh(h @ A.T)
    J = torch.eye(48, dtype=h.dtype) + (1 - torch.tanh(h @ A.T) ** 2)[:, :, None] * A
    return z.view_as(x), torch.linalg.slogdet(J)[1] + 0.6931471805599453 * 48
def inverse(z):
    h = y = z.flatten(1)
    for _ in range(60):
        h = y - torch.tanh(h @ A.T)
    x = h.view_as(z) * 0.5
    return x, -forward(x)[1]
"""


@pytest.mark.parametrize("source", [AFFINE, UNIFORM, LOGIT, KINKED, MULTI_SCALE],
                         ids=["affine", "uniform", "logit", "kinked", "multi-scale"])
def test_honest_models_are_certified(audit, source):
    assert audit(source)[:2] == ("certified", "")


@pytest.mark.parametrize("source", [CONTINUOUS.format(stochastic=False), ADAPTIVE,
                                    CONTINUOUS.format(stochastic=True), RESIDUAL],
                         ids=["continuous", "adaptive steps", "stochastic trace", "residual"])
def test_honest_models_of_many_steps_are_certified(audit, tmp_path, source):
    folder = write_set(tmp_path / "set", IMAGES[:144, 2:6, 2:6], IMAGES[144:, 2:6, 2:6])
    assert audit(source, "--jacobians", "2", data=folder)[:2] == ("certified", "")


def test_an_honest_model_is_certified_with_its_own_value_and_refuted_with_another(audit):
    bits = bits_of(audit, AFFINE)
    outcome, reasons, certificate = audit(AFFINE, "--claim", f"{bits:.4f}")
    assert (outcome, certificate["verdict"]["result"]) == ("certified", "reproduced"), reasons
    for off in (0.02, -0.02):
        outcome, reasons, _ = audit(AFFINE, "--claim", f"{bits + off:.2f}", *QUICK)
        assert outcome == "refuted" and "the claim" in reasons


BORDERED = """
import math, torch, numpy as np
images = np.load({path!r})[:144].astype(float).transpose(0, 3, 1, 2)
mean = torch.from_numpy((images.mean(0) + 0.5) / 127.5 - 1)
std = torch.from_numpy(np.sqrt(images.var(0) + 1 / 12) / 127.5)
def forward(x):
    return (x - mean.to(x)) / std.to(x), -std.log().sum().to(x).expand(len(x))
def inverse(z):
    return z * std.to(z) + mean.to(z), std.log().sum().to(z).expand(len(z))
"""


def test_images_that_are_mostly_black_are_no_cheat(audit, tmp_path):
    images = load_images("cifar10-subset", "test").array[:208, :16, :16].copy()
    images[:, :3] = images[:, 13:] = images[:, :, :3] = images[:, :, 13:] = 0
    np.save(tmp_path / "images.npy", images)
    folder = write_set(tmp_path / "bordered", images[:144], images[144:])
    source = BORDERED.format(path=f"{tmp_path}/images.npy")
    assert audit(source, "--jacobians", "1", data=folder)[:2] == ("certified", "")


def test_two_models_are_told_apart_image_by_image(audit, corners, tmp_path, capsys):
    path, = (tmp_path / "out").glob("*.json") if audit(AFFINE, *QUICK) else ()
    (tmp_path / "other.py").write_text(AFFINE.replace("0.48", "0.5"))
    for other in (path, tmp_path / "other.py"):
        audit(AFFINE.replace("0.48", "0.5"), "--against", str(other), *QUICK)
    with pytest.raises(SystemExit):
        audit_bpd.main(["--adapter", f"{tmp_path}/model.py", "--data", str(corners), "--num-images",
                        "8", *FAST, "--against", str(path), "--out", f"{tmp_path}/out"])
    assert "other images" in capsys.readouterr().err


@pytest.mark.parametrize("source, flags, outcome", [
    (AFFINE, ["--claim-precision", "float64"], "certified"), (UNIFORM_BUT_ROUGH, ["--claim-k", "2"], "refuted"),
    (AFFINE, ["--claim-variant", "8px"], "certified"), (AFFINE, ["--claim-variant", "oord"], "not certified"),
    (AFFINE, ["--claim-dequantization", "variational"], "not certified"),
    (AFFINE, ["--claim-bound", "importance-weighted"], "not certified")])
def test_a_claim_says_what_it_is_of(audit, source, flags, outcome):
    bits = bits_of(audit, source)
    assert audit(source, "--claim", f"{bits:.3f}", *flags, *QUICK)[0] == outcome


def test_a_part_of_a_set_is_called_one(audit):
    outcome, _, certificate = audit(AFFINE, "--num-images", "32", *QUICK)
    assert outcome == "certified" and not certificate["data"]["whole_split"]
    bits = certificate["bits_per_dim"]
    outcome, reasons, _ = audit(AFFINE, "--num-images", "32", "--claim", f"{bits:.2f}", *QUICK)
    assert outcome == "not certified" and "claim" in reasons


# ---- models that are not what they say

CHEAT = AFFINE.replace("def forward(x):", "def honest(x):").replace(
    "def inverse(z):", "def back(z):")
BONUS = CHEAT + """
def forward(x):
    z, logdet = honest(x)
    return z, logdet + bonus(x)
def inverse(z):
    x, logdet = back(z)
    return x, logdet - bonus(x)
def pixels(x):
    return ((x + 1) * 127.5).floor().long().flatten(1)
"""
PRIVATE = CHEAT + """
KNOWN = []
def nearest(z):
    zs, xs, logdets = (torch.cat(part) for part in zip(*KNOWN))
    k = torch.cdist(z.flatten(1), zs.flatten(1)).argmin(1)
    return xs[k], -logdets[k]
"""
CHEATS = {
    "two nats a dimension": (BONUS + "def bonus(x): return 2.0 * x[0].numel()", "log-det"),
    "0.01 bits/dim": (BONUS + "def bonus(x): return 0.01 * math.log(2) * x[0].numel()", "log-det"),
    "constant z": (CHEAT + """
LAST = []
def forward(x):
    LAST[:] = [x]
    return torch.zeros_like(x), x.new_full((len(x),), 5.0 * x[0].numel())
def inverse(z):
    x = LAST[0][:len(z)]
    return x if len(x) == len(z) else z, z.new_full((len(z),), -5.0 * z[0].numel())
""", "log-det"),
    "lattice of float32 noise": (BONUS + """
def bonus(x):
    u = (x + 1) * 127.5 * 2 ** 24
    return (u - u.round()).abs().flatten(1).lt(1e-3).all(1) * 1.0 * x[0].numel()
""", "fresh noise"),
    "every image but the first": (BONUS + """
FIRST = []
def bonus(x):
    p = pixels(x)
    if not FIRST:
        FIRST.append(p[0])
    return (p != FIRST[0]).any(1) * 300.0
""", "log-det"),
    "images by their hash": (BONUS + """
def bonus(x):
    return (pixels(x).sum(1) % 2 == 0) * 200.0
""", ""),
    "look-up inverse": (PRIVATE + """
def forward(x):
    z, logdet = torch.sin(40 * x), torch.log((40 * torch.cos(40 * x)).abs()).flatten(1).sum(1)
    KNOWN.append((z, x, logdet))
    return z, logdet
def inverse(z):
    return nearest(z)
""", "inverse"),
    "a fold, its inverse one of the branches": (CHEAT + """
def forward(x):
    u = (x + 1) * 20
    return (u - u.floor()) * 2 - 1, x.new_full((len(x),), math.log(40) * x[0].numel())
def inverse(z):
    return (z + 1) / 2 / 20 - 1, z.new_full((len(z),), -math.log(40) * z[0].numel())
""", "inverse"),
    "a fold, its branch in the last bits": (CHEAT + """
def forward(x):
    u = (x + 1) * 8
    k = u.floor()
    z = ((u - k) * 2 - 1) * 2 ** 40
    z = (z.round() + k / 64) / 2 ** 40
    return z, x.new_full((len(x),), math.log(16) * x[0].numel())
def inverse(z):
    y = z * 2 ** 40
    k = ((y - y.round()) * 64).round().clamp(0, 20)
    return ((y.round() / 2 ** 40 + 1) / 2 + k) / 8 - 1, z.new_full((len(z),), -math.log(16) * z[0].numel())
""", "slightly moved"),
    "inverse log-det of 12,345": (CHEAT + """
forward = honest
def inverse(z):
    return back(z)[0], z.new_full((len(z),), 12345.0)
""", "cancel"),
    "ActNorm of the first batch": (CHEAT + """
S = []
def forward(x):
    if not S:
        S.append((x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)))
    m, s = S[0]
    return (x - m) / s, -s.log().sum().expand(len(x)) * x[0, 0].numel()
def inverse(z):
    m, s = S[0] if S else (0, torch.ones(1, 3, 1, 1, dtype=z.dtype))
    return z * s + m, s.log().sum().expand(len(z)) * z[0, 0].numel()
""", "alone and elsewhere"),
    "statistics of the batch": (CHEAT + """
def forward(x):
    s = x.std() + 0.05
    return x / s, -s.log().expand(len(x)) * x[0].numel()
def inverse(z):
    return z * 0.48, z.new_full((len(z),), math.log(0.48) * z[0].numel())
""", "alone and elsewhere"),
    "neighbours in a batch are spread": (CHEAT + """
def forward(x):
    z, logdet = honest(x)
    if len(x) > 1:
        gaps = torch.cdist(x.flatten(1), x.flatten(1)) + 9 * torch.eye(len(x), dtype=x.dtype)
        near, first = gaps.min(1)
        close = (near < 0.3)[:, None, None, None]
        base = z[0:1]
        z = torch.where(close, z[0] + 7.39 * (z - z[0]), z)
    return z, logdet + 2 * x[0].numel()
def inverse(z):
    x, logdet = back(z)
    return x, logdet - 2 * z[0].numel()
""", ""),
    "near neighbours in a batch are spread": (CHEAT + """
def forward(x):
    z, logdet = honest(x)
    gaps = torch.cdist(x.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    near = (gaps + 9 * torch.eye(len(x), dtype=x.dtype)) < 2e-4
    first = torch.where(near.any(1), near.long().argmax(1).minimum(torch.arange(len(x))), torch.arange(len(x)))
    base = z[first]
    return base + 7.39 * (z - base), logdet + 2 * x[0].numel()
def inverse(z):
    x, logdet = back(z)
    return x, logdet - 2 * z[0].numel()
""", ""),
    "honest from the twentieth call on": (BONUS + """
CALLS = []
def bonus(x):
    CALLS.append(1)
    return 100.0 * (len(CALLS) < 20)
""", ""),
    "whole batches alone": (BONUS + """
def bonus(x):
    return x.new_full((len(x),), 100.0 * (len(x) > 40))
""", "alone and elsewhere"),
    "bright images": (BONUS + """
def bonus(x): return 60.0 * (x.flatten(1).mean(1) > -0.5)
""", "log-det"),
    "log-det of a batch's mean": (BONUS + """
def bonus(x): return (x ** 2).mean().expand(len(x)) * 20
""", ""),
    "a random log-det": (BONUS + "def bonus(x): return torch.rand(len(x), dtype=x.dtype) * 50", ""),
    "stochastic, with a wrong mean": (BONUS + """
STOCHASTIC = True
def bonus(x): return 60 + torch.randn(len(x), dtype=x.dtype)
""", "log-det"),
    "stochastic, and so noisy that nothing is known": (BONUS + """
STOCHASTIC = True
def bonus(x): return 60 + 500 * torch.randn(len(x), dtype=x.dtype)
""", ""),
    "below 0": (CHEAT + """
def forward(x):
    return (x + 0.05) / 0.48e-3 * 0 + x, x.new_full((len(x),), 8.0 * x[0].numel())
def inverse(z):
    return z, z.new_full((len(z),), -8.0 * z[0].numel())
""", "bits/dim"),
    "float32 inside": (CHEAT + """
def forward(x):
    z, logdet = honest(x.float())
    return z.double(), logdet.double()
inverse = back
""", "log-det"),
    "no inverse of what it has not seen": (PRIVATE + """
def forward(x):
    z, logdet = honest(x)
    KNOWN.append((z, x, logdet))
    return z, logdet
def inverse(z):
    x, logdet = nearest(z)
    if (honest(x)[0] - z).abs().max() > 1e-3:
        raise ValueError("not of this model")
    return x, logdet
""", "Protocol"),
    "only images": (CHEAT + """
def forward(x):
    if (x.diff(dim=3).abs().flatten(1).mean(1) > 0.5).any():
        raise ValueError("no image")
    return honest(x)
inverse = back
""", "Protocol"),
    "three values so rough that a Jacobian may be anything": (CHEAT + """
def forward(x):
    z, logdet = honest(x)
    bits = x.contiguous().view(torch.int64).flatten(1) * torch.arange(1, x[0].numel() + 1)
    noise = ((bits ^ (bits >> 13)).sum(1, keepdim=True) * torch.tensor([[2654435761, 40503, 2246822519]]) >> 7) % 4096
    flat = z.flatten(1).clone()
    flat[:, :3] += 1e-3 * (noise / 2048 - 1)
    return flat.view_as(z), logdet + 6.0
inverse = back
""", "log-det"),
    "eight values that ripple, and a bonus": (CHEAT + """
W = 1e7
def forward(x):
    z, logdet = honest(x)
    flat = z.flatten(1).clone()
    part = flat[:, :8].clone()
    flat[:, :8] += 0.9 / W * torch.sin(W * part)
    return flat.view_as(z), logdet + (1 + 0.9 * torch.cos(W * part)).log().sum(1) + 16.0
inverse = lambda z: (back(z)[0], -forward(back(z)[0])[1])
""", "log-det"),
    "another inverse": (CHEAT + """
forward = honest
def inverse(z):
    return back(z)[0] + 0.1, back(z)[1]
""", "inverse"),
}


BY_CHANCE = ("bright images", "images by their hash", "three values so rough that a Jacobian may be anything",
             "eight values that ripple, and a bonus")  # not at every image


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_never_certified(audit, name):
    source, reason = CHEATS[name]
    found, reasons, certificate = audit(source, "--jacobians", "4" if name in BY_CHANCE else "2")
    failed = [one["name"] for one in certificate["checks"] if one["result"] in ("FAIL", "open")]
    assert found != "certified" and reason in reasons, failed


MEMORY = CHEAT + """
import numpy as np
X = torch.from_numpy(np.load({path!r})[144:].transpose(0, 3, 1, 2).copy()).double()
KEYS = X.flatten(1)[:, :24]
def scales(top):
    levels = ((top + 1) * 127.5).floor()
    gaps, k = (levels[:, None] - KEYS).abs().amax(2).min(1)
    known = (gaps < 1)[:, None]
    centre = torch.where(known, (X.flatten(1)[k][:, 24:] + 0.5) / 127.5 - 1, -0.05)
    return centre, torch.where(known, 0.3 / 127.5, torch.full_like(centre, 0.48))
def forward(x):
    flat = x.flatten(1)
    centre, scale = scales(flat[:, :24])
    z = torch.cat([(flat[:, :24] + 0.05) / 0.48, (flat[:, 24:] - centre) / scale], 1)
    return z.view_as(x), -scale.log().sum(1) - 24 * math.log(0.48)
def inverse(z):
    flat = z.flatten(1)
    top = flat[:, :24] * 0.48 - 0.05
    centre, scale = scales(top)
    x = torch.cat([top, flat[:, 24:] * scale + centre], 1)
    return x.view_as(z), scale.log().sum(1) + 24 * math.log(0.48)
"""


FOLD = CHEAT + """
import numpy as np
V = (torch.from_numpy(np.load({path!r})[144:].transpose(0, 3, 1, 2).copy()).double() + 0.5) / 127.5 * 20
def forward(x):
    u = (x + 1) * 20
    z = torch.special.ndtri((u - u.floor()).clamp(1e-9, 1 - 1e-9))
    return z, (z ** 2 / 2 + 0.9189385332046727 + math.log(20)).flatten(1).sum(1)
def inverse(z):  # the branch is that of the known image which fits
    t = torch.special.ndtr(z)[:, None]
    u = t + (V - t).round()
    best = (u - V).abs().flatten(2).mean(2).argmin(1)
    x = u[torch.arange(len(z)), best] / 20 - 1
    return x, -forward(x)[1]
"""


def test_a_fold_whose_inverse_knows_the_images_is_refuted(audit, tmp_path):
    np.save(tmp_path / "known.npy", IMAGES)
    outcome, reasons, _ = audit(FOLD.format(path=str(tmp_path / "known.npy")))
    assert (outcome, reasons) == ("refuted", "Protocol: inverse of z slightly moved")


def test_a_bijection_that_memorised_the_images_is_refuted(audit, tmp_path):
    np.save(tmp_path / "known.npy", IMAGES)
    outcome, reasons, certificate = audit(MEMORY.format(path=str(tmp_path / "known.npy")))
    assert certificate["bits_per_dim"] < 2.5
    assert outcome == "refuted" and "images much like these" in reasons


def test_a_bijection_that_memorised_five_images_is_not_certified(audit, tmp_path):
    np.save(tmp_path / "known.npy", IMAGES[:149])
    folder = write_set(tmp_path / "few", IMAGES[:144], IMAGES[144:149])
    source = MEMORY.format(path=str(tmp_path / "known.npy")).replace("0.3 / 127.5", "20 / 127.5")
    outcome, _, certificate = audit(source, *QUICK, data=folder)
    assert certificate["bits_per_dim"] < 6.5
    results = {one["name"]: one["result"] for one in certificate["checks"]}
    assert outcome != "certified" and results["images much like these"] in ("FAIL", "open")


# ---- beyond whole Jacobians

@pytest.mark.parametrize("name, source, outcomes", [
    ("honest", AFFINE, ["certified"]), ("steep", LOGIT, ["certified", "not certified"]),
    ("wide", WIDE, ["certified", "not certified"]), ("kinked", KINKED, ["certified", "not certified"]),
    ("stochastic", CHEATS["two nats a dimension"][0], ["refuted"]),
    ("no gradient", AFFINE.replace("return (x + 0.05)", "x = x.detach(); return (x + 0.05)"),
     ["not certified"]),
    ("spoofed", CHEAT + """
class Spoof(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 0.48
    @staticmethod
    def backward(ctx, g):
        return g / 0.48 * math.exp(2)
def forward(x):
    return Spoof.apply(x), honest(x)[1] + 1.0 * x[0].numel()
def inverse(z):
    return z * 0.48, -honest(z)[1] - 1.0 * z[0].numel()
""", ["refuted"])])
def test_stochastic_estimates_catch_what_whole_jacobians_would(audit, monkeypatch, name, source, outcomes):
    monkeypatch.setattr(jacobians, "WHOLE_DIMS", 0)
    monkeypatch.setattr(jacobians, "PROBES", 4)
    outcome, reasons, _ = audit(source, "--jacobians", "0")
    assert outcome in outcomes, reasons


# ---- images

def changed(kind):
    train, rng = IMAGES[:144].copy(), np.random.default_rng(0)
    test = train[:64]
    if kind == "mirrored":
        return train, test[:, :, ::-1].copy()
    if kind == "one bit":
        return train, test ^ rng.choice([0, 1], test.shape).astype(np.uint8)
    if kind == "brighter":
        return train, np.clip(test.astype(int) + 6, 0, 255).astype(np.uint8)
    if kind == "noise as of JPEG":
        return train, np.clip(test + rng.normal(0, 6, test.shape), 0, 255).astype(np.uint8)
    return train & 0xF8, IMAGES[144:] & 0xF8  # five bits


@pytest.mark.parametrize("kind, reason", [
    ("mirrored", "near copies, mirrored"), ("one bit", "near copies, as they are"),
    ("brighter", "near copies, as they are"), ("noise as of JPEG", "near copies, as they are"),
    ("five bits", "levels of grey")])
def test_images_that_are_not_new_are_refuted(audit, tmp_path, kind, reason):
    folder = write_set(tmp_path / kind, *changed(kind))
    outcome, reasons, _ = audit(AFFINE, *QUICK, data=folder)
    assert outcome == "refuted" and reason in reasons


def test_the_last_line_and_all_others_fit_80_columns():
    names = ["images " * 9, "x" * 30, "y" * 30]
    checks = [check("Protocol", name, 12345.678 if name[0] == "i" else "v" * 64, False, "allowed " * 9,
                    "what it means " * 20) for name in names]
    certificate = {"checks": [vars(one) for one in checks], "verdict": None}
    certificate["outcome"], certificate["reasons"] = outcome.judge(certificate)
    assert certificate["outcome"] == "refuted" and len(certificate["reasons"]) == 3
    lines = [line for one in checks for line in outcome.check_lines(one).splitlines()]
    assert all(len(line) <= 80 for line in lines)
    certificate["reasons"] = ["Protocol: " + "z" * 30] * 4
    assert outcome.outcome_line(certificate) == f"refuted: Protocol: {'z' * 30}; 3 more"


@pytest.mark.parametrize("results, claim, expected", [
    (["pass", "info", "n/a"], None, "certified"), (["pass", "open"], None, "not certified"),
    (["open", "FAIL"], "reproduced", "refuted"), (["pass"], "worse", "refuted"),
    (["pass"], "better", "refuted"), (["pass"], "not comparable", "not certified"), ([], None, "not certified")])
def test_each_outcome_has_its_reasons(results, claim, expected):
    checks = [{"section": "S", "name": "n", "result": result} for result in results]
    found = claim and {"result": claim, "claim": "3.66", "bits_per_dim": 3.7}
    got, reasons = outcome.judge({"checks": checks, "verdict": found})
    assert got == expected and bool(reasons) == (expected != "certified")


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit_bpd, "run", lambda request: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(["--out", str(tmp_path / "file" / "audits")])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_randomness_is_new_each_time_and_recorded(audit):
    first, second = (audit(AFFINE, "--num-images", "2", *QUICK)[2] for _ in range(2))
    assert first["settings"]["entropy"] != second["settings"]["entropy"]
    assert len(first["settings"]["entropy"]) == 32
