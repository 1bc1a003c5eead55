"""Measuring speed: rows and their arithmetic, the comparison, the trace, the bars, computed costs."""
import importlib.metadata
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import kernels
import recipe
from experiments import cost_table, throughput, throughput_cases
from harness import memory
from harness.flops import forward_flops, train_flops
from jet import Jet, JetConfig
from paper_figures import style
from paper_figures import throughput as figure
from paper_figures.results_csv import ResultsError
from recipe import TrainConfig
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("harness", "kernels", "images", "kernels.c")  # that a checkout's train.py needs
TINY = {"image_size": 32, "patch_size": 8, "num_couplings": 2, "kinds": ("channels", "spatial"), "block_depth": 1,
        "emb_dim": 8, "num_heads": 2}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command line on tiny sizes, with a matrix product of 1 GFLOP/s; returns the CSV's rows as text."""
    for size in ("S", "M"):
        monkeypatch.setitem(throughput.SIZES, size, TINY)
    monkeypatch.setattr(throughput, "product_timer", lambda device, precision: lambda: 1e9)
    monkeypatch.setattr(throughput.gc, "collect", lambda: None)  # a fifth of a second each
    monkeypatch.setattr(style, "save", lambda drawing, name, out_dir: [out_dir / f"{name}.png"])

    def main(*flags, draw=False):
        throughput.main(["--device", "cpu", "--threads", "1", "--steps", "2", "--batch-size", "2", "--sizes", "S",
                         *(f"--{name}-dir={tmp_path / name}" for name in ("runs", "results", "figures")),
                         *flags, *([] if draw else ["--no-figure"])])
        csv = tmp_path / "results/throughput_cpu.csv"
        return pd.read_csv(csv, dtype=str, keep_default_na=False) if csv.exists() else None
    return main


class FakePort(torch.nn.Module):
    """The interface of jet_pytorch.jet.Jet: pixels (B, H, W, C) -> tokens, logdet (B, 1)."""

    def __init__(self, **settings):
        super().__init__()
        self.settings, self.weight = settings, torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert x.shape[1:] == (32, 32, 3) and x.is_contiguous()
        tokens = (x * self.weight).view(len(x), self.settings["n_patches"], self.settings["patch_dim"])
        return tokens, torch.zeros(len(x), 1)

    def inverse(self, z):
        return z.view(len(z), 32, 32, 3), torch.zeros(len(z), 1)


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setitem(sys.modules, "jet_pytorch", types.ModuleType("jet_pytorch"))
    monkeypatch.setitem(sys.modules, "jet_pytorch.jet", types.SimpleNamespace(Jet=FakePort))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.2")


# ---- measuring

def test_a_row_for_each_size_and_what(run, tmp_path, capsys):
    rows = run(draw=True)
    assert tuple(rows.columns) == figure.COLUMNS and list(rows["what"]) == ["train", "likelihood", "sampling"]
    out = capsys.readouterr().out
    assert "throughput_cpu.csv" in out and "throughput_cpu.png" in out and "first step s" in out
    model, rows = JetConfig(**TINY), figure.read(tmp_path / "results/throughput_cpu.csv")
    for _, row in rows.iterrows():
        flops = forward_flops(model) * (3 if row["what"] == "train" else 1)
        assert row["images_per_s"] == pytest.approx(2 / row["step_seconds"])
        assert row["flops_per_s"] == pytest.approx(flops * row["images_per_s"])
        assert row["peak_share"] == pytest.approx(row["flops_per_s"] / 1e9)
        assert row["step_seconds_q25"] <= row["step_seconds"] <= row["step_seconds_q75"]
        assert row["num_params"] == sum(parameter.numel() for parameter in Jet(model).parameters())
        assert (row["images"], row["precision"], row["batch_size"]) == ("cifar10-subset", "float32", 2)
        assert np.isnan(row["ratio"]) and np.isnan(row["free_running_images_per_s"])


def test_a_rerun_replaces_its_rows_and_keeps_the_others(run):
    first = run("--what", "train", "sampling")
    second = run("--what", "train", "--steps", "3", "--sizes", "M", "S")
    assert list(zip(second["size"], second["what"])) == [("S", "train"), ("S", "sampling"), ("M", "train")]
    assert list(second["steps"]) == ["3", "2", "3"]
    assert second.iloc[1].equals(first.iloc[1].rename(1))  # to the last digit
    assert len(run("--what", "train", "--precision", "bfloat16")) == 4
    assert len(run("--what", "train", "--checkpoint-activations")) == 5


