"""An image in the codec's stack without a model: as PNG, as WebP, or as it is, what is smallest."""
import io
import math

import numpy as np

from coding.ans import CodecError

RAW, PNG, WEBP = 0, -1, -2  # in a header's batches
FORMATS = {PNG: ("PNG", {"optimize": True}), WEBP: ("WEBP", {"lossless": True, "quality": 100})}


def store(image):
    """(kind, words) of an image (H, W, C), uint8."""
    found = {RAW: _words(image.tobytes())}
    for kind in FORMATS:
        if content := _compressed(image, kind):
            found[kind] = np.append(_words(content), np.uint32(len(content)))
    return min(found.items(), key=lambda pair: len(pair[1]))


def restore(coder, kind, shape):
    """The image of this shape that store gave the words of, which end the stack."""
    length = math.prod(shape) if kind == RAW else int(coder.take(1)[0])
    content = coder.take(-(-length // 4)).astype("<u4").tobytes()[:length]
    if kind == RAW:
        return np.frombuffer(content, np.uint8).reshape(shape)
    return _decompressed(content, kind, shape)


def _words(content):
    return np.frombuffer(content + bytes(-len(content) % 4), "<u4")


def _layout(shape):
    """The mode of Pillow and the size; what is not three colours is one row of greys beside."""
    height, width, channels = shape
    return ("RGB", (width, height)) if channels == 3 else ("L", (width * channels, height))


def _compressed(image, kind):
    """A file's bytes, or None where this Pillow or that format cannot."""
    from PIL import Image
    mode, (width, height) = _layout(image.shape)
    name, options = FORMATS[kind]
    if kind == WEBP and mode != "RGB":  # which would come back as colours
        return None
    content = io.BytesIO()
    try:
        Image.frombytes(mode, (width, height), image.tobytes()).save(content, name, **options)
    except (OSError, KeyError, ValueError):
        return None
    return content.getvalue()


def _decompressed(content, kind, shape):
    from PIL import Image
    mode, size = _layout(shape)
    try:
        image = Image.open(io.BytesIO(content), formats=[FORMATS[kind][0]])
        if (image.mode, image.size) != (mode, size):
            raise ValueError(f"{image.mode} {image.size}")
        return np.frombuffer(image.tobytes(), np.uint8).reshape(shape)
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise CodecError(f"a stored image is not one ({type(error).__name__}): the data are not "
                         "what was encoded") from None
