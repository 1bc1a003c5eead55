"""Affine maps as bijections of whole numbers: what rounding loses is kept by the coder.

x = (X + 1/2) delta with delta = 1/(127.5 * 2^m), m the noise bits. z = (x + bias) * scale becomes

    B = rint(bias / delta),  scale = p * 2^-s,  V = (X + B) * p + u,  Z = V >> s,

u uniform on 0..p-1, popped; the low s bits of V are pushed. That costs s - log2 p bits, which is
-log2 scale.
"""
import numpy as np

from coding.ans import LOWEST, CodecError

NOISE_BITS = 8  # m: a grey level is 2^m steps of the grid
SCALE_BITS = 12  # scales are rounded to 13 significant bits
DENSE_BITS = 20  # of the fractions of a dense layer's factors
NEAR_TIE = 1e-8  # in units of what is rounded; float64 networks differ by less between machines


def noise_bits(batch):
    """m of a batch (0, 1, ...): the first popped their noise from the bits of one raw image."""
    return min(NOISE_BITS, 3 + 2 * batch)


def delta(noise_bits):
    """The step of the grid."""
    return 2 / (255 * 2 ** noise_bits)


class Lifting:
    """Affine maps of whole numbers with a coder. where: (batch, layer), for ties and errors.

    ties: {(batch, layer, name): [[index, value], ...]}, the roundings that another machine might
    not repeat: None to collect them while encoding, else those of a file, obeyed while decoding.
    """

    def __init__(self, coder, ties=None):
        self.coder = coder
        self.is_decoding = ties is not None
        self.ties = {} if ties is None else ties
        self.logdet = 0.0  # of each image so far, nats, by affine alone

    def affine(self, X, bias, scale, where):
        """(x + bias) * scale for X, int64 of any shape; bias and scale are floats of its shape."""
        self._check(X, bias, scale, where)
        B, steps = self._whole_numbers(bias, scale, where)
        Z = X.ravel() + B
        for p, shift in steps:
            for row, lanes in self.coder.rows(X.size):
                Z[row] = self.coder.rescale(lanes, Z[row], p[row], shift[row])
        self.logdet = self.logdet + np.log(scale).reshape(len(X), -1).sum(1)
        return Z.reshape(X.shape)

    def affine_inverse(self, Z, bias, scale, where):
        """The inverse of affine."""
        self._check(np.zeros(0), bias, scale, where)
        B, steps = self._whole_numbers(bias, scale, where)
        X = Z.flatten()
        for p, shift in reversed(steps):
            for row, lanes in reversed(self.coder.rows(X.size)):
                X[row] = self.coder.unscale(lanes, X[row], p[row], shift[row])
        return (X - B).reshape(Z.shape)

    def dense(self, X, layer, where):
        """z = P L U x: rows of U from the first on, its diagonal, rows of L from the last on."""
        lower, upper, diagonal, order = _factors(layer)
        X, rows = X.copy(), range(len(order))
        for row in rows:
            X[..., row] += X @ upper[row] >> DENSE_BITS
        scale = np.broadcast_to(np.abs(diagonal), X.shape)
        X = self.affine(X, np.zeros(X.shape), scale, where)
        X = np.where(diagonal < 0, ~X, X)
        for row in reversed(rows):
            X[..., row] += X @ lower[row] >> DENSE_BITS
        return X[..., order]

    def dense_inverse(self, Z, layer, where):
        """The inverse of dense."""
        lower, upper, diagonal, order = _factors(layer)
        X, rows = np.empty_like(Z), range(len(order))
        X[..., order] = Z
        for row in rows:
            X[..., row] -= X @ lower[row] >> DENSE_BITS
        X = np.where(diagonal < 0, ~X, X)
        scale = np.broadcast_to(np.abs(diagonal), X.shape)
        X = self.affine_inverse(X, np.zeros(X.shape), scale, where)
        for row in reversed(rows):
            X[..., row] -= X @ upper[row] >> DENSE_BITS
        return X

    def _whole_numbers(self, bias, scale, where):
        """B, and (p, shift) of each step, flat: doublings for factors above 2, then the rest."""
        B = self._round(bias.ravel() / delta(noise_bits(where[0])), (*where, "bias"))
        scale = np.clip(scale.ravel(), 2.0 ** (SCALE_BITS - LOWEST), None)
        fraction, exponent = np.frexp(scale)  # fraction in [1/2, 1)
        p = self._round(fraction * 2 ** (SCALE_BITS + 1), (*where, "scale"))
        # scale = p / 2^12 * 2^exponent, p in [2^12, 2^13)
        is_full, exponent = p == 2 ** (SCALE_BITS + 1), exponent.astype(np.int64) - 1
        p, exponent = np.where(is_full, p >> 1, p), np.where(is_full, exponent + 1, exponent)
        doublings = np.maximum(exponent, 0)
        steps = [(np.where(doublings > i, 2, 1), np.zeros_like(p))
                 for i in range(int(doublings.max(initial=0)))]
        return B, [*steps, (p, SCALE_BITS - exponent + doublings)]

    def _check(self, X, bias, scale, where):
        """Raise CodecError where 2^13 times (X + bias) * scale would not fit 63 bits."""
        if not (np.isfinite(bias).all() and (scale > 0).all() and np.isfinite(scale).all()):
            raise CodecError("this Jet's bias or scale is not finite, or a scale is 0: it cannot "
                             "encode these images")
        largest = np.abs(bias).max(initial=0) / delta(noise_bits(where[0]))
        largest += np.abs(X).max(initial=0)
        if not largest * max(1.0, scale.max(initial=0)) < 2.0 ** 48:
            raise CodecError(f"an image of batch {where[0]} overflows in layer {where[1]}: this "
                             "Jet cannot encode it")

    def _round(self, values, key):
        """The nearest whole numbers; where that hangs on their last digits, those of the file."""
        whole = np.rint(values).astype(np.int64)
        if self.is_decoding:
            for index, value in self.ties.get(key, ()):
                if not abs(value - values[index]) < 1:
                    raise CodecError("its list of roundings does not fit these weights")
                whole[index] = value
        else:
            distance = 0.5 - np.abs(values - whole)
            near = np.flatnonzero(distance < NEAR_TIE + 1e-12 * np.abs(values))
            if len(near):
                self.ties[key] = [[int(index), int(whole[index])] for index in near]
        return whole


def _factors(layer):
    """(L - 1, U / its diagonal - 1, both in 2^-20, the diagonal, P's order) of an InvertibleDense.
    """
    lower, upper = (factor.detach().cpu().numpy() for factor in layer._factors())
    diagonal = upper.diagonal()
    with np.errstate(all="ignore"):  # what is not finite is refused
        matrices = lower, upper / diagonal[:, None]
    if not all((np.abs(matrix) < 2.0 ** (62 - DENSE_BITS)).all() for matrix in matrices):
        raise CodecError("this Jet's dense layer is not finite, not invertible or too large: it "
                         "cannot encode these images")
    lower, upper = (np.rint(matrix * 2 ** DENSE_BITS).astype(np.int64) for matrix in matrices)
    for matrix in (lower, upper):
        np.fill_diagonal(matrix, 0)
    return lower, upper, diagonal, layer.order.cpu().numpy()
