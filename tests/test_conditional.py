"""Class-conditional Jets: a flow for every context, and the same model as before without one."""
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import codec
from audit.adapters import load_model
from audit.checks import AuditError
from audit.request import Request
from coding.ans import CodecError
from convert import load_jet
from data import ImageSet, batch_indices, evaluation_noise, load_images, told, training_batch, training_labels
from evaluate import evaluate, main as evaluate_main
from experiments.draw_samples import draw_samples, labels_of_rows, main as draw_main
from experiments.sample import main as sample_main
from harness.condition import NO_LABEL, one_hot
from harness.errors import DataError
from harness.files import file_sha256
from harness.flops import forward_flops
from harness.memory import activation_bytes
from jet import Jet, JetConfig, bits_per_dim, dequantize
from kernels import accelerate
from paper_figures import figure5
from recipe import add_gradients
from test_codec import with_header
from train import TrainConfig, config_from_flags, main as train_main, train

TINY = JetConfig(image_size=(8, 4), channels=1, patch_size=2, num_couplings=3, kinds=("channels", "spatial"),
                 block_depth=1, emb_dim=8, num_heads=2, context_dim=5)
MODEL = JetConfig(image_size=16, num_couplings=7, block_depth=1, emb_dim=16, num_heads=2, context_dim=5)
blocks = pytest.mark.parametrize("block", ["vit", "cnn"])
modes = pytest.mark.parametrize("mode", ["pairing", "masking"])


