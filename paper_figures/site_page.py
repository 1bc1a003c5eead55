"""results/site/index.html: the results as one page to look at, with its pictures beside it.

redraw.py writes it from the CSVs, the figures and tables drawn from them, and the README's Status.
It needs no server and no network; links lead to files of this repository.
"""
import html
import math
import operator
import re
from pathlib import Path

from harness.files import read_bytes
from paper_figures import (markup, regime, results_page, site_runs, style, table_files, tables,
                           throughput)
from paper_figures.results_csv import ResultsError

HERE, ROOT_LINK = Path(__file__).parent, "../.."
GRIDS = {grid.experiment: grid for grid in (tables.SPLITS, tables.LAYERS, tables.FIGURE_4)}
FIGURE_1 = """Each coupling keeps one half of the values, x1 (blue), and moves the other, x2
(orange), by what its network reads off x1; below, what the four kinds of halves are, on 4 x 4
tokens. A drawing of no data."""
SPEED = """**Not in the paper.** Bars show images/s beside the fastest of their size and task;
whiskers are quartiles. Behind a bar: images/s, the share of the measured matrix-multiply peak, and
times what was measured in the same process, step by step in turn.
[docs/speed.md](docs/speed.md) says how it was measured and what was tried."""
LABELS = """**Not in the paper.** How many bits/dim a class-conditional Jet gains by the label of an
image, beside one that is told another image's label, or none."""
RUNS = """Every finished run of the committed CSVs, searches and parts of grids, too: its last
evaluation. Numbers of different image sets are never comparable; what each column means is in
[results/README.md](results/README.md#columns-of-our-csvs)."""


class Site:
    """The page under way. pictures: {name: path} of what it shows."""

    def __init__(self, results_dir, out_dir):
        self.results_dir, self.out_dir, self.pictures = Path(results_dir), Path(out_dir), {}
        self.toc = []  # (level, id, title)

    def heading(self, level, title, badges=""):
        name = anchor(title)
        self.toc.append((level, name, title))
        return f'<h{level} id="{name}">{html.escape(title)}{badges}</h{level}>'

    def text(self, markdown, base=ROOT_LINK, top=3, css=""):
        """Markdown as HTML; css: the class of its first paragraph."""
        text = markup.to_html(markdown, base, self.figure, top)
        return text.replace("<p>", f'<p class="{css}">', 1) if css else text

    def figure(self, path, title):
        """A picture of the figures' folder, by a link that Markdown has."""
        name = Path(path).name
        self.pictures[name] = picture = self.out_dir / name
        head = picture.read_bytes()[16:24]  # of a PNG: width and height
        size = f'width="{int.from_bytes(head[:4])}" height="{int.from_bytes(head[4:])}"'
        pdf = f"{ROOT_LINK}/paper_figures/out/{Path(name).stem}.pdf"
        return (f'<figure><img src="{name}" alt="{html.escape(title)}" {size}>'
                f'<figcaption>{html.escape(title)} (<a href="{pdf}">PDF</a>)</figcaption></figure>')

    def exists(self, name):
        return (self.results_dir / name).exists()


def anchor(title):
    """The name of a heading in links: "figure-2a"."""
    return re.sub("[^a-z0-9]+", "-", title.split(":")[0].lower())


def facts(pairs):
    """A list of evidence. pairs: [(name, Markdown relative to results/)]."""
    lines = [f"<dt>{name}</dt><dd>{markup.inline(text, '..')}</dd>" for name, text in pairs]
    return "\n".join(["<dl>", *lines, "</dl>"])


def folded(title, content):
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def distinct(values):
    return ", ".join(dict.fromkeys(map(str, values.fillna("unknown"))))


def commits(rows):
    return ", ".join(dict.fromkeys(f"`{text}`" for text in map(
        tables.commit_of, rows["git_commit"], rows["git_dirty"])))


# ---- the sections

