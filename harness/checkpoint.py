"""Weight files and checkpoints: read without running what is in them, and written whole.

A run folder keeps its two newest checkpoints, so that a damaged one costs a minute and no run.
"""
import contextlib
import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from harness.errors import CheckpointError, TrainingError, short
from harness.files import open_regular, write_atomically

CHECKPOINT_NAME = "checkpoint.pt"
CHECKPOINT_FORMAT = "jet-checkpoint-1"
PREVIOUS_NAME = "checkpoint-previous.pt"
MAX_PARTS, MAX_DEPTH = 10 ** 6, 32  # tensors and plain values in a file, and how deep they lie


def read_tensors(path):
    """The dict of tensors and plain values in a .pt file, its checksums verified, no code run."""
    try:
        with (warnings.catch_warnings(action="ignore"),  # the errors say it in one line
              open(open_regular(path, os.O_RDONLY), "rb") as file):
            check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
            check_content(content, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: holds more than tensors and plain values, or is no "
                              "checkpoint; not loaded, for it could run code") from None
    except Exception as error:  # torch.load raises nearly everything on damaged files
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise CheckpointError(f"{path}: does not fit in this machine's memory") from None
        raise CheckpointError(f"{path}: empty, damaged or no checkpoint ({short(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def check_archive(file):
    """Raise BadZipFile for what torch.load would not notice, or would unpack without end."""
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        size = os.fstat(file.fileno()).st_size
        if len(archive.infolist()) > MAX_PARTS:
            raise zipfile.BadZipFile("holds too many parts")
        if sum(member.file_size for member in archive.infolist()) > size:
            raise zipfile.BadZipFile("holds more than its size: PyTorch compresses nothing")
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} fails its checksum")
    file.seek(0)


def check_content(content, size):
    """Raise ValueError for what is far more than a file of that size holds, or nested too deeply.

    In a pickle a tensor may be a view that repeats one value, and a part may be there many times.
    """
    waiting, num_parts, num_bytes = [(content, 0)], 0, 0
    while waiting:
        (part, depth), parts = waiting.pop(), ()
        if isinstance(part, torch.Tensor):
            is_odd = part.is_quantized or part.is_meta or part.is_complex()
            if part.layout != torch.strided or is_odd:
                raise ValueError(f"holds a tensor of another kind, {part.layout} {part.dtype}")
            num_bytes += part.numel() * part.element_size()
            num_parts += 0 if part.numel() else sum(part.shape)  # that have no bytes
        elif isinstance(part, int) and abs(part) >= 2 ** 64:
            raise ValueError("holds a number of more than 64 bits")
        elif isinstance(part, dict):
            parts = [*part, *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            parts = part
        num_parts += len(parts)
        if num_parts > MAX_PARTS or depth > MAX_DEPTH:
            raise ValueError("holds too many parts, or too deep in each other")
        waiting += [(one, depth + 1) for one in parts]
    if num_bytes > 4 * size:
        raise ValueError(f"its tensors would take {num_bytes:,} bytes, and the file has {size:,}: "
                         "they repeat values, save them .contiguous()")


def load_weights(path, jet, state):
    """Load a state dict into a Jet. Raises CheckpointError where it does not fit."""
    try:
        jet.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(f"{path}: weights do not fit their configuration "
                              f"({short(error)})") from None
    for name, buffer in jet.named_buffers():
        places = torch.arange(len(buffer))
        if name.endswith("order") and not torch.equal(buffer.sort().values.cpu(), places):
            raise CheckpointError(f"{path}: {name} is not a permutation")


def weights_checksum(module):
    """Hex SHA-256 of the names, shapes and values of a module's weights, in any precision."""
    return checksum(module.state_dict())


def checksum(state):
    """weights_checksum of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu()
        values = values.double() if tensor.is_floating_point() else values.long()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(values.contiguous().numpy())
    return digest.hexdigest()


def save_checkpoint(run_dir, content):
    """Write the newest checkpoint, read it back, and keep the one before.

    Raises TrainingError in one line.
    """
    path = run_dir / CHECKPOINT_NAME

    def keep_previous(temporary):
        if not zipfile.is_zipfile(temporary) or zipfile.ZipFile(temporary).testzip():
            raise OSError(None, "what was read back is not what was written")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, run_dir / PREVIOUS_NAME)
    try:
        content = {"format": CHECKPOINT_FORMAT, **content}
        write_atomically(path, lambda file: torch.save(content, file), keep_previous)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "writing failed: is the disk full?"
        before = "the one before is untouched: " if path.exists() else ""
        raise TrainingError(f"{run_dir}: the checkpoint of step {content['step']} was not saved "
                            f"({reason}); {before}make room and run the same command") from None


def newest_whole(run_dir):
    """(path, content, damage) of a run folder's newest whole checkpoint; nothing is changed there.

    damage: what is wrong with checkpoint.pt where it is the one before, else None. All three are
    None where there are no checkpoints. Raises CheckpointError when there are and none is whole.
    """
    newest, previous = run_dir / CHECKPOINT_NAME, run_dir / PREVIOUS_NAME
    if newest.exists():
        try:
            return newest, read_tensors(newest), None
        except CheckpointError as error:
            if not previous.exists():
                raise CheckpointError(f"{error}; there is none before it: move it away to begin "
                                      "again") from None
            damage = str(error)
    elif previous.exists():
        damage = f"{newest}: missing"
    else:
        return None, None, None
    try:
        return previous, read_tensors(previous), damage
    except CheckpointError as error:
        raise CheckpointError(f"{damage}; and {error}: move away what is there to begin "
                              "again") from None


def read_checkpoint(run_dir, tell):
    """(path, content) of the newest whole checkpoint of a run that goes on, or (None, None).

    A damaged one is set aside under another name; tell is called with a line about it. Raises as
    newest_whole does.
    """
    path, content, damage = newest_whole(run_dir)
    if damage:
        newest = run_dir / CHECKPOINT_NAME
        if newest.exists():  # or the next save would put it in the place of the whole one
            os.replace(newest, run_dir / "checkpoint-damaged.pt")
            damage += ": set aside as checkpoint-damaged.pt"
        tell(f"{damage}; going on from {PREVIOUS_NAME}, step {content.get('step')}")
    return path, content


class Weights(NamedTuple):
    """A file and what is in it, where that is a checkpoint or a state dict."""
    path: Path
    content: dict


def read_weights(path):
    """The Weights of a weight file, or of the newest whole checkpoint of a run folder.

    Warns where that is the one before the newest. Raises CheckpointError.
    """
    if not path.is_dir():
        return Weights(path, read_tensors(path))
    found, content, damage = newest_whole(path)
    if found is None:
        raise CheckpointError(f"{path / CHECKPOINT_NAME}: no such file")
    if damage:
        warnings.warn(f"{damage}; read {PREVIOUS_NAME}, step {content.get('step')}", stacklevel=3)
    return Weights(found, content)
