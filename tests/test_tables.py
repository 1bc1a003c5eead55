"""The tables from fixtures: which number is in which cell, what is beside what, and what is refused."""
import json
import re

import numpy as np
import pandas as pd
import pytest
from grid_rows import grid_rows

from experiments import main_results
from harness.flops import train_flops
from paper_figures import reported as published_numbers
from paper_figures import style, table_files, tables
from paper_figures.results_csv import ResultsError
from sweeps import plan

TABLES = {
    "ablate_coupling": (tables.draw_figure4, "table_figure4"),
    "ablate_splits": (tables.draw_splits, "table2a"),
    "ablate_layers": (tables.draw_layers, "table2b"),
    "main_results": (tables.draw_main, "main_table"),
}
RATIOS = {"smoke": ("channel-only", "4:1", "1:1", "spatial-only"),  # of Figure 4
          "small": ("channel-only", "8:1", "4:1", "2:1", "1:1", "spatial-only")}
TARGETS = "ImageNet-1k 64x64 / oord / elbo"
UNKNOWN = "Variant or bound unknown: never compared"


def fixture_rows(experiment, scale="smoke", seeds=(0,)):
    return grid_rows(experiment, scale, seeds)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the tables of some rows; no model is shipped. Returns (Markdown, LaTeX)."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "jet_cifar10")

    def draw(rows, folder="out"):
        experiment, scale = rows.iloc[0][["experiment", "scale"]]
        rows.to_csv(tmp_path / "in.csv", index=False)
        paths = TABLES[experiment][0](tmp_path / "in.csv", tmp_path / folder)
        assert [path.name for path in paths] == [f"{TABLES[experiment][1]}_{scale}.{kind}" for kind in ("md", "tex")]
        return [path.read_text() for path in paths]
    return draw


def sections(text):
    """{title: rows as dicts} of a Markdown file, in order; all rows of a table have as many cells."""
    found = {}
    for block in re.split(r"\n(?=\*\*)", text)[1:]:
        title, *lines = block.splitlines()
        lines = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1
        found[re.match(r"\*\*(.+?)\.?\*\*", title)[1]] = [dict(zip(lines[0], line)) for line in lines[2:]]
    return found


def reported(**changes):
    """The text of a reported.csv with one row of these values."""
    row = dict.fromkeys(published_numbers.COLUMNS, "") | {
        "model": "M", "year": "2020", "dataset": "cifar10", "variant": "cifar10", "bits_per_dim": "3.10",
        "dequantization": "uniform", "bound": "elbo", "source": "somewhere"} | changes
    return ",".join(published_numbers.COLUMNS) + "\n" + ",".join(row.values()) + "\n"


def test_table_2a_has_each_number_in_its_cell(write):
    rows = fixture_rows("ablate_splits", "small")
    text, _ = write(rows)
    grid, costs, *_ = sections(text).values()
    assert [row["couplings"].split(" (ch")[0] for row in grid] == [
        "channel couplings alone", "spatial couplings alone", "4:1 (official)"]
    for row, ratio in zip(grid, ("channel-only", "spatial-only", "4:1")):
        for mode in ("pairing", "masking"):
            mine = rows[(rows["coupling_ratio"] == ratio) & (rows["split_mode"] == mode) & (rows["split"] == "test")].iloc[0]
            assert row[mode] == f"{mine['bits_per_dim']:.4f} ± {mine['bits_per_dim_se']:.4f}"
            cost, = [cost for cost in costs if mine["run_id"] in cost["Source"]]
            assert cost["Run"].endswith(mode) and "commit 0123456" in cost["Source"] and cost["logdet/cap"] == "50.0%"
            assert cost["Seconds"] == f"{mine['train_seconds']:.1f}" and cost["Parameters"] == f"{mine['num_params'] / 1e6:.3f} M"
            assert float(cost["Training FLOPs"]) == pytest.approx(mine["train_flops"], rel=5e-3)
        assert row["the paper's"] == "not known"
    caption = text.splitlines()[0]
    assert "results/paper.csv" in caption and "one seed (0): ± standard error over images" in caption and "10,000 test images" in caption
    assert "CIFAR-10, variant cifar10," in caption and "ELBO" in caption and "no evidence" not in caption


def test_table_2b_has_no_cap_where_layers_add_to_the_log_det(write):
    text, _ = write(fixture_rows("ablate_layers"))
    grid, costs, *_ = sections(text).values()
    assert [(row["before each coupling"], row["no dense layers"], row["dense layers"]) for row in grid] == [
        ("no ActNorm", "4.0000 ± 0.0031", "4.0100 ± 0.0032"), ("ActNorm", "4.0200 ± 0.0033", "4.0300 ± 0.0034")]
    assert [cost["logdet/cap"] for cost in costs] == ["50.0%", "no cap", "no cap", "no cap"]
    assert "no cap: ActNorm" in text and "no evidence" in text


