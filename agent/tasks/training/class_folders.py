"""Data in one folder per class, whose files are the examples.

reviews/good/1.txt  reviews/bad/a/2.txt …
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.errors import DataError, UsageError

_HELD_OUT = 5
#: How many classes a message names.
_SHOWN = 10

Rows = npt.NDArray[np.int64]


class ClassFiles(NamedTuple):
    """The files, sorted by path, their names relative to the folder, and their classes by
    number."""

    paths: list[Path]
    names: list[str]
    labels: npt.NDArray[np.int64]


def parse_classes(words: str) -> tuple[str, ...]:
    """The class names of a run, in the order of their numbers. Raises UsageError."""
    names = tuple(name.strip() for name in words.split(",") if name.strip())
    example = "name the folders of the examples: --set classes=cat,dog"
    if not names:
        raise UsageError("the run does not say which classes there are", example)
    if len(names) == 1:
        raise UsageError(f"the run has only the class {names[0]!r}, and two are needed", example)
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"the run names the class {twice!r} twice", example)
    return names


def count_examples(path: str, suffixes: Collection[str]) -> dict[str, int]:
    """The number of files by the folder that they are in. Raises DataError."""
    root = Path(path)
    return {name: len(_examples(root / name, suffixes)) for name in _folders(path)}


def _folders(path: str) -> list[str]:
    """The folders for classes, sorted. Raises DataError."""
    root = Path(path)
    if not path or not root.is_dir():
        raise DataError(
            "there is no folder of data",
            f"not at {path!r}: commonweight-agent policy set data FOLDER",
        )
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(
            "the folder of data has no folder for a class in it",
            f"put the examples into {root / 'cat'}, {root / 'dog'} and so on",
        )
    return folders


def _examples(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    ]


def find_files(
    path: str, classes: Sequence[str], suffixes: Collection[str], *, agreed: bool = False
) -> ClassFiles:
    """Every file that ends in one of `suffixes`. Raises DataError.

    A peer need not have all classes. Any other folder is an error, or left out if the peers have
    `agreed` on the classes: then it may be one that its owner does not tell.
    """
    root, folders = Path(path), _folders(path)
    if strange := [name for name in folders if name not in classes]:
        if not agreed:
            shown = ", ".join(classes[:_SHOWN]) + (" and others" if len(classes) > _SHOWN else "")
            raise DataError(
                f"a folder of data is no class of this run, which has {shown}",
                f"move {root / strange[0]} elsewhere, or start a run that names it",
            )
        sys.stderr.write(f"left out, as they are no classes of this run: {', '.join(strange)}\n")
    if absent := [name for name in classes if name not in folders]:
        sys.stderr.write(f"classes of this run without a folder here: {', '.join(absent)}\n")
    found = [
        (path, classes.index(name))
        for name in folders
        if name in classes
        for path in _examples(root / name, suffixes)
    ]
    if not found:
        raise DataError(
            "there is nothing in the folders of the classes",
            f"no file in {root} ends in {', '.join(sorted(suffixes))}",
        )
    paths = [path for path, _ in found]
    names = [path.relative_to(root).as_posix() for path in paths]
    return ClassFiles(paths, names, np.array([label for _, label in found], np.int64))


def split_held_out(names: Sequence[str], usable: npt.NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Rows to train on, and a held-out fifth, chosen by hashes of the names.

    So an added example moves no other one. Raises DataError for fewer than two.
    """
    hashes = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    order = np.array(sorted(range(len(names)), key=hashes.__getitem__), np.int64)
    order = order[usable[order]]
    if len(order) < 2:
        # Without a hint, the agent names the trainer's log, which lists the files.
        raise DataError(f"{len(order)} of {len(names)} examples can be read; two are needed")
    held_out = max(1, len(order) // _HELD_OUT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