def test_ratios_are_of_images_per_second_round_by_round():
    numbers = {"ours": {"seconds": np.array([1.0, 2.0, 4.0])}, "before": {"seconds": np.array([2.0, 2.0, 6.0])}}
    config = throughput.size_config("S", 64, "float32")
    ours, before = throughput.make_rows("S", "train", config, numbers, 1e12, {}, "abc")
    assert (ours["ratio_q25"], ours["ratio"], ours["ratio_q75"]) == (1.25, 1.5, 1.75)  # of 2, 1, 1.5
    assert ours["images_per_s"] == 32 and ours["against"] == before["against"] == "abc" and "ratio" not in before
    assert ours["flops_per_s"] == 3 * forward_flops(config.model) * 32 and ours["step_seconds_q75"] == 3


def test_the_matrix_product_counts_two_flops_a_multiply_add(monkeypatch):
    monkeypatch.setattr(throughput, "seconds_of", lambda step, device, repeats: 0.5 * repeats)
    assert throughput.product_timer(torch.device("cpu"), "float32")() == 2 * 1536 ** 3 / 0.5


def test_steps_alternate_and_the_best_product_counts(monkeypatch):
    calls, rates = [], iter(range(100))
    monkeypatch.setattr(throughput, "product_timer", lambda *_: lambda: calls.append("product") or next(rates) % 5)
    makers = {name: lambda name=name: lambda: calls.append(name) for name in ("ours", "theirs")}
    flags = types.SimpleNamespace(device=torch.device("cpu"), steps=2)
    numbers, best = throughput.measure(makers, types.SimpleNamespace(precision="float32"), flags)
    assert calls == ["product", *["ours"] * 3, *["theirs"] * 3, *["product"] * 3,
                     "ours", "theirs", "product", "theirs", "ours", *["product"] * 3]
    assert best == 4 and all(len(measured["seconds"]) == 2 for measured in numbers.values())


def test_the_peak_of_memory_is_seen_after_it_is_freed():
    peak = throughput.watch_memory(torch.device("cpu"))
    if peak() is None:
        pytest.skip("this system does not tell the peak")
    torch.ones(2 ** 26)  # 256 MiB
    assert 0.24 < peak() < 0.35


def test_the_port_is_measured_beside_us(run, port):
    rows = run("--against", "jet-pytorch")
    assert list(rows["implementation"]) == ["ours", "jet-pytorch"] * 3
    assert set(rows["against"]) == {"jet-pytorch 0.0.2"}
    assert all(float(row.ratio) > 0 if row.implementation == "ours" else row.ratio == "" for row in rows.itertuples())
    assert len(run()) == 9  # measured alone: rows of their own


