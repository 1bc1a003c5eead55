"""The Markdown of our own pages as HTML: what they use of it, and no more."""
import html
import posixpath
import re

INLINE = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*|"
                    r"\[(?P<text>[^\]]+)\]\((?P<link>[^)\s]+)\)|(?P<address>https?://[^\s|)`]+)")
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)\s]+)\)")
NUMBER = re.compile(r"[+-]?\d[\d,.]*(e[+-]?\d+)?( M|%)?( (±|to|s.e|sd).*)?")
EMPTY = ("", "–", "-")
NARROW, FEW = 48, 8  # characters that a row may have on a phone; columns that fit on a card


def inline(text, base):
    """A line with its code, bold words and links; these are relative to base."""
    parts, end = [], 0
    for found in INLINE.finditer(text):
        parts.append(html.escape(text[end:found.start()], quote=False))
        end = found.end()
        if found["code"]:
            code = re.sub(r"(?<!\S)--?\w\S*", r"<span>\g<0></span>", html.escape(found["code"]))
            parts.append(f"<code>{code}</code>")
        elif found["bold"]:
            parts.append(f"<strong>{inline(found['bold'], base)}</strong>")
        elif found["link"]:
            parts.append(f'<a href="{html.escape(rebased(found["link"], base))}">'
                         f"{inline(found['text'], base)}</a>")
        else:
            address = html.escape(found["address"])
            parts.append(f'<a href="{address}">{address}</a>')
    return "".join(parts) + html.escape(text[end:], quote=False)


def rebased(link, base):
    """Where a link of a Markdown file leads; base: that file's folder, as the page sees it."""
    return link if re.match("https?:|#", link) else posixpath.normpath(posixpath.join(base, link))


def to_html(markdown, base, figure, top=2):
    """Blocks of Markdown as HTML.

    base: the folder that links are relative to, as the page sees it. figure(path, alt) gives the
    HTML of an image. top: the level of a heading of two signs.
    """
    blocks = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        lines, image = block.splitlines(), IMAGE.fullmatch(block)
        if image:
            blocks.append(figure(image["path"], image["alt"]))
        elif head := re.match("(#+) (.*)", block):
            level = top + len(head[1]) - 2
            blocks.append(f"<h{level}>{inline(head[2], base)}</h{level}>")
        elif lines and lines[0].startswith("|"):
            header, _, *rows = map(cells_of, lines)
            blocks.append(table(header, rows, base))
        elif block.startswith("- "):
            items = re.split(r"\n- ", block.removeprefix("- "))
            items = [f"<li>{inline(' '.join(item.split()), base)}</li>" for item in items]
            blocks.append("\n".join(["<ul>", *items, "</ul>"]))
        elif block:
            blocks.append(f"<p>{inline(' '.join(block.split()), base)}</p>")
    return "\n".join(blocks)


def cells_of(line):
    """The cells of a row of a Markdown table."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def table(header, rows, base="", kind=""):
    """A table from cells of Markdown: numbers to the right; wide ones scroll, or are cards."""
    columns = [*zip(*rows)] or [()] * len(header)
    numeric = [any(cell not in EMPTY for cell in column) and all(
        NUMBER.fullmatch(cell) or cell in EMPTY for cell in column) for column in columns]
    width = sum(max(map(len, (*column, name))) for name, column in zip(header, columns))
    if not kind and width > NARROW:
        kind = "cards" if len(header) <= FEW else "many"
    names = [re.sub("<[^>]+>", "", inline(name, base)) for name in header]
    marks = [' class="n"' if is_number else "" for is_number in numeric]
    lines = ["<thead><tr>" + "".join(
        f'<th scope="col"{mark}>{inline(name, base)}</th>' for name, mark in zip(header, marks))
        + "</tr></thead>", "<tbody>"]
    for row in rows:
        told = [f' data-name="{html.escape(name)}"' if kind == "cards" and name else ""
                for name in names]
        lines.append("<tr>" + "".join(
            f"<td{mark}{name}>{inline(cell, base)}</td>"
            for cell, mark, name in zip(row, marks, told)) + "</tr>")
    css = f' class="{kind}"' if kind else ""
    return "\n".join([f'<div class="scroll"><table{css}>', *lines, "</tbody></table></div>"])
