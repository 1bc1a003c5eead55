"""The roofline: its FLOPs and bytes by the model's own counts and by hand; launches; the page."""
import dataclasses
import re
from collections import Counter

import pytest
import torch
from torch import nn

import kernels
from experiments import ablate_coupling, roofline
from harness.flops import forward_flops, num_parameters
from jet import Jet, JetConfig
from sweeps.plan import GPU_PEAKS

CONFIGS = {size: config for size, (config, _, _) in roofline.STEPS.items()} | {
    "oblong": JetConfig(image_size=(16, 24), patch_size=2, num_couplings=7, block_depth=3,
                        emb_dim=24, num_heads=3),
    "gray": JetConfig(image_size=16, channels=1, num_couplings=1, block_depth=1, emb_dim=8,
                      num_heads=1)}


def by_name(parts):
    return {part.name: part for part in parts}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_products_of_a_forward_pass_are_the_models_own_count(name):
    parts = roofline.step_parts(CONFIGS[name], 3)
    assert sum(part.forward_flops for part in parts) == 3 * forward_flops(CONFIGS[name])
    scores = by_name(parts)[roofline.SCORES].forward_flops / 2  # made again in backward
    assert sum(part.product_flops for part in parts) == 9 * forward_flops(CONFIGS[name]) + scores


