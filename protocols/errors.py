"""The error classes, as a tree: exit code, class, meaning. Pure.

CommonweightError                     1  something failed
├── UsageError                        2  the command or a setting is wrong
│   ├── TicketMalformed                  the ticket is truncated or mistyped
│   ├── UnknownName                      no such task, run, peer or setting
│   └── CannotBeMet                      the fleet cannot meet the quorum or deadline
├── Unreachable                       3  no answer from that address
│   └── StorageUnreachable               what the coordinator stores is out of reach
│       ├── LedgerUnreachable            … the database of the ledger
│       └── StoreUnreachable             … the store of the versions
├── Refused                           4  the other side refused the request
│   ├── NotEnrolled                      this machine has not joined a fleet
│   ├── NotAllowed                       the owner does not allow the task or its settings
│   │   └── AwaitingConsent              the owner has not decided about the task yet
│   │       ├── AwaitingReview           … nor approved the file that the operator offers
│   │       ├── AwaitingDecision         … whether to keep it after it was withdrawn
│   │       ├── AwaitingColumns          … nor which columns of the data it may use
│   │       └── AwaitingTrust            … nor which other peers it trusts
│   ├── LogConflict                      the coordinator's log of versions contradicts itself
│   ├── FormerLeader                     work of a coordinator that another one has replaced
│   ├── Unwitnessed                      too few pinned peers have shown what they see
│   ├── SecureRefused                    a step of a secure sum would tell too much
│   ├── UploadRefused                    the coordinator does not take an update
│   ├── UploadUnneeded                   nothing waits for an update any more
│   └── VersionSkew                      agent and coordinator versions are incompatible
├── NotRunning                        5  the agent or coordinator is not running
├── HomeError                         1  the home folder cannot be used
│   ├── HomeLocked                       another process uses it
│   ├── HomeTooNew                       a newer version wrote it
│   └── LeadershipLost                   another coordinator leads the fleet now
├── DiskFull                          1  the disk is full
├── PortInUse                         1  another process listens on the address
├── BadMessage                        1  malformed bytes, or a wrong signature
├── BadWeights                        1  malformed weights, or weights of another model
├── DataError                         1  a peer's data do not fit the run
│   └── SchemaMismatch                   data, model or task differ from those of other peers
├── OutOfMemory                       1  a training step does not fit into memory
├── TaskUnusable                      1  a task's file or package cannot be loaded
│   └── MissingPackage                   a package is not installed
├── SubfleetFailed                    1  the fleet of a peer cannot do the work
├── SubfleetStopped                   1  the operator of that fleet has stopped it
├── CannotPredict                     1  the task can train but not predict
├── TrainerFailed                     1  the trainer process failed or was ended
├── StrategyFailed                    1  a strategy raised an error
├── CohortLost                        1  too few peers are left to unmask a sum
└── UpdateRefused                     1  an update failed validation
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

#: A refusal has 300 characters (`messages.refusals`), and a hint for the operator.
_MAX_MISMATCHES_CHARS = 220


class ExitCode(IntEnum):
    """The exit status of a command."""

    OK = 0
    """The command succeeded."""
    FAILED = 1
    """The command failed; the message says why."""
    USAGE = 2
    """The command line or a setting is wrong."""
    UNREACHABLE = 3
    """The coordinator or the broker does not answer."""
    REFUSED = 4
    """This machine is not enrolled, or the other side refused the request."""
    NOT_RUNNING = 5
    """The agent or coordinator is not running."""
    FAULTS_FOUND = 6
    """`doctor` found a fault."""
    INTERRUPTED = 130
    """Ctrl-C."""


class CommonweightError(Exception):
    """Base of all our errors. `message`: what happened and why; `hint`: what to do next.

    A class names its `code`, the word of the wire, and the `exit_code` of a command that fails by
    it; without one it has that of its base.
    """

    exit_code: ExitCode = ExitCode.FAILED
    code: str = "failed"

    def __init_subclass__(cls, code: str = "", exit_code: ExitCode | None = None) -> None:
        cls.code = code or cls.code
        cls.exit_code = cls.exit_code if exit_code is None else exit_code

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CommonweightError, code="usage", exit_code=ExitCode.USAGE):
    """The command line or a setting is wrong."""


class TicketMalformed(UsageError, code="ticket_malformed"):
    """The ticket is truncated or mistyped."""


class UnknownName(UsageError, code="unknown_name"):
    """There is no task, run, peer or setting of this name."""


class CannotBeMet(UsageError, code="cannot_be_met"):
    """The fleet cannot meet the quorum or the deadline."""


class Unreachable(CommonweightError, code="unreachable", exit_code=ExitCode.UNREACHABLE):
    """The address does not answer."""


class StorageUnreachable(Unreachable, code="storage_unreachable"):
    """A database or store of the coordinator is out of reach. Work continues when it answers."""

    what = "its storage"


class LedgerUnreachable(StorageUnreachable, code="ledger_unreachable"):
    """The database of the ledger does not answer."""

    what = "the database of the ledger"


class StoreUnreachable(StorageUnreachable, code="store_unreachable"):
    """The store of the versions does not answer."""

    what = "the store of the versions"


class Refused(CommonweightError, code="refused", exit_code=ExitCode.REFUSED):
    """The other side refused the request."""


class NotEnrolled(Refused, code="not_enrolled"):
    """This machine has no certificate of a coordinator."""


class NotAllowed(Refused, code="not_allowed"):
    """The owner of this machine does not allow the task, or the settings of a run."""


class AwaitingConsent(NotAllowed, code="awaiting_consent"):
    """The owner of this machine has not decided about the task yet."""


class AwaitingReview(AwaitingConsent, code="awaiting_review"):
    """The operator offers the task, and the owner has not approved the file."""


class AwaitingDecision(AwaitingConsent, code="awaiting_decision"):
    """The operator withdrew the task, and the owner has not decided whether to keep it."""


class AwaitingColumns(AwaitingConsent, code="awaiting_columns"):
    """The owner allows the task, but has not said which columns of the data it may use."""


class AwaitingTrust(AwaitingConsent, code="awaiting_trust"):
    """The run is secure, and the owner has named too few peers to trust."""


#: What the owner has still to give, by the code of the refusal.
Awaited = Literal["consent", "review", "decision", "columns", "trust"]
AWAITED: dict[str, Awaited] = {
    AwaitingConsent.code: "consent",
    AwaitingReview.code: "review",
    AwaitingDecision.code: "decision",
    AwaitingColumns.code: "columns",
    AwaitingTrust.code: "trust",
}
#: Codes of refusals that end when the owner decides.
UNDECIDED_CODES = frozenset(AWAITED)


class LogConflict(Refused, code="log_conflict"):
    """Work contradicts the log of versions that the coordinator has shown."""


class FormerLeader(Refused, code="former_leader"):
    """Work of a coordinator that another one has replaced."""


class Unwitnessed(Refused, code="unwitnessed"):
    """Too few of the peers that the owner pinned have shown which versions they see."""


class SecureRefused(Refused, code="secure_refused"):
    """This peer does not take a step of a secure sum; `reason` is a short fixed word."""

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        default = "the coordinator contradicts itself: do not trust it, and ask its operator why"
        super().__init__(message, hint or default)
        self.reason = reason


class UploadRefused(Refused, code="upload_refused"):
    """The coordinator does not take an update. A retry would get the same answer."""


class UploadUnneeded(Refused, code="unneeded"):
    """The run or job of an upload has ended in the meantime."""


class VersionSkew(Refused, code="version_skew"):
    """Agent and coordinator are more than one minor version apart."""


class NotRunning(CommonweightError, code="not_running", exit_code=ExitCode.NOT_RUNNING):
    """The agent or coordinator is not running."""


class HomeError(CommonweightError, code="home"):
    """The home folder cannot be used."""


class HomeLocked(HomeError, code="home_locked"):
    """Another process uses this home."""


class HomeTooNew(HomeError, code="home_too_new"):
    """A newer version wrote the home."""


class LeadershipLost(HomeError, code="leadership_lost"):
    """Another coordinator leads the fleet. This one must start again from the ledger."""


class DiskFull(CommonweightError, code="disk_full"):
    """The disk is full. Work continues as soon as there is room."""


class PortInUse(CommonweightError, code="port_in_use"):
    """Another process listens on the address."""


class BadMessage(CommonweightError, code="bad_message"):
    """The bytes are malformed or their signature is wrong."""


class BadWeights(CommonweightError, code="bad_weights"):
    """The bytes are not canonical weights, or do not match the schema."""


class DataError(CommonweightError, code="data"):
    """A peer's data do not fit the run.

    The `message` leaves the machine, so it must not quote rows, file names or paths. The `hint`
    stays on the machine and may quote them.
    """


class SchemaMismatch(DataError, code="schema"):
    """A field of this peer's schema differs from that of the other peers."""

    def __init__(self, field: str, expected: str, found: str, hint: str = "") -> None:
        super().__init__(f"{field}: expected {expected}, found {found}", hint)
        self.field, self.expected, self.found = field, expected, found

    @classmethod
    def of_all(cls, mismatches: Sequence[SchemaMismatch]) -> SchemaMismatch:
        """One error for all mismatches of a peer; the first one has the fields.

        Its message names as many as fit into a refusal, and the number of the others.
        """
        first, *others = mismatches
        hints = dict.fromkeys(one.hint for one in mismatches if one.hint)
        combined = cls(first.field, first.expected, first.found, "; ".join(hints))
        for place, one in enumerate(others):
            if len(combined.message) + len(one.message) > _MAX_MISMATCHES_CHARS:
                combined.message += f"; and {len(others) - place} more"
                break
            combined.message += f"; {one.message}"
        combined.args = (combined.message,)
        return combined


