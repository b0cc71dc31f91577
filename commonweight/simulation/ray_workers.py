"""Workers on a Ray cluster: actors, each with one core of any node.

No folder is shared. A version goes to the nodes as one Ray object. What a peer keeps between rounds
stays with this process, and travels with each message; so the loss of a node loses no peer: an
actor on another node does the work again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.clientapp.interfaces import signed_payload
from agent.clientapp.outbox import UPDATE
from agent.transport.coordinator_client import unpack_message
from commonweight.simulation.peer import (
    Answer,
    Job,
    Worker,
    decode_answers,
    decode_jobs,
    decode_plan,
    encode,
)
from commonweight.simulation.plan import Plan
from commonweight.simulation.pool import MAX_TRIES, WorkerKilled
from commonweight.simulation.worker import prepare
from protocols.enrollment import identity
from protocols.errors import HomeLocked, Unreachable
from protocols.extras import needs_extra
from protocols.local import homes
from protocols.messages.work import SIGNED_WORK

log = logging.getLogger("commonweight")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
#: Versions that stay in Ray's object store, and in the folder of an actor.
MAX_VERSIONS = 2
#: How the folders of actors begin. One that is not locked and this old is of an actor that is gone.
FOLDER_PREFIX, _ABANDONED_AFTER_S = "commonweight-ray-", 60.0
#: An actor that ends removes its folder within this time.
_REMOVED_WITHIN_S = 5.0
Files = dict[str, bytes]


class Actor:
    """What runs on a node, in a folder of its own.

    Ray kills actors, so each removes the folders that killed ones have left on its node.
    """

    def __init__(self, plan: bytes) -> None:
        prepare()
        remove_abandoned(Path(tempfile.gettempdir()))
        home = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._lock = homes.lock_home(home, "worker on Ray")
        self._plan = replace(decode_plan(plan), home=str(home))
        self._versions = home / "versions"
        for folder in (self._versions, self._plan.uploads):
            folder.mkdir(parents=True)
        self._worker = Worker(self._plan)

    def work(
        self, jobs: bytes, bases: list[str], versions: dict[str, Any], states: list[Files]
    ) -> tuple[bytes, list[bytes], list[Files]]:
        """The encoded answers, the updates, and what the peers keep; each in the order of the jobs.

        `bases`: the version that each job is about. `versions`: references of their bytes.
        `states`: what the peers kept before.
        """
        answers, updates, kept_files = list[Answer](), list[bytes](), list[Files]()
        for job, base, state in zip(decode_jobs(jobs), bases, states, strict=True):
            if base in versions:
                self._fetch(base, versions[base])
            folder = self._plan.peer_folder(job.index)
            if not self._worker.keeps(job):
                write_files(state, folder)
            answers.append(self._worker.work(job))
            updates.append(b"".join(map(_take_file, self._plan.uploads.iterdir())))
            kept_files.append(read_files(folder))
        return encode(answers), updates, kept_files

    def close(self) -> None:
        """Remove the folder. No work follows."""
        shutil.rmtree(self._plan.home, ignore_errors=True)

    def _fetch(self, base: str, version: Any) -> None:
        """Write the version to the folder, unless it is there."""
        import ray

        path = self._plan.version_path(base)
        if path.exists():
            return
        kept = sorted(self._versions.iterdir(), key=lambda file: file.stat().st_mtime)
        for old in kept[: 1 - MAX_VERSIONS]:
            old.unlink()
        path.write_bytes(ray.get(version))


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

    def new_actor(self, *, replaces: bool = False) -> Any:
        """`replaces`: it shares a core, as the nodes that are left may have none free."""
        options = {"num_cpus": 0} if replaces else {}
        return self._make.options(**options).remote(encode(self.plan))

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

    async def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        plan, bases = self._cluster.plan, list(map(_base_of, jobs))
        folders = [plan.peer_folder(job.index) for job in jobs]
        versions = {base: self._cluster.version(base) for base in set(bases)}
        here = {base: version for base, version in versions.items() if version is not None}
        told, updates, states = await self._exchange(
            encode(jobs), bases, here, list(map(read_files, folders))
        )
        answers = decode_answers(told)
        for job, answer, update in zip(jobs, answers, updates, strict=True):
            if answer.upload:
                peer = identity.peer_id(plan.public(job.index))
                plan.upload_path(peer, answer.upload).write_bytes(update)
        for state, folder in zip(states, folders, strict=True):
            write_files(state, folder)
        return answers

    async def _exchange(self, *given: Any) -> tuple[bytes, list[bytes], list[Files]]:
        for _ in range(MAX_TRIES):
            try:
                done: tuple[bytes, list[bytes], list[Files]] = await self._actor.work.remote(*given)
                return done
            except self._cluster.ray.exceptions.RayError as err:
                log.warning("a worker on Ray was lost: %s", err)
                await self.close()
                self._actor = self._cluster.new_actor(replaces=True)
        raise WorkerKilled(f"its worker on Ray was lost {MAX_TRIES} times", "ray status")

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError, self._cluster.ray.exceptions.RayError):
            await asyncio.wait_for(self._actor.close.remote(), _REMOVED_WITHIN_S)
        self._cluster.ray.kill(self._actor)


def _base_of(job: Job) -> str:
    """The version that a message is about; empty if it is about none."""
    payload, _ = signed_payload(unpack_message(job.message), "config", "work")
    return SIGNED_WORK.decode(payload).base


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's actors that were killed."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError, HomeLocked):
            found = folder.lstat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _ABANDONED_AFTER_S:
                homes.lock_home(folder, "worker on Ray")
                shutil.rmtree(folder)


def read_files(folder: Path) -> Files:
    """The files of a peer, by their paths in its folder."""
    found, prefix = Files(), len(str(folder)) + 1
    for parent, _, names in os.walk(folder):
        for name in names:
            path = f"{parent}/{name}"
            if path[prefix:] != UPDATE:  # no state: its upload has it
                found[path[prefix:]] = Path(path).read_bytes()
    return found


def write_files(files: Files, folder: Path) -> None:
    """Make these the files of a peer."""
    old = read_files(folder)
    for name in old.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if old.get(name) != data:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_bytes(data)


def _take_file(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    return data
