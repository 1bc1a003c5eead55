"""The grid of an experiment: its points, and the runs that train them.

Points whose configurations are equal (TrainConfig.hash) share one run; each has its own rows.
"""
import collections
import dataclasses
from pathlib import Path
from typing import Callable

from data import SETS
from harness.errors import TrainingError
from harness.flops import logdet_cap_share, train_flops
from harness.run_folder import DONE_NAME, read_done, read_per_image
from paper_figures.results_csv import columns
from recipe import TrainConfig

OF_CONFIG = ("batch_size", "total_steps", "lr", "precision", "init", "seed")  # columns of the CSV
OF_MODEL = ("num_couplings", "block", "block_depth", "emb_dim", "patch_size")
OF_ROW = ("step", "split", "bits_per_dim", "bits_per_dim_se", "num_images")
IMAGENET_21K_IMAGES = 13_000_000  # about, as far as they are not known to data.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid.

    config: its configuration for seed 0. labels: {swept field: value} for what is no field of the
    configuration or its model. after: the point whose final weights it begins with, which comes
    before it in its grid.
    """
    config: TrainConfig
    labels: dict = dataclasses.field(default_factory=dict)
    after: "Point | None" = None

    def values(self, swept):
        """{swept field: its value here, as text}; dataset is the image set's name."""
        known = {**vars(self.config.model), **vars(self.config), "dataset": self.config.data,
                 **self.labels}
        if unknown := set(swept) - known.keys():
            raise TrainingError(f"swept names {sorted(unknown)[0]}: must be a field of TrainConfig "
                                "or JetConfig, dataset, or a label of every point")
        return {field: str(known[field]) for field in swept}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the script of an experiment declares; sweep.main(experiment) does the rest.

    name: of the script, the CSVs and the run folders. configs: a pure function, scale -> [Point].
    swept: the fields by which a grid's points are told apart, columns of the CSV. draw(csv,
    folder): draws it and returns the paths. varying: what may differ from run to run besides
    (results_csv.read_results). runs_of: another experiment, whose run folders and rates are
    used. search: {scale: the sweeps.search.Search of its learning rates}. seeds: {scale: how many,
    if not 1}. also: experiments that the same command runs, with seed 0, where they have points.
    """
    name: str
    description: str
    configs: Callable
    swept: tuple[str, ...]
    draw: Callable
    varying: tuple[str, ...] = ()
    runs_of: "Experiment | None" = None
    search: dict = dataclasses.field(default_factory=dict)
    seeds: dict = dataclasses.field(default_factory=dict)
    also: tuple["Experiment", ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a grid.

    name: the values of the swept fields at the first of its points, like "4:1 row" or
    "vit emb_dim=64". points: these values, {field: text}, at each point that it stands for.
    arm: which of the searched learning rates it takes. awaits: that rate is not known yet.
    """
    name: str
    points: tuple
    config: TrainConfig
    runs_dir: Path
    run_id: str
    after: "Run | None" = None
    arm: tuple = ()
    awaits: bool = False

    @property
    def label(self):
        return f"{self.name} seed {self.config.seed}"

    @property
    def folder(self):
        return self.runs_dir / self.run_id

    @property
    def is_done(self):
        """Whether it has a result; a damaged one counts: it is reported, and not trained again."""
        return (self.folder / DONE_NAME).exists()

    @property
    def done(self):
        """What done.json holds, or None. Raises TrainingError: damaged, or another run's."""
        return read_done(self.folder, self.config)

    @property
    def per_image(self):
        """Bits/dim of each test image, float32 (N,), or None (run_folder.read_per_image)."""
        return read_per_image(self.folder, self.done)

    @property
    def init_from(self):
        """Where its first weights are, or None."""
        return self.after.folder if self.after else None

    def rows(self, shared):
        """The CSV rows of a finished run: what the process that measured them has recorded.

        shared: the columns that are the same in all rows of the CSV.
        """
        done, config, model = self.done, self.config, self.config.model
        fixed = {name: done[name] for name in columns(()) if name in done}
        fixed |= {name: getattr(config, name) for name in OF_CONFIG}
        fixed |= {name: getattr(model, name) for name in OF_MODEL}
        fixed |= {**shared, "run_id": self.run_id, "channel_share": channel_share(model),
                  "train_flops": train_flops(config)}
        measured = [{**{name: row[name] for name in OF_ROW},
                     "images_seen": row["step"] * config.batch_size,
                     "fingerprint": done[f"{row['split']}_fingerprint"],
                     "logdet_cap_share": logdet_cap_share(model, row["logdet_nats"])}
                    for row in done["rows"]]
        return [{**fixed, **row, **values} for values in self.points for row in measured]


