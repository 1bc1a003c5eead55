"""What is honest is not refuted: not for curvature, rounding or steps of Jacobians, nor by chance."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audit.adapters import load_model
from audit.checks import FAIL, OPEN, PASS, held
from audit.jacobians import STEPS, check_whole_images, error_of_steps, gap_of_image, log_abs_det
from audit.protocol import Subject, check_memory, check_noise
from audit.request import Request
from data import load_images
from jet import Jet, JetConfig
from test_audit_corpus import IMAGES, LOGIT, UNIFORM, local
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
    return SimpleNamespace(model=None, forward=forward, room=lambda x: torch.full_like(x, 0.1), dequantizes=False,
                           signs=lambda x, rng: torch.from_numpy(rng.choice([-1.0, 1.0], x.shape)))


def test_curvature_and_rounding_are_told_from_a_wrong_log_det():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.random((3, 8, 8))), torch.tensor(0)
    right = float((1 + 20 * x).log().sum())
    def found(model, claimed, step):
        return gap_of_image(model, x, y, claimed, step, 1e-5, rng)
    gap, error, holds = found(curved(10), right, 1e-6)  # forward differences are off by 3e-5
    assert gap < 1e-9 and error < 1e-3 and holds is not False
    gap, error, holds = found(curved(10), right + 0.05, 1e-6)
    assert gap == pytest.approx(0.05, abs=1e-5) and holds is False
    gap, error, holds = found(curved(0, 1e-9), 0.0, 1e-7)
    assert 1e-6 <= gap < error < 0.2 and holds is OPEN
    gap, error, holds = found(curved(0, 1e-9), 0.1, 1e-7)
    assert gap == pytest.approx(0.1, abs=1e-2) and holds is False


def test_the_error_of_a_log_det_is_that_which_a_jacobian_s_errors_make():
    rng = np.random.default_rng(0)
    for smallest in (1, 1e-4):
        J = rng.standard_normal((48, 48)) @ np.diag(np.geomspace(smallest, 1, 48)) @ rng.standard_normal((48, 48))
        sizes = 1e-7 * np.exp(rng.standard_normal((48, 48)))
        for shape in ((48, 48), (48, 1)):  # each value on its own; a row together
            made = [log_abs_det(J + sizes * rng.standard_normal(shape)) - log_abs_det(J) for _ in range(100)]
            error = error_of_steps(J, sizes * rng.standard_normal(shape), rng)
            assert np.abs(made).max() < error < 100 * np.std(made)
    assert error_of_steps(J, 0 * J, rng) == 0 and error_of_steps(0 * J, J, rng) == pytest.approx(4.8)


# ---- chance

@pytest.mark.parametrize("count", [2, 3])
def test_of_few_images_chance_refutes_nothing(images, count):
    """Four standard errors of two values refute an honest model once in eight audits."""
    jet, results = random_jet(0.2), []
    for entropy in range(8):
        chosen = np.random.default_rng(entropy).choice(8, count, replace=False)
        few = SimpleNamespace(array=images.array[chosen], split="test")
        subject = Subject(jet, few, {"seed": entropy, "draws": 1}, f"{entropy:032x}", 1e-4)
        bits = subject.bits_of(subject.x(range(count)), subject.y(range(count)))
        subject.measured["rows"] = {"bits": bits[None]}
        results += [line.result for line in (check_noise(subject), *check_memory(subject, images))]
    subject.measured["rows"] = {"bits": bits[None] - 0.2}  # noise that is known to the model
    assert check_noise(subject).result == FAIL
    assert set(results) == {PASS, OPEN}, results


def test_one_image_whose_noise_is_most_of_it_refutes_nothing(tmp_path):
    """LOGIT is as steep at black as there is room: one black image has nearly all the noise of 32."""
    (tmp_path / "model.py").write_text(LOGIT)
    pixels = IMAGES[144:176, :4, :4].copy()
    pixels[0] = 0
    few = SimpleNamespace(array=pixels, split="test")
    model, *_ = load_model(Request(adapter=str(tmp_path / "model.py"), threads=1))
    results = []
    for entropy in range(60):
        subject = Subject(model, few, {"seed": entropy, "draws": 4}, f"{entropy:032x}", 1e-4)
        rng, everyone = np.random.default_rng(entropy), range(32)
        subject.measured["rows"] = {"bits": np.stack([subject.bits_of(subject.x(everyone, rng), subject.y(everyone))
                                                      for _ in range(4)])}
        results.append(check_noise(subject).result)
    assert set(results) <= {PASS, OPEN}, results


def test_four_standard_errors_are_enough_of_many_and_open_of_few():
    for value, error, df, holds in ((4.9, 1, 2, True), (5.05, 1, 10 ** 5, OPEN), (5.2, 1, 10 ** 5, False), (5.2, 1, 10, OPEN),
                                    (7.5, 1, 10, OPEN), (7.7, 1, 10, False), (100, 1, 2, OPEN), (131, 1, 2, False),
                                    (1e9, 1, 0, OPEN), (math.nan, 1, 10, False)):
        assert held(value, 1.0, error, df) is holds, (value, df)


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