def first_section(site, runs):
    readme = (style.ROOT / "README.md").read_text()
    lead = re.search(r"^# .*?\n\n(.*?)\n\n", readme, re.S)[1]
    status = re.search(r"^## Status\n(.*?)^## ", readme, re.M | re.S)[1]
    rows = "".join(
        f'<tr><td><a href="#{anchor(item.title)}">{html.escape(item.title)}</a></td>'
        + "".join(f"<td>{badge(*state(site, item, scale, runs))}</td>"
                  for scale in style.SCALES[1:]) + "</tr>\n" for item in results_page.ITEMS)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("", *style.SCALES[1:]))
    return [f"<h1>Jet in PyTorch: results</h1>\n{site.text(lead, css='lead')}",
            site.heading(2, "Status"), site.text(status), site.heading(3, "What was run"),
            f'<div class="scroll"><table class="overview"><thead><tr>{heads}</tr></thead>\n'
            f"<tbody>{rows}</tbody></table></div>"]


def state(site, item, scale, runs):
    """(kind of badge, words) for a figure or table at a scale."""
    path = site.results_dir / f"{item.experiment}_{scale}.csv"
    here = runs[(runs["experiment"] == item.experiment) & (runs["scale"] == scale)]
    if path.exists() and regime.is_run(path, item.experiment):
        here = here[here["csv"] == path.name]
        seeds = style.counted(here["seed"].nunique(), "seed")
        return "yes", f"{style.counted(len(here), 'run')}, {seeds}"
    if len(here):
        return "part", f"{style.counted(len(here), 'run')}, a part"
    return "", "not run"


def badge(kind, words):
    return f'<span class="badge {kind}">{words}</span>'


def model_section(site):
    folder = tables.SHIPPED
    if (shipped := tables.read_shipped(folder)) is None:
        return []
    done, weights = shipped[0], shipped[0]["weights_sha256"]
    _, *lines = results_page.model_section(folder)
    evidence = [
        ("Weights", f"[assets/{folder.name}](../assets/{folder.name}/done.json), "
                    f"SHA-256 `{weights}`"),
        ("Test images", f"{done['dataset']}, variant {done['variant']}, fingerprint "
                        f"`{done['test_fingerprint']}`"),
        ("Machine", f"{done['hardware']}, torch {done['torch_version']}"),
        ("Code", f"commit `{tables.commit_of(done['git_commit'], done['git_dirty'])}`"),
        ("Again", "`python assets/make_jet_cifar10.py`")]
    return [site.heading(2, "The small trained model"), site.text("\n".join(lines), ".."),
            facts(evidence)]


def samples_section(site):
    paths = [path for path in sorted(site.results_dir.glob("samples/*.npz"))
             if path.name.split("_")[0] not in style.SCALES]
    parts = [site.heading(2, "Samples")] if paths else []
    for path in paths:
        parts += [site.figure(f"samples_{path.stem}.png", f"Samples of {path.stem}"),
                  facts([("File", f"[samples/{path.name}](samples/{path.name}): the images, and "
                                  "what drew them")])]
    return parts


def item_section(site, item, runs):
    states = {scale: state(site, item, scale, runs) for scale in style.SCALES[1:]}
    badges = "".join(" " + badge(kind, f"{scale}: {words}")
                     for scale, (kind, words) in states.items() if kind)
    parts = [site.heading(3, item.title, badges or " " + badge("", "not run")),
             site.text(f"**The paper:** {item.claim}", css="claim")]
    for scale, (kind, _) in states.items():
        if kind == "yes":
            parts += measured(site, item, scale)
    if item.experiment == "main_results":
        scale = max(style.SCALES[1:], key=lambda scale: (
            (site.out_dir / f"main_table_{scale}.md").exists(), style.SCALES.index(scale)))
        table = site.text((site.out_dir / f"main_table_{scale}.md").read_text())
        parts.append(folded("The main table, with all published numbers", table))
    missing = []
    for scale, (kind, words) in states.items():
        least = f" (at {regime.LEAST[scale]} epochs)" if scale in regime.LEAST else ""
        part = f" ([{words}](#all-runs))" if kind == "part" else least
        missing += [f"{scale}{part}"] if kind != "yes" else []
    if missing:
        parts.append(site.text(f"**Not run yet:** {', '.join(missing)}. "
                               f"{results_page.command(item)}", css="todo"))
    more = [*results_page.paper_numbers(item), f"**To tell more:** {item.to_tell}"]
    return [*parts, site.text("\n".join(more), "..")]


