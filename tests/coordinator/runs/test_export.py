"""Exported models: two files that say all there is to say, or an error and no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.runs import export, transitions
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from coordinator.storage.weight_store import WeightStore
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.model import model_card, personalization, schema_card
from protocols.model.weights import TensorSpec, Weights, file_digest

NAMES = {"p1": "north", "p2": "south"}


def model(value: float, **more: float) -> Weights:
    tensors = {"w": np.full((2, 3), value, np.float32)}
    return Weights(tensors | {name: np.array([v], np.float32) for name, v in more.items()})


@pytest.fixture
def lane(tmp_path: Path) -> WeightStore:
    (tmp_path / "home").mkdir()
    return WeightStore(tmp_path / "home")


def trained(lane: WeightStore, rounds: int, *, close: bool = True, **more: float) -> Run:
    """A run of p1 and p2; in every second round of p1 alone."""
    spec = RunSpec(task="gait", rounds=9, seed=7, settings={"lr": 0.5}, strategy="fedadam")
    card = schema_card.make_card(
        "gait", "3", {"w": TensorSpec("F32", (2, 3))}, {"classes": ("sit", "go")}
    )
    head = lane.save(model(0, **more))
    told: list[run_events.RunEvent] = [
        run_events.RunStarted(spec),
        run_events.SchemaAgreed(card),
        run_events.WeightsInitialised(head, "p1"),
    ]
    for number in range(1, rounds + 1):
        asked = ("p1", "p2") if number % 2 else ("p1",)
        told.append(run_events.RoundOpened(number, head, asked))
        for peer in asked:
            update = Update(digest=f"u{peer}", num_examples=1, metrics={})
            told.append(run_events.UpdateAccepted(number, peer, update))
        told.append(run_events.TrainingClosed(number, asked))
        digest = lane.save(model(number, **more))
        told.append(run_events.VersionCommitted(number, digest, head, asked, {}))
        head = digest
        if close or number < rounds:
            told.append(run_events.RoundClosed(number, {"accuracy": number / 10}, 1.0, 0, 0))
    return transitions.replay("r1", told)


def export_to(lane: WeightStore, run: Run, which: str, out: Path) -> str:
    version = export.resolve_version(run, which)
    return export.export(lane.version_path(version), run, version, NAMES, out)


def test_both_files_say_all_there_is_to_say(lane: WeightStore, tmp_path: Path) -> None:
    run = trained(lane, 3)
    out = tmp_path / "gait.safetensors"
    version = export_to(lane, run, "best", out)
    assert version == run.history[2].digest == file_digest(out)
    assert (load_file(out)["w"] == 3).all()
    card = json.loads((tmp_path / "gait.json").read_text())
    assert card["sha256"] == card["version"] == version
    assert (card["task"], card["task_version"], card["run"], card["round"]) == (
        "gait",
        "3",
        "r1",
        3,
    )
    assert card["settings"] == {"lr": 0.5}
    assert card["traits"] == {"classes": ["sit", "go"]}
    assert card["tensors"] == {"w": {"dtype": "F32", "shape": [2, 3]}}
    assert card["parents"] == [run.history[1].digest, run.history[0].digest, run.first]
    assert card["contributors"] == [
        {"peer": "p1", "name": "north", "rounds": 3},
        {"peer": "p2", "name": "south", "rounds": 2},
    ]
    assert card["metrics"] == {"accuracy": 0.3}
    assert (card["seed"], card["strategy"]) == (7, "fedadam")
    assert model_card.read(out).version == version


def test_any_version_that_is_kept_by_the_beginning_of_its_digest(
    lane: WeightStore, tmp_path: Path
) -> None:
    run = trained(lane, 3)
    export_to(lane, run, run.history[0].digest[:10], tmp_path / "a.safetensors")
    first = model_card.read(tmp_path / "a.safetensors")
    assert (first.round, first.parents, first.metrics) == (1, (run.first,), {"accuracy": 0.1})
    export_to(lane, run, run.first, tmp_path / "b.safetensors")
    none = model_card.read(tmp_path / "b.safetensors")
    assert (none.round, none.parents, none.contributors, none.metrics) == (0, (), (), {})


def test_a_version_whose_round_is_not_closed_has_no_metrics_yet(
    lane: WeightStore, tmp_path: Path
) -> None:
    run = trained(lane, 2, close=False)
    export_to(lane, run, "latest", tmp_path / "a.safetensors")
    card = model_card.read(tmp_path / "a.safetensors")
    assert (card.round, card.metrics) == (2, {})
    assert card.parents == (run.history[0].digest, run.first)
    assert [c.rounds for c in card.contributors] == [2, 1]


def test_control_variates_are_no_part_of_the_model(lane: WeightStore, tmp_path: Path) -> None:
    run = trained(lane, 1, **{personalization.control_name("w", {}): 1.0})
    out = tmp_path / "a.safetensors"
    version = export_to(lane, run, "latest", out)
    assert set(load_file(out)) == {"w"}
    card = model_card.read(out)
    assert card.version == version == run.head
    assert card.sha256 == file_digest(out) != version


def test_what_cannot_be_exported_is_told_and_nothing_is_written(
    lane: WeightStore, tmp_path: Path
) -> None:
    run = trained(lane, 2)
    out = tmp_path / "a.safetensors"
    for which in ("", "zz", "ABC"):
        with pytest.raises(UnknownName):
            export_to(lane, run, which, out)
    with pytest.raises(UnknownName):
        export_to(lane, trained(lane, 0), "best", out)
    lane.drop(run.history[0].digest)
    with pytest.raises(UnknownName, match="no longer on disk"):
        export_to(lane, run, run.history[0].digest, out)
    with pytest.raises(UsageError, match="one file"):
        export_to(lane, run, "best", tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"writes safetensors, not \.pt") as caught:
        export_to(lane, run, "best", tmp_path / "x.pt")
    assert caught.value.hint.startswith("name it x.safetensors; for ONNX")
    (tmp_path / "a.json").touch()
    with pytest.raises(CommonweightError, match=r"a.json exists already"):
        export_to(lane, run, "best", out)
    with pytest.raises(CommonweightError, match="cannot write"):
        export_to(lane, run, "best", tmp_path / "no" / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "home"]


def test_a_file_that_is_not_its_cards_is_refused(lane: WeightStore, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match="cannot read"):
        model_card.read(out)
    export_to(lane, trained(lane, 1), "best", out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(UsageError, match="does not match its card"):
        model_card.read(out)
    out.write_bytes(whole)
    for text in (b"{}", b"\xff", b'{"kind": 3}'):
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(UsageError, match="not a model card"):
            model_card.read(out)
