"""Lossless image compression with a Jet: what a number of bits per dimension is worth in bytes.

    python codec.py encode --checkpoint assets/jet_cifar10 --data cifar10-subset --num-images 64 --out images.jet
    python codec.py decode images.jet --checkpoint assets/jet_cifar10 --out images.npy

A likelihood is a promise of a file size, and this module keeps it. Three ideas make it work:

- Bits back (Hinton and van Camp 1993). The dequantization noise is not thrown away: it is *popped* from the bits that
  were written so far, and the decoder, who finds it out, pushes it back. So an image costs what the uniform
  dequantization bound says, and no more.
- Everything is an integer. x = (X + 1/2) delta with delta = 1/(127.5 * 2^m); a coupling, z2 = (x2 + bias) * scale, is

      B = rint(bias / delta),  scale = p * 2^-s,  V = (X2 + B) * p + u,  Z2 = V >> s,

  u uniform on 0..p-1, popped; the low s bits of V are pushed. That is a bijection of the integers whatever the network says,
  and it costs s - log2 p = -log2 scale bits, which is what the coupling's log-det takes from the code length.
- The prior is a table of whole numbers, and popping and pushing is asymmetric numeral systems (rANS, Duda 2013): the
  written bits are a stack of 32-bit words below a row of 64-bit states, the lanes, which numpy moves together.

The first image is stored raw: its bits are the first stack. The decoder runs everything backwards.
Networks run in float64. Their results are rounded to integers, and what lies so near the middle between two of them that
another machine may round it otherwise is listed in the header. Shapes: as in jet.py; n images in a batch.
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import struct
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from convert import config_checksum, load_jet, weights_checksum
from data import SPLITS, dequantize, fingerprint, load_images
from jet import ActNorm, Coupling, JetConfig, bits_per_dim

MAGIC, VERSION = b"JETCODEC", 1
NOISE_BITS = 8 # m: a grey level is 2^m steps of the grid
SCALE_BITS = 12  # scales are rounded to 13 significant bits
PRIOR_BITS = 24  # the prior's probabilities are multiples of 2^-24: lanes, from 2^30 on, must be far above that
CELL_WIDTH = Fraction(2, 255 * 2 ** 2)  # of the prior's tables, in deviations; within a cell a latent is uniform
LANES = 128  # 64 bits each in the file, of which 48 are used on average
LOWEST = 30  # between two operations a lane is in [2^30, 2^62)
BATCH = 32
PARAMETERS = [NOISE_BITS, SCALE_BITS, PRIOR_BITS]
NEAR_TIE = 1e-8  # in units of what is rounded; float64 networks differ by less between machines
DIGEST_BYTES = 32
QUIET = functools.partial(tqdm, disable=True)


class CodecError(ValueError):
    """A file that cannot be decoded, or images that cannot be encoded, in one line."""


# ---- rANS: a stack of words below a row of lanes. Every operation has an exact inverse, in reverse order.

class Coder:
    """The state of the entropy coder. Lanes are int64 in [2^30, 2^62); words are 32 bits each."""

    def __init__(self, words=(), num_lanes=0, borrow=False):
        self._words = np.zeros(max(1024, 2 * len(words)), np.uint32)
        self._words[:len(words)] = words
        self.num_words = self.low_water = len(words)
        self.lanes, self.fill_bits = np.zeros(0, np.int64), 0.0  # a lane holds a fraction of a bit before its first symbol
        self.borrow, self.borrowed = borrow, 0  # an encoder that runs dry takes more from nowhere, and counts it
        self.set_lanes(num_lanes)

    @property
    def words(self):
        return self._words[:self.num_words]

    @property
    def bits(self):
        """The information held, in bits."""
        return 32 * self.num_words + float(np.log2(self.lanes.astype(float)).sum())

    def put(self, values):
        """Push the low 32 bits of each value."""
        end = self.num_words + len(values)
        if end > len(self._words):
            self._words = np.concatenate([self._words, np.zeros(end, np.uint32)])
        self._words[self.num_words:end] = values & 0xffffffff
        self.num_words = end

    def take(self, count):
        """Pop so many words, in the order in which put got them."""
        if count > self.num_words:
            if not self.borrow:
                raise CodecError("the data end too early: they do not fit these weights")
            missing = count - self.num_words
            fresh = np.random.default_rng([missing, self.borrowed]).integers(0, 2 ** 32, missing, np.uint32)
            self._words = np.concatenate([fresh, self._words])
            self.num_words += missing
            self.borrowed += missing
        self.num_words -= count
        self.low_water = min(self.low_water, self.num_words)
        return self._words[self.num_words:self.num_words + count].astype(np.int64)

    def set_lanes(self, count):
        """More lanes begin with a word of the stack each; of lanes that are given up the words go back there."""
        if count > len(self.lanes):
            fresh = 2 ** 32 | self.take(count - len(self.lanes))
            self.lanes = np.concatenate([self.lanes, fresh])
            self.fill_bits += float((np.log2(fresh) - 32).sum())
        elif count < len(self.lanes):
            if (self.lanes[count:] >> 32 != 1).any():
                raise CodecError("the data are not what was encoded: they do not fit these weights")
            self.put(self.lanes[count:])
            self.lanes = self.lanes[:count].copy()

    def rows(self, count):
        """The slices of `count` values that are coded together, a lane for each."""
        width = len(self.lanes)
        return [slice(start, min(start + width, count)) for start in range(0, count, width)]

    def _shrink(self, x, bounds):
        """Lanes above their bound move their low half to the stack."""
        high = x > bounds
        if high.any():
            self.put(x[high])
            x[high] >>= 32

    def _grow(self, x, bounds):
        """Lanes below their bound take a word from the stack."""
        low = x < bounds
        if count := int(np.count_nonzero(low)):
            x[low] = x[low] << 32 | self.take(count)

    def push_bits(self, values, num_bits):
        """Push values below 2^num_bits (num_bits up to 30), an array of any length."""
        for row in self.rows(len(values)):
            x = self.lanes[:row.stop - row.start]
            self._shrink(x, (1 << 62 - num_bits) - 1)
            x[:] = x << num_bits | values[row]

    def pop_bits(self, count, num_bits):
        values = np.empty(count, np.int64)
        for row in reversed(self.rows(count)):
            x = self.lanes[:row.stop - row.start]
            values[row] = x & (1 << num_bits) - 1
            x >>= num_bits
            self._grow(x, 1 << LOWEST)
        return values

    def rescale(self, x, values, p, shift):
        """z = values * p / 2^shift, rounded by u popped and low bits pushed. x: as many lanes; p <= 2^(shift+1)."""
        low = p << LOWEST - shift
        self._shrink(x, (low - 1 << 32) + 0xffffffff)
        self._grow(x, low)
        quotient, u = np.divmod(x, p)
        values = values * p + u
        x[:] = quotient << shift | values & (1 << shift) - 1
        return values >> shift

    def unscale(self, x, values, p, shift):
        """The inverse of rescale."""
        values = values << shift | x & (1 << shift) - 1
        values, u = np.divmod(values, p)
        x[:] = (x >> shift) * p + u
        self._shrink(x, (1 << 62) - 1)
        self._grow(x, 1 << LOWEST)
        return values


# ---- the prior: a normal distribution on the grid

class Prior:
    """N(0, 1) on the grid: the sign, the cell of the magnitude by tables, and the place in the cell, uniform.

    A table covers cells over which the density falls by 6 nats, so that 24 bits resolve it, and ends in an
    escape to the next, with the probability that a normal tail has. Beyond 64 deviations magnitudes are
    stored as they are. Tables are computed in whole numbers: they are the same on every machine.
    """

    def __init__(self):
        ends, squares = [0], 12  # z^2 where the tables end: each 12 further, which is 6 nats
        while squares <= 64 ** 2:
            ends.append(math.isqrt(int(squares / CELL_WIDTH ** 2)))
            squares += 12
        one = 1 << 192
        # densities at the middle of cells: g(j+1) = g(j) E^(j+1) with E = exp(-width^2)
        E = sum((-1) ** i * int(one * CELL_WIDTH ** (2 * i)) // math.factorial(i) for i in range(30))
        tables, tail = [], None
        for first, last in reversed(list(zip(ends, ends[1:]))):
            density, ratio, sums = one, _power(E, first + 1, one), [0]  # relative to the first cell's
            for _ in range(first, last):
                sums.append(sums[-1] + density)
                density = density * ratio // one
                ratio = ratio * E // one
            if tail is None:  # beyond the last table, like a geometric series
                tail = one * one // (one - ratio)
            sums.append(sums[-1] + density * tail // one)
            tail = sums[-1]
            tables.append([(value << PRIOR_BITS) // tail for value in sums])
        self.tables = [np.array(table, np.int64) for table in reversed(tables)]
        self.ends = np.array(ends[1:], np.int64)
        self.firsts = np.array(ends[:-1], np.int64)
        self._all = np.concatenate(self.tables)
        self._offsets = np.cumsum([0] + [len(table) for table in self.tables[:-1]])

    def push(self, coder, z, noise_bits):
        """Push latents (int64, flat); returns how many were beyond the tables."""
        cell_bits = noise_bits - 2  # a cell is a quarter of a grey level
        negative = z < 0
        magnitude = np.where(negative, ~z, z)
        cells = magnitude >> cell_bits
        levels = np.searchsorted(self.ends, cells, "right")
        coder.push_bits((magnitude & (1 << cell_bits) - 1) << 1 | negative, cell_bits + 1)
        beyond = cells >= self.ends[-1]
        for row in coder.rows(len(z)):
            lanes, level = coder.lanes[:row.stop - row.start], levels[row]
            if beyond[row].any():
                where = np.flatnonzero(beyond[row])
                rest = cells[row][where] - self.ends[-1]
                for part in (rest & 2 ** 24 - 1, rest >> 24):
                    self._push_raw(coder, lanes, where, part)
            for depth in range(min(int(level.max()), len(self.tables) - 1), -1, -1):
                where = np.flatnonzero(level >= depth)
                symbol = np.where(level[where] > depth, self.ends[depth], cells[row][where]) - self.firsts[depth]
                table = self.tables[depth]
                start = table[symbol]
                freq = table[symbol + 1] - start
                x = lanes[where]
                coder._shrink(x, (freq << 62 - PRIOR_BITS) - 1)
                lanes[where] = (x // freq << PRIOR_BITS) + x % freq + start
        return int(beyond.sum())

    def pop(self, coder, count, noise_bits):
        """The inverse of push."""
        cell_bits = noise_bits - 2
        cells = np.empty(count, np.int64)
        for row in reversed(coder.rows(count)):
            lanes = coder.lanes[:row.stop - row.start]
            found = np.zeros(len(lanes), np.int64)
            where = np.arange(len(lanes))
            for depth, table in enumerate(self.tables):
                x = lanes[where]
                slot = x & 2 ** PRIOR_BITS - 1
                symbol = np.searchsorted(table, slot, "right") - 1
                start = table[symbol]
                x = (x >> PRIOR_BITS) * (table[symbol + 1] - start) + slot - start
                coder._grow(x, 1 << LOWEST)
                lanes[where] = x
                found[where] = symbol + self.firsts[depth]
                where = where[symbol == self.ends[depth] - self.firsts[depth]]
                if not len(where):
                    break
            if len(where):
                high, low = (self._pop_raw(coder, lanes, where) for _ in range(2))
                found[where] = self.ends[-1] + (high << 24 | low)
            cells[row] = found
        low = coder.pop_bits(count, cell_bits + 1)
        magnitude = cells << cell_bits | low >> 1
        return np.where(low & 1, ~magnitude, magnitude)

    @staticmethod
    def _push_raw(coder, lanes, where, values):
        x = lanes[where]
        coder._shrink(x, (1 << 38) - 1)
        lanes[where] = x << 24 | values

    @staticmethod
    def _pop_raw(coder, lanes, where):
        x = lanes[where]
        values = x & 2 ** 24 - 1
        x >>= 24
        coder._grow(x, 1 << LOWEST)
        lanes[where] = x
        return values


def _power(base, exponent, one):
    """base^exponent in fixed point."""
    result = one
    while exponent:
        if exponent & 1:
            result = result * base // one
        base, exponent = base * base // one, exponent >> 1
    return result


# ---- the flow on the grid

def noise_bits(batch):
    """m of a batch (0, 1, ...): the first popped their noise from the bits of one raw image."""
    return min(NOISE_BITS, 3 + 2 * batch)


def delta(noise_bits):
    """The step of the grid."""
    return 2 / (255 * 2 ** noise_bits)


class GridFlow:
    """A Jet on integers: encode moves a batch of images to the coder, decode takes it back.

    ties: {(batch, layer, name): [[index, value], ...]}, the roundings that another machine might not repeat; filled by
    encode, obeyed by decode.
    """

    def __init__(self, jet, ties=None):
        self.jet, self.prior = copy.deepcopy(jet).double().eval(), Prior()
        self.layers, self.device = self.jet.layers(), next(jet.parameters()).device
        self.ties = {} if ties is None else ties
        self.decoding = ties is not None
        self.beyond = 0

    def encode(self, images, coder, batch):
        """Push the images (n, H, W, C); returns the noise that was popped, float32 of their shape, in [0, 1)."""
        m = self.noise_bits = noise_bits(batch)
        noise = coder.pop_bits(images.size, m).reshape(images.shape)
        X = (images.astype(np.int64) << m) + noise - (255 << m - 1)  # -1 is -255/2 grey levels
        tokens = self.jet.patchify(torch.from_numpy(X).permute(0, 3, 1, 2).double()).long().numpy()
        for number, layer in enumerate(self.layers):
            tokens = self._layer(layer, tokens, coder, (batch, number), forward=True)
        self.beyond += self.prior.push(coder, tokens.ravel(), m)
        return ((noise + 0.5) / 2 ** m).astype(np.float32)

    def decode(self, count, coder, batch):
        """The inverse of encode: the next `count` images (n, H, W, C), uint8."""
        config, m = self.jet.config, noise_bits(batch)
        self.noise_bits = m
        tokens = self.prior.pop(coder, count * config.num_tokens * config.token_dim, m)
        tokens = tokens.reshape(count, config.num_tokens, config.token_dim)
        for number, layer in reversed(list(enumerate(self.layers))):
            tokens = self._layer(layer, tokens, coder, (batch, number), forward=False)
        X = self.jet.unpatchify(torch.from_numpy(tokens).double()).permute(0, 2, 3, 1).long().numpy() + (255 << m - 1)
        coder.push_bits((X & (1 << m) - 1).ravel(), m)
        pixels = X >> m
        if pixels.min() < 0 or pixels.max() > 255:
            raise CodecError("the data are not what was encoded: they do not fit these weights")
        return pixels.astype(np.uint8)

    def _layer(self, layer, X, coder, where, forward):
        """One layer on tokens X (n, N, D), int64."""
        if isinstance(layer, Coupling):
            x = torch.from_numpy((X + 0.5) * delta(self.noise_bits)).to(self.device)
            bias, scale, _ = layer.affine(x)
            moved = layer.order.chunk(2)[1].cpu().numpy()
            part = (slice(None),) * layer.axis + (moved,)
            X = X.copy()
            X[part] = self._affine(X[part], bias.cpu().numpy(), scale.cpu().numpy(), coder, where, forward)
            return X
        if isinstance(layer, ActNorm):
            bias, scale = (np.broadcast_to(value.detach().cpu().numpy(), X.shape) for value in (layer.bias, layer.log_scale.exp()))
            return self._affine(X, bias, scale, coder, where, forward)
        return self._dense(layer, X, coder, where, forward)

    def _affine(self, X, bias, scale, coder, where, forward):
        """(x + bias) * scale and back, in any shape; factors above 2 are taken in doublings."""
        if not (np.isfinite(bias).all() and (scale > 0).all() and np.isfinite(scale).all()):
            raise CodecError("this Jet's bias or scale is not finite, or a scale is 0: it cannot encode these images")
        if forward:
            self._check_size(where, np.abs(bias).max(initial=0) / delta(self.noise_bits), np.abs(X).max(initial=0), scale.max(initial=0))
        shape, X = X.shape, X.ravel()
        B = self._round(bias.ravel() / delta(self.noise_bits), (*where, "bias"))
        fraction, exponent = np.frexp(np.clip(scale.ravel(), 2.0 ** (SCALE_BITS - LOWEST), None))  # fraction in [1/2, 1)
        p = self._round(fraction * 2 ** (SCALE_BITS + 1), (*where, "scale"))
        full = p == 2 ** (SCALE_BITS + 1)
        p, exponent = p >> full, exponent.astype(np.int64) - 1 + full  # scale = p / 2^12 * 2^exponent, p in [2^12, 2^13)
        doublings = np.maximum(exponent, 0)
        steps = [(np.where(doublings > i, 2, 1), np.zeros_like(p)) for i in range(int(doublings.max(initial=0)))]
        steps.append((p, SCALE_BITS - exponent + doublings))
        if forward:
            X = X + B
            for step in steps:
                X = _by_rows(coder, coder.rescale, X, *step, False)
        else:
            for step in reversed(steps):
                X = _by_rows(coder, coder.unscale, X, *step, True)
            X = X - B
        return X.reshape(shape)

    def _check_size(self, where, bias, X, scale):
        """Raise CodecError where (X + bias) * scale, at 2^13 times its size, would not fit 63 bits."""
        if not (bias + X) * max(1.0, scale) < 2.0 ** 48:
            raise CodecError(f"an image of batch {where[0]} overflows in layer {where[1]}: this Jet cannot encode it")

    def _round(self, values, key):
        """Whole numbers nearest to the values; where that hangs on their last digits, the file's word counts."""
        whole = np.rint(values).astype(np.int64)
        if self.decoding:
            for index, value in self.ties.get(key, ()):
                if not abs(value - values[index]) < 1:
                    raise CodecError("its list of roundings does not fit these weights")
                whole[index] = value
        else:
            near = np.flatnonzero(0.5 - np.abs(values - whole) < NEAR_TIE + 1e-12 * np.abs(values))
            if len(near):
                self.ties[key] = [[int(index), int(whole[index])] for index in near]
        return whole

    def _dense(self, layer, X, coder, where, forward):
        """z = P L U x in lifting steps: rows of U from the first to the last, its diagonal, rows of L from the last."""
        factors = [factor.detach().cpu().numpy() for factor in layer._factors()]
        lower, upper = factors
        diagonal = upper.diagonal()
        if not (np.isfinite(lower).all() and np.isfinite(upper).all() and diagonal.all()):
            raise CodecError("this Jet's dense layer is not finite, or not invertible: it cannot encode these images")
        order = layer.order.cpu().numpy()
        dim = len(order)
        U, L = (np.rint(matrix * 2 ** 20).astype(np.int64) for matrix in (upper / diagonal[:, None], lower))

        def shift(matrix, row, columns):
            return X[..., columns] @ matrix[row, columns] >> 20
        scale = np.broadcast_to(np.abs(diagonal), X.shape)
        X = X.copy()
        if forward:
            for row in range(dim):
                X[..., row] += shift(U, row, slice(row + 1, None))
            X = self._affine(X, np.zeros(X.shape), scale, coder, where, True)
            X = np.where(diagonal < 0, ~X, X)
            for row in reversed(range(dim)):
                X[..., row] += shift(L, row, slice(0, row))
            return X[..., order]
        X[..., order] = X.copy()
        for row in range(dim):
            X[..., row] -= shift(L, row, slice(0, row))
        X = np.where(diagonal < 0, ~X, X)
        X = self._affine(X, np.zeros(X.shape), scale, coder, where, False)
        for row in reversed(range(dim)):
            X[..., row] -= shift(U, row, slice(row + 1, None))
        return X


