"""What an audit comes to: one of three outcomes, and how its checks look on a terminal."""
import os
import sys
import textwrap

from audit.checks import FAIL, INFO, NOT_APPLICABLE, OPEN, PASS
from harness.progress import Bar

CERTIFIED, REFUTED, NOT_CERTIFIED = "certified", "refuted", "not certified"
EXIT_CODES = {CERTIFIED: 0, REFUTED: 1, NOT_CERTIFIED: 3}
COLOURS = {PASS: 32, FAIL: 31, OPEN: 33, INFO: 2, NOT_APPLICABLE: 2}
WIDTH = 80


def title(one):
    return f"{one['section']}: {one['name']}"


def judge(certificate):
    """(the outcome, its reasons) by the checks and the verdict on the claim."""
    failed, missing = ([title(one) for one in certificate["checks"] if one["result"] == result]
                       for result in (FAIL, OPEN))
    found = certificate["verdict"] or {"result": None}
    claim = found["result"]
    if claim in ("better", "worse"):
        failed.append(f"the claim of {found['claim']}: measured {found['bits_per_dim']:.4f}")
    if failed:
        return REFUTED, failed
    if claim == "not comparable":
        missing.append("the claim, which is not comparable")
    if not certificate["checks"]:
        missing.append("anything")
    return (NOT_CERTIFIED, missing) if missing else (CERTIFIED, [])


def outcome_line(certificate):
    """"certified", "refuted: by what", "not certified: what could not be checked": 80 columns."""
    outcome, reasons = certificate["outcome"], certificate["reasons"]
    for count in range(len(reasons), 0, -1):
        more = len(reasons) - count
        rest = [f"{more} more"] if more else []
        line = f"{outcome}: {'; '.join([*reasons[:count], *rest])}"
        if len(line) <= WIDTH or count == 1:
            return line
    return outcome


def format_value(value):
    """A check's value as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def coloured(text, number):
    """A text as a terminal colours it, and as it is elsewhere."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\x1b[{number}m{text}\x1b[0m"
    return text


def check_lines(one):
    """A Check on the terminal: the result, the value, and below it what it means."""
    value, tolerance = format_value(one.value), one.tolerance
    if len(value) > 28:
        value = value[:12] + "..."
    if len(tolerance) > 25:
        tolerance = "" if " " in tolerance else tolerance[:12] + "..."
    name = f"{one.section}: {one.name}"
    allowed = f" [{tolerance}]" if tolerance else ""
    room = WIDTH - 6 - len(value) - len(allowed)
    mark = coloured(f"{one.result:4}", COLOURS[one.result])
    lines = [f"{mark}  {name:{max(room - 1, 0)}} {value}{allowed}"]
    if len(name) >= room:
        lines = [f"{mark}  {name}", f"{value + allowed:>{WIDTH}}"]
    text = one.text
    if not allowed and one.tolerance:
        text = f"{text} (allowed: {one.tolerance})"
    return "\n".join([*lines, *wrap(text, "      ")])


def wrap(text, indent=""):
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def show(lines):
    """Print, above a live bar if there is one."""
    if sys.stderr.isatty():
        Bar.write(lines)
    else:
        print(lines, flush=True)


def show_check(one):
    show(check_lines(one))


def show_outcome(outcome, line):
    show(coloured(line, {CERTIFIED: 32, REFUTED: 31, NOT_CERTIFIED: 33}[outcome]))


def conclusion(certificate):
    """The lines before the last, which is outcome_line."""
    results = [one["result"] for one in certificate["checks"]]
    counts = (f"{results.count(PASS)} checks passed", f"{results.count(FAIL)} failed",
              f"{results.count(OPEN)} could not be made",
              f"{results.count(NOT_APPLICABLE)} not applicable")
    data, bits = certificate["data"], certificate["bits_per_dim"]
    lines = [f"{', '.join(counts)}; {certificate['made_with']['seconds']:.0f} s"]
    if bits is not None:
        error = certificate["bits_per_dim_se"]
        part = "" if data["whole_split"] else "a part: "
        lines += wrap(f"{bits:.4f} bits/dim on {part}{data['num_images']:,} {data['split']} images "
                      f"of {data['name']}" + ("" if error is None else
                      f"; other images would differ by some {error:.4f} (standard error)"))
    if certificate["verdict"]:
        lines += wrap(certificate["verdict"]["sentence"])
    return "\n".join(lines)
