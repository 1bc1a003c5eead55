"""How far a long piece of work is."""
import sys

from tqdm import tqdm


def progress(iterable=None, desc=None, unit=" images", **settings):
    """A bar on a terminal; elsewhere a line every 30 s."""
    settings |= {"desc": desc, "unit": unit, "unit_scale": True}
    if sys.stderr.isatty():
        return tqdm(iterable, smoothing=0.05, dynamic_ncols=True, **settings)
    line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"
    return tqdm(iterable, file=sys.stdout, mininterval=30, maxinterval=60, delay=30,
                bar_format=line, **settings)
