"""A run folder: one run's files, whole or not there at all, for one process at a time.

    config.json               what is computed
    claim.json                who is at it: machine, process, job; the file's time is the heartbeat
    checkpoint.pt             the newest state, read back when it was written
    checkpoint-previous.pt    the one before
    metrics.csv               training, step by step
    log.txt                   start, restarts, end, and what ran it
    error.txt                 why the last attempt failed; the next one removes it
    tensorboard/              with --log tensorboard: the same, and samples, as events
    per_image.npy             bits/dim of each test image at the end, float32 (N,)
    done.json                 the result: written last, and all that says "finished"
"""
import contextlib
import datetime
import json
import os
import re
import traceback
from pathlib import Path

import numpy as np

from harness import distributed
from harness.checkpoint import (CHECKPOINT_FORMAT, CHECKPOINT_NAME, PREVIOUS_NAME, read_checkpoint,
                                save_checkpoint)
from harness.claim import Claim, is_dead, read_claim
from harness.errors import (BusyError, CheckpointError, TrainingError, one_line, printable,
                            short)
from harness.events import Events
from harness.files import (named_in_errors, open_regular, read_bytes, read_end, read_json,
                           write_atomically)
from harness.machine import outside_errors
from harness.progress import tell

CONFIG_NAME, DONE_NAME, ERROR_NAME = "config.json", "done.json", "error.txt"
LARGEST_ERROR = 1e-6  # of the mean of float32 values, against the number that was recorded
LOG_NAME, METRICS_NAME, PER_IMAGE_NAME = "log.txt", "metrics.csv", "per_image.npy"
MAX_METRICS_BYTES = 2 ** 28  # of more than 2 million steps
METRICS_COLUMNS = "step,images_seen,bits_per_dim,grad_norm,lr,seconds"


@contextlib.contextmanager
def opened(run_dir, config, place):
    """The RunFolder of a configuration (recipe.TrainConfig), for one process at a time.

    place: a harness.place.Place. An error within is left in the folder, by the process that saw it
    first. Raises TrainingError (its subclass BusyError: another process is at this run).
    """
    run = RunFolder(run_dir, config, place)
    try:
        distributed.from_first(run.begin, place.wait_s)
        try:
            with outside_errors():
                yield run
        except BusyError:
            raise
        except Exception as error:
            if distributed.rank() == 0:
                run.claim.check()  # or it is not our folder any more
            record_error(run.path, error)
            raise
    finally:
        with contextlib.suppress(OSError):  # a full disk
            if run.events:
                run.events.close()
        run.claim.release()


def read_finished(run_dir, config):
    """The done.json of a finished run of this configuration, or None, in all processes.

    Raises TrainingError for a folder, or a done.json, of another configuration.
    """
    def read():
        refuse_other_config(Path(run_dir), config)
        return read_done(run_dir, config)
    return distributed.from_first(read)


def has_checkpoint(run_dir):
    return any((Path(run_dir) / name).exists() for name in (CHECKPOINT_NAME, PREVIOUS_NAME))


