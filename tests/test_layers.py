"""Imports point down, from room to room, and never in a circle."""
import ast
import functools
import graphlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room: what it may import beside itself. A room is a module on top, a folder, or a module that is
# as low as no other of its folder. Only rooms that stand above it here can be behind it.
ROOMS = {
    "jet": "",
    "harness": "jet",
    "paper_figures.results_csv": "harness",
    "paper_figures.per_image": "harness paper_figures.results_csv",
    "paper_figures.inference": "",
    "paper_figures.style": "harness paper_figures.results_csv",
    "paper_figures.training": "harness paper_figures.style",
    "kernels": "jet harness",
    "images": "jet harness",
    "data": "jet harness images",
    "formats": "jet harness",
    "convert": "jet harness kernels formats",
    "coding": "jet harness kernels data formats convert",
    "evaluate": "jet harness kernels data formats convert",
    "codec": "jet harness kernels data formats convert coding",
    "recipe": "jet harness data",
    "train": "jet harness kernels data formats convert evaluate recipe",
    "sweeps": "jet harness kernels data formats convert evaluate recipe train "
              "paper_figures.results_csv paper_figures.per_image paper_figures.inference paper_figures.training",
    "audit": "jet harness kernels data formats convert coding evaluate codec recipe train sweeps "
             "paper_figures.per_image paper_figures.inference",
    "paper_figures": "jet harness data paper_figures.results_csv paper_figures.per_image paper_figures.inference "
                     "paper_figures.style paper_figures.training",
    "experiments": "*", ".ci": "*", "assets": "*",
}


def find_sources():
    """{module: its text} of all Python files of the project but the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if "jet.py" not in listed:
        pytest.skip("no git checkout: which files are the project's is not known")
    files = [Path(name) for name in listed if not name.startswith("tests/")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"):
            (ROOT / file).read_text() for file in files if (ROOT / file).is_file()}


def import_graph(sources):
    """{module: the modules of these that it imports, at its top or in a function}."""
    graph = {}
    for module, text in sources.items():
        names = {name for node in statements(ast.parse(text)) for name in imported(node, module)}
        graph[module] = {name for name in names if name in sources and name != module}
    return graph


def statements(node):
    """The statements of a module, and those within them; no expression holds any."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield child
            yield from statements(child)


def imported(node, module):
    """The full names that an import statement may be of: modules, or what stands in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = [node.module] if node.module else []
    if node.level:  # relative
        base = module.split(".")[:-node.level] + base
    return [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]


def room_of(module):
    parts = module.removeprefix(".").split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    found = [name for name in names if name in ROOMS]
    return ".ci" if module.startswith(".ci.") else next(iter(found), None)


def wrong_arrows(graph):
    """A line for each import that its room may not make, and for each module of no room."""
    lines = [f"{module} is in no room: add it to ROOMS" for module in graph if not room_of(module)]
    for module, targets in graph.items():
        room, allowed = room_of(module), ROOMS.get(room_of(module), "*")
        lines += [f"{module} imports {target}: {room} may import {allowed or 'nothing of ours'}"
                  for target in sorted(targets)
                  if allowed != "*" and room_of(target) not in (room, *allowed.split())]
    return lines


def find_circle(graph):
    """The modules of a circle of imports, "a -> b -> a", or None."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return None


@functools.cache
def our_graph():
    return import_graph(find_sources())


def test_imports_point_down():
    lines = wrong_arrows(our_graph())
    assert not lines, "\n".join(lines)


def test_no_imports_are_a_circle():
    assert find_circle(our_graph()) is None


def test_the_rooms_are_layers():
    rooms = list(ROOMS)
    for room, allowed in ROOMS.items():
        below = rooms[:rooms.index(room)]
        assert allowed == "*" or set(allowed.split()) <= set(below), room


MODULES = ["jet", "harness.flags", "harness.files", "kernels", "kernels.functions", "data", "train",
           "sweeps.sweep", "paper_figures.results_csv", "paper_figures.style"]


def lines_with(module, text):
    """wrong_arrows of a project without any, in which a module has this text."""
    return wrong_arrows(import_graph(dict.fromkeys(MODULES, "import torch") | {module: text}))


@pytest.mark.parametrize("module, text, line", [
    ("jet", "import harness.flags", "jet imports harness.flags: jet may import nothing of ours"),
    ("harness.flags", "def f():\n    from train import train", "harness.flags imports train: harness may import jet"),
    ("harness.flags", "from .. import data", "harness.flags imports data: "),
    ("sweeps.sweep", "from paper_figures.style import x",
     "sweeps.sweep imports paper_figures.style: sweeps may import jet"),
    ("paper_figures.results_csv", "from paper_figures import style",
     "paper_figures.results_csv imports paper_figures.style: "),
    ("other", "", "other is in no room"), ("harnessed", "", "harnessed is in no room")])
def test_an_arrow_up_is_found_and_named(module, text, line):
    assert [found[:len(line)] for found in lines_with(module, text)] == [line]


@pytest.mark.parametrize("module, text", [
    ("harness.flags", "from . import files\nfrom .files import data\nimport jet as data"),
    ("kernels", "from kernels import functions"),
    ("sweeps.sweep", "from paper_figures import results_csv"),
    ("experiments.one", "import train, sweeps.sweep, paper_figures.style"),
    (".ci.gpu", "import train")])
def test_arrows_down_and_within_a_room_are_allowed(module, text):
    assert lines_with(module, text) == []


def test_a_circle_is_found_and_named():
    sources = {"a": "import b", "b": "def f():\n    from room import c",
               "room.c": "from a import x", "d": "import a"}
    assert find_circle(import_graph(sources)) in (
        "a -> b -> room.c -> a", "b -> room.c -> a -> b", "room.c -> a -> b -> room.c")
    assert find_circle(import_graph(sources | {"room.c": ""})) is None
