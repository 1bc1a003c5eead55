"""An adapter has a process of its own: its folder is at hand there, the auditor is out of reach."""
import hashlib
import json
import sys

import numpy as np
import pytest
import torch

from audit import adapters
from audit.adapters import Adapter
from audit.checks import AuditError
from experiments import audit_bpd
from test_audit_corpus import AFFINE
from test_audit_faults import FAST, IMAGES, write_set
from tests import forked


def make(folder, source):
    (folder / "model.py").write_text(source)
    return folder / "model.py"


@pytest.fixture
def forks(monkeypatch):
    """Its processes need not be fresh: they begin as forks of this one, which has imported torch."""
    monkeypatch.setattr(adapters, "subprocess", forked.SUBPROCESS)


def is_confined():
    import ctypes
    return ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


def test_its_folder_is_importable_and_its_data_is_its_own_and_its_files_are_hashed(tmp_path, forks, monkeypatch):
    monkeypatch.delitem(sys.modules, "data")  # as in a new process
    (tmp_path / "data.py").write_text("SCALE = 0.25")
    (tmp_path / "late.py").write_text("ONE = 1")
    torch.save({"shift": torch.ones(1)}, tmp_path / "weights.pt")
    np.save(tmp_path / "more.npy", np.ones(3))
    adapter = Adapter(make(tmp_path, """
import numpy as np, torch
from pathlib import Path
from data import SCALE
shift = torch.load(Path(__file__).parent / "weights.pt")["shift"]
np.load(Path(__file__).with_name("more.npy"))
def forward(x):
    import late
    print("certified", flush=True)
    return x / SCALE + shift.to(x), -np.log(SCALE) * x.flatten(1).shape[1] * torch.ones_like(x[:, 0, 0, 0])
def inverse(z):
    return (z - shift.to(z)) * SCALE, np.log(SCALE) * z.flatten(1).shape[1] * torch.ones_like(z[:, 0, 0, 0])
""")).double()
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    z, logdet = adapter(x)
    assert torch.equal(z, x / 0.25 + 1) and logdet == pytest.approx(np.log(4) * 48)
    digests = {one["path"].rpartition("/")[2]: one["sha256"] for one in adapter.files()}
    for name in ("data.py", "late.py", "weights.pt", "more.npy"):
        assert digests[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.skipif(not is_confined(), reason="no Landlock here")
def test_it_can_neither_write_to_files_nor_reach_the_auditor(tmp_path, forks):
    adapter = Adapter(make(tmp_path, f"""
import os, torch, tempfile
from pathlib import Path
def attempt(work):
    try:
        work()
        return 1.0
    except OSError:
        return 0.0
def forward(x):
    done = [attempt(lambda: Path({str(tmp_path)!r}, "left").write_text("z")),
            attempt(lambda: open(__file__, "a")), attempt(lambda: os.kill(os.getppid(), 0)),
            attempt(lambda: open(f"/proc/{{os.getppid()}}/mem", "r+b")),
            attempt(lambda: tempfile.TemporaryFile(dir=os.environ["TMPDIR"]).write(b"x"))]
    return x, x.new_tensor(done)
inverse = forward
"""))
    _, done = adapter(torch.zeros(5, 1, 1, 1))
    assert done.tolist()[:4] == [0, 0, 0, 0] and done[4] == 1
    assert not (tmp_path / "left").exists()


def test_answers_of_no_use_are_one_line(tmp_path, forks, monkeypatch):
    monkeypatch.setattr(adapters.subprocess, "Popen", lambda command, env, **how: forked.popen(
        command, {**env, "ANSWERS": command[4]}, **how))
    adapter = Adapter(make(tmp_path, """
import os, torch
def forward(x):
    if len(x) == 1:
        return x.float(), x.float().sum((1, 2, 3))
    if len(x) == 5:
        return x.double(), x.double().sum((1, 2, 3))
    if len(x) == 2:
        return x
    if len(x) == 3:
        return torch.nn.Linear(4, 4)(x), x[:, 0, 0, 0]
    os.write(int(os.environ["ANSWERS"]), b"[[[[")
    os._exit(0)
inverse = forward
"""))
    with pytest.raises(AuditError, match="must return"):
        adapter(torch.zeros(5, 3, 4, 4))
    assert adapter(torch.ones(5, 3, 4, 4, dtype=torch.float64))[1].tolist() == [48.0] * 5
    for count, says in enumerate(["must return", "not a pair", "type of x", "process ended"], 1):
        with pytest.raises(AuditError, match=says) as raised:
            adapter(torch.zeros(count, 3, 4, 4, dtype=torch.float64))
        assert "\n" not in str(raised.value)


def test_weights_that_it_names_are_hashed_whatever_reads_them(tmp_path, forks):
    (tmp_path / "weights").write_bytes(b"read by a library of its own")
    adapter = Adapter(make(tmp_path, AFFINE + 'WEIGHTS = ["weights", "not there"]'))
    digests = {one["path"].rpartition("/")[2]: one["sha256"] for one in adapter.files()}
    assert digests["weights"] == hashlib.sha256(b"read by a library of its own").hexdigest()
    assert "not there" not in digests


@pytest.mark.parametrize("source, limit", [("import time\ntime.sleep(99)", 0.3), (AFFINE + """
def forward(x):
    import os, time
    os.fork()
    time.sleep(99)
""", 2)], ids=["when it is read", "when it is asked"])
def test_one_that_hangs_is_ended_in_one_line(tmp_path, forks, source, limit):
    with pytest.raises(AuditError, match=f"took longer than {limit} s, and was ended: allow more by --adapter-limit"):
        Adapter(make(tmp_path, source), limit=limit)(torch.zeros(2, 3, 4, 4))


def test_a_whole_audit_of_an_adapter_and_its_check(tmp_path, capsys, forks):
    folder = write_set(tmp_path / "set", IMAGES[:96], IMAGES[96:])
    model = make(tmp_path, AFFINE)
    command = ["--adapter", str(model), "--data", str(folder), *FAST, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(command)
    assert ended.value.code == 0 and capsys.readouterr().out.endswith("\ncertified\n")
    path, = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["weights"]["kind"] == "adapter"
    with pytest.raises(SystemExit) as ended:
        audit_bpd.main(["--check", str(path), "--adapter", str(model)])
    assert ended.value.code == 0 and "nothing has changed" in capsys.readouterr().out
