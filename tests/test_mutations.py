"""Mutated files of every format that the project reads end in a result or in one line.

JET_MUTATIONS=N mutates each of them N times (else a few times), from JET_MUTATIONS_SEED on (else 0).
"""
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import codec
import convert
import evaluate
import train
from audit import adapters, certificates
from data import fingerprint
from experiments import audit_bpd, plot_run, throughput
from grid_rows import grid_rows
from harness import files
from harness.claim import this_machine
from jet import Jet, JetConfig
from paper_figures import figure3, figure4, figure5, style, tables
from paper_figures import throughput as throughput_figure
from tests import forked

ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden"
COUNT = int(os.environ.get("JET_MUTATIONS", 1))
FIRST = int(os.environ.get("JET_MUTATIONS_SEED", 0))
MAX_S, MAX_BYTES = 10, 2 ** 30
MODEL = {"image_size": 8, "patch_size": 4, "num_couplings": 2, "block_depth": 1, "emb_dim": 4,
         "num_heads": 2}
TRAIN = ["--batch_size", "4", "--total_steps", "4", "--lr", "1e-3", "--seed", "3",
         *(word for name, value in MODEL.items() if name != "image_size"
           for word in (f"--model.{name}", str(value)))]
FAST = ["--codelength", "0", "--draws", "1", "--iw", "1", "--jacobians", "1", "--threads", "1"]
ADAPTER = """
def forward(x):
    return x * 2, x.new_full((len(x),), 0.6931471805599453 * x[0].numel())
def inverse(z):
    return z / 2, z.new_full((len(z),), -0.6931471805599453 * z[0].numel())
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Adapters begin as forks, and of figures all is drawn but the pixels, where it comes to stand."""
    def save(figure, *_):
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
        style.plt.close(figure)
        return []
    monkeypatch.setattr(style, "save", save)
    monkeypatch.setattr(adapters, "subprocess", forked.SUBPROCESS)


