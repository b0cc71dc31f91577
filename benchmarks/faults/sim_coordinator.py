"""The simulated coordinator: the product's transitions, validation and reducer, with simulated I/O.

It performs the steps of the run loop, the requests, the weight transfer and the Flower link in the
same order, with a `yield` wherever the process can die. The BUGS are planted to test the checker.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from benchmarks.faults import sim_handshake
from benchmarks.faults.checker import Violation
from benchmarks.faults.sim_disk import Disk, digest_of
from benchmarks.faults.sim_judging import judged
from benchmarks.faults.sim_network import Network
from coordinator.fleet import reducer as fleets
from coordinator.fleet.state import Fleet
from coordinator.runs import buffered, decisions, schema_agreement, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from protocols.errors import SHAREABLE_CODES, CommonweightError, UpdateRefused
from protocols.messages.envelope import Envelope, PeerChanged
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR
from protocols.messages.work import Work
from protocols.model import schema_card
from protocols.tables import preprocessing

RUN = "r"
BUGS = {
    "ack-early": "a reply is acknowledged while it lies in memory alone",
    "no-sync": "an upload is acknowledged before its folder is synced",
    "count-twice": "the gate takes a second answer of the same peer",
    "forget-pending": "a replay forgets who was asked",
    "forget-described": "a replay forgets what the peers told of themselves",
    "skip-sync-version": "a version is named in the ledger before it is synced",
}
_PATIENCE = 20.0


class Asked(NamedTuple):
    peer: str
    round: int
    kind: str


class Settling:
    """The future of an acknowledgment: None, then whether it is in the ledger."""

    settled: bool | None = None


class Coordinator:
    """A run. `ledger` and `disk` survive a crash; all else is lost."""

    def __init__(
        self, ledger: list[bytes], disk: Disk, network: Network, peers: Sequence[str], bug: str
    ) -> None:
        self.ledger, self.disk = ledger, disk
        self._network, self._peers, self._bug = network, peers, bug
        self.now = 0.0
        self._questions = 0
        network.hear = self._hear
        self._begin()

    def _begin(self) -> None:
        """Restart: rebuild the memory from the ledger."""
        past = [run_events.decode(body) for body in self.ledger]
        self.run: Run = transitions.replay(RUN, past)
        if self._bug == "forget-pending" and len(past) > 1:
            self.run = replace(self.run, peers={})
        if self._bug == "forget-described":
            self.run = replace(self.run, described={})
        self.applied = len(past)
        self.fleet = Fleet(fleet="f", name="c")
        for seq, peer in enumerate(self._peers):
            known = PeerChanged(peer=peer, name=peer, public_key=bytes(32))
            envelope = Envelope(sender=COORDINATOR, epoch="c", seq=seq, at=self.now, body=known)
            fleets.reduce(self.fleet, envelope, self.now)
        self.sessions: dict[str, int] = {}
        self.mailbox: dict[str, list[tuple[str, Work]]] = {peer: [] for peer in self._peers}
        self.replies: dict[str, bytes] = {}
        self.waits: set[str] = set()
        self.outstanding: dict[str, Asked] = {}
        self._asked_at: dict[str, float] = {}
        self._arrived: dict[str, bytes] = {}
        self._settling: dict[str, Settling] = {}
        self._misfits: set[str] = set()
        self._phase_at = self.now
        self._patient_until = (
            self.now + _PATIENCE if self.run.pending or self.run.assignments else 0.0
        )
        self._changed = True
        self._doing = self._drive()

    def die(self, *, power: bool) -> None:
        """Crash or lose power, then start again."""
        self._doing.close()
        if power:
            self.disk.lose_power()
        for peer in self._peers:
            self._network.agents[peer].cut_off()
        self._begin()

    def step(self) -> None:
        """Run until the next step at which it could die."""
        next(self._doing, None)

    # --- requests (hub, lane, superlink) ---

    def open(self, peer: str) -> int:
        """Open a session and return its number; work of the last session is canceled."""
        self.sessions[peer] = self.sessions.get(peer, 0) + 1
        self.mailbox[peer].clear()
        self._misfits.discard(peer)
        self._take_back({q for q, asked in self.outstanding.items() if asked.peer == peer})
        self._changed = True
        return self.sessions[peer]

    def pull(self, peer: str) -> tuple[str, Work] | None:
        while self.mailbox[peer]:
            question, work = self.mailbox[peer].pop(0)
            if question in self.waits:
                return question, work
        return None

    def upload(self, peer: str, digest: str) -> None:
        self.disk.write(f"update {peer} {digest}", digest)
        if self._bug != "no-sync":
            self.disk.sync()

    def hand_in(self, question: str, claim: bytes) -> Settling:
        """Take a reply; its answer is ready once it is acknowledged."""
        settling = Settling()
        if question in self.outstanding:
            settling = self._settling.setdefault(question, settling)
        else:
            settling.settled = False
        taken = question in self.waits and question not in self.replies
        if taken:
            self.replies[question] = claim
            self._changed = True
        if self._bug == "ack-early":
            settling.settled = taken
        return settling

    def version(self, digest: str) -> bool:
        return self.disk.read(f"version {digest}") is not None

    def expire(self, peer: str) -> None:
        """The peer's heartbeats are missing."""
        if self.sessions.pop(peer, None) is not None:
            self._changed = True

    def missed_heartbeat(self, agent: object) -> None:
        """Nothing to do: without faults every agent keeps its session."""
        self._changed = True

    def _hear(self, envelope: Envelope, now: float) -> None:
        fleets.reduce(self.fleet, envelope, now)
        self._changed = True

    # --- the run loop ---

    def _eligible(self) -> frozenset[str]:
        paused = (PeerState.PAUSED, PeerState.ERROR)
        return frozenset(p for p in self.sessions if self.fleet.peers[p].state not in paused)

    def view(self) -> Observation:
        here = self._eligible() - self._misfits
        return Observation(here, self.now - self._phase_at >= self.run.spec.deadline_s)

    def _drive(self) -> Generator[None, None, None]:
        while not self.run.ended:
            yield
            if not (self.run.buffered and self.run.state is RunState.AGGREGATING):
                yield from self._collect()
            yield from self._notice_losses()
            yield from self._ask_given()
            yield from self._ask_pending()
            step = decisions.decide(self.run, self.view())
            if isinstance(step, steps.Wait):
                self._changed = False
                while not self._changed and not self.view().deadline_passed:
                    yield
                if self.view().deadline_passed and not self._changed:
                    yield
            else:
                yield from self._do(step)
        self._take_back(set(self.outstanding))
        yield from self._collect()

    def _do(self, step: steps.Step) -> Iterator[None]:
        run = self.run
        match step:
            case steps.AgreeSchema():
                try:
                    news = schema_agreement.agree(run, {}).events
                except CommonweightError as err:
                    news = [run_events.RunEnded(RunState.FAILED, err.message)]
                yield from self._record(*news)
            case steps.AskPeers(peers, opens_phase):
                if opens_phase or self.view().deadline_passed:
                    self._phase_at = self.now
                present = (run.round, run.kind)
                found = self.outstanding.items()
                self._take_back({q for q, a in found if a.peer in peers and a[1:] == present})
                yield from self._record(run_events.PeersAsked(peers))
            case steps.AssignWork(given):
                if self.view().deadline_passed:
                    self._phase_at = self.now
                yield from self._record(*given)
            case steps.OpenRound(number, base, eligible):
                self._phase_at = self.now
                asked = () if run.buffered else eligible
                yield from self._record(run_events.RoundOpened(number, base, asked))
            case steps.CloseTraining(contributors):
                yield from self._record(run_events.TrainingClosed(run.round, contributors))
            case steps.Aggregate(contributors):
                yield from self._aggregate(contributors)
            case steps.OpenEvaluation(eligible):
                self._phase_at = self.now
                yield from self._record(run_events.EvaluationOpened(run.round, eligible))
            case steps.CloseRound():
                found = self.outstanding.items()
                old = {q for q, asked in found if asked.round < run.round}
                if run.buffered:
                    old = {q for q, asked in found if asked.kind == "evaluate"}
                self._take_back(old)
                yield from self._record(run_events.RoundClosed(run.round, {}, 1.0, 0, 0))
            case steps.EndRun(state, because):
                yield from self._record(run_events.RunEnded(state, because))

    def _aggregate(self, contributors: tuple[str, ...]) -> Iterator[None]:
        parts = [self.run.head]
        counted = [(peer, self.run.updates[peer]) for peer in contributors if not self.run.buffered]
        counted += [(one.peer, one.update) for one in buffered.in_order(self.run)]
        for peer, update in counted:
            digest = update.digest
            if self.disk.read(f"update {peer} {digest}") is None:
                raise Violation(f"{peer}'s accepted update {digest} is not on disk")
            parts.append(digest)
        digest = digest_of(f"v{self.run.round}({'+'.join(parts[1:])})")
        yield
        self.disk.write(f"version {digest}", digest)
        yield
        if self._bug != "skip-sync-version":
            self.disk.sync()
        fact = run_events.VersionCommitted(self.run.round, digest, self.run.head, contributors, {})
        yield from self._record(fact)
        if self.run.buffered:
            self._sweep({peer for peer, _ in counted})
        else:
            for name in self.disk.names("update "):
                self.disk.remove(name)
        yield

    def _sweep(self, peers: set[str]) -> None:
        """The unused uploads of these peers, which have none in progress."""
        for peer in peers - self.run.assignments.keys():
            kept = {f"update {peer} {one.update.digest}" for one in self.run.buffer}
            for name in self.disk.names(f"update {peer} "):
                if name not in kept:
                    self.disk.remove(name)

    def _ask_given(self) -> Iterator[None]:
        """For buffered runs: the training of each peer."""
        longest = self.run.spec.deadline_s
        found = [(q, a) for q, a in self.outstanding.items() if a.kind == "train"]
        if self.run.assignments:
            self._take_back({q for q, _ in found if self.now - self._asked_at[q] > longest})
        reached = {(a.peer, a.round) for a in self.outstanding.values() if a.kind == "train"}
        for peer, given in sorted(self.run.assignments.items()):
            if not given.lost and peer in self._eligible() and (peer, given.round) not in reached:
                yield
                self._put(peer, given.round, "train", given.base, given.turn)

    def _ask_pending(self) -> Iterator[None]:
        run = self.run
        question = (run.round, run.kind)
        reached = {asked.peer for asked in self.outstanding.values() if asked[1:] == question}
        waits = run.assignments.keys() - {
            a.peer for a in self.outstanding.values() if a.kind == "train"
        }
        here = self._eligible()
        peers = [p for p in run.pending if p not in reached and p in here and p not in waits]
        if not peers:
            return
        yield
        for peer in peers:
            self._put(peer, *question, self._base())
        yield

    def _base(self) -> str:
        if self.run.kind == "describe":
            return preprocessing.digest(self.run.preprocessing)
        return self.run.head if self.run.kind != "init" else ""

    def _put(self, peer: str, number: int, kind: Any, base: str, turn: int = 0) -> None:
        if peer not in self.sessions:
            return
        self._questions += 1
        message = f"q{self._questions}"
        work = Work(
            run=RUN,
            round=number,
            kind=kind,
            turn=turn,
            task="t",
            base=base,
            nbytes=0,
            seed=0,
            settings=sim_handshake.settings(self.run.spec, self.run.preprocessing),
            card=schema_card.encode(self.run.card).decode() if self.run.card else "",
            deadline_s=1.0,
        )
        self.waits.add(message)
        self.mailbox[peer].append((message, work))
        self.outstanding[message] = Asked(peer, number, kind)
        self._asked_at[message] = self.now
        self._network.publish(peer)

    def _notice_losses(self) -> Iterator[None]:
        if self.now < self._patient_until:
            return
        at_work = {peer for peer, given in self.run.assignments.items() if not given.lost}
        lost = sorted((at_work | set(self.run.pending)) - self._eligible())
        for peer in lost:
            self._take_back({q for q, asked in self.outstanding.items() if asked.peer == peer})
        yield from self._record(*(run_events.PeerLost(peer, "went away") for peer in lost))

    # --- answers ---

    def _take_back(self, questions: set[str]) -> None:
        for question in questions & self.replies.keys():
            self._arrived[question] = self.replies.pop(question)
            self.waits.discard(question)
        for question in questions - self._arrived.keys():
            self.waits.discard(question)
            del self.outstanding[question]
            self._settle(question, False)

    def _settle(self, question: str, settled: bool) -> None:
        if waiting := self._settling.pop(question, None):
            waiting.settled = settled

    def _collect(self) -> Iterator[None]:
        answers = self._arrived | self.replies
        self._arrived, self.replies = {}, {}
        asked_of = {q: asked for q in answers if (asked := self.outstanding.pop(q, None))}
        if not asked_of:
            return
        self.waits -= asked_of.keys()
        yield
        news: list[RunEvent] = []
        for question, asked in asked_of.items():
            try:
                news.append(
                    judged(
                        self.run, self.disk, asked.peer, asked.kind, answers[question], self._bug
                    )
                )
            except UpdateRefused as err:
                news.append(
                    run_events.UpdateRefused(asked.round, asked.peer, err.reason, "", asked.kind)
                )
            yield
        yield from self._record(*news)
        if self.run.buffered:
            self._sweep({asked.peer for asked in asked_of.values()})
        for question in asked_of:
            self._settle(question, True)

    def _record(self, *news: RunEvent) -> Iterator[None]:
        if not news:
            return
        yield
        self.ledger += [run_events.encode(fact) for fact in news]
        yield
        for fact in news:
            self.run = transitions.apply(self.run, fact)
            if isinstance(fact, run_events.UpdateRefused) and fact.reason in SHAREABLE_CODES:
                self._misfits.add(fact.peer)
        self.applied = len(self.ledger)
