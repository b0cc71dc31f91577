"""Answers whose texts are meant for the program that shows them, and answers that are too long."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.cli.common import print_data
from agent.inference import writers
from commonweight import html
from coordinator.cli import common
from coordinator.jobs import state, validation
from coordinator.jobs.output import merge
from coordinator.jobs.state import Job, Unit
from coordinator.jobs.store import JobStore
from coordinator.monitor.tui import export
from coordinator.storage.job_events import AnswerInfo, Block, JobSpec
from protocols.analytics.parser import parse_query
from protocols.errors import BadMessage
from protocols.local import cli_entry

FORMULAS = (
    "=cmd|'/C calc'!A0",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    '@SUM(A1)*HYPERLINK("http://x","y")',
    "\t=1+1",
    "\r=1+1",
    "  =1+1",
    "\n=1+1",
    "a\r=1+1",
    "\uff1d1+1",
)
HARMLESS = ("Oslo", "-5", "+1e5", "a=b", "", "Røros @ home")


def _is_formula(cell: str) -> bool:
    return cell.lstrip()[:1] in "=+-@\uff1d\uff0b\uff0d\uff20" and not _is_number(cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


@pytest.mark.attack("20.14")
def test_merged_answers_run_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    """Attack: answer with texts, and names of columns, that a spreadsheet runs as formulas."""
    store = JobStore(tmp_path / "jobs")
    texts = [*FORMULAS, *HARMLESS]
    lines: list[list[Any]] = [["row", FORMULAS[0]], *([n, text] for n, text in enumerate(texts))]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    answer = AnswerInfo(
        digest=hashlib.sha256(body).hexdigest(), nbytes=len(body), rows=len(texts), body=body
    )
    unit = Unit(number=0, first=0, stop=1, answers={"eve": answer}, verified=answer.digest)
    spec = JobSpec(kind="scatter", blocks=(Block(len(texts), 1),))
    merge(Job(id="job", spec=spec, units={0: unit}), store, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert not [cell for row in found for cell in row if _is_formula(cell)]
    assert [row[1] for row in found[-len(HARMLESS) :]] == list(HARMLESS)


@pytest.mark.attack("20.14")
def test_predictions_and_exports_run_no_formula(tmp_path: Path) -> None:
    """Attack: name a class, a peer or a label as a formula; it comes to the owner's predictions
    and to the monitor's exports."""
    batch = {FORMULAS[1]: np.array(FORMULAS), "p": np.full(len(FORMULAS), -0.5)}
    writers.write([batch], tmp_path / "out.csv")
    predictions = (tmp_path / "out.csv").read_text()
    exported = export.as_csv([{"peer": text} for text in FORMULAS])
    for text in (predictions, exported):
        found = list(csv.reader(io.StringIO(text)))
        assert not [cell for row in found for cell in row if _is_formula(cell)]


@pytest.mark.attack("20.14")
@pytest.mark.parametrize(
    "text",
    [
        "[/]",
        "[bold red]winner[/bold red]",
        "[link=http://evil]x[/link]",
        "[@click=app.quit]x[/]",
        "a\nforged  peer  99.9",
        "\x1b[2Kforged",
        "a\rforged",
        "\u2028forged",
        "\u202eforged",
    ],
)
def test_a_value_of_a_table_is_no_markup_and_no_row(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Attack: call a city `[/]`, so that the table breaks, or add a row by a line break."""
    common.print_table(["city", text], [["Oslo", 1], [text, 2]])
    cli_entry.print_text(f"{text.splitlines()[0]} is excused")
    cli_entry.print_line(text)
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 4
    expected = "".join(c if c.isprintable() else "·" for c in text)
    assert expected in shown.out
    for part in shown:
        assert "".join(part.split("\n")).isprintable()


@pytest.mark.attack("20.6")
@pytest.mark.parametrize(
    ("question", "of_bytes"),
    [("count by town", 3_000_000), ("histogram(age, 1000, 0, 90) by town", 3_000_000),
     ("count", 80_000), ("quantile(age, 0.5)", 400_000)],
)  # fmt: skip
def test_a_huge_answer_is_dropped_before_it_is_read(
    tmp_path: Path, question: str, of_bytes: int
) -> None:
    """Attack: answer with millions of well-formed entries, which take seconds to decode."""
    query = msgspec.json.encode(parse_query(question)).decode()
    job = state.started("job", JobSpec(kind="analyze", query=query, peers=("eve",)))
    unit = Unit(number=0, first=0, stop=1, only="eve")
    store = JobStore(tmp_path / "jobs")
    # Blanks are part of well-formed JSON; a decoder would read all of them.
    body = b'{"rows":0,"cells":[' + b" " * of_bytes + b"]}"
    answer = AnswerInfo(digest=hashlib.sha256(body).hexdigest(), nbytes=len(body), rows=0)
    store.version_path(answer.digest).write_bytes(body)
    with pytest.raises(BadMessage, match="too long"):
        validation.check(job, unit, answer, store)
    store.version_path(answer.digest).unlink()  # so it is not read
    with pytest.raises(BadMessage, match="too long"):
        validation.check(job, unit, answer, store)


@pytest.mark.attack("20.14", by="coordinator")
def test_no_line_of_an_agents_command_is_obeyed_by_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Attack: have escape codes, or letters that turn a line around, in what a command prints."""
    codes = "\x1b[2J\x9b31m\u202e\u2066\x07"
    print_data({"text": codes}, [f"a{codes}b"], json=False)
    print_data({"text": codes}, [], json=True)
    plain, line = capsys.readouterr().out.splitlines()
    assert plain == f"a{''.join('·' if not c.isprintable() else c for c in codes)}b"
    assert line.isprintable()
    assert json.loads(line)["data"]["text"] == codes


@pytest.mark.attack("20.14")
def test_a_name_is_no_markup_in_a_notebook() -> None:
    """Attack: a peer's name or the reason of its state holds a script, for a notebook to run."""
    script = "<script>alert(1)</script>"
    shown = html.table((script, "peer"), [(script, '<img src="x" onerror="alert(1)">')])
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;") == 5