def test_another_checkout_is_measured_beside_us(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JET_KERNELS", "torch")
    before = tmp_path / "before"
    shutil.copytree(ROOT, before, ignore=lambda folder, names: [
        name for name in names if name not in ROOMS
        and not name.endswith((".py", "sets.csv", "sha256sums"))])
    with open(before / "recipe.py", "a") as file:
        file.write("\nSTEPS = 0\n_step = training_step\n\n\ndef training_step(*arguments):\n"
                   "    global STEPS\n    STEPS += 1\n    return _step(*arguments)\n")
    for name in ("harness.pace", "train"):  # what we have not imported yet is not taken from there later
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules, made = dict(sys.modules), []
    real = throughput_cases.other_checkout
    monkeypatch.setattr(throughput_cases, "other_checkout", lambda folder: made.append(real(folder)) or made[0])
    rows = run("--what", "train", "--against", str(before))
    assert list(rows["implementation"]) == ["ours", "before"] and set(rows["against"]) == {"before"}
    other, = made
    assert Path(other.jet.__file__).parent == before and other.recipe.STEPS == 5
    assert Path(other.accelerate.__code__.co_filename).parent == before / "kernels"
    assert all(sys.modules[name] is modules[name] for name in ("jet", "recipe", "data", "harness.machine", "kernels"))
    assert str(before) not in sys.path
    assert not [name for name, module in sys.modules.items() if str(before) in str(getattr(module, "__file__", ""))]


OLD_TRAIN = """
import torch
from jet import bits_per_dim
STEPS = 0

def git_commit():
    return "abcdef0123456789", "dirty"

def make_optimizer(parameters, config):
    return torch.optim.SGD(parameters, 1e-3)

def training_step(model, optimizer, x, step, config):
    global STEPS
    STEPS += 1
    bits_per_dim(*model(x)).mean().backward()
"""


def test_a_checkout_of_before_there_was_a_recipe_is_measured_with_the_step_of_its_train(run, tmp_path, monkeypatch):
    shutil.copy(ROOT / "jet.py", tmp_path)
    (tmp_path / "train.py").write_text(OLD_TRAIN)
    made, real = [], throughput_cases.other_checkout
    monkeypatch.setattr(throughput_cases, "other_checkout", lambda folder: made.append(real(folder)) or made[0])
    rows = run("--what", "train", "--against", str(tmp_path))
    assert list(rows["against"]) == ["abcdef0123-dirty"] * 2 and list(rows["git_dirty"])[1] == "True"
    assert made[0].recipe.STEPS == 5 and Path(made[0].recipe.__file__) == tmp_path / "train.py"


@pytest.mark.skipif(kernels.library() is None, reason="no C kernels here")
def test_our_speed_is_that_of_the_c_kernels_where_they_serve(run, monkeypatch):
    monkeypatch.setitem(throughput.SIZES, "S", TINY | {"emb_dim": 16})
    served = []
    monkeypatch.setattr(kernels, "vit_block", lambda *arguments, real=kernels.vit_block: served.append(1) or real(*arguments))
    for size, flags, name in (("S", (), "C"), ("M", (), "torch"), ("S", ("--precision", "bfloat16"), "")):
        served.clear()
        rows = run("--what", "train", "--sizes", size, *flags)
        row, = rows[(rows["size"] == size) & (rows["precision"] == (flags or ("float32",))[-1])].itertuples()
        assert row.kernels == name and bool(served) == (name == "C")


def test_images_of_other_sizes_are_random():
    images = throughput.our_images(JetConfig(image_size=8, num_couplings=1))
    assert images.name == "random" and images.array.shape == (1024, 8, 8, 3) and images.array.dtype == np.uint8
    assert throughput.our_images(JetConfig(**TINY)).name == "cifar10-subset"


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def work(batch_size):
        tried.append(batch_size)
        if batch_size > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_size
    flags = types.SimpleNamespace(device=torch.device("cuda"), batch_size=None)
    assert throughput.with_batch(work, "32x2", "sampling", flags) == 256 and tried == [1024, 512, 256]
    with pytest.raises(throughput.TrainingError, match="1024 images do not fit"):
        throughput.with_batch(work, "32x2", "train", types.SimpleNamespace(device=torch.device("cuda"), batch_size=1024))
    flags.device = torch.device("cpu")
    assert throughput.with_batch(lambda n: n, "32x2", "train", flags) == 4


def test_the_search_for_a_batch_begins_near_what_fits(monkeypatch):
    monkeypatch.setattr(throughput, "free_bytes", lambda device: 100e6)
    monkeypatch.setattr(throughput, "activation_bytes", lambda jet, precision: 2e6)  # of two couplings
    flags = types.SimpleNamespace(device=torch.device("cpu"), checkpoint_activations=False, precision="bfloat16", compile=False)
    monkeypatch.setitem(throughput.SIZES, "32x2", TINY | {"num_couplings": 4})
    assert throughput.hopeful_batch("32x2", flags) == 32  # 25 fit by this
    flags.compile = True
    assert throughput.hopeful_batch("32x2", flags) == 64


def test_dry_run_measures_nothing(run, capsys):
    assert run("--sizes", "32x2", "64x5", "--dry-run") is None
    out = capsys.readouterr().out
    assert "207,177,216" in out and "1,019,612,160" in out and "3.37e+11" in out


def test_profile_writes_a_trace_and_ten_costs(run, tmp_path, capsys):
    assert run("--profile", "--numbers", str(tmp_path / "numbers.jsonl")) is None
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "runs/throughput_profile/S-train.json.gz").stat().st_size > 1000
    assert len(lines) == 1 + 1 + 10 + 1 and lines[-1].endswith("S-train.json.gz") and "s a step" in lines[0]
    shares = [float(line.split()[1].rstrip("%")) for line in lines[2:12]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    noted = json.loads((tmp_path / "numbers.jsonl").read_text())
    assert [noted[name] for name in ("what", "work", "steps", "mode")] == ["profile", "train", 2, "eager"]


def test_precision_is_checked_on_a_jet_that_is_not_the_identity(run, capsys):
    assert throughput.make_parser().parse_args(["--check-precision"]).check_precision == 1000
    run("--check-precision", "100")
    out = capsys.readouterr().out
    assert "normal noise" in out and "100 images" in out
    mean, largest = (float(out.split(word)[0].split()[-1]) for word in (" in the mean", " at most"))
    assert 0 < abs(mean) < largest < 0.1


def test_the_busy_time_is_the_union_of_intervals():
    share = throughput_cases.busy_share
    assert share([(0, 1e5), (2e5, 3e5)], 1) == pytest.approx(0.2)
    assert share([(2e5, 3e5), (0, 1e5), (5e4, 1e5), (0, 6e4), (2.5e5, 4e5)], 1) == pytest.approx(0.3)
    assert share([], 1) == 0


def test_gpu_costs_leave_out_annotations(capsys):
    def event(name, begin, end, device, note=False):
        return types.SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device), is_user_annotation=note,
                                     time_range=types.SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin))
    events = [event("gemm", 0, 4e5, "CUDA"), event("Memcpy HtoD", 6e5, 7e5, "CUDA"), event("aten::mm", 0, 9e5, "CPU"),
              event("Optimizer.step", 0, 1e6, "CUDA", note=True), event("aten::item", 0, 1, "CPU")]
    assert throughput_cases.print_gpu_costs(events, 1.0, 2) == pytest.approx(0.5)
    out = capsys.readouterr().out
    assert "aten::item 1," in out and "50.000 ms a step" in out and "busy for 50.0% of 0.5000 s" in out