@pytest.mark.parametrize("scale, shared", [("smoke", ["channel couplings alone; row = column = checkerboard = mix"]),
                                           ("small", ["channel couplings alone; row = column = checkerboard = mix",
                                                      "8:1; checkerboard = mix"])])
def test_figure_4_as_a_table_marks_a_run_that_stands_for_several(write, scale, shared):
    rows = fixture_rows("ablate_coupling", scale)
    text, _ = write(rows.sample(frac=1, random_state=0))
    grid, costs, *_ = sections(text).values()
    test = rows[rows["split"] == "test"]
    assert len(grid) == len(RATIOS[scale]) and len(costs) == rows["run_id"].nunique() < len(test)
    for row, ratio in zip(grid, RATIOS[scale]):
        assert list(row)[1:-1] == ["row", "column", "checkerboard", "mix"]
        for split in list(row)[1:-1]:
            point = test[(test["coupling_ratio"] == ratio) & (test["spatial_split"] == split)].iloc[0]
            assert row[split].split()[0] == f"{point['bits_per_dim']:.4f}"
            assert row[split].endswith("†") == ((test["run_id"] == point["run_id"]).sum() > 1)
            assert f"(channel share {point['channel_share']:.3f})" in row["channel : spatial"]
    assert f"their couplings are the same: {' / '.join(shared)}.\n" in text


def test_several_seeds_are_a_mean_and_a_standard_deviation(write):
    text, _ = write(fixture_rows("ablate_splits", "small", seeds=(0, 1, 2)))
    grid, costs, *_ = sections(text).values()
    assert "3 seeds (0, 1, 2): mean ± standard deviation over seeds" in text and grid[0]["pairing"] == "4.0200 ± 0.0200"
    assert len(costs) == 6 and "seed0_" in costs[0]["Source"] and "and 2 more" in costs[0]["Source"]
    text, _ = write(fixture_rows("main_results", "small", seeds=(0, 1, 2)))
    assert sections(text)["cifar10-animals / elbo"][0]["±"] == "0.0200 sd of 3 seeds"


@pytest.mark.parametrize("share, saturated", [(0.899, False), (0.9, True), (0.97, True)])
def test_a_saturated_run_says_that_its_number_says_little(write, share, saturated):
    rows = fixture_rows("ablate_splits")
    rows.loc[rows["split_mode"] == "masking", "logdet_cap_share"] = share
    grid, costs, *_ = sections(write(rows)[0]).values()
    assert ["saturated" in row["masking"] for row in grid] == [saturated] * 3
    assert not any("saturated" in row["pairing"] for row in grid)
    assert [("saturated" in cost["Note"], cost["logdet/cap"]) for cost in costs[:2]] == [
        (False, "50.0%"), (saturated, f"{share:.1%}")]


@pytest.mark.parametrize("scale", style.SCALES)
def test_published_numbers_have_their_digits_and_only_what_can_be_compared_beside_them(write, scale):
    found = sections(write(fixture_rows("main_results", scale))[0])
    published = tables.read_reported(tables.REPORTED)
    ours = len(main_results.configs(scale)) + (0 if scale == "paper" else 2)
    assert sum(len(rows) for rows in found.values()) == len(published) + ours
    assert list(found)[-1] == UNKNOWN
    for row in published:
        title, rows = next((title, rows) for title, rows in found.items() for cells in rows if cells["Source"] == row["source"]
                           and cells["Model"].startswith(row["model"]) and cells["bits/dim"] == row["bits_per_dim"]
                           and (tables.DATASETS[row["dataset"]] in title + cells["Model"]) and place(title) == place_of(row))
        ours = [cells for cells in rows if "ours" in cells["Model"]]
        assert not ours or (row["bound"], row["variant"]) in {("elbo", "oord"), ("elbo", "cifar10")}
    for title, rows in found.items():
        bits = [float(cells["bits/dim"]) for cells in rows if cells["bits/dim"] != "not run here"]
        assert bits == sorted(bits) or title == UNKNOWN
    assert [cells["Model"] for cells in found[UNKNOWN]] == sorted(cells["Model"] for cells in found[UNKNOWN])


def place(title):
    """(variant, bound) of a section."""
    variant, bound = title.split(" / ")[1:] if " / " in title else ("unknown", "")
    return variant, bound


