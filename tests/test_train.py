"""Training and evaluation: the same bits after every restart, each image once, and clear refusals."""
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import resource
import signal
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data as data_module
import evaluate as evaluate_module
import recipe
from harness import advice as advice_module
from harness import graphs, machine, memory, pace
from harness.flops import train_flops
from harness.place import Place
import train as train_module
from convert import load_jet
from harness.checkpoint import read_tensors
from harness.errors import CheckpointError
from data import evaluation_noise, load_images, training_batch
from jet import dequantize
from jet import Coupling, Jet, JetConfig, bits_per_dim
from evaluate import evaluate
from harness.errors import NonFiniteError, TrainingError
from recipe import schedule
from tests import forked
from train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
ONE = JetConfig(image_size=8, num_couplings=1, kinds=("channels", "spatial"), block_depth=1, emb_dim=8, num_heads=2)
MODEL = dataclasses.replace(ONE, num_couplings=2)


def save_images(folder):
    """A .npy file of 40 small real images."""
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    return folder / "images.npy"


def config_of(images):
    return TrainConfig(model=ONE, data=str(images), batch_size=16, total_steps=4, lr=1e-2)


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path)


@pytest.fixture
def config(images):
    return config_of(images)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The folder of a run that was stopped after two steps, to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    train(config_of(save_images(folder)), folder / "run", stop_after=2, quiet=True)
    return folder / "run"


def checkpoint(run_dir):
    return read_tensors(run_dir / "checkpoint.pt")


