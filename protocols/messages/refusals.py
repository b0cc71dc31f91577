"""The reason why an agent did not do its work, for the coordinator. Pure.

The text has no path, secret or data of the owner: the message of an error is used only if its kind
is known to be free of them, other kinds have a fixed sentence. A refusal travels as the reason of a
Flower error, `kind: text`, which older coordinators and agents read too.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from protocols import errors
from protocols.errors import CommonweightError
from protocols.messages.envelope import Name, Text, strip_controls

MAX_CHARS = 300
#: The kind of a refusal that has no known one. Older ledgers have it for all refusals by agents.
FAILED = "agent failed"
#: Failures of the trainer process, with the sentence for the operator.
_TRAINER = {
    "task": "the task raised an error",
    "file": "a file on its disk cannot be read or written",
    "killed": "its trainer was killed",
    "died": "its trainer exited",
    "hung": "its trainer stopped answering",
    "start": "its trainer cannot be started",
    "sandbox": "its owner's sandbox refused what the task tried, or cannot work there",
    "stopped": "its trainer was stopped",
    "cancelled": "the work was cancelled",
}
_SENTENCES = _TRAINER | {
    errors.TaskUnusable.code: "the task cannot be loaded there, or fails on its data",
    errors.Unreachable.code: "the coordinator of its fleet below does not answer",
    errors.BadWeights.code: "the task's weights do not have the shapes that it declares",
}
#: Flower's code for an exception in a ClientApp. Agents use it for all of their failures.
AGENT_FAILED = 2
#: Older coordinators do not know the kinds of `errors.AWAITED`: they travel as NotAllowed, with
#: words before the text. Older agents write the last ones.
_AWAITS = "awaits consent: "
_AWAITS_MORE = {
    code: f"{_AWAITS}{what}: " for code, what in errors.AWAITED.items() if what != "consent"
}
_OLD_AWAITS = "the owner of this machine does not allow the task "
_SEE_LOG = "its owner sees why: commonweight-agent status"
_OLD_TRAINER = "the trainer"


def _codes(of: type[CommonweightError]) -> Iterator[str]:
    yield of.code
    for kind in of.__subclasses__():
        yield from _codes(kind)


#: All kinds. Others are not taken from the network, as they become labels of metrics.
KINDS = frozenset(_codes(CommonweightError)) | _TRAINER.keys()
#: Kinds about this peer or the run: the same request fails again until a person changes something.
PERMANENT = frozenset(
    {
        *errors.SHAREABLE_CODES,
        *errors.SETTINGS_CODES,
        errors.TaskUnusable.code,
        errors.MissingPackage.code,
        errors.NotAllowed.code,
        *errors.UNDECIDED_CODES,
        errors.LogConflict.code,
        errors.UploadRefused.code,
        errors.SubfleetFailed.code,
        "sandbox",
    }
)
#: Kinds for which a retry may help.
TRANSIENT = frozenset(
    {
        *("file", "killed", "died", "hung", "start", "stopped", "cancelled"),
        *(errors.NotRunning.code, errors.Unreachable.code, errors.SubfleetStopped.code),
        errors.Unwitnessed.code,
        errors.FormerLeader.code,
    }
)
#: Kinds whose hint has no path either.
_WITH_HINT = errors.SETTINGS_CODES | {
    errors.MissingPackage.code,
    errors.NotAllowed.code,
    *errors.UNDECIDED_CODES,
    errors.LogConflict.code,
    errors.Unwitnessed.code,
    errors.SecureRefused.code,
    errors.UploadRefused.code,
    errors.SubfleetFailed.code,
    errors.SubfleetStopped.code,
    errors.NotRunning.code,
}
#: Kinds of the trainer whose message may leave the machine.
_WITH_MESSAGE = _WITH_HINT | errors.SHAREABLE_CODES | {errors.OutOfMemory.code}


class Refusal(Struct, frozen=True):
    """Why an agent did not do its work: a kind for programs, and a sentence for the operator."""

    kind: Name
    text: Text

    @property
    def permanent(self) -> bool:
        """True if the same request fails again until a person changes something."""
        return self.kind in PERMANENT

    def encode(self) -> str:
        """The text that travels."""
        before = f"{self.kind}: "
        if self.kind in errors.UNDECIDED_CODES:
            before = f"{errors.NotAllowed.code}: {_AWAITS_MORE.get(self.kind, _AWAITS)}"
        return f"{before}{self.text}"[:MAX_CHARS]


def refusal_of(err: CommonweightError) -> Refusal:
    """The refusal that an error of an agent becomes."""
    if not isinstance(err, errors.TrainerFailed):
        hint = err.hint if err.code in _WITH_HINT else ""
        return _refusal(err.code, err.message, hint)
    if err.kind in (errors.DataError.code, errors.SchemaMismatch.code):
        # Its hint may name the owner's files.
        return _refusal(err.kind, err.message, _SEE_LOG if err.hint else "")
    if err.kind in _WITH_MESSAGE:
        return _refusal(err.kind, err.message, err.hint if err.kind in _WITH_HINT else "")
    return _refusal(err.kind, _sentence(err.kind), _SEE_LOG)


def decode(reason: str) -> Refusal:
    """The refusal in the reason of a reply. Older agents have `the trainer: kind` as well."""
    kind, colon, text = strip_controls(reason).partition(": ")
    if kind == _OLD_TRAINER and text in KINDS:
        return Refusal(text, _sentence(text))
    if colon and text and kind in KINDS:
        for code, words in _AWAITS_MORE.items():
            if kind == errors.NotAllowed.code and text.startswith(words):
                return Refusal(code, text.removeprefix(words))
        if kind == errors.NotAllowed.code and text.startswith((_AWAITS, _OLD_AWAITS)):
            return Refusal(errors.AwaitingConsent.code, text.removeprefix(_AWAITS))
        return Refusal(kind, text)
    return Refusal(FAILED, strip_controls(reason) or "no reason given")


def from_ledger(reason: str, detail: str) -> Refusal:
    """The refusal in a ledger, which older versions wrote as `agent failed` with the whole text."""
    if reason == FAILED:
        return decode(detail)
    return Refusal(reason, detail if reason in KINDS else f"{reason}: {detail}")


def _sentence(kind: str) -> str:
    return _SENTENCES.get(kind, f"its trainer failed ({kind})")


def _refusal(kind: str, message: str, hint: str) -> Refusal:
    room = MAX_CHARS - len(kind) - len(": ")
    text = f"{message} ({hint})" if hint else message
    if len(text) > room:  # rather the whole message than a part of the hint
        text = message if len(message) <= room else f"{message[: room - 1]}…"
    return Refusal(kind, strip_controls(text))
