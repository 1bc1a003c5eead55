"""Runs that begin with other weights: which ones is checked, and only weights are taken.

Restarts need them no more.
"""
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_module
from convert import load_jet, weights_id
from data import load_images, training_batch
from evaluate import evaluate
from harness import checkpoint
from harness.checkpoint import read_tensors
from harness.errors import CheckpointError, TrainingError
from jet import JetConfig, bits_per_dim
from train import TrainConfig, train, weights_names

GOLDEN = Path(__file__).parent / "golden"
MODEL = JetConfig(image_size=8, num_couplings=2, kinds=("channels", "spatial"), block_depth=1, emb_dim=8, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fine_tuning")


@pytest.fixture(scope="module")
def first(folder):
    """A finished run: pretraining."""
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    config = TrainConfig(model=MODEL, data=str(folder / "images.npy"), batch_size=16, total_steps=6, lr=1e-2)
    train(config, folder / "first", quiet=True)
    return config


@pytest.fixture
def config(first):
    return dataclasses.replace(first, total_steps=4, lr=1e-3, init=first.hash, seed=3)


def weights(run_dir):
    return read_tensors(run_dir / "checkpoint.pt")["model"]


def test_weights_are_named_by_what_they_are(first, folder, tmp_path):
    done = json.loads((folder / "first/done.json").read_text())
    name = f"sha256-{done['weights_sha256'][:16]}"
    assert weights_id(folder / "first") == weights_id(folder / "first/checkpoint.pt") == name
    assert weights_names(folder / "first") == (name, first.hash)  # known before it is trained
    train(first, tmp_path / "part", stop_after=2, quiet=True)
    assert weights_names(tmp_path / "part") == (weights_id(tmp_path / "part"),) != (name,)
    for name in ("jet_pytorch_port.pt", "jet_channels_spatial.npz"):
        shutil.copy(GOLDEN / name, tmp_path / name)
        assert weights_id(tmp_path / name) == weights_id(GOLDEN / name)
    with open(tmp_path / name, "ab") as file:
        file.write(b"1")
    assert weights_id(tmp_path / name) != weights_id(GOLDEN / name)


def test_official_weights_are_trained_further(tmp_path):
    official = GOLDEN / "jet_channels_spatial.npz"
    jet = load_jet(official)
    C, H, W = jet.config.image_shape
    images = np.random.default_rng(0).integers(0, 256, (8, H, W, C), np.uint8)
    np.save(tmp_path / "images.npy", images)
    config = TrainConfig(model=jet.config, data=str(tmp_path / "images.npy"), batch_size=4,
                         total_steps=1, init=weights_id(official))
    train(config, tmp_path / "run", init_from=official, quiet=True)
    ours = weights(tmp_path / "run")  # the first step has a learning rate of 0
    assert all(torch.equal(tensor, ours[name]) for name, tensor in jet.state_dict().items())


def test_the_first_step_sees_the_given_weights_and_fresh_moments(first, folder, config, tmp_path):
    train(config, tmp_path / "run", init_from=folder / "first", stop_after=1, quiet=True)
    x = training_batch(load_images(config.data, "train"), config.batch_size, config.seed, 0)
    with torch.no_grad():
        expected = bits_per_dim(*load_jet(folder / "first")(x)).mean().item()
    step, _, loss, _, lr, _ = (tmp_path / "run/metrics.csv").read_text().splitlines()[1].split(",")
    assert np.isclose(float(loss), expected, rtol=1e-6)
    assert (step, float(lr)) == ("1", 0)  # a new warm-up, too
    moments = read_tensors(tmp_path / "run/checkpoint.pt")["optimizer"]
    assert {state["step"].item() for state in moments.values()} == {1}


@pytest.mark.parametrize("changes", [{}, {"actnorm": True, "invertible_dense": True}], ids=["plain", "switches"])
def test_four_steps_are_two_and_two_without_the_first_weights(first, config, tmp_path, changes):
    model = dataclasses.replace(MODEL, **changes)
    before = dataclasses.replace(first, model=model)
    train(before, tmp_path / "first", quiet=True)
    config = dataclasses.replace(config, model=model, init=before.hash)
    whole = train(config, tmp_path / "whole", init_from=tmp_path / "first", quiet=True)
    train(config, tmp_path / "parts", init_from=tmp_path / "first", stop_after=2, quiet=True)
    parts = train(config, tmp_path / "parts", quiet=True)
    assert whole["rows"] == parts["rows"]
    one, two, other = (weights(tmp_path / name) for name in ("whole", "parts", "first"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["couplings.0.net.posemb"], other["couplings.0.net.posemb"])
    # not another seed's permutation
    assert torch.equal(one["couplings.0.order"], other["couplings.0.order"])


def test_actnorm_keeps_the_given_weights(first, config, tmp_path):
    model = dataclasses.replace(MODEL, actnorm=True)
    before = dataclasses.replace(first, model=model)
    train(before, tmp_path / "first", quiet=True)
    config = dataclasses.replace(config, model=model, init=before.hash)
    train(config, tmp_path / "run", init_from=tmp_path / "first", stop_after=1, quiet=True)
    # the first step has a learning rate of 0
    one, two = weights(tmp_path / "first"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_steps_evaluate_the_given_weights(first, folder, config, tmp_path):
    config = dataclasses.replace(config, total_steps=0)
    done = train(config, tmp_path / "run", init_from=folder / "first", quiet=True)
    expected = evaluate(load_jet(folder / "first"), load_images(config.data, "test"))
    assert done["bits_per_dim"] == expected["bits_per_dim"]
    assert [row["step"] for row in done["rows"]] == [0, 0]
    one, two = weights(folder / "first"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "run/done.json").unlink()  # killed in its evaluation
    assert train(config, tmp_path / "run", quiet=True)["rows"] == done["rows"]


def test_what_does_not_fit_is_refused_in_one_line(first, folder, config, tmp_path):
    def refused(match, error=TrainingError, init_from=folder / "first", **changes):
        with pytest.raises(error, match=match) as raised:
            train(dataclasses.replace(config, **changes), tmp_path / "run", init_from=init_from, quiet=True)
        assert "\n" not in str(raised.value) and not (tmp_path / "run/checkpoint.pt").exists()

    refused(f"begins with the weights {first.hash}: give the run folder", init_from=None)
    refused(f"holds the weights {weights_id(folder / 'first')}, and this run begins with "
            "0123456789", init="0123456789")
    refused("no such file", CheckpointError, folder / "none.pt")
    for field, value in {"emb_dim": 16, "num_heads": 4, "block_depth": 2, "num_couplings": 4,
                         "kinds": ("channels",), "scale_factor": 3.0, "patch_size": 2,
                         "split_mode": "masking", "actnorm": True}.items():
        refused(f"{field}=.* was given, but the file says", CheckpointError,
                model=dataclasses.replace(MODEL, **{field: value}))
    np.save(tmp_path / "larger.npy", np.zeros((20, 16, 16, 3), np.uint8))
    refused("image_size=16 was given, but the file says 8", CheckpointError,
            data=str(tmp_path / "larger.npy"), model=dataclasses.replace(MODEL, image_size=16))


def test_the_command_line_takes_the_model_from_the_weights(first, folder, tmp_path, capsys, monkeypatch):
    read, real = [], checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: read.append(path) or real(path))
    flags = ["--data", first.data, "--batch_size", "16", "--total_steps", "2", "--run-dir", str(tmp_path / "run")]
    more = ["--init-from", str(folder / "first"), "--lr", "1e-3"]
    train_module.main([*flags, *more])
    assert len(read) == 2  # for the configuration, and to begin: they may be large
    config = TrainConfig.from_dict(read_tensors(tmp_path / "run/checkpoint.pt")["config"])
    assert config.model == MODEL and config.init == weights_id(folder / "first")
    assert config.lr == 1e-3
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_module.main([*flags, *more, "--model.emb_dim", "16"])
    assert "emb_dim=16 was given, but the file says 8" in str(stop.value.code)
    # the same run without its first weights is another configuration
    with pytest.raises(SystemExit) as stop:
        train_module.main(flags)
    assert f"init was '{config.init}' and is now ''" in str(stop.value.code)


@pytest.mark.parametrize("damage", [{"config": "text"}, {"config": {"model": 3}}, {"step": float("inf")}])
def test_first_weights_of_a_damaged_configuration_are_one_line(first, folder, tmp_path, damage):
    torch.save(read_tensors(folder / "first/checkpoint.pt") | damage, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match="configuration is damaged"):
        train_module.weights_config(tmp_path / "damaged.pt")