def same_bits(one, two):
    """Equal nested values, tensors to the bit; times aside."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one if key != "seconds")
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return one == two or one != one and two != two


@pytest.mark.parametrize("changes", [{}, {"actnorm": True, "invertible_dense": True, "block": "cnn"}],
                         ids=["plain", "switches and cnn"])
def test_four_steps_are_two_and_two_more(tmp_path, config, changes):
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, **changes), eval_every=1)
    whole = train(config, tmp_path / "whole", quiet=True)
    assert train(config, tmp_path / "parts", stop_after=2, quiet=True) == {"step": 2}
    assert checkpoint(tmp_path / "parts")["step"] == 2 and not (tmp_path / "parts/done.json").exists()
    torch.manual_seed(99)  # the global generator plays no part
    parts = train(config, tmp_path / "parts", quiet=True)
    assert same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert whole["rows"] == parts["rows"] and [row["step"] for row in whole["rows"]] == [1, 1, 2, 2, 3, 3, 4, 4]
    steps = [line.split(",")[:5] for line in (tmp_path / "whole/metrics.csv").read_text().splitlines()]
    assert steps == [line.split(",")[:5] for line in (tmp_path / "parts/metrics.csv").read_text().splitlines()]


def test_a_finished_run_returns_at_once(tmp_path, config, monkeypatch):
    done = train(config, tmp_path / "run", quiet=True)
    monkeypatch.setattr(recipe, "training_step", None)
    assert train(config, tmp_path / "run", quiet=True) == done
    assert done["num_images"] == 40 and done["rows"][-1]["split"] == "test" and done["threads"] == 1
    assert done["bits_per_dim"] == done["rows"][-1]["bits_per_dim"]


def test_training_lowers_bits_and_the_seed_matters(tmp_path, config):
    config = dataclasses.replace(config, total_steps=15, lr=3e-2)
    fresh = evaluate(Jet(ONE), load_images(config.data, "test"))["bits_per_dim"]
    results = [train(dataclasses.replace(config, seed=seed), tmp_path / str(seed), quiet=True)["bits_per_dim"]
               for seed in (0, 1)]
    assert max(results) < fresh - 0.2 and results[0] != results[1]


def test_weights_come_from_the_seed_and_actnorm_from_the_first_batch(tmp_path, config):
    """The learning rate of the first step is 0: after it the weights are still the initial ones."""
    config = dataclasses.replace(config, model=dataclasses.replace(ONE, actnorm=True))
    train(config, tmp_path / "0", stop_after=1, quiet=True)
    train(dataclasses.replace(config, seed=1), tmp_path / "1", stop_after=1, quiet=True)
    first, other = (checkpoint(tmp_path / seed)["model"] for seed in "01")
    assert not torch.equal(first["couplings.0.net.posemb"], other["couplings.0.net.posemb"])
    torch.manual_seed(0)
    jet = Jet(config.model)
    jet.initialize(training_batch(load_images(config.data, "train"), 16, 0, 0))
    assert same_bits(dict(jet.state_dict()), first) and first["actnorms.0.log_scale"].abs().min() > 0.1


def test_a_step_follows_warmup_fraction_and_clip_norm(config):
    x = training_batch(load_images(config.data, "train"), 16, 0, 0)

    def change(step, **changes):
        settings = dataclasses.replace(config, total_steps=10, weight_decay=0, **changes)
        torch.manual_seed(0)
        jet = Jet(ONE)
        before = jet.couplings[0].net.final_proj.bias.detach().clone()
        optimizer = recipe.make_optimizer(jet.parameters(), settings)
        recipe.training_step(jet, optimizer, x, step, settings)
        return optimizer.param_groups[0]["lr"], (jet.couplings[0].net.final_proj.bias - before).abs().max().item()

    assert change(2, warmup_fraction=0.5)[0] == pytest.approx(config.lr * 2 / 5)
    assert change(1)[0] == pytest.approx(config.lr)
    assert change(1)[1] == pytest.approx(config.lr, rel=1e-3)  # Adam's first step: lr for each parameter
    assert change(1, clip_norm=1e-12)[1] < 1e-3 * config.lr  # unless the gradient is far below its epsilon


def test_bfloat16_trains_in_other_bits_to_a_float32_result(tmp_path, config):
    config = dataclasses.replace(config, total_steps=10)
    half, full = (train(dataclasses.replace(config, precision=precision), tmp_path / precision, quiet=True)
                  for precision in ("bfloat16", "float32"))
    assert half["bits_per_dim"] != full["bits_per_dim"]
    assert abs(half["bits_per_dim"] - full["bits_per_dim"]) < 0.02
    state = checkpoint(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32, torch.int64}
    assert evaluate(load_jet(tmp_path / "bfloat16"), load_images(config.data, "test"))["bits_per_dim"] == half["bits_per_dim"]


def test_sigkill_and_the_same_command_end_with_the_same_bits(tmp_path, config, capsys):
    def slow_steps():  # the second step takes a second, the third two
        recipe.training_step = lambda *arguments, real=recipe.training_step: time.sleep(arguments[3]) or real(*arguments)
    flags = ["--data", config.data, "--batch_size", "16", "--total_steps", "8",
             "--model.num_couplings", "1", "--model.block_depth", "1", "--model.emb_dim", "8", "--model.num_heads", "2",
             "--model.kinds", "channels", "spatial", "--lr", "1e-2", "--checkpoint-every-s", "0", "--run-dir", str(tmp_path / "killed")]
    killed = forked.start(ROOT / "train.py", *flags, before=slow_steps)
    forked.wait_until((tmp_path / "killed/checkpoint.pt").exists, killed)
    killed.kill()
    killed.join()
    step = checkpoint(tmp_path / "killed")["step"]
    assert 0 < step < 8
    with open(tmp_path / "killed/metrics.csv", "a") as file:
        file.write("10,16")  # cut in mid-line
    train_module.main(flags)
    assert "bits/dim on 40 test images" in capsys.readouterr().out
    config = dataclasses.replace(config, total_steps=8)
    whole = train(config, tmp_path / "whole", quiet=True)
    assert same_bits(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("killed", "whole")]
    assert [line.split(",")[:5] for line in lines[0]] == [line.split(",")[:5] for line in lines[1]]
    assert f"resumed at step {step}" in (tmp_path / "killed/log.txt").read_text()
    assert json.loads((tmp_path / "killed/done.json").read_text())["bits_per_dim"] == whole["bits_per_dim"]


def test_a_changed_config_is_refused_by_field(tmp_path, config):
    train(config, tmp_path / "run", stop_after=1, quiet=True)
    changed = dataclasses.replace(config, lr=2e-2, model=dataclasses.replace(ONE, block_depth=2))
    with pytest.raises(TrainingError, match="lr was 0.01 and is now 0.02; model.block_depth was 1 and is now 2"):
        train(changed, tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_run_that_could_not_start_leaves_its_folder_unclaimed(tmp_path, config):
    with pytest.raises(TrainingError, match="has images of 8 x 8 x 3; the model takes image_size=16"):
        train(dataclasses.replace(config, model=dataclasses.replace(ONE, image_size=16)), tmp_path / "run", quiet=True)
    assert train(config, tmp_path / "run", stop_after=1, quiet=True) == {"step": 1}


def test_a_second_process_on_a_run_folder_is_refused(tmp_path, config, monkeypatch):
    def second(*arguments, original=recipe.training_step):
        with pytest.raises(TrainingError, match="another process is at this run"):
            train(config, tmp_path / "run", quiet=True)
        return original(*arguments)
    monkeypatch.setattr(recipe, "training_step", second)
    assert train(config, tmp_path / "run", stop_after=1, quiet=True) == {"step": 1}


@pytest.mark.parametrize("change, message", [
    (lambda saved: saved["config"].update(lr=1.0), "lr was 1.0 and is now 0.01"),
    (lambda saved: saved.update(config=None), "belongs to another configuration"),
    (lambda saved: saved.update(format=None), "not a checkpoint of a run"),
    (lambda saved: saved.update(step=5), "the step does not fit"),
    (lambda saved: saved.update(step="2"), "the step does not fit"),
    (lambda saved: saved.update(micro_batch=0), "the step does not fit"),
    (lambda saved: saved["optimizer"].clear(), "optimizer's state"),
    (lambda saved: saved["optimizer"][0].update(exp_avg=torch.zeros(1)), "optimizer's state"),
    (lambda saved: saved["model"]["couplings.0.order"].zero_(), "not a permutation"),
    (lambda saved: saved["model"].popitem(), "do not fit")])
def test_a_checkpoint_that_is_not_this_runs_is_refused(tmp_path, stopped_run, config, change, message):
    shutil.copytree(stopped_run, tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    change(saved)
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    with pytest.raises((CheckpointError, TrainingError), match=message) as error:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)


def test_damaged_notes_of_a_run_are_mended_or_refused(tmp_path, stopped_run, config):
    shutil.copytree(stopped_run, tmp_path / "run")
    (tmp_path / "run/metrics.csv").write_bytes(b"header\n\xff\xfe,,\nabc,1,2,3,4,5\n1,16,8.0,1.0,0.0,0.1\n3,48,8.0,1.0,0.0,0.1\n2,32,8")
    train(config, tmp_path / "run", quiet=True)
    steps = [line.split(",")[0] for line in (tmp_path / "run/metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "3", "4"]  # of 2 a torn line was left: it is not made up
    assert "metrics.csv: 3 torn lines dropped" in (tmp_path / "run/log.txt").read_text()
    for content in ("", "{}", "[]", "3", json.dumps({"rows": []}), json.dumps({"rows": [{"split": "test"}]})):
        (tmp_path / "run/done.json").write_text(content)
        with pytest.raises(TrainingError, match="done.json: damaged .* delete it"):
            train(config, tmp_path / "run", quiet=True)
    (tmp_path / "run/done.json").unlink()
    assert train(config, tmp_path / "run", quiet=True)["num_images"] == 40
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(TrainingError, match="config.json: damaged"):
        train(config, tmp_path / "run", quiet=True)


def test_changed_images_are_refused(tmp_path, config):
    train(config, tmp_path / "run", stop_after=1, quiet=True)
    np.save(config.data, 255 - np.load(config.data))
    with pytest.raises(TrainingError, match="training images have changed"):
        train(config, tmp_path / "run", quiet=True)
    again = dataclasses.replace(config, lr=config.lr)  # as another process finds it
    with pytest.raises(TrainingError, match="data was '.*images.npy .*' and is now '.*images.npy"):
        train(again, tmp_path / "run", quiet=True)


def test_an_array_at_two_paths_is_one_run(tmp_path, config):
    """Images enter a run's name by what they are, never by where they lie."""
    train(config, tmp_path / "run", stop_after=2, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    moved = os.rename(config.data, tmp_path / "elsewhere/pictures.npy") or tmp_path / "elsewhere/pictures.npy"
    other = dataclasses.replace(config, data=str(moved))
    assert other.hash == config.hash
    whole = train(other, tmp_path / "whole", quiet=True)
    assert train(other, tmp_path / "run", quiet=True)["rows"] == whole["rows"]
    np.save(moved, 255 - np.load(moved))
    assert dataclasses.replace(other, lr=other.lr).hash != config.hash


def test_equal_couplings_are_one_run_however_they_are_written(config):
    def named(**changes):
        return dataclasses.replace(config, model=dataclasses.replace(MODEL, **changes)).hash
    assert named(kinds=("channels",) * 8 + ("spatial",)) == named(kinds=("channels",), spatial_splits=("vstripes",))
    assert named(kinds=("channels", "spatial")) == named(kinds=("channels", "spatial", "channels"))
    assert named(kinds=("spatial",)) != named(kinds=("channels",))
    assert named(block="cnn", num_heads=4) == named(block="cnn") != named()


def test_a_new_field_with_a_default_renames_no_run(config):
    """What the fields of today's names are made of stays: only what differs from a default counts."""
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(TrainConfig):
        new_field: float = 0.5
    later = Later(**vars(TrainConfig(lr=1e-3, model=config.model)) | {})
    assert later.hash == TrainConfig(lr=1e-3, model=config.model).hash
    assert dataclasses.replace(later, new_field=0.6).hash != later.hash


@pytest.mark.parametrize("changes, name", [
    ({}, "5e5fbf8b21"), ({"lr": 1e-3}, "f6b6139b6f"), ({"data": "cifar10", "seed": 3, "precision": "bfloat16"}, "d0a5f09be9"),
    ({"data": "cifar10-subset", "model": JetConfig(image_size=32, block="cnn", num_couplings=6)}, "d659fd86eb")])
def test_names_of_runs_stay_for_ever(changes, name):
    """Where this fails, run folders and CSVs of others lose their names: raise recipe.HASH_FORMAT, knowingly."""
    assert TrainConfig(**changes).hash == name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_is_not_finite_stops_before_it_updates(tmp_path, stopped_run, config, monkeypatch, what):
    shutil.copytree(stopped_run, tmp_path / "run")
    before = checkpoint(tmp_path / "run")

    def broken(z, logdet):
        return bits_per_dim(z, logdet) * math.nan if what == "loss" else bits_per_dim(z, logdet).abs().sqrt() * 0 + (
            z.flatten(1).sum(1) * 0).sqrt()
    monkeypatch.setattr(recipe, "bits_per_dim", broken)
    with pytest.raises(NonFiniteError, match=r"not finite at step 2: loss \S+ bits/dim, gradient norm nan, lr 0.0075"):
        train(config, tmp_path / "run", quiet=True)
    assert same_bits(checkpoint(tmp_path / "run"), before)


def stepper(config, dtype=torch.float32):
    """A Jet with random weights, its optimizer and the batch of step 0."""
    torch.manual_seed(0)
    jet = Jet(MODEL).to(dtype)
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = training_batch(load_images(config.data, "train"), 16, 0, 0).to(dtype)
    return jet, recipe.make_optimizer(jet.parameters(), config), x


def test_a_step_reads_nothing_back_from_the_device(config):
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))
    jet, optimizer, x = stepper(config)
    with Reads() as reads:
        loss, grad_norm = recipe.training_step(jet, optimizer, x, 1, config, 5)
        assert reads.count == 0 and loss.shape == grad_norm.shape == () and not loss.requires_grad
        assert float(loss) > 0 and reads.count == 1  # the counter counts


