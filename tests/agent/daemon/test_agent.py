"""How an agent handles commands of the operator and requests of its owner."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.cli import main
from agent.daemon import state_machine, work_thread
from agent.daemon.agent import Agent
from agent.daemon.owner_commands import OwnerCommands
from agent.home import enrollment_file, settings, status_files
from agent.home.settings_schema import RESTART_KEYS, AgentSettings
from agent.home.status_files import OwnerRequest
from agent.setup import enrollment
from agent.trainer import sandbox_rules
from benchmarks.faults.disk import can_mount, fill, small_disk
from protocols.enrollment import tickets
from protocols.enrollment.ca_chain import CaTrust
from protocols.local import homes
from protocols.messages.envelope import Command
from protocols.messages.states import PauseReason
from protocols.messages.work import Work
from protocols.p2p import gossip
from protocols.p2p.swarm import DownloadPlanRequest
from tests.support.https_site import Site
from tests.support.waiting import until

WORK = Work(run="r", since=1.0, round=1, kind="train", task="ping")


def an_agent(site: Site, home: Path, **chosen: Any) -> Agent:
    home.mkdir(exist_ok=True)
    ticket = tickets.encode(site.ticket())
    joined, _ = enrollment.join(home, ticket, name="box", labels={})
    settings.change(home, tasks=["*"], **chosen)
    agent = Agent(home, joined, settings.read(home))
    agent._runner.start()
    return agent


async def test_hooks_connect_earlier_parts_with_later_ones(site: Site, tmp_path: Path) -> None:
    """The owner's limits reach the bandwidth meter, and the status has all values."""
    agent = an_agent(site, tmp_path / "box", up_mbit=8.0)
    assert agent._bandwidth.rates() == (8.0, 0.0)
    agent._sharing._request = DownloadPlanRequest(address="10.0.0.7:4000")
    (spoken,) = agent._gossip.outgoing().entries
    heard = gossip.verify_entry(spoken, CaTrust(site.ca_pem), site.fleet_id, time.time())
    assert heard.entry.address == "10.0.0.7:4000"
    agent._report.write(agent._runner.state)
    status = status_files.read_status(tmp_path / "box")
    assert status is not None
    assert status.shares_at == "10.0.0.7:4000"


async def test_peers_get_no_more_than_the_owner_allows_a_day(site: Site, tmp_path: Path) -> None:
    agent = an_agent(site, tmp_path / "box", up_mb_a_day=2.0, up_mbit=0.001)
    pass_on = agent._sharing.may_pass_on
    assert [pass_on(1_000_000), pass_on(1_000_000), pass_on(1)] == [True, True, False]
    assert agent._bandwidth.today() == (2_000_000, 0)
    settings.change(agent._home, traffic="always")
    agent._policy.reload(OwnerRequest())
    assert pass_on(1)


async def test_the_model_that_a_run_chose_is_in_status_and_log(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="commonweight.agent")
    home, chosen = tmp_path / "box", replace(WORK, choice="trees (AUC 0.91; linear 0.88)")
    agent = an_agent(site, home)

    def shown(*events: state_machine.Event) -> tuple[str, str]:
        for event in events:
            agent._runner.dispatch(event)
        agent._report.write(agent._runner.state)
        status = status_files.read_status(home)
        assert status is not None
        return status.choice_run, status.choice

    begun, later = state_machine.WorkStarted(chosen), state_machine.WorkStarted(WORK)
    known = ("r", "trees (AUC 0.91; linear 0.88)")
    question = state_machine.WorkStarted(Work(run="q", round=1, kind="evaluate", task="tabular"))
    assert shown(begun, state_machine.WorkEnded(), question, state_machine.WorkEnded()) == known
    assert shown(begun, later) == known
    assert caplog.text.count("the model of run r: trees (AUC 0.91; linear 0.88)") == 1
    agent = Agent(home, enrollment_file.read_enrollment(home), settings.read(home))
    agent._runner.start()
    assert shown() == known, "after a restart"
    assert shown(state_machine.WorkStarted(replace(WORK, run="s")))[1] == "", "another run"


async def test_the_timer_of_a_pause_does_not_end_a_later_pause(site: Site, tmp_path: Path) -> None:
    agent = an_agent(site, tmp_path / "box")
    agent._on_command(Command(action="pause", for_s=0.01))
    agent._on_command(Command(action="resume"))
    assert not agent._runner.state.pauses
    agent._on_command(Command(action="pause"))
    await asyncio.sleep(0.05)  # the time of the first one has passed
    assert agent._runner.state.pauses == {PauseReason.OPERATOR: 0.0}
    agent._on_command(Command(action="pause", for_s=0.01))
    await until(lambda: not agent._runner.state.pauses)


