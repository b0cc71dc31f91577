"""Runs on tables whose preprocessing is in a file: no peer sends statistics of its columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.home.privacy_ledger import PrivacyLedger
from agent.tasks.tabular import Tabular
from benchmarks.quality.fleet import fleet_of
from coordinator.cli import noise_forecast
from coordinator.cli.noise_forecast import Known
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError, SchemaMismatch, UsageError
from protocols.tables import preprocessing
from tests.support.fleet_harness import ROOT
from tests.support.tables import mixed, write_csv

FILE: dict[str, Any] = {
    "features": [
        {"name": "age", "kind": "number", "mean": 45, "scale": 15, "missing": True},
        {"name": "city", "kind": "text", "categories": ["Bern", "Zürich"]},
    ],
    "target": {"name": "label", "kind": "text", "classes": ["no", "yes"]},
}
PRIVATE = {"dp": 8.0, "dp-shared": 2, "secure": True, "quorum": 3, "rounds": 2}
STEP = ("batch_size=all", "epochs=1", "lr=0.5", "optimiser=sgd")


def ordered(folder: Path, made: Any = FILE, **more: Any) -> RunSpec:
    path = folder / "columns.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    given = {"task": "tabular", "set": STEP, "preprocessing": path, **more}
    return build_order(given).spec


@pytest.fixture
def parts(tmp_path: Path) -> Sequence[DataSettings]:
    files = [write_csv(tmp_path / f"{place}.csv", mixed(60)) for place in range(3)]
    return [
        DataSettings(path=str(file), index=place, device="cpu") for place, file in enumerate(files)
    ]


def run_with_limits(spec: RunSpec, parts: Sequence[DataSettings]) -> tuple[Run, list[Any]]:
    """A run whose owners have a limit, and what the ledger of the first one has."""
    with fleet_of(parts, secure=True) as fleet:
        for peer in fleet.peers.values():
            peer.owner = replace(
                peer.owner, privacy_max_epsilon=8.0, privacy_delta=1e-5, privacy_shared="on"
            )
        run = fleet.run(spec)
        told = PrivacyLedger(next(iter(fleet.peers.values())).ledger)
        return run, list(told.charges())


def test_owners_with_a_limit_train_on_tables_and_tell_nothing_but_noise(
    tmp_path: Path, parts: Sequence[DataSettings]
) -> None:
    run, charges = run_with_limits(ordered(tmp_path, **PRIVATE), parts)
    assert len(run.history) == 2
    assert [charge.purpose for charge in charges] == ["training"] * 2
    assert all(charge.noisy for charge in charges)
    assert run.card is not None
    assert run.card.traits["features"] == ("age", "city")
    # Without the file, the peers would have to describe their columns.
    asked = build_order({"task": "tabular", "target": "label", "set": STEP, **PRIVATE}).spec
    with pytest.raises(
        CommonweightError, match="the statistics of its table would leave without noise"
    ):
        run_with_limits(asked, parts)


def test_the_file_names_target_and_features(tmp_path: Path) -> None:
    spec = ordered(tmp_path)
    spec_rules.check(spec)
    assert (spec.settings["target"], spec.settings["features"]) == ("label", "age,city")
    made = preprocessing.decode(str(spec.settings["preprocessing"]))
    assert [feature.scale for feature in made.features] == [15, 1]
    example = ROOT / "docs" / "examples" / "columns.json"
    spec_rules.check(build_order({"task": "tabular", "preprocessing": example}).spec)
    assert example.read_text() in (ROOT / "docs" / "privacy.md").read_text()
    with pytest.raises(UsageError, match="for the target label, and the run for other"):
        spec_rules.check(ordered(tmp_path, target="other"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({**FILE, "scaling": "minmax"}, "has unknown names: scaling"),
        ({**FILE, "features": []}, "has no features"),
        ({**FILE, "features": FILE["features"] * 2}, "names the column age twice"),
        ({**FILE, "features": [{"name": "a", "kind": "number", "scale": 0}]}, "scale above 0"),
        ({**FILE, "features": [{"name": "a", "kind": "text"}]}, "a text needs its categories"),
        ({**FILE, "features": [{"name": "a,b", "kind": "number"}]}, "has a comma"),
        ({**FILE, "target": {"name": "y", "kind": "text", "classes": ["no"]}}, "has one class"),
        ({"features": []}, "cannot use .*columns.json as preprocessing"),
        ("text", "cannot use .*columns.json as preprocessing"),
    ],
)
def test_what_a_file_cannot_say_is_refused(tmp_path: Path, wrong: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ordered(tmp_path, wrong)


def test_it_is_for_tables_and_excludes_features(tmp_path: Path) -> None:
    for more in ({"task": "mnist"}, {"features": "age"}):
        with pytest.raises(UsageError, match="for the task tabular, and names the features"):
            ordered(tmp_path, **more)
    with pytest.raises(UsageError, match=r"cannot use .* No such file"):
        build_order({"task": "tabular", "preprocessing": tmp_path / "none.json"})


def test_run_start_says_what_noise_does_not_cover(tmp_path: Path) -> None:
    def said(spec: RunSpec) -> str:
        return "\n".join(noise_forecast.lines(spec, 3, Known()))

    asked = build_order({"task": "tabular", "target": "label", "set": STEP, **PRIVATE}).spec
    assert "statistics of their columns without noise, which ε does not cover" in said(asked)
    assert "before round 1" not in said(ordered(tmp_path, **PRIVATE))
    pictures = RunSpec(task="images", rounds=2, dp_epsilon=3.0)
    assert "the size of each class without noise" in said(pictures)
    named = replace(pictures, settings={"classes": "cat,dog"})
    assert "before round 1" not in said(named)


def test_a_peer_whose_table_lacks_a_column_is_refused(
    tmp_path: Path, parts: Sequence[DataSettings]
) -> None:
    settings = ordered(tmp_path).settings
    task = Tabular()
    task.load(parts[0])
    assert task.traits(settings)["features"] == ["age", "city"]
    rows = [{name: row[name] for name in ("age", "label")} for row in mixed(60)]
    task.load(replace(parts[0], path=str(write_csv(tmp_path / "less.csv", rows))))
    with pytest.raises(SchemaMismatch, match="city"):
        task.traits(settings)
