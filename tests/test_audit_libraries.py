"""Models of normflows, zuko and nflows, trained a little, are certified as they come.

They are installed in an environment of CI's own (.ci/run); elsewhere these tests are skipped.
"""
import json

import numpy as np
import pytest
import torch

from data import load_images
from experiments import audit_bpd
from test_audit_faults import write_set

LOAD = """
from pathlib import Path
weights = Path(__file__).with_name("weights.pt")
if weights.exists():
    model.load_state_dict(torch.load(weights))
    model.double().eval()
"""
GLOW = """
import normflows as nf
import torch

CLASSES, CHANNELS, SIDE, LEVELS = 10, 1, 28, 2
q0, flows, merges = [], [], []
for i in range(LEVELS):
    last = LEVELS - i
    flows.append([nf.flows.GlowBlock(CHANNELS * 2 ** (last + 1), 16) for _ in range(2)] + [nf.flows.Squeeze()])
    merges += [nf.flows.Merge()] if i else []
    channels = CHANNELS * 2 ** (last if i else last + 1)
    q0.append(nf.distributions.ClassCondDiagGaussian((channels, SIDE // 2 ** last, SIDE // 2 ** last), CLASSES))
model = nf.MultiscaleFlow(q0, flows, merges)
""" + LOAD + """
def forward(x, y):
    return model.inverse_and_log_det(x)  # a list of z, one of each scale

def inverse(z, y):
    return model.forward_and_log_det(z)

def prior(z, y):  # one mean and deviation of each class
    return [(q.loc[..., y].movedim(-1, 0), q.log_scale[..., y].movedim(-1, 0).exp()) for q in model.q0]

def log_prob(x, y):
    return model.log_prob(x, y)
"""
ZUKO = """
import torch, zuko
model = {model}
""" + LOAD + """
def scale(x):
    return x[0].numel() * 0.6931471805599453

def forward(x):
    z, logdet = model().transform.call_and_ladj(x.flatten(1) * 2)
    return z, logdet + scale(x)

def inverse(z):
    x, logdet = model().transform.inv.call_and_ladj(z)
    return x / 2, logdet - scale(x)

def log_prob(x):
    return model().log_prob(x.flatten(1) * 2) + scale(x)
"""
NFLOWS = """
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet
from nflows.transforms import (
    ActNorm, AffineCouplingTransform, CompositeTransform, MultiscaleCompositeTransform, RandomPermutation,
    SqueezeTransform)

def step(channels):
    mask = torch.arange(channels) % 2
    net = lambda inputs, outputs: ConvResidualNet(inputs, outputs, hidden_channels=16, num_blocks=1)
    return [ActNorm(channels), RandomPermutation(channels, dim=1), AffineCouplingTransform(mask, net)]

torch.manual_seed(0)
scales, shape = MultiscaleCompositeTransform(2), (1, 28, 28)
for _ in range(2):
    c, h, w = shape
    layers = [SqueezeTransform(), *step(4 * c), *step(4 * c)]
    shape = scales.add_transform(CompositeTransform(layers), (4 * c, h // 2, w // 2))
model = Flow(scales, StandardNormal([784]))
""" + LOAD + """
def forward(x):
    return model._transform(x)

def inverse(z):
    return model._transform.inverse(z)

def log_prob(x):
    return model.log_prob(x)
"""
REALNVP = ZUKO.format(model="zuko.flows.RealNVP(784, transforms=3, hidden_features=(32, 32))")
CNF = ZUKO.format(model="zuko.flows.CNF(64, hidden_features=(16, 16))")


@pytest.fixture
def grey(tmp_path):
    """Sets of grey images with labels: their folder by their side."""
    def make(side):
        parts, start = [], (32 - side) // 2
        for split, count in (("train", 256), ("test", 96)):
            images = load_images("cifar10-subset", split).first(count)
            array = np.asarray(images.array).mean(3, keepdims=True).round().astype(np.uint8)
            parts.append((array[:, start:start + side, start:start + side].copy(), images.labels))
        folder = write_set(tmp_path / f"grey{side}", parts[0][0], parts[1][0], f"grey{side}", "grey")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["checksums"] = {f"{split}_labels.npy": "" for split in ("train", "test")}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        for split, (_, labels) in zip(("train", "test"), parts):
            np.save(folder / f"{split}_labels.npy", labels.astype(np.int64))
        return folder
    return make


def train(path, images, steps):
    """Train the model of an adapter a little; its weights stand beside it."""
    space = {"__file__": str(path)}
    torch.manual_seed(0)
    exec(compile(path.read_text(), str(path), "exec"), space)
    model, rng = space["model"].train(), np.random.default_rng(0)
    labels, optimizer = torch.as_tensor(images.labels), torch.optim.Adam(model.parameters(), 2e-3)

    def loss_of(chosen):
        pixels = images.array[chosen].transpose(0, 3, 1, 2)
        x = torch.from_numpy((pixels + rng.random(pixels.shape)) / 127.5 - 1).float()
        return -space["log_prob"](x, *([labels[chosen]] if space.get("CLASSES") else [])).mean()

    first = loss_of(range(32)).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(rng.integers(len(images.array), size=32)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
    assert loss_of(range(32)).item() < first
    torch.save(model.state_dict(), path.with_name("weights.pt"))


@pytest.mark.parametrize("library, source, side, steps", [
    ("normflows", GLOW, 28, 40), ("zuko", REALNVP, 28, 40), ("zuko", CNF, 8, 12), ("nflows", NFLOWS, 28, 40)],
    ids=["normflows: multi-scale Glow", "zuko: RealNVP", "zuko: CNF", "nflows: two scales"])
def test_a_model_of_a_library_is_certified(grey, tmp_path, capsys, library, source, side, steps):
    pytest.importorskip(library)
    folder, path = grey(side), tmp_path / "model.py"
    path.write_text(source)
    train(path, load_images(folder, "train"), steps)
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(["--adapter", str(path), "--data", str(folder), "--draws", "2", "--iw", "2", "--jacobians", "2",
                        "--threads", "1", "--out", f"{tmp_path}/out"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and out.endswith("\ncertified\n"), [
        line for line in (out + err).splitlines() if line[:4] in ("FAIL", "open", "audi", "not ", "refu")]
    certificate = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    files = [one["path"].rpartition("/")[2] for one in certificate["weights"]["files"]]
    assert "weights.pt" in files and 4 < certificate["bits_per_dim"] < 12
