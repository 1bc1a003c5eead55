"""Figure 4 from a fixture: what is drawn, equal bytes, and what is refused."""
import numpy as np
import pandas as pd
import pytest

from experiments import ablate_coupling, sweep
from paper_figures import figure4, style
from paper_figures.results_csv import ResultsError, columns


def fixture_rows(scale, seeds=(0,)):
    """Rows as the sweep would write them, with numbers made up from the channel share."""
    rows = []
    for seed in seeds:
        for i, point in enumerate(ablate_coupling.configs(scale)):
            run = point.run(seed, style.ROOT)
            share = sweep.channel_share(point.config.model)
            for split in ("train", "test"):
                row = dict.fromkeys(columns(figure4.SWEPT), 1) | point.labels
                rows.append(row | {
                    "experiment": "ablate_coupling", "scale": scale, "run_id": run.run_id, "seed": seed, "split": split,
                    "channel_share": share, "bits_per_dim": 5 + (share - 0.8) ** 2 + 0.01 * i + 0.02 * seed,
                    "dataset": point.config.data, "variant": "v", "num_images": 10_000, "fingerprint": "f"})
    return pd.DataFrame(rows)


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
    figure4.draw(save(rows))
    (figure, name), = drawn
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in figure4.SPLITS}
    assert name == f"figure4_{scale}" and list(lines) == list(figure4.SPLITS)
    for split, line in lines.items():
        mine = rows[(rows["split"] == "test") & rows["spatial_split"].str.contains(split)].sort_values("channel_share")
        assert np.allclose(line.get_xdata(), mine["channel_share"]) and len(mine) == ratios
        assert np.allclose(line.get_ydata(), mine["bits_per_dim"])
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


def test_files_are_byte_stable_and_depend_on_the_numbers(save, tmp_path):
    rows = fixture_rows("smoke")
    paths = [figure4.draw(save(rows), tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*paths):
        assert one.read_bytes() == two.read_bytes() and len(one.read_bytes()) > 5000
    assert {path.suffix for path in paths[0]} == {".pdf", ".png"}
    rows["bits_per_dim"] += 0.1
    assert figure4.draw(save(rows), tmp_path / "three")[1].read_bytes() != paths[0][1].read_bytes()


def changed(change):
    rows = fixture_rows("smoke", seeds=(0, 1))
    return change(rows)


@pytest.mark.parametrize("change, message", [
    (lambda r: r[~((r["coupling_ratio"] == "4:1") & (r["spatial_split"] == "mix") & (r["seed"] == 1))],
     "1 runs of Figure 4 are missing: 4:1 mix seed 1"),
    (lambda r: r[r["coupling_ratio"] != "channel-only"], "8 runs of Figure 4 are missing: channel-only row seed 0"),
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
    (lambda r: r.assign(variant=["w", *r["variant"][1:]]), "mixes variant w, v"),
    (lambda r: r.assign(scale=["small", *r["scale"][1:]]), "mixes scale small, smoke"),
    (lambda r: r.assign(fingerprint=["g", *r["fingerprint"][1:]]), "measured on different images"),
    (lambda r: r.assign(bits_per_dim=-3.0), "has -3 as bits_per_dim: must be from 0 to 1000"),
    (lambda r: r.assign(bits_per_dim_se=1e308), "as bits_per_dim_se: must be"), (lambda r: r.assign(num_images=0), "has 0 as num_images"),
    (lambda r: r.assign(train_flops=0), "has 0 as train_flops"), (lambda r: r.assign(logdet_cap_share="much"), "has no number as logdet_cap_share"),
    (lambda r: r.assign(dataset=""), "line 2 has no dataset"), (lambda r: r.assign(run_id=["", *r["run_id"][1:]]), "line 2 has no run_id"),
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


def test_the_command_line_draws(save, tmp_path, capsys):
    main("--csv", str(save(fixture_rows("medium"))), "--out", str(tmp_path))
    assert capsys.readouterr().out.split() == [str(tmp_path / "figure4_medium.pdf"), str(tmp_path / "figure4_medium.png")]


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