@pytest.mark.parametrize("name", ["medium", "oblong", "gray"])
def test_bytes_of_parameters_are_those_of_the_models_parameters(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        jet = Jet(config)
    linear = sum(weight.numel() for module in jet.modules() if isinstance(module, nn.Linear)
                 for weight in module.parameters())
    parts = by_name(roofline.step_parts(config, 3))
    assert parts[roofline.ADAM].bytes == 28 * num_parameters(config)
    assert parts[roofline.CLIP].bytes == 4 * num_parameters(config)
    assert parts[roofline.CASTS].bytes == 12 * linear
    assert roofline.step_parts(config, 6)[-3:] == roofline.step_parts(config, 3)[-3:]


def test_bytes_of_a_small_jet_are_those_of_its_arrays():
    # 2 images of 4 tokens of 48 values; width 8, 2 heads, 1 coupling of 1 block
    config = JetConfig(image_size=8, num_couplings=1, block_depth=1, emb_dim=8, num_heads=2)
    image, half, x = 2 * 4 * 48, 2 * 4 * 24, 2 * 4 * 8  # numbers in an image, x1, a width
    posemb = 4 * 8

    def product(*arrays):  # forward, and backward's two, in bfloat16
        return 3 * 2 * sum(arrays)
    forward_norms = [2 * x + 4 * x + 2 * x + 4 * posemb,  # branch; stream, norm
                     4 * x + 2 * x + 4 * x + 2 * x, 4 * x + 2 * x + 4 * x + 2 * x]
    backward_norms = [2 * x + 4 * x + 4 * x + 2 * x,  # gradient, stream; gradient and its copy
                      2 * x + 4 * x + 4 * x + 4 * x + 2 * x,
                      2 * x + 4 * x + 4 * x + 2 * x + 4 * posemb]
    expected = {
        roofline.IMAGES: 20 * image, roofline.SPLIT: 16 * half,
        roofline.INIT: product(half, 24 * 8, x),
        roofline.NORMS: sum(forward_norms + backward_norms),
        roofline.QKV: product(x, 8 * 24, 3 * x),
        roofline.SCORES: 2 * (3 * x + x) + 2 * (3 * x + x + x + 3 * x) + 2 * 4 * 2 * 8,
        roofline.OUT: product(x, 8 * 8, x),
        roofline.MLP: product(x, 8 * 32, 4 * x) + product(4 * x, 32 * 8, x),
        roofline.GELU: 2 * 5 * 4 * x, roofline.FINAL: product(x, 8 * 48, image),
        roofline.AFFINE: 26 * image}
    parts = by_name(roofline.step_parts(config, 2))
    assert {name: parts[name].bytes for name in expected} == expected


def test_the_medium_size_is_that_of_the_ablations():
    assert CONFIGS["medium"] == ablate_coupling.BASE["medium"].model


# ---- launches

TINY = JetConfig(image_size=8, num_couplings=7, block_depth=2, emb_dim=32, num_heads=2)


@pytest.mark.parametrize("kinds", [TINY.kinds, ("spatial", "channels")])
def test_launches_of_all_couplings_follow_from_two(kinds):
    config = dataclasses.replace(TINY, kinds=kinds)
    assert roofline.step_launches(config) == roofline.count_launches(config)


def test_launches_depend_on_no_size():
    narrow = dataclasses.replace(TINY, num_couplings=2, kinds=("channels", "spatial"))
    wide = dataclasses.replace(narrow, image_size=16, emb_dim=96)
    assert roofline.count_launches(wide) == roofline.count_launches(narrow)


def test_launches_are_of_forward_and_backward_and_of_the_right_part():
    launches, layers = roofline.step_launches(TINY), 7 * 2
    assert launches[roofline.OUT] == 4 * layers  # product; backward's two, and bias
    assert launches[roofline.GELU] == 2 * layers
    assert launches[roofline.CASTS] == 2 * 7 * 2 * (2 + 4 * 2)  # weight and bias, there and back
    assert set(launches) == {part.name for part in roofline.step_parts(TINY, 1)}


def test_clipping_and_adam_take_few_launches_for_any_number_of_parameters():
    one, many = (roofline.count_launches(dataclasses.replace(TINY, num_couplings=couplings)) for couplings in (1, 3))
    for part in (roofline.CLIP, roofline.ADAM):
        assert 0 < many[part] == one[part] < 30


def test_counting_sees_pytorchs_kernels_and_no_views():
    x = torch.zeros(2, 16)
    launches = roofline.Launches()
    with launches:
        assert not kernels.supports(x)
        torch.empty_like(x.view(4, 8).T)
        assert launches.counts == Counter()
        x + 1
    assert launches.counts == {roofline.IMAGES: 1}


# ---- the ceiling and the page

def part(compute_s, memory_s, launches_s):
    """A part that takes so many seconds in each term on an H100."""
    return roofline.Part(name="", product_flops=compute_s * GPU_PEAKS["bfloat16"],
                         bytes=memory_s * roofline.MEMORY_RATES["H100"],
                         launches=launches_s / roofline.LAUNCH_S)


def test_a_step_takes_the_longer_term_of_each_part_or_all_launches():
    parts = [part(3, 1, 0), part(1, 2, 5)]
    assert roofline.ceiling(parts, "H100", eager=True) == (pytest.approx(5), "compute")  # as long
    parts.append(part(0, 0, 1))
    assert roofline.ceiling(parts, "H100", eager=True) == (pytest.approx(6), "launches")
    assert roofline.ceiling(parts, "H100", eager=False) == (pytest.approx(5), "compute")
    parts.append(part(0, 2, 0))
    assert roofline.ceiling(parts, "H100", eager=True) == (pytest.approx(7), "memory")
    faster, _ = roofline.ceiling(parts, "H200", eager=False)
    assert faster == pytest.approx(3 + (2 + 2) * 3.35 / 4.8)


def test_element_wise_work_counts_at_the_float32_peak():
    work = roofline.Part(name="", pass_flops=GPU_PEAKS["float32"], bytes=0)
    assert work.seconds("H100")["compute"] == 1


def test_table_names_what_binds_each_part():
    parts = [part(3e-6, 2e-6, 1e-6), part(1e-6, 2e-6, 5e-6)]
    heading, rule, *rows = roofline.step_table(parts).splitlines()
    assert len({len(line) for line in (heading, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert cells[0][6:8] == ["3", "compute"] and cells[1][6:8] == ["2", "memory; launches"]


@pytest.fixture(scope="module")
def page():
    return roofline.page()


def test_committed_page_is_what_the_code_says(page):
    committed = roofline.PAGE.read_text()
    if f"PyTorch {roofline.TORCH_VERSION} " not in committed:
        pytest.skip(f"PyTorch {roofline.TORCH_VERSION} may have other operators than the page's")
    assert committed == page, "python experiments/roofline.py > docs/roofline.md"


def test_page_has_each_part_of_each_size_and_says_that_it_is_computed(page):
    assert "**Computed, not measured.**" in page and page.endswith("|\n")
    tables = re.split("(?m)^## ", page)[1:]
    assert [table.split()[0] for table in tables] == list(roofline.STEPS)
    names = [part.name for part in roofline.step_parts(TINY, 1)]
    for table in tables:
        assert re.findall(r"(?m)^\| (.+?) +\|", table)[1:] == ["-" * 24, *names]
    for gpu, rate in (("H100", "3.35"), ("H200", "4.8")):
        assert f"{rate} TB/s on an {gpu}" in page


def test_check_compares_with_the_committed_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "page", lambda: "the page\n")
    monkeypatch.setattr(roofline, "PAGE", tmp_path / "roofline.md")
    with pytest.raises(SystemExit, match="roofline.md: No such file"):
        roofline.main(["--check"])
    roofline.main([])
    roofline.PAGE.write_text(capsys.readouterr().out)
    roofline.main(["--check"])
    assert capsys.readouterr().out == ""
    roofline.PAGE.write_text("another page\n")
    with pytest.raises(SystemExit) as end:
        roofline.main(["--check"])
    assert "python experiments/roofline.py > docs/roofline.md" in end.value.code
    assert "\n" not in end.value.code
