"""Offered task files: nothing runs, and nothing is hidden, before the owner approves a digest."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import time
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.cli import offers as cli
from agent.daemon import offer_inbox
from agent.daemon.offer_inbox import OfferInbox
from agent.home import consent_requests, offer_log, settings, task_offers
from agent.home.enrollment_file import Enrollment
from agent.home.refusal_log import RefusalLog
from agent.setup import consents, offers
from agent.tasks import registry
from protocols.enrollment import identity
from protocols.errors import (
    AwaitingConsent,
    AwaitingDecision,
    AwaitingReview,
    BadMessage,
    CommonweightError,
    NotAllowed,
    UnknownName,
    Unreachable,
    UsageError,
)
from protocols.messages import refusals
from protocols.messages.mqtt import MqttAddress
from protocols.messages.offers import (
    MAX_FILE_BYTES,
    MAX_LIST_BYTES,
    MAX_OFFERS,
    SIGNED_OFFERS,
    Offer,
    OfferList,
)
from tests.hostile.test_consent import COORDINATOR, Machine
from tests.support.fleet_harness import ROOT

pytestmark = pytest.mark.attack("20.offers")

LINE = (ROOT / "docs" / "examples" / "line.py").read_bytes()
TASK = "line.py:Line"


class Desk:
    """A coordinator that offers what it likes; the agent of `machine` asks it."""

    def __init__(self, machine: Machine) -> None:
        self.home, self.number = machine.home, int(time.time())
        self.key, self.fleet = COORDINATOR, "fleet"
        self.files: dict[str, bytes] = {}
        self.sent: bytes | None = None
        self.fetched: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Start the agent's part again."""
        enrollment = Enrollment(
            peer="P",
            name="box",
            fleet="fleet",
            addresses=("host:1",),
            ca_pem="",
            certificate=b"",
            coordinator_public=identity.public_bytes(COORDINATOR),
            mqtt=MqttAddress(host="host", port=9),
        )
        self.inbox = OfferInbox(self.home, enrollment, lambda: self)  # type: ignore[arg-type, return-value]

    def task_offers(self) -> bytes:
        self.fetched.append("list")
        assert self.sent is not None
        return self.sent

    def offered_file(self, digest: str) -> bytes:
        self.fetched.append(digest)
        if digest not in self.files:
            raise Unreachable("the answer breaks off")
        return self.files[digest]

    def made(self, data: bytes, name: str = TASK) -> Offer:
        digest = hashlib.sha256(data).hexdigest()
        self.files[digest] = data
        nbytes = min(max(len(data), 1), MAX_FILE_BYTES)
        return Offer(name=name, digest=digest, nbytes=nbytes, at=1.0, by="ada")

    def offer(self, *made: Offer, number: int = 0) -> list[Offer]:
        """Send a list with these offers; what the agent keeps then."""
        self.number = number or self.number + 1
        found = OfferList(fleet=self.fleet, number=self.number, offers=made)
        self.sent = SIGNED_OFFERS.pack(found, self.key.sign)
        return self.poll()

    def poll(self) -> list[Offer]:
        self.inbox._next_at = 0.0
        self.inbox.news(self.number)
        return list(task_offers.read(self.home).offers)

    def approved(self, data: bytes) -> Offer:
        """Offer a file, and have the owner approve it."""
        (kept,) = self.offer(self.made(data))
        offers.approve(self.home, kept)
        return kept


@pytest.fixture
def machine(agent_home: Path) -> Machine:
    return Machine(agent_home)


@pytest.fixture
def desk(machine: Machine) -> Desk:
    return Desk(machine)


def logged(home: Path) -> list[str]:
    return [entry.what for entry in offer_log.read(home)]


def runs(machine: Machine) -> bool:
    """True if a run gets as far as the trainer."""
    try:
        machine.ask(TASK, "init")
    except AssertionError:
        return True
    except AwaitingConsent:
        return False
    raise AssertionError("it must be one of both")


