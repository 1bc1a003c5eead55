"""What README.md and docs/cost.md say of cost is what the dry run and cost_table.py compute."""
import re

import pytest

from experiments import cost_table
from harness.flops import train_flops
from harness.host import ROOT
from jet import JetConfig
from sweeps import sweep
from sweeps.grid import make_runs

README = (ROOT / "README.md").read_text()
EXPERIMENTS = {experiment.name: experiment for experiment in cost_table.paper_experiments().values()}


@pytest.fixture(scope="module")
def computed():
    return cost_table.hours_table().splitlines()


def total(name, capsys, folder):
    """The GPU-hours that the dry run of an experiment prints for paper scale."""
    sweep.main(EXPERIMENTS[name], ["--scale", "paper", "--dry-run", "--runs-dir", str(folder)])
    return re.search("([0-9.,]+) GPU-hours in all: computed, [^;]* in\\sbfloat16", capsys.readouterr().out)[1]


def cost_cell(name):
    """The last cell of an experiment's row in the README: its costs at the four scales."""
    line, = [line for line in README.splitlines() if line.startswith("| ") and f" `{name}.py` |" in line]
    return line.split(" | ")[-1]


def test_every_item_of_the_paper_is_compared():
    assert set(EXPERIMENTS) == {"ablate_coupling", "compare_vit_cnn", "ablate_block_depth", "scaling", "ablate_splits",
                                "ablate_layers", "main_results", "draw_samples"}


def test_figure_4_takes_1273_gpu_hours(capsys, tmp_path):
    assert total("ablate_coupling", capsys, tmp_path) == "1,273"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_dry_run_readme_and_cost_table_agree_on_the_hours_of_paper_scale(name, capsys, tmp_path, computed):
    hours = total(name, capsys, tmp_path)
    assert f" {hours} GPU-h" in f" {cost_cell(name)}"
    row, = [line for line in computed if f" (`{name}`) |" in line]
    number = len(make_runs(EXPERIMENTS[name], "paper", [0], tmp_path))
    assert row.split(" | ")[1] == str(number) and row.split(" | ")[3] == hours


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_readme_has_the_flops_of_medium_scale_where_it_names_them(name, tmp_path):
    flops = sum(train_flops(run.config) for run in make_runs(EXPERIMENTS[name], "medium", [0], tmp_path))
    named = re.findall(r"(\S+) FLOPs", cost_cell(name))
    assert named in ([], [f"{flops:.1e}"])


def test_the_page_of_costs_is_what_cost_table_prints(monkeypatch):
    """All of it but for the memory of some sizes and of one precision, which take a while to count."""
    names = ("S", *cost_table.PAPER_SIZES)
    counted = [(JetConfig(**cost_table.SIZES[name]), "bfloat16") for name in names]

    def lines(page):
        other = rf"^(\| (?!({'|'.join(names)}) \| b)\S+ \| b?float\d\d \| \w+ \|)( [^|]* \|){{4}}"
        return [re.sub(other, r"\1", line) for line in page.splitlines()]
    monkeypatch.setattr(cost_table, "coupling_bytes", lambda *case, real=cost_table.coupling_bytes: (
        real(*case) if case in counted else 1.0))
    wanted, page = (ROOT / "docs/cost.md").read_text(), cost_table.page(ROOT / "results")
    assert lines(wanted) == lines(page), "python experiments/cost_table.py > docs/cost.md"


def test_hours_elsewhere_in_the_docs_are_those_of_the_dry_run(capsys, tmp_path):
    """"N GPU-h" and "N GPU-hours" of an experiment that the same line names."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in page.read_text().splitlines() if "GPU-h" in line]
    for name in EXPERIMENTS:
        named = {hours for line in lines if f"`{name}.py`" in line or f"experiments/{name}.py" in line
                 for hours in re.findall(r"([0-9.,]*[0-9]) GPU-h", line)}
        assert named <= {total(name, capsys, tmp_path)}, name


def test_commands_that_train_at_paper_scale_do_it_in_bfloat16():
    pages = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
    commands = [command for page in pages for command in re.findall(r"(train\.py [^`\n]*imagenet[^`\n]*)", page)]
    assert commands and all("--precision bfloat16" in command for command in commands)
