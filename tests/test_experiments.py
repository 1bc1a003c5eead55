"""The grids of all experiments: what is fixed, what is swept, how many runs, what they cost."""
import ast
import collections
import contextlib
import dataclasses
import importlib
import itertools

import pytest
import torch
from grid_rows import grid_rows
from torch.utils.flop_counter import FlopCounterMode

from data import SETS
from harness.flops import forward_flops, logdet_cap_nats, num_parameters, train_flops
from harness.host import ROOT
from jet import Jet, JetConfig
from paper_figures import style
from paper_figures.results_csv import ResultsError, read_results
from sweeps import plan, search, sweep
from sweeps.grid import make_runs
from train import TrainConfig

COUNTS = {  # runs of one seed at each scale
    "ablate_coupling": (13, 20, 21, 21), "compare_vit_cnn": (4, 6, 6, 8),
    "ablate_block_depth": (6, 6, 6, 6),
    "scaling": (8, 16, 16, 48), "ablate_splits": (6, 6, 6, 6), "ablate_layers": (4, 4, 4, 4),
    "main_results": (4, 8, 8, 16), "draw_samples": (3, 3, 3, 6), "condition_classes": (4, 12, 4, 4)}
FREE = {  # the settings that a sweep may change; all others are its base's
    "ablate_coupling": {"kinds", "spatial_splits"},
    "compare_vit_cnn": {"block", "emb_dim", "num_heads"},
    "ablate_block_depth": {"block_depth"}, "ablate_splits": {"kinds", "split_mode"},
    "ablate_layers": {"actnorm", "invertible_dense"},
    "scaling": {"data", "total_steps", "num_couplings", "block_depth", "emb_dim", "num_heads",
                "image_size", "patch_size"}}
FREE["condition_classes"] = {"condition", "context_dim", "lr", "total_steps"}
FREE["main_results"] = FREE["draw_samples"] = FREE["scaling"] - {"emb_dim", "num_heads"} | {"lr"}


def experiment(name):
    return importlib.import_module(f"experiments.{name}")


def runs_of(name, scale, seeds=(0,)):
    return make_runs(experiment(name).EXPERIMENT, scale, seeds, ROOT)


def fields(config_class):
    return [field.name for field in dataclasses.fields(config_class)]


def settings(config):
    top = {name: getattr(config, name) for name in fields(TrainConfig) if name != "model"}
    return {**top, **vars(config.model)}


def test_every_experiment_is_here():
    scripts = [path for path in (ROOT / "experiments").glob("*.py") if "EXPERIMENT = Experiment(" in path.read_text()]
    assert {path.stem for path in scripts} >= set(COUNTS)
    for path in scripts:
        assert experiment(path.stem).EXPERIMENT.name == path.stem
        assert experiment(path.stem).EXPERIMENT.description == experiment(path.stem).__doc__


@pytest.mark.parametrize("name", COUNTS)
def test_an_experiment_is_read_in_one_file(name):
    """It takes from figures what draws, and nothing from others: but Figure 5 the main table's."""
    tree = ast.parse((ROOT / f"experiments/{name}.py").read_text())
    imports = [f"{node.module}.{alias.name}" for node in ast.walk(tree)
               if isinstance(node, ast.ImportFrom) for alias in node.names]
    others = {word for word in imports if word.startswith("experiments.")}
    assert others == ({"experiments.main_results"} if name == "draw_samples" else set())
    figures = {word.split(".")[1] for word in imports if word.startswith("paper_figures.")}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id in figures}
    assert all(word.startswith("draw") or word == "samples_path" for word in used)


@pytest.mark.parametrize("scale", style.SCALES)
@pytest.mark.parametrize("name", COUNTS)
def test_a_grid_has_the_right_number_of_different_runs_and_changes_nothing_else(name, scale):
    points, runs = experiment(name).configs(scale), runs_of(name, scale)
    assert len(runs) == COUNTS[name][style.SCALES.index(scale)]
    assert len({run.run_id for run in runs}) == len({run.config.hash for run in runs}) == len(runs)
    values = collections.defaultdict(set)
    for run in runs:
        for field, value in settings(run.config).items():
            values[field].add(value)
    assert {field for field, found in values.items() if len(found) > 1} <= FREE[name] | {"init"}
    for point in points:  # the images fit the model, and the labels say what the configuration is
        height, width, channels = SETS[point.config.data].shape
        assert point.config.model.image_shape == (channels, height, width)
        assert not set(point.labels) & {*fields(TrainConfig), *fields(JetConfig), "dataset"}
        values = point.values(experiment(name).EXPERIMENT.swept)
        for field, value in settings(point.config).items():
            assert values.get(field, str(value)) == str(value)
        assert values.get("dataset", point.config.data) == point.config.data
    swept = [tuple(values.values()) for run in runs for values in run.points]
    assert len(set(swept)) == len(swept) == len(points)  # each point is told from all others


