"""results/paper.csv: a row for each number of the paper that a grid reproduces; what is filled in stands beside ours."""

import pandas as pd
import pytest
from grid_rows import grid_rows

from experiments import cost_table
from paper_figures import figure2, figure4, paper, redraw, results_page, tables
from paper_figures.results_csv import ResultsError


@pytest.fixture
def fill(tmp_path, monkeypatch):
    """A function that fills cells of a copy of the committed file."""
    path = tmp_path / "paper.csv"
    monkeypatch.setattr(paper, "PAPER", path)

    def fill(values, source="the paper, Table 9"):
        rows = pd.read_csv(redraw.style.ROOT / "results/paper.csv", dtype=str, keep_default_na=False)
        for (experiment, point), value in values.items():
            here = (rows["experiment"] == experiment) & (rows["point"] == point)
            assert here.sum() == 1, point
            rows.loc[here, ["bits_per_dim", "source"]] = value, source
        rows.to_csv(path, index=False)
    fill({})
    return fill


def save(folder, name, scale="small", seeds=(0, 1)):
    path = folder / f"{name}_{scale}.csv"
    grid_rows(name, scale, seeds).to_csv(path, index=False)
    return path


def test_a_row_is_a_point_of_a_grid_of_paper_scale_and_all_are_there():
    rows = pd.read_csv(redraw.style.ROOT / "results/paper.csv", dtype=str, keep_default_na=False)
    found = set(zip(rows["item"].str.lower(), rows["experiment"], rows["point"], rows["dataset"]))
    wanted = set()
    for item, declared in cost_table.paper_experiments().items():
        for point in declared.configs("paper") if declared.name != "draw_samples" else ():
            text = " ".join(f"{field}={value}" for field, value in point.values(declared.swept).items())
            wanted.add((item.lower().removeprefix("the "), declared.name, text, point.config.data))
    assert found == wanted and len(rows) == len(found)


def test_no_number_is_filled_in_that_is_not_known():
    known = paper.read_paper()
    reported = {row["bits_per_dim"] for row in tables.read_reported(tables.REPORTED) if row["model"].startswith("Jet ")}
    assert set(known.values()) == {"3.72", "3.66"} <= reported


def test_what_is_filled_in_stands_in_the_table(fill, tmp_path):
    path = save(tmp_path, "ablate_splits")
    assert "| not known |" in tables.draw_splits(path, tmp_path / "out")[0].read_text()
    fill({("ablate_splits", f"coupling_ratio=4:1 split_mode={mode}"): value for mode, value in (("pairing", "3.81"), ("masking", "3.9"))})
    assert "| pairing: 3.81; masking: 3.9 |" in tables.draw_splits(path, tmp_path / "out")[0].read_text()
    fill({("main_results", "size=32x2 training=fine-tuned dataset=cifar10"): "3.21"})
    text = tables.draw_main(tmp_path / "main_results_small.csv", tmp_path / "out")[0].read_text()
    line = next(line for line in text.splitlines() if "32 couplings x depth 2, pretrained, fine-tuned" in line)
    assert "| not run here | – | 3.21 |" in line or "| not run here | 3.21 |" in line


def test_what_is_filled_in_is_a_star_on_an_axis_of_its_own(fill, tmp_path, drawn):
    path = save(tmp_path, "ablate_block_depth")
    figure2.draw_b(path)
    assert len(drawn[-1][0].axes) == 1
    fill({("ablate_block_depth", f"block_depth={depth}"): f"3.{depth}" for depth in (1, 5)})
    figure2.draw_b(path)
    _, theirs = drawn[-1][0].axes
    assert theirs.lines[0].get_xydata().tolist() == [[1, 3.1], [5, 3.5]] and "the paper's" in theirs.get_ylabel()
    fill({("ablate_coupling", "coupling_ratio=4:1 spatial_split=mix"): "3.7"})
    figure4.draw(save(tmp_path, "ablate_coupling"))
    assert drawn[-1][0].axes[1].lines[0].get_ydata().tolist() == [3.7]


def test_what_is_filled_in_decides_the_sign_that_a_verdict_compares_with(fill, tmp_path):
    path = save(tmp_path, "ablate_splits", seeds=(0, 1, 2))
    rows = pd.read_csv(path)
    rows.assign(bits_per_dim=rows["bits_per_dim"] - 0.0199 * rows["seed"]).to_csv(path, index=False)
    text = results_page.page(tmp_path, tmp_path).split("## Table 2a")[1].split("## ")[0]
    assert "no sign to compare with" in text and "the paper's" not in text
    fill({("ablate_splits", f"coupling_ratio=4:1 split_mode={mode}"): value for mode, value in (("pairing", "3.81"), ("masking", "3.9"))})
    text = results_page.page(tmp_path, tmp_path).split("## Table 2a")[1].split("## ")[0]
    assert "Of 1 comparisons that speak to the claim" in text and "4:1 pairing 3.81; 4:1 masking 3.9" in text
    line = next(line for line in text.splitlines() if line.startswith("| 4:1: pairing - masking"))
    assert "| -0.0900 |" in line and "sign at 5 epochs" in line


@pytest.mark.parametrize("value, source, message", [
    ("3,7", "x", "must be a number like 3.72, or empty"), ("3.7", " ", "has a number and no source"), ("nan", "x", "must be a number")])
def test_a_bad_cell_is_one_line(fill, value, source, message):
    fill({("ablate_block_depth", "block_depth=1"): value}, source)
    with pytest.raises(ResultsError, match=f"paper.csv: row 9: .*{message}"):
        paper.read_paper()


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "paper.csv"
    for content, message in (("a,b\n", "has not the columns"), (f"{','.join(paper.COLUMNS)}\nx,y\n", "row 1: has not 7 fields"),
                             (f"{','.join(paper.COLUMNS)}\n" + 2 * "i,e,p,cifar10,cifar10,,\n", "row 2: e p is there twice"),
                             (f"{','.join(paper.COLUMNS)}\ni,e,p,cifar10,oord,,\n", "cifar10 has no variant oord")):
        path.write_text(content)
        with pytest.raises(ResultsError, match=message):
            paper.read_paper(path)
