"""The prior of the codec: a normal distribution on the grid, as tables of whole numbers."""
import functools
import math
from fractions import Fraction

import numpy as np

from coding.ans import SYMBOL_BITS

CELL_WIDTH = Fraction(2, 255 * 2 ** 2)  # in deviations; within a cell a latent is uniform


class Prior:
    """N(0, 1) on the grid: a sign, the magnitude's cell by tables, and the place in it, uniform.

    A table covers cells over which the density falls by 6 nats, so that 24 bits resolve it, and
    ends in an escape to the next, with the probability that a normal tail has. Beyond 64 deviations
    magnitudes are stored as they are. The tables are the same on every machine.
    """

    def __init__(self):
        ends = [0]  # the cells where the tables end: z^2 is 12 further each time, which is 6 nats
        for square in range(12, 64 ** 2 + 1, 12):
            ends.append(math.isqrt(int(square / CELL_WIDTH ** 2)))
        self.tables = normal_tables(tuple(ends))
        self.ends = np.array(ends[1:], np.int64)
        self.firsts = np.array(ends[:-1], np.int64)

    def push(self, coder, z, noise_bits):
        """Push latents (int64, flat); returns how many were beyond the tables."""
        cell_bits = noise_bits - 2  # a cell is a quarter of a grey level
        magnitude = np.where(z < 0, ~z, z)
        cells = magnitude >> cell_bits
        levels = np.searchsorted(self.ends, cells, "right")
        place = magnitude & (1 << cell_bits) - 1
        coder.push_bits(place << 1 | (z < 0).astype(np.int64), cell_bits + 1)
        is_beyond = cells >= self.ends[-1]
        for row, lanes in coder.rows(len(z)):
            level, where = levels[row], np.flatnonzero(is_beyond[row])
            if len(where):
                x, rest = lanes[where], cells[row][where] - self.ends[-1]
                coder.push_raw(x, rest & 2 ** 24 - 1, 24)
                coder.push_raw(x, rest >> 24, 24)
                lanes[where] = x
            for depth in range(min(int(level.max()), len(self.tables) - 1), -1, -1):
                where = np.flatnonzero(level >= depth)
                cell = np.where(level[where] > depth, self.ends[depth], cells[row][where])
                table, symbol = self.tables[depth], cell - self.firsts[depth]
                start, freq = table[symbol], table[symbol + 1] - table[symbol]
                x = lanes[where]
                coder.push_symbol(x, start, freq)
                lanes[where] = x
        return int(is_beyond.sum())

    def pop(self, coder, count, noise_bits):
        """The inverse of push: `count` latents."""
        cell_bits = noise_bits - 2
        cells = np.empty(count, np.int64)
        for row, lanes in reversed(coder.rows(count)):
            cells[row] = self._pop_cells(coder, lanes)
        low = coder.pop_bits(count, cell_bits + 1)
        magnitude = cells << cell_bits | low >> 1
        return np.where(low & 1, ~magnitude, magnitude)

    def _pop_cells(self, coder, lanes):
        """A cell from each lane: from one table to the next, as far as there are escapes."""
        cells, where = np.zeros(len(lanes), np.int64), np.arange(len(lanes))
        for depth, table in enumerate(self.tables):
            x = lanes[where]
            symbol = coder.pop_symbol(x, functools.partial(find, table))
            lanes[where] = x
            cells[where] = symbol + self.firsts[depth]
            where = where[symbol == self.ends[depth] - self.firsts[depth]]
            if not len(where):
                return cells
        x = lanes[where]
        high = coder.pop_raw(x, 24)
        cells[where] = self.ends[-1] + (high << 24 | coder.pop_raw(x, 24))
        lanes[where] = x
        return cells


def find(table, slot):
    """(symbol, start, freq) of slots in a table of cumulative probabilities."""
    symbol = np.searchsorted(table, slot, "right") - 1
    return symbol, table[symbol], table[symbol + 1] - table[symbol]


@functools.cache
def normal_tables(ends):
    """Cumulative probabilities of the cells between each two ends, and of the rest, from 0 to 2^24.

    In fixed point: densities at the middles of cells are g(j+1) = g(j) E^(j+1), E = exp(-width^2).
    """
    one = 1 << 192
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
        tables.append(np.array([(value << SYMBOL_BITS) // tail for value in sums], np.int64))
    return tables[::-1]


def _power(base, exponent, one):
    """base^exponent in fixed point."""
    result = one
    while exponent:
        if exponent & 1:
            result = result * base // one
        base, exponent = base * base // one, exponent >> 1
    return result
