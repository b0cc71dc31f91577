"""Folders that a limited process may change, and that its parent uses as well.

The process could put a link in place of such a folder, so that its parent would use another one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from protocols.local.background_unlink import freeing_in_thread


class OwnFolder(NamedTuple):
    """An open folder. `descriptor` is None on Windows, whose calls take none."""

    path: Path
    descriptor: int | None

    def names(self) -> list[str]:
        """The names in it. Raises OSError."""
        return os.listdir(self.path if self.descriptor is None else self.descriptor)

    def is_file(self, name: str) -> bool:
        """True for a plain file, and no link to one. Raises OSError."""
        found = os.stat(self._named(name), dir_fd=self.descriptor, follow_symlinks=False)
        return stat.S_ISREG(found.st_mode)

    def unlink(self, name: str) -> None:
        """Remove a file if it exists. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), freeing_in_thread(self.path / name):
            os.unlink(self._named(name), dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all in it, if that is possible."""
        shutil.rmtree(self._named(name), ignore_errors=True, dir_fd=self.descriptor)

    def put(self, source: Path, name: str) -> None:
        """Move a file into it. Raises OSError."""
        os.replace(source, self._named(name), dst_dir_fd=self.descriptor)

    def _named(self, name: str) -> str | Path:
        return self.path / name if self.descriptor is None else name


@contextlib.contextmanager
def opened(folder: Path, *below: str) -> Iterator[OwnFolder]:
    """Context manager: the folder `below` in `folder`, which the process cannot exchange itself.

    Raises OSError if it is missing or if a part of `below` is a link.
    """
    path = folder.joinpath(*below)
    if os.name == "nt":
        for number in range(len(below)):
            if (part := folder.joinpath(*below[: number + 1])).is_symlink():
                raise NotADirectoryError(f"{part} is a link")
        yield OwnFolder(path, None)
        return
    flags = os.O_RDONLY | os.O_DIRECTORY
    descriptor = os.open(folder, flags)
    try:
        for name in below:
            outer, descriptor = descriptor, os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(outer)
        yield OwnFolder(path, descriptor)
    finally:
        os.close(descriptor)
