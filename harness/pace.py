"""When a training loop reads losses, saves and stops: agreed on by all processes."""
import contextlib
import time

from harness import distributed
from harness.signals import Stopped

EVALUATION_LINE_S = 15  # between lines in log.txt on a long evaluation


class Pace:
    """Answers read? save? stop? after each step.

    By the clocks and signals of all processes: they must part from the loop together. Reading waits
    for the device, so not every step is read: it must never be idle.
    signals: harness/signals.py. checkpoint_every_s: None is a minute, or 20 times what the last
    checkpoint took, if that is more.
    """

    def __init__(self, signals, checkpoint_every_s):
        self.signals, self.every_s = signals, checkpoint_every_s
        self.save_seconds = 0.0
        self.read_at = self.saved_at = time.monotonic()
        self.read = self.save = self.stop = False

    def decide(self, taken, must_read, must_save):
        """Set read, save and stop for the state after this many steps."""
        now = time.monotonic()
        every_s = max(60, 20 * self.save_seconds) if self.every_s is None else self.every_s
        wants_save = self.signals.save or now - self.saved_at > every_s
        wants_read = now - self.read_at > 1
        self.stop, save, read = distributed.agree(self.signals.stop, wants_save, wants_read)
        self.save = save or self.stop or must_save
        self.read = self.save or read or must_read or taken % 10 == 0

    def has_read(self):
        """The time now, when the losses have been read."""
        self.read_at = time.monotonic()
        return self.read_at

    def saved(self, save, log, step):
        """Call save, and remember when it was and how long it took."""
        save()
        if log and self.signals.save:
            log.write(f"saved at step {step}: a signal came")
        self.signals.save = False
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - self.read_at

    def evaluated(self, log, bar, images, count):
        """Tell how many of the images are evaluated; raise Stopped where a signal asks to stop."""
        if distributed.agree(self.signals.stop)[0]:
            raise Stopped
        bar.say(line := f"evaluated {count:,} of {images}")
        now = time.monotonic()
        if not count:  # it begins: the training before does not count
            self.told_at = now
        if log and now - self.told_at > EVALUATION_LINE_S:
            log.write(line)
            self.told_at = now

    def clock(self, seconds_before):
        """A Clock that begins when this Pace does."""
        return Clock(seconds_before, self.saved_at)


class Clock:
    """Seconds of training, over all attempts at a run; evaluations do not count."""

    def __init__(self, seconds_before, begun):
        self.before, self.begun = seconds_before, begun

    def here(self, now):
        """Of this attempt."""
        return now - self.begun

    def total(self, now):
        return self.before + self.here(now)

    @contextlib.contextmanager
    def paused(self):
        stopped = time.monotonic()
        yield
        self.begun += time.monotonic() - stopped
