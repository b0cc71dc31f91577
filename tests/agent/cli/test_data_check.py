"""`data check` on a terminal: the order of the report, and commands that can be copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

import agent.cli.main
from protocols.local import homes


@pytest.mark.parametrize("width", [60, 140])
def test_the_report_fits_the_terminal_and_its_commands_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "home"))
    path = tmp_path / "visits.csv"
    rows = [f"{1 + n % 28}.{1 + n % 12}.2025;{'<5' if n % 9 == 0 else n};a, b" for n in range(90)]
    path.write_text("\n".join(["day of the visit;creatinine in the serum;x", *rows]) + "\n")
    done = CliRunner().invoke(agent.cli.main.app, ["data", "check", str(path)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    commands = [line for line in lines if line.startswith("      commonweight-agent ")]
    assert commands == [
        "      commonweight-agent data format 'day of the visit' 31.12.2024",
        "      commonweight-agent data map 'creatinine in the serum' '<5='",
    ]
    others = [line for line in lines if line not in commands and str(path) not in line]
    assert max(map(len, others)) < width
    told, odd = (
        next(n for n, line in enumerate(lines) if text in line) for text in ("told", "odd")
    )
    assert told < odd < lines.index(commands[0])
    assert "  x" in lines[odd:]


def test_a_format_is_set_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "home"))
    homes.open_home("agent", create=True)
    path = tmp_path / "prices.csv"
    path.write_text("price\n" + "".join(f'"{n},5"\n' for n in range(50)))

    def run(*words: str) -> str:
        done = CliRunner().invoke(agent.cli.main.app, ["data", *words])
        return done.output if done.exception is None else str(done.exception)

    assert "like 1.234,5" in run("check", str(path))
    assert "price is read as written like 1.234,5" in run("format", "price", "1.234,5")
    assert "mean 25, sd 14.43 of 50" in run("check", str(path))
    assert "'1.5' is no format" in run("format", "price", "1.5")
    assert "price is read as it is" in run("format", "price", "--clear")
    assert "like 1.234,5" in run("check", str(path))