def measured(site, item, scale):
    """What a CSV shows: words, figure, differences, the points of its grid, evidence."""
    path = site.results_dir / f"{item.experiment}_{scale}.csv"
    rows = item.rows(path)
    test = rows[rows["split"] == "test"]
    runs = tables.by_run(test, item.swept, getattr(GRIDS.get(item.experiment), "names", {}))
    grid = GRIDS.get(item.experiment)
    pivot = [grid.bits(test, runs)] if grid else []
    columns = ("bits/dim", "±", "Parameters", "Training FLOPs", "Seconds", "logdet/cap", "Source")
    cells = [("; ".join(" ".join(point) for point in points),
              *map(tables.summary(of_run).get, columns)) for of_run, points in runs]
    points = table_files.Part(header=(", ".join(item.swept), *columns), rows=cells)
    files = {"CSV": path.name, "bits/dim of each image": f"per_image/{path.stem}.npz",
             "search": f"{item.experiment}_search_{scale}.csv",
             "lengths": f"{item.experiment}_lengths_{scale}.csv"}
    images = test.drop_duplicates(["dataset", "fingerprint"])
    evidence = [
        ("Files", ", ".join(f"[{name}]({file})" for name, file in files.items()
                            if site.exists(file))),
        ("Test images", "; ".join(f"{row.dataset}, variant {row.variant}, fingerprint "
                                  f"`{row.fingerprint}`" for row in images.itertuples())),
        ("Machine", f"{distinct(test['hardware'])}; torch {distinct(test['torch_version'])}"),
        ("Code", f"commit {commits(test)}")]
    return [site.text("\n".join(results_page.measured(item, rows, scale, path)), ".."),
            site.text(table_files.markdown("", pivot)) if pivot else "",
            folded(f"What each of {len(cells)} points of {scale} scale took",
                   site.text(table_files.markdown("", [points]))), facts(evidence)]


def beside_the_paper(site):
    parts = [site.heading(3, "What labels are worth"), site.text(LABELS, css="claim")]
    scales = [scale for scale in style.SCALES[1:]
              if site.exists(name := f"condition_classes_{scale}.csv")
              and regime.is_run(site.results_dir / name, "condition_classes")]
    for scale in scales:
        parts.append(site.text((site.out_dir / f"conditions_{scale}.md").read_text()))
    if not scales:
        parts.append(site.text(f"{regime.say_not_run('condition_classes', 'small')}.", css="todo"))
    parts += [site.heading(3, "Speed and memory"), site.text(SPEED, css="claim")]
    for device in ("cpu", "cuda"):
        path = site.results_dir / f"throughput_{device}.csv"
        if not path.exists():
            continue
        rows = throughput.read(path)
        cells = [(row.size, row.what, row.implementation, row.against, row.precision,
                  f"{row.batch_size:g}", row.hardware, f"{row.images_per_s:,.4g}",
                  f"{row.peak_share:.1%}", "" if math.isnan(row.ratio) else f"{row.ratio:.2f}")
                 for row in rows.itertuples()]
        header = ("size", "what", "implementation", "against", "precision", "batch", "machine",
                  "images/s", "of the peak", "times the other")
        parts += [site.figure(f"throughput_{device}.png", f"Speed on {distinct(rows['hardware'])}"),
                  folded(f"{len(cells)} measurements", markup.table(header, cells)),
                  facts([("Files", f"[{path.name}]({path.name})"),
                         ("Machine", f"{distinct(rows['hardware'])}; torch "
                                     f"{distinct(rows['torch_version'])}"),
                         ("Code", f"commit {commits(rows)}")])]
    return parts


