"""A job's settings and events, as the ledger stores them. Pure.

A job's subject in the ledger is `job/ID`, a run's is its bare id. Events are in the past tense. New
fields need a default, because old ledgers must stay readable.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.messages.envelope import Count, Integer, MaybeDigest, Settings
from protocols.messages.jobs import INLINE_MAX_BYTES, MAX_STEP_BYTES, ModelRef, QuestionStep
from protocols.privacy.secagg.messages import MAX_COHORT

PREFIX = "job/"

_ShortText = Annotated[str, Meta(max_length=400)]
Kind = Literal["scatter", "private", "analyze"]


class JobState(StrEnum):
    """The states of a job."""

    WORKING = "working"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class Block(Struct, frozen=True, array_like=True):
    """Rows that stay together: a file of `nbytes` bytes with `rows` rows."""

    rows: Count
    nbytes: Count


class SecureStep(Struct, frozen=True, kw_only=True):
    """A step of a secure question. `session` names the sum.

    `requests`: of the step, one for all peers or one for each, in the order of the job's peers.
    """

    session: _ShortText
    step: QuestionStep
    requests: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_STEP_BYTES)], ...], Meta(max_length=MAX_COHORT)
    ] = ()


class JobSpec(Struct, frozen=True, kw_only=True):
    """The settings of a job. They never change.

    "scatter": the rows of the file `input`, split into `blocks`, are distributed over the peers,
    and each unit needs `quorum` equal answers. "private" and "analyze": each of `peers` (empty: all
    that are online) is asked about its own rows, and the job ends after `deadline_s` (0: never)
    with the answers that have arrived. `names`: the requester's names for the models. `secure`: the
    step that peers are asked for, if the question is secure. `method`: what the requester computes
    from several questions. `question`: the id that all jobs of one question have.
    """

    kind: Kind
    task: _ShortText = ""
    settings: Settings = {}
    models: Annotated[tuple[ModelRef, ...], Meta(max_length=1024)] = ()
    names: Annotated[tuple[_ShortText, ...], Meta(max_length=1024)] = ()
    input: MaybeDigest = ""
    suffix: _ShortText = ""
    blocks: Annotated[tuple[Block, ...], Meta(max_length=1 << 20)] = ()
    quorum: Integer = 1
    peers: Annotated[tuple[_ShortText, ...], Meta(max_length=1 << 16)] = ()
    deadline_s: float = 0.0
    min_group: Count = 10
    query: Annotated[str, Meta(max_length=256 * 1024)] = ""
    secure: SecureStep | None = None
    method: _ShortText = ""
    question: _ShortText = ""


class AnswerInfo(Struct, frozen=True, kw_only=True):
    """A valid answer. Its bytes are in `body`, or else on disk by digest.

    `seconds`: from the request to the answer.
    """

    digest: _ShortText
    nbytes: Integer
    rows: Integer
    seconds: float = 0.0
    body: Annotated[bytes, Meta(max_length=INLINE_MAX_BYTES)] = b""


class JobEvent(Struct, frozen=True, tag=True):
    """An entry of the ledger about a job; each kind is a subclass."""


class UnitEvent(JobEvent, frozen=True):
    """An event of one unit."""

    unit: int


class JobStarted(JobEvent, frozen=True):
    """`at` is Unix s, as in JobEnded."""

    spec: JobSpec
    at: float = 0.0


class UnitLeased(UnitEvent, frozen=True):
    """A peer is asked for a unit. The first lease defines the unit: blocks `first` up to `stop`."""

    peer: str
    first: int = 0
    stop: int = 0


class LeaseEnded(UnitEvent, frozen=True):
    """The peer is no longer awaited: it disconnected, is overdue, or failed."""

    peer: str
    reason: str


class UnitReturned(UnitEvent, frozen=True):
    """A complete answer has arrived, signed by a peer that was asked. Not validated yet."""

    peer: str
    given: AnswerInfo


class UnitVerified(UnitEvent, frozen=True):
    """The final answer of this unit."""

    digest: str


class AnswerDropped(UnitEvent, frozen=True):
    """An answer that does not count: late, malformed, or different from its quorum's."""

    peer: str
    reason: str
    detail: str = ""


class PeerExcused(JobEvent, frozen=True):
    """The peer cannot or may not do this job and gets no more units of it."""

    peer: str
    reason: str


class JobEnded(JobEvent, frozen=True):
    state: JobState
    because: str
    at: float = 0.0


class JobResumed(JobEvent, frozen=True):
    """A stopped or failed job continues. Excused peers may try again."""


class JobTaken(JobEvent, frozen=True):
    """The requester has the answers. Rows and answers can be deleted."""


_KINDS = {*JobEvent.__subclasses__(), *UnitEvent.__subclasses__()} - {UnitEvent}
#: The kind of each event in the ledger is its class's name: renaming a class needs a `tag`.
encode = msgspec.json.Encoder().encode
decode: Callable[[bytes], JobEvent] = msgspec.json.Decoder(
    functools.reduce(operator.or_, _KINDS)
).decode
