"""Flower apps that an owner installs on a machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from agent.home import settings
from protocols.errors import UsageError
from protocols.local import flower_apps
from tests.agent.cli.test_main import agent
from tests.support import flower_apps as apps


def test_an_app_is_installed_listed_and_removed(agent_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mean"
    shutil.copytree(apps.FOLDER / "mean", folder)
    (tmp_path / "rows.csv").write_text("a\n1\n")
    words = ["--part", "1/3", "--set", "db-url=sqlite:///x", "--set", "size=4"]
    code, _, said = agent(
        agent_home, "app", "add", str(folder), *words, "--read", str(tmp_path / "rows.csv")
    )
    card = flower_apps.read_card(folder)
    assert code == 0, said
    assert f"installed mean, code {card.code[:12]}" in said
    app = settings.read(agent_home).apps["mean"]
    assert app.config == {
        "partition-id": 1,
        "num-partitions": 3,
        "db-url": "sqlite:///x",
        "size": 4,
    }
    assert app.read == (str(tmp_path / "rows.csv"),)
    _, told, _ = agent(agent_home, "app", "list", "--json")
    (row,) = json.loads(told)["data"]
    assert (row["app"], row["code"], row["state"]) == ("mean", card.code, "✓ installed")
    # Data and outputs are no code; a changed code file is noticed.
    (folder / "final_model.pt").write_bytes(b"weights")
    (folder / "mean_app" / "__pycache__").mkdir()
    (folder / "mean_app" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"")
    assert flower_apps.read_card(folder) == card
    (folder / "mean_app" / "new.py").write_text("")
    _, told, _ = agent(agent_home, "app", "list")
    assert "files have changed: commonweight-agent app add" in told
    code, _, said = agent(agent_home, "app", "remove", "mean")
    assert (code, said) == (0, "removed mean\n")
    assert settings.read(agent_home).apps == {}
    assert agent(agent_home, "app", "remove", "mean")[0] == 2


def test_a_folder_that_is_no_app_is_refused(agent_home: Path, tmp_path: Path) -> None:
    code, _, said = agent(agent_home, "app", "add", str(tmp_path))
    assert code == 2
    assert "is no Flower app: it has no pyproject.toml" in said
    assert "there is no folder /" in agent(agent_home, "app", "add", "./none")[2]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    code, _, said = agent(agent_home, "app", "add", str(tmp_path))
    assert code == 2
    assert "is not that of a Flower app: KeyError 'tool'" in said
    mean = str(apps.FOLDER / "mean")
    for words, why in (
        (["--python", "/none/python"], "is no program"),
        (["--read", "/none"], "does not exist"),
        (["--part", "3/3"], "is not a part"),
        (["--set", "x"], "is not key=value"),
        (["--write", str(agent_home)], "would let the app change"),
        (["--write", str(agent_home.parent)], "would let the app change"),
    ):
        code, _, said = agent(agent_home, "app", "add", mean, *words)
        assert code == 2
        assert why in said
    # An interpreter that cannot import what runs an app.
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no flwr' >&2\nexit 1\n")
    other.chmod(0o755)
    code, _, said = agent(agent_home, "app", "add", mean, "--python", str(other))
    assert code == 1
    assert "cannot run Flower apps: ModuleNotFoundError" in said
    assert "-m pip install commonweight" in said


@pytest.mark.attack("20.4", by="task")
@pytest.mark.parametrize("name", ["../evil", "a/b", "", "x" * 58, "a\\nb", "a..b"])
def test_an_app_with_the_name_of_a_path_is_refused(name: str, tmp_path: Path) -> None:
    """Attack: an app has a name that is a path, or that no file can have."""
    text = (apps.FOLDER / "mean" / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('name = "mean"', f'name = "{name}"'))
    with pytest.raises(UsageError, match="is no name of an app"):
        flower_apps.read_card(tmp_path)


def test_a_folder_with_too_much_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_apps, "MAX_FILES", 3)
    for number in range(5):
        (tmp_path / f"{number}.py").write_text("")
    with pytest.raises(UsageError, match="more code than an app may have"):
        flower_apps.digest(tmp_path)


def test_changes_of_a_run_config_have_the_types_of_the_app() -> None:
    config = {"rounds": 3, "lr": 0.1, "names": "a,b", "fit": True, "model.size": 4}
    texts = ["rounds=5", "lr=1", "names=7", "fit=false", "model.size=2"]
    changes = flower_apps.parse_changes(config, texts)
    assert flower_apps.fuse(config, changes) == {
        "rounds": 5,
        "lr": 1.0,
        "names": "7",
        "fit": False,
        "model.size": 2,
    }
    with pytest.raises(UsageError, match="no setting 'round'; did you mean rounds"):
        flower_apps.parse_changes(config, ["round=5"])
    huge = f"rounds={2**63}"  # which no message takes
    for text in ("rounds=2.5", "rounds=true", "fit=1", "lr=much", "lr=nan", "lr=1e999", huge):
        with pytest.raises(UsageError, match="must be of type"):
            flower_apps.parse_changes(config, [text])


def test_an_app_is_forbidden_and_what_it_keeps_is_deleted(agent_home: Path) -> None:
    folder = str(apps.FOLDER / "mean")
    assert agent(agent_home, "app", "add", folder)[0] == 0
    code, _, said = agent(agent_home, "task", "forbid", "flower:mean")
    assert (code, said) == (0, "forbidden: flower:mean\n")
    assert settings.read(agent_home).forbidden_tasks == ("flower:mean",)
    assert agent(agent_home, "task", "forbid", "flower:other")[0] == 2
    assert agent(agent_home, "app", "add", folder)[0] == 0
    assert settings.read(agent_home).forbidden_tasks == ()
    for name in ("mean", "other"):
        (agent_home / f"apps/{name}/runs").mkdir(parents=True)
        (agent_home / "app-answers").mkdir(exist_ok=True)
        (agent_home / f"app-answers/{name}-1.json").write_text(json.dumps({"app": name}))
    assert agent(agent_home, "app", "remove", "mean")[0] == 0
    assert [path.name for path in (agent_home / "apps").iterdir()] == ["other"]
    assert [path.name for path in (agent_home / "app-answers").iterdir()] == ["other-1.json"]


@pytest.mark.attack("20.wire", by="dependency")
def test_a_card_of_an_app_has_bounds(tmp_path: Path) -> None:
    """Attack: an app's pyproject.toml is a pipe, or has a key that moves the cursor; its folders
    are deeper than Python can go, or have a name that is no text."""
    folder = tmp_path / "mean"
    shutil.copytree(apps.FOLDER / "mean", folder)
    file = folder / "pyproject.toml"
    text = file.read_text()
    file.write_text(text + '\n"\\u001b[2Jx" = 1\n')
    with pytest.raises(UsageError, match="do not print") as caught:
        flower_apps.read_card(folder)
    assert caught.value.message.isprintable()
    file.write_text(text)
    before = flower_apps.digest(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.py")).touch()  # no text
    assert flower_apps.digest(folder) != before
    deep = folder / "/".join("d" * 70)
    deep.mkdir(parents=True)
    with pytest.raises(UsageError, match="more than 64 deep"):
        flower_apps.read_card(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match="is no file"):
        flower_apps.read_card(folder)


@pytest.mark.attack("20.consent", by="task")
def test_an_app_may_not_write_where_its_code_is(tmp_path: Path) -> None:
    """Attack: an app may write a folder with code, so that its next message runs other code."""
    folder, data, cache = (tmp_path / name for name in ("mean", "data", "cache"))
    shutil.copytree(apps.FOLDER / "mean", folder)
    for made in (data, cache, data / "rows", tmp_path / "env/bin", tmp_path / "env/lib"):
        made.mkdir(parents=True)
    (tmp_path / "env/pyvenv.cfg").touch()
    (tmp_path / "env/bin/python").symlink_to(sys.executable)
    (tmp_path / "link").symlink_to(folder)
    python = str(tmp_path / "env/bin/python")
    given = {"python": python, "read": [str(data / "rows")]}
    refused = (folder, folder / "mean_app", tmp_path, tmp_path / "link", data, data / "rows")
    refused += (tmp_path / "env/bin", tmp_path / "env/lib", Path(sys.prefix))
    for write in refused:
        with pytest.raises(UsageError, match="would let the app change"):
            flower_apps.install(folder, write=[str(write)], **given)
    _, app = flower_apps.install(folder, write=[str(cache)], **given)
    assert app.write == (str(cache),)


@pytest.mark.attack("23.4")
def test_an_app_may_not_read_the_home(tmp_path: Path) -> None:
    """Attack: the folder of an app, or what it may read, has the home with the keys in it."""
    folder, home = tmp_path / "mean", tmp_path / "data" / "agent"
    shutil.copytree(apps.FOLDER / "mean", folder)
    (folder / ".local" / "agent").mkdir(parents=True)
    (home / "cache").mkdir(parents=True)
    for read, inside in ((str(home.parent), home), ("", folder / ".local" / "agent")):
        with pytest.raises(UsageError, match="which has keys"):
            flower_apps.install(folder, read=[read] if read else [], home=inside)
    _, app = flower_apps.install(folder, read=[str(home / "cache")], home=home)
    assert app.read == (str(home / "cache"),)
