"""Checks the settings of a run of a Flower app, and describes its limits. Pure."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.local.flower_apps import PREFIX
from protocols.local.safe_paths import path_in

FOLDER = "apps"
RESTARTED = (
    "the coordinator was restarted, and the state of a ServerApp cannot be restored: start it again"
)
#: Fields that a run of an app uses; `rounds` is for display.
_USED = frozenset(
    {"task", "app", "rounds", "settings", "quorum", "deadline_s", "keep_versions", "handshake"}
)
#: Why an option has no place there, by its field; the others are decided by the ServerApp.
_WHY = {
    "secure": "a ServerApp sees the answer of each peer, so --secure cannot hide them",
    "dp_epsilon": "the noise of --dp is added in our own tasks, not in a ClientApp",
    "dp_user_epsilon": "the coordinator averages nothing itself, so --dp-user has no place",
    "codec": "a Flower app sends whole arrays, so no --codec compresses them",
    "strategy": "the ServerApp has its own strategy",
    "clip_norm": "the ServerApp averages, and --clip-norm does not reach it",
    "outlier_limit": "the ServerApp averages, and --outlier-limit does not reach it",
    "weighting": "the ServerApp averages, and --weighting does not reach it",
    "mode": "the ServerApp decides when it sends, so there is no --mode buffered",
}
HINT = "leave it out; --set changes the app's own run config"
_DEFAULTS = RunSpec(task="", rounds=1)


#: What an operator reads before such a run starts.
NOTE = (
    "note: a ServerApp cannot be resumed: a restart of the coordinator ends this run; updates are "
    "sent whole and unmasked, and only the app checks them"
)


def is_app(spec: RunSpec) -> bool:
    """True if a ServerApp decides in this run."""
    return bool(spec.app)


def name_of(spec: RunSpec) -> str:
    """The app's name."""
    return spec.task.removeprefix(PREFIX)


@cache
def number_of(name: str) -> int:
    """An id for Flower, of a run or a peer: the same in each run, and on each coordinator."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


def folder_of(home: Path, run_id: str) -> Path:
    """The folder in which the ServerApp of a run works."""
    return path_in(home / FOLDER, run_id)


def check(spec: RunSpec) -> None:
    """Raise UsageError for a setting that would have no effect."""
    if not spec.task.startswith(PREFIX):
        raise UsageError(f"{spec.task!r} is no Flower app", f"{PREFIX}NAME")
    for field in RunSpec.__struct_fields__:
        if field not in _USED and getattr(spec, field) != getattr(_DEFAULTS, field):
            raise UsageError(why_not(field), HINT)


def why_not(field: str) -> str:
    """Why an option, by its field, has no place in a run of an app."""
    option = f"--{field.replace('_', '-')}"
    return _WHY.get(field, f"the ServerApp decides, and {option} does not reach it")
