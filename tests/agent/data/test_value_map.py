"""Values that are read as others, and the notes that propose it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from agent.cli.data import map_values
from agent.data import open_table
from agent.data import profile as survey
from agent.data.settings import DataSettings
from agent.data.table_memory import TableMemory
from agent.data.value_map import with_values
from agent.home import settings
from protocols.tables import preprocessing
from protocols.tables.preprocessing import TableSettings
from protocols.tables.statistics import ColumnStatistics, TableStatistics
from tests.support.tables import write_csv

VALUES = {"smoker": {"YES": "yes", "1": "yes", "0": "no"}}
ROWS = [{"id": str(n), "smoker": ["YES", " 1 ", "0", "no", ""][n % 5]} for n in range(50)]


def read(path: Path) -> list[str | None]:
    reader = with_values(open_table(DataSettings(path=str(path))), VALUES)
    batches = [batch.column(0).to_pylist() for batch in reader.batches(["smoker"])]
    return [value for batch in batches for value in batch]


def test_values_are_read_as_others(tmp_path: Path) -> None:
    assert read(write_csv(tmp_path / "t.csv", ROWS))[:5] == ["yes", "yes", "no", "no", None]


def test_a_column_of_numbers_becomes_one_of_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"smoker": str(n % 2)} for n in range(50)])
    data = DataSettings(path=str(path))
    wanted = TableSettings("", "auto", (), frozenset(), "standard", False)
    told = survey.survey(with_values(open_table(data), VALUES), data, wanted)
    assert told.columns["smoker"].categories == {"yes": 25, "no": 25}
    assert survey.survey(open_table(data), data, wanted).columns["smoker"].kind == "number"


def test_the_memory_knows_the_rows_as_they_are(tmp_path: Path) -> None:
    """A new spelling makes no row a new one, which would wait for others."""
    path = write_csv(tmp_path / "t.csv", ROWS)
    memory = TableMemory(tmp_path / "told.db")
    try:
        before = memory.admit(open_table(DataSettings(path=str(path))), 5)
        after = memory.admit(open_table(DataSettings(path=str(path))), 5)
        assert before.numbers.tolist() == after.numbers.tolist()
        mapped = with_values(after.reader, VALUES)
        assert mapped.fingerprint() == before.reader.fingerprint()
        assert sum(map(len, mapped.batches(["smoker"]))) == len(ROWS)
    finally:
        memory.close()


def test_another_spelling_is_named_with_the_command() -> None:
    def table(**counts: int) -> TableStatistics:
        column = ColumnStatistics(kind="text", categories=counts)
        dose = ColumnStatistics(kind="text", categories={"low": 20, "high": 20})
        return TableStatistics(rows=40, columns={"smoker": column, "dose": dose})

    tables = {
        "a": table(yes=20, no=20),
        "b": table(YES=15, NO=25),
        "c": table(yes=10, No=30),
    }
    notes = preprocessing.derive(tables, {"target": "dose"}).notes
    by_peer = {peer: text for peer, text in notes if peer}
    assert by_peer.keys() == {"a", "b"}
    assert by_peer["b"] == (
        "column smoker has 'NO' where others have 'No', 'YES' where others have 'yes'; to read "
        "them alike: commonweight-agent data map smoker NO=No YES=yes"
    )
    assert preprocessing.derive({"a": tables["a"]}, {"target": "dose"}).notes == []


def test_the_owner_maps_and_unmaps(agent_home: Path) -> None:
    map_values("smoker", ["YES=yes", "1=yes"])
    map_values("sex", ["F=f"])
    assert settings.read(agent_home).data_values == {
        "smoker": {"YES": "yes", "1": "yes"},
        "sex": {"F": "f"},
    }
    assert settings.data_settings(settings.read(agent_home), agent_home).values["sex"] == {"F": "f"}
    map_values("sex", [], clear=True)
    assert settings.read(agent_home).data_values.keys() == {"smoker"}
