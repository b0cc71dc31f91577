"""The rounds of a Flower app in the ledger: what follows from messages and answers. Pure."""

from __future__ import annotations

import pytest

from coordinator.runs import transitions
from coordinator.runs.apps import frames, lane, pushes, round_events
from coordinator.runs.apps.conversation import Sent
from coordinator.runs.apps.frames import Content, Outgoing, Push
from coordinator.runs.apps.round_events import Costs, Phase
from coordinator.storage import run_events as facts
from protocols.errors import BadMessage
from protocols.messages import app_work
from protocols.messages.app_work import AppWork
from protocols.messages.envelope import MAX_PEERS

SPEC = facts.RunSpec(task="flower:x", rounds=1, app="a" * 64)


def _metrics(peers: int, names: int, shared: dict[str, float]) -> dict[str, float | None]:
    """The metrics of a round whose peers each have as many names of their own."""
    run = transitions.replay("r", [facts.RunStarted(SPEC)])
    asked = tuple(f"p{number}" for number in range(peers))
    events = round_events.opened(run, None, Phase("train", "1"), "1" * 64, asked, Costs())
    for peer in asked:
        own: dict[str, float | None] = {f"{peer}-{number}": 1.0 for number in range(names)}
        events.append(
            facts.UpdateAccepted(1, peer, facts.Update(num_examples=1, metrics=own | shared))
        )
    for event in events:
        run = transitions.apply(run, event)
    events += round_events.closed(run, "", Costs())
    # As at a start of the coordinator: everything is read from the ledger again.
    read = [facts.decode(facts.encode(event)) for event in events]
    (closed,) = transitions.replay("r", [facts.RunStarted(SPEC), *read]).history
    return dict(closed.metrics)


@pytest.mark.attack("20.wire", by="peer")
def test_metric_names_of_many_peers_leave_a_ledger_that_can_be_read() -> None:
    """Attack: peers of an app answer with metric names of their own, so that their union is more
    than the ledger can be read with, and the coordinator never starts again."""
    assert _metrics(9, 31, {"loss": 2.0}) == {"loss": 2.0}
    assert _metrics(257, 1, {}) == {}
    assert len(_metrics(2, 32, {})) == 64


def test_a_metric_of_half_of_the_peers_counts() -> None:
    def update(examples: int, **metrics: float) -> facts.Update:
        return facts.Update(num_examples=examples, metrics=dict(metrics))

    told = {"a": update(1, x=1.0, y=2.0), "b": update(3, x=5.0), "c": update(4), "d": update(1)}
    assert round_events.mean(told) == {"x": 4.0}
    large = {peer: update(10**12, x=1.7e308, y=1.0) for peer in "ab"}
    assert round_events.mean(large) == {"y": 1.0}


def _push(told: bytes, nodes: list[int]) -> Push:
    """As the coordinator takes it from the pipe: one content for all messages."""
    messages = tuple(Outgoing(content=0, node=node, message_type="query") for node in nodes)
    push = Push(contents=(Content(told=told),), messages=messages)
    made = frames.decode_app_frame(frames.encode(push)[frames.LENGTH_BYTES :])
    assert isinstance(made, Push)
    return made


def _sent(node: int, told: bytes = b"") -> Sent:
    work = AppWork(run="r", number=1, kind="message", app="x", code="a" * 64, node=node, told=told)
    return Sent("peer", work, b"", b"", 0.0)


@pytest.mark.attack("20.wire", by="task")
def test_one_frame_of_a_server_app_is_not_many_messages_in_memory() -> None:
    """Attack: a ServerApp sends one large content to the same node tens of thousands of times in
    one small frame, or messages without an end."""
    check, large = pushes.check_bounds, b"x" * app_work.MAX_RECORD_BYTES
    push = _push(large, [5] * MAX_PEERS)
    with pytest.raises(BadMessage, match="bytes of configs and metrics"):
        check(push, push.messages, [], 0)
    push = _push(b"", [5] * pushes.MAX_OPEN_OF_NODE)
    check(push, push.messages, [_sent(6)], 0)
    with pytest.raises(BadMessage, match="65 of them to one node"):
        check(push, push.messages, [_sent(5)], 0)
    push = _push(b"", list(range(MAX_PEERS)))
    check(push, push.messages, [], 0)
    with pytest.raises(BadMessage, match="65,537 messages without a reply"):
        check(push, push.messages, [_sent(1)], 0)
    push = _push(large, [1])
    fits = lane.MAX_WAITING_BYTES // len(large) - 1
    check(push, push.messages, [_sent(2, large)] * fits, 0)
    for sent, waiting_bytes in ((fits + 1, 0), (fits, 1)):
        with pytest.raises(BadMessage, match="bytes of"):
            check(push, push.messages, [_sent(2, large)] * sent, waiting_bytes)
