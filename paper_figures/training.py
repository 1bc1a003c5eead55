"""The picture of runs so far: bits/dim, gradient norm, learning rate and speed, run by run."""
import itertools

import numpy as np

from paper_figures import style

POINTS = 800  # a run has no more in a panel: each is then the mean of several steps
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#333333")
DASHES = ("-", "--", ":", "-.")
MARKERS = {"train": {"fmt": "o", "ms": 5, "mfc": "none"}, "test": {"fmt": "o", "ms": 2.5}}
SPLITS = {"train": "training", "test": "test"}
RESTART = {"lw": 0.8, "ls": (0, (1, 1.5))}
TOLD = 48  # runs that a legend has room for
AXES = {"step": "steps", "images_seen": "images seen"}


def draw(histories, names, title, name, out_dir):
    """Draw harness.history's Histories over each other; returns the paths of the PDF and the PNG.

    names: of the runs, for the legend. Panels have steps below and images seen above; runs of
    different batch sizes have a column of panels for each.
    """
    sizes = {float(size) for run in histories for size in batch_sizes(run)}
    columns = [*AXES] if len(sizes) > 1 else ["step"]
    rows = (len(names[:TOLD]) + 3) // (2 * len(columns))
    figure, axes = style.plt.subplots(
        4, len(columns), sharex="col", sharey="row", squeeze=False,
        figsize=(1.5 * style.COLUMN_WIDTH * len(columns) ** 0.5, 6.4 + 0.13 * rows))
    for column, of_column in zip(columns, axes.T):
        for run, (dash, color) in zip(histories, itertools.cycle(itertools.product(DASHES,
                                                                                   COLORS))):
            draw_run(of_column, run, column, {"color": color, "ls": dash}, len(histories) == 1)
        of_column[-1].set_xlabel(AXES[column])
        of_column[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if len(columns) == 1 and sizes:
        size, = sizes
        above = axes[0, 0].secondary_xaxis("top", functions=(lambda x: x * size,
                                                             lambda x: x / size))
        above.set_xlabel(AXES["images_seen"])
        above.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    name_panels(axes[:, 0])
    if any((run.steps["grad_norm"] > 0).any() for run in histories):
        axes[1, 0].set_yscale("log")
    limit_bits(axes[0, 0], histories)
    figure.legend(handles=legend(histories, names), ncols=2 * len(columns),
                  loc="outside lower center")
    figure.suptitle(title, fontsize=7.5)
    return style.save(figure, name, out_dir)


def batch_sizes(run):
    """Images per step, as metrics.csv has them: one value, or none before the first step."""
    sizes = np.unique(np.round(run.steps["images_seen"] / np.maximum(run.steps["step"], 1)))
    return sizes[sizes > 0]


def draw_run(panels, run, x, look, is_alone):
    """A run in its four panels, over a column of its steps, with its evaluations and restarts."""
    place, thin = run.steps[x], {**look, "lw": 0.8}
    bits, norm, rate, speed = panels
    for panel, column in ((bits, "bits_per_dim"), (norm, "grad_norm")):
        middle, low, high = thinned(run.steps[column])
        at = thinned(place)[0]
        panel.plot(at, middle, **{**thin, "alpha": 0.75})
        if is_alone and len(at) < len(place):
            panel.fill_between(at, low, high, color=look["color"], alpha=0.2, lw=0)
    rate.plot(thinned(place)[0], thinned(run.steps["lr"])[0], **thin)
    speed.plot(*images_per_s(run.steps, x), drawstyle="steps-pre", **thin)
    for split, rows in run.evaluations.items():
        if rows:
            step, value, error = np.array(rows).T
            bits.errorbar(step * scale_of(run, x), value, np.nan_to_num(error, posinf=0), zorder=5,
                          color=look["color"], elinewidth=0.8, capsize=1.5, **MARKERS[split])
    seams = [step * scale_of(run, x) for step in run.restarts]
    for panel in panels:
        for seam in seams:
            panel.axvline(seam, color=look["color"], **RESTART)
        if is_alone:  # every other part in grey
            last = max(place, default=0)
            for begin, end in itertools.zip_longest(seams[::2], seams[1::2], fillvalue=last):
                panel.axvspan(begin, end, color="#f0f0f0", lw=0, zorder=0)
    if is_alone:
        for seam, step in zip(seams, run.restarts):
            bits.annotate(f" resumed after step {step:,}", (seam, 0.97), va="top", fontsize=6,
                          xycoords=bits.get_xaxis_transform())


def scale_of(run, x):
    """How much of x a step is."""
    return next(iter(batch_sizes(run)), 1) if x == "images_seen" else 1


def thinned(values):
    """(mean, least, most) of at most POINTS groups of values that follow each other."""
    if len(values) <= POINTS:
        return values, values, values
    starts = np.arange(0, len(values), group(len(values)))
    counts = np.diff([*starts, len(values)])
    return (np.add.reduceat(values, starts) / counts, np.minimum.reduceat(values, starts),
            np.maximum.reduceat(values, starts))


def group(count):
    """How many steps of so many are one point."""
    return max(1, -(-count // POINTS))


def images_per_s(steps, x):
    """(x, images/s) at the steps whose time was taken: since the one before."""
    seconds, images = steps["seconds"], steps["images_seen"]
    taken = np.flatnonzero(np.diff(seconds, append=np.inf) > 0)  # the last of equal times
    taken = taken[::group(len(taken))]
    passed = np.diff(seconds[taken], prepend=0)
    before = images[:1] * (1 - 1 / np.maximum(steps["step"][:1], 1))  # of the run that it extends
    with np.errstate(divide="ignore", invalid="ignore"):
        speed = np.diff(images[taken], prepend=before) / passed
    return steps[x][taken], np.where(passed > 0, speed, np.nan)


def name_panels(panels):
    """What is upwards in each panel."""
    bits, norm, rate, speed = panels
    bits.set_ylabel("bits/dim\n(lower is better)")
    norm.set_ylabel("gradient norm")
    rate.set_ylabel("learning rate")
    speed.set_ylabel("images/s")
    for panel in (rate, speed):
        panel.set_ylim(bottom=0)


def limit_bits(panel, histories):
    """Leave out the first twentieth, which falls from far above and would leave no room."""
    later = [run.steps["bits_per_dim"][len(run.steps["step"]) // 20:] for run in histories]
    later += [[row[1] for row in rows] for run in histories for rows in run.evaluations.values()]
    later = np.concatenate(later)
    if len(later):
        room = 0.05 * max(np.ptp(later), 0.1)
        panel.set_ylim(later.min() - room, later.max() + room)


def legend(histories, names):
    """What the legend shows: the runs, and what markers and lines are."""
    looks = itertools.cycle(itertools.product(DASHES, COLORS))
    handles = [style.line(name, color=color, ls=dash)
               for name, (dash, color) in zip(names[:TOLD], looks)]
    if len(names) > TOLD:
        handles.append(style.line(f"and {len(names) - TOLD} more", color="none"))
    grey = {"color": "#666666"}
    for split, rule in MARKERS.items():
        if any(run.evaluations[split] for run in histories):
            rule = {name: value for name, value in rule.items() if name != "fmt"}
            handles.append(style.line(f"{SPLITS[split]} images ± 1 s.e.", ls="", marker="o", **rule,
                                      **grey))
    if any(run.restarts for run in histories):
        handles.append(style.line("a restart", **RESTART, **grey))
    if (each := max(group(len(run.steps["step"])) for run in histories)) > 1:
        band = "; band: least to most" if len(histories) == 1 else ""
        handles.append(style.line(f"mean of up to {each} steps{band}", **grey))
    return handles
