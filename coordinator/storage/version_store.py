"""Where versions are kept beside the folder of the home: `versions = "s3://bucket/prefix"`.

A version is in the store before the ledger names it, and a start fetches what the folder lacks. So
a coordinator on another machine has them all. Pure, but for `open_store`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class VersionStore(Protocol):
    """Files by their SHA-256. Each call may take as long as the file; raises StoreUnreachable."""

    def put(self, digest: str, path: Path) -> None:
        """Store a file durably, unless the store has it. Later changes of it are ignored."""

    def get(self, digest: str, path: Path) -> bool:
        """Fetch a file durably to `path`; False if the store has none with these bytes."""

    def delete(self, digest: str) -> None:
        """Delete a file soon; it does not wait, and an error is logged."""

    def digests(self) -> set[str]:
        """Which files there are."""

    def for_states(self) -> VersionStore:
        """The files of strategies' states in the same store, apart from the versions."""

    def close(self) -> None:
        """Finish the deletions."""


def open_store(url: str, fleet: str) -> VersionStore:
    """The store at `url`, which belongs to this fleet and can be written.

    Raises UsageError, Refused, HomeError, StoreUnreachable, MissingPackage.
    """
    from coordinator.storage.object_store import ObjectStore

    return ObjectStore(url, fleet)
