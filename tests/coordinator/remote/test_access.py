"""Access from another machine: a ticket with a role, what the role allows and forbids."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from agent.transport.coordinator_client import CoordinatorClient
from coordinator.api.log_requests import LogRequests
from coordinator.api.routes import endpoint
from coordinator.api.schema import StartRunRequest, TicketRequest
from coordinator.cli.main import app
from coordinator.remote import access
from coordinator.remote.access import Access
from coordinator.remote.api_client import Remote
from coordinator.storage.job_events import JobSpec
from coordinator.storage.run_events import RunSpec
from protocols.enrollment import certificates, tickets
from protocols.errors import (
    BadMessage,
    CommonweightError,
    ExitCode,
    Refused,
    UnknownName,
    Unreachable,
)
from protocols.messages.envelope import Command, LogLine, LogRequest, LogResponse
from tests.support.https_site import Machine, Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    with Site(folder, approve=True).up() as running:
        yield running


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(tmp_path / "watch"))
    return tmp_path / "watch"


def joined(site: Site, role: str) -> tuple[Access, Remote]:
    ticket = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(ticket, ttl_s=60, uses=1, role=role)  # type: ignore[arg-type]
    found = access.join(tickets.encode(ticket), "laptop")
    return found, Remote(access.open_home())


def test_an_observer_can_read_and_change_nothing(site: Site) -> None:
    machine = Machine("north")
    site.registry.join(machine.joining(site.ticket()))
    found, remote = joined(site, "observer")
    assert (found.role, remote.role) == ("observer", "observer")
    assert remote.fleet().fleet == site.fleet_id
    assert [peer["name"] for peer in remote.peers()] == ["north"]
    tries = (
        lambda: remote.approve(machine.peer),
        lambda: remote.remove(machine.peer),
        lambda: remote.make_ticket(TicketRequest()),
        lambda: remote.revoke_ticket("x"),
        lambda: remote.command(machine.peer, Command(action="pause")),
        lambda: remote.start_run(StartRunRequest(spec=RunSpec(task="ping", rounds=1))),
        lambda: remote.stop_run("x"),
        lambda: remote.resume_run("x"),
        lambda: remote.start_job(JobSpec(kind="private")),
        lambda: remote.stop_job("x"),
        lambda: remote.resume_job("x"),
        lambda: remote.remove_operator("laptop"),
    )
    for forbidden in tries:
        with pytest.raises(CommonweightError, match="may only watch"):
            forbidden()
    assert site.registry.peers[machine.peer].standing == "awaiting"
    assert len(site.registry.tickets) == 2


def test_a_remote_operator_can_make_changes_until_removed(site: Site) -> None:
    machine = Machine("north")
    site.registry.join(machine.joining(site.ticket()))
    found, remote = joined(site, "operator")
    remote.approve(machine.peer)
    assert site.registry.peers[machine.peer].standing == "enrolled"
    assert [one["role"] for one in remote.operators()] == ["operator"]
    remote.remove_operator(found.operator)
    with pytest.raises(Refused):
        remote.fleet()
    with pytest.raises(UnknownName):
        site.registry.remove_operator(found.operator)


def test_a_refusal_has_the_exit_status_of_the_local_error(site: Site) -> None:
    site.registry.join(Machine("north").joining(site.ticket()))
    _, remote = joined(site, "operator")

    async def unsent(peer: str, question: LogRequest) -> bool:
        return False  # there is no broker

    site.log_requests = LogRequests(unsent)
    with pytest.raises(CommonweightError, match="broker is down") as away:
        remote.logs("north")
    assert (away.value.code, away.value.exit_code) == ("unreachable", ExitCode.UNREACHABLE)
    with pytest.raises(CommonweightError) as unknown:
        remote.approve("south")
    assert (unknown.value.code, unknown.value.exit_code) == ("unknown_name", ExitCode.USAGE)


def test_a_response_of_another_version_is_a_clear_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote = joined(site, "operator")
    monkeypatch.setattr(endpoint, "json_response", lambda _: JSONResponse("new"))
    ticket = partial(remote.make_ticket, TicketRequest())
    for ask in (remote.watch, remote.peers, remote.tickets, remote.operators, ticket):
        with pytest.raises(BadMessage, match="cannot be decoded") as told:
            ask()
        assert "another version" in told.value.hint


def test_each_ticket_works_once_and_only_for_its_role(site: Site) -> None:
    agents = site.ticket()
    with pytest.raises(CommonweightError, match="is for an agent, not"):
        access.join(tickets.encode(agents))
    watch = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(watch, ttl_s=60, uses=1, role="observer")
    with pytest.raises(Refused, match="for an observer"):
        site.registry.join(Machine("north").joining(watch))
    access.join(tickets.encode(watch))
    with pytest.raises(CommonweightError, match="was used already"):
        access.join(tickets.encode(watch))


def test_a_machine_with_a_reserved_name_joins_under_another(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "coordinator")
    watch = tickets.new_ticket(site.addresses(), certificates.ca_fingerprint(site.ca_pem))
    site.registry.create_ticket(watch, ttl_s=60, uses=1, role="observer")
    file = tmp_path / "ticket"
    file.write_text(tickets.encode(watch))
    command = ["monitor", "--once", "--join", f"file:{file}"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, Refused)
    assert "--name" in refused.exception.hint
    done = CliRunner().invoke(app, [*command, "--name", "watcher"])
    assert "joined fleet" in done.output
    assert [found.name for found in site.registry.operators.values()] == ["watcher"]


def test_nothing_is_sent_to_another_coordinator(site: Site) -> None:
    ticket = tickets.new_ticket(site.addresses(), bytes(32))
    with pytest.raises(Refused, match="not the coordinator that made this ticket"):
        access.join(tickets.encode(ticket))
    assert ("POST", "/cw/v1/operators/join") not in site.requests


def test_another_coordinator_at_the_first_address_does_not_prevent_joining(
    site: Site, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    with Site(tmp_path / "other").up() as other:
        both = (other.address, site.address)
        ticket = tickets.new_ticket(both, certificates.ca_fingerprint(site.ca_pem))
        site.registry.create_ticket(ticket, ttl_s=60, uses=1, role="observer")
        assert access.join(tickets.encode(ticket)).addresses[0] == site.address
    assert ("POST", "/cw/v1/operators/join") not in other.requests


def test_access_outlives_a_restart_of_the_registry(site: Site) -> None:
    from coordinator.fleet.registry import Registry

    found, _ = joined(site, "observer")
    again = Registry(site.ledger)
    assert again.operators[found.operator].role == "observer"
    assert again.operators == site.registry.operators


# --- logs ---


def test_log_lines_come_back_from_the_agent_that_was_asked(site: Site) -> None:
    asked: list[tuple[str, LogRequest]] = []

    async def send(peer: str, question: LogRequest) -> bool:
        asked.append((peer, question))
        line = LogLine(at=1.0, level="info", text="connected")
        told = LogResponse(request_id=question.request_id, lines=[line])
        # As the agents do it: over HTTPS, while the operator's request waits.
        for machine in (stranger, north):
            link = CoordinatorClient(site.credentials(machine))
            threading.Thread(target=_tell, args=(link, told)).start()
        return True

    site.log_requests = LogRequests(send)
    site.registry._approve = False
    north, stranger = site.enroll("north"), site.enroll("stranger")
    _, remote = joined(site, "operator")
    assert remote.logs(north.peer) == [LogLine(at=1.0, level="info", text="connected")]
    assert [peer for peer, _ in asked] == [north.peer]


def _tell(link: CoordinatorClient, told: LogResponse) -> None:
    try:
        link.send_logs(told)
    except CommonweightError:
        pass  # a stranger's answer is refused
    finally:
        link.close()


async def test_the_wait_for_a_silent_agent_is_bounded() -> None:
    async def send(peer: str, question: LogRequest) -> bool:
        return peer == "deaf"

    desk = LogRequests(send)
    with pytest.raises(Unreachable, match="did not answer"):
        await desk.request("deaf", within_s=0.05)
    with pytest.raises(Unreachable, match="broker is down"):
        await desk.request("other")
    assert not desk.receive("deaf", LogResponse(request_id="x", lines=[]))
    waiting = asyncio.create_task(desk.request("deaf", within_s=5))
    await asyncio.sleep(0)  # it begins to wait
    (ask,) = desk._pending
    assert not desk.receive("liar", LogResponse(request_id=ask, lines=[]))
    assert desk.receive("deaf", msgspec.structs.replace(LogResponse(request_id=ask, lines=[])))
    assert await waiting == []
