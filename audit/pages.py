"""What people read of an audit: lines on a terminal, and the certificate as a page."""
import math
import re

from audit.checks import FAIL, NOT_APPLICABLE, PASS, counted


def format_value(value):
    """A check's value as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def check_lines(one):
    """A Check on the terminal: the result, the value, and below it what it means."""
    value, tolerance = format_value(one.value), one.tolerance
    if len(value) > 40:
        value = value[:12] + "..."
    if len(tolerance) > 45:
        tolerance = tolerance[:12] + "..."
    mark = "  - " if one.result == NOT_APPLICABLE else one.result
    allowed = f"[{tolerance}]" if tolerance else ""
    return f"{mark}  {f'{one.section}: {one.name}':44} {value:>14}  {allowed}\n      {one.text}"


def conclusion(certificate):
    """The last lines on the terminal."""
    results = [one["result"] for one in certificate["checks"]]
    lines = [f"{results.count(PASS)} checks passed, {results.count(FAIL)} failed, "
             f"{results.count(NOT_APPLICABLE)} not applicable; "
             f"{certificate['made_with']['seconds']:.0f} s"]
    if certificate["verdict"]:
        lines.append(certificate["verdict"]["sentence"])
    elif certificate["bits_per_dim"] is not None:
        data, se = certificate["data"], certificate["bits_per_dim_se"]
        lines.append(f"{certificate['bits_per_dim']:.4f} +- {se or math.nan:.4f} bits/dim on "
                     f"{data['num_images']:,} {data['split']} images of {data['name']}")
    if FAIL in results:
        names = "; ".join(f"{one['section']}: {one['name']}" for one in failures(certificate))
        lines.append(f"The number is NOT to be trusted: {names}")
    return "\n".join(lines)


def failures(certificate):
    return [one for one in certificate["checks"] if one["result"] == FAIL]


def page(certificate, file):
    """The certificate as Markdown. file: its name."""
    weights, data = certificate["weights"], certificate["data"]
    lines = [f"# Audit of {weights['name']} on {data['name']} {data['split']}", ""]
    if certificate["bits_per_dim"] is not None:
        lines += [_number(certificate), ""]
    answer = certificate["verdict"]
    lines += [f"**{answer['sentence']}**" if answer else "No claim was given.", "",
              _summary(certificate), "", _made(certificate), "",
              f"To verify: `python experiments/audit_bpd.py --check {file}` (in this folder's "
              "place). What each line means: [AUDIT.md](../AUDIT.md).", ""]
    section = None
    for one in certificate["checks"]:
        if one["section"] != section:
            section = one["section"]
            lines += [f"## {section}", "", "| check | value | allowed | result | |",
                      "| --- | --- | --- | --- | --- |"]
            lines += [_row(other) for other in certificate["checks"] if other["section"] == section]
            lines.append("")
    return "\n".join(lines)


def _number(certificate):
    data, se = certificate["data"], certificate["bits_per_dim_se"]
    value = f"{certificate['bits_per_dim']:.4f}"
    if se is not None:
        value += f" ± {se:.4f}"
    part = "" if data["whole_split"] else " (a part of the split)"
    return (f"**{value} bits/dim** on {data['num_images']:,} images{part}, uniform dequantization, "
            f"{counted(certificate['settings']['draws'], 'draw')} an image: an upper bound.")


def _summary(certificate):
    results, failed = [one["result"] for one in certificate["checks"]], failures(certificate)
    if failed:
        names = "; ".join(f"{one['section']}, {one['name']}" for one in failed)
        return f"{len(failed)} checks FAILED: {names}."
    return (f"Every check passed ({results.count(PASS)}; {results.count(NOT_APPLICABLE)} not "
            "applicable).")


def _made(certificate):
    weights, data, made = (certificate[name] for name in ("weights", "data", "made_with"))
    settings = certificate["settings"]
    commit = (made["git_commit"] or "unknown")[:10]
    if made["git_dirty"]:
        commit += " with changes"
    threads = counted(settings["threads"], "thread")
    return (f"Weights `{weights['path']}`, SHA-256 `{weights['weights_sha256']}`. Images: variant "
            f"{data['variant']}, fingerprint `{data['fingerprint']}`. Noise seed "
            f"{settings['eval_seed']}. Made {certificate['made']} at commit {commit} on "
            f"{made['hardware']}, {threads}, Python {made['python']}, "
            f"torch {made['torch']}, numpy {made['numpy']}, in {made['seconds']:.0f} s.")


def _row(one):
    """A check as a row of a table, long checksums cut."""
    cells = [one["name"], format_value(one["value"]), one["tolerance"], one["result"], one["text"]]
    cells = [re.sub(r"([0-9a-f]{16})[0-9a-f]{48}", r"\1…", cell).replace("|", "\\|")
             for cell in cells]
    return f"| {' | '.join(cells)} |"
