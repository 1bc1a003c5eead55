"""What a command imports in a new process: nothing that takes long and is not used."""
import re
import subprocess
import sys

import numpy as np
import pytest

from harness.host import ROOT

COMPILER = {"torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy"}
HEAVY = COMPILER | {"pandas", "matplotlib", "scipy", "submitit"}
IN_TURN = """
import runpy, sys
for command in sys.stdin.read().splitlines():
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""


def imports_of(commands):
    """The modules that a new process imports which runs these commands, one after the other."""
    ended = subprocess.run([sys.executable, "-X", "importtime", "-c", IN_TURN], cwd=ROOT, text=True,
                           input="\n".join(commands), capture_output=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return set(re.findall(r"^import time: .*\| +(\S+)$", ended.stderr, re.MULTILINE))


def test_images_and_figures_are_told_of_without_torch():
    commands = ["data.py list", "data.py --help", "paper_figures/redraw.py --help",
                "paper_figures/tables.py --help", "paper_figures/throughput.py --help"]
    imported = imports_of(commands)
    assert "images.command" in imported and not imported & (HEAVY | {"torch"})


@pytest.mark.parametrize("name", ["dequantize", "quantize"])
def test_what_data_takes_from_jet_is_there_when_it_is_asked_for(name):
    import data
    import jet
    assert getattr(data, name) is getattr(jet, name)
    with pytest.raises(AttributeError, match="module 'data' has no attribute 'other'"):
        data.other


def test_a_grid_is_planned_and_a_run_trained_and_read_with_nothing_heavy_but_torch(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8))
    grid = f"experiments/ablate_coupling.py --runs-dir {tmp_path}"
    train = (f"train.py --data {tmp_path}/images.npy --run-dir {tmp_path}/run --model.num_couplings 7 "
             "--model.block_depth 1 --model.emb_dim 8 --model.num_heads 1 --batch_size 2 --total_steps 2")
    read = f"evaluate.py {tmp_path}/run --data {tmp_path}/images.npy"
    imported = imports_of([f"{grid} --help", f"{grid} --dry-run", f"{grid} --status", train, read])
    assert "torch" in imported and (tmp_path / "run/done.json").exists() and not imported & HEAVY