def test_what_has_no_row_is_noted_as_json(run, tmp_path, capsys):
    numbers = tmp_path / "numbers.jsonl"
    run("--evaluate", "5", "--numbers", str(numbers))
    assert "S: bits/dim of 5 random images in" in capsys.readouterr().out
    run("--check-precision", "7", "--numbers", str(numbers))
    evaluated, rounded = map(json.loads, numbers.read_text().splitlines())
    assert (evaluated["what"], evaluated["num_images"]) == ("evaluate", 5) and evaluated["seconds"] > 0
    assert (rounded["what"], rounded["num_images"]) == ("check-precision", 7)
    assert 0 < abs(rounded["mean_difference"]) <= rounded["largest_difference"]


def test_modes_are_measured_beside_eager(run, monkeypatch, tmp_path, capsys):
    # As if compiling and recording were there: what is tested is who is compared with whom.
    monkeypatch.setattr(throughput, "pick_device", lambda device, graph=False: torch.device("cpu"))
    monkeypatch.setattr(throughput_cases, "compile_couplings", lambda model: None)
    monkeypatch.setattr(throughput_cases, "_graphed", lambda model, config: throughput_cases._eager(
        throughput_cases.OURS, model, config))
    run("--what", "train")
    rows = run("--modes", "eager", "graph", "both", "--what", "train", draw=True)
    assert list(zip(rows["against"], rows["compile"], rows["graph"])) == [
        ("", "False", "False"), ("eager", "False", "False"), ("eager", "False", "True"), ("eager", "True", "True")]
    assert set(rows["implementation"]) == {"ours"} and list(rows["ratio"] == "") == [True, True, False, False]
    assert all(rows["startup_seconds"].astype(float) >= rows["first_step_seconds"].astype(float))
    assert "both" in capsys.readouterr().out
    assert len(run("--graph")) == 5
    figure.read(tmp_path / "results/throughput_cpu.csv")


def test_a_graph_gets_the_optimizer_and_the_step_made_for_it(monkeypatch):
    made = []
    monkeypatch.setattr(recipe, "make_optimizer", lambda parameters, config, graph=False: made.append(graph))
    monkeypatch.setattr(recipe, "make_step", lambda model, optimizer, config, micro_batch=None, graph=False:
                        made.append(graph) or (lambda x, number: made.append((number, x.requires_grad))))
    monkeypatch.setattr(throughput_cases, "compile_couplings", lambda model: made.append("compiled"))
    monkeypatch.setitem(throughput.SIZES, "S", TINY)
    flags = types.SimpleNamespace(device=torch.device("cpu"), checkpoint_activations=False)
    config = throughput.size_config("S", 2, "float32")
    for mode, grad in (("graph", False), ("both", True)):
        made.clear()
        step = throughput.our_step(throughput.OURS, "S", config, "train", lambda: torch.zeros(1), flags, mode)
        step(), step()
        assert made == ["compiled"] * grad + [True, True, (1, grad), (2, grad)]


def test_a_graph_needs_a_gpu(run):
    for flags in (["--graph"], ["--modes", "eager", "both"]):
        with pytest.raises(SystemExit, match="graph: a CUDA graph needs a GPU"):
            run(*flags)