@pytest.mark.parametrize("before", ["nothing", "*", "its name"])
def test_no_offered_file_runs_before_its_owner_approves_it(
    machine: Machine, desk: Desk, before: str
) -> None:
    """Attack: offer a file, and name it in a run of an owner who allows every task, or had allowed
    a task of this name before there was one."""
    if before == "*":
        consents.allow(machine.home, "*")
    elif before == "its name":
        settings.change(machine.home, tasks=[TASK])
    (kept,) = desk.offer(desk.made(LINE))
    with pytest.raises(AwaitingConsent, match="not approved the offered file") as asked:
        machine.ask(TASK, "init")
    assert f"task review {TASK}" in asked.value.hint
    told = refusals.decode(refusals.refusal_of(asked.value).encode())
    assert (told.kind, told.permanent) == (AwaitingReview.code, True)
    assert machine.trainer.used == []
    with pytest.raises(UsageError, match="have not approved the file"):
        consents.allow(machine.home, TASK)
    with pytest.raises(UsageError, match="have not approved the file"):
        consents.allow(machine.home, TASK, keep=True)
    desk.restart()
    assert not runs(machine)
    offers.approve(machine.home, kept)
    assert runs(machine)
    assert logged(machine.home) == ["task offered", "task approved"]


def test_what_is_kept_is_no_module_and_private(machine: Machine, desk: Desk) -> None:
    """Attack: have the agent import or run an offered file without any approval."""
    (kept,) = desk.offer(desk.made(LINE))
    path = machine.home / task_offers.FOLDER / kept.digest
    assert path.suffix == "", "Python imports no file without a suffix"
    assert [one.stat().st_mode & 0o777 for one in (path.parent, path)] == [0o700, 0o600]
    assert settings.read(machine.home).task_files == {}
    with pytest.raises(UnknownName):
        registry.create(TASK)


@pytest.mark.parametrize("where", ["approved", "kept"])
def test_a_file_that_is_swapped_does_not_run(machine: Machine, desk: Desk, where: str) -> None:
    """Attack: exchange the file after the approval, or between the review and the approval."""
    if where == "approved":
        desk.approved(LINE)
        source = settings.read(machine.home).task_files[TASK]
        registry.split_source(source)[0].write_bytes(LINE + b"import socket\n")
        assert not runs(machine)
        code = settings.read(machine.home).consent_to(TASK).code
        with pytest.raises(NotAllowed, match="not the one that its owner allowed"):
            registry.create(TASK, source, code=code)
        return
    (kept,) = desk.offer(desk.made(LINE))
    (machine.home / task_offers.FOLDER / kept.digest).write_bytes(LINE + b"import socket\n")
    for use in (offers.review, offers.approve):
        with pytest.raises(CommonweightError, match="was changed"):
            use(machine.home, kept)
    assert not runs(machine)


def test_an_approval_is_for_one_digest(machine: Machine, desk: Desk) -> None:
    """Attack: show the owner one file, and replace the offer before the approval arrives."""
    first = desk.made(LINE)
    desk.offer(first)
    assert offers.find(machine.home, first.id) == first
    second = desk.made(LINE + b"import socket\n")
    desk.offer(second)
    with pytest.raises(UnknownName):
        offers.find(machine.home, first.id)
    with pytest.raises(CommonweightError, match="missing here"):
        offers.approve(machine.home, first)
    assert not runs(machine)


@pytest.mark.parametrize("change", ["supersede", "withdraw"])
def test_an_approved_file_stops_until_its_owner_says_so(
    machine: Machine, desk: Desk, change: str
) -> None:
    """Attack: go on with a file that was withdrawn or replaced, or run the new one in its place."""
    old = desk.approved(LINE)
    assert runs(machine)
    second = desk.made(LINE + b"# better\n")
    desk.offer(*([second] if change == "supersede" else []))
    with pytest.raises(AwaitingConsent) as asked:
        machine.ask(TASK, "init")
    told = refusals.decode(refusals.refusal_of(asked.value).encode())
    lacks = AwaitingReview if change == "supersede" else AwaitingDecision
    assert told.kind == lacks.code
    desk.restart()
    (machine.home / "left-alone").touch()
    assert not runs(machine), "a restart decides nothing"
    with pytest.raises(UsageError):
        consents.allow(machine.home, TASK)
    assert not runs(machine), "no command decides it by the way"
    consents.allow(machine.home, TASK, keep=True)
    assert runs(machine)
    source = settings.read(machine.home).task_files[TASK]
    assert registry.split_source(source)[0].read_bytes() == LINE, "the file approved before"
    assert logged(machine.home)[-2:] == (
        ["task offered", "task kept"] if change == "supersede" else ["task withdrawn", "task kept"]
    )
    assert offer_log.read(machine.home)[-1].digest == old.digest
    if change == "supersede":  # the owner may still take the new one
        offers.approve(machine.home, second)
        source = settings.read(machine.home).task_files[TASK]
        assert registry.split_source(source)[0].read_bytes().endswith(b"# better\n")
        assert len(list((machine.home / offers.FOLDER).iterdir())) == 1, "the old copy is deleted"


