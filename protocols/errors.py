"""Every error that a person can meet. Pure.

CommonweightError                     1  something failed
├── UsageError                        2  what was typed cannot work
│   ├── TicketMalformed                  a ticket that is cut or mistyped
│   ├── UnknownName                      a task, run, peer or setting nobody knows
│   └── CannotBeMet                      a quorum or deadline that cannot be met
├── Unreachable                       3  nobody answers at that address
├── Refused                           4  the other side said no
│   ├── NotEnrolled                      this machine has not joined
│   └── VersionSkew                      the two programs are too far apart
├── NotRunning                        5  the program asked for is not up
├── HomeError                         1  the home folder cannot be used
│   ├── HomeLocked                       another process works in it
│   └── HomeTooNew                       written by a newer version
├── DiskFull                          1  no room is left where something must be written
├── PortInUse                         1  somebody else listens there
├── BadMessage                        1  bytes that are not one of our messages
├── BadWeights                        1  bytes that are not weights, or not these weights
├── DataError                         1  a peer's data cannot serve the run
│   └── SchemaMismatch                   they, the model or the task are not those of the others
├── OutOfMemory                       1  a step of training takes more memory than there is
├── TaskUnusable                      1  a task's own file or package cannot be loaded
├── CannotPredict                     1  the task trains, but answers for no rows
├── TrainerFailed                     1  the child process that trains failed or was ended
├── StrategyFailed                    1  a strategy raised an error of its own
└── UpdateRefused                     1  an update that must not be summed
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means."""

    OK = 0
    """It did what was asked."""
    FAILED = 1
    """It tried and failed; the message says why."""
    USAGE = 2
    """What was typed cannot work."""
    UNREACHABLE = 3
    """The coordinator or the broker does not answer."""
    REFUSED = 4
    """Not enrolled, or refused by the other side."""
    NOT_RUNNING = 5
    """The program that was asked is not running."""
    FAULTS_FOUND = 6
    """`doctor` found faults."""
    INTERRUPTED = 130
    """Ctrl-C."""


class CommonweightError(Exception):
    """What happened and why (`message`), and what to do next (`hint`)."""

    exit_code: ExitCode = ExitCode.FAILED
    code: str = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CommonweightError):
    """What was typed cannot work."""

    exit_code = ExitCode.USAGE
    code = "usage"


class TicketMalformed(UsageError):
    """The join string is not a whole ticket."""

    code = "ticket_malformed"


class UnknownName(UsageError):
    """No task, run, peer or setting has this name."""

    code = "unknown_name"


class CannotBeMet(UsageError):
    """A quorum or a deadline that the fleet cannot meet."""

    code = "cannot_be_met"


class Unreachable(CommonweightError):
    """Nobody answers there."""

    exit_code = ExitCode.UNREACHABLE
    code = "unreachable"


class Refused(CommonweightError):
    """The other side answered, and said no."""

    exit_code = ExitCode.REFUSED
    code = "refused"


class NotEnrolled(Refused):
    """This machine holds no certificate of a coordinator."""

    code = "not_enrolled"


class VersionSkew(Refused):
    """Agent and coordinator are more than one minor version apart."""

    code = "version_skew"


class NotRunning(CommonweightError):
    """The program that was asked is not up."""

    exit_code = ExitCode.NOT_RUNNING
    code = "not_running"


class HomeError(CommonweightError):
    """The home folder cannot be used."""

    code = "home"


class HomeLocked(HomeError):
    """Another process works in this home."""

    code = "home_locked"


class HomeTooNew(HomeError):
    """The home was written by a newer version than this one."""

    code = "home_too_new"


class DiskFull(CommonweightError):
    """No room is left where something must be written; what waits for it goes on by itself."""

    code = "disk_full"


class PortInUse(CommonweightError):
    """Somebody else listens on the address."""

    code = "port_in_use"


class BadMessage(CommonweightError):
    """Bytes that are not one of our messages, or whose signature is wrong."""

    code = "bad_message"


class BadWeights(CommonweightError):
    """Bytes that are not canonical weights, or that do not fit the schema."""

    code = "bad_weights"


class DataError(CommonweightError):
    """A peer's data cannot serve the run.

    Others are told the `message`: it quotes no row, no file's name and no path. The `hint` may, as
    it stays on the machine.
    """

    code = "data"


class SchemaMismatch(DataError):
    """A field of this peer's schema is not what all the others have."""

    code = "schema"

    def __init__(self, field: str, expected: str, found: str, hint: str = "") -> None:
        super().__init__(f"{field}: expected {expected}, found {found}", hint)
        self.field, self.expected, self.found = field, expected, found


class OutOfMemory(CommonweightError):
    """A step of training takes more memory than there is; `fits` examples (0: not one) would do."""

    code = "out of memory"

    def __init__(self, batch_size: int, fits: int) -> None:
        would = f"{fits} would fit" if fits else "not even one would fit"
        hint = f"commonweight run start … --set batch_size={fits}" if fits else "a smaller model"
        super().__init__(f"{batch_size} examples a step do not fit into memory; {would}", hint)
        self.max_batch_size = fits


class TaskUnusable(CommonweightError):
    """A task's file or package cannot be loaded; only the kind of the error leaves the machine."""

    code = "task_unusable"


class CannotPredict(CommonweightError):
    """The task trains, but answers for no rows."""

    code = "no predict"


#: Codes of errors whose words are fit for the other side.
SHAREABLE_CODES = frozenset({DataError.code, SchemaMismatch.code, CannotPredict.code})
#: And of errors that speak of a run's settings, which come from there.
SETTINGS_CODES = frozenset({UsageError.code, UnknownName.code})


class TrainerFailed(CommonweightError):
    """The work in the trainer's process did not end well; `kind` is a short fixed word for it."""

    code = "trainer_failed"

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind


class StrategyFailed(CommonweightError):
    """A strategy raised an error; the run that uses it cannot go on."""

    code = "strategy_failed"


class UpdateRefused(CommonweightError):
    """An update that must not be summed; `reason` is a short fixed word for the ledger."""

    code = "update_refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
