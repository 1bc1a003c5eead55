"""hf://OWNER/NAME[@REVISION]: the weight file of a Hugging Face hub, fetched and never run."""
import functools
import os
import re

from harness.errors import CheckpointError, short

SUFFIXES = (".safetensors", ".npz", ".pt")  # a hub's repository is to hold one of these files


def fetched(path):
    """A path as it is, or where the file of an hf:// address lies now.

    The package's cache keeps files by their hash. HF_ENDPOINT: another hub. Raises
    CheckpointError in one line.
    """
    if not re.match("hf:/", str(path)):
        return path
    # a Path has one slash of the two
    address = re.fullmatch(r"hf://?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(path))
    if not address:
        raise CheckpointError(f"{path}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return _fetch(*address.groups(), os.environ.get("HF_ENDPOINT"))


@functools.cache
def _fetch(name, revision, endpoint):
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"hf://{name}: needs the package huggingface_hub: pip install "
                              "huggingface_hub") from None
    try:
        hub = huggingface_hub.HfApi(endpoint=endpoint)
        files = [file for file in hub.list_repo_files(name, revision=revision)
                 if file.endswith(SUFFIXES)]
        if len(files) != 1:
            raise CheckpointError(f"hf://{name}: has {len(files)} weight files "
                                  f"({', '.join(sorted(files)[:5]) or 'none'}): must hold one "
                                  f"that ends in {' or '.join(SUFFIXES)}")
        return hub.hf_hub_download(name, files[0], revision=revision)
    except CheckpointError:
        raise
    except Exception as error:  # of the network, the hub or the cache
        raise CheckpointError(f"hf://{name}{f'@{revision}' if revision else ''}: "
                              f"{short(error)}") from None