def test_a_swapped_file_is_not_kept_either(machine: Machine, desk: Desk) -> None:
    """Attack: exchange an approved file, and withdraw the offer so that its owner keeps it."""
    desk.approved(LINE)
    source = settings.read(machine.home).task_files[TASK]
    registry.split_source(source)[0].write_bytes(LINE + b"import socket\n")
    desk.offer()
    with pytest.raises(UsageError, match="is no approved file"):
        consents.allow(machine.home, TASK, keep=True)
    assert not runs(machine)


def test_a_refusal_holds_for_every_later_version(machine: Machine, desk: Desk) -> None:
    """Attack: offer a forbidden task again, with another file."""
    (kept,) = desk.offer(desk.made(LINE))
    consents.forbid(machine.home, TASK)
    desk.offer(desk.made(LINE + b"# again\n"))
    with pytest.raises(NotAllowed, match="forbids") as refused:
        machine.ask(TASK, "init")
    assert not isinstance(refused.value, AwaitingConsent), "no run waits for it"
    assert consents.requests(machine.home, settings.read(machine.home)) == []
    assert "task refused" in logged(machine.home)
    assert offer_log.read(machine.home)[1].digest == kept.digest


def test_an_owner_who_wants_no_offers_keeps_none(machine: Machine, desk: Desk) -> None:
    """Attack: send files to an owner who has turned offers off."""
    settings.change(machine.home, offers="off")
    desk.offer(desk.made(LINE))
    assert desk.fetched == ["list"]
    assert not (machine.home / task_offers.FOLDER).exists()
    assert consents.requests(machine.home, settings.read(machine.home)) == []
    with pytest.raises(UnknownName, match="this machine has no task"):
        machine.ask(TASK, "init")


# --- who may offer, and what ---


def forged(desk: Desk) -> None:
    desk.key = identity.new_signing_key()


def of_another_fleet(desk: Desk) -> None:
    desk.fleet = "another"


@pytest.mark.parametrize("lie", [forged, of_another_fleet])
def test_a_list_by_others_is_not_taken(desk: Desk, lie: Callable[[Desk], None]) -> None:
    """Attack: offer a file without the coordinator's key, as a peer, or of another fleet."""
    lie(desk)
    assert desk.offer(desk.made(LINE)) == []
    assert desk.fetched == ["list"], "no file is fetched"


def test_a_signature_over_another_struct_is_none(desk: Desk) -> None:
    """Attack: pass off bytes as a list that the coordinator signed for another purpose."""
    found = OfferList(fleet="fleet", number=desk.number + 1, offers=(desk.made(LINE),))
    payload, _ = SIGNED_OFFERS.seal(found, COORDINATOR.sign)
    desk.sent = COORDINATOR.sign(b"commonweight work 1\n" + payload) + payload
    desk.number += 1
    assert desk.poll() == []


def test_an_old_list_brings_no_offer_back(machine: Machine, desk: Desk) -> None:
    """Attack: send a list again whose offer was withdrawn since, also after a restart."""
    old = desk.made(LINE)
    desk.offer(old)
    replay, number = desk.sent, desk.number
    assert desk.offer() == []
    for told in (number, desk.number + 5):  # the number in a poll is not signed
        desk.sent, desk.number = replay, told
        assert desk.poll() == []
        desk.restart()
    assert (machine.home / task_offers.FOLDER / old.digest).exists() is False


