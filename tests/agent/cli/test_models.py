"""Which shared models this machine can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cli.models import LocalModel, with_task
from agent.home.settings_schema import AgentSettings
from protocols.errors import UnknownName, UsageError


def test_a_model_without_the_layers_of_each_peer_is_refused(tmp_path: Path) -> None:
    model = LocalModel(tmp_path / "version", "ping", {"at_home": "*norm*"})
    with pytest.raises(UsageError, match=r"the layers \*norm\* of this run stay on each peer"):
        model.check_whole()


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