# ---- what is mutated: one whole file of each format, and the command that reads it

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one file of each format."""
    folder = tmp_path_factory.mktemp("whole")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    (folder / "set").mkdir()
    for split, part in (("train", images[:12]), ("test", images[12:])):
        np.save(folder / "set" / f"{split}.npy", part)
    prints = {"train": fingerprint(images[:12]), "test": fingerprint(images[12:])}
    (folder / "set/manifest.json").write_text(json.dumps(
        {"name": "corners", "variant": "8px", "fingerprints": prints}))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_runs(folder)
        codec.main(["encode", "--checkpoint", f"{folder}/done", "--data", f"{folder}/set",
                    "--out", f"{folder}/images.jet", "--threads", "1"])
        with contextlib.suppress(SystemExit):
            audit_bpd.main(["--checkpoint", f"{folder}/done", "--data", f"{folder}/set", *FAST,
                            "--claim", "8.56", "--out", f"{folder}/audits"])
    next((folder / "audits").glob("*.json")).rename(folder / "certificate.json")
    (folder / "stopped/claim.json").write_text(json.dumps(
        {"host": "a", "pid": 1, "machine": this_machine(), "started": 1, "job": None,
         "token": "t"}))
    os.utime(folder / "stopped/claim.json", (1, 1))
    torch.manual_seed(0)
    jet = Jet(JetConfig(**MODEL))
    torch.save({"state_dict": jet.state_dict()}, folder / "state.pt")
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file
        save_file(jet.state_dict(), folder / "weights.safetensors")
    for name, source, shape in (("official.npz", "jet_nonsquare_ext.npz", (24, 16)),
                                ("port.pt", "jet_pytorch_port.pt", (16, 16))):
        shutil.copy(GOLDEN / source, folder / name)
        np.save(folder / f"{name}.npy", np.zeros((2, *shape, 3), np.uint8))
    (folder / "adapter.py").write_text(ADAPTER)
    for name, scale in (("ablate_coupling", "smoke"), ("main_results", "small"),
                        ("scaling", "small")):
        grid_rows(name, scale).to_csv(folder / f"{name}_{scale}.csv", index=False)
    shutil.copy(ROOT / "results/throughput_cpu.csv", folder / "throughput_cpu.csv")
    shutil.copy(ROOT / "results/reported.csv", folder / "reported.csv")
    np.savez(folder / "samples.npz", samples=images[:8], about=np.array(json.dumps(
        {"run_id": "a_1", "dataset": "cifar10", "weights": "sha256-0", "seed": 0,
         "temperature": 1.0})))
    return folder


def make_runs(folder):
    """done, a finished run, and stopped, one with two checkpoints."""
    train.main([*TRAIN, "--data", f"{folder}/set", "--run-dir", f"{folder}/done"])
    flags = {"data": f"{folder}/set", "batch_size": 4, "total_steps": 4, "lr": 1e-3, "seed": 3}
    flags |= {f"model.{name}": value for name, value in MODEL.items() if name != "image_size"}
    config = train.config_from_flags(flags)
    for steps in (1, 2):
        train.train(config, folder / "stopped", stop_after=steps, quiet=True)


def evaluated(path, *flags):
    images = path.with_name(f"{path.name}.npy")
    images = images if images.exists() else path.with_name("set")
    evaluate.main([str(path), "--data", str(images), *flags])


def trained(path):
    train.main([*TRAIN, "--data", str(path.parents[1] / "set"), "--run-dir", str(path.parent)])


def begun_with(path):
    train.main(["--batch_size", "4", "--total_steps", "1", "--lr", "1e-3", "--model.num_heads", "2",
                "--data", f"{path.parent}/set", "--init-from", str(path), "--run-dir",
                f"{path.parent}/fresh-{time.monotonic_ns()}"])


def decoded(path):
    codec.main(["decode", str(path), "--checkpoint", f"{path.parent}/done", "--out",
                f"{path.parent}/decoded.npy", "--threads", "1"])


def audited(path):
    audit_bpd.main(["--adapter", str(path), "--data", f"{path.parent}/set", *FAST,
                    "--out", f"{path.parent}/audits"])


def audited_run(path):
    audit_bpd.main(["--checkpoint", str(path.parent), "--data", f"{path.parents[1]}/set", *FAST,
                    "--out", f"{path.parents[1]}/audits"])


def drawn(draw):
    def command(path):
        draw(["--csv", str(path), "--out", f"{path.parent}/drawn"])
    return command


def main_of(module, name, draw, **settings):
    return drawn(lambda flags: module.style.main(f"{name}.py", "", {name: draw}, flags, **settings))


def claimed(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_bpd, "REPORTED", path)
        audit_bpd.main(["--checkpoint", f"{path.parent}/done", "--data", f"{path.parent}/set",
                        *FAST, "--claim-from", "Glow", "--claim-data", "cifar10",
                        "--out", f"{path.parent}/audits"])


def merged(path):
    with train.one_line_errors("throughput.py"):
        throughput.merge_rows(path, [])


def plotted(path):
    plot_run.main([str(path.parent)])


def packed(path):
    convert.main(["pack", str(path.parent), f"{path.parents[1]}/packed-{time.monotonic_ns()}"])


def extended(path):
    train.main(["--init-from", str(path.parent), "--extend-to", "6", "--run-dir",
                f"{path.parents[1]}/longer-{time.monotonic_ns()}"])


FILES = {  # file: what reads it
    "stopped/checkpoint.pt": [trained, lambda path: evaluate.main(
        [str(path.parent), "--data", f"{path.parents[1]}/set"])],
    "done/checkpoint.pt": [lambda path: evaluate.main(
        [str(path), "--data", f"{path.parents[1]}/set"]), packed, extended],
    "state.pt": [lambda path: evaluated(path, "--model.num_heads", "2"), begun_with],
    "port.pt": [lambda path: evaluated(path, "--model.num_heads", "4")],
    "official.npz": [evaluated], "images.jet": [decoded], "adapter.py": [audited],
    "weights.safetensors": [lambda path: evaluated(path, "--model.num_heads", "2")],
    "certificate.json": [lambda path: audit_bpd.main(["--check", str(path)])],
    "done/done.json": [trained, audited_run, plotted, packed], "done/config.json": [trained, plotted],
    "stopped/config.json": [trained], "stopped/metrics.csv": [trained, plotted],
    "stopped/log.txt": [trained, plotted], "stopped/claim.json": [trained],
    "set/manifest.json": [lambda path: evaluate.main(
        [f"{path.parents[1]}/done", "--data", str(path.parent)])],
    "set/test.npy": [lambda path: evaluate.main(
        [f"{path.parents[1]}/done", "--data", str(path.parent)])],
    "ablate_coupling_smoke.csv": [main_of(figure4, "ablate_coupling", figure4.draw),
                                  main_of(tables, "ablate_coupling", tables.draw_figure4)],
    "main_results_small.csv": [main_of(tables, "main_results", tables.draw_main)],
    "scaling_small.csv": [main_of(figure3, "scaling", figure3.draw)],
    "throughput_cpu.csv": [merged, main_of(throughput_figure, "throughput", throughput_figure.draw,
                                           flag="hardware", choices=("cpu", "cuda"))],
    "reported.csv": [claimed],
    "samples.npz": [lambda path: figure5.style.main(
        "figure5.py", "", {}, ["--samples", str(path), "--out", f"{path.parent}/drawn"],
        samples=figure5.draw_file)]}


# ---- mutations

NUMBERS = [0, 1, -1, 2, 255, 2 ** 15, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63 - 1, 2 ** 63]
ODD = [None, True, 0, -1, 0.5, 10 ** 7, 10 ** 12, 10 ** 30, 10 ** 400, float("nan"), float("inf"), "",
       "x", "\x1b[2J\n", "\ud800", "\0", "a" * 10 ** 6, "1", "--help", "/dev/zero", [], {}, [[["x"]]],
       {"x": {"y": 1}}, "deep"]


def deep(depth=400):
    return json.loads("[" * depth + "]" * depth)


def mutate_bytes(content, rng):
    """The bytes with a few of them changed, cut out, doubled, moved or put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 16, 300))
        kind = rng.randrange(8)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place:place + size]
        elif kind == 3:
            content[place:place] = rng.randbytes(size)
        elif kind == 4:
            content[place:place] = content[place:place + size] * rng.choice((1, 2, 50))
        elif kind == 5:
            number = rng.choice(NUMBERS) % 2 ** 64
            content[place:place + 8] = struct.pack(rng.choice("<>") + "Q", number)
        elif kind == 6:
            content[place:place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS)
                                                   % 2 ** 32)
        elif len(content) > 2 * size:
            other = rng.randrange(len(content) - size)
            part = content[other:other + size]
            content[place:place + size] = part
    return bytes(content)


