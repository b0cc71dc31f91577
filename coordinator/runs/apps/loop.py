"""Drives the run of a Flower app: its ServerApp asks, and peers that have the app answer.

First each peer is asked whether it has the same app; the others are refused by name. What the
ServerApp sends opens and closes rounds (`round_events`), which are in the ledger before anything is
sent. The state of a ServerApp is in its process alone, so a restart of the coordinator ends the
run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Set

from coordinator.runs.apps import frames, leftovers, pushes, round_events, rules, server_process
from coordinator.runs.apps.conversation import CHECK, LATE, Answered, Conversation
from coordinator.runs.apps.frames import End, Nodes, NodesAsked, Pull, Push, Pushed, Replies, Reply
from coordinator.runs.apps.lane import Lane
from coordinator.runs.apps.round_events import Phase
from coordinator.runs.apps.rounds import AppRounds
from coordinator.runs.apps.server_process import ServerProcess
from coordinator.runs.context import RunContext
from coordinator.runs.in_flight import RequestsInFlight
from coordinator.runs.recorder import RunRecorder
from coordinator.runs.retention import Retention
from coordinator.runs.state import Run
from coordinator.runs.timing import PhaseTimer
from coordinator.storage import installed_apps, run_events
from coordinator.storage.run_events import RunEvent
from protocols.errors import Awaited, CommonweightError, HomeError
from protocols.local.timed_wait import wait_at_most
from protocols.messages.app_work import AppWork
from protocols.messages.envelope import strip_controls
from protocols.messages.states import RunState

log = logging.getLogger("commonweight.run")

#: How long peers may take to say whether they have the app, before the ServerApp starts.
_CHECK_WITHIN_S = 10.0
#: An answer may have this many bytes: more than what was sent, or all of it if nothing was.
_MAX_GROWTH, _SPARE_BYTES, _MAX_FIRST_BYTES = 4, 64 * 1024 * 1024, 8 * 1024**3


class AppLoop:
    """One active run of an app. Set `changed`, in the loop's thread, when something happens.

    `protected_digests()`: versions and states that other runs keep.
    """

    def __init__(
        self, run: Run, ctx: RunContext, protected_digests: Callable[[], Set[str]]
    ) -> None:
        timer = PhaseTimer()
        self._ctx, self._recorder = ctx, RunRecorder(run, ctx, timer)
        self._retention = Retention(run, ctx.store, protected_digests)
        self._folder = rules.folder_of(ctx.store.home, run.id)
        self._lane = Lane(self._folder)
        self._talk = Conversation(ctx, run.id, self._lane)
        self.changed, self._arrived = asyncio.Event(), asyncio.Event()
        #: Peers that have the app, and those that were asked.
        self._fit, self._checked = set[str](), set[str]()
        self._rounds = AppRounds(ctx, self._recorder, timer, self._retention, self._talk)
        self._stop_reason = ""
        self._flower_run = rules.number_of(run.id)

    # --- called from outside, as `RunLoop` ---

    @property
    def run(self) -> Run:
        return self._recorder.run

    @property
    def requests(self) -> RequestsInFlight:
        return self._talk.requests

    @property
    def on_disk(self) -> Set[str]:
        return self._retention.on_disk

    def stop(self, because: str) -> None:
        self._stop_reason = because
        self.changed.set()

    def session_opened(self, peer: str) -> None:
        """The peer has a new session: send its messages again, and ask for the app again."""
        if lost := self._talk.lose(peer):
            name = self._ctx.name_of(peer)
            text = f"{name} disconnected during its work, which it gets again ({len(lost)})"
            self._recorder.report("warning", text, peer)
        self._recorder.incompatible.discard(peer)
        self._fit.discard(peer)
        self._checked.discard(peer)
        self.changed.set()

    def owner_has_decided(self, peer: str) -> None:
        """An owner of an app installs it, which opens a new session."""

    def awaits(self, peer: str) -> Awaited | None:
        return None

    # --- the run ---

    async def drive(self) -> Run:
        """Work until the run has ended. Raises the errors of the ledger and the disk."""
        try:
            with self._ctx.transfer.receiving(self.run.id, self._counted_uploads):
                self._recorder.announce()
                state, because = await self._outcome()
                self._talk.close()
                await self._rounds.close()
                await self._recorder.record(round_events.ended(self.run, state, because))
        finally:
            if self.run.ended:
                self._ctx.store.uploads.end_run()
            self._recorder.announce_now()
        self._retention.prune(self.run)
        leftovers.delete(self._folder)
        level = "error" if self.run.state is RunState.FAILED else "info"
        self._recorder.report(
            level, f"run {self.run.id} {self.run.state}: {self.run.ended_because}"
        )
        return self.run

    async def _outcome(self) -> tuple[RunState, str]:
        if self.run.round or self.run.head:
            return RunState.FAILED, rules.RESTARTED
        spec = self.run.spec
        try:
            card, app = installed_apps.find(self._ctx.store.home, rules.name_of(spec), spec.app)
            self._name = card.name
            self._recorder.report("info", f"run {self.run.id} started")
            attending = asyncio.create_task(self._attend(), name="app messages")
            try:
                await self._until_enough(attending)
                async with server_process.started(self._folder, app) as server:
                    serving = asyncio.create_task(self._serve(server), name="ServerApp")
                    try:
                        await asyncio.wait(
                            {attending, serving}, return_when=asyncio.FIRST_COMPLETED
                        )
                        return (attending if attending.done() else serving).result()
                    finally:
                        serving.cancel()
                        await asyncio.gather(serving, return_exceptions=True)
            finally:
                attending.cancel()
                await asyncio.gather(attending, return_exceptions=True)
        except _Ended as ended:
            return ended.state, ended.because
        except HomeError:
            raise
        except CommonweightError as err:
            return RunState.FAILED, f"{err.message} ({err.hint})" if err.hint else err.message
        except Exception as err:  # a fault of ours: the coordinator and its other runs continue
            log.exception("run %s fails", self.run.id)
            text = f"the coordinator could not serve the app: {type(err).__name__}: {err}"
            return RunState.FAILED, strip_controls(text)

    def _counted_uploads(self, peer: str) -> set[str]:
        return set()  # an accepted upload is moved away at once

    # --- peers ---

    async def _attend(self) -> tuple[RunState, str]:
        """Ask new peers for the app, send messages again, and take replies, until a stop."""
        while not self._stop_reason:
            self.changed.clear()
            answered = await self._talk.take()
            await self._record([*answered, *self._talk.give_up()])
            self._talk.acknowledge()
            await self._check_peers()
            await self._talk.send()
            await wait_at_most(self.changed, self._talk.next_deadline_s())
        return RunState.STOPPED, self._stop_reason

    async def _check_peers(self) -> None:
        """Ask peers that are new whether they have the app."""
        self._ctx.transfer.limits.max_bytes = max(self._ctx.transfer.limits.max_bytes, 1)
        new = sorted(self._ctx.eligible() - self._checked - self._recorder.incompatible)
        if new:
            self._checked.update(new)
            await self._talk.add([(peer, self._work(CHECK)) for peer in new], _CHECK_WITHIN_S)

    def _work(self, kind: str, **fields: object) -> AppWork:
        spec = self.run.spec
        return AppWork(
            run=self.run.id,
            number=self._talk.next_number(),
            kind="check" if kind == CHECK else "message",
            app=self._name,
            code=spec.app,
            flower_run=self._flower_run,
            deadline_s=spec.deadline_s,
            fleet=self._ctx.fleet,
            **fields,  # type: ignore[arg-type]
        )

    async def _until_enough(self, attending: asyncio.Task[tuple[RunState, str]]) -> None:
        """Wait until enough peers have said that they have the app."""
        quorum, since = self.run.spec.quorum, time.monotonic()
        while True:
            self._arrived.clear()
            is_asking = any(sent.kind == CHECK for sent in self._talk.open.values())
            is_patient = time.monotonic() - since < _CHECK_WITHIN_S
            if len(self._fit) >= quorum and not (is_asking and is_patient):
                return
            if attending.done():
                raise _Ended(*attending.result())
            what = "a peer" if quorum == 1 else f"{quorum} peers"
            self._recorder.set_waiting_for(f"{what} with the app {self._name}")
            arrived = asyncio.create_task(self._arrived.wait())
            await asyncio.wait(
                {arrived, attending}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
            )
            arrived.cancel()

    async def _record(self, answered: list[Answered]) -> None:
        """Record what came of messages, and keep the replies for the ServerApp."""
        events: list[RunEvent] = []
        replies: list[Reply] = []
        for sent, told, update, refusal in answered:
            is_check, number = sent.kind == CHECK, sent.work.number
            if is_check and refusal is not None and refusal.kind == LATE:
                self._checked.discard(sent.peer)  # ask again
                replies.append(Reply(id=number, error=refusal.text))
            elif refusal is not None:
                text, kind = refusal.text[:400], CHECK if is_check else Phase.of(sent.kind, "").kind
                events.append(
                    run_events.UpdateRefused(sent.work.round, sent.peer, refusal.kind, text, kind)
                )
                replies.append(Reply(id=number, error=text))
                if is_check and refusal.permanent:
                    self._ctx.tell_owner(sent.peer, f"run {self.run.id} does not use it: {text}")
            else:
                assert update is not None
                has_arrays = bool(update.digest)
                replies.append(Reply(id=number, told=told, has_arrays=has_arrays))
                if is_check:
                    self._fit.add(sent.peer)
                elif sent.kind not in round_events.PREPARING:
                    events.append(run_events.UpdateAccepted(sent.work.round, sent.peer, update))
        await self._recorder.record(*events)
        for reply, (sent, _, update, _) in zip(replies, answered, strict=True):
            if sent.kind != CHECK:
                self._lane.put(reply, update.nbytes if update else 0)
        if answered:
            self._arrived.set()

    # --- the ServerApp ---

    async def _serve(self, server: ServerProcess) -> tuple[RunState, str]:
        """Answer the frames of the ServerApp until it has ended. Raises BadMessage."""
        self._recorder.set_waiting_for("its ServerApp")
        await server.write(frames.Hello(flower_run=self._flower_run, config=self.run.spec.settings))
        while True:
            await asyncio.sleep(0)  # frames that have come must not keep other tasks waiting
            match await server.read():
                case NodesAsked():
                    await server.write(Nodes(tuple(sorted(self._peers()))))
                case Push() as push:
                    await server.write(await self._push(push))
                case Pull() as pull:
                    await server.write(await self._pull(pull))
                case End(error=error):
                    if error:
                        log_file = self._folder / server_process.LOG
                        return RunState.FAILED, f"the ServerApp failed: {error} ({log_file})"
                    return RunState.FINISHED, "its ServerApp has ended"

    def _peers(self) -> dict[int, str]:
        """The peers that can work now, by the ids that the ServerApp knows."""
        return {rules.number_of(peer): peer for peer in self._fit & self._ctx.eligible()}

    async def _push(self, push: Push) -> Pushed:
        """Record the round, and send the messages to the nodes that can work. Raises BadMessage."""
        nodes, limits = self._peers(), self._ctx.transfer.limits
        going = [message for message in push.messages if message.node in nodes]
        pushes.check_bounds(push, going, self._talk.open.values(), self._lane.waiting_bytes)
        sizes = await asyncio.to_thread(
            pushes.store_arrays,
            self._ctx.store,
            self._folder,
            push.contents,
            self._retention.on_disk,
        )
        peers = tuple(sorted({nodes[message.node] for message in going}))
        if going:
            first = push.contents[going[0].content]
            await self._rounds.open(going[0], first, peers, sizes.keys())
            sent = [sizes[push.contents[message.content].digest] for message in going]
            grown = _MAX_GROWTH * max(sent) + _SPARE_BYTES
            limits.max_bytes = grown if min(sent) else _MAX_FIRST_BYTES
            limits.version_bytes = max(sent)
        works: list[tuple[str, AppWork]] = []
        ids: list[int] = []
        for message in push.messages:
            if message.node not in nodes:
                ids.append(0)
                continue
            content = push.contents[message.content]
            work = self._work(
                "message",
                config=self.run.spec.settings,
                message_type=message.message_type,
                group=message.group,
                told=content.told,
                base=content.digest,
                nbytes=sizes[content.digest],
                node=message.node,
                round=self.run.round,
            )
            works.append((nodes[message.node], work))
            ids.append(work.number)
        await self._talk.add(works, self.run.spec.deadline_s)
        self._recorder.set_waiting_for("replies" if going else "its ServerApp")
        await self._talk.send()
        self.changed.set()  # a new deadline
        return Pushed(tuple(ids))

    async def _pull(self, pull: Pull) -> Replies:
        """The replies that have come, or come within the time that the ServerApp waits."""
        until = time.monotonic() + pull.wait_s
        self._lane.forget(pull.forgotten, self._talk.open.keys())
        while not (found := self._lane.take(pull.ids)):
            self._arrived.clear()
            if (left := until - time.monotonic()) <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        if not self._talk.open:
            self._recorder.set_waiting_for("its ServerApp")
        return Replies(tuple(found))


class _Ended(Exception):
    """The run ended before its ServerApp started."""

    def __init__(self, state: RunState, because: str) -> None:
        super().__init__(because)
        self.state, self.because = state, because