class RunFolder:
    """A run folder that this process, and those that share the run with it, are at."""

    def __init__(self, path, config, place):
        self.path, self.config, self.claim = Path(path), config, Claim(path)
        self._log, self.events = RunLog(self.path, place.echo), None
        if place.log == "tensorboard":
            self.events = Events(self.path, METRICS_COLUMNS.split(","))

    def begin(self, wait_s):
        self.claim.take(wait_s)
        (self.path / ERROR_NAME).unlink(missing_ok=True)
        refuse_other_config(self.path, self.config)
        if not (self.path / CONFIG_NAME).exists():
            write_json(self.path / CONFIG_NAME, self.config.to_record())

    @property
    def log(self):
        """The RunLog, or None in all processes but the first."""
        return self._log if distributed.rank() == 0 else None

    def restore(self, names):
        """(path, content) of the newest whole checkpoint of this run, or (None, None).

        names: what it must hold. Raises CheckpointError, TrainingError (of another configuration).
        """
        path, saved = read_checkpoint(self.path, self._log.tell)
        if saved is None:
            return None, None
        if saved.get("format") != CHECKPOINT_FORMAT or not {"config", *names} <= saved.keys():
            raise CheckpointError(f"{path}: not a checkpoint of a run: move it away to begin again")
        refuse_changes(path, saved["config"], self.config)
        return path, saved

    def begin_steps(self, step):
        """Begin, or go on, after this step; by the first process."""
        last_row = self._log.begin(step, self.config.extends)
        if self.events:
            self.events.begin(step, self.config.to_record(), last_row)

    def save(self, content):
        """Write the newest checkpoint, and keep the one before; by the first process."""
        self.claim.check()
        if self.events:
            self.events.flush()
        save_checkpoint(self.path, {"config": self.config.to_record(), **content})

    def add_steps(self, rows):
        """Rows of metrics.csv."""
        if self.log:
            self.claim.check()
            self.log.add(rows)
            if self.events:
                self.events.add_steps(rows)

    def add_evaluation(self, rows, jet):
        """A line of the log for each row (harness.history reads it)."""
        if self.log:
            for row in rows:
                self.log.write(f"step {row['step']}: {row['bits_per_dim']:.4f} +- "
                               f"{row['bits_per_dim_se']:.4f} bits/dim on {row['num_images']:,} "
                               f"{row['split']} images")
            try:
                if self.events:
                    self.events.add_evaluation(rows, jet)
            except (ValueError, RuntimeError) as error:  # they overflow, or need too much memory
                self.log.write(f"no samples for TensorBoard: {one_line(error)}")

    def finish(self, done, per_image):
        """Write done.json, the result, and before it that of each image; by the first process."""
        self.claim.check()
        per_image = per_image.astype(np.float32)
        write_atomically(self.path / PER_IMAGE_NAME, lambda file: np.save(file, per_image))
        write_json(self.path / DONE_NAME, done)
        with contextlib.suppress(OSError):  # a full disk: the result is there
            self._log.write(f"finished: {done['bits_per_dim']:.4f} bits/dim on "
                            f"{done['num_images']} test images")
        return done


def write_json(path, values):
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def refuse_other_config(run_dir, config):
    """Refuse a run folder whose config.json is of another configuration."""
    path = run_dir / CONFIG_NAME
    if path.exists():
        try:
            stored = read_json(path)
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path}: damaged ({short(error)}): delete it, and the same "
                                "command goes on") from None
        refuse_changes(run_dir, stored, config)


def refuse_changes(where, record, config):
    """Raise TrainingError that names each field in which a stored config differs from this one."""
    try:
        changes = config.changes(record)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TrainingError(f"{where} belongs to another configuration, damaged or of another "
                            f"version ({one_line(error)}): use another run folder") from None
    if changes:
        hint = ""
        if any(change.startswith("total_steps ") for change in changes):
            hint = ("; a new run that begins where it ended (--init-from it --extend-to STEPS) "
                    "trains it further")
        raise TrainingError(f"{where} belongs to another configuration: {'; '.join(changes)}: use "
                            f"another run folder, or the same settings to resume{hint}")


# ---- what a run tells

def is_running(run_dir):
    """Whether a process is at a run now."""
    holder = read_claim(run_dir)
    return holder is not None and not is_dead(holder, run_dir)


def seconds_without_line(run_dir, now):
    """How long the process at a run has written no line of metrics.csv or log.txt.

    0 where there is none, or it has just begun. now: by the file server's clock (time_there).
    """
    written = []
    for name in (METRICS_NAME, LOG_NAME):
        with contextlib.suppress(OSError):
            written.append((Path(run_dir) / name).stat().st_mtime)
    if not written or read_claim(run_dir) is None:
        return 0.0
    return now - max(written)