def test_an_old_list_undoes_no_withdrawal(machine: Machine, desk: Desk) -> None:
    """Attack: have an approved file go on after its withdrawal, by the list of before."""
    desk.approved(LINE)
    replay = desk.sent
    desk.offer()
    assert not runs(machine)
    desk.sent, desk.number = replay, desk.number + 9
    desk.poll()
    assert not runs(machine)
    (machine.home / task_offers.FILE).unlink()
    assert not runs(machine), "without a list nothing is known to be offered"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * (MAX_FILE_BYTES + 1),
        b"\xff\xfe",
        b"\xef\xbb\xbfimport os\n",
        b"x = 1\0\n",
        b"# -*- coding: unicode_escape -*-\n# \\u000aprint(1)\n",
        b"\n# vim: set fileencoding=rot13 :\n",
        # As Python reads it, the first line is empty and the second one declares the encoding.
        b"\r# coding: unicode_escape\n# \\u000aprint(1)\n",
        b"\x0c\r\n#coding=raw_unicode_escape\n",
    ],
)
def test_no_file_is_kept_that_is_no_plain_text(desk: Desk, data: bytes) -> None:
    """Attack: offer a huge file, bytes, or a text that declares another encoding, so that Python
    runs what its owner does not read."""
    honest = desk.made(LINE, "other.py:Line")
    made = desk.made(data)
    assert desk.offer(made, honest) == [honest], "and it hides no other offer"
    assert not (desk.home / task_offers.FOLDER / made.digest).exists()


def test_other_bytes_than_the_list_names_are_not_kept(desk: Desk) -> None:
    """Attack: sign one digest, and send another file."""
    made = desk.made(LINE)
    desk.files[made.digest] = LINE + b"import socket\n"
    assert desk.offer(made) == []


@pytest.mark.parametrize(
    "name",
    [
        *("mnist", "tabular", "../line.py:Line", "a/../../line.py:Line", "/etc/line.py:Line"),
        *("line.py:Line/../..", ".line.py:Line", "line.py", "a\\line.py:Line", "line.py:Line\n"),
        *("line.py:\u202eeniL", "line.PY:Line", "lіne.py:Line", "x" * 60 + ".py:Line", ""),
    ],
)
def test_a_name_is_file_and_class_and_no_path(desk: Desk, name: str) -> None:
    """Attack: offer a file under the name of a built-in task, a path, or with hidden letters."""
    made = desk.made(LINE)
    good = OfferList(fleet="fleet", number=desk.number + 1, offers=(made,))
    payload, _ = SIGNED_OFFERS.seal(good, COORDINATOR.sign)
    escaped = name.encode("unicode_escape").replace(b"\\x", b"\\u00").replace(b"\\U0000", b"\\u")
    escaped = escaped if not name.endswith("\\line.py:Line") else name.encode()
    payload = payload.replace(TASK.encode(), escaped)
    desk.sent = COORDINATOR.sign(SIGNED_OFFERS.signed_bytes(payload)) + payload
    desk.number += 1
    assert desk.poll() == []
    assert desk.fetched == ["list"]
    assert not (desk.home / task_offers.FOLDER).exists()


def test_two_files_of_one_name_are_no_offer(desk: Desk) -> None:
    """Attack: offer two files of one name, one for the review and one for the approval."""
    assert desk.offer(desk.made(LINE), desk.made(LINE + b"import socket\n")) == []


def test_the_start_of_a_digest_that_fits_two_offers_names_none(
    machine: Machine, desk: Desk
) -> None:
    """Attack: have the owner approve another offer than the one that was meant, by a digest with
    the same start, or by a name that looks like a digest."""
    one, two = desk.made(LINE, "one.py:Line"), desk.made(LINE, "two.py:Line")
    desk.offer(one, two, desk.made(b"# other\n", "deadbeef.py:Line"))
    with pytest.raises(UsageError, match=r"several offers: one.py:Line, two.py:Line"):
        offers.find(machine.home, one.id)
    assert offers.find(machine.home, "two.py:Line") == two
    for text in ("deadbeef", one.digest[:7], "", "*", "../x"):
        with pytest.raises(UnknownName):
            offers.find(machine.home, text)


