"""A finished run, trained further by another (--extend-to), and packed to be read elsewhere."""
import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

import convert
import recipe
import train as train_module
from convert import load_jet
from data import load_images, training_batch
from evaluate import evaluate
from harness.checkpoint import read_tensors
from harness.errors import CheckpointError, TrainingError
from harness.history import read_history
from harness.run_folder import read_done, read_per_image
from jet import JetConfig
from recipe import learning_rate, make_optimizer, schedule, training_step
from train import TrainConfig, train, weights_names

MODEL = JetConfig(image_size=8, num_couplings=2, kinds=("channels", "spatial"), block_depth=1, emb_dim=8, num_heads=2, actnorm=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """first: a finished run of 6 steps. longer: it, extended to 10. half: stopped after step 3."""
    home = tmp_path_factory.mktemp("home")
    np.save(home / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    config = TrainConfig(model=MODEL, data=str(home / "images.npy"), batch_size=8, total_steps=6, lr=1e-2)
    train(config, home / "first", quiet=True)
    train(config, home / "half", stop_after=3, quiet=True)
    extend(home / "first", "longer", 10)
    convert.main(["pack", str(home / "first"), str(home / "packed")])
    return home


def extend(run, name, steps, *flags):
    train_module.main(["--init-from", str(run), "--extend-to", str(steps), "--run-dir", str(run.parent / name), *map(str, flags)])
    return run.parent / name


def weights(run):
    return read_tensors(run / "checkpoint.pt")["model"]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def content(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# ---- extended

def test_it_takes_the_steps_that_come_next_from_the_weights_and_moments_of_the_first(home):
    config = TrainConfig.from_dict(read_done(home / "longer")["config"])
    first, jet = read_tensors(home / "first/checkpoint.pt"), load_jet(home / "first")
    assert (config.extends, config.total_steps, config.init) == (6, 10, convert.weights_id(home / "first"))
    optimizer, images = make_optimizer(jet.parameters(), config), load_images(config.data, "train")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": first["optimizer"]})
    for step in range(6, 10):
        training_step(jet, optimizer, training_batch(images, 8, config.seed, step), step, config)
    assert equal(jet.state_dict(), weights(home / "longer")) and not equal(first["model"], weights(home / "longer"))


def test_steps_count_on_and_the_schedule_is_its_own(home):
    history = read_history(home / "longer")
    assert history.steps["step"].tolist() == [7, 8, 9, 10] and history.steps["images_seen"].tolist() == [56, 64, 72, 80]
    assert np.allclose(history.steps["lr"], [1e-2 * schedule(step, 4) for step in range(4)])
    assert learning_rate(6, TrainConfig.from_dict(history.record)) == 0 and history.restarts == []
    log = (home / "longer/log.txt").read_text()
    assert "goes on from the end of the run with the weights sha256-" in log and "missing" not in log
    assert [row["step"] for row in history.done["rows"]] == [10, 10]


def test_the_first_run_stays_as_it_is_and_the_same_command_ends_at_once(home, capsys):
    before, longer = content(home / "first"), content(home / "longer")
    extend(home / "first", "longer", 10)
    with pytest.raises(SystemExit, match="belongs to another configuration: extends was 0 and is now 6"):
        extend(home / "first", "first", 10)
    assert content(home / "first") == before and content(home / "longer") == longer


def test_an_extension_that_was_interrupted_ends_with_the_same_bits_and_needs_the_first_no_more(home):
    config = TrainConfig.from_dict(read_done(home / "longer")["config"])
    train(config, home / "parts", init_from=home / "first", stop_after=8, quiet=True)
    assert read_history(home / "parts").steps["step"].tolist() == [7, 8]
    train(config, home / "parts", quiet=True)
    assert equal(weights(home / "parts"), weights(home / "longer")) and read_history(home / "parts").restarts == [8]


def test_an_evaluation_at_its_beginning_is_the_first_runs(home):
    run = extend(home / "first", "often", 9, "--eval_every", 3, "--lr", 1e-3)
    assert [row["step"] for row in read_done(run)["rows"]] == [9, 9] and read_done(run)["config"]["lr"] == 1e-3
    again = extend(run, "again", 12)
    assert read_done(again)["config"]["extends"] == 9 and read_done(again)["config"]["lr"] == 1e-3


@pytest.mark.parametrize("run, flags, message", [
    ("first", ["6"], "--extend-to 6: must be above 6"), ("half", ["9"], "must be the folder of a finished run"),
    ("none", ["9"], "no such file"), ("first", ["9", "--batch_size", "4"], "batch_size: is that of"),
    ("first", ["9", "--model.emb_dim", "4"], "emb_dim: is that of"), ("first", ["9", "--total_steps", "4"], "total_steps: is that of"),
    ("first", ["9", "--data", "cifar10-subset"], "other images than"), ("first", ["9", "--lr", "-1"], "lr=-1.0"),
    ("packed", ["9"], "has no moments of step 6")])
def test_what_cannot_be_extended_is_one_line(home, run, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        extend(home / run, "refused", *flags)
    said = str(ended.value) if ended.value.code != 2 else capsys.readouterr().err
    assert message in said and said.strip().count("\n") == 0
    assert not (home / "refused/checkpoint.pt").exists()


def test_without_a_run_to_extend_it_says_so():
    with pytest.raises(SystemExit, match="--init-from must be the folder of a finished run of ours, and is not given"):
        train_module.main(["--extend-to", "9"])


@pytest.mark.parametrize("changes", [{"extends": 6}, {"extends": 6, "init": "x"}, {"extends": -1, "init": "x"}, {"extends": True}])
def test_no_configuration_extends_nothing(changes):
    with pytest.raises(ValueError, match="extends=.*must be a step before the last, 6"):
        TrainConfig(total_steps=6, **changes)


def test_an_extension_in_float64_begins_with_all_digits(home):
    config = dataclasses.replace(TrainConfig.from_dict(read_done(home / "first")["config"]), precision="float64", total_steps=2)
    train(config, home / "double", quiet=True)
    longer = dataclasses.replace(config, extends=2, total_steps=3, init=convert.weights_id(home / "double"))
    train(longer, home / "double-longer", init_from=home / "double", quiet=True)  # one step, with a learning rate of 0
    assert equal(weights(home / "double"), weights(home / "double-longer"))


# ---- packed

def test_a_packed_run_is_a_finished_run_elsewhere(home, tmp_path, monkeypatch):
    folder = shutil.copytree(home / "packed", tmp_path / "elsewhere")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "checkpoint.pt", "config.json", "done.json", "log.txt",
                                                              "metrics.csv", "per_image.npy"]
    shutil.copy(home / "images.npy", tmp_path / "images.npy")
    find = recipe.data_id
    monkeypatch.setattr(recipe, "data_id", lambda path: find(path) if path != str(home / "images.npy") else pytest.fail("gone"))
    done = read_done(folder)
    assert done == read_done(home / "first") and equal(weights(folder), weights(home / "first"))
    assert evaluate(load_jet(folder), load_images(tmp_path / "images.npy", "test"))["bits_per_dim"] == done["bits_per_dim"]
    assert np.array_equal(read_per_image(folder, done), read_per_image(home / "first", done))
    assert weights_names(folder) == weights_names(home / "first") and len(weights_names(folder)) == 2
    assert read_history(folder).steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert f"{done['bits_per_dim']:.4f} ±" in (folder / "README.md").read_text()
    assert "optimizer" not in read_tensors(folder / "checkpoint.pt")


def test_with_moments_and_its_images_it_is_extended_elsewhere_to_the_same_bits(home, tmp_path):
    convert.main(["pack", str(home / "first"), str(tmp_path / "packed"), "--moments"])
    shutil.copy(home / "images.npy", tmp_path / "photos.npy")
    longer = extend(tmp_path / "packed", "longer", 10, "--data", tmp_path / "photos.npy")
    assert equal(weights(longer), weights(home / "longer"))


def test_what_is_not_packed_is_one_line_and_leaves_nothing(home, tmp_path):
    damaged, torn = (shutil.copytree(home / "first", tmp_path / name) for name in ("damaged", "torn"))
    np.save(damaged / "per_image.npy", np.zeros(40, np.float32))
    text = json.loads((torn / "done.json").read_text())
    (torn / "done.json").write_text(json.dumps(text | {"weights_sha256": "0" * 64}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, message in (([home / "half", tmp_path / "out"], "no folder of a finished run"),
                               ([home / "images.npy", tmp_path / "out"], "no folder of a finished run"),
                               ([home / "first", tmp_path / "full"], "is there: give a new folder"),
                               ([home / "first", tmp_path / "full/a"], "is there: give a new folder"),
                               ([home / "first", tmp_path / "none/out"], "there is no folder"),
                               ([home / "packed", tmp_path / "out", "--moments"], "lacks what is to be packed"),
                               ([torn, tmp_path / "out"], "holds other weights"), ([damaged, tmp_path / "out"], "their mean is")):
        with pytest.raises(SystemExit, match=message) as ended, warnings.catch_warnings():
            convert.main(["pack", *map(str, arguments)])
        assert "\n" not in str(ended.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before and (tmp_path / "full/a").read_text() == "precious"


def test_a_full_disk_leaves_no_half_of_it(home, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(convert, "write_atomically", full)
    with pytest.raises(SystemExit, match="No space left"):
        convert.main(["pack", str(home / "first"), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
    with pytest.raises((CheckpointError, TrainingError)):
        read_done(tmp_path / "out") or load_jet(tmp_path / "out")
