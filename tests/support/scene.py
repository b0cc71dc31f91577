"""Fleets in the middle of a run for tests of the monitor, and a Source that replays them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC
from typing import Any, TypeVar

from msgspec.structs import replace
from textual import _wait, screen
from textual.app import App
from textual.pilot import Pilot

from coordinator.api.schema import EvaluationsResponse, StartRunRequest, TicketRequest
from coordinator.fleet.reducer import reduce
from coordinator.fleet.state import Fleet, Run, decode, encode
from coordinator.jobs.messages import JobShare
from coordinator.monitor.tui import base_app
from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.config import Config
from coordinator.runs.state import Evaluation
from protocols.errors import Refused, Unreachable
from protocols.messages.envelope import (
    Body,
    Command,
    Envelope,
    EventLine,
    JobChanged,
    Links,
    LogLine,
    Notice,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Telemetry,
)
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR

T = TypeVar("T")

#: A short drawing interval, so that the screen settles soon.
base_app.DRAW_INTERVAL_S = 0.01
# After each key a pilot waits twice until the process has been idle for 20 ms, in which Textual
# draws once. Here both take a quarter of that.
_wait.SLEEP_GRANULARITY, _wait.SLEEP_IDLE = 0.005, 0.0004
screen.UPDATE_PERIOD = 0.004  # type: ignore[misc]

NOW = 1_790_000_000.0
NAMES = ("north", "south-attic", "east", "lab-workstation-7", "west", "garden")
KEYS = {name: bytes([index]) * 32 for index, name in enumerate(NAMES, 1)}
IDS = {
    name: f"{name[:4].upper():A<4}-Q2WW-UHQW-W6B{letter}"
    for name, letter in zip(NAMES, "ABCDEF", strict=True)
}


#: How the peers evaluated the model.
EVALUATIONS = {
    IDS[name]: Evaluation(
        11 - number // 3,
        400 + 10 * number,
        {"loss": 0.47 + 0.1 * number, "accuracy": 0.91 - 0.1 * number, "ece": 0.02 * number},
    )
    for number, name in enumerate(NAMES[:4])
}


#: What the peers do in every job.
SHARES = {
    IDS["north"]: JobShare(units=9, leased=1, rows=20_480, nbytes=230_000, rows_per_s=512.0),
    IDS["east"]: JobShare(units=5, leased=2, rows=11_264, nbytes=122_000, rows_per_s=300.0),
    IDS["south-attic"]: JobShare(leased=1),
    IDS["west"]: JobShare(excused="its owner does not allow predictions for rows of others"),
}


class Said:
    """Counts the messages of every sender."""

    def __init__(self) -> None:
        self._seqs: dict[str, int] = {}

    def __call__(self, sender: str, body: Body, *, at: float = NOW, epoch: str = "e1") -> Envelope:
        self._seqs[sender] = self._seqs.get(sender, 0) + 1
        return Envelope(sender=sender, epoch=epoch, seq=self._seqs[sender], at=at, body=body)


def known(name: str, **labels: str) -> PeerChanged:
    standing = "awaiting" if name == "garden" else "enrolled"
    return PeerChanged(
        peer=IDS[name], name=name, labels=labels, enrollment=standing, public_key=KEYS[name]
    )


def telemetry(step: int, loss: float | None, *, diverged: bool = False, sent: int = 0) -> Telemetry:
    return Telemetry(
        run="motion-7",
        round=12,
        phase="train",
        step=step,
        steps=40,
        loss=loss,
        diverged=diverged,
        samples_per_s=812.4,
        bytes_up=sent,
        bytes_down=3 * sent,
        cpu_percent=87,
        memory_bytes=412_000_000,
        battery_percent=64 if sent > 5_000_000 else None,
    )


def _round(number: int) -> RoundClosed:
    return RoundClosed(
        run="motion-7",
        round=number,
        digest=f"{number:064x}",
        seconds=1.9 + number % 3,
        peers=4 + number % 2,
        refused=int(number == 7),
        loss=None if number == 9 else 2.3 / (1 + 0.35 * number) + 0.05 * (number % 3),
        accuracy=None if number == 9 else 0.94 - 0.8 / (1 + number),
        diverged=number == 9,
        bytes_up=3_200_000 + 40_000 * number,
        bytes_down=4_100_000,
        norms={IDS[name]: 1.0 + n for n, name in enumerate(NAMES[: 4 + number % 2])},
    )


def story() -> list[tuple[float, Envelope]]:
    """Six peers in different states in round 12 of 50: (arrival time, envelope)."""
    say = Said()
    told: list[tuple[float, str, Body]] = []

    def tell(ago: float, sender: str, body: Body) -> None:
        told.append((NOW - ago, sender, body))

    tell(900, COORDINATOR, Links(mqtt=True, flower=True))
    for name in NAMES:
        tell(900, COORDINATOR, known(name, site="home" if name != "east" else "office"))
    run = RunChanged(
        run="motion-7", task="watch-motion", state=RunState.TRAINING, round=1, rounds=50, quorum=3
    )
    tell(800, COORDINATOR, run)
    tell(799, COORDINATOR, EventLine(level="info", text="run motion-7 started", subject="motion-7"))
    for number in range(1, 12):
        tell(700 - 40 * number, COORDINATOR, _round(number))
    late = RunChanged(
        run="motion-7",
        task="watch-motion",
        state=RunState.TRAINING,
        round=12,
        rounds=50,
        quorum=3,
        asked=4,
        answered=2,
        waiting_for="2 of 4 peers: north, east",
        best_round=11,
    )
    tell(20, COORDINATOR, late)

    for ago, job in zip((880, 879, 878, 2), _jobs(), strict=True):
        tell(ago, COORDINATOR, job)

    def is_(ago: float, name: str, state: PeerState, reason: str = "") -> None:
        body = Presence(
            state=state, reason=reason, version="0.1.0", run="motion-7", round=12, name=name
        )
        tell(ago, IDS[name], body)

    is_(60, "west", PeerState.IDLE)
    text = "the update of round 7 was refused: norm 41 is over the cap of 10"
    tell(420, IDS["west"], Notice(level="warning", text=text))
    for step in range(1, 25):
        tell(30 - step, IDS["north"], telemetry(step, 1.9 / step + 0.2, sent=180_000 * step))
    is_(4, "north", PeerState.TRAINING)
    tell(9, IDS["south-attic"], telemetry(40, 0.3121, sent=9_100_000))
    is_(2, "south-attic", PeerState.SENDING)
    for step, loss in enumerate((0.9, 1.4, 4.2, 77.0), 1):
        tell(12 - step, IDS["east"], telemetry(step, loss, sent=640_000))
    tell(5, IDS["east"], telemetry(6, None, diverged=True, sent=640_000))
    is_(3, "east", PeerState.TRAINING)
    is_(40, "lab-workstation-7", PeerState.PAUSED, "battery")
    will = Presence(state=PeerState.OFFLINE, name="west", will=True)
    tell(47, IDS["west"], will)
    happened = "round 11 closed: loss 0.574, 5 peers"
    tell(25, COORDINATOR, EventLine(level="info", text=happened, subject="motion-7"))
    worse = "east: its loss is not finite; [its] update will not be summed"
    tell(5, COORDINATOR, EventLine(level="error", text=worse, subject=IDS["east"]))
    told.sort(key=lambda heard: heard[0])
    return [(at, say(sender, body, at=at)) for at, sender, body in told]


def _jobs() -> list[JobChanged]:
    """A running job, and three jobs that have ended."""
    asked = {"kind": "private", "task": "watch-motion", "total": 5}
    return [
        JobChanged(
            job="private-91c0e2",
            state="finished",
            done=4,
            units=4,
            rows=12_431,
            rows_per_s=1_034.0,
            bytes_up=2_130,
            ended_because="4 of 5 peers answered",
            num_excused=1,
            excused={IDS["west"]: "its owner forbids the task 'watch-motion'"},
            began_at=NOW - 3_700,
            ended_at=NOW - 3_688,
            **asked,  # type: ignore[arg-type]
        ),
        JobChanged(
            job="analyze-0b77d1",
            kind="analyze",
            state="failed",
            done=0,
            total=5,
            ended_because="no peer has a table with a column age",
            began_at=NOW - 2_000,
            ended_at=NOW - 1_999,
        ),
        JobChanged(
            job="scatter-5ad3f0",
            kind="scatter",
            task="watch-motion",
            state="stopped",
            done=8_192,
            total=50_000,
            units=3,
            rows=8_192,
            rows_per_s=640.0,
            bytes_up=91_000,
            bytes_down=1_300_000,
            ended_because="stopped by the operator",
            began_at=NOW - 900,
            ended_at=NOW - 887,
        ),
        JobChanged(
            job="scatter-c41e88",
            kind="scatter",
            task="watch-motion",
            state="working",
            done=31_744,
            total=50_000,
            peers=3,
            leased=6_144,
            units=14,
            rows=31_744,
            rows_per_s=812.0,
            bytes_up=352_000,
            bytes_down=6_100_000,
            dropped=1,
            began_at=NOW - 41,
        ),
    ]


def busy_fleet() -> Fleet:
    fleet = empty_fleet()
    for heard_at, envelope in story():
        reduce(fleet, envelope, heard_at)
    fleet.gap = False
    return fleet


def rich_fleet() -> Fleet:
    """The busy fleet with all fields of newer coordinators and agents."""
    fleet = busy_fleet()
    run = fleet.runs["motion-7"]
    for number, closed in enumerate(run.rounds):
        loss, accuracy = closed.loss or 1.0, closed.accuracy or 0.5
        spread = {
            "loss": (0.8 * loss, loss, 1.3 * loss),
            "accuracy": (0.9 * accuracy, accuracy, min(1.05 * accuracy, 1.0)),
        }
        spent = {"work": 1.1, "wait": 0.4, "aggregate": 0.1, "evaluate": 0.3}
        metrics = {"worst_accuracy": 0.8 * accuracy, "margin": 0.2 + number % 3}
        worst = {"accuracy": IDS["east"], "loss": IDS["south-attic"]}
        told = replace(closed, spread=spread, spent=spent, metrics=metrics, worst=worst)
        run.rounds[number] = told
    for name in NAMES:
        fleet.peers[IDS[name]].flower = name not in ("west", "garden")
    north = fleet.peers[IDS["north"]]
    north.tasks, north.disk_free_bytes = ("mnist", "ping"), 41_000_000_000
    north.policy = {"threads": "2", "share_log": "True"}
    return fleet


def two_runs_fleet() -> Fleet:
    """The rich fleet after an earlier run that took more rounds."""
    fleet = rich_fleet()
    run = fleet.runs["motion-7"]
    changed = replace(run.changed, run="motion-6", state=RunState.FINISHED, ended_because="done")
    rounds = [
        replace(run.rounds[0], run="motion-6", round=number, loss=2.4 / number, accuracy=None)
        for number in range(1, 20)
    ]
    before = Run(changed=changed, changed_at=NOW - 3_000, rounds=rounds)
    fleet.runs = {"motion-6": before, **fleet.runs}
    return fleet


def buffered_fleet() -> Fleet:
    """The rich fleet with buffered aggregation: some updates are several versions behind."""
    fleet = rich_fleet()
    run = fleet.runs["motion-7"]
    for number, closed in enumerate(run.rounds):
        behind = {peer: (number * (n + 1)) % (n + 2) for n, peer in enumerate(closed.norms)}
        behind = behind or {IDS["west"]: number % 4, IDS["east"]: 0}
        run.rounds[number] = replace(closed, staleness=behind)
    words = "3 updates more; east is 2 versions behind"
    run.changed = replace(run.changed, task="watch-motion", waiting_for=words)
    return fleet


def troubled_fleet() -> Fleet:
    """Most peers are away, one has an error, and the run cannot go on."""
    fleet = busy_fleet()
    for name in ("north", "south-attic"):
        fleet.peers[IDS[name]].seen_at = NOW - 300
    east = fleet.peers[IDS["east"]]
    east.state, east.reason = PeerState.ERROR, "the data folder /data/motion is gone"
    east.disk_free_bytes = 300_000_000
    run = fleet.runs["motion-7"]
    words = "3 peers; 1 is there (lab-workstation-7, paused: battery)"
    run.changed = replace(run.changed, state=RunState.WAITING, asked=0, waiting_for=words)
    return fleet


def held_up_fleet() -> Fleet:
    """The run refuses two peers, one is paused, and one awaits its owner's consent."""
    fleet = busy_fleet()
    refused = {
        IDS["east"]: "it has no column 'age'; the nearest is 'ages': rename it, or set --target",
        IDS["west"]: "3 examples, at least 10 are required",
    }
    paused = fleet.peers[IDS["lab-workstation-7"]]
    paused.state, paused.reason, paused.paused_by = PeerState.PAUSED, "busy 64 %", ("busy",)
    consent = fleet.peers[IDS["south-attic"]]
    consent.state, consent.awaits_consent, consent.seen_at = PeerState.IDLE, "watch-motion", NOW
    for name in ("east", "west"):
        fleet.peers[IDS[name]].state, fleet.peers[IDS[name]].seen_at = PeerState.IDLE, NOW
    run = fleet.runs["motion-7"]
    run.changed = replace(
        run.changed,
        state=RunState.WAITING,
        waiting_for="the quorum: 1 of 3",
        asked=0,
        num_refused=2,
        refused=refused,
    )
    return fleet


