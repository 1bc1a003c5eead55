"""Figures 2a, 2b and 3 from fixtures: what is drawn, equal bytes, and what is refused."""
import functools
import itertools

import numpy as np
import pandas as pd
import pytest
from grid_rows import grid_rows

from paper_figures import figure2, figure3, style
from paper_figures.results_csv import ResultsError

FIGURES = {
    "figure2a": ("compare_vit_cnn", figure2.draw_a, "Figure 2a"),
    "figure2b": ("ablate_block_depth", figure2.draw_b, "Figure 2b"),
    "figure3": ("scaling", figure3.draw, "Figure 3"),
}
SETS = {  # of Figure 3, in the order of its panels
    "smoke": ("cifar10-subset-vehicles", "cifar10-subset"), "small": ("cifar10-subset", "cifar10"),
    "paper": ("imagenet32-oord", "imagenet21k-32-box", "imagenet64-oord", "imagenet21k-64-box")}
SIZES = {  # of its lines: blocks and width
    "smoke": ((1, 16), (1, 32)), "small": ((1, 16), (1, 32), (2, 16), (2, 32)),
    "paper": ((2, 256), (2, 512), (5, 256), (5, 512))}
DEPTHS = (1, 2, 3, 4, 5, 6)


def fixture_rows(name, scale, seeds=(0,)):
    return grid_rows(FIGURES[name][0], scale, seeds)


def draw(name, rows, tmp_path, *out):
    rows.to_csv(tmp_path / "in.csv", index=False)
    return FIGURES[name][1](tmp_path / "in.csv", *out)


@pytest.fixture(scope="module")
def figure_of(tmp_path_factory):
    """A function that draws a figure of rows in any order, the first time it is asked; returns it and its name."""
    @functools.cache
    def figure_of(name, scale):
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(style, "save", lambda figure, name, out_dir: drawn.append((figure, name)) or [])
            draw(name, fixture_rows(name, scale).sample(frac=1, random_state=0), tmp_path_factory.mktemp("figures"))
        style.plt.close("all")
        one, = drawn
        return one
    return figure_of


def main(name, *flags):
    draws = {experiment: draw for key, (experiment, draw, _) in FIGURES.items() if key.startswith(name[:7])}
    style.main(f"{name[:7]}.py", "", draws, flags)


def kinds(axes):
    """The markers, lines of a series and whiskers of a panel, each as a list."""
    of_type = {kind: [item for item in axes.collections if type(item).__name__ == kind]
               for kind in ("PathCollection", "LineCollection")}
    return of_type["PathCollection"], list(axes.lines), of_type["LineCollection"]


def values(markers):
    return np.asarray(markers.get_offsets())


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(style.matplotlib.text.Text))


def check_areas(markers, look, rows, scale_of):
    """The area of each marker, over its parameters, is the same everywhere: scale_of collects it."""
    scale_of.extend(markers.get_sizes() * style.MARKER_AREAS[look["marker"]] / rows["num_params"])
    assert np.allclose(scale_of, scale_of[0])


@pytest.mark.parametrize("scale, widths", [
    ("smoke", "16, 32"), ("small", "16, 32, 64"), ("paper", "128, 256, 512, 768")])
def test_figure_2a_has_a_line_for_each_block_over_compute(figure_of, scale, widths):
    rows = fixture_rows("figure2a", scale)
    figure, name = figure_of("figure2a", scale)
    axes, = figure.axes
    markers, lines, _ = kinds(axes)
    assert name == f"figure2a_{scale}" and len(markers) == len(lines) == 2
    areas = []
    for block, dots, line in zip(("vit", "cnn"), markers, lines):
        mine = rows[(rows["block"] == block) & (rows["split"] == "test")].astype({"train_flops": float})
        mine = mine.sort_values("train_flops")
        look = style.METHOD_STYLES[block]
        assert np.allclose(values(dots), mine[["train_flops", "bits_per_dim"]])
        assert len(mine) == len(widths.split(", "))
        assert np.allclose(line.get_xydata(), values(dots)) and line.get_color() == look["color"]
        check_areas(dots, look, mine, areas)
        assert dots.get_facecolor()[0][3] > 0
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    assert axes.get_xlabel() == "training compute (FLOPs)" and "lower is better" in axes.get_ylabel()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"ViT", "CNN"}
    assert len({look["marker"] for look in style.METHOD_STYLES.values()}) == 2
    assert f"width {widths}" in texts(figure)


