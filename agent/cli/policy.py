"""`commonweight-agent policy`: what the agent may do on its owner's machine."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli.common import (
    Json,
    format_duration,
    is_running,
    print_data,
    print_line,
)
from agent.cli.names import complete_settings, complete_values
from agent.home import settings, settings_schema
from agent.policy import consent
from agent.setup import consents
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.command_line import App
from protocols.local.durations import parse_seconds

policy = App(name="policy", help="Show and change what the agent may do, when, and whom it trusts.")

_SENSOR_INTERVAL_S = 0.3


@policy.command("show")
def show_policy(json: Json = False) -> None:
    """Show every setting: value, where it is set, and meaning."""

    infos = settings.describe(homes.open_home("agent"))
    lines = (
        f"{info.name:21} {settings.format_value(info.value) or '(none)':12} {info.source}\n"
        f"    {info.about}"
        for info in infos
    )
    print_data([info._asdict() for info in infos], lines, json=json)


@policy.command("set", context_settings={"ignore_unknown_options": True})  # -3 is a value
def set_policy(
    key: Annotated[
        str,
        typer.Argument(help="The setting; see policy show.", autocompletion=complete_settings),
    ],
    value: Annotated[
        str,
        typer.Argument(
            help="Its value; several are separated by commas.", autocompletion=complete_values
        ),
    ],
    duration: Annotated[
        str, typer.Option("--for", help="Set a rule's mode only for a while, such as 2h.")
    ] = "",
) -> None:
    """Change a setting of this machine. Rules take always, auto or never."""

    home = homes.open_home("agent")
    key = key.replace(".", "_")  # data.columns
    if duration:
        for_s = parse_seconds(duration)
        _override(home, key, value, for_s)
        print_line(f"{key} is {value} for the next {format_duration(for_s)}")
        return
    parsed = settings.parse_value(key, value)
    if key == "data":
        from agent.setup import own_data

        print_line(own_data.check_setting(settings.read(home, data=parsed)))
    if key == "data_columns":
        from agent.setup import own_data

        if note := own_data.check_columns(settings.read(home).data, parsed):
            print_line(note)
    if key in ("tasks", "forbidden_tasks"):
        known = {consents.EVERY, *consents.known_tasks(settings.read(home))}
        for name in parsed:
            if name not in known:
                print_line(f"this machine has no task {name!r}; commonweight-agent task list")
    _check_names(key, parsed)
    if key == "told_folder":
        _check_memory_stays(home, parsed)
    if key == "models" and parsed and not Path(parsed).is_dir():
        print_line(f"there is no folder {parsed} yet")
    if key == "sandbox_read":
        for path in map(Path, parsed):
            if home.resolve().is_relative_to(path.resolve()):
                print_line(f"with {path}, tasks may read the agent's keys, which are in {home}")
            elif not path.exists():
                print_line(f"{path} does not exist yet")
    with settings.locked(home):
        settings.change(home, **{key: parsed}, **_new_consents(home, key, parsed))
    source = next(setting.source for setting in settings.describe(home) if setting.name == key)
    print_line(f"{key} is {value or 'empty'} in {home / settings.FILE}")
    if source != settings.FILE:
        print_line(f"but {source} is set and overrides it")
    if is_running(home) and key in settings_schema.RESTART_KEYS:
        print_line("the running agent applies it after its current work")
    if key == "secure_min" and (why := settings.read(home).no_runs_because()):
        print_line(f"{why}: commonweight-agent trust add ID")
    if key in ("data", "tasks") and (awaiting := consents.awaiting_columns(settings.read(home))):
        print_line(
            f"no column may be used yet; to name them: {consents.columns_command(awaiting[0])}"
        )


def _new_consents(home: Path, key: str, parsed: Any) -> dict[str, Any]:
    """What changes with `tasks`: new ones await the names of columns, as with `task allow`."""
    if key != "tasks":
        return {}
    own, known = settings.read_own(home), consents.known_tasks(settings.read(home))
    asked = {consents.EVERY, *consent.USES_COLUMNS}
    new = [name for name in parsed if name in asked and name not in own.tasks]
    return {"consents": consents.allowing(own, known, new)["consents"]}


def _check_names(key: str, parsed: Any) -> None:
    """Raise UsageError for a name that can mean nothing here, so that the rule would never hold."""
    if key == "analyze_operations":
        from protocols.analytics.parser import SIGNATURES

        known = ", ".join(SIGNATURES)
        for name in parsed:
            if name not in {"*", *SIGNATURES}:
                raise UsageError(f"there is no operation {name!r}", f"known: {known}; * is all")
    if key == "jobs_private_models":
        for name in parsed:
            if not re.fullmatch(r"\*|[0-9a-f]{64}", name):
                raise UsageError(
                    f"{name!r} is no digest of a model, which has 64 characters, 0-9 and a-f",
                    "the operator sees them: commonweight models list; * is all",
                )


def _check_memory_stays(home: Path, folder: str) -> None:
    """Raise UsageError if with another folder the agent would forget what it told."""
    old = settings.told_folder(home)
    new = Path(folder) if folder else home / settings.TOLD
    if new == old or not (old / settings.MEMORY_FILE).exists():
        return
    if (new / settings.MEMORY_FILE).exists():
        raise UsageError(
            f"{old} records what this agent has told, and {new} what others have told; they cannot "
            "be merged, and the next answer could be compared with only one of them",
            f"keep both agents as they are, or move {old} away if no earlier answer matters",
        )
    raise UsageError(
        f"{old} records what this agent has told about its rows, and {new} does not",
        f"stop the agent, then run: cp -a {old} {new}",
    )


def _override(home: Path, key: str, value: str, for_s: float) -> None:
    """Set a temporary mode, which overrides the settings. Raises UsageError."""
    import msgspec

    from agent.home import status_files
    from agent.policy import rules

    if key not in ("work", *rules.RULES):
        raise UsageError(f"{key} has no mode", f"--for takes: work, {', '.join(rules.RULES)}")
    try:
        mode = msgspec.convert(
            {"value": value, "until": time.time() + for_s}, status_files.RuleOverride
        )
    except msgspec.ValidationError as err:
        raise UsageError(
            f"{key} must be one of always, auto, never; not {value!r}",
            f"commonweight-agent policy set {key} always --for 2h",
        ) from err
    request = status_files.read_request(home)
    modes = {name: old for name, old in request.modes.items() if old.until > time.time()}
    status_files.write_request(home, msgspec.structs.replace(request, modes=modes | {key: mode}))


@policy.command("now")
def policy_now(json: Json = False) -> None:
    """Show the policy's decision now, and the sensor readings."""
    from agent.daemon.policy_loop import format_decision
    from agent.policy import rules, sensors

    home = homes.open_home("agent")
    chosen = settings.read(home)
    machine = sensors.Sensors(home, gpu=sensors.has_gpu(chosen.device))
    machine.read()
    time.sleep(_SENSOR_INTERVAL_S)  # the CPU use of other programs needs two readings
    readings = machine.read()
    decision = format_decision(rules.decide(chosen, readings))
    sensed = readings._asdict()
    lines = (f"{k:21} {'unknown' if value is None else value}" for k, value in sensed.items())
    print_data({"decision": decision, "sensed": sensed}, [decision, *lines], json=json)
