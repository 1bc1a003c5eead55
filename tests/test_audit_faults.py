"""An audit passes what is sound, and each fault is caught by the check that is there for it."""
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import evaluate
import jet as jet_module
import kernels
from audit import adapters, estimate, protocol, worker
from audit.claims import Claim, verdict
from audit.images import check_data
from convert import load_jet
from data import ImageSet, evaluation_noise, fingerprint, load_images
from experiments import audit_bpd
from harness.checkpoint import weights_checksum
from jet import Coupling, Jet, JetConfig
from tests import forked

IMAGES = load_images("cifar10-subset", "test").array[:144, :8, :8]
SUPPORTS, WORKER = kernels.supports, adapters.Worker
FAST = ["--codelength", "0", "--draws", "2", "--iw", "2", "--jacobians", "1", "--threads", "1"]
made_once = functools.cache(evaluation_noise)


class LocalWorker:
    """What a Worker answers, without its process."""

    def __init__(self, path, threads, limit):
        self.path, self.files, self.seconds, self.limit = path, {}, 0.0, limit
        space = {"__name__": "adapter", "__file__": str(path)}
        exec(compile(open(path).read(), str(path), "exec"), space)
        self.model = worker.Model(space)
        self.about = self.model.about()

    def call(self, name, *arrays, **how):
        kind, shape = str(arrays[0].dtype)[6:], list(arrays[0].shape)
        wanted = [[kind, shape], [kind, shape[:1]]][:1 if name == "vjp" else 2]
        head = {"name": name, "wanted": wanted, "shape": tuple(arrays[0].shape), "dtype": str(arrays[0].dtype)[6:],
                "bfloat16": False, **how}
        content = [array.contiguous().numpy() for array in arrays]
        try:
            body, parts = worker.run(self.model, head, content)
        except Exception as error:
            raise adapters.AuditError(f"{name} failed ({error})") from None
        if parts != wanted:
            raise adapters.AuditError(f"{name} returned {parts}")
        sizes = [math.prod(shape) for _, shape in parts]
        values = torch.from_numpy(np.frombuffer(body, kind).copy()).split(sizes)
        return [part.view(shape) for part, (_, shape) in zip(values, parts)]


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setattr(adapters, "Worker", LocalWorker)
    for module in (evaluate, estimate, protocol):  # many audits are of the same images
        monkeypatch.setattr(module, "evaluation_noise", lambda indices, *key: made_once(tuple(indices), *key).clone())


@pytest.fixture(autouse=True, scope="module")
def plain():
    # Faults are planted in the Python path.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "supports", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared set of 8 x 8 images, cut from real ones: 96 to train, 48 to test."""
    return write_set(tmp_path_factory.mktemp("corners") / "set", IMAGES[:96], IMAGES[96:])


def write_set(path, train_images, test_images, name="corners", variant="8px"):
    path.mkdir()
    prints = {}
    for split, array in (("train", train_images), ("test", test_images)):
        np.save(path / f"{split}.npy", array)
        prints[split] = fingerprint(np.ascontiguousarray(array))
    manifest = {"name": name, "variant": variant, "fingerprints": prints}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def make_run(path, folder, emb_dim=8, **recorded):
    """A run folder with random weights: a coupling of each kind."""
    torch.manual_seed(0)
    config = JetConfig(image_size=8, patch_size=4, num_couplings=2, kinds=("channels", "spatial"),
                       block_depth=1, emb_dim=emb_dim, num_heads=2)
    model = Jet(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path.mkdir()
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(config)},
                "model": model.state_dict()}, path / "checkpoint.pt")
    images = load_images(folder, "test")
    measured = evaluate.evaluate(model, images)
    row = {"step": 1, "split": "test", **measured}
    done = {"config": {}, "rows": [row], **measured, "num_params": 1, "train_seconds": 1.0,
            "hardware": "none", "device": "cpu",
            "git_commit": "", "dataset": images.name, "variant": images.variant,
            "train_fingerprint": load_images(folder, "train").fingerprint,
            "test_fingerprint": images.fingerprint, "weights_sha256": weights_checksum(model),
            **recorded}
    (path / "done.json").write_text(json.dumps(done))
    return path


@pytest.fixture(scope="module")
def run(plain, tmp_path_factory, folder):
    return make_run(tmp_path_factory.mktemp("sound") / "run", folder)


