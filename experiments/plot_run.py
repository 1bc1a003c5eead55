"""A picture of runs: bits/dim, gradient norm, learning rate and images/s, step by step.

    python experiments/plot_run.py runs/first
    python experiments/plot_run.py runs/one runs/other --out pictures/both

RUN: a run folder, of a run that is running, too. Evaluations stand with their error bars, restarts
as lines. Of several runs it says which settings differ; of two that have finished, by how much they
differ on their test images. python experiments/NAME.py --status --plot draws a whole sweep.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

from experiments.compare import difference
from harness.errors import TrainingError, UserError, one_line, printable
from harness.flags import ArgumentParser, one_line_errors
from harness.history import read_history
from harness.run_folder import read_per_image
from paper_figures import training
from recipe import TrainConfig, flatten

COUPLINGS = ("model.kinds", "model.spatial_splits")


def make_parser():
    parser = ArgumentParser(prog="plot_run.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("plot_run"), metavar="NAME",
                        help="writes NAME.png and NAME.pdf (default: plot_run)")
    return parser


def main(arguments=None):
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog):
        if flags.out.suffix not in ("", ".png", ".pdf") or not flags.out.resolve().parent.is_dir():
            raise UserError(f"--out {flags.out}: must be a name, with .png, .pdf or without, in a "
                            "folder that exists")
        if len(set(flags.runs)) < len(flags.runs):
            raise UserError("the same run is given twice: give each once")
        histories = [read_history(run) for run in flags.runs]
        settings = [settings_of(history) for history in histories]
        lines = [summary(*both) for both in zip(histories, settings)]
        print("\n".join(lines))
        differing = differences(settings)
        if len(histories) > 1:
            print("\n".join(["settings that differ:", *differing] if differing
                            else ["no setting differs"]))
        if len(histories) == 2:
            print(measured_difference(*histories))
        names = [printable(name)[-40:] for name in flags.runs]
        title = lines[0].replace(": ", "\n", 1) if len(lines) == 1 else f"{len(lines)} runs"
        for path in training.draw(histories, names, title, flags.out.stem, flags.out.parent):
            print(path)


def summary(history, settings):
    """"runs/first: 40 of 100 steps, 5.9 +- 0.1 bits/dim on test images at step 20; ..."."""
    last = int(max(history.steps["step"], default=0))
    parts = [f"{last:,} of {settings['total_steps']:,} steps"]
    if rows := history.evaluations["test"]:
        step, bits, error = rows[-1]
        parts.append(f"{bits:.4f} +- {error:.4f} bits/dim on test images at step {step:,}")
    if history.restarts:
        parts.append(f"restarted after step {', '.join(f'{step:,}' for step in history.restarts)}")
    return f"{printable(history.path)[-90:]}: {'; '.join(parts)}"


def settings_of(history):
    """{field: value} of what makes the run differ from others (TrainConfig.identity)."""
    try:
        config, data_id = TrainConfig.from_dict(history.record), history.record.get("data_id")
        found = config.identity(data_id or config.data)
        found["model.couplings"] = hash(tuple(found.get("model.couplings", ())))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TrainingError(f"{history.path}: its configuration is damaged or of another version "
                            f"({one_line(error)})") from None
    written = flatten(config.to_dict())
    return found | {name: written[name] for name in COUPLINGS}


def differences(settings):
    """A line for each setting that is not the same in all runs."""
    values = {name: [printable(one.get(name, ""), 300) or "-" for one in settings]
              for name in sorted(set().union(*settings))}
    differ = {name for name, of_runs in values.items() if len(set(of_runs)) > 1}
    # equal couplings are so however written, and others are told in the words of their fields
    differ -= {"model.couplings"} if "model.couplings" in differ else {*COUPLINGS}
    return [f"  {name}: {', '.join(values[name])}" for name in sorted(differ)]


def measured_difference(a, b):
    """By how much two runs differ on their test images, or why that is not known here."""
    way_on = f"python experiments/compare.py {a.path} {b.path} --data NAME measures both on one set"
    if not (a.done and b.done):
        return f"not both have finished: {way_on}"
    bits = [read_per_image(run.path, run.done) for run in (a, b)]
    if a.done["test_fingerprint"] != b.done["test_fingerprint"] or any(
            values is None for values in bits):
        return f"they were not measured on the same images: {way_on}"
    return difference(bits)


if __name__ == "__main__":
    main()
