"""The pages: README within its bounds, links that lead somewhere, and commands that exist."""
import ast
import functools
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"DIR", "WEIGHTS", "PHOTOS", "DOWNLOADS", "ILSVRC2012", "OUT", "NAME", "SCALE", "FILE.py", "…"}
MADE = ("runs/", "sets/", "out/")  # by the commands themselves, and ignored by git
EXAMPLE = "experiments/ablate_scale.py"  # docs/changing.md makes it
IN_ROOT = ("assets", "audit", "codec.py", "coding", "convert.py", "data.py", "docs", "evaluate.py", "experiments",
           "formats", "harness", "images", "jet.py", "kernels", "paper_figures", "recipe.py", "results", "sweeps", "tests", "train.py")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page):
    """[(language, lines)] of a page's fenced code."""
    return [(language, body.splitlines()) for language, body in
            re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)]


def commands(page):
    """The command lines of a page: those of its blocks, and those that stand in the text."""
    lines = [line.removeprefix("$ ") for language, lines in blocks(page) for line in lines
             if language in ("", "bash") and re.match(r"(\$ )?(python3?|bash|torchrun|pip|\. )", line)]
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun|bash) [^`]+)`", text)]
    return [part.strip() for line in lines for part in line.split("&&")]


def scripts(page):
    """[(script, its arguments)] of the commands of a page that run one of ours."""
    found = []
    for command in commands(page):
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py")), None)
        if words[0] in ("python", "torchrun") and "-c" not in words and script:
            rest = words[words.index(script) + 1:]
            found.append((script, rest[:rest.index(">")] if ">" in rest else rest))
    return found


def anchors(page):
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    content = README.read_bytes()
    assert len(content) <= 12_000 and content.count(b"\n") <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match("https?:", target):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(docs/([\w-]+\.md)\)", README.read_text())
    assert {page.name for page in PAGES[1:]} == set(linked)


@pages
def test_commands_name_scripts_that_are_there(page):
    for script, arguments in scripts(page):
        is_other = script == EXAMPLE or PLACEHOLDERS & set(re.split(r"[/.]", script))
        assert is_other or (ROOT / script).is_file(), script
        if script.endswith("data.py"):
            assert arguments[0] in ("prepare", "verify", "show", "list"), arguments
        if script.endswith("codec.py"):
            assert arguments[0] in ("encode", "decode"), arguments
        if script.endswith("convert.py"):
            assert arguments[0] in ("export", "pack"), arguments


@functools.cache
def flags_of_commands():
    """{(script, subcommand): {flag: the pages that use it}} over all pages."""
    used = {}
    for page in PAGES:
        for script, arguments in scripts(page):
            if (ROOT / script).is_file():
                subcommand = arguments[0] if script in ("data.py", "codec.py", "convert.py") else ""
                flags = used.setdefault((script, subcommand), {})
                for flag in [word.split("=")[0] for word in arguments if re.match("--?[a-z]", word)]:
                    flags.setdefault(flag, set()).add(page.name)
    return {key: flags for key, flags in used.items() if flags}


@pytest.mark.parametrize("script, subcommand", flags_of_commands())
def test_flags_are_those_that_help_shows(script, subcommand, monkeypatch, capsys):
    flags = flags_of_commands()[script, subcommand]
    commands = [[*[subcommand][:len(subcommand)], "--help"]]
    if script == "experiments/draw_samples.py":  # has a command line of its own for one file
        commands.append(["--checkpoint", "FILE", "--help"])
    for command in commands:
        monkeypatch.setattr(sys, "argv", [script, *command])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    shown = capsys.readouterr().out
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", shown))
    assert not {flag: pages for flag, pages in flags.items() if flag not in known}


@pages
def test_no_line_of_code_names_a_file_that_is_not_there(page):
    lines = [line for language, lines in blocks(page) for line in lines if language in ("bash", "python")]
    for line in [*lines, *commands(page)]:
        for word in re.findall(r"[\w./-]+", line):
            is_ours = word.split("/")[0] in IN_ROOT and not word.startswith((*MADE, EXAMPLE))
            if is_ours and ("/" in word or word.endswith(".py")) and not PLACEHOLDERS & set(re.split(r"[/.]", word)):
                assert (ROOT / word).exists(), f"{word} in {line}"


@pages
def test_files_in_the_text_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for word in re.findall(r"`((?:%s)/[\w./-]+)`" % "|".join(name for name in IN_ROOT if "." not in name), text):
        assert (ROOT / word).exists() or "NAME" in word or word == EXAMPLE, word


def test_the_two_commands_that_set_up_stand_as_they_are():
    lines = [line for language, lines in blocks(README) for line in lines if language == "bash"]
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert [line for line in lines if line.startswith("python3")] == [
        install + "python experiments/ablate_coupling.py", install + "python -m pytest"]


def test_the_python_of_the_readme_imports_what_is_there():
    (_, lines), = [block for block in blocks(README) if block[0] == "python"]
    tree = ast.parse("\n".join(lines))
    assert any(isinstance(node, ast.ImportFrom) and node.module == "evaluate" for node in tree.body)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module)
            assert all(hasattr(module, name.name) for name in node.names)


def test_every_experiment_has_a_row_in_the_readme():
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ")]
    for path in (ROOT / "experiments").glob("*.py"):
        if "EXPERIMENT = Experiment(" in path.read_text():
            assert any(f" `{path.name}` | `{path.stem}_<scale>.csv` | " in row for row in rows), path.name


def test_every_known_image_set_is_on_the_page_of_image_sets():
    from data import SETS
    page = (ROOT / "docs/images.md").read_text()
    for name in SETS:
        whole, _, part = name.rpartition("-")
        family = re.split(r"-?\d\d(?=-)", name)[0]  # imagenet1k
        assert f"`{family}" in page or f"`{whole}`" in page and f"`-{part}`" in page, name


def test_the_experiment_of_the_page_runs_and_draws(tmp_path):
    page = (ROOT / "docs/changing.md").read_text()
    (code,) = re.findall(r'^    """Which .*?^        sweep.main\(EXPERIMENT\)$', page, re.M | re.S)
    code = textwrap.dedent(code).replace("cifar10-subset", "cifar10-subset-vehicles").replace("steps=80", "steps=2")
    code = code.replace("num_couplings=10", "num_couplings=2").replace("emb_dim=32", "emb_dim=8")
    names = {"__name__": "ablate_scale", "__file__": str(ROOT / EXAMPLE)}
    exec(compile(code, EXAMPLE, "exec"), names)
    folders = [word for name in ("runs", "results", "figures") for word in (f"--{name}-dir", str(tmp_path / name))]
    names["sweep"].main(names["EXPERIMENT"], folders)
    assert (tmp_path / "results/ablate_scale_smoke.csv").exists()
    assert (tmp_path / "figures/ablate_scale_smoke.png").exists() and len(names["configs"]("small")) == 4
