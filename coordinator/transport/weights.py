"""The weight transfer over HTTP: each version or upload is one streamed request.

    GET /cw/v1/weights/{digest}      download a version, or a range of it      (an enrolled peer)
    GET /cw/v1/patches/{digest}      download the patch from its parent        (an enrolled peer)
    PUT /cw/v1/updates/{digest}      upload an update to the spool             (an enrolled peer)

A Flower message contains only the digest. The size of an upload is checked before it starts, and
its digest while it streams. An interrupted upload stays as a `.part` file and is resumed by
`x-cw-offset`. A small update comes inside its message. `?run=` names the run that an update is for:
the coordinator takes only those of the current run, and answers 410 to others. Older agents, whose
requests name no receiver, send it as `x-cw-run`, which they do not sign. The body of a refusal says
why.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from coordinator.fleet.auth import Auth
from coordinator.storage.spool import DIGEST, PartialUpload
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.http_connection import connection_of
from coordinator.transport.streams import UploadWriter, WholeFileResponse
from coordinator.transport.upload_limits import MAX_UPLOADS, UploadLimits
from protocols.enrollment.signed_requests import RECEIVER
from protocols.local import atomic_files, disk_space
from protocols.local.failpoints import failpoint

OFFSET, RUN = "x-cw-offset", "x-cw-run"
VERSION_PATH = "/cw/v1/weights/{digest}"
PATCH_PATH = "/cw/v1/patches/{digest}"
UPDATE_PATH = "/cw/v1/updates/{digest}"
#: Of the header with the id of a run.
_MAX_RUN_LENGTH = 1024
_UNEXPECTED = "no run or job waits for it"


class WeightTransfer:
    """Sends and receives the files of a store within `limits`, and counts the bytes."""

    def __init__(self, store: WeightStore, max_bytes: int = 0) -> None:
        self.store = store
        self.limits = UploadLimits(store.uploads.folder, max_bytes)
        self.bytes_up = self.bytes_down = 0

    def routes(self, auth: Auth, down: str = VERSION_PATH, up: str = UPDATE_PATH) -> list[Route]:
        """The routes of versions and uploads."""

        async def download(request: Request) -> Response:
            await auth.peer(request)
            return self.send_version(request, digest_of(request))

        async def upload(request: Request) -> Response:
            digest = digest_of(request)
            peer = await auth.peer(request, body_sha256=digest)
            return await self._receive(request, auth, peer.peer, digest)

        return [Route(down, download), Route(up, upload, methods=["PUT"])]

    def patch_route(self, auth: Auth) -> Route:
        async def download_patch(request: Request) -> Response:
            await auth.peer(request)
            return self._send(request, self.store.patch_path(digest_of(request)), ranges=False)

        return Route(PATCH_PATH, download_patch)

    def send_version(self, request: Request, digest: str) -> Response:
        """A version, or the range of it that is asked for. Raises HTTPException 404."""
        return self._send(request, self.store.version_path(digest))

    def _send(self, request: Request, path: Path, *, ranges: bool = True) -> Response:
        response, size = file_response(request, path, ranges=ranges)
        self.bytes_down += size
        return response

    @contextmanager
    def receiving(self, run: str, counted: Callable[[str], Set[str]]) -> Iterator[None]:
        """Take the uploads of this run for the duration of the block, once it sets its limits.

        `counted`: as in `UploadLimits`. The uploads stay on disk after the block.
        """
        self.store.uploads.begin_run(run)
        self.limits.counted = counted
        try:
            yield
        finally:
            self.limits.close()

    async def receive_inline(self, node: str, data: bytes) -> None:
        """Store a small update that came inside its message. Raises HTTPException."""
        digest = hashlib.sha256(data).hexdigest()
        if self.store.uploads.path(node, digest).exists():
            return
        self._check_run(node, "")
        self.limits.check_size(node, len(data))
        part = self._begin(node, digest)
        self.limits.check_space(len(data))
        with part, self._mapping_errors(part):
            failpoint("upload.piece")
            self.bytes_up += len(data)
            await asyncio.to_thread(_write_synced, part.path, data)
            if part.is_current():
                await _finish(part)

    def forget(self, node: str) -> None:
        """Delete the uploads of a removed peer, except those that the ledger names."""
        if node not in self.limits.validating:
            self.store.uploads.forget(node, self.limits.counted(node))

    def _begin(self, node: str, digest: str) -> PartialUpload:
        """Start or resume an upload. It replaces the peer's oldest one that does not count."""
        uploads = self.store.uploads
        uncounted = uploads.uncounted(node, self.limits.counted(node))
        if surplus := uncounted[: max(0, len(uncounted) - MAX_UPLOADS + 1)]:
            if node in self.limits.validating:
                raise HTTPException(503, "an update of this peer is being checked")
            uploads.delete(surplus)
        try:
            return uploads.begin(node, digest)
        except OSError as err:
            if not disk_space.is_disk_full(err):
                raise
            raise self.limits.no_space() from err

    def _check_run(self, node: str, run: str) -> None:
        """Raise HTTPException unless updates of this run (empty: unknown) are taken now."""
        current = self.store.uploads.run
        if run and current and run != current:
            raise HTTPException(410, "its run has ended or waits for its turn")
        if not self.limits.is_expected():
            raise HTTPException(410, _UNEXPECTED)
        if not self.limits.max_bytes:
            raise HTTPException(503, f"run {current} is being prepared")
        if not self.limits.max_bytes_of(node):
            raise HTTPException(410, _UNEXPECTED)

    async def _receive(self, request: Request, auth: Auth, node: str, digest: str) -> Response:
        length, offset = _header_int(request, "content-length"), _header_int(request, OFFSET, "0")
        self._check_run(node, _run_of(request))
        if self.store.uploads.path(node, digest).exists():
            return JSONResponse({"stored": True})
        self.limits.check_size(node, offset + length)
        part = self._begin(node, digest)
        have = part.nbytes
        if offset > have:
            return JSONResponse({"have": have}, status_code=409)
        self.limits.check_space(length)
        with part, self._mapping_errors(part):
            try:
                received = await self._stream(request, auth, node, part, offset, length)
            except ClientDisconnect:
                return Response(status_code=400)  # the upload can be resumed
            _check_enrolled(auth, node, part)
            if not part.is_current():
                self._check_run(node, _run_of(request))  # it may have ended since
                return JSONResponse({"have": 0}, status_code=409)
            if not self.limits.max_bytes_of(node):  # its unit or run has ended
                part.delete()
                raise HTTPException(410, _UNEXPECTED)
            if received != digest:
                part.delete()
                raise HTTPException(422, "the bytes are not those of the announced digest")
            await _finish(part)
        return JSONResponse({"stored": True})

    async def _stream(
        self, request: Request, auth: Auth, node: str, part: PartialUpload, offset: int, length: int
    ) -> str:
        """Write the request's body to the partial upload from `offset`, and fsync it.

        More may have arrived from the request before, after the agent had asked how much has.

        Returns the digest of the whole file, or "" if its length is wrong or a newer request has
        taken over.
        """
        self.limits.promised_bytes += length
        try:
            # Unbuffered, so that nothing is written after a newer request has taken over.
            with part.path.open("ab" if offset else "wb", buffering=0) as file:
                file.truncate(offset)
                file.seek(offset)
                writer = UploadWriter(file, part.is_current)
                if offset:
                    await asyncio.to_thread(writer.hash_existing, part.path)
                try:
                    async for piece in request.stream():
                        _check_enrolled(auth, node, part)
                        if not part.is_current():
                            return ""
                        failpoint("upload.piece")
                        length -= len(piece)
                        self.limits.promised_bytes -= len(piece)
                        self.bytes_up += len(piece)
                        await writer.write(piece)
                        size = await _receive_in_thread(request, writer, length)
                        length -= size
                        self.limits.promised_bytes -= size
                        self.bytes_up += size
                finally:
                    await writer.flush()
                # The agent forgets an upload once it is acknowledged, so it must be durable.
                await asyncio.to_thread(os.fsync, file.fileno())
            return writer.digest if length == 0 else ""
        finally:
            self.limits.promised_bytes -= length

    @contextmanager
    def _mapping_errors(self, part: PartialUpload) -> Iterator[None]:
        """Turn a full disk into a 507. The upload can be resumed.

        The folder of a run that ends in the meantime is gone: that becomes a 410.
        """
        try:
            yield
        except FileNotFoundError as err:
            if part.path.parent == self.store.uploads.folder:
                raise
            raise HTTPException(410, _UNEXPECTED) from err
        except OSError as err:
            if not disk_space.is_disk_full(err):
                raise
            raise self.limits.no_space() from err


