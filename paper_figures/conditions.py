"""What labels are worth, as a table: class-conditional Jets (our own question, not the paper's).

    python paper_figures/conditions.py --scale small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

from paper_figures import style
from paper_figures.per_image import paired_difference, read_per_image
from paper_figures.regime import drawn_from
from paper_figures.results_csv import final_test_rows
from paper_figures.table_files import Part, write
from paper_figures.tables import commit_of, power, setting

SWEPT, VARYING = ("condition", "rate"), ("lr", "total_steps", "init")
TOLD = {"none": "nothing: no cross-attention", "labels": "its label",
        "shuffled": "the label of another image", "dropped": "no label (context 0)"}
NOT_KEPT = "not kept"


@drawn_from("condition_classes", "conditions", "What labels are worth", table=True)
def draw(path, out_dir=style.OUT):
    """Write the table of a CSV; returns the paths of the Markdown and the LaTeX file."""
    rows = final_test_rows(path, "condition_classes", SWEPT, "the table of conditions", VARYING)
    first, bits = rows.iloc[0], read_per_image(path, rows)
    caption = (
        f"What labels are worth (our own question, not the paper's), {first['scale']} scale. "
        f"{style.dataset_title(first['dataset'])}, variant {first['variant']}, "
        f"{first['num_images']:,} test images; {setting(rows)} Differences: image by image, of the "
        "same seed and learning rate, ± standard error over images. With labels a tenth of the "
        "training steps was told none; the last two rows of a rate are the weights of the second.")
    runs = {(row["condition"], row["rate"], row["seed"]): row for _, row in rows.iterrows()}
    seeds, table = sorted(rows["seed"].unique()), []
    for rate, told in style.points(rows, SWEPT[::-1], {"condition": TOLD}):
        here = [runs[told, rate, seed] for seed in seeds]
        row = here[0]
        cells = [differences(bits, here, [runs.get((other, rate, seed)) for seed in seeds])
                 for other in ("none", "labels")]
        table.append((TOLD.get(told, told), rate,
                      "; ".join(f"{run['bits_per_dim']:.4f} ± {run['bits_per_dim_se']:.4f}"
                                for run in here), *cells, f"{row['num_params'] / 1e6:,.3f} M",
                      power(row["train_flops"]) if row["total_steps"] else "–",
                      f"{row['run_id']}, commit {commit_of(row['git_commit'], row['git_dirty'])}"))
    header = ("What it is told of an image", "Learning rate", "bits/dim", "less that of none",
              "less that of its label", "Parameters", "Training FLOPs", "Source")
    return write(f"conditions_{first['scale']}", caption, [Part(header=header, rows=table)],
                 out_dir)


def differences(bits, runs, others):
    """"-0.0100 ± 0.0010" for each seed, as far as the values of all images were kept."""
    cells = []
    for run, other in zip(runs, others):
        if other is None or run["run_id"] == other["run_id"]:
            return "–"
        if run["run_id"] not in bits or other["run_id"] not in bits:
            return NOT_KEPT
        mean, error = paired_difference(bits[run["run_id"]], bits[other["run_id"]])
        cells.append(f"{mean:+.4f} ± {error:.4f}")
    return "; ".join(cells)


if __name__ == "__main__":
    style.main(__file__, __doc__, {"condition_classes": draw})
