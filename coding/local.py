"""Lossless compression with any flow of images: local bits-back coding (Ho, Lohn, Abbeel 2019).

A flow is given by two functions in float64, z, logdet = model.forward(x) and x, logdet =
model.inverse(z), and costs a Jacobian J an image, which is found from finite differences of z: the
model's own log-det is not used. An image x, with noise that is popped as in codec.py, is encoded by

    pop z' from N(z, s^2 J J^T),  push x under N(inverse(z'), s^2 I),  push z' under N(0, I).

For small s this costs -log2 N(z) - log2 |det J| bits, as the likelihood says. All of it is whole
numbers: X and Z are x and z in steps of two grids, s is SPREAD steps of that of x. With J J^T =
L L^T, Z' = Z + E + shear, where the E are independent, with the deviations s L_ii, and the shear of
row i adds what the E before it make of it.

What is written decodes where the functions give the same bits again: on the same kind of machine,
with as many threads.
"""
import functools
import math

import numpy as np
import torch

from coding.ans import SYMBOL_BITS, CodecError, Coder
from coding.file_format import read_parts, write_file
from coding.lifting import delta
from coding.prior import Prior, find
from data import fingerprint
from harness.progress import progress
from jet import bits_per_dim

QUIET = functools.partial(progress, disable=True)
KIND = b"JETLOCAL", 1
LANES = 16
SPREAD = 16  # s, in steps of the grid of x
REACH = 64  # deviations s that x may be off the inverse of z'
NOISE_BITS = range(8, 25, 2)  # a grey level has 2^m steps: those that are tried for m
MOST_BITS = 31  # of the grid of z, which the prior takes
NEGLIGIBLE = 5e-4  # bits/dim
MOST_DIMS = 2 ** 14  # their Jacobian takes 2 GB
COLUMNS = 63  # of a Jacobian at once
LARGEST = 2.0 ** 52
OCTAVE = 64  # deviations that are told apart between one and its double


def normal_table(deviation, ends):
    """Cumulative probabilities, of 2^24, of the cells between these ends; none has none."""
    ends = torch.as_tensor(ends, dtype=torch.float64)
    below = torch.special.ndtr(ends / torch.as_tensor(deviation, dtype=torch.float64)).numpy()
    cells = len(ends) - 1
    table = np.floor(below * (2 ** SYMBOL_BITS - cells)).astype(np.int64) + np.arange(cells + 1)
    table[..., 0], table[..., -1] = 0, 2 ** SYMBOL_BITS
    return table


@functools.cache
def tables():
    """Those of E, for the deviations 2^(i / OCTAVE) from 1/2 to 32 cells; that of x."""
    deviations = 2.0 ** (np.arange(-OCTAVE, 5 * OCTAVE + 1) / OCTAVE)
    edges = np.arange(REACH * SPREAD * 2 + 1) - REACH * SPREAD - 0.5
    return (normal_table(deviations[:, None], np.arange(-256, 257)), normal_table(SPREAD, edges))


