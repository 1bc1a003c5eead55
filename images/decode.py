"""An image file as it is published -> pixels of the set's size."""
import io
import re

import numpy as np
from PIL import Image

from harness.errors import DataError, printable

MAX_PIXELS = 2 ** 26  # of an image: larger ones are refused, whatever they hold
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
IMAGE_SUFFIXES = tuple(  # of files that should be images, whether they can be taken or not
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .mpo .tif .tiff .heic .heif .avif .jp2 "
    ".jpx .ppm .pgm .pbm .pnm .tga .psd .dng".split())
_STARTS = re.compile(  # of such files
    b"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\0{4}|II\\*\0|MM\0\\*|\0{3}\x0cjP  |"
    b"....ftyp(hei|mif|avif)", re.DOTALL)
SKIP_ADVICE = "--skip-corrupt leaves such files out and records each"
FILTER_ADVICE = "--filter box resizes such images"
FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS,
           "bicubic": Image.Resampling.BICUBIC}


class BadImage(DataError):
    """An image that cannot be taken, and why; advice: what else there is to do."""

    def __init__(self, reason, advice=SKIP_ADVICE):
        super().__init__(reason)
        self.advice = advice


def starts_like_image(head):
    """Whether the first 32 bytes are those of an image's file, of whatever kind."""
    return _STARTS.match(head) is not None


def decode(content, size, resample=None, enlarge=False, channels=3):
    """((size, size, channels) uint8, whether it was enlarged) of a file's bytes. Raises BadImage.

    The largest centred square (the odd pixel remains at the right or bottom) is resized as
    docs/images.md says; without a filter the image must be size x size.
    """
    try:
        image = _load(content, channels)
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
        return _array(image), False
    about = f"is {width}x{height} pixels"
    if resample is None:
        raise BadImage(f"{about}, not {size}x{size}", FILTER_ADVICE)
    if side < size and not enlarge:
        raise BadImage(f"{about}, smaller than {size}x{size}: --enlarge-small enlarges such images")
    left, top = (width - side) // 2, (height - side) // 2
    if width != height:
        image = image.crop((left, top, left + side, top + side))
    return _array(image.resize((size, size), FILTERS[resample])), side < size


def channels_of(content):
    """1 for a file that holds grey levels, else 3; 0 where that cannot be told."""
    try:
        image = _open(content)
        if image.mode in ("P", "PA"):
            return 1 if _has_equal_channels(image.convert("RGB")) else 3
        return 1 if image.mode in ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B") else 3
    except Exception:  # as in decode, which tells of it
        return 0


def _array(image):
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def _has_equal_channels(image):
    red, *others = (channel.tobytes() for channel in image.split())
    return all(channel == red for channel in others)


def _open(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"declares {width}x{height} pixels: more than {MAX_PIXELS:,} are refused")
    return image


def _load(content, channels):
    image = _open(content)
    if image.format == "PNG":
        if content[24] == 16:  # Pillow would drop the low bytes
            raise BadImage("has 16 bits a channel: only 8 are taken")
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # the checksums of all chunks
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo, its preview
        frames = "" if image.format == "GIF" else f" ({image.n_frames} frames)"  # of a GIF: slow
        raise BadImage(f"is animated{frames}: only still images are taken")
    image.load()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (255, 255):
            raise BadImage("has transparent pixels: no colour is theirs")
    if image.mode not in ("RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr"):
        raise BadImage(f"has pixels of mode {image.mode}: only 8 bits a channel are taken")
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")
        if not _has_equal_channels(image):
            raise BadImage("has colours, and the set's images have one channel",
                           "--channels 3 takes it, and makes three equal channels of grey ones")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