@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nothing_is_updated_from_a_bad_step_on(config, monkeypatch, good_steps, bad):
    jet, optimizer, x = stepper(config)
    for step in range(good_steps):
        assert math.isfinite(recipe.training_step(jet, optimizer, x, step + 1, config)[0])
    before = {name: tensor.clone() for name, tensor in jet.state_dict().items()}
    states = [{name: tensor.clone() for name, tensor in optimizer.state[parameter].items()} or
              {name: torch.zeros_like(tensor) for name, tensor in
               (("step", torch.zeros(())), ("exp_avg", parameter.detach()), ("exp_avg_sq", parameter.detach()))}
              for parameter in jet.parameters()]
    broken = (lambda z, logdet: bits_per_dim(z, logdet) * math.nan) if bad == "loss" else (
        lambda z, logdet: bits_per_dim(z, logdet) + (z.flatten(1).sum(1) * 0).sqrt())
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "bits_per_dim", broken)
        loss, grad_norm = recipe.training_step(jet, optimizer, x, 3, config)
    assert math.isnan(grad_norm) and math.isnan(loss) == (bad == "loss")
    assert math.isfinite(recipe.training_step(jet, optimizer, x, 3, config)[1])  # a good one changes nothing, too
    assert same_bits(dict(jet.state_dict()), before)
    for parameter, state in zip(jet.parameters(), states):
        assert same_bits(optimizer.state[parameter], state)
    assert "found_inf" not in str(optimizer.state_dict()["param_groups"])


