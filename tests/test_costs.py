"""What the README says of cost is what the dry run and cost_table.py compute."""
import re

import pytest

from experiments import cost_table, sweep
from paper_figures import style
from test_experiments import COUNTS, experiment

README = (style.ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def printed():
    return cost_table.tables(style.ROOT / "results")


@pytest.fixture(scope="module")
def computed():
    return cost_table.hours_table(measured=[])  # as where no GPU was measured: the dry run knows none


def total(name, capsys, folder):
    """The GPU-hours that the dry run of an experiment tells at paper scale."""
    module = experiment(name)
    sweep.main(name, "", module.configs, tuple(module.configs("paper")[0].labels), None,
               ["--scale", "paper", "--dry-run", "--runs-dir", str(folder)])
    return re.search("^([0-9.,]+) GPU-hours in all: computed, .* in bfloat16$", capsys.readouterr().out, re.M)[1]


def cost_cell(name):
    """The last cell of an experiment's row in the README: seconds, minutes, FLOPs and GPU-hours at the four scales."""
    line, = [line for line in README.splitlines() if line.startswith("| ") and f" `{name}.py` |" in line]
    return line.split(" | ")[-1]


def test_figure_4_takes_1273_gpu_hours(capsys, tmp_path):
    assert total("ablate_coupling", capsys, tmp_path) == "1,273"


@pytest.mark.parametrize("name", COUNTS)
def test_dry_run_readme_and_cost_table_agree_on_the_hours_of_paper_scale(name, capsys, tmp_path, computed):
    hours = total(name, capsys, tmp_path)
    assert f" · {hours} GPU-h" in cost_cell(name)
    row, = [line for line in computed if f" (`{name}`) |" in line]
    assert row.split(" | ")[1] == str(COUNTS[name][-1]) and row.split(" | ")[3] == hours


@pytest.mark.parametrize("name", COUNTS)
def test_readme_tells_the_flops_of_medium_scale(name):
    flops = sum(sweep.train_flops(point.config) for point in experiment(name).configs("medium"))
    assert f" · {flops:.1e} FLOPs · " in cost_cell(name)


def test_the_tables_of_the_readme_are_those_that_cost_table_prints(printed):
    missing = [line for line in printed.splitlines() if line not in README.splitlines()]
    assert not missing, f"python experiments/cost_table.py prints {len(missing)} other lines: {missing[0]}"
    assert printed in README


def test_commands_of_the_readme_train_at_paper_scale_in_bfloat16():
    commands = re.findall(r"`(python train\.py [^`]*imagenet[^`]*)`", README)
    assert commands and all("--precision bfloat16" in command for command in commands)
