"""How surely points differ: Student's t, Holm's rule, and all numbers of the page against a computation of their own."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from grid_rows import grid_rows

from experiments import ablate_layers, scaling
from paper_figures import figure2, figure3, inference, lengths, results_page, tables
from paper_figures.per_image import write_per_image
from paper_figures.regime import epochs_of, is_run, regime
from paper_figures.results_csv import read_results
from sweeps.table import print_table

mpmath = pytest.importorskip("mpmath")
COUNT = 50  # images


def save(folder, name, scale="small", seeds=(0, 1, 2), spread=0.01):
    """A CSV with values per image of which it has the means; returns (its path, {run_id: values})."""
    rows, images = grid_rows(name, scale, seeds), {}
    random = np.random.default_rng(0)
    hard = random.normal(0, 0.5, COUNT)
    for index in rows.index[rows["split"] == "test"]:
        run_id = rows.loc[index, "run_id"]
        if run_id not in images:
            bits = rows.loc[index, "bits_per_dim"] + random.normal(0, spread)
            images[run_id] = (bits + hard + random.normal(0, 0.02, COUNT)).astype(np.float32)
        rows.loc[index, "bits_per_dim"] = images[run_id].astype(np.float64).mean()
        rows.loc[index, "bits_per_dim_se"] = images[run_id].astype(np.float64).std(ddof=1) / math.sqrt(COUNT)
    rows.loc[rows["split"] == "test", "num_images"] = COUNT
    path = folder / f"{name}_{scale}.csv"
    rows.to_csv(path, index=False)
    write_per_image(path, images)
    return path, images


@pytest.mark.parametrize("df", [*range(1, 12), 30, 31, 107])
def test_student_s_t_is_exact(df):
    def exact(t):
        with mpmath.workdps(40):
            return float(mpmath.betainc(mpmath.mpf(df) / 2, mpmath.mpf(1) / 2, 0, df / (df + mpmath.mpf(t) ** 2), regularized=True))
    for t in (0, 1e-3, 0.5, 1, 2.5, 7, 90):
        assert abs(inference.two_sided(t, df) - exact(t)) < 1e-12 and inference.two_sided(-t, df) == inference.two_sided(t, df)
    assert abs(exact(inference.quantile(df)) - 0.05) < 1e-12


def test_holm_s_rule_is_that_of_his_paper():
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.9, 0.8]) == [1, 1] and inference.holm([]) == []


@pytest.mark.parametrize("name, item", [("ablate_layers", "Table 2b"), ("ablate_block_depth", "Figure 2b"), ("compare_vit_cnn", "Figure 2a")])
def test_the_page_s_numbers_are_those_of_another_computation_from_the_per_image_file(tmp_path, name, item):
    """In plain loops, from the .npz alone and which run is which point."""
    path, _ = save(tmp_path, name)
    item = next(one for one in results_page.ITEMS if one.title.startswith(item))
    rows = item.rows(path)
    found = inference.compare(rows, item.swept, results_page.read_per_image(path, rows), item.contrasts(rows))
    assert found
    with np.load(path.parent / f"per_image/{path.stem}.npz") as file:
        values = {run_id: [float(value) for value in file[run_id]] for run_id in file.files}
    test, arms = rows[rows["split"] == "test"], {}
    for row in test.sort_values("seed").to_dict("records"):
        arms.setdefault(tuple(row[field] for field in item.swept), []).append(values[row["run_id"]])
    means = {arm: [math.fsum(one) / COUNT for one in seeds] for arm, seeds in arms.items()}
    df = sum(len(seeds) - 1 for seeds in means.values())
    pooled = math.fsum((one - math.fsum(seeds) / len(seeds)) ** 2 for seeds in means.values() for one in seeds) / df
    p_values = []
    for one in found:
        weights = one.contrast.weights
        for seed, (value, error) in enumerate(one.by_seed):
            each = [math.fsum(weight * arms[arm][seed][image] for arm, weight in weights.items()) for image in range(COUNT)]
            mean = math.fsum(each) / COUNT
            deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in each) / (COUNT - 1))
            assert abs(value - mean) < 1e-9 and abs(error - deviation / math.sqrt(COUNT)) < 1e-9
        value = math.fsum(weight * math.fsum(means[arm]) / 3 for arm, weight in weights.items())
        error = math.sqrt(pooled * sum(weight ** 2 for weight in weights.values()) / 3)
        t = mpmath.findroot(lambda t: mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, df / (df + t * t), regularized=True) - 0.05, 2.2)
        p = float(mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, df / (df + (mpmath.mpf(value) / error) ** 2), regularized=True))
        assert max(abs(one.value - value), abs(one.low - (value - t * error)), abs(one.high - (value + t * error)),
                   abs(one.p - p)) < 1e-9
        p_values.append(p)
    for one, p in zip(found, p_values):  # the largest of what is multiplied up to its place
        smaller = sorted(other for other in p_values if other <= p)
        wanted = max(min(1, (len(p_values) - place) * other) for place, other in enumerate(smaller))
        assert abs(one.holm - wanted) < 1e-9
    text = results_page.page(tmp_path, tmp_path)
    for one in found:
        assert f"| {one.contrast.name} | {one.value:+.4f} | {one.error:.5f} | {one.low:+.4f} to {one.high:+.4f} | {one.holm:.2g} |" in text


def test_images_and_noise_that_runs_share_do_not_count_twice(tmp_path):
    path, images = save(tmp_path, "ablate_layers")
    rows = tables.final_test_rows(path, "ablate_layers", tables.LAYERS.swept, "Table 2b")
    (found, *_) = inference.compare(rows, tables.LAYERS.swept, images, tables.LAYERS.contrasts(rows))
    assert found.error < 0.02 * math.sqrt(2 / COUNT) * 1.5 < rows["bits_per_dim_se"].min() / 10


def test_with_one_seed_there_is_no_test_and_no_verdict(tmp_path):
    path, images = save(tmp_path, "ablate_block_depth", seeds=(0,))
    text = results_page.page(tmp_path, tmp_path)
    assert text.count("| no test: one seed |") == 5 and "sign at" not in text
    assert "Of 4 comparisons that speak to the claim: 4 no test: one seed." in text


def test_every_step_of_the_scaling_grid_is_tested():
    rows = grid_rows("scaling", "small", (0, 1, 2))
    found = results_page.overfitting_and_scaling(rows)
    points = {tuple(point.values(scaling.EXPERIMENT.swept).values()) for point in scaling.configs("small")}
    pairs = {frozenset(contrast.weights) for contrast in found}
    assert len(found) == len(pairs) == 24 and len({contrast.name for contrast in found}) == 24
    assert set(itertools.chain(*pairs)) == points
    for contrast in found:
        one, other = contrast.weights
        assert sum(a != b for a, b in zip(one, other)) == 1 and one[0] == other[0]
        assert contrast.gap == (one[0] == "cifar10-subset") and contrast.wanted == (1 if contrast.gap else -1)


def test_a_gap_is_between_test_and_training_images(tmp_path):
    path, images = save(tmp_path, "scaling", seeds=(0,))
    item = next(one for one in results_page.ITEMS if one.experiment == "scaling")
    rows = item.rows(path)
    found = inference.compare(rows, item.swept, images, item.contrasts(rows))
    bits = rows.set_index([*item.swept, "split"])["bits_per_dim"]
    for one in found:
        larger, smaller = one.contrast.weights
        wanted = bits[(*larger, "test")] - bits[(*smaller, "test")]
        if one.contrast.gap:
            wanted -= bits[(*larger, "train")] - bits[(*smaller, "train")]
        assert abs(one.value - wanted) < 1e-9 and math.isnan(one.error) == one.contrast.gap


@pytest.mark.parametrize("scale, sign, words", [
    ("small", 1, "the claimed sign at 5 epochs, tuned over 3 learning rates"), ("small", -1, "opposite sign at 5 epochs, tuned over 3 l"),
    ("paper", 1, "agrees"), ("paper", -1, "disagrees")])
def test_words_fit_the_regime(scale, sign, words):
    contrast = inference.Contrast("", {}, wanted=-1)
    finding = inference.Finding(contrast, [(-sign, 0.1)] * 2, -sign, p=0.001, holm=0.01)
    assert results_page.verdict(finding, "5 epochs, tuned over 3 learning rates", scale).startswith(words)
    unsure = inference.Finding(contrast, [(-sign, 0.1)] * 2, -sign, p=0.03, holm=0.06)
    assert results_page.verdict(unsure, "", scale) == "cannot tell"


def test_the_regime_is_told_from_the_csvs(tmp_path):
    path, _ = save(tmp_path, "scaling", seeds=(0,))
    rows = pd.read_csv(path)
    assert epochs_of(rows) == [5, pytest.approx(122.07, abs=0.01)]
    assert regime(rows, path) == "5 to 122 epochs, one learning rate"
    tried = pd.DataFrame({"run_id": range(6), "num_couplings": [4] * 3 + [8] * 3, "lr": [0.006, 0.012, 0.024] * 2})
    tried.to_csv(tmp_path / "scaling_search_small.csv", index=False)
    assert regime(rows, path) == "5 to 122 epochs, tuned over 3 learning rates"
    wider = pd.concat([tried, tried.tail(1).assign(run_id=6, lr=0.048)])
    wider.to_csv(tmp_path / "scaling_search_small.csv", index=False)
    assert regime(rows, path) == "5 to 122 epochs, tuned over 3 to 4 learning rates"


def test_a_csv_of_less_than_5_epochs_is_not_run(tmp_path):
    path, _ = save(tmp_path, "ablate_layers")
    assert is_run(path, "ablate_layers") and not is_run(tmp_path / "scaling_small.csv", "scaling")
    assert is_run(tmp_path / "scaling_medium.csv", "scaling")  # other scales are what they are
    pd.read_csv(path).assign(total_steps=4999).to_csv(path, index=False)
    assert not is_run(path, "ablate_layers")
    for draw, files in ((tables.draw_layers, "md tex"), (ablate_layers.EXPERIMENT.draw, "md tex")):
        drawn = draw(path, tmp_path / "out")
        assert [one.name for one in drawn] == [f"table2b_small.{kind}" for kind in files.split()]
        assert "Not run at 5 epochs, small scale: python experiments/ablate_layers.py --scale small" in drawn[0].read_text()
    text = results_page.page(tmp_path, tmp_path).split("## Table 2b")[1]
    assert "**Ours, small scale:** not run at 5 epochs." in text and "| with ActNorm" not in text


# ---- training lengths

@pytest.fixture
def with_lengths(tmp_path):
    """Figure 2a with a gap that falls by 0.1 from 0.5 to 5 epochs, and 0.05 is left; seeds differ by 0.01."""
    def bits(row):
        epochs = row.total_steps * row.batch_size / 50_000
        return 4 + (row.block == "vit") * (0.05 - 0.1 * math.log10(epochs / 5)) + 0.01 * row.seed
    for name, seeds in (("compare_vit_cnn", (0, 1, 2)), ("compare_vit_cnn_lengths", (0,))):
        rows = grid_rows(name, "small", seeds)
        rows.assign(bits_per_dim=[bits(row) for row in rows.itertuples()]).to_csv(tmp_path / f"{name}_small.csv", index=False)
    return tmp_path / "compare_vit_cnn_small.csv"


def test_the_page_says_what_becomes_of_the_gap_as_training_grows(with_lengths, tmp_path):
    text = results_page.page(tmp_path, tmp_path).split("## Figure 2a")[1].split("\n## ")[0]
    assert "| gap | 0.5 epochs | 1.5 epochs | 5 epochs | last - first, 95 % interval |" in text
    found = [line for line in text.splitlines() if line.startswith("| ViT - CNN, ")]
    assert [line.split("|")[1].strip() for line in found] == [
        f"ViT - CNN, width {width}, patch {patch}" for width, patch in ((16, 4), (32, 2), (32, 4), (64, 4))]
    reach = inference.quantile(12) * 0.02  # of the difference of two gaps
    for line in found:
        assert "| +0.1500 | " in line and "| +0.0500 | " in line  # there are no values per image
        assert line.endswith(f"| -0.1000 ({-0.1 - reach:+.4f} to {-0.1 + reach:+.4f}) |")
    assert "a gap differs by ±0.031, 95 %" in text
    assert text.count("extrapolated on a straight line") == text.count("zero at about 16 epochs") == 4  # 5 x 10^0.5


def test_a_line_of_each_length_is_drawn_over_compute(with_lengths, tmp_path, drawn):
    figure2.draw_a(with_lengths, tmp_path / "out")
    assert [name for _, name in drawn] == ["figure2a_small", "figure2a_lengths_small"]
    axes, = drawn[1][0].axes
    lines = [line.get_xydata() for line in axes.lines]
    assert sorted(map(len, lines)) == [1] * 6 + [3] * 6  # patches of 2 at one width, of 4 at three, times block and length
    legend = [text.get_text() for text in drawn[1][0].legends[0].get_texts()]
    assert legend == ["ViT, patches of 4", "CNN, patches of 4", "ViT, patches of 2", "CNN, patches of 2",
                      "5 epochs", "1.5 epochs", "0.5 epochs"]


@pytest.mark.parametrize("gaps, words", [
    ({1: 0.2, 10: 0.1}, "zero at about 100 epochs"), ({1: 0.2, 10: 0.104}, "zero at about 120 epochs"),
    ({1: 0.1, 10: 0.2}, "it grows"), ({1: 0.1, 3: 0.2, 10: 0.05}, "it neither grows nor shrinks"),
    ({1: -0.2, 10: -0.1}, "zero at about 100 epochs"), ({1: 0.1, 10: -0.1}, "it has changed its sign"),
    ({1: 0.1, 10: 0.0999}, "not zero within 10,000 epochs"), ({1: 0.1}, "one length alone")])
def test_an_extrapolation_says_where_the_line_crosses_zero(gaps, words):
    assert words in lengths.trend(gaps, 1e-10)[1] and words in lengths.trend(gaps, 2e-10)[1]


def test_no_more_is_said_of_a_gap_than_its_error_between_seeds_allows():
    reach = 0.03
    for last, words in ((0.99, "not told from zero at 10 epochs"), (-1.01, "it has changed its sign"),
                        (3 - 1.4, "its change is not told from none"), (3 - 1.42, "zero at about")):
        change, said = lengths.trend({1: 3 * reach, 10: last * reach}, reach)
        assert change == pytest.approx((last - 3) * reach) and words in said
    for off, words in ((1.2, "zero at about"), (1.25, "not on a straight line")):  # 2 / 3 of its square is left
        assert words in lengths.trend({1: 10 * reach, 10: (7 + off) * reach, 100: 4 * reach}, reach)[1]


def test_a_sweep_prints_how_far_points_are_behind_over_seeds(tmp_path, capsys):
    path, images = save(tmp_path, "ablate_layers")
    rows = read_results(path, "ablate_layers", tables.LAYERS.swept)
    print_table(rows, tables.LAYERS.swept, images)
    said = capsys.readouterr().out.partition("over 3 seeds, less ")[2].splitlines()
    best, *others = said[0].rstrip(":").split("\n")
    means = rows[rows["split"] == "test"].groupby([*tables.LAYERS.swept])["bits_per_dim"].mean().sort_values()
    assert tuple(best.split(" ")) == means.index[0] and len(said) == 5
    for line, point in zip(said[2:], means.index[1:]):
        assert line.split()[:2] == list(point) and line.split()[2] == f"{means[point] - means.iloc[0]:+.4f}"
    print_table(rows[rows["seed"] == 0], tables.LAYERS.swept, images)
    assert "over" not in capsys.readouterr().out


def test_a_power_law_has_a_band_where_there_are_three_seeds_alone(drawn, tmp_path):
    rows = grid_rows("scaling", "small", (0, 1, 2))
    exponents = [-0.02, -0.021, -0.023]
    rows = rows.assign(bits_per_dim=[8 * (row.train_flops / 1e12) ** exponents[row.seed] for row in rows.itertuples()])
    one_set = rows[rows["dataset"] == "cifar10"]
    curve, (low, mean, high) = figure3.power_law(one_set)
    reach = inference.quantile(2) * np.std(exponents, ddof=1) / math.sqrt(3)
    assert abs(mean - np.mean(exponents)) < 1e-9 and abs(low - (mean - reach)) < 1e-9 and abs(high - (mean + reach)) < 1e-9
    assert all(low < mean < high for low, mean, high in curve.values())
    assert figure3.power_law(one_set[one_set["seed"] < 2]) is None
    path = tmp_path / "scaling_small.csv"
    rows.to_csv(path, index=False)
    figure3.draw(path)
    assert [sum(line.get_linestyle() == "-." for line in axes.lines) for axes in drawn[0][0].axes] == [1, 1]
    assert "CIFAR-10: over this grid, test bits/dim go with compute to the power of -0.0213" in results_page.page(tmp_path, tmp_path)
