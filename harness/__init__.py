"""How things are run: files, flags, machine, memory. A command imports this before anything else.

So what is not installed ends it in one line, and threads wait for each other asleep: where another
program keeps a core busy, two that wait by spinning take three times as long as one thread alone.
OMP_WAIT_POLICY=active asks for spinning; it counts only if set before torch is imported.
"""
import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "numpy", "pandas", "matplotlib", "tqdm")


def missing(has=importlib.util.find_spec):
    """What this project needs and is not here, with what to do; or ""."""
    if not has("fcntl"):
        return "this system has no fcntl (file locks): use Linux, macOS or WSL"
    if sys.version_info < (3, 11):
        return f"Python {sys.version.split()[0]} runs this: it must be 3.11 or newer"
    if names := [name for name in NEEDED if not has(name)]:
        return (f"{', '.join(names)} not installed for {sys.executable}: activate the environment "
                "(. .venv/bin/activate), or make it as README.md says")
    return ""


os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if said := missing():
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if Path(__file__).parents[1] in program.absolute().parents:
        sys.exit(f"{program.name}: error: {said}")
    raise ImportError(said)
