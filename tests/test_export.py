"""What goes out comes back: official trees, jet-pytorch, safetensors, a hub; and the card beside it."""
import dataclasses
import http.server
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import export, load_jet, main, opened, weights_id
from formats import hub
from formats.jet_pytorch import jet_pytorch_state
from formats.official import official_tree
from harness.checkpoint import weights_checksum
from harness.errors import CheckpointError
from jet import Jet, JetConfig
import test_conditional
from train import weights_config

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
MODEL = JetConfig(image_size=8, num_couplings=4, kinds=("channels", "spatial"), block_depth=1, emb_dim=8, num_heads=2)


def random_jet(**changes):
    return test_conditional.random_jet(MODEL, **changes)


def same(one, two):
    """Equal weights and configurations, however the equal couplings are written."""
    (one_rest, two_rest) = ({**vars(jet.config), "kinds": 0, "spatial_splits": 0} for jet in (one, two))
    return (weights_checksum(one) == weights_checksum(two) and one_rest == two_rest
            and one.config.coupling_splits == two.config.coupling_splits)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.npz") if "port" not in path.stem))
def test_official_trees_come_back_per_tensor(name):
    theirs = np.load(GOLDEN / f"{name}.npz")
    ours = official_tree(load_jet(GOLDEN / f"{name}.npz"))
    names = {leaf for leaf in theirs if leaf.startswith("params/")}
    assert names == ours.keys() - {"meta_json"}
    for leaf in names:
        assert ours[leaf].dtype == theirs[leaf].dtype and np.array_equal(ours[leaf], theirs[leaf]), leaf


def test_jet_pytorch_comes_back_per_tensor():
    weights = opened(GOLDEN / "jet_pytorch_port.pt")
    theirs, ours = weights.content, jet_pytorch_state(load_jet(weights, num_heads=4))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype for name in theirs)


@pytest.mark.parametrize("format, suffix, changes", [
    ("official", "npz", {}), ("official", "npz", {"context_dim": 3, "scale_factor": 3.0}),
    ("official", "npz", {"image_size": (8, 16), "channels": 1}),
    ("jet-pytorch", "pt", {"gelu": "exact", "norm_eps": 1e-5}),
    ("jet-pytorch", "pt", {"gelu": "exact", "norm_eps": 1e-5, "kinds": JetConfig.kinds, "num_couplings": 6}),
    ("jet-pytorch", "pt", {"gelu": "exact", "norm_eps": 1e-5, "kinds": ("spatial",), "image_size": (8, 16), "scale_factor": 1.5})])
def test_ours_comes_back_from_other_formats(tmp_path, format, suffix, changes):
    jet, path = random_jet(**changes), tmp_path / f"jet.{suffix}"
    assert same(load_jet(path, **export(jet, path, format)), jet)


@pytest.mark.parametrize("changes", [{}, {"context_dim": 3, "block": "cnn", "split_mode": "masking", "norm_eps": 1e-4},
                                     {"actnorm": True, "invertible_dense": True, "gelu": "exact", "image_size": (8, 16)}])
def test_safetensors_hold_every_jet_with_its_configuration(tmp_path, changes):
    pytest.importorskip("safetensors")
    jet, path = random_jet(**changes), tmp_path / "jet.safetensors"
    assert export(jet, path, "safetensors") == {}
    loaded = load_jet(path)
    assert loaded.config == jet.config and weights_checksum(loaded) == weights_checksum(jet)
    with pytest.raises(CheckpointError, match="num_heads=4 was given, but the file says 2"):
        load_jet(path, num_heads=4)


