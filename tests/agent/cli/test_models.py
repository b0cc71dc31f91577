"""Which shared models this machine can use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from agent.cli.models import LocalModel, Use, with_task
from agent.home import own_results
from agent.home.own_results import OwnModel, OwnResult, OwnRun
from agent.home.settings_schema import AgentSettings
from protocols.errors import UnknownName, UsageError
from protocols.messages.comparisons import Comparison, Estimate, Model


def test_a_model_without_the_layers_of_each_peer_is_refused(tmp_path: Path) -> None:
    model = LocalModel(tmp_path / "version", "ping", {"at_home": "*norm*"})
    with pytest.raises(UsageError, match=r"the layers \*norm\* of this run stay on each peer"):
        model.check_whole()


def test_a_model_of_a_run_is_the_one_that_is_recommended_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path))
    folder = own_results.folder_of(tmp_path, "tabular-1")
    folder.mkdir(parents=True)
    settings = {"model": "mlp", "at_home": "output.*", "dp_epsilon": 1.0}
    of = OwnRun(run="tabular-1", task="tabular", settings=settings, is_local=True)
    own_results.run_file(folder).write_bytes(msgspec.json.encode(of))
    version = LocalModel(
        tmp_path / "v", "tabular", settings, "after round 9", "tabular-1", "d" * 64
    )
    found = version.recommended(Use.RECOMMENDED)
    assert found.path == version.path
    assert "as far as this machine knows, the run has not ended" in found.origin
    assert found.origin.endswith("--run tabular-1")

    def compared(recommended: Model, **more: Any) -> None:
        one = Estimate(0.9, 0.8, 1.0)
        found = Comparison(
            run="tabular-1",
            metric="accuracy",
            rows=9,
            models=dict.fromkeys(("alone", "shared", "personal"), one),
            recommended=recommended,
        )
        result = OwnResult(run="tabular-1", task="tabular", at=0.0, comparison=found, **more)
        own_results.result_file(folder).write_bytes(msgspec.json.encode(result))

    compared("personal")
    assert version.recommended(Use.RECOMMENDED) is version, "its file is gone"
    own_results.model_file(folder, "personal").write_bytes(b"")
    found = version.recommended(Use.RECOMMENDED)
    assert found.path == folder / "personal.safetensors"
    assert found.settings == {"model": "mlp"}
    assert "the personal model of tabular-1, which is recommended on this machine" in found.origin
    found.check_whole()
    assert version.recommended(Use.SHARED) is version
    compared("shared")
    assert version.recommended(Use.RECOMMENDED) is version
    own_results.model_file(folder, "blend").write_bytes(b"")
    compared("blend")
    found = version.recommended(Use.RECOMMENDED)
    assert (found.kind, found.settings) == ("blend", {"model": "mlp"})
    assert found.title == "a blend of models of the task tabular"
    assert found.origin.startswith("the blend of tabular-1, which is recommended on this machine")
    written = version.exportable(Use.RECOMMENDED)
    assert (written.path, written.kind) == (version.path, "mlp")
    assert written.origin.endswith("a blend, which predicts here, cannot be written")

    # After a run of several models, the best version may be of another one than the newest.
    digest = hashlib.sha256(b"").hexdigest()
    own_results.model_file(folder, "shared").write_bytes(b"")
    earlier = (OwnModel(0, {"model": "linear"}),)
    several = replace(of, begun=5, earlier=earlier)
    own_results.run_file(folder).write_bytes(msgspec.json.encode(several))
    compared("shared", digest=digest, round=3, model="linear", choice="linear is kept (…)")
    for use in Use:
        best = version.recommended(use)
        assert (best.path.name, best.settings) == ("shared.safetensors", {"model": "linear"})
        assert best.title == f"{digest[:12]} of the task tabular, model linear"
        assert best.origin == "the best version of tabular-1, after round 3: linear is kept (…)"
    assert [found.result.digest for found in own_results.best_versions(tmp_path)] == [digest]
    own_results.model_file(folder, "shared").write_bytes(b"other")
    for use in Use:
        with pytest.raises(UnknownName, match="is damaged on this disk") as caught:
            version.recommended(use)
        assert caught.value.hint == "use the coordinator's: --run tabular-1"
        same = version._replace(digest=digest)  # a copy in the cache
        assert same.recommended(use) is same


def test_the_file_of_a_models_task_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "gait.py"
    file.write_text("class Gait: pass\n")
    own = LocalModel(tmp_path / "version", "gait.py:Gait", {})
    chosen = AgentSettings()
    with pytest.raises(UnknownName, match="has no task 'gait") as caught:
        with_task(chosen, own, "")
    assert caught.value.hint.startswith("name its file: --task ./gait.py:Gait, in Python task='./g")
    found = with_task(chosen, own, f"{file}:Gait")
    assert found.task_files == {"gait.py:Gait": f"{file}:Gait"}
    assert with_task(found, own, "") is found
    assert with_task(chosen, LocalModel(tmp_path, "ping", {}), "") is chosen
    with pytest.raises(UsageError, match="has no class Gaits"):
        with_task(chosen, own, f"{file}:Gaits")
    with pytest.raises(UsageError, match="of a Flower app, and only the app can use it"):
        with_task(chosen, LocalModel(tmp_path, "flower:qs", {}), "")
