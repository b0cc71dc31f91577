"""Only the code of an app that its owner has allowed runs, whatever lies beside it."""

from __future__ import annotations

import importlib.util
import py_compile
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.errors import TrainerFailed, UsageError
from protocols.local import flower_apps
from protocols.messages import app_work
from tests.agent.clientapp.test_flower_apps import APPS, MODEL, TOLD, Machine

FILE = "mean_app/client_app.py"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "source" / "mean"
    shutil.copytree(APPS / "mean", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def machine(app: Path, tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "machine").mkdir()
    made = Machine(tmp_path / "machine", "mean", source=app)
    yield made
    made.process.close()


def loss(machine: Machine, run: str = "r1") -> float | None:
    work = machine.work(run=run, message_type="train", told=TOLD, **machine.version(MODEL))
    return app_work.metrics_of(app_work.decode_records(machine.ask(work).told))[1]["train_loss"]


def change(app: Path) -> str:
    """Let the app tell another loss; its text before."""
    text = (app / FILE).read_text()
    (app / FILE).write_text(text.replace('"train_loss": 1.0', '"train_loss": 2.0'))
    return text


@pytest.mark.attack("20.consent", by="thief")
def test_bytecode_in_an_apps_folder_does_not_run(app: Path, machine: Machine) -> None:
    """Attack: bytecode of other code is put beside the files of an installed app."""
    text = change(app)
    cached = Path(importlib.util.cache_from_source(str(app / FILE)))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(app / FILE), str(cached), invalidation_mode=mode)
    (app / FILE).write_text(text)
    assert loss(machine) == 1.0


def test_a_new_installation_replaces_the_running_code(app: Path, machine: Machine) -> None:
    assert loss(machine) == 1.0
    change(app)
    machine.install(app)
    assert loss(machine, "r2") == 2.0


@pytest.mark.attack("20.consent", by="thief")
def test_files_that_change_before_the_import_do_not_run(
    app: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: an app's files are exchanged after the agent has compared them, before the import."""
    card = machine.card
    change(app)
    monkeypatch.setattr(flower_apps, "read_card", lambda folder: card)
    with pytest.raises(TrainerFailed, match="not those that were installed"):
        loss(machine)


@pytest.mark.attack("20.consent", by="thief")
def test_all_that_can_be_imported_is_in_the_digest(app: Path) -> None:
    """Attack: code lies in an app's folder where its digest does not look."""
    before = flower_apps.digest(app)
    (app / "__pycache__").mkdir()
    (app / "__pycache__" / "x.cpython-311.opt-1.pyc").write_bytes(b"")  # never loaded
    (app / ".venv").mkdir()
    (app / ".venv" / "x.py").write_text("")  # no name of a module
    assert flower_apps.digest(app) == before
    cached = ("__pycache__/evil.pyc", "__pycache__/evil.abi3.so", "__pycache__/evil.x.py")
    for name in ("evil.pyc", "node_modules/evil.py", "venv/evil.py", *cached):
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_bytes(b"")
        assert flower_apps.digest(app) != before, name
        (app / name).unlink()


@pytest.mark.attack("20.consent", by="thief")
def test_a_folder_that_is_a_link_is_refused(app: Path) -> None:
    """Attack: an app's package is a link to a folder that the digest does not cover."""
    (app / ".hidden").mkdir()
    (app / "mean_app").rename(app / ".hidden/mean_app")
    (app / "mean_app").symlink_to(".hidden/mean_app")
    with pytest.raises(UsageError, match="mean_app is a link to a folder"):
        flower_apps.read_card(app)