def clock(monkeypatch, tick):
    """The training loop sees a clock that goes on by tick seconds whenever it is read."""
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=functools.partial(
        next, itertools.count(0, tick))))


@pytest.mark.parametrize("bad_step", [5, 12])
def test_a_bad_step_between_reads_is_named_and_never_saved(tmp_path, config, monkeypatch, bad_step):
    calls, lengths = itertools.count(), []
    clock(monkeypatch, 1e-3)

    def broken(z, logdet):
        return bits_per_dim(z, logdet) * (math.nan if next(calls) == bad_step else 1)

    def read(pending, config, original=train_module.read_steps):
        lengths.append(len(pending))
        return original(pending, config)
    monkeypatch.setattr(recipe, "bits_per_dim", broken)
    monkeypatch.setattr(train_module, "read_steps", read)
    config = dataclasses.replace(config, total_steps=20)
    with pytest.raises(NonFiniteError, match=rf"not finite at step {bad_step}: loss nan bits/dim, gradient norm nan"):
        train(config, tmp_path / "run", stop_after=18, quiet=True)
    assert lengths[-1] > 1  # it was not seen at once
    assert not (tmp_path / "run/checkpoint.pt").exists()
    rows = [line.split(",")[0] for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]]
    assert rows == [str(step + 1) for step in range(10 if bad_step > 10 else 1)]


def test_losses_are_read_every_ten_steps_or_once_a_second(tmp_path, config, monkeypatch):
    seen = []

    def read(pending, config, original=train_module.read_steps):
        seen.append(len(pending))
        return original(pending, config)
    monkeypatch.setattr(train_module, "read_steps", read)
    config = dataclasses.replace(config, total_steps=25)
    train(config, tmp_path / "other", stop_after=12, quiet=True, place=Place(checkpoint_every_s=0))
    others = [line.split(",")[:5] for line in (tmp_path / "other/metrics.csv").read_text().splitlines()[1:]]
    assert seen == [1] * 12  # at every step that is saved
    for tick, lengths in ((1e-3, [1, 9, 10, 5]), (0.4, None), (2, [1] * 25)):
        clock(monkeypatch, tick)
        seen.clear()
        done = train(config, tmp_path / str(tick), quiet=True, place=Place(checkpoint_every_s=1e9))
        assert seen == lengths if lengths else 1 < max(seen) < 9
        rows = [line.split(",") for line in (tmp_path / str(tick) / "metrics.csv").read_text().splitlines()[1:]]
        assert [(row[0], row[1]) for row in rows] == [(str(step), str(16 * step)) for step in range(1, 26)]
        assert float(rows[9][4]) == config.lr * schedule(9, 25) and float(rows[24][5]) == round(done["train_seconds"], 3)
        assert [row[:5] for row in rows[:12]] == others


def test_lines_of_an_evaluation_are_15_seconds_apart_and_training_before_it_does_not_count(monkeypatch):
    clock(monkeypatch, 0)
    lines, told = [], pace.Pace(types.SimpleNamespace(stop=False), None)
    for start in (100, 116, 400):  # evaluations of 40 s, with 0 s and 244 s of training between them
        for count in range(0, 50, 10):
            pace.time.monotonic = lambda now=start + count: now
            told.evaluated(types.SimpleNamespace(write=lines.append), types.SimpleNamespace(say=str), "50 test images", count)
    assert lines == 3 * [f"evaluated {count} of 50 test images" for count in (20, 40)]


@pytest.mark.parametrize("size", [1, 5, 8, 16, 99])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(config, size):
    config = dataclasses.replace(config, clip_norm=1e9)  # a tiny one would hide a wrong sum
    whole, pieces = ([*recipe.training_step(jet, optimizer, x, 1, config, micro_batch)] +
                     [parameter.grad for parameter in jet.parameters()]
                     for micro_batch in (None, size) for jet, optimizer, x in [stepper(config, torch.float64)])
    assert len(whole) == len(pieces) > 30
    for one, other in zip(whole, pieces):
        assert (one - other).abs().max() <= 1e-12 * max(1, one.abs().max())


