"""The results page: what is on it, where it leads, and how a real browser shows it."""
import html.parser
import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import pytest
from grid_rows import grid_rows
from test_readme import anchors

from paper_figures import markup, redraw, results_page, site_page, site_runs, style, tables
from paper_figures.results_csv import ResultsError, read_runs

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "results/site"
PNG = (ROOT / "paper_figures/out/figure1.png").read_bytes()[:24]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = 390, 1280


# ---- Markdown as HTML

def shown(text, base="."):
    return markup.to_html(text, base, lambda path, alt: f"<img {path} {alt}>")


def test_what_stands_in_a_cell_is_never_html():
    for text in ("<script>alert(1)</script>", "| <b> | `<i>` |\n| --- | --- |\n| a & b | **<u>** |", "- <p> `<q>`"):
        assert not re.search("<(script|b|i|u|q)>", shown(text)), text
    assert 'href="../x&quot;onclick=&quot;y"' in shown('[a](x"onclick="y)', "..")
    assert 'href="../javascript:alert"' in shown("[a](javascript:alert)", "..")


def test_links_are_relative_to_their_file():
    assert shown("[a](../docs/x.md#y) [b](#c) https://d.org", "../audits") == (
        '<p><a href="../docs/x.md#y">a</a> <a href="#c">b</a> <a href="https://d.org">https://d.org</a></p>')


def test_blocks():
    assert shown("# A\n\n## B `c`\n\nd\n**e** f\n\n- g\n  h\n- i") == (
        "<h1>A</h1>\n<h2>B <code>c</code></h2>\n<p>d <strong>e</strong> f</p>\n<ul>\n<li>g h</li>\n<li>i</li>\n</ul>")
    assert shown("![a](b.png)") == "<img b.png a>"


def test_numbers_stand_to_the_right_and_bars_within_a_cell_stay():
    text = shown("| a | b | |\n| --- | --- | --- |\n| x\\|y | 1,234 | +0.1 to +0.2 |\n| z | – | |")
    assert "<td>x|y</td><td class=\"n\">1,234</td><td class=\"n\">+0.1 to +0.2</td>" in text
    assert '<th scope="col">a</th><th scope="col" class="n">b</th>' in text


def test_wide_tables_are_cards_on_a_phone_if_they_have_few_columns():
    few, many = (f"| {' | '.join('abcdefghijkl'[:count])} |\n| {' | '.join(['---'] * count)} |\n|{' ten chars |' * count}"
                 for count in (6, 12))
    assert '<table class="cards">' in shown(few) and 'data-name="b"' in shown(few) and '<table class="many">' in shown(many)


