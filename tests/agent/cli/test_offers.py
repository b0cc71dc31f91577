"""`commonweight-agent task offers`, `review`, `approve`, `allow --keep` and `remove`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from agent.cli import offers as cli
from agent.cli import task
from agent.cli.monitor.panels import panels
from agent.cli.monitor.readings import MachineReader
from agent.home import offer_log, settings, task_offers
from agent.setup import consents
from protocols.errors import UnknownName, UsageError
from protocols.messages.offers import Offer, OfferList
from tests.support.fleet_harness import ROOT

TASK = "line.py:Line"
LINE = (ROOT / "docs" / "examples" / "line.py").read_bytes()


def keep(home: Path, number: int, *files: bytes) -> list[Offer]:
    """Write what the agent keeps of a list of offers."""
    made = []
    for data in files:
        digest = hashlib.sha256(data).hexdigest()
        made.append(Offer(name=TASK, digest=digest, nbytes=len(data), at=1.0, by="ada", note="try"))
        task_offers.write_file(home, digest, data)
    task_offers.write(home, OfferList(fleet="f", number=number, offers=tuple(made)))
    return made


def standing(capsys: pytest.CaptureFixture[str]) -> str:
    cli.list_offers(json=True)
    (row,) = json.loads(capsys.readouterr().out)["data"]
    return str(row["standing"])


def test_an_owner_reviews_approves_keeps_and_revokes(
    agent_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.list_offers()
    assert capsys.readouterr().err == "no offers\n"
    (offer,) = keep(agent_home, 1, LINE)
    cli.list_offers()
    line = capsys.readouterr().out
    assert line.startswith(
        f"{offer.id}  ? awaits your review  {TASK}, {len(LINE):,} bytes, offered"
    )
    assert line.endswith("by ada: try\n")
    task.list_tasks()
    assert f"to see the file: commonweight-agent task review {TASK}" in capsys.readouterr().out

    cli.review(TASK)
    told = capsys.readouterr()
    assert f"\nsha256 {offer.digest}\ncompared with nothing: no version" in told.out
    assert told.out.count("\n+") == LINE.count(b"\n") + 1, "its lines, and the head of the diff"
    assert f"task approve {offer.id}\n" in told.err
    with pytest.raises(UsageError, match="no terminal"):
        cli.approve(TASK)
    with pytest.raises(UsageError, match="has another hash"):
        cli.approve(TASK, sha256=offer.id)
    cli.approve(offer.id, sha256=offer.digest.upper())
    assert f"approved {TASK}, sha256 {offer.digest}" in capsys.readouterr().err
    assert standing(capsys) == "allowed"

    (second,) = keep(agent_home, 2, LINE + b"# more\n")
    assert standing(capsys) == "offered"
    cli.review(second.id)
    told = capsys.readouterr()
    assert f"compared with the version approved before, sha256 {offer.digest}" in told.out
    assert [one for one in told.out.splitlines() if one[0] in "+-"][2:] == ["+# more"]
    task.allow(TASK, keep=True)
    assert "allowed" in capsys.readouterr().err
    assert standing(capsys) == "awaiting", "another file is in use than the offered one"
    with pytest.raises(UsageError, match="no approved file that was withdrawn"):
        task.allow(TASK, keep=True)
    cli.approve(TASK, sha256=second.digest)

    keep(agent_home, 3)
    task.list_tasks()
    shown = capsys.readouterr().out
    assert f"the operator withdrew the task {TASK!r}; to go on with it: commonweight-agent" in shown
    with pytest.raises(UsageError, match="has withdrawn or replaced") as refused:
        task.allow(TASK)
    assert refused.value.hint.endswith(f"task allow {TASK} --keep")
    task.allow(TASK, keep=True)
    task.allow(TASK, purpose="a study")
    assert settings.read(agent_home).standing_of(TASK) == "allowed"
    task.remove(TASK)
    assert not list((agent_home / "approved").iterdir())
    assert [entry.what for entry in offer_log.read(agent_home)] == [
        *("task approved", "task kept", "task approved", "task kept")
    ]
    with pytest.raises(UnknownName):
        cli.review(TASK)


def test_the_owners_monitor_shows_what_waits_and_what_happened(agent_home: Path) -> None:
    (offer,) = keep(agent_home, 1, LINE)
    found = {one.id: one.lines for one in panels(MachineReader(agent_home).read())}
    assert [line.text for line in found["asks"]] == [
        f"? the operator offers the task {TASK!r}",
        f"  to see the file: commonweight-agent task review {TASK}",
    ]
    cli.approve(TASK, sha256=offer.digest)
    machine = MachineReader(agent_home).read()
    found = {one.id: one.lines for one in panels(machine)}
    assert "asks" not in found
    assert found["left"][1].text.endswith(f"task approved  {TASK} sha256 {offer.id}")
    assert found["left"][1].text.startswith("· ")
    assert machine.num_left == 0, "nothing has left with an approval"


def test_a_change_of_columns_keeps_what_the_consent_follows(agent_home: Path) -> None:
    (offer,) = keep(agent_home, 1, LINE)
    cli.approve(TASK, sha256=offer.digest)
    task.allow(TASK, columns="age", purpose="a study")
    said = settings.read(agent_home).consent_to(TASK)
    assert (said.offer, said.columns, said.purpose) == (offer.digest, ("age",), "a study")
    keep(agent_home, 2)
    assert settings.read(agent_home).standing_of(TASK) == "withdrawn"
    consents.forbid(agent_home, TASK)
    assert settings.read(agent_home).standing_of(TASK) == "forbidden"


def test_owners_of_no_offers_see_none(agent_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (offer,) = keep(agent_home, 1, LINE)
    cli.approve(TASK, sha256=offer.digest)
    settings.change(agent_home, offers="off")
    keep(agent_home, 2, LINE + b"# more\n")
    assert settings.read(agent_home).standing_of(TASK) == "withdrawn", "it is replaced"
    capsys.readouterr()
    cli.list_offers()
    assert capsys.readouterr().err == "no offers are kept: policy set offers show\n"


@pytest.mark.parametrize("text", ["-" * 50_000 + "1", "x = (", "class Other: pass"])
def test_a_file_without_the_class_is_not_approved(agent_home: Path, text: str) -> None:
    (offer,) = keep(agent_home, 1, text.encode())
    with pytest.raises(UsageError, match=r"is not Python|has no class Line"):
        cli.approve(TASK, sha256=offer.digest)
    assert settings.read(agent_home).task_files == {}
    assert offer_log.read(agent_home) == []
    assert not list((agent_home / "approved").iterdir())