def _by_rows(coder, operation, X, p, shift, backwards):
    Y = np.empty_like(X)
    rows = coder.rows(len(X))
    for row in reversed(rows) if backwards else rows:
        Y[row] = operation(coder.lanes[:row.stop - row.start], X[row], p[row], shift[row])
    return Y


# ---- files: MAGIC, version, length of the header, header (JSON), lanes, words, SHA-256 of all that

@torch.no_grad()
def encode(jet, images, progress=QUIET):
    """Compress images, uint8 (N, H, W, C), with a Jet.

    Returns (bytes, a dict): net_bits (of all images but the first, which is stored raw), noise (float32
    (N-1, H, W, C) in [0, 1), what dequantized them), file_bits, header_bits, borrowed_bits (taken from nowhere while the first
    images found too few), latents_beyond (the prior's tables, stored raw) and ties. progress: tqdm shows a bar.
    Raises CodecError where shape or type do not fit, or the Jet overflows on an image.
    """
    channels, height, width = jet.config.image_shape
    if images.dtype != np.uint8 or not len(images) or images.shape[1:] != (height, width, channels):
        raise CodecError(f"{images.dtype} images of shape {images.shape}: this Jet takes uint8 (N, {height}, {width}, "
                         f"{channels}), N >= 1")
    raw = images[0].tobytes()
    coder = Coder(np.frombuffer(raw + bytes(-len(raw) % 4), "<u4"), borrow=True)
    flow, before, noise, sizes, need = GridFlow(jet), 32 * coder.num_words, [], [], math.inf
    with progress(total=len(images), initial=1) as bar:
        start = 1
        while start < len(images):
            size = 1 if noise_bits(len(sizes)) < NOISE_BITS else max(1, min(BATCH, len(images) - start, int(coder.num_words / (1.3 * need))))
            coder.set_lanes(_num_lanes([*sizes, size]))
            coder.low_water, had = coder.num_words, coder.num_words
            noise.append(flow.encode(images[start:start + size], coder, len(sizes)))
            need = max(1, (had - coder.low_water) / size)
            sizes.append(size)
            start += size
            bar.update(size)
    net = coder.bits - before - 32 * coder.borrowed - coder.fill_bits
    header = {"shape": list(images.shape), "bits": PARAMETERS, "batches": sizes, "words": coder.num_words,
              "borrowed": coder.borrowed, **_checksums(jet), "pixels": fingerprint(images)}
    if flow.ties:
        header["ties"] = [[*key, values] for key, values in flow.ties.items()]
    header = json.dumps(header, separators=(",", ":")).encode()
    content = b"".join([MAGIC, struct.pack("<II", VERSION, len(header)), header, coder.lanes.astype("<i8").tobytes(),
                        coder.words.astype("<u4").tobytes()])
    content += hashlib.sha256(content).digest()
    return content, {"net_bits": net, "file_bits": 8 * len(content), "header_bits": 8 * len(header),
                     "borrowed_bits": 32 * coder.borrowed, "latents_beyond": flow.beyond,
                     "ties": sum(map(len, flow.ties.values())),
                     "noise": np.concatenate(noise) if noise else np.zeros((0, *images.shape[1:]), np.float32)}