def test_what_is_approved_is_what_is_shown(
    machine: Machine,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Attack: make two files whose digests start alike, have the owner review the harmless one, and
    offer the other one before the approval."""
    starts: dict[str, bytes] = {}
    for number in range(10_000_000):
        harmless, hostile = LINE + b"# %d\n" % number, LINE + b"import socket  # %d\n" % number
        starts[hashlib.sha256(harmless).hexdigest()[:8]] = harmless
        start = hashlib.sha256(hostile).hexdigest()[:8]
        if start in starts:
            break
    desk.offer(desk.made(starts[start]))
    cli.review(start)
    assert "import socket" not in capsys.readouterr().out
    (kept,) = desk.offer(desk.made(hostile))
    monkeypatch.setattr("agent.cli.prompts.can_ask", lambda: True)

    def asks(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.confirm", asks)
    with pytest.raises(KeyboardInterrupt):
        cli.approve(start)
    shown = capsys.readouterr().out
    assert "+import socket" in shown
    assert kept.digest in shown
    assert not runs(machine)


def test_an_offer_takes_the_place_of_no_task_of_the_owner(
    machine: Machine, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: offer a file under the name of an installed task, or of one that the owner has
    registered."""
    own = tmp_path / "line.py"
    own.write_bytes(LINE)
    source = f"{own}:Line"
    files = {TASK: source}
    allowed = consents.allowing(settings.read(machine.home), files, [TASK])
    settings.change(machine.home, task_files=files, **allowed)
    (kept,) = desk.offer(desk.made(LINE + b"import socket\n"))
    assert runs(machine), "the owner's own task goes on"
    with pytest.raises(UsageError, match="is a task of your own"):
        offers.approve(machine.home, kept)
    assert settings.read(machine.home).task_files == files
    settings.change(machine.home, task_files={})
    monkeypatch.setattr(registry, "names", lambda: [TASK])
    with pytest.raises(UsageError, match="name of an installed task"):
        offers.approve(machine.home, kept)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("x = 1 \x1b[2K\x1b[1Ay = 2", "<U+001B>[2K<U+001B>[1A"),
        ("x = 1 \x9b2K", "<U+009B>2K"),
        ("x = 1  # \u202e} if admin\u2066", "<U+202E>} if admin<U+2066>"),
        ("is\u200badmin = 1", "is<U+200B>admin"),
        ("x\u00a0= 1", "x<U+00A0>= 1"),
        ("s = '\u05d0\u05d1'", "'<U+05D0><U+05D1>'"),
        ("\uff45val('x')", "<U+FF45>val('x')"),
        ("p\u0430th = 1", "p<U+0430>th = 1"),
        ("\u3164 = 1", "<U+3164> = 1"),
        ("# \ufe0f\U000e0100\u2800", "# <U+FE0F><U+E0100><U+2800>"),
        ("x = 1 # a\x0bb\x1cc\x85d\u2028e", "a<U+000B>b<U+001C>c<U+0085>d<U+2028>e"),
        ("x = 1\b\b\b2\x7f", "<U+0008><U+0008><U+0008>2<U+007F>"),
    ],
)
def test_a_review_shows_what_a_terminal_hides(desk: Desk, line: str, shown: str) -> None:
    """Attack: hide code from its reviewer by escape sequences, marks of direction, characters that
    are not shown, or names that look like others ("Trojan Source")."""
    (kept,) = desk.offer(desk.made(f"a = 1\n{line}\nb = 2\n".encode()))
    found = offers.review(desk.home, kept).diff
    assert any(shown in one for one in found)
    assert not any(
        char in "".join(found) for char in line if not (char.isascii() and char.isprintable())
    )
    assert found[-3:][0] == "+a = 1"
    assert found[-1] == "+b = 2"


def test_a_lone_carriage_return_hides_no_line(desk: Desk) -> None:
    """Attack: end a comment by a carriage return, so that what follows runs and looks like a part
    of the comment."""
    (kept,) = desk.offer(desk.made(b"# harmless\rimport os\r\nx = 1\n"))
    found = offers.review(desk.home, kept).diff
    assert found[-3:] == ["+# harmless<U+000D>", "+import os", "+x = 1"]


