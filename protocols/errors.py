"""The error classes, as a tree: exit code, class, meaning. Pure.

CommonweightError                     1  something failed
├── UsageError                        2  the command or a setting is wrong
│   ├── TicketMalformed                  the ticket is truncated or mistyped
│   ├── UnknownName                      no such task, run, peer or setting
│   └── CannotBeMet                      the fleet cannot meet the quorum or deadline
├── Unreachable                       3  no answer from that address
├── Refused                           4  the other side refused the request
│   ├── NotEnrolled                      this machine has not joined a fleet
│   ├── NotAllowed                       the owner does not allow the task or its settings
│   │   └── AwaitingConsent              the owner has not decided about the task yet
│   │       ├── AwaitingColumns          … nor which columns of the data it may use
│   │       └── AwaitingTrust            … nor which other peers it trusts
│   ├── LogConflict                      the coordinator's log of versions contradicts itself
│   ├── Unwitnessed                      too few pinned peers have shown what they see
│   ├── SecureRefused                    a step of a secure sum would tell too much
│   ├── UploadRefused                    the coordinator does not take an update
│   ├── UploadUnneeded                   nothing waits for an update any more
│   └── VersionSkew                      agent and coordinator versions are incompatible
├── NotRunning                        5  the agent or coordinator is not running
├── HomeError                         1  the home folder cannot be used
│   ├── HomeLocked                       another process uses it
│   └── HomeTooNew                       a newer version wrote it
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
    """Base of all our errors. `message`: what happened and why; `hint`: what to do next."""

    exit_code: ExitCode = ExitCode.FAILED
    code: str = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CommonweightError):
    """The command line or a setting is wrong."""

    exit_code = ExitCode.USAGE
    code = "usage"


class TicketMalformed(UsageError):
    """The ticket is truncated or mistyped."""

    code = "ticket_malformed"


class UnknownName(UsageError):
    """There is no task, run, peer or setting of this name."""

    code = "unknown_name"


class CannotBeMet(UsageError):
    """The fleet cannot meet the quorum or the deadline."""

    code = "cannot_be_met"


class Unreachable(CommonweightError):
    """The address does not answer."""

    exit_code = ExitCode.UNREACHABLE
    code = "unreachable"


class Refused(CommonweightError):
    """The other side refused the request."""

    exit_code = ExitCode.REFUSED
    code = "refused"


class NotEnrolled(Refused):
    """This machine has no certificate of a coordinator."""

    code = "not_enrolled"


class NotAllowed(Refused):
    """The owner of this machine does not allow the task, or the settings of a run."""

    code = "not_allowed"


class AwaitingConsent(NotAllowed):
    """The owner of this machine has not decided about the task yet."""

    code = "awaiting_consent"


class AwaitingColumns(AwaitingConsent):
    """The owner allows the task, but has not said which columns of the data it may use."""

    code = "awaiting_columns"


class AwaitingTrust(AwaitingConsent):
    """The run is secure, and the owner has named too few peers to trust."""

    code = "awaiting_trust"


#: What the owner has still to give, by the code of the refusal.
Awaited = Literal["consent", "columns", "trust"]
AWAITED: dict[str, Awaited] = {
    AwaitingConsent.code: "consent",
    AwaitingColumns.code: "columns",
    AwaitingTrust.code: "trust",
}
#: Codes of refusals that end when the owner decides.
UNDECIDED_CODES = frozenset(AWAITED)


class LogConflict(Refused):
    """Work contradicts the log of versions that the coordinator has shown."""

    code = "log_conflict"


class Unwitnessed(Refused):
    """Too few of the peers that the owner pinned have shown which versions they see."""

    code = "unwitnessed"


class SecureRefused(Refused):
    """This peer does not take a step of a secure sum; `reason` is a short fixed word."""

    code = "secure_refused"

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        default = "the coordinator contradicts itself: do not trust it, and ask its operator why"
        super().__init__(message, hint or default)
        self.reason = reason


class UploadRefused(Refused):
    """The coordinator does not take an update. A retry would get the same answer."""

    code = "upload_refused"


class UploadUnneeded(Refused):
    """The run or job of an upload has ended in the meantime."""

    code = "unneeded"


class VersionSkew(Refused):
    """Agent and coordinator are more than one minor version apart."""

    code = "version_skew"


class NotRunning(CommonweightError):
    """The agent or coordinator is not running."""

    exit_code = ExitCode.NOT_RUNNING
    code = "not_running"


class HomeError(CommonweightError):
    """The home folder cannot be used."""

    code = "home"


class HomeLocked(HomeError):
    """Another process uses this home."""

    code = "home_locked"


class HomeTooNew(HomeError):
    """A newer version wrote the home."""

    code = "home_too_new"


class DiskFull(CommonweightError):
    """The disk is full. Work continues as soon as there is room."""

    code = "disk_full"


class PortInUse(CommonweightError):
    """Another process listens on the address."""

    code = "port_in_use"


class BadMessage(CommonweightError):
    """The bytes are malformed or their signature is wrong."""

    code = "bad_message"


class BadWeights(CommonweightError):
    """The bytes are not canonical weights, or do not match the schema."""

    code = "bad_weights"


class DataError(CommonweightError):
    """A peer's data do not fit the run.

    The `message` leaves the machine, so it must not quote rows, file names or paths. The `hint`
    stays on the machine and may quote them.
    """

    code = "data"


class SchemaMismatch(DataError):
    """A field of this peer's schema differs from that of the other peers."""

    code = "schema"

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


class OutOfMemory(CommonweightError):
    """A training step does not fit into memory; `max_batch_size` examples would (0: none)."""

    code = "out of memory"

    def __init__(self, batch_size: int, fits: int) -> None:
        would = f"{fits} would fit" if fits else "not even one would fit"
        hint = f"commonweight run start … --set batch_size={fits}" if fits else "a smaller model"
        super().__init__(f"{batch_size} examples a step do not fit into memory; {would}", hint)
        self.max_batch_size = fits


class TaskUnusable(CommonweightError):
    """A task's file or package cannot be loaded; only the type of the error leaves the machine."""

    code = "task_unusable"


class MissingPackage(TaskUnusable):
    """A package is not installed. Message and hint name packages only: the operator sees them."""

    code = "missing_package"

    def __init__(self, what: str, package: str, install: str) -> None:
        message = f"{what} needs {package}, which is not installed on this machine"
        super().__init__(message, install)


class SubfleetFailed(CommonweightError):
    """The fleet below this peer cannot do the work. The operator above sees the message."""

    code = "fleet_below"


class SubfleetStopped(CommonweightError):
    """The operator of the fleet below has stopped the work."""

    code = "fleet_below_stopped"


class CannotPredict(CommonweightError):
    """The task can train but not predict."""

    code = "no predict"


#: Codes of errors whose messages may be sent to the other side.
SHAREABLE_CODES = frozenset({DataError.code, SchemaMismatch.code, CannotPredict.code})
#: Codes of errors about a run's settings, which the coordinator sent.
SETTINGS_CODES = frozenset({UsageError.code, UnknownName.code})


class TrainerFailed(CommonweightError):
    """The trainer process failed or was ended; `kind` is a short fixed word for the reason."""

    code = "trainer_failed"

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind


class StrategyFailed(CommonweightError):
    """A strategy raised an error; its run fails."""

    code = "strategy_failed"


class CohortLost(CommonweightError):
    """Too few peers of a cohort are left to unmask its sum. Nothing of any update is known."""

    code = "cohort_lost"


class UpdateRefused(CommonweightError):
    """An update failed validation; `reason` is a short fixed word for the ledger."""

    code = "update_refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
