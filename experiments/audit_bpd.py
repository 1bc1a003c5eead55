"""Settle a claim of bits per dimension: seven kinds of check, a verdict, and a certificate that can be verified later.

    python experiments/audit_bpd.py                                    # the small model of assets/, minutes on a laptop
    python experiments/audit_bpd.py --checkpoint RUN --data cifar10 --data-root DIR --claim 3.86
    python experiments/audit_bpd.py --data cifar10 --data-root DIR --claim-from Glow     # a row of results/reported.csv
    python experiments/audit_bpd.py --adapter experiments/adapter_example.py            # a model that is not a Jet
    python experiments/audit_bpd.py --check results/audits/NAME.json                    # what has changed since?

--checkpoint: a run folder or any file that load_jet takes. --claim: a number with the digits it was published with; 3.66
is the interval from 3.655 to 3.665, widened by two standard errors. The certificate (JSON), the same as a page
(Markdown) and the values of every image (CSV) go to results/audits/. Ends with 0 where every check passed (whatever the
verdict: that is an answer), with 1 where one failed, or where --check finds a change. results/AUDIT.md explains the ideas.
"""
import dataclasses
import datetime
import hashlib
import json
import math
import platform
import re
import sys
import time
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from convert import CheckpointError, config_checksum, load_jet, weights_checksum
from data import SETS, SPLITS, DataError, ImageSet, load_images
from experiments import audit_checks
from experiments.audit_checks import FAIL, PASS
from jet import Jet, JetConfig, forward_flops
from paper_figures.results_csv import ResultsError
from paper_figures.tables import REPORTED, read_reported
from run_folder import TrainingError, one_line, read_done, write_atomically
from train import ArgumentParser, add_config_flags, git_commit, hardware, model_flags, one_line_errors, pick_device

FORMAT = "jet-audit-1"
DEFAULT_MODEL = ROOT / "assets/jet_cifar10"
CODELENGTH_FLOPS = 1e13  # by default as many images (8 to 512) as this allows
SETTINGS = ("checkpoint", "adapter", "data", "split", "num_images", "draws", "iw", "jacobians", "codelength", "claim", "claim_from",
            "claim_data", "eval_seed", "threads")


class AuditError(TrainingError):
    """A request that cannot be audited, in one line."""


# ---- what is audited

class Adapter(torch.nn.Module):
    """A model from a Python file with forward(x) -> (z, logdet) and inverse(z) -> (x, logdet)."""

    def __init__(self, path):
        super().__init__()
        space = {"__name__": "adapter", "__file__": str(path)}
        try:
            source = Path(path).read_bytes()
            exec(compile(source, str(path), "exec"), space)  # the user's own file, named on the command line
            self.functions = space["forward"], space["inverse"]
        except OSError as error:
            raise AuditError(f"--adapter {one_line(error)}") from None
        except KeyError as error:
            raise AuditError(f"--adapter {path}: defines no function {error}: it needs forward(x) -> (z, logdet) and "
                             "inverse(z) -> (x, logdet)") from None
        except Exception as error:
            raise AuditError(f"--adapter {path}: cannot be run ({type(error).__name__}: {error})") from None
        self.digest = hashlib.sha256(source).hexdigest()

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self._call(0, x)

    def inverse(self, z):
        return self._call(1, z)

    def _call(self, which, value):
        name = ("forward", "inverse")[which]
        try:
            out, logdet = self.functions[which](value)
            fits = out.shape == value.shape and logdet.shape == (len(value),)
        except (TypeError, ValueError, AttributeError) as error:
            raise AuditError(f"--adapter: {name} failed ({type(error).__name__}: {error}): it takes (B, C, H, W) and returns a "
                             "tensor like it and log|det| (B,) in nats") from None
        if not fits:
            raise AuditError(f"--adapter: {name} of {tuple(value.shape)} returned {tuple(out.shape)} and {tuple(logdet.shape)}: it "
                             f"must return {tuple(value.shape)} and ({len(value)},)")
        return out, logdet


