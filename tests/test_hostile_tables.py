"""Every reader of CSVs refuses what is no table of ours in one line, and takes no memory for it."""
import csv
import io
import os
import resource
import time
from pathlib import Path

import pytest
from grid_rows import grid_rows

from experiments import throughput as measure
from paper_figures import figure4, redraw, results_page, throughput
from paper_figures.reported import REPORTED, read_reported
from paper_figures.results_csv import ResultsError, read_experiment, read_results

ROOT = Path(__file__).resolve().parents[1]


def draw_all(path):
    folder = path.parent / "results"
    folder.mkdir()
    path.rename(folder / "ablate_coupling_medium.csv")
    with pytest.MonkeyPatch.context() as patch:  # other figures, of what is not there, as files
        patch.setattr(redraw.style, "save", lambda figure, *_: redraw.style.plt.close(figure) or [])
        list(redraw.redraw(folder, path.parent / "out"))


def write_page(path):
    folder = path.parent / "page"
    folder.mkdir()
    path.rename(folder / "ablate_coupling_medium.csv")
    results_page.ITEMS[3].rows(folder / "ablate_coupling_medium.csv")


READERS = {  # reader: which file it reads
    "figure": (lambda path: read_results(path, "ablate_coupling", figure4.SWEPT), "coupling"),
    "which": (lambda path: read_experiment(path, ("one", "other")), "coupling"),
    "redraw": (draw_all, "coupling"), "page": (write_page, "coupling"),
    "throughput": (throughput.read, "throughput"),
    "merged": (lambda path: measure.merge_rows(path, []), "throughput"),
    "reported": (read_reported, "reported")}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """{name: the text of a whole table}."""
    folder = tmp_path_factory.mktemp("tables")
    grid_rows("ablate_coupling", "medium").to_csv(folder / "in.csv", index=False)
    return {"coupling": (folder / "in.csv").read_text(), "reported": REPORTED.read_text(),
            "throughput": (ROOT / "results/throughput_cpu.csv").read_text()}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.csv"
    path.write_bytes(b"a\n" * 2 ** 24)
    return path


def each_line(text, change):
    """The text with all lines but the first changed."""
    first, *lines = text.splitlines()
    return "\n".join([first, *map(change, lines)]) + "\n"


DAMAGES = {
    "empty": lambda text: b"", "line ends": lambda text: b"\n\n\n",
    "bytes": lambda text: bytes(range(256)) * 4, "NUL": lambda text: text.replace("e", "\0", 900),
    "not UTF-8": lambda text: text.encode().replace(b"e", b"\xff", 900),
    "long rows": lambda text: each_line(text, lambda line: "more," + line),
    "one long row": lambda text: text + text.splitlines()[1] + ",more,and more\n",
    "one short row": lambda text: text + text.splitlines()[1].rpartition(",")[0] + "\n",
    "torn": lambda text: text[:-len(text.splitlines()[-1]) // 2],
    "a column twice": lambda text: each_line(
        text.replace("\n", f",{text.split(',')[0]}\n", 1), lambda line: line + ",1"),
    "a column too few": lambda text: "\n".join(line.partition(",")[2] for line in text.splitlines()),
    "many columns": lambda text: "a," * 10 ** 6 + "a\n",
    "many columns, few bytes": lambda text: "," * 60_000 + "\n",
    "one cell": lambda text: text + "a" * 10 ** 6, "large": None,
    "an open quote": lambda text: text.replace(",", ',"', 3),
    "control": lambda text: each_line(text, lambda line: line.replace("a", "\x1b[2J").replace(
        "e", "\x1b[2J")),
    "a pipe": None, "a device": None, "a folder": None}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_table_of_ours_is_refused_in_one_line(tables, large, tmp_path, reader, damage):
    read, which = READERS[reader]
    path, change = tmp_path / "in.csv", DAMAGES[damage]
    if damage == "a pipe":
        os.mkfifo(path)
    elif damage == "a device":
        path.symlink_to("/dev/zero")
    elif damage == "a folder":
        path.mkdir()
    elif damage == "large":
        path.hardlink_to(large)
    else:
        content = change(tables[which])
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    begun, before = time.process_time(), peak_mib()
    with pytest.raises(ResultsError) as error:
        read(path)
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - begun < 10 and peak_mib() - before < 500


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("which, column, cells", [
    ("coupling", "bits_per_dim", ["", "nan", "inf", "-1", "9" * 400, "1e400", "0x10", "3,7", "many"]),
    ("coupling", "bits_per_dim_se", ["", "nan", "-0.1", "9" * 400]),
    ("coupling", "seed", ["", "0.5", "-1", "9" * 400, "1e400", "nan"]),
    ("coupling", "num_images", ["", "0", "1.5", "nan", "9" * 400]),
    ("coupling", "grid_points", ["", "0", "96.5", "1e9"]), ("coupling", "step", ["", "1.5", "-1"]),
    ("coupling", "num_params", ["", "0", "-1", "2.5", "nan", "9" * 400, "x"]), *[("coupling", name, ["0", "2.5", "x"]) for name in (
        "num_couplings", "block_depth", "emb_dim", "patch_size", "batch_size")],
    ("coupling", "lr", ["", "-1", "nan", "inf", "x"]), ("coupling", "train_flops", ["", "-1", "nan"]),
    ("coupling", "fingerprint", ["", "0" * 63, "g" * 64, "0" * 65]),
    ("coupling", "train_fingerprint", ["", "x"]), ("coupling", "split", ["", "valid"]),
    ("coupling", "hardware", ["a\x1b[2Jb", "a" * 5000, "a\x7fb"]),
    ("coupling", "git_commit", ["\x1b[2J", "a" * 5000]),
    ("throughput", "step_seconds", ["", "nan", "inf", "9" * 400, "x"]),
    ("throughput", "hardware", ["a\x1b[2Jb", "a" * 5000]), ("throughput", "what", ["", "x"]),
    ("reported", "bits_per_dim", ["", "nan", "inf", "9" * 400, "3." + "6" * 400, "-1", "٣", "3e0"]),
    ("reported", "model", ["", "a\x1b[2Jb", "a" * 5000]), ("reported", "source", ["", "\x9b2J"]),
    ("reported", "year", ["x", "20255"])], ids=lambda value: "" if isinstance(value, list) else value)
def test_cells_that_hold_no_such_value_are_refused(tables, tmp_path, which, column, cells):
    read, _ = READERS[{"coupling": "figure"}.get(which, which)]
    for cell in cells:
        rows = list(csv.reader(io.StringIO(tables[which])))
        rows[-1][rows[0].index(column)] = cell
        with open(tmp_path / "in.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        with pytest.raises(ResultsError) as error:
            read(tmp_path / "in.csv")
        assert "\n" not in str(error.value) and len(str(error.value)) < 2000 and "mixes" not in str(error.value), cell


def test_the_committed_tables_are_read():
    assert read_reported(REPORTED) and len(throughput.read(ROOT / "results/throughput_cpu.csv"))
    assert len(read_results(ROOT / "results/compare_vit_cnn_medium.csv", "compare_vit_cnn",
                            ("block", "emb_dim")))
