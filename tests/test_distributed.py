"""One run over several processes: the same trajectory, the same evaluation, one writer."""
import dataclasses
import gc
import json
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import load_jet
from data import load_images, training_batch, training_batches
from evaluate import evaluate
from harness import distributed
from harness.checkpoint import read_tensors
from harness.errors import TrainingError
from harness.place import Place
from harness.run_folder import read_progress
from jet import JetConfig
from tests import forked
from train import TrainConfig, train

TESTS = Path(__file__).parent
MODEL = JetConfig(image_size=8, num_couplings=2, kinds=("channels", "spatial"), block_depth=1, emb_dim=16, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(folder):
    np.save(folder / "images.npy", load_images("cifar10-subset", "train").array[:30, ::4, ::4])
    return TrainConfig(model=MODEL, data=str(folder / "images.npy"), batch_size=10, total_steps=5,
                       lr=1e-2, eval_every=3)


@pytest.fixture(scope="module")
def configs(base):
    """Of every kind; 10 images cannot be cut in 3 equal parts, nor those in micro-batches."""
    switches = dataclasses.replace(MODEL, actnorm=True, invertible_dense=True, block="cnn")
    told = dataclasses.replace(MODEL, image_size=32, patch_size=16, context_dim=10)
    labels = dataclasses.replace(base, model=told, data="cifar10-subset-vehicles", condition="labels")
    return {"labels": labels, "float32": base, "float64": dataclasses.replace(base, precision="float64"),
            "switches": dataclasses.replace(base, model=switches, precision="float64")}


@pytest.fixture(scope="module")
def alone(folder, configs):
    """One process: what all others must agree with."""
    return {name: train(config, folder / "alone" / name, quiet=True) for name, config in configs.items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(folder, processes, jobs, weights):
    """Do jobs {name: (config, arguments of train)} in so many processes; the folder of their runs.

    They are forks of this process, which has imported all that they need.
    """
    import torch._dynamo  # noqa: F401  as DistributedDataParallel does, for seconds: here once for all
    gc.freeze()  # or each run would look through it
    folder = folder / str(processes)
    folder.mkdir(exist_ok=True)
    port = free_port()
    started = [forked.FORK.Process(target=take_part, args=(rank, processes, port, folder, jobs, weights))
               for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * processes
    return folder


def take_part(rank, processes, port, folder, jobs, weights):
    """What each process does, with the variables that torchrun gives it: train, and evaluate once."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE":
                   f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for name, (config, arguments) in jobs.items():
        try:
            done = train(config, folder / name, quiet=True, **arguments)
        except (TrainingError, ValueError) as error:
            done = {"error": str(error)}
        (folder / f"{name}-rank-{rank}.json").write_text(json.dumps(done))
    numbers = evaluate(load_jet(weights), np.load(config.data)[:13], draws=2, batch_size=4, per_image=True)
    bits = numbers["bits_per_dim_per_image"].tolist()
    (folder / f"bits-rank-{rank}.json").write_text(json.dumps(bits))
    distributed.leave()


@pytest.fixture(scope="module")
def two(folder, configs, alone):
    """Of two processes each has as many images."""
    return launch(folder, 2, {"float32": (configs["float32"], {})}, folder / "alone/float32")


@pytest.fixture(scope="module")
def three(folder, configs, alone):
    """Of three one has more than the others: they do all that there is."""
    jobs = {name: (config, {}) for name, config in configs.items()}
    jobs["micro"] = configs["float64"], {"place": Place(micro_batch=2)}
    jobs["first-half"] = configs["float32"], {"stop_after": 2}
    jobs["half"] = configs["float64"], {"stop_after": 2}
    jobs["other"] = dataclasses.replace(configs["float32"], batch_size=2), {}
    (folder / "3/torn").mkdir(parents=True)
    (folder / "3/torn/checkpoint.pt").write_bytes(b"")
    jobs["torn"] = configs["float32"], {}
    return launch(folder, 3, jobs, folder / "alone/float32")


@pytest.fixture(params=["two", "three"])
def together(request):
    return request.getfixturevalue(request.param)


def losses(run_dir):
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().split()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 6))
    return np.array([[float(row[2]), float(row[3])] for row in rows])


def close(one, two, rtol, rtol_evaluation):
    np.testing.assert_allclose(losses(one), losses(two), rtol=rtol)
    rows = (json.loads((run_dir / "done.json").read_text())["rows"] for run_dir in (one, two))
    bits = [[row["bits_per_dim"] for row in some] for some in rows]
    assert len(bits[0]) == 4
    np.testing.assert_allclose(*bits, rtol=rtol_evaluation)


@pytest.mark.parametrize("name, of, rtol, rtol_evaluation", [
    ("float32", "float32", 1e-5, 1e-6), ("labels", "labels", 1e-5, 1e-6), ("float64", "float64", 1e-10, 1e-10),
    ("switches", "switches", 1e-10, 1e-10), ("micro", "float64", 1e-10, 1e-10)])
def test_losses_and_evaluation_do_not_depend_on_the_number_of_processes(three, folder, name, of, rtol, rtol_evaluation):
    close(three / name, folder / "alone" / of, rtol, rtol_evaluation)


def test_micro_batches_of_one_process_agree(folder, configs, alone):
    train(configs["float64"], folder / "micro", quiet=True, place=Place(micro_batch=3))
    close(folder / "micro", folder / "alone/float64", 1e-10, 1e-10)


def test_every_process_returns_the_result_and_one_writes(together, folder, alone):
    close(together / "float32", folder / "alone/float32", 1e-5, 1e-6)
    notes = sorted(together.glob("float32-rank-*.json"))
    results = [json.loads(path.read_text()) for path in notes]
    assert len(results) == int(together.name) and all(result == results[0] for result in results)
    assert results[0]["processes"] == len(results) and alone["float32"]["processes"] == 1
    log = (together / "float32/log.txt").read_text()
    assert log.count("started at step 0") == log.count("finished") == 1
    assert f"{len(results)} processes of 1 thread" in log


def test_a_restart_with_as_many_processes_has_the_same_bits(three, folder, configs, alone):
    """In new processes: gradients must add up as in an unbroken run from the first step on."""
    jobs = {"first-half": (configs["float32"], {})}
    launch(folder, 3, jobs, folder / "alone/float32")
    assert "resumed at step 2" in (three / "first-half/log.txt").read_text()
    resumed, unbroken = (read_tensors(three / name / "checkpoint.pt")["model"] for name in ("first-half", "float32"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
    assert np.array_equal(losses(three / "first-half"), losses(three / "float32"))


def test_a_checkpoint_does_not_depend_on_the_number_of_processes(three, folder, configs, alone):
    state = read_tensors(three / "half/checkpoint.pt")
    assert state["processes"] == 3
    train(configs["float64"], three / "half", quiet=True)  # goes on alone
    close(three / "half", folder / "alone/float64", 1e-10, 1e-10)
    shared, alone = (read_tensors(path / "checkpoint.pt") for path in (three / "half", folder / "alone/float64"))
    assert shared.keys() == alone.keys() and shared["model"].keys() == alone["model"].keys()
    assert all(tensor.shape == alone["model"][name].shape for name, tensor in shared["model"].items())


def test_evaluation_is_shared_out_image_by_image(together, folder, base, alone):
    bits = evaluate(load_jet(folder / "alone/float32"), np.load(base.data)[:13], draws=2, batch_size=4, per_image=True)
    for path in together.glob("bits-rank-*.json"):
        assert json.loads(path.read_text()) == bits["bits_per_dim_per_image"].tolist()


@pytest.mark.parametrize("name, message", [
    ("other", "processes for a batch of . images"), ("torn", "checkpoint.pt: empty")])
def test_what_one_process_refuses_all_refuse(three, name, message):
    errors = [json.loads(path.read_text())["error"] for path in three.glob(f"{name}-rank-*.json")]
    assert len(errors) == 3
    for error in errors:
        assert re.search(message, error)


@pytest.mark.parametrize("source", ["array", "stream"])
def test_parts_make_up_the_batch(base, source):
    images = load_images(base.data, "train")
    whole = training_batch(images, 10, 3, 7)
    slices = [slice(rank * 10 // 3, (rank + 1) * 10 // 3) for rank in range(3)]
    parts = [next(training_batches(images, 10, 3, [7], source=source, part=part)) for part in slices]
    assert torch.equal(torch.cat(parts), whole) and [len(part) for part in parts] == [3, 3, 4]


TINY = [str(TESTS.parent / "train.py"), "--data", "cifar10-subset", "--batch_size", "4", "--model.num_couplings", "1", "--model.block_depth",
        "1", "--model.emb_dim", "4", "--model.num_heads", "1", "--model.patch_size", "16"]


def test_torchrun_starts_the_processes_of_one_run(tmp_path, monkeypatch):
    import torch._dynamo  # noqa: F401  here once for both
    from torch.distributed import run

    def in_forks(arguments, real=run.config_from_args):
        config, _, (_, *command) = real(arguments)  # of Python, -u and the command
        config.start_method = "fork"
        return config, forked.become, command
    monkeypatch.setattr(run, "config_from_args", in_forks)
    flags = ["--standalone", "--nproc-per-node", "2", *TINY, "--total_steps", "2", "--run-dir", str(tmp_path / "run")]
    torchrun = forked.FORK.Process(target=run.main, args=[flags])
    torchrun.start()
    torchrun.join(300)
    assert torchrun.exitcode == 0
    assert json.loads((tmp_path / "run/done.json").read_text())["processes"] == 2
    assert (tmp_path / "run/log.txt").read_text().count("started at step 0") == 1


def test_a_process_that_hangs_ends_the_others_in_one_line(tmp_path):
    flags = [*TINY, "--total_steps", "100000", "--process-timeout-s", "3", "--run-dir", str(tmp_path / "run")]
    port = str(free_port())
    import torch._dynamo  # noqa: F401  here once for both
    processes = [forked.start(*flags, out=tmp_path / f"{rank}.txt", env={
        "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    try:
        forked.wait_until(lambda: read_progress(tmp_path / "run")[0] >= 1, *processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        processes[0].join(30)
        error = (tmp_path / "0.txt").read_text().splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].exitcode == 1 and error.startswith("train.py: error: process 0 lost the others (Timed out waiting 3000ms")
    assert error.count("lost the others") == 1
