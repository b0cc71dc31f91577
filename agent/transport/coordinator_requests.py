"""An agent's requests to the coordinator's own routes, signed, with JSON answers. Blocking."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from agent.transport.http_client import MAX_RESPONSE_BYTES, Response
from agent.transport.weight_transfer import WeightTransfer, map_parse_errors, raise_for_status
from protocols.enrollment import joining
from protocols.enrollment.joining import EnrollmentStatus, MqttResponse
from protocols.errors import Refused, UnknownName
from protocols.messages import offers
from protocols.messages.comparisons import COMPARISONS_PATH, Comparison
from protocols.messages.envelope import LOGS_PATH, LogResponse, strip_controls
from protocols.messages.version_log import LOG_PATH
from protocols.messages.work import MODEL_PATH, NamedModel, Which
from protocols.p2p import swarm
from protocols.p2p.gossip import MAX_NEIGHBORS_BYTES, NEIGHBORS_PATH, NeighborsResponse
from protocols.p2p.swarm import DownloadPlan, DownloadPlanRequest, DownloadReport

T = TypeVar("T")


class CoordinatorRequests(WeightTransfer):
    """All raise Unreachable, Refused, VersionSkew."""

    def mqtt_address(self) -> MqttResponse:
        """Requests the broker's address and login. The password changes from time to time."""
        return self._request_json(MqttResponse, "GET", joining.MQTT_PATH)

    def enrollment_status(self) -> EnrollmentStatus:
        """Requests this machine's enrollment status. Needs no session."""
        return self._request_json(EnrollmentStatus, "GET", joining.ENROLLMENT_STATUS_PATH)

    def leave(self) -> None:
        """Asks the coordinator to revoke this machine's key. Needs no session."""
        self._request("POST", joining.LEAVE_PATH)

    def send_logs(self, response: LogResponse) -> None:
        """Sends the log lines that an operator requested."""
        self._request("POST", LOGS_PATH, msgspec.json.encode(response))

    def renew(self) -> bytes:
        """Requests a new node certificate for the same keys."""
        return self._request("POST", joining.RENEW_PATH)

    def download_plan(self, digest: str, nbytes: int, request: DownloadPlanRequest) -> DownloadPlan:
        """Requests a download plan: which peers hold which pieces of a version of `nbytes`."""
        path, max_bytes = swarm.PLAN_PATH.format(digest=digest), swarm.max_plan_bytes(nbytes)
        return self._request_json(DownloadPlan, "POST", path, request, max_bytes)

    def announce_version(self, digest: str, report: DownloadReport) -> None:
        """Reports that this agent holds a version, and which peers sent pieces."""
        path = swarm.DOWNLOAD_REPORT_PATH.format(digest=digest)
        self._request("POST", path, msgspec.json.encode(report))

    def neighbors(self, request: DownloadPlanRequest) -> NeighborsResponse:
        """Requests the peers to contact while the coordinator is away; reports our address."""
        return self._request_json(
            NeighborsResponse, "POST", NEIGHBORS_PATH, request, MAX_NEIGHBORS_BYTES
        )

    def log_page(self, start: int) -> bytes:
        """Requests the entries of the log of versions after the first `start`."""
        return self._request("GET", LOG_PATH.format(start=start))

    def task_offers(self) -> bytes:
        """Requests the signed list of the tasks that the operator offers."""
        return self._request("GET", offers.LIST_PATH, max_bytes=offers.MAX_LIST_BYTES)

    def offered_file(self, digest: str) -> bytes:
        """Requests an offered file. Its digest is not verified."""
        path = offers.FILE_PATH.format(digest=digest)
        return self._request("GET", path, max_bytes=offers.MAX_FILE_BYTES)

    def named_model(self, name: str, which: Which) -> NamedModel:
        """Requests what the best or newest version of a run or task is. Needs no session.

        Raises UnknownName if there is none.
        """
        response = self._send("GET", MODEL_PATH.format(name=name, which=which), b"")
        if response.status == 404:
            raise _unknown_model(name, response.body)
        raise_for_status(response.status, response.body)
        with map_parse_errors():
            return msgspec.json.decode(response.body, type=NamedModel)

    def send_comparison(self, told: Comparison) -> None:
        """Tells what an ended run brought to this machine. Needs no session.

        Raises Refused if the coordinator does not take it, or is of a version that cannot.
        """
        response = self._send("POST", COMPARISONS_PATH, msgspec.json.encode(told))
        if response.status in (400, 403, 404, 405, 409, 413, 422):
            raise Refused(f"the coordinator does not take the comparison: {response.status}")
        raise_for_status(response.status, response.body)

    def _request_json(
        self,
        kind: type[T],
        method: str,
        path: str,
        request: DownloadPlanRequest | None = None,
        max_bytes: int = MAX_RESPONSE_BYTES,
    ) -> T:
        body = msgspec.json.encode(request) if request is not None else b""
        with map_parse_errors():
            return msgspec.json.decode(self._request(method, path, body, max_bytes), type=kind)

    def _request(
        self, method: str, path: str, body: bytes = b"", max_bytes: int = MAX_RESPONSE_BYTES
    ) -> bytes:
        response = self._send(method, path, body, max_bytes=max_bytes)
        raise_for_status(response.status, response.body)
        return response.body

    def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str] | None = None,
        max_bytes: int = MAX_RESPONSE_BYTES,
    ) -> Response:
        """Sends a signed request and returns the response, whatever its status."""
        signed = self._signed(method, path, hashlib.sha256(body).hexdigest())
        sent = signed | (headers or {})
        return self._http_client.request(method, path, sent, body, max_bytes=max_bytes)


def _unknown_model(name: str, body: bytes) -> UnknownName:
    """The error that the coordinator told. One of an older version has no such route."""
    try:
        told = msgspec.json.decode(body, type=dict[str, str])
        return UnknownName(
            strip_controls(told["message"][:500]),
            "the operator sees all versions: commonweight models list",
        )
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return UnknownName(
            f"the coordinator cannot look up {name}: its version of commonweight is older",
            "leave out --run: the newest version on this machine is used",
        )
