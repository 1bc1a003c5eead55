"""Rows of cells as Markdown and as LaTeX."""
import dataclasses

from paper_figures import style

OURS = "ours: "  # begins the first cell of a row that is printed in bold
WIDE = {"Model": 2.6, "Source": 2.8, "Note": 2.6}  # columns of running text in LaTeX, cm
END = r" \tabularnewline"  # \raggedright takes the other one away
TEX = {**{c: f"\\{c}" for c in "&%#${}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
       "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "†": r"\textdagger{}", "<": "$<$",
       ">": "$>$", "|": r"\textbar{}", "[": "{[}",  # [ after \\ would be its option
       "/": r"/\allowbreak{}", "@": r"@\allowbreak{}", "_": r"\_\allowbreak{}"}  # for addresses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A table, or one section of it: cells are text, as many in each row as in the header."""
    header: tuple
    rows: list
    title: str = ""
    note: str = ""


def markdown(caption, parts):
    """The parts below their caption, as GitHub shows them."""
    def line(cells):
        cells = [f"**{cell}**" if cell.startswith(OURS) else cell for cell in cells]
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    lines = [caption, ""]
    for part in parts:
        if part.title:
            lines += [f"**{part.title}** {part.note}".rstrip(), ""]
        lines += [line(part.header), line(["---"] * len(part.header)), *map(line, part.rows), ""]
    return "\n".join(lines)


def tex(text):
    return "".join(TEX.get(c, c) for c in text)


def tex_line(header, cells):
    """One row of a part with this header."""
    texts = [rf"\textbf{{{tex(cell)}}}" if cell.startswith(OURS) else tex(cell) for cell in cells]
    return " & ".join(rf"\raggedright {text}" if name in WIDE else text
                      for name, text in zip(header, texts)) + END


def latex(caption, parts):
    """The parts as table environments, the first with the caption; they need booktabs."""
    lines = []
    for number, part in enumerate(parts):
        kinds = "".join(f"p{{{WIDE[name]}cm}}" if name in WIDE else "l" for name in part.header)
        size = "tiny" if "Source" in part.header else "small"
        lines += [r"\begin{table}[htbp]", rf"\centering\{size}\setlength{{\tabcolsep}}{{2pt}}"]
        if number == 0:
            lines.append(rf"\caption{{{tex(caption)}}}")
        if part.title:
            lines.append(rf"\textbf{{{tex(part.title)}}} {tex(part.note)}".rstrip() + r"\\[2pt]")
        lines += [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", tex_line(part.header, part.header),
                  r"\midrule", *(tex_line(part.header, cells) for cells in part.rows),
                  r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*lines, ""])


def write(name, caption, parts, out_dir):
    """name.md and name.tex in out_dir; returns the two paths."""
    return style.write_files({f"{name}.md": markdown(caption, parts),
                              f"{name}.tex": latex(caption, parts)}, out_dir)
