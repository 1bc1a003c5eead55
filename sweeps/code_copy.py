"""Copies of the code that jobs run: made when they are submitted, checked then and in each job."""
import contextlib
import dataclasses
import hashlib
import importlib.machinery
import itertools
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from harness.errors import ClusterError, TrainingError
from harness.files import named_in_errors
from harness.host import COMMIT_FILE, ROOT, code_version

MADE_THERE = ("__pycache__", "build")  # folders that Python and kernels/ write to in a copy
NO_CODE = ("results/", "paper_figures/out/", "tests/")  # what jobs do not need
MODULE_SUFFIXES = tuple(importlib.machinery.all_suffixes())


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeCopy:
    """A folder with a copy of this code. digests: {file in it: SHA-256}, of all that was copied."""
    folder: Path
    digests: dict

    def find_change(self):
        """A file that is not as it was copied, or could be imported and was not copied; or None."""
        for name, digest in self.digests.items():
            try:
                content = (self.folder / name).read_bytes()
            except OSError:
                return name
            if _sha256(content) != digest:
                return name
        return next(self._added(), None)

    def _added(self):
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if name not in MADE_THERE]
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            modules = [name for name in files if name.endswith(MODULE_SUFFIXES)]
            for name in (*links, *modules):
                path = os.path.relpath(os.path.join(folder, name), self.folder)
                if path not in self.digests:
                    yield path

    def check(self, root=ROOT):
        """Raise TrainingError unless this process runs this code, as it was submitted."""
        if not os.path.samefile(root, self.folder):
            raise TrainingError(f"this job imports the code in {root}, not its copy {self.folder}: "
                                "leave cd, PYTHONSAFEPATH and the like out of --setup and the "
                                "environment")
        if name := self.find_change():
            raise TrainingError(f"{self.folder}: {name} is not as it was submitted: give the same "
                                "command again, and it makes a fresh copy")


def copy_code(folder, allow_dirty):
    """The CodeCopy of this code, made in this folder where there is none as it should be."""
    contents = _read_code()
    version = code_version()  # after: what changes meanwhile is found
    commit, is_dirty = version["git_commit"], version["git_dirty"]
    if not (commit and contents):
        raise ClusterError(f"{ROOT} is no git checkout: jobs run a commit, so that a result can "
                           "name it")
    if is_dirty and not allow_dirty:
        raise ClusterError("the code has changes that are not committed: commit them, or give "
                           "--allow-dirty and have the results say so")
    tree, dirty = ("dirty", "-dirty") if is_dirty else ("clean", "")
    contents[COMMIT_FILE.name] = json.dumps([commit, tree]).encode()
    digests = {name: _sha256(content) for name, content in contents.items()}
    name = f"{commit[:12]}{dirty}-{_sha256(json.dumps(digests).encode())[:8]}"
    for number in itertools.count(1):
        path = folder / (name if number == 1 else f"{name}-{number}")
        copy, is_new = CodeCopy(folder=path, digests=digests), not path.exists()
        if is_new:
            _write(path, contents)
        if not (change := copy.find_change()):
            return copy
        if is_new:
            raise ClusterError(f"{path}: {change} is not what was written: look at that disk")
        print(f"{path}: {change} was changed after it was copied: its jobs will fail, and a fresh "
              "copy is used", file=sys.stderr)


def _read_code():
    """{file: content} of all that jobs may need, but what git ignores."""
    # a checkout of another user is read, too
    command = ["git", "-C", ROOT, "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached",
               "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:  # no git: code_version() does not know the commit then
        listed = ""
    names = sorted(set(filter(None, listed.split("\0"))))
    return {name: (ROOT / name).read_bytes() for name in names
            if (ROOT / name).is_file() and not name.startswith(NO_CODE)}


def _write(path, contents):
    """Write a copy's folder, whole or not at all; another process may be first."""
    begun = path.with_name(f".{uuid.uuid4().hex}")
    try:
        for name, content in contents.items():
            with named_in_errors(path / name):
                (begun / name).parent.mkdir(parents=True, exist_ok=True)
                (begun / name).write_bytes(content)
        with contextlib.suppress(OSError):  # another was: its copy is checked like ours
            begun.rename(path)
    finally:
        shutil.rmtree(begun, ignore_errors=True)


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
