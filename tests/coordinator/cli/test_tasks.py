"""`commonweight task offer`: which file, and which class of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.cli import tasks
from protocols.errors import UnknownName, UsageError
from protocols.messages.offers import MAX_FILE_BYTES, Offer, OfferRequest
from protocols.model.schema_card import make_card
from protocols.model.setting_specs import SettingSpec

TEXT = "class Net: pass\n\n\nclass Gait:\n    def data(self, source, settings): ...\n"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[OfferRequest]:
    """What was sent to a coordinator."""
    found: list[OfferRequest] = []

    def offer_task(request: OfferRequest) -> Offer:
        found.append(request)
        return Offer(name=request.name, digest="ab" * 32, nbytes=1, at=1.0)

    monkeypatch.setattr(tasks, "connect", lambda: SimpleNamespace(offer_task=offer_task))
    return found


@pytest.mark.parametrize(
    ("offered", "name", "words", "hint"),
    [
        (["gait.py:Gait"], "nosuch", "no task 'nosuch' is offered", "offered: gait.py:Gait"),
        ([], "gait.py:Gait", "no task 'gait.py:Gait' is offered", "commonweight task list"),
        (["a.py:T", "b.py:T"], "T", "several tasks are called 'T'", "offered: a.py:T, b.py:T"),
    ],
)
def test_a_withdrawal_names_what_is_offered(
    monkeypatch: pytest.MonkeyPatch, offered: list[str], name: str, words: str, hint: str
) -> None:
    there = [Offer(name=one, digest="ab" * 32, nbytes=1, at=1.0) for one in offered]
    withdrawn: list[str] = []
    remote = SimpleNamespace(offers=lambda: there, withdraw_task=withdrawn.append)
    monkeypatch.setattr(tasks, "connect", lambda: remote)
    with pytest.raises(UnknownName, match=words) as caught:
        tasks.withdraw(name)
    assert (caught.value.hint, withdrawn) == (hint, [])
    if offered:
        tasks.withdraw(f"./{offered[0]}")
        assert withdrawn == offered[:1]


def test_the_class_with_data_is_the_task(
    tmp_path: Path, sent: list[OfferRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gait.py"
    file.write_text(TEXT)
    tasks.offer(str(file), note="a study")
    tasks.offer(f"{file}:Net")
    assert [one.name for one in sent] == ["gait.py:Gait", "gait.py:Net"]
    assert sent[0] == OfferRequest(name="gait.py:Gait", data=TEXT.encode(), note="a study")
    assert f"offered gait.py:Gait, sha256 {'ab' * 32}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gait.py", "class A:\n    def load(self): ...\n" * 2, "does not say which class"),
        ("gait.py:Nett", TEXT, "has no class Nett; its classes: Gait"),
        ("gait.py", "x = (", "is not Python"),
        ("gait.py", "-" * 50_000 + "1", "is not Python"),
        ("gait.py", "x" * (MAX_FILE_BYTES + 1), "1 byte to 64 KiB"),
        ("gait.py", "# coding: latin-1\n", "another encoding"),
        ("my-gait.py", TEXT, "cannot be offered as 'my-gait.py:Gait'"),
        ("none.py", "", "cannot read"),
    ],
)
def test_what_cannot_be_offered_is_said_at_once(
    tmp_path: Path, sent: list[OfferRequest], name: str, text: str, why: str
) -> None:
    if text:
        (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(UsageError, match=why):
        tasks.offer(str(tmp_path / name))
    assert sent == []


def test_settings_are_listed_with_bounds_and_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a built-in task without a coordinator, others as peers told them in a run."""
    monkeypatch.setenv("COLUMNS", "200")  # so that no help is wrapped
    tasks.show("mnist")
    listed = capsys.readouterr().out
    assert "one of 2nn, cnn, edges" in listed
    assert "passes over this peer's examples" in listed
    cards = [
        make_card("gait.py:Gait", "1", {}, settings={"width": SettingSpec(default=8, le=64)}),
        None,
    ]
    monkeypatch.setattr(
        tasks,
        "connect",
        lambda: SimpleNamespace(run=lambda name: SimpleNamespace(card=cards.pop(0))),
    )
    tasks.show("gait.py:Gait", json=True)
    assert json.loads(capsys.readouterr().out)["data"]["width"] == {"default": 8, "le": 64}
    with pytest.raises(UnknownName) as raised:
        tasks.show("gait.py:Gait")
    assert raised.value.hint == "commonweight run check gait.py:Gait --settings"