def test_pieces_are_no_larger_than_asked_and_a_resumed_run_keeps_their_size(tmp_path, config, monkeypatch):
    sizes = []

    def step(model, *arguments, original=recipe.training_step, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(Jet, "forward", lambda self, x, forward=Jet.forward: sizes.append(len(x)) or forward(self, x))
            return original(model, *arguments, **settings)
    monkeypatch.setattr(recipe, "training_step", step)
    config = dataclasses.replace(config, total_steps=2)
    whole = train(config, tmp_path / "whole", quiet=True, place=Place(micro_batch=5))
    assert sizes == [5, 5, 5, 1] * 2 and whole["micro_batch"] == 5
    train(config, tmp_path / "parts", stop_after=1, quiet=True, place=Place(micro_batch=5))
    train(config, tmp_path / "parts", quiet=True)
    assert sizes == [5, 5, 5, 1] * 4
    assert same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    train(config, tmp_path / "once", stop_after=1, quiet=True)
    assert sizes[16:] == [16]
    saved = checkpoint(tmp_path / "once")
    torch.save({key: value for key, value in saved.items() if key != "micro_batch"}, tmp_path / "once/checkpoint.pt")
    train(config, tmp_path / "once", quiet=True)  # a checkpoint from before there was a micro batch
    assert sizes[16:] == [16, 16]


def test_recomputed_activations_are_the_same_bits(tmp_path, config):
    config = dataclasses.replace(config, total_steps=3, model=dataclasses.replace(MODEL, actnorm=True, invertible_dense=True))
    done = {switch: train(config, tmp_path / switch, quiet=True, place=Place(checkpoint_activations=switch))
            for switch in ("on", "off")}
    assert [done[switch]["checkpoint_activations"] for switch in ("on", "off")] == [True, False]
    assert same_bits(checkpoint(tmp_path / "on"), checkpoint(tmp_path / "off"))
    assert "activations recomputed, 16 of 16 images" in (tmp_path / "on/log.txt").read_text()


def test_activation_bytes_count_what_backward_needs():
    def count(precision="float32", recompute=False, **changes):
        jet = Jet(dataclasses.replace(MODEL, **{"num_couplings": 3, "emb_dim": 32, **changes}))
        jet.checkpoint_activations = recompute
        return memory.activation_bytes(jet, precision)
    image = 3 * 8 * 8 * 4
    assert count(recompute=True) == 3 * 1.5 * image  # of two couplings: their inputs, and z
    assert count(recompute=True, block_depth=4) == count(recompute=True)
    assert 1.9 < count(num_couplings=6) / count() < 2.1
    N, E = MODEL.num_tokens, 32  # a block keeps from 9 (fused) to some 20 values per token and channel
    assert 5 <= (count(block_depth=2) - count()) / (3 * N * E * 4) <= 20
    assert count("bfloat16", block_depth=4) < count(block_depth=4)


def test_what_does_not_fit_is_recomputed_first_then_cut(config, monkeypatch):
    jet, optimizer, _ = stepper(config)
    counted = memory.activation_bytes(jet, "float32")
    monkeypatch.setattr(memory, "activation_bytes", lambda *asked: asked == (jet, "float32") and counted)
    fit = functools.partial(memory.fit_memory, jet, optimizer, config)
    chosen, lines = [], []
    for free in np.geomspace(1e7, 1e4, 30):
        size, line = fit("auto", None, free)
        if not chosen or chosen[-1] != (jet.checkpoint_activations, size):
            chosen.append((jet.checkpoint_activations, size))
    assert chosen[:2] == [(False, 16), (True, 16)] and chosen[-1] == (True, 1)
    sizes = [size for _, size in chosen]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {16, 8, 4, 2, 1}
    assert fit("auto", 6, 1e3)[0] == 6 and jet.checkpoint_activations
    assert fit("off", 6, 1e3)[0] == 6 and not jet.checkpoint_activations
    assert fit("off", None, 1e3)[0] == 1 and not jet.checkpoint_activations
    assert fit("on", None, 1e9)[0] == 16 and jet.checkpoint_activations
    assert fit("auto", 99, 1e9)[0] == 16
    assert re.fullmatch(r"memory: a step needs 0.\d\d of 0.93 GiB free: activations kept, 16 of 16 images at once",
                        fit("auto", None, 1e9)[1])


def test_a_full_gpu_is_one_line(tmp_path, config, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
    monkeypatch.setattr(recipe, "training_step", full)
    with pytest.raises(TrainingError, match="out of memory .*--checkpoint-activations on, or a --micro-batch") as error:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recompute", ["on", "off"])
def test_equal_couplings_are_compiled_once(tmp_path, config, monkeypatch, recompute):
    from torch._dynamo.utils import counters
    counts = []

    def step(*arguments, original=recipe.training_step):
        result = original(*arguments)
        counts.append(counters["stats"]["unique_graphs"])
        return result
    monkeypatch.setattr(Coupling, "compile", functools.partialmethod(
        torch.nn.Module.compile, backend=lambda graph, inputs: graph.forward))
    monkeypatch.setattr(recipe, "training_step", step)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_couplings=4), total_steps=2)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    try:
        compiled = train(config, tmp_path / "compiled", quiet=True, place=Place(compile=True, checkpoint_activations=recompute))
        assert [count - before for count in counts] == [2] * 2  # channels and spatial
        assert 0 < compiled["first_step_seconds"] < 600
        assert "first step: " in (text := (tmp_path / "compiled/log.txt").read_text()) and "eager, couplings compiled" in text
    finally:
        torch._dynamo.reset()
    eager = train(config, tmp_path / "eager", quiet=True)
    assert abs(compiled["bits_per_dim"] - eager["bits_per_dim"]) < 1e-4
    assert checkpoint(tmp_path / "compiled")["model"].keys() == checkpoint(tmp_path / "eager")["model"].keys()
    assert load_jet(tmp_path / "compiled").config == config.model
    assert 0 < eager["first_step_seconds"] < 60


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, config):
    train(config, tmp_path / "run", stop_after=1, quiet=True)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow past half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(TrainingError, match="checkpoint of step 4 was not saved .* the one before is untouched"):
            train(config, tmp_path / "run", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert train(config, tmp_path / "run", quiet=True)["bits_per_dim"] < 9


def test_adamw_decays_as_the_official_recipe():
    """Weights without gradient shrink by schedule * weight_decay a step, whatever the learning rate."""
    for lr in (1e-4, 1e-2):
        config = TrainConfig(total_steps=10, lr=lr, weight_decay=0.01)
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer, expected = recipe.make_optimizer([parameter], config), 1.0
        for step in range(10):
            optimizer.param_groups[0]["lr"] = lr * schedule(step, 10)
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            expected *= 1 - schedule(step, 10) * 0.01
        assert torch.allclose(parameter, torch.full_like(parameter, expected), rtol=0, atol=1e-12)


def test_schedule_rises_and_falls_to_zero():
    values = [schedule(step, 100) for step in range(101)]
    assert values[0] == 0 and values[10] == 1 and abs(values[100]) < 1e-12 and values[5] == 0.5
    assert schedule(0, 1) == 0 and schedule(1, 1) == 1  # one step: no division by zero


# ---- evaluation

@pytest.fixture(scope="module")
def jet():
    torch.manual_seed(0)
    jet = Jet(MODEL).double()
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


@pytest.fixture(scope="module")
def photos():
    return load_images("cifar10-subset", "test").array[:, ::4, ::4]


def test_evaluation_does_not_depend_on_the_batch_size(jet, photos):
    results = [evaluate(jet, photos[:50], batch_size=n, per_image=True) for n in (1, 7, 50)]
    for result in results:
        assert result["num_images"] == len(result["bits_per_dim_per_image"]) == 50
        assert abs(result["bits_per_dim"] / results[0]["bits_per_dim"] - 1) < 1e-9


def test_evaluation_is_the_mean_over_images_with_its_standard_error(jet, photos):
    result = evaluate(jet, photos[:5], seed=3, draws=2, per_image=True)
    with torch.no_grad():
        draws = torch.stack([bits_per_dim(*jet(dequantize(
            photos[:5].copy(), evaluation_noise(range(5), (8, 8, 3), 3, draw).double()).permute(0, 3, 1, 2)))
            for draw in range(2)])
    per_image = draws.mean(0).numpy()
    assert np.allclose(result["bits_per_dim_per_image"], per_image, rtol=0, atol=1e-12)
    assert abs(result["bits_per_dim"] - per_image.mean()) < 1e-12
    assert abs(result["bits_per_dim_se"] - per_image.std(ddof=1) / math.sqrt(5)) < 1e-12
    assert math.isnan(evaluate(jet, photos[:1])["bits_per_dim_se"])


def test_evaluation_with_a_thread_ahead_is_the_same(jet, photos, monkeypatch):
    plain = evaluate(jet, photos[:100], draws=2, batch_size=20, per_image=True)
    monkeypatch.setattr(evaluate_module, "prefetch",
                        lambda function, items, ahead: data_module.prefetch(function, items, 3))
    threaded = evaluate(jet, photos[:100], draws=2, batch_size=20, per_image=True)
    assert np.array_equal(plain.pop("bits_per_dim_per_image"), threaded.pop("bits_per_dim_per_image"))
    assert plain == threaded


def test_evaluation_in_bfloat16_is_close_and_not_the_same(tmp_path, config):
    train(dataclasses.replace(config, total_steps=10), tmp_path / "run", quiet=True)
    jet, images = load_jet(tmp_path / "run"), load_images(config.data, "test")
    full, half = (evaluate(jet, images, precision=precision) for precision in ("float32", "bfloat16"))
    assert full == evaluate(jet, images) and 0 < abs(full["bits_per_dim"] - half["bits_per_dim"]) < 0.01
    with pytest.raises(ValueError, match="precision='float16': needs .* float32 or bfloat16"):
        evaluate(jet, images, precision="float16")


def test_evaluation_takes_the_largest_power_of_two_that_fits_half_of_a_gpu(jet, monkeypatch):
    """The arithmetic alone: 8 images need 800 bytes more than the 50 that are there."""
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 50), ("max_memory_allocated", 850)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for free, size in ((2e9, 1024), (2 * 1023 * 100, 512), (2 * 512 * 100, 512), (1000, 4), (0, 1)):
        monkeypatch.setattr(evaluate_module, "free_bytes", lambda device: free)
        assert evaluate_module._batch_that_fits(jet, (8, 8, 3), next(jet.parameters())) == size