def nodes(value, path=()):
    """The paths of all parts of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from nodes(part, (*path, key))


def mutate_json(value, rng):
    """The value with a few parts of another type, too large, too deep, missing or too much."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        *path, last = rng.choice([path for path in nodes(value) if path] or [(None,)])
        if last is None:
            return rng.choice(ODD)
        parent = value
        for key in path:
            parent = parent[key]
        new = rng.choice(ODD)
        new = deep() if new == "deep" else new
        kind = rng.randrange(8)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[f"{last}x"] = new
        elif kind == 2 and isinstance(parent, list):
            parent.append(new)
        elif kind == 3 and type(parent[last]) in (int, float):
            parent[last] = parent[last] * rng.choice((-1, 2, 1.5, 1e6))
        else:
            parent[last] = new
    return value


def mutate_text_json(content, rng):
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    if rng.random() < 0.05:
        return b"[" * 10 ** 6
    return json.dumps(mutate_json(json.loads(content), rng)).encode()


def mutate_certificate(content, rng):
    """Sealed again, as by someone who wants it to be believed."""
    if rng.random() < 0.1:
        return mutate_bytes(content, rng)
    certificate = mutate_json(json.loads(content), rng)
    if isinstance(certificate, dict):
        certificate["sha256"] = certificates.seal(certificate)
    return json.dumps(certificate).encode()