def read_done(run_dir, config=None):
    """The content of a finished run's done.json, or None. config: the run's, where it is known.

    Raises TrainingError where it is damaged, holds what no run can have, or is another run's.
    """
    path = Path(run_dir) / DONE_NAME
    if not os.path.lexists(path):
        return None
    try:
        done = read_json(path)
        check_fields(done, DONE_FIELDS | {
            name: rule for name, rule in LATER_FIELDS.items() if name in done})
        if not done["train_seconds"] and done["config"].get("total_steps"):
            raise ValueError("its steps took no time")
        for row in done["rows"]:
            check_fields(row, ROW_FIELDS)
        if done["rows"][-1]["split"] != "test":
            raise ValueError("its last row is not of the test images")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TrainingError(f"{path}: damaged ({short(error)}): delete it, and the same command "
                            "evaluates again") from None
    if config is not None:
        refuse_changes(path, done["config"], config)
    return done


def read_per_image(run_dir, done):
    """Bits/dim of each test image of a finished run, float32 (N,); None of an older version's.

    done: of its done.json. Raises TrainingError where they are not the run's.
    """
    path = Path(run_dir) / PER_IMAGE_NAME
    if not os.path.lexists(path):
        return None
    try:
        os.close(open_regular(path, os.O_RDONLY))
        values = np.load(path, allow_pickle=False, mmap_mode="r")
        problem = misfit(values, done["bits_per_dim"], done["num_images"])
    except (OSError, ValueError, AttributeError, TypeError, EOFError) as error:
        problem = short(error)
    if problem:
        raise TrainingError(f"{path}: {problem}: delete it and {DONE_NAME}, and the same command "
                            "evaluates again")
    return np.array(values)


def misfit(values, bits_per_dim, num_images):
    """Why values cannot be those of a run with this mean over so many images, or ""."""
    if values.dtype != np.float32 or values.shape != (num_images,):
        return f"{values.dtype} {values.shape} for {num_images:,} images: must be float32"
    mean = values.mean(dtype=np.float64)
    if not abs(mean - bits_per_dim) < LARGEST_ERROR:
        return f"their mean is {mean:.7f}, and the run's {bits_per_dim:.7f}"
    return ""


def check_fields(values, fields):
    """Raise KeyError or ValueError for what is missing or no such value. fields: {name: rule}."""
    for name, rule in fields.items():
        is_undefined = name == "bits_per_dim_se" and values["num_images"] == 1
        if not (is_undefined or rule(values[name])):
            raise ValueError(f"{name} is {short(repr(values[name]))}")


def are_rows(rows):
    """Whether a checkpoint's list of evaluations is one."""
    try:
        for row in rows:
            check_fields(row, ROW_FIELDS)
    except (KeyError, TypeError, ValueError):
        return False
    return isinstance(rows, list)


def is_state(saved, total_steps):
    """Whether a checkpoint's plain values are ones that a run can have."""
    step, micro_batch, rows = saved["step"], saved["micro_batch"], saved["rows"]
    return (is_step(step) and step <= total_steps and are_rows(rows)
            and is_amount(saved["seconds"])
            and (micro_batch is None or is_count(micro_batch)))


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300


def is_amount(value):
    return is_number(value) and value >= 0


def is_count(value):
    return type(value) is int and 0 < value < 10 ** 13


def is_step(value):
    return type(value) is int and 0 <= value < 10 ** 13


def is_fingerprint(value):
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_text(value):
    return isinstance(value, str) and value.isprintable() and len(value) <= 4000


DONE_FIELDS = {
    "config": lambda value: isinstance(value, dict), "rows": lambda value: isinstance(value, list),
    "num_params": is_count, "test_fingerprint": is_fingerprint, "num_images": is_count,
    "train_fingerprint": is_fingerprint, "bits_per_dim": is_number, "bits_per_dim_se": is_amount,
    "train_seconds": is_amount, "device": lambda value: value in ("cpu", "cuda"),
    "git_commit": lambda value: re.fullmatch("[0-9a-f]{40,64}|", value) is not None,
    "hardware": is_text, "dataset": is_text, "variant": is_text}
LATER_FIELDS = {  # not in all of them
    "weights_sha256": is_fingerprint, "threads": is_count, "processes": is_count,
    "peak_memory_gib": lambda value: value is None or is_amount(value)}