def place_of(row):
    if "unknown" in (row["variant"], row["bound"]):
        return "unknown", ""
    return row["variant"] + (" (unconfirmed variant)" if row["variant"] == "oord?" else ""), row["bound"]


BOUNDS = {  # of a model on all its images: bound, draws (on CIFAR-10), as its evaluation code has it
    "Flow++": ("importance-weighted", "4096"), "VFlow": ("importance-weighted", "4096"), "MuLAN": ("ode", "20"),
    "FFJORD": ("ode", ""), "MRCNF": ("ode", ""), "ScoreFlow (CNF, no aug.)": ("ode", ""), "Flow Matching (OT)": ("ode", "50"),
    "i-ResNet": ("estimate", ""), "Residual Flow": ("estimate", ""), "i-DenseNet": ("estimate", ""),
    "DenseFlow-74-10": ("importance-weighted", "1000"), "Glow": ("elbo", ""), "RealNVP": ("elbo", "")}


def test_published_numbers_have_the_bound_that_their_evaluation_computes():
    published = tables.read_reported(tables.REPORTED)
    for model, (bound, draws) in BOUNDS.items():
        rows = [row for row in published if row["model"] == model]
        assert {row["bound"] for row in rows} == {bound}
        assert [row["iw_samples"] for row in rows if row["dataset"] == "cifar10"] == [draws]
    cells = {(row["model"], row["dataset"]): row for row in published}
    assert cells["TarFlow [2-768-8-8]", "imagenet64"]["variant"] == "oord"
    assert cells["MuLAN", "cifar10"]["dequantization"] == "truncated-normal"
    assert cells["CDFlow", "cifar10"]["augmentation"] == "yes" and "2,000" in cells["JetFormer PyTorch port, 8 couplings", "cifar10"]["note"]


def test_draws_augmentation_and_classes_are_columns_of_the_main_table(write):
    found = sections(write(fixture_rows("main_results", "small"))[0])
    flow, = [row for row in found["CIFAR-10 / cifar10 / importance-weighted"] if row["Model"] == "DenseFlow-74-10"]
    port, *_ = [row for row in found["CIFAR-10 / cifar10 / elbo"] if row["Model"].startswith("JetFormer")]
    assert (flow["IW"], flow["Augm."], port["Cond."]) == ("1000", "yes", "class")
    assert {(row["Augm."], row["Cond."]) for row in found[TARGETS] if "ours" in row["Model"]} == {("no", "no")}


def test_our_rows_are_beside_the_same_images_only(write):
    rows = fixture_rows("main_results", "paper")
    text = write(rows)[0]
    found = {title: cells for title, cells in sections(text).items() if any("ours" in row["Model"] for row in cells)}
    groups = {f"{name} / {variant} / elbo": f"{key}-{variant}".replace("cifar10-", "") for name, key, variant in [
        ("ImageNet-1k 64x64", "imagenet64", "oord"), ("ImageNet-1k 32x32", "imagenet32", "oord"),
        ("CIFAR-10", "cifar10", "cifar10"), ("imagenet21k-64", "imagenet21k-64", "box"), ("imagenet21k-32", "imagenet21k-32", "box")]}
    assert set(found) == set(groups)
    for title, dataset in groups.items():
        ours = {row["Source"].split(",")[0]: row for row in found[title] if "ours" in row["Model"]}
        mine = rows[(rows["dataset"] == dataset) & (rows["split"] == "test")]
        assert set(ours) == set(mine["run_id"])
        for _, row in mine.iterrows():
            cells = ours[row["run_id"]]
            assert cells["bits/dim"] == f"{row['bits_per_dim']:.4f}" and cells["±"] == f"{row['bits_per_dim_se']:.4f} s.e."
            assert ("begins with" in cells.get("Note", "")) == (row["training"] == "fine-tuned")
    assert text.count("No published number is comparable.") == 2
    note = next(row["Note"] for row in found[TARGETS] if "64 couplings x depth 5, pretrained, fine" in row["Model"])
    before = rows[(rows["size"] == "64x5") & (rows["dataset"] == "imagenet21k-64-box")].iloc[0]
    flops = tables.power(before["train_flops"])
    assert note == f"begins with 64x5 pretrained on imagenet21k-64-box: {flops} training FLOPs more"