class LocalFlow:
    """A flow and a coder; shape: (C, H, W); bits: of a grey level, on the grids of x and z."""

    def __init__(self, model, shape, coder, bits):
        self.model, self.shape, self.coder = model, tuple(shape), coder
        self.noise_bits, self.latent_bits = bits
        self.dims, self.prior = math.prod(shape), Prior()

    def encode(self, image):
        """Push an image (H, W, C), uint8; returns its bits/dim by the likelihood, at its noise."""
        m = self.noise_bits
        noise = self.coder.pop_bits(self.dims, m)
        X = (image.transpose(2, 0, 1).ravel().astype(np.int64) << m) + noise - (255 << m - 1)
        z, logdet, place, deviations, shear = self._around(X)
        E = self._pop_deviates(deviations)
        Z = place + E + self._sheared(shear, E, range(self.dims))
        if not np.abs(Z).max() < LARGEST:
            raise CodecError("its latents are too large to be coded")
        off = X - self._back(Z) + REACH * SPREAD
        if off.min() < 0 or off.max() >= 2 * REACH * SPREAD:
            raise CodecError("inverse(z) is too far from x near the z of an image: off by "
                             f"{np.abs(off - REACH * SPREAD).max() / 2 ** m:.2g} grey levels")
        for row, x in self.coder.rows(self.dims):
            table = tables()[1]
            self.coder.push_symbol(x, table[off[row]], table[off[row] + 1] - table[off[row]])
        self.prior.push(self.coder, Z, self.latent_bits)
        return bits_per_dim(z[None], logdet[None]).item()

    def decode(self):
        """The inverse of encode: the image."""
        m, coder = self.noise_bits, self.coder
        Z = self.prior.pop(coder, self.dims, self.latent_bits)
        off = np.empty(self.dims, np.int64)
        for row, x in reversed(coder.rows(self.dims)):
            off[row] = coder.pop_symbol(x, functools.partial(find, tables()[1]))
        X = off - REACH * SPREAD + self._back(Z)
        _, _, place, deviations, shear = self._around(X)
        E = Z - place
        for row in range(1, self.dims):
            E[row] -= self._sheared(shear, E, [row])[0]
        self._push_deviates(E, deviations)
        X += 255 << m - 1
        coder.push_bits(X & (1 << m) - 1, m)
        pixels = X >> m
        if pixels.min() < 0 or pixels.max() > 255:
            raise CodecError("the data are not what was encoded: they do not fit this model")
        return pixels.astype(np.uint8).reshape(self.shape).transpose(1, 2, 0)

    def _x(self, X):
        return torch.from_numpy((X + 0.5) * delta(self.noise_bits)).view(self.shape)

    def _back(self, Z):
        """inverse(z) on the grid of x."""
        z = torch.from_numpy((Z + 0.5) * delta(self.latent_bits)).view(1, *self.shape)
        x = _finite(self.model.inverse(z)[0])
        return _whole(x.numpy().ravel() / delta(self.noise_bits))

    def _around(self, X):
        """(z, log-det, Z, the deviations of E in steps, shear) of x."""
        z, logdet, R = local_map(self.model, self._x(X), SPREAD * delta(self.noise_bits))
        steps = SPREAD * 2.0 ** (self.latent_bits - self.noise_bits)
        place = _whole(z.numpy() / delta(self.latent_bits))
        diagonal = R.diagonal()
        return z, logdet, place, np.abs(diagonal) * steps, (R / diagonal[:, None]).T.copy()

    def _sheared(self, shear, E, rows):
        """What the E before each of these rows add to it: the same sums, whatever the rows."""
        E = E.astype(float)
        sums = np.array([shear[row, :row] @ E[:row] for row in rows])
        return _whole(sums)

    def _scales(self, deviations):
        """(the table of each deviation, the bits of a cell)."""
        cell_bits = np.clip(np.floor(np.log2(deviations)).astype(np.int64) - 4, 0, 30)
        octaves = np.log2(deviations) - cell_bits
        return np.clip(np.rint((octaves + 1) * OCTAVE), 0, 6 * OCTAVE).astype(np.int64), cell_bits

    def _pop_deviates(self, deviations):
        which, cell_bits = self._scales(deviations)
        E = np.empty(self.dims, np.int64)
        for row, x in reversed(self.coder.rows(self.dims)):
            table = tables()[0][which[row]]
            cell = self.coder.pop_symbol(x, functools.partial(find_row, table))
            E[row] = (cell - 256 << cell_bits[row]) + self.coder.pop_raw(x, cell_bits[row])
        return E

    def _push_deviates(self, E, deviations):
        which, cell_bits = self._scales(deviations)
        cells = (E >> cell_bits) + 256
        if cells.min() < 0 or cells.max() >= 512:
            raise CodecError("the data are not what was encoded: they do not fit this model")
        for row, x in self.coder.rows(self.dims):
            self.coder.push_raw(x, E[row] & (1 << cell_bits[row]) - 1, cell_bits[row])
            table, cell = tables()[0][which[row]], cells[row][:, None]
            start, end = (np.take_along_axis(table, cell + i, 1)[:, 0] for i in (0, 1))
            self.coder.push_symbol(x, start, end - start)


def find_row(table, slot):
    """find with a table for each slot."""
    symbol = (table <= slot[:, None]).sum(1) - 1
    start, end = (np.take_along_axis(table, symbol[:, None] + i, 1)[:, 0] for i in (0, 1))
    return symbol, start, end - start


def local_map(model, x, step):
    """(z (D,), log-det, R with J J^T = R^T R) at an image x, J from differences over a step."""
    flat, transposed = x.flatten(), []
    for start in range(0, len(flat), COLUMNS):
        columns = torch.arange(start, min(start + COLUMNS, len(flat)))
        moved = flat.repeat(len(columns) + 1, 1)
        moved[columns - start + 1, columns] += step
        z, logdet = (_finite(part) for part in model.forward(moved.view(-1, *x.shape)))
        z = z.flatten(1)
        transposed.append((z[1:] - z[0]) / step)
    R = torch.linalg.qr(torch.cat(transposed), mode="r").R.numpy()
    if not (np.abs(R.diagonal()) > 1e-9).all():
        raise CodecError("its Jacobian is singular")
    return z[0], logdet[0], R


def _whole(values):
    """The cells of a grid, [0, 1), [1, 2), ..., that values are in; far away, the last one."""
    return np.floor(np.clip(values, -LARGEST, LARGEST)).astype(np.int64)


