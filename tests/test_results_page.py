"""RESULTS.md and the command that redraws everything: each number from a CSV, and each verdict by its rule."""
import importlib
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from grid_rows import grid_rows

from paper_figures import figure2, inference, redraw, results_page, site_page, style, tables
from paper_figures.results_csv import ResultsError, final_test_rows


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """A folder of CSVs of small scale, Figure 4 with two seeds."""
    folder = tmp_path_factory.mktemp("unchanged")
    for item in results_page.ITEMS:
        if item.experiment != "draw_samples":
            grid_rows(item.experiment, "small", (0, 1) if item.experiment == "ablate_coupling" else (0,)).to_csv(
                folder / f"{item.experiment}_small.csv", index=False)
    (folder / "reported.csv").write_text((style.ROOT / "results/reported.csv").read_text())
    return folder


@pytest.fixture
def results(unchanged, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(unchanged, tmp_path / "results")


@pytest.fixture(scope="module")
def text(unchanged):
    return results_page.page(unchanged, unchanged / "assets")


def change(folder, name, change):
    path = folder / f"{name}_small.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


def item_text(folder, title):
    """What the page says of one item."""
    item, = [item for item in results_page.ITEMS if item.title.startswith(title)]
    return "\n".join(results_page.item_section(item, folder))


def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_only_known_claims_are_counted(text):
    for title in ("Figure 4", "Table 2a", "Table 2b"):
        assert "The paper's numbers are not known here: no sign to compare with." in section(text, title)
        assert not {"agrees", "disagrees"} & {line.split("|")[-2].strip() for line in section(text, title).splitlines() if "|" in line}
    assert "Of 2 comparisons that speak to the claim" in section(text, "Main table")  # not that fine-tuning helps
    assert "| depth 6 - depth 5 |" in section(text, "Figure 2b") and "Of 4 comparisons" in section(text, "Figure 2b")


def test_a_range_is_of_one_image_set(text):
    text = section(text, "Main table")
    assert "CIFAR-10 animals (10,000 test images): 4.0000 to 4.0400 bits/dim; CIFAR-10 vehicles" in text


def test_a_run_that_stands_for_several_counts_once(text):
    assert "40 runs, 2 seeds" in section(text, "Figure 4")  # 24 points of the figure are 20 runs


def test_vit_and_cnn_are_compared_at_equal_compute(results):
    def on_lines(rows):  # a CNN's bits/dim fall by 0.2 per factor of e in compute, a ViT's are 0.05 above that
        return rows.assign(bits_per_dim=8 - 0.2 * np.log(rows["train_flops"]) + 0.05 * (rows["block"] == "vit"))
    change(results, "compare_vit_cnn", on_lines)
    rows = final_test_rows(results / "compare_vit_cnn_small.csv", "compare_vit_cnn", figure2.SWEPT_A, "")
    found = inference.compare(rows, figure2.SWEPT_A, {}, results_page.vit_against_cnn(rows))
    assert len(found) >= 2 and all(np.isclose(one.value, 0.05) and one.contrast.wanted == -1 for one in found)


def test_the_claims_have_the_right_signs(results):
    """Numbers that follow the paper agree with every claim, and their mirror image with none."""
    def follow(sign):
        def of(name, score):
            rows = grid_rows(name, "small")
            return rows.assign(bits_per_dim=[4 + sign * score(row) for row in rows.itertuples()], bits_per_dim_se=1e-5)
        return {
            "compare_vit_cnn": of("compare_vit_cnn", lambda row: row.block == "cnn"),
            "ablate_block_depth": of("ablate_block_depth", lambda row: -0.1 * int(row.block_depth)),
            "scaling": of("scaling", lambda row: 1e-14 * row.train_flops * (
                1 if row.dataset.endswith("subset") and row.split == "test" else -1)),
            "main_results": of("main_results", lambda row: row.training != "fine-tuned")}
    for sign in (1, -1):
        for item in results_page.ITEMS:
            if item.contrasts and item.title.split(":")[0] not in ("Figure 4", "Table 2a", "Table 2b"):
                follow(sign)[item.experiment].to_csv(results / f"{item.experiment}_small.csv", index=False)
                rows = item.rows(results / f"{item.experiment}_small.csv")
                found = inference.compare(rows, item.swept, {}, item.contrasts(rows))
                agree = {one.value * one.contrast.wanted > 0 for one in found if one.contrast.wanted}
                assert agree == {sign > 0}, item.title


def test_an_item_reads_what_its_experiment_writes():
    for item in results_page.ITEMS:
        experiment = importlib.import_module(f"experiments.{item.experiment}").EXPERIMENT
        assert (item.swept, item.varying) == (experiment.swept, experiment.varying), item.title


def test_a_comparison_without_both_sides_is_left_out(results):
    """A grid may be another: the page says what its CSV holds."""
    change(results, "ablate_block_depth", lambda rows: rows[rows["block_depth"] != 3].assign(grid_points=5))
    change(results, "ablate_coupling", lambda rows: rows[rows["coupling_ratio"] != "4:1"].assign(grid_points=20))
    change(results, "compare_vit_cnn", lambda rows: rows[rows["block"] == "vit"].assign(grid_points=3))
    text = item_text(results, "Figure 2b")
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| depth")] == [
        "depth 2 - depth 1", "depth 4 - depth 2", "depth 5 - depth 4", "depth 6 - depth 5"]
    assert "Of 3 comparisons" in text and "| bits/dim |" not in item_text(results, "Figure 4") + item_text(results, "Figure 2a")