def mutate_csv(content, rng):
    """Cells, rows and columns changed, missing, there twice or too many."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(rng.choice((1, 1, 3))):
        row, kind = rng.choice(rows), rng.randrange(7)
        cell = str(rng.choice([one for one in ODD if one != "\ud800"]))
        if kind == 0 and len(row) > 1:
            del row[rng.randrange(len(row))]
        elif kind == 1:
            row.append(cell)
        elif kind == 2:
            rows.insert(rng.randrange(len(rows)), list(row))
        elif kind == 3 and len(rows) > 2:
            rows.remove(row)
        elif kind == 4:  # a column in all rows
            place = rng.randrange(len(rows[0]))
            for one in rows[1:]:
                one[place:place + 1] = [cell]
        elif row:
            row[rng.randrange(len(row))] = cell
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass") + b"\n"


def mutate_zip(content, rng):
    """A member changed and all checksums right; or the bytes of the archive."""
    if rng.random() < 0.25:
        return mutate_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = rng.choice([*members] + 10 * [name for name in members if name.endswith("data.pkl")])
    members[target] = mutate_bytes(members[target][:4000], rng) + members[target][4000:]
    kind, out = rng.randrange(6), io.BytesIO()
    if kind == 0:
        members.pop(target)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == 1 else 0) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return out.getvalue()


def mutate_checkpoint(content, rng):
    """The plain values and tensors changed; or the archive."""
    if rng.random() < 0.4:
        return mutate_zip(content, rng)
    values = torch.load(io.BytesIO(content), weights_only=True)
    whole = [path for path in nodes(values) if path]
    plain = [path for path in whole if not path[0] == "model" or rng.random() < 0.2]
    *path, last = rng.choice(plain or whole)
    parent = values
    for key in path:
        parent = parent[key]
    odd = ODD + [torch.zeros(0), torch.zeros(1).expand(10 ** 9), torch.zeros(3, 10 ** 6, 0),
                 torch.zeros(2, dtype=torch.complex64), torch.tensor(5), torch.eye(3).to_sparse(),
                 laughs(), 10 ** 5000, torch.zeros(4, device="meta")]
    new = rng.choice(odd)
    if isinstance(parent[last], torch.Tensor) and rng.random() < 0.5:
        tensor = parent[last]
        new = rng.choice([tensor[None], tensor.flatten(), tensor.double(), tensor.long(),
                          tensor.new_zeros(0), tensor * float("nan"), tensor + 1])
    if rng.random() < 0.2:
        del parent[last]
    else:
        parent[last] = deep(200) if isinstance(new, str) and new == "deep" else new
    out = io.BytesIO()
    torch.save(values, out)
    return out.getvalue()


def laughs():
    """A list that takes few bytes in a pickle and 10^10 in print."""
    value = ["ha"] * 10
    for _ in range(10):
        value = [value] * 10
    return value


def mutate_codec(content, rng):
    """Header and streams changed, and the checksum right."""
    start, kind = len(b"JETCODEC") + 8, rng.random()
    size, = struct.unpack("<I", content[start - 4:start])
    header, body = content[start:start + size], content[start + size:-32]
    if kind < 0.15:
        return mutate_bytes(content, rng)
    if kind < 0.6:
        header = mutate_text_json(header, rng)
    else:
        body = mutate_bytes(body, rng)
    content = content[:start - 4] + struct.pack("<I", len(header)) + header + body
    return content + hashlib.sha256(content).digest()


def mutate_python(content, rng):
    """Lines missing, in another order, or another in their place: the file is the user's own."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 2))):
        lines[rng.randrange(len(lines))] = rng.choice([
            "", "exit(0)", "    exit(0)", "    return None", "    raise RuntimeError('\\x1b[2J')",
            "    return 1, 2", "    return x, x", "forward = 3", "\0", "def", "    return z, z[0]",
            "    1 / 0", "raise KeyboardInterrupt", *lines])
    return "\n".join(lines).encode()


def mutation_of(name):
    if name == "certificate.json":
        return mutate_certificate
    kinds = {".json": mutate_text_json, ".csv": mutate_csv, ".pt": mutate_checkpoint,
             ".npz": mutate_zip, ".jet": mutate_codec, ".py": mutate_python}
    return kinds.get(Path(name).suffix, mutate_bytes)


# ---- what must come of it

class TooSlow(BaseException):
    """Nothing of the project's catches it."""


@contextlib.contextmanager
def bounded(max_s=MAX_S, max_bytes=3 * MAX_BYTES):
    """Within, so much time and so much more memory, else TooSlow and MemoryError."""
    def stop(*_):
        raise TooSlow
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + max_bytes, limits[1]))
    signal.alarm(max_s)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, previous)


