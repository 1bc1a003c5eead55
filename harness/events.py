"""What TensorBoard shows of a run (--log tensorboard): its steps, evaluations and samples."""
import json
from pathlib import Path

import torch

from harness.condition import one_hot
from harness.errors import TrainingError

EVENTS_NAME = "tensorboard"  # the folder in a run folder
SAMPLES = 16


def writer_class():
    """torch's SummaryWriter. Raises TrainingError where the package tensorboard is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("--log tensorboard: needs the package tensorboard: pip install "
                            "tensorboard, or leave it out") from None
    return SummaryWriter


class Events:
    """The events of a run, in its folder; each attempt at it adds a file."""

    def __init__(self, run_dir, columns):
        self.path, self.columns, self.writer = Path(run_dir) / EVENTS_NAME, columns, None

    def begin(self, step, record, last_row):
        """Begin after this step. Later events, of before a kill, are hidden: they come again.

        TensorBoard hides those of the step itself, too: last_row, of metrics.csv (or None), brings
        them back. It hides no text: the configuration, record, is written once.
        """
        if self.path.is_symlink():
            raise TrainingError(f"{self.path}: is a link, and links are not written to")
        is_new = not self.path.exists()
        self.writer = writer_class()(self.path, purge_step=step)
        if is_new:
            text = json.dumps(record, indent=1).replace("\n", "\n    ")
            self.writer.add_text("configuration", f"    {text}", step)
            self.writer.flush()
        if last_row:
            self.add_steps([last_row])

    def add_steps(self, rows):
        """Rows of metrics.csv."""
        for step, *values in rows:
            for column, value in zip(self.columns[1:], values):
                self.writer.add_scalar(f"training/{column}", float(value), int(step))

    def add_evaluation(self, rows, jet):
        """Rows of an evaluation, and samples. Raises ValueError where samples overflow."""
        for row in rows:
            for name in ("bits_per_dim", "bits_per_dim_se", "logdet_nats"):
                self.writer.add_scalar(f"{row['split']}/{name}", row[name], row["step"])
        if jet.config.channels in (1, 3):
            self.writer.add_images("samples", draw_samples(jet), rows[-1]["step"],
                                   dataformats="NHWC")

    def flush(self):
        """All that was added is in the file."""
        if self.writer:
            self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()


def draw_samples(jet):
    """The same noise each time as uint8 (n, H, W, C); one of each class of a conditional Jet."""
    classes, context = jet.config.context_dim, None
    number = min(SAMPLES, classes or SAMPLES)
    if classes:
        context = one_hot(range(number), classes)
    return jet.sample(number, torch.Generator().manual_seed(0), context=context).cpu().numpy()
