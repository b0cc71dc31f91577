"""Imports the code of an app: its source files and extensions, and no bytecode beside them.

Python prefers bytecode in `__pycache__` to the source. A digest of the source does not cover it.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType
from typing import Any

from agent.policy import sandbox
from protocols.errors import NotAllowed
from protocols.local import flower_apps
from protocols.local.flower_apps import AppCard


class _Source(SourceFileLoader):
    """Compiles the source each time."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def read_approved(folder: Path, code: str) -> AppCard:
    """The card of the app. Raises UsageError, and NotAllowed if its code has another digest."""
    card = flower_apps.read_card(folder)
    if card.code != code:
        raise NotAllowed(
            f"the app's files are not those that were installed: code {card.code[:12]}, and "
            f"{code[:12]} is allowed",
            "install it again: app add FOLDER",
        )
    return card


def load(folder: Path, component: str) -> Any:
    """The object "module:attribute" of the app in `folder`. Runs the app's code."""

    def find_in(path: str) -> FileFinder:
        if not Path(path).is_relative_to(folder):
            raise ImportError
        return FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Source, [".py"]))

    sys.path_hooks.insert(0, find_in)
    sys.path_importer_cache.clear()
    # Python processes that the app starts find their bytecode elsewhere too, as there is no hook.
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(sandbox.TEMPORARY, "bytecode").absolute())
    sys.path.insert(0, str(folder))
    module, _, attributes = component.partition(":")
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
