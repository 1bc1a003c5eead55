"""Redraw all figures and tables from the committed CSVs, and write results/RESULTS.md: one command, under a minute.

    python paper_figures/redraw.py
    python paper_figures/redraw.py --check      # writes nothing; fails where a committed file is not what would be drawn
"""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from paper_figures import figure2, figure3, figure4, figure5, results_page, style, tables, throughput
from paper_figures.results_csv import ResultsError

DRAWS = {  # what is drawn from results/<experiment>_<scale>.csv
    "compare_vit_cnn": [figure2.draw_a], "ablate_block_depth": [figure2.draw_b], "scaling": [figure3.draw],
    "ablate_coupling": [figure4.draw, tables.draw_figure4], "draw_samples": [figure5.draw],
    "main_results": [tables.draw_main], "ablate_splits": [tables.draw_splits], "ablate_layers": [tables.draw_layers],
    "throughput": [throughput.draw]}


def redraw(results_dir, out_dir):
    """Draw everything but smoke runs; yields the paths. Raises ResultsError for a file that is of no experiment."""
    if not results_dir.is_dir():
        raise ResultsError(f"{results_dir}: no such folder")
    for csv in sorted(results_dir.glob("*.csv")):
        experiment, _, scale = csv.stem.rpartition("_")
        if csv.name == "reported.csv" or scale == "smoke" or ".shard-" in csv.name:
            continue
        if experiment not in DRAWS:
            raise ResultsError(f"{csv}: is of none of {', '.join(DRAWS)}: move it away")
        for draw in DRAWS[experiment]:
            yield from draw(csv, out_dir)
    for path in sorted(results_dir.glob("samples/*.npz")):
        if path.name.split("_")[0] not in style.SCALES:
            yield from figure5.draw_file(path, out_dir)


def check(results_dir, out_dir):
    """The files that are not what is drawn now, are missing, or are drawn from nothing that is there."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = {path.name: path.read_bytes() for path in redraw(results_dir, Path(folder))}
    page = results_page.page(results_dir, style.ROOT / "assets").encode()
    wanted = {out_dir / name: content for name, content in drawn.items()} | {results_dir / "RESULTS.md": page}
    stray = [path for path in sorted(out_dir.glob("*")) if path not in wanted and "_smoke" not in path.name]
    return [path for path, content in wanted.items() if not path.exists() or path.read_bytes() != content] + stray


def main(arguments=None):
    parser = style.make_parser(__file__, __doc__)
    parser.add_argument("--results-dir", type=Path, default=style.ROOT / "results", metavar="DIR", help="default: results")
    parser.add_argument("--out", type=Path, default=style.OUT, metavar="DIR", help="default: paper_figures/out")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a file differs or is missing")
    flags = parser.parse_args(arguments)
    with style.one_line_errors(parser.prog, flags.out):
        if flags.check:
            if wrong := check(flags.results_dir, flags.out):
                sys.exit(f"{parser.prog}: error: not what the CSVs give: {', '.join(map(str, wrong))}: run redraw.py")
            return
        for path in redraw(flags.results_dir, flags.out):
            print(path)
        print(results_page.write(flags.results_dir))


if __name__ == "__main__":
    main()
