"""Versions on the machine of an operator: downloaded once, checked, and in the audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from coordinator.admin import audit
from coordinator.fleet.members import Role
from coordinator.remote import access, version_files
from coordinator.remote.api_client import Remote
from coordinator.runs.state import Run
from coordinator.storage import ledger_place
from protocols.enrollment import certificates, tickets
from protocols.errors import BadWeights, Refused, UnknownName
from protocols.local import homes
from protocols.model.weights import file_digest
from tests.support.in_process_fleet import Fleet, fleet_and_laptop


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    async with fleet_and_laptop(tmp_path, monkeypatch) as made:
        yield made


async def joined(fleet: Fleet, role: Role) -> Remote:
    """A client with an access of its own, as on another machine."""
    ca = certificates.ca_fingerprint(fleet.keys.ca_pem)
    ticket = tickets.new_ticket(fleet.hub.addresses(), ca)
    fleet.hub.registry.create_ticket(ticket, ttl_s=60, uses=1, role=role)
    await asyncio.to_thread(access.join, tickets.encode(ticket), f"the-{role}")
    return Remote(homes.open_home("operator"))


async def trained(fleet: Fleet, rounds: int = 2) -> Run:
    return await fleet.finished(fleet.start(rounds=rounds, quorum=2, keep_versions=rounds))


async def test_an_operator_gets_a_version_on_another_machine(fleet: Fleet, tmp_path: Path) -> None:
    run, remote = await trained(fleet), await joined(fleet, "operator")
    found = await asyncio.to_thread(version_files.find, remote, run.id, run.head)
    assert found.parent == tmp_path / "laptop" / "versions"
    assert file_digest(found) == run.head
    fleet.hub.weight_store.version_path(run.head).unlink()  # it is not asked for again
    assert await asyncio.to_thread(version_files.find, remote, run.id, run.head) == found
    with ledger_place.reading(fleet.home) as ledger:
        read = [line.text for line in audit.read_audit(ledger) if line.event == "answers read"]
    assert any("the-operator" in line and run.head in line for line in read), read


async def test_only_few_versions_stay(fleet: Fleet, tmp_path: Path) -> None:
    run, remote = await trained(fleet, 3), await joined(fleet, "operator")
    kept = [closed.digest for closed in run.history]
    assert len(kept) > version_files.MAX_VERSIONS
    for digest in kept:
        await asyncio.to_thread(version_files.find, remote, run.id, digest)
    files = {path.stem for path in (tmp_path / "laptop" / "versions").iterdir()}
    assert files == set(kept[-version_files.MAX_VERSIONS :])


async def test_a_damaged_or_deleted_version_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    run, remote = await trained(fleet), await joined(fleet, "operator")
    with pytest.raises(UnknownName, match="no version"):
        await asyncio.to_thread(version_files.find, remote, run.id, "0" * 64)
    path = fleet.hub.weight_store.version_path(run.head)
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(BadWeights, match="other bytes"):
        await asyncio.to_thread(version_files.find, remote, run.id, run.head)
    path.unlink()
    with pytest.raises(UnknownName, match="no longer on disk"):
        await asyncio.to_thread(version_files.find, remote, run.id, run.head)
    assert not list((tmp_path / "laptop" / "versions").iterdir())


async def test_a_model_is_exported_on_another_machine(fleet: Fleet, tmp_path: Path) -> None:
    run, remote = await trained(fleet), await joined(fleet, "operator")
    out = tmp_path / "model.safetensors"
    version = await asyncio.to_thread(version_files.export_version, remote, run, "latest", out)
    assert version == run.head
    assert set(load_file(out)) == {"w", "b"}
    with pytest.raises(Exception, match="exists already"):
        await asyncio.to_thread(version_files.export_version, remote, run, "latest", out)


@pytest.mark.attack("20.8")
async def test_an_observer_reads_no_version_from_the_coordinator(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Attack: an observer asks the coordinator for the version of a run."""
    run, remote = await trained(fleet), await joined(fleet, "observer")
    with pytest.raises(Refused, match="may only watch"):
        await asyncio.to_thread(version_files.find, remote, run.id, run.head)
    assert not list((tmp_path / "laptop" / "versions").iterdir())