def random_jet(config=TINY, **changes):
    torch.manual_seed(0)
    jet = Jet(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return jet


def images(jet, n=2, tokens=3):
    """x (n, C, H, W) and a context (n, tokens, 5) for it."""
    generator, dtype = torch.Generator().manual_seed(1), next(jet.parameters()).dtype
    return (2 * torch.rand(n, *jet.config.image_shape, generator=generator, dtype=dtype) - 1,
            torch.randn(n, tokens, 5, generator=generator, dtype=dtype))


@blocks
@modes
@pytest.mark.parametrize("tokens", [1, 3])
def test_inverse_and_jacobian_with_a_context(block, mode, tokens):
    jet = random_jet(block=block, split_mode=mode, actnorm=True, invertible_dense=True).double()
    x, context = images(jet, tokens=tokens)
    z, logdet = jet(x, context)
    back, inverse_logdet = jet.inverse(z, context)
    assert (back - x).abs().max() < 1e-9 and (logdet + inverse_logdet).abs().max() < 1e-9
    copies = x[:1].expand(x[0].numel(), -1, -1, -1).clone().requires_grad_()  # one for each row of the Jacobian
    out, _ = jet(copies, context[:1].expand(len(copies), -1, -1))
    rows, = torch.autograd.grad(out.flatten(1).diagonal().sum(), copies)
    assert abs(torch.linalg.slogdet(rows.flatten(1)).logabsdet - logdet[0]) < 1e-8
    assert (jet(x, 0 * context)[0] - z).abs().max() > 1e-2  # the context decides
    assert (jet(x[1:], context[1:])[0] - z[1:]).abs().max() < 1e-9  # an image sees its own alone


@torch.no_grad()
@modes
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_the_conditioning_half_is_untouched_by_the_context(kind, mode):
    jet = random_jet(MODEL, num_couplings=1, kinds=(kind,), split_mode=mode)
    coupling, x, (_, context) = jet.couplings[0], torch.randn(2, 16, 48), images(jet)
    kept, moved = coupling.order.chunk(2)
    for out in (coupling(x, context)[0], coupling.inverse(x, context)[0]):
        assert torch.equal(out.index_select(coupling.axis, kept), x.index_select(coupling.axis, kept))
        assert (out != x).index_select(coupling.axis, moved).all()


@blocks
def test_every_weight_has_a_gradient_and_one_token_asks_nothing(block):
    jet = random_jet(block=block)
    for tokens in (3, 1):
        jet.zero_grad()
        bits_per_dim(*jet(*images(jet, tokens=tokens))).mean().backward()
        still = {name for name, weight in jet.named_parameters() if not weight.grad.any()}
        queries = {name for name, _ in jet.named_parameters() if "cross_attention.query" in name}
        assert still == (queries if tokens == 1 else set())  # a softmax over one key is 1


def test_a_fresh_jet_ignores_the_context_and_without_one_nothing_differs():
    jet = Jet(TINY)
    x, context = images(jet)
    assert torch.equal(jet(x, context)[0], jet(x, 0 * context)[0])
    states = {}
    for dim in (0, 5):
        torch.manual_seed(3)
        states[dim] = Jet(dataclasses.replace(TINY, context_dim=dim, invertible_dense=True)).state_dict()
    assert all(torch.equal(states[5][name], tensor) for name, tensor in states[0].items())
    assert all("cross_attention" in name for name in states[5].keys() - states[0].keys())


@pytest.mark.parametrize("make, line", [
    (lambda c: None, r"no context is given, and this Jet takes floating-point \(2, M, 5\)"),
    (lambda c: c[:1], r"torch.float32 context \(1, 3, 5\) is given, .* takes floating-point \(2, M, 5\)"),
    (lambda c: c[..., :4], r"\(2, 3, 4\)"), (lambda c: c[:, 0], r"\(2, 5\)"), (lambda c: c[:, :0], r"\(2, 0, 5\)"),
    (lambda c: c.long(), "torch.int64 context")])
def test_a_context_that_does_not_fit_is_refused(make, line):
    jet = random_jet()
    x, context = images(jet)
    for function in (jet, jet.inverse, jet.initialize, lambda x, c: jet.sample(2, context=c)):
        with pytest.raises(ValueError, match=line):
            function(x, make(context))


def test_a_jet_without_one_refuses_a_context():
    jet = random_jet(context_dim=0)
    with pytest.raises(ValueError, match="this Jet takes none: context_dim is 0"):
        jet(*images(jet))


def test_samples_follow_their_context():
    jet = random_jet(image_size=8, channels=3, num_couplings=5).double()
    one, other = torch.eye(5)[[0, 0, 1]][:, None], torch.eye(5)[[0, 1, 1]][:, None]
    first, second = (jet.sample(3, torch.Generator().manual_seed(0), 0.3, context) for context in (one, other))
    same = (first == second).flatten(1).all(1)
    assert same.tolist() == [True, False, True]


@blocks
@modes
def test_the_kernels_for_cpus_take_a_context(block, mode):
    jet = random_jet(MODEL, block=block, split_mode=mode)
    x, context = images(jet, 3)
    with torch.no_grad():
        plain, back = jet(x, context), jet.inverse(x, context)
        fast, fast_back = accelerate(jet)(x, context), jet.inverse(x, context)
    assert (plain[0] - fast[0]).abs().max() < 1e-4 and (plain[1] - fast[1]).abs().max() < 1e-2
    assert (back[0] - fast_back[0]).abs().max() < 1e-3


def test_recomputed_activations_give_the_same_gradients():
    jet, gradients = random_jet(), []
    x, context = images(jet)
    for jet.checkpoint_activations in (False, True):
        jet.zero_grad()
        bits_per_dim(*jet(x, context)).mean().backward()
        gradients.append([weight.grad for weight in jet.parameters()])
    assert all(map(torch.equal, *gradients))


# ---- labels: training and evaluation

CONFIG = TrainConfig(data="cifar10-subset", condition="labels", batch_size=8, total_steps=4, lr=1e-2, model=JetConfig(
    image_size=32, patch_size=16, num_couplings=3, block_depth=1, emb_dim=16, num_heads=2, context_dim=10))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The first 40 images of the subset as a prepared folder with labels."""
    folder = tmp_path_factory.mktemp("few")
    prints, sums = {}, {}
    for split in ("train", "test"):
        images = load_images("cifar10-subset", split).first(40)
        np.save(folder / f"{split}.npy", images.array)
        np.save(folder / f"{split}_labels.npy", images.labels.astype(np.int64))
        prints[split] = images.fingerprint
        sums[f"{split}_labels.npy"] = file_sha256(folder / f"{split}_labels.npy")
    (folder / "manifest.json").write_text(json.dumps({
        "name": "few", "variant": "few", "fingerprints": prints, "checksums": sums}))
    return folder


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return run, train(dataclasses.replace(CONFIG, data=str(few)), run, quiet=True)


def test_labels_are_those_of_the_batch_and_a_share_of_steps_has_none():
    array = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(4, 1)
    images = ImageSet(array=array, labels=np.arange(40), name="x", variant="x", split="train")
    dropped = []
    for step in range(400):
        labels = training_labels(images, 7, 3, step, 0.1)
        dropped.append((labels == NO_LABEL).all())
        pixels = images.array[batch_indices(40, 7, 3, step), 0, 0, 0]
        assert dropped[-1] or labels.tolist() == pixels.tolist()
    assert 20 <= sum(dropped) <= 60  # 40 are expected, with a deviation of 6
    assert not any((training_labels(images, 7, 3, step) == NO_LABEL).any() for step in range(99))
    assert one_hot([1, NO_LABEL], 3).tolist() == [[[0, 1, 0]], [[0, 0, 0]]]


def test_a_resumed_conditional_run_has_the_same_bits(few, trained, tmp_path):
    config = dataclasses.replace(CONFIG, data=str(few))
    assert train(config, tmp_path / "parts", stop_after=2, quiet=True) == {"step": 2}
    done = train(config, tmp_path / "parts", quiet=True)
    assert done["weights_sha256"] == trained[1]["weights_sha256"] and done["rows"] == trained[1]["rows"]


def test_training_looks_at_the_labels_and_pieces_of_a_batch_change_nothing(few):
    images, gradients = load_images(few, "train"), []
    x = training_batch(images, 8, 0, 0).double()
    jet = random_jet(CONFIG.model).double()
    labels = training_labels(images, 8, 0, 0)
    for which, micro_batch in ((labels, None), (labels, 3), (labels[::-1].copy(), None)):
        jet.zero_grad()
        add_gradients(jet, x, CONFIG, micro_batch, (one_hot(which, 10),))
        gradients.append(torch.cat([weight.grad.flatten() for weight in jet.parameters()]))
    whole, pieces, other = gradients
    assert (whole - pieces).abs().max() < 1e-12 < 1e-4 < (whole - other).abs().max()


def test_evaluation_is_told_the_labels_whatever_the_batch_size(few):
    jet, images = random_jet(CONFIG.model), load_images(few, "test")
    bits = [evaluate(jet, images, batch_size=size, per_image=True)["bits_per_dim_per_image"] for size in (None, 7)]
    assert np.abs(bits[0] - bits[1]).max() < 1e-5
    untold = dataclasses.replace(images, labels=np.full(40, NO_LABEL))
    noise = evaluation_noise(range(40), images.array.shape[1:], 0, 0)
    x = dequantize(images.array, noise).permute(0, 3, 1, 2)
    with torch.no_grad():
        direct = bits_per_dim(*jet(x, torch.zeros(40, 1, 10))).numpy()
    untold = evaluate(jet, untold, per_image=True)["bits_per_dim_per_image"]
    assert np.abs(untold - direct).max() < 1e-5 and np.abs(untold - bits[0]).max() > 1e-3


def test_the_command_says_what_labels_change(few, trained, capsys):
    evaluate_main([str(trained[0]), "--data", str(few)])
    told, untold, _ = capsys.readouterr().out.splitlines()
    numbers = [float(number) for number in re.findall(r"[-+]?\d\.\d+", told + untold)]
    assert numbers[0] == pytest.approx(trained[1]["bits_per_dim"], abs=1e-4)
    assert numbers[0] - numbers[2] == pytest.approx(numbers[4], abs=2e-4) and untold.startswith("with labels; without")


def test_sets_without_labels_are_refused_by_name(few, trained, tmp_path, capsys):
    np.save(tmp_path / "bare.npy", load_images(few, "test").array)
    with pytest.raises(SystemExit, match="bare.npy test has no labels, and this Jet is conditional on them"):
        evaluate_main([str(trained[0]), "--data", str(tmp_path / "bare.npy")])
    with pytest.raises(SystemExit, match="--condition labels: .*bare.npy has no labels"):
        train_main(["--data", str(tmp_path / "bare.npy"), "--condition", "labels"])
    with pytest.raises(ValueError, match="an array has no labels"):
        evaluate(random_jet(CONFIG.model), load_images(few, "test").array)
    small = dataclasses.replace(CONFIG, data=str(few), model=dataclasses.replace(CONFIG.model, context_dim=4))
    with pytest.raises(DataError, match=r"few train has labels up to 9: this Jet takes 0 to 3"):
        train(small, tmp_path / "run", quiet=True)


def test_the_command_line_counts_the_classes(few):
    config = config_from_flags({"data": str(few), "condition": "labels", "model.num_couplings": 2})
    assert config.model.context_dim == 10 and config.condition_drop_prob == 0.1


def test_shuffled_labels_are_others_and_dropped_ones_are_none(few):
    images = load_images(few, "test")
    shuffled, dropped = told(images, "shuffled", 0), told(images, "dropped", 0)
    assert sorted(shuffled.labels) == sorted(images.labels) and (shuffled.labels != images.labels).sum() > 20
    assert (dropped.labels == NO_LABEL).all() and told(images, "labels", 0).labels is images.labels
    assert (told(images, "shuffled", 1).labels != shuffled.labels).any() and shuffled.fingerprint == images.fingerprint


@pytest.mark.parametrize("condition, told_", [("shuffled", True), ("dropped", True), ("labels", False)])
def test_a_run_of_no_steps_measures_weights_that_are_told_otherwise(few, trained, tmp_path, condition, told_):
    config = dataclasses.replace(CONFIG, data=str(few))
    otherwise = dataclasses.replace(config, condition=condition, total_steps=0, init=config.hash)
    done = train(otherwise, tmp_path / "run", init_from=trained[0], quiet=True)
    assert done["weights_sha256"] == trained[1]["weights_sha256"]
    assert (done["bits_per_dim"] != trained[1]["bits_per_dim"]) == told_


@pytest.mark.parametrize("condition, dim, line", [("labels", 0, "condition='labels': must be none where context_dim=0"),
                                                  ("none", 10, "condition='none': must be labels where context_dim=10")])
def test_condition_and_context_go_together(condition, dim, line):
    with pytest.raises(ValueError, match=line):
        TrainConfig(condition=condition, model=JetConfig(context_dim=dim))


def test_runs_are_named_by_their_condition_and_others_as_before():
    plain = TrainConfig()
    assert plain.hash == dataclasses.replace(plain, condition_drop_prob=0.5).hash == "5e5fbf8b21"
    names = {dataclasses.replace(CONFIG, condition_drop_prob=share).hash for share in (0, 0.1, 0.2)}
    assert len(names) == 3 and CONFIG.hash in names


def test_flops_and_memory_of_a_conditional_step():
    for block in ("vit", "cnn"):
        jet = random_jet(MODEL, num_couplings=5, block=block, emb_dim=64)
        x, context = images(jet, 8, tokens=1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            jet(x, context)
        assert abs(counter.get_total_flops() / 8 / forward_flops(jet.config) - 1) < 0.01
        assert forward_flops(jet.config) > forward_flops(dataclasses.replace(jet.config, context_dim=0))
        plain = random_jet(MODEL, num_couplings=5, block=block, emb_dim=64, context_dim=0)
        assert activation_bytes(jet, "float32") > activation_bytes(plain, "float32")


# ---- samples

def test_a_sheet_has_a_row_for_each_class(trained, tmp_path, capsys):
    jet = load_jet(trained[0])
    assert labels_of_rows(jet, 25).tolist() == np.repeat(range(10), 3).tolist()
    assert labels_of_rows(jet, 4, [7, 2]).tolist() == [7, 7, 2, 2]
    labels = labels_of_rows(jet, 4, [7, 2])
    samples = draw_samples(jet, 4, 0, 0.5, labels)
    context = one_hot(labels, 10)
    assert np.array_equal(samples, jet.sample(4, torch.Generator().manual_seed(0), 0.5, context).numpy())
    sample_main([str(trained[0]), "--labels", "7", "2", "-n", "6", "--temperature", "0.5", "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").size == (3 * 33 - 1, 2 * 33 - 1)


@pytest.mark.parametrize("flags, line", [(["--labels", "10"], "this Jet knows 0 to 9"), (["--labels", "-1"], "knows 0 to 9")])
def test_classes_that_are_not_known_are_refused(trained, tmp_path, flags, line):
    with pytest.raises(SystemExit, match=line):
        sample_main([str(trained[0]), *flags, "--out", str(tmp_path / "sheet.png")])
    with pytest.raises(DataError, match="told no labels"):
        labels_of_rows(Jet(dataclasses.replace(TINY, context_dim=0)), 4, [1])


def test_draw_samples_keeps_labels_and_draws_their_rows(trained, tmp_path, drawn):
    draw_main(["--checkpoint", str(trained[0]), "--labels", "7", "2", "--num", "6", "--temperature", "0.5", "--name", "sheet",
               "--results-dir", str(tmp_path), "--figures-dir", str(tmp_path)])
    about, content = figure5.read_samples(tmp_path / "samples/sheet.npz")
    assert content["labels"].tolist() == [7, 7, 7, 2, 2, 2] and drawn[0][1] == "samples_sheet"
    (caption, sheet), = figure5.panels_of(about, content)
    assert "a row for each of the classes 7, 2" in caption and sheet.shape == (2 * 33 - 1, 3 * 33 - 1, 3)
    content["labels"] = content["labels"][:5]
    with pytest.raises(ValueError, match="labels are not one for each sample"):
        figure5.check_samples(about, content)


# ---- the codec and the audit

@pytest.fixture(scope="module")
def coded():
    jet, images = random_jet(MODEL, image_size=8, num_couplings=3, actnorm=True), load_images("cifar10-subset", "test").first(6)
    crops, labels = images.array[:, :8, :8].copy(), [0, 4, 2, 2, 1, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "store", lambda image: (0, range(10 ** 6)))  # all go through the Jet
        patch.setattr(codec, "RAW_BITS", math.inf)
        content, about = codec.encode(jet, crops, labels=labels)
    return jet, crops, labels, content, about


def test_the_codec_keeps_labels_in_the_header_and_its_promise(coded):
    jet, crops, labels, content, about = coded
    assert np.array_equal(codec.decode(jet, content), crops)
    assert codec.read_file(content)[0]["labels"] == labels
    bits = codec.bound(jet, crops, about["noise"], labels=labels)
    assert about["net_bits"] / crops.size == pytest.approx(bits.mean(), abs=2e-2)
    other = codec.bound(jet, crops, about["noise"], labels=[1, *labels[1:]])
    assert (other != bits).tolist() == [True, False, False, False, False, False]


def test_a_changed_label_is_noticed(coded):
    jet, _, labels, content, _ = coded
    for wrong, line in ((labels[:3] + [4] + labels[4:], "not what was encoded|checksum"), (None, "has no labels, and this Jet is"),
                        (labels[1:], "not a file that this codec wrote"), (["a"] * 6, "not a file that this codec wrote")):
        with pytest.raises(CodecError, match=line):
            codec.decode(jet, with_header(content, labels=wrong))


def test_labels_that_do_not_fit_the_jet_are_one_line(coded, trained, few, tmp_path):
    jet, crops, labels, content, _ = coded
    plain = random_jet(MODEL, image_size=8, num_couplings=3, context_dim=0)
    with pytest.raises(CodecError, match="this Jet is conditional on labels: give those of the images"):
        codec.encode(jet, crops)
    with pytest.raises(CodecError, match="this Jet takes no labels"):
        codec.encode(plain, crops, labels=labels)
    np.save(tmp_path / "bare.npy", load_images(few, "test").array)
    with pytest.raises(SystemExit, match="bare.npy test has no labels"):
        codec.main(["encode", "--checkpoint", str(trained[0]), "--data", str(tmp_path / "bare.npy"), "--out", str(tmp_path / "x.jet")])


def test_the_codec_s_command_takes_the_set_s_labels(trained, few, tmp_path):
    flags = ["--checkpoint", str(trained[0]), "--out"]
    codec.main(["encode", "--data", str(few), "--num-images", "4", *flags, str(tmp_path / "x.jet")])
    codec.main(["decode", str(tmp_path / "x.jet"), *flags, str(tmp_path / "x.npy")])
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_images(few, "test").array[:4])


def test_an_audit_refuses_a_conditional_jet_in_one_line(trained):
    with pytest.raises(AuditError, match="conditional on labels, which an audit does not take yet"):
        load_model(Request(checkpoint=str(trained[0])))
