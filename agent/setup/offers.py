"""How an owner reviews and approves a task file that the operator offers.

An approved file is copied into a folder of its own in the home, and is a task of this machine from
then on, allowed as that file is.
"""

from __future__ import annotations

import difflib
import io
import re
import shutil
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

from agent.home import consent_requests, offer_log, settings, task_offers
from agent.home.settings_schema import AgentSettings
from agent.policy import task_code
from agent.setup import consents
from agent.tasks import registry
from protocols.errors import UnknownName, UsageError
from protocols.local.atomic_files import write_private
from protocols.local.terminal_text import show_hidden
from protocols.messages.offers import Offer, check_text

#: The folder of the approved files.
FOLDER = "approved"
#: Of a comparison. Files of the largest size, as people write them, take about 50,000.
MAX_DIFF_STEPS = 2_000_000
#: `tokenize` needs the square of this time for a line of quotes.
_MAX_READ_CHARS = 2000
_MIN_ID_CHARS = 8
_ID = re.compile(f"[0-9a-f]{{{_MIN_ID_CHARS},64}}")
_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")


class Review(NamedTuple):
    """What an owner reads of an offer. `compared`: with which file; `diff`: lines without an end.

    No line has a character that a terminal obeys or hides.
    """

    offer: Offer
    compared: str
    diff: list[str]


def find(home: Path, name_or_id: str) -> Offer:
    """The present offer of this task, or whose digest starts so. Raises UnknownName, UsageError."""
    present = task_offers.read(home).by_name()
    if name_or_id in present:
        return present[name_or_id]
    found = [
        one
        for one in present.values()
        if _ID.fullmatch(name_or_id) and one.digest.startswith(name_or_id)
    ]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UsageError(f"{name_or_id} stands for several offers: {names}", "name the task")
    if not found:
        raise UnknownName(f"no offer {name_or_id!r}", "commonweight-agent task offers")
    return found[0]


def review(home: Path, offer: Offer) -> Review:
    """The offered file, as a diff against the one that its owner approved. Raises HomeError."""
    new = check_text(task_offers.read_file(home, offer))
    chosen = settings.read(home)
    source, approved = chosen.task_files.get(offer.name, ""), chosen.consent_to(offer.name).offer
    old, compared = "", "nothing: no version of it is approved"
    path = registry.split_source(source)[0] if source else Path()
    if approved and source and task_code.sha256(source) != approved:
        compared = "nothing: the file that you approved is missing here, or was changed"
    elif path.is_file():
        compared = f"the version approved before, sha256 {approved}" if approved else f"your {path}"
        old = path.read_bytes().decode(errors="replace")
    before, offered = _lines(old), _lines(new)
    if not _is_quick(before, offered):
        before, compared = [], f"nothing: the comparison with {compared} takes too long"
    diff = difflib.unified_diff(before, offered, "before", "offered", n=5)
    return Review(offer, compared, [line.rstrip("\n") for line in diff])


class _Counted(difflib.SequenceMatcher[str]):
    """Raises TimeoutError after MAX_DIFF_STEPS steps."""

    a: list[str]
    b2j: dict[str, list[int]]
    steps = 0

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        self.steps += sum(1 + len(self.b2j.get(line, ())) for line in self.a[alo:ahi])
        if self.steps > MAX_DIFF_STEPS:
            raise TimeoutError
        return super().find_longest_match(alo, ahi, blo, bhi)


def _is_quick(before: list[str], offered: list[str]) -> bool:
    """False for files made to be compared slowly: many lines that are equal, but not too many."""
    try:
        _Counted(None, before, offered).get_matching_blocks()
    except TimeoutError:
        return False
    return True


def _lines(text: str) -> list[str]:
    """The lines as Python counts them, safe to show. A lone carriage return ends a line too."""
    lines = [line for line in _LINE_END.split(text) if line]
    columns = _foreign_names(text)
    shown = []
    for number, line in enumerate(lines, 1):
        body = line.removesuffix("\r\n").removesuffix("\n")
        for start, end in reversed(columns.get(number, [])):
            marks = "".join(c if c.isascii() else f"<U+{ord(c):04X}>" for c in body[start:end])
            body = body[:start] + marks + body[end:]
        shown.append(show_hidden(body) + "\n")
    return shown


def _foreign_names(text: str) -> dict[int, list[tuple[int, int]]]:
    """By line: the columns of names with other characters than ASCII, which can look like others.

    All of the text that cannot be read as Python, or has a very long line.
    """
    if text.isascii():
        return {}
    lines = [re.sub(r"\r\n?", "\n", line) for line in _LINE_END.split(text)]
    found: dict[int, list[tuple[int, int]]] = {}
    try:
        if max(map(len, lines)) > _MAX_READ_CHARS:
            raise SyntaxError
        for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
            if token.type in (tokenize.NAME, tokenize.ERRORTOKEN) and not token.string.isascii():
                found.setdefault(token.start[0], []).append((token.start[1], token.end[1]))
    except (tokenize.TokenError, SyntaxError):
        return {number: [(0, len(line))] for number, line in enumerate(lines, 1)}
    return found


def approve(home: Path, offer: Offer) -> AgentSettings:
    """Allow the offered file as a task of this machine. Raises UsageError, HomeError, OSError."""
    data = task_offers.read_file(home, offer)
    check_text(data)
    file, _, class_name = offer.name.partition(":")
    if offer.name in registry.names():
        raise UsageError(
            f"{offer.name} is the name of an installed task", "ask the operator for another name"
        )
    with settings.locked(home):
        own = settings.read_own(home)
        before = own.task_files.get(offer.name, "")
        if before and not _is_copy(home, before):
            raise UsageError(
                f"{offer.name} is a task of your own: {before}",
                f"to replace it, first: commonweight-agent task remove {offer.name}",
            )
        path = home.absolute() / FOLDER / offer.digest / file
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        write_private(path, data)
        source = f"{path}:{class_name}"
        try:
            registry.check_source(source)
        except UsageError:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        offer_log.write(home, "task approved", offer.name, offer.digest)
        files = {**own.task_files, offer.name: source}
        allowed = consents.allowing(own, files, [offer.name], offer=offer.digest)
        settings.change(home, task_files=files, **allowed)
    consent_requests.drop(home, offer.name)
    delete_copy(home, before)
    return settings.read(home)


def _is_copy(home: Path, source: str) -> bool:
    """True if a task file is the copy of an approved one."""
    return (home.absolute() / FOLDER) in registry.split_source(source)[0].parents


def delete_copy(home: Path, source: str) -> None:
    """Delete the copy of an approved file that no task uses any more."""
    used = settings.read_own(home).task_files.values()
    if source and source not in used and _is_copy(home, source):
        folder = registry.split_source(source)[0].parent
        if not any(registry.split_source(one)[0].parent == folder for one in used):
            shutil.rmtree(folder, ignore_errors=True)


def describe(offer: Offer) -> str:
    """One line about an offer."""
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(offer.at))
    by = f" by {offer.by}" if offer.by else ""
    note = f": {offer.note}" if offer.note else ""
    return show_hidden(f"{offer.name}, {offer.nbytes:,} bytes, offered {at}{by}{note}")
