"""Image files: their list, in the order of their names, and what workers make of them."""
import functools
import hashlib
import os
import sqlite3
import typing

from harness.errors import DataError
from images.decode import BadImage, decode, printable
from images.members import Member, read_member

FILES_A_PIECE = 32
TEST_FOLDERS = {"test", "val", "valid", "validation"}


class Taken(typing.NamedTuple):
    """What a worker makes of a piece of the source."""
    pixels: bytes  # of the n images
    labels: list | None
    digests: bytes = b""  # SHA-256 of each image's file
    enlarged: int = 0
    bad: tuple | list = ()  # (name, reason) of those that cannot be taken


class Files:
    """Image files listed in an SQLite file: 13 million need no memory."""

    def __init__(self, path):
        self.db = sqlite3.connect(path)
        self.db.create_function("first_folder", 1, _first_folder, deterministic=True)
        self.db.create_function("sha256", 1, lambda name: hashlib.sha256(name).digest())

    def list(self, members):
        """Take the list down: rows of (split or "", name, Member, source).

        Raises DataError for a name that comes twice.
        """
        self.db.executescript(
            "DROP TABLE IF EXISTS files; CREATE TABLE files (split TEXT, name BLOB, path BLOB, "
            "start INT, size INT, packed INT, crc INT, PRIMARY KEY (split, name)) WITHOUT ROWID")
        for split, name, member, source in members:
            key = name.encode(errors="surrogateescape")  # on any machine the same
            row = split, key, os.fsencode(member.path), *member[2:]
            try:
                self.db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise DataError(f"{printable(source)}: a second file of the name "
                                f"{printable(name)}: each must be there once") from None
            except OverflowError:
                raise DataError(f"{printable(source)}: {printable(name)} declares an absurd "
                                "size") from None
        self.db.commit()

    def split_by_folder(self):
        """train/ and test/ (or val/, ...) are the splits. False where there are no such folders."""
        folders = self._folders()
        if len(folders) == 1 and not folders & {"", "train", *TEST_FOLDERS}:  # all lies in one
            self.db.execute("UPDATE files SET name = substr(name, instr(name, X'2F') + 1)")
            folders = self._folders()
        test = folders & TEST_FOLDERS
        if "train" not in folders or not test:
            self.db.commit()
            return False
        if len(test) > 1 or folders != {"train", *test}:
            others = ", ".join(sorted(map(printable, folders - {"train", ""}))) or "files"
            raise DataError(f"beside train/ there are {others}: a set has train/ and one of test/, "
                            "val/, valid/ or validation/, and nothing else")
        self.db.execute("UPDATE files SET split = CASE first_folder(name) WHEN 'train' THEN "
                        "'train' ELSE 'test' END")
        self.db.commit()
        return True

    def _folders(self):
        rows = self.db.execute("SELECT DISTINCT first_folder(name) FROM files LIMIT 100")
        return {row[0] for row in rows}

    def hold_out(self, share):
        """The share (at least one) whose names have the smallest SHA-256 is the test split."""
        total = self.db.execute("SELECT COUNT(*) FROM files").fetchone()[0]
        self.db.execute("CREATE TEMP TABLE held AS SELECT name FROM files ORDER BY sha256(name) "
                        "LIMIT ?", [max(1, round(total * share))])
        self.db.execute("UPDATE files SET split = CASE WHEN name IN held THEN 'test' ELSE 'train' "
                        "END")
        self.db.commit()

    def count(self, split):
        query = "SELECT COUNT(*) FROM files WHERE split = ?"
        return self.db.execute(query, [split]).fetchone()[0]

    def pieces(self, split, start):
        """Yield what a worker reads at a time, from the start-th file on."""
        rows = self.db.execute("SELECT name, path, start, size, packed, crc FROM files WHERE "
                               "split = ? ORDER BY name LIMIT -1 OFFSET ?", [split, start])
        while piece := rows.fetchmany(FILES_A_PIECE):
            yield read_files, [Member(os.fsdecode(name), os.fsdecode(path), *more)
                               for name, path, *more in piece]


def _first_folder(name):
    folder, slash, _ = name.partition(b"/")
    return folder.decode(errors="replace") if slash else ""


def read_files(members, size, resample, enlarge):
    """What a worker makes of image files."""
    pairs = ((member.name, functools.partial(read_member, member)) for member in members)
    return take_images(pairs, None, size, resample, enlarge)


def take_images(pairs, labels, size, resample, enlarge):
    """Decode images, given as pairs of a name and a function that reads its bytes."""
    pixels, kept, digests, bad, enlarged = [], [], [], [], 0
    for place, (name, read) in enumerate(pairs):
        try:
            content = read()
            array, is_enlarged = decode(content, size, resample, enlarge)
        except BadImage as error:
            bad.append((name, str(error)))
            continue
        pixels.append(array.tobytes())
        kept.append(place)
        digests.append(hashlib.sha256(content).digest())
        enlarged += int(is_enlarged)
    kept_labels = None if labels is None else [labels[place] for place in kept]
    return Taken(b"".join(pixels), kept_labels, b"".join(digests), enlarged, bad)
