"""The grids of all experiments: what is fixed, what is swept, how many runs, what they cost."""
import collections
import dataclasses
import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import SETS
from experiments import sweep
from jet import Jet, JetConfig, forward_flops
from paper_figures import figure2, figure3, figure5, style, tables
from train import TrainConfig

COUNTS = {  # runs of one seed at each scale
    "ablate_coupling": (13, 20, 21, 21), "compare_vit_cnn": (4, 6, 6, 8), "ablate_block_depth": (6, 6, 6, 6),
    "scaling": (8, 16, 16, 48), "ablate_splits": (6, 6, 6, 6), "ablate_layers": (4, 4, 4, 4),
    "main_results": (4, 8, 8, 16), "draw_samples": (3, 3, 3, 6)}
FREE = {  # the settings that a sweep may change; all others are its base's
    "ablate_coupling": {"kinds", "spatial_splits"}, "compare_vit_cnn": {"block", "emb_dim", "num_heads"},
    "ablate_block_depth": {"block_depth"}, "ablate_splits": {"kinds", "split_mode"},
    "ablate_layers": {"actnorm", "invertible_dense"},
    "scaling": {"data", "total_steps", "num_couplings", "block_depth", "emb_dim", "num_heads", "image_size", "patch_size"}}
FREE["main_results"] = FREE["draw_samples"] = FREE["scaling"] - {"emb_dim", "num_heads"} | {"lr"}


def experiment(name):
    return importlib.import_module(f"experiments.{name}")


def settings(config):
    return {**{name: value for name, value in vars(config).items() if name != "model"}, **vars(config.model)}


def test_every_experiment_is_here():
    scripts = {path.stem for path in (style.ROOT / "experiments").glob("*.py") if "sweep.main(" in path.read_text()}
    assert scripts - {"sweep"} == set(COUNTS)


@pytest.mark.parametrize("scale", style.SCALES)
@pytest.mark.parametrize("name", COUNTS)
def test_a_grid_has_the_right_number_of_different_runs_and_changes_nothing_else(name, scale):
    points = experiment(name).configs(scale)
    assert len(points) == COUNTS[name][style.SCALES.index(scale)]
    runs = [point.run(0, style.ROOT) for point in points]
    assert len({run.run_id for run in runs}) == len({run.config.hash for run in runs}) == len(points)
    values = collections.defaultdict(set)
    for run in runs:
        for field, value in settings(run.config).items():
            values[field].add(value)
    assert {field for field, found in values.items() if len(found) > 1} <= FREE[name] | {"init"}
    for point in points:  # the images fit the model, and the labels say what the configuration is
        height, width, channels = SETS[point.config.data].shape
        assert point.config.model.image_shape == (channels, height, width)
        for field, value in point.labels.items():
            if field in JetConfig.__dataclass_fields__ and value.isdigit():
                assert getattr(point.config.model, field) == int(value)
        assert point.labels.get("dataset", point.config.data) == point.config.data


@pytest.mark.parametrize("name, grid", [
    ("compare_vit_cnn", figure2.GRID_A), ("ablate_block_depth", figure2.GRID_B), ("scaling", figure3.GRID),
    ("ablate_splits", tables.SPLITS_GRID), ("ablate_layers", tables.LAYERS_GRID), ("main_results", tables.MAIN_GRID),
    ("draw_samples", figure5.GRID)])
def test_figures_ask_for_what_is_run(name, grid):
    for scale in style.SCALES:
        assert {tuple(point.labels.values()) for point in experiment(name).configs(scale)} == set(grid[scale])


def test_paper_scale_has_the_two_known_sizes_and_the_official_recipe():
    def sizes(name):
        return {sweep.num_parameters(point.config.model): point.config for point in experiment(name).configs("paper")}
    for name in ("compare_vit_cnn", "ablate_splits", "ablate_layers", "ablate_coupling", "scaling", "main_results"):
        official = TrainConfig(precision="bfloat16")
        assert official in [point.config for point in experiment(name).configs("paper")], name
    for name in ("scaling", "main_results"):
        large = sizes(name)[1_019_612_160]
        assert (large.model.num_couplings, large.model.block_depth, large.model.emb_dim) == (64, 5, 512)
        assert 207_177_216 in sizes(name)
    assert sweep.train_flops(TrainConfig()) == 3 * forward_flops(JetConfig()) * 1024 * 250_224
    for point in [point for name in COUNTS for point in experiment(name).configs("paper")]:
        assert point.config.model.num_tokens == 256 and point.config.batch_size == 1024
        epochs = point.config.total_steps * 1024 / (SETS[point.config.data].counts["train"] or 13_000_000)
        fine_tuned = point.labels.get("training") == "fine-tuned"
        wanted = {"imagenet21k": 50, "cifar10": 100 if fine_tuned else 200}
        assert abs(epochs - wanted.get(point.config.data.split("-")[0], 20 if fine_tuned else 200)) < 0.05
        assert point.config.lr == pytest.approx(1e-4 if fine_tuned else 3e-4)