ROW_FIELDS = {
    "split": lambda value: value in ("train", "test"), "step": is_step, "num_images": is_count,
    "bits_per_dim": is_number, "bits_per_dim_se": is_amount, "logdet_nats": is_number}


def record_error(run_dir, error):
    """Write why an attempt failed, a line and the traceback; what was written first stays."""
    if (Path(run_dir) / ERROR_NAME).exists():
        return
    line = one_line(error)
    with contextlib.suppress(OSError):  # a full disk
        text = "".join(traceback.format_exception(error))
        write_atomically(Path(run_dir) / ERROR_NAME, f"{line}\n\n{text}")
        RunLog(run_dir).write(f"failed: {line}")


def read_error(run_dir):
    """The line of error.txt, or None."""
    try:
        text = read_bytes(Path(run_dir) / ERROR_NAME).decode(errors="replace")
    except OSError:
        return None
    return printable(text.splitlines()[0]) if text else "unknown"


def read_progress(run_dir):
    """(step, bits/dim of that batch, seconds) of the last whole line of metrics.csv, or zeros."""
    try:
        lines = reversed(read_end(Path(run_dir) / METRICS_NAME, 4096).splitlines(keepends=True))
        step, _, bits, _, _, seconds = next(filter(_is_whole, lines)).split(",")
        step, bits, seconds = int(step), float(bits), float(seconds)
        if is_number(bits) and is_amount(seconds):
            return step, bits, seconds
    except (OSError, StopIteration, ValueError):
        pass
    return 0, 0.0, 0.0


def read_evaluated(run_dir):
    """"evaluated 1,024 of 10,000 test images" in the last line of log.txt, or "evaluating"."""
    with contextlib.suppress(OSError, IndexError):
        last = read_end(Path(run_dir) / LOG_NAME).splitlines()[-1]
        if (said := last.partition(" ")[2]).startswith("evaluated "):
            return printable(said, 400)
    return "evaluating"


def _is_whole(row):
    cells = row.split(",")
    has_all = len(cells) == len(METRICS_COLUMNS.split(","))
    return row.endswith("\n") and has_all and re.fullmatch("[0-9]{1,13}", cells[0]) is not None


class RunLog:
    """log.txt (what happened when) and metrics.csv (training, step by step) of a run folder."""

    def __init__(self, run_dir, echo=False):
        self.echo = echo
        self.log, self.metrics = Path(run_dir) / LOG_NAME, Path(run_dir) / METRICS_NAME

    def begin(self, step, start=0):
        """Drop the rows of metrics.csv that come again, after this step, and those a kill tore.

        start: the step after which the run began. Returns the cells of the last row, or None.
        """
        text = ""
        if os.path.lexists(self.metrics):
            text = read_bytes(self.metrics, MAX_METRICS_BYTES).decode(errors="replace")
        rows = text.splitlines(keepends=True)[1:]
        whole = [row for row in rows if _is_whole(row)]
        if len(whole) < len(rows):
            self.write(f"{METRICS_NAME}: {len(rows) - len(whole)} torn lines dropped")
        by_step = {int(row.split(",")[0]): row for row in whole}
        kept = [by_step[number] for number in sorted(by_step) if number <= step]
        if (missing := step - start - len(kept)) > 0:
            self.write(f"{METRICS_NAME}: {missing} of the lines up to step {step} are missing")
        write_atomically(self.metrics, "".join([METRICS_COLUMNS + "\n", *kept]))
        return kept[-1].split(",") if kept else None

    def write(self, message):
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        appending = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with named_in_errors(self.log), open(open_regular(self.log, appending), "ab+") as file:
            line = f"{now} {message}\n"
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # torn by a kill
                    line = "\n" + line
            file.write(line.encode())
        if self.echo:
            print(message, flush=True)

    def tell(self, message):
        """A line for the log and for whoever sits at the terminal."""
        self.write(message)
        if not self.echo:
            tell(message)

    def add(self, rows):
        """Rows of metrics.csv."""
        number = open_regular(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with named_in_errors(self.metrics), open(number, "a") as file:
            file.write("".join(",".join(map(str, row)) + "\n" for row in rows))
