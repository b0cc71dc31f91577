"""The code of a task file: its digest, and the modules beside it that it imports.

An owner's consent to their own task holds for one digest. It does not cover installed packages, or
modules that are found only while the code runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

#: Files whose imports are remembered by their text.
MAX_KEPT_FILES = 64
#: CPython 3.11 counts the depth of a syntax tree for all threads together: if two parse at the same
#: time, `ast.parse` may raise SystemError for correct text.
_parsing = threading.Lock()


def digest(source: str) -> str:
    """SHA-256 of the code of "/path/file.py:Class", as hex; empty if the file cannot be read."""
    path = Path(source.rpartition(":")[0])
    found = hashlib.sha256()
    try:
        for file in files(path):
            data = file.read_bytes()
            name = file.relative_to(path.parent).as_posix()
            found.update(f"{name}\0{len(data)}\0".encode() + data)
    except OSError:
        return ""
    return found.hexdigest()


def sha256(source: str) -> str:
    """SHA-256 of the one file of "/path/file.py:Class", as hex; empty if it cannot be read."""
    try:
        return hashlib.sha256(Path(source.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError:
        return ""


def files(path: Path) -> list[Path]:
    """The task file first, then the Python files beside it that it imports, directly or not.

    Of a package, all files. Raises OSError if the task file cannot be read.
    """
    found, waiting = {path: None}, [path]
    path.stat()
    while waiting:
        for name in sorted(_imported(waiting.pop())):
            for file in _beside(path.parent, name):
                if file not in found:
                    found[file] = None
                    waiting.append(file)
    first, *others = found
    return [first, *sorted(others)]


def parse(file: Path) -> ast.Module:
    """The syntax tree of a Python file, also if other threads parse. Raises OSError, and what
    `ast.parse` does."""
    return _parse(file.read_bytes())


def _parse(text: bytes) -> ast.Module:
    with _parsing:
        return ast.parse(text)


def _beside(folder: Path, name: str) -> Iterator[Path]:
    """The files of the module `name` in this folder."""
    yield from filter(Path.is_file, (folder / f"{name}.py", *folder.glob(f"{name}.*.so")))
    if (folder / name).is_dir():
        yield from (file for file in (folder / name).rglob("*") if file.suffix in (".py", ".so"))


def _imported(file: Path) -> frozenset[str]:
    """The first parts of the names of all modules that a Python file imports."""
    try:
        return _imports(file.read_bytes()) if file.suffix == ".py" else frozenset()
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()  # it cannot be run either


@functools.lru_cache(MAX_KEPT_FILES)
def _imports(text: bytes) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return frozenset(names)
