"""Image sets prepared once: from a source as it is published to a folder that is verified for ever.

    python data.py list                                     # all known sets, and what is here
    python data.py prepare imagenet64-oord --source DIR --out sets/imagenet64-oord
    python data.py prepare photos --source photos.zip --size 64 --filter lanczos --out sets/photos
    python data.py verify sets/photos
    python data.py show sets/photos sheet.png
"""
import math
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.errors import DataError, printable
from harness.files import write_atomically
from harness.flags import ArgumentParser, one_line_errors
from images.decode import FILTERS
from images.folder import read_manifest, verify
from images.prepare import prepare
from images.sets import CIFAR10_FILES, MANIFEST, PARTIAL, SETS, SPLITS, find_set, sets_root
from images.source import make_request


def main(load_images, arguments=None):
    """The command line of data.py, which hands over its load_images."""
    flags = _parser().parse_args(arguments)
    try:
        with one_line_errors("data.py"):
            flags.run(flags, load_images)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _path(text):
    return Path(os.path.expanduser(text))


def _parser():
    parser = ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="prepare|verify|show|list")
    make = commands.add_parser("prepare", help="make a set from its source, or go on with it")
    make.add_argument("name", help="a known set (`python data.py list`), or a name of your own")
    make.add_argument("--source", nargs="+", metavar="PATH", default=[],
                      help="what you have: folders or archives, or a URL for cifar10 (default for "
                           "cifar10: its home page)")
    make.add_argument("--out", required=True, type=_path, metavar="DIR", help="the folder to make")
    has_affinity = hasattr(os, "sched_getaffinity")
    make.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)",
                      default=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())
    make.add_argument("--skip-corrupt", action="store_true",
                      help="leave out images that cannot be taken, and record each")
    make.add_argument("--enlarge-small", action="store_true",
                      help="enlarge images that are smaller than the set's, by its filter")
    make.add_argument("--incomplete", action="store_true",
                      help="the source has only some of a known set's images: do not compare "
                           "counts and checksums, and name it NAME-incomplete")
    own = make.add_argument_group("for a name of your own")
    own.add_argument("--size", type=int, metavar="N", help="images are N x N pixels")
    own.add_argument("--filter", choices=FILTERS,
                     help="resize larger ones by this filter, after a centre crop")
    own.add_argument("--channels", type=int, choices=(1, 3),
                     help="1: grey images alone, 3: grey ones get three equal channels (default: 1 "
                          "where all images are grey)")
    own.add_argument("--test-share", type=float, metavar="F",
                     help="share of images held out for test where there are no folders train/ and "
                          "test/ (default: 0.1)")
    make.set_defaults(run=_prepare)
    check = commands.add_parser("verify", help="compare every file of a set with its manifest")
    check.set_defaults(run=lambda flags, _: verify(flags.folder))
    check.add_argument("folder", type=_path, metavar="DIR")
    sheet = commands.add_parser("show", help="draw a contact sheet of a set")
    sheet.add_argument("folder", metavar="DIR",
                       help="a prepared folder, a known set or a .npy file")
    sheet.add_argument("png", type=_path, metavar="OUT.png")
    sheet.set_defaults(run=_show)
    overview = commands.add_parser(
        "list", help="all known sets, what each needs, and what is on this machine")
    overview.set_defaults(run=_list)
    for command in (sheet, overview):
        command.add_argument("--data-root", metavar="DIR",
                             help="holds the image sets (default: $JET_DATA)")
    return parser


