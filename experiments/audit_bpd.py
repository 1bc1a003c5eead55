"""Settle a claim of bits per dimension: checks that no model can prepare for, and a certificate.

    python experiments/audit_bpd.py           # the small model of assets/, minutes on a laptop
    python experiments/audit_bpd.py --checkpoint RUN --data cifar10 --data-root DIR --claim 3.65
    python experiments/audit_bpd.py --data cifar10 --data-root DIR --claim-from Glow
    python experiments/audit_bpd.py --adapter experiments/adapter_example.py    # no Jet
    python experiments/audit_bpd.py --check results/audits/NAME.json   # what has changed since?

--checkpoint: a run folder or any file that load_jet takes. --claim: a number with the digits it was
published with; 3.66 is the interval from 3.655 to 3.665, widened by two errors of the noise.
--claim-from: a row of results/reported.csv. The certificate (JSON), the same as a page (Markdown)
and the values of every image (CSV) go to results/audits/. The last line is the outcome: certified
(ends with 0), refuted: by what (1), not certified: what could not be checked (3). What cannot be
audited at all is one line, and ends with 2. docs/audit.md explains the ideas.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads must not spin where others work
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np

from audit import certificates
from audit.against import against
from audit.audit import audit
from audit.checks import AuditError
from audit.code_length import restore
from audit.outcome import (
    EXIT_CODES, REFUTED, conclusion, outcome_line, show, show_check, show_outcome, wrap)
from audit.request import PLACES, RECORDED, Request
from harness.errors import printable
from harness.files import write_atomically
from harness.flags import ArgumentParser, add_setting_flags, one_line_errors
from harness.host import ROOT
from jet import JetConfig
from paper_figures.tables import REPORTED, read_reported


def run(request):
    """audit() with its checks on the terminal as they are made."""
    reported = read_reported(REPORTED) if request.claim_from else ()
    return audit(request, reported, tell=show_check)


def verify(path, flags):
    """--check: the audit of a certificate again; (the outcome, its line)."""
    if given := [name for name in (*RECORDED, "against") if name in flags and name not in PLACES]:
        raise AuditError(f"--{given[0].replace('_', '-')}: with --check the certificate says it: "
                         "leave it out")
    old = certificates.read_certificate(path)
    if old["weights"]["kind"] == "adapter" and "adapter" not in flags:
        raise AuditError(f"{path} is of an adapter, {old['weights']['path']}, and no certificate "
                         "makes this program run code: read that file, then give it by --adapter")
    try:
        request = Request.from_settings(old["settings"], flags)
    except AuditError as error:
        raise AuditError(f"{path}: {error}") from None
    certificate, _ = run(request)
    changes = certificates.changes(old, json.loads(json.dumps(certificate)))
    commit = old["made_with"]["git_commit"][:10]
    show("\n".join(wrap(printable(f"{path}: made {old['made']} at commit {commit}, "
                                  f"{old['bits_per_dim']} bits/dim"))))
    if not changes:
        show("nothing has changed: weights, images, checks and outcome are as they were")
        return certificate["outcome"], outcome_line(certificate)
    show("\n  ".join([f"{len(changes)} changes:", *map(printable, changes)]))
    return REFUTED, f"{REFUTED}: the certificate, by {len(changes)} changes"


def make(flags):
    """An audit and its certificate; (the outcome, its line)."""
    request, out = Request.from_flags(flags), flags["out"]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # whether one can write there, before the work
        pass
    certificate, measured = run(request)
    show(conclusion(certificate))
    if request.against and measured:
        show("\n".join(wrap(against(request, measured, certificate["data"]))))
    show("\n".join(map(str, certificates.write(certificate, measured, out))))
    return certificate["outcome"], outcome_line(certificate)


def decode(path, flags):
    """--decode: the images that an audit of an adapter left in bytes, as NAME.npy."""
    if "adapter" not in flags:
        raise AuditError(f"--decode {path}: give the --adapter that it was encoded with")
    images, out = restore(path, Request.from_flags(flags)), flags["out"] / f"{path.stem}.npy"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: np.save(file, images))
    show(f"{out}: {len(images):,} images, pixels as encoded")


def main(arguments=None):
    parser = ArgumentParser(prog="audit_bpd.py", description=__doc__)
    add_setting_flags(parser.add_argument_group("what is audited, and how"), Request, dashes=True)
    parser.add_argument("--out", type=Path, default=ROOT / "results/audits", metavar="DIR",
                        help="default: results/audits")
    parser.add_argument("--check", type=Path, metavar="CERTIFICATE", default=argparse.SUPPRESS,
                        help="verify a certificate: audit again, and say what changed")
    parser.add_argument("--decode", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                        help="only restore the images that an --adapter's audit left in FILE")
    model = parser.add_argument_group("the model, as far as a file of another implementation "
                                      "does not tell it")
    add_setting_flags(model, JetConfig, "model.")
    flags = vars(parser.parse_args(arguments))
    with one_line_errors(parser.prog, code=2):
        if "decode" in flags:
            return decode(flags["decode"], flags)
        outcome, line = verify(flags["check"], flags) if "check" in flags else make(flags)
        show_outcome(outcome, line)
        sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main()
