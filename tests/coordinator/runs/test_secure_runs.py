"""Secure runs through the real transport, ledger and spool, with agents in threads."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.runs.options import OUTLIER_LIMIT
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from protocols.errors import Unreachable, UsageError
from protocols.messages.states import RunState
from protocols.messages.work import Work
from tests.support.in_process_fleet import Agent, Fleet, first_weights, loss_of
from tests.support.secure_fleet import (
    DATA,
    before,
    events,
    largest_difference,
    plain_mean,
    refuse,
    secure_fleet,
    start,
    trust_each_other,
)
from tests.support.waiting import until

_STEPS = ["CohortFixed", "SharersFixed", *["MaskedUpdateAccepted"] * 3, "SurvivorsFixed"]


async def test_a_secure_run_learns_and_its_ledger_names_each_decision(tmp_path: Path) -> None:
    async with secure_fleet(tmp_path) as fleet:
        run = await fleet.finished(run_id := start(fleet))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
        losses = [
            sum(loss_of(model, data) for data in DATA[:3])
            for model in (first_weights(5), fleet.version(run.head))
        ]
        assert losses[1] < losses[0]
        everyone = tuple(sorted(agent.peer for agent in fleet.agents))
        assert [closed.contributors for closed in run.history] == [everyone] * 2
        assert events(fleet, run_id) == [*_STEPS, "VersionCommitted", *_STEPS] * 2
        version = fleet.version(run.history[0].digest)
        assert largest_difference(version, plain_mean(fleet, run, 1)) < 1e-4
        # The metrics are those of all peers together, and those of a single peer are nowhere.
        model = fleet.version(run.head)
        weights = [len(data.y) for data in DATA[:3]]
        loss = float(np.average([loss_of(model, data) for data in DATA[:3]], weights=weights))
        assert run.history[1].metrics["loss"] == pytest.approx(loss, rel=0.02)
        for fact in fleet.facts(run_id, run_events.UpdateAccepted):
            assert (fact.update.metrics, fact.update.tallies, fact.update.norm) == ({}, {}, 0.0)


@pytest.mark.attack("secure")
async def test_nothing_of_one_peer_is_on_the_coordinators_disk(tmp_path: Path) -> None:
    """Attack: search the spool, the ledger and all other files for the update of a peer."""
    async with secure_fleet(tmp_path) as fleet:
        found: dict[str, int] = {}

        def look(work: Work) -> None:
            """All masked updates are in the spool now."""
            base = fleet.version(work.base)
            made = [agent.trainer.made[1] for agent in fleet.agents]
            plain = [np.asarray(one["w"]) for one in made]
            plain += [np.asarray(one["w"]) - np.asarray(base["w"]) for one in made]
            read = [path.read_bytes() for path in fleet.home.rglob("*") if path.is_file()]
            for name, arrays in (("version", [np.asarray(base["w"])]), ("update", plain)):
                data = [array.tobytes() for array in arrays]
                patterns = [one[i : i + 8] for one in data for i in range(0, len(one) - 8, 4)]
                found[name] = sum(pattern in file for pattern in patterns for file in read)

        before(fleet.agents[0], "unmask", look)
        await fleet.finished(start(fleet, rounds=1))
        assert found["version"] > 0, "the search finds what is there"
        assert found["update"] == 0


async def test_a_peer_that_refuses_a_step_is_left_out_of_the_sum(tmp_path: Path) -> None:
    async with secure_fleet(tmp_path, 4) as fleet:
        before(fleet.agents[0], "mask", refuse)
        run = await fleet.finished(run_id := start(fleet, rounds=1))
        others = tuple(sorted(agent.peer for agent in fleet.agents[1:]))
        assert run.history[0].contributors == others
        assert fleet.refusals(run_id) == [(1, fleet.agents[0].peer, "failed")]
        version = fleet.version(run.head)
        assert largest_difference(version, plain_mean(fleet, run, 1)) < 1e-4


async def test_after_a_run_no_peer_has_secrets_of_its_sums(tmp_path: Path) -> None:
    """Also those that took no last step, as they refused one before."""
    async with secure_fleet(tmp_path, 4) as fleet:
        before(fleet.agents[0], "mask", refuse, times=2)
        run = await fleet.finished(start(fleet, rounds=1))
        assert run.state is RunState.FINISHED
        for agent in fleet.agents:
            folder = agent._folder / "secure"

            def is_clean(agent: Agent = agent, folder: Path = folder) -> bool:
                turn = agent._secure_turns().newest(run.id)
                weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
                return (turn is None or turn.told is not None) and not weights

            await until(is_clean)


async def test_a_lost_cohort_is_trained_again_with_new_keys(tmp_path: Path) -> None:
    async with secure_fleet(tmp_path) as fleet:
        for agent in fleet.agents[:2]:
            before(agent, "unmask", refuse)
        run = await fleet.finished(run_id := start(fleet, rounds=1))
        assert run.state is RunState.FINISHED
        (lost,) = fleet.facts(run_id, run_events.CohortLost)
        because = "1 of 3 shares, and a sum needs 2; 2 peers refused: not this time"
        assert lost.because == because
        trained = [("train", 1), ("train", 1), ("evaluate", 1)]
        assert [agent.trainer.worked[-3:] for agent in fleet.agents] == [trained] * 3
        turns = [fact.turn for fact in fleet.facts(run_id, run_events.CohortFixed)]
        assert turns == [0, 1, 1]
        assert largest_difference(fleet.version(run.head), plain_mean(fleet, run, 1)) < 1e-4


@pytest.mark.parametrize("step", ["share", "mask", "agree"])
async def test_a_peer_that_dies_in_a_step_does_not_stop_the_sum(tmp_path: Path, step: str) -> None:
    """It counts if its masked update is there; what masks it has in common with others is found."""
    async with secure_fleet(tmp_path, 4) as fleet:
        dying, *others = fleet.agents

        def die(_: Work) -> None:
            dying.stop()
            raise Unreachable("killed")

        before(dying, step, die)
        run = await fleet.finished(run_id := start(fleet, rounds=1, codec="int8"))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
        counted = fleet.agents if step == "agree" else others
        assert run.history[0].contributors == tuple(sorted(agent.peer for agent in counted))
        assert largest_difference(fleet.version(run.head), plain_mean(fleet, run, 1)) < 0.1


async def test_server_optimizers_and_noise_for_whole_peers_work_on_the_sum(tmp_path: Path) -> None:
    async with secure_fleet(tmp_path) as fleet:
        run = await fleet.finished(start(fleet, strategy="fedadam"))
        assert run.state is RunState.FINISHED
        assert run.history[1].strategy_state
        spec = {"dp_user_epsilon": 8.0, "weighting": "equal", "clip_norm": 1.0, "rounds": 1}
        run = await fleet.finished(run_id := start(fleet, **spec))
        (spent,) = fleet.facts(run_id, run_events.PrivacySpent)
        assert (spent.peers, spent.clip) == (3, pytest.approx(1.0, rel=1e-3))
        assert spent.clip > 1, "rounding may lengthen a change"
        assert run.history[0].metrics == {}


class Interrupted(NamedTuple):
    """A fleet whose coordinator has stopped while the sum waited for the shares of one peer."""

    fleet: Fleet
    run: str
    trained: list[int]


@asynccontextmanager
async def interrupted(folder: Path) -> AsyncIterator[Interrupted]:
    fleet, reached, gone = Fleet(folder), threading.Event(), threading.Event()

    def hold(_: Work) -> None:
        reached.set()
        assert gone.wait(20)
        raise Unreachable("the coordinator is gone")

    try:
        async with fleet.up():
            for number, data in enumerate(DATA[:3]):
                fleet.join(f"agent{number}", data)
            await fleet.online(3)
            trust_each_other(fleet)
            before(fleet.agents[0], "agree", hold)
            run_id = start(fleet, rounds=1)
            await until(reached.is_set)
        gone.set()
        yield Interrupted(fleet, run_id, [len(agent.trainer.worked) for agent in fleet.agents])
    finally:
        gone.set()
        await fleet.close()


async def test_a_restart_in_a_step_loses_nothing(tmp_path: Path) -> None:
    async with interrupted(tmp_path) as (fleet, run_id, trained):
        assert events(fleet, run_id) == _STEPS
        async with fleet.up():
            run = await fleet.finished(run_id)
            await fleet.close()
        assert run.state is RunState.FINISHED
        assert events(fleet, run_id) == [*_STEPS, "VersionCommitted", *_STEPS]
        after = [a.trainer.worked[n:] for a, n in zip(fleet.agents, trained, strict=True)]
        assert after == [[("evaluate", 1)]] * 3, "nothing is trained again"


async def test_without_the_masked_updates_the_round_is_repeated(tmp_path: Path) -> None:
    """As after a restore: a backup has the ledger and no spool."""
    async with interrupted(tmp_path) as (fleet, run_id, _):
        masked = list((fleet.home / "spool").rglob("*.safetensors"))
        assert len(masked) == 3 + 3 + 2, "cards, masked updates, the cohort's files"
        for path in masked:
            path.unlink()
        async with fleet.up():
            run = await fleet.finished(run_id)
            await fleet.close()
        assert run.state is RunState.FINISHED
        turns = [fact.turn for fact in fleet.facts(run_id, run_events.CohortFixed)]
        assert turns == [0, 1, 1]
        assert fleet.refusals(run_id) == []


REFUSED = [
    ({"quorum": 2}, "a quorum of at least 3"),
    ({"mode": "buffered", "buffer": 3}, "peers of a sum train on one version"),
    ({"late": "fold"}, "a masked update belongs to one sum"),
    ({"codec": "topk:0.02"}, "cannot send the codec topk:0.02"),
    ({"codec": "int8", "quorum": 259}, "too few bits are left"),
    ({"strategy": "fedmedian"}, "fedmedian, which compares single updates"),
    ({"strategy": "krum", "strategy_args": {"num_malicious_nodes": 0}}, "compares single updates"),
    ({"strategy": "qfedavg"}, "needs a metric of each peer"),
    ({"strategy": "scaffold"}, "keeps state for each peer"),
    ({"strategy": "fedbn"}, "keeps state for each peer"),
    ({"strategy": "flwr.serverapp.strategy:FedAvg"}, "a custom strategy may need single updates"),
    ({"outlier_limit": 3.0}, "--outlier-limit, which compares single updates"),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=lambda part: str(part)[:30])
def test_what_needs_single_updates_is_refused_before_the_start(
    spec: dict[str, Any], words: str
) -> None:
    allowed = {"task": "mnist", "rounds": 1, "quorum": 3, "secure": True}
    for possible in ({}, {"codec": "int8", "quorum": 258}):
        spec_rules.check(RunSpec(**(allowed | possible)))
    with pytest.raises(UsageError) as refused:
        spec_rules.check(RunSpec(**(allowed | spec)))
    assert words in refused.value.message
    assert refused.value.hint


def test_the_command_line_chooses_what_a_secure_run_needs() -> None:
    spec = build_order({"task": "mnist", "secure": True, "quorum": 3}).spec
    assert (spec.secure, spec.outlier_limit, spec.clip_norm) == (True, 0.0, 10.0)
    spec_rules.check(spec)
    typed = {"task": "mnist", "secure": True, "quorum": 3, "clip-norm": 2.0, "outlier-limit": 5.0}
    spec = build_order(typed).spec
    assert (spec.outlier_limit, spec.clip_norm) == (5.0, 2.0)
    plain = build_order({"task": "mnist"}).spec
    assert (plain.secure, plain.outlier_limit, plain.clip_norm) == (False, OUTLIER_LIMIT, 0.0)