def file_response(request: Request, path: Path, *, ranges: bool = True) -> tuple[Response, int]:
    """A file, or the range of it that is asked for, and the bytes. Raises HTTPException 404."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as err:
        raise HTTPException(404) from err
    if ranges and "range" in request.headers:
        ranged = FileResponse(path, media_type="application/octet-stream")
        return ranged, _range_bytes(request, size)
    return WholeFileResponse(path, size), size


def _check_enrolled(auth: Auth, node: str, part: PartialUpload) -> None:
    """Stop the upload of a peer that was removed after it began."""
    if not auth.is_enrolled(node):
        part.delete()
        raise HTTPException(401)


async def _receive_in_thread(request: Request, writer: UploadWriter, left: int) -> int:
    """Let a thread receive what it can of the `left` bytes; returns how many it has written."""
    connection = connection_of(request.scope)
    if connection is None or not connection.can_offload(left):
        return 0
    await writer.flush()

    def write(piece: memoryview) -> None:
        failpoint("upload.piece")
        writer.write_now(piece)

    return await connection.receive_in_thread(left, write)


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


def _run_of(request: Request) -> str:
    """The run that an upload names; empty if it names none."""
    if request.headers.get(RECEIVER):
        return request.query_params.get("run", "")
    return urllib.parse.unquote(request.headers.get(RUN, "")[:_MAX_RUN_LENGTH])


def _header_int(request: Request, header: str, default: str = "") -> int:
    text = request.headers.get(header, default)
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
