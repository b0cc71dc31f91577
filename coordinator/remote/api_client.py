"""The client of the coordinator's HTTPS API.

Requests are signed with the operator's key in the coordinator's home, or with the key of a joined
access.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from coordinator.api.schema import (
    EvaluationsResponse,
    JobShares,
    Made,
    OperatorRow,
    PeerRow,
    Rows,
    StartRunRequest,
    TicketRequest,
    TicketRow,
    WatchResponse,
)
from coordinator.fleet import state
from coordinator.fleet.state import Fleet
from coordinator.jobs.messages import JobShare
from coordinator.jobs.state import Job
from coordinator.remote import access
from coordinator.runs.deletion import Deletion
from coordinator.runs.state import Run
from coordinator.storage.job_events import JobSpec
from protocols.enrollment import signed_requests
from protocols.errors import BadMessage, Unreachable
from protocols.local import bounded_http
from protocols.local.join_client import is_other_ca
from protocols.messages import offers
from protocols.messages.decoding import MALFORMED
from protocols.messages.envelope import Command, JobChanged, LogLine
from protocols.messages.offers import Offer, OfferRequest, WithdrawRequest
from protocols.network.error_text import describe_error
from protocols.p2p.gossip import NEIGHBORS_PATH, NeighborsResponse

T = TypeVar("T")

#: Of a response. The state of a fleet of thousands of peers has some megabytes.
MAX_RESPONSE_BYTES = 64 * 1024 * 1024


class _OtherCa(Unreachable):
    """A server has a certificate of a CA that is not trusted here."""


class Remote:
    """A client of the coordinator whose home this is, or to which the home gives access.

    Every method raises Unreachable, Refused, UsageError, or BadMessage (from another version). The
    constructor raises NotRunning if no coordinator runs here.
    """

    #: True if nothing changes until a coordinator is started.
    is_stopped = False

    def __init__(self, home: Path, timeout_s: float = 15.0) -> None:
        self.home, self._timeout_s = home, timeout_s
        self._connect()
        self.role = self._connection.access.role
        self.address = self._connection.access.addresses[0]

    def _connect(self) -> None:
        self._connection = access.connection_info(self.home)
        context = ssl.create_default_context(cadata=self._connection.access.ca_pem)
        self._http = httpx.Client(verify=context, timeout=self._timeout_s)

    def close(self) -> None:
        self._http.close()

    def fleet(self) -> Fleet:
        return state.decode(self._request("GET", "/cw/v1/fleet"))

    def neighbours(self) -> NeighborsResponse:
        """The peers to ask while the coordinator is away, and an access token for them."""
        return self._get(NEIGHBORS_PATH, NeighborsResponse)

    def watch(self) -> WatchResponse:
        """How to follow the fleet over MQTT, as the fleet's CA signed it."""
        watch = self._get("/cw/v1/watch", WatchResponse)
        return access.check_watch(self._connection.access, self.address, watch)

    def start_run(self, order: StartRunRequest) -> str:
        return self._post("/cw/v1/runs", order)["run"]

    def runs(self) -> list[Run]:
        return self._rows("/cw/v1/runs", Run)

    def run(self, name: str) -> Run:
        """A run by its id, the beginning of it, or its task ("./pets.py:Pets", or "Pets")."""
        return self._get(f"/cw/v1/runs/{Path(name).name or '-'}", Run)

    def evaluations(self, run_id: str) -> EvaluationsResponse:
        """The last evaluation of each peer; the coordinator writes into its audit who read it."""
        return self._get(f"/cw/v1/runs/{run_id}/evaluations", EvaluationsResponse)

    def download_version(self, run_id: str, digest: str, target: Path) -> None:
        """Write a version of a run to this file. The caller verifies its digest.

        Raises DiskFull too, and OSError.
        """
        self._request("GET", f"/cw/v1/runs/{run_id}/versions/{digest}", into=target)

    def mark_exported(self, run_id: str, digest: str) -> None:
        """Let the audit say that a version of a run is exported."""
        self._request("POST", f"/cw/v1/runs/{run_id}/exported/{digest}")

    def stop_run(self, run_id: str) -> None:
        self._request("POST", f"/cw/v1/runs/{run_id}/stop")

    def resume_run(self, run_id: str) -> None:
        self._request("POST", f"/cw/v1/runs/{run_id}/resume")

    def deletion(self, run_id: str) -> Deletion:
        """What `delete_run` would delete."""
        return self._get(f"/cw/v1/runs/{run_id}/deletion", Deletion)

    def delete_run(self, run_id: str) -> Deletion:
        """Delete an ended run; return what was deleted."""
        return _decoded(self._request("POST", f"/cw/v1/runs/{run_id}/delete"), Deletion)

    def start_job(self, spec: JobSpec) -> str:
        return self._post("/cw/v1/jobs", spec)["job"]

    def jobs(self) -> list[Job]:
        return self._rows("/cw/v1/jobs", Job)

    def job(self, job_id: str) -> Job:
        return self._get(f"/cw/v1/jobs/{job_id}", Job)

    def job_status(self, job_id: str) -> JobChanged:
        return self._get(f"/cw/v1/jobs/{job_id}/stands", JobChanged)

    def job_shares(self, job_id: str) -> dict[str, JobShare]:
        """What each peer does in a job; the coordinator writes into its audit who read it."""
        return self._get(f"/cw/v1/jobs/{job_id}/shares", JobShares)

    def stop_job(self, job_id: str) -> None:
        self._request("POST", f"/cw/v1/jobs/{job_id}/stop")

    def mark_job_taken(self, job_id: str) -> None:
        """Let the coordinator delete the rows and answers of a job."""
        self._request("POST", f"/cw/v1/jobs/{job_id}/taken")

    def resume_job(self, job_id: str) -> None:
        self._request("POST", f"/cw/v1/jobs/{job_id}/resume")

    def make_ticket(self, order: TicketRequest) -> dict[str, str]:
        return self._post("/cw/v1/tickets", order)

    def tickets(self) -> list[dict[str, Any]]:
        return _as_dicts(self._rows("/cw/v1/tickets", TicketRow))

    def revoke_ticket(self, ticket_id: str) -> None:
        self._request("POST", f"/cw/v1/tickets/{ticket_id}/revoke")

    def peers(self) -> list[dict[str, Any]]:
        return _as_dicts(self._rows("/cw/v1/peers", PeerRow))

    def peer_names(self) -> dict[str, str]:
        """The name of each peer, by its id."""
        return {peer["peer"]: peer["name"] for peer in self.peers()}

    def approve(self, peer: str) -> None:
        self._request("POST", f"/cw/v1/peers/{peer}/approve")

    def remove(self, peer: str) -> None:
        self._request("POST", f"/cw/v1/peers/{peer}/remove")

    def command(self, peer: str, command: Command) -> str:
        return str(self._post(f"/cw/v1/peers/{peer}/command", command)["outcome"])

    def logs(self, peer: str) -> list[LogLine]:
        return self._rows(f"/cw/v1/peers/{peer}/logs", LogLine)

    def offers(self) -> list[Offer]:
        """The tasks that are offered to the owners."""
        return self._rows(offers.TASKS_PATH, Offer)

    def offer_task(self, request: OfferRequest) -> Offer:
        """Offer a task file to the owners."""
        body = msgspec.json.encode(request)
        return _decoded(self._request("POST", offers.TASKS_PATH, body), Offer)

    def withdraw_task(self, name: str) -> None:
        body = msgspec.json.encode(WithdrawRequest(name=name))
        self._request("POST", offers.WITHDRAW_PATH, body)

    def operators(self) -> list[dict[str, Any]]:
        return _as_dicts(self._rows("/cw/v1/operators", OperatorRow))

    def remove_operator(self, operator: str) -> None:
        self._request("POST", f"/cw/v1/operators/{operator}/remove")

    def _get(self, path: str, kind: type[T]) -> T:
        return _decoded(self._request("GET", path), kind)

    def _rows(self, path: str, kind: type[T]) -> list[T]:
        return _decoded(self._request("GET", path), Rows[kind])  # type: ignore[valid-type]

    def _post(self, path: str, body: Any) -> dict[str, str]:
        return _decoded(self._request("POST", path, msgspec.json.encode(body)), Made)

    def _request(
        self, method: str, path: str, body: bytes = b"", *, into: Path | None = None
    ) -> bytes:
        """The response of the first address that gives one. Later requests start with it.

        If the fleet has a new CA, the request is sent again with it.
        """
        try:
            return self._send(method, path, body, into)
        except _OtherCa:
            if not access.follow_ca(self.home):
                raise
        self.close()
        self._connect()
        return self._send(method, path, body, into)

    def _send(self, method: str, path: str, body: bytes, into: Path | None) -> bytes:
        tried: list[str] = []
        is_other = False
        digest = hashlib.sha256(body).hexdigest()
        for address in dict.fromkeys((self.address, *self._connection.access.addresses)):
            sender, sign = self._connection.access.operator, self._connection.key.sign
            headers = signed_requests.sign_headers(
                sender, sign, method, path, digest, self._connection.receiver
            )
            url = f"https://{address}{quote(path, safe='/:')}"
            try:
                answer = bounded_http.request(
                    self._http,
                    method,
                    url,
                    max_bytes=MAX_RESPONSE_BYTES,
                    content=body,
                    headers=headers,
                    into=into,
                )
            except httpx.ConnectError as err:
                is_other = is_other or is_other_ca(err)
                tried.append(f"{address}: {describe_error(err)}")
                continue
            except httpx.HTTPError as err:  # the request may have arrived: do not repeat it
                tried.append(f"{address}: {describe_error(err)}")
                break
            self.address = address
            if answer.is_success:
                return answer.content
            raise access.error_from(answer)
        message = f"the coordinator does not answer: {'; '.join(tried)}"
        if is_other:
            raise _OtherCa(message, "ask the operator who answers at this address")
        raise Unreachable(message, "is it running? commonweight up")


def _as_dicts(rows: Iterable[msgspec.Struct]) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(row) for row in rows]


def _decoded(answer: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except MALFORMED as err:
        raise BadMessage(
            f"the coordinator's response cannot be decoded: {err}",
            "it may have another version: commonweight doctor",
        ) from err
