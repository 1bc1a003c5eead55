"""Signals from the keyboard, the system or a cluster, as what they ask of a run."""
import contextlib
import os
import signal
import sys


class Signals:
    """What signals ask of a run: to stop after this step with a checkpoint, or to save one."""

    def __init__(self, quiet=False):
        self.stop = self.save = False
        self.quiet, self.exit_code = quiet, 1

    def end_program(self, line):
        """Say a line, if there is one, and exit."""
        if line:
            print(line, file=sys.stderr)
        sys.exit(self.exit_code)

    @contextlib.contextmanager
    def on(self, stop=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), save=()):
        """Within, these signals ask; a second interrupt from the keyboard ends it at once.

        SIGHUP comes from a terminal that is closed; nohup has it ignored, and so it stays.
        """
        def handle(number, _):
            if number == signal.SIGINT and self.stop:
                raise KeyboardInterrupt
            if number in stop and not (self.stop or self.quiet):
                name = signal.Signals(number).name  # not print: it may be what was interrupted
                with contextlib.suppress(OSError):  # a terminal that is gone
                    os.write(2, f"\n{name}: stopping with a checkpoint after this step\n".encode())
            if number in stop and not self.stop:
                self.stop = True
                if number == signal.SIGINT:
                    self.exit_code = 130  # as all programs end that the keyboard interrupts
            self.save = self.save or number in save
        before = {number: signal.signal(number, handle) for number in (*stop, *save)
                  if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Stopped(Exception):
    """A request to stop came during an evaluation, which is done again."""
