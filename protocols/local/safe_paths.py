"""The only way from a name of the network, such as a digest or an id, to a path."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from protocols.errors import BadMessage

#: No separator, no drive, no leading dot, no control character: one plain file name.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


@functools.lru_cache(64)  # a work names few files, and each of them several times
def path_in(folder: Path, name: str, suffix: str = "") -> Path:
    """The path of the file `name` + `suffix` in `folder`. Raises BadMessage for other names.

    A name has ASCII letters, digits and `_.-`, starts with a letter or digit, has no `..`, and has
    at most 200 characters, so the path is always directly in the folder.
    """
    file = name + suffix
    if not _FILE_NAME.fullmatch(file) or not name or ".." in file or file.endswith("."):
        raise BadMessage(f"{file[:80]!a} is not the name of a file")
    return folder / file
