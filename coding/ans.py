"""Asymmetric numeral systems (rANS, Duda 2013) for many symbols at once.

The written bits are a stack of 32-bit words below a row of 64-bit states, the lanes, which numpy
moves together. Every operation has an exact inverse; what was done is undone in reverse order.
"""
import copy

import numpy as np

from harness.errors import UserError

LOWEST = 30  # between two operations a lane is in [2^30, 2^62)
SYMBOL_BITS = 24  # probabilities are multiples of 2^-24: lanes must be far above that


class CodecError(UserError, ValueError):
    """A file that cannot be decoded, or images that cannot be encoded, in one line."""


class Coder:
    """The state of the entropy coder. Lanes are int64 in [2^30, 2^62); words are 32 bits each.

    borrow: an encoder that runs out of words takes more from nowhere, and counts them.
    """

    def __init__(self, words=(), num_lanes=0, borrow=False):
        self._words = np.zeros(max(1024, 2 * len(words)), np.uint32)
        self._words[:len(words)] = words
        self.num_words = self.low_water = len(words)
        self.lanes = np.zeros(0, np.int64)
        self.fill_bits = 0.0  # a lane holds a fraction of a bit before its first symbol
        self.borrow, self.borrowed = borrow, 0  # words
        self.set_lanes(num_lanes)

    @property
    def words(self):
        return self._words[:self.num_words]

    def saved(self):
        """A copy, to which set_back returns."""
        twin = copy.copy(self)
        twin._words, twin.lanes = self.words.copy(), self.lanes.copy()
        return twin

    def set_back(self, twin):
        self.__dict__.update(twin.saved().__dict__)

    @property
    def most_bits(self):
        """What words and lanes take in a file, at most."""
        return self.bits + (5 * len(self.lanes) + 8 if len(self.lanes) else 0)

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
            generator = np.random.default_rng([missing, self.borrowed])
            fresh = generator.integers(0, 2 ** 32, missing, np.uint32)
            self._words = np.concatenate([fresh, self._words])
            self.num_words += missing
            self.borrowed += missing
        self.num_words -= count
        self.low_water = min(self.low_water, self.num_words)
        return self._words[self.num_words:self.num_words + count].astype(np.int64)

    def set_lanes(self, count):
        """More lanes begin with a word of the stack each; lanes that are given up return theirs."""
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
        """[(slice, lanes)]: which of `count` values are coded together, and the lane of each."""
        width = len(self.lanes)
        ends = [(start, min(start + width, count)) for start in range(0, count, width)]
        return [(slice(start, end), self.lanes[:end - start]) for start, end in ends]

    def shrink(self, x, bounds):
        """Lanes above their bound move their low half to the stack."""
        is_high = x > bounds
        if np.count_nonzero(is_high):  # faster than any()
            self.put(x[is_high])
            x[is_high] >>= 32

    def grow(self, x, bounds):
        """Lanes below their bound take a word from the stack."""
        is_low = x < bounds
        if count := int(np.count_nonzero(is_low)):
            x[is_low] = x[is_low] << 32 | self.take(count)

    def push_bits(self, values, num_bits):
        """Push values below 2^num_bits (num_bits up to 30), an array of any length."""
        for row, x in self.rows(len(values)):
            self.push_raw(x, values[row], num_bits)

    def pop_bits(self, count, num_bits):
        """The inverse of push_bits: `count` values."""
        values = np.empty(count, np.int64)
        for row, x in reversed(self.rows(count)):
            values[row] = self.pop_raw(x, num_bits)
        return values

    def push_raw(self, x, values, num_bits):
        """Push a value below 2^num_bits to each of the lanes x."""
        self.shrink(x, (1 << 62 - num_bits) - 1)
        x[:] = x << num_bits | values

    def pop_raw(self, x, num_bits):
        """The inverse of push_raw: a value from each of the lanes x."""
        values = x & (1 << num_bits) - 1
        x >>= num_bits
        self.grow(x, 1 << LOWEST)
        return values

    def push_symbol(self, x, start, freq):
        """Push the symbol of [start, start + freq) of 2^SYMBOL_BITS to each of the lanes x."""
        self.shrink(x, (freq << 62 - SYMBOL_BITS) - 1)
        quotient, rest = np.divmod(x, freq)
        x[:] = (quotient << SYMBOL_BITS) + rest + start

    def pop_symbol(self, x, find):
        """The inverse: find(slot) gives (symbol, start, freq), which it returns the first of."""
        slot = x & (1 << SYMBOL_BITS) - 1
        symbol, start, freq = find(slot)
        x[:] = (x >> SYMBOL_BITS) * freq + slot - start
        self.grow(x, 1 << LOWEST)
        return symbol

    def rescale(self, x, values, p, shift):
        """values * p / 2^shift, rounded by a u that is popped; its low bits are pushed.

        x: as many lanes as values; p at most 2^(shift + 1).
        """
        low = p << LOWEST - shift
        self.shrink(x, (low - 1 << 32) + 0xffffffff)
        self.grow(x, low)
        quotient, u = np.divmod(x, p)
        values = values * p + u
        x[:] = quotient << shift | values & (1 << shift) - 1
        return values >> shift

    def unscale(self, x, values, p, shift):
        """The inverse of rescale."""
        values = values << shift | x & (1 << shift) - 1
        values, u = np.divmod(values, p)
        x[:] = (x >> shift) * p + u
        self.shrink(x, (1 << 62) - 1)
        self.grow(x, 1 << LOWEST)
        return values


def pack(lanes):
    """Lanes as bytes: the position of the highest bit of each, and the bits below it."""
    number = 1
    for lane in lanes.tolist():
        size = lane.bit_length() - 1
        number = (number << size | lane - (1 << size)) << 5 | size - LOWEST
    return number.to_bytes((number.bit_length() + 7) // 8, "little") if len(lanes) else b""


def unpack(content, count):
    """The inverse of pack; ValueError where the bytes are not of so many lanes."""
    if len(content) > 9 * count:
        raise ValueError("its lanes are damaged")
    number, lanes = int.from_bytes(content, "little") or 1, []
    for _ in range(count):
        size = (number & 31) + LOWEST
        lanes.append((number >> 5) & (1 << size) - 1 | 1 << size)
        number >>= 5 + size
    lanes = np.array(lanes[::-1], np.int64)
    if number != 1 or pack(lanes) != bytes(content):
        raise ValueError("its lanes are damaged")
    return lanes