@pytest.mark.parametrize("scale", style.SCALES)
def test_figure_2b_has_bits_and_cost_of_each_depth(figure_of, scale):
    rows = fixture_rows("figure2b", scale)
    figure, name = figure_of("figure2b", scale)
    axes, = figure.axes
    (dots,), (line,), _ = kinds(axes)
    mine = rows[rows["split"] == "test"].astype({"train_flops": float})
    assert name == f"figure2b_{scale}" and "lower is better" in axes.get_ylabel()
    assert np.allclose(values(dots), list(zip(DEPTHS, mine["bits_per_dim"])))
    assert np.allclose(line.get_xydata(), values(dots)) and list(axes.get_xticks()) == list(DEPTHS)
    check_areas(dots, style.METHOD_STYLES["vit"], mine, [])
    top, = axes.child_axes
    unit = int(top.get_xlabel().split("{")[1].split("}")[0])
    costs = [float(label.get_text()) for label in top.get_xticklabels()]
    assert np.allclose(costs, mine["train_flops"] / 10**unit, atol=0.051) and min(costs) >= 1
    assert list(top.get_xticks()) == list(DEPTHS)
    assert f"{rows['num_couplings'][0]} couplings (width {rows['emb_dim'][0]})" in axes.get_xlabel()


@pytest.mark.parametrize("scale, num_panels, num_series, couplings",
                         [("smoke", 2, 2, 2), ("small", 2, 4, 2), ("paper", 4, 4, 3)])