def test_what_was_not_run_says_why(write):
    ours = [row for row in sections(write(fixture_rows("main_results", "small"))[0])[TARGETS] if "ours" in row["Model"]]
    assert [(row["bits/dim"], row["Training FLOPs"]) for row in ours] == [("not run here", "8.63e19"), ("not run here", "4.3e20")]
    assert "61 GPU-hours of an H100, both computed" in ours[0]["Note"]
    for (size, training, name), (flops, hours) in tables.paper_costs().items():
        config, = [point.config for point in main_results.configs("paper")
                   if tuple(point.values(tables.MAIN_SWEPT).values()) == (size, training, name)]
        assert float(flops) == pytest.approx(train_flops(config), rel=5e-3)
        assert hours == round(plan.gpu_hours(train_flops(config), "bfloat16"))


@pytest.mark.parametrize("experiment", TABLES)
def test_no_cell_is_empty_and_both_files_say_the_same(write, experiment):
    rows = fixture_rows(experiment, "small")
    rows["train_seconds"] = np.nan
    text, latex = write(rows)
    found = sections(text)
    assert all(cell.strip() for part in found.values() for row in part for cell in row.values())
    assert ("–: nothing to say, not run, or not in results/reported.csv" in text) == (experiment == "main_results")
    assert "not recorded" in text and "nan" not in text
    counts = [line.count(" & ") for line in latex.splitlines() if line.endswith(r"\tabularnewline")]
    assert counts == [len(line) - 1 for part in found.values() for line in (part[0], *part)]
    assert latex.count(r"\begin{table}") == latex.count(r"\end{tabular}") == latex.count(r"\bottomrule") == len(found)
    plain = re.sub(r"\\[\\{}&%#$_]", "", latex)
    assert plain.count("{") == plain.count("}") and not re.search(r"[±–†~^<>|#_%](?!\$)", plain) and plain.count("$") % 2 == 0
    for line in latex.splitlines():
        if line.endswith(r"\tabularnewline"):
            assert len(re.findall(r"(?<!\\)&", line)) == line.count(" & ")
    assert all(ord(c) < 128 for c in latex)


def test_latex_and_markdown_escape_what_they_would_read():
    part = table_files.Part(header=("a", "b"), rows=[("[1] 5 % & a_b #2 $x$ {y} ~^\\", "p|q <3 ± †"), ("ours: me", "–")])
    text = table_files.latex("50 %", [part])
    assert (r"{[}1] 5 \% \& a\_\allowbreak{}b \#2 \$x\$ \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{} & "
            r"p\textbar{}q $<$3 $\pm$ \textdagger{} \tabularnewline") in text
    assert r"\textbf{ours: me} & --" in text and r"\caption{50 \%}" in text
    text = table_files.markdown("", [part])
    assert r"| p\|q <3 ± † |" in text and "| **ours: me** | – |" in text


@pytest.mark.parametrize("experiment", TABLES)
def test_equal_rows_are_equal_bytes_in_any_order(write, experiment):
    rows = fixture_rows(experiment, seeds=(0, 1))
    first = write(rows, "one")
    assert first == write(rows.iloc[::-1], "two") == write(rows.sample(frac=1, random_state=0), "three")
    rows["bits_per_dim"] += 0.1
    assert first[0] != write(rows, "four")[0]


@pytest.mark.parametrize("experiment", TABLES)
@pytest.mark.parametrize("change, message", [
    (lambda r: r[r["run_id"] != r["run_id"].iloc[-1]], "missing"), (lambda r: pd.concat([r, r[:1]]), "is there twice"),
    (lambda r: r.assign(bits_per_dim=np.inf), "has no number as bits_per_dim"),
    (lambda r: r.assign(train_seconds="long"), "has no number as train_seconds"),
    (lambda r: r.assign(logdet_cap_share=np.inf), "has no number as logdet_cap_share")])
