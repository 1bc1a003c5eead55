"""Figure 4 from a fixture: what is drawn, equal bytes, and what is refused."""
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
from grid_rows import grid_rows

from paper_figures import figure4, style
from paper_figures.results_csv import ResultsError

SPLITS = ["row", "column", "checkerboard", "mix"]


def fixture_rows(scale, seeds=(0,)):
    return grid_rows("ablate_coupling", scale, seeds)


@pytest.fixture
def save(tmp_path):
    def write(rows):
        rows.to_csv(tmp_path / "in.csv", index=False)
        return tmp_path / "in.csv"
    return write


def main(*flags):
    style.main("figure4.py", "", {"ablate_coupling": figure4.draw}, flags)


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(style.matplotlib.text.Text))


@pytest.mark.parametrize("scale, ratios", [("smoke", 4), ("small", 6), ("paper", 6)])
def test_a_line_for_each_split_over_the_realised_shares(save, drawn, scale, ratios):
    rows = fixture_rows(scale)
    figure4.draw(save(rows.sample(frac=1, random_state=0)))
    (figure, name), = drawn
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in SPLITS}
    assert name == f"figure4_{scale}" and list(lines) == SPLITS
    for split, line in lines.items():
        points = rows[(rows["split"] == "test") & (rows["spatial_split"] == split)]
        points = points.sort_values("channel_share")
        assert np.allclose(line.get_xdata(), points["channel_share"]) and len(points) == ratios
        assert np.allclose(line.get_ydata(), points["bits_per_dim"])
    assert len({line.get_color() for line in lines.values()}) == len({line.get_marker() for line in lines.values()}) == 4
    text = texts(figure)
    assert scale in text and style.DATASET_TITLES[rows["dataset"][0]] in text and "lower is better" in text
    assert ("not evidence" in text) == (scale == "smoke")
    assert ("8:1: checkerboard = mix" in text) == (scale == "small")
    assert figure.get_size_inches()[0] == style.COLUMN_WIDTH


def test_seeds_are_drawn_as_mean_and_band(save, drawn):
    figure4.draw(save(fixture_rows("small", seeds=(0, 1, 2))))
    axes = drawn[0][0].axes[0]
    assert len(axes.collections) == 4 and "3 seeds" in drawn[0][0].legends[0].get_title().get_text()
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    line = axes.lines[0].get_ydata()
    assert np.isclose(band.max() - line.max(), 0.02) and np.isclose(line.min() - band.min(), 0.02)


def test_what_the_csv_holds_is_drawn_whatever_the_grid(save, drawn):
    """Another grid needs no change here: fewer ratios, and a split that has no look yet."""
    rows = fixture_rows("small")
    rows = rows[rows["coupling_ratio"].isin(["4:1", "1:1"])]
    mix = rows[rows["spatial_split"] == "mix"]
    rows = pd.concat([mix.assign(spatial_split="diagonal", run_id="d" + mix["run_id"]), rows])
    figure4.draw(save(rows.assign(grid_points=10)))
    lines = drawn[0][0].axes[0].lines[:-1]
    assert [line.get_label() for line in lines] == [*SPLITS, "diagonal"]
    assert all(len(line.get_xdata()) == 2 for line in lines)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 5


def test_nothing_is_left_out_for_want_of_a_look():
    with pytest.raises(ResultsError, match="no look for c: .* add to paper_figures/style.py"):
        style.looks(["row", "c", "b", "a"], style.SPLIT_STYLES)
    assert list(style.looks(["b", "mix", "a", "row", "a"], style.SPLIT_STYLES)) == ["row", "mix", "a", "b"]


def test_names_come_in_the_known_order_and_then_by_their_numbers():
    assert style.ordered(["12x1", "new", "8x2", "b", "8x1", "a"], ("b", "a")) == ["b", "a", "8x1", "8x2", "12x1", "new"]


def test_the_command_line_draws_files_that_are_byte_stable(save, tmp_path, capsys, monkeypatch, rough):
    rows = fixture_rows("medium")
    main("--csv", str(save(rows)), "--out", str(tmp_path / "one"))
    paths = [tmp_path / "one/figure4_medium.pdf", tmp_path / "one/figure4_medium.png"]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    for one, two in zip(paths, figure4.draw(save(rows), tmp_path / "two"), strict=True):
        assert one.read_bytes() == two.read_bytes() and len(one.read_bytes()) > 5000
    monkeypatch.setattr(style, "METADATA", {"png": style.METADATA["png"]})  # a PDF would take time
    rows["bits_per_dim"] += 0.1
    assert figure4.draw(save(rows), tmp_path / "three")[0].read_bytes() != paths[1].read_bytes()