def folder_of(experiment, scale, runs_dir):
    """The folder of a grid's runs, or of those whose runs it uses."""
    return runs_dir / f"{(experiment.runs_of or experiment).name}_{scale}"


def make_runs(experiment, scale, seeds, runs_dir, precision=None, rates=None):
    """The runs of a grid for each of the seeds, in its order.

    A run that begins with another's weights takes those of the same seed. precision: of all of
    them; None is the configurations' own. rates: the sweeps.search.Rates that were found for its
    arms; None is the configurations' own, too.
    """
    try:
        points = experiment.configs(scale)
    except KeyError as error:
        if error.args != (scale,):
            raise
        raise TrainingError(f"--scale {scale}: {experiment.name} has no grid of this "
                            "scale") from None
    cells = [tuple(point.values(experiment.swept).items()) for point in points]
    if twice := [cell for cell, count in collections.Counter(cells).items() if count > 1]:
        shown = " ".join(f"{field}={value}" for field, value in twice[0])
        raise TrainingError(f"{experiment.name}: two points of its grid are {shown}: swept must "
                            "name what tells them apart")
    return [run for seed in seeds
            for run in _runs_of_seed(points, experiment.swept, seed, runs_dir, precision, rates)]


def _runs_of_seed(points, swept, seed, runs_dir, precision, rates):
    def config_of(point):
        changes = {"seed": seed, "precision": precision or point.config.precision}
        if rates and (factor := rates.factor(point)):
            changes["lr"] = point.config.lr * factor
        if point.after:
            changes["init"] = config_of(point.after).hash
        return dataclasses.replace(point.config, **changes)

    found = {}  # hash -> (the first point, its configuration, the values of all its points)
    for point in points:
        config = config_of(point)
        found.setdefault(config.hash, (point, config, []))[2].append(point.values(swept))
    runs = {}
    for digest, (point, config, values) in found.items():
        name = name_of(values[0])
        after = runs[config_of(point.after).hash] if point.after else None
        awaits = bool(rates) and not rates.factor(point)  # then its configuration has no hash yet
        run_id = f"{name}_seed{seed}_{'awaits-its-rate' if awaits else digest}"
        runs[digest] = Run(name=name, points=tuple(values), config=config, runs_dir=runs_dir,
                           run_id=run_id.replace(" ", "_").replace(":", "to"), after=after,
                           arm=rates.arm_of(point) if rates else (), awaits=awaits)
    return list(runs.values())


def name_of(values):
    """{field: text} -> "vit emb_dim=64": numbers and switches with their field, names alone."""
    return " ".join(f"{field}={value}" if value.isdigit() or value in ("True", "False") else value
                    for field, value in values.items())


def first_of(run):
    """The run at the start of a chain of runs, each of which begins with the weights before."""
    return first_of(run.after) if run.after else run


def channel_share(model):
    """The realised share of channel couplings."""
    return sum(kind == "channels" for kind, _ in model.coupling_splits) / model.num_couplings


# ---- for the scripts of experiments

def with_model(config, **changes):
    """The configuration with these fields of its model changed."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def steps(name, epochs, batch_size=TrainConfig.batch_size):
    """Optimizer steps that show each training image of a set so many times."""
    return round(epochs * (SETS[name].counts["train"] or IMAGENET_21K_IMAGES) / batch_size)


def at_paper_scale(config, epochs=None):
    """The configuration for its image set as in the paper: 256 tokens, so many epochs.

    epochs: None is 200, of ImageNet-21k 50. The networks are in bfloat16: the official run
    multiplies in it, a TPU's default precision, with parameters, affine map and log-det in float32.
    """
    size = SETS[config.data].shape[0]
    if epochs is None:
        epochs = 50 if config.data.startswith("imagenet21k") else 200
    config = with_model(config, image_size=size, patch_size=size // 16)
    return dataclasses.replace(config, precision="bfloat16",
                               total_steps=steps(config.data, epochs, config.batch_size))