def audits_section(site):
    paths = sorted(site.results_dir.glob("audits/*.md"))
    parts = [site.heading(2, "Audits")] if paths else []
    for path in paths:
        try:
            head, *rest = read_bytes(path).decode().partition("\n## ")
        except ValueError as error:
            raise ResultsError(f"{path}: not readable ({error})") from None
        checks = site.text("".join(rest).strip(), "../audits", top=4)
        head = re.sub("<strong>((?:not )?certified|refuted)(.*?)</strong>", lambda found: badge(
            "yes" if found[1] == "certified" else "part", found[1]) + found[2],
            site.text(head, "../audits", top=4))
        parts += [head, folded("Every check", checks), facts([
            ("Files", ", ".join(f"[{kind}](audits/{path.stem}.{end})" for kind, end in
                                (("certificate", "json"), ("page", "md"), ("images", "csv"))))])]
    return parts


def runs_section(site, runs):
    rows = [*site_runs.shipped(), *runs.to_dict("records")]
    find = ('<div class="find" hidden><label>Find <input type="search" '
            'placeholder="vit medium H100"></label><output></output></div>')
    return [f'<div class="wide">{site.heading(2, "All runs")}', site.text(RUNS), find,
            markup.table(site_runs.COLUMNS, [*map(site_runs.cells, rows)], "..", "sortable"),
            "</div>"]


# ---- the whole

def navigation(toc):
    lines = [f'<li{" class=under" if level > 2 else ""}><a href="#{name}">'
             f"{html.escape(title)}</a></li>" for level, name, title in toc]
    return "\n".join(['<nav aria-label="Contents"><ul>', *lines, "</ul></nav>"])


def files(results_dir, out_dir):
    """{name: content} of results/site/. out_dir: where the figures and tables have been drawn.

    Raises ResultsError for a CSV that must not be used.
    """
    site, runs = Site(results_dir, out_dir), site_runs.read(Path(results_dir))
    introduction = results_page.INTRODUCTION.split("\n\n", 2)[2]
    parts = [*first_section(site, runs), *model_section(site), *samples_section(site),
             site.heading(2, "Figures and tables of the paper"),
             site.text("Small and medium scale are not the paper's: what they show is said for "
                       "their training length and learning rates, and is no verdict on the paper."),
             folded("How differences are measured", site.text(introduction)),
             site.heading(3, "Figure 1: how a coupling works"), site.text(FIGURE_1),
             site.figure("figure1.png", "How a coupling works")]
    for item in results_page.ITEMS:
        parts += item_section(site, item, runs)
    parts += [site.heading(2, "Beside the paper"), *beside_the_paper(site), *audits_section(site),
              *runs_section(site, runs)]
    style_sheet, script = ((HERE / f"site_page.{kind}").read_text() for kind in ("css", "js"))
    body = "\n".join(filter(None, parts))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>Jet in PyTorch: results</title>
<link rel="icon" href="data:,">
<style>
{style_sheet}</style>
</head>
<body>
<div class="page">
{navigation(site.toc)}
<main>
{body}
<footer>Written by <code>python paper_figures/redraw.py</code> from the CSVs in results/, which
have every number of this page in full.</footer>
</main>
</div>
<script>
{script}</script>
</body>
</html>
"""
    return {"index.html": page.encode(),
            **{name: path.read_bytes() for name, path in sorted(site.pictures.items())}}


def write(results_dir, out_dir):
    """Write results/site/; returns its paths."""
    contents = {name: operator.methodcaller("write", content)
                for name, content in files(results_dir, out_dir).items()}
    return style.write_files(contents, Path(results_dir) / "site")