def test_the_script_draws_what_a_scale_has(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(sys, "argv", [figure4.__file__, "--scale", "small", "--out", str(tmp_path)])
    runpy.run_path(figure4.__file__, run_name="__main__")
    assert [name for _, name in drawn] == ["figure4_small"]


def changed(change):
    rows = fixture_rows("smoke", seeds=(0, 1))
    return change(rows)


@pytest.mark.parametrize("change, message", [
    (lambda r: r[~((r["coupling_ratio"] == "4:1") & (r["spatial_split"] == "mix") & (r["seed"] == 1))],
     r"1 of 16 points of Figure 4 are missing for seed 1 \(4:1 mix\)"),
    (lambda r: r[~((r["coupling_ratio"] == "channel-only") & (r["seed"] == 0))],
     r"4 of 16 points of Figure 4 are missing for seed 0 \(channel-only row, channel-only column"),
    (lambda r: r[r["coupling_ratio"] != "channel-only"], "4 of 16 points of Figure 4 are missing for seed 0"),
    (lambda r: r.assign(grid_points=[15, *r["grid_points"][1:]]), "mixes grid_points 15, 16"),
    (lambda r: r.assign(spatial_split=["diagonal", *r["spatial_split"][1:]]), "channel-only diagonal of Figure 4 is there in train for seed 0"),
    (lambda r: r.assign(grid_points=15), "16 points of Figure 4 for seed 0, more than the 15"),
    (lambda r: r[r["split"] == "train"], "has no test rows of the last step"),
    (lambda r: r.assign(step=0), "has no test rows of the last step"),
    (lambda r: r.assign(bits_per_dim=["many", *r["bits_per_dim"][1:]]), "has no number as bits_per_dim"),
    (lambda r: r.assign(bits_per_dim=np.inf), "has no number as bits_per_dim"),
    (lambda r: r.assign(split="valid"), "split valid is neither train nor test"),
    (lambda r: r.assign(experiment="other"), "is of other, not of ablate_coupling"),
    (lambda r: r.assign(lr=[2, *r["lr"][1:]]), "mixes lr 2, 1"),
    (lambda r: pd.concat([r, r[:2].assign(run_id="another")]), "is there twice .run another"),
    (lambda r: pd.concat([r, r[:1]]), "is there twice"),
    (lambda r: r.assign(extra=1), "unknown columns extra"),
    (lambda r: r.drop(columns="variant"), "missing columns variant"),
    (lambda r: r.assign(bits_per_dim=[np.nan, *r["bits_per_dim"][1:]]), "has no number as bits_per_dim"),
    (lambda r: r.assign(variant=["w", *r["variant"][1:]]), "mixes variant w, cifar10-subset"),
    (lambda r: r.assign(scale=["small", *r["scale"][1:]]), "mixes scale small, smoke"),
    (lambda r: r.assign(fingerprint=["0" * 64, *r["fingerprint"][1:]]), "measured on different images"),
    (lambda r: r.assign(bits_per_dim=-3.0), "has -3 as bits_per_dim: must be from 0 to 1000"),
    (lambda r: r.assign(bits_per_dim_se=1e308), "as bits_per_dim_se: must be"), (lambda r: r.assign(num_images=0), "has 0 as num_images"),
    (lambda r: r.assign(train_flops=0), "has 0 as train_flops"), (lambda r: r.assign(logdet_cap_share="much"), "has no number as logdet_cap_share"),
    (lambda r: r.assign(dataset=""), "line 2 has no dataset"), (lambda r: r.assign(run_id=["", *r["run_id"][1:]]), "line 2 has no run_id"),
    (lambda r: r.assign(fingerprint=["", *r["fingerprint"][1:]]), "line 2 has no fingerprint"),
    (lambda r: r.assign(train_fingerprint="none"), "has no fingerprint as train_fingerprint"),
    (lambda r: r.assign(bits_per_dim="9" * 400), "has no number as bits_per_dim"),
    (lambda r: r.assign(seed="9" * 400), "has no number as seed"),
    (lambda r: pd.concat([r, pd.DataFrame(1, index=r.index, columns=[f"c{n}" for n in range(1000)])], axis=1),
     "its header is no list of columns"),
    (lambda r: r[:0], "has no rows")])
def test_a_csv_that_must_not_be_drawn_is_refused_in_one_line(save, tmp_path, change, message):
    path = save(changed(change))
    with pytest.raises(ResultsError, match=message):
        figure4.draw(path, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main("--csv", str(path), "--out", str(tmp_path / "out"))
    assert str(stop.value.code).startswith("figure4.py: error: ") and "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()


def test_a_csv_named_after_another_scale_is_refused(tmp_path):
    fixture_rows("smoke").to_csv(tmp_path / "ablate_coupling_small.csv", index=False)
    with pytest.raises(ResultsError, match="is of smoke scale by its rows, and of small by its name"):
        figure4.draw(tmp_path / "ablate_coupling_small.csv", tmp_path / "out")


def test_a_figure_of_several_experiments_finds_out_which(tmp_path):
    draws = {"one": lambda csv, out: [csv], "other": None}
    for text, message in (("experiment\nthird\n", "is of third, not of one or other"), ("", "is of no experiment"),
                          ("\ufeffexperiment\none\n", None)):
        (tmp_path / "in.csv").write_text(text)
        if message:
            with pytest.raises(SystemExit, match=message):
                style.main("f.py", "", draws, ["--csv", str(tmp_path / "in.csv")])
        else:
            style.main("f.py", "", draws, ["--csv", str(tmp_path / "in.csv")])
    with pytest.raises(SystemExit, match="none.csv: no such file"):
        style.main("f.py", "", draws, ["--csv", str(tmp_path / "none.csv")])


def test_a_missing_csv_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        main("--csv", str(tmp_path / "none.csv"))


@pytest.mark.parametrize("flags, message", [(["--scale", "large"], "invalid choice: 'large'"), (["--dpi", "3"], "unrecognized")])
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(*flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_an_unreadable_csv_or_unwritable_folder_is_one_line(save, tmp_path):
    (tmp_path / "ragged.csv").write_text("a,b\n1,2,3\n4,5,6,7\n")
    for flags in (["--csv", str(tmp_path / "ragged.csv")],
                  ["--csv", str(save(fixture_rows("smoke"))), "--out", "/dev/null/out"]):
        with pytest.raises(SystemExit) as stop:
            main(*flags)
        assert stop.value.code.startswith("figure4.py: error: ") and "\n" not in stop.value.code