@pytest.mark.parametrize("flags, message", [
    (["--modes", "graph"], "must have eager"), (["--modes", "eager", "fast"], "invalid choice: 'fast'"),
    (["--modes", "eager", "--compile"], "without --compile, --graph and --against"),
    (["--modes", "eager", "--profile"], "not with --profile"), (["--evaluate", "0"], "--evaluate 0: must be 1 or more"),
    (["--check-precision", "0"], "--check-precision 0: must be 1"),
    (["--sizes", "L"], "invalid choice: 'L'"), (["--steps", "0"], "--steps 0: must be 1 or more"),
    (["--threads", "0"], "--threads 0: must be"), (["--batch-size", "-1"], "--batch-size -1: must be"),
    (["--checkpoint", "x"], "only for --check-precision"), (["--device", "tpu"], "must be auto, cpu or cuda"),
    (["--profil"], "did you mean --profile?"),
    (["--device", "cuda"], "sees no GPU here"), (["--against", "/nowhere"], "with jet.py and train.py"),
    (["--against", "jet-pytorch"], "pip install --no-deps jet-pytorch==0.0.2 einops")])
def test_a_wrong_flag_is_one_line(run, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "jet_pytorch", None)  # not installed
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    error = capsys.readouterr().err or f"{stop.value.code}\n"
    assert error.count("\n") == 1 and message in error and error.startswith("throughput.py: error: ")


def test_a_csv_that_cannot_be_added_to_is_refused_first(run, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/throughput_cpu.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(throughput, "measure", None)
    with pytest.raises(SystemExit, match="missing or unknown columns"):
        run()


# ---- the bars

def fixture_rows(sizes=("S", "M"), against="jet-pytorch 0.0.2"):
    rows = []
    for size in sizes:
        for what, speed in (("train", 100), ("likelihood", 300), ("sampling", 280)):
            row = dict.fromkeys(figure.COLUMNS, "") | dict.fromkeys(figure.NUMBERS, 1) | {
                "experiment": "throughput", "size": size, "what": what, "implementation": "ours", "against": against,
                "precision": "float32", "images_per_s": speed, "step_seconds": 1 / speed, "peak_share": 0.45,
                "step_seconds_q25": 0.9 / speed, "step_seconds_q75": 1.1 / speed, "compile": False,
                "checkpoint_activations": False, "graph": False, "device": "cpu", "hardware": "A CPU"}
            rows.append(row | ({"ratio": 1.3, "ratio_q25": 1.25, "ratio_q75": 1.4} if against else {}))
            if against:
                rows.append(row | {"implementation": "jet-pytorch", "peak_share": 0.45 / 1.3})
    return pd.DataFrame(rows)


def _csv(rows, name, folder):
    rows.to_csv(folder / name, index=False)
    return folder / name


def texts(drawing):
    return " ".join(text.get_text() for text in drawing.findobj(style.matplotlib.text.Text))


def draw(tmp_path, drawn, *tables):
    """(the figure, {(what is written before a bar, colour, whether it is hatched): (length, text)})."""
    figure.draw(_csv(pd.concat(tables), "in.csv", tmp_path))
    drawing = drawn[-1][0]
    axes, = drawing.axes
    ticks = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels())}
    after = {text.xy[1]: text.get_text() for text in axes.texts}
    groups = {text.xy[1]: text.get_text() for text in axes.texts if text.get_weight() == "bold"}
    bars = {}
    for bar in axes.patches:
        place = bar.get_y() + bar.get_height() / 2
        group = groups[max(at for at in groups if at < place)]
        mode = ticks[min(ticks, key=lambda tick: abs(tick - place))]
        assert bars.setdefault((group, mode, bar.get_facecolor(), bool(bar.get_hatch())), (
            bar.get_width(), after[min(after, key=lambda at: abs(at - place))])) is not None
    assert len(bars) == len(axes.patches)  # each is told from the others
    return drawing, bars


def within(drawing):
    """Whether all that is written lies on the page, and no two bars' numbers or names touch."""
    drawing.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawing.findobj(style.matplotlib.text.Text)
             if text.get_text() and text.get_visible()]
    page = drawing.bbox
    return (all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
            and not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number]))


