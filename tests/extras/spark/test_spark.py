"""Tables that Spark reads are those that the default reader sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.data import open_table
from agent.data.spark import check_java
from agent.tasks import DataSettings
from protocols.errors import CommonweightError
from tests.extras.same_tables import FORMS, check_rows, check_statistics, table


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_and_statistics(tmp_path: Path, form: str) -> None:
    path = table(tmp_path, form)
    data = DataSettings(path=str(path), reader="spark:local[2]", min_count=1, extremes=True)
    check_rows(open_table(data), path)
    check_statistics(data)


def test_without_java_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CommonweightError, match="Spark needs Java 17 or newer, and there is none"
    ) as caught:
        check_java()
    assert "openjdk-17" in caught.value.hint
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    with pytest.raises(CommonweightError, match="and 11 is here"):
        check_java()