def ended_fleet() -> Fleet:
    """A fleet whose run has ended."""
    fleet = rich_fleet()
    run = fleet.runs["motion-7"]
    run.changed = replace(
        run.changed,
        state=RunState.FINISHED,
        round=11,
        rounds=11,
        asked=0,
        waiting_for="",
        ended_because="11 rounds are done",
    )
    return fleet


def crowd_fleet(peers: int = 300) -> Fleet:
    """The busy fleet with many more peers."""
    fleet, say = busy_fleet(), Said()
    for number in range(peers):
        name = f"reader-{number:03}"
        body = PeerChanged(peer=name, name=name, public_key=bytes(32))
        seq = fleet.seq + 1
        known = Envelope(sender=COORDINATOR, epoch=fleet.epoch, seq=seq, at=NOW, body=body)
        reduce(fleet, known, NOW)
        state = (PeerState.TRAINING, PeerState.IDLE, PeerState.SENDING)[number % 3]
        there = Presence(state=state, version="0.1.0", run="motion-7", round=12)
        reduce(fleet, say(name, there), NOW - number % 20)
        reduce(fleet, say(name, telemetry(number % 40, 2.0 / (1 + number % 40))), NOW - number % 20)
    fleet.gap = False
    return fleet


def empty_fleet() -> Fleet:
    return Fleet(fleet="0123456789abcdef", name="home")


