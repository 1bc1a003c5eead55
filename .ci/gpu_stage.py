"""What the stages of .ci/gpu share: a folder, a time, processes with a log, file sizes, a table."""
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILES, MAX_BYTES = 8, 16 * 2 ** 20
TABLE_LINES, TABLE_COLUMNS = 30, 80
CLOSING_S = 6  # kept for ending processes, packing and the table
CACHES = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "MPLCONFIGDIR": "matplotlib",
          "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton",
          "CUDA_CACHE_PATH": "cuda"}


class Stage:
    """A stage's folder, time and processes, and what it reports."""

    def __init__(self, flags, begun):
        self.name, self.out, self.device = flags.stage, flags.out.resolve(), flags.device
        self.begun, self.limit_s, self.stopped_by = begun, flags.seconds, None
        self.work, self.log = self.out / f".{self.name}_work", self.out / f"{self.name}_log.txt"
        self.context, self.seen = multiprocessing.get_context("fork"), {}
        self.parts, self.left_out, self.failed, self.more = [], [], [], {}  # more: for done.json
        self.rehearsal = self.device == "cpu"
        self.scale = getattr(flags, "scale", None) or "medium"

    @property
    def left_s(self):
        """Seconds in which parts may still run; 0 once it has to end."""
        end = self.begun + self.limit_s - min(CLOSING_S, self.limit_s / 4)
        return 0.0 if self.stopped_by else max(0.0, end - time.monotonic())

    def open(self):
        """Caches and temporary files go into a folder in OUT that is removed again."""
        shutil.rmtree(self.work, ignore_errors=True)
        for name, folder in CACHES.items():
            (self.work / folder).mkdir(parents=True)
            os.environ[name] = str(self.work / folder)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        os.environ.update({
            "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "JET_KERNELS": "torch",
            "GIT_OPTIONAL_LOCKS": "0", "JET_TEST_DEVICE": self.device,
            # so that processes can begin as copies of this one: no CUDA and no threads here
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OPENBLAS_NUM_THREADS": "1"})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, _):
        self.stopped_by = signal.Signals(number).name

    def files(self):
        """The stage's files in OUT."""
        mark = f"_{self.scale if self.name == 'medium' else self.name}.shard-"
        return sorted(path for path in self.out.iterdir() if path.is_file() and (
            path.name.startswith(f"{self.name}_") or mark in path.name))

    def empty(self):
        """Remove the files of this stage that are in OUT."""
        for path in self.files():
            path.unlink()

    def say(self, line):
        """A line for the terminal and the log."""
        print(line, flush=True)
        with open(self.log, "a") as file:
            file.write(f"== {line}\n")

    def start(self, module, function, *arguments):
        """A process that calls a function of a module, with its output in the log."""
        process = self.context.Process(target=call, args=(self.log, module, function, arguments))
        process.start()
        return process

    def look(self):
        """See what the device is; returns None, or a line on why the stage cannot begin.

        This process never uses it: so others can begin as its copies, which saves their imports.
        """
        connection, other_end = self.context.Pipe()
        process = self.start("gpu_stage", "tell_device", other_end, self.device)
        other_end.close()
        self.seen = {"error": f"{self.device} does not answer"}
        try:
            if connection.poll(self.left_s):
                self.seen = connection.recv()
        except EOFError:
            self.seen = {"error": f"{self.device} cannot be used: {self.log} says why"}
        end_process(process)
        return self.seen.pop("error", None)

    def part(self, name, least_s, module, function, *arguments):
        """Run a part in a process of its own, in the time left; returns whether it ended well."""
        if self.left_s < least_s or not self.left_s:
            self.leave_out(name, self.stopped_by or f"needs about {least_s} s, and "
                           f"{self.left_s:.0f} were left")
            return False
        self.say(f"{name} ...")
        begin, process = time.monotonic(), self.start(module, function, *arguments)
        while process.is_alive() and self.left_s:
            process.join(0.1)
        state, code = "ok", process.exitcode
        if code is None:
            state = "stopped"
            self.leave_out(name, f"not finished: {self.stopped_by or 'the time was up'}")
        elif code:
            state = "failed"
            self.failed.append(name)
        end_process(process)
        seconds = round(time.monotonic() - begin, 1)
        self.parts.append({"name": name, "state": state, "seconds": seconds, "exit": code})
        self.say(f"{name}: {state}, {seconds:.0f} s")
        return state == "ok"

    def leave_out(self, what, why, group=""):
        """group: of those that are one line of the table."""
        self.left_out.append({"what": what, "why": why, "group": group})

    def close(self, body):
        """Write done.json, remove the work folder, and print the table; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        fit_files(self)
        state, seconds = "failed" if self.failed else "ok", time.monotonic() - self.begun
        about = {**provenance(), "device": self.device, "hardware": self.seen["hardware"]}
        done = {"stage": self.name, "state": state, "rehearsal": self.rehearsal,
                "stopped_by": self.stopped_by, "seconds": round(seconds, 1),
                "limit_s": self.limit_s, **about, "parts": self.parts, "failed": self.failed,
                "left_out": self.left_out, **self.more}
        (self.out / f"{self.name}_done.json").write_text(json.dumps(done, indent=1) + "\n")
        clean(self)
        ended = f", ended by {self.stopped_by}" if self.stopped_by else ""
        counts = ", a rehearsal: no number of it counts" if self.rehearsal else ""
        head = [f"{self.name}: {state}, {seconds:.0f} of {self.limit_s} s{ended}{counts}",
                f"{about['hardware']}, torch {about['torch_version']}, commit "
                f"{about['git_commit'][:10] or 'unknown'}"
                f"{', with changes' if about['git_dirty'] else ''}"]
        print("\n".join(fit_table(head, body, self.failed, self.left_out)))
        return 1 if self.failed else 0


def tell_device(connection, device):
    """Send what the device is, or {"error": why it cannot be used}."""
    import torch

    from harness.machine import free_bytes, hardware, pick_device
    try:
        found = pick_device(device)
        torch.zeros(1, device=found).item()
        connection.send({"hardware": hardware(found), "free_gib": free_bytes(found) / 2 ** 30})
    except (RuntimeError, ValueError) as error:
        connection.send({"error": " ".join(str(error).split())[:300]})


def call(log, module, function, arguments):
    """In a process of its own group: the function, with all output in the log."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(getattr(importlib.import_module(module), function)(*arguments))


def end_process(process):
    """End a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive():
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # before it is a group of its own
                process.kill()
            process.join(1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has left


def clean(stage):
    """Leave no more than the stage's files."""
    for _ in range(20):
        shutil.rmtree(stage.work, ignore_errors=True)
        if not stage.work.exists():
            break
        time.sleep(0.1)  # a process that has just been ended still wrote
    with contextlib.suppress(OSError):
        if not stage.log.stat().st_size:
            stage.log.unlink()
        stage.out.rmdir()  # where nothing was written


def fit_files(stage):
    """Cut or remove what is too large; too many are a bug."""
    for path in stage.files():
        if path.stat().st_size <= MAX_BYTES:
            continue
        if path == stage.log:
            path.write_bytes(b"(the beginning is cut)\n" + path.read_bytes()[-MAX_BYTES // 2:])
        else:
            stage.leave_out(path.name, f"{path.stat().st_size:,} bytes are more than {MAX_BYTES:,}")
            path.unlink()
    if len(files := stage.files()) > MAX_FILES - 1:  # done.json is not there yet
        raise AssertionError(f"{len(files)} files: {files}")


def fit_table(head, body, failed, left_out):
    """The lines of the table, as many and as long as are allowed."""
    tail, groups = [f"failed: {what}" for what in failed], {}
    for item in left_out:
        groups.setdefault(item["group"] or item["what"], []).append(item)
    for group, (first, *more) in groups.items():
        what = f"{group}: {len(more) + 1} runs, the first" if more else f"{first['what']}:"
        tail.append(f"left out: {what} {first['why']}")
    room = TABLE_LINES - len(head)
    lines = body[:room - min(len(tail), 8)]
    if len(lines) < len(body):
        lines[-1] = f"... and {len(body) - len(lines) + 1} more lines: see the CSVs"
    room -= len(lines)
    if len(tail) > room:
        tail[room - 1:] = [f"... and {len(tail) - room + 1} more: see done.json"]
    return [line if len(line) <= TABLE_COLUMNS else line[:TABLE_COLUMNS - 3] + "..."
            for line in [*head, *lines, *tail]]


def provenance():
    """The versions of what ran it."""
    import torch

    from harness.host import code_version
    from harness.machine import versions
    return {**code_version(), **versions(), "cuda_version": torch.version.cuda}