def test_saturation_is_told(results, text):
    assert "saturates" not in text
    change(results, "scaling", lambda rows: rows.assign(logdet_cap_share=[0.9, *rows["logdet_cap_share"][1:]]))
    assert "saturates" not in item_text(results, "Figure 3")  # that row is of training images
    change(results, "scaling", lambda rows: rows.assign(logdet_cap_share=0.9))
    assert "is at 90.0% of it: **it saturates" in item_text(results, "Figure 3")
    assert "have no such cap" in section(text, "Table 2b") and "have no such cap" not in section(text, "Figure 4")


def test_what_was_not_run_is_told_with_its_command(text):
    assert "Not run: medium, paper" in section(text, "Figure 3") and "Not run: small, medium, paper" in section(text, "Figure 5")
    assert "python experiments/scaling.py --scale SCALE" in text


def test_the_small_model_is_told_from_its_folder(tmp_path):
    model = {"num_couplings": 20, "block_depth": 1, "emb_dim": 64, "scale_factor": 2.0, "image_size": 32, "channels": 3,
             "actnorm": False, "invertible_dense": False}
    row = {"bits_per_dim": 3.9, "bits_per_dim_se": 0.005, "logdet_nats": 0.5 * 20 * 1536 * math.log(2), "num_images": 10_000}
    done = {"config": {"model": model, "total_steps": 8000, "batch_size": 64, "seed": 0}, "num_params": 123,
            "train_seconds": 60.0, "threads": 1, "hardware": "CPU", "git_commit": "abcdef012", "dataset": "cifar10",
            "variant": "cifar10", "num_images": 10_000, "rows": [
                {**row, "step": step, "split": split, "bits_per_dim": 3.9 + (step == 4000)} for step in (4000, 8000)
                for split in ("train", "test")]}
    path = tmp_path / "assets/jet_cifar10/done.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(done))
    text = section(results_page.page(tmp_path, tmp_path / "assets"), "The small trained model")
    assert "| 4,000 | 10,000 | 4.9000 ± 0.0050 |" in text and "| 8,000 | 10,000 | 3.9000 ± 0.0050 |" in text
    assert "at 50.0% of its cap" in text
    for damaged in ("", "[]", "{}", json.dumps(done)[:200], json.dumps(done | {"git_commit": None}),
                    json.dumps(done | {"rows": done["rows"][:1]}), json.dumps(done).replace("3.9", "NaN")):
        path.write_text(damaged)
        with pytest.raises(ResultsError, match="done.json: damaged"):
            results_page.page(tmp_path, tmp_path / "assets")


def test_a_csv_of_another_scale_than_its_name_says_is_refused(tmp_path, drawn):
    grid_rows("ablate_layers", "smoke").to_csv(tmp_path / "ablate_layers_small.csv", index=False)
    with pytest.raises(SystemExit, match="is of smoke scale by its rows, and of small by its name"):
        redraw.main(["--results-dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_redraw_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        redraw.main(["--results-dir", str(tmp_path / "typo")])
    assert not (tmp_path / "typo").exists()


def test_redraw_draws_everything(results, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: style.write_files(
        dict.fromkeys([f"{name}.pdf", f"{name}.png"], ""), out_dir))  # empty, for that takes seconds
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(results_page, "page", lambda folder: f"the page of {folder}")  # these are tested by themselves
    monkeypatch.setattr(site_page, "files", lambda *folders: {"index.html": f"the site of {folders}".encode()})
    (results / "scaling_smoke.csv").write_text("not drawn")
    redraw.main(["--results-dir", str(results), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}_small.{kind}" for name in ("figure2a", "figure2b", "figure3", "figure4", "figure5") for kind in ("pdf", "png")} | {
        f"{name}_small.{kind}" for name in ("table2a", "table2b", "table_figure4", "main_table", "conditions") for kind in ("md", "tex")} | {
        "figure1.pdf", "figure1.png"}
    assert (results / "RESULTS.md").read_text() == f"the page of {results}"
    assert (results / "site/index.html").read_text() == f"the site of {(results, tmp_path / 'out')}"
    style.pyplot().close("all")


def test_a_csv_of_no_experiment_is_refused(tmp_path):
    (tmp_path / "other_small.csv").write_text("a\n1\n")
    with pytest.raises(SystemExit, match="other_small.csv: is of none of"):
        redraw.main(["--results-dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_what_is_committed_is_what_the_csvs_give_and_what_differs_is_named(tmp_path, monkeypatch):
    """All files have the same bytes again, but for those that were changed; a user's matplotlibrc changes nothing.

    Without PDFs, whose fonts take long: .ci/run makes them, too.
    """
    monkeypatch.delitem(style.METADATA, "pdf")
    for name in ("results", "paper_figures/out"):
        shutil.copytree(style.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*_smoke*", "*.pdf"))
    results, out = tmp_path / "results", tmp_path / "paper_figures/out"
    for path in (out / "figure4_small.png", out / "figure9_small.png", results / "RESULTS.md", results / "site/index.html"):
        path.write_bytes(b"other")
    (tmp_path / "matplotlibrc").write_text("savefig.bbox: tight\naxes.facecolor: red\nfont.family: serif\n")
    style.matplotlib.rc_file(tmp_path / "matplotlibrc")
    style.pyplot.cache_clear()  # as in a new process
    with pytest.raises(SystemExit) as stop:
        redraw.main(["--check", "--results-dir", str(results), "--out", str(out)])
    named = re.findall(r"[\w.]+\.(?:png|pdf|md|tex|html)", stop.value.code)
    assert sorted(named) == ["RESULTS.md", "figure4_small.png", "figure9_small.png", "index.html"]
