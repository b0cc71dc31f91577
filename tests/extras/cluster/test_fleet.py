"""A fleet whose ledger is in PostgreSQL: a run goes on after the database was away."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.setup.enrollment import join
from coordinator.admin import backup
from coordinator.api.schema import TicketRequest
from coordinator.remote import access
from coordinator.remote.api_client import Remote
from coordinator.runs.recorded import recorded_run
from coordinator.storage import ledger_place, run_events
from coordinator.storage.job_events import JobSpec
from coordinator.storage.ledger_place import VARIABLE, open_ledger
from coordinator.storage.postgres_ledger import PostgresLedger
from coordinator.storage.run_events import VersionCommitted
from protocols.enrollment import tickets
from protocols.enrollment.certificates import ca_fingerprint
from protocols.errors import (
    CommonweightError,
    HomeError,
    HomeLocked,
    LedgerUnreachable,
    Unreachable,
)
from protocols.messages.states import RunState
from tests.extras.cluster.conftest import FLEET
from tests.support import postgres
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Proxy
from tests.support.in_process_fleet import fleet_of, some_data
from tests.support.waiting import until


async def test_a_run_survives_the_loss_of_its_database(
    tmp_path: Path, server: postgres.Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, address)
    async with fleet_of(tmp_path, *(some_data(20, seed) for seed in range(3))) as fleet:
        # Before the run: the second writer tries for seconds, and 60 rounds take less.
        with pytest.raises(HomeLocked, match="another program writes"):
            await asyncio.to_thread(open_ledger, fleet.home)
        ticket = tickets.new_ticket(fleet.hub.addresses(), ca_fingerprint(fleet.keys.ca_pem))
        fleet.hub.registry.create_ticket(ticket, ttl_s=600, uses=1)
        run = fleet.start(rounds=60, quorum=3)
        await until(lambda: len(fleet.hub.runs.find(run).history) >= 1)
        await asyncio.to_thread(server.crash)
        await until(lambda: fleet.waits_for(run) == "the database of the ledger")
        with pytest.raises(Unreachable, match="does not reach the database of the ledger"):
            await asyncio.to_thread(join_new, tmp_path / "new", ticket)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(join_new, tmp_path / "new", ticket)
        ended = await fleet.finished(run)
        assert not (fleet.home / ledger_place.LEDGER_FILE).exists()
        copy = tmp_path / "copy.backup"
        made = await asyncio.to_thread(backup.write, fleet.home, copy, with_versions=True)
    with contextlib.closing(open_ledger(fleet.home)) as ledger:
        assert recorded_run(ledger, run) == ended
    with contextlib.closing(open_ledger(fleet.home, read_only=True)) as ledger:
        assert ledger.verify() is None
        newest = ledger.newest()
        events = [run_events.decode(entry.body) for entry in ledger.entries(run)]
    rounds = [event.round for event in events if isinstance(event, VersionCommitted)]
    assert rounds == list(range(1, 61)), "each round once"
    assert newest is not None
    assert (made.entries, made.head) == (newest.seq, newest.hash.hex())
    restored = tmp_path / "restored"
    backup.restore(copy, restored)
    with pytest.raises(HomeError, match="two ledgers"):
        open_ledger(restored)
    monkeypatch.delenv(VARIABLE)
    with contextlib.closing(open_ledger(restored)) as ledger:
        assert [run_events.decode(entry.body) for entry in ledger.entries(run)] == events


def test_a_read_that_hangs_is_given_up(server: postgres.Server, address: str) -> None:
    with Proxy(server.port) as proxy:
        ledger = PostgresLedger(address.replace(str(server.port), str(proxy.port)), FLEET)
        ledger.append("run", [b"0"])
        proxy.fault = BLACKHOLE
        told: list[str] = []

        def read() -> None:
            try:
                list(ledger.entries("run"))
            except LedgerUnreachable as err:
                told.append(err.message)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(60)
        assert "does not answer" in told[0]
        proxy.fault = CLEAR
        proxy.reset()
        assert [entry.body for entry in ledger.entries("run")] == [b"0"]
        ledger.close()


async def test_a_database_that_hangs_does_not_stop_the_coordinator(
    tmp_path: Path, server: postgres.Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(server.port) as proxy:
        monkeypatch.setenv(VARIABLE, address.replace(str(server.port), str(proxy.port)))
        async with fleet_of(tmp_path, *(some_data(20, seed) for seed in range(2))) as fleet:
            run = fleet.start(rounds=20, quorum=2)
            await until(lambda: len(fleet.hub.runs.find(run).history) >= 1)
            proxy.fault = BLACKHOLE
            await until(lambda: fleet.waits_for(run) == "the database of the ledger")
            # The loop of this test is that of the coordinator: it runs while the ledger is tried.
            ledger = fleet.hub._ledger
            assert isinstance(ledger, PostgresLedger)
            await until(ledger._lock.locked)
            proxy.fault = CLEAR
            proxy.reset()
            ended = await fleet.finished(run)
    assert len(ended.history) == 20


async def test_a_change_waits_for_a_database_that_hangs_and_others_do_not(
    tmp_path: Path, server: postgres.Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(server.port) as proxy:
        monkeypatch.setenv(VARIABLE, address.replace(str(server.port), str(proxy.port)))
        monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(tmp_path / "laptop"))
        async with fleet_of(tmp_path, some_data(20, 1)) as fleet:
            operator, reader = Remote(fleet.home), Remote(fleet.home)
            order = TicketRequest(ttl_s=600, uses=1)
            made = await asyncio.to_thread(operator.make_ticket, order)
            ticket = tickets.decode(made["ticket"])
            order = replace(order, role="operator")
            made = await asyncio.to_thread(operator.make_ticket, order)
            await asyncio.to_thread(access.join, made["ticket"], "laptop")
            laptop = Remote(tmp_path / "laptop")
            fleet.hub.registry.behind.update(fleet.hub.registry.operators)  # as after a new CA
            trains, may_end = threading.Event(), threading.Event()
            fleet.agents[0].trainer.before = lambda kind, number: hold(kind, trains, may_end)
            first, queued = (fleet.start(rounds=1, quorum=1) for _ in range(2))
            await until(trains.is_set)
            proxy.fault = BLACKHOLE
            for change in (
                partial(operator.make_ticket, order),
                partial(operator.start_job, JobSpec(kind="analyze")),
                partial(join_new, tmp_path / "new", ticket),
                partial(operator.stop_run, queued),
                laptop.peers,
            ):
                changing = asyncio.create_task(asyncio.to_thread(change))
                answers = 0
                while not changing.done():
                    await asyncio.to_thread(reader.fleet)
                    answers += not changing.done()
                with pytest.raises(
                    CommonweightError, match=r"does not (answer|reach the database)"
                ):
                    await changing
                # One could arrive before the change. Without a thread for it, the others wait.
                assert answers > 2
            proxy.fault = CLEAR
            proxy.reset()
            await asyncio.to_thread(join_new, tmp_path / "new", ticket)
            await asyncio.to_thread(laptop.peers)
            assert fleet.hub.registry.behind == set()
            await asyncio.to_thread(operator.stop_run, queued)
            may_end.set()
            assert (await fleet.finished(first)).state is RunState.FINISHED
            assert (await fleet.finished(queued)).state is RunState.STOPPED
            for remote in (operator, reader, laptop):
                remote.close()


def hold(kind: str, trains: threading.Event, may_end: threading.Event) -> None:
    if kind == "train":
        trains.set()
        may_end.wait(60)


def join_new(home: Path, ticket: tickets.Ticket) -> None:
    home.mkdir(exist_ok=True)
    join(home, tickets.encode(ticket), name="new", labels={})