def audit(tmp_path, *arguments):
    """(exit code, the certificate) of the command line."""
    out = tmp_path / "audits"
    for old in out.glob("*.json"):
        old.unlink()
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main([*map(str, arguments), *FAST, "--out", str(out)])
    files = list(out.glob("*.json"))
    return ended.value.code, json.loads(files[0].read_text()) if files else None


def failed(certificate):
    return {f"{one['section']}: {one['name']}" for one in certificate["checks"]
            if one["result"] == "FAIL"}


def test_sound_model_passes_every_check(tmp_path, run, folder):
    code, certificate = audit(tmp_path, "--checkpoint", run, "--data", folder)
    assert (code, failed(certificate)) == (0, set())
    results = [one["result"] for one in certificate["checks"]]
    assert results.count("pass") > 30
    csv = next((tmp_path / "audits").glob("*.csv")).read_text().splitlines()
    values = [float(line.split(",")[1]) for line in csv[1:]]
    assert len(values) == 48
    assert np.mean(values) == pytest.approx(certificate["bits_per_dim"], abs=1e-12)


def test_accelerated_model_passes_every_check(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(kernels, "supports", SUPPORTS)
    monkeypatch.setattr(adapters, "load_jet", lambda path: kernels.accelerate(load_jet(path)))
    run = make_run(tmp_path / "run", folder, emb_dim=16)
    code, certificate = audit(tmp_path, "--checkpoint", run, "--data", folder)
    assert (code, failed(certificate)) == (0, set())
    worst = next(one for one in certificate["checks"] if one["name"] == "float32: worst coupling")
    assert worst["text"].startswith("Coupling ")


def wrong_sign(monkeypatch):
    forward = Jet.forward
    monkeypatch.setattr(Jet, "forward", lambda self, x: (forward(self, x)[0], -forward(self, x)[1]))


def coupling_left_out(monkeypatch):
    forward = Jet.forward

    def wrong(self, x):
        z, logdet = forward(self, x)
        return z, logdet - self.couplings[0](self.patchify(x))[1]
    monkeypatch.setattr(Jet, "forward", wrong)


def unseen_scale(monkeypatch):
    forward = Coupling.forward

    def wrong(self, x):
        z, logdet = forward(self, x)
        moved = self.order.chunk(2)[1]
        return z.index_copy(self.axis, moved, 1.01 * z.index_select(self.axis, moved)), logdet
    monkeypatch.setattr(Coupling, "forward", wrong)


def wrong_permutation(monkeypatch):
    forward = Coupling.forward

    def wrong(self, x):
        z, logdet = forward(self, x)
        return z.roll(1, 2), logdet
    monkeypatch.setattr(Coupling, "forward", wrong)


def wrong_permutation_both_ways(monkeypatch):
    forward, inverse = Coupling.forward, Coupling.inverse
    monkeypatch.setattr(Coupling, "forward", lambda self, x: forward(self, x.flip(2)))

    def wrong_inverse(self, z):
        x, logdet = inverse(self, z)
        return x.flip(2), logdet
    monkeypatch.setattr(Coupling, "inverse", wrong_inverse)


def bfloat16_affine(monkeypatch):
    affine = Coupling.affine

    def wrong(self, *arguments):
        bias, scale, logdet = affine(self, *arguments)
        if torch.is_autocast_enabled("cpu"):
            bias, scale = bias.bfloat16().to(bias.dtype), scale.bfloat16().to(scale.dtype)
        return bias, scale, logdet
    monkeypatch.setattr(Coupling, "affine", wrong)


def constant_left_out(monkeypatch):
    right = jet_module.bits_per_dim
    monkeypatch.setattr(evaluate, "bits_per_dim",
                        lambda z, logdet: right(z, logdet) - math.log2(127.5))


def divided_by_pixels(monkeypatch):
    right = jet_module.bits_per_dim
    monkeypatch.setattr(evaluate, "bits_per_dim", lambda z, logdet: 3 * right(z, logdet))


def wide_noise(monkeypatch):
    def wrong(pixels, noise):
        return pixels.to(noise.dtype) / 127.5 - 1 + 2 * noise / 127.5
    monkeypatch.setattr(evaluate, "dequantize", wrong)


def wide_noise_at_its_source(monkeypatch):
    for module in (evaluate, estimate):
        noise = module.evaluation_noise
        monkeypatch.setattr(module, "evaluation_noise", lambda *key, noise=noise: 2 * noise(*key))


def batch_dropped(monkeypatch):
    whole = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda model, images, **more: whole(
        model, images.array[:32], **more))


