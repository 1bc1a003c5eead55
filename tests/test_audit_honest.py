"""What is honest is not refuted: not for curvature, rounding or steps of Jacobians, nor by chance."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audit.adapters import load_model
from audit.checks import FAIL, OPEN, PASS, margin_of
from audit.jacobians import STEPS, check_whole_images, error_of_steps, gap_of_image, log_abs_det
from audit.protocol import Subject, check_memory, check_noise
from audit.request import Request
from data import load_images
from jet import Jet, JetConfig
from test_audit_corpus import IMAGES, UNIFORM, local
from test_audit_faults import write_set


@pytest.fixture
def images(tmp_path):
    return load_images(str(write_set(tmp_path / "set", IMAGES[:8, 2:6, 2:6], IMAGES[144:152, 2:6, 2:6])), "test")


def random_jet(std):
    """A Jet whose networks have random weights: the larger, the further apart a Jacobian's singular values."""
    torch.manual_seed(0)
    jet = Jet(JetConfig(image_size=4, patch_size=2, num_couplings=5, block_depth=1, emb_dim=8, num_heads=2))
    for parameter in jet.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return jet


def of_whole_images(model, images, count=8):
    """The line of each of so many audits."""
    measured = {"seed": 0, "draws": 1}
    return [check_whole_images(Subject(model, images, measured, f"{entropy:032x}", 1e-3), 1)[0]
            for entropy in range(count)]


# ---- the steps' own errors

@pytest.mark.parametrize("std, allowed", [(0.2, {PASS}), (0.9, {PASS}), (1.1, {PASS, OPEN})])
def test_an_honest_jet_is_not_refuted_by_rounding(images, std, allowed):
    """The largest singular value is 4, 10 ** 7 and 10 ** 11 times the smallest, of float64."""
    found = of_whole_images(random_jet(std), images)
    assert {line.result for line in found} <= allowed, found


@pytest.mark.parametrize("std", [0.2, 0.9])
def test_a_jet_whose_log_det_is_slightly_off_is_refuted(images, monkeypatch, std):
    forward = Jet.forward
    monkeypatch.setattr(Jet, "forward", lambda self, x: (lambda z, logdet: (z, logdet + 0.01))(*forward(self, x)))
    found = of_whole_images(random_jet(std), images, 3)
    assert {line.result for line in found} == {FAIL}, found


def curved(slope, rounding=0.0):
    """What has the log-det of z = x + slope * x ** 2, of that each z rounded to a multiple."""
    def forward(x, y):
        z = x + slope * x ** 2
        return (torch.round(z / rounding) * rounding if rounding else z), None
    return SimpleNamespace(forward=forward, room=lambda x: torch.full_like(x, 0.1), dequantizes=False,
                           signs=lambda x, rng: torch.from_numpy(rng.choice([-1.0, 1.0], x.shape)))


def test_curvature_and_rounding_are_told_from_a_wrong_log_det():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.random((3, 8, 8))), torch.tensor(0)
    right = float((1 + 20 * x).log().sum())
    gap, error = gap_of_image(curved(10), x, y, right, 1e-4, 1e-6, rng)  # forward differences are off by 0.003
    assert gap < 1e-6 and error == 0
    gap, error = gap_of_image(curved(10), x, y, right + 0.05, 1e-4, 1e-6, rng)
    assert gap == pytest.approx(0.05, abs=1e-5) and error < 0.05
    gap, error = gap_of_image(curved(0, 1e-9), x, y, 0.0, 1e-7, 1e-6, rng)
    assert 1e-6 <= gap < error < 0.1
    gap, error = gap_of_image(curved(0, 1e-9), x, y, 0.1, 1e-7, 1e-6, rng)
    assert gap == pytest.approx(0.1, abs=1e-2) and error < 0.05


