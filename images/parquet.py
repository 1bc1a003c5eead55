"""Images in a column of parquet files. Needs pyarrow, which is not among the requirements."""
import contextlib
import functools

from harness.errors import DataError
from images.decode import BadImage, printable
from images.files import FILES_A_PIECE, take_images


class Parquet:
    """Images in the order of files and rows."""

    def __init__(self, files):
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError("parquet files need pyarrow: pip install pyarrow") from None
        self.files, self.pyarrow = files, pyarrow

    def count(self, split):
        return sum(self._open(path)[0].metadata.num_rows for path in self.files[split])

    def pieces(self, split, start):
        for path in self.files[split]:
            file, columns = self._open(path)
            first = 0
            with self._damage(path):
                for batch in file.iter_batches(FILES_A_PIECE, columns=columns):
                    done = max(0, start - first)
                    if done < len(batch):
                        values = [batch.column(name).to_pylist()[done:] for name in columns]
                        yield read_rows, (f"{path.name}, row ", first + done, *values)
                    first += len(batch)
            start = max(0, start - first)

    def _open(self, path):
        """(the file, its columns of images and labels)"""
        with self._damage(path):
            file = self.pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2 ** 20)
        kinds = {field.name: field.type for field in file.schema_arrow}
        images = [name for name, kind in kinds.items() if self._holds_images(name, kind)]
        if len(images) != 1:
            raise DataError(f"{path}: of its columns {', '.join(map(printable, kinds))} one must "
                            "hold images (a struct with bytes, or binary values named image)")
        labels = [name for name in ("label", "labels")
                  if name in kinds and self.pyarrow.types.is_integer(kinds[name])]
        return file, images + labels[:1]

    def _holds_images(self, name, kind):
        types = self.pyarrow.types
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return name in ("image", "img") and (types.is_binary(kind) or types.is_large_binary(kind))

    @contextlib.contextmanager
    def _damage(self, path):
        try:
            yield
        except (self.pyarrow.ArrowException, OSError) as error:
            reason = printable(str(error).splitlines()[0])
            raise DataError(f"{path}: not a whole parquet file ({reason}): fetch it "
                            "again") from None


def read_rows(piece, size, resample, enlarge):
    """What a worker makes of rows: name of the file, number of the first, images, maybe labels."""
    name, first, images, *labels = piece
    if labels:
        labels = [-1 if label is None else label for label in labels[0]]

    def read(image):
        content = image["bytes"] if isinstance(image, dict) else image
        if content is None:
            raise BadImage("has no bytes")
        return content
    pairs = ((f"{name}{number}", functools.partial(read, image))
             for number, image in enumerate(images, first))
    return take_images(pairs, labels or None, size, resample, enlarge)