def test_evaluation_of_a_uniform_density_is_8_bits(photos):
    class Uniform(torch.nn.Module):
        def forward(self, x):
            z = torch.special.ndtri((x.double() + 1) * 127.5 / 256)
            log_prior = -z.square() / 2 - math.log(2 * math.pi) / 2
            return z, (-math.log(256 / 127.5) - log_prior).flatten(1).sum(1)
    result = evaluate(Uniform(), photos, per_image=True)
    assert np.abs(result["bits_per_dim_per_image"] - 8).max() < 1e-9


def test_evaluation_names_the_image_that_is_not_finite(jet, photos):
    class Broken(torch.nn.Module):
        def forward(self, x):
            z, logdet = jet(x.double())
            return z, torch.where(x.flatten(1).amin(1) < -1 + 1 / 127.5, torch.nan, logdet)
    photos = np.maximum(photos[:9], 9)
    photos[4, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="image 4 has nan bits/dim"):
        evaluate(Broken(), photos, batch_size=2)
    for bad in (photos.astype(np.float32), photos[0], photos[:0]):
        with pytest.raises(ValueError, match="needs uint8"):
            evaluate(jet, bad)


def test_the_trained_jet_loads_and_scores_the_same(tmp_path, config):
    done = train(config, tmp_path / "run", quiet=True)
    images = load_images(config.data, "test")
    for path in (tmp_path / "run", tmp_path / "run/checkpoint.pt"):
        jet = load_jet(path)
        assert jet.config == config.model
        assert evaluate(jet, images)["bits_per_dim"] == done["bits_per_dim"]


