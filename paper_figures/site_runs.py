"""The table of all runs of the results page: a row for each run of each committed CSV."""
import math
from pathlib import Path

from paper_figures import regime, style, tables
from paper_figures.results_csv import read_runs

COLUMNS = ("experiment", "scale", "point", "seed", "images", "bits/dim, test", "± s.e.",
           "bits/dim, train", "couplings", "depth", "width", "block", "parameters", "epochs",
           "learning rate", "FLOPs", "seconds", "logdet/cap", "machine", "commit", "run", "file")
SHORT = {"num_couplings": "couplings", "block_depth": "depth", "emb_dim": "width"}


def read(results_dir):
    """The last evaluation of every run of every CSV that is evidence, and which CSV: `csv`."""
    import pandas as pd  # takes half a second: imported where it is used
    found = []
    for path in sorted(results_dir.glob("*.csv")):
        experiment, _, scale = path.stem.partition(".")[0].rpartition("_")
        if not experiment or scale not in style.SCALES[1:]:
            continue
        if experiment.endswith(("_search", "_lengths")) or regime.is_run(path, experiment):
            found.append(read_runs(path).assign(csv=path.name))
    empty = pd.DataFrame(columns=["experiment", "scale", "csv", "seed", "grid_points"])
    return pd.concat(found, ignore_index=True) if found else empty


def shipped():
    """The small trained model like a row of read(), if it is there."""
    if (found := tables.read_shipped(tables.SHIPPED)) is None:
        return []
    done, _, share = found
    train, test = done["rows"][-2:]
    name = f"assets/{tables.SHIPPED.name}"
    return [{
        **done, **done["config"], **done["config"]["model"], **test, "experiment": name,
        "scale": "", "run_id": name, "csv": f"../{name}/done.json", "train_flops": math.nan,
        "logdet_cap_share": share, "train_bits_per_dim": train["bits_per_dim"]}]


def cells(row):
    """The COLUMNS of a run."""
    point = row["run_id"].rpartition("_seed")[0]
    for name, words in SHORT.items():
        point = point.replace(name, words)
    epochs = regime.epochs(row["dataset"], row["total_steps"], row["batch_size"])
    return (row["experiment"], row["scale"], point.replace("_", " "), str(row["seed"]),
            row["dataset"], f"{row['bits_per_dim']:.4f}", f"{row['bits_per_dim_se']:.4f}",
            number(row["train_bits_per_dim"], ".4f"), str(row["num_couplings"]),
            str(row["block_depth"]), str(row["emb_dim"]), row["block"], f"{row['num_params']:,}",
            "" if epochs is None else f"{epochs:.3g}", f"{row['lr']:g}",
            number(row["train_flops"], ".3g").replace("e+", "e"),
            number(row["train_seconds"], ",.1f"), number(row["logdet_cap_share"], ".3f"),
            str(row["hardware"]), tables.commit_of(row["git_commit"], row["git_dirty"]),
            row["run_id"], f"[{Path(row['csv']).suffix[1:].upper()}]({row['csv']})")


def number(value, form):
    return "" if math.isnan(value) else f"{value:{form}}"
