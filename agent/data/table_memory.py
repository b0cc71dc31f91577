"""What this machine remembers of its owner's rows: their numbers, and what was told about them."""

from __future__ import annotations

from pathlib import Path

from agent.data.disclosed_sets import DisclosedSets
from agent.data.row_registry import RowRegistry

#: The file in the agent's home. It belongs to the owner (0600) and never leaves the machine.
FILE = "told.db"


class TableMemory:
    """One file with the registry of rows and the sets that were told. Used by one thread."""

    def __init__(self, path: Path) -> None:
        self.registry = RowRegistry(path)
        self.sets = DisclosedSets(path)

    def close(self) -> None:
        self.registry.close()
        self.sets.close()
