"""Command lines: a flag for each setting of a dataclass, and errors of one line."""
import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import select
import signal
import sys

from harness.errors import UserError, one_line, printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **settings)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        flags = [flag.strip("-") for flag in self._option_string_actions]
        near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else ()
        hint = f"did you mean --{near[0]}?" if near else "--help shows what is allowed"
        self.exit(2, f"{self.prog}: error: {printable(message)} ({hint})\n")


def add_setting_flags(parser, settings_class, prefix="", dashes=False):
    """A flag for each setting of a dataclass, like --batch_size 64 or --model.num_couplings 8.

    dashes: --micro-batch for micro_batch.
    """
    for field in dataclasses.fields(settings_class):
        if not field.metadata:
            continue
        default, choices = field.default, field.metadata["choices"]
        first = default[0] if isinstance(default, tuple) else default
        kind = field.metadata["kind"] or type(first)
        help = field.metadata["help"].replace("%", "%%")
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            help += f" (default: {shown})"
        options = {"help": help, "dest": prefix + field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices}
        if not choices and kind is not bool:
            options["metavar"] = kind.__name__.upper()
        if isinstance(default, tuple):
            options["nargs"] = "+"
        name = field.name.replace("_", "-") if dashes else field.name
        parser.add_argument(f"--{prefix}{name}", **options)


def model_fields(flags):
    """The fields of JetConfig among parsed flags."""
    model = {name.removeprefix("model."): value for name, value in flags.items()
             if name.startswith("model.")}
    if len(size := model.get("image_size", ())) == 1:
        model["image_size"] = size[0]
    return model


def is_read(number):
    """Whether what is written to an open file, like 1, the output, still has a reader."""
    poll = select.poll()
    poll.register(number, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def one_line_errors(program, code=1):
    """End the program in one line, with no traceback, for what is not a bug. code: its exit code.
    """
    def end(message):
        if code == 1:
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(code)

    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not is_read(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + signal.SIGPIPE)  # as programs end whose reader, like head, has enough
        end(f"{program}: error: {printable(one_line(error))}")
    except UserError as error:
        if getattr(error, "is_shown_elsewhere", False):  # by another process
            sys.exit(code)
        end(f"{program}: error: {printable(error)}")
    except OSError as error:
        end(f"{program}: error: {printable(one_line(error))}: fix it, and the same command goes on")
    except KeyboardInterrupt:
        print(f"{program}: interrupted: the same command goes on from the run's last checkpoint, "
              "or from its start where there is none yet", file=sys.stderr)
        sys.exit(130)
