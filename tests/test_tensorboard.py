"""--log tensorboard: the events say what metrics.csv says, and a restart goes on in them."""
import dataclasses
import shutil
import sys

import numpy as np
import pytest
import torch

from data import load_images
from harness.errors import TrainingError
from harness.events import draw_samples
from harness.history import read_history
from harness.place import Place
from harness.run_folder import read_done
from jet import Jet, JetConfig
from sweeps import sweep
from train import TrainConfig, main, train

MODEL = JetConfig(image_size=8, num_couplings=2, block_depth=1, emb_dim=8, num_heads=2)


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    return TrainConfig(model=MODEL, data=str(tmp_path / "images.npy"), batch_size=8, total_steps=6, lr=1e-2, eval_every=2)


def run(config, folder, stop_after=None):
    return train(config, folder, stop_after, place=Place(log="tensorboard"), quiet=True)


def shown(folder):
    """{tag: [(step, value)]} of what TensorBoard shows of a run: scalars, and of pictures and texts their size."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found |= {tag: [(event.step, (event.width, event.height)) for event in events.Images(tag)] for tag in events.Tags()["images"]}
    return found | {tag: [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors(tag)]
                    for tag in events.Tags()["tensors"]}


# ---- without the package

def test_an_absent_package_is_one_line_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--log tensorboard: needs the package tensorboard: pip install tensorboard"
    with pytest.raises(TrainingError, match=message):
        Place(log="tensorboard")
    with pytest.raises(SystemExit, match=f"^train.py: error: {message}"):
        main(["--data", "cifar10-subset", "--run-dir", str(tmp_path / "run"), "--log", "tensorboard"])
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_samples_are_the_same_each_time_and_of_each_class():
    assert draw_samples(Jet(MODEL)).shape == (16, 8, 8, 3)
    torch.manual_seed(0)
    jet = Jet(dataclasses.replace(MODEL, context_dim=3))
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = torch.random.get_rng_state()
    first = draw_samples(jet)
    assert first.shape == (3, 8, 8, 3) and (first == draw_samples(jet)).all()
    assert torch.equal(state, torch.random.get_rng_state())  # no run's bits change


# ---- with it

@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")


@pytest.mark.tensorboard
def test_events_are_what_metrics_csv_has_the_evaluations_samples_and_the_configuration(tmp_path, config, tensorboard):
    done, found = run(config, tmp_path / "run"), shown(tmp_path / "run")
    assert (tmp_path / "run/log.txt").read_text().count("step 4: ") == 2
    for column, values in read_history(tmp_path / "run").steps.items():
        if column != "step":
            assert np.allclose(found[f"training/{column}"], list(enumerate(values, 1)), rtol=1e-6)
    for split in ("train", "test"):
        for name in ("bits_per_dim", "bits_per_dim_se", "logdet_nats"):
            expected = [(row["step"], row[name]) for row in done["rows"] if row["split"] == split]
            assert np.allclose(found[f"{split}/{name}"], expected, rtol=1e-6)
    assert found["samples"] == [(step, (64, 16)) for step in (2, 4, 6)]  # 16 of 8 x 8 pixels
    (step, text), = found["configuration/text_summary"]
    assert step == 0 and b'"emb_dim": 8' in text


@pytest.mark.tensorboard
def test_the_log_changes_no_bit(tmp_path, config, tensorboard):
    plain = train(config, tmp_path / "plain", quiet=True)
    assert run(config, tmp_path / "run")["weights_sha256"] == plain["weights_sha256"]


@pytest.mark.tensorboard
@pytest.mark.parametrize("stop, kept", [(3, 3), (2, 2), (5, 3), (6, 3), (5, 0)],
                         ids=["stopped", "stopped as it had evaluated", "killed", "killed at the end", "killed before a checkpoint"])
def test_a_restart_goes_on_in_the_same_events_with_no_step_twice(tmp_path, config, tensorboard, stop, kept):
    folder = tmp_path / "run"
    if kept < stop:  # what a kill leaves: events of later steps than the checkpoint
        if kept:
            train(config, tmp_path / "until", kept, quiet=True)
        run(config, folder, stop)
        for path in folder.glob("checkpoint*.pt"):
            path.unlink()
        (folder / "done.json").unlink(missing_ok=True)
        if kept:
            shutil.copy(tmp_path / "until/checkpoint.pt", folder / "checkpoint.pt")
    else:
        run(config, folder, stop)
    run(config, folder)
    run(config, tmp_path / "whole")
    found, whole = shown(folder), shown(tmp_path / "whole")
    del found["training/seconds"], whole["training/seconds"]
    assert found == whole and len(list((folder / "tensorboard").iterdir())) == 2
    assert [step for step, _ in found["training/lr"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.tensorboard
def test_an_extension_counts_on_in_its_own_events(tmp_path, config, tensorboard):
    run(config, tmp_path / "first")
    main(["--init-from", str(tmp_path / "first"), "--extend-to", "9", "--run-dir", str(tmp_path / "longer"), "--log", "tensorboard"])
    found = shown(tmp_path / "longer")
    assert [step for step, _ in found["training/lr"]] == [7, 8, 9] and found["configuration/text_summary"][0][0] == 6


@pytest.mark.tensorboard
def test_a_sweep_writes_them_for_each_run(tmp_path, tensorboard):
    sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
    import tiny_experiment
    sweep.main(tiny_experiment.EXPERIMENT, ["--runs-dir", str(tmp_path), "--results-dir", str(tmp_path), "--figures-dir",
                                            str(tmp_path), "--log", "tensorboard", "--jobs", "1"])
    runs = [path.parent for path in tmp_path.glob("*/*/done.json")]
    assert len(runs) == 3 and all(len(shown(folder)["training/lr"]) == 4 for folder in runs)


@pytest.mark.tensorboard
def test_nothing_is_written_through_a_link_and_samples_that_overflow_end_no_run(tmp_path, config, tensorboard, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").symlink_to(tmp_path / "mine")
    with pytest.raises(TrainingError, match="is a link"):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "run/tensorboard").unlink()
    monkeypatch.setattr(Jet, "sample", lambda *_, **__: (_ for _ in ()).throw(ValueError("not finite")))
    run(config, tmp_path / "run")
    assert "no samples for TensorBoard: not finite" in (tmp_path / "run/log.txt").read_text()
    assert read_done(tmp_path / "run") and "samples" not in shown(tmp_path / "run")