# ---- what is on it

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(results/ without a CSV yet, the folder of the drawings of all experiments, here empty ones)."""
    results, out = tmp_path / "results", tmp_path / "out"
    for folder in (results, out):
        folder.mkdir()
    for item in results_page.ITEMS:
        (out / f"{item.figure}_small.png").write_bytes(PNG)
    (out / "figure1.png").write_bytes(PNG)
    (out / "main_table_small.md").write_text("Caption.\n\n| Model | bits/dim |\n| --- | --- |\n| Glow | 3.35 |\n")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    return results, out


def add(folders, *experiments, seeds=(0,)):
    """The CSVs of these at small scale."""
    for name in experiments:
        grid_rows(name, "small", seeds).to_csv(folders[0] / f"{name}_small.csv", index=False)


def page(folders):
    return site_page.files(*folders)["index.html"].decode()


def section(text, name):
    return re.search(rf'<h3 id="{name}">.*?(?=<h[23] )', text, re.S)[0]


def test_every_item_has_claim_table_words_and_evidence(folders):
    add(folders, *(item.experiment for item in results_page.ITEMS))
    text = page(folders)
    for item in results_page.ITEMS:
        part = section(text, site_page.anchor(item.title))
        assert item.claim in part and item.to_tell in part and "<table" in part and "small: " in part, item.title
        assert f'href="../{item.experiment}_small.csv"' in part and "<code>0123456</code>" in part and "Machine" in part
        assert ("<img" in part) == bool(item.figure), item.title
        assert "Not run yet:</strong> medium, paper." in part and f"experiments/{item.experiment}.py" in part


def test_what_is_no_evidence_yet_says_so_and_shows_nothing(folders):
    results, out = folders
    rows = grid_rows("ablate_block_depth", "small")
    rows.assign(total_steps=10, step=10).to_csv(results / "ablate_block_depth_small.csv", index=False)
    part = section(page(folders), "figure-2b")
    assert "Not run yet:</strong> small (at 5 epochs), medium, paper" in part and "not run</span>" in part
    assert "<img" not in part and "<table" not in part and "ablate_block_depth_small.csv" not in part
    assert not len(site_runs.read(results))


def test_a_part_of_a_grid_counts_as_a_part(folders):
    results, out = folders
    grid_rows("scaling", "medium")[:8].to_csv(results / "scaling_medium.shard-00.csv", index=False)
    text = page(folders)
    assert "medium: 4 runs, a part</span>" in section(text, "figure-3")
    assert 'medium (<a href="#all-runs">4 runs, a part</a>), paper' in section(text, "figure-3")


def test_every_run_is_one_row_of_the_table(folders):
    results, out = folders
    add(folders, "compare_vit_cnn", "main_results", seeds=(0, 1))
    add(folders, "compare_vit_cnn_lengths")
    (out / "figure2a_lengths_small.png").write_bytes(PNG)
    wanted = {(path.name, run_id) for path in results.glob("*_small.csv") for run_id in read_runs(path)["run_id"]}
    runs = re.findall(r"<tr><td>(?:.*)<td>([^<]*)</td><td><a href=\"../([^\"]*)\">CSV</a></td></tr>",
                      page(folders).split('id="all-runs"')[1])
    assert len(runs) == len(wanted) > 30 and {(file, run) for run, file in runs} == wanted


def test_a_run_of_the_table_is_its_last_evaluation(tmp_path):
    rows = grid_rows("ablate_layers", "small")
    path = tmp_path / "ablate_layers_small.csv"
    early = rows.assign(step=5, bits_per_dim=9.0)
    type(rows)(early.to_dict("records") + rows.to_dict("records")).to_csv(path, index=False)
    found = read_runs(path)
    assert found["run_id"].is_unique and set(found["split"]) == {"test"} and found["bits_per_dim"].max() < 5
    assert (found["train_bits_per_dim"] - found["bits_per_dim"]).round(6).eq(0.005).all()
    rows.drop(columns="lr").to_csv(path, index=False)
    with pytest.raises(ResultsError, match="missing columns lr"):
        read_runs(path)


def test_a_certificate_that_is_no_text_is_refused(folders):
    (folders[0] / "audits").mkdir()
    (folders[0] / "audits/a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ResultsError, match="a.md: not readable"):
        page(folders)


def test_the_page_is_the_same_twice_and_stray_files_are_found(folders, tmp_path, monkeypatch):
    add(folders, "ablate_layers")
    results, out = folders
    paths = site_page.write(results, out)
    assert paths[0] == results / "site/index.html" and len(paths) == 2
    monkeypatch.setattr(results_page, "page", lambda folder: f"the page of {folder}")  # it is tested by itself
    (results / "RESULTS.md").write_text(f"the page of {results}")
    drawn = [path for path in out.iterdir()]
    monkeypatch.setattr(redraw, "redraw", lambda results_dir, out_dir: [
        Path(shutil.copy(path, out_dir)) for path in drawn])
    redraw.check(results, out)
    (results / "site/old.png").write_bytes(PNG)
    paths[0].write_text("other")
    with pytest.raises(ResultsError) as error:
        redraw.check(results, out)
    assert "site/index.html" in str(error.value) and "site/old.png" in str(error.value)


# ---- the committed page

class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags():
    parser = Tags()
    parser.feed((SITE / "index.html").read_text())
    return parser.found


def test_it_is_small_and_needs_no_network(tags):
    assert sum(path.stat().st_size for path in SITE.iterdir()) < 3e6
    assert not {"iframe", "base", "object", "embed", "video"} & {tag for tag, _ in tags}
    loaded = [attrs.get("src") or attrs.get("href") for tag, attrs in tags if tag in ("img", "script", "link")]
    assert {path.name for path in SITE.iterdir()} == {name for name in loaded if name and ":" not in name} | {"index.html"}
    assert {name for name in loaded if name and ":" in name} == {"data:,"}
    assert "url(" not in (SITE / "index.html").read_text() and "@import" not in (SITE / "index.html").read_text()


def test_its_links_lead_somewhere(tags):
    names = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(names) == len(set(names))
    for link in {attrs["href"] for tag, attrs in tags if tag == "a"}:
        where = urllib.parse.urlsplit(link)
        if where.scheme:
            assert where.scheme == "https", link
            continue
        target = (SITE / where.path).resolve() if where.path else None
        assert target is None or target.exists(), link
        if where.fragment:
            assert where.fragment in (anchors(target) if target else names), link


def test_every_picture_says_what_it_shows_and_how_large_it_is(tags):
    pictures = [attrs for tag, attrs in tags if tag == "img"]
    assert pictures and all(attrs["alt"] and int(attrs["width"]) and int(attrs["height"]) for attrs in pictures)


# ---- in a browser

browser = pytest.mark.browser
if not BROWSER:
    browser = lambda test: pytest.mark.browser(pytest.mark.skip(reason="no Chromium: apt-get install chromium")(test))

# It runs outside the page, which is shown in a frame of each width, as it is.
SCRIPT = """
for (const frame of document.querySelectorAll("iframe")) frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement, report = {};
  const column = (table, k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent);
  report.width = [root.clientWidth, root.scrollWidth];
  report.beyond = [...page.querySelectorAll("main *")].filter((one) => !one.closest(".scroll")
    && one.getBoundingClientRect().right > root.clientWidth + 0.5).map((one) => one.outerHTML.slice(0, 80));
  report.images = [...page.images].map((image) => [image.currentSrc, image.complete && image.naturalWidth, image.getBoundingClientRect().width]);
  report.links = [...page.links].map((link) => link.href);
  report.colours = [view.getComputedStyle(page.body).color, view.getComputedStyle(page.body).backgroundColor];
  const runs = page.querySelector(".sortable"), heads = [...runs.tHead.rows[0].cells];
  report.sorted = heads.map((head, k) => {
    head.querySelector("button").click();
    const up = [head.ariaSort, column(runs, k)];
    head.querySelector("button").click();
    return [...up, head.ariaSort, column(runs, k)];
  });
  const field = page.querySelector("input[type=search]");
  const find = (text) => {
    field.value = text;
    field.dispatchEvent(new view.Event("input"));
    return [[...runs.tBodies[0].rows].filter((row) => row.offsetHeight).map((row) => row.textContent), page.querySelector("output").textContent];
  };
  report.found = find("compare_vit_cnn  MEDIUM");
  report.all = find("")[1];
  for (const sheet of page.styleSheets)  // as on paper of this width
    for (const rule of sheet.cssRules) {
      if (rule.media?.mediaText === "print") rule.media.mediaText = "all";
      else if (rule.media) rule.media.mediaText = "not all";
    }
  report.paper = {
    hidden: [...page.querySelectorAll("nav, .find, footer")].filter((one) => one.offsetHeight).length,
    folded: [...page.querySelectorAll("details > *")].filter((one) => !one.checkVisibility()).length,
    wide: [...page.querySelectorAll("table")].filter((table) => table.scrollWidth > table.parentElement.clientWidth + 1)
      .map((table) => [table.className, table.scrollWidth, table.parentElement.clientWidth, table.textContent.slice(0, 60)]),
  };
  const result = document.createElement("pre");
  result.id = frame.id;
  result.textContent = JSON.stringify(report);
  document.body.append(result);
});
for (const frame of document.querySelectorAll("iframe")) frame.src = PAGE;
"""
A4, A4_WIDE = 688, 1047  # pixels between the margins of paper


def run_browser(folder, *flags):
    """(stdout, stderr) of a headless browser that has ended well; folder: for its profile."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile", "--enable-logging=stderr", "--hide-scrollbars",
               "--allow-file-access-from-files", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{width: what SCRIPT reports of the committed page, and what the console said at any width}."""
    folder, widths = tmp_path_factory.mktemp("browser"), (PHONE, A4, DESK)
    frames = "".join(f'<iframe id="{width}" style="border: 0; width: {width}px; height: 844px"></iframe>' for width in widths)
    script = SCRIPT.replace("PAGE", json.dumps((SITE / "index.html").as_uri()))
    (folder / "outside.html").write_text(f"<body>{frames}<script>{script}</script>")
    dom, said = run_browser(folder, "--dump-dom", (folder / "outside.html").as_uri())
    found = {int(width): json.loads(html.unescape(report)) | {"console": re.findall(r".*CONSOLE.*", said)}
             for width, report in re.findall(r'<pre id="(\d+)">(.*?)</pre>', dom, re.S)}
    assert tuple(sorted(found)) == widths
    return found


@browser
def test_every_picture_is_shown_and_the_console_is_silent(reports):
    for report in reports.values():
        assert not report["console"]
        assert len(report["images"]) == len(list(SITE.glob("*.png")))
        assert all(size > 100 for _, size, _ in report["images"])


@browser
def test_nothing_is_wider_than_the_window(reports):
    for width, report in reports.items():
        inside, needed = report["width"]
        assert needed <= inside <= width and not report["beyond"], width
    assert {width for _, _, width in reports[PHONE]["images"]} == {reports[PHONE]["width"][0]}  # in full width


@browser
def test_text_is_dark_on_light(reports):
    for report in reports.values():
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in report["colours"])
        assert ink < 150 and paper > 750


@browser
def test_the_links_of_the_browser_lead_to_files_that_are_there(reports):
    here = (SITE / "index.html").as_uri()
    for link in reports[DESK]["links"]:
        where = urllib.parse.urlsplit(link)
        if where.scheme == "file" and not link.startswith(f"{here}#"):
            assert Path(urllib.parse.unquote(where.path)).exists(), link


@browser
def test_the_table_sorts_by_each_column_and_back(reports):
    def is_sorted(cells):
        numbers = [cell.replace(",", "") for cell in cells if cell]
        if all(re.fullmatch(r"-?[\d.]+(e\d+)?", cell) for cell in numbers):
            cells = [float(cell) for cell in numbers]
        else:
            cells = [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", cell.lower())] for cell in cells if cell]
        return cells == sorted(cells)
    columns = dict(zip(site_runs.COLUMNS, reports[DESK]["sorted"]))
    assert len(columns) == len(site_runs.COLUMNS)
    for name in ("bits/dim, test", "parameters", "FLOPs", "seconds", "learning rate", "experiment", "machine", "images"):
        up, ascending, down, descending = columns[name]
        assert (up, down) == ("ascending", "descending") and len(set(ascending)) > 1, name
        assert is_sorted(ascending) and is_sorted(list(filter(None, descending))[::-1]), name
        assert sorted(ascending) == sorted(descending)
        assert "" not in ascending[:-1] or ascending[-1] == "" == descending[-1], name  # empty ones last


@browser
def test_runs_are_found_by_words(reports):
    rows, said = reports[DESK]["found"]
    assert len(rows) == 6 and all("compare_vit_cnn" in row for row in rows) and said.startswith("6 of ")
    number, _, total, _ = reports[DESK]["all"].split()
    assert number == total


@browser
def test_on_paper_all_is_unfolded_and_nothing_is_cut_off(reports, tmp_path):
    paper = reports[A4]["paper"]
    assert paper["hidden"] == 0 and paper["folded"] == 0
    for css, needed, there, text in paper["wide"]:
        assert css == "sortable" and needed <= A4_WIDE, (needed, there, text)  # it gets pages of its own, across
    run_browser(tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", "--no-pdf-header-footer", (SITE / "index.html").as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    pages = re.findall(rb"/Type /Page\b", pdf)
    assert 5 <= len(pages) <= 60 and pdf.count(b"/Subtype /Image") >= len(list(SITE.glob("*.png")))