def test_figure_3_has_a_panel_for_each_set(figure_of, scale, num_panels, num_series, couplings):
    rows = fixture_rows("figure3", scale)
    figure, name = figure_of("figure3", scale)
    assert name == f"figure3_{scale}" and len(figure.axes) == num_panels
    areas, looks = [], []
    for axes, dataset in zip(figure.axes, SETS[scale]):
        markers, lines, _ = kinds(axes)
        assert len(lines) == num_series and len(markers) == 2 * num_series
        assert axes.get_title() == f"{style.DATASET_TITLES[dataset]}\n10,000 test, 2,048 train"
        assert axes.get_xscale() == "log"
        drawn_series = zip(SIZES[scale], style.SIZE_STYLES, lines, markers[::2], markers[1::2])
        for (depth, width), look, line, test, train in drawn_series:
            series = rows[(rows["dataset"] == dataset) & (rows["block_depth"] == str(depth))
                          & (rows["emb_dim"] == str(width))].astype({"train_flops": float}).sort_values("train_flops")
            for split, dots in (("test", test), ("train", train)):
                mine = series[series["split"] == split]
                assert np.allclose(values(dots), mine[["train_flops", "bits_per_dim"]]) and len(mine) == couplings
                check_areas(dots, look, mine, areas)
            assert np.allclose(line.get_xydata(), values(test))
            assert len(test.get_facecolor()) == 1 and len(train.get_facecolor()) == 0  # filled, hollow
            color = style.matplotlib.colors.to_rgb(look["color"])
            assert np.allclose(test.get_facecolor()[0][:3], color) and np.allclose(train.get_edgecolor()[0][:3], color)
            looks.append((look["color"], look["marker"]))
    assert len(set(looks)) == len({marker for _, marker in looks}) == num_series
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["filled: test images", "hollow: training images"] and len(legend) == num_series + 2
    filled, hollow = figure.legends[0].get_lines()[-2:]
    assert filled.get_markerfacecolor() != "none" and hollow.get_markerfacecolor() == "none"
    assert all(one.get_ylim() == two.get_ylim() for one, two in zip(figure.axes[::2], figure.axes[1::2]))
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_figure_3_joins_test_and_training_images_of_each_model(figure_of):
    rows = fixture_rows("figure3", "small")
    for axes, dataset in zip(figure_of("figure3", "small")[0].axes, SETS["small"]):
        joins = [segment for item in kinds(axes)[2] if item.get_linestyle()[0][1] for segment in item.get_segments()]
        mine = rows[rows["dataset"] == dataset].set_index(["train_flops", "split"])["bits_per_dim"]
        assert len(joins) == 8
        for (x, test), (_, train) in joins:
            assert test == mine[x, "test"] and train == mine[x, "train"]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_what_every_figure_says(figure_of, name, scale):
    rows, (figure, _) = fixture_rows(name, scale), figure_of(name, scale)
    text = texts(figure)
    assert f"{FIGURES[name][2]}, {scale} scale" in text and "one seed; whiskers: ±1 s.e. over images" in text
    assert all(style.DATASET_TITLES[dataset] in text for dataset in rows["dataset"])
    assert "10,000 test" in text and figure.get_size_inches()[0] == style.COLUMN_WIDTH
    assert text.count("not evidence") == (len(figure.axes) if scale == "smoke" else 0)
    sizes = figure.legends[-1].get_lines()
    drawn_areas = np.concatenate([dots.get_sizes() for dots in figure.axes[0].collections
                                  if type(dots).__name__ == "PathCollection" and dots.get_sizes().size])
    assert len(sizes) == 3 and figure.legends[-1].get_title().get_text() == "area: parameters"
    areas = [np.pi / 4 * size.get_markersize()**2 for size in sizes]
    least, most = rows["num_params"].min(), rows["num_params"].max()
    assert np.isclose(areas[2] / areas[0], most / least) and areas[2] > areas[1] > areas[0] and max(drawn_areas) > 0
    module = figure3 if name == "figure3" else figure2
    assert np.isclose(areas[2], module.LARGEST)
    millions = [float(text.get_text().replace(",", "").removesuffix(" M")) for text in figure.legends[-1].get_texts()]
    assert np.allclose(millions, [least / 1e6, (least * most)**0.5 / 1e6, most / 1e6], rtol=0.005)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_on_another_or_is_cut(figure_of, name):
    figure, _ = figure_of(name, "paper")
    figure.set_dpi(300)
    figure.draw_without_rendering()
    outside = {id(tick.label1) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
               for tick in axis.get_major_ticks() for low, high in [axis.get_view_interval()]
               if not low <= tick.get_loc() <= high}
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.findobj(style.matplotlib.text.Text)
             if text.get_text().strip() and text.get_visible() and id(text) not in outside]
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} lies on {two!r}"
    for text, box in boxes:
        assert all(map(figure.bbox.padded(1).contains, (box.x0, box.x1), (box.y0, box.y1))), text


@pytest.mark.parametrize("name", FIGURES)
def test_whiskers_are_the_standard_error_of_one_seed_and_the_range_of_several(tmp_path, drawn, name):
    draw(name, fixture_rows(name, "smoke").assign(bits_per_dim_se=0.003), tmp_path)
    draw(name, fixture_rows(name, "smoke", seeds=(0, 1, 2)), tmp_path)
    for (figure, _), down, up, mean in zip(drawn, (0.003, 0.02), (0.003, 0.02), (0, 0.02)):
        markers, _, bars = kinds(figure.axes[0])
        segments = [item.get_segments() for item in bars if not item.get_linestyle()[0][1]]
        for dots, bar in zip(markers, segments, strict=True):
            for (x, y), ((_, low), (_, high)) in zip(values(dots), bar, strict=True):
                assert np.isclose(y - low, down) and np.isclose(high - y, up)
        assert len(segments) == len(markers)
    one, three = (values(kinds(figure.axes[0])[0][0]) for figure, _ in drawn)
    assert np.allclose(three - one, [0, 0.02])
    assert "3 seeds: mean, whiskers: min to max" in texts(drawn[1][0])