def _checksums(jet):
    """What names a Jet in a header: the first half of its checksums."""
    return {"config": config_checksum(jet)[:32], "weights": weights_checksum(jet)[:32]}


def _num_lanes(sizes):
    """Lanes of the last of these batches: few while the stack is small, then LANES."""
    return min(LANES, 8 * max(sizes))


@torch.no_grad()
def decode(jet, content, progress=QUIET):
    """The images, uint8 (N, H, W, C), of a file that encode wrote with the same Jet.

    Raises CodecError for other weights, another version, and a file that is truncated, altered or something else.
    """
    header, lanes, words = read_file(content)
    for name, ours in _checksums(jet).items():
        if header[name] != ours:
            raise CodecError(f"written with another {name} (checksum {header[name]}, this Jet's is {ours}): give the weights "
                             "that it was encoded with")
    channels, height, width = jet.config.image_shape
    if header["shape"][1:] != [height, width, channels]:
        raise CodecError(f"of images of shape {header['shape'][1:]}: this Jet makes {[height, width, channels]}")
    try:
        images = _decode(jet, header, lanes, words, progress)
    except (IndexError, OverflowError, ValueError) as error:  # what a header that was made up can lead to
        if isinstance(error, CodecError):
            raise
        raise CodecError(f"the data are not what was encoded ({type(error).__name__}): encode it again") from None
    if fingerprint(images) != header["pixels"]:
        raise CodecError("the decoded pixels do not have the file's checksum: another machine's arithmetic, or a bug; nothing "
                         "was written")
    return images