async def test_the_timer_of_a_cooldown_does_not_end_a_later_cooldown(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = an_agent(site, tmp_path / "box")
    monkeypatch.setattr(work_thread, "TRAINER_COOLDOWN_S", 0.01)
    agent._work._start_cooldown("died")
    agent._on_command(Command(action="resume"))
    monkeypatch.setattr(work_thread, "TRAINER_COOLDOWN_S", 600.0)
    agent._work._start_cooldown("died")
    await asyncio.sleep(0.05)  # the time of the first one has passed
    assert agent._runner.state.pauses.keys() == {PauseReason.TRAINER}


async def test_the_end_of_the_owners_pause_keeps_the_operators_pause(
    site: Site, tmp_path: Path
) -> None:
    home = tmp_path / "box"
    agent = an_agent(site, home)
    agent._on_command(Command(action="pause"))
    status_files.write_request(home, OwnerRequest(want="pause", until=time.time() + 0.05, at=1.0))
    agent._owner_commands.poll()
    assert set(agent._runner.state.pauses) == {PauseReason.OPERATOR, PauseReason.USER}
    await asyncio.sleep(0.1)
    agent._owner_commands.poll()
    assert agent._runner.state.pauses == {PauseReason.OPERATOR: 0.0}
    # A new request of the owner lifts the operator's pause, too.
    status_files.write_request(home, OwnerRequest(at=2.0))
    agent._owner_commands.poll()
    assert not agent._runner.state.pauses


async def test_a_finish_that_an_earlier_process_did_not_read_ends_no_later_one(
    site: Site, tmp_path: Path
) -> None:
    home = tmp_path / "box"
    agent = an_agent(site, home)
    status_files.write_request(home, OwnerRequest(want="finish", at=1.0))
    serving = asyncio.create_task(agent.serve())
    await until(lambda: (home / "status.json").exists() or serving.done())
    assert not serving.done()
    assert not agent._runner.state.finishing
    agent.stop()
    await serving


async def test_a_finish_request_is_handled_once(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "box"
    agent = an_agent(site, home)
    status_files.write_request(home, OwnerRequest(want="finish", at=1.0))
    agent._owner_commands.poll()
    agent._on_command(Command(action="pause"))
    agent._owner_commands.poll()  # the finished request is not handled again
    assert agent._runner.state.finishing
    assert agent._runner.state.pauses == {PauseReason.OPERATOR: 0.0}


@pytest.mark.skipif(not can_mount(), reason="only root on Linux can mount a small disk")
@pytest.mark.parametrize(
    "wish", [OwnerRequest(want="pause", until=1.0, at=1.0), OwnerRequest(want="finish")]
)
async def test_a_request_that_ends_on_a_full_disk_does_not_end_the_agent(
    site: Site, tmp_path: Path, wish: OwnerRequest
) -> None:
    home = tmp_path / "box"
    home.mkdir()
    with small_disk(home):
        agent = an_agent(site, home)
        status_files.write_request(home, wish)
        ballast = fill(home, 0)
        agent._owner_commands.poll()
        assert status_files.read_request(home) == wish
        ballast.unlink()
        agent._owner_commands.poll()
        assert not agent._runner.state.pauses


async def test_changed_data_and_tasks_are_in_force_after_the_current_work(
    site: Site, tmp_path: Path
) -> None:
    home = tmp_path / "box"
    agent = an_agent(site, home, part=1, parts=2)
    settings.change(home, up_mbit=3.0)
    agent._owner_commands.poll()
    assert not agent._policy.must_restart, "this one is in force at once; flags are no change"
    settings.change(home, data=str(tmp_path))
    agent._runner.dispatch(state_machine.WorkStarted(WORK))
    agent._owner_commands.poll()
    ticking = asyncio.create_task(agent._tick())
    try:
        await until(lambda: agent._policy.must_restart)
        await asyncio.sleep(0.7)  # a tick
        assert not agent.must_restart, "the current work continues"
        agent._runner.dispatch(state_machine.WorkEnded())
        await until(lambda: agent.must_restart)
    finally:
        ticking.cancel()
        agent._work.close()


@pytest.mark.parametrize("changed_in", ["first", "second"])
async def test_a_message_waits_for_the_agent_that_has_the_changed_settings(
    site: Site, tmp_path: Path, changed_in: str
) -> None:
    """An owner changes how a column is read, and a run asks a moment later: for the first time, or
    again with the response to an answer."""
    home = tmp_path / "box"
    agent = an_agent(site, home)
    answered: list[object] = []

    class Work:
        """Has two messages, and notes what is answered."""

        def __init__(self) -> None:
            self.messages = ["second", "first"]

        def pull(self, *, steps_only: bool) -> str | None:
            return self._next() if len(self.messages) == 2 else None

        def _next(self) -> str:
            if self.messages[-1] == changed_in:
                settings.change(home, data_formats={"income": "1.234,5"})
            return self.messages.pop()

        def answer(self, message: str) -> str | None:
            answered.append(message)
            return self._next() if self.messages else None

        def next_poll_s(self, idle_s: float) -> float:
            return 60.0

    agent._runner.dispatch(state_machine.SessionChanged(True))
    work: Any = Work()
    pulling = asyncio.create_task(agent._sessions._pull_and_answer(work))
    ticking = asyncio.create_task(agent._tick())
    try:
        await until(lambda: agent.must_restart)
        before = [] if changed_in == "first" else ["first"]
        assert answered == before, "the coordinator asks the next agent again"
        settings.change(home, data_formats={})
        await until(lambda: answered == ["first", "second"])
    finally:
        pulling.cancel()
        ticking.cancel()
        agent._work.close()


def test_what_the_trainer_reads_at_its_start_changes_by_a_restart(tmp_path: Path) -> None:
    """Such as `data.min_count`: a limit that the owner has set must hold for the next work."""

    class Recorded:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def __getattr__(self, name: str) -> object:
            self.names.add(name)
            return getattr(AgentSettings(), name)

    read: Any = Recorded()
    settings.data_settings(read, tmp_path, tmp_path / "told.db")
    sandbox_rules.make_rules(read, write=(), memory=tmp_path / "told.db", spool=tmp_path)
    assert {"data_min_count", "data_formats", "sandbox"} <= read.names
    columns_come_with_each_work = {"data_columns"}
    assert read.names - RESTART_KEYS == columns_come_with_each_work


async def test_a_restart_request_ends_this_agent_once_and_keeps_the_owners_pause(
    site: Site, tmp_path: Path
) -> None:
    home = tmp_path / "box"
    home.mkdir()
    status_files.write_request(home, OwnerRequest(want="pause", at=1.0, restart_at=5.0))
    agent = an_agent(site, home)
    agent._owner_commands.poll()
    assert not agent.must_restart  # it was asked of an earlier agent
    status_files.write_request(home, OwnerRequest(want="pause", at=1.0, restart_at=6.0))
    agent._owner_commands.poll()
    assert agent.must_restart
    assert PauseReason.USER in agent._runner.state.pauses
    asked: list[str] = []
    later = OwnerCommands(home, agent._runner, agent._policy)
    later.on_restart = lambda: asked.append("again")
    later.poll()
    assert not asked


async def test_an_agent_that_starts_again_waits_for_the_end_of_its_work(
    site: Site, tmp_path: Path
) -> None:
    """Interrupted work may still write its update, into the files of the next agent."""
    agent = an_agent(site, tmp_path / "box")
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait()

    working = asyncio.create_task(agent._sessions._in_thread(work))
    await until(begun.is_set)
    serving = asyncio.create_task(agent.serve())
    try:
        await until(lambda: status_files.read_status(tmp_path / "box") is not None)
        agent._restart()
        await asyncio.wait({serving}, timeout=1.0)
        assert not serving.done()
    finally:
        may_end.set()
        await serving
        await working


async def test_an_agent_that_awaits_approval_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "box"
    home.mkdir()
    monkeypatch.setattr("agent.daemon.session_loop._MIN_RECONNECT_S", 0.01)
    monkeypatch.setattr("agent.daemon.session_loop._MAX_RECONNECT_S", 0.02)
    (tmp_path / "site").mkdir()
    with Site(tmp_path / "site", approve=True, flower=True).up() as careful:
        ticket = tickets.encode(careful.ticket())
        joined, awaiting = enrollment.join(home, ticket, name="box", labels={})
        assert awaiting
        agent = Agent(home, joined, settings.read(home))
        serving = asyncio.create_task(agent.serve())
        lock = homes.lock_home(home, "agent")  # as `up` does

        def last_error() -> str:
            status = status_files.read_status(home)
            return status.last_error if status else ""

        await until(lambda: "waits for the operator's approval" in last_error())
        await asyncio.sleep(0.2)  # some more attempts
        assert "before:" not in main._format_status(home, json=False)
        careful.registry.approve(joined.peer)
        await until(lambda: (status := status_files.read_status(home)) and status.session)
        lines = main._format_status(home, json=False).splitlines()
        assert re.fullmatch(
            r"before: this machine waits .* \(until \w+ \d\d:\d\d; connected since\)", lines[-1]
        )
        agent._report.set_last_error("the work failed")
        agent._report.session_opened()
        agent._report.write(agent._runner.state)
        assert main._format_status(home, json=False).endswith("last error: the work failed\n")
        lock.release()
        agent.stop()
        await serving
    told = [record for record in caplog.records if "approval" in record.getMessage()]
    assert [record.getMessage() for record in told] == [
        "this machine waits for the operator's approval; "
        "on the coordinator: commonweight peers approve box"
    ]
    assert not any("403" in record.getMessage() for record in caplog.records)
