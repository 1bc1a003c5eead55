"""The stages tests and speed of .ci/gpu."""
import collections
import gzip
import importlib.util
import json
import shutil

from gpu_stage import MAX_BYTES, ROOT


class Recorder:
    """A pytest plugin that writes a line of JSON when a test begins, and one when it has ended."""

    def __init__(self, path):
        self.path = path

    def _write(self, **changes):
        self.row |= changes
        with open(self.path, "a") as file:
            file.write(json.dumps(self.row) + "\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.row, self.outcome = {"test": nodeid, "seconds": 0.0, "why": ""}, "passed"
        self._write(outcome="not finished")

    def pytest_runtest_logreport(self, report):
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 3)
        if report.outcome != "passed" and self.outcome == "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = getattr(crash, "message", report.longreprtext)
            if report.skipped:
                why = report.longrepr[2]
            self.outcome = report.outcome
            self.row["why"] = " ".join(why.split()).removeprefix("Skipped: ")[:300]
        if report.when == "teardown":
            self._write(outcome=self.outcome)


def run_pytest(record, basetemp):
    import pytest
    arguments = ["-c", f"{ROOT}/pytest.ini", f"--rootdir={ROOT}", f"--basetemp={basetemp}",
                 "-o", "addopts=-q",  # in one process: there is one GPU
                 "-p", "no:cacheprovider", "-m", "gpu", "-rs", f"{ROOT}/tests/test_gpu.py"]
    return int(pytest.main(arguments, plugins=[Recorder(record)]))


