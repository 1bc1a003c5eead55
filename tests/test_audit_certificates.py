"""A certificate from someone who wants it to be believed: sealed anew, it is refused, or compared."""
import json
import math
import os
import re
import resource
import sys
import time

import pytest

import kernels
from audit import adapters, certificates
from audit.request import CLAIMS, Request
from data import load_images
from experiments import audit_bpd
from harness import files
from harness.errors import printable
from harness.flags import one_line_errors
from test_audit_faults import FAST, make_run, write_set
from tests import forked

NULL = {  # fields that may be null
    "bits_per_dim", "bits_per_dim_se", "noise_se", "verdict", "checks.0.value", "weights.config",
    "made_with.git_dirty", "settings.jacobians",
    *(f"settings.{name}" for name in ("adapter", "num_images", *CLAIMS))}
OPTIONAL = {  # that not every audit has
    "per_image", "weights.config_sha256", "weights.num_params", "verdict.outside",
    "verdict.standard_errors", "verdict.mistakes", "verdict.standard_error",
    "verdict.precision_error"}
ODD = [None, True, -1, 0.5, 10 ** 400, math.nan, -math.inf, "", "x", "x\x1b[2J", "\ud800", "a" * 5000,
       [], [[["x"]]], {}, {"x": 1}]


@pytest.fixture(scope="module", autouse=True)
def plain():
    """No C kernels, which would be compiled in float64 first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "supports", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """(the certificate of a whole audit, its path)."""
    folder = tmp_path_factory.mktemp("made")
    images = load_images("cifar10-subset", "test").array[:60, :8, :8]
    write_set(folder / "set", images[:40], images[40:])
    make_run(folder / "run", folder / "set")
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(["--checkpoint", f"{folder}/run", "--data", f"{folder}/set", *FAST,
                        "--claim", "8.6", "--out", str(folder)])
    path, = folder.glob("*.json")
    assert ended.value.code == 0
    return json.loads(path.read_text()), path


@pytest.fixture
def check(made, tmp_path, capsys):
    """(exit code, what was printed) of --check for a certificate, sealed anew."""
    def run(certificate, *flags):
        path = tmp_path / "certificate.json"
        if isinstance(certificate, dict):
            certificate["sha256"] = certificates.seal(certificate)
        path.write_text(json.dumps(certificate))
        return ended("--check", path, *flags)

    def ended(*arguments):
        code = 0
        try:
            audit_bpd.main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, (out + err).rstrip("\n") if code == 2 else out + err
    run.ended = ended
    return run


def altered(certificate, path, value):
    """A copy in which the part at a path ("settings.draws") is another, or missing (KeyError)."""
    certificate = json.loads(json.dumps(certificate))
    part, (*names, last) = certificate, path.split(".")
    for name in names:
        part = part[int(name) if isinstance(part, list) else name]
    last = int(last) if isinstance(part, list) else last
    if value is KeyError:
        del part[last]
    else:
        part[last] = value
    return certificate


def parts(value, path=""):
    """(path, value) of all parts, one item of each list."""
    if path:
        yield path.lstrip("."), value
    items = enumerate(value[:1]) if isinstance(value, list) else ()
    for name, part in value.items() if isinstance(value, dict) else items:
        if path != ".weights.config":  # it is compared by the weights' own checksum
            yield from parts(part, f"{path}.{name}")


def is_wrong(path, right, value):
    """Whether a value is of no type that the field can have."""
    if value is None:
        return path not in NULL
    if path == "weights.config":
        return not isinstance(value, dict)
    if path in ("checks.0.value", "checks.0.drift") and value in ("", "x", -1, 0.5):
        return False
    if path.startswith("settings.") and right is None:
        return not isinstance(value, str) or not value.isprintable()
    is_number = type(right) in (int, float)
    if is_number and type(value) in (int, float):
        is_whole = type(right) is int and path != "made_with.seconds"
        return not abs(value) < 1e300 or is_whole and not value == int(value) or is_whole and value < 0
    if isinstance(right, list):
        is_known = path in ("settings.model_flags", "data.shape", "verdict.interval")
        return not (isinstance(value, list) and (is_known and value == [] or value == right))
    if isinstance(right, str) and isinstance(value, str):
        is_checksum = path.endswith(("sha256", "fingerprint"))
        return not value.isprintable() or len(value) > 4000 or is_checksum
    return type(value) is not type(right) or isinstance(right, dict)


def test_every_field_of_a_wrong_type_is_refused_in_one_line_before_any_work(made, monkeypatch):
    monkeypatch.setattr(audit_bpd, "run", lambda request: sys.exit("worked"))
    monkeypatch.setattr(files, "read_bytes", lambda *_: sealed)  # to write so many takes as long as the rest
    count, faults = 0, []
    short = {**made[0], "checks": [one for one in made[0]["checks"] if one["result"] == "pass"][:1]}
    del short["sha256"]  # which is made anew
    sealed = json.dumps({**short, "sha256": certificates.seal(short)}).encode()
    with pytest.raises(SystemExit, match="worked"):
        audit_bpd.verify("certificate.json", {})
    for path, right in parts(short):
        for value in [*ODD, KeyError]:
            is_missing = value is KeyError and path not in OPTIONAL and path[-1] != "0"
            if is_missing or value is not KeyError and is_wrong(path, right, value):
                certificate = altered(short, path, value)
                sealed = json.dumps({**certificate, "sha256": certificates.seal(certificate)}).encode()
                with pytest.raises(SystemExit) as ended, one_line_errors("audit_bpd.py"):
                    audit_bpd.verify("certificate.json", {})
                said, count = str(ended.value.code), count + 1
                if "error: " not in said or len(said) > 2200 or not said.isprintable():
                    faults.append((path, value, said[-300:]))
    assert not faults and count > 500


@pytest.mark.parametrize("where", ["", "settings", "weights", "data", "verdict", "checks.0", "made_with"])
def test_what_is_too_much_is_refused(made, check, monkeypatch, where):
    monkeypatch.setattr(audit_bpd, "run", lambda request: pytest.fail("worked"))
    code, said = check(altered(made[0], f"{where}.more".lstrip("."), 1))
    assert code == 2 and "more is missing, too much or no such value" in said and "\n" not in said


@pytest.mark.parametrize("settings, says", [
    *[({"model_flags": flags}, "its model_flags are none") for flags in (
        ["--help"], ["-h"], ["--model.num_couplings", "5", "--help"], ["--draws", "1"], ["x"],
        ["--model.emb_dim", "x"], ["--model.emb_dim"], ["--"] * 3 + ["x"], ["--check", "x"])],
    ({"model_flags": ["--model.num_couplings", "10000000"]}, "do not fit|the file says"),
    ({"model_flags": ["--model.image_size", "1000000", "1000000"]}, "the file says"),
    ({"draws": 10 ** 9}, "draws=1000000000: must be from 1 to 10000"),
    ({"draws": 0}, "draws=0: must be"), ({"iw": 10 ** 9}, "iw=1000000000: must be"),
    ({"threads": 10 ** 6}, "threads=1000000: must be from 1 to 1024"),
    ({"jacobians": 10 ** 6}, "jacobians=1000000: must be from 0 to 16"),
    ({"codelength": 10 ** 12}, "codelength=1000000000000: must be"),
    ({"num_images": 10 ** 12}, "num_images=1000000000000: .* has 20"),
    ({"num_images": 1}, "num_images=1: must be"), ({"eval_seed": 10 ** 30}, "eval_seed=1"),
    ({"split": "validation"}, "split='validation': must be"),
    ({"data": "nowhere"}, "neither a known set"), ({"data": "/dev/zero"}, "neither a known set"),
    ({"checkpoint": "/dev/zero"}, "no regular file"), ({"checkpoint": "nowhere"}, "no such file"),
    *[({"claim": claim}, "--claim .*: must be bits/dim") for claim in (
        "", "x", "nan", "inf", "1e3", "-3", "0", "0.0", "3.66 ", "9" * 400, "3." + "6" * 400, "1e-400")],
    ({"claim": None, "claim_data": "cifar10"}, "of which claim"),
    ({"claim": None, "claim_from": "Nobody's"}, "no model of results/reported.csv"),
    ({"claim_from": "Glow"}, "give one of them"), ({"claim_data": "mnist"}, "no known set"),
    ({"adapter": "/tmp/adapter.py"}, "not those of a jet"),
    ({"adapter": "/tmp/adapter.py", "checkpoint": None}, "not those of a jet"),
    ({"checkpoint": None}, "not those of a jet")], ids=str)
def test_settings_that_no_audit_can_have_are_refused_at_once(made, check, settings, says):
    certificate = json.loads(json.dumps(made[0]))
    certificate["settings"] |= settings
    begun, before = time.process_time(), peak_mib()
    code, said = check(certificate)
    assert code == 2 and said.isprintable() and len(said) < 2200, said
    assert re.search(says, said), said
    assert time.process_time() - begun < 5 and peak_mib() - before < 200


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("flag, value", [
    ("draws", 10 ** 9), ("draws", 0), ("draws", "many"), ("iw", 10 ** 9), ("threads", 10 ** 6),
    ("threads", 0), ("num-images", 0), ("num-images", 10 ** 12), ("jacobians", 10 ** 9),
    ("codelength", -1), ("codelength", 10 ** 12), ("eval-seed", 10 ** 30), ("eval-seed", -1),
    ("claim", "9" * 400), ("claim", "nan"), ("split", "all"), ("model.num_couplings", 10 ** 9),
    ("model.block_depth", 10 ** 9), ("model.scale_factor", "1e999"), ("data", ""),
    ("checkpoint", "/dev/zero"), ("adapter", "/dev/zero"), ("adapter", "nowhere.py")])
def test_the_same_on_the_command_line(made, check, flag, value):
    begun, before = time.process_time(), peak_mib()
    places = [] if flag == "adapter" else ["--checkpoint", made[1].parent / "run"]
    code, said = check.ended(*places, "--data", made[1].parent / "set", f"--{flag}", value)
    assert code == 2 and said.count("\n") <= 1 and printable(said.rstrip("\n")) == said.rstrip("\n")
    assert "error: " in said and time.process_time() - begun < 5 and peak_mib() - before < 200


def test_a_flag_that_the_certificate_decides_is_refused(made, check):
    code, said = check(made[0], "--draws", "2")
    assert code == 2 and "--draws: with --check the certificate says it" in said


@pytest.mark.parametrize("path, value", [
    ("bits_per_dim", 1.0), ("bits_per_dim", None), ("bits_per_dim_se", 0.0), ("noise_se", 0.5),
    ("data.num_images", 10), ("data.name", "cifar10"), ("data.split", "train"),
    ("data.variant", "oord"), ("data.whole_split", False), ("data.shape", [64, 64, 3]),
    ("verdict", None), ("verdict.claim", "8.4"), ("verdict.result", "reproduced!"),
    ("verdict.dataset", "imagenet64-oord"), ("verdict.model", "Glow"),
    ("weights.weights_sha256", "0" * 64), ("data.fingerprint", "0" * 64)])
def test_a_headline_that_is_not_what_is_measured_is_a_change(made, path, value):
    assert len(certificates.changes(altered(made[0], path, value), made[0])) >= 1
    assert certificates.changes(made[0], made[0]) == []


def test_a_certificate_is_verified(made, check):
    code, said = check(made[0], "--device", "cpu")
    assert code == 0 and "nothing has changed" in said and said.endswith("\ncertified\n")


def test_a_wrong_headline_and_a_wrong_value_fail_the_check(made, check):
    certificate = altered(made[0], "bits_per_dim", 1.0)
    row = next(one for one in certificate["checks"] if one["name"] == "bits/dim")
    row["value"] -= 0.01
    code, said = check(certificate)
    assert code == 1 and "2 changes:\n  bits_per_dim: 1.0 then, 8." in said
    assert "\n  Estimate: bits/dim: 8." in said


def test_a_certificate_without_its_seal_is_refused(made, check, tmp_path):
    (tmp_path / "altered.json").write_text(json.dumps(altered(made[0], "bits_per_dim", 1.0)))
    code, said = check.ended("--check", tmp_path / "altered.json")
    assert code == 2 and "altered since it was made" in said


def test_checks_that_are_gone_or_do_not_fit_are_refused(made, check):
    assert check({**made[0], "checks": []})[0] == 2
    assert check({**made[0], "outcome": "not certified"})[0] == 2
    assert check(altered(made[0], "checks.0.result", "FAIL"))[0] == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_a_certificate_that_is_no_file_of_ours_is_refused(check, tmp_path, kind):
    path = tmp_path / "c.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"[" + b"{}," * 2 ** 24 + b"1]")
    before = peak_mib()
    code, said = check.ended("--check", path)
    assert code == 2 and "\n" not in said and peak_mib() - before < 200


@pytest.mark.parametrize("source", ["exit(0)", "import sys\nsys.exit()", "raise SystemExit(0)",
                                    "def forward(x): exit(0)\ndef inverse(z): return z, z[:, 0, 0, 0]",
                                    "def forward(x): 1 / 0\ndef inverse(z): return z, z"])
def test_an_adapter_that_ends_the_program_has_not_passed(made, check, tmp_path, monkeypatch, source):
    monkeypatch.setattr(adapters, "subprocess", forked.SUBPROCESS)
    (tmp_path / "adapter.py").write_text(source)
    code, said = check.ended("--adapter", tmp_path / "adapter.py", "--data", made[1].parent / "set", *FAST)
    assert code == 2 and "--adapter" in said


def test_the_committed_certificates_have_these_fields():
    folder = audit_bpd.ROOT / "results/audits"
    found = [certificates.read_certificate(path) for path in folder.glob("*.json")]
    assert found and all(Request.from_settings(one["settings"], {}) for one in found)
