"""What ends a program in one line: a user's mistake, a damaged file, a full disk; never our bug."""
import re
import textwrap


class UserError(Exception):
    """An error whose message says in one line what was given, what is allowed and what to do."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot start, go on or be saved."""


class BusyError(TrainingError):
    """Another process is at this run."""


class CheckpointError(UserError, ValueError):
    """A weight file that cannot be read or does not fit."""


class DataError(UserError, ValueError):
    """An image set that is missing, damaged or not what was asked for."""


class ClusterError(UserError, RuntimeError):
    """What a cluster cannot do, or is not to."""


class NonFiniteError(TrainingError, ValueError):
    """A loss, a gradient or a measured number that is not finite: the run's own fault."""


def printable(text, max_length=2000):
    """A text from elsewhere for a terminal: one line, no control characters, not endless."""
    text = "".join(letter if letter.isprintable() else "?"
                   for letter in re.sub(r"[\t\n\r]+", " ", str(text)))
    if len(text) > max_length:
        text = f"{text[:max_length - 200]} ... {text[-195:]}"
    return text


def one_line(error):
    """What to tell of an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    line = " ".join(str(error).split())
    says_all = isinstance(error, (UserError, ValueError))
    return line if says_all else f"{type(error).__name__}: {line}"


def short(error):
    """The kind of an error and the beginning of what it says."""
    text = printable(f"{type(error).__name__}: {error}").rstrip(": ")
    return textwrap.shorten(text, 250, placeholder=" ...")
