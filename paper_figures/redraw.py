"""Redraw all figures and tables from the committed CSVs; write results/RESULTS.md and site/.

    python paper_figures/redraw.py              # under a minute
    python paper_figures/redraw.py --check      # writes nothing; fails where a file differs
"""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)
from harness.flags import ArgumentParser, one_line_errors
from paper_figures import (conditions, figure1, figure2, figure3, figure4, figure5, results_page,
                           site_page, style, tables, throughput)
from paper_figures.results_csv import ResultsError

DRAWS = {  # what is drawn from results/<experiment>_<scale>.csv
    "compare_vit_cnn": [figure2.draw_a], "ablate_block_depth": [figure2.draw_b],
    "scaling": [figure3.draw], "ablate_coupling": [figure4.draw, tables.draw_figure4],
    "draw_samples": [figure5.draw], "main_results": [tables.draw_main],
    "ablate_splits": [tables.draw_splits], "ablate_layers": [tables.draw_layers],
    "condition_classes": [conditions.draw], "throughput": [throughput.draw]}


def find_csvs(results_dir):
    """{CSV: its experiment} of those that are drawn by themselves, small ones there or not.

    Raises ResultsError for a file that is of no experiment.
    """
    small, found = {results_dir / f"{name}_small.csv" for name in DRAWS if name != "throughput"}, {}
    for csv in sorted({*results_dir.glob("*.csv"), *small}):
        experiment, _, scale = csv.stem.rpartition("_")
        if csv.name in ("reported.csv", "paper.csv") or scale == "smoke" or ".shard-" in csv.name:
            continue
        if experiment.endswith(("_search", "_lengths")):  # drawn with what they belong to
            continue
        if experiment not in DRAWS:
            raise ResultsError(f"{csv}: is of none of {', '.join(DRAWS)}: move it away")
        found[csv] = experiment
    return found


def redraw(results_dir, out_dir):
    """Draw everything but smoke runs, and what is drawn from nothing; yields the paths.

    Raises ResultsError for a file that is of no experiment.
    """
    if not results_dir.is_dir():
        raise ResultsError(f"{results_dir}: no such folder")
    for csv, experiment in find_csvs(results_dir).items():
        for draw in DRAWS[experiment]:
            yield from draw(csv, out_dir)
    for path in sorted(results_dir.glob("samples/*.npz")):
        if path.name.split("_")[0] not in style.SCALES:
            yield from figure5.draw_file(path, out_dir)
    yield from figure1.draw(out_dir)


def check(results_dir, out_dir):
    """Raise ResultsError where a file differs from what is drawn now, or is drawn from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {out_dir / path.name: path.read_bytes()
                  for path in redraw(results_dir, Path(folder))}
        wanted |= {results_dir / "site" / name: content for name, content in
                   site_page.files(results_dir, Path(folder)).items()}
    wanted[results_dir / "RESULTS.md"] = results_page.page(results_dir).encode()
    wrong = [path for path, content in wanted.items()
             if not path.exists() or path.read_bytes() != content]
    wrong += [path for path in sorted([*out_dir.glob("*"), *results_dir.glob("site/*")])
              if path not in wanted and "_smoke" not in path.name]
    if wrong:
        raise ResultsError(f"not what the CSVs give: {', '.join(map(str, wrong))}: run redraw.py")


def main(arguments=None):
    parser = ArgumentParser(prog=Path(__file__).name, description=__doc__)
    style.add_folder_flag(parser, "--results-dir", "results")
    style.add_folder_flag(parser, "--out", "paper_figures/out")
    parser.add_argument("--check", action="store_true",
                        help="write nothing, and fail where a file differs or is missing")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        if flags.check:
            return check(flags.results_dir, flags.out)
        for path in redraw(flags.results_dir, flags.out):
            print(path)
        print(results_page.write(flags.results_dir))
        print(site_page.write(flags.results_dir, flags.out)[0])


if __name__ == "__main__":
    main()