def test_a_csv_that_must_not_be_drawn_is_refused_in_one_line(tmp_path, experiment, change, message):
    change(fixture_rows(experiment)).to_csv(tmp_path / "in.csv", index=False)
    draws = {name: draw for name, (draw, _) in TABLES.items()}
    with pytest.raises(SystemExit, match=message) as stop:
        style.main("tables.py", "", draws, ["--csv", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out")])
    assert stop.value.code.startswith("tables.py: error: ") and "\n" not in stop.value.code and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [
    (reported(variant="oord!"), r"row 1 \(M\): variant oord! is none of oord, oord\?"),
    (reported(variant=""), "variant empty is none of"), (reported(bound="upper"), "bound upper is none of elbo"),
    (reported(augmentation="flips"), "augmentation flips is none of yes, no"),
    (reported(conditional="yes"), "conditional yes is none of class, no"),
    (reported(bound="ode", iw_samples="0"), "iw_samples 0 is no number like 4096"),
    (reported(iw_samples="2"), "bound elbo has no iw_samples"),
    (reported(dequantization="normal"), "dequantization normal is none of"),
    (reported(dataset="mnist"), "dataset mnist is none of"), (reported(bits_per_dim="nan"), "bits_per_dim nan is no number"),
    (reported(bits_per_dim="-3.1"), "bits_per_dim -3.1 is no number"), (reported(bits_per_dim=" 3.1 "), "is no number like 3.72"),
    (reported(year="soon"), "year soon is no year"), (reported(variant="oord"), "cifar10 has no variant oord"),
    (reported(model="ours: Foo"), "its model is not ours"), (reported(note='"two\nlines"'), "a published row is one line"),
    (reported(bits_per_dim=""), "bits_per_dim empty is no number"), (reported(bits_per_dim="3,1"), "has not 12 fields"),
    (reported(source=" "), r"row 1 \(M\): has no source"), (reported(model=""), "has no model"),
    (reported() + reported(bits_per_dim="3.2").split("\n", 1)[1], r"row 2 \(M\): cifar10 cifar10 elbo is there twice"),
    (reported().replace("bound", "bounds"), "has not the columns model, year"), (reported().rsplit(",", 2)[0], "has not 12 fields"),
    ("", "has not the columns"), ("\xff", "not readable")])
def test_a_wrong_table_of_published_numbers_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "reported.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultsError, match=message) as error:
        tables.read_reported(tmp_path / "reported.csv")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "reported.csv"))
    with pytest.raises(ResultsError, match="not readable"):
        tables.read_reported(tmp_path / "none.csv")


def shipped(**changes):
    """The done.json of a made-up model."""
    model = {"num_couplings": 20, "block_depth": 1, "emb_dim": 64, "image_size": 32, "channels": 3, "scale_factor": 2.0,
             "actnorm": False, "invertible_dense": False}
    row = {"split": "test", "step": 20_000, "bits_per_dim": 3.98765, "bits_per_dim_se": 0.00612, "num_images": 10_000,
           "logdet_nats": 0.93 * 20 * 3072 / 2 * np.log(2)}
    return {"config": {"model": model, "total_steps": 20_000, "batch_size": 128, "seed": 3}, "num_params": 1_234_567,
            "rows": [row | {"split": "train", "bits_per_dim": 1.0}, row], "train_seconds": 3600.0, "dataset": "cifar10",
            "variant": "cifar10", "git_commit": "fedcba987", "git_dirty": True, "hardware": "CPU", "threads": 1,
            "num_images": 10_000} | changes


def test_the_shipped_model_is_a_row_beside_the_published_numbers(write):
    assert "Jet small" not in write(fixture_rows("main_results"))[0]
    tables.SHIPPED.mkdir()
    (tables.SHIPPED / "done.json").write_text(json.dumps(shipped()))
    text, _ = write(fixture_rows("main_results"))
    row, = [row for row in sections(text)["CIFAR-10 / cifar10 / elbo"] if "ours" in row["Model"]]
    assert row == {"Model": "**ours: Jet small, 20 couplings x depth 1, width 64 (assets/jet_cifar10)**", "Year": "–",
                   "bits/dim": "3.9876", "±": "0.0061 s.e.", "Dequantization": "uniform", "Augm.": "no", "Cond.": "no", "Parameters": "1.235 M",
                   "Training FLOPs": "not in done.json", "Seconds": "3,600.0", "logdet/cap": "93.0%", "Images": "10,000",
                   "Source": "jet_cifar10, commit fedcba9 with changes",
                   "Note": "saturated: the number says little; 20,000 steps of 128, seed 3"}
    assert text.count("Jet small") == 1 and "No run of ours" not in text.split("CIFAR-10 / cifar10 / elbo")[1].split("\n")[0]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(shipped(rows=[])), json.dumps(shipped(num_params="many")),
                                  json.dumps(shipped(rows=[shipped()["rows"][1] | {"bits_per_dim": np.nan}]))])
def test_a_damaged_shipped_model_is_refused_in_one_line(write, text):
    tables.SHIPPED.mkdir()
    (tables.SHIPPED / "done.json").write_text(text)
    with pytest.raises(ResultsError, match=r"done\.json: damaged") as error:
        write(fixture_rows("main_results"))
    assert "\n" not in str(error.value)


def test_the_command_line_writes_the_tables(tmp_path, capsys, write):
    write(fixture_rows("ablate_layers"))
    style.main("tables.py", "", {name: draw for name, (draw, _) in TABLES.items()},
               ["--csv", str(tmp_path / "in.csv"), "--out", str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"table2b_smoke.{kind}") for kind in ("md", "tex")]
