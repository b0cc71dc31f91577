"""Refusals: a known kind and a sentence without paths, which old agents and ledgers have too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import (
    BadMessage,
    CommonweightError,
    DataError,
    MissingPackage,
    NotAllowed,
    SchemaMismatch,
    TrainerFailed,
    UnknownName,
    UsageError,
)
from protocols.messages import refusals
from protocols.messages.refusals import FAILED, KINDS, MAX_CHARS, Refusal, decode, refusal_of

SECRET = "/home/ada/patients.csv"


def of_trainer(err: CommonweightError) -> TrainerFailed:
    """The error as the agent gets it from its trainer process."""
    return TrainerFailed(err.code, err.message, err.hint)


@given(kind=st.sampled_from(sorted(KINDS)), text=st.text(min_size=1), hint=st.text())
def test_every_refusal_travels_whole_and_is_bounded(kind: str, text: str, hint: str) -> None:
    for err in (TrainerFailed(kind, text, hint), CommonweightError(text, hint)):
        sent = refusal_of(err)
        assert len(sent.encode()) <= MAX_CHARS
        assert sent.text.isprintable()
        if sent.text:
            assert decode(sent.encode()) == sent


@given(st.text())
def test_any_text_from_the_network_is_a_refusal_of_a_known_kind(reason: str) -> None:
    found = decode(reason)
    assert found.kind in KINDS | {FAILED}
    assert found.text
    assert found.text.isprintable()


@pytest.mark.parametrize("kind", sorted(KINDS - refusals._WITH_MESSAGE))
def test_a_message_that_may_have_paths_or_data_stays_on_the_machine(kind: str) -> None:
    told = refusal_of(TrainerFailed(kind, f"cannot read {SECRET}", f"look at {SECRET}")).encode()
    assert SECRET not in told
    assert "commonweight-agent status" in told, "the next step"


def test_data_errors_keep_their_hint_and_say_where_it_is() -> None:
    told = refusal_of(of_trainer(DataError("there is no such file", SECRET))).text
    assert told == "there is no such file (its owner sees why: commonweight-agent status)"


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    err = MissingPackage("the task images", "pillow", "pip install 'commonweight[images]'")
    told = refusal_of(of_trainer(err))
    assert told.permanent
    assert told.text == (
        "the task images needs pillow, which is not installed on this machine "
        "(pip install 'commonweight[images]')"
    )


def test_a_long_hint_does_not_cut_the_message() -> None:
    told = refusal_of(of_trainer(UsageError("m" * 200, "h" * 200))).text
    assert told == "m" * 200


@pytest.mark.parametrize(
    ("err", "permanent"),
    [
        (UsageError("x"), True),
        (UnknownName("x"), True),
        (DataError("x"), True),
        (SchemaMismatch("a", "b", "c"), True),
        (NotAllowed("x"), True),
        (BadMessage("x"), False),
        (TrainerFailed("killed", "x"), False),
        (TrainerFailed("file", "x"), False),
    ],
)
def test_what_another_try_cannot_mend_is_permanent(err: CommonweightError, permanent: bool) -> None:
    assert refusal_of(err).permanent is permanent


@pytest.mark.parametrize(
    ("old", "kind", "text"),
    [
        ("the trainer: file", "file", "a file on its disk cannot be read or written"),
        ("the trainer: failed", "failed", "its trainer failed (failed)"),
        ("usage: no such setting (such as lr=1)", "usage", "no such setting (such as lr=1)"),
        ("schema: classes: expected a, found b", "schema", "classes: expected a, found b"),
        ("a sentence: of a stranger", FAILED, "a sentence: of a stranger"),
        ("", FAILED, "no reason given"),
    ],
)
def test_the_texts_of_older_agents_are_read(old: str, kind: str, text: str) -> None:
    assert decode(old) == Refusal(kind, text)
    assert refusals.from_ledger(FAILED, old) == Refusal(kind, text), "in an older ledger too"


def test_a_refusal_by_the_coordinator_keeps_its_reason() -> None:
    assert refusals.from_ledger("not finite", "output.bias").text == "not finite: output.bias"
