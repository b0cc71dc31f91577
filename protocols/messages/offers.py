"""Task files that the operator offers to owners: a signed list, and each file by its digest. Pure.

An offer is a proposal: no agent runs an offered file before its owner has approved its digest.
"""

from __future__ import annotations

import codecs
import io
import re
import tokenize
from typing import Annotated

from msgspec import Meta, Struct

from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Digest, Id, Name, Text, Time
from protocols.messages.signing import SignedJson

#: An agent asks for the signed list and for files; an operator offers and withdraws.
LIST_PATH, FILE_PATH = "/cw/v1/offers", "/cw/v1/offers/{digest}"
TASKS_PATH, WITHDRAW_PATH = "/cw/v1/tasks", "/cw/v1/tasks/withdraw"
MAX_FILE_BYTES, MAX_OFFERS = 64 * 1024, 16
#: Of a signed list.
MAX_LIST_BYTES = 32 * 1024
#: The characters of a digest that name an offer in commands.
ID_CHARS = 12

#: File and class, as runs name the task. Never the name of a built-in one, which has no colon.
_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,30}\.py:[A-Za-z_][A-Za-z0-9_]{0,28}\Z"
OfferedName = Annotated[str, Meta(max_length=64, pattern=_PATTERN)]
FileBytes = Annotated[bytes, Meta(max_length=MAX_FILE_BYTES)]


class Offer(Struct, frozen=True, kw_only=True):
    """A file of `nbytes` bytes and SHA-256 `digest`, offered `by` an operator `at` a time (Unix s).

    `note`: what the operator says about it.
    """

    name: OfferedName
    digest: Digest
    nbytes: Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
    at: Time
    by: Name = ""
    note: Text = ""

    @property
    def id(self) -> str:
        return self.digest[:ID_CHARS]


class OfferList(Struct, frozen=True, kw_only=True):
    """All present offers of a fleet. `number` grows with each change, also after a restore.

    A task that is no longer in the list is withdrawn, and another digest supersedes the one before.
    """

    fleet: Id
    number: Count
    offers: Annotated[tuple[Offer, ...], Meta(max_length=MAX_OFFERS)] = ()

    def by_name(self) -> dict[str, Offer]:
        return {offer.name: offer for offer in self.offers}


class OfferRequest(Struct, frozen=True, kw_only=True):
    """An operator offers a file under this name."""

    name: OfferedName
    data: FileBytes
    note: Text = ""


class WithdrawRequest(Struct, frozen=True, kw_only=True):
    """An operator withdraws an offer."""

    name: OfferedName


SIGNED_OFFERS = SignedJson(OfferList, "task offers", "list of offered tasks")
_NAME = re.compile(_PATTERN)


def check_name(name: str) -> str:
    """`name`, if an offer can have it. Raises BadMessage."""
    if not _NAME.fullmatch(name):
        raise BadMessage(
            f"a task cannot be offered as {name[:80]!a}",
            "file and class, such as my_task.py:MyTask: ASCII letters, digits and _, at most 64 "
            "characters in all",
        )
    return name


def check_text(data: bytes) -> str:
    """The text of an offered file. Raises BadMessage unless it is small UTF-8 text for Python too.

    A file that declares another encoding would run as other text than an owner reads.
    """
    if not 0 < len(data) <= MAX_FILE_BYTES:
        raise BadMessage(f"an offered file has 1 byte to {MAX_FILE_BYTES // 1024} KiB")
    # As Python reads it, a lone carriage return ends a line, also before the declaration.
    lines = io.BytesIO(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    try:
        text = data.decode()
        encoding = codecs.lookup(tokenize.detect_encoding(lines.readline)[0]).name
    except (UnicodeDecodeError, SyntaxError) as err:
        raise BadMessage(f"an offered file is UTF-8 text: {err}") from err
    if encoding != "utf-8" or "\0" in text:
        raise BadMessage(
            "an offered file is UTF-8 text without a byte order mark, a NUL, or a declaration of "
            "another encoding"
        )
    return text