def test_a_bar_for_ours_and_the_port_of_each_size_and_what(tmp_path, drawn):
    drawing, bars = draw(tmp_path, drawn, fixture_rows().assign(device="cpu"))
    assert drawn[0][1] == "throughput_cpu" and drawing.get_size_inches()[0] == style.COLUMN_WIDTH and within(drawing)
    assert {(group, mode, hatched) for group, mode, _, hatched in bars} == {
        (f"{size}, {what}", mode, mode != "ours") for size in ("S", "M") for what in figure.WHATS
        for mode in ("ours", "jet-pytorch 0.0.2")}
    assert {text for _, text in bars.values()} == {
        f"{speed} · {share}" for speed in (100, 300, 280) for share in ("45% · 1.30x", "34.6%")}
    assert {length for length, _ in bars.values()} == {1}
    assert all(part in texts(drawing) for part in ("A CPU", "float32", "batch 1", "threads: 1", "higher is better",
                                                   "times jet-pytorch 0.0.2", "quartiles"))


def test_bars_are_in_proportion_within_a_size_and_whiskers_are_quartiles(tmp_path, drawn):
    rows = fixture_rows(("S",))
    port = rows["implementation"] == "jet-pytorch"
    rows.loc[port, "images_per_s"], rows.loc[port, "step_seconds"] = 50, 1 / 50
    drawing, bars = draw(tmp_path, drawn, rows[rows["what"] == "train"])
    assert {mode: length for (_, mode, _, _), (length, _) in bars.items()} == {"ours": 1, "jet-pytorch 0.0.2": 0.5}
    ends = [segment[:, 0] for lines in drawing.axes[0].collections for segment in lines.get_segments()]
    assert np.isclose(ends, [1 / 1.1, 1 / 0.9]).all(1).any()


def test_what_varies_is_in_the_heading(tmp_path, drawn):
    tables = [fixture_rows(against="").assign(precision=precision) for precision in ("float32", "bfloat16")]
    drawing, bars = draw(tmp_path, drawn, *tables)
    assert {group for group, *_ in bars} == {f"{size}, {what}, {precision}" for size in ("S", "M")
                                             for what in figure.WHATS for precision in ("float32", "bfloat16")}
    assert "times" not in texts(drawing)


def modes(gpu, **more):
    """Rows of training S in three modes on a GPU."""
    rows = fixture_rows(("S",), against="eager")
    rows = rows[(rows["implementation"] == "ours") & (rows["what"] == "train")].assign(hardware=gpu, device="cuda")
    return pd.concat([rows.assign(ratio="", ratio_q25="", ratio_q75=""), rows.assign(graph=True),
                      rows.assign(graph=True, compile=True)]).assign(**more)


def test_two_gpus_are_two_colours_with_short_names_and_modes_are_in_order(tmp_path, drawn):
    gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    drawing, bars = draw(tmp_path, drawn, *map(modes, gpus))
    names = ["eager", "graph", "compiled + graph"]
    assert [label.get_text() for label in drawing.axes[0].get_yticklabels()] == names and within(drawing)
    legend, = drawing.legends
    looks = {text.get_text(): patch.get_facecolor() for text, patch in zip(legend.texts, legend.get_patches())}
    assert list(looks) == ["H100", "H200"] and len(bars) == 6
    assert {key[:3] for key in bars} == {("S", name, look) for name in names for look in looks.values()}
    assert {text for (_, mode, *_), (_, text) in bars.items() if mode != "eager"} == {"100 · 45% · 1.30x"}


def test_equal_modes_of_two_batches_are_two_bars_and_of_one_batch_that_beside_the_port_counts(tmp_path, drawn):
    rows = fixture_rows(("S",)).query("what == 'train'")
    alone = fixture_rows(("S",), against="").query("what == 'train'").assign(images_per_s=90)
    _, bars = draw(tmp_path, drawn, rows, alone)
    assert {mode: text for (_, mode, *_), (_, text) in bars.items()} == {
        "ours": "100 · 45% · 1.30x", "jet-pytorch 0.0.2": "100 · 34.6%"}
    _, bars = draw(tmp_path, drawn, rows, alone.assign(batch_size=2))
    assert {(group, mode): text for (group, mode, *_), (_, text) in bars.items()} == {
        ("S, batch 1", "ours"): "100 · 45% · 1.30x", ("S, batch 1", "jet-pytorch 0.0.2"): "100 · 34.6%",
        ("S, batch 2", "ours"): "90 · 45%"}


def test_every_committed_row_is_drawn_and_fits(tmp_path, drawn):
    for csv in sorted((ROOT / "results").glob("throughput_*.csv")):
        rows = figure.read(csv)
        rows = rows[rows["implementation"].isin(["ours", "jet-pytorch"])]
        figure.draw(csv)
        drawing = drawn[-1][0]
        assert len(drawing.axes[0].patches) == len(rows.drop_duplicates(
            ["size", "what", "implementation", "batch_size", "compile", "graph", "hardware"])) and within(drawing)


