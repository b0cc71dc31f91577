"""Recordings: a replay gives what was recorded, at any speed and in both directions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from coordinator.api.schema import TicketRequest
from coordinator.fleet import readings, state
from coordinator.remote.recording import DEMO_FILE, Recorder, RecordingSource, read
from coordinator.remote.replay import ReplaySource
from protocols.errors import CommonweightError, UsageError
from protocols.local.terminal_text import ascii_only, strip_controls
from tests.support.scene import NOW, Replay, busy_fleet, empty_fleet, story


def record(path: Path) -> Path:
    """The story of the scene, each message at the time at which it was heard."""
    clock = {"now": NOW - 1000}
    recorder = Recorder(path, lambda: clock["now"])
    first = empty_fleet()
    first.at = clock["now"]
    recorder.snapshot(first)
    for at, envelope in story():
        clock["now"] = at
        recorder.message(envelope)
    recorder.close()
    return path


def shown(source: ReplaySource) -> state.Fleet:
    return asyncio.run(source.snapshot())


def test_a_replay_gives_what_was_recorded(tmp_path: Path) -> None:
    source = ReplaySource(record(tmp_path / "a.cwrec"))
    source.seek(source.length_s)
    played, was = shown(source), busy_fleet()
    # Times are kept to the millisecond, all else exactly.
    for one in (played, was):
        for peer in one.peers.values():
            peer.seen_at, peer.said_at = round(peer.seen_at), round(peer.said_at)
            peer.skew_s = round(peer.skew_s)
        one.events = [msgspec.structs.replace(e, at=round(e.at)) for e in one.events]
        for run in one.runs.values():
            run.changed_at = round(run.changed_at)
        one.gap, one.at = False, 0.0
    assert msgspec.to_builtins(played) == msgspec.to_builtins(was)


def test_seeking_back_and_forward_gives_the_same_fleet(tmp_path: Path) -> None:
    source = ReplaySource(record(tmp_path / "a.cwrec"), wall=lambda: 0.0)
    source.seek(500)
    there = state.encode(shown(source), NOW)
    source.seek(400)
    assert state.encode(shown(source), NOW) != there
    source.seek(-400)
    assert source.position_s == 500
    assert state.encode(shown(source), NOW) == there


async def test_pace_stop_and_step(tmp_path: Path) -> None:
    wall = {"now": 0.0}
    source = ReplaySource(record(tmp_path / "a.cwrec"), 4.0, wall=lambda: wall["now"])
    wall["now"] = 10.0
    assert source.position_s == 40
    source.play()
    wall["now"] = 90.0
    assert (source.position_s, source.status_text[0]) == (40, "‖")
    messages = source.messages()
    source.step()
    first = await anext(messages)
    source.step()
    second = await anext(messages)
    assert [first, second] == [envelope for _, envelope in story()][:2]
    source.pace(0.5)
    source.play()
    wall["now"] = 95.0
    assert source.position_s == pytest.approx(110)


async def test_a_recording_takes_no_commands(tmp_path: Path) -> None:
    source = ReplaySource(record(tmp_path / "a.cwrec"))
    with pytest.raises(CommonweightError, match="recording"):
        await source.ask(lambda remote: remote.logs("p"))


async def test_a_recorded_source_gives_what_its_source_gives(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cwrec", lambda: NOW)
    source = RecordingSource(Replay(busy_fleet(), [story()[0][1]]), recorder)
    await source.snapshot()
    assert await anext(source.messages()) == story()[0][1]
    assert await source.ask(lambda remote: remote.make_ticket(TicketRequest()))
    recorder.close()
    _, lines = read(tmp_path / "a.cwrec")
    first, second = lines
    assert first.snapshot is not None
    assert second.message == story()[0][1]


def test_a_truncated_file_is_replayed_up_to_its_end(tmp_path: Path) -> None:
    whole = record(tmp_path / "a.cwrec").read_bytes()
    for share in (0.3, 0.7, 0.95):
        path = tmp_path / f"cut{share}"
        path.write_bytes(whole[: int(len(whole) * share)])
        try:
            head, lines = read(path)
        except UsageError:
            continue  # not even its head is there
        assert head.commonweight_recording == 1
        assert len(list(lines)) <= len(story()) + 1


@pytest.mark.parametrize("data", [b"", b"no recording", b"\x28\xb5\x2f\xfd" + b"\x00" * 40])
def test_other_files_are_refused_with_a_reason(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not a recording of a monitor"):
        ReplaySource(path)
    with pytest.raises(UsageError, match="cannot read"):
        ReplaySource(tmp_path / "nothing")
    with pytest.raises(UsageError, match="exists already"):
        Recorder(path)


def test_the_demo_is_here_and_has_a_story() -> None:
    source = ReplaySource(DEMO_FILE)
    source.seek(source.length_s)
    fleet = shown(source)
    run = readings.current_run(fleet)
    assert run is not None
    assert len(run.rounds) == run.changed.rounds == 16
    assert run.rounds[-1].spent.keys() == {"work", "wait", "aggregate", "evaluate"}
    assert len(fleet.peers) == 5
    assert any(event.level != "info" for event in fleet.events)
    assert [job.changed.kind for job in fleet.jobs.values()] == ["private"]


def test_signs_keep_their_width_and_lose_their_teeth() -> None:
    assert ascii_only("● training ▁▂▃ ✕ 日本") == "* training _.- x ????"
    assert strip_controls("a\x1b[31mb\u202ec\x9b") == "a[31mbc"
    assert ascii_only("plain") == "plain"
