"""What a terminal shows of long work."""
import io
import subprocess
import sys
from pathlib import Path

import pytest

from harness import missing
from harness.advice import advice
from harness.host import ROOT
from harness.progress import LINE, Bar, progress
from recipe import TrainConfig
from sweeps.watch import Speed, Status, finished



@pytest.fixture
def config():
    return TrainConfig(data="cifar10-subset", batch_size=8, total_steps=100)


def bar(columns, name, said="5.913 bits/dim, 438 images/s"):
    return Bar.format_meter(1200, 250_224, 3600.0, columns, prefix=name, postfix=said, unit=" steps")


@pytest.mark.parametrize("name", ["cifar10", "cifar10-subset-vehicles", "a name that is longer than all lines are " * 3])
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_every_bar_shows_steps_bits_speed_and_time_left(columns, name):
    line = bar(columns, name)
    assert len(line) <= columns
    for part in ("1200/250224 steps", "5.913 bits/dim", "438 images/s", "207:31:12 left"):
        assert part in line
    assert name in line or name[:5] in line and "…" in line and len(line) == columns


def test_without_a_postfix_the_rate_is_shown():
    assert "12.00 images/s" in Bar.format_meter(120, 1000, 10.0, 80, prefix="evaluate", unit=" images", rate=12.0)


def test_without_a_terminal_short_work_says_nothing_and_a_line_is_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with progress(total=3, desc="evaluate") as bar:
        for count in range(3):
            bar.say(f"{count} said", count + 1)
    assert shown.getvalue() == ""
    with progress(total=9, desc="evaluate", delay=0) as bar:
        bar.display()
    assert set(shown.getvalue().split("\n")) <= {"evaluate: 0 of 9 images, ? images/s, ? left", "", "\r"}
    assert shown.getvalue().startswith("evaluate")
    line = Bar.format_meter(3, 10, 1.0, prefix="evaluate", unit=" images", bar_format=LINE)
    assert line == "evaluate: 3 of 10 images,  3.00 images/s, 00:02 left\n"
    line = Bar.format_meter(3, None, 1.0, prefix="list", unit=" files", bar_format=LINE)
    assert line == "list: 3 files,  3.00 files/s [00:01]\n"


def test_time_left_is_that_of_the_whole_grid_by_the_cost_of_its_runs(config):
    class run:
        def __init__(self, batch_size):
            self.config = TrainConfig.from_dict({**config.to_dict(), "batch_size": batch_size})
    speed = Speed([run(8), run(32)])  # the second costs four times the first
    speed.look([Status(state="running", step=0), Status(state="new")], now=0.0)
    assert speed.left() == "?"
    speed.look([Status(state="running", step=50, bits_per_dim="5.910 (batch)"), Status(state="new")], now=10.0)
    assert speed.left() == "01:30"  # half a run took 10 s: 4.5 are left
    assert speed.text([Status(state="running", step=50, bits_per_dim="5.910 (batch)"), Status(state="new")]) == \
        "5.91 bits/dim, 40 images/s"


def test_a_grid_is_counted_in_runs():
    found = [Status(state=state) for state in ("done", "failed", "running", "new")]
    assert finished(found) == "1/4 runs, 1 failed"


def test_a_batch_above_the_set_is_said(config):
    import torch
    line, = advice(config, torch.device("cuda"), config.batch_size - 1)
    assert f"batch_size {config.batch_size}" in line
    assert advice(config, torch.device("cuda"), config.batch_size) == []


COMMANDS = ["train.py", "evaluate.py", "codec.py", "data.py", *(f"experiments/{path.name}" for path in sorted(
    (ROOT / "experiments").glob("*.py")) if "__main__" in path.read_text()),
    *(f"paper_figures/{path.name}" for path in sorted((ROOT / "paper_figures").glob("*.py")) if "__main__" in path.read_text())]


EACH = """import os, runpy, sys
_, root, *commands = sys.argv
path = sys.path[1:]
for command in commands:
    for name in [name for name, module in sys.modules.items() if root in str(module)]:
        del sys.modules[name]  # one of ours
    sys.argv, sys.path = [command, "--help"], [os.path.dirname(command), *path]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as end:
        print(end)"""


def test_what_is_not_installed_is_one_line():
    command = [sys.executable, "-S", "-c", EACH, ROOT, *(ROOT / command for command in COMMANDS)]  # -S: without site-packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == len(COMMANDS)
    for line, command in zip(done.stdout.splitlines(), COMMANDS):
        assert line.startswith(f"{Path(command).name}: error: torch, numpy") and "activate the environment" in line


def test_a_system_without_file_locks_is_named():
    assert "Linux, macOS or WSL" in missing(has=lambda name: name != "fcntl")
    assert missing(has=lambda name: True) == ""