class OutOfMemory(CommonweightError, code="out of memory"):
    """A training step does not fit into memory; `max_batch_size` examples would (0: none)."""

    def __init__(self, batch_size: int, fits: int) -> None:
        would = f"{fits} would fit" if fits else "not even one would fit"
        hint = f"commonweight run start … --set batch_size={fits}" if fits else "a smaller model"
        super().__init__(f"{batch_size} examples a step do not fit into memory; {would}", hint)
        self.max_batch_size = fits


class TaskUnusable(CommonweightError, code="task_unusable"):
    """A task's file or package cannot be loaded; only the type of the error leaves the machine."""


class MissingPackage(TaskUnusable, code="missing_package"):
    """A package is not installed. Message and hint name packages only: the operator sees them."""

    def __init__(self, what: str, package: str, install: str) -> None:
        message = f"{what} needs {package}, which is not installed on this machine"
        super().__init__(message, install)


class SubfleetFailed(CommonweightError, code="fleet_below"):
    """The fleet below this peer cannot do the work. The operator above sees the message."""


class SubfleetStopped(CommonweightError, code="fleet_below_stopped"):
    """The operator of the fleet below has stopped the work."""


class CannotPredict(CommonweightError, code="no predict"):
    """The task can train but not predict."""


#: Codes of errors whose messages may be sent to the other side.
SHAREABLE_CODES = frozenset({DataError.code, SchemaMismatch.code, CannotPredict.code})
#: Codes of errors about a run's settings, which the coordinator sent.
SETTINGS_CODES = frozenset({UsageError.code, UnknownName.code})


class TrainerFailed(CommonweightError, code="trainer_failed"):
    """The trainer process failed or was ended; `kind` is a short fixed word for the reason."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind


class StrategyFailed(CommonweightError, code="strategy_failed"):
    """A strategy raised an error; its run fails."""


class CohortLost(CommonweightError, code="cohort_lost"):
    """Too few peers of a cohort are left to unmask its sum. Nothing of any update is known."""


class UpdateRefused(CommonweightError, code="update_refused"):
    """An update failed validation; `reason` is a short fixed word for the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
