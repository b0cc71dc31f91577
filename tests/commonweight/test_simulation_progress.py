"""What `commonweight simulate` shows of its rounds: a bar, lines, or nothing."""

from __future__ import annotations

import io
import sys

import pytest

from commonweight.simulation import command
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import RunSpec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(*, quiet: bool = False) -> None:
    """Two of four rounds."""
    rounds = [
        Round(round=1, digest="a" * 64, metrics={"accuracy": 0.25}),
        Round(round=2, digest="b" * 64, metrics={"accuracy": 0.5, "loss": None}),
    ]
    with command._progress(quiet=quiet) as on_round:
        for number in (1, 2):
            spec = RunSpec(task="mnist", rounds=4)
            on_round(Run(id="mnist-1", spec=spec, history=tuple(rounds[:number])))


def test_a_terminal_has_a_bar_with_the_last_rounds_number_and_metrics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    follow()
    *_, last = (line for line in terminal.getvalue().split("\r") if "━" in line)
    assert "round 2/4 accuracy 0.5000 " in last
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_round_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    follow()
    out, err = capsys.readouterr()
    shown = (out + err).splitlines()
    assert [line.split(" peers")[0] for line in shown] == [
        "round 1/4 accuracy 0.2500",
        "round 2/4 accuracy 0.5000",
    ]


def test_with_json_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    follow(quiet=True)
    assert (capsys.readouterr().out, terminal.getvalue()) == ("", "")
