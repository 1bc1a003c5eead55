"""python experiments/sample.py WEIGHTS --out grid.png: the samples of a seed, equal bytes, and what is refused."""
import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate_command import weights  # a fixture

from convert import load_jet
from experiments import sample
from jet import Jet, JetConfig


def run(capsys, *arguments):
    """(exit code, what was printed) of the command."""
    try:
        sample.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    if isinstance(code, str):
        code, err = 1, err + code + "\n"
    return code, out, err


@pytest.fixture
def refuses(capsys, monkeypatch):
    """Check that arguments end in one line, before anything is drawn."""
    def draw(*_):
        raise AssertionError("the work was done before")
    monkeypatch.setattr(sample, "draw_samples", draw)

    def check(message, *arguments, code=1):
        found, out, err = run(capsys, *arguments)
        assert (found, out) == (code, "") and message in err
        assert err.startswith("sample.py: error: ") and err.count("\n") == 1
    return check


def cells(path, n):
    """The n images of a grid of 32 x 32 pixels, row by row."""
    grid = np.asarray(Image.open(path))
    columns = int(np.ceil(np.sqrt(n)))
    return np.stack([grid[33 * (i // columns):, 33 * (i % columns):][:32, :32] for i in range(n)])


def test_the_grid_has_the_samples_of_the_seed_side_by_side(capsys, weights, tmp_path):
    code, out, _ = run(capsys, weights, "-n", 7, "--out", tmp_path / "grid.png", "--seed", 3, "--temperature", 0.6)
    expected = load_jet(weights).sample(7, torch.Generator().manual_seed(3), 0.6).numpy()
    found = cells(tmp_path / "grid.png", 7)
    assert code == 0 and np.abs(found.astype(int) - expected).max() <= 1  # the C kernels round otherwise
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (3 * 33 - 1, 3 * 33 - 1, 3)
    assert out.startswith(f"{tmp_path / 'grid.png'}: 7 samples of {weights}, temperature 0.6, seed 3; ")


def test_equal_seeds_and_temperatures_give_equal_bytes_and_others_do_not(capsys, weights, tmp_path):
    contents = []
    for flags in ((), (), ("--seed", 1), ("--temperature", 0.5)):
        assert run(capsys, weights, "-n", 4, "--out", tmp_path / "grid.png", *flags)[0] == 0
        contents.append((tmp_path / "grid.png").read_bytes())
    assert contents[0] == contents[1] and len(set(contents)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]  # nothing else is left


def test_grey_images_make_a_grey_png(capsys, tmp_path):
    config = JetConfig(image_size=8, channels=1, num_couplings=2, block_depth=1, emb_dim=16, num_heads=2)
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(config)}, "model": Jet(config).state_dict()},
               tmp_path / "checkpoint.pt")
    assert run(capsys, tmp_path / "checkpoint.pt", "-n", 1, "--out", tmp_path / "grid.png")[0] == 0
    assert Image.open(tmp_path / "grid.png").mode == "L" and Image.open(tmp_path / "grid.png").size == (8, 8)


def test_what_cannot_be_written_is_refused_before_the_work(refuses, weights, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    refuses("there is no folder", weights, "--out", tmp_path / "none/grid.png")
    refuses("is a .png file", weights, "--out", tmp_path / "grid.jpg")
    refuses("is a .png file", weights, "--out", tmp_path / "folder.png")
    refuses("/proc/grid.png: ", weights, "--out", "/proc/grid.png")  # nobody can make a file there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png"]


@pytest.mark.parametrize("message, flags", [
    ("--num 0: must be 1 or more", ("-n", 0)), ("--seed -1: must be 0 or more", ("--seed", -1)),
    ("--seed 9223372036854775808: must be below 2**63", ("--seed", 2 ** 63)),
    ("--threads 0: must be 1 or more", ("--threads", 0)),
    ("--threads 1000000: must be at most 1024", ("--threads", 10 ** 6)), ("--num 1000000000: must be at most", ("-n", 10 ** 9)),
    ("--temperature nan: must be a finite number", ("--temperature", "nan")),
    ("--temperature -1.0: must be a finite number", ("--temperature", -1)),
    ("device 'tpu': must be auto, cpu or cuda", ("--device", "tpu")),
    ("num_heads=4 was given, but the file says 2", ("--model.num_heads", 4))])
def test_bad_input_ends_in_one_line(refuses, weights, tmp_path, message, flags):
    refuses(message, weights, "--out", tmp_path / "grid.png", *flags)
    assert not list(tmp_path.iterdir())


def test_images_that_a_png_cannot_show_are_refused(refuses, tmp_path):
    config = JetConfig(image_size=8, channels=2, num_couplings=2, block_depth=1, emb_dim=16, num_heads=2)
    torch.save({"format": "jet-checkpoint-1", "config": {"model": vars(config)}, "model": Jet(config).state_dict()},
               tmp_path / "checkpoint.pt")
    refuses("images of 2 channels", tmp_path / "checkpoint.pt", "--out", tmp_path / "grid.png")


def test_samples_that_overflow_end_in_one_line_and_leave_the_old_file(capsys, weights, tmp_path):
    content = torch.load(weights)
    content["model"]["couplings.1.net.final_proj.bias"].fill_(-1e4)  # scales near 0
    torch.save(content, tmp_path / "checkpoint.pt")
    (tmp_path / "grid.png").write_text("old")
    code, _, err = run(capsys, tmp_path / "checkpoint.pt", "-n", 2, "--out", tmp_path / "grid.png")
    assert code == 1 and "are not finite" in err and "lower --temperature" in err and err.count("\n") == 1
    assert (tmp_path / "grid.png").read_text() == "old"