def load_model(flags):
    """(model, what names it, what its run recorded or None)."""
    if flags.adapter:
        model = Adapter(flags.adapter)
        return model, {"kind": "adapter", "name": Path(flags.adapter).stem, "path": shown(flags.adapter),
                       "weights_sha256": model.digest, "config": None}, None
    model = load_jet(flags.checkpoint, **model_flags(vars(flags)))
    about = {"kind": "jet", "name": Path(flags.checkpoint).resolve().stem, "path": shown(flags.checkpoint),
             "weights_sha256": weights_checksum(model), "config_sha256": config_checksum(model),
             "config": dataclasses.asdict(model.config), "num_params": sum(weight.numel() for weight in model.parameters())}
    done = read_done(Path(flags.checkpoint)) if Path(flags.checkpoint).is_dir() else None
    return model.to(pick_device(flags.device)), about, done


def shown(path):
    """A path as others can use it: relative to the repository where it is inside."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def select_images(flags, model):
    """(images, those of the other split or None, whether they are the whole split)."""
    images = load_images(flags.data, flags.split, flags.data_root)
    height, width, channels = images.array.shape[1:]
    if isinstance(model, Jet) and (channels, height, width) != model.config.image_shape:
        raise DataError(f"{flags.data} has images of {height} x {width} x {channels}, and this Jet takes "
                        f"{' x '.join(map(str, model.config.image_shape))} (channels first): give other --data")
    other = None
    if not str(flags.data).endswith(".npy"):
        try:
            other = load_images(flags.data, SPLITS[1 - SPLITS.index(flags.split)], flags.data_root)
        except DataError:  # then that check does not apply
            pass
    whole = flags.num_images is None or flags.num_images >= len(images.array)
    if not whole:
        images = ImageSet(array=images.array[:flags.num_images], labels=None, name=images.name, variant=images.variant, split=images.split)
    return images, other, whole


# ---- 7. the verdict

@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A number that someone reports, and what it is said to be of."""
    text: str  # with its digits
    model: str = ""
    dataset: str | None = None  # None: of the images that are audited
    variant: str | None = None
    bound: str = "elbo"
    dequantization: str = "uniform"
    source: str = ""

    @property
    def interval(self):
        """What the digits allow: half a unit of the last one to either side."""
        value = Decimal(self.text)
        half = Decimal(5).scaleb(value.as_tuple().exponent - 1)
        return float(value - half), float(value + half)


def read_claim(flags):
    """The Claim of --claim or --claim-from, or None."""
    if flags.claim is not None and flags.claim_from is not None:
        raise AuditError("--claim and --claim-from: give one of them")
    if flags.claim is not None:
        try:
            value = Decimal(flags.claim)
            ok = value.is_finite() and 0 < value < 1000
        except InvalidOperation:
            ok = False
        if not ok:
            raise AuditError(f"--claim {flags.claim}: must be bits/dim above 0, with the digits that were published, like 3.66")
        if not flags.claim_data:
            return Claim(text=flags.claim)
        name = flags.claim_data
        if name not in SETS:
            raise AuditError(f"--claim-data {name}: no known set (like {', '.join(list(SETS)[:3])}, imagenet64-oord)")
        return Claim(text=flags.claim, dataset=name, variant=SETS[name].variant)
    if flags.claim_from is None:
        if flags.claim_data:
            raise AuditError("--claim-data: of which claim? Give --claim or --claim-from")
        return None
    rows = read_reported(REPORTED)
    models = list(dict.fromkeys(row["model"] for row in rows))
    fits = [name for name in models if name.lower() == flags.claim_from.lower()] or [
        name for name in models if flags.claim_from.lower() in name.lower()]
    if len(fits) != 1:
        raise AuditError(f"--claim-from {flags.claim_from!r}: " + (f"several models of results/reported.csv: {'; '.join(fits)}" if fits
                         else "no model of results/reported.csv, which has " + ", ".join(models[:4]) + ", ..."))
    rows = [row for row in rows if row["model"] == fits[0]]
    wanted = flags.claim_data or _dataset_of(flags.data)
    chosen = [row for row in rows if wanted in (row["dataset"], reported_name(row))]
    if len(chosen) != 1:
        raise AuditError(f"--claim-from {fits[0]!r}: reported for {', '.join(reported_name(row) for row in rows)}: choose by --claim-data")
    row = chosen[0]
    return Claim(text=row["bits_per_dim"], model=row["model"], dataset=reported_name(row), variant=row["variant"], bound=row["bound"],
                 dequantization=row["dequantization"], source=row["source"])


