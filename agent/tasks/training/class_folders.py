"""Data in one folder per class, whose files are the examples.

reviews/good/1.txt  reviews/bad/a/2.txt …
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.admission import Admission, split_classes
from agent.data.disclosed_sets import Numbers
from agent.data.row_registry import RowRegistry
from agent.data.settings import DataSettings
from agent.tasks.training.seeds import random_state
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


def count_examples(
    data: DataSettings, suffixes: Collection[str]
) -> tuple[dict[str, int], Numbers | None]:
    """The number of files by the folder that they are in, of those that may be used; and the
    numbers of these if this machine remembers them. Raises DataError."""
    root, folders = Path(data.path), _folders(data.path)
    paths = [
        (path, place)
        for place, name in enumerate(folders)
        for path in _examples(root / name, suffixes)
    ]
    names = [path.relative_to(root).as_posix() for path, _ in paths]
    labels = np.array([place for _, place in paths], np.int64)
    found, numbers = admit(ClassFiles([path for path, _ in paths], names, labels), data)
    counts = np.bincount(found.labels, minlength=len(folders)).tolist()
    return dict(zip(folders, counts, strict=True)), numbers


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
    `agreed` on the classes: then it may be a class that its owner withholds.
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


def admit(found: ClassFiles, data: DataSettings) -> tuple[ClassFiles, Numbers | None]:
    """The files that may be used (`agent.data.admission`), and their numbers if this machine
    remembers them. An example is its content and its class, whatever its name is."""
    if not data.memory:
        return found, None
    file = Path(data.memory)
    labels = [Path(name).parts[0] for name in found.names]
    with closing(RowRegistry(file)) as registry, closing(Admission(file)) as admission:
        numbers = registry.file_numbers(list(zip(labels, found.paths, strict=True)))
        admitted = admission.admit(numbers, data.min_count)
    rows = np.flatnonzero(admitted)
    kept = ClassFiles(
        [found.paths[row] for row in rows], [found.names[row] for row in rows], found.labels[rows]
    )
    return kept, numbers[rows]


def split(
    found: ClassFiles,
    usable: npt.NDArray[np.bool_],
    numbers: Numbers | None,
    data: DataSettings,
) -> tuple[Rows, Rows]:
    """As `split_held_out`, if this machine remembers no rows; else each row stays on its side, and
    classes with few examples to train on are left out.

    Raises DataError for fewer than two.
    """
    first = split_held_out(found.names, usable)
    if numbers is None:
        return first

    def draw(new: npt.NDArray[np.bool_], group: int) -> npt.NDArray[np.bool_]:
        if not group:
            return np.isin(np.flatnonzero(usable), first[1])
        chance = random_state("held out", data.seed, data.index, group)
        count = int(new.sum())
        return np.asarray(chance.permutation(count) < count // _HELD_OUT)

    with closing(Admission(Path(data.memory))) as admission:
        parts = split_classes(
            np.where(usable, found.labels, -1),
            data.min_alike,
            lambda chosen: admission.split("files", numbers, chosen, data.min_count, draw),
        )
    return np.flatnonzero(parts.train), np.flatnonzero(parts.held_out)


def split_held_out(names: Sequence[str], usable: npt.NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Rows to train on, and a held-out fifth, chosen by hashes of the names.

    So an added example moves no other one. Raises DataError for fewer than two.
    """
    hashes = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    order = np.array(sorted(range(len(names)), key=hashes.__getitem__), np.int64)
    order = order[usable[order]]
    if len(order) < 2:
        # Without a hint, the agent's message names the trainer's log, which lists the files.
        raise DataError("fewer than two examples can be read")
    held_out = max(1, len(order) // _HELD_OUT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
