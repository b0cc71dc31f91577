"""What a peer tells of an ended run is checked, recorded once, and shown to operators."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from coordinator.cli import run_text
from coordinator.runs import comparisons
from coordinator.storage.run_events import PeerCompared
from protocols.messages.comparisons import COMPARISONS_PATH, Comparison, Estimate
from tests.hostile.tools import client, enroll, ours
from tests.support.in_process_fleet import fleet_of, some_data

GOOD = Comparison(
    run="r",
    metric="accuracy",
    rows=20,
    models={"alone": Estimate(0.6, 0.5, 0.7), "shared": Estimate(0.8, 0.7, 0.9)},
    gains={"alone": Estimate(-0.2, -0.3, -0.1)},
    rounds={"alone": 4},
)

#: By reason, fields that cannot be.
WRONG: dict[str, dict[str, Any]] = {
    "models are not compared by this metric": {"metric": "iban"},
    "the number of rows is not that of the peer": {"rows": 0},
    "a model is missing": {"models": {"shared": Estimate(0.8, 0.7, 0.9)}},
    "the gains are not those of the models": {"gains": {}},
    "a blend stays on its machine": {"models": GOOD.models | {"blend": Estimate(0.8, 0.7, 0.9)}},
    "the recommended model does not follow from the gains": {"recommended": "alone"},
    "a metric is out of its bounds": {"models": GOOD.models | {"shared": Estimate(1.2, 0.7, 1.3)}},
    "a comparison that is missing has no numbers": {"missing": "task"},
    "a gain is not within its interval": {"gains": {"alone": Estimate(-0.2, -0.1, 0.0)}},
}
#: Bodies that no agent sends, as JSON.
NO_COMPARISON = [
    b"",
    b"[]",
    b'{"run": "r"}',
    msgspec.json.encode(msgspec.to_builtins(GOOD) | {"rows": -1}),
    msgspec.json.encode(msgspec.to_builtins(GOOD) | {"run": "../r"}),
    msgspec.json.encode(GOOD).replace(b"0.8", b"1e999"),
    msgspec.json.encode(GOOD).replace(b"0.8", b"null"),
    msgspec.json.encode(GOOD).replace(b'"shared":', b'"other":'),
    msgspec.json.encode(GOOD) + b" " * 5000,
]


@pytest.mark.attack("20.wire", by="peer")
async def test_the_endpoint_takes_no_wrong_number_and_one_comparison_of_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a peer sends numbers that cannot be, of other runs, and for other peers."""
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    async with fleet_of(tmp_path, some_data(60, 1), some_data(60, 2)) as fleet:
        run = await fleet.finished(fleet.start(rounds=2, quorum=2))
        good, first = replace(GOOD, run=run.id), fleet.agents[0]
        stranger = enroll(fleet.hub, "stranger")

        def status(body: bytes, machine: Any = first.machine) -> int:
            with client(fleet) as http:
                headers = ours(machine, "POST", COMPARISONS_PATH, body)
                return http.post(COMPARISONS_PATH, content=body, headers=headers).status_code

        async def sent(told: Comparison | bytes, machine: Any = first.machine) -> int:
            body = told if isinstance(told, bytes) else msgspec.json.encode(told)
            return await asyncio.to_thread(status, body, machine)

        for body in NO_COMPARISON:
            assert await sent(body.replace(b'"r"', f'"{run.id}"'.encode())) in (400, 413), body
        for why, fields in WRONG.items():
            told = replace(good, **fields)
            assert comparisons.objection(run, first.peer, told) == why
            assert await sent(told) == 409, why
        assert await sent(replace(good, run="no-such-run")) == 409
        assert await sent(good, stranger) == 409
        assert fleet.facts(run.id, PeerCompared) == []

        assert await sent(good) == 204
        assert await sent(good) == 204, "the same again is no error"
        assert await sent(replace(good, rows=19)) == 409
        assert fleet.facts(run.id, PeerCompared) == [PeerCompared(first.peer, good)]
        (found,) = [one for one in fleet.hub.runs.all() if one.id == run.id]
        assert found.comparisons == {}, "no details of single peers stay in memory"
        assert fleet.hub.fleet.runs[run.id].changed.compared == found.num_compared == 1
        found = fleet.hub.runs.find(run.id)
        assert found.comparisons == {first.peer: good}
        text = "\n".join(run_text.describe(found, fleet.hub.fleet))
        assert "shared is recommended; accuracy: alone 0.6 [0.5, 0.7], shared 0.8" in text

        running = fleet.start(rounds=10_000, quorum=3)
        assert await sent(replace(good, run=running)) == 409
        fleet.hub.runs.stop(running)


def test_no_metric_of_a_peer_is_taken_where_the_run_tells_none() -> None:
    from coordinator.runs.state import Evaluation, Run
    from coordinator.storage.run_spec import RunSpec
    from protocols.messages.states import RunState

    for hides in ({"secure": True}, {"dp_epsilon": 3.0}, {"dp_user_epsilon": 8.0}):
        spec = RunSpec(task="tabular", rounds=2, **hides)
        run = Run(id="r", spec=spec, state=RunState.FINISHED, evaluations={"p": Evaluation(1, 20)})
        assert "shows no metric of a single peer" in comparisons.objection(run, "p", GOOD)
