"""The gate: every refusal by its word, and what passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.runs import transitions, validation
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from protocols.enrollment import identity
from protocols.errors import BadWeights, UpdateRefused
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model.weights import Weights

BASE, DIGEST = "0" * 64, "1" * 64
MODEL = Weights({"w": np.zeros((20, 10), np.float32), "steps": np.array(3, np.int64)})


def a_run(*then: run_events.RunEvent, **spec: Any) -> Run:
    asked = run_events.RoundOpened(1, BASE, ("A", "B"))
    started = run_events.RunStarted(RunSpec(task="t", rounds=2, **spec))
    return transitions.replay(
        "r", [started, run_events.WeightsInitialised(BASE, "A"), asked, *then]
    )


@dataclass
class Desk:
    """Two peers with keys, and a run that waits for their updates."""

    run: Run = field(default_factory=a_run)
    keys: dict[str, identity.SigningKey] = field(
        default_factory=lambda: {peer: identity.new_signing_key() for peer in "AB"}
    )

    def verify(self, sender: str, signature: bytes, signed: bytes) -> bool:
        key = self.keys.get(sender)
        return key is not None and identity.verify(identity.public_bytes(key), signature, signed)

    def present(self, sender: str = "A", signer: str = "A", **changed: Any) -> None:
        claim = UpdateClaim(
            run="r",
            round=1,
            kind="train",
            peer="A",
            base=BASE,
            digest=DIGEST,
            nbytes=1000,
            num_examples=5,
            nonce="n",
        )
        claim = replace(claim, **changed)
        payload, signature = SIGNED_CLAIM.seal(claim, self.keys[signer].sign)
        self.present_bytes(sender, claim, payload, signature)

    def present_bytes(
        self, sender: str, claim: UpdateClaim, payload: bytes, signature: bytes
    ) -> None:
        expected = validation.expected_reply(self.run, MODEL.schema)
        validation.check_claim(self.run, expected, sender, claim, payload, signature, self.verify)


def test_a_good_claim_passes() -> None:
    Desk().present()


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("bad signature", {"signer": "B"}),
        ("bad signature", {"peer": "B"}),
        ("bad signature", {"sender": "B"}),
        ("another run", {"run": "x"}),
        ("late", {"round": 0}),
        ("late", {"round": 2}),
        ("late", {"kind": "evaluate"}),
        ("late", {"kind": "init"}),
        ("wrong base", {"base": "2" * 64}),
        ("wrong base", {"base": ""}),
        ("bad example count", {"num_examples": 0}),
        ("bad example count", {"num_examples": -80}),
        ("bad example count", {"num_examples": 10_000_001}),
    ],
)
def test_each_refusal_has_its_word(word: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UpdateRefused) as caught:
        Desk().present(**arguments)
    assert caught.value.reason == word
    assert caught.value.message


def test_a_payload_that_was_changed_is_not_signed() -> None:
    desk = Desk()
    claim = UpdateClaim(
        run="r",
        round=1,
        kind="train",
        peer="A",
        base=BASE,
        digest=DIGEST,
        nbytes=1,
        num_examples=5,
        nonce="n",
    )
    payload, signature = SIGNED_CLAIM.seal(claim, desk.keys["A"].sign)
    for wrong, by in ((payload.replace(b"5", b"6"), signature), (payload, bytes(64))):
        with pytest.raises(UpdateRefused, match="not signed"):
            desk.present_bytes("A", claim, wrong, by)


def test_an_answer_counts_once() -> None:
    accepted = run_events.UpdateAccepted(1, "A", Update(digest=DIGEST, num_examples=5))
    with pytest.raises(UpdateRefused) as caught:
        Desk(a_run(accepted)).present()
    assert caught.value.reason == "replay"


def test_who_was_not_asked_is_refused() -> None:
    desk = Desk(a_run())
    desk.keys["C"] = identity.new_signing_key()
    with pytest.raises(UpdateRefused) as caught:
        desk.present(sender="C", signer="C", peer="C")
    assert caught.value.reason == "not asked"


def test_an_unknown_key_is_refused() -> None:
    desk = Desk()
    stranger = Desk()
    desk.keys["B"] = stranger.keys["B"]
    del desk.keys["A"]
    with pytest.raises(UpdateRefused) as caught:
        desk.present(signer="B")
    assert caught.value.reason == "bad signature"


def test_the_operators_cap_on_examples_holds() -> None:
    desk = Desk(a_run(max_examples=4))
    with pytest.raises(UpdateRefused, match="1…4"):
        desk.present()


def test_a_peer_that_was_refused_or_lost_may_still_answer_well() -> None:
    for fact in (
        run_events.PeerLost("A", "went away"),
        run_events.UpdateRefused(1, "A", "not finite", "x", "train"),
    ):
        Desk(a_run(fact)).present()


# --- weights ---------------------------------------------------------------------------------


def changed(**tensors: Any) -> Weights:
    found = {name: np.array(MODEL[name]) for name in MODEL} | tensors
    return Weights({name: array for name, array in found.items() if array is not None})


EXPECTED = validation.ExpectedReply("train", BASE, MODEL.schema)


def test_good_weights_pass() -> None:
    update = changed()
    assert validation.check_weights(EXPECTED, lambda: update) is update


@pytest.mark.parametrize(
    ("word", "update"),
    [
        ("bad weights", changed(w=np.zeros((1, 10), np.float32))),
        ("bad weights", changed(w=np.zeros((20, 10), np.float64))),
        ("bad weights", changed(w=None)),
        ("bad weights", changed(extra=np.zeros(1))),
        ("not finite", changed(w=np.full((20, 10), np.nan, np.float32))),
        ("not finite", changed(w=np.full((20, 10), np.inf, np.float32))),
    ],
)
def test_weights_that_must_not_be_summed(word: str, update: Weights) -> None:
    for gate_of in (validation.check_weights, partial(validation.check_update, base=MODEL)):
        with pytest.raises(UpdateRefused) as caught:
            gate_of(EXPECTED, lambda: update)
        assert caught.value.reason == word


def test_missing_bytes_are_refused() -> None:
    def missing() -> Weights:
        raise BadWeights("the update's bytes were never uploaded")

    with pytest.raises(UpdateRefused, match="never uploaded"):
        validation.check_weights(EXPECTED, missing)


def test_first_weights_have_no_schema_to_meet_but_must_be_finite() -> None:
    first = validation.ExpectedReply("init", "", {})
    validation.check_weights(first, lambda: changed(extra=np.zeros(1)))
    with pytest.raises(UpdateRefused, match="'w'"):
        validation.check_weights(first, lambda: changed(w=np.array([np.nan])))


def test_what_is_expected_in_each_state() -> None:
    closed = a_run(run_events.TrainingClosed(1, ("A",)))
    committed = transitions.apply(closed, run_events.VersionCommitted(1, DIGEST, BASE, ("A",), {}))
    waiting = Run(id="r", spec=a_run().spec)
    assert validation.expected_reply(waiting, MODEL.schema)[:3] == ("init", "", {})
    assert validation.expected_reply(a_run(), MODEL.schema)[:3] == ("train", BASE, MODEL.schema)
    assert committed.state is RunState.EVALUATING
    assert validation.expected_reply(committed, MODEL.schema)[:2] == ("evaluate", DIGEST)


# --- norms -----------------------------------------------------------------------------------


def test_the_norm_is_that_of_the_difference() -> None:
    update = changed(w=np.full((20, 10), 0.5, np.float32), steps=np.array(99, np.int64))
    assert validation.update_norm(update, MODEL) == pytest.approx(0.5 * math.sqrt(200))
    assert validation.update_norm(MODEL, MODEL) == 0.0


def test_bf16_counts_too() -> None:
    def bf16(value: float) -> Weights:
        bits = np.full(4, value, np.float32).view(np.uint32) >> 16
        return Weights({"w": bits.astype(np.uint16)}, ["w"])

    assert validation.update_norm(bf16(1.0), bf16(3.0)) == 4.0


def test_the_norm_of_a_large_tensor_is_right_to_float32() -> None:
    rng = np.random.default_rng(1)
    old = rng.standard_normal(200_001).astype(np.float32)
    new = (old + 1e-3 * rng.standard_normal(200_001)).astype(np.float32)
    exact = np.linalg.norm(new.astype(np.float64) - old)
    assert validation.update_norm(Weights({"w": new}), Weights({"w": old})) == pytest.approx(
        exact, rel=2e-7
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [1e-30, 1e-21, 1.0, 1e19, 1e38])
def test_the_norm_is_right_where_squares_do_not_fit_float32(far: float) -> None:
    update = Weights({"w": np.full(1000, far, np.float32)})
    base = Weights({"w": np.zeros(1000, np.float32)})
    assert validation.update_norm(update, base) == pytest.approx(far * math.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 511, 512, 70_000])
def test_what_is_not_finite_is_found_by_the_norm_wherever_it_is(wrong: float, at: int) -> None:
    model = Weights({"w": np.ones(70_001, np.float32)})
    update = np.zeros(70_001, np.float32)
    update[at] = wrong
    expected = validation.ExpectedReply("train", BASE, model.schema)
    with pytest.raises(UpdateRefused, match="'w'") as caught:
        validation.check_update(expected, lambda: Weights({"w": update}), model)
    assert caught.value.reason == "not finite"


@pytest.mark.filterwarnings("error")
def test_the_norm_of_huge_weights_is_a_number() -> None:
    """An infinity would go into the ledger as null, which no later start could read."""
    for far in (1e200, 1.7e308):
        norm = validation.update_norm(
            Weights({"w": np.array([far, far])}), Weights({"w": np.array([-far, far])})
        )
        assert math.isfinite(norm)
        fact = run_events.UpdateAccepted(1, "A", Update(num_examples=1, norm=norm))
        assert run_events.decode(run_events.encode(fact)) == fact
