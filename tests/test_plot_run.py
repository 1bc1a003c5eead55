"""Pictures of runs: what a folder tells of its run, both parts of one that was resumed, and what differs."""
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data import load_images
from experiments import plot_run
from harness.errors import TrainingError
from harness.history import read_history
from jet import JetConfig
from paper_figures import training
from paper_figures.per_image import paired_difference
from sweeps import sweep
from train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_experiment

MODEL = JetConfig(image_size=8, num_couplings=2, block_depth=1, emb_dim=8, num_heads=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs: cut (stopped after step 3 and resumed), half (stopped there), other (other settings)."""
    home = tmp_path_factory.mktemp("home")
    np.save(home / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    config = TrainConfig(model=MODEL, data=str(home / "images.npy"), batch_size=8, total_steps=6, lr=1e-2, eval_every=2)
    train(config, home / "cut", stop_after=3, quiet=True)
    shutil.copytree(home / "cut", home / "half")
    train(config, home / "cut", quiet=True)
    other = dataclasses.replace(config, batch_size=4, lr=5e-3, model=dataclasses.replace(MODEL, kinds=("channels", "spatial")))
    train(other, home / "other", quiet=True)
    return home


def said(capsys, *arguments):
    plot_run.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_folder_tells_steps_evaluations_and_restarts_of_a_run_so_far(home):
    cut, half = read_history(home / "cut"), read_history(home / "half")
    assert cut.steps["step"].tolist() == [1, 2, 3, 4, 5, 6] and cut.restarts == [3]
    assert half.steps["step"].tolist() == [1, 2, 3] and half.restarts == [] and half.done is None
    exact = {(row["split"], row["step"]): (row["bits_per_dim"], row["bits_per_dim_se"]) for row in cut.done["rows"]}
    assert {(split, step): (bits, error) for split, rows in cut.evaluations.items() for step, bits, error in rows} == exact
    for split, ((step, bits, error),) in half.evaluations.items():  # from its log, where no result is yet
        assert step == 2 and np.allclose((bits, error), exact[split, 2], atol=6e-5)


def test_a_line_that_is_half_written_and_one_that_comes_again_are_no_steps(home, tmp_path):
    shutil.copytree(home / "half", tmp_path / "run")
    path = tmp_path / "run/metrics.csv"
    text = path.read_text()
    path.write_text(text + text.splitlines()[1].replace("1,8,", "1,8,9") + "\n4,32,5.0,1.0,0.1,2.")
    steps = read_history(tmp_path / "run").steps
    assert steps["step"].tolist() == [1, 2, 3] and steps["bits_per_dim"][0] > 90  # the last of the two


def test_the_picture_of_a_resumed_run_has_both_parts_and_the_seam(home, drawn, capsys):
    assert "6 of 6 steps" in (text := said(capsys, home / "cut")) and "restarted after step 3" in text
    (figure, name), = drawn
    assert name == "plot_run" and len(figure.axes) == 4
    for panel in figure.axes:
        seams = [line.get_xdata()[0] for line in panel.lines if line.get_xdata()[0] == line.get_xdata()[-1]]
        assert seams == [3] and any(patch.get_x() == 3 and patch.get_width() == 3 for patch in panel.patches)
    bits = figure.axes[0].lines[0]
    assert bits.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert bits.get_ydata().tolist() == read_history(home / "cut").steps["bits_per_dim"].tolist()
    evaluated = [line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert evaluated == [[2, 4, 6]] * 2 and "resumed after step 3" in figure.axes[0].texts[0].get_text()


def test_of_two_runs_it_says_which_settings_differ_and_by_how_much_they_do(home, drawn, capsys):
    text = said(capsys, home / "cut", home / "other")
    assert [line.split(":")[0].strip() for line in text.splitlines()[3:-1]] == ["batch_size", "lr", "model.kinds"]
    assert "  batch_size: 8, 4\n" in text and "  lr: 0.01, 0.005\n" in text
    mean, error = paired_difference(*(np.load(home / name / "per_image.npy") for name in ("cut", "other")))
    assert f"A - B {mean:+.5f} +- {error:.5f} bits/dim" in text
    assert len(drawn[0][0].axes) == 8  # over steps and over images seen: batch sizes differ
    left, right = (drawn[0][0].axes[number].lines[0].get_xdata() for number in (0, 1))
    assert right.tolist() == (8 * left).tolist()
    text = said(capsys, home / "cut", home / "half")
    assert "no setting differs" in text and "not both have finished: python experiments/compare.py" in text


def test_equal_couplings_differ_in_no_setting(home, tmp_path, drawn, capsys):
    shutil.copytree(home / "half", tmp_path / "same")
    path = tmp_path / "same/config.json"
    config = read_history(home / "half").record
    text = path.read_text()
    assert len(config["model"]["spatial_splits"]) == 6 and "hstripes-inv" in text
    path.write_text(text.replace('"hstripes-inv"', '"hstripes"'))  # two couplings have none
    assert "no setting differs" in said(capsys, home / "half", tmp_path / "same")


def test_many_steps_are_means_with_their_range_and_speed_is_between_taken_times():
    values = np.arange(3.0 * training.POINTS - 1)
    mean, low, high = training.thinned(values)
    assert len(mean) == training.POINTS and (mean[0], low[0], high[0]) == (1, 0, 2) and mean[-1] == values[-1] - 0.5
    steps = {"step": np.arange(1.0, 7), "images_seen": np.arange(8.0, 56, 8), "seconds": np.array([1, 3, 3, 3, 4, 4.0])}
    x, speed = training.images_per_s(steps, "step")
    assert x.tolist() == [1, 4, 6] and speed.tolist() == [8, 12, 16]


def test_a_name_with_a_suffix_or_without_one_gives_both_files(home, tmp_path, capsys, monkeypatch):
    def savefig(figure, file, format, metadata):
        if format == "png":  # to the pixel, figures are drawn in test_results_page.py
            figure.draw_without_rendering()
        file.write(format.encode())
    monkeypatch.setattr(training.style.plt.Figure, "savefig", savefig)
    text = said(capsys, home / "cut", "--out", tmp_path / "one.png")
    assert all((tmp_path / f"one.{kind}").read_text() == kind for kind in ("pdf", "png"))
    assert text.splitlines()[-2:] == [f"{tmp_path}/one.pdf", f"{tmp_path}/one.png"]


def test_status_draws_the_runs_of_a_sweep_that_have_begun(tmp_path, drawn, capsys):
    folders = ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path), "--figures-dir", str(tmp_path)]
    sweep.main(tiny_experiment.EXPERIMENT, [*folders, "--status", "--plot"])
    assert not drawn and "0 of 3 runs have begun" in capsys.readouterr().out
    sweep.main(tiny_experiment.EXPERIMENT, [*folders, "--cluster", "debug"])
    sweep.main(tiny_experiment.EXPERIMENT, [*folders, "--status", "--plot"])
    (figure, name), = drawn
    assert name == "runs" and "1 of 3 runs have begun" in figure.get_suptitle()
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    with pytest.raises(SystemExit):
        sweep.main(tiny_experiment.EXPERIMENT, [*folders, "--plot"])
    assert "--plot: only with --status or --wait" in capsys.readouterr().err


def test_a_run_without_a_step_is_drawn(home, tmp_path, drawn, capsys):
    shutil.copytree(home / "half", tmp_path / "run")
    for text in ("step,images_seen,bits_per_dim,grad_norm,lr,seconds\n", "", None):
        path = tmp_path / "run/metrics.csv"
        path.unlink() if text is None else path.write_text(text)
        (tmp_path / "run/log.txt").unlink(missing_ok=True)
        assert "0 of 6 steps" in said(capsys, tmp_path / "run")
    assert len(drawn) == 3


@pytest.mark.parametrize("file, content", [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model": 3}'), ("config.json", None),
    ("config.json", '{"model": {"emb_dim": -1}, "total_steps": 6}'), ("metrics.csv", "a,b\n1,2\n"),
    ("metrics.csv", "step,images_seen,bits_per_dim,grad_norm,lr,seconds\nx,1,1,1,1,1\n"), ("metrics.csv", "\0" * 99 + "\n"),
    ("metrics.csv", "step,images_seen,bits_per_dim,grad_norm,lr,seconds\n1,1,nan,1,1,1\n"),
    ("metrics.csv", "step,images_seen,bits_per_dim,grad_norm,lr,seconds\n1,1,1\n"),
    ("done.json", "{}")])
def test_a_damaged_folder_is_one_line(home, tmp_path, drawn, file, content):
    shutil.copytree(home / "half", tmp_path / "run")
    (tmp_path / "run" / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "run" / file).write_text(content)
    with pytest.raises(SystemExit, match="^plot_run.py: error: .*(damaged|no run folder)") as ended:
        plot_run.main([str(tmp_path / "run")])
    assert "\n" not in str(ended.value) and not drawn


def test_a_mistake_is_one_line(home, tmp_path):
    for arguments, message in (([home / "cut", "--out", tmp_path / "a.svg"], "--out .*: must be a name"),
                               ([home / "cut", "--out", tmp_path / "none/a"], "folder that exists"),
                               ([home / "cut"] * 2, "given twice"), ([home / "images.npy"], "no run folder")):
        with pytest.raises(SystemExit, match=message):
            plot_run.main([str(argument) for argument in arguments])
    with pytest.raises(TrainingError, match="no run folder"):
        read_history(tmp_path / "none")