@pytest.mark.parametrize("format, changes, line", [
    ("official", {"block": "cnn"}, "block='cnn': the official model has 'vit' alone"),
    ("official", {"gelu": "exact"}, "gelu='exact': the official model has 'tanh' alone"),
    ("official", {"actnorm": True}, "actnorm=True"), ("official", {"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ("official", {"split_mode": "masking"}, "split_mode='masking'"),
    ("official", {"invertible_dense": True}, "invertible_dense=True"),
    ("jet-pytorch", {}, "gelu='tanh': jet-pytorch has 'exact' alone: export it as safetensors"),
    ("jet-pytorch", {"gelu": "exact", "norm_eps": 1e-5, "context_dim": 3}, "context_dim=3: jet-pytorch has 0")])
def test_what_a_format_cannot_hold_is_refused_by_name(tmp_path, format, changes, line):
    path = tmp_path / {"official": "jet.npz", "jet-pytorch": "jet.pt"}[format]
    with pytest.raises(CheckpointError, match=line):
        export(random_jet(**changes), path, format)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_file_and_a_card_with_the_runs_numbers(tmp_path, capsys):
    run = ROOT / "assets/jet_cifar10"
    done = json.loads((run / "done.json").read_text())
    main(["export", str(run), str(tmp_path / "jet.npz"), "--format", "official"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "jet.npz"), str(tmp_path / "jet.md")]
    assert same(load_jet(tmp_path / "jet.npz"), load_jet(run))
    card = (tmp_path / "jet.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for text in (f"{done['bits_per_dim']:.4f} ± {done['bits_per_dim_se']:.4f}", "10,000 test images", done["test_fingerprint"],
                 done["weights_sha256"], done["git_commit"], "variant cifar10", "| audit |", "load_jet('jet.npz')"):
        assert text in card, text


def test_a_card_claims_nothing_that_no_run_recorded(tmp_path, capsys):
    main(["export", str(GOLDEN / "jet_pytorch_port.pt"), str(tmp_path / "jet.pt"), "--format", "jet-pytorch", "--model.num_heads", "4",
          "--card", str(tmp_path / "README.md"), "--license", "mit"])
    card = (tmp_path / "README.md").read_text()
    assert card.count("not recorded: these weights are of no finished run of ours") == 3
    assert "license: mit" in card and "none of these weights" in card and "load_jet('jet.pt', num_heads=4)" in card


@pytest.mark.parametrize("arguments, line", [
    (["jet.txt", "--format", "official"], r"jet.txt: must end in .npz, as official files do"),
    (["none/jet.npz", "--format", "official"], "there is no folder none"),
    (["jet.npz", "--format", "official", "--card", "jet.npz"], "--card jet.npz: must end in .md")])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=line):
        main(["export", str(GOLDEN / "conditional_label.npz"), *arguments])
    assert not list(tmp_path.iterdir())


# ---- a hub

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository, of two revisions."""
    commits, files = {"main": "a" * 40, "v1": "b" * 40}, {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        for revision, commit in self.commits.items():
            for known in {revision, commit}:
                names = sorted(self.files[revision])
                if path == f"api/models/some/jet/revision/{known}" or (path, revision) == ("api/models/some/jet", "main"):
                    siblings = [{"rfilename": name} for name in names]
                    return self.answer(json.dumps({"id": "some/jet", "sha": commit, "siblings": siblings, "private": False,
                                                   "tags": [], "downloads": 0, "likes": 0}).encode(), commit)
                if path == f"api/models/some/jet/tree/{known}":
                    tree = [{"type": "file", "path": name, "oid": "c" * 40, "size": len(self.files[revision][name])} for name in names]
                    return self.answer(json.dumps(tree).encode(), commit)
                for name in names:
                    if path == f"some/jet/resolve/{known}/{name}":
                        return self.answer(self.files[revision][name], commit)
        self.answer(b'{"error": "not found"}', "", 404)

    def answer(self, content, commit, code=200):
        self.send_response(code)
        for name, value in (("Content-Length", len(content)), ("X-Repo-Commit", commit), ("Content-Type", "application/json"),
                            ("ETag", f'"{len(content)}-{commit[:3]}"'), *([("X-Error-Code", "RepoNotFound")] if code == 404 else [])):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A local hub at HF_ENDPOINT: the official tree of one Jet, and at v1 of another."""
    constants = pytest.importorskip("huggingface_hub.constants")
    jets = {"main": random_jet(), "v1": random_jet(context_dim=3)}
    for revision, jet in jets.items():
        export(jet, tmp_path / f"{revision}.npz", "official")
        Hub.files[revision] = {"jet.npz": (tmp_path / f"{revision}.npz").read_bytes(), "README.md": b"# a card",
                               "modeling.py": b"raise SystemExit('it was run')"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield jets
    server.shutdown()
    server.server_close()


def test_a_jet_comes_from_a_hub_at_a_revision(served):
    assert same(load_jet("hf://some/jet"), served["main"])
    assert same(load_jet(Path("hf://some/jet@v1")), served["v1"])  # a Path has one slash
    assert weights_id("hf://some/jet@v1").startswith("sha256-") and weights_config("hf://some/jet") == (None, None)


def test_what_a_hub_does_not_have_is_one_line(served):
    with pytest.raises(CheckpointError, match=r"^hf://some/other: \w+NotFound") as error:
        load_jet("hf://some/other")
    assert "\n" not in str(error.value)
    Hub.files["main"]["other.pt"] = b""
    with pytest.raises(CheckpointError, match=r"has 2 weight files \(jet.npz, other.pt\): must hold one"):
        load_jet("hf://some/jet@main")
    Hub.files["main"] = {"pickle.pt": b"cos\nsystem\n(S'touch /tmp/run'\ntR."}
    hub._fetch.cache_clear()
    with pytest.raises(CheckpointError, match="pickle.pt"):
        load_jet("hf://some/jet")


@pytest.mark.parametrize("address", ["hf://jet", "hf://a/b/c", "hf://a/b@", "hf://../b@x y"])
def test_an_address_of_no_repository_is_refused(address):
    with pytest.raises(CheckpointError, match="must be hf://OWNER/NAME"):
        load_jet(address)


def test_without_its_package_a_hub_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub: pip install huggingface_hub"):
        load_jet("hf://none/here")