def images_doubled_in_the_mean(monkeypatch):
    whole = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda model, images, **more: whole(
        model, np.concatenate([images.array] * 2), **more))


@pytest.mark.parametrize("fault, caught_by", [
    (wrong_sign, {"Identity: log-det, whole images"}),
    (coupling_left_out, {"Identity: log-det, whole images", "Identity: sum over couplings"}),
    (unseen_scale, {"Identity: log-det by coupling", "Identity: log-det, whole images"}),
    (wrong_permutation, {"Inverse: float64: worst coupling"}),
    (wrong_permutation_both_ways, {"Estimate: as recorded by its run"}),
    (bfloat16_affine, {"Inverse: bfloat16: log-det against scales"}),
    (constant_left_out, {"Estimate: sum of its terms"}),
    (divided_by_pixels, {"Estimate: sum of its terms"}), (wide_noise, {"Estimate: levels of grey"}),
    (wide_noise_at_its_source, {"Estimate: noise"}), (batch_dropped, {"Estimate: every image once"}),
    (images_doubled_in_the_mean, {"Estimate: every image once"})])
def test_fault_in_the_code_is_caught_by_its_check(tmp_path, run, folder, monkeypatch, fault,
                                                  caught_by):
    fault(monkeypatch)
    monkeypatch.setattr(protocol, "IMAGES", 4)  # for none is caught there
    code, certificate = audit(tmp_path, "--checkpoint", run, "--data", folder)
    assert code == 1 and caught_by <= set(failed(certificate))


def test_altered_weights_are_told_from_those_that_were_trained(tmp_path, run, folder):
    altered = shutil.copytree(run, tmp_path / "altered")
    content = torch.load(altered / "checkpoint.pt", weights_only=True)
    content["model"]["couplings.1.net.final_proj.bias"][0] += 1e-6
    torch.save(content, altered / "checkpoint.pt")
    assert "Data: weights" in failed(audit(tmp_path, "--checkpoint", altered, "--data", folder)[1])


@pytest.mark.parametrize("train_images, test_images, caught_by", [
    (IMAGES[:96], np.concatenate([IMAGES[96:120]] * 2), "Data: repeated images"),
    (IMAGES[:96], np.concatenate([IMAGES[96:], IMAGES[:1]]), "Data: images of both splits")])
def test_fault_in_the_images_is_caught(tmp_path, train_images, test_images, caught_by):
    folder, model = write_set(tmp_path / "bad", train_images, test_images), adapter(tmp_path, UNIFORM)
    assert caught_by in failed(audit(tmp_path, "--adapter", model, "--data", folder)[1])


def test_training_images_of_a_known_set_are_recognised():
    images = load_images("cifar10-subset", "train")
    path_like = ImageSet(array=images.array, labels=None, name="photos.npy", variant="unknown",
                         split="test")
    checks = {one.name: one for one in check_data(path_like, None, None, np.random.default_rng(0))}
    assert checks["fingerprint"].result == "FAIL"
    assert "cifar10-subset train" in checks["fingerprint"].text


def test_other_variant_than_the_one_trained_on_is_told(tmp_path, folder):
    run = make_run(tmp_path / "oord", folder, dataset="imagenet64-oord", variant="oord")
    other = write_set(tmp_path / "other", IMAGES[:96], IMAGES[96:], "imagenet64-chrabaszcz",
                      "chrabaszcz")
    code, certificate = audit(tmp_path, "--checkpoint", run, "--data", other, "--claim", "3.66",
                              "--claim-data", "imagenet64-oord")
    assert "Data: what it was trained on" in failed(certificate)
    assert certificate["verdict"]["result"] == "not comparable"
    assert "other variant" in certificate["verdict"]["sentence"]


# ---- certificates

@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", "[" * 10 ** 5,
                                  '{"format": "jet-audit-1", "sha256": 3}'])