# ---- configuration and command line

def test_a_result_that_is_not_finite_ends_the_program_in_one_line(tmp_path, images):
    command = ["--data", str(images), "--model.num_couplings", "2",
               "--model.block_depth", "1", "--model.emb_dim", "8", "--model.num_heads", "2", "--batch_size", "4",
               "--total_steps", "2", "--lr", "1e30", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^train.py: error: .*not finite.*$"):  # a text: exit code 1
        train_module.main(command)
    assert not (tmp_path / "run/done.json").exists()


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=0), "batch_size=0: must be a whole number, 1 or more"), (dict(lr=0), "lr=0: must be a finite"),
    (dict(lr=math.nan), "lr=nan: must be"), (dict(weight_decay=-1e-5), "weight_decay=-1e-05: must be"),
    (dict(seed=-1), "seed=-1: must be a whole number, 0 or more"), (dict(seed=2 ** 63), "must be below"), (dict(precision="fp8"), "precision='fp8': must be"),
    (dict(beta2=1.0), "beta2=1.0: must be below 1"), (dict(data=""), "data='': must be"),
    (dict(model={}), "model={}: must be a JetConfig")])
def test_a_bad_training_value_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_config_survives_json_and_its_hash_sees_every_field(config):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hashes = {config.hash, dataclasses.replace(config, seed=1).hash, dataclasses.replace(config, eval_every=2).hash,
              dataclasses.replace(config, model=dataclasses.replace(MODEL, kinds=("channels",))).hash}
    assert len(hashes) == 4
    assert dataclasses.replace(config, clip_norm=1).hash == config.hash


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for prefix, config_class in (("", TrainConfig), ("model.", JetConfig)):
        for field in dataclasses.fields(config_class):
            if field.name not in ("model", "init", "extends"):  # what --init-from and --extend-to find
                assert f"--{prefix}{field.name} " in text and field.metadata["help"].split()[0] in text
    assert text.count("(default: ") >= 30 and "--init-from" in text


@pytest.mark.parametrize("flags, message", [
    (["--steps", "3"], "unrecognized arguments: --steps"), (["--batch-size", "3"], "did you mean --batch_size"),
    (["--data", "imagenet"], "data 'imagenet': neither a known set"),
    (["--data", "cifar10", "--data-root", "/nowhere"], "cifar10 .* is not there"),
    (["--model.patch_size", "5"], "patch_size=5: must divide image_size=32"),
    (["--model.block", "mlp"], "invalid choice: 'mlp'"),
    (["--model.kinds", "chanels"], "invalid choice: 'chanels'"),
    (["--model.spatial_splits", "rows"], "invalid choice: 'rows'"),
    (["--model.emb_dim", "30"], "emb_dim=30: must be divisible by num_heads=8"),
    (["--batch_size", "many"], "invalid int value: 'many'"),
    (["--lr", "-1"], "lr=-1.0: must be a finite number above 0"),
    (["--threads", "0"], "threads=0: must be a whole number, 1 or more"),
    (["--micro-batch", "0"], "micro_batch=0: must be a whole number, 1 or more"),
    (["--checkpoint-activations", "maybe"], "invalid choice: 'maybe'"),
    (["--device", "mps"], "device 'mps': must be auto, cpu or cuda"),
    (["--device", "tpu"], "device 'tpu': must be auto, cpu or cuda"),
    (["--run-dir", "/dev/null/run", "--model.num_couplings", "1"], "/dev/null/run: cannot be a run folder")])
