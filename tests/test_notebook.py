"""The notebook runs from top to bottom, and its committed outputs are those of the code as it is."""
import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks/jet_in_ten_minutes.ipynb"
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
LIMIT_S = 180  # of one CPU: where others compute, too, it takes longer


def code_cells(content):
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    """What a cell has printed, in one line."""
    texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
    return " ".join("".join(texts).split())


@pytest.fixture(scope="module")
def committed():
    return json.loads(NOTEBOOK.read_text())


def test_its_outputs_are_there_in_order_and_small(committed):
    assert NOTEBOOK.stat().st_size < 1e6
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [{output["output_type"] for output in cell["outputs"]} for cell in cells]
    assert not kinds[0] and all(kinds[2:]) and "error" not in set().union(*kinds)
    assert all(output.get("name") != "stderr" for cell in cells for output in cell["outputs"])
    assert str(Path.home()) not in NOTEBOOK.read_text() and "/tmp/" not in NOTEBOOK.read_text()


def test_its_links_lead_somewhere(committed):
    text = "".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 5
    for link in links:
        assert link.startswith("https://") or (NOTEBOOK.parent / link).exists(), link


@pytest.mark.notebook
def test_it_runs_from_top_to_bottom_and_prints_what_is_committed(committed):
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install nbclient ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    before = os.times()
    nbclient.NotebookClient(notebook, timeout=10 * LIMIT_S, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    after = os.times()  # of the kernel, and of what it has started
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert 5 < used < LIMIT_S
    *cells, audit = code_cells(notebook)
    *cells_before, audit_before = code_cells(committed)
    for cell, old in zip(cells, cells_before):
        now, then = printed(cell), printed(old)
        assert NUMBER.sub("#", now) == NUMBER.sub("#", then)
        assert [*map(float, NUMBER.findall(now))] == pytest.approx([*map(float, NUMBER.findall(then))], abs=0.011)
    assert printed(audit).split(" … ")[-1] == printed(audit_before).split(" … ")[-1]  # its choices are random