def test_words_of_other_scripts_stay_readable(desk: Desk) -> None:
    """Control: comments and texts in the operator's language are shown as they are."""
    text = "# größer als 中文 и так\nx = 'été'\n"
    (kept,) = desk.offer(desk.made(text.encode()))
    assert offers.review(desk.home, kept).diff[-2:] == [f"+{line}" for line in text.splitlines()]


def test_crafted_files_are_compared_in_a_bounded_number_of_steps(
    machine: Machine, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: have the review of a new version take minutes, by two files with many equal lines, so
    that the owner approves without it."""
    one = [f"# {i % 150}\n" for i in range(8_000)]
    two = [f"# {(i * 7 + i // 150) % 150}\n" for i in range(8_000)]
    old = desk.approved(b"class Line: pass\n" + "".join(one).encode())
    (kept,) = desk.offer(desk.made(b"import socket\n" + "".join(two).encode()))
    steps = 0
    search = difflib.SequenceMatcher.find_longest_match

    def counted(matcher: difflib.SequenceMatcher[str], *within: int) -> difflib.Match:
        nonlocal steps
        lines = matcher.a[within[0] : within[1]] if within else matcher.a
        steps += sum(len(matcher.b2j.get(line, ())) for line in lines)
        assert steps <= 2 * offers.MAX_DIFF_STEPS
        return search(matcher, *within)

    monkeypatch.setattr(difflib.SequenceMatcher, "find_longest_match", counted)
    found = offers.review(machine.home, kept)
    assert found.compared.startswith("nothing: the comparison with the version approved before")
    assert old.digest in found.compared
    assert found.diff[-8_001:] == ["+import socket", *(f"+{line.strip()}" for line in two)]
    (kept,) = desk.offer(desk.made("".join(["class Line: pass\n", *one, "# more\n"]).encode()))
    assert offers.review(machine.home, kept).diff[-1] == "+# more", "others are compared"


def test_a_long_line_of_quotes_is_not_read_as_python(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: have a review take a minute, by a line of quotes that takes `tokenize` the square of
    its length."""
    line = "'\\" * 30_000
    (kept,) = desk.offer(desk.made(f"\u0430 = 1\n{line}\n".encode()))
    monkeypatch.setattr(tokenize, "generate_tokens", None)
    assert offers.review(desk.home, kept).diff[-2:] == ["+<U+0430> = 1", f"+{line}"]


def test_the_diff_is_against_what_was_approved(machine: Machine, desk: Desk) -> None:
    """Attack: have the owner compare a new version with another file than the approved one."""
    old = desk.approved(b"class Line:\n    def load(self): pass\n")
    between = desk.made(b"class Line:\n    def load(self): import os\n")
    desk.offer(between)
    (kept,) = desk.offer(desk.made(b"class Line:\n    def load(self): import os\n# same\n"))
    found = offers.review(machine.home, kept)
    assert old.digest in found.compared
    assert "+    def load(self): import os" in found.diff, "it was never approved"
    source = settings.read(machine.home).task_files[TASK]
    registry.split_source(source)[0].write_bytes(b"class Line:\n    def load(self): import os\n")
    found = offers.review(machine.home, kept)
    assert found.compared.startswith("nothing: ")
    assert "+    def load(self): import os" in found.diff


def test_a_flood_of_offers_costs_little(
    machine: Machine, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: offer many files, and other ones with each poll, until the owner's disk is full or no
    entry of the ledger is left."""
    machine.home.joinpath("left.jsonl").write_bytes(b"what left\n")
    RefusalLog(machine.home).note("run", "mnist", "what was refused")
    refused = machine.home.joinpath("refused.jsonl").read_bytes()
    monkeypatch.setattr(offer_log, "MAX_BYTES", 4_000)
    for turn in range(4):
        many = [
            desk.made(b"# %d %d\n" % (turn, number) + b"x" * 1000, f"t{number}.py:T")
            for number in range(MAX_OFFERS)
        ]
        assert len(desk.offer(*many)) == MAX_OFFERS
    folder = machine.home / task_offers.FOLDER
    assert len(list(folder.iterdir())) == MAX_OFFERS, "replaced files are deleted"
    written = [path.stat().st_size for path in machine.home.glob("*offered.jsonl")]
    assert len(written) == 2
    assert sum(written) < 2 * 5_000
    assert machine.home.joinpath("left.jsonl").read_bytes() == b"what left\n"
    assert machine.home.joinpath("refused.jsonl").read_bytes() == refused
    before = len(desk.fetched)
    desk.number += 1
    desk.inbox._next_at = time.monotonic() + offer_inbox.MIN_GAP_S
    desk.inbox.news(desk.number)
    assert len(desk.fetched) == before, "it asks no more often"
    more = OfferList(fleet="fleet", number=1, offers=(desk.made(LINE),) * (MAX_OFFERS + 1))
    with pytest.raises(BadMessage):
        SIGNED_OFFERS.unpack(SIGNED_OFFERS.pack(more, COORDINATOR.sign), lambda *_: True)
    # Those of the kept list, and those of the list that is being fetched.
    assert 2 * MAX_OFFERS * MAX_FILE_BYTES + MAX_LIST_BYTES < 3 << 20


def test_lists_that_break_off_leave_few_files(desk: Desk) -> None:
    """Attack: offer new files with each poll, and break off before the last one, until the owner's
    disk is full."""
    (kept,) = desk.offer(desk.made(LINE))
    for turn in range(4):
        many = [
            desk.made(b"# %d %d\n" % (turn, number), f"t{number}.py:T")
            for number in range(MAX_OFFERS)
        ]
        last = desk.files.pop(many[-1].digest)
        assert desk.offer(*many) == [kept]
    stored = {path.name for path in (desk.home / task_offers.FOLDER).iterdir()}
    assert stored == {one.digest for one in (kept, *many[:-1])}, "and no replaced ones"
    desk.files[many[-1].digest] = last
    desk.fetched.clear()
    assert desk.poll() == many
    assert desk.fetched == ["list", many[-1].digest], "the others are fetched once"


def test_no_number_of_offers_pushes_out_what_the_owner_decided(
    machine: Machine, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: offer and withdraw until the owner's ledger no longer has the approval."""
    monkeypatch.setattr(offer_log, "MAX_BYTES", 2_000)
    approved = desk.approved(LINE)
    desk.offer()
    consents.allow(machine.home, TASK, keep=True)
    for number in range(20):
        desk.offer(desk.made(LINE + b"# %d\n" % number))
        desk.offer()
    consents.forbid(machine.home, TASK)
    entries = offer_log.read(machine.home)
    assert len(entries) < 40, "offers are pushed out"
    decided = [entry for entry in entries if entry.what not in ("task offered", "task withdrawn")]
    assert [(entry.what, entry.digest) for entry in decided] == [
        ("task approved", approved.digest),
        ("task kept", approved.digest),
    ]
    assert [entry.at for entry in entries] == sorted(entry.at for entry in entries)


def test_a_removed_approval_is_gone(machine: Machine, desk: Desk) -> None:
    """Attack: run an approved file after its owner has removed it, and restarted."""
    from agent.cli import task

    kept = desk.approved(LINE)
    task.remove(TASK)
    desk.restart()
    assert not runs(machine)
    assert not (machine.home / offers.FOLDER / kept.digest).exists()
    assert logged(machine.home)[-1] == "task removed"
    (asked,) = consents.requests(machine.home, settings.read(machine.home))
    assert asked.command == f"commonweight-agent task review {TASK}"
    assert consent_requests.read(machine.home) == {}


def test_a_link_in_the_home_takes_no_file_elsewhere(desk: Desk, tmp_path: Path) -> None:
    """Attack: have the agent overwrite a file by a link in place of an offer."""
    target = tmp_path / "precious"
    target.write_text("precious")
    made = desk.made(LINE)
    folder = desk.home / task_offers.FOLDER
    folder.mkdir()
    os.symlink(target, folder / made.digest)
    assert desk.offer(made) == [made]
    assert target.read_text() == "precious"
    shutil.rmtree(folder)
