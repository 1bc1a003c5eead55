"""How long and with which rates runs were trained: small scale counts as run from 5 epochs on."""
import contextlib
import functools
from pathlib import Path

from data import SETS
from paper_figures import style, table_files
from paper_figures.results_csv import SAME, ResultsError, columns, read_csv

LEAST = {"small": 5}  # epochs


def epochs(dataset, total_steps, batch_size):
    """How often a run has seen each image of its set; None for sets that are not known."""
    count = SETS[dataset].counts["train"] if dataset in SETS else 0
    return int(total_steps) * int(batch_size) / count if count else None


def epochs_of(rows):
    """The epochs of the runs of a CSV that were trained, on known image sets, from few to many."""
    runs = rows[["dataset", "total_steps", "batch_size"]].drop_duplicates()
    return sorted(filter(None, {epochs(*run) for run in runs.itertuples(index=False, name=None)}))


def is_run(path, experiment):
    """Whether a CSV is evidence at the scale of its name: there, and long enough.

    One that cannot be read, or is of another scale, counts as run: its reader says what is wrong.
    """
    scale = Path(path).stem.rpartition("_")[2]
    if (least := LEAST.get(scale)) is None:
        return True
    if not Path(path).exists():
        return False
    with contextlib.suppress(ResultsError, ValueError, ArithmeticError):
        names = ["scale", "dataset", "total_steps", "batch_size"]
        rows = read_csv(Path(path), experiment, usecols=names)
        return set(rows["scale"]) != {scale} or min(epochs_of(rows), default=least) >= least
    return True


def regime(rows, path):
    """"5 epochs, tuned over 3 learning rates": of the rows of a CSV and the search beside it."""
    epochs = epochs_of(rows)
    text = " to ".join(f"{number:.3g}" for number in dict.fromkeys((epochs[0], epochs[-1]))) \
        if epochs else "unknown"
    experiment, _, scale = Path(path).stem.rpartition("_")
    search, tuned = Path(path).with_name(f"{experiment}_search_{scale}.csv"), "one learning rate"
    if search.exists():
        tried = read_csv(search, experiment)
        arm = [name for name in tried if name != "lr" and (name in SAME or name not in columns(()))]
        counts = tried.groupby(arm, dropna=False)["lr"].nunique()
        counts = " to ".join(map(str, dict.fromkeys((counts.min(), counts.max()))))
        tuned = f"tuned over {counts} learning rates"
    return f"{text} epochs, {tuned}"


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
