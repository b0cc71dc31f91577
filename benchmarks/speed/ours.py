"""commonweight with its public commands: a coordinator and agents, with TLS and signatures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.cases import Case
from benchmarks.speed.figures import Figures
from benchmarks.speed.processes import family, peak_rss
from benchmarks.speed.relay import Relay
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

#: The process on the server's machine that has the model.
SERVER = ("coordinator",)
_RUN_WITHIN_S = 1_800.0


def run(case: Case, folder: Path, *, counted: bool = False) -> Figures:
    """A pass of `case`. `counted`: through a relay that counts, so its times mean nothing."""
    with started(case.agents, folder, relayed=counted) as (site, relay):
        start = relay.counted() if relay else (0, 0)
        ping(site, case, 1, seed=1)  # starts the trainers, with other versions
        spent, first = cpu(site), relay.counted() if relay else (0, 0)
        history = ping(site, case, case.rounds + 1)["history"]
        used = {kind: seconds - spent.get(kind, 0.0) for kind, seconds in cpu(site).items()}
        measured = history[1:]
        up = sum(closed["bytes_up"] for closed in measured) // case.rounds
        down = sum(closed["bytes_down"] for closed in measured) // case.rounds
        if relay:  # the longer run minus the run of one round
            now = relay.counted()
            up, down = ((now[i] - 2 * first[i] + start[i]) // case.rounds for i in (0, 1))
        return Figures(
            seconds=[closed["seconds"] for closed in measured],
            cpu_s_per_round={kind: seconds / len(history) for kind, seconds in used.items()},
            peak_rss_bytes=peaks(site),
            resting_rss_bytes={},
            bytes_up=up,
            bytes_down=down,
        )


def idle(folder: Path, agents: int, seconds: float) -> dict[str, float]:
    """Memory, and CPU in percent of a core, of a fleet that is idle after work."""
    settings = {"COMMONWEIGHT_AGENT_IDLE_TIMEOUT_S": "2"}
    with started(agents, folder, False, **settings) as (site, _):
        ping(site, Case("idle", agents, 10_240, 2, 0), 3)
        wait_for(lambda: not _members(site)["trainer"], "the trainers have ended")
        before, began = cpu(site), time.monotonic()
        time.sleep(seconds)  # this measures the idle time
        lasted = time.monotonic() - began
        spent = {kind: used - before[kind] for kind, used in cpu(site).items()}
        found: dict[str, float] = {}
        for kind, members in _members(site).items():
            if members:
                found[f"{kind}_rss_bytes"] = max(member.memory_info().rss for member in members)
                found[f"{kind}_cpu_percent"] = 100 * spent[kind] / lasted / len(members)
        return found


def ping(
    site: Fleet, case: Case, rounds: int, seed: int = 0, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the task `ping` to its end with all agents; return the JSON output of the run."""
    program = site.background(
        f"run-{time.monotonic_ns()}",
        *("run", "start", "ping", "--set", f"kilobytes={case.kilobytes}"),
        *("--rounds", str(rounds), "--quorum", str(case.agents), "--seed", str(seed)),
        *(*options, "--follow", "--json"),
    )
    code = program.wait(_RUN_WITHIN_S)
    assert code == 0, program.log
    told: dict[str, Any] = json.loads(program.log.splitlines()[-1])["data"]
    assert told["state"] == "finished", told["ended_because"]
    assert all(len(closed["contributors"]) == case.agents for closed in told["history"])
    return told


@contextmanager
def started(
    agents: int, folder: Path, relayed: bool = False, **settings: str
) -> Iterator[tuple[Fleet, Relay | None]]:
    names = [f"agent{number}" for number in range(agents)]
    with fleet(folder, **settings) as site:
        site.up()
        site.join(*names)
        relay = _send_through_relay(site, names) if relayed else None
        site.start(*names)
        try:
            yield site, relay
        finally:
            if relay:
                relay.close()


def _send_through_relay(site: Fleet, names: list[str]) -> Relay:
    up = json.loads((site.home / "up.json").read_bytes())
    relay = Relay(int(up["address"].rpartition(":")[2]))
    for name in names:
        file = site.folder / name / "enrolled.json"
        enrolled = json.loads(file.read_bytes())
        enrolled["addresses"] = [f"127.0.0.1:{relay.port}"]
        file.write_text(json.dumps(enrolled))
    return relay


def _members(site: Fleet) -> dict[str, list[psutil.Process]]:
    """The fleet's processes by kind; the broker is a child of the coordinator."""
    found: dict[str, list[psutil.Process]] = {
        kind: [] for kind in ("coordinator", "broker", "agent", "trainer")
    }
    for name, program in site.programs.items():
        if program.process.poll() is not None or name.startswith("run-"):
            continue
        root, child = ("coordinator", "broker") if name == "up" else ("agent", "trainer")
        for process in family([program.process.pid]):
            with contextlib.suppress(psutil.NoSuchProcess):  # a trainer that has just ended
                if "resource_tracker" not in " ".join(process.cmdline()):
                    found[root if process.pid == program.process.pid else child].append(process)
    return found


def cpu(site: Fleet) -> dict[str, float]:
    """CPU seconds so far by kind. An ended trainer counts for its agent."""
    found = dict.fromkeys(("coordinator", "broker", "agent", "trainer"), 0.0)
    for kind, members in _members(site).items():
        for process in members:
            times = process.cpu_times()
            found[kind] += times.user + times.system
    return found


def peaks(site: Fleet) -> dict[str, int]:
    return {
        kind: max(map(peak_rss, members)) for kind, members in _members(site).items() if members
    }
