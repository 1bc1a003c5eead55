"""Figure 5: samples of a seed, true neighbours, paths that end at real images; what is refused."""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tiny_experiment
from grid_rows import grid_rows

from convert import weights_id
from data import load_images
from experiments import draw_samples, main_results
from harness.errors import TrainingError
from harness.host import ROOT
from jet import Jet, JetConfig
from paper_figures import figure5, style
from paper_figures.results_csv import ResultsError
from sweeps import sweep
from sweeps.grid import make_runs, with_model
from train import TrainConfig, train

GOLDEN = Path(__file__).parent / "golden"
MODEL = JetConfig(image_size=8, num_couplings=3, kinds=("channels", "spatial"), block_depth=1,
                  emb_dim=8, num_heads=2)


@pytest.fixture(scope="module")
def jet():
    torch.manual_seed(0)
    jet = Jet(MODEL)
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a folder of 40 images to train and 12 to test."""
    folder = tmp_path_factory.mktemp("samples")
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:40, ::4, ::4])
    config = TrainConfig(model=MODEL, data=str(folder / "images.npy"), batch_size=16, total_steps=3,
                         lr=1e-2)
    train(config, folder / "run", quiet=True)
    return folder / "run"


def test_samples_are_those_of_the_jet_and_the_seed(jet):
    samples = draw_samples.draw_samples(jet, 70, seed=4, temperature=0.7)
    generator = torch.Generator().manual_seed(4)
    expected = torch.cat([jet.sample(n, generator, 0.7) for n in (64, 6)]).numpy()
    assert samples.shape == (70, 8, 8, 3) and samples.dtype == np.uint8
    assert np.array_equal(samples, expected)
    assert not np.array_equal(samples, draw_samples.draw_samples(jet, 70, seed=5, temperature=0.7))
    assert not np.array_equal(samples, draw_samples.draw_samples(jet, 70, seed=4, temperature=1))


def test_the_nearest_image_is_the_nearest():
    array = load_images("cifar10-subset", "train").array[:, ::4, ::4]
    array = np.concatenate([array] * 3)  # more than one piece; of equal ones the first counts
    queries = array[[5000, 7]].copy()
    queries[1, 0, 0, 0] ^= 64
    index, distance = draw_samples.nearest(queries, array)
    assert index.tolist() == [5000 - 2 * 2048, 7] and distance[0] == 0
    assert np.isclose(distance[1], 64 / np.sqrt(8 * 8 * 3))
    query = load_images("cifar10-subset", "test").array[:3, ::4, ::4]
    differences = np.square(query[:, None].astype(float) - array[None, :2048]).mean((2, 3, 4))
    index, distance = draw_samples.nearest(query, array)
    assert np.array_equal(index, differences.argmin(1))
    assert np.allclose(distance ** 2, differences.min(1))


def test_a_path_leads_from_one_image_to_the_other_over_latents_of_a_sample_s_length(
        jet, monkeypatch):
    images = load_images("cifar10-subset", "test").array[:6, ::4, ::4]
    latents = []

    def inverse(self, z, original=Jet.inverse):
        latents.append(z)
        return original(self, z)
    monkeypatch.setattr(type(jet), "inverse", inverse)
    paths = draw_samples.interpolate(jet, images, steps=5)
    assert paths.shape == (3, 5, 8, 8, 3) and paths.dtype == np.uint8
    assert np.array_equal(paths[:, 0], images[::2]) and np.array_equal(paths[:, -1], images[1::2])
    assert all(not np.array_equal(paths[:, i], paths[:, i + 1]) for i in range(4))
    lengths = latents[0].flatten(1).norm(dim=1).view(3, 5)
    low, high = lengths[:, [0, -1]].min(1).values, lengths[:, [0, -1]].max(1).values
    assert (lengths[:, 2] > 0.9 * low).all()  # a line's would be 0.7 of it
    assert (lengths[:, 2] < 1.1 * high).all()


def test_the_middle_of_a_path_is_an_arc(jet):
    z = torch.zeros(2, 3, 8, 8)
    z[0, 0, 0, 0], z[1, 0, 0, 1] = 3.0, 3.0
    inverted = []

    class Fake:
        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, x):
            return z, None

        def inverse(self, z):
            inverted.append(z)
            return 0.0 * z, None
    draw_samples.interpolate(Fake(), np.zeros((2, 8, 8, 3), np.uint8), steps=3)
    middle = inverted[0][1]
    assert torch.allclose(middle[0, 0, :2], torch.tensor([3 / 2 ** 0.5] * 2), atol=1e-5)
    assert middle.count_nonzero() == 2


def command(run, folder, *flags):
    draw_samples.main(["--checkpoint", str(run), "--results-dir", str(folder),
                       "--figures-dir", str(folder), *flags])
    return figure5.read_samples(folder / "samples/run.npz")


def test_a_file_of_samples_tells_what_made_it(run, tmp_path, monkeypatch, rough):
    flags = ("--num", "10", "--neighbours", "--interpolate", "2", "--temperature", "0.8",
             "--sample-seed", "3")
    about, content = command(run, tmp_path, *flags)
    assert (about["temperature"], about["seed"], about["weights"]) == (0.8, 3, weights_id(run))
    assert about["neighbours_of"] == about["paths_of"] == about["dataset"]
    assert {name: value.shape for name, value in content.items()} == {
        "samples": (10, 8, 8, 3), "neighbours": (10, 8, 8, 3), "distances": (10,),
        "paths": (2, 8, 8, 8, 3)}
    assert "held_out_distance" not in about  # these test images are the training images
    assert {path.name for path in tmp_path.glob("samples_run.*")} == {"samples_run.pdf", "samples_run.png"}
    first = (tmp_path / "samples/run.npz").read_bytes()
    monkeypatch.setattr(figure5, "draw_file", lambda *_: [])
    command(run, tmp_path, *flags)
    assert (tmp_path / "samples/run.npz").read_bytes() == first


@pytest.mark.parametrize("flags, message", [
    (["--num", "0"], "--num 0: must be 1 or more"),
    (["--temperature", "-1"], "--temperature -1.0: must be"),
    (["--temperature", "nan"], "--temperature nan: must be"),
    (["--interpolate", "-2"], "--interpolate -2"),
    (["--temperature", "1e38"], "try a lower --temperature"),
    (["--data", "nowhere", "--neighbours"], "neither a known set"),
    (["--checkpoint", "none.pt"], "none.pt: no such file"),
    (["--data", "cifar10-subset", "--interpolate"],
     "cifar10-subset has images of 32 x 32 x 3, and this Jet"),
    (["--interpolate", "30"], "has 40 test images"),
    (["--sample-seed", "9" * 20], "must be below 2**63"),
    (["--checkpoint", str(GOLDEN / "jet_pytorch_port.pt")], "or --model.num_heads"),
    (["--checkpoint", str(GOLDEN / "jet_channels_spatial.npz"), "--neighbours"],
     "does not tell what it was trained on")])
def test_a_mistake_is_one_line(run, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(run, tmp_path, *flags)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert not list(tmp_path.glob("samples/*"))


def test_what_a_model_was_trained_on_and_what_it_is_compared_with_are_told_apart(run, tmp_path, drawn):
    np.save(tmp_path / "other.npy", load_images("cifar10-subset", "test").array[:20, ::4, ::4])
    about, _ = command(run, tmp_path, "--num", "2", "--neighbours", "--data",
                       str(tmp_path / "other.npy"))
    assert about["dataset"].endswith("images.npy") and about["neighbours_of"].endswith("other.npy")


def test_weights_of_other_implementations_are_drawn_from(tmp_path, drawn):
    draw_samples.main(["--checkpoint", str(GOLDEN / "jet_pytorch_port.pt"),
                       "--model.num_heads", "2", "--num", "2", "--results-dir", str(tmp_path),
                       "--figures-dir", str(tmp_path)])
    about, content = figure5.read_samples(tmp_path / "samples/jet_pytorch_port.npz")
    assert about["dataset"] == "" and about["weights"].startswith("sha256-")
    assert content["samples"].shape == (2, 16, 16, 3) and drawn[0][1] == "samples_jet_pytorch_port"


# ---- the figure

def test_a_sheet_has_each_image_at_its_place():
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    sheet = figure5.tile(images, columns=2)
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1, 3)
    for i, image in enumerate(images):
        y, x = i // 2 * 3, i % 2 * 4
        assert np.array_equal(sheet[y:y + 2, x:x + 3], image)
    assert (sheet[6:, 4:] == 255).all() and (sheet[2] == 255).all() and (sheet[:, 3] == 255).all()


@pytest.fixture
def grid(tmp_path):
    """A CSV of small scale with a file of samples for each of its runs."""
    (tmp_path / "samples").mkdir()
    rows = grid_rows("draw_samples", "small")
    for run in make_runs(draw_samples.EXPERIMENT, "small", [0], ROOT):
        about = {"run_id": run.run_id, "dataset": run.config.data, "seed": 0,
                 "temperature": 1.0, "weights": run.config.hash}
        path = figure5.samples_path(tmp_path, "small", run.points[0].values())
        np.savez(path, about=json.dumps(about), samples=np.zeros((9, 32, 32, 3), np.uint8))
    rows.to_csv(tmp_path / "in.csv", index=False)
    return tmp_path


def test_the_figure_has_a_panel_for_each_run(grid, drawn):
    figure5.draw(grid / "in.csv", grid)
    (figure, name), = drawn
    assert name == "figure5_small" and len(figure.axes) == 3
    shapes = {axes.images[0].get_array().shape for axes in figure.axes}
    assert shapes == {(2 * 33 - 1, 8 * 33 - 1, 3)}
    captions = [text.get_text() for text in figure.texts]
    assert [caption.split(":")[0] for caption in captions if "bits/dim" in caption] == [
        "16x2, pretrained", "16x2, scratch", "16x2, fine-tuned"]
    assert figure.get_size_inches()[0] == style.COLUMN_WIDTH


def test_the_figure_is_byte_stable(grid, rough):
    paths = [figure5.draw(grid / "in.csv", grid / name) for name in ("one", "two")]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]


IMAGE = np.zeros((1, 2, 2, 3), np.uint8)
WHOLE = {"run_id": "other", "dataset": "", "weights": "", "seed": 0, "temperature": 1}


def other_weights(path):
    content = dict(np.load(path))
    about = str(content["about"]).replace('"weights": "', '"weights": "x')
    np.savez(path, **content | {"about": about})


@pytest.mark.parametrize("change, message", [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(b"x"), "no file of samples"),
    (lambda path: np.savez(path, samples=np.zeros((1, 2, 2, 3))), "no file of samples"),
    (lambda path: np.savez(path, about=json.dumps(WHOLE | {"temperature": "1"}), samples=IMAGE),
     "does not tell what made it"),
    (lambda path: np.savez(path, about="{}", neighbours=np.zeros((1, 2, 2, 3)), samples=IMAGE),
     "neighbours are float64"),
    (other_weights, "weights x"),
    (lambda path: np.savez(path, about="{}", samples=IMAGE), "does not tell what made it"),
    (lambda path: np.savez(path, about=json.dumps(WHOLE), samples=IMAGE), "is of run other")])
def test_samples_that_are_not_the_runs_are_refused(grid, change, message):
    change(sorted((grid / "samples").glob("*.npz"))[1])
    with pytest.raises(ResultsError, match=message) as raised:
        figure5.draw(grid / "in.csv", grid / "out")
    assert "\n" not in str(raised.value) and not (grid / "out").exists()


def test_the_experiment_uses_the_runs_of_the_main_table(tmp_path, monkeypatch, drawn):
    """Trained once, by whichever comes first; sampled when all are done."""
    def tiny(scale):
        points = []
        for point in main_results_configs(scale):
            config = with_model(point.config, num_couplings=1, patch_size=8, emb_dim=8)
            config = dataclasses.replace(config, batch_size=2,
                                         total_steps=min(2, config.total_steps))
            points.append(dataclasses.replace(point, after=None, config=config))
        return points
    main_results_configs = main_results.configs
    monkeypatch.setattr(main_results, "configs", tiny)
    folders = ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path),
               "--figures-dir", str(tmp_path)]
    sweep.main(dataclasses.replace(main_results.EXPERIMENT, configs=tiny, draw=lambda csv, out: []),
               folders)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
    draw_samples.main([*folders, "--num", "2"])
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
    assert after == before and len(before) == 4
    assert len(list(tmp_path.glob("samples/smoke_*.npz"))) == 3
    assert [name for _, name in drawn] == ["figure5_smoke"]


def test_samples_are_drawn_when_all_runs_are_done_and_not_of_a_shard(tmp_path, monkeypatch):
    sampled = []
    monkeypatch.setattr(draw_samples, "sample_runs",
                        lambda samples: sampled.append(len(samples.runs)))
    points = [dataclasses.replace(point, config=dataclasses.replace(point.config, total_steps=2))
              for point in tiny_experiment.configs("smoke")[:2]]
    monkeypatch.setattr(draw_samples, "EXPERIMENT", dataclasses.replace(
        tiny_experiment.EXPERIMENT, configs=lambda scale: points))
    folders = ["--results-dir", str(tmp_path), "--figures-dir", str(tmp_path)]
    here = [*folders, "--runs-dir", str(tmp_path / "runs")]
    draw_samples.main([*folders, "--runs-dir", str(tmp_path / "elsewhere"), "--shard", "1/2"])
    draw_samples.main([*here, "--shard", "2/2"])
    draw_samples.main([*here, "--collect"])  # of the other shard there is the CSV alone
    assert not sampled
    draw_samples.main(here)
    draw_samples.main([*here, "--collect"])
    assert sampled == [2, 2]


def test_flags_that_nothing_could_be_drawn_with_are_refused_before_anything_is_run(tmp_path):
    with pytest.raises(SystemExit, match="--num 0: must be 1 or more"):
        draw_samples.main(["--num", "0", "--runs-dir", str(tmp_path / "runs"), "--results-dir",
                           str(tmp_path), "--figures-dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_an_overflow_is_told(jet, run, tmp_path, monkeypatch):
    def overflow(*arguments):
        raise ValueError("1 value is not finite")
    flags = SimpleNamespace(num=1, sample_seed=0, temperature=1.0, interpolate=0, neighbours=False)
    monkeypatch.setattr(Jet, "sample", overflow)
    with pytest.raises(TrainingError, match="1 value is not finite: try a lower --temperature"):
        draw_samples.save_samples(tmp_path / "x.npz", run, jet, {}, flags, {})