class Replay:
    """A Source with a given snapshot, and with the live messages of `live`."""

    def __init__(self, fleet: Fleet | None, live: Iterable[Envelope] = ()) -> None:
        self.fleet = fleet
        self.live: asyncio.Queue[Envelope | Exception] = asyncio.Queue()
        for envelope in live:
            self.live.put_nowait(envelope)
        self.http_up = fleet is not None
        self.mqtt_up = True
        self.snapshots = 0
        self.commands: list[tuple[str, str, float]] = []
        self.orders: list[StartRunRequest] = []
        self.stopped: list[str] = []
        self.withheld = ""
        self.log_lines = [
            LogLine(at=NOW - 60, level="info", text="connected to 192.0.2.7:9092"),
            LogLine(at=NOW - 30, level="warning", text="lost the coordinator: no answer"),
            LogLine(at=NOW - 5, level="error", text="the work failed: out of memory"),
        ]

    async def snapshot(self) -> Fleet:
        if not self.http_up or self.fleet is None:
            raise Unreachable("nobody answers at 192.0.2.7:9092")
        self.snapshots += 1
        return decode(encode(self.fleet, NOW))

    async def messages(self) -> AsyncIterator[Envelope]:
        while self.mqtt_up:
            item = await self.live.get()
            if isinstance(item, Exception):
                raise item
            yield item
        raise Unreachable("the broker at 192.0.2.7:1883 does not answer")

    async def ask(self, request: Callable[[Any], T]) -> T:
        return request(self)

    # --- requests, as `Remote` has them ---

    def command(self, peer: str, command: Command) -> str:
        return self._note(peer, command.action, command.for_s)

    def approve(self, peer: str) -> None:
        self._note(peer, "approve")

    def remove(self, peer: str) -> None:
        self._note(peer, "remove")

    def _note(self, peer: str, action: str, for_s: float = 0.0) -> str:
        self.commands.append((peer, action, for_s))
        if peer == IDS["south-attic"]:
            raise Refused("the broker is away", "Try again when it is back.")
        return f"asked to {action}"

    def start_run(self, order: StartRunRequest) -> str:
        self.orders.append(order)
        return "ping-1"

    def stop_run(self, run: str) -> None:
        self.stopped.append(run)

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)

    def logs(self, peer: str) -> list[LogLine]:
        if peer == IDS["west"]:
            raise Unreachable("west does not answer", "It may be offline.")
        return self.log_lines

    def evaluations(self, run: str) -> EvaluationsResponse:
        if self.withheld:
            return EvaluationsResponse(withheld=self.withheld)
        return EvaluationsResponse(evaluations=EVALUATIONS)

    def job_shares(self, job: str) -> dict[str, JobShare]:
        return SHARES

    def make_ticket(self, order: TicketRequest) -> dict[str, str]:
        return {"ticket": "cw1-" + "k7Qp2m" * 16}


