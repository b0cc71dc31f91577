"""What `run start` says about noise before the start."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.cli import noise_forecast
from coordinator.cli.noise_forecast import Known
from coordinator.runs import transitions
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from protocols.errors import UsageError
from protocols.model import schema_card
from protocols.model.weights import TensorSpec
from protocols.privacy.private_training import PrivateTraining

FULL: dict[str, Any] = {"batch_size": "all", "epochs": 1}
OWN = RunSpec(task="mnist", rounds=60, dp_epsilon=3.0, dp_clip=0.5, settings=FULL)
USERS = RunSpec(task="mnist", rounds=60, dp_user_epsilon=8.0, clip_norm=0.5)
TWENTY = Known("mnist-1", (200,) * 20, 11_530)


def told(spec: RunSpec, known: Known = Known(), peers: int = 200) -> str:
    return "\n".join(noise_forecast.lines(spec, peers, known))


def test_a_run_without_noise_says_nothing() -> None:
    assert told(RunSpec(task="mnist", rounds=3), TWENTY) == ""


def test_the_noise_of_each_peer_is_said_with_the_rows_of_an_earlier_run() -> None:
    text = told(OWN, TWENTY)
    assert "σ = 10.8 times the clip norm 0.5" in text
    assert "for ε 3 in 60 rounds" in text
    length = 10.77 * math.sqrt(20) / 4000 * math.sqrt(11_530)
    assert "by run mnist-1, 20 peers have 200 rows" in text
    assert f"mean gradient is {length:.3g} clip norms long" in text
    assert "learn little" not in text
    assert "known after a run of this task" in told(OWN)
    # Samples need more noise for their size: as the trainer computes it.
    sampled = replace(OWN, settings={"batch_size": 20, "epochs": 1})
    noise = PrivateTraining(3.0, 1e-5, 0.5, 60).event(0.1, 10).noise
    assert f"σ = {noise:.3g} " in told(sampled, TWENTY)


def test_shared_noise_is_that_of_the_sum_and_says_whom_it_trusts() -> None:
    shared = replace(OWN, secure=True, quorum=20, dp_shared=14)
    text = told(shared, TWENTY)
    assert "σ = 10.8 times the clip norm 0.5 on the sum of all peers' gradients" in text
    assert "14 honest peers share it, and a sum of fewer trusted peers is not unmasked" in text
    length = 10.77 * math.sqrt(20 / 14) / 4000 * math.sqrt(11_530)
    assert f"mean gradient is {length:.3g} clip norms long" in text
    assert "learn little" not in text
    assert "--dp-shared 1 relies on no other peer" in told(shared)
    costly = told(replace(shared, dp_epsilon=0.05), TWENTY)
    assert "times as many rows" in costly


def test_too_much_noise_is_said_with_what_less_would_take() -> None:
    """Each of the ways brings the noise to the length that is called enough."""
    costly = replace(OWN, dp_epsilon=0.5)
    text = told(costly, TWENTY)
    rounds, epsilon, rows = re.findall(
        r"one of: --rounds (\d+); --dp ([\d.]+); ([\d.]+) times as many rows", text
    )[0]
    more_rows = TWENTY._replace(rows=(math.ceil(200 * float(rows)),) * 20)
    for spec, known in (
        (replace(costly, rounds=int(rounds)), TWENTY),
        (replace(costly, dp_epsilon=float(epsilon)), TWENTY),
        (costly, more_rows),
    ):
        assert "learn little" not in told(spec, known)
    sampled = replace(costly, settings={})
    assert "--set batch_size=all --set epochs=1" in told(sampled, TWENTY)


def test_noise_for_whole_peers_warns_where_there_are_few() -> None:
    few = told(USERS, TWENTY, peers=20)
    assert re.search(r"with 20 peers 0\.\d+ on each weight", few)
    assert "with fewer than 100 peers, noise for whole peers usually hides the model" in few
    assert "times as many peers" in few
    assert "fewer than 100" not in told(USERS, TWENTY, peers=100)
    assert told(replace(USERS, clip_norm=0.0)) == ""  # the start is refused


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    with pytest.raises(UsageError, match="no noise is enough"):
        told(replace(OWN, dp_epsilon=0.01, dp_delta=1e-12, rounds=10**15))


def test_rows_and_weights_are_those_of_the_run() -> None:
    card = schema_card.make_card("mnist", "", {"w": TensorSpec("F32", (10, 3))})
    run = transitions.replay(
        "mnist-1",
        [
            run_events.RunStarted(OWN),
            run_events.PeerDescribed("A", card, num_examples=200, num_held_out=50),
            run_events.PeerDescribed("B", card),
            run_events.SchemaAgreed(card),
            run_events.WeightsInitialised("v0", "A"),
            run_events.RoundOpened(1, "v0", ("A", "B")),
            run_events.UpdateAccepted(1, "B", Update(num_examples=90)),
        ],
    )
    assert noise_forecast.known_from(run) == Known("mnist-1", (90, 200), 30)
    assert noise_forecast.known_from(None) == Known()
