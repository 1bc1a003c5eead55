"""Lossless image compression with a Jet: what a number of bits per dimension is worth in bytes.

    python codec.py encode --checkpoint assets/jet_cifar10 --data cifar10-subset --num-images 64 \\
        --out images.jet
    python codec.py decode images.jet --checkpoint assets/jet_cifar10 --out images.npy

A likelihood is a promise of a file size, and this module keeps it:

- Bits back (Hinton and van Camp 1993): the dequantization noise is *popped* from the bits that are
  written, and the decoder, who finds it out, pushes it back. So an image costs what the uniform
  dequantization bound says. The first images are stored as WebP or PNG (coding/stored.py): their
  bits are the first stack. So is each image for which the Jet would take more.
- A coupling, z2 = (x2 + bias) * scale, is a bijection of the integers whatever the network says. It
  costs -log2 scale bits, as its log-det says (coding/lifting.py).
- The prior is a table of whole numbers (coding/prior.py); to pop and push is asymmetric numeral
  systems (coding/ans.py).

Networks run in float64, on PyTorch's own kernels. Where another machine may round their results
otherwise, the header says how (coding/file_format.py). Shapes: as in jet.py; n images in a batch.
"""
import copy
import functools
import math
import time
from pathlib import Path

import harness  # noqa: F401 (first: it says what is not installed)

import numpy as np
import torch

from coding.ans import Coder, CodecError
from coding.file_format import (BATCH, MAX_LABELS, PARAMETERS, images_of, num_lanes, read_file,
                                write_file)
from coding.lifting import NOISE_BITS, Lifting, delta, noise_bits
from coding.prior import Prior
from coding.stored import restore, store
from convert import config_checksum, load_jet
from data import SPLITS, fingerprint, load_images
from harness.checkpoint import weights_checksum
from harness.condition import check_labels, one_hot
from harness.files import read_bytes, write_atomically
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.machine import MAX_THREADS, pick_device
from harness.progress import progress
from jet import ActNorm, Coupling, JetConfig, bits_per_dim, dequantize

RAW_BITS = 8  # of a value of an image that is stored as it is
QUIET = functools.partial(progress, disable=True)


class GridFlow:
    """A Jet on integers: encode moves a batch of images to the coder, decode takes it back.

    ties: None to encode; the roundings of a file to decode it (coding/lifting.py).
    """

    def __init__(self, jet, coder, ties=None):
        self.jet, self.device = copy.deepcopy(jet).double().eval(), next(jet.parameters()).device
        self.coder, self.prior, self.lifting = coder, Prior(), Lifting(coder, ties)
        self.latents_beyond = 0  # the prior's tables, in the last batch

    def encode(self, images, batch, labels=None):
        """Push the images (n, H, W, C); labels: (n,) of a class-conditional Jet.

        Returns the noise that was popped, float32 in [0, 1), and the bits of each image. Where one
        takes more than its pixels, nothing is pushed to the prior: such a batch is not kept.
        """
        context = self._context(labels)
        m = noise_bits(batch)
        noise = self.coder.pop_bits(images.size, m).reshape(images.shape)
        X = (images.astype(np.int64) << m) + noise - (255 << m - 1)  # -1 is -255/2 grey levels
        tokens = self.jet.patchify(torch.from_numpy(X).permute(0, 3, 1, 2).double()).long().numpy()
        self.lifting.logdet = np.zeros(len(images))
        for number, layer in enumerate(self.jet.layers()):
            tokens = self._apply(layer, tokens, (batch, number), context, self.lifting.affine,
                                 self.lifting.dense)
        z, logdet = map(torch.from_numpy, ((tokens + 0.5) * delta(m), self.lifting.logdet))
        bits = images[0].size * bits_per_dim(z, logdet).numpy()
        if np.all(bits <= RAW_BITS * images[0].size):
            self.latents_beyond = self.prior.push(self.coder, tokens.ravel(), m)
        return ((noise + 0.5) / 2 ** m).astype(np.float32), bits

    def decode(self, count, batch, labels=None):
        """The inverse of encode: the next `count` images (n, H, W, C), uint8."""
        config, m, context = self.jet.config, noise_bits(batch), self._context(labels)
        tokens = self.prior.pop(self.coder, count * config.num_tokens * config.token_dim, m)
        tokens = tokens.reshape(count, config.num_tokens, config.token_dim)
        for number, layer in reversed(list(enumerate(self.jet.layers()))):
            tokens = self._apply(layer, tokens, (batch, number), context,
                                 self.lifting.affine_inverse, self.lifting.dense_inverse)
        X = self.jet.unpatchify(torch.from_numpy(tokens).double()).permute(0, 2, 3, 1)
        X = X.long().numpy() + (255 << m - 1)
        self.coder.push_bits((X & (1 << m) - 1).ravel(), m)
        pixels = X >> m
        if pixels.min() < 0 or pixels.max() > 255:
            raise CodecError("the data are not what was encoded: they do not fit these weights")
        return pixels.astype(np.uint8)

    def _context(self, labels):
        if labels is None:
            return None
        return one_hot(labels, self.jet.config.context_dim).double().to(self.device)

    def _apply(self, layer, X, where, context, affine, dense):
        """One layer on tokens X (n, N, D), int64. affine, dense: of Lifting, or their inverses."""
        if isinstance(layer, Coupling):
            tokens, step = torch.from_numpy(X).to(self.device), delta(noise_bits(where[0]))
            x1, x2 = layer.split(tokens)
            net_out = layer.network((x1.double() + 0.5) * step, context)
            bias, scale, _ = layer.affine(net_out, x2.double())
            x2 = affine(x2.cpu().numpy(), bias.cpu().numpy(), scale.cpu().numpy(), where)
            return layer.join(tokens, torch.from_numpy(x2).to(self.device)).cpu().numpy()
        if isinstance(layer, ActNorm):
            bias, scale = (np.broadcast_to(value.detach().cpu().numpy(), X.shape)
                           for value in (layer.bias, layer.log_scale.exp()))
            return affine(X, bias, scale, where)
        return dense(X, layer, where)


