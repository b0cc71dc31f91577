"""What happens to a job: its settings and its events, as the ledger keeps them. Pure.

A job's subject in the ledger is `job/ID`: so runs, which have bare ids, are told from it. Facts are
in the past tense, and a new field has a default: old ledgers are read for ever.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec
from msgspec import Struct

from protocols.messages.jobs import ModelRef, Setting

PREFIX = "job/"

Kind = Literal["scatter", "private", "analyze"]


class JobState(StrEnum):
    """The states of a job."""

    WORKING = "working"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class Block(Struct, frozen=True, array_like=True):
    """Rows that are never parted: a file of `nbytes` bytes with `rows` rows."""

    rows: int
    nbytes: int


class JobSpec(Struct, frozen=True, kw_only=True):
    """What was asked for; never changed.

    "scatter": the rows of the file `input`, cut in `blocks`, are spread over the peers, and each
    unit needs `quorum` equal answers. "private" and "analyze": each of `peers` is asked about its
    own rows (none named: all that are there), and after `deadline_s` (0: never) what has come by
    then is the answer. `names` are what the requester called the models.
    """

    kind: Kind
    task: str = ""
    settings: dict[str, Setting] = {}
    models: tuple[ModelRef, ...] = ()
    names: tuple[str, ...] = ()
    input: str = ""
    suffix: str = ""
    blocks: tuple[Block, ...] = ()
    quorum: int = 1
    peers: tuple[str, ...] = ()
    deadline_s: float = 0.0
    min_group: int = 10
    query: str = ""
    requester: str = ""


class Given(Struct, frozen=True, kw_only=True):
    """A valid answer: where its bytes are (`body`, else on disk by digest), and what it took.

    `seconds`: from the question to the answer.
    """

    digest: str
    nbytes: int
    rows: int
    seconds: float = 0.0
    body: bytes = b""


class JobStarted(Struct, frozen=True, tag=True):
    """`at` is Unix s, as in JobEnded."""

    spec: JobSpec
    at: float = 0.0


class UnitLeased(Struct, frozen=True, tag=True):
    """A peer is asked for a unit; the first time, it is cut: blocks `first` up to `stop`."""

    unit: int
    peer: str
    first: int = 0
    stop: int = 0


class LeaseEnded(Struct, frozen=True, tag=True):
    """The peer is not waited for any more: it went away, it is overdue, or it failed."""

    unit: int
    peer: str
    reason: str


class UnitReturned(Struct, frozen=True, tag=True):
    """An answer has arrived whole, signed by a peer that was asked; not looked into yet."""

    unit: int
    peer: str
    given: Given


class UnitVerified(Struct, frozen=True, tag=True):
    """The answer of this unit, for good."""

    unit: int
    digest: str


class AnswerDropped(Struct, frozen=True, tag=True):
    """An answer that does not count: late, malformed, or another than its quorum's."""

    unit: int
    peer: str
    reason: str
    detail: str = ""


class PeerExcused(Struct, frozen=True, tag=True):
    """The peer cannot or may not do this job; it gets no more of it."""

    peer: str
    reason: str


class JobEnded(Struct, frozen=True, tag=True):
    state: JobState
    because: str
    at: float = 0.0


class JobResumed(Struct, frozen=True, tag=True):
    """A job that was stopped or has failed goes on; whom it had excused may try again."""


class JobTaken(Struct, frozen=True, tag=True):
    """The requester has the answers: rows and answers need not be kept any more."""


JobEvent = (
    JobStarted
    | UnitLeased
    | LeaseEnded
    | UnitReturned
    | UnitVerified
    | AnswerDropped
    | PeerExcused
    | JobEnded
    | JobResumed
    | JobTaken
)

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(JobEvent).decode