def _decode(jet, header, lanes, words, progress):
    num_images, *shape = header["shape"]
    sizes, coder = header["batches"], Coder(words)
    coder.lanes = lanes
    ties = {(batch, layer, name): values for batch, layer, name, values in header.get("ties", ())}
    flow, images, end = GridFlow(jet, ties), np.empty(header["shape"], np.uint8), num_images
    with progress(total=num_images) as bar:
        for batch in reversed(range(len(sizes))):
            images[end - sizes[batch]:end] = flow.decode(sizes[batch], coder, batch)
            end -= sizes[batch]
            coder.set_lanes(_num_lanes(sizes[:batch]) if batch else 0)
            bar.update(sizes[batch])
        bar.update(end)
    first = coder.words[header["borrowed"]:].astype("<u4").tobytes()[:math.prod(shape)]
    images[0] = np.frombuffer(first, np.uint8).reshape(shape)
    return images


def read_file(content):
    """(header, lanes, words) of a file's bytes, checked against each other. Raises CodecError."""
    start = len(MAGIC) + 8
    if content[:len(MAGIC)] != MAGIC:
        raise CodecError("not a file of this codec")
    if len(content) < start + DIGEST_BYTES:
        raise CodecError("truncated: encode it again")
    version, size = struct.unpack("<II", content[len(MAGIC):start])
    if version != VERSION:
        raise CodecError(f"of format version {version}, and this codec reads version {VERSION}: use the code that wrote it")
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise CodecError("truncated or altered (its checksum does not fit): encode it again")
    try:
        header = json.loads(content[start:start + size])
        body = content[start + size:-DIGEST_BYTES]
        sizes, shape, num_words = header["batches"], header["shape"], header["words"]
        whole = (all(type(value) is int and value > 0 for value in (*sizes, *shape)) and len(shape) == 4
                 and max(sizes, default=1) <= BATCH and type(header["borrowed"]) is int and type(header["bits"]) is list)
        for batch, layer, name, values in header.get("ties", ()):
            whole &= (all(type(value) is int for value in (batch, layer)) and type(name) is str
                      and all(type(value) is int and abs(value) < 2 ** 53 for pair in values for value in pair)
                      and all(len(pair) == 2 and pair[0] >= 0 for pair in values))
        lanes, words = body[:len(body) - 4 * num_words], body[len(body) - 4 * num_words:]
        lanes, words = np.frombuffer(lanes, "<i8").astype(np.int64), np.frombuffer(words, "<u4")
        if (not whole or sum(sizes) != shape[0] - 1 or len(lanes) != (_num_lanes(sizes) if sizes else 0)
                or num_words < 0 or len(words) != num_words or header["borrowed"] < 0
                or not all(type(header[name]) is str for name in ("config", "weights", "pixels"))):
            raise ValueError("its numbers do not fit each other")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CodecError(f"not a file that this codec wrote ({type(error).__name__}: {error})") from None
    if header["bits"] != PARAMETERS:
        raise CodecError(f"written with the parameters {header['bits']}, and this codec has {PARAMETERS}: use the code that "
                         "wrote it")
    return header, lanes, words


