"""Checks the bounds of a ServerApp's messages, and makes their arrays versions of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from coordinator.runs.apps import frames, leftovers
from coordinator.runs.apps.conversation import Sent
from coordinator.runs.apps.frames import Content, Outgoing, Push
from coordinator.runs.apps.lane import MAX_WAITING_BYTES
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadMessage, BadWeights
from protocols.local import own_folders
from protocols.local.disk_space import check_room
from protocols.local.safe_paths import path_in
from protocols.messages import app_work
from protocols.messages.envelope import MAX_PEERS

#: Messages without a reply: to one node, and in all.
MAX_OPEN_OF_NODE, MAX_OPEN = 64, MAX_PEERS


def check_bounds(
    push: Push, going: Collection[Outgoing], sent: Collection[Sent], waiting_bytes: int
) -> None:
    """Raise BadMessage if the messages `going` out in this push are too many or too large.

    Messages that were `sent` before and the records of waiting replies count as well. Each message
    is in memory separately, even if many have the same content.
    """
    told = [push.contents[message.content].told for message in going]
    held = [*told, *(one.work.told for one in sent)]
    if (nbytes := sum(map(len, held)) + waiting_bytes) > MAX_WAITING_BYTES:
        raise BadMessage(
            f"the ServerApp has {nbytes:,} bytes of configs and metrics in messages and replies at "
            f"one time, at most {MAX_WAITING_BYTES:,} are taken",
            "put large values into an ArrayRecord",
        )
    nodes = Counter(message.node for message in going)
    if going:
        nodes.update(one.work.node for one in sent if one.work.node in nodes)
    most, number = max(nodes.values(), default=0), len(going) + len(sent)
    if most > MAX_OPEN_OF_NODE or number > MAX_OPEN:
        raise BadMessage(
            f"the ServerApp has {number:,} messages without a reply, {most:,} of them to one node; "
            f"at most {MAX_OPEN:,} are taken, and {MAX_OPEN_OF_NODE} to one node",
            "await replies before you send more",
        )


def store_arrays(
    store: WeightStore, folder: Path, contents: Iterable[Content], on_disk: set[str]
) -> dict[str, int]:
    """Make the arrays of these contents versions; their bytes by digest, 0 for no arrays.

    `folder`: of the run. `on_disk`: its versions, which other runs leave alone; new ones are added.
    They are marked as recorded, because the run itself deletes those that the ledger never names,
    also after a crash. Raises BadMessage for arrays that are not what the ServerApp says.
    """
    sizes = {"": 0}
    for content in contents:
        digest = content.digest
        if app_work.has_arrays(app_work.decode_records(content.told)) != bool(digest):
            raise BadMessage("the records of a message and its arrays do not belong together")
        if digest in sizes:
            continue
        try:
            if digest not in on_disk:
                leftovers.note_version(folder, digest)
            try:
                with own_folders.opened(folder, frames.OUT) as out:
                    file = path_in(out.path, digest, frames.SUFFIX)
                    check_room(store.folder, file.lstat().st_size)
                    store.adopt(file, digest)
            except FileNotFoundError as err:  # a thread of the app has sent the same arrays
                if digest not in on_disk:
                    raise BadMessage("the ServerApp names arrays that it has not written") from err
            on_disk.add(digest)
            store.mark_recorded(digest)
            sizes[digest] = store.version_path(digest).stat().st_size
        except (OSError, BadWeights) as err:
            raise BadMessage(f"the ServerApp's arrays cannot be sent: {err}") from err
    return sizes
