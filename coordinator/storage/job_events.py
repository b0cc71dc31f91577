"""A job's settings and events, as the ledger stores them. Pure.

A job's subject in the ledger is `job/ID`, a run's is its bare id. Events are in the past tense. New
fields need a default, because old ledgers must stay readable.
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
    """Rows that stay together: a file of `nbytes` bytes with `rows` rows."""

    rows: int
    nbytes: int


class JobSpec(Struct, frozen=True, kw_only=True):
    """The settings of a job. They never change.

    "scatter": the rows of the file `input`, split into `blocks`, are distributed over the peers,
    and each unit needs `quorum` equal answers. "private" and "analyze": each of `peers` (empty: all
    that are online) is asked about its own rows, and the job ends after `deadline_s` (0: never)
    with the answers that have arrived. `names`: the requester's names for the models.
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


class AnswerInfo(Struct, frozen=True, kw_only=True):
    """A valid answer. Its bytes are in `body`, or else on disk by digest.

    `seconds`: from the request to the answer.
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
    """A peer is asked for a unit. The first lease defines the unit: blocks `first` up to `stop`."""

    unit: int
    peer: str
    first: int = 0
    stop: int = 0


class LeaseEnded(Struct, frozen=True, tag=True):
    """The peer is no longer awaited: it disconnected, is overdue, or failed."""

    unit: int
    peer: str
    reason: str


class UnitReturned(Struct, frozen=True, tag=True):
    """A complete answer has arrived, signed by a peer that was asked. Not validated yet."""

    unit: int
    peer: str
    given: AnswerInfo


class UnitVerified(Struct, frozen=True, tag=True):
    """The final answer of this unit."""

    unit: int
    digest: str


class AnswerDropped(Struct, frozen=True, tag=True):
    """An answer that does not count: late, malformed, or different from its quorum's."""

    unit: int
    peer: str
    reason: str
    detail: str = ""


class PeerExcused(Struct, frozen=True, tag=True):
    """The peer cannot or may not do this job and gets no more units of it."""

    peer: str
    reason: str


class JobEnded(Struct, frozen=True, tag=True):
    state: JobState
    because: str
    at: float = 0.0


class JobResumed(Struct, frozen=True, tag=True):
    """A stopped or failed job continues. Excused peers may try again."""


class JobTaken(Struct, frozen=True, tag=True):
    """The requester has the answers. Rows and answers can be deleted."""


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
