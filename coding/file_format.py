"""A file of the codec: MAGIC, version, length of the header, header (JSON), lanes, words, SHA-256.

Header: shape, bits (PARAMETERS), batches (their sizes), words (their number), borrowed, config and
weights (checksums of the Jet), pixels (fingerprint of the images), ties (coding/lifting.py).
"""
import hashlib
import json
import struct

import numpy as np

from coding.ans import CodecError
from coding.lifting import NOISE_BITS, SCALE_BITS
from coding.prior import PRIOR_BITS

MAGIC, VERSION = b"JETCODEC", 1
PARAMETERS = [NOISE_BITS, SCALE_BITS, PRIOR_BITS]
LANES = 128  # 64 bits each in the file, of which 48 are used on average
BATCH = 32  # images at a time, at most
DIGEST_BYTES = 32


def num_lanes(sizes):
    """Lanes of the last of these batches: few while the stack is small, then LANES."""
    return min(LANES, 8 * max(sizes, default=0))


def write_file(header, lanes, words):
    """(content, header's size), in bytes."""
    header = json.dumps(header, separators=(",", ":")).encode()
    content = b"".join([MAGIC, struct.pack("<II", VERSION, len(header)), header,
                        lanes.astype("<i8").tobytes(), words.astype("<u4").tobytes()])
    return content + hashlib.sha256(content).digest(), len(header)


def read_file(content):
    """(header, lanes, words) of a file's bytes, checked against each other. Raises CodecError."""
    start = len(MAGIC) + 8
    if content[:len(MAGIC)] != MAGIC:
        raise CodecError("not a file of this codec")
    if len(content) < start + DIGEST_BYTES:
        raise CodecError("truncated: encode it again")
    version, size = struct.unpack("<II", content[len(MAGIC):start])
    if version != VERSION:
        raise CodecError(f"of format version {version}, and this codec reads version {VERSION}: "
                         "use the code that wrote it")
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise CodecError("truncated or altered (its checksum does not fit): encode it again")
    try:
        header = json.loads(content[start:start + size])
        body = content[start + size:-DIGEST_BYTES]
        cut = len(body) - 4 * header["words"]
        lanes = np.frombuffer(body[:cut], "<i8").astype(np.int64)
        words = np.frombuffer(body[cut:], "<u4")
        if not _is_whole(header, lanes, words):
            raise ValueError("its numbers do not fit each other")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CodecError("not a file that this codec wrote "
                         f"({type(error).__name__}: {error})") from None
    if header["bits"] != PARAMETERS:
        raise CodecError(f"written with the parameters {header['bits']}, and this codec has "
                         f"{PARAMETERS}: use the code that wrote it")
    return header, lanes, words


def _is_whole(header, lanes, words):
    """Whether a header's values have their types, and fit each other, the lanes and the words."""
    sizes, shape, num_words = header["batches"], header["shape"], header["words"]
    if not (all(type(value) is int and value > 0 for value in (*sizes, *shape))
            and type(header["borrowed"]) is int and type(header["bits"]) is list
            and all(type(header[name]) is str for name in ("config", "weights", "pixels"))):
        return False
    for batch, layer, name, pairs in header.get("ties", ()):
        if not type(batch) is type(layer) is int or type(name) is not str:
            return False
        if not all(map(_is_tie, pairs)):
            return False
    return (len(shape) == 4 and sum(sizes) == shape[0] - 1 and max(sizes, default=1) <= BATCH
            and len(lanes) == num_lanes(sizes) and len(words) == num_words >= 0
            and header["borrowed"] >= 0)


def _is_tie(pair):
    index, value = pair
    return type(index) is type(value) is int and 0 <= index < 2 ** 53 and abs(value) < 2 ** 53
