"""An image file as it is published -> pixels of the set's size."""
import io

import numpy as np
from PIL import Image

from harness.errors import DataError, printable

MAX_PIXELS = 2 ** 26  # of an image: larger ones are refused, whatever they hold
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS,
           "bicubic": Image.Resampling.BICUBIC}


class BadImage(DataError):
    """An image that cannot be taken, and why."""


def decode(content, size, resample=None, enlarge=False):
    """((size, size, 3) uint8, whether it was enlarged) of the bytes of a file. Raises BadImage.

    The largest centred square (the odd pixel remains at the right or bottom) is resized as
    docs/images.md says; without a filter the image must be size x size.
    """
    try:
        image = _load_rgb(content)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"declares too many pixels: more than {MAX_PIXELS:,} are refused") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # Pillow raises nearly everything on damaged files
        reason = f"{' '.join(str(error).split())} ({type(error).__name__})"
        raise BadImage(f"is damaged: {printable(reason)}") from None
    (width, height), side = image.size, min(image.size)
    if (width, height) == (size, size):
        return np.asarray(image), False
    about = f"is {width}x{height} pixels"
    if resample is None:
        raise BadImage(f"{about}, not {size}x{size}: without a filter nothing is resized")
    if side < size and not enlarge:
        raise BadImage(f"{about}, smaller than {size}x{size}: --enlarge-small enlarges such images")
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), FILTERS[resample])), side < size


def _load_rgb(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"declares {width}x{height} pixels: more than {MAX_PIXELS:,} are refused")
    if image.format == "PNG":
        if content[24] == 16:  # Pillow would drop the low bytes
            raise BadImage("has 16 bits a channel: only 8 are taken")
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # the checksums of all chunks
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo, its preview
        raise BadImage(f"is animated ({image.n_frames} frames): only still images are taken")
    image.load()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (255, 255):
            raise BadImage("has transparent pixels: no colour is theirs")
    if image.mode not in ("RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr"):
        raise BadImage(f"has pixels of mode {image.mode}: only 8 bits a channel are taken")
    return image if image.mode == "RGB" else image.convert("RGB")