@torch.no_grad()
def encode(jet, images, progress=QUIET, labels=None):
    """Compress images, uint8 (N, H, W, C), with a Jet. progress: tqdm shows a bar. labels: whole
    numbers (N,) of a class-conditional Jet, which go into the header.

    Returns (bytes, a dict): coded (indices of the images that are not stored), net_bits (of those),
    noise (what dequantized them, float32 in [0, 1)), file_bits, header_bits, stored_bits,
    borrowed_bits (from nowhere, where no stored image fed the first one), latents_beyond (the
    prior's tables) and ties. Raises CodecError where shape or type do not fit, or the Jet overflows
    on an image.
    """
    channels, height, width = jet.config.image_shape
    if images.dtype != np.uint8 or not len(images) or images.shape[1:] != (height, width, channels):
        raise CodecError(f"{images.dtype} images of shape {images.shape}: this Jet takes uint8 "
                         f"(N, {height}, {width}, {channels}), N >= 1")
    if (labels is None) == (jet.config.context_dim > 0):
        raise CodecError("this Jet is conditional on labels: give those of the images" if
                         labels is None else "this Jet takes no labels: leave them out")
    if labels is not None and len(labels) > MAX_LABELS:
        raise CodecError(f"{len(labels):,} labels: a header takes {MAX_LABELS:,}: encode fewer "
                         "images at once")
    writer = Writer(jet, images, labels)
    with progress(total=len(images)) as bar:
        while writer.start < len(images):
            bar.update(writer.step())
    coder, ties = writer.coder, writer.flow.lifting.ties
    header = {"shape": list(images.shape), "bits": PARAMETERS, "batches": writer.sizes,
              "words": coder.num_words, **_checksums(jet), "pixels": fingerprint(images)}
    if labels is not None:
        header["labels"] = [int(label) for label in labels]
    if ties:
        header["ties"] = [[*key, values] for key, values in ties.items()]
    content, header_bytes = write_file(header, coder.lanes, coder.words)
    no_noise = np.zeros((0, *images.shape[1:]), np.float32)
    unpaid = writer.stored_bits + 32 * coder.borrowed + coder.fill_bits
    return content, {"coded": writer.coded, "net_bits": coder.bits - unpaid,
                     "file_bits": 8 * len(content), "header_bits": 8 * header_bytes,
                     "stored_bits": writer.stored_bits, "borrowed_bits": 32 * coder.borrowed,
                     "latents_beyond": writer.latents_beyond, "ties": sum(map(len, ties.values())),
                     "noise": np.concatenate([no_noise, *writer.noise])}