@pytest.mark.parametrize("name", COUNTS)
def test_figures_ask_for_what_is_run(name, drawn, tmp_path):
    """Swept fields and what may vary are those of the figure; Figure 5 needs samples besides."""
    grid_rows(name, "smoke").to_csv(tmp_path / "in.csv", index=False)
    needs = contextlib.nullcontext()
    if name == "draw_samples":
        needs = pytest.raises(ResultsError, match="npz: no such file")
    with needs:
        experiment(name).EXPERIMENT.draw(tmp_path / "in.csv", tmp_path)


def values_of(name, scale):
    return [tuple(values.values()) for run in runs_of(name, scale) for values in run.points]


@pytest.mark.parametrize("scale", style.SCALES)
def test_the_grids_are_those_of_the_paper_s_figures(scale):
    widths = {"smoke": (16, 32), "small": (16, 32, 64), "medium": (64, 128, 256), "paper": (128, 256, 512, 768)}[scale]
    assert values_of("compare_vit_cnn", scale) == [(block, str(width)) for block in ("vit", "cnn") for width in widths]
    assert values_of("ablate_block_depth", scale) == [(depth,) for depth in "123456"]
    assert values_of("ablate_layers", scale) == list(itertools.product(("False", "True"), repeat=2))
    assert values_of("ablate_splits", scale) == list(itertools.product(
        ("channel-only", "spatial-only", "4:1"), ("pairing", "masking")))
    larger = values_of("main_results", scale)[-1][0]
    assert values_of("draw_samples", scale) == [
        (size, training, data) for size, training, data in values_of("main_results", scale)
        if size == larger and training != "not-fine-tuned" and data != "cifar10"]


def test_paper_scale_has_the_two_known_sizes_and_the_official_recipe():
    def sizes(name):
        return {num_parameters(run.config.model): run.config for run in runs_of(name, "paper")}
    for name in ("compare_vit_cnn", "ablate_splits", "ablate_layers", "ablate_coupling", "scaling", "main_results"):
        official = TrainConfig(precision="bfloat16")
        assert official in [point.config for point in experiment(name).configs("paper")], name
    for name in ("scaling", "main_results"):
        large = sizes(name)[1_019_612_160]
        sizes_of_it = large.model.num_couplings, large.model.block_depth, large.model.emb_dim
        assert sizes_of_it == (64, 5, 512)
        assert 207_177_216 in sizes(name)
    assert train_flops(TrainConfig()) == 3 * forward_flops(JetConfig()) * 1024 * 250_224
    points = [point for name in COUNTS for point in experiment(name).configs("paper")]
    for point in [point for point in points if point.config.total_steps]:
        assert point.config.model.num_tokens == 256 and point.config.batch_size == 1024
        num_images = SETS[point.config.data].counts["train"] or 13_000_000
        epochs = point.config.total_steps * 1024 / num_images
        fine_tuned = point.labels.get("training") == "fine-tuned"
        wanted = {"imagenet21k": 50, "cifar10": 100 if fine_tuned else 200}
        of_imagenet = 20 if fine_tuned else 200
        assert abs(epochs - wanted.get(point.config.data.split("-")[0], of_imagenet)) < 0.05
        assert point.config.lr == pytest.approx(1e-4 if fine_tuned else 3e-4)


@pytest.mark.parametrize("name", COUNTS)
def test_networks_are_in_bfloat16_at_medium_and_paper_scale_alone(name):
    for scale, precision in zip(style.SCALES, ("float32", "float32", "bfloat16", "bfloat16")):
        assert {run.config.precision for run in runs_of(name, scale)} == {precision}
    assert TrainConfig().precision == "float32"


def test_hashes_of_smoke_and_medium_runs_stay():
    """Committed CSVs, and folders of finished runs, are known by them."""
    pinned = {"ablate_coupling": ("dd8fd993ed", "bc249dd75d"),
              "scaling": ("7e1ccc4ecf", "e9750a0828"),
              "main_results": ("a696fc9646", "a0e851d6e0")}
    for name, hashes in pinned.items():
        first = [experiment(name).configs(scale)[0].config for scale in ("smoke", "medium")]
        assert tuple(config.hash for config in first) == hashes


@pytest.mark.parametrize("name", COUNTS)
def test_medium_runs_are_trained_for_at_least_1000_steps_of_256_images(name):
    configs = [point.config for point in experiment(name).configs("medium")]
    trained = [config for config in configs if config.total_steps]
    assert trained
    assert all(config.batch_size == 256 and config.total_steps >= 1000 for config in trained)
    # "not-fine-tuned"; told other labels or none
    assert len(configs) - len(trained) == (2 if name in ("main_results", "condition_classes") else 0)


SMALL = {one.name: (declared, one) for name in COUNTS
         for declared in [experiment(name).EXPERIMENT] for one in (declared, *declared.also)}


@pytest.mark.parametrize("path", [path for name in SMALL if (
    path := ROOT / f"results/{name}_small.csv").exists()], ids=lambda path: path.stem)
