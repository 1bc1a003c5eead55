"""An adapter's number has a file that a fresh process decodes, or the certificate says why not."""
import hashlib
import json

import numpy as np
import pytest
import torch

from audit import adapters, code_length
from audit.protocol import Subject
from audit.request import Request
from convert import load_jet
from data import load_images
from experiments import audit_bpd
from test_audit_corpus import AFFINE, IMAGES
from test_audit_faults import LocalWorker, write_set
from test_audit_process import forks
from test_codec import random_jet
from tests import forked

FAST = ["--draws", "1", "--iw", "1", "--jacobians", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(adapters, "Worker", LocalWorker)


def ended(capsys, *arguments):
    """(exit code, what was printed)."""
    try:
        code = audit_bpd.main([*map(str, arguments)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out + err


def test_a_whole_audit_leaves_a_file_that_decodes(tmp_path, capsys, forks):
    folder, model = write_set(tmp_path / "set", IMAGES[:64], IMAGES[64:80]), tmp_path / "model.py"
    model.write_text(AFFINE)
    code, said = ended(capsys, "--adapter", model, "--data", folder, *FAST, "--codelength", 3, "--out", tmp_path / "out")
    path, = (tmp_path / "out").glob("*.json")
    certificate, file = json.loads(path.read_text()), path.with_suffix(".bits")
    assert code == 0, said
    checks = {one["name"]: one for one in certificate["checks"] if one["section"] == "Code length"}
    assert checks["decoded by a fresh process"]["result"] == "pass" and "not verified" not in said
    assert checks["net"]["value"] == pytest.approx(checks["bound, same images and noise"]["value"], abs=0.01)
    assert certificate["bytes"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert ended(capsys, "--decode", file, "--adapter", model, "--out", tmp_path)[0] is None
    assert np.array_equal(np.load(tmp_path / f"{file.stem}.npy"), IMAGES[64:67])
    damaged = tmp_path / "damaged.bits"
    damaged.write_bytes(file.read_bytes()[:-40])
    (tmp_path / "other.py").write_text(AFFINE.replace("0.48", "0.49"))
    for given, adapter, says in ((damaged, model, "truncated or altered"), (model, model, "not a file of this codec"),
                                 (file, tmp_path / "other.py", "written with another model"),
                                 (tmp_path / "none.bits", model, "No such file")):
        code, said = ended(capsys, "--decode", given, "--adapter", adapter, "--out", tmp_path / "new")
        assert code == 2 and says in said and said.count("\n") == 1
    assert "give the --adapter" in ended(capsys, "--decode", file)[1] and not (tmp_path / "new").exists()


def code_length_of(tmp_path, source, count=2, files=()):
    (tmp_path / "model.py").write_text(source)
    images = load_images(str(write_set(tmp_path / "set", IMAGES[:8], IMAGES[8:12])), "test")
    request = Request(adapter=str(tmp_path / "model.py"), codelength=count, threads=1)
    model, about, _ = adapters.load_model(request)
    model.worker.files = dict.fromkeys(map(str, files), "0" * 64)
    subject = Subject(model, images, {"seed": 0, "draws": 1}, "0" * 32, 1e-3)
    return code_length.check_code_length(subject, model, request, about)


@pytest.mark.parametrize("source, decodes, says", [
    (AFFINE, False, "a fresh process does not decode its file"),
    (AFFINE.replace("-math.log(0.48)", "-math.log(0.2)"), True, "and by its likelihood it should be"),
    (AFFINE.replace("z * 0.48 - 0.05", "z * 0.48 + 0.05"), True, "too far from x"),
    (AFFINE.replace("(x + 0.05) / 0.48", "x / 0"), True, "not finite"),
    (AFFINE.replace("(x + 0.05) / 0.48", "x * 0"), True, "singular")])
def test_what_cannot_be_turned_into_bytes_says_so_and_refutes_nothing(tmp_path, monkeypatch, source, decodes, says):
    monkeypatch.setattr(code_length, "decode_elsewhere",
                        lambda *_: (IMAGES[8:10] if decodes else None, "it is another model"))
    checks, content = code_length_of(tmp_path, source)
    assert [one.result for one in checks] == ["info"] and content is None
    assert checks[0].text.startswith("not verified by bytes: ") and says in checks[0].text


def test_nothing_asked_for_is_not_verified(tmp_path):
    checks, content = code_length_of(tmp_path, AFFINE, 0)
    assert content is None and "not verified by bytes" in checks[0].text and checks[0].result == "n/a"


def test_the_size_of_the_weights_stands_beside_the_file(tmp_path, monkeypatch):
    np.save(tmp_path / "weights.npy", np.zeros(100))
    monkeypatch.setattr(code_length, "decode_elsewhere", lambda *_: (IMAGES[8:10], None))
    checks, content = code_length_of(tmp_path, AFFINE, files=[tmp_path / "weights.npy", tmp_path / "model.py"])
    assert f"of {len(content):,} bytes" in checks[0].text and checks[0].text.endswith(
        f"its weight files have 928, its code {len(AFFINE)}")


def test_a_jet_s_images_come_back_in_another_process_and_cost_what_they_should(tmp_path, monkeypatch):
    monkeypatch.setattr(code_length, "subprocess", forked.SUBPROCESS)  # a fresh one decodes an adapter's, above
    jet, path = random_jet(std=0.02, image_size=8, patch_size=4), tmp_path / "jet.pt"
    for coupling in jet.couplings:  # flat images take less than their pixels
        coupling.net.final_proj.bias.data[24:] = 3.0
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(jet.config)}, "model": jet.state_dict()}, path)
    request = Request(checkpoint=str(path), codelength=40, threads=1, device="cpu")
    images = IMAGES[20:36] // 4 + np.uint8(96)  # the Jet codes one, for the others take less as files
    checks = list(code_length.check_jet(load_jet(path), images, request))
    assert [one.name for one in checks] == ["decoded by a fresh process", "bound, same images and noise", "net", "whole file"]
    assert {one.result for one in checks} == {"pass"} and checks[2].value == pytest.approx(checks[1].value, abs=0.02)
    assert f"the weights' file has {path.stat().st_size:,}" in checks[0].text
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    monkeypatch.setattr(code_length, "decode_elsewhere", lambda *_: (noise, None))
    assert [one.result for one in code_length.check_jet(load_jet(path), noise, request)] == ["pass"]