def ended(command, path):
    """(exit code, what was printed, the exit's message) of a command."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), bounded():
        try:
            with warnings.catch_warnings(record=True) as warned:
                command(path)
        except SystemExit as end:
            code = end.code
    said = [out.getvalue(), *(f"{one.message}\n" for one in warned)]
    if isinstance(code, str):
        return 1, "".join(said), code
    return code or 0, "".join(said), ""


def fault_of(command, path):
    """What is wrong with how a command ends, or None."""
    try:
        code, printed, message = ended(command, path)
    except TooSlow:
        return f"takes more than {MAX_S} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    lines = [*printed.splitlines(), message]
    if "\n" in message or max(map(len, lines)) > 2100:
        return f"many lines, or long ones: {max(lines, key=len)[:300]!r}"
    if odd := re.search(r"[^\n\r -~\x80-\uffff]|[\x80-\x9f\ud800-\udfff]", printed + message):
        return f"control character {odd[0]!r}"
    return f"ends with {code} and says nothing" if code and not any(lines) else None


def cases(whole):
    """(file, number of the command, the command) of all that are there."""
    return [(name, number, command) for name, commands in FILES.items()
            for number, command in enumerate(commands)
            if (whole / name).exists()]  # safetensors may not be installed


def test_mutated_files_give_a_result_or_one_line(whole, tmp_path):
    faults = []
    for name, number, command in cases(whole):
        content, before = (whole / name).read_bytes(), peak_bytes()
        for seed in range(FIRST, FIRST + COUNT):
            folder = tmp_path / "copy"
            shutil.copytree(whole, folder)
            rng = random.Random(f"{name} {seed}")
            (folder / name).write_bytes(mutation_of(name)(content, rng))
            fault = fault_of(command, folder / name)
            if not fault and (taken := peak_bytes() - before) > MAX_BYTES:
                fault = f"takes {taken:,} bytes"
            if fault:
                faults.append(f"{name} {number}, seed {seed}: {fault}")
                print(faults[-1], flush=True)
            shutil.rmtree(folder)
    assert not faults


def program(command):
    """(exit code, what was printed, the bytes that it took) of a program in a fork."""
    before = peak_bytes()
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    code, printed, message = ended(lambda path: runpy.run_path(path, run_name="__main__"), sys.argv[0])
    return code, printed + message, peak_bytes() - before


def test_programs_end_in_one_line_and_take_little_memory(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "NPZ_BYTES", 2 ** 23)
    certificate = json.loads((whole / "certificate.json").read_text())
    certificate["settings"]["model_flags"] = ["--help"]
    certificate["sha256"] = certificates.seal(certificate)
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    with zipfile.ZipFile(tmp_path / "weights.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, array in enumerate([npy_of(2 ** 20)] * 20):  # a megabyte each, and 5 kilobytes in the archive
            archive.writestr(f"{number}.npy", array)
    codes, said, taken = zip(*forked.each(
        program, ["experiments/audit_bpd.py", "--check", str(tmp_path / "certificate.json")],
        ["evaluate.py", str(tmp_path / "weights.npz"), "--data", str(whole / "set")]))
    assert codes == (2, 1), said
    assert all(len(text.splitlines()) == 1 and len(text) < 2100 and "error: " in text for text in said)
    assert "its model_flags are none: " in said[0] and "unpacks to" in said[1]
    assert max(taken) < MAX_BYTES // 2


def npy_of(size):
    file = io.BytesIO()
    np.save(file, np.zeros(size, np.uint8))
    return file.getvalue()


@pytest.mark.skipif("JET_MUTATIONS" not in os.environ, reason="takes half a minute")
def test_the_whole_files_give_a_result(whole, tmp_path):
    for name, number, command in cases(whole):
        shutil.copytree(whole, tmp_path / "copy")
        code, printed, message = ended(command, tmp_path / "copy" / name)
        expected = 3 if name == "reported.csv" else 0  # a claim of another set is not comparable
        assert (code, message) == (expected, ""), (name, number, printed)
        shutil.rmtree(tmp_path / "copy")


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
