"""Downloads versions and uploads updates by digest; interrupted transfers resume. Blocking."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from google.protobuf.message import DecodeError

from agent.home.credentials import Credentials
from agent.transport.bandwidth import Bandwidth
from agent.transport.connection import map_errors
from agent.transport.download_replicas import MIN_SPEEDUP, DownloadReplica, DownloadReplicas
from agent.transport.http_client import HttpClient
from protocols.errors import BadWeights, Refused, Unreachable, UploadRefused, UploadUnneeded
from protocols.local.atomic_files import write_all
from protocols.local.disk_space import file_bytes
from protocols.local.failpoints import failpoint
from protocols.messages.envelope import strip_controls
from protocols.messages.work import DOWNLOAD_PATH
from protocols.model.weights import file_digest

_TIMEOUT_S = 30.0
#: A heartbeat should reuse the last connection, as a TLS handshake costs more than the request. The
#: coordinator keeps idle connections for 75 s.
IDLE_CONNECTION_S = 60.0
_PIECE_BYTES = 1 << 20
#: After a start, the agent first asks how much of a larger update has arrived. The request takes a
#: moment, and the bytes may take an hour.
_ASK_FIRST_BYTES = 1 << 20
#: How much of a refusal's body is shown.
_MAX_REASON_BYTES = 200
VERSION_PATH = "/cw/v1/weights/{digest}"
UPDATE_PATH = "/cw/v1/updates/{digest}"


class SessionLost(Refused, code="session_lost"):
    """The coordinator does not know this session. Open a new one."""


class CoordinatorDiskFull(Unreachable, code="no_room"):
    """The coordinator's disk is full. It accepts the bytes once there is space."""