def test_modes_without_eager_are_refused(tmp_path):
    rows = fixture_rows(("S",), against="eager")
    with pytest.raises(ResultsError, match="S train ours lacks the other half"):
        figure.read(_csv(rows[rows["implementation"] == "ours"].assign(graph=True), "in.csv", tmp_path))


def test_the_command_line_draws(tmp_path, monkeypatch, drawn, capsys):
    monkeypatch.setattr(style, "save", lambda drawing, name, out_dir: [out_dir / f"{name}.png"])
    figure.main(["--csv", str(_csv(fixture_rows(("S",)), "in.csv", tmp_path)), "--out", str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / "throughput_cpu.png")]
    with pytest.raises(SystemExit, match="no such file"):
        figure.main(["--csv", str(tmp_path / "none.csv")])


@pytest.mark.parametrize("spoil, message", [
    (lambda rows: rows.drop(columns="ratio"), "missing or unknown columns ratio"),
    (lambda rows: rows.assign(more=1), "missing or unknown columns more"),
    (lambda rows: rows.assign(step_seconds=""), "S train ours has no number as step_seconds"),
    (lambda rows: rows.assign(ratio=""), "S train ours has no number as ratio"),
    (lambda rows: rows[rows.index != 3], "S likelihood ours lacks the other half"),
    (lambda rows: pd.concat([rows, rows]), "S train ours is there twice"),
    (lambda rows: rows.assign(what="training"), "is none of train, likelihood, sampling|is there twice"),
    (lambda rows: rows[:0], "has no rows")])
def test_an_incomplete_csv_is_refused(spoil, message, tmp_path):
    with pytest.raises(ResultsError, match=message):
        figure.draw(_csv(spoil(fixture_rows()), "in.csv", tmp_path))


# ---- computed costs

def test_autograd_keeps_as_many_bytes_for_each_image():
    jet = Jet(JetConfig(**TINY))
    one, two, three = (memory.kept_bytes(jet, "float32", n) for n in (1, 2, 3))
    assert three - two == two - one > 0
    # A block of width E keeps 16 values a token and unit of E (norms, q, k, v, attention, MLP), the last norm 2.
    wide = JetConfig(**TINY | {"patch_size": 4, "emb_dim": 256, "kinds": ("channels", "spatial")})
    values = 18 * 256 * wide.num_tokens
    plain, mixed = (memory.activation_bytes(Jet(wide), precision) / 2 for precision in ("float32", "bfloat16"))
    assert 4 * values < plain < 1.1 * 4 * values and 2 * values < mixed < plain


def test_bytes_counted_without_values_are_those_of_a_jet():
    for precision, depth in zip(cost_table.PRECISIONS, (1, 3)):
        config = JetConfig(**TINY | {"block_depth": depth})
        counted = memory.activation_bytes(Jet(config), precision)
        assert cost_table.coupling_bytes(config, precision) == counted / config.num_couplings


def test_memory_by_hand():
    config = JetConfig()  # 256 tokens of 48 values, width 512, 32 couplings
    assert memory.fixed_bytes(207_177_216, "float32") == 207_177_216 * 16
    assert memory.fixed_bytes(207_177_216, "bfloat16") == 207_177_216 * 18
    assert memory.fixed_bytes(10, "float64", numbers=3) == 10 * 3 * 8
    work = 2 * 256 * 2048 * 4
    assert memory.image_bytes(config, "float32", False, 1000) == 32 * 1000 + work
    assert memory.image_bytes(config, "float32", True, 1000) == 32 * 4 * 256 * 48 + 1000 + work
    assert memory.image_bytes(config, "bfloat16", True, 1000) == 32 * 4 * 256 * 48 + 1000 + work / 2
    switches = JetConfig(actnorm=True, invertible_dense=True)
    assert memory.image_bytes(switches, "float32", True, 1000) == 3 * 32 * 4 * 256 * 48 + 1000 + work
    assert cost_table.largest_batch(24, 3e9, 1e9) == 20 and cost_table.largest_batch(24, 30e9, 1e9) == 0


def taken_and_planned(recompute):
    """GiB that a step takes, and as many as are planned."""
    config = TrainConfig(batch_size=24, model=JetConfig(
        image_size=32, patch_size=2, num_couplings=2, block_depth=1, emb_dim=128, num_heads=2))
    jet, x = Jet(config.model), torch.rand(config.batch_size, 3, 32, 32)
    optimizer = recipe.make_optimizer(jet.parameters(), config)
    _, line = memory.fit_memory(jet, optimizer, config, recompute, config.batch_size, 2 ** 40)
    small = Jet(config.model)  # its step reads what is read once of libraries and modules
    small.checkpoint_activations = jet.checkpoint_activations
    recipe.training_step(small, recipe.make_optimizer(small.parameters(), config), x[:1], 0, config)
    peak = memory.watch_memory(torch.device("cpu"))
    recipe.training_step(jet, optimizer, x, 0, config)
    return peak(), float(line.split()[4])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be read here")
