"""A file of the codec: MAGIC, version, length of the header, header (JSON), lanes, words, SHA-256.

Header: shape, bits (PARAMETERS), batches (their sizes; for an image that is stored, how:
coding/stored.py), words (their number), config and weights (checksums of the Jet), pixels
(fingerprint of the images), ties (coding/lifting.py), labels (of the images, where the Jet is
conditional on them).
"""
import hashlib
import json
import math
import struct

import numpy as np

from coding.ans import SYMBOL_BITS, CodecError, pack, unpack
from coding.lifting import NOISE_BITS, SCALE_BITS
from coding.stored import WEBP
from harness.files import parse_json

MAGIC, VERSION = b"JETCODEC", 2
PARAMETERS = [NOISE_BITS, SCALE_BITS, SYMBOL_BITS]
LANES = 1024  # at most; each costs some 5 bits of the file
LANE_DIMS = 96  # values of an image for each lane, before there are so many
BATCH = 32  # images at a time, at most
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 2 ** 22  # of 40 million images
MAX_LABELS = 2 ** 18  # with room for 12 bytes of each


def num_lanes(sizes, dims):
    """Lanes of the last of these batches: few while the stack is small, then LANES."""
    largest = max([0, *sizes])
    return min(LANES, largest * max(1, dims // LANE_DIMS))


def images_of(size):
    """Images of an item of a header's batches."""
    return max(size, 1)


def write_file(header, lanes, words, kind=(MAGIC, VERSION)):
    """(content, header's size), in bytes."""
    header = json.dumps(header, separators=(",", ":")).encode()
    content = b"".join([kind[0], struct.pack("<II", kind[1], len(header)), header,
                        pack(lanes), words.astype("<u4").tobytes()])
    return content + hashlib.sha256(content).digest(), len(header)


def read_file(content):
    """(header, lanes, words) of a file's bytes, checked against each other. Raises CodecError."""
    header, lanes, words = read_parts(content, (MAGIC, VERSION), _is_whole, _lanes_of)
    if header["bits"] != PARAMETERS:
        raise CodecError(f"written with the parameters {header['bits']}, and this codec has "
                         f"{PARAMETERS}: use the code that wrote it")
    return header, lanes, words


def read_parts(content, kind, is_whole, lanes_of):
    """(header, lanes, words) of a file of this kind. is_whole, lanes_of: of its header, whether its
    values fit each other, and how many lanes it has.
    """
    magic, version = kind
    start = len(magic) + 8
    if content[:len(magic)] != magic:
        raise CodecError("not a file of this codec")
    if len(content) < start + DIGEST_BYTES:
        raise CodecError("truncated: encode it again")
    found, size = struct.unpack("<II", content[len(magic):start])
    if found != version:
        raise CodecError(f"of format version {found}, and this codec reads version {version}: "
                         "use the code that wrote it")
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise CodecError("truncated or altered (its checksum does not fit): encode it again")
    try:
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes")
        header = parse_json(content[start:start + size])
        body = content[start + size:-DIGEST_BYTES]
        if not is_whole(header):
            raise ValueError("its numbers do not fit each other")
        cut = len(body) - 4 * header["words"]
        if cut < 0:
            raise ValueError("it is too short")
        return header, unpack(body[:cut], lanes_of(header)), np.frombuffer(body[cut:], "<u4")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CodecError("not a file that this codec wrote "
                         f"({type(error).__name__}: {error})") from None


def _lanes_of(header):
    return num_lanes(header["batches"], math.prod(header["shape"][1:]))


def _is_whole(header):
    """Whether a header's values have their types, and fit each other."""
    sizes, shape = header["batches"], header["shape"]
    texts = [header[name] for name in ("config", "weights", "pixels")]
    counts, values = [header["words"]], header.get("labels", [])[:]  # from 0 on; of either sign
    if len(values) != shape[0] and "labels" in header:
        return False
    for batch, layer, name, pairs in header.get("ties", ()):
        texts.append(name)
        counts += [batch, layer, *(index for index, _ in pairs)]
        values += [value for _, value in pairs]
    numbers = *sizes, *shape, *counts, *values
    return (all(type(text) is str for text in texts) and type(header["bits"]) is list
            and all(type(number) is int and abs(number) < 2 ** 53 for number in numbers)
            and len(shape) == 4 and min(shape) > 0 and min(counts) >= 0
            and min(sizes) >= WEBP and max(sizes) <= BATCH
            and sum(map(images_of, sizes)) == shape[0])
