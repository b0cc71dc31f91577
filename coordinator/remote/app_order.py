"""Builds the request for a run of a Flower app from the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from coordinator.api.schema import StartRunRequest
from coordinator.runs import options
from coordinator.runs.apps import rules
from coordinator.storage import installed_apps
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.local import flower_apps, homes
from protocols.local.durations import parse_seconds

#: Options that a run of an app takes; the others would have no effect.
_TAKEN = frozenset({"flower", "set", "quorum", "deadline", "keep-versions"})
#: By Flower's own templates: the setting that says how many rounds an app has.
_ROUNDS = "num-server-rounds"
_NAMES = {"dp": "dp_epsilon", "dp-user": "dp_user_epsilon"}


def build(typed: Mapping[str, Any]) -> StartRunRequest:
    """The request for the app in the folder `flower`. On the coordinator's machine it is installed
    as its files are now. Raises UsageError."""
    defaults = {one.name: one.default for one in options.OPTIONS}
    for name, value in typed.items():
        if name not in _TAKEN and value not in (None, defaults[name], [], ""):
            if name == "task":
                raise UsageError("name a task or a Flower app, not both", "leave the task out")
            why = rules.why_not(_NAMES.get(name, name.replace("-", "_")))
            raise UsageError(why, rules.HINT)
    folder = Path(typed["flower"]).expanduser()
    card = _installed(folder)
    changes = flower_apps.parse_changes(card.config, typed.get("set") or ())
    rounds = {**card.config, **changes}.get(_ROUNDS, 1)
    deadline = str(typed.get("deadline") or defaults["deadline"])
    if deadline == "auto":
        raise UsageError("--deadline auto needs our own rounds", "--deadline 10m")
    spec = RunSpec(
        task=card.task,
        app=card.code,
        rounds=rounds if type(rounds) is int and rounds > 0 else 1,
        settings=changes,
        quorum=typed.get("quorum") or 1,
        deadline_s=parse_seconds(deadline),
        keep_versions=typed.get("keep-versions") or defaults["keep-versions"],
    )
    return StartRunRequest(spec=spec)


def _installed(folder: Path) -> flower_apps.AppCard:
    """The app's card. If this is the coordinator's machine, it is installed as it is now, with the
    choices that were made for this folder. Raises UsageError if they were made for another one."""
    home = homes.home_path("coordinator")
    if not (home / homes.STAMP).exists():
        return flower_apps.read_card(folder)
    card, app = flower_apps.install(folder, home=home)
    before = installed_apps.read(home).get(card.name)
    if before is not None:
        kept = replace(before, folder=app.folder, code=app.code)
        if kept != app and before.folder != app.folder:
            raise UsageError(
                f"the Flower app {card.name!r} is installed from {before.folder}, with options "
                "that hold for that folder alone",
                f"commonweight app add {folder}, with the options that it needs",
            )
        app = kept
    if app != before:
        installed_apps.put(home, card.name, app)
    return card
