"""Broken, hanging and slow connections, a missing broker, and a stopped peer."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults import checker
from benchmarks.faults.results import Row
from benchmarks.faults.site import NO_BROKER, Site, site
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Fault, Proxy
from tests.support.fleet_harness import descendants
from tests.support.waiting import wait_for

SEED = 1
#: More than any case needs; the cases end their runs.
ENDLESS = 100_000
#: Without a broker a lost peer is noticed by its heartbeat; then it has to reconnect.
NOTICED_WITHIN_S = 45.0
WILL_WITHIN_S = 10.0
HEALED_WITHIN_S = 60.0
#: Up (the agent's bytes are lost), down, and both.
ONE_WAY = {"up": Fault(hold_up=True), "down": Fault(hold_down=True)}


def contributors(fleet: Site, run: str) -> list[list[str]]:
    """The contributors of each closed round."""
    return [fact["contributors"] for fact in fleet.facts(run, "TrainingClosed")]


@contextmanager
def endless(fleet: Site, names: Sequence[str], *, quorum: int, deadline_s: float) -> Iterator[str]:
    """A run with all these peers, which is stopped at the end of the block."""
    run = fleet.order(
        task="ping",
        settings={"kilobytes": 4},
        deadline_s=deadline_s,
        seed=SEED,
        rounds=ENDLESS,
        quorum=quorum,
    )
    peers = {fleet.peer(name) for name in names}
    wait_for(lambda: any(peers <= set(who) for who in contributors(fleet, run)), "all take part")
    yield run
    assert fleet.ask("run", "stop", run).returncode == 0
    fleet.outcome(run)


def until_part(fleet: Site, run: str, name: str, after: int) -> float:
    """Seconds until this peer contributes to a round after the `after`th."""
    began, peer = time.monotonic(), fleet.peer(name)
    wait_for(
        lambda: any(peer in who for who in contributors(fleet, run)[after + 1 :]),
        f"{name} takes part again",
        within_s=HEALED_WITHIN_S,
        every_s=0.2,
    )
    return time.monotonic() - began


def cut_links(folder: Path, lasts_s: float) -> list[Row]:
    """A peer's connection is a blackhole, then one-way, for some time; the others continue."""
    full = Row("6 full partition", "heal s")
    one_way = Row("7 one-way, 8 half-open TCP", "s until the run goes on without it")
    with site(folder) as fleet:
        fleet.options = NO_BROKER
        fleet.rise()
        fleet.join("ada", "bob")
        with Proxy(fleet.port) as proxy:
            fleet.redirect("ada", proxy.port)
            fleet.start("ada", "bob")
            cases = {"full": BLACKHOLE, **ONE_WAY}
            for name, fault in cases.items():
                noticed_s, healed_s, found = _cut(fleet, proxy, fault, lasts_s)
                row = full if name == "full" else one_way
                row.add(
                    f"{name} for {lasts_s:.0f} s, noticed after {noticed_s:.1f} s, healed",
                    SEED,
                    found,
                    healed_s if name == "full" else noticed_s,
                )
    full.figure, one_way.figure = f"{full.worst:.1f} s", f"{one_way.worst:.1f} s"
    return [full, one_way]


def _cut(fleet: Site, proxy: Proxy, fault: Fault, lasts_s: float) -> tuple[float, float, list[str]]:
    with endless(fleet, ("ada", "bob"), quorum=1, deadline_s=2.0) as run:
        peer = fleet.peer("ada")
        proxy.fault, began = fault, time.monotonic()
        before = len(contributors(fleet, run))
        wait_for(
            lambda: any(peer not in who for who in contributors(fleet, run)[before:]),
            "the run continues without it",
            NOTICED_WITHIN_S,
        )
        noticed_s = time.monotonic() - began
        wait_for(lambda: time.monotonic() > began + lasts_s, "the cut has lasted", lasts_s + 5)
        meanwhile = len(contributors(fleet, run)) - before
        proxy.fault = CLEAR
        healed_s = until_part(fleet, run, "ada", len(contributors(fleet, run)))
    found = fleet.violations(("ada", "bob"))
    if meanwhile < 2:
        found.append(f"{meanwhile} rounds in {lasts_s:.0f} s of a cut")
    return noticed_s, healed_s, found


