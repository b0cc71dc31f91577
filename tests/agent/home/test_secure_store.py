"""The turns of secure sums on disk: private, one value for each step, whatever kills the agent."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.clientapp.secure_turns import SecureTurns
from agent.home import secure_store
from agent.home.secure_store import TurnKey, TurnStore, key_of
from benchmarks.faults import failpoint_names
from protocols.errors import HomeError, SecureRefused
from protocols.local.failpoints import VARIABLE
from protocols.messages.envelope import Digest
from protocols.privacy.secagg import keys, peer
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import SIGNED_CARD, ReadyRequest, UnmaskRequest
from protocols.privacy.secagg.turn import Turn
from tests.support.fleet_harness import ROOT
from tests.support.secure_cohort import BASE, FLEET, RUN, Machine, me, plan, share_request

BY_PEER = {me(number).peer: number for number in range(3)}
PINS = Pins(frozenset(BY_PEER), 2)


def turn(run: str = RUN, turn: int = 0, base: Digest = BASE) -> Turn:
    request = ReadyRequest(fleet=FLEET, run=run, round=1, turn=turn, base=base)
    return peer.make_card(me(0), request, 7, bytes([turn + 1]) * 32)


def test_a_turn_comes_back_and_the_file_is_private(tmp_path: Path) -> None:
    store = TurnStore(tmp_path)
    assert store.get(TurnKey(RUN, 1, 0)) is None
    store.begin(turn())
    store.close()
    assert TurnStore(tmp_path).get(TurnKey(RUN, 1, 0)) == turn()
    assert stat.S_IMODE((tmp_path / secure_store.FILE).stat().st_mode) == 0o600


def test_a_newer_turn_deletes_the_secrets_of_older_ones(tmp_path: Path) -> None:
    store, secret = TurnStore(tmp_path), turn().master
    store.begin(turn())
    store.begin(turn("run-2"))
    assert any(secret in file.read_bytes() for file in tmp_path.iterdir())
    store.begin(turn(turn=1))
    assert store.get(TurnKey("run-2", 1, 0)) is not None
    store.end_run("run-2")
    for key in (TurnKey(RUN, 1, 0), TurnKey("run-2", 1, 0)):
        with pytest.raises(SecureRefused, match="is over"):
            store.get(key)
    for file in tmp_path.iterdir():
        assert secret not in file.read_bytes()
    assert store.get(TurnKey(RUN, 1, 1)) == turn(turn=1)


def test_secrets_that_a_killed_agent_has_just_deleted_are_gone_after_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, secret = TurnStore(tmp_path), turn().master
    store.begin(turn())
    with monkeypatch.context() as patch:
        patch.setattr(TurnStore, "_purge", lambda _: None)
        store.begin(turn(turn=1))
    assert any(secret in file.read_bytes() for file in tmp_path.iterdir())
    again = TurnStore(tmp_path)
    assert not any(secret in file.read_bytes() for file in tmp_path.iterdir())
    assert again.get(TurnKey(RUN, 1, 1)) == turn(turn=1)


def test_a_home_of_an_older_version_keeps_its_turns(tmp_path: Path) -> None:
    """Its file has a rollback journal in place of a write-ahead log."""
    store = TurnStore(tmp_path)
    store.begin(turn())
    assert store._db.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    store.close()
    again = TurnStore(tmp_path)
    assert again.get(TurnKey(RUN, 1, 0)) == turn()
    assert again._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_home_that_leaves_its_fleet_has_no_secrets_and_makes_no_card_again(
    tmp_path: Path,
) -> None:
    secure_store.forget_all(tmp_path)
    assert list(tmp_path.iterdir()) == [], "a home without secure runs gets no file"
    store = TurnStore(tmp_path)
    store.begin(turn())
    store.begin(turn("run-2"))
    assert store.newest(RUN) == turn()
    store.close()
    secure_store.forget_all(tmp_path)
    assert turn().master not in (tmp_path / secure_store.FILE).read_bytes()
    again = TurnStore(tmp_path)
    assert again.newest(RUN) is None
    with pytest.raises(HomeError, match="UNIQUE"):
        again.begin(turn())


def test_a_card_is_made_once(tmp_path: Path) -> None:
    store = TurnStore(tmp_path)
    store.begin(turn())
    with pytest.raises(HomeError, match="UNIQUE"):
        store.begin(turn())
    store.end_run(RUN)
    with pytest.raises(HomeError, match="UNIQUE"):
        store.begin(turn())


def test_no_step_is_taken_twice(tmp_path: Path) -> None:
    store, old = TurnStore(tmp_path), turn()
    store.begin(old)
    masked = replace(old, upload="12" * 32)
    store.advance(old, masked, "upload")
    with pytest.raises(SecureRefused, match="another step was taken"):
        store.advance(old, replace(old, upload="34" * 32), "upload")
    with pytest.raises(SecureRefused, match="would change what this peer has recorded"):
        store.advance(masked, replace(masked, upload="34" * 32), "upload")
    assert store.get(key_of(old)) == masked


def test_a_file_that_is_no_database_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / secure_store.FILE).write_text("nonsense " * 1000)
    with pytest.raises(HomeError, match="not a database") as caught:
        TurnStore(tmp_path)
    assert "could then answer twice" in caught.value.hint


# --- an agent that is killed at each step ----------------------------------------------------


def take_part(
    home: Path, draw: Callable[[int], bytes] = random.SystemRandom().randbytes
) -> SecureTurns:
    """A whole secure sum of three peers, of which this one has its turns on disk.

    It draws its secrets with `draw`.
    """
    turns = SecureTurns(me(0), TurnStore(home), lambda: PINS, draw)
    rnd = random.Random(1)
    machines = {(one := Machine(number, PINS, rnd)).peer: one for number in range(3)}
    mine = machines[me(0).peer]
    mine.turns, mine.store = turns, None  # type: ignore[assignment]
    state = Aggregator(
        CohortFixed(request=share_request([m.card() for m in machines.values()], plan()))
    )
    while not state.can_recover():
        for name, machine in machines.items():
            if (asked := state.request_for(name)) is not None:
                answer = machine.answer(asked)
                state.take(name, answer)
        if not state.sharers:
            state.apply(state.fix_sharers())
        elif not state.survivors:
            state.apply(state.fix_survivors())
    return turns


QUICK = ("agent.secure.recording.mask", "agent.secure.recorded.agree")
POINTS = [
    pytest.param(point, marks=() if point in QUICK else pytest.mark.long)
    for point in failpoint_names.SECURE
]


@pytest.mark.parametrize("point", POINTS)
def test_an_agent_killed_at_any_record_changes_no_recorded_answer(
    point: str, tmp_path: Path
) -> None:
    program = (
        "from pathlib import Path; import sys\n"
        "from tests.agent.home import test_secure_store as test\n"
        "test.take_part(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    env = os.environ | {VARIABLE: point, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=env, capture_output=True, check=False, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    recorded = _turn_on_disk(tmp_path)
    assert (recorded is None) == (point == "agent.secure.recording.begin")
    if recorded is None or recorded.told is None:
        take_part(tmp_path)
    with pytest.raises(SecureRefused, match="has taken its last step"):
        take_part(tmp_path)
    now = _turn_on_disk(tmp_path)
    assert now is not None
    assert now.told is not None
    if recorded is not None:  # what was on disk has not changed
        assert now.card == recorded.card
        for name in ("cohort", "mask", "upload", "agree", "told"):
            assert getattr(recorded, name) in (None, "", getattr(now, name))


def test_with_the_last_answer_the_secrets_are_deleted(tmp_path: Path) -> None:
    secret = bytes(range(32))
    turns = take_part(tmp_path, lambda nbytes: secret[:nbytes])
    now, own = _turn_on_disk(tmp_path), keys.CardSecrets(secret)
    assert now is not None
    assert now.agree is not None
    assert now.told is not None
    assert keys.public_of(own.mask_key) == SIGNED_CARD.decode(now.card.card).mask_key
    for data in (secret, own.self_seed, own.mask_seed):
        assert all(data not in file.read_bytes() for file in tmp_path.iterdir())
    # A coordinator that restarts asks for the last two steps again.
    key, request = key_of(now), UnmaskRequest(cohort=now.agree.cohort, signatures={})
    assert turns.agree(key, now.agree).cohort == request.cohort
    assert turns.unmask(key, request) == now.told


def _turn_on_disk(home: Path) -> Turn | None:
    return TurnStore(home).get(TurnKey(RUN, 1, 0))
