"""A file of the codec: MAGIC, version, length of the header, header (JSON), lanes, words, SHA-256.

Header: shape, bits (PARAMETERS), batches (their sizes), words (their number), borrowed, config and
weights (checksums of the Jet), pixels (fingerprint of the images), ties (coding/lifting.py), labels
(of the images, where the Jet is conditional on them).
"""
import hashlib
import json
import struct

import numpy as np

from coding.ans import CodecError
from coding.lifting import NOISE_BITS, SCALE_BITS
from coding.prior import PRIOR_BITS
from harness.files import parse_json

MAGIC, VERSION = b"JETCODEC", 1
PARAMETERS = [NOISE_BITS, SCALE_BITS, PRIOR_BITS]
LANES = 128  # 64 bits each in the file, of which 48 are used on average
BATCH = 32  # images at a time, at most
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 2 ** 22  # of 40 million images
MAX_LABELS = 2 ** 18  # with room for 12 bytes of each


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
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes")
        header = parse_json(content[start:start + size])
        body = content[start + size:-DIGEST_BYTES]
        cut = len(body) - 4 * header["words"]
        lanes = np.frombuffer(body[:cut], "<i8").astype(np.int64)
        words = np.frombuffer(body[cut:], "<u4")
        if not _is_whole(header, lanes, words):
            raise ValueError("its numbers do not fit each other")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CodecError("not a file that this codec wrote "
                         f"({type(error).__name__}: {error})") from None
    if header["bits"] != PARAMETERS:
        raise CodecError(f"written with the parameters {header['bits']}, and this codec has "
                         f"{PARAMETERS}: use the code that wrote it")
    return header, lanes, words


def _is_whole(header, lanes, words):
    """Whether a header's values have their types, and fit each other, the lanes and the words."""
    sizes, shape = header["batches"], header["shape"]
    texts = [header[name] for name in ("config", "weights", "pixels")]
    counts, values = [header["borrowed"]], header.get("labels", [])[:]  # from 0 on; of either sign
    if len(values) != shape[0] and "labels" in header:
        return False
    for batch, layer, name, pairs in header.get("ties", ()):
        texts.append(name)
        counts += [batch, layer, *(index for index, _ in pairs)]
        values += [value for _, value in pairs]
    numbers = *sizes, *shape, *counts, *values
    return (all(type(text) is str for text in texts) and type(header["bits"]) is list
            and all(type(number) is int and abs(number) < 2 ** 53 for number in numbers)
            and min(*sizes, *shape) > 0 and min(counts) >= 0
            and len(shape) == 4 and sum(sizes) == shape[0] - 1 and max(sizes, default=1) <= BATCH
            and len(lanes) == num_lanes(sizes) and len(words) == header["words"] >= 0)
