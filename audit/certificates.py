"""Certificates: what an audit found, sealed by a checksum; JSON, a page, and image by image."""
import hashlib
import json
import re
from pathlib import Path

from audit.checks import FAIL, AuditError
from audit.pages import page
from harness.errors import one_line, short
from harness.files import write_atomically

FORMAT = "jet-audit-1"
LARGEST_BYTES = 2 ** 26
SETTINGS_TYPES = {"data": str, "split": str, "draws": int, "iw": int, "jacobians": int,
                  "codelength": int, "eval_seed": int, "threads": int, "model_flags": list}


def seal(certificate):
    """SHA-256 over all of a certificate but this."""
    rest = {name: value for name, value in certificate.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(certificate, measured, out_dir):
    """NAME.json, NAME.md and, where something was measured, NAME.csv; returns the paths."""
    weights, data = certificate["weights"], certificate["data"]
    name = (f"{weights['name']}-{weights['weights_sha256'][:8]}_{Path(data['name']).stem}_"
            f"{data['split']}")
    if not data["whole_split"]:
        name += f"_{data['num_images']}"
    name = re.sub(r"[^\w.-]", "_", name)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{name}.{kind}" for kind in ("json", "md")]
    if measured:
        path, text = out_dir / f"{name}.csv", per_image_csv(measured)
        write_atomically(path, text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        certificate["per_image"] = {"file": path.name, "sha256": digest}
        paths.append(path)
    certificate["sha256"] = seal(certificate)
    write_atomically(paths[0], json.dumps(certificate, indent=1) + "\n")
    write_atomically(paths[1], page(certificate, paths[0].name))
    return paths


def per_image_csv(measured):
    """The values of every image, mean over the draws."""
    rows, draws = measured["rows"], measured["draws"]
    columns = [measured["ours"]["bits_per_dim_per_image"],
               *(rows[name][:draws].mean(0) for name in ("bits", "square", "logdet"))]
    lines = ["image,bits_per_dim,bits_per_dim_float64,squares_bits_per_dim,logdet_nats"]
    for index, values in enumerate(zip(*columns)):
        lines.append(",".join([str(index), *(repr(float(value)) for value in values)]))
    return "\n".join(lines) + "\n"


def read_certificate(path):
    """A certificate whose seal holds. Raises AuditError in one line; nothing in it is run."""
    try:
        if Path(path).stat().st_size > LARGEST_BYTES:
            raise AuditError(f"{path}: far too large for a certificate")
        certificate = json.loads(Path(path).read_text())
        seal_now, seal_then = seal(certificate), certificate["sha256"]
        if certificate["format"] != FORMAT:
            raise AuditError(f"{path}: of format {certificate['format']!r}, and this reads "
                             f"{FORMAT}")
        if seal_now != seal_then:
            raise AuditError(f"{path}: altered since it was made (its checksum does not fit): "
                             "make a new one")
        if not _has_types(certificate):
            raise ValueError("its fields have other types")
    except OSError as error:
        raise AuditError(one_line(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"{path}: no certificate of an audit ({short(error)})") from None
    return certificate


def _has_types(certificate):
    settings, verdict = certificate["settings"], certificate["verdict"]
    return (all(type(settings[name]) is kind for name, kind in SETTINGS_TYPES.items())
            and all(isinstance(one["value"], (int, float, str, type(None)))
                    and isinstance(one["name"], str) for one in certificate["checks"])
            and {"weights_sha256", "path"} <= certificate["weights"].keys()
            and (verdict is None or "result" in verdict) and "fingerprint" in certificate["data"]
            and "git_commit" in certificate["made_with"]
            and {"made", "bits_per_dim"} <= certificate.keys())


def changes(old, new):
    """What differs between two certificates, a line each."""
    lines = []
    for what, group, name in (("weights", "weights", "weights_sha256"),
                              ("images", "data", "fingerprint")):
        then, now = old[group][name], new[group][name]
        if then != now:
            lines.append(f"{what} changed: {then[:16]} then, {now[:16]} now")
    checks_now = {(one["section"], one["name"]): one for one in new["checks"]}
    for one in old["checks"]:
        now = checks_now.pop((one["section"], one["name"]), None)
        if difference := _difference(one, now):
            lines.append(f"{one['section']}: {one['name']}: {difference}")
    lines += [f"{section}: {name}: was not checked then, and fails now"
              for (section, name), one in checks_now.items() if one["result"] == FAIL]
    then, now = (certificate["verdict"] and certificate["verdict"]["result"]
                 for certificate in (old, new))
    return lines if then == now else [*lines, f"verdict: {then} then, {now} now"]


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
