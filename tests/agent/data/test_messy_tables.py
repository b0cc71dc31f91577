"""Tables as people have them: each oddity is handled, or refused in words that name the fix.

For each file: what `data check` says of it, and what a run makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data import open_table, table_report
from agent.data.settings import DataSettings
from agent.data.value_map import with_values
from agent.tasks.tabular import Tabular
from protocols.errors import CommonweightError, DataError
from protocols.tables import preprocessing
from protocols.tables.preprocessing import Derived
from tests.support.callbacks import ignore_step

ROWS = 80
Cell = Callable[[int], str]


def table(
    cells: Cell | None = None,
    name: str = "x",
    *,
    head: str = "",
    tail: str = "",
    separator: str = ",",
) -> str:
    """A table of ages and of a target, with one more column."""
    lines = [head or separator.join(["age", "ill", *([name] if cells else [])])]
    for number in range(ROWS):
        more = [cells(number)] if cells else []
        lines.append(separator.join([str(20 + number % 50), "yes" if number % 3 else "no", *more]))
    return "\n".join(lines) + "\n" + tail


def one_of(*values: str) -> Cell:
    return lambda number: values[number % len(values)]


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


def notes(path: Path, **data: Any) -> str:
    """All that `data check` says is odd."""
    of = DataSettings(path=str(path), **data)
    reader = with_values(open_table(of), of.values, of.formats)
    found = table_report.report(reader, of, "ill")
    each = [f"{one.name}: {note}" for one in found.columns for note in one.notes]
    return "\n".join([*found.notes, *each])


def derived(path: Path, **data: Any) -> Derived:
    """What a run of this peer alone makes of the table. It also trains and evaluates once."""
    task, settings = Tabular(), {"target": "ill", "epochs": 1}
    task.load(DataSettings(path=str(path), device="cpu", **data))
    found = preprocessing.derive({"me": task.survey(settings)}, settings)
    settings["preprocessing"] = preprocessing.encode(found.preprocessing)
    task.traits(settings)
    trained = task.train(task.init(0, settings), settings, ignore_step)
    task.evaluate(trained.weights, settings, ignore_step)  # type: ignore[arg-type]
    return found


class Mended(NamedTuple):
    """A column that is of use after what `data check` proposes: `data format` or `data map`."""

    cells: Cell
    says: str
    data: dict[str, Any]


MENDED = {
    "decimal commas": Mended(
        lambda n: f'"{n},{n % 7}"', "data format x 1.234,5", {"formats": {"x": "1.234,5"}}
    ),
    "thousands and decimal commas": Mended(
        lambda n: f'"1.{100 + n},5"', "data format x 1.234,5", {"formats": {"x": "1.234,5"}}
    ),
    "thousands in commas": Mended(
        lambda n: f'"1,{100 + n}.5"', "data format x 1,234.5", {"formats": {"x": "1,234.5"}}
    ),
    "thousands that may be decimals": Mended(
        lambda n: f'"1,{100 + n}"',
        "1,234 may be 1234 or 1.234: commonweight-agent data format x 1,234.5, or 1.234,5",
        {"formats": {"x": "1,234.5"}},
    ),
    "thousands in apostrophes": Mended(
        lambda n: f"1'{100 + n}", "data format x 1,234.5", {"formats": {"x": "1,234.5"}}
    ),
    "thousands in narrow spaces": Mended(
        lambda n: f"1\u202f{100 + n}", "data format x 1,234.5", {"formats": {"x": "1,234.5"}}
    ),
    "percent": Mended(lambda n: f"{n}.5 %", "signs in them", {"formats": {"x": "1,234.5"}}),
    "currency": Mended(lambda n: f"${n}.5", "signs in them", {"formats": {"x": "1,234.5"}}),
    "day first": Mended(
        lambda n: f"{1 + n % 28}.{1 + n % 12}.2024",
        "data format x 31.12.2024",
        {"formats": {"x": "31.12.2024"}},
    ),
    "month first": Mended(
        lambda n: f"{1 + n % 12}/{1 + n % 28}/2024 09:30",
        "data format x 12/31/2024",
        {"formats": {"x": "12/31/2024"}},
    ),
    "day or month first": Mended(
        lambda n: f"{1 + n % 12}/{1 + n % 7}/2024",
        "the day or the month may come first",
        {"formats": {"x": "12/31/2024"}},
    ),
    "below the limit of detection": Mended(
        lambda n: "<5" if n % 9 == 0 else str(5 + n),
        "numbers, except '<5': correct them, or read them as missing: "
        "commonweight-agent data map x '<5='",
        {"values": {"x": {"<5": ""}}},
    ),
    "a row with units": Mended(
        lambda n: "mg" if n == 0 else str(n), "except 'mg'", {"values": {"x": {"mg": ""}}}
    ),
    "a code for missing": Mended(
        lambda n: "999" if n % 9 == 0 else str(50 + n),
        "999 is there 9 times: if it stands for a missing value, "
        "commonweight-agent data map x 999=",
        {"values": {"x": {"999": ""}}},
    ),
}


@pytest.mark.parametrize("case", MENDED)
def test_a_command_reads_the_column_as_numbers(tmp_path: Path, case: str) -> None:
    mended = MENDED[case]
    path = written(tmp_path, table(mended.cells))
    assert mended.says in notes(path)
    kinds = {f.name: f.kind for f in derived(path, **mended.data).preprocessing.features}
    assert kinds["x"] in ("number", "date")
    assert "x:" not in notes(path, **mended.data)


SPELLINGS = {
    "case and spaces": (one_of("YES", " yes ", "no", "yes"), "YES=yes"),
    "words and numbers": (one_of("yes", "1", "no", "0", "yes"), "1=yes"),
    "languages": (one_of("ja", "yes", "no", "yes"), "ja=yes"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_are_told_to_the_owner_by_check_and_by_run(tmp_path: Path, case: str) -> None:
    cells, command = SPELLINGS[case]
    path = written(tmp_path, table(cells))
    assert f"data map x {command}" in notes(path)
    assert [text for _, text in derived(path).notes if command in text]


#: What is handled by itself: the text, the kind of the column x if it has one, and what is said.
HANDLED = {
    "texts for missing values": (
        table(lambda n: ["NaN", "n.a.", "#DIV/0!", "-", ".", "inf"][n % 6] if n % 2 else str(n)),
        "number",
        "",
    ),
    "true and false": (table(one_of("TRUE", "False")), "boolean", ""),
    "a byte order mark": ("\ufeff" + table(), "", ""),
    "lines of Windows": (table(one_of("1", "2")).replace("\n", "\r\n"), "number", ""),
    "semicolons": (table(one_of("1", "2"), separator=";"), "number", ""),
    "a unit in the name": (table(one_of("1", "2"), "x"), "number", ""),
    "blank lines at the end": (table(tail="\n\n"), "", ""),
    "empty rows at the end": (table(tail=",\n,\n"), "", "2 empty rows at the end"),
    "an index without a name": (table(str, "x").replace("ill,x", "ill,"), "", "without a name"),
    "a constant": (table(one_of("3")), "number", "x: one value only"),
    "a number as identifier": (
        table(lambda n: str(1000 + 7 * n), "x_id"),
        "",
        "x_id: each row has another value, as in an identifier: a run leaves it out",
    ),
    "a text as identifier": (
        table(lambda n: f"P{n:04}"),
        "",
        "x: each row has another value, as in an identifier: a run leaves it out",
    ),
    "a total row": (table(one_of("1"), tail=",,Total\n"), "text", "looks like a total: delete it"),
    "a unit in each value": (table(lambda n: f"{50 + n} kg"), "", "numbers with the unit kg"),
    "dates as Excel counts them": (
        table(lambda n: str(45000 + n % 60), "visit date"),
        "",
        "visit date: numbers like the dates of Excel, where 45000 is 2023-03-15",
    ),
    "a line break in a value": (table(one_of('"a\nb"', "c")), "text", ""),
    "spaces at the ends of a name": (table(one_of("1"), " z"), "", "' z' has spaces at its ends"),
}


@pytest.mark.parametrize("case", HANDLED)
def test_an_ordinary_oddity_does_not_stop_a_run(tmp_path: Path, case: str) -> None:
    text, kind, says = HANDLED[case]
    path = written(tmp_path, text)
    assert says in notes(path)
    kinds = {f.name: f.kind for f in derived(path).preprocessing.features}
    assert kinds.get("x", "") == kind
    assert kinds["age"] == "number"


#: What is refused: the bytes, and what the owner reads.
REFUSED = {
    "UTF-16": (table().encode("utf-16"), "UTF-16", "save it as 'CSV UTF-8' in Excel"),
    "UTF-16 without a mark": (table().encode("utf-16-le"), "UTF-8", "iconv -f utf-16"),
    "Latin-1": (table(one_of("Zürich")).encode("latin-1"), "UTF-8", "iconv -f windows-1252"),
    "Latin-1 in the header": (table(str, "Größe").encode("latin-1"), "UTF-8", "CSV UTF-8"),
    "a line for Excel": (b"sep=;\n" + table(separator=";").encode(), "header", "delete the line"),
    "two columns of one name": (table(str, "age").encode(), "the same name", "'age'"),
    "merged header cells": (
        table(lambda n: f"{n},{n}", head="age,ill,,").encode(),
        "no name",
        "where header cells were merged",
    ),
    "a title above the header": (
        b"Report\n" + table().encode(),
        "as a table",
        "row 2 has 2 columns, and the first row has 1. Delete a title",
    ),
    "decimal commas between commas": (
        table(lambda n: f"{n},5", "x").encode(),
        "as a table",
        "put values with ',' in them in quotes",
    ),
    "a comment below": (table(tail="a,b,c,d\n").encode(), "as a table", "comments below the table"),
    "only a header": (b"age,ill\n", "no rows", ""),
    "nothing": (b"", "no header", "is empty"),
    "no header": (b"30,no,1.5\n" * 50, "no column 'ill'", "there are 30, no, 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_fix(tmp_path: Path, case: str) -> None:
    content, message, hint = REFUSED[case]
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as found:
        notes(path)
    assert message in f"{found.value.message} {found.value.hint}"
    assert hint in found.value.hint
    assert "table.csv" not in found.value.message
    with pytest.raises(CommonweightError):
        derived(path)


CODED: dict[str, tuple[Cell, str]] = {
    "0 and 1": (one_of("1", "0"), "data map ill 0=no 1=yes"),
    "true and false": (one_of("TRUE", "FALSE"), "data map ill false=no true=yes"),
    "another language": (one_of("ja", "nein"), "data map ill ja=yes nein=no"),
}


@pytest.mark.parametrize("case", CODED)
def test_a_target_that_is_coded_otherwise_is_told_with_the_command(
    tmp_path: Path, case: str
) -> None:
    cells, command = CODED[case]
    texts = [table(), table(), table().replace("age,ill", "age,before")]
    lines = texts[2].splitlines()
    texts[2] = "\n".join(f"{line},{cells(n) if n else 'ill'}" for n, line in enumerate(lines))
    tables, settings = {}, {"target": "ill"}
    for name, text in zip("abc", texts, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        task = Tabular()
        task.load(DataSettings(path=str(written(folder, text))))
        tables[name] = task.survey(settings)
    found = preprocessing.derive(tables, settings)
    told = [text for peer, text in found.notes if peer == "c"]
    told += [error.hint for peer, error in found.incompatible.items() if peer == "c"]
    assert any(command in text for text in told), told
    pairs = dict(pair.split("=") for pair in command.split()[3:])
    of = DataSettings(path=str(tmp_path / "c" / "table.csv"), values={"ill": pairs})
    task = Tabular()
    task.load(of)
    mended = preprocessing.derive(tables | {"c": task.survey(settings)}, settings)
    assert not mended.incompatible
    assert mended.preprocessing.target.classes == ("no", "yes")