def _finite(tensor):
    if not tensor.isfinite().all():
        raise CodecError("its answers are not finite")
    return tensor.detach().cpu().double()


def grids(model, image):
    """(m, M), bits of a grey level on the grids of x and z, as this model needs them at an image.

    The coarsest at which x comes back from the neighbours of its z as a linear map would have it:
    finer ones pop more bits for the first image, and see more of what an inverse is off.
    """
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random(image.shape))
    x = ((torch.from_numpy(image.astype(float)) + noise) / 127.5 - 1).permute(2, 0, 1)
    z, _, R = local_map(model, x, SPREAD * delta(12))
    normal = torch.from_numpy(rng.standard_normal((2, len(z))))
    normal, costs = torch.cat([normal, -normal]), []
    for m in NOISE_BITS:
        s = SPREAD * delta(m)
        moved = z + s * normal @ torch.from_numpy(R)
        back = model.inverse(moved.view(-1, *x.shape))[0]
        off = ((back - x) / s).flatten(1)
        nats = off.square().sum(1) - normal.square().sum(1) + moved.square().sum(1) - z @ z
        costs.append(nats.mean().item() / 2 / len(z) / math.log(2))
    costs = np.nan_to_num(np.maximum(costs, 0), nan=math.inf)
    m = NOISE_BITS[int(np.argmax(costs <= costs.min() + NEGLIGIBLE))]
    smallest = np.quantile(np.abs(R.diagonal()), 0.01)
    return [m, int(np.clip(m + 1 - math.floor(math.log2(smallest)), 3, MOST_BITS))]


@torch.no_grad()
def encode(model, images, name, threads, progress=QUIET):
    """Compress images, uint8 (N, H, W, C). name: of the model, as decode must be told it.

    Returns (bytes, a dict): net_bits, bound (bits/dim (N,) by the likelihood, at the noise that was
    popped), borrowed_bits (from nowhere, for the noise and the z' of the first image: the file
    holds them, net_bits does not), header_bits. Raises CodecError where the model's functions are
    no flow's.
    """
    channels_first = [images.shape[3], *images.shape[1:3]]
    if images[0].size > MOST_DIMS:
        raise CodecError(f"images of {images[0].size:,} values: a Jacobian may have {MOST_DIMS:,}")
    bits = grids(model, images[0])
    coder = Coder(num_lanes=LANES, borrow=True)
    flow, bound = LocalFlow(model, channels_first, coder, bits), []
    with progress(total=len(images)) as bar:
        for image in images:
            bound.append(flow.encode(image))
            bar.update(1)
    header = {"shape": list(images.shape), "bits": bits, "words": coder.num_words,
              "borrowed": coder.borrowed, "threads": threads, "model": name,
              "pixels": fingerprint(images)}
    content, header_bytes = write_file(header, coder.lanes, coder.words, KIND)
    return content, {"net_bits": coder.bits - 32 * coder.borrowed - coder.fill_bits,
                     "bound": np.array(bound), "borrowed_bits": 32 * coder.borrowed,
                     "header_bits": 8 * header_bytes}


def read(content):
    """(header, lanes, words) of a file that encode wrote. Raises CodecError."""
    return read_parts(content, KIND, _is_whole, lambda header: LANES)


def _is_whole(header):
    numbers = *header["shape"], *header["bits"], header["threads"]
    counts = header["words"], header["borrowed"]
    return (all(type(number) is int and 0 <= number < 2 ** 40 for number in (*numbers, *counts))
            and len(header["shape"]) == 4 and min(numbers) > 0 and len(header["bits"]) == 2
            and math.prod(header["shape"][1:]) <= MOST_DIMS
            and max(header["bits"]) <= MOST_BITS and header["bits"][1] >= 3
            and all(type(header[name]) is str for name in ("model", "pixels")))


@torch.no_grad()
def decode(model, content, name, progress=QUIET):
    """The images, uint8 (N, H, W, C), of a file that encode wrote with the same model.

    Raises CodecError for another model, and what is no such file.
    """
    header, lanes, words = read(content)
    if header["model"] != name:
        raise CodecError(f"written with another model (checksum {header['model'][:16]}, this one's "
                         f"is {name[:16]}): give the files that it was encoded with")
    num_images, height, width, channels = header["shape"]
    coder = Coder(words)
    coder.lanes = lanes
    flow = LocalFlow(model, (channels, height, width), coder, header["bits"])
    images = []
    with progress(total=num_images) as bar:
        for _ in range(num_images):
            images.insert(0, flow.decode())
            bar.update(1)
    images = np.array(images)
    if fingerprint(images) != header["pixels"]:
        raise CodecError("the decoded pixels do not have the file's checksum: the model does not "
                         "give the same numbers again; nothing was written")
    return images
