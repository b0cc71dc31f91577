"""The folder for weights in a home: versions, uploads and strategy states."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from coordinator.storage.object_store import ObjectStore
from coordinator.storage.spool import Spool
from coordinator.storage.versions import Versions, compare
from protocols.local import atomic_files
from protocols.local.failpoints import failpoint


class WeightStore(Versions):
    """Versions, uploads (`uploads`) and the folder of strategy states (`states`)."""

    def __init__(self, folder: Path, mirror: ObjectStore | None = None) -> None:
        super().__init__(folder / "versions", mirror)
        self.home = folder
        self.uploads = Spool(folder / "spool", self.suffix)
        #: For `strategies.state.StateStore`. States never leave the coordinator.
        self.states = folder / "states"
        self.states.mkdir(mode=0o700, exist_ok=True)
        self.state_mirror = mirror.for_states() if mirror is not None else None
        compare(self.states, self.suffix, self.state_mirror)

    def promote_upload(self, node: str, digest: str) -> None:
        """Make an upload a version: first weights of a run, or an answer of a job.

        `drop` has no effect on it until `mark_recorded`. Raises OSError, StoreUnreachable.
        """
        if self.mirror is not None and (upload := self.uploads.path(node, digest)).exists():
            self.mirror.put(digest, upload)
        with self._naming:
            self.unrecorded.add(digest)
            try:
                self.uploads.move(
                    node, digest, partial(Path.replace, target=self.version_path(digest))
                )
            except FileNotFoundError:
                self.unrecorded.discard(digest)
                raise
        atomic_files.fsync_folder(self.folder)
        failpoint("version.adopted")