def test_committed_rows_are_those_of_the_grid(path, tmp_path):
    """With the learning rates that the committed search has found."""
    parent, declared = SMALL[path.stem.removesuffix("_small")]
    rows = read_results(path, declared.name, declared.swept, declared.varying)
    seeds, points = sorted(rows["seed"].unique().tolist()), declared.configs("small")
    _, _, rates = search.runs_of_search(parent, "small", tmp_path, path.parent)
    runs = make_runs(declared, "small", seeds, ROOT, rates=rates)
    wanted = {(run.run_id, run.config.init, *values.values()) for run in runs for values in run.points}
    found = zip(rows["run_id"], rows["init"].fillna(""), *(rows[name] for name in declared.swept))
    assert set(found) == wanted and set(rows["grid_points"]) == {len(points)}
    assert len(rows) == 2 * len(seeds) * len(points)
    assert rows["seed"].tolist() == sorted(rows["seed"])


def test_what_is_fine_tuned_begins_with_what_was_pretrained_for_it():
    for scale in style.SCALES:
        points = experiment("main_results").configs(scale)
        for position, point in enumerate(points):
            tuned = "fine-tuned" in point.labels["training"]
            assert (point.after is not None) == tuned
            if tuned:
                assert point.after in points[:position]
                assert point.after.labels["training"] == "pretrained"
                assert point.after.labels["size"] == point.labels["size"]
                assert point.after.config.model == point.config.model  # patches and positions fit
        for run in runs_of("main_results", scale, seeds=[2]):
            assert run.config.seed == 2
            assert (run.after is not None) == ("fine-tuned" in run.points[0]["training"])
            if run.after:
                assert run.config.init == run.after.config.hash
                assert run.init_from == run.after.folder and run.after.config.seed == 2
        if scale != "paper":
            steps = {point.labels["training"]: point.config.total_steps for point in points}
            assert steps["scratch"] == steps["fine-tuned"] > steps["not-fine-tuned"] == 0
            data = {point.labels["training"]: point.config.data for point in points}
            assert data["pretrained"].endswith("animals")
            assert data["scratch"] == data["fine-tuned"] == data["not-fine-tuned"]


def test_what_is_told_otherwise_are_the_weights_that_were_told_the_labels():
    for scale in style.SCALES:
        points = experiment("condition_classes").configs(scale)
        trained = {point.labels["rate"]: point for point in points if point.config.condition == "labels"}
        for point in points:
            assert float(point.labels["rate"]) == point.config.lr
            otherwise = point.config.condition in ("shuffled", "dropped")
            assert (point.after is not None) == otherwise == (point.config.total_steps == 0)
            assert not otherwise or point.after is trained[point.labels["rate"]]
            assert (point.config.condition == "none") == (point.config.model.context_dim == 0)


@pytest.mark.parametrize("name", COUNTS)
def test_dry_run_at_paper_scale_tells_count_parameters_flops_and_gpu_hours(name, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JET_DATA", raising=False)
    sweep.main(experiment(name).EXPERIMENT, ["--scale", "paper", "--dry-run", "--runs-dir", str(tmp_path)])
    lines, runs = capsys.readouterr().out.splitlines(), runs_of(name, "paper")
    assert max(map(len, lines)) <= 100
    said = " ".join(lines[1 + len(runs):])
    assert said.startswith(f"{len(runs)} runs ({len(runs)} new)")
    for line, run in zip(lines[1:], runs):
        flops = train_flops(run.config)
        assert f" {num_parameters(run.config.model):,} " in line and f" {flops:.3g} " in line
        if "GPU-hours" in lines[0]:  # else there was no room
            assert f" {plan.number(flops / 0.4 / 989e12 / 3600)} " in line
    hours = sum(train_flops(run.config) for run in runs) / 0.4 / 989e12 / 3600
    assert (f"{plan.number(hours)} GPU-hours in all: computed, not measured, for an "
            "H100 at 40% (assumed) of its peak in bfloat16 ") in said


@pytest.mark.parametrize("name", ["compare_vit_cnn", "ablate_splits", "ablate_layers", "ablate_block_depth", "scaling"])
def test_flops_of_the_grid_are_those_that_pytorch_counts(name):
    for config in {point.config.model for point in experiment(name).configs("smoke")}:
        kinds = tuple(dict.fromkeys(config.kinds))  # a coupling of each
        jet = Jet(dataclasses.replace(config, num_couplings=len(kinds), kinds=kinds))
        with (torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
              FlopCounterMode(display=False) as counter):
            jet(torch.zeros(16, *config.image_shape))
        assert abs(counter.get_total_flops() / 16 / forward_flops(jet.config) - 1) < 0.01, config


def test_every_swept_field_is_explained():
    text = (ROOT / "results/README.md").read_text()
    for name in COUNTS:
        for field in experiment(name).EXPERIMENT.swept:
            assert f"| `{field}` |" in text, field


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_the_log_det_of_a_grid_has_room(scale):
    """From 8.3 bits/dim, a fresh Jet's, to 4.5 takes about 4 of them: caps must lie well above."""
    for name in COUNTS:
        for point in experiment(name).configs(scale):
            model = point.config.model
            cap = logdet_cap_nats(model) / model.num_tokens / model.token_dim / 0.6931
            assert cap >= (4 if scale == "smoke" else 5), (name, point.labels, cap)