def serving(fleet: Fleet) -> Replay:
    """A coordinator with this fleet that is connected to MQTT and Flower."""
    return Replay(fleet, [links(fleet.seq, epoch=fleet.epoch)])


def links(seq: int = 1, *, epoch: str = "e9") -> Envelope:
    body = Links(mqtt=True, flower=True)
    return Envelope(sender=COORDINATOR, epoch=epoch, seq=seq, at=NOW, body=body)


def monitor(
    source: Replay,
    *,
    read_only: bool = False,
    clock: float = NOW,
    config: Config | None = None,
    ascii_only: bool = False,
) -> MonitorApp:
    return MonitorApp(
        source,
        read_only=read_only,
        config=config,
        ascii_only=ascii_only,
        clock=lambda: clock,
        zone=UTC,
        back_off=lambda attempt: 8.0,
    )


async def until(pilot: Pilot[None], true: Callable[[], bool]) -> None:
    """Let the app run until `true()`, for some seconds at most."""
    for _ in range(1000):
        if true():
            break
        await pilot.pause(base_app.DRAW_INTERVAL_S)
    assert true()
    await settled(pilot)


async def settled(pilot: Pilot[None]) -> None:
    """Let the app run until its screen is unchanged for some drawing intervals."""
    before, same = "", 0
    for _ in range(60):
        now = screen_text(pilot.app)
        same = same + 1 if now == before else 0
        if same == 3:
            break
        before = now
        await pilot.pause(2 * base_app.DRAW_INTERVAL_S)


def screen_text(app: App[None]) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())
