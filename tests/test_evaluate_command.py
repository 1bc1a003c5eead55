"""python evaluate.py WEIGHTS --data NAME: the number of evaluate(), what it is of, and what is refused."""
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate as command
from convert import export, load_jet
from data import fingerprint, load_images
from evaluate import evaluate
from harness.host import code_version
from jet import Jet, JetConfig

GOLDEN = Path(__file__).parent / "golden"
MODEL = JetConfig(image_size=32, patch_size=8, num_couplings=2, block_depth=1, emb_dim=16, num_heads=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint whose Jet is not the identity."""
    torch.manual_seed(0)
    jet = Jet(MODEL)
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("evaluate") / "checkpoint.pt"
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(MODEL)}, "model": jet.state_dict()}, path)
    return path


def run(capsys, *arguments):
    """(exit code, what was printed) of the command."""
    try:
        command.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    if isinstance(code, str):  # sys.exit(message): Python prints it, and ends with 1
        code, err = 1, err + code + "\n"
    return code, out, err


def number(out):
    return [float(value) for value in re.match(r"(\S+) \+- (\S+) bits/dim on ", out).groups()]


def test_the_number_is_that_of_evaluate_with_all_that_it_is_of(capsys, weights):
    code, out, _ = run(capsys, weights, "--data", "cifar10-subset")
    images = load_images("cifar10-subset", "test")
    expected = evaluate(load_jet(weights), images)
    first, second = out.splitlines()
    assert code == 0 and first == (
        f"{expected['bits_per_dim']:.4f} +- {expected['bits_per_dim_se']:.4f} bits/dim on 512 test images of "
        f"cifar10-subset, variant cifar10-subset, fingerprint {images.fingerprint[:12]}, 1 draw each")
    assert second.startswith(f"{weights} in float32 on ") and f", torch {torch.__version__}, " in second
    assert f"commit {code_version()['git_commit'][:12]} (" in second and ", 1 thread, " in second


def test_a_part_is_said_to_be_one(capsys, weights):
    _, out, _ = run(capsys, weights, "--data", "cifar10-subset", "--split", "train", "--num-images", 7)
    expected = evaluate(load_jet(weights), load_images("cifar10-subset", "train").array[:7])
    assert number(out) == [round(expected["bits_per_dim"], 4), round(expected["bits_per_dim_se"], 4)]
    assert " bits/dim on a part, the first 7 of 2,048 train images of cifar10-subset, " in out
    _, whole, _ = run(capsys, weights, "--data", "cifar10-subset-vehicles", "--num-images", 206)
    assert " bits/dim on 206 test images of cifar10-subset-vehicles, " in whole


@pytest.mark.parametrize("flags, options, precision", [
    (("--draws", 3), {"draws": 3}, "float32"),
    (("--precision", "bfloat16"), {"precision": "bfloat16"}, "bfloat16"),
    (("--precision", "float64"), {}, "float64"),
    (("--batch-size", 3, "--threads", 2), {}, "float32")])
def test_draws_precision_and_batches_are_those_asked_for(capsys, weights, monkeypatch, flags, options, precision):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    code, out, _ = run(capsys, weights, "--data", "cifar10-subset", "--num-images", 10, *flags)
    assert threads == [2 if "--threads" in flags else 1]
    jet = load_jet(weights)
    jet = jet.double() if precision == "float64" else jet
    expected = evaluate(jet, load_images("cifar10-subset", "test").array[:10], **options)
    assert code == 0 and abs(number(out)[0] - expected["bits_per_dim"]) < 1e-4
    draws = options.get("draws", 1)
    assert (f", {draws} draws each\n" if draws > 1 else ", 1 draw each\n") in out
    assert f"{weights} in {precision} on " in out


def test_three_draws_and_bfloat16_are_other_numbers(capsys, weights):
    plain, draws, bfloat16 = (number(run(capsys, weights, "--data", "cifar10-subset", "--num-images", 10, *flags)[1])[0]
                              for flags in ((), ("--draws", 3), ("--precision", "bfloat16")))
    assert plain != draws and plain != bfloat16


def test_weights_of_others_and_images_of_ones_own_are_taken(capsys, tmp_path):
    array = load_images("cifar10-subset", "test").array[:6, :24, :16]
    np.save(tmp_path / "own.npy", array)
    code, out, _ = run(capsys, GOLDEN / "jet_nonsquare_ext.npz", "--data", tmp_path / "own.npy")
    assert code == 0 and f"variant unknown, fingerprint {fingerprint(array)[:12]}, " in out
    export(Jet(dataclasses.replace(MODEL, gelu="exact", norm_eps=1e-5)), tmp_path / "port.pt", "jet-pytorch")
    port = (tmp_path / "port.pt", "--data", "cifar10-subset", "--num-images", 6)
    code, _, err = run(capsys, *port)
    assert code == 1 and "--model.num_heads" in err
    assert run(capsys, *port, "--model.num_heads", 2)[0] == 0


@pytest.mark.parametrize("message, code, flags", [
    ("--num-images 513: cifar10-subset test has 512", 1, ("--num-images", 513)),
    ("--num-images 0: must be 1 or more", 1, ("--num-images", 0)),
    ("--draws 0: must be 1 or more", 1, ("--draws", 0)),
    ("--draws 1000000000: must be at most 10000", 1, ("--draws", 10 ** 9)),
    ("--threads 1000000: must be at most 1024", 1, ("--threads", 10 ** 6)),
    ("--threads 0: must be 1 or more", 1, ("--threads", 0)),
    ("--batch-size -1: must be 1 or more", 1, ("--batch-size", -1)),
    ("data 'nothing': neither a known set", 1, ("--data", "nothing")),
    ("device 'tpu': must be auto, cpu or cuda", 1, ("--device", "tpu")),
    ("num_heads=4 was given, but the file says 2", 1, ("--model.num_heads", 4)),
    ("did you mean --draws?", 2, ("--drows", 4)),
    ("invalid choice: 'val'", 2, ("--split", "val"))])
def test_bad_input_ends_in_one_line(capsys, weights, message, code, flags):
    found, out, err = run(capsys, weights, "--data", "cifar10-subset", *flags)
    assert found == code and message in err and not out
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1


def test_missing_weights_and_images_of_another_size_end_in_one_line(capsys, weights, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for arguments, message in (((tmp_path / "none.pt", "--data", "cifar10-subset"), "no such file"),
                               ((weights, "--data", tmp_path / "small.npy"), "8 x 8 x 3, and this Jet takes 3 x 32 x 32")):
        code, out, err = run(capsys, *arguments)
        assert code == 1 and message in err and err.count("\n") == 1 and not out


def test_an_image_without_a_finite_number_ends_in_one_line(capsys, weights, tmp_path):
    content = torch.load(weights)
    content["model"]["couplings.0.net.final_proj.bias"].fill_(float("inf"))
    torch.save(content, tmp_path / "checkpoint.pt")
    code, out, err = run(capsys, tmp_path / "checkpoint.pt", "--data", "cifar10-subset", "--num-images", 3)
    assert code == 1 and "image 0 has" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("precision, dtype, networks", [
    ("float32", torch.float32, "float32"), ("bfloat16", torch.float32, "bfloat16"), ("float64", torch.float64, "float32")])
def test_the_precision_is_that_of_weights_or_of_networks(capsys, weights, monkeypatch, precision, dtype, networks):
    seen = []

    def record(jet, images, **options):
        seen.append((next(jet.parameters()).dtype, options["precision"]))
        return evaluate(jet, images[:2])
    monkeypatch.setattr(command, "evaluate", record)
    assert run(capsys, weights, "--data", "cifar10-subset", "--precision", precision)[0] == 0
    assert seen == [(dtype, networks)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_would_round_the_noise_are_refused(dtype):
    jet = Jet(JetConfig(image_size=32, num_couplings=1, block_depth=1, emb_dim=8, num_heads=1))
    images = load_images("cifar10-subset", "test").array[:4]
    with pytest.raises(ValueError, match=r"weights in torch\.\w+, .* give jet.float\(\)"):
        evaluate(jet.to(dtype), images)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), and .* \(32, 32, 3\): channels come last"):
        evaluate(jet.float(), images.transpose(0, 3, 1, 2))