def _prepare(flags, _):
    request = make_request(flags.name, flags.size, flags.filter, flags.incomplete,
                           flags.test_share, flags.channels)
    if not 1 <= flags.workers <= 1024:
        raise DataError(f"--workers {flags.workers}: must be 1 to 1024")
    if not flags.source and request.name != "cifar10":
        known = f" ({SETS[request.name].source})" if request.name in SETS else ""
        raise DataError(f"{request.name}: give what you have of it by --source PATH{known}")
    has_url = any(re.match("https?://", path) for path in flags.source)
    if has_url and (request.name != "cifar10" or len(flags.source) > 1):
        raise DataError("--source: a URL is for cifar10, alone; fetch other sets first")
    begun = time.monotonic()
    try:
        paths = [Path(os.path.abspath(os.path.expanduser(path))) for path in flags.source]
        manifest = prepare(request, flags.source if has_url else paths, flags.out, flags.workers,
                           flags.skip_corrupt, flags.enlarge_small)
    except KeyboardInterrupt:
        print("data.py: interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
    counts, both = manifest["counts"], manifest["images_in_both_splits"]
    print(f"{flags.out}: {manifest['name']}, variant {manifest['variant']}: {counts['train']:,} "
          f"train and {counts['test']:,} test images; {time.monotonic() - begun:.1f} s")
    for split in SPLITS:
        print(f"  {split} fingerprint {manifest['fingerprints'][split]}")
    if manifest["skipped"]:
        print(f"  {len(manifest['skipped']):,} files left out: manifest.json says which, and why")
    if grey := sum(manifest.get("grey_in_three_channels", {}).get(split, 0) for split in SPLITS):
        print(f"  {grey:,} images are grey: their three channels are equal")
    if both["different"]:
        print(f"  {both['test']:,} test images are training images, too ({both['train']:,} of "
              "train)")
    print(f"  train on it: python train.py --data {flags.out}")


def _show(flags, load_images):
    """Draw a contact sheet: images of each split, at equal distances through it."""
    if flags.png.suffix != ".png":
        raise DataError(f"{flags.png}: the contact sheet is a .png file: give it that name")
    sheets = [_sheet(load_images(flags.folder, split, flags.data_root)) for split in SPLITS]
    width = max(sheet.shape[1] for sheet in sheets)
    sheets = [np.pad(sheet, ((12, 0), (12, 12 + width - sheet.shape[1]), (0, 0)),
                     constant_values=255) for sheet in sheets]
    image = Image.fromarray(np.concatenate(sheets))
    write_atomically(flags.png, lambda file: image.save(file, "PNG"))
    print(flags.png)


def _sheet(images, columns=16, rows=4):
    """Some images in rows, below what set they are: (H, W, 3)."""
    number, height, width, channels = images.array.shape
    count, scale = min(columns * rows, number), max(1, 64 // height)
    rows = math.ceil(count / columns)
    pixels = images.array[np.linspace(0, number - 1, count).round().astype(int)]
    pixels = pixels if channels == 3 else pixels[..., :1].repeat(3, 3)
    pixels = np.pad(pixels.repeat(scale, 1).repeat(scale, 2),
                    ((0, columns * rows - count), (0, 2), (0, 2), (0, 0)), constant_values=255)
    grid = np.concatenate([np.concatenate(row, 1) for row in pixels.reshape(
        rows, columns, *pixels.shape[1:])])
    head = Image.new("RGB", (grid.shape[1], 52), "white")
    draw, font = ImageDraw.Draw(head), ImageFont.load_default(14)
    draw.text((0, 0), f"{images.name}, variant {images.variant}: {images.split}, {number:,} images "
              f"of {height}x{width}, {count} shown at {scale}x", "black", font)
    draw.text((0, 19), f"fingerprint {images.fingerprint[:32]}...", "dimgray", font)
    return np.concatenate([np.asarray(head), grid])


def _list(flags, _):
    """All known sets: counts, and where each is on this machine."""
    root = sets_root(flags.data_root)
    line = "{:<28} {:>6} {:>10} {:>7}  {}".format
    print(line("set", "pixels", "train", "test", "on this machine"))
    for name, known in SETS.items():
        train, test = known.counts["train"], known.counts["test"]
        counts = (f"{train:,}", f"{test:,}") if train else ("13-14 M", "1/256")
        print(line(name, known.shape[0], *counts, printable(_where(name, root))))
        print(_wrapped(f"from {known.source}", "    "))
    for folder in sorted(root.iterdir()) if root and root.is_dir() else ():
        if (folder / MANIFEST).exists() and folder.name not in SETS:
            try:
                made = read_manifest(folder)
            except DataError as error:
                print(_wrapped(printable(error)))
                continue
            counts = made.get("counts", {})  # one that is written by hand has none
            counts = [f"{counts[split]:,}" if counts else "" for split in SPLITS]
            where = "" if folder.name == made["name"] else f"{printable(folder.name)}: "
            print(line(made["name"], made.get("shape", [""])[0], *counts,
                       f"{where}variant {made['variant']}"))
    print(_wrapped(f"These are in {printable(root)}." if root else
                   "--data-root or JET_DATA says where sets are."))
    print(_wrapped("`python data.py prepare NAME --source PATH --out DIR/NAME` makes one that is "
                   "missing (cifar10 needs no --source)."))


def _wrapped(text, indent=""):
    return textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent,
                         break_on_hyphens=False)


def _where(name, root):
    """Where a known set is, as load_images finds it, or "missing"."""
    if name.startswith("cifar10-subset"):
        return "here: embedded in assets/"
    name = "cifar10" if name.startswith("cifar10") else name  # and its parts
    folder = find_set(name, root)
    if folder is None:
        return "missing"
    there = folder if folder == root else folder.name  # in the root
    if (folder / MANIFEST).exists():
        try:
            found = read_manifest(folder)["name"]
        except DataError:
            return f"damaged (`verify` says how): {there}"
        return f"prepared: {there}" if found == name else f"{there} holds {found}"
    if (folder / PARTIAL).is_dir():
        return f"begun: {there}"
    is_whole = name == "cifar10" and all(
        (folder / file).exists() for files in CIFAR10_FILES.values() for file in files)
    return f"here: {there}" if is_whole else f"{there}: files are missing"
