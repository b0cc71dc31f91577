"""Workers on a Ray cluster: actors, each with one core of any node.

No folder is shared. A version goes to the nodes as one Ray object. What a peer keeps between rounds
stays with this process, and travels with each message; so the loss of a node loses no peer: an
actor on another node does the work again.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.clientapp.interfaces import signed_payload
from agent.transport.coordinator_client import unpack_message
from commonweight.simulation.peer import (
    Answer,
    Job,
    Worker,
    decode_answer,
    decode_job,
    decode_plan,
    encode,
)
from commonweight.simulation.plan import Plan
from commonweight.simulation.pool import MAX_TRIES, WorkerKilled
from commonweight.simulation.worker import prepare
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.extras import needs_extra
from protocols.messages.work import SIGNED_WORK

log = logging.getLogger("commonweight")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
#: Versions that stay in Ray's object store, and in the folder of an actor.
MAX_VERSIONS = 2
#: A peer's update is no state: its upload has it.
_LEFT_OUT = "outbox/update.safetensors"


class Actor:
    """What runs on a node, in a folder of its own."""

    def __init__(self, plan: bytes) -> None:
        prepare()
        self._plan = replace(decode_plan(plan), home=tempfile.mkdtemp(prefix="commonweight-"))
        self._versions = Path(self._plan.home) / "versions"
        for folder in (self._versions, self._plan.uploads):
            folder.mkdir(parents=True)
        self._worker = Worker(self._plan)

    def work(self, job: bytes, base: str, version: bytes, state: bytes) -> tuple[bytes, ...]:
        """The encoded answer, the update, and what the peer keeps.

        `version`: the bytes of `base`.
        """
        given = decode_job(job)
        if base and not self._plan.version_path(base).exists():
            kept = sorted(self._versions.iterdir(), key=lambda file: file.stat().st_mtime)
            for old in kept[: 1 - MAX_VERSIONS]:
                old.unlink()
            self._plan.version_path(base).write_bytes(version)
        folder = self._plan.peer_folder(given.index)
        if not self._worker.keeps(given):
            _unpack(state, folder)
        answer = self._worker.work(given)
        uploads = list(self._plan.uploads.iterdir())
        update = uploads[0].read_bytes() if uploads else b""
        for path in uploads:
            path.unlink()
        return encode(answer), update, _pack(folder)


class Cluster:
    """A Ray cluster at `address`; "auto": the one of this machine, or a new one on it.

    Raises MissingPackage, Unreachable.
    """

    def __init__(self, plan: Plan, address: str) -> None:
        with needs_extra("simulate", "a simulation on Ray"):
            import ray
        self.ray, self.plan = ray, plan
        try:
            ray.init(
                address=None if address == "auto" else address,
                include_dashboard=False,
                log_to_driver=False,
                ignore_reinit_error=True,
            )
        except (ConnectionError, ValueError) as err:
            raise Unreachable(f"no Ray cluster answers at {address}: {err}", "ray status") from err
        self._make = ray.remote(num_cpus=1)(Actor)
        self._versions: OrderedDict[str, Any] = OrderedDict()

    @property
    def cores(self) -> int:
        """How many actors work at a time."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def new_actor(self) -> Any:
        return self._make.remote(encode(self.plan))

    def version(self, digest: str) -> Any:
        """The reference of a version's bytes; None if it is not here."""
        if not digest:
            return None
        if digest not in self._versions:
            path = self.plan.version_path(digest)
            if not path.exists():
                return None
            self._versions[digest] = self.ray.put(path.read_bytes())
            if len(self._versions) > MAX_VERSIONS:
                self._versions.popitem(last=False)
        return self._versions[digest]

    def close(self) -> None:
        self.ray.shutdown()


class RayWorker:
    """One actor of the cluster; another one, on any node, after it or its node was lost."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._actor = cluster, cluster.new_actor()

    async def answer(self, job: Job) -> Answer:
        plan, base = self._cluster.plan, _base_of(job)
        folder, version = plan.peer_folder(job.index), self._cluster.version(base)
        given = (base, version) if version is not None else ("", b"")
        told, update, state = await self._exchange(encode(job), *given, _pack(folder))
        answer = decode_answer(told)
        if answer.upload:
            peer = identity.peer_id(plan.public(job.index))
            plan.upload_path(peer, answer.upload).write_bytes(update)
        _unpack(state, folder)
        return answer

    async def _exchange(self, *given: Any) -> tuple[bytes, bytes, bytes]:
        for _ in range(MAX_TRIES):
            try:
                done: tuple[bytes, bytes, bytes] = await self._actor.work.remote(*given)
                return done
            except self._cluster.ray.exceptions.RayError as err:
                log.warning("a worker on Ray was lost: %s", err)
                await self.close()
                self._actor = self._cluster.new_actor()
        raise WorkerKilled(f"its worker on Ray was lost {MAX_TRIES} times", "ray status")

    async def close(self) -> None:
        self._cluster.ray.kill(self._actor)


def _base_of(job: Job) -> str:
    """The version that a message is about; empty if it is about none."""
    payload, _ = signed_payload(unpack_message(job.message), "config", "work")
    return SIGNED_WORK.decode(payload).base


def _pack(folder: Path) -> bytes:
    """The files of a peer as a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() != _LEFT_OUT:
                archive.add(path, path.relative_to(folder).as_posix())
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    """Replace the files of a peer by those of an archive that this program has made."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(fresh, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