@pytest.mark.parametrize("name", FIGURES)
def test_the_command_line_draws_the_csv_it_is_given(tmp_path, capsys, monkeypatch, drawn, name):
    monkeypatch.setattr(style, "save", lambda figure, name, out_dir: drawn.append(figure) or [out_dir / name])
    rows = fixture_rows(name, "medium").assign(bits_per_dim=lambda r: r["bits_per_dim"] + 0.12345)
    rows.to_csv(tmp_path / "in.csv", index=False)
    main(name, "--csv", str(tmp_path / "in.csv"), "--out", str(tmp_path))
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}_medium")]
    heights = values(kinds(drawn[0].axes[0])[0][0])[:, 1]
    assert all(np.isclose(rows["bits_per_dim"], height).any() for height in heights)


REFUSED = [  # test_figures.py and test_hostile_tables.py have more of what is read in the same way
    (lambda r: r.iloc[2:], "1 of .* points of {} are missing for seed 0: complete them by experiments/"),
    (lambda r: r[r["split"] == "test"], "points of {} are missing in train for seed 0"),
    (lambda r: pd.concat([r, r[:1]]), "is there twice"),
    (lambda r: pd.concat([r, r[:2].assign(run_id="another")]), "seed 0, split .*, is there twice .run another"),
    (lambda r: r.drop(columns="train_flops"), "missing columns train_flops"),
    (lambda r: r.assign(variant=["w", *r["variant"][1:]]), "mixes variant w, "),
    (lambda r: r.assign(lr=[2, *r["lr"][1:]]), "mixes lr 2, 1"),
    (lambda r: r.assign(fingerprint=["0" * 64, *r["fingerprint"][1:]]), "train rows are measured on different images"),
    (lambda r: r.assign(scale="large"), "scale large is none of smoke, small, medium, paper"),
]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("change, message", REFUSED)
def test_a_csv_that_must_not_be_drawn_is_refused_in_one_line(tmp_path, drawn, name, change, message):
    change(fixture_rows(name, "smoke")).to_csv(tmp_path / "in.csv", index=False)
    with pytest.raises(SystemExit, match=message.format(FIGURES[name][2])) as stop:
        main(name, "--csv", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out"))
    assert stop.value.code.startswith(f"{name[:7]}.py: error: ") and "\n" not in stop.value.code and not drawn


@pytest.mark.parametrize("name, field, value", [
    ("figure2a", "block", "mlp"), ("figure2a", "emb_dim", "17"), ("figure2b", "block_depth", "7"),
    ("figure3", "emb_dim", "17"), ("figure3", "num_couplings", "9"), ("figure3", "dataset", "cifar10")])
def test_a_point_that_is_not_in_the_grid_is_refused(tmp_path, name, field, value):
    rows = fixture_rows(name, "smoke")
    more = rows[:2].assign(run_id="stray", **{field: value})
    rows = rows.assign(**{field: rows[field].astype(str)})
    count = rows["grid_points"][0]
    with pytest.raises(ResultsError, match=f"{count + 1} points of {FIGURES[name][2]} .*, more than the {count} of"):
        draw(name, pd.concat([rows, more]), tmp_path)


def test_figure_3_with_an_odd_number_of_sets_leaves_a_panel_out(tmp_path, drawn):
    rows = fixture_rows("figure3", "smoke")
    rows = rows[rows["dataset"] != SETS["smoke"][-1]]
    draw("figure3", rows.assign(grid_points=rows["grid_points"] // 2), tmp_path)
    assert [axes.get_title().split("\n")[0] for axes in drawn[0][0].axes] == [style.DATASET_TITLES[SETS["smoke"][0]]]


@pytest.mark.parametrize("name", ["figure2a", "figure2b"])
def test_figures_2_never_mix_image_sets(tmp_path, name):
    rows = fixture_rows(name, "smoke")
    with pytest.raises(ResultsError, match="mixes dataset cifar10, cifar10-subset"):
        draw(name, rows.assign(dataset=["cifar10", *rows["dataset"][1:]]), tmp_path)


def test_a_seed_of_another_size_is_not_averaged(tmp_path, drawn):
    rows = fixture_rows("figure2b", "smoke", seeds=(0, 1))
    rows.loc[(rows["seed"] == 1) & (rows["block_depth"] == "6"), "num_params"] *= 2
    draw("figure2b", rows, tmp_path)
    assert len(values(kinds(drawn[0][0].axes[0])[0][0])) == 7