def lost_peer(folder: Path) -> list[Row]:
    """An agent dies while the run waits for it: its will or a missing heartbeat reports that."""
    rows = []
    ways = {"will": ((), WILL_WITHIN_S), "heartbeat, no broker": (NO_BROKER, NOTICED_WITHIN_S)}
    for word, (options, within_s) in ways.items():
        row = Row(f"13 agent killed, noticed by its {word}", "s until the run knows")
        (folder / word).mkdir()
        with site(folder / word) as fleet:
            fleet.options = options or fleet.options
            fleet.rise()
            fleet.enlist("ada", "bob")
            with endless(fleet, ("ada", "bob"), quorum=1, deadline_s=600.0) as run:
                agent = fleet.programs["ada"].process.pid
                os.kill(agent, signal.SIGSTOP)  # while it has work
                before = len(contributors(fleet, run))
                time.sleep(0.5)  # until the round waits for it
                fleet.programs["ada"].kill()
                began = time.monotonic()
                wait_for(lambda: fleet.facts(run, "PeerLost"), "it is known to be lost", within_s)
                took = time.monotonic() - began
                _until_rounds(fleet, run, before + 2)
            row.add(f"known after {took:.1f} s", SEED, fleet.violations(("ada", "bob")), took)
        row.figure = f"{row.worst:.1f} s"
        rows.append(row)
    return rows


def _until_rounds(fleet: Site, run: str, count: int) -> None:
    wait_for(lambda: len(contributors(fleet, run)) >= count, "the run continues")


def slow_and_flapping(folder: Path, lasts_s: float) -> list[Row]:
    """A slow line, and one with many resets: the weights must be the same as on a good line."""
    slow = Row("9 latency, loss, 1 Mbit/s", "times as long")
    flapping = Row("10 flapping link", "connections a minute")
    torn = Row("4 connection cut at byte k of an upload", "bytes sent again at most")
    with site(folder) as fleet:
        fleet.options = NO_BROKER
        fleet.rise()
        fleet.join("ada", "bob")
        with Proxy(fleet.port, seed=SEED) as proxy:
            for name in ("ada", "bob"):
                fleet.redirect(name, proxy.port)
            fleet.start("ada", "bob")
            _train(fleet)  # not while the trainers start
            undisturbed, good_s, nbytes = _measured(fleet, proxy)
            proxy.fault = Fault(delay_s=0.05, jitter_s=0.04, bytes_per_s=125_000, drop=0.002)
            found, took_s, _ = _measured(fleet, proxy)
            proxy.fault = CLEAR
            slow.add(
                "50 ± 40 ms, 1 Mbit/s, resets",
                SEED,
                _same(fleet, found, undisturbed),
                took_s / good_s,
            )
            for cut in (1, 700, 5_000, 200_000, 700_000):
                proxy.fault = Fault(cut_after=cut)
                before, sent = proxy.connections, proxy.bytes_up
                run = _ordered(fleet)
                _until_cut(proxy, before + 4)
                proxy.fault = CLEAR
                found = checker.digests(fleet.outcome(run))
                torn.add(
                    f"cut at byte {cut}",
                    SEED,
                    _same(fleet, found, undisturbed),
                    max(0, proxy.bytes_up - sent - nbytes),
                )
            before, ends = proxy.connections, time.monotonic() + lasts_s
            while time.monotonic() < ends:
                run = _ordered(fleet)
                while not fleet.ended(run) and time.monotonic() < ends:
                    proxy.reset()
                    time.sleep(0.7)  # the interval of the resets
                found = checker.digests(fleet.outcome(run))
                rate = (proxy.connections - before) * 60 / lasts_s
                flapping.add("reset every 0.7 s", SEED, _same(fleet, found, undisturbed), rate)
    slow.figure = f"{slow.worst:.1f}"
    flapping.figure, torn.figure = f"{flapping.worst:.0f}", f"{torn.worst:,.0f}"
    return [slow, flapping, torn]


def _until_cut(proxy: Proxy, connections: int) -> None:
    wait_for(lambda: proxy.connections >= connections, "some connections were cut")


def _ordered(fleet: Site) -> str:
    return fleet.order(seed=SEED, rounds=2, quorum=2, deadline_s=20.0)


def _train(fleet: Site) -> list[str]:
    return checker.digests(fleet.outcome(_ordered(fleet)))


def _measured(fleet: Site, proxy: Proxy) -> tuple[list[str], float, int]:
    """Versions, seconds and bytes up of one run."""
    began, before = time.monotonic(), proxy.bytes_up
    return _train(fleet), time.monotonic() - began, proxy.bytes_up - before