def test_the_error_of_a_log_det_is_that_which_a_jacobian_s_errors_make():
    rng = np.random.default_rng(0)
    for smallest in (1, 1e-4):
        J = rng.standard_normal((48, 48)) @ np.diag(np.geomspace(smallest, 1, 48)) @ rng.standard_normal((48, 48))
        sizes = 1e-7 * np.exp(rng.standard_normal((48, 48)))
        for shape in ((48, 48), (48, 1)):  # each value on its own; a row together
            made = [log_abs_det(J + sizes * rng.standard_normal(shape)) - log_abs_det(J) for _ in range(100)]
            error = error_of_steps(J, sizes * rng.standard_normal(shape))
            assert np.abs(made).max() < error < 40 * np.std(made)
    assert error_of_steps(J, J) == error_of_steps(np.zeros((48, 48)), J) == pytest.approx(4.8)


# ---- chance

@pytest.mark.parametrize("count", [2, 3])
def test_of_few_images_chance_refutes_nothing(images, count):
    """With four standard errors of so few, the first two would refute one audit of 20 and of 60."""
    jet, results = random_jet(0.2), []
    for entropy in range(30):
        chosen = np.random.default_rng(entropy).choice(8, count, replace=False)
        few = SimpleNamespace(array=images.array[chosen], split="test")
        subject = Subject(jet, few, {"seed": entropy, "draws": 1}, f"{entropy:032x}", 1e-4)
        bits = subject.bits_of(subject.x(range(count)), subject.y(range(count)))
        subject.measured["rows"] = {"bits": bits[None]}
        results.append(check_noise(subject).result)
        if entropy < 5:
            results += [line.result for line in check_memory(subject, images)]
        subject.measured["rows"] = {"bits": bits[None] - 0.2}  # noise that is known to the model
        assert check_noise(subject).result == FAIL
    assert set(results) == {PASS, OPEN}, results


def test_a_mean_of_many_may_be_four_standard_errors_off_and_one_of_few_more():
    values = np.random.default_rng(0).standard_normal(1001)
    for count, errors in ((1001, 4.1), (11, 6.61), (3, 129.1)):
        some = values[:count]
        assert margin_of(some) == pytest.approx(errors * some.std(ddof=1) / math.sqrt(count), rel=0.01)
    assert margin_of(values[:1]) == math.inf


# ---- where steps may go

def test_no_step_leaves_the_level_where_a_dequantizer_may_jump():
    rng = np.random.default_rng(0)
    x = torch.from_numpy((rng.integers(256, size=(3, 8, 8)) + rng.random((3, 8, 8))) / 127.5 - 1)
    signs = Subject.signs(SimpleNamespace(dequantizes=True), x, rng)
    for step in (*STEPS, STEPS[-1] * 10 ** 0.4):
        assert torch.equal(((x + step * signs + 1) * 127.5).floor(), ((x + 1) * 127.5).floor())
    place, room = (x + 1) * 127.5 % 1, Subject.room(SimpleNamespace(dequantizes=True, top=255), x) * 127.5
    assert (room < 0.011 * place).all() and (room < 0.011 * (1 - place)).all() and room.min() > 0


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 0.01])
def test_no_step_leaves_the_range_at_whose_ends_a_density_may_be_steep(tmp_path, monkeypatch, noise):
    """Every eighth value is black or white, near the outer end of its level: UNIFORM's slope there is 1 / noise."""
    (tmp_path / "model.py").write_text(UNIFORM.replace("1e-12", "1e-15"))
    pixels, place = IMAGES[144:152].copy(), np.full((8, 8, 8, 3), 0.5)
    pixels[:, ::4, ::2], place[:, ::4, ::2] = 0, noise
    pixels[:4, ::4, ::2], place[:4, ::4, ::2] = 255, 1 - noise
    images = load_images(str(write_set(tmp_path / "set", IMAGES[:8], pixels)), "test")
    monkeypatch.setattr(Subject, "noise_of", lambda self, indices, rng=None: place[indices])
    model, *_ = load_model(Request(adapter=str(tmp_path / "model.py"), threads=1))
    for entropy in range(8):
        subject = Subject(model, images, {"seed": 0, "draws": 1}, f"{entropy:032x}", 1e-3)
        found = {line.name: line for line in check_whole_images(subject, 2)}
        assert {line.result for line in found.values()} == {PASS}, found
