"""What is known of this machine's memory and of the code itself, without torch."""
import contextlib
import json
import math
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMIT_FILE = ROOT / ".commit.json"  # in a copy of the code, which is no git checkout


def free_memory(root=Path("/")):
    """Bytes of memory that this process can still take; infinite where nobody knows."""
    free = math.inf
    with contextlib.suppress(OSError, TypeError):  # no Linux
        available = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
        free = 1024 * int(available[1])
        name = re.search("^0::/(.*)", (root / "proc/self/cgroup").read_text(), re.M)[1]
        group = root / "sys/fs/cgroup" / name
        for folder in (group, *group.parents):  # a limit holds for all groups inside
            with contextlib.suppress(OSError, ValueError):  # no limit here, or "max"
                limit = int((folder / "memory.max").read_text())
                used = re.search(r"^anon (\d+)", (folder / "memory.stat").read_text(), re.M)[1]
                free = min(free, limit - int(used))
    return free


def code_version(root=ROOT):
    """{"git_commit": ..., "git_dirty": ...} of this code; "" and None where it is no git checkout.

    Results do not count as changes.
    """
    if (root / COMMIT_FILE.name).exists():
        commit, tree = json.loads((root / COMMIT_FILE.name).read_text())
        return {"git_commit": commit, "git_dirty": tree == "dirty"}

    def git(*arguments):  # a checkout that belongs to another user is read all the same
        command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    unknown = {"git_commit": "", "git_dirty": None}
    try:
        top, _, commit = git("rev-parse", "--show-toplevel", "HEAD").partition("\n")
        if commit in ("", "HEAD") or Path(top).resolve() != root.resolve():
            return unknown  # no commit yet; or a copy inside another repository
        changes = git("status", "--porcelain", "--", ".", ":!results", ":!paper_figures/out")
    except OSError:  # no git
        return unknown
    return {"git_commit": commit, "git_dirty": bool(changes)}