def _same(fleet: Site, found: list[str], undisturbed: list[str]) -> list[str]:
    wrong = fleet.violations(("ada", "bob"))
    return [*wrong, "other weights than without the fault"] if found != undisturbed else wrong


def no_broker(folder: Path) -> Row:
    """A run without a broker has the same weights as one with a broker."""
    row = Row("11 broker down for a whole run", "rounds affected")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist("ada", "bob")
        undisturbed = _train(fleet)
        fleet.programs["up"].stop()
        fleet.options = NO_BROKER
        fleet.rise()
        found = _train(fleet)
        affected = sum(a != b for a, b in zip(found, undisturbed, strict=True))
        row.add("no broker", SEED, _same(fleet, found, undisturbed), affected)
    row.figure = f"{row.worst:.0f}"
    return row


def stopped_peer(folder: Path, deadline_s: float) -> Row:
    """SIGSTOP of one of four peers for two deadlines; rounds continue, and it returns."""
    row = Row("one of four peers SIGSTOPped for two deadlines", "s until it takes part again")
    names = ("ada", "bob", "cyd", "dan")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*names)
        with endless(fleet, names, quorum=3, deadline_s=deadline_s) as run:
            agent = fleet.programs["ada"].process.pid
            family = [agent, *(child.pid for child in descendants(agent))]
            for pid in family:
                os.kill(pid, signal.SIGSTOP)
            before = len(contributors(fleet, run))
            time.sleep(2 * deadline_s)  # the duration of the fault
            for pid in family:
                os.kill(pid, signal.SIGCONT)
            back_s = until_part(fleet, run, "ada", len(contributors(fleet, run)))
            # One deadline may pass in the evaluation and one in the training that follows.
            closed, peer = contributors(fleet, run)[before:], fleet.peer("ada")
            rounds = sum(peer not in who for who in closed)
        found = fleet.violations(names)
        if rounds < 1:
            found.append("no round was closed without it")
        row.add(f"{2 * deadline_s:g} s, {rounds} rounds without it", SEED, found, back_s)
    row.figure = f"{row.worst:.1f} s"
    return row


def late_update(folder: Path) -> Row:
    """A peer is stopped over the end of its round; its update counts once, in a later round."""
    row = Row("24 stale update, folded by policy", "versions behind")
    names = ("ada", "bob", "cyd")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*names)
        run = fleet.order(
            seed=SEED,
            rounds=20,
            quorum=2,
            deadline_s=2.0,
            late="fold",
            settings={"epochs": 2, "max_steps": 150},
        )
        agent = fleet.programs["ada"].process.pid
        folded: list[checker.Fact] = []
        while not folded and not fleet.ended(run):
            opened = len(fleet.facts(run, "RoundOpened"))
            _until_opened(fleet, run, opened + 1)
            family = [agent, *(child.pid for child in descendants(agent))]
            for pid in family:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4)  # after the deadline, and before its will
            for pid in family:
                os.kill(pid, signal.SIGCONT)
            _until_opened(fleet, run, len(fleet.facts(run, "RoundOpened")) + 2)
            accepted = fleet.facts(run, "UpdateAccepted")
            folded = [fact for fact in accepted if fact["update"].get("staleness")]
        ended = checker.ended(fleet.outcome(run))
        found = fleet.violations(names)
        if not folded or ended != "finished":
            found.append(f"{run} {ended}, {len(folded)} late updates folded")
        behind = max((fact["update"]["staleness"] for fact in folded), default=0)
        row.add(f"{len(folded)} folded", SEED, found, behind)
    row.figure = f"{row.worst:.0f}"
    return row


def _until_opened(fleet: Site, run: str, count: int) -> None:
    """Wait until this many rounds have been opened, or the run has ended."""
    wait_for(
        lambda: len(fleet.facts(run, "RoundOpened")) >= count or fleet.ended(run),
        f"round {count} is open",
    )


def twins(folder: Path) -> Row:
    """Two agents with one identity take over each other's session; nothing is counted twice."""
    row = Row("22 two agents, one identity", "double counts")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist("ada", "bob")
        undisturbed = _train(fleet)
        home, twin = fleet.folder / "ada", fleet.folder / "twin"
        shutil.copytree(home, twin, ignore=shutil.ignore_patterns("*.lock", "status.json"))
        fleet.background_agent("twin")
        for number in range(3):
            found = _train(fleet)
            wrong = _same(fleet, found, undisturbed)
            row.add(f"run {number}", SEED, wrong, sum("more than once" in text for text in wrong))
    row.figure = f"{row.worst:.0f}"
    return row
