"""Certificates: what an audit found, as JSON sealed by a checksum, and as a page."""
import hashlib
import json
import math
import re
from pathlib import Path

from audit.checks import FAIL, AuditError, counted
from audit.fields import CERTIFICATE, fault_in
from audit.outcome import format_value, judge, outcome_line, title
from harness.errors import one_line, short
from harness.files import read_json, write_atomically

FORMAT = "jet-audit-2"


def seal(certificate):
    """SHA-256 over all of a certificate but this."""
    rest = {name: value for name, value in certificate.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(certificate, measured, out_dir):
    """NAME.json, NAME.md and, where something was measured, NAME.csv, and NAME.bits, the images in
    bytes, where an adapter's were; returns the paths."""
    weights, data = certificate["weights"], certificate["data"]
    part = "" if data["whole_split"] else f"_{data['num_images']}"
    name = re.sub(r"[^\w.-]", "_", f"{weights['name']}-{weights['weights_sha256'][:8]}_"
                  f"{Path(data['name']).stem}_{data['split']}{part}")
    out_dir.mkdir(parents=True, exist_ok=True)
    table = per_image_csv(measured) if measured else None
    if table:
        digest = hashlib.sha256(table.encode()).hexdigest()
        certificate["per_image"] = {"file": f"{name}.csv", "sha256": digest}
    written = measured and measured.get("written")
    if written:
        digest = hashlib.sha256(written).hexdigest()
        certificate["bytes"] = {"file": f"{name}.bits", "sha256": digest}
    certificate["sha256"] = seal(certificate)
    texts = {"json": json.dumps(certificate, indent=1) + "\n",
             "md": page(certificate, f"{name}.json"), "csv": table,
             "bits": written and (lambda file: file.write(written))}
    paths = {out_dir / f"{name}.{kind}": text for kind, text in texts.items() if text}
    for path, text in paths.items():
        write_atomically(path, text)
    return list(paths)


def per_image_csv(measured):
    """The values of every image, mean over the draws."""
    import pandas as pd
    rows, draws = measured["rows"], measured["draws"]
    values = zip(measured["ours"]["bits_per_dim_per_image"],  # as many as both computations have
                 *(rows[name][:draws].mean(0) for name in ("bits", "square", "logdet")))
    columns = "bits_per_dim", "bits_per_dim_float64", "squares_bits_per_dim", "logdet_nats"
    return pd.DataFrame(values, columns=columns).to_csv(index_label="image", lineterminator="\n")


def read_certificate(path):
    """A certificate whose seal holds, with the fields that an audit writes, and no others.

    Raises AuditError in one line; nothing in it is run.
    """
    try:
        certificate = read_json(path)
        if certificate["format"] != FORMAT:
            raise AuditError(f"{path}: of format {certificate['format']!r}, and this reads "
                             f"{FORMAT}")
        if seal(certificate) != certificate["sha256"]:
            raise AuditError(f"{path}: altered since it was made (its checksum does not fit): "
                             "make a new one")
        if fault := fault_in(certificate, CERTIFICATE):
            raise ValueError(f"{fault[1:]} is missing, too much or no such value")
        settings, kind = certificate["settings"], certificate["weights"]["kind"]
        given = [name for name in ("checkpoint", "adapter") if settings[name] is not None]
        if given != [{"jet": "checkpoint", "adapter": "adapter"}[kind]]:
            raise ValueError(f"its settings are not those of a {kind}")
        if (certificate["outcome"], certificate["reasons"]) != judge(certificate):
            raise ValueError("its outcome is not what its checks say")
    except OSError as error:
        raise AuditError(one_line(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(f"{path}: no certificate of an audit ({short(error)})") from None
    return certificate


def changes(old, new):
    """What differs between two certificates, a line each."""
    lines = []
    for what, group, name in (("weights", "weights", "weights_sha256"),
                              ("images", "data", "fingerprint")):
        then, now = old[group][name], new[group][name]
        if then != now:
            lines.append(f"{what} changed: {then[:16]} then, {now[:16]} now")
    files = [{one["path"]: one["sha256"] for one in certificate["weights"].get("files", ())}
             for certificate in (old, new)]
    lines += [f"file {path}: {files[0].get(path)} then, {files[1].get(path)} now"
              for path in sorted(files[0] | files[1]) if files[0].get(path) != files[1].get(path)]
    lines += [f"{name.replace('_', ' ')} of the data: {old['data'][name]} then, {now} now"
              for name, now in new["data"].items()
              if name != "fingerprint" and old["data"][name] != now]
    for name in ("bits_per_dim", "bits_per_dim_se", "noise_se"):
        then, now = (math.nan if one[name] is None else one[name] for one in (old, new))
        if not (abs(then - now) <= 1e-4 or math.isnan(then) and math.isnan(now)):
            lines.append(f"{name}: {then} then, {now} now")
    checks_now = {title(one): one for one in new["checks"]}
    for one in old["checks"]:
        if difference := _difference(one, checks_now.pop(title(one), None)):
            lines.append(f"{title(one)}: {difference}")
    lines += [f"{title}: was not checked then, and fails now"
              for title, one in checks_now.items() if one["result"] == FAIL]
    if old["outcome"] != new["outcome"]:
        lines.append(f"outcome: {old['outcome']} then, {new['outcome']} now")
    for name in ("result", "claim", "model", "source", "dataset"):
        then, now = ((certificate["verdict"] or {}).get(name) for certificate in (old, new))
        if then != now:
            lines.append(f"verdict ({name}): {then} then, {now} now")
    return lines


def _difference(then, now):
    """What differs between a check then and now, or None."""
    if now is None:
        return "is not checked any more"
    old, new = then["value"], now["value"]
    if now["result"] != then["result"]:
        return f"{then['result']} then, {now['result']} now ({old} then, {new} now)"
    if isinstance(old, float) and isinstance(new, float):
        differs = abs(old - new) > now["drift"]
        return f"{old:.8g} then, {new:.8g} now" if differs else None
    return f"{old} then, {new} now" if old != new else None


# ---- what people read

def page(certificate, file):
    """The certificate as Markdown. file: its name."""
    weights, data = certificate["weights"], certificate["data"]
    lines = [f"# Audit of {weights['name']} on {data['name']} {data['split']}", ""]
    if certificate["bits_per_dim"] is not None:
        lines += [_number(certificate), ""]
    answer = certificate["verdict"]
    lines += [f"**{outcome_line(certificate)}**", "",
              answer["sentence"] if answer else "No claim was given.", "", _made(certificate), "",
              f"To verify: `python experiments/audit_bpd.py --check {file}` (in this folder's "
              "place). What each line means: [AUDIT.md](../AUDIT.md).", ""]
    for section in dict.fromkeys(one["section"] for one in certificate["checks"]):
        lines += [f"## {section}", "", "| check | value | allowed | result | |",
                  "| --- | --- | --- | --- | --- |"]
        lines += [_row(one) for one in certificate["checks"] if one["section"] == section]
        lines.append("")
    return "\n".join(lines)


def _number(certificate):
    data, se = certificate["data"], certificate["bits_per_dim_se"]
    value = f"{certificate['bits_per_dim']:.4f}" + (f" ± {se:.4f}" if se is not None else "")
    part = "" if data["whole_split"] else " (a part of the split)"
    how = f"{counted(certificate['settings']['draws'], 'draw')} an image: an upper bound"
    how = f"uniform dequantization, {how}"
    if certificate["weights"]["kind"] == "adapter":  # which may be of another kind
        how = next(one["text"].rpartition("; ")[2] for one in certificate["checks"]
                   if title(one) == "Estimate: bits/dim")
    return f"**{value} bits/dim** on {data['num_images']:,} images{part}, {how}."


def _made(certificate):
    weights, data, made = (certificate[name] for name in ("weights", "data", "made_with"))
    settings = certificate["settings"]
    commit = (made["git_commit"] or "unknown")[:10] + (" with changes" if made["git_dirty"] else "")
    return (f"Weights `{weights['path']}`, SHA-256 `{weights['weights_sha256']}`. Images: variant "
            f"{data['variant']}, fingerprint `{data['fingerprint']}`. Noise seed "
            f"{settings['eval_seed']}. Made {certificate['made']} at commit {commit} on "
            f"{made['hardware']}, {counted(settings['threads'], 'thread')}, Python "
            f"{made['python']}, torch {made['torch']}, numpy {made['numpy']}, in "
            f"{made['seconds']:.0f} s.")


def _row(one):
    """A check as a row of a table, long checksums cut."""
    cells = [one["name"], format_value(one["value"]), one["tolerance"], one["result"], one["text"]]
    cells = [re.sub(r"([0-9a-f]{16})[0-9a-f]{48}", r"\1…", cell).replace("|", "\\|")
             for cell in cells]
    return f"| {' | '.join(cells)} |"
