"""Downloads versions and uploads updates by digest; interrupted transfers resume. Blocking."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
from google.protobuf.message import DecodeError

from agent.home.credentials import Credentials
from agent.transport.bandwidth import Bandwidth
from agent.transport.http_client import HttpClient
from protocols.enrollment import signed_requests
from protocols.errors import BadWeights, Refused, Unreachable
from protocols.failpoints import failpoint
from protocols.local.atomic_files import write_all
from protocols.model.weights import file_digest
from protocols.network.error_text import describe_error

_TIMEOUT_S = 30.0
#: A heartbeat should reuse the last connection, as a TLS handshake costs more than the request. The
#: coordinator keeps idle connections for 75 s.
IDLE_CONNECTION_S = 60.0
_PIECE_BYTES = 1 << 20
VERSION_PATH = "/cw/v1/weights/{digest}"
UPDATE_PATH = "/cw/v1/updates/{digest}"


class SessionLost(Refused):
    """The coordinator does not know this session. Open a new one."""

    code = "session_lost"


class CoordinatorDiskFull(Unreachable):
    """The coordinator's disk is full. It accepts the bytes once there is space."""

    code = "no_room"


class WeightTransfer:
    """Downloads versions and uploads updates. `bandwidth` counts and limits them.

    Every method raises Unreachable without an answer, and SessionLost if the coordinator does not
    know this machine.
    """

    def __init__(self, credentials: Credentials, bandwidth: Bandwidth | None = None) -> None:
        self._credentials, self._bandwidth = credentials, bandwidth
        self._http_client = HttpClient(
            credentials.address,
            ssl.create_default_context(cadata=credentials.ca_pem.decode()),
            timeout_s=_TIMEOUT_S,
            max_idle_s=IDLE_CONNECTION_S,
        )
        self._interrupted = ""
        #: A small version that arrived with the last work.
        self._inline_version = b""
        self.bytes_up = self.bytes_down = 0

    def download(self, digest: str, nbytes: int, target: Path, at: str = VERSION_PATH) -> None:
        """Downloads a version, or the file at the path `at`, and resumes an interrupted attempt.

        Raises BadWeights if the bytes do not match `digest`.
        """
        part = target.with_suffix(".part")
        brought, self._inline_version = self._inline_version, b""
        if brought and hashlib.sha256(brought).hexdigest() == digest:
            self.bytes_down += len(brought)
            part.write_bytes(brought)
            failpoint("agent.download.piece")
            part.replace(target)
            return
        have = part.stat().st_size if part.exists() else 0
        if have < nbytes:
            have, found = self._download_rest(at.format(digest=digest), nbytes, part, have)
        else:  # interrupted after the last byte: nothing is left to request
            found = file_digest(part)
        if have < nbytes:
            raise Unreachable(f"the version arrived incomplete: {have} of {nbytes} bytes")
        if found != digest:
            part.unlink()
            raise BadWeights("the version's bytes do not match its digest")
        part.replace(target)

    def download_patch(self, digest: str, nbytes: int, target: Path) -> None:
        """Downloads the patch to a version. The caller verifies the result."""
        have, _ = self._download_rest(f"/cw/v1/patches/{digest}", nbytes, target, 0)
        if have != nbytes:
            raise BadWeights(f"the patch does not have the announced size of {nbytes} bytes")

    def stream(self, digest: str, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes `start` to `stop` of a version as they arrive."""
        path = f"/cw/v1/weights/{digest}"
        headers = self._signed("GET", path) | {"range": f"bytes={start}-{stop - 1}"}
        buffer = memoryview(bytearray(_PIECE_BYTES))
        left = stop - start
        with self._http_client.stream("GET", path, headers) as answer:
            raise_for_status(answer.status)
            while left > 0 and (got := answer.read_into(buffer[: min(left, len(buffer))])):
                self.bytes_down += got
                if self._bandwidth is not None:
                    self._bandwidth.received(got)
                left -= got
                yield bytes(buffer[:got])

    def _download_rest(self, path: str, nbytes: int, part: Path, have: int) -> tuple[int, str]:
        """Appends the missing bytes to `part`; returns its size and digest.

        Reads at most one piece beyond `nbytes`.
        """
        sha = hashlib.sha256()
        if have:
            for piece in _read_pieces(part):
                sha.update(piece)
        headers = self._signed("GET", path) | ({"range": f"bytes={have}-"} if have else {})
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with self._http_client.stream("GET", path, headers) as answer:
            raise_for_status(answer.status)
            if have and answer.status != 206:
                have, sha = 0, hashlib.sha256()
            # Not synced: the digest is verified before use, also after a power cut.
            with part.open("ab" if have else "wb", buffering=0) as file:
                while have <= nbytes and (got := answer.read_into(buffer)):
                    have += got
                    self.bytes_down += got
                    if self._bandwidth is not None:
                        self._bandwidth.received(got)
                    if have > nbytes:
                        break
                    sha.update(buffer[:got])
                    write_all(file, buffer[:got])
                    failpoint("agent.download.piece")
        return have, sha.hexdigest()

    def upload(self, digest: str, source: Path, at: str = UPDATE_PATH) -> None:
        """Uploads a file; sends nothing if the coordinator has it already.

        Raises Refused if the coordinator rejects it.
        """
        path = at.format(digest=digest)
        size = source.stat().st_size
        # After an interruption, an offset at the end sends nothing and asks for the received size.
        offset = size if digest == self._interrupted else 0
        self._interrupted = digest
        for _ in range(3):
            headers = self._signed("PUT", path, digest)
            headers["content-length"] = str(size - offset)
            headers["x-cw-offset"] = str(offset)
            with map_errors():
                answer = self._http_client.request(
                    "PUT", path, headers, self._metered(source, offset)
                )
                if answer.status == 409:
                    offset = min(int(msgspec.json.decode(answer.body)["have"]), size)
                elif answer.status == 422 and offset:
                    offset = 0  # the received bytes were not the start of this file
                else:
                    raise_for_status(answer.status)
                    self.bytes_up += size - offset
                    self._interrupted = ""
                    return
        raise Unreachable("the upload could not be resumed")

    def _metered(self, path: Path, offset: int) -> Iterator[bytes]:
        for piece in _read_pieces(path, offset):
            if self._bandwidth is not None:
                self._bandwidth.sent(len(piece))
            yield piece

    def _signed(
        self, method: str, path: str, body_sha256: str = signed_requests.EMPTY_SHA256
    ) -> dict[str, str]:
        return self._credentials.sign_request(method, path, body_sha256)


#: Raised when parsing a response that a coordinator of this version never sends.
_PARSE_ERRORS = (msgspec.DecodeError, DecodeError, ValueError, LookupError, TypeError)


class map_errors:
    """Maps errors of the transport and of parsing responses to ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, _: object
    ) -> None:
        if isinstance(err, httpx.HTTPStatusError):
            raise _error_for(err.response.status_code) from err
        if isinstance(err, _PARSE_ERRORS):
            raise Unreachable(f"cannot parse the coordinator's response: {err}") from err
        if isinstance(err, httpx.HTTPError):
            raise Unreachable(f"the coordinator does not answer: {describe_error(err)}") from err


def raise_for_status(status: int) -> None:
    """Raises the error for an HTTP status; none below 300."""
    if status >= 300:
        raise _error_for(status)


def _error_for(status: int) -> Unreachable | Refused:
    if status in (401, 403, 404, 412):
        return SessionLost(f"the coordinator answered {status}")
    if status == 507:
        return CoordinatorDiskFull("the coordinator's disk is full")
    if status in (413, 422):  # a retry would get the same answer
        return Refused(f"the coordinator rejects it (HTTP {status})")
    return Unreachable(f"the coordinator answered {status}")


def _read_pieces(path: Path, offset: int = 0) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece
            failpoint("agent.upload.piece")
