"""`run start --flower FOLDER` installs the app of a folder beside the coordinator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator.remote import app_order
from coordinator.storage import installed_apps
from protocols.errors import UsageError
from protocols.local import flower_apps, homes
from tests.support import flower_apps as apps


@pytest.mark.attack("20.consent", by="dependency")
def test_another_folder_gets_no_rights_of_an_app_with_its_name(
    coordinator_home: Path, tmp_path: Path
) -> None:
    """Attack: a downloaded app has the name of one that the operator lets run without a sandbox."""
    trusted, downloaded = tmp_path / "trusted", tmp_path / "downloaded"
    for folder in (trusted, downloaded):
        shutil.copytree(apps.FOLDER / "mean", folder)
    (downloaded / "mean_app/server_app.py").write_text("import os\n")
    coordinator_home.mkdir(exist_ok=True)
    (coordinator_home / homes.STAMP).write_text("1")
    card, app = flower_apps.install(trusted, sandbox=False)
    installed_apps.put(coordinator_home, card.name, app)
    with pytest.raises(UsageError, match="options that hold for that folder alone"):
        app_order.build({"flower": str(downloaded)})
    assert installed_apps.read(coordinator_home) == {"mean": app}
    # The same folder keeps them, after a change too.
    (trusted / "mean_app/more.py").write_text("")
    code = app_order.build({"flower": str(trusted)}).spec.app
    assert (installed_apps.read(coordinator_home)["mean"].sandbox, code != app.code) == (
        False,
        True,
    )
    # Without such options, another folder takes its place.
    installed_apps.put(coordinator_home, card.name, flower_apps.install(trusted)[1])
    app_order.build({"flower": str(downloaded)})
    assert installed_apps.read(coordinator_home)["mean"].folder == str(downloaded)