class Writer:
    """What encode does: in each step as many images as the stack can feed with noise.

    An image for which the Jet takes more bits than WebP, PNG or its pixels is stored so, as are the
    first ones, for whose noise there are no bits yet.
    """

    def __init__(self, jet, images, labels):
        self.images, self.labels, self.coder = images, labels, Coder(borrow=True)
        self.flow = GridFlow(jet, self.coder)
        self.start, self.size, self.sizes = 0, 1, []  # of images: the next, and how many are tried
        self.coded, self.noise, self.stored_bits, self.latents_beyond = [], [], 0, 0

    def step(self):
        """Encode or store the next images; returns how many, 0 where fewer are to be tried."""
        part, before = self.images[self.start:self.start + self.size], self.coder.saved()
        noise, bits, popped = self._encode(part)
        paid, limit = self.coder.most_bits - before.most_bits, RAW_BITS * part.size
        is_cheap, is_fed = bits <= RAW_BITS * part[0].size, self.coder.borrowed == before.borrowed
        if len(part) == 1:
            kind, words = store(part[0])
            limit, is_fed = 32 * len(words), True
        if paid <= limit and np.all(is_cheap) and is_fed:
            return self._keep(len(part), noise, popped)
        self.coder.set_back(before)
        ties = self.flow.lifting.ties
        for key in [key for key in ties if key[0] == len(self.noise)]:
            del ties[key]
        if len(part) > 1:
            self.size = max(1, min(len(part) // 2, int(np.argmin([*is_cheap, False]))))
            return 0
        self.coder.put(words)
        self.stored_bits += 32 * len(words)
        self.sizes.append(kind)
        self.start += 1
        return 1

    def _encode(self, part):
        """(noise, bits of each image, words of the stack that were popped)."""
        self.coder.set_lanes(num_lanes([*self.sizes, len(part)], part[0].size))
        self.coder.low_water = had = self.coder.num_words
        told = None if self.labels is None else self.labels[self.start:self.start + len(part)]
        return *self.flow.encode(part, len(self.noise), told), had - self.coder.low_water

    def _keep(self, count, noise, popped):
        self.coded += range(self.start, self.start + count)
        self.noise.append(noise)
        self.sizes.append(count)
        self.start += count
        self.latents_beyond += self.flow.latents_beyond
        if noise_bits(len(self.noise)) == NOISE_BITS:  # with a margin; before, it is coarser
            need = max(1, popped / count)
            self.size = max(1, min(BATCH, int(self.coder.num_words / (1.3 * need))))
        return count


def _checksums(jet):
    """What names a Jet in a header: the first half of its checksums."""
    return {"config": config_checksum(jet)[:32], "weights": weights_checksum(jet)[:32]}


@torch.no_grad()
def decode(jet, content, progress=QUIET):
    """The images, uint8 (N, H, W, C), of a file that encode wrote with the same Jet.

    Raises CodecError for other weights, another version, and what is no such file.
    """
    header, lanes, words = read_file(content)
    for name, ours in _checksums(jet).items():
        if header[name] != ours:
            raise CodecError(f"written with another {name} (checksum {header[name]}, this Jet's is "
                             f"{ours}): give the weights that it was encoded with")
    channels, *sides = jet.config.image_shape
    if header["shape"][1:] != [*sides, channels]:
        raise CodecError(f"of images of shape {header['shape'][1:]}: this Jet makes "
                         f"{[*sides, channels]}")
    if ("labels" in header) != (jet.config.context_dim > 0):
        raise CodecError("has labels, and this Jet takes none" if "labels" in header else
                         "has no labels, and this Jet is conditional on them")
    try:
        images = _decode(jet, header, lanes, words, progress)
    except CodecError:
        raise
    except MemoryError:
        raise CodecError(f"{header['shape'][0]:,} images do not fit in this machine's "
                         "memory") from None
    except (IndexError, OverflowError, ValueError) as error:  # of a header that was made up
        raise CodecError(f"the data are not what was encoded ({type(error).__name__}): encode it "
                         "again") from None
    if fingerprint(images) != header["pixels"]:
        raise CodecError("the decoded pixels do not have the file's checksum: another machine's "
                         "arithmetic, or a bug; nothing was written")
    return images


def _decode(jet, header, lanes, words, progress):
    num_images, *shape = header["shape"]
    sizes, coder, dims = header["batches"], Coder(words), math.prod(shape)
    coder.lanes = lanes
    ties = {(batch, layer, name): pairs for batch, layer, name, pairs in header.get("ties", ())}
    flow, images, end = GridFlow(jet, coder, ties), np.empty(header["shape"], np.uint8), num_images
    batch = sum(size > 0 for size in sizes)
    with progress(total=num_images) as bar:
        for number, size in reversed(list(enumerate(sizes))):
            part = slice(end - images_of(size), end)
            if size > 0:
                batch -= 1
                told = header["labels"][part] if "labels" in header else None
                images[part] = flow.decode(size, batch, told)
                coder.set_lanes(num_lanes(sizes[:number], dims))
            else:
                images[part] = restore(coder, size, shape)
            end = part.start
            bar.update(images_of(size))
    return images


@torch.no_grad()
def bound(jet, images, noise, batch_size=BATCH, labels=None):
    """Bits/dim (N,) of images (N, H, W, C) under a Jet in float64, with the noise of encode."""
    jet, device, bits = copy.deepcopy(jet).double().eval(), next(jet.parameters()).device, []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x = dequantize(images[part], noise[part].astype(float)).permute(0, 3, 1, 2).to(device)
        told = [] if labels is None else [one_hot(labels[part], jet.config.context_dim)]
        bits.append(bits_per_dim(*jet(x, *told)).cpu())
    return torch.cat(bits).numpy()


# ---- the command line

def parse(arguments):
    parser = ArgumentParser(prog="codec.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode")
    about = {"encode": "compress an image set", "decode": "restore the images as a .npy file"}
    encoder, decoder = (commands.add_parser(name, help=text, description=text)
                        for name, text in about.items())
    encoder.add_argument("--data", default="cifar10-subset",
                         help="image set: a known name, a prepared folder or a .npy file "
                         "(default: cifar10-subset)")
    encoder.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    encoder.add_argument("--num-images", type=int, metavar="N",
                         help="the first N images (default: all)")
    encoder.add_argument("--data-root", metavar="DIR",
                         help="holds the image sets (default: $JET_DATA)")
    decoder.add_argument("file", type=Path, help="what encode wrote")
    for command in (encoder, decoder):
        command.add_argument("--out", type=Path, required=True, help="the file to write")
        command.add_argument("--checkpoint", type=Path, required=True,
                             help="the Jet: a run folder or weight file")
        command.add_argument("--device", default="cpu",
                             help="auto, cpu or cuda, the same for both (default: cpu)")
        command.add_argument("--threads", type=int, default=2, metavar="N",
                             help="CPU threads (default: 2)")
        model = command.add_argument_group("the model, as far as a file of another implementation "
                                           "does not tell it")
        add_setting_flags(model, JetConfig, "model.")
    return parser.parse_args(arguments)


def encode_set(jet, flags, progress):
    """Write a file of an image set; returns what to say of it."""
    image_set = load_images(flags.data, flags.split, flags.data_root)
    check_labels(image_set, jet.config)
    images, labels = image_set.array, image_set.labels
    if flags.num_images is not None and not 1 <= flags.num_images <= len(images):
        raise CodecError(f"--num-images {flags.num_images}: {flags.data} {flags.split} has 1 to "
                         f"{len(images)}")
    images = images[:flags.num_images]
    labels = labels[:flags.num_images] if jet.config.context_dim else None
    content, about = encode(jet, images, progress, labels)
    write_atomically(flags.out, lambda file: file.write(content))
    text = (f"{len(images):,} images of {flags.data} in {len(content):,} bytes, "
            f"{8 * len(content) / images.size:.4f} bits/dim")
    net = about["net_bits"] / images[0].size / max(1, len(about["coded"]))
    stored = len(images) - len(about["coded"])
    return f"{text}, {stored:,} stored" + (f", net {net:.4f}" if about["coded"] else "")


def decode_file(jet, flags, progress):
    """Write the images of a file; returns what to say of them."""
    try:
        images = decode(jet, read_bytes(flags.file, max_bytes=2 ** 40), progress)
    except CodecError as error:
        raise CodecError(f"{flags.file}: {error}") from None
    write_atomically(flags.out, lambda file: np.save(file, images))
    return f"{len(images):,} images, pixels as encoded (fingerprint {fingerprint(images)[:12]})"


def main(arguments=None):
    flags = parse(arguments)
    with one_line_errors("codec.py"):
        if not 1 <= flags.threads <= MAX_THREADS:
            raise CodecError(f"--threads {flags.threads}: must be from 1 to {MAX_THREADS}")
        torch.set_num_threads(flags.threads)
        jet = load_jet(flags.checkpoint, **model_fields(vars(flags))).to(pick_device(flags.device))
        if not flags.out.resolve().parent.is_dir():
            raise CodecError(f"--out {flags.out}: there is no folder {flags.out.parent}")
        begun = time.monotonic()
        bar = functools.partial(progress, desc=flags.command)
        run = {"encode": encode_set, "decode": decode_file}[flags.command]
        print(f"{flags.out}: {run(jet, flags, bar)}; {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