@torch.no_grad()
def bound(jet, images, noise, batch_size=BATCH):
    """Bits per dimension (N,) of images (N, H, W, C) under a Jet in float64, with the noise that encode popped."""
    jet = copy.deepcopy(jet).double().eval()
    device = next(jet.parameters()).device
    bits = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x = dequantize(images[part], noise[part].astype(float)).permute(0, 3, 1, 2).to(device)
        bits.append(bits_per_dim(*jet(x)).cpu())
    return torch.cat(bits).numpy()


# ---- the command line

def main(arguments=None):
    from run_folder import write_atomically  # the command line alone needs the trainer's parts
    from train import ArgumentParser, add_config_flags, model_flags, one_line_errors, pick_device

    parser = ArgumentParser(prog="codec.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode")
    for name, about in (("encode", "compress an image set"), ("decode", "restore the images as a .npy file")):
        command = commands.add_parser(name, help=about, description=about)
        if name == "encode":
            command.add_argument("--data", default="cifar10-subset", help="image set: a known name, a prepared folder or a .npy "
                                 "file (default: cifar10-subset)")
            command.add_argument("--split", choices=SPLITS, default="test", help="default: test")
            command.add_argument("--num-images", type=int, metavar="N", help="the first N images (default: all)")
            command.add_argument("--data-root", metavar="DIR", help="holds the image sets (default: $JET_DATA)")
        else:
            command.add_argument("file", type=Path, help="what encode wrote")
        command.add_argument("--out", type=Path, required=True, help="the file to write")
        command.add_argument("--checkpoint", type=Path, required=True, help="the Jet: a run folder or weight file")
        command.add_argument("--device", default="cpu", help="auto, cpu or cuda, the same for both (default: cpu)")
        command.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
        add_config_flags(command.add_argument_group("the model, as far as a file of another implementation does not tell it"),
                         JetConfig, "model.")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, CodecError):
        if flags.threads < 1:
            raise CodecError(f"--threads {flags.threads}: must be 1 or more")
        torch.set_num_threads(flags.threads)
        jet = load_jet(flags.checkpoint, **model_flags(vars(flags))).to(pick_device(flags.device))
        if not flags.out.resolve().parent.is_dir():
            raise CodecError(f"--out {flags.out}: there is no folder {flags.out.parent}")
        begun, bar = time.monotonic(), functools.partial(tqdm, desc=flags.command, unit=" images", mininterval=0.5)
        if flags.command == "encode":
            images = load_images(flags.data, flags.split, flags.data_root).array
            if flags.num_images is not None and not 1 <= flags.num_images <= len(images):
                raise CodecError(f"--num-images {flags.num_images}: {flags.data} {flags.split} has 1 to {len(images)}")
            images = images[:flags.num_images]
            content, about = encode(jet, images, bar)
            write_atomically(flags.out, lambda file: file.write(content))
            net = (f", net {about['net_bits'] / images[1:].size:.4f}" if len(images) > 1 else "")
            print(f"{flags.out}: {len(images):,} images of {flags.data} in {len(content):,} bytes, "
                  f"{8 * len(content) / images.size:.4f} bits/dim{net}; {time.monotonic() - begun:.1f} s")
        else:
            try:
                images = decode(jet, flags.file.read_bytes(), bar)
            except CodecError as error:
                raise CodecError(f"{flags.file}: {error}") from None
            write_atomically(flags.out, lambda file: np.save(file, images))
            print(f"{flags.out}: {len(images):,} images, pixels as encoded (fingerprint {fingerprint(images)[:12]}); "
                  f"{time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
