"""The picture of compare.py: how two Jets differ on each image, and the images that differ most."""
import numpy as np

from harness.files import write_atomically
from paper_figures import style
from paper_figures.per_image import paired_difference

SHOWN = 10


def draw(images, bits, names, out):
    """images: uint8 (N, H, W, C). bits: two times bits/dim (N,). out: a .png file."""
    change = np.subtract(*(np.asarray(values, np.float64) for values in bits))
    mean, error = paired_difference(*bits)
    most = np.argsort(-np.abs(change), kind="stable")[:SHOWN]
    figure = style.plt.figure(figsize=(2 * style.COLUMN_WIDTH, 2.4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axes = left.subplots()
    axes.hist(change, bins=min(60, max(10, len(change) // 50)), color="#0072B2")
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.axvline(mean, color="#D55E00", linewidth=1.2,
                 label=f"mean {mean:+.4f}\n$\\pm$ {error:.4f}")
    axes.set(xlabel="bits/dim of A less that of B", ylabel="images")
    axes.legend()
    right.suptitle("the images that differ most", fontsize=7.5)
    for place, index in zip(right.subplots(2, SHOWN // 2).flat, most):
        place.imshow(images[index], cmap="gray", vmin=0, vmax=255)
        place.set_title(f"{index}: {change[index]:+.3f}", fontsize=6)
    for place in right.get_axes():
        place.set_axis_off()
    figure.suptitle("\n".join(f"{name}: {str(path)[-90:]}" for name, path in zip("AB", names)),
                    fontsize=7)
    write_atomically(out, lambda file: figure.savefig(
        file, format="png", metadata=dict.fromkeys(style.METADATA["png"])))
    style.plt.close(figure)