class WeightTransfer:
    """Downloads versions and uploads updates. `bandwidth` counts and limits them.

    Every method raises Unreachable without an answer, and SessionLost if the coordinator does not
    know this machine.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        self._credentials, self._bandwidth = credentials, bandwidth
        self._signed = credentials.sign_request
        tls = ssl.create_default_context(cadata=credentials.ca_pem.decode())
        self._http_client = HttpClient(
            (credentials.address, *credentials.others),
            tls,
            timeout_s=_TIMEOUT_S,
            max_idle_s=IDLE_CONNECTION_S,
        )
        #: They send large versions in place of the coordinator.
        self.replicas = DownloadReplicas(credentials.peer, tls)
        #: The digest of the last upload. It is not sent again where its response was lost.
        self._last_upload = ""
        self._has_asked = False
        #: The run of the last work, to which updates belong.
        self._run = ""
        #: A small version that arrived with the last work.
        self._inline_version = b""
        self.bytes_up = self.bytes_down = 0

    def name_receiver(self, fleet: str) -> None:
        """Names the fleet in requests from now on, as its coordinator reads that."""
        self._credentials = self._credentials._replace(fleet=fleet)
        self._signed = self._credentials.sign_request

    def download(self, digest: str, nbytes: int, target: Path, at: str = VERSION_PATH) -> None:
        """Downloads a version, or the file at the path `at`, and resumes an interrupted attempt.

        Raises BadWeights if the bytes do not match `digest`.
        """
        part = target.with_suffix(".part")
        inline, self._inline_version = self._inline_version, b""
        if inline and hashlib.sha256(inline).hexdigest() == digest:
            self.bytes_down += len(inline)
            part.write_bytes(inline)
            failpoint("agent.download.piece")
            part.replace(target)
            return
        path = at.format(digest=digest)
        if at == VERSION_PATH and self._download_from_replicas(digest, nbytes, part):
            part.replace(target)
            return
        for had in (file_bytes(part), 0):
            size, actual = self._download_rest(path, nbytes, part, had)
            if size < nbytes:
                raise Unreachable(f"the version arrived incomplete: {size} of {nbytes} bytes")
            if actual == digest:
                part.replace(target)
                return
            part.unlink()
            if not had:  # else they may be those of a replica
                break
        raise BadWeights("the version's bytes do not match its digest")

    def _download_from_replicas(self, digest: str, nbytes: int, part: Path) -> bool:
        """True once `part` is the version. If not, the coordinator sends what is missing."""
        path = DOWNLOAD_PATH.format(digest=digest)
        while (replica := self.replicas.choose(nbytes)) is not None:
            had = file_bytes(part)
            try:
                size, actual = self._download_rest(path, nbytes, part, had, replica.client)
                if size < nbytes:  # such as that of a replica that stops
                    raise Unreachable(f"the version arrived incomplete: {size} of {nbytes} bytes")
            except (Unreachable, Refused) as err:
                replica.fail(err)
                continue
            if actual == digest:
                return True
            part.unlink()
            if not had:  # else the wrong bytes may be those of another replica
                replica.fail(BadWeights("the bytes are not those of the digest"))
        return False

    def download_patch(self, digest: str, nbytes: int, target: Path) -> None:
        """Downloads the patch to a version. The caller verifies the result."""
        size, _ = self._download_rest(f"/cw/v1/patches/{digest}", nbytes, target, 0)
        if size != nbytes:
            raise BadWeights(f"the patch does not have the announced size of {nbytes} bytes")

    def stream(
        self, digest: str, start: int, stop: int, replica: DownloadReplica | None = None
    ) -> Iterator[bytes]:
        """Yields the bytes `start` to `stop` of a version as they arrive, unverified."""
        at, client = (DOWNLOAD_PATH, replica.client) if replica else (VERSION_PATH, None)
        wanted = f"{start}-{stop - 1}"
        with self._get(at.format(digest=digest), wanted, stop - start, client) as response:
            yield from map(bytes, self._read(response, stop - start))

    def _download_rest(
        self, path: str, nbytes: int, part: Path, size: int, client: HttpClient | None = None
    ) -> tuple[int, str]:
        """Appends the missing bytes to `part`; returns its size and digest.

        Reads at most one byte beyond `nbytes`.
        """
        if size >= nbytes:  # interrupted after the last byte: nothing is left to request
            return size, file_digest(part)
        sha = hashlib.sha256()
        if size:
            with part.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256")
        with self._get(path, f"{size}-" if size else "", nbytes, client) as response:
            if response.status != 206:  # the whole file comes
                size, sha = 0, hashlib.sha256()
            # Not synced: the digest is verified before use, also after a power cut.
            with part.open("ab" if size else "wb", buffering=0) as file:
                for piece in self._read(response, nbytes + 1 - size):
                    size += len(piece)
                    if size > nbytes:
                        break
                    sha.update(piece)
                    write_all(file, piece)
                    failpoint("agent.download.piece")
        return size, sha.hexdigest()

    @contextmanager
    def _get(
        self, path: str, byte_range: str, nbytes: int, client: HttpClient | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        headers = self._signed("GET", path)
        if byte_range:
            headers["range"] = f"bytes={byte_range}"
        if client is None:
            client = self._http_client
        else:
            nbytes //= MIN_SPEEDUP  # a slow replica is given up sooner
        with client.stream("GET", path, headers, nbytes=nbytes) as response:
            raise_for_status(response.status)
            yield response

    def _read(self, response: http.client.HTTPResponse, limit: int) -> Iterator[memoryview]:
        """Yields the body as it arrives, at most `limit` bytes. The next piece overwrites one."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while limit > 0:
            with map_errors():
                size = response.readinto(buffer[: min(limit, len(buffer))])
            if not size:
                return
            self.bytes_down += size
            if self._bandwidth is not None:
                self._bandwidth.received(size)
            limit -= size
            yield buffer[:size]

    def upload(self, digest: str, source: Path, at: str = UPDATE_PATH) -> None:
        """Uploads a file; sends nothing that the coordinator has already.

        A line that is cut is used again at once, as long as bytes arrive each time. Raises
        UploadRefused, UploadUnneeded or Refused if the coordinator does not take the file.
        """
        path, unsigned = at.format(digest=digest), {}
        if at == UPDATE_PATH:
            run = urllib.parse.quote(self._run, safe="")
            if self._credentials.fleet:
                path += f"?run={run}"
            else:  # an older coordinator reads it in a header, which the signature does not cover
                unsigned["x-cw-run"] = run
        size = source.stat().st_size
        # An offset at the end sends nothing and asks for the received size.
        is_first = size > _ASK_FIRST_BYTES and not self._has_asked
        offset, began = size if is_first or digest == self._last_upload else 0, 0
        self._has_asked |= is_first
        self._last_upload, cut, tries = digest, None, 3
        while tries:
            headers = self._signed("PUT", path, digest) | unsigned
            headers["content-length"] = str(size - offset)
            headers["x-cw-offset"] = str(offset)
            try:
                status, body = self._http_client.request(
                    "PUT", path, headers, self._pieces(source, offset)
                )
            except Unreachable as err:
                if cut is not None or offset == size:
                    raise
                cut, began, offset = err, offset, size
                continue
            tries -= 1
            if status == 409:
                with map_parse_errors():
                    offset = min(int(msgspec.json.decode(body)["have"]), size)
                if cut is not None and offset <= began:
                    raise cut
                cut, tries = None, 3 if cut is not None else tries
            elif status == 422 and offset:
                offset = 0  # the received bytes were not the start of this file
            else:
                raise_for_upload(status, body)
                return
        raise Unreachable("the upload could not be resumed")

    def _pieces(self, source: Path, offset: int) -> Iterator[bytes]:
        with source.open("rb") as file:
            file.seek(offset)
            while piece := file.read(_PIECE_BYTES):
                if self._bandwidth is not None:
                    self._bandwidth.sent(len(piece))
                self.bytes_up += len(piece)
                yield piece
                failpoint("agent.upload.piece")


@contextmanager
def map_parse_errors() -> Iterator[None]:
    """Maps errors of parsing a response, which no coordinator of this version causes."""
    try:
        yield
    except (msgspec.DecodeError, DecodeError, ValueError, LookupError, TypeError) as err:
        raise Unreachable(f"cannot parse the coordinator's response: {err}") from err


def raise_for_status(status: int, body: bytes = b"") -> None:
    """Raises the error for an HTTP status; none below 300. The body may say the reason."""
    if status < 300:
        return
    if status in (401, 403, 404, 412):
        reason = _reason(body)
        raise SessionLost(f"the coordinator answered {status}" + (f": {reason}" if reason else ""))
    if status == 507:
        raise CoordinatorDiskFull("the coordinator's disk is full")
    raise Unreachable(f"the coordinator answered {status}")


def raise_for_upload(status: int, body: bytes) -> None:
    """Raises the error for the response to an upload or a reply; its body says the reason."""
    if status < 300:
        return
    because = _reason(body) or f"HTTP {status}"
    if status == 410:
        raise UploadUnneeded(f"the upload is not needed any more: {because}")
    if status == 413:  # a retry would get the same answer
        raise UploadRefused(
            f"the coordinator refuses the upload: {because}",
            "check that agent and coordinator have the same version, then start a new run",
        )
    if status == 422:  # the file may be damaged, and new work makes another one
        raise Refused(f"the coordinator refuses the upload: {because}")
    raise_for_status(status, body)


def _reason(body: bytes) -> str:
    return strip_controls(body[:_MAX_REASON_BYTES].decode(errors="replace"))