def read_lines(path):
    """What the lines of a file hold, each as JSON."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def read_records(path):
    """A row for each test, as it was written last."""
    return list({row["test"]: row for row in read_lines(path)}.values())


def run_tests(stage, flags):
    """The stage tests; returns the body of its table."""
    import pandas as pd
    record = stage.work / "tests.jsonl"
    ended = stage.part("tests", 5, "gpu_checks", "run_pytest", record, stage.work / "pytest")
    rows = read_records(record)
    counts = {name: sum(row["outcome"] == name for row in rows)
              for name in ("passed", "failed", "skipped", "not finished")}
    if not (ended and counts["passed"]) and not stage.failed:
        stage.failed.append("tests: not all of them ran" if rows else "tests: none ran")
    stage.more["tests"] = counts
    table = pd.DataFrame(rows, columns=["test", "outcome", "seconds", "why"])
    table.to_csv(stage.out / "tests_results.csv", index=False, lineterminator="\n")
    return tests_table(rows, counts)


def tests_table(rows, counts):
    """Counts, what has failed, why some were skipped, and the slowest."""
    rows = [row | {"name": row["test"].partition("::")[2]} for row in rows]
    skipped = collections.Counter(row["why"] for row in rows if row["outcome"] == "skipped")
    return [", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
            *("{outcome}: {name}: {why}".format(**row) for row in rows
              if row["outcome"] in ("failed", "not finished")),
            *(f"{count} skipped: {why}" for why, count in skipped.items()),
            *("{seconds:6.1f} s {name}".format(**row)
              for row in sorted(rows, key=lambda row: -row["seconds"])[:5])]


def speed_parts(device, port, free_gib=0):
    """[(name, least seconds, flags of throughput.py)], in order of worth; a compile takes 30 s."""
    if device == "cpu":
        tiny = ["--sizes", "S", "--batch-size", "4", "--steps", "2", "--threads", "1"]
        return [(name, 1, [*tiny, *flags]) for name, flags in (
            ("training", ["--what", "train"]), ("trace", ["--profile"]),
            ("modes", ["--what", "train", "--modes", "eager"]),
            ("rounding", ["--check-precision", "8"]), ("evaluation", ["--evaluate", "8"]),
            ("likelihood and sampling", ["--what", "likelihood", "sampling"]))]
    large = ["--sizes", "32x2", "--precision", "bfloat16"]
    both = [*large, "--what", "train", "--compile", "--graph"]  # the fastest mode
    # a step of 128 images takes 42 GiB, and as much beside the port's
    pair, most = ("128", "256") if free_gib >= 120 else ("64", "128")
    against = [*both, "--batch-size", pair, "--against", "jet-pytorch"]
    alone = [*both, "--batch-size", most]
    modes = ["--modes", "eager", "graph", "both", "--steps", "20"]  # compile alone gains little
    return [*([("32x2 both, jet-pytorch", 60, against)] if port else ()),
            ("32x2 both", 45, alone),
            *((f"{size} modes", 45, ["--sizes", size, *modes]) for size in ("M", "S", "medium")),
            ("32x2 trace", 30, [*alone, "--profile", "--steps", "3"]),
            ("32x2 rounding", 10, [*large, "--check-precision"]),
            ("32x2 evaluation of 49,999 images", 20, [*large, "--evaluate", "49999"]),
            ("32x2 likelihood, sampling", 20, [*large, "--what", "likelihood", "sampling"])]


def run_speed(stage, flags):
    """The stage speed; returns the body of its table."""
    numbers = stage.work / "numbers.jsonl"
    places = ["--device", stage.device, "--no-figure", "--numbers", str(numbers)]
    places += [f"--{name}-dir={stage.work / name}" for name in ("runs", "results", "figures")]
    port = importlib.util.find_spec("jet_pytorch") is not None
    for name, least_s, flags in speed_parts(stage.device, port, stage.seen["free_gib"]):
        stage.part(name, least_s, "experiments.throughput", "main", [*flags, *places])
    for path in stage.work.glob("results/throughput_*.csv"):
        shutil.copyfile(path, stage.out / f"speed_{path.name}")
    for path in stage.work.glob("runs/throughput_profile/*.json.gz"):
        shrink_trace(path)
        shutil.copyfile(path, stage.out / f"speed_trace_{path.name}")
    stage.more |= {"numbers": read_lines(numbers), "jet_pytorch": port}
    if not any(part["state"] == "ok" for part in stage.parts) and not stage.failed:
        stage.failed.append("speed: nothing was measured")
    alone = [] if port or stage.rehearsal else ["jet-pytorch is not installed: 32x2 is alone"]
    return [*alone, *speed_rows(stage.out), *map(number_line, stage.more["numbers"])]


def speed_rows(out):
    import pandas as pd

    from experiments.throughput_cases import table_of
    looks = {"batch_size": ("batch", "{}"), "images_per_s": ("images/s", "{:,.1f}"),
             "peak_share": ("of peak", "{:.1%}"), "ratio": ("ratio", "{:.2f}"),
             "startup_seconds": ("start s", "{:.1f}")}
    return [line for path in sorted(out.glob("speed_throughput_*.csv"))
            for line in table_of(pd.read_csv(path), looks).splitlines()]


def number_line(numbers):
    """A line for what throughput.py measures beside its CSV."""
    lines = {
        "evaluate": "{size}: bits/dim of {num_images:,} images in {seconds:.1f} s",
        "check-precision": "bfloat16 against float32: {mean_difference:+.6f} bits/dim in the mean "
                           "of {num_images:,} images",
        "profile": "{size} {work}, traced: {step_seconds:.4f} s a step"}
    busy = ", the GPU busy {busy_share:.1%} of it" if "busy_share" in numbers else ""
    return (lines[numbers["what"]] + busy).format(**numbers)


def shrink_trace(path):
    """Where a trace is too large, keep what happens on the GPU, and who started it."""
    if path.stat().st_size <= MAX_BYTES:
        return
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    kept = {"kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver"}
    trace["traceEvents"] = [event for event in trace["traceEvents"]
                            if event.get("ph") == "M" or event.get("cat") in kept]
    with gzip.open(path, "wt") as file:
        json.dump(trace, file)