def test_a_step_takes_the_memory_that_is_planned():
    """In processes of their own. Three quarters of the free memory are planned with."""
    import torch._dynamo  # noqa: F401 (torch.utils.checkpoint does, for seconds: here for its fork, too)
    kept, recomputed = forked.each(taken_and_planned, "off", "on")
    for taken, planned in (kept, recomputed):
        assert planned / 2 <= taken <= planned / 0.75, (kept, recomputed)
    assert recomputed[1] < 0.75 * kept[1]


def test_checkpointing_makes_depth_nearly_free():
    base = JetConfig()
    per_coupling = 17e6  # bytes an image, float32, about
    deep, shallow = (memory.image_bytes(JetConfig(num_couplings=n), "float32", True, per_coupling)
                     for n in (64, 16))
    assert deep / shallow < 1.25 < memory.image_bytes(base, "float32", False, per_coupling) / shallow


def test_traffic_by_hand(monkeypatch):
    assert cost_table.comm_seconds(1e9, 1) == 0
    assert cost_table.comm_seconds(1e9, 8) == pytest.approx(4e9 * 2 * 7 / 8 / 450e9)
    assert cost_table.comm_seconds(1e9, 16) == pytest.approx(4e9 * 2 * 7 / 8 / 450e9 + 4e9 * 2 / 2 / 8 / 50e9)
    monkeypatch.setattr(cost_table, "NVLINK", 1)
    monkeypatch.setattr(cost_table, "NETWORK", 1)
    for n in (2, 8, 64, 512):
        assert cost_table.comm_seconds(1, n) == pytest.approx(4 * 2 * (n - 1) / n)


def test_a_step_by_hand(monkeypatch):
    adam = 28e9 / 3.35e12
    step, traffic, backward = cost_table.step_seconds(3e15, 1e9, 1e15, 1)
    assert (step, traffic, backward) == (pytest.approx(3 + adam), 0, pytest.approx(2))
    monkeypatch.setattr(cost_table, "comm_seconds", lambda params, gpus: 1)
    last = 25 * 2 ** 20 / 4e9
    assert cost_table.step_seconds(3e15, 1e9, 1e15, 1)[0] == pytest.approx(3 + last + adam)  # hidden but for the last
    assert cost_table.step_seconds(3e15, 1e9, 1e15, 8)[0] == pytest.approx(1 / 8 + 1 + adam)  # traffic is longer
    assert cost_table.stops_scaling(3e15, 1e9, 1e15, (1, 2, 4, 8)) == 4
    assert cost_table.stops_scaling(3e15, 1e9, 1e15, (1, 2)) is None


def test_figure_4_costs_what_its_runs_cost():
    runs = cost_table.paper_runs()
    assert len(runs["main table, 32x2"]) == 1 and len(runs["Figure 4 (`ablate_coupling`)"]) == 21
    flops, = map(train_flops, runs["main table, 32x2"])
    assert flops == pytest.approx(8.6e19, rel=0.01)


def test_the_tables_tell_measured_from_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_table, "coupling_bytes", lambda config, precision: 1e7)
    text = cost_table.page(tmp_path)
    assert text.count("computed, not measured") == 3 and "40% (assumed)" in text and "no GPU was measured" in text
    assert "396 TFLOP/s assumed" in text.replace("\n", " ") and "Measured: " not in text
    gpu = fixture_rows(("32x2",), against="").assign(
        device="cuda", hardware="NVIDIA H100 80GB HBM3", precision="bfloat16", batch_size=256, device_memory_gib=79.1,
        flops_per_s=500e12, images_per_s=1480)
    _csv(gpu, "throughput_cuda.csv", tmp_path)
    row, = [line for line in cost_table.page(tmp_path).splitlines() if line.startswith("| 32x2 | bfloat16 | no |")]
    assert row.endswith("| 1,480 measured (NVIDIA H100 80GB HBM3) |")
    line, = [line for line in cost_table.page(tmp_path).splitlines() if line.startswith("Measured: ")]
    assert "32x2 trains at 500 TFLOP/s on one NVIDIA H100 80GB HBM3; hours there are 0.79 times" in line
