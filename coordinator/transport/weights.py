"""The weight lane: weights travel once, by digest, in one streamed request each way.

    GET /cw/v1/weights/{digest}      a version, whole or a range of it     (an enrolled peer)
    GET /cw/v1/patches/{digest}      what makes it of its parent, if small (an enrolled peer)
    PUT /cw/v1/updates/{digest}      an update's bytes, into the spool     (an enrolled peer)

A Flower message holds only the digest. An upload is size-checked before and hash-checked while it
streams; what is cut short stays as a `.part` file and can be resumed from its end (`x-cw-offset`).
A few bytes come with the message itself.
A peer has one `.part` file at most, and `MOST_UPLOADS` whole ones until the round is committed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Set
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from coordinator.fleet.auth import Auth
from coordinator.storage.versions import Versions
from coordinator.transport.streams import UploadWriter, WholeFileResponse
from protocols.errors import BadWeights
from protocols.failpoints import failpoint
from protocols.local import atomic_files, disk_space
from protocols.local.background_unlink import remove
from protocols.model.weights_file import Stored

OFFSET = "x-cw-offset"
#: Whole uploads that a peer may have in the spool: one that counts, and one made anew.
MOST_UPLOADS = 2
#: Left to the ledger, beside the room for the next version, when an upload is let in.
_RESERVE_BYTES = 4 * 1024 * 1024
#: An agent that was turned away for want of room tries again sooner than that.
_SHORT_S = 20.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Lane(Versions):
    """Versions and uploads on disk. `limit_bytes` bounds an upload; the run in work sets it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "versions")
        self._spool = folder / "spool"
        #: What strategies remember (`strategies.state`); it never travels.
        self.states = folder / "states"
        for part in (self._spool, self.states):
            part.mkdir(mode=0o700, exist_ok=True)
        #: Who writes a `.part` file now: a second upload takes the place of a stuck one.
        self._writers: dict[Path, object] = {}
        #: By peer: its files in the spool, as a look at the folder for each upload costs the more
        #: the more peers there are.
        self._spooled: defaultdict[str, set[Path]] = defaultdict(set)
        for path in self._spool.iterdir():
            self._spooled[path.name.rpartition("-")[0]].add(path)
        self.limit_bytes = 0
        #: Whole uploads that a peer may have here: more where it may count more than once.
        self.most_uploads = MOST_UPLOADS
        #: What the next version takes: uploads must leave room for it.
        self.version_bytes = 0
        #: Announced by uploads under way and not written yet.
        self._promised = 0
        self._refused_at = -math.inf
        self.on_short: Callable[[], None] = lambda: None
        self.bytes_up = self.bytes_down = 0

    # --- versions ---

    def adopt(self, node: str, digest: str) -> None:
        """Turn an upload into a version (the first weights of a run)."""
        update = self.update(node, digest)
        update.replace(self.version(digest))
        self._spooled[node].discard(update)
        atomic_files.sync_folder(self._versions)
        failpoint("version.adopted")

    # --- room ---

    def has_room(self, nbytes: int = 0) -> bool:
        """True if so much fits on the disk beside what uploads under way were promised."""
        free = self.free_bytes - self._promised
        return free >= nbytes + self.version_bytes + _RESERVE_BYTES

    @property
    def free_bytes(self) -> int:
        return disk_space.free_bytes(self._spool)

    @property
    def shortage(self) -> str:
        """Words for uploads that were turned away for want of room just now, or empty."""
        if time.monotonic() - self._refused_at > _SHORT_S:
            return ""
        return f"room on the coordinator's disk ({self.free_bytes / 1e6:,.0f} MB free)"

    def _no_room(self) -> HTTPException:
        self._refused_at = time.monotonic()
        self.on_short()
        return HTTPException(507, "no room on the coordinator's disk")

    # --- updates ---

    def update(self, node: str, digest: str) -> Path:
        """Where this peer's upload with this digest lies, or would."""
        return self._spool / f"{node}-{digest}{self.suffix}"

    async def take(self, node: str, data: bytes) -> None:
        """Keep the few bytes of an update that came with its claim. Raises HTTPException."""
        digest = hashlib.sha256(data).hexdigest()
        done = self.update(node, digest)
        if done.exists():
            return
        self._check_size(len(data))
        part = self._spool / f"{node}-{digest}.part"
        self._make_room(node, part)
        if not self.has_room(len(data)):
            raise self._no_room()
        self._writers[part] = me = object()
        failpoint("upload.piece")
        self.bytes_up += len(data)
        try:
            await asyncio.to_thread(_write_synced, part, data)
            if self._writers.get(part) is me:
                await self._whole_now(node, part, done)
        except OSError as err:
            if not disk_space.is_full(err):
                raise
            raise self._no_room() from err
        finally:
            if self._writers.get(part) is me:
                del self._writers[part]

    async def _whole_now(self, node: str, part: Path, done: Path) -> None:
        """Give a whole, synced upload its name."""
        failpoint("upload.synced")
        os.replace(part, done)
        self._spooled[node].discard(part)
        self._spooled[node].add(done)
        await asyncio.to_thread(atomic_files.sync_folder, self._spool)
        failpoint("upload.stored")

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self.limit_bytes:
            raise HTTPException(413, f"an update may have {self.limit_bytes} bytes")

    def open_update(self, node: str, digest: str) -> Stored:
        """An uploaded update, open for reading. Raises BadWeights."""
        if not _DIGEST.fullmatch(digest):  # a claim's is text that a peer chose
            raise BadWeights("the update is not named by a digest")
        try:
            return Stored(self.update(node, digest))
        except FileNotFoundError as err:
            raise BadWeights("the update's bytes were never uploaded") from err

    def keep_updates(self, node: str, digests: Set[str]) -> None:
        """Drop this peer's whole uploads but for these: no other is awaited."""
        wanted = {self.update(node, digest) for digest in digests}
        for path in {p for p in self._spooled[node] if p.suffix != ".part"} - wanted:
            remove(path)
            self._spooled[node].discard(path)

    def drop_update(self, node: str, digest: str) -> None:
        """Forget one upload."""
        remove(self.update(node, digest))
        self._spooled[node].discard(self.update(node, digest))

    def drop_updates(self, but_of: Collection[str] = ()) -> None:
        """Empty the spool: the round that needed it is committed. `but_of`: peers still at work."""
        for node, paths in self._spooled.items():
            if node in but_of:
                continue
            for path in paths - self._writers.keys():
                remove(path)
                paths.discard(path)
        failpoint("updates.dropped")

    def routes(self, auth: Auth) -> list[tuple[str, str, Callable[..., object]]]:
        """(method, path, endpoint) of the lane."""

        async def download_patch(request: Request) -> Response:
            await auth.peer(request)
            path = self.patch(digest_of(request))
            if not path.exists():
                raise HTTPException(404)
            size = path.stat().st_size
            self.bytes_down += size
            return WholeFileResponse(path, size)

        return [
            ("GET", "/cw/v1/patches/{digest}", download_patch),
            *self._both_ways(auth, "/cw/v1/weights/{digest}", "/cw/v1/updates/{digest}"),
        ]

    def _both_ways(
        self, auth: Auth, down: str, up: str
    ) -> list[tuple[str, str, Callable[..., object]]]:
        """The routes by which versions go down and uploads come in."""

        async def download(request: Request) -> Response:
            await auth.peer(request)
            digest = digest_of(request)
            path = self.version(digest)
            if not path.exists():
                raise HTTPException(404)
            size = path.stat().st_size
            self.bytes_down += _range_bytes(request, size)
            if "range" in request.headers:
                return FileResponse(path, media_type="application/octet-stream")
            return WholeFileResponse(path, size)

        async def upload(request: Request) -> Response:
            digest = digest_of(request)
            peer = await auth.peer(request, body_sha256=digest)
            return await self._receive(request, auth, peer.peer, digest)

        return [("GET", down, download), ("PUT", up, upload)]

    def _make_room(self, node: str, part: Path) -> None:
        """Drop this peer's other unfinished upload. Raises 413 if it has enough whole ones."""
        spooled = self._spooled[node]
        for other in [path for path in spooled if path.suffix == ".part" and path != part]:
            self._writers.pop(other, None)
            other.unlink(missing_ok=True)
            spooled.discard(other)
        if sum(path.suffix != ".part" for path in spooled) >= self.most_uploads:
            raise HTTPException(413, "this round has enough updates of this peer")
        spooled.add(part)

    async def _receive(self, request: Request, auth: Auth, node: str, digest: str) -> Response:
        done = self.update(node, digest)
        if done.exists():
            return JSONResponse({"stored": True})
        length, offset = _whole(request, "content-length"), _whole(request, OFFSET, 0)
        self._check_size(offset + length)
        part = self._spool / f"{node}-{digest}.part"
        self._make_room(node, part)
        have = part.stat().st_size if part.exists() else 0
        if offset != 0 and offset != have:
            return JSONResponse({"have": have}, status_code=409)
        if not self.has_room(length):
            raise self._no_room()
        self._writers[part] = me = object()
        self._promised += length
        try:
            # Without a buffer: what a stuck upload has not written by now is never written.
            with part.open("ab" if offset else "wb", buffering=0) as file:
                writer = UploadWriter(file, lambda: self._writers.get(part) is me)
                if offset:
                    await asyncio.to_thread(writer.hash_existing, part)
                try:
                    async for piece in request.stream():
                        if self._writers.get(part) is not me:  # nor may we touch what it has made
                            return JSONResponse({"have": 0}, status_code=409)
                        if not auth.is_enrolled(node):  # removed since it began
                            part.unlink(missing_ok=True)
                            raise HTTPException(401)
                        failpoint("upload.piece")
                        length -= len(piece)
                        self._promised -= len(piece)
                        self.bytes_up += len(piece)
                        await writer.write(piece)
                finally:
                    await writer.flush()
                # Durable before it is acknowledged: the agent forgets it then.
                await asyncio.to_thread(os.fsync, file.fileno())
            if self._writers.get(part) is not me:
                return JSONResponse({"have": 0}, status_code=409)
            if not auth.is_enrolled(node):
                part.unlink(missing_ok=True)
                raise HTTPException(401)
            if length != 0 or writer.digest != digest:
                part.unlink(missing_ok=True)
                raise HTTPException(422, "the bytes are not those of the announced digest")
            await self._whole_now(node, part, done)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it; what came can be resumed
        except OSError as err:
            if not disk_space.is_full(err):
                raise
            raise self._no_room() from err  # what came can be resumed
        finally:
            self._promised -= length
            if self._writers.get(part) is me:
                del self._writers[part]
        return JSONResponse({"stored": True})


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        atomic_files.write_all(file, memoryview(data))
        os.fsync(file.fileno())


def digest_of(request: Request) -> str:
    digest: str = request.path_params["digest"]
    if not _DIGEST.fullmatch(digest):
        raise HTTPException(404)
    return digest


def _whole(request: Request, header: str, default: int | None = None) -> int:
    text = request.headers.get(header, "" if default is None else str(default))
    if not text.isdecimal() or len(text) > 15:
        raise HTTPException(411, f"{header} must be a number")
    return int(text)


def _range_bytes(request: Request, size: int) -> int:
    """Bytes that a single-range request asks for; the whole size for any other."""
    match = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", request.headers.get("range", ""))
    if not match:
        return size
    last = int(match[2]) if match[2] else size - 1
    return max(0, min(last, size - 1) - int(match[1]) + 1)
