"""The weight transfer over HTTP: versions go down and uploads come in, each in one request.

    GET /cw/v1/weights/{digest}      a version, whole or a range of it         (an enrolled peer)
    GET /cw/v1/patches/{digest}      the patch from its parent, if one exists  (an enrolled peer)
    PUT /cw/v1/updates/{digest}      an update, into the spool                 (an enrolled peer)

A Flower message holds only the digest. The size of an upload is checked before it starts, and its
digest while it streams. One that is cut off stays as a `.part` file, and `x-cw-offset` resumes it.
An update of a few bytes comes with the message itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from coordinator.fleet.auth import Auth
from coordinator.storage.spool import DIGEST, PartialUpload
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.streams import UploadWriter, WholeFileResponse
from coordinator.transport.upload_limits import UploadLimits
from protocols.failpoints import failpoint
from protocols.local import atomic_files, disk_space

OFFSET = "x-cw-offset"
VERSION_PATH = "/cw/v1/weights/{digest}"
PATCH_PATH = "/cw/v1/patches/{digest}"
UPDATE_PATH = "/cw/v1/updates/{digest}"

Routes = list[tuple[str, str, Callable[..., object]]]


class WeightTransfer:
    """Sends and receives the files of a store within `limits`, and counts the bytes."""

    def __init__(self, store: WeightStore, max_bytes: int = 0) -> None:
        self.store = store
        self.limits = UploadLimits(store.uploads.folder, max_bytes)
        self.bytes_up = self.bytes_down = 0

    def routes(self, auth: Auth, down: str = VERSION_PATH, up: str = UPDATE_PATH) -> Routes:
        """(method, path, endpoint) of versions and uploads."""

        async def download(request: Request) -> Response:
            await auth.peer(request)
            return self._send(request, self.store.version_path(digest_of(request)))

        async def upload(request: Request) -> Response:
            digest = digest_of(request)
            peer = await auth.peer(request, body_sha256=digest)
            return await self._receive(request, auth, peer.peer, digest)

        return [("GET", down, download), ("PUT", up, upload)]

    def patch_routes(self, auth: Auth) -> Routes:
        """(method, path, endpoint) of patches."""

        async def download_patch(request: Request) -> Response:
            await auth.peer(request)
            return self._send(request, self.store.patch_path(digest_of(request)), ranges=False)

        return [("GET", PATCH_PATH, download_patch)]

    def _send(self, request: Request, path: Path, *, ranges: bool = True) -> Response:
        if not path.exists():
            raise HTTPException(404)
        size = path.stat().st_size
        if ranges and "range" in request.headers:
            self.bytes_down += _range_bytes(request, size)
            return FileResponse(path, media_type="application/octet-stream")
        self.bytes_down += size
        return WholeFileResponse(path, size)

    async def receive_inline(self, node: str, data: bytes) -> None:
        """Store a small update that came inside its message. Raises HTTPException."""
        digest = hashlib.sha256(data).hexdigest()
        if self.store.uploads.path(node, digest).exists():
            return
        self.limits.check_size(len(data))
        part = self._begin(node, digest)
        self.limits.check_space(len(data))
        with part, self._refusing_when_full():
            failpoint("upload.piece")
            self.bytes_up += len(data)
            await asyncio.to_thread(_write_synced, part.path, data)
            if part.is_current():
                await _finish(part)

    def _begin(self, node: str, digest: str) -> PartialUpload:
        """Start or resume an upload. Raises HTTPException if the peer has too many."""
        part = self.store.uploads.begin(node, digest)
        self.limits.check_count(len(self.store.uploads.complete(node)))
        return part

    async def _receive(self, request: Request, auth: Auth, node: str, digest: str) -> Response:
        if self.store.uploads.path(node, digest).exists():
            return JSONResponse({"stored": True})
        length, offset = _whole(request, "content-length"), _whole(request, OFFSET, 0)
        self.limits.check_size(offset + length)
        part = self._begin(node, digest)
        have = part.nbytes
        if offset not in (0, have):
            return JSONResponse({"have": have}, status_code=409)
        self.limits.check_space(length)
        with part, self._refusing_when_full():
            try:
                received = await self._stream(request, auth, node, part, offset, length)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it; the upload can be resumed
            if not part.is_current():
                return JSONResponse({"have": 0}, status_code=409)
            _check_enrolled(auth, node, part)
            if received != digest:
                part.delete()
                raise HTTPException(422, "the bytes are not those of the announced digest")
            await _finish(part)
        return JSONResponse({"stored": True})

    async def _stream(
        self, request: Request, auth: Auth, node: str, part: PartialUpload, offset: int, length: int
    ) -> str:
        """Append the request's body to the partial upload and fsync it.

        Returns the digest of the whole file, or "" if it is too short, too long or not ours to
        write any more.
        """
        self.limits.promised_bytes += length
        try:
            # Without a buffer: after a newer request takes over, nothing is left to be written.
            with part.path.open("ab" if offset else "wb", buffering=0) as file:
                writer = UploadWriter(file, part.is_current)
                if offset:
                    await asyncio.to_thread(writer.hash_existing, part.path)
                try:
                    async for piece in request.stream():
                        if not part.is_current():
                            return ""
                        _check_enrolled(auth, node, part)
                        failpoint("upload.piece")
                        length -= len(piece)
                        self.limits.promised_bytes -= len(piece)
                        self.bytes_up += len(piece)
                        await writer.write(piece)
                finally:
                    await writer.flush()
                # The agent forgets an upload once it is acknowledged, so it must be durable.
                await asyncio.to_thread(os.fsync, file.fileno())
            return writer.digest if length == 0 else ""
        finally:
            self.limits.promised_bytes -= length

    @contextmanager
    def _refusing_when_full(self) -> Iterator[None]:
        """Turn a full disk into a 507. What has arrived can be resumed."""
        try:
            yield
        except OSError as err:
            if not disk_space.is_disk_full(err):
                raise
            raise self.limits.no_space() from err


def _check_enrolled(auth: Auth, node: str, part: PartialUpload) -> None:
    """Stop the upload of a peer that was removed after it began."""
    if not auth.is_enrolled(node):
        part.delete()
        raise HTTPException(401)


async def _finish(part: PartialUpload) -> None:
    part.finish()
    await asyncio.to_thread(part.sync)
    failpoint("upload.stored")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        atomic_files.write_all(file, memoryview(data))
        os.fsync(file.fileno())


def digest_of(request: Request) -> str:
    """The digest in a request's path. Raises 404 for anything else."""
    digest: str = request.path_params["digest"]
    if not DIGEST.fullmatch(digest):
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
