"""What a sweep prints of its CSV: the points, best first, and how surely they differ."""
import math

from paper_figures.inference import COLUMNS, Contrast, cells, compare
from paper_figures.per_image import paired_difference


def print_table(rows, swept, per_image):
    """The finished points, those on equal images together, best first.

    behind: by how much a point is behind the best of its seed, image by image, and the error.
    """
    train = rows[rows["split"] == "train"]
    train_bits = dict(zip(zip(train["run_id"], train["step"]), train["bits_per_dim"]))
    test = rows[rows["split"] == "test"].sort_values(["dataset", "bits_per_dim"])
    keys = zip(test["run_id"], test["step"])
    table = test[[*swept, "seed"]].assign(**{
        "channels": test["channel_share"].map("{:.3f}".format),
        "bits/dim": test["bits_per_dim"].map("{:.4f}".format),
        "+- s.e.": test["bits_per_dim_se"].map("{:.4f}".format),
        "train": [f"{train_bits.get(key, math.nan):.4f}" for key in keys],
        "logdet/cap": ["" if math.isnan(share) else f"{share:.1%}"
                       for share in test["logdet_cap_share"].astype(float)],
        "seconds": test["train_seconds"].map("{:.1f}".format)})
    best = test.groupby(["dataset", "seed", "step"])["run_id"].transform("first")
    if set(test["run_id"]) <= per_image.keys():
        behind = [paired_difference(per_image[one], per_image[other])
                  for one, other in zip(test["run_id"], best)]
        for place, name in enumerate(("behind", "+-")):
            table[name] = [f"{pair[place]:.4f}" if pair[0] else "" for pair in behind]
    print(table.to_string(index=False))
    print_over_seeds(test[test["step"] == test["total_steps"]], swept, per_image)


def print_over_seeds(test, swept, per_image):
    """How far each point is behind the best one in the mean over seeds, and how surely."""
    import pandas as pd  # takes half a second: imported where it is used
    means = test.groupby([*swept])["bits_per_dim"].agg(["mean", "size"]).sort_values("mean")
    if len(means) < 2 or means["size"].min() != means["size"].max() or means["size"].max() < 2 \
            or test["dataset"].nunique() > 1:
        return
    points = [point if isinstance(point, tuple) else (point,) for point in means.index]
    found = compare(test, swept, per_image, [
        Contrast(" ".join(map(str, point)), {point: 1, points[0]: -1}) for point in points[1:]])
    table = pd.DataFrame(map(cells, found), columns=("behind the best", *COLUMNS[1:]))
    print(f"over {means['size'].max()} seeds, less {' '.join(map(str, points[0]))}:")
    print(table.to_string(index=False))