def test_a_users_mistake_is_one_line_and_a_failure(capsys, flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--data", "cifar10-subset", "--total_steps", "1", *flags])
    error = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code + "\n"
    assert stop.value.code not in (0, None) and error.count("\n") == 1 and "error: " in error
    assert re.search(message, error), error


def test_cuda_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(TrainingError, match="sees no GPU here"):
        machine.pick_device("cuda")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be read here")
def test_recomputed_activations_take_the_same_memory_at_any_depth(tmp_path):
    """Beyond weights, gradients and moments, 8 couplings peak at no more than 1.25 times what 2 take."""
    import torch._dynamo  # noqa: F401  torch.utils.checkpoint does, for seconds: here once for both
    np.save(tmp_path / "images.npy", load_images("cifar10-subset", "train").array[:16])

    def measure(couplings):
        def step(*arguments, real=recipe.training_step):
            peak = memory.watch_memory(torch.device("cpu"))
            result = real(*arguments)
            gradients_and_moments = 3 * sum(parameter.nbytes for parameter in arguments[0].parameters())
            peaks.append(peak() * 2 ** 30 - gradients_and_moments)
            return result
        peaks = []
        recipe.training_step = step  # of this process alone
        config = TrainConfig(data=str(tmp_path / "images.npy"), batch_size=16, total_steps=2, model=JetConfig(
            image_size=32, num_couplings=couplings, block_depth=2, emb_dim=128, num_heads=4))
        train(config, tmp_path / str(couplings), stop_after=1, quiet=True, place=Place(checkpoint_activations="on"))
        return peaks.pop()
    few, many = forked.each(measure, 2, 8)
    noise = 8 * 2 ** 20  # pages of libraries come and go; with all activations kept they differ by 70 * 2 ** 20
    assert 0 < few and many < 1.25 * few + noise, (few, many)


def test_a_record_names_the_code_that_the_run_began_with(tmp_path, config, monkeypatch):
    commits = iter("ab")  # somebody commits meanwhile
    monkeypatch.setattr(train_module, "code_version", lambda: {"git_commit": next(commits) * 40, "git_dirty": False})
    assert train(dataclasses.replace(config, total_steps=1), tmp_path / "run", quiet=True)["git_commit"] == "a" * 40
    assert "commit aaaaaaaaaaaa" in (tmp_path / "run/log.txt").read_text()


def test_a_recipe_of_more_than_a_day_says_so_before_its_first_step(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr(advice_module, "matmul_rate", lambda: 1e8)
    long = dataclasses.replace(config, total_steps=10 ** 9)
    days = train_flops(long) / 5e7 / 86_400
    with pytest.raises(SystemExit):  # before step 1 is what counts
        monkeypatch.setattr(recipe, "training_step", lambda *arguments: sys.exit())
        train(long, tmp_path / "long")
    said = capsys.readouterr().err
    assert f"about {days:,.0f} days on this CPU" in said and "1,000,000,000 steps of 16 images" in said
    assert f"{train_flops(long):.2g} FLOPs" in said
    assert advice_module.advice(dataclasses.replace(config, total_steps=100), torch.device("cpu"), 100) == []
    assert advice_module.advice(long, torch.device("cuda"), 100) == []


def test_bfloat16_on_a_cpu_says_in_one_line_that_float32_is_faster(config):
    rounded = dataclasses.replace(config, precision="bfloat16")
    line, = advice_module.advice(rounded, torch.device("cpu"), 100)
    assert "slower than float32" in line and "\n" not in line
    assert advice_module.advice(config, torch.device("cpu"), 100) == []


def test_a_graph_needs_a_gpu(tmp_path, config):
    with pytest.raises(TrainingError, match="needs a GPU and one process, and the device is cpu"):
        train(config, tmp_path / "run", place=Place(device="cpu", graph=True))
    assert not (tmp_path / "run").exists()


def test_a_recorded_step_is_the_step(config, monkeypatch):
    """What a CUDA graph replays, with a stand-in for it: the same function on the same tensors, in place."""
    def record(function, x):
        outputs = tuple(x.new_zeros(()) for _ in range(2))

        def replay():
            optimizer.zero_grad()
            for output, value in zip(outputs, function(x)):
                output.copy_(value)
        return replay, outputs
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs.Graphed, "_run_aside", lambda self, x: self.function(x))
    images = load_images(config.data, "train")
    config, ends = dataclasses.replace(config, total_steps=12), {}
    for graph in (False, True):
        torch.manual_seed(0)
        jet = Jet(config.model).double()  # else the noise of key biases, whose gradient is 0, is all that differs
        optimizer = recipe.make_optimizer(jet.parameters(), config, graph)
        step = recipe.make_step(jet, optimizer, config, graph=graph)
        batches = [training_batch(images, config.batch_size, 0, number).double() for number in range(6)]
        batches[5] = batches[5] * float("nan")  # nothing is updated from it on
        results = [step(x, number) for number, x in enumerate(batches + batches[:1], 1)]
        assert len({loss.data_ptr() for loss, _ in results}) == len(results)  # none is overwritten by the next
        ends[graph] = results, [parameter.detach() for parameter in jet.parameters()]
    for eager, recorded in zip(ends[False][0][:5], ends[True][0][:5]):
        torch.testing.assert_close(recorded, eager, rtol=1e-6, atol=0)
    assert not ends[True][0][5][0].isfinite()
    for eager, recorded in zip(ends[False][1], ends[True][1]):
        torch.testing.assert_close(recorded, eager, rtol=0, atol=1e-7)  # lr is float32
    with pytest.raises(ValueError, match="of shape"):
        step(batches[0][:3], 8)