@pytest.mark.parametrize("name", COUNTS)
def test_networks_are_in_bfloat16_at_medium_and_paper_scale_alone(name):
    for scale, precision in zip(style.SCALES, ("float32", "float32", "bfloat16", "bfloat16")):
        assert {point.config.precision for point in experiment(name).configs(scale)} == {precision}
    assert TrainConfig().precision == "float32"


def test_hashes_of_smoke_and_small_runs_stay():
    """Committed CSVs, and folders of finished runs, are known by them."""
    pinned = {"ablate_coupling": ("109fa472f3", "e113bac673"), "scaling": ("66844c17de", "1b03921cf6"),
              "main_results": ("858467bf4d", "6accfefb53")}
    for name, hashes in pinned.items():
        first = [experiment(name).configs(scale)[0].config for scale in ("smoke", "small")]
        assert tuple(config.hash for config in first) == hashes


@pytest.mark.parametrize("name", COUNTS)
def test_medium_runs_are_trained_for_at_least_1000_steps_of_256_images(name):
    configs = [point.config for point in experiment(name).configs("medium")]
    trained = [config for config in configs if config.total_steps]
    assert trained
    assert all(config.batch_size == 256 and config.total_steps >= 1000 for config in trained)
    assert len(configs) - len(trained) == (2 if name == "main_results" else 0)  # "not-fine-tuned"


def test_what_is_fine_tuned_begins_with_what_was_pretrained_for_it():
    for scale in style.SCALES:
        points = experiment("main_results").configs(scale)
        for position, point in enumerate(points):
            tuned = "fine-tuned" in point.labels["training"]
            assert (point.after is not None) == tuned
            if tuned:
                assert point.after in points[:position] and point.after.labels["training"] == "pretrained"
                assert point.after.labels["size"] == point.labels["size"]
                assert point.after.config.model == point.config.model  # patches and positions fit
                run = point.run(2, style.ROOT)
                assert run.config.init == point.after.run(2, style.ROOT).config.hash and run.config.seed == 2
                assert run.init_from == point.after.run(2, style.ROOT).folder
        if scale != "paper":
            steps = {point.labels["training"]: point.config.total_steps for point in points}
            assert steps["scratch"] == steps["fine-tuned"] > steps["not-fine-tuned"] == 0
            data = {point.labels["training"]: point.config.data for point in points}
            assert data["pretrained"].endswith("animals") and data["scratch"] == data["fine-tuned"] == data["not-fine-tuned"]


@pytest.mark.parametrize("name", COUNTS)
def test_dry_run_at_paper_scale_tells_count_parameters_flops_and_gpu_hours(name, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JET_DATA", raising=False)
    module = experiment(name)
    sweep.main(name, "", module.configs, tuple(module.configs("paper")[0].labels), None,
               ["--scale", "paper", "--dry-run", "--runs-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    points = module.configs("paper")
    assert len(lines) == 1 + len(points) + 3 and lines[-3].startswith(f"{len(points)} runs ({len(points)} new)")
    for line, point in zip(lines[1:], points):
        flops = sweep.train_flops(point.config)
        assert f" {sweep.num_parameters(point.config.model):,} " in line and f" {flops:.3g} " in line
        assert f" {sweep.number(flops / 0.4 / 989e12 / 3600)} " in line
    hours = sum(sweep.train_flops(point.config) for point in points) / 0.4 / 989e12 / 3600
    assert lines[-2] == (f"{sweep.number(hours)} GPU-hours in all: computed, not measured, for an H100 at "
                         "40% (assumed) of its peak in bfloat16")


@pytest.mark.parametrize("name", ["compare_vit_cnn", "ablate_splits", "ablate_layers", "ablate_block_depth", "scaling"])
def test_flops_of_the_grid_are_those_that_pytorch_counts(name):
    for config in {point.config.model for point in experiment(name).configs("smoke")}:
        jet = Jet(dataclasses.replace(config, num_couplings=5)).double()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            jet(torch.zeros(16, *config.image_shape, dtype=torch.float64))
        assert abs(counter.get_total_flops() / 16 / forward_flops(jet.config) - 1) < 0.01, config


def test_every_swept_field_is_explained():
    text = (style.ROOT / "results/README.md").read_text()
    for name in COUNTS:
        for field in experiment(name).configs("smoke")[0].labels:
            assert f"| `{field}` |" in text, field


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_the_log_det_of_a_grid_has_room(scale):
    """From 8.3 bits/dim, where a fresh Jet is, to 4.5 takes about 4 of them: caps must lie well above."""
    for name in COUNTS:
        for point in experiment(name).configs(scale):
            model = point.config.model
            cap = model.logdet_cap_nats / model.num_tokens / model.token_dim / 0.6931
            assert cap >= (4 if scale == "smoke" else 5), (name, point.labels, cap)
