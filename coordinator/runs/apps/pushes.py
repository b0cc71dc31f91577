"""What a ServerApp sends: its arrays become versions of the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from coordinator.runs.apps import frames
from coordinator.runs.apps.frames import Content
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadMessage, BadWeights
from protocols.local.safe_paths import path_in
from protocols.messages import app_work


def adopt(
    store: WeightStore, folder: Path, contents: Iterable[Content], on_disk: set[str]
) -> dict[str, int]:
    """Make the arrays of these contents versions; their bytes by digest, 0 for no arrays.

    `folder`: of the run. `on_disk`: its versions, which other runs leave alone; new ones are added.
    So they are not `unrecorded`: the run deletes those that the ledger never names as well. Raises
    BadMessage for arrays that are not what the ServerApp says.
    """
    sizes = {"": 0}
    for content in contents:
        digest = content.digest
        if app_work.has_arrays(app_work.decode_told(content.told)) != bool(digest):
            raise BadMessage("the records of a message and its arrays do not belong together")
        if digest in sizes:
            continue
        try:
            try:
                store.adopt(path_in(folder / frames.OUT, digest, frames.SUFFIX), digest)
            except FileNotFoundError as err:  # a thread of the app has sent the same arrays
                if digest not in on_disk:
                    raise BadMessage("the ServerApp names arrays that it has not written") from err
            on_disk.add(digest)
            store.mark_recorded(digest)
            sizes[digest] = store.version_path(digest).stat().st_size
        except (OSError, BadWeights) as err:
            raise BadMessage(f"the ServerApp's arrays cannot be sent: {err}") from err
    return sizes
