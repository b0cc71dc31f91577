"""What a refusal, a failure or a kind says of an owner's machine, files and rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.analytics import job_handler
from agent.data import open_table, profile
from agent.data.settings import DataSettings
from agent.home import settings
from agent.tasks.language import next_token
from agent.tasks.training import class_folders
from protocols.analytics.parser import parse_query
from protocols.errors import CommonweightError, DataError, SchemaMismatch
from protocols.messages import refusals
from protocols.tables.preprocessing import Feature, Preprocessing, TableSettings, Target
from tests.hostile.test_analyze import Victim, persons

WANTED = TableSettings(
    target="smoker", kind="", features=(), categorical=frozenset(), scaling="", hashed=False
)

pytestmark = pytest.mark.attack("20.3", by="coordinator")


def _table(file: Path, rows: list[dict[str, Any]]) -> DataSettings:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return DataSettings(path=str(file), min_rows=1)


@pytest.mark.parametrize("broken", ["settings", "log"])
def test_a_question_that_fails_tells_no_path_and_no_setting(tmp_path: Path, broken: str) -> None:
    """Attack: ask while the owner's settings or files are wrong, and read the error."""
    home = tmp_path / "anna"
    home.mkdir()
    settings.change(home, analyze="on", data=str(tmp_path / "patients.csv"), sandbox="off")
    if broken == "settings":
        (home / settings.FILE).write_text('data = ["/home/anna/patients.csv"]\nanalyze = "on"\n')
    else:
        (home / "told" / "analysis.db").mkdir(parents=True)
    with pytest.raises(CommonweightError) as failed:
        job_handler.answer(parse_query("count"), home)
    told = refusals.refusal_of(failed.value).encode()
    assert "its owner sees why" in told
    assert not any(word in told for word in ("/", "anna", "patients", "analysis"))
    assert len(failed.value.hint) > 20, "the owner reads why"


def test_a_first_row_that_is_taken_for_a_header_is_not_quoted(tmp_path: Path) -> None:
    """Attack: read the error of a table without a header, in whose first row a value is there
    twice."""
    file = tmp_path / "patients.csv"
    file.write_text("Hansen,51,hiv,hiv\nOlsen,37,flu,none\n")
    with pytest.raises(DataError) as failed:
        open_table(DataSettings(path=str(file))).columns()
    assert "hiv" not in refusals.refusal_of(failed.value).encode()
    assert "hiv" in failed.value.hint


def test_a_column_that_is_kept_back_is_not_suggested(tmp_path: Path) -> None:
    """Attack: name columns like some that the owner keeps back, and read the similar ones."""
    data = _table(tmp_path / "t.csv", [{"age": n, "hiv_status_2024": n % 2} for n in range(30)])
    made = Preprocessing(
        features=(
            Feature(name="hiv_status", kind="number"),
            Feature(name="agee", kind="number"),
        ),
        target=Target(name="target", kind="number"),
    )
    limited = DataSettings(path=data.path, columns=("age", "target"))
    with pytest.raises(SchemaMismatch) as failed:
        profile.check_table(open_table(data), limited, made, WANTED._replace(target="age"))
    assert "similar: age" in failed.value.message
    assert "2024" not in failed.value.message


def test_a_refusal_has_no_size_of_texts_and_folders(tmp_path: Path) -> None:
    """Attack: ask for more than there is, and read how much there is."""
    np = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    with pytest.raises(DataError) as failed:
        next_token.split_windows(np.zeros(12_345, np.int32), 50_000)
    assert "12345" not in failed.value.message
    assert "12345" in failed.value.hint
    with pytest.raises(DataError) as failed:
        class_folders.split_held_out(["one"] * 17, np.arange(17) == 3)
    assert "17" not in failed.value.message


def test_a_value_that_one_row_has_gives_its_column_no_kind(tmp_path: Path) -> None:
    """Attack: read from the kind of an empty column whether anybody has a value in it."""
    rows = [row | {"hiv_since": "", "note": ""} for row in persons()]
    answers = []
    for number, more in enumerate(({}, {"hiv_since": "2024-03-01", "note": "positive"})):
        rows[-1] |= more
        victim = Victim(tmp_path / str(number), rows)
        asked = ("missing(hiv_since), missing(note)", "mean(hiv_since)", "mean(note)", "count")
        answers.append([victim.ask(text) for text in asked])
        by_note = victim.ask("count by note")
        answers[-1].append(by_note)
        data = DataSettings(path=str(victim.file), min_rows=1)
        told = profile.survey(open_table(data), data, WANTED)
        answers[-1].append({name: told.columns[name] for name in ("hiv_since", "note")})
    assert answers[0] == answers[1]
    assert answers[0][0].kinds == {"hiv_since": "empty", "note": "empty"}