def reported_name(row):
    """The name of a reported row's set, like ours: cifar10, imagenet64-oord."""
    return row["dataset"] if row["dataset"] == row["variant"] else f"{row['dataset']}-{row['variant']}"


def _dataset_of(name):
    return str(name).removesuffix("-subset")


MISTAKES = {
    "log(127.5) per dimension is left out": lambda v, l: v - math.log2(127.5),
    "pixels are taken in 0 to 1 and their 256 levels are not counted": lambda v, l: v - 8,
    "pixels are taken to span 1, not 2 (log 256 instead of log 127.5)": lambda v, l: v + math.log2(256 / 127.5),
    "nats are given instead of bits": lambda v, l: v * math.log(2),
    "it is divided by H*W instead of C*H*W": lambda v, l: 3 * v,
    "the sign of the log-det is wrong": lambda v, l: v + 2 * l,
    "the log-det is left out": lambda v, l: v + l,
    "log(2 pi) / 2 is left out": lambda v, l: v - math.log2(2 * math.pi) / 2,
}


def verdict(claim, images, whole, measured):
    """{"result", "sentence", ...}: reproduced, better, worse or not comparable; None without a claim."""
    if claim is None:
        return None
    value = measured["ours"]["bits_per_dim"]
    precision = audit_checks.precision_error(measured)
    se = measured["ours"]["bits_per_dim_se"]
    error = math.hypot(0 if math.isnan(se) else se, precision)
    low, high = claim.interval
    ours = f"{value:.4f} +- {error:.4f} bits/dim on {len(images.array):,} {images.split} images of {images.name}"
    who = f"{claim.model}: " if claim.model else ""
    about = {"claim": claim.text, "model": claim.model, "source": claim.source, "dataset": claim.dataset or images.name, "interval": [low, high],
             "bits_per_dim": value, "standard_error": error, "precision_error": precision, "result": "not comparable"}
    reason = None
    if claim.bound != "elbo" or claim.dequantization != "uniform":
        reason = (f"other bound: the claim is {claim.bound} with {claim.dequantization or 'unknown'} dequantization, "
                  "ours elbo with uniform dequantization")
    elif claim.dataset and claim.variant in ("unknown", "oord?"):
        reason = f"other variant: which images the claim was measured on is not known ({claim.dataset})"
    elif claim.dataset and claim.dataset != images.name:
        part = images.name.startswith(f"{claim.dataset}-")
        reason = (f"other split: the claim is of all test images of {claim.dataset}, these are a part of them" if part else
                  f"other variant: the claim is of {claim.dataset}, these are {images.name}, variant {images.variant}")
    elif images.split != "test" or not whole:
        reason = (f"other split: the claim is of all test images, these are {len(images.array):,} "
                  f"{'training' if images.split == 'train' else 'of them'}" + (" images" if images.split == "train" else ""))
    if reason:
        return about | {"sentence": f"Not comparable: {who}{claim.text} ({reason}); measured: {ours}."}
    outside = max(low - value, value - high, 0)
    count = outside / error if error else math.inf if outside else 0
    about |= {"outside": outside, "standard_errors": count}
    digits = f"{claim.text} (from {low:.{max(4, len(claim.text))}g} to {high:.{max(4, len(claim.text))}g})"
    if outside <= 2 * error:
        return about | {"result": "reproduced", "sentence": f"Reproduced: {who}{digits}; measured {ours}"
                        + (f", {outside:.4f} outside, {count:.1f} standard errors." if outside else ", inside.")}
    result = "better" if value < low else "worse"
    sentence = (f"{result.capitalize()}: measured {ours}, {outside:.4f} {'below' if result == 'better' else 'above'} what the claim "
                f"{who}{digits} allows: {count:.1f} standard errors.")
    logdet = measured["rows"]["logdet"][:measured["draws"]].mean() / measured["dims"] / math.log(2)
    for mistake, formula in MISTAKES.items():
        wrong = formula(value, logdet)
        if low - 2 * error <= wrong <= high + 2 * error:
            about.setdefault("mistakes", []).append(mistake)
            sentence += f" The claim is what these weights give ({wrong:.4f}) where {mistake}."
    return about | {"result": result, "sentence": sentence}


# ---- an audit

