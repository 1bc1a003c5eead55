"""For how many epochs the runs of a CSV were trained: small scale counts as run from 5 epochs on."""
import contextlib
import functools
from pathlib import Path

from data import SETS
from paper_figures import style, table_files
from paper_figures.results_csv import ResultsError, read_csv

LEAST = {"small": 5}  # epochs


def epochs_of(rows):
    """The epochs of the runs of a CSV that were trained, on known image sets, from few to many."""
    runs = rows[["dataset", "total_steps", "batch_size"]].drop_duplicates()
    counts = {name: SETS[name].counts["train"] for name in runs["dataset"] if name in SETS}
    return sorted({int(run.total_steps) * int(run.batch_size) / counts[run.dataset]
                   for run in runs.itertuples() if counts.get(run.dataset) and run.total_steps})


def is_run(path, experiment, scale=None):
    """Whether a CSV is evidence at its scale, by its name or as given: there, and long enough.

    One that cannot be read counts as run: who reads it says what is wrong.
    """
    if (least := LEAST.get(scale or Path(path).stem.rpartition("_")[2])) is None:
        return True
    if not Path(path).exists():
        return False
    with contextlib.suppress(ResultsError, ValueError, ArithmeticError):
        names = ["dataset", "total_steps", "batch_size"]
        return min(epochs_of(read_csv(Path(path), experiment, usecols=names)), default=least) >= least
    return True


def say_not_run(experiment, scale):
    """The sentence on what is not evidence yet, and its command."""
    return (f"Not run at {LEAST[scale]} epochs, {scale} scale: python experiments/{experiment}.py "
            f"--scale {scale} --data-root DIR")


def drawn_from(experiment, name, title, table=False):
    """A decorator: draw(path, out_dir) says so in its files where its CSV is no evidence yet."""
    def decorate(draw):
        @functools.wraps(draw)
        def checked(path, out_dir=style.OUT):
            scale = Path(path).stem.rpartition("_")[2]
            if is_run(path, experiment):
                return draw(path, out_dir)
            text = say_not_run(experiment, scale)
            if table:
                part = table_files.Part(header=(f"{scale} scale",), rows=[(f"{text}.",)])
                return table_files.write(f"{name}_{scale}", f"{title}.", [part], out_dir)
            figure = style.plt.figure(figsize=(style.COLUMN_WIDTH, 0.8))
            figure.text(0.5, 0.5, f"{title}\n" + text.replace(": ", ":\n"), ha="center",
                        va="center", fontsize=6.5)
            return style.save(figure, f"{name}_{scale}", out_dir)
        return checked
    return decorate
