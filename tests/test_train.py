"""Training and evaluation: the same bits after every restart, each image once, and clear refusals."""
import dataclasses
import json
import math
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_module
from convert import CheckpointError, load_jet, read_tensors
from data import dequantize, evaluation_noise, load_images, training_batch
from jet import Jet, JetConfig, bits_per_dim
from train import NonFiniteError, TrainConfig, TrainingError, evaluate, schedule, train

ROOT = Path(__file__).resolve().parents[1]
MODEL = JetConfig(image_size=8, num_couplings=3, kinds=("channels", "spatial"), block_depth=1, emb_dim=8, num_heads=2)


@pytest.fixture
def images(tmp_path):
    """A .npy file of 40 small real images, made for each test."""
    np.save(tmp_path / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    return tmp_path / "images.npy"


@pytest.fixture
def config(images):
    return TrainConfig(model=MODEL, data=str(images), batch_size=16, total_steps=4, lr=1e-2)


def checkpoint(run_dir):
    return read_tensors(run_dir / "checkpoint.pt")


def same_bits(one, two):
    """Equal nested values, tensors to the bit; times aside."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one if key != "seconds")
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return one == two or one != one and two != two


@pytest.mark.parametrize("changes", [{}, {"actnorm": True, "invertible_dense": True}, {"block": "cnn"}],
                         ids=["plain", "switches", "cnn"])
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
    monkeypatch.setattr(train_module, "training_step", None)
    assert train(config, tmp_path / "run", quiet=True) == done
    assert done["num_images"] == 40 and done["rows"][-1]["split"] == "test" and done["threads"] == 1
    assert done["bits_per_dim"] == done["rows"][-1]["bits_per_dim"]


def test_training_lowers_bits_and_the_seed_matters(tmp_path, config):
    config = dataclasses.replace(config, total_steps=30)
    fresh = evaluate(Jet(MODEL), load_images(config.data, "test"))["bits_per_dim"]
    results = [train(dataclasses.replace(config, seed=seed), tmp_path / str(seed), quiet=True)["bits_per_dim"]
               for seed in (0, 1)]
    assert max(results) < fresh - 0.2 and results[0] != results[1]


def test_weights_come_from_the_seed_and_actnorm_from_the_first_batch(tmp_path, config):
    """The learning rate of the first step is 0: after it the weights are still the initial ones."""
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, actnorm=True))
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
        jet = Jet(MODEL)
        before = jet.couplings[0].net.final_proj.bias.detach().clone()
        optimizer = train_module.make_optimizer(jet.parameters(), settings)
        train_module.training_step(jet, optimizer, x, step, settings)
        return optimizer.param_groups[0]["lr"], (jet.couplings[0].net.final_proj.bias - before).abs().max().item()

    assert change(2, warmup_fraction=0.5)[0] == pytest.approx(config.lr * 2 / 5)
    assert change(1)[0] == pytest.approx(config.lr)
    assert change(1)[1] == pytest.approx(config.lr, rel=1e-3)  # Adam's first step: lr for each parameter
    assert change(1, clip_norm=1e-12)[1] < 1e-3 * config.lr  # unless the gradient is far below its epsilon


def test_bfloat16_trains_in_other_bits_to_a_float32_result(tmp_path, config):
    config = dataclasses.replace(config, total_steps=20)
    half, full = (train(dataclasses.replace(config, precision=precision), tmp_path / precision, quiet=True)
                  for precision in ("bfloat16", "float32"))
    assert half["bits_per_dim"] != full["bits_per_dim"]
    assert abs(half["bits_per_dim"] - full["bits_per_dim"]) < 0.02
    state = checkpoint(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32, torch.int64}
    assert evaluate(load_jet(tmp_path / "bfloat16"), load_images(config.data, "test"))["bits_per_dim"] == half["bits_per_dim"]


def test_sigkill_and_the_same_command_end_with_the_same_bits(tmp_path, config):
    flags = [sys.executable, ROOT / "train.py", "--data", config.data, "--batch_size", "16", "--total_steps", "60",
             "--model.num_couplings", "3", "--model.block_depth", "1", "--model.emb_dim", "8", "--model.num_heads", "2",
             "--model.kinds", "channels", "spatial", "--lr", "1e-2", "--checkpoint-every-s", "0"]
    killed = subprocess.Popen([*flags, "--run-dir", tmp_path / "killed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "killed/checkpoint.pt").exists():
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    step = checkpoint(tmp_path / "killed")["step"]
    assert 0 < step < 60
    with open(tmp_path / "killed/metrics.csv", "a") as file:
        file.write("10,16")  # cut in mid-line
    again = subprocess.run([*flags, "--run-dir", tmp_path / "killed"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "bits/dim on 40 test images" in again.stdout
    whole = train(dataclasses.replace(config, total_steps=60), tmp_path / "whole", quiet=True)
    assert same_bits(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("killed", "whole")]
    assert [line.split(",")[:5] for line in lines[0]] == [line.split(",")[:5] for line in lines[1]]
    assert f"resumed at step {step}" in (tmp_path / "killed/log.txt").read_text()
    assert json.loads((tmp_path / "killed/done.json").read_text())["bits_per_dim"] == whole["bits_per_dim"]


def test_a_changed_config_is_refused_by_field(tmp_path, config):
    train(config, tmp_path / "run", stop_after=1, quiet=True)
    changed = dataclasses.replace(config, lr=2e-2, model=dataclasses.replace(MODEL, block_depth=2))
    with pytest.raises(TrainingError, match="lr was 0.01 and is now 0.02; model.block_depth was 1 and is now 2"):
        train(changed, tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_run_that_could_not_start_leaves_its_folder_unclaimed(tmp_path, config):
    with pytest.raises(TrainingError, match="has images of 8 x 8 x 3; the model takes image_size=16"):
        train(dataclasses.replace(config, model=dataclasses.replace(MODEL, image_size=16)), tmp_path / "run", quiet=True)
    assert train(config, tmp_path / "run", stop_after=1, quiet=True) == {"step": 1}


def test_a_second_process_on_a_run_folder_is_refused(tmp_path, config, monkeypatch):
    def second(*arguments, original=train_module.training_step):
        with pytest.raises(TrainingError, match="another process is at this run"):
            train(config, tmp_path / "run", quiet=True)
        return original(*arguments)
    monkeypatch.setattr(train_module, "training_step", second)
    assert train(config, tmp_path / "run", stop_after=1, quiet=True) == {"step": 1}


@pytest.mark.parametrize("change, message", [
    (lambda saved: saved["config"].update(lr=1.0), "lr was 1.0 and is now 0.01"),
    (lambda saved: saved.update(config=None), "belongs to another configuration"),
    (lambda saved: saved.update(format=None), "not a checkpoint of a run"),
    (lambda saved: saved.update(step=5), "the step does not fit"),
    (lambda saved: saved.update(step="2"), "the step does not fit"),
    (lambda saved: saved["optimizer"].clear(), "optimizer's state"),
    (lambda saved: saved["optimizer"][0].update(exp_avg=torch.zeros(1)), "optimizer's state"),
    (lambda saved: saved["model"]["couplings.0.order"].zero_(), "not a permutation"),
    (lambda saved: saved["model"].popitem(), "do not fit")])
def test_a_checkpoint_that_is_not_this_runs_is_refused(tmp_path, config, change, message):
    train(config, tmp_path / "run", stop_after=2, quiet=True)
    saved = checkpoint(tmp_path / "run")
    change(saved)
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    with pytest.raises((CheckpointError, TrainingError), match=message) as error:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)


def test_damaged_notes_of_a_run_are_mended_or_refused(tmp_path, config):
    train(config, tmp_path / "run", stop_after=2, quiet=True)
    (tmp_path / "run/metrics.csv").write_bytes(b"header\n\xff\xfe,,\nabc,1,2,3,4,5\n1,16,8.0,1.0,0.0,0.1\n3,48,8.0,1.0,0.0,0.1\n2,32,8")
    train(config, tmp_path / "run", quiet=True)
    steps = [line.split(",")[0] for line in (tmp_path / "run/metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "4"]
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


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_is_not_finite_stops_before_it_updates(tmp_path, config, monkeypatch, what):
    train(config, tmp_path / "run", stop_after=2, quiet=True)
    before = checkpoint(tmp_path / "run")

    def broken(z, logdet):
        return bits_per_dim(z, logdet) * math.nan if what == "loss" else bits_per_dim(z, logdet).abs().sqrt() * 0 + (
            z.flatten(1).sum(1) * 0).sqrt()
    monkeypatch.setattr(train_module, "bits_per_dim", broken)
    with pytest.raises(NonFiniteError, match=r"not finite at step 2: loss \S+ bits/dim, gradient norm nan, lr 0.0075"):
        train(config, tmp_path / "run", quiet=True)
    assert same_bits(checkpoint(tmp_path / "run"), before)


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
        optimizer, expected = train_module.make_optimizer([parameter], config), 1.0
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
    results = [evaluate(jet, photos, batch_size=n, per_image=True) for n in (1, 7, 512)]
    for result in results:
        assert result["num_images"] == len(result["bits_per_dim_per_image"]) == 512
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

def test_a_result_that_is_not_finite_ends_the_program_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", "cifar10-subset", "--model.num_couplings", "2",
               "--model.block_depth", "1", "--model.emb_dim", "8", "--model.num_heads", "2", "--batch_size", "4",
               "--total_steps", "2", "--lr", "1e30", "--run-dir", tmp_path / "run"]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and last.startswith("train.py: error: ") and "Traceback" not in ended.stderr
    assert "not finite" in last and not (tmp_path / "run/done.json").exists()


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
            if field.name != "model":
                assert f"--{prefix}{field.name} " in text and field.metadata["help"].split()[0] in text
    assert text.count("(default: ") >= 30


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
    (["--threads", "0"], "threads=0: must be from 1 to 1024"),
    (["--device", "mps"], "device 'mps': must be auto, cpu or cuda"),
    (["--device", "tpu"], "device 'tpu': must be auto, cpu or cuda"),
    (["--run-dir", "/dev/null/run"], "/dev/null/run: cannot be a run folder")])
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
        train_module.pick_device("cuda")