def audit(flags):
    """All checks and the verdict: a certificate (a dict), and the values of every image."""
    begun = time.monotonic()
    torch.set_num_threads(flags.threads)
    claim = read_claim(flags)
    model, about, done = load_model(flags)
    images, other, whole = select_images(flags, model)
    checks = []

    def add(new):
        for one in new:
            checks.append(one)
            tell(one)

    add(audit_checks.check_data(images, other, done))
    if done and done.get("weights_sha256"):
        add([audit_checks.check("Data", "weights", about["weights_sha256"], about["weights_sha256"] == done["weights_sha256"],
                                done["weights_sha256"], "SHA-256 of the weights, as the run recorded them when it ended")])
    else:
        add([audit_checks.check("Data", "weights", about["weights_sha256"], None, "not recorded",
                                "SHA-256 of the weights; nothing to compare with: --check a certificate")])
    try:
        measured = audit_checks.estimate(model, images, flags.eval_seed, flags.draws, flags.iw)
        identity, scales = audit_checks.check_identity(model, images, flags.eval_seed, flags.jacobians)
        add(audit_checks.check_estimate(model, images, measured, done, scales))
        add(identity)
        add(audit_checks.check_inverse(model, images, flags.eval_seed, 64))
        add(audit_checks.check_precision(measured))
    except (CheckpointError, DataError, AuditError):
        raise
    except ValueError as error:  # not finite: no number can be certified
        measured = None
        add([audit_checks.check("Estimate", "finite", str(error), False, "finite", "no number can be reported")])
    if flags.codelength and isinstance(model, Jet) and measured:
        add(audit_checks.check_code_length(model, images, flags.checkpoint, flags.given_model_flags,
                                           min(flags.codelength, len(images.array)), flags.threads))
    else:
        add([audit_checks.check("Code length", "bytes", None, None, "", "not asked for (--codelength N)" if isinstance(model, Jet)
                                else "the codec takes a Jet alone")])
    answer = verdict(claim, images, whole, measured) if measured else None
    commit, tree = git_commit()
    certificate = {
        "format": FORMAT, "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "passed": all(one.result != FAIL for one in checks),
        "settings": {name: shown(value) if name in ("checkpoint", "adapter") and value else value
                     for name in SETTINGS for value in [getattr(flags, name)]} | {"model_flags": flags.given_model_flags},
        "weights": about,
        "data": {"name": images.name, "variant": images.variant, "split": images.split, "num_images": len(images.array),
                 "shape": list(images.array.shape[1:]), "whole_split": whole, "fingerprint": images.fingerprint},
        "bits_per_dim": measured and measured["ours"]["bits_per_dim"],
        "bits_per_dim_se": measured and number(measured["ours"]["bits_per_dim_se"]),
        "noise_se": measured and number(measured["noise_se"]),
        "verdict": answer, "checks": [dataclasses.asdict(one) for one in checks],
        "made_with": {"git_commit": commit, "git_dirty": {"clean": False, "dirty": True}.get(tree), "hardware": hardware(pick_device(flags.device)),
                      "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                      "seconds": round(time.monotonic() - begun, 1)}}
    return certificate, measured


def number(value):
    """A float for JSON, which knows no nan."""
    return None if math.isnan(value) else value


def tell(one):
    """A check on the terminal: the result, the value, and below it what it means."""
    value = one.value if isinstance(one.value, str) else "" if one.value is None else f"{one.value:.6g}" if isinstance(one.value, float) else f"{one.value:,}"
    value = value if len(value) <= 40 else value[:12] + "..."
    tolerance = one.tolerance if len(one.tolerance) <= 45 else one.tolerance[:12] + "..."
    mark = {PASS: "pass", FAIL: "FAIL"}.get(one.result, "  - ")
    print(f"{mark}  {one.section + ': ' + one.name:44} {value:>14}  {f'[{tolerance}]' if tolerance else ''}\n      {one.text}", flush=True)


# ---- certificates

def seal(certificate):
    """SHA-256 over all of a certificate but this."""
    rest = {name: value for name, value in certificate.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(certificate, measured, out_dir):
    """NAME.json, NAME.md and NAME.csv; returns the paths."""
    weights, data = certificate["weights"], certificate["data"]
    part = "" if data["whole_split"] else f"_{data['num_images']}"
    name = re.sub(r"[^\w.-]", "_", f"{weights['name']}-{weights['weights_sha256'][:8]}_{Path(data['name']).stem}_{data['split']}{part}")
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{name}.{kind}" for kind in ("json", "md", "csv")]
    if measured:
        rows = measured["rows"]
        lines = ["image,bits_per_dim,bits_per_dim_float64,squares_bits_per_dim,logdet_nats"]
        draws = measured["draws"]
        columns = [measured["ours"]["bits_per_dim_per_image"], *(rows[key][:draws].mean(0) for key in ("bits", "square", "logdet"))]
        lines += [",".join([str(i), *(repr(float(value)) for value in values)]) for i, values in enumerate(zip(*columns))]
        text = "\n".join(lines) + "\n"
        write_atomically(paths[2], text)
        certificate["per_image"] = {"file": paths[2].name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    certificate["sha256"] = seal(certificate)
    write_atomically(paths[0], json.dumps(certificate, indent=1) + "\n")
    write_atomically(paths[1], page(certificate, paths[0].name))
    return paths if measured else paths[:2]


def page(certificate, file):
    """The certificate as Markdown."""
    weights, data, made, answer = (certificate[name] for name in ("weights", "data", "made_with", "verdict"))
    settings = certificate["settings"]
    failed = [one for one in certificate["checks"] if one["result"] == FAIL]
    lines = [f"# Audit of {weights['name']} on {data['name']} {data['split']}", ""]
    if certificate["bits_per_dim"] is not None:
        se = certificate["bits_per_dim_se"]
        lines += [f"**{certificate['bits_per_dim']:.4f}" + (f" ± {se:.4f}" if se is not None else "") + f" bits/dim** on {data['num_images']:,} "
                  f"images{'' if data['whole_split'] else ' (a part of the split)'}, uniform dequantization, {settings['draws']} draws an image: "
                  "an upper bound.", ""]
    lines += [f"**{answer['sentence']}**" if answer else "No claim was given.", "",
              f"{len(failed)} checks FAILED: " + "; ".join(f"{one['section']}, {one['name']}" for one in failed) + "." if failed
              else f"Every check passed ({sum(one['result'] == PASS for one in certificate['checks'])}; "
                   f"{sum(one['result'] not in (PASS, FAIL) for one in certificate['checks'])} not applicable).", "",
              f"Weights `{weights['path']}`, SHA-256 `{weights['weights_sha256']}`. Images: variant {data['variant']}, fingerprint "
              f"`{data['fingerprint']}`. Noise seed {settings['eval_seed']}. Made {certificate['made']} at commit "
              f"{(made['git_commit'] or 'unknown')[:10]}{' with changes' if made['git_dirty'] else ''} on {made['hardware']}, {settings['threads']} thread{'s' * (settings['threads'] > 1)}, "
              f"Python {made['python']}, torch {made['torch']}, numpy {made['numpy']}, in {made['seconds']:.0f} s.",
              "", f"To verify: `python experiments/audit_bpd.py --check {file}` (in this folder's place). What each line means: "
              "[AUDIT.md](../AUDIT.md).", ""]
    section = None
    for one in certificate["checks"]:
        if one["section"] != section:
            section = one["section"]
            lines += [f"## {section}", "", "| check | value | allowed | result | |", "| --- | --- | --- | --- | --- |"]
        value = one["value"]
        value = "" if value is None else f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        cells = [one["name"], value, one["tolerance"], one["result"], one["text"]]
        row = "| " + " | ".join(re.sub(r"([0-9a-f]{16})[0-9a-f]{48}", r"\1…", str(cell)).replace("|", "\\|") for cell in cells) + " |"
        following = certificate["checks"].index(one) + 1
        end = following == len(certificate["checks"]) or certificate["checks"][following]["section"] != section
        lines += [row, ""] if end else [row]
    return "\n".join(lines)


def read_certificate(path):
    """A certificate whose seal holds. Raises AuditError in one line; nothing in it is run."""
    try:
        if Path(path).stat().st_size > 2 ** 26:
            raise AuditError(f"{path}: far too large for a certificate")
        certificate = json.loads(Path(path).read_text())
        found, told = seal(certificate), certificate["sha256"]
        if certificate["format"] != FORMAT:
            raise AuditError(f"{path}: of format {certificate['format']!r}, and this reads {FORMAT}")
        if found != told:
            raise AuditError(f"{path}: altered since it was made (its checksum does not fit): make a new one")
        settings = certificate["settings"]
        kinds = {"data": str, "split": str, "draws": int, "iw": int, "jacobians": int, "codelength": int, "eval_seed": int, "threads": int}
        if (any(type(settings[name]) is not kind for name, kind in kinds.items()) or not isinstance(settings["model_flags"], list)
                or not all(isinstance(one["value"], (int, float, str, type(None))) and isinstance(one["name"], str) for one in certificate["checks"])
                or not {"weights_sha256", "path"} <= certificate["weights"].keys() or "fingerprint" not in certificate["data"]):
            raise ValueError("its fields have other types")
    except OSError as error:
        raise AuditError(one_line(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"{path}: no certificate of an audit ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
    return certificate


def recheck(old, new):
    """What differs between two certificates, a line each."""
    changes = []
    for what, group, name in (("weights", "weights", "weights_sha256"), ("images", "data", "fingerprint")):
        if old[group][name] != new[group][name]:
            changes.append(f"{what} changed: {old[group][name][:16]} then, {new[group][name][:16]} now")
    ours = {(one["section"], one["name"]): one for one in new["checks"]}
    for one in old["checks"]:
        now = ours.pop((one["section"], one["name"]), None)
        where = f"{one['section']}: {one['name']}"
        if now is None:
            changes.append(f"{where}: is not checked any more")
        elif now["result"] != one["result"]:
            changes.append(f"{where}: {one['result']} then, {now['result']} now ({one['value']} then, {now['value']} now)")
        elif isinstance(one["value"], float) and isinstance(now["value"], float):
            if abs(one["value"] - now["value"]) > now["drift"]:
                changes.append(f"{where}: {one['value']:.8g} then, {now['value']:.8g} now")
        elif one["value"] != now["value"]:
            changes.append(f"{where}: {one['value']} then, {now['value']} now")
    changes += [f"{section}: {name}: was not checked then, and fails now" for (section, name), one in ours.items() if one["result"] == FAIL]
    then, now = (certificate["verdict"] and certificate["verdict"]["result"] for certificate in (old, new))
    return changes + ([f"verdict: {then} then, {now} now"] if then != now else [])


# ---- the command line

def main(arguments=None):
    parser = ArgumentParser(prog="audit_bpd.py", description=__doc__)
    what = parser.add_argument_group("what is audited")
    what.add_argument("--checkpoint", metavar="PATH", help="a run folder or weight file (default: assets/jet_cifar10)")
    what.add_argument("--adapter", metavar="FILE.py", help="instead: Python file with forward(x) and inverse(z); it is run")
    what.add_argument("--data", metavar="NAME_OR_DIR", help="image set, prepared folder or .npy file (default: cifar10-subset)")
    what.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
    what.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    what.add_argument("--num-images", type=int, metavar="N", help="the first N images (default: all)")
    claims = parser.add_argument_group("the claim")
    claims.add_argument("--claim", metavar="BITS", help="bits/dim with the digits that were published, like 3.66")
    claims.add_argument("--claim-from", metavar="MODEL", help="of this model of results/reported.csv")
    claims.add_argument("--claim-data", metavar="SET", help="what the claim is of, like imagenet64-oord (default: the audited images)")
    how = parser.add_argument_group("how")
    how.add_argument("--draws", type=int, default=4, metavar="N", help="noise draws an image (default: 4)")
    how.add_argument("--iw", type=int, default=8, metavar="K", help="largest K of the importance-weighted bound (default: 8)")
    how.add_argument("--jacobians", type=int, default=1, metavar="N", help="images whose whole Jacobian is taken (default: 1)")
    how.add_argument("--codelength", type=int, metavar="N", help="images that are really compressed (default: up to 512, by cost)")
    how.add_argument("--eval-seed", type=int, default=0, metavar="SEED", help="of the noise (default: 0)")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; more need idle cores (default: 1)")
    how.add_argument("--out", type=Path, default=ROOT / "results/audits", metavar="DIR", help="default: results/audits")
    how.add_argument("--check", type=Path, metavar="CERTIFICATE", help="verify a certificate: audit again, and say what changed")
    add_config_flags(parser.add_argument_group("the model, as far as a file of another implementation does not tell it"),
                     JetConfig, "model.")
    flags = parser.parse_args(arguments)
    flags.given_model_flags = _model_arguments(vars(flags))
    with one_line_errors(parser.prog, ResultsError):
        if flags.check:
            return check(flags)
        certificate, measured = run(flags)
        paths = write(certificate, measured, flags.out)
        print(conclusion(certificate))
        for path in paths:
            print(path)
        sys.exit(0 if certificate["passed"] else 1)


def _model_arguments(flags):
    """The --model flags that were given, as arguments."""
    arguments = []
    for name, value in flags.items():
        if name.startswith("model."):
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{'' if value is not False else 'no-'}{name}", *(map(str, values) if not isinstance(value, bool) else ())]
    return arguments


def run(flags):
    """audit() of checked flags."""
    if flags.adapter and flags.checkpoint:
        raise AuditError("--adapter and --checkpoint: give one of them")
    flags.checkpoint = None if flags.adapter else flags.checkpoint or str(DEFAULT_MODEL)
    flags.data = flags.data or "cifar10-subset"
    for name, lowest in (("num_images", 2), ("draws", 1), ("iw", 1), ("jacobians", 0), ("codelength", 0), ("eval_seed", 0), ("threads", 1)):
        if (value := getattr(flags, name)) is not None and value < lowest:
            raise AuditError(f"--{name.replace('_', '-')} {value}: must be {lowest} or more")
    if flags.codelength is None:
        config = None if flags.adapter else load_jet(flags.checkpoint, **model_flags(vars(flags))).config
        flags.codelength = 0 if config is None else max(8, min(512, int(CODELENGTH_FLOPS / forward_flops(config) / 4)))
    return audit(flags)


def conclusion(certificate):
    """The last lines on the terminal."""
    results = [one["result"] for one in certificate["checks"]]
    lines = [f"{results.count(PASS)} checks passed, {results.count(FAIL)} failed, {len(results) - results.count(PASS) - results.count(FAIL)} not "
             f"applicable; {certificate['made_with']['seconds']:.0f} s"]
    if certificate["verdict"]:
        lines.append(certificate["verdict"]["sentence"])
    elif certificate["bits_per_dim"] is not None:
        data, se = certificate["data"], certificate["bits_per_dim_se"]
        lines.append(f"{certificate['bits_per_dim']:.4f} +- {se or math.nan:.4f} bits/dim on {data['num_images']:,} {data['split']} images of {data['name']}")
    if FAIL in results:
        lines.append("The number is NOT to be trusted: " + "; ".join(
            f"{one['section']}: {one['name']}" for one in certificate["checks"] if one["result"] == FAIL))
    return "\n".join(lines)


def check(flags):
    """--check: the audit of a certificate again."""
    old = read_certificate(flags.check)
    settings = old["settings"]
    if old["weights"].get("kind") == "adapter" and not flags.adapter:
        raise AuditError(f"{flags.check} is of an adapter, {old['weights']['path']}, and no certificate makes this program run code: "
                         "read that file, then give it by --adapter")
    for name in ("split", "num_images", "draws", "iw", "jacobians", "codelength", "eval_seed", "threads", "claim", "claim_from", "claim_data"):
        setattr(flags, name, settings.get(name))
    flags.data = flags.data or settings["data"]
    if not flags.adapter:
        path = Path(str(settings["checkpoint"]))
        flags.checkpoint = flags.checkpoint or str(path if path.is_absolute() else ROOT / path)
        if settings["model_flags"] and not flags.given_model_flags:
            parser = ArgumentParser(prog="audit_bpd.py")
            add_config_flags(parser, JetConfig, "model.")
            given = vars(parser.parse_args(list(map(str, settings["model_flags"]))))
            vars(flags).update(given)
            flags.given_model_flags = _model_arguments(given)
    new, _ = run(flags)
    new = json.loads(json.dumps(new))
    changes = recheck(old, new)
    commit = old["made_with"]["git_commit"]
    print(f"{flags.check}: made {old['made']} at commit {str(commit)[:10]}, {old['bits_per_dim']} bits/dim")
    if changes:
        print(f"{len(changes)} changes:")
        for change in changes:
            print(f"  {change}")
        sys.exit(1)
    print("nothing has changed: weights, images, every check and the verdict are as they were")


if __name__ == "__main__":
    main()
