"""How far a long piece of work is: one style of bar, and a line now and then without a terminal."""
import sys

from tqdm import tqdm

WIDE = "{desc} |{bar:20}| {n_fmt}/{total_fmt}{unit}SAID [{elapsed}, {remaining} left]"
NARROW = "{desc} |{bar:8}| {n_fmt}/{total_fmt}{unit}SAID, {remaining} left"
NARROWEST = NARROW.replace("{bar:8}", "{bar:4}")
ENDLESS = "{desc}: {n_fmt}{unit}SAID [{elapsed}]"
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}SAID, {remaining} left\n"
LINE_EVERY_S = 30
WIDE_FROM = 100  # columns


class Bar(tqdm):
    """tqdm, of which a narrow terminal cuts the name and nothing else.

    Between the count and the time stands the postfix, or where there is none the rate.
    """
    remaining = None  # "1:02:03", where somebody knows better than the bar

    def say(self, text, n=None):
        """Show a text between the count, or another count, and the time.

        Now; without a terminal in its next line.
        """
        self.set_postfix_str(text, refresh=False)
        self.update(0 if n is None else n - self.n)
        if sys.stderr.isatty():
            self.refresh()

    def display(self, msg=None, pos=None):
        """On a terminal as tqdm does it; elsewhere a line, and nothing to wipe it out again."""
        if self.bar_format != LINE:
            return super().display(msg, pos)
        if msg is None:
            tell(str(self).rstrip("\n"))

    @property
    def format_dict(self):
        known = {"remaining": self.remaining} if self.remaining else {}
        return {**super().format_dict, **known}

    @staticmethod
    def format_meter(n, total, elapsed, ncols=None, prefix="", postfix="", bar_format=None,
                     **settings):
        def line(form, name=prefix):
            form = form.replace("SAID", "{postfix}" if postfix else ", {rate_noinv_fmt}")
            return tqdm.format_meter(n, total, elapsed, prefix=name, postfix=postfix,
                                     bar_format=form, **settings)
        if total is None:
            return line(ENDLESS) + ("\n" if bar_format else "")
        if bar_format:
            return line(bar_format)
        forms = (NARROW, NARROWEST) if ncols and ncols < WIDE_FROM else (WIDE, NARROW, NARROWEST)
        for form in forms:
            room = (ncols or 1000) - len(line(form, ""))
            if len(prefix) <= room:
                return line(form)
        return line(form, f"{prefix[:max(0, room - 1)]}…")


def progress(iterable=None, desc="", unit=" images", **settings):
    """A bar on a terminal; elsewhere a line every 30 s."""
    settings |= {"desc": desc, "unit": unit, "unit_scale": unit == "B"}
    if sys.stderr.isatty():
        return Bar(iterable, dynamic_ncols=True, mininterval=0.2, **settings)
    settings = {"delay": LINE_EVERY_S, **settings, "leave": False}
    return Bar(iterable, bar_format=LINE, mininterval=LINE_EVERY_S, maxinterval=60, **settings)


def tell(line):
    """A line for whoever watches, above the bar if there is one."""
    if sys.stderr.isatty():
        Bar.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
