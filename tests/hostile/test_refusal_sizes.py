"""A refused training or survey does not tell how many rows it would have told about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.tasks.work import Init
from protocols.errors import NotAllowed
from protocols.messages.refusals import refusal_of
from protocols.tables import preprocessing
from tests.hostile.test_differences_in_training import SETTINGS, Row, Trainer, people

pytestmark = pytest.mark.attack("20.3")


def refusal(ask: Callable[[], Any]) -> str:
    """What the operator reads."""
    with pytest.raises(NotAllowed) as refused:
        ask()
    return refusal_of(refused.value).encode()


@pytest.mark.parametrize("few", [1, 2, 4])
def test_how_many_rows_came_or_went_is_not_told(tmp_path: Path, few: int) -> None:
    """Attack: ask again after a few persons left, and read their number from the refusal."""
    rows = people(60)
    trainer = Trainer(tmp_path, rows)
    trainer.train()
    trainer.write(rows[3:])
    other = refusal(trainer.survey), refusal(trainer.train)
    trainer.write(rows[few:])
    assert (refusal(trainer.survey), refusal(trainer.train)) == other
    # All rows are new, and there are a few more or less of them.
    trainer.write([{**row, "pay": row["pay"] + 1} for row in rows[3:]])
    other = refusal(trainer.survey), ""
    trainer.write([{**row, "pay": row["pay"] + 1} for row in rows[few:]])
    assert (refusal(trainer.survey), "") == other


def _refusals_of_classes(folder: Path, rare: int) -> list[str]:
    rows: list[Row] = [{**row, "grade": "ab"[n % 2]} for n, row in enumerate(people(58))]
    rows += [{**row, "grade": "c"} for row in people(rare)]
    wanted = {**SETTINGS, "target": "grade", "kind": "classification", "features": "age"}
    folder.mkdir()
    trainer = Trainer(folder, rows, wanted)
    made = preprocessing.decode(trainer.settings["preprocessing"])
    found = []
    for classes in (("a", "b", "c"), ("a", "b"), ("c", "d")):
        target = replace(made.target, classes=classes)
        chosen = {**wanted, "preprocessing": preprocessing.encode(replace(made, target=target))}
        trainer.do(Init, chosen, seed=0, out=trainer.base)
        try:
            trainer.train(**chosen)
            found.append("")
        except NotAllowed as err:
            found.append(refusal_of(err).encode())
    return found


def test_the_size_of_a_rare_class_is_not_told(tmp_path: Path) -> None:
    """Attack: leave out one class, or all others, and read its size from the refusal."""
    told = {few: _refusals_of_classes(tmp_path / str(few), few) for few in (1, 2, 3, 4)}
    assert len({tuple(found) for found in told.values()}) == 1, told