def test_what_is_no_certificate_is_refused_in_one_line(tmp_path, text, capsys):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(["--check", str(tmp_path / "c.json")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "error:" in said and said.count("\n") == 1


# ---- known answers

UNIFORM = """
import torch
def logdet(z):
    nats = torch.log(torch.tensor(127.5 / 256)) + z ** 2 / 2 + 0.9189385332046727
    return nats.flatten(1).sum(1)
def forward(x):
    x64 = ((x.double() + 1) * 127.5 / 256).clamp(1e-9, 1 - 1e-9)
    z = torch.special.ndtri(x64)
    return z.to(x), logdet(z).to(x)
def inverse(z):
    x = torch.special.ndtr(z.double()) * 256 / 127.5 - 1
    return x.to(z), -logdet(z)
"""
GAUSSIAN = """
def forward(x):
    return (x - 0.1) / 0.5, x.new_full((len(x),), {sign}0.6931471805599453 * x[0].numel())
def inverse(z):
    return z * 0.5 + {back}, z.new_full((len(z),), -0.6931471805599453 * z[0].numel())
"""


def adapter(tmp_path, source):
    (tmp_path / "adapter.py").write_text(source)
    return tmp_path / "adapter.py"


def test_uniform_density_has_eight_bits(tmp_path, folder):
    _, certificate = audit(tmp_path, "--adapter", adapter(tmp_path, UNIFORM), "--data", folder)
    assert certificate["bits_per_dim"] == pytest.approx(8, abs=1e-5)
    sound = {"Identity: log-det, whole images", "Estimate: sum of its terms"}
    assert not failed(certificate) & sound


def test_gaussian_has_its_closed_form(tmp_path, folder):
    source = GAUSSIAN.format(sign="", back="0.1")
    code, certificate = audit(tmp_path, "--adapter", adapter(tmp_path, source), "--data", folder)
    pixels = IMAGES[96:].astype(float)
    square = ((pixels + 0.5) / 127.5 - 1 - 0.1) ** 2 + 1 / 12 / 127.5 ** 2  # mean over the noise
    nats = square.mean() / 0.25 / 2 + math.log(2 * math.pi * 0.25) / 2 + math.log(127.5)
    expected = nats / math.log(2)
    assert code == 0 and certificate["bits_per_dim"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("sign, back, caught_by", [("-", "0.1", "Identity: log-det, whole images"),
                                                   ("", "0.2", "Inverse: float64: largest error")])
def test_faults_of_an_adapter_are_caught(tmp_path, folder, sign, back, caught_by):
    source = GAUSSIAN.format(sign=sign, back=back)
    _, certificate = audit(tmp_path, "--adapter", adapter(tmp_path, source), "--data", folder)
    assert caught_by in failed(certificate)


@pytest.mark.parametrize("source, message", [
    ("def forward(x): return x, x.sum((1, 2, 3))", "inverse"), ("1 / 0", "ZeroDivision"),
    ("def forward(x): return x\ndef inverse(z): return z", "forward"),
    ("def forward(x): return x, x\ndef inverse(z): return z, z", "must return")])
def test_unfit_adapters_are_refused_in_one_line(tmp_path, folder, source, message, capsys, monkeypatch):
    monkeypatch.setattr(adapters, "Worker", WORKER)
    monkeypatch.setattr(adapters, "subprocess", forked.SUBPROCESS)
    code, _ = audit(tmp_path, "--adapter", adapter(tmp_path, source), "--data", folder)
    said = capsys.readouterr().err.rstrip("\n")
    assert code == 2 and "error" in said and message in said and "\n" not in said


def discrete_truth(model, pixels, grid=32):
    """-log2 p of pixel pairs (n, 2), per dimension: the density integrated over each level."""
    steps = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    noise = torch.cartesian_prod(steps, steps)
    x = -1 + (torch.as_tensor(pixels, dtype=torch.float64)[:, None] + noise) / 127.5
    z, logdet = model(x.reshape(-1, 2, 1, 1))
    bits = jet_module.bits_per_dim(z, logdet).reshape(len(pixels), -1)
    return -(torch.logsumexp(-2 * math.log(2) * bits, 1) - math.log(grid ** 2)) / 2 / math.log(2)


class TwoPixels(torch.nn.Module):
    """A density of two pixels, correlated, bent, and not much wider than a grey level."""

    def forward(self, x):
        one = x[:, :1] * 127.5 / 1.2
        two = (x[:, 1:] * 127.5 - one - torch.sin(one)) / 0.7
        logdet = math.log(127.5 / 1.2) + math.log(127.5 / 0.7)
        return torch.cat([one, two], 1), x.new_full((len(x),), logdet)


def test_importance_weighted_bound_falls_to_the_truth():
    images = np.random.default_rng(0).integers(125, 131, (12, 1, 1, 2)).astype(np.uint8)
    truth = discrete_truth(TwoPixels(), images.reshape(-1, 2)).numpy()
    bits = estimate.bits_table(TwoPixels(), images, 0, 1024)["bits"]
    gaps = [(estimate.importance_weighted(bits, K, 2) - truth).mean() for K in (1, 4, 32, 1024)]
    assert gaps[0] > 1 > gaps[1] > gaps[2] > gaps[3] and abs(gaps[3]) < 0.02


def test_probabilities_of_all_images_add_up_to_one_at_most():
    levels = torch.arange(116, 140)  # the density is 0 elsewhere, to 1e-15
    pairs = torch.cartesian_prod(levels, levels)
    total = torch.exp2(-2 * discrete_truth(TwoPixels(), pairs)).sum().item()
    assert 1 - 1e-6 < total <= 1 + 1e-6
    few = torch.arange(127, 130)
    pairs = torch.cartesian_prod(few, few)
    assert torch.exp2(-2 * discrete_truth(TwoPixels(), pairs)).sum().item() < 0.99


def test_importance_weights_do_not_underflow():
    bits = np.full((4, 3), 50.0)
    assert np.array_equal(estimate.importance_weighted(bits, 4, 10 ** 6), bits[0])


# ---- verdicts

def judge(text, value=3.7, noise=0.01, name="cifar10", split="test", whole=True, channels=3, **claim):
    images = ImageSet(array=np.zeros((10, 1, 1, channels), np.uint8), labels=None, name=name,
                      variant=name.split("-")[-1], split=split)
    rows = {name: np.full((2, 10), level)
            for name, level in (("bits", value), ("logdet", 0.5), ("square", 0.5))}
    # Two draws whose difference makes an error of noise for both sides together.
    rows["bits"] = value + np.array([[1] * 10, [-1] * 10]) * noise * math.sqrt(10) / 2
    measured = {"ours": {"bits_per_dim": value, "bits_per_dim_se": 1.0}, "rows": rows, "draws": 1,
                "dims": 1,
                "float32": {"bits_per_dim": rows["bits"][0].mean(), "num_images": 10},
                "bfloat16": {"bits_per_dim": rows["bits"][0].mean() + 0.2, "num_images": 10}}
    return verdict(Claim(text=text, **claim), images, whole, measured)


@pytest.mark.parametrize("text, interval", [
    ("3.66", (3.655, 3.665)), ("3.660", (3.6595, 3.6605)), ("4", (3.5, 4.5)),
    ("3.7", (3.65, 3.75))])
def test_claim_is_what_its_digits_allow(text, interval):
    assert Claim(text=text).interval == pytest.approx(interval)


@pytest.mark.parametrize("text, result, errors", [
    ("3.70", "reproduced", 0), ("3.72", "reproduced", 1.5), ("3.67", "worse", 2.5),
    ("3.73", "better", 2.5), ("4", "reproduced", 0)])
def test_verdict_counts_standard_errors(text, result, errors):
    found = judge(text)
    assert found["result"] == result and found["standard_errors"] == pytest.approx(errors, abs=1e-6)


def test_a_claim_in_bfloat16_is_held_to_what_is_measured_in_it():
    assert judge("3.90", precision="bfloat16", noise=0)["result"] == "reproduced"
    assert judge("3.90", noise=0)["result"] == "better"


@pytest.mark.parametrize("settings, reason", [
    ({"name": "imagenet64-chrabaszcz", "dataset": "imagenet64-oord", "variant": "oord"},
     "other variant"),
    ({"name": "cifar10-subset", "dataset": "cifar10", "variant": "cifar10"}, "other split"),
    ({"split": "train"}, "other split"), ({"whole": False}, "other split"),
    ({"bound": "exact"}, "other bound"),
    ({"dequantization": "variational"}, "other bound"), ({"bound": "importance-weighted"}, "--claim-k"),
    ({"variant": "oord"}, "other variant"),
    ({"dataset": "imagenet64-oord?", "variant": "oord?"}, "other variant")])
def test_what_cannot_be_compared_is_not(settings, reason):
    found = judge("3.70", **settings)
    assert found["result"] == "not comparable" and reason in found["sentence"]


def test_common_mistakes_are_recognised():
    assert "log(127.5)" in judge(f"{3.7 + 4 - math.log2(127.5):.2f}", value=7.7)["sentence"]
    assert "H*W" in judge("11.10")["sentence"]


def test_a_wrong_division_is_recognised_by_the_images_own_channels():
    assert "H*W" in judge("14.80", channels=4)["sentence"]
    assert "H*W" not in judge("11.10", channels=1)["sentence"]
