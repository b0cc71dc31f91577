"""What a home keeps of runs beside the ledger: versions, uploads and strategy states."""

from __future__ import annotations

from pathlib import Path

from coordinator.storage.spool import Spool
from coordinator.storage.versions import Versions
from protocols.failpoints import failpoint
from protocols.local import atomic_files


class WeightStore(Versions):
    """Versions, uploads (`uploads`) and what strategies remember (`states`) in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "versions")
        self.uploads = Spool(folder / "spool", self.suffix)
        #: Written by `strategies.state`; states never leave the coordinator.
        self.states = folder / "states"
        self.states.mkdir(mode=0o700, exist_ok=True)

    def promote_upload(self, node: str, digest: str) -> None:
        """Make an upload a version: the first weights of a run, or an answer of a job.

        Nothing drops it before `recorded`.
        """
        with self._naming:
            self.unrecorded.add(digest)
            self.uploads.move(node, digest, self.version_path(digest))
        atomic_files.fsync_folder(self.folder)
        failpoint("version.adopted")
