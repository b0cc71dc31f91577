"""Which runs an owner's trust allows: refused before any data is read."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from agent.clientapp import secure_rules
from agent.home.settings_schema import AgentSettings
from protocols.errors import AwaitingTrust, BadMessage, NotAllowed
from protocols.messages import refusals
from protocols.messages.work import Work, WorkKind
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg.messages import masked_codec
from tests.support.secure_cohort import me

TRUST = {me(number).peer: "" for number in (1, 2)}
PLAIN = Work(run="r", round=1, kind="train", task="mnist")
SECURE = Work(run="r", round=1, kind="train", task="mnist", codec=masked_codec("fp32"))
ASKED: tuple[WorkKind, ...] = ("describe", "train", "evaluate")


def of(work: Work, kind: WorkKind) -> Work:
    return Work(run=work.run, round=1, kind=kind, task=work.task, codec=work.codec)


@pytest.mark.attack("secure", by="coordinator")
@pytest.mark.parametrize("kind", ASKED)
def test_an_owner_of_secure_runs_does_no_plain_work(kind: WorkKind) -> None:
    """Attack: ask a peer, whose owner takes part in secure runs alone, for a plain update."""
    owner = AgentSettings(trust=TRUST, secure_min=3)
    with pytest.raises(NotAllowed, match="secure runs alone") as caught:
        secure_rules.check(of(PLAIN, kind), owner)
    told = refusals.refusal_of(caught.value)
    assert "run start --secure" in told.text
    assert told.permanent
    secure_rules.check(of(SECURE, kind), owner)
    secure_rules.check(of(PLAIN, kind), AgentSettings(trust=TRUST))


@pytest.mark.parametrize("kind", ASKED)
def test_a_secure_run_waits_until_the_owner_trusts_enough_peers(kind: WorkKind) -> None:
    one = dict(list(TRUST.items())[:1])
    for owner, more in (
        (AgentSettings(), 2), (AgentSettings(trust=one), 1),
        (AgentSettings(trust=TRUST, secure_min=5), 2),
    ):  # fmt: skip
        with pytest.raises(AwaitingTrust, match=f"a sum needs {more} more") as caught:
            secure_rules.check(of(SECURE, kind), owner)
        # The coordinator waits for this owner, as for a consent.
        told = refusals.decode(refusals.refusal_of(caught.value).encode())
        assert told.kind == AwaitingTrust.code
        assert "commonweight-agent trust add ID" in told.text
    secure_rules.check(of(SECURE, kind), AgentSettings(trust=TRUST))


def test_first_weights_need_no_trust() -> None:
    for work in (of(PLAIN, "init"), of(SECURE, "init"), of(SECURE, "holdings")):
        secure_rules.check(work, AgentSettings(secure_min=3))
    with pytest.raises(NotAllowed):
        secure_rules.check(of(PLAIN, "train"), AgentSettings(secure_min=3))


@pytest.mark.attack("secure", by="coordinator")
@pytest.mark.parametrize("private", [False, True], ids=["secure", "noise"])
def test_no_training_ahead_for_a_sum_or_with_noise(private: bool) -> None:
    """Attack: sign work that the coordinator's own rules refuse, with training for the next round
    from the peer's own weights in a secure run, or one with noise."""
    noise = PrivateTraining(epsilon=3.0, delta=1e-6, clip=1.0, rounds=9)
    work = replace(PLAIN, settings=noise.settings()) if private else SECURE
    owner = AgentSettings(trust=TRUST)
    secure_rules.check(work, owner)
    with pytest.raises(BadMessage, match="no training ahead"):
        secure_rules.check(replace(work, ahead=True), owner)
    secure_rules.check(replace(PLAIN, ahead=True), owner)


@pytest.mark.attack("3", by="coordinator")
@pytest.mark.parametrize("kind", ["describe", "evaluate"])
def test_only_training_goes_on_in_the_background(kind: WorkKind) -> None:
    """Attack: ask for an evaluation with training ahead, so that metrics of this peer's own weights
    leave as those of its next training."""
    with pytest.raises(BadMessage, match="training ahead"):
        secure_rules.check(replace(of(PLAIN, kind), ahead=True), AgentSettings())
