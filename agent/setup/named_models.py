"""Fetches the best or newest version of a run from the coordinator, for `predict --run`."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from agent.home import enrollment_file
from agent.home.credentials import Credentials
from protocols.errors import BadMessage, UnknownName, Unreachable
from protocols.local.atomic_files import write_private
from protocols.local.safe_paths import path_in
from protocols.messages.work import NamedModel, Which
from protocols.model.weights import file_digest

FOLDER = "fetched"
#: Other files in the folder are deleted: the newest ones are used offline.
MAX_MODELS = 2
_SUFFIX = ".safetensors"


def fetch(home: Path, name: str, which: Which) -> tuple[Path, NamedModel]:
    """The file of a version, and what it is. `name`: a run, or a task: then its newest run.

    Without the coordinator, it is the version that was fetched under this name before. Raises
    UnknownName, Unreachable, SessionLost, BadWeights, NotEnrolled.
    """
    from agent.transport.coordinator_client import CoordinatorClient

    if ".py:" in name:
        name = Path(name).name  # "./pets.py:Pets" is the task pets.py:Pets
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", name):
        raise UnknownName(f"no run and no task has the name {name!r}", "commonweight run list")
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    note = path_in(folder, f"{name.replace(':', '-')}-{which}", ".json")
    link = CoordinatorClient(Credentials.load(home, enrollment_file.read_enrollment(home)))
    try:
        model = link.named_model(name, which)
        path = path_in(folder, model.digest, _SUFFIX)
        if not path.exists() or file_digest(path) != model.digest:
            link.download(model.digest, model.nbytes, path)
        write_private(note, msgspec.json.encode(model))
        path.touch()
        _drop_old(folder)
    except Unreachable:
        if (kept := _kept(folder, note)) is None:
            raise
        return kept
    finally:
        link.close()
    return path, model


def _kept(folder: Path, note: Path) -> tuple[Path, NamedModel] | None:
    """What was fetched under this name before, if it is intact."""
    try:
        model = msgspec.json.decode(note.read_bytes(), type=NamedModel)
        path = path_in(folder, model.digest, _SUFFIX)
        return (path, model) if file_digest(path) == model.digest else None
    except (OSError, msgspec.DecodeError, BadMessage):
        return None


def _drop_old(folder: Path) -> None:
    newest_first = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: -path.stat().st_mtime)
    for old in newest_first[MAX_MODELS:]:
        old.unlink(missing_ok=True)
